"""The boundary to PyTorch in FP8: operators tandem_attn::quantize, ::transpose_v and ::fp8_forward.

As in `ops.py` a question's plan is found once, by a key of everything it may depend on, and eager calls take
a short cut around PyTorch's dispatcher. Gradients are straight through: those of attention over the 16-bit
tensors, by the 16-bit kernels, with the log-sum-exp and output that FP8 gave.
"""

from __future__ import annotations

import os

import torch

from tandem_attn import dispatch, log, ops
from tandem_attn.quant import BLOCK_K, BLOCK_Q, Fp8Recipe, Fp8Tensors, signs_for
from tandem_attn.spec import (
    E4M3,
    Lengths,
    Options,
    Window,
    check_contents,
    check_options,
    check_tensors,
    check_types,
    lse_dtype,
    refuse,
)
from tandem_attn.spec_fp8 import Fp8Spec, check_descale, check_descale_numbers, check_question, fp8_spec
from tandem_attn.spec_quant import (
    Quantized,
    RotaryTables,
    check_head_dims,
    check_recipe,
    empty_tensors,
    quantize_spec,
    transpose_spec,
)

_plans = ops.plan_table()  # key of a question: plan, or (plan, what else a call needs)
_NO_LENGTHS = (None,) * 4

_LENGTHS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, "
    "SymInt? max_seqlen_q, SymInt? max_seqlen_k"
)
_OPTIONS = (
    "float? softmax_scale, SymInt window_left, SymInt window_right, float softcap, SymInt sm_margin, "
    "bool deterministic"
)


def quantize(q, k, v, lengths: Lengths | None, recipe: Fp8Recipe, rotary: RotaryTables) -> Fp8Tensors:
    """FP8 tensors of 16-bit q, k and v; see `api_fp8`."""
    if _traced(q):
        check_types(q, k, v, lengths)
        check_recipe(recipe)
        flat = (*(lengths or (None,) * 6), *rotary, *_flat_recipe(recipe))
        found = _with_none(torch.ops.tandem_attn.quantize(q, k, v, *flat), recipe)
    else:
        found = _quantize(q, k, v, lengths, recipe, rotary)
    return Fp8Tensors(*found, recipe, q.dtype, lengths)


