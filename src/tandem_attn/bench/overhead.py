"""`bench overhead`: what a call costs the host, before any device work is done."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Callable

import torch

import tandem_attn
from tandem_attn.bench import at_least_one, environment, providers, report

# The smallest kernels there are: the device must keep up with the host. Were it slower, the launch queue
# (about 1000 deep) would fill and the host would wait for it.
BATCH, SEQLEN, HEADS, HEAD_DIM = 1, 128, 1, 64
CALLS = 500  # of a round; fewer than the queue holds, should the device fall behind after all
CPU_CALLS = 50
WARM_UP = 20
CPU_REMARK = "on a CPU the computation itself is in these numbers"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A function with everything it needs."""

    name: str
    call: Callable[[], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench overhead`."""
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write everything measured")
    parser.add_argument("--rounds", type=at_least_one, default=9, help="median of so many (default 9)")


def run(args: argparse.Namespace) -> int:
    """Measure and report. 1 if a function of ours fails, else 0."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report.require_writable(args.json)
    calls = CALLS if device.type == "cuda" else CPU_CALLS
    settings = {"calls": calls, "rounds": args.rounds}
    settings |= {"batch": BATCH, "seqlen": SEQLEN, "heads": HEADS, "head_dim": HEAD_DIM}
    document = report.new_document("overhead", environment.stamp(device), settings)
    document["remark"] = CPU_REMARK if device.type == "cpu" else ""
    with torch.no_grad():
        for subject in subjects(device):
            document["cases"].append({"id": subject.name} | measure(subject, device, calls, args.rounds))
    document["complete"] = True
    report.save(document, args.json)
    show(document)
    return int(any("reason" in one for one in document["cases"] if one["id"].startswith("tandem")))


def measure(subject: Subject, device: torch.device, calls: int, rounds: int) -> dict:
    """Microseconds per call: the median over rounds of `calls` calls without waiting in between."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    try:
        for _ in range(WARM_UP):
            subject.call()
        found = [_round(subject.call, wait, calls) for _ in range(rounds)]
    except Exception as error:  # one that fails must not take the others with it
        return {"reason": providers.reason_of(error)}
    host, both = ([1e6 * pair[i] / calls for pair in found] for i in (0, 1))
    return {
        "median_us": statistics.median(host),
        "fastest_us": min(host),
        "slowest_us": max(host),
        # with the wait for the device: about the same, or the device was the slower of the two
        "until_done_us": statistics.median(both),
    }


def _round(call: Callable[[], object], wait: Callable[[], None], calls: int) -> tuple[float, float]:
    """Seconds until the host is free again, and until the device is done too."""
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    host = time.perf_counter() - start
    wait()
    return host, time.perf_counter() - start


def subjects(device: torch.device) -> list[Subject]:
    """The public functions, and torch's own for comparison."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    q, k, v = (tensor(BATCH, SEQLEN, HEADS, HEAD_DIM) for _ in range(3))
    packed = tensor(BATCH, SEQLEN, 3, HEADS, HEAD_DIM)
    starts = torch.tensor([0, SEQLEN], dtype=torch.int32, device=device)
    varlen = functools.partial(tandem_attn.flash_attn_varlen_func, q[0], k[0], v[0])
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return [
        Subject("tandem dense", functools.partial(tandem_attn.flash_attn_func, q, k, v, causal=True)),
        Subject("tandem varlen", functools.partial(varlen, starts, starts, SEQLEN, SEQLEN, causal=True)),
        Subject(
            "tandem qkvpacked",
            functools.partial(tandem_attn.flash_attn_qkvpacked_func, packed, causal=True),
        ),
        Subject("sdpa", functools.partial(sdpa, *heads_first, is_causal=True)),
    ]


def show(document: dict) -> None:
    """Print the table."""
    rows = []
    for one in document["cases"]:
        keys = ("median_us", "fastest_us", "slowest_us", "until_done_us")
        rows.append([one["id"], *(report.number(one.get(key)) or "-" for key in keys)])
    report.print_heading(document["environment"])
    settings = document["settings"]
    title = f"host microseconds per call, {settings['rounds']} rounds of {settings['calls']} calls"
    report.print_table(title, ["function", "median", "fastest", "slowest", "device done"], rows)
    for one in document["cases"]:
        if "reason" in one:
            print(f"{one['id']}: {one['reason']}")
    if document["remark"]:
        print(document["remark"])
