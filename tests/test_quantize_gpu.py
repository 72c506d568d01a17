"""The kernels that make FP8 against the reference, on a Hopper GPU.

Values may differ by one e4m3 step in a thousandth of all, where a sum ends beside a boundary.
TANDEM_TEST_ON=cpu rehearses: the reference then answers for the kernels.
"""

import math
from unittest import mock

import pytest
import torch
from conftest import REHEARSAL

from tandem_attn import flash_attn_func, flash_attn_quantized_func, quantize_qkv, reference_quant
from tandem_attn.quant import (
    BLOCK_K,
    BLOCK_Q,
    E4M3,
    MEAN_ROWS,
    PADDING,
    Fp8Recipe,
    Fp8Tensors,
    Rows,
    channel_mean,
    key_mean,
    rotation_block,
    rows_of,
    signs_for,
    untransposed,
)
from tandem_attn.spec import Lengths
from tandem_attn.spec_quant import RotaryTables, quantize_spec, transpose_spec

pytestmark = pytest.mark.gpu
USUAL, BOTH_MEANS = Fp8Recipe(), Fp8Recipe(smooth_v=True)
PLAIN = Fp8Recipe(rotate=False, smooth_k=False)
LENGTHS = (1, 63, 64, 65, 127, 129, 1000)
LONG = (MEAN_ROWS - 1, MEAN_ROWS + 1, 2 * MEAN_ROWS - 1, 3001, 20_000)
GUARD = 4096  # bytes


@pytest.fixture
def device() -> torch.device:
    """As in conftest.py, but without the kernels of attention."""
    return torch.device("cpu" if REHEARSAL else "cuda")


@pytest.fixture
def guarded(monkeypatch):
    """Memory that is allocated unset lies between bytes that nobody may change: a function that looks."""
    taken = []

    def empty(*shape, dtype=torch.float32, device=None):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        size = math.prod(shape) * dtype.itemsize
        whole = torch.full((size + 2 * GUARD,), 0xA5, dtype=torch.uint8, device=device)
        taken.append((whole, size))
        return whole[GUARD : GUARD + size].view(dtype).view(shape)

    monkeypatch.setattr(torch, "empty", empty)

    def check() -> None:
        assert taken or REHEARSAL
        for whole, size in taken:
            assert (whole[:GUARD] == 0xA5).all() and (whole[GUARD + size :] == 0xA5).all()

    return check


def backend():
    if REHEARSAL:
        return reference_quant
    from tandem_attn.kernels import launch_quantize

    return launch_quantize


def some(
    device,
    batch,
    seqlen_q,
    seqlen_k,
    heads=4,
    kv_heads=2,
    head_dim=128,
    head_dim_v=None,
    dtype=torch.bfloat16,
):
    def one(seqlen, heads, dim):
        x = torch.randn(batch, seqlen, heads, dim, device=device) + 2 * torch.randn(dim, device=device)
        return x.to(dtype)

    return one(seqlen_q, heads, head_dim), one(seqlen_k, kv_heads, head_dim), one(
        seqlen_k, kv_heads, head_dim_v or head_dim
    )  # fmt: skip


def both(q, k, v, recipe=USUAL, lengths=None, rotary=None) -> tuple[Fp8Tensors, Fp8Tensors]:
    """(by the kernels, by the reference with the mean of K that the kernels had)."""
    spec = quantize_spec(q, k, v, lengths, recipe, rotary)
    assert REHEARSAL or not backend().quantize_reasons(spec)
    signs = signs_for(recipe, q.shape[-1], q.device) if recipe.rotate else None
    more = (signs, *((None, None) if rotary is None else rotary[:2]), *(lengths or ())[:4])
    mine = backend().quantize(spec)(q, k, v, *more)
    with mock.patch.object(reference_quant, "key_mean", lambda k, rows: accepted(mine.k_mean, k, rows)):
        theirs = reference_quant.quantize(spec)(q, k, v, *more)
    return tuple(Fp8Tensors(*x, recipe, q.dtype, lengths) for x in (mine, theirs))


