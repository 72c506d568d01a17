"""Cases and tools for the backward kernels: what gradients should be, how they are asked for and compared.

Features reuse the forward's cases (gpu_cases.py); lengths are on both sides of the backward's tiles, 64 or
128 queries by 128 keys. The oracle is autograd through attention with an explicit mask, in float64 for the
truth and in the case's dtype for the budget. Left out: what no kernel is promised for, head_dim_v other than
head_dim but for 192/128 (OTHER_WIDTHS: right, whoever answers).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import itertools
import math
import multiprocessing
import os
import pathlib

import gpu_cases
import torch
from gpu_cases import BF16, CAUSAL, FP16, FULL, MASKS, SOME, TILES, WINDOW, answer, dense, name, packed
from test_forward import same_but
from test_gpu_runtime import plain

from tandem_attn import reference
from tandem_attn.kernels.config_backward import parts_of_group
from tandem_attn.testing import Case, Inputs, assert_within_budget, make
from tandem_attn.testing.budget import explicit_mask, rounding_band
from tandem_attn.testing.inputs import MARGIN

MAX_SCORES = 2**27  # elements of one block of scores of the oracle

LENGTHS = (
    *((1, 1), (1, 65), (64, 1), (2, 3), (63, 65), (65, 63), (64, 64), (127, 129), (128, 128), (129, 127)),
    *((191, 203), (203, 191), (300, 300), (300, 513), (513, 300), (513, 513), (64, 256), (384, 128)),
)
GRID = [
    *(dense(n, dims, **mask) for dims, mask, n in itertools.product(TILES, MASKS, LENGTHS)),
    *(
        dense(n, dims, (4, 2), batch=2, dtype=FP16, **mask)
        for dims, mask, n in itertools.product(TILES, MASKS, ((113, 203), (300, 257)))
    ),
]
WIDTHS = [case for case in gpu_cases.WIDTHS if case.dim_v == case.head_dim]
OTHER_WIDTHS = [case for case in gpu_cases.WIDTHS if case.dim_v != case.head_dim]
LAYOUTS = [
    *(dense((203, 203), (d, d), (6, 2), layout="qkvpacked", **CAUSAL) for d in (64, 128)),
    dense((130, 203), (128, 128), (4, 4), batch=2, layout="bhsd", **WINDOW),
    dense((130, 203), (64, 64), (4, 4), batch=2, layout="expanded"),
    packed(((70, 1, 133),) * 2, (64, 64), (4, 4), layout="qkvpacked", **CAUSAL),
]
# Lengths of 0 and 1 in every combination, nothing but empty sequences, and one long among them
FEW = (tuple(a for a in (0, 1, 2) for _ in (0, 1, 2)), (0, 1, 2) * 3)
EMPTY = [
    *(packed(FEW, (d, d), **mask) for d in (64, 128, 256) for mask in (FULL, CAUSAL)),
    packed(((0, 0), (0, 0))),
    packed(((0, 300, 0), (0, 0, 300))),
    packed(((0, 0, 5), (300, 64, 0)), **CAUSAL),
    packed(((0, 129, 0), (0, 257, 0)), (64, 64), window=(20, 3)),
    dense((0, 100), (128, 128)),
    dense((100, 0), (128, 128), **CAUSAL),
    dense((100, 100), (128, 128), batch=0),
]
FEATURES = [*gpu_cases.HEADS, *gpu_cases.WINDOWS, *gpu_cases.SOFTCAPS, *gpu_cases.PACKED, *gpu_cases.USED]
BUDGET = list(dict.fromkeys([*GRID, *WIDTHS, *FEATURES, *LAYOUTS, *EMPTY]))
LONG = gpu_cases.LONG

# Gradients that are numbers of few bits: see `pairs_win` and `equal_shares`
PAIRS = [
    *(
        dense(n, dims, (4, 2), dtype=dtype, **mask)
        for dims, dtype, (n, mask) in itertools.product(
            TILES,
            (BF16, FP16),
            (((257, 384), FULL), ((300, 383), CAUSAL), ((383, 257), CAUSAL), ((383, 257), WINDOW)),
        )
    ),
    *(dense((140, 200), (d, d), (6, 3), batch=2, **CAUSAL) for d in (8, 40, 72, 80, 112, 160, 224)),
    *(case for case in gpu_cases.PACKED if not case.softcap and case.dim_v == case.head_dim),
    *gpu_cases.USED,
    *(case for case in LONG if max(case.seqlen_q, case.seqlen_k) < 4100),
]
SHARES = [
    dense(n, dims, (4, 2), dtype=dtype, **mask)
    for dims, dtype, (n, mask) in itertools.product(
        TILES,
        (BF16, FP16),
        (((300, 512), FULL), ((131, 64), FULL), ((300, 300), {"window": (63, 0)}), ((257, 257), CAUSAL)),
    )
]
LSE = [
    *(dense((203, 300), dims, (4, 2), batch=2, **mask) for dims in TILES for mask in (FULL, CAUSAL)),
    dense((300, 70), (128, 128), **CAUSAL),  # rows that see nothing
    dense((203, 300), (128, 128), (4, 2), **WINDOW),
    dense((203, 300), (128, 128), softcap=15.0, **CAUSAL),
    dense((203, 300), (64, 64), dtype=FP16),
    packed(SOME, (128, 128), **CAUSAL),
    gpu_cases.USED[0],
]

# Run again and again (test_backward_repeat.py), in a case of every head_dim with many tiles on both sides
REPEATS = [
    dense((1111, 1111), (64, 64), (8, 2), batch=2, **CAUSAL),
    dense((700, 900), (96, 96), (8, 2), batch=2, **CAUSAL),
    dense((1111, 1111), (128, 128), (8, 2), batch=2, **CAUSAL),
    dense((700, 900), (192, 128), (8, 8), batch=2, **FULL),
    dense((700, 900), (192, 192), (8, 2), batch=2, **CAUSAL),
    dense((700, 900), (256, 256), (8, 2), batch=2, **CAUSAL),
    dense((1300, 1300), (64, 64), (4, 4), batch=2, window=(64, 0)),
    packed(((700, 0, 300, 129, 64, 1), (700, 9, 800, 129, 0, 77)), (128, 128), (8, 2), **CAUSAL),
]
REPEATED_GRID = [
    *(dense((513, 600), dims, (4, 2), **mask) for dims in TILES for mask in MASKS),
    *(packed(SOME, (dim, dim), **mask) for dim in (64, 128) for mask in MASKS),
    dense((513, 600), (128, 128), (8, 1), batch=2, softcap=15.0, **CAUSAL),
    dense((513, 600), (128, 128), (4, 2), dtype=FP16, **CAUSAL),
    dense((513, 600), (112, 112), (6, 2), **CAUSAL),
    *gpu_cases.USED,
]


# Questions


def upstream(case: Case, inputs: Inputs, seed: int = 0, values: str = "normal", poison: bool = True):
    """(dout, dlse) for a case: normal numbers, or -1, 0 and 1 ("integers"); NaN where nothing counts."""
    generator = torch.Generator().manual_seed(seed + 1)

    def numbers(*shape: int) -> torch.Tensor:
        if values == "normal":
            return torch.randn(shape, generator=generator)
        return torch.randint(-1, 2, shape, generator=generator).float()

    *batch, rows, heads, _ = inputs.q.shape
    margin, junk = (MARGIN, math.nan) if poison else (0, 0.25)
    shape = (*batch, rows + 2 * margin, heads, case.dim_v)
    dout = torch.full(shape, junk, dtype=case.dtype, device=inputs.q.device).narrow(-3, margin, rows)
    dlse = torch.full((*batch, heads, rows), junk, device=inputs.q.device)
    for i, count in enumerate(case.rows):
        where = inputs.slices[i][0] if case.varlen else i
        dout[where].copy_(numbers(count, heads, case.dim_v))
        (dlse[:, where] if case.varlen else dlse[where]).copy_(numbers(heads, count))
    return dout, dlse


def pairs_win(case: Case, device, seed: int = 0):
    """(inputs, (dout, dlse)) such that gradients are exact, and other for every row and key.

    Keys 2j and 2j + 1 differ only in the last column, where q is 0. In each row one such pair, or the one of
    them that is seen, wins by e**96 or more: its probabilities are 1/2 or 1, all others 0. With out and its
    gradient in few bits, dS is a multiple of 1/4 below 256, and what follows are sums of integers.
    """
    inputs = make(case, device, seed=seed, values="integers", poison=True)
    inputs.kwargs["softmax_scale"] = 0.5
    for q, k, v in inputs.sequences():
        k[1::2] = k[0::2][: len(k) // 2]
        if case.head_dim >= 3 * (len(k) - 1).bit_length():  # else a key's number takes every column
            q[..., -1], k[0::2, :, -1], k[1::2, :, -1] = 0.0, 1.0, -1.0
        v.copy_(v.sign())
    return inputs, upstream(case, inputs, seed, "integers")


def equal_shares(case: Case, device, seed: int = 0):
    """(inputs, dout) such that gradients are exact, and every key counts.

    q and k are nonzero in different columns, so all scores are 0 and probabilities 1/n. Keys 2j and 2j + 1
    have opposite values, so out is 0 where whole pairs are seen. dout is 0 in rows where it is not, or where
    n is no power of two.
    """
    inputs = make(case, device, seed=seed, values="uniform")
    inputs.kwargs["softmax_scale"] = 0.25
    dout, _ = upstream(case, inputs, seed, "integers")
    half = case.head_dim // 2
    for (q, k, v), grad in zip(inputs.sequences(), dout, strict=True):
        q[..., :half] = torch.randint(-2, 3, q[..., :half].shape, device=device)
        k[..., :half] = 0.0
        v.copy_(v.sign())
        v[1::2] = -v[0::2][: len(v) // 2]
        seen = explicit_mask(torch.arange(len(q), device=device), len(q), len(k), case.bounds)
        counts = seen.sum(-1)
        cancelled = (seen.float() @ v.flatten(1).float() == 0.0).all(-1)
        grad[(counts & (counts - 1) != 0) | ~(cancelled | (counts == 1))] = 0.0
    return inputs, dout


# Answers


def attended(case: Case, inputs: Inputs):
    """(leaves, (out, lse)): the forward, ready for `backward_of`."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    return leaves, answer(case, Inputs(*leaves, inputs.kwargs, inputs.slices))


