"""What the elements of a KV cache are: numbers of 16 bits, or e4m3 with factors.

`SameNumbers`: those that the tensor cores multiply. `E4m3Numbers`: one byte each, with float32 factors for
K and V per block of a cache row (or page) and KV head, or per sequence and head. Hopper's e4m3 products would
want V transposed and all queries in e4m3; so numbers become float16, exactly, on the way to the tensor cores,
and one kernel serves queries of every type. The cache is seen as 16-bit words of two neighbouring columns:
copies, swizzles and ldmatrix know nothing of bytes, and a tile of words turns into two operands, one of its
even and one of its odd columns. Queries are split in the same way; outputs are joined.
"""

from tandem_attn.device.gluon import (
    async_load,
    gl,
    gluon,
    policy,
    reinterpreted,
)


@gluon.jit
def chunk_of(smem, stage, c: gl.constexpr, chunks: gl.constexpr, width: gl.constexpr, config: gl.constexpr):
    """Chunk c of a stage, [tile_n, width]: its pieces lie one after the other."""
    if config.pieces == 1:
        return smem.index(stage * chunks + c)
    else:
        shape: gl.constexpr = [config.stages_held * chunks, config.tile_n, width]
        layout: gl.constexpr = config.tile_layout(width)
        return reinterpreted(smem, smem.dtype, shape, layout).index(stage * chunks + c)


@gluon.jit
def even_and_odd(words):
    """int16 words, each two e4m3 numbers -> (float16 of the lower bytes, float16 of the upper bytes)."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; .reg .b16 even, odd; prmt.b32 t, $2, $2, 0x3120; mov.b32 {even, odd}, t;"
        " cvt.rn.f16x2.e4m3x2 $0, even; cvt.rn.f16x2.e4m3x2 $1, odd; }",
        "=r,=r,r",
        [words],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )


@policy(parts=1)
class SameNumbers:
    """A cache of the type that is multiplied."""

    config: gl.constexpr

    @gluon.jit
    def operands(self, x):
        """The operands that a chunk of a tile makes: it is one."""
        return (x,)


@policy(parts=2)
class E4m3Numbers:
    """A cache of words of two e4m3 numbers, and factors that are copied beside its tiles."""

    k: gl.tensor  # pointers to factors, of this KV head
    v: gl.tensor
    k_strides: gl.tuple  # elements from row to row, and from block to block
    v_strides: gl.tuple
    factors: gl.shared_memory_descriptor  # fp32 [2 * stages, tile_n]: those of K and of V of each key
    config: gl.constexpr

    @gluon.jit
    def _address(self, x, strides, row, slot):
        of = row.to(gl.int64) * strides[0]
        if self.config.descale_block > 0:
            of += (slot.to(gl.uint32) // self.config.descale_block).to(gl.int64) * strides[1]
        return x + of

    @gluon.jit
    def copy(self, stage, at, row, slot, keep):
        """Start to copy the factors of a tile, 0 for keys that are not there. row, slot, keep [tile_n]: of
        each key."""
        if self.config.descale_block == 0:
            row = slot * 0 + at.batch
        async_load(self.factors.index(stage * 2), self._address(self.k, self.k_strides, row, slot), mask=keep)
        async_load(
            self.factors.index(stage * 2 + 1), self._address(self.v, self.v_strides, row, slot), mask=keep
        )

    @gluon.jit
    def operands(self, x):
        return even_and_odd(x)


@gluon.jit
def normalised_q(x):
    """(float32 rows x times powers of two, so that float16 holds them; the factor of each row)."""
    exponent = gl.max(gl.abs(x), 1).to(gl.int32, bitcast=True) >> 23
    exponent = gl.minimum(gl.maximum(exponent, 20), 254)
    up = ((268 - exponent) << 23).to(gl.float32, bitcast=True)  # the largest comes to 2**14 and more
    return x * up[:, None], ((exponent - 14) << 23).to(gl.float32, bitcast=True)
