"""One request at vLLM: its streams read to the end, its events told, its tokens counted."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from chassis.errors import Code, PlatformError
from generator.backends.vllm_engine import wire
from generator.backends.vllm_engine.client import VllmClient
from generator.core.active import Active
from generator.core.completion import Completion
from generator.core.events import Done, Event, Finished, FinishReason, Started, Summary
from generator.core.requests import ModelSpec
from generator.core.sequences import Sequence

_FINISHES = {"length": FinishReason.LENGTH, "stop": FinishReason.STOP}


@dataclass(slots=True)
class Totals:
    """Tokens over the life of an engine."""

    num_prompt: int = 0
    num_completion: int = 0
    num_looked_up: int = 0  # tokens of prompts of which vLLM told how much it found in its prefix cache
    num_found: int = 0


class Generation:
    """Runs one request. Exactly one of `end` and `fail` is called when `run` has ended, in whatever way."""

    def __init__(
        self,
        active: Active,
        client: VllmClient,
        model_name: str,
        model: ModelSpec,
        totals: Totals,
        clock: Callable[[], float],
    ) -> None:
        self._active = active
        self._client = client
        self._model_name = model_name  # what vLLM calls the base or the adapter
        self._model = model
        self._totals = totals
        self._clock = clock

    async def run(self) -> None:
        """Reads the request to its end. Raises TimeoutError at its deadline and PlatformError where it cannot go on."""
        deadline_s = self._active.request.deadline_unix_s
        left_s = None if deadline_s is None else deadline_s - self._clock()
        if left_s is not None and left_s <= 0:
            raise TimeoutError
        async with asyncio.timeout(left_s):
            await self._generate_all()

    async def _generate_all(self) -> None:
        request = self._active.request
        if request.prompt_logprobs is not None:
            answer = await self._client.complete(wire.scoring_body(self._model_name, request))
            self._admit()
            self._active.sequences[0].prompt_logprobs += wire.read_prompt_scores(answer, request)
            self._start()
        if self._active.sequences[0].max_new_tokens == 0:
            for completion in self._active.completions:
                completion.end(FinishReason.LENGTH)
                self._finish(completion)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for sequence, completion in zip(self._active.sequences, self._active.completions, strict=True):
                    group.create_task(self._generate(sequence, completion))
        except ExceptionGroup as failed:  # what ended one completion ends the request
            raise failed.exceptions[0] from None

    async def _generate(self, sequence: Sequence, completion: Completion) -> None:
        body = wire.completion_body(self._model_name, sequence, self._model)
        num_counted: int | None = None
        num_sent = 0
        has_ended = False  # on vLLM's side
        async with contextlib.aclosing(self._client.stream(body)) as messages:
            async for message in messages:
                chunk = wire.read_chunk(message, self._active.request)
                num_counted = num_counted if chunk.num_completion is None else chunk.num_completion
                self._note_cached(sequence, chunk.num_cached)
                num_sent += len(chunk.tokens)
                has_ended = has_ended or bool(chunk.finish)
                self._admit()
                self._take(sequence, completion, chunk)
                if completion.reason is not None and not has_ended:
                    return  # at a stop string that vLLM does not know of: leaving the stream aborts the rest
        if completion.reason is None:
            raise PlatformError(Code.UNAVAILABLE, "vLLM ended a completion without a word", retry_after_s=1.0)
        if num_counted is not None and num_counted != num_sent:
            raise wire.broken(f"it counted {num_counted} tokens and sent {num_sent}")

    def _admit(self) -> None:
        if self._active.admitted_s is None:
            self._active.admitted_s = self._clock()
            self._totals.num_prompt += len(self._active.request.prompt_ids)
            if self._active.request.prompt_logprobs is None:
                self._start()

    def _note_cached(self, sequence: Sequence, num_cached: int | None) -> None:
        """vLLM tells it once, at the end of a stream, where it runs with --enable-prompt-tokens-details."""
        if num_cached is not None:
            sequence.num_cached = num_cached
            self._totals.num_looked_up += sequence.num_prompt
            self._totals.num_found += num_cached

    def _take(self, sequence: Sequence, completion: Completion, chunk: wire.Chunk) -> None:
        """Enters a piece of a completion; what vLLM computed past the end is not counted."""
        for token in chunk.tokens:
            if completion.reason is not None:
                break
            if self._active.first_token_s is None:
                self._active.first_token_s = self._clock()
            self._totals.num_completion += 1
            sequence.token_ids.append(token.token_id)
            delta = completion.add(token.token_id, token.logprob)
            if delta is not None:
                self._push(delta)
            if completion.reason is not None:
                self._finish(completion)
        if chunk.finish and completion.reason is None:
            self._end(completion, chunk.finish)

    def _end(self, completion: Completion, finish: str) -> None:
        """vLLM ended what would have gone on here: at its own bound, or because it was stopped."""
        if finish not in _FINISHES:
            raise PlatformError(Code.UNAVAILABLE, f"vLLM ended a completion: {finish}", retry_after_s=1.0)
        delta = completion.end(_FINISHES[finish])
        if delta is not None:
            self._push(delta)
        self._finish(completion)

    # Events.

    def end(self, reason: FinishReason) -> Summary:
        """Ends what has not ended by itself, and the request with it."""
        if not self._active.is_started:
            self._start()
        for completion in self._active.completions:
            if completion.reason is None:
                delta = completion.end(reason)
                if delta is not None:
                    self._push(delta)
                self._finish(completion)
        reasons = [c.reason for c in self._active.completions if c.reason is not None]
        summary = self._active.summarise(reasons, self._clock())
        self._push(Done(summary))
        return summary

    def fail(self, error: PlatformError) -> Summary:
        """Ends the request with an error in place of the rest of its events."""
        for completion in self._active.completions:
            completion.reason = completion.reason or FinishReason.ERROR
        self._active.stream.fail(error)
        self._active.stream.wake()
        return self._active.summarise([FinishReason.ERROR] * self._active.request.n, self._clock())

    def _start(self) -> None:
        self._active.is_started = True
        scores = tuple(self._active.sequences[0].prompt_logprobs)
        self._push(Started(len(self._active.request.prompt_ids), scores, self._active.model_version))

    def _push(self, event: Event) -> None:
        self._active.stream.push([event])
        self._active.stream.wake()

    def _finish(self, completion: Completion) -> None:
        assert completion.reason is not None
        self._push(Finished(completion.index, completion.reason, completion.stop_match))
