"""The operators: schema, fakes, autograd, torch.compile, export, and the plans remembered behind them."""

import timeit

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from tandem_attn import (
    dispatch,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    ops,
    reference,
)
from tandem_attn.spec import Lengths, attention_spec
from tandem_attn.testing import Case, make, run

F32 = torch.float32

CASES = [
    Case(batch=2, seqlen_q=9, seqlen_k=12, head_dim=8, causal=True, dtype=F32),
    Case(seqlen_q=9, seqlen_k=9, heads=4, kv_heads=2, head_dim=8, dtype=F32),
    Case(seqlen_q=7, seqlen_k=5, head_dim=8, head_dim_v=4, window=(2, 1), softcap=2.0, dtype=F32),
    Case(seqlen_q=9, seqlen_k=9, heads=4, kv_heads=2, head_dim=8, layout="qkvpacked", dtype=torch.bfloat16),
    Case(lengths_q=(3, 0, 5), lengths_k=(4, 2, 5), heads=4, kv_heads=2, head_dim=8, causal=True, dtype=F32),
    Case(
        lengths_q=(3, 5), lengths_k=(4, 5), used_q=(3, 2), used_k=(0, 5), head_dim=8, head_dim_v=4, dtype=F32
    ),
    Case(seqlen_q=0, seqlen_k=5, head_dim=8, dtype=F32),
    Case(seqlen_q=5, seqlen_k=6, head_dim=8, dtype=torch.float64),
]


def question(case, requires_grad=False, deterministic=False):
    """The operator's flat arguments for a case."""
    inputs = make(case)
    tensors = [x.detach().clone().requires_grad_(requires_grad) for x in (inputs.q, inputs.k, inputs.v)]
    lengths = [inputs.kwargs.get(name) for name in Lengths._fields]
    return (*tensors, *lengths, None, *case.bounds, case.softcap, 0, deterministic)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_opcheck_forward(case):
    torch.library.opcheck(torch.ops.tandem_attn.forward.default, question(case, requires_grad=True))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("with_dlse", [False, True])
def test_opcheck_backward(case, with_dlse):
    arguments = question(case)
    out, lse = torch.ops.tandem_attn.forward(*arguments)
    dlse = torch.randn_like(lse) if with_dlse else None
    torch.library.opcheck(
        torch.ops.tandem_attn.backward.default,
        (torch.randn_like(out), dlse, out, lse, *arguments),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=lambda c: c.id)
def test_opcheck_deterministic(case):
    arguments = question(case, requires_grad=True, deterministic=True)
    torch.library.opcheck(torch.ops.tandem_attn.forward.default, arguments)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_fakes_have_the_strides_of_the_real_thing(case):
    inputs = make(case)
    real = run(case, inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = run(
            case,
            type(inputs)(*(mode.from_tensor(x) for x in (inputs.q, inputs.k, inputs.v)), inputs.kwargs, []),
        )
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert a.is_contiguous() and type(b).__name__ == "FakeTensor"


def test_meta_tensors_have_shapes_and_no_numbers():
    q = torch.empty(2, 9, 4, 8, device="meta")
    out, lse = flash_attn_func(q, q, q, return_attn_probs=True)
    assert out.is_meta and out.shape == q.shape and lse.shape == (2, 4, 9)
    with pytest.raises(ValueError, match="k is of head_dim 4"):
        flash_attn_func(q, q[..., :4], q)


# torch.compile


def compiled(function):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, dynamic=True, backend=counter), counter


