"""Core's requests as bodies of vLLM's /v1/completions, and its answers as tokens. Knows no connection.

Prompts go and completions come as token ids: texts, stop strings and whole characters are the service's own business,
as with every engine. Whatever vLLM would take from a model's generation_config.json is sent, so that nothing is.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from chassis.errors import Code, PlatformError
from generator.core.requests import GenerationRequest, ModelSpec
from generator.core.sequences import Sampled, Sequence, TokenLogprob

_TOKEN_PREFIX = "token_id:"  # of a token's name, with return_tokens_as_token_ids
_SPREAD = 0x9E3779B97F4A7C15
MAX_SALT_CHARS = 1024  # vLLM's own bound


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of one completion. vLLM's counts stand as far as it tells them; `finish` is "" before the end."""

    tokens: tuple[Sampled, ...] = ()
    finish: str = ""
    num_completion: int | None = None
    num_cached: int | None = None


def completion_body(model_name: str, sequence: Sequence, model: ModelSpec) -> dict[str, Any]:
    """Returns the body that has vLLM stream one completion."""
    request, sampling = sequence.request, sequence.sampling
    ends = set(request.stop.stop_token_ids) | (set() if request.stop.ignore_eos else model.eos_token_ids)
    body = _prompt(model_name, request) | {
        "max_tokens": sequence.max_new_tokens,
        "min_tokens": min(request.stop.min_tokens, sequence.max_new_tokens),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": seed_of(sequence.seed, sequence.index),
        "stop_token_ids": sorted(ends),
        "ignore_eos": request.stop.ignore_eos,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    if sampling.logit_bias:
        body["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
    if request.logprobs is not None:
        body |= {"logprobs": request.logprobs, "return_tokens_as_token_ids": True}
    return body


def scoring_body(model_name: str, request: GenerationRequest) -> dict[str, Any]:
    """Returns the body that has vLLM score the prompt; it samples a token too, which nobody is told of."""
    return _prompt(model_name, request) | {
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": request.prompt_logprobs,
        "stream": False,
    }


def _prompt(model_name: str, request: GenerationRequest) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model_name, "prompt": list(request.prompt_ids), "return_token_ids": True}
    if request.cache_salt:
        salt = request.cache_salt
        body["cache_salt"] = salt if len(salt) <= MAX_SALT_CHARS else hashlib.sha256(salt.encode()).hexdigest()
    return body


def seed_of(seed: int, index: int) -> int:
    """Returns a seed of its own for each completion of a request; vLLM takes 63 bits."""
    return (seed + index * _SPREAD) & (2**63 - 1)


def read_chunk(message: Mapping[str, Any], request: GenerationRequest) -> Chunk:
    """Reads one event of a stream. Raises PlatformError for an error that vLLM tells in it, and for a broken one."""
    if "error" in message:
        raise error_of(message, 200)
    try:
        usage = message.get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
        chunk = Chunk(num_completion=usage.get("completion_tokens"), num_cached=details.get("cached_tokens"))
        if not message["choices"]:
            return chunk
        choice = message["choices"][0]
        token_ids = choice["token_ids"] or []
        scores = _read_scores(choice["logprobs"], request.logprobs) if request.logprobs is not None else {}
        tokens = tuple(Sampled(int(token_id), scores.get(place)) for place, token_id in enumerate(token_ids))
        if request.logprobs is not None and len(scores) != len(tokens):
            raise ValueError(f"{len(scores)} log probabilities for {len(tokens)} tokens")
        return replace(chunk, tokens=tokens, finish=choice.get("finish_reason") or "")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise broken(f"an event of its stream cannot be read ({error!r})") from error


def read_prompt_scores(message: Mapping[str, Any], request: GenerationRequest) -> list[TokenLogprob]:
    """Reads the log probabilities of a prompt, from its second token on."""
    num_top = request.prompt_logprobs or 0
    try:
        found = message["choices"][0]["prompt_logprobs"]
        if len(found) != len(request.prompt_ids):
            raise ValueError(f"{len(found)} log probabilities for a prompt of {len(request.prompt_ids)}")
        scores = []
        for token_id, entry in zip(request.prompt_ids[1:], found[1:], strict=True):
            values = {int(name): float(value["logprob"]) for name, value in entry.items()}
            scores.append(TokenLogprob(token_id, values[token_id], _best(values, num_top)))
        return scores
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise broken(f"the prompt's log probabilities cannot be read ({error!r})") from error


def _read_scores(logprobs: Mapping[str, Any] | None, num_top: int) -> dict[int, TokenLogprob]:
    if logprobs is None:
        return {}
    scores = {}
    tops = logprobs["top_logprobs"] if num_top else [{}] * len(logprobs["tokens"])
    for place, (name, value, top) in enumerate(zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True)):
        best = _best({_token_id(other): float(score) for other, score in (top or {}).items()}, num_top)
        scores[place] = TokenLogprob(_token_id(name), float(value), best)
    return scores


def _token_id(name: str) -> int:
    return int(name.removeprefix(_TOKEN_PREFIX))


def _best(values: Mapping[int, float], num_top: int) -> tuple[tuple[int, float], ...]:
    """vLLM adds the token itself to the best ones where it is none of them."""
    return tuple(sorted(values.items(), key=lambda item: (-item[1], item[0]))[:num_top])


def error_of(message: Mapping[str, Any], status: int) -> PlatformError:
    """Translates what vLLM says where it refuses or fails."""
    error = message.get("error")
    text = str(error.get("message", "")) if isinstance(error, Mapping) else str(message)[:500]
    code = error.get("code", status) if isinstance(error, Mapping) else status
    match code:
        case 400 | 413 | 422:
            return PlatformError(Code.INVALID_ARGUMENT, f"vLLM refused the request: {text}")
        case 401 | 403:  # our key, not the client's
            return PlatformError(Code.UNAVAILABLE, "vLLM does not take this generator's key", reason="vllm_key")
        case 404:
            return PlatformError(Code.UNAVAILABLE, f"vLLM does not serve what is asked: {text}", retry_after_s=1.0)
        case 429 | 503:
            return PlatformError(Code.OVERLOADED, f"vLLM is overloaded: {text}", retry_after_s=1.0)
        case _:
            return PlatformError(Code.UNAVAILABLE, f"vLLM failed ({code}): {text}", retry_after_s=1.0)


def broken(why: str) -> PlatformError:
    """Makes the error for an answer that is not what vLLM's protocol says."""
    return PlatformError(Code.INTERNAL, f"vLLM answered what this generator does not understand: {why}")
