"""What `pressroom top` shows: the system between two looks, from the supervisor and from every service's /metrics.

A service that is away is shown as away, and figures that nobody gives are None: nothing is guessed.
"""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from devstack import control, cores
from devstack.home import Home
from devstack.scrapes import EMPTY, Change, Scrape, ScrapeFailed, fetch

_SCRAPE_TIMEOUT_S = 1.0
_GRPC_FAULTS = frozenset({"INTERNAL", "DATA_LOSS", "UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"})
ENGINE = "generator"


@dataclass(frozen=True, slots=True)
class Look:
    """The system at one moment: what the supervisor tells of each service, and what those say that answer."""

    at_s: float  # monotonic
    services: tuple[Mapping[str, Any], ...]
    scrapes: Mapping[str, Scrape]
    failures: Mapping[str, str]  # of those that should have answered


def look(home: Home) -> Look:
    """Looks once; blocks for two seconds at most where services hang. Raises NotRunning, ControlLost."""
    services = control.ask(home.run, "status")["services"]
    asked = {row["name"]: row["http_port"] for row in services if row.get("http_port") and row.get("pid")}
    asked.pop("nats", None)  # its /metrics are not ours
    scrapes: dict[str, Scrape] = {}
    failures: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=max(1, len(asked))) as pool:
        waiting = {name: pool.submit(fetch, port, _SCRAPE_TIMEOUT_S) for name, port in asked.items()}
        for name, answer in waiting.items():
            try:
                scrapes[name] = answer.result()
            except ScrapeFailed as failure:
                failures[name] = str(failure)
    return Look(time.monotonic(), tuple(services), scrapes, failures)


def watch(home: Home, before: Look, interval_s: float) -> tuple[dict[str, Any], Look]:
    """Waits for the interval; returns what happened in it, and the look at its end. Raises NotRunning, ControlLost."""
    used = cores.measure({row["pid"] for row in before.services if row.get("pid")}, interval_s)
    after = look(home)
    return compare(before, after, used), after


def compare(before: Look, after: Look, used: cores.Cores) -> dict[str, Any]:
    """Returns what happened between two looks, as data for programs."""
    interval_s = after.at_s - before.at_s
    changes = {
        name: Change(before.scrapes.get(name, EMPTY), scrape, interval_s) for name, scrape in after.scrapes.items()
    }
    rows = [_service(row, changes.get(row["name"]), after.failures, used) for row in after.services]
    engine = changes.get(ENGINE)
    models = [_model(name, changes[name], model) for name in ("gateway", ENGINE) for model in _models(changes, name)]
    return {
        "interval_s": round(interval_s, 3),
        "ready": all(row["state"] == "ready" for row in rows),
        "cores": {"num": used.num, "busy": round(used.busy, 2)},
        "services": rows,
        "engine": _engine(engine) if engine else None,
        "engine_detail": "" if engine else _why_absent(rows),
        "models": models,
    }


def _service(
    row: Mapping[str, Any], change: Change | None, failures: Mapping[str, str], used: cores.Cores
) -> dict[str, Any]:
    name = row["name"]
    use = used.by_group.get(row.get("pid") or 0, cores.CoreUse())
    memory = change.after.total("process_resident_memory_bytes") if change else None
    failure = f"no metrics: {failures[name]}" if name in failures else ""
    return {
        "name": name,
        "state": row["state"],
        "detail": row.get("detail") or failure,
        "restarts": row.get("restarts", 0),
        "cpu_cores": round(use.total, 2),
        "rss_bytes": None if memory is None else int(memory),
        "queue_depth": row.get("queue_depth"),
        "requests_per_s": _rounded(change.rate("pressroom_requests_total") if change else None),
        "faults_per_s": _rounded(_faults_per_s(change)) if change else None,
        "request_p95_s": _rounded(change.quantile(0.95, "pressroom_request_seconds") if change else None, 4),
    }


def _faults_per_s(change: Change) -> float | None:
    codes = change.after.values_of("pressroom_requests_total", "code")
    faults = [code for code in codes if code in _GRPC_FAULTS or code.startswith("5")]
    return sum((change.rate("pressroom_requests_total", code=code) or 0.0 for code in faults), 0.0)


def _engine(change: Change) -> dict[str, Any]:
    gauges = {
        "running": "pressroom_running_sequences",
        "waiting": "pressroom_waiting_sequences",
        "blocks_used": "pressroom_kv_blocks_used",
        "blocks_total": "pressroom_kv_blocks_capacity",
        "adapters_loaded": "pressroom_loaded_adapters",
        "adapters_known": "pressroom_known_adapters",
        "adapter_bytes": "pressroom_adapter_bytes",
    }
    found: dict[str, Any] = {key: _whole(change.after.total(name)) for key, name in gauges.items()}
    hits, asked = (change.increase(f"pressroom_prefix_{kind}_tokens_total") for kind in ("hit", "query"))
    accepted = change.increase("pressroom_draft_tokens_total", outcome="accepted")
    drafted = change.increase("pressroom_draft_tokens_total")
    return found | {
        "batch_mean": _rounded(change.mean("pressroom_batch_sequences"), 1),
        "steps_per_s": _rounded(change.rate("pressroom_batch_sequences_count")),
        "prompt_tokens_per_s": _rounded(change.rate("pressroom_engine_tokens_total", kind="prompt"), 1),
        "completion_tokens_per_s": _rounded(change.rate("pressroom_engine_tokens_total", kind="completion"), 1),
        "preemptions": _whole(change.increase("pressroom_preemptions_total")),
        "prefix_hit_share": _rounded(_share(hits, asked), 3),
        "draft_accepted_share": _rounded(_share(accepted, drafted), 3),
        "drafted_tokens": _whole(drafted),
        "step_s": {
            part: _rounded(change.mean("pressroom_step_seconds", part=part), 6)
            for part in ("schedule", "forward", "sample")
        },
        "grammars_compiled": _whole(change.increase("pressroom_grammar_compile_seconds_count")),
        "grammar_p95_s": _rounded(change.quantile(0.95, "pressroom_grammar_compile_seconds"), 4),
        "adapter_loads": _whole(change.increase("pressroom_adapter_loads_total", outcome="loaded")),
        "adapter_evictions": _whole(change.increase("pressroom_adapter_evictions_total")),
    }


def _models(changes: Mapping[str, Change], service: str) -> list[str]:
    """Models that a service has counted tokens of, since its start."""
    return sorted(changes[service].after.values_of("pressroom_tokens_total", "model")) if service in changes else []


def _model(service: str, change: Change, model: str) -> dict[str, Any]:
    found: dict[str, Any] = {"service": service, "model": model}
    for kind in ("prompt", "completion", "cached"):
        rate = change.rate("pressroom_tokens_total", model=model, kind=kind)
        found[f"{kind}_tokens_per_s"] = _rounded(rate, 1)
    for name in ("ttft", "tpot"):
        for q in (0.5, 0.95):
            value = change.quantile(q, f"pressroom_{name}_seconds", model=model)
            found[f"{name}_p{q * 100:.0f}_s"] = _rounded(value, 4)
    found["answers"] = _whole(change.increase("pressroom_ttft_seconds_count", model=model))
    return found


def _why_absent(rows: list[dict[str, Any]]) -> str:
    for row in rows:
        if row["name"] == ENGINE:
            return f"{ENGINE}: {row['state']}" + (f" ({row['detail']})" if row["detail"] else "")
    return f"{ENGINE}: not part of this system"


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _rounded(value: float | None, digits: int = 2) -> float | None:
    return None if value is None else round(value, digits)


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
