"""Which memory the FP8 kernels of attention read and write, on which stream, and the same bits every time."""

import dataclasses
import math

import pytest
import torch
from fp8_cases import (
    EXACT,
    REPEATS,
    V_SMOOTHED,
    attend_e4m3,
    attend_fp8,
    attended,
    by_reference,
    descales_of,
    inputs_of,
    leaves,
    make_e4m3,
    quantized,
    recipe_for,
)
from gpu_cases import (
    CAUSAL,
    FULL,
    GUARD,
    MANY,
    SENTINEL,
    SOME,
    USED_K,
    USED_Q,
    assert_same_bits,
    declared,
    dense,
    name,
    packed,
)
from test_forward_repeat import Traffic, bits
from test_fp8_gpu import kernels  # noqa: F401 - the fixture: FP8 kernels are compiled ahead
from test_gpu_runtime import captured

from tandem_attn import Fp8Tensors, flash_attn_func
from tandem_attn.quant import BLOCK_K, BLOCK_Q, PADDING
from tandem_attn.spec import E4M3
from tandem_attn.testing import Case, Inputs

gpu = pytest.mark.gpu
CASES = [
    dense((201, 255), (64, 64), (4, 2), batch=3),
    dense((201, 255), (128, 128), (4, 2), batch=3, **CAUSAL),
    dense((201, 255), (192, 128), (4, 2), batch=3, **CAUSAL),
    dense((201, 255), (256, 256), (4, 2), batch=3, window=(100, 37)),
    dense((1, 1), (80, 48), (2, 1), **CAUSAL),
    packed(SOME, (128, 128), **CAUSAL),
    packed(SOME, (64, 64)),
    packed(MANY, (64, 64), window=(100, 37)),
    packed(SOME, used_q=USED_Q, used_k=USED_K, **CAUSAL),
    packed(SOME, (64, 64), used_q=USED_Q, used_k=USED_K),
    *V_SMOOTHED,
]


# NaN in memory that does not count


