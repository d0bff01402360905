"""Policies hold for jobs too: for what is ordered, and for what a job asks later on."""

from dataclasses import replace

import pytest
from pressroom.gateway.v1 import gateway_pb2, gateway_pb2_grpc

from chassis import context, rpc
from chassis.context import RequestContext
from chassis.errors import Code, PlatformError
from gateway.api.grpc_graphs import GraphServicer
from gateway.backends.bus_control import BusControl
from gateway.backends.sqlite_keys import SqliteKeys
from gateway.core.administration import Administration
from gateway.core.keys import TenantRow
from gateway.core.policy import Policy
from gateway.core.serving import Serving

BASE = "smollm2-135m-instruct"


@pytest.fixture
def office(world):
    return Administration(SqliteKeys(world.database), b"pepper", world.ring, BusControl(world.bus))


@pytest.fixture
async def ask(world):
    """Calls Answer for the tenant acme, as the worker of a job."""
    server = rpc.make_server("gateway")
    servicer = GraphServicer(Serving(world.catalog), world.ring, world.jobs, world.recorder, timeout_s=30)
    gateway_pb2_grpc.add_GraphServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with rpc.connect(f"127.0.0.1:{port}") as channel:
        stub = gateway_pb2_grpc.GraphServiceStub(channel)

        async def call(model, job_id=""):
            turns = [gateway_pb2.Turn(role="user", content="hi")]
            with context.use(RequestContext(request_id="req_1", tenant="acme")):
                async with rpc.call("gateway.Answer", timeout_s=20) as out:
                    request = gateway_pb2.AnswerRequest(model=model, messages=turns, job_id=job_id)
                    return await stub.Answer(request, timeout=out.timeout_s, metadata=out.metadata)

        yield call
    await server.stop(0)


async def narrow(world, office, policy):
    key_id = world.keys["acme"].split("-")[1]
    await office.change_key("test", key_id, lambda row: replace(row, policy=policy))
    return key_id


async def test_only_allowed_models_are_evaluated_and_tuned(world, office):
    await narrow(world, office, Policy(models=frozenset({"rag"})))
    client = world.http()
    training = await world.upload()
    orders = {
        "/evaluations": {"model": BASE, "task": "facts"},
        "/fine_tuning/jobs": {"model": BASE, "training_file": training},
    }
    for path, body in orders.items():
        answer = await client.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "model_not_allowed")
    assert (await client.post("/evaluations", json={"model": "rag", "task": "facts"})).status_code == 202


@pytest.mark.integration
async def test_a_job_asks_what_its_key_may_ask_even_when_the_key_is_revoked(world, office, ask):
    job = (await world.http().post("/evaluations", json={"model": "rag", "task": "facts"})).json()
    key_id = await narrow(world, office, Policy(models=frozenset({"rag"})))
    await office.revoke_key("test", key_id)
    await ask("rag", job["id"])
    with pytest.raises(PlatformError) as error:
        await ask(BASE, job["id"])
    assert (error.value.code, error.value.reason) == (Code.PERMISSION_DENIED, "model_not_allowed")


@pytest.mark.integration
async def test_a_job_of_a_disabled_tenant_asks_nothing(world, office, ask):
    job = (await world.http().post("/evaluations", json={"model": BASE, "task": "facts"})).json()
    await ask(BASE, job["id"])
    await office.put_tenant("test", TenantRow("acme", disabled_unix_s=1))
    with pytest.raises(PlatformError) as error:
        await ask(BASE, job["id"])
    assert (error.value.code, error.value.reason) == (Code.PERMISSION_DENIED, "tenant_disabled")
    assert len(world.generator.calls) == 1
