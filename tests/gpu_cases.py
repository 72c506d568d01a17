"""Cases for the Hopper kernels: curated, shared by the test files, and compiled ahead by all cores.

Many shapes for each kernel are cheap, kernels are not (3 seconds of a core each), so shapes vary freely and
what a kernel is compiled for varies on purpose: every tile shape meets every mask in bfloat16 and float16,
and the rest (softcap, packed sequences, seqused, long rows) meets the tile shapes that treat it differently.
Left out: softcap and packed sequences of head dims 96 and 192 in most masks, and of float16.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import itertools
import multiprocessing
import os
import pathlib
import zlib

import torch

from tandem_attn import explain
from tandem_attn.spec import AttentionSpec, Lengths, Options, attention_spec
from tandem_attn.testing import Case, Inputs, assert_right, make, run

BF16, FP16 = torch.bfloat16, torch.float16
TILES = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
GUARD, SENTINEL = 1024, -1234.0  # elements, on both sides of results: the fixture `guarded`
FULL, CAUSAL, WINDOW = {}, {"causal": True}, {"window": (100, 37)}
MASKS = (FULL, CAUSAL, WINDOW)

# FlashAttention-3's odd lengths (hopper/test_flash_attn.py), and both sides of tile edges
LENGTHS = (
    *((1, 1), (64, 128), (239, 1), (799, 3), (113, 203), (108, 256), (384, 256), (1023, 1024), (1024, 1023)),
    *((127, 127), (129, 129), (191, 255), (193, 257), (192, 384), (256, 320)),
)


def dense(lengths: tuple[int, int], dims=(128, 128), heads=(2, 1), **facts) -> Case:
    """A case from (queries, keys), (head_dim, head_dim_v), (heads, kv_heads) and the rest by name."""
    shape = {"seqlen_q": lengths[0], "seqlen_k": lengths[1], "heads": heads[0], "kv_heads": heads[1]}
    return Case(**shape, head_dim=dims[0], head_dim_v=dims[1], **facts)


def packed(lengths: tuple, dims=(128, 128), heads=(4, 2), **facts) -> Case:
    """Likewise, from the lengths of all sequences."""
    shape = {"lengths_q": lengths[0], "lengths_k": lengths[1], "heads": heads[0], "kv_heads": heads[1]}
    return Case(**shape, head_dim=dims[0], head_dim_v=dims[1], **facts)


GRID = [
    *(dense(n, dims, **mask) for dims, mask, n in itertools.product(TILES, MASKS, LENGTHS)),
    *(
        dense(n, dims, dtype=FP16, **mask)
        for dims, mask, n in itertools.product(TILES, MASKS, ((113, 203), (384, 256)))
    ),
]

# Widths that TMA pads to the next tile, and values of another width than keys
WIDTHS = [
    dense(n, dims, batch=2, **mask)
    for dims in (
        *((d, d) for d in (8, 40, 72, 80, 112, 160, 224)),
        *((64, 128), (128, 64), (96, 256), (40, 72), (256, 64), (160, 112), (8, 256)),
    )
    for n, mask in (((113, 203), CAUSAL), ((129, 256), FULL), ((300, 190), WINDOW))
]

# Query heads that share a KV head: 1, 2, 3, 5, 8 of them, and all
HEADS = [
    dense((113, 203), dims, heads, batch=3, **mask)
    for heads in ((6, 6), (6, 3), (6, 2), (10, 2), (24, 3), (7, 1), (8, 1))
    for dims, mask in (((128, 128), CAUSAL), ((64, 64), FULL), ((64, 64), WINDOW))
]

# A single key, a side alone, wider than the sequence; rows and whole tiles that see nothing; and tiles whose
# last key block, which is the first they visit, is empty for half of their rows (256 queries, 320 keys)
WINDOWS = [
    dense(n, (dim, dim), window=window)
    for dim in (64, 128)
    for window in (
        (0, 0),
        (5, 0),
        (0, 5),
        (10, 0),
        (64, 64),
        (128, 0),
        (-1, 17),
        (17, -1),
        (-1, 0),
        (2000, 9),
    )
    for n in ((256, 320), (700, 64), (64, 200), (257, 257))
]
WINDOWS += [dense((384, 100), (256, 256), window=w) for w in ((3, 3), (0, 0), (-1, 40), (40, -1))]

SOFTCAPS = [
    dense(n, dims, softcap=cap, **mask)
    for dims, mask, cap in (
        ((64, 64), CAUSAL, 15.0),
        ((128, 128), FULL, 50.0),
        ((128, 128), CAUSAL, 15.0),
        ((128, 128), WINDOW, 2.0),
        ((192, 128), CAUSAL, 30.0),
        ((256, 256), CAUSAL, 15.0),
    )
    for n in ((113, 203), (384, 256), (1024, 1023))
]

# Packed sequences. The schedule looks at 32 at a time; empty ones come in q, in k, in both, and in rows of 40
SOME = ((5, 0, 600, 1, 64, 128, 129, 0), (7, 3, 600, 0, 128, 64, 129, 0))
MANY = (tuple((7 * i * i + 3 * i) % 41 for i in range(70)), tuple((5 * i * i + i) % 53 for i in range(70)))
SPARSE = ((0,) * 40 + (130,) + (0,) * 30 + (1,), (9,) * 40 + (250,) + (0,) * 30 + (31,))
STEPS = ((1, 0, 1, 1) * 9, tuple(11 * i % 301 for i in range(36)))  # as in decoding, with unused slots
EQUAL = ((256,) * 3, (256,) * 3)
PACKED = [
    *(
        packed(lengths, (dim, dim), **mask)
        for dim, mask, lengths in itertools.product((64, 128), MASKS, (SOME, MANY, SPARSE, STEPS, EQUAL))
    ),
    *(
        packed(lengths, dims, **mask)
        for dims, mask in (
            ((96, 96), CAUSAL),
            ((192, 128), FULL),
            ((192, 128), CAUSAL),
            ((192, 192), CAUSAL),
            ((256, 256), CAUSAL),
            ((256, 256), WINDOW),
        )
        for lengths in (SOME, MANY)
    ),
    packed(SOME, (112, 72), heads=(6, 2), causal=True),
    packed(SOME, (40, 40), heads=(3, 1)),
    packed(SOME, softcap=15.0, causal=True),
]
USED_Q, USED_K = (5, 0, 513, 0, 64, 1, 129, 0), (0, 3, 600, 0, 100, 64, 128, 0)
USED = [
    packed(SOME, dims, used_q=used_q, used_k=used_k, **mask)
    for dims, mask, used_q, used_k in (
        ((128, 128), CAUSAL, USED_Q, USED_K),
        ((64, 64), FULL, USED_Q, USED_K),
        ((128, 128), CAUSAL, USED_Q, None),
        ((128, 128), FULL, None, USED_K),
        ((128, 128), WINDOW, USED_Q, USED_K),
    )
]

# More tiles than multiprocessors, and rows too long to count as short
LONG = [
    dense((4096, 4096), (64, 64), (8, 2), **CAUSAL),
    dense((4224, 4224), (64, 64), (8, 8), **FULL),
    dense((4096, 4000), (64, 64), (8, 8), **FULL),
    dense((4096, 4096), (64, 64), (8, 1), window=(128, 0)),
    dense((4097, 4160), (128, 128), (6, 2), **CAUSAL),
    dense((16384, 16384), (128, 128), (2, 1), **CAUSAL),
    dense((8192, 8192), (96, 96), (3, 1), **CAUSAL),
    dense((4096, 4095), (192, 128), (5, 5), **CAUSAL),
    dense((4096, 4096), (192, 192), (5, 1), window=(1000, 0)),
    dense((4096, 4096), (256, 256), (5, 1), **CAUSAL),
    dense((4224, 4200), (256, 256), (4, 4), **FULL),
    dense((2048, 2048), (256, 256), (4, 4), dtype=FP16, **FULL),
    packed(((2048, 0, 1500, 3, 4096), (2048, 5, 3000, 0, 4096)), (64, 64), (8, 2), **CAUSAL),
    packed(((2048, 0, 1500, 3, 4096), (2048, 5, 3000, 0, 4096)), (128, 128), (8, 8), **CAUSAL),
    packed(((3000, 70, 2000), (3000, 5000, 100)), (64, 64), (8, 8), **FULL),
]

# One key wins each row by 2**256: the answer is bitwise that key's row of v
EXACT = [
    *(
        dense(n, dims, (4, 2), dtype=dtype, **mask)
        for dims, dtype, (n, mask) in itertools.product(
            TILES,
            (BF16, FP16),
            (((257, 384), FULL), ((257, 383), FULL), ((257, 383), CAUSAL), ((383, 257), WINDOW)),
        )
    ),
    *(dense((140, 200), (d, d), (6, 3), **CAUSAL) for d in (8, 40, 72, 80, 112, 160, 224)),
    *(dense((140, 200), dims, (5, 1), **FULL) for dims in ((64, 128), (128, 64), (96, 256), (40, 72))),
    *(case for case in PACKED if not case.softcap),
    *USED,
    *(case for case in LONG if max(case.seqlen_q, case.seqlen_k) < 4100),
]

# Run again and again (test_forward_repeat.py): one for each way in which warpgroups hand work to each other
REPEATS = [
    dense((1300, 1300), (64, 64), (8, 2), batch=2, **CAUSAL),  # three consumers, skipped blocks
    dense((1300, 1300), (64, 64), (8, 2), batch=2, **FULL),
    dense((600, 600), (64, 64), (8, 2), batch=6, **CAUSAL),
    dense((1111, 1111), (128, 128), (8, 2), batch=2, **CAUSAL),
    dense((512, 640), (256, 256), (8, 2), batch=2, **FULL),
    dense((1100, 1100), (256, 256), (4, 2), batch=2, **CAUSAL),
    dense((700, 700), (96, 96), (8, 2), batch=2, **CAUSAL),
    dense((700, 700), (192, 128), (8, 2), batch=2, **CAUSAL),
    dense((1300, 1300), (64, 64), (8, 2), batch=2, window=(64, 0)),
    packed(((700, 0, 300, 129, 64, 1), (700, 9, 800, 129, 0, 77)), (128, 128), (8, 2), **CAUSAL),
    packed(((1, 0) * 40 + (200,), (90,) * 80 + (200,)), (64, 64), (8, 2), **FULL),
]

# Kernels of the files that choose their own tensors
OTHERS = [
    dense((2000, 2000), (64, 64), window=(63, 0)),
    dense((2000, 2000), (128, 128), window=(63, 0)),
    packed(((2000,), (2000,)), (64, 64), window=(63, 0)),
]

BUDGET = [*GRID, *WIDTHS, *HEADS, *WINDOWS, *SOFTCAPS, *PACKED, *USED]
ALL = [*BUDGET, *LONG, *EXACT, *REPEATS, *OTHERS]


def name(case: Case) -> str:
    """Case.id, and which of seqused_q and seqused_k there are."""
    return case.id + "q" * (case.used_q is not None) + "k" * (case.used_k is not None)


def seed_of(case: Case) -> int:
    """Other numbers for other cases, the same in each run."""
    return zlib.crc32(name(case).encode())


def too_slow_to_rehearse(case: Case, device: torch.device) -> bool:
    """Whether only a GPU should try."""
    pairs = sum(rows * keys for rows, keys in zip(case.rows, case.keys, strict=True))
    return device.type == "cpu" and case.heads * pairs > 2**23


def answer(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); on a GPU certainly from the Hopper kernels, if there is anything to compute."""
    if inputs.q.is_cuda:
        explanation = explain(inputs.q, inputs.k, inputs.v, **inputs.kwargs)
        assert explanation.backend == ("empty" if explanation.spec.is_empty else "gluon"), explanation
    return run(case, inputs)


