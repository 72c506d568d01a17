"""The forward kernel itself, its barriers and its numbers, run on the CPU by testing/emulator.py.

Random questions, configurations and orders of events. Each run must end (no deadlock), order every access to
shared memory (no race, whether or not it showed), keep inside its tensors, write every row exactly once, and
agree with float64 attention. The second half breaks the kernel on purpose: each fault must be noticed.
"""

import dataclasses
import random

import numpy as np
import pytest

from tandem_attn import arch
from tandem_attn.device.mask import CausalMask, FullMask, NoMask, WindowMask
from tandem_attn.device.schedule import DenseTiles, PlainTiles, VarlenTiles
from tandem_attn.device.sequence import Dense, Varlen
from tandem_attn.kernels.config import ForwardConfig
from tandem_attn.kernels.launch import ForwardPlan
from tandem_attn.spec import Window
from tandem_attn.testing.emulator import run_forward
from tandem_attn.testing.machine import Deadlock, Race
from tandem_attn.testing.shipped import Variant, configs, question

SHAPES = [(64, 64), (64, 128), (96, 96), (128, 128), (192, 128), (256, 256)]  # of tiles
DIMS = [(8, 8), (40, 64), (64, 64), (64, 120), (96, 96), (128, 128), (192, 128)]  # of questions
FLAGS = [f.name for f in dataclasses.fields(ForwardConfig) if f.type == "bool" and f.name != "softcap"]


@pytest.fixture(autouse=True)
def four_multiprocessors(monkeypatch):
    monkeypatch.setattr(arch, "num_multiprocessors", lambda device: 4)


@dataclasses.dataclass
class Problem:
    """A question with its numbers."""

    plan: ForwardPlan
    storages: tuple  # of q, k and v
    q: np.ndarray  # (batch, rows, heads, dim), or packed rows without batch; what no sequence owns is NaN
    k: np.ndarray
    v: np.ndarray
    lengths: tuple
    rows: list  # for each sequence: (index of its q rows, index of its keys)
    window: Window
    softcap: float