@pytest.mark.parametrize("deterministic", [False, True])
def test_compile_dense_with_gradients(deterministic):
    def attend(q, k, v):
        return flash_attn_func(q, k, v, causal=True, deterministic=deterministic, return_attn_probs=True)

    fast, counter = compiled(attend)
    for length in (7, 16, 33, 100, 2):
        leaves = [torch.randn(2, length, 2, 8, requires_grad=True) for _ in range(3)]
        expected, found = attend(*leaves), fast(*leaves)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b)
        wanted = torch.autograd.grad(expected[0].sum() + expected[1].sum(), leaves)
        got = torch.autograd.grad(found[0].sum() + found[1].sum(), leaves)
        for a, b in zip(wanted, got, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 3, "one compilation and at most two more"


def test_compile_packed():
    def attend(q, k, v, starts, longest):
        return flash_attn_varlen_func(
            q, k, v, starts, starts, longest, longest, window_size=(3, 0), softcap=2.0
        )

    fast, counter = compiled(attend)
    for lengths in ((3, 4), (5, 6, 7), (1, 9), (20,), (2, 0, 8)):
        case = Case(lengths_q=lengths, lengths_k=lengths, heads=4, kv_heads=2, head_dim=8, dtype=F32)
        inputs = make(case)
        arguments = (inputs.q, inputs.k, inputs.v, inputs.kwargs["cu_seqlens_q"], max(lengths))
        torch.testing.assert_close(fast(*arguments), attend(*arguments))
    assert counter.frame_count <= 3


def test_compile_qkvpacked_under_autocast():
    def attend(qkv):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return flash_attn_qkvpacked_func(qkv, num_heads_q=4, causal=True, softmax_scale=0.3)

    fast, _ = compiled(attend)
    packed = torch.randn(2, 9, 8, 16)
    assert fast(packed).dtype == torch.bfloat16
    torch.testing.assert_close(fast(packed), attend(packed))


def test_compile_reports_mistakes():
    fast, _ = compiled(lambda q, k: flash_attn_func(q, k, k))
    with pytest.raises(Exception, match=r"q is of .* heads with k of .*; supported: a positive multiple"):
        fast(torch.randn(1, 4, 2, 8), torch.randn(1, 4, 3, 8))


def test_export_with_a_dynamic_length():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_attn_func(q, k, v, causal=True)

    def tensors(length):
        return tuple(torch.randn(2, length, 2, 8) for _ in range(3))

    length = torch.export.Dim("length", min=2, max=512)
    program = torch.export.export(Attention(), tensors(8), dynamic_shapes=({1: length},) * 3)
    inputs = tensors(30)
    torch.testing.assert_close(program.module()(*inputs), flash_attn_func(*inputs, causal=True))


# Autograd


@pytest.mark.parametrize("deterministic", [False, True])
def test_double_backward_is_refused_by_name(deterministic):
    q, k, v = (torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(3))
    out = flash_attn_func(q, k, v, deterministic=deterministic)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward: .*tandem_attn::backward"):
        grad.sum().backward()


def test_gradients_of_some_inputs_only():
    q, k, v = (torch.randn(1, 4, 2, 8) for _ in range(3))
    k.requires_grad_()
    flash_attn_func(q, k, v).sum().backward()
    assert q.grad is None and v.grad is None and k.grad.shape == k.shape


def test_no_graph_without_need():
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    with torch.no_grad():
        assert not flash_attn_func(q, q, q).requires_grad
    assert flash_attn_func(q, q, q).requires_grad
    assert not flash_attn_func(q.detach(), q.detach(), q.detach()).requires_grad


def test_both_roads_give_the_same_bits():
    """The short cut and the operator run the same plan."""
    case = Case(batch=2, seqlen_q=33, seqlen_k=33, causal=True, dtype=F32)
    inputs = make(case)
    short = run(case, inputs)
    inputs.q.requires_grad_()
    for a, b in zip(short, run(case, inputs), strict=True):
        assert torch.equal(a, b) and b.requires_grad


def test_non_contiguous_output_gradients():
    leaves = [torch.randn(2, 9, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    dout = torch.randn(2, 4, 9, 8, dtype=torch.float64).transpose(1, 2)
    out = flash_attn_func(*leaves, causal=True)
    expected = torch.autograd.grad(out, leaves, dout.contiguous(), retain_graph=True)
    for a, b in zip(torch.autograd.grad(out, leaves, dout), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", CASES[:6], ids=lambda c: c.id)
def test_gradients_with_stride_0(case):
    """What comes of out.sum() and lse.sum(), against the same numbers in memory of their own."""
    inputs = make(case)
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    answers = run(case, type(inputs)(*leaves, inputs.kwargs, inputs.slices))
    for outputs in (answers[:1], answers):
        ones = [torch.ones_like(x) for x in outputs]
        views = [x.new_ones(()).expand_as(x) for x in outputs]
        wanted = torch.autograd.grad(outputs, leaves, ones, retain_graph=True)
        for a, b in zip(torch.autograd.grad(outputs, leaves, views, retain_graph=True), wanted, strict=True):
            assert torch.equal(a, b) and torch.count_nonzero(a) > 0


def test_forward_mode_is_refused_not_dropped():
    q = torch.randn(1, 4, 2, 8)
    with forward_ad.dual_level():
        assert flash_attn_func(q, q, q).shape == q.shape
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="v is a forward-mode dual"):
            flash_attn_func(q, q, dual)


def test_activation_checkpointing():
    leaves = [torch.randn(1, 9, 2, 8, requires_grad=True) for _ in range(3)]
    expected = torch.autograd.grad(flash_attn_func(*leaves).sum(), leaves)
    out = torch.utils.checkpoint.checkpoint(flash_attn_func, *leaves, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_as_for_sdpa(dtype):
    q, k, v = (torch.randn(1, 9, 2, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype=dtype):
        out = flash_attn_func(q, k, v)
        assert (
            torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).dtype
            == dtype
        )
        assert flash_attn_func(q.double(), k.double(), v.double()).dtype == torch.float64
    assert out.dtype == dtype
    out.float().sum().backward()
    assert q.grad.dtype == F32


# Gradients that repeat bit for bit


def packed_once(q, k, v, **options):
    """Each batch element as a packed sequence."""
    starts = torch.arange(q.shape[0] + 1, dtype=torch.int32) * q.shape[1]
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    return flash_attn_varlen_func(*flat, starts, starts, q.shape[1], q.shape[1], **options)


def qkvpacked(q, k, v, **options):
    return flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), **options)


FUNCTIONS = [flash_attn_func, packed_once, qkvpacked]


def leaves_of(*shape):
    return [torch.randn(*(shape or (2, 6, 4, 8)), requires_grad=True) for _ in range(3)]


@pytest.fixture
def asked(monkeypatch):
    """Specs for which backward plans are made. The reference answers."""
    seen = []

    class Backend:
        NAME, describe, forward = "recorder", str, staticmethod(reference.forward)

        @staticmethod
        def backward(spec):
            seen.append(spec)
            return reference.backward(spec)

    monkeypatch.setattr(dispatch, "backend_for", lambda spec, requested=None: Backend)
    return seen


@pytest.fixture
def torch_mode():
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_deterministic_reaches_the_backward_plan(function, asked):
    leaves = leaves_of()
    for given in ({}, {"deterministic": False}, {"deterministic": True}):
        for _ in range(2):
            torch.autograd.grad(function(*leaves, **given).sum(), leaves)
    assert [spec.deterministic for spec in asked] == [False, True]


MODES = {"off": (False, False), "warn": (True, True), "error": (True, False)}


@pytest.mark.parametrize("before", MODES)
def test_the_mode_of_torch_counts_when_the_backward_runs(before, asked, torch_mode):
    leaves = leaves_of()
    for mode, warn_only in MODES.values():
        torch_mode(MODES[before][0], warn_only=MODES[before][1])
        out = flash_attn_func(*leaves)
        torch_mode(mode, warn_only=warn_only)
        torch.autograd.grad(out.sum(), leaves)
    # a plan for each: a backend may decide by the mode
    assert [spec.deterministic for spec in asked] == [False, True, True]


def test_the_mode_of_torch_counts_when_a_compiled_backward_runs(asked, torch_mode):
    """Torch refuses to turn the mode on between the two; turning it off has an effect."""
    fast, _ = compiled(flash_attn_func)
    leaves = leaves_of()
    torch_mode(True)
    outs = [fast(*leaves).sum() for _ in range(2)]
    torch.autograd.grad(outs[0], leaves)
    torch_mode(False)
    torch.autograd.grad(outs[1], leaves)
    assert [spec.deterministic for spec in asked] == [True, False]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_deterministic_changes_no_bit_on_a_cpu(case, torch_mode):
    def gradients(deterministic):
        inputs = make(case)
        leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        inputs.kwargs["deterministic"] = deterministic
        out, lse = run(case, type(inputs)(*leaves, inputs.kwargs, inputs.slices))
        torch.manual_seed(1)
        return torch.autograd.grad((out, lse), leaves, (torch.randn_like(out), torch.randn_like(lse)))

    plain, asked_for = gradients(False), gradients(True)
    torch_mode(True)
    for a, b, c in zip(plain, asked_for, gradients(False), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


# Remembered plans


def stub(monkeypatch, seen):
    class Backend:
        NAME, describe, reasons = "stub", str, staticmethod(lambda spec: [])

        @staticmethod
        def forward(spec):
            seen.append(spec)
            answer = (torch.zeros(()), torch.zeros(()))
            return lambda *_: answer

        @staticmethod
        def backward(spec):
            return lambda *_: None

    monkeypatch.setattr(dispatch, "backend_for", lambda spec, requested=None: Backend)


def test_a_question_is_decided_once(monkeypatch):
    seen = []
    stub(monkeypatch, seen)
    q, k = torch.randn(2, 8, 4, 16), torch.randn(2, 8, 2, 16)
    for _ in range(3):
        flash_attn_func(q, k, k)
        flash_attn_func(q.clone(), k.clone(), k.clone())
    assert len(seen) == 1


def test_every_difference_is_a_new_question(monkeypatch):
    """A key that misses an argument would answer one question with another's plan."""
    seen = []
    stub(monkeypatch, seen)
    q, k = torch.randn(2, 8, 4, 16), torch.randn(2, 8, 2, 16)
    shifted = torch.empty(q.numel() + 1)[1:].view(q.shape)
    strided = torch.randn(2, 4, 8, 16).transpose(1, 2)
    calls = [
        ((q, k, k), {}),
        ((q[:1], k[:1], k[:1]), {}),
        ((q[:, :5], k, k), {}),
        ((q, k[:, :5], k[:, :5]), {}),
        ((q, k, torch.randn(2, 8, 2, 8)), {}),
        ((q[:, :, :2], k, k), {}),
        ((strided, k, k), {}),
        ((shifted, k, k), {}),
        ((q, k.transpose(0, 1).contiguous().transpose(0, 1), k), {}),
        ((q, k, k.transpose(0, 1).contiguous().transpose(0, 1)), {}),
        ((q.half(), k.half(), k.half()), {}),
        ((q.double(), k.double(), k.double()), {}),
    ]
    options = [{"causal": True}, {"window_size": (2, 0)}, {"window_size": (0, 2)}, {"softcap": 2.0}]
    options += [{"softmax_scale": 0.5}, {"softmax_scale": 0.25001}, {"sm_margin": 1}, {"deterministic": True}]
    calls += [((q, k, k), o) for o in options]
    for tensors, given in calls:
        before = len(seen)
        flash_attn_func(*tensors, **given)
        assert len(seen) == before + 1, given
    assert len(set(seen)) == len(calls)


def test_a_backward_question_is_decided_once(monkeypatch, asked):
    made = []
    monkeypatch.setattr(ops, "attention_spec", lambda *args: made.append(1) or attention_spec(*args))
    for _ in range(3):
        leaves = leaves_of()
        torch.autograd.grad(flash_attn_func(*leaves, causal=True).sum(), leaves)
        torch.autograd.grad(packed_once(*leaves, softcap=2.0).sum(), leaves)
    assert len(asked) == 2 and len(made) == 4, "a spec for each forward and each backward"


def test_every_difference_of_packed_lengths_is_a_new_question(monkeypatch):
    seen = []
    stub(monkeypatch, seen)
    q, starts = torch.randn(8, 4, 16), torch.tensor([0, 3, 8], dtype=torch.int32)
    used = torch.tensor([1, 2], dtype=torch.int32)
    base = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 5, "max_seqlen_k": 5}
    more = [{}, {"max_seqlen_q": 6}, {"max_seqlen_k": 6}, {"seqused_q": used}, {"seqused_k": used}]
    for given in more:
        flash_attn_varlen_func(q, q, q, **(base | given))
        flash_attn_varlen_func(q, q, q, **(base | given))
    assert len(seen) == len(set(seen)) == len(more)


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(ops, "MAX_PLANS", 5)
    for length in range(1, 12):
        q = torch.randn(1, length, 1, 8, requires_grad=True)
        flash_attn_func(q, q, q).sum().backward()
    assert len(ops._forward_plans) == 5 and len(ops._backward_plans) == 5


@pytest.mark.plain_empty
def test_host_time_of_a_call(monkeypatch):
    """Everything but the plan, autograd off: 4.7 us dense, 7 us packed on two shared cores (2026-11-24)."""
    stub(monkeypatch, [])
    monkeypatch.setattr(ops, "check_contents", lambda *_: None)  # a GPU call does not look into lengths
    q, starts = torch.randn(1, 64, 8, 64), torch.tensor([0, 64], dtype=torch.int32)

    def microseconds(call):
        return min(timeit.repeat(call, number=2000, repeat=7)) / 2000 * 1e6

    assert microseconds(lambda: flash_attn_func(q, q, q, causal=True)) < 15
    x = q[0]
    assert microseconds(lambda: flash_attn_varlen_func(x, x, x, starts, starts, 64, 64, causal=True)) < 20


@pytest.mark.plain_empty
def test_host_time_of_a_backward(monkeypatch):
    """The operator behind PyTorch's dispatcher, all but the plan: 4.5 us dense, 7 us packed (2026-11-25)."""
    stub(monkeypatch, [])
    q, starts = torch.randn(1, 64, 8, 64), torch.tensor([0, 64], dtype=torch.int32)
    x, options = q[0], (None, -1, 0, 0.0, 0, False)
    dense = (q, q, q, *(None,) * len(Lengths._fields), *options)
    packed = (x, x, x, starts, starts, None, None, 64, 64, *options)
    for arguments, limit in ((dense, 15), (packed, 20)):
        times = timeit.repeat(
            lambda a=arguments: ops._backward_impl(x, None, x, x, *a), number=2000, repeat=7
        )
        assert min(times) / 2000 * 1e6 < limit
