"""What the backward kernel is compiled for, and which choice measured best.

`BackwardConfig`, `KeyGradientConfig` and `QueryGradientConfig` are everything the kernels know at compile
time; `backward_configs(spec)` chooses: one kernel for all gradients, or one for dK and dV and one for dQ
where the accumulators of dK and dV do not fit in registers together.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property

import torch

from tandem_attn.device.accumulate import WRITTEN
from tandem_attn.device.gluon import COPIES_OPERANDS, gl
from tandem_attn.device.schedule import DenseTiles, VarlenTiles
from tandem_attn.device.sequence import Dense, Varlen
from tandem_attn.kernels.config import (
    SHARED_MEMORY,
    ChunkedConfig,
    accumulator,
    mask_of,
    tile_width,
    without_edges,
)
from tandem_attn.spec import AttentionSpec

NUM_CONSUMERS = 2
KEYS = 64  # of a consumer
WIDTHS = (64, 128, 192, 256)  # columns of tiles
MAX_UNORDERED_KEYS = (WRITTEN.value - 1) * NUM_CONSUMERS * KEYS


def _scatters(mask: type, width: int, ordered: bool) -> bool:
    """Whether tiles of keys begin with different blocks of rows: where none waits for another. Under a causal
    mask it was of no use at head_dim 64 (H200, 2026-11-29), and above 128, where nothing is added, not tried.
    """
    useful = width == 128 or not mask.has_diagonal.value
    return useful and not mask.has_left_edge.value and not ordered


class GradientConfig(ChunkedConfig):
    """What all three kernels have: two consumers and one more warpgroup of producers and the like."""

    def __post_init__(self) -> None:
        if self.head_dim not in WIDTHS or self.head_dim_v not in WIDTHS:
            raise ValueError(f"head_dim {self.head_dim}, head_dim_v {self.head_dim_v}: not in {WIDTHS}")
        self.check_own_fields()
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(f"{self.shared_memory} bytes of shared memory, {SHARED_MEMORY} exist: {self}")

    def check_own_fields(self) -> None:
        """Raise ValueError unless what one kernel alone has is possible."""

    @property
    def row_columns(self) -> int:
        """Columns of a row of Q or K in registers: a power of two."""
        return tile_width(self.head_dim)

    @property
    def row_columns_v(self) -> int:
        return tile_width(self.head_dim_v)

    @property
    def maxnreg(self) -> int:
        """Registers per thread at launch: 3 warpgroups' worth (what is no consumer is padded to one)."""
        return 168

    @property
    def worker_registers(self) -> list[int]:
        """Registers of the partitions after the first, which gets what is left; multiples of 8."""
        return [240, 24]

    def described(self, tiles: str) -> str:
        """A line for people."""
        fields = (f.name for f in dataclasses.fields(self) if f.type == "bool")
        flags = [name for name in fields if getattr(self, name)]
        policies = (c.__name__ for c in (self.Mask, self.Sequences))
        return (
            f"{self.element} head_dim {self.head_dim}/{self.head_dim_v}, d{', d'.join(self.gradients)}: "
            f"{tiles}, {', '.join(policies)}, {', '.join(flags) or 'no flags'}, "
            f"{self.shared_memory // 1024} KB shared"
        )


class ByKeysConfig(GradientConfig):
    """What the two kernels have whose programs own keys, and that make dK and dV."""

    @property
    def scatters(self) -> bool:
        """Whether tiles of keys begin with different ones of the blocks of rows that see the whole tile."""
        return _scatters(self.Mask, self.head_dim, self.ordered)

    @property
    def with_q(self) -> bool:
        """Whether dQ is made too, added up in global memory."""
        return "q" in self.gradients

    @property
    def k_layout(self):
        return self.shared_layout(KEYS, self.qk_width)

    @property
    def v_layout(self):
        return self.shared_layout(KEYS, self.v_width)

    @property
    def p_layout(self):
        """Of P^T or dS^T."""
        return self.shared_layout(KEYS, self.tile_m)

    @property
    def stat_layout(self):
        return gl.NVMMASharedLayout(0, 32, 1)

    @property
    def s_accumulator(self):
        return accumulator(self.tile_m)

    @property
    def dk_accumulator(self):
        return accumulator(self.qk_width)

    @property
    def dv_accumulator(self):
        return accumulator(self.v_width)

    @cached_property
    def operand_bytes(self) -> int:
        """Of K, V, and the stages of Q, dO and their statistics in shared memory."""
        keys = self.tile_n * (self.head_dim + self.head_dim_v)
        rows = self.stages * self.tile_m * (self.head_dim + self.head_dim_v)
        return 2 * (keys + rows) + 2 * 4 * self.stages * self.tile_m


