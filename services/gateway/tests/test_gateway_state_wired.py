"""The state as main gets it: real SQLite, NATS, Valkey and gRPC; worker and retriever are played by the test."""

import asyncio
import contextlib
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from pressroom.common.v1 import common_pb2
from pressroom.events.v1 import events_pb2
from pressroom.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from pressroom.monitor.v1 import monitor_pb2, monitor_pb2_grpc
from pressroom.retriever.v1 import retriever_pb2, retriever_pb2_grpc

from chassis import context, rpc, telemetry
from chassis.context import RequestContext
from chassis.errors import Code, PlatformError
from chassis.nats_bus import NatsBus
from contracts import subjects
from gateway.api import errors
from gateway.api.middleware import RequestFrame
from gateway.api.middleware_access import Authentication, RateLimit
from gateway.backends.embedder import GrpcEmbedder
from gateway.backends.generator import GrpcGenerator
from gateway.backends.generator_usage import GeneratorUsage
from gateway.backends.graph_files import Services, assemble, read_graphs
from gateway.backends.retriever import GrpcRetriever
from gateway.core.ports import RequestRecord
from gateway.state import Peers, open_state
from testkit.servers import nats_server, valkey_server
from testkit.waiting import eventually

pytestmark = pytest.mark.integration

GRAPHS_DIR = Path(__file__).parents[1] / "src" / "gateway" / "graphs"
KEY, ADMIN_KEY = "sk-boot-0123456789abcdef", "sk-admin-0123456789abcdef"


class Retriever(retriever_pb2_grpc.RetrieverServiceServicer):
    """Answers like a retriever that has indexed one document for each tenant."""

    def __init__(self):
        self.searches = []
        self.document_id = ""

    async def Search(self, request, _):
        self.searches.append((context.current().tenant, request))
        return retriever_pb2.SearchResponse(hits=[retriever_pb2.Hit(document_id="d", chunk_id="c", score=0.25)])

    async def GetDocument(self, request, _):
        if request.document_id != self.document_id or context.current().tenant != "default":
            raise PlatformError(Code.NOT_FOUND, "no such document")
        return retriever_pb2.GetDocumentResponse(
            document=retriever_pb2.Document(document_id=request.document_id, num_chunks=3, title="T")
        )


class Monitor(monitor_pb2_grpc.MonitorServiceServicer):
    async def GetProfiles(self, request, _):
        profile = monitor_pb2.Profile(
            model=request.model, num_records=request.limit, statistics_json='{"prompt.x": {}}'
        )
        return monitor_pb2.GetProfilesResponse(profiles=[profile], sample_rate=0.25, lag_s=3.5)


class Wired:
    """One running gateway state, and what stands around it."""

    def __init__(self, state, bus, client, files, retriever):
        self.state = state
        self.bus = bus
        self.client = client
        self.files = files
        self.retriever = retriever

    async def send(self, method, path, key=KEY, **rest):
        return await self.client.request(method, path, headers={"authorization": f"Bearer {key}"}, **rest)

    async def read_file(self, tenant, file_id):
        with context.use(RequestContext(tenant=tenant)):
            async with rpc.call("gateway.ReadFile", timeout_s=10) as call:
                stream = self.files.ReadFile(
                    gateway_pb2.ReadFileRequest(file_id=file_id), timeout=call.timeout_s, metadata=call.metadata
                )
                return [piece.data async for piece in stream]


@pytest.fixture
def servers():
    with nats_server() as nats, valkey_server() as valkey:
        yield nats, valkey


@contextlib.asynccontextmanager
async def running(data_dir, nats_url, valkey_url):
    async with contextlib.AsyncExitStack() as stack:
        retriever = Retriever()
        peers = rpc.make_server("peers")
        retriever_pb2_grpc.add_RetrieverServiceServicer_to_server(retriever, peers)
        monitor_pb2_grpc.add_MonitorServiceServicer_to_server(Monitor(), peers)
        address = await _served(stack, peers)
        channel = await stack.enter_async_context(rpc.connect(address))
        bus = NatsBus.connect(nats_url, "gateway", subjects.STREAMS)
        stack.push_async_callback(bus.close)
        generator, embedder = GrpcGenerator(channel), GrpcEmbedder(channel)
        usages = GeneratorUsage([address])
        stack.push_async_callback(usages.close)
        services = Services(generator, embedder, GrpcRetriever(channel), telemetry.tracer().start_as_current_span)
        state = await open_state(
            data_dir=data_dir,
            key_pepper="pepper",
            valkey_url=valkey_url,
            bootstrap_api_key=KEY,
            bootstrap_admin_key=ADMIN_KEY,
            max_upload_bytes=8 * 1024 * 1024,
            max_tenant_upload_bytes=64 * 1024 * 1024,
            max_body_bytes=64 * 1024,
            max_batch_lines_in_flight=2,
            request_timeout_s=30,
            bus=bus,
            graphs=assemble(read_graphs(GRAPHS_DIR), services),
            peers=Peers(generator, usages, embedder, channel, channel, channel, channel),
        )
        stack.push_async_callback(state.close)
        own = rpc.make_server("gateway")
        for add_to_server, servicer, _ in state.servicers:
            add_to_server(servicer, own)
        files = await stack.enter_async_context(rpc.connect(await _served(stack, own)))
        tasks = [asyncio.create_task(run()) for _, run in state.tasks]
        stack.push_async_callback(_stopped, tasks)
        routes = FastAPI(redirect_slashes=False)
        errors.install(routes)
        for router in state.routers:
            routes.include_router(router)
        app = RequestFrame(
            Authentication(RateLimit(routes, limiter=state.limiter), keys=state.keys, open_app=routes), timeout_s=30
        )
        transport = httpx.ASGITransport(app=app)
        client = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://gateway"))
        yield Wired(state, bus, client, gateway_pb2_grpc.FileServiceStub(files), retriever)


