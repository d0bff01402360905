"""The table of what runs: one row for each server and service, and how each is told where the others are.

A new service is one row in INNER_SERVICES, or a row of its own where it is told more than the others.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from devstack import binaries
from devstack.home import Home, write_private
from devstack.probes import GrpcProbe, HttpProbe, ValkeyProbe
from devstack.specs import Spec, Tier

HOST = "127.0.0.1"
LLM, ENCODER = MODELS = ("smollm2-135m-instruct", "all-minilm-l6-v2")

# Offsets from the base port. "gateway.http" and "gateway.public_grpc" are those that people use.
PORT_OFFSETS: Mapping[str, int] = {
    "gateway.http": 0,
    "gateway.grpc": 1,
    "embedder.grpc": 2,
    "embedder.http": 3,
    "retriever.grpc": 4,
    "retriever.http": 5,
    "generator.grpc": 6,
    "generator.http": 7,
    "evaluator.grpc": 8,
    "evaluator.http": 9,
    "trainer.grpc": 10,
    "trainer.http": 11,
    "monitor.grpc": 12,
    "monitor.http": 13,
    "nats": 14,
    "nats.http": 15,
    "valkey": 16,
    "milvus": 17,
    "gateway.public_grpc": 18,
}


@dataclass(frozen=True, slots=True)
class Wiring:
    """What the rows are filled in from. secrets: the internal ones. client_env: the env file.

    inherited: the launcher's own environment, which every process gets below what the rows say.
    """

    home: Home
    ports: Mapping[str, int]
    secrets: Mapping[str, str]
    client_env: Mapping[str, str]
    log_level: str
    num_cores: int
    inherited: Mapping[str, str]

    def addr(self, service: str) -> str:
        """Returns a service's gRPC address."""
        return f"{HOST}:{self.ports[f'{service}.grpc']}"

    @property
    def nats_url(self) -> str:
        """The bus, with its password."""
        return f"nats://pressroom:{self.secrets['NATS_PASSWORD']}@{HOST}:{self.ports['nats']}"


@dataclass(frozen=True, slots=True)
class Row:
    """One service: what it is told beyond what every service is told, and who must be ready before its first start."""

    name: str
    depends_on: tuple[str, ...]
    extra: Callable[[Wiring], dict[str, str]] = lambda wiring: {}
    tier: Tier = Tier.INNER
    num_threads: Callable[[int], int] = lambda num_cores: 1


def _gateway(wiring: Wiring) -> dict[str, str]:
    others = ("embedder", "retriever", "generator", "evaluator", "trainer", "monitor")
    return {f"{name.upper()}_ADDR": wiring.addr(name) for name in others} | {
        "VALKEY_URL": f"redis://:{wiring.secrets['VALKEY_PASSWORD']}@{HOST}:{wiring.ports['valkey']}/0",
        "PUBLIC_GRPC_PORT": str(wiring.ports["gateway.public_grpc"]),
        "DATA_DIR": str(wiring.home.data / "gateway"),
        "KEY_PEPPER": wiring.secrets["KEY_PEPPER"],
        "BOOTSTRAP_API_KEY": wiring.client_env["PRESSROOM_API_KEY"],
        "BOOTSTRAP_ADMIN_KEY": wiring.client_env["PRESSROOM_ADMIN_KEY"],
    }


def _embedder(wiring: Wiring) -> dict[str, str]:
    return {"MODEL_DIR": str(wiring.home.models / ENCODER)}


def _generator(wiring: Wiring) -> dict[str, str]:
    return {
        "MODEL_DIR": str(wiring.home.models / LLM),
        "NUM_THREADS": str(min(wiring.num_cores, 16)),
        "STORE_DIR": str(wiring.home.models),
    }


def _retriever(wiring: Wiring) -> dict[str, str]:
    return {
        "MILVUS_URI": f"http://{HOST}:{wiring.ports['milvus']}",
        "EMBEDDER_ADDR": wiring.addr("embedder"),
        "GATEWAY_ADDR": wiring.addr("gateway"),
    }


def _evaluator(wiring: Wiring) -> dict[str, str]:
    return {
        "GENERATOR_ADDR": wiring.addr("generator"),
        "GATEWAY_ADDR": wiring.addr("gateway"),
        "DATA_DIR": str(wiring.home.data / "evaluator"),
    }


def _trainer(wiring: Wiring) -> dict[str, str]:
    return {
        "GENERATOR_ADDR": wiring.addr("generator"),
        "GATEWAY_ADDR": wiring.addr("gateway"),
        "DATA_DIR": str(wiring.home.data / "trainer"),
        "STORE_DIR": str(wiring.home.models),
    }


def _monitor(wiring: Wiring) -> dict[str, str]:
    return {
        "DATA_DIR": str(wiring.home.data / "monitor"),
        "ENCODER_DIR": str(wiring.home.models / ENCODER),
    }


