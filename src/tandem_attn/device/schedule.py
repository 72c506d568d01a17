"""Which tiles a program works on, and in which order. Only the producer asks; consumers get tiles by mail.

Tiles are numbered 0, 1, 2, ... in the order in which they should start. A schedule has `create(...)`, and
`tile(t)` that returns tile number t as (found, m_block, head, sequence id, schedule). Its integer methods use
only + - * // % min on non-negative numbers, so tests call them on plain ints.

A program's first number is its own; it then takes every num_programs-th (`dynamic=False`), or the next one
that nobody has (`dynamic=True`): where tiles differ in cost, whoever is free first goes on. That needs a
counter in global memory, zero before and after every launch.
"""

from tandem_attn.device.gluon import gl, gluon, policy
from tandem_attn.device.sequence import Varlen


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def request_number(schedule, counter):
    """Start to fetch this warp's next tile number; `requested_number` waits for it.

    Raw PTX because gl.atomic_add waits at once, about a microsecond. Only lane 0 holds the answer.
    """
    if schedule.dynamic:
        ticket = gl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .u32 lane; mov.u32 lane, %laneid; setp.eq.u32 p, lane, 0; mov.u32 $0, 0;"
            " @p atom.global.add.u32 $0, [$1], 1; }",
            "=r,l",
            [counter.to(gl.int64)],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        ticket = 0
    return ticket


@gluon.jit
def requested_number(schedule, ticket, before):
    """The tile number after `before`."""
    if schedule.dynamic:
        asm: gl.constexpr = "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;"
        taken = gl.inline_asm_elementwise(asm, "=r,r", [ticket], dtype=gl.int32, is_pure=False, pack=1)
        return gl.num_programs(0) + taken
    else:
        return before + gl.num_programs(0)


@gluon.jit
def close_numbers(schedule, counter, t):
    """After the end of a program's tiles: whoever drew the last of all numbers makes the counter zero again.

    With T tiles and P programs there are T draws: T - P that found a tile (none if T < P), and one in vain
    by each program that had one at all.
    """
    if schedule.dynamic:  # noqa: SIM102 (known at compile time, unlike the inner one)
        if t == gl.num_programs(0) + schedule.num_tiles() - 1:
            gl.store(counter, 0)


@gluon.jit
def tile_in_rows(t, num_rows, num_m_blocks, group):
    """Tile t of num_rows x num_m_blocks: (m_block, row), a row being one head of one sequence.

    Rows are taken in groups whose keys and values fit in L2 together; within a group all rows do their last,
    for causal masks longest, blocks first.
    """
    g = t // (group * num_m_blocks)
    u = t - g * (group * num_m_blocks)
    size = min(group, num_rows - g * group)
    step = u // size
    return num_m_blocks - 1 - step, g * group + u - step * size


@policy(dynamic=True)
class DenseTiles:
    """Every sequence has the same number of tiles, of different costs: longest first, whoever is free."""

    num_m_blocks: gl.tensor
    num_heads: gl.tensor
    num_rows: gl.tensor  # batch * num_heads
    group: gl.tensor  # rows in a group

    @gluon.jit
    def create(sequences, batch, num_heads, group, tile_rows: gl.constexpr):
        return DenseTiles(
            (sequences.seqlen_q + tile_rows - 1) // tile_rows, num_heads, batch * num_heads, group
        )

    @gluon.jit
    def num_tiles(self):
        return self.num_rows * self.num_m_blocks

    @gluon.jit
    def tile(self, t):
        found = t < self.num_rows * self.num_m_blocks
        m_block, row = tile_in_rows(
            min(t, self.num_rows * self.num_m_blocks - 1), self.num_rows, self.num_m_blocks, self.group
        )
        return found, m_block, row % self.num_heads, row // self.num_heads, self


@policy(dynamic=False)
class PlainTiles:
    """Every sequence has the same number of tiles of equal cost: one head after the other."""

    num_m_blocks: gl.tensor
    num_heads: gl.tensor
    num_rows: gl.tensor

    @gluon.jit
    def create(sequences, batch, num_heads, group, tile_rows: gl.constexpr):
        return PlainTiles((sequences.seqlen_q + tile_rows - 1) // tile_rows, num_heads, batch * num_heads)

    @gluon.jit
    def tile(self, t):
        row = t // self.num_m_blocks
        return (
            row < self.num_rows,
            t - row * self.num_m_blocks,
            row % self.num_heads,
            row // self.num_heads,
            self,
        )


@policy(dynamic=True)
class VarlenTiles:
    """Sequences of different lengths, known to the device alone: they follow one another, each as in
    DenseTiles.

    The search looks at 32 sequences at a time and never goes back (a program's tile numbers grow). Its state
    is the first sequence of the current 32 and the number of tiles before it.
    """

    sequences: Varlen
    batch: gl.tensor
    num_heads: gl.tensor
    group: gl.tensor
    tile_rows: gl.constexpr
    first: gl.tensor
    tiles_before: gl.tensor

    @gluon.jit
    def create(sequences, batch, num_heads, group, tile_rows: gl.constexpr):
        zero = batch * 0
        return VarlenTiles(sequences, batch, num_heads, group, tile_rows, zero, zero)

    @gluon.jit
    def _tiles(self, first):
        """(sequence ids, their tiles) of the 32 sequences from `first` on."""
        b = first + gl.arange(0, 32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        length = self.sequences.lengths_q(b, b < self.batch)
        return b, (length + self.tile_rows - 1) // self.tile_rows * self.num_heads

    @gluon.jit
    def num_tiles(self):
        """All tiles of the call; only once the end has been seen, when `first` is the last window."""
        b, tiles = self._tiles(self.first)
        return self.tiles_before + gl.sum(tiles, 0)

    @gluon.jit
    def tile(self, t):
        first = self.first
        before = self.tiles_before
        b, tiles = self._tiles(first)
        total = gl.sum(tiles, 0)
        while (before + total <= t) & (first + 32 < self.batch):
            first += 32
            before += total
            b, tiles = self._tiles(first)
            total = gl.sum(tiles, 0)
        ends = before + gl.associative_scan(tiles, 0, _add)
        skipped = gl.where(ends <= t, 1, 0)  # sequences that end before tile t
        index = first + gl.sum(skipped, 0)
        found = index < gl.minimum(first + 32, self.batch)
        index = gl.minimum(index, self.batch - 1)
        u = t - before - gl.sum(gl.where(ends <= t, tiles, 0), 0)
        here = gl.sum(gl.where(b == index, tiles, 0), 0)
        num_m_blocks = gl.maximum(here // self.num_heads, 1)
        u = gl.minimum(u, gl.maximum(here, 1) - 1)  # past the end: any tile will do
        m_block, head = tile_in_rows(u, self.num_heads, num_m_blocks, self.group)
        after = VarlenTiles(
            self.sequences, self.batch, self.num_heads, self.group, self.tile_rows, first, before
        )  # fmt: skip
        return found, m_block, head, index, after
