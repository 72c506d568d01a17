"""dK and dV, for head dimensions whose dK and dV together fill the registers of one warpgroup.

One program per 64 keys of a KV head, one producer warp and two consumer warpgroups: one owns dV and makes P,
the other owns dK and takes P from shared memory. Per block of 64 query rows, with S^T(i) and dP^T(i) there:

    values: P^T = exp2(S^T * scale - lse)    | keys: take P^T
            put P^T into shared memory       |       dS^T = P^T * (dP^T - delta)
            start dV += P^T dO               |       start dK += dS^T Q
            start S^T(i+1) = K Q^T           |       start dP^T(i+1) = V dO^T
            wait for both, hand back dO(i)   |       wait for both, hand back Q(i)

While one does its exponentials or its dS the other has the tensor cores. Four products a block: nothing is
computed twice. Who hands a stage back is the last to read it, so one arrival is enough: dK(i) comes after
S(i) and P(i); and dP(i) comes before dK(i+1), after which the producer loads the Q that comes before the dO
that overwrites dO(i). P(i) has the stage of Q(i), and is taken when that is loaded again.

dQ has a kernel of its own, kernels/backward_queries.py. See docs/kernels/backward.md.
"""

from tandem_attn.device.gluon import (
    aggregate,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon,
    mbarrier,
    reinterpreted,
    tma_store_wait,
    warpgroup_mma_wait,
)
from tandem_attn.device.mask import apply_mask_transposed
from tandem_attn.device.pieces import finished, start_product, start_sum, zeros
from tandem_attn.device.ring import make_barriers
from tandem_attn.device.row_ring import RowRing, make_row_ring
from tandem_attn.device.schedule import Rows, only_tile
from tandem_attn.device.sequence import LENGTHS
from tandem_attn.device.softmax import gradient_scale, recomputed
from tandem_attn.kernels.backward_tile import NUMBERS, Problem, make_tile, producer, store_keys


@aggregate
class Shared:
    """What the partitions share."""

    k: gl.shared_memory_descriptor  # [k_pieces, 64, qk_width]
    v: gl.shared_memory_descriptor  # [v_chunks, 64, v_width]
    kv_full: gl.shared_memory_descriptor  # K, V
    q: RowRing  # Q with delta: whoever needs delta is the last to need Q
    do: RowRing  # dO with lse (base 2), likewise
    p: gl.shared_memory_descriptor  # [stages, 64, tile_m]: P^T
    p_full: gl.shared_memory_descriptor


@gluon.jit
def _put(problem, shared, i, p):
    """P^T of block i, for the other consumer. No fence: neither TMA nor wgmma reads it."""
    stage = i % problem.config.static.stages
    shared.p.index(stage).store(p)
    mbarrier.arrive(shared.p_full.index(stage), count=1)


