"""Compile decode and combine kernels for sm_90a on a machine without a GPU, and read what came out.

2 to 4 seconds of one core a kernel.

    python -m tandem_attn.testing.compile_decode [--jobs N] [--out reports.json] [NAME ...]

compiles every kernel of testing/shipped_decode.py (or those named) and prints a line for each; with another
Triton first on PYTHONPATH, with that one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from tandem_attn.device.decode_groups import GroupRows
from tandem_attn.kernels import launch_decode
from tandem_attn.kernels.combine import combine_partials
from tandem_attn.kernels.config_decode import DecodeConfig
from tandem_attn.kernels.launch_decode import box_of
from tandem_attn.spec import E4M3
from tandem_attn.spec_decode import New
from tandem_attn.testing.compile import always_compile, command_line, descriptor_type, disassembled, explained
from tandem_attn.testing.sass import ambiguous_descriptors, tight_loops
from tandem_attn.testing.shipped_decode import DecodeVariant, decode_variants, plan_of

POINTERS = {"lse_ptr": "*fp32", "o_part": "*fp32", "l_part": "*fp32", "counters": "*i32"}
NO_NEW_KEYS = New(None, None, 0)


@dataclasses.dataclass(frozen=True)
class DecodeReport:
    """What became of a kernel."""

    seconds: float  # of one core
    spill_bytes: int  # loads and stores of registers that did not fit, anywhere
    spills_of_tiles: int  # such instructions in loops over tiles of keys
    stack_bytes: int
    registers: int
    warnings: tuple[str, ...]  # C75xx: serialised wgmma
    shared_memory: int  # bytes
    hmma: int  # mma.sync instructions
    hgmma: int  # wgmma instructions
    ambiguous_descriptors: int  # of wgmma, what they hold depends on the way: see sass.py

    @classmethod
    def from_json(cls, fields: dict) -> DecodeReport:
        """The inverse of vars() and JSON."""
        return cls(**{**fields, "warnings": tuple(fields["warnings"])})


class Typed:
    """Types, constants and known divisors of arguments, as Triton's launcher would find them."""

    def __init__(self) -> None:
        self.signature: dict[str, object] = {}
        self.constants: dict[tuple[int, ...], object] = {}
        self.divisors: dict[tuple[int, ...], list] = {}

    def add(self, name: str, kind: object, aligned: bool = False) -> None:
        """An argument of which nothing but the type is known, or that it starts at a multiple of 16 bytes."""
        if aligned:
            self.divisors[(len(self.signature),)] = [["tt.divisibility", 16]]
        self.signature[name] = kind

    def add_constant(self, name: str, value: object) -> None:
        """A constexpr."""
        self.constants[(len(self.signature),)] = value
        self.signature[name] = "constexpr"

    def add_value(self, name: str, value: object) -> None:
        """A number, None, the type of a pointer, or a tuple of these."""
        self.signature[name] = self._typed((len(self.signature),), value)

    def _typed(self, path: tuple[int, ...], value: object) -> object:
        if isinstance(value, tuple):
            return tuple(self._typed((*path, i), x) for i, x in enumerate(value))
        if isinstance(value, str):
            return value
        if isinstance(value, float):
            return "fp32"
        if value is None or value == 1:
            self.constants[path] = value
            return "constexpr"
        if value % 16 == 0:
            self.divisors[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"


def arguments(variant: DecodeVariant) -> Typed:
    """What a launch of this kernel passes."""
    config, plan = variant.config, plan_of(variant.spec)
    names = "numbers", "m_blocks_magic", "table_stride", "strides", "scales"
    pointers = given_pointers(config)
    if config.scaled:
        pointers += ("*fp32" if variant.spec.q_descale_stride else None, "*fp32", "*fp32")
    values = dict(zip(names, plan._numbers(NO_NEW_KEYS), strict=True), pointers=pointers)
    types = dict.fromkeys(("k", "v"), _pointer(variant.spec.cache_dtype))
    types |= dict(q_ptr=_pointer(variant.spec.q_dtype), out_ptr=_pointer(variant.spec.dtype), **POINTERS)
    widths = {"k": config.k_width, "v": config.v_width}
    typed = Typed()
    for name in kernel_of(variant).arg_names:
        if name in widths and not config.Tiles.clears.value:
            box, layout = box_of(config, widths[name])
            typed.add(name, descriptor_type("i16" if config.scaled else config.element, box, layout))
        elif name in types:
            typed.add(name, types[name], aligned=True)
        elif name == "seqlen":  # do_not_specialize
            typed.add(name, "i32")
        elif name == "config":
            typed.add_constant(name, config)
        else:
            typed.add_value(name, values[name])
    return typed


def _pointer(dtype: torch.dtype) -> str:
    """What Triton calls a pointer to such elements."""
    return {torch.bfloat16: "*bf16", torch.float16: "*fp16", E4M3: "*fp8e4nv"}[dtype]


def given_pointers(config: DecodeConfig) -> tuple[str | None, ...]:
    """Types of lengths, tables and the like, which start anywhere; None: not given."""
    given = (config.has_seqlens, config.packed_new, config.has_leftpad, config.packed_q)
    return tuple("*i32" if there else None for there in (*given, config.has_batch_idx, config.paged))


def kernel_of(variant: DecodeVariant):
    """The jit function."""
    return combine_partials if variant.combines else launch_decode.kernel_of(variant.config)


def decode_source(variant: DecodeVariant) -> GluonASTSource:
    """The kernel, not yet compiled."""
    typed = arguments(variant)
    return GluonASTSource(kernel_of(variant), typed.signature, typed.constants, typed.divisors)


def options_of(variant: DecodeVariant) -> dict:
    """As kernels/launch_decode.py compiles it."""
    if variant.combines:
        return dict(num_warps=4, launch_pdl=True, enable_fp_fusion=True)
    return dict(launch_decode.options_of(variant.config), enable_fp_fusion=True)


def decode_report(variant: DecodeVariant) -> DecodeReport:
    """Compile afresh and read the assembler's log and the SASS."""
    start = sum(os.times()[:4])
    log = io.StringIO()
    with always_compile(), contextlib.redirect_stdout(log):
        target = GPUTarget("cuda", 90, 32)
        kernel = triton.compile(decode_source(variant), target=target, options=options_of(variant))
    said, sass = log.getvalue(), disassembled(kernel.asm["cubin"])
    return DecodeReport(
        seconds=round(sum(os.times()[:4]) - start, 2),
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said))),
        spills_of_tiles=sum(loop["spill"] for loop in tight_loops(sass, r"\bHG?MMA\.")),
        stack_bytes=sum(map(int, re.findall(r"(\d+) bytes stack frame", said))),
        registers=max(map(int, re.findall(r"Used (\d+) registers", said))),
        warnings=tuple(line.strip() for line in said.splitlines() if "C75" in line),
        shared_memory=kernel.metadata.shared,
        hmma=len(re.findall(r"\bHMMA\.", sass)),
        hgmma=len(re.findall(r"\bHGMMA\.", sass)),
        ambiguous_descriptors=ambiguous_descriptors(sass),
    )


