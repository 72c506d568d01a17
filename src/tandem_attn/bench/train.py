"""`bench train`: forward and backward together, as a training step runs them, checked before they are timed.

A launch is a fresh forward with gradients and `torch.autograd.grad` on it; operations are 3.5 times the
forward's. Nobody recorded such times: peers are those of the same run.
"""

from __future__ import annotations

import argparse

from tandem_attn.bench import cases, gradient_providers, peers, tflops
from tandem_attn.bench.gradient_check import GradientOracle

TRAIN = tflops.Benchmark(
    name="train",
    work=3.5,
    groups=cases.GRADIENT_GROUPS,
    providers=gradient_providers.TRAIN,
    oracle=GradientOracle,
    recorded=dict,
    summary=peers.gradient_summary,
    gradients=True,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench train`."""
    tflops.add_arguments(parser, TRAIN)


def run(args: argparse.Namespace) -> int:
    """Measure and report. 1 if a result of ours is wrong or missing, else 0."""
    return tflops.run(args, TRAIN)
