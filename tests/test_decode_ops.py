"""The operators over a cache: schema, fakes, torch.compile, and the plans remembered behind them."""

import itertools
import logging
import timeit

import pytest
import torch
from decode_cases import assert_fakes_match
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import tandem_attn
from tandem_attn import arch, dispatch, flash_attn_with_kvcache, ops, ops_decode
from tandem_attn.spec_decode import DecodeOptions, Given
from tandem_attn.testing.decode_inputs import (
    DecodeCase,
    assert_cache_right,
    assert_decode_right,
    bits,
    make_decode,
    run_decode,
)

BF16, F32 = torch.bfloat16, torch.float32
CASES = [
    DecodeCase(dtype=F32),
    DecodeCase(dtype=F32, seqlens=5, tokens=3, causal=True, head_dim_v=8, softcap=2.0),
    DecodeCase(dtype=BF16, tokens=(3, 1), page_size=8, window=(4, 1), leftpad=(2, 0), split_size=128),
    DecodeCase(dtype=F32, new=2, tokens=2, causal=True, layout="strided", batch_idx=(3, 0)),
    DecodeCase(dtype=F32, new=(2, 1), tokens=(1, 2), page_size=8, causal=True, rotary="halves", rotary_dim=8),
    DecodeCase(dtype=BF16, new=1, rotary="interleaved", seqlens=9, rotary_seqlens=(3, 4)),
    DecodeCase(dtype=F32, tokens=2, rotary="interleaved", rotary_dtype=F32),
    DecodeCase(dtype=F32, tokens=0, new=1),
]
WRITING = [case for case in CASES if case.new is not None or case.rotary]


def operands(case, inputs=None):
    """The flat arguments of (append_kv, decode) for a case; numbers everywhere, for what compares them."""
    inputs = make_decode(case) if inputs is None else inputs
    for name in ("k_cache", "v_cache", "q", "k", "v"):
        if name in inputs.tensors and inputs.tensors[name].itemsize > 1:
            inputs.tensors[name].nan_to_num_(0.0)
    given = Given(**inputs.tensors)
    cache, new, rotary = given.parts()
    place = (*cache[2:], *new, given.max_seqlen_q)
    options = (None, *case.bounds, case.softcap, 0, case.num_splits, case.split_size)
    options += (case.rotary == "interleaved",)
    appends = ops_decode.append_arguments(given, rotary, cache, place)
    return (*appends, *options), (given.q, *cache[:2], *place, *options)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_opcheck_decode(case):
    torch.library.opcheck(torch.ops.tandem_attn.decode.default, operands(case)[1])


@pytest.mark.parametrize("case", WRITING, ids=lambda c: c.id)
def test_opcheck_append(case):
    torch.library.opcheck(torch.ops.tandem_attn.append_kv.default, operands(case)[0])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_fakes_have_the_strides_of_the_real_thing(case):
    assert_fakes_match(make_decode(case))


def test_meta_tensors_have_shapes_and_no_numbers():
    q, cache = torch.empty(2, 3, 4, 8, device="meta"), torch.empty(2, 9, 2, 8, device="meta")
    out, lse = flash_attn_with_kvcache(q, cache, cache, cache_seqlens=4, return_softmax_lse=True)
    assert out.is_meta and out.shape == q.shape and lse.shape == (2, 4, 3)
    with pytest.raises(ValueError, match="k_cache is of head_dim 8"):
        flash_attn_with_kvcache(q[..., :4], cache, cache)
    with pytest.raises(ValueError, match="num_splits is 300"):
        flash_attn_with_kvcache(q, cache, cache, num_splits=300)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_both_roads_give_the_same_bits(case):
    """The short cut and the operators run the same plans."""
    short, long = make_decode(case), make_decode(case)
    out, lse = run_decode(short)
    arguments = tuple(long.tensors.get(name) for name in Given._fields)
    splits = (case.num_splits, case.split_size, case.rotary == "interleaved")
    options = DecodeOptions(None, *case.bounds, case.softcap, 0, *splits)
    found = ops_decode._through_operators(arguments, options, True, (None, None, None))
    assert torch.equal(bits(out), bits(found[0])) and torch.equal(bits(lse), bits(found[1]))
    assert_decode_right(case, long, *found)


def test_operators_check_before_they_write():
    case = DecodeCase(dtype=F32, new=2, seqlens=(20, 31))
    for arguments in operands(case):
        before = [x.clone() for x in arguments[1:3]]
        operator = getattr(torch.ops.tandem_attn, "append_kv" if len(arguments) > 24 else "decode")
        with pytest.raises(ValueError, match="cache_seqlens is 31 at 1, with 2 keys to append"):
            operator(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(arguments[1:3], before, strict=True))


