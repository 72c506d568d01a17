"""The gluon backend: from a question and addresses to a launch, in as little host time as possible.

A `ForwardPlan` is made once per question. A call then allocates the results, looks its four TMA descriptors
up by address, and makes one C call: 15 us in all, of which 7 are that call and 6 the allocations; Triton's
own path took 69 on a faster host (H200 machines, November 2026).
"""

from __future__ import annotations

import math

import torch

from tandem_attn import arch
from tandem_attn.device.division import division_magic
from tandem_attn.device.gluon import gl
from tandem_attn.device.sequence import RAGGED_END
from tandem_attn.kernels.balance import rounds_in_step, tile_costs
from tandem_attn.kernels.config import L2_FOR_KEYS, ForwardConfig, KernelConfig, forward_config
from tandem_attn.kernels.forward import attention_forward
from tandem_attn.kernels.launcher import KernelLauncher, encoded, tensor_descriptor
from tandem_attn.kernels.question import (
    UNBOUNDED,
    device_reasons,
    element_reasons,
    head_dim_reasons,
    scale_reasons,
    score_scales,
    stride_reasons,
    window_numbers,
)
from tandem_attn.spec import AttentionSpec

NAME = "gluon"
MAX_DESCRIPTOR_DIM = 0x7FFF0000
MAX_TILES = 2**31 - 2**16  # programs look at numbers past the last tile


def reasons(spec: AttentionSpec) -> list[str]:
    """Why this backend cannot answer; empty if it can."""
    said = device_reasons(spec.device)
    if spec.device.type != "cuda":
        return said
    said += element_reasons(spec.dtype)
    said += head_dim_reasons(spec.head_dim, spec.head_dim_v)
    said += scale_reasons(spec.softmax_scale)
    said += _layout_reasons(spec)
    if num_tiles_bound(spec, 128) >= MAX_TILES or max(spec.total_q, spec.total_k) >= UNBOUNDED:
        said.append(
            f"{spec.total_q} query rows and {spec.total_k} keys: more tiles or rows than 32 bits count"
        )
    return said


def _layout_reasons(spec: AttentionSpec) -> list[str]:
    """What TMA asks of addresses: 16-byte alignment of bases and strides, neighbours along the last
    dimension."""
    said = []
    if not spec.aligned:
        said.append("q, k or v does not start at a multiple of 16 bytes, which TMA needs")
    for name, shape, stride in operands(spec):
        said += stride_reasons(name, shape, stride)
    return said


def operands(spec: AttentionSpec):
    """(name, shape, strides) of q, k and v, ending in (..., rows, heads, head_dim)."""
    rows_q = (spec.total_q,) if spec.varlen else (spec.batch, spec.seqlen_q)
    rows_k = (spec.total_k,) if spec.varlen else (spec.batch, spec.seqlen_k)
    return (
        ("q", (*rows_q, spec.num_heads, spec.head_dim), spec.q_stride),
        ("k", (*rows_k, spec.num_kv_heads, spec.head_dim), spec.k_stride),
        ("v", (*rows_k, spec.num_kv_heads, spec.head_dim_v), spec.v_stride),
    )


def tiles_bound(spec: AttentionSpec, heads: int, seqlen: int, total: int, size: int) -> int:
    """At least the number of tiles of `size` rows of q or k: exact for dense, for packed sequences each may
    end in one partial tile."""
    blocks = total // size + min(spec.batch, total) if spec.varlen else -(-seqlen // size) * spec.batch
    return blocks * heads


def num_tiles_bound(spec: AttentionSpec, tile_rows: int) -> int:
    """At least the number of tiles of the forward."""
    return tiles_bound(spec, spec.num_heads, spec.seqlen_q, spec.total_q, tile_rows)


def describe(spec: AttentionSpec) -> str:
    """One line for explain(): the configurations chosen."""
    from tandem_attn.kernels.config_backward import backward_configs

    by_keys, by_queries = backward_configs(spec)
    gradients = [str(config) for config in (by_keys, by_queries) if config is not None]
    return "; ".join([str(forward_config(spec)), *gradients])


def forward(spec: AttentionSpec) -> ForwardPlan:
    """The plan for a question: call it with (q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)."""
    return ForwardPlan(spec, forward_config(spec))


