"""Flash-Decoding for sm_90a: few query rows over a long KV cache, limited by memory bandwidth alone.

One program per multiprocessor (the same number for every KV head) takes an equal share of the tiles of keys
of all sequences and walks it, segment by segment; a segment is a run of tiles of one item (device/work.py):

    fill num_stages - 1 stages ahead               (TMA, or gathered copies: device/kv_tiles.py)
    per tile:   wait for it; all warps meet; refill the stage they have left
                S = Q K^T, softmax, O += P V       (device/decode_rows.py)
    per segment: the whole item: write the result; a part of it: write a partial result and its log-sum-exp,
                and the last of its programs to arrive merges them, or `combine_partials` does

It is launched while the kernel before still runs (programmatic dependent launch), and waits for its end when
its barriers are ready. Why each of these is so, and what it measured: docs/kernels/decode.md.
"""

from tandem_attn.device.cache_numbers import E4m3Numbers, SameNumbers, normalised_q
from tandem_attn.device.decode_rows import Rows
from tandem_attn.device.gluon import (
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon,
    mbarrier,
    thread_barrier,
)
from tandem_attn.device.partials import Results, store_merged, store_partial, store_result, store_zeros
from tandem_attn.device.work import Cursor, Work, first_segment, next_segment, part_of, parts_of


@gluon.jit
def load_q(q_ptr, work, kv_head, item, strides, group: gl.constexpr, config: gl.constexpr):
    """The packed rows of a group of an item, by chunks of columns; zeros in what does not exist."""
    width: gl.constexpr = config.k_width * config.parts
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [config.num_warps, 1], [1, 0])
    batch, row = work.place(item)
    start, tokens = work.tokens(batch, True)
    rows: gl.constexpr = config.group_rows
    row = row + group * rows + gl.arange(0, rows, gl.SliceLayout(1, layout))
    token = work.token(row)
    there = token < tokens
    head = kv_head * config.group_size + (row - token * config.group_size)
    if config.packed_q:
        base = (start + token).to(gl.int64) * strides[1]
    else:
        base = batch.to(gl.int64) * strides[0] + token.to(gl.int64) * strides[1]
    base += head.to(gl.int64) * strides[2]
    q = ()
    for c in gl.static_range(config.k_chunks):
        columns = c * width + gl.arange(0, width, gl.SliceLayout(0, layout))
        keep = there[:, None] & (columns < config.columns)[None, :]
        q = q + (gl.load(q_ptr + (base * 8)[:, None] + columns[None, :], mask=keep, other=0.0),)
    return q


@gluon.jit
def ask_for_q(q_ptr, work, kv_head, item, strides, group: gl.constexpr, config: gl.constexpr):
    """load_q(), if the registers for it are free while copies are started. Behind the copies it would wait
    for all that they load."""
    if config.asks_early:
        return load_q(q_ptr, work, kv_head, item, strides, group, config)
    else:
        return ()


@gluon.jit
def keep_q(
    asked, q_ptr, q_smem, units, work, kv_head, item, q_descale, strides, group: gl.constexpr,
    config: gl.constexpr,
):  # fmt: skip
    """Put Q, of which `asked` came from ask_for_q(), where the tensor cores, or other warps, find it."""
    q = asked
    if not config.asks_early:
        q = load_q(q_ptr, work, kv_head, item, strides, group, config)
    if config.scaled:
        _keep_scaled_q(q[0], q_smem, units, work, kv_head, item, q_descale, strides, group, config)
    else:
        for c in gl.static_range(config.k_chunks):
            q_smem.index(group * config.k_chunks + c).store(q[c])


@gluon.jit
def _keep_scaled_q(q, q_smem, units, work, kv_head, item, q_descale, strides, group: gl.constexpr,
                   config: gl.constexpr):  # fmt: skip
    """For a cache in e4m3: even and odd columns in float16, and the factors of the rows."""
    x, unit = normalised_q(q.to(gl.float32))
    if config.has_q_descale:
        batch, _ = work.place(item)
        of_q = batch.to(gl.int64) * strides[9] + kv_head.to(gl.int64) * strides[10]
        unit *= gl.load(q_descale + of_q)
    even, odd = gl.split(x.reshape([config.group_rows, config.k_width, 2]))
    q_smem.index(group * 2).store(even.to(config.dtype.value))
    q_smem.index(group * 2 + 1).store(odd.to(config.dtype.value))
    units.index(group).store(unit)


@gluon.jit
def make_row_units(config: gl.constexpr):
    """Where factors of query rows are kept, for each group."""
    if not config.scaled:
        return ()
    else:
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        return gl.allocate_shared_memory(gl.float32, [config.num_groups, config.group_rows], plain)


@gluon.jit
def q_descale_of(pointers, nowhere, config: gl.constexpr):
    """Pointer to the factors of e4m3 queries, or one that nobody follows."""
    if config.has_q_descale:
        return pointers[6]
    else:
        return nowhere