def test_append_without_rotary_returns_a_copy():
    arguments, _ = operands(DecodeCase(dtype=F32, new=2, tokens=2, layout="strided"))
    q = torch.ops.tandem_attn.append_kv(*arguments)
    assert torch.equal(q, arguments[0]) and q.data_ptr() != arguments[0].data_ptr() and q.is_contiguous()


# torch.compile


def compiled(function, backend="aot_eager", dynamic=True):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter), counter


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_compiled_calls_are_right(case, backend):
    inputs = make_decode(case)
    fast, _ = compiled(lambda tensors: run_decode(type(inputs)(tensors, inputs.options, [], (), ())), backend)
    assert_decode_right(case, inputs, *fast(inputs.tensors))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [True, None])
def test_compile_a_loop_with_growing_lengths(backend, dynamic):
    """Neither a Python number nor a tensor that grows with each step makes a new graph."""

    def step(q, k_cache, v_cache, k, v, length, cos, sin):
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=length, causal=True
        )

    for as_tensor in (False, True):
        fast, counter = compiled(step, backend, dynamic)
        q, k = torch.randn(12, 2, 1, 4, 16), torch.randn(12, 2, 1, 2, 16)
        angles = torch.rand(16, 8)
        caches = [torch.zeros(2, 16, 2, 16) for _ in range(4)]
        for t in range(12):
            length = torch.full((2,), t, dtype=torch.int32) if as_tensor else t
            more = (k[t], k[t], length, angles.cos(), angles.sin())
            torch.testing.assert_close(fast(q[t], *caches[:2], *more), step(q[t], *caches[2:], *more))
        for a, b in itertools.pairwise((caches[0], caches[2])):
            assert torch.equal(a, b)
        assert counter.frame_count <= 3, "one compilation and at most two more"


def test_compile_out_and_prefill_of_many_lengths():
    def prefill(q, k_cache, v_cache, k, out):
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, k, cache_seqlens=2, causal=True, out=out)

    fast, counter = compiled(prefill)
    for n in (7, 12, 3, 20):
        q, k = torch.randn(2, n, 4, 8), torch.randn(2, n, 2, 8)
        one, two = ([torch.ones(2, 32, 2, 8) for _ in "kv"] for _ in "ab")
        outs = [torch.full_like(q, float("nan")) for _ in "ab"]
        found = fast(q, *one, k, outs[0])
        torch.testing.assert_close(found, prefill(q, *two, k, outs[1]))
        assert torch.equal(outs[0], found) and torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert counter.frame_count <= 3


def test_compile_merge_and_combine():
    def both(out, lse):
        merged = tandem_attn.merge_attention_states((out[0], lse[0].mT), (out[1], lse[1].mT))
        return merged, tandem_attn.flash_attn_combine(out, lse)

    fast, _ = compiled(both)
    out, lse = torch.randn(2, 3, 5, 4, 8), torch.randn(2, 3, 5, 4)
    for found, expected in zip(fast(out, lse), both(out, lse), strict=True):
        torch.testing.assert_close(found, expected)


def test_compile_reports_mistakes_and_does_not_write():
    case = DecodeCase(dtype=F32, new=2, seqlens=4)
    inputs = make_decode(case)
    fast, _ = compiled(lambda tensors: flash_attn_with_kvcache(**tensors))
    with pytest.raises(Exception, match="k_cache is of head_dim"):
        fast(inputs.tensors | {"q": inputs.tensors["q"][..., :8].contiguous()})
    with pytest.raises(Exception, match="cache_seqlens is 31, with 2 keys to append"):
        fast(inputs.tensors | {"cache_seqlens": 31})
    assert_cache_right(case, inputs, written=False)
    fast(inputs.tensors)
    assert_cache_right(case, inputs)


def test_forward_mode_is_refused_not_dropped():
    inputs = make_decode(DecodeCase(dtype=F32))
    with forward_ad.dual_level():
        run_decode(inputs)
        q = forward_ad.make_dual(inputs.tensors["q"], torch.ones_like(inputs.tensors["q"]))
        with pytest.raises(NotImplementedError, match="q is a forward-mode dual"):
            run_decode(inputs, q=q)


# Remembered plans


def stub(monkeypatch, seen):
    class Backend:
        NAME = "stub"

        @staticmethod
        def decode(spec):
            seen.append(spec)
            answer = (torch.zeros(()), torch.zeros(()))

            def plan(*_):
                return answer

            plan.workspace_bytes = 0
            return plan

        @staticmethod
        def append(spec):
            seen.append(spec)
            return lambda q, *_: q

    monkeypatch.setattr(dispatch, "backend_for", lambda spec, requested=None: Backend)


