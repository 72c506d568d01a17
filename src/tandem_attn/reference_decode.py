"""The specification of attention over a KV cache: torch, on any device, for any float type.

`append` writes new keys and values into the cache, `decode` attends to it, `combine` joins what was computed
of parts of the keys. A kernel that disagrees with this file is wrong. Splits are not made here: they change
rounding only. Numbers of an FP8 cache are multiplied by their factors, exactly, and the rest is in float32.

Lengths are needed on the host: on a GPU that waits for the device. Whatever numbers the tensors hold, lengths
are taken as if clamped to the capacity, and tokens that do not fit are not written.
"""

from __future__ import annotations

import itertools
import math

import torch

from tandem_attn.quant import saturated, scales
from tandem_attn.reference import attend, in_full_precision, scores, visible_keys
from tandem_attn.spec import E4M3
from tandem_attn.spec_decode import AppendSpec, Cache, DecodeSpec, New

NAME = "reference"
MAX_KEYS = 2**24  # elements of k of which a copy is made; more are taken block by block


def decode_reasons(spec: DecodeSpec) -> list[str]:
    """Why this backend cannot attend to a cache: it always can."""
    return []


def append_reasons(spec: AppendSpec) -> list[str]:
    """Why this backend cannot write into a cache: it always can."""
    return []


def decode_describe(spec: DecodeSpec) -> str:
    """One line for explain(): how the question would be answered."""
    kind = str(spec.lse_dtype).removeprefix("torch.") + (" of dequantized numbers" if spec.fp8 else "")
    keys = "gathered from its pages" if spec.page_size else "read in place"
    return f"blockwise torch, keys of each sequence {keys}, sums in {kind}, keys not split"


def append_describe(spec: AppendSpec) -> str:
    """One line for explain(): how the cache would be written."""
    return "torch, " + ("block by block" if spec.descale_block and spec.has_new else "all tokens at once")


# Attention


def decode(spec: DecodeSpec):
    """The plan for a question: (q, Cache, New, out, workspace, want_lse) -> (out, lse or None)."""

    @in_full_precision(spec)
    def plan(q, cache: Cache, new: New, out, workspace, want_lse: bool):
        found = q.new_zeros(spec.out_shape, dtype=spec.dtype)
        lse = q.new_full(spec.lse_shape, -math.inf, dtype=spec.lse_dtype)
        lengths, pads = _key_ranges(spec, cache, new)
        alike = spec.page_size == 0 and not spec.packed_q and len({*zip(lengths, pads, strict=True)}) == 1
        if alike and cache.batch_idx is None:  # one call for the whole batch
            whole, keys = slice(None), slice(pads[0], lengths[0])
            k, v = _numbers(spec, cache, whole, whole, keys)
            _attend(spec, _queries(spec, q, new, whole), k, v, found, lse)
        else:
            _attend_each(spec, q, cache, new, lengths, pads, found, lse)
        if out is not None:
            found = out.copy_(found)
        return found, lse if want_lse else None

    plan.workspace_bytes = 0
    return plan


def _key_ranges(spec: DecodeSpec, cache: Cache, new: New) -> tuple[list[int], list[int]]:
    """For each sequence the number of slots in use, new tokens included, and how many of them are padding."""
    before = [cache.seqlen] * spec.batch if cache.seqlens is None else cache.seqlens.tolist()
    added = [new.seqlen_new] * spec.batch
    if new.cu_seqlens_k_new is not None:
        added = [stop - start for start, stop in itertools.pairwise(new.cu_seqlens_k_new.tolist())]
    room = spec.capacity
    lengths = [min(min(max(n, 0), room) + more, room) for n, more in zip(before, added, strict=True)]
    pads = [0] * spec.batch if cache.leftpad is None else cache.leftpad.tolist()
    return lengths, [min(max(pad, 0), n) for pad, n in zip(pads, lengths, strict=True)]


