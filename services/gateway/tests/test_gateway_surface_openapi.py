"""The OpenAPI document against the gateway as a real process: schemathesis finds nothing that it says and is not so."""

import asyncio
import os
import sys
import sysconfig
from pathlib import Path

import httpx
import pytest
from pressroom.embedder.v1 import embedder_pb2, embedder_pb2_grpc
from pressroom.evaluator.v1 import evaluator_pb2, evaluator_pb2_grpc
from pressroom.generator.v1 import generator_pb2, generator_pb2_grpc
from pressroom.monitor.v1 import monitor_pb2, monitor_pb2_grpc
from pressroom.retriever.v1 import retriever_pb2, retriever_pb2_grpc
from pressroom.trainer.v1 import trainer_pb2_grpc

from chassis import rpc
from chassis.errors import Code, PlatformError
from testkit.processes import ServiceProcess
from testkit.servers import nats_server, valkey_server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

KEY, ADMIN_KEY = "sk-boot-0123456789abcdef", "sk-root-0123456789abcdef"
MODEL, ENCODER = "smollm2-135m-instruct", "all-minilm-l6-v2"
SCHEMATHESIS = Path(sysconfig.get_path("scripts")) / "schemathesis"
SEED = "20261124"
NUM_EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "3")  # more of them by hand


class Generator(generator_pb2_grpc.GeneratorServiceServicer):
    """Says one word."""

    async def Generate(self, request, _):
        if request.model != MODEL:
            raise PlatformError(Code.NOT_FOUND, "no such model", param="model")
        yield generator_pb2.GenerateResponse(started=generator_pb2.Started(prompt_tokens=1))
        for index in range(request.n or 1):
            yield generator_pb2.GenerateResponse(delta=generator_pb2.Delta(index=index, text="word", token_ids=[1]))
            stop = generator_pb2.FINISH_REASON_STOP
            yield generator_pb2.GenerateResponse(finished=generator_pb2.Finished(index=index, reason=stop))
        done = generator_pb2.Done()
        done.usage.prompt_tokens, done.usage.completion_tokens = 1, request.n or 1
        yield generator_pb2.GenerateResponse(done=done)

    async def Tokenize(self, request, _):
        return generator_pb2.TokenizeResponse(token_ids=[1], context_length=8192)

    async def ListModels(self, request, _):
        return generator_pb2.ListModelsResponse(models=[generator_pb2.ServedModel(id=MODEL, base=MODEL)])


class Embedder(embedder_pb2_grpc.EmbedderServiceServicer):
    async def Embed(self, request, _):
        if request.model != ENCODER:
            raise PlatformError(Code.NOT_FOUND, "no such encoder", param="model")
        embedding = embedder_pb2.Embedding(values=[0.6, 0.8], num_tokens=1)
        return embedder_pb2.EmbedResponse(embeddings=[embedding] * len(request.inputs))

    async def ListModels(self, request, _):
        return embedder_pb2.ListModelsResponse(models=[embedder_pb2.ServedEncoder(id=ENCODER)])


class Retriever(retriever_pb2_grpc.RetrieverServiceServicer):
    async def Search(self, request, _):
        return retriever_pb2.SearchResponse(hits=[retriever_pb2.Hit(document_id="d", chunk_id="c", score=0.25)])

    async def GetDocument(self, request, _):
        raise PlatformError(Code.NOT_FOUND, "no such document")

    async def DeleteDocument(self, request, _):
        raise PlatformError(Code.NOT_FOUND, "no such document")


class Others(
    monitor_pb2_grpc.MonitorServiceServicer,
    trainer_pb2_grpc.TrainerServiceServicer,
    evaluator_pb2_grpc.EvaluatorServiceServicer,
):
    async def GetProfiles(self, request, _):
        profile = monitor_pb2.Profile(model=MODEL, num_records=1, statistics_json='{"prompt.x": {}}')
        return monitor_pb2.GetProfilesResponse(profiles=[profile], sample_rate=0.25)

    async def GetRun(self, request, _):
        raise PlatformError(Code.NOT_FOUND, "no such run")

    async def ListTasks(self, request, _):
        return evaluator_pb2.ListTasksResponse(tasks=[evaluator_pb2.Task(name="facts", version="1")])


@pytest.fixture
async def gateway(tmp_path):
    """The gateway as a process, with fakes of all that it calls."""
    peers = rpc.make_server("peers")
    generator_pb2_grpc.add_GeneratorServiceServicer_to_server(Generator(), peers)
    embedder_pb2_grpc.add_EmbedderServiceServicer_to_server(Embedder(), peers)
    retriever_pb2_grpc.add_RetrieverServiceServicer_to_server(Retriever(), peers)
    for add in (
        monitor_pb2_grpc.add_MonitorServiceServicer_to_server,
        trainer_pb2_grpc.add_TrainerServiceServicer_to_server,
        evaluator_pb2_grpc.add_EvaluatorServiceServicer_to_server,
    ):
        add(Others(), peers)
    address = f"127.0.0.1:{peers.add_insecure_port('127.0.0.1:0')}"
    await peers.start()
    names = ("GENERATOR", "EMBEDDER", "RETRIEVER", "MONITOR", "TRAINER", "EVALUATOR")
    with nats_server() as nats, valkey_server() as valkey:
        process = ServiceProcess(
            "gateway",
            {f"{name}_ADDR": address for name in names}
            | {
                "NATS_URL": nats.url,
                "VALKEY_URL": valkey.url,
                "DATA_DIR": tmp_path / "gateway",
                "KEY_PEPPER": "p" * 32,
                "BOOTSTRAP_API_KEY": KEY,
                "BOOTSTRAP_ADMIN_KEY": ADMIN_KEY,
            },
        )
        try:
            await asyncio.to_thread(process.start)
            yield f"http://127.0.0.1:{process.http_port}"
        finally:
            await asyncio.to_thread(process.close)
            await peers.stop(None)


async def schemathesis(base_url, directory, *arguments):
    """Runs schemathesis as anybody would; its exit status and what it printed."""
    run = await asyncio.create_subprocess_exec(
        sys.executable,
        str(SCHEMATHESIS),
        "run",
        f"{base_url}/openapi.json",
        *arguments,
        cwd=directory,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | {"COLUMNS": "150", "NO_COLOR": "1"},
    )
    said, _ = await run.communicate()
    return run.returncode, said.decode()


async def test_every_route_says_what_it_reads_and_answers(gateway):
    async with httpx.AsyncClient(base_url=gateway, trust_env=False) as client:
        response = await client.get("/openapi.json")  # needs no key
    document = response.json()
    silent = [
        f"{method} {path}"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if not any(
            content
            for status, answer in operation["responses"].items()
            if status.startswith("2")
            for content in [answer.get("content", {}).get("application/json", {"": ""})]
        )
        or (method in ("post", "put", "patch") and "requestBody" not in operation and not path.endswith("/cancel"))
    ]
    assert silent == []
    assert "/v1/chat/completions" in document["paths"] and len(document["paths"]) > 25


# Apart, since what an admin changes (limits, prices) would change what the others are answered.
@pytest.mark.parametrize(
    ("key", "paths"), [(KEY, "--exclude-path-regex=^/admin"), (ADMIN_KEY, "--include-path-regex=^/admin")]
)
async def test_schemathesis_finds_nothing(gateway, tmp_path, key, paths):
    status, said = await schemathesis(
        gateway,
        tmp_path,
        paths,
        "--header",
        f"Authorization: Bearer {key}",
        f"--seed={SEED}",
        f"--max-examples={NUM_EXAMPLES}",
        "--generation-deterministic",
    )
    assert status == 0, said
