"""Writing: one byte after the other, each drawn from what the model expects next."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from tandem_attn.demo.model import KVCache, Transformer
from tandem_attn.demo.train import precision, precision_dtype

TEMPERATURE = 0.6


@dataclasses.dataclass
class Passage:
    """Bytes that one filling of the cache saw, and the logits after each of the last ones."""

    seen: list[int] = dataclasses.field(default_factory=list)
    logits: list[torch.Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Match:
    """Logits with a cache next to those without: NaN counts as infinitely far apart."""

    places: int
    apart: float  # the largest difference
    largest: float  # of the logits without a cache
    same_choice: int  # places where the same byte is the likeliest

    def within(self, tolerance: float) -> bool:
        """Whether they are no further apart than `tolerance`, a part of the largest logit."""
        return self.apart <= tolerance * self.largest


@torch.inference_mode()
def generate(
    model: Transformer, prompt: bytes, count: int, seed: int, passages: list[Passage] | None = None
) -> Iterator[int]:
    """`count` bytes after the prompt: a pass over that fills a KV cache, then one byte a pass.

    A full cache is filled anew with the last half of a context. `passages` gets what was computed.
    """
    context, device = model.shape.context, model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(model.shape, precision_dtype(device), device)
    passages = [] if passages is None else passages
    tokens = list(prompt)
    new = tokens[-context:]
    for _ in range(count):
        if cache.length + len(new) > context:
            cache.length, new = 0, tokens[-(context // 2) :]
        if cache.length == 0:
            passages.append(Passage())
        with precision(device):
            logits = model(torch.tensor([new], device=device), cache)[0, -1].float()
        passages[-1].seen += new
        passages[-1].logits.append(logits)
        chances = (logits.cpu() / TEMPERATURE).softmax(-1)
        new = torch.multinomial(chances, 1, generator=generator).tolist()
        tokens += new
        yield new[0]


@torch.inference_mode()
def compare(model: Transformer, passages: list[Passage]) -> Match:
    """The logits of `generate` next to those of one pass over each passage, which needs no cache."""
    device = model.head.weight.device
    cached, whole = [], []
    for passage in passages:
        with precision(device):
            logits = model(torch.tensor([passage.seen], device=device))[0].float()
        whole.append(logits[-len(passage.logits) :])
        cached += passage.logits
    cached, whole = torch.stack(cached), torch.cat(whole)
    apart = (cached - whole).abs().max().nan_to_num(math.inf).item()
    same = (cached.argmax(-1) == whole.argmax(-1)).sum().item()
    return Match(len(whole), apart, whole.abs().max().item(), same)
