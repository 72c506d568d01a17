"""How wrong a result may be: twice as wrong as plain low-precision attention, and a rounding band.

The rule of FlashAttention-3's own tests: a constant tolerance would hide a wrong tile in a wide result or
fail a right one in a hard case. The oracle uses an explicit mask and float64, and shares no code with
`tandem_attn.reference`.
"""

from __future__ import annotations

import math

import torch

from tandem_attn.testing.inputs import Case, Inputs

MAX_SCORES = 2**26  # elements of one block of scores of the oracle
# absolute; with 16-bit inputs kernels approximate exponentials: torch's on a CPU is 5e-5 off where q is 0
LSE_BAND = 1.5e-4


def exact(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) in float64, shaped as the public function returns them; undeclared rows: 0 and -inf."""
    return _attention(case, inputs, torch.float64)


def low_precision(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) as plain torch in the case's dtype: scores, probabilities and output each rounded to it."""
    return _attention(case, inputs, case.dtype)


def assert_right(case: Case, inputs: Inputs, out, lse, factor: float = 2.0) -> None:
    """Raise AssertionError unless out and lse of a case are within budget; looks at declared rows only."""
    out_exact, lse_exact = exact(case, inputs)
    out_low, lse_low = low_precision(case, inputs)
    band = lse_band(lse_exact) if case.dtype.itemsize == 2 else None
    whole = slice(None)
    for rows in [of_q for of_q, _ in inputs.slices] if case.varlen else [whole]:
        at = (whole, rows) if case.varlen else whole
        assert_within_budget(out[rows], out_exact[rows], out_low[rows], f"{case.id} out", factor)
        assert_within_budget(lse[at], lse_exact[at], lse_low[at], f"{case.id} lse", factor, band)


def lse_band(lse_exact: torch.Tensor) -> float:
    """Absolute; far from 0 the spacing of float32 numbers is more than the band."""
    finite = lse_exact[lse_exact.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return LSE_BAND + 2.0 * torch.finfo(torch.float32).eps * largest


def explicit_mask(rows: torch.Tensor, seqlen_q: int, seqlen_k: int, window: tuple[int, int]) -> torch.Tensor:
    """(len(rows), seqlen_k), true where query i sees key j; its own position is i + seqlen_k - seqlen_q."""
    distance = torch.arange(seqlen_k, device=rows.device) - (rows + seqlen_k - seqlen_q)[:, None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if window[0] >= 0:
        seen &= distance >= -window[0]
    if window[1] >= 0:
        seen &= distance <= window[1]
    return seen


def _attention(case: Case, inputs: Inputs, dtype: torch.dtype):
    q = inputs.q
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.zeros(*q.shape[:-1], inputs.v.shape[-1], dtype=dtype, device=q.device)
    lse_shape = (q.shape[1], q.shape[0]) if case.varlen else (q.shape[0], q.shape[2], q.shape[1])
    lse = torch.full(lse_shape, -math.inf, dtype=lse_dtype, device=q.device)
    for i, (q_rows, k_rows, v_rows) in enumerate(inputs.sequences()):
        where = inputs.slices[i][0] if case.varlen else i
        out_view = out[where]
        lse_view = lse[:, where] if case.varlen else lse[where]
        for head in range(q.shape[-2]):
            kv_head = head // (q.shape[-2] // k_rows.shape[1])
            out_view[:, head], lse_view[head] = _one_head(
                q_rows[:, head], k_rows[:, kv_head], v_rows[:, kv_head], case, inputs.scale, dtype
            )
    return out, lse


def _one_head(q, k, v, case: Case, scale: float, dtype: torch.dtype):
    """q (rows, d), k (keys, d), v (keys, dv): out (rows, dv) and lse (rows)."""
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out, lse = [], []
    for rows in torch.arange(len(q), device=q.device).split(max(1, MAX_SCORES // max(len(k), 1))):
        for found, part in zip((out, lse), attend_rows(rows, q, k, v, case, scale), strict=True):
            found.append(part)
    if not out:
        return v.new_zeros(0, v.shape[1]), v.new_zeros(0, dtype=torch.promote_types(dtype, torch.float32))
    return torch.cat(out), torch.cat(lse)


def attend_rows(rows: torch.Tensor, q, k, v, case: Case, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (len(rows), dv), lse) of some query rows of one head: plain softmax attention in q's dtype."""
    scores = (q[rows] @ k.T) * scale
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores.masked_fill(~explicit_mask(rows, len(q), len(k), case.bounds), -math.inf)
    lse = torch.logsumexp(scores.to(torch.promote_types(q.dtype, torch.float32)), -1)
    probabilities = torch.softmax(scores, -1).masked_fill(lse.isneginf()[:, None], 0.0)
    return probabilities @ v, lse


def rounding_band(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """What merely storing and shifting the right values in `dtype` costs: 2 max |((x + 0.3) - 0.3) - x|."""
    if dtype == torch.float64:  # the oracle's own type: its sums are as rounded as anyone's
        return 64.0 * torch.finfo(dtype).eps * max(1.0, float(exact.abs().max()))
    stored = exact.to(dtype)
    return 2.0 * float((((stored + 0.3) - 0.3).double() - exact.double()).abs().max())


def assert_within_budget(
    actual: torch.Tensor,
    exact: torch.Tensor,
    low_precision: torch.Tensor,
    name: str = "out",
    factor: float = 2.0,
    band: float | None = None,
    mean_factor: float = 1.5,
) -> None:
    """Raise AssertionError, with numbers and the worst place, unless `actual` is within its budget.

    Worst error: at most `factor` times that of `low_precision`, plus `band` (default: `rounding_band`). Mean
    error: at most `mean_factor` times that of `low_precision`, plus half the band, so that a wrong tile
    cannot hide under one bad element. Infinities must agree exactly; a NaN that is not in `exact` always
    fails.
    """
    assert actual.shape == exact.shape == low_precision.shape, (
        f"{name}: shapes {tuple(actual.shape)}, {tuple(exact.shape)}, {tuple(low_precision.shape)}"
    )
    if actual.numel() == 0:
        return
    finite = exact.isfinite()
    same = torch.where(finite, actual.isfinite(), actual == exact)
    assert bool(same.all()), (
        f"{name}: {int((~same).sum())} of {same.numel()} elements NaN or infinite where they should not be, "
        f"or the reverse, first at {tuple(torch.nonzero(~same)[0].tolist())}"
    )
    if not bool(finite.any()):
        return
    target = torch.where(finite, exact.double(), 0.0)
    error = torch.where(finite, (actual.double() - target).abs(), 0.0)
    allowed = torch.where(finite, (low_precision.double() - target).abs(), 0.0)
    if band is None:
        band = rounding_band(target, actual.dtype)
    worst, limit = float(error.max()), factor * float(allowed.max()) + band
    place = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert worst <= limit, f"{name}: worst error {worst:.3e} at {place}, budget {limit:.3e} (band {band:.1e})"
    mean, mean_limit = float(error.mean()), mean_factor * float(allowed.mean()) + band / 2
    assert mean <= mean_limit, f"{name}: mean error {mean:.3e}, budget {mean_limit:.3e}"
