"""What frames the backward kernel: numbers per query row before it, dQ out of its accumulator after it.

Row statistics and the accumulator are laid out in whole blocks of PADDING rows per sequence and head, so that
the kernel between needs no test for the end of a sequence: rows past it weigh nothing.
"""

from tandem_attn.device.accumulate import CHUNK, from_register_order
from tandem_attn.device.gluon import gdc_launch_dependents, gdc_wait, gl, gluon
from tandem_attn.device.sequence import LENGTHS, PADDING

LOG2E = gl.constexpr(1.4426950408889634)
SUMMED_ROWS = gl.constexpr(32)  # of a program of sum_parts

_STRIDES = ["out_batch", "out_row", "out_head", "dout_batch", "dout_row", "dout_head"]
_NUMBERS = ["row_blocks", "num_heads", "seqlen_q", "seqlen_k", "padded_rows"]


@gluon.jit
def _place(row_blocks, num_heads):
    """(first row, head, sequence) of this program: the grid has one dimension, the others end at 65535.

    The last rows first: what the kernel before wrote last is still in L2, and what the next one begins with
    will be (0.7% at 512 tokens, H200, 2026-11-28).
    """
    pid = gl.num_programs(0) - 1 - gl.program_id(0)
    rest = pid // row_blocks
    b = rest // num_heads
    return (pid - rest * row_blocks) * CHUNK, rest - b * num_heads, b


@gluon.jit
def _padded(seqlen):
    return (seqlen + (PADDING - 1)) // PADDING * PADDING


@gluon.jit(
    do_not_specialize=[*_NUMBERS, *_STRIDES, "delta_start", "columns"],
    do_not_specialize_on_alignment=["lse_ptr", "dlse_ptr", *LENGTHS],
)
def prepare_rows(out_ptr, dout_ptr, clean_ptr, lse_ptr, dlse_ptr, stat_ptr, counters, cu_seqlens_q,
                 cu_seqlens_k, seqused_q, seqused_k, row_blocks, num_heads, seqlen_q, seqlen_k,
                 padded_rows, delta_start, out_batch, out_row, out_head, dout_batch, dout_row, dout_head,
                 columns, config: gl.constexpr):  # fmt: skip
    """For 64 rows of one head of sequence b: lse in base 2 (+inf where no key is seen and past the end, so
    that P is 0), delta = rowsum(dO * O) - dlse, and the counters of dQ's accumulator zero where there is one.

    clean_ptr: None, or where a contiguous copy of dO goes that is 0 in rows that see no key. Their P is 0,
    but 0 times the NaN or infinity that may well flow into such a row is not.
    Strides (0 for the batch of packed tensors) and `columns` (head_dim_v) are in units of 8 elements: loads
    are of 16 bytes.
    """
    c: gl.constexpr = config.static
    gdc_launch_dependents()
    m, head, b = _place(row_blocks, num_heads)
    sequence = c.Sequences.create(
        seqlen_q, seqlen_k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
    ).sequence(b)
    if m < _padded(sequence.seqlen_q):
        width: gl.constexpr = c.row_columns_v
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])
        row = m + gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
        column = gl.arange(0, width, gl.SliceLayout(0, layout))
        there = row < sequence.seqlen_q
        keep = there[:, None] & (column < columns * 8)[None, :]
        rows = (row + sequence.first_row()).to(gl.int64)
        out_start = b.to(gl.int64) * out_batch + head.to(gl.int64) * out_head
        dout_start = b.to(gl.int64) * dout_batch + head.to(gl.int64) * dout_head
        o = gl.load(
            out_ptr + ((rows * out_row + out_start) * 8)[:, None] + column[None, :], mask=keep, other=0.0
        )
        do = gl.load(
            dout_ptr + ((rows * dout_row + dout_start) * 8)[:, None] + column[None, :], mask=keep, other=0.0
        )
        delta = gl.sum(o.to(gl.float32) * do.to(gl.float32), 1)
        lse_at = sequence.lse_row(head, num_heads, seqlen_q) + row
        lse = gl.load(lse_ptr + lse_at, mask=there, other=float("-inf"))
        if dlse_ptr is not None:
            delta -= gl.load(dlse_ptr + lse_at, mask=there, other=0.0)
        seen = lse != float("-inf")
        if clean_ptr is not None:
            to = (
                clean_ptr
                + ((sequence.row_of_all(row) * num_heads + head) * columns * 8)[:, None]
                + column[None, :]
            )
            gl.store(to, gl.where(seen[:, None], do, 0.0), mask=keep)
        stat = sequence.padded_row(b, head, num_heads, padded_rows) + m
        to = stat_ptr + stat + gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
        gl.store(to, gl.where(seen, lse * LOG2E, float("inf")))
        gl.store(to + delta_start, gl.where(seen, delta, 0.0))
        if c.with_q:
            _clear_counters(counters, stat, c)


