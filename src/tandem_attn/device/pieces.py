"""Products with tiles of several pieces side by side, and what they add up to: a tuple of pieces.

wgmma and TMA want powers of two, so heads of 96 and 192 columns are three pieces; all others are one.
"""

from tandem_attn.device.gluon import gl, gluon, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def hidden(i: gl.constexpr):
    """i, as a number that the compiler cannot see through.

    Else it keeps every wgmma descriptor of an operand that stays in place in registers across the loop: 140
    to 560 bytes of spills, and wgmma serialised (C7512).
    """
    zero = gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    return zero + i


@gluon.jit
def zeros(rows: gl.constexpr, width: gl.constexpr, chunks: gl.constexpr, layout: gl.constexpr):
    """Accumulators of nothing yet."""
    x = ()
    for _ in gl.static_range(chunks):
        x = x + (gl.zeros([rows, width], gl.float32, layout),)
    return x


@gluon.jit
def start_product(stays, first: gl.constexpr, ring, i, layout: gl.constexpr):
    """Start the product of 64 rows that stay in shared memory, whose pieces begin with number `first`, and of
    fill i of a ring, transposed, once that has landed."""
    ring.wait(i)
    columns: gl.constexpr = ring.smem.shape[1]
    s = gl.zeros([64, columns], gl.float32, layout)
    for n in gl.static_range(ring.chunks):
        # one stage stays in place as well
        other = ring.smem.index(hidden(n)) if ring.num_stages == 1 else ring.chunk(i, n)
        mine = stays.index(hidden(first + n))
        s = warpgroup_mma(mine, other.permute((1, 0)), s, use_acc=n > 0, is_async=True)
    return s


@gluon.jit
def start_sum(p, ring, i, x, use_acc=True):
    """Start x += p times fill i of a ring, or where not use_acc x = ...; p: a left operand in registers."""
    started = ()
    for n in gl.static_range(ring.chunks):
        started = started + (warpgroup_mma(p, ring.chunk(i, n), x[n], use_acc=use_acc, is_async=True),)
    return started


@gluon.jit
def finished(started, chunks: gl.constexpr, pending: gl.constexpr = 0):
    """What `start_sum` started, once no more than `pending` later products are under way."""
    x = warpgroup_mma_wait(pending, deps=started)
    if chunks == 1:
        x = (x,)
    return x
