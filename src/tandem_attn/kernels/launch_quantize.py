"""The gluon backend that makes FP8: from a question and addresses to launches.

A `QuantizePlan` is made once per question. With scales of blocks a call is one launch, and before it a short
one where K's mean is subtracted and two where V's is; a scale for more than a block takes one more pass over
inputs. Launches start early (programmatic dependent launch), and wait for what they need.
"""

from __future__ import annotations

import dataclasses

import torch

from tandem_attn.kernels.config_quantize import (
    KeyMeanConfig,
    QuantizeConfig,
    TransposeConfig,
    ValueMeanConfig,
)
from tandem_attn.kernels.launcher import KernelLauncher, misaligned
from tandem_attn.kernels.means import mean_of_keys, mean_of_values, sum_values
from tandem_attn.kernels.quantize import quantize_tiles, transpose_keys
from tandem_attn.kernels.question import UNBOUNDED, device_reasons, element_reasons
from tandem_attn.quant import BLOCK_K, BLOCK_Q, E4M3, PADDING
from tandem_attn.spec_quant import Quantized, QuantizeSpec, TransposeSpec, empty_tensors

NAME = "gluon"
SUMMING = 3168  # programs that a mean is summed by at most, 3 or 4 rounds of them
MULTIPROCESSORS = 132  # of an H100 or H200
MAX_CHUNKS = 64  # of a sequence, for which one warp adds up what they found
MAX_ROW_STRIDE = 2**24  # 128 rows are within 2**31 elements


def quantize_reasons(spec: QuantizeSpec) -> list[str]:
    """Why this backend cannot make FP8; empty if it can."""
    said = device_reasons(spec.device)
    if spec.device.type != "cuda":
        return said
    said += element_reasons(spec.dtype)
    for name, shape, stride in _views(spec):
        said += _stride_reasons(name, shape, stride, 8)
    if not spec.aligned:
        said.append("q, k or v does not start at a multiple of 16 bytes")
    if spec.rotary_dim % 16:
        said.append(f"rotary_dim is {spec.rotary_dim}; supported: multiples of 16")
    if spec.rotary_stride % 8 or spec.rotary_stride * spec.rotary_len >= 2**31:
        said.append(
            f"{spec.rotary_len} rows of rotary tables are {spec.rotary_stride} numbers apart; supported: "
            "multiples of 8, below 2**31 numbers in all"
        )
    if max(spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim) >= MAX_ROW_STRIDE:
        said.append(f"{spec.num_heads} heads of {spec.head_dim}: a row has more than 24 bits count")
    return said + _size_reasons(spec.batch, spec.seqlen_q, spec.seqlen_k)


def transpose_reasons(spec: TransposeSpec) -> list[str]:
    """Why this backend cannot lay out V; empty if it can."""
    said = device_reasons(spec.device)
    if spec.device.type != "cuda":
        return said
    shape = (spec.batch, spec.seqlen_k, spec.num_kv_heads)[spec.packed :]
    said += _stride_reasons("v", shape, spec.v_stride, 16)
    if not spec.aligned:
        said.append("v does not start at a multiple of 16 bytes")
    return said + _size_reasons(spec.batch, spec.seqlen_k)


def _views(spec: QuantizeSpec):
    """(name, shape without head_dim, strides) of q, k and v."""
    of_q = (spec.batch, spec.seqlen_q, spec.num_heads)[spec.packed :]
    of_k = (spec.batch, spec.seqlen_k, spec.num_kv_heads)[spec.packed :]
    yield from (("q", of_q, spec.q_stride), ("k", of_k, spec.k_stride), ("v", of_k, spec.v_stride))


def _stride_reasons(name: str, shape, stride, unit: int) -> list[str]:
    steps = [s for n, s in zip(shape, stride[:-1], strict=True) if n > 1]
    if (
        stride[-1] == 1
        and all(s % unit == 0 and 0 <= s < 2**34 for s in steps)
        and stride[-3] < MAX_ROW_STRIDE
    ):
        return []
    return [
        f"{name} has strides {stride}; supported: 1 at the end, else multiples of 16 bytes, rows in 2**24"
    ]


def _size_reasons(*sizes: int) -> list[str]:
    if max(sizes) < UNBOUNDED:
        return []
    return [f"{max(sizes)} rows or sequences: more than 30 bits count"]


