"""dQ alone, for head dimensions whose dK and dV fill the registers: rows stay, keys stream.

The mirror image of kernels/backward.py. One program per 128 query rows of a head, one producer warp and two
consumer warpgroups of 64 rows each. Per block of 64 keys:

    start S  = Q K^T                 | wait for S
    start dP = dO V^T  (in flight)   | P = exp2(S * scale - lse); wait for dP; dS = P * (dP - delta)
    start dQ += dS K                 | wait for dQ, hand K back

Scores and dP are computed a second time, but nothing is added up in global memory: at head_dim 256 that add
alone (64 KB per 64 x 128 block) takes longer than this. See docs/kernels/backward.md.
"""

from tandem_attn.device.division import divided
from tandem_attn.device.gluon import (
    aggregate,
    base_value,
    fence_async_shared,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon,
    mbarrier,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma_wait,
)
from tandem_attn.device.mask import apply_mask
from tandem_attn.device.pieces import finished, start_product, start_sum, zeros
from tandem_attn.device.ring import Ring, first_fill, make_barriers, make_ring
from tandem_attn.device.schedule import Rows, only_tile
from tandem_attn.device.sequence import LENGTHS
from tandem_attn.device.softmax import gradient_scale, recomputed


@aggregate
class Problem:
    """What the caller asked for."""

    scale: gl.tensor  # of dQ
    scale_log2: gl.tensor  # score (or capped score) to exponent of 2
    inner_scale: gl.tensor  # softmax_scale / softcap
    config: gl.constexpr  # QueryGradientConfig


@aggregate
class Shared:
    """What the partitions share."""

    q: gl.shared_memory_descriptor  # [2 * qk_chunks, 64, qk_width]: the rows of each consumer
    do: gl.shared_memory_descriptor
    rows_full: gl.shared_memory_descriptor  # Q and dO of each consumer
    k: Ring
    v: Ring


@aggregate
class Tile:
    """The query rows of a program and their key blocks, counted from the last one back."""

    sequence: base_value  # DenseSequence or PackedSequence
    mask: base_value
    head: gl.tensor
    kv_head: gl.tensor
    m_start: gl.tensor
    statistics: gl.tensor  # index of the first row in the padded row statistics
    n_end: gl.tensor
    count: gl.tensor
    right_edge: gl.tensor
    left_edge: gl.tensor


@gluon.jit
def _step(problem, shared, group: gl.constexpr, tile, j, lse, delta, dq, masked: gl.constexpr):
    """Key block j, counted from the last one back: the next dQ."""
    c: gl.constexpr = problem.config.static
    i = first_fill(c.k_stages) + j
    u = first_fill(c.v_stages) + j
    s = start_product(shared.q, group * c.qk_chunks, shared.k, i, c.s_accumulator)
    dp = start_product(shared.do, group * c.v_chunks, shared.v, u, c.s_accumulator)
    s = warpgroup_mma_wait(c.v_chunks, deps=(s,))
    m_start = tile.m_start + 64 * group
    n_start = (tile.n_end - 1 - j) * c.tile_n
    lse = gl.expand_dims(lse, 1)
    _p, p = recomputed(problem, s, lse, tile.mask, m_start, n_start, masked, apply_mask)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    shared.v.release(u)
    ds = (p * (dp - gl.expand_dims(delta, 1))).to(c.dtype)
    operand: gl.constexpr = gl.DotOperandLayout(0, c.dq_accumulator, 2)
    ds = gl.convert_layout(ds, operand, assert_trivial=True)
    dq = finished(start_sum(ds, shared.k, i, dq), c.qk_chunks)
    shared.k.release(i)
    return dq


@gluon.jit
def _blocks(problem, shared, group: gl.constexpr, tile, lse, delta, dq, begin, end, masked: gl.constexpr):
    for j in range(begin, end):
        dq = _step(problem, shared, group, tile, j, lse, delta, dq, masked)
    return dq


@gluon.jit
def _consumer(group: gl.constexpr, problem, shared, tile, stat_ptr, delta_start, dq_desc):
    c: gl.constexpr = problem.config.static
    row: gl.constexpr = gl.SliceLayout(1, c.s_accumulator)
    gdc_wait()
    at = stat_ptr + tile.statistics + 64 * group + gl.arange(0, 64, row)
    lse = gl.load(at)
    delta = gl.load(at + delta_start)
    dq = zeros(64, c.qk_width, c.qk_chunks, c.dq_accumulator)
    mbarrier.wait(shared.rows_full.index(group), 0)
    whole = 0
    if c.Mask.masks:
        dq = _blocks(problem, shared, group, tile, lse, delta, dq, 0, tile.right_edge, True)
        whole = tile.right_edge
    dq = _blocks(problem, shared, group, tile, lse, delta, dq, whole, tile.left_edge, False)
    if c.Mask.has_left_edge:
        dq = _blocks(problem, shared, group, tile, lse, delta, dq, tile.left_edge, tile.count, True)
    seen = gl.convert_layout(lse, gl.SliceLayout(1, c.dq_accumulator), assert_trivial=True) < float("inf")
    for n in gl.static_range(c.qk_chunks):
        # where no key is seen P is 0, but dO may be NaN
        x = gl.where(gl.expand_dims(seen, 1), dq[n] * problem.scale, 0.0)
        smem = shared.q.index(group * c.qk_chunks + n)
        smem.store(x.to(c.dtype))
        fence_async_shared()
        coords = tile.sequence.coords("q", tile.head, tile.m_start + 64 * group, n * c.qk_width)
        tma_store(dq_desc, coords, smem.reshape(dq_desc.block_type.shape))
    tma_store_wait(0)


