"""The boundary to PyTorch: operators tandem_attn::forward and ::backward, and a short cut to the same code.

An eager call that needs no gradient builds one key, finds its plan and runs it: Python's dispatcher would
cost more than the launch. Everything else (autograd, torch.compile, export, functorch, tensor subclasses)
goes through the operators. What answers is decided once per question by `dispatch`; Triton is never imported
from here.
"""

from __future__ import annotations

import os

import torch
from torch.autograd import forward_ad

from tandem_attn import dispatch, log, reference
from tandem_attn.spec import (
    Lengths,
    Options,
    Window,
    attention_spec,
    check_contents,
    check_options,
    check_tensors,
    check_types,
    lse_dtype,
)

MAX_PLANS = 4096  # distinct questions remembered; the oldest goes first

_QUESTION = (
    "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? seqused_q, Tensor? seqused_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "float? softmax_scale, SymInt window_left, SymInt window_right, float softcap, SymInt sm_margin, "
    "bool deterministic"
)
_NUM_TENSORS, _NUM_LENGTHS = 3, len(Lengths._fields)

_tables: list[dict] = []  # all that is remembered, also for `ops_decode`


def plan_table() -> dict:
    """A dictionary of decisions that `clear_plans` forgets."""
    _tables.append({})
    return _tables[-1]


_forward_plans = plan_table()  # key of a question: (plan, whether to look into the lengths at each call)
_backward_plans = plan_table()  # key of a question and torch's deterministic mode: plan


