"""The arithmetic of decoding: packed query rows of one KV head against tiles of keys.

`WarpKeys`: up to 16 rows, mma.sync. Every warp owns a part of the keys of a tile and keeps a maximum, a sum
and an output of its own for all rows, so that a loop needs no exchange between warps; they are merged once
per segment. The 3-D layout makes the warp the batch dimension. `WarpRows`: 64 rows for each warpgroup, wgmma;
every warp owns 16 rows and sees all keys. Measured against each other: docs/kernels/decode.md.
"""

from tandem_attn.device.cache_numbers import chunk_of
from tandem_attn.device.gluon import (
    aggregate,
    fence_async_shared,
    gl,
    gluon,
    mma_v2,
    policy,
    reinterpreted,
    thread_barrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from tandem_attn.device.softmax import soft_capped


@aggregate
class Rows:
    """What the rows of an item may see."""

    length: gl.tensor  # keys of the sequence
    pad: gl.tensor
    offset: gl.tensor  # position of token 0 among the keys
    row: gl.tensor  # first packed row
    seen_by_all: gl.tensor  # keys before this one may be seen by every row
    from_all: gl.tensor  # and from this one on
    window_left: gl.tensor
    window_right: gl.tensor
    config: gl.constexpr

    @gluon.jit
    def partial(self, n0):
        """Whether some row may not see some key of the tile at n0."""
        cut = n0 + self.config.tile_n > self.seen_by_all
        if self.config.left_edge or self.config.has_leftpad:
            cut = cut | (n0 < self.from_all)
        return cut

    @gluon.jit
    def ragged(self, n0):
        """Whether the tile at n0 has keys that do not exist."""
        cut = n0 + self.config.tile_n > self.length
        if self.config.has_leftpad:
            cut = cut | (n0 < self.pad)
        return cut

    @gluon.jit
    def visible(self, r, key):
        """Whether row r (of the item) may see a key."""
        last = r * 0 + (self.length - 1)
        first = r * 0 + self.pad
        token = ((self.row + r).to(gl.uint32) // self.config.group_size).to(gl.int32)
        position = token + self.offset
        if self.config.right_edge:
            last = gl.minimum(last, position + self.window_right)
        seen = key <= last
        if self.config.left_edge:
            first = gl.maximum(first, position - self.window_left)
        if self.config.left_edge or self.config.has_leftpad:
            seen = seen & (key >= first)
        return seen


@gluon.jit
def clear_ragged(v_smem, stage, rows, n0):
    """Zeros in the V of keys that do not exist: probabilities there are 0, and 0 * NaN would be NaN."""
    config: gl.constexpr = rows.config
    width: gl.constexpr = config.v_width
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [gl.num_warps(), 1], [1, 0])
    key = n0 + gl.arange(0, config.tile_n, gl.SliceLayout(1, layout))
    keep = ((key < rows.length) & (key >= rows.pad))[:, None]
    for c in gl.static_range(config.v_chunks):
        v = chunk_of(v_smem, stage, c, config.v_chunks, config.v_width, config)
        v.store(gl.where(keep, v.load(layout), 0))
    fence_async_shared()


@aggregate
class State:
    """Running maximum (base 2, scaled), sum and output."""

    row_max: gl.tensor
    row_sum: gl.tensor
    o: gl.tuple
    unit: gl.tuple  # of o, for each warp or for all; of a cache without factors ()


@gluon.jit
def scaled_rows(scales, unit, config: gl.constexpr):
    """(score, or capped score, to exponent of 2; score to argument of tanh), of rows in their own units."""
    if config.softcap:
        return scales[0], scales[1] * unit
    else:
        return scales[0] * unit, scales[1]


@gluon.jit
def of_scores(scale, of_rows: gl.constexpr):
    """The scale of rows, to go with a tile of scores; or a number."""
    if of_rows:
        return gl.expand_dims(scale, len(scale.shape))
    else:
        return scale


@gluon.jit
def unit_of_o(top, before):
    """(unit of O after a tile whose largest factor of V is `top`, what O before is worth in it).

    float16 probabilities have no room for any factor: they take it in units of the largest of a tile. A tile
    without keys (0) leaves the unit as it is.
    """
    unit = gl.where(top > 0.0, top, before)
    return unit, before / unit


@gluon.jit
def joined(parts):
    """Columns of a tile from operands of even and of odd ones; one operand has them all."""
    if len(parts) == 1:
        return parts[0]
    else:
        pairs = gl.join(parts[0], parts[1])
        rank: gl.constexpr = len(parts[0].shape)
        return pairs.reshape(pairs.shape[: rank - 1] + [pairs.shape[rank - 1] * 2])


@policy()
class WarpKeys:
    """mma.sync m16n8k16 with the warp as batch: s is [warps, 16, keys of a warp]."""

    config: gl.constexpr

    @gluon.jit
    def operand(self, q_smem):
        """Q as left operands, one for each chunk of columns; or where it is, if registers would not do."""
        if self.config.q_in_registers:
            parts = ()
            for c in gl.static_range(self.config.q_chunks):
                parts = parts + (self._chunk_of_q(q_smem, c),)
            return parts
        else:
            return q_smem

    @gluon.jit
    def _chunk_of_q(self, q_smem, c: gl.constexpr):
        config: gl.constexpr = self.config
        layout: gl.constexpr = gl.DotOperandLayout(0, config.mma, 2)
        q = gl.expand_dims(q_smem.index(c).load(gl.SliceLayout(0, layout)), 0)
        like = gl.zeros([config.num_warps, config.tile_m, config.k_width], q_smem.dtype, layout)
        return gl.broadcast(q, like)[0]

    @gluon.jit
    def _operand_chunk(self, q, c: gl.constexpr):
        if self.config.q_in_registers:
            return q[c]
        else:
            return self._chunk_of_q(q, c)

    @gluon.jit
    def scales(self, units, scales):
        """What scores and maxima are multiplied by: numbers, or tensors of rows."""
        if self.config.scaled:
            layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, self.config.mma))
            unit = gl.expand_dims(units.index(0).load(layout), 0)
            return scaled_rows(scales, unit, self.config)
        else:
            return scales[0], scales[1]

    @gluon.jit
    def empty(self):
        config: gl.constexpr = self.config
        layout: gl.constexpr = gl.SliceLayout(2, config.mma)
        o = ()
        for _ in gl.static_range(config.o_chunks):
            o = o + (gl.zeros([config.num_warps, config.tile_m, config.v_width], gl.float32, config.mma),)
        row_max = gl.full([config.num_warps, config.tile_m], float("-inf"), gl.float32, layout)
        unit = ()
        if config.scaled:
            unit = (gl.full([config.num_warps], 1.0, gl.float32, gl.SliceLayout(1, layout)),)
        return State(row_max, gl.zeros([config.num_warps, config.tile_m], gl.float32, layout), o, unit)

    @gluon.jit
    def _factors(self, tiles, row):
        """[warps, keys of a warp], of the keys of a tile."""
        keys: gl.constexpr = self.config.tile_n // self.config.num_warps
        of_keys = tiles.numbers.factors.index(row).reshape([self.config.num_warps, keys])
        return of_keys.load(gl.SliceLayout(1, self.config.mma))

    @gluon.jit
    def attend(self, q, tiles, stage, state, rows, n0, scale_log2, inner_scale):
        config: gl.constexpr = self.config
        mma: gl.constexpr = config.mma
        W: gl.constexpr = config.num_warps
        M: gl.constexpr = config.tile_m
        keys: gl.constexpr = config.tile_n // W
        right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
        s = gl.zeros([W, M, keys], gl.float32, mma)
        for c in gl.static_range(config.k_chunks):
            k = chunk_of(tiles.k_smem, stage, c, config.k_chunks, config.k_width, config)
            k = k.reshape([W, keys, config.k_width]).permute((0, 2, 1)).load(right)
            parts = tiles.numbers.operands(k)
            for i in gl.static_range(config.parts):
                s = mma_v2(self._operand_chunk(q, c * config.parts + i), parts[i], s)
        if config.scaled:
            s = s * self._factors(tiles, stage * 2)[:, None, :]
        if config.softcap:
            s = soft_capped(s, of_scores(inner_scale, config.scaled))
        if rows.partial(n0):
            warp = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, mma)))
            r = gl.arange(0, M, gl.SliceLayout(0, gl.SliceLayout(2, mma)))
            key = gl.arange(0, keys, gl.SliceLayout(0, gl.SliceLayout(1, mma)))
            key = n0 + warp[:, None, None] * keys + key[None, None, :]
            s = gl.where(rows.visible(r[None, :, None], key), s, float("-inf"))
            if not tiles.clears:  # noqa: SIM102 (one is known when compiling)
                if rows.ragged(n0):
                    clear_ragged(tiles.v_smem, stage, rows, n0)
        row_max = gl.maximum(state.row_max, gl.max(s, 2) * scale_log2)
        base = gl.where(row_max == float("-inf"), 0.0, row_max)  # a warp may have seen masked keys only
        alpha = gl.exp2(state.row_max - base)
        scale = of_scores(scale_log2, config.scaled and not config.softcap)
        p = gl.exp2(s * scale - base[:, :, None])
        row_sum = state.row_sum * alpha + gl.sum(p, 2)
        unit = ()
        if config.scaled:
            f = self._factors(tiles, stage * 2 + 1)
            of_warp: gl.constexpr = gl.SliceLayout(1, f.type.layout)
            top = gl.convert_layout(gl.max(f, 1), state.unit[0].type.layout, assert_trivial=True)
            unit, worth = unit_of_o(top, state.unit[0])
            inverse = gl.convert_layout(1.0 / unit, of_warp, assert_trivial=True)
            p = p * (f * inverse[:, None])[:, None, :]
            alpha = alpha * worth[:, None]
            unit = (unit,)
        p = gl.convert_layout(p.to(config.dtype.value), gl.DotOperandLayout(0, mma, 2), assert_trivial=True)
        o = ()
        for c in gl.static_range(config.v_chunks):
            v = chunk_of(tiles.v_smem, stage, c, config.v_chunks, config.v_width, config)
            parts = tiles.numbers.operands(v.reshape([W, keys, config.v_width]).load(right))
            for i in gl.static_range(config.parts):
                before = state.o[c * config.parts + i] * alpha[:, :, None]
                o = o + (mma_v2(p, parts[i], before),)
        return State(row_max, row_sum, o, unit)

    @gluon.jit
    def finish(self, state, tiles, scratch, stage):
        """(output chunks [rows, v_width], normalised; base-2 log-sum-exp [rows]): the warps merged."""
        config: gl.constexpr = self.config
        layout: gl.constexpr = config.merge_layout
        W: gl.constexpr = config.num_warps
        M: gl.constexpr = config.tile_m
        kept: gl.constexpr = config.kept_rows
        rows: gl.constexpr = config.rows_stored
        ml_smem = scratch[0]
        if config.scratch_fits > 0:  # the stage just left is filled again after the next meeting only
            thread_barrier()
            o_smem = reinterpreted(tiles.v_smem, gl.float32, config.scratch_in_stages, config.scratch_layout)
            o_smem = o_smem.index(stage * config.scratch_fits)
        else:
            o_smem = scratch[1]
        ml_smem.index(0).store(state.row_max)
        ml_smem.index(1).store(state.row_sum)
        o = state.o
        if config.scaled:
            unit = state.unit[0][:, None, None]
            o = (o[0] * unit, o[1] * unit)
        o = joined(o)
        if kept < M:  # half of the registers hold padding
            halves = gl.permute(gl.reshape(o, [W, 2, kept, config.out_width]), (0, 2, 3, 1))
            low, high = gl.split(halves)
            o_smem.store(low)
        else:
            o_smem.store(o)
        by_row: gl.constexpr = gl.SliceLayout(2, layout)
        row_max = ml_smem.index(0).slice(0, rows, dim=1).load(by_row)
        row_sum = ml_smem.index(1).slice(0, rows, dim=1).load(by_row)
        top = gl.max(row_max, 0)
        base = gl.where(top == float("-inf"), 0.0, top)
        w = gl.exp2(row_max - base[None, :])
        total = gl.sum(row_sum * w, 0)
        w = w * gl.where(total > 0.0, 1.0 / total, 0.0)[None, :]
        x = gl.sum(o_smem.slice(0, rows, dim=1).load(layout) * w[:, :, None], 0)
        return (x,), gl.where(total > 0.0, base + gl.log2(total), float("-inf"))


