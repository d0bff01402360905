"""The base with a LoRA adapter on it (peft), and the adapter as the files that peft reads."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModelForCausalLM

from chassis.errors import Code, PlatformError

# Every linear layer of a decoder block: adapters on attention alone learn a fact more slowly.
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 8
ALPHA = 16
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


@dataclass(slots=True)
class LoraModel:
    """`decoder` gives hidden states, `head` turns those into logits; `weights` are the trained ones, by name."""

    peft: Any
    decoder: Any
    head: Any
    weights: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path, *, seed: int, dtype: Literal["auto", "bf16", "fp32"]) -> "LoraModel":
        """Reads a verified model folder; the adapter begins as a function of the seed. Blocks for seconds."""
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=_torch_dtype(dtype), local_files_only=True)
        base.config.use_cache = False
        torch.manual_seed(seed)
        config = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=list(TARGET_MODULES),
            # No dropout: on a dozen examples it only slows learning down.
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
            base_model_name_or_path=folder.name,
        )
        try:
            peft_model = get_peft_model(base, config)  # the adapter is fp32, whatever the base is
        except ValueError as error:  # no such layers
            message = f"model {folder.name}: its architecture cannot be finetuned ({error})"
            raise PlatformError(Code.FAILED_PRECONDITION, message, param="model") from error
        weights: dict[str, Tensor] = {
            name: weight for name, weight in peft_model.named_parameters() if weight.requires_grad
        }
        causal: Any = peft_model.base_model.model
        return cls(peft_model, causal.get_decoder(), causal.get_output_embeddings(), weights)

    def save_memory(self) -> None:
        """Computes each layer's activations again in the backward pass: a third slower, for long examples."""
        self.peft.gradient_checkpointing_enable({"use_reentrant": False})
        self.peft.enable_input_require_grads()

    def adapter_files(self, base_id: str) -> Mapping[str, bytes]:
        """Returns the files of the adapter, by name, in peft's format."""
        config = self.peft.peft_config["default"].to_dict()
        config |= {"base_model_name_or_path": base_id, "inference_mode": True}
        text = json.dumps(config, indent=2, sort_keys=True, default=_plain) + "\n"
        state = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(self.peft).items()}
        return {CONFIG_NAME: text.encode(), WEIGHTS_NAME: save(state, {"format": "pt"})}


def _torch_dtype(dtype: Literal["auto", "bf16", "fp32"]) -> torch.dtype:
    """bf16 where the processor multiplies it natively; elsewhere it would be emulated, at twice the time."""
    if dtype != "auto":
        return torch.bfloat16 if dtype == "bf16" else torch.float32
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")
    return torch.bfloat16 if native else torch.float32


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
