"""Are gradients right? All of dq, dk and dv, a block of rows of a head at a time, against float64.

What they should be comes from differentiating plain attention, a block of scores at a time. The rule is that
of `tandem_attn.testing`, for norms instead of single elements: the distance of a block from the exact one is
at most twice that of the same maths in the case's own precision, and what rounding the right values costs.
For bfloat16 that is 1 to 2% of a block's norm; right results are 0.2 to 0.6% away. A norm over everything
would hide a wrong tile; the largest error of a single element says little, since gradients differ in size by
orders of magnitude between rows. Rows are those of all sequences, one after the other: a block may hold
several short ones, of which each alone is too few numbers for such a rule.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import torch

from tandem_attn.bench.cases import GradientInputs
from tandem_attn.testing import Case
from tandem_attn.testing.budget import attend_rows

NAMES = ("dq", "dk", "dv")
ROWS = 128  # of a block, up to twice as many
MAX_SCORES = 2**24  # elements of one block of scores: a dozen such tensors in float64 are 1.5 GiB
FACTOR = 2.0
# blocks smaller than this share of what is usual count as that: where a gradient is 0, rounding is not
SMALLEST = 0.01

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class GradientOracle:
    """The right gradients of a case. Computed when first asked for, for all providers."""

    def __init__(self, case: Case, inputs: GradientInputs) -> None:
        self.case, self.inputs = case, inputs

    def what_is_wrong(self, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> str:
        """What is wrong with gradients, shaped as q, k and v, in one line; empty if they pass."""
        try:
            self._check_forms((dq, dk, dv))
            for name, grad, exact, limits in zip(NAMES, (dq, dk, dv), self.exact, self.limits, strict=True):
                _check_blocks(name, grad, exact, limits)
        except AssertionError as error:
            return str(error).partition("\n")[0]
        return ""

    @functools.cached_property
    def exact(self) -> Gradients:
        """(dq, dk, dv) in float64."""
        return self._gradients(torch.float64)

    @functools.cached_property
    def limits(self) -> Gradients:
        """How far each (block, head) of (dq, dk, dv) may be off."""
        low = self._gradients(self.case.dtype)
        return tuple(self._limits(*pair) for pair in zip(self.exact, low, strict=True))

    def _check_forms(self, grads: Gradients) -> None:
        for name, grad, leaf in zip(NAMES, grads, self.inputs.leaves, strict=True):
            assert grad.shape == leaf.shape, (
                f"{name} is of shape {tuple(grad.shape)}, not {tuple(leaf.shape)}"
            )
            assert grad.dtype == self.case.dtype, f"{name} is {grad.dtype}, not {self.case.dtype}"

    def _gradients(self, dtype: torch.dtype) -> Gradients:
        """By plain attention in `dtype`, summed over blocks and heads in float64, and rounded to it."""
        given, group = self.inputs, self.case.heads // self.case.kv_heads
        total = [torch.zeros_like(x, dtype=torch.float64) for x in given.leaves]
        views = dataclasses.replace(given, q=total[0], k=total[1], v=total[2]).sequences()
        douts = dataclasses.replace(given, q=given.dout).sequences()
        for tensors, grads, (dout, *_) in zip(given.sequences(), views, douts, strict=True):
            for head in range(self.case.heads):
                places = (head, head // group, head // group)
                one = [x[:, i].detach() for x, i in zip(tensors, places, strict=True)]
                found = _of_one_head(self.case, given.scale, one, dout[:, head], dtype)
                for grad, part, i in zip(grads, found, places, strict=True):
                    grad[:, i] += part
        return tuple(x.to(dtype) for x in total)

    def _limits(self, exact: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        usual = max(float(x.square().mean().sqrt()) for x in self.exact)
        least = [SMALLEST * usual * (len(part) * part.shape[-1]) ** 0.5 for part in _blocks(exact)]
        least = torch.tensor(least, dtype=exact.dtype, device=exact.device)[:, None]
        rounding = torch.finfo(self.case.dtype).eps / 2 * torch.maximum(_norms(exact), least)
        return FACTOR * _norms(low.double() - exact) + rounding


def _of_one_head(case: Case, scale: float, tensors, dout: torch.Tensor, dtype: torch.dtype):
    """Gradients of q (rows, dim), k and v (keys, dim): of blocks of rows in `dtype`, summed in float64."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
    grads = [torch.zeros_like(x, dtype=torch.float64) for x in tensors]
    for rows in torch.arange(len(dout), device=dout.device).split(max(1, MAX_SCORES // len(leaves[1]))):
        with torch.enable_grad():
            out, _ = attend_rows(rows, *leaves, case, scale)
        for grad, part in zip(grads, torch.autograd.grad(out, leaves, dout[rows].to(dtype)), strict=True):
            grad += part
    return grads


def _check_blocks(name: str, grad: torch.Tensor, exact: torch.Tensor, limits: torch.Tensor) -> None:
    distances = _norms(grad.double() - exact)
    excess = (distances - limits).nan_to_num(nan=torch.inf)
    block, head = divmod(int(excess.argmax()), excess.shape[1])
    start = list(itertools.accumulate(map(len, _blocks(exact)), initial=0))[block]
    norm, off, limit = (float(x[block, head]) for x in (_norms(exact), distances, limits))
    assert float(excess.max()) <= 0.0, (
        f"{name} of head {head}, rows {start} on: {off:.3e} off, budget {limit:.3e}, norm {norm:.3e}"
    )


def _blocks(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(rows, heads, dim) of each block: ROWS rows and up to twice as many."""
    x = x.flatten(0, -3)
    return x.tensor_split(max(1, len(x) // ROWS))


def _norms(x: torch.Tensor) -> torch.Tensor:
    """(blocks, heads)"""
    return torch.stack([torch.linalg.vector_norm(part, dim=(0, 2)) for part in _blocks(x)])
