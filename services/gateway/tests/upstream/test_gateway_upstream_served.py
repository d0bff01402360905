"""A graph over an upstream as clients see it: declared in YAML, listed, answered, accounted."""

import json

import httpx
import pytest
import yaml
from pydantic import SecretStr

from chassis.telemetry import tracer
from gateway import main
from gateway.api.http import Limits, make_app
from gateway.api.settlement import Recorder
from gateway.backends.graph_files import Services, assemble, check_upstream_keys, read_graphs
from gateway.backends.openai_upstream import OpenAiUpstream
from gateway.core.account import Account
from gateway.core.catalog import Catalog
from gateway.core.graph import Deadline, GraphError, GraphRequest
from gateway.core.limits import LocalLimiter
from gateway.core.money import Price, PriceEntry, put_declared
from gateway.core.ports import Principal
from gateway.core.services import Chat, Message, Stopping
from gateway.core.serving import Ask, Serving
from gateway.core.sizing import Sizes, cut
from gateway.settings import GatewaySettings

from .conftest import KEY, chunk, usage

CLIENT_KEY = "sk-one-secret"
ASK = {"model": "vendor-large", "messages": [{"role": "user", "content": "hello there"}]}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


def declared(url, **params):
    params = {"base_url": url, "model": "large-1", "key": "vendor"} | params
    node = {"id": "vendor", "service": "openai", "call": "complete", "params": params}
    return {"name": "vendor-large", "block": "sequence", "nodes": [node]}


class NothingElse:
    """Keys, generator, embedder, tuned models and ledger, as far as an upstream needs any."""

    def __init__(self) -> None:
        self.records = []

    async def authenticate(self, key):
        return Principal("one", "acme")

    async def list_models(self, *, timeout_s):
        return []

    async def tuned(self, tenant, model_id):
        return None

    async def tuned_of(self, tenant):
        return []

    async def record(self, record):
        self.records.append(record)


@pytest.fixture
def world():
    return NothingElse()


@pytest.fixture
def graphs(server, session, tmp_path, world):
    (tmp_path / "vendor.yaml").write_text(yaml.safe_dump(declared(server.url, price={"input": 0.15, "output": 0.6})))
    services = Services(
        world,
        world,
        world,
        tracer().start_as_current_span,
        upstream=lambda endpoint: OpenAiUpstream(session, endpoint),
        upstream_keys={"vendor": SecretStr(KEY)},
    )
    return assemble(read_graphs(tmp_path), services)


@pytest.fixture
async def client(graphs, world):
    catalog = Catalog(graphs, world, world, world)
    app = make_app(
        catalog=catalog,
        serving=Serving(catalog),
        embedder=world,
        keys=world,
        limiter=LocalLimiter(),
        recorder=Recorder(world),
        limits=Limits(timeout_s=30.0, max_body_bytes=64 * 1024, max_upload_bytes=1024 * 1024),
    )
    headers = {"authorization": f"Bearer {CLIENT_KEY}"}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://gateway", headers=headers, trust_env=False
    ) as made:
        yield made


def chunks_of(response):
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_a_chat_streams_and_is_accounted_by_the_upstreams_usage(client, server, world):
    server.says(chunk(content="Hel"), chunk(content="lo", finish="stop"), usage(10, 16, 3))
    response = await client.post(
        "/v1/chat/completions", json=ASK | {"stream": True, "stream_options": {"include_usage": True}}
    )
    chunks = chunks_of(response)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "Hello"
    assert {c["model"] for c in chunks} == {"vendor-large"}
    assert chunks[-1]["usage"]["completion_tokens"] == 16
    (record,) = world.records
    assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (10, 16, 3)
    assert (record.model, record.finish_reason, record.http_status) == ("vendor-large", "stop", 200)


async def test_the_clients_key_stays_here_and_its_trace_goes_on(client, server):
    server.says(chunk(content="a", finish="stop"), usage(1, 1))
    await client.post("/v1/chat/completions", json=ASK)
    (asked,) = server.asked
    assert asked.headers["authorization"] == f"Bearer {KEY}" and CLIENT_KEY not in str(asked)
    assert "traceparent" in asked.headers and asked.body["model"] == "large-1"


