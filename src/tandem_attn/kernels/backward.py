"""FlashAttention-3 backward for sm_90a, up to head_dim 128: one producer warp, two consumer warpgroups, two
warps that add dQ (arXiv 2407.08608, alg. 3).

One program per 128 keys of a KV head. K and V stay in shared memory; the producer streams blocks of query
rows (Q, dO, and the numbers lse and delta of each row) of all query heads of the group, or of a part of them.
What a consumer does with a block: kernels/backward_steps.py. Above head_dim 128 dK and dV of a consumer's
keys do not fit in registers together: kernels/backward_keys.py and kernels/backward_queries.py. Why each of
these is so, what it measured, and the budgets: docs/kernels/backward.md.
"""

from tandem_attn.device.accumulate import Place, make_adds
from tandem_attn.device.gluon import (
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon,
    mbarrier,
    reinterpreted,
    tma_store_wait,
    warpgroup_mma_wait,
)
from tandem_attn.device.ring import make_barriers
from tandem_attn.device.row_ring import make_row_ring
from tandem_attn.device.schedule import Rows, only_tile
from tandem_attn.device.sequence import LENGTHS
from tandem_attn.device.softmax import gradient_scale
from tandem_attn.kernels.backward_steps import Shared, State, put_ds, skipped, start_dq, start_scores, step
from tandem_attn.kernels.backward_tile import NUMBERS, Problem, make_tile, producer, store_keys


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
    """Blocks begin to end - 1 of query head g of the part."""
    c: gl.constexpr = problem.config.static
    first = g * (tile.end - tile.begin) - tile.begin
    for m in range(begin, end):
        i = first + m
        m_start = tile.block(problem, m) * c.tile_m
        state = step(problem, shared, adds, group, tile, i, m_start, state, masked)
    return state


@gluon.jit
def _first_block(problem, shared, adds, group: gl.constexpr, tile, own, state):
    """Block 0 of all, not part of a loop: that saves a dQ and a dS of zeros."""
    c: gl.constexpr = problem.config.static
    m_start = tile.block(problem, tile.begin) * c.tile_m
    if tile.count == 0:
        put_ds(problem, shared, group, 0, gl.zeros([64, c.tile_m], c.dtype, c.s_accumulator))
    elif own > tile.begin:
        state = skipped(problem, shared, adds, group, tile, 0, state, True)
    else:
        state = step(problem, shared, adds, group, tile, 0, m_start, state, c.Mask.masks, True)
    return state


@gluon.jit
def _consumer(group: gl.constexpr, problem, shared, adds, tile, dk_out, dv_out):
    c: gl.constexpr = problem.config.static
    if not c.first_apart:
        put_ds(problem, shared, group, 0, gl.zeros([64, c.tile_m], c.dtype, c.s_accumulator))
    mbarrier.wait(shared.kv_full.index(0), 0)
    s = warpgroup_mma_wait(0, deps=(start_scores(problem, shared, group, 0),))
    mbarrier.wait(shared.kv_full.index(1), 0)
    dk = gl.zeros([64, c.head_dim], gl.float32, c.dk_accumulator)
    dv = gl.zeros([64, c.head_dim_v], gl.float32, c.dv_accumulator)
    own = tile.begin  # first block that this consumer's keys see
    if c.skips and group > 0:
        seen = tile.mask.query_blocks(tile.n_start + 64 * group, tile.n_start + c.tile_n, c.tile_m)
        own = gl.maximum(gl.minimum(seen[0], tile.whole_begin), own)
    state = State(s, dk, dv)
    if c.first_apart:
        state = _first_block(problem, shared, adds, group, tile, own, state)
    for g in range(problem.heads):
        start = tile.begin  # the first block of this head that is done in loops
        if c.first_apart:
            start += gl.where(g == 0, 1, 0)
        whole = start
        if c.Mask.masks:
            if c.skips and group > 0:
                for m in range(start, own):
                    i = g * (tile.end - tile.begin) + m - tile.begin
                    state = skipped(problem, shared, adds, group, tile, i, state)
            begin = gl.maximum(own, start)
            state = _blocks(problem, shared, adds, group, tile, g, state, begin, tile.whole_begin, True)
            whole = gl.maximum(tile.whole_begin, start)
        state = _blocks(problem, shared, adds, group, tile, g, state, whole, tile.whole_end, False)
        if c.Mask.has_left_edge:
            begin = gl.maximum(tile.whole_end, start)
            state = _blocks(problem, shared, adds, group, tile, g, state, begin, tile.end, True)
    if tile.count == 0:
        shared.do.wait(0)  # no load may be under way when the program ends
    started = start_dq(problem, shared, group, gl.maximum(tile.count - 1 + c.first_put, 0))
    n_start = tile.n_start + 64 * group
    smem = shared.v.index(group)  # which only this consumer reads
    store_keys(problem, tile, n_start, smem, state.dv, dv_out, 0, 1)
    smem = _free_stage(shared, group, tile)
    store_keys(problem, tile, n_start, smem, state.dk * problem.scale, dk_out, 0, 1)
    dq = warpgroup_mma_wait(0, deps=(started,))
    if tile.count > 0:
        adds.put(group, tile.count - 1, dq)
    tma_store_wait(0)


