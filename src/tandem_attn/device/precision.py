"""Element types of operands: how scores and sums are descaled, and how probabilities travel from the softmax
of one block to the matrix product of the next.

Loop-carried 8- and 16-bit values are split into one register each and repacked on every turn (64 PRMT at 128
keys); packed into int32 they cross the loop for free.

`Plain` and `Descaled` are what kernels take as `Precision`. O is held in the unit of the block of V that was
added last: from block to block it is rescaled anyway, and a unit that changes costs no more than a factor.
"""

from tandem_attn.device.gluon import base_value, gl, gluon, policy
from tandem_attn.device.softmax import LN2


@policy()
class Plain:
    """16-bit operands, which are the numbers themselves."""

    scale: gl.tensor

    @gluon.jit
    def create(scale, num_heads, num_kv_heads, descales, q_blocks, k_blocks, block_step):
        return Plain(scale)

    @gluon.jit
    def of(self, sequence, head, kv_head, m_start):
        """For the query rows from m_start on of one head."""
        return self

    @gluon.jit
    def scores(self, n_block):
        """Factor of the raw scores of a key block."""
        return self.scale

    @gluon.jit
    def unit(self, n_block):
        """V's unit in a block of keys."""
        return gl.to_tensor(1.0)

    @gluon.jit
    def in_unit(self, alpha, before, n_block):
        """alpha, times what O in the unit of block `before` is worth in that of n_block."""
        return alpha

    @gluon.jit
    def shifted(self, lse, place, there):
        """The log-sum-exp of the question asked, from that of the operands."""
        return lse

    @gluon.jit
    def restored(self, o, sees, sequence, kv_head, first: gl.constexpr, columns):
        """The output of the question asked, from that of the operands: columns from `first` on, of which
        there are `columns` in all. sees: 1.0, or 0.0 in rows without a key, which stay 0."""
        return o


@policy()
class Descaled:
    """e4m3 operands with a float32 factor per block of 64 query rows and of 128 keys of a head.

    Factors are (sequence, head, block) in memory; those of packed sequences (head, block), each sequence
    beginning with a block of its own. With block_step 0 a head has one factor, (sequence, head) in any case.
    V may come without a constant per channel: rows of P sum to one, so that it is added to the output.
    """

    scale: gl.tensor  # times q's factor, once `of` has been asked
    q: gl.tensor  # pointers to factors; after `of`, to those of the first block of the head
    k: gl.tensor
    v: gl.tensor
    lse_shift: base_value  # None, or a pointer to what lse is short of per row, in units of the scale
    v_mean: base_value  # None, or a pointer to what V is short of: (sequence, KV head, channel)
    num_heads: gl.tensor
    num_kv_heads: gl.tensor
    q_blocks: gl.tensor  # factors per head
    k_blocks: gl.tensor
    block_step: gl.tensor

    @gluon.jit
    def create(scale, num_heads, num_kv_heads, descales, q_blocks, k_blocks, block_step):
        return Descaled(scale, descales[0], descales[1], descales[2], descales[3], descales[4], num_heads,
                        num_kv_heads, q_blocks, k_blocks, block_step)  # fmt: skip

    @gluon.jit
    def of(self, sequence, head, kv_head, m_start):
        # the last consumer's rows may all be past the end, where there is no factor
        m_block = gl.minimum(m_start, gl.maximum(sequence.seqlen_q - 1, 0)) // 64
        batch = sequence.descale_batch(self.block_step)
        of_q = (batch * self.num_heads + head) * self.q_blocks
        of_q += (sequence.first_block("q") * 2 + m_block) * self.block_step
        of_k = (batch * self.num_kv_heads + kv_head) * self.k_blocks
        of_k += sequence.first_block("k") * self.block_step
        # without keys there is no factor, and masked scores must not be NaN: that of q will do
        k = sequence.if_it_has_keys(self.k + of_k, self.q + of_q)
        v = sequence.if_it_has_keys(self.v + of_k, self.q + of_q)
        return Descaled(self.scale * gl.load(self.q + of_q), self.q, k, v, self.lse_shift, self.v_mean,
                        self.num_heads, self.num_kv_heads, self.q_blocks, self.k_blocks,
                        self.block_step)  # fmt: skip

    @gluon.jit
    def scores(self, n_block):
        return self.scale * gl.load(self.k + n_block * self.block_step)

    @gluon.jit
    def unit(self, n_block):
        return gl.load(self.v + n_block * self.block_step)

    @gluon.jit
    def in_unit(self, alpha, before, n_block):
        return alpha * (self.unit(before) / self.unit(n_block))

    @gluon.jit
    def shifted(self, lse, place, there):
        if self.lse_shift is None:
            return lse
        else:
            return lse + gl.load(self.lse_shift + place, mask=there, other=0.0) * (self.scale * LN2)

    @gluon.jit
    def restored(self, o, sees, sequence, kv_head, first: gl.constexpr, columns):
        if self.v_mean is None:
            return o
        else:
            layout: gl.constexpr = o.type.layout
            column = first + gl.arange(0, o.shape[1], gl.SliceLayout(0, layout))
            start = (sequence.batch.to(gl.int64) * self.num_kv_heads + kv_head) * columns
            mean = gl.load(self.v_mean + start + column, mask=column < columns, other=0.0)
            # an fma by name: kernels hold this twice, and both copies shall round alike
            return gl.fma(gl.broadcast(mean[None, :], o)[0], gl.broadcast(sees, o)[0], o)


