"""The arithmetic of decoding with many packed query rows: 64 of them for each consumer warpgroup.

As in the forward (arXiv 2407.08608, sections 3.1 and 3.2): K and V come through rings that a producer warp
fills; consumers take turns on the tensor cores; and inside a consumer the softmax of one tile runs while
P V of the tile before is multiplied. From 128 rows on a tile has as much arithmetic as memory traffic, and
whatever does not overlap shows. A cache in e4m3 is unpacked on its way into the rings, by the warps that load
it.
"""

from tandem_attn.device.cache_numbers import chunk_of, even_and_odd
from tandem_attn.device.decode_rows import clear_ragged, joined, of_scores, scaled_rows, unit_of_o
from tandem_attn.device.gluon import (
    aggregate,
    base_value,
    fence_async_shared,
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

# Tiles whose factors are kept. Those of a tile are looked at after its K has been handed back, while the
# producer may keep those of the third tile after it (K's two stages let it no further): 4 at least, and some
# for warps that lag.
FACTOR_TILES = gl.constexpr(8)


@aggregate
class Stages:
    """A ring of K or V tiles as wgmma takes them. Fills are named by running numbers, from 0."""

    smem: gl.shared_memory_descriptor  # [stages * chunks * pieces, rows of a piece, columns of a chunk]
    full: gl.shared_memory_descriptor  # producer -> consumers
    empty: gl.shared_memory_descriptor  # consumers -> producer
    factors: base_value  # (), or fp32 [FACTOR_TILES, tile_n]
    chunks: gl.constexpr
    width: gl.constexpr
    config: gl.constexpr

    @gluon.jit
    def wait(self, i):
        """Consumer: until fill i has landed."""
        num_stages: gl.constexpr = self.config.ring_stages
        mbarrier.wait(self.full.index(i % num_stages), i // num_stages & 1)

    @gluon.jit
    def release(self, i):
        """Consumer: the stage of fill i may be overwritten."""
        mbarrier.arrive(self.empty.index(i % self.config.ring_stages), count=1)

    @gluon.jit
    def chunk(self, i, c: gl.constexpr):
        """Columns chunk c of fill i, [tile_n, width]."""
        stage = i % self.config.ring_stages
        if self.config.scaled:
            return self.smem.index(stage * self.chunks + c)
        else:
            return chunk_of(self.smem, stage, c, self.chunks, self.width, self.config)

    @gluon.jit
    def factors_of(self, i):
        """Those of the keys of fill i, [tile_n], to go with scores."""
        return self.factors.index(i % FACTOR_TILES).load(gl.SliceLayout(0, self.config.s_layout))

    @gluon.jit
    def refill(self, i):
        """Producer: (stage, its barrier) of fill i, once it is empty."""
        num_stages: gl.constexpr = self.config.ring_stages
        stage = i % num_stages
        mbarrier.wait(self.empty.index(stage), (i // num_stages & 1) ^ 1)
        return stage, self.full.index(stage)

    @gluon.jit
    def keep_factors(self, i, factors):
        """Producer: those of the keys of fill i, from [tile_n] in shared memory. Both K's and V's come before
        K of fill i, because the softmax looks at both."""
        self.factors.index(i % FACTOR_TILES).store(factors.load(self.config.keys_layout))

    @gluon.jit
    def unpack(self, i, words, stage_of_words, keep):
        """Producer: fill i from a stage of words, zeros where `keep` [tile_n, 1], if given, is not set."""
        width: gl.constexpr = self.width
        layout: gl.constexpr = self.config.copy_layout(width)
        stage, bar = self.refill(i)
        x = chunk_of(words, stage_of_words, 0, 1, width, self.config).load(layout)
        if keep is not None:
            x = gl.where(keep, x, 0)
        even, odd = even_and_odd(x)
        self.smem.index(stage * 2).store(even)
        self.smem.index(stage * 2 + 1).store(odd)
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(bar, count=1)


@aggregate
class GroupState:
    """The rows of a consumer: O, P of the tile before (its P V not yet started), maximum and sum so far."""

    o: gl.tuple
    p: gl.tensor  # packed
    row_max: gl.tensor  # of scores as they are
    row_sum: gl.tensor  # [64, 4]
    unit: gl.tuple  # of V that P and O are in; without factors ()


@gluon.jit
def _start_scores(q, k: Stages, i, config: gl.constexpr):
    """Start S = Q K_i^T."""
    s = gl.zeros([config.group_rows, config.tile_n], gl.float32, config.s_layout)
    for c in gl.static_range(config.q_chunks):
        s = warpgroup_mma(q[c], k.chunk(i, c).permute((1, 0)), s, use_acc=c > 0, is_async=True)
    return s


@gluon.jit
def _start_output(p, v: Stages, i, o, use_acc, config: gl.constexpr):
    """Start O += P V_i."""
    started = ()
    for c in gl.static_range(config.o_chunks):
        started = started + (warpgroup_mma(p, v.chunk(i, c), o[c], use_acc=use_acc, is_async=True),)
    return started


@gluon.jit
def _finish_output(started, config: gl.constexpr):
    """Wait for all products."""
    waited = warpgroup_mma_wait(0, deps=started)
    if config.o_chunks == 1:
        return (waited,)
    else:
        return waited


@gluon.jit
def scales_of(units, group: gl.constexpr, scales, config: gl.constexpr):
    """What scores of this consumer's rows are multiplied by: numbers, or tensors of rows."""
    if config.scaled:
        unit = units.index(group).load(gl.SliceLayout(1, config.s_layout))
        return scaled_rows(scales, unit, config)
    else:
        return scales[0], scales[1]


@gluon.jit
def _softmax(s, k: Stages, i, max_before, rows, n0, scale_log2, inner_scale, config: gl.constexpr):
    """(maximum, alpha, probabilities) of the tile of keys at n0, fill i."""
    if config.scaled:
        s = s * k.factors_of(i)[None, :]
    if config.softcap:
        s = soft_capped(s, of_scores(inner_scale, config.scaled))
    if rows.partial(n0):
        r = gl.arange(0, config.group_rows, gl.SliceLayout(1, config.s_layout))
        key = n0 + gl.arange(0, config.tile_n, gl.SliceLayout(0, config.s_layout))
        s = gl.where(rows.visible(r[:, None], key[None, :]), s, float("-inf"))
    row_max = gl.maximum(max_before, gl.max(s, 1))
    offset, alpha = offset_and_rescale(max_before, row_max, scale_log2, True)
    scale = of_scores(scale_log2, config.scaled and not config.softcap)
    return row_max, alpha, gl.exp2(s * scale - offset[:, None])


@gluon.jit
def _in_units(p, v: Stages, i, before, config: gl.constexpr):
    """(P in units of the largest factor of V of fill i; the unit; what O is worth in it that is in
    the unit before)."""
    if config.scaled:
        f = v.factors_of(i)
        unit, worth = unit_of_o(gl.max(f, 0), before[0])
        return p * (f * (1.0 / unit))[None, :], (unit,), worth
    else:
        return p, (), 1.0


@gluon.jit
def clear_before_use(v: Stages, i, rows, n0):
    """Wait for V of fill i, and clear what does not exist of it. All consumers write the same zeros."""
    v.wait(i)
    if not v.config.scaled:  # noqa: SIM102 (one is known when compiling)
        if rows.ragged(n0):
            clear_ragged(v.smem, i % v.config.num_stages, rows, n0)
            thread_barrier()


@gluon.jit
def first_tile(group: gl.constexpr, q, k: Stages, v: Stages, i, rows, n0, scales, config: gl.constexpr):
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
    row_max, alpha, p = _softmax(s, k, i, max_before, rows, n0, scales[0], scales[1], config)
    o = ()
    for _ in gl.static_range(config.o_chunks):
        o = o + (gl.zeros([config.group_rows, config.v_width], gl.float32, config.o_layout),)
    row_sum = thread_sum(p)
    p, unit, worth = _in_units(p, v, i, (1.0,), config)
    return GroupState(o, pack_probabilities(p, config.dtype), row_max, row_sum, unit)


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
    s = warpgroup_mma_wait(config.o_chunks, deps=(s_started,))
    k.release(i)
    row_max, alpha, p = _softmax(s, k, i, state.row_max, rows, n0, scales[0], scales[1], config)
    by_sum: gl.constexpr = gl.SliceLayout(1, state.row_sum.type.layout)
    row_sum = state.row_sum * gl.convert_layout(alpha, by_sum, assert_trivial=True)[:, None] + thread_sum(p)
    p, unit, worth = _in_units(p, v, i, state.unit, config)
    waited = _finish_output(o_started, config)
    v.release(i - 1)
    if config.scaled:
        alpha = alpha * worth
    factor = gl.convert_layout(alpha, gl.SliceLayout(1, config.o_layout), assert_trivial=True)
    o = ()
    for c in gl.static_range(config.o_chunks):
        o = o + (waited[c] * factor[:, None],)
    return GroupState(o, pack_probabilities(p, config.dtype), row_max, row_sum, unit)


@gluon.jit
def last_output(v: Stages, i, state, rows, n0, use_acc, scale_log2, config: gl.constexpr):
    """(output chunks, normalised; base-2 log-sum-exp) after P V of the last tile of a segment, i."""
    p = unpack_operand(state.p, config.dtype, config.o_layout)
    clear_before_use(v, i, rows, n0)
    o = _finish_output(_start_output(p, v, i, state.o, use_acc, config), config)
    v.release(i)
    by_row: gl.constexpr = gl.SliceLayout(1, config.o_layout)
    total = gl.convert_layout(gl.sum(state.row_sum, 1), by_row, assert_trivial=True)
    base = gl.convert_layout(state.row_max * scale_log2, by_row, assert_trivial=True)
    some = total > 0.0
    inverse = gl.where(some, 1.0 / total, 0.0)
    if config.scaled:
        inverse = inverse * state.unit[0]
    x = ()
    for c in gl.static_range(config.o_chunks):
        x = x + (o[c] * inverse[:, None],)
    if config.scaled:
        x = (joined(x),)
    return x, gl.where(some, base + gl.log2(total), float("-inf"))


@policy(specialised=True)
class GroupRows:
    """The RowKind of `kernels/decode_groups.py`: warps of different kinds, the functions above."""

    config: gl.constexpr
