"""Laws of products by tiles: as near as float32 is, row by row the same whatever else is there, nothing beside them touched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aifactory.engine import matrix_unit, tiles
from aifactory.engine.compilation import kernel
from aifactory.engine.matrix_unit import DEPTH
from aifactory.engine.products import product
from aifactory.engine.vectors import PANEL, round_in_place

pytestmark = pytest.mark.skipif(
    not matrix_unit.can_use_tiles(), reason="this processor has no tiles, or they are not to be had"
)

SHAPES = [
    (512, 64, 768),
    (64, 96, 2048),
    (33, 176, 40),
    (17, 80, 72),
    (49, 48, 776),
    (16, 112, 32),
    (8, 64, 96),
    (1, 16, 8),
]


def matrix(kind, num_rows, length, rng):
    """Weights of a kind as numbers, and as the kernels have them."""
    w_NK = rng.standard_normal((num_rows, length)).astype(np.float32)
    if kind == "bfloat16":
        w_NK = (w_NK.view(np.int32) & -65536).view(np.float32)
    elif kind == "int8":
        w_NK = np.clip(np.round(w_NK * 40), -127, 127).astype(np.float32)
    panels = np.ascontiguousarray(w_NK.reshape(-1, PANEL, length).transpose(0, 2, 1))
    if kind == "bfloat16":
        whole = np.zeros((len(panels), -(-length // DEPTH) * DEPTH, PANEL), np.int16)
        whole[:, :length] = panels.view(np.int32) >> 16
        pairs = whole.reshape(len(panels), -1, 2, PANEL).transpose(0, 1, 3, 2)
        panels = np.ascontiguousarray(pairs).reshape(len(panels), -1, 2 * PANEL)
    return w_NK, panels.astype(np.int8) if kind == "int8" else panels


@kernel
def terms_beside(w_PK):
    return matrix_unit.terms_beside(w_PK)


@kernel
def _round(x_K):
    round_in_place(x_K, len(x_K))


def rounded(x_BK):
    """To bfloat16, as float32."""
    x_BK = x_BK.copy()
    for x_K in x_BK:
        _round(x_K)
    return x_BK


def multiplied(panels, x_BK, begin=0, end=None):
    """By tiles, into room that begins as nan and has a row too many."""
    num_rows, length = x_BK.shape
    left = np.empty(tiles.num_left(num_rows, length), np.int16)
    for b in range(num_rows):
        tiles.cut_row(x_BK[b], b, left, terms_beside(panels))
    y_BN = np.full((num_rows + 1, PANEL * len(panels)), np.nan, np.float32)
    right, parts = np.empty(tiles.NUM_RIGHT, np.int16), np.empty(tiles.num_parts(num_rows), np.float32)
    tiles.multiply_tiles(panels, left, right, parts, y_BN, num_rows, begin, len(panels) if end is None else end)
    assert np.isnan(y_BN[-1]).all()
    return y_BN[:-1]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_are_as_near_as_products_in_float32(kind, shape):
    num_rows, num_columns, length = shape
    rng = np.random.default_rng(length)
    w_NK, panels = matrix(kind, num_columns, length, rng)
    x_BK = rng.standard_normal((num_rows, length)).astype(np.float32)
    if kind == "bfloat16":
        x_BK = rounded(x_BK)
    exact_BN = x_BK.astype(np.float64) @ w_NK.T.astype(np.float64)
    # Of what the sums could be at most.
    most_BN = np.abs(x_BK).astype(np.float64) @ np.abs(w_NK.T).astype(np.float64)

    error = (np.abs(multiplied(panels, x_BK) - exact_BN) / most_BN).max()

    assert error < 1.5 * 2.0**-22
    y_BN = np.empty((num_rows, num_columns), np.float32)
    none = np.empty(0, np.float32)
    product(0, 1, np.zeros(24, np.int64), panels, none, none, x_BK, y_BN)
    assert error < 2 * (np.abs(y_BN - exact_BN) / most_BN).max() + 2.0**-24


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("length", [104, 576])
def test_a_row_has_the_same_bits_alone_and_among_others_by_whatever_panels(kind, length):
    rng = np.random.default_rng(1)
    _, panels = matrix(kind, 11 * PANEL, length, rng)
    x_BK = rounded(rng.standard_normal((70, length)).astype(np.float32))
    all_BN = multiplied(panels, x_BK)
    for first, last in [(0, 1), (5, 21), (16, 49), (69, 70), (3, 67)]:
        assert (multiplied(panels, x_BK[first:last]) == all_BN[first:last]).all()
    for begin, end in [(0, 1), (3, 8), (4, 11)]:
        part_BN = multiplied(panels, x_BK, begin, end)
        columns = slice(PANEL * begin, PANEL * end)
        assert (part_BN[:, columns] == all_BN[:, columns]).all()
        assert np.isnan(np.delete(part_BN, np.r_[columns], axis=1)).all()


def test_numbers_of_all_sizes_keep_their_last_bits_and_what_is_no_number_stays_none():
    rng = np.random.default_rng(2)
    w_NK, panels = matrix("float32", PANEL, 64, rng)
    x_BK = (rng.standard_normal((3, 64)) * 10.0 ** rng.integers(-12, 12, (3, 64))).astype(np.float32)
    exact_BN = x_BK.astype(np.float64) @ w_NK.T.astype(np.float64)
    most_BN = np.abs(x_BK).astype(np.float64) @ np.abs(w_NK.T).astype(np.float64)
    assert (np.abs(multiplied(panels, x_BK) - exact_BN) / most_BN).max() < 1.5 * 2.0**-22
    # One times a number is that number, to the bit.
    assert (multiplied(panels, np.eye(64, dtype=np.float32)) == w_NK.T).all()

    for value in (np.nan, np.inf):
        x_BK[1, 7] = value
        assert not np.isfinite(multiplied(panels, x_BK)[1]).any()
        assert np.isfinite(multiplied(panels, x_BK)[[0, 2]]).all()


def test_bfloat16_is_the_nearest_of_two_equally_near_the_even_one():
    rng = np.random.default_rng(3)
    numbers = (rng.standard_normal(4096) * 10.0 ** rng.integers(-30, 30, 4096)).astype(np.float32)
    halves = (rng.integers(0, 2**15, 64, dtype=np.int32) << 16 | 0x8000).view(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-40, np.nan], np.float32)
    given = np.concatenate([special, numbers, halves[np.isfinite(halves)]])
    given = given[: len(given) // 8 * 8]

    found = rounded(given[None])[0]

    assert np.array_equal(found, torch.from_numpy(given).bfloat16().float().numpy(), equal_nan=True)