@pytest.mark.parametrize("stream", [True, False])
async def test_tool_calls_of_the_upstream_come_out_as_ours(client, server, stream):
    def call(**fields):
        return chunk(delta={"tool_calls": [fields]})

    server.says(
        chunk(content="Let me see. "),
        call(index=0, id="call_a", type="function", function={"name": "get_weather", "arguments": ""}),
        call(index=0, function={"arguments": '{"city": "Paris"}'}),
        chunk(finish="tool_calls"),
        usage(20, 9),
    )
    response = await client.post("/v1/chat/completions", json=ASK | {"tools": [TOOL], "stream": stream})
    whole = {"id": "call_a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    if not stream:
        (choice,) = response.json()["choices"]
        assert choice["message"]["tool_calls"] == [whole] and choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"].strip() == "Let me see."
        return
    choices = [c["choices"][0] for c in chunks_of(response)]
    begun, grown = (piece for c in choices for piece in c["delta"].get("tool_calls", ()))
    assert begun == {"index": 0, **whole, "function": {"name": "get_weather", "arguments": ""}}
    assert grown == {"index": 0, "function": {"arguments": '{"city": "Paris"}'}}
    assert choices[-1]["finish_reason"] == "tool_calls"


async def test_tool_calls_of_the_upstream_come_out_over_the_other_apis(client, server):
    call = {"index": 0, "id": "call_a", "function": {"name": "get_weather", "arguments": '{"city": '}}
    more = {"index": 0, "function": {"arguments": '"Paris"}'}}
    server.says(
        chunk(content="Let me see. "),
        *(chunk(delta={"tool_calls": [piece]}) for piece in (call, more)),
        chunk(finish="tool_calls"),
        usage(20, 9),
    )
    schema = {"type": "object"}
    asked = {"model": "vendor-large", "max_tokens": 50, "messages": ASK["messages"]}
    message = await client.post(
        "/v1/messages", json=asked | {"tools": [{"name": "get_weather", "input_schema": schema}]}
    )
    text, used = message.json()["content"]
    assert text["text"].strip() == "Let me see." and message.json()["stop_reason"] == "tool_use"
    assert (used["type"], used["name"], used["input"]) == ("tool_use", "get_weather", {"city": "Paris"})

    tool = {"type": "function", "name": "get_weather", "parameters": schema}
    response = await client.post("/v1/responses", json={"model": "vendor-large", "input": "hello", "tools": [tool]})
    said, called = response.json()["output"]
    assert (said["type"], called["type"], called["name"]) == ("message", "function_call", "get_weather")
    assert called["arguments"] == '{"city": "Paris"}'


async def test_an_estimated_usage_says_so(client, server, world):
    server.says(chunk(content="a", finish="stop"))
    response = await client.post("/v1/chat/completions", json=ASK)
    assert response.json()["usage"]["is_estimate"] is True

    assert not world.records[0].is_exact


async def test_an_interrupted_answer_is_accounted_as_an_estimate(client, server, world):
    server.says(chunk(content="a"), chunk(content="b"), done=False)
    await client.post("/v1/chat/completions", json=ASK | {"stream": True})
    (record,) = world.records
    assert (record.prompt_tokens, record.completion_tokens, record.is_exact) == (3, 2, False)


async def test_limits_and_budgets_reserve_by_bytes_and_the_declared_context(graphs, world):
    ask = Ask(
        Principal("one", "acme"),
        Account("r", "t", "", "/v1/chat/completions", Principal("one", "acme")),
        Deadline.after(10),
        "vendor-large",
        requests=(GraphRequest(Chat((Message("user", "x" * 1000),)), "acme", stopping=Stopping(50), n=2),),
    )
    sizes = Sizes(graphs, world, world)
    size = await sizes.exact(ask)
    assert 1000 < size.prompts[0] < 1400 and size.least == size.most == size.prompts[0] + 100
    ask.requests = (GraphRequest("x" * 1000, "acme", n=2),)
    size = await sizes.exact(ask)
    assert (size.least, size.most) == (size.prompts[0] + 2 * 16, 2 * 131_072)
    (cut_short,) = cut(ask.requests, size, tokens=2000)
    assert cut_short.stopping.max_tokens == (2000 - size.prompts[0]) // 2


async def test_a_declared_price_is_put_in_force_where_another_one_is():
    class Prices:
        entries = [PriceEntry("same", 1, Price(1, 1, 1)), PriceEntry("other", 1, Price(1, 1, 1))]  # noqa: RUF012

        async def all(self):
            return self.entries

        async def put(self, entry, actor, now_unix_ms):
            assert actor == "configuration"
            self.entries = [*self.entries, entry]

    prices = Prices()
    declared = {name: Price(2, 2, 2) if name != "same" else Price(1, 1, 1) for name in ("same", "other", "new")}
    for _ in range(2):
        await put_declared(prices, declared, 50)
    assert [(one.model, one.effective_unix_ms) for one in prices.entries[2:]] == [("other", 50), ("new", 50)]


async def test_completions_with_an_echo_work(client, server):
    logprobs = {"tokens": ["Say", " it"], "token_logprobs": [None, -1], "top_logprobs": None}
    choice = {"index": 0, "text": "Say it", "logprobs": logprobs, "finish_reason": "length"}
    server.sends(json.dumps(usage(1, 1) | {"choices": [choice]}).encode(), kind="application/json")
    asked = {"model": "vendor-large", "prompt": "Say", "echo": True, "logprobs": 0, "max_tokens": 1}
    (answer,) = (await client.post("/v1/completions", json=asked)).json()["choices"]
    assert answer["text"] == "Say it" and answer["logprobs"]["token_logprobs"] == [None, -1.0]


@pytest.mark.parametrize(
    ("status", "expected"), [("401 No", 503), ("403 No", 503), ("429 Slow", 503), ("500 Oops", 503), ("400 Bad", 400)]
)
async def test_the_upstreams_refusals_are_http_statuses_of_ours(client, server, world, status, expected):
    server.sends(b'{"error": {"message": "no"}}', status=status, headers="Retry-After: 9\r\n")
    response = await client.post("/v1/chat/completions", json=ASK | {"stream": True})
    assert response.status_code == expected and KEY not in response.text
    assert ("retry-after" in response.headers) == (expected in (429, 503))
    assert world.records[0].http_status == expected


async def test_it_is_listed_and_cannot_be_finetuned(client, graphs):
    listed = (await client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["vendor-large"]
    assert not graphs["vendor-large"].is_plain
    assert graphs["vendor-large"].upstream.price == Price(150_000, 150_000, 600_000)


BAD_PARAMS = [
    ({"base_url": "ftp://host/v1"}, "nodes[0].params.base_url"),
    ({"base_url": "https://user:secret@host/v1"}, "nodes[0].params.base_url"),
    ({"key": "sk-Literal Key"}, "nodes[0].params.key"),
    ({"timeout_s": 0.0}, "nodes[0].params.timeout_s"),
    ({"price": {"input": -1.0, "output": 1.0}}, "nodes[0].params.price.input"),
    ({"colour": "red"}, "nodes[0].params.colour"),
]


@pytest.mark.parametrize(("params", "field"), BAD_PARAMS)
def test_a_bad_declaration_is_refused_with_its_field(tmp_path, params, field):
    (tmp_path / "vendor.yaml").write_text(yaml.safe_dump(declared("https://host/v1", **params)))
    with pytest.raises(GraphError, match=r"vendor\.yaml: ") as caught:
        read_graphs(tmp_path)
    assert field in str(caught.value)


def test_a_key_that_is_not_there_is_named_before_a_port_opens(tmp_path):
    (tmp_path / "vendor.yaml").write_text(yaml.safe_dump(declared("https://host/v1")))
    with pytest.raises(GraphError, match=r"vendor-large: nodes\[0\]\.params\.key: .*'vendor' in GATEWAY_UPSTREAM_KEYS"):
        check_upstream_keys(read_graphs(tmp_path), {})


@pytest.mark.parametrize(
    "value", ["{broken sk-very-secret", '["sk-very-secret"]', '{"vendor": {"a": "sk-very-secret"}}']
)
def test_bad_keys_end_the_process_and_are_not_told(monkeypatch, capsys, value):
    for name in GatewaySettings.model_fields:
        monkeypatch.delenv(f"GATEWAY_{name.upper()}", raising=False)
    monkeypatch.setenv("GATEWAY_UPSTREAM_KEYS", value)
    with pytest.raises(SystemExit) as caught:
        main.main()
    said = capsys.readouterr().err
    assert caught.value.code == 78 and "GATEWAY_UPSTREAM_KEYS" in said and "very-secret" not in said
