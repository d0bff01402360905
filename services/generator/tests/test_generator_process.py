"""The service as a process, with the real model and the real bus."""

import asyncio
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from pressroom.events.v1 import events_pb2
from pressroom.generator.v1 import generator_pb2 as pb
from pressroom.generator.v1 import generator_pb2_grpc

from chassis import context, rpc
from chassis.bus import StreamSpec
from chassis.context import RequestContext
from chassis.nats_bus import NatsBus
from contracts import subjects
from testkit import eventually
from testkit.processes import ServiceProcess

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

MODEL = "smollm2-135m-instruct"


def _settings(model_dir: Path, nats_url: str) -> dict[str, object]:
    return {"MODEL_DIR": model_dir, "NATS_URL": nats_url, "MAX_MODEL_LEN": 1024, "KV_CACHE_MB": 96}


@pytest.fixture(scope="module")
def service(model_store: Path, nats_url: str) -> Iterator[ServiceProcess]:
    process = ServiceProcess("generator", _settings(model_store / MODEL, nats_url))
    try:
        process.start()
        yield process
    finally:
        process.close()


def _request(most: int, ignore_eos: bool = False) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=MODEL,
        chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="What is the capital of France?")]),
        sampling=pb.SamplingParams(temperature=0),
        stop=pb.StopParams(max_tokens=most, ignore_eos=ignore_eos),
    )


async def _blocks_used(stub: generator_pb2_grpc.GeneratorServiceStub) -> int:
    return (await stub.GetStats(pb.GetStatsRequest())).blocks_used


async def test_a_chat_is_answered_counted_and_traced(service: ServiceProcess) -> None:
    async with rpc.connect(service.address) as channel:
        stub = generator_pb2_grpc.GeneratorServiceStub(channel)
        with context.use(RequestContext("req_traced", "t1")):
            async with rpc.call("generator.Generate", timeout_s=60) as call:
                stream = stub.Generate(_request(24), timeout=call.timeout_s, metadata=call.metadata)
                messages = [message async for message in stream]
    assert "".join(m.delta.text for m in messages).strip()
    usage = messages[-1].done.usage
    assert usage.prompt_tokens > 10 and 0 < usage.completion_tokens <= 24
    await eventually(lambda: service.metric("pressroom_tokens_total", kind="completion") >= usage.completion_tokens)
    assert service.metric("pressroom_ttft_seconds_count") >= 1
    (line,) = service.log_lines("generation finished")
    assert (line["request_id"], line["tenant"]) == ("req_traced", "t1")
    assert line["completion_tokens"] == usage.completion_tokens and line["trace_id"]
    await eventually(lambda: {"engine.decode", "generator.Generate"} <= {span["name"] for span in service.spans()})
    spans = {span["name"]: span for span in service.spans()}
    for name in ("engine.prefill", "engine.decode"):
        assert spans[name]["parent_id"] == spans["generator.Generate"]["span_id"]
        assert spans[name]["trace_id"] == line["trace_id"]


async def test_a_client_that_leaves_stops_the_decoding(service: ServiceProcess) -> None:
    async with rpc.connect(service.address) as channel:
        stub = generator_pb2_grpc.GeneratorServiceStub(channel)
        call = stub.Generate(_request(900, ignore_eos=True), metadata=[("x-request-id", "req_left")])
        await call.read()
        await call.read()
        assert await _blocks_used(stub) > 0
        call.cancel()
        await eventually(lambda: _is_idle(stub), timeout_s=10)
    lines = [line for line in service.log_lines("generation finished") if line["request_id"] == "req_left"]
    assert lines[0]["finish_reasons"] == ["cancelled"] and 0 < lines[0]["completion_tokens"] < 900


async def _is_idle(stub: generator_pb2_grpc.GeneratorServiceStub) -> bool:
    return await _blocks_used(stub) == 0


async def test_a_cancel_over_the_bus_ends_the_stream(service: ServiceProcess, nats_url: str) -> None:
    streams = [StreamSpec(s.name, s.subjects, s.retention, s.max_age_s, s.max_bytes) for s in subjects.STREAMS]
    bus = NatsBus.connect(nats_url, "test", streams)
    try:
        await eventually(lambda: bus.connected)
        async with rpc.connect(service.address) as channel:
            stub = generator_pb2_grpc.GeneratorServiceStub(channel)
            call = stub.Generate(_request(900, ignore_eos=True), metadata=[("x-request-id", "req_bus")])
            events = aiter(call)
            await anext(events)
            await bus.broadcast(
                subjects.CONTROL_REQUEST_CANCEL, events_pb2.RequestCancel(id="req_bus").SerializeToString()
            )
            messages = [message async for message in events]
        assert messages[-2].finished.reason == pb.FINISH_REASON_CANCELLED
        published = events_pb2.ModelPublished(id=f"{MODEL}:new", base=MODEL).SerializeToString()
        await bus.publish(subjects.EVENTS_MODEL_PUBLISHED, published, message_id="one")
        await eventually(
            lambda: service.log_lines("published model not loaded: adapters are not supported yet"), timeout_s=20
        )
    finally:
        await bus.close()


async def test_sigterm_finishes_what_runs_and_exits_cleanly(model_store: Path, nats_url: str) -> None:
    process = ServiceProcess("generator", _settings(model_store / MODEL, nats_url) | {"SHUTDOWN_GRACE_S": 30})
    process.stop_timeout_s = 60
    try:
        await asyncio.to_thread(process.start)
        async with rpc.connect(process.address) as channel:
            stub = generator_pb2_grpc.GeneratorServiceStub(channel)
            call = stub.Generate(_request(30, ignore_eos=True))
            events = aiter(call)
            await anext(events)
            stopping = asyncio.create_task(asyncio.to_thread(process.stop))
            messages = [message async for message in events]
            assert messages[-1].done.usage.completion_tokens == 30
            await stopping
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                _ = [message async for message in stub.Generate(_request(1), timeout=5)]
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert process.exit_status == 0
    finally:
        process.close()


def test_a_tampered_model_is_refused_with_its_checksums(model_store: Path, tmp_path: Path) -> None:
    folder = tmp_path / MODEL
    shutil.copytree(model_store / MODEL, folder, copy_function=os.link)
    path = folder / "config.json"
    content = json.loads(path.read_text()) | {"rope_theta": 1.0}
    path.unlink()  # a hard link to the store's own file: never write through it
    path.write_text(json.dumps(content))
    process = ServiceProcess("generator", _settings(folder, "nats://127.0.0.1:1"))
    started_s = time.monotonic()
    try:
        with pytest.raises(RuntimeError, match="ended with 1"):
            process.start()
        assert hashlib.sha256(path.read_bytes()).hexdigest() in process.log and "config.json" in process.log
        assert time.monotonic() - started_s < 60
    finally:
        process.close()
