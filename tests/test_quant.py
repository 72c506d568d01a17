"""The reference of making FP8, on a CPU: every step by its property, then the whole."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tandem_attn import reference_quant
from tandem_attn.quant import (
    BLOCK_K,
    BLOCK_Q,
    E4M3,
    GRANULARITIES,
    Fp8Recipe,
    Fp8Tensors,
    hadamard,
    quantized,
    rotated,
    rotation_block,
    rows_of,
    saturated,
    scales,
    signs_for,
    transpose_v,
    transposed,
    unrotated,
    untransposed,
)
from tandem_attn.reference_decode import rotate
from tandem_attn.spec import Lengths
from tandem_attn.spec_quant import RotaryTables, quantize_spec, transpose_spec

CPU = torch.device("cpu")
PLAIN = Fp8Recipe(rotate=False, smooth_k=False)
HEAD_DIMS = (32, 64, 96, 128, 192, 256)


def fp8(q, k, v, recipe=PLAIN, lengths=None, rotary=None) -> Fp8Tensors:
    """The reference's answer."""
    spec = quantize_spec(q, k, v, lengths, recipe, rotary)
    signs = signs_for(recipe, q.shape[-1], q.device) if recipe.rotate else None
    tables = (None, None) if rotary is None else rotary[:2]
    found = reference_quant.quantize(spec)(q, k, v, signs, *tables, *(lengths or ())[:4])
    return Fp8Tensors(*found, recipe, q.dtype, lengths)


def some(batch=2, seqlen_q=70, seqlen_k=150, heads=4, kv_heads=2, head_dim=64, head_dim_v=None, dtype=None):
    """Random q, k and v."""
    dtype = dtype or torch.float32
    return (
        torch.randn(batch, seqlen_q, heads, head_dim, dtype=dtype),
        torch.randn(batch, seqlen_k, kv_heads, head_dim, dtype=dtype)
        + 3 * torch.randn(head_dim, dtype=dtype),
        torch.randn(batch, seqlen_k, kv_heads, head_dim_v or head_dim, dtype=dtype)
        + torch.randn(head_dim_v or head_dim, dtype=dtype),
    )


def vector(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


# Rotation


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_is_orthonormal_and_keeps_scores(head_dim):
    signs = signs_for(Fp8Recipe(), head_dim, CPU)
    matrix = rotated(torch.eye(head_dim, dtype=torch.float64), signs)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim, dtype=torch.float64))
    q, k = torch.randn(2, 5, head_dim, dtype=torch.float64)
    torch.testing.assert_close(rotated(q, signs) @ rotated(k, signs).T, q @ k.T)
    torch.testing.assert_close(unrotated(rotated(q, signs), signs), q)


def test_hadamard_is_the_matrix_of_parities():
    for block in (1, 2, 16, 64):
        i = torch.arange(block)
        parity = (i[:, None] & i[None, :]).apply_(lambda x: x.bit_count() % 2)
        assert torch.equal(hadamard(torch.eye(block), block), 1.0 - 2.0 * parity)


@pytest.mark.parametrize(
    "head_dim, block", [(64, 64), (96, 32), (128, 128), (160, 32), (192, 64), (256, 256)]
)
def test_rotation_goes_by_blocks(head_dim, block):
    assert rotation_block(head_dim) == block
    x = torch.zeros(head_dim)
    x[block - 1] = 1.0
    spread = rotated(x, torch.ones(head_dim))
    torch.testing.assert_close(spread[:block].abs(), torch.full((block,), block**-0.5))
    assert not spread[block:].any()


def test_hadamard_names_a_wrong_block():
    for block in (3, 32):
        with pytest.raises(ValueError, match="block is"):
            hadamard(torch.zeros(48), block)


