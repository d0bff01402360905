"""Who may speak to whom in the cluster: both ends of every policy against one table, the table against the settings."""

import re

import pytest

from testkit import sources

pytestmark = pytest.mark.integration

SERVICES = sources.service_names()
EDGES = {
    *{("gateway", name, 9000) for name in ("embedder", "retriever", "generator", "evaluator", "trainer", "monitor")},
    ("gateway", "valkey", 6379),
    ("retriever", "embedder", 9000),
    ("retriever", "gateway", 9000),  # files
    ("evaluator", "generator", 9000),
    ("evaluator", "gateway", 9000),  # files, and the served graph
    ("trainer", "generator", 9000),
    ("trainer", "gateway", 9000),  # files
    *{(name, "nats", 4222) for name in ("gateway", "retriever", "generator", "evaluator", "trainer", "monitor")},
}
MILVUS = ("retriever", "milvus", 19530)
DNS_PORTS = [("UDP", 53), ("TCP", 53)]


def _policies(cluster):
    """The policies that are one end of an edge: by the pods that they are for."""
    for document in cluster.of("NetworkPolicy"):
        if document["metadata"]["name"] not in ("default-deny", "names", "metrics"):
            yield document["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/name"], document["spec"]


def _ends(rules, key):
    for rule in rules:
        for peer in rule.get(key, []):
            for port in rule["ports"]:
                assert port["protocol"] == "TCP"
                if "namespaceSelector" in peer:
                    yield "outside", port["port"]
                else:
                    labels = peer["podSelector"]["matchLabels"]
                    assert set(labels) == {"app.kubernetes.io/name", "app.kubernetes.io/part-of"}
                    yield labels["app.kubernetes.io/name"], port["port"]


def test_policies_allow_exactly_the_edges_of_the_table_from_both_ends(cluster):
    out = {
        (name, peer, port) for name, spec in _policies(cluster) for peer, port in _ends(spec.get("egress", []), "to")
    }
    into = {
        (peer, name, port) for name, spec in _policies(cluster) for peer, port in _ends(spec.get("ingress", []), "from")
    }
    if cluster.variant.startswith("dev"):
        assert out == into == EDGES | {MILVUS}
    else:
        assert into == EDGES
        assert out == EDGES | {("retriever", "outside", 19530)}


def test_everything_else_is_denied_but_names_and_metrics(cluster):
    assert cluster.named("NetworkPolicy", "default-deny")["spec"] == {
        "podSelector": {},
        "policyTypes": ["Ingress", "Egress"],
    }
    (rule,) = cluster.named("NetworkPolicy", "names")["spec"]["egress"]
    assert [(port["protocol"], port["port"]) for port in rule["ports"]] == DNS_PORTS
    (rule,) = cluster.named("NetworkPolicy", "metrics")["spec"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == [8000] and "namespaceSelector" in rule["from"][0]


def test_the_gateways_sides_that_ask_for_keys_are_open_alone(cluster):
    open_to_all = [
        (name, [port["port"] for port in rule["ports"]])
        for name, spec in _policies(cluster)
        for rule in spec.get("ingress", [])
        if not rule.get("from")
    ]
    assert open_to_all == [("gateway", [8000, 8001])]
    told = cluster.environment("gateway")
    assert (told["GATEWAY_HTTP_PORT"], told["GATEWAY_PUBLIC_GRPC_PORT"]) == ("8000", "8001")
    assert [rule for _, spec in _policies(cluster) for rule in spec.get("egress", []) if not rule.get("to")] == []


def test_an_edge_is_open_where_an_address_is_told_and_nowhere_else(cluster):
    told = set()
    for name in SERVICES:
        for variable, value in cluster.environment(name).items():
            match = re.fullmatch(r"(?:[a-z]+://(?:[^@/]*@)?)?([a-z]+):(\d+)(?:/\d+)?", value)
            if match and variable.startswith(name.upper()):
                told.add((name, match[1], int(match[2])))
    assert told - {MILVUS} == EDGES


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_what_scrapes_finds_the_metrics(render, overlay):
    cluster = render(overlay)
    for name in SERVICES:
        (document,) = [d for d in cluster.of("Deployment", "StatefulSet") if d["metadata"]["name"] == name]
        notes = document["spec"]["template"]["metadata"]["annotations"]
        assert (notes["prometheus.io/scrape"], notes["prometheus.io/port"], notes["prometheus.io/path"]) == (
            "true",
            "8000",
            "/metrics",
        )
        assert cluster.labels(name)["app.kubernetes.io/component"] in ("serving", "jobs")


def test_the_service_monitor_finds_the_ports_of_every_service(render):
    cluster = render("prod+service-monitor")
    (monitor,) = cluster.of("ServiceMonitor")
    labels = monitor["spec"]["selector"]["matchLabels"]
    (endpoint,) = monitor["spec"]["endpoints"]
    scraped = {
        document["metadata"]["name"]
        for document in cluster.of("Service")
        if labels.items() <= document["metadata"]["labels"].items()
        and endpoint["port"] in {port["name"] for port in document["spec"]["ports"]}
    }
    assert scraped == set(SERVICES)
