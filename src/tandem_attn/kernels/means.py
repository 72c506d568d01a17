"""The means that `quantize_tiles` subtracts from K and V: two short launches before it.

`sum_rows` adds up rows, a chunk of them a program; `finish_means` adds up the chunks, always in the same
order, with one warp for each mean. A single launch would leave the second half to whoever is last, which
takes counters that are zero, and be 2 us faster at best. Of V all rows are added up; of K, for which any
constant would do, a sample, spread evenly (device/fp8_tiles.py: sampled_row).
"""

from tandem_attn.device.fp8_tiles import Rotary, Side, length_of, sample_size, sampled_row
from tandem_attn.device.gluon import gdc_launch_dependents, gdc_wait, gl, gluon
from tandem_attn.device.rotation import PIECE, rotate_pieces
from tandem_attn.device.row_pieces import kept, load_rows, signs_of

CHUNKS_AT_ONCE = gl.constexpr(32)  # sums that one warp loads together


@gluon.jit
def _sum_chunk(side, b, start, length, head, chunk, rotary, sampled: gl.constexpr, summing: gl.constexpr,
               config: gl.constexpr):  # fmt: skip
    """Pieces of sums over a chunk of the rows or of a sample, to partial (side.y) of this head and chunk.

    side.tiles: chunks of a head. rotary: None where rows are taken as they are.
    """
    count = sample_size(length) if sampled else length
    rows: gl.constexpr = summing.rows
    width: gl.constexpr = summing.width
    together: gl.constexpr = summing.together
    dim: gl.constexpr = summing.dim
    layout: gl.constexpr = summing.layout
    column = gl.arange(0, width, gl.SliceLayout(0, layout))
    total = ()
    for _ in gl.static_range(0, dim, width):
        total = total + (gl.zeros([together, width], gl.float32, layout),)
    steps = (count + (rows - 1)) // rows
    each = (steps + side.tiles - 1) // side.tiles
    for n in range(chunk * each, gl.minimum(steps, (chunk + 1) * each)):
        i = n * rows + gl.arange(0, rows, gl.SliceLayout(1, layout))
        there = i < count
        row = sampled_row(i, length, count) if sampled else i
        x = side.rows_at(b, start, head, row)
        if rotary is not None:
            pieces = load_rows(x, there, rotary, row, config)
        else:
            pieces = (gl.load(x + column[None, :], mask=kept(there, column, 0, dim), other=0.0),)
        sums = ()
        for j in gl.static_range(len(pieces)):
            # rows of a thread at once: fewer sums to keep
            y = pieces[j].to(gl.float32).reshape([rows // together, together, width])
            sums = sums + (total[j] + gl.convert_layout(gl.sum(y, 0), layout, assert_trivial=True),)
        total = sums
    to = side.y + ((b * side.heads + head).to(gl.int64) * side.tiles + chunk) * dim + column
    for j in gl.static_range(len(total)):
        gl.store(to + j * width, gl.sum(total[j], 0), mask=column < dim - j * width)


_STRIDES = [f"{x}_{of}" for x in "kv" for of in ("batch", "row", "head")]
_CHUNKS = ["batch", "kv_heads", "seqlen_k", "k_chunks", "v_chunks"]
_LENGTHS = ["cu_seqlens_k", "seqused_k"]


@gluon.jit(
    do_not_specialize=[*_CHUNKS, *_STRIDES, "rotary_stride", "rotary_len"],
    do_not_specialize_on_alignment=_LENGTHS,
)
def sum_rows(k, v, partials, cos, sin, cu_seqlens_k, seqused_k, batch, kv_heads, seqlen_k, k_chunks, v_chunks,
             k_batch, k_row, k_head, v_batch, v_row, v_head, rotary_stride, rotary_len,
             config: gl.constexpr):  # fmt: skip
    """Grid: chunks of all heads of K, if it is smoothed, then of V. Strides as of `quantize_tiles`.

    partials: fp32 (batch, kv_heads, chunks, head_dim), of K and of V.
    """
    c: gl.constexpr = config.static
    gdc_launch_dependents()
    pid = gl.program_id(0)
    of_k = batch * kv_heads * k_chunks if c.smooth_k else 0
    is_k = pid < of_k
    pid = gl.where(is_k, pid, pid - of_k)
    chunks = gl.where(is_k, k_chunks, v_chunks)
    rest = pid // kv_heads
    head = pid - rest * kv_heads
    b = rest // chunks
    chunk = rest - b * chunks
    start, length = b * 0, seqlen_k
    if c.packed:
        start, length = length_of(cu_seqlens_k, seqused_k, b, seqlen_k, c.has_seqused_k)
    if c.smooth_k and is_k:
        to = partials[0]
        side = Side(k, k_batch, k_row, k_head, kv_heads, seqlen_k, chunks, to, to, to)
        rotary = Rotary(cos, sin, rotary_stride, rotary_len) if c.rotary_dim else None
        _sum_chunk(side, b, start, length, head, chunk, rotary, True, c.sum_k, c)
    if c.smooth_v and not is_k:
        to = partials[1]
        side = Side(v, v_batch, v_row, v_head, kv_heads, seqlen_k, chunks, to, to, to)
        _sum_chunk(side, b, start, length, head, chunk, None, False, c.sum_v, c)


@gluon.jit
def _finished(partial, number, chunks, count, dim: gl.constexpr, layout: gl.constexpr):
    """A mean, in fp32 pieces. number: of KV heads of all sequences."""
    chunk = gl.arange(0, CHUNKS_AT_ONCE, gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, PIECE, gl.SliceLayout(0, layout))
    total = ()
    for _ in gl.static_range(0, dim, PIECE):
        total = total + (gl.zeros([PIECE], gl.float32, gl.SliceLayout(0, layout)),)
    for first in range(0, chunks, CHUNKS_AT_ONCE):
        sums = ()
        for j in gl.static_range(len(total)):
            at = (number.to(gl.int64) * chunks + first + chunk) * dim + (j * 32 + column)[None, :]
            there = (first + chunk < chunks) & (column < dim - j * 32)[None, :]
            sums = sums + (total[j] + gl.sum(gl.load(partial + at, mask=there, other=0.0), 0),)
        total = sums
    share = gl.div_rn(1.0, gl.maximum(count, 1).to(gl.float32))
    mean = ()
    for j in gl.static_range(len(total)):
        mean = mean + (total[j] * share,)
    return mean


@gluon.jit
def _keep(mean, to, number, dim: gl.constexpr, layout: gl.constexpr):
    """Store a mean."""
    column = gl.arange(0, PIECE, gl.SliceLayout(0, layout))
    for j in gl.static_range(len(mean)):
        gl.store(to + number * dim + j * 32 + column, mean[j], mask=column < dim - j * 32)


@gluon.jit
def _rotated_mean(mean, signs, mma: gl.constexpr, layout: gl.constexpr, config: gl.constexpr):
    """As `rotated` of device/row_pieces.py. A float32 number is the sum of three in bf16, and what is linear
    may be applied to each."""
    row = gl.arange(0, 8, gl.SliceLayout(1, layout))[:, None]
    pieces = ()
    for j in gl.static_range(config.pieces):
        high = mean[j].to(gl.bfloat16)
        rest = mean[j] - high.to(gl.float32)
        middle = rest.to(gl.bfloat16)
        low = (rest - middle.to(gl.float32)).to(gl.bfloat16)
        part = gl.where(row == 0, high[None, :], gl.where(row == 1, middle[None, :], low[None, :]))
        pieces = pieces + (gl.where(row < 3, part, 0.0),)
    mixed = rotate_pieces(pieces, signs, mma, config.group)
    sums = ()
    for j in gl.static_range(config.pieces):
        sums = sums + (gl.sum(mixed[j], 0),)
    return sums


@gluon.jit(
    do_not_specialize=["kv_heads", "seqlen_k", "k_chunks", "v_chunks"],
    do_not_specialize_on_alignment=_LENGTHS,
)
def finish_means(partials, signs, outputs, cu_seqlens_k, seqused_k, kv_heads, seqlen_k, k_chunks, v_chunks,
                 config: gl.constexpr):  # fmt: skip
    """One warp for each KV head of each sequence: of K, if it is smoothed, then of V.

    outputs: the means of K, the same as `rotated`, and the means of V, fp32 (batch, kv_heads, head_dim).
    """
    c: gl.constexpr = config.static
    gdc_launch_dependents()
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [1, 1], [1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    pid = gl.program_id(0)
    of_k = 0
    if c.smooth_k:
        of_k = gl.num_programs(0) // (2 if c.smooth_v else 1)
        signs = signs_of(signs, c)
    is_k = pid < of_k
    pid = gl.where(is_k, pid, pid - of_k)
    length = seqlen_k
    if c.packed:
        _, length = length_of(cu_seqlens_k, seqused_k, pid // kv_heads, seqlen_k, c.has_seqused_k)
    gdc_wait()
    if c.smooth_k and is_k:
        mean = _finished(partials[0], pid, k_chunks, sample_size(length), c.head_dim, layout)
        _keep(mean, outputs[0], pid, c.head_dim, layout)
        if c.rotate:
            _keep(_rotated_mean(mean, signs, mma, layout, c), outputs[1], pid, c.head_dim, layout)
    if c.smooth_v and not is_k:
        mean = _finished(partials[1], pid, v_chunks, length, c.head_dim_v, layout)
        _keep(mean, outputs[2], pid, c.head_dim_v, layout)
