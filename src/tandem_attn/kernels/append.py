"""Write new keys and values into a cache, and rotate them and the queries: one launch before decoding.

A program takes one token (of q, or of the new k and v) and some of its heads. Rotary embedding (RoFormer,
arXiv 2104.09864): column c and its partner turn by the angle of the token's position; computed in fp32 and
rounded once. Columns past the rotary dimension, and v, are copied bit by bit. A token that has no room in the
cache is not written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from functools import cached_property

import torch

from tandem_attn.device.gluon import gl, gluon
from tandem_attn.kernels.config import Static
from tandem_attn.kernels.launcher import KernelLauncher
from tandem_attn.spec_decode import AppendSpec, Cache, New

_SOURCE_DIGEST = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()[:16]
ELEMENTS_AT_ONCE = 2048  # of a program: 16 for each of 128 threads
SEQUENCES_AT_ONCE = 1024  # of packed ones, in the search for a token's


@dataclasses.dataclass(frozen=True)
class AppendConfig:
    """Compile-time facts of the append kernel."""

    columns: int  # of K, and of V
    columns_v: int
    width: int  # powers of two that hold them, 32 to 256
    heads_at_once: int
    rotary_dim: int
    interleaved: bool
    per_token: bool
    packed_q: bool
    packed_new: bool
    sequences_at_once: int
    has_seqlens: bool
    has_batch_idx: bool
    has_rotary_seqlens: bool
    page_size: int

    @property
    def static(self) -> Static:
        return Static(self)

    @property
    def layout(self):
        across = self.width // 8
        return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])

    @cached_property
    def cache_key(self) -> str:
        """What Triton's disk cache knows this value by: see ForwardConfig."""
        return f"{self!r} {_SOURCE_DIGEST}"