@gluon.jit
def rows_of(work, at, group: gl.constexpr, config: gl.constexpr):
    """What the rows of a group of the item at a cursor may see."""
    _, tokens = work.tokens(at.batch, True)
    _, row = work.place(at.item)
    row += group * config.group_rows
    offset = at.length - tokens
    seen_by_all = at.length
    from_all = at.pad
    if config.right_edge:
        first = work.token(row)
        seen_by_all = gl.minimum(seen_by_all, offset + first + work.window_right + 1)
    if config.left_edge:
        last = gl.minimum(work.token(row + (config.group_rows - 1)), tokens - 1)
        from_all = gl.maximum(from_all, offset + last - work.window_left)
    return Rows(at.length, at.pad, offset, row, seen_by_all, from_all, work.window_left, work.window_right,
                config)  # fmt: skip


@gluon.jit
def empty_items(work, results, start, step, config: gl.constexpr):
    """Zeros and -inf for the items of this KV head that see no key."""
    for item in range(start, work.num_items, step):
        first, end = work.tiles(item, True)
        if first >= end:
            store_zeros(results, work, item, config)


@gluon.jit
def given(pointer, nowhere):
    """A pointer, or one that nobody follows."""
    if pointer is None:
        return nowhere
    else:
        return pointer


@gluon.jit
def make_work(pointers, nowhere, seqlen, numbers, m_blocks_magic, config: gl.constexpr):
    """The facts of a call, from the tuples that kernels/launch_decode.py builds."""
    seqlens, cu_seqlens_new = given(pointers[0], nowhere), given(pointers[1], nowhere)
    leftpad, cu_seqlens_q = given(pointers[2], nowhere), given(pointers[3], nowhere)
    n = ()
    for i in gl.static_range(8):  # Triton makes compile-time constants of those that are 1
        n = n + (gl.to_tensor(numbers[i]),)
    splits = config.Splits(gl.to_tensor(config.amount))
    return Work(
        seqlens, cu_seqlens_new, leftpad, cu_seqlens_q, seqlen, n[0], n[1], n[2], n[3], n[4], n[5],
        n[6], n[7], m_blocks_magic, splits, config,
    )  # fmt: skip


@gluon.jit
def _make_numbers(pointers, strides, head, config: gl.constexpr):
    """What the elements of the cache are."""
    if not config.scaled:
        return SameNumbers(config)
    else:
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        factors = gl.allocate_shared_memory(gl.float32, [2 * config.num_stages, config.tile_n], plain)
        k = pointers[7] + head.to(gl.int64) * strides[13]
        v = pointers[8] + head.to(gl.int64) * strides[16]
        of_k, of_v = (strides[11], strides[12]), (strides[14], strides[15])
        return E4m3Numbers(k, v, of_k, of_v, factors, config)


@gluon.jit
def make_tiles(k, v, pointers, nowhere, table_stride, strides, head, config: gl.constexpr):
    """The cache, and the stages that its tiles pass through."""
    numbers = _make_numbers(pointers, strides, head, config)
    k_smem = gl.allocate_shared_memory(
        config.cache_dtype.value,
        [config.stages_held * config.k_chunks * config.pieces, config.piece_rows, config.k_width],
        config.piece_layout(config.k_width),
    )  # fmt: skip
    v_smem = gl.allocate_shared_memory(
        config.cache_dtype.value,
        [config.stages_held * config.v_chunks * config.pieces, config.piece_rows, config.v_width],
        config.piece_layout(config.v_width),
    )  # fmt: skip
    batch_idx, page_table = given(pointers[4], nowhere), given(pointers[5], nowhere)
    stride = gl.to_tensor(table_stride)
    if config.Tiles.clears:
        k_strides, v_strides = (strides[3], strides[4], strides[5]), (strides[6], strides[7], strides[8])
        if config.scaled:
            words: gl.constexpr = gl.pointer_type(config.cache_dtype.value)
            k, v = k.to(words, bitcast=True), v.to(words, bitcast=True)
        return config.Tiles(
            k, v, k_smem, v_smem, page_table, stride, batch_idx, head, k_strides, v_strides, numbers, config
        )
    else:
        full = gl.allocate_shared_memory(gl.int64, [config.num_stages, 1], mbarrier.MBarrierLayout())
        return config.Tiles(k, v, k_smem, v_smem, full, page_table, stride, batch_idx, head, numbers, config)


@gluon.jit
def _make_scratch(config: gl.constexpr):
    """Where warps that own keys meet."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    if not config.merges_warps:
        return ()
    else:
        maxima = gl.allocate_shared_memory(gl.float32, [2, config.num_warps, config.tile_m], plain)
        if config.scratch_fits > 0:
            return (maxima,)
        else:
            return maxima, gl.allocate_shared_memory(gl.float32, config.scratch_shape, config.scratch_layout)


@gluon.jit
def finish_segment(
    work, results, at, parts, x, lse, counters, unit, group: gl.constexpr, config: gl.constexpr
):
    """Write what a segment gave to the rows of a group: the result of an item, or a part of it. `unit`: of
    the item, of the segment's first tile."""
    row0: gl.constexpr = group * config.group_rows
    if parts.count == 1:
        store_result(results, work, at.item, x, lse, row0, config)
    else:
        store_partial(results, parts.slot(unit), x, lse, row0, config)
        if config.merges:
            thread_barrier()
            of_item = (at.item * config.num_kv_heads + results.kv_head) * config.num_groups + group
            counter = counters + of_item
            if gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts.count - 1:
                store_merged(results, work, at.item, parts, row0, config)
                gl.store(counter, 0)


