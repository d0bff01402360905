"""Where the system is that is put under load, and the key for it: the environment, or the file that `make up` wrote."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class TargetError(Exception):
    """There is no address or no key to be found; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Target:
    """base_url ends in /v1."""

    base_url: str
    key: str = field(repr=False)


def home(environ: Mapping[str, str] = os.environ) -> Path:
    """PRESSROOM_HOME, or its default in the checkout."""
    return Path(environ.get("PRESSROOM_HOME") or ROOT / ".pressroom")


def find(environ: Mapping[str, str] = os.environ) -> Target:
    """Reads PRESSROOM_BASE_URL and PRESSROOM_API_KEY, each from the environment or else from $PRESSROOM_HOME/env.

    Raises TargetError where one is in neither.
    """
    file = home(environ) / "env"
    lines = file.read_text().splitlines() if file.exists() else []
    pairs = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    found = {name: environ.get(name) or pairs.get(name) for name in ("PRESSROOM_BASE_URL", "PRESSROOM_API_KEY")}
    missing = [name for name, value in found.items() if not value]
    if missing:
        raise TargetError(f"{' and '.join(missing)}: neither in the environment nor in {file}; start with `make up`")
    return Target(str(found["PRESSROOM_BASE_URL"]).rstrip("/"), str(found["PRESSROOM_API_KEY"]))
