"""The specification of attention: blockwise torch, on any device, for any float type, in linear memory.

Scores are computed a block of queries by a block of keys at a time with the online softmax (arXiv 2407.08608,
section 2.3): a running maximum and sum per row, the output rescaled when the maximum grows. The backward
recomputes the probabilities of a block from the log-sum-exp. A kernel that disagrees with this file is wrong.

Packed sequences (varlen) are taken one after the other, which needs their lengths on the host: on a GPU that
waits for the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from tandem_attn.spec import AttentionSpec, Window

NAME = "reference"
KEYS_PER_BLOCK = 512
MAX_ROWS_PER_BLOCK = 512
MAX_SCORES = 2**24  # elements of one block of scores: 64 MB in float32


def reasons(spec: AttentionSpec) -> list[str]:
    """Why this backend cannot answer: it always can."""
    return []


def describe(spec: AttentionSpec) -> str:
    """One line for explain(): how the question would be answered."""
    rows = rows_per_block(1 if spec.varlen else spec.batch, spec.num_heads)
    kind = str(spec.lse_dtype).removeprefix("torch.")
    walk = ", one sequence after the other" if spec.varlen else ""
    return f"blockwise torch: blocks of {rows} queries x {KEYS_PER_BLOCK} keys, sums in {kind}{walk}"


def visible(rows: range, keys: range, seqlen_q: int, seqlen_k: int, window: Window, device=None):
    """(rows, keys) booleans: whether query i may see key j. Both sequences end together (bottom-right)."""
    positions = torch.arange(rows.start, rows.stop, device=device)[:, None] + (seqlen_k - seqlen_q)
    distance = torch.arange(keys.start, keys.stop, device=device)[None, :] - positions
    seen = torch.ones_like(distance, dtype=torch.bool)
    if window.left >= 0:
        seen &= distance >= -window.left
    if window.right >= 0:
        seen &= distance <= window.right
    return seen


def visible_keys(rows: range, seqlen_q: int, seqlen_k: int, window: Window) -> range:
    """The smallest range of keys that holds every key some query of `rows` sees."""
    offset = seqlen_k - seqlen_q
    start = max(0, rows.start + offset - window.left) if window.left >= 0 else 0
    stop = min(seqlen_k, rows.stop + offset + window.right) if window.right >= 0 else seqlen_k
    return range(min(start, seqlen_k), max(stop, min(start, seqlen_k)))


def rows_per_block(batch: int, num_heads: int) -> int:
    """Queries of a block, such that the scores of all heads stay under MAX_SCORES."""
    return min(MAX_ROWS_PER_BLOCK, max(1, MAX_SCORES // (KEYS_PER_BLOCK * max(1, batch * num_heads))))


def forward(spec: AttentionSpec):
    """The plan for a question: (q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k) -> (out, lse)."""

    @in_full_precision(spec)
    def plan(q, k, v, *lengths):
        out = q.new_zeros(spec.out_shape)
        lse = q.new_full(spec.lse_shape, -math.inf, dtype=spec.lse_dtype)
        if not spec.varlen:
            attend(q, k, v, out, lse, spec)
            return out, lse
        for rows, keys in sequences(*lengths):
            # a batch of one: views, so that the results land in place
            attend(q[None, rows], k[None, keys], v[None, keys], out[None, rows], lse[None, :, rows], spec)
        return out, lse

    return plan


def backward(spec: AttentionSpec):
    """The plan for gradients: (dout, dlse or None, q, k, v, out, lse, cu_seqlens_q, ...) -> (dq, dk, dv)."""

    @in_full_precision(spec)
    def plan(dout, dlse, q, k, v, out, lse, *lengths):
        delta = row_delta(dout, dlse, out, lse)
        grads = tuple(x.new_zeros(x.shape) for x in (q, k, v))
        if not spec.varlen:
            attend_backward(dout, delta, q, k, v, lse, grads, spec)
            return grads
        for rows, keys in sequences(*lengths):
            of_rows, of_keys = (None, rows), (None, keys)
            parts = (grads[0][of_rows], grads[1][of_keys], grads[2][of_keys])
            columns = (None, slice(None), rows)
            inputs = (q[of_rows], k[of_keys], v[of_keys])
            attend_backward(dout[of_rows], delta[columns], *inputs, lse[columns], parts, spec)
        return grads

    return plan


def sequences(cu_seqlens_q, cu_seqlens_k, seqused_q=None, seqused_k=None) -> Iterator[tuple[slice, slice]]:
    """Declared rows of q and of k for each packed sequence. Brings the lengths to the host."""
    return zip(_slices(cu_seqlens_q, seqused_q), _slices(cu_seqlens_k, seqused_k), strict=True)


def _slices(cu_seqlens: torch.Tensor, seqused: torch.Tensor | None) -> list[slice]:
    starts = cu_seqlens.tolist()
    if seqused is None:
        return [slice(*pair) for pair in itertools.pairwise(starts)]
    return [slice(start, start + used) for start, used in zip(starts[:-1], seqused.tolist(), strict=True)]


def attend(q, k, v, out, lse, spec: AttentionSpec) -> None:
    """Write attention of equally long sequences into `out` and `lse`.

    q (batch, seqlen_q, heads, head_dim), k (batch, seqlen_k, kv_heads, head_dim), v (..., head_dim_v), out
    like q with head_dim_v, lse (batch, heads, seqlen_q).
    """
    kind, window = spec.lse_dtype, spec.window
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    q, k, v, out = (by_group(x, spec.num_kv_heads) for x in (q, k, v, out))
    lse = lse.unflatten(1, (spec.num_kv_heads, -1))
    for rows in blocks(range(seqlen_q), rows_per_block(q.shape[0], spec.num_heads)):
        i = slice(rows.start, rows.stop)
        q_block = q[..., i, :].to(kind)
        row_max = torch.full_like(q_block[..., :1], -math.inf)
        row_sum = torch.zeros_like(row_max)
        o = q_block.new_zeros(*q_block.shape[:-1], v.shape[-1])
        for keys in blocks(visible_keys(rows, seqlen_q, seqlen_k, window), KEYS_PER_BLOCK):
            j = slice(keys.start, keys.stop)
            s, _ = scores(q_block, k[..., j, :].to(kind), spec)
            s = s.masked_fill(~visible(rows, keys, seqlen_q, seqlen_k, window, s.device), -math.inf)
            new_max = torch.maximum(row_max, s.amax(-1, keepdim=True))
            offset = new_max.masked_fill(new_max == -math.inf, 0.0)  # no key seen yet: exp(-inf - 0) = 0
            p = torch.exp(s - offset)
            alpha = torch.exp(row_max - offset)
            row_sum = row_sum * alpha + p.sum(-1, keepdim=True)
            o = o * alpha + p @ v[..., j, :].to(kind)
            row_max = new_max
        # a row that saw no key has row_sum 0 and o 0: out 0, and lse -inf + log(1)
        row_sum = row_sum.masked_fill(row_max == -math.inf, 1.0)
        out[..., i, :] = (o / row_sum).to(out.dtype)
        lse[..., i] = (row_max + row_sum.log()).squeeze(-1)


def row_delta(dout, dlse, out, lse) -> torch.Tensor:
    """(batch, heads, rows) or (heads, rows): sum of dout * out over head_dim, less the gradient of lse.

    d lse / d s is p and d out / d s is p (v - out), so both reach the scores as p * (dout v - delta).
    """
    kind = lse.dtype
    delta = torch.einsum("...d,...d->...", dout.to(kind), out.to(kind)).transpose(-1, -2)
    if dlse is not None:
        delta = delta - dlse.to(kind)
    return delta.masked_fill(lse == -math.inf, 0.0)


def attend_backward(dout, delta, q, k, v, lse, grads, spec: AttentionSpec) -> None:
    """Write gradients of equally long sequences into `grads` (dq, dk, dv), shaped as q, k and v.

    The probabilities of a block come back from lse: p = exp(s - lse). Rows without a key have p = 0.
    """
    kind, window, groups = spec.lse_dtype, spec.window, spec.num_kv_heads
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    q, k, v, dout = (by_group(x, groups) for x in (q, k, v, dout))
    dq, dk, dv = (by_group(x, groups) for x in grads)
    lse, delta = (x.unflatten(1, (groups, -1))[..., None] for x in (lse, delta))
    dk_sum, dv_sum = (torch.zeros_like(x, dtype=kind, memory_format=torch.contiguous_format) for x in (k, v))
    for rows in blocks(range(seqlen_q), rows_per_block(q.shape[0], spec.num_heads)):
        i = slice(rows.start, rows.stop)
        q_block, dout_block, lse_block = q[..., i, :].to(kind), dout[..., i, :].to(kind), lse[..., i, :]
        nothing_seen = lse_block == -math.inf
        offset = lse_block.masked_fill(nothing_seen, math.inf)  # exp(s - inf) = 0
        dout_block = dout_block.masked_fill(nothing_seen, 0.0)
        dq_block = torch.zeros_like(q_block)
        for keys in blocks(visible_keys(rows, seqlen_q, seqlen_k, window), KEYS_PER_BLOCK):
            j = slice(keys.start, keys.stop)
            k_block, v_block = k[..., j, :].to(kind), v[..., j, :].to(kind)
            s, slope = scores(q_block, k_block, spec)
            p = torch.exp(s - offset)
            p = p.masked_fill(~visible(rows, keys, seqlen_q, seqlen_k, window, s.device), 0.0)
            dv_sum[..., j, :] += (p.mT @ dout_block).sum(2, keepdim=True)  # over the heads of a group
            ds = p * (dout_block @ v_block.mT - delta[..., i, :]) * slope
            dq_block += ds @ k_block
            dk_sum[..., j, :] += (ds.mT @ q_block).sum(2, keepdim=True)
        dq[..., i, :] = dq_block.to(dq.dtype)
    dk.copy_(dk_sum)
    dv.copy_(dv_sum)


def scores(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec):
    """Scores (..., rows, keys) of a block before masking, and their derivative by the raw products q k^T."""
    s = (q @ k.mT) * spec.softmax_scale
    if spec.softcap == 0.0:
        return s, spec.softmax_scale
    t = torch.tanh(s / spec.softcap)
    return spec.softcap * t, spec.softmax_scale * (1.0 - t * t)


def by_group(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """View (batch, seqlen, heads, dim) as (batch, kv_heads, heads of a group, seqlen, dim); 1 for k, v."""
    return x.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)


def blocks(whole: range, size: int) -> Iterator[range]:
    """Cut a range into blocks of at most `size`."""
    for start in range(whole.start, whole.stop, size):
        yield range(start, min(start + size, whole.stop))


def in_full_precision(spec):
    """Decorator: no gradient recording, and no autocast, which would round float32 products to 16 bits."""

    def decorate(plan):
        def run(*args):
            with torch.no_grad(), torch.autocast(spec.device.type, enabled=False):
                return plan(*args)

        return run

    return decorate
