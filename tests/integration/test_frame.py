"""The frame between real processes: what crosses a hop, how a process starts, serves, fails and ends."""

import asyncio
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from pressroom.embedder.v1 import embedder_pb2, embedder_pb2_grpc
from pressroom.generator.v1 import generator_pb2, generator_pb2_grpc

import testkit
from chassis import context, rpc, telemetry
from chassis.app import LIVENESS
from chassis.errors import Code, PlatformError
from testkit.processes import ServiceProcess
from testkit.servers import running

pytestmark = pytest.mark.integration

SCRIPT = str(pathlib.Path(__file__).parent / "frame_service.py")
SERVICE = "pressroom.embedder.v1.EmbedderService"


def make_back(nats_url, **settings):
    argv = (sys.executable, SCRIPT, "back")
    return ServiceProcess("back", {"NATS_URL": nats_url, "SHUTDOWN_GRACE_S": 3, **settings}, argv=argv)


@pytest.fixture(scope="module")
def back(nats_url):
    with running(make_back(nats_url)) as process:
        yield process


@pytest.fixture(scope="module")
def front(nats_url, back):
    settings = {"NATS_URL": nats_url, "BACK_ADDR": back.address, "SHUTDOWN_GRACE_S": 3}
    with running(ServiceProcess("front", settings, argv=(sys.executable, SCRIPT, "front"))) as process:
        yield process


@pytest.fixture
async def channel(front, back):
    if not back.running:
        back.start()
    async with rpc.connect(front.address) as channel:
        yield channel


async def embed(channel, model: str, timeout_s: float = 10.0) -> dict:
    stub = embedder_pb2_grpc.EmbedderServiceStub(channel)
    async with rpc.call("front.Embed", timeout_s=timeout_s) as call:
        request = embedder_pb2.EmbedRequest(model=model)
        response = await stub.Embed(request, timeout=call.timeout_s, metadata=call.metadata)
    return json.loads(response.model_version)


async def test_request_id_tenant_trace_and_a_shrinking_deadline_cross_two_hops(channel):
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(TracerProvider())
    deadline_s = time.monotonic() + 4.0
    with (
        telemetry.tracer().start_as_current_span("client"),
        context.use(context.RequestContext("req_42", "acme", deadline_s)),
    ):
        trace_id = telemetry.trace_id()
        seen = await embed(channel, "look", timeout_s=60)
    assert (seen["request_id"], seen["tenant"], seen["trace_id"]) == ("req_42", "acme", trace_id)
    assert len(trace_id) == 32
    # The front would give its call 30 s; what was left of the client's 4 s is what the back gets.
    assert 2.0 < seen["remaining_s"] < 4.0


async def test_one_trace_covers_client_both_services_and_the_bus_consumer(channel, front, back):
    with telemetry.tracer().start_as_current_span("client"), context.use(context.RequestContext("req_trace", "acme")):
        trace_id = telemetry.trace_id()
        await embed(channel, "publish")

    def spans():
        return {
            (s["service"], s["name"]): s
            for process in (front, back)
            for s in process.spans()
            if s["trace_id"] == trace_id
        }

    wanted = {
        ("front", "front.Embed"),
        ("front", "back.Embed"),
        ("back", "back.Embed"),
        ("back", "back-records pressroom.events.request.completed"),
        ("back", "record stored"),
    }
    await testkit.eventually(lambda: wanted <= set(spans()))
    found = spans()
    assert found["back", "back.Embed"]["parent_id"] == found["front", "back.Embed"]["span_id"]
    assert found["front", "back.Embed"]["parent_id"] == found["front", "front.Embed"]["span_id"]
    heard = found["back", "back-records pressroom.events.request.completed"]
    assert heard["parent_id"] == found["back", "back.Embed"]["span_id"]
    lines = [row for process in (front, back) for row in process.log_lines("rpc finished")]
    of_this = [row for row in lines if row.get("trace_id") == trace_id]
    assert {(row["service"], row["request_id"], row["tenant"]) for row in of_this} == {
        ("front", "req_trace", "acme"),
        ("back", "req_trace", "acme"),
    }


