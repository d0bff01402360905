"""What kubectl makes of the overlays, rendered once from a copy of k8s/ with secrets that are made for it."""

import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import yaml

from testkit.manifests import VARIANTS, Rendered, tool
from testkit.sources import ROOT


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> pathlib.Path:
    """A copy of k8s/ with the secrets of both overlays, made as its README says."""
    root = tmp_path_factory.mktemp("cluster")
    shutil.copytree(ROOT / "k8s", root / "k8s", ignore=shutil.ignore_patterns("secrets"))
    (root / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "cluster_secrets.py", root / "tools")
    (root / "libs").symlink_to(ROOT / "libs")
    for arguments in (["dev"], ["prod", "--milvus-uri", "http://root:secret@milvus.example:19530"]):
        command = [sys.executable, "-I", root / "tools" / "cluster_secrets.py", *arguments]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    return root


@pytest.fixture(scope="session")
def render(checkout, tmp_path_factory) -> Callable[[str], Rendered]:
    """Renders a variant: an overlay, with +gpu the component switched on as the README says."""
    cache: dict[str, Rendered] = {}
    out = tmp_path_factory.mktemp("rendered")

    def rendered(variant: str) -> Rendered:
        if variant not in cache:
            overlay, _, component = variant.partition("+")
            folder = checkout / "k8s" / "overlays" / overlay
            if component:
                folder = shutil.copytree(folder, folder.with_name(variant.replace("+", "-")), dirs_exist_ok=True)
                _switch_on(folder / "kustomization.yaml", component)
            done = tool("kubectl", "kustomize", folder)
            assert done.returncode == 0, done.stderr
            path = out / f"{variant}.yaml"
            path.write_text(done.stdout)
            cache[variant] = Rendered(variant, path, list(yaml.safe_load_all(done.stdout)))
        return cache[variant]

    return rendered


def _switch_on(kustomization: pathlib.Path, component: str) -> None:
    line = f"  - ../../components/{component}\n"
    text = re.sub(rf"^  # - \.\./\.\./components/{component}\n", "", kustomization.read_text(), flags=re.MULTILINE)
    kustomization.write_text(text.replace("components:\n", "components:\n" + line))


@pytest.fixture(params=VARIANTS)
def cluster(request, render) -> Rendered:
    """Each variant in turn."""
    return render(request.param)
