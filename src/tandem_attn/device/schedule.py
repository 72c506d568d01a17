"""Which tiles a program works on, and in which order. Only the producer asks; consumers get tiles by mail.

Tiles are numbered 0, 1, 2, ... in the order in which they should start. A schedule has `create(...)`, and
`tile(t)` that returns tile number t as (found, m_block, head, sequence id, schedule). Numbers are never
negative where they are divided.

A program's first numbers are its own: one of each round of num_programs tiles. With `dynamic=False` that is
all. Else it has `static_rounds` of its own, every other from the far end so that long and short tiles even
out, and from then on takes the next number that nobody has: where tiles differ in cost, whoever is free first
goes on. That needs a counter in global memory, zero before and after every launch.

Own numbers keep neighbours together: programs 2i and 2i + 1 run on two multiprocessors that share more than
L2, and with tiles of equal length they run through the code together. With three consumers, whose code does
not fit in the instruction cache, that is worth 2% (head_dim 64, causal, H200, 2026-11-25).
"""

from tandem_attn.device.division import divided
from tandem_attn.device.gluon import aggregate, gl, gluon, policy
from tandem_attn.device.sequence import Varlen


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def own_number(schedule, n):
    """This program's tile number in round n of its own."""
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    if schedule.dynamic:
        return n * programs + (program if n & 1 == 0 else programs - 1 - program)
    else:
        return n * programs + program


@gluon.jit
def request_number(schedule, counter, n):
    """Start to fetch the number of this program's tile n (0, 1, ...); `requested_number` waits for it.

    Raw PTX because gl.atomic_add waits at once, about a microsecond. Only lane 0 holds the answer.
    """
    if schedule.dynamic:
        ticket = gl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .u32 lane; mov.u32 lane, %laneid; setp.eq.u32 p, lane, 0;"
            " setp.ne.and.s32 p, $2, 0, p; mov.u32 $0, 0; @p atom.global.add.u32 $0, [$1], 1; }",
            "=r,l,r",
            [counter.to(gl.int64), gl.where(n >= schedule.static_rounds, 1, 0)],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        ticket = 0
    return ticket


@gluon.jit
def requested_number(schedule, ticket, n):
    """The number of this program's tile n."""
    t = own_number(schedule, n)
    if schedule.dynamic:
        asm: gl.constexpr = "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;"
        taken = gl.inline_asm_elementwise(asm, "=r,r", [ticket], dtype=gl.int32, is_pure=False, pack=1)
        t = t if n < schedule.static_rounds else schedule.static_rounds * gl.num_programs(0) + taken
    return t


@gluon.jit
def close_numbers(schedule, counter, t):
    """After the end of a program's tiles: whoever drew the last of all numbers makes the counter zero again.

    With T tiles, R rounds and P programs, R P + n is the number of draw n. Draws find T - R P tiles, and each
    program draws once in vain. (T < R P only if R is 1: then just the T programs with a tile draw.)
    """
    if schedule.dynamic:  # noqa: SIM102 (known at compile time, unlike the inner one)
        if t == gl.num_programs(0) + schedule.num_tiles() - 1:
            gl.store(counter, 0)


@aggregate
class Rows:
    """How rows, each one head of one sequence, are taken: in groups whose keys and values fit in L2 together.

    Groups are of `group` rows and the last one of the rest: of all rows, or with packed sequences of the
    heads of each. `..._magic`: for device/division.py.
    """

    num_heads: gl.tensor
    heads_magic: gl.tensor
    group: gl.tensor
    group_magic: gl.tensor
    last_magic: gl.tensor
    tiles_magic: gl.tensor  # of the tiles of a group; dense only

    @gluon.jit
    def tile_in_group(self, g, u, num_rows, num_m_blocks):
        """Tile u of group g of num_rows rows: (m_block, row). All rows of a group do their last, for causal
        masks longest, blocks first."""
        size = min(self.group, num_rows - g * self.group)
        step = divided(u, self.group_magic if size == self.group else self.last_magic)
        return num_m_blocks - 1 - step, g * self.group + u - step * size

    @gluon.jit
    def head_and_sequence(self, row):
        """Of a row of all."""
        sequence = divided(row, self.heads_magic)
        return row - sequence * self.num_heads, sequence


