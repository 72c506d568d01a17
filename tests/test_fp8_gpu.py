"""FP8 attention on a Hopper GPU: the kernels against attention over what their inputs stand for, answers that
are known, and properties that need no oracle. Which memory they touch, and when: test_fp8_gpu_memory.py.

FP8 wgmma adds up in about 14 bits, and probabilities are rounded to e4m3: 2.6% of each.
"""

import itertools
import math
import os

import pytest
import torch
from conftest import REHEARSAL
from fp8_cases import (
    DESCALES,
    EXACT,
    FAR,
    PLAIN,
    QUESTIONS,
    V_SMOOTHED,
    assert_near,
    attend_e4m3,
    attend_fp8,
    attended,
    by_reference,
    compile_kernel,
    cosine,
    descaled,
    descales_of,
    distinct_kernels,
    flat,
    inputs_of,
    leaves,
    make_e4m3,
    over_dequantized,
    quantized,
    recipe_for,
    relative_rmse,
    with_leaves,
)
from gpu_cases import (
    BF16,
    CAUSAL,
    FULL,
    SOME,
    WINDOW,
    assert_same_bits,
    compile_once,
    declared,
    dense,
    name,
    packed,
    seed_of,
    softened,
    too_slow_to_rehearse,
)

from tandem_attn import Fp8Recipe, explain, flash_attn_fp8_func, flash_attn_func, flash_attn_qkvpacked_func
from tandem_attn.quant import GRANULARITIES
from tandem_attn.spec import E4M3
from tandem_attn.testing import Case, Inputs, exact, make

gpu = pytest.mark.gpu


@pytest.fixture(scope="session")
def kernels(request, tmp_path_factory) -> None:
    """As in conftest.py, of FP8."""
    wanted = sum("gpu" in item.keywords and "fp8_gpu" in item.nodeid for item in request.session.items)
    if not REHEARSAL and wanted > 20:
        folder = tmp_path_factory.getbasetemp()
        folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
        compile_once(
            folder / "fp8-kernels-compiled", [(compile_kernel, *x) for x in distinct_kernels().values()]
        )


def test_kernels_are_few():
    """Each costs three seconds, and tests on other shapes should cost nothing."""
    pytest.importorskip("triton")
    assert 40 < len(distinct_kernels()) < 70


# Against attention over the dequantized tensors


@gpu
@pytest.mark.parametrize("case", QUESTIONS, ids=name)
def test_near_the_reference(hopper, case):
    if too_slow_to_rehearse(case, hopper):
        pytest.skip("too slow on a CPU")
    inputs = softened(case, inputs_of(case, device=hopper, poison=True))
    tensors = by_reference(inputs, recipe_for(case))
    assert_near(case, inputs, attended(tensors, inputs), over_dequantized(case, tensors, inputs))


@gpu
@pytest.mark.parametrize("case", V_SMOOTHED, ids=name)
def test_v_without_its_mean(hopper, case):
    """Another mean for each sequence, head and channel, so that another's would show."""
    inputs = inputs_of(case, device=hopper, poison=True)
    for _, _, v in inputs.sequences():
        v.add_(3 * torch.randn(v.shape[1:], device=hopper).to(case.dtype))
    tensors = by_reference(inputs, recipe_for(case))
    assert tensors.v_mean is not None
    assert_near(case, inputs, attended(tensors, inputs), over_dequantized(case, tensors, inputs), rmse=0.02)


@gpu
@pytest.mark.parametrize("granularity", GRANULARITIES[1:])
@pytest.mark.parametrize(
    "case",
    [
        dense((300, 770), (64, 64), (4, 2), batch=2),
        dense((300, 770), (128, 128), (4, 2), batch=2, **CAUSAL),
        dense((1, 300), (64, 64), (4, 2), batch=2),
        dense((300, 90), (64, 64), (4, 2), batch=2),
        packed(SOME, (128, 128), **CAUSAL),
        packed(SOME, (64, 64)),
    ],
    ids=name,
)
def test_a_scale_for_a_head(hopper, case, granularity):
    """Sequences and heads of very different size, so that another's scale would show."""
    inputs = inputs_of(case, device=hopper)
    for i, (q, k, v) in enumerate(inputs.sequences()):
        for h, x in itertools.product(range(case.kv_heads), (k, v)):
            x[:, h].mul_(0.5 * (i % 3) + h + 0.5)
        q.mul_(1.0 / (i % 3 + 1))
    tensors = by_reference(inputs, Fp8Recipe(granularity=granularity))
    assert_near(case, inputs, attended(tensors, inputs), over_dequantized(case, tensors, inputs))


