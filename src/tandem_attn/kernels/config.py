"""What the forward kernel is compiled for, and which choice measured best.

`ForwardConfig` is everything the kernel knows at compile time; `forward_config(spec)` finds the row of the
table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import sys
from functools import cache, cached_property

import torch

from tandem_attn.device.gluon import COPIES_OPERANDS, gl
from tandem_attn.device.mask import CausalMask, FullMask, NoMask, WindowMask
from tandem_attn.device.precision import Descaled, Plain
from tandem_attn.device.schedule import DenseTiles, PlainTiles, VarlenTiles
from tandem_attn.device.sequence import Dense, Varlen
from tandem_attn.spec import AttentionSpec

ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
GLUON_ELEMENTS = {"bf16": gl.bfloat16, "fp16": gl.float16, "fp8e4nv": gl.float8e4nv}  # as Triton spells them
NATIVE_HEAD_DIMS = (64, 96, 128, 192, 256)
TILE_WIDTHS = (64, 128, 256)  # of kernels that know tiles of one piece; TMA fills the rest with zeros
SHARED_MEMORY = 227 * 1024  # what a Hopper block may use, bytes
LONG = 4096  # from this many rows and keys on, the loop alone counts
SHORT = 1024  # up to this many rows and keys, prologues and tails weigh more than the loop
L2_FOR_KEYS = 32 * 2**20  # bytes of K and V that the heads worked on at a time should fit in


def tile_width(head_dim: int) -> int:
    """The smallest of TILE_WIDTHS that holds head_dim columns."""
    return next(d for d in TILE_WIDTHS if d >= head_dim)


def column_chunks(head_dim: int) -> int:
    """Pieces of a power of two columns that make up a tile: 96 = 3 x 32, 192 = 3 x 64."""
    return 3 if head_dim % 3 == 0 else 1


def accumulator(width: int, num_warps: int = 4, element_bytes: int = 2):
    """Layout of what wgmma adds up in registers: tiles of this many columns."""
    return gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, width, 32 // element_bytes])


class Static:
    """A config as device code reads it: every attribute is a gl.constexpr, fit for shapes, layouts and
    ranges."""

    def __init__(self, config: KernelConfig):
        self._config = config

    def __getattr__(self, name: str):
        return gl.constexpr(getattr(self._config, name))

    def __eq__(self, other) -> bool:
        return isinstance(other, Static) and self._config == other._config

    def __hash__(self) -> int:
        return hash(self._config)

    def __repr__(self) -> str:
        return repr(self._config)


class KernelConfig:
    """What the configs of all kernels have: frozen dataclasses, which kernels take as a constexpr."""

    @property
    def dtype(self):
        """Of tiles, where a config names their `element`."""
        return GLUON_ELEMENTS[self.element]

    def shared_layout(self, rows: int, cols: int, dtype=None):
        """Of a tile in shared memory, as TMA and wgmma want it."""
        return gl.NVMMASharedLayout.get_default_for([rows, cols], dtype or self.dtype)

    @property
    def static(self) -> Static:
        return Static(self)

    @cached_property
    def cache_key(self) -> str:
        """What Triton's disk cache knows this value by: all fields, and the files that derive from them.

        Without it Triton would use str(), and neither an edited property nor an omitted field would count.
        """
        derived = " ".join(cls.__qualname__ for cls in self.derived_policies)
        return f"{self!r} {derived} {_digest_of_sources(type(self))}"

    @property
    def derived_policies(self) -> tuple[type, ...]:
        """Policies that follow from the fields: their digests are no part of repr()."""
        return ()


@cache
def _digest_of_sources(cls: type) -> str:
    """Of the files that a config class and its bases stand in."""
    files = {sys.modules[base.__module__].__file__ for base in cls.__mro__ if base is not object}
    return hashlib.sha256(b"".join(pathlib.Path(x).read_bytes() for x in sorted(files))).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class ChunkedConfig(KernelConfig):
    """Of kernels of prefill and training, whose tiles may consist of several pieces side by side."""

    element: str  # "bf16" or "fp16"; the forward knows "fp8e4nv" too, which is e4m3
    head_dim: int  # columns of a tile of Q or K: those of the question or more
    head_dim_v: int
    Mask: type
    Sequences: type
    Schedule: type
    softcap: bool = False

    @property
    def qk_chunks(self) -> int:
        return column_chunks(self.head_dim)

    @property
    def v_chunks(self) -> int:
        return column_chunks(self.head_dim_v)

    @property
    def qk_width(self) -> int:
        return self.head_dim // self.qk_chunks

    @property
    def v_width(self) -> int:
        return self.head_dim_v // self.v_chunks


@dataclasses.dataclass(frozen=True)
class ForwardConfig(ChunkedConfig):
    """Compile-time facts of the forward kernel. Validated here and nowhere else."""

    tile_m: int = 64  # query rows of one consumer warpgroup
    tile_n: int = 128  # keys of a block
    num_consumers: int = 2
    num_stages: int = 2  # of K and of V
    q_stages: int = 1
    q_in_registers: bool = False  # frees Q's buffer at the start of a tile
    o_parts: int = 1  # O leaves through shared memory in this many column parts,
    o_buffers: int = 1  # of which this many may be under way
    lazy_rescale: bool = False  # scale O down only when the maximum has grown by 2**8
    rescale_first: bool = False  # scale O before the exponentials, not after
    pingpong: bool = True
    named_release: bool = False  # stages go back by hardware barriers, not by mbarriers
    skip: bool = False  # a consumer hands back unread the key blocks that none of its rows may see
    in_step: bool = False  # dense, dynamic: most tiles are given away beforehand, neighbours keep step
    opens_in_loop: bool = False  # a tile's first block runs in the loop of its masked blocks: less code
    out_element: str = ""  # of O, if not that of Q
    serial: bool = False  # scores, softmax and P V of a block one after the other: see forward_serial.py
    block_sums: bool = False  # wgmma adds up one block of P V at a time and fp32 the blocks; serial only
    sum_by_wgmma: bool = False  # row sums are products of P with ones; serial only
    promote: int = 0  # blocks of keys that wgmma adds up before fp32 does; 0: all

    def __post_init__(self) -> None:
        if self.head_dim not in NATIVE_HEAD_DIMS or self.head_dim_v not in NATIVE_HEAD_DIMS:
            raise ValueError(
                f"head_dim {self.head_dim}, head_dim_v {self.head_dim_v}: not in {NATIVE_HEAD_DIMS}"
            )
        if self.num_consumers not in (2, 3, 4):
            raise ValueError(f"num_consumers={self.num_consumers}: 2, 3 or 4")
        if self.v_chunks > 1 and self.o_parts != self.v_chunks:
            raise ValueError(f"o_parts={self.o_parts}: must be the {self.v_chunks} chunks of V")
        if self.o_buffers > self.o_parts or self.o_parts % self.o_buffers:
            raise ValueError(f"o_buffers={self.o_buffers}: must divide o_parts={self.o_parts}")
        if self.skip and self.tile_m * (self.num_consumers - 1) > self.tile_n:
            raise ValueError(f"skip: more than one block of {self.tile_n} keys could be skipped: {self}")
        if self.opens_in_loop and not self.Mask.masks.value:
            raise ValueError(f"opens_in_loop: {self.Mask.__name__} has no loop of masked blocks")
        if self.block_sums and not self.serial:
            raise ValueError(f"block_sums: only in the serial schedule: {self}")
        if self.serial and self.promote:
            raise ValueError(f"promote={self.promote}: not in the serial schedule: {self}")
        if self.serial and (self.rescale_first or self.skip or self.in_step or self.opens_in_loop):
            raise ValueError(f"serial: another loop than these flags are about: {self}")
        if self.sum_by_wgmma and not (self.serial and self.fp8):
            raise ValueError(f"sum_by_wgmma: only for e4m3 in the serial schedule: {self}")
        if self.fp8 and self.opens_in_loop:
            raise ValueError(f"opens_in_loop: would look for the unit of a block before the first: {self}")
        if self.fp8 and self.tile_n % 128:
            raise ValueError(f"tile_n={self.tile_n}: e4m3 has a factor per 128 keys")
        if self.named_release and self.num_stages != 2:
            raise ValueError(f"named_release with {self.num_stages} stages: hardware barriers are for 2")
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(f"{self.shared_memory} bytes of shared memory, {SHARED_MEMORY} exist: {self}")

    @property
    def o_width(self) -> int:
        return self.head_dim_v // self.o_parts

    @property
    def tile_rows(self) -> int:
        """Query rows of a whole tile."""
        return self.tile_m * self.num_consumers

    @property
    def fp8(self) -> bool:
        return self.element == "fp8e4nv"

    @property
    def element_bytes(self) -> int:
        return 1 if self.fp8 else 2

    @property
    def out_dtype(self):
        return GLUON_ELEMENTS[self.out_element or self.element]

    @property
    def Precision(self) -> type:
        return Descaled if self.fp8 else Plain

    @property
    def derived_policies(self) -> tuple[type, ...]:
        return (self.Precision,)

    @property
    def v_transposed(self) -> bool:
        """wgmma reads 8-bit operands along the summed dimension only: V's tiles are columns of keys."""
        return self.fp8

    @property
    def lazy_step(self) -> float:
        """Growth of a maximum, in base 2, that is put up with before O is scaled down: P may reach 2 to the
        power of it, exact in fp32, harmless in 16 bits."""
        return 2.0 if self.fp8 else 8.0

    @property
    def p_shift(self) -> float:
        """log2 of what P is multiplied by. e4m3 ends at 448: P at its largest becomes 256, so that what is
        lost below 2**-9 is as little as can be."""
        return 8.0 - self.lazy_step * self.lazy_rescale if self.fp8 else 0.0

    @property
    def q_for_each_block(self) -> bool:
        """Whether descriptors of Q are made for every block of keys. If they are made before each loop, ptxas
        takes them for those of the loop before, which may have been skipped (CUDA 12.8; testing/sass.py,
        ambiguous_descriptors). Of all kernels only these were wrong."""
        in_shared = self.serial and not self.q_in_registers
        return in_shared and self.head_dim == 256 and self.Mask.masks.value

    @property
    def integer_maxima(self) -> bool:
        """Whether maxima of rows are found among integers, three at a time: 1 to 7% at head_dim 64 and 128;
        at 256 1% where e4m3 has no mask, else 1 to 2% slower (H200, 2026-11-30)."""
        return self.head_dim <= 128 or (self.fp8 and not self.Mask.masks.value)

    @property
    def q_layout(self):
        return self.shared_layout(self.tile_m, self.qk_width)

    @property
    def k_layout(self):
        return self.shared_layout(self.tile_n, self.qk_width)

    @property
    def v_layout(self):
        return self.shared_layout(self.tile_n, self.v_width)

    @property
    def o_layout(self):
        return self.shared_layout(self.tile_m, self.o_width, self.out_dtype)

    @property
    def s_accumulator(self):
        return accumulator(self.tile_n, element_bytes=self.element_bytes)

    @property
    def sum_accumulator(self):
        return accumulator(8, element_bytes=self.element_bytes)

    @property
    def ones_layout(self):
        return gl.NVMMASharedLayout.get_default_for([8, self.tile_n], self.dtype)

    @property
    def o_accumulator(self):
        return accumulator(self.v_width, element_bytes=self.element_bytes)

    @cached_property
    def shared_memory(self) -> int:
        """Bytes of tiles in shared memory, barriers and mail not counted (under 1 KB)."""
        q = self.q_stages * self.tile_rows * self.head_dim
        kv = self.num_stages * self.tile_n * (self.head_dim + self.head_dim_v)
        o = self.num_consumers * self.o_buffers * self.tile_m * self.o_width
        return self.element_bytes * (q + kv) + 2 * o

    @property
    def k_before_q(self) -> bool:
        """Whether the first K of a tile is loaded before its Q.

        Where Q's only buffer is in use until the tile before ends, the producer would wait for it with an
        empty stage of K at hand: 2 to 4% at head_dim 256, 512 tokens. Where that buffer is free early, Q
        first is 1 to 2% better (128; H200, 2026-11-25).
        """
        return self.q_stages == 1 and not self.q_in_registers

    @property
    def maxnreg(self) -> int:
        """Registers per thread at launch: 3 to 5 warpgroups' worth (the producer warp is padded to one)."""
        return {2: 168, 3: 128, 4: 96}[self.num_consumers]

    @property
    def worker_registers(self) -> list[int]:
        """Registers of the partitions after the first, which gets what is left; multiples of 8."""
        return {2: [240, 24], 3: [160, 160, 32], 4: [112, 112, 112, 24]}[self.num_consumers]

    def __str__(self) -> str:
        tile = f"{self.num_consumers}x{self.tile_m} rows x {self.tile_n} keys"
        fields = (f.name for f in dataclasses.fields(self) if f.type == "bool")
        flags = [name for name in fields if getattr(self, name)]
        policies = (c.__name__ for c in (self.Mask, self.Sequences, self.Schedule))
        return (
            f"{self.element} head_dim {self.head_dim}/{self.head_dim_v}, {tile}, {self.num_stages} stages, "
            f"Q x{self.q_stages}, {', '.join(policies)}, {', '.join(flags) or 'no flags'}, "
            f"{self.shared_memory // 1024} KB shared"
        )


