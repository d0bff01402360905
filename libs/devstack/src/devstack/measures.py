"""What a model costs before and after quantising, measured by the generator's own measure in processes beside."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_TIMEOUT_S = 900.0
# As the services run: threads that wait by spinning take the cores from each other.
_ENV = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


class MeasureFailed(Exception):
    """A measurement that did not come to an end; the message says why."""


def measure(folder: Path, engine: str, weights: str, text: Path | None = None) -> dict[str, Any]:
    """Returns tokens, perplexity, speeds, memory and load time of one form of a model. Blocks; raises MeasureFailed."""
    argv = ["-m", "generator.measure", "--model-dir", str(folder), "--engine", engine, "--weights", weights]
    argv += ["--text", str(text)] if text else []
    try:
        done = subprocess.run(
            [sys.executable, *argv], capture_output=True, text=True, timeout=_TIMEOUT_S, env=os.environ | _ENV
        )
    except subprocess.TimeoutExpired:
        raise MeasureFailed(f"{engine} {weights}: not done after {_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise MeasureFailed(f"{engine} {weights}: {last.removeprefix('error: ')}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Returns what a table of both shows: the quantity, before, after, and how the second stands to the first."""

    def row(title: str, key: str, scale: float, form: str) -> tuple[str, str, str, str]:
        first, second = before[key] / scale, after[key] / scale
        return title, format(first, form), format(second, form), f"{second / first:.3f}x" if first else "-"

    return [
        row("weights, MB", "size_bytes", 1e6, ".0f"),
        row("memory, MB", "rss_bytes", 1e6, ".0f"),
        row("start, s", "load_s", 1, ".2f"),
        row("prompt, tokens/s", "prefill_tokens_per_s", 1, ".0f"),
        row("one stream, tokens/s", "decode_tokens_per_s", 1, ".1f"),
        row("perplexity", "perplexity", 1, ".3f"),
    ]
