"""Which examples a step takes: a function of seed and step alone, so that a run resumes anywhere."""

import random

from trainer.core.hyperparameters import Plan


class BatchOrder:
    """Shuffles anew for every epoch. Not thread-safe; cheapest when steps are asked for in order."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._epoch = -1
        self._shuffled: list[int] = []

    def batch(self, step: int) -> list[int]:
        """Returns the numbers of the examples of a step, counted from 0; the last of an epoch may hold fewer."""
        epoch, place = divmod(step, self._plan.steps_per_epoch)
        if epoch != self._epoch:
            self._shuffled = list(range(self._plan.num_examples))
            random.Random(f"{self._plan.seed}/{epoch}").shuffle(self._shuffled)
            self._epoch = epoch
        start = place * self._plan.batch_size
        return self._shuffled[start : start + self._plan.batch_size]
