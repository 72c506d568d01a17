"""Compile the kernels that make FP8 for sm_90a on a machine without a GPU, and read what came out.

About half a second of one core a kernel. Which kernels: a plan is called on tensors without memory, and what
it would launch is written down.

    python -m tandem_attn.testing.compile_quant [--jobs N] [--out reports.json] [NAME ...]

compiles all of QUESTIONS (or the kernels named) and prints a line for each; with another Triton first on
PYTHONPATH, with that one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from tandem_attn.kernels import launch_quantize
from tandem_attn.quant import E4M3, Fp8Recipe
from tandem_attn.spec import Lengths
from tandem_attn.spec_quant import RotaryTables, quantize_spec, transpose_spec
from tandem_attn.testing.compile import always_compile, command_line, disassembled, explained
from tandem_attn.testing.compile_decode import Typed

FP16 = torch.float16
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    E4M3: "*fp8e4nv",
}
NEVER_SPECIALIZED = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")

QUESTIONS: dict[str, dict] = {
    "64": dict(head_dim=64),
    "96": dict(head_dim=96),
    "128": dict(),
    "192": dict(head_dim=192),
    "192x128": dict(head_dim=192, head_dim_v=128),
    "256": dict(head_dim=256),
    "256_fp16_packed": dict(head_dim=256, dtype=FP16, packed=True),
    "32x64": dict(head_dim=32, head_dim_v=64),
    "64x256": dict(head_dim=64, head_dim_v=256),
    "80_plain": dict(head_dim=80, rotate=False, smooth_k=False),
    "64_plain": dict(head_dim=64, rotate=False, smooth_k=False),
    "128_plain": dict(rotate=False, smooth_k=False),
    "64_means": dict(head_dim=64, smooth_v=True),
    "128_means": dict(smooth_v=True),
    "192_means": dict(head_dim=192, smooth_v=True),
    "256_means": dict(head_dim=256, smooth_v=True),
    "128_means_fp16_packed": dict(dtype=FP16, packed=True, smooth_v=True),
    "128_means_head": dict(granularity="head", smooth_v=True),
    "64x256_smooth_v": dict(head_dim=64, head_dim_v=256, rotate=False, smooth_k=False, smooth_v=True),
    "64_rotated": dict(head_dim=64, smooth_k=False),
    "96_rotated_fp16": dict(head_dim=96, smooth_k=False, dtype=FP16),
    "128_rotated": dict(smooth_k=False),
    "128_rotated_fp16": dict(smooth_k=False, dtype=FP16),
    "192_rotated": dict(head_dim=192, smooth_k=False),
    "256_rotated": dict(head_dim=256, smooth_k=False),
    "128_smooth": dict(rotate=False),
    "128_packed": dict(packed=True),
    "128_packed_rotated": dict(packed=True, smooth_k=False),
    "64_packed_used": dict(packed=True, used=True, head_dim=64),
    "192_packed_used": dict(packed=True, used=True, head_dim=192),
    "128_head": dict(granularity="head"),
    "128_tensor_packed": dict(granularity="tensor", packed=True, smooth_k=False),
    "256_head": dict(granularity="head", head_dim=256),
    "128_short": dict(rows=999),
    "128_head_short": dict(granularity="head", rows=999),
    "128_rotary": dict(rotary_dim=128),
    "128_rotary_packed": dict(rotary_dim=64, packed=True, used=True),
    "128_pairs": dict(rotary_dim=128, interleaved=True),
    "192_rotary": dict(rotary_dim=64, head_dim=192, head_dim_v=128),
    "256_pairs": dict(rotary_dim=256, head_dim=256, interleaved=True, dtype=FP16),
}
VALUES: dict[str, dict] = {f"v_{d}": dict(head_dim_v=d) for d in (64, 96, 128, 192, 256)}
VALUES["v_128_packed"] = dict(head_dim_v=128, packed=True)
VALUES["v_80_packed"] = dict(head_dim_v=80, packed=True, used=True)


class Launch(NamedTuple):
    """What a plan hands to a kernel."""

    kernel: object
    tensors: tuple  # of tensors and tuples of them
    numbers: tuple  # the config last
    options: dict


@dataclasses.dataclass(frozen=True)
class QuantReport:
    """What became of a kernel."""

    seconds: float  # of one core
    spill_bytes: int  # loads and stores of registers that did not fit
    stack_bytes: int
    registers: int
    shared_memory: int  # bytes
    stores: tuple[str, ...]  # widths of stores to global memory: "128" bits and the like, each once
    local: int  # instructions that touch local memory

    @classmethod
    def from_json(cls, fields: dict) -> QuantReport:
        """The inverse of vars() and JSON."""
        return cls(**{**fields, "stores": tuple(fields["stores"])})


class _Recorded:
    """In place of a plan's kernels."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def launch(self, kernel, programs, stream, tensors, numbers, options) -> None:
        self.launches.append(Launch(kernel, tensors, numbers, options))