@gluon.jit
def pack_probabilities(p, dtype: gl.constexpr):
    """fp32 [M, N] -> int32, rounded to dtype: [M, N // 2] pairs of neighbours, or for e4m3 [M, N // 16, 4]
    quads of keys 2t, 2t + 1, 2t + 8 and 2t + 9 of each 16.

    Those four are what a thread holds of a row of scores; as left operand it would hold four neighbours. So
    V comes with its keys in this order.
    """
    M: gl.constexpr = p.shape[0]
    N: gl.constexpr = p.shape[1]
    if dtype == gl.float8e4nv:
        even, odd = gl.split(p.reshape([M, N // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)))
        a, c = gl.split(even)
        b, d = gl.split(odd)
        return gl.inline_asm_elementwise(
            "{ .reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1;"
            " cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; mov.b32 $0, {lo, hi}; }",
            "=r,f,f,f,f",
            [a, b, c, d],
            dtype=gl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        a, b = gl.split(p.reshape([M, N // 2, 2]))
        if dtype == gl.bfloat16:
            asm: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
        else:
            asm: gl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
        return gl.inline_asm_elementwise(asm, "=r,f,f", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.constexpr_function
def _quad_layout(rows, chunks):
    """Of [rows, chunks, 4, 2, 2]: a register's four bytes first, then row + 8, then the chunks of 16 keys."""
    registers = [[0, 0, 0, 0, 1], [0, 0, 0, 1, 0], [8, 0, 0, 0, 0]]
    registers += [[0, 2**i, 0, 0, 0] for i in range(chunks.bit_length() - 1)]
    lanes = [[0, 0, 1, 0, 0], [0, 0, 2, 0, 0], [1, 0, 0, 0, 0], [2, 0, 0, 0, 0], [4, 0, 0, 0, 0]]
    warps = [[16, 0, 0, 0, 0], [32, 0, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [rows, chunks, 4, 2, 2])


@gluon.jit
def unpack_operand(x, dtype: gl.constexpr, o_layout: gl.constexpr):
    """The packed probabilities as left operand of P V. Call it before the first wgmma of an iteration:
    between two of them ptxas would serialise all (C7513)."""
    M: gl.constexpr = x.shape[0]
    if dtype == gl.float8e4nv:
        C: gl.constexpr = x.shape[1]
        N: gl.constexpr = C * 16
        spread = gl.join(gl.join(x, x), gl.join(x, x))
        quads = gl.convert_layout(spread, _quad_layout(M, C), assert_trivial=True)
        y = gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r,r,r", [quads], dtype=gl.float8e4nv, is_pure=False, pack=4
        )
    else:
        N: gl.constexpr = x.shape[1] * 2
        y = gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r", [gl.join(x, x)], dtype=dtype.value, is_pure=False, pack=2
        )
    operand: gl.constexpr = gl.DotOperandLayout(0, o_layout, 32 // dtype.primitive_bitwidth)
    return gl.convert_layout(y.reshape([M, N]), operand, assert_trivial=True)


@gluon.jit
def product16(a, b, dtype: gl.constexpr):
    """a * b in 16 bits, two at a time."""
    if dtype == gl.bfloat16:
        asm: gl.constexpr = "mul.rn.bf16x2 $0, $1, $2;"
    else:
        asm: gl.constexpr = "mul.rn.f16x2 $0, $1, $2;"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=dtype.value, is_pure=True, pack=2)
