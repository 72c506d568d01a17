"""How many packed rows and keys a tile of decoding has, and who works on it: which choice measured best."""

from __future__ import annotations

from typing import NamedTuple

from tandem_attn.device.decode_groups import GroupRows
from tandem_attn.device.decode_rows import WarpKeys, WarpRows
from tandem_attn.spec_decode import SPLIT_STEP, DecodeSpec

# more pages to a tile, and starting their loads takes longer than gathering (8: 0.61 of contiguous, over e4m3
# 87 us where gathering takes 76; H200, 2026-11-25 and 30)
MAX_PIECES = 4
PIECE_ROWS = 8  # keys of a piece, at least: the unit in which shared memory is swizzled


def tile_rows(spec: DecodeSpec) -> int:
    """Packed rows of an item: the fewest that a tensor core instruction takes and that hold a sequence's."""
    rows = spec.seqlen_q * spec.group_size
    if spec.fp8 and 16 < rows <= 32 and max(spec.head_dim, spec.head_dim_v) <= 128:
        return 32
    return 16 if rows <= 16 else 64 if rows <= 64 else 128


def blocks_of_rows(spec: DecodeSpec) -> int:
    """Items of a sequence."""
    return -(-spec.seqlen_q * spec.group_size // tile_rows(spec))


def pieces_of_a_tile(page_size: int, tile_n: int) -> int | None:
    """Pages that make up a tile (1: a page holds whole tiles, or there are no pages), or None: gather."""
    if page_size % tile_n == 0:
        return 1
    if page_size >= PIECE_ROWS and tile_n % page_size == 0 and tile_n // page_size <= MAX_PIECES:
        return tile_n // page_size
    return None


# Over e4m3: (warps, keys, KB of stages, programs of a multiprocessor) of a tile, by packed rows and columns.
# Twice the keys of 16 bits: some of what a tile takes does not depend on its size, and a tile has half the
# bytes to hide it. Two stages each: three are slower than so many more programs. Figures: us over 256 MB (of
# bfloat16 512 MB: 119 to 127) on an H200, 2026-11-30 and, of 16 rows, 2026-12-01.
_FP8_TILES = {
    (16, 64): (2, 128, 32, 4),  # 67, pages of 64 71; two programs of 256 keys 67 and 77, three stages 75
    (16, 128): (4, 128, 64, 2),  # 64; one program 65, 2 warps 68, of short sequences 69, 74, 68
    (16, 256): (2, 64, 64, 2),  # 67, and 71 in pages of 16; three stages 68 and 73
    (32, 64): (4, 128, 64, 2),  # 100; one program 122, with 256 keys 107
    (32, 128): (4, 128, 96, 1),  # 98; 64 keys 123
    (64, 64): (4, 128, 64, 1),  # 174; 64 keys 228
    (64, 128): (4, 64, 64, 1),  # 144; 32 keys 203
    (64, 256): (4, 32, 48, 1),  # 153
    (128, 64): (4, 128, 64, 1),  # 255; 64 keys 282
    (128, 128): (4, 64, 64, 1),  # 182; 32 keys 236
    (128, 256): (4, 32, 48, 1),  # 210
}


class TileChoice(NamedTuple):
    """How a tile of keys is worked on."""

    RowKind: type
    num_warps: int
    keys: int
    room: int  # KB of all stages
    residents: int  # programs of a multiprocessor


def tile_choice(spec: DecodeSpec, tile_m: int, widest: int) -> TileChoice:
    """The choice for items of tile_m packed rows and tiles of `widest` columns."""
    if spec.fp8:
        return _fp8_choice(spec, tile_m, widest)
    keys = {64: 128, 128: 64, 256: 32 if tile_m == 16 else 64}[widest]
    if tile_m == 16:
        return TileChoice(WarpKeys, 4 if widest < 256 else 2, keys, 96, 1)
    return TileChoice(WarpRows, tile_m // 16, keys, 96, 1)


def _fp8_choice(spec: DecodeSpec, tile_m: int, widest: int) -> TileChoice:
    warps, keys, room, residents = _FP8_TILES[tile_m, widest]
    if (tile_m, widest) == (16, 128) and spec.batch == 1 and not spec.page_size:
        room, residents = 96, 1  # fewer parts of the one sequence: over 64 MB 20.5 us for 21.2
    if (tile_m, widest) == (16, 64) and pieces_of_a_tile(spec.page_size, keys) is None:
        if pieces_of_a_tile(spec.page_size, 64):
            keys, room = 64, 16  # pages of 16: 94 us, gathered 102
        else:
            keys, room, residents = 256, 64, 2
    if spec.split_size is not None and spec.split_size % keys:
        keys = SPLIT_STEP
    if pieces_of_a_tile(spec.page_size, keys) is None:
        warps = 4  # two would spill where they gather
    return TileChoice(WarpKeys if tile_m <= 32 else GroupRows, warps, keys, room, residents)
