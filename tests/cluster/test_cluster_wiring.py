"""The manifests against our own sources: services, settings, addresses, probes, times, and no secret in git."""

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pydantic import ValidationError

from chassis.app import LIVENESS
from chassis.settings import ServiceSettings
from devstack import topology
from devstack.home import Home
from testkit import sources
from testkit.manifests import CHECKS, VARIANTS, tool
from testkit.sources import ROOT

pytestmark = pytest.mark.integration

SERVICES = sources.service_names()
ADDRESS = re.compile(r"(?:[a-z]+://(?:[^@/]*@)?)?([a-z][a-z0-9-]*):(\d+)(?:/\d+)?")
ALL = pytest.mark.parametrize("service", SERVICES)
QUANTITY = {"": 1, "m": 0.001, "Mi": 2**20, "Gi": 2**30}


def _settings(service: str) -> type[ServiceSettings]:
    module = importlib.import_module(f"{service}.settings")
    (found,) = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, ServiceSettings) and c is not ServiceSettings
    ]
    return found


def _amount(text: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)(m|Mi|Gi|)", str(text)).groups()
    return float(number) * QUANTITY[unit]


def test_the_cluster_runs_what_the_launcher_runs(cluster):
    milvus = {"milvus"} if cluster.variant.startswith("dev") else set()
    assert {name for name, _ in cluster.workloads()} == {*SERVICES, "nats", "valkey", "models"} | milvus
    assert {*topology.SERVICES} == {*SERVICES}
    assert milvus or cluster.named("NetworkPolicy", "retriever-milvus")["spec"]["egress"], "prod's Milvus is outside"


@ALL
def test_a_service_is_told_what_its_settings_ask_for_and_nothing_they_do_not_know(cluster, service, monkeypatch):
    settings, prefix = _settings(service), f"{service.upper()}_"
    told = cluster.environment(service)
    known = {prefix + field.upper() for field in settings.model_fields}
    assert {name for name in told if name.startswith(prefix)} - known == set()
    required = {prefix + n.upper() for n, f in settings.model_fields.items() if f.is_required()}
    assert required - set(told) == set()
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    try:
        loaded = settings()
    except ValidationError as error:
        pytest.fail(str(error))
    assert (loaded.host, loaded.grpc_port, loaded.http_port, loaded.log_format) == ("0.0.0.0", 9000, 8000, "json")


@ALL
def test_a_service_is_told_of_its_neighbours_as_the_launcher_tells_it(cluster, service):
    """What the launcher sets, the cluster sets too, but for what only the launcher has."""
    (row,) = [row for row in topology.ROWS if row.name == service]
    wiring = _wiring()
    named = {f"{service.upper()}_{key}" for key in row.extra(wiring)}
    told = {name for name in cluster.environment(service) if name.startswith(f"{service.upper()}_")}
    assert named - told == set()


def _wiring():
    ports = dict.fromkeys(topology.PORT_OFFSETS, 1)
    made = dict.fromkeys(("NATS_PASSWORD", "VALKEY_PASSWORD", "KEY_PEPPER"), "x")
    keys = dict.fromkeys(("PRESSROOM_API_KEY", "PRESSROOM_ADMIN_KEY"), "x")
    return topology.Wiring(Home(Path("/nowhere")), ports, made, keys, "INFO", 2, {})


def test_every_address_is_a_service_and_a_port_that_are_there(cluster):
    ports = {d["metadata"]["name"]: {p["port"] for p in d["spec"]["ports"]} for d in cluster.of("Service")}
    num_seen = 0
    for name, _ in cluster.workloads():
        for variable, value in cluster.environment(name).items():
            match = ADDRESS.fullmatch(value)
            if match is None or match[1] == "milvus.example":
                continue
            num_seen += 1
            assert int(match[2]) in ports.get(match[1], ()), f"{name}: {variable}={value}"
    assert num_seen >= 18


