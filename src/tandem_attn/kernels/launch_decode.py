"""The gluon backend over a KV cache: from a question and addresses to launches, in little host time.

A `DecodePlan` is made once per question and holds what does not depend on addresses or lengths. A call looks
its two descriptors up by address and makes one or two C calls.
"""

from __future__ import annotations

import math

import torch

from tandem_attn import arch
from tandem_attn.device.decode_groups import GroupRows
from tandem_attn.device.division import division_magic
from tandem_attn.device.gluon import gl
from tandem_attn.kernels.append import AppendPlan
from tandem_attn.kernels.append_blocks import BlocksPlan
from tandem_attn.kernels.combine import combine_partials
from tandem_attn.kernels.config_decode import DecodeConfig, decode_config
from tandem_attn.kernels.decode import decode_attention
from tandem_attn.kernels.decode_groups import decode_groups
from tandem_attn.kernels.decode_tiles import blocks_of_rows
from tandem_attn.kernels.launcher import KernelLauncher, encoded, misaligned, tensor_descriptor
from tandem_attn.kernels.question import (
    UNBOUNDED,
    device_reasons,
    element_reasons,
    head_dim_reasons,
    scale_reasons,
    score_scales,
    window_numbers,
)
from tandem_attn.spec import E4M3
from tandem_attn.spec_decode import ALIGNMENT, AppendSpec, Cache, DecodeSpec, New

NAME = "gluon"


def decode_reasons(spec: DecodeSpec) -> list[str]:
    """Why this backend cannot answer; empty if it can."""
    said = device_reasons(spec.device)
    if spec.device.type != "cuda":
        return said
    said += element_reasons(spec.dtype)
    said += head_dim_reasons(spec.head_dim, spec.head_dim_v, *((16, " of e4m3 caches") if spec.fp8 else ()))
    said += scale_reasons(spec.softmax_scale)
    of_cache = 16 if spec.fp8 else 8
    for name, stride, unit in (
        ("q", spec.q_stride, 8), ("k_cache", spec.k_stride, of_cache), ("v_cache", spec.v_stride, of_cache),
    ):  # fmt: skip
        if stride[-1] != 1 or any(step % unit or not 0 <= step < 2**38 for step in stride[:-1]):
            said.append(
                f"{name} has strides {stride}; supported: 1 at the end, else multiples of {unit} elements"
            )
    if not spec.aligned:
        said.append("q, k_cache or v_cache does not start at a multiple of 16 bytes")
    if max(spec.capacity, spec.total_q, spec.cache_rows) >= UNBOUNDED:
        said.append(f"{spec.capacity} keys, {spec.total_q} queries: more than 30 bits count")
    return said


def decode_describe(spec: DecodeSpec) -> str:
    """One line for explain(): the configuration chosen."""
    plan = DecodePlan(spec)
    merge = "the last of them merges" if plan.config.merges else "a second kernel merges"
    return f"{plan.config}, {plan.programs} programs, {merge}"


def append_reasons(spec: AppendSpec) -> list[str]:
    """Why this backend cannot write the cache; empty if it can."""
    said = device_reasons(spec.device)
    if spec.device.type != "cuda":
        return said
    said += element_reasons(spec.dtype)
    for name, dim in (("head_dim", spec.head_dim), ("head_dim_v", spec.head_dim_v)):
        if not 0 < dim <= 256:
            said.append(f"{name} is {dim}; supported: up to 256")
    if max(spec.capacity, spec.total_q + spec.total_new, spec.cache_rows) >= UNBOUNDED:
        said.append(f"{spec.capacity} keys, {spec.total_new} new tokens: more than 30 bits count")
    elif _by_block(spec) and (programs := BlocksPlan(spec).grid[0]) >= 2 * UNBOUNDED:
        said.append(f"{programs} programs: more than a grid takes")
    return said


def append_describe(spec: AppendSpec) -> str:
    """One line for explain(): what one launch does."""
    plan = append(spec)
    count = plan.config.heads_at_once
    if getattr(plan.config, "by_token", False):
        return f"one kernel, {count} tokens of a head and a block at a time"
    return f"one kernel, {count} heads of a token at a time"


def append(spec: AppendSpec) -> AppendPlan:
    """The plan for a question: see `AppendPlan.__call__`."""
    return (BlocksPlan if _by_block(spec) else AppendPlan)(spec)


def _by_block(spec: AppendSpec) -> bool:
    """Whether blocks of the cache get factors, each from a program of its own."""
    return spec.quantizes and spec.descale_block > 0 and spec.total_new > 0


