"""A small transformer over bytes; its attention is a function that is handed in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import tandem_attn

VOCABULARY = 256  # bytes
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def tandem(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention by this package; q (batch, seqlen, heads, head_dim), k and v with kv_heads."""
    return tandem_attn.flash_attn_func(q, k, v, causal=True)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same by torch, which wants heads before the sequence."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model. Query heads are a multiple of KV heads; their size is a multiple of 8."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int

    @property
    def hidden(self) -> int:
        """Width inside the SwiGLU: about 8/3 of the model's, in whole 32s."""
        return math.ceil(self.width * 8 / 3 / 32) * 32

    def __str__(self) -> str:
        heads = f"{self.heads} query heads over {self.kv_heads} KV heads of {self.head_dim}"
        return f"{self.layers} layers, width {self.width}, {heads}, context {self.context}"


class KVCache:
    """Keys and values of the first `length` tokens of one sequence, in every layer."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device):
        self.length, self.capacity = 0, shape.context
        size = (shape.layers, 1, self.capacity, shape.kv_heads, shape.head_dim)
        self.k, self.v = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))

    def attend(self, layer: int, q, k, v, cos, sin) -> torch.Tensor:
        """Write k and v behind the tokens that are there and attend to all; q and k come unrotated."""
        return tandem_attn.flash_attn_with_kvcache(
            q,
            self.k[layer],
            self.v[layer],
            k,
            v,
            rotary_cos=cos.squeeze(1),
            rotary_sin=sin.squeeze(1),
            rotary_interleaved=False,
            cache_seqlens=self.length,
            causal=True,
        )


class Transformer(nn.Module):
    """Pre-norm decoder with RoPE, RMSNorm, grouped-query attention and SwiGLU.

    Two models of one shape and seed start with the same weights, whatever their attention.
    """

    def __init__(self, shape: Shape, attention: Attention, seed: int):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.blocks = nn.ModuleList(Block(shape, attention) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)
        cos, sin = rotation(shape.context, shape.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise(torch.Generator().manual_seed(seed))

    def forward(self, tokens: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Logits (batch, seqlen, 256) of the next byte; tokens (batch, seqlen <= context) int64.

        With a cache they are the next tokens of its sequence, and it holds them afterwards.
        """
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, self.cos, self.sin, None if cache is None else partial(cache.attend, layer))
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.head(self.norm(x))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Normal by fan-in, less where a branch ends, so that a layer begins close to the identity.

        Not zero: gradients at the level of rounding would come first, Adam would blow them up to whole steps,
        and two trainings that differ in rounding alone would part at once.
        """
        less = {self.head: 0.1} | {end: 0.3 for block in self.blocks for end in (block.project, block.down)}
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0, 1, generator=generator)
            elif isinstance(module, nn.Linear):
                std = less.get(module, 1.0) * module.in_features**-0.5
                module.weight.normal_(0, std, generator=generator)


class Block(nn.Module):
    """One layer: attention, then SwiGLU, each added to its input."""

    def __init__(self, shape: Shape, attention: Attention):
        super().__init__()
        self.shape, self.attention = shape, attention
        heads, kv_heads = shape.heads, shape.kv_heads
        self.norm_attention = nn.RMSNorm(shape.width)
        self.qkv = nn.Linear(shape.width, (heads + 2 * kv_heads) * shape.head_dim, bias=False)
        self.project = nn.Linear(heads * shape.head_dim, shape.width, bias=False)
        self.norm_mlp = nn.RMSNorm(shape.width)
        self.gate_up = nn.Linear(shape.width, 2 * shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cached=None) -> torch.Tensor:
        """x (batch, seqlen, width); cos and sin (context, 1, head_dim / 2); cached: KVCache.attend."""
        heads, kv_heads = self.shape.heads, self.shape.kv_heads
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (heads + 2 * kv_heads, self.shape.head_dim))
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=2)
        if cached is None:
            seqlen = x.shape[1]
            q, k = rotate(qk, cos[:seqlen], sin[:seqlen]).to(v.dtype).split([heads, kv_heads], dim=2)
            seen = self.attention(q, k, v)
        else:
            q, k = qk.split([heads, kv_heads], dim=2)
            seen = cached(q, k, v, cos, sin)
        x = x + self.project(seen.flatten(2))
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotation(context: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (context, 1, head_dim / 2) of rotary embeddings, base 10,000."""
    frequencies = 10_000.0 ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    angles = torch.arange(context).double()[:, None, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x (batch, seqlen, heads, head_dim): the halves of each head are the planes."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
