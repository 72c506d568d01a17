"""One block of query rows in the backward: what a consumer, who owns 64 keys, does with it.

Scores are transposed, so that P^T and dS^T are wgmma operands straight from registers, and dK and dV stay in
registers to the end. Step i, with S^T(i) = K Q^T already there:

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
    base_value,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from tandem_attn.device.mask import apply_mask_transposed
from tandem_attn.device.precision import product16
from tandem_attn.device.row_ring import RowRing, hidden
from tandem_attn.device.softmax import recomputed


@aggregate
class Problem:
    """What the caller asked for."""

    num_parts: gl.tensor  # KV heads by the parts that their query heads are taken in
    heads: gl.tensor  # query heads of a part
    padded_rows: gl.tensor  # of dQ's accumulator and the row statistics, per head or batch and head
    delta_start: gl.tensor  # where delta begins in the row statistics, after lse
    scale: gl.tensor  # of dQ and dK
    scale_log2: gl.tensor  # score (or capped score) to exponent of 2
    inner_scale: gl.tensor  # softmax_scale / softcap
    config: gl.constexpr  # BackwardConfig


@aggregate
class Shared:
    """What the partitions share."""

    k: gl.shared_memory_descriptor  # [2, 64, head_dim]: a half per consumer
    v: gl.shared_memory_descriptor
    kv_full: gl.shared_memory_descriptor  # K, V
    q: RowRing  # Q with lse (base 2)
    do: RowRing  # dO with delta, or for dV alone with lse
    ds: gl.shared_memory_descriptor  # [ds_stages * 2, 64, tile_m]: dS^T, a half per consumer
    ds_full: gl.shared_memory_descriptor  # both halves are there


@aggregate
class Tile:
    """The keys of a program and the blocks of query rows that see them: begin to end - 1."""

    sequence: base_value  # DenseSequence or PackedSequence
    index: gl.tensor  # of the sequence in the batch
    mask: base_value
    part: gl.tensor  # these query heads
    kv_head: gl.tensor
    n_start: gl.tensor
    begin: gl.tensor
    end: gl.tensor
    whole_begin: gl.tensor  # of which whole_begin to whole_end - 1 see all keys
    whole_end: gl.tensor
    count: gl.tensor  # blocks of all query heads of the part together
    turn: gl.tensor  # where all blocks are alike: begin with this one

    @gluon.jit
    def block(self, m):
        """Block to visit as number m. Programs that run side by side then add to different rows of dQ."""
        m += self.turn
        return m - gl.where(m >= self.end, self.end, 0)

    @gluon.jit
    def statistics(self, problem, g):
        """First row, in the padded row statistics, of query head g of the part."""
        num_heads = problem.num_parts * problem.heads
        head = self.part * problem.heads + g
        return self.sequence.padded_row(self.index, head, num_heads, problem.padded_rows)


@aggregate
class State:
    """What a step leaves to the next."""

    s: gl.tensor  # S^T of the next block, if scores are computed ahead
    dk: gl.tensor
    dv: gl.tensor


@gluon.jit
def start_scores(problem, shared, group: gl.constexpr, i):
    """Start S^T = K Q^T of block i, once that has landed."""
    c: gl.constexpr = problem.config.static
    q = shared.q.wait(i)
    zero = gl.zeros([64, c.tile_m], gl.float32, c.s_accumulator)
    k = shared.k.index(hidden(group))
    return warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _start_dp(problem, shared, group: gl.constexpr, do):
    """Start dP^T = V dO^T."""
    c: gl.constexpr = problem.config.static
    zero = gl.zeros([64, c.tile_m], gl.float32, c.s_accumulator)
    v = shared.v.index(hidden(group))
    return warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)


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
    if c.with_k:
        lse = shared.q.stats(i, gl.SliceLayout(0, c.s_accumulator))
    else:  # the stage of Q is already on its way back
        lse = shared.do.stats(i, gl.SliceLayout(0, c.s_accumulator))
    n_start = tile.n_start + 64 * group
    lse = gl.expand_dims(lse, 0)
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
    """Block i with scores computed ahead: see the top of the file. Returns the next state. `opens`: block 0,
    before which there is no dS."""
    c: gl.constexpr = problem.config.static
    do = shared.do.wait(i)
    dp = _start_dp(problem, shared, group, do)
    p, sloped = _probabilities(problem, shared, group, tile, i, m_start, state.s, masked)
    p16 = p.to(c.dtype)
    operand: gl.constexpr = gl.DotOperandLayout(0, c.dv_accumulator, 2)
    dv = warpgroup_mma(gl.convert_layout(p16, operand, assert_trivial=True), do, state.dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds = _score_gradient(problem, shared, i, p16, sloped, dp)
    t = i + c.first_put
    put_ds(problem, shared, group, t, ds)
    if not opens:
        dq = start_dq(problem, shared, group, t - 1)
    operand_k: gl.constexpr = gl.DotOperandLayout(0, c.dk_accumulator, 2)
    q = shared.q.tile(i)
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


@gluon.jit
def step_k(problem, shared, group: gl.constexpr, tile, i, m_start, state, masked: gl.constexpr):
    """Block i for dK alone: the exponentials run beside dP."""
    c: gl.constexpr = problem.config.static
    started = start_scores(problem, shared, group, i)
    do = shared.do.wait(i)
    dp = _start_dp(problem, shared, group, do)
    s = warpgroup_mma_wait(1, deps=(started,))
    p, sloped = _probabilities(problem, shared, group, tile, i, m_start, s, masked)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    ds = _score_gradient(problem, shared, i, p, sloped, dp)
    shared.do.release(i)
    operand: gl.constexpr = gl.DotOperandLayout(0, c.dk_accumulator, 2)
    q = shared.q.tile(i)
    dk = warpgroup_mma(gl.convert_layout(ds, operand, assert_trivial=True), q, state.dk, is_async=True)
    dk = warpgroup_mma_wait(0, deps=(dk,))
    shared.q.release(i)
    return State(state.s, dk, state.dv)


@gluon.jit
def step_v(problem, shared, group: gl.constexpr, tile, i, m_start, state, masked: gl.constexpr,
           closes: gl.constexpr = False):  # fmt: skip
    """Block i for dV alone: scores of the next block in flight while the exponentials run."""
    c: gl.constexpr = problem.config.static
    if not closes:
        started = start_scores(problem, shared, group, i + 1)
    do = shared.do.wait(i)
    p, _sloped = _probabilities(problem, shared, group, tile, i, m_start, state.s, masked)
    operand: gl.constexpr = gl.DotOperandLayout(0, c.dv_accumulator, 2)
    p16 = gl.convert_layout(p.to(c.dtype), operand, assert_trivial=True)
    dv = warpgroup_mma(p16, do, state.dv, is_async=True)
    s = state.s
    if not closes:
        s = warpgroup_mma_wait(1, deps=(started,))
        shared.q.release(i + 1)
    dv = warpgroup_mma_wait(0, deps=(dv,))
    shared.do.release(i)
    return State(s, state.dk, dv)
