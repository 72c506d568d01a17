"""The reference over an FP8 cache: features against float64 over what it holds; what must not count."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_decode_reference import FEATURES, cases

import tandem_attn
from tandem_attn import SCALE_BLOCK, flash_attn_with_kvcache
from tandem_attn.quant import quantized, rows_of
from tandem_attn.testing.decode_fp8_inputs import EACH, Fp8Case, assert_fp8_right, e4m3, make_fp8, on_cpu
from tandem_attn.testing.decode_inputs import DecodeCase, bits, run_decode, slots_of

F16, BF16, F32, E4M3 = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn
PAGED = [n for n in FEATURES if "rows" not in n and n != "no room at all"]
NOT_ROTATED = [n for n in FEATURES if "rotary" not in n]


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def check(fp8: Fp8Case, seed: int = 0, factor: float = 2.0) -> None:
    inputs = make_fp8(fp8, seed=seed)
    assert_fp8_right(fp8, inputs, *run_decode(inputs), factor)


@pytest.mark.parametrize("layout", ["plain", "strided"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("each", EACH)
@pytest.mark.parametrize("name", FEATURES)
def test_features(name, each, dtype, layout):
    check(Fp8Case(DecodeCase(**FEATURES[name], dtype=dtype, layout=layout), each))


@pytest.mark.parametrize("page_size", [1, 16, 64, 128, 150])
@pytest.mark.parametrize("each", EACH)
@pytest.mark.parametrize("name", PAGED)
def test_pages(name, each, page_size):
    check(Fp8Case(DecodeCase(**FEATURES[name], dtype=BF16, page_size=page_size), each))


@pytest.mark.parametrize("fp8", [dict(), dict(q_factors=False), dict(each="sequence", fp8_new=True)], ids=str)
@pytest.mark.parametrize("name", NOT_ROTATED)
def test_fp8_queries(name, fp8):
    check(Fp8Case(DecodeCase(**FEATURES[name], dtype=BF16), fp8_q=True, **fp8))


@pytest.mark.parametrize("page_size", [0, 128, 256, 384, 200])
@pytest.mark.parametrize("tokens", [1, 5])
def test_many_blocks(page_size, tokens):
    check(
        Fp8Case(
            DecodeCase(
                capacity=1000, seqlens=(900, 385), tokens=tokens, new=tokens, page_size=page_size, dtype=BF16,
                causal=True, leftpad=(140, 0),
            )
        )
    )  # fmt: skip


@settings(max_examples=40)
@given(cases(), st.sampled_from(EACH), st.booleans(), st.integers(0, 2**31))
def test_random_cases(case, each, fp8_q, seed):
    assume(case.dtype.itemsize == 2)
    check(Fp8Case(case, each, fp8_q and not case.rotary), seed)


# Exactly


@pytest.mark.parametrize("page_size", [0, 16, 200])
@pytest.mark.parametrize("q8", [False, True])
@pytest.mark.parametrize("each", EACH)
def test_one_key_wins_exactly(each, q8, page_size):
    """Another factor for each block, or sequence: any wrong one shows."""
    n, kv_heads, dim = 600, 2, 16
    rows = 2 if not page_size else 2 * -(-n // page_size)
    slots = page_size or n
    generator = torch.Generator().manual_seed(1)
    k = ((torch.arange(n)[:, None] >> (torch.arange(dim) % 10)) & 1) * 2.0 - 1.0
    k = e4m3(k).repeat(2, 1, 1)[:, :, None].expand(2, n, kv_heads, dim)
    v = e4m3(torch.randint(-16, 17, (2, n, kv_heads, dim), generator=generator).float())
    table = torch.randperm(rows, generator=generator).int().view(2, -1)
    shape = (rows, -(-slots // SCALE_BLOCK), kv_heads) if each == "block" else (2, kv_heads)
    factors = torch.exp2(torch.randint(-3, 4, shape, generator=generator).float())
    caches, call = [], {}
    for x in (k, v):
        cache = torch.zeros(rows, slots, kv_heads, dim).to(E4M3)
        for b in range(2):
            slot = torch.arange(n)
            row = table[b][slot // page_size].long() if page_size else torch.full((n,), b)
            cache[row, slot % slots] = x[b]
        caches.append(cache)
    if page_size:
        call["page_table"] = table
    wanted = torch.tensor([[3, 599], [130, 200]])
    q = 16.0 * k[torch.arange(2)[:, None], wanted].float().repeat_interleave(2, 2)
    q = e4m3(q) if q8 else q.to(BF16)
    ones = torch.ones_like(factors)
    out = flash_attn_with_kvcache(
        q, *caches, cache_seqlens=n, k_descale=ones, v_descale=factors, softmax_scale=8.0, **call
    )
    if each == "block":
        slot = wanted % slots
        row = (
            torch.gather(table.long(), 1, wanted // page_size)
            if page_size
            else torch.arange(2)[:, None].expand(2, 2)
        )
        unit = factors[row, slot // SCALE_BLOCK]
    else:
        unit = factors[:, None].expand(2, 2, kv_heads)
    expected = v[torch.arange(2)[:, None], wanted].float() * unit[..., None]
    assert out.dtype == BF16 and torch.equal(out.float(), expected.repeat_interleave(2, 2))


def test_factors_of_keys_and_queries_scale_scores():
    """k_descale and q_descale are what softmax_scale could be."""
    case = DecodeCase(dtype=BF16, tokens=2)
    inputs = make_fp8(Fp8Case(case, "sequence", fp8_q=True))
    inputs.tensors["k_descale"].fill_(0.5)
    inputs.tensors["q_descale"].fill_(0.125)
    one = run_decode(inputs)
    other = dict(q_descale=None, k_descale=torch.ones(2, 2), softmax_scale=0.25 / 16)
    for a, b in zip(one, run_decode(inputs, **other), strict=True):
        assert torch.equal(a, b)


def test_one_factor_for_all_blocks_is_one_for_sequences():
    case = DecodeCase(dtype=BF16, tokens=2, capacity=300, seqlens=(290, 129))
    inputs = make_fp8(Fp8Case(case, "sequence"))
    expected = run_decode(inputs)
    blocks = {n: inputs.tensors[n][:, None].expand(2, 3, 2) for n in ("k_descale", "v_descale")}
    for a, b in zip(run_decode(inputs, **blocks), expected, strict=True):
        assert torch.equal(a, b)


def test_keys_of_quantize_qkv_are_a_cache():
    """Its factors of keys, in the cache's order of dimensions."""
    q = torch.randn(2, 3, 4, 32, dtype=BF16)
    k, v = torch.randn(2, 256, 2, 32, dtype=BF16), torch.randn(2, 256, 2, 32, dtype=BF16)
    held, factors = zip(
        *(quantized(x.float(), rows_of(x), SCALE_BLOCK, "block") for x in (k, v)), strict=True
    )
    descales = dict(zip(("k_descale", "v_descale"), (x.transpose(1, 2) for x in factors), strict=True))
    out = flash_attn_with_kvcache(q, *held, causal=True, **descales)
    whole = [
        x.float() * f.transpose(1, 2).repeat_interleave(128, 1)[..., None]
        for x, f in zip(held, factors, strict=True)
    ]
    expected = tandem_attn.flash_attn_func(q.float(), *whole, causal=True)
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=2**-8)