@gluon.jit
def _free_stage(shared, group: gl.constexpr, tile):
    """Room for 64 keys that nobody reads, while K is still read for dQ: a stage of Q, or of dO for the second
    consumer. Both have put dS of the last block, so both are through with the block before it."""
    ring = shared.q if group == 0 else shared.do
    rows: gl.constexpr = ring.smem.shape[1]
    shape: gl.constexpr = [ring.num_stages * rows // 64, 64, ring.smem.shape[2]]
    places = reinterpreted(ring.smem, ring.smem.dtype, shape, ring.smem.layout)
    return places.index(gl.maximum(tile.count, 1) % ring.num_stages * (rows // 64))


@gluon.jit
def _add_dq(group: gl.constexpr, problem, adds, tile):
    """The warp that adds what one consumer has put."""
    number = 0
    before = tile.begin * 0 - 1
    gdc_wait()  # counters are zero
    for g in range(problem.heads):
        statistics = tile.statistics(problem, g)
        for m in range(tile.begin, tile.end):
            place = _place(problem, tile, group, statistics, tile.block(problem, m))
            before = adds.add(group, number, place, before)
            number += 1
    adds.finish(before)


@gluon.jit
def _make_shared(q_desc, k_desc, v_desc, do_desc, stat_desc, config: gl.constexpr):
    c: gl.constexpr = config.static
    k = gl.allocate_shared_memory(c.dtype, [2, 64, c.head_dim], c.k_layout)
    empty = make_barriers(c.stages, 2)  # Q and dO go back together: an arrival less
    q = make_row_ring(q_desc, stat_desc, c.tile_m, c.head_dim, 1, c.stages, empty)
    do = make_row_ring(do_desc, stat_desc, c.tile_m, c.head_dim_v, 1, c.stages, empty)
    v = gl.allocate_shared_memory(c.dtype, [2, 64, c.head_dim_v], c.v_layout)
    ds = gl.allocate_shared_memory(c.dtype, [2 * c.ds_stages, 64, c.tile_m], c.p_layout)
    return Shared(k, v, make_barriers(2, 1), q, do, ds, make_barriers(c.ds_stages, 2))


# nothing about lengths, heads or alignment makes another kernel
@gluon.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LENGTHS)
def attention_backward(q_desc, k_desc, v_desc, do_desc, dq_desc, stat_desc, dk_out, dv_out, counters,
                       cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, batch, num_parts, parts, heads,
                       seqlen_q, seqlen_k, window_left, window_right, padded_rows, delta_start, group,
                       heads_magic, group_magic, last_magic, tiles_magic, scale_log2, inner_scale,
                       config: gl.constexpr):  # fmt: skip
    """seqlen_q, seqlen_k, cu_seqlens, seqused, group and ..._magic: as in the forward kernel, for tiles of
    keys; dq_desc: the accumulator; counters: int32 zeros, one per chunk of it; dk_out, dv_out: descriptors,
    or pointers where each KV head's query heads are taken in several `parts`, of `heads` each."""
    c: gl.constexpr = config.static
    gdc_launch_dependents()
    scale = gradient_scale(scale_log2, inner_scale, c.softcap)
    problem = Problem(num_parts, heads, padded_rows, delta_start, scale, scale_log2, inner_scale, config)
    # tiles of keys in the order of the forward's tiles of rows: lengths change places
    by_keys = c.Sequences.create(seqlen_k, seqlen_q, cu_seqlens_k, cu_seqlens_q, seqused_k, seqused_q)
    rows = Rows(num_parts, heads_magic, group, group_magic, last_magic, tiles_magic)
    found, block, part, index = only_tile(c.Schedule, by_keys, batch, rows, c.tile_n)
    sequence = by_keys.sequence(index).swapped()
    if found:
        tile = make_tile(problem, sequence, index, block, part, parts, window_left, window_right)
        shared = _make_shared(q_desc, k_desc, v_desc, do_desc, stat_desc, config)
        adds = make_adds(dq_desc, counters, c.ordered)
        gl.warp_specialize([
            (_consumer, (0, problem, shared, adds, tile, dk_out, dv_out)),
            (_consumer, (1, problem, shared, adds, tile, dk_out, dv_out)),
            (producer, (problem, shared, tile, q_desc, k_desc, v_desc, do_desc, stat_desc)),
            (_add_dq, (0, problem, adds, tile)),
            (_add_dq, (1, problem, adds, tile)),
        ], [4, 1, 1, 1], [240, 24, 24, 24])  # fmt: skip
    else:
        gdc_wait()  # so that the end of this kernel tells that the one before has ended
