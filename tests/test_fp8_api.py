"""FP8 attention by its public functions, answered by the reference: accuracy, properties, FlashAttention-3's
entry. Its gradients are in test_fp8_ops.py, its errors in test_fp8_spec.py.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from fp8_cases import (
    DESCALES,
    PLAIN,
    assert_near,
    attend_e4m3,
    attend_fp8,
    attend_wide,
    attended,
    by_reference,
    descaled,
    descales_of,
    flat,
    inputs_of,
    make_e4m3,
    over_dequantized,
    quantized,
    relative_rmse,
)
from gpu_cases import (
    BF16,
    CAUSAL,
    FP16,
    assert_same_bits,
    declared,
    dense,
    name,
    packed,
)
from hypothesis import given
from hypothesis import strategies as st

from tandem_attn import (
    Fp8Recipe,
    flash_attn_fp8_func,
    flash_attn_fp8_varlen_func,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_quantized_func,
    quantize_qkv,
)
from tandem_attn.quant import GRANULARITIES
from tandem_attn.spec import E4M3
from tandem_attn.testing import Case, Inputs, exact, make

F32 = torch.float32
WINDOW = {"window": (40, 10)}
# as in gpu_cases.py, a quarter as long
SOME = ((5, 0, 150, 1, 64, 128, 129, 0), (7, 3, 140, 0, 128, 64, 129, 0))
USED_Q, USED_K = (5, 0, 133, 0, 64, 1, 129, 0), (0, 3, 140, 0, 100, 64, 128, 0)
DENSE = [
    dense((70, 150), (64, 64), (4, 2), batch=2),
    dense((70, 150), (128, 128), (4, 1), batch=2, **CAUSAL),
    dense((150, 70), (96, 96), (2, 2), dtype=FP16, **WINDOW),
    dense((130, 130), (192, 128), (6, 2), dtype=FP16, **CAUSAL),
    dense((70, 300), (256, 256), softcap=15.0, **CAUSAL),
    dense((70, 150), (64, 128), dtype=F32, **WINDOW),
    dense((1, 257), (128, 64), (8, 1)),
    dense((65, 1), (32, 48), dtype=F32),
]
PACKED = [
    packed(SOME, (64, 64)),
    packed(SOME, (128, 128), dtype=F32, **CAUSAL),
    packed(SOME, (96, 32), dtype=FP16, **WINDOW),
    packed(SOME, (64, 64), used_q=USED_Q, used_k=USED_K, softcap=15.0),
    packed(SOME, (128, 128), used_k=USED_K, dtype=F32, **CAUSAL),
    packed(SOME, (32, 32), (3, 1), used_q=USED_Q, **WINDOW),
]
CASES = [*DENSE, *PACKED]
RECIPES = [Fp8Recipe(*facts) for facts in itertools.product((True, False), (True, False), GRANULARITIES)]
RECIPES += [Fp8Recipe(smooth_v=True), Fp8Recipe(False, False, smooth_v=True)]


def recipe_id(recipe: Fp8Recipe) -> str:
    means = "k" * recipe.smooth_k + "v" * recipe.smooth_v
    return f"{'rotated' * recipe.rotate}-{means}-{recipe.granularity}"


def fits(recipe: Fp8Recipe, case: Case) -> bool:
    """A softcap sees the mean of K."""
    return not (recipe.smooth_k and case.softcap)


# Against attention that rounds nothing


@pytest.mark.parametrize("case", CASES, ids=name)
def test_near_the_originals(case):
    """Values and scores are each 2.6% off, which is what e4m3 rounds a number by: 4.5% of the result."""
    inputs = inputs_of(case)
    found = attend_fp8(case, inputs)
    assert found[0].dtype == case.dtype and found[1].dtype == F32
    assert found[0].shape == (*inputs.q.shape[:-1], case.dim_v)
    assert_near(case, inputs, found, attend_wide(case, inputs), rmse=0.06, lse_band=0.15)


@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_id)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_is_attention_over_what_the_tensors_stand_for(case, recipe):
    if not fits(recipe, case):
        pytest.skip("refused: a softcap sees the mean of K")
    inputs = inputs_of(case)
    tensors = quantized(inputs, recipe)
    found, expected = attended(tensors, inputs), over_dequantized(case, tensors, inputs)
    (out, lse), (out_want, lse_want) = flat(case, inputs, found), flat(case, inputs, expected)
    eps = torch.finfo(case.dtype).eps
    torch.testing.assert_close(out, out_want.to(case.dtype).double(), rtol=max(eps, 1e-5), atol=2e-5)
    torch.testing.assert_close(lse, lse_want, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_one_call_is_two(case):
    inputs = inputs_of(case)
    for recipe in (None, PLAIN, Fp8Recipe(smooth_k=False, granularity="head", signs=7)):
        apart = recipe or Fp8Recipe(smooth_k=not case.softcap)
        two = attended(quantized(inputs, apart), inputs)
        assert_same_bits(case, inputs, attend_fp8(case, inputs, recipe), two)


def test_lse_is_only_given_on_request():
    q, k, v = torch.randn(3, 1, 5, 2, 32)
    out, lse = flash_attn_fp8_func(q, k, v, return_attn_probs=True)
    assert torch.equal(flash_attn_fp8_func(q, k, v), out) and lse.shape == (1, 2, 5)
    assert torch.equal(flash_attn_quantized_func(quantize_qkv(q, k, v)), out)
    starts = torch.tensor([0, 5], dtype=torch.int32)
    packed_out = flash_attn_fp8_varlen_func(q[0], k[0], v[0], starts, starts, 5, 5)
    assert torch.equal(packed_out, out[0])


def test_softmax_scale_and_sm_margin_arrive():
    case = dense((33, 90), (64, 64), dtype=F32)
    inputs = inputs_of(case)
    usual = attended(quantized(inputs), inputs)
    for scale in (0.3, 0.0):
        inputs.kwargs["softmax_scale"] = scale
        found = attend_fp8(case, inputs)
        assert_near(case, inputs, found, exact(case, inputs), rmse=0.15, lse_band=0.2)
        assert relative_rmse(found[0], usual[0]) > 0.2
    inputs.kwargs |= {"softmax_scale": None, "sm_margin": 5}
    assert_same_bits(case, inputs, attend_fp8(case, inputs), usual)


# Smoothing


@pytest.mark.parametrize("case", [DENSE[0], DENSE[1], PACKED[1], PACKED[4]], ids=name)
def test_a_large_mean_of_k_costs_nothing(case):
    """Not even in lse, from which it is missing while FP8 is at work."""
    inputs = inputs_of(case)
    inputs.k.add_(10 * torch.randn(case.kv_heads, case.head_dim))
    expected = attend_wide(case, inputs, torch.float64)
    assert flat(case, inputs, expected)[1].abs().max() > 10
    found = attend_fp8(case, inputs)
    assert_near(case, inputs, found, expected, rmse=0.06, lse_band=0.15)
    kept = attend_fp8(case, inputs, Fp8Recipe(smooth_k=False))
    (out, _), (out_want, _), (out_kept, _) = (flat(case, inputs, x) for x in (found, expected, kept))
    assert relative_rmse(out_kept, out_want) > 3 * relative_rmse(out, out_want)


@pytest.mark.parametrize("case", [DENSE[0], DENSE[2], DENSE[4], PACKED[1], PACKED[3]], ids=name)
def test_a_large_mean_of_v_costs_nothing(case):
    """Its part of out is not rounded with the rest; what is left is as if there were none."""
    case = dataclasses.replace(case, dtype=F32)  # an output that would not round it all away
    inputs = inputs_of(case)
    mean = 10 * torch.randn(case.kv_heads, case.dim_v)
    inputs.v.add_(mean)
    of_heads = mean.repeat_interleave(case.heads // case.kv_heads, 0).double()

    def less_mean(pair: tuple) -> tuple:
        blind = pair[1].isneginf().movedim(-2, -1)[..., None]
        return torch.where(blind, 0.0, pair[0].double() - of_heads), pair[1]

    expected = less_mean(attend_wide(case, inputs, torch.float64))
    smooth, kept = (
        less_mean(attend_fp8(case, inputs, Fp8Recipe(smooth_k=not case.softcap, smooth_v=x)))
        for x in (True, False)
    )
    errors = [
        relative_rmse(flat(case, inputs, x)[0], flat(case, inputs, expected)[0]) for x in (smooth, kept)
    ]
    assert errors[0] < 0.07 and errors[1] > 3 * errors[0], errors


def test_a_softcap_keeps_the_mean():
    """The default recipe knows; a given one has to."""
    q, k, v = torch.randn(3, 1, 40, 2, 64)
    expected = flash_attn_func(q, k + 3, v, softcap=5.0)
    assert relative_rmse(flash_attn_fp8_func(q, k + 3, v, softcap=5.0), expected) < 0.1
    with pytest.raises(ValueError, match="softcap"):
        flash_attn_fp8_func(q, k + 3, v, softcap=5.0, recipe=Fp8Recipe())


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_rotation_spreads_outliers(dim, granularity):
    """A channel that makes most of each score rounds it as a whole; spread over all, errors average."""
    case = dense((200, 300), (dim, dim), (4, 4), dtype=F32)
    inputs = inputs_of(case)
    for x in (inputs.q, inputs.k):
        x[..., 5] *= 12
    inputs.v.copy_(inputs.v.sign())  # e4m3 holds them: scores alone are wrong
    expected = exact(case, inputs)
    errors = []
    for rotate in (True, False):
        found = attend_fp8(case, inputs, Fp8Recipe(rotate, False, granularity))
        lse_error = (found[1].double() - expected[1]).square().mean().sqrt()
        errors.append((relative_rmse(found[0], expected[0]), float(lse_error)))
    (out_error, lse_error), (out_without, lse_without) = errors
    assert lse_error < 0.5 * lse_without
    assert out_error < (0.5 if dim > 64 else 0.75) * out_without


# Rows and sequences


@pytest.mark.parametrize(
    "case",
    [
        dense((300, 70), (64, 64), **CAUSAL),
        dense((300, 70), (64, 64), window=(5, 0)),
        dense((70, 0), (64, 64)),
        dense((130, 0), (64, 64)),
        dense((0, 70), (64, 64)),
        packed(SOME, (64, 64), **CAUSAL),
        packed(SOME, (64, 64), used_q=USED_Q, used_k=USED_K, **CAUSAL),
        packed(((), ()), (64, 64)),
    ],
    ids=name,
)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_rows_without_keys(case, granularity):
    """Out 0 and lse -inf, also where lse is corrected; granularities: numbers of blocks may be 0."""
    inputs = inputs_of(case)
    inputs.k.add_(5)
    inputs.v.add_(5)
    found = attend_fp8(case, inputs, Fp8Recipe(granularity=granularity, smooth_v=True))
    (out, lse), (_, lse_want) = flat(case, inputs, found), flat(case, inputs, exact(case, inputs))
    assert torch.equal(lse.isneginf(), lse_want.isneginf()) and not lse.isnan().any()
    for part_out, part_lse in declared(case, inputs, *found):
        assert torch.count_nonzero(part_out[part_lse.isneginf().T]) == 0
    assert out.isfinite().all()


@pytest.mark.parametrize("case", PACKED, ids=name)
@pytest.mark.parametrize("recipe", [PLAIN, Fp8Recipe(), Fp8Recipe(granularity="head")], ids=recipe_id)
def test_packed_is_a_loop_over_sequences(case, recipe):
    if not fits(recipe, case):
        pytest.skip("refused: a softcap sees the mean of K")
    inputs = inputs_of(case)
    together = declared(case, inputs, *attend_fp8(case, inputs, recipe))
    options = {x: inputs.kwargs[x] for x in ("causal", "window_size", "softcap")}
    for (q, k, v), (out, lse) in zip(inputs.sequences(), together, strict=True):
        alone = flash_attn_fp8_func(
            q[None], k[None], v[None], **options, recipe=recipe, return_attn_probs=True
        )
        # means may be added up in another order and so fall on the other side of a step
        torch.testing.assert_close(alone[1][0], lse, rtol=1e-5, atol=1e-5 if not recipe.smooth_k else 1e-3)
        assert relative_rmse(alone[0][0], out) < (0.005 if recipe.smooth_k or recipe.smooth_v else 1e-3)


@pytest.mark.parametrize("granularity", ["block", "tensor"])
def test_outliers_are_dealt_with_where_they_are(granularity):
    """Only a block that holds one pays for it, unless a scale is for all (or a mean subtracted)."""
    recipe = Fp8Recipe(granularity=granularity)
    case = dense((128, 256), (64, 64), (1, 1), dtype=F32)
    inputs = inputs_of(case)
    inputs.v[:, :128] *= 1e-4
    inputs.v[:, 128:, :, 0] = 1e3
    tensors = quantized(inputs, recipe)
    v = tensors.dequantized()[2][:, :128]
    assert (relative_rmse(v, inputs.v[:, :128]) < 0.04) == (recipe.granularity == "block")


def test_large_numbers_saturate_and_stay_finite():
    """57344 is 448 * 2**7: what is largest becomes 448, nothing leaves e4m3, nothing becomes NaN."""
    for dtype, largest in ((FP16, 57344.0), (F32, 448.0 * 2**20)):
        q, k, v = (x.to(dtype) for x in torch.randn(3, 1, 130, 2, 64))
        for x in (q, k, v):
            x[:, 3::7] = largest
            x[:, 5::7, :, ::2] = -largest
        for recipe in RECIPES:
            tensors = quantize_qkv(q, k, v, recipe)
            out, lse = flash_attn_quantized_func(tensors, return_attn_probs=True)
            assert out.isfinite().all() and lse.isfinite().all()
            for x in (tensors.q, tensors.k, tensors.v_t):
                assert x.float().abs().max() <= 448.0
            assert tensors.v_t.float().abs().max() >= 224.0  # its scales are powers of two


@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_id)
def test_zeros_have_scale_1(recipe):
    """And through the whole of attention: of zeros in q, in k, in v, and in all of them."""
    for zeros in ("q", "k", "v", "qkv"):
        numbers = dict(zip("qkv", torch.randn(3, 1, 200, 2, 64), strict=True))
        numbers |= {x: torch.zeros_like(numbers[x]) for x in zeros}
        tensors = quantize_qkv(**numbers, recipe=recipe)
        for x in zeros:
            assert (getattr(tensors, f"{x}_descale") == 1).all()
        out, lse = flash_attn_quantized_func(tensors, return_attn_probs=True)
        expected = flash_attn_func(**numbers)
        assert lse.isfinite().all() and relative_rmse(out, expected) < 0.08
        if "k" in zeros or "q" in zeros:
            torch.testing.assert_close(lse, torch.full_like(lse, math.log(200)), rtol=0, atol=1e-5)


def test_nan_stays_where_it_is():
    """In its sequence and KV head, and no further."""
    q, k, v = torch.randn(2, 70, 4, 64), torch.randn(2, 150, 2, 64), torch.randn(2, 150, 2, 64)
    clean = flash_attn_fp8_func(q, k, v)
    k[1, 149, 0, 3] = math.nan
    out = flash_attn_fp8_func(q, k, v)
    assert torch.equal(out[0], clean[0]) and torch.equal(out[1, :, 2:], clean[1, :, 2:])
    assert out[1, :, :2].isnan().all()


# FlashAttention-3's entry: e4m3 tensors and descales

E4M3_CASES = [
    dense((70, 150), (64, 64), (4, 2), batch=2),
    dense((70, 150), (128, 128), (6, 2), batch=2, **CAUSAL),
    dense((150, 300), (96, 48), (2, 1), **WINDOW),
    dense((40, 40), (16, 16), softcap=3.0, **CAUSAL),
    dense((130, 0), (64, 64)),
    dense((0, 30), (64, 64)),
    packed(SOME, (64, 64)),
    packed(SOME, (128, 64), (6, 2), **CAUSAL),
    packed(SOME, (32, 32), used_q=USED_Q, used_k=USED_K, **WINDOW),
]


@pytest.mark.parametrize(
    "given_names", [(), DESCALES, ("q_descale",), ("k_descale",), ("v_descale",)], ids=str
)
@pytest.mark.parametrize("case", E4M3_CASES, ids=name)
def test_descales_multiply(case, given_names):
    """All heads and sequences have different ones; q's is shared by the heads of a KV head."""
    inputs = make_e4m3(case)
    descales = {x: factor for x, factor in descales_of(case).items() if x in given_names}
    found = attend_e4m3(case, inputs, **descales)
    assert found[0].dtype == BF16 and found[1].dtype == F32
    expected = exact(case, descaled(case, inputs, descales))
    (out, lse), (out_want, lse_want) = flat(case, inputs, found), flat(case, inputs, expected)
    torch.testing.assert_close(out, out_want, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(lse, lse_want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", E4M3_CASES, ids=name)
def test_no_descale_is_a_descale_of_1(case):
    inputs, one = make_e4m3(case), torch.ones(case.batch, case.kv_heads)
    given_all = attend_e4m3(case, inputs, **dict.fromkeys(DESCALES, one))
    assert_same_bits(case, inputs, attend_e4m3(case, inputs), given_all)


@pytest.mark.parametrize("which", "qkv")
@pytest.mark.parametrize("case", E4M3_CASES, ids=name)
def test_numbers_and_descale_may_share_a_factor(case, which):
    """Twice the numbers and half the descale are the same question, to the bit."""
    inputs, descales = make_e4m3(case), descales_of(case)
    expected = attend_e4m3(case, inputs, **descales)
    for factor in (2.0, 8.0):
        larger = (getattr(inputs, which).float() * factor).to(E4M3)
        assert torch.equal(larger.float(), getattr(inputs, which).float() * factor)
        tensors = {x: larger if x == which else getattr(inputs, x) for x in "qkv"}
        smaller = {f"{which}_descale": descales[f"{which}_descale"] / factor}
        found = attend_e4m3(
            case, Inputs(**tensors, kwargs=inputs.kwargs, slices=inputs.slices), **descales | smaller
        )
        assert_same_bits(case, inputs, expected, found)


def test_descales_may_have_any_strides():
    case = E4M3_CASES[0]
    inputs, descales = make_e4m3(case), descales_of(case)
    turned = {x: factor.T.contiguous().T for x, factor in descales.items()}
    assert not turned["q_descale"].is_contiguous()
    found = attend_e4m3(case, inputs, **turned)
    assert_same_bits(case, inputs, attend_e4m3(case, inputs, **descales), found)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
def test_qkvpacked_e4m3(heads):
    num_q, num_kv = heads
    qkv = torch.randn(2, 70, num_q + 2 * num_kv, 64).to(E4M3)
    q, k, v = qkv.split([num_q, num_kv, num_kv], 2)
    descales = {x: torch.rand(2, num_kv) + 0.5 for x in DESCALES}
    expected = flash_attn_func(q, k, v, causal=True, **descales, return_attn_probs=True)
    forms = [(qkv, num_q)]
    if num_q == num_kv:
        forms.append((qkv.unflatten(2, (3, num_kv)), None))
    for form, count in forms:
        found = flash_attn_qkvpacked_func(
            form, causal=True, num_heads_q=count, **descales, return_attn_probs=True
        )
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_largest_numbers_of_e4m3():
    """448 everywhere in q and k: equal scores of 1.6e6, and the mean of v."""
    q = torch.full((1, 40, 2, 64), 448.0).to(E4M3)
    v = torch.randint(-8, 9, (1, 64, 2, 64)).float()
    k = q[:, :1].expand(1, 64, 2, 64)
    out, lse = flash_attn_func(q, k, v.to(E4M3), return_attn_probs=True)
    torch.testing.assert_close(out.float(), v.mean(1, keepdim=True).expand_as(out), rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(lse, torch.full_like(lse, 448.0**2 * 8 + math.log(64)), rtol=1e-6, atol=0)


# Properties over many questions

recipes = st.sampled_from(RECIPES)
masks = st.sampled_from([{}, CAUSAL, {"window": (7, 3)}])


@given(
    rows=st.integers(1, 40),
    keys=st.sampled_from([1, 2, 8, 64, 256]),
    dim=st.sampled_from([32, 96]),
    mask=masks,
    recipe=st.sampled_from([x for x in RECIPES if x.smooth_k]),
    seed=st.integers(0, 2**20),
)
def test_shifting_all_keys_shifts_lse_only(rows, keys, dim, mask, recipe, seed):
    """Keys of few bits, and a power of two of them: the mean is exact, and out the same in each bit."""
    case = dense((rows, keys), (dim, 32), dtype=F32, **mask)
    inputs = make(case, seed=seed)
    inputs.k.copy_((inputs.k * 8).round().clamp(-30, 30) / 8)
    shift = torch.randint(-16, 17, (dim,), generator=torch.Generator().manual_seed(seed)).float()
    moved = Inputs(inputs.q, inputs.k + shift, inputs.v, inputs.kwargs, [])
    (out, lse), (out_moved, lse_moved) = (attend_fp8(case, x, recipe) for x in (inputs, moved))
    assert torch.equal(out, out_moved)
    by = (inputs.q.double() @ shift.double()).transpose(1, 2) * inputs.scale
    torch.testing.assert_close(lse_moved.double(), lse + by, rtol=1e-6, atol=1e-4)


lengths = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 200)), min_size=1, max_size=5)


