"""What `bench fp8` asks: cells of the grid, tensors to be quantized, caches, and questions about accuracy."""

from __future__ import annotations

import dataclasses

import torch

import tandem_attn
from tandem_attn.bench import cases, fp8_cache
from tandem_attn.bench.cases import BenchCase
from tandem_attn.testing import Case

# Quantization


@dataclasses.dataclass(frozen=True)
class QuantizeCase:
    """16-bit q, k and v to be made FP8 by a recipe; without one, e4m3 v to be laid out with keys last."""

    group: str
    id: str
    case: Case
    recipe: tandem_attn.Fp8Recipe | None


# 2**28 bytes of q, k and v are 21845 rows of these heads; 5 * 4352 is the next whole number of blocks
QUANTIZE_BATCH, QUANTIZE_SEQLEN = 5, 4352
TRANSPOSE_BATCH, TRANSPOSE_SEQLEN = 16, 8192  # 2**28 bytes of v, hidden size 2048
STEPS = {
    "whole": tandem_attn.Fp8Recipe(),
    "no-smoothing": tandem_attn.Fp8Recipe(smooth_k=False),
    "no-rotation": tandem_attn.Fp8Recipe(rotate=False),
    "nothing": tandem_attn.Fp8Recipe(rotate=False, smooth_k=False),
}


def _quantize() -> list[QuantizeCase]:
    shapes = {f"d{dim}": ((heads, heads), dim) for dim, heads in cases.GRID_HEADS.items()}
    shapes["gqa32x8-d128"] = ((32, 8), 128)
    found = [
        QuantizeCase(
            "quantize", f"quantize-{name}-{step}", _square(QUANTIZE_BATCH, QUANTIZE_SEQLEN, *shape), how
        )
        for name, shape in shapes.items()
        for step, how in STEPS.items()
    ]
    for dim, heads in cases.GRID_HEADS.items():
        case = _square(TRANSPOSE_BATCH, TRANSPOSE_SEQLEN, (heads, heads), dim)
        found.append(QuantizeCase("quantize", f"transpose-v-d{dim}", case, None))
    return found


# Accuracy


@dataclasses.dataclass(frozen=True)
class Row:
    """A way of answering: from which 16-bit type, and by which recipe that becomes FP8, if it does."""

    dtype: torch.dtype = torch.float16
    recipe: tandem_attn.Fp8Recipe | None = None
    paper: float | None = None  # RMSE of the FlashAttention-3 paper's table 3
    standard: bool = False  # plain attention that rounds scores and probabilities, not our functions


STANDARD, BASELINE, PAPER = "fp16-standard", "fp8-per-tensor", "fp8-paper"
FULL, V_SMOOTHED = "fp8-full", "fp8-v-mean-off"
ROWS = {
    STANDARD: Row(paper=3.2e-4, standard=True),
    "fp16": Row(paper=1.9e-4),
    "bf16": Row(torch.bfloat16),
    BASELINE: Row(recipe=tandem_attn.Fp8Recipe(False, False, "tensor"), paper=2.4e-2),
    "fp8-no-rotation": Row(recipe=tandem_attn.Fp8Recipe(False, False, "block"), paper=2.4e-2),
    "fp8-no-blocks": Row(recipe=tandem_attn.Fp8Recipe(True, False, "tensor"), paper=9.3e-3),
    PAPER: Row(recipe=tandem_attn.Fp8Recipe(True, False, "block"), paper=9.1e-3),
    FULL: Row(recipe=tandem_attn.Fp8Recipe()),
    V_SMOOTHED: Row(recipe=tandem_attn.Fp8Recipe(smooth_v=True)),
}


@dataclasses.dataclass(frozen=True)
class Means:
    """Standard deviations of what each channel of a head's K and V lies around."""

    k: float = 0.0
    v: float = 0.0


NO_MEANS = Means()


@dataclasses.dataclass(frozen=True)
class RecipeCase:
    """A row of the paper's table: RMSE on inputs with outliers, and speed at the same shape."""

    group: str
    id: str
    case: Case
    row: str  # of ROWS
    means: Means = NO_MEANS


# The paper does not say of which shape its inputs are. Its figures in the order of ROWS, and those emulated
# on a CPU (fp16: P and output rounded; FP8: P in e4m3) against float64 of the inputs before they had 16 bits:
#   the paper               3.2e-4  1.9e-4  2.4e-2  2.4e-2  9.3e-3  9.1e-3
#   head_dim 128, 4k keys   2.2e-4  1.6e-4  1.8e-2  1.6e-2  7.9e-3  8.2e-3
#   head_dim 128, 8k        3.1e-4  1.7e-4  2.5e-2  2.3e-2  9.6e-3  9.3e-3
#   head_dim 128, 16k       3.1e-4  1.8e-4  2.8e-2  2.7e-2  9.6e-3  9.5e-3
#   head_dim 64, 4k         3.1e-4  2.4e-4  3.2e-2  2.2e-2  1.5e-2  1.4e-2
#   head_dim 256, 8k        2.4e-4  1.6e-4  2.9e-2  2.1e-2  8.1e-3  7.6e-3
# Against float64 of the rounded inputs fp16 would be at 4e-5: that is not what they did.
PAPER_SEQLEN, PAPER_HEAD_DIM, PAPER_BATCH, PAPER_HEADS = 8192, 128, 2, 16


