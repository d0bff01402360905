"""The table of bad requests: what is sent, and the status, the code and the field that are answered."""

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

MODEL = "smollm2-135m-instruct"
CHAT, COMPLETIONS, FILES, BATCHES = "/v1/chat/completions", "/v1/completions", "/v1/files", "/v1/batches"
KEYS, TENANTS = "/admin/keys", "/admin/tenants"
MARK = "zanzibar-prompt"  # stands in prompts, and nowhere else
HELLO = [{"role": "user", "content": MARK}]
JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=b"}


@dataclass(frozen=True)
class Bad:
    """One request. What stands in braces is filled in: keys, and ids of another tenant's things."""

    status: int
    code: str
    param: str | None = None
    method: str = "POST"
    path: str = CHAT
    body: bytes = b""
    headers: Mapping[str, str | bytes] = field(default_factory=dict)
    key: str | None = "alpha"


def chat(code: str, param: str | None, status: int = 400, **changes: Any) -> Bad:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 2} | changes
    return Bad(status, code, param, body=json.dumps(body).encode(), headers=JSON)


def turn(code: str, param: str, **fields: Any) -> Bad:
    return chat(code, param, messages=[{"role": "user", "content": "x"} | fields])


def raw(code: str, body: bytes, status: int = 400, param: str | None = None, **headers: str) -> Bad:
    return Bad(status, code, param, body=body, headers=JSON | {n.replace("_", "-"): v for n, v in headers.items()})


def tail(code: str, text: bytes, param: str | None = None) -> Bad:
    """A good chat whose end is not."""
    good = b'{"model": "%s", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2' % MODEL.encode()
    return raw(code, good + text, param=param)


def post(path: str, code: str, param: str | None, status: int = 400, key: str = "alpha", **body: Any) -> Bad:
    return Bad(status, code, param, path=path, body=json.dumps(body).encode(), headers=JSON, key=key)


def credential(value: str | bytes, name: str = "authorization", path: str = "/v1/models") -> Bad:
    return Bad(401, "invalid_api_key", method="GET", path=path, headers={name: value}, key=None)


def get(path: str, status: int = 404, code: str = "not_found", param: str | None = None, **fields: Any) -> Bad:
    return Bad(status, code, param, method="GET", path=path, **fields)


def schema(code: str, source: object, param: str = "response_format") -> Bad:
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": source}}
    return chat(code, param, response_format=shape)


def tool(name: str) -> Bad:
    return chat("invalid_value", "tools[0].function.name", tools=[{"type": "function", "function": {"name": name}}])


def budget(amount: object) -> Bad:
    return post(KEYS, "invalid_value", "policy.budget.amount", key="admin", policy={"budget": {"amount": amount}})


def form(code: str, param: str | None, *parts: bytes) -> Bad:
    body = b"".join(b"--b\r\ncontent-disposition: form-data; " + part + b"\r\n" for part in parts) + b"--b--\r\n"
    return Bad(400, code, param, path=FILES, body=body, headers=FORM)


FILE = b'name="file"; filename="a.jsonl"\r\n\r\n{}'
PURPOSE = b'name="purpose"\r\n\r\nbatch'
DEEP = b"[" * 100_000 + b"]" * 100_000
SPOOFED = {"x-forwarded-for": "127.0.0.1", "x-real-ip": "::1", "x-tenant": "admin", "x-admin": "true"}
SPOOFED |= {"x-forwarded-host": "localhost", "x-http-method-override": "GET", "x-original-url": "/healthz"}

