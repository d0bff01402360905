"""Memory of running services, from /proc."""

from dataclasses import dataclass

from devstack.processes import group_members, memory_bytes


@dataclass(frozen=True, slots=True)
class Memory:
    """rss counts shared pages in full, pss shares them out: sums over processes are only meaningful of pss."""

    rss_bytes: int = 0
    pss_bytes: int = 0


def of_service(pid: int | None) -> Memory:
    """Returns the memory of a service: of its process and of what that started."""
    if pid is None:
        return Memory()
    pairs = [memory_bytes(member) for member in group_members(pid)]
    return Memory(sum(rss for rss, _ in pairs), sum(pss for _, pss in pairs))


def of_process(pid: int) -> Memory:
    """Returns the memory of one process."""
    return Memory(*memory_bytes(pid))
