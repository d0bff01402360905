"""A table of bad requests against the gateway and its generator as real processes; then what they left behind.

How broken HTTP itself is met is in chat/test_gateway_hostile_http.py.
"""

import asyncio
import contextlib
import json
import re
import socket
import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from testkit import eventually

from .conftest import ADMIN_KEY, MODEL, Pair
from .hostile_cases import CASES, CHAT, HELLO, MARK, OTHERS, Bad, filled

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

ENVELOPE = {"message", "type", "param", "code"}
INFERENCE = re.compile(r"/v1/(chat/completions|completions|embeddings|rerank|responses)|/generate")
LINE = {"custom_id": "1", "method": "POST", "url": CHAT, "body": {"model": MODEL, "max_tokens": 2}}


async def make_key(pair: Pair, tenant: str, **fields: Any) -> str:
    async with pair.client(ADMIN_KEY) as client:
        answer = await client.post("/admin/keys", json={"tenant": tenant} | fields)
        assert answer.status_code == 200, answer.text
        key: str = answer.json()["key"]
        return key


async def world_of(pair: Pair) -> dict[str, str]:
    """Two tenants, the first one's things, and what is known of its key from the inside."""
    alpha, beta = await make_key(pair, "alpha"), await make_key(pair, "beta")
    scoped = await make_key(pair, "alpha", policy={"scopes": ["inference"], "models": ["nothing-*"]})
    revoked = await make_key(pair, "alpha")
    async with pair.client(ADMIN_KEY) as client:
        await client.delete(f"/admin/keys/{revoked.split('-')[1]}")
    async with pair.client(alpha) as client:
        lines = json.dumps(LINE | {"body": LINE["body"] | {"messages": HELLO}})  # type: ignore[operator]
        form = {"files": {"file": ("a.jsonl", lines.encode())}, "data": {"purpose": "batch"}}
        file_id = (await client.post("/v1/files", **form)).json()["id"]  # type: ignore[arg-type]
        order = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
        batch_id = (await client.post("/v1/batches", json=order)).json()["id"]
        document = (await client.post("/v1/documents", json={"text": "of alpha's"})).json()
    key_id = alpha.split("-")[1]
    with contextlib.closing(sqlite3.connect(pair.database)) as database:
        [digest] = database.execute("SELECT secret_hmac FROM keys WHERE key_id = ?", (key_id,)).fetchone()
    return {
        "alpha": alpha,
        "beta": beta,
        "admin": ADMIN_KEY,
        "scoped": scoped,
        "revoked": revoked,
        "alpha_cut": alpha[:-1],
        "alpha_capitals": alpha.upper(),
        "alpha_id": f"sk-{key_id}",
        "alpha_hash": f"sk-{key_id}-{digest.hex()}",
        "alpha_bare_hash": digest.hex(),
        "alpha_with_betas_id": alpha.replace(key_id, beta.split("-")[1]),
        "file": file_id,
        "batch": batch_id,
        "document": document["document_id"],
        "job": document["job_id"],
    }


async def ask(client: httpx.AsyncClient, bad: Bad, world: dict[str, str]) -> httpx.Response:
    headers = {n: filled(v, world) if isinstance(v, str) else v for n, v in bad.headers.items()}
    if bad.key is not None:
        headers["authorization"] = f"Bearer {world[bad.key]}"
    body = bad.body
    if b"{file}" in body:
        body = filled(body.decode(), world).encode()
    return await client.request(bad.method, filled(bad.path, world, in_url=True), content=body, headers=headers)  # type: ignore[arg-type]


def faults_of(answer: httpx.Response, bad: Bad, secrets: list[str], took_s: float) -> list[str]:
    """What is wrong with an answer."""
    faults = [] if took_s < 10 else [f"took {took_s:.0f} s"]
    if not (answer.headers.get("x-request-id") and answer.headers.get("x-trace-id")):
        faults.append("no ids")
    faults += ["tells a key" for secret in secrets if secret in answer.text]
    try:
        error = answer.json()["error"]
        told = (answer.status_code, error["code"], error["param"])
        if set(error) != ENVELOPE:
            faults.append(f"envelope {set(error)}")
    except (ValueError, KeyError, TypeError):
        return [*faults, f"{answer.status_code} is not in the envelope: {answer.text[:300]}"]
    if told != (bad.status, bad.code, bad.param):
        faults.append(f"{told}: {error['message'][:300]}")
    return faults


