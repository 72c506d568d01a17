"""Is an FP8 result right? Against float64 attention over the numbers that the FP8 tensors stand for.

Quantization is no error here: what is left is e4m3 probabilities, 16-bit output and the sums of FP8 tensor
cores, which all are of the size of the result. So limits are relative, unlike the budget of `check`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tandem_attn.bench.check import Oracle, Sample, one_head
from tandem_attn.testing import Case, Inputs
from tandem_attn.testing.budget import attend_rows

# RMSE over RMS. Rounding to e4m3 is 0.026 of what is rounded, on average over a binade; at worst 1 / 16.
# Emulated, attention over 512 to 128k keys has 0.026 or less, its worst row 0.04.
MOST_ERROR = 0.05
MOST_ROW_ERROR = 0.1  # of one row; a foreign row has 1.4
# Of the log-sum-exp, whose sums are not rounded to e4m3; absolute. A scale that is 4% wrong gives 0.04.
MOST_LSE_RMSE, MOST_LSE_ERROR = 0.01, 0.05


class Fp8Oracle(Oracle):
    """The right answer to a case, in samples, `dequantized` telling (q, k, v) when first asked for."""

    def __init__(
        self, case: Case, inputs: Inputs, dequantized: Callable[[], tuple[torch.Tensor, ...]]
    ) -> None:
        super().__init__(case, inputs)
        self.dequantized = dequantized
        self._numbers: Inputs | None = None

    def _sample(self, sequence: int, head: int, rows: range) -> Sample:
        if self._numbers is None:
            self._numbers = Inputs(*self.dequantized(), self.inputs.kwargs, self.inputs.slices)
        kv_head = head // (self.case.heads // self.case.kv_heads)
        q, k, v = (x.double() for x in one_head(self._numbers, sequence, head, kv_head))
        i = torch.arange(rows.start, rows.stop, device=q.device)
        exact = attend_rows(i, q, k, v, self.case, self.inputs.scale)
        return Sample(sequence, head, rows, exact, exact)

    def _check_sample(self, sample: Sample, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        out, lse = self.found(sample, out, lse)
        exact_out, exact_lse = sample.exact
        require_near(out, exact_out, f"out of {sample.name}")
        if lse is not None:
            error = lse.double() - exact_lse.double()
            found, worst = rms(error), float(error.abs().max())
            assert found <= MOST_LSE_RMSE and worst <= MOST_LSE_ERROR, (
                f"lse of {sample.name}: RMSE {found:.3g}, worst error {worst:.3g}, "
                f"limits {MOST_LSE_RMSE} and {MOST_LSE_ERROR}"
            )


def require_near(out: torch.Tensor, exact: torch.Tensor, name: str) -> None:
    """Raise AssertionError unless out (..., dim) is as near as FP8 probabilities allow. NaN is not."""
    error = out.double() - exact.double()
    found = rms(error) / rms(exact)
    assert found <= MOST_ERROR, f"{name}: RMSE is {found:.3g} of the RMS, limit {MOST_ERROR}"
    rows = error.square().mean(-1).sqrt() / exact.double().square().mean(-1).sqrt()
    worst = float(rows.max())
    assert worst <= MOST_ROW_ERROR, f"{name}: RMSE of a row is {worst:.3g} of its RMS, limit {MOST_ROW_ERROR}"


def rms(x: torch.Tensor) -> float:
    """Root of the mean square, in float64."""
    return float(x.double().square().mean().sqrt())
