"""The second kernel of Flash-Decoding: merge what the programs of `decode_attention` left of an item.

Used where there is more than one program should merge alone. A program takes one row of an item (where rows
are many, a few) and many partials of it at once, so that their loads are in flight together. Launched early
(programmatic dependent launch): it looks the work up while the decode kernel still runs, then waits for it.
"""

from tandem_attn.device.gluon import gdc_launch_dependents, gdc_wait, gl, gluon
from tandem_attn.device.partials import Results, store_merged_block
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
    """Grid: (items times blocks of their rows times KV heads, blocks of columns); arguments as in
    decoding."""
    c: gl.constexpr = config.static
    # all in the first dimension of the grid: the others end at 65535
    each: gl.constexpr = c.row_blocks * c.num_kv_heads
    item = gl.program_id(0) // each
    rest = gl.program_id(0) - item * each
    block = rest // c.num_kv_heads
    kv_head = rest - block * c.num_kv_heads
    work = make_work(pointers, l_part, seqlen, numbers, m_blocks_magic, c)
    units = work.num_units(work.look())
    share = gl.maximum((units + c.per_head - 1) // c.per_head, 1)
    first, end = work.tiles(item, True)
    parts = parts_of(work, work.units_before(item), work.splits.units(first, end), share, kv_head)
    results = Results(out_ptr, lse_ptr, o_part, l_part, kv_head)
    gdc_wait()
    gdc_launch_dependents()
    if (first < end) & (parts.count > 1):
        row0 = block * c.combine_rows
        column = gl.program_id(1) * c.combine_width
        store_merged_block(
            results, work, item, parts, row0, c.combine_rows, column, c.combine_width, c.combine_layout, c
        )
