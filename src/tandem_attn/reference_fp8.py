"""The specification of attention over FP8 tensors: that over what they stand for.

q, k and v are dequantized, and `reference.py` does the rest in float32; the kernels also round probabilities
to e4m3 and add up in the precision of FP8 wgmma, which tests allow for.
"""

from __future__ import annotations

import dataclasses

import torch

from tandem_attn import reference
from tandem_attn.quant import Fp8Recipe, Fp8Tensors
from tandem_attn.spec import Lengths, lse_dtype
from tandem_attn.spec_fp8 import Fp8Spec

NAME = "reference"


def fp8_reasons(spec: Fp8Spec) -> list[str]:
    """Why this backend cannot answer: it always can."""
    return []


def fp8_describe(spec: Fp8Spec) -> str:
    """One line for explain(): how the question would be answered."""
    return f"dequantized, then {reference.describe(spec.attention)}"


def fp8(spec: Fp8Spec):
    """The plan for a question: (q, k, v_t, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, descales) ->
    (out, lse), as that of the kernels."""
    question = spec.attention
    plan = reference.forward(dataclasses.replace(question, dtype=lse_dtype(question.dtype)))

    @reference.in_full_precision(question)
    def run(q, k, v_t, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, descales=None):
        *factors, shift, v_mean = descales
        lengths = None
        if question.varlen:
            tensors = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
            lengths = Lengths(*tensors, question.seqlen_q, question.seqlen_k)
        corrections = (shift, None, v_mean)
        held = Fp8Tensors(q, k, v_t, *factors, *corrections, Fp8Recipe(), question.dtype, lengths)
        numbers = (x.to(lse_dtype(question.dtype)) for x in held.rotated())
        out, lse = plan(*numbers, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
        if shift is not None:
            lse = lse + question.softmax_scale * torch.where(lse.isneginf(), 0.0, shift)
        return out.to(question.dtype), lse

    return run
