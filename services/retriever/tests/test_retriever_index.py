"""The in-memory index keeps the contract, so that tests which use it mean something."""

import pytest
from retriever_fakes import FakeIndex
from retriever_suite import IndexSuite


class TestFakeIndex(IndexSuite):
    @pytest.fixture
    def index(self) -> FakeIndex:
        return FakeIndex()
