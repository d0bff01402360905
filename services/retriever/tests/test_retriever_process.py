"""The retriever as a process on a real bus and a real Milvus Lite, killed while it works.

Embedder and gateway are stand-ins behind real gRPC servers in this process.
"""

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import httpx
import pytest
from pressroom.common.v1 import common_pb2
from pressroom.embedder.v1 import embedder_pb2, embedder_pb2_grpc
from pressroom.events.v1 import events_pb2
from pressroom.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from pressroom.retriever.v1 import retriever_pb2 as pb
from pressroom.retriever.v1 import retriever_pb2_grpc
from retriever_fakes import FakeEncoder

from chassis import context, rpc
from chassis.bus import Received
from chassis.errors import PlatformError
from chassis.nats_bus import NatsBus
from contracts.subjects import CONTROL_REQUEST_CANCEL, JOBS_INGEST, PROGRESS_ALL, STREAMS
from testkit import eventually, free_port
from testkit.servers import MilvusServer, NatsServer

pytestmark = pytest.mark.integration

FINAL = {common_pb2.JOB_STATUS_SUCCEEDED, common_pb2.JOB_STATUS_FAILED, common_pb2.JOB_STATUS_CANCELLED}


class Embedder(embedder_pb2_grpc.EmbedderServiceServicer):
    """The fake encoder behind gRPC; `pause_s` makes it slow enough to be interrupted."""

    def __init__(self) -> None:
        self._encoder = FakeEncoder()
        self.pause_s = 0.0
        self.num_embedded = 0

    async def ListModels(self, request: object, _: object) -> embedder_pb2.ListModelsResponse:
        return embedder_pb2.ListModelsResponse(models=[embedder_pb2.ServedEncoder(id="all-minilm-l6-v2", version="v1")])

    async def Tokenize(self, request: embedder_pb2.TokenizeRequest, _: object) -> embedder_pb2.TokenizeResponse:
        found = await self._encoder.tokenize(request.texts)
        texts = [embedder_pb2.TokenizedText(starts=places.starts, ends=places.ends) for places in found.places]
        return embedder_pb2.TokenizeResponse(
            texts=texts, max_tokens=found.max_tokens, num_special_tokens=found.num_special_tokens
        )

    async def Embed(self, request: embedder_pb2.EmbedRequest, _: object) -> embedder_pb2.EmbedResponse:
        await asyncio.sleep(self.pause_s)
        texts = [one.text for one in request.inputs]
        encode = self._encoder.encode_query if request.truncate else None
        encoded = await encode(texts[0]) if encode else await self._encoder.encode_chunks(texts)
        self.num_embedded += len(texts)
        return embedder_pb2.EmbedResponse(
            embeddings=[embedder_pb2.Embedding(values=vector.tolist()) for vector in encoded.vectors],
            model_version=encoded.version,
        )


class Files(gateway_pb2_grpc.FileServiceServicer):
    """Uploads of tenant acme, in pieces."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    async def ReadFile(
        self, request: gateway_pb2.ReadFileRequest, _: object
    ) -> AsyncIterator[gateway_pb2.ReadFileResponse]:
        assert context.current().tenant == "acme"
        data = self.files[request.file_id]
        for start in range(0, len(data), 1000):
            yield gateway_pb2.ReadFileResponse(data=data[start : start + 1000])


@dataclass
class System:
    """The process and all around it."""

    environment: dict[str, str]
    bus: NatsBus
    embedder: Embedder
    files: Files
    stub: retriever_pb2_grpc.RetrieverServiceStub
    reports: list[events_pb2.JobProgress] = field(default_factory=list)
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "retriever.main", env={**os.environ, **self.environment}
        )
        await eventually(self.is_ready, timeout_s=40)

    async def is_ready(self) -> bool:
        assert self.process is not None and self.process.returncode is None, "the retriever has ended"
        try:
            async with httpx.AsyncClient() as client:
                url = f"http://127.0.0.1:{self.environment['RETRIEVER_HTTP_PORT']}/readyz"
                return (await client.get(url, timeout=2)).status_code == 200
        except httpx.TransportError:
            return False

    async def kill(self, number: int = signal.SIGKILL) -> int:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), 30)

    async def submit(self, job_id: str, data: bytes, content_type: str = "text/plain") -> None:
        self.files.files[f"file_{job_id}"] = data
        job = events_pb2.IngestJob(
            job_id=job_id,
            tenant="acme",
            document_id=f"doc_{job_id}",
            file_id=f"file_{job_id}",
            file_sha256=hashlib.sha256(data).hexdigest(),
            content_type=content_type,
        )
        await self.bus.publish(JOBS_INGEST, job.SerializeToString(), message_id=f"ingest-{job_id}")

    async def on_progress(self, received: Received) -> None:
        self.reports.append(events_pb2.JobProgress.FromString(received.payload))

    async def ended(self, job_id: str, timeout_s: float = 60) -> events_pb2.JobProgress:
        """Waits for the job's last report."""

        def last() -> events_pb2.JobProgress | None:
            return next((r for r in self.reports if r.job_id == job_id and r.status in FINAL), None)

        return await eventually(last, timeout_s=timeout_s)

    async def search(self, query: str, mode: int = pb.SEARCH_MODE_DENSE, top_k: int = 100) -> list[pb.Hit]:
        with context.use(context.RequestContext("req_1", "acme")):
            async with rpc.call("retriever.Search", timeout_s=10) as call:
                request = pb.SearchRequest(query=query, mode=mode, top_k=top_k)
                return list((await self.stub.Search(request, timeout=10, metadata=call.metadata)).hits)

    async def document(self, document_id: str) -> pb.Document:
        with context.use(context.RequestContext("req_1", "acme")):
            async with rpc.call("retriever.GetDocument", timeout_s=10) as call:
                request = pb.GetDocumentRequest(document_id=document_id)
                return (await self.stub.GetDocument(request, timeout=10, metadata=call.metadata)).document


