"""Which metrics the services export, read from their sources; and which a PromQL expression names. For tests of rules.

A definition is a call of prometheus_client's Counter, Gauge, Histogram or Summary with its name and labels written out.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import promql_parser
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

from testkit.sources import ROOT, lib_names, python_files, service_names

_SUFFIXES = {
    "Counter": ("_total", "_created"),
    "Gauge": ("",),
    "Histogram": ("_bucket", "_count", "_sum", "_created"),
    "Summary": ("", "_count", "_sum", "_created"),
}
# What Prometheus itself knows of a target.
_SCRAPE = ("up", "scrape_duration_seconds", "scrape_samples_scraped")


@dataclass(frozen=True, slots=True)
class Named:
    """A metric in an expression: the labels that are matched, with the values that are matched exactly or listed."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]


def exported() -> dict[str, frozenset[str]]:
    """Every series that a scrape of the services gives, with its labels; those of a target (job, instance) left out."""
    found = {name: frozenset[str]() for name in _SCRAPE}
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    for family in registry.collect():
        for sample in family.samples:
            found[sample.name] = frozenset(sample.labels)
    for kind, names in (("libs", lib_names()), ("services", service_names())):
        for name in names:
            for path in python_files(ROOT / kind / name / "src"):
                found |= _defined(path.read_text())
    return found


def _defined(source: str) -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _SUFFIXES):
            continue
        if not (node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)):
            continue
        labels = frozenset(ast.literal_eval(node.args[2])) if len(node.args) > 2 else frozenset()
        for suffix in _SUFFIXES[node.func.id]:
            own = {"le"} if suffix == "_bucket" else set()
            found[node.args[0].value.removesuffix("_total") + suffix] = labels | own
    return found


def parse(expression: str) -> Any:
    """Parses PromQL; raises ValueError for what Prometheus would refuse."""
    return promql_parser.parse(expression)


def selectors(node: Any) -> Iterator[Named]:
    """Every metric that a parsed expression names."""
    if isinstance(node, promql_parser.VectorSelector):
        matchers = tuple((m.name, str(m.op), m.value) for m in node.matchers.matchers)
        yield Named(node.name or "", matchers)
    for child in _children(node):
        yield from selectors(child)


def grouped_by(node: Any) -> frozenset[str]:
    """The labels that aggregations and joins of a parsed expression name."""
    found = frozenset(node.modifier.labels) if isinstance(node, promql_parser.AggregateExpr) and node.modifier else []
    if isinstance(node, promql_parser.BinaryExpr) and node.modifier and node.modifier.matching:
        found = frozenset(node.modifier.matching.labels)
    return frozenset(found).union(*(grouped_by(child) for child in _children(node)))


def _children(node: Any) -> list[Any]:
    if isinstance(node, promql_parser.MatrixSelector):
        return [node.vector_selector]
    if isinstance(node, promql_parser.Call):
        return list(node.args)
    if isinstance(node, promql_parser.BinaryExpr):
        return [node.lhs, node.rhs]
    return [node.expr] if hasattr(node, "expr") else []
