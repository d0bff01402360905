"""The engine's metrics: what each step took and brought, and the load as it is when somebody looks.

A step is observed on the engine's thread and costs some 20 us (a test holds it below 50), so nothing here may block.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from chassis import metrics
from generator.core.engine import EngineStats
from generator.core.grammar import CompiledGrammar, Grammar, GrammarCompiler
from generator.core.steps import StepReport

PARTS = ("schedule", "forward", "sample")


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Sums over all steps since the start."""

    num_steps: int = 0
    num_sequences: int = 0
    num_drafts: int = 0
    num_accepted: int = 0
    schedule_s: float = 0.0
    forward_s: float = 0.0
    sample_s: float = 0.0


class EngineMeter:
    """Give `on_step` to the engine, then `watch` it."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._totals = StepTotals()  # replaced as a whole: readers on other threads see one step or the next
        self._stats: Callable[[], EngineStats] | None = None
        self._counted = EngineStats(0, 0, 0, 0, 0, 0, 0)  # what the counters have of it
        # Children are looked up once: by name it would take longer than observing.
        schedule, forward, sample = (metrics.STEP_SECONDS.labels(service, part) for part in PARTS)
        self._schedule_seconds, self._forward_seconds, self._sample_seconds = schedule, forward, sample
        self._batch = metrics.BATCH_SEQUENCES.labels(service)
        self._prompt_tokens = metrics.ENGINE_TOKENS.labels(service, "prompt")
        self._completion_tokens = metrics.ENGINE_TOKENS.labels(service, "completion")
        self._accepted = metrics.DRAFT_TOKENS.labels(service, "accepted")
        self._rejected = metrics.DRAFT_TOKENS.labels(service, "rejected")
        self._preemptions = metrics.PREEMPTIONS.labels(service)
        self._evictions = metrics.ADAPTER_EVICTIONS.labels(service)
        self._queries = metrics.PREFIX_QUERY_TOKENS.labels(service)
        self._hits = metrics.PREFIX_HIT_TOKENS.labels(service)

    @property
    def totals(self) -> StepTotals:
        """What all steps were, taken together."""
        return self._totals

    def watch(self, stats: Callable[[], EngineStats], num_known_adapters: Callable[[], int]) -> None:
        """Has the gauges read the load at every scrape. Both are called on several threads."""
        self._stats = stats
        for gauge, read in (
            (metrics.RUNNING_SEQUENCES, lambda load: load.running_sequences),
            (metrics.WAITING_SEQUENCES, lambda load: load.waiting_sequences),
            (metrics.KV_BLOCKS_USED, lambda load: load.blocks_used),
            (metrics.KV_BLOCKS_CAPACITY, lambda load: load.blocks_total),
            (metrics.LOADED_ADAPTERS, lambda load: load.loaded_adapters),
            (metrics.ADAPTER_BYTES, lambda load: load.adapter_bytes),
        ):
            gauge.labels(self._service).set_function(_reader(stats, read))
        metrics.KNOWN_ADAPTERS.labels(self._service).set_function(num_known_adapters)

    def on_step(self, step: StepReport) -> None:
        """Observes a step."""
        self._schedule_seconds.observe(step.schedule_s)
        self._forward_seconds.observe(step.forward_s)
        self._sample_seconds.observe(step.sample_s)
        self._batch.observe(step.num_sequences)
        self._prompt_tokens.inc(step.num_prefill_tokens)
        self._completion_tokens.inc(step.num_entered)  # what the ends of requests add up to
        if step.num_drafts:
            self._accepted.inc(step.num_accepted)
            self._rejected.inc(step.num_drafts - step.num_accepted)
        old = self._totals
        self._totals = StepTotals(
            old.num_steps + 1,
            old.num_sequences + step.num_sequences,
            old.num_drafts + step.num_drafts,
            old.num_accepted + step.num_accepted,
            old.schedule_s + step.schedule_s,
            old.forward_s + step.forward_s,
            old.sample_s + step.sample_s,
        )
        if self._stats is not None:
            self._count(self._stats())

    def _count(self, load: EngineStats) -> None:
        """Adds to the counters what the engine counted since the last step."""
        before, self._counted = self._counted, load
        self._preemptions.inc(load.preemptions_total - before.preemptions_total)
        self._evictions.inc(load.adapter_evictions_total - before.adapter_evictions_total)
        self._queries.inc(load.prefix_query_tokens_total - before.prefix_query_tokens_total)
        self._hits.inc(load.prefix_hit_tokens_total - before.prefix_hit_tokens_total)


class MeteredCompiler:
    """A compiler of grammars whose time is observed; what it had ready counts as compiled at once."""

    def __init__(self, compiler: GrammarCompiler, service: str) -> None:
        self._compiler = compiler
        self._service = service

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """See GrammarCompiler.compile."""
        started_s = time.perf_counter()
        outcome = "refused"
        try:
            compiled = self._compiler.compile(grammar)
            outcome = "compiled"
            return compiled
        finally:
            took_s = time.perf_counter() - started_s
            metrics.GRAMMAR_COMPILE_SECONDS.labels(self._service, outcome).observe(took_s)

    def close(self) -> None:
        """See GrammarCompiler.close."""
        self._compiler.close()


def _reader(stats: Callable[[], EngineStats], read: Callable[[EngineStats], int]) -> Callable[[], float]:
    return lambda: read(stats())
