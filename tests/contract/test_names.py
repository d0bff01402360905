"""Names that others rely on stand where they should: subjects, metrics, services, settings; and names that may not."""

import importlib
import re
from typing import get_args

import pytest
import yaml
from prometheus_client import REGISTRY
from pydantic import SecretStr
from pydantic_core import PydanticUndefined

import chassis.metrics
from chassis.settings import ServiceSettings
from contracts.subjects import STREAMS, SUBJECTS
from devstack import topology
from testkit import sources
from testkit.sources import ROOT

SERVICES = sources.service_names()

# The design's list, written out: prefix `pressroom.` everywhere.
DESIGNED_SUBJECTS = {
    "events.request.completed",
    "events.guard.flagged",
    "events.document.indexed",
    "events.drift.detected",
    "events.model.published",
    "events.model.promoted",
    "events.model.rolledback",
    "jobs.ingest",
    "jobs.batch",
    "jobs.train",
    "jobs.evaluate",
    "progress.*",
    "control.keys.revoked",
    "control.request.cancel",
}
DESIGNED_STREAMS = {
    "EVENTS": ("limits", 7 * 86_400),
    "JOBS": ("workqueue", 0),
    "PROGRESS": ("limits", 3_600),
    "DEAD": ("limits", 30 * 86_400),
}
PUBLISHED_METRICS = {
    "pressroom_requests_total",
    "pressroom_request_seconds",
    "pressroom_ttft_seconds",
    "pressroom_tpot_seconds",
    "pressroom_tokens_total",
    "pressroom_running_sequences",
    "pressroom_waiting_sequences",
    "pressroom_queue_depth",
}


def test_the_subjects_table_is_the_designs():
    assert {row.subject for row in SUBJECTS} == {f"pressroom.{subject}" for subject in DESIGNED_SUBJECTS}
    assert {s.name: (s.retention, s.max_age_s) for s in STREAMS} == DESIGNED_STREAMS
    assert all(stream.max_bytes > 0 for stream in STREAMS), "a stream without a bound fills the disk"


def test_the_bus_that_we_start_has_room_for_all_streams():
    """A stream that does not fit is refused, and the services that need it never become ready."""
    (room,) = re.findall(r"max_file_store: (\d+)GB", topology._NATS_CONFIG)
    assert sum(stream.max_bytes for stream in STREAMS) <= int(room) * 1000**3


def test_every_producer_and_consumer_of_a_subject_is_a_service():
    for row in SUBJECTS:
        named = {*re.split(r",\s*", row.producer), *row.consumers}
        assert named <= set(SERVICES), row


def test_a_work_queue_has_one_consumer():
    assert [row.subject for row in SUBJECTS if row.stream == "JOBS" and len(row.consumers) != 1] == []


def test_the_published_metrics_exist_under_their_names():
    assert chassis.metrics.TOKENS._labelnames[-1] == "kind"
    names = {
        metric.name + ("_total" if metric.type == "counter" else "")
        for metric in REGISTRY.collect()
        if metric.name.startswith("pressroom_")
    }
    assert names >= PUBLISHED_METRICS


def test_every_metric_of_a_service_carries_the_platforms_prefix():
    defined = re.compile(r"\b(?:Counter|Gauge|Histogram|Summary)\(\s*\"([^\"]+)\"")
    found = {
        name: path.relative_to(ROOT)
        for kind in ("services", "libs")
        for path in sources.python_files(ROOT / kind)
        if "tests" not in path.parts
        for name in defined.findall(path.read_text())
    }
    assert "pressroom_requests" in found
    assert {name: path for name, path in found.items() if not name.startswith("pressroom_")} == {}


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_is_complete(service):
    folder = ROOT / "services" / service
    missing = [
        name
        for name in ("README.md", "pyproject.toml", f"src/{service}/main.py", f"src/{service}/settings.py", "tests")
        if not (folder / name).exists()
    ]
    assert missing == [], f"services/{service} lacks {missing}"
    assert f'name = "pressroom-{service}"' in (folder / "pyproject.toml").read_text()
    assert (ROOT / "proto" / "pressroom" / service).is_dir()


def test_topology_folders_and_readme_name_the_same_services():
    readme = (ROOT / "README.md").read_text()
    rows = set(re.findall(r"^\| \[?`?([a-z]+)`?\]?(?:\([^)]*\))? \|", readme, re.MULTILINE))
    forgotten = {
        "devstack.topology": set(SERVICES) - set(topology.SERVICES),
        "services/": set(topology.SERVICES) - set(SERVICES),
        "README.md": set(SERVICES) - rows,
        "ports": {f"{s}.{p}" for s in SERVICES for p in ("grpc", "http")} - set(topology.PORT_OFFSETS),
    }
    base = yaml.safe_load((ROOT / "k8s" / "base" / "kustomization.yaml").read_text())["resources"]
    forgotten["k8s/base"] = {f"{name}.yaml" for name in (*SERVICES, "nats", "valkey")} - set(base)
    assert {place: names for place, names in forgotten.items() if names} == {}
    assert len(set(topology.PORT_OFFSETS.values())) == len(topology.PORT_OFFSETS)


@pytest.mark.parametrize("service", SERVICES)
def test_settings_have_the_services_prefix_and_say_what_each_field_means(service):
    module = importlib.import_module(f"{service}.settings")
    (settings,) = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, ServiceSettings) and c is not ServiceSettings
    ]
    assert settings.model_config["env_prefix"] == f"{service.upper()}_"
    assert settings.model_config["frozen"]
    assert [name for name, field in settings.model_fields.items() if not field.description] == []
    no_value = (None, PydanticUndefined)
    secrets = {
        name: f for name, f in settings.model_fields.items() if SecretStr in (f.annotation, *get_args(f.annotation))
    }
    assert [name for name, f in secrets.items() if f.default not in no_value] == [], "a secret has no default"
    named_so = re.compile(r"pepper|password|secret|bootstrap_.*key")
    assert [name for name in settings.model_fields if named_so.search(name) and name not in secrets] == []


def test_no_module_has_a_name_that_says_nothing():
    banned = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
    kinds = ("services", "libs", "loadtest", "tests", "tools")
    modules = [p for kind in kinds for p in sources.python_files(ROOT / kind)]
    assert [str(p.relative_to(ROOT)) for p in modules if banned & {p.stem, p.parent.name}] == []


def test_no_file_names_a_path_of_the_machine_it_was_written_on():
    # Put together here, so that this file does not find itself.
    folders = "|".join(("wo" + "rk", "ro" + "ot", "ho" + "me/[a-z]+"))
    pattern = re.compile(rf"(?<![\w./$}}-])/(?:{folders})/")
    found = []
    for path in sources.tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}"
            for number, line in enumerate(text.splitlines(), 1)
            if pattern.search(line)
        ]
    assert found == []
