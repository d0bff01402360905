"""The service in front of vLLM, as a process: it starts before vLLM does, is ready when that is, and answers."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from pressroom.common.v1 import common_pb2
from pressroom.generator.v1 import generator_pb2 as pb
from pressroom.generator.v1 import generator_pb2_grpc
from vllm_standin import StandIn, serving

from chassis import rpc
from testkit import eventually, free_port
from testkit.processes import ServiceProcess

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

MODEL = "smollm2-135m-instruct"


@pytest.fixture
def vllm_port() -> int:
    return free_port()


@pytest.fixture
def service(model_store: Path, nats_url: str, vllm_port: int) -> Iterator[ServiceProcess]:
    settings = {
        "ENGINE": "vllm",
        "VLLM_URL": f"http://127.0.0.1:{vllm_port}",
        "MODEL_DIR": model_store / MODEL,
        "NATS_URL": nats_url,
    }
    process = ServiceProcess("generator", settings, ready_path="/healthz")
    try:
        process.start()
        yield process
    finally:
        process.close()


async def test_it_waits_for_vllm_and_answers_with_it(service: ServiceProcess, vllm_port: int) -> None:
    channel = rpc.connect(service.address)
    stub = generator_pb2_grpc.GeneratorServiceStub(channel)
    request = pb.GenerateRequest(
        model=MODEL,
        token_ids=common_pb2.TokenIds(ids=[72, 101, 108]),
        sampling=pb.SamplingParams(temperature=0),
        stop=pb.StopParams(max_tokens=8, ignore_eos=True),
    )

    async def is_ready() -> bool:
        return (await asyncio.to_thread(service.get, "/readyz"))[0] == 200

    async def refuses() -> bool:
        try:
            _ = [message async for message in stub.Generate(request, timeout=30)]
        except grpc.aio.AioRpcError as error:
            return "vLLM cannot be used" in (error.details() or "")
        return False

    try:
        await eventually(refuses, 60)
        assert not await is_ready()
        async with serving(StandIn(), vllm_port):
            await eventually(is_ready, 30)
            messages = [message async for message in stub.Generate(request, timeout=30)]
            done = messages[-1].done
            assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 8)
            models = await stub.ListModels(pb.ListModelsRequest(), timeout=30)
            assert models.models[0].id == MODEL and models.models[0].context_length == 256
        await eventually(refuses, 30)
        assert not await is_ready()
    finally:
        await channel.close()
