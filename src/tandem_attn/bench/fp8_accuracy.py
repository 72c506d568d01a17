"""How much accuracy FP8 leaves: the FlashAttention-3 paper's table, error over length, a needle.

Errors are against float64 of the inputs before they are rounded to 16 bits, so that fp16 has the error that
any 16-bit model has. Every FP8 result is also compared with float64 of what its tensors stand for: a kernel
that is wrong gives no figure.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

import tandem_attn
from tandem_attn.bench import fp8_speed, tflops
from tandem_attn.bench.cases import BenchCase, flops
from tandem_attn.bench.fp8_cases import NO_MEANS, ROWS, LengthCase, Means, NeedleCase, RecipeCase, Row
from tandem_attn.bench.fp8_check import require_near, rms
from tandem_attn.bench.fp8_speed import BF16, OURS, TOTAL
from tandem_attn.bench.options import Settings
from tandem_attn.bench.providers import reason_of
from tandem_attn.testing import Case, Inputs, exact, low_precision

# arXiv 2407.08608, section 4.3: N(0, 1) + N(0, 100) * Bernoulli(0.001), the second with standard deviation 10
OUTLIER, OUTLIERS = 10.0, 0.001
# The needle's key is so many times its query. Of 128k standard normal keys of head_dim 128, with scores of
# variance 1, the exponentials sum to e^12.3, and the needle's is e^22.6.
NEEDLE_STRENGTH = 2.0


def answer(row: Row, q, k, v) -> tuple[torch.Tensor, tandem_attn.Fp8Tensors | None]:
    """(out, FP8 tensors if there are any) of float64 q, k and v (batch, rows, heads, dim)."""
    q, k, v = (x.to(row.dtype) for x in (q, k, v))
    if row.standard:
        sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
        return low_precision(Case(*sizes, dtype=row.dtype), Inputs(q, k, v, {}, []))[0], None
    if row.recipe is None:
        return tandem_attn.flash_attn_func(q, k, v), None
    tensors = tandem_attn.quantize_qkv(q, k, v, row.recipe)
    return tandem_attn.flash_attn_quantized_func(tensors), tensors


def checked_answer(row: Row, case: Case, numbers: tuple, checked: bool) -> torch.Tensor:
    """The output of a row, float64; AssertionError if it is not attention over its tensors."""
    out, tensors = answer(row, *numbers)
    if checked and tensors is not None:
        require_near(out, _attention(case, tensors.dequantized()), "out")
    if not bool(out.isfinite().all()):
        raise AssertionError("out: NaN or infinite numbers")
    return out.double()


def _attention(case: Case, numbers) -> torch.Tensor:
    """Float64 attention, full, in blocks of rows."""
    return exact(case, Inputs(*numbers, {}, []))[0]


def _normal(case: Case, device: torch.device, seed: int) -> tuple[torch.Generator, list[torch.Tensor]]:
    """A generator, and float64 standard normal q, k and v that it gave."""
    generator = torch.Generator(device).manual_seed(seed)
    sides = ((case.seqlen_q, case.heads), (case.seqlen_k, case.kv_heads), (case.seqlen_k, case.kv_heads))
    shapes = [(case.batch, rows, heads, case.head_dim) for rows, heads in sides]
    more = dict(generator=generator, dtype=torch.float64, device=device)
    return generator, [torch.randn(shape, **more) for shape in shapes]


def _caught(measure, *args) -> dict:
    """Its result; or "wrong" and no number; or "reason" why there is neither."""
    try:
        return measure(*args)
    except AssertionError as error:
        return {"wrong": str(error).partition("\n")[0]}
    except Exception as error:  # one that fails must not take the others with it
        return {"reason": reason_of(error)}


# The paper's table


@functools.lru_cache(maxsize=1)  # the rows of a table come one after the other
def outliers(
    case: Case, device: torch.device, means: Means = NO_MEANS, seed: int = 0
) -> tuple[tuple, torch.Tensor]:
    """Float64 (q, k, v) with outliers, K and V around such means, and attention over them."""
    generator, numbers = _normal(case, device, seed)
    more = dict(generator=generator, dtype=torch.float64, device=device)
    for x in numbers:
        x += OUTLIER * torch.randn(x.shape, **more) * (torch.rand(x.shape, **more) < OUTLIERS)
    for x, deviation in zip(numbers[1:], (means.k, means.v), strict=True):
        x += deviation * torch.randn((1, 1, *x.shape[2:]), **more)
    return tuple(numbers), _attention(case, numbers)


def measure_recipe(one: RecipeCase, device: torch.device, settings: Settings) -> dict:
    """A row of the paper's table as a JSON object, with its speed at the same shape on normal inputs; where
    there are means, without either the paper's figure or speed, which does not depend on them."""
    row = ROWS[one.row]
    case = dataclasses.replace(one.case, dtype=row.dtype)
    of_paper = one.means == NO_MEANS
    record = {"kind": "recipe", "group": one.group, "id": one.id, "row": one.row}
    record |= {"paper": row.paper if of_paper else None, "means": dataclasses.asdict(one.means)}
    record |= {"recipe": "" if row.recipe is None else str(row.recipe), "flops": flops(case)}
    record["question"] = tflops.question(BenchCase(one.group, one.id, case))
    found = {"error": _caught(_error, row, one, device, settings.checked)}
    if of_paper and not row.standard:
        found |= _caught_speed(row, case, device, settings)
    return record | {"results": found}