# What must not count


@pytest.mark.parametrize("page_size", [0, 16, 200])
@pytest.mark.parametrize("each", EACH)
def test_what_nobody_declared_does_not_count(each, page_size):
    """Bytes and factors of other slots, rows and pages, whatever they are: not a bit of the result."""
    case = DecodeCase(
        dtype=BF16, tokens=3, causal=True, capacity=500, seqlens=(300, 7), leftpad=(130, 2), new=3,
        page_size=page_size,
    )  # fmt: skip
    inputs = make_fp8(Fp8Case(case, each))
    other = on_cpu(inputs)
    for name in "kv":
        cache = other.tensors[f"{name}_cache"]
        cache.view(torch.uint8)[cache.isnan()] = 0x55
        factors = other.tensors[f"{name}_descale"]
        factors[factors.isnan()] = math.inf
    for a, b in zip(run_decode(inputs), run_decode(other), strict=True):
        assert torch.equal(bits(a), bits(b))


def test_a_batch_of_one_length_is_taken_at_once():
    """As one by one: the same numbers, with factors of blocks that the length cuts."""
    for each in EACH:
        case = DecodeCase(dtype=BF16, tokens=2, capacity=300, seqlens=200, leftpad=None)
        inputs = make_fp8(Fp8Case(case, each))
        whole = run_decode(inputs)
        rows = run_decode(inputs, cache_batch_idx=int32(0, 1))
        for a, b in zip(whole, rows, strict=True):
            torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-8)
        assert_fp8_right(Fp8Case(case, each), inputs, *whole)


@pytest.mark.parametrize("each", EACH)
def test_decoding_is_prefilling(each):
    """Token by token from an empty cache: nearly the rows of one causal call over 16 bits."""
    torch.manual_seed(3)
    n = 150
    q, k, v = torch.randn(2, n, 4, 16), torch.randn(2, n, 2, 16), torch.randn(2, n, 2, 16)
    q, k, v = (x.to(BF16) for x in (q, k, v))
    exact = tandem_attn.flash_attn_func(q.float(), k.float(), v.float(), causal=True)
    caches = [torch.full((2, n, 2, 16), math.nan).to(E4M3) for _ in "kv"]
    shape = (2, 2, 2) if each == "block" else (2, 2)
    factors = [torch.full(shape, math.nan if each == "block" else 2.0**-6) for _ in "kv"]
    for t in range(n):
        now = slice(t, t + 1)
        out = flash_attn_with_kvcache(
            q[:, now], *caches, k[:, now], v[:, now], cache_seqlens=t, k_descale=factors[0],
            v_descale=factors[1],
        )  # fmt: skip
        torch.testing.assert_close(out.float(), exact[:, now], rtol=0.2, atol=0.2)
    assert (out.float() - exact[:, now]).abs().mean() < 0.02


def test_where_sequences_share_a_page_factors_are_shared():
    """A forked sequence reads the same page; so it has its factor."""
    case = DecodeCase(dtype=BF16, page_size=16, seqlens=(16, 20), capacity=32)
    inputs = make_fp8(Fp8Case(case))
    table = inputs.tensors["page_table"]
    table[0, 0] = table[1, 0]
    inputs.tensors["q"][0] = inputs.tensors["q"][1]
    inputs.tensors["cache_seqlens"][1] = 16
    out, lse = run_decode(inputs)
    assert torch.equal(out[0], out[1]) and torch.equal(lse[0], lse[1])


def test_slots_of_a_case_are_where_its_numbers_are():
    """The builder of these tests: declared numbers are within e4m3's rounding of the case's."""
    case = DecodeCase(dtype=BF16, page_size=16, leftpad=(3, 0))
    inputs = make_fp8(Fp8Case(case))
    for b, s in enumerate(inputs.sequences):
        pad = case.leftpad[b]
        where = slots_of(case, s, range(pad, case.each("seqlens")[b]))
        held = inputs.tensors["k_cache"][where].float() * inputs.tensors["k_descale"][where[0], 0][..., None]
        torch.testing.assert_close(held, s.k[pad:].float(), rtol=2**-4, atol=2**-9)