def accepted(mean, k, rows: Rows) -> torch.Tensor:
    """A mean of K, once it is known to be that in float32, but for its last bits, rounded to K's dtype."""
    assert torch.equal(mean.to(k.dtype).float().nan_to_num(), mean.nan_to_num())
    exact = channel_mean(k, rows, MEAN_ROWS)
    half_step = torch.finfo(k.dtype).eps / 4 * 2.0 ** exact.frexp().exponent
    same = (mean == exact) | (mean.isnan() & exact.isnan())
    near = (mean - exact).abs() <= half_step + 1e-5 * exact.abs() + 2e-6
    assert (same | near).all()
    other = ~(same | (mean == key_mean(k, rows)))
    assert other.sum() <= max(2, 2e-3 * mean.numel())
    return mean


def check(a: Fp8Tensors, b: Fp8Tensors, flips: float = 1e-3, slack: float = 0.0) -> None:
    """Raise unless the kernels' `a` is as good as the reference's `b`. flips: of values that may differ, by
    one step and `slack`."""
    rows_q, rows_k = b.rows_q, b.rows_k
    for side, rows, block in (("q", rows_q, BLOCK_Q), ("k", rows_k, BLOCK_K), ("v", rows_k, BLOCK_K)):
        mine, theirs = (getattr(x, f"{side}_descale") for x in (a, b))
        assert mine.shape == theirs.shape
        mine, theirs = (rows.declared(rows.each(x, block)) for x in (mine, theirs))
        rtol = 1e-5 if flips < 1e-2 else 1e-2
        if side == "v":  # powers of two: equal, but where a mean's last bits carry over one
            unlike = (mine != theirs).sum()
            assert unlike == 0 or (b.v_mean is not None and unlike <= 0.01 * mine.numel())
            rtol = 1.0
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=0)
    for mine, theirs, rows in zip(values(a), values(b), (rows_q, rows_k, rows_k), strict=True):
        mine, theirs = rows.declared(mine), rows.declared(theirs)
        assert ((mine - theirs).abs() <= theirs.abs() * 2.0**-3 + 2.0**-9 + slack).all()  # one step
        assert (mine != theirs).sum() <= max(2, flips * mine.numel())
    if b.lse_shift is not None:
        torch.testing.assert_close(
            a.lse_shift, b.lse_shift, rtol=1e-3, atol=1e-3 * max(1, scale_of(b.lse_shift))
        )
    for mine, theirs in ((a.k_mean, b.k_mean), (a.v_mean, b.v_mean)):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert a.v_t.shape == b.v_t.shape
    if not rows_k.packed:
        assert not untransposed(a.v_t)[:, rows_k.count :].float().any()


def scale_of(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def values(x: Fp8Tensors) -> tuple[torch.Tensor, ...]:
    """float32 (q, k, v), not descaled, v with rows as k."""
    v_t = x.v_t if x.v_t.dim() == 4 else x.v_t[None]
    return x.q.float(), x.k.float(), x.rows_k.restored(untransposed(v_t)).float()


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 192, 224, 256])
@pytest.mark.parametrize("smooth", [False, True])
def test_head_dims(device, head_dim, smooth):
    recipe = Fp8Recipe(smooth_k=smooth, smooth_v=smooth)
    check(*both(*some(device, 2, 300, 401, head_dim=head_dim), recipe))


@pytest.mark.parametrize("head_dims", [(192, 128), (64, 256), (128, 48), (32, 16)])
@pytest.mark.parametrize("recipe", [USUAL, BOTH_MEANS], ids=str)
def test_head_dim_v_of_its_own(device, head_dims, recipe):
    check(*both(*some(device, 2, 300, 401, head_dim=head_dims[0], head_dim_v=head_dims[1]), recipe))


