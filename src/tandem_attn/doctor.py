"""`tandem-attn doctor`: what is installed, which backend answers, and whether its answer is right.

Imports nothing but the standard library, and every probe is on its own: it reports on installations in which
torch or triton cannot even be imported.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

GOOD_PTXAS = (13, 3)
PTXAS_WARNING = (
    "ptxas before 13.3 is reported to miscompile wgmma with its A operand in registers (seen with 12.9, "
    "triton pull request 11781), which these kernels use: tests/ holds exact integer tests for it, and "
    "TRITON_PTXAS_PATH can point to a newer ptxas"
)
KNOWN_VARIABLES = ("TANDEM_BACKEND", "TANDEM_DEBUG", "TANDEM_LOG", "TANDEM_VALIDATE")
OTHER_VARIABLES = ("CUDA_VISIBLE_DEVICES", "TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_INTERPRET")
NETWORK_FILE_SYSTEMS = {"9p", "afs", "beegfs", "ceph", "cifs", "fuse.sshfs", "gpfs", "lustre", "nfs", "nfs4"}
LEAST_FREE_GIB = 1.0
TOLERANCE = 2.0**-6  # of the largest value: two roundings to bfloat16 and some


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    """0 if a backend answers a small question right, else 1."""
    found = examine()
    print(json.dumps(found, indent=1) if args.json else text(found))
    return 0 if found["ok"] else 1


def examine() -> dict:
    """Every probe's findings by name, with all `warnings`, and `ok`: does a backend answer right?"""
    found: dict = {name: _guarded(probe) for name, probe in PROBES.items()}
    warnings = [f"{name}: {said}" for name, facts in found.items() for said in facts.pop("warnings", [])]
    return found | {"warnings": warnings, "ok": found["answer"].get("right") is True}


def text(found: dict) -> str:
    """The findings for people."""
    lines = []
    for name in PROBES:
        lines.append(name)
        lines += _indented(found[name])
    lines += [f"warning  {said}" for said in found["warnings"]]
    lines.append("ok: a backend answers right" if found["ok"] else "NOT OK: no backend gave a right answer")
    return "\n".join(lines)


def _indented(facts: dict, indent: str = "  ") -> list[str]:
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines.append(f"{indent}{name}")
            lines += _indented(value, indent + "  ")
        elif isinstance(value, list):
            lines += [f"{indent}{name:<14} {entry}" for entry in value]
        else:
            lines.append(f"{indent}{name:<14} {value}")
    return lines or [f"{indent}none"]


def _guarded(probe: Callable[[], dict]) -> dict:
    try:
        return probe()
    except Exception as error:  # that a probe fails is a finding
        return {"error": _one_line(error)}


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# Probes: each returns facts by name; "warnings" are collected


def _package() -> dict:
    import tandem_attn

    return {"version": tandem_attn.__version__, "path": str(pathlib.Path(tandem_attn.__file__).parent)}


def _system() -> dict:
    return {"python": platform.python_version(), "executable": sys.executable, "os": platform.platform()}


def _torch() -> dict:
    import torch

    built_for = torch.version.cuda or (f"ROCm {torch.version.hip}" if torch.version.hip else "CPU only")
    return {"version": torch.__version__, "cuda": built_for, "path": str(pathlib.Path(torch.__file__).parent)}


def _triton() -> dict:
    try:
        facts: dict = {"version": importlib.metadata.version("triton")}
    except importlib.metadata.PackageNotFoundError:
        facts = {}
    try:
        import triton
    except Exception as error:
        hint = "" if facts else " (it comes with CUDA builds of torch; the CPU backends do without)"
        return facts | {"error": f"cannot be imported: {_one_line(error)}{hint}"}
    return {"version": triton.__version__, "path": str(pathlib.Path(triton.__file__).parent)}


