"""What is measured: the mock itself, our gateway, LiteLLM's proxy and Envoy, each as processes on free ports."""

import http.client
import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml

from bench_gateway.load import Target
from testkit.ports import free_port
from testkit.servers import Server, nats_server, running, valkey_server

ROOT = Path(__file__).resolve().parents[2]
PEERS_VENV = ROOT / ".venv-peers-gateway"
OWN_MOCK = Path(__file__).with_name("mock_upstream.py")
_MODEL = "mock"
_UPSTREAM_KEY = "sk-of-the-upstream"


@dataclass(frozen=True, slots=True)
class Door:
    """One way to the mock. pids: the processes whose time and memory count as its own."""

    name: str
    target: Target
    pids: tuple[int, ...] = ()


class _HttpServer(Server):
    """A server that is ready when a path answers with 200."""

    ready_path = "/healthz"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("GET", self.ready_path)
            return connection.getresponse().status == 200
        except http.client.HTTPException:
            return False
        finally:
            connection.close()


class Mock(Server):
    """A mock upstream: our own program, or any other that takes a port and a pace and speaks the same."""

    name = "mock"

    def __init__(self, program: Path, pace_s: float) -> None:
        super().__init__()
        self._command = [sys.executable, str(program), str(self.port), *([str(pace_s)] if pace_s else [])]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def _argv(self) -> list[str]:
        return self._command

    def _answers(self) -> bool:
        return self._owns(self.port)


class Gateway(_HttpServer):
    """Our gateway as it runs in production; the services that it could call are away."""

    name = "gateway"
    start_timeout_s = 60.0
    ready_path = "/readyz"

    def __init__(self, mock: Mock, nats_url: str, valkey_url: str) -> None:
        super().__init__()
        self.admin_key = f"sk-admin-{secrets.token_hex(16)}"
        self._nats_url, self._valkey_url = nats_url, valkey_url
        graphs = self.data_dir / "graphs"
        graphs.mkdir()
        params = {"base_url": mock.url, "model": _MODEL, "key": "mock"}
        node = {"id": "mock", "service": "openai", "call": "complete", "params": params}
        graph = {"name": _MODEL, "block": "sequence", "nodes": [node]}
        (graphs / "mock.yaml").write_text(yaml.safe_dump(graph))

    def _argv(self) -> list[str]:
        return [sys.executable, "-m", "gateway.main"]

    def _env(self) -> dict[str, str]:
        away = {f"GATEWAY_{name}_ADDR": f"127.0.0.1:{free_port()}" for name in _OTHERS}
        return (
            dict(os.environ)
            | away
            | {
                "GATEWAY_HTTP_PORT": str(self.port),
                "GATEWAY_GRPC_PORT": str(free_port()),
                "GATEWAY_NATS_URL": self._nats_url,
                "GATEWAY_VALKEY_URL": self._valkey_url,
                "GATEWAY_DATA_DIR": str(self.data_dir / "data"),
                "GATEWAY_TRACE_DIR": str(self.data_dir / "traces"),
                "GATEWAY_LOG_FORMAT": "json",
                "GATEWAY_KEY_PEPPER": secrets.token_hex(16),
                "GATEWAY_BOOTSTRAP_ADMIN_KEY": self.admin_key,
                "GATEWAY_GRAPHS_DIR": str(self.data_dir / "graphs"),
                "GATEWAY_UPSTREAM_KEYS": json.dumps({"mock": _UPSTREAM_KEY}),
            }
        )

    def limited_key(self) -> str:
        """A key whose limits are counted with every request and never reached."""
        headers = {"authorization": f"Bearer {self.admin_key}"}
        limits = [
            {"counted": "tokens", "amount": 10**9, "algorithm": "token_bucket"},
            {"counted": "concurrency", "amount": 10_000},
        ]
        budget = {"amount": 1_000_000, "period": "month"}
        body = {"tenant": "bench", "rpm": 1_000_000, "policy": {"limits": limits, "budget": budget}}
        response = httpx.post(f"{self.url}/admin/keys", json=body, headers=headers, trust_env=False)
        response.raise_for_status()
        return str(response.json()["key"])


