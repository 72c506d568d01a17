"""PyTorch's own fused kernels, wherever they answer exactly the same question, log-sum-exp included.

On a CPU that is torch's flash attention, which is what `scaled_dot_product_attention` runs there: its causal
mask is aligned top-left, so it serves equal lengths only. On NVIDIA GPUs other than Hopper it is
FlashAttention-2 as built into torch. Grouped heads are read in place: a view repeats the keys of a group with
stride 0.
"""

from __future__ import annotations

import math

import torch

from tandem_attn import arch, reference
from tandem_attn.spec import AttentionSpec

NAME = "torch"


def reasons(spec: AttentionSpec) -> list[str]:
    """Why torch's kernels cannot answer; empty if they can."""
    said = []
    if spec.device.type == "cpu":
        said += _cpu_reasons(spec)
    elif spec.device.type == "cuda":
        said += _cuda_reasons(spec)
    else:
        said.append(f"tensors are on {spec.device}; torch's fused kernels used here run on cpu and cuda")
    if not spec.softmax_scale > 0.0:  # they mask before they scale: -inf times that is +inf or NaN
        said.append(f"softmax_scale is {spec.softmax_scale}; torch's fused kernels need it positive")
    if spec.softcap != 0.0:
        said.append(f"softcap is {spec.softcap}; torch's fused kernels have none")
    if spec.head_dim_v != spec.head_dim:
        dims = f"head_dim_v is {spec.head_dim_v} and head_dim {spec.head_dim}"
        said.append(f"{dims}; torch's fused kernels need them equal")
    if any(stride[-1] != 1 for stride in (spec.q_stride, spec.k_stride, spec.v_stride)):
        said.append("the last dimension of q, k or v has a stride other than 1")
    return said


def describe(spec: AttentionSpec) -> str:
    """One line for explain(): the torch operator that would run."""
    if spec.device.type == "cuda":
        return "FlashAttention-2 in torch (aten::_flash_attention_forward)"
    line = "torch's CPU flash kernel (aten::_scaled_dot_product_flash_attention_for_cpu)"
    if not spec.varlen:
        return line
    if spec.causal:
        return line + ", one sequence after the other; the reference for those with seqlen_q != seqlen_k"
    return line + ", one sequence after the other"


def forward(spec: AttentionSpec):
    """The plan for a question: (q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k) -> (out, lse)."""
    if spec.device.type == "cuda":
        return _cuda_forward(spec)
    return _cpu_varlen_forward(spec) if spec.varlen else _cpu_forward(spec)


def backward(spec: AttentionSpec):
    """The plan for gradients; see `reference.backward`, which also serves where torch cannot (dlse)."""
    if spec.device.type == "cuda":
        return None if spec.has_seqused_k or _adds_in_any_order(spec) else _cuda_backward(spec)
    plan = _cpu_varlen_backward(spec) if spec.varlen else _cpu_backward(spec)
    return _unless_dlse(plan, spec)


def _unless_dlse(plan, spec: AttentionSpec):
    """Torch's backward kernels know no gradient of lse."""
    whole = reference.backward(spec)

    def choose(dout, dlse, *rest):
        return plan(dout, *rest) if dlse is None else whole(dout, dlse, *rest)

    return choose


# CPU


def _cpu_reasons(spec: AttentionSpec) -> list[str]:
    window = spec.window
    if not window.full and not window.causal:
        return [f"window is ({window.left}, {window.right}); torch's CPU kernel knows full and causal"]
    if window.causal and not spec.varlen and spec.seqlen_q != spec.seqlen_k:
        lengths = f"seqlen_q {spec.seqlen_q} and seqlen_k {spec.seqlen_k}"
        return [f"causal with {lengths}; torch's CPU kernel aligns the mask top-left: equal lengths only"]
    return []


def _cpu_forward(spec: AttentionSpec):
    causal, scale = spec.causal, spec.softmax_scale

    def plan(q, k, v, *_):
        return _flash(q, k, v, causal, scale)

    return plan


