"""`bench backward`: the backward pass alone of every case by every provider, checked before it is timed.

The forward runs once and keeps its graph; a launch is `torch.autograd.grad` on it, with all kernels that this
needs. The host time of autograd is in no number: launches queue behind a sleeping kernel (see `measure`).
Operations are 2.5 times the forward's, 5 matrix products for 2, as every FlashAttention paper counts them.
"""

from __future__ import annotations

import argparse

from tandem_attn.bench import cases, gradient_providers, peers, tflops
from tandem_attn.bench.gradient_check import GradientOracle

BACKWARD = tflops.Benchmark(
    name="backward",
    work=2.5,
    groups=cases.GRADIENT_GROUPS,
    providers=gradient_providers.BACKWARD,
    oracle=GradientOracle,
    recorded=peers.recorded_backward,
    summary=peers.gradient_summary,
    gradients=True,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench backward`."""
    tflops.add_arguments(parser, BACKWARD)


def run(args: argparse.Namespace) -> int:
    """Measure and report. 1 if a result of ours is wrong or missing, else 0."""
    return tflops.run(args, BACKWARD)
