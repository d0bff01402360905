"""What the supervisor needs to know of one service, and nothing of which services there are."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from devstack.probes import Probe


class Tier(IntEnum):
    """The order of stopping, highest first: the edge stops accepting before what it calls goes away."""

    INFRASTRUCTURE = 0
    INNER = 1
    EDGE = 2


@dataclass(frozen=True, slots=True)
class Spec:
    """One process to keep alive.

    depends_on: must have been ready once before the first start. Restarts do not wait: services converge in any order.
    port, http_port: what `status` shows. env: added to the launcher's own environment.
    """

    name: str
    tier: Tier
    argv: tuple[str, ...]
    env: Mapping[str, str]
    probe: Probe
    log_path: Path
    depends_on: tuple[str, ...] = ()
    port: int | None = None
    http_port: int | None = None
    start_timeout_s: float = 180.0
    stop_grace_s: float = 20.0
