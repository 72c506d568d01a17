"""The consumers of a forward with scores, softmax and P V one after the other, for e4m3 (head_dim to 192).

FP8 products take half as long as 16-bit ones while the softmax takes as long as ever: a consumer computes
exponentials most of the time, and what limits it is how many warps there are to fill its gaps. Without P V of
one block beside the scores of the next P never meets another S, a consumer needs 160 registers, not 240, and
three of them have room: 10% more at head_dim 128 than two that overlap (docs/kernels/fp8.md).

And P V has room in the registers of S (`block_sums`). So wgmma adds up one block at a time, and fp32 the
blocks, at no cost: for e4m3 wgmma drops what is 2**-13 of the sum so far, a bias that grows with the number
of keys.
"""

from tandem_attn.device.gluon import (
    gl,
    gluon,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from tandem_attn.device.pieces import finished, hidden, start_sum, zeros
from tandem_attn.device.precision import pack_probabilities, unpack_operand
from tandem_attn.device.ring import first_fill
from tandem_attn.device.softmax import rescale_factor, thread_sum
from tandem_attn.device.turn import pass_turn, take_turn
from tandem_attn.kernels.forward_tile import (
    Finished,
    State,
    by_row,
    empty_state,
    epilogue,
    hand_back_q,
    key_blocks,
    next_tile,
    open_rings,
    scores_in_base_2,
    slot_of,
    start_scores,
    take_q,
)


@gluon.jit
def _scores(problem, shared, group: gl.constexpr, q, j):
    """S = Q K_j^T, and K_j handed back. q: Q, or its slot where it is looked up for every block."""
    c: gl.constexpr = problem.config.static
    if c.q_for_each_block:
        q = take_q(problem, shared, q + hidden(0))
    shared.k.wait(j)
    if c.pingpong:
        take_turn(group)
    started = start_scores(q, shared.k, j, c.s_accumulator)
    if c.pingpong:
        pass_turn(group, c.num_consumers)
    s = warpgroup_mma_wait(0, deps=(started,))
    shared.k.release(j)
    return s


@gluon.jit
def _added_up(problem, shared, p, row_sum):
    """row_sum plus the row sums of P as they count in P V, rounded to e4m3: of one block by wgmma, the rest
    in fp32. Waits for all products."""
    c: gl.constexpr = problem.config.static
    if c.sum_by_wgmma:
        operand: gl.constexpr = gl.DotOperandLayout(0, c.sum_accumulator, 4 // c.element_bytes)
        p = gl.convert_layout(p, operand, assert_trivial=True)
        nothing = gl.zeros([c.tile_m, 8], gl.float32, c.sum_accumulator)
        summed = warpgroup_mma(p, shared.ones.permute((1, 0)), nothing, use_acc=False, is_async=True)
        # all columns are equal: of two neighbours in a thread one will do
        summed, _ = gl.split(warpgroup_mma_wait(0, deps=(summed,)).reshape([c.tile_m, 4, 2]))
        row_sum = row_sum + gl.convert_layout(summed, row_sum.type.layout, assert_trivial=True)
    return row_sum


@gluon.jit
def _output(problem, shared, p, j, o, row_sum, factor):
    """(O times factor plus P V_j, row_sum plus that of P), and V_j handed back."""
    c: gl.constexpr = problem.config.static
    new = ()
    if c.block_sums:
        row_sum = _added_up(problem, shared, p, row_sum)  # before P V, which leaves no register for it
        shared.v.wait(j)
        nothing = zeros(c.tile_m, c.v_width, c.v_chunks, c.o_accumulator)
        pv = finished(start_sum(p, shared.v, j, nothing, False), c.v_chunks)
        for n in gl.static_range(c.v_chunks):
            new = new + (gl.fma(o[n], by_row(factor, o[n]), pv[n]),)
    else:
        for n in gl.static_range(c.v_chunks):
            new = new + (o[n] * by_row(factor, o[n]),)
        shared.v.wait(j)
        started = start_sum(p, shared.v, j, new)
        row_sum = _added_up(problem, shared, p, row_sum)
        new = finished(started, c.v_chunks)
    shared.v.release(j)
    return new, row_sum


@gluon.jit
def _blocks(problem, shared, group: gl.constexpr, tile, q, state, begin, end, masked: gl.constexpr):
    """Key blocks begin to end - 1 of a tile."""
    c: gl.constexpr = problem.config.static
    for i in range(begin, end):
        n_block = tile.n_end - 1 - i
        unit = tile.precision.scores(n_block)
        s = _scores(problem, shared, group, q, tile.it + i)
        s, unit, row_max = scores_in_base_2(
            problem, tile, s, unit, n_block, state.row_max, c.lazy_rescale, masked
        )
        offset, alpha = rescale_factor(state.row_max, row_max, masked)
        probabilities = gl.exp2(s * unit - gl.expand_dims(offset - c.p_shift, 1))
        row_sum = state.row_sum * by_row(alpha, state.row_sum)
        if not c.sum_by_wgmma:
            row_sum = row_sum + thread_sum(probabilities)
        packed = pack_probabilities(probabilities, c.dtype)
        before = gl.minimum(n_block + 1, tile.n_end - 1)  # O of the first block does not count
        factor = tile.precision.in_unit(alpha, before, n_block)
        p = unpack_operand(packed, c.dtype, c.o_accumulator)
        o, row_sum = _output(problem, shared, p, tile.it + i, state.o, row_sum, factor)
        state = State(o, state.p, row_max, row_sum)
    return state


@gluon.jit
def _tile(problem, shared, group: gl.constexpr, tile, q, state, n_blocks, right_edge, left_edge):
    """All key blocks of a tile."""
    c: gl.constexpr = problem.config.static
    row_max = gl.full_like(state.row_max, float("-inf"))
    o = zeros(c.tile_m, c.v_width, c.v_chunks, c.o_accumulator)
    state = State(o, state.p, row_max, gl.zeros_like(state.row_sum))
    whole = 0
    if c.Mask.masks:
        whole = right_edge
        state = _blocks(problem, shared, group, tile, q, state, 0, whole, True)
    state = _blocks(problem, shared, group, tile, q, state, whole, left_edge, False)
    if c.Mask.has_left_edge:
        state = _blocks(problem, shared, group, tile, q, state, left_edge, n_blocks, True)
    return state


@gluon.jit
def serial_consumer(group: gl.constexpr, problem, shared, sequences, o_desc, lse_ptr):
    """A consumer from its first tile to its last."""
    c: gl.constexpr = problem.config.static
    state = empty_state(problem)
    open_rings(problem, shared, group)
    it = first_fill(c.num_stages) + 0
    tile = 0
    m_tile = next_tile(problem, shared, group, 0)
    while m_tile >= 0:
        slot = slot_of(problem, group, tile)
        head = shared.mailbox.receive(slot, 1)
        sequence = sequences.receive(shared.mailbox, slot)
        q = slot if c.q_for_each_block else take_q(problem, shared, slot)
        of, n_blocks, right_edge, left_edge = key_blocks(problem, group, sequence, head, m_tile, it)
        state = _tile(problem, shared, group, of, q, state, n_blocks, right_edge, left_edge)
        hand_back_q(problem, shared, slot)
        done = Finished(sequence, head, of.m_start, n_blocks, of.precision.unit(of.n_end - n_blocks))
        epilogue(problem, shared, group, state.o, state, done, o_desc, lse_ptr)
        it += n_blocks
        tile += 1
        m_tile = next_tile(problem, shared, group, tile)
    tma_store_wait(0)