def decode(spec: DecodeSpec) -> DecodePlan:
    """The plan for a question: see `DecodePlan.__call__`."""
    return DecodePlan(spec)


def box_of(config: DecodeConfig, width: int) -> tuple[list[int], object]:
    """TMA box of a piece of a tile, and its layout in shared memory."""
    shape = [1, config.piece_rows, 1, width]
    return shape, gl.NVMMASharedLayout.get_default_for(shape, config.cache_dtype)


def kernel_of(config: DecodeConfig):
    """The decode kernel for this kind of rows."""
    return decode_groups if config.RowKind is GroupRows else decode_attention


def options_of(config: DecodeConfig) -> dict:
    """How it is compiled and launched."""
    options = dict(num_warps=config.num_warps, launch_pdl=True)
    if config.num_groups == 2:
        return options | {"maxnreg": 168}
    # else the assembler would spill for more programs than shared memory has room for
    return options | ({"maxnreg": 255} if config.residents > 2 else {})


_counters: dict[tuple[int, int], torch.Tensor] = {}  # by device index and stream


class DecodePlan:
    """Everything about a call that depends neither on addresses nor on lengths."""

    def __init__(self, spec: DecodeSpec):
        self.spec = spec
        multiprocessors = max(1, arch.num_multiprocessors(spec.device) - spec.sm_margin)
        self.config = config = decode_config(spec, multiprocessors)
        self.programs = config.per_head * spec.num_kv_heads
        self.items = spec.batch * blocks_of_rows(spec)
        self.rows = config.rows
        self.device_index = spec.device.index or 0
        slots = self._slots()
        self.o_bytes = 4 * slots * self.rows * config.head_dim_v
        self.l_bytes = _rounded(4 * slots * self.rows)
        self.lse_bytes = _rounded(4 * spec.total_q * spec.num_heads)
        self.num_counters = self.items * spec.num_kv_heads * config.num_groups if config.merges else 1
        self.counter_bytes = _rounded(4 * self.num_counters)
        self.workspace_bytes = self.counter_bytes + self.lse_bytes + self.l_bytes + self.o_bytes
        self.constants: tuple | None = None
        # (decode, combine or None), by the alignment of the tensors of numbers
        self.launchers: dict[int, tuple[KernelLauncher, KernelLauncher | None]] = {}
        self.maps: dict[tuple[int, int], list] = {}

    def _slots(self) -> int:
        """Partial results that a call may leave."""
        spec, config = self.spec, self.config
        if config.Splits.shared.value:
            return 2 * self.programs
        if spec.split_size is None:
            each = min(spec.num_splits, -(-spec.capacity // config.tile_n) or 1)
        else:
            each = max(1, -(-spec.capacity // spec.split_size))
        return self.items * spec.num_kv_heads * each

    def _numbers(self, new: New) -> tuple:
        """(numbers, magic of m_blocks, table stride, strides, scales) of the kernels; see `make_work`."""
        spec = self.spec
        left, right = window_numbers(spec.window)
        m_blocks = blocks_of_rows(spec)
        numbers = (
            new.seqlen_new, spec.seqlen_q, spec.total_q, spec.capacity, left, right, self.items, m_blocks
        )  # fmt: skip
        q_stride = (0, *spec.q_stride) if spec.packed_q else spec.q_stride
        of_cache = 16 if spec.fp8 else 8
        strides = tuple(s // 8 for s in q_stride[:3])
        strides += tuple(s // of_cache for s in (*spec.k_stride[:3], *spec.v_stride[:3]))
        if spec.fp8:
            strides += (*(spec.q_descale_stride or (0, 0)), *spec.k_descale_stride, *spec.v_descale_stride)
        scales = score_scales(spec.softmax_scale, spec.softcap)
        return numbers, division_magic(m_blocks), spec.table_stride, strides, scales

    def _memory(self, workspace) -> tuple[torch.Tensor, ...]:
        """(counters int32, lse, l_part, o_part float32) for a call."""
        if workspace is None:
            stream = torch._C._cuda_getCurrentRawStream(self.device_index)
            counters = self._own_counters(stream)
            floats = (self.workspace_bytes - self.counter_bytes) // 4
            rest = torch.empty(floats, dtype=torch.float32, device=self.spec.device)
        else:
            counters = workspace[: self.counter_bytes].view(torch.int32)
            rest = workspace[self.counter_bytes : self.workspace_bytes].view(torch.float32)
        lse, l_part, o_part = rest.split((self.lse_bytes // 4, self.l_bytes // 4, self.o_bytes // 4))
        return counters, lse, l_part, o_part

    def _own_counters(self, stream: int) -> torch.Tensor:
        """As the tile counters of the forward: launches on a stream share them, a captured graph has its
        own."""
        if torch._C._cuda_isCurrentStreamCapturing():
            return torch.zeros(self.num_counters, dtype=torch.int32, device=self.spec.device)
        found = _counters.get((self.device_index, stream))
        if found is None or found.numel() < self.num_counters:
            found = torch.zeros(max(1024, self.num_counters), dtype=torch.int32, device=self.spec.device)
            _counters[self.device_index, stream] = found
        return found

    def __call__(self, q, cache: Cache, new: New, out, workspace, want_lse: bool):
        """(out, lse or None). Enqueues one or two kernels on the current stream; never waits."""
        if torch._C._cuda_getDevice() != self.device_index:
            with torch.cuda.device(self.device_index):
                return self(q, cache, new, out, workspace, want_lse)
        spec = self.spec
        result = out
        if out is None or out.data_ptr() % ALIGNMENT:
            result = torch.empty(spec.out_shape, dtype=spec.dtype, device=spec.device)
        counters, scratch, l_part, o_part = self._memory(workspace)
        lse = torch.empty(spec.lse_shape, dtype=torch.float32, device=spec.device) if want_lse else scratch
        if 0 in cache.k.shape[:2] or spec.capacity == 0:
            result.zero_()
            lse.fill_(-math.inf)
        else:
            self._launch(q, cache, new, result, lse, counters, l_part, o_part)
        if out is not None and result is not out:
            out.copy_(result)
            result = out
        return result, lse if want_lse else None

    def _launch(self, q, cache: Cache, new: New, out, lse, counters, l_part, o_part) -> None:
        spec, config = self.spec, self.config
        stream = torch._C._cuda_getCurrentRawStream(self.device_index)
        pointers = (
            cache.seqlens, new.cu_seqlens_k_new, cache.leftpad, new.cu_seqlens_q, cache.batch_idx,
            cache.page_table,
        )  # fmt: skip
        if spec.fp8:
            pointers += (new.q_descale, cache.k_descale, cache.v_descale)
        if self.constants is None:
            self.constants = self._numbers(new)
        tensors, lengths = (q, out, lse, o_part, l_part, counters), (pointers, cache.seqlen)
        pattern = misaligned(pointers)
        found = self.launchers.get(pattern)
        if found is None:
            found = self.launchers[pattern] = self._prepare(cache, tensors, lengths)
        decoder, combiner = found
        kv = self._kv(cache, decoder)
        decoder.launch_flat((self.programs, 1, 1), stream, kv, tensors, (*lengths, *self.constants, config))
        if combiner is not None:
            programs = self.items * config.row_blocks * spec.num_kv_heads
            grid = (programs, config.head_dim_v // config.combine_width, 1)
            tensors = (out, lse, o_part, l_part)
            combiner.launch_flat(grid, stream, [], tensors, (*lengths, *self.constants[:2], config))

    def _kv(self, cache: Cache, decoder: KernelLauncher) -> list:
        """The cache as the decode kernel takes it: tensors, or tensor maps, kept by address."""
        if self.config.Tiles.clears.value:
            return [cache.k, cache.v]
        addresses = (cache.k.data_ptr(), cache.v.data_ptr())
        found = self.maps.get(addresses)
        if found is None:
            found = encoded(decoder, self.maps, addresses, (_words(cache.k), _words(cache.v)))
        return found

    def _prepare(self, cache: Cache, tensors: tuple, lengths: tuple):
        """Compile (or find) the kernels for tensors aligned as these."""
        config = self.config
        kv = [cache.k, cache.v]
        if not config.Tiles.clears.value:
            kv = [
                tensor_descriptor(x, list(x.shape), _steps(x), *box_of(config, width))
                for x, width in ((_words(cache.k), config.k_width), (_words(cache.v), config.v_width))
            ]
        arguments = (*kv, *tensors, *lengths, *self.constants, config)
        decoder = KernelLauncher(kernel_of(config), arguments, options_of(config))
        if config.merges:
            return decoder, None
        arguments = (*tensors[1:5], *lengths, *self.constants[:2], config)
        return decoder, KernelLauncher(combine_partials, arguments, dict(num_warps=4, launch_pdl=True))


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _words(x: torch.Tensor) -> torch.Tensor:
    """A cache as tiles see it: e4m3 numbers by twos."""
    return x.view(torch.int16) if x.dtype == E4M3 else x


def _steps(x: torch.Tensor) -> list[int]:
    """Strides of a cache for TMA: a dimension of size 1 is never stepped over, so its stride may be any."""
    return [s if n > 1 else 8 for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)] + [1]