ROWS: tuple[Row, ...] = (
    Row("gateway", ("nats", "valkey"), _gateway, Tier.EDGE),
    Row("embedder", (), _embedder, num_threads=lambda num_cores: min(num_cores, 4)),
    Row("retriever", ("nats", "milvus"), _retriever),
    Row("generator", ("nats",), _generator, num_threads=lambda num_cores: min(num_cores, 16)),
    Row("evaluator", ("nats",), _evaluator),
    Row("trainer", ("nats",), _trainer),
    Row("monitor", ("nats",), _monitor),
)
SERVICES = tuple(row.name for row in ROWS)
SERVERS = ("nats", "valkey", "milvus")
NAMES = SERVERS + SERVICES


def specs(wiring: Wiring) -> tuple[Spec, ...]:
    """Returns every process of the system, in the order in which `status` lists them. Writes the servers' configs."""
    return (_nats(wiring), _valkey(wiring), _milvus(wiring), *(_service(row, wiring) for row in ROWS))


def _service(row: Row, wiring: Wiring) -> Spec:
    name, http_port = row.name, wiring.ports[f"{row.name}.http"]
    told = {
        "HOST": HOST,
        "GRPC_PORT": str(wiring.ports[f"{name}.grpc"]),
        "HTTP_PORT": str(http_port),
        "NATS_URL": wiring.nats_url,
        "TRACE_DIR": str(wiring.home.traces),
        "LOG_LEVEL": wiring.log_level,
        "LOG_FORMAT": "json",
    } | row.extra(wiring)
    env = {f"{name.upper()}_{key}": value for key, value in told.items()}
    env |= _process_env(wiring, row.num_threads(wiring.num_cores))
    return Spec(
        name=name,
        tier=row.tier,
        argv=(sys.executable, "-m", f"{name}.main"),
        env=env,
        probe=HttpProbe(http_port),
        log_path=wiring.home.logs / f"{name}.log",
        depends_on=row.depends_on,
        port=wiring.ports[f"{name}.grpc"],
        http_port=http_port,
    )


def _process_env(wiring: Wiring, num_threads: int) -> dict[str, str]:
    # gRPC would send even loopback calls through a proxy of the user's environment.
    no_proxy = wiring.inherited.get("NO_PROXY") or wiring.inherited.get("no_proxy")
    no_proxy = f"{no_proxy},{HOST},localhost" if no_proxy else f"{HOST},localhost"
    return {
        # Passive waiting: several services share the cores, and a spinning OpenMP thread takes one from its neighbour.
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime sends statistics of its use since 1.29
        "MALLOC_ARENA_MAX": "2",
        "PYTHONUNBUFFERED": "1",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
    }


_NATS_CONFIG = """\
server_name: "pressroom"
listen: "{host}:{port}"
http: "{host}:{http_port}"
max_payload: 8MB
authorization {{ user: "pressroom", password: "{password}" }}
# An acknowledged publish has reached the disk: what was accepted with 202 survives a power loss.
jetstream {{ store_dir: "{store}", max_file_store: 8GB, max_memory_store: 64MB, sync_interval: always }}
"""


def _nats(wiring: Wiring) -> Spec:
    config = wiring.home.run / "nats.conf"
    http_port = wiring.ports["nats.http"]
    filled = _NATS_CONFIG.format(
        host=HOST,
        port=wiring.ports["nats"],
        http_port=http_port,
        password=wiring.secrets["NATS_PASSWORD"],
        store=wiring.home.data / "nats",
    )
    write_private(config, filled)
    return Spec(
        name="nats",
        tier=Tier.INFRASTRUCTURE,
        argv=(str(binaries.path("nats-server")), "-c", str(config)),
        env={},
        probe=HttpProbe(http_port, "/healthz"),
        log_path=wiring.home.logs / "nats.log",
        port=wiring.ports["nats"],
        http_port=http_port,
        start_timeout_s=60.0,
    )


_VALKEY_CONFIG = """\
bind {host}
port {port}
requirepass {password}
dir "{folder}"
# Rate counters and caches only: everything here may be lost, nothing may grow without bound.
save ""
appendonly no
maxmemory 64mb
maxmemory-policy volatile-ttl
daemonize no
"""


def _valkey(wiring: Wiring) -> Spec:
    config, folder = wiring.home.run / "valkey.conf", wiring.home.data / "valkey"
    folder.mkdir(parents=True, exist_ok=True)
    port, password = wiring.ports["valkey"], wiring.secrets["VALKEY_PASSWORD"]
    write_private(config, _VALKEY_CONFIG.format(host=HOST, port=port, password=password, folder=folder))
    return Spec(
        name="valkey",
        tier=Tier.INFRASTRUCTURE,
        argv=(str(binaries.path("valkey-server")), str(config)),
        env={},
        probe=ValkeyProbe(port, password),
        log_path=wiring.home.logs / "valkey.log",
        port=port,
        start_timeout_s=30.0,
    )


def _milvus(wiring: Wiring) -> Spec:
    port = wiring.ports["milvus"]
    folder = str(wiring.home.data / "milvus")
    return Spec(
        name="milvus",
        tier=Tier.INFRASTRUCTURE,
        argv=(sys.executable, "-m", "milvus_lite", "server", "--host", HOST, "--port", str(port), "--data-dir", folder),
        env=_process_env(wiring, 1),
        probe=GrpcProbe(port),
        log_path=wiring.home.logs / "milvus.log",
        port=port,
    )
