"""The backward kernels themselves, their barriers and their numbers, run on the CPU by
testing/emulator_backward.py.

Random questions, configurations and orders of events. Each run must end (no deadlock), order every access to
shared memory (no race, whether or not it showed), keep inside its tensors, write dK and dV once, write each
chunk of dQ before anyone adds to it, and agree with float64 gradients. The second half breaks the kernels on
purpose: each fault must be noticed.
"""

import dataclasses
import itertools
import random
from unittest import mock

import numpy as np
import pytest
from backward_faults import CAUSAL, FAULTS, KINDS, NAMED

from tandem_attn.device.accumulate import WRITTEN
from tandem_attn.device.sequence import PADDING
from tandem_attn.kernels import launch_backward
from tandem_attn.kernels.config_backward import BackwardConfig
from tandem_attn.kernels.launch_backward import CHUNK, BackwardPlan
from tandem_attn.spec import Window
from tandem_attn.testing.emulator_backward import GlobalMemory, Launch, launch_by_keys, launch_by_queries
from tandem_attn.testing.plain import array
from tandem_attn.testing.shipped import question

WINDOWS = (Window(), CAUSAL, CAUSAL, Window(70, 0), Window(-1, 40), Window(90, 30))


@dataclasses.dataclass
class Problem:
    """A question with its numbers. Lists are by sequence."""

    plan: BackwardPlan
    memory: GlobalMemory | None
    rows: list  # (index of its q rows, index of its keys)
    padded: list  # for each head: the first padded row
    expected: list  # (dq, dk, dv)
    programs: int  # at a time


def strided(rng, shape, gap) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, their storage): random, in rows `gap` elements further apart than need be; NaN between."""
    *lead, heads, dim = shape
    row = heads * dim + gap
    storage = np.full(int(np.prod(lead)) * row, np.nan)
    strides = [row, dim, 1] if len(lead) == 1 else [lead[1] * row, row, dim, 1]
    x = np.lib.stride_tricks.as_strided(storage, shape, [8 * s for s in strides])
    x[...] = rng.standard_normal(shape)
    return x, storage


def vars_of(config: BackwardConfig) -> dict:
    """Its fields."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def make_plan(dice, spec, parts: int, kind=None, **fields) -> BackwardPlan:
    """As the library makes it, but with heads in so many parts, and with these fields of configurations."""
    plan = BackwardPlan(spec)
    plan.parts = parts
    kind = kind or type(plan.by_keys)
    plan.by_keys = kind(**vars_of(plan.by_keys) | {"partial": parts > 1} | fields)
    together = dict(ROWS_TOGETHER=dice.choice((1, 2, 16)), ORDERED_TILES=dice.choice((2, 6, 256)))
    with mock.patch.multiple(launch_backward, **together):
        plan.programs_by_keys, plan.numbers_by_keys = plan._numbers_by_keys()
    return plan


