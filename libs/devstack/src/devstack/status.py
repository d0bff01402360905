"""What `pressroom status` shows, in the shape that CONTRACTS fixes."""

from typing import Any

from devstack import control, memory, topology
from devstack.cores import CoreUse, measure
from devstack.home import Home

_WORTH_NAMING = 0.05  # cores
_LINE = "{:<11}{:<12}{:>8}{:>7}{:>7}{:>10}{:>7}{:>7}{:>10}"


def read(home: Home) -> dict[str, Any]:
    """Returns the status; every service is stopped where no supervisor runs. Raises ControlLost where one is deaf."""
    try:
        told = control.ask(home.run, "status")
    except control.NotRunning:
        services = [_row({"name": name, "state": "stopped"}, CoreUse()) for name in topology.NAMES]
        return {"ready": False, "services": services, "total_pss_bytes": 0, "supervisor": None, "cores": None}
    used = measure({service["pid"] for service in told["services"] if service["pid"]})
    rows = [_row(service, used.by_group.get(service["pid"], CoreUse())) for service in told["services"]]
    own = memory.of_process(told["supervisor"]["pid"])
    ours = sum(row["cpu_cores"] for row in rows)
    return {
        "ready": told["is_up"] and all(row["state"] == "ready" for row in rows),
        "services": rows,
        "total_pss_bytes": sum(row["pss_bytes"] or 0 for row in rows) + own.pss_bytes,
        "supervisor": {"pid": told["supervisor"]["pid"], "pss_bytes": own.pss_bytes},
        "cores": {
            "num": used.num,
            "busy": round(used.busy, 2),
            "others": round(max(0.0, used.busy - ours), 2),
        },
    }


def _row(service: dict[str, Any], cores: CoreUse) -> dict[str, Any]:
    pid = service.get("pid")
    used = memory.of_service(pid)
    return {
        "name": service["name"],
        "state": service["state"],
        "pid": pid,
        "port": service.get("port"),
        "http_port": service.get("http_port"),
        "rss_bytes": used.rss_bytes if pid else None,
        "pss_bytes": used.pss_bytes if pid else None,
        "cpu_cores": round(cores.total, 2),
        "cpu_background_cores": round(cores.background, 2),
        "queue_depth": service.get("queue_depth"),
        "restarts": service.get("restarts", 0),
        "detail": service.get("detail", ""),
    }


def render(status: dict[str, Any]) -> list[str]:
    """Returns the status as a table for people."""
    head = ("service", "state", "pid", "port", "http", "memory", "cores", "queue", "restarts")
    lines = [_LINE.format(*head)]
    for row in status["services"]:
        size = f"{row['pss_bytes'] / 1e6:.0f} MB" if row["pss_bytes"] is not None else "-"
        pid, port, http_port, depth = (
            row[key] if row[key] is not None else "-" for key in ("pid", "port", "http_port", "queue_depth")
        )
        use = f"{row['cpu_cores']:.2f}"
        line = _LINE.format(row["name"], row["state"], pid, port, http_port, size, use, depth, row["restarts"])
        lines.append(f"{line}  {row['detail']}".rstrip())
    lines.append(
        f"{'ready' if status['ready'] else 'not ready'}; memory {status['total_pss_bytes'] / 1e6:.0f} MB (PSS)"
    )
    if status["cores"]:
        lines.append(_cores(status))
    return lines


def _cores(status: dict[str, Any]) -> str:
    """Says who takes the cores, most first; what runs in the background yields to everything else."""
    cores = status["cores"]
    users = [(row["cpu_cores"], row["name"], row["cpu_background_cores"]) for row in status["services"]]
    users.append((cores["others"], "other processes", 0.0))
    named = [
        f"{name} {used:.2f}" + (f" ({background:.2f} in the background)" if background >= _WORTH_NAMING else "")
        for used, name, background in sorted(users, reverse=True)
        if used >= _WORTH_NAMING
    ]
    return f"cores: {cores['busy']:.2f} of {cores['num']} busy" + (f": {', '.join(named)}" if named else "")