def of_sequences(pairs: list, mask: dict, seed: int = 0, **how) -> tuple[Case, Inputs]:
    case = packed(tuple(zip(*pairs, strict=True)), (32, 32), dtype=F32, **mask)
    return case, make(case, seed=seed, **how)


@given(pairs=lengths, order=st.randoms(use_true_random=False), mask=masks, recipe=recipes)
def test_order_of_sequences_does_not_matter(pairs, order, mask, recipe):
    case, inputs = of_sequences(pairs, mask)
    places = list(range(len(pairs)))
    order.shuffle(places)
    shuffled, others = of_sequences([pairs[i] for i in places], mask)
    for (rows, keys), i in zip(others.slices, places, strict=True):
        others.q[rows], others.k[keys] = inputs.q[inputs.slices[i][0]], inputs.k[inputs.slices[i][1]]
        others.v[keys] = inputs.v[inputs.slices[i][1]]
    before = declared(case, inputs, *attend_fp8(case, inputs, recipe))
    after = declared(shuffled, others, *attend_fp8(shuffled, others, recipe))
    for (out, lse), i in zip(after, places, strict=True):
        torch.testing.assert_close(out, before[i][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, before[i][1], rtol=1e-5, atol=1e-5)


@given(pairs=lengths, cut=st.integers(0, 60), mask=masks, recipe=recipes, seed=st.integers(0, 2**20))
def test_rows_of_no_sequence_change_no_bit(pairs, cut, mask, recipe, seed):
    """NaN beyond seqused and in margins, against junk of another kind."""
    used_q, used_k = (tuple(max(0, pair[i] - cut) for pair in pairs) for i in (0, 1))
    used = mask | {"used_q": used_q, "used_k": used_k}
    case, poisoned = of_sequences(pairs, used, seed, poison=True)
    clean = of_sequences(pairs, used, seed)[1]
    found = attend_fp8(case, poisoned, recipe)
    assert not any(x.isnan().any() for pair in declared(case, poisoned, *found) for x in pair)
    assert_same_bits(case, poisoned, found, attend_fp8(case, clean, recipe))


def test_the_helper_makes_what_the_function_makes():
    """`by_reference` stands in for the kernels on a GPU."""
    for case in (DENSE[1], PACKED[3]):
        inputs = inputs_of(case)
        one, other = by_reference(inputs, PLAIN), quantized(inputs, PLAIN)
        assert_same_bits(case, inputs, attended(one, inputs), attended(other, inputs))
