"""Write new keys and values into an FP8 cache whose blocks of slots have factors: one launch before decoding.

A program takes K or V of one block that a sequence's new tokens reach, of one or some KV heads: it alone
writes the block's factor. First it looks for the largest magnitude among the new tokens, then it writes them.
Where the factor grows, what the block held is rounded again in the new unit, a power of two larger; as a rule
it does not, and what lies in the cache is not even read. Rotation, q, and tokens without room are as in
`append.py`; `reference_decode.fill_block` is what this computes, bit by bit.

A tile is [rows, width]: heads of a token where sequences get a few tokens each, else tokens of a head.
"""

import dataclasses

from tandem_attn.device.fp8_tiles import comparable, scales_of
from tandem_attn.device.gluon import gl, gluon
from tandem_attn.kernels.append import (
    AppendConfig,
    AppendPlan,
    append_config,
    element,
    in_unit,
    make_facts,
    side_of,
    turn_query,
)
from tandem_attn.kernels.config_decode import power_of_two
from tandem_attn.spec_decode import AppendSpec

FEW_TOKENS = 4  # of a sequence, up to which tiles are heads of a token
OLD_AT_ONCE = (
    8  # tiles of what a block held that are rounded again at once, where a tile has few of its slots
)


@dataclasses.dataclass(frozen=True)
class BlocksConfig(AppendConfig):
    """Compile-time facts of append_to_blocks."""

    block: int  # slots that share a factor
    by_token: bool  # tiles are tokens of a head, `heads_at_once` of them
    blocks_q: int  # of heads of q, and of KV heads
    blocks_kv: int
    reach: int  # blocks that the new tokens of a sequence can reach; packed: see `step`

    @property
    def of_page(self) -> int:
        """Blocks of a page."""
        return -(-self.page_size // self.block)

    @property
    def step(self) -> int:
        """New tokens of a sequence after which they are in another block, or page of `each` blocks. Packed
        sequence b has programs from (start // step + 2 b) each on: start is that of its tokens."""
        return self.page_size if self.page_size % self.block else self.block

    @property
    def each(self) -> int:
        return self.of_page if self.page_size % self.block else 1

    @property
    def token_step(self) -> int:
        """Tokens of a tile."""
        return self.heads_at_once if self.by_token else 1

    @property
    def old_at_once(self) -> int:
        return 1 if self.by_token else OLD_AT_ONCE


def blocks_config(spec: AppendSpec) -> BlocksConfig:
    """The configuration for a question."""
    shared = {f.name: getattr(append_config(spec), f.name) for f in dataclasses.fields(AppendConfig)}
    by_token = spec.total_new > spec.batch if spec.packed_new else spec.max_new > FEW_TOKENS
    least = 1024 // shared["width"]  # every thread has 8 elements
    rows = 2 * least if by_token else max(least, min(2 * least, power_of_two(spec.num_kv_heads)))
    shared["heads_at_once"] = rows
    config = BlocksConfig(
        **shared,
        block=spec.descale_block,
        by_token=by_token,
        blocks_q=-(-spec.num_heads // rows),
        blocks_kv=spec.num_kv_heads if by_token else -(-spec.num_kv_heads // rows),
        reach=0,
    )
    if spec.packed_new:
        return config
    reach = config.each * (-(-(spec.max_new - 1) // config.step) + 1)
    return dataclasses.replace(config, reach=min(spec.max_new, reach))


@gluon.jit
def _block_of(program, starts, n, config: gl.constexpr):
    """(sequence, which of the blocks that it may reach, row of its first new token, new tokens) of a program;
    n: the numbers of a launch."""
    batch, each_new = n[3], n[2]
    if config.packed_new:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        b = program * 0
        for c in range(0, batch, config.sequences_at_once):
            i = c + gl.arange(0, config.sequences_at_once, layout)
            end = gl.load(starts + i + 1, mask=i < batch, other=0)
            end = (end // config.step + 2 * i + 2) * config.each
            b += gl.sum(((end <= program) & (i < batch)).to(gl.int32), 0)
        there = b < batch
        start = gl.load(starts + b, mask=there, other=0)
        count = gl.load(starts + b + 1, mask=there, other=0) - start
        return b, program - (start // config.step + 2 * b) * config.each, start, count
    else:
        b = program // config.reach
        return b, program - b * config.reach, b * each_new, each_new


@gluon.jit
def _slots_of(length, j, config: gl.constexpr):
    """(first slot of a sequence's block, slot after its last): number j from that of slot `length` on."""
    if config.page_size > 0:
        page = length // config.page_size
        number = (length - page * config.page_size) // config.block + j
        page += number // config.of_page
        first = page * config.page_size + number % config.of_page * config.block
        return first, gl.minimum(first + config.block, (page + 1) * config.page_size)
    else:
        first = (length // config.block + j) * config.block
        return first, first + config.block


@gluon.jit
def _new_tile(facts, side, h, kv_heads, place, t, last):
    """(fp32 new tokens from slot t of the sequence on, [rows] their slots, whether elements are there).
    place: (sequence, its length, row of its first new token)."""
    config: gl.constexpr = facts.config
    layout: gl.constexpr = config.layout
    column = gl.arange(0, config.width, gl.SliceLayout(0, layout))
    slot = t + h * 0
    if config.by_token:
        slot += gl.arange(0, config.heads_at_once, gl.SliceLayout(1, layout))
    b, length, row = place
    token = slot - length
    keep = ((slot < last) & (h < kv_heads))[:, None] & (column < side.dim)[None, :]
    at = element(row + token, b, token, h, side.of_new, config.packed_new)
    if side.turns:
        position = (facts.position(b) + token)[:, None]
        x = facts.turned(side.new, at, keep, column, side.of_new[3], position)
    else:
        x = gl.load(side.new + at + (column * side.of_new[3])[None, :], mask=keep, other=0.0).to(gl.float32)
    return x, slot, keep


@gluon.jit
def _old_tile(side, page, h, grown, s, first, config: gl.constexpr):
    """([rows, width] pointers to slots s of a row of the cache, whether elements are to be rounded again)."""
    layout: gl.constexpr = config.layout
    column = gl.arange(0, config.width, gl.SliceLayout(0, layout))
    slot = s + h * 0
    if config.by_token:
        slot += gl.arange(0, config.heads_at_once, gl.SliceLayout(1, layout))
    at = element(slot, page, slot, h, side.of_cache, False) + (column * side.of_cache[3])[None, :]
    return side.cache + at, (grown & (slot < first))[:, None] & (column < side.dim)[None, :]


@gluon.jit
def _round_again(side, page, h, ratio, grown, start, first, config: gl.constexpr):
    """Numbers in slots [start, first) of a row of the cache times ratio [rows], where `grown` [rows] says
    so: several tiles at once, since nothing else hides how long loads take."""
    for s in range(start, first, config.token_step * config.old_at_once):
        tiles = ()
        for u in gl.static_range(config.old_at_once):
            x, keep = _old_tile(side, page, h, grown, s + u * config.token_step, first, config)
            tiles = tiles + (gl.load(x, mask=keep, other=0.0),)
        for u in gl.static_range(config.old_at_once):
            x, keep = _old_tile(side, page, h, grown, s + u * config.token_step, first, config)
            gl.store(x, (tiles[u].to(gl.float32) * ratio[:, None]).to(gl.float8e4nv), mask=keep)


@gluon.jit
def _fill(facts, side, place, heads, slots):
    """Write what is new in a block of K or V. place: (sequence, its length, row of its first new token),
    heads: (which block of them, how many there are), slots: (first of the block, first new, after last)."""
    config: gl.constexpr = facts.config
    layout: gl.constexpr = config.layout
    column = gl.arange(0, config.width, gl.SliceLayout(0, layout))
    rows = gl.arange(0, config.heads_at_once, gl.SliceLayout(1, layout))
    group, kv_heads = heads
    start, first, last = slots
    h = group + rows * 0
    if not config.by_token:
        h = group * config.heads_at_once + rows
    page, within = facts.place(place[0], first)  # row of the cache, slot of it
    origin = within - (first - start)
    block = (origin // config.block).to(gl.int64)
    of = page.to(gl.int64) * side.of_factors[0] + block * side.of_factors[1]
    of += h.to(gl.int64) * side.of_factors[2]
    there = h < kv_heads
    old = gl.load(side.factors + of, mask=there & (first > start), other=1.0)

    bits = rows * 0
    for t in range(first, last, config.token_step):
        x, _, _ = _new_tile(facts, side, h, kv_heads, place, t, last)
        bits = gl.maximum(bits, gl.max(comparable(gl.abs(x)), 1))
    if config.by_token:
        bits = rows * 0 + gl.max(bits, 0)
    factor, _ = scales_of(bits, True)
    stays = (first > start) & ((old >= factor) | (old != old))
    factor = gl.where(stays, old, factor)
    grown = (factor != old) & there & (first > start)
    # where rows are tokens all warps have read this factor: they meet in the maximum before it changes
    if gl.max(grown.to(gl.int32), 0) > 0:
        ratio = gl.div_rn(old, factor)
        _round_again(side, page, h, ratio, grown, origin, within, config)
    if config.by_token:
        there = there & (rows == 0)
    gl.store(side.factors + of, factor, mask=there)
    for t in range(first, last, config.token_step):
        x, slot, keep = _new_tile(facts, side, h, kv_heads, place, t, last)
        to = element(slot, page, within + (slot - first), h, side.of_cache, False)
        to = to + (column * side.of_cache[3])[None, :]
        gl.store(side.cache + to, in_unit(x, factor[:, None]), mask=keep)


@gluon.jit(do_not_specialize=["seqlen"])
def append_to_blocks(q, q_out, k_new, v_new, k_cache, v_cache, cos, sin, pointers, seqlen, numbers, strides,
                     config: gl.constexpr):  # fmt: skip
    """Grid: for tokens of q, if they are rotated, their blocks of heads; then for blocks of the cache K and
    V, and for each their blocks of heads. Arguments as of append_to_cache."""
    c: gl.constexpr = config.static
    facts, n = make_facts(pointers, seqlen, numbers, cos, sin, c)
    program = gl.program_id(0)
    if program < n[0] * c.blocks_q:
        row = program // c.blocks_q
        turn_query(facts, q, q_out, pointers[3], row, program - row * c.blocks_q, strides, n)
    else:
        program -= n[0] * c.blocks_q
        block = program // c.blocks_kv
        heads = (program - block * c.blocks_kv, n[9])
        of_v = block % 2
        b, j, row, count = _block_of(block // 2, pointers[4], n, c)
        if b < n[3]:
            length = facts.length(b)
            start, stop = _slots_of(length, j, c)
            first = gl.maximum(start, length)
            last = gl.minimum(gl.minimum(length + count, n[4]), stop)
            if first < last:
                place, slots = (b, length, row), (start, first, last)
                if of_v == 0:
                    k = side_of(k_new, k_cache, pointers[6], strides, 1, c.columns, c.rotary_dim > 0)
                    _fill(facts, k, place, heads, slots)
                else:
                    v = side_of(v_new, v_cache, pointers[7], strides, 4, c.columns_v, False)
                    _fill(facts, v, place, heads, slots)


class BlocksPlan(AppendPlan):
    """Everything about a call that depends neither on addresses nor on lengths."""

    kernel = append_to_blocks

    def _choice(self):
        spec, config = self.spec, blocks_config(self.spec)
        blocks = spec.batch * config.reach
        if spec.packed_new:
            blocks = (spec.total_new // config.step + 2 * spec.batch) * config.each
        return config, (self.rows_q * config.blocks_q + 2 * blocks * config.blocks_kv, 1, 1)
