"""Where and with what a number was measured: the stamp inside every result file."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shlex
import sys

import torch

import tandem_attn
from tandem_attn.doctor import output_of

PACKAGE = pathlib.Path(tandem_attn.__file__).parent
SMI_FIELDS = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "max_sm_clock_mhz": "clocks.max.sm",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def stamp(device: torch.device) -> dict:
    """Everything that could change a number; JSON types only."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["tandem-attn", *sys.argv[1:]]),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "tandem_attn": tandem_attn.__version__,
        "source_digest": source_digest(),
        "git": git_state(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "triton": _version_of("triton"),
        "device": device.type,
        "cpu": {"machine": platform.machine(), "threads": torch.get_num_threads()},
        "gpu": gpu(device),
        "variables": {name: x for name, x in sorted(os.environ.items()) if name.startswith("TANDEM_")},
    }


def source_digest() -> str:
    """Twelve hexadecimal digits of the package's Python files: says which code ran where there is no git."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def git_state() -> dict:
    """Commit of the checkout that holds the package, and whether it was changed since."""
    commit = output_of(["git", "-C", str(PACKAGE), "rev-parse", "HEAD"])
    if commit is None:
        return {"commit": None, "dirty": None}
    changes = output_of(["git", "-C", str(PACKAGE), "status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def gpu(device: torch.device) -> dict | None:
    """Name and sizes from torch, clocks and limits from nvidia-smi where it answers."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    facts = {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
    }
    return facts | smi(getattr(found, "uuid", None))


def smi(uuid: object | None) -> dict:
    """Answers of nvidia-smi for one card; empty without it."""
    query = [f"--query-gpu={','.join(SMI_FIELDS.values())}", "--format=csv,noheader,nounits"]
    which = [] if uuid is None else ["-i", f"GPU-{uuid}"]
    answer = output_of(["nvidia-smi", *which, *query])
    if not answer:
        return {}
    values = [value.strip() for value in answer.splitlines()[0].split(",")]
    return dict(zip(SMI_FIELDS, map(_number, values), strict=False))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:  # 580.159.03, [N/A]
        return text


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