def backward(spec: AttentionSpec):
    """The plan for gradients: (dout, dlse or None, q, k, v, out, lse, cu_seqlens_q, ...) -> (dq, dk, dv)."""
    from tandem_attn.kernels.launch_backward import BackwardPlan  # most programs never need it

    return BackwardPlan(spec)


def forward_boxes(config: ForwardConfig) -> dict[str, tuple[list[int], object]]:
    """TMA box and shared-memory layout of each descriptor of the forward kernel."""
    return {
        "q_desc": tile_box(config, config.tile_m, config.qk_width),
        "k_desc": tile_box(config, config.tile_n, config.qk_width),
        "v_desc": _v_box(config),
        "o_desc": tile_box(config, config.tile_m, config.o_width, config.out_dtype),
    }


def _v_box(config: ForwardConfig) -> tuple[list[int], object]:
    if not config.v_transposed:
        return tile_box(config, config.tile_n, config.v_width)
    shape = [1, 1, config.v_width, config.tile_n]
    return shape, gl.NVMMASharedLayout.get_default_for(shape, config.dtype)


def tile_box(config: KernelConfig, rows: int, cols: int, dtype=None) -> tuple[list[int], object]:
    """TMA box and shared-memory layout of a tile of a head of one of config.Sequences."""
    shape = [*([1, 1, 1] if config.Sequences.packed.value else [1, 1]), rows, cols]
    return shape, gl.NVMMASharedLayout.get_default_for(shape, dtype or config.dtype)


