"""Locust's side of the load test: users, arrivals, steps, and where the figures go.

    locust -f loadtest/locustfile.py                        # Locust's page; /report there shows our report
    locust -f loadtest/locustfile.py --headless -u 4 -t 30s

`python -m loadtest` fills in the rest. It runs in one Locust process: arrivals are one schedule, and the rows one file.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import gevent.pool
from locust import LoadTestShape, User, events, task
from locust.exception import StopUser
from locust.runners import LocalRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Locust puts this file's own folder there

from loadtest import options, target
from loadtest.arrivals import Arrival, TraceError
from loadtest.load import Load
from loadtest.options import CHAT, GROUNDED, OptionError, Plan
from loadtest.player import Player

_PAUSE_AFTER_FAILURE_S = 1.0  # a user who is refused asks again, but not at the speed of refusals

LOAD: Load


class ChatUser(User):
    """Asks the plain model, again when the answer has come."""

    kind = CHAT

    def wait_time(self) -> float:
        """Seconds between an answer and the next question."""
        return float(LOAD.wanted.think_time)

    @task
    def ask(self) -> None:
        """One question."""
        if LOAD.ask(self.kind).outcome == "failed":
            gevent.sleep(_PAUSE_AFTER_FAILURE_S)


class GroundedUser(ChatUser):
    """Asks about the sample collection."""

    kind = GROUNDED


class _Greenlets:
    """The player's workers; its own group, so that a stop of the test can wait for them."""

    def __init__(self) -> None:
        self._group = gevent.pool.Group()

    def num_running(self) -> int:
        return len(self._group)

    def start(self, work: Callable[[], None]) -> None:
        self._group.start(gevent.Greenlet(work))

    def kill(self) -> None:
        self._group.kill()


class Arrivals(User):
    """The one user of an open loop: it starts requests when they are due and waits for none of them."""

    fixed_count = 1

    @task
    def play(self) -> None:
        """The whole test, step by step."""
        wanted, recording = LOAD.wanted, LOAD.recording()
        plan, greenlets = Plan(wanted, wanted.run_time), _Greenlets()
        if wanted.arrivals == "trace":
            recording.note("trace", f"{plan.num_in_trace} arrivals, {plan.num_clipped} of them shortened")
        LOAD.player = player = Player(
            greenlets,
            request=self._send,
            overflow=lambda arrival, due_s: LOAD.overflow(self._kind(due_s), due_s),
            clock=recording.now_s,
            sleep=gevent.sleep,
            max_in_flight=wanted.max_in_flight,
        )
        try:
            for step in plan.steps():
                if player.is_stopped:
                    break
                recording.enter(step.offered)
                start_s = recording.now_s()
                player.play(step.arrivals, start_s, start_s + step.length_s)
                recording.leave()
                player.drain(wanted.request_timeout)
        finally:
            greenlets.kill()
        if not player.is_stopped:  # at its own end; from a greenlet of its own, since it stops this user too
            runner = self.environment.runner
            gevent.spawn(runner.quit if wanted.headless else runner.stop)
        raise StopUser

    def _send(self, arrival: Arrival, due_s: float) -> None:
        LOAD.ask(self._kind(due_s), due_s=due_s, length=arrival)

    def _kind(self, due_s: float) -> str:
        return LOAD.kind_of(round(due_s * 1000))


class Steps(LoadTestShape):
    """--steps for users: each number for --step-time."""

    abstract = True  # Locust would take it for every test; _init chooses

    def __init__(self, loads: list[int], step_time_s: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._loads, self._step_time_s = loads, step_time_s
        self._entered = 0

    def reset_time(self) -> None:
        """A test begins."""
        super().reset_time()  # type: ignore[no-untyped-call]
        self._entered = 0

    def tick(self) -> tuple[int, float] | None:
        """Locust asks once a second how many users there should be; None ends the test."""
        number = int(self.get_run_time() // self._step_time_s)  # type: ignore[no-untyped-call]
        if number >= len(self._loads):
            return None
        if number + 1 > self._entered:
            self._entered = number + 1
            LOAD.recording().enter(self._loads[number])
        return self._loads[number], min(100.0, float(self._loads[number]))


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _parser(parser: Any, **_: object) -> None:
    options.add(parser)


@events.init.add_listener  # type: ignore[untyped-decorator]
def _init(environment: Any, runner: Any, web_ui: Any, **_: object) -> None:
    global LOAD
    wanted = environment.parsed_options
    try:
        if not isinstance(runner, LocalRunner):
            raise OptionError("it runs in one process: no --master, --worker or --processes")
        options.check(wanted)
        if wanted.arrivals != "users":
            Plan(wanted, wanted.run_time)  # a trace that cannot be read is told before the test
        where = target.find()
    except (OptionError, target.TargetError, TraceError) as error:
        print(f"loadtest: {error}", file=sys.stderr)
        sys.exit(2)
    LOAD = Load(environment, where)
    environment.host = where.base_url
    environment.user_classes[:] = _user_classes(wanted)
    if wanted.arrivals == "users" and wanted.steps:
        environment.shape_class = Steps([int(load) for load in options.steps(wanted)], wanted.step_time)
        environment.shape_class.runner = runner
    environment.events.test_start.add_listener(LOAD.begin)
    environment.events.spawning_complete.add_listener(LOAD.users_are)
    environment.events.test_stopping.add_listener(LOAD.stopping)
    environment.events.test_stop.add_listener(LOAD.end)
    if web_ui is not None:
        web_ui.app.add_url_rule("/report", "report", _report_page)
    # gevent's loop counts from its last turn, before all the importing: --run-time would come early by as much.
    gevent.get_hub().loop.update_now()


def _user_classes(wanted: Namespace) -> list[type[User]]:
    if wanted.arrivals != "users":
        return [Arrivals]
    by_traffic: dict[str, list[type[User]]] = {CHAT: [ChatUser], GROUNDED: [GroundedUser]}
    return by_traffic.get(wanted.traffic, [ChatUser, GroundedUser])


def _report_page() -> Any:
    path = LOAD.report_path
    return (
        path.read_text(encoding="utf-8") if path else ("There is no report yet: it is written when a test ends.", 404)
    )