def test_a_question_is_decided_once_for_all_lengths(monkeypatch):
    seen = []
    stub(monkeypatch, seen)
    q, cache, k = torch.randn(2, 1, 4, 16), torch.randn(2, 64, 2, 16), torch.randn(2, 1, 2, 16)
    for length in range(40):
        flash_attn_with_kvcache(q, cache, cache.clone(), cache_seqlens=length)
        flash_attn_with_kvcache(q, cache, cache.clone(), k, k.clone(), cache_seqlens=length)
        lengths = torch.full((2,), length, dtype=torch.int32)
        flash_attn_with_kvcache(q, cache, cache.clone(), cache_seqlens=lengths)
    assert len(ops_decode._plans) == 3 and len(seen) == 4  # the second writes first


def test_operators_decide_once_for_all_lengths():
    case = DecodeCase(dtype=F32, new=1, seqlens=4)
    for length in range(9):
        appends, decodes = operands(case)
        assert decodes[4] == appends[11] == 4
        torch.ops.tandem_attn.append_kv(*appends[:11], length, *appends[12:])
        torch.ops.tandem_attn.decode(*decodes[:4], length, *decodes[5:])
    assert len(ops_decode._plans) == len(ops_decode._decode_plans) == 1


def shifted(x):
    """A copy at an address that is no multiple of 16 bytes."""
    return torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin"])
def test_addresses_are_looked_at(name):
    inputs = make_decode(DecodeCase(dtype=F32, new=2, tokens=2, rotary="halves"))
    for moved in (False, True, False):
        given = inputs.tensors | ({name: shifted(inputs.tensors[name])} if moved else {})
        flash_attn_with_kvcache(**given)
    plans = list(ops_decode._plans.values())
    assert plans[0].spec.aligned
    if name in ("q", "k_cache", "v_cache"):  # launches find out about the others themselves
        assert plans[1].spec.aligned == (name == "q"), "q is read from its rotated copy"
    else:
        assert len(plans) == 1


