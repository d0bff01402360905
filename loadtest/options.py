"""The options that the load test adds to Locust's own, and what they mean together. Knows argparse, but not Locust."""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest import arrivals
from loadtest.arrivals import Arrival
from loadtest.summary import Slo

CHAT, GROUNDED = "chat", "grounded"
UNITS = {"users": "users", "poisson": "requests/s", "trace": "times the trace's speed"}


class OptionError(Exception):
    """Options that do not go together; the message says which."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of load. arrivals: of an open loop, counted from the step's beginning."""

    offered: float
    length_s: float
    arrivals: tuple[Arrival, ...] = ()


def add(parser: Any) -> None:
    """Adds the options to an argparse parser."""
    group = parser.add_argument_group("Pressroom")
    group.add_argument("--traffic", choices=[CHAT, GROUNDED, "mixed"], default=CHAT, help="what is asked")
    group.add_argument(
        "--arrivals",
        choices=list(UNITS),
        default="users",
        help="users: closed loop, each sends when its answer has come; poisson and trace: open loop, on time",
    )
    group.add_argument("--steps", default="", help="loads to offer one after the other, rising: 1,2,4 (users, "
                       "requests per second, or speeds of the trace)")  # fmt: skip
    group.add_argument("--step-time", type=float, default=20.0, help="seconds of one step")
    group.add_argument("--trace", default="", help="JSON lines with timestamp (ms), input_length, output_length")
    group.add_argument("--speed", type=float, default=1.0, help="plays the trace so many times as fast")
    group.add_argument("--rate", type=float, default=1.0, help="poisson: requests per second")
    group.add_argument("--prompt-tokens", type=int, default=95, help="length of a chat's prompt, template included")
    group.add_argument("--max-tokens", type=int, default=64, help="length of an answer")
    group.add_argument(
        "--answer-length",
        choices=["exact", "natural"],
        default="exact",
        help="exact: ignore_eos, so that answers are as long as wanted; natural: as the model ends them",
    )
    group.add_argument("--max-prompt", type=int, default=1024, help="longer prompts of a trace are shortened")
    group.add_argument("--max-answer", type=int, default=256, help="longer answers of a trace are shortened")
    group.add_argument(
        "--max-in-flight", type=int, default=256, help="open loop: arrivals beyond are not sent but failed"
    )
    group.add_argument("--request-timeout", type=float, default=120.0, help="seconds until an answer must have ended")
    group.add_argument("--think-time", type=float, default=0.0, help="seconds that a user waits between questions")
    group.add_argument("--slo-ttft", type=float, default=2.0, help="objective for the first token, in seconds")
    group.add_argument("--slo-tpot", type=float, default=0.25, help="objective for each token after it, in seconds")
    group.add_argument("--seed", type=int, default=1, help="of prompts and of poisson arrivals")
    group.add_argument("--chat-model", default="smollm2-135m-instruct", help="the model of plain chat")
    group.add_argument("--grounded-model", default="rag", help="the model that answers from documents")
    group.add_argument("--out", default="", help="folder of requests.csv and report.html; a new one by default")


def check(options: argparse.Namespace) -> None:
    """Raises OptionError for what cannot be meant."""
    if (options.arrivals == "trace") != bool(options.trace):
        raise OptionError("--trace FILE and --arrivals trace go together")
    positive = ("step_time", "speed", "rate", "prompt_tokens", "max_tokens", "max_in_flight", "request_timeout")
    for name in positive:
        if getattr(options, name) <= 0:
            raise OptionError(f"--{name.replace('_', '-')} must be above 0")
    steps(options)


def steps(options: argparse.Namespace) -> list[float]:
    """The loads of --steps; empty where there are none."""
    if not options.steps:
        return []
    try:
        loads = [float(text) for text in options.steps.split(",")]
    except ValueError:
        raise OptionError(f"--steps {options.steps}: numbers with commas between them") from None
    if loads[0] <= 0 or any(b <= a for a, b in itertools.pairwise(loads)):
        raise OptionError(f"--steps {options.steps}: must rise, and begin above 0")
    if options.arrivals == "users" and any(load != int(load) for load in loads):
        raise OptionError(f"--steps {options.steps}: users come in whole numbers")
    return loads


def slo(options: argparse.Namespace) -> Slo:
    """The objectives."""
    return Slo(options.slo_ttft, options.slo_tpot)


class Plan:
    """The steps of an open loop. duration_s: of a test without --steps; None plays the whole trace, or 60 s."""

    def __init__(self, options: argparse.Namespace, duration_s: float | None) -> None:
        self._options, self._duration_s = options, duration_s
        self._trace: list[Arrival] = []
        self.num_clipped = 0
        if options.arrivals == "trace":
            trace = arrivals.read_trace(Path(options.trace))
            self._trace, self.num_clipped = arrivals.clip(trace, options.max_prompt, options.max_answer)
        self.num_in_trace = len(self._trace)

    def steps(self) -> Iterator[Step]:
        """Each step with its arrivals."""
        loads = steps(self._options)
        if not loads:
            yield self._step(self._single_load(), self._single_length_s(), 0)
        for number, load in enumerate(loads):
            yield self._step(load, self._options.step_time, number)

    def _step(self, load: float, length_s: float, number: int) -> Step:
        options = self._options
        if options.arrivals == "trace":
            due = arrivals.until(arrivals.faster(self._trace, load), length_s)
        else:
            seed = options.seed + number
            due = arrivals.poisson(load, length_s, options.prompt_tokens, options.max_tokens, seed)
        return Step(load, length_s, tuple(due))

    def _single_load(self) -> float:
        load: float = self._options.speed if self._options.arrivals == "trace" else self._options.rate
        return load

    def _single_length_s(self) -> float:
        if self._duration_s:
            return self._duration_s
        return self._trace[-1].at_s / self._options.speed + 1.0 if self._trace else 60.0


def conditions(options: argparse.Namespace, base_url: str) -> dict[str, str]:
    """The options in words, for the report."""
    is_trace = options.arrivals == "trace"
    said = {
        "system": base_url,
        "traffic": f"{options.traffic}, model {_models(options)}",
        "arrivals": f"{options.arrivals}{f' {Path(options.trace).name}' if is_trace else ''}, seed {options.seed}",
        "lengths": f"from the trace, cut at {options.max_prompt} and {options.max_answer} tokens"
        if is_trace
        else f"prompt {options.prompt_tokens} tokens (chat), answer {options.max_tokens} tokens",
        "answer length": f"{options.answer_length}, temperature 0",
        "request timeout": f"{options.request_timeout:g} s",
    }
    if options.arrivals == "users":
        said["think time"] = f"{options.think_time:g} s"
    else:
        said["most in flight"] = f"{options.max_in_flight}"
    return said


def _models(options: argparse.Namespace) -> str:
    models = {CHAT: options.chat_model, GROUNDED: options.grounded_model}
    return models.get(options.traffic) or f"{options.chat_model} and {options.grounded_model}, half each"
