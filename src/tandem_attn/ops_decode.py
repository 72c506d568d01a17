"""The boundary to PyTorch over a KV cache: operators tandem_attn::append_kv and ::decode, and the short cut.

As in `ops.py`, an eager call builds one key, finds its plans and runs them. The key holds no length that
changes from step to step: neither what is in cache_seqlens nor the number, where it is one. Under
torch.compile and with fakes the same plans run behind the operators. There are no gradients.
"""

from __future__ import annotations

import os

import torch

from tandem_attn import check_decode, dispatch, log, ops
from tandem_attn.spec import E4M3, lse_dtype
from tandem_attn.spec_decode import (
    AppendSpec,
    Cache,
    DecodeOptions,
    DecodeSpec,
    Given,
    New,
    Rotary,
    append_spec,
    decode_spec,
    out_dtype,
    per_block,
)

# the flat arguments of both operators, after their tensors of elements: fields of Cache and New, and one more
_PLACE = (
    "Tensor? cache_seqlens, SymInt cache_seqlen, Tensor? cache_batch_idx, Tensor? cache_leftpad, "
    "Tensor? page_table, Tensor? k_descale, Tensor? v_descale, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k_new, SymInt seqlen_new, Tensor? q_descale, SymInt? max_seqlen_q"
)
_OPTIONS = (
    "float? softmax_scale, SymInt window_left, SymInt window_right, float softcap, SymInt sm_margin, "
    "SymInt num_splits, SymInt? split_size, bool rotary_interleaved"
)
_NUM_PLACE = 12

_plans = ops.plan_table()  # key of a call: its `_Plans`
_decode_plans = ops.plan_table()  # the same for the operator that attends only


class _Plans:
    """What answers a call, found once."""

    __slots__ = ("append", "checks", "decode", "looks", "spec")

    def __init__(self, spec: DecodeSpec, first: AppendSpec | None):
        self.append = None if first is None else dispatch.backend_for(first).append(first)
        self.decode = dispatch.backend_for(spec).decode(spec)
        self.spec = spec
        self.checks = spec if first is None else first  # what numbers are checked against
        self.looks = _looks(spec)


def attend(given: tuple, options: tuple, want_lse: bool, memory: tuple):
    """(out, lse or None) of attention over a cache, written first if asked; see `api_decode`.

    given: the fields of `Given`, options: those of `DecodeOptions`, memory: (out, workspace,
    scheduler_metadata); nothing of it looked at yet.
    """
    given = _cast_for_autocast(given)
    if torch.compiler.is_compiling() or not _is_plain(given):
        return _through_operators(given, options, want_lse, memory)
    found = _find(given, options, memory)
    cache, new, rotary = _checked(found, given)
    q = given[0]
    if found.append is not None:
        q = found.append(q, given[3], given[4], cache, new, rotary)
    return found.decode(q, cache, new, memory[0], memory[1], want_lse)


def _find(given: tuple, options: tuple, memory: tuple) -> _Plans:
    """The plans of a call; nothing is written yet."""
    key = _key(given, options, memory)
    try:
        found = _plans.get(key)
    except TypeError:  # an option without a hash: validation will say what is wrong with it
        found = None
    return _new_plans(key, given, options, memory) if found is None else found


def _checked(found: _Plans, given: tuple) -> tuple[Cache, New, tuple]:
    """The arguments of plans, after a look at the numbers that change from call to call."""
    _, k_cache, v_cache, k, _, cos, sin, seqlens, *places, cu_q, cu_new, _, turns, of_q, of_k, of_v = given
    new = New(cu_q, cu_new, 0 if k is None or cu_new is not None else k.shape[1], of_q)
    length = 0
    if not isinstance(seqlens, torch.Tensor):
        length, seqlens = found.spec.capacity if seqlens is None else int(seqlens), None
        check_decode.check_length(found.checks, length, new.seqlen_new)
    cache, rotary = Cache(k_cache, v_cache, seqlens, length, *places, of_k, of_v), (cos, sin, turns)
    if found.looks:
        check_decode.check_contents(found.checks, cache, new, turns)
    return cache, new, rotary


