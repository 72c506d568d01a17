"""How a call behaves on a GPU: streams, graphs, devices, waiting, cache keys, torch.compile, gradients."""

import math
import time

import pytest
import torch
from gpu_cases import (
    ALL,
    BF16,
    CAUSAL,
    FP16,
    SOME,
    answer,
    assert_same_bits,
    declared,
    dense,
    distinct_kernels,
    kernel_of,
    name,
    packed,
)

from tandem_attn import flash_attn_func, flash_attn_varlen_func, ops
from tandem_attn.spec import Lengths
from tandem_attn.testing import Case, Inputs, assert_right, assert_within_budget, make, run
from tandem_attn.testing.budget import explicit_mask

gpu = pytest.mark.gpu


@pytest.fixture
def cuda(kernels, backend) -> torch.device:
    """The GPU, answered by the Hopper kernels; nothing here can be rehearsed on a CPU."""
    backend("gluon")
    return torch.device("cuda")


@pytest.fixture
def compiled(monkeypatch) -> list:
    """One entry for each kernel that Triton compiles or finds on disk from now on."""
    triton = pytest.importorskip("triton")
    seen = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **facts: seen.append(facts))
    return seen


# Streams


@gpu
def test_the_current_stream_is_used(cuda):
    """Inputs are NaN until a stream that starts late has filled them."""
    for case in (dense((300, 300), **CAUSAL), packed(SOME, **CAUSAL)):
        inputs = make(case, cuda)
        expected = answer(case, inputs)
        late = [torch.full_like(x, math.nan) for x in (inputs.q, inputs.k, inputs.v)]
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # cycles, about 50 ms
            for x, y in zip(late, (inputs.q, inputs.k, inputs.v), strict=True):
                x.copy_(y)
            found = run(case, Inputs(*late, inputs.kwargs, inputs.slices))
            assert not stream.query(), "the call waited for the device"
        stream.synchronize()
        assert_same_bits(case, inputs, expected, found)


@gpu
def test_nothing_waits_for_the_device(cuda):
    cases = [dense((300, 300), **CAUSAL), packed(SOME, **CAUSAL)]
    questions = [(case, make(case, cuda)) for case in cases]
    for question in questions:
        run(*question)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for case, inputs in questions:
            for scale in (None, 0.1, 0.2):  # known and new questions
                inputs.kwargs["softmax_scale"] = scale
                run(case, inputs)
                leaf = inputs.q.detach().requires_grad_()
                run(case, Inputs(leaf, inputs.k, inputs.v, inputs.kwargs, inputs.slices))
    finally:
        torch.cuda.set_sync_debug_mode("default")


# CUDA graphs