def strided(rng, shape, gap) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, their storage): random, in rows `gap` elements further apart than need be; NaN between."""
    *lead, heads, dim = shape
    storage = np.full(int(np.prod(lead)) * (heads * dim + gap), np.nan)
    row = heads * dim + gap
    strides = [row, dim, 1] if len(lead) == 1 else [lead[1] * row, row, dim, 1]
    x = np.lib.stride_tricks.as_strided(storage, shape, [8 * s for s in strides])
    x[...] = rng.standard_normal(shape)
    return x, storage


def element_strides(x: np.ndarray) -> tuple[int, ...]:
    return tuple(s // 8 for s in x.strides)


def make_config(dice, spec) -> ForwardConfig:
    """Tiles of a few rows and keys; everything else as dice and question have it."""
    head_dim, head_dim_v = dice.choice(
        [s for s in SHAPES if s[0] >= spec.head_dim and s[1] >= spec.head_dim_v]
    )
    v_chunks = 3 if head_dim_v % 3 == 0 else 1
    o_parts = v_chunks if v_chunks > 1 else dice.choice((1, 2))
    tile_n = dice.choice((8, 16))
    if spec.window.causal:
        mask = CausalMask
    elif not spec.window.full:
        mask = WindowMask
    else:
        mask = FullMask if spec.varlen or spec.seqlen_k % tile_n or spec.seqlen_k == 0 else NoMask
    tile_m, consumers = dice.choice((4, 8)), dice.choice((2, 3))
    flags = {flag: dice.random() < 0.5 for flag in FLAGS}
    flags["skip"] &= (consumers - 1) * tile_m <= tile_n
    flags["opens_in_loop"] &= mask is not NoMask
    flags["sum_by_wgmma"] = False  # e4m3 only: tests/test_protocol_fp8.py
    flags["block_sums"] &= flags["serial"]
    if flags["serial"]:
        flags |= dict.fromkeys(("rescale_first", "skip", "in_step", "opens_in_loop"), False)
    return ForwardConfig(
        element="bf16",
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        Mask=mask,
        Sequences=Varlen if spec.varlen else Dense,
        Schedule=VarlenTiles if spec.varlen else dice.choice((DenseTiles, PlainTiles)),
        tile_m=tile_m,
        tile_n=tile_n,
        num_consumers=consumers,
        num_stages=2,
        q_stages=dice.choice((1, 2)),
        o_parts=o_parts,
        o_buffers=dice.choice([n for n in range(1, o_parts + 1) if o_parts % n == 0]),
        promote=0 if flags["serial"] else dice.choice((0, 0, 1, 2)),
        **flags,
    )


def make_problem(seed: int, **fixed) -> Problem:
    """Everything by the seed. `fixed`: fields of the config, or of the problem, or all of the config."""
    dice, rng = random.Random(seed), np.random.default_rng(seed)
    varlen = fixed.pop("varlen", dice.random() < 0.5)
    causal = fixed.pop("causal", dice.random() < 0.4)
    batch, kv_heads, group = dice.randint(1, 3), dice.randint(1, 2), dice.randint(1, 2)
    dim, dim_v = fixed.pop("dims", dice.choice(DIMS))
    window = Window(-1, 0) if causal else dice.choice((Window(), Window(5, 0), Window(-1, 7), Window(9, 4)))
    window = fixed.pop("window", window)
    longest = fixed.pop("seqlens", (dice.randint(1, 40), dice.randint(1, 60)))
    softcap = dice.choice((0.0, 2.0))
    if varlen:
        starts = [np.cumsum([0, *(dice.choice((0, 1, n // 2, n)) for _ in range(batch))]) for n in longest]
        used = [
            np.array([dice.randint(0, n) for n in np.diff(s)]) if dice.random() < 0.5 else None
            for s in starts
        ]
        ends = [s[:-1] + (np.diff(s) if u is None else u) for s, u in zip(starts, used, strict=True)]
        q_index, k_index = (
            [slice(*x) for x in zip(s[:-1], e, strict=True)] for s, e in zip(starts, ends, strict=True)
        )
        totals = [s[-1] + dice.randint(0, 9) for s in starts]  # some rows belong to nobody
        shapes = [(max(totals[0], 1),), (max(totals[1], 1),)]
    else:
        q_index = k_index = list(range(batch))
        shapes, starts, used = [(batch, longest[0]), (batch, longest[1])], (None, None), (None, None)
    gap = dice.choice((0, 8))
    q, q_storage = strided(rng, (*shapes[0], kv_heads * group, dim), gap)
    (k, k_storage), (v, v_storage) = (strided(rng, (*shapes[1], kv_heads, d), gap) for d in (dim, dim_v))
    spec = dataclasses.replace(
        question(dim, dim_v, *longest, window, varlen, softcap=softcap, batch=batch,
                 num_heads=kv_heads * group, num_kv_heads=kv_heads),
        total_q=q.shape[0] if varlen else batch * longest[0],
        total_k=k.shape[0] if varlen else batch * longest[1],
        has_seqused_q=used[0] is not None,
        has_seqused_k=used[1] is not None,
        **{f"{name}_stride": element_strides(x) for name, x in (("q", q), ("k", k), ("v", v))},
    )  # fmt: skip
    config = fixed.pop("config", None) or make_config(dice, spec)
    config = dataclasses.replace(config, softcap=spec.softcap > 0, **fixed)
    storages, rows = (q_storage, k_storage, v_storage), list(zip(q_index, k_index, strict=True))
    problem = Problem(ForwardPlan(spec, config), storages, q, k, v, (*starts, *used), rows, window, softcap)
    if varlen:
        for x, index in ((q, q_index), (k, k_index), (v, k_index)):
            owned = np.zeros(len(x), bool)
            for rows in index:
                owned[rows] = True
            x[~owned] = np.nan
    return problem


def attention(q, k, v, problem):
    """One sequence in float64: (out, lse) of (rows, heads, dim)."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    q, k, v = (x.transpose(1, 0, 2) for x in (q, k, v))  # by heads, as products of matrices
    s = q @ k.swapaxes(1, 2) * problem.plan.spec.softmax_scale
    if problem.softcap:
        s = problem.softcap * np.tanh(s / problem.softcap)
    rows, keys = s.shape[1:]
    place = np.arange(rows)[:, None] + keys - rows
    key, (left, right) = np.arange(keys)[None], (problem.window.left, problem.window.right)
    seen = ((left < 0) | (key >= place - left)) & ((right < 0) | (key <= place + right))
    p = np.where(seen, np.exp(s), 0.0)
    total = p.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.log(total)
    out = p / np.where(total == 0, 1, total)[..., None] @ v
    return out.transpose(1, 0, 2), lse


def check(problem: Problem, seed: int, mutations=None) -> None:
    """Run it and compare; raises if anything is wrong."""
    out, lse, garbage = run_forward(
        problem.plan, problem.storages, problem.lengths, problem.plan.programs, seed, mutations
    )
    expected = np.full(out.shape, np.nan), np.full(lse.shape, np.nan)
    for rows, keys in problem.rows:
        o, log_sum = attention(problem.q[rows], problem.k[keys], problem.v[keys], problem)
        expected[0][rows] = o
        if problem.plan.spec.varlen:
            expected[1][:, rows] = log_sum
        else:
            expected[1][rows] = log_sum
    for name, actual, right in (("o", out, expected[0]), ("lse", lse, expected[1])):
        hint = f"{name} of {problem.plan.config} {problem.plan.spec}; reads out of order: {garbage[:1]}"
        np.testing.assert_allclose(actual, right, rtol=1e-9, atol=1e-9, err_msg=hint)


