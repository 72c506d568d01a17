"""Which memory the Hopper backward kernels read and write, and how much of it they take.

NaN around inputs and in other sequences, guards around everything, every stride that users and autograd have,
and more elements than 32 bits count.
"""

import math
import sys

import backward_cases as cases
import gpu_cases
import pytest
import test_forward_memory
import torch
from backward_cases import (
    assert_close,
    assert_right,
    assert_same_bits,
    assert_zeros,
    attended,
    backward_of,
    documented_bytes,
    gradients,
    plain_gradients,
    upstream,
)
from gpu_cases import BF16, CAUSAL, FULL, MANY, SOME, TILES, USED, WINDOW, dense, name, packed, seed_of
from test_forward import same_but
from test_forward_memory import LAYOUTS, off_by_one, one_sequence_for_all

from tandem_attn import explain, flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from tandem_attn.testing import Case, Inputs, make, run

pytestmark = pytest.mark.gpu
kernels = pytest.fixture(scope="session")(cases.compile_ahead)
hopper = pytest.fixture(cases.only_kernels)
big = test_forward_memory.big

GUARD, SENTINEL = 1024, 77  # elements, on both sides
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# NaN in memory that does not count

POISONED = [
    *(
        case
        for case in gpu_cases.PACKED
        if case.batch != 3 and case.heads == 4 and case.dim_v == case.head_dim
    ),
    *USED,
    *(
        dense((201, 255), dims, (4, 2), batch=3, layout=layout, **mask)
        for dims in TILES
        for layout, mask in (("bshd", FULL), ("bhsd", CAUSAL), ("bshd", WINDOW))
    ),
]


@pytest.mark.parametrize("case", POISONED, ids=name)
def test_nan_outside_the_lengths_changes_no_bit(hopper, case):
    found = []
    for poison in (True, False):
        inputs = make(case, hopper, seed=seed_of(case), poison=poison)
        grads = upstream(case, inputs, poison=poison)
        found.append(gradients(case, inputs, *grads, deterministic=True))
        assert_zeros(case, inputs, found[-1])
    assert not any(x.isnan().any() for x in found[0])
    # poisoned, packed tensors have rows of no sequence at the end
    assert_same_bits([x[: len(y)] for x, y in zip(*found, strict=True)], found[1])