def _cuda() -> dict:
    facts: dict = {"driver": _driver(), "devices": []}
    listed = output_of(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        facts["devices"] = [_device(torch.cuda.get_device_properties(i)) for i in range(count)]
    except Exception as error:
        facts["error"] = f"torch cannot say: {_one_line(error)}"
    if listed:
        facts["nvidia-smi"] = listed.splitlines()
        if not facts["devices"]:
            facts["warnings"] = ["nvidia-smi lists a GPU and torch sees none: is torch built for CUDA?"]
    return facts


def _device(properties) -> str:
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    capability = f"compute capability {properties.major}.{properties.minor}"
    return f"{properties.name}, {capability}, {properties.multi_processor_count} multiprocessors, {memory}"


def _driver() -> str:
    """The newest CUDA that the driver supports, asked of the driver itself."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return "no NVIDIA driver"
    version = ctypes.c_int(0)
    status = library.cuDriverGetVersion(ctypes.byref(version))
    if status:
        return f"cuDriverGetVersion failed with {status}"
    return f"supports CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def _ptxas() -> dict:
    """The assembler that Triton would run on Hopper: as in triton.knobs, the variable, then its own."""
    given, warnings = os.environ.get("TRITON_PTXAS_PATH"), []
    candidates = [pathlib.Path(given)] if given else []
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        candidates.append(pathlib.Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "ptxas")
    for path in candidates:
        answer = output_of([str(path), "--version"])
        release = re.search(r"release (\d+)\.(\d+)(?:, V([\d.]+))?", answer or "")
        if release is None:
            warnings.append(f"{path} does not run")
            continue
        if (int(release[1]), int(release[2])) < GOOD_PTXAS:
            warnings.append(PTXAS_WARNING)
        version = release[3] or f"{release[1]}.{release[2]}"
        return {"version": version, "path": str(path), "warnings": warnings}
    return {"error": "there is none", "warnings": warnings}


def _cache() -> dict:
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    folder = os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")
    path = pathlib.Path(folder).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 2**30
    kind = file_system(existing)
    facts: dict = {"path": str(path), "exists": path.exists(), "file system": kind, "free": f"{free:.1f} GiB"}
    warnings = []
    if kind in NETWORK_FILE_SYSTEMS:
        warnings.append(f"{path} is on {kind}: slow, and processes that share it disturb each other")
    if free < LEAST_FREE_GIB:
        warnings.append(f"only {free:.2f} GiB are free for compiled kernels in {path}")
    if not os.access(existing, os.W_OK):
        warnings.append(f"{existing} cannot be written: kernels cannot be kept")
    return facts | {"warnings": warnings}


def file_system(path: pathlib.Path, mounts: str = "/proc/mounts") -> str:
    """Type of the file system that holds a path; "unknown" outside Linux."""
    try:
        entries = [entry.split() for entry in pathlib.Path(mounts).read_text().splitlines()]
    except OSError:
        return "unknown"
    real, best, kind = path.resolve(), -1, "unknown"
    for _, point, name, *_ in entries:
        place = pathlib.Path(point.replace("\\040", " "))
        # of mounts on the same place the last one is in view
        if (real == place or place in real.parents) and len(place.parts) >= best:
            best, kind = len(place.parts), name
    return kind


def _variables() -> dict:
    ours = {name: value for name, value in sorted(os.environ.items()) if name.startswith("TANDEM_")}
    others = {name: os.environ[name] for name in OTHER_VARIABLES if name in os.environ}
    warnings = [f"nothing reads {name}" for name in ours if name not in KNOWN_VARIABLES]
    if ours.get("TANDEM_BACKEND"):
        warnings.append(f"TANDEM_BACKEND sends every question to {ours['TANDEM_BACKEND']}")
    return ours | others | {"warnings": warnings}


def _backend() -> dict:
    """A typical question, by the library's own explanation."""
    import torch

    import tandem_attn

    device = _best_device()
    q, k, v = (torch.empty(1, 1024, 16, 128, dtype=torch.bfloat16, device=device) for _ in range(3))
    found = tandem_attn.explain(q, k, v, causal=True)
    question, *_ = str(found).splitlines()
    reasons = {name: said or ["it could, but another comes first"] for name, said in found.reasons.items()}
    facts: dict = {"question": question, "answered by": found.backend, "how": found.config, "not by": reasons}
    if device == "cuda" and found.backend != "gluon" and not os.environ.get("TANDEM_BACKEND"):
        facts["warnings"] = ["there is a CUDA device, but the Hopper kernels do not answer"]
    return facts


def _answer() -> dict:
    """A small question, answered and compared with plain softmax attention in float64."""
    import torch

    import tandem_attn

    device, rows, head_dim = _best_device(), 200, 64
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, rows, 2, head_dim, generator=generator) for _ in range(3)]
    q, k, v = (x.to(device, torch.bfloat16) for x in tensors)
    with torch.no_grad():
        out, lse = tandem_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    hidden = torch.ones(rows, rows, dtype=torch.bool, device=device).triu(1)
    scores = (q @ k.mT / math.sqrt(head_dim)).masked_fill(hidden, -math.inf)
    exact = (torch.softmax(scores, -1) @ v).transpose(1, 2)
    error = float((out.double() - exact).abs().max() / exact.abs().max())
    lse_error = float((lse.double() - torch.logsumexp(scores, -1)).abs().max())
    right = error <= TOLERANCE and lse_error <= TOLERANCE  # false for NaN too
    facts = {"device": device, "right": right, "error of out": f"{error:.1e}"}
    return facts | {"error of lse": f"{lse_error:.1e}", "tolerated": f"{TOLERANCE:.1e}"}


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def output_of(command: list[str]) -> str | None:
    """What a command prints; None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


PROBES: dict[str, Callable[[], dict]] = {
    "tandem_attn": _package,
    "system": _system,
    "torch": _torch,
    "triton": _triton,
    "cuda": _cuda,
    "ptxas": _ptxas,
    "cache": _cache,
    "variables": _variables,
    "backend": _backend,
    "answer": _answer,
}