def softened(case: Case, inputs: Inputs) -> Inputs:
    """The same inputs; where scores are capped, large enough for the cap to matter."""
    if case.softcap:
        inputs.q.mul_(case.softcap / 2)
    return inputs


def check(case: Case, device: torch.device, poison: bool = True) -> None:
    """The error budget, with NaN in all memory that does not count."""
    inputs = softened(case, make(case, device, seed=seed_of(case), poison=poison))
    assert_right(case, inputs, *answer(case, inputs))


def declared(case: Case, inputs: Inputs, out: torch.Tensor, lse: torch.Tensor):
    """(rows of out, rows of lse) of each sequence, without those that hold nothing defined."""
    if not case.varlen:
        return list(zip(out, lse, strict=True))
    return [(out[rows], lse[:, rows]) for rows, _ in inputs.slices]


def assert_same_bits(case: Case, inputs: Inputs, one: tuple, other: tuple) -> None:
    """Raise unless two answers to a case are the same in every bit that is defined."""
    pairs = zip(declared(case, inputs, *one), declared(case, inputs, *other), strict=True)
    for i, (a, b) in enumerate(pairs):
        for what, x, y in zip(("out", "lse"), a, b, strict=True):
            assert torch.equal(x, y), f"{name(case)}: {what} of sequence {i} differs"