@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("form", ["dense", "packed"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_sequence_of_nan_harms_no_other(hopper, dim, form, mask):
    """Nor does a head of NaN: tiles end inside the next sequence's rows, sums of dq may not."""
    lengths = ((70, 130, 3, 200), (129, 64, 70, 255))
    case = dense((130, 203), (dim, dim), (4, 2), batch=4, **mask)
    case = case if form == "dense" else packed(lengths, (dim, dim), **mask)
    inputs = make(case, hopper)
    dout, dlse = upstream(case, inputs)
    expected = gradients(case, inputs, dout, dlse, deterministic=True)
    sick = {x: getattr(inputs, x).clone() for x in "qkv"}
    for x in sick.values():
        x[..., -1, :] = math.nan  # the last KV head, and a query head of its group
    for i in (0, 2):
        rows, keys = inputs.slices[i] if case.varlen else (i, i)
        for x, where in zip(sick.values(), (rows, keys, keys), strict=True):
            x[where] = math.nan
    found = gradients(case, inputs, dout, dlse, deterministic=True, **sick)
    for i in (1, 3):
        rows, keys = inputs.slices[i] if case.varlen else (i, i)
        for got, want, where in zip(found, expected, (rows, keys, keys), strict=True):
            half = got.shape[-2] // 2
            assert torch.equal(got[where][..., :half, :], want[where][..., :half, :])


@pytest.mark.parametrize("lengths_k", [(0, 0, 0), (5, 0, 300)], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_no_queries_at_all(hopper, lengths_k, dim):
    """With a loose bound the kernels start, find nothing to do, and all gradients are 0."""
    case = packed(((0, 0, 0), lengths_k), (dim, dim))
    inputs = make(case, hopper, poison=True)
    inputs.q = inputs.k.new_full((40, 4, dim), math.nan)
    inputs.kwargs |= {"max_seqlen_q": 64, "max_seqlen_k": 512}
    for x in gradients(case, inputs, inputs.q.detach(), inputs.q.new_ones(4, 40, dtype=torch.float32)):
        assert torch.count_nonzero(x) == 0


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_no_keys_at_all(hopper, dim):
    case = packed(((5, 0, 300), (0, 0, 0)), (dim, dim))
    inputs = make(case, hopper, poison=True)
    inputs.k, inputs.v = (inputs.q.new_full((40, 2, dim), math.nan) for _ in "kv")
    inputs.kwargs |= {"max_seqlen_q": 512, "max_seqlen_k": 64}
    for x in gradients(case, inputs, *upstream(case, inputs)):
        assert torch.count_nonzero(x) == 0


def test_no_sequences_at_all(hopper):
    q, k, v = (
        torch.full((9, h, 64), math.nan, device=hopper, dtype=BF16, requires_grad=True) for h in (4, 2, 2)
    )
    starts = torch.zeros(1, dtype=torch.int32, device=hopper)
    out = flash_attn_varlen_func(q, k, v, starts, starts, 64, 64)
    for x in torch.autograd.grad(out, (q, k, v), q.detach()):
        assert torch.count_nonzero(x) == 0


def test_sequences_may_start_late_and_leave_gaps(hopper):
    """cu_seqlens from 7 on, and rows after the last: NaN there, and gradients of 0."""
    for case in (packed(SOME, **CAUSAL), packed(SOME, (256, 256), **CAUSAL), USED[0]):
        inputs = make(case, hopper)
        grads = upstream(case, inputs)
        expected = gradients(case, inputs, *grads, deterministic=True)

        def widened(x, dim=0):
            junk = torch.full_like(x.narrow(dim, 0, 7), math.nan)
            return torch.cat([junk, x, junk], dim)

        moved = {x: widened(getattr(inputs, x)) for x in "qkv"}
        moved |= {x: inputs.kwargs[x] + 7 for x in ("cu_seqlens_q", "cu_seqlens_k")}
        found = gradients(case, inputs, widened(grads[0]), widened(grads[1], 1), deterministic=True, **moved)
        assert_same_bits([x[7:-7] for x in found], expected)
        for x in found:
            assert torch.count_nonzero(x[:7]) == torch.count_nonzero(x[-7:]) == 0


# Gradients, and nothing around them, are written


def as_bits(x: torch.Tensor) -> torch.Tensor:
    """As integers: NaN equals itself."""
    return x.view(BITS[x.element_size()])


@pytest.fixture
def guarded(monkeypatch):
    """What the package allocates lies inside larger memory, SENTINEL around it: a list of all of that."""
    given = []

    def inside_guards(allocate, unset: bool):
        def wrapper(*args, **kwargs):
            out = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if not caller.startswith(("tandem_attn.kernels", "tandem_attn.reference")) or out.is_meta:
                return out
            whole = torch.full((out.numel() + 2 * GUARD,), SENTINEL, dtype=out.dtype, device=out.device)
            inner = whole[GUARD : GUARD + out.numel()].view(out.shape)
            given.append(whole)
            return inner.fill_(math.nan) if unset and out.is_floating_point() else inner.copy_(out)

        return wrapper

    for owner, names in (
        (torch, ("empty", "empty_like", "zeros")),
        (torch.Tensor, ("new_empty", "new_zeros")),
    ):
        for function in names:
            wrapped = inside_guards(getattr(owner, function), "empty" in function)
            monkeypatch.setattr(owner, function, wrapped)
    return given


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize(
    "case",
    [
        *(
            dense(n, (d, d), **CAUSAL)
            for d in (8, 40, 64, 72, 96, 128, 192, 256)
            for n in ((1, 1), (201, 255))
        ),
        dense((130, 300), (192, 128), (3, 1), batch=2),
        dense((255, 65), (256, 256), (3, 1), batch=2, **WINDOW),
        packed(SOME, **CAUSAL),
        packed(SOME, (256, 256), **CAUSAL),
        packed(MANY, (64, 64)),
        packed(SOME, (40, 40), heads=(3, 1)),
        *USED,
    ],
    ids=name,
)
def test_nothing_else_is_written(hopper, guarded, case, deterministic):
    inputs = make(case, hopper, poison=True)
    dout, dlse = upstream(case, inputs)
    guarded.clear()
    found = gradients(case, inputs, dout, dlse, deterministic=deterministic)
    assert len(guarded) > 2
    for whole in guarded:
        assert (whole[:GUARD] == SENTINEL).all() and (whole[-GUARD:] == SENTINEL).all()
    assert_right(case, inputs, found, (dout, dlse))


@pytest.mark.parametrize("dims", TILES, ids=str)
def test_inputs_are_left_alone(hopper, dims):
    """Every bit of q, k, v, dout, dlse, out and lse, and of the memory that their views lie in."""
    for case in (dense((201, 255), dims, (4, 2), batch=2, layout="bhsd", **CAUSAL), packed(SOME, dims)):
        inputs = make(case, hopper, poison=True)
        grads = upstream(case, inputs)
        leaves, results = attended(case, inputs)
        watched = [inputs.q, inputs.k, inputs.v, *grads, *(x.detach() for x in results)]
        whole = [x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0) for x in watched]
        before = [x.clone() for x in whole]
        backward_of(leaves, results, grads)
        for x, y in zip(whole, before, strict=True):
            assert torch.equal(as_bits(x), as_bits(y))


def requested_bytes() -> int:
    """What tensors ask for: the allocator hands out up to a megabyte more."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize(
    "case",
    [
        *(dense((2048, 2048), dims, (8, 2), batch=2, **CAUSAL) for dims in TILES),
        dense((2048, 2048), (128, 128), (16, 16), batch=2),
        dense((2048, 1000), (128, 128), (8, 2), **CAUSAL),
        dense((32768, 32768), (64, 64), (2, 1), **CAUSAL),
        packed(((2000, 70, 1, 0, 3000), (2000, 500, 9, 30, 1000)), (128, 128), (8, 2), **CAUSAL),
        packed(((40,) * 100, (40,) * 100), (64, 64), (8, 8), **CAUSAL),
    ],
    ids=name,
)
def test_a_backward_takes_the_memory_that_is_documented(hopper, case, deterministic):
    if hopper.type == "cpu":
        pytest.skip("the allocator of CUDA counts")
    inputs = make(case, hopper)
    grads = (upstream(case, inputs, poison=False)[0].contiguous(), None)
    inputs.kwargs["deterministic"] = deterministic
    leaves, results = attended(case, inputs)
    for _ in range(2):  # the first may compile, and keep counters
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, asked_for = torch.cuda.memory_allocated(), requested_bytes()
        found = backward_of(leaves, results, grads, retain_graph=True)
        grown = torch.cuda.max_memory_allocated() - before
        kept = requested_bytes() - asked_for - sum(x.nbytes for x in found)
        del found
    allowed = documented_bytes(case, deterministic)
    assert grown <= 1.02 * allowed + 2**20, f"{grown:,} bytes, documented: {allowed:,}"
    assert kept <= 2**16, f"{kept:,} bytes are still held"


# Strides and offsets of q, k and v, compared with contiguous copies


@pytest.mark.parametrize("dim, mask", [(64, CAUSAL), (128, FULL), (256, CAUSAL), (40, FULL)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_change_no_bit(hopper, layout, dim, mask):
    tensors = layout(hopper, 2, 203, 4, dim)
    case = dense((203, 203), (dim, dim), (4, 4), batch=2, **mask)
    inputs = Inputs(*tensors, {**mask, "deterministic": True}, [])
    dout, _ = upstream(case, inputs)
    plain = {x: getattr(inputs, x).contiguous() for x in "qkv"}
    compare = assert_same_bits if hopper.type == "cuda" else assert_close  # a CPU's products differ
    compare(gradients(case, inputs, dout), gradients(case, inputs, dout, **plain))


@pytest.mark.parametrize(
    "layout", [f for f in LAYOUTS if f is not one_sequence_for_all], ids=lambda f: f.__name__
)
def test_strides_of_packed_sequences_change_no_bit(hopper, layout):
    tensors = [x[0] for x in layout(hopper, 1, 203, 4, 128)]
    case = packed(((100, 0, 1, 102), (100, 0, 1, 102)), heads=(4, 4), **CAUSAL)
    known = make(case, hopper)
    inputs = Inputs(*tensors, known.kwargs | {"deterministic": True}, known.slices)
    dout, _ = upstream(case, inputs, poison=False)
    plain = {x: getattr(inputs, x).contiguous() for x in "qkv"}
    compare = assert_same_bits if hopper.type == "cuda" else assert_close
    compare(gradients(case, inputs, dout), gradients(case, inputs, dout, **plain))


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_qkvpacked_gets_one_gradient(hopper, heads, kv_heads, dim):
    case = dense((200, 200), (dim, dim), (heads, kv_heads), batch=2, **CAUSAL)
    inputs = make(case, hopper)
    dout, _ = upstream(case, inputs)
    expected = gradients(case, inputs, dout, deterministic=True)
    qkv = torch.cat([inputs.q, inputs.k, inputs.v], 2).requires_grad_()
    out = flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=heads, deterministic=True)
    (found,) = torch.autograd.grad(out, qkv, dout)
    assert_same_bits(found.split([heads, kv_heads, kv_heads], 2), expected)
    if heads == kv_heads:
        five = qkv.detach().unflatten(2, (3, heads)).requires_grad_()
        out = flash_attn_qkvpacked_func(five, causal=True, deterministic=True)
        assert torch.equal(torch.autograd.grad(out, five, dout)[0].flatten(2, 3), found)


# Strides of dout and dlse: autograd hands over what it has, and nobody is asked


def gradient_layouts(shape, device) -> dict:
    """dout of a shape (..., rows, heads, dim), as different operations leave it."""
    *batch, rows, heads, dim = shape

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*batch, *shape, device=device).to(BF16)

    flat = torch.randn(math.prod(shape) + 1, device=device).to(BF16)
    return {
        "sum": torch.ones((), device=device, dtype=BF16).expand(shape),
        "heads_first": random(heads, rows, dim).transpose(-3, -2),
        "columns_first": random(rows, dim, heads).transpose(-2, -1),
        "last_first": random(dim, heads, rows).transpose(-3, -1),
        "one_row": random(1, heads, dim).expand(shape),
        "one_head": random(rows, 1, dim).expand(shape),
        "one_column": random(rows, heads, 1).expand(shape),
        "every_second_row": random(2 * rows, heads, dim)[..., ::2, :, :],
        "every_second_column": random(rows, heads, 2 * dim)[..., ::2],
        "wider": random(rows, heads, dim + 24)[..., 8 : 8 + dim],
        "wider_by_4": random(rows, heads, dim + 4)[..., :dim],
        "part_of_qkv": random(rows, 3 * heads, dim)[..., heads : 2 * heads, :],
        "misaligned": flat[1:].view(shape),
    }


@pytest.mark.parametrize("layout", gradient_layouts((1, 1, 1, 1), "cpu"))
@pytest.mark.parametrize("form", ["dense", "packed"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_strides_of_dout_change_no_bit(hopper, layout, form, dim):
    lengths = ((100, 0, 1, 102), (140, 3, 0, 60))
    case = dense((203, 300), (dim, dim), (4, 2), batch=2, **CAUSAL)
    case = case if form == "dense" else packed(lengths, (dim, dim), **CAUSAL)
    inputs = make(case, hopper)
    dout = gradient_layouts((*inputs.q.shape[:-1], dim), hopper)[layout]
    found = gradients(case, inputs, dout, deterministic=True)
    assert_same_bits(found, gradients(case, inputs, dout.clone(memory_format=torch.contiguous_format),
                                      deterministic=True))  # fmt: skip
    assert_right(case, inputs, found, (dout, None))


@pytest.mark.parametrize("dim", [64, 128])
def test_the_gradient_of_a_sum(hopper, dim):
    """As users write it, for out and for lse."""
    case = dense((203, 300), (dim, dim), (4, 2), batch=2)
    inputs = make(case, hopper)
    leaves, (out, lse) = attended(case, inputs)
    ones = torch.ones_like(out), torch.ones_like(lse)
    for loss, grads in (
        (out.sum(), (ones[0], None)),
        (lse.sum(), (None, ones[1])),
        (out.sum() + lse.mT.sum(), ones),
        (out.float().mean() * 2.0**16, (ones[0] * (2.0**16 / out.numel()), None)),
    ):
        assert_right(case, inputs, torch.autograd.grad(loss, leaves, retain_graph=True), grads)


def test_strides_of_dlse_change_no_bit(hopper):
    for case in (dense((203, 300), (64, 64), (4, 2), batch=2, **CAUSAL), packed(SOME, **CAUSAL)):
        inputs = make(case, hopper)
        dout, dlse = upstream(case, inputs, poison=False)
        flat = torch.cat([dlse.new_zeros(1), dlse.flatten()])
        for strange in (
            dlse.mT.contiguous().mT,
            torch.stack([dlse, dlse], -1)[..., 0],
            dlse[..., :1].expand_as(dlse),
            flat[1:].view_as(dlse),
        ):
            expected = gradients(case, inputs, dout, strange.contiguous(), deterministic=True)
            assert_same_bits(gradients(case, inputs, dout, strange, deterministic=True), expected)


def test_what_tma_refuses_is_differentiated_elsewhere(device):
    tensors = off_by_one(device)
    case = dense((100, 100), (64, 64), (2, 2), **CAUSAL)
    inputs = Inputs(*tensors, {**CAUSAL}, [])
    assert device.type == "cpu" or explain(*tensors, causal=True).backend != "gluon"
    dout, dlse = upstream(case, inputs)
    leaves = [x.detach().requires_grad_() for x in tensors]
    results = run(case, same_but(inputs, **dict(zip("qkv", leaves, strict=True))))
    assert_right(case, inputs, backward_of(leaves, results, (dout, dlse)), (dout, dlse))


# Nothing may depend on a grid dimension of 16 bits


@pytest.mark.parametrize("batch, heads", [(70_000, 1), (1, 70_000), (300, 257)])
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_many_sequences_and_heads(hopper, batch, heads, form):
    if hopper.type == "cpu":
        batch, heads = min(batch, 300), min(heads, 300)
    q, k, v, dout = (
        torch.randn(batch, n, heads, 64, device=hopper, dtype=BF16, requires_grad=True) for n in (2, 3, 3, 2)
    )
    if form == "dense":
        out = flash_attn_func(q, k, v)
    else:
        starts = [torch.arange(batch + 1, device=hopper, dtype=torch.int32) * n for n in (2, 3)]
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out = flash_attn_varlen_func(*flat, *starts, 2, 3).unflatten(0, (batch, 2))
    found = torch.autograd.grad(out, (q, k, v), dout)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / 8
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float())
    for got, want in zip(found, torch.autograd.grad(expected, (q, k, v), dout.float()), strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=2**-5, atol=2**-4)


# More than 2**31 elements: windows of 64 keys keep these quick, and a piece of the sequence tells the rest


def assert_piece(found, tensors, begin: int, length: int) -> None:
    """Gradients (rows, dim) of one head with window (63, 0), against those of `length` rows from `begin`."""
    rows = len(tensors[0])
    here = slice(begin, min(begin + length, rows))
    q, k, v, dout = (x[here][None, :, None] for x in tensors)
    case = Case(
        seqlen_q=q.shape[1], seqlen_k=q.shape[1], heads=1, kv_heads=1, head_dim=q.shape[-1], window=(63, 0)
    )
    inputs = Inputs(q, k, v, {}, [])
    wanted = plain_gradients(case, inputs, (dout, None), torch.float64)
    first, last = (0 if begin == 0 else 64), (None if here.stop == rows else -64)
    pieces = slice(first, None), slice(first, last), slice(first, last)
    for what, grad, want, piece in zip("qkv", found, wanted, pieces, strict=True):
        want = want[0, :, 0][piece]
        error = (grad[here][piece].double() - want).abs().max()
        assert error <= 0.02 * want.abs().max(), f"d{what} of rows {here}: {error:.1e}"


@pytest.mark.parametrize("form", ["long", "wide"])
def test_dense_above_2_31_elements(hopper, big, form):
    batch, rows, heads = (1, 131_264, 128) if form == "long" else (1024, 129, 128)
    heads, batch = big(50, heads, 2), batch if hopper.type == "cuda" else min(batch, 3)
    rows = rows if hopper.type == "cuda" else 300
    leaves = [
        torch.randn(batch, rows, heads, 128, device=hopper, dtype=BF16, requires_grad=True) for _ in "qkv"
    ]
    assert hopper.type == "cpu" or leaves[0].numel() > 2**31
    q, k, v = (x.detach() for x in leaves)
    found = torch.autograd.grad(flash_attn_func(*leaves, window_size=(63, 0)), leaves, v)
    for b, h in ((0, 0), (batch - 1, heads - 1), (batch // 2, 1), (batch - 1, 0)):
        tensors, grads = [x[b, :, h] for x in (q, k, v, v)], [x[b, :, h] for x in found]
        for begin in (0, rows // 2, rows - 129):
            assert_piece(grads, tensors, begin, 300)
    assert not any(x.isnan().any() for x in found)


def test_packed_above_2_31_elements(hopper, big):
    """More than 2**24 rows: beyond what a float32 counts, too."""
    batch, rows = big(45, 4096, 7), 4099
    leaves = [torch.randn(batch * rows, 2, 64, device=hopper, dtype=BF16, requires_grad=True) for _ in "qkv"]
    assert hopper.type == "cpu" or (leaves[0].numel() > 2**31 and leaves[0].shape[0] > 2**24)
    starts = torch.arange(batch + 1, device=hopper, dtype=torch.int32) * rows
    q, k, v = (x.detach() for x in leaves)
    out = flash_attn_varlen_func(*leaves, starts, starts, rows, rows, window_size=(63, 0))
    found = torch.autograd.grad(out, leaves, v)
    for b, h in ((0, 0), (batch - 1, 1), (batch - 2, 0), (batch // 2, 1)):
        of_b = slice(b * rows, (b + 1) * rows)
        tensors, grads = [x[of_b, h] for x in (q, k, v, v)], [x[of_b, h] for x in found]
        for begin in (0, 2048, rows - 129):
            assert_piece(grads, tensors, begin, 300)
    assert not any(x.isnan().any() for x in found)


def test_strides_above_2_31_elements(hopper, big):
    """Few elements, far apart."""
    slots, room = big(8, 3, 3), 2**21 if hopper.type == "cuda" else 600
    cache = torch.empty(slots, room, 4, 128, device=hopper, dtype=BF16)
    cache[:, -300:] = torch.randn(slots, 300, 4, 128, device=hopper)
    assert hopper.type == "cpu" or (slots - 1) * cache.stride(0) > 2**31 - 1
    far = cache[:, -300:]
    case = dense((200, 300), (128, 128), (4, 4), batch=slots, **CAUSAL)
    inputs = Inputs(far[:, :200], far, far, {**CAUSAL}, [])
    plain = {x: getattr(inputs, x).contiguous() for x in "qkv"}
    dout = far[:, 100:]
    expected = gradients(case, inputs, dout.contiguous(), deterministic=True, **plain)
    assert_same_bits(gradients(case, inputs, dout, deterministic=True), expected)
