"""GraphService.Answer over a real gRPC server: the graph is run as for a client, for the tenant, and accounted."""

import asyncio

import pytest
from pressroom.events.v1 import events_pb2
from pressroom.gateway.v1 import gateway_pb2, gateway_pb2_grpc

from chassis import context, rpc
from chassis.context import RequestContext
from chassis.errors import Code, PlatformError
from contracts import subjects
from gateway.api.grpc_graphs import GraphServicer
from gateway.core.services import Source
from gateway.core.serving import Serving
from testkit import eventually

pytestmark = pytest.mark.integration

BASE = "smollm2-135m-instruct"
TUNED = f"{BASE}:press"


@pytest.fixture
async def ask(world):
    """Calls Answer for a tenant."""
    server = rpc.make_server("gateway")
    servicer = GraphServicer(Serving(world.catalog), world.ring, world.jobs, world.recorder, timeout_s=30)
    gateway_pb2_grpc.add_GraphServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with rpc.connect(f"127.0.0.1:{port}") as channel:
        stub = gateway_pb2_grpc.GraphServiceStub(channel)

        async def call(model=BASE, tenant="acme", timeout_s=20.0, content="hi", **fields):
            fields.setdefault("messages", [gateway_pb2.Turn(role="user", content=content)])
            request = gateway_pb2.AnswerRequest(model=model, **fields)
            with context.use(RequestContext(request_id="req_1", tenant=tenant)):
                async with rpc.call("gateway.Answer", timeout_s=timeout_s) as out:
                    return await stub.Answer(request, timeout=out.timeout_s, metadata=out.metadata)

        yield call
    await server.stop(0)


async def test_answer_comes_from_the_graph_with_its_parameters(world, ask):
    answer = await ask(max_tokens=5, temperature=0.0, seed=2**63 + 1, stop=["x"], priority=-1)
    assert (answer.text, answer.finish_reason, answer.model_version) == (f"I am {BASE}", "stop", "v1")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.cached_tokens) == (3, 3, 1)
    assert not answer.HasField("grounded")
    (call,) = world.generator.calls
    assert (call.sampling.temperature, call.sampling.seed) == (0.0, 2**63 + 1)
    assert (call.stopping.max_tokens, call.stopping.stop, call.priority, call.tenant) == (5, ("x",), -1, "acme")


async def test_what_is_absent_is_as_the_graph_says(world, ask):
    await ask()
    (call,) = world.generator.calls
    assert (call.sampling.temperature, call.sampling.top_p, call.sampling.seed) == (0.2, 0.9, None)
    assert (call.stopping.max_tokens, call.priority) == (None, 0)


async def test_nobody_gets_before_people(world, ask):
    await ask(priority=5)
    assert world.generator.calls[0].priority == 0


async def test_retrieval_graph_says_whether_it_is_grounded(world, ask):
    nothing = await ask("rag", content="who?")
    assert nothing.HasField("grounded") and not nothing.grounded and nothing.usage.completion_tokens == 0
    world.retriever.sources = [Source("d", "", "c", "T", "text", 0.9)]
    assert (await ask("rag", content="who?")).grounded is True


async def test_tuned_model_answers_its_owner_alone(world, ask):
    job = await world.order(suffix="press")
    with pytest.raises(PlatformError) as absent:
        await ask(TUNED)
    assert absent.value.code is Code.NOT_FOUND and not absent.value.retryable
    await world.report(job["id"], "SUCCEEDED", result_json="{}")
    with pytest.raises(PlatformError) as loading:
        await ask(TUNED)
    assert (loading.value.code, loading.value.retryable) == (Code.UNAVAILABLE, True)
    world.generator.adapters.add(TUNED)
    assert (await ask(TUNED)).text == f"I am {TUNED}"
    with pytest.raises(PlatformError) as foreign:
        await ask(TUNED, tenant="other")
    assert (foreign.value.code, foreign.value.reason) == (Code.NOT_FOUND, "model_not_found")


async def test_use_is_accounted_to_the_key_of_the_job_and_the_text_is_kept_out_of_the_event(world, ask):
    await world.database.write(lambda connection: connection.execute("UPDATE tenants SET allows_text = 1"))
    job_id = (await world.http().post("/evaluations", json={"model": BASE, "task": "facts"})).json()["id"]
    await ask(job_id=job_id, content="a secret")
    await ask(job_id="job_unknown")
    await world.recorder.close()
    key_id = world.keys["acme"].split("-")[1]
    rows = await world.usage()
    assert rows == [
        ("acme", key_id, BASE, "/v1/evaluations", 3, 3, "stop", 200, ""),
        ("acme", "", BASE, "/v1/evaluations", 3, 3, "stop", 200, ""),
    ]
    payloads = await world.orders(subjects.EVENTS_REQUEST_COMPLETED)
    told = [events_pb2.RequestCompleted.FromString(payload) for payload in payloads]
    assert [(one.prompt_text, one.completion_text, one.route) for one in told] == [("", "", "/v1/evaluations")] * 2
    assert told[0].request_id == "req_1"


async def test_call_that_is_cancelled_stops_the_decoding_and_is_accounted(world, ask):
    world.generator.token_s = 0.5
    task = asyncio.create_task(ask())
    await eventually(lambda: world.generator.num_running == 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await eventually(lambda: world.generator.num_stopped == 1)
    await eventually(lambda: _has_rows(world, 1))
    ((*_, finish_reason, status, error_code),) = await world.usage()
    assert (finish_reason, status, error_code) == ("cancelled", 499, "")


async def _has_rows(world, count):
    return len(await world.usage()) == count


async def test_deadline_of_the_call_is_the_deadline_of_the_graph(world, ask):
    world.generator.token_s = 5
    with pytest.raises(PlatformError) as error:
        await ask(timeout_s=0.3)
    assert error.value.code is Code.DEADLINE_EXCEEDED
    await eventually(lambda: world.generator.num_stopped == 1)


async def test_error_of_the_generator_comes_as_it_is_and_is_accounted(world, ask):
    world.generator.error = PlatformError(Code.OVERLOADED, "the queue is full", retry_after_s=3)
    with pytest.raises(PlatformError) as error:
        await ask()
    assert (error.value.code, error.value.retry_after_s, error.value.retryable) == (Code.OVERLOADED, 3, True)
    await world.recorder.close()
    ((*_, finish_reason, status, error_code),) = await world.usage()
    assert (finish_reason, status, error_code) == ("error", 503, "overloaded")


async def test_job_that_was_cancelled_is_answered_no_more(world, ask):
    job_id = (await world.http().post("/evaluations", json={"model": BASE, "task": "facts"})).json()["id"]
    await world.report(job_id, "RUNNING")
    await ask(job_id=job_id)
    await world.http().post(f"/jobs/{job_id}/cancel")
    with pytest.raises(PlatformError) as error:
        await ask(job_id=job_id)
    assert (error.value.code, error.value.reason) == (Code.FAILED_PRECONDITION, "job_cancelled")
    assert not error.value.retryable and len(world.generator.calls) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [gateway_pb2.Turn(role="root", content="x")]}, "messages[0].role"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 3.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x"] * 17}, "stop"),
    ],
)
async def test_bad_question_is_refused_by_name(world, ask, fields, param):
    with pytest.raises(PlatformError) as error:
        await ask(**fields)
    assert (error.value.code, error.value.param) == (Code.INVALID_ARGUMENT, param)
    assert world.generator.calls == []


async def test_tenant_must_be_named(ask):
    with pytest.raises(PlatformError) as error:
        await ask(tenant="")
    assert error.value.code is Code.INVALID_ARGUMENT
