"""Rows of a tile through a Hadamard matrix and through rotary embedding, in registers alone.

A tile is a tuple of pieces [rows, 32] in a layout where 4 lanes hold a row, 8 neighbouring columns each. Of
the 5 bits of a column one is left to sums of a thread's own registers; the other four (two of them say which
lane) make a product with a 16 x 16 matrix for mma.sync, whose operand and result lie just like that. Pieces
are mixed by sums. Products with +-1 are exact and added up in fp32.
"""

from tandem_attn.device.gluon import gl, gluon, mma_v2

PIECE = gl.constexpr(32)  # columns


@gluon.jit
def hadamard_16(dtype: gl.constexpr, mma: gl.constexpr):
    """Right operand [16, 16]: (-1)^popcount(row & column)."""
    layout: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    row = gl.arange(0, 16, gl.SliceLayout(1, layout))
    column = gl.arange(0, 16, gl.SliceLayout(0, layout))
    bits = row[:, None] & column[None, :]
    bits = bits ^ (bits >> 2)
    bits = bits ^ (bits >> 1)
    return (1.0 - 2.0 * (bits & 1).to(gl.float32)).to(dtype)


@gluon.jit
def in_shared(values):
    """A vector in shared memory, from where pieces cost registers only while they are used."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shared = gl.allocate_shared_memory(values.dtype, values.shape, layout)
    shared.store(values)
    return shared


@gluon.jit
def piece_of(shared, j: gl.constexpr, layout: gl.constexpr):
    """[1, 32] of a vector in shared memory, for a piece number j of this layout."""
    return shared.slice(j * PIECE, PIECE).load(gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def sign_bits(signs):
    """int16: the first bit of each fp32 sign. Of integers: a choice of -0.0 or 0.0 is compiled to 0.0."""
    return (signs.to(gl.int32, bitcast=True) >> 16).to(gl.int16) & -32768


@gluon.jit
def _flipped(x, signs, j: gl.constexpr):
    """A 16-bit piece, number j, with the signs of its columns changed, two numbers at once."""
    layout: gl.constexpr = x.type.layout
    bits = piece_of(signs, j, layout)
    asm: gl.constexpr = "xor.b32 $0, $1, $2;"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [x, bits], dtype=x.dtype, is_pure=True, pack=2)


@gluon.jit
def _operand_rows(x):
    """[ROWS, 32] -> [2 ROWS, 16], of which a thread has the same numbers.

    Columns are bits (4 3 2 1 0): the product takes 2 4 3 0, and 1 becomes a bit of its rows, so that an
    operand is the four registers of a 16-byte load in their order.
    """
    ROWS: gl.constexpr = x.shape[0]
    x = x.reshape([ROWS // 8, 8, 2, 2, 2, 2, 2]).permute([0, 5, 1, 4, 2, 3, 6])
    return x.reshape([2 * ROWS, 16])


@gluon.jit
def _mixed(x, h, start, mma: gl.constexpr):
    """A 16-bit piece times the Hadamard matrix of size 16, over all bits of its columns but bit 1, plus
    `start`, in fp32 and in the layout of x."""
    ROWS: gl.constexpr = x.shape[0]
    a = gl.convert_layout(_operand_rows(x), gl.DotOperandLayout(0, mma, 2), assert_trivial=True)
    c = mma_v2(a, h, gl.convert_layout(_operand_rows(start), mma, assert_trivial=True))
    c = c.reshape([ROWS // 8, 2, 8, 2, 2, 2, 2]).permute([0, 2, 4, 5, 3, 1, 6]).reshape([ROWS, PIECE])
    return gl.convert_layout(c, x.type.layout, assert_trivial=True)


@gluon.jit
def _mixed_by_bit_1(x):
    """Sums and differences of columns that differ in bit 1."""
    ROWS: gl.constexpr = x.shape[0]
    a, b = gl.split(x.reshape([ROWS, 8, 2, 2]).permute([0, 1, 3, 2]))
    y = gl.join(a + b, a - b).permute([0, 1, 3, 2]).reshape([ROWS, PIECE])
    return gl.convert_layout(y, x.type.layout, assert_trivial=True)


@gluon.jit
def _summed(x, step: gl.constexpr):
    """Sums and differences of pieces `step` apart."""
    y = ()
    for j in gl.static_range(len(x)):
        if (j // step) % 2 == 0:
            y = y + (x[j] + x[j + step],)
        else:
            y = y + (x[j - step] - x[j],)
    return y


# A rotation has two halves: bits of columns that the product with a matrix mixes, and bits that sums of
# registers mix. Half way a row is what it is at the end, but for sums and differences of its columns:
# products of two rows are as large there as they were before, times HALF_WAY, and a constant added there is a
# constant added at the end.
HALF_WAY = gl.constexpr(16.0)


@gluon.jit
def _beginning(start, begins: gl.constexpr, j: gl.constexpr, x):
    """fp32, like x, which is piece j."""
    layout: gl.constexpr = x.type.layout
    if begins:
        y, _ = gl.broadcast(piece_of(start, j, layout), x)
        return y
    else:
        return gl.zeros(x.shape, gl.float32, layout)


@gluon.jit
def half_rotated(x, signs, start, begins: gl.constexpr, mma: gl.constexpr):
    """16-bit pieces x times signs (`sign_bits` in shared memory) times half of a Hadamard matrix, in fp32.
    start: what columns begin with there, in shared memory, if it `begins`; else anything."""
    h = hadamard_16(x[0].dtype, mma)
    y = ()
    for j in gl.static_range(len(x)):
        y = y + (_mixed(_flipped(x[j], signs, j), h, _beginning(start, begins, j, x[j]), mma),)
    return y


@gluon.jit
def half_rotated_vector(vector, signs, pieces: gl.constexpr, mma: gl.constexpr, layout: gl.constexpr):
    """The same of an fp32 vector in shared memory: pieces whose rows are all equal. It is the sum of three
    numbers in bf16, of which each is rotated exactly."""
    rows: gl.constexpr = 8 * gl.num_warps()
    h = hadamard_16(gl.bfloat16, mma)
    zeros = gl.zeros([rows, PIECE], gl.float32, layout)
    y = ()
    for j in gl.static_range(pieces):
        rest = _beginning(vector, True, j, zeros)
        c = zeros
        for _ in gl.static_range(3):
            part = rest.to(gl.bfloat16)
            rest = rest - part.to(gl.float32)
            c = _mixed(_flipped(part, signs, j), h, c, mma)
        y = y + (c,)
    return y


@gluon.jit
def other_half(x, group: gl.constexpr):
    """What is `half_rotated`, over the other bits: a Hadamard matrix of 32 `group` columns in all."""
    y = ()
    for j in gl.static_range(len(x)):
        y = y + (_mixed_by_bit_1(x[j]),)
    if group >= 2:
        y = _summed(y, 1)
    if group >= 4:
        y = _summed(y, 2)
    if group >= 8:
        y = _summed(y, 4)
    return y


# Rotary embedding. cos, sin: pointers, tables of `half` columns; angle: of each row, where that of the tables
# begins, a multiple of 8; turned numbers are rounded once, to the dtype of x.


@gluon.jit
def turn_pairs(x, cos, sin, angle, first: gl.constexpr, half: gl.constexpr):
    """Columns (2i, 2i + 1) of a piece that begins with column `first`."""
    ROWS: gl.constexpr = x.shape[0]
    a, b = gl.split(x.reshape([ROWS, PIECE // 2, 2]).to(gl.float32))
    layout: gl.constexpr = a.type.layout
    pair = first // 2 + gl.arange(0, PIECE // 2, gl.SliceLayout(0, layout))
    at = gl.convert_layout(angle, gl.SliceLayout(1, layout))[:, None] + pair[None, :]
    if first + PIECE > 2 * half:
        c = gl.load(cos + at, mask=(pair < half)[None, :], other=1.0).to(gl.float32)
        s = gl.load(sin + at, mask=(pair < half)[None, :], other=0.0).to(gl.float32)
    else:
        c = gl.load(cos + at).to(gl.float32)
        s = gl.load(sin + at).to(gl.float32)
    y = gl.join(a * c - b * s, a * s + b * c).reshape([ROWS, PIECE]).to(x.dtype)
    return gl.convert_layout(y, x.type.layout, assert_trivial=True)


@gluon.jit
def turn_two(x, y, cos, sin, angle, first: gl.constexpr):
    """Columns i and i + half, half a multiple of 32: whole pieces, of which x begins with column `first`."""
    at = angle[:, None] + (first + gl.arange(0, PIECE, gl.SliceLayout(0, x.type.layout)))[None, :]
    c = gl.load(cos + at).to(gl.float32)
    s = gl.load(sin + at).to(gl.float32)
    a, b = x.to(gl.float32), y.to(gl.float32)
    return (a * c - b * s).to(x.dtype), (a * s + b * c).to(x.dtype)


@gluon.jit
def turn_halves(x, x_ptr, cos, sin, angle, there, first: gl.constexpr, half: gl.constexpr):
    """Columns (i, i + half) of a piece that begins with column `first`, where half is any multiple of 8. The
    other 8 neighbours of 8 neighbours are loaded again, from L1; x_ptr: [rows, 1] where rows of x begin."""
    column = first + gl.arange(0, PIECE, gl.SliceLayout(0, x.type.layout))
    turns = column < 2 * half
    low = column < half
    other = gl.where(low, column + half, column - half)
    pair = gl.where(low, column, column - half)
    other = gl.max_contiguous(gl.multiple_of(gl.where(turns, other, column), 8), 8)
    pair = gl.max_contiguous(gl.multiple_of(gl.where(turns, pair, 0), 8), 8)
    y = gl.load(x_ptr + other[None, :], mask=there[:, None] & turns[None, :], other=0.0).to(gl.float32)
    at = angle[:, None] + pair[None, :]
    c = gl.load(cos + at, mask=turns[None, :], other=1.0).to(gl.float32)
    s = gl.load(sin + at, mask=turns[None, :], other=0.0).to(gl.float32)
    return (x.to(gl.float32) * c + y * gl.where(low, -1.0, 1.0)[None, :] * s).to(x.dtype)
