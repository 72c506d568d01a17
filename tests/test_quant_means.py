"""Means subtracted from K and V before they become FP8: of which rows, and what accounts for them."""

import math

import pytest
import torch
from test_quant import fp8, some, vector

from tandem_attn.quant import BLOCK_K, MEAN_ROWS, Fp8Recipe, channel_mean, key_mean, rows_of, untransposed
from tandem_attn.testing.plain import DeviceInt, Language, gluon_module, load

LENGTHS = (0, 1, 5, MEAN_ROWS - 1, MEAN_ROWS, MEAN_ROWS + 1, 300, 2 * MEAN_ROWS, 2 * MEAN_ROWS + 1, 70_001)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("most", [None, MEAN_ROWS])
def test_means_are_of_rows_evenly_spaced(length, most):
    """Of each sequence, packed or alone; NaN in all others."""
    count = min(length, most or length)
    taken = [i * length // count for i in range(count)]
    assert len(set(taken)) == count
    x = torch.full((length, 2, 16), math.nan)
    x[taken] = torch.randn(count, 2, 16)
    expected = x[taken].double().sum(0) / max(count, 1)
    alone = channel_mean(x[None], rows_of(x[None]), most)
    torch.testing.assert_close(alone[0].double(), expected, rtol=1e-6, atol=1e-6)
    around = torch.cat((torch.randn(7, 2, 16), x, torch.randn(9, 2, 16)))
    starts, used = vector(0, 7, 11 + length), vector(7, length)
    packed = channel_mean(around, rows_of(around, starts, used), most)
    torch.testing.assert_close(packed[1], alone[0])
    torch.testing.assert_close(packed[0], around[:7].mean(0))


def test_kernels_take_the_same_rows():
    """device/fp8_tiles.py on plain integers, which refuse to leave 32 bits."""
    device = load(["device.fp8_tiles"], gluon_module(Language()))["tandem_attn.device.fp8_tiles"]
    assert device.MEAN_ROWS == MEAN_ROWS
    for length in (*LENGTHS, 2**30 - 1):
        size = DeviceInt(length)
        count = device.sample_size(size)
        assert count == min(length, MEAN_ROWS)
        for i in range(int(count)):
            assert device.sampled_row(DeviceInt(i), size, count) == i * length // int(count)


@pytest.mark.parametrize("rotate", [False, True])
def test_means_subtracted_are_kept(rotate):
    q, k, v = some(seqlen_k=2000, head_dim_v=80)
    made = fp8(q, k, v, Fp8Recipe(rotate=rotate, smooth_v=True))
    assert torch.equal(made.k_mean, key_mean(k, rows_of(k)))
    torch.testing.assert_close(made.v_mean, channel_mean(v, rows_of(v)))
    assert made.v_mean.shape == (2, 2, 80) and made.v_mean.abs().max() > 0.5
    without = untransposed(made.v_t).float()[:, :2000] * rows_of(v).each(made.v_descale, BLOCK_K)
    assert without.mean(1).abs().max() < 0.01, "what is left"
    assert fp8(q, k, v, Fp8Recipe(smooth_k=False)).k_mean is None
    assert fp8(q, k, v, Fp8Recipe()).v_mean is None


def test_a_mean_of_v_costs_no_precision():
    q, k, v = some()
    v += 20
    plain, smooth = (fp8(q, k, v, Fp8Recipe(smooth_v=s)).dequantized()[2] for s in (False, True))
    assert (smooth - v).norm() < 0.2 * (plain - v).norm()


@pytest.mark.parametrize("rotate", [False, True])
def test_smoothing_keeps_softmax_and_corrects_lse(rotate):
    q, k, v = some(dtype=torch.float64)
    made = fp8(q, k, v, Fp8Recipe(rotate=rotate))
    rows = rows_of(k)
    mean = key_mean(k, rows)
    assert torch.equal(made.k_mean, mean)
    scale = q.shape[-1] ** -0.5

    def scores(k):
        return torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) * scale

    whole, smooth = scores(k), scores(k - mean.double()[:, None])
    torch.testing.assert_close(smooth.softmax(-1), whole.softmax(-1))
    corrected = smooth.logsumexp(-1) + scale * made.lse_shift  # which is float32
    torch.testing.assert_close(corrected, whole.logsumexp(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mean_of_keys_is_a_number_of_their_dtype(dtype):
    """Within half a step of it: what that leaves is less than keys around it were rounded by."""
    _, k, _ = some(seqlen_k=2000, dtype=dtype)
    exact, mean = channel_mean(k, rows_of(k), MEAN_ROWS), key_mean(k, rows_of(k))
    assert torch.equal(mean.to(dtype).float(), mean) and mean.dtype == torch.float32
    assert ((mean - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2).all()
    assert dtype == torch.float32 or not torch.equal(mean, exact)


def test_smoothing_helps_keys_that_share_a_direction():
    q, k, v = some()
    k += 30
    plain, smooth = (
        fp8(q, k, v, Fp8Recipe(rotate=False, smooth_k=s)).dequantized()[1] for s in (False, True)
    )
    assert (smooth - k).norm() < 0.2 * (plain - k).norm()
