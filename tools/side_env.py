#!/usr/bin/env python3
"""Makes an environment beside .venv, as its lock says. Standard library only.

usage: python3 tools/side_env.py checks    .venv-checks: kubectl, kubernetes-validate and checkov      (make checks-env)
       python3 tools/side_env.py vllm      .venv-vllm: vLLM for the CPU, for tests and measurements      (make vllm-env)
       python3 tools/side_env.py clients   .venv-clients: clients from outside, as they are shipped   (make clients-env)
       python3 tools/side_env.py peers-openvino | peers-llamacpp      peers of the engine      (make bench-engine)
       python3 tools/side_env.py peers-gateway    peers of the gateway    (make bench-gateway)

Environments of their own, since each pins a hundred packages that the services need others of. checks: one to two
minutes and 460 MB, of which kubernetes-validate's schemas and numpy are nearly half. vllm: two to five minutes,
3.3 GB. peers-openvino: half a minute, 300 MB. peers-llamacpp: seconds, 130 MB. peers-gateway: a minute, 840 MB.
All end at once when nothing has changed.
"""

from __future__ import annotations  # an old python3 must get as far as the message that it is too old

import dataclasses
import fcntl
import hashlib
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TORCH_LOCK = ROOT / "constraints-torch.txt"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST_PYTHON = (3, 11)
STEP_TIMEOUT_S = 1200
NUM_SHOWN_LINES = 15
PIP_OPTIONS = ("--no-input", "--disable-pip-version-check", "--quiet", "--no-deps", "--require-hashes")


@dataclasses.dataclass(frozen=True)
class SideEnv:
    """An environment: what it is called and whether torch goes before its lock (constraints-torch.txt)."""

    name: str
    title: str
    has_torch: bool = False

    @property
    def venv(self) -> pathlib.Path:
        return ROOT / f".venv-{self.name}"

    @property
    def lock(self) -> pathlib.Path:
        return ROOT / f"constraints-{self.name}.txt"

    @property
    def stamp(self) -> pathlib.Path:
        return self.venv / f"{self.name}.stamp"

    def wanted(self) -> str:
        """Returns what the stamp says when the environment is as the locks say."""
        digest = hashlib.sha256(self.lock.read_bytes() + (TORCH_LOCK.read_bytes() if self.has_torch else b""))
        return f"{digest.hexdigest()} {sys.version_info[:2]}"


ENVS = {
    env.name: env
    for env in (
        SideEnv("checks", "tools that check k8s/"),
        SideEnv("vllm", "vLLM for the CPU", True),
        SideEnv("clients", "clients from outside", True),
        SideEnv("peers-openvino", "OpenVINO GenAI"),
        SideEnv("peers-llamacpp", "llama.cpp"),
        SideEnv("peers-gateway", "LiteLLM's proxy and Envoy"),
    )
}


def main() -> int:
    """Makes or mends the environment; the stamp is written last, so that what was interrupted is made again."""
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        print(
            f"python3 is {sys.version.split()[0]}, {oldest} is needed: make PYTHON=python{oldest} test", file=sys.stderr
        )
        return 1
    if len(sys.argv) != 2 or sys.argv[1] not in ENVS:
        print(f"usage: python3 tools/side_env.py {'|'.join(ENVS)}", file=sys.stderr)
        return 2
    env = ENVS[sys.argv[1]]
    with env.lock.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second run waits for the first
        if env.stamp.exists() and env.stamp.read_text() == env.wanted():
            return 0
        began_at = time.monotonic()
        num_packages = len(re.findall(r"^[A-Za-z0-9].*==", env.lock.read_text(), re.MULTILINE))
        print(f"{env.title}: {num_packages} packages ...", file=sys.stderr, flush=True)
        if not _make(env):
            return 1
        env.stamp.write_text(env.wanted())
        print(f"{env.title}: ready after {time.monotonic() - began_at:.0f} s", file=sys.stderr)
    return 0


def _make(env: SideEnv) -> bool:
    pip = [str(env.venv / "bin" / "python"), "-m", "pip", "install", *PIP_OPTIONS]
    if not _run([sys.executable, "-m", "venv", "--clear", str(env.venv)], "Next: apt install python3-venv, df -h ."):
        return False
    next_step = f"Next: check the network and the package index (pip config list), then make {env.name}-env again"
    return (not env.has_torch or _install_torch(pip, next_step)) and _run([*pip, "-r", str(env.lock)], next_step)


def _install_torch(pip: list[str], next_step: str) -> bool:
    """Installs the CPU build: from pip's configured find-links, which answer at once, or from PyTorch's own index."""
    lock = ["-r", str(TORCH_LOCK)]
    return _run([*pip, "--no-index", *lock], "Next: PyTorch's own index is tried") or _run(
        [*pip, "--index-url", PYTORCH_CPU_INDEX, *lock], next_step
    )


def _run(command: list[str], next_step: str) -> bool:
    """Runs one step; on failure prints the end of what it said and the next thing to do."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=STEP_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        print(f"failed: no end after {STEP_TIMEOUT_S} s. {next_step}", file=sys.stderr)
        return False
    if done.returncode:
        for line in done.stdout.splitlines()[-NUM_SHOWN_LINES:]:
            print(f"  | {line}", file=sys.stderr)
        print(f"failed: {' '.join(command[:4])}. {next_step}", file=sys.stderr)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
