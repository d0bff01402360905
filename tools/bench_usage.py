"""How long reports of usage take over a ledger of a million requests: `make bench-usage`.

Builds the ledger in a temporary folder, with the sums that the gateway keeps beside its rows, and asks the gateway's
own routes in this process, one request at a time. Prints p50 and p95 in milliseconds.
"""

import argparse
import asyncio
import random
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from fastapi import FastAPI

from gateway.api.http_usage import usage_router
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_prices import SqlitePrices
from gateway.backends.sqlite_schema import MIGRATIONS
from gateway.backends.sqlite_usage import SqliteUsage
from gateway.core.ports import Principal

FIRST_MS = 1_767_225_600_000  # 2026-01-01
MS_PER_DAY = 86_400_000
MODELS = ("smollm2-135m-instruct", "rag", "all-minilm-l6-v2", "smollm2-135m-instruct:support")
ASKED = (
    ("everything, by tenant, key and model", "/admin/usage"),
    ("by day", "/admin/usage?group_by=day"),
    ("by model", "/admin/usage?group_by=model"),
    ("by tenant, a month", "/admin/usage?group_by=tenant&from=2026-02-01&to=2026-02-28"),
    ("by key, a month", "/admin/usage?group_by=key&from=2026-02-01&to=2026-02-28"),
    ("by day and model, one tenant", "/admin/usage?group_by=day,model&tenant=tenant-7"),
    ("by day, one key", "/admin/usage?group_by=day&key=key-42"),
    ("a key's own, by model", "/v1/usage"),
    ("a key's own, by day", "/v1/usage?group_by=day"),
)
_INSERT = """
    INSERT INTO usage (request_id, trace_id, tenant, key_id, model, route, prompt_tokens, completion_tokens,
        cached_tokens, finish_reason, http_status, stream, started_unix_ms, duration_s, ttft_s, error_code, usage_id,
        cost_micros)
    VALUES (?, ?, ?, ?, ?, '/v1/chat/completions', ?, ?, ?, ?, ?, 1, ?, 1.25, 0.1, ?, ?, ?)
"""
_SUMS = (
    """
    INSERT INTO usage_days SELECT started_unix_ms / 86400000, tenant, key_id, model, count(*), sum(error_code <> ''),
        sum(prompt_tokens), sum(completion_tokens), sum(cached_tokens), sum(cost_micros)
    FROM usage GROUP BY 1, 2, 3, 4
    """,
    """
    INSERT INTO usage_totals (tenant, key_id, model, num_requests, num_errors, prompt_tokens, completion_tokens,
        cached_tokens, cost_micros)
    SELECT tenant, key_id, model, sum(num_requests), sum(num_errors), sum(prompt_tokens), sum(completion_tokens),
        sum(cached_tokens), sum(cost_micros)
    FROM usage_days GROUP BY 1, 2, 3
    """,
)


def rows(num_rows: int, num_days: int, num_keys: int) -> Iterator[tuple[object, ...]]:
    """Requests spread over days and keys, in the order in which they came."""
    dice = random.Random(5)
    for number in range(num_rows):
        key = dice.randrange(num_keys)
        failed = dice.random() < 0.02
        prompt, completion = dice.randrange(2000), dice.randrange(500)
        yield (
            f"req_{number:032x}",
            f"{number:032x}",
            f"tenant-{key % (num_keys // 4)}",
            f"key-{key}",
            dice.choice(MODELS),
            prompt,
            completion,
            dice.randrange(prompt + 1),
            "error" if failed else "stop",
            503 if failed else 200,
            FIRST_MS + number * num_days * MS_PER_DAY // num_rows,
            "overloaded" if failed else "",
            f"{number:032x}",
            prompt + 4 * completion,
        )


async def build(path: Path, options: argparse.Namespace) -> None:
    """Writes the rows and their sums."""
    database = await Database.open(path, MIGRATIONS)
    await database.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA synchronous = OFF")
    with connection:
        connection.executemany(_INSERT, rows(options.rows, options.days, options.keys))
        for statement in _SUMS:
            connection.execute(statement)
    connection.close()


class Identified:
    """Stands for the gateway's authentication: everybody is the admin with key 42."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        scope.setdefault("state", {})["principal"] = Principal("key-42", "tenant-42", is_admin=True)
        await self._app(scope, receive, send)


async def measure(path: Path, options: argparse.Namespace) -> None:
    """Asks each report some times."""
    database = await Database.open(path, MIGRATIONS)
    app = FastAPI()
    app.include_router(usage_router(SqliteUsage(database), SqlitePrices(database)))
    transport = httpx.ASGITransport(app=Identified(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", trust_env=False) as client:
        print(f"{'report':<40} {'sums':>6} {'p50 ms':>8} {'p95 ms':>8}")
        for name, url in ASKED:
            took_ms = []
            for _ in range(options.repeats):
                started_s = time.perf_counter()
                answer = await client.get(url)
                took_ms.append((time.perf_counter() - started_s) * 1000)
                assert answer.status_code == 200 and answer.json()["data"], (url, answer.text[:200])
            took_ms.sort()
            num_sums, p95 = len(answer.json()["data"]), took_ms[int(len(took_ms) * 0.95)]
            print(f"{name:<40} {num_sums:>6} {took_ms[len(took_ms) // 2]:>8.1f} {p95:>8.1f}")
        started_s = time.perf_counter()
        lines = 0
        async with client.stream("GET", "/admin/usage/rows") as answer:
            async for piece in answer.aiter_bytes():
                lines += piece.count(b"\r\n")
        took_s = time.perf_counter() - started_s
        print(f"CSV of all rows: {lines} lines in {took_s:.1f} s, {lines / took_s:.0f} lines/s")
    await database.close()


async def main() -> None:
    """Builds and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--days", type=int, default=90)
    parser.add_argument("--keys", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-usage-") as folder:
        path = Path(folder) / "gateway.db"
        started_s = time.perf_counter()
        await build(path, options)
        print(
            f"{options.rows} requests of {options.keys} keys on {options.days} days: {path.stat().st_size >> 20} MiB, "
            f"built in {time.perf_counter() - started_s:.0f} s"
        )
        await measure(path, options)


if __name__ == "__main__":
    asyncio.run(main())
