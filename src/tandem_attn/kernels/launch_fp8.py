"""The gluon backend over FP8 tensors: the forward kernel with e4m3 operands."""

from __future__ import annotations

from tandem_attn.kernels.config_fp8 import fp8_config
from tandem_attn.kernels.launch import MAX_TILES, ForwardPlan, num_tiles_bound, operands
from tandem_attn.kernels.question import (
    UNBOUNDED,
    device_reasons,
    element_reasons,
    head_dim_reasons,
    scale_reasons,
    stride_reasons,
)
from tandem_attn.spec_fp8 import Fp8Spec

NAME = "gluon"
STEP = 16  # elements of 16 bytes, which TMA counts in


def fp8_reasons(spec: Fp8Spec) -> list[str]:
    """Why this backend cannot answer; empty if it can."""
    said = device_reasons(spec.device)
    if spec.device.type != "cuda":
        return said
    question = spec.attention
    said += element_reasons(question.dtype)
    said += head_dim_reasons(question.head_dim, question.head_dim_v, STEP, " in FP8")
    said += scale_reasons(question.softmax_scale)
    said += _layout_reasons(spec)
    if num_tiles_bound(question, 128) >= MAX_TILES or max(question.total_q, question.total_k) >= UNBOUNDED:
        said.append(f"{question.total_q} query rows and {question.total_k} keys: more than 32 bits count")
    return said


def _layout_reasons(spec: Fp8Spec) -> list[str]:
    """What TMA asks of addresses of e4m3 tensors."""
    question = spec.attention
    said = []
    if not question.aligned:
        said.append("q, k or v_t does not start at a multiple of 16 bytes, which TMA needs")
    for name, shape, stride in operands(question)[:2]:  # v_t is contiguous
        said += stride_reasons(name, shape, stride, STEP)
    return said


def fp8_describe(spec: Fp8Spec) -> str:
    """One line for explain(): the configuration chosen."""
    return str(fp8_config(spec.attention))


def fp8(spec: Fp8Spec) -> ForwardPlan:
    """The plan for a question: call it with (q, k, v_t, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
    descales), these being those of q, k and v, lse_shift or None, v_mean or None."""
    question = spec.attention
    shape = (question.num_kv_heads, question.head_dim_v, spec.padded_k)
    if not question.varlen:
        shape = (question.batch, *shape)
    else:
        shape = (1, *shape)
    each = spec.padded_k * question.head_dim_v
    strides = [each * question.num_kv_heads, each, spec.padded_k, 1]
    config = fp8_config(question)
    return ForwardPlan(question, config, (list(shape), strides), spec.factors)
