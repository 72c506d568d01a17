"""Flash-Decoding with 64 or 128 packed query rows for sm_90a: a producer, and a consumer for 64 rows.

The same work list, shares and results as `decode_attention`; what differs is who loads. A program has

    producer   per tile of its share: wait for an empty stage, look the pages up, load K; the same for V
    consumers  per segment: load Q; per tile as in device/decode_groups.py; write a result or a partial one;
               the last program to arrive merges the partials, each consumer those of its rows

The producer is one warp; over a cache in e4m3 four, which load tiles as those of `decode_attention` do, and
unpack them into the rings.
"""

from tandem_attn.device.cache_numbers import SameNumbers
from tandem_attn.device.decode_groups import (
    FACTOR_TILES,
    Stages,
    first_tile,
    last_output,
    next_tile,
    scales_of,
)
from tandem_attn.device.gluon import (
    aggregate,
    base_value,
    fence_async_shared,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon,
    mbarrier,
    thread_barrier,
)
from tandem_attn.device.kv_tiles import LoadedTiles, load_pieces
from tandem_attn.device.partials import Results
from tandem_attn.device.turn import pass_turn
from tandem_attn.device.work import first_segment, next_segment, part_of, parts_of
from tandem_attn.kernels.decode import (
    ask_for_q,
    copy_ahead,
    empty_items,
    fill_ring,
    finish_segment,
    given,
    keep_q,
    make_row_units,
    make_tiles,
    make_work,
    q_descale_of,
    rows_of,
)


@aggregate
class Share:
    """What a program has to do."""

    work: base_value
    results: base_value
    at: base_value  # Cursor of its first segment
    place: gl.tensor  # of the program among those of its KV head
    share: gl.tensor  # units of every program
    count: gl.tensor  # of this one
    empty: gl.tensor  # whether some item has no unit


@gluon.jit
def _loading_producer(share, tiles, k, v, q_bar):
    work = share.work
    at = share.at
    c: gl.constexpr = work.config
    i = share.count * 0
    mbarrier.wait(q_bar, 0)  # behind the first tiles Q would wait for all of them
    going = share.count > 0
    while going:
        for tile in range(at.tile, at.stop):
            places = tiles.locate(at.at_tile(tile), True)
            stage, bar = k.refill(i)
            mbarrier.expect(bar, c.pieces * c.k_chunks * tiles.k.block_type.nbytes)
            load_pieces(tiles.k, k.smem, bar, stage, places, tiles.head, c.k_chunks, c.k_width, True)
            stage, bar = v.refill(i)
            mbarrier.expect(bar, c.pieces * c.v_chunks * tiles.v.block_type.nbytes)
            load_pieces(tiles.v, v.smem, bar, stage, places, tiles.head, c.v_chunks, c.v_width, True)
            i += 1
        going = at.left > 0
        if going:
            at = next_segment(work, at)


@gluon.jit
def _unpacking_producer(share, tiles, k, v, q_bar):
    """Words of a stage become fills of both rings, once per tile; the next stage is filled meanwhile."""
    work = share.work
    at = share.at
    c: gl.constexpr = work.config
    mbarrier.wait(q_bar, 0)
    ahead, valid, places = fill_ring(work, tiles, at, c)
    it = share.count * 0
    going = share.count > 0
    while going:
        for tile in range(at.tile, at.stop):
            tiles.wait(it)
            tiles.emptied()
            thread_barrier()
            stage = (it + (c.num_stages - 1)) % c.num_stages
            ahead, valid, places = copy_ahead(work, tiles, stage, ahead, valid, places)
            stage = it % c.num_stages
            k.keep_factors(it, tiles.numbers.factors.index(stage * 2))
            v.keep_factors(it, tiles.numbers.factors.index(stage * 2 + 1))
            k.unpack(it, tiles.k_smem, stage, None)
            n = tile * c.tile_n + gl.arange(0, c.tile_n, gl.SliceLayout(1, c.copy_layout(c.v_width)))
            keep = (n < at.length) & (n >= at.pad)
            v.unpack(it, tiles.v_smem, stage, keep[:, None])
            it += 1
        going = at.left > 0
        if going:
            at = next_segment(work, at)


@gluon.jit
def _producer(share, tiles, k, v, q_bar):
    if share.work.config.scaled:
        _unpacking_producer(share, tiles, k, v, q_bar)
    else:
        _loading_producer(share, tiles, k, v, q_bar)


@gluon.jit
def _take_q(q_smem, group: gl.constexpr, config: gl.constexpr):
    """Q as left operand, from registers or from shared memory."""
    fence_async_shared()
    thread_barrier()
    q = ()
    for c in gl.static_range(config.q_chunks):
        smem = q_smem.index(group * config.q_chunks + c)
        if config.q_in_registers:
            q = q + (smem.load(gl.DotOperandLayout(0, config.s_layout, 2)),)
        else:
            q = q + (smem,)
    return q


