"""The named shapes of `bench decode`, and how many bytes of K and V each one has to read."""

from __future__ import annotations

import dataclasses
import random

import torch

from tandem_attn.bench import cases
from tandem_attn.testing.decode_inputs import DecodeCase

FA3_HEADS = ((32, 8), (16, 1), (32, 32))
FA3_SHAPES = ((1, 8192), (1, 65536), (8, 8192), (32, 4096), (128, 2048))  # (batch, keys)
# the Flash-Decoding blog's table (pytorch.org, October 2023): 67 MB in every row but the last
BLOG_SHAPES = ((256, 256), (128, 512), (64, 1024), (32, 2048), (16, 4096), (8, 8192), (4, 16384), (2, 32768))
BLOG_SHAPES += ((1, 65536), (1, 131072))
BLOG_BYTES = 67108864
PAGED_SHAPES = ((128, 1, 8192), (128, 8, 8192), (128, 128, 2048), (64, 32, 4096))  # (head_dim, batch, keys)
PAGE_SIZES = (1, 16, 64, 128, 256)
RAGGED_SEQUENCES, RAGGED_SHORTEST, RAGGED_LONGEST = 32, 100, 100_000
SPLIT_SIZE = 4096


@dataclasses.dataclass(frozen=True)
class DecodeBenchCase:
    """A question with a short name, in a group that shares a table and a mean."""

    group: str
    id: str
    case: DecodeCase
    recorded_key: str | None = None  # in decode_peers.json
    against: str | None = None  # id of the case of this group whose bandwidth this one's is compared with
    flat: bool = False  # one of several cases of the group that should take the same time

    @property
    def kv_bytes(self) -> int:
        return kv_bytes(self.case)


def kv_bytes(case: DecodeCase) -> int:
    """What must be read once: all keys in use and their values, not the room behind them."""
    return sum(case.keys) * case.kv_heads * (case.head_dim + case.dim_v) * case.dtype.itemsize