def attention(x: Fp8Tensors, options: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of attention over FP8 tensors. `options`: the fields of `Options`, not yet looked at."""
    if _traced(x.q):
        check_types(x.q, x.k, x.v_t, x.lengths)
        options = check_options(Options(*options))
        tensors = (x.q, x.k, x.v_t, x.q_descale, x.k_descale, x.v_descale, x.lse_shift, x.v_mean)
        flat = (*(x.lengths or (None,) * 6), *options)
        return torch.ops.tandem_attn.fp8_forward(*tensors, x.dtype, *flat)
    return _attend(x, options)


def straight_through(q, k, v, lengths: Lengths | None, recipe: Fp8Recipe, options: tuple):
    """(out, lse) of 16-bit tensors by FP8, with gradients."""
    return StraightThrough.apply(*ops.cast_for_autocast(q, k, v), lengths, recipe, options)


def attention_e4m3(q, k, v, descales: tuple, lengths: Lengths | None, options: tuple):
    """(out, lse) for FlashAttention-3's arguments: plain e4m3 v, descales (batch, kv_heads) or None."""
    return attention(_fp8_tensors(q, k, v, descales, lengths, transpose), options)


def spec_e4m3(q, k, v, descales: tuple, lengths: Lengths | None, options: Options) -> Fp8Spec:
    """The question of `attention_e4m3`, for explain()."""
    return fp8_spec(_fp8_tensors(q, k, v, descales, lengths, _transpose_fake), options)


def _fp8_tensors(q, k, v, descales: tuple, lengths: Lengths | None, transpose) -> Fp8Tensors:
    """FlashAttention-3's arguments as `Fp8Tensors`; `transpose` makes v_t."""
    check_types(q, k, v, lengths)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != E4M3:
            refuse(TypeError, name, f"of dtype {x.dtype}", f"{E4M3}, as one of q, k and v is")
        if x.requires_grad and torch.is_grad_enabled():
            supported = "no gradient: flash_attn_fp8_func takes 16-bit tensors and has gradients"
            refuse(NotImplementedError, name, "e4m3 and requires grad", supported)
    check_tensors(q, k, v, lengths, (E4M3,))
    recipe = Fp8Recipe(False, False, "head")
    check_head_dims(q, v, recipe)
    tensors = (None,) * 2 if lengths is None else (lengths.cu_seqlens_k, lengths.seqused_k)
    batch = q.shape[0] if lengths is None else lengths.cu_seqlens_q.shape[0] - 1
    for name, x in zip(("q_descale", "k_descale", "v_descale"), descales, strict=True):
        check_descale(name, x, batch, k.shape[-2], q.device)
        if not _traced(q) and _looks_at_numbers(q.device):
            check_descale_numbers(name, x)
    v_t = transpose(v, *tensors)
    per_head = _per_head(q, k, descales, batch, lengths)
    return Fp8Tensors(q, k, v_t, *per_head, None, None, None, recipe, torch.bfloat16, lengths)


def transpose(v, cu_seqlens_k=None, seqused_k=None) -> torch.Tensor:
    """V with keys last, as the kernels read it."""
    if _traced(v):
        return torch.ops.tandem_attn.transpose_v(v, cu_seqlens_k, seqused_k)
    return _transpose(v, cu_seqlens_k, seqused_k)


def _per_head(q, k, descales: tuple, batch: int, lengths: Lengths | None) -> tuple[torch.Tensor, ...]:
    """FlashAttention-3's descales in the shapes of `Fp8Tensors`."""
    heads, kv_heads = q.shape[-2], k.shape[-2]
    found = []
    for x, n, rows, block in (
        (descales[0], heads, q.shape[-3], BLOCK_Q),
        (descales[1], kv_heads, k.shape[-3], BLOCK_K),
        (descales[2], kv_heads, k.shape[-3], BLOCK_K),
    ):
        if x is None:
            x = q.new_ones(1, dtype=torch.float32).expand(batch, n).contiguous()
        elif n != kv_heads:
            x = x.repeat_interleave(heads // kv_heads, 1)
        x = x.contiguous()[..., None]
        found.append(x if lengths is not None else x.expand(batch, n, -(-rows // block)))
    return tuple(found)


# Plans


def _traced(x) -> bool:
    """Whether a call is looked at by torch.compile, or meant for fakes: it goes through the operators."""
    return torch.compiler.is_compiling() or not ops.no_mode() or getattr(x, "is_meta", False)


def _facts(tensors) -> list | None:
    """What a plan may depend on, of tensors and of those that are not given."""
    try:
        return [
            None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15)
            for x in tensors
        ]
    except (AttributeError, RuntimeError):
        return None  # not a dense tensor: validation will say so


def _numbers(values) -> tuple:
    """And of other arguments. Types too: True equals 1, but is not accepted where that is."""
    return (*values, *map(type, values))


def _found(facts: list | None, more: tuple, make):
    """The plan of a question; `make` finds it the first time."""
    key = None if facts is None else (*facts, *more)
    try:
        plan = _plans.get(key)
    except TypeError:  # an argument without a hash: validation will say what is wrong with it
        key = plan = None
    if plan is None:
        plan = make()
        ops.remember(_plans, key, plan)
    return plan


def _plan_of(spec, prefix: str):
    """A plan for a question, said in the log."""
    plan = getattr(dispatch.backend_for(spec), prefix)(spec)
    if log.enabled():
        log.once(str(dispatch.explanation(spec)))
    return plan


def _quantize(q, k, v, lengths: Lengths | None, recipe: Fp8Recipe, rotary: RotaryTables) -> Quantized:
    tensors = _NO_LENGTHS if lengths is None else lengths[:4]
    facts = _facts((q, k, v, rotary.cos, rotary.sin, *tensors))
    interleaved = None if rotary.cos is None else rotary.interleaved
    more = ("quantize", recipe, *_numbers((interleaved, *(lengths or ())[4:])))

    def make():
        spec = quantize_spec(q, k, v, lengths, recipe, rotary)
        signs = signs_for(recipe, q.shape[-1], q.device) if recipe.rotate else None
        return _plan_of(spec, "quantize"), signs, _looks(lengths, q.device)

    plan, signs, looks = _found(facts, more, make)
    if looks:
        check_contents(lengths, q.shape[0], k.shape[0])
    found = plan(q, k, v, signs, rotary.cos, rotary.sin, *tensors)
    return found if recipe.granularity == "block" else _one_per_head(found)


def _transpose(v, cu_seqlens_k, seqused_k) -> torch.Tensor:
    def make():
        return _plan_of(transpose_spec(v, cu_seqlens_k, seqused_k), "transpose")

    plan = _found(_facts((v, cu_seqlens_k, seqused_k)), ("transpose",), make)
    return plan(v, cu_seqlens_k, seqused_k)


def _attend(x: Fp8Tensors, options: tuple):
    tensors = _NO_LENGTHS if x.lengths is None else x.lengths[:4]
    factors = (x.q_descale, x.k_descale, x.v_descale, x.lse_shift, x.v_mean)
    facts = _facts((x.q, x.k, x.v_t, *factors, *tensors))
    more = ("attend", x.dtype, *_numbers((*options, *(x.lengths or ())[4:])))

    def make():
        return _plan_of(fp8_spec(x, Options(*options)), "fp8"), _looks(x.lengths, x.q.device)

    plan, looks = _found(facts, more, make)
    if looks:
        check_contents(x.lengths, x.q.shape[0], x.k.shape[0])
    return plan(x.q, x.k, x.v_t, *tensors, factors)


def _looks(lengths: Lengths | None, device: torch.device) -> bool:
    """Whether the numbers in length tensors are looked at on each call."""
    return lengths is not None and _looks_at_numbers(device)


def _looks_at_numbers(device: torch.device) -> bool:
    """Not on a GPU unless asked to: it would wait for the device."""
    return device.type == "cpu" or os.environ.get("TANDEM_VALIDATE") == "1"


def _one_per_head(found: Quantized) -> Quantized:
    """With descales of granularities "head" and "tensor" as the kernels of attention read them: a number for
    each head of a sequence, also where all are the same."""
    names = ("q_descale", "k_descale", "v_descale")
    descales = ((name, getattr(found, name)) for name in names)
    return found._replace(**{name: x[..., :1].contiguous().expand(x.shape) for name, x in descales})


# Gradients


class StraightThrough(torch.autograd.Function):
    """(out, lse) of 16-bit q, k, v by FP8; gradients as if nothing had been rounded."""

    @staticmethod
    def forward(ctx, q, k, v, lengths, recipe, options):
        x = quantize(q, k, v, lengths, recipe, RotaryTables())
        out, lse = attention(x, options)
        ctx.set_materialize_grads(False)
        tensors = _NO_LENGTHS if lengths is None else lengths[:4]
        ctx.save_for_backward(out, lse, q, k, v, *tensors)
        ctx.numbers = ((None, None) if lengths is None else lengths[4:], options)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        out, lse, *question = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 6
        dout = torch.zeros_like(out) if dout is None else dout
        longest, options = ctx.numbers
        grads = torch.ops.tandem_attn.backward(dout, dlse, out, lse, *question, *longest, *options)
        return (*grads, None, None, None)


# The operators. An optional tensor that is not there is an empty one where a schema has no better.


def _flat_recipe(recipe: Fp8Recipe) -> tuple:
    signs = recipe.signs
    drawn = not isinstance(signs, tuple)
    return (
        recipe.rotate,
        recipe.smooth_k,
        recipe.smooth_v,
        recipe.granularity,
        [] if drawn else list(signs),
        signs if drawn else 0,
    )


def _given(lengths: tuple) -> Lengths | None:
    return None if lengths[0] is None else Lengths(*lengths)


def _unflat(flat: tuple) -> tuple[Lengths | None, RotaryTables, Fp8Recipe]:
    rotate, smooth_k, smooth_v, granularity, signs, seed = flat[9:]
    recipe = Fp8Recipe(rotate, smooth_k, granularity, tuple(signs) or seed, smooth_v)
    return _given(flat[:6]), RotaryTables(*flat[6:9]), recipe


def _without_none(found: Quantized) -> tuple[torch.Tensor, ...]:
    nothing = found.q_descale.new_empty(0)
    return tuple(nothing.clone() if x is None else x for x in found)


def _with_none(found, recipe: Fp8Recipe) -> Quantized:
    shift, k_mean, v_mean = found[6:]
    of_k = (shift, k_mean) if recipe.smooth_k else (None, None)
    return Quantized(*found[:6], *of_k, v_mean if recipe.smooth_v else None)


def _quantize_impl(q, k, v, *flat):
    return _without_none(_quantize(q, k, v, *_swapped(flat)))


def _swapped(flat: tuple) -> tuple:
    lengths, rotary, recipe = _unflat(flat)
    return lengths, recipe, rotary


def _quantize_fake(q, k, v, *flat):
    lengths, recipe, rotary = _swapped(flat)
    found = empty_tensors(quantize_spec(q, k, v, lengths, recipe, rotary))
    return _without_none(found if recipe.granularity == "block" else _one_per_head(found))


def _transpose_fake(v, cu_seqlens_k, seqused_k):
    return v.new_empty(transpose_spec(v, cu_seqlens_k, seqused_k).v_t_shape)


def _tensors(q, k, v_t, q_descale, k_descale, v_descale, lse_shift, v_mean, dtype, *flat) -> tuple:
    held = (q, k, v_t, q_descale, k_descale, v_descale, lse_shift, None, v_mean)
    return Fp8Tensors(*held, Fp8Recipe(), dtype, _given(flat[:6])), flat[6:]


def _forward_impl(*flat):
    return _attend(*_tensors(*flat))


def _forward_fake(*flat):
    x, options = _tensors(*flat)
    options = check_question(x, Options(*options))
    Window(options.window_left, options.window_right)
    out = x.q.new_empty((*x.q.shape[:-1], x.v_t.shape[-2]), dtype=x.dtype)
    rows = x.q.shape[-3]
    shape = (x.q.shape[-2], rows) if x.lengths is not None else (x.q.shape[0], x.q.shape[-2], rows)
    return out, x.q.new_empty(shape, dtype=lse_dtype(x.dtype))


def _register() -> torch.library.Library:
    library = torch.library.Library("tandem_attn", "FRAGMENT")
    tags = (torch.Tag.pt2_compliant_tag,)
    library.define(
        f"quantize(Tensor q, Tensor k, Tensor v, {_LENGTHS}, Tensor? cos, Tensor? sin, bool interleaved, "
        "bool rotate, bool smooth_k, bool smooth_v, str granularity, int[] signs, int seed) -> "
        "(Tensor q, Tensor k, Tensor v_t, Tensor q_descale, Tensor k_descale, Tensor v_descale, "
        "Tensor lse_shift, Tensor k_mean, Tensor v_mean)",
        tags=tags,
    )
    library.define("transpose_v(Tensor v, Tensor? cu_seqlens_k, Tensor? seqused_k) -> Tensor", tags=tags)
    library.define(
        "fp8_forward(Tensor q, Tensor k, Tensor v_t, Tensor q_descale, Tensor k_descale, Tensor v_descale, "
        f"Tensor? lse_shift, Tensor? v_mean, ScalarType dtype, {_LENGTHS}, {_OPTIONS}) -> "
        "(Tensor out, Tensor lse)",
        tags=tags,
    )
    for name, impl, fake in (
        ("quantize", _quantize_impl, _quantize_fake),
        ("transpose_v", _transpose, _transpose_fake),
        ("fp8_forward", _forward_impl, _forward_fake),
    ):
        library.impl(name, impl, "CompositeExplicitAutograd")
        torch.library.register_fake(f"tandem_attn::{name}", fake, lib=library)
    return library


_library = _register()  # the registrations live as long as this
