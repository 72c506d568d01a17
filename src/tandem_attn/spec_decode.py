"""The question over a KV cache: `DecodeSpec` to attend to it, `AppendSpec` to write into it first.

`check_decode.py` raises where arguments make no question; the functions here take what passed it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from tandem_attn.quant import BLOCK_K
from tandem_attn.spec import E4M3, NO_WINDOW, Window, dtype_name, lse_dtype

MAX_SPLITS = 256  # of the keys of one call, as in FlashAttention-3
SPLIT_STEP = 128  # split_size is a multiple of this many keys
METADATA_SIZE = 4  # numbers in what get_scheduler_metadata returns
ALIGNMENT = 16  # bytes
SCALE_BLOCK = BLOCK_K  # slots of a row or page of an FP8 cache that share a factor, as quantize_qkv's keys do


class Cache(NamedTuple):
    """Where keys and values lie, and how many of them there are before this call.

    Of e4m3 the numbers are k * k_descale and v * v_descale. Factors, float32, are (batch, kv_heads), for each
    sequence of the call; or (rows, blocks, kv_heads) beside the cache, for each SCALE_BLOCK slots of a row,
    or page, and then written when keys are appended.
    """

    k: torch.Tensor  # (rows, capacity, kv_heads, head_dim); with page_table (pages, page_size, ...)
    v: torch.Tensor
    seqlens: torch.Tensor | None  # (batch,) int32
    seqlen: int  # of every sequence, where seqlens is None
    batch_idx: torch.Tensor | None
    leftpad: torch.Tensor | None
    page_table: torch.Tensor | None  # (batch, max_pages) int32
    k_descale: torch.Tensor | None = None  # None: 16 bits and more
    v_descale: torch.Tensor | None = None


class New(NamedTuple):
    """How tokens of this call are packed, and how many are appended to each sequence."""

    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k_new: torch.Tensor | None
    seqlen_new: int  # where cu_seqlens_k_new is None; 0: none
    q_descale: torch.Tensor | None = None  # (batch, kv_heads) float32, of e4m3 queries; None: 1


class Rotary(NamedTuple):
    """Tables (rotary_len, rotary_dim / 2), and the position of each sequence's first new token, if given."""

    cos: torch.Tensor | None
    sin: torch.Tensor | None
    seqlens: torch.Tensor | None


class Given(NamedTuple):
    """The tensors and lengths of a call, in FlashAttention-3's order up to rotary_seqlens."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    rotary_cos: torch.Tensor | None = None
    rotary_sin: torch.Tensor | None = None
    cache_seqlens: torch.Tensor | int | None = None
    cache_batch_idx: torch.Tensor | None = None
    cache_leftpad: torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k_new: torch.Tensor | None = None
    max_seqlen_q: int | None = None
    rotary_seqlens: torch.Tensor | None = None
    q_descale: torch.Tensor | None = None
    k_descale: torch.Tensor | None = None
    v_descale: torch.Tensor | None = None

    def parts(self) -> tuple[Cache, New, Rotary]:
        """The same, as plans take it. Without cache_seqlens every sequence is as long as there is room."""
        seqlens, length = self.cache_seqlens, 0
        if not isinstance(seqlens, torch.Tensor):
            length = capacity_of(self.k_cache, self.page_table) if seqlens is None else seqlens
            seqlens = None
        places = (self.cache_batch_idx, self.cache_leftpad, self.page_table, self.k_descale, self.v_descale)
        added = 0 if self.k is None or self.cu_seqlens_k_new is not None else _columns(self.k)
        return (
            Cache(self.k_cache, self.v_cache, seqlens, length, *places),
            New(self.cu_seqlens_q, self.cu_seqlens_k_new, added, self.q_descale),
            Rotary(self.rotary_cos, self.rotary_sin, self.rotary_seqlens),
        )


class DecodeOptions(NamedTuple):
    """The numbers of a call: those of `Options`, and how the work is cut. They change rounding only."""

    softmax_scale: float | None
    window_left: int
    window_right: int
    softcap: float
    sm_margin: int
    num_splits: int
    split_size: int | None
    rotary_interleaved: bool

    @property
    def per_token(self) -> bool:
        """Whether the rotary position advances from query to query: FlashAttention-3's rule."""
        return (self.window_left, self.window_right) != NO_WINDOW


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """Attention over a cache, without addresses and without lengths that change from call to call."""

    device: torch.device
    dtype: torch.dtype  # of out
    q_dtype: torch.dtype
    cache_dtype: torch.dtype
    batch: int
    seqlen_q: int  # of each sequence; packed_q: max_seqlen_q
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    softmax_scale: float
    window: Window  # reduced for seqlen_q queries and capacity keys
    softcap: float  # 0: none
    packed_q: bool
    total_q: int  # rows of q in memory
    cache_rows: int  # first dimension of k_cache: sequences, or pages
    page_size: int  # 0: each sequence is contiguous
    capacity: int  # keys that a sequence may have
    table_width: int  # pages of a sequence
    has_seqlens: bool
    has_batch_idx: bool
    has_leftpad: bool
    packed_new: bool
    num_splits: int  # 0: what the backend finds best
    split_size: int | None
    sm_margin: int
    q_stride: tuple[int, ...]  # elements; of the rotated copy, if q is rotated
    k_stride: tuple[int, ...]
    v_stride: tuple[int, ...]
    table_stride: int
    descale_block: int  # slots that share a factor; 0: all of a sequence, or there are no factors
    q_descale_stride: tuple[int, ...]  # (sequence, head); () without
    k_descale_stride: tuple[int, ...]  # (row, block, head), or (sequence, 0, head); () without
    v_descale_stride: tuple[int, ...]
    aligned: bool  # q, k_cache and v_cache start at multiples of 16 bytes

    @property
    def fp8(self) -> bool:
        """Whether the cache is e4m3."""
        return self.cache_dtype == E4M3

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def is_empty(self) -> bool:
        """No query. (Queries without keys are answered as all others: 0 and -inf.)"""
        return 0 in (self.batch, self.seqlen_q, self.total_q)

    @property
    def out_shape(self) -> tuple[int, ...]:
        rows = (self.total_q,) if self.packed_q else (self.batch, self.seqlen_q)
        return (*rows, self.num_heads, self.head_dim_v)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        if self.packed_q:
            return (self.num_heads, self.total_q)
        return (self.batch, self.num_heads, self.seqlen_q)

    @property
    def lse_dtype(self) -> torch.dtype:
        return lse_dtype(self.dtype)

    @property
    def question(self) -> str:
        """One line for explain()."""
        place = f"in pages of {self.page_size}" if self.page_size else "each"
        packed = "packed " if self.packed_q else ""
        kind = dtype_name(self.q_dtype) + (f" over {_factors(self)}" if self.fp8 else "")
        return (
            f"attention over a cache, {kind} on {self.device}: batch {self.batch}, "
            f"{self.seqlen_q} {packed}queries x up to {self.capacity} keys {place}, {self.num_heads} heads "
            f"over {self.num_kv_heads}, head_dim {self.head_dim}/{self.head_dim_v}, {self.window}, "
            f"softcap {self.softcap:g}, splits {self.num_splits or 'auto'}"
            + (f" of {self.split_size} keys" if self.split_size else "")
        )