@pytest.fixture
async def system(nats: NatsServer, milvus: MilvusServer) -> AsyncIterator[System]:
    embedder, files = Embedder(), Files()
    server = rpc.make_server("standin")
    embedder_pb2_grpc.add_EmbedderServiceServicer_to_server(embedder, server)
    gateway_pb2_grpc.add_FileServiceServicer_to_server(files, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    grpc_port, http_port = free_port(), free_port()
    settings = {
        "GRPC_PORT": str(grpc_port),
        "HTTP_PORT": str(http_port),
        "NATS_URL": nats.url,
        "MILVUS_URI": milvus.uri,
        "EMBEDDER_ADDR": address,
        "GATEWAY_ADDR": address,
        "INGEST_BATCH_CHUNKS": "4",
        "LOG_LEVEL": "WARNING",
    }
    bus = NatsBus.connect(nats.url, "test", STREAMS)
    channel = rpc.connect(f"127.0.0.1:{grpc_port}")
    stub = retriever_pb2_grpc.RetrieverServiceStub(channel)
    system = System({f"RETRIEVER_{k}": v for k, v in settings.items()}, bus, embedder, files, stub)
    progress = asyncio.create_task(bus.consume(PROGRESS_ALL, durable="test", handler=system.on_progress))
    await eventually(lambda: bus.connected, timeout_s=20)
    await system.start()
    yield system
    await system.kill(signal.SIGTERM)
    progress.cancel()
    await bus.close()
    await channel.close()
    await server.stop(0)


TEXT = " ".join(f"word{i}" for i in range(1500)).encode()


def interrupted(system: System, least: int) -> Callable[[], bool]:
    return lambda: system.embedder.num_embedded >= least


async def test_kill9_in_the_middle_loses_nothing_and_duplicates_nothing(system: System) -> None:
    system.embedder.pause_s = 0.15
    await system.submit("job1", TEXT)
    await eventually(interrupted(system, 16), timeout_s=30)
    await system.kill()
    await system.start()
    end = await system.ended("job1")
    assert end.status == common_pb2.JOB_STATUS_SUCCEEDED, end.error
    num_chunks = json.loads(end.result_json)["num_chunks"]
    assert num_chunks > 60 and system.embedder.num_embedded < num_chunks + 16, "done work was not done again"
    document = await system.document("doc_job1")
    assert (document.num_chunks, document.num_documents) == (num_chunks, 1)
    hits = await system.search("word5 word6 word7")
    assert max(Counter(hit.chunk_id for hit in hits).values()) == 1
    words = {word for hit in hits for word in hit.text.split()}
    assert words == set(TEXT.decode().split()), "every word is found, after all that"
    assert await system.search("word1499", pb.SEARCH_MODE_KEYWORD) and await system.search(
        "word1", pb.SEARCH_MODE_HYBRID
    )


async def test_milvus_and_the_bus_may_die_under_a_job(system: System, milvus: MilvusServer, nats: NatsServer) -> None:
    system.embedder.pause_s = 0.1
    await system.submit("job2", TEXT.replace(b"word", b"term"))
    await eventually(interrupted(system, 8), timeout_s=30)
    milvus.kill9()
    with pytest.raises(PlatformError):
        await system.search("term1")
    await eventually(lambda: _is_not_ready(system), timeout_s=10)
    nats.kill9()
    await asyncio.to_thread(milvus.start)
    await asyncio.to_thread(nats.start)
    end = await system.ended("job2", timeout_s=90)
    assert end.status == common_pb2.JOB_STATUS_SUCCEEDED, end.error
    assert (await system.document("doc_job2")).num_chunks == json.loads(end.result_json)["num_chunks"]


async def _is_not_ready(system: System) -> bool:
    return not await system.is_ready()


async def test_a_bad_file_fails_its_job_and_a_cancelled_one_leaves_nothing(system: System) -> None:
    await system.submit("job3", b"not a PDF", "application/pdf")
    end = await system.ended("job3")
    assert end.status == common_pb2.JOB_STATUS_FAILED and "no %PDF header" in end.error
    system.embedder.pause_s = 0.2
    await system.submit("job4", TEXT.replace(b"word", b"gone"))
    await eventually(interrupted(system, 8), timeout_s=30)
    message = events_pb2.RequestCancel(id="job4", reason="test").SerializeToString()
    await system.bus.broadcast(CONTROL_REQUEST_CANCEL, message)
    assert (await system.ended("job4")).status == common_pb2.JOB_STATUS_CANCELLED
    assert not [hit for hit in await system.search("gone1", pb.SEARCH_MODE_KEYWORD) if hit.document_id == "doc_job4"]
