"""Where results of decoding go: partial ones into a workspace, final ones into out and lse; and their merge.

A partial result is a normalised fp32 output and its base-2 log-sum-exp for every row of an item. Partials of
one item are merged in the order of their keys, so the result does not depend on who arrives when.
"""

from tandem_attn.device.gluon import aggregate, gl, gluon
from tandem_attn.device.softmax import LN2


@aggregate
class Results:
    """The memory of results, for one KV head."""

    out: gl.tensor  # (batch, seqlen_q, heads, head_dim_v) or (total_q, heads, head_dim_v)
    lse: gl.tensor  # (batch, heads, seqlen_q) or (heads, total_q)
    o_part: gl.tensor  # (slots, rows, width of a tile of V)
    l_part: gl.tensor  # (slots, rows)
    kv_head: gl.tensor

    @gluon.jit
    def places(self, work, item, r, config: gl.constexpr):
        """(row of out in all of its heads, element of lse, whether it exists) of rows r of an item."""
        batch, row = work.place(item)
        start, tokens = work.tokens(batch, True)
        row = row + r
        token = work.token(row)
        num_heads: gl.constexpr = config.num_kv_heads * config.group_size
        head = self.kv_head * config.group_size + (row - token * config.group_size)
        of_out = (start + token).to(gl.int64) * num_heads + head
        if config.packed_q:
            of_lse = head.to(gl.int64) * work.total_q + (start + token)
        else:
            of_lse = (batch * num_heads + head).to(gl.int64) * (tokens + batch * 0) + token
        return of_out, of_lse, token < tokens


@gluon.jit
def store_result(results, work, item, x, lse, row0: gl.constexpr, config: gl.constexpr):
    """Write final rows of an item, from row0 on: chunks x [rows, v_width] and base-2 lse [rows]."""
    layout: gl.constexpr = x[0].type.layout
    count: gl.constexpr = x[0].shape[0]
    width: gl.constexpr = config.out_width
    r = row0 + gl.arange(0, count, gl.SliceLayout(1, layout))
    of_out, _, there = results.places(work, item, r, config)
    for c in gl.static_range(config.out_chunks):
        columns = c * width + gl.arange(0, width, gl.SliceLayout(0, layout))
        to = results.out + (of_out * config.columns_v)[:, None] + columns[None, :]
        keep = there[:, None] & (columns < config.columns_v)[None, :]
        gl.store(to, x[c].to(results.out.dtype.element_ty), mask=keep)
    by_row: gl.constexpr = lse.type.layout
    _, of_lse, there = results.places(work, item, row0 + gl.arange(0, count, by_row), config)
    gl.store(results.lse + of_lse, lse * LN2, mask=there)


@gluon.jit
def store_partial(results, slot, x, lse, row0: gl.constexpr, config: gl.constexpr):
    """Write rows of one partial result of an item, from row0 on."""
    layout: gl.constexpr = x[0].type.layout
    count: gl.constexpr = x[0].shape[0]
    width: gl.constexpr = config.out_width
    r = row0 + gl.arange(0, count, gl.SliceLayout(1, layout))
    at = slot.to(gl.int64) * config.rows + r
    for c in gl.static_range(config.out_chunks):
        columns = c * width + gl.arange(0, width, gl.SliceLayout(0, layout))
        to = results.o_part + (at * config.head_dim_v)[:, None] + columns[None, :]
        gl.store(to, x[c], mask=(r < config.rows)[:, None])
    by_row: gl.constexpr = lse.type.layout
    r = row0 + gl.arange(0, count, by_row)
    gl.store(results.l_part + slot.to(gl.int64) * config.rows + r, lse, mask=r < config.rows)


