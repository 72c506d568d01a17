"""Tiles of V with keys last, four of them in an int32, as wgmma reads V beside FP8 probabilities.

Position 4t + 2h + e of each 16 holds key 8h + 2t + e: the int32 number 4g + t of a channel is made of keys
16g + 2t, + 1, + 8, + 9. A thread has these four rows, so that it needs nobody else's to make one.
"""

from tandem_attn.device.gluon import gl, gluon

KEYS = gl.constexpr(128)  # of a tile
WORDS = gl.constexpr(32)  # int32 of a channel in a tile


@gluon.jit
def four_keys(x):
    """[KEYS, n] -> four tensors [8, 4, n]: keys 2t, 2t + 1, 2t + 8, 2t + 9 of the 16 of each group."""
    n: gl.constexpr = x.shape[1]
    even, odd = gl.split(x.reshape([8, 2, 4, 2, n]).permute([0, 2, 4, 1, 3]))  # [8, 4, n, 2]
    a, c = gl.split(even)
    b, d = gl.split(odd)
    return a, b, c, d


@gluon.jit
def pack_four(x):
    """fp32 [KEYS, n] -> int32 [WORDS, n] of e4m3, saturated."""
    n: gl.constexpr = x.shape[1]
    a, b, c, d = four_keys(x)
    asm: gl.constexpr = """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
    }"""
    y = gl.inline_asm_elementwise(asm, "=r,f,f,f,f", [a, b, c, d], dtype=gl.int32, is_pure=True, pack=1)
    return y.reshape([WORDS, n])


@gluon.jit
def as_new(x):
    """x of 16 bits, of which the compiler does not know that it is the same: else it would keep what it made
    of it in fp32, in twice the registers."""
    asm: gl.constexpr = "mov.b32 $0, $1;"
    return gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@gluon.jit
def _bytes_of(x, y, which: gl.constexpr):
    """Four of the eight bytes of x and y; `which`: PTX that takes them."""
    return gl.inline_asm_elementwise(which, "=r,r,r", [x, y], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def regroup_bytes(x):
    """int32 [KEYS, n] of four channels each -> int32 [WORDS, 4n] of four keys each."""
    n: gl.constexpr = x.shape[1]
    a, b, c, d = four_keys(x)
    ab = _bytes_of(a, b, "prmt.b32 $0, $1, $2, 0x5140;")  # channels 0 and 1, a then b of each
    cd = _bytes_of(c, d, "prmt.b32 $0, $1, $2, 0x5140;")
    ab2 = _bytes_of(a, b, "prmt.b32 $0, $1, $2, 0x7362;")  # 2 and 3
    cd2 = _bytes_of(c, d, "prmt.b32 $0, $1, $2, 0x7362;")
    even = gl.join(
        _bytes_of(ab, cd, "prmt.b32 $0, $1, $2, 0x5410;"), _bytes_of(ab2, cd2, "prmt.b32 $0, $1, $2, 0x5410;")
    )
    odd = gl.join(
        _bytes_of(ab, cd, "prmt.b32 $0, $1, $2, 0x7632;"), _bytes_of(ab2, cd2, "prmt.b32 $0, $1, $2, 0x7632;")
    )
    return gl.join(even, odd).reshape([WORDS, 4 * n])  # [8, 4, n, 2, 2]: bits of the channel


@gluon.jit
def store_words(ptr, words, first: gl.constexpr, dim: gl.constexpr, stride, layout: gl.constexpr):
    """Write int32 [WORDS, n] of channels first to first + n. ptr: of channel 0; stride: int32 from channel to
    channel."""
    n: gl.constexpr = words.shape[1]
    y = gl.convert_layout(words.permute([1, 0]), layout)
    channel = first + gl.arange(0, n, gl.SliceLayout(1, layout))
    word = gl.arange(0, WORDS, gl.SliceLayout(0, layout))
    to = ptr + (channel.to(gl.int64) * stride)[:, None] + word[None, :]
    if first + n > dim:
        gl.store(to, y, mask=(channel < dim)[:, None])
    else:
        gl.store(to, y)
