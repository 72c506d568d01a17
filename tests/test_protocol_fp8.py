"""The forward kernel with e4m3 operands, run on the CPU as in test_protocol.py: V with keys last, factors per
block, the correction of lse, the mean of V. Numbers are not rounded: what is seen is where they come from."""

import dataclasses
import random

import numpy as np
import pytest
from test_protocol import Problem, attention, four_multiprocessors, make_problem  # noqa: F401

from tandem_attn.kernels.config_fp8 import fp8_config
from tandem_attn.kernels.launch import ForwardPlan
from tandem_attn.spec import Window
from tandem_attn.testing.emulator import run_forward

ORDER = [8 * h + 2 * t + e for t in range(4) for h in range(2) for e in range(2)]  # keys of each 16
CHOICES = {
    "two": dict(lazy_rescale=True, o_parts=2),
    "two, not lazy": dict(),
    "three": dict(serial=True, num_consumers=3, sum_by_wgmma=True, block_sums=True),
    "three, O by wgmma": dict(serial=True, num_consumers=3, sum_by_wgmma=True, o_parts=2, o_buffers=2),
    "three, plain sums": dict(serial=True, num_consumers=3, q_stages=2, pingpong=False, block_sums=True),
    "four": dict(serial=True, num_consumers=4, sum_by_wgmma=True, block_sums=True, pingpong=False),
    "two, Q for each block": dict(
        serial=True, sum_by_wgmma=True, q_stages=2, o_parts=2, head_dim=256, head_dim_v=256
    ),
    "two, aside": dict(promote=1),
}


@dataclasses.dataclass
class Fp8Problem:
    """A problem and its numbers as the kernel gets them."""

    problem: Problem
    plan: ForwardPlan
    storages: tuple
    descales: tuple
    shift: np.ndarray
    v_mean: np.ndarray  # (sequences, KV heads, channels)


def padded_starts(starts, totals: int) -> tuple[np.ndarray, int]:
    """(where each packed sequence starts among padded rows, how many of these there are)."""
    number = np.arange(len(starts))
    return (starts + 128 * number) // 128 * 128, (totals + 128 * (len(starts) - 1)) // 128 * 128


