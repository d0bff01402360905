#!/usr/bin/env python3
"""Makes .venv-checks: kubectl, kubernetes-validate and checkov, as constraints-checks.txt says. Standard library only.

usage: python3 tools/checks_env.py        (make checks-env; ends at once when nothing has changed)

An environment of its own: checkov pins a hundred packages, some of them years old, and the services need others. One to
two minutes and 460 MB, of which kubernetes-validate's schemas and numpy are nearly half.
"""

from __future__ import annotations  # an old python3 must get as far as the message that it is too old

import fcntl
import hashlib
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-checks"
LOCK = ROOT / "constraints-checks.txt"
STAMP = VENV / "checks.stamp"
OLDEST_PYTHON = (3, 11)
STEP_TIMEOUT_S = 1200
NUM_SHOWN_LINES = 15
PIP_OPTIONS = ("--no-input", "--disable-pip-version-check", "--quiet", "--no-deps", "--require-hashes")


def main() -> int:
    """Makes or mends the environment; the stamp is written last, so that what was interrupted is made again."""
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        print(
            f"python3 is {sys.version.split()[0]}, {oldest} is needed: make PYTHON=python{oldest} test", file=sys.stderr
        )
        return 1
    with LOCK.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second run waits for the first
        wanted = f"{hashlib.sha256(LOCK.read_bytes()).hexdigest()} {sys.version_info[:2]}"
        if STAMP.exists() and STAMP.read_text() == wanted:
            return 0
        began_at = time.monotonic()
        num_packages = len(re.findall(r"^[A-Za-z0-9].*==", LOCK.read_text(), re.MULTILINE))
        print(f"tools that check k8s/: {num_packages} packages ...", file=sys.stderr, flush=True)
        python = VENV / "bin" / "python"
        made = _run([sys.executable, "-m", "venv", "--clear", str(VENV)], "Next: apt install python3-venv, df -h .")
        installed = made and _run(
            [str(python), "-m", "pip", "install", *PIP_OPTIONS, "-r", str(LOCK)],
            "Next: check the network and the package index (pip config list), then make checks-env again",
        )
        if not installed:
            return 1
        STAMP.write_text(wanted)
        print(f"tools that check k8s/: ready after {time.monotonic() - began_at:.0f} s", file=sys.stderr)
    return 0


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
