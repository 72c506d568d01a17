"""The public functions over a KV cache, with FlashAttention-3's names, argument order and defaults.

Numbers in tensors (lengths, rows, pages, starts) are looked at on each call on the CPU, before anything is
written. On a GPU that would wait for the device: it is done only if TANDEM_VALIDATE=1 or TANDEM_DEBUG=1.
Otherwise lengths are taken as if clamped to 0 up to the capacity, and new tokens that do not fit are not
written; rows, pages and starts out of range are undefined behaviour. Entries of page_table past the end of a
sequence are never looked at. A cache_seqlens that is an int is checked always.

Under autocast q, k and v come in the type of the cache, over an FP8 cache in that of autocast.

FP8: k_cache and v_cache are float8_e4m3fn, and stand for their values times k_descale and v_descale, float32:
- (batch, kv_heads): a factor for each sequence and KV head, as in FlashAttention-3. Only read. New k and v
  become e4m3 in this unit, what is larger than 448 of it saturates; or they are e4m3, and copied.
- (rows or pages, blocks, kv_heads) beside the cache: slot s of a row has its factor at [row, s //
  SCALE_BLOCK, head]. Appending writes them, too. They are powers of two that grow with the largest number of
  their block: where one does, the block's old numbers are rounded once more. A block whose first slot is
  written begins anew, whatever was there. A NaN or infinity makes NaN of its block until then. One sequence
  of a call appends to a block.
q, k and v have 16 bits and are rotated before they are quantized. Or q is e4m3: then out is bfloat16,
q_descale (batch, kv_heads), None for 1, belongs to it, and nothing is rotated.
"""

from __future__ import annotations

import functools
import inspect

import torch

from tandem_attn import check_decode, dispatch, ops_decode, reference_decode
from tandem_attn.api import refuse_not_yet
from tandem_attn.spec import DTYPES, NO_WINDOW, check_int, check_vector, refuse, window_sides
from tandem_attn.spec_decode import MAX_SPLITS, SCALE_BLOCK, DecodeOptions, Given

__all__ = [
    "SCALE_BLOCK",
    "decode_workspace",
    "explain_with_kvcache",
    "flash_attn_combine",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "merge_attention_states",
]

