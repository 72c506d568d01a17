"""16-bit rows of q and k in registers: loaded in pieces of 32 columns, turned by their position, rotated.

`config`: a `RowsConfig` (kernels/config_quantize.py), which says how pieces lie.
"""

from tandem_attn.device.gluon import gl, gluon
from tandem_attn.device.rotation import (
    PIECE,
    half_rotated,
    in_shared,
    other_half,
    piece_of,
    sign_bits,
    turn_halves,
    turn_pairs,
    turn_two,
)


@gluon.jit
def kept(there, column, first: gl.constexpr, dim: gl.constexpr):
    """Mask of a piece that begins with column `first`: rows that are there, columns below dim."""
    keep = there[:, None]
    if first + column.shape[0] > dim:
        keep = keep & (column < dim - first)[None, :]
    return keep


@gluon.jit
def load_rows(x, there, rotary, position, config: gl.constexpr):
    """16-bit pieces of rows of q or k, turned by their position. x: [rows, 1] pointers."""
    column = gl.arange(0, PIECE, gl.SliceLayout(0, config.layout))
    pieces = ()
    for j in gl.static_range(config.pieces):
        keep = kept(there, column, j * 32, config.head_dim)
        pieces = pieces + (gl.load(x + column[None, :] + j * 32, mask=keep, other=0.0),)
    if config.rotary_dim > 0:
        pieces = _turned(pieces, x, there, rotary, rotary.angles(position, there), config)
    return pieces


@gluon.jit
def _turned(pieces, x, there, rotary, angle, config: gl.constexpr):
    """Pieces after rotary embedding."""
    half: gl.constexpr = config.rotary_dim // 2
    far: gl.constexpr = half // 32  # pieces to the other column, if they are whole
    turned = ()
    if half % 32 == 0 and not config.interleaved:
        others = ()
        for j in gl.static_range(far):
            a, b = turn_two(pieces[j], pieces[j + far], rotary.cos, rotary.sin, angle, j * 32)
            turned, others = turned + (a,), others + (b,)
        turned = turned + others
    else:
        for j in gl.static_range((config.rotary_dim + 31) // 32):
            if config.interleaved:
                y = turn_pairs(pieces[j], rotary.cos, rotary.sin, angle, j * 32, half)
            else:
                y = turn_halves(pieces[j], x, rotary.cos, rotary.sin, angle, there, j * 32, half)
            turned = turned + (y,)
    for j in gl.static_range(len(turned), config.pieces):
        turned = turned + (pieces[j],)
    return turned


@gluon.jit
def columns_of(ptr, config: gl.constexpr):
    """fp32 [columns]: one number for each column of q and k."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    column = gl.arange(0, config.columns, layout)
    return gl.load(ptr + column, mask=column < config.head_dim, other=0.0)


@gluon.jit
def half_way(pieces, signs, start, begins: gl.constexpr, config: gl.constexpr):
    """16-bit pieces -> fp32, times signs and half of the Hadamard matrix if there is rotation. start: what is
    added to columns there, in shared memory, if it `begins`; else anything."""
    if config.rotate:
        return half_rotated(pieces, signs, start, begins, config.mma)
    else:
        out = ()
        for j in gl.static_range(config.pieces):
            x = pieces[j].to(gl.float32)
            if begins:
                x += piece_of(start, j, config.layout)
            out = out + (x,)
        return out


@gluon.jit
def all_the_way(pieces, config: gl.constexpr):
    """What is `half_way`, times the rest of the matrix: 1 / norm too large."""
    if config.rotate:
        return other_half(pieces, config.group)
    else:
        return pieces


@gluon.jit
def products_of_rows(pieces, vector, config: gl.constexpr):
    """[rows]: products of rows with a vector in shared memory, four lanes' parts of which meet at the end."""
    rows: gl.constexpr = pieces[0].shape[0]
    total = gl.sum((pieces[0] * piece_of(vector, 0, config.layout)).reshape([rows, 4, PIECE // 4]), 2)
    for j in gl.static_range(1, config.pieces):
        product = pieces[j] * piece_of(vector, j, config.layout)
        total += gl.sum(product.reshape([rows, 4, PIECE // 4]), 2)
    return gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, config.layout), assert_trivial=True)


@gluon.jit
def signs_of(signs, config: gl.constexpr):
    """Of the columns, if there is rotation; else anything."""
    return sign_bits(columns_of(signs, config)) if config.rotate else signs


@gluon.jit
def signs_in_shared(signs, config: gl.constexpr):
    """`signs_of`, for `half_way`."""
    return in_shared(signs) if config.rotate else signs