@gluon.jit
def _consumer(
    group: gl.constexpr, share, q_ptr, q_smem, units, k, v, q_bar, counters, q_descale, strides, scales
):
    work = share.work
    results = share.results
    at = share.at
    c: gl.constexpr = work.config
    asked = ask_for_q(q_ptr, work, results.kv_head, at.item, strides, group, c)
    mbarrier.arrive(q_bar, count=1)
    if group == 0:  # noqa: SIM102 (one is known when compiling)
        if share.empty:
            empty_items(work, results, share.place, c.per_head, c)
    if c.num_groups > 1 and group == c.num_groups - 1:
        pass_turn(group, c.num_groups)
    it = share.count * 0
    going = share.count > 0
    while going:
        keep_q(asked, q_ptr, q_smem, units, work, results.kv_head, at.item, q_descale, strides, group, c)
        q = _take_q(q_smem, group, c)
        of_rows = scales_of(units, group, scales, c)
        rows = rows_of(work, at, group, c)
        parts = parts_of(work, at.before, work.splits.units(at.first, at.end), share.share, results.kv_head)
        part = part_of(work, at, share.place, share.share)
        state = first_tile(group, q, k, v, it, rows, at.tile * c.tile_n, of_rows, c)
        for tile in range(at.tile + 1, at.stop):
            it += 1
            state = next_tile(
                group, q, k, v, it, state, rows, tile * c.tile_n, tile > at.tile + 1, of_rows, c
            )
        if at.left == 0:
            gdc_launch_dependents()
        n0 = (at.stop - 1) * c.tile_n
        x, lse = last_output(v, it, state, rows, n0, at.stop - at.tile > 1, of_rows[0], c)
        it += 1
        finish_segment(work, results, at, parts, x, lse, counters, part, group, c)
        going = at.left > 0
        if going:
            at = next_segment(work, at)
            asked = ask_for_q(q_ptr, work, results.kv_head, at.item, strides, group, c)


@gluon.jit
def _barriers(config: gl.constexpr, count: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [config.ring_stages, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(config.ring_stages):
        mbarrier.init(bars.index(s), count=count)
    return bars


@gluon.jit
def _stages(chunks: gl.constexpr, width: gl.constexpr, config: gl.constexpr):
    smem = gl.allocate_shared_memory(
        config.dtype.value, [config.stages_held * chunks * config.pieces, config.piece_rows, width],
        config.piece_layout(width),
    )  # fmt: skip
    full, empty = _barriers(config, 1), _barriers(config, config.num_groups)
    return Stages(smem, full, empty, (), chunks, width, config)


@gluon.jit
def _unpacked_stages(width: gl.constexpr, config: gl.constexpr):
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    smem = gl.allocate_shared_memory(
        config.dtype.value, [config.ring_stages * 2, config.tile_n, width],
        config.shared_layout(config.tile_n, width),
    )  # fmt: skip
    factors = gl.allocate_shared_memory(gl.float32, [FACTOR_TILES, config.tile_n], plain)
    full, empty = _barriers(config, 1), _barriers(config, config.num_groups)
    return Stages(smem, full, empty, factors, 2, width, config)


@gluon.jit(do_not_specialize=["seqlen"])
def decode_groups(
    k, v, q_ptr, out_ptr, lse_ptr, o_part, l_part, counters, pointers, seqlen, numbers, m_blocks_magic,
    table_stride, strides, scales, config: gl.constexpr,
):  # fmt: skip
    """One program. Arguments as those of `decode_attention`."""
    c: gl.constexpr = config.static
    program = gl.program_id(0)
    place = program // c.num_kv_heads
    kv_head = program - place * c.num_kv_heads
    work = make_work(pointers, counters, seqlen, numbers, m_blocks_magic, c)
    results = Results(out_ptr, lse_ptr, o_part, l_part, kv_head)
    q_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_bar, count=c.num_groups)
    if c.scaled:
        k_stages, v_stages = _unpacked_stages(c.k_width, c), _unpacked_stages(c.v_width, c)
        tiles = make_tiles(k, v, pointers, counters, table_stride, strides, kv_head, c)
        tiles.start()
    else:
        k_stages, v_stages = _stages(c.k_chunks, c.k_width, c), _stages(c.v_chunks, c.v_width, c)
        batch_idx, page_table = given(pointers[4], counters), given(pointers[5], counters)
        tiles = LoadedTiles(k, v, k_stages.smem, v_stages.smem, k_stages.full, page_table,
                            gl.to_tensor(table_stride), batch_idx, kv_head, SameNumbers(c), c)  # fmt: skip
    fence_async_shared()
    shape: gl.constexpr = [c.num_groups * c.q_chunks, c.group_rows, c.k_width]
    q_smem = gl.allocate_shared_memory(c.dtype.value, shape, c.q_layout)
    row_units = make_row_units(c)
    q_descale = q_descale_of(pointers, counters, c)
    gdc_wait()

    seen = work.look()
    units = work.num_units(seen)
    each = gl.maximum((units + (c.per_head - 1)) // c.per_head, 1)
    unit = place * each
    count = gl.maximum(gl.minimum(each, units - unit), 0)
    at = first_segment(work, seen, unit, count)
    share = Share(work, results, at, place, each, count, work.some_empty(seen))
    rest = (q_ptr, q_smem, row_units, k_stages, v_stages, q_bar, counters, q_descale, strides, scales)
    if c.num_groups == 1:
        gl.warp_specialize(
            [(_consumer, (0, share) + rest), (_producer, (share, tiles, k_stages, v_stages, q_bar))],
            [c.producer_warps],
            [c.producer_registers],
        )
    else:
        gl.warp_specialize([
            (_consumer, (0, share) + rest),
            (_consumer, (1, share) + rest),
            (_producer, (share, tiles, k_stages, v_stages, q_bar)),
        ], [4, c.producer_warps], [c.consumer_registers, c.producer_registers])  # fmt: skip
