"""When requests arrive and how long they are: from a trace file, or drawn from a seed. Open loop: set beforehand."""

import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


class TraceError(Exception):
    """A trace file that cannot be played; the message names the line."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """at_s counts from the beginning; lengths are in tokens."""

    at_s: float
    prompt_tokens: int
    completion_tokens: int


def read_trace(path: Path) -> list[Arrival]:
    """Reads JSON lines {"timestamp": milliseconds, "input_length": tokens, "output_length": tokens}, sorted by time.

    The first arrival becomes second 0. Raises TraceError for a bad line and for an empty file.
    """
    found: list[Arrival] = []
    try:
        with path.open(encoding="utf-8") as file:
            found = [_arrival(line, f"{path}:{number}") for number, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from error
    if not found:
        raise TraceError(f"{path}: no arrivals")
    found.sort(key=lambda arrival: arrival.at_s)
    start_s = found[0].at_s
    return [Arrival(a.at_s - start_s, a.prompt_tokens, a.completion_tokens) for a in found]


def _arrival(line: str, where: str) -> Arrival:
    try:
        entry = json.loads(line)
        arrival = Arrival(float(entry["timestamp"]) / 1000, int(entry["input_length"]), int(entry["output_length"]))
    except (ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{where}: needs the numbers timestamp, input_length and output_length ({error!r})") from error
    if not math.isfinite(arrival.at_s) or arrival.prompt_tokens < 0 or arrival.completion_tokens < 0:
        raise TraceError(f"{where}: a number out of range")
    return arrival


def faster(arrivals: Iterable[Arrival], speed: float) -> Iterator[Arrival]:
    """Plays a trace so many times as fast: the times divided, the lengths as they are."""
    return (Arrival(a.at_s / speed, a.prompt_tokens, a.completion_tokens) for a in arrivals)


def until(arrivals: Iterable[Arrival], end_s: float) -> list[Arrival]:
    """The arrivals before a time."""
    return [arrival for arrival in arrivals if arrival.at_s < end_s]


def clip(arrivals: Iterable[Arrival], max_prompt: int, max_completion: int) -> tuple[list[Arrival], int]:
    """Shortens what is longer than the served model takes; returns how many had to be."""
    before = list(arrivals)
    after = [
        Arrival(a.at_s, max(1, min(a.prompt_tokens, max_prompt)), max(1, min(a.completion_tokens, max_completion)))
        for a in before
    ]
    return after, sum(a != b for a, b in zip(before, after, strict=True))


def poisson(
    rate_per_s: float, duration_s: float, prompt_tokens: int, completion_tokens: int, seed: int
) -> list[Arrival]:
    """Independent arrivals: exponential gaps of a stated seed, lengths as given."""
    rng, at_s, found = random.Random(seed), 0.0, []
    while (at_s := at_s + rng.expovariate(rate_per_s)) < duration_s:
        found.append(Arrival(at_s, prompt_tokens, completion_tokens))
    return found


def bursty(rate_per_s: float, duration_s: float, seed: int) -> list[Arrival]:
    """Arrivals as people make them: gamma gaps with a coefficient of variation of 2, log-normal lengths."""
    rng, at_s, found = random.Random(seed), 0.0, []
    shape = 0.25  # of the gaps: 1 / 2**2
    while (at_s := at_s + rng.gammavariate(shape, 1 / (rate_per_s * shape))) < duration_s:
        prompt = min(768, max(8, round(rng.lognormvariate(math.log(90), 0.8))))
        completion = min(192, max(4, round(rng.lognormvariate(math.log(40), 0.7))))
        found.append(Arrival(at_s, prompt, completion))
    return found


def write_trace(arrivals: Iterable[Arrival], path: Path) -> None:
    """Writes what read_trace() reads."""
    with path.open("w", encoding="utf-8") as file:
        for a in arrivals:
            line = {
                "timestamp": round(a.at_s * 1000),
                "input_length": a.prompt_tokens,
                "output_length": a.completion_tokens,
            }
            file.write(json.dumps(line) + "\n")
