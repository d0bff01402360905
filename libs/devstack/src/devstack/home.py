"""PRESSROOM_HOME: where everything that is not code lives, and the secrets that are made once.

Two files hold secrets, both mode 0600: `env` for people and their scripts, `secrets` for the services alone.
"""

import json
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Home:
    """The folders and files below one PRESSROOM_HOME."""

    root: Path

    @property
    def env_file(self) -> Path:
        """KEY=value lines for clients, as CONTRACTS says."""
        return self.root / "env"

    @property
    def secrets_file(self) -> Path:
        """What only the services may know."""
        return self.root / "secrets"

    @property
    def run(self) -> Path:
        """Locks, control socket, ports and process ids of this run."""
        return self.root / "run"

    @property
    def logs(self) -> Path:
        """One file for each service."""
        return self.root / "logs"

    @property
    def traces(self) -> Path:
        """The local span store."""
        return self.root / "traces"

    @property
    def data(self) -> Path:
        """What the servers and services keep."""
        return self.root / "data"

    @property
    def models(self) -> Path:
        """The model store."""
        return self.root / "models"

    @property
    def state_file(self) -> Path:
        """Which processes run, written by the supervisor."""
        return self.run / "state.json"

    @property
    def ports_file(self) -> Path:
        """The ports of this run, chosen before anything starts."""
        return self.run / "ports.json"

    def create(self) -> None:
        """Makes the folders; only the owner may look inside."""
        for folder in (self.root, self.run, self.logs, self.traces, self.data, self.models):
            folder.mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o700)


def write_private(path: Path, text: str) -> None:
    """Replaces a file in one step, mode 0600 from its first byte."""
    fd, temp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        os.unlink(temp)
        raise


def read_pairs(path: Path) -> dict[str, str]:
    """Reads KEY=value lines; an absent file has none."""
    if not path.exists():
        return {}
    pairs = (line.split("=", 1) for line in path.read_text().splitlines() if "=" in line and not line.startswith("#"))
    return {key.strip(): value.strip() for key, value in pairs}


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an absent or torn file is an empty one."""
    try:
        loaded = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def new_key() -> str:
    """Makes an access key in the gateway's form, sk-<id>-<secret>."""
    return f"sk-{secrets.token_hex(8)}-{secrets.token_urlsafe(32)}"


_CLIENT_KEYS: Mapping[str, Callable[[], str]] = {"PRESSROOM_API_KEY": new_key, "PRESSROOM_ADMIN_KEY": new_key}
_INTERNAL = ("KEY_PEPPER", "NATS_PASSWORD", "VALKEY_PASSWORD")


def ensure_env(home: Home, base_url: str, grpc_addr: str) -> dict[str, str]:
    """Writes the env file, keeping the keys it has; returns it. grpc_addr: where gRPC clients with a key go."""
    pairs = read_pairs(home.env_file)
    keys = {k: pairs.get(k) or make() for k, make in _CLIENT_KEYS.items()}
    wanted = {"PRESSROOM_BASE_URL": base_url} | keys | {"PRESSROOM_GRPC_ADDR": grpc_addr}
    merged = pairs | wanted
    if merged != pairs or home.env_file.stat().st_mode & 0o777 != 0o600:
        write_private(home.env_file, "".join(f"{k}={v}\n" for k, v in merged.items()))
    return merged


def ensure_secrets(home: Home) -> dict[str, str]:
    """Writes the internal secrets, keeping those it has; returns them."""
    pairs = read_pairs(home.secrets_file)
    merged = pairs | {name: pairs.get(name) or secrets.token_hex(24) for name in _INTERNAL}
    if merged != pairs or home.secrets_file.stat().st_mode & 0o777 != 0o600:
        write_private(home.secrets_file, "".join(f"{k}={v}\n" for k, v in merged.items()))
    return merged
