"""Flow control as a client sees it: headers of its own, refusals, and the model that answered."""

import asyncio

import pytest
import yaml

from chassis.errors import Code, PlatformError
from gateway.backends.graph_files import read_graphs
from gateway.core.admission import Admission, Lane, QueueBounds
from gateway.core.capacity import Capacity, CapacityBounds
from gateway.core.graph import GraphError
from gateway.core.policy import Policy
from gateway.core.ports import Principal
from testkit import eventually

CHAT = {"model": "first", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 3}
VIP = "sk-vip-secret"


def graph(name, **more):
    node = {
        "id": "generate",
        "service": "generator",
        "call": "generate",
        "params": {"model": "smollm2-135m-instruct"},
    }
    return {"name": name, "block": "sequence", "nodes": [node]} | more


@pytest.fixture
def graphs_dir(tmp_path):
    for one in (graph("first", fallbacks=["second"]), graph("second"), graph("alone")):
        (tmp_path / f"{one['name']}.yaml").write_text(yaml.safe_dump(one))
    return tmp_path


class Meter:
    def admitted(self, wait_s):
        pass

    def shed(self, cause):
        pass


@pytest.fixture
def lane():
    return Lane("generator", Capacity(CapacityBounds(1, 1, 1)), QueueBounds(1, 30.0), Meter())


@pytest.fixture
def admission(lane):
    return Admission({"generator": lane}, lambda ask: "generator")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_fallback_is_named_in_the_answer_the_header_and_the_ledger(world, stream):
    world.generator.next_errors = [PlatformError(Code.UNAVAILABLE, "away")]
    async with world.client() as client:
        answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
    assert answer.status_code == 200 and answer.headers["x-pressroom-model"] == "second"
    assert '"model":"second"' in answer.text and '"model":"first"' not in answer.text
    (record,) = world.ledger.records
    assert (record.model, record.completion_tokens, record.finish_reason) == ("second", 3, "length")


async def test_without_a_fault_the_model_that_was_asked_answers(world):
    async with world.client() as client:
        answer = await client.post("/v1/completions", json={"model": "first", "prompt": "hello", "max_tokens": 2})
    assert answer.headers["x-pressroom-model"] == "first" and answer.json()["model"] == "first"


async def test_completions_name_the_fallback_too(world):
    world.generator.next_errors = [PlatformError(Code.OVERLOADED, "full")]
    async with world.client() as client:
        answer = await client.post("/v1/completions", json={"model": "first", "prompt": "hello", "max_tokens": 2})
    assert answer.json()["model"] == answer.headers["x-pressroom-model"] == "second"


async def test_a_refused_request_is_told_when_to_come_back(world, lane):
    world.generator.token_s = 30.0
    async with world.client() as client:
        waiting = [
            asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"model": "alone"})) for _ in range(2)
        ]
        await eventually(lambda: lane.num_waiting == 1)
        refused = await client.post("/v1/chat/completions", json=CHAT | {"model": "alone"})
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "overloaded_error" and refused.json()["error"]["code"] == "overloaded"
    assert (lane.num_waiting, lane.num_running) == (0, 0)


@pytest.mark.parametrize(("sent", "most_s"), [("0.5", 0.5), ("12", 12.0), ("999999999", 30.0)])
async def test_a_client_may_give_a_request_less_time_but_no_more(world, sent, most_s):
    async with world.client() as client:
        answer = await client.post("/v1/chat/completions", json=CHAT, headers={"x-request-timeout-s": sent})
    assert answer.status_code == 200 and most_s - 0.45 < world.generator.timeouts_s[0] <= most_s


BAD_HEADERS = [
    ("x-request-timeout-s", value)
    for value in ("", "0", "0.0", "-1", "abc", "nan", "inf", "1e3", "1_000", "+1", "0x10", "1,5", "9" * 10, "1s")
] + [
    ("x-pressroom-priority", value)
    for value in ("", "high", "1.0", "101", "-101", "+1", "--1", "1e2", "0x1", "9999999999", "1 2")
]


@pytest.mark.parametrize(("name", "value"), BAD_HEADERS)
async def test_a_bad_header_is_named_and_nothing_is_asked(world, lane, name, value):
    async with world.client() as client:
        answer = await client.post("/v1/chat/completions", json=CHAT, headers={name: value})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == name
    assert answer.json()["error"]["code"] == "invalid_value"
    assert world.generator.calls == [] and world.ledger.records[-1].http_status == 400 and lane.num_running == 0


@pytest.mark.parametrize("name", ["x-request-timeout-s", "x-pressroom-priority"])
async def test_a_header_that_is_sent_twice_is_refused(world, name):
    async with world.client() as client:
        answer = await client.post("/v1/chat/completions", json=CHAT, headers=[(name, "1"), (name, "2")])
    assert answer.status_code == 400 and "once" in answer.json()["error"]["message"]


async def test_a_request_may_be_of_a_lower_class_than_its_key_and_of_no_higher(world, keys):
    policy = Policy(priority=5)
    keys.principals[VIP] = Principal("vip", "acme", policy=policy, tenant_policy=policy)
    async with world.client(VIP) as client:
        sent = {}
        for value in (None, "3", "-2", "5", "6"):
            headers = {} if value is None else {"x-pressroom-priority": value}
            sent[value] = (await client.post("/v1/chat/completions", json=CHAT, headers=headers)).status_code
    assert sent == {None: 200, "3": 200, "-2": 200, "5": 200, "6": 403}
    assert [call.priority for call in world.generator.calls] == [5, 3, -2, 5]
    async with world.client() as client:
        refused = await client.post("/v1/chat/completions", json=CHAT, headers={"x-pressroom-priority": "1"})
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "priority_not_allowed"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"fallbacks": ["nobody"]}, "broken: fallbacks: there is no graph 'nobody'"),
        ({"fallbacks": ["broken"]}, "must be other graphs"),
        ({"fallbacks": ["second", "second"]}, "each once"),
        ({"first_token_timeout_s": 1.0}, "needs fallbacks"),
        ({"fallbacks": ["second"], "first_token_timeout_s": 0.0}, "first_token_timeout_s"),
        ({"fallbacks": "second"}, "fallbacks"),
    ],
)
def test_a_chain_that_leads_nowhere_is_refused(graphs_dir, more, said):
    (graphs_dir / "broken.yaml").write_text(yaml.safe_dump(graph("broken", **more)))
    with pytest.raises(GraphError) as caught:
        read_graphs(graphs_dir)
    assert said in str(caught.value)
