"""Tiles of packed or equally long sequences, and scales of what becomes FP8 in them.

A tile is PADDING rows of a head: two blocks of queries or one of keys. Packed sequences are laid out in tiles
of their own: sequence b begins with tile cu_seqlens[b] // PADDING + b.
"""

from tandem_attn.device.gluon import aggregate, gl, gluon
from tandem_attn.device.sequence import PADDING

TILE = PADDING
LARGEST = gl.constexpr(448.0)  # of e4m3
LEAST_AMAX = gl.constexpr(2.0**-100)  # as in quant.py, like what follows
MEAN_ROWS = gl.constexpr(256)
SEQUENCES_AT_ONCE = gl.constexpr(256)  # of packed ones, in the search for a tile's


@gluon.jit
def tiles_of(seqlen, batch, least: gl.constexpr, packed: gl.constexpr):
    """Tiles of a side for one head: all there can be of packed sequences, else `least` for each or more."""
    if packed:
        return (seqlen + batch * TILE) // TILE
    else:
        return batch * gl.maximum((seqlen + (TILE - 1)) // TILE, least)


@aggregate
class Place:
    """A tile: of which sequence, and where its rows are."""

    b: gl.tensor
    start: gl.tensor  # row of its first in memory: of all packed rows, or of its element of the batch
    length: gl.tensor
    m: gl.tensor  # first row of the tile in the sequence
    padded: gl.tensor  # the same where packed sequences lie apart, each at a multiple of a tile

    @gluon.jit
    def part(self, first: gl.constexpr):
        """The tile without its first rows, of which there are whole blocks."""
        return Place(self.b, self.start, self.length, self.m + first, self.padded + first)

    @gluon.jit
    def rows(self, count: gl.constexpr, layout: gl.constexpr):
        """(rows in the sequence, whether they are there)."""
        row = self.m + gl.arange(0, count, layout)
        return row, row < self.length

    @gluon.jit
    def holds(self, packed: gl.constexpr):
        """Whether there is anything in the tile. The first of a packed sequence counts even where there is
        not: attention reads its scales and its V^T for queries that see no key."""
        if packed:
            return (self.m >= 0) & (self.m < gl.maximum(self.length, 1))
        else:
            return True


@gluon.jit
def length_of(starts, used, b, total, has_used: gl.constexpr):
    """(first row, rows) of packed sequence b: whatever numbers there are, inside of [0, total)."""
    start = gl.maximum(gl.load(starts + b), 0)
    length = gl.minimum(gl.load(starts + b + 1), total) - start
    if has_used:
        length = gl.minimum(length, gl.load(used + b))
    return start, gl.maximum(length, 0)


@gluon.jit
def place_of(
    tile, starts, used, seqlen, batch, least: gl.constexpr, has_used: gl.constexpr, config: gl.constexpr
):
    """The Place of a tile. seqlen: of packed sequences all rows."""
    if config.packed:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [config.num_warps], [0])
        before = tile * 0
        for c in range(0, batch, SEQUENCES_AT_ONCE):
            i = c + gl.arange(0, SEQUENCES_AT_ONCE, layout)
            first = gl.load(starts + i, mask=i < batch, other=0) // TILE + i  # (start + TILE i) // TILE
            before += gl.sum(((first <= tile) & (i < batch)).to(gl.int32), 0)
        b = gl.maximum(before - 1, 0)
        start, length = length_of(starts, used, b, seqlen, has_used)
        m = (tile - (gl.load(starts + b) // TILE + b)) * TILE
        return Place(b, start, length, m, tile * TILE)
    else:
        each = gl.maximum((seqlen + (TILE - 1)) // TILE, least)
        b = tile // each
        return Place(b, b * 0, seqlen, (tile - b * each) * TILE, tile * TILE)


@aggregate
class Rotary:
    """Tables of angles; pointers that are not given point anywhere."""

    cos: gl.tensor
    sin: gl.tensor
    stride: gl.tensor  # of rows, in units of 8
    length: gl.tensor

    @gluon.jit
    def angles(self, position, there):
        """Where the tables' rows begin; rows that are not there turn as position 0 does."""
        position = gl.where(there, gl.minimum(gl.maximum(position, 0), self.length - 1), 0)
        return position * self.stride * 8


# The sample of keys that K's mean is taken from


@gluon.jit
def sample_size(length):
    """How many of a sequence."""
    return gl.minimum(length, MEAN_ROWS)


@gluon.jit
def sampled_row(i, length, count):
    """Row i * length // count: number i of `count`, which are all of them or MEAN_ROWS. No product here has
    more than 31 bits."""
    step = length // gl.maximum(count, 1)
    rest = length - step * count  # 0 if they are all
    return i * step + i * rest // MEAN_ROWS


# Numbers


@gluon.jit
def larger(x, y):
    """The larger of x, which is not negative, and |y|; NaN if one is. Two at once if they have 16 bits."""
    if x.dtype == gl.float32:
        asm: gl.constexpr = "{ .reg .f32 t; abs.f32 t, $2; max.NaN.f32 $0, $1, t; }"
        return gl.inline_asm_elementwise(asm, "=f,f,f", [x, y], dtype=gl.float32, is_pure=True, pack=1)
    elif x.dtype == gl.bfloat16:
        asm: gl.constexpr = "{ .reg .b32 t; abs.bf16x2 t, $2; max.NaN.bf16x2 $0, $1, t; }"
        return gl.inline_asm_elementwise(asm, "=r,r,r", [x, y], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        asm: gl.constexpr = "{ .reg .b32 t; abs.f16x2 t, $2; max.NaN.f16x2 $0, $1, t; }"
        return gl.inline_asm_elementwise(asm, "=r,r,r", [x, y], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def largest_of(pieces):
    """Like a piece: the largest magnitude in each place."""
    largest = gl.zeros_like(pieces[0])
    for j in gl.static_range(len(pieces)):
        largest = larger(largest, pieces[j])
    return largest


@gluon.jit
def comparable(x):
    """int32 that compare like x in fp32, which is not negative, with NaN above all: fit for gl.max."""
    return x.to(gl.float32).to(gl.int32, bitcast=True)


@gluon.jit
def scales_of(bits, powers: gl.constexpr = False):
    """(descale, inverse) of what has the magnitude `bits` at most; 1 for zeros and what is as small.

    `powers`: the next power of two, as quant.py has them for V.
    """
    amax = bits.to(gl.float32, bitcast=True)
    amax = gl.where(amax < LEAST_AMAX, LARGEST, amax)
    descale = gl.div_rn(amax, LARGEST)
    if powers:
        up = ((descale.to(gl.int32, bitcast=True) + 0x7FFFFF) & -0x800000).to(gl.float32, bitcast=True)
        descale = gl.where(descale == descale, up, descale)  # NaN would become -0
        return descale, gl.div_rn(1.0, descale)  # exact
    else:
        return descale, gl.div_rn(LARGEST, amax)


@aggregate
class Side:
    """q, k or v of a launch, and what becomes of it."""

    x: gl.tensor
    batch_stride: gl.tensor  # units of 8 elements, 16 bytes
    row_stride: gl.tensor
    head_stride: gl.tensor
    heads: gl.tensor
    seqlen: gl.tensor  # of packed sequences all rows
    tiles: gl.tensor  # of a head, all sequences
    y: gl.tensor
    descale: gl.tensor
    amax: gl.tensor  # int32, where a scale is for more than a block: of each head of each sequence, or one

    @gluon.jit
    def rows(self, place, head, count: gl.constexpr, layout: gl.constexpr):
        """[count, 1] pointers to rows of a tile; 128 rows of all heads lie within 2**31 elements."""
        first = place.b.to(gl.int64) * self.batch_stride + head.to(gl.int64) * self.head_stride
        first += (place.start + place.m).to(gl.int64) * self.row_stride
        row = gl.arange(0, count, gl.SliceLayout(1, layout))
        return (self.x + first * 8) + (row * (self.row_stride * 8))[:, None]

    @gluon.jit
    def rows_at(self, b, start, head, row):
        """[rows, 1] pointers to rows `row` (a vector) of sequence b, which begins with row `start`."""
        first = b.to(gl.int64) * self.batch_stride + head.to(gl.int64) * self.head_stride
        first += start.to(gl.int64) * self.row_stride
        return (self.x + (first + row.to(gl.int64) * self.row_stride) * 8)[:, None]

    @gluon.jit
    def places(
        self, place, head, dim: gl.constexpr, count: gl.constexpr, layout: gl.constexpr, packed: gl.constexpr
    ):
        """[count, 1] pointers to where rows of a tile go, in a contiguous tensor."""
        first = (place.start + place.m).to(gl.int64)
        if not packed:
            first += place.b.to(gl.int64) * self.seqlen
        row = gl.arange(0, count, gl.SliceLayout(1, layout))
        return (self.y + (first * self.heads + head) * dim) + (row * (self.heads * dim))[:, None]

    @gluon.jit
    def keep_descale(self, descale, place, head, block: gl.constexpr, packed: gl.constexpr):
        """Store the scales of the first blocks of a tile: a vector, or one."""
        i = place.padded if packed else place.m
        i = i // block
        if len(descale.shape) > 0:
            i += gl.arange(0, descale.shape[0], descale.type.layout)
        if packed:
            gl.store(self.descale + head * (self.tiles * (TILE // block)) + i, descale)
        else:
            blocks = (self.seqlen + (block - 1)) // block
            gl.store(self.descale + (place.b * self.heads + head) * blocks + i, descale, mask=i < blocks)

    @gluon.jit
    def shared_inverse(self, place, head, granularity: gl.constexpr, powers: gl.constexpr):
        """The inverse scale of a head or a tensor, whose maximum is known; the first tile keeps the scale."""
        i = 0
        if granularity == "head":
            i = place.b * self.heads + head
        descale, inverse = scales_of(gl.load(self.amax + i), powers)
        if place.m == 0:
            gl.store(self.descale + i, descale)
        return inverse

    @gluon.jit
    def measure(self, bits, place, head, granularity: gl.constexpr):
        """Raise the maximum of the head or the tensor."""
        i = 0
        if granularity == "head":
            i = place.b * self.heads + head
        gl.atomic_max(self.amax + i, bits, sem="relaxed")