def question(given: tuple, options: tuple) -> tuple[DecodeSpec, AppendSpec | None]:
    """The checked question of a call; looks at no numbers in tensors."""
    given = Given(*_cast_for_autocast(given))
    check_decode.check_types(given)
    options = check_decode.check_options(DecodeOptions(*options))
    cache, new, rotary = given.parts()
    _check_shapes(given.q, given.k, given.v, cache, new, rotary)
    rotated = rotary.cos is not None
    spec = decode_spec(given.q, cache, new, given.max_seqlen_q, options, rotated)
    first = append_spec(given, options) if given.k is not None or rotated else None
    if cache.seqlens is None:
        check_decode.check_length(first or spec, cache.seqlen, new.seqlen_new)
    return spec, first


def _check_shapes(q, k, v, cache: Cache, new: New, rotary: Rotary) -> None:
    check_decode.check_cache(q, cache, new)
    if k is not None:
        check_decode.check_new(q, k, v, cache, new)
    if rotary.cos is not None:
        check_decode.check_turns(q, k)
        check_decode.check_rotary(q, rotary, new)


def workspace_bytes(given: tuple, options: tuple) -> int:
    """The scratch memory that a call would use."""
    spec, _ = question(given, options)
    return dispatch.backend_for(spec).decode(spec).workspace_bytes


def refuse_gradients(given: Given) -> None:
    """Raise if a gradient would be dropped without a word."""
    named = {name: x for name, x in zip(Given._fields, given, strict=True) if isinstance(x, torch.Tensor)}
    if torch.is_grad_enabled():
        for name, x in named.items():
            if x.requires_grad:
                raise NotImplementedError(
                    f"{name} is a tensor that requires a gradient; supported: inference, under "
                    "torch.no_grad() or with detached tensors (flash_attn_func has gradients)"
                )
    if not torch.compiler.is_compiling():
        ops.refuse_tangents(**named)


def _cast_for_autocast(given: tuple) -> tuple:
    """Under autocast q and the new k and v come in the type of the cache, which is what it is; over an FP8
    cache in autocast's, but for those in e4m3."""
    if not torch._C._is_any_autocast_enabled():
        return given
    q, k_cache, v_cache, k, v, *rest = given
    tensors = [x for x in (q, k_cache, k, v) if x is not None]
    if not all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in tensors):
        return given  # validation will say so
    if not torch.is_autocast_enabled(q.device.type):
        return given
    dtype = k_cache.dtype
    if dtype == E4M3:
        dtype = torch.get_autocast_dtype(q.device.type)
    kept = (torch.float64, E4M3)
    q, k, v = (x if x is None or x.dtype in kept else x.to(dtype) for x in (q, k, v))
    return (q, k_cache, v_cache, k, v, *rest)


def _is_plain(given: tuple) -> bool:
    """Whether only numbers in memory are involved: no gradient, no mode, no subclass."""
    q, k_cache, v_cache, k, v, cos, sin = given[:7]
    plain, records = ops.PLAIN, torch.is_grad_enabled()
    return (
        type(q) in plain
        and type(k_cache) in plain
        and type(v_cache) in plain
        and (k is None or (type(k) in plain and type(v) in plain))
        and not (records and (q.requires_grad or k_cache.requires_grad or v_cache.requires_grad))
        and not (records and k is not None and (k.requires_grad or v.requires_grad))
        and (cos is None or (type(cos) in plain and type(sin) in plain))
        and not (records and cos is not None and (cos.requires_grad or sin.requires_grad))
        and all(x is None or (type(x) in plain and not (records and x.requires_grad)) for x in given[-3:])
        and ops.no_mode()
        and not q.is_meta
    )


def _key(given: tuple, options: tuple, memory: tuple) -> tuple | None:
    """Everything plans may depend on. Types too: True and 1.0 equal 1, but are not accepted where it is."""
    q, k_cache, v_cache, k, v, cos, sin, seqlens, batch_idx, leftpad, table, *rest = given
    cu_q, cu_new, max_q, turns, *descales = rest
    scale, _, _, softcap, sm_margin, splits, size, interleaved = options
    try:
        address = q.data_ptr() | k_cache.data_ptr() | v_cache.data_ptr()
        extra = None
        if k is not None or cos is not None:
            extra = (_facts(k), _facts(v), _facts(cos), _facts(sin), _facts(turns), _facts(cu_new))
        elif cu_new is not None or v is not None or sin is not None or turns is not None:
            return None  # half of a pair: validation will say so
        return (
            (q.shape, k_cache.shape, v_cache.shape, q.stride(), k_cache.stride(), v_cache.stride()),
            (q.dtype, k_cache.dtype, v_cache.dtype, q.device, k_cache.device, v_cache.device),
            address & 15 == 0 or (_aligned(q), _aligned(k_cache), _aligned(v_cache)),
            _facts(seqlens) if isinstance(seqlens, torch.Tensor) else type(seqlens),
            None if batch_idx is None else _facts(batch_idx),
            None if leftpad is None else _facts(leftpad),
            None if table is None else _facts(table),
            None if cu_q is None else (_facts(cu_q), max_q, type(max_q)),
            extra,
            None if descales == _NO_DESCALES else (*map(_facts, descales),),
            options,
            (type(scale), type(softcap), type(sm_margin), type(splits), type(size), type(interleaved)),
            _memory_key(*memory),
        )
    except (AttributeError, RuntimeError, TypeError):
        return None  # not a dense tensor: validation will say so


