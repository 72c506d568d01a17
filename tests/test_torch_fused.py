"""Torch's own kernels answer exactly our question, or refuse it with a reason."""

import dataclasses
import itertools
import math
import statistics
import time

import pytest
import torch

import tandem_attn
from tandem_attn import arch, torch_fused
from tandem_attn.spec import Options, attention_spec
from tandem_attn.testing import Case, assert_right, assert_within_budget, exact, make, run

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

CASES = [
    Case(batch=2, seqlen_q=113, seqlen_k=203, heads=3, kv_heads=3),
    Case(batch=2, seqlen_q=300, seqlen_k=300, heads=6, kv_heads=2, causal=True, dtype=F32),
    Case(batch=3, seqlen_q=1, seqlen_k=300, heads=4, kv_heads=1, causal=True, dtype=F16),
    Case(seqlen_q=70, seqlen_k=70, heads=4, kv_heads=2, causal=True, head_dim=17, dtype=F64),
    Case(seqlen_q=70, seqlen_k=90, window=(89, 69), head_dim=40),  # reaches everything
    Case(batch=2, seqlen_q=65, seqlen_k=65, heads=4, kv_heads=2, layout="qkvpacked", dtype=F32),
    Case(batch=2, seqlen_q=65, seqlen_k=33, layout="bhsd", dtype=F16),
    Case(batch=2, seqlen_q=65, seqlen_k=33, heads=6, kv_heads=3, layout="expanded"),
    Case(lengths_q=(5, 0, 60, 1), lengths_k=(5, 3, 60, 0), heads=4, kv_heads=2, causal=True, dtype=F32),
    Case(lengths_q=(5, 31, 1), lengths_k=(9, 7, 20), heads=2, kv_heads=2, causal=True, dtype=F32),
    Case(lengths_q=(9, 30), lengths_k=(20, 31), used_q=(0, 29), used_k=(20, 7), heads=4, kv_heads=1),
]


@pytest.fixture
def fused(backend):
    backend("torch")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_within_budget(case, fused):
    inputs = make(case, poison=True)
    assert_right(case, inputs, *run(case, inputs))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_one_key_wins_exactly(case, fused):
    inputs = make(case, values="integers", poison=True)
    assert torch.equal(run(case, inputs)[0], exact(case, inputs)[0].to(case.dtype))


def gradients(case, inputs, dout, dlse=None):
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out, lse = run(case, type(inputs)(*leaves, inputs.kwargs, inputs.slices))
    loss = (out.double() * dout).sum()
    if dlse is not None:
        loss = loss + (lse.double().masked_fill(lse == -math.inf, 0.0) * dlse).sum()
    return torch.autograd.grad(loss, leaves)


def check_gradients(case, backend, with_dlse, device):
    """Against the reference in float64; the budget is the reference's own error in the case's dtype."""
    inputs = make(case, device)
    out, lse = exact(case, inputs)
    dout = torch.randn_like(out)
    dlse = torch.randn_like(lse) if with_dlse else None
    backend("torch")
    found = gradients(case, inputs, dout, dlse)
    backend("reference")
    low = gradients(case, inputs, dout, dlse)
    exactly = dataclasses.replace(case, dtype=F64)
    wide = type(inputs)(*(x.double() for x in (inputs.q, inputs.k, inputs.v)), inputs.kwargs, inputs.slices)
    # 16-bit: torch's kernels round probabilities before their products, the reference does not
    factor = 6.0 if case.dtype.itemsize == 2 else 2.0
    for name, a, b, c in zip("qkv", found, gradients(exactly, wide, dout, dlse), low, strict=True):
        assert_within_budget(a, b, c, f"d{name}", factor, mean_factor=factor)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("with_dlse", [False, True])
def test_gradients_match_the_reference(case, with_dlse, backend):
    check_gradients(case, backend, with_dlse, "cpu")


