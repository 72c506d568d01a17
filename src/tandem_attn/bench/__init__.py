"""Benchmarks: `python -m tandem_attn bench forward` and its like. No number without a check."""

import argparse


class UserError(Exception):
    """A mistake in what was asked for; the command line prints it in one line."""


def at_least_one(text: str) -> int:
    """An option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"is {text}; supported: at least 1")
    return number
