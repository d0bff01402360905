"""The proof that an adapter answers: a short greedy generation with it, before any client may."""

import asyncio
import math

from chassis.errors import Code, PlatformError
from generator.core.adapters import AdapterSpec
from generator.core.events import Delta, Finished, FinishReason
from generator.core.requests import MAX_ABS_PRIORITY, GenerationRequest, ModelSpec, SamplingParams, StopParams
from generator.core.stream import TokenStream

TIMEOUT_S = 60.0
_NUM_PROMPT = 8
_NUM_TOKENS = 4


def probe_request(spec: AdapterSpec, model: ModelSpec) -> GenerationRequest:
    """Makes the request; it goes before all others, or a full queue would hold back every load."""
    return GenerationRequest(
        request_id=f"adapter-probe-{spec.version}",
        prompt_ids=tuple(i % model.vocab_size for i in range(1, _NUM_PROMPT + 1)),
        sampling=SamplingParams(temperature=0.0),
        stop=StopParams(max_tokens=_NUM_TOKENS, ignore_eos=True),
        logprobs=0,
        priority=MAX_ABS_PRIORITY,
        adapter=spec.id,
    )


async def read_probe(spec: AdapterSpec, stream: TokenStream) -> None:
    """Reads the answer. Raises FAILED_PRECONDITION where it is none, UNAVAILABLE where none came in time."""
    logprobs: list[float] = []
    reason: FinishReason | None = None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            async for event in stream:
                if isinstance(event, Delta):
                    logprobs += [score.logprob for score in event.logprobs]
                elif isinstance(event, Finished):
                    reason = event.reason
    except TimeoutError as error:
        message = f"adapter {spec.id!r} was not loaded: its probe was not answered within {TIMEOUT_S:.0f} s"
        raise PlatformError(Code.UNAVAILABLE, message, reason="adapter_probe_failed", retry_after_s=5.0) from error
    finally:
        stream.cancel()
    if reason in (FinishReason.CANCELLED, FinishReason.DEADLINE):  # somebody stopped the engine, not the adapter
        message = f"adapter {spec.id!r} was not loaded: its probe was cut off"
        raise PlatformError(Code.UNAVAILABLE, message, reason="adapter_probe_failed", retry_after_s=5.0)
    if reason is not FinishReason.LENGTH or len(logprobs) != _NUM_TOKENS or not all(map(math.isfinite, logprobs)):
        message = f"adapter {spec.id!r} was not loaded: its probe gave log probabilities {logprobs}"
        raise PlatformError(Code.FAILED_PRECONDITION, message, reason="adapter_probe_failed")
