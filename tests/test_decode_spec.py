"""Calls over a cache: signatures, what is accepted, clamped lengths, the specs and what explains them."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch

import tandem_attn
from tandem_attn import (
    flash_attn_combine,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
    ops,
    ops_decode,
)
from tandem_attn.spec import Window
from tandem_attn.spec_decode import AppendSpec, Cache, DecodeSpec, New
from tandem_attn.testing.decode_inputs import (
    DecodeCase,
    assert_cache_right,
    bits,
    make_decode,
    run_decode,
    slots_of,
)

NONE = inspect.Parameter.empty
BF16, F32 = torch.bfloat16, torch.float32

# names, order and defaults of flash_attn_interface.py in Dao-AILab/flash-attention, hopper/ (2026)
_FP8 = dict(q_descale=None, k_descale=None, v_descale=None)
_CACHE = (
    "cache_seqlens cache_batch_idx cache_leftpad page_table cu_seqlens_q cu_seqlens_k_new max_seqlen_q "
    "rotary_seqlens"
)
SIGNATURES = {
    flash_attn_with_kvcache: dict.fromkeys(("q", "k_cache", "v_cache"), NONE)
    | dict.fromkeys(("k", "v", "qv", "rotary_cos", "rotary_sin", *_CACHE.split()))
    | _FP8
    | dict(softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0)
    | dict(rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0)
    | dict(return_softmax_lse=False, split_size=None, out=None, workspace=None),
    get_scheduler_metadata: dict.fromkeys(
        ("batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads_q", "num_heads_kv", "headdim"), NONE
    )
    | dict(cache_seqlens=NONE, qkv_dtype=BF16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None)
    | dict(cache_leftpad=None, page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1))
    | dict(attention_chunk=0, has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0),
    flash_attn_combine: dict(out_partial=NONE, lse_partial=NONE, out=None, out_dtype=None),
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_drop_in_signature(function):
    found = inspect.signature(function).parameters
    assert list({n: p.default for n, p in found.items()}.items()) == list(SIGNATURES[function].items())
    ours = {name for name, p in found.items() if p.kind == inspect.Parameter.KEYWORD_ONLY}
    assert ours == ({"split_size", "out", "workspace"} if function is flash_attn_with_kvcache else set())


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


DENSE = dict(dtype=F32)
APPEND = dict(dtype=F32, new=2, tokens=2)
PACKED = dict(dtype=F32, new=(3, 1), tokens=(2, 2))
PAGED = dict(dtype=F32, page_size=8, new=2, tokens=2)
ROTARY = dict(dtype=F32, new=2, tokens=2, rotary="interleaved", causal=True)


def test_what_does_not_matter_is_accepted():
    case = DecodeCase(**APPEND, causal=True)
    expected = run_decode(make_decode(case))
    size, lengths = (2, 2, 32, 4, 2, 16), make_decode(case).tensors["cache_seqlens"]
    for harmless in (
        dict(pack_gqa=True),
        dict(pack_gqa=False),
        dict(num_splits=256),
        dict(split_size=256),
        dict(split_size=128, num_splits=1),
        dict(sm_margin=3),
        dict(max_seqlen_q=7),
        dict(scheduler_metadata=get_scheduler_metadata(*size, lengths, num_splits=3)),
        dict(workspace=torch.zeros(64, dtype=torch.uint8)),
        dict(cache_seqlens=lengths.clone()),
    ):
        for a, b in zip(run_decode(make_decode(case), **harmless), expected, strict=True):
            assert torch.equal(a, b)
    case = DecodeCase(**DENSE, seqlens=5)
    for five in (5, np.int64(5)):
        assert torch.equal(
            run_decode(make_decode(case), cache_seqlens=five)[0], run_decode(make_decode(case))[0]
        )


def test_shared_pages_may_be_read_and_filled_side_by_side():
    """Two sequences may append to one page, each to slots of its own."""
    case = DecodeCase(**PAGED | dict(seqlens=(8, 12), new=1, tokens=1))
    inputs = make_decode(case)
    table = inputs.tensors["page_table"]
    table[0, 1] = table[1, 1]  # one writes the first slot of that page, the other the fifth
    run_decode(inputs)
    table[0, 1], inputs.tensors["cache_seqlens"][0] = table[1, 1], 12
    with pytest.raises(ValueError, match=r"page_table is .* appended to 0 and to 1"):
        run_decode(inputs)


def test_entries_past_the_end_are_not_looked_at():
    case = DecodeCase(**PAGED | dict(new=None))
    inputs = make_decode(case)
    assert int(inputs.tensors["page_table"].max()) == 2**30
    expected = run_decode(inputs)
    inputs.tensors["page_table"][inputs.tensors["page_table"] == 2**30] = -7
    assert torch.equal(run_decode(inputs)[0], expected[0])


# The defined results without checks


@pytest.mark.parametrize("page_size", [0, 8])
@pytest.mark.parametrize("rotary", [None, "halves"])
def test_without_checks_lengths_are_clamped_and_what_does_not_fit_stays_out(monkeypatch, page_size, rotary):
    """As on a GPU, where nobody looks."""
    fields = dict(dtype=F32, capacity=16, new=3, tokens=2, page_size=page_size, rotary=rotary)
    case = DecodeCase(**fields, seqlens=(13, 0), rotary_seqlens=(0, 0) if rotary else None)
    expected = make_decode(case)
    run_decode(expected)
    ops.clear_plans()
    monkeypatch.setattr(ops_decode, "_looks", lambda spec: False)

    def keys(inputs, b, slots):
        return inputs.tensors["k_cache"][slots_of(case, inputs.sequences[b], slots)]

    for lengths in ((40, -5), (15, 0)):
        inputs = make_decode(case)
        before = keys(inputs, 0, range(16))
        run_decode(inputs, cache_seqlens=int32(*lengths))
        assert torch.equal(bits(keys(inputs, 0, range(15))), bits(before[:15])), "old keys stay"
        last = before[15] if lengths[0] == 40 else keys(expected, 0, range(13, 14))[0]
        assert torch.equal(bits(keys(inputs, 0, range(15, 16))[0]), bits(last)), (
            "room for one of three, or none"
        )
        assert torch.equal(bits(keys(inputs, 1, range(8))), bits(keys(expected, 1, range(8))))
    monkeypatch.setattr(ops_decode.check_decode, "check_length", lambda *_: None)
    for length, kept in ((15, 1), (99, 0)):  # the same for a Python number
        inputs = make_decode(case)
        inputs.tensors |= {n: torch.zeros(2, 16, 2, 16) for n in ("k_cache", "v_cache")}
        if page_size:
            inputs.tensors["page_table"] = int32(0, 1, 2, 3).view(2, 2)
            inputs.tensors |= {n: torch.zeros(4, 8, 2, 16) for n in ("k_cache", "v_cache")}
        run_decode(inputs, cache_seqlens=length)
        k_cache = inputs.tensors["k_cache"].view(2, 16, 2, 16)
        assert torch.equal(k_cache[0, 16 - kept :], keys(expected, 0, range(13, 13 + kept)))
        assert not k_cache[:, : 16 - kept].any()


# The specs


def question_of(case, **more):
    inputs = make_decode(case)
    found = tandem_attn.explain_with_kvcache(**inputs.tensors | inputs.options | more)
    return found.spec, None if found.append is None else found.append.spec


def test_decode_spec():
    spec, first = question_of(DecodeCase(tokens=3, head_dim_v=8, causal=True, softcap=2.0, num_splits=4))
    assert first is None and isinstance(spec, DecodeSpec)
    assert (spec.batch, spec.seqlen_q, spec.total_q, spec.capacity) == (2, 3, 6, 32)
    assert (spec.num_heads, spec.num_kv_heads, spec.group_size) == (4, 2, 2)
    assert (spec.head_dim, spec.head_dim_v, spec.softmax_scale) == (16, 8, 0.25)
    assert spec.window == Window(-1, 0) and spec.softcap == 2.0 and spec.num_splits == 4
    assert spec.out_shape == (2, 3, 4, 8) and spec.lse_shape == (2, 4, 3) and spec.lse_dtype == F32
    assert spec.q_stride == (192, 64, 16, 1) and spec.k_stride == (1024, 32, 16, 1) and spec.aligned
    assert (spec.page_size, spec.table_width, spec.table_stride, spec.cache_rows) == (0, 0, 0, 2)
    assert spec.has_seqlens and not (
        spec.has_batch_idx or spec.has_leftpad or spec.packed_new or spec.packed_q
    )
    assert hash(spec) == hash(
        question_of(DecodeCase(tokens=3, head_dim_v=8, causal=True, softcap=2.0, num_splits=4))[0]
    )
    paged, _ = question_of(DecodeCase(page_size=3, capacity=32, tokens=(2, 0), leftpad=(1, 1)))
    assert (paged.page_size, paged.capacity, paged.table_width, paged.table_stride) == (3, 33, 11, 11)
    assert paged.packed_q and paged.has_leftpad and paged.total_q == 4 and paged.seqlen_q == 2
    assert paged.out_shape == (4, 4, 16) and paged.lse_shape == (4, 4)
    one, _ = question_of(DecodeCase(tokens=1, causal=True, window=(40, 0)))
    assert one.window.full, "one query under a causal mask sees everything"


def test_append_spec():
    case = DecodeCase(**ROTARY | dict(layout="strided", rotary_dim=8, rotary_seqlens=(0, 0)))
    spec, first = question_of(case)
    assert isinstance(first, AppendSpec) and first.has_new and first.max_new == 2 and first.total_new == 4
    assert (first.rotary_dim, first.rotary_dtype, first.rotary_stride) == (8, F32, 4)
    assert first.interleaved and first.per_token and first.has_rotary_seqlens
    assert first.k_stride == spec.k_stride == (1024, 16, 512, 1) and first.new_k_stride == (64, 32, 16, 1)
    assert first.q_stride != spec.q_stride == (128, 64, 16, 1), "attention reads the rotated copy"
    packed, first = question_of(DecodeCase(**PACKED))
    assert first.packed_new and packed.packed_new and first.max_new == first.total_new == 6
    assert first.rotary_dim == 0 and first.rotary_dtype is None and not first.per_token
    assert not question_of(DecodeCase(**ROTARY | dict(causal=False)))[1].per_token
    q_alone = question_of(DecodeCase(rotary="halves"))[1]
    assert not q_alone.has_new and not q_alone.interleaved and q_alone.new_k_stride == ()


def test_lengths_are_not_part_of_a_question():
    fields = {f.name for f in dataclasses.fields(DecodeSpec)} | {
        f.name for f in dataclasses.fields(AppendSpec)
    }
    assert not fields & {"seqlen", "seqlen_k", "lengths"}
    assert question_of(DecodeCase(seqlens=5)) == question_of(DecodeCase(seqlens=9))
    places = ("seqlens", "seqlen", "batch_idx", "leftpad", "page_table")
    assert Cache._fields == ("k", "v", *places, "k_descale", "v_descale")
    assert New._fields == ("cu_seqlens_q", "cu_seqlens_k_new", "seqlen_new", "q_descale")


def test_explanations():
    case = DecodeCase(**ROTARY)
    inputs = make_decode(case)
    found = tandem_attn.explain_with_kvcache(**inputs.tensors, causal=True, num_splits=2, split_size=None)
    assert found.backend == "reference" and set(found.reasons) == {"gluon", "torch"}
    assert found.append.backend == "reference" and set(found.append.reasons) == {"gluon", "torch"}
    for said in (
        "append to a cache, float32 on cpu: 4 new tokens, rotary over 16 columns",
        "attention over a cache, float32 on cpu: batch 2, 2 queries x up to 32 keys",
        "causal, softcap 0, splits 2",
        "answered by reference: blockwise torch",
        "not by torch: torch's fused kernels know no KV cache",
        "not by gluon: tensors are on cpu",
    ):
        assert said in str(found)
    assert_cache_right(case, inputs, written=False)
    empty = tandem_attn.explain_with_kvcache(**make_decode(DecodeCase(tokens=0)).tensors)
    assert empty.backend == "empty" and empty.append is None
    with pytest.raises(NotImplementedError, match="qv is a Tensor"):
        tandem_attn.explain_with_kvcache(**inputs.tensors, qv=torch.zeros(1))
    with pytest.raises(TypeError, match="pack_gqa is 'yes'"):
        tandem_attn.decode_workspace(**inputs.tensors, pack_gqa="yes")


def test_workspace_is_what_the_plan_says(monkeypatch):
    case = DecodeCase(**DENSE)
    inputs = make_decode(case)
    assert tandem_attn.decode_workspace(**inputs.tensors).shape == (0,)
    plan = ops_decode._Plans(*question_of(case)[:1], None).decode
    plan.workspace_bytes = 96
    stub = type("Stub", (), {"NAME": "stub", "decode": staticmethod(lambda spec: plan)})
    monkeypatch.setattr(ops_decode.dispatch, "backend_for", lambda spec, requested=None: stub)
    workspace = tandem_attn.decode_workspace(**inputs.tensors)
    assert workspace.shape == (96,) and workspace.dtype == torch.uint8 and not workspace.any()
    run_decode(inputs, workspace=workspace)
    with pytest.raises(ValueError, match="workspace is of 80 bytes; supported: at least 96"):
        run_decode(inputs, workspace=workspace[:80])


# The other functions


def test_scheduler_metadata():
    lengths = int32(3, 4)
    found = get_scheduler_metadata(2, 1, 64, 4, 2, 16, lengths, num_splits=7, sm_margin=5)
    assert found.dtype == torch.int32 and found.tolist() == [1, 2, 7, 5]
    for given, error, message in (
        (dict(batch_size=3), ValueError, "cache_seqlens is for 2 sequences; supported: batch_size, 3"),
        (dict(headdim=0), ValueError, "headdim is 0; supported: at least 1"),
        (dict(max_seqlen_k=-1), ValueError, "max_seqlen_k is -1"),
        (dict(num_heads_q=1.0), TypeError, "num_heads_q is 1.0"),
        (dict(num_splits=300), ValueError, "num_splits is 300"),
        (dict(cache_seqlens=3), TypeError, "cache_seqlens is int"),
        (dict(cache_seqlens=lengths.long()), TypeError, "cache_seqlens is of dtype torch.int64"),
        (dict(attention_chunk=2), NotImplementedError, "attention_chunk is 2"),
        (dict(window_size=3), ValueError, "window_size is 3"),
    ):
        base = dict(batch_size=2, max_seqlen_q=1, max_seqlen_k=64, num_heads_q=4, num_heads_kv=2, headdim=16)
        with pytest.raises(error, match=f"^{message}"):
            get_scheduler_metadata(**(base | dict(cache_seqlens=lengths) | given))