def variations():
    """A base call and calls that differ from it in one thing."""
    case = DecodeCase(dtype=F32, new=2, tokens=2, seqlens=(9, 7), rotary="halves", rotary_dim=8)
    base = make_decode(case).tensors

    def strided(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    ones = torch.ones(2, dtype=torch.int32)
    yield base
    yield base | {"k_cache": shifted(base["k_cache"])}
    for name in ("q", "k_cache", "v_cache", "k", "v"):
        yield base | {name: strided(base[name])}
    wide = {n: torch.cat((base[n], base[n]), 1)[:, :4] for n in ("rotary_cos", "rotary_sin")}
    yield base | wide
    yield base | {n: base[n][:, :2].contiguous() for n in ("rotary_cos", "rotary_sin")}
    yield base | {n: torch.cat((base[n], base[n])) for n in ("rotary_cos", "rotary_sin")}
    yield base | {"rotary_seqlens": ones}
    yield base | {"rotary_cos": None, "rotary_sin": None}
    yield base | {"k": None, "v": None}
    yield base | {n: base[n][:, :1].contiguous() for n in "kv"}
    yield base | {"q": base["q"][:, :1].contiguous()}
    yield base | {"q": torch.cat((base["q"],) * 2, 2)}
    yield base | {n: base[n].double() for n in ("q", "k_cache", "v_cache", "k", "v")}
    yield base | {n: base[n][:, :20].contiguous() for n in ("k_cache", "v_cache")}
    yield base | {"cache_seqlens": 9}
    yield base | {"cache_batch_idx": torch.tensor([1, 0], dtype=torch.int32)}
    yield base | {"cache_leftpad": ones}
    pages = {n: base[n].reshape(4, 16, 2, 16) for n in ("k_cache", "v_cache")}
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    yield base | pages | {"page_table": table}
    yield base | pages | {"page_table": torch.cat((table, table), 1)[:, :2]}
    packed = {"q": base["q"].flatten(0, 1), "cu_seqlens_q": torch.tensor([0, 2, 4], dtype=torch.int32)}
    yield base | packed | {"max_seqlen_q": 2}
    yield base | packed | {"max_seqlen_q": 3}
    starts = {"cu_seqlens_k_new": torch.tensor([0, 2, 4], dtype=torch.int32)}
    yield base | {n: base[n].flatten(0, 1) for n in "kv"} | starts
    for options in (
        dict(causal=True),
        dict(window_size=(2, 0)),
        dict(window_size=(0, 2)),
        dict(softcap=2.0),
        dict(softmax_scale=0.5),
        dict(softmax_scale=0.25001),
        dict(sm_margin=1),
        dict(num_splits=1),
        dict(num_splits=2),
        dict(split_size=128),
        dict(split_size=256),
        dict(rotary_interleaved=False),
    ):
        yield base | options


def test_every_difference_is_a_new_question(monkeypatch):
    """A key that misses an argument would answer one question with another's plan: A, B, A."""
    seen = []
    stub(monkeypatch, seen)
    calls = list(variations())
    questions = set()
    for given in calls:
        before = len(ops_decode._plans)
        flash_attn_with_kvcache(**given)
        assert len(ops_decode._plans) == before + 1, set(given)
        found = ops_decode._plans[next(reversed(ops_decode._plans))]
        assert (found.spec, found.checks) not in questions, "the specs would not tell these apart either"
        questions.add((found.spec, found.checks))
    for given in (calls[0], *calls):
        flash_attn_with_kvcache(**given)
    assert len(ops_decode._plans) == len(calls)


def test_answers_do_not_mix():
    """The same in numbers: A, B, A with one argument changed."""
    base = DecodeCase(dtype=F32, new=2, tokens=2, causal=True)
    changes = (
        dict(softcap=1.0),
        dict(causal=False),
        dict(window=(3, 0)),
        dict(seqlens=9),
        dict(seqlens=(3, 30)),
        dict(page_size=8),
        dict(leftpad=(3, 1)),
        dict(batch_idx=(1, 0)),
        dict(layout="strided"),
        dict(new=(2, 2)),
        dict(tokens=(2, 2)),
        dict(rotary="halves"),
        dict(rotary="interleaved"),
        dict(dtype=BF16),
    )
    for change in changes:
        for fields in ({}, change, {}):
            case = DecodeCase(**{**base.__dict__, **fields})
            inputs = make_decode(case)
            assert_decode_right(case, inputs, *run_decode(inputs))


def test_plans_are_bounded_and_forgotten(monkeypatch):
    monkeypatch.setattr(ops, "MAX_PLANS", 5)
    cache = torch.randn(1, 16, 1, 8)
    for n in range(1, 12):
        flash_attn_with_kvcache(torch.randn(1, n, 1, 8), cache, cache)
    assert len(ops_decode._plans) == 5
    ops.clear_plans()
    assert not ops_decode._plans


def test_log_once_per_question(monkeypatch, caplog):
    from tandem_attn import log

    monkeypatch.setenv("TANDEM_LOG", "1")
    monkeypatch.setattr(log, "_said", set())
    caplog.set_level(logging.INFO, logger="tandem_attn")
    case = DecodeCase(dtype=F32, new=1, seqlens=4)
    inputs = make_decode(case)
    for length in (4, 5, 6):
        run_decode(inputs, cache_seqlens=length)
    (line,) = [r.message for r in caplog.records if r.name == "tandem_attn"]
    assert line == str(tandem_attn.explain_with_kvcache(**inputs.tensors)) and "append to a cache" in line


def test_contents_are_looked_at_on_a_gpu_only_if_asked(monkeypatch):
    (spec, _) = ops_decode.question(
        tuple(make_decode(DecodeCase()).tensors.get(n) for n in Given._fields), OPTIONS
    )
    on_gpu = ops_decode.dispatch.DecodeSpec(**{**spec.__dict__, "device": torch.device("cuda:0")})
    assert ops_decode._looks(spec) and not ops_decode._looks(on_gpu)
    for name in ("TANDEM_DEBUG", "TANDEM_VALIDATE"):
        monkeypatch.setenv(name, "1")
        assert ops_decode._looks(on_gpu)
        monkeypatch.delenv(name)


OPTIONS = (None, -1, -1, 0.0, 0, 0, None, True)


def test_gpus_get_the_reference_with_a_reason_where_no_kernel_is(monkeypatch):
    monkeypatch.setattr(arch, "capability", lambda device: (8, 0))
    (spec, first) = ops_decode.question(
        tuple(make_decode(DecodeCase(new=1)).tensors.get(n) for n in Given._fields), OPTIONS
    )
    for question in (spec, first):
        elsewhere = type(question)(**{**question.__dict__, "device": torch.device("cuda:0")})
        backend, said = dispatch.candidate("gluon", elsewhere)
        assert backend is None or backend.NAME == "gluon"
        assert backend is None or said == ["compute capability is 8.0; the kernels need 9.0 (Hopper)"]
        assert said
        assert dispatch.backend_for(elsewhere).NAME == "reference"


@pytest.mark.plain_empty
def test_host_time_of_a_call(monkeypatch):
    """Everything but the plans: 8 us for a step with lengths in a tensor, 13 with new keys (2026-11-25)."""
    stub(monkeypatch, [])
    monkeypatch.setattr(ops_decode, "_looks", lambda spec: False)
    q, cache, k = torch.randn(8, 1, 8, 64), torch.randn(8, 64, 2, 64), torch.randn(8, 1, 2, 64)
    lengths = torch.full((8,), 9, dtype=torch.int32)

    def microseconds(call):
        return min(timeit.repeat(call, number=2000, repeat=7)) / 2000 * 1e6

    assert microseconds(lambda: flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths)) < 25
    assert microseconds(lambda: flash_attn_with_kvcache(q, cache, cache, k, k, cache_seqlens=9)) < 35