async def test_an_error_crosses_two_hops_unchanged(channel):
    with pytest.raises(PlatformError) as caught:
        await embed(channel, "fail")
    error = caught.value
    assert error.message == "300 tokens, but 256 are read: cut 44 — bitte"
    assert (error.code, error.param, error.reason) == (Code.OUT_OF_RANGE, "input[3]", "context_length_exceeded")
    assert (error.retryable, error.retry_after_s) == (False, 2.5)


async def test_an_unexpected_error_shows_nothing_outside_and_its_cause_in_the_log(channel, back):
    with pytest.raises(PlatformError) as caught:
        await embed(channel, "bug")
    assert caught.value.code is Code.INTERNAL
    assert "secret" not in caught.value.message
    (line,) = back.log_lines("rpc failed unexpectedly")
    assert "secret detail" in line["exception"]


async def test_a_deadline_ends_the_work_at_both_hops(channel, front, back):
    began = time.monotonic()
    with pytest.raises(PlatformError) as caught:
        await embed(channel, "sleep:20", timeout_s=0.5)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    assert time.monotonic() - began < 2.0
    for process in (front, back):
        await testkit.eventually(
            lambda p=process: (
                any(r["code"] == "CANCELLED" for r in p.log_lines("rpc finished"))
                or any(r["code"] == "DEADLINE_EXCEEDED" for r in p.log_lines("rpc finished"))
            )
        )


async def test_a_client_that_leaves_a_stream_ends_it_at_the_last_hop_within_300_ms(channel):
    before = (await embed(channel, "look"))["num_cancelled"]
    stub = generator_pb2_grpc.GeneratorServiceStub(channel)
    async with rpc.call("front.Generate", timeout_s=10) as call:
        stream = stub.Generate(generator_pb2.GenerateRequest(), timeout=call.timeout_s, metadata=call.metadata)
        async for _ in stream:
            break
        stream.cancel()

    async def cancelled():
        return (await embed(channel, "look"))["num_cancelled"] == before + 1

    await testkit.eventually(cancelled, timeout_s=0.3, interval_s=0.02)


async def test_a_stream_that_breaks_tells_why_after_its_first_messages(channel):
    stub, texts = generator_pb2_grpc.GeneratorServiceStub(channel), []
    with pytest.raises(PlatformError) as caught:
        async with rpc.call("front.Generate", timeout_s=10) as call:
            request = generator_pb2.GenerateRequest(model="breaks")
            async for message in stub.Generate(request, timeout=call.timeout_s, metadata=call.metadata):
                texts.append(message.delta.text)
    assert texts == ["0", "1"]
    assert (caught.value.code, caught.value.retry_after_s) == (Code.OVERLOADED, 2.0)


async def test_a_killed_service_is_unavailable_and_is_found_again_within_three_seconds(channel, back):
    back.kill9()
    with pytest.raises(PlatformError) as caught:
        await embed(channel, "look", timeout_s=5)
    assert caught.value.code is Code.UNAVAILABLE
    assert caught.value.retryable
    back.start()

    async def answers():
        try:
            return await embed(channel, "look", timeout_s=2)
        except PlatformError:
            return None

    await testkit.eventually(answers, timeout_s=3)


async def test_health_and_reflection_name_the_services(channel):
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", SERVICE):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
    async for response in stub.ServerReflectionInfo(iter(requests), timeout=5):
        listed = {service.name for service in response.list_services_response.service}
    assert {SERVICE, "pressroom.generator.v1.GeneratorService", "grpc.health.v1.Health"} <= listed


async def test_http_tells_of_health_readiness_and_metrics(channel, back):
    await embed(channel, "look")
    status, body = back.get("/healthz")
    assert (status, json.loads(body)["service"]) == (200, "back")
    status, body = back.get("/readyz")
    state = json.loads(body)
    assert status == 200
    assert (state["ready"], state["service"], state["queue_depth"]) == (True, "back", 3)
    assert back.metric("pressroom_requests_total", service="back", method="Embed", code="OK") >= 1
    assert back.metric("pressroom_request_seconds_count", service="back", method="Embed") >= 1
    assert back.metric("pressroom_queue_depth", service="back") == 3
    assert back.get("/nothing")[0] == 404