@policy()
class WarpRows:
    """wgmma of 64 rows for each warpgroup: s is [rows, keys]."""

    config: gl.constexpr

    @gluon.jit
    def operand(self, q_smem):
        fence_async_shared()
        thread_barrier()
        return q_smem

    @gluon.jit
    def scales(self, units, scales):
        return scales[0], scales[1]

    @gluon.jit
    def empty(self):
        config: gl.constexpr = self.config
        layout: gl.constexpr = gl.SliceLayout(1, config.o_layout)
        o = ()
        for _ in gl.static_range(config.v_chunks):
            o = o + (gl.zeros([config.tile_m, config.v_width], gl.float32, config.o_layout),)
        row_max = gl.full([config.tile_m], float("-inf"), gl.float32, layout)
        return State(row_max, gl.zeros([config.tile_m], gl.float32, layout), o, ())

    @gluon.jit
    def attend(self, q, tiles, stage, state, rows, n0, scale_log2, inner_scale):
        config: gl.constexpr = self.config
        if not tiles.clears:  # noqa: SIM102 (one is known when compiling)
            if rows.ragged(n0):
                clear_ragged(tiles.v_smem, stage, rows, n0)
                thread_barrier()
        s = self._scores(q, tiles, stage)
        if config.softcap:
            s = soft_capped(s, inner_scale)
        if rows.partial(n0):
            r = gl.arange(0, config.tile_m, gl.SliceLayout(1, config.s_layout))
            key = n0 + gl.arange(0, config.tile_n, gl.SliceLayout(0, config.s_layout))
            s = gl.where(rows.visible(r[:, None], key[None, :]), s, float("-inf"))
        by_row: gl.constexpr = gl.SliceLayout(1, config.o_layout)
        row_max = gl.maximum(state.row_max, gl.convert_layout(gl.max(s, 1), by_row) * scale_log2)
        base = gl.where(row_max == float("-inf"), 0.0, row_max)
        alpha = gl.exp2(state.row_max - base)
        p = gl.exp2(s * scale_log2 - gl.convert_layout(base, gl.SliceLayout(1, config.s_layout))[:, None])
        row_sum = state.row_sum * alpha + gl.convert_layout(gl.sum(p, 1), by_row)
        operand: gl.constexpr = gl.DotOperandLayout(0, config.o_layout, 2)
        p = gl.convert_layout(p.to(config.dtype.value), operand, assert_trivial=True)
        return State(row_max, row_sum, self._output(p, alpha, tiles, stage, state.o), ())

    @gluon.jit
    def _scores(self, q, tiles, stage):
        """S of a tile."""
        config: gl.constexpr = self.config
        s = gl.zeros([config.tile_m, config.tile_n], gl.float32, config.s_layout)
        for c in gl.static_range(config.k_chunks):
            k = chunk_of(tiles.k_smem, stage, c, config.k_chunks, config.k_width, config)
            s = warpgroup_mma(q.index(c), k.permute((1, 0)), s, use_acc=c > 0, is_async=True)
        return warpgroup_mma_wait(0, deps=(s,))

    @gluon.jit
    def _output(self, p, alpha, tiles, stage, o):
        """O * alpha + P V."""
        config: gl.constexpr = self.config
        started = ()
        for c in gl.static_range(config.v_chunks):
            v = chunk_of(tiles.v_smem, stage, c, config.v_chunks, config.v_width, config)
            started = started + (warpgroup_mma(p, v, o[c] * alpha[:, None], is_async=True),)
        o = ()
        for c in gl.static_range(config.v_chunks):
            o = o + (warpgroup_mma_wait(0, deps=(started[c],)),)
        return o

    @gluon.jit
    def finish(self, state, tiles, scratch, stage):
        x = ()
        some = state.row_sum > 0.0
        inverse = gl.where(some, 1.0 / state.row_sum, 0.0)
        for c in gl.static_range(self.config.v_chunks):
            x = x + (state.o[c] * inverse[:, None],)
        base = gl.where(state.row_max == float("-inf"), 0.0, state.row_max)
        return x, gl.where(some, base + gl.log2(state.row_sum), float("-inf"))
