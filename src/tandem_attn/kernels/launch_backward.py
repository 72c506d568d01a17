"""The backward of the gluon backend: from a question and addresses to its launches.

A `BackwardPlan` is made once per question. A call allocates the gradients and a workspace (dQ in float32 and
two numbers per row and head), and launches `prepare_rows`, the backward kernel once or twice, `finish_rows`
and, for packed sequences, `clear_padding`.
"""

from __future__ import annotations

import math

import torch

from tandem_attn.device.division import division_magic
from tandem_attn.device.sequence import PADDING
from tandem_attn.kernels.backward import attention_backward
from tandem_attn.kernels.backward_rows import clear_padding, finish_rows, prepare_rows
from tandem_attn.kernels.config_backward import KEYS, BackwardConfig, backward_configs
from tandem_attn.kernels.launch import descriptor_geometry
from tandem_attn.kernels.launcher import KernelLauncher, tensor_descriptor
from tandem_attn.kernels.question import score_scales, window_numbers
from tandem_attn.spec import AttentionSpec

MAX_CACHED_ADDRESSES = 4096
ROWS_TOGETHER = 16  # heads whose tiles of keys are taken together, the longest first
CLEARERS = 16  # programs per gap between sequences
CHUNK = 64


def backward_boxes(config: BackwardConfig) -> dict[str, tuple[list[int], object, str]]:
    """TMA box, shared-memory layout and element type of each descriptor of the backward kernel."""
    ones = [1, 1, 1] if config.Sequences.packed.value else [1, 1]

    def box(rows: int, cols: int):
        shape = [*ones, rows, cols]
        return shape, type(config.k_layout).get_default_for(shape, config.dtype), config.element

    return {
        "q_desc": box(config.tile_m, config.head_dim),
        "k_desc": box(KEYS, config.head_dim),
        "v_desc": box(KEYS, config.head_dim_v),
        "do_desc": box(config.tile_m, config.head_dim_v),
        "dk_desc": box(KEYS, config.head_dim),
        "dv_desc": box(KEYS, config.head_dim_v),
        "dq_desc": ([128, 32], config.dq_layout, "fp32"),
        "stat_desc": ([config.tile_m], config.stat_layout, "fp32"),
    }


