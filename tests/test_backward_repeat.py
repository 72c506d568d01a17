"""The same gradients every time: bits over repeats, streams, threads, graphs, devices, and a whole training.

dk and dv repeat always, dq where that is asked for, by keyword or by torch's own switch. A race between
warpgroups shows as a bit that differs once in a thousand runs.
"""

import concurrent.futures
import contextlib
import dataclasses
import math

import backward_cases as cases
import pytest
import torch
from backward_cases import (
    assert_close,
    assert_right,
    assert_same_bits,
    attended,
    backward_of,
    gradients,
    upstream,
)
from gpu_cases import CAUSAL, SOME, TILES, WINDOW, dense, name, packed, seed_of
from test_forward_repeat import TIMES, Traffic, bits
from test_gpu_runtime import captured

from tandem_attn import ops
from tandem_attn.demo import model, text, train
from tandem_attn.testing import Inputs, make

pytestmark = pytest.mark.gpu
kernels = pytest.fixture(scope="session")(cases.compile_ahead)
hopper = pytest.fixture(cases.only_kernels)

MODES = ("any order", "keyword", "torch")  # of dq's sums; by which switch they repeat


@contextlib.contextmanager
def sums(mode: str, inputs: Inputs):
    """Within, gradients of `inputs` are computed in this mode; which of dq, dk and dv repeat."""
    inputs.kwargs["deterministic"] = mode == "keyword"
    torch.use_deterministic_algorithms(mode == "torch")
    try:
        yield slice(1 if mode == "any order" else 0, None)
    finally:
        torch.use_deterministic_algorithms(False)


def repeats(case, device, mode: str, times: int, traffic: Traffic | None = None) -> None:
    """Raise unless `times` backward passes give the bits of the first; that one is right."""
    inputs = make(case, device, seed=seed_of(case), poison=True)
    grads = upstream(case, inputs, seed_of(case))
    wrong = torch.zeros(3, dtype=torch.int64, device=device)
    kept: list = []
    with sums(mode, inputs) as repeated:
        leaves, results = attended(case, inputs)
        first = backward_of(leaves, results, grads, retain_graph=True)
    assert_right(case, inputs, first, grads)
    for i in range(times):
        if traffic:
            traffic.add(i)
        with sums(mode, inputs):
            found = backward_of(leaves, results, grads, retain_graph=True)
        kept = [*kept, found] if i % 7 else [found]  # other addresses for the next results
        for count, x, y in zip(wrong[repeated], found[repeated], first[repeated], strict=True):
            count += (bits(x) != bits(y)).any()
    assert not wrong.any(), f"of {times} dq, dk and dv, {wrong.tolist()} differ from the first"
    assert_close(found, first)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", cases.REPEATS, ids=name)
def test_a_thousand_times_the_same_bits(hopper, case, mode):
    if hopper.type == "cpu":
        case = dataclasses.replace(case, batch=1, seqlen_q=150, seqlen_k=170) if not case.varlen else case
    repeats(case, hopper, mode, TIMES if hopper.type == "cuda" else 3, Traffic(hopper))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", cases.REPEATED_GRID, ids=name)
def test_thirty_times_the_same_bits(hopper, case, mode):
    repeats(case, hopper, mode, 30 if hopper.type == "cuda" else 1)


def test_repeatable_gradients_are_the_others_in_another_order(hopper):
    for dims in TILES:
        case = dense((700, 900), dims, (4, 2), **CAUSAL)
        inputs = make(case, hopper)
        dout, dlse = upstream(case, inputs)
        anyhow = gradients(case, inputs, dout, dlse)
        assert_close(anyhow, gradients(case, inputs, dout, dlse, deterministic=True))


