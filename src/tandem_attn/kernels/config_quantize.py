"""Compile-time facts of the kernels that make FP8: how tiles lie in registers."""

import dataclasses

from tandem_attn.device.gluon import gl
from tandem_attn.kernels.config import KernelConfig


def power_of_two(dim: int) -> int:
    """That holds so many columns, and 32 at least."""
    return max(32, 1 << (dim - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class TileConfig(KernelConfig):
    """What all kernels here have: how tiles of V lie in registers."""

    head_dim_v: int
    packed: bool
    has_seqused_k: bool

    def keys_layout(self, unit: int):
        """Of a piece [KEYS, v_width] of V: 4 rows of `unit` neighbours a thread, the other columns to 4 lanes
        (64 bytes) and warps."""
        bits = unit.bit_length() - 1
        registers = [[0, 1 << i] for i in range(bits)] + [[1, 0], [8, 0]]
        lanes = [[0, unit], [0, 2 * unit], [2, 0], [4, 0], [16, 0]]
        warps = [[32, 0], [64, 0], [0, 4 * unit], [0, 8 * unit]][: self.num_warps.bit_length() - 1]
        return gl.DistributedLinearLayout(registers, lanes, warps, [], [128, unit * self.num_warps])

    @property
    def words_layout(self):
        """Of int32 [channels, words]: 16 bytes a thread, 128 of a channel."""
        return gl.BlockedLayout([1, 4], [4, 8], [self.num_warps, 1], [1, 0])


@dataclasses.dataclass(frozen=True)
class RowsConfig(TileConfig):
    """How rows of q and k go through rotation and rotary embedding: pieces of 32 columns."""

    head_dim: int
    rotate: bool
    smooth_k: bool
    smooth_v: bool
    rotary_dim: int
    interleaved: bool

    @property
    def pieces(self) -> int:
        return -(-self.head_dim // 32)

    @property
    def columns(self) -> int:
        """A power of two, a piece at least."""
        return power_of_two(self.head_dim)

    @property
    def group(self) -> int:
        """Pieces that one Hadamard matrix mixes."""
        return (self.head_dim & -self.head_dim) // 32

    @property
    def norm(self) -> float:
        """What a product with that matrix is multiplied by: at the end, together with the inverse scale."""
        return (self.head_dim & -self.head_dim) ** -0.5 if self.rotate else 1.0

    @property
    def layout(self):
        return gl.BlockedLayout([1, 8], [8, 4], [self.num_warps, 1], [1, 0])

    @property
    def mma(self):
        return gl.NVMMADistributedLayout([2, 0], [self.num_warps, 1], [16, 8])


@dataclasses.dataclass(frozen=True)
class QuantizeConfig(RowsConfig):
    """Compile-time facts of `quantize_tiles`."""

    has_seqused_q: bool
    granularity: str
    measures: bool = False  # only the maxima of heads or tensors
    early: bool = False  # starts before the launch that it follows is over

    @property
    def num_warps(self) -> int:
        return 4 if self.widest <= 64 else 8

    @property
    def widest(self) -> int:
        return max(self.head_dim, self.head_dim_v)

    @property
    def rows(self) -> int:
        """Of q or k at a time, a part of a tile: a thread has 64 numbers of them."""
        return 128 if self.head_dim <= 128 else 64

    @property
    def parts(self) -> int:
        return 128 // self.rows

    @property
    def staged(self) -> bool:
        """Whether tiles of V, and of q and k in parts, come by shared memory. All of them: what is left of L1
        beside it has no room for loads of several programs under way."""
        return self.widest > 128

    @property
    def row_copies(self):
        """How pieces of q and k lie in shared memory if they come there: a warp reads 512 bytes on end."""
        return gl.SwizzledSharedLayout(1, 1, 1, [1, 0]) if self.parts > 1 else None

    @property
    def v_copies(self):
        """Likewise pieces of V, of 128 bytes a row: rows two apart are read together."""
        return gl.SwizzledSharedLayout(32, 2, 2, [1, 0]) if self.staged else None

    @property
    def knows_scales(self) -> bool:
        """Whether scales are known before: the pass after the one that measures."""
        return self.granularity != "block" and not self.measures

    @property
    def maxnreg(self) -> int:
        """Registers of a thread, where the compiler would take more and fewer programs be resident."""
        if self.num_warps == 4:
            return 96  # 5 programs
        return 112 if self.staged else 80  # 2 or 3 of 8 warps

    @property
    def resident(self) -> int:
        """Programs that fit on a multiprocessor by their registers and shared memory."""
        return 5 if self.num_warps == 4 else 2 if self.staged else 3

    @property
    def v_width(self) -> int:
        return 8 * self.num_warps

    @property
    def v_pieces(self) -> int:
        return -(-self.head_dim_v // self.v_width)

    @property
    def v_layout(self):
        return self.keys_layout(8)


@dataclasses.dataclass(frozen=True)
class Summing:
    """How rows lie in registers that are added up in pieces of `width` columns, `at_once` a thread."""

    dim: int
    width: int
    at_once: int
    num_warps: int

    @property
    def layout(self):
        lanes = self.width // 8
        return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [self.num_warps, 1], [1, 0])

    @property
    def together(self) -> int:
        """Rows that threads have one number of each."""
        return self.num_warps * 32 // (self.width // 8)

    @property
    def rows(self) -> int:
        """Of a step."""
        return self.together * self.at_once


@dataclasses.dataclass(frozen=True)
class KeyMeanConfig(RowsConfig):
    """Compile-time facts of `mean_of_keys`."""

    num_warps: int = 8

    @property
    def summing(self) -> Summing:
        """Pieces as elsewhere where K is turned first."""
        if self.rotary_dim:
            return Summing(self.head_dim, 32, 1, self.num_warps)
        return _whole_rows(self.head_dim, self.num_warps, 16)


@dataclasses.dataclass(frozen=True)
class ValueMeanConfig(TileConfig):
    """Compile-time facts of `sum_values` and `mean_of_values`."""

    num_warps: int = 4
    maxnreg: int = 72  # 7 programs

    @property
    def summing(self) -> Summing:
        return _whole_rows(self.head_dim_v, self.num_warps)

    @property
    def pieces(self) -> int:
        return -(-self.head_dim_v // 32)


def _whole_rows(dim: int, num_warps: int, at_once: int = 8) -> Summing:
    """A thread has 8 sums to keep, and so many loads of 16 bytes under way."""
    return Summing(dim, power_of_two(dim), at_once, num_warps)


@dataclasses.dataclass(frozen=True)
class TransposeConfig(TileConfig):
    """Compile-time facts of `transpose_keys`. Pieces are in int32 of four channels."""

    @property
    def num_warps(self) -> int:
        return 4 if self.head_dim_v <= 64 else 8 if self.head_dim_v <= 128 else 16

    @property
    def v_width(self) -> int:
        return 4 * self.num_warps

    @property
    def v_pieces(self) -> int:
        return -(-self.head_dim_v // (4 * self.v_width))

    @property
    def v_layout(self):
        return self.keys_layout(4)