def test_lse_is_natural_contiguous_and_float32(fused):
    for heads, kv_heads in ((4, 4), (4, 2)):
        case = Case(batch=2, seqlen_q=7, seqlen_k=33, heads=heads, kv_heads=kv_heads, dtype=BF16)
        out, lse = run(case, make(case))
        assert lse.shape == (2, heads, 7) and lse.dtype == F32 and lse.is_contiguous() and out.is_contiguous()
    q = torch.zeros(1, 3, 2, 8)
    _, lse = tandem_attn.flash_attn_func(
        q, torch.zeros(1, 16, 2, 8), torch.zeros(1, 16, 2, 8), return_attn_probs=True
    )
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(16)))


def test_every_small_shape_is_answered_right_or_refused(backend):
    """The mask of torch's CPU kernel is aligned top-left: a shape let through wrongly would show here."""
    answered = 0
    for seqlen_q, seqlen_k, causal in itertools.product(range(1, 6), range(1, 6), (False, True)):
        case = Case(seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=causal, head_dim=4, dtype=F64)
        inputs = make(case)
        reasons = tandem_attn.explain(inputs.q, inputs.k, inputs.v, causal=causal).reasons.get("torch")
        if reasons:
            assert causal and seqlen_q != seqlen_k and "top-left" in reasons[0]
            continue
        answered += 1
        backend("torch")
        for a, b in zip(run(case, inputs), exact(case, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
        backend("")
    assert answered == 25 + 5 + 4  # full; causal of equal lengths; causal of one query


def test_grouped_heads_are_read_in_place(monkeypatch, fused):
    """The keys of a group are a view: torch's kernel sees stride 0, not a copy."""
    seen = []
    grouped = torch_fused._grouped
    monkeypatch.setattr(torch_fused, "_grouped", lambda *args: seen.append(grouped(*args)) or seen[-1])
    case = Case(batch=2, seqlen_q=9, seqlen_k=9, heads=6, kv_heads=2, dtype=F32)
    inputs = make(case)
    run(case, inputs)
    assert len(seen) == 2
    for q, k, v in seen:
        assert q.untyped_storage().data_ptr() == inputs.q.untyped_storage().data_ptr()
        assert k.stride(1) == v.stride(1) == 0 and k.shape == (2, 3, 9, 64)
        assert k.untyped_storage().data_ptr() == inputs.k.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"softcap": 1.0}, "softcap is 1.0"),
        ({"head_dim_v": 32}, "head_dim_v is 32 and head_dim 64"),
        ({"window": (5, 0)}, r"window is \(5, 0\)"),
        ({"window": (-1, 3)}, r"window is \(-1, 3\)"),
        ({"causal": True, "seqlen_k": 99}, "seqlen_q 128 and seqlen_k 99.*top-left"),
    ],
)
def test_refusals(change, said, fused):
    case = Case(**change)
    with pytest.raises(NotImplementedError, match=said):
        run(case, make(case))


def test_strided_last_dimension_is_refused(fused):
    q = torch.randn(1, 6, 2, 8, 2)[..., 0]
    with pytest.raises(NotImplementedError, match="last dimension"):
        tandem_attn.flash_attn_func(q, q, q)


