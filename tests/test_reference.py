"""The reference against an explicit mask in float64, by finite differences, and by properties."""

import itertools
import math
import pathlib
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import tandem_attn
from tandem_attn import reference
from tandem_attn.spec import Window
from tandem_attn.testing import Case, assert_right, exact, make, run
from tandem_attn.testing.budget import explicit_mask

SIDES = (-1, 0, 1, 2, 4)
F32, F64 = torch.float32, torch.float64


@pytest.fixture(autouse=True)
def only_reference(backend):
    backend("reference")


def small_blocks(monkeypatch, rows=2, keys=2):
    monkeypatch.setattr(reference, "MAX_ROWS_PER_BLOCK", rows)
    monkeypatch.setattr(reference, "KEYS_PER_BLOCK", keys)


def grads(case, inputs, dout, dlse=None):
    """Gradients of the public function for given output gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out, lse = run(case, type(inputs)(*leaves, inputs.kwargs, inputs.slices))
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    total = (out * dout).sum() + (0.0 if dlse is None else (lse * dlse).sum())
    return torch.autograd.grad(total, leaves)


# Every small shape and window


@pytest.mark.parametrize("left", SIDES)
@pytest.mark.parametrize("right", SIDES)
def test_small_grid_matches_explicit_mask(monkeypatch, left, right):
    small_blocks(monkeypatch)
    for seqlen_q, seqlen_k in itertools.product(range(1, 7), repeat=2):
        case = Case(
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            heads=2,
            kv_heads=1,
            head_dim=3,
            window=(left, right),
            dtype=F64,
        )
        inputs = make(case, seed=seqlen_q * 7 + seqlen_k)
        out, lse = run(case, inputs)
        out_exact, lse_exact = exact(case, inputs)
        torch.testing.assert_close(out, out_exact, rtol=0, atol=1e-13)
        torch.testing.assert_close(lse, lse_exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (1, 0), (2, 1), (0, -1)])
def test_small_grid_gradients_match_autograd(monkeypatch, window):
    small_blocks(monkeypatch)
    for seqlen_q, seqlen_k in itertools.product((1, 3, 5), repeat=2):
        case = Case(
            seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads=4, kv_heads=2, head_dim=3, window=window, dtype=F64
        )
        inputs = make(case)
        leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        q, k, v = (x.transpose(1, 2) for x in leaves)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        mask = explicit_mask(torch.arange(seqlen_q), seqlen_q, seqlen_k, window)
        scores = (q @ k.mT * inputs.scale).masked_fill(~mask, -1e300)  # autograd needs rows that are finite
        alive = mask.any(-1)
        out = (scores.softmax(-1) @ v * alive[:, None]).transpose(1, 2)
        lse = scores.logsumexp(-1) * alive
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        expected = torch.autograd.grad((out * dout).sum() + (lse * dlse).sum(), leaves)
        for got, want in zip(grads(case, inputs, dout, dlse), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_visible_keys_is_the_smallest_range():
    for seqlen_q, seqlen_k, left, right in itertools.product(range(1, 6), range(6), SIDES, SIDES):
        for start in range(seqlen_q):
            for stop in range(start + 1, seqlen_q + 1):
                mask = explicit_mask(torch.arange(start, stop), seqlen_q, seqlen_k, (left, right)).any(0)
                seen = mask.nonzero().flatten().tolist()
                found = reference.visible_keys(range(start, stop), seqlen_q, seqlen_k, Window(left, right))
                if seen:
                    assert (found.start, found.stop) == (seen[0], seen[-1] + 1)
                else:
                    assert len(found) == 0


def test_key_blocks_that_no_row_sees_are_skipped(monkeypatch):
    small_blocks(monkeypatch, rows=4, keys=4)
    seen = []
    scores = reference.scores
    monkeypatch.setattr(reference, "scores", lambda *args: seen.append(1) or scores(*args))
    for window, blocks in (((-1, -1), 16), ((-1, 0), 10), ((0, 0), 4), ((4, 0), 7)):
        seen.clear()
        case = Case(seqlen_q=16, seqlen_k=16, window=window, dtype=F32)
        run(case, make(case))
        assert len(seen) == blocks, window


# Larger cases within the error budget

CASES = [
    Case(batch=2, seqlen_q=113, seqlen_k=203, heads=6, kv_heads=6, head_dim=64),
    Case(seqlen_q=600, seqlen_k=1100, heads=8, kv_heads=2, head_dim=32, causal=True, dtype=torch.float16),
    Case(seqlen_q=1100, seqlen_k=600, heads=3, kv_heads=1, head_dim=40, causal=True, dtype=F32),
    Case(batch=2, seqlen_q=700, seqlen_k=700, window=(100, 30), head_dim=17),
    Case(seqlen_q=130, seqlen_k=600, head_dim=192, head_dim_v=128, softcap=15.0, causal=True),
    Case(seqlen_q=600, seqlen_k=600, window=(64, -1), head_dim=16, head_dim_v=24, dtype=F32),
    Case(lengths_q=(5, 0, 600, 1), lengths_k=(7, 3, 600, 0), heads=4, kv_heads=2, causal=True, head_dim=16),
    Case(lengths_q=(9, 30), lengths_k=(20, 31), used_q=(0, 29), used_k=(20, 7), window=(8, 2), head_dim=16),
    Case(lengths_q=(40, 12), lengths_k=(40, 12), layout="qkvpacked", heads=4, kv_heads=2, dtype=F32),
    Case(batch=2, layout="bhsd", causal=True),
    Case(batch=2, layout="expanded", heads=6, kv_heads=3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_within_budget(case):
    inputs = make(case, poison=True)
    assert_right(case, inputs, *run(case, inputs))


@pytest.mark.parametrize("case", [c for c in CASES if not c.softcap], ids=lambda c: c.id)
def test_one_key_wins_exactly(case):
    inputs = make(case, values="integers", poison=True)
    out, _ = run(case, inputs)
    expected = exact(case, inputs)[0].to(case.dtype)
    assert torch.equal(out, expected)
    assert case.varlen or expected.abs().sum() > 0


def test_uniform_mean_is_exact():
    case = Case(seqlen_q=3, seqlen_k=1024, dtype=torch.bfloat16)
    inputs = make(case, values="uniform")
    out, lse = run(case, inputs)
    assert torch.equal(out, inputs.v.double().mean(1, keepdim=True).expand_as(out).to(out.dtype))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(1024)), rtol=0, atol=1e-6)


# Gradients by finite differences, lse included

GRAD_CASES = [
    Case(seqlen_q=4, seqlen_k=6, heads=2, kv_heads=1, head_dim=3, causal=True, dtype=F64),
    Case(batch=2, seqlen_q=5, seqlen_k=3, head_dim=2, causal=True, dtype=F64),
    Case(seqlen_q=5, seqlen_k=5, head_dim=3, head_dim_v=2, window=(1, 1), softcap=1.5, dtype=F64),
    Case(
        lengths_q=(3, 0, 4),
        lengths_k=(5, 2, 4),
        used_q=(2, 0, 4),
        used_k=(4, 2, 3),
        heads=4,
        kv_heads=2,
        head_dim=2,
        causal=True,
        dtype=F64,
    ),
]


@pytest.mark.parametrize("case", GRAD_CASES, ids=lambda c: c.id)
def test_gradcheck(monkeypatch, case):
    small_blocks(monkeypatch)
    inputs = make(case)
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]

    def both(q, k, v):
        out, lse = run(case, type(inputs)(q, k, v, inputs.kwargs, inputs.slices))
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(both, leaves)


@pytest.mark.parametrize("change", [{"causal": True}, {"window": (2, 1)}, {"softcap": 0.7}, {"kv_heads": 1}])
def test_every_feature_changes_the_gradients(change):
    """A feature that the forward honours and the backward ignores would pass tests of the forward."""
    plain, other = Case(seqlen_q=9, seqlen_k=9, dtype=F64), Case(seqlen_q=9, seqlen_k=9, dtype=F64, **change)
    dout = torch.randn(1, 9, 2, 64, dtype=F64)
    a, b = (grads(case, make(case), dout)[0] for case in (plain, other))
    assert (a - b).abs().max() > 1e-3


def test_dlse_alone_reaches_q_and_k():
    case = Case(seqlen_q=5, seqlen_k=7, dtype=F64)
    inputs = make(case)
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    _, lse = tandem_attn.flash_attn_func(*leaves, return_attn_probs=True)
    lse.sum().backward()
    scores = leaves[0].detach().transpose(1, 2) @ leaves[1].detach().transpose(1, 2).mT * inputs.scale
    expected = scores.softmax(-1) @ leaves[1].detach().transpose(1, 2) * inputs.scale
    torch.testing.assert_close(leaves[0].grad, expected.transpose(1, 2))
    assert torch.count_nonzero(leaves[2].grad) == 0


# Rows and memory that must not matter


@pytest.mark.parametrize("seqlen_q, seqlen_k, window", [(7, 3, (-1, 0)), (5, 5, (0, -1)), (6, 2, (1, 1))])
def test_rows_without_keys(seqlen_q, seqlen_k, window):
    case = Case(seqlen_q=seqlen_q, seqlen_k=seqlen_k, window=window, dtype=F32)
    inputs = make(case)
    out, lse = run(case, inputs)
    blind = ~explicit_mask(torch.arange(seqlen_q), seqlen_q, seqlen_k, window).any(-1)
    assert (lse[..., blind] == -math.inf).all() and lse[..., ~blind].isfinite().all()
    assert torch.count_nonzero(out[:, blind]) == 0
    dout = torch.randn_like(out)
    dq, dk, dv = grads(case, inputs, dout)
    assert torch.count_nonzero(dq[:, blind]) == 0
    dout[:, blind] = math.nan  # what flows into such a row goes nowhere
    for a, b in zip((dq, dk, dv), grads(case, inputs, dout), strict=True):
        assert torch.equal(a, b)


def test_nan_outside_the_lengths_changes_no_bit():
    case = Case(
        lengths_q=(9, 0, 14),
        lengths_k=(12, 4, 14),
        used_q=(7, 0, 14),
        used_k=(12, 0, 10),
        causal=True,
        dtype=F32,
    )
    inputs = make(case, poison=True)
    assert inputs.q.isnan().any() and inputs.k.isnan().any() and inputs.v.isnan().any()
    clean = type(inputs)(
        *(x.nan_to_num(0.5) for x in (inputs.q, inputs.k, inputs.v)), inputs.kwargs, inputs.slices
    )
    for a, b in zip(run(case, inputs), run(case, clean), strict=True):
        assert torch.equal(a, b) and not a.isnan().any()
    dout = torch.randn(inputs.q.shape)
    for a, b in zip(grads(case, inputs, dout), grads(case, clean, dout), strict=True):
        assert torch.equal(a, b) and not a.isnan().any()


def test_undeclared_rows_are_zero_in_the_reference():
    case = Case(lengths_q=(4, 5), lengths_k=(4, 5), used_q=(2, 5), dtype=F32)
    out, lse = run(case, make(case, poison=True))
    assert torch.count_nonzero(out[2:4]) == 0 and torch.count_nonzero(out[9:]) == 0
    assert (lse[:, 2:4] == -math.inf).all() and (lse[:, 9:] == -math.inf).all()


@pytest.mark.parametrize("layout", ["bhsd", "expanded", "qkvpacked"])
@pytest.mark.parametrize("lengths", [None, (5, 12, 3)])
def test_strides_change_no_bit(layout, lengths):
    case = Case(
        batch=2,
        seqlen_q=20,
        seqlen_k=20,
        heads=4,
        kv_heads=2,
        layout=layout,
        lengths_q=lengths,
        lengths_k=lengths,
    )
    inputs = make(case)
    plain = type(inputs)(
        *(x.contiguous() for x in (inputs.q, inputs.k, inputs.v)), inputs.kwargs, inputs.slices
    )
    assert any(
        a.stride() != b.stride() for a, b in zip((inputs.q, inputs.k), (plain.q, plain.k), strict=True)
    )
    for a, b in zip(run(case, inputs), run(case, plain), strict=True):
        assert torch.equal(a, b) and a.is_contiguous()


def test_last_dimension_may_have_any_stride():
    q, k, v = (torch.randn(1, 6, 2, 8, 2)[..., 0] for _ in range(3))
    assert q.stride(-1) == 2
    out = tandem_attn.flash_attn_func(q, k, v)
    assert torch.equal(out, tandem_attn.flash_attn_func(q.contiguous(), k.contiguous(), v.contiguous()))


# Properties that need no oracle


@st.composite
def cases(draw, **fixed):
    heads = draw(st.sampled_from([(1, 1), (2, 1), (3, 3), (6, 2)]))
    window = (draw(st.sampled_from([-1, 0, 3, 40])), draw(st.sampled_from([-1, 0, 2, 40])))
    facts = {
        "batch": draw(st.integers(1, 3)),
        "seqlen_q": draw(st.integers(1, 40)),
        "seqlen_k": draw(st.integers(1, 40)),
        "heads": heads[0],
        "kv_heads": heads[1],
        "head_dim": draw(st.sampled_from([1, 4, 9])),
        "head_dim_v": draw(st.sampled_from([None, 5])),
        "window": window,
        "softcap": draw(st.sampled_from([0.0, 2.0])),
        "dtype": F64,
    }
    return Case(**(facts | fixed))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@hypothesis.given(cases())
def test_matches_exact(case):
    inputs = make(case)
    for got, want in zip(run(case, inputs), exact(case, inputs), strict=True):
        close(got, want)


@hypothesis.given(cases(softcap=0.0))
def test_shifting_all_keys_shifts_lse_only(case):
    inputs = make(case)
    out, lse = run(case, inputs)
    shift = torch.randn(case.head_dim, dtype=F64)
    inputs.k = inputs.k + shift
    out_shifted, lse_shifted = run(case, inputs)
    close(out_shifted, out)
    close(lse_shifted, lse + (inputs.q @ shift).transpose(1, 2) * inputs.scale)


@hypothesis.given(cases(kv_heads=1, heads=4), st.randoms(use_true_random=False))
def test_group_equals_repeated_heads_and_batch_order_does_not_matter(case, random):
    inputs = make(case)
    out, lse = run(case, inputs)
    order = list(range(case.batch))
    random.shuffle(order)
    inputs.q, inputs.k, inputs.v = (x[order] for x in (inputs.q, inputs.k, inputs.v))
    inputs.k, inputs.v = (x.repeat_interleave(4, 2) for x in (inputs.k, inputs.v))
    out_other, lse_other = run(case, inputs)
    close(out_other, out[order])
    close(lse_other, lse[order])


@hypothesis.given(cases(), st.integers(0, 40))
def test_two_halves_of_the_keys_merge_into_the_whole(case, cut):
    """Each half is a question of its own, so windows are put aside: full attention, merged by lse."""
    case = Case(**(vars(case) | {"window": (-1, -1)}))
    inputs = make(case)
    out, lse = run(case, inputs)
    cut = min(cut, case.seqlen_k)
    k, v = inputs.k, inputs.v
    parts = []
    for half in (slice(0, cut), slice(cut, None)):
        inputs.k, inputs.v = k[:, half], v[:, half]
        parts.append(run(case, inputs))
    weights = torch.softmax(torch.stack([p[1] for p in parts]), 0)[..., None].transpose(2, 3)
    close(sum(w * p[0] for w, p in zip(weights, parts, strict=True)), out)
    close(torch.logaddexp(parts[0][1], parts[1][1]), lse)


@hypothesis.given(cases(batch=1), st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=5))
def test_packed_equals_one_by_one(case, lengths):
    packed = Case(
        **(
            vars(case)
            | {"lengths_q": tuple(a for a, _ in lengths), "lengths_k": tuple(b for _, b in lengths)}
        )
    )
    inputs = make(packed)
    out, lse = run(packed, inputs)
    assert out.shape[0] == sum(packed.rows)
    for (rows, _), (q, k, v) in zip(inputs.slices, inputs.sequences(), strict=True):
        one = {"window_size": case.window, "softcap": case.softcap, "return_attn_probs": True}
        out_one, lse_one = tandem_attn.flash_attn_func(q[None], k[None], v[None], **one)
        close(out[rows], out_one[0])
        close(lse[:, rows], lse_one[0])


@hypothesis.given(cases(dtype=F32))
def test_twice_is_the_same_bits(case):
    inputs = make(case)
    for a, b in zip(run(case, inputs), run(case, inputs), strict=True):
        assert torch.equal(a, b)


def test_scores_far_from_zero_stay_finite():
    q, k = torch.full((1, 4, 1, 8), 3e3), torch.full((1, 600, 1, 8), -3e3)
    out, lse = tandem_attn.flash_attn_func(q, k, torch.ones(1, 600, 1, 8), return_attn_probs=True)
    torch.testing.assert_close(out, torch.ones_like(out))
    torch.testing.assert_close(lse, torch.full_like(lse, -8 * 9e6 / 8**0.5))


def test_autocast_does_not_round_its_sums():
    case = Case(seqlen_q=70, seqlen_k=70, dtype=torch.bfloat16)
    inputs = make(case)
    expected = run(case, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(run(case, inputs), expected, strict=True):
            assert torch.equal(a, b)


# Memory linear in length

# The peak of the process itself: getrusage's would begin with that of the process which started it, this one.
_MEMORY = """
import pathlib, re, sys, torch
import tandem_attn
q, k, v = (torch.randn(1, 16384, 1, 64, requires_grad=sys.argv[1] == "backward") for _ in range(3))
out = tandem_attn.flash_attn_func(q, k, v, causal=True)
if sys.argv[1] == "backward":
    out.sum().backward()
    assert q.grad.isfinite().all()
status = pathlib.Path("/proc/self/status").read_text()
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]) // 1024)
"""


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/status").exists(), reason="a process's peak is read from Linux's /proc"
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_16k_by_16k_stays_under_1_gb(direction):
    source = pathlib.Path(tandem_attn.__file__).parents[1]
    command = [sys.executable, "-c", _MEMORY, direction]
    environment = {"PYTHONPATH": str(source), "TANDEM_BACKEND": "reference", "PATH": ""}
    environment |= {"OMP_NUM_THREADS": "1"}  # more of them would spin and share the same tensors
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1024, f"peak {done.stdout} MB; the scores alone would be 1 GB in float32"
