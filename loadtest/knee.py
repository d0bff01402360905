"""Where more load stops to bring more throughput: Kneedle (Satopaa and others, 2011), for concave rising curves."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

_MIN_POINTS = 4


@dataclass(frozen=True, slots=True)
class Knee:
    """index: which point it is, or None; why: one sentence for the report."""

    index: int | None
    why: str


def find_knee(load: Sequence[float], throughput: Sequence[float], sensitivity: float = 1.0) -> Knee:
    """Finds the knee of throughput over load; load must rise strictly.

    Both axes are scaled to 0..1, and the knee is the greatest difference of the curve above the diagonal. It counts
    only if the difference falls below its peak by sensitivity times the mean step on the load axis: otherwise the curve
    was still rising when the test ended. The points are few and are taken as measured, without Kneedle's smoothing.
    """
    if len(load) != len(throughput) or any(b <= a for a, b in itertools.pairwise(load)):
        raise ValueError("load must rise strictly, with one throughput for each")
    if len(load) < _MIN_POINTS:
        return Knee(None, f"A knee needs at least {_MIN_POINTS} steps of load; there were {len(load)}.")
    low, high = min(throughput), max(throughput)
    if high <= low:
        return Knee(None, "No knee: throughput is the same at every load.")
    x = [(value - load[0]) / (load[-1] - load[0]) for value in load]
    y = [(value - low) / (high - low) for value in throughput]
    difference = [b - a for a, b in zip(x, y, strict=True)]
    peak = max(range(len(difference)), key=difference.__getitem__)
    threshold = difference[peak] - sensitivity / (len(x) - 1)
    if difference[peak] <= 0 or not any(value < threshold for value in difference[peak + 1 :]):
        return Knee(None, "No knee: throughput was still rising with the load at the last step.")
    return Knee(
        peak,
        f"Kneedle (S = {sensitivity:g}) on output tokens per second: the normalized curve lies {difference[peak]:.2f} "
        "above its diagonal there, more than anywhere else.",
    )