def test_switches_are_looked_at_on_every_call(hopper):
    """A plan that was made before torch's switch was set may not outlive it, nor the reverse."""
    case = dense((2000, 2000) if hopper.type == "cuda" else (200, 200), (128, 128), (8, 8), batch=2)
    inputs = make(case, hopper)
    grads = (upstream(case, inputs)[0], None)
    found: dict = {mode: [] for mode in MODES}
    for _ in range(20 if hopper.type == "cuda" else 2):
        for mode in MODES:
            with sums(mode, inputs):
                found[mode].append(gradients(case, inputs, *grads))
    for mode in ("keyword", "torch"):
        for other in found[mode]:
            assert_same_bits(other, found["keyword"][0])
    for other in found["any order"]:
        assert_same_bits(other[1:], found["any order"][0][1:])


@pytest.mark.parametrize("case", [*cases.REPEATS[::2], cases.REPEATS[-1]], ids=name)
def test_multiprocessors_left_idle_change_nothing(hopper, case):
    if hopper.type == "cpu" and not case.varlen:
        case = dataclasses.replace(case, batch=1, seqlen_q=150, seqlen_k=170)
    inputs = make(case, hopper, poison=True)
    dout, dlse = upstream(case, inputs)
    expected = gradients(case, inputs, dout, dlse)
    for margin in (1, 17, 100, 131, 5000):
        assert_close(gradients(case, inputs, dout, dlse, sm_margin=margin), expected)


# Streams and threads