@dataclasses.dataclass(frozen=True)
class BackwardConfig(ByKeysConfig):
    """Compile-time facts of the kernel that makes all gradients. Validated here and nowhere else."""

    ordered: bool = False  # tiles of keys add to dQ one after the other: repeatable
    partial: bool = False  # a program does a part of a KV head's query heads, dK and dV are added up later
    tile_m: int = 64  # query rows of a block
    stages: int = 2  # of Q and of dO
    ds_stages: int = 3
    first_apart: bool = False  # the first block has its own code, without the dQ of a block before it
    packed_ds: bool = False  # dS from rounded P by a 16-bit product: fewer registers, two more roundings

    gradients = "qkv"
    joint = True  # a stage of Q, with lse, and of dO, with delta, go back together
    tile_n = NUM_CONSUMERS * KEYS

    def check_own_fields(self) -> None:
        if self.tile_m not in (64, 128):
            raise ValueError(f"tile_m={self.tile_m}: 64 or 128")
        if self.tile_m * self.head_dim != 64 * 128 or self.head_dim != self.head_dim_v:
            rows, dims = f"tile_m={self.tile_m}", f"head_dim {self.head_dim}, head_dim_v {self.head_dim_v}"
            raise ValueError(f"{rows}, {dims}: no split of dQ between consumers")
        if (self.stages, self.ds_stages) != (2, 3):
            stages = f"stages={self.stages}, ds_stages={self.ds_stages}"
            raise ValueError(f"{stages}: 2 of Q and dO and 3 of dS; with fewer, consumers race")

    @property
    def first_put(self) -> int:
        """Number of the dS of block 0 among all; where block 0 is like others, zeros come before it."""
        return 0 if self.first_apart else 1

    @property
    def skips(self) -> bool:
        """Whether the second consumer leaves out blocks that none of its keys sees."""
        return self.tile_m < self.tile_n and self.Mask.has_diagonal.value

    @property
    def dq_layout(self):
        return gl.NVMMASharedLayout(128, 32, 2)

    @property
    def dq_accumulator(self):
        return accumulator(64)

    @cached_property
    def shared_memory(self) -> int:
        """Bytes of tiles in shared memory, barriers not counted (under 1 KB)."""
        ds, dq = 2 * self.ds_stages * self.tile_n * self.tile_m, 2 * 4 * 64 * 64
        return self.operand_bytes + ds + dq

    @property
    def worker_registers(self) -> list[int]:
        return [240, 24, 24, 24]

    def __str__(self) -> str:
        return self.described(f"{NUM_CONSUMERS}x{KEYS} keys x {self.tile_m} rows, {self.stages} stages")