METADATA_VERSION = 1
LSE_DTYPES = (torch.float32, torch.float64)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | int | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    split_size: int | None = None,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention of q to a cache, into which k and v are written first. Inference only.

    q (batch, seqlen_q, heads, d), or (total_q, heads, d) with cu_seqlens_q (batch + 1,) and max_seqlen_q.
    k_cache (rows, capacity, kv_heads, d), v_cache (..., d_v): row b for sequence b, or cache_batch_idx[b]; or
    pages (pages, page_size, kv_heads, d) with page_table (batch, max_pages). All index tensors are int32.

    k, v             put into slots cache_seqlens[b] and after: (batch, seqlen_new, kv_heads, d), or (total,
                     kv_heads, d) with cu_seqlens_k_new. They are keys of this call. None: nothing is written
    rotary_cos, rotary_sin  (positions, rotary_dim / 2): q and k are rotated, in copies (arXiv 2104.09864);
                     pairs are (2i, 2i + 1) if rotary_interleaved, else (i, i + rotary_dim / 2). New key t is
                     at start + t, query i at start + i if causal or window_size is given, else at start,
                     where start is rotary_seqlens[b], or cache_seqlens[b] without it
    cache_seqlens    int or (batch,): keys in the cache before this call; None: as many as there is room for
    cache_leftpad    (batch,): keys in slots before this are not seen; slots and positions stay what they are
    causal, window_size     query i sits on key keys - seqlen_q + i: both end together, new keys included
    num_splits       0: what is best; or 1 to 256, at most so many splits of the keys. Changes rounding only
    q_descale, k_descale, v_descale   of e4m3 tensors: see the top of `api_decode.py`
    split_size       keys of a split: bounds at its multiples, so that the bits of a sequence's result do not
                     depend on the batch it is in, only on its numbers and on max_seqlen_q (or seqlen_q)
    pack_gqa         no effect: heads that share keys are always read together
    scheduler_metadata      no effect: see `get_scheduler_metadata`
    out, workspace   memory for the result, apart from the inputs, and what `decode_workspace` returned
    The others       as in `flash_attn_func`

    Returns out, shaped as q with d_v, and on request lse (batch, heads, seqlen_q) or (heads, total_q). A
    query that sees no key has 0 and -inf. Raises as `flash_attn_func`, and the cache is then as it was.
    """
    if qv is not None:
        refuse_not_yet(qv=qv)
    if attention_chunk != 0 or not (pack_gqa is None or pack_gqa is True or pack_gqa is False):
        _refuse(attention_chunk, pack_gqa)
    left, right = window_sides(causal, window_size)
    given = (q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad)
    given += (page_table, cu_seqlens_q, cu_seqlens_k_new, max_seqlen_q, rotary_seqlens)
    given += (q_descale, k_descale, v_descale)
    options = (softmax_scale, left, right, softcap, sm_margin, num_splits, split_size, rotary_interleaved)
    memory = (out, workspace, scheduler_metadata)
    found, lse = ops_decode.attend(given, options, bool(return_softmax_lse), memory)
    return (found, lse) if return_softmax_lse else found


def flash_attn_combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all keys from attention over parts of them, exactly (arXiv 2205.14135, section 3.1).

    out_partial (splits, batch, seqlen, heads, d) or (splits, total, heads, d), float32 as a rule; lse_partial
    (splits, batch, seqlen, heads) or (splits, total, heads), float32, heads last as in FlashAttention-3;
    1 to 256 splits. out: memory for the result. out_dtype: its type; None is that of out_partial.

    Returns out (batch, seqlen, heads, d) and lse (batch, seqlen, heads). A part whose lse is -inf counts for
    nothing, whatever its out holds; where all are, out is 0 and lse -inf.
    """
    _check_part("out_partial", out_partial, DTYPES)
    _check_part("lse_partial", lse_partial, LSE_DTYPES)
    form = "(splits, batch, seqlen, heads, d) or (splits, total, heads, d)"
    if out_partial.dim() not in (4, 5):
        refuse(ValueError, "out_partial", f"of shape {tuple(out_partial.shape)}", form)
    splits = out_partial.shape[0]
    if not 1 <= splits <= MAX_SPLITS:
        refuse(ValueError, "out_partial", f"of {splits} splits", f"1 to {MAX_SPLITS}")
    _check_same("lse_partial", lse_partial, out_partial.shape[:-1], out_partial.device, "out_partial")
    if out_dtype is not None and out_dtype not in DTYPES:
        refuse(TypeError, "out_dtype", out_dtype, ", ".join(map(str, DTYPES)))
    dtype = out_partial.dtype if out_dtype is None else out_dtype
    if out is not None:
        check_decode.check_out(out, out_partial.shape[1:], dtype, out_partial.device)
    found, lse = reference_decode.combine(out_partial, lse_partial, dtype)
    return (found if out is None else out.copy_(found)), lse


