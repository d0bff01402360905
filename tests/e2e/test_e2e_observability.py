"""What the dashboards and alerts name is what the running services say at /metrics, name and labels."""

import json
import re

import yaml
from prometheus_client.parser import text_string_to_metric_families

from devstack import topology
from testkit import eventually_sync, metric_names
from testkit.sources import ROOT

FOLDER = ROOT / "observability"


def _named():
    expressions = [
        target["expr"].replace("$__rate_interval", "5m")
        for path in (FOLDER / "grafana").glob("*.json")
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", ())
    ]
    for group in yaml.safe_load((FOLDER / "prometheus" / "alerts.yml").read_text())["groups"]:
        expressions += [rule["expr"] for rule in group["rules"]]
    parsed = [metric_names.parse(re.sub(r"\$[a-z]+", ".*", expr)) for expr in expressions]
    return {named.metric for each in parsed for named in metric_names.selectors(each)}


def test_every_metric_that_is_watched_is_told_by_a_service(system):
    families: dict[str, set[str]] = {}
    for service in topology.SERVICES:
        for family in text_string_to_metric_families(system.metrics(service)):
            families.setdefault(family.name, set()).add(service)
    wanted = {name for name in _named() if not name.startswith("pressroom:") and name not in ("up",)}
    assert len(wanted) > 20
    told = {name + suffix for name in families for suffix in ("", "_total", "_bucket", "_count", "_sum")}
    assert wanted - told == set()
    assert families["pressroom_queue_depth"] == set(topology.SERVICES)


def test_the_labels_of_what_is_told_are_those_that_the_sources_say(system):
    """What dashboards and alerts were checked against is what comes: the scan of the sources is not wishful."""
    system.say("Which service keeps the access keys?", model="rag", max_tokens=4)
    exported = metric_names.exported()

    def told():
        found = {}
        for service in topology.SERVICES:
            for family in text_string_to_metric_families(system.metrics(service)):
                for sample in family.samples:
                    if sample.name.startswith("pressroom_"):
                        found[sample.name] = frozenset(sample.labels)
        return found if "pressroom_monitor_records_total" in found else None

    samples = eventually_sync(told, 30, interval_s=0.5)
    assert len(samples) > 15
    assert {name: labels for name, labels in samples.items() if exported.get(name) != labels} == {}
