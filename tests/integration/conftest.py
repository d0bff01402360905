"""Real servers for the integration tests."""

from testkit.fixtures import milvus, milvus_uri, nats, nats_url, valkey, valkey_url

__all__ = ["milvus", "milvus_uri", "nats", "nats_url", "valkey", "valkey_url"]
