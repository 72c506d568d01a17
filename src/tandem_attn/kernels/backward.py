"""FlashAttention-3 backward for sm_90a: one producer warp, two consumer warpgroups (arXiv 2407.08608,
alg. 3).

One program per 128 keys of a KV head. K and V stay in shared memory; the producer streams blocks of query
rows (Q, dO, and the numbers lse and delta of each row) of all query heads of the group. A consumer owns 64
keys and works on transposed scores, so that P^T and dS^T are wgmma operands straight from registers, and dK
and dV stay in registers to the end. Step i, with S^T(i) = K Q^T already there:

    start dP^T = V dO^T                          | P^T = exp2(S^T * scale - lse)
    start dV  += P^T dO                          | wait for dP^T; dS^T = P^T * (dP^T - delta)
                                                 | put dS^T(i) into shared memory, for both consumers
    start dQ   = dS(i-1) K,  start dK += dS^T Q  | wait for dV, dQ; add dQ(i-1) to global memory
    start S^T(i+1)                               | wait for all; hand the block back

dQ lags by one block, so that consumers need not meet inside a step; each makes one half of it. Whatever a
step starts it also waits for: one wgmma in flight across the loop's back edge, and ptxas serialises all.
Where dK and dV do not fit in registers together (head_dim 192 and 256) there are two launches, one for dK
and one for dV, and dQ has a kernel of its own, kernels/backward_queries.py. Why each of these is so, what it
measured, and the budgets: docs/kernels/backward.md.
"""