def amid_nan(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, contiguous, inside larger memory of NaN."""
    whole = torch.full((x.numel() + 2 * GUARD,), math.nan, device=x.device).to(x.dtype)
    inner = whole[GUARD : GUARD + x.numel()].view(x.shape)
    return inner.copy_(x)


def only(x: torch.Tensor, dim: int, spans: list[tuple[int, int]]) -> torch.Tensor:
    """x, and NaN in all but some spans of a dimension."""
    kept = torch.zeros(x.shape[dim], dtype=torch.bool, device=x.device)
    for start, count in spans:
        kept[start : start + count] = True
    nothing = torch.full_like(x.float(), math.nan).to(x.dtype).movedim(dim, -1)
    numbers = x.movedim(dim, -1)
    return torch.where(kept, numbers.float(), nothing.float()).to(x.dtype).movedim(-1, dim).contiguous()


def blocks(lengths: tuple, used: tuple, size: int, unit: int) -> list[tuple[int, int]]:
    """(start, how many) of each packed sequence's blocks of `size` padded rows, in units of `unit` rows."""
    found, row = [], 0
    for i, (length, n) in enumerate(zip(lengths, used, strict=True)):
        start = (row + PADDING * i) // PADDING * PADDING
        found.append((start // unit, -(-n // size) * size // unit))
        row += length
    return found


def poisoned(case: Case, x: Fp8Tensors) -> Fp8Tensors:
    """The same FP8 tensors, NaN wherever nothing is promised."""
    fields = ("q", "k", "v_t", "q_descale", "k_descale", "v_descale", "lse_shift", "v_mean")
    new = {f: getattr(x, f) for f in fields if getattr(x, f) is not None}
    if case.varlen:
        rows, keys = (
            [(sum(all_[:i]), n) for i, n in enumerate(used)]
            for all_, used in ((case.lengths_q, case.rows), (case.lengths_k, case.keys))
        )
        new["q"], new["k"] = only(x.q, 0, rows), only(x.k, 0, keys)
        new["v_t"] = only(x.v_t, -1, blocks(case.lengths_k, case.keys, PADDING, 1))
        of_q = blocks(case.lengths_q, case.rows, BLOCK_Q, BLOCK_Q)
        of_k = blocks(case.lengths_k, case.keys, BLOCK_K, BLOCK_K)
        new["q_descale"] = only(x.q_descale, -1, of_q)
        new |= {f: only(new[f], -1, of_k) for f in ("k_descale", "v_descale")}
        new["lse_shift"] = only(x.lse_shift, -1, rows)
    return dataclasses.replace(x, **{f: amid_nan(t) for f, t in new.items()})


@gpu
@pytest.mark.parametrize("case", CASES, ids=name)
def test_nan_outside_the_lengths_changes_no_bit(hopper, case):
    inputs = inputs_of(case, device=hopper)
    clean = by_reference(inputs, recipe_for(case))
    dirty = poisoned(case, clean)
    assert not case.varlen or dirty.q.float().isnan().any() or sum(case.rows) == sum(case.lengths_q)
    assert not case.varlen or dirty.v_t.float().isnan().any()
    found = attended(dirty, inputs)
    assert not any(x.isnan().any() for pair in declared(case, inputs, *found) for x in pair)
    assert_same_bits(case, inputs, attended(clean, inputs), found)


@gpu
@pytest.mark.parametrize("case", EXACT, ids=name)
def test_nan_around_e4m3_changes_no_bit(hopper, case):
    poison, clean = (make_e4m3(case, hopper, poison=x) for x in (True, False))
    descales = descales_of(case, hopper)
    found, expected = (declared(case, x, *attend_e4m3(case, x, **descales)) for x in (poison, clean))
    for (out, lse), (out_want, lse_want) in zip(found, expected, strict=True):
        assert torch.equal(out, out_want) and torch.equal(lse, lse_want) and not out.isnan().any()


@gpu
@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[8]], ids=name)
def test_nan_around_16_bits_changes_no_bit(hopper, case):
    """From the originals on: through the kernels that make FP8, too."""
    poison, clean = (inputs_of(case, device=hopper, poison=x) for x in (True, False))
    found, expected = (declared(case, x, *attend_fp8(case, x)) for x in (poison, clean))
    for (out, lse), (out_want, lse_want) in zip(found, expected, strict=True):
        assert torch.equal(out, out_want) and torch.equal(lse, lse_want) and not out.isnan().any()


# Results, and nothing around them, are written


@gpu
@pytest.mark.parametrize("case", [*CASES, dense((70, 20_001), (256, 256))], ids=name)
def test_nothing_else_is_written(hopper, guarded, case):
    if hopper.type == "cpu":
        case = dataclasses.replace(case, seqlen_k=min(case.seqlen_k, 600))
    inputs = inputs_of(case, device=hopper, poison=True)
    tensors = by_reference(inputs, recipe_for(case))
    before = [x.clone() for x in (tensors.q, tensors.k, tensors.v_t)]
    out, lse = attended(tensors, inputs)
    for x, y in zip((tensors.q, tensors.k, tensors.v_t), before, strict=True):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), "an input was written"
    for part in declared(case, inputs, out, lse):
        assert not any(x.isnan().any() for x in part)
    if hopper.type == "cpu":
        return
    assert len(guarded) >= 2, "out, lse, and where O is added up in parts those"
    for _, whole in guarded:
        assert (whole[:GUARD] == SENTINEL).all() and (whole[-GUARD:] == SENTINEL).all()
    if case.varlen:  # not promised, but so it is: rows of no sequence are left alone
        undeclared = torch.ones(out.shape[0], dtype=torch.bool, device=hopper)
        for rows, _ in inputs.slices:
            undeclared[rows] = False
        assert out[undeclared].isnan().all() and lse[:, undeclared].isnan().all()


# Strides