def on_a_stream(device, stream=None):
    """A context: that stream, or a new one; on a CPU nothing."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.cuda.stream(stream or torch.cuda.Stream())


def synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


STREAMED = [dense((300, 300), dims, (4, 2), **CAUSAL) for dims in ((64, 64), (128, 128), (256, 256))]
STREAMED += [packed(SOME, **CAUSAL)]


@pytest.mark.parametrize("case", STREAMED, ids=name)
def test_the_current_stream_is_used(hopper, case):
    """Inputs, and then dout, are NaN until a stream that starts late has filled them; nothing waits."""
    inputs = make(case, hopper)
    grads = upstream(case, inputs, poison=False)
    expected = gradients(case, inputs, *grads, deterministic=True)
    sources = [inputs.q, inputs.k, inputs.v, *grads]
    late = [torch.full_like(x, math.nan) for x in sources]
    synchronize(hopper)
    kwargs = inputs.kwargs | {"deterministic": True}
    with on_a_stream(hopper):
        if hopper.type == "cuda":
            torch.cuda._sleep(100_000_000)  # cycles, about 50 ms
        for x, y in zip(late[:3], sources[:3], strict=True):
            x.copy_(y)
        leaves, results = attended(case, Inputs(*late[:3], kwargs, inputs.slices))
        for x, y in zip(late[3:], sources[3:], strict=True):
            x.copy_(y)
        found = backward_of(leaves, results, late[3:])
        assert hopper.type == "cpu" or not torch.cuda.current_stream().query(), "something waited"
    synchronize(hopper)
    assert_same_bits(found, expected)


def test_nothing_waits_for_the_device(hopper):
    questions = [(case, make(case, hopper)) for case in STREAMED]
    for mode in ("default", "error"):
        if hopper.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)
        try:
            for case, inputs in questions:
                for scale in (0.1, 0.2) if mode == "error" else (None,):  # known and new questions
                    for deterministic in (False, True):
                        changes = dict(softmax_scale=scale, deterministic=deterministic)
                        gradients(case, inputs, torch.ones_like(inputs.q), **changes)
        finally:
            if hopper.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def test_streams_and_threads_do_not_meet(hopper):
    """Eight threads, each on a stream of its own, with questions of their own: no workspace is shared."""
    chosen = [*STREAMED, *(dataclasses.replace(case, causal=False, window=(50, 3)) for case in STREAMED)]
    questions = []
    for i, case in enumerate(chosen):
        inputs = make(case, hopper, seed=i)
        inputs.kwargs["deterministic"] = i % 3 > 0
        questions.append((case, inputs, upstream(case, inputs, seed=i)))
    expected = [gradients(case, inputs, *grads) for case, inputs, grads in questions]
    synchronize(hopper)

    def work(i: int) -> list:
        case, inputs, grads = questions[i]
        with on_a_stream(hopper):
            found = [gradients(case, inputs, *grads) for _ in range(20 if hopper.type == "cuda" else 2)]
            if hopper.type == "cuda":
                torch.cuda.current_stream().synchronize()
        return found

    with concurrent.futures.ThreadPoolExecutor(len(questions)) as pool:
        for i, found in enumerate(pool.map(work, range(len(questions)))):
            repeated = slice(0 if i % 3 else 1, None)
            for one in found:
                assert_same_bits(one[repeated], expected[i][repeated])
                assert_close(one, expected[i])


# CUDA graphs


class Again:
    """In place of a graph, where there are none."""

    def __init__(self, call):
        self.call, self.results = call, call()

    def replay(self) -> None:
        for old, new in zip(self.results, self.call(), strict=True):
            old.copy_(new)


def captured_on(device, call):
    """(graph, what the call returned into it)."""
    if device.type == "cuda":
        return captured(call)
    again = Again(call)
    return again, again.results


def step(case, inputs: Inputs, grads):
    """A call that runs forward and backward: out, lse, dq, dk, dv."""

    def call():
        leaves, results = attended(case, inputs)
        found = backward_of(leaves, results, grads)
        return *(x.detach() for x in results), *found

    return call


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("dims", TILES, ids=str)
def test_graph_with_new_numbers(hopper, dims, deterministic):
    case = dense((300, 333), dims, (4, 2), batch=2, **CAUSAL)
    inputs = make(case, hopper, seed=1)
    inputs.kwargs["deterministic"] = deterministic
    grads = upstream(case, inputs, poison=False)
    graph, results = captured_on(hopper, step(case, inputs, grads))
    for seed in (2, 3, 4):
        other = make(case, hopper, seed=seed)
        new = [other.q, other.k, other.v, *upstream(case, other, seed, poison=False)]
        for x, y in zip((inputs.q, inputs.k, inputs.v, *grads), new, strict=True):
            x.copy_(y)
        for x in results:
            x.fill_(math.nan)
        graph.replay()
        expected = gradients(case, other, *new[3:], deterministic=deterministic)
        assert_close(results[2:], expected)
        assert_same_bits(results[2 if deterministic else 3 :], expected[0 if deterministic else 1 :])


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_graph_with_new_lengths(hopper, dim, deterministic):
    """Lengths are read on the GPU, by each replay: shorter ones, longer ones, none at all."""
    room, batch = 700, 5
    q, k, v = (torch.randn(room, h, dim, device=hopper).to(torch.bfloat16) for h in (4, 2, 2))
    starts = [torch.zeros(batch + 1, dtype=torch.int32, device=hopper) for _ in "qk"]
    kwargs = {
        "cu_seqlens_q": starts[0],
        "cu_seqlens_k": starts[1],
        "max_seqlen_q": room,
        "max_seqlen_k": room,
    }
    inputs = Inputs(q, k, v, kwargs | {"causal": True, "deterministic": deterministic}, [])
    grads = torch.randn_like(q), torch.randn(4, room, device=hopper)
    some = packed(((1,), (1,)), (dim, dim), **CAUSAL)
    graph, results = captured_on(hopper, step(some, inputs, grads))
    for lengths in (
        ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0)),
        ((700, 0, 0, 0, 0), (0, 0, 0, 0, 700)),
        ((100, 0, 350, 1, 249), (120, 3, 300, 0, 277)),
        ((0, 1, 1, 1, 1), (9, 100, 200, 300, 0)),
        ((140,) * 5, (128,) * 5),
    ):
        case = packed(lengths, (dim, dim), **CAUSAL)
        given = make(case, hopper)
        for x, y in zip(starts, ("cu_seqlens_q", "cu_seqlens_k"), strict=True):
            x.copy_(given.kwargs[y])
        for x in results:
            x.fill_(math.nan)
        graph.replay()
        question = Inputs(q, k, v, inputs.kwargs, given.slices)
        assert_right(case, question, [x.clone() for x in results[2:]], grads)
        assert_close(results[2:], gradients(case, question, *grads))


# Devices


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("case", STREAMED, ids=name)
def test_tensors_on_another_device_than_the_current(hopper, case):
    for deterministic in (False, True):
        found = []
        for i in (0, 1):
            inputs = make(case, torch.device("cuda", i))
            found.append(gradients(case, inputs, *upstream(case, inputs), deterministic=deterministic))
            assert all(x.device.index == i for x in found[-1]) and torch.cuda.current_device() == 0
        there = [x.to(found[0][0].device) for x in found[1]]
        assert_same_bits(there[0 if deterministic else 1 :], found[0][0 if deterministic else 1 :])


# What is remembered, and under which key


def test_no_question_gets_the_plan_of_another(hopper):
    """A, B, A with one difference at a time, against gradients from nothing remembered."""
    base = dense((200, 333), (128, 128), (4, 2), batch=2)
    changes = [
        *({}, CAUSAL, WINDOW, {"window": (100, 38)}, {"softcap": 2.0}, {"softcap": 3.0}, {"kv_heads": 4}),
        *({"heads": 6}, {"batch": 3}, {"seqlen_q": 201}, {"seqlen_k": 334}, {"seqlen_k": 384}),
        *({"head_dim": 112, "head_dim_v": 112}, {"head_dim": 192}, {"layout": "bhsd"}),
        {"dtype": torch.float16},
    ]
    questions = []
    for change in changes:
        case = dataclasses.replace(base, **change)
        questions.append((case, make(case, hopper)))
    for scale in (0.03, 0.5):
        questions.append((base, make(base, hopper)))
        questions[-1][1].kwargs["softmax_scale"] = scale
    expected = []
    for case, inputs in questions:
        ops.clear_plans()
        grads = upstream(case, inputs)
        expected.append((grads, gradients(case, inputs, *grads, deterministic=True)))
        assert_right(case, inputs, expected[-1][1], grads)
    ops.clear_plans()
    for i in range(1, len(questions)):
        for j in (0, i, 0):
            grads, wanted = expected[j]
            assert_same_bits(gradients(*questions[j], *grads, deterministic=True), wanted)
            for some in ((grads[0], None), (None, grads[1])):  # a plan also serves without one of them
                gradients(*questions[j], *some, deterministic=True)


# A training


class Silent:
    """In place of display.Progress."""

    def line(self, *_):
        pass

    advance = line


def test_training_follows_the_curve_of_torch(hopper):
    """Two layers of head_dim 64, bfloat16 by autocast: the same losses as with torch's attention."""
    recipe = dataclasses.replace(train.GPU_QUICK, steps=200)
    if hopper.type == "cpu":
        shape = model.Shape(2, 32, 2, 1, 8, 32)
        recipe = dataclasses.replace(train.QUICK, shape=shape, batch=4, steps=30, held_out=4)
    tokens = text.load(None, recipe.shape.context).to(hopper)
    ours, torchs = (
        model.Transformer(recipe.shape, attend, seed=0).to(hopper) for attend in (model.tandem, model.sdpa)
    )
    batch = text.even_windows(tokens.held_out, recipe.batch, recipe.shape.context)
    assert train.gradient_difference(ours, torchs, *batch) < recipe.gradients
    one, other = (train.train(x, tokens, recipe, 0, Silent()) for x in (ours, torchs))
    assert len(one.losses) == recipe.steps
    assert max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)) < recipe.apart
    assert one.recent < one.losses[0] - (0.3 if hopper.type == "cpu" else 1.5)
