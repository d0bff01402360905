"""One service of the platform as a real process, for integration tests: started, killed, given back."""

import http.client
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from testkit.ports import free_port
from testkit.servers import Server


class ServiceProcess(Server):
    """`python -m <name>.main`, told by environment variables with its prefix, ready when /readyz says so.

    settings: names without the prefix, beside host, ports, log format and trace folder, which are filled in.
    argv: another command for a service that exists in a test alone.
    """

    start_timeout_s = 60.0
    stop_timeout_s = 15.0

    def __init__(
        self,
        name: str,
        settings: Mapping[str, object] | None = None,
        *,
        argv: Sequence[str] | None = None,
        ready_path: str = "/readyz",
    ) -> None:
        self.name = name
        super().__init__()
        self.http_port = free_port()
        self.trace_dir = self.data_dir / "traces"
        self._command = list(argv or (sys.executable, "-m", f"{name}.main"))
        self._settings = dict(settings or {})
        self._ready_path = ready_path

    @property
    def address(self) -> str:
        """host:port of its gRPC server."""
        return f"127.0.0.1:{self.port}"

    def _argv(self) -> list[str]:
        return self._command

    def _env(self) -> dict[str, str]:
        told: dict[str, object] = {
            "HOST": "127.0.0.1",
            "GRPC_PORT": self.port,
            "HTTP_PORT": self.http_port,
            "LOG_FORMAT": "json",
            "TRACE_DIR": self.trace_dir,
        } | self._settings
        return dict(os.environ) | {f"{self.name.upper()}_{key}": str(value) for key, value in told.items()}

    def _answers(self) -> bool:
        status, _ = self.get(self._ready_path)
        return status == 200 and self._owns(self.http_port)

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a GET on its HTTP port; raises OSError where nothing listens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=5)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except http.client.HTTPException as error:
            raise OSError(f"no HTTP answer: {error!r}") from error
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """Value of one sample of /metrics; 0 where it does not stand there yet. Not all labels need be given."""
        from prometheus_client.parser import text_string_to_metric_families

        _, body = self.get("/metrics")
        return sum(
            sample.value
            for family in text_string_to_metric_families(body)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def spans(self) -> list[dict[str, Any]]:
        """What the local span store holds."""
        path = self.trace_dir / f"{self.name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log_lines(self, message: str) -> list[dict[str, Any]]:
        """Its JSON log lines with this message."""
        rows = [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]
        return [row for row in rows if row.get("message") == message]