@pytest.mark.parametrize("head_dim", [16, 80, 112, 240])
def test_head_dims_that_are_not_rotated(device, head_dim):
    check(*both(*some(device, 2, 300, 401, head_dim=head_dim), Fp8Recipe(rotate=False)))


@pytest.mark.parametrize("seqlen", LENGTHS)
def test_lengths(device, guarded, seqlen):
    check(*both(*some(device, 3, seqlen, 1 + seqlen % 300, head_dim=64, kv_heads=4)))
    check(*both(*some(device, 1, 7, seqlen, heads=6, kv_heads=1), BOTH_MEANS))
    guarded()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["block", "head", "tensor"])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("smooth_k", [False, True])
@pytest.mark.parametrize("smooth_v", [False, True])
def test_recipes(device, guarded, dtype, granularity, rotate, smooth_k, smooth_v):
    recipe = Fp8Recipe(rotate, smooth_k, granularity, 5, smooth_v)
    check(*both(*some(device, 2, 333, 500, dtype=dtype), recipe))
    guarded()


@pytest.mark.parametrize("granularity", ["block", "head", "tensor"])
def test_scales_of_v_are_powers_of_two(device, granularity):
    q, k, v = some(device, 2, 64, 1000, head_dim=64)
    v *= 2.0 ** torch.randint(-20, 20, (2, 1000, 2, 1), device=device)
    v[0, :128, 0], v[0, 5, 0, 3] = 1.0, -448 * 2.0**-6  # an exact one, and the largest
    a, b = both(q, k, v, Fp8Recipe(granularity=granularity))
    check(a, b)
    assert (a.v_descale.frexp().mantissa == 0.5).all()
    if granularity == "block":
        assert a.v_descale[0, 0, 0] == 2.0**-6
    assert torch.equal(a.v_t.float(), b.v_t.float())


def test_given_signs(device):
    check(*both(*some(device, 2, 100, 200), Fp8Recipe(signs=[1, 1, -1, 1] * 32)))


