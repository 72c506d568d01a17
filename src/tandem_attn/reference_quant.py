"""The specification of making FP8: the steps of `quant.py` in order, on any device, for any float type.

Numbers are rounded to e4m3 and, where rotary embedding is asked for, once before that to the dtype of the
inputs; so is K's mean, and nothing else. A kernel may differ by one e4m3 step in a few values, where sums end
beside a boundary, and by a step of the dtype of inputs in K's mean.
On a GPU, rows of packed sequences are found without waiting for the device; V^T and means are not.
"""

from __future__ import annotations

import torch

from tandem_attn.quant import (
    BLOCK_K,
    BLOCK_Q,
    channel_mean,
    key_mean,
    quantized,
    rotated,
    rows_of,
    transpose_v,
    transposed,
)
from tandem_attn.reference import in_full_precision
from tandem_attn.reference_decode import rotate
from tandem_attn.spec_quant import Quantized, QuantizeSpec, TransposeSpec, empty_tensors

NAME = "reference"


def quantize_reasons(spec: QuantizeSpec) -> list[str]:
    """Why this backend cannot make FP8: it always can."""
    return []


def transpose_reasons(spec: TransposeSpec) -> list[str]:
    """Why this backend cannot transpose V: it always can."""
    return []


def quantize_describe(spec: QuantizeSpec) -> str:
    """One line for explain(): how FP8 would be made."""
    return "torch, one step after the other"


def transpose_describe(spec: TransposeSpec) -> str:
    """One line for explain(): how V would be laid out."""
    return "torch, one copy"


def quantize(spec: QuantizeSpec):
    """The plan for a question: (q, k, v, signs, cos, sin, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    -> Quantized. signs: float32 (head_dim,), None without rotation; what is not given is None."""

    @in_full_precision(spec)
    def plan(q, k, v, signs=None, cos=None, sin=None, *lengths):
        if spec.is_empty:
            return empty_tensors(spec)
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k = lengths or (None,) * 4
        rows_q, rows_k = rows_of(q, cu_seqlens_q, seqused_q), rows_of(k, cu_seqlens_k, seqused_k)
        q, k, v = rows_q.declared(q), rows_k.declared(k), rows_k.declared(v)
        if cos is not None:
            q, k = turned(q, k, rows_q, rows_k, cos, sin, spec.interleaved)
        shift = k_mean = v_mean = None
        if spec.smooth_k:
            k_mean = key_mean(k, rows_k)
            shift = mean_products(q, k_mean, rows_q)
            k = rows_k.declared(k.to(spec_kind(spec)) - rows_k.of_each(k_mean))
        if spec.smooth_v:
            v_mean = channel_mean(v, rows_k)
            v = rows_k.declared(v.to(spec_kind(spec)) - rows_k.of_each(v_mean))
        if spec.rotate:
            q, k = rotated(q, signs), rotated(k, signs)
        sides = ((q, rows_q, BLOCK_Q, False), (k, rows_k, BLOCK_K, False), (v, rows_k, BLOCK_K, True))
        (q, q_descale), (k, k_descale), (v, v_descale) = (
            quantized(rows.padded(x.to(spec_kind(spec))), rows, block, spec.granularity, powers)
            for x, rows, block, powers in sides
        )
        q, k = (
            rows_q.declared(rows_q.restored(q)).contiguous(),
            rows_k.declared(rows_k.restored(k)).contiguous(),
        )
        v_t = transposed(v)[0] if spec.packed else transposed(v)
        return Quantized(q, k, v_t, q_descale, k_descale, v_descale, shift, k_mean, v_mean)

    return plan


def transpose(spec: TransposeSpec):
    """The plan for V: (v, cu_seqlens_k, seqused_k) -> v_t, as in `quant.Fp8Tensors`."""

    @in_full_precision(spec)
    def plan(v, cu_seqlens_k=None, seqused_k=None):
        if spec.is_empty:
            return v.new_zeros(spec.v_t_shape)
        return transpose_v(v, rows_of(v, cu_seqlens_k, seqused_k))

    return plan


def spec_kind(spec: QuantizeSpec) -> torch.dtype:
    """float32, and float64 for float64 inputs: in which numbers are computed."""
    return torch.promote_types(spec.dtype, torch.float32)


def mean_products(q, mean, rows) -> torch.Tensor:
    """float32 (batch, heads, seqlen_q) or (heads, total_q): q of each row times the mean of its keys."""
    kind = torch.promote_types(q.dtype, torch.float32)
    mean = rows.of_each(mean.to(kind)).repeat_interleave(q.shape[-2] // mean.shape[1], -2)
    return (q.to(kind) * mean).sum(-1).transpose(-1, -2).float().contiguous()


def turned(q, k, rows_q, rows_k, cos, sin, interleaved: bool):
    """(q, k) after rotary embedding, in their dtype."""
    if not rows_q.packed:
        position_q = torch.arange(q.shape[1], device=q.device) + k.shape[1] - q.shape[1]
        position_k = torch.arange(k.shape[1], device=q.device)
    else:
        owner, owner_k = rows_q.places[0], rows_k.places[0]
        ahead = rows_k.lengths - rows_q.lengths - rows_q.cu_seqlens[:-1]
        position_q = torch.arange(q.shape[0], device=q.device) + ahead[owner]
        position_k = torch.arange(k.shape[0], device=q.device) - rows_k.cu_seqlens[owner_k]
    return rotate(q, cos, sin, position_q, interleaved), rotate(k, cos, sin, position_k, interleaved)
