"""Is a result right? Sampled, because exact attention of the large cases takes longer than measuring them.

Some sequences, heads and blocks of query rows against all keys, in float64, by the rule of
`tandem_attn.testing`: at most twice the error of the same maths in the case's own precision, and a rounding
band. Rows at the beginning and the end are the ones that masks and ragged tiles get wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from tandem_attn.bench import UserError
from tandem_attn.testing import Case, Inputs, assert_within_budget
from tandem_attn.testing.budget import LSE_BAND, attend_rows

ROWS = 128  # of a sampled block


@dataclasses.dataclass(frozen=True)
class Sample:
    """Query rows of one head of one sequence: (out, lse) in float64, and in the case's own precision."""

    sequence: int
    head: int
    rows: range
    exact: tuple[torch.Tensor, torch.Tensor]
    low: tuple[torch.Tensor, torch.Tensor]

    @property
    def name(self) -> str:
        """For messages."""
        return f"sequence {self.sequence}, head {self.head}, rows {self.rows.start} on"


def require_asserts() -> None:
    """`assert_within_budget` is made of assert statements."""
    if not __debug__:
        raise UserError("python -O removes the checks; run without it, or with --no-check")


def first_middle_last(count: int) -> list[int]:
    """Up to three indices below `count`."""
    return sorted({0, count // 2, count - 1}) if count else []


class Oracle:
    """The right answer to a case, in samples. Computed when first asked for, for all providers."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case, self.inputs = case, inputs

    def what_is_wrong(self, out: torch.Tensor, lse: torch.Tensor | None) -> str:
        """What is wrong with a result, in one line; empty if it passes.

        out (batch, seqlen_q, heads, head_dim_v) or packed (total, heads, head_dim_v); lse as the public
        function returns it, or None where a provider has none.
        """
        try:
            self._check_forms(out, lse)
            for sample in self.samples:
                self._check_sample(sample, out, lse)
        except AssertionError as error:
            return str(error).partition("\n")[0]
        return ""

    @functools.cached_property
    def samples(self) -> list[Sample]:
        """Blocks of rows of some heads of some sequences."""
        case = self.case
        places = [
            (sequence, head, rows)
            for sequence in _sequences(case)
            for head in first_middle_last(case.heads)
            for rows in _blocks(case.rows[sequence])
        ]
        return [self._sample(*place) for place in places]

    def _sample(self, sequence: int, head: int, rows: range) -> Sample:
        case, inputs = self.case, self.inputs
        q, k, v = one_head(inputs, sequence, head, head // (case.heads // case.kv_heads))
        i = torch.arange(rows.start, rows.stop, device=q.device)
        exact = attend_rows(i, q.double(), k.double(), v.double(), case, inputs.scale)
        return Sample(sequence, head, rows, exact, attend_rows(i, q, k, v, case, inputs.scale))

    def _check_forms(self, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        form = self.inputs.q.shape
        expected = (*form[:-1], self.case.dim_v)
        assert tuple(out.shape) == expected, f"out is of shape {tuple(out.shape)}, not {expected}"
        assert out.dtype == self.case.dtype, f"out is {out.dtype}, not {self.case.dtype}"
        if lse is not None:
            expected = (form[1], form[0]) if self.case.varlen else (form[0], form[2], form[1])
            assert tuple(lse.shape) == expected, f"lse is of shape {tuple(lse.shape)}, not {expected}"

    def found(
        self, sample: Sample, out: torch.Tensor, lse: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What a result says of a sample: (rows, head_dim_v) of out, (rows) of lse."""
        start = self.inputs.slices[sample.sequence][0].start if self.case.varlen else 0
        rows = slice(start + sample.rows.start, start + sample.rows.stop)
        if not self.case.varlen:
            out, lse = out[sample.sequence], None if lse is None else lse[sample.sequence]
        return out[rows, sample.head], None if lse is None else lse[sample.head, rows]

    def _check_sample(self, sample: Sample, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        (exact_out, exact_lse), (low_out, low_lse) = sample.exact, sample.low
        bands = (None, None)
        if self.case.dtype.itemsize == 2:
            # The usual band does not shrink with the values: in means over thousands of keys, all near 0,
            # wrong values would hide in it. This one is two roundings of the largest.
            bands = (torch.finfo(self.case.dtype).eps * float(exact_out.abs().max()), LSE_BAND)
        out, lse = self.found(sample, out, lse)
        assert_within_budget(out, exact_out, low_out, f"out of {sample.name}", band=bands[0])
        if lse is not None:
            assert_within_budget(lse, exact_lse, low_lse, f"lse of {sample.name}", band=bands[1])


def _sequences(case: Case) -> list[int]:
    """First and last; of packed ones the shortest and the longest too."""
    count = len(case.rows)
    by_length = sorted(range(count), key=lambda i: case.rows[i])
    return sorted({0, count - 1, by_length[0], by_length[-1]})


def _blocks(rows: int) -> list[range]:
    starts = {max(0, min(ROWS * i, rows - ROWS)) for i in first_middle_last(math.ceil(rows / ROWS))}
    return [range(start, min(start + ROWS, rows)) for start in sorted(starts)]


def one_head(inputs: Inputs, sequence: int, head: int, kv_head: int) -> tuple[torch.Tensor, ...]:
    """(q, k, v), each (rows, dim), of one head of one sequence."""
    if inputs.slices:
        rows, keys = inputs.slices[sequence]
        return inputs.q[rows, head], inputs.k[keys, kv_head], inputs.v[keys, kv_head]
    return inputs.q[sequence, :, head], inputs.k[sequence, :, kv_head], inputs.v[sequence, :, kv_head]
