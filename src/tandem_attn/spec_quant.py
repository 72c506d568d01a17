"""The question of making FP8: `QuantizeSpec` of 16-bit q, k and v, `TransposeSpec` of V that is e4m3 already.

`quantize_spec` and `transpose_spec` turn the arguments of a call into one or raise: errors as in `spec.py`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from tandem_attn.check_decode import check_rotary
from tandem_attn.quant import BLOCK_K, BLOCK_Q, E4M3, Fp8Recipe, padded_rows
from tandem_attn.spec import (
    DTYPES,
    Lengths,
    check_tensors,
    check_types,
    check_vector,
    dtype_name,
    refuse,
    starts_aligned,
)
from tandem_attn.spec_decode import New, Rotary

MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 16  # head_dim of FP8 is a multiple of this
ROTATION_STEP = 32  # and, to be rotated, of this: the Hadamard matrix would be too small to do any good


class Quantized(NamedTuple):
    """What a plan returns: fields of `quant.Fp8Tensors` of the same names."""

    q: torch.Tensor
    k: torch.Tensor
    v_t: torch.Tensor
    q_descale: torch.Tensor
    k_descale: torch.Tensor
    v_descale: torch.Tensor
    lse_shift: torch.Tensor | None
    k_mean: torch.Tensor | None
    v_mean: torch.Tensor | None


class RotaryTables(NamedTuple):
    """cos and sin (positions, rotary_dim / 2), or None. Key j turns by position j, query i by position
    i + seqlen_k - seqlen_q: both sequences end together, as under a causal mask."""

    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    interleaved: bool = False  # pairs (2i, 2i + 1); else (i, i + rotary_dim / 2)


@dataclasses.dataclass(frozen=True)
class QuantizeSpec:
    """q, k and v to be made FP8. Strides are those of tensors as given, in elements."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    seqlen_q: int  # packed: total_q, rows in memory
    seqlen_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    rotate: bool
    smooth_k: bool
    smooth_v: bool
    granularity: str
    rotary_dim: int  # 0: no rotary embedding
    rotary_len: int  # positions in the tables
    rotary_stride: int
    rotary_dtype: torch.dtype | None
    interleaved: bool
    packed: bool
    has_seqused_q: bool
    has_seqused_k: bool
    q_stride: tuple[int, ...]
    k_stride: tuple[int, ...]
    v_stride: tuple[int, ...]
    aligned: bool  # all three base addresses are multiples of 16 bytes

    @property
    def is_empty(self) -> bool:
        """There are no numbers at all."""
        return self.batch == 0 or (self.seqlen_q == 0 and self.seqlen_k == 0)

    @property
    def v_t_shape(self) -> tuple[int, ...]:
        return v_t_shape(self)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        return (self.num_heads, self.seqlen_q) if self.packed else (self.batch, self.num_heads, self.seqlen_q)

    def descale_shape(self, seqlen: int, heads: int, block: int) -> tuple[int, ...]:
        """Of the scales of q, k or v, for dense ones of other granularities as expanded."""
        if not self.packed:
            return (self.batch, heads, -(-seqlen // block))
        if self.granularity == "block":
            return (heads, padded_rows(seqlen, self.batch) // block)
        return (self.batch, heads, 1)

    @property
    def question(self) -> str:
        """One line for explain()."""
        kind = f"{self.batch} packed sequences" if self.packed else f"batch {self.batch}"
        rotary = f", rotary over {self.rotary_dim} columns" if self.rotary_dim else ""
        return (
            f"e4m3 of {dtype_name(self.dtype)} on {self.device}: {kind}, {self.seqlen_q} queries, "
            f"{self.seqlen_k} keys, {self.num_heads} heads over {self.num_kv_heads}, "
            f"head_dim {self.head_dim}/{self.head_dim_v}, {'rotated' if self.rotate else 'not rotated'}, "
            f"mean of K {'subtracted' if self.smooth_k else 'kept'}, "
            f"of V {'subtracted' if self.smooth_v else 'kept'}, "
            f"a scale for a {self.granularity}{rotary}"
        )


@dataclasses.dataclass(frozen=True)
class TransposeSpec:
    """e4m3 V with rows as usual, to be laid out with keys last."""

    device: torch.device
    batch: int
    seqlen_k: int  # packed: total_k, rows in memory
    num_kv_heads: int
    head_dim_v: int
    packed: bool
    has_seqused_k: bool
    v_stride: tuple[int, ...]
    aligned: bool

    @property
    def is_empty(self) -> bool:
        """There is nothing to write."""
        return 0 in (self.batch, self.num_kv_heads)

    @property
    def v_t_shape(self) -> tuple[int, ...]:
        return v_t_shape(self)

    @property
    def question(self) -> str:
        """One line for explain()."""
        kind = f"{self.batch} packed sequences" if self.packed else f"batch {self.batch}"
        return (
            f"V with keys last, e4m3 on {self.device}: {kind}, {self.seqlen_k} keys, "
            f"{self.num_kv_heads} heads, head_dim {self.head_dim_v}"
        )


def v_t_shape(spec: QuantizeSpec | TransposeSpec) -> tuple[int, ...]:
    """Of V with keys last."""
    if spec.packed:
        return (spec.num_kv_heads, spec.head_dim_v, padded_rows(spec.seqlen_k, spec.batch))
    return (spec.batch, spec.num_kv_heads, spec.head_dim_v, padded_rows(spec.seqlen_k))


def empty_tensors(spec: QuantizeSpec) -> Quantized:
    """The answer where there are no numbers: scales 1, everything else 0."""
    q_rows, k_rows = ((n,) if spec.packed else (spec.batch, n) for n in (spec.seqlen_q, spec.seqlen_k))
    h, g = spec.num_heads, spec.num_kv_heads

    def zeros(*shape: int, dtype=torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=spec.device)

    return Quantized(
        zeros(*q_rows, h, spec.head_dim, dtype=E4M3),
        zeros(*k_rows, g, spec.head_dim, dtype=E4M3),
        zeros(*spec.v_t_shape, dtype=E4M3),
        zeros(*spec.descale_shape(spec.seqlen_q, h, BLOCK_Q)) + 1,
        zeros(*spec.descale_shape(spec.seqlen_k, g, BLOCK_K)) + 1,
        zeros(*spec.descale_shape(spec.seqlen_k, g, BLOCK_K)) + 1,
        zeros(*spec.lse_shape) if spec.smooth_k else None,
        zeros(spec.batch, g, spec.head_dim) if spec.smooth_k else None,
        zeros(spec.batch, g, spec.head_dim_v) if spec.smooth_v else None,
    )


def quantize_spec(
    q, k, v, lengths: Lengths | None, recipe: Fp8Recipe, rotary: RotaryTables | None = None
) -> QuantizeSpec:
    """The question that these arguments ask. Reads shapes only."""
    rotary = rotary or RotaryTables()
    check_types(q, k, v, lengths)
    check_recipe(recipe)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            refuse(TypeError, name, f"of dtype {x.dtype}", ", ".join(map(str, DTYPES)))
    check_tensors(q, k, v, lengths)
    check_head_dims(q, v, recipe)
    if rotary.cos is not None or rotary.sin is not None:
        _check_tables(q, k, lengths, rotary)
    cos, packed = rotary.cos, lengths is not None
    return QuantizeSpec(
        device=q.device,
        dtype=q.dtype,
        batch=lengths.cu_seqlens_q.shape[0] - 1 if packed else q.shape[0],
        seqlen_q=q.shape[-3],
        seqlen_k=k.shape[-3],
        num_heads=q.shape[-2],
        num_kv_heads=k.shape[-2],
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        rotate=recipe.rotate,
        smooth_k=recipe.smooth_k,
        smooth_v=recipe.smooth_v,
        granularity=recipe.granularity,
        rotary_dim=0 if cos is None else 2 * cos.shape[1],
        rotary_len=0 if cos is None else cos.shape[0],
        rotary_stride=0 if cos is None else cos.stride(0),
        rotary_dtype=None if cos is None else cos.dtype,
        interleaved=cos is not None and rotary.interleaved,
        packed=packed,
        has_seqused_q=packed and lengths.seqused_q is not None,
        has_seqused_k=packed and lengths.seqused_k is not None,
        q_stride=q.stride(),
        k_stride=k.stride(),
        v_stride=v.stride(),
        aligned=starts_aligned(q, k, v),
    )


def check_recipe(recipe) -> None:
    """Raise unless it is one."""
    if not isinstance(recipe, Fp8Recipe):
        refuse(TypeError, "recipe", type(recipe).__name__, "an Fp8Recipe")


def check_head_dims(q, v, recipe: Fp8Recipe) -> None:
    """Raise unless FP8 knows such heads and the recipe fits them."""
    for name, x in (("q", q), ("v", v)):
        if x.shape[-1] % HEAD_DIM_STEP or x.shape[-1] > MAX_HEAD_DIM:
            supported = f"multiples of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM} in FP8"
            refuse(NotImplementedError, name, f"of head_dim {x.shape[-1]}", supported)
    if recipe.rotate and q.shape[-1] % ROTATION_STEP:
        was = f"{recipe.rotate} with head_dim {q.shape[-1]}"
        refuse(ValueError, "rotate", was, f"False, or head_dim a multiple of {ROTATION_STEP}")
    if recipe.rotate and isinstance(recipe.signs, tuple) and len(recipe.signs) != q.shape[-1]:
        refuse(ValueError, "signs", f"a vector of {len(recipe.signs)}", f"head_dim of q, {q.shape[-1]}")


def _check_tables(q, k, lengths: Lengths | None, rotary: RotaryTables) -> None:
    """Raise unless the tables fit q and reach as far as there are keys."""
    cos, sin, interleaved = rotary
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not isinstance(x, torch.Tensor):
            refuse(TypeError, name, type(x).__name__, "a torch.Tensor, or None for both")
    if not isinstance(interleaved, bool):
        refuse(TypeError, "rotary_interleaved", repr(interleaved), "True or False")
    check_rotary(q, Rotary(cos, sin, None), New(None, None, 0))
    longest = k.shape[1] if lengths is None else lengths.max_seqlen_k
    if cos.shape[0] < longest:
        refuse(
            ValueError, "rotary_cos", f"of {cos.shape[0]} positions", f"at least {longest}, as many as keys"
        )


def transpose_spec(v, cu_seqlens_k=None, seqused_k=None) -> TransposeSpec:
    """The question about e4m3 v (batch, seqlen_k, kv_heads, head_dim_v), or packed with cu_seqlens_k."""
    if not isinstance(v, torch.Tensor):
        refuse(TypeError, "v", type(v).__name__, "a torch.Tensor")
    if v.dtype != E4M3:
        refuse(TypeError, "v", f"of dtype {v.dtype}", str(E4M3))
    packed = cu_seqlens_k is not None
    form, rank = (
        ("(total_k, kv_heads, head_dim_v)", 3) if packed else ("(batch, seqlen_k, kv_heads, head_dim_v)", 4)
    )
    if v.dim() != rank:
        refuse(ValueError, "v", f"a tensor of shape {tuple(v.shape)}", f"{rank} dimensions {form}")
    if v.shape[-1] % HEAD_DIM_STEP or not 0 < v.shape[-1] <= MAX_HEAD_DIM:
        supported = f"multiples of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM} in FP8"
        refuse(NotImplementedError, "v", f"of head_dim {v.shape[-1]}", supported)
    batch = v.shape[0]
    if packed:
        batch = check_vector("cu_seqlens_k", cu_seqlens_k, v.device, None, "")
        if seqused_k is not None:
            check_vector("seqused_k", seqused_k, v.device, batch, "the batch size of cu_seqlens_k")
    return TransposeSpec(
        device=v.device,
        batch=batch,
        seqlen_k=v.shape[-3],
        num_kv_heads=v.shape[-2],
        head_dim_v=v.shape[-1],
        packed=packed,
        has_seqused_k=packed and seqused_k is not None,
        v_stride=v.stride(),
        aligned=starts_aligned(v),
    )
