"""Every forward kernel that a question can lead to: what must compile, fit and be fast.

Found by asking `forward_config`, not by reading its table, so a new row is covered as soon as a question
reaches it.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch

from tandem_attn.device.gluon import COPIES_OPERANDS
from tandem_attn.device.mask import CausalMask, FullMask, NoMask, WindowMask
from tandem_attn.device.sequence import Dense, Varlen
from tandem_attn.kernels.config import ForwardConfig, forward_config
from tandem_attn.kernels.config_fp8 import PROMOTE_FROM, fp8_config
from tandem_attn.spec import AttentionSpec, Window

WINDOWS = {"full": Window(), "causal": Window(-1, 0), "window": Window(256, 0)}
LENGTHS = (128, 1000, 1024, 2000, 4096, 16384)  # short and long, whole key blocks and not
HEAD_DIMS = tuple(range(32, 257, 32))


def question(
    head_dim: int = 128,
    head_dim_v: int | None = None,
    seqlen_q: int = 4096,
    seqlen_k: int | None = None,
    window: Window = WINDOWS["full"],
    varlen: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    softcap: float = 0.0,
    batch: int = 2,
    num_heads: int = 8,
    num_kv_heads: int | None = None,
) -> AttentionSpec:
    """A spec of contiguous tensors on a GPU that need not exist."""
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    num_kv_heads = num_kv_heads or num_heads

    def stride(rows: int, heads: int, dim: int) -> tuple[int, ...]:
        return (heads * dim, dim, 1) if varlen else (rows * heads * dim, heads * dim, dim, 1)

    return AttentionSpec(
        device=torch.device("cuda", 0),
        dtype=dtype,
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        softmax_scale=head_dim**-0.5,
        window=window.reduced(seqlen_q, seqlen_k),
        softcap=softcap,
        varlen=varlen,
        total_q=batch * seqlen_q,
        total_k=batch * seqlen_k,
        has_seqused_q=False,
        has_seqused_k=False,
        q_stride=stride(seqlen_q, num_heads, head_dim),
        k_stride=stride(seqlen_k, num_kv_heads, head_dim),
        v_stride=stride(seqlen_k, num_kv_heads, head_dim_v),
        aligned=True,
        sm_margin=0,
    )


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel: a configuration, which used lengths it takes ("", "q", "k" or "qk"), whether it adds V's
    mean."""

    config: ForwardConfig
    seqused: str = ""
    adds_mean: bool = False

    @property
    def name(self) -> str:
        """Short and unique: what matters first, then every field of the configuration that is unusual."""
        c = self.config
        parts = [c.element, f"{c.head_dim}x{c.head_dim_v}", c.Mask.__name__, c.Sequences.__name__]
        parts += [f"seqused_{self.seqused}"] if self.seqused else []
        parts += ["adds_mean"] if self.adds_mean else []
        said = {"element", "head_dim", "head_dim_v", "Mask", "Sequences", "Schedule"}
        return "-".join(parts + unusual_fields(c, said))


def unusual_fields(config, said: set[str]) -> list[str]:
    """What sets a configuration apart, besides the fields in `said`: values that are not the default."""
    parts = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in said or value == field.default:
            continue
        flag = ("" if value else "no_") + field.name
        parts.append(flag if isinstance(value, bool) else f"{field.name}{value}")
    return parts


def configs(
    dtype: torch.dtype = torch.bfloat16, softcap: float = 0.0, copies_operands: bool = COPIES_OPERANDS
) -> list[ForwardConfig]:
    """All configurations for one element type, each once, always in the same order."""
    found: dict[ForwardConfig, None] = {}
    for dims in itertools.product(HEAD_DIMS, HEAD_DIMS):
        for window, varlen, length in itertools.product(WINDOWS.values(), (False, True), LENGTHS):
            spec = question(*dims, length, window=window, varlen=varlen, dtype=dtype, softcap=softcap)
            found[forward_config(spec, copies_operands)] = None
    return list(found)