def log_uniform_lengths(count: int, shortest: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """The same on every machine: Python promises the sequence of random.Random(seed).random()."""
    generator = random.Random(seed)
    return tuple(round(shortest * (longest / shortest) ** generator.random()) for _ in range(count))


def _case(heads: tuple[int, int], head_dim: int, lengths: tuple[int, ...], **more) -> DecodeCase:
    sizes = dict(heads=heads[0], kv_heads=heads[1], head_dim=head_dim)
    return DecodeCase(batch=len(lengths), capacity=max(lengths), seqlens=lengths, **sizes, **more)


def _shape(heads: tuple[int, int], head_dim: int, batch: int, keys: int) -> str:
    """h32/8-d128-b1-kv8192, as in decode_peers.json."""
    return f"h{heads[0]}/{heads[1]}-d{head_dim}-b{batch}-kv{keys}"


def _fa3() -> list[DecodeBenchCase]:
    """The shapes FlashAttention-3 was recorded with."""
    found = []
    for head_dim in (128, 64):
        for heads in FA3_HEADS:
            for batch, keys in FA3_SHAPES:
                name = _shape(heads, head_dim, batch, keys)
                found.append(DecodeBenchCase("fa3", name, _case(heads, head_dim, (keys,) * batch), name))
    return found


def _blog() -> list[DecodeBenchCase]:
    heads, found = (16, 2), []
    for batch, keys in BLOG_SHAPES:
        case, name = _case(heads, 128, (keys,) * batch), f"blog-b{batch}-kv{keys}"
        flat = kv_bytes(case) == BLOG_BYTES
        found.append(DecodeBenchCase("blog", name, case, _shape(heads, 128, batch, keys), flat=flat))
    return found


def _rows() -> list[DecodeBenchCase]:
    """Packed rows: query heads of a KV head times tokens. All of a family read the same K and V."""
    found = []
    by_tokens, by_heads = ((8, 2), (8, 4), (8, 8), (8, 16)), ((16, 1), (32, 1), (64, 1), (128, 1))
    families = ((128, 8, 8192, by_tokens), (128, 8, 8192, by_heads))
    families += ((128, 32, 4096, by_tokens), (64, 32, 4096, by_tokens))
    for head_dim, batch, keys, family in families:
        base = None
        for group, tokens in family:
            more = dict(tokens=tokens, causal=True) if tokens > 1 else {}
            case = _case((8 * group, 8), head_dim, (keys,) * batch, **more)
            name = f"rows{group * tokens}-g{group}-t{tokens}-d{head_dim}-b{batch}"
            found.append(DecodeBenchCase("rows", name, case, against=base))
            base = base or name
    return found


def _paged() -> list[DecodeBenchCase]:
    heads, found = (32, 8), []
    for head_dim, batch, keys in PAGED_SHAPES:
        lengths, shape = (keys,) * batch, _shape((32, 8), head_dim, batch, keys)
        base = f"paged-{shape.partition('-')[2]}"
        for page in (0, *PAGE_SIZES):
            case = _case(heads, head_dim, lengths, page_size=page)
            ending = f"-p{page}" if page else ""
            against = base if page else None
            found.append(DecodeBenchCase("paged", base + ending, case, shape + ending, against))
    return found


def _mixed_batch() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths of a mixed batch, and of a uniform one with as many bytes."""
    mixed = log_uniform_lengths(RAGGED_SEQUENCES, RAGGED_SHORTEST, RAGGED_LONGEST)
    return mixed, (round(sum(mixed) / len(mixed)),) * len(mixed)


def _ragged() -> list[DecodeBenchCase]:
    mixed, uniform = _mixed_batch()
    base = "ragged-uniform"
    return [
        DecodeBenchCase("ragged", base, _case((32, 8), 128, uniform)),
        DecodeBenchCase("ragged", "ragged-mixed", _case((32, 8), 128, mixed), against=base),
        DecodeBenchCase("ragged", "ragged-mixed-p128", _case((32, 8), 128, mixed, page_size=128), None, base),
    ]


def _split_size() -> list[DecodeBenchCase]:
    """Splits at fixed places, for results that do not depend on the batch, against free ones."""
    found = []
    for name, lengths in zip(("mixed", "uniform"), _mixed_batch(), strict=True):
        base = f"split-{name}-auto"
        fixed = _case((32, 8), 128, lengths, split_size=SPLIT_SIZE)
        found.append(DecodeBenchCase("split_size", base, _case((32, 8), 128, lengths)))
        found.append(DecodeBenchCase("split_size", f"split-{name}-{SPLIT_SIZE}", fixed, against=base))
    return found


def _smoke() -> list[DecodeBenchCase]:
    """Tiny: they show that everything runs, not how fast."""
    base, lengths = "smoke-b2", (256, 256)
    return [
        DecodeBenchCase("smoke", base, _case((4, 2), 64, lengths), flat=True),
        DecodeBenchCase("smoke", "smoke-b1", _case((4, 2), 64, (512,)), flat=True),
        DecodeBenchCase("smoke", "smoke-mqa", _case((4, 1), 128, (192,))),
        DecodeBenchCase(
            "smoke", "smoke-tokens", _case((4, 2), 64, lengths, tokens=4, causal=True), None, base
        ),
        DecodeBenchCase("smoke", "smoke-p1", _case((4, 2), 64, lengths, page_size=1), None, base),
        DecodeBenchCase("smoke", "smoke-p16", _case((4, 2), 64, lengths, page_size=16), None, base),
        DecodeBenchCase("smoke", "smoke-mixed", _case((4, 2), 64, (5, 300, 77)), against=base),
        DecodeBenchCase(
            "smoke", "smoke-mixed-p16", _case((4, 2), 64, (5, 300, 77), page_size=16), None, base
        ),
        DecodeBenchCase("smoke", "smoke-split-128", _case((4, 2), 64, lengths, split_size=128), None, base),
    ]


GROUPS = {
    "fa3": _fa3,
    "blog": _blog,
    "rows": _rows,
    "paged": _paged,
    "ragged": _ragged,
    "split_size": _split_size,
    "smoke": _smoke,
}


def select(groups: list[str] | None, part: str | None, device: torch.device) -> list[DecodeBenchCase]:
    """The cases of these groups with `part` in their name; no groups: all on a GPU, the tiny on a CPU."""
    return cases.select(groups, part, device, GROUPS)