async def _served(stack, server):
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stack.push_async_callback(server.stop, 0)
    return f"127.0.0.1:{port}"


async def _stopped(tasks):
    for task in tasks:
        task.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(d is None or isinstance(d, asyncio.CancelledError) for d in done), done


class Worker:
    """An ingest worker: takes orders, reads their files, reports."""

    def __init__(self, wired):
        self.wired = wired
        self.contents = []

    async def __call__(self, received):
        order = events_pb2.IngestJob.FromString(received.payload)
        await self.report(order.job_id, common_pb2.JOB_STATUS_RUNNING, 1)
        self.contents.append(b"".join(await self.wired.read_file(order.tenant, order.file_id)))
        self.wired.retriever.document_id = order.document_id
        for _ in range(2):  # at least once is what the bus promises
            await self.report(order.job_id, common_pb2.JOB_STATUS_SUCCEEDED, 2)

    async def report(self, job_id, status, sequence):
        progress = events_pb2.JobProgress(job_id=job_id, status=status, sequence=sequence, at_unix_ms=sequence)
        payload = progress.SerializeToString()
        await self.wired.bus.publish(
            subjects.progress(job_id), payload, message_id=f"{job_id}-{status}-{sequence}-{id(progress)}"
        )


@contextlib.asynccontextmanager
async def consuming(wired, subject, handler):
    task = asyncio.create_task(wired.bus.consume(subject, durable="test-consumer", handler=handler))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def job_is(wired, job_id, status):
    job = (await wired.send("GET", f"/v1/jobs/{job_id}")).json()
    return job["status"] == status


async def test_upload_is_ingested_over_the_real_bus(tmp_path, servers):
    nats, valkey = servers
    content = b"line\n" * 500_000  # several pieces of 1 MiB
    async with running(tmp_path, nats.url, valkey.url) as wired:
        worker = Worker(wired)
        response = await wired.send("POST", "/v1/documents", files={"file": ("a.txt", content)})
        assert response.status_code == 202, response.text
        job_id, document_id = response.json()["job_id"], response.json()["document_id"]
        async with consuming(wired, subjects.JOBS_INGEST, worker):
            await eventually(lambda: job_is(wired, job_id, "succeeded"), timeout_s=20)
        assert worker.contents == [content]
        document = (await wired.send("GET", f"/v1/documents/{document_id}")).json()
        assert (document["num_chunks"], document["status"]) == (3, "indexed")


async def test_file_is_read_by_its_tenant_only_and_not_after_a_cancel(tmp_path, servers):
    nats, valkey = servers
    async with running(tmp_path, nats.url, valkey.url) as wired:
        answer = (await wired.send("POST", "/v1/documents", json={"text": "hello"})).json()
        (path,) = (tmp_path / "files").iterdir()
        assert await wired.read_file("default", path.name) == [b"hello"]
        for tenant, file_id in (("other", path.name), ("", path.name), ("default", "../gateway.db")):
            with pytest.raises(PlatformError) as error:
                await wired.read_file(tenant, file_id)
            assert error.value.code is Code.NOT_FOUND
        await wired.send("POST", f"/v1/jobs/{answer['job_id']}/cancel")
        with pytest.raises(PlatformError) as error:
            await wired.read_file("default", path.name)
        assert error.value.reason == "job_cancelled" and not error.value.retryable


