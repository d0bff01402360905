"""What the chat and completion routes have in common: sampling and stopping parameters, choices, usage."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar

from pydantic import Field, WithJsonSchema, field_validator

from gateway.api.json_body import Body, invalid
from gateway.core.services import Sampling, Stopping, Usage

MAX_CHOICES = 128  # completions of one request, over all of its prompts
MAX_STOPS = 16
_MAX_STOP_CHARS = 256
_MAX_UINT32 = 2**32 - 1
_MAX_COUNT = 2**31 - 1

TokenId = Annotated[int, Field(ge=0, le=_MAX_UINT32)]
# The format says that a word is not enough: it must be an id that GET /v1/models tells.
ModelName = Annotated[str, Field(min_length=1, max_length=256, json_schema_extra={"format": "model-id"})]
Penalty = Annotated[float, Field(ge=-2, le=2)]
# Bounds of the engines: less is nothing in their arithmetic, and what is longer they do not look for.
TopP = Annotated[float, Field(ge=1e-6, le=1)]
StopString = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]

_STOP_TEXT = {"type": "string", "minLength": 1, "maxLength": _MAX_STOP_CHARS}
_STOP_SCHEMA = {"anyOf": [_STOP_TEXT, {"type": "array", "maxItems": MAX_STOPS, "items": _STOP_TEXT}, {"type": "null"}]}

LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}}),
]


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: every chunk tells the usage so far


class SamplingBody(Body):
    """Parameters that both routes take; null means the default, as it does with OpenAI.

    What only tells of the client (user, metadata, store, service_tier, safety_identifier, prompt_cache_key) or hints at
    the way to an answer (reasoning_effort, verbosity, prediction) is tolerated.
    """

    refused: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "allowed_token_ids": "send guided_choice or guided_regex",
            "bad_words": "send logit_bias",
            "include_stop_str_in_output": "add the stop string behind the answer",
            "length_penalty": "there is no beam search",
            "prompt_logprobs": "POST /v1/completions tells them with echo and logprobs",
            "truncate_prompt_tokens": "send a shorter prompt",
            "use_beam_search": "there is no beam search",
        }
    )

    model: ModelName
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=-1, le=_MAX_COUNT)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=2**-6, le=10)] | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[list[StopString] | None, WithJsonSchema(_STOP_SCHEMA)] = Field(None, max_length=MAX_STOPS)
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOPS)
    min_tokens: Annotated[int, Field(ge=0, le=_MAX_COUNT)] | None = None
    ignore_eos: bool | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdecimal() and int(key[:11]) <= _MAX_UINT32):
                raise ValueError(f"the key {key[:40]!r} is no token id")
        return value

    def check_options(self) -> None:
        """Raises INVALID_ARGUMENT for fields that do not fit together."""
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "is only allowed when stream is true")

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream tells the usage so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def sampling(self) -> Sampling:
        """The sampling parameters for the generator."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k or 0),  # -1 means "all" to some clients
            min_p=self.min_p or 0.0,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            repetition_penalty=self.repetition_penalty,
            logit_bias={int(key): bias for key, bias in (self.logit_bias or {}).items()},
            seed=None if self.seed is None else self.seed % 2**64,
        )

    def stopping(self, max_tokens: int | None) -> Stopping:
        """The stopping parameters for the generator."""
        return Stopping(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )


MaxTokens = Annotated[int, Field(ge=1, le=_MAX_COUNT)]
MaxTokensOrNone = Annotated[int, Field(ge=0, le=_MAX_COUNT)]


def usage_object(usage: Usage) -> dict[str, object]:
    """OpenAI's usage; counts that are no more than an estimate say so."""
    counted: dict[str, object] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    return counted | {"is_estimate": True} if usage.is_estimate else counted