def _cpu_backward(spec: AttentionSpec):
    causal, scale = spec.causal, spec.softmax_scale

    def plan(dout, q, k, v, out, lse, *_):
        return _flash_backward(dout, q, k, v, out, lse, causal, scale)

    return plan


def _cpu_varlen_forward(spec: AttentionSpec):
    causal, scale = spec.causal, spec.softmax_scale

    def plan(q, k, v, *lengths):
        out = q.new_zeros(spec.out_shape)
        lse = q.new_full(spec.lse_shape, -math.inf, dtype=spec.lse_dtype)
        for rows, keys in reference.sequences(*lengths):
            parts = q[None, rows], k[None, keys], v[None, keys]
            if _is_empty(rows, keys):
                continue
            if causal and not _same_length(rows, keys):
                reference.attend(*parts, out[None, rows], lse[None, :, rows], spec)
                continue
            out[None, rows], lse[None, :, rows] = _flash(*parts, causal, scale)
        return out, lse

    return plan


def _cpu_varlen_backward(spec: AttentionSpec):
    causal, scale = spec.causal, spec.softmax_scale

    def plan(dout, q, k, v, out, lse, *lengths):
        dq, dk, dv = grads = tuple(x.new_zeros(x.shape) for x in (q, k, v))
        delta = reference.row_delta(dout, None, out, lse) if causal else None
        for rows, keys in reference.sequences(*lengths):
            if _is_empty(rows, keys):
                continue
            of_rows, of_keys, columns = (None, rows), (None, keys), (None, slice(None), rows)
            parts = q[of_rows], k[of_keys], v[of_keys]
            if causal and not _same_length(rows, keys):
                views = dq[of_rows], dk[of_keys], dv[of_keys]
                reference.attend_backward(dout[of_rows], delta[columns], *parts, lse[columns], views, spec)
                continue
            found = _flash_backward(dout[of_rows], *parts, out[of_rows], lse[columns], causal, scale)
            dq[of_rows], dk[of_keys], dv[of_keys] = found
        return grads

    return plan


def _is_empty(rows: slice, keys: slice) -> bool:
    return rows.start == rows.stop or keys.start == keys.stop


def _same_length(rows: slice, keys: slice) -> bool:
    return rows.stop - rows.start == keys.stop - keys.start


def _flash(q, k, v, causal: bool, scale: float):
    """Torch's CPU kernel on (batch, seqlen, heads, dim) tensors: (out, lse), both contiguous."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads == kv_heads:
        out, lse = kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, scale=scale)
        return out.transpose(1, 2).contiguous(), lse.contiguous()
    parts = [kernel(*_grouped(*one, kv_heads), 0.0, causal, scale=scale) for one in zip(q, k, v, strict=True)]
    out = torch.stack([_ungrouped(o) for o, _ in parts])
    return out, torch.stack([lse.flatten(0, 1) for _, lse in parts])


def _flash_backward(dout, q, k, v, out, lse, causal: bool, scale: float):
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads == kv_heads:
        tensors = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        grads = kernel(*tensors, lse, 0.0, causal, scale=scale)
        return tuple(g.transpose(1, 2).contiguous() for g in grads)
    found = []
    for dout_b, q_b, k_b, v_b, out_b, lse_b in zip(dout, q, k, v, out, lse, strict=True):
        dout_b, out_b = (_rows_by_group(x, kv_heads) for x in (dout_b, out_b))
        inputs = (dout_b, *_grouped(q_b, k_b, v_b, kv_heads), out_b, lse_b.unflatten(0, (kv_heads, -1)))
        dq, dk, dv = kernel(*inputs, 0.0, causal, scale=scale)
        # the kernel sees every query head with keys of its own: their gradients add up over the group
        found.append((_ungrouped(dq), dk.sum(1).transpose(0, 1), dv.sum(1).transpose(0, 1)))
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True))


def _grouped(q, k, v, kv_heads: int):
    """One sequence (seqlen, heads, dim) as a batch of kv_heads with group_size heads each, without a copy."""
    q = _rows_by_group(q, kv_heads)
    return q, *(x.transpose(0, 1)[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))


def _rows_by_group(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    return x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _ungrouped(x: torch.Tensor) -> torch.Tensor:
    """(kv_heads, group_size, seqlen, dim) back to (seqlen, heads, dim)."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


