"""Compile any forward configuration for sm_90a on a machine without a GPU, and read what came out.

Uses the ptxas and nvdisasm inside the triton package. About 2 seconds a kernel.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from tandem_attn.kernels.config import ForwardConfig
from tandem_attn.kernels.forward import attention_forward
from tandem_attn.kernels.launch import forward_boxes

TOOLS = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclasses.dataclass(frozen=True)
class Report:
    """What the assembler made of a kernel."""

    spill_bytes: int
    warnings: tuple[str, ...]  # C75xx: serialised wgmma, ignored setmaxnreg
    shared_memory: int  # bytes
    ptx: str
    sass: str

    @property
    def loops(self) -> list[collections.Counter]:
        """Histogram of instructions of each loop with matrix products."""
        return [h for h in loop_histograms(self.sass) if h["HGMMA"]]


def compile_forward(config: ForwardConfig, seqused: bool = False):
    """The compiled kernel (triton's CompiledKernel) of one configuration."""
    boxes = forward_boxes(config)

    def desc(name: str) -> str:
        box, layout = boxes[name]
        return f"tensordesc<{config.element}[{', '.join(map(str, box))}],{layout!r}>"

    signature = {name: desc(name) for name in ("q_desc", "k_desc", "v_desc", "o_desc")}
    signature["lse_ptr"] = "*fp32"
    packed = config.Sequences.packed.value
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        signature[name] = "*i32" if packed else "constexpr"
    for name in ("seqused_q", "seqused_k"):
        signature[name] = "*i32" if packed and seqused else "constexpr"
    ints = (
        "batch",
        "num_heads",
        "num_kv_heads",
        "seqlen_q",
        "seqlen_k",
        "window_left",
        "window_right",
        "group",
    )
    signature |= dict.fromkeys(ints, "i32") | dict.fromkeys(("scale_log2", "inner_scale"), "fp32")
    signature["config"] = "constexpr"
    names = list(signature)
    constants = {(names.index(n),): None for n in names if signature[n] == "constexpr"}
    constants[(names.index("config"),)] = config
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = GluonASTSource(attention_forward, signature, constants, aligned)
    options = dict(num_warps=4, maxnreg=config.maxnreg, enable_fp_fusion=True)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def report(kernel) -> Report:
    """Assemble again with -v and disassemble."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = pathlib.Path(folder, "k.ptx"), pathlib.Path(folder, "k.cubin")
        ptx.write_text(kernel.asm["ptx"])
        log = subprocess.run(
            [TOOLS / "ptxas", "-v", "-arch=sm_90a", ptx, "-o", cubin],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        sass = subprocess.run(
            [TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True
        ).stdout
    spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
    warnings = tuple(line.strip() for line in log.splitlines() if "C75" in line)
    return Report(spills, warnings, kernel.metadata.shared, kernel.asm["ptx"], sass)


def loop_histograms(sass: str) -> list[collections.Counter]:
    """Instruction counts of every loop (backward branch) of a disassembly; inner loops count in outer ones
    too."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\S+):", line):
            labels[label.group(1)] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(re.sub(r"^@!?U?P\d+\s+", "", instruction.group(1).strip()))
    found = []
    for i, text in enumerate(code):
        branch = re.search(r"\bBRA\b.*?`\((\S+)\)", text)
        if branch and labels.get(branch.group(1), i + 1) <= i:
            body = code[labels[branch.group(1)] : i + 1]
            histogram = collections.Counter(t.split()[0].split(".")[0] for t in body)
            histogram["length"] = len(body)
            histogram["MUFU.EX2"] = sum(t.startswith("MUFU.EX2") for t in body)
            histogram["spill"] = histogram["LDL"] + histogram["STL"]
            found.append(histogram)
    return found
