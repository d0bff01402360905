"""Which ports the system takes, and who holds one that is not free. Linux: reads /proc."""

import os
import pwd
import random
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_HOST = "127.0.0.1"
_LISTEN = "0A"
# Below the kernel's ephemeral range (32768 and up): while a service restarts, no outgoing connection may take its port.
_FREE_RANGE = (10240, 32700)


class NoFreePort(Exception):
    """No run of attempts found a free port."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who listens on a port. pid None: a process of another user, which /proc does not let us see."""

    port: int
    pid: int | None
    what: str


def plan(base_port: int, offsets: Mapping[str, int]) -> dict[str, int]:
    """Returns a port for each name: base + offset, or free ones when base is 0. Raises NoFreePort."""
    if base_port:
        return {name: base_port + offset for name, offset in offsets.items()}
    chosen: dict[str, int] = {}
    for name in offsets:
        for _ in range(1000):
            port = random.randint(*_FREE_RANGE)
            if port not in chosen.values() and is_free(port):
                chosen[name] = port
                break
        else:
            raise NoFreePort("no free port between {} and {}".format(*_FREE_RANGE))
    return chosen


def is_free(port: int) -> bool:
    """Says whether nothing listens on the port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True


def busy(ports: Iterable[int]) -> list[Holder]:
    """Returns who holds those ports that are not free."""
    return [holder(port) for port in ports if not is_free(port)]


def holder(port: int) -> Holder:
    """Names the process that listens on a port, as far as this user may see it."""
    sockets = _listening(port)
    if not sockets:
        return Holder(port, None, "a connection that is closing, or an address of this machine bound without listening")
    for pid in _pids():
        if _socket_inodes(pid) & sockets.keys():
            return Holder(port, pid, command_line(pid))
    uid = next(iter(sockets.values()))
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    return Holder(port, None, f"a process of user {user} (see it with: sudo ss -ltnp 'sport = :{port}')")


def listens(pid: int, port: int) -> bool:
    """Says whether this very process listens on the port.

    gRPC servers bind with SO_REUSEPORT, so that an answer on a port does not prove who answers.
    """
    return bool(_socket_inodes(pid) & _listening(port).keys())


def command_line(pid: int) -> str:
    """Returns a process's command line, short enough for one line of text."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return "a process that has just ended"
    text = " ".join(raw.replace(b"\0", b" ").decode(errors="replace").split())
    return text if len(text) <= 120 else f"{text[:117]}..."


def _listening(port: int) -> dict[str, int]:
    """Socket inode to owner's uid, for what listens on the port on any address."""
    found: dict[str, int] = {}
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rsplit(":", 1)[1], 16) == port:
                found[fields[9]] = int(fields[7])
    return found


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]


def _socket_inodes(pid: int) -> set[str]:
    inodes = set()
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    except OSError:  # gone meanwhile, or another user's
        pass
    return inodes
