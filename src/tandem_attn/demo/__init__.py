"""`tandem-attn demo`: train a small transformer on real text, with these functions and again with torch's."""

from __future__ import annotations

import argparse
import pathlib

from tandem_attn.bench import at_least_one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `demo`."""
    parser.description = (
        "Train a byte-level transformer whose attention is tandem_attn.flash_attn_func, let it write, and "
        "train an identical copy with torch's scaled_dot_product_attention. Exit status 1 if they disagree."
    )
    parser.add_argument(
        "--text", metavar="FILE", help="learn this file (default: Python's language reference)"
    )
    parser.add_argument("--steps", type=at_least_one, metavar="N", help="training steps")
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="of weights, batches and sampling")
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda if there is one)"
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("tandem-demo.png"),
        metavar="PNG",
        help="where to draw the loss curves (default: tandem-demo.png)",
    )
    parser.add_argument("--prompt", default="The ", metavar="TEXT", help="what to continue (default: 'The ')")
    parser.add_argument("--no-compare", action="store_true", help="no second training with torch's attention")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model for a few seconds: it learns little"
    )


def run(args: argparse.Namespace) -> int:
    """0; 1 if torch's attention gives other losses or gradients, or a KV cache other logits.

    UserError for a mistake in the options.
    """
    from tandem_attn.demo import session  # torch and the model, once they are needed

    return session.run(args)


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"is {text}; supported: 0 up to 2**63 - 1")
    return number