def test_small_integers_are_exact(device):
    """Sums of integers are exact, and with 64 or 256 columns so is what they are multiplied by."""
    for head_dim in (64, 256):
        q, k, v = (x.round().clamp(-7, 7) for x in some(device, 2, 200, 300, head_dim=head_dim))
        a, b = both(q, k, v, Fp8Recipe(smooth_k=False))
        for mine, theirs in zip(values(a), values(b), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("seqlen", LONG)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_means_of_many_keys(device, guarded, seqlen, head_dim):
    """Samples of K, and more than a chunk for every program that sums V. Another row's number would show."""
    q, k, v = some(device, 2, 64, seqlen, heads=2, kv_heads=1, head_dim=head_dim)
    a, b = both(q, k, v, BOTH_MEANS)
    check(a, b)
    torch.testing.assert_close(a.v_mean, channel_mean(v, rows_of(v)), rtol=1e-5, atol=2e-6)
    guarded()


def test_means_of_packed_sequences_of_any_length(device):
    """Each its own sample: below MEAN_ROWS, above, of nothing, and of the part that is used."""
    counts = torch.tensor([MEAN_ROWS - 56, 3000, 9000, 0, 5000])
    starts = torch.cat((torch.zeros(1), counts.cumsum(0))).to(torch.int32).to(device)
    used = (counts - torch.tensor([0, 0, 0, 0, 1234])).to(torch.int32).to(device)
    total = int(starts[-1])
    q, k, v = (x[0] for x in some(device, 1, 5, total, heads=2, kv_heads=2, head_dim=64))
    of_q = torch.arange(6, dtype=torch.int32, device=device)
    lengths = Lengths(of_q, starts, None, used, 1, 9000)
    a, b = both(q, k, v, BOTH_MEANS, lengths)
    check(a, b)
    rows = rows_of(v, starts, used)
    torch.testing.assert_close(a.v_mean, channel_mean(v, rows), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("queries", [1, 3, 17, 63, 64])
@pytest.mark.parametrize("granularity", ["block", "head"])
def test_few_queries_of_several_sequences(device, queries, granularity):
    """One block of queries in a tile of two, which has no scale; and attention takes what comes of it."""
    q, k, v = some(device, 3, queries, 300, heads=6, head_dim=64)
    a, b = both(q, k, v, Fp8Recipe(granularity=granularity))
    check(a, b)
    assert a.q_descale.shape == (3, 6, 1) and (a.q_descale > 0).all()
    made = quantize_qkv(q, k, v, Fp8Recipe(granularity=granularity))
    assert made.q_descale.shape == (3, 6, 1) and torch.equal(made.q.float(), a.q.float())
    out = flash_attn_quantized_func(made)
    exact = flash_attn_func(q, k, v)
    assert float((out - exact).float().norm() / exact.float().norm()) < 0.07


@pytest.mark.parametrize("granularity", ["block", "head", "tensor"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_more_programs_than_are_resident(device, granularity, head_dim):
    """They start when the launch before is over; fewer wait for it themselves."""
    check(
        *both(
            *some(device, 2, 3000, 3000, heads=6, head_dim=head_dim),
            Fp8Recipe(granularity=granularity, smooth_v=True),
        )
    )


@pytest.mark.parametrize("granularity", ["block", "head", "tensor"])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_packed_sequences(device, guarded, granularity, used, head_dim):
    q, k, v, lengths = packed(device, used, head_dim)
    a, b = both(q, k, v, Fp8Recipe(granularity=granularity, smooth_v=head_dim == 128), lengths)
    check(a, b)
    assert torch.isfinite(a.lse_shift).all()
    guarded()


def packed(device, used: bool, head_dim: int):
    """(q, k, v, lengths) of sequences, one of them empty, with NaN around."""
    q, k, v = (x[0] for x in some(device, 1, 800, 1400, head_dim=head_dim))
    starts = [
        torch.tensor(x, dtype=torch.int32, device=device) for x in ([2, 130, 130, 787], [0, 129, 300, 1300])
    ]
    counts = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([128, 0, 600], [100, 171, 1000])]
    for x, begin, count in ((q, starts[0], counts[0]), (k, starts[1], counts[1]), (v, starts[1], counts[1])):
        count = count if used else begin.diff()
        outside = torch.ones(x.shape[0], dtype=torch.bool)
        for i, n in zip(begin.tolist(), count.tolist(), strict=False):
            outside[i : i + n] = False
        x[outside] = math.nan
    return q, k, v, Lengths(*starts, *(counts if used else (None, None)), 657, 1000)


def test_packed_rows_of_nobody_are_not_written(device):
    q, k, v, lengths = packed(device, True, 64)
    a, b = both(q, k, v, Fp8Recipe(), lengths)
    if not REHEARSAL:  # memory that is unset holds NaN here
        for mine, rows in ((a.q, a.rows_q), (a.k, a.rows_k)):
            assert mine.float()[~rows.places[2]].isnan().all()
    columns = columns_of(a.rows_k)
    assert torch.equal(a.v_t.float()[..., columns] == 0, b.v_t.float()[..., columns] == 0)


def columns_of(rows: Rows) -> torch.Tensor:
    """Whether columns of a packed V^T are written: whole tiles, one at least of each sequence."""
    columns = torch.zeros(rows.padded_count, dtype=torch.bool)
    for start, n in zip(rows.starts.tolist(), rows.lengths.tolist(), strict=False):
        columns[start : start + -(-max(n, 1) // PADDING) * PADDING] = True
    return columns


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("granularity", ["block", "head", "tensor"])
def test_sequences_without_rows_can_be_read(device, guarded, granularity, used):
    """Their first blocks, by queries that see no key: sequences without queries, keys, either, at the end."""

    def vector(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    starts_q, starts_k = vector(0, 0, 70, 70, 300, 300, 300), vector(0, 130, 130, 130, 260, 400, 400)
    counts = (vector(0, 70, 0, 230, 0, 0), vector(130, 0, 0, 129, 0, 0)) if used else (None, None)
    q, k, v = (x[0] for x in some(device, 1, 300, 400, head_dim=64))
    lengths = Lengths(starts_q, starts_k, *counts, 230, 140)
    a, b = both(q, k, v, Fp8Recipe(granularity=granularity, smooth_v=True), lengths)
    check(a, b)
    sides = (
        ("q", a.rows_q, BLOCK_Q, [0, 2, 4, 5]),
        ("k", a.rows_k, BLOCK_K, [1, 2, 5, *([4] if used else [])]),
    )
    for side, rows, block, empty in (*sides, ("v", *sides[1][1:])):
        descale = getattr(a, f"{side}_descale")
        if granularity == "tensor":
            assert (descale == descale.flatten()[0]).all() and torch.isfinite(descale).all()
            continue
        for i in empty:
            first = int(rows.starts[i]) // block
            mine = descale[i] if granularity == "head" else descale[:, first : first + PADDING // block]
            assert mine.numel() and (mine == 1).all()
    for i in sides[1][3]:
        first = int(a.rows_k.starts[i])
        assert not a.v_t[..., first : first + PADDING].float().any()
    assert all(torch.isfinite(x).all() for x in (a.lse_shift, a.k_mean, a.v_mean))
    guarded()


def test_many_short_sequences(device):
    """More than one look at the starts takes in."""
    counts = torch.arange(600) % 7
    starts = torch.cat((torch.zeros(1), counts.cumsum(0))).to(torch.int32).to(device)
    total = int(starts[-1])
    q, k, v = (x[0] for x in some(device, 1, total, total, head_dim=64))
    check(*both(q, k, v, Fp8Recipe(), Lengths(starts, starts, None, None, 6, 6)))


@pytest.mark.parametrize("form", ["qkv", "heads first", "expanded", "odd rows"])
def test_strides(device, form):
    q, k, v = some(device, 2, 200, 200, heads=4, kv_heads=4)
    if form == "qkv":
        q, k, v = torch.stack((q, k, v), 2).unbind(2)
    elif form == "heads first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif form == "expanded":
        k, v = (x[:, :, :1].expand(-1, -1, 4, -1) for x in (k, v))
    else:
        q, k, v = (torch.cat((x, x), -1)[:, 1::2, :, :128] for x in (q, k, v))
    check(*both(q, k, v))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim, dim", [(64, 64), (96, 96), (128, 128), (128, 32), (256, 64), (192, 16)])
@pytest.mark.parametrize("in_packs", [False, True])
def test_rotary_embedding(device, interleaved, head_dim, dim, in_packs):
    angles = torch.rand(1400, dim // 2, device=device) * 6
    kind = torch.bfloat16 if dim == 128 else torch.float32
    tables = RotaryTables(angles.cos().to(kind), angles.sin().to(kind), interleaved)
    if in_packs:
        q, k, v, lengths = packed(device, True, head_dim)
    else:
        (q, k, v), lengths = some(device, 2, 200, 301, head_dim=head_dim), None
    # Fused multiply-adds flip a rounding to 16 bits here and there: x moves by 2**-7 |x|, which the Hadamard
    # matrix of n columns spreads over a row as 2**-7 |x| / sqrt(n), and a scale turns into that times
    # 448 / amax. No |x| is three times the amax of a block here. Usual values are about 100.
    slack = 3 * 448 * 2.0**-7 / rotation_block(head_dim) ** 0.5
    check(*both(q, k, v, Fp8Recipe(), lengths, tables), flips=2e-2, slack=slack)


def test_zeros_and_extremes(device):
    q, k, v = some(device, 1, 200, 300, head_dim=64)
    q[:, :64], k[:, 128:256], v[:, :128] = 0, 0, 0
    q[:, 64:128] *= 1e30
    v[:, 128:256] *= 1e-36
    a, b = both(q, k, v, PLAIN)
    check(a, b)
    assert (a.q_descale[:, :, 0] == 1).all() and (a.v_descale[:, :, :2] == 1).all()
    assert torch.isfinite(a.q_descale).all()


@pytest.mark.parametrize("granularity", ["block", "head"])
def test_a_not_a_number_stays_where_its_scale_is(device, granularity):
    q, k, v = some(device, 2, 200, 300, head_dim=64)
    q[1, 70, 2, 3], k[0, 5, 1, 0], v[1, 299, 0, 63] = math.nan, math.inf, math.nan
    recipe = Fp8Recipe(smooth_k=False, granularity=granularity)
    a, b = both(q, k, v, recipe)
    for mine, theirs in zip(a.rotated(), b.rotated(), strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        torch.testing.assert_close(mine.nan_to_num(), theirs.nan_to_num(), rtol=0.13, atol=1e-2)


def test_twice_the_same_bits(device):
    q, k, v = some(device, 2, 1000, 1000)
    first, second = (both(q, k, v, BOTH_MEANS)[0] for _ in range(2))
    for a, b in zip(first.rotated(), second.rotated(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first.lse_shift, second.lse_shift) and torch.equal(first.v_mean, second.v_mean)


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
@pytest.mark.parametrize("granularity", ["block", "head", "tensor"])
def test_empty(device, shape, granularity):
    check(*both(*some(device, *shape), Fp8Recipe(granularity=granularity, smooth_v=True)))


def test_what_kernels_refuse_is_said(device):
    if REHEARSAL:
        pytest.skip("the reference refuses nothing")
    q, k, v = some(device, 1, 64, 64)
    odd = torch.empty(q.numel() + 1, dtype=q.dtype, device=device)[1:].view(q.shape)
    for tensors, said in (
        ((q.float(), k.float(), v.float()), "dtype is torch.float32"),
        ((odd, k, v), "16 bytes"),
        ((q.transpose(-1, -2).contiguous().transpose(-1, -2), k, v), "q has strides"),
    ):
        reasons = backend().quantize_reasons(quantize_spec(*tensors, None, Fp8Recipe()))
        assert any(said in x for x in reasons)
    tables = RotaryTables(*2 * (torch.rand(64, 33, device=device)[:, :32],))
    reasons = backend().quantize_reasons(quantize_spec(q, k, v, None, Fp8Recipe(), tables))
    assert any("rotary tables" in x for x in reasons)


# V that is e4m3 already


@pytest.mark.parametrize("head_dim_v", [16, 48, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("seqlen", LENGTHS)
def test_transposed_v(device, guarded, head_dim_v, seqlen):
    v = some(device, 2, 1, seqlen, kv_heads=3, head_dim_v=head_dim_v)[2].to(E4M3)
    spec = transpose_spec(v)
    mine, theirs = (module.transpose(spec)(v) for module in (backend(), reference_quant))
    assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
    guarded()


@pytest.mark.parametrize("used", [False, True])
def test_transposed_packed_v(device, guarded, used):
    v, lengths = packed(device, used, 128)[2:]
    v = v.to(E4M3)
    of_k = lengths.cu_seqlens_k, lengths.seqused_k
    spec = transpose_spec(v, *of_k)
    rows = rows_of(v, *of_k)
    mine, theirs = (module.transpose(spec)(v, *of_k) for module in (backend(), reference_quant))
    columns = columns_of(rows)
    assert torch.equal(mine.float()[..., columns], theirs.float()[..., columns])
    guarded()


def test_transposed_v_of_a_view(device):
    qkv = some(device, 2, 1, 300, kv_heads=6, head_dim_v=64)[2].to(E4M3)
    v = qkv[:, :, 4:]
    spec = transpose_spec(v)
    mine, theirs = (module.transpose(spec)(v) for module in (backend(), reference_quant))
    assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