from tandem_attn.device.accumulate import Place, make_adds
from tandem_attn.device.gluon import (
    aggregate,
    base_value,
    fence_async_shared,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon,
    mbarrier,
    reinterpreted,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from tandem_attn.device.mask import apply_mask_transposed
from tandem_attn.device.precision import product16
from tandem_attn.device.ring import make_barriers
from tandem_attn.device.row_ring import RowRing, hidden, make_row_ring
from tandem_attn.device.schedule import Rows
from tandem_attn.device.softmax import gradient_scale, recomputed
from tandem_attn.device.turn import named_barrier

EVERYONE = gl.constexpr(8)  # hardware barrier at which the consumers meet


@aggregate
class Problem:
    """What the caller asked for."""

    num_heads: gl.tensor
    group_size: gl.tensor  # query heads per KV head
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
    kv_head: gl.tensor
    n_start: gl.tensor
    begin: gl.tensor
    end: gl.tensor
    whole_begin: gl.tensor  # of which whole_begin to whole_end - 1 see all keys
    whole_end: gl.tensor
    count: gl.tensor  # blocks of all query heads together
    turn: gl.tensor  # where all blocks are alike: begin with this one

    @gluon.jit
    def block(self, m):
        """Block to visit as number m. Programs that run side by side then add to different rows of dQ."""
        m += self.turn
        return m - gl.where(m >= self.end, self.end, 0)

    @gluon.jit
    def statistics(self, problem, g):
        """First row, in the padded row statistics, of query head g of the group."""
        head = self.kv_head * problem.group_size + g
        return self.sequence.padded_row(self.index, head, problem.num_heads, problem.padded_rows)


@aggregate
class State:
    """What a step leaves to the next."""

    s: gl.tensor  # S^T of the next block, if scores are computed ahead
    dk: gl.tensor
    dv: gl.tensor


@gluon.jit
def _start_scores(problem, shared, group: gl.constexpr, i):
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
def _start_dq(problem, shared, group: gl.constexpr, t):
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
def _put_ds(problem, shared, group: gl.constexpr, t, ds):
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
def _step(problem, shared, adds, group: gl.constexpr, tile, i, m_start, state, masked: gl.constexpr):
    """Block i with scores computed ahead: see the top of the file. Returns the next state."""
    c: gl.constexpr = problem.config.static
    do = shared.do.wait(i)
    dp = _start_dp(problem, shared, group, do)
    p, sloped = _probabilities(problem, shared, group, tile, i, m_start, state.s, masked)
    p16 = p.to(c.dtype)
    operand: gl.constexpr = gl.DotOperandLayout(0, c.dv_accumulator, 2)
    dv = warpgroup_mma(gl.convert_layout(p16, operand, assert_trivial=True), do, state.dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds = _score_gradient(problem, shared, i, p16, sloped, dp)
    _put_ds(problem, shared, group, i + 1, ds)
    dq = _start_dq(problem, shared, group, i)
    operand_k: gl.constexpr = gl.DotOperandLayout(0, c.dk_accumulator, 2)
    q = shared.q.tile(i)
    dk = warpgroup_mma(gl.convert_layout(ds, operand_k, assert_trivial=True), q, state.dk, is_async=True)
    dv, dq = warpgroup_mma_wait(1, deps=(dv, dq))
    if i > 0:
        adds.put(group, i - 1, dq)
    s = _start_scores(problem, shared, group, gl.minimum(i + 1, tile.count - 1))  # the last is of no use
    dk, dv, s = warpgroup_mma_wait(0, deps=(dk, dv, s))
    shared.q.release(i)
    return State(s, dk, dv)


@gluon.jit
def _skipped(problem, shared, adds, group: gl.constexpr, tile, i, state):
    """Block i, of which none of this consumer's keys sees a row: nothing but its half of dQ is to be done."""
    c: gl.constexpr = problem.config.static
    shared.do.wait(i)  # a phase must not be lapped
    _put_ds(problem, shared, group, i + 1, gl.zeros([64, c.tile_m], c.dtype, c.s_accumulator))
    dq = warpgroup_mma_wait(0, deps=(_start_dq(problem, shared, group, i),))
    if i > 0:
        adds.put(group, i - 1, dq)
    started = _start_scores(problem, shared, group, gl.minimum(i + 1, tile.count - 1))
    s = warpgroup_mma_wait(0, deps=(started,))
    shared.q.release(i)
    return State(s, state.dk, state.dv)


@gluon.jit
def _step_k(problem, shared, group: gl.constexpr, tile, i, m_start, state, masked: gl.constexpr):
    """Block i for dK alone: the exponentials run beside dP."""
    c: gl.constexpr = problem.config.static
    started = _start_scores(problem, shared, group, i)
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
def _step_v(problem, shared, group: gl.constexpr, tile, i, m_start, state, masked: gl.constexpr):
    """Block i for dV alone: scores of the next block in flight while the exponentials run."""
    c: gl.constexpr = problem.config.static
    started = _start_scores(problem, shared, group, gl.minimum(i + 1, tile.count - 1))
    do = shared.do.wait(i)
    p, _sloped = _probabilities(problem, shared, group, tile, i, m_start, state.s, masked)
    operand: gl.constexpr = gl.DotOperandLayout(0, c.dv_accumulator, 2)
    p16 = gl.convert_layout(p.to(c.dtype), operand, assert_trivial=True)
    dv = warpgroup_mma(p16, do, state.dv, is_async=True)
    s = warpgroup_mma_wait(1, deps=(started,))
    if i + 1 < tile.count:
        shared.q.release(i + 1)
    dv = warpgroup_mma_wait(0, deps=(dv,))
    shared.do.release(i)
    return State(s, state.dk, dv)


@gluon.jit
def _place(problem, tile, group: gl.constexpr, statistics, m):
    """Where this consumer's half of dQ of block m goes."""
    c: gl.constexpr = problem.config.static
    chunk = (statistics + m * c.tile_m) // 64 * (c.head_dim // 64) + group
    rank = chunk * 0
    if c.ordered:
        m_start = m * c.tile_m
        n_end, count, right, left = tile.mask.key_blocks(m_start, m_start + c.tile_m, c.tile_n)
        rank = n_end - 1 - tile.n_start // c.tile_n
    return Place(chunk, rank)


@gluon.jit
def _blocks(problem, shared, adds, group: gl.constexpr, tile, g, state, begin, end, masked: gl.constexpr):
    """Blocks begin to end - 1 of query head g of the group."""
    c: gl.constexpr = problem.config.static
    first = g * (tile.end - tile.begin) - tile.begin
    for m in range(begin, end):
        i = first + m
        m_start = tile.block(m) * c.tile_m
        if c.with_q:
            state = _step(problem, shared, adds, group, tile, i, m_start, state, masked)
        elif c.with_k:
            state = _step_k(problem, shared, group, tile, i, m_start, state, masked)
        else:
            state = _step_v(problem, shared, group, tile, i, m_start, state, masked)
    return state


@gluon.jit
def _consumer(group: gl.constexpr, problem, shared, adds, tile, dk_desc, dv_desc):
    c: gl.constexpr = problem.config.static
    s = gl.zeros([64, c.tile_m], gl.float32, c.s_accumulator)
    if c.with_q:
        _put_ds(problem, shared, group, 0, s.to(c.dtype))
    mbarrier.wait(shared.kv_full.index(0), 0)
    if c.with_v:  # scores are computed ahead
        s = warpgroup_mma_wait(0, deps=(_start_scores(problem, shared, group, 0),))
        if not c.joint:
            shared.q.release(0)
    if c.with_k:
        mbarrier.wait(shared.kv_full.index(1), 0)
    dk = gl.zeros([64, c.head_dim], gl.float32, c.dk_accumulator)
    dv = gl.zeros([64, c.head_dim_v], gl.float32, c.dv_accumulator)
    state = State(s, dk, dv)
    for g in range(problem.group_size):
        whole = tile.begin
        if c.Mask.masks:
            begin = tile.begin
            if c.skips and group > 0:
                seen = tile.mask.query_blocks(tile.n_start + 64 * group, tile.n_start + c.tile_n, c.tile_m)
                begin = gl.maximum(gl.minimum(seen[0], tile.whole_begin), begin)
                for m in range(tile.begin, begin):
                    i = g * (tile.end - tile.begin) + m - tile.begin
                    state = _skipped(problem, shared, adds, group, tile, i, state)
            state = _blocks(problem, shared, adds, group, tile, g, state, begin, tile.whole_begin, True)
            whole = tile.whole_begin
        state = _blocks(problem, shared, adds, group, tile, g, state, whole, tile.whole_end, False)
        if c.Mask.has_left_edge:
            state = _blocks(problem, shared, adds, group, tile, g, state, tile.whole_end, tile.end, True)
    if c.with_v:  # noqa: SIM102 (known at compile time, unlike the inner one)
        if tile.count == 0:
            shared.do.wait(0)  # no load may be under way when the program ends
    n_start = tile.n_start + 64 * group
    coords = tile.sequence.coords("k", tile.kv_head, n_start, 0)
    if c.with_q:
        started = _start_dq(problem, shared, group, tile.count)
    if c.with_v:  # a consumer's half of V, or for dV alone of K, is read by itself alone
        smem = reinterpreted(shared.v, c.dtype.value, [2, 64, c.head_dim_v], c.v_layout)
        if not c.with_k:
            named_barrier("bar.sync", EVERYONE, 256)  # of different sizes, halves overlap
        _store(smem.index(group), state.dv.to(c.dtype), dv_desc, coords)
    if c.with_q:
        dq = warpgroup_mma_wait(0, deps=(started,))
        if tile.count > 0:
            adds.put(group, tile.count - 1, dq)
        named_barrier("bar.sync", EVERYONE, 256)  # both have read all of K
    if c.with_k:
        _store(shared.k.index(group), (state.dk * problem.scale).to(c.dtype), dk_desc, coords)
    tma_store_wait(0)


@gluon.jit
def _store(smem, x, desc, coords):
    """Registers to shared memory and on to global memory."""
    smem.store(x)
    fence_async_shared()
    tma_store(desc, coords, smem.reshape(desc.block_type.shape))


@gluon.jit
def _load_keys(shared, number: gl.constexpr, smem, desc, tile):
    """Start the loads of both halves of K or V."""
    full = shared.kv_full.index(number)
    mbarrier.expect(full, 2 * desc.block_type.nbytes)
    for half in gl.static_range(2):
        coords = tile.sequence.coords("k", tile.kv_head, tile.n_start + 64 * half, 0)
        tma_load(desc, coords, full, smem.index(half).reshape(desc.block_type.shape))


@gluon.jit
def _producer(problem, shared, tile, q_desc, k_desc, v_desc, do_desc, stat_desc):
    c: gl.constexpr = problem.config.static
    _load_keys(shared, 0, shared.k, k_desc, tile)
    if c.with_k:
        _load_keys(shared, 1, shared.v, v_desc, tile)
    gdc_wait()  # for the row statistics; keys, queries and dO were there before prepare_rows
    heads = problem.group_size
    end = tile.end
    if c.with_v:  # consumers look at block 0 in any case
        heads = gl.where(tile.count > 0, heads, 1)
        end = gl.maximum(end, tile.begin + 1)
    i = 0
    for g in range(heads):
        head = tile.kv_head * problem.group_size + g
        statistics = tile.statistics(problem, g)
        for m in range(tile.begin, end):
            row = tile.block(m) * c.tile_m
            coords = tile.sequence.coords("q", head, row, 0)
            shared.q.acquire(i)
            shared.q.fill(i, q_desc, stat_desc, coords, statistics + row)
            if not c.joint:
                shared.do.acquire(i)
            with_do = statistics + row
            if c.with_k:
                with_do += problem.delta_start
            shared.do.fill(i, do_desc, stat_desc, coords, with_do)
            i += 1


@gluon.jit
def _add_dq(group: gl.constexpr, problem, adds, tile):
    """The warp that adds what one consumer has put."""
    number = 0
    before = tile.begin * 0 - 1
    gdc_wait()  # counters are zero
    for g in range(problem.group_size):
        statistics = tile.statistics(problem, g)
        for m in range(tile.begin, tile.end):
            place = _place(problem, tile, group, statistics, tile.block(m))
            before = adds.add(group, number, place, before)
            number += 1
    adds.finish(before)


@gluon.jit
def _make_shared(q_desc, k_desc, v_desc, do_desc, stat_desc, config: gl.constexpr):
    c: gl.constexpr = config.static
    k = gl.allocate_shared_memory(c.dtype, [2, 64, c.head_dim], c.k_layout)
    q_empty = make_barriers(c.q_stages, 2)
    do_empty = q_empty if c.joint else make_barriers(c.do_stages, 2)
    q = make_row_ring(q_desc, stat_desc, c.tile_m, c.head_dim, c.q_stages, q_empty)
    do = make_row_ring(do_desc, stat_desc, c.tile_m, c.head_dim_v, c.do_stages, do_empty)
    v = k
    ds = k
    if c.with_k:
        v = gl.allocate_shared_memory(c.dtype, [2, 64, c.head_dim_v], c.v_layout)
    if c.with_q:
        ds = gl.allocate_shared_memory(c.dtype, [2 * c.ds_stages, 64, c.tile_m], c.ds_layout)
    return Shared(k, v, make_barriers(2, 1), q, do, ds, make_barriers(c.ds_stages, 2))


# nothing about lengths, heads or alignment makes another kernel
@gluon.jit(
    do_not_specialize=[
        *("batch", "num_kv_heads", "heads_magic", "group_size", "seqlen_q", "seqlen_k", "window_left"),
        *("window_right", "padded_rows", "delta_start", "group", "group_magic", "last_magic", "tiles_magic"),
    ],
    do_not_specialize_on_alignment=["cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"],
)
def attention_backward(q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, dq_desc, stat_desc, counters,
                       cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, batch, num_kv_heads, group_size,
                       seqlen_q, seqlen_k, window_left, window_right, padded_rows, delta_start, group,
                       heads_magic, group_magic, last_magic, tiles_magic, scale_log2, inner_scale,
                       config: gl.constexpr):  # fmt: skip
    """seqlen_q, seqlen_k, cu_seqlens, seqused, group and ..._magic: as in the forward kernel, for tiles of
    keys; dq_desc: the accumulator; counters: int32 zeros, one per chunk of it."""
    c: gl.constexpr = config.static
    gdc_launch_dependents()
    scale = gradient_scale(scale_log2, inner_scale, c.softcap)
    problem = Problem(num_kv_heads * group_size, group_size, padded_rows, delta_start, scale, scale_log2,
                      inner_scale, config)  # fmt: skip
    # tiles of keys in the order of the forward's tiles of rows: lengths change places
    by_keys = c.Sequences.create(seqlen_k, seqlen_q, cu_seqlens_k, cu_seqlens_q, seqused_k, seqused_q)
    rows = Rows(num_kv_heads, heads_magic, group, group_magic, last_magic, tiles_magic)
    schedule = c.Schedule.create(by_keys, batch, rows, gl.to_tensor(1), c.tile_n)
    found, block, kv_head, index, _after = schedule.tile(gl.program_id(0))
    sequence = by_keys.sequence(index).swapped()
    if found:
        mask = c.Mask(sequence.seqlen_q, sequence.seqlen_k, window_left, window_right)
        # The schedule begins with the last blocks. Where keys add to dQ in order, that lets each tile of keys
        # run two blocks behind the one it waits for; else the long ones, which are the first, go first.
        if not c.ordered:
            block = (sequence.seqlen_k + (c.tile_n - 1)) // c.tile_n - 1 - block
        n_start = block * c.tile_n
        begin, end, whole_begin, whole_end = mask.query_blocks(n_start, n_start + c.tile_n, c.tile_m)
        blocks = (end - begin) * group_size
        turn = begin * 0
        if c.rotates:
            turn = n_start // c.tile_m % gl.maximum(end, 1)
        tile = Tile(sequence, index, mask, kv_head, n_start, gl.to_tensor(begin), end,
                    gl.to_tensor(whole_begin), whole_end, blocks, gl.to_tensor(turn))  # fmt: skip
        shared = _make_shared(q_desc, k_desc, v_desc, do_desc, stat_desc, config)
        if c.with_q:
            adds = make_adds(dq_desc, counters, c.ordered)
            gl.warp_specialize([
                (_consumer, (0, problem, shared, adds, tile, dk_desc, dv_desc)),
                (_consumer, (1, problem, shared, adds, tile, dk_desc, dv_desc)),
                (_producer, (problem, shared, tile, q_desc, k_desc, v_desc, do_desc, stat_desc)),
                (_add_dq, (0, problem, adds, tile)),
                (_add_dq, (1, problem, adds, tile)),
            ], [4, 1, 1, 1], [240, 24, 24, 24])  # fmt: skip
        else:
            gl.warp_specialize([
                (_consumer, (0, problem, shared, None, tile, dk_desc, dv_desc)),
                (_consumer, (1, problem, shared, None, tile, dk_desc, dv_desc)),
                (_producer, (problem, shared, tile, q_desc, k_desc, v_desc, do_desc, stat_desc)),
            ], [4, 1], [240, 24])  # fmt: skip
    else:
        gdc_wait()  # so that the end of this kernel tells that the one before has ended
