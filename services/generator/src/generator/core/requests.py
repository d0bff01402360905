"""What a client asks of the engine, and the checks that need no engine state.

Knows no wire format: api maps protobuf to these classes. Every refusal names the field as the public API spells it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from chassis.errors import Code, PlatformError
from generator.core.grammar import CompiledGrammar, Grammar

MAX_COMPLETIONS = 16
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_ABS_PRIORITY = 1_000_000


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick the next token. temperature 0 is greedy; top_k 0 keeps all; seed None draws one."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def is_penalised(self) -> bool:
        """Whether logits depend on the tokens seen so far."""
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0 or self.repetition_penalty != 1.0


@dataclass(frozen=True, slots=True)
class StopParams:
    """When to stop. max_tokens None means up to the end of the context; 0 is for scoring a prompt only."""

    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request: n completions of a prompt. `deadline_unix_s` None means that the caller waits for ever."""

    request_id: str
    prompt_ids: tuple[int, ...] = field(repr=False)
    sampling: SamplingParams = SamplingParams()
    stop: StopParams = StopParams()
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    deadline_unix_s: float | None = None
    priority: int = 0
    adapter: str = ""
    cache_salt: str = ""
    grammar: Grammar | None = None
    compiled: CompiledGrammar | None = field(default=None, repr=False, compare=False)  # of `grammar`, before submit


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The model that an engine serves; `context_length` counts prompt and completion together."""

    id: str
    version: str
    vocab_size: int
    context_length: int
    eos_token_ids: frozenset[int]
    created_unix_s: int = 0
    capabilities: frozenset[str] = frozenset()


def check(request: GenerationRequest, model: ModelSpec) -> None:
    """Raises PlatformError unless the model can run the request; costs no model time."""
    _check_capabilities(request, model)
    _check_prompt(request, model)
    _check_sampling(request.sampling, model.vocab_size)
    _check_stop(request.stop, model.vocab_size)
    _check_range("n", request.n, 1, MAX_COMPLETIONS)
    _check_range("priority", request.priority, -MAX_ABS_PRIORITY, MAX_ABS_PRIORITY)
    for name, value in (("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)):
        if value is not None:
            _check_range(name, value, 0, MAX_LOGPROBS)
    if request.stop.max_tokens == 0 and request.prompt_logprobs is None:
        raise _invalid("max_tokens", "max_tokens must be at least 1 (0 is allowed with prompt_logprobs only)")
    _check_context(request, model)


def max_new_tokens(request: GenerationRequest, model: ModelSpec) -> int:
    """Returns how many tokens each completion may have at most."""
    room = model.context_length - len(request.prompt_ids)
    return room if request.stop.max_tokens is None else min(request.stop.max_tokens, room)


def context_overflow(
    model: ModelSpec, num_prompt: int, max_tokens: int | None, at_least: bool = False
) -> PlatformError:
    """Makes the error for a request that does not fit; `at_least` where the prompt was not counted to its end."""
    asked = f"{'at least ' if at_least else ''}{num_prompt} tokens in the prompt"
    asked += "" if max_tokens is None else f" and {max_tokens} tokens for the completion"
    total = num_prompt + (1 if max_tokens is None else max_tokens)
    return PlatformError(
        Code.OUT_OF_RANGE,
        f"this model's context is {model.context_length} tokens; the request needs {asked} ({total} in all)",
        param="prompt" if num_prompt >= model.context_length else "max_tokens",
        reason="context_length_exceeded",
    )


def _check_capabilities(request: GenerationRequest, model: ModelSpec) -> None:
    if request.adapter and "lora" not in model.capabilities:  # else the engine knows which ones are loaded
        raise PlatformError(
            Code.NOT_FOUND,
            f"adapter {request.adapter!r} is not loaded here",
            param="model",
            reason="model_not_found",
        )
    needed = {
        "grammar": request.grammar is not None,
        "logprobs": request.logprobs is not None,
        "prompt_logprobs": request.prompt_logprobs is not None,
    }
    for capability, is_needed in needed.items():
        if is_needed and capability not in model.capabilities:
            raise PlatformError(
                Code.UNIMPLEMENTED, f"this engine does not support {capability}", param=capability, reason="unsupported"
            )


def _check_prompt(request: GenerationRequest, model: ModelSpec) -> None:
    if not request.prompt_ids:
        raise _invalid("prompt", "the prompt is empty")
    if max(request.prompt_ids) >= model.vocab_size or min(request.prompt_ids) < 0:
        raise _invalid("prompt", f"the prompt has a token id outside the vocabulary of {model.vocab_size}")


def _check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    _check_range("temperature", sampling.temperature, 0.0, 2.0)
    _check_range("top_p", sampling.top_p, 0.0, 1.0)
    if sampling.top_p == 0.0:
        raise _invalid("top_p", "top_p must be above 0")
    _check_range("top_k", sampling.top_k, 0, 2**31 - 1)
    _check_range("min_p", sampling.min_p, 0.0, 1.0)
    _check_range("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)
    _check_range("presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    _check_range("repetition_penalty", sampling.repetition_penalty, 0.01, 100.0)
    if sampling.seed is not None:
        _check_range("seed", sampling.seed, 0, 2**64 - 1)
    if len(sampling.logit_bias) > MAX_LOGIT_BIAS:
        raise _invalid("logit_bias", f"logit_bias has {len(sampling.logit_bias)} entries; {MAX_LOGIT_BIAS} are allowed")
    for token_id, bias in sampling.logit_bias.items():
        if not 0 <= token_id < vocab_size:
            raise _invalid("logit_bias", f"logit_bias names token {token_id}; the vocabulary has {vocab_size}")
        _check_range("logit_bias", bias, -100.0, 100.0)


def _check_stop(stop: StopParams, vocab_size: int) -> None:
    if stop.max_tokens is not None:
        _check_range("max_tokens", stop.max_tokens, 0, 2**31 - 1)
    _check_range("min_tokens", stop.min_tokens, 0, 2**31 - 1)
    if stop.max_tokens is not None and stop.min_tokens > stop.max_tokens:
        raise _invalid("min_tokens", f"min_tokens ({stop.min_tokens}) exceeds max_tokens ({stop.max_tokens})")
    if len(stop.stop) > MAX_STOP_STRINGS:
        raise _invalid("stop", f"{len(stop.stop)} stop strings were sent; {MAX_STOP_STRINGS} are allowed")
    for text in stop.stop:
        if not text:
            raise _invalid("stop", "a stop string is empty")
        if len(text) > MAX_STOP_CHARS:
            raise _invalid("stop", f"a stop string has {len(text)} characters; {MAX_STOP_CHARS} are allowed")
    if len(stop.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise _invalid("stop_token_ids", f"more than {MAX_STOP_TOKEN_IDS} stop token ids were sent")
    for token_id in stop.stop_token_ids:
        if not 0 <= token_id < vocab_size:
            raise _invalid("stop_token_ids", f"stop token {token_id} is outside the vocabulary of {vocab_size}")


def _check_context(request: GenerationRequest, model: ModelSpec) -> None:
    num_prompt, max_tokens = len(request.prompt_ids), request.stop.max_tokens
    needed = num_prompt + (1 if max_tokens is None else max_tokens)
    if needed > model.context_length:
        raise context_overflow(model, num_prompt, max_tokens)
    if request.stop.min_tokens > model.context_length - num_prompt:
        raise context_overflow(model, num_prompt, request.stop.min_tokens)


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not math.isfinite(value) or not least <= value <= most:
        raise _invalid(name, f"{name} must be between {least:g} and {most:g}, not {value}")


def _invalid(param: str, message: str) -> PlatformError:
    return PlatformError(Code.INVALID_ARGUMENT, message, param=param)