@gpu
@pytest.mark.parametrize(
    "case",
    [
        dense((300, 770), (64, 64), (4, 2), batch=2),
        dense((300, 770), (128, 128), (4, 2), batch=2, **CAUSAL),
        packed(SOME, (128, 128), **CAUSAL),
    ],
    ids=name,
)
def test_both_calls_and_one(hopper, case):
    """As the public functions go, kernels make FP8 too. 7%: values, scores and probabilities."""
    inputs = inputs_of(case, device=hopper, poison=True)
    inputs.k.add_(3 * torch.randn(case.head_dim, device=hopper).to(case.dtype))
    found = attended(quantized(inputs), inputs)
    assert_near(case, inputs, found, exact(case, inputs), rmse=0.07, lse_band=0.2)
    assert_same_bits(case, inputs, found, attend_fp8(case, inputs))


def assert_each_near(case: Case, device: torch.device) -> None:
    """Each sequence by itself: one that is wrong would drown among a thousand."""
    inputs = inputs_of(case, device=device)
    tensors = by_reference(inputs)
    found = declared(case, inputs, *attended(tensors, inputs))
    expected = declared(case, inputs, *over_dequantized(case, tensors, inputs))
    for i, ((out, lse), (out_want, lse_want)) in enumerate(zip(found, expected, strict=True)):
        sizes = f"{case.id}: {case.rows[i]} queries, {case.keys[i]} keys"
        assert cosine(out, out_want) > 0.99, sizes
        blind = lse_want.isneginf()
        assert torch.equal(lse.isneginf(), blind), sizes
        assert float((lse - lse_want)[~blind].abs().max()) < 0.06, sizes


@gpu
@pytest.mark.parametrize("dims, mask", [((64, 64), FULL), ((128, 128), CAUSAL)], ids=str)
def test_every_number_of_keys(hopper, dims, mask):
    keys = tuple(range(1, 1101) if hopper.type == "cuda" else range(1, 300, 41))
    assert_each_near(packed(((3,) * len(keys), keys), dims, (2, 1), **mask), hopper)
    for n in keys[::29] if hopper.type == "cuda" else keys:
        assert_each_near(dense((70, max(n, 70)), dims, (2, 1), **mask), hopper)


@gpu
@pytest.mark.parametrize("dims, mask", [((64, 64), FULL), ((128, 128), CAUSAL)], ids=str)
def test_every_number_of_queries(hopper, dims, mask):
    rows = tuple(range(1, 201) if hopper.type == "cuda" else range(1, 200, 41))
    assert_each_near(packed((rows, (277,) * len(rows)), dims, (2, 1), **mask), hopper)
    for n in rows:
        assert_each_near(dense((n, 277), dims, (2, 1), **mask), hopper)


