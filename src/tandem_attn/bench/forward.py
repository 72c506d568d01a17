"""`bench forward`: the forward pass of every case by every provider, checked before it is timed."""

from __future__ import annotations

import argparse

from tandem_attn.bench import cases, check, peers, providers, tflops

FORWARD = tflops.Benchmark(
    name="forward",
    work=1.0,
    groups=cases.GROUPS,
    providers=providers.PROVIDERS,
    oracle=check.Oracle,
    recorded=peers.recorded_forward,
    summary=peers.summary,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench forward`."""
    tflops.add_arguments(parser, FORWARD)


def run(args: argparse.Namespace) -> int:
    """Measure and report. 1 if a result of ours is wrong or missing, else 0."""
    return tflops.run(args, FORWARD)