@dataclasses.dataclass(frozen=True)
class AppendSpec:
    """What happens before attention: new keys and values go into the cache, rotated if asked, as is q."""

    device: torch.device
    dtype: torch.dtype  # of out
    q_dtype: torch.dtype
    cache_dtype: torch.dtype
    new_dtype: torch.dtype | None  # of new keys and values
    batch: int
    seqlen_q: int
    packed_q: bool
    total_q: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    max_new: int  # tokens that one sequence may get: seqlen_new; packed_new: total_new
    packed_new: bool
    total_new: int  # rows of k in memory
    has_new: bool
    rotary_dim: int  # 0: nothing is rotated
    rotary_len: int  # positions in the tables
    rotary_dtype: torch.dtype | None
    interleaved: bool  # pairs (2i, 2i + 1); else (i, i + rotary_dim / 2)
    per_token: bool  # the position advances from query to query; else all have that of the first
    cache_rows: int
    page_size: int
    capacity: int
    table_width: int
    has_seqlens: bool
    has_batch_idx: bool
    has_leftpad: bool
    has_rotary_seqlens: bool
    q_stride: tuple[int, ...]
    new_k_stride: tuple[int, ...]  # () without new keys
    new_v_stride: tuple[int, ...]
    k_stride: tuple[int, ...]
    v_stride: tuple[int, ...]
    table_stride: int
    descale_block: int  # as in DecodeSpec
    k_descale_stride: tuple[int, ...]
    v_descale_stride: tuple[int, ...]
    rotary_stride: int  # elements from one position to the next, in both tables

    @property
    def fp8(self) -> bool:
        """Whether the cache is e4m3."""
        return self.cache_dtype == E4M3

    @property
    def quantizes(self) -> bool:
        """Whether new numbers become e4m3; those that are go in bit by bit."""
        return self.fp8 and self.has_new and self.new_dtype != E4M3

    @property
    def is_empty(self) -> bool:
        """Nothing to write and nothing to rotate."""
        writes = self.has_new and 0 not in (self.batch, self.total_new)
        rotates = self.rotary_dim > 0 and 0 not in (self.batch, self.seqlen_q, self.total_q)
        return not writes and not rotates

    @property
    def question(self) -> str:
        """One line for explain()."""
        new = f"{self.total_new} new tokens" if self.has_new else "no new tokens"
        rotary = f"rotary over {self.rotary_dim} columns" if self.rotary_dim else "no rotary"
        kind = _factors(self) if self.fp8 else dtype_name(self.dtype)
        return f"append to a cache, {kind} on {self.device}: {new}, {rotary}"


def _factors(spec: DecodeSpec | AppendSpec) -> str:
    """What an FP8 cache is, for explain()."""
    each = f"block of {spec.descale_block} slots" if spec.descale_block else "sequence"
    return f"e4m3 with a factor for each {each} and KV head"


