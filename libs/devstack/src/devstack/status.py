"""What `pressroom status` shows, in the shape that CONTRACTS fixes."""

from typing import Any

from devstack import control, memory, topology
from devstack.home import Home


def read(home: Home) -> dict[str, Any]:
    """Returns the status; every service is stopped where no supervisor runs. Raises ControlLost where one is deaf."""
    try:
        told = control.ask(home.run, "status")
    except control.NotRunning:
        services = [_row({"name": name, "state": "stopped"}) for name in topology.NAMES]
        return {"ready": False, "services": services, "total_pss_bytes": 0, "supervisor": None}
    rows = [_row(service) for service in told["services"]]
    own = memory.of_process(told["supervisor"]["pid"])
    return {
        "ready": told["is_up"] and all(row["state"] == "ready" for row in rows),
        "services": rows,
        "total_pss_bytes": sum(row["pss_bytes"] or 0 for row in rows) + own.pss_bytes,
        "supervisor": {"pid": told["supervisor"]["pid"], "pss_bytes": own.pss_bytes},
    }


def _row(service: dict[str, Any]) -> dict[str, Any]:
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
        "queue_depth": service.get("queue_depth"),
        "restarts": service.get("restarts", 0),
        "detail": service.get("detail", ""),
    }


def render(status: dict[str, Any]) -> list[str]:
    """Returns the status as a table for people."""
    lines = [f"{'service':<11}{'state':<12}{'pid':>8}{'port':>7}{'http':>7}{'memory':>10}{'queue':>7}{'restarts':>10}"]
    for row in status["services"]:
        size = f"{row['pss_bytes'] / 1e6:.0f} MB" if row["pss_bytes"] is not None else "-"
        cells = [row[key] if row[key] is not None else "-" for key in ("pid", "port", "http_port")]
        depth = row["queue_depth"] if row["queue_depth"] is not None else "-"
        line = f"{row['name']:<11}{row['state']:<12}{cells[0]:>8}{cells[1]:>7}{cells[2]:>7}{size:>10}{depth:>7}"
        lines.append(f"{line}{row['restarts']:>10}  {row['detail']}".rstrip())
    lines.append(
        f"{'ready' if status['ready'] else 'not ready'}; memory {status['total_pss_bytes'] / 1e6:.0f} MB (PSS)"
    )
    return lines
