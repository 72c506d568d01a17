"""Compile backward kernels for sm_90a on a machine without a GPU: see testing/compile.py.

python -m tandem_attn.testing.compile_backward [--jobs N] [--out reports.json] [NAME ...]
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import traceback

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from tandem_attn.kernels.backward import attention_backward
from tandem_attn.kernels.backward_queries import query_gradient
from tandem_attn.kernels.config_backward import BackwardConfig, QueryGradientConfig
from tandem_attn.kernels.launch_backward import backward_boxes
from tandem_attn.testing.compile import (
    KEYED_BY,
    Report,
    always_compile,
    command_line,
    disassembled,
    named_barriers,
    one_line,
    unfenced_stores,
)
from tandem_attn.testing.sass import register_use, tight_loops
from tandem_attn.testing.shipped_backward import variants


def backward_source(config: BackwardConfig | QueryGradientConfig) -> GluonASTSource:
    """The kernel of one configuration, not yet compiled."""
    kernel = attention_backward if isinstance(config, BackwardConfig) else query_gradient
    boxes = backward_boxes(config)
    packed = config.Sequences.packed.value
    signature = {}
    for name in kernel.arg_names:
        if name in boxes:
            box, layout, element = boxes[name]
            signature[name] = f"tensordesc<{element}[{', '.join(map(str, box))}],{layout!r}>"
        elif name in KEYED_BY:
            signature[name] = "*i32" if packed and name.startswith("cu_") else "constexpr"
        elif name in ("stat_ptr", "counters"):
            signature[name] = "*fp32" if name == "stat_ptr" else "*i32"
        elif name == "config":
            signature[name] = "constexpr"
        else:
            signature[name] = "fp32" if "scale" in name else "i64" if "magic" in name else "i32"
    names = list(signature)
    constants = {(names.index(n),): None for n in names if signature[n] == "constexpr"}
    constants[(names.index("config"),)] = config
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    return GluonASTSource(kernel, signature, constants, aligned)


def report(config: BackwardConfig | QueryGradientConfig) -> Report:
    """Compile afresh and read the assembler's log, the PTX and the SASS."""
    start = sum(os.times()[:4])
    log = io.StringIO()
    options = dict(num_warps=4, maxnreg=config.maxnreg, enable_fp_fusion=True)
    with always_compile(), contextlib.redirect_stdout(log):
        kernel = triton.compile(backward_source(config), target=GPUTarget("cuda", 90, 32), options=options)
    said, ptx, sass = log.getvalue(), kernel.asm["ptx"], disassembled(kernel.asm["cubin"])
    return Report(
        seconds=round(sum(os.times()[:4]) - start, 2),
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said))),
        registers=max(map(int, re.findall(r"Used (\d+) registers", said))),
        register_use=register_use(sass, config.maxnreg),
        warnings=tuple(line.strip() for line in said.splitlines() if "C75" in line),
        shared_memory=kernel.metadata.shared,
        tight_loops=tight_loops(sass),
        named_barriers=named_barriers(ptx),
        unfenced_stores=unfenced_stores(ptx),
        setmaxnreg=tuple(sorted({int(n) for n in re.findall(r"setmaxnreg\S*\s+(\d+)", ptx)})),
    )


def _report_by_name(name: str) -> tuple[str, dict]:
    """In a worker: (name, report or error as plain data)."""
    variant = next(v for v in variants() if v.name == name)
    try:
        return name, vars(report(variant.config))
    except Exception:
        return name, {"error": traceback.format_exc(limit=-6)}


def main(given: list[str]) -> int:
    """The command line."""
    return command_line(given, "compile_backward", [v.name for v in variants()], _report_by_name, one_line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
