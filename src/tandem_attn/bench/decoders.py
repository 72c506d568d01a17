"""Attention in a decode step of `bench generate`: ours, torch's, and a plain one that tells what is right.

Each holds a cache of all layers in its own layout, all with the same keys and values, and is told by `at` how
many tokens are there: the step writes the next one behind them and attends to it too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

import tandem_attn
from tandem_attn.bench.llama import SHARPNESS, Model, rotary_tables
from tandem_attn.testing import assert_within_budget

FACTOR, MEAN_FACTOR = 4.0, 3.0  # of the error of plain attention in the model's type
WARM_UP = 2  # steps before a graph is captured


class Answer(NamedTuple):
    """What a step computes: logits, and what it writes into the cache, (layers, kv_heads, head_dim)."""

    logits: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class Tandem:
    """One call writes, rotates and attends. The length is a number on the device, so one graph is enough."""

    def __init__(self, model: Model, k: torch.Tensor, v: torch.Tensor) -> None:
        self.shape, self.k, self.v = model.shape, k, v  # (layers, 1, capacity, kv_heads, head_dim)
        self.cos, self.sin = rotary_tables(model.shape, k.shape[2], model.device)
        self.length = torch.zeros(1, dtype=torch.int32, device=model.device)
        self.out = torch.empty(1, 1, self.shape.heads, self.shape.head_dim, dtype=k.dtype, device=k.device)

    def at(self, length: int) -> int:
        """So many tokens are there; what a graph captured now would hold of that."""
        self.length.fill_(length)
        return 0

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See `llama.Attend`."""
        call = self.call(layer, qkv)
        return tandem_attn.flash_attn_with_kvcache(**call, out=self.out, workspace=self.workspace)

    def call(self, layer: int, qkv: torch.Tensor) -> dict:
        """Arguments, without the memory to work in."""
        q, k, v = qkv.split([self.shape.heads, self.shape.kv_heads, self.shape.kv_heads], dim=2)
        call = dict(q=q, k_cache=self.k[layer], v_cache=self.v[layer], k=k, v=v, causal=True)
        call |= dict(rotary_cos=self.cos, rotary_sin=self.sin, rotary_interleaved=False)
        return call | dict(cache_seqlens=self.length)

    @functools.cached_property
    def workspace(self) -> torch.Tensor:
        """For one layer after the other."""
        return tandem_attn.decode_workspace(**self.call(0, self._some_qkv()))

    def label(self) -> str:
        """Which backend answers, and how."""
        found = tandem_attn.explain_with_kvcache(**self.call(0, self._some_qkv()))
        return f"{found.backend}: {found.config}"

    def written(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values behind so many tokens."""
        return self.k[:, 0, length], self.v[:, 0, length]

    def _some_qkv(self) -> torch.Tensor:
        heads = self.shape.heads + 2 * self.shape.kv_heads
        return self.out.new_zeros(1, 1, heads, self.shape.head_dim)


class Sdpa:
    """A static cache, heads before tokens as torch wants them, of which each length sees a view."""

    def __init__(self, model: Model, k: torch.Tensor, v: torch.Tensor) -> None:
        self.shape, self.k, self.v = model.shape, k, v  # (layers, kv_heads, capacity, head_dim)
        self.length = 0
        cos, sin = rotary_tables(model.shape, k.shape[2], model.device)
        # so that four kernels rotate: (a, b) cos + (b, a) (-sin, sin)
        self.cos, self.sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def at(self, length: int) -> int:
        """So many tokens are there; what a graph captured now would hold of that."""
        self.length = length
        return length

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See `llama.Attend`."""
        n, heads, kv_heads = self.length, self.shape.heads, self.shape.kv_heads
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=2)
        swapped = qk.roll(self.shape.head_dim // 2, -1)
        qk = torch.addcmul(swapped * self.sin[n], qk, self.cos[n]).to(qkv.dtype)
        q, k = qk.split([heads, kv_heads], dim=2)
        self.k[layer, :, n] = k[0, 0]
        self.v[layer, :, n] = v[0, 0]
        seen = F.scaled_dot_product_attention(q.transpose(1, 2), *self._prefix(layer), enable_gqa=True)
        return seen.transpose(1, 2)

    def _prefix(self, layer: int) -> list[torch.Tensor]:
        """Keys and values in use, (1, kv_heads, length + 1, head_dim)."""
        return [x[layer, None, :, : self.length + 1] for x in (self.k, self.v)]

    def label(self) -> str:
        """Which of torch's backends answers."""
        q = self.k.new_zeros(1, self.shape.heads, 1, self.shape.head_dim)
        choice = getattr(torch, "_fused_sdp_choice", None)  # no public way to ask
        if choice is None:
            return ""
        return torch.nn.attention.SDPBackend(choice(q, *self._prefix(0), enable_gqa=True)).name.lower()

    def written(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values behind so many tokens."""
        return self.k[:, :, length], self.v[:, :, length]


class Plain:
    """Softmax written out, over the cache of `Sdpa`, which no kernel of ours touches and this only reads.

    Scores and softmax are at least in float32, as in every fused kernel; all else is in `dtype`.
    """

    def __init__(self, cache: Sdpa, dtype: torch.dtype, length: int) -> None:
        self.cache, self.dtype, self.length = cache, dtype, length
        self.new: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each layer

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See `llama.Attend`."""
        shape, n, kind = self.cache.shape, self.length, torch.promote_types(self.dtype, torch.float32)
        q, k, v = qkv[0, 0].split([shape.heads, shape.kv_heads, shape.kv_heads])
        cos, sin = (table[n].to(kind) for table in (self.cache.cos, self.cache.sin))
        half = shape.head_dim // 2
        q, k = ((x * cos + x.roll(half, -1) * sin).to(self.dtype) for x in (q, k))
        self.new.append((k, v))
        keys, values = (
            torch.cat((x[layer, :, :n].to(kind), new[:, None].to(kind)), 1)
            for x, new in ((self.cache.k, k), (self.cache.v, v))
        )
        scores = q.unflatten(0, (shape.kv_heads, -1)).to(kind) @ keys.mT * shape.head_dim**-0.5
        weights = scores.softmax(-1).to(self.dtype).to(kind)
        return (weights @ values).to(self.dtype).view(1, 1, shape.heads, shape.head_dim)

    @classmethod
    def answer(cls, theirs: Decoder, dtype: torch.dtype, length: int) -> Answer:
        """The step of a decoder by `Sdpa`, with plain attention."""
        plain = cls(theirs.attention, dtype, length)
        logits = theirs.model.step(theirs.token, plain.attend, dtype)
        keys, values = (torch.stack(new) for new in zip(*plain.new, strict=True))
        return Answer(logits, keys, values)


class Decoder:
    """A model with one way of attending, ready to run at any number of tokens in the cache."""

    def __init__(self, model: Model, attention: Tandem | Sdpa, token: torch.Tensor) -> None:
        self.model, self.attention, self.token = model, attention, token
        self.logits = torch.empty(model.shape.vocabulary, dtype=model.shape.dtype, device=model.device)
        self.chosen = torch.zeros((), dtype=torch.int64, device=model.device)
        self._graph, self._holds = None, -1

    def at(self, length: int) -> Callable[[], object]:
        """What to run for a token behind so many; on a GPU the replay of a graph."""
        holds = self.attention.at(length)
        if self.model.device.type != "cuda":
            return self._step
        if self._holds != holds:
            self._graph = None  # its memory goes first
            self._graph, self._holds = _captured(self._step), holds
        return self._graph.replay

    def answer(self, run: Callable[[], object], length: int) -> Answer:
        """What a run computes."""
        self.logits.fill_(float("nan"))
        run()
        return Answer(self.logits.clone(), *self.attention.written(length))

    def _step(self) -> None:
        logits = self.model.step(self.token, self.attention.attend)
        self.logits.copy_(logits)
        self.chosen.copy_(logits.argmax())


def decoders(model: Model, capacity: int) -> dict[str, Decoder]:
    """Ours and torch's, by name, with the same random keys and values in their caches."""
    shape, layers = model.shape, len(model.layers)
    token = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    k = model.normal(layers, 1, capacity, shape.kv_heads, shape.head_dim, std=SHARPNESS)
    v = model.normal(layers, 1, capacity, shape.kv_heads, shape.head_dim)
    theirs = [x[:, 0].transpose(1, 2).contiguous() for x in (k, v)]
    found = {"tandem": Tandem(model, k, v), "sdpa": Sdpa(model, *theirs)}
    return {name: Decoder(model, attention, token) for name, attention in found.items()}


def what_is_wrong(found: Answer, exact: Answer, low: Answer) -> str:
    """What is wrong with an answer, in one line; empty if it passes. The rule is that of `check`, but wider:
    what rounding does in one layer moves everything after it, so an answer is one draw and not many."""
    try:
        for name, x, right, near in zip(Answer._fields, found, exact, low, strict=True):
            band = torch.finfo(x.dtype).eps * float(right.abs().max())
            assert_within_budget(x, right, near, name, FACTOR, band, MEAN_FACTOR)
    except AssertionError as error:
        return str(error).partition("\n")[0]
    return ""


def _captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of a step, after some on a stream of their own, as capturing wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph
