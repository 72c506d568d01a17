"""The second kernel of Flash-Decoding: merge what the programs of `decode_attention` left of an item.

Used where there is more than one program should merge alone. A program takes one row of an item, and many
partials of it at once, so that their loads are in flight together. Launched early (programmatic dependent
launch): it looks the work up while the decode kernel still runs, then waits for it.
"""

from tandem_attn.device.gluon import gdc_wait, gl, gluon
from tandem_attn.device.partials import Results, merged_columns
from tandem_attn.device.softmax import LN2
from tandem_attn.device.work import parts_of
from tandem_attn.kernels.decode import make_work


@gluon.jit(do_not_specialize=["seqlen"])
def combine_partials(
    out_ptr,
    lse_ptr,
    o_part,
    l_part,
    pointers,
    seqlen,
    numbers,
    m_blocks_magic,
    config: gl.constexpr,
):
    """Grid: (items times rows of an item times KV heads, blocks of columns); arguments as in decoding."""
    c: gl.constexpr = config.static
    # all in the first dimension of the grid: the others end at 65535
    each: gl.constexpr = c.rows * c.num_kv_heads
    item = gl.program_id(0) // each
    rest = gl.program_id(0) - item * each
    r = rest // c.num_kv_heads
    kv_head = rest - r * c.num_kv_heads
    work = make_work(pointers, l_part, seqlen, numbers, m_blocks_magic, c)
    units = work.num_units(work.look())
    share = gl.maximum((units + c.per_head - 1) // c.per_head, 1)
    first, end = work.tiles(item, True)
    parts = parts_of(work, work.units_before(item), work.splits.units(first, end), share, kv_head)
    results = Results(out_ptr, lse_ptr, o_part, l_part, kv_head)
    gdc_wait()
    if (first < end) & (parts.count > 1):
        layout: gl.constexpr = c.combine_layout
        by_row: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
        row = r + gl.arange(0, 1, by_row)
        start = gl.program_id(1) * c.combine_width
        x, lse = merged_columns(results, parts, row, row < c.rows, start, c.combine_width, layout, c)
        out_unused, of_lse, written = results.places(work, item, row, c)
        gl.store(lse_ptr + of_lse, lse * LN2, mask=written & (start == 0))
        of_x: gl.constexpr = x.type.layout
        row_x = r + gl.arange(0, 1, gl.SliceLayout(1, of_x))
        of_out, lse_unused, there = results.places(work, item, row_x, c)
        columns = start + gl.arange(0, c.combine_width, gl.SliceLayout(0, of_x))
        keep = there[:, None] & (columns < c.columns_v)[None, :]
        to = out_ptr + (of_out * c.columns_v)[:, None] + columns[None, :]
        gl.store(to, x.to(out_ptr.dtype.element_ty), mask=keep)
