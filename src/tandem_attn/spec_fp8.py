"""The question of attention over FP8 tensors: what `quantize_qkv` makes, or FlashAttention-3's e4m3 inputs.

Errors as in `spec.py`.
"""

from __future__ import annotations

import dataclasses

import torch

from tandem_attn.quant import BLOCK_K, BLOCK_Q, E4M3, Fp8Tensors, padded_rows
from tandem_attn.spec import (
    AttentionSpec,
    Lengths,
    Options,
    Window,
    check_options,
    check_types,
    check_vector,
    refuse,
    starts_aligned,
)

OUT_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}  # of outputs, as Triton spells them
REFERENCE_DTYPES = (*OUT_DTYPES, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class Fp8Spec:
    """Attention over e4m3 q, k and v_t with their descales, in the shapes of `quant.Fp8Tensors`."""

    attention: AttentionSpec  # the question itself; dtype: of out; strides: of q, k and v_t
    per_block: bool  # a descale per block, else per head of a sequence
    corrects_lse: bool
    adds_mean: bool  # of V, to the output
    padded_k: int  # columns of v_t

    @property
    def device(self) -> torch.device:
        return self.attention.device

    @property
    def is_empty(self) -> bool:
        return self.attention.is_empty

    @property
    def factors(self) -> tuple[int, int, int]:
        """Descales of a head of q, of a head of k and v, and whether there is one per block: 1 or 0."""
        if not self.per_block:
            return 1, 1, 0
        spec = self.attention
        if spec.varlen:
            rows_q, rows_k = padded_rows(spec.total_q, spec.batch), padded_rows(spec.total_k, spec.batch)
            return rows_q // BLOCK_Q, rows_k // BLOCK_K, 1
        return -(-spec.seqlen_q // BLOCK_Q), -(-spec.seqlen_k // BLOCK_K), 1

    @property
    def question(self) -> str:
        """One line for explain()."""
        each = "block" if self.per_block else "head"
        return f"e4m3, a descale for each {each}, output: {self.attention.question}"


def fp8_spec(x: Fp8Tensors, options: Options) -> Fp8Spec:
    """The question that these tensors ask. Reads shapes only."""
    options = check_question(x, options)
    lengths = x.lengths
    packed = lengths is not None
    batch = lengths.cu_seqlens_q.shape[0] - 1 if packed else x.q.shape[0]
    seqlen_q, seqlen_k = x.q.shape[-3], x.k.shape[-3]
    total_q, total_k = (seqlen_q, seqlen_k) if packed else (batch * seqlen_q, batch * seqlen_k)
    if packed:
        seqlen_q, seqlen_k = int(lengths.max_seqlen_q), int(lengths.max_seqlen_k)
    scale = options.softmax_scale
    window = Window(options.window_left, options.window_right).reduced(seqlen_q, seqlen_k)
    return Fp8Spec(
        attention=AttentionSpec(
            device=x.q.device,
            dtype=x.dtype,
            batch=batch,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            num_heads=x.q.shape[-2],
            num_kv_heads=x.k.shape[-2],
            head_dim=x.q.shape[-1],
            head_dim_v=x.v_t.shape[-2],
            softmax_scale=x.q.shape[-1] ** -0.5 if scale is None else scale,
            window=window,
            softcap=options.softcap,
            varlen=packed,
            total_q=total_q,
            total_k=total_k,
            has_seqused_q=packed and lengths.seqused_q is not None,
            has_seqused_k=packed and lengths.seqused_k is not None,
            q_stride=x.q.stride(),
            k_stride=x.k.stride(),
            v_stride=x.v_t.stride(),
            aligned=starts_aligned(x.q, x.k, x.v_t),
            sm_margin=options.sm_margin,
            deterministic=options.deterministic,
        ),
        per_block=_per_block(x),
        corrects_lse=x.lse_shift is not None,
        adds_mean=x.v_mean is not None,
        padded_k=x.v_t.shape[-1],
    )


def check_question(x: Fp8Tensors, options: Options) -> Options:
    """The same options as plain numbers; raises unless they and the tensors fit. Fakes are welcome."""
    options = check_options(options)
    _check_tensors(x)
    if x.lse_shift is not None and options.softcap > 0.0:
        supported = "0 for tensors without K's mean: a softcap sees it (recipe smooth_k=False)"
        refuse(ValueError, "softcap", options.softcap, supported)
    return options


def _per_block(x: Fp8Tensors) -> bool:
    """Whether descales differ from block to block, by how they lie in memory. A single one, whose stride may
    be any, goes with both."""
    if x.lengths is not None:
        return x.q_descale.dim() == 2
    descales = (x.q_descale, x.k_descale, x.v_descale)
    return not any(t.shape[-1] > 1 and t.stride(-1) == 0 for t in descales)


def _check_tensors(x: Fp8Tensors) -> None:
    """Raise unless the tensors of `Fp8Tensors` fit together."""
    check_types(x.q, x.k, x.v_t, x.lengths)
    packed = x.lengths is not None
    rank = 3 if packed else 4
    for name in ("q", "k", "v_t"):
        t = getattr(x, name)
        if t.dtype != E4M3:
            refuse(TypeError, name, f"of dtype {t.dtype}", str(E4M3))
        if t.dim() != rank:
            refuse(ValueError, name, f"a tensor of shape {tuple(t.shape)}", f"{rank} dimensions")
        if t.device != x.q.device:
            refuse(ValueError, name, f"on {t.device}", f"the device of q, {x.q.device}")
    if x.dtype not in REFERENCE_DTYPES:
        refuse(TypeError, "dtype", x.dtype, ", ".join(map(str, REFERENCE_DTYPES)))
    heads, kv_heads = x.q.shape[-2], x.k.shape[-2]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        refuse(ValueError, "q", f"of {heads} heads with k of {kv_heads}", "a multiple of the heads of k")
    if x.k.shape[-1] != x.q.shape[-1]:
        refuse(ValueError, "k", f"of head_dim {x.k.shape[-1]}", f"the head_dim of q, {x.q.shape[-1]}")
    if not packed and x.k.shape[0] != x.q.shape[0]:
        refuse(ValueError, "k", f"of batch size {x.k.shape[0]}", f"the batch size of q, {x.q.shape[0]}")
    batch = x.q.shape[0]
    if packed:
        batch = check_vector("cu_seqlens_q", x.lengths.cu_seqlens_q, x.q.device, None, "")
        whose = "the batch size of cu_seqlens_q"
        for name, t in zip(Lengths._fields[1:4], x.lengths[1:4], strict=True):
            if t is not None:
                check_vector(name, t, x.q.device, batch, whose)
    columns = padded_rows(x.k.shape[-3], batch) if packed else padded_rows(x.k.shape[-3])
    expected = (kv_heads, x.v_t.shape[-2], columns) if packed else (batch, kv_heads, x.v_t.shape[-2], columns)
    if tuple(x.v_t.shape) != expected or not x.v_t.is_contiguous():
        was = f"of shape {tuple(x.v_t.shape)}, strides {x.v_t.stride()}"
        refuse(ValueError, "v_t", was, f"{expected}, contiguous: as quantize_qkv makes it")
    _check_descales(x, batch, heads, kv_heads)


def _check_descales(x: Fp8Tensors, batch: int, heads: int, kv_heads: int) -> None:
    """Raise unless descales have one of the shapes, lse_shift that of lse, v_mean a number per channel."""
    packed = x.lengths is not None
    _check_kinds(x)
    sides = (("q", heads, x.q.shape[-3], BLOCK_Q), ("k", kv_heads, x.k.shape[-3], BLOCK_K))
    per_block = _per_block(x)
    for side, n, rows, block in (*sides, ("v", kv_heads, x.k.shape[-3], BLOCK_K)):
        name = f"{side}_descale"
        t = getattr(x, name)
        if packed:
            expected = (n, padded_rows(rows, batch) // block) if per_block else (batch, n, 1)
        else:
            expected = (batch, n, -(-rows // block))
        if tuple(t.shape) != expected or not _lies_well(t, per_block):
            was = f"of shape {tuple(t.shape)}, strides {t.stride()}"
            how = "contiguous" if per_block else "one number per head, contiguous, expanded along blocks"
            refuse(ValueError, name, was, f"{expected}, {how}")
    rows = x.q.shape[-3]
    _check_correction("lse_shift", x.lse_shift, (heads, rows) if packed else (batch, heads, rows))
    _check_correction("v_mean", x.v_mean, (batch, kv_heads, x.v_t.shape[-2]))


def _check_correction(name: str, t: torch.Tensor | None, expected: tuple[int, ...]) -> None:
    """Raise unless t is None or lies as the kernels read it."""
    if t is not None and (tuple(t.shape) != expected or not t.is_contiguous()):
        was = f"of shape {tuple(t.shape)}, strides {t.stride()}"
        refuse(ValueError, name, was, f"{expected}, contiguous")


def _check_kinds(x: Fp8Tensors) -> None:
    """Raise unless descales, and corrections if there are any, are float32 tensors beside q."""
    corrections = ("lse_shift", "v_mean")
    for name in ("q_descale", "k_descale", "v_descale", *corrections):
        t = getattr(x, name)
        if t is None and name in corrections:
            continue
        if not isinstance(t, torch.Tensor):
            refuse(TypeError, name, type(t).__name__, "a torch.Tensor of dtype float32")
        if t.dtype != torch.float32:
            refuse(TypeError, name, f"of dtype {t.dtype}", "torch.float32")
        if t.device != x.q.device:
            refuse(ValueError, name, f"on {t.device}", f"the device of q, {x.q.device}")
        if t.dim() not in (2, 3):
            was = f"of shape {tuple(t.shape)}"
            refuse(ValueError, name, was, "2 or 3 dimensions: as quantize_qkv makes it")


def _lies_well(t: torch.Tensor, per_block: bool) -> bool:
    """Whether descales lie as the kernels read them."""
    if per_block or t.numel() == 0:
        return t.is_contiguous()
    one_per_head = t.shape[-1] == 1 or t.stride(-1) == 0
    return one_per_head and t[..., 0].is_contiguous()


def check_descale(name: str, x, batch: int, kv_heads: int, device: torch.device) -> None:
    """Raise unless x is None or FlashAttention-3's descale: float32 (batch, kv_heads) on this device."""
    if x is None:
        return
    if not isinstance(x, torch.Tensor):
        refuse(TypeError, name, type(x).__name__, "a torch.Tensor of dtype float32, or None")
    if x.dtype != torch.float32:
        refuse(TypeError, name, f"of dtype {x.dtype}", "torch.float32")
    if tuple(x.shape) != (batch, kv_heads):
        refuse(ValueError, name, f"of shape {tuple(x.shape)}", f"(batch, kv_heads), {(batch, kv_heads)}")
    if x.device != device:
        refuse(ValueError, name, f"on {x.device}", f"the device of q, {device}")


def check_descale_numbers(name: str, x: torch.Tensor | None) -> None:
    """Raise unless every factor is finite and above 0. On a GPU this waits for the device."""
    if x is None:
        return
    wrong = x[~((x > 0) & x.isfinite())]
    if wrong.numel():
        refuse(ValueError, name, f"{wrong[0].item()} for some head", "finite factors above 0")
