"""A running system of its own, and .venv-clients with clients as their makers ship them: make test-clients."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from devstack.home import read_pairs
from testkit.sources import ROOT

CLIENTS = ROOT / ".venv-clients" / "bin"
_TIMEOUT_S = 420


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.clients)
            item.add_marker(pytest.mark.timeout(_TIMEOUT_S))
            item.add_marker(
                pytest.mark.skipif(not CLIENTS.exists(), reason=".venv-clients is not there: make clients-env")
            )


@dataclass
class Clients:
    """The running system's addresses, and how a client from outside is run against it."""

    env: dict[str, str] = field(repr=False)
    model_dir: Path

    @property
    def url(self) -> str:
        return self.env["PRESSROOM_BASE_URL"]

    @property
    def origin(self) -> str:
        return self.url.removesuffix("/v1")

    def run(self, *command: object, cwd: Path, **environ: str) -> str:
        """Runs a program of .venv-clients to its end; returns what it printed."""
        key = self.env["PRESSROOM_API_KEY"]
        told = {"PRESSROOM_API_KEY": key, "OPENAI_API_KEY": key, "HF_HOME": str(cwd / "hf"), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [str(CLIENTS / str(command[0])), *map(str, command[1:])],
            env=os.environ | told | environ,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{command[0]}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout


@pytest.fixture(scope="session")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    """Starts the system through the launcher, as a user would, and ends it."""
    home = tmp_path_factory.mktemp("system") / "home"
    home.mkdir()
    (home / "models").symlink_to(ROOT / ".pressroom" / "models")
    environ = os.environ | {"PRESSROOM_HOME": str(home), "PRESSROOM_PORT": "0"}
    launcher = str(ROOT / "pressroom")
    try:
        subprocess.run([launcher, "up"], env=environ, check=True, timeout=_TIMEOUT_S)
        yield Clients(read_pairs(home / "env"), home / "models" / "smollm2-135m-instruct")
    finally:
        subprocess.run([launcher, "down"], env=environ, check=True, timeout=120)
