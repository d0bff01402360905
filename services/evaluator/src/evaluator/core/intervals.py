"""95% confidence intervals by the bootstrap over samples.

The percentile method (Efron and Tibshirani 1993, chapter 13; for BLEU Koehn 2004): the samples are drawn anew with
replacement, `RESAMPLES` times with a fixed seed, the metric is computed of each draw, and the 2.5th and 97.5th
percentiles are the interval. Of a mean as of a corpus BLEU or of bits per byte, a metric is a function of sums over
samples, so a draw costs one product of matrices.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
_SEED = 20161115
_PERCENTILES = (2.5, 97.5)

Floats = NDArray[np.floating[Any]]


def interval(
    rows: Floats, value_of: Callable[[Floats], Floats], *, bounds: tuple[float, float]
) -> tuple[float, float, float]:
    """Returns the value, the lower and the upper end, with lower <= value <= upper.

    rows (samples, k): what each sample adds; value_of (m, k) -> (m): the metric of m rows of sums. One sample tells
    nothing of how samples differ: its interval is `bounds`, the whole range of the metric, widened to hold the value.
    """
    num_samples = len(rows)
    value = float(value_of(rows.sum(axis=0, keepdims=True))[0])
    if num_samples == 1:
        low, high = bounds
    else:
        draws = np.random.default_rng(_SEED).multinomial(
            num_samples, np.full(num_samples, 1 / num_samples), size=RESAMPLES
        )
        low, high = (float(end) for end in np.percentile(value_of(draws @ rows), _PERCENTILES))
    return value, min(low, value), max(high, value)