def _padded(rows: int) -> int:
    return -(-rows // PADDING.value) * PADDING.value


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where TMA cannot read it in place: misaligned, or strides like those of an expanded
    tensor."""
    strides = [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    fits = x.stride(-1) == 1 and all(s % 8 == 0 and 0 < s < 2**38 for s in strides)
    return x if fits and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


class BackwardPlan:
    """Everything about a call that does not depend on addresses."""

    def __init__(self, spec: AttentionSpec):
        self.spec = spec
        self.configs = backward_configs(spec)
        self.device_index = spec.device.index or 0
        batch = 1 if spec.varlen else spec.batch
        if spec.varlen:
            self.padded_rows = _padded(spec.total_q) + PADDING.value * spec.batch
            self.longest = _padded(min(spec.seqlen_q, spec.total_q))
        else:
            self.padded_rows = self.longest = _padded(spec.seqlen_q)
        self.stat_rows = batch * spec.num_heads * self.padded_rows
        self.programs = self._programs()
        self.numbers = self._numbers()
        self.scales = score_scales(spec.softmax_scale, spec.softcap)
        self.launchers: dict[tuple, list[KernelLauncher]] = {}
        self.maps: dict[tuple[int, ...], list] = {}

    @property
    def workspace_bytes(self) -> int:
        """Extra memory of a call, besides the gradients."""
        chunks = self.stat_rows * self.configs[0].head_dim // CHUNK**2
        return 4 * (2 * self.stat_rows + chunks * CHUNK**2 + chunks)

    def _programs(self) -> int:
        spec, tile_n = self.spec, self.configs[0].tile_n
        if spec.varlen:
            return (spec.total_k // tile_n + min(spec.batch, spec.total_k)) * spec.num_kv_heads
        return -(-spec.seqlen_k // tile_n) * spec.batch * spec.num_kv_heads

    def _numbers(self) -> tuple:
        """The scalar arguments of the backward kernel, scales apart."""
        spec = self.spec
        rows = spec.num_kv_heads if spec.varlen else spec.batch * spec.num_kv_heads
        group = min(ROWS_TOGETHER, rows)
        n_blocks = -(-spec.seqlen_k // self.configs[0].tile_n)
        divisors = (spec.num_kv_heads, group, rows % group or group, group * n_blocks)
        return (
            spec.batch,
            spec.num_kv_heads,
            spec.group_size,
            *self._lengths(),
            *window_numbers(spec.window),
            self.padded_rows,
            self.stat_rows,
            group,
            *map(division_magic, divisors),
        )

    def _lengths(self) -> tuple[int, int]:
        spec = self.spec
        return (spec.total_q, spec.total_k) if spec.varlen else (spec.seqlen_q, spec.seqlen_k)

    def __call__(self, dout, dlse, q, k, v, out, lse, *lengths):
        """(dq, dk, dv), contiguous. Enqueues on the current stream of q's device; never waits."""
        if torch._C._cuda_getDevice() != self.device_index:
            with torch.cuda.device(self.device_index):
                return self(dout, dlse, q, k, v, out, lse, *lengths)
        pointers = (*lengths, None, None, None, None)[:4]
        dout, out, lse = _readable(dout), _readable(out), lse.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        dq, dk, dv = grads
        chunks = self.stat_rows * self.configs[0].head_dim // CHUNK**2
        accumulator = torch.empty(chunks * CHUNK**2, dtype=torch.float32, device=q.device)
        statistics = torch.empty(2 * self.stat_rows, dtype=torch.float32, device=q.device)
        counters = torch.empty(chunks, dtype=torch.int32, device=q.device)
        stream = torch._C._cuda_getCurrentRawStream(self.device_index)
        self._prepare_rows(stream, out, dout, lse, dlse, statistics, accumulator, counters, pointers)
        operands = (q, k, v, dout, dk, dv, accumulator, statistics)
        for number in range(len(self.configs)):
            self._launch(number, stream, operands, counters, pointers)
        self._finish_rows(stream, accumulator, dq, pointers)
        if self.spec.varlen:
            self._clear_padding(stream, grads, pointers)
        return grads

    def _launcher(self, key: tuple, kernel, arguments: tuple, options: dict) -> KernelLauncher:
        found = self.launchers.get(key)
        if found is None:
            found = self.launchers[key] = KernelLauncher(kernel, arguments, options)
        return found

    def _prepare_rows(
        self, stream, out, dout, lse, dlse, statistics, accumulator, counters, pointers
    ) -> None:
        spec = self.spec
        tensors = (out, dout, lse, dlse, statistics, accumulator, counters, *pointers)
        strides = [s // 8 for x in (out, dout) for s in _three_strides(x)]
        numbers = (
            spec.num_heads, *self._lengths(), self.padded_rows, self.stat_rows, *strides, spec.head_dim_v // 8
        )  # fmt: skip
        rest = (*numbers, self.configs[0])
        launcher = self._launcher(
            ("prepare", dlse is None), prepare_rows, (*tensors, *rest), dict(num_warps=4)
        )
        grid = (self.longest // CHUNK, spec.num_heads, spec.batch)
        launcher.launch_flat(grid, stream, [], tensors, rest)

    def _finish_rows(self, stream, accumulator, dq, pointers) -> None:
        spec = self.spec
        tensors = (accumulator, dq, *pointers)
        rest = (spec.num_heads, *self._lengths(), self.padded_rows, spec.head_dim // 8, spec.softmax_scale)
        rest = (*rest, self.configs[0])
        launcher = self._launcher(("finish",), finish_rows, (*tensors, *rest), dict(num_warps=4))
        grid = (self.longest // CHUNK, spec.num_heads, spec.batch)
        launcher.launch_flat(grid, stream, [], tensors, rest)

    def _clear_padding(self, stream, grads, pointers) -> None:
        spec = self.spec
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k = pointers
        for side, x in zip("qkk", grads, strict=True):
            cu_seqlens, used = (cu_seqlens_q, seqused_q) if side == "q" else (cu_seqlens_k, seqused_k)
            tensors = (x, cu_seqlens, used)
            rest = (spec.batch, x.shape[0], math.prod(x.shape[1:]))
            launcher = self._launcher(("clear", side), clear_padding, (*tensors, *rest), dict(num_warps=4))
            launcher.launch_flat((spec.batch + 1, CLEARERS, 1), stream, [], tensors, rest)

    def _launch(self, number: int, stream, operands: tuple, counters, pointers) -> None:
        config = self.configs[number]
        tensors = (operands[6], counters, *pointers)
        rest = (*self.numbers, *self.scales, config)
        key = ("main", number, operands[3].stride())
        launcher = self.launchers.get(key)
        if launcher is None:
            arguments = (*self._descriptors(config, operands), *tensors, *rest)
            options = dict(num_warps=4, maxnreg=config.maxnreg)
            launcher = self._launcher(key, attention_backward, arguments, options)
        addresses = tuple(x.data_ptr() for x in operands)
        at = (key, addresses)
        maps = self.maps.get(at)
        if maps is None:
            if len(self.maps) >= MAX_CACHED_ADDRESSES:
                self.maps.clear()
            maps = self.maps[at] = launcher.encode(addresses, operands)
        launcher.launch_flat((self.programs, 1, 1), stream, maps, tensors, rest)

    def _descriptors(self, config: BackwardConfig, operands: tuple) -> list:
        """TMA descriptors in the order of the kernel's arguments."""
        *attention, accumulator, statistics = operands
        geometry = [descriptor_geometry(tuple(x.shape), tuple(x.stride())) for x in attention]
        geometry += [([accumulator.numel() // 32, 32], [32, 1]), ([statistics.numel()], [1])]
        boxes = backward_boxes(config).values()
        return [
            tensor_descriptor(x, *size, box, layout)
            for x, size, (box, layout, _) in zip(operands, geometry, boxes, strict=True)
        ]


def _three_strides(x: torch.Tensor) -> tuple[int, ...]:
    """Of (batch, rows, heads); packed: 0 for the batch."""
    return (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]