# One row per (head_dim, head_dim_v) and kind of problem; the first that fits is used, for float16 as for
# bfloat16 (same instructions and bytes). Figures: TFLOPS in bf16 on an H200, 2026-11-25, full / causal unless
# said, from benchmarks/results/forward-h200.json and, for 96 and 192, notes/2026-11-25-forward.md.
_TUNED: dict[tuple[int, int], list[tuple[str, dict]]] = {
    (64, 64): [
        # 192 rows hold too little of a window. 1024 at 16k: 351 of the visible pairs; three consumers: 292
        ("window", dict(q_in_registers=True, lazy_rescale=True, rescale_first=True)),
        # 192 rows waste too much of a short triangle. 512 tokens: 285, 1k: 379; not in_step: 2 to 3% less
        ("causal short", dict(q_in_registers=True, lazy_rescale=True, rescale_first=True, in_step=True)),
        # opens_in_loop loses 1 to 3% here
        ("causal packed", dict(num_consumers=3, q_stages=2, rescale_first=True, skip=True)),
        # 2k: 451, 8k: 557, 16k: 576; less without skip 3%, in_step 2%, opens_in_loop 1%
        (
            "causal",
            dict(
                num_consumers=3,
                q_stages=2,
                rescale_first=True,
                skip=True,
                in_step=True,
                opens_in_loop=True,
            ),
        ),
        # 512: 441, 1k: 476; rescale_first loses 4% at 512
        ("short", dict(num_consumers=3, q_stages=2)),
        # 2k: 548, 8k: 599
        ("", dict(num_consumers=3, q_stages=2, rescale_first=True)),
    ],
    # 8k: 617 / 586
    (96, 96): [("", dict(q_in_registers=True, o_parts=3, o_buffers=3))],
    (128, 128): [
        # 4k: 702, 8k: 740, 16k: 760; 1 to 1.6% less without named_release
        ("causal long", dict(q_in_registers=True, named_release=True)),
        # 512: 612 / 371, 2k: 719 / 632, 8k: 738 full; packed, 2k on average: 691 / 631; window 1024 at 16k:
        # 551 of the visible pairs
        ("", dict(q_in_registers=True)),
    ],
    # 8k causal: 761
    (192, 128): [("", dict(o_parts=2))],
    # 8k: 678 / 677
    (192, 192): [("", dict(tile_n=64, o_parts=3, pingpong=False))],
    (256, 256): [
        # 512: 598 / 376, 1k: 699 / 528; ping-pong gains 2% here and loses up to 1% above
        ("short", dict(tile_n=64, o_parts=2, lazy_rescale=True)),
        # 2k: 752 / 648, 8k: 794 / 773, 16k: 799 / 797
        ("", dict(tile_n=64, o_parts=2, lazy_rescale=True, pingpong=False)),
    ],
}


