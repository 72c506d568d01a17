"""The gluon backend over FP8 tensors: the forward kernel with e4m3 operands."""

from __future__ import annotations

from tandem_attn.kernels.config_fp8 import fp8_config
from tandem_attn.kernels.launch import MAX_TILES, ForwardPlan, num_tiles_bound
from tandem_attn.kernels.question import UNBOUNDED, device_reasons, element_reasons, scale_reasons
from tandem_attn.spec_fp8 import Fp8Spec

NAME = "gluon"


def fp8_reasons(spec: Fp8Spec) -> list[str]:
    """Why this backend cannot answer; empty if it can."""
    said = device_reasons(spec.device)
    if spec.device.type != "cuda":
        return said
    question = spec.attention
    said += element_reasons(question.dtype)
    said += _head_dim_reasons(question.head_dim, question.head_dim_v)
    said += scale_reasons(question.softmax_scale)
    said += _layout_reasons(spec)
    if num_tiles_bound(question, 128) >= MAX_TILES or max(question.total_q, question.total_k) >= UNBOUNDED:
        said.append(f"{question.total_q} query rows and {question.total_k} keys: more than 32 bits count")
    return said


def _head_dim_reasons(head_dim: int, head_dim_v: int) -> list[str]:
    return [
        f"{name} is {dim}; supported in FP8: multiples of 16 up to 256"
        for name, dim in (("head_dim", head_dim), ("head_dim_v", head_dim_v))
        if dim % 16 or not 0 < dim <= 256
    ]


def _layout_reasons(spec: Fp8Spec) -> list[str]:
    """What TMA asks of addresses of e4m3 tensors."""
    question = spec.attention
    said = []
    if not question.aligned:
        said.append("q, k or v_t does not start at a multiple of 16 bytes, which TMA needs")
    rows_q = (question.batch, question.seqlen_q) if not question.varlen else (question.total_q,)
    rows_k = (question.batch, question.seqlen_k) if not question.varlen else (question.total_k,)
    for name, shape, stride in (
        ("q", (*rows_q, question.num_heads), question.q_stride),
        ("k", (*rows_k, question.num_kv_heads), question.k_stride),
    ):
        if stride[-1] != 1:
            said.append(f"{name}'s last dimension has stride {stride[-1]}; TMA needs 1")
        steps = [s for n, s in zip(shape, stride, strict=False) if n > 1]
        if any(s % 16 or not 0 <= s < 2**38 for s in steps):
            said.append(f"{name} has strides {tuple(stride)}; TMA needs multiples of 16 elements")
    return said


def fp8_describe(spec: Fp8Spec) -> str:
    """One line for explain(): the configuration chosen."""
    return str(fp8_config(spec.attention))


def fp8(spec: Fp8Spec) -> ForwardPlan:
    """The plan for a question: call it with (q, k, v_t, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
    descales), these being those of q, k and v, and lse_shift or None."""
    question = spec.attention
    shape = (question.num_kv_heads, question.head_dim_v, spec.padded_k)
    if not question.varlen:
        shape = (question.batch, *shape)
    else:
        shape = (1, *shape)
    each = spec.padded_k * question.head_dim_v
    strides = [each * question.num_kv_heads, each, spec.padded_k, 1]
    return ForwardPlan(question, fp8_config(question), (list(shape), strides), spec.factors)