def products(config: DecodeConfig) -> tuple[int, int]:
    """(mma.sync, wgmma) instructions for a tile of keys: m16n8k16 of a warp, and k16 of any width."""
    steps = config.head_dim // 16
    if config.one_block:
        keys = config.tile_n // config.num_warps
        blocks = config.tile_m // 16
        return blocks * (steps * (keys // 8) + keys // 16 * (config.head_dim_v // 8)), 0
    of_tile = steps + config.tile_n // 16 * config.o_chunks
    if config.RowKind is GroupRows:  # the loop multiplies S of a tile and O of another; both stand alone once
        return 0, 2 * config.num_groups * of_tile
    return 0, of_tile


@functools.cache
def _by_name() -> dict[str, DecodeVariant]:
    """Found once, before there are workers."""
    return {v.name: v for v in decode_variants()}


def _report_by_name(name: str) -> tuple[str, dict]:
    """In a worker: (name, report or error as plain data)."""
    variant = _by_name()[name]
    try:
        return name, vars(decode_report(variant))
    except Exception as error:
        return name, {"error": explained(error)}


def one_line(name: str, fields: dict) -> str:
    """A report for people."""
    if "error" in fields:
        return f"{name}: FAILED {fields['error'].strip().splitlines()[-1]}"
    r = DecodeReport.from_json(fields)
    made = f"{r.hmma} mma, {r.hgmma} wgmma, {r.registers} registers, {r.spill_bytes} B spilled"
    return f"{name}: {r.seconds} s, {r.shared_memory} B shared, {made} {' '.join(r.warnings)}".rstrip()


def main(given: list[str]) -> int:
    """The command line."""
    return command_line(given, "compile_decode", list(_by_name()), _report_by_name, one_line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