_NO_DESCALES = [None, None, None]


def _facts(x):
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)


def _aligned(x) -> bool:
    return x.data_ptr() & 15 == 0


def _memory_key(out, workspace, metadata) -> tuple | None:
    if out is None and workspace is None and metadata is None:
        return None
    placed = None if workspace is None else (_facts(workspace), _aligned(workspace))
    return (_facts(out), placed, _facts(metadata))


def _new_plans(key: tuple | None, given: tuple, options: tuple, memory: tuple) -> _Plans:
    """Validate, decide, log, remember. Nothing is written yet."""
    spec, first = question(given, options)
    found = _Plans(spec, first)
    _check_memory(spec, found.decode, memory)
    if log.enabled():
        log.once(str(explanation(spec, first)))
    ops.remember(_plans, key, found)
    return found


def explanation(spec: DecodeSpec, first: AppendSpec | None) -> dispatch.Explanation:
    """Who attends, and who writes the cache before that."""
    before = None if first is None else dispatch.explanation(first)
    return dispatch.explanation(spec, append=before)


def _check_memory(spec: DecodeSpec, plan, memory: tuple) -> None:
    out, workspace, metadata = memory
    if out is not None:
        check_decode.check_out(out, spec.out_shape, spec.dtype, spec.device)
    if workspace is not None:
        check_decode.check_workspace(workspace, spec, plan.workspace_bytes)
    if metadata is not None:
        check_decode.check_metadata(metadata, spec.device)


def _looks(spec: DecodeSpec | AppendSpec) -> bool:
    """Whether each call looks at the numbers in its tensors, which on a GPU waits for the device."""
    asked = os.environ.get("TANDEM_VALIDATE") == "1" or os.environ.get("TANDEM_DEBUG") == "1"
    return spec.device.type == "cpu" or asked


# The operators. Their flat arguments are those of _PLACE and _OPTIONS.


def _through_operators(given: tuple, options: tuple, want_lse: bool, memory: tuple):
    """The same call for torch.compile, fakes and modes. Operators bring their own workspace."""
    given, (out, _, metadata) = Given(*given), memory
    check_decode.check_types(given)
    refuse_gradients(given)
    options = check_decode.check_options(DecodeOptions(*options))
    cache, new, rotary = given.parts()
    if metadata is not None:
        check_decode.check_metadata(metadata, given.q.device)
    if out is not None:
        check_decode.check_cache(given.q, cache, new)
        shape = (*given.q.shape[:-1], cache.v.shape[-1])
        check_decode.check_out(out, shape, out_dtype(given.q.dtype), given.q.device)
    q, place = given.q, (*cache[2:], *new, given.max_seqlen_q)
    if given.k is not None or rotary.cos is not None:
        q = torch.ops.tandem_attn.append_kv(*append_arguments(given, rotary, cache, place), *options)
    found, lse = torch.ops.tandem_attn.decode(q, cache.k, cache.v, *place, *options)
    if out is not None:
        found = out.copy_(found)
    return found, lse if want_lse else None


def append_arguments(given: Given, rotary: Rotary, cache: Cache, place: tuple) -> tuple:
    """The arguments of append_kv before its options: factors that it writes come as arguments that it says
    it writes, in place of those that it only reads."""
    written = (cache.k_descale, cache.v_descale) if per_block(cache.k_descale) else (None, None)
    if written[0] is not None:
        place = (*place[:5], None, None, *place[7:])
    return (given.q, cache.k, cache.v, *written, given.k, given.v, *rotary, *place)