@gluon.jit(do_not_specialize=["seqlen"])
def decode_attention(
    k, v, q_ptr, out_ptr, lse_ptr, o_part, l_part, counters, pointers, seqlen, numbers, m_blocks_magic,
    table_stride, strides, scales, config: gl.constexpr,
):  # fmt: skip
    """One program of the decode kernel. Tuples: see kernels/launch_decode.py."""
    c: gl.constexpr = config.static
    program = gl.program_id(0)
    place = program // c.num_kv_heads
    kv_head = program - place * c.num_kv_heads
    work = make_work(pointers, counters, seqlen, numbers, m_blocks_magic, c)
    results = Results(out_ptr, lse_ptr, o_part, l_part, kv_head)
    tiles = make_tiles(k, v, pointers, counters, table_stride, strides, kv_head, c)
    q_smem = gl.allocate_shared_memory(c.dtype.value, [c.q_chunks, c.tile_m, c.k_width], c.q_layout)
    row_units = make_row_units(c)
    q_descale = q_descale_of(pointers, counters, c)
    scratch = _make_scratch(c)
    rows_kind = c.RowKind(c)
    tiles.start()
    gdc_wait()  # nothing that a kernel before wrote is looked at before it has ended

    seen = work.look()
    units = work.num_units(seen)
    share = gl.maximum((units + (c.per_head - 1)) // c.per_head, 1)
    unit = place * share
    count = gl.maximum(gl.minimum(share, units - unit), 0)
    at = first_segment(work, seen, unit, count)

    asked = ask_for_q(q_ptr, work, kv_head, at.item, strides, 0, c)
    ahead, valid, places = fill_ring(work, tiles, at, c)
    if work.some_empty(seen):
        empty_items(work, results, place, c.per_head, c)
    it = unit * 0
    going = count > 0
    while going:
        keep_q(asked, q_ptr, q_smem, row_units, work, kv_head, at.item, q_descale, strides, 0, c)
        q = rows_kind.operand(q_smem)
        scale_log2, inner_scale = rows_kind.scales(row_units, scales)
        state = rows_kind.empty()
        rows = rows_of(work, at, 0, c)
        # divisions here, while the first loads are under way
        parts = parts_of(work, at.before, work.splits.units(at.first, at.end), share, kv_head)
        part = part_of(work, at, place, share)
        for tile in range(at.tile, at.stop):
            tiles.wait(it)
            tiles.emptied()
            thread_barrier()  # all warps are done with the stage before: refill it
            stage = (it + (c.num_stages - 1)) % c.num_stages
            ahead, valid, places = copy_ahead(work, tiles, stage, ahead, valid, places)
            n0 = tile * c.tile_n
            state = rows_kind.attend(q, tiles, it % c.num_stages, state, rows, n0, scale_log2, inner_scale)
            it += 1
        if at.left == 0:
            gdc_launch_dependents()  # earlier, and the second kernel's programs would be in the way
        x, lse = rows_kind.finish(state, tiles, scratch, (it - 1) % c.num_stages)
        finish_segment(work, results, at, parts, x, lse, counters, part, 0, c)
        going = at.left > 0
        if going:
            at = next_segment(work, at)
            asked = ask_for_q(q_ptr, work, kv_head, at.item, strides, 0, c)


@gluon.jit
def fill_ring(work, tiles, at, config: gl.constexpr):
    """Start the copies of the first tiles, all stages but one, from a cursor on. Returns the copy side: a
    cursor a ring ahead, whether there is a tile, and where."""
    ahead = at
    valid = at.tile < at.stop
    places = tiles.locate(ahead, valid)
    for stage in range(config.num_stages - 1):
        ahead, valid, places = copy_ahead(work, tiles, stage, ahead, valid, places)
    return ahead, valid, places


@gluon.jit
def copy_ahead(work, tiles, stage, ahead, valid, places):
    """Start to copy the tile of the copy side into a stage. Returns the copy side one tile further."""
    tiles.copy(stage, ahead, places, valid)
    ahead, valid = _advance(work, ahead, valid)
    return ahead, valid, tiles.locate(ahead, valid)


@gluon.jit
def _advance(work, at, valid):
    """The cursor one tile further, and whether there is one."""
    tile = at.tile + gl.where(valid, 1, 0)
    more = valid & ((tile < at.stop) | (at.left > 0))
    moved = Cursor(at.item, at.batch, at.length, at.pad, at.before, at.first, at.end, tile, at.stop, at.left)
    if more & (tile >= at.stop):
        moved = next_segment(work, moved)
    return moved, more
