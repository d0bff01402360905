"""pytest fixtures over the real servers; one server per test module, started when first asked for.

Import the names into a conftest, or name this module in the root conftest's pytest_plugins.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from testkit.servers import (
    MilvusServer,
    NatsServer,
    ValkeyServer,
    milvus_server,
    nats_server,
    valkey_server,
)

__all__ = ["milvus", "milvus_uri", "model_store", "nats", "nats_url", "valkey", "valkey_url"]


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


@pytest.fixture(scope="session")
def model_store(request: pytest.FixtureRequest) -> Path:
    """The store with the real models, which `make models` fills; a test that asks for it fails where there is none."""
    store = Path(os.environ.get("PRESSROOM_HOME", request.config.rootpath / ".pressroom")) / "models"
    if not store.is_dir():
        pytest.fail(f"no models in {store}: run `make models` first")
    return store