def quantize_describe(spec: QuantizeSpec) -> str:
    """One line for explain(): what is launched."""
    plan = QuantizePlan(spec)
    parts = ["K of a sample"] if spec.smooth_k else []
    parts += [f"V by {plan.chunks} parts of a sequence"] if spec.smooth_v else []
    mean = f"means of {' and '.join(parts)}, then " if parts else ""
    passes = "one pass" if spec.granularity == "block" else "one pass for the maxima and one"
    return f"{mean}{passes}, tiles of {PADDING} rows by {plan.config.num_warps} warps"


def transpose_describe(spec: TransposeSpec) -> str:
    """One line for explain(): what is launched."""
    return f"one kernel, tiles of {PADDING} keys by {transpose_config(spec).num_warps} warps"


def quantize(spec: QuantizeSpec) -> QuantizePlan:
    """The plan for a question: see `QuantizePlan.__call__`."""
    return QuantizePlan(spec)


def transpose(spec: TransposeSpec) -> TransposePlan:
    """The plan for V: see `TransposePlan.__call__`."""
    return TransposePlan(spec)


def quantize_config(spec: QuantizeSpec, programs: int = 0, measures: bool = False) -> QuantizeConfig:
    """The configuration for a question that takes so many programs.

    They start before the launch that they follow is over if the first of them, tiles of V, need not wait for
    it, or if all are resident at once: else they would wait one by one, and what they read could not be
    loaded along with their rows.
    """
    last_pass = spec.granularity != "block" and not measures
    follows = spec.smooth_k or spec.smooth_v or last_pass
    config = QuantizeConfig(
        **_facts_of_rows(spec),
        has_seqused_q=spec.has_seqused_q,
        granularity=spec.granularity,
        measures=measures,
    )
    has_time = not (spec.smooth_v or last_pass) or programs <= MULTIPROCESSORS * config.resident
    return dataclasses.replace(config, early=follows and has_time)


def _facts_of_rows(spec: QuantizeSpec) -> dict:
    """The fields of a RowsConfig."""
    return dict(
        head_dim=spec.head_dim,
        head_dim_v=spec.head_dim_v,
        packed=spec.packed,
        has_seqused_k=spec.has_seqused_k,
        rotate=spec.rotate,
        smooth_k=spec.smooth_k,
        smooth_v=spec.smooth_v,
        rotary_dim=spec.rotary_dim,
        interleaved=spec.interleaved,
    )


def transpose_config(spec: TransposeSpec) -> TransposeConfig:
    """The configuration for V."""
    return TransposeConfig(spec.head_dim_v, spec.packed, spec.has_seqused_k)


def options_of(config: QuantizeConfig | KeyMeanConfig | ValueMeanConfig, early: bool = False) -> dict:
    """How a kernel is compiled and launched."""
    limit = {"maxnreg": config.maxnreg} if hasattr(config, "maxnreg") else {}
    return dict(num_warps=config.num_warps, launch_pdl=early, **limit)


