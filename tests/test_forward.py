"""The Hopper forward kernels: the error budget, exact answers, and properties that need no oracle."""

import math

import pytest
import torch
from gpu_cases import (
    BF16,
    BUDGET,
    CAUSAL,
    EXACT,
    FP16,
    FULL,
    LONG,
    SOME,
    TILES,
    WINDOW,
    answer,
    assert_same_bits,
    check,
    declared,
    dense,
    name,
    packed,
    seed_of,
    too_slow_to_rehearse,
)

from tandem_attn import explain, flash_attn_func, flash_attn_qkvpacked_func
from tandem_attn.testing import (
    Case,
    Inputs,
    assert_right,
    assert_within_budget,
    exact,
    low_precision,
    make,
    run,
)
from tandem_attn.testing.budget import LSE_BAND, explicit_mask

pytestmark = pytest.mark.gpu


def same_but(inputs: Inputs, **changes) -> Inputs:
    """The same arguments but for some: q, k, v, or keywords."""
    tensors = [changes.pop(x, getattr(inputs, x)) for x in "qkv"]
    return Inputs(*tensors, inputs.kwargs | changes, inputs.slices)


# The error budget


@pytest.mark.parametrize("case", BUDGET, ids=name)
def test_within_budget(hopper, case):
    check(case, hopper)


@pytest.mark.parametrize("case", LONG, ids=name)
def test_long_within_budget(hopper, case):
    if too_slow_to_rehearse(case, hopper):
        pytest.skip("too slow on a CPU")
    check(case, hopper)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=["full", "causal"])
def test_softmax_scale(hopper, scale, mask):
    case = dense((300, 300), (64, 64), **mask)
    inputs = make(case, hopper)
    inputs.kwargs["softmax_scale"] = scale
    assert_right(case, inputs, *answer(case, inputs))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("dim", [64, 256])
def test_scores_of_ten_thousand(hopper, dim, dtype):
    """One key takes it all, and which one must not drown in rounding."""
    capped = [{"softcap": 30.0, **CAUSAL}] if dtype == BF16 else []
    for mask in (CAUSAL, WINDOW, *capped):
        case = dense((200, 333), (dim, dim), dtype=dtype, **mask)
        inputs = make(case, hopper)
        inputs.q.mul_(1e4 / dim**0.5)
        inputs.kwargs["softmax_scale"] = 1.0
        out, lse = answer(case, inputs)
        assert lse.max() > (20 if case.softcap else 1e4)
        assert_right(case, inputs, out, lse)


@pytest.mark.parametrize("mask", [FULL, CAUSAL, WINDOW], ids=["full", "causal", "window"])
@pytest.mark.parametrize("dims", TILES, ids=str)
def test_rows_far_below_zero_see_no_padding(hopper, dims, mask):
    """All scores are -1e4, so that a score of 0 from beyond the keys, or of a masked key, would win."""
    case = dense((257, 331), dims, **mask)
    inputs = make(case, hopper, values="uniform")
    inputs.q.fill_(1e4 / dims[0] ** 0.5)
    inputs.k.fill_(-1.0)
    out, lse = answer(case, inputs)
    assert_right(case, inputs, out, lse)
    level = -float(inputs.q[0, 0, 0, 0].double()) * dims[0] ** 0.5
    assert -1.01e4 < level < -0.99e4
    counts = explicit_mask(torch.arange(257), 257, 331, case.bounds).sum(-1).double()
    expected = (level + counts.log()).expand_as(lse)
    torch.testing.assert_close(lse.double().cpu(), expected, rtol=0, atol=4e-3)


@pytest.mark.parametrize("dims", TILES, ids=str)
def test_lse_does_not_drift(hopper, dims):
    """All scores of a row are equal, and large: what every block of keys adds to the row sum is worth 1, not
    1 and the rounding of maximum times scale, which 64 blocks would add up to 2e-3."""
    case = dense((384, 8192), dims)
    inputs = make(case, hopper)
    level = torch.linspace(-1500, 1500, 384, device=hopper).div(dims[0]).to(case.dtype)
    inputs.q.copy_(level[None, :, None, None].expand_as(inputs.q))
    inputs.k.fill_(1.0)
    inputs.kwargs["softmax_scale"] = 1.0
    _, lse = answer(case, inputs)
    expected = level.double() * dims[0] + math.log(8192)
    torch.testing.assert_close(lse.double(), expected.expand_as(lse), rtol=0, atol=4e-4)


# Exact answers: any wrong tile, lost fence or swapped row shows in some bit