async def test_nats_that_is_away_delays_jobs_and_events_and_loses_none(tmp_path, servers):
    nats, valkey = servers
    got = []

    async def keep(received):
        got.append(events_pb2.RequestCompleted.FromString(received.payload).request_id)

    async with running(tmp_path, nats.url, valkey.url) as wired:
        await eventually(lambda: wired.bus.connected)
        nats.kill9()
        await eventually(lambda: not wired.bus.connected)
        jobs = [(await wired.send("POST", "/v1/documents", json={"text": f"t{i}"})).json()["job_id"] for i in range(5)]
        for i in range(5):
            await asyncio.wait_for(wired.state.ledger.record(_record(f"req_{i}")), 2)
    # The gateway itself was restarted too, before the bus came back.
    async with running(tmp_path, nats.url, valkey.url) as wired:
        nats.start()
        worker = Worker(wired)
        async with consuming(wired, subjects.JOBS_INGEST, worker):
            for job_id in jobs:
                await eventually(lambda job_id=job_id: job_is(wired, job_id, "succeeded"), timeout_s=30)
        async with consuming(wired, subjects.EVENTS_REQUEST_COMPLETED, keep):
            await eventually(lambda: len(got) == 5)
        assert sorted(worker.contents) == [f"t{i}".encode() for i in range(5)]
        assert got == [f"req_{i}" for i in range(5)]


async def test_order_that_no_worker_can_do_fails_its_job(tmp_path, servers):
    nats, valkey = servers

    async def refuse(_):
        raise PlatformError(Code.INVALID_ARGUMENT, "poison")

    async with running(tmp_path, nats.url, valkey.url) as wired:
        job_id = (await wired.send("POST", "/v1/documents", json={"text": "x"})).json()["job_id"]
        async with consuming(wired, subjects.JOBS_INGEST, refuse):
            await eventually(lambda: job_is(wired, job_id, "failed"), timeout_s=20)
        assert "poison" in (await wired.send("GET", f"/v1/jobs/{job_id}")).json()["error"]


async def test_revocation_reaches_another_gateway_at_once(tmp_path, servers):
    nats, valkey = servers
    async with running(tmp_path, nats.url, valkey.url) as wired:
        made = (await wired.send("POST", "/admin/keys", ADMIN_KEY, json={"rpm": 50})).json()
        heard = []

        async def hear(received):
            heard.extend(events_pb2.KeysRevoked.FromString(received.payload).key_ids)

        listener = asyncio.create_task(wired.bus.listen(subjects.CONTROL_KEYS_REVOKED, hear))

        async def revoke_is_heard():
            await wired.send("DELETE", f"/admin/keys/{made['id']}", ADMIN_KEY)
            return made["id"] in heard

        await eventually(revoke_is_heard)
        assert (await wired.send("GET", "/v1/jobs", made["key"])).status_code == 401
        listener.cancel()


async def test_search_and_profiles_cross_grpc_as_the_sender(tmp_path, servers):
    nats, valkey = servers
    async with running(tmp_path, nats.url, valkey.url) as wired:
        body = {"query": "q", "filter": {"year": {"$in": [1, 2]}, "by": "x"}, "mode": "keyword"}
        response = await wired.send("POST", "/v1/search", json=body)
        assert response.json()["hits"][0]["score"] == 0.25
        ((tenant, request),) = wired.retriever.searches
        assert tenant == "default" and request.mode == retriever_pb2.SEARCH_MODE_KEYWORD
        assert [(c.key, c.operator, list(c.values_json)) for c in request.filter] == [
            ("year", retriever_pb2.FILTER_OPERATOR_IN, ["1", "2"]),
            ("by", retriever_pb2.FILTER_OPERATOR_EQ, ['"x"']),
        ]
        profiles = (await wired.send("GET", "/v1/monitor/profiles?model=rag&limit=7")).json()
        (profile,) = profiles["data"]
        assert (profile["model"], profile["num_records"], profile["statistics"]) == ("rag", 7, {"prompt.x": {}})
        assert (profiles["sample_rate"], profiles["lag_s"], profiles["num_waiting"]) == (0.25, 3.5, 0)


async def test_state_opens_and_serves_while_everything_else_is_away(tmp_path):
    async with running(tmp_path, "nats://127.0.0.1:1", "redis://:x@127.0.0.1:1/0") as wired:
        made = (await wired.send("POST", "/admin/keys", ADMIN_KEY, json={"rpm": 1})).json()
        statuses = [(await wired.send("GET", "/v1/jobs", made["key"])).status_code for _ in range(2)]
        assert statuses == [200, 429]
        assert (await wired.send("DELETE", f"/admin/keys/{made['id']}", ADMIN_KEY)).status_code == 200
        await wired.state.ledger.record(_record("req_1"))
        (usage,) = (await wired.send("GET", "/admin/usage", ADMIN_KEY)).json()["data"]
        assert usage == {
            "tenant": "default",
            "key_id": "boot",
            "model": "rag",
            "num_requests": 1,
            "num_errors": 0,
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "cached_tokens": 1,
            "cost_micros": 0,
        }


def _record(request_id):
    return RequestRecord(
        request_id=request_id,
        trace_id="",
        traceparent="",
        tenant="default",
        key_id="boot",
        model="rag",
        route="/v1/chat/completions",
        prompt_tokens=3,
        completion_tokens=2,
        cached_tokens=1,
        finish_reason="stop",
        http_status=200,
        stream=False,
        started_unix_ms=0,
        duration_s=0.1,
    )
