"""Whether the environment that is installed is the one that the lock files describe."""

import hashlib
import importlib.metadata
import re
from pathlib import Path

from devstack.settings import CHECKOUT

_PINNED = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", re.MULTILINE)
STAMP = CHECKOUT / ".venv" / "pressroom.stamp"


def lock_files() -> list[Path]:
    """Returns the lock files that the environment is made from, in their order of installation."""
    return [CHECKOUT / "constraints-torch.txt", CHECKOUT / "constraints.txt"]


def lock_sha256() -> str:
    """Returns the sum over the lock files; bootstrap.py, which may import nothing of ours, computes the same."""
    digest = hashlib.sha256()
    for path in lock_files():
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_current() -> bool:
    """Says whether the environment was installed from the lock files as they are."""
    return STAMP.exists() and STAMP.read_text().strip() == lock_sha256()


def differences() -> list[str]:
    """Returns what is missing or of another version than the lock says, one line each."""
    found = []
    for path in lock_files():
        for name, wanted in _PINNED.findall(path.read_text()):
            try:
                installed = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found.append(f"{name} {wanted} is not installed")
                continue
            if installed.split("+")[0] != wanted:
                found.append(f"{name} is {installed}, the lock says {wanted}")
    return found
