"""FP8 out of 16-bit q, k and v: memory-bound kernels.

A program of `quantize_tiles` takes 128 rows of one head, in registers: rotary embedding, rotation
(device/rotation.py), the means of K and V, the largest magnitude of each block, e4m3; of V also the
transposition (device/transposed.py). Several programs are resident, and some load while others compute. A
tile of heads wider than 128 does not fit in registers: its rows come to shared memory by asynchronous copies,
all at once, and go through registers in parts; what waits for its scale does so there. Means come from
launches before that (kernels/means.py), for which tiles of V, the first, need not wait. A scale for more than
a block needs its maximum first: `quantize_tiles` with `measures`.
"""

from tandem_attn.device.fp8_tiles import (
    TILE,
    Rotary,
    Side,
    comparable,
    larger,
    largest_of,
    length_of,
    place_of,
    scales_of,
    tiles_of,
)
from tandem_attn.device.gluon import gdc_wait, gl, gluon
from tandem_attn.device.rotation import PIECE, as_right_operands, in_shared, products_of_rows
from tandem_attn.device.row_pieces import (
    arrived,
    ask_for_pieces,
    ask_for_rows,
    columns_of,
    kept,
    loaded,
    put_aside,
    rotated_rows,
    rows_of_part,
    signs_in_shared,
    signs_of,
)
from tandem_attn.device.transposed import as_new, four_keys, pack_four, regroup_bytes, store_words


@gluon.jit
def _await(config: gl.constexpr):
    """Until the launch before this one is over, if this one did not wait for it."""
    if config.early:
        gdc_wait()


@gluon.jit
def _less_mean(mean, bits, dtype: gl.constexpr, config: gl.constexpr):
    """In shared memory, what is added to rows of K (`rotated_rows`): less their mean, which is exact in
    dtype. bits: `signs_of`."""
    _await(config)
    less = (-columns_of(mean, config)).to(dtype)
    if config.rotate:
        less = (less.to(gl.int16, bitcast=True) ^ bits).to(dtype, bitcast=True)
    return in_shared(less)


@gluon.jit
def _row_maxima(pieces, there, config: gl.constexpr):
    """int32 [rows]: the largest magnitude of each, `comparable`."""
    largest = gl.max(comparable(largest_of(pieces)), 1).to(gl.float32, bitcast=True)
    return gl.where(there, comparable(largest * config.norm), 0)


@gluon.jit
def _store_rows(side, pieces, there, inverse, place, head, config: gl.constexpr):
    """fp32 pieces times inverse, a number or one for each row [rows, 1], as e4m3 to memory."""
    inverse *= config.norm
    layout: gl.constexpr = config.layout
    column = gl.arange(0, PIECE, gl.SliceLayout(0, layout))
    to = side.places(place, head, config.head_dim, config.rows, layout, config.packed) + column[None, :]
    for j in gl.static_range(config.pieces):
        keep = kept(there, column, j * 32, config.head_dim)
        gl.store(to + j * 32, (pieces[j] * inverse).to(gl.float8e4nv), mask=keep)


@gluon.jit
def _key_rows(side, place, head, signs, means, rotary, config: gl.constexpr):
    """A tile of K. Its scale is known once all parts are: the first of two waits in shared memory."""
    rows: gl.constexpr = config.rows
    asked = ask_for_rows(side, place, head, config)
    bits = signs_of(signs, config)
    offset = means
    if config.smooth_k:
        number = place.b * side.heads + head
        offset = _less_mean(means + number * config.head_dim, bits, side.x.dtype.element_ty, config)
    signs = signs_in_shared(bits, config)  # not before: rows would be asked for later, once signs have come
    largest = gl.zeros([rows], gl.int32, gl.SliceLayout(1, config.layout))
    if config.knows_scales:
        _await(config)
        inverse = side.shared_inverse(place, head, config.granularity, False)
    for at in gl.static_range(config.parts):
        part = place.part(at * rows)
        x, there = rows_of_part(asked, at, side, part, head, rotary, 0, config)
        x = rotated_rows(x, signs, offset, config.smooth_k, config)
        if config.knows_scales:
            _store_rows(side, x, there, inverse, part, head, config)
        else:
            largest = gl.maximum(largest, _row_maxima(x, there, config))
            if at + 1 < config.parts and not config.measures:
                first = put_aside(x)
    if config.measures:
        side.measure(gl.max(largest, 0), place, head, config.granularity)
    elif not config.knows_scales:
        descale, inverse = scales_of(gl.max(largest, 0))
        side.keep_descale(descale, place, head, TILE, config.packed)
        _store_rows(side, x, there, inverse, part, head, config)
        if config.parts > 1:
            _, there = place.rows(rows, gl.SliceLayout(1, config.layout))
            first = loaded(first, 0, config.pieces, config.layout)
            _store_rows(side, first, there, inverse, place, head, config)