def tuned_row(table: dict, spec: AttentionSpec, mask: type) -> tuple[tuple[int, int], dict]:
    """(head shape, choice) of the first row that fits: of this head shape or the smallest that holds it."""
    kinds = {WindowMask: {"window"}, CausalMask: {"causal"}}.get(mask, set())
    if max(spec.seqlen_q, spec.seqlen_k) <= SHORT:
        kinds = kinds | {"short"}
    elif min(spec.seqlen_q, spec.seqlen_k) >= LONG:
        kinds = kinds | {"long"}
    if spec.varlen:
        kinds = kinds | {"packed"}
    shapes = [s for s in table if s[0] >= spec.head_dim and s[1] >= spec.head_dim_v]
    shape = min(shapes, key=lambda s: (s[0] + s[1], s))
    for needs, choice in table[shape]:
        if set(needs.split()) <= kinds:
            return shape, choice
    raise AssertionError(f"no row for {shape} {kinds}")


def forward_policies(spec: AttentionSpec, mask: type) -> dict[str, type | bool]:
    """The fields of a ForwardConfig that follow from the kind of question."""
    return dict(
        Mask=mask,
        Sequences=Varlen if spec.varlen else Dense,
        Schedule=VarlenTiles if spec.varlen else DenseTiles if mask is CausalMask else PlainTiles,
        softcap=spec.softcap > 0.0,
    )


