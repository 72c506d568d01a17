"""The arithmetic of decoding with many packed query rows: 64 of them for each consumer warpgroup.

As in the forward (arXiv 2407.08608, sections 3.1 and 3.2): K and V come through rings that a producer warp
fills; consumers take turns on the tensor cores; and inside a consumer the softmax of one tile runs while
P V of the tile before is multiplied. From 128 rows on a tile has as much arithmetic as memory traffic, and
whatever does not overlap shows.
"""

from tandem_attn.device.decode_rows import chunk_of, clear_ragged
from tandem_attn.device.gluon import (
    aggregate,
    gl,
    gluon,
    mbarrier,
    policy,
    thread_barrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from tandem_attn.device.precision import pack_probabilities, unpack_operand
from tandem_attn.device.softmax import offset_and_rescale, soft_capped, thread_sum
from tandem_attn.device.turn import pass_turn, take_turn


@aggregate
class Stages:
    """A ring of K or V tiles. Fills are named by running numbers, from 0."""

    smem: gl.shared_memory_descriptor  # [stages * chunks * pieces, rows of a piece, columns of a chunk]
    full: gl.shared_memory_descriptor  # TMA -> consumers
    empty: gl.shared_memory_descriptor  # consumers -> TMA
    chunks: gl.constexpr
    width: gl.constexpr
    config: gl.constexpr

    @gluon.jit
    def wait(self, i):
        """Consumer: until fill i has landed."""
        num_stages: gl.constexpr = self.config.num_stages
        mbarrier.wait(self.full.index(i % num_stages), i // num_stages & 1)

    @gluon.jit
    def release(self, i):
        """Consumer: the stage of fill i may be overwritten."""
        mbarrier.arrive(self.empty.index(i % self.config.num_stages), count=1)

    @gluon.jit
    def chunk(self, i, c: gl.constexpr):
        """Columns chunk c of fill i, [tile_n, width]."""
        return chunk_of(self.smem, i % self.config.num_stages, c, self.chunks, self.width, self.config)

    @gluon.jit
    def refill(self, i):
        """Producer: (stage, its barrier) of fill i, once it is empty."""
        num_stages: gl.constexpr = self.config.num_stages
        stage = i % num_stages
        mbarrier.wait(self.empty.index(stage), (i // num_stages & 1) ^ 1)
        return stage, self.full.index(stage)


@aggregate
class GroupState:
    """The rows of a consumer: O, P of the tile before (its P V not yet started), maximum and sum so far."""

    o: gl.tuple
    p: gl.tensor  # packed
    row_max: gl.tensor
    row_sum: gl.tensor  # [64, 4]


@gluon.jit
def _start_scores(q, k: Stages, i, config: gl.constexpr):
    """Start S = Q K_i^T."""
    s = gl.zeros([config.group_rows, config.tile_n], gl.float32, config.s_layout)
    for c in gl.static_range(config.k_chunks):
        s = warpgroup_mma(q[c], k.chunk(i, c).permute((1, 0)), s, use_acc=c > 0, is_async=True)
    return s


@gluon.jit
def _start_output(p, v: Stages, i, o, use_acc, config: gl.constexpr):
    """Start O += P V_i."""
    started = ()
    for c in gl.static_range(config.v_chunks):
        started = started + (warpgroup_mma(p, v.chunk(i, c), o[c], use_acc=use_acc, is_async=True),)
    return started


@gluon.jit
def _finish_output(started, config: gl.constexpr):
    """Wait for all products."""
    waited = warpgroup_mma_wait(0, deps=started)
    if config.v_chunks == 1:
        return (waited,)
    else:
        return waited


@gluon.jit
def _softmax(s, max_before, rows, n0, scale_log2, inner_scale, config: gl.constexpr):
    """(maximum, alpha, probabilities) of the tile of keys at n0."""
    if config.softcap:
        s = soft_capped(s, inner_scale)
    if rows.partial(n0):
        r = gl.arange(0, config.group_rows, gl.SliceLayout(1, config.s_layout))
        key = n0 + gl.arange(0, config.tile_n, gl.SliceLayout(0, config.s_layout))
        s = gl.where(rows.visible(r[:, None], key[None, :]), s, float("-inf"))
    row_max = gl.maximum(max_before, gl.max(s, 1))
    offset, alpha = offset_and_rescale(max_before, row_max, scale_log2, True)
    return row_max, alpha, gl.exp2(s * scale_log2 - offset[:, None])


@gluon.jit
def clear_before_use(v: Stages, i, rows, n0):
    """Wait for V of fill i, and clear what does not exist of it. All consumers write the same zeros."""
    v.wait(i)
    if rows.ragged(n0):
        clear_ragged(v.smem, i % v.config.num_stages, rows, n0)
        thread_barrier()


@gluon.jit
def first_tile(group: gl.constexpr, q, k: Stages, i, rows, n0, scales, config: gl.constexpr):
    """The state after the first tile of a segment."""
    k.wait(i)
    if config.num_groups > 1:
        take_turn(group)
    s = _start_scores(q, k, i, config)
    if config.num_groups > 1:
        pass_turn(group, config.num_groups)
    s = warpgroup_mma_wait(0, deps=(s,))
    k.release(i)
    max_before = gl.full([config.group_rows], float("-inf"), gl.float32, gl.SliceLayout(1, config.s_layout))
    row_max, alpha, p = _softmax(s, max_before, rows, n0, scales[0], scales[1], config)
    o = ()
    for _ in gl.static_range(config.v_chunks):
        o = o + (gl.zeros([config.group_rows, config.v_width], gl.float32, config.o_layout),)
    return GroupState(o, pack_probabilities(p, config.dtype), row_max, thread_sum(p))


@gluon.jit
def next_tile(
    group: gl.constexpr, q, k: Stages, v: Stages, i, state, rows, n0, use_acc, scales, config: gl.constexpr
):
    """Scores of tile i and P V of the tile before in flight together, then the softmax of tile i."""
    p = unpack_operand(state.p, config.dtype, config.o_layout)
    if config.has_leftpad:
        clear_before_use(v, i - 1, rows, n0 - config.tile_n)
    k.wait(i)
    if config.num_groups > 1:
        take_turn(group)
    s_started = _start_scores(q, k, i, config)
    v.wait(i - 1)
    o_started = _start_output(p, v, i - 1, state.o, use_acc, config)
    if config.num_groups > 1:
        pass_turn(group, config.num_groups)
    s = warpgroup_mma_wait(config.v_chunks, deps=(s_started,))
    k.release(i)
    row_max, alpha, p = _softmax(s, state.row_max, rows, n0, scales[0], scales[1], config)
    by_sum: gl.constexpr = gl.SliceLayout(1, state.row_sum.type.layout)
    row_sum = state.row_sum * gl.convert_layout(alpha, by_sum, assert_trivial=True)[:, None] + thread_sum(p)
    waited = _finish_output(o_started, config)
    v.release(i - 1)
    factor = gl.convert_layout(alpha, gl.SliceLayout(1, config.o_layout), assert_trivial=True)
    o = ()
    for c in gl.static_range(config.v_chunks):
        o = o + (waited[c] * factor[:, None],)
    return GroupState(o, pack_probabilities(p, config.dtype), row_max, row_sum)


@gluon.jit
def last_output(v: Stages, i, state, rows, n0, use_acc, scale_log2, config: gl.constexpr):
    """(output chunks, normalised; base-2 log-sum-exp) after P V of the last tile of a segment, i."""
    p = unpack_operand(state.p, config.dtype, config.o_layout)
    clear_before_use(v, i, rows, n0)
    o = _finish_output(_start_output(p, v, i, state.o, use_acc, config), config)
    v.release(i)
    by_row: gl.constexpr = gl.SliceLayout(1, config.o_layout)
    total = gl.convert_layout(gl.sum(state.row_sum, 1), by_row, assert_trivial=True)
    base = gl.convert_layout(state.row_max, by_row, assert_trivial=True) * scale_log2
    some = total > 0.0
    inverse = gl.where(some, 1.0 / total, 0.0)
    x = ()
    for c in gl.static_range(config.v_chunks):
        x = x + (o[c] * inverse[:, None],)
    return x, gl.where(some, base + gl.log2(total), float("-inf"))


@policy(specialised=True)
class GroupRows:
    """The RowKind of `kernels/decode_groups.py`: warps of different kinds, the functions above."""

    config: gl.constexpr
