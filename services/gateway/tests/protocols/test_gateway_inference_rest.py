"""The Open Inference Protocol over REST: health, metadata, infer in JSON and in bytes, generate, and bad input."""

import json
import struct

import httpx
import pytest

from chassis.errors import Code, PlatformError
from testkit.waiting import eventually

from .conftest import BASE, ENCODER, KEY

INFER = f"/v2/models/{BASE}/infer"
EMBED = f"/v2/models/{ENCODER}/infer"


@pytest.fixture
async def http(gateway):
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=gateway.url, headers=headers, trust_env=False) as client:
        yield client


def texts(name: str, *values: str, **changes) -> dict:
    return {"name": name, "datatype": "BYTES", "shape": [len(values)], "data": list(values)} | changes


def raw_texts(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def in_bytes(fields: dict, *blobs: bytes) -> tuple[bytes, dict[str, str]]:
    """A body with bytes behind the JSON, and its header."""
    head = json.dumps(fields).encode()
    return b"".join([head, *blobs]), {"inference-header-content-length": str(len(head))}


async def test_health_and_the_servers_metadata_need_no_key(gateway):
    async with httpx.AsyncClient(base_url=gateway.url, trust_env=False) as nobody:
        assert (await nobody.get("/v2/health/live")).status_code == 200
        assert (await nobody.get("/v2/health/ready")).json() == {"ready": True}
        server = (await nobody.get("/v2")).json()
        assert server["name"] == "pressroom" and "binary_tensor_data" in server["extensions"]
        for path in (f"/v2/models/{BASE}", f"/v2/models/{BASE}/ready"):
            assert (await nobody.get(path)).status_code == 401
        for action in ("infer", "generate", "generate_stream"):
            refused = await nobody.post(f"/v2/models/{BASE}/{action}", json={})
            assert refused.status_code == 401 and isinstance(refused.json()["error"], str)


async def test_readiness_follows_the_services_and_is_asked_once_in_a_while(gateway, http):
    gateway.embedder.error = PlatformError(Code.UNAVAILABLE, "away")

    async def says(status):
        return (await http.get("/v2/health/ready")).status_code == status

    await eventually(lambda: says(503))
    gateway.embedder.error = None
    await eventually(lambda: says(200))


async def test_metadata_says_what_a_model_takes_and_gives(http):
    told = (await http.get(f"/v2/models/{BASE}")).json()
    assert told["versions"] == ["1"] and told["inputs"] == [{"name": "text_input", "datatype": "BYTES", "shape": [-1]}]
    assert [one["name"] for one in told["outputs"]] == ["text_output", "finish_reason"]
    told = (await http.get(f"/v2/models/{ENCODER}/versions/1")).json()
    assert told["outputs"] == [{"name": "embedding", "datatype": "FP32", "shape": [-1, -1]}]
    assert (await http.get(f"/v2/models/{ENCODER}/ready")).json()["ready"] is True
    for path in ("nobody", "nobody/ready", f"{BASE}/versions/2", f"{BASE}/versions/2/ready", "%00", "..%2f..", "x:y"):
        assert (await http.get(f"/v2/models/{path}")).status_code == 404, path


async def test_generator_in_json(gateway, http):
    body = {
        "id": "mine",
        "inputs": [texts("text_input", "uno", "due")],
        "parameters": {"max_tokens": 7, "temperature": 0.5, "seed": 3, "stop": "x", "top_k": 4},
    }
    answer = (await http.post(INFER, json=body)).json()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == (BASE, "1", "mine")
    assert answer["outputs"] == [texts("text_output", "so: uno", "so: due"), texts("finish_reason", "stop", "stop")]
    assert answer["parameters"] == {"prompt_tokens": 6, "completion_tokens": 4, "cached_tokens": 0}
    call = gateway.generator.calls[0]
    assert (call.stopping.max_tokens, call.stopping.stop) == (7, ("x",))
    assert (call.sampling.temperature, call.sampling.seed, call.sampling.top_k) == (0.5, 3, 4)
    await gateway.accounted([(1, 0, 6, 4)], slice(3, 7))


async def test_parameters_may_come_as_tensors_and_as_json(gateway, http):
    inputs = [
        texts("prompt", "uno"),
        {"name": "max_tokens", "datatype": "INT32", "shape": [1, 1], "data": [[5]]},
        {"name": "ignore_eos", "datatype": "BOOL", "shape": [1], "data": [True]},
        texts("sampling_parameters", '{"temperature": 0.25}'),
    ]
    assert (await http.post(INFER, json={"inputs": inputs})).status_code == 200
    call = gateway.generator.calls[0]
    assert (call.stopping.max_tokens, call.stopping.ignore_eos, call.sampling.temperature) == (5, True, 0.25)


async def test_encoder_in_json(gateway, http):
    answer = (
        await http.post(EMBED, json={"inputs": [texts("text", "a", "b", shape=[2, 1], data=[["a"], ["b"]])]})
    ).json()
    assert answer["outputs"] == [
        {"name": "embedding", "datatype": "FP32", "shape": [2, 2], "data": [0.5, 0.25, 0.5, 0.25]}
    ]
    await gateway.accounted([("default", "boot", ENCODER, 1)], slice(None, 4))


async def test_bytes_in_and_out_as_tritonclient_sends_them(http):
    blob = raw_texts(b"a", "ü".encode())
    tensor = {"name": "text", "datatype": "BYTES", "shape": [2, 1], "parameters": {"binary_data_size": len(blob)}}
    content, headers = in_bytes({"inputs": [tensor], "parameters": {"binary_data_output": True}}, blob)
    answer = await http.post(EMBED, content=content, headers=headers)
    assert answer.status_code == 200, answer.text
    length = int(answer.headers["inference-header-content-length"])
    (output,) = json.loads(answer.content[:length])["outputs"]
    assert (output["shape"], output["parameters"]) == ([2, 2], {"binary_data_size": 16})
    assert struct.unpack("<4f", answer.content[length:]) == (0.5, 0.25, 0.5, 0.25)


async def test_outputs_are_given_as_each_is_asked_for(http):
    outputs = [{"name": "finish_reason"}, {"name": "text_output", "parameters": {"binary_data": True}}]
    answer = await http.post(INFER, json={"inputs": [texts("text_input", "x")], "outputs": outputs})
    length = int(answer.headers["inference-header-content-length"])
    shown = {one["name"]: one for one in json.loads(answer.content[:length])["outputs"]}
    assert shown["finish_reason"]["data"] == ["stop"]
    assert answer.content[length:] == raw_texts(b"so: x")
    answer = await http.post(INFER, json={"inputs": [texts("text_input", "x")], "outputs": [{"name": "text_output"}]})
    assert [one["name"] for one in answer.json()["outputs"]] == ["text_output"]


async def test_generate_takes_parameters_beside_the_text_or_within(gateway, http):
    body = {"text_input": "uno", "max_tokens": 5, "parameters": {"temperature": 0.25}, "stream": False}
    answer = (await http.post(f"/v2/models/{BASE}/generate", json=body)).json()
    assert (answer["model_name"], answer["text_output"], answer["finish_reason"]) == (BASE, "so: uno", "stop")
    call = gateway.generator.calls[0]
    assert (call.stopping.max_tokens, call.sampling.temperature) == (5, 0.25)


async def _events(http, body: dict) -> list[dict]:
    answer = await http.post(f"/v2/models/{BASE}/generate_stream", json=body)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"), answer.text
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]