def test_twice_is_the_same_bits(fused):
    case = Case(batch=2, seqlen_q=700, seqlen_k=700, heads=4, kv_heads=2, causal=True)
    inputs = make(case)
    for a, b in zip(run(case, inputs), run(case, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.plain_empty
def test_as_fast_as_sdpa():
    """0.99 to 1.03 times SDPA at 4k tokens on two shared cores (2026-11-24); here with room for noise."""
    q, k, v = (torch.randn(1, 1024, 8, 64) for _ in range(3))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    ours, theirs = [], []
    calls = [
        (ours, lambda: tandem_attn.flash_attn_func(q, k, v)),
        (theirs, lambda: torch.nn.functional.scaled_dot_product_attention(*heads_first)),
    ]
    for turn in range(16):
        for times, call in calls if turn % 2 else reversed(calls):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    assert statistics.median(ours) < 1.5 * statistics.median(theirs)


# FlashAttention-2 in torch, on CUDA devices


def cuda_spec(monkeypatch, capability=(8, 0), **changes):
    monkeypatch.setattr(arch, "capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    q = torch.zeros(1, 8, 2, 64, dtype=BF16)
    spec = attention_spec(q, q, q, None, Options(None, -1, -1, 0.0, 0, False))
    return dataclasses.replace(spec, device=torch.device("cuda:0"), **changes)


def test_cuda_takes_what_flash_attention_2_has(monkeypatch):
    from tandem_attn.spec import Window

    for changes in ({}, {"window": Window(5, 0)}, {"seqlen_k": 9, "window": Window(-1, 0)}, {"varlen": True}):
        assert torch_fused.reasons(cuda_spec(monkeypatch, **changes)) == []
    assert torch_fused.backward(cuda_spec(monkeypatch, varlen=True, has_seqused_k=True)) is None


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"capability": (7, 5)}, "compute capability is 7.5"),
        ({"dtype": F32}, "dtype is torch.float32"),
        ({"head_dim": 60, "head_dim_v": 60}, "head_dim is 60"),
        ({"head_dim": 264, "head_dim_v": 264}, "head_dim is 264"),
        ({"has_seqused_q": True}, "seqused_q is given"),
        ({"aligned": False}, "multiple of 16 bytes"),
        ({"k_stride": (999, 124, 62, 1)}, "multiple of 16 bytes"),
        ({"softcap": 2.0}, "softcap is 2.0"),
        ({"head_dim_v": 128}, "head_dim_v is 128"),
    ],
)
def test_cuda_refusals(monkeypatch, changes, said):
    reasons = torch_fused.reasons(cuda_spec(monkeypatch, **changes))
    assert len(reasons) == 1 and said in reasons[0]


@pytest.mark.parametrize(
    "asked, mode, ours",
    [
        (False, "default", True),
        (False, "warn", True),
        (False, "error", True),
        (True, "default", False),  # torch's backward adds up dq by atomics
        (True, "warn", False),  # it says so, and does
        (True, "error", True),
    ],
)
def test_cuda_gradients_are_left_to_the_reference_where_they_must_repeat(monkeypatch, asked, mode, ours):
    spec = cuda_spec(monkeypatch, deterministic=asked)
    assert torch_fused.reasons(spec) == [], "the forward is repeatable in any case"
    try:
        torch.set_deterministic_debug_mode(mode)
        assert (torch_fused.backward(spec) is not None) == ours
    finally:
        torch.set_deterministic_debug_mode("default")


def test_other_devices_are_refused(monkeypatch):
    spec = dataclasses.replace(cuda_spec(monkeypatch), device=torch.device("mps"))
    assert "mps" in torch_fused.reasons(spec)[0]


GPU_CASES = [
    Case(batch=2, seqlen_q=113, seqlen_k=203, heads=6, kv_heads=2, head_dim=64),
    Case(seqlen_q=300, seqlen_k=200, heads=4, kv_heads=4, head_dim=128, causal=True, dtype=F16),
    Case(seqlen_q=200, seqlen_k=300, heads=4, kv_heads=1, head_dim=80, window=(40, 3)),
    Case(batch=3, seqlen_q=1, seqlen_k=300, heads=8, kv_heads=2, head_dim=128, causal=True),
    Case(seqlen_q=130, seqlen_k=130, heads=2, kv_heads=2, head_dim=256, layout="bhsd", window=(-1, 9)),
    Case(lengths_q=(5, 0, 160, 1), lengths_k=(5, 3, 60, 0), heads=4, kv_heads=2, head_dim=64, causal=True),
    Case(
        lengths_q=(9, 130), lengths_k=(20, 131), used_k=(20, 7), heads=4, kv_heads=4, head_dim=64, dtype=F16
    ),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda c: c.id)
def test_cuda_within_budget(case, fused):
    inputs = make(case, device="cuda", poison=True)
    assert_right(case, inputs, *run(case, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda c: c.id)
def test_cuda_gradients_match_the_reference(case, backend):
    check_gradients(case, backend, False, "cuda")
