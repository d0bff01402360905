"""Toy services for the tests of the supervisor: real child processes, ready at once, no ports."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from devstack.backoff import Backoff
from devstack.home import Home
from devstack.probes import Reading
from devstack.specs import Spec, Tier
from testkit import eventually


class FileProbe:
    """Ready while a file exists."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def check(self) -> Reading:
        return Reading(self.path.exists(), "no file yet")


class AlwaysReady:
    async def check(self) -> Reading:
        return Reading(True, queue_depth=3)


SLEEPER = "import time\nprint('hello', flush=True)\ntime.sleep(60)"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    made.create()
    return made


@pytest.fixture
def toy(home: Home) -> Callable[..., Spec]:
    def make(name: str = "toy", code: str = SLEEPER, **fields: object) -> Spec:
        defaults: dict[str, object] = {
            "tier": Tier.INNER,
            "probe": AlwaysReady(),
            "env": {},
            "start_timeout_s": 10.0,
            "stop_grace_s": 2.0,
        }
        argv = (sys.executable, "-S", "-c", code)
        return Spec(name=name, argv=argv, log_path=home.logs / f"{name}.log", **(defaults | fields))  # type: ignore[arg-type]

    return make


@pytest.fixture
def quick_backoff() -> Callable[[], Backoff]:
    return lambda: Backoff(first_s=0.01, longest_s=0.05)


@pytest.fixture
def until() -> Callable[..., object]:
    return eventually


@pytest.fixture
def file_probe() -> type[FileProbe]:
    return FileProbe
