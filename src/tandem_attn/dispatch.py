"""Who answers a question, and why the others cannot. Kernels, and so Triton, load only for CUDA tensors.

A backend is a module with NAME, reasons(spec), describe(spec), forward(spec) and backward(spec): see
`reference.py` for the smallest. `backward` may be None or return None, and gradients then come from the
reference. Over a KV cache it has decode_reasons, decode_describe and decode(spec), and append_reasons,
append_describe and append(spec): see `reference_decode.py`. FP8 is three more questions, each with such
functions in modules of its own: `quantize` and `transpose` make FP8 tensors, `fp8` attends over them.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
from typing import NamedTuple

import torch

from tandem_attn import reference, reference_decode, reference_fp8, reference_quant, torch_fused
from tandem_attn.spec import AttentionSpec
from tandem_attn.spec_decode import AppendSpec, DecodeSpec
from tandem_attn.spec_fp8 import Fp8Spec
from tandem_attn.spec_quant import QuantizeSpec, TransposeSpec, empty_tensors

CHOICES = ("gluon", "torch", "reference")  # in order of preference
Spec = AttentionSpec | DecodeSpec | AppendSpec | QuantizeSpec | TransposeSpec | Fp8Spec


class _Kind(NamedTuple):
    """Where the answers to a kind of question are."""

    prefix: str  # what a backend's functions about it begin with
    kernels: str  # module in tandem_attn.kernels
    reference: object
    torch: object = None


_KINDS = {
    AttentionSpec: _Kind("", "launch", reference, torch_fused),
    DecodeSpec: _Kind("decode_", "launch_decode", reference_decode),
    AppendSpec: _Kind("append_", "launch_decode", reference_decode),
    QuantizeSpec: _Kind("quantize_", "launch_quantize", reference_quant),
    TransposeSpec: _Kind("transpose_", "launch_quantize", reference_quant),
    Fp8Spec: _Kind("fp8_", "launch_fp8", reference_fp8),
}


class _Nothing:
    """Answers without a kernel where no query sees any key: out 0, lse -inf, gradients 0."""

    NAME = "empty"

    @staticmethod
    def describe(spec: AttentionSpec) -> str:
        return "no query sees any key: zeros and -inf without a kernel"

    @staticmethod
    def decode_describe(spec: DecodeSpec) -> str:
        return "no query: nothing to compute"

    @staticmethod
    def append_describe(spec: AppendSpec) -> str:
        return "no token: nothing to write"

    @staticmethod
    def forward(spec: AttentionSpec):
        def plan(q, *_):
            out = q.new_zeros(spec.out_shape, dtype=spec.dtype)
            return out, q.new_full(spec.lse_shape, -math.inf, dtype=spec.lse_dtype)

        return plan

    @staticmethod
    def backward(spec: AttentionSpec):
        def plan(dout, dlse, q, k, v, *_):
            return tuple(x.new_zeros(x.shape) for x in (q, k, v))

        return plan

    fp8_describe = describe

    @staticmethod
    def quantize_describe(spec: QuantizeSpec) -> str:
        return "no row: nothing to quantize"

    @staticmethod
    def transpose_describe(spec: TransposeSpec) -> str:
        return "no sequence or no head: nothing to lay out"

    @staticmethod
    def quantize(spec: QuantizeSpec):
        return lambda *_: empty_tensors(spec)

    @staticmethod
    def transpose(spec: TransposeSpec):
        return lambda v, *_: v.new_zeros(spec.v_t_shape)

    @staticmethod
    def fp8(spec: Fp8Spec):
        return _Nothing.forward(spec.attention)

    @staticmethod
    def decode(spec: DecodeSpec):
        def plan(q, cache, new, out, workspace, want_lse):
            # rows of q may lie in memory although no sequence has any: max_seqlen_q is 0
            out = q.new_zeros(spec.out_shape, dtype=spec.dtype) if out is None else out.zero_()
            lse = q.new_full(spec.lse_shape, -math.inf, dtype=spec.lse_dtype) if want_lse else None
            return out, lse

        plan.workspace_bytes = 0
        return plan

    @staticmethod
    def append(spec: AppendSpec):
        def plan(q, *_):
            return q.clone(memory_format=torch.contiguous_format) if spec.rotary_dim else q

        return plan


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which backend answers a question, how, and what every other one said."""

    spec: Spec
    backend: str
    config: str
    reasons: dict[str, list[str]]  # why not; an empty list: it could, but another comes first
    append: Explanation | None = None  # of what is done to the cache and to q before that

    def __str__(self) -> str:
        lines = [self.spec.question, f"answered by {self.backend}: {self.config}"]
        for name, said in self.reasons.items():
            lines += [f"not by {name}: {reason}" for reason in said or ["it could, but another comes first"]]
        text = "\n  ".join(lines)
        return text if self.append is None else f"{self.append}\n{text}"


def backend_for(spec: Spec, requested: str | None = None):
    """The backend that answers: `requested`, else TANDEM_BACKEND, else the first that can.

    An explicit choice never falls back: NotImplementedError with its reasons. ValueError for an unknown name.
    """
    requested = requested or os.environ.get("TANDEM_BACKEND") or None
    if requested is not None and requested not in CHOICES:
        raise ValueError(f"TANDEM_BACKEND is {requested!r}; supported: {', '.join(CHOICES)}")
    if spec.is_empty:
        return _Nothing
    refused = []
    for name in CHOICES if requested is None else (requested,):
        backend, said = candidate(name, spec)
        if not said:
            return backend
        refused += [f"{name}: {reason}" for reason in said]
    raise NotImplementedError("no backend can answer this:\n  " + "\n  ".join(refused))


def candidate(name: str, spec: Spec) -> tuple[object, list[str]]:
    """A backend (None where it cannot even be imported) and its reasons against this question."""
    kind = _KINDS[type(spec)]
    said = ["torch's fused kernels know no KV cache and no FP8"]
    if name == "gluon":
        backend, said = _gluon(spec)
    else:
        backend = kind.torch if name == "torch" else kind.reference
    return backend, said if backend is None else _about(backend, spec, "reasons")(spec)


def explanation(spec: Spec, requested: str | None = None, append: Explanation | None = None) -> Explanation:
    """What `backend_for` decides, with the reasons of all."""
    chosen = backend_for(spec, requested)
    reasons = {name: candidate(name, spec)[1] for name in CHOICES if name != chosen.NAME}
    return Explanation(spec, chosen.NAME, _about(chosen, spec, "describe")(spec), reasons, append)


def _about(backend, spec: Spec, what: str):
    """The backend's function `what` for questions of this kind."""
    return getattr(backend, _KINDS[type(spec)].prefix + what)


def _gluon(spec: Spec):
    """The module of the kernels that may answer, or None and why it cannot be had."""
    if spec.device.type != "cuda":
        return None, [f"tensors are on {spec.device}; the kernels need an NVIDIA Hopper GPU"]
    try:
        launch = importlib.import_module(f"tandem_attn.kernels.{_KINDS[type(spec)].kernels}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "triton":
            said = f"triton cannot be imported ({error}); it comes with CUDA builds of torch"
        else:
            said = f"the kernels cannot be imported ({error})"
        return None, [said]
    return launch, []
