"""Compile forward kernels for sm_90a on a machine without a GPU, and read what came out.

Uses the ptxas and nvdisasm inside the triton package: 4 to 10 seconds of one core a kernel.

    python -m tandem_attn.testing.compile [--jobs N] [--out reports.json] [NAME ...]

compiles every shipped variant (or those named) and prints a line for each; with another Triton first on
PYTHONPATH, with that one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import io
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from tandem_attn.device.sequence import LENGTHS
from tandem_attn.kernels.config import ForwardConfig
from tandem_attn.kernels.forward import attention_forward
from tandem_attn.kernels.launch import forward_boxes
from tandem_attn.testing.sass import Loop, ambiguous_descriptors, register_use, tight_loops
from tandem_attn.testing.shipped import Variant, variants


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a kernel."""

    seconds: float  # of one core
    spill_bytes: int  # loads and stores of registers that did not fit, anywhere
    registers: int
    register_use: dict[int, int]  # limit set by setmaxnreg: registers used under it
    warnings: tuple[str, ...]  # C75xx: serialised wgmma, ignored setmaxnreg
    shared_memory: int  # bytes
    tight_loops: list[Loop]
    named_barriers: tuple[int, ...]  # hardware barriers that Triton's own synchronisation uses by number
    ambiguous_descriptors: int  # of wgmma, what they hold depends on the way: see sass.py
    unfenced_stores: int  # TMA stores of shared memory written since the last proxy fence
    setmaxnreg: tuple[int, ...]  # the register counts that warpgroups ask for

    @classmethod
    def from_json(cls, fields: dict) -> Report:
        """The inverse of vars() and JSON."""
        loops = [Loop(loop) for loop in fields["tight_loops"]]
        use = {int(limit): used for limit, used in fields["register_use"].items()}
        rest = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**{**rest, "tight_loops": loops, "register_use": use})


def descriptor_type(element: str, box: list[int], layout) -> str:
    """Of a TMA descriptor, as Triton spells it."""
    return f"tensordesc<{element}[{', '.join(map(str, box))}],{layout!r}>"


def forward_signature(config: ForwardConfig, seqused: str = "", adds_mean: bool = False) -> dict[str, str]:
    """Types of the kernel's arguments, as Triton spells them. `seqused`: which used lengths, of "qk"."""
    boxes = forward_boxes(config)
    packed = config.Sequences.packed.value
    pointers = {"lse_ptr": "*fp32"}
    for name in LENGTHS:  # pointers, or None where there are none
        given = packed and (name.startswith("cu_") or name[-1] in seqused)
        pointers[name] = "*i32" if given else "constexpr"
    descales = ("*fp32",) * 4 + ("*fp32" if adds_mean else "constexpr",)
    pointers["descales"] = descales if config.fp8 else "constexpr"
    pointers["aside"] = "*fp32" if config.promote > 0 else "constexpr"
    pointers["counter"] = "*i32" if config.Schedule.dynamic.value else "constexpr"
    signature = {}
    for name in attention_forward.arg_names:
        if name in boxes:
            box, layout = boxes[name]
            element = config.out_element if name == "o_desc" else config.element
            signature[name] = descriptor_type(element or config.element, box, layout)
        elif name in pointers:
            signature[name] = pointers[name]
        elif name == "config":
            signature[name] = "constexpr"
        else:
            signature[name] = "fp32" if "scale" in name else "i64" if "magic" in name else "i32"
    return signature


def forward_source(config: ForwardConfig, seqused: str = "", adds_mean: bool = False) -> GluonASTSource:
    """The kernel of one configuration, not yet compiled."""
    signature = forward_signature(config, seqused, adds_mean)
    names = list(signature)
    constants = {(names.index(n),): None for n in names if signature[n] == "constexpr"}
    constants[(names.index("config"),)] = config
    if config.fp8 and not adds_mean:
        constants[(names.index("descales"), 4)] = None
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"}
    return GluonASTSource(attention_forward, signature, constants, aligned)


def report(config: ForwardConfig, seqused: str = "", adds_mean: bool = False) -> Report:
    """Compile the kernel of one configuration and look at it."""
    fields, _ = compiled(forward_source(config, seqused, adds_mean), maxnreg=config.maxnreg)
    return Report(**fields)


def compiled(source: GluonASTSource, **options) -> tuple[dict, str]:
    """Compile afresh, read the assembler's log, PTX and SASS: the fields of a Report, and the PTX."""
    start = sum(os.times()[:4])
    log = io.StringIO()
    options = dict(num_warps=4, enable_fp_fusion=True, **options)
    with always_compile(), contextlib.redirect_stdout(log):
        kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    said, ptx, sass = log.getvalue(), kernel.asm["ptx"], disassembled(kernel.asm["cubin"])
    registers = max(map(int, re.findall(r"Used (\d+) registers", said)))
    fields = dict(
        seconds=round(sum(os.times()[:4]) - start, 2),
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said))),
        registers=registers,
        register_use=register_use(sass, options.get("maxnreg", registers)),
        warnings=tuple(line.strip() for line in said.splitlines() if "C75" in line),
        shared_memory=kernel.metadata.shared,
        tight_loops=tight_loops(sass),
        named_barriers=named_barriers(ptx),
        ambiguous_descriptors=ambiguous_descriptors(sass),
        unfenced_stores=unfenced_stores(ptx),
        setmaxnreg=tuple(sorted({int(n) for n in re.findall(r"setmaxnreg\S*\s+(\d+)", ptx)})),
    )
    return fields, ptx


