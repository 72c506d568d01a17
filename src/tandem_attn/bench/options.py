"""How to measure: what `bench forward`, `bench decode` and others are asked for alike."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Iterable

import torch

from tandem_attn.bench import at_least_one

# What ran before shows where power is the limit. Two medians each of a backward of 16k tokens on an H200:
# after 50 ms of rest 8.04 and 8.18 ms, and cuDNN's 9.33 and 10.0; after 250 ms 8.06 and 8.07, 9.02 and 9.50;
# after a second 8.04 and 8.04, 8.99 and 8.99 (2026-11-29).
IDLE_MS = 250.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure; the same for every provider."""

    repeats: int = 11
    idle_ms: float = IDLE_MS
    checked: bool = True


def add_arguments(
    parser: argparse.ArgumentParser, groups: Iterable[str], providers: Iterable[str], timed: str
) -> None:
    """What to measure, how often (`timed` being what is repeated), and where to write it."""
    which = f"may be repeated; one of {', '.join(groups)} (default: all)"
    parser.add_argument("--group", action="append", metavar="NAME", help=which)
    parser.add_argument("--case", metavar="TEXT", help="only cases with TEXT in their name")
    parser.add_argument("--providers", metavar="A,B", help=f"only these of {', '.join(providers)}")
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write everything measured")
    add_timing_arguments(parser, timed)


def add_timing_arguments(parser: argparse.ArgumentParser, timed: str) -> None:
    """How often to measure (`timed` being what is repeated), after how much rest, and whether to check."""
    parser.add_argument("--repeats", type=at_least_one, default=11, help=f"{timed} per timing (default 11)")
    rest = f"rest before each timing (default {IDLE_MS:g})"
    parser.add_argument("--idle-ms", type=not_negative, default=IDLE_MS, help=rest)
    parser.add_argument("--no-check", action="store_true", help="time without comparing with plain attention")


def settings(args: argparse.Namespace) -> Settings:
    """The settings that were asked for."""
    return Settings(args.repeats, args.idle_ms, not args.no_check)


def device() -> torch.device:
    """The GPU where there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def names(text: str | None) -> list[str] | None:
    """The parts of A,B."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def not_negative(text: str) -> float:
    """An option that is a time."""
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"is {text}; supported: a number of at least 0")
    return number