@gluon.jit
def _take(problem, shared, i):
    """P^T of block i."""
    c: gl.constexpr = problem.config.static
    mbarrier.wait(shared.p_full.index(i % c.stages), i // c.stages & 1)
    return shared.p.index(i % c.stages).load(c.s_accumulator)


@gluon.jit
def _advance(x, p, ring, i, keys, other, s, closes: gl.constexpr):
    """Add p times block i of `ring` to x, a gradient; beside it, unless it `closes`, the product of keys and
    block i + 1 of the other ring, which comes instead of s. Hands block i back. Returns (s, x)."""
    operand: gl.constexpr = gl.DotOperandLayout(0, x[0].type.layout, 2)
    started = start_sum(gl.convert_layout(p, operand, assert_trivial=True), ring, i, x)
    if closes:
        x = finished(started, ring.chunks)
    else:
        layout: gl.constexpr = s.type.layout
        following = start_product(keys, 0, other, i + 1, layout)
        x = finished(started, ring.chunks, other.chunks)
        ring.release(i)
        s = warpgroup_mma_wait(0, deps=(following,))
    return s, x


@gluon.jit
def _value_step(problem, shared, tile, i, m_start, s, dv, masked: gl.constexpr, closes: gl.constexpr = False):
    """Block i: (S^T of the next, dV). `closes`: there is no next."""
    c: gl.constexpr = problem.config.static
    shared.do.wait(i)
    lse = gl.expand_dims(shared.do.stats(i, gl.SliceLayout(0, c.s_accumulator)), 0)
    p, sloped = recomputed(problem, s, lse, tile.mask, tile.n_start, m_start, masked, apply_mask_transposed)
    p16 = p.to(c.dtype)
    _put(problem, shared, i, sloped.to(c.dtype) if c.softcap else p16)
    return _advance(dv, p16, shared.do, i, shared.k, shared.q, s, closes)


@gluon.jit
def _value_blocks(problem, shared, tile, g, s, dv, begin, end, masked: gl.constexpr):
    """Blocks begin to end - 1 of query head g of the part."""
    c: gl.constexpr = problem.config.static
    first = g * (tile.end - tile.begin) - tile.begin
    for m in range(begin, end):
        m_start = tile.block(problem, m) * c.tile_m
        s, dv = _value_step(problem, shared, tile, first + m, m_start, s, dv, masked)
    return s, dv


@gluon.jit
def _values(problem, shared, tile, dv_out):
    """The consumer that owns dV."""
    c: gl.constexpr = problem.config.static
    mbarrier.wait(shared.kv_full.index(0), 0)
    s = warpgroup_mma_wait(0, deps=(start_product(shared.k, 0, shared.q, 0, c.s_accumulator),))
    dv = zeros(64, c.v_width, c.v_chunks, c.dv_accumulator)
    for g in range(problem.heads):
        end = tile.end - gl.where(g == problem.heads - 1, 1, 0)
        whole = tile.begin
        if c.Mask.masks:
            masked_end = gl.minimum(tile.whole_begin, end)
            s, dv = _value_blocks(problem, shared, tile, g, s, dv, tile.begin, masked_end, True)
            whole = tile.whole_begin
        whole_end = gl.minimum(tile.whole_end, end)
        s, dv = _value_blocks(problem, shared, tile, g, s, dv, whole, whole_end, False)
        if c.Mask.has_left_edge:
            s, dv = _value_blocks(problem, shared, tile, g, s, dv, tile.whole_end, end, True)
    if tile.count > 0:  # the last block, after which there are no scores to be computed
        m_start = tile.block(problem, tile.end - 1) * c.tile_m
        s, dv = _value_step(problem, shared, tile, tile.count - 1, m_start, s, dv, c.Mask.masks, True)
    pieces: gl.constexpr = c.k_pieces * c.qk_width // c.v_width
    # which only this consumer reads
    smem = reinterpreted(shared.k, c.dtype.value, [pieces, 64, c.v_width], c.v_layout)
    for n in gl.static_range(c.v_chunks):
        store_keys(problem, tile, tile.n_start, smem.index(n), dv[n], dv_out, n, c.v_chunks)
    tma_store_wait(0)


@gluon.jit
def _key_step(problem, shared, i, dp, dk, closes: gl.constexpr = False):
    """Block i: (dP^T of the next, dK). `closes`: there is no next."""
    c: gl.constexpr = problem.config.static
    shared.q.wait(i)
    delta = gl.expand_dims(shared.q.stats(i, gl.SliceLayout(0, c.s_accumulator)), 0)
    ds = (_take(problem, shared, i).to(gl.float32) * (dp - delta)).to(c.dtype)
    return _advance(dk, ds, shared.q, i, shared.v, shared.do, dp, closes)


@gluon.jit
def _keys(problem, shared, tile, dk_out):
    """The consumer that owns dK."""
    c: gl.constexpr = problem.config.static
    mbarrier.wait(shared.kv_full.index(1), 0)
    dp = warpgroup_mma_wait(0, deps=(start_product(shared.v, 0, shared.do, 0, c.s_accumulator),))
    dk = zeros(64, c.qk_width, c.qk_chunks, c.dk_accumulator)
    for i in range(tile.count - 1):
        dp, dk = _key_step(problem, shared, i, dp, dk)
    if tile.count > 0:
        dp, dk = _key_step(problem, shared, tile.count - 1, dp, dk, True)
    for n in gl.static_range(c.qk_chunks):  # by a stage of Q that nobody reads, nor is written any more
        smem = shared.q.chunk(gl.maximum(tile.count, 1), n)
        store_keys(problem, tile, tile.n_start, smem, dk[n] * problem.scale, dk_out, n, c.qk_chunks)
    tma_store_wait(0)


@gluon.jit
def _make_shared(q_desc, k_desc, v_desc, do_desc, stat_desc, config: gl.constexpr):
    c: gl.constexpr = config.static
    q_empty, do_empty = make_barriers(c.stages, 1), make_barriers(c.stages, 1)
    return Shared(
        gl.allocate_shared_memory(c.dtype, [c.k_pieces, 64, c.qk_width], c.k_layout),
        gl.allocate_shared_memory(c.dtype, [c.v_chunks, 64, c.v_width], c.v_layout),
        make_barriers(2, 1),
        make_row_ring(q_desc, stat_desc, c.tile_m, c.qk_width, c.qk_chunks, c.stages, q_empty),
        make_row_ring(do_desc, stat_desc, c.tile_m, c.v_width, c.v_chunks, c.stages, do_empty),
        gl.allocate_shared_memory(c.dtype, [c.stages, 64, c.tile_m], c.p_layout),
        make_barriers(c.stages, 1),
    )


# nothing about lengths, heads or alignment makes another kernel
@gluon.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LENGTHS)
def key_gradients(q_desc, k_desc, v_desc, do_desc, stat_desc, dk_out, dv_out, cu_seqlens_q, cu_seqlens_k,
                  seqused_q, seqused_k, batch, num_parts, parts, heads, seqlen_q, seqlen_k, window_left,
                  window_right, padded_rows, delta_start, group, heads_magic, group_magic, last_magic,
                  tiles_magic, scale_log2, inner_scale, config: gl.constexpr):  # fmt: skip
    """Arguments as in kernels/backward.py."""
    c: gl.constexpr = config.static
    gdc_launch_dependents()
    scale = gradient_scale(scale_log2, inner_scale, c.softcap)
    problem = Problem(num_parts, heads, padded_rows, delta_start, scale, scale_log2, inner_scale, config)
    by_keys = c.Sequences.create(seqlen_k, seqlen_q, cu_seqlens_k, cu_seqlens_q, seqused_k, seqused_q)
    rows = Rows(num_parts, heads_magic, group, group_magic, last_magic, tiles_magic)
    found, block, part, index = only_tile(c.Schedule, by_keys, batch, rows, c.tile_n)
    sequence = by_keys.sequence(index).swapped()
    if found:
        tile = make_tile(problem, sequence, index, block, part, parts, window_left, window_right)
        shared = _make_shared(q_desc, k_desc, v_desc, do_desc, stat_desc, config)
        gl.warp_specialize([
            (_values, (problem, shared, tile, dv_out)),
            (_keys, (problem, shared, tile, dk_out)),
            (producer, (problem, shared, tile, q_desc, k_desc, v_desc, do_desc, stat_desc)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gdc_wait()  # so that the end of this kernel tells that the one before has ended
