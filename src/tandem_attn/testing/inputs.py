"""Tensors from a case: seeded, in the memory layouts users have, with values that make errors visible."""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch

LAYOUTS = ("bshd", "qkvpacked", "bhsd", "expanded")
VALUES = ("normal", "integers", "uniform")
MARGIN = 8  # rows of NaN before and after what is declared, if poisoned

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One question, all but the numbers. Lengths make it varlen; seqlen_q and seqlen_k are then maxima."""

    batch: int = 1
    seqlen_q: int = 128
    seqlen_k: int = 128
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None  # None: head_dim
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    layout: str = "bshd"
    lengths_q: tuple[int, ...] | None = None
    lengths_k: tuple[int, ...] | None = None
    used_q: tuple[int, ...] | None = None  # at most lengths_q
    used_k: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}; supported: {LAYOUTS}")
        if (self.lengths_q is None) != (self.lengths_k is None):
            raise ValueError("lengths_q and lengths_k come together")
        if self.lengths_q is not None:  # the lengths are the truth
            object.__setattr__(self, "batch", len(self.lengths_q))
            object.__setattr__(self, "seqlen_q", max(self.lengths_q, default=0))
            object.__setattr__(self, "seqlen_k", max(self.lengths_k, default=0))
        if self.layout == "qkvpacked" and (self.rows != self.keys or self.dim_v != self.head_dim):
            raise ValueError("qkvpacked needs as many queries as keys and one head_dim")

    @property
    def varlen(self) -> bool:
        return self.lengths_q is not None

    @property
    def dim_v(self) -> int:
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def bounds(self) -> tuple[int, int]:
        """Window (left, right) with `causal` folded in; -1 is unbounded."""
        return (self.window[0], 0) if self.causal else self.window

    @property
    def rows(self) -> tuple[int, ...]:
        """Declared query rows of each sequence."""
        return self.used_q or self.lengths_q or (self.seqlen_q,) * self.batch

    @property
    def keys(self) -> tuple[int, ...]:
        """Declared keys of each sequence."""
        return self.used_k or self.lengths_k or (self.seqlen_k,) * self.batch

    @property
    def id(self) -> str:
        """Short name for pytest: b2-q113-k203-h8kv2-d128-causal-bf16."""
        dims = f"d{self.head_dim}" + (f"v{self.dim_v}" if self.dim_v != self.head_dim else "")
        parts = [f"b{self.batch}-q{self.seqlen_q}-k{self.seqlen_k}-h{self.heads}kv{self.kv_heads}-{dims}"]
        if self.causal:
            parts.append("causal")
        if self.window != (-1, -1):
            parts.append(f"w{self.window[0]}_{self.window[1]}")
        if self.softcap:
            parts.append(f"cap{self.softcap:g}")
        if self.varlen:
            parts.append("varlen" + ("-used" if self.used_q or self.used_k else ""))
        if self.layout != "bshd":
            parts.append(self.layout)
        return "-".join([*parts, DTYPE_NAMES[self.dtype]])


@dataclasses.dataclass
class Inputs:
    """Arguments of the public function: tensors, and `kwargs` for the rest."""

    q: torch.Tensor  # (batch, seqlen_q, heads, head_dim), varlen (total_q, heads, head_dim)
    k: torch.Tensor
    v: torch.Tensor
    kwargs: dict
    slices: list[tuple[slice, slice]]  # varlen: declared rows and keys of each sequence; empty for dense

    def sequences(self):
        """(q, k, v) of each sequence, declared rows only: (rows, heads, dim)."""
        if not self.slices:
            yield from zip(self.q, self.k, self.v, strict=True)
        for rows, keys in self.slices:
            yield self.q[rows], self.k[keys], self.v[keys]

    @property
    def scale(self) -> float:
        scale = self.kwargs.get("softmax_scale")
        return self.q.shape[-1] ** -0.5 if scale is None else scale


def make(case: Case, device="cpu", seed: int = 0, values: str = "normal", poison: bool = False) -> Inputs:
    """Tensors of a case.

    values   "normal": standard normal. "integers": in each row one key wins by 2**256, so that a correct
             result is bitwise the winner's row of v. "uniform": q is 0 and v holds small integers, so that a
             row's result is the mean of its visible rows of v, exact if their number is a power of two.
    poison   NaN in every row outside the declared lengths and in margins around them.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = _numbers(case, values, generator)
    placed = _place(case, (q, k, v), generator, poison, torch.device(device))
    kwargs: dict = {"causal": case.causal, "window_size": case.window, "softcap": case.softcap}
    if values == "integers":
        if case.softcap:
            raise ValueError("a softcap leaves no key to win by far")
        kwargs["softmax_scale"] = math.log(2.0)  # exponents of 2 are then integers, exact in float32
    slices = []
    if case.varlen:
        starts_q, starts_k = _starts(case.lengths_q), _starts(case.lengths_k)

        def int32(numbers):
            return torch.tensor(numbers, dtype=torch.int32, device=device)

        kwargs |= {"cu_seqlens_q": int32(starts_q), "cu_seqlens_k": int32(starts_k)}
        kwargs |= {"max_seqlen_q": case.seqlen_q, "max_seqlen_k": case.seqlen_k}
        used = {"seqused_q": case.used_q, "seqused_k": case.used_k}
        kwargs |= {name: int32(rows) for name, rows in used.items() if rows is not None}
        for a, rows, b, keys in zip(starts_q[:-1], case.rows, starts_k[:-1], case.keys, strict=True):
            slices.append((slice(a, a + rows), slice(b, b + keys)))
    return Inputs(*placed, kwargs, slices)