def secret_of(key: str) -> str:
    return key.split("-", 2)[2]


def open_records(pair: Pair) -> int:
    with contextlib.closing(sqlite3.connect(pair.database)) as database:
        [count] = database.execute("SELECT count(*) FROM open_usage").fetchone()
    assert isinstance(count, int)
    return count


async def is_at_rest(pair: Pair) -> bool:
    """Nothing runs or waits, no start record is open, no connection is left, and the ledger is the generator's."""
    running = pair.generator.metric("pressroom_running_sequences") + pair.generator.metric("pressroom_waiting_requests")
    if running or open_records(pair) or not await pair.agree():
        return False
    at_port = [
        c for c in psutil.Process(pair.gateway.pid).net_connections("tcp") if c.laddr.port == pair.gateway.http_port
    ]
    return not [c for c in at_port if c.status == psutil.CONN_ESTABLISHED]


async def test_every_bad_request_is_refused_as_the_table_says_and_leaves_nothing(pair: Pair) -> None:
    assert len(CASES) >= 150
    world = await world_of(pair)
    keys = [world[name] for name in ("alpha", "beta", "admin", "scoped", "revoked")]
    secrets = [secret_of(key) for key in keys] + [world["alpha_bare_hash"]]
    async with pair.client(world["alpha"]) as client:
        await eventually(lambda: _ended(client, world["batch"]), timeout_s=30)
    await eventually(lambda: is_at_rest(pair), timeout_s=30)
    before, rows_before = await pair.usage(), len(await pair.rows())
    process = psutil.Process(pair.gateway.pid)
    fds, memory = process.num_fds(), process.memory_info().rss

    wrong: dict[str, list[str]] = {}
    due: Counter[str] = Counter()
    async with httpx.AsyncClient(base_url=pair.base_url, trust_env=False, timeout=30) as client:
        for name, bad in CASES.items():
            started_s = time.monotonic()
            answer = await ask(client, bad, world)
            if faults := faults_of(answer, bad, secrets, time.monotonic() - started_s):
                wrong[name] = faults
            if INFERENCE.fullmatch(bad.path) and bad.status not in (401, 431):
                due[str(bad.status)] += 1
    assert not wrong, "\n".join(f"{name}: {faults}" for name, faults in wrong.items())

    # Nothing was used by anybody, and each request to a model is accounted with its status: no more and no less.
    await eventually(lambda: is_at_rest(pair), timeout_s=30)
    after = await pair.usage()
    assert [after[kind] - before[kind] for kind in ("prompt_tokens", "completion_tokens")] == [0, 0]
    rows = (await pair.rows())[rows_before:]
    assert Counter(row["http_status"] for row in rows) == due
    assert process.num_fds() <= fds + 8 and process.memory_info().rss < memory + 100 * 2**20
    assert not pair.gateway.log_lines("request failed unexpectedly")
    async with pair.client(world["alpha"]) as client:
        body = {"model": MODEL, "messages": HELLO, "max_tokens": 3}
        assert (await client.post(CHAT, json=body)).status_code == 200
        assert (await client.get(f"/v1/files/{world['file']}")).status_code == 200  # nobody took it away
    await eventually(lambda: is_at_rest(pair), timeout_s=30)
    _check_nothing_is_told(pair, secrets)


async def _ended(client: httpx.AsyncClient, batch_id: str) -> bool:
    return bool((await client.get(f"/v1/batches/{batch_id}")).json()["status"] == "completed")


