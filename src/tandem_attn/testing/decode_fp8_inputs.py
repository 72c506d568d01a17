"""Attention over an FP8 cache, for tests: a case of `decode_inputs.py` with its cache in e4m3, and an oracle.

Every slot that holds no declared key is NaN, and so is every factor of a block in which there is none. The
oracle takes the numbers of the cache as they are after the call, in float64, and shares no code with
`tandem_attn.reference_decode`; what appending leaves in the cache is for `assert_same_cache` and for tests.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import torch

from tandem_attn.spec import E4M3
from tandem_attn.spec_decode import SCALE_BLOCK
from tandem_attn.testing.budget import attend_rows
from tandem_attn.testing.decode_inputs import (
    DecodeCase,
    DecodeInputs,
    _turned,
    assert_outputs_right,
    make_decode,
    slots_of,
)

LARGEST = 448.0
EACH = ("block", "sequence")


@dataclasses.dataclass(frozen=True)
class Fp8Case:
    """A case whose cache is e4m3."""

    case: DecodeCase
    each: str = "block"  # what has a factor: EACH
    fp8_q: bool = False
    fp8_new: bool = False  # new keys and values are e4m3, too
    q_factors: bool = True  # with fp8_q: there is a q_descale

    def __post_init__(self) -> None:
        if self.each not in EACH:
            raise ValueError(f"each is {self.each!r}; see {EACH}")

    @property
    def id(self) -> str:
        """Short name for pytest."""
        q = f"-q8{'' if self.q_factors else 'by1'}" if self.fp8_q else ""
        return f"{self.each}{q}{'-new8' if self.fp8_new else ''}-{self.case.id}"


def make_fp8(fp8: Fp8Case, device="cpu", seed: int = 0) -> DecodeInputs:
    """Tensors of a case on a device. k_descale and v_descale of blocks are powers of two that just hold what
    is declared; of sequences any numbers, so small for some that their numbers saturate."""
    case, generator = fp8.case, torch.Generator().manual_seed(seed + 1)
    inputs, factors = make_decode(case, "cpu", seed), {}
    shape = (case.batch, case.kv_heads)
    for name in "kv":
        if fp8.each == "block":
            found = block_factors(inputs.tensors[f"{name}_cache"].float())
            for b, s in enumerate(inputs.sequences if case.new else ()):
                last = case.each("seqlens")[b] - 1  # padding, maybe; what is appended to must have a factor
                rows, slots = slots_of(case, s, range(max(last, 0), last + 1))
                found[rows, slots // SCALE_BLOCK] = found[rows, slots // SCALE_BLOCK].nan_to_num(2.0**-20)
        else:
            found = (torch.rand(shape, generator=generator) + 0.3) * 4.0 / LARGEST
        factors[name] = found
    if fp8.fp8_q:
        factors["q"] = (torch.rand(shape, generator=generator) + 0.5) / 64.0
        if not fp8.q_factors:
            factors["q"] = torch.ones(shape)
            inputs.tensors["q"] = 64.0 * inputs.tensors["q"]
    return narrowed(fp8, inputs, factors, device)


def narrowed(fp8: Fp8Case, inputs: DecodeInputs, factors: dict, device="cpu") -> DecodeInputs:
    """Inputs on a CPU, in e4m3 where the case says so, in units of these factors."""
    case, tensors, memory = fp8.case, dict(inputs.tensors), []
    for name in "kv":
        numbers = tensors[f"{name}_cache"].float()  # (rows, slots, heads, dim), NaN where nothing is declared
        if fp8.each == "block":
            each = factors[name].repeat_interleave(SCALE_BLOCK, 1)[:, : numbers.shape[1]]
        else:
            each = torch.full((*numbers.shape[:1], 1, case.kv_heads), math.nan)
            for b, s in enumerate(inputs.sequences):
                rows, _ = slots_of(case, s, range(case.each("seqlens")[b]))
                each[rows, 0] = factors[name][b]
        held = e4m3(numbers / each[..., None])
        if case.layout == "strided":
            held = held.transpose(1, 2).contiguous()
        memory.append(held.to(device))
        tensors[f"{name}_descale"] = factors[name]
        if fp8.fp8_new and name in tensors:
            tensors[name] = e4m3(64.0 * tensors[name].float())
    if fp8.fp8_q:
        of_heads = factors["q"].repeat_interleave(case.heads // case.kv_heads, 1)
        q = tensors["q"].float()
        for b, s in enumerate(inputs.sequences):
            q[b if s.rows is None else s.rows] /= of_heads[b][:, None]
        tensors["q"] = e4m3(q)
        if fp8.q_factors:
            tensors["q_descale"] = factors["q"]
    for name, x in tensors.items():
        tensors[name] = x.to(device) if isinstance(x, torch.Tensor) else x
    for name, x in zip(("k_cache", "v_cache"), memory, strict=True):
        tensors[name] = x.transpose(1, 2) if case.layout == "strided" else x
    for s in inputs.sequences:
        for field in ("q", "k", "v", "k_new", "v_new"):
            setattr(s, field, getattr(s, field).to(device))
    return DecodeInputs(tensors, inputs.options, inputs.sequences, tuple(memory), ())


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """To the nearest, or 448; NaN stays."""
    return x.float().clamp(-LARGEST, LARGEST).to(E4M3)


def block_factors(numbers: torch.Tensor) -> torch.Tensor:
    """(rows, blocks, heads): for blocks of slots of (rows, slots, heads, dim) the smallest power of two in
    units of which all fit, NaN where all are NaN."""
    rows, slots = numbers.shape[:2]
    blocks = -(-slots // SCALE_BLOCK)
    padded = numbers.new_full((rows, blocks * SCALE_BLOCK, *numbers.shape[2:]), math.nan)
    padded[:, :slots] = numbers
    amax = padded.unflatten(1, (blocks, SCALE_BLOCK)).abs().nan_to_num(-1.0).amax((2, 4))
    _, exponent = torch.frexp(amax.double() / LARGEST)  # in [1/2, 1) times 2 ** exponent
    least = torch.exp2(exponent.double() - 1)
    least = torch.where(amax.double() / LARGEST > least, 2 * least, least)
    return torch.where(amax < 0, math.nan, torch.where(amax == 0, 1.0, least)).float()


def restored(inputs: DecodeInputs, case: DecodeCase, name: str, b: int, slots: range) -> torch.Tensor:
    """float64 (slots, heads, dim): what the cache holds of sequence b."""
    rows, within = slots_of(case, inputs.sequences[b], slots)
    device = inputs.tensors["q"].device
    rows, within = rows.to(device), within.to(device)
    factors = inputs.tensors[f"{name}_descale"]
    each = factors[rows, within // SCALE_BLOCK] if factors.dim() == 3 else factors[b]
    return inputs.tensors[f"{name}_cache"][rows, within].double() * each.double()[..., None]


def assert_fp8_right(fp8: Fp8Case, inputs: DecodeInputs, out, lse, factor: float = 2.0) -> None:
    """Raise AssertionError unless out and lse are within budget of attention over what the cache holds."""
    case = fp8.case
    assert out.shape == (*inputs.tensors["q"].shape[:-1], case.dim_v)
    assert out.dtype == (torch.bfloat16 if fp8.fp8_q else case.dtype)
    oracle = functools.partial(_oracle, fp8, inputs)
    assert_outputs_right(fp8.id, inputs, out, lse, oracle, factor, bands=True)


def _oracle(fp8: Fp8Case, inputs: DecodeInputs, dtype: torch.dtype):
    """(out, lse) of every head of every sequence, in this dtype."""
    case, outs, lses = fp8.case, [], []
    scale = inputs.options.get("softmax_scale") or case.head_dim**-0.5
    firsts, advances = case.rotary_seqlens or case.each("seqlens"), int(case.bounds != (-1, -1))
    group = case.heads // case.kv_heads
    for b, s in enumerate(inputs.sequences):
        count = torch.arange(len(s.q), device=s.q.device)
        if fp8.fp8_q:
            q = inputs.tensors["q"][b if s.rows is None else s.rows].double()
            factors = inputs.tensors.get("q_descale")
            if factors is not None:
                q = q * factors[b].double().repeat_interleave(group)[:, None]
            q = q.to(dtype)
        else:
            q = _turned(case, inputs, s.q, firsts[b] + count * advances, dtype)
        pad = case.leftpad[b] if case.leftpad else 0
        k, v = (restored(inputs, case, name, b, range(pad, case.keys[b])).to(dtype) for name in "kv")
        for head in range(case.heads):
            found = attend_rows(count, q[:, head], k[:, head // group], v[:, head // group], case, scale)
            outs.append(found[0])
            lses.append(found[1])
    return outs, lses


# The cache alone


def on_cpu(inputs: DecodeInputs) -> DecodeInputs:
    """A copy whose tensors are on the CPU and share no memory with it."""
    tensors = {n: x.cpu().clone() if isinstance(x, torch.Tensor) else x for n, x in inputs.tensors.items()}
    return DecodeInputs(tensors, dict(inputs.options), copy.deepcopy(inputs.sequences), (), ())


def assert_same_cache(found: dict, expected: dict, what: str = "") -> None:
    """Raise AssertionError unless caches and factors are the same in every bit, but for those of NaN."""
    for name in ("k_cache", "v_cache", "k_descale", "v_descale"):
        a, b = found[name].cpu(), expected[name].cpu()
        same = (a.float() == b.float()) & (a.float().signbit() == b.float().signbit())
        same |= a.isnan() & b.isnan()
        wrong = (~same).nonzero()
        assert not len(wrong), (
            f"{what} {name}: {len(wrong)} of {same.numel()} differ, first at {tuple(wrong[0].tolist())}: "
            f"{a[tuple(wrong[0])].item()}, expected {b[tuple(wrong[0])].item()}"
        )