def _three_strides(stride: tuple[int, ...], unit: int) -> tuple[int, ...]:
    """Of (batch, rows, heads), in units of 16 bytes; packed: 0 for the batch."""
    return tuple(s // unit for s in ((0, *stride[:2]) if len(stride) == 3 else stride[:3]))


def _tiles(spec, seqlen: int, least: int = 0) -> int:
    """Tiles of a head."""
    if spec.packed:
        return (seqlen + PADDING * spec.batch) // PADDING
    return spec.batch * max(least, -(-seqlen // PADDING))


class _Kernels:
    """Compiled kernels of a plan, by kernel, options and the alignment of tensors."""

    def __init__(self) -> None:
        self.made: dict[tuple, KernelLauncher] = {}

    def launch(
        self, kernel, programs: int, stream: int, tensors: tuple, numbers: tuple, options: dict
    ) -> None:
        """Enqueue `kernel` on tensors (and tuples of them), then numbers and the config."""
        flat = tuple(y for x in tensors for y in (x if isinstance(x, tuple) else (x,)))
        key = (kernel.fn.__name__, numbers[-1], misaligned(flat))
        launcher = self.made.get(key)
        if launcher is None:
            launcher = self.made[key] = KernelLauncher(kernel, (*tensors, *numbers), options)
        launcher.launch_flat((programs, 1, 1), stream, [], tensors, numbers)


class QuantizePlan:
    """Everything about a call that depends neither on addresses nor on lengths."""

    def __init__(self, spec: QuantizeSpec):
        self.spec = spec
        self.device_index = spec.device.index or 0
        self.kernels = _Kernels()
        of_q, of_k, of_v = (
            _tiles(spec, n, i) for n, i in ((spec.seqlen_q, 0), (spec.seqlen_k, 0), (spec.seqlen_k, 1))
        )
        self.programs = of_q * spec.num_heads + (of_k + of_v) * spec.num_kv_heads
        self.config = quantize_config(spec, self.programs)
        self.heads_k = spec.batch * spec.num_kv_heads
        self.of_keys = KeyMeanConfig(**_facts_of_rows(spec))
        self.of_values = ValueMeanConfig(spec.head_dim_v, spec.packed, spec.has_seqused_k)
        steps = -(-spec.seqlen_k // self.of_values.summing.rows)  # packed: one sequence may have all rows
        self.chunks = max(1, min(MAX_CHUNKS, steps, -(-SUMMING // max(1, self.heads_k))))
        q_strides, self.k_strides, self.v_strides = (
            _three_strides(stride, 8) for stride in (spec.q_stride, spec.k_stride, spec.v_stride)
        )
        sizes = (spec.batch, spec.num_heads, spec.num_kv_heads, spec.seqlen_q, spec.seqlen_k)
        self.rotary = (spec.rotary_stride // 8, spec.rotary_len)
        self.numbers = (*sizes, *self.rotary, *q_strides, *self.k_strides, *self.v_strides)

    def _shared_scales(self) -> tuple[list[int], int]:
        """(how many scales of q, k and v there are, each rounded up to 16 bytes, all together)."""
        heads = (self.spec.num_heads, self.spec.num_kv_heads, self.spec.num_kv_heads)
        counts = [self.spec.batch * h if self.spec.granularity == "head" else 1 for h in heads]
        return counts, sum(-(-n // 4) * 4 for n in counts)

    def _scales(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """(where kernels put scales, the same in public shapes, maxima int32 of granularities other than
        "block") of q, k and v."""
        spec = self.spec
        sides = (
            (spec.seqlen_q, spec.num_heads, BLOCK_Q),
            *2 * ((spec.seqlen_k, spec.num_kv_heads, BLOCK_K),),
        )
        shapes = [spec.descale_shape(*side) for side in sides]
        if spec.granularity == "block":
            made = [torch.empty(shape, dtype=torch.float32, device=spec.device) for shape in shapes]
            return made, made, []
        counts, total = self._shared_scales()
        steps = [-(-n // 4) * 4 for n in counts]
        allocate = torch.ones if 0 in (spec.seqlen_q, spec.seqlen_k) else torch.empty
        made = allocate(total, dtype=torch.float32, device=spec.device).split(steps)
        maxima = torch.zeros(total, dtype=torch.int32, device=spec.device).split(steps)
        shown = [
            x[:n].view(-1 if n == 1 else spec.batch, 1 if n == 1 else shape[1], 1).expand(shape)
            for x, n, shape in zip(made, counts, shapes, strict=True)
        ]
        return list(made), shown, list(maxima)

    def __call__(
        self, q, k, v, signs=None, cos=None, sin=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None,
        seqused_k=None,
    ) -> Quantized:  # fmt: skip
        """As the plan of reference_quant.py. Rows of q and k that no sequence declares are not written.
        Enqueues on the current stream; never waits."""
        spec = self.spec
        lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
        if spec.is_empty:
            return empty_tensors(spec)
        if torch._C._cuda_getDevice() != self.device_index:
            with torch.cuda.device(self.device_index):
                return self(q, k, v, signs, cos, sin, *lengths)
        lengths = tuple(q if x is None else x for x in lengths)  # what is not given points anywhere
        signs, cos, sin = (q if x is None else x for x in (signs, cos, sin))
        stream = torch._C._cuda_getCurrentRawStream(self.device_index)
        q8, k8 = (torch.empty(x.shape, dtype=E4M3, device=spec.device) for x in (q, k))
        v_t = torch.empty(spec.v_t_shape, dtype=E4M3, device=spec.device)
        scales, shown, maxima = self._scales()
        shift = k_mean = v_mean = None
        if spec.smooth_k:
            # rows of no sequence have a finite lse_shift as well
            allocate = torch.zeros if spec.packed else torch.empty
            shift = allocate(spec.lse_shape, dtype=torch.float32, device=spec.device)
        if spec.smooth_v:
            v_mean = self._mean_of_values(stream, v, lengths)
        if spec.smooth_k:
            k_mean = self._mean_of_keys(stream, k, cos, sin, lengths)
        outputs = (q8, k8, v_t, *scales, q if shift is None else shift)
        means = (q if x is None else x for x in (k_mean, v_mean))
        tables = (signs, *means, *(maxima or (q, q, q)), cos, sin)
        tensors = (q, k, v, outputs, tables, *lengths)
        if maxima:
            self._launch_tiles(quantize_config(spec, self.programs, measures=True), stream, tensors)
        self._launch_tiles(self.config, stream, tensors)
        return Quantized(q8, k8, v_t, *shown, shift, k_mean, v_mean)

    def _launch_tiles(self, config: QuantizeConfig, stream: int, tensors: tuple) -> None:
        numbers, options = (*self.numbers, config), options_of(config, config.early)
        self.kernels.launch(quantize_tiles, self.programs, stream, tensors, numbers, options)

    def _mean_of_keys(self, stream: int, k, cos, sin, lengths) -> torch.Tensor:
        spec, config = self.spec, self.of_keys
        mean = self._numbers_of_heads(spec.head_dim)
        numbers = (spec.num_kv_heads, spec.seqlen_k, *self.k_strides, *self.rotary, config)
        tensors = (k, mean, cos, sin, lengths[1], lengths[3])
        self.kernels.launch(mean_of_keys, self.heads_k, stream, tensors, numbers, options_of(config))
        return mean

    def _mean_of_values(self, stream: int, v, lengths) -> torch.Tensor:
        spec, config = self.spec, self.of_values
        partials = self._numbers_of_heads(self.chunks, spec.head_dim_v)
        mean = self._numbers_of_heads(spec.head_dim_v)
        of_k, sizes = (lengths[1], lengths[3]), (spec.num_kv_heads, spec.seqlen_k, self.chunks)
        numbers, programs = (*sizes, *self.v_strides, config), self.heads_k * self.chunks
        self.kernels.launch(sum_values, programs, stream, (v, partials, *of_k), numbers, options_of(config))
        tensors, options = (partials, mean, *of_k), dict(num_warps=1, launch_pdl=True)
        self.kernels.launch(mean_of_values, self.heads_k, stream, tensors, (*sizes, config), options)
        return mean

    def _numbers_of_heads(self, *shape: int) -> torch.Tensor:
        """Memory for fp32 numbers of all KV heads of all sequences."""
        shape = (self.spec.batch, self.spec.num_kv_heads, *shape)
        return torch.empty(shape, dtype=torch.float32, device=self.spec.device)


class TransposePlan:
    """Everything about a call that depends neither on addresses nor on lengths."""

    def __init__(self, spec: TransposeSpec):
        self.spec = spec
        self.config = transpose_config(spec)
        self.device_index = spec.device.index or 0
        self.kernels = _Kernels()
        self.programs = _tiles(spec, spec.seqlen_k, least=1) * spec.num_kv_heads
        sizes = (spec.batch, spec.num_kv_heads, spec.seqlen_k)
        self.numbers = (*sizes, *_three_strides(spec.v_stride, 16), self.config)

    def __call__(self, v, cu_seqlens_k=None, seqused_k=None) -> torch.Tensor:
        """v_t of `quant.Fp8Tensors`. Enqueues one kernel on the current stream; never waits."""
        spec = self.spec
        if torch._C._cuda_getDevice() != self.device_index:
            with torch.cuda.device(self.device_index):
                return self(v, cu_seqlens_k, seqused_k)
        v_t = torch.empty(spec.v_t_shape, dtype=E4M3, device=spec.device)
        if not spec.is_empty:
            lengths = tuple(v if x is None else x for x in (cu_seqlens_k, seqused_k))
            stream = torch._C._cuda_getCurrentRawStream(self.device_index)
            options = dict(num_warps=self.config.num_warps, launch_pdl=False)
            tensors = (v, v_t, *lengths)
            self.kernels.launch(transpose_keys, self.programs, stream, tensors, self.numbers, options)
        return v_t