@gpu
@pytest.mark.parametrize("cases", FAR, ids=lambda cases: str(cases[0].head_dim))
def test_errors_do_not_grow_with_the_length(hopper, cases):
    """Sums in 14 bits would: from 16384 keys on, O is added up in parts."""
    errors = []
    for case in cases:
        if hopper.type == "cpu":
            case = dense((64, case.seqlen_k // 100), (case.head_dim, case.head_dim))
        inputs = make(case, hopper, seed=1)  # the same queries each time
        tensors = by_reference(inputs)
        found, expected = attended(tensors, inputs), over_dequantized(case, tensors, inputs)
        assert_near(case, inputs, found, expected)
        errors.append(relative_rmse(found[0], expected[0]))
    assert max(errors[1:]) <= 1.5 * errors[0] or max(errors) < 1e-2, errors


@gpu
@pytest.mark.parametrize("keys", [8193, 20_001])
@pytest.mark.parametrize("dim, smooth_v", [(64, False), (128, False), (64, True), (128, True), (256, True)])
def test_a_mean_of_v_is_not_lost(hopper, dim, smooth_v, keys):
    """wgmma alone would lose 10 to 20% of it here."""
    case = dense((192, keys if hopper.type == "cuda" else keys // 50), (dim, dim))
    inputs = make(case, hopper, seed=1)
    inputs.v.add_(1)
    tensors = by_reference(inputs, Fp8Recipe(smooth_v=smooth_v))
    found, expected = attended(tensors, inputs)[0], over_dequantized(case, tensors, inputs)[0]
    assert relative_rmse(found, expected) < 0.01
    assert float((found.double() - expected).mean().abs()) < 1e-3


# Answers that are known


@gpu
@pytest.mark.parametrize("case", EXACT, ids=name)
def test_one_key_wins_exactly(hopper, case):
    """By 2**256: the answer is bitwise that key's row of v, all numbers being small integers."""
    inputs = make_e4m3(case, hopper, values="integers", poison=True)
    found = attend_e4m3(case, inputs)
    wide = Inputs(*(x.float() for x in leaves(inputs)), inputs.kwargs, inputs.slices)
    (out, lse), (out_want, lse_want) = flat(case, inputs, found), flat(case, inputs, exact(case, wide))
    assert torch.equal(out, out_want.to(BF16).double())
    torch.testing.assert_close(lse, lse_want, rtol=1e-6, atol=1e-5)


@gpu
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
def test_constant_values(hopper, dims):
    """What comes out of equal rows of v is that row, whatever the probabilities are rounded to."""
    case = dense((300, 770), dims, (4, 2))
    inputs = inputs_of(case, device=hopper)
    row = torch.linspace(-3, 3, dims[1], device=hopper).to(BF16)
    inputs.v.copy_(row.expand_as(inputs.v))
    tensors = by_reference(inputs)
    held = tensors.dequantized()[2][0, 0, 0]
    out = attended(tensors, inputs)[0].float()
    # 128 (so few keys) and 256 are added up by wgmma alone, and at 128 P counts as before it was rounded: see
    # docs/kernels/fp8.md
    rtol = {64: 0.01, 128: 0.025, 256: 0.02}[dims[1]]
    torch.testing.assert_close(out, held.expand_as(out), rtol=rtol, atol=1e-6)


@gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_largest_numbers_of_e4m3(hopper, dim):
    """448 everywhere: equal scores beyond a million, and the mean of v."""
    q = torch.full((1, 257, 4, dim), 448.0, device=hopper).to(E4M3)
    k = q[:, :1, :2].expand(1, 383, 2, dim).contiguous()
    v = torch.full((1, 383, 2, dim), 448.0, device=hopper)
    v[:, ::3] = -448.0
    out, lse = flash_attn_func(q, k, v.to(E4M3), return_attn_probs=True)
    expected = v.mean(1, keepdim=True).repeat_interleave(2, 2).expand_as(out)
    # scores beyond a million are rounded to 1/4, so P is any number, at 128 counted as before it was rounded
    rtol = 0.02 if dim == 64 else 0.0625
    torch.testing.assert_close(out.float(), expected, rtol=rtol, atol=0.0)
    torch.testing.assert_close(
        lse, torch.full_like(lse, 448.0**2 * dim**0.5 + math.log(383)), rtol=1e-4, atol=0
    )


@gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_saturated_values(hopper, dim):
    """16-bit numbers of which one is 1000 times the others: it becomes 448, nothing becomes NaN."""
    case = dense((257, 383), (dim, dim), (4, 2))
    inputs = inputs_of(case, device=hopper)
    for x in leaves(inputs):
        x[:, 100, :, 7] = 3000.0
    tensors = quantized(inputs)
    assert max(float(x.float().abs().max()) for x in (tensors.q, tensors.k, tensors.v_t)) <= 448.0
    found = attended(tensors, inputs)
    assert all(x.isfinite().all() for x in found)
    expected = over_dequantized(case, tensors, inputs)
    assert cosine(found[0], expected[0]) > 0.99


@gpu
@pytest.mark.parametrize("dim", [128, 256])
def test_rotation_spreads_outliers(hopper, dim):
    """A channel that makes most of each score; v is +1 and -1, so that scores alone are wrong."""
    case = dense((300, 770), (dim, dim), (8, 8), batch=2)
    inputs = inputs_of(case, device=hopper)
    for x in (inputs.q, inputs.k):
        x[..., 5] *= 12
    inputs.v.copy_(inputs.v.sign())
    expected = exact(case, inputs)
    errors = []
    for rotate in (True, False):
        out, lse = attended(quantized(inputs, Fp8Recipe(rotate=rotate)), inputs)
        lse_error = float((lse.double() - expected[1]).square().mean().sqrt())
        errors.append((relative_rmse(out, expected[0]), lse_error))
    (out_error, lse_error), (out_without, lse_without) = errors
    assert lse_error < 0.5 * lse_without, errors
    assert out_error < 0.6 * out_without, errors  # half, and what probabilities are rounded by


# FlashAttention-3's entry


@gpu
@pytest.mark.parametrize("case", EXACT, ids=name)
def test_descales_of_heads(hopper, case):
    """All of them different."""
    inputs, descales = make_e4m3(case, hopper, poison=True), descales_of(case, hopper)
    found = attend_e4m3(case, inputs, **descales)
    assert found[0].dtype == BF16
    assert_near(case, inputs, found, exact(case, descaled(case, inputs, descales)))


@gpu
@pytest.mark.parametrize("which", "qkv")
@pytest.mark.parametrize("case", EXACT, ids=name)
def test_numbers_and_descale_may_share_a_factor(hopper, case, which):
    inputs, descales = make_e4m3(case, hopper), descales_of(case, hopper)
    # tensor cores align sums by the exponents that numbers are written with, which subnormal ones lack
    inputs.v.copy_((inputs.v.float() * 8).round() / 8)
    expected = attend_e4m3(case, inputs, **descales)
    for factor in (2.0, 8.0):
        tensors = {x: getattr(inputs, x) for x in "qkv"}
        tensors[which] = (tensors[which].float() * factor).to(E4M3)
        less = {f"{which}_descale": descales[f"{which}_descale"] / factor}
        other = Inputs(**tensors, kwargs=inputs.kwargs, slices=inputs.slices)
        assert_same_bits(case, inputs, expected, attend_e4m3(case, other, **(descales | less)))


@gpu
def test_no_descales_and_qkvpacked(hopper):
    case = dense((257, 257), (128, 128), (4, 2), batch=2, **CAUSAL)
    inputs = make_e4m3(case, hopper)
    ones = dict.fromkeys(DESCALES, torch.ones(2, 2, device=hopper))
    plain = attend_e4m3(case, inputs)
    assert_same_bits(case, inputs, plain, attend_e4m3(case, inputs, **ones))
    together = torch.cat([x.view(torch.uint8) for x in leaves(inputs)], 2).view(E4M3)
    out = flash_attn_qkvpacked_func(together, causal=True, num_heads_q=4)
    assert torch.equal(out, plain[0])


@gpu
@pytest.mark.parametrize("case", EXACT, ids=name)
def test_explain_names_the_kernel(hopper, case):
    inputs = make_e4m3(case, hopper)
    said = explain(*leaves(inputs), **inputs.kwargs)
    assert said.backend == ("gluon" if hopper.type == "cuda" else "reference"), said
    assert str(said).startswith("e4m3")


# Properties


@gpu
@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("dim", [64, 128])
def test_a_sequence_does_not_know_its_neighbours(hopper, dim, mask):
    """Bitwise the same packed among others, and dense."""
    case = packed(SOME, (dim, dim), **mask)
    inputs = inputs_of(case, device=hopper, poison=True)
    recipe = Fp8Recipe(smooth_k=False)  # sums of means may be in another order
    together = declared(case, inputs, *attended(by_reference(inputs, recipe), inputs))
    for (q, k, v), (out, lse), rows, keys in zip(
        inputs.sequences(), together, case.rows, case.keys, strict=True
    ):
        if rows == 0 or keys == 0:
            continue
        alone = Inputs(q[None], k[None], v[None], {**mask}, [])
        found = attended(by_reference(alone, recipe), alone)
        # a single causal query sees everything, and whole blocks need no mask: other kernels
        if rows > 1 if mask else keys % 128:
            assert torch.equal(found[0][0], out) and torch.equal(found[1][0], lse), (rows, keys)
        else:
            assert cosine(found[0][0], out) > 0.99


@gpu
@pytest.mark.parametrize(
    "dims, mask", [((64, 64), CAUSAL), ((128, 128), FULL), ((192, 128), CAUSAL)], ids=str
)
@pytest.mark.parametrize("group", [2, 3, 5])
def test_a_group_equals_repeated_heads(hopper, dims, mask, group):
    case = dense((200, 333), dims, (2 * group, 2), batch=2, **mask)
    inputs = inputs_of(case, device=hopper)
    found = attended(by_reference(inputs, PLAIN), inputs)
    repeated = [x.repeat_interleave(group, 2) for x in (inputs.k, inputs.v)]
    other = Inputs(inputs.q, *repeated, inputs.kwargs, [])
    assert_same_bits(case, inputs, found, attended(by_reference(other, PLAIN), other))


@gpu
@pytest.mark.parametrize("mask", [FULL, CAUSAL, WINDOW], ids=["full", "causal", "window"])
def test_linear_in_v(hopper, mask):
    """By powers of two exactly; -v gives -out, but sums may be cut off towards one side."""
    case = dense((300, 333), (128, 128), **mask)
    inputs = inputs_of(case, device=hopper)
    out, lse = attended(by_reference(inputs), inputs)
    for factor in (2.0, 0.125, -1.0):
        other = Inputs(inputs.q, inputs.k, inputs.v * factor, inputs.kwargs, [])
        found = attended(by_reference(other), other)
        assert torch.equal(found[1], lse)
        if factor > 0:
            assert torch.equal(found[0], out * factor)
        else:
            assert relative_rmse(found[0], out * factor) < 0.01


# Gradients


@gpu
@pytest.mark.parametrize("dim, mask", [(64, CAUSAL), (128, FULL)], ids=str)
def test_gradients_are_near_those_of_torch(hopper, dim, mask):
    """Straight through: FP8's out and lse, everything else in 16 bits."""
    case = dense((400, 400), (dim, dim), (4, 2), batch=2, **mask)
    inputs = make(case, hopper, seed=seed_of(case))
    fp8 = with_leaves(inputs)
    dout = torch.randn(2, 400, 4, dim, device=hopper).to(case.dtype)
    out, lse = attend_fp8(case, fp8)
    dlse = torch.randn_like(lse)
    found = torch.autograd.grad([out, lse], leaves(fp8), [dout, dlse])
    wide = with_leaves(Inputs(*(x.double() for x in leaves(inputs)), inputs.kwargs, []))
    q, k, v = (x.transpose(1, 2) for x in leaves(wide))
    scores = q @ k.repeat_interleave(2, 1).mT * dim**-0.5
    if case.causal:
        scores = scores.masked_fill(torch.ones(400, 400, device=hopper).triu(1).bool(), -math.inf)
    plain = (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2)
    wanted = torch.autograd.grad([plain, scores.logsumexp(-1)], leaves(wide), [dout.double(), dlse.double()])
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == case.dtype and float((a.double() - b).norm() / b.norm()) < 0.1


@gpu
def test_compiled_whole(hopper):
    """torch.compile, forward and backward, on the kernels."""

    def attend(q, k, v):
        return flash_attn_fp8_func(q, k, v, causal=True)

    torch._dynamo.reset()
    fast = torch.compile(attend, fullgraph=True, backend="aot_eager")
    tensors = [torch.randn(1, 300, 2, 64, device=hopper, dtype=BF16, requires_grad=True) for _ in range(3)]
    expected, found = attend(*tensors), fast(*tensors)
    assert torch.equal(expected, found)
    pairs = zip(*(torch.autograd.grad(x.float().sum(), tensors) for x in (expected, found)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