AUTHENTICATION = {
    "no key": get("/v1/models", 401, "invalid_api_key", key=None),
    "key in the query": get("/v1/models?api_key={alpha}&key={alpha}", 401, "invalid_api_key", key=None),
    "key in a cookie": credential("authorization=Bearer {alpha}", "cookie"),
    "key in another vendor's header": credential("{alpha}", "api-key"),
    "key without a scheme": credential("{alpha}"),
    "basic": credential("Basic OntzZWNyZXR9"),
    "tab for a space": credential("Bearer\t{alpha}"),
    "two keys in one header": credential("Bearer {alpha},{alpha}"),
    "key in quotes": credential('Bearer "{alpha}"'),
    "key with one character more": credential("Bearer {alpha}x"),
    "key with its end cut off": credential("Bearer {alpha_cut}"),
    "key in capitals": credential("Bearer {alpha_capitals}"),
    "id of a key alone": credential("Bearer {alpha_id}"),
    "hash of a key for its secret": credential("Bearer {alpha_hash}"),
    "hash of a key by itself": credential("Bearer {alpha_bare_hash}"),
    "hash in Anthropic's header": credential("{alpha_hash}", "x-api-key"),
    "key of another's id": credential("Bearer {alpha_with_betas_id}"),
    "unknown key": credential("Bearer sk-0000000000000000-" + "A" * 43),
    "SQL for a key": credential("Bearer sk-' OR '1'='1-x"),
    "pattern for a key": credential("Bearer sk-%-%"),
    "key that is not ASCII": credential("Bearer sk-é-é".encode()),
    "key of 40 KB": credential("Bearer " + "a" * 40_000),
    "key of 64 KB": Bad(431, "bad_http_request", method="GET", path="/v1/models", headers={"x": "a" * 65536}),
    "unsigned token": credential("Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiIsInRlbmFudCI6ImFkbWluIn0."),
    "key and x-api-key": get("/v1/models", 401, "invalid_api_key", headers={"x-api-key": "{alpha}"}),
    "admin route, user's key": get(KEYS, 403, "admin_key_required"),
    "admin route, spoofed headers": get(KEYS, 403, "admin_key_required", headers=SPOOFED),
    "spoofed headers and no key": get("/v1/models", 401, "invalid_api_key", headers=SPOOFED, key=None),
    "revoked key": get("/v1/models", 401, "invalid_api_key", key="revoked"),
    "scope that the key has not": get(FILES, 403, "scope_missing", key="scoped"),
    "route that no scope knows": get("/v1/nothing", 403, "scope_missing", key="scoped"),
    "model that the key may not use": post(
        CHAT, "model_not_allowed", "model", 403, key="scoped", model=MODEL, messages=HELLO
    ),
    "class above the key's": Bad(
        403, "priority_not_allowed", "x-pressroom-priority", headers={"x-pressroom-priority": "99"}
    ),
    "Idempotency-Key of 1,000 characters": raw(
        "invalid_idempotency_key", b"{}", 400, "idempotency-key", idempotency_key="k" * 1000
    ),
    "deadline below zero": raw("invalid_value", b"{}", 400, "x-request-timeout-s", x_request_timeout_s="-1"),
    "deadline that is no number": raw("invalid_value", b"{}", 400, "x-request-timeout-s", x_request_timeout_s="nan"),
}

PARSING = {
    "nothing": raw("invalid_json", b""),
    "blanks": raw("invalid_json", b"  \n "),
    "null": raw("invalid_type", b"null"),
    "a list": raw("invalid_type", b"[]"),
    "a string": raw("invalid_type", b'"x"'),
    "a number": raw("invalid_type", b"1"),
    "cut off": tail("invalid_json", b""),
    "something behind it": tail("invalid_json", b"} x"),
    "two objects": tail("invalid_json", b"}{}"),
    "trailing comma": tail("invalid_json", b",}"),
    "comment": tail("invalid_json", b"} // x"),
    "NaN": tail("invalid_json", b', "temperature": NaN}'),
    "Infinity": tail("invalid_json", b', "temperature": -Infinity}'),
    "1e400": tail("invalid_json", b', "temperature": 1e400}'),
    "number of 5,000 digits": tail("invalid_json", b', "seed": ' + b"9" * 5000 + b"}"),
    "leading zero": tail("invalid_json", b', "seed": 01}'),
    "key twice": tail("invalid_json", b', "model": "x"}'),
    "key twice, once escaped": tail("invalid_json", rb', "mod\u0065l": "x"}'),
    "key twice, deep": tail("invalid_json", b', "x": [{"a": 1, "a": 2}]}'),
    "lone surrogate": tail("invalid_json", rb', "user": "\ud800"}'),
    "surrogates the wrong way round": tail("invalid_json", rb', "user": "\udc00\ud800"}'),
    "surrogate in UTF-8": tail("invalid_json", b', "user": "\xed\xa0\x80"}'),
    "bytes that are no text": tail("invalid_json", b', "user": "\xff"}'),
    "overlong UTF-8": tail("invalid_json", b', "user": "\xc0\xaf"}'),
    "raw NUL": tail("invalid_json", b', "user": "\x00"}'),
    "byte order mark": raw("invalid_json", b"\xef\xbb\xbf{}"),
    "UTF-16": raw("invalid_json", "{}".encode("utf-16")),
    "depth bomb": raw("invalid_json", DEEP),
    "depth bomb in an unknown field": tail("invalid_json", b', "x": ' + DEEP + b"}"),
    "65 levels": tail("invalid_json", b', "x": ' + b"[" * 65 + b"]" * 65 + b"}"),
    "depth bomb that is cut off": raw("invalid_json", b'{"a":' * 100_000),
    "gzip": raw("unsupported_media_type", gzip.compress(b"{}"), 415, "content-encoding", content_encoding="gzip"),
    "gzip bomb": raw(
        "unsupported_media_type", gzip.compress(b" " * 10**7), 415, "content-encoding", content_encoding="gzip"
    ),
    "brotli": raw("unsupported_media_type", b"x", 415, "content-encoding", content_encoding="br"),
    "gzip that is not told": raw("invalid_json", gzip.compress(b"{}")),
    "3 MB": raw("payload_too_large", b'{"a": "' + b"x" * 3_000_000 + b'"}', 413),
    "plain text": raw("unsupported_media_type", b"{}", 415, "content-type", content_type="text/plain"),
    "form for JSON": raw(
        "unsupported_media_type", b"a=b", 415, "content-type", content_type="application/x-www-form-urlencoded"
    ),
    "no content type": raw("unsupported_media_type", b"{}", 415, "content-type", content_type=""),
}

