"""Training: what to train on a device, the loop, and one step in which two models are held together."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time

import torch
import torch.nn.functional as F

from tandem_attn.demo import text
from tandem_attn.demo.display import Progress
from tandem_attn.demo.model import Shape, Transformer

EVALUATIONS = 8  # of the held-out loss in a training, besides the one before it
RECENT = 20  # steps in an average of training losses
LEAST = 30  # steps of a training that has no time left


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model, how to train it, and how closely two trainings agree that differ in rounding alone.

    `apart` bounds the difference of the loss curves in nats per byte. It is wide, since training doubles a
    difference again and again until it saturates: for CPU at 0.035, seen with noise of 0.1 % in attention.
    `gradients` bounds the difference of the gradients at equal weights, relative to their size. That is the
    sharper check: nothing has grown yet. `logits` bounds those of decoding, relative to the largest: in
    bfloat16 they are themselves rounded to 1/256.
    """

    shape: Shape
    batch: int
    steps: int
    rate: float
    held_out: int  # windows to measure the held-out loss on
    written: int  # bytes to generate
    apart: float
    gradients: float
    logits: float = 1e-4

    @property
    def tokens(self) -> int:
        """In one step."""
        return self.batch * self.shape.context


CPU = Recipe(Shape(4, 64, 4, 2, 16, 256), 4, 600, 6e-3, held_out=32, written=400, apart=0.1, gradients=1e-4)
QUICK = Recipe(Shape(2, 32, 4, 2, 8, 64), 8, 60, 6e-3, held_out=32, written=60, apart=0.01, gradients=1e-4)
# bfloat16 rounds 65,536 times more coarsely than float32. Sized without a run on a GPU; in bfloat16 on a CPU,
# GPU_QUICK's gradients are 0.003 apart between the reference and torch's kernel (2026-11-25)
BFLOAT16 = dict(apart=0.1, gradients=0.02, logits=0.05)
GPU = Recipe(Shape(6, 384, 6, 2, 64, 1024), 8, 300, 1e-3, held_out=16, written=400, **BFLOAT16)
GPU_QUICK = Recipe(Shape(2, 128, 2, 1, 64, 128), 8, 60, 3e-3, held_out=16, written=60, **BFLOAT16)


@dataclasses.dataclass(frozen=True)
class History:
    """A training: the loss of each step, (step, loss) on held-out text, and its duration without those."""

    losses: list[float]
    held_out: list[tuple[int, float]]
    seconds: float

    @property
    def recent(self) -> float:
        """The loss of the last steps, averaged."""
        return _mean(self.losses[-RECENT:])


def recipe_for(device: torch.device, quick: bool, steps: int | None) -> Recipe:
    """What to train on a device; `steps` replaces the recipe's own."""
    if device.type == "cuda":
        recipe = GPU_QUICK if quick else GPU
    else:
        recipe = QUICK if quick else CPU
    return recipe if steps is None else dataclasses.replace(recipe, steps=steps)


def precision(device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 where there are tensor cores, else float32."""
    dtype = precision_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def precision_dtype(device: torch.device) -> torch.dtype:
    """The type that `precision` computes in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def loss_of(model: Transformer, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats per byte."""
    with precision(inputs.device):
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def train(
    model: Transformer,
    tokens: text.Text,
    recipe: Recipe,
    seed: int,
    progress: Progress,
    until: float = math.inf,
) -> History:
    """AdamW with warm-up and cosine decay on random windows; ends early if time.monotonic() passes `until`.

    Equal models and seeds see the same batches.
    """
    context, device = recipe.shape.context, tokens.train.device
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, fused=fused
    )
    generator = torch.Generator().manual_seed(seed)
    unseen = text.even_windows(tokens.held_out, recipe.held_out, context)
    losses, held_out, seconds = [], [(0, evaluate(model, *unseen))], 0.0
    progress.line(0, math.log(256), held_out[-1][1], 0.0)
    started = time.perf_counter()
    for step in range(1, recipe.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * schedule(step / recipe.steps)
        loss = loss_of(model, *text.random_windows(tokens.train, recipe.batch, context, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        last = step == recipe.steps or (step >= LEAST and time.monotonic() > until)
        if last or step % math.ceil(recipe.steps / EVALUATIONS) == 0:
            recent = torch.stack(losses[-RECENT:]).mean().item()  # waits for the device
            seconds += time.perf_counter() - started
            held_out.append((step, evaluate(model, *unseen)))
            progress.line(step, recent, held_out[-1][1], step * recipe.tokens / seconds)
            started = time.perf_counter()
        elif step % 5 == 0:
            progress.advance(step, loss)
        if last:
            break
    return History(torch.stack(losses).tolist(), held_out, seconds)


def schedule(done: float) -> float:
    """The learning rate at a part of the training, relative to the highest: up for a tenth, then a cosine."""
    warm = 0.1
    if done < warm:
        return done / warm
    return 0.05 + 0.95 * (1 + math.cos(math.pi * (done - warm) / (1 - warm))) / 2


@torch.no_grad()
def evaluate(model: Transformer, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """The loss on these windows, without training."""
    return loss_of(model, inputs, targets).item()


def gradient_difference(model: Transformer, other: Transformer, inputs, targets) -> float:
    """Of two models at the weights of the first: |gradients - other gradients| / |gradients|."""
    other.load_state_dict(model.state_dict())
    found = []
    for one in (model, other):
        one.zero_grad()
        loss_of(one, inputs, targets).backward()
        found.append(torch.cat([p.grad.double().flatten() for p in one.parameters()]))
        one.zero_grad()
    return ((found[0] - found[1]).norm() / found[0].norm()).item()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