def run(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) from the public function."""
    import tandem_attn

    function = tandem_attn.flash_attn_varlen_func if case.varlen else tandem_attn.flash_attn_func
    return function(inputs.q, inputs.k, inputs.v, **inputs.kwargs, return_attn_probs=True)


def _starts(lengths: tuple[int, ...]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def _numbers(case: Case, values: str, generator: torch.Generator):
    """Per sequence contiguous (rows, heads, dim) blocks for q, k and v, declared rows only."""
    sequences = []
    for rows, keys in zip(case.rows, case.keys, strict=True):
        if values == "normal":
            q = torch.randn(rows, case.heads, case.head_dim, generator=generator)
            k = torch.randn(keys, case.kv_heads, case.head_dim, generator=generator)
            v = torch.randn(keys, case.kv_heads, case.dim_v, generator=generator)
        elif values == "integers":
            q, k = _one_key_wins(case, rows, keys, generator)
            v = torch.randint(-8, 9, (keys, case.kv_heads, case.dim_v), generator=generator)
        elif values == "uniform":
            q = torch.zeros(rows, case.heads, case.head_dim)
            k = torch.randint(-2, 3, (keys, case.kv_heads, case.head_dim), generator=generator)
            v = torch.randint(-8, 9, (keys, case.kv_heads, case.dim_v), generator=generator)
        else:
            raise ValueError(f"values is {values!r}; supported: {VALUES}")
        if case.layout == "expanded":  # one head in memory stands for all
            k, v = k[:, :1].expand_as(k), v[:, :1].expand_as(v)
        sequences.append([x.to(case.dtype) for x in (q, k, v)])
    return tuple(zip(*sequences, strict=True)) or ((), (), ())


def _one_key_wins(case: Case, rows: int, keys: int, generator: torch.Generator):
    """q and k of one sequence such that each row's score for one random visible key leads by at least 256.

    Key j carries the bits of its number as +-1, each bit `repeats` times; a query is a multiple of the
    winner's code.
    """
    bits = max(1, (max(keys, 1) - 1).bit_length())
    repeats = case.head_dim // bits
    if repeats == 0:
        raise ValueError(f"head_dim is {case.head_dim}; {keys} keys need at least {bits} to differ")
    factor = max(1, 2 ** math.ceil(math.log2(128 / repeats)))
    # a number per head swaps the codes, so that heads and groups cannot be mixed up unseen
    codings = 1 if case.layout == "expanded" else case.kv_heads
    swap = torch.randint(0, 2**bits, (codings,), generator=generator).expand(case.kv_heads)

    def code(numbers: torch.Tensor) -> torch.Tensor:
        spread = torch.arange(bits).repeat_interleave(repeats)
        signs = (numbers[..., None] >> spread & 1) * 2 - 1
        return torch.nn.functional.pad(signs, (0, case.head_dim - bits * repeats))

    k = code(torch.arange(keys)[:, None] ^ swap)
    left, right = case.bounds
    diagonal = torch.arange(rows) + keys - rows
    low = (diagonal - left).clamp(min=0) if left >= 0 else torch.zeros(rows, dtype=torch.int64)
    high = (diagonal + right).clamp(max=keys - 1) if right >= 0 else torch.full((rows,), keys - 1)
    choice = torch.rand(rows, case.heads, generator=generator) * (high - low + 1).clamp(min=1)[:, None]
    winner = (low[:, None] + choice.long()).clamp(0, max(keys - 1, 0))  # of a row that sees nothing: any
    q = factor * code(winner ^ swap.repeat_interleave(case.heads // case.kv_heads))
    return q, k


def _place(case: Case, numbers, generator: torch.Generator, poison: bool, device: torch.device):
    """Put the sequences into tensors of the case's layout; undeclared rows hold junk, or NaN if poisoned."""
    margin = MARGIN if poison else 0
    widths = (case.head_dim, case.head_dim, case.dim_v)
    heads = (case.heads, case.kv_heads, case.kv_heads)
    stored = (case.heads, 1, 1) if case.layout == "expanded" else heads

    def empty(batch: tuple[int, ...], rows: int, heads: int, width: int) -> torch.Tensor:
        """(*batch, rows, heads, width) inside a larger tensor of junk."""
        shape = (*batch, heads, rows + 2 * margin, width)
        if case.layout != "bhsd":
            shape = (*batch, rows + 2 * margin, heads, width)
        junk = torch.full(shape, math.nan) if poison else torch.randn(shape, generator=generator)
        junk = junk.to(device, case.dtype)
        if case.layout == "bhsd":
            junk = junk.transpose(-3, -2)
        return junk.narrow(-3, margin, rows)

    def parents(batch: tuple[int, ...], rows: tuple[int, int, int]):
        if case.layout == "qkvpacked":
            packed = empty(batch, rows[0], sum(heads), case.head_dim)
            return packed.split(heads, dim=-2)
        return [empty(batch, n, h, d) for n, h, d in zip(rows, stored, widths, strict=True)]

    if case.varlen:
        lengths = (case.lengths_q, case.lengths_k, case.lengths_k)
        # poisoned: rows of no sequence at the end
        tensors = parents((), tuple(sum(column) + margin for column in lengths))
        targets = [t.split([*column, margin])[:-1] for t, column in zip(tensors, lengths, strict=True)]
    else:
        tensors = parents((case.batch,), (case.seqlen_q, case.seqlen_k, case.seqlen_k))
        targets = [t.unbind(0) for t in tensors]
    for target, source in zip(targets, numbers, strict=True):
        for rows, values in zip(target, source, strict=True):
            rows[: values.shape[0]] = values[:, : rows.shape[1]].to(device)
    return [t.expand(*t.shape[:-2], h, -1) for t, h in zip(tensors, heads, strict=True)]