@gluon.jit
def store_zeros(results, work, item, config: gl.constexpr):
    """0 and -inf for an item that sees no key."""
    width: gl.constexpr = config.out_width
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [gl.num_warps(), 1], [1, 0])
    x = ()
    for _ in gl.static_range(config.out_chunks):
        x = x + (gl.zeros([config.tile_m, width], gl.float32, layout),)
    lse = gl.full([config.tile_m], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
    store_result(results, work, item, x, lse, 0, config)


@gluon.jit
def merged_columns(
    results, parts, r, keep, start_column, width: gl.constexpr, layout: gl.constexpr, config: gl.constexpr
):
    """(output [rows, width], base-2 lse [rows]) of the partials of an item, for rows r and some columns.

    layout: [partials, rows, columns]. Partials without keys have lse -inf and count for nothing, whatever
    their output is.
    """
    at_once: gl.constexpr = config.parts_at_once
    rows: gl.constexpr = r.shape[0]
    by_part: gl.constexpr = gl.SliceLayout(2, layout)
    of_row: gl.constexpr = gl.SliceLayout(0, by_part)
    of_x: gl.constexpr = gl.SliceLayout(0, layout)
    columns = start_column + gl.arange(0, width, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    row_max = gl.full([rows], float("-inf"), gl.float32, of_row)
    row_sum = gl.zeros([rows], gl.float32, of_row)
    o = gl.zeros([rows, width], gl.float32, of_x)
    i = gl.arange(0, at_once, gl.SliceLayout(1, by_part))
    for start in range(0, parts.count, at_once):
        slot, more = parts.slots(start, i)
        of_lse = slot * config.rows + (more * config.rows)[:, None] + r[None, :]
        size: gl.constexpr = config.rows * config.head_dim_v
        of_o = slot * size + (more * size)[:, None] + (r * config.head_dim_v)[None, :]
        there = (start + i < parts.count)[:, None] & keep[None, :]
        e = gl.load(results.l_part + of_lse, mask=there, other=float("-inf"), cache_modifier=".cg")
        x = gl.load(
            results.o_part + of_o[:, :, None] + columns[None, None, :],
            mask=there[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        top = gl.maximum(row_max, gl.max(e, 0))
        base = gl.where(top == float("-inf"), 0.0, top)
        w = gl.exp2(e - base[None, :])
        alpha = gl.exp2(row_max - base)
        row_sum = row_sum * alpha + gl.sum(w, 0)
        alpha = gl.convert_layout(alpha, gl.SliceLayout(1, of_x))
        o = o * alpha[:, None] + gl.sum(x * w[:, :, None], 0)
        row_max = top
    inverse = gl.convert_layout(gl.where(row_sum > 0.0, 1.0 / row_sum, 0.0), gl.SliceLayout(1, of_x))
    base = gl.where(row_max == float("-inf"), 0.0, row_max)
    return o * inverse[:, None], gl.where(row_sum > 0.0, base + gl.log2(row_sum), float("-inf"))


@gluon.jit
def store_merged_block(
    results, work, item, parts, row0, rows: gl.constexpr, column, width: gl.constexpr, layout: gl.constexpr,
    config: gl.constexpr,
):  # fmt: skip
    """Merge `rows` rows from row0 on, and `width` columns from `column` on, of all partials of an item, and
    write what they come to."""
    by_row: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
    of_x: gl.constexpr = gl.SliceLayout(0, layout)
    r = row0 + gl.arange(0, rows, by_row)
    x, lse = merged_columns(results, parts, r, r < config.rows, column, width, layout, config)
    _, of_lse, there = results.places(work, item, r, config)
    gl.store(results.lse + of_lse, lse * LN2, mask=there & (column == 0))
    r = row0 + gl.arange(0, rows, gl.SliceLayout(1, of_x))
    of_out, _, there = results.places(work, item, r, config)
    columns = column + gl.arange(0, width, gl.SliceLayout(0, of_x))
    keep = there[:, None] & (columns < config.columns_v)[None, :]
    to = results.out + (of_out * config.columns_v)[:, None] + columns[None, :]
    gl.store(to, x.to(results.out.dtype.element_ty), mask=keep)


@gluon.jit
def store_merged(results, work, item, parts, row0: gl.constexpr, config: gl.constexpr):
    """Merge all partials of an item and write its final rows from row0 on; by one program."""
    rows: gl.constexpr = config.rows_stored
    width: gl.constexpr = config.merge_width
    layout: gl.constexpr = config.merge_layout
    for c in gl.static_range(config.head_dim_v // width):
        store_merged_block(results, work, item, parts, row0, rows, c * width, width, layout, config)
