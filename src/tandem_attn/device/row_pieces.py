"""16-bit rows of q and k: loaded in pieces of 32 columns, turned by their position, rotated in registers.

`config`: a `RowsConfig` (kernels/config_quantize.py), which says how pieces lie.
"""

from tandem_attn.device.gluon import async_copy, async_load, gl, gluon, thread_barrier
from tandem_attn.device.rotation import (
    PIECE,
    in_shared,
    piece_of,
    rotated,
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
def _to_shared(x, keep, layout: gl.constexpr):
    """Start a copy of numbers, 0 where not `keep`, to shared memory, to be read more than once. Each copy has
    memory of its own, or the compiler would put barriers between them."""
    shared = gl.allocate_shared_memory(x.dtype.element_ty, x.shape, layout)
    keep, _ = gl.broadcast(keep, x)
    async_load(shared, x, mask=keep)
    return shared


@gluon.jit
def ask_for_pieces(x, there, column, count: gl.constexpr, dim: gl.constexpr, copies: gl.constexpr = None):
    """Start to load `count` pieces of rows, 0 past column dim, to registers; or, if `copies` is a layout, to
    shared memory so, by one group of copies. x: pointers to piece 0; column: of that."""
    width: gl.constexpr = column.shape[0]
    pieces = ()
    for j in gl.static_range(count):
        at, keep = x + j * width, kept(there, column, j * width, dim)
        if copies is None:
            pieces = pieces + (gl.load(at, mask=keep, other=0),)
        else:
            pieces = pieces + (_to_shared(at, keep, copies),)
    if copies is not None:
        async_copy.commit_group()
    return pieces


@gluon.jit
def loaded(shared, first: gl.constexpr, count: gl.constexpr, layout: gl.constexpr):
    """`count` pieces of those in shared memory."""
    pieces = ()
    for j in gl.static_range(first, first + count):
        pieces = pieces + (shared[j].load(layout),)
    return pieces


@gluon.jit
def arrived(asked, group: gl.constexpr, groups: gl.constexpr, layout: gl.constexpr):
    """The pieces of a group of copies, of as many groups asked for in order, once they are there."""
    async_copy.wait_group(groups - 1 - group)
    thread_barrier()
    count: gl.constexpr = len(asked) // groups
    return loaded(asked, group * count, count, layout)


@gluon.jit
def _pieces(x, there, copies: gl.constexpr, config: gl.constexpr):
    """16-bit pieces of rows of q or k: `ask_for_pieces`. x: [rows, 1] pointers."""
    column = gl.arange(0, PIECE, gl.SliceLayout(0, config.layout))
    return ask_for_pieces(x + column[None, :], there, column, config.pieces, config.head_dim, copies)


@gluon.jit
def load_rows(x, there, rotary, position, config: gl.constexpr):
    """16-bit pieces of rows of q or k, turned by their position. x: [rows, 1] pointers."""
    return _turned(_pieces(x, there, None, config), x, there, rotary, position, config)


@gluon.jit
def ask_for_rows(side, place, head, config: gl.constexpr):
    """Start to load a tile's rows of q or k: what `rows_of_part` gives 16-bit pieces of. A tile that is one
    part comes to registers, the parts of others to shared memory."""
    asked = ()
    for at in gl.static_range(config.parts):
        part = place.part(at * config.rows)
        _, there = part.rows(config.rows, gl.SliceLayout(1, config.layout))
        x = side.rows(part, head, config.rows, config.layout)
        asked = asked + _pieces(x, there, config.row_copies, config)
    return asked


@gluon.jit
def rows_of_part(asked, at: gl.constexpr, side, place, head, rotary, before, config: gl.constexpr):
    """(16-bit pieces of a part, number `at`, turned by their position; whether rows are there). place: of the
    part; before: position of row 0 of the sequence."""
    pieces = asked
    if config.parts > 1:
        pieces = arrived(asked, at, config.parts, config.layout)
    row, there = place.rows(config.rows, gl.SliceLayout(1, config.layout))
    x = side.rows(place, head, config.rows, config.layout)
    return _turned(pieces, x, there, rotary, row + before, config), there


@gluon.jit
def put_aside(pieces):
    """fp32 pieces in shared memory, for `loaded` by the same threads."""
    shared = ()
    for j in gl.static_range(len(pieces)):
        shared = shared + (in_shared(pieces[j], gl.SwizzledSharedLayout(4, 1, 8, [1, 0])),)
    return shared


@gluon.jit
def _turned(pieces, x, there, rotary, position, config: gl.constexpr):
    """Pieces after rotary embedding, if there is any."""
    if config.rotary_dim == 0:
        return pieces
    else:
        return _turned_by(pieces, x, there, rotary, rotary.angles(position, there), config)


@gluon.jit
def _turned_by(pieces, x, there, rotary, angle, config: gl.constexpr):
    """Pieces turned by angles: where rows of the tables begin."""
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
def rotated_rows(pieces, signs, offset, begins: gl.constexpr, config: gl.constexpr):
    """16-bit pieces -> fp32, times signs and the Hadamard matrix if there is rotation: 1 / norm too large.
    offset: what is added to rows once they have signs if it `begins`, in shared memory; else anything."""
    if config.rotate:
        return rotated(pieces, signs, offset, begins, config.group, config.mma)
    else:
        out = ()
        for j in gl.static_range(config.pieces):
            x = pieces[j].to(gl.float32)
            if begins:
                x += piece_of(offset, j, config.layout).to(gl.float32)
            out = out + (x,)
        return out


@gluon.jit
def signs_of(signs, config: gl.constexpr):
    """Of the columns, if there is rotation; else anything."""
    return sign_bits(columns_of(signs, config)) if config.rotate else signs


@gluon.jit
def signs_in_shared(signs, config: gl.constexpr):
    """`signs_of`, for `rotated_rows`."""
    return in_shared(signs) if config.rotate else signs
