"""The backward of the gluon backend: from a question and addresses to its launches.

A `BackwardPlan` is made once per question. A call allocates the gradients and a workspace (two numbers per
row and head, and up to head_dim 128 dQ in float32), and launches `prepare_rows`; then up to head_dim 128 one
kernel for all gradients and `finish_rows`, above one for dK and dV and one for dQ; and for packed sequences
`clear_padding`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from tandem_attn.device import accumulate
from tandem_attn.device.division import division_magic
from tandem_attn.device.sequence import PADDING
from tandem_attn.kernels.backward import attention_backward
from tandem_attn.kernels.backward_keys import key_gradients
from tandem_attn.kernels.backward_queries import query_gradient
from tandem_attn.kernels.backward_rows import (
    SUMMED_ROWS,
    clear_padding,
    finish_rows,
    prepare_rows,
    sum_parts,
)
from tandem_attn.kernels.config_backward import (
    KEYS,
    MULTIPROCESSORS,
    GradientConfig,
    QueryGradientConfig,
    backward_configs,
    parts_of_group,
)
from tandem_attn.kernels.launch import descriptor_geometry, tile_box, tiles_bound
from tandem_attn.kernels.launcher import KernelLauncher, encoded, tensor_descriptor
from tandem_attn.kernels.question import score_scales, window_numbers
from tandem_attn.spec import AttentionSpec

ROWS_TOGETHER = 16  # at most so many heads whose tiles of keys are taken together, the longest first
FILLING = 128 * MULTIPROCESSORS  # keys of as many heads as have a tile of 128 for every multiprocessor
ORDERED_TILES = 256  # at most so many tiles together where they wait for each other: two per program
ORDERED_WINDOW_TILES = (
    1024  # ... and where few tiles see a row: a long queue for each costs more than L2 gains
)
CLEARERS = 16  # programs per gap between sequences
CHUNK = accumulate.CHUNK.value


def backward_boxes(config: GradientConfig) -> dict[str, tuple[list[int], object, str]]:
    """TMA box, shared-memory layout and element type of each descriptor of a backward kernel."""

    def box(rows: int, cols: int):
        return *tile_box(config, rows, cols), config.element

    if isinstance(config, QueryGradientConfig):
        return {
            "q_desc": box(64, config.qk_width),
            "k_desc": box(config.tile_n, config.qk_width),
            "v_desc": box(config.tile_n, config.v_width),
            "do_desc": box(64, config.v_width),
            "dq_desc": box(64, config.qk_width),
        }
    boxes = {
        "q_desc": box(config.tile_m, config.qk_width),
        "k_desc": box(KEYS, config.qk_width),
        "v_desc": box(KEYS, config.v_width),
        "do_desc": box(config.tile_m, config.v_width),
    }
    if config.with_q:
        boxes["dq_desc"] = [128, 32], config.dq_layout, "fp32"
    boxes["stat_desc"] = [config.tile_m], config.stat_layout, "fp32"
    if not config.partial:
        boxes |= {"dk_out": box(KEYS, config.qk_width), "dv_out": box(KEYS, config.v_width)}
    return boxes


def kernel_of(config: GradientConfig):
    """The jit function that a configuration is for."""
    return {"qkv": attention_backward, "kv": key_gradients, "q": query_gradient}[config.gradients]


def _padded(rows: int) -> int:
    return -(-rows // PADDING.value) * PADDING.value


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where TMA cannot read it in place: misaligned, or strides like those of an expanded
    tensor."""
    strides = [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    fits = x.stride(-1) == 1 and all(s % 8 == 0 and 0 < s < 2**38 for s in strides)
    return x if fits and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _three_strides(x: torch.Tensor) -> tuple[int, ...]:
    """Of (batch, rows, heads), in units of 8 elements; packed: 0 for the batch."""
    strides = (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]
    return tuple(s // 8 for s in strides)


class Workspace(NamedTuple):
    """Memory of one call besides its gradients."""

    statistics: torch.Tensor  # float32: lse in base 2, then delta, of padded rows
    accumulator: torch.Tensor | None  # float32, (..., 32): dQ in chunks
    counters: torch.Tensor | None  # int32: of contributions to each chunk
    parts: tuple[torch.Tensor, ...] = ()  # float32: dK and dV by parts of the query heads of each KV head


class BackwardPlan:
    """Everything about a call that does not depend on addresses."""

    def __init__(self, spec: AttentionSpec):
        self.spec = spec
        self.by_keys, self.by_queries = backward_configs(spec)
        self.parts = parts_of_group(spec)
        self.device_index = spec.device.index or 0
        if spec.varlen:
            self.padded_rows = _padded(spec.total_q) + PADDING.value * spec.batch
            self.longest = _padded(min(spec.seqlen_q, spec.total_q))
        else:
            self.padded_rows = self.longest = _padded(spec.seqlen_q)
        self.stat_rows = (1 if spec.varlen else spec.batch) * spec.num_heads * self.padded_rows
        self.chunks = self.stat_rows * self.by_keys.head_dim // CHUNK**2 if self.by_keys.with_q else 0
        self.lengths = (spec.total_q, spec.total_k) if spec.varlen else (spec.seqlen_q, spec.seqlen_k)
        self.row_blocks = self.longest // CHUNK
        self.row_grid = (self.row_blocks * spec.num_heads * spec.batch, 1, 1)
        self.scales = score_scales(spec.softmax_scale, spec.softcap)
        self.programs_by_keys, self.numbers_by_keys = self._numbers_by_keys()
        if self.by_queries is not None:
            self.programs_by_queries, self.numbers_by_queries = self._numbers_by_queries()
        self.launchers: dict[tuple, KernelLauncher] = {}
        self.maps: dict[tuple, list] = {}

    @property
    def workspace_bytes(self) -> int:
        """Extra memory of a call, besides the gradients."""
        of_parts = sum(map(math.prod, self._shapes_of_parts()))
        return 4 * (2 * self.stat_rows + self.chunks * (CHUNK**2 + 1) + of_parts)

    def _shapes_of_parts(self) -> list[tuple[int, ...]]:
        """(keys of KV heads, parts, columns) of dK and dV where they are added up later."""
        config, rows = self.by_keys, self.spec.total_k * self.spec.num_kv_heads
        widths = (config.head_dim, config.head_dim_v) if config.partial else ()
        return [(rows, self.parts, width) for width in widths]

    def __call__(self, dout, dlse, q, k, v, out, lse, *lengths):
        """(dq, dk, dv), contiguous. Enqueues on the current stream of q's device; never waits."""
        if torch._C._cuda_getDevice() != self.device_index:
            with torch.cuda.device(self.device_index):
                return self(dout, dlse, q, k, v, out, lse, *lengths)
        pointers = (*lengths, None, None, None, None)[:4]
        stream = torch._C._cuda_getCurrentRawStream(self.device_index)
        dout, out, lse = _readable(dout), _readable(out), lse.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        dq, dk, dv = grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        space = self._workspace()
        clean = (
            torch.empty(out.shape, dtype=out.dtype, device=out.device)
            if self._may_be_blind(pointers)
            else None
        )
        self._prepare_rows(stream, out, dout, clean, lse, dlse, space, pointers)
        dout = dout if clean is None else clean
        self._launch_by_keys(stream, (q, k, v, dout), (dk, dv), space, pointers)
        if self.parts > 1:
            self._sum_parts(stream, space, dk, dv)
        if self.by_queries is None:
            self._finish_rows(stream, space.accumulator, dq, pointers)
        else:
            self._launch_by_queries(stream, (q, k, v, dout, dq), space, pointers)
        if self.spec.varlen:
            self._clear_padding(stream, grads, pointers)
        return grads

    def _workspace(self) -> Workspace:
        device = self.spec.device
        statistics = torch.empty(2 * self.stat_rows, dtype=torch.float32, device=device)
        parts = tuple(torch.empty(x, dtype=torch.float32, device=device) for x in self._shapes_of_parts())
        if not self.chunks:
            return Workspace(statistics, None, None, parts)
        accumulator = torch.empty((self.chunks * CHUNK**2 // 32, 32), dtype=torch.float32, device=device)
        counters = torch.empty(self.chunks, dtype=torch.int32, device=device)
        return Workspace(statistics, accumulator, counters, parts)

    def _launch(
        self, key: tuple, kernel, grid, stream, tensors: tuple, rest: tuple, maps=None, **options
    ) -> None:
        """`maps`: (tensors, their descriptors or a function that makes them)."""
        launcher = self.launchers.get(key)
        described, make = maps or ((), tuple)
        if launcher is None:
            arguments = (*make(), *tensors, *rest)
            launcher = self.launchers[key] = KernelLauncher(kernel, arguments, dict(num_warps=4, **options))
        found = []
        if described:
            at = (key, *(x.data_ptr() for x in described))
            found = self.maps.get(at) or encoded(launcher, self.maps, at, described)
        launcher.launch_flat(grid, stream, found, tensors, rest)

    def _may_be_blind(self, pointers) -> bool:
        """Whether there may be query rows that see none of the keys that there are."""
        spec = self.spec
        if spec.window.right < 0:
            return False
        if not spec.varlen:
            return spec.seqlen_k - spec.seqlen_q + spec.window.right < 0
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k = pointers
        same = cu_seqlens_q.data_ptr() == cu_seqlens_k.data_ptr()
        return not (same and seqused_q is None and seqused_k is None)

    def _prepare_rows(self, stream, out, dout, clean, lse, dlse, space: Workspace, pointers) -> None:
        spec = self.spec
        tensors = (out, dout, clean, lse, dlse, space.statistics, space.counters, *pointers)
        numbers = (self.row_blocks, spec.num_heads, *self.lengths, self.padded_rows, self.stat_rows)
        strides = (*_three_strides(out), *_three_strides(dout))
        rest = (*numbers, *strides, spec.head_dim_v // 8, self.by_keys)
        self._launch(
            ("prepare", clean is None, dlse is None), prepare_rows, self.row_grid, stream, tensors, rest
        )

    def _finish_rows(self, stream, accumulator, dq, pointers) -> None:
        spec = self.spec
        numbers = (self.row_blocks, spec.num_heads, *self.lengths, self.padded_rows, spec.head_dim // 8)
        rest = (*numbers, spec.softmax_scale, self.by_keys)
        tensors = (accumulator, dq, *pointers)
        self._launch(("finish",), finish_rows, self.row_grid, stream, tensors, rest, launch_pdl=True)

    def _clear_padding(self, stream, grads, pointers) -> None:
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k = pointers
        grid = (self.spec.batch + 1, CLEARERS, 1)
        for side, x in zip("qkk", grads, strict=True):
            tensors = (x, cu_seqlens_q, seqused_q) if side == "q" else (x, cu_seqlens_k, seqused_k)
            rest = (self.spec.batch, x.shape[0], math.prod(x.shape[1:]) // 8)
            self._launch(("clear", side), clear_padding, grid, stream, tensors, rest)

    def _numbers_by_keys(self) -> tuple[int, tuple]:
        """(programs, scalar arguments) of a launch by keys."""
        spec, tile_n = self.spec, self.by_keys.tile_n
        num_parts = spec.num_kv_heads * self.parts
        programs, places, magics = self._tiles(num_parts, spec.seqlen_k, spec.total_k, tile_n)
        lengths = (*self.lengths, *window_numbers(spec.window))
        question = (spec.batch, num_parts, self.parts, spec.group_size // self.parts, *lengths)
        return programs, (*question, self.padded_rows, self.stat_rows, places, *magics, *self.scales)

    def _numbers_by_queries(self) -> tuple[int, tuple]:
        """(programs, scalar arguments) of the launch by queries."""
        spec, tile_rows = self.spec, self.by_queries.tile_rows
        programs, places, magics = self._tiles(spec.num_heads, spec.seqlen_q, spec.total_q, tile_rows)
        magics.insert(1, division_magic(spec.group_size))
        question = (spec.batch, spec.num_heads, *self.lengths, *window_numbers(spec.window))
        return programs, (*question, self.padded_rows, self.stat_rows, places, *magics, *self.scales)

    def _launch_by_keys(self, stream, operands: tuple, grads: tuple, space: Workspace, pointers) -> None:
        config = self.by_keys
        accumulator = (space.accumulator,) if config.with_q else ()
        counters = (space.counters,) if config.with_q else ()
        described = (*operands, *accumulator, space.statistics, *(() if space.parts else grads))
        tensors, rest = (*space.parts, *counters, *pointers), (*self.numbers_by_keys, config)
        key = ("keys", operands[3].stride())
        maps = (described, lambda: self._descriptors(config, described))
        options = dict(maxnreg=config.maxnreg, launch_pdl=True)
        grid = (self.programs_by_keys, 1, 1)
        self._launch(key, kernel_of(config), grid, stream, tensors, rest, maps, **options)

    def _launch_by_queries(self, stream, operands: tuple, space: Workspace, pointers) -> None:
        config = self.by_queries
        tensors, rest = (space.statistics, *pointers), (*self.numbers_by_queries, config)
        key = ("queries", operands[3].stride())
        maps = (operands, lambda: self._descriptors(config, operands))
        options = dict(maxnreg=config.maxnreg, launch_pdl=True)
        grid = (self.programs_by_queries, 1, 1)
        self._launch(key, kernel_of(config), grid, stream, tensors, rest, maps, **options)

    def _sum_parts(self, stream, space: Workspace, dk, dv) -> None:
        rows = self.spec.total_k * self.spec.num_kv_heads
        tensors = (*space.parts, dk, dv)
        rest = (rows, self.parts, self.spec.head_dim // 8, self.spec.head_dim_v // 8, self.by_keys)
        grid = (-(-rows // SUMMED_ROWS.value), 1, 1)
        self._launch(("sum",), sum_parts, grid, stream, tensors, rest, launch_pdl=True)

    def _tiles(self, heads: int, longest: int, total: int, size: int) -> tuple[int, int, list[int]]:
        """(programs, heads taken together, what Rows divides by) for tiles of `size` rows or keys."""
        spec = self.spec
        rows = heads if spec.varlen else spec.batch * heads
        blocks = -(-longest // size)
        together = min(self._rows_together(longest, blocks), rows)
        divisors = (heads, together, rows % together or together, together * blocks)
        programs = tiles_bound(spec, heads, longest, total, size)
        return programs, together, [division_magic(d) for d in divisors]

    def _rows_together(self, longest: int, blocks: int) -> int:
        """Heads, of `blocks` tiles each, whose tiles are taken together.

        As few as fill the card: what they read and add to stays in L2.
        """
        if self.by_keys.ordered:
            window = self.by_keys.Mask.has_left_edge.value
            heads = (ORDERED_WINDOW_TILES if window else ORDERED_TILES) // blocks
        else:
            heads = ROWS_TOGETHER if self._better_many(longest) else FILLING // longest
        return max(1, min(ROWS_TOGETHER, heads))

    def _better_many(self, longest: int) -> bool:
        """Whether many heads together were faster than as few as fill the card. By measurement, and not
        understood (docs/kernels/backward.md)."""
        mask = self.by_keys.Mask
        if not mask.has_diagonal.value:
            return False
        if self.by_keys.scatters:
            return longest > 2 * FILLING
        several_heads = self.spec.group_size > self.parts  # in a program
        wide = self.by_queries is not None
        return several_heads or (wide if mask.has_left_edge.value else longest > FILLING)

    def _descriptors(self, config, tensors: tuple) -> list:
        """TMA descriptors in the order of a kernel's arguments."""
        boxes = backward_boxes(config).values()
        return [
            tensor_descriptor(x, *_geometry(x), box, layout)
            for x, (box, layout, _) in zip(tensors, boxes, strict=True)
        ]


def _geometry(x: torch.Tensor) -> tuple[list[int], list[int]]:
    """Dimensions and strides of a descriptor: of q, k, v and the like, of the statistics, or of the
    accumulator."""
    if x.dim() > 2:
        return descriptor_geometry(tuple(x.shape), tuple(x.stride()))
    return list(x.shape), list(x.stride())
