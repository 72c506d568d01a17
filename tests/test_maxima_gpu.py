"""Maxima of rows found among integers (device/softmax.py), by themselves: exact for whatever there is."""

import pytest
import torch

pytest.importorskip("triton")
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tandem_attn.device.softmax import row_maximum
from tandem_attn.kernels.config import accumulator

pytestmark = pytest.mark.gpu

ROWS, KEYS = 64, (64, 128, 256)
INF, NEAREST = float("inf"), -1e-45  # the negative number that is nearest to zero


@gluon.jit
def _maxima(scores, largest, KEYS: gl.constexpr, layout: gl.constexpr):
    """Of one tile of scores as wgmma leaves it in registers."""
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))
    column = gl.arange(0, KEYS, gl.SliceLayout(0, layout))
    s = gl.load(scores + row[:, None] * KEYS + column[None, :])
    gl.store(largest + row, row_maximum(s))


def maxima(x: torch.Tensor) -> torch.Tensor:
    """What the kernels find in the tile x."""
    found = x.new_full((ROWS,), float("nan"))
    _maxima[(1,)](x, found, x.shape[1], accumulator(x.shape[1]), num_warps=4)
    return found


def tiles(keys: int) -> dict[str, torch.Tensor]:
    """Tiles of scores, by what is special about them."""
    generator = torch.Generator().manual_seed(keys)
    x = torch.randn(ROWS, keys, generator=generator)
    below = -x.abs() - 0.1
    above = torch.zeros_like(x, dtype=torch.bool)
    above[torch.arange(ROWS), torch.randint(keys, (ROWS,), generator=generator)] = True
    return {
        "around zero": x,
        "all below": below,
        "every other row below": torch.where(torch.arange(ROWS)[:, None] % 2 == 0, x, below),
        "one above": torch.where(above, 2.0, below),
        "far below": below * 1e30,
        "hidden": torch.full_like(x, -INF),
        "all but one hidden, which is below": torch.where(above, below, -INF),
        "zeros of both signs": torch.where(x > 0, 0.0, -0.0),
        "zero and below": torch.where(above, -0.0, below),
        "nearly zero": torch.where(above, NEAREST, below),
        "infinite": torch.where(x > 2, INF, x),
    }


@pytest.mark.parametrize("what", tiles(64))
@pytest.mark.parametrize("keys", KEYS)
def test_maxima_are_exact(keys, what):
    x = tiles(keys)[what].cuda()
    torch.testing.assert_close(maxima(x), x.amax(1), rtol=0, atol=0)


@pytest.mark.parametrize("keys", KEYS)
def test_wherever_the_largest_is(keys):
    """In each column in turn, for rows all below zero and for rows with one number above."""
    for value in (-0.5, 0.5):
        for column in range(keys):
            x = torch.full((ROWS, keys), -1.0, device="cuda")
            x[:, column] = value
            assert (maxima(x) == value).all(), (value, column)
