"""Every backward kernel that a question can lead to: what must compile, fit and be fast.

Found by asking `backward_configs`, not by reading its table.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import torch

from tandem_attn.device.gluon import COPIES_OPERANDS
from tandem_attn.device.mask import CausalMask, FullMask, NoMask, WindowMask
from tandem_attn.device.sequence import Dense, Varlen
from tandem_attn.kernels.config_backward import (
    BackwardConfig,
    ByKeysConfig,
    GradientConfig,
    backward_configs,
)
from tandem_attn.testing.shipped import WINDOWS, question, unusual_fields

LENGTHS = (128, 1000, 4096)  # whole tiles of keys and not
RARE = ((192, 64), (256, 64), (256, 128), (256, 192))  # tiles of heads that no model has
HEAD_SHAPES = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), *RARE)
FEW_KINDS = ((CausalMask, Dense), (WindowMask, Varlen))
ORDERED_KINDS = ((NoMask, Dense), (FullMask, Varlen), (CausalMask, Dense), (WindowMask, Varlen))
USED = ("seqused_q", "seqused_k")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel: a configuration, which arguments that may be None are given, and which kernel of
    kernels/backward_rows.py it is if it is one of those."""

    config: GradientConfig
    given: tuple[str, ...] = ()
    of_rows: str = ""

    @property
    def name(self) -> str:
        """Short and unique: what matters first, then every field of the configuration that is unusual."""
        c = self.config
        parts = [self.of_rows] if self.of_rows else []
        parts += [c.element, f"{c.head_dim}x{c.head_dim_v}", c.gradients]
        parts += [c.Mask.__name__, c.Sequences.__name__, *self.given]
        said = {"element", "head_dim", "head_dim_v", "gradients", "Mask", "Sequences", "Schedule"}
        return "-".join(parts + unusual_fields(c, said))


def configs(
    dtype: torch.dtype = torch.bfloat16,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_kv_heads: int | None = None,
    copies_operands: bool = COPIES_OPERANDS,
) -> list[GradientConfig]:
    """All configurations for one element type, each once, always in the same order."""
    found: dict[GradientConfig, None] = {}
    for dims, window, varlen, length in itertools.product(
        HEAD_SHAPES, WINDOWS.values(), (False, True), LENGTHS
    ):
        asked = dict(window=window, varlen=varlen, dtype=dtype, softcap=softcap, num_kv_heads=num_kv_heads)
        spec = question(*dims, length, **asked)
        spec = dataclasses.replace(spec, deterministic=deterministic)
        by_keys, by_queries = backward_configs(spec, copies_operands)
        found |= dict.fromkeys(c for c in (by_keys, by_queries) if c)
    return list(found)


def variants(copies_operands: bool = COPIES_OPERANDS) -> list[Variant]:
    """What the tests compile: everything in bf16; what is made in order or in parts, fp16, softcap and used
    lengths where they could differ.

    fp16 changes three instructions (the rounding, the product of dS, the type of wgmma), softcap what happens
    to scores before any mask: one mask of the usual head shapes, and another of 128. Used lengths change two
    loads of a sequence.
    """
    made = functools.partial(configs, copies_operands=copies_operands)
    shipped = [Variant(c) for c in made() if _shape(c) not in RARE or _kind(c) in FEW_KINDS]
    ordered = [c for c in made(deterministic=True) if isinstance(c, BackwardConfig) and c.ordered]
    shipped += [Variant(c) for c in ordered if _kind(c) in ORDERED_KINDS]
    for c in made(num_kv_heads=1) + made(deterministic=True, num_kv_heads=1):
        kinds = FEW_KINDS[:1] if getattr(c, "ordered", False) else FEW_KINDS
        if getattr(c, "partial", False) and _kind(c) in kinds and _shape(c) not in RARE:
            shipped.append(Variant(c))
    shipped = list(dict.fromkeys(shipped))
    for c in made(torch.float16) + made(softcap=30.0):
        extra = (NoMask, Dense) if c.element == "fp16" else (WindowMask, Varlen)
        wide = (192, 128) if c.element == "fp16" else (256, 256)
        usual = _kind(c) == (CausalMask, Dense) and (_shape(c) == wide or isinstance(c, BackwardConfig))
        if usual or (_kind(c) == extra and _shape(c) == (128, 128)):
            shipped.append(Variant(c))
    packed = [c for c in made() if _kind(c) == (CausalMask, Varlen)]
    shipped += [Variant(c, USED) for c in packed if _shape(c) in ((128, 128), (192, 128))]
    return shipped + variants_of_rows(made)


def variants_of_rows(made: Callable[..., list]) -> list[Variant]:
    """The kernels before and after: by widths of rows, with and without what may be given.

    `made`: `configs`, for some Triton.
    """
    by_keys = [c for c in made() if isinstance(c, ByKeysConfig)]
    dense = [c for c in by_keys if _kind(c) == (CausalMask, Dense)]
    packed = [c for c in by_keys if _kind(c) == (CausalMask, Varlen)]
    given = ("clean_ptr", "dlse_ptr", *USED)
    shipped = [Variant(c, (), "prepare_rows") for c in dense if c.head_dim == c.head_dim_v]
    shipped += [Variant(c, given, "prepare_rows") for c in packed]
    shipped += [Variant(c, (), "finish_rows") for c in dense if c.with_q]
    shipped += [Variant(c, USED, "finish_rows") for c in packed if c.with_q]
    few = [c for c in made(num_kv_heads=1) if isinstance(c, ByKeysConfig) and c.partial]
    shipped += [Variant(c, (), "sum_parts") for c in few if _kind(c) == (CausalMask, Dense)]
    return shipped + [Variant(packed[0], used, "clear_padding") for used in ((), ("seqused",))]


def distinct_variants(copies_operands: bool = COPIES_OPERANDS) -> list[Variant]:
    """For a quicker look: bf16, one mask of each head shape, another of the usual ones, one in order."""
    shipped = []
    for v in variants(copies_operands):
        usual = v.config.element == "bf16" and not v.config.softcap and _shape(v.config) not in RARE
        if v.of_rows:
            chosen = _shape(v.config) in ((128, 128), (256, 256)) or v.of_rows == "clear_padding"
        elif v.given or not usual:
            chosen = False
        elif getattr(v.config, "ordered", False):
            chosen = _kind(v.config) == (CausalMask, Dense)
        else:
            full = _kind(v.config) == (FullMask, Varlen) and _shape(v.config) != (256, 256)
            chosen = full or _kind(v.config) == (CausalMask, Dense)
        if chosen:
            shipped.append(v)
    return shipped


def _shape(config: GradientConfig) -> tuple[int, int]:
    return config.head_dim, config.head_dim_v


def _kind(config: GradientConfig) -> tuple[type, type]:
    return config.Mask, config.Sequences
