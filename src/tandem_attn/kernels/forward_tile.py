"""What both schedules of the forward kernel do with a tile: the query rows of one consumer.

`kernels/forward.py` has P V of a block under way beside the scores of the next, `kernels/forward_serial.py`
one after the other.
"""

from tandem_attn.device.division import divided
from tandem_attn.device.gluon import (
    aggregate,
    base_value,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
)
from tandem_attn.device.mailbox import Mailbox
from tandem_attn.device.mask import apply_mask
from tandem_attn.device.pieces import zeros
from tandem_attn.device.precision import pack_probabilities
from tandem_attn.device.ring import Ring
from tandem_attn.device.softmax import log_sum_exp, row_maximum, soft_capped, thread_sum
from tandem_attn.device.turn import pass_turn


@aggregate
class Problem:
    """What the caller asked for."""

    num_heads: gl.tensor
    group_size_magic: gl.tensor  # for a division by the query heads per KV head
    total_q: gl.tensor  # rows of lse per head: seqlen_q, or all packed rows
    scale_log2: gl.tensor  # capped score to exponent of 2
    precision: base_value  # of what Q, K and V are the numbers
    aside: base_value  # None, or where O is kept that wgmma shall not add to: fp32, a tile per consumer
    window_left: gl.tensor
    window_right: gl.tensor
    config: gl.constexpr  # ForwardConfig

    @gluon.jit
    def mask(self, of):
        """The mask for a sequence or a tile of it."""
        return self.config.Mask(of.seqlen_q, of.seqlen_k, self.window_left, self.window_right)


@aggregate
class Shared:
    """What the partitions share."""

    q: gl.shared_memory_descriptor  # [q_stages * num_consumers * chunks, tile_m, width]
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k: Ring
    v: Ring
    o: gl.shared_memory_descriptor  # [num_consumers * o_buffers, tile_m, o_width]
    ones: gl.shared_memory_descriptor  # right operand of row sums by wgmma
    mailbox: Mailbox


@aggregate
class Tile:
    """The query rows of one consumer and their key blocks, 0, 1, 2, ... from the last block of keys back."""

    seqlen_q: gl.tensor
    seqlen_k: gl.tensor
    m_start: gl.tensor  # first row
    n_end: gl.tensor  # the last block of keys is n_end - 1
    it: gl.tensor  # number of the ring fill of block 0
    precision: base_value  # for these rows


@aggregate
class Finished:
    """A tile whose scores are all seen: what its epilogue needs."""

    sequence: base_value  # DenseSequence or PackedSequence
    head: gl.tensor
    m_start: gl.tensor
    blocks: gl.tensor  # of keys
    unit: gl.tensor  # of O


@aggregate
class State:
    """Rows of one consumer: O, maximum and sum so far; P of the block before, if its P V is not yet in O."""

    o: gl.tuple  # of [tile_m, v_width] accumulators
    p: gl.tensor  # packed
    row_max: gl.tensor  # in base 2
    row_sum: gl.tensor  # [tile_m, 4]: parts, or by wgmma four times the sum


@gluon.jit
def start_scores(q, k: Ring, j, s_layout: gl.constexpr):
    """Start S = Q K_j^T."""
    rows: gl.constexpr = q[0].shape[0]
    keys: gl.constexpr = k.smem.shape[1]
    s = gl.zeros([rows, keys], gl.float32, s_layout)
    for c in gl.static_range(k.chunks):
        s = warpgroup_mma(q[c], k.chunk(j, c).permute((1, 0)), s, use_acc=c > 0, is_async=True)
    return s


@gluon.jit
def scores_in_base_2(problem, tile, s, unit, n_block, row_max, lazy: gl.constexpr, masked: gl.constexpr):
    """(s, unit, maximum): capped and masked scores, of which s * unit are the exponents of 2, and the new
    maxima of the rows, whose old ones are row_max."""
    c: gl.constexpr = problem.config.static
    if c.softcap:
        s = soft_capped(s, unit)
        unit = problem.scale_log2
    if masked:
        s = apply_mask(problem.mask(tile), s, tile.m_start, n_block * c.tile_n)
    largest = row_maximum(s) if c.integer_maxima else gl.max(s, 1)
    larger = gl.maximum(row_max, largest * unit)
    if lazy:
        larger = gl.where(larger > row_max + c.lazy_step, larger, row_max)
    return s, unit, larger


@gluon.jit
def by_row(x, tile):
    """[rows] -> [rows, 1], to go with a tile."""
    layout: gl.constexpr = gl.SliceLayout(1, tile.type.layout)
    return gl.expand_dims(gl.convert_layout(x, layout, assert_trivial=True), 1)


# The beginning of a tile