def _split(k_cache, v_cache, flat: tuple) -> tuple[Cache, New, int | None, DecodeOptions]:
    place, options = flat[:_NUM_PLACE], DecodeOptions(*flat[_NUM_PLACE:])
    return Cache(k_cache, v_cache, *place[:7]), New(*place[7:11]), place[11], options


def _append_parts(q, k_cache, v_cache, k_written, v_written, k, v, cos, sin, turns, *flat):
    """(Given, Cache, New, options) of the operator's arguments."""
    cache, new, max_seqlen_q, options = _split(k_cache, v_cache, flat)
    if k_written is not None:
        cache = cache._replace(k_descale=k_written, v_descale=v_written)
    lengths = cache.seqlen if cache.seqlens is None else cache.seqlens
    packed = (new.cu_seqlens_q, new.cu_seqlens_k_new, max_seqlen_q, turns, new.q_descale)
    given = Given(q, k_cache, v_cache, k, v, cos, sin, lengths, *cache[4:7], *packed, *cache[7:])
    return given, cache, new, options


def _append_impl(*arguments):
    given, _, _, options = _append_parts(*arguments)
    q, k, v = given.q, given.k, given.v
    found = _find(given, options, (None, None, None))
    cache, new, rotary = _checked(found, given)
    turned = q if found.append is None else found.append(q, k, v, cache, new, rotary)
    return q.clone(memory_format=torch.contiguous_format) if turned is q else turned


def _decode_impl(q, k_cache, v_cache, *flat):
    cache, new, max_seqlen_q, options = _split(k_cache, v_cache, flat)
    lengths = int if cache.seqlens is None else cache.seqlens
    packed = (new.cu_seqlens_q, None, max_seqlen_q, None, new.q_descale)
    given = (q, k_cache, v_cache, *(None,) * 4, lengths, *cache[4:7], *packed, *cache[7:])
    key = (_key(given, options, (None, None, None)), _facts(new.cu_seqlens_k_new))
    found = _decode_plans.get(key)
    if found is None:
        options = check_decode.check_options(options)
        check_decode.check_cache(q, cache, new)
        found = _Plans(decode_spec(q, cache, new, max_seqlen_q, options), None)
        if log.enabled():
            log.once(str(explanation(found.spec, None)))
        ops.remember(_decode_plans, key if key[0] else None, found)
    if cache.seqlens is None:
        check_decode.check_length(found.spec, cache.seqlen, new.seqlen_new)
    if found.looks:
        check_decode.check_contents(found.spec, cache, new, None)
    return found.decode(q, cache, new, None, None, True)


def _append_fake(*arguments):
    given, cache, new, options = _append_parts(*arguments)
    check_decode.check_options(options)
    _check_shapes(given.q, given.k, given.v, cache, new, Rotary(*given[5:7], given.rotary_seqlens))
    return given.q.new_empty(given.q.shape)


def _decode_fake(q, k_cache, v_cache, *flat):
    cache, new, _, options = _split(k_cache, v_cache, flat)
    check_decode.check_options(options)
    check_decode.check_cache(q, cache, new)
    packed = new.cu_seqlens_q is not None
    shape = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    out = q.new_empty((*q.shape[:-1], v_cache.shape[-1]), dtype=out_dtype(q.dtype))
    return out, q.new_empty(shape, dtype=lse_dtype(q.dtype))


def _register() -> torch.library.Library:
    library = torch.library.Library("tandem_attn", "FRAGMENT")
    tags = (torch.Tag.pt2_compliant_tag,)
    caches = "Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_written, "
    caches += "Tensor(d!)? v_written, Tensor? k, Tensor? v, "
    tables = "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? rotary_seqlens, "
    library.define(f"append_kv({caches}{tables}{_PLACE}, {_OPTIONS}) -> Tensor", tags=tags)
    tensors = "Tensor q, Tensor k_cache, Tensor v_cache, "
    library.define(f"decode({tensors}{_PLACE}, {_OPTIONS}) -> (Tensor out, Tensor lse)", tags=tags)
    for name, impl, fake in (
        ("append_kv", _append_impl, _append_fake),
        ("decode", _decode_impl, _decode_fake),
    ):
        library.impl(name, impl, "CompositeExplicitAutograd")
        torch.library.register_fake(f"tandem_attn::{name}", fake, lib=library)
    return library


_library = _register()  # the registrations live as long as this
