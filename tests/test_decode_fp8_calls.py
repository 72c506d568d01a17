"""Calls over an FP8 cache: mistakes, specs, operators and torch.compile, and the cache manager's factors."""

import itertools
import math

import pytest
import torch
from decode_cases import assert_fakes_match
from test_cache_model import make
from test_decode_ops import compiled, operands, stub

import tandem_attn
from tandem_attn import SCALE_BLOCK, flash_attn_with_kvcache, ops_decode
from tandem_attn.spec_decode import DecodeOptions, Given
from tandem_attn.testing.decode_fp8_inputs import (
    Fp8Case,
    assert_fp8_right,
    assert_same_cache,
    make_fp8,
    on_cpu,
)
from tandem_attn.testing.decode_inputs import DecodeCase, bits, run_decode

BF16, F16, F32, E4M3, E5M2 = (
    *(torch.bfloat16, torch.float16, torch.float32),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


DENSE = Fp8Case(DecodeCase(dtype=BF16))
APPEND = Fp8Case(DecodeCase(dtype=BF16, new=2, tokens=2))
PAGED = Fp8Case(DecodeCase(dtype=BF16, new=2, tokens=2, page_size=8))
ROTARY = Fp8Case(DecodeCase(dtype=BF16, new=2, tokens=2, rotary="halves"))
SEQUENCES = Fp8Case(DecodeCase(dtype=BF16, new=2, tokens=2), "sequence")
NARROW_Q = Fp8Case(DecodeCase(dtype=BF16, tokens=2), "sequence", fp8_q=True)
ALL_NARROW = Fp8Case(DecodeCase(dtype=BF16, tokens=2, new=2), "sequence", fp8_q=True, fp8_new=True)


def with_(name, change):
    return lambda given: {name: change(given[name])}


def both(change):
    return lambda given: {n: change(given[n]) for n in ("k_cache", "v_cache")}


def factors(value, block=(0, 0)):
    """One factor of keys that is not as it should be."""

    def change(given):
        x = given["k_descale"].clone()
        x[(0, *block[: x.dim() - 1])] = value
        return {"k_descale": x}

    return change


MISTAKES = {
    # types
    "e5m2": (DENSE, both(lambda x: x.to(E5M2)), NotImplementedError, "k_cache is of dtype .*e5m2; .*e4m3fn"),
    "mixed": (DENSE, with_("v_cache", lambda x: x.to(BF16)), TypeError, "v_cache is .*bfloat16; .*e4m3"),
    "mixed k": (DENSE, with_("k_cache", lambda x: x.to(E5M2)), TypeError, "k_cache is .*e5m2; .*e4m3fn"),
    "wide q": (DENSE, with_("q", lambda x: x.float()), TypeError, "q is .*float32; .*bfloat16, .*e4m3"),
    "e5m2 q": (DENSE, with_("q", lambda x: x.to(E5M2)), TypeError, "q is of dtype .*e5m2"),
    "wide cache": (NARROW_Q, both(lambda x: x.to(BF16)), TypeError, "q is .*e4m3fn; .*bfloat16; or caches"),
    "new type": (APPEND, with_("k", lambda x: x.half()), TypeError, "k is .*torch.float16; .*bfloat16"),
    "new types": (
        ALL_NARROW, with_("v", lambda x: x.to(BF16)), TypeError, "v is .*bfloat16; .*dtype of k, .*e4m3"
    ),
    "e4m3 into blocks": (
        APPEND, lambda g: {n: g[n].to(E4M3) for n in "kv"}, TypeError,
        r"k is of dtype .*e4m3fn; supported: torch.bfloat16; .*only with factors \(batch",
    ),
    "new e5m2": (SEQUENCES, with_("k", lambda x: x.to(E5M2)), TypeError, "k is of dtype .*e5m2"),
    # factors
    "none": (DENSE, {"k_descale": None}, ValueError, "k_descale is None; .*float32 .*for k_cache"),
    "none of v": (DENSE, {"v_descale": None}, ValueError, "v_descale is None; .*float32 .*for v_cache"),
    "none at all": (DENSE, {"k_descale": None, "v_descale": None}, ValueError, "k_descale is None"),
    "list": (DENSE, {"k_descale": [1.0]}, TypeError, "k_descale is list; supported: a torch.Tensor"),
    "type": (DENSE, with_("k_descale", lambda x: x.double()), TypeError, "k_descale is .*float64"),
    "type of": (SEQUENCES, with_("v_descale", lambda x: x.half()), TypeError, "v_descale is .*float16"),
    "device": (DENSE, with_("k_descale", lambda x: x.to("meta")), ValueError, "k_descale is on meta"),
    "shape": (
        DENSE, with_("k_descale", lambda x: x[:, :, :1]), ValueError,
        r"k_descale is of shape \(2, 1, 1\); supported: \(2, 1, 2\), .*128 slots.* or \(batch, kv_heads\)",
    ),
    "blocks": (PAGED, with_("v_descale", lambda x: x.repeat(1, 2, 1)), ValueError, "v_descale is of shape"),
    "rows": (PAGED, with_("k_descale", lambda x: x[1:]), ValueError, "k_descale is of shape"),
    "sequences": (
        SEQUENCES, with_("k_descale", lambda x: x[:1]), ValueError,
        r"k_descale is of shape \(1, 2\); supported: \(batch, kv_heads\), \(2, 2\)",
    ),
    "dimensions": (
        DENSE, {"v_descale": torch.ones(2, 2)}, ValueError,
        r"v_descale is of shape \(2, 2\); supported: as many dimensions as k_descale has, 3",
    ),
    "flat": (DENSE, {"k_descale": torch.ones(2)}, ValueError, r"k_descale is of shape \(2,\)"),
    "q with 16 bits": (DENSE, {"q_descale": torch.ones(2, 2)}, ValueError, "q_descale is given for q of"),
    "q shape": (NARROW_Q, {"q_descale": torch.ones(2, 4)}, ValueError, r"q_descale is .*\(batch, kv_heads"),
    "q blocks": (NARROW_Q, {"q_descale": torch.ones(2, 1, 2)}, ValueError, "q_descale is of shape"),
    "expanded": (
        APPEND, with_("v_descale", lambda x: x[:1].expand(2, 1, 2)), ValueError,
        "v_descale is expanded .*; supported: memory for every block",
    ),
    # their numbers
    "zero": (DENSE, factors(0.0), ValueError, "k_descale is 0.0 .*: finite factors above 0"),
    "negative": (SEQUENCES, factors(-1.0), ValueError, "k_descale is -1.0"),
    "nan": (PAGED, lambda g: {"v_descale": g["v_descale"] * math.nan}, ValueError, "v_descale is nan"),
    "infinite": (DENSE, factors(math.inf), ValueError, "k_descale is inf"),
    "q zero": (NARROW_Q, {"q_descale": torch.zeros(2, 2)}, ValueError, "q_descale is 0.0"),
    # rotation
    "rotated e4m3": (
        Fp8Case(DecodeCase(dtype=BF16, tokens=2, rotary="halves"), fp8_q=True), {}, NotImplementedError,
        "rotary_cos is given for q of dtype .*e4m3fn; supported: None, or q of 16 bits",
    ),
    "rotated new": (
        Fp8Case(DecodeCase(dtype=BF16, tokens=2, new=1, rotary="halves"), "sequence", fp8_new=True), {},
        NotImplementedError, "rotary_cos is given for k of dtype .*e4m3fn",
    ),
    # results
    "out": (NARROW_Q, {"out": torch.zeros(2, 2, 4, 16).to(E4M3)}, TypeError, "out is .*e4m3fn; .*bfloat16"),
    "pages": (
        Fp8Case(DecodeCase(dtype=BF16, new=1, page_size=16, seqlens=(3, 8))),
        lambda g: {"page_table": g["page_table"][1:].repeat(2, 1)}, ValueError,
        "page_table is .* for the keys appended to 0 and to 1; supported: a page once only",
    ),
}  # fmt: skip


@pytest.mark.parametrize("remembered", [False, True], ids=["new", "remembered"])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_and_write_nothing(name, remembered):
    fp8, change, error, message = MISTAKES[name]
    if remembered and not (fp8.case.rotary and (fp8.fp8_q or fp8.fp8_new)):
        run_decode(make_fp8(fp8))
    inputs = make_fp8(fp8)
    before = on_cpu(inputs)
    changed = change(inputs.tensors) if callable(change) else change
    with pytest.raises(error, match=f"^{message}"):
        run_decode(inputs, **changed)
    assert_same_cache(inputs.tensors, before.tensors)


def test_two_sequences_may_write_into_other_blocks_of_a_page():
    """A page holds several factors if it is long; a block has one writer."""
    fp8 = Fp8Case(DecodeCase(dtype=BF16, new=1, page_size=256, seqlens=(128, 3), capacity=256))
    inputs = make_fp8(fp8)
    inputs.tensors["page_table"][0, 0] = inputs.tensors["page_table"][1, 0]
    inputs.tensors["k_descale"].fill_(1.0)
    inputs.tensors["v_descale"].fill_(1.0)
    run_decode(inputs)
    inputs.tensors["cache_seqlens"][0] = 100
    with pytest.raises(ValueError, match=r"page_table is .* appended to 0 and to 1"):
        run_decode(inputs)


def test_numbers_of_factors_are_not_looked_at_on_a_gpu(monkeypatch):
    monkeypatch.setattr(ops_decode, "_looks", lambda spec: False)
    inputs = make_fp8(DENSE)
    inputs.tensors["k_descale"].fill_(math.nan)
    assert run_decode(inputs)[0].isnan().all()


@pytest.mark.parametrize("name", ["q_descale", "k_descale", "v_descale"])
def test_gradients_are_refused_not_dropped(name):
    inputs = make_fp8(NARROW_Q)
    inputs.tensors[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"^{name} is a tensor that requires"):
        run_decode(inputs)
    with torch.no_grad():
        run_decode(inputs)


def test_autocast_casts_what_is_wide():
    inputs = make_fp8(APPEND)
    expected, other = on_cpu(inputs), on_cpu(inputs)
    found = run_decode(expected)
    wide = {name: other.tensors[name].float() for name in "qkv"}
    with torch.autocast("cpu", dtype=BF16):
        for a, b in zip(run_decode(other, **wide), found, strict=True):
            assert torch.equal(a, b)
        run_decode(make_fp8(ALL_NARROW))
    assert_same_cache(other.tensors, expected.tensors)


def test_out_and_workspace():
    for fp8 in (APPEND, ALL_NARROW):
        expected, _ = run_decode(make_fp8(fp8))
        inputs = make_fp8(fp8)
        out = torch.full(expected.shape, math.nan, dtype=BF16)
        workspace = tandem_attn.decode_workspace(**inputs.tensors)
        found, _ = run_decode(inputs, out=out, workspace=workspace)
        assert found is out and torch.equal(out, expected)


# The specs


def question_of(fp8: Fp8Case):
    found = tandem_attn.explain_with_kvcache(**make_fp8(fp8).tensors)
    return found, found.spec, None if found.append is None else found.append.spec


def test_specs():
    found, spec, first = question_of(Fp8Case(DecodeCase(dtype=F16, new=2, tokens=2, capacity=300)))
    assert (spec.dtype, spec.q_dtype, spec.cache_dtype, spec.fp8) == (F16, F16, E4M3, True)
    assert spec.descale_block == first.descale_block == SCALE_BLOCK == 128
    assert spec.k_descale_stride == spec.v_descale_stride == first.k_descale_stride == (6, 2, 1)
    assert spec.q_descale_stride == () and first.new_dtype == F16 and first.quantizes
    for said in ("float16 over e4m3 with a factor for each block of 128 slots and KV head", "block by block"):
        assert said in str(found)
    found, spec, first = question_of(ALL_NARROW)
    assert (spec.dtype, spec.q_dtype, spec.descale_block) == (BF16, E4M3, 0)
    assert spec.k_descale_stride == (2, 0, 1) and spec.q_descale_stride == (2, 1)
    assert spec.lse_dtype == F32 and not first.quantizes and first.fp8 and first.new_dtype == E4M3
    assert "e4m3 with a factor for each sequence and KV head" in str(found)
    plain = tandem_attn.explain_with_kvcache(torch.zeros(1, 1, 1, 8), *[torch.zeros(1, 4, 1, 8)] * 2).spec
    assert not plain.fp8 and plain.k_descale_stride == () and plain.cache_dtype == plain.q_dtype == F32


def test_scheduler_metadata_of_fp8():
    sizes, lengths = (2, 1, 64, 4, 2, 16), int32(3, 4)
    found = tandem_attn.get_scheduler_metadata(*sizes, lengths, qkv_dtype=E4M3)
    assert torch.equal(found, tandem_attn.get_scheduler_metadata(*sizes, lengths))
    run_decode(make_fp8(DENSE), scheduler_metadata=found)


def test_every_difference_is_a_new_question(monkeypatch):
    seen, questions = [], set()
    stub(monkeypatch, seen)
    base = make_fp8(APPEND).tensors
    sequences = make_fp8(SEQUENCES).tensors
    strided = base["k_descale"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    narrow = make_fp8(ALL_NARROW).tensors
    moved = torch.zeros(base["k_cache"].numel() + 1, dtype=torch.uint8)[1:]
    moved = moved.view(E4M3).view(base["k_cache"].shape)
    calls = [
        base,
        base | {"k_descale": strided},
        base | {"v_descale": strided},
        sequences,
        sequences | {"k_descale": torch.full((), 0.1).expand(2, 2)},
        narrow,
        narrow | {"q_descale": None},
        narrow | {"q_descale": torch.full((), 0.1).expand(2, 2)},
        {n: x for n, x in base.items() if n not in ("k", "v")},
        base | {"k_cache": moved},
    ]
    for given in calls:
        before = len(ops_decode._plans)
        flash_attn_with_kvcache(**given)
        assert len(ops_decode._plans) == before + 1
        found = ops_decode._plans[next(reversed(ops_decode._plans))]
        assert (found.spec, found.checks) not in questions
        questions.add((found.spec, found.checks))
    for given in calls:
        flash_attn_with_kvcache(**given)
    assert len(ops_decode._plans) == len(calls)


# The operators

CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
CASES = [
    DENSE,
    APPEND,
    SEQUENCES,
    ALL_NARROW,
    NARROW_Q,
    ROTARY,
    Fp8Case(DecodeCase(dtype=F16, new=(2, 1), tokens=(1, 2), page_size=8, causal=True)),
    Fp8Case(DecodeCase(dtype=BF16, new=1, seqlens=9, rotary="interleaved"), "sequence"),
    Fp8Case(DecodeCase(dtype=BF16, new=3, layout="strided", batch_idx=(3, 0))),
]


def finite(fp8: Fp8Case):
    """Inputs with numbers everywhere, for what compares them."""
    inputs = make_fp8(fp8)
    for x in inputs.tensors.values():
        if isinstance(x, torch.Tensor) and x.dtype == E4M3:
            x.view(torch.uint8)[x.isnan()] = 0x38  # 1
        elif isinstance(x, torch.Tensor) and x.is_floating_point():
            x[x.isnan()] = 1.0
    return inputs


def opcheck(op, arguments: tuple) -> None:
    """What torch checks, without test_schema: that compares e4m3 inputs, which torch cannot on a CPU."""
    torch.library.opcheck(op, arguments, test_utils=CHECKS)
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    found = op(*arguments)
    for what, x, old in zip(op._schema.arguments, arguments, before, strict=True):
        if isinstance(x, torch.Tensor) and not (what.alias_info and what.alias_info.is_write):
            assert torch.equal(x.float(), old.float()), f"{what.name} was written"
    places = {x.untyped_storage().data_ptr() for x in arguments if isinstance(x, torch.Tensor)}
    for x in found if isinstance(found, tuple) else (found,):
        assert x.untyped_storage().data_ptr() not in places, "a result is an input"


@pytest.mark.parametrize("fp8", CASES, ids=lambda c: c.id)
def test_opcheck_decode(fp8):
    opcheck(torch.ops.tandem_attn.decode.default, operands(fp8.case, finite(fp8))[1])


@pytest.mark.parametrize("fp8", [c for c in CASES if c.case.new], ids=lambda c: c.id)
def test_opcheck_append(fp8):
    opcheck(torch.ops.tandem_attn.append_kv.default, operands(fp8.case, finite(fp8))[0])


def test_the_schema_says_what_is_written():
    schema = torch.ops.tandem_attn.append_kv.default._schema
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == ["k_cache", "v_cache", "k_written", "v_written"]
    decode = torch.ops.tandem_attn.decode.default._schema
    assert not any(a.alias_info is not None for a in decode.arguments)


@pytest.mark.parametrize("fp8", CASES, ids=lambda c: c.id)
def test_both_roads_give_the_same_bits(fp8):
    case, short, long = fp8.case, make_fp8(fp8), make_fp8(fp8)
    out, lse = run_decode(short)
    arguments = tuple(long.tensors.get(name) for name in Given._fields)
    splits = (case.num_splits, case.split_size, case.rotary == "interleaved")
    options = DecodeOptions(None, *case.bounds, case.softcap, 0, *splits)
    found = ops_decode._through_operators(arguments, options, True, (None, None, None))
    assert torch.equal(bits(out), bits(found[0])) and torch.equal(bits(lse), bits(found[1]))
    assert_same_cache(long.tensors, short.tensors)


@pytest.mark.parametrize("fp8", CASES, ids=lambda c: c.id)
def test_fakes_have_the_strides_of_the_real_thing(fp8):
    assert_fakes_match(make_fp8(fp8))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("fp8", CASES, ids=lambda c: c.id)
def test_compiled_calls_are_right(fp8, backend):
    inputs = make_fp8(fp8)
    expected = on_cpu(inputs)
    fast, _ = compiled(lambda tensors: run_decode(type(inputs)(tensors, inputs.options, [], (), ())), backend)
    found = fast(inputs.tensors)
    assert_fp8_right(fp8, inputs, *found)
    run_decode(expected)
    assert_same_cache(inputs.tensors, expected.tensors)


def test_compile_a_loop_with_growing_lengths():
    """Factors that a step writes are read by the next."""

    def step(q, k_cache, v_cache, k, v, length, k_descale, v_descale):
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=length, k_descale=k_descale, v_descale=v_descale
        )

    fast, counter = compiled(step, "aot_eager")
    q, k = torch.randn(12, 2, 1, 4, 16, dtype=BF16), torch.randn(12, 2, 1, 2, 16, dtype=BF16)
    k *= torch.exp2(torch.arange(12.0)).view(12, 1, 1, 1, 1)
    states = [
        [torch.zeros(2, 16, 2, 16).to(E4M3) for _ in "kv"] + [torch.ones(2, 1, 2) for _ in "kv"] for _ in "ab"
    ]
    for t in range(12):
        length = torch.full((2,), t, dtype=torch.int32)
        a, b = (
            f(q[t], *s[:2], k[t], k[t], length, *s[2:]) for f, s in zip((fast, step), states, strict=True)
        )
        torch.testing.assert_close(a, b)
    for a, b in itertools.islice(zip(*states, strict=True), 4):
        assert torch.equal(bits_of(a), bits_of(b))
    assert counter.frame_count <= 3 and states[0][2].max() > 8.0


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.dtype == E4M3 else x


# The cache manager


def fp8_cache(**facts):
    return make(dtype=E4M3, **dict(head_dim=16, head_dim_v=16) | facts)


def test_a_cache_holds_factors():
    cache = fp8_cache(page_size=200)
    assert cache.k_descale.shape == cache.v_descale.shape == (2, 8, 2, 2)
    assert bool((cache.k_descale == 1.0).all()) and cache.k_descale.dtype == F32
    assert cache.nbytes == 2 * 2 * 8 * 200 * 2 * 16 + 2 * 4 * 2 * 8 * 2 * 2
    assert "float8_e4m3fn with a factor for each 128 tokens and head" in repr(cache)
    assert fp8_cache(page_size=16).k_descale.shape == (2, 8, 1, 2)
    assert "each 16 tokens" in repr(fp8_cache(page_size=16))
    plain = make()
    assert plain.k_descale is None and plain.descales(0) == {} and plain.nbytes == 2 * 8 * 4 * 2 * 4 * (3 + 1)
    assert "float32, " in repr(plain)
    with pytest.raises(TypeError, match=r"dtype is torch.float8_e5m2; .*float8_e4m3fn"):
        make(dtype=E5M2)


def forward(cache, handles, q, k, v):
    """One layer's attention of new tokens, (batch, n, heads, dim)."""
    cache.reserve(handles, k.shape[1])
    batch = cache.batch(handles)
    out = flash_attn_with_kvcache(
        q, cache.k[1], cache.v[1], k, v, cache_seqlens=batch.cache_seqlens, page_table=batch.page_table,
        causal=True, **cache.descales(1),
    )  # fmt: skip
    cache.commit(handles, k.shape[1])
    return out


@pytest.mark.parametrize("page_size", [8, 200])
def test_forks_have_factors_of_their_own(page_size):
    """A child that writes large numbers does not change what its parent reads, not a bit."""
    cache = fp8_cache(page_size=page_size)
    k, v = (torch.randn(1, 11, 2, 16, dtype=BF16) for _ in "kv")
    parent = cache.allocate(11)
    forward(cache, [parent], torch.randn(1, 11, 4, 16, dtype=BF16), k, v)
    (child,) = cache.fork(parent)
    q, one = torch.randn(1, 1, 4, 16, dtype=BF16), torch.randn(1, 1, 2, 16, dtype=BF16)
    page = cache.pages(parent)[-1]
    kept = [x[:, page].clone() for x in (cache.k, cache.v, cache.k_descale, cache.v_descale)]
    forward(cache, [child], q, 1000 * one, 1000 * one)
    for x, before in zip((cache.k, cache.v, cache.k_descale, cache.v_descale), kept, strict=True):
        assert torch.equal(bits_of(x[:, page]), bits_of(before))
    mine = cache.pages(child)[-1]
    assert mine != page and bool((cache.k_descale[1, mine, 0] > cache.k_descale[1, page, 0]).all())
    out = forward(cache, [parent], q, one, one)
    exact = tandem_attn.flash_attn_func(
        q.float(), torch.cat((k, one), 1).float(), torch.cat((v, one), 1).float()
    )
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1)


def test_a_page_that_is_used_again_begins_anew():
    cache = fp8_cache(num_pages=1, page_size=8)
    for size in (1000.0, 1.0):
        handle = cache.allocate(3)
        k = size * torch.ones(1, 3, 2, 16, dtype=BF16)
        forward(cache, [handle], torch.zeros(1, 3, 4, 16, dtype=BF16), k, k)
        wanted = {1000.0: 4.0, 1.0: 2.0**-8}[size]
        assert bool((cache.k_descale[1] == wanted).all())
        cache.free(handle)
