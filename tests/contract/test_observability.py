"""Dashboards and alerts name nothing that does not exist, and every alert is shown to fire and to stay silent."""

import importlib
import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from chassis.settings import ServiceSettings
from contracts.subjects import SUBJECTS
from devstack import topology
from devstack.settings import DEFAULT_BASE_PORT
from testkit import metric_names
from testkit.sources import ROOT, service_names

PROMETHEUS = ROOT / "observability" / "prometheus"
GRAFANA = ROOT / "observability" / "grafana"
RULES = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
ALERTS = {rule["alert"]: rule for group in RULES for rule in group["rules"] if "alert" in rule}
RECORDED = {rule["record"]: rule for group in RULES for rule in group["rules"] if "record" in rule}
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(GRAFANA.glob("*.json"))}
TARGET_LABELS = {"job", "instance", "service"}  # given by prometheus.yml
# Values of labels that are known beforehand; others are only known at run time.
KNOWN_VALUES = {
    "service": set(service_names()),
    "kind": {"prompt", "completion", "cached"},
    "job": {"pressroom"},
}


def _panels(dashboard):
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def _queries():
    """(where, PromQL, legend) of every panel, with Grafana's variables filled in."""
    for name, dashboard in DASHBOARDS.items():
        for panel in _panels(dashboard):
            for target in panel["targets"]:
                expr = target["expr"].replace("$__rate_interval", "5m")
                yield f"{name}: {panel['title']}", re.sub(r"\$[a-z]+", ".*", expr), target["legendFormat"]


EXPRESSIONS = [
    *((where, expr) for where, expr, _ in _queries()),
    *((name, rule["expr"]) for name, rule in (ALERTS | RECORDED).items()),
]


@pytest.fixture(scope="module")
def exported():
    return metric_names.exported() | {name: frozenset() for name in RECORDED}


def _wrong(expr, exported):
    """What an expression names that does not exist."""
    parsed = metric_names.parse(expr)
    wrong, labels = [], set(TARGET_LABELS)
    for named in metric_names.selectors(parsed):
        if named.metric not in exported:
            wrong.append(named.metric)
            continue
        own = exported[named.metric] | TARGET_LABELS
        labels |= own
        for label, op, value in named.matchers:
            if label not in own:
                wrong.append(f"{named.metric}{{{label}}}")
            if label in KNOWN_VALUES and value != ".*":
                wrong += [f"{label}={v}" for v in value.split("|") if v not in KNOWN_VALUES[label]]
            assert op.startswith("MatchOp.")
    return wrong + [f"by ({label})" for label in metric_names.grouped_by(parsed) if label not in labels]


def test_the_scan_of_metrics_sees_those_of_the_library_and_of_a_service(exported):
    """Guards the tests below: it knows names, suffixes and labels as the client library makes them."""
    assert exported["pressroom_requests_total"] == {"service", "method", "code"}
    assert exported["pressroom_ttft_seconds_bucket"] == {"service", "model", "le"}
    assert exported["pressroom_monitor_records_total"] == {"model", "finish_reason"}
    assert "pressroom_running_sequences" in exported and "process_open_fds" in exported
    assert "pressroom_requests" not in exported


@pytest.mark.parametrize(
    ("expr", "wrong"),
    [
        ("pressroom_request_total", ["pressroom_request_total"]),
        ('sum(rate(pressroom_requests_total{tenant="a"}[5m]))', ["pressroom_requests_total{tenant}"]),
        ('pressroom_queue_depth{service="gatway"}', ["service=gatway"]),
        ("sum by (model) (pressroom_queue_depth)", ["by (model)"]),
        ("a_b and on (tenant) pressroom_queue_depth", ["a_b", "by (tenant)"]),
    ],
)
def test_what_does_not_exist_is_found(exported, expr, wrong):
    assert _wrong(expr, exported) == wrong


@pytest.mark.parametrize(("where", "expr"), EXPRESSIONS, ids=[where for where, _ in EXPRESSIONS])
def test_every_metric_and_label_exists(exported, where, expr):
    assert _wrong(expr, exported) == []


def test_every_metric_of_the_platform_is_on_a_dashboard(exported):
    """A metric that nobody looks at is not needed, or its panel was forgotten."""
    shown = {n.metric for _, expr, _ in _queries() for n in metric_names.selectors(metric_names.parse(expr))}
    stems = {
        re.sub(r"_(total|created|bucket|count|sum)$", "", name) for name in exported if name.startswith("pressroom_")
    }
    assert stems - {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in shown} == set()


@pytest.mark.parametrize(("where", "expr", "legend"), list(_queries()))
def test_a_legend_names_labels_that_the_result_has(where, expr, legend):
    assert set(re.findall(r"{{(\w+)}}", legend)) <= metric_names.grouped_by(metric_names.parse(expr))


def test_dashboards_are_what_their_tables_say(tmp_path):
    subprocess.run([sys.executable, ROOT / "tools" / "gen_dashboards.py", tmp_path], check=True, timeout=60)
    fresh = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert fresh == DASHBOARDS, "run tools/gen_dashboards.py"
    assert len(fresh) >= 3


