"""Online softmax in base 2 (arXiv 2407.08608, section 2.3; scores carry log2(e), so that exp2 is one
instruction).

Row sums are kept per thread, as [M, 4]: the four lanes that share a row meet only in the epilogue.
"""

from tandem_attn.device.gluon import gl, gluon

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def thread_sum(p):
    """[M, N] -> [M, 4]: each thread adds up its own columns of each of its rows."""
    M: gl.constexpr = p.shape[0]
    N: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(p.reshape([M, N // 8, 4, 2]), 3), 1)


@gluon.constexpr_function
def _largest_asm(n):
    """Of n floats of which pairs belong to two rows in turn: outputs 0 and 2 become the rows' maxima."""

    def chain(op, to, row):
        first, second, *rest = (f"${n + i + j}" for i in range(2 * row, n, 4) for j in (0, 1))
        return f"{op}.s32 {to}, {first}, {second};" + "".join(f"{op}.s32 {to}, {to}, {x};" for x in rest)

    return (
        f"{{ .reg .pred p, q; .reg .b32 a, b, c, d; {chain('max', 'a', 0)}{chain('max', 'b', 1)}"
        " min.s32 c, a, b; setp.lt.s32 p, c, 0; vote.sync.any.pred p, p, 0xffffffff; @!p bra.uni SKIP;"
        f" {chain('min', 'c', 0)}{chain('min', 'd', 1)} setp.lt.s32 p, a, 0; selp.b32 a, c, a, p;"
        " setp.lt.s32 q, b, 0; selp.b32 b, d, b, q; SKIP: mov.b32 $0, a; mov.b32 $2, b; }"
    )


@gluon.jit
def row_maximum(s):
    """[M, N] scores, a wgmma accumulator -> [M]: the largest of each row.

    Compared as integers, three at a time (an instruction that floats do not have on sm_90). That is right
    where there is a number that is not negative; where a thread has none, a warp takes the smallest integers
    instead: what is negative lies the other way round.
    """
    M: gl.constexpr = s.shape[0]
    N: gl.constexpr = s.shape[1]
    n: gl.constexpr = min(N // 2, 64)
    y = gl.inline_asm_elementwise(
        _largest_asm(n),
        _largest_constraints(n),
        [s.to(gl.int32, bitcast=True)],
        dtype=gl.int32,
        is_pure=False,
        pack=n,
    )
    x, _ = gl.split(y.to(gl.float32, bitcast=True).reshape([M, N // 8, 4, 2]))
    for _ in gl.static_range(_halvings(n // 4)):
        x, _ = gl.split(x.reshape([M, x.shape[1] // 2, 2, 4]).permute([0, 1, 3, 2]))
    largest = gl.max(gl.max(x, 1), 1)
    return gl.convert_layout(largest, gl.SliceLayout(1, s.type.layout), assert_trivial=True)


@gluon.constexpr_function
def _largest_constraints(n):
    return ",".join(["=r"] * n + ["r"] * n)


@gluon.constexpr_function
def _halvings(n):
    return n.bit_length() - 1


@gluon.jit
def rescale_factor(old_max, new_max, may_be_empty: gl.constexpr):
    """(offset, alpha) from row maxima in base 2: P is exp2(score - offset), what was summed up is worth
    alpha.

    Where the maximum stays alpha is 1, to the bit. `may_be_empty`: whether a row may have seen no key yet;
    its maximum is -inf, its alpha 0.
    """
    offset = new_max
    if may_be_empty:
        offset = gl.where(new_max == float("-inf"), 0.0, new_max)
    return offset, gl.exp2(old_max - offset)


@gluon.jit
def offset_and_rescale(old_max, new_max, scale_log2, may_be_empty: gl.constexpr):
    """(offset, alpha) as of `rescale_factor`, from maxima of raw scores; P is exp2(S * scale_log2 - offset).

    alpha has the difference first: exp2(old_max * scale_log2 - offset) would not be 1 where the maximum
    stays, but off by the rounding of the offset, in every block once more.
    """
    if may_be_empty:
        new_max = gl.where(new_max == float("-inf"), 0.0, new_max)
    return new_max * scale_log2, gl.exp2((old_max - new_max) * scale_log2)


@gluon.jit
def log_sum_exp(row_max, row_sum):
    """Natural log-sum-exp from a maximum in base 2; -inf for a row that saw no key.

    The fma is spelled out: the kernel holds this code twice, and if the compiler chose one contraction here
    and another there, the last bit of a row would tell which copy it met.
    """
    return gl.fma(row_max, LN2, gl.log2(row_sum) * LN2)


@gluon.jit
def soft_capped(s, inner_scale):
    """tanh(s * inner_scale), by exp2 and a division: exact to fp32 rounding, where tanh.approx keeps 11
    bits."""
    e = gl.exp2(s * (inner_scale * 2.8853900817779268))
    return 1.0 - 2.0 / (e + 1.0)


@gluon.jit
def pinned(x):
    """x, with a use (a store that never happens: alpha is never above 1e38) that ptxas can neither drop nor
    sink."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a; mov.b32 a, 0; setp.gt.f32 p, $1, 0f7F000000; @p st.shared.f32 [a], $1;"
        " mov.b32 $0, $1; }",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.constexpr_function
def _rescale_asm(n):
    moves = "".join(f"mov.b32 ${i}, ${n + i}; " for i in range(n))
    products = "".join(f"mul.f32 ${i}, ${i}, ${2 * n + i}; " for i in range(n))
    return (
        f"{{ .reg .pred p, q; setp.neu.f32 p, ${2 * n}, 0f3F800000; "
        f"setp.neu.f32 q, ${2 * n + 2}, 0f3F800000; "
        f"or.pred p, p, q; vote.sync.any.pred p, p, 0xffffffff; {moves}@!p bra.uni SKIP; {products}SKIP: }}"
    )


@gluon.constexpr_function
def _rescale_constraints(n):
    return ",".join(["=&f"] * n + ["f"] * 2 * n)


@gluon.jit
def rescaled(o, alpha, lazy: gl.constexpr):
    """o times alpha, by rows. Lazy: a warp whose alphas are all 1 branches over the products.

    The registers of a wgmma accumulator alternate in pairs between the two rows of a thread: alpha 0 and
    alpha 2 of one asm statement are all there is to look at.
    """
    if lazy:
        n: gl.constexpr = min(o.shape[1] // 2, 64)
        alphas, o = gl.broadcast(gl.expand_dims(alpha, 1), o)
        return gl.inline_asm_elementwise(
            _rescale_asm(n), _rescale_constraints(n), [o, alphas], dtype=gl.float32, is_pure=False, pack=n
        )
    else:
        return o * gl.expand_dims(alpha, 1)


@gluon.jit
def gradient_scale(scale_log2, inner_scale, softcap: gl.constexpr):
    """softmax_scale, by which dQ and dK are multiplied, out of what the scores of a kernel are scaled by."""
    scale = scale_log2 * LN2
    if softcap:
        scale = scale * inner_scale
    return scale


# Instead of -inf where scores are capped: its square is finite, its exponential 0 for any softcap over 1e-17.
CAPPED_AWAY = gl.constexpr(-1.8e19)


@gluon.jit
def recomputed(problem, s, lse, mask, down, across, masked: gl.constexpr, apply: gl.constexpr):
    """(P, P times the slope of the softcap) from scores and lse, base 2, which has a dimension of size 1.

    The tile begins at positions (down, across); `apply`: apply_mask or apply_mask_transposed.
    """
    c: gl.constexpr = problem.config.static
    hidden_score: gl.constexpr = CAPPED_AWAY.value if c.softcap else float("-inf")
    if c.softcap:
        s = soft_capped(s, problem.inner_scale)
    if masked:
        s = apply(mask, s, down, across, hidden_score)
    p = gl.exp2(s * problem.scale_log2 - lse)
    sloped = p
    if c.softcap:
        sloped = p * (1.0 - s * s)
    return p, sloped
