"""A decoder of Llama's shape with random weights, one token at a time; attention is handed in.

Random weights would leave attention without a word in the logits: over thousands of keys of equal weight the
mean of random values is nearly 0. So keys are `SHARPNESS` times as large as queries, which leaves a few that
count, and the keys of a group of heads are those of its first query head: that one looks at its own token.
Wrong keys, positions or lengths then change the logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

SHARPNESS = 3.0  # standard deviation of keys, and of scores
ROTARY_BASE = 1e6
EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model, without its number of layers."""

    name: str
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    dtype: torch.dtype

    def __str__(self) -> str:
        heads = f"{self.heads} query heads over {self.kv_heads} KV heads of {self.head_dim}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: hidden {self.hidden}, MLP {self.mlp}, {heads}, {dtype}"

    @property
    def layer_bytes(self) -> int:
        """Weights of one layer."""
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return self.hidden * (attention + 3 * self.mlp) * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


CODELLAMA_34B = Shape("CodeLlama-34B's shape", 8192, 22016, 64, 8, 128, 32000, torch.bfloat16)
SMALL = Shape("a small shape for CPUs", 256, 704, 8, 2, 64, 512, torch.float32)

# the number of a layer and its q, k and v, not rotated, (1, 1, heads + 2 kv_heads, head_dim), to what the
# heads see, (1, 1, heads, head_dim)
Attend = Callable[[int, torch.Tensor], torch.Tensor]


class Layer(NamedTuple):
    """Weights of one layer."""

    norm_attention: torch.Tensor
    qkv: torch.Tensor
    project: torch.Tensor
    norm_mlp: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Model:
    """The weights, made on the device matrix by matrix, and a decode step through them."""

    def __init__(self, shape: Shape, layers: int, device: torch.device, seed: int = 0) -> None:
        self.shape, self.device = shape, device
        self._generator = torch.Generator(device).manual_seed(seed)
        self.embedding = self.normal(shape.vocabulary, shape.hidden)
        self.layers = [self._layer() for _ in range(layers)]
        self.norm = self._ones()
        self.head = self._matrix(shape.vocabulary, shape.hidden)

    def step(self, token: torch.Tensor, attend: Attend, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Logits (vocabulary,) after a token (1, 1) int64; all in `dtype`, None being the model's own."""
        dtype = dtype or self.shape.dtype
        x = F.embedding(token, self.embedding).to(dtype)
        for i, layer in enumerate(self.layers):
            qkv = _linear(_normed(x, layer.norm_attention), layer.qkv)
            seen = attend(i, qkv.unflatten(-1, (-1, self.shape.head_dim)))
            x = x + _linear(seen.flatten(2), layer.project)
            gate, up = _linear(_normed(x, layer.norm_mlp), layer.gate_up).chunk(2, dim=-1)
            x = x + _linear(F.silu(gate) * up, layer.down)
        return _linear(_normed(x, self.norm), self.head)[0, 0]

    def normal(self, *size: int, std: float = 1.0) -> torch.Tensor:
        """Random numbers of the model's type, where it is."""
        made = torch.empty(size, dtype=self.shape.dtype, device=self.device)
        return made.normal_(0, std, generator=self._generator)

    def _layer(self) -> Layer:
        shape = self.shape
        heads, kv_heads, width = shape.heads, shape.kv_heads, shape.heads * shape.head_dim
        qkv = self._matrix((heads + 2 * kv_heads) * shape.head_dim, shape.hidden)
        q, k, _ = qkv.unflatten(0, (-1, shape.head_dim)).split([heads, kv_heads, kv_heads])
        torch.mul(q[:: heads // kv_heads], SHARPNESS, out=k)
        project, gate_up = self._matrix(shape.hidden, width), self._matrix(2 * shape.mlp, shape.hidden)
        down = self._matrix(shape.hidden, shape.mlp)
        return Layer(self._ones(), qkv, project, self._ones(), gate_up, down)

    def _matrix(self, rows: int, columns: int) -> torch.Tensor:
        return self.normal(rows, columns, std=columns**-0.5)

    def _ones(self) -> torch.Tensor:
        return torch.ones(self.shape.hidden, dtype=self.shape.dtype, device=self.device)


def rotary_tables(shape: Shape, positions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (positions, head_dim / 2), float32."""
    places = torch.arange(0, shape.head_dim, 2, dtype=torch.float64, device=device)
    angles = torch.arange(positions, device=device)[:, None] * ROTARY_BASE ** -(places / shape.head_dim)
    return angles.cos().float(), angles.sin().float()


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight.to(x.dtype))  # itself, unless this is the check


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), EPSILON)
