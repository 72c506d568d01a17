"""The demo from its first line to its last."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import math
import time

import torch

import tandem_attn
from tandem_attn.bench import UserError
from tandem_attn.bench.report import require_writable
from tandem_attn.demo import model as models
from tandem_attn.demo import plot, text, train
from tandem_attn.demo.display import Progress, printable, say
from tandem_attn.demo.generate import Passage, compare, generate

TIME_LIMIT = 160.0  # seconds after which the second training ends, so that all of it stays under 3 minutes


def run(args: argparse.Namespace) -> int:
    """Train, write, train again with torch's attention, draw. 1 if the trainings disagree, or decoding."""
    with _one_thread():
        return _run(args)


@contextlib.contextmanager
def _one_thread():
    """Matrices this small gain little from a second core, and lose nearly all if another program wants it.

    Two cores shared with other work (AMD EPYC, 2026-11-25): 14,000 tokens/s with one thread, 300 to 6,000
    with two, which wait for each other at every operation.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    device = device_named(args.device)
    recipe = train.recipe_for(device, args.quick, args.steps)
    if not args.prompt:
        raise UserError("--prompt is empty; supported: at least one character")
    require_writable(args.output)
    tokens = text.load(args.text, recipe.shape.context).to(device)
    model = models.Transformer(recipe.shape, models.tandem, args.seed).to(device)
    _introduce(model, tokens, recipe, args.seed)

    say("\nTraining with tandem_attn.flash_attn_func")
    history = _train(model, tokens, recipe, args.seed)
    say()
    agree = _write(model, args.prompt, recipe, args.seed)
    other = None
    if not args.no_compare:
        say("\nThe same weights and batches with torch's scaled_dot_product_attention")
        twin = models.Transformer(recipe.shape, models.sdpa, args.seed).to(device)
        other = _train(twin, tokens, recipe, args.seed, until=started + TIME_LIMIT)
        agree &= _compare(history, other, recipe, _gradients_apart(model, twin, tokens, recipe))
    _draw(args.output, history, other, str(recipe.shape))
    say(f"{time.monotonic() - started:.0f} s in all")
    return 0 if agree else 1


def device_named(name: str | None) -> torch.device:
    """The device to train on; by default CUDA's current one, else the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {name!r}; supported: cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device is {name!r}; torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _introduce(model: models.Transformer, tokens: text.Text, recipe: train.Recipe, seed: int) -> None:
    """Text, model, training, and which backend answers a question of this model."""
    shape, device = recipe.shape, tokens.train.device
    parameters = sum(p.numel() for p in model.parameters())
    say(f"text       {tokens}")
    say(f"model      {parameters:,} parameters: {shape}")
    say(f"training   {recipe.steps} steps of {recipe.batch} x {shape.context} bytes, AdamW, seed {seed}")
    options = {"dtype": train.precision_dtype(device), "device": device}
    q = torch.zeros(recipe.batch, shape.context, shape.heads, shape.head_dim, **options)
    k = torch.zeros(recipe.batch, shape.context, shape.kv_heads, shape.head_dim, **options)
    explanation = tandem_attn.explain(q, k, k, causal=True)
    say(f"attention  {explanation}".replace("\n", "\n" + " " * 9))
    if explanation.backend == "torch":
        say(
            "           so both trainings run one kernel of torch, and what is compared is the way there;\n"
            "           with TANDEM_BACKEND=reference this package computes it all by itself, more slowly"
        )


def _train(
    model, tokens: text.Text, recipe: train.Recipe, seed: int, until: float = math.inf
) -> train.History:
    with Progress(recipe.steps) as progress:
        history = train.train(model, tokens, recipe, seed, progress, until)
    steps = len(history.losses)
    rate = steps * recipe.tokens / history.seconds
    say(
        f"  {steps} steps in {history.seconds:.1f} s: {rate:,.0f} tokens/s; "
        f"loss in nats per byte {history.losses[0]:.3f} -> {history.recent:.3f}, "
        f"held out {history.held_out[0][1]:.3f} -> {history.held_out[-1][1]:.3f}"
    )
    return history


def _write(model: models.Transformer, prompt: str, recipe: train.Recipe, seed: int) -> bool:
    """The prompt and what the model makes of it, as it comes; whether the KV cache changes nothing in it."""
    say("What it writes")
    margin = "  | "
    say(margin + printable(prompt).replace("\n", "\n" + margin), end="")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    started = time.perf_counter()
    passages: list[Passage] = []
    for byte in generate(model, prompt.encode(errors="surrogateescape"), recipe.written, seed, passages):
        say(printable(decoder.decode(bytes([byte]))).replace("\n", "\n" + margin), end="")
    seconds = time.perf_counter() - started
    say()
    count, match = recipe.written, compare(model, passages)
    agree = match.within(recipe.logits)
    passes = f"{len(passages)} passes" if len(passages) > 1 else "a pass"
    say(
        f"  {count} tokens in {seconds:.1f} s: {count / seconds:.0f} tokens/s, by "
        "flash_attn_with_kvcache over a KV cache\n"
        f"  logits apart from those of {passes} without a cache   {match.apart:.1e}, the largest is "
        f"{match.largest:.1f} (tolerance {recipe.logits:g} of it)\n"
        f"  the likeliest byte is the same at {match.same_choice} of {match.places} places\n"
        f"  {'the same: decoding continues what a whole pass computes' if agree else 'NOT the same'}"
    )
    return agree


def _gradients_apart(model, twin, tokens: text.Text, recipe: train.Recipe) -> float:
    batch = text.even_windows(tokens.held_out, recipe.batch, recipe.shape.context)
    return train.gradient_difference(model, twin, *batch)


def _compare(ours: train.History, other: train.History, recipe: train.Recipe, gradients: float) -> bool:
    """Say how far apart the trainings are; whether that is near enough. NaN is not."""
    compared = len(other.losses)
    if compared < recipe.steps:
        say(f"  time is short: compared over the first {compared} of {recipe.steps} steps")
    apart = [abs(a - b) for a, b in zip(ours.losses, other.losses, strict=False)]
    worst = max(range(compared), key=lambda step: math.inf if math.isnan(apart[step]) else apart[step])
    agree = apart[worst] <= recipe.apart and gradients <= recipe.gradients
    say(
        f"  largest difference of the loss curves   {apart[worst]:.1e} nats at step {worst + 1} "
        f"(tolerance {recipe.apart:g}: rounding grows in training)\n"
        f"  gradients at equal weights              {gradients:.1e} of their size "
        f"(tolerance {recipe.gradients:g})\n"
        f"  {'the same: tandem_attn trains as torch does' if agree else 'NOT the same'}"
    )
    return agree


def _draw(path, ours: train.History, other: train.History | None, title: str) -> None:
    if plot.draw(path, ours, other, title):
        say(f"loss curves: {path.resolve()}")
    else:
        say("no loss curves: matplotlib is not installed")
