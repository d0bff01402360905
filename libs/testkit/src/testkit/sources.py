"""Reads the repository's own source files, for tests of its rules. Works on a checkout, not on installed packages."""

import ast
import pathlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[4]


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement's target, as a dotted name, and where it stands."""

    target: str
    where: str


def service_names() -> list[str]:
    """The folders under services/."""
    return sorted(p.name for p in (ROOT / "services").iterdir() if (p / "src").is_dir())


def lib_names() -> list[str]:
    """The folders under libs/."""
    return sorted(p.name for p in (ROOT / "libs").iterdir() if (p / "src").is_dir())


def python_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Every Python file below a folder, generated code left out."""
    generated = ROOT / "libs" / "contracts" / "src" / "pressroom"
    return sorted(p for p in folder.rglob("*.py") if generated not in p.parents and "__pycache__" not in p.parts)


def imports(path: pathlib.Path) -> Iterator[Import]:
    """Every import of a file, wherever it stands in it. `from a import b` gives "a.b", as b may be a module."""
    shown = path.relative_to(ROOT)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, f"{shown}:{node.lineno}")
        elif isinstance(node, ast.ImportFrom):
            module = ("." * node.level) + (node.module or "")
            for alias in node.names:
                yield Import(f"{module}.{alias.name}", f"{shown}:{node.lineno}")


def within(target: str, *packages: str) -> bool:
    """Whether a dotted name is one of the packages or lies in one."""
    return any(target == package or target.startswith(package + ".") for package in packages)


def tracked_files() -> list[pathlib.Path]:
    """The files of the checkout that git knows or would take; without git, those outside dot folders."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True, timeout=30).stdout.decode().split("\0")
        paths = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [p for p in ROOT.rglob("*") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]
    return sorted(p for p in paths if p.is_file())