@gluon.jit
def _store_shift(side, shift, x, mean, place, head, config: gl.constexpr):
    """What 16-bit rows of q give with the mean of K."""
    row, there = place.rows(config.rows, gl.SliceLayout(1, config.layout))
    at = head if config.packed else place.b * side.heads + head
    at = at.to(gl.int64) * side.seqlen + place.start + row
    gl.store(shift + at, products_of_rows(x, mean, config.mma), mask=there)


@gluon.jit
def _query_rows(side, place, head, shift, kv_heads, signs, means, rotary, before, config: gl.constexpr):
    """A tile of q, and its products with the mean of K. before: position of the first query."""
    dtype: gl.constexpr = side.x.dtype.element_ty
    asked = ask_for_rows(side, place, head, config)
    bits = signs_of(signs, config)
    mean = means
    if config.smooth_k and not config.measures:
        _await(config)
        mean += (place.b * kv_heads + head // (side.heads // kv_heads)) * config.head_dim
        mean = as_right_operands(mean, config.columns, config.head_dim, dtype)
    signs = signs_in_shared(bits, config)  # as of K
    for at in gl.static_range(config.parts):
        part = place.part(at * config.rows)
        x, there = rows_of_part(asked, at, side, part, head, rotary, before, config)
        if config.smooth_k and not config.measures:
            _store_shift(side, shift, x, mean, part, head, config)
        _finish_queries(side, rotated_rows(x, signs, means, False, config), there, part, head, config)


@gluon.jit
def _finish_queries(side, x, there, place, head, config: gl.constexpr):
    """fp32 pieces of q -> e4m3 and scales, or only a maximum."""
    if not config.knows_scales:
        bits = _row_maxima(x, there, config)
    if config.measures:
        side.measure(gl.max(bits, 0), place, head, config.granularity)
    else:
        if config.granularity == "block":
            inverse = _query_scales(side, bits, place, head, config)
        else:
            _await(config)
            inverse = side.shared_inverse(place, head, config.granularity, False)
        _store_rows(side, x, there, inverse, place, head, config)


@gluon.jit
def _query_scales(side, bits, place, head, config: gl.constexpr):
    """The inverse scales of blocks of 64 rows, fit for `_store_rows`; keeps the scales."""
    block: gl.constexpr = TILE // 2
    if config.rows == block:
        descale, inverse = scales_of(gl.max(bits, 0))
        side.keep_descale(descale, place, head, block, config.packed)
        return inverse
    else:
        rows = bits.reshape([config.rows // block, block])
        descale, inverse = scales_of(gl.max(rows, 1))
        side.keep_descale(descale, place, head, block, config.packed)
        inverse, _ = gl.broadcast(inverse[:, None], rows)
        return gl.convert_layout(inverse.reshape([config.rows]), bits.type.layout, assert_trivial=True)[
            :, None
        ]


@gluon.jit
def _words(y, place, head, heads, tiles, seqlen, config: gl.constexpr):
    """(pointer to the int32 of a tile in V^T, int32 from channel to channel)."""
    words = y.to(gl.pointer_type(gl.int32), bitcast=True)
    if config.packed:
        each = tiles * 32
        first = head.to(gl.int64) * config.head_dim_v * each + place.padded // 4
    else:
        each = gl.maximum((seqlen + (TILE - 1)) // TILE, 1) * 32
        first = (place.b * heads + head).to(gl.int64) * config.head_dim_v * each + place.m // 4
    return words + first, each


@gluon.jit
def _less_value_mean(x, mean, there, column, j: gl.constexpr, config: gl.constexpr):
    """fp32 piece of a tile of V, less its mean if there is smoothing; rows that are not there stay 0."""
    y = x.to(gl.float32)
    if config.smooth_v:
        first: gl.constexpr = j * config.v_width
        c = gl.load(mean + first + column, mask=column < config.head_dim_v - first, other=0.0)
        y = y - c[None, :] * there.to(gl.float32)[:, None]
    return y


@gluon.jit
def _largest_value(pieces, mean, there, column, config: gl.constexpr):
    """The largest magnitude in a tile of V, `comparable`."""
    if config.smooth_v:
        # piece by piece: of all of them fp32 numbers would not fit
        largest = gl.zeros_like(four_keys(pieces[0])[0]).to(gl.float32)
        for j in gl.static_range(config.v_pieces):
            e, f, g, h = four_keys(_less_value_mean(pieces[j], mean, there, column, j, config))
            largest = larger(larger(larger(larger(largest, e), f), g), h)
    else:
        e, f, g, h = four_keys(largest_of(pieces))
        largest = larger(larger(e, f), larger(g, h))
    return gl.max(comparable(largest))


@gluon.jit
def _value_rows(side, place, head, means, config: gl.constexpr):
    """A tile of V: quantized, transposed, 0 past the end. means: of all heads."""
    width: gl.constexpr = config.v_width
    _, there = place.rows(TILE, gl.SliceLayout(1, config.v_layout))
    column = gl.arange(0, width, gl.SliceLayout(0, config.v_layout))
    x = side.rows(place, head, TILE, config.v_layout) + column[None, :]
    asked = ask_for_pieces(x, there, column, config.v_pieces, config.head_dim_v, config.v_copies)
    mean = means
    if config.smooth_v:
        _await(config)
        mean += (place.b * side.heads + head) * config.head_dim_v
    pieces = asked
    if config.staged:
        pieces = arrived(asked, 0, 1, config.v_layout)
    if not config.knows_scales:
        bits = _largest_value(pieces, mean, there, column, config)
    if config.measures:
        side.measure(bits, place, head, config.granularity)
    else:
        if config.granularity == "block":
            descale, inverse = scales_of(bits, True)
            side.keep_descale(descale, place, head, TILE, config.packed)
        else:
            _await(config)
            inverse = side.shared_inverse(place, head, config.granularity, True)
        words, each = _words(side.y, place, head, side.heads, side.tiles, side.seqlen, config)
        for j in gl.static_range(config.v_pieces):
            y = asked[j].load(config.v_layout) if config.staged else as_new(pieces[j])
            y = pack_four(_less_value_mean(y, mean, there, column, j, config) * inverse)
            store_words(words, y, j * width, config.head_dim_v, each, config.words_layout)


_SIZES = ["batch", "heads", "kv_heads", "seqlen_q", "seqlen_k", "rotary_stride", "rotary_len"]
_STRIDES = [f"{x}_{of}" for x in "qkv" for of in ("batch", "row", "head")]
_LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"]


@gluon.jit(do_not_specialize=[*_SIZES, *_STRIDES], do_not_specialize_on_alignment=_LENGTHS)
def quantize_tiles(q, k, v, outputs, tables, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, batch, heads,
                   kv_heads, seqlen_q, seqlen_k, rotary_stride, rotary_len, q_batch, q_row, q_head, k_batch,
                   k_row, k_head, v_batch, v_row, v_head, config: gl.constexpr):  # fmt: skip
    """Grid: tiles of all heads of v, then of k, then of q. Strides in units of 8 elements; the batch's are 0
    of packed tensors, whose seqlen is that of all sequences. Pointers that are not given point anywhere.

    outputs: q, k, v_t, q_descale, k_descale, v_descale, lse_shift; tables: signs, means of K and of V, maxima
    of q, of k and of v, cos, sin.
    """
    c: gl.constexpr = config.static
    signs, means = tables[0], tables[1]
    rotary = Rotary(tables[6], tables[7], rotary_stride, rotary_len)
    q_tiles = tiles_of(seqlen_q, batch, 0, c.packed)
    k_tiles = tiles_of(seqlen_k, batch, 0, c.packed)
    v_tiles = tiles_of(seqlen_k, batch, 1, c.packed)
    pid = gl.program_id(0)
    if c.granularity != "block" and not c.measures:
        pid = gl.num_programs(0) - 1 - pid  # what was measured last is still in L2
    if pid < v_tiles * kv_heads:
        side = Side(v, v_batch, v_row, v_head, kv_heads, seqlen_k, v_tiles, outputs[2], outputs[5], tables[5])
        tile = pid // kv_heads
        place = place_of(tile, cu_seqlens_k, seqused_k, seqlen_k, batch, 1, c.has_seqused_k, c)
        if place.holds(c.packed):
            _value_rows(side, place, pid - tile * kv_heads, tables[2], c)
    elif pid < (v_tiles + k_tiles) * kv_heads:
        pid -= v_tiles * kv_heads
        side = Side(k, k_batch, k_row, k_head, kv_heads, seqlen_k, k_tiles, outputs[1], outputs[4], tables[4])
        tile = pid // kv_heads
        place = place_of(tile, cu_seqlens_k, seqused_k, seqlen_k, batch, 0, c.has_seqused_k, c)
        if place.holds(c.packed):
            _key_rows(side, place, pid - tile * kv_heads, signs, means, rotary, c)
    else:
        pid -= (v_tiles + k_tiles) * kv_heads
        side = Side(q, q_batch, q_row, q_head, heads, seqlen_q, q_tiles, outputs[0], outputs[3], tables[3])
        tile = pid // heads
        place = place_of(tile, cu_seqlens_q, seqused_q, seqlen_q, batch, 0, c.has_seqused_q, c)
        if place.holds(c.packed):
            before = seqlen_k - place.length
            if c.packed:
                _, keys = length_of(cu_seqlens_k, seqused_k, place.b, seqlen_k, c.has_seqused_k)
                before = keys - place.length
            head = pid - tile * heads
            _query_rows(side, place, head, outputs[6], kv_heads, signs, means, rotary, before, c)


# V that is e4m3 already


@gluon.jit(
    do_not_specialize=["batch", "kv_heads", "seqlen_k", "v_batch", "v_row", "v_head"],
    do_not_specialize_on_alignment=["cu_seqlens_k", "seqused_k"],
)
def transpose_keys(v, v_t, cu_seqlens_k, seqused_k, batch, kv_heads, seqlen_k, v_batch, v_row, v_head,
                   config: gl.constexpr):  # fmt: skip
    """A tile of e4m3 V with keys last. Strides in units of 16 elements. Grid: tiles of all KV heads."""
    c: gl.constexpr = config.static
    pid = gl.program_id(0)
    tile = pid // kv_heads
    head = pid - tile * kv_heads
    place = place_of(tile, cu_seqlens_k, seqused_k, seqlen_k, batch, 1, c.has_seqused_k, c)
    if place.holds(c.packed):
        width: gl.constexpr = c.v_width
        row, there = place.rows(TILE, gl.SliceLayout(1, c.v_layout))
        column = gl.arange(0, width, gl.SliceLayout(0, c.v_layout))
        first = place.b.to(gl.int64) * v_batch + head.to(gl.int64) * v_head
        first += (place.start + place.m).to(gl.int64) * v_row
        x = v.to(gl.pointer_type(gl.int32), bitcast=True) + first * 4
        x += ((row - place.m) * (v_row * 4))[:, None] + column[None, :]
        pieces = ask_for_pieces(x, there, column, c.v_pieces, c.head_dim_v // 4)
        tiles = tiles_of(seqlen_k, batch, 1, c.packed)
        words, each = _words(v_t, place, head, kv_heads, tiles, seqlen_k, c)
        for j in gl.static_range(c.v_pieces):
            y = regroup_bytes(pieces[j])
            store_words(words, y, j * width * 4, c.head_dim_v, each, c.words_layout)
