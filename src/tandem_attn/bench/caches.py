"""Tensors of `bench decode`: a cache in several copies, so that each call reads K and V from memory.

The copies hold the same numbers, so that every call must give the same result. Slots behind the end of a
sequence and pages of nobody hold numbers like all others: some peers multiply them by 0.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from tandem_attn.bench.decode_cases import kv_bytes
from tandem_attn.testing.decode_inputs import DecodeCase

ROTATED_BYTES = 268_000_000  # read between two uses of a copy: several times any L2
MOST_COPIES = 64
CPU_COPIES = 2
MEMORY_SHARE = 0.7  # of what is free; the rest is for the check and for the peers


@dataclasses.dataclass
class Caches:
    """Arguments of a case, the cache in as many copies as there are pairs."""

    q: torch.Tensor  # (batch, tokens, heads, head_dim)
    pairs: list[tuple[torch.Tensor, torch.Tensor]]  # (k_cache, v_cache)
    seqlens: torch.Tensor  # (batch,) int32
    page_table: torch.Tensor | None  # int32; 0 after the end of a sequence
    out: torch.Tensor  # memory for our results

    def keys_of(self, sequence: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V (length, kv_heads, head_dim) of one sequence."""
        if self.page_table is None:
            return tuple(x[sequence, :length] for x in self.pairs[0])
        pages = self.page_table[sequence, : math.ceil(length / self.pairs[0][0].shape[1])]
        return tuple(x[pages].flatten(0, 1)[:length] for x in self.pairs[0])


def make(case: DecodeCase, device: torch.device, seed: int = 0) -> Caches:
    """Standard normal tensors, made on the device; pages in random order."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=case.dtype)

    rows, slots, table = case.batch, case.slots, None
    if case.page_size:
        table, rows = _page_table(case, seed)
        table, slots = table.to(device), case.page_size
    q = normal(case.batch, case.each("tokens")[0], case.heads, case.head_dim)
    pair = tuple(normal(rows, slots, case.kv_heads, dim) for dim in (case.head_dim, case.dim_v))
    pairs = [pair]
    for _ in range(_copies(case, sum(x.nbytes for x in pair), device) - 1):
        pairs.append(tuple(x.clone() for x in pair))
    seqlens = torch.tensor(case.keys, dtype=torch.int32, device=device)
    return Caches(q, pairs, seqlens, table, q.new_empty(*q.shape[:-1], case.dim_v))


def copies_wanted(bytes_read: int) -> int:
    """As many as are read between two uses of a copy, and that copy."""
    return min(max(math.ceil(ROTATED_BYTES / bytes_read) + 1, 2), MOST_COPIES)


def _copies(case: DecodeCase, bytes_of_one: int, device: torch.device) -> int:
    if device.type == "cpu":
        return CPU_COPIES
    torch.cuda.empty_cache()  # what earlier cases used counts as free
    room = int(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]) // bytes_of_one
    return min(copies_wanted(kv_bytes(case)), 1 + room)


def _page_table(case: DecodeCase, seed: int) -> tuple[torch.Tensor, int]:
    """(batch, pages of the longest), and how many pages there are."""
    needed = [math.ceil(n / case.page_size) for n in case.keys]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    table = torch.zeros(case.batch, max(needed), dtype=torch.int32)
    for row, pages in zip(table, order.split(needed), strict=True):
        row[: len(pages)] = pages
    return table, sum(needed)