def _meta(*shape: int, dtype=torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _recorded(plan, *tensors) -> list[Launch]:
    """What a plan launches."""
    plan.kernels = _Recorded()
    with (
        mock.patch.object(torch._C, "_cuda_getDevice", return_value=0, create=True),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", return_value=0, create=True),
    ):
        plan(*tensors)
    return plan.kernels.launches


def quantize_launches(
    head_dim: int = 128, head_dim_v: int = 0, dtype=torch.bfloat16, packed: bool = False, used: bool = False,
    rotate: bool = True, smooth_k: bool = True, smooth_v: bool = False, granularity: str = "block",
    rotary_dim: int = 0, interleaved: bool = False, rows: int = 9999,
) -> list[Launch]:  # fmt: skip
    """What it takes to make FP8 of such tensors."""
    shape = (rows,) if packed else (3, rows)
    q, k, v = (
        _meta(*shape, heads, dim, dtype=dtype)
        for heads, dim in ((6, head_dim), (3, head_dim), (3, head_dim_v or head_dim))
    )
    vectors = (_meta(4), _meta(4), *((_meta(3), _meta(3)) if used else (None, None)))
    lengths = Lengths(*vectors, rows, rows) if packed else None
    cos = sin = rotary = None
    if rotary_dim:
        cos, sin = (_meta(rows, rotary_dim // 2, dtype=torch.float32) for _ in range(2))
        rotary = RotaryTables(cos, sin, interleaved)
    recipe = Fp8Recipe(rotate=rotate, smooth_k=smooth_k, granularity=granularity, smooth_v=smooth_v)
    spec = quantize_spec(q, k, v, lengths, recipe, rotary)
    signs = _meta(head_dim, dtype=torch.float32) if rotate else None
    return _recorded(launch_quantize.quantize(spec), q, k, v, signs, cos, sin, *(vectors if packed else ()))


def transpose_launches(head_dim_v: int, packed: bool = False, used: bool = False) -> list[Launch]:
    """What it takes to lay out such a V."""
    v = _meta(*((999,) if packed else (3, 999)), 3, head_dim_v, dtype=E4M3)
    vectors = (_meta(4) if packed else None, _meta(3) if used else None)
    return _recorded(launch_quantize.transpose(transpose_spec(v, *vectors)), v, *vectors)


def named_launches() -> dict[str, Launch]:
    """Every kernel, by question and what it does."""
    found = {}
    for name, question in QUESTIONS.items():
        for launch in quantize_launches(**question):
            does = launch.kernel.fn.__name__
            if getattr(launch.numbers[-1], "measures", False):
                does = "measure"
            found[f"{name}/{does}"] = launch
    for name, question in VALUES.items():
        found[f"{name}/transpose_keys"] = transpose_launches(**question)[0]
    return found


def source_of(launch: Launch) -> GluonASTSource:
    """The kernel as Triton's launcher would compile it, not yet compiled."""
    typed = Typed()
    arguments = (*launch.tensors, *launch.numbers)
    for name, x in zip(launch.kernel.arg_names, arguments, strict=True):
        if name == "config":
            typed.add_constant(name, x)
        elif isinstance(x, tuple):
            at = len(typed.signature)
            typed.divisors |= {(at, i): [["tt.divisibility", 16]] for i in range(len(x))}
            typed.signature[name] = tuple(POINTERS[y.dtype] for y in x)
        elif isinstance(x, torch.Tensor):
            typed.add(name, POINTERS[x.dtype], aligned=name not in NEVER_SPECIALIZED)
        else:
            typed.add(name, "i32")
    return GluonASTSource(launch.kernel, typed.signature, typed.constants, typed.divisors)


def quant_report(launch: Launch) -> QuantReport:
    """Compile afresh and read the assembler's log and the SASS."""
    start = sum(os.times()[:4])
    log = io.StringIO()
    options = dict(launch.options, enable_fp_fusion=True)
    with always_compile(), contextlib.redirect_stdout(log):
        kernel = triton.compile(source_of(launch), target=GPUTarget("cuda", 90, 32), options=options)
    said, sass = log.getvalue(), disassembled(kernel.asm["cubin"])
    stores = re.findall(r"\bSTG\.E(?:\.\w*[A-Z]\w*)*?(?:\.(\d+|U8|U16))?(?:\.\w+)* ", sass)
    return QuantReport(
        seconds=round(sum(os.times()[:4]) - start, 2),
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said))),
        stack_bytes=sum(map(int, re.findall(r"(\d+) bytes stack frame", said))),
        registers=max(map(int, re.findall(r"Used (\d+) registers", said))),
        shared_memory=kernel.metadata.shared,
        stores=tuple(sorted({x or "32" for x in stores})),
        local=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
    )


def _report_by_name(name: str) -> tuple[str, dict]:
    """In a worker: (name, report or error as plain data)."""
    try:
        return name, vars(quant_report(named_launches()[name]))
    except Exception as error:
        return name, {"error": explained(error)}


def one_line(name: str, fields: dict) -> str:
    """A report for people."""
    if "error" in fields:
        return f"{name}: FAILED {fields['error'].strip().splitlines()[-1]}"
    r = QuantReport.from_json(fields)
    made = f"{r.registers} registers, {r.spill_bytes} B spilled, stores of {', '.join(r.stores)} bits"
    return f"{name}: {r.seconds} s, {r.shared_memory} B shared, {made}"


def main(given: list[str]) -> int:
    """The command line."""
    return command_line(given, "compile_quant", list(named_launches()), _report_by_name, one_line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