@pytest.mark.parametrize("case", EXACT, ids=name)
def test_one_key_wins_exactly(hopper, case):
    if too_slow_to_rehearse(case, hopper):
        pytest.skip("too slow on a CPU")
    inputs = make(case, hopper, seed=seed_of(case), values="integers", poison=True)
    out, lse = answer(case, inputs)
    expected, expected_lse = exact(case, inputs)
    for got, want in zip(
        declared(case, inputs, out, lse),
        declared(case, inputs, expected.to(case.dtype), expected_lse.float()),
        strict=True,
    ):
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("mask", [FULL, CAUSAL, {"window": (63, 0)}], ids=["full", "causal", "window"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("dims", TILES, ids=str)
def test_means_of_integers(hopper, dims, dtype, mask):
    """Of equal scores; exact where a power of two of keys is seen, else right to a unit in the last place."""
    case = dense((300, 512), dims, (4, 2), dtype=dtype, **mask)
    inputs = make(case, hopper, values="uniform")
    out, lse = answer(case, inputs)
    expected = exact(case, inputs)[0]
    counts = explicit_mask(torch.arange(300), 300, 512, case.bounds).sum(-1)
    power = (counts > 0) & (counts & (counts - 1) == 0)
    assert power.any()
    if out.is_cuda:  # torch's CPU kernel approximates even exp(0)
        assert torch.equal(out[:, power], expected[:, power].to(dtype))
    torch.testing.assert_close(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    level = counts.double().log().expand_as(lse)
    torch.testing.assert_close(lse.double().cpu(), level, rtol=0, atol=1e-5 if lse.is_cuda else LSE_BAND)


@pytest.mark.parametrize(
    "case",
    [
        dense((300, 70), (64, 64), **CAUSAL),
        dense((300, 70), (128, 128), **CAUSAL),
        dense((300, 70), (256, 256), window=(5, 0)),
        dense((70, 300), (128, 128), window=(5, 5), heads=(1, 1)),
        packed(SOME, (128, 128), **CAUSAL),
    ],
    ids=name,
)
def test_rows_without_keys_are_zero(hopper, case):
    inputs = make(case, hopper, poison=True)
    blind_rows = 0
    for i, (out, lse) in enumerate(declared(case, inputs, *answer(case, inputs))):
        rows, keys = case.rows[i], case.keys[i]
        blind = ~explicit_mask(torch.arange(rows), rows, keys, case.bounds).any(-1)
        assert torch.count_nonzero(out[blind]) == 0
        assert (lse[:, blind] == -math.inf).all() and lse[:, ~blind].isfinite().all()
        blind_rows += int(blind.sum())
    assert blind_rows > 0 or case.seqlen_k > case.seqlen_q


# Properties


@pytest.mark.parametrize("mask", [FULL, CAUSAL, WINDOW], ids=["full", "causal", "window"])
def test_order_of_batch_and_heads_does_not_matter(hopper, mask):
    case = dense((300, 257), (64, 64), (6, 6), batch=4, **mask)
    inputs = make(case, hopper)
    out, lse = answer(case, inputs)
    batch, heads = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 1, 0, 3, 2, 4])
    shuffled = {x: getattr(inputs, x)[batch][:, :, heads] for x in "qkv"}
    other = answer(case, same_but(inputs, **shuffled))
    assert_same_bits(case, inputs, (out[batch][:, :, heads], lse[batch][:, heads]), other)


@pytest.mark.parametrize(
    "dims, mask", [((64, 64), CAUSAL), ((128, 128), FULL), ((192, 128), CAUSAL)], ids=str
)
@pytest.mark.parametrize("group", [2, 3, 5])
def test_a_group_equals_repeated_heads(hopper, dims, mask, group):
    case = dense((200, 333), dims, (2 * group, 2), batch=2, **mask)
    inputs = make(case, hopper)
    repeated = {x: getattr(inputs, x).repeat_interleave(group, 2) for x in "kv"}
    assert_same_bits(case, inputs, answer(case, inputs), answer(case, same_but(inputs, **repeated)))


@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("dim", [64, 128])
def test_a_sequence_does_not_know_its_neighbours(hopper, dim, mask):
    """Bitwise the same packed among others, packed alone, and dense."""
    case = packed(SOME, (dim, dim), **mask)
    inputs = make(case, hopper, poison=True)
    together = declared(case, inputs, *answer(case, inputs))
    for (q, k, v), (out, lse), rows, keys in zip(
        inputs.sequences(), together, case.rows, case.keys, strict=True
    ):
        single = dense((rows, keys), (dim, dim), (4, 2), **mask)
        alone = answer(single, Inputs(q[None], k[None], v[None], {**mask}, []))
        starts = {f"cu_seqlens_{x}": torch.tensor([0, n], device=hopper, dtype=torch.int32)
                  for x, n in (("q", rows), ("k", keys))}  # fmt: skip
        one = packed(((rows,), (keys,)), (dim, dim), **mask)
        longest = {x: inputs.kwargs[x] for x in ("max_seqlen_q", "max_seqlen_k")}
        packed_alone = Inputs(q, k, v, {**mask, **starts, **longest}, [(slice(rows), slice(keys))])
        assert torch.equal(alone[0][0], out) and torch.equal(alone[1][0], lse)
        if rows and keys:
            got = answer(one, packed_alone)
            assert torch.equal(got[0], out) and torch.equal(got[1], lse)


@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=["full", "causal"])
def test_packed_equal_lengths_equal_dense(hopper, mask):
    flat = make(packed(((256,) * 3, (256,) * 3), **mask), hopper)
    out, lse = answer(packed(((256,) * 3, (256,) * 3), **mask), flat)
    case = dense((256, 256), (128, 128), (4, 2), batch=3, **mask)
    square = Inputs(*(x.unflatten(0, (3, 256)) for x in (flat.q, flat.k, flat.v)), {**mask}, [])
    packed_answer = (out.unflatten(0, (3, 256)), lse.unflatten(1, (3, 256)).transpose(0, 1))
    assert_same_bits(case, square, answer(case, square), packed_answer)


