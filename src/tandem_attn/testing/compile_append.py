"""Compile the append kernels for sm_90a on a machine without a GPU, and read what came out.

    python -m tandem_attn.testing.compile_append [--jobs N] [--out reports.json] [NAME ...]

compiles the kernel of every question in `QUESTIONS` (or those named) and prints a line for each; with another
Triton first on PYTHONPATH, with that one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from tandem_attn.kernels import launch_decode
from tandem_attn.kernels.append import AppendPlan
from tandem_attn.spec import E4M3
from tandem_attn.spec_decode import SCALE_BLOCK, AppendSpec, DecodeOptions, Given, append_spec
from tandem_attn.testing.compile import always_compile, command_line, disassembled, explained
from tandem_attn.testing.compile_decode import Typed

BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
TRITON_NAMES = {BF16: "bf16", FP16: "fp16", F32: "fp32", E4M3: "fp8e4nv"}
ROTARY = dict(rotary_dim=128)

# Several of each kind of fact at once where they do not meet in the code. cache: None is q's type; else what
# has a factor in an FP8 cache.
QUESTIONS: dict[str, dict] = {
    "usual": dict(ROTARY),
    "fp16_of_80x48": dict(dtype=FP16, head_dim=80, head_dim_v=48, rotary_dim=32, interleaved=False, new=5),
    "packed_pages": dict(ROTARY, packed=True, page_size=16, causal=True, interleaved=False),
    "queries_alone": dict(ROTARY, new=0),
    "sequences": dict(cache="sequence"),
    "sequences_rotary": dict(ROTARY, cache="sequence", packed=True, page_size=64, causal=True),
    "sequences_fp16": dict(cache="sequence", dtype=FP16, head_dim=256, new=7),
    "sequences_copied": dict(cache="sequence", q_dtype=E4M3, new_dtype=E4M3, page_size=3),
    "blocks": dict(cache="block"),
    "blocks_rotary": dict(ROTARY, cache="block", page_size=64),
    "blocks_rotary_halves": dict(ROTARY, cache="block", interleaved=False, causal=True, new=3),
    "blocks_fp8_queries": dict(cache="block", q_dtype=E4M3, page_size=16),
    "blocks_of_256": dict(cache="block", dtype=FP16, head_dim=256, page_size=256, batch_idx=False),
    "blocks_of_80x48": dict(cache="block", head_dim=80, head_dim_v=48, rotary_dim=32, page_size=192),
    "blocks_of_64": dict(cache="block", head_dim=64, new=2, kv_heads=1, heads=8),
    "blocks_many": dict(ROTARY, cache="block", new=512, causal=True),
    "blocks_many_halves": dict(ROTARY, cache="block", new=512, interleaved=False, page_size=48),
    "blocks_packed": dict(ROTARY, cache="block", packed=True, new=100, page_size=128, causal=True),
    "blocks_packed_few": dict(cache="block", packed=True, new=1, page_size=192),
    "blocks_packed_of_256": dict(cache="block", packed=True, new=33, head_dim=256, heads=6, kv_heads=3),
}  # fmt: skip


def append_question(
    batch: int = 8,
    new: int = 1,
    heads: int = 32,
    kv_heads: int = 8,
    page_size: int = 0,
    packed: bool = False,
    cache: str | None = None,
    **rest,
) -> AppendSpec:
    """A spec of contiguous tensors on a GPU that need not exist. `new`: tokens of a sequence, 0: nothing is
    written; `rest`: see the code."""
    head_dim = rest.get("head_dim", 128)
    head_dim_v = rest.get("head_dim_v", head_dim)
    dtype = rest.get("dtype", BF16)
    rotary_dim, batch_idx = rest.get("rotary_dim", 0), rest.get("batch_idx", not page_size)
    q_dtype, new_dtype = rest.get("q_dtype", dtype), rest.get("new_dtype", dtype)
    of_cache = dtype if cache is None else E4M3

    def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens = max(new, 1)
    rows = (batch * tokens,) if packed else (batch, tokens)
    slots, cached = page_size or 4096, 100
    vector, starts = meta(batch, dtype=torch.int32), meta(batch + 1, dtype=torch.int32)
    factors = {"sequence": (batch, kv_heads), "block": (cached, -(-slots // SCALE_BLOCK), kv_heads)}
    descale = None if cache is None else meta(*factors[cache], dtype=F32)
    tables = meta(8192, rotary_dim // 2, dtype=F32) if rotary_dim else None
    given = Given(
        q=meta(*rows, heads, head_dim, dtype=q_dtype),
        k_cache=meta(cached, slots, kv_heads, head_dim, dtype=of_cache),
        v_cache=meta(cached, slots, kv_heads, head_dim_v, dtype=of_cache),
        k=meta(*rows, kv_heads, head_dim, dtype=new_dtype) if new else None,
        v=meta(*rows, kv_heads, head_dim_v, dtype=new_dtype) if new else None,
        rotary_cos=tables,
        rotary_sin=tables,
        cache_seqlens=vector,
        cache_batch_idx=vector if batch_idx else None,
        page_table=meta(batch, 4096 // page_size, dtype=torch.int32) if page_size else None,
        cu_seqlens_q=starts if packed else None,
        cu_seqlens_k_new=starts if packed and new else None,
        max_seqlen_q=tokens,
        k_descale=descale,
        v_descale=descale,
    )
    window = (-1, 0 if rest.get("causal") else -1)
    options = DecodeOptions(None, *window, 0.0, 0, 0, None, rest.get("interleaved", True))
    return dataclasses.replace(append_spec(given, options), device=torch.device("cuda", 0))


@dataclasses.dataclass(frozen=True)
class AppendReport:
    """What became of a kernel."""

    seconds: float  # of one core
    spill_bytes: int  # loads and stores of registers that did not fit
    registers: int
    shared_memory: int  # bytes
    conversions: int  # PTX instructions to e4m3
    wide_stores: int  # of 8 or 16 bytes
    fused: int  # PTX instructions that round a product together with a sum

    @classmethod
    def from_json(cls, fields: dict) -> AppendReport:
        """The inverse of vars() and JSON."""
        return cls(**fields)


def append_source(plan: AppendPlan) -> GluonASTSource:
    """The kernel of a plan with what a launch passes, not yet compiled."""
    spec, new = plan.spec, plan.spec.has_new
    types = dict(q=spec.q_dtype, q_out=spec.q_dtype, k_cache=spec.cache_dtype, v_cache=spec.cache_dtype)
    types |= dict.fromkeys(("k_new", "v_new"), spec.new_dtype if new else spec.q_dtype)
    types |= dict.fromkeys(("cos", "sin"), spec.rotary_dtype or spec.q_dtype)
    pointers = ("*i32",) * 6 + ("*fp32" if spec.fp8 else "*i32",) * 2
    each = 0 if spec.packed_new or not spec.has_new else spec.total_new // spec.batch
    numbers, strides = plan.constants_of(each)
    values = dict(pointers=pointers, numbers=numbers, strides=strides)
    typed = Typed()
    for name in plan.kernel.arg_names:
        if name in types:
            typed.add(name, f"*{TRITON_NAMES[types[name]]}", aligned=True)
        elif name == "seqlen":  # do_not_specialize
            typed.add(name, "i32")
        elif name == "config":
            typed.add_constant(name, plan.config)
        else:
            typed.add_value(name, values[name])
    return GluonASTSource(plan.kernel, typed.signature, typed.constants, typed.divisors)


def append_report(name: str) -> AppendReport:
    """Compile the kernel of a question afresh, and read the assembler's log and the PTX."""
    start = sum(os.times()[:4])
    log = io.StringIO()
    source = append_source(launch_decode.append(append_question(**QUESTIONS[name])))
    options = dict(num_warps=4, enable_fp_fusion=True)
    with always_compile(), contextlib.redirect_stdout(log):
        kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    said, ptx, sass = log.getvalue(), kernel.asm["ptx"], disassembled(kernel.asm["cubin"])
    return AppendReport(
        seconds=round(sum(os.times()[:4]) - start, 2),
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said))),
        registers=max(map(int, re.findall(r"Used (\d+) registers", said))),
        shared_memory=kernel.metadata.shared,
        conversions=len(re.findall(r"\bcvt\.rn\.satfinite\.e4m3x2\.f32", ptx)),
        fused=len(re.findall(r"\bfma\.rn\.f32", ptx)),
        wide_stores=len(re.findall(r"\bSTG\.E\S*\.64\b|\bSTG\.E\S*\.128\b", sass)),
    )


def _report_by_name(name: str) -> tuple[str, dict]:
    """In a worker: (name, report or error as plain data)."""
    try:
        return name, vars(append_report(name))
    except Exception as error:
        return name, {"error": explained(error)}


def one_line(name: str, fields: dict) -> str:
    """A report for people."""
    if "error" in fields:
        return f"{name}: FAILED {fields['error'].strip().splitlines()[-1]}"
    r = AppendReport.from_json(fields)
    made = f"{r.registers} registers, {r.spill_bytes} B spilled, {r.wide_stores} wide stores"
    return f"{name}: {r.seconds} s, {r.shared_memory} B shared, {made}"


def main(given: list[str]) -> int:
    """The command line."""
    return command_line(given, "compile_append", list(QUESTIONS), _report_by_name, one_line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