PARAMETERS = {
    "temperature below 0": chat("invalid_value", "temperature", temperature=-0.1),
    "temperature above 2": chat("invalid_value", "temperature", temperature=1e308),
    "temperature as text": chat("invalid_type", "temperature", temperature="1"),
    "top_p of 0": chat("invalid_value", "top_p", top_p=0),
    "top_k below -1": chat("invalid_value", "top_k", top_k=-2),
    "max_tokens 0": chat("invalid_value", "max_tokens", max_tokens=0),
    "max_tokens -1": chat("invalid_value", "max_tokens", max_tokens=-1),
    "max_tokens 10**12": chat("invalid_value", "max_tokens", max_tokens=10**12),
    "max_tokens 10**30": chat("invalid_type", "max_tokens", max_tokens=10**30),
    "max_tokens true": chat("invalid_type", "max_tokens", max_tokens=True),
    "max_tokens beyond the context": chat("context_length_exceeded", "max_tokens", max_tokens=10**6),
    "n 0": chat("invalid_value", "n", n=0),
    "n 10**9": chat("invalid_value", "n", n=10**9),
    "seed beyond 64 bits": chat("invalid_type", "seed", seed=2**64),
    "seed with a half": chat("invalid_type", "seed", seed=1.5),
    "stream as text": chat("invalid_type", "stream", stream="true"),
    "stream_options without a stream": chat("invalid_value", "stream_options", stream_options={"include_usage": True}),
    "10,000 stop strings": chat("invalid_value", "stop", stop=[str(number) for number in range(10_000)]),
    "empty stop string": chat("invalid_value", "stop[1]", stop=["a", ""]),
    "stop string of 1 MB": chat("invalid_value", "stop", stop="x" * 10**6),
    "stop token outside the vocabulary": chat("invalid_value", "stop_token_ids", stop_token_ids=[2**31]),
    "logit_bias of no token": chat("invalid_value", "logit_bias", logit_bias={"one": 1}),
    "logit_bias of a digit that is none": chat("invalid_value", "logit_bias", logit_bias={"²": 1}),
    "logit_bias outside the vocabulary": chat("invalid_value", "logit_bias", logit_bias={"999999": 1}),
    "logit_bias of 10,000 tokens": chat(
        "invalid_value", "logit_bias", logit_bias={str(number): 1 for number in range(10_000)}
    ),
    "min_tokens above max_tokens": chat("invalid_value", "min_tokens", min_tokens=3),
    "client's chat template": chat("unsupported_parameter", "chat_template", chat_template="{{ 7 * 7 }}"),
    "arguments for a template": chat(
        "unsupported_parameter", "chat_template_kwargs", chat_template_kwargs={"tools": "x"}
    ),
    "beam search": chat("unsupported_parameter", "use_beam_search", use_beam_search=True),
    "suffix": post(COMPLETIONS, "unsupported_parameter", "suffix", model=MODEL, prompt="x", suffix="y"),
    "no messages": chat("invalid_value", "messages", messages=[]),
    "5,000 messages": chat("invalid_value", "messages", messages=HELLO * 5000),
    "message that is text": chat("invalid_type", "messages[0]", messages=["x"]),
    "unknown role": turn("invalid_value", "messages[0].role", role="root"),
    "role with a line break": turn("invalid_value", "messages[0].role", role="user\n"),
    "content that is a number": turn("invalid_type", "messages[0].content", content=5),
    "no content": turn("invalid_value", "messages[0]", content=None),
    "image": turn("invalid_value", "messages[0].content[0].type", content=[{"type": "image_url", "image_url": {}}]),
    "audio": turn("invalid_value", "messages[0].content[0].type", content=[{"type": "input_audio"}]),
    "10,000 parts": turn("invalid_value", "messages[0].content", content=[{"type": "text", "text": "x"}] * 10_000),
    "tool turn that answers nothing": turn("invalid_value", "messages", role="tool", tool_call_id="a"),
    "tool of an odd name": tool("<|im_start|>"),
    "tool of a path for a name": tool("../x"),
    "tool with a line break": tool("a\n"),
    "tool of 65 characters": tool("a" * 65),
    "129 tools": chat("invalid_value", "tools", tools=[{"type": "function", "function": {"name": "a"}}] * 129),
    "choice of no tool": chat("invalid_value", "tool_choice", tool_choice="required"),
    "form that is none": chat("invalid_value", "response_format.type", response_format={"type": "xml"}),
    "schema that is text": schema("invalid_type", "x", "response_format.json_schema.schema"),
    "two forms": chat("invalid_value", "guided_choice", guided_regex="a", guided_choice=["a"]),
    "4,097 choices": chat("invalid_value", "guided_choice", guided_choice=[str(number) for number in range(4097)]),
    "prompt beyond the context": chat(
        "context_length_exceeded", "messages", messages=[{"role": "user", "content": "word " * 100_000}]
    ),
    "prompt of no token": post(COMPLETIONS, "invalid_value", "prompt[0]", model=MODEL, prompt=[-1]),
    "prompt of mixed kinds": post(COMPLETIONS, "invalid_type", "prompt[1]", model=MODEL, prompt=["a", 1]),
    "prompts times n": post(COMPLETIONS, "invalid_value", "prompt", model=MODEL, prompt=["a"] * 100, n=2),
    "best_of other than n": post(COMPLETIONS, "unsupported_parameter", "best_of", model=MODEL, prompt="x", best_of=5),
    "embeddings of nothing": post("/v1/embeddings", "invalid_value", "input", model="all-minilm-l6-v2", input=[]),
    "response that is stored": post(
        "/v1/responses", "unsupported_parameter", "store", model=MODEL, input="x", store=True
    ),
    "1,001 documents to rank": post(
        "/v1/rerank", "invalid_value", "documents", model="all-minilm-l6-v2", query="x", documents=["a"] * 1001
    ),
    "unknown field of /generate": post("/generate", "invalid_value", "chat_template", prompt="x", chat_template="y"),
    "filter that is code": post(
        "/v1/search", "invalid_value", 'filter.a" or 1 == 1', query="x", filter={'a" or 1 == 1': 1}
    ),
    "document with a control character": post("/v1/documents", "invalid_value", "title", text="x", title="a\x1b[2J"),
    "batch of an endpoint that is none": post(
        BATCHES, "invalid_value", "endpoint", input_file_id="x", endpoint="/admin/keys", completion_window="24h"
    ),
    "file without a purpose": form("missing_required_parameter", "purpose", FILE),
    "form without a file": form("missing_required_parameter", "file", PURPOSE),
    "field twice": form("invalid_value", "purpose", PURPOSE, PURPOSE, FILE),
    "two files": form("invalid_value", None, FILE, FILE),
    "10,000 fields": form("invalid_value", None, *(b'name="f%d"\r\n\r\nx' % number for number in range(10_000))),
    "form without a boundary": Bad(
        400, "invalid_value", path=FILES, body=b"x", headers={"content-type": "multipart/form-data"}
    ),
    "budget that is no money": budget("NaN"),
    "budget below zero": budget(-1),
    "scope that is none": post(KEYS, "invalid_value", "policy.scopes", key="admin", policy={"scopes": ["all"]}),
    "key with a field of its own making": post(KEYS, "invalid_value", "secret", key="admin", secret="x"),
}