def test_dashboards_have_ids_of_their_own():
    assert {name: board["uid"] for name, board in DASHBOARDS.items()} == {name: name for name in DASHBOARDS}
    assert len({board["title"] for board in DASHBOARDS.values()}) == len(DASHBOARDS)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_can_be_read(name):
    board = DASHBOARDS[name]
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    used = set(re.findall(r"\$([a-z]+)", json.dumps([panel["targets"] for panel in _panels(board)])))
    assert used == set(variables) - {"datasource"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        grid = panel["gridPos"]
        cells = {
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, f"{panel['title']} lies over another"
        taken |= cells
    for panel in _panels(board):
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["description"], panel["title"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
        assert panel["datasource"]["uid"] == "${datasource}"


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_to_do(name):
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in ("page", "ticket")
    notes = alert["annotations"]
    assert set(notes) == {"summary", "description", "runbook_url"}
    assert notes["runbook_url"] == f"docs/runbook.md#{name.lower()}"
    section = re.search(rf"^### {name}\n(.*?)(?=^#|\Z)", RUNBOOK, re.M | re.S)
    assert section, f"docs/runbook.md has no section {name}"
    assert all(f"**{part}**" in section[1] for part in ("Means.", "Look.", "Do.")), f"{name}: means, look, do"
    parsed = metric_names.parse(alert["expr"])
    known = metric_names.grouped_by(parsed) or TARGET_LABELS
    used = set(re.findall(r"\$labels\.(\w+)", notes["summary"] + notes["description"]))
    assert used <= known | (TARGET_LABELS if "sum" not in alert["expr"] else set())


def test_the_runbook_has_no_section_of_an_alert_that_is_gone():
    assert set(re.findall(r"^### (Pressroom\w+)$", RUNBOOK, re.M)) == set(ALERTS)


def test_the_runbook_names_commands_that_exist():
    """Every `./pressroom WORD` in it is a command of the command line."""
    words = set(re.findall(r"\./pressroom ([a-z]+)", RUNBOOK))
    done = subprocess.run([sys.executable, "-m", "devstack", "--help"], capture_output=True, text=True, timeout=60)
    commands = set(re.findall(r"^  ([a-z]+)  ", done.stdout, re.M))
    assert words and words <= commands


def test_the_runbook_names_settings_that_exist():
    named = set(re.findall(rf"\b((?:{'|'.join(map(str.upper, service_names()))})_[A-Z_]+)\b", RUNBOOK))
    assert len(named) >= 5
    for name in named:
        service, _, field = name.lower().partition("_")
        (settings,) = [
            c
            for c in vars(importlib.import_module(f"{service}.settings")).values()
            if isinstance(c, type) and issubclass(c, ServiceSettings) and c is not ServiceSettings
        ]
        assert field in settings.model_fields, name


def test_every_alert_has_a_case_in_which_it_fires_and_the_healthy_day_is_silent():
    cases = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    fires = {match[1] for case in cases if (match := re.search(r"fires (\w+)$", case["name"]))}
    assert fires == set(ALERTS)
    for case in cases:
        if match := re.search(r"fires (\w+)$", case["name"]):
            expected = [s["labels"] for check in case["promql_expr_test"] for s in check["exp_samples"]]
            assert expected and set(expected) == {f'{{alertname="{match[1]}"}}'}, case["name"]
    healthy = cases[0]
    assert [check["exp_samples"] for check in healthy["promql_expr_test"][:3]] == [[], [], []]
    fed = {re.match(r"\w+", series["series"])[0] for series in healthy["input_series"]}
    named = {n.metric for rule in ALERTS.values() for n in metric_names.selectors(metric_names.parse(rule["expr"]))}
    # Not fed: no healthy gateway limits alone, and recorded names are computed.
    assert named - fed <= {"pressroom_limiter_local_decisions_total", *RECORDED}


@pytest.mark.parametrize("file", ["prometheus.yml", "prometheus-compose.yml"])
def test_promtool_accepts_the_configuration(file):
    _promtool("check", "config", str(PROMETHEUS / file))


@pytest.mark.integration
def test_promtool_accepts_the_rules_and_every_alert_fires_when_it_should():
    _promtool("check", "rules", str(PROMETHEUS / "alerts.yml"))
    _promtool("test", "rules", str(PROMETHEUS / "alerts_test.yml"))


def _promtool(*arguments):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: the package prometheus)")
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr


def _static_targets(file):
    (job,) = yaml.safe_load((PROMETHEUS / file).read_text())["scrape_configs"]
    assert job["job_name"] == "pressroom" and job["honor_labels"]
    return {entry["labels"]["service"]: entry["targets"] for entry in job["static_configs"]}


def test_prometheus_scrapes_every_service_at_its_port():
    ports = {name: DEFAULT_BASE_PORT + topology.PORT_OFFSETS[f"{name}.http"] for name in service_names()}
    assert _static_targets("prometheus.yml") == {name: [f"127.0.0.1:{port}"] for name, port in ports.items()}


def test_prometheus_in_a_cluster_gives_the_same_labels():
    """Read as YAML alone: Debian's promtool is built without the discovery of Kubernetes."""
    (job,) = yaml.safe_load((PROMETHEUS / "prometheus-k8s.yml").read_text())["scrape_configs"]
    assert job["job_name"] == "pressroom" and job["honor_labels"]
    assert "service" in {rule.get("target_label") for rule in job["relabel_configs"]}


def test_prometheus_in_containers_scrapes_every_service_at_the_port_of_its_image():
    targets = _static_targets("prometheus-compose.yml")
    assert set(targets) == set(service_names())
    for name in service_names():
        dockerfile = ROOT / "services" / name / "Dockerfile"
        if dockerfile.exists():
            (port,) = re.findall(rf"{name.upper()}_HTTP_PORT=(\d+)", dockerfile.read_text())
            assert targets[name] == [f"{name}:{port}"]


def test_consumers_that_the_alerts_watch_are_in_the_table_of_subjects():
    """The alerts of stuck queues name the services that take jobs: whoever is added belongs to one of them."""
    workers = {consumer for row in SUBJECTS if row.stream == "JOBS" for consumer in row.consumers} - {"gateway"}
    watched = ALERTS["PressroomQueueStuck"]["expr"] + ALERTS["PressroomJobsStuck"]["expr"]
    assert {worker for worker in workers if worker not in watched} == set()
