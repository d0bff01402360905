"""Packed weights: the layout against a slow reading of it, and what quantising may change."""

import numpy as np
import pytest

from chassis.errors import Code, PlatformError
from modelstore.packing import PackFormat, pack_matrix, quantise_int4, unpack_matrix

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("form", "steps"), [("int4", 15), ("int8", 254)])
def test_a_packed_matrix_reads_back_within_half_a_step(form: PackFormat, steps: int) -> None:
    weights = RNG.standard_normal((40, 96)).astype(np.float32)
    tiles = pack_matrix(weights, form)
    back = unpack_matrix(tiles, form, 40)
    groups = weights.reshape(40, 3, 32)
    step = np.ptp(groups, axis=2) / steps if form == "int4" else 2 * np.abs(groups).max(axis=2) / steps
    error = np.abs(back - weights).reshape(40, 3, 32).max(axis=2)
    assert (error <= step * 0.7 + 0.002).all()
    assert tiles.shape[:2] == (3, 3)


def test_a_tile_holds_what_the_kernels_expect() -> None:
    weights = np.zeros((16, 32), dtype=np.float32)
    weights[5, 7], weights[5, 20] = 15.0, 3.0  # a group from 0 to 15 has scale 1 and minimum 0
    (tile,) = pack_matrix(weights, "int4")[0]
    assert tile[1 * 64 + 5 * 4 + 3] == 15  # column 7 = 4 * 1 + 3, low half
    assert tile[1 * 64 + 5 * 4 + 0] == 3 << 4  # column 20 = 16 + 4 * 1 + 0, high half
    assert tile[256:288].view(np.float16)[5] == 1.0


def test_weights_that_were_4_bits_before_come_back_nearly_unchanged() -> None:
    numbers = RNG.integers(0, 16, (64, 32))
    numbers[:, 0], numbers[:, 1] = 0, 15
    scale, minimum = RNG.uniform(0.001, 0.02, (64, 1)), RNG.uniform(-0.2, 0, (64, 1))
    exact = (numbers * scale + minimum).astype(np.float32)
    rounded = (exact.view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32)  # as bfloat16 keeps them
    found, _, _ = quantise_int4(rounded)
    assert (found == numbers).all()


def test_columns_that_do_not_divide_are_refused() -> None:
    with pytest.raises(PlatformError) as caught:
        pack_matrix(np.zeros((16, 40), dtype=np.float32), "int4")
    assert caught.value.code is Code.FAILED_PRECONDITION