LONG = "x" * 10_000
PATHS = {
    "traversal": get("/v1/files/..%2f..%2f..%2fetc%2fpasswd", code="unknown_url"),
    "traversal with dots encoded": get("/v1/files/%2e%2e%2f%2e%2e%2fadmin%2fkeys", code="unknown_url"),
    "traversal with back slashes": get("/v1/files/..%5c..%5cetc", code="file_not_found", param="file_id"),
    "traversal, encoded twice": get("/v1/files/%252e%252e%252f", code="file_not_found", param="file_id"),
    "NUL": get("/v1/files/%00", code="file_not_found", param="file_id"),
    "line break": get("/v1/files/a%0d%0aset-cookie:%20x", code="file_not_found", param="file_id"),
    "bytes that are no text in a path": get("/v1/files/%ff%fe", code="file_not_found", param="file_id"),
    "right-to-left mark": get("/v1/files/%e2%80%ae", code="file_not_found", param="file_id"),
    "10,000 characters": get("/v1/files/" + LONG, code="file_not_found", param="file_id"),
    "unknown route": get("/v1/nothing", code="unknown_url"),
    "double slash": get("/v1//models", code="unknown_url"),
    "slash at the end": get("/v1/chat/completions/", code="unknown_url"),
    "matrix parameter": get("/v1/models;x=1", code="unknown_url"),
    "method that is not there": Bad(405, "method_not_allowed", method="DELETE", path="/v1/models"),
    "page of -1": get(FILES + "?limit=-1", 400, "invalid_value", "limit"),
    "page of 10**30": get(FILES + "?limit=1" + "0" * 30, 400, "invalid_value", "limit"),
    "cursor of 10,000 characters": get(FILES + "?after=" + LONG, 400, "invalid_value", "after"),
    "day that is none": get("/v1/usage?from=2026-13-45", 400, "invalid_value", "from"),
    "group that is none": get("/v1/usage?group_by=tenant", 400, "invalid_value", "group_by"),
    "tenant with a slash": Bad(404, "unknown_url", method="PUT", path=TENANTS + "/a%2fb", body=b"{}", key="admin"),
    "tenant in capitals": Bad(
        400, "invalid_value", "tenant", method="PUT", path=TENANTS + "/Admin", body=b"{}", key="admin"
    ),
} | {
    f"model {name[:30]!r}": chat("model_not_found", "model", 404, model=name)
    for name in (
        "../../etc/passwd",
        MODEL + "\0",
        MODEL + "\r\nx: y",
        MODEL + " ",
        MODEL.upper(),
        "ѕ" + MODEL[1:],  # a Cyrillic letter
        MODEL + ":nobody-made-it",
        "*",
        "' OR 1=1 --",
        "\x1b[31m",
        '","level":"ERROR","message":"forged',
        "\n" + '{"level": "ERROR", "message": "forged"}',
    )
}
PATHS["model of 10,000 characters"] = chat("invalid_value", "model", model=LONG)
PATHS["model that is a list"] = chat("invalid_type", "model", model=[MODEL])

