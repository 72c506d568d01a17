"""One block of query rows where all gradients are made at once: what a consumer, who owns 64 keys, does.

Step i, with S^T(i) = K Q^T already there:

    start dP^T = V dO^T                          | P^T = exp2(S^T * scale - lse)
    start dV  += P^T dO                          | wait for dP^T; dS^T = P^T * (dP^T - delta)
                                                 | put dS^T(i) into shared memory, for both consumers
    start dQ   = dS(i-1) K,  start dK += dS^T Q  | wait for dV, dQ; add dQ(i-1) to global memory
    start S^T(i+1)                               | wait for all; hand the block back

dQ lags by one block, so that consumers need not meet inside a step; each makes one half of it. Whatever a
step starts it also waits for: one wgmma in flight across the loop's back edge, and ptxas serialises all.
"""

from tandem_attn.device.gluon import (
    aggregate,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from tandem_attn.device.mask import apply_mask_transposed
from tandem_attn.device.pieces import hidden, start_product
from tandem_attn.device.precision import product16
from tandem_attn.device.row_ring import RowRing
from tandem_attn.device.softmax import recomputed


@aggregate
class Shared:
    """What the partitions share."""

    k: gl.shared_memory_descriptor  # [2, 64, head_dim]: a half per consumer
    v: gl.shared_memory_descriptor
    kv_full: gl.shared_memory_descriptor  # K, V
    q: RowRing  # Q with lse (base 2)
    do: RowRing  # dO with delta
    ds: gl.shared_memory_descriptor  # [ds_stages * 2, 64, tile_m]: dS^T, a half per consumer
    ds_full: gl.shared_memory_descriptor  # both halves are there


@aggregate
class State:
    """What a step leaves to the next."""

    s: gl.tensor  # S^T of the next block
    dk: gl.tensor
    dv: gl.tensor


@gluon.jit
def start_scores(problem, shared, group: gl.constexpr, i):
    """Start S^T = K Q^T of block i, once that has landed."""
    return start_product(shared.k, group, shared.q, i, problem.config.static.s_accumulator)


@gluon.jit
def start_dq(problem, shared, group: gl.constexpr, t):
    """Start this consumer's half of dQ = dS K from put t: 64 of the columns, or of the rows where there are
    128."""
    c: gl.constexpr = problem.config.static
    mbarrier.wait(shared.ds_full.index(t % c.ds_stages), t // c.ds_stages & 1)
    dq = gl.zeros([64, 64], gl.float32, c.dq_accumulator)
    for half in gl.static_range(2):
        ds = shared.ds.index(t % c.ds_stages * 2 + half)
        k = shared.k.index(hidden(half))
        if c.tile_m == 64:
            k = k.slice(64 * group, 64, dim=1)
        else:
            ds = ds.slice(64 * group, 64, dim=1)
        dq = warpgroup_mma(ds.permute((1, 0)), k, dq, use_acc=half > 0, is_async=True)
    return dq


@gluon.jit
def put_ds(problem, shared, group: gl.constexpr, t, ds):
    """Put number t of this consumer's dS^T into shared memory."""
    c: gl.constexpr = problem.config.static
    shared.ds.index(t % c.ds_stages * 2 + group).store(ds)
    fence_async_shared()
    mbarrier.arrive(shared.ds_full.index(t % c.ds_stages), count=1)


@gluon.jit
def _probabilities(problem, shared, group: gl.constexpr, tile, i, m_start, s, masked: gl.constexpr):
    """(P^T, P^T times the slope of the softcap) of block i from its scores."""
    c: gl.constexpr = problem.config.static
    lse = gl.expand_dims(shared.q.stats(i, gl.SliceLayout(0, c.s_accumulator)), 0)
    n_start = tile.n_start + 64 * group
    return recomputed(problem, s, lse, tile.mask, n_start, m_start, masked, apply_mask_transposed)


@gluon.jit
def _score_gradient(problem, shared, i, p16, sloped, dp):
    """dS^T = P^T * (dP^T - delta), rounded."""
    c: gl.constexpr = problem.config.static
    delta = shared.do.stats(i, gl.SliceLayout(0, c.s_accumulator))
    difference = dp - gl.expand_dims(delta, 0)
    if c.packed_ds and not c.softcap:
        return product16(p16, difference.to(c.dtype), c.dtype)
    else:
        return (sloped * difference).to(c.dtype)


@gluon.jit
def _add(adds, group: gl.constexpr, i, dq, always: gl.constexpr):
    """Hand dQ of block i to the warp that adds it. Not `always`: unless it is that of the zeros before block
    0."""
    if always or i >= 0:
        adds.put(group, i, dq)


@gluon.jit
def step(problem, shared, adds, group: gl.constexpr, tile, i, m_start, state, masked: gl.constexpr,
         opens: gl.constexpr = False):  # fmt: skip
    """Block i: see the top of the file. Returns the next state. `opens`: block 0, before which there is no
    dS."""
    c: gl.constexpr = problem.config.static
    dp = start_product(shared.v, group, shared.do, i, c.s_accumulator)
    p, sloped = _probabilities(problem, shared, group, tile, i, m_start, state.s, masked)
    p16 = p.to(c.dtype)
    operand: gl.constexpr = gl.DotOperandLayout(0, c.dv_accumulator, 2)
    do = shared.do.chunk(i, 0)
    dv = warpgroup_mma(gl.convert_layout(p16, operand, assert_trivial=True), do, state.dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds = _score_gradient(problem, shared, i, p16, sloped, dp)
    t = i + c.first_put
    put_ds(problem, shared, group, t, ds)
    if not opens:
        dq = start_dq(problem, shared, group, t - 1)
    operand_k: gl.constexpr = gl.DotOperandLayout(0, c.dk_accumulator, 2)
    q = shared.q.chunk(i, 0)
    dk = warpgroup_mma(gl.convert_layout(ds, operand_k, assert_trivial=True), q, state.dk, is_async=True)
    if opens:
        dv = warpgroup_mma_wait(1, deps=(dv,))
    else:
        dv, dq = warpgroup_mma_wait(1, deps=(dv, dq))
        _add(adds, group, i - 1, dq, c.first_apart)
    s = start_scores(problem, shared, group, gl.minimum(i + 1, tile.count - 1))  # the last is of no use
    dk, dv, s = warpgroup_mma_wait(0, deps=(dk, dv, s))
    shared.q.release(i)
    return State(s, dk, dv)


@gluon.jit
def skipped(problem, shared, adds, group: gl.constexpr, tile, i, state, opens: gl.constexpr = False):
    """Block i, of which none of this consumer's keys sees a row: nothing but its half of dQ is to be done."""
    c: gl.constexpr = problem.config.static
    shared.do.wait(i)  # a phase must not be lapped
    t = i + c.first_put
    put_ds(problem, shared, group, t, gl.zeros([64, c.tile_m], c.dtype, c.s_accumulator))
    if not opens:
        dq = warpgroup_mma_wait(0, deps=(start_dq(problem, shared, group, t - 1),))
        _add(adds, group, i - 1, dq, c.first_apart)
    started = start_scores(problem, shared, group, gl.minimum(i + 1, tile.count - 1))
    s = warpgroup_mma_wait(0, deps=(started,))
    shared.q.release(i)
    return State(s, state.dk, state.dv)
