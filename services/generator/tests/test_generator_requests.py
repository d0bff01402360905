"""Every bad parameter is refused with the field named, before any work."""

import math
from dataclasses import replace
from typing import Any

import pytest

from chassis.errors import Code, PlatformError
from generator.core import requests
from generator.core.requests import GenerationRequest, Grammar, ModelSpec, SamplingParams, StopParams

MODEL = ModelSpec("m", "v", 100, 64, frozenset({99}), capabilities=frozenset({"logprobs", "prompt_logprobs"}))
GOOD = GenerationRequest("r", (1, 2, 3))


def _refusal(request: GenerationRequest, model: ModelSpec = MODEL) -> PlatformError:
    with pytest.raises(PlatformError) as raised:
        requests.check(request, model)
    return raised.value


def test_the_defaults_pass() -> None:
    requests.check(GOOD, MODEL)
    assert requests.max_new_tokens(GOOD, MODEL) == 61


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", -0.1),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("logit_bias", {100: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: 101.0}),
        ("seed", 2**64),
    ],
)
def test_bad_sampling_names_the_field(field: str, value: Any) -> None:
    error = _refusal(replace(GOOD, sampling=replace(SamplingParams(), **{field: value})))
    assert (error.code, error.param) == (Code.INVALID_ARGUMENT, field)


@pytest.mark.parametrize(
    ("stop", "param"),
    [
        (StopParams(max_tokens=0), "max_tokens"),
        (StopParams(max_tokens=-1), "max_tokens"),
        (StopParams(max_tokens=3, min_tokens=4), "min_tokens"),
        (StopParams(stop=tuple("x" * (i + 1) for i in range(17))), "stop"),
        (StopParams(stop=("x" * 257,)), "stop"),
        (StopParams(stop=("",)), "stop"),
        (StopParams(stop_token_ids=(100,)), "stop_token_ids"),
        (StopParams(stop_token_ids=(1,) * 1000), "stop_token_ids"),
    ],
)
def test_bad_stops_name_the_field(stop: StopParams, param: str) -> None:
    error = _refusal(replace(GOOD, stop=stop))
    assert (error.code, error.param) == (Code.INVALID_ARGUMENT, param)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_ids": ()}, "prompt"),
        ({"prompt_ids": (1, 100)}, "prompt"),
    ],
)
def test_bad_requests_name_the_field(change: dict[str, Any], param: str) -> None:
    error = _refusal(replace(GOOD, **change))
    assert (error.code, error.param) == (Code.INVALID_ARGUMENT, param)


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "numbers"), [(64, None, ("64", "65")), (60, 5, ("60", "5", "65")), (70, 1, ("70",))]
)
def test_an_overflow_of_the_context_says_the_numbers(
    num_prompt: int, max_tokens: int | None, numbers: tuple[str, ...]
) -> None:
    error = _refusal(replace(GOOD, prompt_ids=(1,) * num_prompt, stop=StopParams(max_tokens=max_tokens)))
    assert (error.code, error.reason) == (Code.OUT_OF_RANGE, "context_length_exceeded")
    assert all(number in error.message for number in ("64", *numbers))


def test_the_context_may_be_used_to_its_end() -> None:
    requests.check(replace(GOOD, prompt_ids=(1,) * 60, stop=StopParams(max_tokens=4)), MODEL)


def test_a_prompt_may_be_scored_without_sampling() -> None:
    requests.check(replace(GOOD, prompt_logprobs=0, stop=StopParams(max_tokens=0)), MODEL)


def test_undeclared_capabilities_are_refused_before_work() -> None:
    assert _refusal(replace(GOOD, grammar=Grammar("json_object"))).code is Code.UNIMPLEMENTED
    assert _refusal(replace(GOOD, logprobs=1), replace(MODEL, capabilities=frozenset())).code is Code.UNIMPLEMENTED


def test_an_unknown_adapter_is_not_found() -> None:
    error = _refusal(replace(GOOD, adapter="m:mine"))
    assert (error.code, error.reason) == (Code.NOT_FOUND, "model_not_found")
