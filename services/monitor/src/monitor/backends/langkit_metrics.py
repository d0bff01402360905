"""Profiles of prompts and responses: LangKit's metrics in a whylogs profile, and similarities by our own encoder.

Imports whylogs and LangKit, seconds and 200 MB, so it belongs in the worker alone. Of LangKit come those metrics that
need no download: regexes, text statistics and readability, VADER's sentiment. Its modules for themes, injections and
relevance import torch and fetch a model and a file at import: their place is taken by whylogs UDFs of ours.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chassis.errors import Code, PlatformError
from monitor.backends.onnx_similarity import OnnxTextEncoder, mean, similarity

ATTACKS = Path(__file__).parent.parent / "attacks" / "known_attacks.json"
_LANGKIT_MODULES = ("regexes", "count_regexes", "textstat", "vader_sentiment")
_TEXT_COLUMNS = ("prompt", "response")
_PATTERN_COLUMNS = tuple(f"{column}.has_patterns" for column in _TEXT_COLUMNS)
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Added:
    """A profile with texts added. `failed`: positions of pairs that no metric could be had of."""

    binary: bytes
    statistics: dict[str, dict[str, Any]]
    failed: list[int]


class TextProfiler:
    """Adds texts to profiles. Made by `load`, which blocks for seconds."""

    def __init__(self, encoder: OnnxTextEncoder, attacks: Mapping[str, Any]) -> None:
        self._whylogs = importlib.import_module("whylogs.core")
        for name in _LANGKIT_MODULES:
            importlib.import_module(f"langkit.{name}")
        _check_textstat()
        self.langkit_version = importlib.metadata.version("langkit")
        self.attacks_version = str(attacks["version"])
        self._encoder = encoder
        self._encode = functools.lru_cache(maxsize=1)(encoder.encode)  # two metrics read one prompt
        self._attacks = np.concatenate([encoder.encode(phrase) for phrase in attacks["phrases"]])
        udfs = importlib.import_module("whylogs.experimental.core.udf_schema")
        self._metrics = udfs.udf_schema(
            other_udf_specs=[
                udfs.UdfSpec(["prompt"], {"prompt.attack_similarity": self._attack_similarity}),
                udfs.UdfSpec(["prompt", "response"], {"response.relevance_to_prompt": self._relevance}),
            ]
        )
        self._schema = _profile_schema()

    @classmethod
    def load(cls, encoder_dir: Path, attacks: Path = ATTACKS) -> "TextProfiler":
        """Loads the libraries, the encoder and the known attacks. Raises PlatformError where one is not as it should
        be."""
        _make_ready()
        return cls(OnnxTextEncoder.load(encoder_dir), json.loads(attacks.read_text(encoding="utf-8")))

    def add(self, binary: bytes | None, texts: Sequence[tuple[str, str]]) -> Added:
        """Adds prompts and responses to a profile; an empty text has no columns."""
        profile = self._whylogs.DatasetProfile(schema=self._schema)
        failed = []
        for i, (prompt, response) in enumerate(texts):
            try:
                profile.track(row=self._measured(prompt, response))
            except Exception:  # the libraries raise what they like; the pair is reported and left out
                failed.append(i)
        view = profile.view()
        if binary is not None:
            view = self._whylogs.DatasetProfileView.deserialize(zlib.decompress(binary)).merge(view)
        return Added(zlib.compress(view.serialize(), 1), _summary(view), failed)

    def _measured(self, prompt: str, response: str) -> dict[str, Any]:
        texts = {name: text for name, text in zip(_TEXT_COLUMNS, (prompt, response), strict=True) if text}
        _, columns = self._metrics.apply_udfs(row=texts)
        # The texts themselves are no columns: a profile holds numbers and names of patterns.
        return {name: value for name, value in columns.items() if name not in texts}

    def _attack_similarity(self, texts: Mapping[str, Sequence[str]]) -> list[float]:
        return [similarity(self._encode(prompt), self._attacks) for prompt in texts["prompt"]]

    def _relevance(self, texts: Mapping[str, Sequence[str]]) -> list[float]:
        # Of the response its beginning alone: the encoder takes more time than all other metrics together.
        return [
            similarity(mean(self._encode(prompt)), self._encoder.encode(response, max_windows=1))
            for prompt, response in zip(texts["prompt"], texts["response"], strict=True)
        ]


def _make_ready() -> None:
    """What the libraries need before they are imported, here and nowhere else: whylogs and onnxruntime (since 1.29)
    send statistics of their use unless told not to, and whylogs names np.unicode_, which numpy 2 no longer has."""
    os.environ |= {"WHYLOGS_NO_ANALYTICS": "1", "ORT_DISABLE_TELEMETRY": "1"}
    if not hasattr(np, "unicode_"):
        setattr(np, "unicode_", np.str_)  # noqa: B010  mypy knows numpy 2


def _check_textstat() -> None:
    """PyPI's `textstat` and LangKit's `whylabs-textstat` write into one folder; the former downloads a dictionary."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found = importlib.metadata.version("textstat")
        raise PlatformError(
            Code.FAILED_PRECONDITION,
            f"textstat {found} lies over whylabs-textstat and would download; uninstall both, install the latter",
        )


