"""The means that `quantize_tiles` subtracts from K and V, by short launches before it.

K's, for which any constant would do, are of a sample of keys, spread evenly (device/fp8_tiles.py:
sampled_row), and rounded to the dtype of K, so that they are operands of tensor cores: one program takes all
of it. V's are of all keys: `sum_values` adds up rows, a chunk of them a program, and `mean_of_values` the
chunks, always in the same order, with one warp for each mean. A single launch would leave the second half to
whoever is last, which takes counters that are zero, and be 2 us faster at best.
"""

from tandem_attn.device.fp8_tiles import Rotary, Side, length_of, sample_size, sampled_row
from tandem_attn.device.gluon import gdc_launch_dependents, gdc_wait, gl, gluon
from tandem_attn.device.rotation import PIECE
from tandem_attn.device.row_pieces import kept, load_rows

CHUNKS_AT_ONCE = gl.constexpr(32)  # sums that one warp loads together


@gluon.jit
def _sums(side, b, start, length, head, first, last, rotary, sampled: gl.constexpr, config: gl.constexpr):
    """Sums over rows of sequence b or over a sample of them, in pieces: of steps first to last - 1. rotary:
    None where rows are taken as they are."""
    summing: gl.constexpr = config.summing
    rows: gl.constexpr = summing.rows
    width: gl.constexpr = summing.width
    together: gl.constexpr = summing.together
    dim: gl.constexpr = summing.dim
    layout: gl.constexpr = summing.layout
    count = sample_size(length) if sampled else length
    column = gl.arange(0, width, gl.SliceLayout(0, layout))
    total = ()
    for _ in gl.static_range(0, dim, width):
        total = total + (gl.zeros([together, width], gl.float32, layout),)
    for n in range(first, last):
        i = n * rows + gl.arange(0, rows, gl.SliceLayout(1, layout))
        there = i < count
        row = sampled_row(i, length, count) if sampled else i
        x = side.rows_at(b, start, head, row)
        if rotary is not None:
            pieces = load_rows(x, there, rotary, row, config)
        else:
            keep = kept(there, column, 0, dim)
            pieces = (gl.load(x + column[None, :], mask=keep, other=0.0),)
        sums = ()
        for j in gl.static_range(len(pieces)):
            # rows of a thread at once: fewer sums to keep
            y = pieces[j].to(gl.float32).reshape([rows // together, together, width])
            sums = sums + (total[j] + gl.convert_layout(gl.sum(y, 0), layout, assert_trivial=True),)
        total = sums
    sums = ()
    for j in gl.static_range(len(total)):
        sums = sums + (gl.sum(total[j], 0),)
    return sums


@gluon.jit
def _share(count):
    """What each of so many rows counts for."""
    return gl.div_rn(1.0, gl.maximum(count, 1).to(gl.float32))


_SIZES = ["kv_heads", "seqlen_k"]
_STRIDES = ["batch_stride", "row_stride", "head_stride"]
_LENGTHS = ["cu_seqlens_k", "seqused_k"]


@gluon.jit(
    do_not_specialize=[*_SIZES, *_STRIDES, "rotary_stride", "rotary_len"],
    do_not_specialize_on_alignment=_LENGTHS,
)
def mean_of_keys(k, means, cos, sin, cu_seqlens_k, seqused_k, kv_heads, seqlen_k, batch_stride,
                 row_stride, head_stride, rotary_stride, rotary_len, config: gl.constexpr):  # fmt: skip
    """Grid: KV heads of all sequences. Strides as of `quantize_tiles`.

    means: fp32 (batch, kv_heads, head_dim).
    """
    c: gl.constexpr = config.static
    dim: gl.constexpr = c.head_dim
    gdc_launch_dependents()
    pid = gl.program_id(0)
    b = pid // kv_heads
    start, length = b * 0, seqlen_k
    if c.packed:
        start, length = length_of(cu_seqlens_k, seqused_k, b, seqlen_k, c.has_seqused_k)
    side = Side(k, batch_stride, row_stride, head_stride, kv_heads, seqlen_k, b, k, k, k)
    rotary = Rotary(cos, sin, rotary_stride, rotary_len) if c.rotary_dim else None
    count = sample_size(length)
    steps = (count + (c.summing.rows - 1)) // c.summing.rows
    sums = _sums(side, b, start, length, pid - b * kv_heads, 0, steps, rotary, True, c)
    share = _share(count)
    width: gl.constexpr = c.summing.width
    column = gl.arange(0, width, gl.SliceLayout(0, c.summing.layout))
    for j in gl.static_range(len(sums)):
        x = (sums[j] * share).to(k.dtype.element_ty).to(gl.float32)
        gl.store(means + pid * dim + j * width + column, x, mask=column < dim - j * width)


@gluon.jit(do_not_specialize=[*_SIZES, "chunks", *_STRIDES], do_not_specialize_on_alignment=_LENGTHS)
def sum_values(v, partials, cu_seqlens_k, seqused_k, kv_heads, seqlen_k, chunks, batch_stride, row_stride,
               head_stride, config: gl.constexpr):  # fmt: skip
    """Grid: chunks of all KV heads of all sequences. Strides as of `quantize_tiles`.

    partials: fp32 (batch, kv_heads, chunks, head_dim_v).
    """
    c: gl.constexpr = config.static
    gdc_launch_dependents()
    pid = gl.program_id(0)
    rest = pid // kv_heads
    head = pid - rest * kv_heads
    b = rest // chunks
    chunk = rest - b * chunks
    start, length = b * 0, seqlen_k
    if c.packed:
        start, length = length_of(cu_seqlens_k, seqused_k, b, seqlen_k, c.has_seqused_k)
    side = Side(v, batch_stride, row_stride, head_stride, kv_heads, seqlen_k, chunks, v, v, v)
    steps = (length + (c.summing.rows - 1)) // c.summing.rows
    each = (steps + chunks - 1) // chunks
    first, last = chunk * each, gl.minimum(steps, (chunk + 1) * each)
    sums = _sums(side, b, start, length, head, first, last, None, False, c)
    column = gl.arange(0, c.summing.width, gl.SliceLayout(0, c.summing.layout))
    to = partials + ((b * kv_heads + head).to(gl.int64) * chunks + chunk) * c.head_dim_v + column
    gl.store(to, sums[0], mask=column < c.head_dim_v)


@gluon.jit(do_not_specialize=[*_SIZES, "chunks"], do_not_specialize_on_alignment=_LENGTHS)
def mean_of_values(partials, v_mean, cu_seqlens_k, seqused_k, kv_heads, seqlen_k, chunks,
                   config: gl.constexpr):  # fmt: skip
    """One warp for each KV head of each sequence. v_mean: fp32 (batch, kv_heads, head_dim_v)."""
    c: gl.constexpr = config.static
    dim: gl.constexpr = c.head_dim_v
    gdc_launch_dependents()
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [1, 1], [1, 0])
    pid = gl.program_id(0)
    length = seqlen_k
    if c.packed:
        _, length = length_of(cu_seqlens_k, seqused_k, pid // kv_heads, seqlen_k, c.has_seqused_k)
    chunk = gl.arange(0, CHUNKS_AT_ONCE, gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, PIECE, gl.SliceLayout(0, layout))
    gdc_wait()
    total = ()
    for _ in gl.static_range(c.pieces):
        total = total + (gl.zeros([PIECE], gl.float32, gl.SliceLayout(0, layout)),)
    for first in range(0, chunks, CHUNKS_AT_ONCE):
        sums = ()
        for j in gl.static_range(c.pieces):
            at = (pid.to(gl.int64) * chunks + first + chunk) * dim + (j * PIECE + column)[None, :]
            there = (first + chunk < chunks) & (column < dim - j * PIECE)[None, :]
            sums = sums + (total[j] + gl.sum(gl.load(partials + at, mask=there, other=0.0), 0),)
        total = sums
    share = _share(length)
    for j in gl.static_range(c.pieces):
        gl.store(v_mean + pid * dim + j * PIECE + column, total[j] * share, mask=column < dim - j * PIECE)