@gluon.jit
def _load_rows(full, smem, desc, tile, group: gl.constexpr, chunks: gl.constexpr):
    """Start the loads of a consumer's rows of Q or dO."""
    for n in gl.static_range(chunks):
        coords = tile.sequence.coords("q", tile.head, tile.m_start + 64 * group, n * smem.shape[2])
        tma_load(desc, coords, full, smem.index(group * chunks + n).reshape(desc.block_type.shape))


@gluon.jit
def _producer(problem, shared, tile, q_desc, k_desc, v_desc, do_desc):
    c: gl.constexpr = problem.config.static
    for group in gl.static_range(2):
        full = shared.rows_full.index(group)
        mbarrier.expect(full, c.qk_chunks * q_desc.block_type.nbytes + c.v_chunks * do_desc.block_type.nbytes)
        _load_rows(full, shared.q, q_desc, tile, group, c.qk_chunks)
        gdc_wait()  # dO may be a copy by prepare_rows
        _load_rows(full, shared.do, do_desc, tile, group, c.v_chunks)
    for j in range(tile.count):
        n_start = (tile.n_end - 1 - j) * c.tile_n
        shared.k.fill(first_fill(c.k_stages) + j, k_desc, tile.sequence, "k", tile.kv_head, n_start)
        shared.v.fill(first_fill(c.v_stages) + j, v_desc, tile.sequence, "k", tile.kv_head, n_start)


@gluon.jit(
    do_not_specialize=[
        *("batch", "num_heads", "seqlen_q", "seqlen_k", "window_left", "window_right", "padded_rows"),
        *("delta_start", "group", "heads_magic", "group_size_magic", "group_magic", "last_magic"),
        "tiles_magic",
    ],
    do_not_specialize_on_alignment=LENGTHS,
)
def query_gradient(q_desc, k_desc, v_desc, do_desc, dq_desc, stat_ptr, cu_seqlens_q, cu_seqlens_k, seqused_q,
                   seqused_k, batch, num_heads, seqlen_q, seqlen_k, window_left, window_right, padded_rows,
                   delta_start, group, heads_magic, group_size_magic, group_magic, last_magic, tiles_magic,
                   scale_log2, inner_scale, config: gl.constexpr):  # fmt: skip
    """Arguments as in the forward kernel; stat_ptr: lse, and from delta_start on delta, of padded rows."""
    c: gl.constexpr = config.static
    gdc_launch_dependents()
    scale = gradient_scale(scale_log2, inner_scale, c.softcap)
    problem = Problem(scale, scale_log2, inner_scale, config)
    sequences = c.Sequences.create(seqlen_q, seqlen_k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    rows = Rows(num_heads, heads_magic, group, group_magic, last_magic, tiles_magic)
    found, m_block, head, index = only_tile(c.Schedule, sequences, batch, rows, c.tile_rows)
    if found:
        sequence = sequences.sequence(index)
        mask = c.Mask(sequence.seqlen_q, sequence.seqlen_k, window_left, window_right)
        m_start = m_block * c.tile_rows
        n_end, count, right_edge, left_edge = mask.key_blocks(m_start, m_start + c.tile_rows, c.tile_n)
        statistics = sequence.padded_row(index, head, num_heads, padded_rows) + m_start
        tile = Tile(sequence, mask, head, divided(head, group_size_magic), m_start, statistics, n_end, count,
                    gl.to_tensor(right_edge), left_edge)  # fmt: skip
        shared = Shared(
            gl.allocate_shared_memory(c.dtype, [2 * c.qk_chunks, 64, c.qk_width], c.q_layout),
            gl.allocate_shared_memory(c.dtype, [2 * c.v_chunks, 64, c.v_width], c.do_layout),
            make_barriers(2, 1),
            make_ring(k_desc, c.tile_n, c.qk_width, c.qk_chunks, c.k_stages, 2, 0),
            make_ring(v_desc, c.tile_n, c.v_width, c.v_chunks, c.v_stages, 2, 0),
        )
        gl.warp_specialize([
            (_consumer, (0, problem, shared, tile, stat_ptr, delta_start, dq_desc)),
            (_consumer, (1, problem, shared, tile, stat_ptr, delta_start, dq_desc)),
            (_producer, (problem, shared, tile, q_desc, k_desc, v_desc, do_desc)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gdc_wait()  # so that the end of this kernel tells that the one before has ended
