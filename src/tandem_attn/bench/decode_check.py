"""Is a result of decoding right? Every head of every sequence, against float32 and by our error budget.

Plain attention from the very tensors that are timed: at most twice the error of the same maths in the case's
own precision, and a rounding band (see `check`).
"""

from __future__ import annotations

import functools
import math

import torch

from tandem_attn.bench.caches import Caches
from tandem_attn.testing import assert_within_budget
from tandem_attn.testing.budget import explicit_mask, lse_band
from tandem_attn.testing.decode_inputs import DecodeCase


class DecodeOracle:
    """The right answer to a case. Computed when first asked for, for all providers."""

    def __init__(self, case: DecodeCase, caches: Caches) -> None:
        self.case, self.caches = case, caches

    def what_is_wrong(self, out: torch.Tensor, lse: torch.Tensor | None) -> str:
        """What is wrong with a result, in one line; empty if it passes.

        out (batch, tokens, heads, head_dim_v); lse (batch, heads, tokens), or None where there is none.
        """
        try:
            self._check_forms(out, lse)
            for i, (exact, low) in enumerate(self.answers):
                self._check_sequence(i, exact, low, out[i], None if lse is None else lse[i])
        except AssertionError as error:
            return str(error).partition("\n")[0]
        return ""

    @functools.cached_property
    def answers(self) -> list[tuple]:
        """For each sequence (out, lse) in float32, and in the case's own precision."""
        found = []
        for i, length in enumerate(self.case.keys):
            given = (self.caches.q[i], *self.caches.keys_of(i, length))
            found.append(tuple(_attend(self.case, *given, kind) for kind in (torch.float32, self.case.dtype)))
        return found

    def _check_forms(self, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        batch, tokens, heads, _ = self.caches.q.shape
        forms = {"out": (out, (batch, tokens, heads, self.case.dim_v)), "lse": (lse, (batch, heads, tokens))}
        for name, (x, expected) in forms.items():
            if x is not None:
                assert tuple(x.shape) == expected, f"{name} is of shape {tuple(x.shape)}, not {expected}"
        assert out.dtype == self.case.dtype, f"out is {out.dtype}, not {self.case.dtype}"

    def _check_sequence(self, i: int, exact: tuple, low: tuple, out, lse) -> None:
        # the usual band does not shrink with the values; see check.Oracle
        band = torch.finfo(self.case.dtype).eps * float(exact[0].abs().max())
        assert_within_budget(out, exact[0], low[0], f"out of sequence {i}", band=band)
        if lse is not None:
            assert_within_budget(lse, exact[1], low[1], f"lse of sequence {i}", band=lse_band(exact[1]))


def _attend(case: DecodeCase, q, k, v, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (tokens, heads, dim), lse (heads, tokens)) of a sequence: plain softmax attention in `dtype`."""
    tokens, keys, group = len(q), len(k), case.heads // case.kv_heads
    q = q.to(dtype).unflatten(1, (case.kv_heads, group)).permute(1, 2, 0, 3).flatten(1, 2)
    scores = (q @ k.to(dtype).permute(1, 2, 0)) * case.head_dim**-0.5  # (kv_heads, group * tokens, keys)
    seen = explicit_mask(torch.arange(tokens, device=q.device), tokens, keys, case.bounds)
    scores = scores.masked_fill_(~seen.repeat(group, 1), -math.inf)
    lse = scores.float().logsumexp(-1).view(case.heads, tokens)
    out = torch.softmax(scores, -1) @ v.to(dtype).transpose(0, 1)
    return out.view(case.heads, tokens, case.dim_v).transpose(0, 1), lse
