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


VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def in_shared(values, layout: gl.constexpr = VECTOR):
    """Numbers in shared memory, from where they cost registers only while they are used."""
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


@gluon.jit
def _beginning(offset, h, begins: gl.constexpr, j: gl.constexpr, x, mma: gl.constexpr):
    """What a product with h begins with, fp32, like x, which is piece j: `offset` times h, or 0."""
    layout: gl.constexpr = x.type.layout
    zeros = gl.zeros(x.shape, gl.float32, layout)
    if begins:
        rows, _ = gl.broadcast(piece_of(offset, j, layout), x)
        return _mixed(rows, h, zeros, mma)
    else:
        return zeros


@gluon.jit
def rotated(x, signs, offset, begins: gl.constexpr, group: gl.constexpr, mma: gl.constexpr):
    """fp32: 16-bit pieces x, times signs (`sign_bits` in shared memory), times a Hadamard matrix of
    32 `group` columns.

    offset: a vector in shared memory, of the dtype of x, that is added once there are signs if it `begins`;
    else anything. Tensor cores add it: to keep what it becomes would take twice the reads.
    """
    h = hadamard_16(x[0].dtype, mma)
    y = ()
    for j in gl.static_range(len(x)):
        start = _beginning(offset, h, begins, j, x[j], mma)
        y = y + (_mixed_by_bit_1(_mixed(_flipped(x[j], signs, j), h, start, mma)),)
    if group >= 2:
        y = _summed(y, 1)
    if group >= 4:
        y = _summed(y, 2)
    if group >= 8:
        y = _summed(y, 4)
    return y


# Products of rows with a vector, by the same left operand. Bit 1 of a column is a bit of its rows, so a right
# operand has the vector's columns without it and with it side by side (four times: mma.sync has 8), and of a
# row's products with the two one counts.


@gluon.jit
def as_right_operands(vector, columns: gl.constexpr, below: gl.constexpr, dtype: gl.constexpr):
    """Shared memory [columns // 4, 16]: a vector for `products_of_rows`, 8 rows for each piece. vector:
    pointer to fp32 numbers, of which there are `below`; dtype: that of rows, in which they are exact."""
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, columns // 4, gl.SliceLayout(1, layout))[:, None]
    k = gl.arange(0, 16, gl.SliceLayout(0, layout))[None, :]
    column = row // 8 * PIECE + (k // 2 % 4) * 8 + (k // 8) * 4 + (row % 2) * 2 + k % 2  # as `_operand_rows`
    numbers = gl.load(vector + column, mask=column < below, other=0.0).to(dtype)
    return in_shared(numbers, gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def products_of_rows(x, operands, mma: gl.constexpr):
    """fp32 [rows]: products of rows in 16-bit pieces with a vector (`as_right_operands`)."""
    ROWS: gl.constexpr = x[0].shape[0]
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    c = gl.zeros([2 * ROWS, 8], gl.float32, mma)
    for j in gl.static_range(len(x)):
        a = gl.convert_layout(_operand_rows(x[j]), left, assert_trivial=True)
        c = mma_v2(a, operands.slice(j * 8, 8).permute((1, 0)).load(right), c)
    c = c.reshape([ROWS // 8, 2, 8, 4, 2]).permute([0, 2, 3, 4, 1])  # 4: equal numbers, one in each lane
    without, with_bit_1 = gl.split(c)
    total = gl.split(without)[0] + gl.split(with_bit_1)[1]
    layout: gl.constexpr = gl.SliceLayout(1, x[0].type.layout)
    return gl.convert_layout(gl.max(total, 2).reshape([ROWS]), layout, assert_trivial=True)


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
