"""The public functions, with FlashAttention-3's names, argument order and defaults (Dao-AILab, hopper/)."""

from __future__ import annotations

import inspect

import torch

from tandem_attn import dispatch, ops, ops_fp8
from tandem_attn.spec import E4M3, NO_WINDOW, Lengths, Options, attention_spec, window_sides

# In FlashAttention-3's signatures, not written yet; using one raises NotImplementedError with this reason.
_NOT_YET = {
    "qv": "a second query for absorbed multi-head latent attention",
    "attention_chunk": "attention in chunks of keys",
    "num_splits": "splitting the keys of a query among programs",
    "pack_gqa": "query heads packed into rows",
}
_NEUTRAL = {"attention_chunk": "0", "num_splits": "0 or 1", "pack_gqa": "None or False"}


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention softmax(q k^T * softmax_scale) v of equally long sequences (arXiv 2407.08608, sec. 2).

    q (batch, seqlen_q, heads, head_dim), k (batch, seqlen_k, kv_heads, head_dim), v (batch, seqlen_k,
    kv_heads, head_dim_v): one dtype (float16, bfloat16, float32, float64, or float8_e4m3fn for FP8), one
    device, any strides. `heads` is a multiple of `kv_heads`; consecutive query heads share a KV head (GQA,
    MQA).

    softmax_scale      multiplies the scores; None is 1 / sqrt(head_dim)
    causal             query i sees key j if j <= i + seqlen_k - seqlen_q: both sequences end together
    window_size        (left, right): query i sees keys i + seqlen_k - seqlen_q - left to ... + right, both
                       included; -1 is unlimited. With causal, right is 0
    softcap            if above 0, scores become softcap * tanh(scores / softcap) before masking
    num_splits         0 and 1 are the same: keys are not split
    pack_gqa           None and False are the same: query heads are not packed
    deterministic      True: dq, dk and dv are bitwise repeatable, for every head_dim; so they are if
                       torch.use_deterministic_algorithms(True) holds when the backward runs. Otherwise a GPU
                       may add up dq in any order. The forward, dk and dv are repeatable in any case
    sm_margin          multiprocessors that a Hopper kernel leaves idle for other work
    return_attn_probs  also return lse (the name is FlashAttention's; no probabilities are returned)
    q_descale, k_descale, v_descale   FP8 only: float32 (batch, kv_heads), by which e4m3 numbers are
                       multiplied; None is 1. q's is shared by the query heads of a KV head
    qv, attention_chunk   not written yet: NotImplementedError

    Returns out (batch, seqlen_q, heads, head_dim_v) in q's dtype (bfloat16 for FP8), and on request lse
    (batch, heads, seqlen_q): natural log-sum-exp of each row's scaled scores, float32 (float64 for float64
    inputs). A row that sees no key has out 0 and lse -inf. Both are differentiable, once; not in FP8, where
    `flash_attn_fp8_func` starts from 16 bits, is more accurate, and has gradients.

    Raises TypeError, ValueError or NotImplementedError, naming the argument, what it was and what is
    supported.
    """
    if qv is not None:
        refuse_not_yet(qv=qv)
    if attention_chunk != 0 or num_splits not in (0, 1) or pack_gqa:
        refuse_not_yet(attention_chunk=attention_chunk, num_splits=num_splits, pack_gqa=pack_gqa)
    left, right = window_sides(causal, window_size)
    options = (softmax_scale, left, right, softcap, sm_margin, deterministic)
    out, lse = _attention(q, k, v, (q_descale, k_descale, v_descale), None, options)
    return (out, lse) if return_attn_probs else out


def flash_attn_varlen_func(
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
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_func` for sequences of different lengths, packed one after the other without padding.

    q (total_q, heads, head_dim), k (total_k, kv_heads, head_dim), v (total_k, kv_heads, head_dim_v).

    cu_seqlens_q, cu_seqlens_k   (batch + 1,) int32 on q's device: sequence b is rows cu_seqlens[b] up to
                                 cu_seqlens[b + 1]; lengths of 0 are fine
    max_seqlen_q, max_seqlen_k   int, at least the longest sequence
    seqused_q, seqused_k         (batch,) int32: only the first seqused[b] rows of a sequence count; None: all
    The others                   as in `flash_attn_func`

    Returns out (total_q, heads, head_dim_v), and on request lse (heads, total_q). Rows of q that belong to no
    sequence or lie beyond seqused_q hold nothing defined; memory there is never read into another row.

    The numbers in the length tensors are checked on every call on the CPU. On a GPU that would wait for the
    device, so it is done only if TANDEM_VALIDATE=1; wrong lengths are undefined behaviour otherwise. The
    reference and CPU backends go through the sequences on the host.
    """
    if qv is not None:
        refuse_not_yet(qv=qv)
    if attention_chunk != 0 or num_splits not in (0, 1) or pack_gqa:
        refuse_not_yet(attention_chunk=attention_chunk, num_splits=num_splits, pack_gqa=pack_gqa)
    left, right = window_sides(causal, window_size)
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k)
    options = (softmax_scale, left, right, softcap, sm_margin, deterministic)
    out, lse = _attention(q, k, v, (q_descale, k_descale, v_descale), lengths, options)
    return (out, lse) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_func` on one tensor that holds queries, keys and values; they are read in place.

    qkv (batch, seqlen, 3, heads, head_dim), or (batch, seqlen, heads + 2 kv_heads, head_dim) with num_heads_q
    = heads. Everything else, the results and the errors are those of `flash_attn_func`.
    """
    q, k, v = _unpacked(qkv, num_heads_q)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
    )


def explain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args, **kwargs) -> dispatch.Explanation:
    """What `flash_attn_func`, or with cu_seqlens `flash_attn_varlen_func`, would do with the same arguments.

    Returns an Explanation: the spec (the question as understood), the backend that answers, its
    configuration, and the reasons of every other backend. Print it. Nothing is computed. Raises what the call
    would raise, except that the numbers in length tensors are not looked at.
    """
    varlen = "cu_seqlens_q" in kwargs or (isinstance(q, torch.Tensor) and q.dim() == 3)
    function = flash_attn_varlen_func if varlen else flash_attn_func
    bound = inspect.signature(function).bind(q, k, v, *args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    refuse_not_yet(**{name: given[name] for name in _NOT_YET})
    left, right = window_sides(given["causal"], given["window_size"])
    numbers = (given[name] for name in ("softcap", "sm_margin", "deterministic"))
    options = Options(given["softmax_scale"], left, right, *numbers)
    lengths = Lengths(*(given[name] for name in Lengths._fields)) if varlen else None
    descales = tuple(given[name] for name in ("q_descale", "k_descale", "v_descale"))
    if _is_fp8(q, k, v):
        return dispatch.explanation(ops_fp8.spec_e4m3(q, k, v, descales, lengths, options))
    _refuse_descales(q, descales)
    q, k, v = ops.cast_for_autocast(q, k, v)
    return dispatch.explanation(attention_spec(q, k, v, lengths, options))


def _is_fp8(q, k, v) -> bool:
    """Whether one of the tensors is e4m3: then all have to be."""
    try:
        return q.dtype is E4M3 or k.dtype is E4M3 or v.dtype is E4M3
    except AttributeError:
        return False  # not a tensor: validation will say so


_NO_DESCALES = (None, None, None)


def _attention(q, k, v, descales: tuple, lengths: Lengths | None, options: tuple):
    """(out, lse) in the precision of the tensors."""
    if _is_fp8(q, k, v):
        return ops_fp8.attention_e4m3(q, k, v, descales, lengths, options)
    _refuse_descales(q, descales)
    return ops.attention(q, k, v, lengths, options)


def _refuse_descales(q, descales: tuple) -> None:
    """Raise for a descale of tensors wide enough to need none; what else q may be, validation will say."""
    if descales == _NO_DESCALES or not isinstance(q, torch.Tensor) or q.dtype.itemsize == 1:
        return
    name = next(n for n, x in zip(("q", "k", "v"), descales, strict=True) if x is not None)
    raise ValueError(f"{name}_descale is given for q of dtype {q.dtype}; supported: None, or e4m3 tensors")


def refuse_not_yet(**arguments) -> None:
    """Raise for the first argument that asks for something not written yet."""
    for name, value in arguments.items():
        if name == "num_splits" and value in (0, 1):
            continue
        if value is None or (name in _NEUTRAL and not value):
            continue
        was = f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else value
        raise NotImplementedError(
            f"{name} is {was}; supported: {_NEUTRAL.get(name, 'None')} ({_NOT_YET[name]} is not written yet)"
        )


def _unpacked(qkv: torch.Tensor, num_heads_q: int | None) -> tuple[torch.Tensor, ...]:
    """Views of q, k and v (batch, seqlen, heads, head_dim)."""
    if not isinstance(qkv, torch.Tensor):
        raise TypeError(f"qkv is {type(qkv).__name__}; supported: a torch.Tensor")
    shape = tuple(qkv.shape)
    if qkv.dim() == 5:
        if shape[2] != 3:
            raise ValueError(f"qkv is of shape {shape}; supported: (batch, seqlen, 3, heads, head_dim)")
        return qkv.unbind(2)
    if qkv.dim() != 4:
        supported = "(batch, seqlen, 3, heads, head_dim) or (batch, seqlen, heads + 2 kv_heads, head_dim)"
        raise ValueError(f"qkv is of shape {shape}; supported: {supported}")
    if num_heads_q is None:
        raise ValueError("num_heads_q is None; supported: the number of query heads, if qkv has 4 dimensions")
    if isinstance(num_heads_q, bool) or not isinstance(num_heads_q, (int, torch.SymInt)):
        raise TypeError(f"num_heads_q is {num_heads_q!r} ({type(num_heads_q).__name__}); supported: int")
    rest = shape[2] - num_heads_q
    if num_heads_q < 1 or rest < 2 or rest % 2:
        supported = f"{shape[2]}, the heads of qkv, less 2 kv_heads"
        raise ValueError(f"num_heads_q is {num_heads_q}; supported: {supported}")
    return qkv.split([num_heads_q, rest // 2, rest // 2], dim=2)
