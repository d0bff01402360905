"""Draws what `pressroom top` found, for a terminal or as plain lines. Knows nothing of where it comes from."""

import json
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

_GOOD, _BAD, _DIM = "green", "bold red", "dim"
_PLAIN_WIDTH = 140


class Screen:
    """Where views go: over each other on a terminal, one below the other elsewhere, as JSON lines where asked for."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        is_terminal = sys.stdout.isatty()
        self._console = Console(width=None if is_terminal else _PLAIN_WIDTH, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False) if is_terminal and not as_json else None

    def __enter__(self) -> "Screen":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, view: dict[str, Any]) -> None:
        """Shows the newest view."""
        if self._as_json:
            print(json.dumps(view), flush=True)
        elif self._live is not None:
            self._live.update(render(view), refresh=True)
        else:
            self._console.print(render(view))


def render(view: dict[str, Any]) -> RenderableType:
    """Returns the whole screen."""
    return Group(_head(view), Text(), *_engine(view), Text(), _models(view), Text(), _services(view))


def _head(view: dict[str, Any]) -> Text:
    state = ("ready", _GOOD) if view["ready"] else ("not ready", _BAD)
    cores = view["cores"]
    return Text.assemble(
        ("Pressroom ", "bold"),
        state,
        f"   cores {cores['busy']:.2f} of {cores['num']} busy   last {view['interval_s']:.1f} s",
    )


def _engine(view: dict[str, Any]) -> list[RenderableType]:
    engine = view["engine"]
    if engine is None:
        return [Text(f"engine   {view['engine_detail']}", style=_BAD)]
    blocks = engine["blocks_used"], engine["blocks_total"]
    share = f" ({blocks[0] / blocks[1]:.0%})" if blocks[0] is not None and blocks[1] else ""
    step = engine["step_s"]
    lines = [
        (
            "sequences",
            f"{_num(engine['running'])} run, {_num(engine['waiting'])} wait, "
            f"batch {_num(engine['batch_mean'])}, {_num(engine['preemptions'])} set back",
        ),
        (
            "tokens/s",
            f"{_num(engine['prompt_tokens_per_s'])} in, {_num(engine['completion_tokens_per_s'])} out; "
            f"{_num(engine['steps_per_s'])} steps/s",
        ),
        (
            "step",
            f"schedule {_ms(step['schedule'])}, forward {_ms(step['forward'])}, sample {_ms(step['sample'])} (means)",
        ),
        (
            "memory",
            f"{_num(blocks[0])} of {_num(blocks[1])} blocks{share}; "
            f"prefix cache hits {_percent(engine['prefix_hit_share'])}",
        ),
        (
            "guesses",
            f"{_num(engine['drafted_tokens'])} tokens, {_percent(engine['draft_accepted_share'])} right; "
            f"{_num(engine['grammars_compiled'])} grammars, p95 {_ms(engine['grammar_p95_s'])}",
        ),
        (
            "adapters",
            f"{_num(engine['adapters_loaded'])} of {_num(engine['adapters_known'])} loaded, "
            f"{_megabytes(engine['adapter_bytes'])}; {_num(engine['adapter_loads'])} loads, "
            f"{_num(engine['adapter_evictions'])} evictions",
        ),
    ]
    return [Text.assemble((f"{name:<10}", "bold"), text) for name, text in lines]


def _models(view: dict[str, Any]) -> Table:
    table = _table("model", "at", "answers", "in/s", "out/s", "hit/s", "ttft", "p95", "tpot", "p95")
    for row in view["models"]:
        table.add_row(
            row["model"],
            row["service"],
            _num(row["answers"]),
            *(_num(row[f"{kind}_tokens_per_s"]) for kind in ("prompt", "completion", "cached")),
            *(_ms(row[f"{name}_{q}_s"]) for name in ("ttft", "tpot") for q in ("p50", "p95")),
        )
    return table


def _services(view: dict[str, Any]) -> Table:
    table = _table("service", "state", "cores", "memory", "queue", "req/s", "faults/s", "p95", "restarts")
    table.add_column("")
    for row in view["services"]:
        table.add_row(
            row["name"],
            Text(row["state"], style=_GOOD if row["state"] == "ready" else _BAD),
            f"{row['cpu_cores']:.2f}",
            _megabytes(row["rss_bytes"]),
            _num(row["queue_depth"]),
            _num(row["requests_per_s"]),
            _num(row["faults_per_s"]),
            _ms(row["request_p95_s"]),
            _num(row["restarts"]),
            Text(row["detail"], style=_DIM),
        )
    return table


def _table(first: str, second: str, *numbers: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    table.add_column(second, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _shown(write: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: "-" if value is None else write(value)


_num = _shown(lambda value: f"{value:.0f}" if value == int(value) or value >= 100 else f"{value:.1f}")
_percent = _shown(lambda value: f"{value:.0%}")
_megabytes = _shown(lambda value: f"{value / 1e6:.0f} MB")
_ms = _shown(lambda value: f"{value * 1000:.0f} ms" if value >= 0.01 else f"{value * 1000:.2f} ms")
