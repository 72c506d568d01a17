"""Which memory the Hopper forward kernels read and write.

NaN around inputs, guards around results, every stride that users have, addresses that TMA refuses, and more
elements than 32 bits count.
"""

import pytest
import torch
from gpu_cases import (
    BF16,
    CAUSAL,
    FULL,
    GUARD,
    MANY,
    PACKED,
    SENTINEL,
    SOME,
    USED,
    WINDOW,
    answer,
    assert_same_bits,
    declared,
    dense,
    name,
    packed,
    seed_of,
)

from tandem_attn import explain, flash_attn_func, flash_attn_varlen_func
from tandem_attn.testing import Case, Inputs, assert_right, make, run

pytestmark = pytest.mark.gpu


# NaN in memory that does not count

POISONED = [
    *(case for case in PACKED if case.batch != 3 and case.heads == 4),
    *USED,
    *(
        dense((201, 255), dims, (4, 2), batch=3, layout=layout, **mask)
        for dims in ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
        for layout, mask in (("bshd", FULL), ("bhsd", CAUSAL), ("bshd", WINDOW))
    ),
]


@pytest.mark.parametrize("case", POISONED, ids=name)
def test_nan_outside_the_lengths_changes_no_bit(hopper, case):
    poisoned = make(case, hopper, seed=seed_of(case), poison=True)
    clean = make(case, hopper, seed=seed_of(case), poison=False)
    found = answer(case, poisoned)
    assert not any(x.isnan().any() for pair in declared(case, poisoned, *found) for x in pair)
    for (out, lse), other in zip(
        declared(case, poisoned, *found), declared(case, clean, *answer(case, clean)), strict=True
    ):
        assert torch.equal(out, other[0]) and torch.equal(lse, other[1])


# Results, and nothing around them, are written


@pytest.mark.parametrize(
    "case",
    [
        *(dense(n, (d, d), **CAUSAL) for d in (8, 40, 64, 72, 112, 128, 256) for n in ((1, 1), (201, 255))),
        dense((130, 300), (192, 128), (3, 1), batch=2),
        dense((130, 300), (96, 40), (3, 1), batch=2, **WINDOW),
        packed(SOME, **CAUSAL),
        packed(MANY, (64, 64)),
        packed(SOME, (40, 40), heads=(3, 1)),
        *USED,
    ],
    ids=name,
)
def test_nothing_else_is_written(hopper, guarded, case):
    inputs = make(case, hopper, poison=True)
    out, lse = answer(case, inputs)
    assert_right(case, inputs, out, lse)
    if hopper.type == "cpu":
        return
    (out_given, out_whole), (lse_given, lse_whole) = guarded
    assert out_given.data_ptr() == out.data_ptr() and lse_given.data_ptr() == lse.data_ptr()
    for whole in (out_whole, lse_whole):
        assert (whole[:GUARD] == SENTINEL).all() and (whole[-GUARD:] == SENTINEL).all()
    if case.varlen:  # not promised, but so it is: rows of no sequence are left alone
        undeclared = torch.ones(out.shape[0], dtype=torch.bool, device=hopper)
        for rows, _ in inputs.slices:
            undeclared[rows] = False
        assert out[undeclared].isnan().all() and lse[:, undeclared].isnan().all()


