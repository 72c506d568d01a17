"""Who is timed: tandem_attn and its peers, each behind the same two questions.

A provider says why it is absent from this machine, and turns a case into a `Call` or raises with the reason.
Nothing here is imported before it is asked for; a peer that fails is reported, never fatal.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable

import torch

import tandem_attn
from tandem_attn.bench import UserError, cudnn_frontend
from tandem_attn.testing import Case, Inputs


@dataclasses.dataclass(frozen=True)
class Call:
    """One way of answering a case, ready to run any number of times."""

    run: Callable[[], object]  # what is timed
    # the same, as (out, lse or None) in our layout; of a benchmark of gradients (dq, dk, dv)
    answer: Callable[[], tuple[torch.Tensor | None, ...]]
    label: str = ""  # what really runs, where the provider's name does not say
    same_question: bool = True  # False: timed for comparison, but what it computes is something else


@dataclasses.dataclass(frozen=True)
class Provider:
    """A library, or one backend of torch."""

    name: str
    absent: Callable[[torch.device], str]  # why it is not on this machine; empty if it is
    serves: Callable[[Case], bool]  # whether it has anything to do with such cases
    prepare: Callable[[Case, Inputs], Call]


def select(
    names: list[str] | None, device: torch.device, among: list[Provider] | None = None
) -> tuple[list[Provider], dict[str, str]]:
    """The providers to run, and why each other one asked for is absent."""
    among = PROVIDERS if among is None else among
    known = {provider.name: provider for provider in among}
    for name in names or ():
        if name not in known:
            raise UserError(f"--providers names {name!r}; supported: {', '.join(known)}")
    chosen = [known[name] for name in dict.fromkeys(names)] if names else among
    reasons = {provider.name: provider.absent(device) for provider in chosen}
    present = [provider for provider in chosen if not reasons[provider.name]]
    if not present:
        raise UserError("none of these is here: " + "; ".join(f"{k}: {v}" for k, v in reasons.items()))
    return present, {name: reason for name, reason in reasons.items() if reason}


def reason_of(error: BaseException) -> str:
    """One line from an exception."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]


def everywhere(device: torch.device) -> str:
    """Absent from nowhere."""
    return ""


def on_cuda_only(device: torch.device) -> str:
    """Why a provider that needs CUDA is absent."""
    return "" if device.type == "cuda" else "needs a CUDA device"


def _any_case(case: Case) -> bool:
    return True


# Ourselves


def tandem(case: Case, inputs: Inputs, **more) -> Call:
    """The public functions; `more` are further arguments."""
    name = "flash_attn_varlen_func" if case.varlen else "flash_attn_func"
    function = functools.partial(getattr(tandem_attn, name), inputs.q, inputs.k, inputs.v)
    function = functools.partial(function, **inputs.kwargs, **more)
    return Call(function, functools.partial(function, return_attn_probs=True))


# torch


def _sdpa(backend: str | None, case: Case, inputs: Inputs) -> Call:
    """scaled_dot_product_attention on (batch, heads, seqlen, head_dim) views of the same memory."""
    if case.varlen:
        raise NotImplementedError("scaled_dot_product_attention takes no packed sequences")
    if case.causal and case.seqlen_q != case.seqlen_k:
        raise NotImplementedError("its causal mask is aligned top-left")
    if case.softcap:
        raise NotImplementedError("scaled_dot_product_attention has no softcap")
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    more = {"enable_gqa": True} if case.heads != case.kv_heads else {}
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=case.causal, **more
    )
    run = attend if backend is None else functools.partial(_with_backend, backend, attend)
    attempt(run)
    windowed = case.window != (-1, -1)
    label = "causal, no window" if windowed else ""
    return Call(run, lambda: (run().transpose(1, 2), None), label, same_question=not windowed)


def _with_backend(backend: str, attend: Callable[[], torch.Tensor]) -> torch.Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        return attend()