@contextlib.contextmanager
def always_compile():
    """Nothing from Triton's cache, and ptxas's log (-v) on stdout: knobs that 3.6 to 3.9 all have."""
    knobs = triton.knobs
    before = knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log
    knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log = True, True
    try:
        yield
    finally:
        knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log = before


def disassembled(cubin: bytes) -> str:
    """SASS of a binary."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def named_barriers(ptx: str) -> tuple[int, ...]:
    """Numbers of the hardware barriers that synchronise one warpgroup or all: those that Triton gives out.

    The barriers of device/turn.py join two partitions and so count 256 threads or more of them than a
    partition has.
    """
    ours = set(re.findall(r"bar\.(?:sync|arrive)\s+(\d+), (?!128;)\d+;", ptx))
    all_of_them = re.findall(r"\bbar(?:rier)?\.sync\s+(\d+)", ptx)
    return tuple(sorted({int(n) for n in all_of_them if n not in ours}))


def unfenced_stores(ptx: str) -> int:
    """How many TMA stores or reductions have a write to shared memory, but no proxy fence, right before them.

    The TMA reads through another proxy: without `fence.proxy.async` it may see what was there before.
    """
    count, written = 0, False
    for line in ptx.splitlines():
        if "fence.proxy.async" in line:
            written = False
        elif re.search(r"\b(st\.shared|stmatrix)", line):
            written = True
        elif re.search(r"cp\.(reduce\.)?async\.bulk\.tensor\S*\.global\.shared", line):
            count += written
    return count


@functools.cache
def _by_name() -> dict[str, Variant]:
    """Found once, before there are workers: that asks thousands of questions."""
    return {v.name: v for v in variants()}


def _report_by_name(name: str) -> tuple[str, dict]:
    """In a worker: (name, report or error as plain data)."""
    variant = _by_name()[name]
    try:
        return name, vars(report(variant.config, variant.seqused, variant.adds_mean))
    except Exception as error:
        return name, {"error": explained(error)}


def explained(error: Exception) -> str:
    """A traceback and what it was caused by: errors in a jit function that another one calls are nested."""
    said = traceback.format_exception(type(error), error, error.__traceback__, limit=-6, chain=False)
    cause = error.__cause__
    while cause is not None:
        said.append(f"\n{cause}")
        cause = cause.__cause__
    return "".join(said)


def report_all(names: list[str], jobs: int, report_by_name: Callable = _report_by_name):
    """Yield (name, report as plain data) of these variants in the order they finish, `jobs` at a time.

    Workers are forks of this process, which has imported everything (a second and a half) and compiled
    nothing, with a Triton cache of their own that goes away with them.
    """
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        gc.collect()
        gc.freeze()  # or each worker looks through all that was imported, again and again
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            yield from pool.imap_unordered(report_by_name, names)


def one_line(name: str, fields: dict, kind: type[Report] = Report) -> str:
    """A report for people."""
    if "error" in fields:
        return f"{name}: FAILED {fields['error'].strip().splitlines()[-1]}"
    r = kind.from_json(fields)
    loops = " ".join(
        f"{x['length']}:{x['HGMMA'] + x['QGMMA']}+{x['PRMT']}p{x['spill']}s" for x in r.tight_loops
    )
    warned = f" {' '.join(r.warnings)}" if r.warnings else ""
    return f"{name}: {r.seconds} s, {r.shared_memory} B shared, {r.spill_bytes} B spilled, {loops}{warned}"


def command_line(
    given: list[str], module: str, known: list[str], report_by_name: Callable, one_line: Callable
) -> int:
    """Compile `known` variants, or those that are named, and print what became of them."""
    parser = argparse.ArgumentParser(prog=f"python -m tandem_attn.testing.{module}")
    parser.add_argument("names", nargs="*", metavar="NAME", help="variants to compile; all if none is given")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=pathlib.Path, help="write the reports here, as JSON")
    options = parser.parse_args(given)
    names = options.names or known
    print(f"triton {triton.__version__}, {len(names)} kernels, {options.jobs} at a time", flush=True)
    reports = {}
    for name, fields in report_all(names, options.jobs, report_by_name):
        reports[name] = fields
        print(one_line(name, fields), flush=True)
    if options.out:
        options.out.write_text(json.dumps(reports))
    return 1 if any("error" in fields for fields in reports.values()) else 0


def main(given: list[str]) -> int:
    """The command line."""
    return command_line(given, "compile", list(_by_name()), _report_by_name, one_line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
