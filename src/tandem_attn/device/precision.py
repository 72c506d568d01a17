"""How probabilities travel from the softmax of one block to the matrix product of the next.

Loop-carried 16-bit values are split into one register each and repacked on every turn (64 PRMT at 128 keys);
packed in pairs into int32 they cross the loop for free.
"""

from tandem_attn.device.gluon import gl, gluon


@gluon.jit
def pack_probabilities(p, dtype: gl.constexpr):
    """fp32 [M, N] -> int32 [M, N // 2], each two neighbours rounded to dtype."""
    M: gl.constexpr = p.shape[0]
    N: gl.constexpr = p.shape[1]
    a, b = gl.split(p.reshape([M, N // 2, 2]))
    if dtype == gl.bfloat16:
        asm: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    else:
        asm: gl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(asm, "=r,f,f", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpack_operand(x, dtype: gl.constexpr, o_layout: gl.constexpr):
    """The packed probabilities as left operand of P V. Call it before the first wgmma of an iteration:
    between two of them ptxas would serialise all (C7513)."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1] * 2
    y = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r", [gl.join(x, x)], dtype=dtype.value, is_pure=False, pack=2
    )
    return gl.convert_layout(y.reshape([M, N]), gl.DotOperandLayout(0, o_layout, 2), assert_trivial=True)


@gluon.jit
def product16(a, b, dtype: gl.constexpr):
    """a * b in 16 bits, two at a time."""
    if dtype == gl.bfloat16:
        asm: gl.constexpr = "mul.rn.bf16x2 $0, $1, $2;"
    else:
        asm: gl.constexpr = "mul.rn.f16x2 $0, $1, $2;"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=dtype.value, is_pure=True, pack=2)
