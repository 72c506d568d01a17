"""The Hopper backward kernels: the error budget, exact gradients, and properties that need no oracle."""

import dataclasses
import math

import backward_cases as cases
import pytest
import torch
from backward_cases import (
    assert_close,
    assert_exact,
    assert_right,
    assert_same_bits,
    assert_zeros,
    attended,
    backward_of,
    equal_shares,
    gradients,
    pairs_win,
    plain_gradients,
    upstream,
)
from gpu_cases import (
    BF16,
    CAUSAL,
    FP16,
    FULL,
    SOME,
    TILES,
    USED,
    WINDOW,
    answer,
    dense,
    name,
    packed,
    seed_of,
    softened,
    too_slow_to_rehearse,
)
from test_forward import same_but

from tandem_attn import flash_attn_func, reference
from tandem_attn.testing import Inputs, assert_within_budget, make
from tandem_attn.testing.budget import explicit_mask

pytestmark = pytest.mark.gpu
kernels = pytest.fixture(scope="session")(cases.compile_ahead)
hopper = pytest.fixture(cases.only_kernels)


def skip_if_slow(case, device) -> None:
    if too_slow_to_rehearse(case, device):
        pytest.skip("too slow on a CPU")


def check(case, device, with_lse: bool = False) -> None:
    """The error budget, with NaN in all memory that does not count."""
    skip_if_slow(case, device)
    inputs = softened(case, make(case, device, seed=seed_of(case), poison=True))
    dout, dlse = upstream(case, inputs, seed_of(case))
    grads = (dout, dlse if with_lse else None)
    assert_right(case, inputs, gradients(case, inputs, *grads), grads)


# The error budget


@pytest.mark.parametrize("case", cases.BUDGET, ids=name)
def test_within_budget(hopper, case):
    check(case, hopper)


@pytest.mark.parametrize("case", cases.LONG, ids=name)
def test_long_within_budget(hopper, case):
    check(case, hopper)


@pytest.mark.parametrize("case", cases.OTHER_WIDTHS, ids=name)
def test_other_widths_are_right_whoever_answers(device, case):
    check(case, device)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_softmax_scale(hopper, dim, scale, mask):
    case = dense((203, 300), (dim, dim), **mask)
    inputs = make(case, hopper)
    inputs.kwargs["softmax_scale"] = scale
    grads = (upstream(case, inputs)[0], None)
    assert_right(case, inputs, gradients(case, inputs, *grads), grads)