@pytest.mark.parametrize("seed", range(70))
def test_kernel_is_right_whatever_happens_first(seed):
    check(make_problem(seed), seed)


@pytest.mark.parametrize("config", configs(), ids=lambda config: Variant(config).name)
def test_shipped_configurations_as_they_are(config):
    """Tiles of full size, a few of them, for each configuration that a question can get."""
    window = {CausalMask: Window(-1, 0), WindowMask: Window(100, 30)}.get(config.Mask, Window())
    varlen, dims = config.Sequences is Varlen, (config.head_dim - 8, config.head_dim_v)
    seqlens = (200, 256 if config.Mask is NoMask else 340)
    check(make_problem(0, config=config, varlen=varlen, window=window, dims=dims, seqlens=seqlens), 0)


@pytest.mark.parametrize("consumers", [2, 3])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("pingpong", [False, True])
@pytest.mark.parametrize("opens_in_loop", [False, True])
def test_many_orders_of_events_of_one_causal_problem(consumers, skip, pingpong, opens_in_loop):
    """Tiles as tall as a key block and more, so that consumers skip; more tiles than programs."""
    fixed = dict(varlen=False, causal=True, seqlens=(30, 30), tile_m=4, tile_n=8, opens_in_loop=opens_in_loop)
    fixed |= dict(serial=False, block_sums=False)
    problem = make_problem(3, **fixed, num_consumers=consumers, skip=skip, pingpong=pingpong)
    for seed in range(3):
        check(problem, seed)


def test_programs_without_a_tile_end():
    """All sequences empty: the producer says so at once."""
    problem = make_problem(1, varlen=True)
    starts_q, starts_k, _, _ = problem.lengths
    problem.lengths = (starts_q * 0, starts_k * 0, None, None)
    problem.rows = []
    check(problem, 0)