def test_sequences_may_start_late_and_leave_gaps(hopper):
    """cu_seqlens from 7 on, and rows after the last; together with seqused, gaps anywhere."""
    case = packed(SOME, **CAUSAL)
    inputs = make(case, hopper)
    expected = answer(case, inputs)
    tensors = {}
    for x in "qkv":
        junk = torch.full_like(getattr(inputs, x)[:7], math.nan)
        tensors[x] = torch.cat([junk, getattr(inputs, x), junk])
    starts = {x: inputs.kwargs[x] + 7 for x in ("cu_seqlens_q", "cu_seqlens_k")}
    out, lse = answer(case, same_but(inputs, **tensors, **starts))
    assert_same_bits(case, inputs, expected, (out[7:-7], lse[:, 7:-7]))


def test_max_seqlen_is_only_a_bound(hopper):
    for mask in (CAUSAL, {"window": (9, 9)}):
        case = packed(SOME, (128, 128), **mask)
        inputs = make(case, hopper, poison=True)
        expected = answer(case, inputs)
        for more in (1, 300, 10**6):
            longest = {f"max_seqlen_{x}": inputs.kwargs[f"max_seqlen_{x}"] + more for x in "qk"}
            assert_same_bits(case, inputs, expected, answer(case, same_but(inputs, **longest)))


@pytest.mark.parametrize("lengths_k", [(0, 0, 0), (5, 0, 300)], ids=str)
def test_no_queries_at_all(hopper, lengths_k):
    """With a loose bound the kernel starts, finds no tile, and must stop."""
    inputs = make(packed(((0, 0, 0), lengths_k)), hopper, poison=True)
    inputs.q = inputs.k.new_full((40, 4, 128), math.nan)
    inputs.kwargs |= {"max_seqlen_q": 64, "max_seqlen_k": 512}
    out, lse = answer(packed(((0, 0, 0), lengths_k)), inputs)
    assert out.shape == (40, 4, 128) and lse.shape == (4, 40)
    if hopper.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("mask", [FULL, CAUSAL, WINDOW], ids=["full", "causal", "window"])
def test_linear_in_v(hopper, mask):
    """By powers of two exactly, and -v gives -out."""
    case = dense((300, 333), (128, 128), **mask)
    inputs = make(case, hopper)
    out, lse = answer(case, inputs)
    for factor in (2.0, -1.0, 0.125):
        other = answer(case, same_but(inputs, v=inputs.v * factor))
        assert torch.equal(other[0], out * factor) and torch.equal(other[1], lse)