async def test_generate_stream_gives_pieces_and_an_encoder_has_no_text(gateway, http):
    events = await _events(http, {"text_input": "uno", "max_tokens": 5})
    assert [one["text_output"] for one in events] == ["so: ", "uno", ""]
    assert events[-1]["finish_reason"] == "stop"
    await gateway.accounted([(1, 0, 3, 2)], slice(3, 7))
    refused = await http.post(f"/v2/models/{ENCODER}/generate", json={"text_input": "x"})
    assert (refused.status_code, "generate" in refused.json()["error"]) == (404, True)


async def test_a_stream_that_breaks_off_says_so(gateway, http):
    gateway.generator.breaks = {"x"}
    *pieces, last = await _events(http, {"text_input": "x"})
    assert [one["text_output"] for one in pieces] == ["so: "]
    assert last == {"error": "gone"}


ONE = texts("text_input", "x")
BAD_BODIES = {
    "no JSON": b"{",
    "a list": b"[]",
    "NaN": b'{"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [NaN], "data": ["x"]}]}',
    "key twice": b'{"id": "a", "id": "b"}',
    "no inputs": {},
    "inputs empty": {"inputs": []},
    "inputs of a wrong type": {"inputs": "text_input"},
    "input without a name": {"inputs": [{"datatype": "BYTES", "shape": [1], "data": ["x"]}]},
    "unknown datatype": {"inputs": [texts("text_input", "x", datatype="FP16")]},
    "datatype of another kind": {"inputs": [{"name": "text_input", "datatype": "INT32", "shape": [1], "data": [1]}]},
    "number for a text": {"inputs": [texts("text_input", data=[1], shape=[1])]},
    "text for a number": {"inputs": [ONE, {"name": "seed", "datatype": "INT32", "shape": [1], "data": ["1"]}]},
    "bool for a number": {"inputs": [ONE, {"name": "seed", "datatype": "INT32", "shape": [1], "data": [True]}]},
    "shape too large": {"inputs": [texts("text_input", "x", shape=[2])]},
    "shape too small": {"inputs": [texts("text_input", "x", "y", shape=[1])]},
    "shape negative": {"inputs": [texts("text_input", "x", shape=[-1])]},
    "shape huge": {"inputs": [texts("text_input", "x", shape=[2**40])]},
    "shape of nine dimensions": {"inputs": [texts("text_input", "x", shape=[1] * 9)]},
    "no shape": {"inputs": [{"name": "text_input", "datatype": "BYTES", "data": ["x"]}]},
    "no data": {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1]}]},
    "data is no list": {"inputs": [texts("text_input", shape=[1], data="x")]},
    "data deep": {"inputs": [texts("text_input", shape=[1], data=json.loads("[" * 70 + '"x"' + "]" * 70))]},
    "no text": {"inputs": [texts("text_input", shape=[0])]},
    "two texts": {"inputs": [ONE, texts("prompt", "y")]},
    "unknown input": {"inputs": [ONE, texts("other", "y", "z")]},
    "only a parameter": {"inputs": [{"name": "seed", "datatype": "INT32", "shape": [1], "data": [1]}]},
    "unknown output": {"inputs": [ONE], "outputs": [{"name": "logits"}]},
    "parameter of a wrong type": {"inputs": [ONE], "parameters": {"max_tokens": "many"}},
    "parameter that is a list": {"inputs": [ONE], "parameters": {"stop": ["x"]}},
    "parameter out of bounds": {"inputs": [ONE], "parameters": {"temperature": -1}},
    "65 parameters": {"inputs": [ONE], "parameters": {str(i): i for i in range(65)}},
    "sampling parameters are no JSON": {"inputs": [ONE, texts("sampling_parameters", "{")]},
    "size of bytes that are not there": {"inputs": [texts("text_input", parameters={"binary_data_size": 5})]},
    "size negative": {"inputs": [texts("text_input", parameters={"binary_data_size": -1})]},
    "size is a text": {"inputs": [texts("text_input", parameters={"binary_data_size": "5"})]},
    "best_of": {"inputs": [ONE], "parameters": {"n": 1000}},
}


