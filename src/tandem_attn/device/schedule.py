"""Which tiles a program works on, and in which order. Only the producer asks; consumers get each tile by
mail.

A schedule has `create(...)`, and `next(i)` that returns the program's i-th tile as (found, m_block, head,
sequence id, schedule). Its integer methods use only + - * // % on non-negative numbers, so tests call them on
plain ints.

Tiles are numbered 0, 1, 2, ... in the order in which they should start; round r holds tiles r * P to r * P +
P - 1 for P programs. Odd rounds run backwards over the programs (`snake`), so that what one round gives too
much of, the next takes back.
"""

from tandem_attn.device.gluon import gl, gluon, policy
from tandem_attn.device.sequence import Varlen


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def snake(i, program, num_programs):
    """Number of the i-th tile of a program."""
    column = program + (i % 2) * (num_programs - 1 - 2 * program)
    return i * num_programs + column


@gluon.jit
def tile_in_rows(t, num_rows, num_m_blocks, group):
    """Tile t of num_rows x num_m_blocks: (m_block, row), a row being one head of one sequence.

    Rows are taken in groups whose keys and values fit in L2 together. Within a group all rows do their last
    (for causal longest) blocks first; every second group runs the other way, so that the cost never jumps
    where groups meet and the last group ends with the shortest tiles. Balance 0.97 to 1.00 of ideal on the
    benchmark grid.
    """
    g = t // (group * num_m_blocks)
    u = t - g * (group * num_m_blocks)
    size = min(group, num_rows - g * group)
    step = u // size
    last_group = (num_rows - 1) // group
    ascending = (last_group - g) % 2
    m_block = ascending * step + (1 - ascending) * (num_m_blocks - 1 - step)
    return m_block, g * group + u - step * size


@policy()
class DenseTiles:
    """Every sequence has the same number of tiles."""

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
    def next(self, i):
        t = snake(i, gl.program_id(0), gl.num_programs(0))
        m_block, row = tile_in_rows(t, self.num_rows, self.num_m_blocks, self.group)
        found = t < self.num_rows * self.num_m_blocks
        return found, m_block, row % self.num_heads, row // self.num_heads, self


@policy()
class PlainTiles:
    """Every sequence has the same number of tiles of equal cost: one head after the other, no order to
    keep."""

    num_m_blocks: gl.tensor
    num_heads: gl.tensor
    num_rows: gl.tensor

    @gluon.jit
    def create(sequences, batch, num_heads, group, tile_rows: gl.constexpr):
        return PlainTiles((sequences.seqlen_q + tile_rows - 1) // tile_rows, num_heads, batch * num_heads)

    @gluon.jit
    def next(self, i):
        t = i * gl.num_programs(0) + gl.program_id(0)
        row = t // self.num_m_blocks
        found = row < self.num_rows
        return found, t - row * self.num_m_blocks, row % self.num_heads, row // self.num_heads, self


@policy()
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
    def next(self, i):
        t = snake(i, gl.program_id(0), gl.num_programs(0))
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
        m_block, head = tile_in_rows(u, self.num_heads, num_m_blocks, self.group)
        after = VarlenTiles(
            self.sequences, self.batch, self.num_heads, self.group, self.tile_rows, first, before
        )  # fmt: skip
        return found, m_block, head, index, after