@pytest.mark.parametrize("mask", [FULL, CAUSAL, WINDOW], ids=["full", "causal", "window"])
@pytest.mark.parametrize("dim", [64, 192, 256])
def test_shifting_all_keys_shifts_lse_only(hopper, dim, mask):
    """Keys of few bits: adding the shift rounds nothing, so that both answers are to one question."""
    case = dense((300, 333), (dim, dim), (4, 2), **mask)
    inputs = make(case, hopper)
    inputs.k = (inputs.k * 4).round().clamp(-12, 12) / 8
    shift = torch.randint(-2, 3, (dim,), device=hopper).to(case.dtype)
    shifted = same_but(inputs, k=inputs.k + shift)
    assert torch.equal(shifted.k - shift, inputs.k)
    lse_before = answer(case, inputs)[1]
    out, lse = answer(case, shifted)
    assert_within_budget(out, exact(case, inputs)[0], low_precision(case, inputs)[0])
    moved = lse_before.double() + (inputs.q.double() @ shift.double()).transpose(1, 2) * inputs.scale
    torch.testing.assert_close(lse.double(), moved, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cut", [1, 128, 200, 333])
def test_two_halves_of_the_keys_merge_into_the_whole(hopper, cut):
    case = dense((150, 333), (128, 128), (4, 2), batch=2)
    inputs = make(case, hopper)
    parts = [
        answer(case, same_but(inputs, k=inputs.k[:, half], v=inputs.v[:, half]))
        for half in (slice(0, cut), slice(cut, None))
    ]
    weights = torch.softmax(torch.stack([lse.double() for _, lse in parts]), 0)[..., None].transpose(2, 3)
    merged = sum(w * out.double() for w, (out, _) in zip(weights, parts, strict=True))
    merged_lse = torch.logaddexp(parts[0][1].double(), parts[1][1].double())
    assert_within_budget(
        merged.to(case.dtype), exact(case, inputs)[0], low_precision(case, inputs)[0], factor=3
    )
    torch.testing.assert_close(merged_lse, exact(case, inputs)[1], rtol=0, atol=1e-4)


def test_a_window_of_a_side_that_reaches_everything_is_none(hopper):
    """Bitwise: the question is reduced before a kernel is chosen."""
    case = dense((200, 300), **CAUSAL)
    inputs = make(case, hopper)
    expected = answer(case, inputs)
    for window in ((-1, 0), (299, 0), (10**9, 0)):
        other = answer(case, same_but(inputs, causal=False, window_size=window))
        assert_same_bits(case, inputs, expected, other)


def test_qkvpacked_is_read_in_place(hopper):
    for heads, kv_heads in ((4, 4), (6, 2)):
        case = Case(
            batch=2, seqlen_q=200, seqlen_k=200, heads=heads, kv_heads=kv_heads, layout="qkvpacked", **CAUSAL
        )
        inputs = make(case, hopper)
        packed_tensor = torch.cat([inputs.q, inputs.k, inputs.v], 2)
        out = flash_attn_qkvpacked_func(packed_tensor, causal=True, num_heads_q=heads)
        assert torch.equal(out, answer(case, inputs)[0])


# Many sequences and heads: nothing may depend on a grid dimension of 16 bits


@pytest.mark.parametrize("batch, heads", [(70_000, 1), (1, 70_000), (300, 257)])
def test_many_sequences_and_heads(hopper, batch, heads):
    if hopper.type == "cpu":
        batch, heads = min(batch, 300), min(heads, 300)
    q, k, v = (torch.randn(batch, n, heads, 64, device=hopper, dtype=BF16) for n in (2, 3, 3))
    out, lse = flash_attn_func(q, k, v, return_attn_probs=True)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / 8
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0, atol=1e-4)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float())
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=2**-7)


# What the kernels refuse, another backend answers


@pytest.mark.parametrize(
    "facts, options, reason",
    [
        ({}, {"softmax_scale": -0.2}, "softmax_scale is -0.2"),
        ({"dtype": torch.float32}, {}, "dtype is torch.float32"),
        ({"head_dim": 20}, {}, "head_dim is 20"),
        ({"head_dim": 264}, {}, "head_dim is 264"),
        ({"head_dim_v": 12}, {}, "head_dim_v is 12"),
    ],
    ids=["negative-scale", "float32", "d20", "d264", "v12"],
)
@pytest.mark.parametrize("lengths", [None, (20, 0, 13)], ids=["dense", "varlen"])
def test_refused_and_answered_elsewhere(device, backend, facts, options, reason, lengths):
    case = Case(seqlen_q=33, seqlen_k=40, lengths_q=lengths, lengths_k=lengths, causal=True, **facts)
    inputs = make(case, device)
    inputs.kwargs |= options
    explanation = explain(inputs.q, inputs.k, inputs.v, **inputs.kwargs)
    assert explanation.backend in ("torch", "reference")
    assert_right(case, inputs, *run(case, inputs))
    if device.type == "cuda":
        assert any(reason in said for said in explanation.reasons["gluon"]), explanation
        backend("gluon")
        with pytest.raises(NotImplementedError, match=reason):
            run(case, inputs)