# What a case compiles to


def spec_of(case: Case, loose: int = 0) -> AttentionSpec:
    """The question a case asks, of tensors without memory; `loose`: what is added to max_seqlen."""

    def tensor(rows: tuple[int, ...], heads: int, width: int) -> torch.Tensor:
        return torch.empty(*rows, heads, width, dtype=case.dtype, device="meta")

    rows_q, rows_k = (case.batch, case.seqlen_q), (case.batch, case.seqlen_k)
    lengths = None
    if case.varlen:
        rows_q, rows_k = (sum(case.lengths_q),), (sum(case.lengths_k),)
        starts = torch.empty(case.batch + 1, dtype=torch.int32, device="meta")
        used = [None if x is None else starts[1:] for x in (case.used_q, case.used_k)]
        lengths = Lengths(starts, starts, *used, case.seqlen_q + loose, case.seqlen_k + loose)
    q = tensor(rows_q, case.heads, case.head_dim)
    k = tensor(rows_k, case.kv_heads, case.head_dim)
    v = tensor(rows_k, case.kv_heads, case.dim_v)
    return attention_spec(q, k, v, lengths, Options(None, *case.bounds, case.softcap, 0, False))


def kernel_of(case: Case, loose: int = 0):
    """All that a kernel is compiled for: the same for two cases that share one. Imports Triton."""
    from tandem_attn.kernels.config import forward_config

    spec = spec_of(case, loose)
    return forward_config(spec), spec.has_seqused_q, spec.has_seqused_k


