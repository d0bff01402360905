"""The training loop: plain torch, the same result for the same seed, resumable after every step.

B: examples of a micro-batch, T: its longest, H: hidden size, V: vocabulary, N: learned tokens of a micro-batch.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from chassis.errors import Code, PlatformError
from trainer.backends.chat_tokens import TokenSequence
from trainer.backends.lora.checkpoint import read_checkpoint, restore, write_checkpoint
from trainer.backends.lora.model import LoraModel
from trainer.core.hyperparameters import Plan
from trainer.core.order import BatchOrder
from trainer.core.runs import Step

# Activations of a micro-batch decide the memory: about 1 MB a token on the default base.
_MICRO_BATCH_TOKENS = 512
# Logits of so many positions at once: 512 x 49,152 fp32 values are 100 MB, and twice that with their gradient.
_LOGIT_ROWS = 512
_MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """Beside the plan: how often to write a checkpoint. `fingerprint`: what makes this run the same run."""

    checkpoint_interval_s: float
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Hooks:
    """Whom the loop tells. `resumed` comes once, before the first step, with the steps that are done."""

    resumed: Callable[[int], None]
    stepped: Callable[[Step], None]
    before_checkpoint: Callable[[], None]
    checkpointed: Callable[[int], None]


def train(
    model: LoraModel, sequences: Sequence[TokenSequence], plan: Plan, folder: Path, options: LoopOptions, hooks: Hooks
) -> None:
    """Runs the plan to its end from wherever its last checkpoint stands. Raises OSError where the disk is full."""
    if max(len(sequence.ids) for sequence in sequences) > _MICRO_BATCH_TOKENS:
        model.save_memory()
    optimizer = torch.optim.AdamW(model.weights.values(), lr=plan.learning_rate(0), weight_decay=0.0)
    done = 0
    if (checkpoint := read_checkpoint(folder, options.fingerprint)) is not None:
        restore(checkpoint, model.weights, optimizer)
        done = checkpoint.step
    hooks.resumed(done)
    order = BatchOrder(plan)
    model.peft.train()
    next_at = time.monotonic() + options.checkpoint_interval_s
    for step in range(done, plan.total_steps):
        batch = [sequences[i] for i in order.batch(step)]
        rate = plan.learning_rate(step)
        loss = _optimize(model, batch, optimizer, rate)
        num_tokens = sum(len(sequence.ids) for sequence in batch)
        hooks.stepped(Step(step + 1, loss, num_tokens, rate, int(time.time() * 1000)))
        if time.monotonic() >= next_at or step + 1 == plan.total_steps:
            hooks.before_checkpoint()
            write_checkpoint(folder, options.fingerprint, step + 1, model.weights, optimizer)
            hooks.checkpointed(step + 1)
            next_at = time.monotonic() + options.checkpoint_interval_s


def _optimize(
    model: LoraModel, batch: Sequence[TokenSequence], optimizer: torch.optim.Optimizer, learning_rate: float
) -> float:
    """Does one step; returns the mean loss of the batch's learned tokens."""
    num_learned = sum(sum(sequence.is_learned[1:]) for sequence in batch)
    total = 0.0
    for piece in micro_batches(batch):
        # Divided by the whole batch's tokens, so that cutting a batch up changes nothing but rounding.
        total += _backward(model, piece, 1.0 / num_learned)
    if not math.isfinite(total):
        message = "the loss is no longer a number: lower hyperparameters.learning_rate_multiplier"
        raise PlatformError(Code.FAILED_PRECONDITION, message, param="hyperparameters.learning_rate_multiplier")
    torch.nn.utils.clip_grad_norm_(model.weights.values(), _MAX_GRADIENT_NORM)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return total / num_learned


def micro_batches(batch: Sequence[TokenSequence]) -> list[list[TokenSequence]]:
    """Cuts a batch into pieces of bounded size, padding included; an example is never cut."""
    pieces: list[list[TokenSequence]] = []
    longest = 0
    for sequence in batch:
        longest = max(longest, len(sequence.ids))
        if pieces and longest * (len(pieces[-1]) + 1) <= _MICRO_BATCH_TOKENS:
            pieces[-1].append(sequence)
        else:
            pieces.append([sequence])
            longest = len(sequence.ids)
    return pieces


def _backward(model: LoraModel, sequences: Sequence[TokenSequence], scale: float) -> float:
    """Adds the gradient of the scaled sum of losses; returns the sum, unscaled."""
    ids, attended, is_target = _padded(sequences)
    hidden: Tensor = model.decoder(input_ids=ids, attention_mask=attended).last_hidden_state  # (B, T, H)
    learning = hidden[:, :-1][is_target]  # (N, H): the positions whose next token is learned
    targets = ids[:, 1:][is_target]  # (N,)
    # Logits are the largest thing here, so never all at once: their gradient is gathered on a cut-off copy.
    cut = learning.detach().requires_grad_()
    total = 0.0
    for start in range(0, len(targets), _LOGIT_ROWS):
        logits = model.head(cut[start : start + _LOGIT_ROWS]).float()  # (rows, V)
        loss = functional.cross_entropy(logits, targets[start : start + _LOGIT_ROWS], reduction="sum")
        torch.autograd.backward(loss * scale)
        total += float(loss.detach())
    torch.autograd.backward(learning, cut.grad)
    return total


def _padded(sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ids (B, T), which of them are no padding (B, T), and whether the next one is learned (B, T - 1)."""
    longest = max(len(sequence.ids) for sequence in sequences)
    ids = torch.zeros((len(sequences), longest), dtype=torch.long)
    attended = torch.zeros_like(ids)
    is_target = torch.zeros((len(sequences), longest - 1), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        length = len(sequence.ids)
        ids[row, :length] = torch.tensor(sequence.ids)
        attended[row, :length] = 1
        is_target[row, : length - 1] = torch.tensor(sequence.is_learned[1:])
    return ids, attended, is_target
