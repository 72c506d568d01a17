"""Compile backward kernels for sm_90a on a machine without a GPU, and read what came out.

2 to 8 seconds of one core a kernel.

    python -m tandem_attn.testing.compile_backward [--jobs N] [--out reports.json] [NAME ...]

compiles every kernel of testing/shipped_backward.py (or those named) and prints a line for each; with another
Triton first on PYTHONPATH, with that one.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import sys

from triton.experimental.gluon._runtime import GluonASTSource

from tandem_attn.kernels import backward_rows, launch_backward
from tandem_attn.kernels.config_backward import (
    KEYS,
    NUM_CONSUMERS,
    GradientConfig,
    KeyGradientConfig,
    QueryGradientConfig,
)
from tandem_attn.testing.compile import Report, command_line, compiled, descriptor_type, explained, one_line
from tandem_attn.testing.shipped_backward import Variant, variants

# pointers to 16-bit elements
OF_ELEMENTS = ("out_ptr", "dout_ptr", "clean_ptr", "dq_ptr", "dk_ptr", "dv_ptr", "ptr")
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens")  # of packed sequences
WAITS_FOR_ROWS = ("", "finish_rows", "sum_parts")  # kernels that start while those before them end


@dataclasses.dataclass(frozen=True)
class BackwardReport(Report):
    """What became of a kernel."""

    unfenced_arrivals: int  # arrivals on an mbarrier with writes to shared memory since the last proxy fence
    accesses: dict[str, int]  # loads and stores of global memory: "ld.v4.b32" -> how many instructions


def kernel_of(variant: Variant):
    """The jit function."""
    if variant.of_rows:
        return getattr(backward_rows, variant.of_rows)
    return launch_backward.kernel_of(variant.config)


def options_of(variant: Variant) -> dict:
    """As kernels/launch_backward.py compiles it."""
    options = {} if variant.of_rows else dict(maxnreg=variant.config.maxnreg)
    return options | (dict(launch_pdl=True) if variant.of_rows in WAITS_FOR_ROWS else {})


def type_of(name: str, variant: Variant) -> str:
    """Of an argument, as Triton spells it; "constexpr" where it is None or the configuration."""
    config = variant.config
    boxes = {} if variant.of_rows else launch_backward.backward_boxes(config)
    if name in boxes:
        box, layout, element = boxes[name]
        return descriptor_type(element, box, layout)
    if name in ("clean_ptr", "dlse_ptr") or name.startswith("seqused"):
        there = name in variant.given
    elif name in LENGTHS:
        there = config.Sequences.packed.value
    else:
        there = name != "config" and (name != "counters" or config.with_q)
    if not there:
        return "constexpr"
    if name in OF_ELEMENTS:
        return f"*{config.element}"
    if name.endswith(("_ptr", "_out")):
        return "*fp32"
    if name == "counters" or name in LENGTHS or name.startswith("seqused"):
        return "*i32"
    return "fp32" if "scale" in name else "i64" if "magic" in name else "i32"


def backward_source(variant: Variant) -> GluonASTSource:
    """The kernel, not yet compiled."""
    kernel = kernel_of(variant)
    signature = {name: type_of(name, variant) for name in kernel.arg_names}
    constants, divisors = {}, {}
    for parameter, (name, kind) in zip(kernel.params, signature.items(), strict=True):
        at = (parameter.num,)
        if kind == "constexpr":
            constants[at] = variant.config if name == "config" else None
        elif kind.startswith("*") and not parameter.do_not_specialize_on_alignment:
            divisors[at] = [["tt.divisibility", 16]]
    return GluonASTSource(kernel, signature, constants, divisors)


def backward_report(variant: Variant) -> BackwardReport:
    """Compile a kernel and look at it."""
    fields, ptx = compiled(backward_source(variant), **options_of(variant))
    return BackwardReport(**fields, unfenced_arrivals=unfenced_arrivals(ptx), accesses=accesses(ptx))


def unfenced_arrivals(ptx: str) -> int:
    """How many arrivals on an mbarrier have a write to shared memory, but no proxy fence, before them.

    What one warp writes here another one gives to TMA or to wgmma when it has waited for the mbarrier, so
    the fence must come before the arrival: `unfenced_stores` sees only one that comes before the store. What
    partitions are started with is handed over at a `barrier.sync`, and nothing but loads reads it.
    """
    count, written = 0, False
    for line in ptx.splitlines():
        if "fence.proxy.async" in line or "barrier.sync" in line:
            written = False
        elif re.search(r"\b(st\.shared|stmatrix)", line):
            written = True
        elif "mbarrier.arrive" in line:
            count += written
    return count


def accesses(ptx: str) -> dict[str, int]:
    """Loads and stores of global memory by kind, those of inline assembly left out."""
    found = re.findall(r"(ld|st)\.global\.((?:v\d\.)?[bsuf]\d+)\s", ptx)
    return dict(collections.Counter(".".join(kind) for kind in found))


def expected_loops(config: GradientConfig) -> collections.Counter:
    """(wgmma, exponentials) of each loop over blocks: how many such loops there are.

    wgmma take 16 columns, rows or keys at a time, and one piece of a tile of columns; exponentials are one
    per score and 128 threads. There is a loop per consumer and kind of block: whole, and masked at either
    edge. But who makes dK alone has one, without exponentials, and so has the second consumer of all
    gradients where it skips: for scores and dQ.
    """
    kinds = 1 + config.Mask.masks.value + config.Mask.has_left_edge.value
    scores, dp = config.head_dim // 16, config.head_dim_v // 16
    if isinstance(config, QueryGradientConfig):
        dq = config.qk_chunks * config.tile_n // 16
        return collections.Counter({(scores + dp + dq, config.tile_n // 2): kinds * 2})
    dk, dv = (chunks * config.tile_m // 16 for chunks in (config.qk_chunks, config.v_chunks))
    exponentials = config.tile_m // 2
    if isinstance(config, KeyGradientConfig):
        return collections.Counter({(scores + dv, exponentials): kinds, (dp + dk, 0): 1})
    dq = NUM_CONSUMERS * KEYS // 16  # a half of it, over the keys of both
    loops = collections.Counter({(scores + dp + dk + dv + dq, exponentials): kinds * NUM_CONSUMERS})
    if config.skips:
        loops[scores + dq, 0] = 1
    return loops


@functools.cache
def _by_name() -> dict[str, Variant]:
    """Found once, before there are workers."""
    return {v.name: v for v in variants()}


def _report_by_name(name: str) -> tuple[str, dict]:
    """In a worker: (name, report or error as plain data)."""
    variant = _by_name()[name]
    try:
        return name, vars(backward_report(variant))
    except Exception as error:
        return name, {"error": explained(error)}


def main(given: list[str]) -> int:
    """The command line."""
    names, line = list(_by_name()), functools.partial(one_line, kind=BackwardReport)
    return command_line(given, "compile_backward", names, _report_by_name, line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