@gluon.jit
def _clear_counters(counters, stat, config: gl.constexpr):
    """Zeros for the chunks of the accumulator that hold 64 rows."""
    chunks: gl.constexpr = config.head_dim // CHUNK
    slot = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(counters + stat // CHUNK * chunks + slot, gl.zeros_like(slot), mask=slot < chunks)


@gluon.jit(
    do_not_specialize=[*_NUMBERS, "columns"],
    do_not_specialize_on_alignment=LENGTHS,
)
def finish_rows(dq_acc_ptr, dq_ptr, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, row_blocks,
                num_heads, seqlen_q, seqlen_k, padded_rows, columns, scale,
                config: gl.constexpr):  # fmt: skip
    """64 rows of one head of dQ: scaled, rounded, in order. dq: (..., heads, 8 * columns), contiguous."""
    c: gl.constexpr = config.static
    gdc_wait()
    m, head, b = _place(row_blocks, num_heads)
    sequence = c.Sequences.create(
        seqlen_q, seqlen_k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
    ).sequence(b)
    if m < sequence.seqlen_q:
        flat: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        row = m + gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
        to = dq_ptr + ((sequence.row_of_all(row) * num_heads + head) * columns * 8)[:, None]
        chunks: gl.constexpr = c.head_dim // CHUNK
        stat = sequence.padded_row(b, head, num_heads, padded_rows) + m
        start = dq_acc_ptr + (stat // CHUNK * chunks).to(gl.int64) * 4096
        for i in gl.static_range(chunks):
            x = gl.load(start + i * 4096 + gl.arange(0, 4096, flat))
            x = gl.where(sequence.seqlen_k > 0, x, 0.0)  # without keys nobody has written
            x = from_register_order(x * scale).to(dq_ptr.dtype.element_ty)
            x = gl.convert_layout(x, layout)
            column = i * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(0, layout))
            keep = (row < sequence.seqlen_q)[:, None] & (column < columns * 8)[None, :]
            gl.store(to + column[None, :], x, mask=keep)


@gluon.jit
def _sum_of_parts(part_ptr, ptr, rows, parts, columns, width: gl.constexpr, tile_width: gl.constexpr):
    """32 rows of dK or dV; `width` columns of a part, `tile_width`: as a power of two."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // tile_width, tile_width // 8], [4, 1], [1, 0])
    row = gl.program_id(0) * SUMMED_ROWS + gl.arange(0, SUMMED_ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, tile_width, gl.SliceLayout(0, layout))
    there = (row < rows)[:, None] & (column < columns * 8)[None, :]
    at = (row.to(gl.int64) * parts * width)[:, None] + column[None, :]
    total = gl.zeros([SUMMED_ROWS, tile_width], gl.float32, layout)
    for i in range(parts):
        total += gl.load(part_ptr + at + i * width, mask=there, other=0.0)
    to = ptr + (row.to(gl.int64) * columns * 8)[:, None] + column[None, :]
    gl.store(to, total.to(ptr.dtype.element_ty), mask=there)


@gluon.jit(do_not_specialize=["rows", "parts", "columns", "columns_v"])
def sum_parts(dk_part_ptr, dv_part_ptr, dk_ptr, dv_ptr, rows, parts, columns, columns_v,
              config: gl.constexpr):  # fmt: skip
    """dK and dV of 32 keys of a KV head out of sums over parts of its query heads, always in the same order.

    Parts: (rows, parts, tile width) in float32; a row is a key of a KV head."""
    c: gl.constexpr = config.static
    gdc_wait()
    _sum_of_parts(dk_part_ptr, dk_ptr, rows, parts, columns, c.head_dim, c.row_columns)
    _sum_of_parts(dv_part_ptr, dv_ptr, rows, parts, columns_v, c.head_dim_v, c.row_columns_v)


@gluon.jit(
    do_not_specialize=["batch", "total", "columns"],
    do_not_specialize_on_alignment=["cu_seqlens", "seqused"],
)
def clear_padding(ptr, cu_seqlens, seqused, batch, total, columns):
    """Zeros in the rows of a packed tensor that belong to no sequence: program (b, ...) does those after
    sequence b - 1 and before sequence b. `columns` of a row, all heads, in units of 8 elements."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    b = gl.program_id(0)
    begin = 0
    end = total
    if b > 0:
        begin = gl.load(cu_seqlens + b)
        if seqused is not None:
            begin = gl.load(cu_seqlens + b - 1) + gl.maximum(gl.load(seqused + b - 1), 0)
    if b < batch:
        end = gl.load(cu_seqlens + b)
    begin = gl.minimum(gl.maximum(begin, 0), total).to(gl.int64) * columns * 8
    end = gl.minimum(gl.maximum(end, 0), total).to(gl.int64) * columns * 8
    begin += gl.program_id(1) * 1024
    zero = gl.zeros([1024], ptr.dtype.element_ty, layout)
    while begin < end:
        at = begin + gl.arange(0, 1024, layout)
        gl.store(ptr + at, zero, mask=at < end)
        begin += gl.num_programs(1) * 1024
