"""The command line `tandem-attn`. It imports only what a command needs: `doctor` runs without torch."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from tandem_attn import __version__
from tandem_attn.bench import UserError

USAGE_ERROR = 2
# a command to the module that holds add_arguments(parser) and run(args) -> exit status
COMMANDS = {
    ("demo",): "tandem_attn.demo",
    ("bench", "forward"): "tandem_attn.bench.forward",
    ("bench", "backward"): "tandem_attn.bench.backward",
    ("bench", "train"): "tandem_attn.bench.train",
    ("bench", "fp8"): "tandem_attn.bench.fp8",
    ("bench", "decode"): "tandem_attn.bench.decode",
    ("bench", "generate"): "tandem_attn.bench.generate",
    ("bench", "overhead"): "tandem_attn.bench.overhead",
    ("doctor",): "tandem_attn.doctor",
}
HELP = {
    "demo": "see exact attention at work on this machine",
    "bench": "measure, after checking every result",
    "forward": "TFLOPS of the forward pass, next to other libraries",
    "backward": "TFLOPS of the backward pass alone, next to other libraries",
    "train": "TFLOPS of forward and backward together, next to other libraries",
    "fp8": "FP8: TFLOPS next to FlashAttention-3's, GB/s of quantization, and what accuracy is left",
    "decode": "GB/s of attention over a KV cache, next to other libraries",
    "generate": "tokens per second of a model that decodes, next to torch's attention",
    "overhead": "host time of a call",
    "doctor": "what is installed, which backend answers, and does it answer right",
}


class _Parser(argparse.ArgumentParser):
    """Mistakes in one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status. 2 for a mistake in what was asked for."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser(_command(argv)).parse_args(argv)
        if args.run is None:
            args.parser.print_help()
            return USAGE_ERROR
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        print(f"tandem-attn: {_one_line(error)}", file=sys.stderr)
        return USAGE_ERROR


def _command(argv: list[str]) -> tuple[str, ...] | None:
    """The command that is asked for; its module alone is imported."""
    words = tuple(argv)
    return next((command for command in COMMANDS if words[: len(command)] == command), None)


def _parser(wanted: tuple[str, ...] | None) -> argparse.ArgumentParser:
    parser = _Parser(prog="tandem-attn", description="Exact attention for NVIDIA Hopper, and anywhere else.")
    parser.add_argument("--version", action="version", version=f"tandem-attn {__version__}")
    parser.set_defaults(run=None, parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    nested: dict[str, argparse._SubParsersAction] = {}
    for command in COMMANDS:
        first, *rest = command
        below = commands
        if rest:
            if first not in nested:
                group = commands.add_parser(first, help=HELP[first], description=HELP[first])
                group.set_defaults(parser=group)
                nested[first] = group.add_subparsers(title="benchmarks", metavar="BENCHMARK")
            below = nested[first]
        own = below.add_parser(command[-1], help=HELP[command[-1]], description=HELP[command[-1]])
        if command == wanted:
            if command != ("doctor",):
                _require_torch()
            module = importlib.import_module(COMMANDS[command])
            module.add_arguments(own)
            own.set_defaults(run=module.run)
    return parser


def _require_torch() -> None:
    """One line instead of a traceback through torch where that is missing or broken."""
    try:
        import torch  # noqa: F401
    except Exception as error:  # a broken install raises anything
        said = f"{type(error).__name__}: {_one_line(error)}"
        raise UserError(f"torch cannot be imported ({said}); tandem-attn doctor says more") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