@gluon.jit
def open_rings(problem, shared, group: gl.constexpr):
    """Before a consumer's first tile: all stages are free, and the last consumer lets the first one begin."""
    c: gl.constexpr = problem.config.static
    shared.k.release_all()
    shared.v.release_all()
    if c.pingpong and group == c.num_consumers - 1:
        pass_turn(group, c.num_consumers)


@gluon.jit
def slot_of(problem, group: gl.constexpr, tile):
    """Where the producer puts number `tile` of a consumer's tiles."""
    c: gl.constexpr = problem.config.static
    return tile % c.q_stages * c.num_consumers + group


@gluon.jit
def next_tile(problem, shared, group: gl.constexpr, tile):
    """First row of number `tile` of all consumers' tiles, once Q is there; END_OF_TILES after the last."""
    c: gl.constexpr = problem.config.static
    slot = slot_of(problem, group, tile)
    mbarrier.wait(shared.q_full.index(slot), tile // c.q_stages & 1)
    return shared.mailbox.receive(slot, 0)


@gluon.jit
def take_q(problem, shared, slot):
    """Q of this tile as left operand, from registers or from shared memory."""
    c: gl.constexpr = problem.config.static
    q = ()
    for i in gl.static_range(c.qk_chunks):
        smem = shared.q.index(slot * c.qk_chunks + i)
        if c.q_in_registers:
            q = q + (smem.load(gl.DotOperandLayout(0, c.s_accumulator, 4 // c.element_bytes)),)
        else:
            q = q + (smem,)
    if c.q_in_registers:
        # The loads may still be under way, and TMA writes the next Q past them (another proxy): without the
        # fence one call in twelve of (40, 700, 8, 128) causal had a wrong row (H200, 2026-11-25).
        fence_async_shared()
        _hand_back(shared, slot)
    return q


@gluon.jit
def hand_back_q(problem, shared, slot):
    """After a tile: its Q may be overwritten, if it has not been since `take_q`."""
    if not problem.config.q_in_registers:
        _hand_back(shared, slot)


@gluon.jit
def _hand_back(shared, slot):
    mbarrier.arrive(shared.q_empty.index(slot), count=1)


@gluon.jit
def key_blocks(problem, group: gl.constexpr, sequence, head, m_tile, it):
    """(Tile of one consumer; count, right_edge and left_edge as of `mask.key_blocks`, for the rows of all).
    m_tile: the first of these; it: ring fill of block 0."""
    c: gl.constexpr = problem.config.static
    m_start = m_tile + group * c.tile_m
    mask = problem.mask(sequence)
    n_end, n_blocks, right_edge, left_edge = mask.key_blocks(m_tile, m_tile + c.tile_rows, c.tile_n)
    precision = problem.precision.of(sequence, head, divided(head, problem.group_size_magic), m_start)
    tile = Tile(sequence.seqlen_q, sequence.seqlen_k, m_start, n_end, it, precision)
    return tile, n_blocks, right_edge, left_edge


@gluon.jit
def empty_state(problem):
    """No tile before: whatever O holds is never used, P is zero."""
    c: gl.constexpr = problem.config.static
    o = zeros(c.tile_m, c.v_width, c.v_chunks, c.o_accumulator)
    zero = gl.zeros([c.tile_m, c.tile_n], gl.float32, c.s_accumulator)
    row_max = gl.full([c.tile_m], 0.0, gl.float32, gl.SliceLayout(1, c.s_accumulator))
    return State(o, pack_probabilities(zero, c.dtype), row_max, thread_sum(zero))


# O in chunks of blocks


@gluon.jit
def _places_aside(problem, group: gl.constexpr, n: gl.constexpr):
    """Where column chunk n of this consumer's O is kept: each program has its own tiles."""
    c: gl.constexpr = problem.config.static
    rows = gl.arange(0, c.tile_m, gl.SliceLayout(1, c.o_accumulator))
    columns = gl.arange(0, c.v_width, gl.SliceLayout(0, c.o_accumulator))
    tile = gl.program_id(0) * c.num_consumers + group
    first = problem.aside + tile.to(gl.int64) * (c.tile_m * c.head_dim_v) + n * c.v_width
    return first + (rows * c.head_dim_v)[:, None] + columns[None, :]


@gluon.jit
def _put_aside(problem, group: gl.constexpr, o, factor, more):
    """O to where it is kept, plus, if there is `more`, what is there times factor."""
    c: gl.constexpr = problem.config.static
    there = gl.full([c.tile_m, c.v_width], 0, gl.int1, c.o_accumulator) | more
    for n in gl.static_range(c.v_chunks):
        places = _places_aside(problem, group, n)
        before = gl.load(places, mask=there, other=0.0)
        gl.store(places, gl.fma(before, by_row(factor, o[n]), o[n]))


@gluon.jit
def in_chunks(blocks: gl.constexpr, problem, shared, group: gl.constexpr, tile, q, state, begin, end, start):
    """`blocks` (of a schedule, unmasked) begin to end - 1, of which wgmma adds up c.promote at a time.

    For e4m3 it keeps 14 bits of a sum, and what it cuts off adds up with the length (arXiv 2412.19437, sec.
    3.3.2). So every so often O is put aside, added to what is there in fp32, and started anew; `start` is the
    block with which it starts here. There are no registers for a second O; L2 is near enough for this.
    """
    c: gl.constexpr = problem.config.static
    if c.promote == 0:
        state = blocks(problem, shared, group, tile, q, state, begin, end, start, False)
    else:
        # not state.row_max: the compiler takes a value that is assigned the one it has for one that stays
        kept, kept_max, kept_sum = begin, gl.zeros_like(state.row_max), gl.zeros_like(state.row_sum)
        for i in range(begin, end, c.promote):
            again = i > begin
            decay = gl.exp2(kept_max - state.row_max)
            if again:
                before = gl.minimum(tile.n_end - kept, tile.n_end - 1)  # nothing is there yet
                unit = tile.precision.in_unit(decay, before, tile.n_end - i)
                _put_aside(problem, group, state.o, unit, kept > begin)
            decayed = gl.fma(kept_sum, by_row(decay, kept_sum), state.row_sum)
            kept, kept_max, kept_sum = i, state.row_max, gl.where(again, decayed, 0.0)
            row_sum = gl.where(again, 0.0, state.row_sum)
            state = State(state.o, state.p, state.row_max, row_sum)
            last = gl.minimum(i + c.promote, end)
            from_here = gl.where(again, i, start)
            state = blocks(problem, shared, group, tile, q, state, i, last, from_here, False)
        if kept > begin:
            decay = gl.exp2(kept_max - state.row_max)
            unit = tile.precision.in_unit(decay, tile.n_end - kept, tile.n_end - end)
            o = ()
            for n in gl.static_range(c.v_chunks):
                before = gl.load(_places_aside(problem, group, n))
                o = o + (gl.fma(before, by_row(unit, state.o[n]), state.o[n]),)
            row_sum = gl.fma(kept_sum, by_row(decay, kept_sum), state.row_sum)
            state = State(o, state.p, state.row_max, row_sum)
    return state


# The end of a tile


@gluon.jit
def _store_part(problem, shared, group: gl.constexpr, i: gl.constexpr, part, desc, tile):
    """Column part i of O to shared memory and on to global memory, not waited for."""
    c: gl.constexpr = problem.config.static
    tma_store_wait(c.o_buffers - 1)
    smem = shared.o.index(group * c.o_buffers + i % c.o_buffers)
    smem.store(part)
    fence_async_shared()
    coords = tile.sequence.coords("q", tile.head, tile.m_start, i * c.o_width)
    tma_store(desc, coords, smem.reshape(desc.block_type.shape))


@gluon.jit
def _column_parts(problem, o):
    """O as it leaves: its accumulators, or the one there is in two halves."""
    c: gl.constexpr = problem.config.static
    if c.v_chunks == c.o_parts:
        return o
    else:
        return gl.split(o[0].reshape([c.tile_m, 2, c.o_width]).permute((0, 2, 1)))


@gluon.jit
def epilogue(problem, shared, group: gl.constexpr, o, state, tile, o_desc, lse_ptr):
    """Finished rows: lse, O divided by the row sums, O rounded and sent off."""
    c: gl.constexpr = problem.config.static
    row: gl.constexpr = gl.SliceLayout(1, c.o_accumulator)
    total = gl.max(state.row_sum, 1) if c.sum_by_wgmma else gl.sum(state.row_sum, 1)
    total = gl.convert_layout(total, row, assert_trivial=True)
    row_max = gl.convert_layout(state.row_max, row, assert_trivial=True)
    rows = tile.m_start + gl.arange(0, c.tile_m, row)
    there = rows < tile.sequence.seqlen_q
    place = tile.sequence.lse_row(tile.head, problem.num_heads, problem.total_q) + rows
    lse = problem.precision.shifted(log_sum_exp(row_max - c.p_shift, total), place, there)
    gl.store(lse_ptr + place, lse, mask=there)
    factor = tile.unit / total
    sees = gl.where(total == 0.0, 0.0, 1.0)
    if c.Mask.masks:
        factor = gl.where(total == 0.0, 0.0, factor)  # no key at all: O is zero
    kv_head = divided(tile.head, problem.group_size_magic)
    columns = o_desc.shape[-1]
    parts = _column_parts(problem, o)
    for i in gl.static_range(c.o_parts):
        part = parts[i] * by_row(factor, parts[i])
        part = problem.precision.restored(
            part, by_row(sees, part), tile.sequence, kv_head, i * c.o_width, columns
        )
        _store_part(problem, shared, group, i, part.to(c.out_dtype), o_desc, tile)