def captured(call):
    """(graph, what the call returned into it)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@gpu
@pytest.mark.parametrize("dims", [(64, 64), (128, 128)], ids=str)
def test_graph_with_new_numbers(cuda, dims):
    case = dense((300, 333), dims, (4, 2), batch=2, **CAUSAL)
    inputs = make(case, cuda, seed=1)
    graph, results = captured(lambda: run(case, inputs))
    for seed in (2, 3, 4):
        other = make(case, cuda, seed=seed)
        for x, y in ((inputs.q, other.q), (inputs.k, other.k), (inputs.v, other.v)):
            x.copy_(y)
        for x in results:
            x.fill_(math.nan)
        graph.replay()
        assert_same_bits(case, inputs, answer(case, other), results)


@gpu
def test_graph_with_new_lengths(cuda):
    """Lengths are read on the GPU, by each replay: shorter ones, longer ones, none at all."""
    room, batch = 700, 5
    q, k, v = (torch.randn(room, h, 128, device=cuda, dtype=BF16) for h in (4, 2, 2))
    starts_q, starts_k = (torch.zeros(batch + 1, dtype=torch.int32, device=cuda) for _ in "qk")
    kwargs = dict(
        cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, max_seqlen_q=room, max_seqlen_k=room, causal=True
    )
    inputs = Inputs(q, k, v, kwargs, [])
    some = packed(((1,), (1,)), **CAUSAL)
    graph, results = captured(lambda: run(some, inputs))
    for lengths_q, lengths_k in (
        ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0)),
        ((700, 0, 0, 0, 0), (0, 0, 0, 0, 700)),
        ((100, 0, 350, 1, 249), (120, 3, 300, 0, 277)),
        ((0, 1, 1, 1, 1), (9, 100, 200, 300, 0)),
        ((140,) * 5, (128,) * 5),
    ):
        case = packed((lengths_q, lengths_k), **CAUSAL)
        given = make(case, cuda)
        starts_q.copy_(given.kwargs["cu_seqlens_q"])
        starts_k.copy_(given.kwargs["cu_seqlens_k"])
        for x in results:
            x.fill_(math.nan)
        graph.replay()
        eager = run(case, inputs)
        question = Inputs(q, k, v, kwargs, given.slices)
        assert_same_bits(case, question, eager, results)
        assert not any(x.isnan().any() for pair in declared(case, question, *results) for x in pair)


# Devices


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_on_another_device_than_the_current(cuda):
    for case in (dense((300, 300), **CAUSAL), packed(SOME, **CAUSAL)):
        here, there = (make(case, torch.device("cuda", i)) for i in (0, 1))
        for _ in range(2):
            for one, other in zip(answer(case, here), answer(case, there), strict=True):
                assert other.device.index == 1 and torch.cuda.current_device() == 0
                assert torch.equal(one, other.to(one.device))


@gpu
def test_mixed_devices_are_named(cuda):
    q = torch.randn(1, 8, 2, 64, device=cuda, dtype=BF16)
    with pytest.raises(ValueError, match="k is on cpu; supported: the device of q, cuda:0"):
        flash_attn_func(q, q.cpu(), q)
    starts = torch.tensor([0, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_k is on cpu"):
        flash_attn_varlen_func(q[0], q[0], q[0], starts.to(cuda), starts, 8, 8)


# What is remembered, and under which key

_BASE = {"seqlen_q": 200, "seqlen_k": 333, "batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 128}
_CHANGES = [
    *({"causal": True}, {"window": (100, 37)}, {"window": (100, 38)}, {"softcap": 2.0}, {"softcap": 3.0}),
    *({"kv_heads": 4}, {"heads": 6}, {"batch": 3}, {"seqlen_q": 201}, {"seqlen_k": 334}, {"seqlen_k": 384}),
    *({"head_dim": 112}, {"head_dim_v": 72}, {"layout": "bhsd"}, {"layout": "expanded"}, {"dtype": FP16}),
]


@gpu
def test_no_question_gets_the_plan_of_another(cuda):
    """A, B, A with one difference at a time, against answers from nothing remembered."""
    cases = [Case(**(_BASE | change)) for change in ({}, *_CHANGES)]
    questions = [(case, make(case, cuda)) for case in cases]
    for scale in (0.03, 0.5):
        questions.append((cases[0], make(cases[0], cuda)))
        questions[-1][1].kwargs["softmax_scale"] = scale
    expected = []
    for case, inputs in questions:
        ops.clear_plans()
        expected.append(answer(case, inputs))
        assert_right(case, inputs, *expected[-1])
    ops.clear_plans()
    for i in range(1, len(questions)):
        for j in (0, i, 0):
            assert_same_bits(*questions[j], expected[j], answer(*questions[j]))


def test_every_kernel_has_a_key_of_its_own():
    """What Triton looks for on disk must tell apart whatever a kernel is compiled for."""
    pytest.importorskip("triton")
    from triton.experimental.gluon._runtime import GluonASTSource

    from tandem_attn.kernels.forward import attention_forward

    place = (attention_forward.arg_names.index("config"),)
    found: dict = {}
    for config in {kernel[0] for kernel in distinct_kernels()}:
        key = GluonASTSource(attention_forward, {"config": "constexpr"}, {place: config}).hash()
        assert key not in found, f"one key for two kernels:\n{config!r}\n{found[key]!r}"
        found[key] = config
    assert len(found) > 40


@gpu
def test_lengths_and_sizes_compile_nothing_new(cuda, compiled):
    run_all = [
        dense(lengths, (64, 64), (heads, 1), batch=batch, **mask)
        for mask in (CAUSAL, {"window": (5, 2)})
        for lengths, heads, batch in (
            ((9, 10), 1, 1),
            ((130, 257), 2, 3),
            ((600, 1000), 5, 1),
            ((65, 64), 16, 2),
        )
    ]
    run_all += [packed((n, n), (64, 64), (2, 1), **CAUSAL) for n in ((9,), (3, 0, 500), (7,) * 100)]
    first = {kernel_of(case): case for case in run_all}
    for case in first.values():
        answer(case, make(case, cuda))
    compiled.clear()
    for case in run_all:
        inputs = make(case, cuda)
        inputs.kwargs["softmax_scale"] = 0.2
        assert_right(case, inputs, *answer(case, inputs))
    assert not compiled


@gpu
def test_the_public_way_of_launching_gives_the_same_bits(cuda, monkeypatch):
    """Other Tritons than 3.6 hide the C function that launches."""
    from tandem_attn.kernels import launcher

    for case in (dense((300, 333), **CAUSAL), packed(SOME, (64, 64)), packed(SOME, used_k=SOME[1])):
        inputs = make(case, cuda)
        expected = answer(case, inputs)
        with monkeypatch.context() as patch:
            patch.setattr(launcher.KernelLauncher, "_find_c_launch", lambda self: None)
            ops.clear_plans()
            assert_same_bits(case, inputs, expected, answer(case, inputs))
        ops.clear_plans()


@gpu
def test_few_addresses_are_remembered(cuda, monkeypatch):
    from tandem_attn.kernels import launcher

    monkeypatch.setattr(launcher, "MAX_CACHED_ADDRESSES", 2)
    case = dense((130, 130), **CAUSAL)
    questions = [make(case, cuda, seed=i) for i in range(5)]
    for inputs in questions * 2:
        assert_right(case, inputs, *answer(case, inputs))
    (plan,) = (plan for plan, _ in ops._forward_plans.values())
    assert len(plan.maps) <= 2


@gpu
@pytest.mark.plain_empty
@pytest.mark.parametrize("case", [dense((64, 64), (64, 64)), packed(((64,), (64,)), (64, 64))], ids=name)
def test_host_time_of_a_call(cuda, case):
    """11 us on the H200 machine (2026-11-22), where Triton's own path takes 69."""
    inputs = make(case, cuda)
    best = math.inf
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(300):
            run(case, inputs)
        best = min(best, (time.perf_counter() - start) / 300)
    assert best < 40e-6, f"{best * 1e6:.1f} us a call"