def attention(q, k, v, lengths: Lengths | None, options: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of scaled dot-product attention; see `api` for the meaning of everything.

    `options`: the fields of `Options`, not yet looked at (a NamedTuple takes ten times as long to make).
    """
    q, k, v = cast_for_autocast(q, k, v)
    if not torch.compiler.is_compiling():
        if _is_plain(q, k, v):
            return _forward(q, k, v, lengths, options)
        refuse_tangents(q=q, k=k, v=v)
    check_types(q, k, v, lengths)
    options = check_options(options)
    return torch.ops.tandem_attn.forward(q, k, v, *(lengths or (None,) * _NUM_LENGTHS), *options)


def clear_plans() -> None:
    """Forget every decision. TANDEM_BACKEND, _VALIDATE and _LOG are read when a question is new."""
    for table in _tables:
        table.clear()


def cast_for_autocast(q, k, v) -> tuple:
    """As scaled_dot_product_attention under autocast: inputs in its dtype, float64 left alone."""
    tensors = (q, k, v)
    if not torch._C._is_any_autocast_enabled():
        return tensors
    if not all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in tensors):
        return tensors  # validation will say so
    if not torch.is_autocast_enabled(q.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(q.device.type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


PLAIN = {torch.Tensor, torch.nn.Parameter}


def _is_plain(q, k, v) -> bool:
    """Whether only numbers in memory are involved: no gradient, no mode, no subclass."""
    return (
        type(q) in PLAIN
        and type(k) in PLAIN
        and type(v) in PLAIN
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        and no_mode()
        and not q.is_meta
    )


def no_mode() -> bool:
    """Whether nothing stands between a call and its tensors: fakes, functorch, forward-mode derivatives."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def refuse_tangents(**tensors) -> None:
    """Forward-mode derivatives would be dropped without a word."""
    if forward_ad._current_level < 0:
        return
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{name} is a forward-mode dual; supported: reverse-mode gradients")


def _forward(q, k, v, lengths: Lengths | None, options: tuple):
    """The whole eager path: find the plan of this question and run it."""
    key = _key(q, k, v, lengths, options)
    try:
        found = _forward_plans.get(key)
    except TypeError:  # an option without a hash: validation will say what is wrong with it
        found = None
    if found is None:
        found = _new_plan(key, q, k, v, lengths, options)
    plan, looks_at_lengths = found
    if lengths is None:
        return plan(q, k, v, None, None, None, None)
    if looks_at_lengths:
        check_contents(lengths, q.shape[0], k.shape[0])
    return plan(q, k, v, lengths[0], lengths[1], lengths[2], lengths[3])


def _key(q, k, v, lengths: Lengths | None, options: tuple) -> tuple | None:
    """Everything a plan may depend on. Types too: True and 1.0 equal 1, but are not accepted where it is."""
    scale, _, _, softcap, sm_margin, deterministic = options
    try:
        return (
            (q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride()),
            (q.dtype, k.dtype, v.dtype, q.device, k.device, v.device),
            (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15 == 0,
            options,
            (type(scale), type(softcap), type(sm_margin), type(deterministic)),
            None if lengths is None else _lengths_key(lengths),
        )
    except (AttributeError, RuntimeError):
        return None  # not a dense tensor: validation will say so


def _lengths_key(lengths: Lengths) -> tuple:
    *tensors, max_q, max_k = lengths
    facts = [None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors]
    return (*facts, max_q, max_k, type(max_q), type(max_k))


def _new_plan(key: tuple | None, q, k, v, lengths: Lengths | None, options: tuple) -> tuple:
    """Validate, decide, log, remember."""
    spec = attention_spec(q, k, v, lengths, Options(*options))
    looks_at_lengths = spec.varlen and (spec.device.type == "cpu" or os.environ.get("TANDEM_VALIDATE") == "1")
    plan = dispatch.backend_for(spec).forward(spec)
    if log.enabled():
        log.once(str(dispatch.explanation(spec)))
    remember(_forward_plans, key, (plan, looks_at_lengths))
    return plan, looks_at_lengths


def _backward_plan(q, k, v, lengths: Lengths | None, options: Options):
    """The plan of gradients, deterministic also if torch is told to be by the time they are computed.

    The mode is part of the key as a whole (0: off, 1: warn, 2: error): what a backend decides by it holds for
    every call that finds its plan.
    """
    mode = torch.get_deterministic_debug_mode()
    key = _key(q, k, v, lengths, options)
    key = None if key is None else (key, mode)
    plan = _backward_plans.get(key)
    if plan is None:
        options = options._replace(deterministic=options.deterministic or mode != 0)
        spec = attention_spec(q, k, v, lengths, options)
        make = dispatch.backend_for(spec).backward
        plan = (make and make(spec)) or reference.backward(spec)
        remember(_backward_plans, key, plan)
    return plan


def remember(plans: dict, key, value) -> None:
    """Keep a decision, if its question has a key."""
    if key is None:
        return
    if len(plans) >= MAX_PLANS:
        plans.pop(next(iter(plans)), None)
    plans[key] = value


# The operators. Their flat arguments are those of _QUESTION.


def _split(flat: tuple) -> tuple[Lengths | None, Options]:
    lengths = None if flat[0] is None else Lengths(*flat[:_NUM_LENGTHS])
    return lengths, Options(*flat[_NUM_LENGTHS:])


def _forward_impl(q, k, v, *flat):
    return _forward(q, k, v, *_split(flat))


def _backward_impl(dout, dlse, out, lse, q, k, v, *flat):
    lengths, options = _split(flat)
    plan = _backward_plan(q, k, v, lengths, options)
    # dout may have any strides, 0 after out.sum(), and so may dlse and out: what plans have to live with
    return plan(dout, dlse, q, k, v, out, lse, *(lengths or (None,) * 4)[:4])


def _forward_fake(q, k, v, *flat):
    lengths, options = _split(flat)
    Window(options.window_left, options.window_right)
    check_tensors(q, k, v, lengths)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    shape = (q.shape[0], q.shape[2], q.shape[1]) if lengths is None else (q.shape[1], q.shape[0])
    return out, q.new_empty(shape, dtype=lse_dtype(q.dtype))


def _backward_fake(dout, dlse, out, lse, q, k, v, *flat):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # an lse that nobody used costs nothing
    tensors = _NUM_TENSORS + 4
    ctx.save_for_backward(*output, *inputs[:tensors])
    ctx.numbers = inputs[tensors:]


def _autograd_forward(ctx, dout, dlse):
    out, lse, *question = ctx.saved_tensors
    grads = (None, None, None)
    if dout is not None or dlse is not None:
        dout = torch.zeros_like(out) if dout is None else dout
        grads = torch.ops.tandem_attn.backward(dout, dlse, out, lse, *question, *ctx.numbers)
    return (*grads, *(None,) * (4 + len(ctx.numbers)))


def _autograd_backward(ctx, *_):
    raise RuntimeError("double backward: the gradient of tandem_attn::backward is not implemented")


def _register() -> torch.library.Library:
    library = torch.library.Library("tandem_attn", "DEF")
    tags = (torch.Tag.pt2_compliant_tag,)
    library.define(f"forward({_QUESTION}) -> (Tensor out, Tensor lse)", tags=tags)
    answer = "Tensor dout, Tensor? dlse, Tensor out, Tensor lse, "
    library.define(f"backward({answer}{_QUESTION}) -> (Tensor dq, Tensor dk, Tensor dv)", tags=tags)
    for name, impl, fake in (
        ("forward", _forward_impl, _forward_fake),
        ("backward", _backward_impl, _backward_fake),
    ):
        library.impl(name, impl, "CompositeExplicitAutograd")
        torch.library.register_fake(f"tandem_attn::{name}", fake, lib=library)
    torch.library.register_autograd(
        "tandem_attn::forward", _autograd_forward, setup_context=_setup_context, lib=library
    )
    torch.library.register_autograd("tandem_attn::backward", _autograd_backward, lib=library)
    return library


_library = _register()  # the registrations live as long as this
