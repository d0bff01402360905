"""A checkpoint: adapter, optimizer, random state and position in one file, so that a rename makes all of it stand.

Safetensors, never pickle: what lies in the data folder is data.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trainer.backends.durable_files import write_whole
from trainer.backends.run_files import CHECKPOINT

_RANDOM = "random.torch"
_STATES = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps of a parameter


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a run stands after `step` optimizer steps."""

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]]
    random_state: Tensor


def write_checkpoint(
    folder: Path, fingerprint: str, step: int, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Replaces the run's checkpoint; raises OSError where there is no room, and then the old one stands.

    fingerprint: what the run is made of; a checkpoint of another run is not resumed from.
    """
    tensors = {_RANDOM: torch.get_rng_state()}
    for name, weight in weights.items():
        tensors[f"weight/{name}"] = weight.detach()
        for state in _STATES:
            tensors[f"{state}/{name}"] = optimizer.state[weight][state].detach()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_whole(folder / CHECKPOINT, save(tensors, {"step": str(step), "fingerprint": fingerprint}))


def read_checkpoint(folder: Path, fingerprint: str) -> Checkpoint | None:
    """Returns the run's checkpoint; None where there is none, or one that is damaged or of another run."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != fingerprint:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            step = int(metadata["step"])
        names = [name.removeprefix("weight/") for name in tensors if name.startswith("weight/")]
        optimizer = {name: {state: tensors[f"{state}/{name}"] for state in _STATES} for name in names}
        weights = {name: tensors[f"weight/{name}"] for name in names}
        return Checkpoint(step, weights, optimizer, tensors[_RANDOM])
    except (SafetensorError, KeyError, ValueError, json.JSONDecodeError):
        return None


def restore(checkpoint: Checkpoint, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Puts a checkpoint's state into a fresh run."""
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(checkpoint.weights[name])
            optimizer.state[weight] = {state: tensor.clone() for state, tensor in checkpoint.optimizer[name].items()}
    torch.set_rng_state(checkpoint.random_state)
