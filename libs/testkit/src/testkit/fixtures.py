"""pytest fixtures over the real servers; one server per test module, started when first asked for.

Import the names into a conftest, or name this module in the root conftest's pytest_plugins.
"""

from collections.abc import Iterator

import pytest

from testkit.servers import (
    MilvusServer,
    NatsServer,
    ValkeyServer,
    milvus_server,
    nats_server,
    valkey_server,
)

__all__ = ["milvus", "milvus_uri", "nats", "nats_url", "valkey", "valkey_url"]


@pytest.fixture(scope="module")
def nats() -> Iterator[NatsServer]:
    """A real nats-server; a test that stops it starts it again."""
    with nats_server() as server:
        yield server


@pytest.fixture(scope="module")
def nats_url(nats: NatsServer) -> str:
    """Its URL."""
    return nats.url


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    """A real valkey-server; a test that stops it starts it again."""
    with valkey_server() as server:
        yield server


@pytest.fixture(scope="module")
def valkey_url(valkey: ValkeyServer) -> str:
    """Its URL, with the password."""
    return valkey.url


@pytest.fixture(scope="module")
def milvus() -> Iterator[MilvusServer]:
    """A real milvus-lite server; a test that stops it starts it again."""
    with milvus_server() as server:
        yield server


@pytest.fixture(scope="module")
def milvus_uri(milvus: MilvusServer) -> str:
    """Its URI."""
    return milvus.uri
