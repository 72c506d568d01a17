"""Who computes what when decoding: items, their tiles of keys, and the share of each program.

An item is a block of packed query rows of one sequence (row = token * group_size + head in group) with one KV
head; usually a sequence is one item. Every KV head has the same list of items and the same number of
programs, whose shares have the same bounds: the heads of a token are then read at the same time, which is
worth 5 to 8% of the bandwidth (H200, 2026-11-22). Lengths are read on the device; nothing waits for the host.
"""

from tandem_attn.device.division import divided
from tandem_attn.device.gluon import aggregate, base_value, gl, gluon


@gluon.jit
def _add(a, b):
    return a + b


@aggregate
class Work:
    """The facts from which every program finds its share. Pointers that are not given point anywhere."""

    seqlens: gl.tensor  # (batch,) keys before this call
    cu_seqlens_new: gl.tensor  # (batch + 1,) of keys that this call appended
    leftpad: gl.tensor  # (batch,) first visible key
    cu_seqlens_q: gl.tensor  # (batch + 1,) of packed queries
    seqlen: gl.tensor  # keys of every sequence, where there are no seqlens
    seqlen_new: gl.tensor
    seqlen_q: gl.tensor  # tokens of every sequence, where they are not packed
    total_q: gl.tensor
    capacity: gl.tensor
    window_left: gl.tensor
    window_right: gl.tensor
    num_items: gl.tensor
    m_blocks: gl.tensor  # items of a sequence
    m_blocks_magic: gl.tensor
    splits: base_value
    config: gl.constexpr  # DecodeConfig

    @gluon.jit
    def place(self, i):
        """(sequence, first packed row) of items i."""
        if self.config.one_block:
            return i, i * 0
        else:
            b = divided(i, self.m_blocks_magic)
            return b, (i - b * self.m_blocks) * self.config.tile_m

    @gluon.jit
    def token(self, row):
        """Token of packed rows."""
        return (row.to(gl.uint32) // self.config.group_size).to(gl.int32)

    @gluon.jit
    def length(self, b, mask):
        """Keys of sequences b, in absolute slots; never beyond the cache."""
        n = b * 0 + (self.seqlen + self.seqlen_new)
        if self.config.has_seqlens:
            n = gl.maximum(gl.load(self.seqlens + b, mask=mask, other=0), 0) + self.seqlen_new
        if self.config.packed_new:
            start = gl.load(self.cu_seqlens_new + b, mask=mask, other=0)
            n += gl.maximum(gl.load(self.cu_seqlens_new + b + 1, mask=mask, other=0) - start, 0)
        return gl.minimum(n, self.capacity)

    @gluon.jit
    def pad(self, b, mask):
        """First slot of sequences b that may be seen."""
        if self.config.has_leftpad:
            return gl.maximum(gl.load(self.leftpad + b, mask=mask, other=0), 0)
        else:
            return b * 0

    @gluon.jit
    def tokens(self, b, mask):
        """(first row of q, number of tokens) of sequences b."""
        if self.config.packed_q:
            start = gl.maximum(gl.load(self.cu_seqlens_q + b, mask=mask, other=0), 0)
            end = gl.minimum(gl.load(self.cu_seqlens_q + b + 1, mask=mask, other=0), self.total_q)
            return start, gl.minimum(gl.maximum(end - start, 0), self.seqlen_q)
        elif self.config.tokens > 0:
            return b * self.config.tokens, b * 0 + self.config.tokens
        else:
            return b * self.seqlen_q, b * 0 + self.seqlen_q

    @gluon.jit
    def tiles(self, i, mask):
        """(first, end) tile of keys that items i need; (0, 0) if none. i: a number or a tensor of them."""
        tile_n: gl.constexpr = self.config.tile_n
        tile_m: gl.constexpr = self.config.tile_m
        b, row = self.place(i)
        n = self.length(b, mask)
        start = self.pad(b, mask)
        end = n
        if self.config.packed_q or self.config.right_edge or self.config.left_edge:
            _, t = self.tokens(b, mask)
            if self.config.right_edge:
                last = gl.minimum(self.token(row + (tile_m - 1)), t - 1)
                end = gl.minimum(end, n - t + last + self.window_right + 1)
            if self.config.left_edge:
                first = self.token(row)
                start = gl.maximum(start, n - t + first - self.window_left)
            end = gl.where(row < t * self.config.group_size, end, 0)
        some = (end > start) & mask
        return gl.where(some, start // tile_n, 0), gl.where(some, (end + tile_n - 1) // tile_n, 0)

    @gluon.jit
    def _chunk(self, c):
        """Units of the items c, c + 1, ... : as many as one look holds, the same in every warp."""
        size: gl.constexpr = self.config.items_at_once
        layout: gl.constexpr = gl.BlockedLayout([(size + 31) // 32], [32], [gl.num_warps()], [0])
        i = c + gl.arange(0, size, layout)
        first, end = self.tiles(i, i < self.num_items)
        return self.splits.units(first, end)

    @gluon.jit
    def look(self):
        """Units of the first items, a tensor; of the only one, a number."""
        if self.config.items_at_once == 1:
            first, end = self.tiles(self.num_items - 1, self.num_items > 0)
            return self.splits.units(first, end)
        else:
            return self._chunk(0)

    @gluon.jit
    def num_units(self, seen):
        """Units of all items. `seen`: what look() gave."""
        size: gl.constexpr = self.config.items_at_once
        if size == 1:
            return seen
        else:
            total = gl.sum(seen, 0)
            if not self.config.one_look:
                for c in range(size, self.num_items, size):
                    total += gl.sum(self._chunk(c), 0)
            return total

    @gluon.jit
    def some_empty(self, seen):
        """Whether some item has no unit."""
        size: gl.constexpr = self.config.items_at_once
        if size == 1:
            return seen == 0
        else:
            present = gl.sum((seen > 0).to(gl.int32), 0)
            if not self.config.one_look:
                for c in range(size, self.num_items, size):
                    present += gl.sum((self._chunk(c) > 0).to(gl.int32), 0)
            return present < self.num_items

    @gluon.jit
    def find(self, unit, seen):
        """(item that holds this unit, units of all items before it)."""
        size: gl.constexpr = self.config.items_at_once
        if size == 1:
            return unit * 0, unit * 0
        elif self.config.one_look:
            before = gl.associative_scan(seen, 0, _add) <= unit
            return gl.sum(before.to(gl.int32), 0), gl.sum(gl.where(before, seen, 0), 0)
        else:
            item = unit * 0
            start = unit * 0
            base = unit * 0
            for c in range(0, self.num_items, size):
                units = self._chunk(c)
                before = (base + gl.associative_scan(units, 0, _add)) <= unit
                item += gl.sum(before.to(gl.int32), 0)
                start += gl.sum(gl.where(before, units, 0), 0)
                base += gl.sum(units, 0)
            return item, start

    @gluon.jit
    def units_before(self, item):
        """Units of all items before this one."""
        size: gl.constexpr = self.config.items_at_once
        if size == 1:
            return item * 0
        else:
            layout: gl.constexpr = gl.BlockedLayout([(size + 31) // 32], [32], [gl.num_warps()], [0])
            start = item * 0
            for c in range(0, item, size):
                i = c + gl.arange(0, size, layout)
                start += gl.sum(gl.where(i < item, self._chunk(c), 0), 0)
            return start


@aggregate
class Cursor:
    """A place in the list of tiles: the segment that a program is in, and how much is left after it."""

    item: gl.tensor
    batch: gl.tensor  # its sequence
    length: gl.tensor  # keys of the sequence
    pad: gl.tensor  # of which the first `pad` are not to be seen
    before: gl.tensor  # units of all items before
    first: gl.tensor  # tiles of the item
    end: gl.tensor
    tile: gl.tensor
    stop: gl.tensor  # end of the segment
    left: gl.tensor  # units after it

    @gluon.jit
    def at_tile(self, tile):
        """The cursor at another tile of its segment."""
        return Cursor(
            self.item, self.batch, self.length, self.pad, self.before, self.first, self.end, tile, self.stop,
            self.left,
        )  # fmt: skip


@gluon.jit
def first_segment(work, seen, unit, count):
    """The segment that begins with this unit, of a program that has `count` units; one without tiles for
    none."""
    item, before = work.find(unit, seen)
    some = count > 0
    item = gl.where(some, item, 0)
    first, end = work.tiles(item, some)
    batch, _ = work.place(item)
    tile = work.splits.tile_of(unit - before, first, end)
    stop = work.splits.stop(tile, first, end, count)
    left = count - work.splits.used(tile, stop)
    tile = gl.where(some, tile, 0)
    stop = gl.where(some, stop, 0)
    return Cursor(
        item, batch, work.length(batch, some), work.pad(batch, some), before, first, end, tile, stop, left
    )


@gluon.jit
def next_segment(work, at):
    """The segment after this one; only while at.left > 0."""
    item = at.item
    batch = at.batch
    length = at.length
    pad = at.pad
    before = at.before
    first = at.first
    end = at.end
    tile = at.stop
    if tile >= end:
        before += work.splits.units(first, end)
        end = first
        while (end <= first) & (item + 1 < work.num_items):
            item += 1
            first, end = work.tiles(item, True)
        tile = first
        batch, _ = work.place(item)
        length = work.length(batch, True)
        pad = work.pad(batch, True)
    stop = work.splits.stop(tile, first, end, at.left)
    left = at.left - work.splits.used(tile, stop)
    return Cursor(item, batch, length, pad, before, first, end, tile, stop, left)


@aggregate
class Parts:
    """Where the partial results of an item lie: the j-th in slot first + j * step, the 0th `bonus`
    further."""

    count: gl.tensor
    first: gl.tensor
    step: gl.constexpr
    bonus: gl.constexpr

    @gluon.jit
    def slot(self, j):
        if self.bonus:
            return self.first + j * self.step + gl.where(j == 0, 1, 0)
        else:
            return self.first + j * self.step

    @gluon.jit
    def slots(self, start, i):
        """Of the parts start + i, int64: (one number, what to add for i). Where the compiler knows i, the
        second ends up in load instructions, and costs nothing."""
        more = i.to(gl.int64) * self.step
        if self.bonus:
            more += gl.where((i == 0) & (start == 0), 1, 0)
        return (self.first + start * self.step).to(gl.int64), more


@gluon.jit
def part_of(work, at, place, share):
    """The number, among the parts of its item, of the segment at a cursor of the program at this place."""
    if work.splits.shared:
        return place - at.before // share
    else:
        return work.splits.unit_of(at.tile, at.first, at.end)


@gluon.jit
def parts_of(work, before, units, share, kv_head):
    """Parts of an item with `units` units after `before` others.

    Shared: a program has at most one segment that begins inside an item and one that goes on in the next
    program: two slots each, the second for the latter. Else every unit has a slot.
    """
    num_kv_heads: gl.constexpr = work.config.num_kv_heads
    if work.splits.shared:
        c = before // share
        count = (before + units - 1) // share - c + 1
        return Parts(count, 2 * (c * num_kv_heads + kv_head), 2 * num_kv_heads, True)
    else:
        return Parts(units, before * num_kv_heads + kv_head, num_kv_heads, False)