def make_lengths(dice, batch: int, longest: tuple[int, int]):
    """Packed sequences: (starts, used lengths or None, rows with those that belong to nobody) of q and k."""
    made = []
    for n in longest:
        lengths = [dice.choice((0, 1, n // 2, n)) for _ in range(batch - 1)] + [n]
        starts = np.cumsum([0, *lengths])
        used = np.array([dice.randint(0, m) for m in lengths]) if dice.random() < 0.3 else None
        made.append((starts, used, int(starts[-1]) + dice.randint(0, 9)))
    return zip(*made, strict=True)


def make_problem(seed: int, **fixed) -> Problem:
    """Everything by the seed. `fixed`: fields of the configuration, or of the problem."""
    dice, rng = random.Random(seed), np.random.default_rng(seed)
    varlen = fixed.pop("varlen", dice.random() < 0.4)
    window = fixed.pop("window", dice.choice(WINDOWS))
    batch, kv_heads, group = fixed.pop("heads", dice.choice(((1, 1, 4), (1, 2, 2), (2, 2, 1), (3, 1, 2))))
    dims = fixed.pop("dims", (dice.choice((40, 64, 72, 128)),) * 2)
    longest = fixed.pop("seqlens", (dice.randint(1, 300), dice.choice((dice.randint(1, 400), 128, 256))))
    softcap = fixed.pop("softcap", dice.choice((0.0, 0.0, 2.0)))
    parts = fixed.pop("parts", dice.choice([n for n in (1, 1, 2, 4) if group % n == 0]))
    programs = fixed.pop("programs", dice.choice((1, 2, 3, 8)))
    if varlen:
        starts, used, totals = make_lengths(dice, batch, longest)
        ends = [s[:-1] + (np.diff(s) if u is None else u) for s, u in zip(starts, used, strict=True)]
        index = [[slice(*x) for x in zip(s[:-1], e, strict=True)] for s, e in zip(starts, ends, strict=True)]
        shapes = [(totals[0],), (totals[1],)]
    else:
        index, starts, used = [list(range(batch))] * 2, (None, None), (None, None)
        shapes = [(batch, n) for n in longest]
    gap = dice.choice((0, 8))
    heads = kv_heads * group, kv_heads, kv_heads, kv_heads * group
    wide = dims[0], dims[0], dims[1], dims[1]
    operands = {
        name: strided(rng, (*shapes[name in "kv"], h, d), gap)
        for name, h, d in zip(("q", "k", "v", "do"), heads, wide, strict=True)
    }
    spec = dataclasses.replace(
        question(*dims, *longest, window, varlen, softcap=softcap, batch=batch, num_heads=heads[0],
                 num_kv_heads=kv_heads),
        total_q=shapes[0][0] if varlen else batch * longest[0],
        total_k=shapes[1][0] if varlen else batch * longest[1],
        has_seqused_q=used[0] is not None,
        has_seqused_k=used[1] is not None,
        deterministic=fixed.pop("ordered", dice.random() < 0.4),
    )  # fmt: skip
    if max(dims) <= 128:
        fixed.setdefault("first_apart", dice.random() < 0.5)
        fixed.setdefault("packed_ds", dice.random() < 0.5)
    plan = make_plan(dice, spec, parts, **fixed)
    return fill(plan, operands, (*starts, *used), list(zip(*index, strict=True)), programs, rng)


def fill(plan: BackwardPlan, operands: dict, lengths: tuple, rows: list, programs: int, rng) -> Problem:
    """Numbers for a plan, and what should come of them."""
    spec = plan.spec
    statistics = np.full(2 * plan.stat_rows, np.nan)
    problem = Problem(plan, None, rows, [], [], programs)
    arrays = {name: x for name, (x, _) in operands.items()}
    if spec.varlen:
        for name, x in arrays.items():
            owned = np.zeros(len(x), bool)
            for pair in rows:
                owned[pair[name in "kv"]] = True
            x[~owned] = np.nan
    for b, (of_q, of_k) in enumerate(rows):
        q, do, k, v = arrays["q"][of_q], arrays["do"][of_q], arrays["k"][of_k], arrays["v"][of_k]
        gradients, lse, delta = expected_gradients(q, k, v, do, spec, rng)
        start = (of_q.start + b * PADDING.value) // PADDING.value * PADDING.value if spec.varlen else 0
        heads = np.arange(spec.num_heads) + (0 if spec.varlen else b * spec.num_heads)
        problem.padded.append([int(head) * plan.padded_rows + start for head in heads])
        problem.expected.append(gradients)
        rest = -len(q) % PADDING.value  # rows past the end, which weigh nothing
        for head, place in enumerate(problem.padded[-1]):
            for start, x, past in ((0, lse, np.inf), (plan.stat_rows, delta, 0)):
                padded = np.pad(x[head], (0, rest), constant_values=past)
                statistics[start + place :][: len(padded)] = padded
    memory = (statistics, lengths, outputs(plan), np.full(plan.chunks * CHUNK**2, np.nan))
    problem.memory = GlobalMemory(operands, *memory, np.zeros(plan.chunks, np.int64))
    return problem


def outputs(plan: BackwardPlan) -> dict:
    """NaN where gradients go: dK and dV, or parts of them, and dQ where a kernel of its own makes it."""
    spec, config = plan.spec, plan.by_keys
    keys = (spec.total_k,) if spec.varlen else (spec.batch, spec.seqlen_k)
    widths = {"dk": (spec.head_dim, config.head_dim), "dv": (spec.head_dim_v, config.head_dim_v)}
    shapes = {name: (*keys, spec.num_kv_heads, width) for name, (width, _) in widths.items()}
    if plan.parts > 1:
        shapes = {n: (*keys, spec.num_kv_heads, plan.parts, tile) for n, (_, tile) in widths.items()}
    if plan.by_queries is not None:
        queries = (spec.total_q,) if spec.varlen else (spec.batch, spec.seqlen_q)
        shapes["dq"] = (*queries, spec.num_heads, spec.head_dim)
    return {name: np.full(shape, np.nan) for name, shape in shapes.items()}


def expected_gradients(q, k, v, do, spec, rng):
    """((dq, dk, dv), lse in base 2, delta) of one sequence in float64; clears dO where no key is seen."""
    group = spec.group_size
    wide_k, wide_v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    # by heads, as products of matrices: einsum would take each sum by itself
    of_q, of_do, of_k, of_v = (x.transpose(1, 0, 2) for x in (q, do, wide_k, wide_v))
    s = of_q @ of_k.swapaxes(1, 2) * spec.softmax_scale
    slope = 1.0
    if spec.softcap:
        t = np.tanh(s / spec.softcap)
        s, slope = spec.softcap * t, 1 - t * t
    place = np.arange(len(q))[:, None] + len(k) - len(q)
    key, (left, right) = np.arange(len(k))[None], (spec.window.left, spec.window.right)
    seen = ((left < 0) | (key >= place - left)) & ((right < 0) | (key <= place + right))
    do[~seen.any(1)] = 0  # as prepare_rows has it; of_do is the same memory
    p = np.where(seen, np.exp(s), 0.0)
    total = p.sum(-1)
    p = p / np.where(total == 0, 1, total)[..., None]
    dp = of_do @ of_v.swapaxes(1, 2)
    delta = (p * dp).sum(-1) - rng.standard_normal(total.shape)  # with a gradient of lse
    ds = p * (dp - delta[..., None]) * slope * spec.softmax_scale
    dq = (ds @ of_k).transpose(1, 0, 2)
    dk, dv = (x.transpose(1, 0, 2) for x in (ds.swapaxes(1, 2) @ of_q, p.swapaxes(1, 2) @ of_do))
    dk, dv = (x.reshape(len(k), spec.num_kv_heads, group, x.shape[-1]).sum(2) for x in (dk, dv))
    lse = np.where(total == 0, np.inf, np.log2(np.where(total == 0, 1, total)))
    return (dq, dk, dv), lse, np.where(total == 0, 0, delta)


def accumulated(problem: Problem, modules: dict) -> list[np.ndarray]:
    """dQ of each sequence out of the accumulator: 0 where there are no keys, since nobody has written."""
    spec, columns = problem.plan.spec, problem.plan.by_keys.head_dim // CHUNK
    back = modules["tandem_attn.device.accumulate"].from_register_order
    chunks = problem.memory.accumulator.reshape(-1, columns, CHUNK**2)  # by 64 rows, 64 columns
    made = []
    for places, (dq, dk, _) in zip(problem.padded, problem.expected, strict=True):
        blocks = -(-len(dq) // CHUNK)
        x = np.zeros((spec.num_heads, blocks * CHUNK, columns * CHUNK))
        for head, block, column in itertools.product(*map(range, (spec.num_heads, blocks, columns))):
            rows = slice(block * CHUNK, (block + 1) * CHUNK)
            chunk = array(chunks[places[head] // CHUNK + block, column])
            x[head, rows, column * CHUNK :][:, :CHUNK] = returned(back(chunk))
        x = x.transpose(1, 0, 2)[: len(dq), :, : spec.head_dim] * spec.softmax_scale
        made.append(x if len(dk) else np.zeros_like(dq))
    return made


def returned(steps):
    """What a function of device code returns, of those that never wait."""
    with pytest.raises(StopIteration) as end:
        next(steps)
    return end.value.value


def check(problem: Problem, seed: int, mutations=None, of_queries=False, stalled=()) -> None:
    """Run it and compare; raises if anything is wrong. `mutations`: of launches by keys, or by queries."""
    plan, memory = problem.plan, problem.memory
    launch = launch_by_keys(plan, memory, problem.programs)
    modules = launch.run(seed, None if of_queries else mutations, stalled)
    if plan.by_queries is not None:
        launch_by_queries(plan, memory, problem.programs).run(seed, mutations if of_queries else None)
    else:
        check_accumulator(problem, modules)
        check_counters(problem, launch)
    for number, name in enumerate(("dq", "dk", "dv")):
        if name in memory.gradients:
            check_gradient(problem, number, name)


def check_accumulator(problem: Problem, modules: dict) -> None:
    """Compare dQ, and nobody has written where no sequence has rows."""
    for x, (dq, _, _) in zip(accumulated(problem, modules), problem.expected, strict=True):
        hint = f"dq of {problem.plan.by_keys} {problem.plan.spec}"
        np.testing.assert_allclose(x, dq, rtol=1e-9, atol=1e-9, err_msg=hint)
    plan = problem.plan
    chunks = problem.memory.accumulator.reshape(-1, plan.by_keys.head_dim, CHUNK)  # by 64 rows
    free = np.ones(len(chunks), bool)
    for places, (dq, dk, _) in zip(problem.padded, problem.expected, strict=True):
        for place in places if len(dk) else []:
            free[place // CHUNK :][: -(-len(dq) // PADDING.value) * PADDING.value // CHUNK] = False
    assert np.isnan(chunks[free]).all(), "dQ of rows that no sequence has"


def check_counters(problem: Problem, launch: Launch) -> None:
    """In order each contribution has been counted, else the write, and who came before it was complete."""
    for chunk, counter in enumerate(problem.memory.counters.tolist()):
        contributions = len(launch.arguments["dq_desc"].contributions.get(chunk, ()))
        if launch.config.ordered or not contributions:
            assert counter == contributions, f"chunk {chunk}"
        else:
            assert 1 <= counter - WRITTEN.value <= contributions, f"chunk {chunk}"


def check_gradient(problem: Problem, number: int, name: str) -> None:
    """Compare dK or dV, or dQ where a kernel of its own makes it. What no sequence owns is not written."""
    plan, x = problem.plan, problem.memory.gradients[name]
    if name != "dq" and plan.parts > 1:
        x = x.sum(-2)[..., : problem.expected[0][number].shape[-1]]
    right = np.full(x.shape, np.nan)
    for pair, gradients in zip(problem.rows, problem.expected, strict=True):
        right[pair[name != "dq"]] = gradients[number]
    hint = f"{name} of {plan.by_keys} {plan.spec}"
    np.testing.assert_allclose(x, right, rtol=1e-9, atol=1e-9, err_msg=hint)


@pytest.mark.parametrize("seed", range(60))
def test_kernel_is_right_whatever_happens_first(seed):
    check(make_problem(seed), seed)


@pytest.mark.parametrize("seed", range(24))
def test_a_kernel_for_dq_alone(seed):
    """Head dimensions over 128: dK and dV, and dQ, have launches of their own."""
    dims = ((256, 256), (192, 128), (136, 64), (192, 192), (256, 192))[seed % 5]
    check(make_problem(seed, dims=dims), seed)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("first_apart", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_many_orders_of_events_of_one_problem(ordered, first_apart, dim):
    """Three tiles of keys that add to the same rows, on a card that has room for two or three programs."""
    fixed = dict(varlen=False, window=CAUSAL, heads=(1, 1, 2), parts=1, dims=(dim, dim), seqlens=(330, 300))
    fixed |= dict(ordered=ordered, first_apart=first_apart)
    for seed in range(3):
        check(make_problem(7, **fixed, programs=2 + seed % 2), seed)


@pytest.mark.parametrize("seqlens", [(700, 450), (450, 450), (800, 130), (400, 900)])
def test_causal_blocks_in_another_order(seqlens):
    """Tiles of keys do not begin with the first block that sees them all. The order is that of one head, so
    two do: of one group, of two, of two or three sequences."""
    for seed, heads in enumerate(((1, 1, 2), (1, 2, 1), (2, 1, 1), (3, 1, 1))):
        fixed = dict(window=CAUSAL, ordered=False, dims=(128, 128), seqlens=seqlens, heads=heads)
        problem = make_problem(seed, **fixed)
        assert problem.plan.by_keys.scatters
        check(problem, seed)


def test_sequences_without_rows_or_keys():
    """Programs without a tile, and tiles of keys that no row sees."""
    for seqlens in ((1, 1), (20, 300)):
        for seed in range(4):
            check(make_problem(seed, varlen=True, window=Window(70, 0), seqlens=seqlens), seed)


@pytest.mark.parametrize("dim", [64, 128])
def test_adding_warps_of_a_program_may_drift_apart(dim):
    """Six blocks of rows, two tiles of keys that begin with different ones.

    With numbers drawn before consumers have put anything, program 0 may hold block 3 for one half and wait
    for block 0 of the other, which program 1 holds, who waits for block 3; and no consumer gets more than
    three blocks ahead of the other.
    """
    rows = 6 * 64 * 128 // dim
    fixed = dict(
        varlen=False, window=Window(), heads=(1, 1, 1), parts=1, dims=(dim, dim), seqlens=(rows, 256)
    )
    for seed in range(24):
        problem = make_problem(seed, **fixed, ordered=False, softcap=0.0, programs=2)
        check(problem, 2 * seed, stalled=("program 0 _add_dq1", "program 1 _add_dq0"))


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault):
    """Several problems, several orders: one of them must fail."""
    kind = fault.partition(":")[0]
    fixed = dict(seqlens=(260, 400), heads=(1, 1, 2)) | KINDS.get(kind, {})
    for seed in range(12):
        problem = make_problem(seed, **fixed)
        try:
            check(problem, seed, FAULTS[fault], of_queries=kind == "queries")
        except (AssertionError, IndexError):
            return
    pytest.fail(f"{fault}: nothing noticed")


@pytest.mark.parametrize("fault", NAMED)
def test_errors_name_what_happened(fault):
    fixed = dict(seqlens=(330, 400), heads=(1, 1, 2), dims=(128, 128), window=Window(), varlen=False)
    fixed |= dict(ordered=fault.startswith("ordered"), programs=2) | KINDS.get(fault, {})
    kind, message = NAMED[fault]
    with pytest.raises(kind, match=message):
        check(make_problem(5, **fixed), 0, FAULTS[fault])