async def test_bad_bodies_are_refused_and_cost_nothing(gateway, http):
    for case, body in BAD_BODIES.items():
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await http.post(INFER, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400, (case, answer.text)
        assert isinstance(answer.json()["error"], str) and answer.json()["error"], case
        assert gateway.generator.calls == [], case

    # A record without tokens each: the request was made, and nothing was used.
    async def all_are_accounted() -> bool:
        rows = await gateway.usage()
        return [sum(row[column] for row in rows) for column in (3, 4, 5, 6)] == [len(BAD_BODIES)] * 2 + [0, 0]

    await eventually(all_are_accounted)


def _tensor(size: int, **changes) -> dict:
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": size}}
    return {"inputs": [tensor | changes]}


BAD_BYTES = {
    "length is no number": (*in_bytes(_tensor(5), raw_texts(b"x"))[:1], {"inference-header-content-length": "x"}),
    "length is negative": (b"{}", {"inference-header-content-length": "-1"}),
    "length beyond the body": (b"{}", {"inference-header-content-length": "3"}),
    "length huge": (b"{}", {"inference-header-content-length": "9" * 30}),
    "length zero": (*in_bytes({})[:1], {"inference-header-content-length": "0"}),
    "element cut short": in_bytes(_tensor(6), struct.pack("<I", 3) + b"ab"),
    "length of an element cut short": in_bytes(_tensor(3), b"\x01\x00\x00"),
    "element of 4 GiB": in_bytes(_tensor(5), b"\xff\xff\xff\xffx"),
    "more elements than the shape": in_bytes(_tensor(10), raw_texts(b"x") * 2),
    "no UTF-8": in_bytes(_tensor(5), raw_texts(b"\xff")),
    "bytes left over": in_bytes(_tensor(5), raw_texts(b"x") + b"!"),
    "numbers cut short": in_bytes(_tensor(3, datatype="INT32"), b"abc"),
    "too many elements": in_bytes(_tensor(4 * 70_000, shape=[65_536]), b"\x00" * 4 * 70_000),
}


async def test_bad_bytes_are_refused(gateway, http):
    for case, (content, headers) in BAD_BYTES.items():
        answer = await http.post(INFER, content=content, headers=headers)
        assert answer.status_code in (400, 413), (case, answer.text)
        assert gateway.generator.calls == [], case


BAD_PATHS = (
    ("/v2/models/nobody/infer", {}, 404),
    (f"/v2/models/{BASE}/versions/9/infer", {}, 404),
    ("/v2/models/..%2fadmin/infer", {}, 404),
    ("/v2/models/%00/infer", {}, 404),
    (f"/v2/models/{'x' * 300}/infer", {}, 400),
    (f"/v2/models/{BASE}/load", {}, 404),
    (INFER, {"content-encoding": "gzip"}, 415),
)


async def test_bad_paths_and_headers(gateway, http):
    for path, headers, status in BAD_PATHS:
        answer = await http.post(path, json={"inputs": [ONE]}, headers=headers)
        assert answer.status_code == status, (path, answer.text)
        assert isinstance(answer.json()["error"], str), path
    assert gateway.generator.calls == []


async def test_a_client_that_leaves_stops_the_work(gateway, http):
    gateway.generator.held = {"x"}
    with pytest.raises(httpx.ReadTimeout):
        await http.post(INFER, json={"inputs": [ONE]}, timeout=0.5)
    await eventually(lambda: gateway.generator.num_running == 0)
    await gateway.accounted([(0, 3, 1)])


async def test_what_the_service_refuses_is_told_as_over_the_other_routes(gateway, http):
    gateway.generator.failures = {"x": [PlatformError(Code.OVERLOADED, "busy", retry_after_s=3)]}
    answer = await http.post(INFER, json={"inputs": [ONE]})
    assert (answer.status_code, answer.headers["retry-after"], answer.json()) == (503, "3", {"error": "busy"})