def documented_bytes(case: Case, deterministic: bool = False) -> int:
    """Gradients, and what docs/kernels/backward.md names: with rows that may see nothing, dout once more."""
    tokens = sum(case.lengths_q) if case.varlen else case.batch * case.seqlen_q
    keys = sum(case.lengths_k) if case.varlen else case.batch * case.seqlen_k
    results = 2 * tokens * case.heads * case.head_dim
    results += 2 * keys * case.kv_heads * (case.head_dim + case.dim_v)
    if case.causal and (case.varlen or case.seqlen_q > case.seqlen_k):
        results += 2 * tokens * case.heads * case.dim_v
    rows = tokens + 128 * (case.batch + 1) if case.varlen else case.batch * -(-case.seqlen_q // 128) * 128
    columns = {1: 64, 2: 128}.get(-(-max(case.head_dim, case.dim_v) // 64), 0)  # of dq in float32
    widths = 2 * columns or 256 + next(w for w in (64, 128, 256) if w >= case.dim_v)
    parts = parts_of_group(dataclasses.replace(gpu_cases.spec_of(case), deterministic=deterministic))
    if parts > 1:  # dk and dv in float32 for every part of a group
        results += 4 * keys * case.kv_heads * parts * widths
    return results + rows * case.heads * 4 * (columns + 2)


def backward_of(leaves, results, grads, **options) -> tuple:
    """(dq, dk, dv) from the gradients of out and lse, either of which may be None."""
    pairs = [(x, grad) for x, grad in zip(results, grads, strict=True) if grad is not None]
    return torch.autograd.grad([x for x, _ in pairs], leaves, [grad for _, grad in pairs], **options)


def gradients(case: Case, inputs: Inputs, dout=None, dlse=None, **changes) -> tuple:
    """(dq, dk, dv); on a GPU from the Hopper kernels. `changes`: of keyword arguments, or of q, k, v."""
    return backward_of(*attended(case, same_but(inputs, **changes)), (dout, dlse))


def plain_gradients(case: Case, inputs: Inputs, grads, dtype: torch.dtype) -> list:
    """Autograd through plain attention in `dtype`; 0 in rows that are not declared."""
    found = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (inputs.q, inputs.k, inputs.v)]
    group = case.heads // case.kv_heads
    for i, (q, k, v) in enumerate(inputs.sequences()):
        if not len(q) or not len(k):
            continue
        rows, keys = inputs.slices[i] if case.varlen else (i, i)
        dout = None if grads[0] is None else grads[0][rows]
        dlse = None if grads[1] is None else grads[1][:, rows] if case.varlen else grads[1][i]
        step = max(1, MAX_SCORES // (len(q) * len(k) * group))
        for first in range(0, case.kv_heads, step):
            some, of_q = slice(first, first + step), slice(first * group, (first + step) * group)
            leaves = [x.detach().to(dtype).requires_grad_() for x in (q[:, of_q], k[:, some], v[:, some])]
            results = plain(case, *leaves, inputs.scale)
            given = (None if dout is None else dout[:, of_q].to(dtype), None if dlse is None else dlse[of_q])
            given = [None if x is None else x.to(dtype) for x in given]
            parts = backward_of(leaves, results, given, materialize_grads=True)
            for whole, where, heads, part in zip(
                found, (rows, keys, keys), (of_q, some, some), parts, strict=True
            ):
                whole[where][:, heads] = part
    return found


# Comparisons


def assert_right(case: Case, inputs: Inputs, found, grads, factor: float = 2.0) -> None:
    """Raise unless dq, dk and dv are each within budget in every sequence, and 0 where nothing is seen."""
    wanted = plain_gradients(case, inputs, grads, torch.float64)
    low = plain_gradients(case, inputs, grads, case.dtype)
    noise = _noise(case, inputs, grads)
    for what, got, want, other, floor in zip("qkv", found, wanted, low, noise, strict=True):
        for where in _declared(case, inputs, what):
            parts = got[where], want[where], other[where]
            if not parts[0].numel():
                continue
            # by a power of two, so that the rounding band fits gradients of any size
            size = max(float(parts[1].abs().max()), float(parts[2].abs().max()), floor, 1e-30)
            unit = 2.0 ** -math.floor(math.log2(size))
            got_one, want_one, low_one = (x * unit for x in parts)
            band = rounding_band(want_one, case.dtype) + floor * unit
            assert_within_budget(got_one, want_one, low_one, f"{name(case)} d{what}", factor, band)
    assert_zeros(case, inputs, found)


def _declared(case: Case, inputs: Inputs, what: str) -> list:
    """Where a gradient counts: one place for each packed sequence."""
    if not case.varlen:
        return [slice(None)]
    return [rows if what == "q" else keys for rows, keys in inputs.slices]


def _noise(case: Case, inputs: Inputs, grads) -> tuple[float, float, float]:
    """What float32 sums of different order may leave of dq, dk and dv where dP - delta should be 0."""

    def longest(x) -> float:
        return float(x.double().nan_to_num(0.0).norm(dim=-1).max()) if x is not None and x.numel() else 0.0

    largest_dlse = 0.0 if grads[1] is None else longest(grads[1][..., None])
    of_score = 2.0**-20 * inputs.scale * (longest(grads[0]) * longest(inputs.v) + largest_dlse)
    return of_score * longest(inputs.k), of_score * longest(inputs.q), 2.0**-20 * longest(grads[0])


def assert_zeros(case: Case, inputs: Inputs, found) -> None:
    """Raise unless gradients of what has no part in any sum are exactly 0."""
    for what, grad in zip("qkv", found, strict=True):
        assert grad.is_contiguous() and grad.dtype == case.dtype, f"d{what}"
        if case.varlen:
            outside = torch.ones(len(grad), dtype=torch.bool, device=grad.device)
            for where in _declared(case, inputs, what):
                outside[where] = False
            wrong = int(torch.count_nonzero(grad[outside]))
            assert wrong == 0, f"{name(case)}: {wrong} elements of d{what} outside the lengths are not 0"
    for i, (q, k, _) in enumerate(inputs.sequences()):
        if len(q) * len(k) > 2**24:
            continue
        rows, keys = inputs.slices[i] if case.varlen else (i, i)
        seen = explicit_mask(torch.arange(len(q), device=q.device), len(q), len(k), case.bounds)
        for what, grad, where, part in zip(
            "qkv", found, (rows, keys, keys), (seen.any(-1), seen.any(0), seen.any(0)), strict=True
        ):
            wrong = int(torch.count_nonzero(grad[where][~part]))
            assert wrong == 0, f"{name(case)}: {wrong} elements of d{what} in unseen rows are not 0"


def assert_exact(case: Case, inputs: Inputs, found, grads) -> list:
    """Raise unless every bit is right, of numbers that float32 holds exactly; returns what is right."""
    wanted = plain_gradients(case, inputs, grads, torch.float64)
    wanted = [((x * 2.0**30).round() / 2.0**30).float().to(case.dtype) for x in wanted]
    for what, got, want in zip("qkv", found, wanted, strict=True):
        if got.is_cuda:
            wrong = (got != want).nonzero()
            assert len(wrong) == 0, f"{name(case)}: {len(wrong)} wrong in d{what}, first {wrong[0].tolist()}"
        else:  # the reference does not round probabilities, so that they are not quite powers of two
            eps, largest = torch.finfo(case.dtype).eps, float(want.abs().max())
            torch.testing.assert_close(got, want, rtol=eps, atol=2e-4 * largest)
    return wanted


def assert_close(found, wanted) -> None:
    """Raise unless gradients differ at most by sums in another order, and bits lost or won by that."""
    for i, (got, want) in enumerate(zip(found, wanted, strict=True)):
        assert got.shape == want.shape, f"gradient {i}"
        if got.numel():
            eps, largest = torch.finfo(got.dtype).eps, float(want.abs().max())
            error = (got.double() - want.double()).abs() - eps * want.double().abs()
            worst, limit = float(error.max()), eps / 2 * largest  # NaN is not below it
            assert worst <= limit, f"gradient {i} of {len(wanted)}: {worst:.2e} apart, {limit:.2e} allowed"


def assert_same_bits(found, wanted) -> None:
    """Raise unless gradients are the same; 0 equals -0."""
    for i, (got, want) in enumerate(zip(found, wanted, strict=True)):
        differ = f"{int((got != want).sum())} elements differ" if got.shape == want.shape else "another shape"
        assert torch.equal(got, want), f"gradient {i} of {len(wanted)}: {differ}"


# Fixtures, made in each test file by pytest.fixture(...)


def only_kernels(device, backend, monkeypatch) -> torch.device:
    """In place of `hopper`: `device`, and only the Hopper kernels may answer, in the backward too."""
    if device.type == "cpu":
        backend("reference")
        return device
    backend("gluon")
    monkeypatch.setattr(reference, "backward", refuse)
    return device


def refuse(*_):
    """In place of `reference.backward`."""
    raise AssertionError("gradients were asked of the reference")


def compile_ahead(request, tmp_path_factory) -> None:
    """In place of `kernels`: those of these cases alone, by all cores; nothing if only a few tests run."""
    wanted = sum("gpu" in item.keywords for item in request.session.items)
    if torch.cuda.is_available() and os.environ.get("TANDEM_TEST_ON") != "cpu" and wanted > 20:
        folder = tmp_path_factory.getbasetemp()
        compile_once(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


def distinct_kernels() -> dict:
    """A case, and whether dq repeats, for each combination of facts that a kernel may be compiled for."""
    found = {}
    repeated = [(case, True) for case in (*REPEATS, *REPEATED_GRID)]
    for case, deterministic in ((case, False) for case in (*BUDGET, *LSE, *PAIRS, *SHARES, *LONG)):
        repeated.append((case, deterministic))
    for case, deterministic in reversed(repeated):
        spec = gpu_cases.spec_of(case)
        if not spec.is_empty:
            group = min(case.heads // case.kv_heads, 2)
            spec = dataclasses.replace(spec, deterministic=deterministic)
            key = (
                gpu_cases.kernel_of(case),
                bool(case.softcap),
                group,
                parts_of_group(spec) > 1,
                deterministic,
            )
            found[key] = case, deterministic
    return found


def compile_kernel(case: Case, deterministic: bool) -> None:
    """Run a case once, for what that leaves in Triton's cache on disk."""
    inputs = make(case, "cuda")
    dout, _ = upstream(case, inputs, poison=False)
    gradients(case, inputs, dout, deterministic=deterministic)
    torch.cuda.synchronize()


def compile_once(folder: pathlib.Path) -> None:
    """Compile everything, once for a session's `folder`: other workers of pytest-xdist wait for the first."""
    with open(folder / "backward-compiled", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock.fileno()).st_size:
            return
        workers = min(os.cpu_count() or 1, 16)  # each has a context of its own on the GPU
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            for made in [pool.submit(compile_kernel, *facts) for facts in distinct_kernels().values()]:
                with contextlib.suppress(Exception):  # the test that needs the kernel will say it better
                    made.result()
        lock.write("done")