# CUDA


def _cuda_reasons(spec: AttentionSpec) -> list[str]:
    said = []
    if torch.version.hip is not None:
        return ["this torch is built for ROCm, whose flash kernels nobody has checked against the reference"]
    if not torch.backends.cuda.is_flash_attention_available():
        said.append("this torch is built without FlashAttention")
    capability = arch.capability(spec.device)
    if capability < (8, 0):
        said.append(f"compute capability is {capability[0]}.{capability[1]}; FlashAttention-2 needs 8.0")
    if spec.dtype not in (torch.float16, torch.bfloat16):
        said.append(f"dtype is {spec.dtype}; FlashAttention-2 has float16 and bfloat16")
    if spec.head_dim % 8 or spec.head_dim > 256:
        said.append(f"head_dim is {spec.head_dim}; FlashAttention-2 in torch has multiples of 8 up to 256")
    if spec.has_seqused_q:
        said.append("seqused_q is given; FlashAttention-2 in torch has only seqused_k")
    strides = (*spec.q_stride[:-1], *spec.k_stride[:-1], *spec.v_stride[:-1])
    if not spec.aligned or any(stride % 8 for stride in strides):
        said.append("q, k or v has an address or stride that is no multiple of 16 bytes")
    return said


def _cuda_arguments(spec: AttentionSpec) -> dict:
    """Keyword arguments that torch's forward and backward share."""
    window = spec.window
    sides = [None if side < 0 else side for side in (window.left, window.right)]
    return {
        "max_q": spec.seqlen_q,
        "max_k": spec.seqlen_k,
        "dropout_p": 0.0,
        "is_causal": window.causal,
        "scale": spec.softmax_scale,
        "window_size_left": None if window.causal else sides[0],
        "window_size_right": None if window.causal else sides[1],
    }


def _cuda_forward(spec: AttentionSpec):
    arguments = _cuda_arguments(spec)

    def plan(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query=q,
            key=k,
            value=v,
            cum_seq_q=cu_seqlens_q,
            cum_seq_k=cu_seqlens_k,
            return_debug_mask=False,
            seqused_k=seqused_k,
            **arguments,
        )
        # FlashAttention-2 writes +inf for a row that sees no key
        return out.contiguous(), lse.masked_fill(lse == math.inf, -math.inf)

    return plan


def _adds_in_any_order(spec: AttentionSpec) -> bool:
    """Whether torch's backward would add up dq by atomics where the question forbids that.

    It does unless torch's global mode is on, and even then if that only warns; it has no argument for it, and
    setting the mode for the length of a call would set it for other threads. A plan may be decided by the
    mode: `ops` keeps the mode in the keys of backward plans, so that a plan runs under no other.
    """
    strict = torch.are_deterministic_algorithms_enabled()
    strict = strict and not torch.is_deterministic_algorithms_warn_only_enabled()
    return spec.deterministic and not strict


def _cuda_backward(spec: AttentionSpec):
    arguments = _cuda_arguments(spec)

    def plan(dout, q, k, v, out, lse, cu_seqlens_q=None, cu_seqlens_k=None, *_):
        grads = torch.ops.aten._flash_attention_backward(
            grad_out=dout.contiguous(),
            query=q,
            key=k,
            value=v,
            out=out,
            logsumexp=lse.masked_fill(lse == -math.inf, math.inf),  # as its forward wrote it
            cum_seq_q=cu_seqlens_q,
            cum_seq_k=cu_seqlens_k,
            rng_state=lse.new_empty(2, dtype=torch.uint64),  # state of a dropout that is off
            unused=lse.new_empty(0, dtype=torch.uint64),
            **arguments,
        )
        return tuple(g.contiguous() for g in grads)

    return _unless_dlse(plan, spec)