def _profile_schema() -> Any:
    """Which metrics of whylogs a column gets. Without cardinality: it costs 4 KB a column and says nothing here."""
    resolvers = importlib.import_module("whylogs.core.resolvers")
    datatypes = importlib.import_module("whylogs.core.datatypes")
    standard = importlib.import_module("whylogs.core.metrics").StandardMetric
    numbers = [resolvers.MetricSpec(metric.value) for metric in (standard.counts, standard.distribution)]
    patterns = [resolvers.MetricSpec(standard.frequent_items.value)]
    specs = [resolvers.ResolverSpec(column_name=name, metrics=patterns) for name in _PATTERN_COLUMNS]
    # A metric must come by one way: a column's name adds to what its type gets.
    specs.append(resolvers.ResolverSpec(column_type=datatypes.String, metrics=numbers[:1]))
    # AnyType: of a column whose first value of a batch is missing.
    kinds = (datatypes.Integral, datatypes.Fractional, datatypes.AnyType)
    specs += [resolvers.ResolverSpec(column_type=kind, metrics=numbers) for kind in kinds]
    return importlib.import_module("whylogs.core.schema").DeclarativeSchema(specs)


def _summary(view: Any) -> dict[str, dict[str, Any]]:
    """Statistics by column, ready for JSON."""
    summaries = ((name, _column_summary(name, column)) for name, column in sorted(view.get_columns().items()))
    # Columns that are named in the schema stand in a profile that has no value of theirs.
    return {name: summary for name, summary in summaries if summary["count"] or summary["num_missing"]}


def _column_summary(name: str, column: Any) -> dict[str, Any]:
    found = column.to_summary_dict()
    num_missing = int(found.get("counts/null", 0))
    count = int(found.get("counts/n", 0)) - num_missing
    summary: dict[str, Any] = {"count": count, "num_missing": num_missing}
    if name in _PATTERN_COLUMNS:
        items = found.get("frequent_items/frequent_strings", [])
        return summary | {"counts": {str(item.value): round(item.est) for item in items}}
    distribution = column.get_metric("distribution")
    if distribution is None or not count:
        return summary
    quantiles = distribution.kll.value.get_quantiles(list(_QUANTILES))
    summary |= {
        "mean": _number(distribution.mean.value),
        "stddev": _number(distribution.stddev),
        "min": _number(distribution.min),
        "max": _number(distribution.max),
        "quantiles": {f"{q:g}": _number(value) for q, value in zip(_QUANTILES, quantiles, strict=True)},
    }
    if name.endswith("_count"):
        summary["total"] = round(distribution.mean.value * count)
    return summary


def _number(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None
