"""Hyperparameters: what a client may ask for, within which bounds, and what "auto" comes to for a file.

"auto" aims at a number of optimizer steps, because on a small file an epoch is a handful of steps: docs/LOG.md has the
runs behind the constants.
"""

import json
import math
from dataclasses import dataclass

from chassis.errors import Code, PlatformError

MAX_EPOCHS = 50
MAX_BATCH_SIZE = 256  # cut into pieces, so it costs no memory
MAX_MULTIPLIER = 100.0
MAX_STEPS = 10_000

_AUTO_BATCH_SIZE = 4
_AUTO_STEPS = 60  # a dozen paraphrases of one fact are known by heart after 40
_AUTO_MAX_STEPS = 1_000  # about half an hour on two cores; three epochs of more than that is for who asks for it
_AUTO_MIN_EPOCHS = 3
_LEARNING_RATE = 5e-4
_WARMUP_STEPS = 10

_KNOWN = ("n_epochs", "batch_size", "learning_rate_multiplier")


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """What was asked for; None stands for "auto"."""

    n_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do, all decided: two runs with equal plans over one file and model are the same run."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    num_examples: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that take every example once; the last batch of an epoch may be smaller."""
        return math.ceil(self.num_examples / self.batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps in all."""
        return self.n_epochs * self.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """Returns the rate of a step, counted from 0: linear warm-up, then linear down to a tenth."""
        warmup = min(_WARMUP_STEPS, max(1, self.total_steps // 10))
        rising = min(1.0, (step + 1) / warmup)
        falling = 1.0 - 0.9 * step / self.total_steps
        return _LEARNING_RATE * self.learning_rate_multiplier * rising * falling


def parse_hyperparameters(text: str) -> Hyperparameters:
    """Reads the JSON text of a job; "" is all auto. Raises INVALID_ARGUMENT that names the field and its bounds."""
    try:
        fields = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise _refused("", f"they are not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise _refused("", "they must be a JSON object")
    for name in fields:
        if name not in _KNOWN:
            raise _refused(name[:64], f"unknown; known are {', '.join(_KNOWN)}")
    return Hyperparameters(
        _whole(fields, "n_epochs", MAX_EPOCHS),
        _whole(fields, "batch_size", MAX_BATCH_SIZE),
        _multiplier(fields),
    )


def plan_of(asked: Hyperparameters, num_examples: int, seed: int) -> Plan:
    """Decides what is left on auto. Raises INVALID_ARGUMENT where what was asked for takes too many steps."""
    # Not above a third of the file: a few examples are better seen one by one than as one batch.
    batch_size = asked.batch_size or min(_AUTO_BATCH_SIZE, max(1, num_examples // 3))
    steps_per_epoch = math.ceil(num_examples / batch_size)
    n_epochs = asked.n_epochs or _auto_epochs(steps_per_epoch)
    plan = Plan(n_epochs, batch_size, asked.learning_rate_multiplier or 1.0, num_examples, seed)
    if plan.total_steps > MAX_STEPS:
        message = (
            f"{n_epochs} epochs of {num_examples} examples in batches of {batch_size} are {plan.total_steps} steps; "
            f"the most is {MAX_STEPS}"
        )
        raise _refused("n_epochs", message)
    return plan


def _auto_epochs(steps_per_epoch: int) -> int:
    wanted = max(_AUTO_MIN_EPOCHS, math.ceil(_AUTO_STEPS / steps_per_epoch))
    affordable = max(1, _AUTO_MAX_STEPS // steps_per_epoch)
    return min(wanted, affordable, MAX_EPOCHS)


def _whole(fields: dict[str, object], name: str, most: int) -> int | None:
    value = fields.get(name, "auto")
    if value == "auto" or value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise _refused(name, f'it must be "auto" or a whole number from 1 to {most}')
    return value


def _multiplier(fields: dict[str, object]) -> float | None:
    value = fields.get("learning_rate_multiplier", "auto")
    if value == "auto" or value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_MULTIPLIER:
        message = f'it must be "auto" or a number above 0, up to {MAX_MULTIPLIER:g}'
        raise _refused("learning_rate_multiplier", message)
    return float(value)


def _refused(name: str, why: str) -> PlatformError:
    param = f"hyperparameters.{name}" if name else "hyperparameters"
    return PlatformError(Code.INVALID_ARGUMENT, f"{param}: {why}", param=param)