def test_signs_are_drawn_from_a_seed_or_given():
    a, b, c = (signs_for(Fp8Recipe(signs=seed), 128, CPU) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert set(a.tolist()) == {1.0, -1.0}
    mine = torch.tensor([1.0, -1.0] * 32)
    recipe = Fp8Recipe(signs=mine)
    assert torch.equal(signs_for(recipe, 64, CPU), mine)
    assert hash(recipe) == hash(Fp8Recipe(signs=[1, -1] * 32))


def test_rotation_spreads_an_outlier():
    """One channel of q and k is 30 times the others, and its rounding is most of the error of a score."""
    q, k, v = some(head_dim=128)
    q[..., 7] *= 30
    k[..., 7] *= 30

    def scores(q, k):
        return torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2))

    errors = [
        (scores(*fp8(q, k, v, Fp8Recipe(rotate=r, smooth_k=False)).dequantized()[:2]) - scores(q, k)).norm()
        for r in (False, True)
    ]
    assert errors[1] < 0.5 * errors[0]


# Scales and values


def test_zeros_have_scale_1():
    q, k, v = (torch.zeros(1, 130, 2, 64) for _ in range(3))
    q[0, 64:, 1] = 1.0
    for granularity in GRANULARITIES:
        made = fp8(q, k, v, dataclasses.replace(PLAIN, granularity=granularity))
        assert (made.k_descale == 1).all() and (made.v_descale == 1).all()
        assert not made.k.float().any() and not made.v_t.float().any()
    made = fp8(q, k, v)
    assert made.q_descale[0].tolist() == [
        [1.0, 1.0, 1.0],
        [1.0, pytest.approx(1 / 448), pytest.approx(1 / 448)],
    ]


def test_scales_of_next_to_nothing_are_finite():
    descale, inverse = scales(torch.tensor([0.0, 1e-45, 1e-38, 448.0, 896.0, math.nan]))
    assert descale[:5].tolist() == [1.0, 1.0, 1.0, 1.0, 2.0] and inverse[:5].tolist() == [
        1.0,
        1.0,
        1.0,
        1.0,
        0.5,
    ]
    assert descale[5].isnan() and inverse[5].isnan()


@given(st.floats(2.0**-99, 2.0**127, width=32))
def test_scales_that_are_powers_of_two(size):
    """The least that does not saturate."""
    amax = torch.tensor([size, 448 * 2.0 ** math.floor(math.log2(size) - 8)])
    exact = scales(amax)[0]
    descale, inverse = scales(amax, powers=True)
    assert (descale.frexp().mantissa == 0.5).all() and (descale * inverse == 1).all()
    assert (exact <= descale).all() and (descale < 2 * exact).all() and descale[1] == exact[1]
    assert (saturated(amax * inverse).float() <= 448).all() and (amax * inverse <= 448.0001).all()


def test_scales_that_are_powers_of_two_at_the_ends():
    descale, inverse = scales(torch.tensor([0.0, 1e-45, 448.0, 449.0, math.inf, math.nan]), powers=True)
    assert descale[:5].tolist() == [1, 1, 1, 2, math.inf] and inverse[:5].tolist() == [1, 1, 1, 0.5, 0]
    assert descale[5].isnan() and inverse[5].isnan()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scales_of_v_are_powers_of_two(granularity):
    q, k, v = some(seqlen_k=500)
    v *= 2.0 ** torch.randint(-20, 20, (2, 500, 2, 1))
    made = fp8(q, k, v, dataclasses.replace(PLAIN, granularity=granularity))
    assert (made.v_descale.frexp().mantissa == 0.5).all()
    amax = v.abs().amax((0, 1, 2, 3) if granularity == "tensor" else (1, 3))
    if granularity == "block":
        amax = rows_of(v).padded(v).unflatten(1, (-1, BLOCK_K)).abs().amax((2, 4)).transpose(1, 2)
    elif granularity == "head":
        amax = amax[:, :, None]
    exact = (amax / 448).expand(made.v_descale.shape)
    assert (exact <= made.v_descale).all() and (made.v_descale < 2 * exact).all()
    # what is not at the end of the range is rounded as it would be without a scale
    normal = v.abs() > 2.0**-5 * rows_of(v).each(made.v_descale, BLOCK_K)
    error = (made.dequantized()[2] - v).abs()
    assert (error <= v.abs() * 2.0**-4)[normal].all()
    assert not (made.k_descale.frexp().mantissa == 0.5).all()


def test_values_saturate_and_never_wrap():
    x = torch.tensor([448.0, 449.0, 464.0, 465.0, 1e9, -1e9, math.inf, -math.inf, 17.0, 19.0])
    assert saturated(x).float().tolist() == [448, 448, 448, 448, 448, -448, 448, -448, 16, 20]  # ties to even
    assert saturated(torch.tensor([math.nan])).float().isnan()


