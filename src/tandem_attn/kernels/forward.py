"""FlashAttention-3 forward for sm_90a: one producer warp, two to four consumers (arXiv 2407.08608, alg. 2).

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
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpreted,
    tma_store_wait,
    warpgroup_mma_wait,
)
from tandem_attn.device.mailbox import END_OF_TILES, make_mailbox
from tandem_attn.device.pieces import finished, start_sum
from tandem_attn.device.precision import pack_probabilities, unpack_operand
from tandem_attn.device.ring import Ring, first_fill, load_tile, make_barriers, make_ring
from tandem_attn.device.schedule import Rows, close_numbers, request_number, requested_number
from tandem_attn.device.sequence import LENGTHS
from tandem_attn.device.softmax import pinned, rescale_factor, rescaled, thread_sum
from tandem_attn.device.turn import pass_turn, take_turn
from tandem_attn.kernels.forward_serial import serial_consumer
from tandem_attn.kernels.forward_tile import (
    Finished,
    Problem,
    Shared,
    State,
    by_row,
    empty_state,
    epilogue,
    hand_back_q,
    in_chunks,
    key_blocks,
    next_tile,
    open_rings,
    scores_in_base_2,
    slot_of,
    start_scores,
    take_q,
)


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
    n_block = tile.n_end - 1 - i
    unit = tile.precision.scores(n_block)
    has_pv = True if kind == "later" else before >= first_fill(c.num_stages)
    p = unpack_operand(state.p, c.dtype, c.o_accumulator)
    shared.k.wait(j)
    if c.pingpong:
        take_turn(group)
    s_started = start_scores(q, shared.k, j, c.s_accumulator)
    shared.v.wait(before, has_pv)
    o_started = start_sum(p, shared.v, before, state.o, use_acc)
    if c.pingpong:
        pass_turn(group, c.num_consumers)
    s = warpgroup_mma_wait(c.v_chunks, deps=(s_started,))
    shared.k.release(j)
    lazy: gl.constexpr = c.lazy_rescale and kind != "first"
    s, unit, row_max = scores_in_base_2(problem, tile, s, unit, n_block, state.row_max, lazy, masked)
    offset, alpha = rescale_factor(state.row_max, row_max, masked)
    alpha = pinned(alpha) if c.rescale_first else alpha
    factor = alpha
    if kind != "first":
        factor = tile.precision.in_unit(alpha, n_block + 1, n_block)
    if kind == "either":
        factor = gl.where(opens, 1.0, factor)
    if c.rescale_first:
        o = _finish_output(o_started, shared.v, before, factor, has_pv, kind != "first", c.lazy_rescale)
    probabilities = gl.exp2(s * unit - gl.expand_dims(offset - c.p_shift, 1))
    row_sum = state.row_sum * by_row(alpha, state.row_sum)
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
        epilogue(problem, shared, group, after.o, state, previous, o_desc, lse_ptr)
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
            epilogue(problem, shared, group, after.o, state, previous, o_desc, lse_ptr)
        state = after
    return state


@gluon.jit
def _skipped_blocks(problem, shared, group: gl.constexpr, tile, n_blocks):
    """Hand back unread the blocks at the diagonal that no row of this consumer may see; how many they are.

    Each is waited for all the same: a phase must not be lapped.
    """
    c: gl.constexpr = problem.config.static
    mask = problem.mask(tile)
    own_end, own, right_edge, left_edge = mask.key_blocks(tile.m_start, tile.m_start + c.tile_m, c.tile_n)
    skipped = gl.minimum(tile.n_end - own_end, n_blocks - 1)
    for i in range(skipped):
        shared.k.wait(tile.it + i)
        shared.v.wait(tile.it + i)
        if c.pingpong:
            take_turn(group)
            pass_turn(group, c.num_consumers)
        shared.k.release(tile.it + i)
        shared.v.release(tile.it + i)
    return skipped


@gluon.jit
def _send_tile(problem, shared, sequences, q_desc, sequence, tile, m_start, head, row):
    """Mail a tile to the consumers, each with its rows of Q."""
    c: gl.constexpr = problem.config.static
    for group in gl.static_range(c.num_consumers):
        slot = slot_of(problem, group, tile)
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
    of_v = sequence.transposed_keys() if shared.v.transposed else sequence
    for i in range(begin, end):
        n_start = (n_end - 1 - i) * shared.k.smem.shape[1]
        if i >= begin_k:
            shared.k.fill(it + i, k_desc, sequence, "k", kv_head, n_start)
        shared.v.fill(it + i, v_desc, of_v, "k", kv_head, n_start)


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
        slot = slot_of(problem, group, tile)
        mbarrier.wait(shared.q_empty.index(slot), (tile // c.q_stages & 1) ^ 1)
        shared.mailbox.send(slot, 0, END_OF_TILES)
        mbarrier.arrive(shared.q_full.index(slot), count=1)


@gluon.jit
def _overlapping_consumer(group: gl.constexpr, problem, shared, sequences, o_desc, lse_ptr):
    c: gl.constexpr = problem.config.static
    state = empty_state(problem)
    open_rings(problem, shared, group)
    it = first_fill(c.num_stages) + 0
    tile = 0
    m_tile = next_tile(problem, shared, group, 0)
    head = shared.mailbox.receive(group, 1)
    previous = Finished(sequences.receive(shared.mailbox, group), head, m_tile, tile, gl.to_tensor(1.0))
    while m_tile >= 0:
        slot = slot_of(problem, group, tile)
        head = shared.mailbox.receive(slot, 1)
        sequence = sequences.receive(shared.mailbox, slot)
        q = take_q(problem, shared, slot)
        of, n_blocks, right_edge, left_edge = key_blocks(problem, group, sequence, head, m_tile, it)
        first = 0
        if c.skip:
            first = _skipped_blocks(problem, shared, group, of, n_blocks)
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
        state = in_chunks(_blocks, problem, shared, group, of, q, state, whole, left_edge, second)
        if c.Mask.has_left_edge:
            begin = gl.maximum(left_edge, whole)
            state = _blocks(problem, shared, group, of, q, state, begin, n_blocks, second, True)
        hand_back_q(problem, shared, slot)
        unit = of.precision.unit(of.n_end - n_blocks)
        previous = Finished(sequence, head, of.m_start, n_blocks - first, unit)
        it += n_blocks
        tile += 1
        m_tile = next_tile(problem, shared, group, tile)
    if tile > 0:
        shared.v.wait(it - 1)
        p = unpack_operand(state.p, c.dtype, c.o_accumulator)
        o = finished(start_sum(p, shared.v, it - 1, state.o, previous.blocks > 1), c.v_chunks)
        epilogue(problem, shared, group, o, state, previous, o_desc, lse_ptr)
        tma_store_wait(0)


@gluon.jit
def _consumer(group: gl.constexpr, problem, shared, sequences, o_desc, lse_ptr):
    if problem.config.serial:
        serial_consumer(group, problem, shared, sequences, o_desc, lse_ptr)
    else:
        _overlapping_consumer(group, problem, shared, sequences, o_desc, lse_ptr)


@gluon.jit
def _make_ones(config: gl.constexpr):
    """e4m3 ones [8, tile_n] in shared memory, written as words: of a tile as small as this stmatrix leaves a
    part unwritten (Triton 3.6)."""
    c: gl.constexpr = config.static
    if c.sum_by_wgmma:
        ones = gl.allocate_shared_memory(c.dtype, [1, 8, c.tile_n], c.ones_layout).index(0)
        words: gl.constexpr = 2 * c.tile_n
        by_thread: gl.constexpr = gl.BlockedLayout([words // 128], [32], [4], [0])
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        as_words = reinterpreted(ones, gl.int32, [words], plain)
        as_words.store(gl.full([words], 0x38383838, gl.int32, by_thread))
        fence_async_shared()
        return ones
    else:
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        return gl.allocate_shared_memory(gl.int32, [1], plain)  # for want of nothing


# nothing about lengths, heads or alignment makes another kernel
@gluon.jit(
    do_not_specialize=[
        *("batch", "num_heads", "seqlen_q", "seqlen_k", "window_left", "window_right", "group"),
        *("static_rounds", "heads_magic", "group_size_magic", "group_magic", "last_magic", "tiles_magic"),
        *("q_blocks", "k_blocks", "block_step"),
    ],
    do_not_specialize_on_alignment=LENGTHS,
)
def attention_forward(q_desc, k_desc, v_desc, o_desc, lse_ptr, cu_seqlens_q, cu_seqlens_k, seqused_q,
                      seqused_k, counter, descales, aside, batch, num_heads, seqlen_q, seqlen_k, window_left,
                      window_right, group, static_rounds, heads_magic, group_size_magic, group_magic,
                      last_magic, tiles_magic, scale_log2, inner_scale, q_blocks, k_blocks, block_step,
                      config: gl.constexpr):  # fmt: skip
    """seqlen_q, seqlen_k: lengths, or total packed rows; cu_seqlens and seqused: None where there are none;
    counter: int32 0 for a dynamic schedule, else None; group: heads that a schedule keeps together for L2;
    descales (and corrections), q_blocks, k_blocks, block_step: see device/precision.py; for 16 bits None and
    any numbers;
    aside: see forward_tile.py: in_chunks, or None."""
    c: gl.constexpr = config.static
    q_slots: gl.constexpr = c.q_stages * c.num_consumers
    k_barriers: gl.constexpr = 11 if c.named_release else 0
    v_barriers: gl.constexpr = 13 if c.named_release else 0
    num_kv_heads = divided(num_heads, group_size_magic)
    precision = c.Precision.create(inner_scale if c.softcap else scale_log2, num_heads, num_kv_heads,
                                   descales, q_blocks, k_blocks, block_step)  # fmt: skip
    problem = Problem(num_heads, group_size_magic, seqlen_q, scale_log2, precision, aside, window_left,
                      window_right, config)  # fmt: skip
    sequences = c.Sequences.create(seqlen_q, seqlen_k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    rows = Rows(num_heads, heads_magic, group, group_magic, last_magic, tiles_magic)
    schedule = c.Schedule.create(sequences, batch, rows, static_rounds, c.tile_rows)
    shared = Shared(
        gl.allocate_shared_memory(c.dtype, [q_slots * c.qk_chunks, c.tile_m, c.qk_width], c.q_layout),
        make_barriers(q_slots, 1),
        make_barriers(q_slots, 1),
        make_ring(k_desc, c.tile_n, c.qk_width, c.qk_chunks, c.num_stages, c.num_consumers, k_barriers),
        make_ring(
            v_desc, c.tile_n, c.v_width, c.v_chunks, c.num_stages, c.num_consumers, v_barriers, c.v_transposed
        ),
        gl.allocate_shared_memory(
            c.out_dtype, [c.num_consumers * c.o_buffers, c.tile_m, c.o_width], c.o_layout
        ),
        _make_ones(config),
        make_mailbox(q_slots),
    )
    if c.num_consumers == 2:
        gl.warp_specialize([
            (_consumer, (0, problem, shared, sequences, o_desc, lse_ptr)),
            (_consumer, (1, problem, shared, sequences, o_desc, lse_ptr)),
            (_producer, (problem, shared, sequences, schedule, counter, q_desc, k_desc, v_desc)),
        ], [4, 1], c.worker_registers)  # fmt: skip
    elif c.num_consumers == 3:
        gl.warp_specialize([
            (_consumer, (0, problem, shared, sequences, o_desc, lse_ptr)),
            (_consumer, (1, problem, shared, sequences, o_desc, lse_ptr)),
            (_consumer, (2, problem, shared, sequences, o_desc, lse_ptr)),
            (_producer, (problem, shared, sequences, schedule, counter, q_desc, k_desc, v_desc)),
        ], [4, 4, 1], c.worker_registers)  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (0, problem, shared, sequences, o_desc, lse_ptr)),
            (_consumer, (1, problem, shared, sequences, o_desc, lse_ptr)),
            (_consumer, (2, problem, shared, sequences, o_desc, lse_ptr)),
            (_consumer, (3, problem, shared, sequences, o_desc, lse_ptr)),
            (_producer, (problem, shared, sequences, schedule, counter, q_desc, k_desc, v_desc)),
        ], [4, 4, 4, 1], c.worker_registers)  # fmt: skip