def _recipes() -> list[RecipeCase]:
    case = _square(PAPER_BATCH, PAPER_SEQLEN, (PAPER_HEADS, PAPER_HEADS), PAPER_HEAD_DIM)
    return [RecipeCase("recipes", f"outliers-{row}", case, row) for row in ROWS]


# The paper's inputs lie around zero. Channels of a model's keys do not, some by more than ten deviations
# (KIVI, arXiv 2402.02750; SageAttention, arXiv 2410.02367): what smoothing is for.
MEANS = Means(k=5.0, v=1.0)
MEANS_ROWS = ("fp16", "bf16", BASELINE, PAPER, FULL, V_SMOOTHED)


def _means() -> list[RecipeCase]:
    return [
        dataclasses.replace(one, group="means", id=f"means-{one.row}", means=MEANS)
        for one in _recipes()
        if one.row in MEANS_ROWS
    ]


@dataclasses.dataclass(frozen=True)
class LengthCase:
    """Relative RMSE of a few queries over so many keys, standard normal."""

    group: str
    id: str
    case: Case
    rows: tuple[str, ...] = ("fp16", FULL, V_SMOOTHED)  # of ROWS


LENGTHS = tuple(1024 * 2**i for i in range(8))  # 1k to 128k


def _lengths(lengths: tuple[int, ...] = LENGTHS, queries: int = 256, heads: int = 4) -> list[LengthCase]:
    return [LengthCase("lengths", f"keys-{_short(n)}", _few(queries, n, heads, 128)) for n in lengths]


@dataclasses.dataclass(frozen=True)
class NeedleCase:
    """One key of many matches the last query, and its V is the answer; all other numbers are noise."""

    group: str
    id: str
    case: Case
    place: int  # the needle's key
    rows: tuple[str, ...] = ("fp16", BASELINE, FULL)  # of ROWS


NEEDLE_KEYS, NEEDLE_HEADS, NEEDLE_QUERIES = 131072, 8, 128


def _needles(keys: int = NEEDLE_KEYS, heads: int = NEEDLE_HEADS) -> list[NeedleCase]:
    # some in the middle of a block of keys, some at its ends
    places = {"first": 0, "quarter": keys // 4 + 77, "half": keys // 2, "three-quarters": 3 * keys // 4 - 1}
    places["last"] = keys - 1
    case = _few(NEEDLE_QUERIES, keys, heads, 128)
    return [NeedleCase("needle", f"needle-{name}", case, place) for name, place in places.items()]


# Tiny: they show that everything runs, not how fast


SMOKE_SPEED = ("smoke-d64-full", "smoke-d64-causal", "smoke-gqa")
SMOKE_SEQLEN = 512


def _smoke() -> list:
    found: list = [one for one in cases.GROUPS["smoke"]() if one.id in SMOKE_SPEED]
    small = _square(1, 256, (4, 2), 64)
    found += [QuantizeCase("smoke", f"smoke-quantize-{step}", small, how) for step, how in STEPS.items()]
    found.append(QuantizeCase("smoke", "smoke-transpose-v", small, None))
    case = _square(1, SMOKE_SEQLEN, (2, 2), 128)
    recipes = [*_recipes(), *_means()]
    found += [dataclasses.replace(one, group="smoke", id=f"smoke-{one.id}", case=case) for one in recipes]
    found += fp8_cache.made("smoke", fp8_cache.SMOKE, fp8_cache.SMOKE[:1])
    few = _lengths((256, SMOKE_SEQLEN), 128, 2) + _needles(SMOKE_SEQLEN, 2)
    return found + [dataclasses.replace(one, group="smoke", id=f"smoke-{one.id}") for one in few]


def _square(batch: int, seqlen: int, heads: tuple[int, int], head_dim: int) -> Case:
    sizes = dict(batch=batch, seqlen_q=seqlen, seqlen_k=seqlen, heads=heads[0], kv_heads=heads[1])
    return Case(**sizes, head_dim=head_dim)


def _few(queries: int, keys: int, heads: int, head_dim: int) -> Case:
    return Case(seqlen_q=queries, seqlen_k=keys, heads=heads, kv_heads=heads, head_dim=head_dim)


def _short(seqlen: int) -> str:
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)


GROUPS = {
    "grid": cases.GROUPS["grid"],
    "quantize": _quantize,
    "recipes": _recipes,
    "means": _means,
    "lengths": _lengths,
    "needle": _needles,
    "cache": lambda: fp8_cache.made("cache", fp8_cache.SHAPES, fp8_cache.APPENDED),
    "smoke": _smoke,
}
Fp8Case = BenchCase | QuantizeCase | RecipeCase | LengthCase | NeedleCase | fp8_cache.CacheCase