@policy(dynamic=True, grouped=True)
class DenseTiles:
    """Every sequence has the same number of tiles, of different costs: longest first, whoever is free."""

    rows: Rows
    num_rows: gl.tensor  # batch * num_heads
    num_m_blocks: gl.tensor
    static_rounds: gl.tensor  # times num_programs: at most the number of tiles

    @gluon.jit
    def create(sequences, batch, rows, static_rounds, tile_rows: gl.constexpr):
        num_m_blocks = (sequences.seqlen_q + tile_rows - 1) // tile_rows
        return DenseTiles(rows, batch * rows.num_heads, num_m_blocks, static_rounds)

    @gluon.jit
    def num_tiles(self):
        return self.num_rows * self.num_m_blocks

    @gluon.jit
    def tile(self, t):
        t_in = min(t, self.num_tiles() - 1)  # past the end: any tile will do
        g = divided(t_in, self.rows.tiles_magic)
        u = t_in - g * (self.rows.group * self.num_m_blocks)
        m_block, row = self.rows.tile_in_group(g, u, self.num_rows, self.num_m_blocks)
        head, sequence = self.rows.head_and_sequence(row)
        return t < self.num_tiles(), m_block, head, sequence, self


@policy(dynamic=False, grouped=False)
class PlainTiles:
    """Every sequence has the same number of tiles of equal cost: one head after the other, groups of 1."""

    rows: Rows
    num_rows: gl.tensor  # batch * num_heads
    num_m_blocks: gl.tensor

    @gluon.jit
    def create(sequences, batch, rows, static_rounds, tile_rows: gl.constexpr):
        return PlainTiles(rows, batch * rows.num_heads, (sequences.seqlen_q + tile_rows - 1) // tile_rows)

    @gluon.jit
    def tile(self, t):
        row = divided(t, self.rows.tiles_magic)
        head, sequence = self.rows.head_and_sequence(row)
        return row < self.num_rows, t - row * self.num_m_blocks, head, sequence, self


@policy(dynamic=True, grouped=True)
class VarlenTiles:
    """Sequences of different lengths, known to the device alone: they follow one another, each as in
    DenseTiles.

    The search looks at 32 sequences at a time and never goes back (a program's tile numbers grow). Its state
    is the first sequence of the current 32 and the number of tiles before it.
    """

    sequences: Varlen
    batch: gl.tensor
    rows: Rows
    static_rounds: gl.tensor  # 1: numbers must grow, and the host does not know how many there are
    tile_rows: gl.constexpr
    first: gl.tensor
    tiles_before: gl.tensor

    @gluon.jit
    def create(sequences, batch, rows, static_rounds, tile_rows: gl.constexpr):
        zero = batch * 0
        return VarlenTiles(sequences, batch, rows, static_rounds, tile_rows, zero, zero)

    @gluon.jit
    def _tiles(self, first):
        """(sequence ids, their tiles) of the 32 sequences from `first` on."""
        b = first + gl.arange(0, 32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        length = self.sequences.lengths_q(b, b < self.batch)
        return b, (length + self.tile_rows - 1) // self.tile_rows * self.rows.num_heads

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
        num_m_blocks = gl.maximum(divided(here, self.rows.heads_magic), 1)
        u = gl.minimum(u, gl.maximum(here, 1) - 1)  # past the end: any tile will do
        g = u // (self.rows.group * num_m_blocks)
        u -= g * (self.rows.group * num_m_blocks)
        m_block, head = self.rows.tile_in_group(g, u, self.rows.num_heads, num_m_blocks)
        after = VarlenTiles(
            self.sequences, self.batch, self.rows, self.static_rounds, self.tile_rows, first, before
        )
        return found, m_block, head, index, after


@gluon.jit
def only_tile(Schedule: gl.constexpr, sequences, batch, rows, tile_rows: gl.constexpr):
    """(found, m_block, head, sequence id) of a program that has one tile, which has the program's number."""
    schedule = Schedule.create(sequences, batch, rows, gl.to_tensor(1), tile_rows)
    found, m_block, head, index, _after = schedule.tile(gl.program_id(0))
    return found, m_block, head, index
