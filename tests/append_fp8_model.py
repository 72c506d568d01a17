"""What appending to an FP8 cache does, one number after the other in Python's floats; for small tests.

Shares no code with `tandem_attn.reference_decode`: e4m3 is a table of its 256 numbers, the factor of a block
is looked for from below, and tokens come one by one.
"""

import bisect
import math

import torch

E4M3 = torch.float8_e4m3fn
TABLE = sorted(
    (value, code)
    for code, value in enumerate(torch.arange(256, dtype=torch.uint8).view(E4M3).tolist())
    if not math.isnan(value) and code < 128
)
VALUES = [value for value, _ in TABLE]  # of positive numbers, from 0 to 448
BLOCK = 128


def nearest(x: float) -> float:
    """The e4m3 number nearest to x, of two the one with an even code; at most 448 in magnitude."""
    if math.isnan(x):
        return x
    size = min(abs(x), 448.0)
    above = bisect.bisect_left(VALUES, size)
    if VALUES[above] != size:
        low, high = VALUES[above - 1], VALUES[above]
        to_low, to_high = size - low, high - size
        above -= to_low < to_high or (to_low == to_high and TABLE[above - 1][1] % 2 == 0)
    return math.copysign(VALUES[above], x)


def single(x: float) -> float:
    """x as float32 holds it."""
    return torch.tensor(x, dtype=torch.float32).item()


def wanted_factor(amax: float) -> float:
    """The smallest power of two in units of which amax is at most 448; 1 for 0."""
    if math.isnan(amax) or math.isinf(amax) or amax == 0.0:
        return {0.0: 1.0}.get(amax, amax)
    exponent = -140
    while amax > 448.0 * 2.0**exponent:
        exponent += 1
    return 2.0**exponent


class Row:
    """One head of a row (or page) of a cache: numbers in units of the factors of their blocks."""

    def __init__(self, slots: int, dim: int, held=None, factors=None):
        self.held = held or [[math.nan] * dim for _ in range(slots)]
        self.factors = factors or [math.nan] * -(-slots // BLOCK)

    def append(self, first: int, tokens: list[list[float]]) -> None:
        """Put tokens of one call into slots from `first` on, all in one block."""
        block = first // BLOCK
        start = block * BLOCK
        magnitudes = [abs(x) for token in tokens for x in token]
        amax = math.nan if any(map(math.isnan, magnitudes)) else max(magnitudes)
        factor = wanted_factor(amax)
        if first > start:
            old = self.factors[block]
            if math.isnan(old) or old >= factor:
                factor = old
            if factor != old:
                ratio = single(old / factor)
                for slot in range(start, first):
                    self.held[slot] = [nearest(single(x * ratio)) for x in self.held[slot]]
        for i, token in enumerate(tokens):
            self.held[first + i] = [nearest(_quotient(x, factor)) for x in token]
        self.factors[block] = factor


def _quotient(x: float, factor: float) -> float:
    if math.isinf(factor):
        return math.nan if math.isinf(x) else math.copysign(0.0, x)
    return single(x / factor)