def test_a_call_allocates_its_results_and_no_more(hopper):
    if hopper.type == "cpu":
        pytest.skip("the allocator of CUDA counts")
    q = torch.randn(2, 2048, 16, 128, device=hopper, dtype=BF16)
    flash_attn_func(q, q, q, causal=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flash_attn_func(q, q, q, causal=True)
    grown = torch.cuda.max_memory_allocated() - before
    assert grown <= q.numel() * 2 + 2 * 2048 * 16 * 4 + 1024


# Strides and offsets, compared with contiguous copies


def _random(device, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(BF16)


def fused_qkv(device, b, n, h, d):
    return _random(device, b, n, 3, h, d).unbind(2)


def fused_heads(device, b, n, h, d):
    return _random(device, b, n, 3 * h, d).split(h, dim=2)


def fused_kv(device, b, n, h, d):
    return (_random(device, b, n, h, d), *_random(device, b, n, h, 2 * d).split(d, dim=-1))


def heads_first(device, b, n, h, d):
    return tuple(_random(device, b, h, n, d).transpose(1, 2) for _ in "qkv")


def rows_first(device, b, n, h, d):
    return tuple(_random(device, n, b, h, d).transpose(0, 1) for _ in "qkv")


def one_head_for_all(device, b, n, h, d):
    return (_random(device, b, n, h, d), *(_random(device, b, n, 1, d).expand(-1, -1, h, -1) for _ in "kv"))


def one_query_head_for_all(device, b, n, h, d):
    return (_random(device, b, n, 1, d).expand(-1, -1, h, -1), *(_random(device, b, n, h, d) for _ in "kv"))


def one_sequence_for_all(device, b, n, h, d):
    return tuple(_random(device, 1, n, h, d).expand(b, -1, -1, -1) for _ in "qkv")


def one_row_for_all(device, b, n, h, d):
    return (_random(device, b, 1, h, d).expand(-1, n, -1, -1), *(_random(device, b, n, h, d) for _ in "kv"))


def part_of_wider_rows(device, b, n, h, d):
    return tuple(_random(device, b, n, h, d + 24)[..., 8 : 8 + d] for _ in "qkv")


def every_second_row(device, b, n, h, d):
    return tuple(_random(device, b, 2 * n, h, d)[:, ::2] for _ in "qkv")


def every_third_head(device, b, n, h, d):
    return tuple(_random(device, b, n, 3 * h, d)[:, :, 1::3] for _ in "qkv")


def late_in_memory(device, b, n, h, d):
    return tuple(
        _random(device, 8 * (i + 1) + b * n * h * d)[8 * (i + 1) :].view(b, n, h, d) for i in range(3)
    )


LAYOUTS = [
    *(fused_qkv, fused_heads, fused_kv, heads_first, rows_first, one_head_for_all, one_query_head_for_all),
    *(one_sequence_for_all, one_row_for_all, part_of_wider_rows, every_second_row, every_third_head),
    late_in_memory,
]


def skip_if_rounded_otherwise(device, layout) -> None:
    if device.type == "cpu" and layout is one_row_for_all:
        pytest.skip("a CPU's matrix product of a repeated row is another product")


@pytest.mark.parametrize("dim, mask", [(64, CAUSAL), (128, FULL), (96, CAUSAL), (40, FULL)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_change_no_bit(hopper, layout, dim, mask):
    skip_if_rounded_otherwise(hopper, layout)
    tensors = layout(hopper, 2, 203, 4, dim)
    assert all(x.shape == (2, 203, 4, dim) for x in tensors)
    case = dense((203, 203), (dim, dim), (4, 4), batch=2, **mask)
    found = answer(case, Inputs(*tensors, {**mask}, []))
    plain = Inputs(*(x.contiguous() for x in tensors), {**mask}, [])
    assert_same_bits(case, plain, answer(case, plain), found)
    assert all(x.is_contiguous() for x in found)


@pytest.mark.parametrize(
    "layout", [f for f in LAYOUTS if f is not one_sequence_for_all], ids=lambda f: f.__name__
)
def test_strides_of_packed_sequences_change_no_bit(hopper, layout):
    skip_if_rounded_otherwise(hopper, layout)
    tensors = [x[0] for x in layout(hopper, 1, 203, 4, 128)]
    case = packed(((100, 0, 1, 102), (100, 0, 1, 102)), heads=(4, 4), **CAUSAL)
    inputs = make(case, hopper)
    found = answer(case, Inputs(*tensors, inputs.kwargs, inputs.slices))
    plain = Inputs(*(x.contiguous() for x in tensors), inputs.kwargs, inputs.slices)
    assert_same_bits(case, plain, answer(case, plain), found)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 130, 1), (2, 1, 1), (1, 1, 3), (1, 130, 4)], ids=str)
def test_strides_of_single_rows_do_not_count(hopper, shape):
    """A dimension of size 1 may have any stride, even one that TMA would refuse."""
    batch, rows, heads = shape
    case = dense((rows, rows), (64, 64), (heads, heads), batch=batch, **CAUSAL)
    inputs = make(case, hopper)
    expected = answer(case, inputs)
    for odd in (0, 1, 3, 1001):
        strange = [
            x.as_strided(x.shape, [odd if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)])
            for x in (inputs.q, inputs.k, inputs.v)
        ]
        assert_same_bits(case, inputs, expected, answer(case, Inputs(*strange, inputs.kwargs, [])))


def off_by_one(device):
    return (
        _random(device, 100 * 2 * 64 + 1)[1:].view(1, 100, 2, 64),
        *(_random(device, 1, 100, 2, 64) for _ in "kv"),
    )


def rows_of_68(device):
    return (*(_random(device, 1, 100, 2, 64) for _ in "qk"), _random(device, 1, 100, 2, 68)[..., :64])


def columns_apart(device):
    return (
        _random(device, 1, 100, 2, 64),
        _random(device, 1, 100, 2, 128)[..., ::2],
        _random(device, 1, 100, 2, 64),
    )