def transposed(v, starts, used, rows: int) -> np.ndarray:
    """V with keys last, 0 past the ends, NaN where nobody may look."""
    if starts is None:
        batch, count, heads, dim = v.shape
        padded = max(128, -(-count // 128) * 128)
        out = np.zeros((batch, heads, dim, padded))
        out[..., :count] = v.transpose(0, 2, 3, 1)
    else:
        firsts, padded = padded_starts(starts, rows)
        out = np.full((1, v.shape[1], v.shape[2], max(padded, 128)), np.nan)
        for b, first in enumerate(firsts[:-1]):
            count = (starts[b + 1] - starts[b]) if used is None else used[b]
            out[0, :, :, first : first + max(128, -(-count // 128) * 128)] = 0
            out[0, :, :, first : first + count] = v[starts[b] : starts[b] + count].transpose(1, 2, 0)
    by_16 = out.reshape(*out.shape[:-1], -1, 16)[..., ORDER]
    return by_16.reshape(out.shape)


def factors_of(rng, x, starts, block: int, per_block: bool):
    """(descales as in memory, those of each row of x) powers of two, NaN where nobody may look."""
    batch = x.shape[0] if starts is None else len(starts) - 1
    heads, rows = x.shape[-2], x.shape[-3]

    def draw(*shape):
        return 2.0 ** rng.integers(-1, 2, shape)

    if not per_block:
        found = draw(batch, heads)
        if starts is None:
            return found, found[:, None, :, None]
        each = np.ones((rows, heads, 1))
        for b in range(batch):
            each[starts[b] : starts[b + 1]] = found[b][None, :, None]
        return found, each
    if starts is None:
        found = draw(batch, heads, -(-rows // block))
        return found, np.repeat(found, block, 2)[:, :, :rows].transpose(0, 2, 1)[..., None]
    firsts, padded = padded_starts(starts, rows)
    found, each = np.full((heads, max(padded // block, 1)), np.nan), np.ones((rows, heads, 1))
    for b in range(batch):
        count, first = starts[b + 1] - starts[b], firsts[b] // block
        blocks = max(1, -(-count // block))
        found[:, first : first + blocks] = draw(heads, blocks)
        by_row = np.repeat(found[:, first : first + blocks], block, 1)[:, :count]
        each[starts[b] : starts[b + 1]] = by_row.T[..., None]
    return found, each


def make_fp8_problem(seed: int, choice: dict, **fixed) -> Fp8Problem:
    """A problem of test_protocol.py with factors; small tiles of queries, whole blocks of keys."""
    dice, rng = random.Random(seed), np.random.default_rng(seed)
    window = fixed.pop("window", dice.choice((Window(), Window(-1, 0), Window(150, 0), Window(40, 200))))
    problem = make_problem(
        seed, dims=(32, 48), window=window, causal=window.causal,
        seqlens=(dice.choice((30, 140)), dice.randint(1, 420)),
        serial=False, block_sums=False, **fixed,
    )  # fmt: skip
    if problem.softcap:
        problem.softcap = 0.0
        problem.plan.spec = dataclasses.replace(problem.plan.spec, softcap=0.0)
    spec, per_block = problem.plan.spec, dice.random() < 0.5
    starts_q, starts_k, _, used_k = problem.lengths
    config = dataclasses.replace(
        fp8_config(spec), head_dim=64, head_dim_v=64, tile_m=8, o_parts=1, o_buffers=1, q_in_registers=False,
        serial=False, sum_by_wgmma=False, block_sums=False, num_consumers=2, lazy_rescale=False,
        named_release=False, pingpong=True, promote=0,
    )  # fmt: skip
    config = dataclasses.replace(config, **choice)
    q_factors, q_each = factors_of(rng, problem.q, starts_q, 64, per_block)
    k_factors, k_each = factors_of(rng, problem.k, starts_k, 128, per_block)
    v_factors, v_each = factors_of(rng, problem.v, starts_k, 128, per_block)
    v_t = transposed(problem.v, starts_k, used_k, spec.total_k)
    geometry = list(v_t.shape), [s // 8 for s in v_t.strides]
    counts = (q_factors.shape[-1], k_factors.shape[-1], 1) if per_block else (1, 1, 0)
    plan = ForwardPlan(spec, config, geometry, counts)
    shift = rng.standard_normal(spec.lse_shape)
    v_mean = rng.standard_normal((spec.batch, spec.num_kv_heads, spec.head_dim_v))
    problem.q, problem.k, problem.v = problem.q * q_each, problem.k * k_each, problem.v * v_each
    storages = (*problem.storages[:2], v_t.reshape(-1))
    factors = tuple(x.reshape(-1) for x in (q_factors, k_factors, v_factors, shift, v_mean))
    return Fp8Problem(problem, plan, storages, factors, shift, v_mean)


def check(case: Fp8Problem, seed: int, mutations=None) -> None:
    """Run it and compare; raises if anything is wrong."""
    problem, spec = case.problem, case.plan.spec
    out, lse, _ = run_forward(
        case.plan, case.storages, problem.lengths, case.plan.programs, seed, mutations, case.descales
    )
    expected = np.full(out.shape, np.nan), np.full(lse.shape, np.nan)
    for i, (rows, keys) in enumerate(problem.rows):
        v = problem.v[keys] + case.v_mean[i]
        o, log_sum = attention(problem.q[rows], problem.k[keys], v, problem)
        expected[0][rows] = o
        place = (slice(None), rows) if spec.varlen else rows
        expected[1][place] = log_sum + spec.softmax_scale * case.shift[place]
    np.testing.assert_allclose(out, expected[0], rtol=1e-9, atol=1e-9, err_msg=str(case.plan.config))
    np.testing.assert_allclose(lse, expected[1], rtol=1e-9, atol=1e-9, err_msg=str(case.plan.config))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("choice", CHOICES)
def test_numbers_come_from_where_they_should(choice, seed):
    check(make_fp8_problem(seed, CHOICES[choice]), seed)


FAULTS = {
    "q's factor of the wrong block": {"+ m_block) * self.block_step": "+ 0) * self.block_step"},
    "k's factor of the wrong block": {"gl.load(self.k + n_block": "gl.load(self.k + 0 * n_block"},
    "v's unit never changes": {"alpha * (self.unit(before) / self.unit(n_block))": "alpha"},
    "O is in the unit of another block": {"unit(of.n_end - n_blocks)": "unit(of.n_end - 1)"},
    "factors of another sequence": {"return self.batch * (1 - block_step)": "return self.batch * 0"},
    "factors of another head": {"self.num_kv_heads + kv_head)": "self.num_kv_heads + 0 * kv_head)"},
    "lse is not corrected": {"* (self.scale * LN2)": "* 0.0"},
    "V's mean is not added": {"gl.fma(gl.broadcast(mean[None, :], o)[0]": "gl.fma(0.0 * o"},
    "V's mean of another sequence": {"(sequence.batch.to(gl.int64) * self.num": "(0 * self.num"},
    "V's mean of another head": {"+ kv_head) * columns": "+ 0 * kv_head) * columns"},
    "V's mean in rows without a key": {"gl.where(total == 0.0, 0.0, 1.0)": "1.0 + 0.0 * total"},
    "V's mean from another column on": {"kv_head, i * c.o_width, columns": "kv_head, 0, columns"},
    "keys of V in their usual order": {".permute((0, 1, 3, 2, 4))": ".permute((0, 1, 3, 4, 2))"},
    "packed keys of V not at their places": {"self.first_block(\"k\") * PADDING": "self.start_k"},
    "P is not shifted back": {"log_sum_exp(row_max - c.p_shift, total)": "log_sum_exp(row_max, total)"},
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault):
    for seed in range(12):
        try:
            case = make_fp8_problem(seed, CHOICES["two"])
            check(case, seed, FAULTS[fault])
        except (AssertionError, IndexError):
            return
    pytest.fail(f"{fault}: nothing noticed")