# Gradients, operators, torch.compile

GRADIENTS = [
    dense((150, 203), (64, 64), (4, 2), batch=2, **CAUSAL),
    dense((200, 90), (128, 128), (2, 2), **CAUSAL),  # rows that see nothing
    dense((150, 203), (128, 128), (6, 2), window=(100, 37)),
    dense((150, 203), (128, 128), (2, 1), softcap=15.0, **CAUSAL),
    packed(SOME, (128, 128), **CAUSAL),
]


def plain(case: Case, q, k, v, scale: float):
    """(out, lse) of one sequence (rows, heads, dim) by differentiable operations; lse is 0 without keys."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = q.transpose(0, 1) @ k.mT * scale
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    mask = explicit_mask(torch.arange(q.shape[0], device=q.device), q.shape[0], k.shape[1], case.bounds)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    alive = mask.any(-1)
    out = (scores.softmax(-1) @ v * alive[:, None]).transpose(0, 1)
    return out, torch.where(alive, scores.logsumexp(-1), 0.0)


def gradients(case: Case, inputs: Inputs, douts, attend) -> tuple:
    """Gradients of q, k, v. `attend(leaves)`: out and lse of each sequence; `douts`: their gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    total = torch.zeros((), dtype=torch.float64, device=inputs.q.device)
    for (out, lse), (dout, dlse) in zip(attend(leaves), douts, strict=True):
        total = total + (out * dout.to(out.dtype)).sum() + (lse * dlse.to(lse.dtype)).sum()
    return torch.autograd.grad(total, leaves)


@gpu
@pytest.mark.parametrize("case", GRADIENTS, ids=name)
def test_gradients_within_budget(device, case):
    """The forward is the Hopper kernel's, the backward the reference's."""
    inputs = make(case, device, seed=3)
    without_gradient = answer(case, inputs)

    def ours(leaves):
        out, lse = run(case, Inputs(*leaves, inputs.kwargs, inputs.slices))
        assert_same_bits(case, inputs, without_gradient, (out.detach(), lse.detach()))
        return declared(case, inputs, out, lse.masked_fill(lse == -math.inf, 0.0))

    def by_hand(dtype):
        def attend(leaves):
            wide = Inputs(*(x.to(dtype) for x in leaves), inputs.kwargs, inputs.slices)
            return [plain(case, *sequence, inputs.scale) for sequence in wide.sequences()]

        return attend

    douts = [
        (torch.randn_like(out), torch.randn_like(lse))
        for out, lse in declared(case, inputs, *without_gradient)
    ]
    exact = Inputs(*(x.double() for x in (inputs.q, inputs.k, inputs.v)), inputs.kwargs, inputs.slices)
    wanted = gradients(case, exact, douts, by_hand(torch.float64))
    low = gradients(case, inputs, douts, by_hand(case.dtype))
    for what, got, want, other in zip("qkv", gradients(case, inputs, douts, ours), wanted, low, strict=True):
        assert_within_budget(got, want, other, f"{name(case)} d{what}")


