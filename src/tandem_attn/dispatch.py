"""Who answers a question, and why the others cannot. Kernels, and so Triton, load only for CUDA tensors.

A backend is a module with NAME, reasons(spec), describe(spec), forward(spec) and backward(spec): see
`reference.py` for the smallest. `backward` may be None or return None, and gradients then come from the
reference.
"""

from __future__ import annotations

import dataclasses
import math
import os

from tandem_attn import reference, torch_fused
from tandem_attn.spec import AttentionSpec

CHOICES = ("gluon", "torch", "reference")  # in order of preference


class _Nothing:
    """Answers without a kernel where no query sees any key: out 0, lse -inf, gradients 0."""

    NAME = "empty"

    @staticmethod
    def describe(spec: AttentionSpec) -> str:
        return "no query sees any key: zeros and -inf without a kernel"

    @staticmethod
    def forward(spec: AttentionSpec):
        def plan(q, *_):
            return q.new_zeros(spec.out_shape), q.new_full(spec.lse_shape, -math.inf, dtype=spec.lse_dtype)

        return plan

    @staticmethod
    def backward(spec: AttentionSpec):
        def plan(dout, dlse, q, k, v, *_):
            return tuple(x.new_zeros(x.shape) for x in (q, k, v))

        return plan


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which backend answers a question, how, and what every other one said."""

    spec: AttentionSpec
    backend: str
    config: str
    reasons: dict[str, list[str]]  # why not; an empty list: it could, but another comes first

    def __str__(self) -> str:
        spec = self.spec
        kind = "varlen" if spec.varlen else "dense"
        dtype = str(spec.dtype).removeprefix("torch.")
        question = (
            f"{kind} attention, {dtype} on {spec.device}: batch {spec.batch}, {spec.seqlen_q} queries x "
            f"{spec.seqlen_k} keys, {spec.num_heads} heads over {spec.num_kv_heads}, "
            f"head_dim {spec.head_dim}/{spec.head_dim_v}, {spec.window}, softcap {spec.softcap:g}"
        )
        lines = [question, f"answered by {self.backend}: {self.config}"]
        for name, said in self.reasons.items():
            lines += [f"not by {name}: {reason}" for reason in said or ["it could, but another comes first"]]
        return "\n  ".join(lines)


def backend_for(spec: AttentionSpec, requested: str | None = None):
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


def candidate(name: str, spec: AttentionSpec) -> tuple[object, list[str]]:
    """A backend (None where it cannot even be imported) and its reasons against this question."""
    if name == "gluon":
        return _gluon(spec)
    backend = torch_fused if name == "torch" else reference
    return backend, backend.reasons(spec)


def explanation(spec: AttentionSpec, requested: str | None = None) -> Explanation:
    """What `backend_for` decides, with the reasons of all."""
    chosen = backend_for(spec, requested)
    reasons = {name: candidate(name, spec)[1] for name in CHOICES if name != chosen.NAME}
    return Explanation(spec, chosen.NAME, chosen.describe(spec), reasons)


def _gluon(spec: AttentionSpec):
    if spec.device.type != "cuda":
        return None, [f"tensors are on {spec.device}; the kernels need an NVIDIA Hopper GPU"]
    try:
        from tandem_attn.kernels import launch
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "triton":
            said = f"triton cannot be imported ({error}); it comes with CUDA builds of torch"
        else:
            said = f"the kernels cannot be imported ({error})"
        return None, [said]
    return launch, launch.reasons(spec)
