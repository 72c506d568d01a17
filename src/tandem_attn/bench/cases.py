"""The named shapes that are benchmarked, and how many floating-point operations each one is."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable

import torch

from tandem_attn.bench import UserError
from tandem_attn.testing import Case, Inputs

GRID_TOKENS = 16384  # batch * seqlen of every cell of the grid
GRID_SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
GRID_HEADS = {64: 32, 128: 16, 256: 8}  # hidden size 2048
GQA_SEQLENS = (2048, 4096, 8192, 16384, 32768)
GRADIENT_GQA_SEQLENS = (2048, 8192)
VARLEN_SEQUENCES, VARLEN_TOKENS = 32, 65536


@dataclasses.dataclass(frozen=True)
class BenchCase:
    """A question with a short name, in a group that shares a table and a geometric mean."""

    group: str
    id: str
    case: Case
    recorded_key: str | None = None  # in h200_peers.json

    @property
    def flops(self) -> int:
        return flops(self.case)


def flops(case: Case) -> int:
    """Operations of the forward: 2 matrix products of 2 operations for every (query, key, channel).

    Causal counts half of all pairs, as every FlashAttention paper does, not half and half the diagonal. With
    a window the visible pairs are counted one by one: no convention exists.
    """
    twice_pairs = sum(_twice_pairs(case, n, m) for n, m in zip(case.rows, case.keys, strict=True))
    return case.heads * (case.head_dim + case.dim_v) * twice_pairs


def _twice_pairs(case: Case, rows: int, keys: int) -> int:
    if case.window == (-1, -1):
        return rows * keys if case.causal else 2 * rows * keys
    return 2 * visible_pairs(rows, keys, *case.bounds)


def visible_pairs(rows: int, keys: int, left: int, right: int) -> int:
    """How many (query, key) pairs a window (left, right) leaves; -1 is unlimited; bottom-right aligned."""
    total = 0
    for position in range(keys - rows, keys):
        low = max(0, position - left) if left >= 0 else 0
        high = min(keys - 1, position + right) if right >= 0 else keys - 1
        total += max(0, high - low + 1)
    return total


def random_lengths(count: int, total: int, seed: int = 0) -> tuple[int, ...]:
    """`count` lengths of at least 1 that sum to `total`, evenly spread between almost nothing and twice the
    mean. The same on every machine: Python promises the sequence of random.Random(seed).random()."""
    generator = random.Random(seed)
    parts = list(itertools.accumulate(generator.random() for _ in range(count)))
    bounds = [round(total * part / parts[-1]) for part in parts]
    lengths = [b - a for a, b in itertools.pairwise([0, *bounds])]
    if min(lengths) < 1 or sum(lengths) != total:
        raise ValueError(f"seed {seed} gives an empty sequence; take another")
    return tuple(lengths)


def _mask_name(causal: bool) -> str:
    return "causal" if causal else "full"


def _grid() -> list[BenchCase]:
    """The FlashAttention-3 paper's (arXiv 2407.08608, figure 5)."""
    found = []
    for (head_dim, heads), causal, seqlen in itertools.product(
        GRID_HEADS.items(), (False, True), GRID_SEQLENS
    ):
        case = _case(GRID_TOKENS // seqlen, seqlen, (heads, heads), head_dim, causal=causal)
        key = f"d{head_dim}_c{int(causal)}_s{seqlen}"
        found.append(BenchCase("grid", f"d{head_dim}-{_mask_name(causal)}-s{seqlen}", case, key))
    return found


def _gqa(seqlens: tuple[int, ...] = GQA_SEQLENS) -> list[BenchCase]:
    """Heads of Llama 3 70B."""
    return [
        BenchCase("gqa", f"gqa-{_mask_name(causal)}-s{s}", _case(1, s, (64, 8), 128, causal=causal))
        for causal, s in itertools.product((False, True), seqlens)
    ]


def _mla() -> list[BenchCase]:
    """Prefill of DeepSeek V3."""
    case = dataclasses.replace(_case(1, 8192, (128, 128), 192, causal=True), head_dim_v=128)
    return [BenchCase("mla", "mla-d192v128-causal-s8192", case)]


def _varlen() -> list[BenchCase]:
    lengths = random_lengths(VARLEN_SEQUENCES, VARLEN_TOKENS)
    return [
        BenchCase("varlen", f"varlen-d128-{_mask_name(causal)}", _packed(lengths, 16, 128, causal))
        for causal in (False, True)
    ]


def _window() -> list[BenchCase]:
    found = []
    for head_dim, heads in ((64, 32), (128, 16)):
        case = _case(1, 16384, (heads, heads), head_dim, causal=True, window=(1024, 0))
        found.append(BenchCase("window", f"window1024-d{head_dim}-s16384", case))
    return found


def _smoke() -> list[BenchCase]:
    """Tiny: they show that everything runs, not how fast."""
    lengths = random_lengths(4, 300)
    cases = {
        "smoke-d64-full": _case(2, 128, (2, 2), 64),
        "smoke-d64-causal": _case(2, 128, (2, 2), 64, causal=True),
        "smoke-gqa": _case(1, 192, (4, 1), 128, causal=True),
        "smoke-mla": dataclasses.replace(_case(1, 128, (2, 2), 96, causal=True), head_dim_v=64),
        "smoke-varlen": _packed(lengths, 2, 64, causal=True),
        "smoke-window": _case(1, 256, (2, 2), 64, causal=True, window=(64, 0)),
    }
    return [BenchCase("smoke", name, case) for name, case in cases.items()]


def _case(batch: int, seqlen: int, heads: tuple[int, int], head_dim: int, **more) -> Case:
    sizes = dict(batch=batch, seqlen_q=seqlen, seqlen_k=seqlen, heads=heads[0], kv_heads=heads[1])
    return Case(**sizes, head_dim=head_dim, **more)


def _packed(lengths: tuple[int, ...], heads: int, head_dim: int, causal: bool) -> Case:
    sizes = dict(heads=heads, kv_heads=heads, head_dim=head_dim, causal=causal)
    return Case(**sizes, lengths_q=lengths, lengths_k=lengths)


GROUPS = {
    "grid": _grid,
    "gqa": _gqa,
    "mla": _mla,
    "varlen": _varlen,
    "window": _window,
    "smoke": _smoke,
}
# of `bench backward` and `bench train`
GRADIENT_GROUPS = GROUPS | {"gqa": functools.partial(_gqa, GRADIENT_GQA_SEQLENS)}


def select(
    groups: list[str] | None, part: str | None, device: torch.device, among: dict[str, Callable] | None = None
) -> list:
    """The cases of these groups with `part` in their name; no groups: all on a GPU, the tiny on a CPU."""
    among = GROUPS if among is None else among
    if not groups:
        groups = [name for name in among if name != "smoke"] if device.type == "cuda" else ["smoke"]
    for group in groups:
        if group not in among:
            raise UserError(f"--group is {group!r}; supported: {', '.join(among)}")
    found = [one for group in dict.fromkeys(groups) for one in among[group]()]
    kept = [one for one in found if part is None or part in one.id]
    if not kept:
        raise UserError(f"--case {part!r} is in no name; there are: {', '.join(one.id for one in found)}")
    return kept


def inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Standard normal tensors of a case, made on the device: `testing.make` would take seconds for the large.

    Layout "bshd": (batch, seqlen, heads, head_dim), or packed (total, heads, head_dim).
    """
    generator = torch.Generator(device).manual_seed(seed)

    def tensor(lengths: tuple[int, ...], heads: int, dim: int) -> torch.Tensor:
        rows = (sum(lengths),) if case.varlen else (case.batch, lengths[0])
        shape = (*rows, heads, dim)
        return torch.randn(shape, generator=generator, device=device, dtype=case.dtype)

    q = tensor(case.rows, case.heads, case.head_dim)
    k = tensor(case.keys, case.kv_heads, case.head_dim)
    v = tensor(case.keys, case.kv_heads, case.dim_v)
    kwargs: dict = {"causal": case.causal, "window_size": case.window, "softcap": case.softcap}
    if not case.varlen:
        return Inputs(q, k, v, kwargs, [])
    starts = [0, *itertools.accumulate(case.rows)], [0, *itertools.accumulate(case.keys)]
    for name, bounds in zip(("cu_seqlens_q", "cu_seqlens_k"), starts, strict=True):
        kwargs[name] = torch.tensor(bounds, dtype=torch.int32, device=device)
    kwargs |= {"max_seqlen_q": max(case.rows), "max_seqlen_k": max(case.keys)}
    slices = [[slice(*pair) for pair in itertools.pairwise(bounds)] for bounds in starts]
    return Inputs(q, k, v, kwargs, list(zip(*slices, strict=True)))


@dataclasses.dataclass
class GradientInputs(Inputs):
    """Inputs that autograd differentiates, and the gradient of the output."""

    dout: torch.Tensor  # shaped as the output

    @property
    def leaves(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.k, self.v


def differentiable(case: Case, inputs: Inputs, seed: int = 1) -> GradientInputs:
    """The same inputs with a standard normal gradient of the output."""
    q = inputs.q
    generator = torch.Generator(q.device).manual_seed(seed)
    shape = (*q.shape[:-1], case.dim_v)
    dout = torch.randn(shape, generator=generator, device=q.device, dtype=case.dtype)
    leaves = (x.requires_grad_() for x in (q, inputs.k, inputs.v))
    return GradientInputs(*leaves, inputs.kwargs, inputs.slices, dout)