@given(st.floats(2.0**-90, 1e30), st.integers(1, 300), st.sampled_from(GRANULARITIES))
def test_what_is_quantized_is_near(size, seqlen, granularity):
    x = torch.randn(2, seqlen, 3, 32) * size
    rows = rows_of(x)
    for block in (BLOCK_Q, BLOCK_K):
        values, descale = quantized(rows.padded(x), rows, block, granularity)
        found = rows.restored(values).float() * rows.each(descale, block)
        step = torch.maximum(x.abs() * 2.0**-4, rows.each(descale, block) * 2.0**-10)  # half a step of e4m3
        assert ((found - x).abs() <= step * 1.0001).all()
        assert values.float().abs().max() == 448


def test_a_not_a_number_stays_in_its_block():
    q, k, v = some(batch=1, seqlen_k=300)
    k[0, 130, 1, 5] = math.nan
    clean, dirty = (fp8(q, x, v).rotated()[1] for x in (k.nan_to_num(), k))
    assert dirty[0, 128:256, 1].isnan().all()
    keep = torch.ones(300, dtype=torch.bool)
    keep[128:256] = False
    assert torch.equal(dirty[0, keep], clean[0, keep]) and torch.equal(dirty[0, :, 0], clean[0, :, 0])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_shapes_of_scales(granularity):
    q, k, v = some()
    made = fp8(q, k, v, dataclasses.replace(PLAIN, granularity=granularity))
    assert made.q_descale.shape == (2, 4, 2) and made.k_descale.shape == made.v_descale.shape == (2, 2, 2)
    numbers = {"block": 16, "head": 8, "tensor": 1}[granularity]
    assert len(made.q_descale.unique()) == numbers


# V


def test_places_of_keys():
    v = torch.arange(32.0).view(1, 32, 1, 1)
    assert transposed(v)[0, 0, 0, :16].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    for t, h, e, g in itertools.product(range(4), range(2), range(2), range(2)):
        assert transposed(v)[0, 0, 0, 16 * g + 4 * t + 2 * h + e] == 16 * g + 8 * h + 2 * t + e