FAULTS = {
    "a skipped block is handed back before it has landed": {
        "        shared.k.wait(tile.it + i)\n        shared.v.wait(tile.it + i)\n": ""
    },
    "K is handed back while its scores are computed": {
        "    s = warpgroup_mma_wait(c.v_chunks, deps=(s_started,))\n    shared.k.release(j)\n": (
            "    shared.k.release(j)\n    s = warpgroup_mma_wait(c.v_chunks, deps=(s_started,))\n"
        )
    },
    "K is not waited for": {"    shared.k.wait(j)\n": ""},
    "V is not waited for": {"    shared.v.wait(before, has_pv)\n": ""},
    "V is not handed back": {"    v.release(j, has_pv)\n": ""},
    "V is handed back while P V is computed": {
        "    waited = finished(started, v.chunks)\n": (
            "    v.release(j, has_pv)\n    waited = finished(started, v.chunks)\n"
        ),
        "    v.release(j, has_pv)\n    if rescale:": "    if rescale:",
    },
    "named: V is handed back while P V is computed": {
        "    waited = finished(started, v.chunks)\n": (
            "    v.release(j, has_pv)\n    waited = finished(started, v.chunks)\n"
        ),
        "    v.release(j, has_pv)\n    if rescale:": "    if rescale:",
    },
    "named: nobody hands out the first stages": {"    shared.k.release_all()\n": ""},
    "named: a stage is empty before all have left it": {"128 * num_consumers + 32": "128 * 1 + 32"},
    "one consumer's release counts for all": {"rs(num_stages, num_consumers)": "rs(num_stages, 1)"},
    "the last P V does not wait for V": {"        shared.v.wait(it - 1)\n": ""},
    "O is read by TMA without a fence": {"    fence_async_shared()\n    coords": "    coords"},
    "O is overwritten while TMA reads it": {"    tma_store_wait(c.o_buffers - 1)\n": ""},
    "a consumer leaves before its O has been read": {"        tma_store_wait(0)\n": ""},
    "mail is overwritten before it is read": {
        "        mbarrier.wait(shared.q_empty.index(slot), (tile // c.q_stages & 1) ^ 1)\n"
        "        shared.mailbox.send(slot, 0, m_start)\n": "        shared.mailbox.send(slot, 0, m_start)\n"
    },
    "Q is handed back before it is read": {
        "    q = ()\n    for i": "    _hand_back(shared, slot)\n    q = ()\n    for i",
        "        fence_async_shared()\n        _hand_back(shared, slot)\n": "        pass\n",
        "    if not problem.config.q_in_registers:\n": "    if False:\n",
    },
    "the first K is loaded twice": {"if i >= begin_k:": "if i >= 0:"},
    "phases start one round off": {"return 2 * num_stages": "return num_stages"},
    "nobody has the first turn": {"if c.pingpong and group == c.num_consumers - 1:": "if False:"},
    "blocks are miscounted": {"it += n_blocks\n        tile += 1\n": "tile += 1\n"},
    "the end is not told": {"        shared.mailbox.send(slot, 0, END_OF_TILES)\n": ""},
    "O of the tile before is added up": {"previous.blocks > 1": "True"},
    "the first O is added up": {"i > second, masked": "True, masked"},
    "rows of the new tile get O of the old": {
        "previous = Finished(sequence, head, of.m_start,": (
            "previous = Finished(sequence, head, previous.m_start,"
        )
    },
    "opens: O of the tile before is scaled": {"gl.where(opens, 1.0, factor)": "factor"},
    "opens: maximum and sum of the tile before stay": {
        'gl.where(opens, float("-inf"), state.row_max)': "state.row_max",
        "gl.where(opens, 0.0, state.row_sum)": "state.row_sum",
    },
    "opens: V of the wrong block": {"gl.where(opens, tile.it - 1, tile.it + i - 1)": "tile.it + i - 1"},
    "opens: O leaves with every block": {"if opens & has_previous": "if has_previous"},
    "opens: O of the tile before is added up": {
        "gl.where(opens, previous.blocks > 1, i > first + 1)": "gl.where(opens, True, i > first + 1)"
    },
    "O leaves in the wrong columns": {"i * c.o_width": "i * 8"},
    "serial: K is handed back while its scores are computed": {
        "    s = warpgroup_mma_wait(0, deps=(started,))\n    shared.k.release(j)\n": (
            "    shared.k.release(j)\n    s = warpgroup_mma_wait(0, deps=(started,))\n"
        )
    },
    "serial: V is not waited for": {"        shared.v.wait(j)\n": ""},
    "serial: V is handed back while P V is computed": {
        "        shared.v.wait(j)\n": "        shared.v.wait(j)\n        shared.v.release(j)\n",
        "    shared.v.release(j)\n    return new": "    return new",
    },
    "serial: O of the tile before is added up": {  # a maximum of -inf would make nothing of it
        "    o = zeros(c.tile_m, c.v_width, c.v_chunks, c.o_accumulator)\n    state": (
            "    o = state.o\n    state"
        ),
        'row_max = gl.full_like(state.row_max, float("-inf"))': "row_max = state.row_max",
    },
    "serial: a consumer leaves before its O has been read": {
        "group, tile)\n    tma_store_wait(0)\n": "group, tile)\n"
    },
    "chunks: what is kept aside is forgotten": {
        "gl.load(_places_aside(problem, group, n))": "0.0 * unit[:, None]"
    },
    "chunks: O is not started anew": {"from_here = gl.where(again, i, start)": "from_here = start"},
    "chunks: what was kept is not scaled": {
        "decay = gl.exp2(kept_max - state.row_max)": "decay = kept_max * 0 + 1.0"
    },
    "chunks: consumers share a place": {"gl.program_id(0) * c.num_consumers + group": "gl.program_id(0)"},
    "chunks: sums are forgotten": {"kept_sum = i, state.row_max, gl.where(again, decayed, 0.0)": (
        "kept_sum = i, state.row_max, kept_sum * 0.0"
    )},
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault):
    """Several problems with few resources, several orders: one of them must fail."""
    fixed = dict(causal=True, pingpong="turn" in fault, tile_m=4, tile_n=8, q_stages=1, seqlens=(60, 60))
    fixed["named_release"] = fault.startswith("named:")
    fixed["opens_in_loop"] = fault.startswith("opens:")
    fixed["serial"] = fault.startswith("serial:")
    fixed["promote"] = 1 if fault.startswith("chunks:") else 0
    if fixed["serial"]:
        fixed |= dict(skip=False, rescale_first=False, in_step=False)
    else:
        fixed |= dict(skip=True, block_sums=False)
    for seed in range(60):
        problem = make_problem(seed, **fixed)
        try:
            check(problem, seed, FAULTS[fault])
        except (AssertionError, ArithmeticError, IndexError, TypeError):
            return
    pytest.fail(f"{fault}: nothing noticed")


def test_errors_name_what_happened():
    problem = make_problem(5, causal=True, varlen=False, seqlens=(60, 60), pingpong=True)
    with pytest.raises(Deadlock, match="wait for ever"):
        check(problem, 0, FAULTS["V is not handed back"])
    with pytest.raises(Race, match="without a fence"):
        check(problem, 0, FAULTS["O is read by TMA without a fence"])