@pytest.mark.parametrize("dtype, size", [(BF16, 1e4), (FP16, 2e3)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_scores_of_thousands(hopper, dim, dtype, size):
    """One key takes it all; lse is large and may not lose what tells p = 1 from p = 0.99."""
    for mask in (FULL, CAUSAL, WINDOW):
        case = dense((200, 333), (dim, dim), dtype=dtype, **mask)
        inputs = make(case, hopper)
        inputs.q.mul_(size / dim**0.5)
        inputs.kwargs["softmax_scale"] = 1.0
        grads = (upstream(case, inputs)[0], None)
        assert_right(case, inputs, gradients(case, inputs, *grads), grads)


@pytest.mark.parametrize("mask", [FULL, CAUSAL, WINDOW], ids=["full", "causal", "window"])
@pytest.mark.parametrize("dims", TILES, ids=str)
@pytest.mark.parametrize("lengths", [(257, 331), (65, 129)], ids=str)
def test_rows_far_below_zero_see_no_padding(hopper, dims, mask, lengths):
    """lse is -1e4: what is computed from a key past the end, or a masked one, is exp(1e4)."""
    case = dense(lengths, dims, **mask)
    inputs = make(case, hopper, values="uniform")
    inputs.q.fill_(1e4 / dims[0] ** 0.5)
    inputs.k.fill_(-1.0)
    dout, dlse = upstream(case, inputs)
    dq, dk, dv = gradients(case, inputs, dout, dlse)
    exact = plain_gradients(case, inputs, (dout, dlse), torch.float64)
    low = plain_gradients(case, inputs, (dout, dlse), case.dtype)
    assert_within_budget(dv, exact[2], low[2], "dv")
    for got, want in ((dq, exact[0]), (dk, exact[1])):
        largest = float(want.abs().max())
        torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.02 * largest)


# Gradients that are exact: any wrong tile, lost fence or swapped row shows in some bit


@pytest.mark.parametrize("case", cases.PAIRS, ids=name)
def test_pairs_of_keys_win_exactly(hopper, case):
    skip_if_slow(case, hopper)
    inputs, grads = pairs_win(case, hopper, seed_of(case))
    wanted = assert_exact(case, inputs, gradients(case, inputs, *grads), grads)
    assert all(x.any() for x in wanted)
    alone = (grads[0], None)
    assert_exact(case, inputs, gradients(case, inputs, *alone), alone)


@pytest.mark.parametrize("case", cases.SHARES, ids=name)
def test_equal_shares_exactly(hopper, case):
    inputs, dout = equal_shares(case, hopper, seed_of(case))
    wanted = assert_exact(case, inputs, gradients(case, inputs, dout), (dout, None))
    assert all(x.any() for x in wanted)


@pytest.mark.parametrize("dims", TILES, ids=str)
def test_a_single_key_gives_all_to_its_value(hopper, dims):
    """p is 1 whatever the score, so dq and dk are 0 but for rounding, and dv is the sum of dout."""
    case = dense((513, 1), dims, (4, 2), batch=3)
    inputs = make(case, hopper)
    dout, _ = upstream(case, inputs, values="integers")
    dq, dk, dv = gradients(case, inputs, dout)
    assert dq.abs().max() < 1e-3 and dk.abs().max() < 2e-2
    expected = dout.double().sum(1, keepdim=True).unflatten(2, (2, 2)).sum(3).to(dv.dtype)
    torch.testing.assert_close(dv, expected, rtol=torch.finfo(dv.dtype).eps, atol=0)


# Every keyword reaches the gradients

KEYWORDS = {
    "causal": {"causal": True},
    "window": {"window_size": (40, 30)},
    "left": {"window_size": (40, -1)},
    "right": {"window_size": (-1, 30)},
    "softcap": {"softcap": 2.0},
    "scale": {"softmax_scale": 0.3},
    "used_q": {"seqused_q": (150, 3)},
    "used_k": {"seqused_k": (90, 101)},
}
FIELDS = {"window_size": "window", "seqused_q": "used_q", "seqused_k": "used_k"}


@pytest.mark.parametrize("form", ["dense", "packed"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("keyword", KEYWORDS)
def test_every_keyword_changes_the_gradients(hopper, keyword, dim, form):
    """What the forward honours and the backward ignores would leave them as they were."""
    (option, value), *_ = KEYWORDS[keyword].items()
    if option.startswith("seqused") and form == "dense":
        pytest.skip("sequences of one length have no seqused")
    lengths = ((203, 129), (203, 129))
    plain = dense((203, 203), (dim, dim), (4, 2)) if form == "dense" else packed(lengths, (dim, dim))
    inputs = make(plain, hopper)
    grads = (upstream(plain, inputs, poison=False)[0], None)
    before = gradients(plain, inputs, *grads)
    if option == "softmax_scale":
        case, changed = plain, same_but(inputs, softmax_scale=value)
    else:
        case = dataclasses.replace(plain, **{FIELDS.get(option, option): value})
        changed = same_but(inputs, **make(case, hopper).kwargs)
        changed.slices = make(case, hopper).slices
    after = gradients(case, changed, *grads)
    assert_right(case, changed, after, grads)
    for what, a, b in zip("qkv", before, after, strict=True):
        assert (a.double() - b.double()).norm() > 0.05 * a.double().norm(), f"{keyword} leaves d{what}"


def test_softcap_bends_the_gradients_themselves(hopper):
    """Scores far beyond the cap have next to no slope: only dv stays of usual size."""
    case = dense((130, 203), softcap=1.0)
    inputs = make(case, hopper)
    inputs.q.mul_(50.0)
    dq, dk, dv = gradients(case, inputs, upstream(case, inputs)[0])
    free = gradients(case, same_but(inputs, softcap=0.0), upstream(case, inputs)[0])
    assert dk.abs().mean() < 0.2 * free[1].abs().mean() and dv.abs().mean() > 0.02
    assert dq.isfinite().all()


# The gradient of lse


@pytest.mark.parametrize("with_out", [False, True], ids=["alone", "with-out"])
@pytest.mark.parametrize("case", cases.LSE, ids=name)
def test_gradient_of_lse(hopper, case, with_out):
    inputs = softened(case, make(case, hopper, seed=seed_of(case), poison=True))
    dout, dlse = upstream(case, inputs, seed_of(case))
    grads = (dout if with_out else None, dlse)
    found = gradients(case, inputs, *grads)
    assert_right(case, inputs, found, grads)
    assert torch.count_nonzero(found[2]) == 0 or with_out
    if with_out:
        assert not torch.equal(found[0], gradients(case, inputs, dout)[0]), "dlse is dropped"


@pytest.mark.parametrize("cut", [1, 128, 200, 333])
def test_gradients_of_two_halves_of_the_keys_merged(hopper, cut):
    """As in ring attention: merging needs lse, so the gradient of each half arrives through it too."""
    case = dense((150, 333), (128, 128), (4, 2), batch=2)
    inputs = make(case, hopper)
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    q, k, v = leaves
    parts = [
        answer(case, Inputs(q, k[:, half], v[:, half], inputs.kwargs, []))
        for half in (slice(0, cut), slice(cut, None))
    ]
    weights = torch.softmax(torch.stack([lse for _, lse in parts]), 0)[..., None].transpose(2, 3)
    merged = sum(w * out.float() for w, (out, _) in zip(weights, parts, strict=True))
    merged_lse = torch.logaddexp(parts[0][1], parts[1][1])
    dout, dlse = upstream(case, inputs)
    found = backward_of(leaves, (merged, merged_lse), (dout.float(), dlse))
    assert_right(case, inputs, found, (dout, dlse), factor=3.0)


@pytest.mark.parametrize("case", [cases.LSE[2], packed(SOME, **CAUSAL)], ids=name)
def test_sums_of_gradients(hopper, case):
    """Softmax moves weight about: dk sums up to what dlse sends, dv to dout. No oracle in sight."""
    rows, keys = ((4096, 5000) if hopper.type == "cuda" else (300, 400)) if not case.varlen else (0, 0)
    case = case if case.varlen else dataclasses.replace(case, seqlen_q=rows, seqlen_k=keys)
    inputs = make(case, hopper)
    dout, dlse = upstream(case, inputs, poison=False)
    _, dk, dv = gradients(case, inputs, dout, dlse)
    for i, (q, k, _) in enumerate(inputs.sequences()):
        if not len(q) or not len(k):
            continue
        of_q, of_k = inputs.slices[i] if case.varlen else (i, i)
        blind = ~explicit_mask(torch.arange(len(q), device=hopper), len(q), len(k), case.bounds).any(-1)
        sent = dlse[:, of_q] if case.varlen else dlse[i]
        sent = sent.double().T.masked_fill(blind[:, None], 0.0)[..., None] * q.double() * inputs.scale
        given = dout[of_q].double().masked_fill(blind[:, None, None], 0.0)
        for got, want, size in ((dk, sent, 4.0), (dv, given, 1.0)):
            total, expected = got[of_k].double().sum(0), want.sum(0).unflatten(0, (case.kv_heads, -1)).sum(1)
            allowed = 0.02 * size * max(len(q) * case.heads / case.kv_heads, 1.0) ** 0.5
            assert (total - expected).abs().max() < allowed


# Rows that see nothing, keys that nobody sees

BLIND = [
    dense((300, 70), (64, 64), **CAUSAL),
    dense((300, 70), (128, 128), (4, 2), batch=2, **CAUSAL),
    dense((300, 70), (256, 256), window=(5, 0)),
    dense((70, 300), (128, 128), (1, 1), window=(5, 5)),
    packed(SOME, (128, 128), **CAUSAL),
    *(packed(((200, 40, 130), (0, 90, 0)), (d, d), **FULL) for d in (64, 128, 256)),
]


@pytest.mark.parametrize("value", [0.0, 1e4, math.nan], ids=["0", "1e4", "nan"])
@pytest.mark.parametrize("case", BLIND, ids=name)
def test_what_flows_into_rows_without_keys_goes_nowhere(hopper, case, value):
    """docs/numerics.md: their gradients are 0, whatever gradient flows into them."""
    inputs = make(case, hopper, poison=True)
    dout, dlse = upstream(case, inputs)
    expected = gradients(case, inputs, dout, dlse, deterministic=True)
    assert_right(case, inputs, expected, (dout, dlse))
    for i, (rows, keys) in enumerate(zip(case.rows, case.keys, strict=True)):
        blind = ~explicit_mask(torch.arange(rows), rows, keys, case.bounds).any(-1).to(hopper)
        where = inputs.slices[i][0] if case.varlen else i
        dout[where][blind] = value
        (dlse[:, where] if case.varlen else dlse[where])[:, blind] = value
    found = gradients(case, inputs, dout, dlse, deterministic=True)
    assert_same_bits(found, expected)
    assert_zeros(case, inputs, found)


# Properties


@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_sequence_does_not_know_its_neighbours(hopper, dim, mask):
    """The same gradients packed among others, packed alone, and dense."""
    case = packed(SOME, (dim, dim), **mask)
    inputs = make(case, hopper, poison=True)
    dout, dlse = upstream(case, inputs)
    together = gradients(case, inputs, dout, dlse)
    for rows, keys in inputs.slices:
        q, k, v = inputs.q[rows], inputs.k[keys], inputs.v[keys]
        lengths = (len(q), len(k))
        parts = together[0][rows], together[1][keys], together[2][keys]
        single = dense(lengths, (dim, dim), (4, 2), **mask)
        alone = gradients(
            single, Inputs(q[None], k[None], v[None], {**mask}, []), dout[rows][None], dlse[:, rows][None]
        )
        assert_close([x[0] for x in alone], parts)
        one = packed(((lengths[0],), (lengths[1],)), (dim, dim), **mask)
        question = Inputs(q, k, v, make(one, hopper).kwargs, [(slice(lengths[0]), slice(lengths[1]))])
        assert_close(gradients(one, question, dout[rows], dlse[:, rows]), parts)


def test_packed_equal_lengths_equal_dense(hopper):
    for mask in (FULL, CAUSAL, WINDOW):
        case = packed(((256,) * 3, (256,) * 3), **mask)
        flat = make(case, hopper)
        dout, dlse = upstream(case, flat)
        found = gradients(case, flat, dout, dlse)
        whole = dense((256, 256), (128, 128), (4, 2), batch=3, **mask)
        square = Inputs(*(x.unflatten(0, (3, 256)) for x in (flat.q, flat.k, flat.v)), {}, [])
        square.kwargs |= {"causal": case.causal, "window_size": case.window}
        grads = dout.unflatten(0, (3, 256)), dlse.unflatten(1, (3, 256)).transpose(0, 1)
        assert_close([x.flatten(0, 1) for x in gradients(whole, square, *grads)], found)


@pytest.mark.parametrize("mask", [FULL, CAUSAL, WINDOW], ids=["full", "causal", "window"])
def test_order_of_batch_and_heads_does_not_matter(hopper, mask):
    case = dense((300, 257), (64, 64), (6, 6), batch=4, **mask)
    inputs = make(case, hopper)
    dout, _ = upstream(case, inputs)
    batch, heads = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 1, 0, 3, 2, 4])

    def shuffled(x):
        return x[batch][:, :, heads]

    expected = [shuffled(x) for x in gradients(case, inputs, dout)]
    moved = {x: shuffled(getattr(inputs, x)) for x in "qkv"}
    assert_close(gradients(case, inputs, shuffled(dout), **moved), expected)


@pytest.mark.parametrize(
    "dims, mask", [((64, 64), CAUSAL), ((128, 128), FULL), ((192, 128), CAUSAL), ((256, 256), FULL)], ids=str
)
@pytest.mark.parametrize("group", [2, 3, 8])
def test_a_group_sums_the_gradients_of_repeated_heads(hopper, dims, mask, group):
    case = dense((200, 333), dims, (2 * group, 2), batch=2, **mask)
    inputs = make(case, hopper)
    dout, _ = upstream(case, inputs)
    found = gradients(case, inputs, dout)
    many = dataclasses.replace(case, kv_heads=case.heads)
    repeated = {x: getattr(inputs, x).repeat_interleave(group, 2) for x in "kv"}
    dq, *others = gradients(many, inputs, dout, **repeated)
    assert_close([found[0]], [dq])
    eps = torch.finfo(case.dtype).eps
    for got, each in zip(found[1:], others, strict=True):
        each = each.double().unflatten(2, (2, group))
        allowed = eps * each.abs().sum(3) + eps / 2 * float(each.abs().max())
        assert ((got.double() - each.sum(3)).abs() <= allowed).all()


@pytest.mark.parametrize("mask", [FULL, CAUSAL, WINDOW], ids=["full", "causal", "window"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_linear_in_the_gradients_of_results(hopper, dim, mask):
    """By powers of two exactly, and of opposite sign for the opposite."""
    case = dense((300, 333), (dim, dim), (4, 2), **mask)
    inputs = make(case, hopper)
    dout, dlse = upstream(case, inputs)
    expected = gradients(case, inputs, dout, dlse, deterministic=True)
    for factor in (2.0, -1.0, 0.125):
        found = gradients(case, inputs, dout * factor, dlse * factor, deterministic=True)
        assert_same_bits(found, [x * factor for x in expected])
    assert all(torch.count_nonzero(x) == 0 for x in gradients(case, inputs, dout * 0.0, dlse * 0.0))


def test_max_seqlen_is_only_a_bound(hopper):
    for mask in (CAUSAL, {"window": (9, 9)}):
        case = packed(SOME, **mask)
        inputs = make(case, hopper, poison=True)
        dout, _ = upstream(case, inputs)
        expected = gradients(case, inputs, dout)
        for more in (1, 300, 10**6):
            longest = {f"max_seqlen_{x}": inputs.kwargs[f"max_seqlen_{x}"] + more for x in "qk"}
            assert_close(gradients(case, inputs, dout, **longest), expected)


def test_a_window_of_a_side_that_reaches_everything_is_none(hopper):
    case = dense((200, 300), **CAUSAL)
    inputs = make(case, hopper)
    dout, _ = upstream(case, inputs)
    expected = gradients(case, inputs, dout, deterministic=True)
    for window in ((-1, 0), (299, 0), (10**9, 0)):
        changes = dict(causal=False, window_size=window, deterministic=True)
        assert_same_bits(gradients(case, inputs, dout, **changes), expected)


# What autograd asks for


def test_only_some_inputs_need_gradients(hopper):
    case = dense((203, 300), (64, 64), (4, 2), **CAUSAL)
    inputs = make(case, hopper)
    dout, _ = upstream(case, inputs)
    expected = gradients(case, inputs, dout, deterministic=True)
    for wanted in ((0,), (1,), (2,), (0, 2), (1, 2)):
        leaves = [x.detach() for x in (inputs.q, inputs.k, inputs.v)]
        some = [leaves[i].requires_grad_() for i in wanted]
        out, _ = answer(case, Inputs(*leaves, {**CAUSAL, "deterministic": True}, []))
        assert_same_bits(torch.autograd.grad(out, some, dout), [expected[i] for i in wanted])


def test_one_tensor_as_queries_keys_and_values(hopper):
    case = dense((203, 203), (128, 128), (4, 4), **CAUSAL)
    inputs = make(case, hopper)
    dout, _ = upstream(case, inputs)
    apart = gradients(case, inputs, dout, k=inputs.q, v=inputs.q, deterministic=True)
    x = inputs.q.detach().requires_grad_()
    out = flash_attn_func(x, x, x, causal=True, deterministic=True)
    (found,) = torch.autograd.grad(out, x, dout)
    torch.testing.assert_close(found.float(), sum(g.float() for g in apart), rtol=0.02, atol=0.02)


def test_autocast_gives_gradients_in_the_dtype_of_the_inputs(hopper):
    case = dense((130, 203), (64, 64), (4, 2), **CAUSAL)
    inputs = make(case, hopper)
    dout, _ = upstream(case, inputs)
    expected = gradients(case, inputs, dout, deterministic=True)
    wide = [x.float().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    with torch.autocast(hopper.type, dtype=BF16):
        out = flash_attn_func(*wide, causal=True, deterministic=True)
    assert out.dtype == BF16
    assert_same_bits(torch.autograd.grad(out, wide, dout), [x.float() for x in expected])


def test_double_backward_is_refused(hopper):
    case = dense((130, 203), (64, 64), (4, 2), **CAUSAL)
    leaves, (out, _) = attended(case, make(case, hopper))
    grads = torch.autograd.grad(out.float().square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(sum(x.float().square().sum() for x in grads), leaves)


@pytest.mark.parametrize("case", [dense((130, 203)), packed(SOME, **CAUSAL), USED[0]], ids=name)
def test_a_fallback_would_be_noticed(hopper, monkeypatch, case):
    """The reference refuses here, and a backend without a backward would ask it."""
    inputs = make(case, hopper)
    leaves, results = attended(case, inputs)
    grads = upstream(case, inputs, poison=False)
    if hopper.type == "cuda":
        assert len(backward_of(leaves, results, grads, retain_graph=True)) == 3
        from tandem_attn import ops
        from tandem_attn.kernels import launch

        ops.clear_plans()
        monkeypatch.setattr(launch, "backward", None)
    monkeypatch.setattr(reference, "backward", cases.refuse)
    with pytest.raises(AssertionError, match="asked of the reference"):
        backward_of(leaves, results, grads)
