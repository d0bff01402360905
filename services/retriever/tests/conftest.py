"""Fixtures of the retriever's tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # retriever_fakes and retriever_suite lie beside the tests

from testkit.fixtures import milvus, nats

__all__ = ["milvus", "nats"]
