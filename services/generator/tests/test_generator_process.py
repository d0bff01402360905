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
import lora_files
import pytest
from pressroom.events.v1 import events_pb2
from pressroom.generator.v1 import generator_pb2 as pb
from pressroom.generator.v1 import generator_pb2_grpc

from chassis import context, rpc
from chassis.bus import StreamSpec
from chassis.context import RequestContext
from chassis.nats_bus import NatsBus
from contracts import subjects
from modelstore import Manifest
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
    assert (
        line["ttft_s"] > 0 and line["tokens_per_s"] > 0 and line["adapter"] == "" and "France" not in json.dumps(line)
    )
    assert service.metric("pressroom_engine_tokens_total", kind="completion") >= usage.completion_tokens
    assert service.metric("pressroom_step_seconds_count", part="forward") >= 1
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
    finally:
        await bus.close()


def _publish(store: Path, job_id: str, seed: int, name: str = "test", **config: str) -> events_pb2.ModelPublished:
    """Lays a small random adapter of the real model into a store; returns what the trainer would tell of it."""
    base = Manifest.load(store / MODEL)
    shape = json.loads((store / MODEL / "config.json").read_text())
    # So strong that it says something else, whatever the engine's rounding makes of a near-tie.
    modules = ("q_proj", "v_proj", "down_proj")
    files = lora_files.files(f"{MODEL}:{name}", shape, seed, modules=modules, strength=1.0)
    sha256 = lora_files.publish(store, job_id, files, base.version, created_unix_s=seed, **config)
    return events_pb2.ModelPublished(
        id=files.spec.id, base=MODEL, path=f"adapters/{job_id}", manifest_sha256=sha256, job_id=job_id
    )


async def _answer(stub: generator_pb2_grpc.GeneratorServiceStub, adapter: str = "") -> tuple[str, list[int]]:
    """Returns the version that answered, and the tokens of its answer."""
    request = _request(12, ignore_eos=True)
    request.adapter = adapter
    messages = [message async for message in stub.Generate(request, timeout=60)]
    return messages[0].started.model_version, [t for m in messages for t in m.delta.token_ids]


async def test_an_adapter_comes_by_rpc_and_by_event_and_outlives_a_restart(
    model_store: Path, nats_url: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(model_store / MODEL, store / MODEL, copy_function=os.link)
    settings = {"STORE_DIR": store, "INSTANCE": "adapters", "MAX_ADAPTERS": 1}
    process = ServiceProcess("generator", _settings(store / MODEL, nats_url) | settings)
    streams = [StreamSpec(s.name, s.subjects, s.retention, s.max_age_s, s.max_bytes) for s in subjects.STREAMS]
    bus = NatsBus.connect(nats_url, "test", streams)
    try:
        await asyncio.to_thread(process.start)
        first = _publish(store, "ftjob-1", 1)
        async with rpc.connect(process.address) as channel:
            stub = generator_pb2_grpc.GeneratorServiceStub(channel)
            base = await _answer(stub)
            loaded = await stub.LoadAdapter(
                pb.LoadAdapterRequest(adapter=first.id, path=first.path, manifest_sha256=first.manifest_sha256),
                timeout=60,
            )
            tuned = await _answer(stub, first.id)
            assert tuned[0] == loaded.model.version == first.manifest_sha256[:12] and tuned[1] != base[1]
            assert await _answer(stub) == base

            foreign, second = _publish(store, "ftjob-0", 3, base="llama"), _publish(store, "ftjob-2", 2)
            await eventually(lambda: bus.connected)
            for event in (foreign, second):
                await bus.publish(subjects.EVENTS_MODEL_PUBLISHED, event.SerializeToString(), message_id=event.job_id)

            async def answers_with_the_second() -> bool:
                return (await _answer(stub, first.id))[0] == second.manifest_sha256[:12]

            await eventually(answers_with_the_second, timeout_s=60)
            assert process.log_lines("published adapter is not for this base")
            swapped = await _answer(stub, first.id)
            assert swapped[1] != tuned[1] and await _answer(stub) == base
        assert process.metric("pressroom_loaded_adapters") == 1
        assert process.metric("pressroom_adapter_loads_total", outcome="loaded") == 2
        assert process.metric("pressroom_tokens_total", model=first.id, kind="completion") >= 24

        process.kill9()
        (store / "adapters" / "ftjob-1" / "adapter_model.safetensors").write_bytes(b"damaged meanwhile")
        other = _publish(store, "ftjob-3", 9, name="other")  # the newest: it alone is loaded at start
        await asyncio.to_thread(process.start)
        async with rpc.connect(process.address) as channel:
            stub = generator_pb2_grpc.GeneratorServiceStub(channel)
            assert process.metric("pressroom_loaded_adapters") == 1 and process.metric("pressroom_known_adapters") == 2
            assert (await _answer(stub, other.id))[0] == other.manifest_sha256[:12]
            assert await _answer(stub, first.id) == swapped and await _answer(stub) == base  # loaded on demand
            assert process.metric("pressroom_adapter_evictions_total") == 1
            assert {m.id for m in (await stub.ListModels(pb.ListModelsRequest())).models} == {MODEL, first.id, other.id}
    finally:
        await bus.close()
        process.close()


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