def attempt(run: Callable[[], object]) -> None:
    """Run once; where torch refuses, its warnings hold the reasons and its error does not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run()
        except RuntimeError as error:
            said = dict.fromkeys(str(w.message).partition(" (Triggered")[0] for w in caught)
            raise NotImplementedError("; ".join([str(error), *said])) from error


def _sdpa_cudnn(case: Case, inputs: Inputs) -> Call:
    return _cudnn_packed(case, inputs) if case.varlen else _sdpa("CUDNN_ATTENTION", case, inputs)


def _cudnn_packed(case: Case, inputs: Inputs) -> Call:
    """The operator behind nested tensors in SDPA: those cost Python time and an experimental flag."""
    run = functools.partial(
        torch.ops.aten._cudnn_attention_forward,
        inputs.q,
        inputs.k,
        inputs.v,
        None,
        inputs.kwargs["cu_seqlens_q"],
        inputs.kwargs["cu_seqlens_k"],
        inputs.kwargs["max_seqlen_q"],
        inputs.kwargs["max_seqlen_k"],
        inputs.q.requires_grad,  # log-sum-exp, as in SDPA only for gradients
        0.0,
        case.causal,
        False,
        scale=inputs.scale,
    )
    attempt(run)
    return Call(run, lambda: (run()[0], None), "aten::_cudnn_attention_forward, packed")


def _sdpa_flash(case: Case, inputs: Inputs) -> Call:
    if case.window == (-1, -1):
        return _sdpa("FLASH_ATTENTION", case, inputs)
    left, right = (None if side < 0 else side for side in case.bounds)
    run = functools.partial(
        torch.ops.aten._flash_attention_forward,
        *(inputs.q, inputs.k, inputs.v, None, None, case.seqlen_q, case.seqlen_k, 0.0, False, False),
        scale=inputs.scale,
        window_size_left=left,
        window_size_right=right,
    )
    return Call(run, lambda: run()[:2], "fa2 window, aten::_flash_attention_forward")


def _torch_varlen(case: Case, inputs: Inputs) -> Call:
    from torch.nn.attention.varlen import varlen_attn

    given = inputs.kwargs
    arguments = [inputs.q, inputs.k, inputs.v, given["cu_seqlens_q"], given["cu_seqlens_k"]]
    arguments += [given["max_seqlen_q"], given["max_seqlen_k"]]
    if "window_size" in inspect.signature(varlen_attn).parameters:
        more = {"window_size": case.bounds}
    else:  # torch 2.10
        more = {"is_causal": case.causal}
    run = functools.partial(varlen_attn, *arguments, **more)
    return Call(run, lambda: (run(), None))


# cuDNN's own frontend


def cudnn_provider(how: Callable) -> Provider:
    """`how`: cudnn_frontend.forward, backward or train."""

    def prepare(case: Case, inputs: Inputs) -> Call:
        run = how(case, inputs)
        return Call(run, run, cudnn_frontend.label())

    absent = functools.partial(cuda_module_absent, "cudnn")
    return Provider(cudnn_frontend.NAME, absent, cudnn_frontend.serves, prepare)


# FlashAttention


def _flash(module: str, unlimited: int | None, case: Case, inputs: Inputs) -> Call:
    """FlashAttention 3 and 4 share names; 4 writes None for an unlimited side of a window."""
    library = importlib.import_module(module)
    window = tuple(unlimited if side < 0 else side for side in case.window)
    kwargs = {name: x for name, x in inputs.kwargs.items() if name not in ("softcap", "window_size")}
    kwargs |= {"window_size": window, "softmax_scale": inputs.scale}
    if case.softcap:
        kwargs["softcap"] = case.softcap
    function = library.flash_attn_varlen_func if case.varlen else library.flash_attn_func
    accepted = inspect.signature(function).parameters  # some versions of 4 take no max_seqlen
    kwargs = {name: x for name, x in kwargs.items() if name in accepted or not name.startswith("max_")}
    run = functools.partial(function, inputs.q, inputs.k, inputs.v, **kwargs)

    def answer():
        out = run()
        return (out[0] if isinstance(out, tuple) else out), None

    return Call(run, answer)


def flash_absent(module: str, device: torch.device, name: str = "flash_attn_func") -> str:
    """Why a library with FlashAttention's functions is absent, `name` being the one that is timed."""
    reason = cuda_module_absent(module, device)
    if reason:
        return reason
    function = getattr(importlib.import_module(module), name, None)
    if function is None:
        return f"{module} has no {name}"
    if (getattr(function, "__module__", None) or "").partition(".")[0] == "tandem_attn":
        return f"{module} is tandem_attn under that name"
    return ""


def cuda_module_absent(module: str, device: torch.device) -> str:
    """Why a module whose functions need CUDA is absent."""
    return on_cuda_only(device) or not_importable(module)


def not_importable(module: str) -> str:
    """Why a module cannot be had."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken install raises anything
        return f"cannot import {module} ({reason_of(error)})"
    return ""


def _flash_provider(name: str, module: str, unlimited: int | None) -> Provider:
    absent = functools.partial(flash_absent, module)
    return Provider(name, absent, _any_case, functools.partial(_flash, module, unlimited))


OURS = "tandem"
OURS_DETERMINISTIC = "tandem-attn deterministic"  # in benchmarks of gradients
PROVIDERS = [
    Provider(OURS, everywhere, _any_case, tandem),
    Provider("sdpa-cudnn", on_cuda_only, _any_case, _sdpa_cudnn),
    Provider("sdpa-flash", on_cuda_only, lambda case: not case.varlen, _sdpa_flash),
    Provider(
        "sdpa",
        lambda device: "" if device.type == "cpu" else "its backends are timed by name",
        _any_case,
        functools.partial(_sdpa, None),
    ),
    Provider(
        "torch-varlen",
        functools.partial(cuda_module_absent, "torch.nn.attention.varlen"),
        lambda case: case.varlen,
        _torch_varlen,
    ),
    cudnn_provider(cudnn_frontend.forward),
    _flash_provider("fa3", "flash_attn_interface", -1),
    _flash_provider("fa4", "flash_attn.cute", None),
]
