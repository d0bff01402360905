"""Who may import whom, read from the sources themselves."""

import ast
import sys

import pytest

from testkit import sources
from testkit.sources import ROOT, imports, python_files, within

SERVICES = sources.service_names()
LIBS = sources.lib_names()
STDLIB = tuple(sys.stdlib_module_names)
PURE = ("chassis.errors", "chassis.patience")  # what a core may import of chassis
# Libraries that are a service's domain itself: functions of texts to numbers, which no port would make exchangeable.
DOMAIN = {"evaluator": ("rouge_score", "sacrebleu")}


def _src(kind: str, name: str, *rooms: str):
    return python_files(ROOT.joinpath(kind, name, "src", name, *rooms))


def _offenders(paths, is_wrong) -> list[str]:
    return [f"{found.where} imports {found.target}" for p in paths for found in imports(p) if is_wrong(found.target)]


def test_the_scan_sees_services_libs_and_imports():
    """Guards the other tests of this file: an empty scan would pass them all."""
    assert {"gateway", "embedder", "retriever", "generator", "evaluator", "trainer", "monitor"} == set(SERVICES)
    assert {"chassis", "contracts", "modelstore", "devstack", "testkit"} == set(LIBS)
    here = {found.target for found in imports(ROOT / "tests" / "contract" / "test_import_rules.py")}
    assert {"ast", "pytest", "testkit.sources", "testkit.sources.ROOT"} <= here


@pytest.mark.parametrize("service", SERVICES)
def test_core_is_pure(service):
    allowed = (*STDLIB, "numpy", *PURE, *DOMAIN.get(service, ()), f"{service}.core")
    assert _offenders(_src("services", service, "core"), lambda target: not within(target, *allowed)) == []


def test_what_a_core_may_import_of_chassis_is_pure_itself():
    paths = [ROOT / "libs" / "chassis" / "src" / f"{name.replace('.', '/')}.py" for name in PURE]
    assert _offenders(paths, lambda target: not within(target, *STDLIB, *PURE)) == []


@pytest.mark.parametrize("service", SERVICES)
def test_api_and_backends_never_import_each_other_nor_main(service):
    for room, other in (("api", "backends"), ("backends", "api")):
        banned = (f"{service}.{other}", f"{service}.main")
        assert _offenders(_src("services", service, room), lambda target, b=banned: within(target, *b)) == []


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_no_other_service_and_no_test_or_launch_tools(service):
    banned = (*(s for s in SERVICES if s != service), "devstack", "testkit")
    assert _offenders(_src("services", service), lambda target: within(target, *banned)) == []


@pytest.mark.parametrize("lib", LIBS)
def test_libs_never_import_services(lib):
    assert _offenders(_src("libs", lib), lambda target: within(target, *SERVICES)) == []


def test_contracts_imports_protobuf_and_grpc_alone():
    allowed = (*STDLIB, "contracts", "pressroom", "google.protobuf", "grpc")
    assert _offenders(_src("libs", "contracts"), lambda target: not within(target, *allowed)) == []


def test_chassis_does_not_know_the_contracts():
    assert _offenders(_src("libs", "chassis"), lambda target: within(target, "contracts", "pressroom")) == []


def test_the_load_test_measures_from_outside():
    """It knows the system by its HTTP interface alone, and runs against any that speaks it."""
    paths = [p for p in python_files(ROOT / "loadtest") if "tests" not in p.parts]
    assert paths
    assert _offenders(paths, lambda target: within(target, *SERVICES, *LIBS, "pressroom")) == []


def test_nobody_imports_relatively():
    every = [p for kind, names in (("services", SERVICES), ("libs", LIBS)) for n in names for p in _src(kind, n)]
    assert _offenders(every, lambda target: target.startswith(".")) == []


def _reads_environment(path) -> list[int]:
    """Lines that read it. What is written, `os.environ |= ...`, is for a library that knows no other way to be told."""
    names = {"environ", "getenv"}
    return [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr in names and isinstance(node.ctx, ast.Load))
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and names & {a.name for a in node.names})
    ]


def test_the_environment_is_read_in_settings_alone():
    """devstack is the launcher: it makes the environment of the others."""
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for kind, names in (("services", SERVICES), ("libs", [n for n in LIBS if n not in ("devstack", "testkit")]))
        for name in names
        for path in _src(kind, name)
        if path.name != "settings.py"
        for line in _reads_environment(path)
    ]
    assert found == []
