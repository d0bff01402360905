"""What must be known of a model beside what vLLM tells: its vocabulary and its end tokens, from the model's folder."""

import json
from dataclasses import replace
from pathlib import Path

from chassis.errors import Code, PlatformError
from generator.core.requests import ModelSpec

CAPABILITIES = frozenset({"chat", "logprobs", "prompt_logprobs", "seed", "n", "stop", "logit_bias", "penalties"})


def with_adapters(model: ModelSpec) -> ModelSpec:
    """Returns what is declared of a vLLM that adapters may be loaded into.

    Not the prompt's log probabilities: with --enable-lora they end the whole of vLLM 0.32 on the CPU when they come
    into a step with other requests (einsum in its LoRA kernels), and everyone's streams with it.
    """
    return replace(model, capabilities=(model.capabilities | {"lora"}) - {"prompt_logprobs"})


def make_model(folder: Path, model_id: str, version: str, max_model_len: int, created_unix_s: int = 0) -> ModelSpec:
    """Reads what must be known of a model beside what vLLM tells. Raises PlatformError for a broken folder."""
    try:
        raw = json.loads((folder / "config.json").read_text())
        more = folder / "generation_config.json"
        eos = _ids(raw.get("eos_token_id")) | (
            _ids(json.loads(more.read_text()).get("eos_token_id")) if more.exists() else set()
        )
        return ModelSpec(
            id=model_id,
            version=version,
            vocab_size=int(raw["vocab_size"]),
            context_length=min(max_model_len, int(raw["max_position_embeddings"])),
            eos_token_ids=frozenset(eos),
            created_unix_s=created_unix_s,
            capabilities=CAPABILITIES,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlatformError(Code.DATA_LOSS, f"{folder.name}: its configuration cannot be read: {error!r}") from error


def _ids(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)