def _error(row: Row, one: RecipeCase, device: torch.device, checked: bool) -> dict:
    numbers, right = outliers(one.case, device, one.means)
    return errors(checked_answer(row, one.case, numbers, checked), right)


def errors(out: torch.Tensor, right: torch.Tensor) -> dict:
    """Root mean square error, that over the RMS of what is right, and the worst."""
    apart = out - right
    return {"rmse": rms(apart), "relative": rms(apart) / rms(right), "worst": float(apart.abs().max())}


def _caught_speed(row: Row, case: Case, device: torch.device, settings: Settings) -> dict:
    """TFLOPS of attention alone, and in FP8 of quantization and attention."""
    names = {"speed": BF16} if row.recipe is None else {"speed": OURS, "speed_total": TOTAL}
    try:
        inputs = fp8_speed.make_inputs(case, device, row.recipe)
        present = [fp8_speed.BY_NAME[name] for name in names.values()]
        found = fp8_speed.results(case, flops(case), inputs, present, settings)
    except Exception as error:  # out of memory, or a recipe that cannot be had
        return {what: {"reason": reason_of(error)} for what in names}
    return {what: found[name] for what, name in names.items()}


# Error over length


def measure_length(one: LengthCase, device: torch.device, settings: Settings) -> dict:
    """Relative RMSE of each way of answering at a length, as a JSON object."""
    record = {"kind": "length", "group": one.group, "id": one.id, "keys": one.case.seqlen_k}
    record["queries"] = one.case.seqlen_q
    record["question"] = tflops.question(BenchCase(one.group, one.id, one.case))
    try:
        _, numbers = _normal(one.case, device, one.case.seqlen_k)
        right = _attention(one.case, numbers)
    except Exception as error:  # out of memory
        return record | {"results": {name: {"reason": reason_of(error)} for name in one.rows}}

    def measured(row: Row) -> dict:
        return errors(checked_answer(row, one.case, numbers, settings.checked), right)

    return record | {"results": {name: _caught(measured, ROWS[name]) for name in one.rows}}


# A needle in a haystack


def haystack(
    case: Case, place: int, device: torch.device, seed: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Float64 q, k and v with the needle at key `place`, which the last query looks for, and the needle's V
    (batch, heads, dim): the answer."""
    _, (q, k, v) = _normal(case, device, seed)
    q /= q.square().mean(-1, keepdim=True).sqrt()  # no head's query matches better than another's
    k[:, place] = NEEDLE_STRENGTH * q[:, -1]
    return [q, k, v], v[:, place].clone()


def measure_needle(one: NeedleCase, device: torch.device, settings: Settings) -> dict:
    """How much of the answer each way lets through, as a JSON object."""
    record = {"kind": "needle", "group": one.group, "id": one.id, "keys": one.case.seqlen_k}
    record |= {"place": one.place, "exact": None}
    record["question"] = tflops.question(BenchCase(one.group, one.id, one.case))
    try:
        numbers, needle = haystack(one.case, one.place, device)
        record["exact"] = through(_attention(one.case, numbers), needle)
    except Exception as error:  # out of memory
        return record | {"results": {name: {"reason": reason_of(error)} for name in one.rows}}

    def measured(row: Row) -> dict:
        return through(checked_answer(row, one.case, numbers, settings.checked), needle)

    return record | {"results": {name: _caught(measured, ROWS[name]) for name in one.rows}}


def through(out: torch.Tensor, needle: torch.Tensor) -> dict:
    """How much of the needle is in the last row of out (batch, rows, heads, dim): the mean over heads, and
    that of the head farthest from 1. 1.0 is all of it, 0.0 nothing."""
    parts = (out[:, -1] * needle).sum(-1) / needle.square().sum(-1)
    parts = parts.flatten().tolist()
    return {
        "through": math.fsum(parts) / len(parts),
        "farthest": max(parts, key=lambda part: abs(part - 1.0)),
    }
