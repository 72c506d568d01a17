"""Writing: one byte after the other, each drawn from what the model expects next."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tandem_attn.demo.model import Transformer
from tandem_attn.demo.train import precision

TEMPERATURE = 0.6


@torch.inference_mode()
def generate(model: Transformer, prompt: bytes, count: int, seed: int) -> Iterator[int]:
    """`count` bytes after the prompt. Each pass sees the last `context` bytes again: no KV cache."""
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(count):
        seen = torch.tensor([tokens[-model.shape.context :]], device=device)
        with precision(device):
            logits = model(seen)[0, -1]
        chances = (logits.float().cpu() / TEMPERATURE).softmax(-1)
        tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
        yield tokens[-1]