async def test_a_condition_that_does_not_hold_is_not_ready_but_healthy(nats_url):
    process = make_back(nats_url, TROUBLE="not ready")
    process._ready_path = "/healthz"
    try:
        process.start()
        await testkit.eventually(lambda: json.loads(process.get("/readyz")[1])["phase"] == "running")
        status, body = process.get("/readyz")
        assert status == 503
        assert json.loads(body)["checks"]["never"] is False
        async with rpc.connect(process.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answers = {
                name: (await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)).status
                for name in ("", SERVICE, LIVENESS)
            }
        # An orchestrator restarts by liveness alone: a neighbour that is away is no reason to.
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        assert answers == {"": not_serving, SERVICE: not_serving, LIVENESS: serving}
    finally:
        process.close()


async def test_sigterm_lets_a_running_call_finish_and_takes_no_new_one(nats_url):
    with running(make_back(nats_url)) as process:
        async with rpc.connect(process.address) as channel:
            await embed(channel, "look")
            in_flight = asyncio.create_task(embed(channel, "sleep:1.5"))
            await asyncio.sleep(0.3)
            process.terminate()
            await testkit.eventually(lambda: process.log_lines("service stops"))
            with pytest.raises(PlatformError) as caught:
                async with rpc.connect(process.address) as late:
                    await embed(late, "look", timeout_s=1)
            assert caught.value.code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)
            assert (await in_flight)["trace_id"]
        assert await asyncio.to_thread(process.wait, 10) == 0
        assert process.log_lines("service stopped")


async def test_sigterm_ends_within_the_grace_what_does_not_end_by_itself(nats_url):
    with running(make_back(nats_url, SHUTDOWN_GRACE_S=1)) as process:
        async with rpc.connect(process.address) as channel:
            await embed(channel, "look")
            in_flight = asyncio.create_task(embed(channel, "sleep:60", timeout_s=60))
            await asyncio.sleep(0.3)
            began = time.monotonic()
            process.terminate()
            assert await asyncio.to_thread(process.wait, 10) == 0
            assert time.monotonic() - began < 5
            with pytest.raises(PlatformError):
                await in_flight


def test_sigterm_ends_a_process_whose_task_misses_its_cancellation(nats_url):
    with running(make_back(nats_url, SHUTDOWN_GRACE_S=1, TROUBLE="deaf")) as process:
        process.terminate()
        assert process.wait(10) == 0
        assert process.log_lines("tasks do not end")[0]["tasks"] == ["deaf"]


@pytest.mark.parametrize(
    ("setting", "value"), [("BACK_GRPC_PORT", "none"), ("BACK_HTTP_PORT", "70000"), ("BACK_LOG_LEVEL", "LOUD")]
)
def test_bad_configuration_exits_78_and_names_the_field(setting, value):
    env = dict(os.environ) | {"BACK_GRPC_PORT": "1024", "BACK_HTTP_PORT": "1025", setting: value}
    done = subprocess.run([sys.executable, SCRIPT, "back"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 78
    assert setting in done.stderr
    assert "Traceback" not in done.stderr


def _fails_to_start(process: ServiceProcess, why: str) -> None:
    try:
        with pytest.raises(RuntimeError, match="ended with 1"):
            process.start()
        assert why in process.log
    finally:
        process.close()


def test_a_set_up_that_fails_ends_the_process_with_its_reason(nats_url):
    _fails_to_start(make_back(nats_url, TROUBLE="setup"), "expected sha256 aa, found bb")


@pytest.mark.parametrize("kind", ["port", "http_port"])
def test_a_taken_port_ends_the_process_and_is_named(nats_url, kind):
    process = make_back(nats_url)
    with socket.create_server(("127.0.0.1", getattr(process, kind))):
        _fails_to_start(process, str(getattr(process, kind)))


async def test_a_background_task_that_breaks_ends_the_process(nats_url):
    with running(make_back(nats_url, TROUBLE="task")) as process:
        assert await asyncio.to_thread(process.wait, 15) == 1
        assert "background work broke" in process.log


def test_a_service_starts_and_serves_without_a_bus(back):
    process = make_back(f"nats://127.0.0.1:{testkit.free_port()}")
    with running(process), grpc.insecure_channel(process.address) as channel:
        stub = embedder_pb2_grpc.EmbedderServiceStub(channel)
        assert stub.Embed(embedder_pb2.EmbedRequest(model="look"), timeout=5).model_version