def append_config(spec: AppendSpec) -> AppendConfig:
    """The configuration for a question."""
    widest = max(spec.head_dim, spec.head_dim_v, 32)
    width = 1 << (widest - 1).bit_length()
    heads = max(spec.num_heads if spec.rotary_dim else 1, spec.num_kv_heads)
    return AppendConfig(
        columns=spec.head_dim,
        columns_v=spec.head_dim_v,
        width=width,
        heads_at_once=max(1 << 10 - width.bit_length(), min(ELEMENTS_AT_ONCE // width, 1 << (heads - 1).bit_length())),
        rotary_dim=spec.rotary_dim,
        interleaved=spec.interleaved,
        per_token=spec.per_token,
        packed_q=spec.packed_q,
        packed_new=spec.packed_new,
        sequences_at_once=min(SEQUENCES_AT_ONCE, max(32, 1 << (spec.batch - 1).bit_length())),
        has_seqlens=spec.has_seqlens,
        has_batch_idx=spec.has_batch_idx,
        has_rotary_seqlens=spec.has_rotary_seqlens,
        page_size=spec.page_size,
    )  # fmt: skip


@gluon.jit
def _sequence_of(row, starts, batch, each, packed: gl.constexpr, config: gl.constexpr):
    """(sequence, token in it, whether there is one) of a row of packed or equally long sequences."""
    if packed:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        b = row * 0
        for c in range(0, batch, config.sequences_at_once):
            i = c + gl.arange(0, config.sequences_at_once, layout)
            end = gl.load(starts + i + 1, mask=i < batch, other=2147483647)
            b += gl.sum((end <= row).to(gl.int32), 0)
        found = b < batch
        start = gl.load(starts + b, mask=found, other=0)
        return b, row - start, found & (row >= start)
    else:
        b = row // each
        return b, row - b * each, b < batch


@gluon.jit
def _turned(
    x_ptr, at, keep, column, cos_ptr, sin_ptr, position, rotary_len, rotary_stride, step, config: gl.constexpr
):
    """fp32 [heads, width]: elements `at` of x (column by column `step` apart), turned by their position."""
    half: gl.constexpr = max(1, config.rotary_dim // 2)
    if config.interleaved:
        pair = column // 2
        other = column + 1 - 2 * (column % 2)
        first = column % 2 == 0
    else:
        pair = column % half
        first = column < half
        other = gl.where(first, column + half, column - half)
    turns = column < config.rotary_dim
    x = gl.load(x_ptr + at + (column * step)[None, :], mask=keep, other=0.0).to(gl.float32)
    other = gl.where(turns, other, column)
    y = gl.load(x_ptr + at + (other * step)[None, :], mask=keep, other=0.0).to(gl.float32)
    there = turns & (position < rotary_len) & (position >= 0)
    angle = position.to(gl.int64) * rotary_stride + pair
    c = gl.load(cos_ptr + angle, mask=there, other=0.0).to(gl.float32)
    s = gl.load(sin_ptr + angle, mask=there, other=0.0).to(gl.float32)
    s = gl.where(first, -s, s)
    return gl.where(turns[None, :], x * c[None, :] + y * s[None, :], x)


@gluon.jit(do_not_specialize=["seqlen"])
def append_to_cache(
    q,
    q_out,
    k_new,
    v_new,
    k_cache,
    v_cache,
    cos,
    sin,
    pointers,
    seqlen,
    numbers,
    strides,
    config: gl.constexpr,
):
    """Grid: (tokens of q if they are rotated, then new tokens; blocks of heads)."""
    c: gl.constexpr = config.static
    seqlens, batch_idx, page_table = pointers[0], pointers[1], pointers[2]
    cu_seqlens_q, cu_seqlens_new, rotary_seqlens = pointers[3], pointers[4], pointers[5]
    rows_q, each_q, each_new, batch = numbers[0], numbers[1], numbers[2], numbers[3]
    capacity, table_stride, rotary_len, rotary_stride = numbers[4], numbers[5], numbers[6], numbers[7]
    heads, kv_heads = numbers[8], numbers[9]
    layout: gl.constexpr = c.layout
    column = gl.arange(0, c.width, gl.SliceLayout(0, layout))
    h = gl.program_id(1) * c.heads_at_once + gl.arange(0, c.heads_at_once, gl.SliceLayout(1, layout))
    row = gl.program_id(0)
    if row < rows_q:
        b, token, there = _sequence_of(row, cu_seqlens_q, batch, each_q, c.packed_q, c)
        if there:
            base = gl.to_tensor(seqlen)
            if c.has_rotary_seqlens:
                base = gl.load(rotary_seqlens + b)
            elif c.has_seqlens:
                base = gl.load(seqlens + b)
            position = base
            if c.per_token:
                position = base + token
            keep = (h < heads)[:, None] & (column < c.columns)[None, :]
            if c.packed_q:
                at = row.to(gl.int64) * strides[1]
            else:
                at = b.to(gl.int64) * strides[0] + token.to(gl.int64) * strides[1]
            at = (at + h.to(gl.int64) * strides[2])[:, None]
            x = _turned(q, at, keep, column, cos, sin, position, rotary_len, rotary_stride, strides[3], c)
            to = (row.to(gl.int64) * heads + h) * c.columns
            gl.store(q_out + to[:, None] + column[None, :], x.to(q_out.dtype.element_ty), mask=keep)
    else:
        row -= rows_q
        b, token, there = _sequence_of(row, cu_seqlens_new, batch, each_new, c.packed_new, c)
        if there:
            before = gl.to_tensor(seqlen)
            if c.has_seqlens:
                before = gl.load(seqlens + b)
            slot = before + token
            if (slot >= 0) & (slot < capacity):
                position = slot
                if c.has_rotary_seqlens:
                    position = gl.load(rotary_seqlens + b) + token
                place = b
                if c.page_size > 0:
                    page = slot // c.page_size
                    place = gl.load(page_table + b.to(gl.int64) * table_stride + page)
                    slot -= page * c.page_size
                elif c.has_batch_idx:
                    place = gl.load(batch_idx + b)
                exists = (h < kv_heads)[:, None]
                if c.packed_new:
                    k_at = row.to(gl.int64) * strides[5]
                    v_at = row.to(gl.int64) * strides[9]
                else:
                    k_at = b.to(gl.int64) * strides[4] + token.to(gl.int64) * strides[5]
                    v_at = b.to(gl.int64) * strides[8] + token.to(gl.int64) * strides[9]
                k_at = (k_at + h.to(gl.int64) * strides[6])[:, None]
                v_at = (v_at + h.to(gl.int64) * strides[10])[:, None]
                k_to = place.to(gl.int64) * strides[12] + slot.to(gl.int64) * strides[13]
                v_to = place.to(gl.int64) * strides[16] + slot.to(gl.int64) * strides[17]
                k_to = (k_to + h.to(gl.int64) * strides[14])[:, None] + (column * strides[15])[None, :]
                v_to = (v_to + h.to(gl.int64) * strides[18])[:, None] + (column * strides[19])[None, :]
                keep = exists & (column < c.columns)[None, :]
                if c.rotary_dim > 0:
                    x = _turned(
                        k_new,
                        k_at,
                        keep,
                        column,
                        cos,
                        sin,
                        position,
                        rotary_len,
                        rotary_stride,
                        strides[7],
                        c,
                    )
                    gl.store(k_cache + k_to, x.to(k_cache.dtype.element_ty), mask=keep)
                else:
                    x = gl.load(k_new + k_at + (column * strides[7])[None, :], mask=keep, other=0.0)
                    gl.store(k_cache + k_to, x, mask=keep)
                keep = exists & (column < c.columns_v)[None, :]
                x = gl.load(v_new + v_at + (column * strides[11])[None, :], mask=keep, other=0.0)
                gl.store(v_cache + v_to, x, mask=keep)


class AppendPlan:
    """Everything about a call that depends neither on addresses nor on lengths."""

    def __init__(self, spec: AppendSpec):
        self.spec = spec
        self.config = config = append_config(spec)
        self.device_index = spec.device.index or 0
        self.rows_q = spec.total_q if spec.rotary_dim else 0
        heads = max(spec.num_heads if self.rows_q else 1, spec.num_kv_heads if spec.total_new else 1)
        self.grid = (self.rows_q + spec.total_new, -(-heads // config.heads_at_once), 1)
        self.launcher: KernelLauncher | None = None
        self.nothing: torch.Tensor | None = None  # where pointers that are not given point

    def _constants(self, new: New) -> tuple[tuple, tuple]:
        """(numbers, strides) of the kernel."""
        spec = self.spec
        numbers = (
            self.rows_q, spec.seqlen_q, max(1, new.seqlen_new), spec.batch, spec.capacity, spec.table_stride,
            spec.rotary_len, spec.rotary_stride, spec.num_heads, spec.num_kv_heads,
        )  # fmt: skip
        of_q = (0, *spec.q_stride) if spec.packed_q else spec.q_stride
        added = [(0,) * 4 if not spec.has_new else (0, *s) if spec.packed_new else s
                 for s in (spec.new_k_stride, spec.new_v_stride)]  # fmt: skip
        return numbers, (*of_q, *added[0], *added[1], *spec.k_stride, *spec.v_stride)

    def __call__(self, q, k_new, v_new, cache: Cache, new: New, rotary: tuple):
        """q, rotated into new memory if asked. Enqueues one kernel on the current stream; never waits."""
        if torch._C._cuda_getDevice() != self.device_index:
            with torch.cuda.device(self.device_index):
                return self(q, k_new, v_new, cache, new, rotary)
        cos, sin, turns = rotary
        if self.nothing is None:
            self.nothing = torch.zeros(1, dtype=torch.int32, device=self.spec.device)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if self.spec.rotary_dim else q
        tensors = tuple(q if x is None else x for x in (q, out, k_new, v_new, cache.k, cache.v, cos, sin))
        given = (
            cache.seqlens,
            cache.batch_idx,
            cache.page_table,
            new.cu_seqlens_q,
            new.cu_seqlens_k_new,
            turns,
        )
        pointers = tuple(self.nothing if x is None else x for x in given)
        if self.launcher is None:
            self.constants = self._constants(new)
            arguments = (*tensors, pointers, cache.seqlen, *self.constants, self.config)
            self.launcher = KernelLauncher(append_to_cache, arguments, dict(num_warps=4))
        stream = torch._C._cuda_getCurrentRawStream(self.device_index)
        rest = (pointers, cache.seqlen, *self.constants, self.config)
        self.launcher.launch_flat(self.grid, stream, [], tensors, rest)
        return out