def _with_room_for_copies(choice: dict, mask: type, head_dim: int) -> dict:
    """The row for a Triton that copies operands: Q stays in shared memory, and three consumers only do what
    leaves them registers. Compiled without a spill in any loop; not measured on a GPU."""
    roomy = dict(choice, q_in_registers=False)
    if choice.get("q_in_registers") and head_dim == 64:
        roomy["q_stages"] = 2
    if choice.get("num_consumers") == 3:
        two = dict(num_consumers=2, skip=False, opens_in_loop=False)
        roomy |= dict(rescale_first=False) if mask is NoMask else two
    return roomy


def mask_of(spec: AttentionSpec) -> type:
    """The mask that serves any lengths."""
    if spec.window.left >= 0 or spec.window.right > 0:
        return WindowMask
    return CausalMask if spec.window.right == 0 else FullMask


def without_edges(mask: type, spec: AttentionSpec, tile_n: int) -> type:
    """The mask, or none where every row sees every key of whole blocks."""
    return NoMask if mask is FullMask and not spec.varlen and spec.seqlen_k % tile_n == 0 else mask


def forward_config(spec: AttentionSpec, copies_operands: bool = COPIES_OPERANDS) -> ForwardConfig:
    """The compile-time configuration for a question that the gluon backend accepts.

    `copies_operands`: of the Triton that compiles it, see device/gluon.py.
    """
    mask = mask_of(spec)
    (head_dim, head_dim_v), choice = tuned_row(_TUNED, spec, mask)
    mask = without_edges(mask, spec, choice.get("tile_n", 128))
    if copies_operands:
        choice = _with_room_for_copies(choice, mask, head_dim)
    return ForwardConfig(
        element="bf16" if spec.dtype == torch.bfloat16 else "fp16",
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        **forward_policies(spec, mask),
        **choice,
    )