_OTHERS = ("EMBEDDER", "RETRIEVER", "GENERATOR", "EVALUATOR", "TRAINER", "MONITOR")


class LiteLlm(_HttpServer):
    """LiteLLM's proxy with a master key and one worker; no database, so it keeps no ledger."""

    name = "litellm"
    start_timeout_s = 180.0
    ready_path = "/health/liveliness"

    def __init__(self, mock: Mock) -> None:
        super().__init__()
        self.key = f"sk-{secrets.token_hex(16)}"
        params = {"model": f"openai/{_MODEL}", "api_base": mock.url, "api_key": _UPSTREAM_KEY}
        config = {
            "model_list": [{"model_name": _MODEL, "litellm_params": params}],
            "general_settings": {"master_key": self.key},
            "litellm_settings": {"telemetry": False},
        }
        (self.data_dir / "config.yaml").write_text(yaml.safe_dump(config))

    def _argv(self) -> list[str]:
        options = ["--config", str(self.data_dir / "config.yaml"), "--host", "127.0.0.1", "--port", str(self.port)]
        return [str(PEERS_VENV / "bin" / "litellm"), *options, "--num_workers", "1"]

    def _env(self) -> dict[str, str]:
        # It fetches its price list from the network otherwise.
        return dict(os.environ) | {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


class Envoy(Server):
    """Envoy as a plain proxy: no keys, no limits, no ledger. The floor of what a hop can cost."""

    name = "envoy"
    start_timeout_s = 30.0

    def __init__(self, mock: Mock) -> None:
        super().__init__()
        (self.data_dir / "envoy.yaml").write_text(_ENVOY.format(port=self.port, mock_port=mock.port))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _argv(self) -> list[str]:
        return [
            str(PEERS_VENV / "bin" / "envoy"),
            *("-c", str(self.data_dir / "envoy.yaml"), "--concurrency", "1", "--log-level", "error"),
            *("--use-dynamic-base-id",),
        ]

    def _answers(self) -> bool:
        return self._owns(self.port)


_ENVOY = """
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: bench
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes: [{{match: {{prefix: "/"}}, route: {{cluster: mock, timeout: 300s}}}}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: mock
    type: STATIC
    circuit_breakers: {{thresholds: [{{max_connections: 8192, max_pending_requests: 8192, max_requests: 8192}}]}}
    load_assignment:
      cluster_name: mock
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {mock_port}}}}}}}
"""

NAMES = ("gateway", "litellm", "envoy")


@contextmanager
def opened(names: tuple[str, ...], program: Path, pace_s: float) -> Iterator[list[Door]]:
    """A mock and, in front of it, the doors of these names; the mock itself comes first."""
    with ExitStack() as stack:
        mock = stack.enter_context(running(Mock(program, pace_s)))
        doors = [Door("direct", Target(mock.url, _MODEL, "none"), ())]
        if "gateway" in names:
            nats, valkey = stack.enter_context(nats_server()), stack.enter_context(valkey_server())
            ours = stack.enter_context(running(Gateway(mock, nats.url, valkey.url)))
            doors.append(Door("gateway", Target(f"{ours.url}/v1", _MODEL, ours.limited_key()), (ours.pid,)))
        if "litellm" in names:
            proxy = stack.enter_context(running(LiteLlm(mock)))
            doors.append(Door("litellm", Target(f"{proxy.url}/v1", _MODEL, proxy.key), (proxy.pid,)))
        if "envoy" in names:
            envoy = stack.enter_context(running(Envoy(mock)))
            doors.append(Door("envoy", Target(f"{envoy.url}/v1", _MODEL, "none"), (envoy.pid,)))
        yield doors