@dataclasses.dataclass(frozen=True)
class KeyGradientConfig(ByKeysConfig):
    """Compile-time facts of the kernel that makes dK and dV of wide heads, a consumer for each."""

    partial: bool = False
    stages: int = 2  # of Q, dO and P

    gradients = "kv"
    joint = False  # delta comes with Q, lse with dO: with what their reader hands back
    tile_n = KEYS
    tile_m = 64
    ordered = False  # nothing is added up in global memory

    @property
    def k_pieces(self) -> int:
        """Pieces of shared memory for a tile of K: a whole number of those of dV, which is staged there."""
        return -(-self.head_dim // self.v_width) * self.v_width // self.qk_width

    def check_own_fields(self) -> None:
        if self.head_dim_v > self.head_dim:
            dims = f"head_dim {self.head_dim}, head_dim_v {self.head_dim_v}"
            raise ValueError(f"{dims}: dV goes to memory by way of K's tile and does not fit")
        if self.stages < 2:
            raise ValueError(f"stages={self.stages}: dK goes to memory by way of a free one, 2 or more")

    @cached_property
    def shared_memory(self) -> int:
        """Bytes of tiles in shared memory, barriers not counted (under 1 KB)."""
        p, free = self.stages * self.tile_m, self.k_pieces * self.qk_width - self.head_dim
        return self.operand_bytes + 2 * self.tile_n * (p + free)

    def __str__(self) -> str:
        return self.described(f"{KEYS} keys x {self.tile_m} rows, {self.stages} stages")


@dataclasses.dataclass(frozen=True)
class QueryGradientConfig(GradientConfig):
    """Compile-time facts of the kernel that makes dQ of wide heads."""

    k_stages: int = 2
    v_stages: int = 1

    gradients = "q"
    tile_n = 64  # keys of a block
    tile_rows = NUM_CONSUMERS * 64  # query rows of a program

    @property
    def q_layout(self):
        return self.shared_layout(64, self.qk_width)

    @property
    def do_layout(self):
        return self.shared_layout(64, self.v_width)

    @property
    def s_accumulator(self):
        return accumulator(self.tile_n)

    @property
    def dq_accumulator(self):
        return accumulator(self.qk_width)

    @cached_property
    def shared_memory(self) -> int:
        """Bytes of tiles in shared memory, barriers not counted (under 1 KB)."""
        rows = self.tile_rows * (self.head_dim + self.head_dim_v)
        return 2 * (rows + self.tile_n * (self.k_stages * self.head_dim + self.v_stages * self.head_dim_v))

    def __str__(self) -> str:
        return self.described(f"{NUM_CONSUMERS}x64 rows x {self.tile_n} keys")


MULTIPROCESSORS = 132  # of an H100 or H200
MAX_PARTS_BYTES = 2**31  # of dK and dV by parts
_ROWS_OF_A_PROGRAM = 256  # beginning and end of a program take as long as this many rows
_ROWS_OF_A_LAUNCH = 200
_ROWS_PER_BYTE = 29 / 4e6
_SLOWER_BY_A_HEAD = 0.015  # fitted to what was fastest

_NARROW = {  # by width of heads
    64: dict(tile_m=128, packed_ds=True),
    128: dict(tile_m=64),
}


def _is_wide(spec: AttentionSpec) -> bool:
    """Whether dK and dV of a consumer's keys are too many registers."""
    return max(spec.head_dim, spec.head_dim_v) > 128


def _width(columns: int) -> int:
    """Of the tiles that hold so many columns."""
    return next(width for width in WIDTHS if width >= columns)


def _keys_of_a_program(spec: AttentionSpec) -> int:
    return (KeyGradientConfig if _is_wide(spec) else BackwardConfig).tile_n


def _ordered(spec: AttentionSpec) -> bool:
    """Whether tiles of keys add to dQ one after the other."""
    if _is_wide(spec):  # nothing is added
        return False
    # beyond so many tiles of keys, numbers drawn from an accumulator's counter would overflow
    return spec.deterministic or spec.seqlen_k >= MAX_UNORDERED_KEYS


def parts_of_group(spec: AttentionSpec) -> int:
    """In how many parts the query heads of a KV head are taken, each by programs of its own.

    One is best where there are programs enough: dK and dV are then summed up in registers. With few KV heads
    multiprocessors are idle, or wait for the longest tiles at the end; where tiles of keys add to dQ in
    order, those start last. And causal tiles of several query heads drift apart, being of different lengths:
    most likely L2 then no longer holds what they read. The estimate is in rows that a program passes, 29 per
    microsecond (H200, head_dim 128, 2026-11-29).
    """
    batch = max(spec.batch, 1)
    rows, keys = spec.total_q / batch, spec.total_k / batch
    of_a_program = _keys_of_a_program(spec)
    tiles = math.ceil(keys / of_a_program) * batch * spec.num_kv_heads
    left, right = (rows if side < 0 else side for side in (spec.window.left, spec.window.right))
    longest = min(rows, left + right + of_a_program)
    mean = longest / 2 if (spec.window.left < 0) != (spec.window.right < 0) else longest
    part_bytes = 4 * spec.total_k * spec.num_kv_heads * (spec.head_dim + spec.head_dim_v)
    scatters = _scatters(mask_of(spec), _width(max(spec.head_dim, spec.head_dim_v)), _ordered(spec))

    def estimate(parts: int) -> float:
        heads = spec.group_size // parts
        own, last = heads * mean + _ROWS_OF_A_PROGRAM, heads * longest + _ROWS_OF_A_PROGRAM
        if mean < longest:
            evenly = tiles * parts * own / MULTIPROCESSORS
            time = evenly + last if _ordered(spec) else max(evenly, last)  # the longest last, or first
            if scatters:
                time *= 1 + _SLOWER_BY_A_HEAD * (heads - 1)
        else:
            time = math.ceil(tiles * parts / MULTIPROCESSORS) * own
        if parts > 1:  # written and read
            time += _ROWS_OF_A_LAUNCH + 2 * parts * part_bytes * _ROWS_PER_BYTE
        return time

    even = (n for n in range(1, spec.group_size + 1) if spec.group_size % n == 0)
    return min((n for n in even if n == 1 or n * part_bytes <= MAX_PARTS_BYTES), key=estimate)


def backward_configs(
    spec: AttentionSpec, copies_operands: bool = COPIES_OPERANDS
) -> tuple[BackwardConfig | KeyGradientConfig, QueryGradientConfig | None]:
    """The compile-time configurations for a question that the gluon backend accepts: of the launch that goes
    by keys, and of the one that goes by queries if there is one.

    `copies_operands`: of the Triton that compiles it, see device/gluon.py.
    """
    mask = without_edges(mask_of(spec), spec, _keys_of_a_program(spec))
    head_dim, head_dim_v = _width(spec.head_dim), _width(spec.head_dim_v)
    widest = max(head_dim, head_dim_v)
    shared = dict(
        element="bf16" if spec.dtype == torch.bfloat16 else "fp16",
        head_dim=widest,
        head_dim_v=head_dim_v if _is_wide(spec) else widest,
        Mask=mask,
        Sequences=Varlen if spec.varlen else Dense,
        Schedule=VarlenTiles if spec.varlen else DenseTiles,
        softcap=spec.softcap > 0.0,
    )
    partial = parts_of_group(spec) > 1
    if _is_wide(spec):
        columns = widest + head_dim_v  # as many stages as fit
        by_keys = KeyGradientConfig(**shared, partial=partial, stages=3 if columns <= 384 else 2)
        return by_keys, QueryGradientConfig(**shared, v_stages=2 if columns < 512 else 1)
    # worth 3% at 512 tokens; with two copies of operands, or three loops, registers do not suffice for it
    first_apart = not copies_operands and not mask.has_left_edge.value
    flags = dict(ordered=_ordered(spec), partial=partial, first_apart=first_apart)
    return BackwardConfig(**shared, **_NARROW[widest], **flags), None
