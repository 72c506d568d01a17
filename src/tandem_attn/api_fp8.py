"""The public functions of FP8: quantize, attend, or both in one call with gradients."""

from __future__ import annotations

import torch

from tandem_attn import ops, ops_fp8
from tandem_attn.quant import Fp8Recipe, Fp8Tensors
from tandem_attn.spec import NO_WINDOW, Lengths, refuse, window_sides
from tandem_attn.spec_quant import RotaryTables

__all__ = [
    "Fp8Recipe",
    "Fp8Tensors",
    "flash_attn_fp8_func",
    "flash_attn_fp8_varlen_func",
    "flash_attn_quantized_func",
    "quantize_qkv",
]


def quantize_qkv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    recipe: Fp8Recipe | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotary_interleaved: bool = True,
) -> Fp8Tensors:
    """16-bit q, k and v -> e4m3 with a factor per block, rotated and smoothed (arXiv 2407.08608, sec. 3.3).

    q (batch, seqlen_q, heads, head_dim), k (batch, seqlen_k, kv_heads, head_dim), v (batch, seqlen_k,
    kv_heads, head_dim_v), or packed (total, heads, head_dim) with cu_seqlens as in `flash_attn_varlen_func`.
    float16 or bfloat16 (wider on a CPU), head dimensions multiples of 16 up to 256; with rotation head_dim a
    multiple of 32.

    recipe                what is done, an `Fp8Recipe`: rotation by a random-sign Hadamard matrix, the mean of
                          K subtracted, a factor per block of 64 queries and 128 keys. None: all of that, and
                          V's mean kept
    rotary                (cos, sin), each (positions, rotary_dim / 2): rotary embedding is applied first, in
                          the same pass; key j has position j, query i has i + seqlen_k - seqlen_q
    rotary_interleaved    pairs are columns (2i, 2i + 1), else (i, i + rotary_dim / 2)

    Returns `Fp8Tensors`, for `flash_attn_quantized_func`. What is larger than a factor allows saturates at
    448 factors; a block of zeros has factor 1; a block with NaN or infinity in it becomes NaN. No gradient.

    Raises TypeError, ValueError or NotImplementedError, naming the argument, what it was and what is
    supported.
    """
    lengths = None
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        lengths = Lengths(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k)
    else:
        for name, x in (("seqused_q", seqused_q), ("seqused_k", seqused_k)):
            if x is not None:
                refuse(ValueError, name, "given without cu_seqlens", "None")
    tables = RotaryTables(*_pair(rotary), rotary_interleaved)
    with torch.no_grad():
        q, k, v = ops.cast_for_autocast(q, k, v)
        return ops_fp8.quantize(q, k, v, lengths, Fp8Recipe() if recipe is None else recipe, tables)


def _pair(rotary) -> tuple:
    """(cos, sin), or None for both."""
    if rotary is None:
        return None, None
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
        refuse(TypeError, "rotary", f"a {type(rotary).__name__}", "a pair (cos, sin) of tensors, or None")
    return tuple(rotary)


def flash_attn_quantized_func(
    tensors: Fp8Tensors,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over what `quantize_qkv` made, on the FP8 tensor cores; arguments as in `flash_attn_func`.

    softcap needs tensors made with smooth_k=False: it sees the mean of K.

    Returns out in the dtype of what was quantized, (batch, seqlen_q, heads, head_dim_v) or (total_q, heads,
    head_dim_v), and on request lse, of the question before quantization (up to rounding), float32. Output and
    probabilities are rounded as `docs/numerics.md` says. No gradient.
    """
    if not isinstance(tensors, Fp8Tensors):
        refuse(TypeError, "tensors", type(tensors).__name__, "Fp8Tensors, of quantize_qkv")
    left, right = window_sides(causal, window_size)
    with torch.no_grad():
        out, lse = ops_fp8.attention(tensors, (softmax_scale, left, right, softcap, sm_margin, False))
    return (out, lse) if return_attn_probs else out


def flash_attn_fp8_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    recipe: Fp8Recipe | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_func` on 16-bit tensors, computed in FP8: `quantize_qkv` and `flash_attn_quantized_func`.

    recipe   as in `quantize_qkv`; None is the whole recipe, without K's mean subtracted if there is a softcap

    Gradients are straight through: those of 16-bit attention at q, k and v, computed by the 16-bit kernels
    from the out and lse that FP8 gave.
    """
    left, right = window_sides(causal, window_size)
    options = (softmax_scale, left, right, softcap, sm_margin, deterministic)
    out, lse = ops_fp8.straight_through(q, k, v, None, _recipe(recipe, softcap), options)
    return (out, lse) if return_attn_probs else out


def flash_attn_fp8_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    recipe: Fp8Recipe | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_varlen_func` on 16-bit tensors, computed in FP8.

    Means are those of each sequence, and no block of rows reaches into the next one. Everything else,
    gradients too, as in `flash_attn_fp8_func`.
    """
    left, right = window_sides(causal, window_size)
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k)
    options = (softmax_scale, left, right, softcap, sm_margin, deterministic)
    out, lse = ops_fp8.straight_through(q, k, v, lengths, _recipe(recipe, softcap), options)
    return (out, lse) if return_attn_probs else out


def _recipe(recipe: Fp8Recipe | None, softcap: float) -> Fp8Recipe:
    """The recipe, or the whole one that a softcap allows."""
    if recipe is not None:
        return recipe
    return Fp8Recipe(smooth_k=not (isinstance(softcap, (int, float)) and softcap > 0))