def out_dtype(q_dtype: torch.dtype) -> torch.dtype:
    """Of the output for queries of this type: bfloat16 for e4m3, as in FlashAttention-3."""
    return torch.bfloat16 if q_dtype == E4M3 else q_dtype


def per_block(descale: torch.Tensor | None) -> bool:
    """Whether these are factors beside the cache, which appending writes; else those of sequences."""
    return descale is not None and descale.dim() == 3


def capacity_of(k_cache: torch.Tensor, page_table: torch.Tensor | None) -> int:
    """Keys that a sequence may have."""
    return _columns(k_cache) * (1 if page_table is None else _columns(page_table))


def _columns(x: torch.Tensor) -> int:
    """The second dimension, also of tensors that nobody has checked yet."""
    return x.shape[1] if x.dim() > 1 else 0


def decode_spec(q, cache: Cache, new: New, max_seqlen_q, options: DecodeOptions, rotated: bool = False):
    """The DecodeSpec of checked arguments. `rotated`: q will be a contiguous copy of the q given."""
    shared = _shared_facts(q, cache, new, max_seqlen_q)
    scale = options.softmax_scale
    if rotated:
        shared["q_stride"] = torch.empty(q.shape, device="meta").stride()
    addresses = cache.k.data_ptr() | cache.v.data_ptr() | (0 if rotated else q.data_ptr())
    window = Window(options.window_left, options.window_right)
    return DecodeSpec(
        **shared,
        softmax_scale=q.shape[-1] ** -0.5 if scale is None else scale,
        window=window.reduced(shared["seqlen_q"], shared["capacity"]),
        softcap=options.softcap,
        num_splits=options.num_splits,
        split_size=options.split_size,
        sm_margin=options.sm_margin,
        q_descale_stride=() if new.q_descale is None else new.q_descale.stride(),
        aligned=addresses % ALIGNMENT == 0,
    )


def append_spec(given: Given, options: DecodeOptions) -> AppendSpec:
    """The AppendSpec of checked arguments."""
    cache, new, rotary = given.parts()
    shared = _shared_facts(given.q, cache, new, given.max_seqlen_q)
    k, v, rotates = given.k, given.v, rotary.cos is not None
    total_new = 0 if k is None else k.shape[0] if shared["packed_new"] else k.shape[0] * k.shape[1]
    return AppendSpec(
        **shared,
        new_dtype=None if k is None else k.dtype,
        max_new=total_new if shared["packed_new"] else new.seqlen_new,
        total_new=total_new,
        has_new=k is not None,
        rotary_dim=2 * rotary.cos.shape[1] if rotates else 0,
        rotary_len=rotary.cos.shape[0] if rotates else 0,
        rotary_dtype=rotary.cos.dtype if rotates else None,
        interleaved=options.rotary_interleaved,
        per_token=options.per_token,
        has_rotary_seqlens=rotary.seqlens is not None,
        new_k_stride=() if k is None else k.stride(),
        new_v_stride=() if v is None else v.stride(),
        rotary_stride=rotary.cos.stride(0) if rotates else 0,
    )


def _shared_facts(q, cache: Cache, new: New, max_seqlen_q) -> dict:
    """The fields that both specs have."""
    packed, table = new.cu_seqlens_q is not None, cache.page_table
    return dict(
        device=q.device,
        dtype=out_dtype(q.dtype),
        q_dtype=q.dtype,
        cache_dtype=cache.k.dtype,
        batch=new.cu_seqlens_q.shape[0] - 1 if packed else q.shape[0],
        seqlen_q=int(max_seqlen_q) if packed else q.shape[1],
        num_heads=q.shape[-2],
        num_kv_heads=cache.k.shape[2],
        head_dim=q.shape[-1],
        head_dim_v=cache.v.shape[3],
        packed_q=packed,
        total_q=q.shape[0] if packed else q.shape[0] * q.shape[1],
        cache_rows=cache.k.shape[0],
        page_size=0 if table is None else cache.k.shape[1],
        capacity=capacity_of(cache.k, table),
        table_width=0 if table is None else table.shape[1],
        has_seqlens=cache.seqlens is not None,
        has_batch_idx=cache.batch_idx is not None,
        has_leftpad=cache.leftpad is not None,
        packed_new=new.cu_seqlens_k_new is not None,
        q_stride=q.stride(),
        k_stride=cache.k.stride(),
        v_stride=cache.v.stride(),
        table_stride=0 if table is None else table.stride(0),
        descale_block=SCALE_BLOCK if per_block(cache.k_descale) else 0,
        k_descale_stride=_descale_stride(cache.k_descale),
        v_descale_stride=_descale_stride(cache.v_descale),
    )


def _descale_stride(x: torch.Tensor | None) -> tuple[int, ...]:
    """(row, block, head), or (sequence, 0, head)."""
    if x is None:
        return ()
    return x.stride() if per_block(x) else (x.stride(0), 0, x.stride(1))
