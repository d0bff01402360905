"""The real servers start, are ours, can be taken away and given back with their data."""

import socket
import time

import grpc
import nats as nats_client
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

import testkit
from testkit.servers import NatsServer, milvus_server, nats_server, valkey_server

pytestmark = pytest.mark.integration


async def test_nats_keeps_port_and_stream_over_kill9():
    with nats_server() as server:
        connection = await nats_client.connect(server.url)
        jetstream = connection.jetstream()
        await jetstream.add_stream(name="S", subjects=["s.>"])
        await jetstream.publish("s.a", b"kept")
        await connection.close()
        server.kill9()
        assert not server.running
        server.start()
        connection = await nats_client.connect(server.url)
        assert (await connection.jetstream().stream_info("S")).state.messages == 1
        await connection.close()


def test_a_port_that_another_server_holds_is_not_taken_for_ours():
    with nats_server() as first:
        second = NatsServer(port=first.port)
        try:
            with pytest.raises(RuntimeError, match=r"did not start|ended with"):
                second.start()
            assert not second.running
        finally:
            second.close()
        assert first.running


def test_a_paused_server_answers_nothing_until_it_is_resumed():
    with nats_server() as server:
        server.pause()
        with socket.create_connection(("127.0.0.1", server.port), timeout=1) as connection:
            connection.settimeout(0.3)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            server.resume()
            connection.settimeout(5)
            assert connection.recv(4) == b"INFO"


def test_valkey_wants_its_password_and_keeps_data_over_a_restart():
    with valkey_server() as server:
        redis.Redis.from_url(server.url).set("k", "v")
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=server.port, retry=Retry(NoBackoff(), 0)).get("k")
        server.stop()
        server.start()
        assert redis.Redis.from_url(server.url).get("k") == b"v"


def test_closing_leaves_no_process_and_no_folder():
    with valkey_server() as server:
        folder = server.data_dir
    assert not server.running
    assert not folder.exists()


def test_milvus_answers_and_stops():
    with milvus_server() as server:
        with grpc.insecure_channel(server.uri.removeprefix("http://")) as channel:
            grpc.channel_ready_future(channel).result(timeout=5)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < server.stop_timeout_s
        testkit.eventually_sync(lambda: not server.running)
