"""What the environment tells the launcher, read once by the command line and handed on.

Knows the layout of the checkout; knows nothing of services.
"""

import os
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[4]
DEFAULT_BASE_PORT = 8000


class BadSettings(Exception):
    """A variable of the environment that cannot be used; the message says which and how to mend it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """home: where state lives. base_port: first of eighteen ports, 0 for free ones. num_cores: usable ones."""

    home: Path
    base_port: int
    log_level: str
    num_cores: int


@dataclass(frozen=True, slots=True)
class HubSettings:
    """Where models are fetched from, and what is shown there to be let in."""

    endpoint: str
    token: str


def load_hub() -> HubSettings:
    """Reads HF_ENDPOINT and HF_TOKEN. HF_HUB_OFFLINE is for libraries that ask unasked; who names a hub means it."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not endpoint.startswith(("https://", "http://")):
        raise BadSettings(f"HF_ENDPOINT is {endpoint!r}; set it to a URL such as https://huggingface.co")
    return HubSettings(endpoint, os.environ.get("HF_TOKEN") or "")


def load() -> Settings:
    """Reads PRESSROOM_HOME, PRESSROOM_PORT and PRESSROOM_LOG_LEVEL; raises BadSettings."""
    raw_port = os.environ.get("PRESSROOM_PORT") or str(DEFAULT_BASE_PORT)
    if not raw_port.isdecimal() or not (int(raw_port) == 0 or 1024 <= int(raw_port) <= 65000):
        raise BadSettings(f"PRESSROOM_PORT is {raw_port!r}; set it to 0 (free ports) or to a number from 1024 to 65000")
    level = (os.environ.get("PRESSROOM_LOG_LEVEL") or "INFO").upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise BadSettings(f"PRESSROOM_LOG_LEVEL is {level!r}; set it to DEBUG, INFO, WARNING or ERROR")
    home = Path(os.environ.get("PRESSROOM_HOME") or CHECKOUT / ".pressroom").expanduser().absolute()
    return Settings(home, int(raw_port), level, len(os.sched_getaffinity(0)))
