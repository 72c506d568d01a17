"""Division by numbers that the host knows, without dividing.

Triton's // by a run-time number is a chain of some 40 instructions; finding a tile takes five of them, and at
512 tokens that is 4% of a whole launch (head_dim 64, causal, H200, 2026-11-25). A product with a number of at
most 32 bits and a shift give the same quotient (Granlund and Montgomery, "Division by invariant integers
using multiplication", PLDI 1994).
"""

from tandem_attn.device.gluon import gl, gluon


def division_magic(divisor: int) -> int:
    """What `divided` takes for this divisor (1 to 2**31 - 1): the multiplier, and 31 + the shift 32 bits
    above."""
    bits = (divisor - 1).bit_length()  # 2 ** bits >= divisor
    return ((1 << 31 + bits) // divisor + 1) | (31 + bits) << 32


@gluon.jit
def divided(x, magic):
    """x // divisor for 0 <= x < 2**31: the multiplier exceeds 2**shift / divisor by so little that x times
    the excess stays below one part in `divisor`."""
    return (x.to(gl.int64) * (magic & 0xFFFFFFFF) >> (magic >> 32)).to(gl.int32)