def _attend_each(spec: DecodeSpec, q, cache: Cache, new: New, lengths, pads, out, lse) -> None:
    """One sequence after the other. Its last query sits on its last key, so padding is just cut off."""
    rows = None if cache.batch_idx is None else cache.batch_idx.tolist()
    starts = None if new.cu_seqlens_q is None else new.cu_seqlens_q.tolist()
    for b, (n, pad) in enumerate(zip(lengths, pads, strict=True)):
        if starts is None:
            of_q, of_lse = slice(b, b + 1), (slice(b, b + 1),)
        else:
            of_q = (None, slice(starts[b], starts[b + 1]))
            of_lse = (None, slice(None), of_q[1])
        if cache.page_table is None:
            row = b if rows is None else rows[b]
            of, slots = slice(row, row + 1), slice(pad, n)
        else:
            of = cache.page_table[b, pad // spec.page_size : -(-n // spec.page_size)]
            slots = slice(pad % spec.page_size, pad % spec.page_size + n - pad)
        sequence = slice(b, b + 1)
        k, v = _numbers(spec, cache, sequence, of, slots)
        # slices are views, so that results land in place
        _attend(spec, _queries(spec, q[of_q], new, sequence), k, v, out[of_q], lse[of_lse])


def _queries(spec: DecodeSpec, q, new: New, sequences: slice):
    """q (batch, rows, heads, dim) of these sequences, dequantized."""
    if q.dtype != E4M3:
        return q
    q = q.to(spec.lse_dtype)
    if new.q_descale is None:
        return q
    return q * new.q_descale[sequences].repeat_interleave(spec.group_size, 1)[:, None, :, None]


def _numbers(spec: DecodeSpec, cache: Cache, sequences: slice, of, slots: slice) -> tuple:
    """(k, v) of these sequences, (sequences, keys, heads, dim), dequantized. `of`: rows; or pages, one after
    the other. Factors of other slots are not looked at."""

    def chosen(x):
        x = x[of]
        return (x.flatten(0, 1)[None] if spec.page_size else x)[:, slots]

    def numbers(x, descale):
        if descale is None:
            return chosen(x)
        if spec.descale_block:
            each = chosen(descale.repeat_interleave(spec.descale_block, 1)[:, : x.shape[1]])
        else:
            each = descale[sequences, None]
        return chosen(x).to(spec.lse_dtype) * each[..., None]

    return numbers(cache.k, cache.k_descale), numbers(cache.v, cache.v_descale)


def _attend(spec: DecodeSpec, q, k, v, out, lse) -> None:
    """`reference.attend`, and a shorter way for single queries: each sees one range of keys, without a mask.

    Heads that share keys are then rows of one product, and all scores fit beside the keys.
    """
    if q.shape[1] != 1 or k.numel() > MAX_KEYS:
        attend(q, k, v, out, lse, spec)
        return
    seen = visible_keys(range(1), 1, k.shape[1], spec.window)
    if not seen:
        return  # out and lse hold 0 and -inf
    kind, heads = spec.lse_dtype, (spec.num_kv_heads, spec.group_size)
    k, v = (x[:, seen.start : seen.stop].transpose(1, 2).to(kind) for x in (k, v))
    s, _ = scores(q[:, 0].unflatten(1, heads).to(kind), k, spec)
    total = s.logsumexp(-1, keepdim=True)
    out[:, 0].unflatten(1, heads).copy_(torch.exp(s - total) @ v)
    lse.copy_(total.flatten(1, 2))


# Writing into the cache


def append(spec: AppendSpec):
    """The plan for writing: (q, k or None, v or None, Cache, New, Rotary) -> q, or a rotated copy."""

    @in_full_precision(spec)
    def plan(q, k, v, cache: Cache, new: New, rotary):
        packed = new.cu_seqlens_q is not None or new.cu_seqlens_k_new is not None
        tensors = (cache.seqlens, cache.batch_idx, cache.page_table, rotary[2])
        if not packed and not spec.fp8 and all(x is None for x in tensors):
            return _append_alike(spec, q, k, v, cache, rotary)
        return _append_each(spec, q, k, v, cache, new, rotary)

    return plan


def _append_alike(spec: AppendSpec, q, k, v, cache: Cache, rotary):
    """Every sequence gets as many tokens in the same slots: one slice of the cache."""
    cos, sin, _ = rotary
    first = min(max(cache.seqlen, 0), spec.capacity)

    def turned(x, steps: int):
        positions = torch.arange(x.shape[1], device=x.device) * steps + first
        return rotate(x, cos, sin, positions, spec.interleaved)

    if k is not None:
        slots = slice(first, min(first + k.shape[1], spec.capacity))
        kept = slice(0, slots.stop - first)
        cache.k[:, slots] = k[:, kept] if cos is None else turned(k[:, kept], 1)
        cache.v[:, slots] = v[:, kept]
    return q if cos is None else turned(q, int(spec.per_token))


def _append_each(spec: AppendSpec, q, k, v, cache: Cache, new: New, rotary):
    """Every token has a sequence and a number there, and so a slot and a position."""
    cos, sin, rotary_seqlens = rotary
    before = cache.seqlens
    if before is None:
        before = torch.full((spec.batch,), cache.seqlen, dtype=torch.int32, device=q.device)
    before = before.long().clamp(0, spec.capacity)
    first = before if rotary_seqlens is None else rotary_seqlens.long()
    if k is not None:
        sequence, number, k, v = _tokens(spec.batch, new.cu_seqlens_k_new, k, v)
        if cos is not None:
            k = k.float() if spec.fp8 else k  # then rounded once, to e4m3
            k = rotate(k, cos, sin, first[sequence] + number, spec.interleaved)
        _write(spec, cache, sequence, before[sequence] + number, k, v)
    if cos is None:
        return q
    turned = q.clone(memory_format=torch.contiguous_format)
    sequence, number, rows = _tokens(spec.batch, new.cu_seqlens_q, turned)
    positions = first[sequence] + number * int(spec.per_token)
    rows.copy_(rotate(rows, cos, sin, positions, spec.interleaved))
    return turned


def _tokens(batch: int, starts, *tensors):
    """(the sequence of each token, its number there, the tensors as (tokens, heads, dim) views).

    starts: (batch + 1,) of packed tensors (rows, heads, dim), whose other rows belong to nobody; None for
    tensors (batch, seqlen, heads, dim).
    """
    device = tensors[0].device
    if starts is None:
        seqlen = tensors[0].shape[1]
        sequence = torch.arange(batch, device=device).repeat_interleave(seqlen)
        number = torch.arange(seqlen, device=device).repeat(batch)
        return sequence, number, *(x.flatten(0, 1) for x in tensors)
    start, stop = int(starts[0]), int(starts[-1])
    sequence = torch.arange(batch, device=device).repeat_interleave(starts.diff())
    number = torch.arange(start, stop, device=device) - starts[sequence]
    return sequence, number, *(x[start:stop] for x in tensors)


def _write(spec: AppendSpec, cache: Cache, sequence, slots, k, v) -> None:
    """Put tokens (n, kv_heads, dim) of these sequences into these slots; those that do not fit stay out."""
    fits = slots < spec.capacity
    sequence, slots, k, v = (x[fits] for x in (sequence, slots, k, v))
    if cache.page_table is not None:
        pages, within = slots // spec.page_size, slots % spec.page_size
        rows, slots = cache.page_table[sequence, pages].long(), within
    else:
        rows = sequence if cache.batch_idx is None else cache.batch_idx[sequence].long()
    if spec.quantizes and spec.descale_block:
        _fill_blocks(spec, cache, rows, slots, k, v)
        return
    if spec.quantizes:
        k = saturated(k.float() / cache.k_descale[sequence, :, None])
        v = saturated(v.float() / cache.v_descale[sequence, :, None])
    cache.k[rows, slots] = k
    cache.v[rows, slots] = v


def _fill_blocks(spec: AppendSpec, cache: Cache, rows, slots, k, v) -> None:
    """`_write` where factors belong to blocks, one block after the other."""
    blocks = torch.stack((rows, slots // spec.descale_block), 1)
    for row, block in blocks.unique(dim=0).tolist():
        mine = (rows == row) & (slots // spec.descale_block == block)
        start = block * spec.descale_block
        fill_block(cache.k[row], cache.k_descale[row, block], start, slots[mine], k[mine])
        fill_block(cache.v[row], cache.v_descale[row, block], start, slots[mine], v[mine])


def fill_block(x, descale, start: int, slots, tokens) -> None:
    """Write tokens (n, heads, dim) into slots, one after the other, of the block of x (all slots of a row,
    heads, dim; e4m3) that starts at slot `start` and has the factors descale (heads,).

    Factors are the largest that tokens or the slots before them want: powers of two, as `quant.scales` makes
    them, or what else they were. Slots from `start` on do not count if the first of them is written now.
    """
    factor, _ = scales(tokens.float().abs().amax((0, 2)), powers=True)
    first = int(slots.min())
    if first > start:
        factor = torch.maximum(descale, factor)  # NaN if one is
        grown = (factor != descale).nonzero()[:, 0]  # heads
        old = x[start:first, grown].float() * (descale / factor)[grown, None]
        x[start:first, grown] = saturated(old)
    x[slots] = saturated(tokens.float() / factor[:, None])
    descale.copy_(factor)


def rotate(x, cos, sin, positions, interleaved: bool) -> torch.Tensor:
    """x (..., rows, heads, d) turned by the angles of positions (rows,), rounded once; x stays as it is.

    cos, sin (rotary_len, rotary_dim / 2): columns beyond rotary_dim are copied. Interleaved pairs are columns
    (2i, 2i + 1), others (i, i + rotary_dim / 2) (RoFormer, arXiv 2104.09864, and GPT-NeoX).
    """
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    positions = positions.clamp(0, cos.shape[0] - 1)
    cos, sin = (table[positions].to(kind)[..., None, :] for table in (cos, sin))
    half = cos.shape[-1]
    turning = x[..., : 2 * half].to(kind)
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = turning[..., :half], turning[..., half:]
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), -1)


# Joining parts


def combine(out: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all keys from attention over parts of them (arXiv 2205.14135, section 3.1).

    out (parts, ..., d), lse (parts, ...) -> out (..., d) in `dtype`, lse (...) in its own. A part with lse
    -inf saw no key and counts for nothing, whatever its out holds; where all are, out is 0 and lse -inf.
    """
    kind = torch.promote_types(lse.dtype, torch.float64 if out.dtype == torch.float64 else torch.float32)
    numbers = lse.to(kind)
    empty = numbers == -math.inf
    largest = numbers.amax(0)
    offset = largest.masked_fill(largest == -math.inf, 0.0)
    weights = torch.exp(numbers - offset)
    total = weights.sum(0)
    total = total.masked_fill(largest == -math.inf, 1.0)
    parts = out.to(kind).masked_fill(empty[..., None], 0.0)
    joined = (parts * (weights / total)[..., None]).sum(0)
    return joined.to(dtype), (largest + total.log()).to(lse.dtype)
