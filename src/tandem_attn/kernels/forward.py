"""FlashAttention-3 forward for sm_90a: one producer warp, two or three consumers (arXiv 2407.08608, alg. 2).

One program per multiprocessor walks a list of tiles; a tile is 64 query rows per consumer of one head.

    producer   asks the schedule for the next tile and mails it; loads Q, then K and V, last keys first
    consumers  per key block i:  take the turn
                                 start S = Q K_i^T                  (wgmma, asynchronous)
                                 start O += P_(i-1) V_(i-1)         (wgmma, asynchronous)
                                 pass the turn; wait for S; release K_i
                                 softmax of S: row maximum, exponentials, row sum
                                 wait for O; release V_(i-1); scale O; round and pack P_i

A tile's first block carries the last P V of the tile before, whose O is written by TMA while the new tile
runs. Why each of these is so, what it measured, and the budgets of registers and shared memory:
docs/kernels/forward.md.
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
    warpgroup_mma_wait,
)
from tandem_attn.device.mailbox import END_OF_TILES, Mailbox, make_mailbox
from tandem_attn.device.mask import apply_mask
from tandem_attn.device.pieces import finished, start_sum, zeros
from tandem_attn.device.precision import pack_probabilities, unpack_operand
from tandem_attn.device.ring import Ring, first_fill, load_tile, make_barriers, make_ring
from tandem_attn.device.schedule import Rows, close_numbers, request_number, requested_number
from tandem_attn.device.sequence import LENGTHS
from tandem_attn.device.softmax import (
    LAZY_STEP,
    log_sum_exp,
    offset_and_rescale,
    pinned,
    rescaled,
    soft_capped,
    thread_sum,
)
from tandem_attn.device.turn import pass_turn, take_turn


@aggregate
class Problem:
    """What the caller asked for."""

    num_heads: gl.tensor
    group_size_magic: gl.tensor  # for a division by the query heads per KV head
    total_q: gl.tensor  # rows of lse per head: seqlen_q, or all packed rows
    scale_log2: gl.tensor  # score (or capped score) to exponent of 2
    inner_scale: gl.tensor  # softmax_scale / softcap
    lazy_step: gl.tensor  # growth of a score maximum by which P reaches 2**LAZY_STEP
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
    mailbox: Mailbox


@aggregate
class Tile:
    """The query rows of one consumer and their key blocks, 0, 1, 2, ... from the last block of keys back."""

    seqlen_q: gl.tensor
    seqlen_k: gl.tensor
    m_start: gl.tensor  # first row
    n_end: gl.tensor  # the last block of keys is n_end - 1
    it: gl.tensor  # number of the ring fill of block 0


@aggregate
class Previous:
    """The tile before: its last P V and its epilogue are part of this one."""

    sequence: base_value  # DenseSequence or PackedSequence
    head: gl.tensor
    m_start: gl.tensor
    blocks: gl.tensor  # of keys


@aggregate
class State:
    """Rows of one consumer: O and P of the block before (its P V not yet started), maximum and sum so far."""

    o: gl.tuple  # of [tile_m, v_width] accumulators
    p: gl.tensor  # packed
    row_max: gl.tensor
    row_sum: gl.tensor  # [tile_m, 4]


@gluon.jit
def _start_scores(q, k: Ring, j, s_layout: gl.constexpr):
    """Start S = Q K_j^T."""
    rows: gl.constexpr = q[0].shape[0]
    keys: gl.constexpr = k.smem.shape[1]
    s = gl.zeros([rows, keys], gl.float32, s_layout)
    for c in gl.static_range(k.chunks):
        s = warpgroup_mma(q[c], k.chunk(j, c).permute((1, 0)), s, use_acc=c > 0, is_async=True)
    return s


@gluon.jit
def _finish_output(started, v: Ring, j, alpha, has_pv, rescale: gl.constexpr, lazy: gl.constexpr):
    """Wait for P V_j, hand its stage back and scale O by alpha."""
    waited = finished(started, v.chunks)
    v.release(j, has_pv)
    if rescale:
        row: gl.constexpr = gl.SliceLayout(1, waited[0].type.layout)
        factor = gl.convert_layout(alpha, row, assert_trivial=True)
        scaled = ()
        for c in gl.static_range(v.chunks):
            scaled = scaled + (rescaled(waited[c], factor, lazy),)
        return scaled
    else:
        return waited


@gluon.jit
def _step(problem, shared, group: gl.constexpr, tile, q, state, i, before, use_acc, masked: gl.constexpr,
          kind: gl.constexpr, opens=True):  # fmt: skip
    """Key block i: its scores and P V of the block before (ring fill `before`) in flight together, then its
    softmax. Returns the next state.

    `kind`: the "first" block of its tile, a "later" one, or "either", as `opens` then says. At the first,
    maximum and sum in `state` are fresh, o and p are those of the tile before (if there was one), whose
    finished O the next state holds unscaled.
    """
    c: gl.constexpr = problem.config.static
    j = tile.it + i
    has_pv = True if kind == "later" else before >= first_fill(c.num_stages)
    p = unpack_operand(state.p, c.dtype, c.o_accumulator)
    shared.k.wait(j)
    if c.pingpong:
        take_turn(group)
    s_started = _start_scores(q, shared.k, j, c.s_accumulator)
    shared.v.wait(before, has_pv)
    o_started = start_sum(p, shared.v, before, state.o, use_acc)
    if c.pingpong:
        pass_turn(group, c.num_consumers)
    s = warpgroup_mma_wait(c.v_chunks, deps=(s_started,))
    shared.k.release(j)
    if c.softcap:
        s = soft_capped(s, problem.inner_scale)
    if masked:
        s = apply_mask(problem.mask(tile), s, tile.m_start, (tile.n_end - 1 - i) * c.tile_n)
    row_max = gl.maximum(state.row_max, gl.max(s, 1))
    if c.lazy_rescale and kind != "first":
        row_max = gl.where(row_max > state.row_max + problem.lazy_step, row_max, state.row_max)
    offset, alpha = offset_and_rescale(state.row_max, row_max, problem.scale_log2, masked)
    alpha = pinned(alpha) if c.rescale_first else alpha
    factor = gl.where(opens, 1.0, alpha) if kind == "either" else alpha
    if c.rescale_first:
        o = _finish_output(o_started, shared.v, before, factor, has_pv, kind != "first", c.lazy_rescale)
    probabilities = gl.exp2(s * problem.scale_log2 - gl.expand_dims(offset, 1))
    old_sum: gl.constexpr = gl.SliceLayout(1, state.row_sum.type.layout)
    row_sum = state.row_sum * gl.expand_dims(gl.convert_layout(alpha, old_sum, assert_trivial=True), 1)
    row_sum = row_sum + thread_sum(probabilities)
    if not c.rescale_first:
        o = _finish_output(o_started, shared.v, before, factor, has_pv, kind != "first", c.lazy_rescale)
    return State(o, pack_probabilities(probabilities, c.dtype), row_max, row_sum)


@gluon.jit
def _blocks(problem, shared, group: gl.constexpr, tile, q, state, begin, end, second, masked: gl.constexpr):
    """Key blocks begin to end - 1 of a tile, none of them its first; `second` is the one after the first."""
    for i in range(begin, end):
        state = _step(problem, shared, group, tile, q, state, i, tile.it + i - 1, i > second, masked, "later")
    return state


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
def _epilogue(problem, shared, group: gl.constexpr, o, state, tile, o_desc, lse_ptr):
    """Finished rows of a `Previous` tile: lse, O divided by the row sums, O rounded and sent off."""
    c: gl.constexpr = problem.config.static
    row: gl.constexpr = gl.SliceLayout(1, c.o_accumulator)
    total = gl.convert_layout(gl.sum(state.row_sum, 1), row, assert_trivial=True)
    lse = log_sum_exp(gl.convert_layout(state.row_max, row, assert_trivial=True), total, problem.scale_log2)
    rows = tile.m_start + gl.arange(0, c.tile_m, row)
    lse_row = tile.sequence.lse_row(tile.head, problem.num_heads, problem.total_q)
    gl.store(lse_ptr + lse_row + rows, lse, mask=rows < tile.sequence.seqlen_q)
    factor = 1.0 / total
    if c.Mask.masks:
        factor = gl.where(total == 0.0, 0.0, factor)  # no key at all: O is zero
    factor = gl.expand_dims(factor, 1)
    if c.v_chunks == c.o_parts:
        for i in gl.static_range(c.o_parts):
            _store_part(problem, shared, group, i, (o[i] * factor).to(c.dtype), o_desc, tile)
    else:
        halves = (o[0] * factor).to(c.dtype).reshape([c.tile_m, 2, c.o_width])
        left, right = gl.split(halves.permute((0, 2, 1)))
        _store_part(problem, shared, group, 0, left, o_desc, tile)
        _store_part(problem, shared, group, 1, right, o_desc, tile)


@gluon.jit
def _first_block(problem, shared, group: gl.constexpr, tile, q, state, first, previous, has_previous, o_desc,
                 lse_ptr):  # fmt: skip
    """Block `first` of a tile, the first that this consumer does not skip, and the end of the tile before.

    `has_previous`, not previous.blocks > 0: that reorders loops, 2% less at 128 causal and 256 full (H200).
    """
    c: gl.constexpr = problem.config.static
    fresh = State(state.o, state.p, gl.full_like(state.row_max, float("-inf")), gl.zeros_like(state.row_sum))
    after = _step(problem, shared, group, tile, q, fresh, first, tile.it - 1, previous.blocks > 1,
                  c.Mask.masks, "first")  # fmt: skip
    if has_previous:
        _epilogue(problem, shared, group, after.o, state, previous, o_desc, lse_ptr)
    return after


@gluon.jit
def _first_blocks(problem, shared, group: gl.constexpr, tile, q, state, first, end, previous, has_previous,
                  o_desc, lse_ptr):  # fmt: skip
    """_first_block and the other masked blocks before `end` in one loop.

    Slower by what `opens` decides, but a third less code: that of three consumers does not fit in the
    instruction cache (10% of its requests missed at head_dim 64, causal; H200, 2026-11-25).
    """
    for i in range(first, end):
        opens = i == first
        row_max = gl.where(opens, float("-inf"), state.row_max)
        row_sum = gl.where(opens, 0.0, state.row_sum)
        fill = gl.where(opens, tile.it - 1, tile.it + i - 1)
        use_acc = gl.where(opens, previous.blocks > 1, i > first + 1)
        after = _step(problem, shared, group, tile, q, State(state.o, state.p, row_max, row_sum), i, fill,
                      use_acc, True, "either", opens)  # fmt: skip
        if opens & has_previous:
            _epilogue(problem, shared, group, after.o, state, previous, o_desc, lse_ptr)
        state = after
    return state


@gluon.jit
def _skipped_blocks(problem, shared, group: gl.constexpr, mask, it, n_blocks, n_end, m_start):
    """Hand back unread the blocks at the diagonal that no row of this consumer may see; how many they are.

    Each is waited for all the same: a phase must not be lapped.
    """
    c: gl.constexpr = problem.config.static
    own_end, own, right_edge, left_edge = mask.key_blocks(m_start, m_start + c.tile_m, c.tile_n)
    skipped = gl.minimum(n_end - own_end, n_blocks - 1)
    for i in range(skipped):
        shared.k.wait(it + i)
        shared.v.wait(it + i)
        if c.pingpong:
            take_turn(group)
            pass_turn(group, c.num_consumers)
        shared.k.release(it + i)
        shared.v.release(it + i)
    return skipped


@gluon.jit
def _take_q(problem, shared, slot):
    """Q of this tile as left operand, from registers or from shared memory."""
    c: gl.constexpr = problem.config.static
    q = ()
    for i in gl.static_range(c.qk_chunks):
        smem = shared.q.index(slot * c.qk_chunks + i)
        if c.q_in_registers:
            q = q + (smem.load(gl.DotOperandLayout(0, c.s_accumulator, 2)),)
        else:
            q = q + (smem,)
    return q


@gluon.jit
def _empty_state(problem):
    """No tile before: whatever O holds is never used, P is zero."""
    c: gl.constexpr = problem.config.static
    o = zeros(c.tile_m, c.v_width, c.v_chunks, c.o_accumulator)
    zero = gl.zeros([c.tile_m, c.tile_n], gl.float32, c.s_accumulator)
    row_max = gl.full([c.tile_m], 0.0, gl.float32, gl.SliceLayout(1, c.s_accumulator))
    return State(o, pack_probabilities(zero, c.dtype), row_max, thread_sum(zero))


@gluon.jit
def _send_tile(problem, shared, sequences, q_desc, sequence, tile, m_start, head, row):
    """Mail a tile to the consumers, each with its rows of Q."""
    c: gl.constexpr = problem.config.static
    for group in gl.static_range(c.num_consumers):
        slot = tile % c.q_stages * c.num_consumers + group
        mbarrier.wait(shared.q_empty.index(slot), (tile // c.q_stages & 1) ^ 1)
        shared.mailbox.send(slot, 0, m_start)
        shared.mailbox.send(slot, 1, head)
        sequences.send(shared.mailbox, slot, row)
        load_tile(shared.q_full.index(slot), shared.q, slot, c.qk_chunks, q_desc, sequence, "q", head,
                  m_start + group * c.tile_m)  # fmt: skip


@gluon.jit
def _fill_blocks(shared, k_desc, v_desc, sequence, kv_head, it, begin, end, n_end, begin_k):
    """Load key blocks begin to end - 1, counted from the last one back, K only from block begin_k on; block 0
    is ring fill `it`."""
    for i in range(begin, end):
        n_start = (n_end - 1 - i) * shared.k.smem.shape[1]
        if i >= begin_k:
            shared.k.fill(it + i, k_desc, sequence, "k", kv_head, n_start)
        shared.v.fill(it + i, v_desc, sequence, "k", kv_head, n_start)


@gluon.jit
def _producer(problem, shared, sequences, schedule, counter, q_desc, k_desc, v_desc):
    """Tiles in, Q, K and V out.

    The number of the next tile is asked for two blocks before this one ends and looked at one block before:
    early enough to hide most of the latency, late enough that whoever is free first gets it (asking 4 or 8
    blocks ahead lost 2 to 5% at head_dim 64, 512 tokens causal; H200, 2026-11-25).
    """
    c: gl.constexpr = problem.config.static
    it = first_fill(c.num_stages) + 0
    tile = 0
    t = gl.program_id(0)
    found, m_block, head, row, schedule = schedule.tile(t)
    while found:
        sequence = sequences.sequence(row)
        m_start = m_block * c.tile_rows
        mask = problem.mask(sequence)
        n_end, n_blocks, right_edge, left_edge = mask.key_blocks(m_start, m_start + c.tile_rows, c.tile_n)
        kv_head = divided(head, problem.group_size_magic)
        begin_k = 0
        if c.k_before_q:
            shared.k.fill(it, k_desc, sequence, "k", kv_head, (n_end - 1) * c.tile_n)
            begin_k = 1
        _send_tile(problem, shared, sequences, q_desc, sequence, tile, m_start, head, row)
        ask = gl.maximum(n_blocks - 2, 0)
        look = n_blocks - 1
        _fill_blocks(shared, k_desc, v_desc, sequence, kv_head, it, 0, ask, n_end, begin_k)
        ticket = request_number(schedule, counter, tile + 1)
        _fill_blocks(shared, k_desc, v_desc, sequence, kv_head, it, ask, look, n_end, begin_k)
        t = requested_number(schedule, ticket, tile + 1)
        found, m_block, head, row, schedule = schedule.tile(t)
        _fill_blocks(shared, k_desc, v_desc, sequence, kv_head, it, look, n_blocks, n_end, begin_k)
        it += n_blocks
        tile += 1
    close_numbers(schedule, counter, t)
    for group in gl.static_range(c.num_consumers):
        slot = tile % c.q_stages * c.num_consumers + group
        mbarrier.wait(shared.q_empty.index(slot), (tile // c.q_stages & 1) ^ 1)
        shared.mailbox.send(slot, 0, END_OF_TILES)
        mbarrier.arrive(shared.q_full.index(slot), count=1)


@gluon.jit
def _consumer(group: gl.constexpr, problem, shared, sequences, o_desc, lse_ptr):
    c: gl.constexpr = problem.config.static
    state = _empty_state(problem)
    shared.k.release_all()
    shared.v.release_all()
    if c.pingpong and group == c.num_consumers - 1:
        pass_turn(group, c.num_consumers)
    it = first_fill(c.num_stages) + 0
    tile = 0
    mbarrier.wait(shared.q_full.index(group), 0)
    m_tile = shared.mailbox.receive(group, 0)
    head = shared.mailbox.receive(group, 1)
    previous = Previous(sequences.receive(shared.mailbox, group), head, m_tile, tile)
    while m_tile >= 0:
        slot = tile % c.q_stages * c.num_consumers + group
        head = shared.mailbox.receive(slot, 1)
        sequence = sequences.receive(shared.mailbox, slot)
        q = _take_q(problem, shared, slot)
        if c.q_in_registers:
            # The loads may still be under way, and TMA writes the next Q past them (another proxy): without
            # the fence one call in twelve of (40, 700, 8, 128) causal had a wrong row (H200, 2026-11-25).
            fence_async_shared()
            mbarrier.arrive(shared.q_empty.index(slot), count=1)
        m_start = m_tile + group * c.tile_m
        mask = problem.mask(sequence)
        n_end, n_blocks, right_edge, left_edge = mask.key_blocks(m_tile, m_tile + c.tile_rows, c.tile_n)
        first = 0
        if c.skip:
            first = _skipped_blocks(problem, shared, group, mask, it, n_blocks, n_end, m_start)
        of = Tile(sequence.seqlen_q, sequence.seqlen_k, m_start, n_end, it)
        second = first + 1
        if c.opens_in_loop:
            whole = gl.maximum(right_edge, second)
            state = _first_blocks(problem, shared, group, of, q, state, first, whole, previous, tile > 0,
                                  o_desc, lse_ptr)  # fmt: skip
        else:
            state = _first_block(problem, shared, group, of, q, state, first, previous, tile > 0, o_desc,
                                 lse_ptr)  # fmt: skip
            whole = second
            if c.Mask.masks:
                state = _blocks(problem, shared, group, of, q, state, second, right_edge, second, True)
                whole = gl.maximum(right_edge, second)
        state = _blocks(problem, shared, group, of, q, state, whole, left_edge, second, False)
        if c.Mask.has_left_edge:
            begin = gl.maximum(left_edge, whole)
            state = _blocks(problem, shared, group, of, q, state, begin, n_blocks, second, True)
        if not c.q_in_registers:
            mbarrier.arrive(shared.q_empty.index(slot), count=1)
        previous = Previous(sequence, head, m_start, n_blocks - first)
        it += n_blocks
        tile += 1
        slot = tile % c.q_stages * c.num_consumers + group
        mbarrier.wait(shared.q_full.index(slot), tile // c.q_stages & 1)
        m_tile = shared.mailbox.receive(slot, 0)
    if tile > 0:
        shared.v.wait(it - 1)
        p = unpack_operand(state.p, c.dtype, c.o_accumulator)
        o = finished(start_sum(p, shared.v, it - 1, state.o, previous.blocks > 1), c.v_chunks)
        _epilogue(problem, shared, group, o, state, previous, o_desc, lse_ptr)
        tma_store_wait(0)


# nothing about lengths, heads or alignment makes another kernel
@gluon.jit(
    do_not_specialize=[
        *("batch", "num_heads", "seqlen_q", "seqlen_k", "window_left", "window_right", "group"),
        *("static_rounds", "heads_magic", "group_size_magic", "group_magic", "last_magic", "tiles_magic"),
    ],
    do_not_specialize_on_alignment=LENGTHS,
)
def attention_forward(q_desc, k_desc, v_desc, o_desc, lse_ptr, cu_seqlens_q, cu_seqlens_k, seqused_q,
                      seqused_k, counter, batch, num_heads, seqlen_q, seqlen_k, window_left, window_right,
                      group, static_rounds, heads_magic, group_size_magic, group_magic, last_magic,
                      tiles_magic, scale_log2, inner_scale, config: gl.constexpr):  # fmt: skip
    """seqlen_q, seqlen_k: lengths, or total packed rows; cu_seqlens and seqused: None where there are none;
    counter: int32 0 for a dynamic schedule, else None; group: heads that a schedule keeps together for L2."""
    c: gl.constexpr = config.static
    q_slots: gl.constexpr = c.q_stages * c.num_consumers
    k_barriers: gl.constexpr = 11 if c.named_release else 0
    v_barriers: gl.constexpr = 13 if c.named_release else 0
    problem = Problem(num_heads, group_size_magic, seqlen_q, scale_log2, inner_scale,
                      LAZY_STEP / scale_log2, window_left, window_right, config)  # fmt: skip
    sequences = c.Sequences.create(seqlen_q, seqlen_k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    rows = Rows(num_heads, heads_magic, group, group_magic, last_magic, tiles_magic)
    schedule = c.Schedule.create(sequences, batch, rows, static_rounds, c.tile_rows)
    shared = Shared(
        gl.allocate_shared_memory(c.dtype, [q_slots * c.qk_chunks, c.tile_m, c.qk_width], c.q_layout),
        make_barriers(q_slots, 1),
        make_barriers(q_slots, 1),
        make_ring(k_desc, c.tile_n, c.qk_width, c.qk_chunks, c.num_stages, c.num_consumers, k_barriers),
        make_ring(v_desc, c.tile_n, c.v_width, c.v_chunks, c.num_stages, c.num_consumers, v_barriers),
        gl.allocate_shared_memory(c.dtype, [c.num_consumers * c.o_buffers, c.tile_m, c.o_width], c.o_layout),
        make_mailbox(q_slots),
    )
    if c.num_consumers == 2:
        gl.warp_specialize([
            (_consumer, (0, problem, shared, sequences, o_desc, lse_ptr)),
            (_consumer, (1, problem, shared, sequences, o_desc, lse_ptr)),
            (_producer, (problem, shared, sequences, schedule, counter, q_desc, k_desc, v_desc)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (0, problem, shared, sequences, o_desc, lse_ptr)),
            (_consumer, (1, problem, shared, sequences, o_desc, lse_ptr)),
            (_consumer, (2, problem, shared, sequences, o_desc, lse_ptr)),
            (_producer, (problem, shared, sequences, schedule, counter, q_desc, k_desc, v_desc)),
        ], [4, 4, 1], [160, 160, 32])  # fmt: skip