def test_services_and_budgets_select_the_pods_of_their_name_and_ports_exist(cluster):
    for document in cluster.of("Service", "PodDisruptionBudget"):
        selector = document["spec"]["selector"]
        selector = selector.get("matchLabels", selector)
        chosen = [name for name, _ in cluster.workloads() if selector.items() <= cluster.labels(name).items()]
        assert chosen == [document["metadata"]["name"]]
        if document["kind"] == "Service":
            names = {port["name"] for port in cluster.container(chosen[0])["ports"]}
            assert {port["targetPort"] for port in document["spec"]["ports"]} <= names
    for document in cluster.of("Deployment", "StatefulSet"):
        labels = cluster.labels(document["metadata"]["name"])
        assert document["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_every_workload_has_a_budget_and_what_scales_shares_nothing(cluster):
    budgets = {d["metadata"]["name"] for d in cluster.of("PodDisruptionBudget")}
    lasting = {d["metadata"]["name"]: d for d in cluster.of("Deployment", "StatefulSet")}
    assert budgets == set(lasting)
    assert {d["spec"].get("maxUnavailable") for d in cluster.of("PodDisruptionBudget")} == {1}
    scaled = {d["spec"]["scaleTargetRef"]["name"]: d for d in cluster.of("HorizontalPodAutoscaler")}
    assert set(scaled) == ({"embedder", "generator"} if cluster.variant.startswith("prod") else set())
    for name, document in lasting.items():
        assert document["spec"].get("replicas", 1) == 1
        assert ("replicas" in document["spec"]) == (name not in ("embedder", "generator")), "an apply resets the count"
        assert not (name in scaled and document["spec"].get("volumeClaimTemplates"))
    for name, scaler in scaled.items():
        assert scaler["spec"]["scaleTargetRef"]["kind"] == lasting[name]["kind"]
        assert cluster.named("Service", name)["spec"]["clusterIP"] == "None", "gRPC clients go round a name's addresses"
        assert f"{name.upper()}_MAX_CONNECTION_AGE_S" in cluster.environment(name), "or a new replica gets no calls"


@ALL
def test_a_pod_gets_longer_to_end_than_its_service_takes(cluster, service):
    spec = dict(cluster.workloads())[service]
    default = ServiceSettings.model_fields["shutdown_grace_s"].default
    grace_s = float(cluster.environment(service).get(f"{service.upper()}_SHUTDOWN_GRACE_S", default))
    pre_stop_s = cluster.container(service)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pre_stop_s >= 5
    # chassis.app: drainers, servers and tasks get the grace period each, one after the other.
    assert spec["terminationGracePeriodSeconds"] > pre_stop_s + 3 * grace_s + 2


@ALL
def test_probes_ask_for_names_that_the_service_registers(cluster, service):
    container = cluster.container(service)
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["grpc"] == {"port": 9000, "service": LIVENESS}
    main = (ROOT / "services" / service / "src" / service / "main.py").read_text()
    if service == "gateway":
        assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    else:
        own = f"pressroom.{service}.v1.{service.capitalize()}Service"
        assert container["readinessProbe"]["grpc"] == {"port": 9000, "service": own}
        assert f'"{own}"' in main
    # Loading a model may take minutes; after that a stuck process is noticed within about a minute.
    startup, liveness = container["startupProbe"], container["livenessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 120
    assert liveness["periodSeconds"] * liveness["failureThreshold"] <= 60


def test_pods_are_shut_in(cluster):
    for name, spec in cluster.workloads():
        assert spec["automountServiceAccountToken"] is False and spec["serviceAccountName"] == name
        assert spec["enableServiceLinks"] is False, f"{name}: GATEWAY_PORT=tcp://... would look like a setting"
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True and context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (10001, 10001, 10001)
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            inner = container["securityContext"]
            assert inner["readOnlyRootFilesystem"] is True and inner["allowPrivilegeEscalation"] is False
            assert inner["capabilities"] == {"drop": ["ALL"]}
            resources = container["resources"]
            for kind in ("cpu", "memory"):
                assert _amount(resources["requests"][kind]) <= _amount(resources["limits"][kind])
            assert ":latest" not in container["image"] and re.search(r":[0-9]|@sha256:", container["image"])


def test_images_run_as_the_user_that_the_manifests_name(cluster):
    for name, _ in cluster.workloads():
        place = "services" if name in SERVICES else "deploy"
        text = (ROOT / place / name / "Dockerfile").read_text()
        assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["10001:10001"]


def test_the_bus_of_the_image_keeps_what_it_acknowledged_on_a_volume_that_is_large_enough(cluster):
    config = (ROOT / "deploy" / "nats" / "nats.conf").read_text()
    assert "sync_interval: always" in config and 'store_dir: "/data"' in config
    (claim,) = cluster.named("StatefulSet", "nats")["spec"]["volumeClaimTemplates"]
    (room,) = re.findall(r"max_file_store: (\d+)GB", config)
    assert _amount(claim["spec"]["resources"]["requests"]["storage"]) > int(room) * 10**9
    assert {"name": "data", "mountPath": "/data"} in cluster.container("nats")["volumeMounts"]


def test_jobs_give_way_to_what_a_client_waits_for(cluster):
    values = {d["metadata"]["name"]: d["value"] for d in cluster.of("PriorityClass")}
    classes = {name: values[spec["priorityClassName"]] for name, spec in cluster.workloads()}
    jobs = {"trainer", "evaluator", "monitor"}
    assert max(classes[name] for name in jobs) < min(value for name, value in classes.items() if name not in jobs)
    request = {name: _amount(cluster.container(name)["resources"]["requests"]["cpu"]) for name in classes}
    assert request["trainer"] <= request["generator"] / 5, "the request is the weight where cores are contended"


def test_only_the_trainer_writes_to_the_model_store_and_only_adapters(cluster):
    for name, spec in cluster.workloads():
        for container in spec["containers"]:
            writable = {
                mount.get("subPath", "/")
                for mount in container["volumeMounts"]
                if mount["name"] == "models" and not mount.get("readOnly")
            }
            assert writable == {"trainer": {"adapters"}, "models": {"/"}}.get(name, set())


def test_a_pod_waits_for_the_model_that_it_loads(cluster, tmp_path):
    for name in ("embedder", "generator", "monitor"):
        (wait,) = dict(cluster.workloads())[name]["initContainers"]
        folder = {k: v for k, v in cluster.environment(name).items() if k.endswith(("MODEL_DIR", "ENCODER_DIR"))}
        assert [wait["command"][-1]] == list(folder.values())
    script = ROOT / "k8s" / "base" / "wait_for_model.py"
    (tmp_path / "manifest.json").touch()
    subprocess.run([CHECKS / "python", script, tmp_path], check=True, timeout=30)


def test_the_gpu_component_asks_for_a_gpu_and_the_gpu_images(render):
    for overlay, image in (("dev", ":0.1.0-gpu"), ("prod", "@sha256:")):
        cluster = render(f"{overlay}+gpu")
        for name, spec in cluster.workloads():
            on_gpu = name in ("embedder", "generator")
            limits = cluster.container(name)["resources"]["limits"]
            assert limits.get("nvidia.com/gpu") == ("1" if on_gpu else None)
            assert ("nodeSelector" in spec) == on_gpu and ("tolerations" in spec) == on_gpu
            assert (image in cluster.container(name)["image"]) or not on_gpu
            assert "-gpu" not in cluster.container(name)["image"].split("/")[-1].split(":")[0]
        assert cluster.environment("embedder")["EMBEDDER_DEVICE"] == "cuda"


def test_no_secret_lies_in_git_and_none_has_a_default():
    for path in (ROOT / "k8s").rglob("*.yaml"):
        text = path.read_text()
        assert not re.search(r"^kind: Secret$|literals:|stringData", text, re.MULTILINE), path
    listed = [path.relative_to(ROOT).as_posix() for path in sources.tracked_files()]
    assert [name for name in listed if name.startswith("k8s/") and "/secrets/" in name] == []
    assert "k8s/overlays/*/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_an_overlay_without_its_secrets_is_refused_and_made_ones_differ(checkout, tmp_path, overlay):
    bare = shutil.copytree(checkout / "k8s", tmp_path / "k8s")
    shutil.rmtree(bare / "overlays" / overlay / "secrets")
    done = tool("kubectl", "kustomize", bare / "overlays" / overlay)
    assert done.returncode != 0 and "secrets/" in done.stderr
    files = sorted((checkout / "k8s" / "overlays" / overlay / "secrets").iterdir())
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    other = checkout / "k8s" / "overlays" / {"dev": "prod", "prod": "dev"}[overlay] / "secrets"
    for name in ("nats", "valkey", "gateway"):
        pairs = dict(
            line.split("=", 1)
            for line in (other.parent.parent / overlay / "secrets" / f"{name}.env").read_text().splitlines()
        )
        assert all(len(value) >= 32 for value in pairs.values())
        assert (other / f"{name}.env").read_text() != (files[0].parent / f"{name}.env").read_text()


def test_all_variants_are_looked_at():
    overlays = {path.name for path in (ROOT / "k8s" / "overlays").iterdir() if path.is_dir()}
    assert overlays == {variant for variant in VARIANTS if "+" not in variant}