@pytest.mark.parametrize(
    "layout, reason",
    [
        (off_by_one, "does not start at a multiple of 16 bytes"),
        (rows_of_68, "v has strides"),
        (columns_apart, "k's last dimension has stride 2"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_tma_refuses_is_answered_elsewhere(device, layout, reason):
    tensors = layout(device)
    explanation = explain(*tensors, causal=True)
    if device.type == "cuda":
        assert explanation.backend != "gluon"
        assert any(reason in said for said in explanation.reasons["gluon"]), explanation
    case = dense((100, 100), (64, 64), (2, 2), **CAUSAL)
    inputs = Inputs(*tensors, {**CAUSAL}, [])
    assert_right(case, inputs, *run(case, inputs))


# More than 2**31 elements. Windows of 64 keys keep these quick; on a CPU they are rehearsed in small.

SMALL = {"window_size": (63, 0), "return_attn_probs": True}


@pytest.fixture
def big(device):
    """A function from (GiB needed, size on a GPU, size in a rehearsal) to the size."""

    def size(gib: float, real: int, rehearsed: int) -> int:
        if device.type == "cpu":
            return rehearsed
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gib + 2:
            pytest.skip(f"{free:.0f} GiB of GPU memory are free; it takes {gib}")
        return real

    yield size
    if device.type == "cuda":
        torch.cuda.empty_cache()


def assert_row(found, q, k, v, seqlen_q: int, i: int) -> None:
    """Row i of one head against float64: q, k and v (rows, dim) of its sequence; found is (out row, lse)."""
    place = i + len(k) - seqlen_q
    keys, values = (x[max(place - 63, 0) : place + 1].double() for x in (k, v))
    scores = keys @ q[i].double() * q.shape[-1] ** -0.5
    torch.testing.assert_close(found[1].double(), scores.logsumexp(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(found[0].double(), scores.softmax(0) @ values, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("form", ["long", "wide"])
def test_dense_above_2_31_elements(hopper, big, form):
    """By length with many heads, and by batch."""
    batch, rows, heads = (1, 131_264, 128) if form == "long" else (1024, 129, 128)
    heads, batch = big(18, heads, 2), batch if hopper.type == "cuda" else min(batch, 3)
    rows = rows if hopper.type == "cuda" else 300
    q, k, v = (torch.randn(batch, rows, heads, 128, device=hopper, dtype=BF16) for _ in range(3))
    assert hopper.type == "cpu" or q.numel() > 2**31
    out, lse = flash_attn_func(q, k, v, **SMALL)
    for b, h in ((0, 0), (batch - 1, heads - 1), (batch // 2, 1), (batch - 1, 0)):
        for i in (0, 1, rows // 2, rows - 2, rows - 1):
            assert_row((out[b, i, h], lse[b, h, i]), q[b, :, h], k[b, :, h], v[b, :, h], rows, i)
    assert not out.isnan().any() and lse.isfinite().all()


def test_packed_above_2_31_elements(hopper, big):
    """More than 2**24 rows: beyond what a float32 counts, too."""
    batch, rows = big(18, 4096, 7), 4099
    q, k, v = (torch.randn(batch * rows, 2, 64, device=hopper, dtype=BF16) for _ in range(3))
    assert hopper.type == "cpu" or (q.numel() > 2**31 and q.shape[0] > 2**24)
    starts = torch.arange(batch + 1, device=hopper, dtype=torch.int32) * rows
    out, lse = flash_attn_varlen_func(q, k, v, starts, starts, rows, rows, **SMALL)
    for b, h in ((0, 0), (batch - 1, 1), (batch - 2, 0), (batch // 2, 1)):
        of_b = slice(b * rows, (b + 1) * rows)
        for i in (0, 1, 2048, rows - 1):
            found = (out[of_b][i, h], lse[h, of_b][i])
            assert_row(found, q[of_b, h], k[of_b, h], v[of_b, h], rows, i)
    assert not out.isnan().any() and lse.isfinite().all()


def test_lse_above_2_31_elements(hopper, big):
    """And 2**34 elements of out. All heads are one in memory, so all must answer the same."""
    rows, heads = 131_136, big(44, 2**14, 6)
    rows = rows if hopper.type == "cuda" else 300
    q, k, v = (torch.randn(1, rows, 1, 8, device=hopper, dtype=BF16) for _ in range(3))
    one, one_lse = flash_attn_func(q, k, v, **SMALL)
    out, lse = flash_attn_func(q.expand(-1, -1, heads, -1), k, v, **SMALL)
    assert hopper.type == "cpu" or lse.numel() > 2**31
    for some in out.split(8192, dim=1):
        start = some.storage_offset() // (heads * 8)
        assert (some == one[:, start : start + some.shape[1]]).all()
    for some in lse.split(1024, dim=1):
        assert (some == one_lse).all()
    assert_row((one[0, -1, 0], one_lse[0, 0, -1]), q[0, :, 0], k[0, :, 0], v[0, :, 0], rows, rows - 1)


def test_strides_above_2_31_elements(hopper, big):
    """Few elements, far apart: a key-value cache of many slots, of which a call sees some rows."""
    slots, room = big(8, 3, 3), 2**21 if hopper.type == "cuda" else 600
    cache = torch.empty(slots, room, 4, 128, device=hopper, dtype=BF16)
    cache[:, -300:] = torch.randn(slots, 300, 4, 128, device=hopper)
    assert hopper.type == "cpu" or (slots - 1) * cache.stride(0) > 2**31 - 1
    k = cache[:, -300:]
    q = torch.randn(slots, 200, 8, 128, device=hopper, dtype=BF16)
    case = Case(batch=slots, seqlen_q=200, seqlen_k=300, heads=8, kv_heads=4, head_dim=128, **CAUSAL)
    inputs = Inputs(q, k, k, {**CAUSAL}, [])
    plain = Inputs(q, k.contiguous(), k.contiguous(), {**CAUSAL}, [])
    assert_same_bits(case, plain, answer(case, plain), answer(case, inputs))