def descriptor_geometry(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Dimensions and strides (elements) of a TMA descriptor; see device/sequence.py for both kinds.

    (batch, rows, heads, dim) gives (batch, heads, rows, dim); packed (rows, heads, dim) gives five
    dimensions, two of which shift the end of the rows. A dimension of size 1 is never stepped over, so its
    stride may become any.
    """
    stride = tuple(s if n > 1 else 16 for n, s in zip(shape[:-1], stride[:-1], strict=True)) + (1,)
    if len(shape) == 4:
        batch, rows, heads, dim = shape
        return [batch, heads, rows, dim], [stride[0], stride[2], stride[1], 1]
    _, heads, dim = shape
    row = stride[0]
    return (
        [MAX_DESCRIPTOR_DIM, MAX_DESCRIPTOR_DIM, heads, RAGGED_END.value, dim],
        [2**34 - row, row, stride[1], row, 1],
    )


_tile_counters: dict[int, dict[int, torch.Tensor]] = {}  # by device index and stream


class ForwardPlan:
    """Everything about a call that does not depend on addresses.

    For e4m3 operands: `v_geometry`, dimensions and strides of V transposed; `factors`, how many descales a
    head of q and of k has and whether there is one per block; spec.dtype is that of the output.
    """

    def __init__(self, spec: AttentionSpec, config: ForwardConfig, v_geometry=None, factors=(0, 0, 0)):
        self.spec, self.config, self.factors = spec, config, factors
        out_stride = tuple(math.prod(spec.out_shape[i + 1 :]) for i in range(len(spec.out_shape)))
        shapes = [(shape, stride) for _, shape, stride in operands(spec)] + [(spec.out_shape, out_stride)]
        self.geometry = [descriptor_geometry(*s) for s in shapes]
        if v_geometry is not None:
            self.geometry[2] = v_geometry
        self.device_index = spec.device.index or 0
        programs = arch.num_multiprocessors(spec.device) - spec.sm_margin
        self.programs = max(1, min(programs, num_tiles_bound(spec, config.tile_rows)))
        self.aside_elements = self.programs * config.tile_rows * config.head_dim_v
        self.numbers = self._numbers()
        self.dynamic = config.Schedule.dynamic.value
        self.counters = _tile_counters.setdefault(self.device_index, {})
        self.out_like: torch.Tensor | None = None
        self.lse_like: torch.Tensor | None = None
        self.launcher: KernelLauncher | None = None
        self.maps: dict[tuple[int, ...], list] = {}

    def _numbers(self) -> tuple:
        """The scalar arguments of the kernel."""
        spec = self.spec
        left, right = window_numbers(spec.window)
        rows = spec.num_heads if spec.varlen else spec.batch * spec.num_heads
        group = 1
        if self.config.Schedule.grouped.value:
            bytes_per_head = max(spec.seqlen_k, 1) * (spec.head_dim + spec.head_dim_v)
            bytes_per_head *= self.config.element_bytes
            group = min(spec.group_size * max(1, L2_FOR_KEYS // bytes_per_head), rows)
        m_blocks = -(-spec.seqlen_q // self.config.tile_rows)
        divisors = (spec.num_heads, spec.group_size, group, rows % group or group, group * m_blocks)
        seqlens = (spec.total_q, spec.total_k) if spec.varlen else (spec.seqlen_q, spec.seqlen_k)
        return (
            spec.batch,
            spec.num_heads,
            *seqlens,
            left,
            right,
            group,
            self._static_rounds(rows, group, (left, right)),
            *map(division_magic, divisors),
            *score_scales(spec.softmax_scale, spec.softcap),
            *self.factors,
        )

    def _static_rounds(self, rows: int, group: int, window: tuple[int, int]) -> int:
        """Rounds of tiles that programs take without drawing: see device/schedule.py."""
        spec, config = self.spec, self.config
        if spec.varlen or not config.in_step:
            return 1
        costs = tile_costs(config, (spec.seqlen_q, spec.seqlen_k), window, rows, group)
        return rounds_in_step(costs, self.programs)

    def _tile_counter(self, stream: int) -> torch.Tensor:
        """The int32 zero from which programs on this stream draw tile numbers; every launch leaves it zero.

        Launches on one stream do not overlap, so they share it. A captured graph may be replayed on any
        stream: it gets a counter of its own, zeroed by the graph itself.
        """
        if torch._C._cuda_isCurrentStreamCapturing():
            return torch.zeros(1, dtype=torch.int32, device=self.spec.device)
        counter = self.counters.get(stream)
        if counter is None:
            counter = self.counters[stream] = torch.zeros(1, dtype=torch.int32, device=self.spec.device)
        return counter

    def _prepare(self, tensors: tuple, pointers: tuple) -> KernelLauncher:
        """Compile (or find) the kernel; once per plan, at its first call."""
        *operands, lse = tensors
        boxes = forward_boxes(self.config).values()
        descriptors = [
            tensor_descriptor(t, *geometry, *box)
            for t, geometry, box in zip(operands, self.geometry, boxes, strict=True)
        ]
        arguments = (*descriptors, lse, *pointers, *self.numbers, self.config)
        return KernelLauncher(attention_forward, arguments, dict(num_warps=4, maxnreg=self.config.maxnreg))

    def __call__(
        self, q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, descales=None
    ):
        """(out, lse). Enqueues one kernel on the current stream of q's device; never waits for the device.

        `descales`: None, or float32 factors of q, k and v, what lse is short of and what V is (or None each).
        """
        if torch._C._cuda_getDevice() != self.device_index:
            with torch.cuda.device(self.device_index):
                return self(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, descales)
        if self.out_like is None:
            # one element spread over the shape: empty_like of it is contiguous and costs half of new_empty
            self.out_like = q.new_empty(1, dtype=self.spec.dtype).expand(self.spec.out_shape)
            self.lse_like = q.new_empty(1, dtype=torch.float32).expand(self.spec.lse_shape)
        out = torch.empty_like(self.out_like)
        lse = torch.empty_like(self.lse_like)
        stream = torch._C._cuda_getCurrentRawStream(self.device_index)
        counter = self._tile_counter(stream) if self.dynamic else None
        aside = None
        if self.config.promote > 0:
            aside = torch.empty(self.aside_elements, dtype=torch.float32, device=q.device)
        pointers = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, counter, descales, aside)
        if self.launcher is None:
            self.launcher = self._prepare((q, k, v, out, lse), pointers)
        addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
        maps = self.maps.get(addresses)
        if maps is None:
            maps = encoded(self.launcher, self.maps, addresses, (q, k, v, out))  # 1.2 us each
        self.launcher.launch(self.programs, stream, maps, lse, pointers, self.numbers, self.config)
        return out, lse
