"""The reference over a cache: every feature against the oracle, parts against the whole, what combines."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tandem_attn
from tandem_attn import flash_attn_combine, flash_attn_with_kvcache, merge_attention_states, reference_decode
from tandem_attn.testing.budget import assert_within_budget
from tandem_attn.testing.decode_inputs import (
    DecodeCase,
    assert_decode_right,
    bits,
    make_decode,
    run_decode,
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

FEATURES = {
    "plain": {},
    "one query each": dict(tokens=1, heads=8, kv_heads=2),
    "multi-head": dict(heads=3, kv_heads=3, tokens=2),
    "multi-query": dict(heads=5, kv_heads=1, head_dim_v=24),
    "an int for all": dict(seqlens=13, tokens=3, causal=True),
    "as long as there is room": dict(seqlens=None, tokens=2),
    "causal": dict(tokens=5, causal=True, seqlens=(20, 3)),
    "window": dict(tokens=4, window=(6, 1)),
    "window of one query": dict(tokens=1, window=(6, 0), heads=8),
    "left window": dict(tokens=4, window=(3, -1)),
    "window and causal": dict(tokens=4, window=(5, -1), causal=True),
    "softcap": dict(tokens=2, softcap=1.5),
    "softcap of one query": dict(softcap=1.5, heads=4, kv_heads=1),
    "empty sequences": dict(seqlens=(0, 9), tokens=2, causal=True),
    "more queries than keys": dict(seqlens=(2, 0), tokens=5, causal=True),
    "packed queries": dict(batch=4, seqlens=(20, 7, 0, 31), tokens=(1, 5, 3, 0), causal=True),
    "left padding": dict(leftpad=(3, 7), tokens=2, causal=True),
    "everything padded": dict(leftpad=(20, 0), tokens=2),
    "rows": dict(batch_idx=(3, 1), tokens=2),
    "rows read twice": dict(batch_idx=(1, 1), tokens=2),
    "new keys": dict(new=3, tokens=3, causal=True),
    "new keys for an int": dict(new=3, tokens=3, causal=True, seqlens=4),
    "new keys, other queries": dict(new=4, tokens=1),
    "new keys fill the cache": dict(new=12, tokens=2, seqlens=(20, 7)),
    "no new keys": dict(new=0, tokens=2),
    "packed new keys": dict(batch=3, seqlens=(20, 7, 0), new=(3, 0, 2), tokens=2, causal=True),
    "packed both": dict(batch=3, seqlens=(20, 7, 0), new=(3, 1, 2), tokens=(3, 1, 2), causal=True),
    "padded new keys": dict(seqlens=(0, 0), new=6, tokens=6, leftpad=(2, 0), causal=True),
    "rows for new keys": dict(batch_idx=(3, 0), new=2, tokens=2, causal=True),
    "rotary": dict(new=3, tokens=3, causal=True, rotary="interleaved"),
    "rotary for an int": dict(new=3, tokens=3, causal=True, rotary="interleaved", seqlens=4),
    "rotary in halves": dict(new=3, tokens=3, causal=True, rotary="halves", rotary_dim=10),
    "rotary of one position": dict(new=3, tokens=3, rotary="halves", seqlens=6),
    "rotary, packed": dict(new=(3, 1), tokens=(2, 4), window=(4, 0), rotary="interleaved", rotary_dim=8),
    "rotary of q alone": dict(tokens=3, causal=True, rotary="interleaved"),
    "rotary of packed q alone": dict(tokens=(3, 1), causal=True, rotary="halves"),
    "rotary from elsewhere": dict(new=2, tokens=2, causal=True, rotary="halves", rotary_seqlens=(1, 40)),
    "rotary in float32": dict(new=2, tokens=2, causal=True, rotary="halves", rotary_dtype=F32),
    "rotary and padding": dict(new=2, tokens=2, causal=True, rotary="interleaved", leftpad=(4, 1)),
    "splits": dict(num_splits=3, tokens=2),
    "split size": dict(split_size=128, tokens=2, capacity=300, seqlens=(290, 129)),
    "no sequence": dict(batch=0, seqlens=(), tokens=1, new=1),
    "no query": dict(tokens=0, new=2),
    "no packed query": dict(tokens=(0, 0), new=(2, 1)),
    "no room at all": dict(capacity=0, seqlens=0),
}
FEATURE_IDS = list(FEATURES)


@pytest.mark.parametrize("layout", ["plain", "strided"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", FEATURE_IDS)
def test_features(name, dtype, layout):
    case = DecodeCase(**FEATURES[name], dtype=dtype, layout=layout)
    inputs = make_decode(case)
    assert_decode_right(case, inputs, *run_decode(inputs))


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [n for n in FEATURE_IDS if "rows" not in n and n != "no room at all"])
def test_pages(name, dtype, page_size):
    case = DecodeCase(**FEATURES[name], dtype=dtype, page_size=page_size)
    inputs = make_decode(case)
    assert_decode_right(case, inputs, *run_decode(inputs))


def test_long_caches_are_taken_in_blocks(monkeypatch):
    monkeypatch.setattr(reference_decode, "MAX_KEYS", 100)
    for name in ("one query each", "window of one query", "softcap of one query"):
        case = DecodeCase(**FEATURES[name], dtype=F32)
        inputs = make_decode(case)
        assert_decode_right(case, inputs, *run_decode(inputs))


# Random cases


@st.composite
def cases(draw):
    batch = draw(st.integers(1, 4))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(batch))

    capacity, kv_heads = draw(st.sampled_from((5, 16, 40, 130))), draw(st.integers(1, 3))
    page_size = draw(st.sampled_from((0, 0, 1, 3, 16, 64)))
    new = draw(st.sampled_from((None, "same", "packed")))
    if new is not None:
        new = draw(st.integers(0, 4)) if new == "same" else each(0, 4)
    most = max(new) if isinstance(new, tuple) else new or 0
    seqlens = draw(st.sampled_from(("int", "each", None if new is None else "each")))
    seqlens = (
        draw(st.integers(0, capacity - most)) if seqlens == "int" else seqlens and each(0, capacity - most)
    )
    lengths = DecodeCase(batch=batch, capacity=capacity, page_size=page_size, seqlens=seqlens, new=new).keys
    rotary = draw(st.sampled_from((None, None, "interleaved", "halves")))
    left, right = draw(st.sampled_from(((-1, -1), (-1, -1), (4, 0), (0, 3), (-1, 2), (7, -1))))
    causal = draw(st.booleans())
    leftpad = None
    if draw(st.booleans()) and seqlens is not None:
        leftpad = tuple(draw(st.integers(0, min(n, 9))) for n in lengths)
    rows = not page_size and draw(st.booleans())
    return DecodeCase(
        batch=batch,
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from((8, 16))),
        head_dim_v=draw(st.sampled_from((None, 4, 24))),
        capacity=capacity,
        seqlens=seqlens,
        tokens=draw(st.integers(0, 5)) if draw(st.booleans()) else each(0, 5),
        new=new,
        page_size=page_size,
        causal=causal,
        window=(left, min(right, 0)) if causal else (left, right),
        softcap=draw(st.sampled_from((0.0, 0.0, 2.0))),
        dtype=draw(st.sampled_from((F64, F32, BF16, F16))),
        leftpad=leftpad,
        batch_idx=tuple(draw(st.permutations(range(batch + 2)))[:batch]) if rows else None,
        rotary=rotary,
        rotary_dim=draw(st.sampled_from((None, 2, 6))) if rotary else None,
        rotary_seqlens=each(0, 9) if rotary and draw(st.booleans()) else None,
        layout=draw(st.sampled_from(("plain", "strided"))),
    )


@settings(max_examples=50)
@given(cases(), st.integers(0, 2**31))
def test_random_cases(case, seed):
    inputs = make_decode(case, seed=seed)
    # float32: plain torch is sometimes exact by luck in a few numbers
    assert_decode_right(case, inputs, *run_decode(inputs), 2.0 if case.dtype.itemsize == 2 else 4.0)


@settings(max_examples=25)
@given(cases(), st.integers(0, 2**31))
def test_a_cache_written_token_by_token_is_the_same(case, seed):
    """Appending is sequential: many calls with one new token leave the bits that one call leaves."""
    if case.new is None or isinstance(case.new, tuple) or case.rotary_seqlens:
        return
    whole, steps = make_decode(case, seed=seed), make_decode(case, seed=seed)
    run_decode(whole)
    first, new = steps.tensors["cache_seqlens"], (steps.tensors["k"], steps.tensors["v"])
    # the last step has as many queries as all had, and so asks for later positions
    tables = {name: x for name, x in steps.tensors.items() if name.startswith("rotary_") and x is not None}
    tables = {name: torch.nn.functional.pad(x, (0, 0, 0, case.new)) for name, x in tables.items()}
    for t in range(case.new):
        now = dict(k=new[0][:, t : t + 1], v=new[1][:, t : t + 1], cache_seqlens=first + t, **tables)
        run_decode(steps, **now, cache_leftpad=None)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(bits(whole.tensors[name]), bits(steps.tensors[name]))


# Agreement with the other functions


def test_a_full_cache_is_flash_attn_func():
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 8)
    options = dict(causal=True, softcap=2.0, softmax_scale=0.4)
    expected = tandem_attn.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    found = flash_attn_with_kvcache(q, k, v, **options, return_softmax_lse=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_decoding_is_prefilling():
    """Token by token from an empty cache, rotary included: the rows of one causal call."""
    torch.manual_seed(3)
    q, k, v = torch.randn(2, 12, 4, 16), torch.randn(2, 12, 2, 16), torch.randn(2, 12, 2, 16)
    angles = torch.rand(12, 8) * 6
    tables = dict(rotary_cos=angles.cos(), rotary_sin=angles.sin(), causal=True)
    caches = [torch.full((2, 16, 2, 16), math.nan) for _ in range(4)]
    whole = flash_attn_with_kvcache(q, *caches[:2], k, v, cache_seqlens=0, **tables)
    table = torch.tensor([[1, 0], [3, 2]], dtype=torch.int32)
    pages = [x.reshape(4, 8, 2, 16) for x in caches[2:]]
    for t in range(12):
        now = slice(t, t + 1)
        out = flash_attn_with_kvcache(
            q[:, now], *pages, k[:, now], v[:, now], cache_seqlens=t, page_table=table, **tables
        )
        torch.testing.assert_close(out, whole[:, now])


def test_q_k_and_v_are_left_alone():
    case = DecodeCase(**FEATURES["rotary"], dtype=F32)
    inputs = make_decode(case)
    before = {name: inputs.tensors[name].clone() for name in "qkv"}
    run_decode(inputs)
    for name, x in before.items():
        assert torch.equal(inputs.tensors[name], x)


@pytest.mark.parametrize("name", ["plain", "packed queries", "rotary", "no query"])
def test_out_is_written_and_returned(name):
    case = DecodeCase(**FEATURES[name], dtype=F32)
    expected, _ = run_decode(make_decode(case))
    out = torch.full_like(expected, math.nan)
    inputs = make_decode(case)
    found, _ = run_decode(inputs, out=out, workspace=tandem_attn.decode_workspace(**inputs.tensors))
    assert found is out
    declared = slice(0, sum(case.tokens)) if isinstance(case.tokens, tuple) else slice(None)
    assert torch.equal(out[declared], expected[declared])


def test_autocast_leaves_the_cache_alone():
    case = DecodeCase(**FEATURES["new keys"], dtype=BF16)
    inputs = make_decode(case)
    wide = {name: inputs.tensors[name].float() for name in "qkv"}
    with torch.autocast("cpu", dtype=F16):
        out, lse = run_decode(inputs, **wide)
        with pytest.raises(TypeError, match=r"k_cache is of dtype torch.bfloat16"):
            run_decode(inputs, q=inputs.tensors["q"].double())
    assert_decode_right(case, inputs, out, lse)


# Parts of the keys


def parts_of(q, k, v, cuts, **options):
    """(out, lse) of q and each piece of the keys; the last query sees all, so no mask moves."""
    edges = [0, *sorted(cuts), k.shape[1]]
    for start, stop in itertools.pairwise(edges):
        piece = slice(start, stop)
        yield flash_attn_with_kvcache(q, k[:, piece], v[:, piece], **options, return_softmax_lse=True)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 50), max_size=5), st.sampled_from((F64, F32)), st.booleans())
def test_parts_merge_to_the_whole(cuts, dtype, packed):
    q = torch.randn(2, 3, 4, 16, dtype=dtype)
    k, v = torch.randn(2, 50, 2, 16, dtype=dtype), torch.randn(2, 50, 2, 8, dtype=dtype)
    expected = flash_attn_with_kvcache(q, k, v, softcap=3.0, return_softmax_lse=True)
    states = list(parts_of(q, k, v, cuts, softcap=3.0))
    if packed:
        states = [(out.flatten(0, 1), lse.transpose(0, 1).flatten(1)) for out, lse in states]
        expected = (expected[0].flatten(0, 1), expected[1].transpose(0, 1).flatten(1))
    for a, b in zip(merge_attention_states(*states), expected, strict=True):
        assert a.shape == b.shape and a.is_contiguous()
        torch.testing.assert_close(a, b)


def test_a_causal_window_merges_from_a_prefix_and_the_rest():
    """A cascade: the shared prefix without a mask, the rest causal."""
    q, k, v = (torch.randn(1, n, 2, 16, dtype=F64) for n in (4, 20, 20))
    prefix = flash_attn_with_kvcache(q, k[:, :16], v[:, :16], return_softmax_lse=True)
    rest = flash_attn_with_kvcache(q, k[:, 16:], v[:, 16:], causal=True, return_softmax_lse=True)
    whole = flash_attn_with_kvcache(q, k, v, causal=True, return_softmax_lse=True)
    for a, b in zip(merge_attention_states(prefix, rest), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_merging_is_differentiable():
    leaves = [torch.randn(1, n, 2, 8, dtype=F64, requires_grad=True) for n in (3, 9, 9)]
    q, k, v = leaves
    pieces = (slice(0, 4), slice(4, 4), slice(4, 9))
    states = [tandem_attn.flash_attn_func(q, k[:, i], v[:, i], return_attn_probs=True) for i in pieces]
    whole = tandem_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    merged = merge_attention_states(*states)
    wanted = torch.autograd.grad(whole[0].square().sum() + whole[1].sum(), leaves)
    for a, b in zip(
        torch.autograd.grad(merged[0].square().sum() + merged[1].sum(), leaves), wanted, strict=True
    ):
        torch.testing.assert_close(a, b)


@settings(max_examples=40)
@given(
    st.integers(1, 9), st.sampled_from((F64, F32, BF16, F16)), st.booleans(), st.data()
)  # fmt: skip
def test_combine(splits, dtype, packed, data):
    shape = (splits, 3, 2) if packed else (splits, 2, 3, 2)
    out = torch.randn(*shape, 5, dtype=dtype)
    lse = 4 * torch.randn(shape, dtype=F64 if dtype == F64 else F32)
    for _ in range(data.draw(st.integers(0, 8))):  # parts that saw nothing hold anything
        place = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        lse[place], out[place] = -math.inf, data.draw(st.sampled_from((math.nan, math.inf, 0.0)))
    wanted = data.draw(st.sampled_from((None, F32, BF16)))
    found, found_lse = flash_attn_combine(out, lse, out_dtype=wanted)
    assert found.dtype == (wanted or dtype) and found_lse.dtype == lse.dtype
    parts = torch.where(lse[..., None].isneginf(), 0.0, out.double())
    exact_lse = lse.double().logsumexp(0)
    weights = torch.exp(lse.double() - torch.where(exact_lse.isneginf(), 0.0, exact_lse))
    exact = (weights[..., None] * parts).sum(0)
    low = (weights[..., None].to(found.dtype) * parts.to(found.dtype)).sum(0)
    assert_within_budget(found, exact, low, "out")
    torch.testing.assert_close(found_lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


def test_combine_where_every_part_is_empty():
    out, lse = torch.full((3, 2, 4, 2, 8), math.nan), torch.full((3, 2, 4, 2), -math.inf)
    memory = torch.full((2, 4, 2, 8), math.nan)
    found, found_lse = flash_attn_combine(out, lse, out=memory)
    assert found is memory and bool((found == 0).all()) and bool((found_lse == -math.inf).all())
    state = (out[0], lse[0].mT)
    merged, merged_lse = merge_attention_states(state, state)
    assert bool((merged == 0).all()) and bool((merged_lse == -math.inf).all())


def test_combine_far_apart_and_far_from_zero():
    out, lse = torch.randn(2, 1, 1, 1, 4), torch.tensor([1e4, -1e4]).view(2, 1, 1, 1)
    found, found_lse = flash_attn_combine(out, lse)
    assert torch.equal(found, out[0]) and float(found_lse) == 1e4


def test_a_merge_of_one_is_itself():
    out, lse = torch.randn(2, 3, 4, 8, dtype=BF16), torch.randn(2, 4, 3)
    merged, merged_lse = merge_attention_states((out, lse))
    assert torch.equal(merged, out)
    torch.testing.assert_close(merged_lse, lse)
    wide = merge_attention_states((out, lse), (out.float(), lse.double()))
    assert wide[0].dtype == BF16 and wide[1].dtype == F64