def distinct_kernels() -> dict:
    """Every kernel of the curated cases, and a case that needs it."""
    return {kernel_of(case): case for case in reversed(ALL) if not spec_of(case).is_empty}


class _NoDriver:
    """In place of Triton's driver: a Hopper GPU on which nothing will run."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def compile_kernel(case: Case) -> str:
    """Put a case's kernel where a launch will find it; the hash it is found by."""
    pretend_hopper()
    from tandem_attn.kernels import launch

    spec = dataclasses.replace(spec_of(case), device=torch.device("cuda", 0))
    plan = launch.forward(spec)

    def meta(*shape: int, dtype=case.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    operands = [meta(8, 8, 8, 8)[0] if spec.varlen else meta(8, 8, 8, 8) for _ in range(4)]
    starts = meta(8, dtype=torch.int32) if spec.varlen else None
    used = [starts if has else None for has in (spec.has_seqused_q, spec.has_seqused_k)]
    counter = meta(1, dtype=torch.int32) if plan.dynamic else None
    pointers = (starts, starts, *used, counter, None, None)
    made = plan._prepare((*operands, meta(8, dtype=torch.float32)), pointers)
    return made.compiled.hash


def pretend_hopper() -> None:
    """Only for a process of its own: Triton's driver is replaced."""
    import triton

    from tandem_attn import arch
    from tandem_attn.kernels import launcher

    triton.runtime.driver.set_active(_NoDriver())
    arch._properties = lambda index: (9, 0, 132)
    launcher.KernelLauncher._find_c_launch = lambda self: None


def compile_all(folder: pathlib.Path) -> None:
    """Every kernel of the curated cases."""
    compile_once(folder / "kernels-compiled", [(compile_kernel, x) for x in distinct_kernels().values()])


def compile_once(done: pathlib.Path, jobs: list[tuple]) -> None:
    """Call functions with arguments in processes of their own, once for a session's file `done`: other
    workers of pytest-xdist wait for the first."""
    with open(done, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock.fileno()).st_size:
            return
        workers = min(os.cpu_count() or 1, 16)
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            for made in [pool.submit(*job) for job in jobs]:
                with contextlib.suppress(Exception):  # the test that needs the kernel will say it better
                    made.result()
        lock.write("done")