def merge_attention_states(*states: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all keys from (out, lse) of attention over parts of them, as the functions here return.

    Each state: out (batch, seqlen, heads, d) with lse (batch, heads, seqlen), or out (total, heads, d) with
    lse (heads, total): the same queries, other keys. A shared prefix may so be attended to on its own.

    Returns out in the type of the first, and lse. Parts that saw no key (lse -inf) count for nothing. Plain
    torch: differentiable. Raises TypeError or ValueError as all functions here.
    """
    if not states:
        refuse(ValueError, "states", "empty", "at least one pair (out, lse)")
    outs, lses = [], []
    for i, state in enumerate(states):
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            refuse(TypeError, f"states[{i}]", type(state).__name__, "a pair (out, lse)")
        out, lse = state
        _check_part(f"out of states[{i}]", out, DTYPES)
        _check_part(f"lse of states[{i}]", lse, LSE_DTYPES)
        if out.dim() not in (3, 4):
            form = "(batch, seqlen, heads, d) or (total, heads, d)"
            refuse(ValueError, f"out of states[{i}]", f"of shape {tuple(out.shape)}", form)
        first = states[0][0]
        _check_same(f"out of states[{i}]", out, first.shape, first.device, "the first out")
        shape = (*first.shape[:-3], first.shape[-2], first.shape[-3])
        _check_same(f"lse of states[{i}]", lse, shape, first.device, "the first out")
        outs.append(out)
        lses.append(lse.mT)
    kind = functools.reduce(torch.promote_types, (x.dtype for x in outs))
    lse_kind = functools.reduce(torch.promote_types, (x.dtype for x in lses))
    parts = torch.stack([x.to(kind) for x in outs]), torch.stack([x.to(lse_kind) for x in lses])
    found, lse = reference_decode.combine(*parts, states[0][0].dtype)
    return found, lse.mT.contiguous()


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: torch.Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> torch.Tensor:
    """What `flash_attn_with_kvcache` takes as scheduler_metadata, so that callers of FlashAttention-3 run as
    they are. It changes neither results nor speed.

    FlashAttention-3 decides here, in a launch of its own, how many splits each sequence gets. Our kernels
    need no such launch: a program finds its share from the lengths as it starts (docs/kernels/decode.md).

    The arguments are those of the call, in numbers; cache_seqlens (batch,) int32 says on which device.
    Returns int32 (4,): version, batch_size, num_splits, sm_margin. Nothing waits for the device. Raises
    TypeError or ValueError for numbers that no call could have.
    """
    sizes = dict(batch_size=batch_size, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    heads = dict(num_heads_q=num_heads_q, num_heads_kv=num_heads_kv, headdim=headdim)
    for name, x in (sizes | dict(max_seqlen_k_new=max_seqlen_k_new, sm_margin=sm_margin)).items():
        check_int(name, x, 0)
    for name, x in heads.items():
        check_int(name, x, 1)
    check_decode.check_splits(num_splits, None)
    window_sides(causal, window_size)
    if attention_chunk != 0:
        refuse_not_yet(attention_chunk=attention_chunk)
    if not isinstance(cache_seqlens, torch.Tensor):
        refuse(TypeError, "cache_seqlens", type(cache_seqlens).__name__, "a torch.Tensor of dtype int32")
    device = cache_seqlens.device
    check_vector("cache_seqlens", cache_seqlens, device, batch_size, "batch_size")
    numbers = (METADATA_VERSION, batch_size, num_splits, sm_margin)
    # filled on the device: a copy from the host would wait for it
    return torch.stack([torch.full((), x, dtype=torch.int32, device=device) for x in numbers])


def decode_workspace(*args, **kwargs) -> torch.Tensor:
    """Scratch memory for calls of `flash_attn_with_kvcache` with the same arguments, but for the numbers.

    Returns a uint8 tensor of zeros on q's device: pass it as `workspace`. One call at a time may use it.
    """
    given, options = _bound(args, kwargs)
    size = ops_decode.workspace_bytes(given, options)
    return torch.zeros(size, dtype=torch.uint8, device=given[0].device)


def explain_with_kvcache(*args, **kwargs) -> dispatch.Explanation:
    """What `flash_attn_with_kvcache` would do with the same arguments; see `explain`.

    `append` of the Explanation tells who writes the cache and rotates, or is None. Nothing is computed or
    written, and numbers in tensors are not looked at.
    """
    return ops_decode.explanation(*ops_decode.question(*_bound(args, kwargs)))


def _bound(args: tuple, kwargs: dict) -> tuple[tuple, tuple]:
    """(fields of Given, fields of DecodeOptions) of a call."""
    bound = inspect.signature(flash_attn_with_kvcache).bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    refuse_not_yet(qv=call["qv"])
    _refuse(call["attention_chunk"], call["pack_gqa"])
    call["window_left"], call["window_right"] = window_sides(call["causal"], call["window_size"])
    return tuple(call[name] for name in Given._fields), tuple(call[name] for name in DecodeOptions._fields)


def _refuse(attention_chunk, pack_gqa) -> None:
    refuse_not_yet(attention_chunk=attention_chunk)
    if pack_gqa is not None and not isinstance(pack_gqa, bool):
        refuse(TypeError, "pack_gqa", repr(pack_gqa), "None, True or False")


def _check_part(name: str, x, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, torch.Tensor):
        refuse(TypeError, name, type(x).__name__, "a torch.Tensor")
    if x.dtype not in dtypes:
        refuse(TypeError, name, f"of dtype {x.dtype}", ", ".join(map(str, dtypes)))


def _check_same(name: str, x: torch.Tensor, shape, device, whose: str) -> None:
    if tuple(x.shape) != tuple(shape):
        refuse(ValueError, name, f"of shape {tuple(x.shape)}", f"{tuple(shape)}, as {whose}")
    if x.device != device:
        refuse(ValueError, name, f"on {x.device}", f"the device of {whose}, {device}")
