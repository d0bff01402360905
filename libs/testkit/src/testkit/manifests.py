"""Kubernetes manifests as kubectl renders them, and the tools that check them; for tests of k8s/."""

import base64
import pathlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from testkit.sources import ROOT

CHECKS = ROOT / ".venv-checks" / "bin"
VARIANTS = ("dev", "prod", "dev+gpu", "prod+gpu")
Document = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """One overlay as it would be applied: a file, and its documents."""

    variant: str
    path: pathlib.Path
    documents: list[Document]

    def of(self, *kinds: str) -> list[Document]:
        """Every document of a kind."""
        return [d for d in self.documents if d["kind"] in kinds]

    def named(self, kind: str, name: str) -> Document:
        """The one of a kind with a name."""
        (found,) = [d for d in self.of(kind) if d["metadata"]["name"] == name]
        return found

    def workloads(self) -> Iterator[tuple[str, Document]]:
        """Every controller of pods: its name and the pod's spec."""
        for document in self.of("Deployment", "StatefulSet", "Job"):
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]

    def container(self, name: str) -> Document:
        """The main container of a workload."""
        (found,) = [spec["containers"] for workload, spec in self.workloads() if workload == name]
        (only,) = found
        assert isinstance(only, dict)
        return only

    def labels(self, name: str) -> dict[str, str]:
        """The labels of a workload's pods."""
        (found,) = [d for d in self.of("Deployment", "StatefulSet", "Job") if d["metadata"]["name"] == name]
        labels: dict[str, str] = found["spec"]["template"]["metadata"]["labels"]
        return labels

    def environment(self, name: str) -> dict[str, str]:
        """What a workload's process would be told: secrets, fields and limits are looked up as the kubelet does."""
        container, told = self.container(name), dict[str, str]()
        for row in container.get("env", []):
            assert row["name"] not in told, f"{name} is told {row['name']} twice"
            value = self._looked_up(name, row["valueFrom"]) if "valueFrom" in row else row["value"]
            told[row["name"]] = re.sub(r"\$\((\w+)\)", lambda match: told[match[1]], value)
        return told

    def _looked_up(self, name: str, source: Document) -> str:
        if wanted := source.get("secretKeyRef"):
            secret = self.named("Secret", wanted["name"])
            return base64.b64decode(secret["data"][wanted["key"]]).decode()
        if limit := source.get("resourceFieldRef"):
            kind = limit["resource"].removeprefix("limits.")
            return str(int(self.container(limit["containerName"])["resources"]["limits"][kind]))
        assert source["fieldRef"]["fieldPath"] == "metadata.name"
        return f"{name}-0"


def tool(name: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a tool of .venv-checks. No proxy and no server answers: whatever asks the network fails at once."""
    assert (CHECKS / name).exists(), "run `make checks-env` first"
    dead = "http://127.0.0.1:9"
    env = {
        "PATH": "/usr/bin:/bin",
        "HOME": "/nonexistent",
        "HTTP_PROXY": dead,
        "HTTPS_PROXY": dead,
        "https_proxy": dead,
    }
    command = [str(CHECKS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, **options)