def _numbers(device, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(E4M3)


def fused_heads(device, b, n, h, d):
    return _numbers(device, b, n, 3 * h, d).split(h, dim=2)


def heads_first(device, b, n, h, d):
    return tuple(_numbers(device, b, h, n, d).transpose(1, 2) for _ in "qkv")


def rows_first(device, b, n, h, d):
    return tuple(_numbers(device, n, b, h, d).transpose(0, 1) for _ in "qkv")


def one_head_for_all(device, b, n, h, d):
    return (_numbers(device, b, n, h, d), *(_numbers(device, b, n, 1, d).expand(-1, -1, h, -1) for _ in "kv"))


def one_sequence_for_all(device, b, n, h, d):
    return tuple(_numbers(device, 1, n, h, d).expand(b, -1, -1, -1) for _ in "qkv")


def part_of_wider_rows(device, b, n, h, d):
    return tuple(_numbers(device, b, n, h, d + 48)[..., 16 : 16 + d] for _ in "qkv")


def every_second_row(device, b, n, h, d):
    return tuple(_numbers(device, b, 2 * n, h, d)[:, ::2] for _ in "qkv")


def every_third_head(device, b, n, h, d):
    return tuple(_numbers(device, b, n, 3 * h, d)[:, :, 1::3] for _ in "qkv")


LAYOUTS = [
    *(fused_heads, heads_first, rows_first, one_head_for_all, one_sequence_for_all, part_of_wider_rows),
    *(every_second_row, every_third_head),
]


@gpu
@pytest.mark.parametrize("dim, mask", [(64, FULL), (128, CAUSAL), (80, CAUSAL)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_change_no_bit(hopper, layout, dim, mask):
    tensors = layout(hopper, 2, 203, 4, dim)
    assert all(x.shape == (2, 203, 4, dim) for x in tensors)
    plain = [x.float().contiguous().to(E4M3) for x in tensors]
    found = flash_attn_func(*tensors, **mask, return_attn_probs=True)
    expected = flash_attn_func(*plain, **mask, return_attn_probs=True)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and a.is_contiguous()


def rows_of_72(device):
    return (_numbers(device, 1, 100, 2, 72)[..., :64], *(_numbers(device, 1, 100, 2, 64) for _ in "kv"))


def off_by_one(device):
    return (
        _numbers(device, 1, 100, 2, 64),
        _numbers(device, 100 * 2 * 64 + 1)[1:].view(1, 100, 2, 64),
        _numbers(device, 1, 100, 2, 64),
    )


@gpu
@pytest.mark.parametrize(
    "layout, reason",
    [(rows_of_72, "q has strides"), (off_by_one, "does not start at a multiple of 16 bytes")],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_tma_refuses_is_answered_elsewhere(device, backend, layout, reason):
    """By the reference; the kernels say why."""
    tensors = layout(device)
    out = flash_attn_func(*tensors, causal=True)
    plain = [x.float().contiguous().to(E4M3) for x in tensors]
    backend("reference")
    torch.testing.assert_close(out, flash_attn_func(*plain, causal=True), rtol=2**-7, atol=1e-3)
    if device.type == "cuda":
        backend("gluon")
        with pytest.raises(NotImplementedError, match=reason):
            flash_attn_func(*tensors, causal=True)


# The same bits every time


@gpu
@pytest.mark.parametrize("case", REPEATS, ids=name)
def test_two_hundred_times_the_same_bits(hopper, case):
    inputs = inputs_of(case, device=hopper, poison=True)
    tensors = by_reference(inputs, recipe_for(case))
    first = attended(tensors, inputs)
    defined = [torch.full_like(x, not case.varlen, dtype=torch.bool) for x in first]
    for rows, _ in inputs.slices:
        defined[0][rows], defined[1][:, rows] = True, True
    traffic, wrong = Traffic(hopper), torch.zeros((), dtype=torch.int64, device=hopper)
    kept = []
    for i in range(200 if hopper.type == "cuda" else 2):
        traffic.add(i)
        found = attended(tensors, inputs)
        kept = [*kept, found] if i % 7 else [found]  # other addresses for the next results
        for x, y, where in zip(found, first, defined, strict=True):
            wrong += ((bits(x) != bits(y)) & where).any()
    assert int(wrong) == 0, f"{int(wrong)} of 400 results differ from the first"


@gpu
@pytest.mark.parametrize("case", REPEATS, ids=name)
def test_number_of_programs_changes_no_bit(hopper, case):
    """Other tiles come before and after each other in a program, down to one program for all of them."""
    inputs = inputs_of(case, device=hopper)
    tensors = by_reference(inputs, recipe_for(case))
    expected = attended(tensors, inputs)
    for margin in (1, 17, 100, 131, 5000) if hopper.type == "cuda" else (5000,):
        inputs.kwargs["sm_margin"] = margin
        assert_same_bits(case, inputs, expected, attended(tensors, inputs))


# Streams and graphs, which nothing rehearses


@pytest.fixture
def cuda(hopper) -> torch.device:
    if hopper.type == "cpu":
        pytest.skip("streams and graphs are CUDA's")
    return hopper


WAYS = [dense((300, 333), (128, 128), (4, 2), batch=2, **CAUSAL), packed(SOME, (64, 64))]


def two_steps(case: Case, inputs: Inputs) -> tuple:
    """Both functions, instead of the one that calls them."""
    return attended(quantized(inputs), inputs)


@gpu
@pytest.mark.parametrize("call", [attend_fp8, two_steps], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", WAYS, ids=name)
def test_the_current_stream_is_used(cuda, case, call):
    """Inputs are NaN until a stream that starts late has filled them; and no call waits for that."""
    inputs = inputs_of(case, device=cuda)
    expected = call(case, inputs)
    late = [torch.full_like(x, math.nan) for x in leaves(inputs)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles, about 50 ms
        for x, y in zip(late, leaves(inputs), strict=True):
            x.copy_(y)
        found = call(case, Inputs(*late, inputs.kwargs, inputs.slices))
        assert not stream.query(), "the call waited for the device"
    stream.synchronize()
    assert_same_bits(case, inputs, expected, found)


@gpu
@pytest.mark.parametrize("call", [attend_fp8, two_steps], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", WAYS, ids=name)
def test_nothing_waits_for_the_device(cuda, case, call):
    inputs = inputs_of(case, device=cuda)
    e4m3, descales = make_e4m3(case, cuda), descales_of(case, cuda)
    call(case, inputs)
    attend_e4m3(case, e4m3, **descales)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for scale in (None, 0.1, 0.2):  # known and new questions
            inputs.kwargs["softmax_scale"] = e4m3.kwargs["softmax_scale"] = scale
            call(case, inputs)
            attend_e4m3(case, e4m3, **descales)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("call", [attend_fp8, two_steps], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", WAYS, ids=name)
def test_graph_with_new_numbers(cuda, case, call):
    inputs = inputs_of(case, device=cuda)
    graph, results = captured(lambda: call(case, inputs))
    for factor in (1.0, 0.5, -0.75):
        other = Inputs(
            *(x * factor for x in leaves(inputs_of(case, device=cuda))), inputs.kwargs, inputs.slices
        )
        for x, y in zip(leaves(inputs), leaves(other), strict=True):
            x.copy_(y)
        for x in results:
            x.fill_(math.nan)
        graph.replay()
        assert_same_bits(case, inputs, call(case, other), results)


@gpu
def test_graph_of_attention_alone(cuda):
    """Over FP8 tensors that are replaced between replays."""
    for case in WAYS:
        inputs = inputs_of(case, device=cuda)
        tensors = by_reference(inputs)
        graph, results = captured(lambda x=tensors, y=inputs: attended(x, y))
        other = Inputs(*(x * 0.5 for x in leaves(inputs)), inputs.kwargs, inputs.slices)
        others = by_reference(other)
        for field in ("q", "k", "v_t", "q_descale", "k_descale", "v_descale", "lse_shift"):
            getattr(tensors, field).copy_(getattr(others, field))
        graph.replay()
        assert_same_bits(case, inputs, attended(others, other), results)