# Ids of another tenant's: the same answer as for ids of nobody's.
OTHERS = {
    f"another's, {method} {path}": Bad(404, code, param, method=method, path=path, key="beta")
    for method, path, code, param in (
        ("GET", "/v1/files/{file}", "file_not_found", "file_id"),
        ("GET", "/v1/files/{file}/content", "file_not_found", "file_id"),
        ("DELETE", "/v1/files/{file}", "file_not_found", "file_id"),
        ("GET", "/v1/jobs/{job}", "not_found", "job_id"),
        ("POST", "/v1/jobs/{job}/cancel", "not_found", "job_id"),
        ("GET", "/v1/batches/{batch}", "batch_not_found", "batch_id"),
        ("POST", "/v1/batches/{batch}/cancel", "batch_not_found", "batch_id"),
        ("GET", "/v1/jobs/{batch}", "not_found", "job_id"),
        ("GET", "/v1/fine_tuning/jobs/{batch}", "not_found", "fine_tuning_job_id"),
    )
} | {
    "batch of another's file": post(
        BATCHES,
        "file_not_found",
        "input_file_id",
        404,
        "beta",
        input_file_id="{file}",
        endpoint=CHAT,
        completion_window="24h",
    ),
    "finetune on another's file": post(
        "/v1/fine_tuning/jobs", "file_not_found", "training_file", 404, "beta", model=MODEL, training_file="{file}"
    ),
}

CASES: dict[str, Bad] = AUTHENTICATION | PARSING | PARAMETERS | PATHS | OTHERS


def filled(text: str, values: Mapping[str, str], *, in_url: bool = False) -> str:
    """The text with what stands in braces put in."""
    for name, value in values.items():
        text = text.replace("{" + name + "}", quote(value) if in_url else value)
    return text