@given(st.integers(0, 300), st.sampled_from([16, 48, 64]))
def test_transposed_v_comes_back_and_is_padded_with_zeros(seqlen, head_dim_v):
    v = torch.randn(2, seqlen, 3, head_dim_v).to(E4M3)
    v_t = reference_quant.transpose(transpose_spec(v))(v)
    padded = max(128, -(-seqlen // 128) * 128)
    assert v_t.shape == (2, 3, head_dim_v, padded)
    back = untransposed(v_t)
    assert torch.equal(back[:, :seqlen].float(), v.float()) and not back[:, seqlen:].float().any()


def test_packed_v_starts_at_multiples_of_128():
    cu_seqlens, used = vector(0, 10, 10, 300), vector(7, 0, 290)
    v = torch.randn(310, 2, 16).to(E4M3)
    v_t = transpose_v(v, rows_of(v, cu_seqlens, used))
    assert v_t.shape == (2, 16, 640)  # (310 + 3 * 128) // 128 * 128
    back = untransposed(v_t[None])[0].float()
    for start, first, n in ((0, 0, 7), (256, 10, 290)):
        assert torch.equal(back[start : start + n], v[first : first + n].float())
    assert not back[7:128].any() and not back[546:].any()


# Packed sequences


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rotary", [False, True])
def test_packed_is_a_loop_over_sequences(granularity, rotary):
    cu_q, cu_k = vector(2, 12, 12, 152), vector(0, 130, 170, 400)
    used_q, used_k = vector(10, 0, 139), vector(129, 40, 0)
    q, k, v = (x.flatten(0, 1) for x in some(1, 160, 410))
    for x, starts, used in ((q, cu_q, used_q), (k, cu_k, used_k), (v, cu_k, used_k)):
        outside = torch.ones(x.shape[0], dtype=torch.bool)
        for start, n in zip(starts.tolist(), used.tolist(), strict=False):
            outside[start : start + n] = False
        x[outside] = math.nan
    tables = None
    if rotary:
        angles = torch.rand(400, 32) * 6
        tables = RotaryTables(angles.cos(), angles.sin())
    recipe = Fp8Recipe(granularity=granularity)
    lengths = Lengths(cu_q, cu_k, used_q, used_k, 140, 230)
    whole = fp8(q, k, v, recipe, lengths, tables)
    parts = whole.dequantized()
    assert all(torch.isfinite(x).all() for x in parts)
    if granularity == "tensor":
        return  # sequences share a scale: not what they would have alone
    for b in range(3):
        i = slice(int(cu_q[b]), int(cu_q[b] + used_q[b]))
        j = slice(int(cu_k[b]), int(cu_k[b] + used_k[b]))
        if i.stop == i.start and j.stop == j.start:
            continue
        alone = fp8(q[None, i], k[None, j], v[None, j], recipe, rotary=tables)
        for mine, x, rows in zip(alone.dequantized(), parts, (i, j, j), strict=True):
            torch.testing.assert_close(x[rows], mine[0], atol=0, rtol=0)
        torch.testing.assert_close(whole.lse_shift[:, i], alone.lse_shift[0])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sequences_without_rows_can_be_read(granularity):
    """Attention reads their first blocks for queries that see no key."""
    cu_q, cu_k = vector(0, 0, 70, 70), vector(0, 130, 130, 130)
    q, k, v = (x.flatten(0, 1) for x in some(1, 70, 130))
    recipe = Fp8Recipe(granularity=granularity)
    made = fp8(q, k, v, recipe, Lengths(cu_q, cu_k, None, None, 70, 130))
    for descale in (made.q_descale, made.k_descale, made.v_descale):
        assert torch.isfinite(descale).all()
    for descale, rows, block, empty in (
        (made.q_descale, made.rows_q, BLOCK_Q, (0, 2)),
        (made.k_descale, made.rows_k, BLOCK_K, (1, 2)),
        (made.v_descale, made.rows_k, BLOCK_K, (1, 2)),
    ):
        for i in empty if granularity != "tensor" else ():
            first = int(rows.starts[i]) // block
            mine = descale[i] if granularity == "head" else descale[:, first : first + 128 // block]
            assert mine.numel() and (mine == 1).all()
    for i in (1, 2):
        first = int(made.rows_k.starts[i])
        assert not made.v_t[..., first : first + 128].float().any()


def test_dense_and_packed_agree():
    q, k, v = some()
    lengths = Lengths(vector(0, 70, 140), vector(0, 150, 300), None, None, 70, 150)
    packed = fp8(*(x.flatten(0, 1) for x in (q, k, v)), Fp8Recipe(), lengths).dequantized()
    for a, b in zip(packed, fp8(q, k, v, Fp8Recipe()).dequantized(), strict=True):
        assert torch.equal(a, b.flatten(0, 1))


# The whole


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_round_trip(head_dim, dtype):
    q, k, v = some(head_dim=head_dim, head_dim_v=80, dtype=dtype)
    made = fp8(q, k, v, Fp8Recipe())
    assert made.dtype == dtype and made.q.dtype == made.k.dtype == made.v_t.dtype == E4M3
    for x, y in zip((q, k, v), made.dequantized(), strict=True):
        assert (x - y).float().norm() < 0.04 * x.float().norm()


def test_rotary_embedding_comes_first():
    """As rotating q and k beforehand; queries end where keys end."""
    q, k, v = some(dtype=torch.bfloat16)
    for dim, interleaved in itertools.product((64, 32, 16), (False, True)):
        angles = torch.rand(150, dim // 2) * 6
        cos, sin = angles.cos(), angles.sin()
        fused = fp8(q, k, v, Fp8Recipe(), rotary=RotaryTables(cos, sin, interleaved))
        turned_q = rotate(q, cos, sin, torch.arange(80, 150), interleaved)
        turned_k = rotate(k, cos, sin, torch.arange(150), interleaved)
        for a, b in zip(fused.rotated(), fp8(turned_q, turned_k, v, Fp8Recipe()).rotated(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_empty(shape, packed):
    batch, seqlen_q, seqlen_k = shape
    q, k, v = some(*shape)
    lengths = None
    if packed:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        starts = (vector(*(n * i for i in range(batch + 1))) for n in (seqlen_q, seqlen_k))
        lengths = Lengths(*starts, None, None, seqlen_q, seqlen_k)
    for granularity in GRANULARITIES:
        made = fp8(q, k, v, Fp8Recipe(granularity=granularity), lengths)
        spec = quantize_spec(q, k, v, lengths, made.recipe)
        assert made.v_t.shape == spec.v_t_shape and made.lse_shift.shape == spec.lse_shape
        assert made.q_descale.shape == spec.descale_shape(spec.seqlen_q, 4, BLOCK_Q)
        assert made.k_descale.shape == spec.descale_shape(spec.seqlen_k, 2, BLOCK_K)
        for x, y in zip((q, k, v), made.dequantized(), strict=True):
            assert x.shape == y.shape


def test_prints_itself():
    said = repr(fp8(*some(dtype=torch.bfloat16), Fp8Recipe()))
    assert len(said) < 400 and "\n" not in said
    for part in ("(2, 70, 4, 64)", "bfloat16", "seed 0", "mean of K subtracted", "a block of 64 q"):
        assert part in said
    of_both, of_v, none = (
        str(Fp8Recipe(smooth_k=k, smooth_v=v)) for k, v in ((True, True), (False, True), (False, False))
    )
    assert "means of K and V subtracted" in of_both
    assert "mean of V subtracted" in of_v and "means kept" in none


# Mistakes


@pytest.mark.parametrize(
    "fields, error, said",
    [
        (dict(rotate=1), TypeError, "rotate is 1 "),
        (dict(smooth_k=None), TypeError, "smooth_k is None"),
        (dict(smooth_v=1), TypeError, "smooth_v is 1 "),
        (dict(granularity="row"), ValueError, "granularity is 'row'"),
        (dict(signs=-1), ValueError, "signs is -1"),
        (dict(signs=0.5), TypeError, "signs is 0.5"),
        (dict(signs=[1, 2]), ValueError, "signs is a vector with 2"),
        (dict(signs=torch.ones(2, 2)), ValueError, "signs is a tensor of shape"),
    ],
)
def test_mistakes_in_a_recipe(fields, error, said):
    with pytest.raises(error, match=said):
        Fp8Recipe(**fields)


def test_mistakes_in_tensors():
    q, k, v = some(dtype=torch.bfloat16)
    tables = torch.rand(150, 32)
    cases = [
        (lambda: fp8(q.to(E4M3), k, v), TypeError, "q is of dtype"),
        (lambda: fp8(q, k, v.float()), TypeError, "v is of dtype"),
        (lambda: fp8(q, k[:, :5], v), ValueError, "v is of shape"),
        (lambda: fp8(q[..., :40], k[..., :40], v), NotImplementedError, "q is of head_dim 40"),
        (lambda: fp8(q, k, v[..., :24]), NotImplementedError, "v is of head_dim 24"),
        (
            lambda: fp8(q[..., :48], k[..., :48], v, Fp8Recipe()),
            ValueError,
            "rotate is True with head_dim 48",
        ),
        (lambda: fp8(q, k, v, Fp8Recipe(signs=[1] * 32)), ValueError, "signs is a vector of 32"),
        (lambda: quantize_spec(q, k, v, None, "fast"), TypeError, "recipe is str"),
        (lambda: fp8(q, k, v, rotary=RotaryTables(tables, None)), TypeError, "rotary_sin is NoneType"),
        (lambda: fp8(q, k, v, rotary=RotaryTables(tables, tables, 1)), TypeError, "rotary_interleaved is 1"),
        (
            lambda: fp8(q, k, v, rotary=RotaryTables(tables[:149], tables[:149])),
            ValueError,
            "of 149 positions",
        ),
        (lambda: transpose_spec(v), TypeError, "v is of dtype"),
        (lambda: transpose_spec(v.to(E4M3)[0]), ValueError, "v is a tensor of shape"),
        (lambda: transpose_spec(v.to(E4M3)[..., :20]), NotImplementedError, "v is of head_dim 20"),
        (lambda: transpose_spec(v.to(E4M3)[0], vector(0, 5).long()), TypeError, "cu_seqlens_k is of dtype"),
    ]
    for call, error, said in cases:
        with pytest.raises(error, match=said):
            call()