def fp8_configs(
    dtype: torch.dtype = torch.bfloat16, softcap: float = 0.0, copies_operands: bool = COPIES_OPERANDS
) -> list[ForwardConfig]:
    """As `configs`, with e4m3 operands. Lengths past PROMOTE_FROM add a loop around that of whole blocks."""
    found: dict[ForwardConfig, None] = {}
    dims = [*((d, d) for d in HEAD_DIMS), (192, 128), (128, 64)]
    lengths = (*LENGTHS, PROMOTE_FROM + 128)
    for window, varlen, length in itertools.product(WINDOWS.values(), (False, True), lengths):
        for of_q, of_v in dims:
            spec = question(of_q, of_v, length, window=window, varlen=varlen, dtype=dtype, softcap=softcap)
            found[fp8_config(spec, copies_operands)] = None
    return list(found)


def _mean_variants(made: list[ForwardConfig]) -> list[Variant]:
    """Kernels that add V's mean: causal ones, whose loops have least room, and of 128 a packed window."""
    return [
        Variant(c, adds_mean=True)
        for c in made
        if (c.Mask, c.Sequences) == (CausalMask, Dense)
        or (c.Mask, c.Sequences, c.head_dim) == (WindowMask, Varlen, 128)
    ]


def variants() -> list[Variant]:
    """What the tests compile: everything in bf16; fp16, softcap and used lengths where they could differ.

    fp16 changes two instructions (the rounding of P, the type of wgmma), softcap what happens to scores
    before any mask: one mask of every head shape, and another of 128. Used lengths change two loads of
    VarlenTiles: once each. V's mean changes the end of a tile.
    """
    shipped = [Variant(c) for c in configs()]
    for c in configs(torch.float16) + configs(softcap=30.0):
        extra = (NoMask, Dense) if c.element == "fp16" else (WindowMask, Varlen)
        kind = c.Mask, c.Sequences
        if kind == (CausalMask, Dense) or (kind == extra and c.head_dim == c.head_dim_v == 128):
            shipped.append(Variant(c))
    used = {FullMask: "qk", CausalMask: "q", WindowMask: "k"}
    for c in configs():
        if c.head_dim == c.head_dim_v == 128 and c.Sequences is Varlen:
            shipped.append(Variant(c, used[c.Mask]))
    shipped += [Variant(c) for c in fp8_configs()]
    shipped += _mean_variants(fp8_configs())
    for c in fp8_configs(torch.float16) + fp8_configs(softcap=30.0):
        if c.head_dim == 128 and (c.Mask, c.Sequences, c.promote) == (CausalMask, Dense, 0):
            shipped.append(Variant(c))
    return shipped


def distinct_variants(copies_operands: bool = COPIES_OPERANDS) -> list[Variant]:
    """For a quicker look: bf16 without extras; of those that differ only in order and timing, the one
    for long sequences."""
    kept = {}
    for c in configs(copies_operands=copies_operands):  # short lengths first
        shape = (c.head_dim, c.head_dim_v, c.tile_n, c.num_consumers)
        shape += (c.q_in_registers, c.named_release, c.opens_in_loop)
        kept[shape, c.Mask, c.Sequences] = Variant(c)
    for c in fp8_configs(copies_operands=copies_operands):
        if c.head_dim == c.head_dim_v and c.Sequences is Dense and (not c.promote or c.head_dim == 128):
            shape = ("fp8", c.head_dim, c.serial, c.promote > 0, c.q_in_registers)
            kept[shape, c.Mask] = Variant(c)
    for v in _mean_variants(fp8_configs(copies_operands=copies_operands)):
        c = v.config
        if c.head_dim == c.head_dim_v and c.head_dim in (128, 256) and c.Mask is CausalMask and not c.promote:
            kept["adds_mean", c.head_dim] = v
    return list(kept.values())
