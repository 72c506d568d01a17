"""What the decode kernel is compiled for, and which choice measured best.

`DecodeConfig` is everything the kernel knows at compile time; `decode_config(spec, ...)` makes one.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import torch

from tandem_attn.device.cache_numbers import E4m3Numbers, SameNumbers
from tandem_attn.device.decode_groups import FACTOR_TILES, GroupRows
from tandem_attn.device.decode_rows import WarpKeys, WarpRows
from tandem_attn.device.gluon import gl
from tandem_attn.device.kv_tiles import GatheredTiles, LoadedTiles
from tandem_attn.device.splits import CountedSplits, SharedSplits, SizedSplits
from tandem_attn.kernels.config import SHARED_MEMORY, TILE_WIDTHS, KernelConfig, accumulator, tile_width
from tandem_attn.kernels.decode_tiles import (
    PIECE_ROWS,
    blocks_of_rows,
    pieces_of_a_tile,
    tile_choice,
    tile_rows,
)
from tandem_attn.spec_decode import DecodeSpec

MAX_ITEMS_AT_ONCE = 1024
MERGE_BYTES = 64 * 1024  # partials of an item that its last program merges; more are left to a second kernel
MERGE_BYTES_OF_ROWS = 256 * 1024  # the same for many rows, which the second kernel would take one by one
MAX_KNOWN_TOKENS = 16  # queries of a sequence up to which kernels are compiled for their number
SHARED_MEMORY_OF_ALL = 228 * 1024  # of a multiprocessor, bytes
BLOCK_RESERVED = 1024  # of it, in every block


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class DecodeConfig(KernelConfig):
    """Compile-time facts of the decode and combine kernels. Validated here and nowhere else."""

    element: str  # "bf16" or "fp16": what is multiplied
    head_dim: int  # columns of a tile of K: one of TILE_WIDTHS
    head_dim_v: int
    RowKind: type
    Tiles: type
    Splits: type
    tile_m: int  # packed rows of an item
    tile_n: int  # keys of a tile
    num_warps: int
    num_stages: int
    rows_stored: int  # rows that the results of an item are kept for: a power of two, at most tile_m
    items_at_once: int  # items that a look at the work list takes in
    # what does not change while a model runs is compiled in: every line of kernel arguments that a program
    # reads costs it 0.1 us of waiting before its first load (H200, 2026-11-25)
    heads: tuple[int, int]  # KV heads, and query heads for each of them
    dims: tuple[int, int]  # columns of K and of V that exist
    tokens: int  # queries of a sequence; 0: known at run time (many, or packed)
    amount: int  # of the splits
    per_head: int  # programs for each KV head
    page_size: int = 0
    pieces: int = 1  # pages of a tile, where a page is less than a tile
    right_edge: bool = False  # a window, or causal with several tokens
    left_edge: bool = False
    softcap: bool = False
    packed_q: bool = False
    packed_new: bool = False
    has_seqlens: bool = True
    has_leftpad: bool = False
    has_batch_idx: bool = False
    merges: bool = True  # the last program of an item merges its partials; else a second kernel does
    parts_at_once: int = 16  # partials that a look of the merge takes in
    same_strides: bool = False  # of K and V
    one_look: bool = True  # at all items
    Numbers: type = SameNumbers  # of the cache
    descale_block: int = 0  # keys that share a factor; 0: all of a sequence
    has_q_descale: bool = False
    residents: int = 1  # programs of a multiprocessor: two hide each other's waits where one cannot

    def __post_init__(self) -> None:
        if self.head_dim not in TILE_WIDTHS or self.head_dim_v not in TILE_WIDTHS:
            raise ValueError(f"head_dim {self.head_dim}, head_dim_v {self.head_dim_v}: not in {TILE_WIDTHS}")
        if self.RowKind is WarpKeys and (self.tile_m not in (16, 32) or self.tile_n % (16 * self.num_warps)):
            raise ValueError(f"WarpKeys: 16 or 32 rows, and 16 keys for each warp: {self}")
        if self.RowKind is WarpRows and self.tile_m != 16 * self.num_warps:
            raise ValueError(f"WarpRows: 16 rows for each warp: {self}")
        if self.RowKind is GroupRows and (self.tile_m not in (64, 128) or self.num_warps != 4):
            raise ValueError(f"GroupRows: 64 or 128 rows, and 4 warps for each 64: {self}")
        if self.RowKind is GroupRows and not self.scaled and self.Tiles is not LoadedTiles:
            raise ValueError("GroupRows: its producer loads by TMA")
        if self.RowKind is WarpRows and self.scaled:
            raise ValueError("WarpRows: wgmma wants a cache that is unpacked, see GroupRows")
        if self.scaled and self.element != "fp16":
            raise ValueError(f"e4m3 becomes fp16, not {self.element}")
        if self.tile_n % self.pieces or self.piece_rows % PIECE_ROWS:
            raise ValueError(f"{self.pieces} pieces of {self.piece_rows} keys: whole eighths only")
        if self.pieces > 1 and self.Tiles is not LoadedTiles:
            raise ValueError("pieces are for TMA")
        if self.num_stages < 2:
            raise ValueError(f"num_stages={self.num_stages}: at least 2")
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(f"{self.shared_memory} bytes of shared memory, {SHARED_MEMORY} exist: {self}")

    @property
    def paged(self) -> bool:
        return self.page_size > 0

    @property
    def num_kv_heads(self) -> int:
        return self.heads[0]

    @property
    def group_size(self) -> int:
        return self.heads[1]

    @property
    def one_block(self) -> bool:
        """Whether the rows of a sequence are one item."""
        return self.RowKind is WarpKeys

    @property
    def columns(self) -> int:
        return self.dims[0]

    @property
    def columns_v(self) -> int:
        return self.dims[1]

    @property
    def parts(self) -> int:
        """Operands that a chunk of a tile makes."""
        return self.Numbers.parts.value

    @property
    def scaled(self) -> bool:
        """Whether keys have factors."""
        return self.Numbers is E4m3Numbers

    @property
    def unpacks(self) -> bool:
        """Whether tiles become 16-bit ones in shared memory, where wgmma wants them."""
        return self.scaled and self.RowKind is GroupRows

    @property
    def ring_stages(self) -> int:
        """Of what wgmma reads: all stages, or those that they are unpacked into."""
        return 2 if self.unpacks else self.num_stages

    @property
    def producer_warps(self) -> int:
        return 4 if self.unpacks else 1

    @property
    def producer_registers(self) -> int:
        return 72 if self.unpacks else 40

    @property
    def consumer_registers(self) -> int:
        """Of two consumers: a multiprocessor has registers for 504 of three warpgroups."""
        return 216 if self.unpacks else 232

    @property
    def cache_dtype(self):
        """Of the cache as tiles see it."""
        return gl.int16 if self.scaled else self.dtype

    @property
    def rows(self) -> int:
        """Rows of an item that partial results are kept for."""
        return min(self.tile_m, self.tokens * self.group_size) if self.tokens else self.tile_m

    @property
    def piece_rows(self) -> int:
        return self.tile_n // self.pieces

    @property
    def num_groups(self) -> int:
        """Warpgroups that share the rows of an item, each with its own part."""
        return self.tile_m // 64 if self.RowKind is GroupRows else 1

    @property
    def group_rows(self) -> int:
        return self.tile_m // self.num_groups

    @property
    def q_in_registers(self) -> bool:
        """64 registers of Q beside 128 of O would spill."""
        return self.head_dim + self.head_dim_v < (512 if self.tile_m != 32 else 256)

    @property
    def asks_early(self) -> bool:
        """Q may take 32 registers of a thread before they are needed, not more."""
        return 2 * self.group_rows * self.head_dim <= 4 * 32 * (32 * self.num_warps)

    @property
    def by_panels(self) -> bool:
        """wgmma reads a tile as panels of 64 columns: pieces must then come panel by panel."""
        return self.pieces > 1 and self.RowKind is not WarpKeys and not self.scaled

    @property
    def k_width(self) -> int:
        """Columns of a chunk, of cache_dtype."""
        return 64 if self.by_panels else self.head_dim // self.parts

    @property
    def v_width(self) -> int:
        return 64 if self.by_panels else self.head_dim_v // self.parts

    @property
    def k_chunks(self) -> int:
        return self.head_dim // (self.k_width * self.parts)

    @property
    def v_chunks(self) -> int:
        return self.head_dim_v // (self.v_width * self.parts)

    @property
    def q_chunks(self) -> int:
        """Operands of Q, of k_width columns each."""
        return self.k_chunks * self.parts

    @property
    def o_chunks(self) -> int:
        """Accumulators, of v_width columns each."""
        return self.v_chunks * self.parts

    @property
    def out_chunks(self) -> int:
        """Of finished output: what a cache in words splits is joined."""
        return self.v_chunks

    @property
    def out_width(self) -> int:
        return self.v_width * self.parts

    @property
    def keys_layout(self):
        """Threads that copy factors."""
        return gl.BlockedLayout([1], [32], [self.num_warps], [0])

    def tile_layout(self, width: int):
        """Shared memory of a chunk of a tile that is made of pieces, each of them panels of 64 columns (of 32
        where there are no more)."""
        if self.by_panels:
            return self.shared_layout(self.tile_n, width)
        rows = [1 << i for i in range(self.tile_n.bit_length() - 1)]
        inside = [n for n in rows if n < self.piece_rows]
        panel = min(64, width)
        swizzle = {1: 8, 2: 16, 4: 32} if panel == 64 else {2: 8, 4: 16}
        bases = [[0, 1 << i] for i in range(panel.bit_length() - 1)] + [
            [n, swizzle.get(n, 0)] for n in inside
        ]
        bases += [[0, panel << i] for i in range((width // panel).bit_length() - 1)]
        return gl.SharedLinearLayout(bases + [[n, 0] for n in rows if n >= self.piece_rows], [], 1024)

    def piece_layout(self, width: int):
        return self.shared_layout(self.piece_rows, width, self.cache_dtype)

    @property
    def q_layout(self):
        return self.shared_layout(self.group_rows, self.k_width)

    def copy_layout(self, width: int):
        """Threads of the gathering copies: 16 bytes each, a warp copies whole rows next to each other."""
        return gl.BlockedLayout([1, 8], [256 // width, width // 8], [self.num_warps, 1], [1, 0])

    @property
    def copy_widths(self) -> int:
        """Whether gathering threads have the same keys of K as of V (1), or not (2)."""
        return 1 if self.head_dim == self.head_dim_v else 2

    @property
    def mma(self):
        return gl.NVMMADistributedLayout([2, 0], [self.num_warps, 1, 1], [1, 16, 8])

    @property
    def s_layout(self):
        return accumulator(self.tile_n, self.num_warps)

    @property
    def o_layout(self):
        return accumulator(self.v_width, self.num_warps)

    @property
    def merge_layout(self):
        """[partials, rows, columns]: a thread holds neighbouring columns, by fours, of a row of all partials;
        where rows are many, of few rows, because every row costs it a division and two addresses."""
        across = min(32 if self.merges_warps else 8, self.merge_width // 4)
        return gl.BlockedLayout([1, 1, 4], [1, 32 // across, across], [1, self.num_warps, 1], [2, 1, 0])

    @property
    def combine_rows(self) -> int:
        """Rows of a program of the second kernel: a warp each; or one, whose partials all warps share."""
        return 4 if self.rows >= 32 else 1

    @property
    def row_blocks(self) -> int:
        return -(-self.rows // self.combine_rows)

    @property
    def combine_layout(self):
        """[partials, rows, columns] of the second kernel."""
        across = min(32, self.combine_width // 4)
        warps = [1, 4, 1] if self.combine_rows == 4 else [4, 1, 1]
        return gl.BlockedLayout([1, 1, 4], [32 // across, 1, across], warps, [2, 1, 0])

    @property
    def kept_rows(self) -> int:
        """Rows of an output that go through shared memory when warps are merged."""
        return 8 if self.rows_stored <= 8 else self.tile_m

    @property
    def merges_warps(self) -> bool:
        return self.RowKind is WarpKeys

    @property
    def scratch_fits(self) -> int:
        """How often the outputs of all warps fit into a stage of V, which is free when they are merged; 0:
        they need memory of their own."""
        return self.tile_n * (2 // self.parts) // (4 * self.num_warps * self.kept_rows)

    @property
    def scratch_shape(self) -> list[int]:
        return [self.num_warps, self.kept_rows, self.out_width]

    @property
    def scratch_in_stages(self) -> list[int]:
        return [self.stages_held * self.scratch_fits, *self.scratch_shape]

    @property
    def scratch_layout(self):
        return gl.SwizzledSharedLayout(8, 1, 4, [2, 1, 0])

    @property
    def scratch_bytes(self) -> int:
        if not self.merges_warps:
            return 0
        o = 0 if self.scratch_fits else self.kept_rows * self.head_dim_v
        return 4 * self.num_warps * (o + 2 * self.tile_m)

    @property
    def merge_width(self) -> int:
        """Columns that the last program of an item merges at a time."""
        return self.head_dim_v if self.merges_warps else min(128, self.head_dim_v)

    @property
    def combine_width(self) -> int:
        """Columns that a program of the second kernel merges: few where partials are many."""
        return min(self.head_dim_v, max(32, 8192 // (self.parts_at_once * self.combine_rows)))

    @property
    def stage_bytes(self) -> int:
        return 2 * self.tile_n * (self.head_dim + self.head_dim_v) // self.parts

    @property
    def fixed_bytes(self) -> int:
        """Of Q, scratch, factors and unpacked tiles."""
        size = 2 * self.tile_m * self.head_dim + self.scratch_bytes
        if self.scaled:
            size += 4 * (self.tile_m + 2 * self.num_stages * self.tile_n)
        if self.unpacks:
            size += 2 * self.ring_stages * self.tile_n * (self.head_dim + self.head_dim_v)
            size += 4 * 2 * FACTOR_TILES.value * self.tile_n
        return size

    @property
    def stages_held(self) -> int:
        """Stages that there is memory for: as many as keep one program more than `residents` off a
        multiprocessor. Programs of the next launch, which come early, are then spread as evenly as these."""
        least = SHARED_MEMORY_OF_ALL // (self.residents + 1) - BLOCK_RESERVED + 1
        return max(self.num_stages, -(-(least - self.fixed_bytes) // self.stage_bytes))

    @cached_property
    def shared_memory(self) -> int:
        """Bytes of tiles and scratch, barriers not counted."""
        return self.stages_held * self.stage_bytes + self.fixed_bytes

    def __str__(self) -> str:
        fields = (f.name for f in dataclasses.fields(self) if f.type == "bool")
        flags = [name for name in fields if getattr(self, name)]
        policies = (c.__name__ for c in (self.RowKind, self.Tiles, self.Splits))
        pieces = f" in {self.pieces} pages" if self.pieces > 1 else ""
        cache = " over e4m3" if self.scaled else ""
        return (
            f"{self.element}{cache} head_dim {self.head_dim}/{self.head_dim_v}, {self.tile_m} rows x "
            f"{self.tile_n} keys{pieces}, {self.num_stages} stages, {self.num_warps} warps, "
            f"{', '.join(policies)}, {', '.join(flags) or 'no flags'}, {self.shared_memory // 1024} KB shared"
        )


def programs_per_head(num_kv_heads: int, room: int) -> int:
    """Programs for each KV head: all together as many as there is room for, or one for each head."""
    return max(1, room // num_kv_heads)


def decode_config(spec: DecodeSpec, multiprocessors: int) -> DecodeConfig:
    """The compile-time configuration for a question that the gluon backend accepts."""
    head_dim, head_dim_v = tile_width(spec.head_dim), tile_width(spec.head_dim_v)
    tile_m = tile_rows(spec)
    widest = max(head_dim, head_dim_v)
    element = "bf16" if spec.dtype == torch.bfloat16 else "fp16"
    numbers = {}
    if spec.fp8:
        element = "fp16"
        numbers = dict(
            Numbers=E4m3Numbers,
            descale_block=spec.descale_block,
            has_q_descale=bool(spec.q_descale_stride),
        )
    kind, num_warps, tile_n, stage_room, residents = tile_choice(spec, tile_m, widest)
    stage = 2 * tile_n * (head_dim + head_dim_v) // (2 if spec.fp8 else 1)
    pieces = pieces_of_a_tile(spec.page_size, tile_n)
    num_stages = max(2, stage_room * 1024 // stage)
    if pieces is None and num_warps <= 4 and kind is not GroupRows:  # more warps have no registers for two
        residents = 2
    if pieces and not spec.fp8 and (tile_m == 128 or (tile_m == 64 and widest == 64)):
        kind, num_warps = GroupRows, 4
    rows = min(tile_m, spec.seqlen_q * spec.group_size)
    items = spec.batch * blocks_of_rows(spec)
    absolute = spec.split_size is not None
    config = DecodeConfig(
        element=element,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        RowKind=kind,
        Tiles=LoadedTiles if pieces else GatheredTiles,
        Splits=SizedSplits if absolute else CountedSplits if spec.num_splits else SharedSplits,
        tile_m=tile_m,
        tile_n=tile_n,
        num_warps=num_warps,
        num_stages=num_stages,
        rows_stored=64 if kind is GroupRows else tile_m,
        items_at_once=1 if items == 1 else min(MAX_ITEMS_AT_ONCE, max(32, power_of_two(items))),
        heads=(spec.num_kv_heads, spec.group_size),
        dims=(spec.head_dim, spec.head_dim_v),
        tokens=spec.seqlen_q if spec.seqlen_q <= MAX_KNOWN_TOKENS and not spec.packed_q else 0,
        amount=spec.split_size // tile_n if absolute else max(1, spec.num_splits),
        page_size=spec.page_size,
        per_head=1,
        one_look=items <= MAX_ITEMS_AT_ONCE,
        pieces=pieces or 1,
        right_edge=spec.window.right >= 0,
        left_edge=spec.window.left >= 0,
        softcap=spec.softcap > 0.0,
        packed_q=spec.packed_q,
        packed_new=spec.packed_new,
        has_seqlens=spec.has_seqlens,
        has_leftpad=spec.has_leftpad,
        has_batch_idx=spec.has_batch_idx,
        same_strides=head_dim == head_dim_v and spec.k_stride == spec.v_stride,
        residents=residents,
        **numbers,
    )
    if kind is WarpKeys:
        # a thread merges 4 columns of a row: no fewer rows than give every thread some, nor than are swizzled
        spread = num_warps * 32 // min(32, config.out_width // 4)
        config = dataclasses.replace(config, rows_stored=min(tile_m, max(4, spread, power_of_two(rows))))
    if 2 * (config.shared_memory + BLOCK_RESERVED + 200) > SHARED_MEMORY_OF_ALL:
        config = dataclasses.replace(config, residents=1)
    per_head = programs_per_head(spec.num_kv_heads, config.residents * multiprocessors)
    parts = -(-per_head // max(1, items)) + 1
    if spec.num_splits:
        parts = spec.num_splits
    size = parts * rows * head_dim_v * 4
    merges = not absolute and size <= (MERGE_BYTES if kind is WarpKeys else MERGE_BYTES_OF_ROWS)
    if not merges:
        at_once = 16 if absolute else max(16, min(256, power_of_two(parts)))
    elif kind is WarpKeys:
        room = 64 * 32 * num_warps // (config.rows_stored * head_dim_v)  # 64 registers of a thread
        at_once = max(1, min(16, power_of_two(parts), room))
    else:
        at_once = 1
    return dataclasses.replace(config, per_head=per_head, merges=merges, parts_at_once=at_once)