@gpu
@pytest.mark.parametrize("case", [GRADIENTS[0], packed(SOME, **CAUSAL)], ids=name)
def test_opcheck(cuda, case):
    inputs = make(case, cuda)
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    lengths = [inputs.kwargs.get(name) for name in Lengths._fields]
    arguments = (*leaves, *lengths, None, *case.bounds, case.softcap, 0, False)
    torch.library.opcheck(torch.ops.tandem_attn.forward.default, arguments)


@gpu
def test_compiled_whole(cuda):
    torch._dynamo.reset()

    def attend(q, k, v):
        return flash_attn_func(q, k, v, causal=True, return_attn_probs=True)

    fast = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (130, 257, 64):
        q, k, v = (
            torch.randn(2, length, 4, 64, device=cuda, dtype=BF16, requires_grad=True) for _ in range(3)
        )
        expected, found = attend(q, k, v), fast(q, k, v)
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b)
        wanted, got = (torch.autograd.grad(x[0].float().square().sum(), (q, k, v)) for x in (expected, found))
        for a, b in zip(wanted, got, strict=True):
            torch.testing.assert_close(a, b)


@gpu
def test_autocast_and_inference_mode(cuda):
    q, k, v = (torch.randn(1, 130, 2, 64, device=cuda) for _ in range(3))
    expected = flash_attn_func(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True)
    with torch.autocast("cuda", dtype=BF16):
        assert torch.equal(flash_attn_func(q, k, v, causal=True), expected)
    with torch.inference_mode():
        assert torch.equal(flash_attn_func(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True), expected)


# Lengths that are wrong


@gpu
def test_wrong_lengths_are_reported_on_request(cuda, monkeypatch):
    monkeypatch.setenv("TANDEM_VALIDATE", "1")
    q = torch.randn(100, 2, 64, device=cuda, dtype=BF16)
    starts, beyond = (torch.tensor([0, n], dtype=torch.int32, device=cuda) for n in (100, 101))
    flash_attn_varlen_func(q, q, q, starts, starts, 100, 100)
    with pytest.raises(
        ValueError, match="cu_seqlens_k is ending at 101; supported: at most the 100 rows of k"
    ):
        flash_attn_varlen_func(q, q, q, starts, beyond, 100, 100)
    with pytest.raises(ValueError, match="max_seqlen_q is 99"):
        flash_attn_varlen_func(q, q, q, starts, starts, 99, 100)


@gpu
def test_wrong_lengths_reach_no_other_memory(cuda):
    """Undefined, says the documentation; but a graph replayed with stale lengths should not fault or hang."""
    q, k, v = (torch.randn(300, h, 128, device=cuda, dtype=BF16) for h in (4, 2, 2))
    huge = 2**31 - 1
    for numbers in (
        [0, 10**6, 2 * 10**6],
        [-5, 150, 10**9],
        [200, 100, 0],
        [huge, huge, huge],
        [0, -huge, huge],
    ):
        wrong = torch.tensor(numbers, dtype=torch.int32, device=cuda)
        right = torch.tensor([0, 150, 300], dtype=torch.int32, device=cuda)
        for starts_q, starts_k in ((wrong, right), (right, wrong), (wrong, wrong)):
            flash_attn_varlen_func(q, k, v, starts_q, starts_k, 300, 300, causal=True)
    torch.cuda.synchronize()
    case = dense((130, 130), **CAUSAL)
    inputs = make(case, cuda)
    assert_right(case, inputs, *answer(case, inputs))


def test_cases_have_names_of_their_own():
    """Within a list; several lists hold the same case."""
    for cases in (GRADIENTS, ALL):
        distinct = set(cases)
        assert len({name(case) for case in distinct}) == len(distinct)
