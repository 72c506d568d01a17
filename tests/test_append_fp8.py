"""Writing into an FP8 cache: factors and numbers against a model in plain floats, and how they age."""

import math

import pytest
import torch
from append_fp8_model import BLOCK, E4M3, Row, nearest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_attn import SCALE_BLOCK, flash_attn_with_kvcache, ops_decode
from tandem_attn.quant import scales
from tandem_attn.testing.decode_fp8_inputs import (
    Fp8Case,
    assert_same_cache,
    block_factors,
    e4m3,
    make_fp8,
    on_cpu,
    restored,
)
from tandem_attn.testing.decode_inputs import DecodeCase, bits, rotated, run_decode, slots_of

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
HEADS, DIM, DIM_V = 2, 8, 4


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def empty(rows: int, slots: int) -> dict:
    """An FP8 cache that holds NaN, and its factors, which are NaN."""
    blocks = -(-slots // SCALE_BLOCK)
    found = {}
    for name, dim in (("k", DIM), ("v", DIM_V)):
        found[f"{name}_cache"] = torch.full((rows, slots, HEADS, dim), math.nan).to(E4M3)
        found[f"{name}_descale"] = torch.full((rows, blocks, HEADS), math.nan)
    return found


def append(cache: dict, k, v, lengths, **more) -> None:
    """Append k and v (batch, n, heads, dim); attention itself is one query's."""
    q = torch.zeros(len(lengths), 1, HEADS, DIM, dtype=BF16)
    if k.dtype != E4M3:
        q = q.to(k.dtype)
    flash_attn_with_kvcache(q, k=k, v=v, cache_seqlens=int32(*lengths), **cache, **more)


def tokens(batch: int, n: int, spread: float = 3.0, dtype=BF16):
    """(k, v) of very different sizes."""
    made = []
    for dim in (DIM, DIM_V):
        x = torch.randn(batch, n, HEADS, dim) * torch.exp(spread * torch.randn(batch, n, HEADS, 1))
        made.append(x.clamp(-3e4, 3e4).to(dtype))
    return made


def numbers(cache: dict, name: str) -> torch.Tensor:
    """float32 (rows, slots, heads, dim): what a cache holds."""
    held, factors = cache[f"{name}_cache"], cache[f"{name}_descale"]
    return held.float() * factors.repeat_interleave(SCALE_BLOCK, 1)[:, : held.shape[1], :, None]


# Against the model


def test_model_rounds_as_torch_does():
    x = torch.cat([torch.randn(3000) * torch.exp(4 * torch.randn(3000)), torch.tensor([0.0, -0.0, 500.0])])
    middles = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    x = torch.cat([x, (middles[1:] + middles[:-1]) / 2])
    assert e4m3(x).tolist() == [nearest(value) for value in x.tolist()]


def model_of(cache: dict) -> dict:
    """A Row for every head of every row of a cache."""
    rows = {}
    for name in "kv":
        held, factors = cache[f"{name}_cache"], cache[f"{name}_descale"]
        for row in range(len(held)):
            for h in range(HEADS):
                of = held[row, :, h].float().tolist()
                rows[name, row, h] = Row(len(of), 0, of, factors[row, :, h].tolist())
    return rows


def as_cache(rows: dict, cache: dict) -> dict:
    """The inverse, in tensors like those of `cache`."""
    found = {name: x.clone() for name, x in cache.items()}
    for (name, row, h), one in rows.items():
        found[f"{name}_cache"][row, :, h] = torch.tensor(one.held).to(E4M3)
        found[f"{name}_descale"][row, :, h] = torch.tensor(one.factors)
    return found


def append_to_model(rows: dict, k, v, lengths, table=None, page_size: int = 0, capacity: int = 10**9) -> None:
    """The same tokens, a block at a time."""
    for name, x in (("k", k), ("v", v)):
        for b, length in enumerate(lengths):
            places: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for i in range(min(x.shape[1], max(capacity - length, 0))):
                slot = length + i
                row, within = (table[b][slot // page_size], slot % page_size) if page_size else (b, slot)
                places.setdefault((row, within // BLOCK), []).append((within, i))
            for (row, _), mine in places.items():
                for h in range(HEADS):
                    rows[name, row, h].append(mine[0][0], [x[b, i, h].tolist() for _, i in mine])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("page_size", [0, 1, 16, 64, 100, 128, 129, 192, 256])
def test_factors_and_numbers_are_those_of_the_model(page_size, dtype):
    """Calls of one and of many tokens, ragged, over ends of blocks and pages."""
    capacity = 400
    table, arguments, rows = None, {}, 2
    if page_size:
        each = -(-capacity // page_size)
        order = torch.randperm(2 * each).view(2, each)
        table, rows = order.tolist(), 2 * each
        arguments = dict(page_table=order.int())
    cache = empty(rows, page_size or capacity)
    model = model_of(cache)
    lengths = [0, 0]
    for step, n in enumerate((3, 1, 1, 120, 1, 5, 130, 1)):
        k, v = tokens(2, n, dtype=dtype)
        if step == 4:
            k[:], v[:] = 0.0, 0.0
        append(cache, k, v, lengths, **arguments)
        append_to_model(model, k, v, lengths, table, page_size)
        assert_same_cache(cache, as_cache(model, cache), f"after {n} tokens at {lengths}")
        lengths = [lengths[0] + n, lengths[1] + max(n - 1, 0)]  # of the second a token is forgotten


def test_a_block_is_begun_anew_by_its_first_slot():
    cache = empty(1, 256)
    k, v = tokens(1, 130)
    append(cache, 1000 * k, 1000 * v, [0])
    append(cache, k, v, [0])
    fresh = empty(1, 256)
    append(fresh, k, v, [0])
    assert_same_cache(cache, fresh)
    append(cache, 1000 * k[:, :1], v[:, :1], [129])
    assert torch.equal(cache["k_descale"][:, 0], fresh["k_descale"][:, 0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_nan_of_its_block(monkeypatch, bad):
    monkeypatch.setattr(ops_decode, "_looks", lambda spec: False)
    cache = empty(1, 256)
    k, v = tokens(1, 130)
    append(cache, k, v, [0])
    k_bad = k[:, :1].clone()
    k_bad[0, 0, 1, 3] = bad
    model = model_of(cache)
    for length in (130, 131):  # and so it stays
        append(cache, k_bad if length == 130 else k[:, :1], v[:, :1], [length])
        append_to_model(model, k_bad if length == 130 else k[:, :1], v[:, :1], [length])
        found = numbers(cache, "k")
        assert found[0, 128 : length + 1, 1].isnan().all()
        assert found[0, 128 : length + 1, 0].isfinite().all() and found[0, :128].isfinite().all()
        assert_same_cache(cache, as_cache(model, cache))
    append(cache, k[:, :1], v[:, :1], [128])
    assert numbers(cache, "k")[0, 128].isfinite().all()


def test_factors_that_are_no_powers_of_two_stay_while_they_suffice():
    cache = empty(1, 128)
    k, v = tokens(1, 5, spread=0.0)
    append(cache, k, v, [0])
    for name in "kv":
        cache[f"{name}_descale"].fill_(0.3)
    model = model_of(cache)
    for length, size in ((5, 1.0), (10, 1000.0), (15, 1.0)):
        append(cache, size * k, size * v, [length])
        append_to_model(model, size * k, size * v, [length])
        assert_same_cache(cache, as_cache(model, cache))
        grown = cache["k_descale"] != 0.3
        assert grown.all() if length > 5 else not grown.any()


def test_the_smallest_and_the_largest():
    """Zeros and what is next to them; the largest number that each power of two takes, and one above."""
    for values, factor in (
        ((0.0, -0.0), 1.0),
        ((2.0**-120, 0.0), 1.0),
        ((448.0, -3.0), 1.0),
        ((450.0, -3.0), 2.0),
        ((7.0, 1.0), 2.0**-6),
        ((7.03125, 1.0), 2.0**-5),
        ((3.0e38, 0.0), 2.0**120),
    ):
        cache = empty(1, 4)
        k, v = torch.zeros(1, 2, HEADS, DIM, dtype=BF16), torch.zeros(1, 2, HEADS, DIM_V, dtype=BF16)
        k[0, :, 0, 0] = torch.tensor(values)
        append(cache, k, v, [0])
        assert cache["k_descale"][0, 0].tolist() == [factor, 1.0], values
        assert cache["v_descale"][0, 0].tolist() == [1.0, 1.0]
        if factor <= 2.0 and values[0] > 1.0:
            assert numbers(cache, "k")[0, :2, 0, 0].tolist() == pytest.approx(values, rel=2**-4)
    assert torch.equal(scales(torch.tensor([448.0, 450.0]), powers=True)[0], torch.tensor([1.0, 2.0]))


# How numbers age


@st.composite
def lives(draw):
    """(spread of sizes, tokens of each call)."""
    return draw(st.floats(0.0, 3.0)), draw(st.lists(st.integers(1, 90), min_size=1, max_size=9))


@settings(max_examples=30)
@given(lives(), st.sampled_from((0, 32, 128, 200)), st.integers(0, 2**31))
def test_what_was_written_is_there_up_to_rounding(life, page_size, seed):
    """Relative 2**-4 for a rounding to e4m3; near zero half of the smallest number 2**-9, of a unit that is
    a power of two larger with each growth: their sum is less than 2**-9 of the last."""
    spread, counts = life
    torch.manual_seed(seed)
    total = sum(counts)
    cache, arguments = empty(1, total), {}
    if page_size:
        pages = -(-total // page_size)
        cache, arguments = empty(pages, page_size), dict(page_table=torch.randperm(pages)[None].int())
    written, length = {"k": [], "v": []}, 0
    for n in counts:
        k, v = tokens(1, n, spread)
        append(cache, k, v, [length], **arguments)
        written["k"].append(k[0])
        written["v"].append(v[0])
        length += n
    for name, parts in written.items():
        wanted, found = torch.cat(parts).double(), numbers(cache, name).double()
        units = cache[f"{name}_descale"].repeat_interleave(SCALE_BLOCK, 1)[:, : found.shape[1], :, None]
        if page_size:
            order = arguments["page_table"][0].long()
            found, units = found[order], units[order]
        found, units = (x.flatten(0, 1)[:total].double() for x in (found, units))
        error = (found - wanted).abs()
        assert bool((error <= wanted.abs() * 2.0**-4 + units * 2.0**-9).all())
        assert bool((units == torch.exp2(units.log2().round())).all())


@pytest.mark.parametrize("page_size", [0, 64, 192])
def test_token_by_token_gives_the_same_factors_as_at_once(page_size):
    """And numbers that were rounded more than once differ by what is below the smallest of them."""
    n, arguments = 200, {}
    k, v = tokens(2, n)
    caches = [empty(2, n) for _ in "ab"]
    if page_size:
        pages = -(-n // page_size)
        caches = [empty(2 * pages, page_size) for _ in "ab"]
        arguments = dict(page_table=torch.arange(2 * pages).view(2, pages).int())
    append(caches[0], k, v, [0, 0], **arguments)
    for t in range(n):
        append(caches[1], k[:, t : t + 1], v[:, t : t + 1], [t, t], **arguments)
    for name in "kv":
        whole, steps = (cache[f"{name}_descale"] for cache in caches)
        torch.testing.assert_close(whole, steps, rtol=0, atol=0, equal_nan=True)
        one, other = (numbers(cache, name).nan_to_num(0.0) for cache in caches)
        units = whole.nan_to_num(0.0).repeat_interleave(SCALE_BLOCK, 1)[:, : one.shape[1], :, None]
        normal = one.abs() >= units * 2.0**-6
        assert torch.equal(one[normal], other[normal])
        assert bool(((one - other).abs() <= units * 2.0**-9).all())


# Factors of sequences


@pytest.mark.parametrize("dtype", [BF16, F16, E4M3], ids=str)
@pytest.mark.parametrize("page_size", [0, 16])
def test_factors_of_sequences_are_only_read(page_size, dtype):
    case = DecodeCase(
        new=5, tokens=1, seqlens=(3, 16), page_size=page_size, dtype=BF16 if dtype == E4M3 else dtype
    )
    fp8 = Fp8Case(case, "sequence", fp8_new=dtype == E4M3)
    inputs = make_fp8(fp8)
    before = {name: x.clone() for name, x in inputs.tensors.items() if isinstance(x, torch.Tensor)}
    run_decode(inputs)
    for name in "kv":
        factors = inputs.tensors[f"{name}_descale"]
        assert torch.equal(factors, before[f"{name}_descale"])
        cache, old = inputs.tensors[f"{name}_cache"], before[f"{name}_cache"]
        for b in range(2):
            first = case.each("seqlens")[b]
            where = slots_of(case, inputs.sequences[b], range(first, first + 5))
            new = inputs.tensors[name][b]
            wanted = new if dtype == E4M3 else e4m3(new.float() / factors[b][:, None])
            assert torch.equal(cache[where].view(torch.uint8), wanted.view(torch.uint8))
            old[where] = cache[where]
        assert torch.equal(cache.view(torch.uint8), old.view(torch.uint8)), "nothing else is written"


def test_factors_of_sequences_saturate():
    case = DecodeCase(new=2, tokens=1, seqlens=(3, 16), dtype=BF16)
    inputs = make_fp8(Fp8Case(case, "sequence"))
    inputs.tensors["k"][:] = 1000.0 * inputs.tensors["k"].sign()
    run_decode(inputs)
    found = inputs.tensors["k_cache"][0, 3:5].float()
    assert torch.equal(found, 448.0 * inputs.tensors["k"][0].float().sign())


def test_expanded_factors_of_sequences():
    case = DecodeCase(new=2, tokens=1, dtype=BF16)
    inputs = make_fp8(Fp8Case(case, "sequence"))
    one = {name: torch.full((), 0.02).expand(2, 2) for name in ("k_descale", "v_descale")}
    other = on_cpu(inputs)
    found = run_decode(inputs, **one)
    expected = run_decode(other, **{name: x.contiguous() for name, x in one.items()})
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(bits(found[0]), bits(expected[0]))


# Places and rotation


@pytest.mark.parametrize("rotary", ["interleaved", "halves"])
@pytest.mark.parametrize("each", ["block", "sequence"])
def test_keys_are_rotated_and_rounded_once(each, rotary):
    case = DecodeCase(new=6, tokens=1, rotary=rotary, rotary_dim=8, rotary_dtype=F32, dtype=BF16)
    inputs = make_fp8(Fp8Case(case, each))
    run_decode(inputs)
    for b, s in enumerate(inputs.sequences):
        first = case.each("seqlens")[b]
        turned = rotated(case, inputs, s.k_new, first + torch.arange(6), F32)
        slots = range(first, first + 6)
        found = restored(inputs, case, "k", b, slots)
        factor = inputs.tensors["k_descale"][b, 0] if each == "block" else inputs.tensors["k_descale"][b]
        # sums of products round otherwise: a step of e4m3, in very few
        exact = e4m3(turned / factor[:, None]).double() * factor[:, None].double()
        assert (found != exact).double().mean() < 0.01
        torch.testing.assert_close(found, exact, rtol=2**-3, atol=2**-9 * float(factor.max()))


@pytest.mark.parametrize("facts", [
    dict(new=3, batch_idx=(3, 0)),
    dict(new=(2, 0, 5), batch=3, seqlens=(20, 7, 0), tokens=(1, 2, 0)),
    dict(new=3, layout="strided"),
    dict(new=3, leftpad=(4, 7)),
    dict(new=(9, 1), page_size=5, layout="strided"),
    dict(new=0),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_places(facts, dtype):
    """Tokens land in their slots, with the least factors, and nothing else changes."""
    case = DecodeCase(**dict(tokens=1, dtype=dtype) | facts)
    inputs = make_fp8(Fp8Case(case))
    before = on_cpu(inputs).tensors
    run_decode(inputs)
    for name in "kv":
        held = numbers({n: inputs.tensors[n] for n in (f"{name}_cache", f"{name}_descale")}, name)
        old = numbers({n: before[n] for n in (f"{name}_cache", f"{name}_descale")}, name)
        for b, s in enumerate(inputs.sequences):
            first = case.each("seqlens")[b]
            where = slots_of(case, s, range(first, case.keys[b]))
            new = getattr(s, f"{name}_new").float()
            torch.testing.assert_close(held[where], new, rtol=2**-4, atol=2**-6)
            old[where] = held[where]
        torch.testing.assert_close(held, old, rtol=0, atol=2**-6, equal_nan=True)
        least = block_factors(held)
        factors = inputs.tensors[f"{name}_descale"]
        assert bool((factors.isnan() == least.isnan()).all())
        declared = ~least.isnan()
        assert bool((factors[declared] >= least[declared]).all())
        assert bool((factors[declared] <= 2 * least[declared]).all())


def test_tokens_without_room_do_not_count(monkeypatch):
    monkeypatch.setattr(ops_decode, "_looks", lambda spec: False)
    for page_size in (0, 10):
        cache, arguments = empty(2, 20), {}
        if page_size:
            cache, arguments = empty(4, 10), dict(page_table=int32(3, 1, 0, 2).view(2, 2))
        k, v = tokens(2, 15, spread=0.0)
        append(cache, k, v, [0, 0], **arguments)
        model = model_of(cache)
        k, v = tokens(2, 9, spread=0.0)
        k[:, 5:] *= 10000.0
        append(cache, k, v, [15, 40], **arguments)
        table = arguments["page_table"].tolist() if page_size else None
        append_to_model(model, k, v, [15, 40], table, page_size, capacity=20)
        assert_same_cache(cache, as_cache(model, cache))