def _check_nothing_is_told(pair: Pair, secrets: list[str]) -> None:
    """No log, span, metric, table, message or counter holds a key or a prompt, and no line of a log was forged."""
    kept = [pair.gateway.data_dir, pair.generator.data_dir, pair.nats.data_dir, pair.valkey.data_dir]
    _save_counters(pair)
    texts = {str(path): path.read_bytes() for folder in kept for path in folder.rglob("*") if path.is_file()}
    texts |= {path.name: path.read_bytes() for path in pair.database.parent.glob("gateway.db*")}
    texts |= {one.name: one.get("/metrics")[1].encode() for one in (pair.gateway, pair.generator)}
    assert any(b"chatcmpl" in text or b"request finished" in text for text in texts.values())  # the right files
    looked_for = [*secrets[:-1], MARK]  # a key's hash is in the table of keys
    assert [(name, word) for name, text in texts.items() for word in looked_for if word.encode() in text] == []
    for process in (pair.gateway, pair.generator):
        lines = [json.loads(line) for line in process.log.splitlines()]
        assert not [line for line in lines if line["message"] == "forged"]
        assert "\x1b" not in process.log


def _save_counters(pair: Pair) -> None:
    """Has Valkey write what it holds into its folder, as it is."""
    with socket.create_connection(("127.0.0.1", pair.valkey.port), timeout=10) as connection:
        for command in (f"AUTH {pair.valkey.token}", "CONFIG SET rdbcompression no", "SAVE"):
            connection.sendall(command.encode() + b"\r\n")
            assert connection.recv(1024) == b"+OK\r\n"
    assert (Path(pair.valkey.data_dir) / "dump.rdb").exists()


async def test_what_is_anothers_is_answered_as_what_is_nobodys(pair: Pair) -> None:
    world = await world_of(pair)
    nobodys = world | {name: world[name][:-6] + "ffffff" for name in ("file", "batch", "document", "job")}
    async with httpx.AsyncClient(base_url=pair.base_url, trust_env=False, timeout=30) as client:
        for name, bad in OTHERS.items():
            anothers, none = await ask(client, bad, world), await ask(client, bad, nobodys)
            told = [answer.text for answer in (anothers, none)]
            for known in (world, nobodys):
                for kind in ("file", "batch", "document", "job"):
                    told = [text.replace(known[kind], "ID") for text in told]
            assert told[0] == told[1], name
        for path in ("/v1/files", "/v1/documents", "/v1/jobs", "/v1/batches", "/v1/fine_tuning/jobs", "/v1/usage"):
            headers = {"authorization": f"Bearer {world['beta']}"}
            assert (await client.get(path, headers=headers)).json()["data"] == [], path
            if path != "/v1/usage":
                for kind in ("file", "batch", "document", "job"):
                    page = await client.get(path, headers=headers, params={"after": world[kind]})
                    assert page.json()["data"] == [], (path, kind)
        ids = set()
        for key in ("alpha", "beta"):
            headers = {"authorization": f"Bearer {world[key]}", "idempotency-key": "the same"}
            body = {"model": MODEL, "messages": HELLO, "max_tokens": 2, "temperature": 0}
            ids.add((await client.post(CHAT, json=body, headers=headers)).json()["id"])
        assert len(ids) == 2


TOKENS = 100
RACES = {
    "last cent of a budget": ({"budget": {"amount": TOKENS / 1000}}, "insufficient_quota"),
    "last token of a limit": (
        {"limits": [{"counted": "tokens", "amount": TOKENS, "window_s": 3600}]},
        "rate_limit_exceeded",
    ),
}


@pytest.mark.parametrize("race", RACES)
async def test_fifty_at_once_do_not_overdraw(pair: Pair, race: str) -> None:
    policy, code = RACES[race]
    async with pair.client(ADMIN_KEY) as client:
        price = {"model": MODEL, "input_micros": 1_000_000_000, "output_micros": 1_000_000_000}  # a token: 0.001
        assert (await client.put("/admin/prices", json=price)).status_code == 200
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 8}
    async with pair.client(await make_key(pair, "alpha", policy=policy)) as client:
        answers = await asyncio.gather(*(client.post(CHAT, json=body) for _ in range(50)))
    told = Counter(answer.status_code for answer in answers)
    assert set(told) == {200, 429} and told[200] >= 1, told
    assert {answer.json()["error"]["code"] for answer in answers if answer.status_code == 429} == {code}
    await eventually(lambda: is_at_rest(pair), timeout_s=30)
    usage = await pair.usage()
    assert 0 < usage["prompt_tokens"] + usage["completion_tokens"] <= TOKENS
