"""Cases of attention over a KV cache for the Hopper kernels, and their kernels compiled ahead by all cores.

Every shape of heads, dims and few tokens has a kernel of its own (3 seconds of a core each), so lengths vary
inside a case: empty, one key, both sides of tile edges, and more tiles than a program's stages.
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
from gpu_cases import _NoDriver
from test_decode_reference import FEATURES

import tandem_attn
from tandem_attn.spec_decode import AppendSpec, DecodeSpec, Given
from tandem_attn.testing.decode_inputs import SPARE, DecodeCase, DecodeInputs, run_decode

BF16, FP16 = torch.bfloat16, torch.float16
DIMS = ((64, 64), (128, 128), (256, 256), (96, 96), (192, 192), (192, 128), (40, 40), (64, 256), (8, 24))
BASE = dict(heads=8, kv_heads=2, head_dim=128, capacity=700, seqlens=(513, 64), tokens=1)


def cached(**facts) -> DecodeCase:
    """A case that differs from BASE in some facts; `dims`: (head_dim, head_dim_v)."""
    if "dims" in facts:
        facts["head_dim"], facts["head_dim_v"] = facts.pop("dims")
    return DecodeCase(**{**BASE, **facts})


def lengths(batch: int, room: int = 1500) -> tuple[int, ...]:
    """One of each sequence, from 0 to less than `room`."""
    return tuple(7919 * i % room for i in range(batch))


def rows(batch: int, **facts) -> DecodeCase:
    """Many sequences of many lengths."""
    return cached(**dict(batch=batch, seqlens=lengths(batch), capacity=1500) | facts)


# Every tile, with 16, 64 and 128 rows of it, in rows, whole pages, pieces and gathered pages
WIDTHS = [
    cached(dims=dims, **facts)
    for dims in DIMS
    for facts in (
        {},
        dict(tokens=3, causal=True),
        dict(page_size=16),
        dict(page_size=64, tokens=8, causal=True),
        dict(page_size=3),
        dict(tokens=40, causal=True),
        dict(tokens=20, causal=True, page_size=16),
        dict(tokens=20, causal=True, page_size=5, seqlens=(100, 600)),
    )
]
PAGES = [
    cached(page_size=size, **facts)
    for size in (1, 3, 8, 16, 32, 64, 128, 256, 48)
    for facts in (dict(seqlens=(513, 129)), dict(tokens=40, causal=True), dict(dims=(64, 64), window=(70, 0)))
]
SPLITS = [
    cached(num_splits=n, capacity=4500, seqlens=(4400, 130), **facts)
    for n in (0, 1, 2, 3, 7, 32)
    for facts in ({}, dict(tokens=9, causal=True), dict(tokens=40, causal=True))
]
SIZES = [
    *(cached(split_size=n, capacity=4500, seqlens=(4400, 130)) for n in (128, 256, 1024, 4480)),
    cached(split_size=256, capacity=4500, seqlens=(4400, 130), tokens=40, causal=True),
    cached(split_size=128, capacity=4500, seqlens=(4400, 130), window=(300, 0), page_size=16),
    cached(split_size=128, dims=(256, 256), leftpad=(200, 3)),
]
# From half a KV head per multiprocessor to thousands of items, on both sides of what a look takes in
BATCHES = [
    rows(batch, **facts)
    for batch in (1, 2, 5, 32, 33, 40, 257)
    for facts in ({}, dict(split_size=256), dict(page_size=128))
] + [
    rows(40, tokens=40, causal=True),
    rows(40, tokens=9, causal=True, num_splits=3),
    rows(1100, seqlens=lengths(1100, 90), capacity=90, heads=1, kv_heads=1, head_dim=64),
    rows(40, heads=40, kv_heads=40, head_dim=64, seqlens=lengths(40, 90), capacity=90),
]
GROUPS = [
    case
    for n in (1, 2, 3, 5, 16, 17, 64, 128)
    for case in (
        cached(heads=2 * n, seqlens=(4000, 1), capacity=4096),
        cached(heads=n, kv_heads=1, seqlens=(4000, 0), capacity=4096),
    )
] + [cached(heads=300, kv_heads=150, seqlens=(300, 7)), cached(heads=5, kv_heads=1, tokens=30, causal=True)]
WINDOWS = [
    case
    for window in ((100, 0), (0, 0), (300, 5), (-1, 3), (3, -1), (0, 70))
    for case in (
        cached(window=window, tokens=4, seqlens=(600, 3)),
        cached(window=window, tokens=30, seqlens=(600, 3)),
        cached(window=window, page_size=16),
    )
]
PACKED = [
    cached(tokens=(5, 0), causal=True),
    *(
        cached(batch=4, seqlens=(600, 0, 3, 64), tokens=(0, 5, 70, 1), **facts)
        for facts in ({}, dict(causal=True), dict(causal=True, page_size=16), dict(window=(50, 3)))
    ),
    cached(batch=4, seqlens=(600, 0, 3, 64), tokens=(0, 2, 3, 1), causal=True, split_size=128),
    rows(40, tokens=tuple(i % 4 for i in range(40)), causal=True),
]
OTHERS = [
    *(cached(softcap=5.0, tokens=n) for n in (1, 20)),
    *(cached(dtype=FP16, **facts) for facts in ({}, dict(tokens=20), dict(page_size=3))),
    *(cached(layout="strided", **facts) for facts in ({}, dict(page_size=16), dict(tokens=20, page_size=3))),
    cached(leftpad=(100, 64)),
    cached(leftpad=(100, 3), tokens=20, causal=True),
    cached(leftpad=(100, 3), page_size=3),
    cached(leftpad=(200, 3), page_size=16, num_splits=4),
    cached(batch_idx=(3, 1)),
    cached(batch_idx=(1, 1), tokens=20),
    cached(seqlens=333),
    cached(seqlens=None),
    cached(tokens=16),
    cached(tokens=17),
]
OF_FEATURES = [
    DecodeCase(**facts, dtype=BF16, page_size=page)
    for name, facts in FEATURES.items()
    for page in (0, 16)
    if not page or ("rows" not in name and name != "no room at all")
]
BUDGET = [*WIDTHS, *PAGES, *SPLITS, *SIZES, *BATCHES, *GROUPS, *WINDOWS, *PACKED, *OTHERS, *OF_FEATURES]
BUDGET = list({case.id: case for case in BUDGET}.values())

# One key wins each row: the answer is bitwise that key's row of v
EXACT = [
    *(
        cached(dims=dims, dtype=dtype, **facts)
        for dims in ((64, 64), (128, 128), (256, 256), (192, 128), (40, 72))
        for dtype in (BF16, FP16)
        for facts in (dict(seqlens=(513, 0)), dict(tokens=9, causal=True), dict(tokens=40, window=(90, 5)))
    ),
    *(cached(page_size=n, tokens=t, causal=True) for n in (3, 16, 128) for t in (1, 40)),
    *(cached(capacity=4500, seqlens=(4400, 130), num_splits=n) for n in (1, 7)),
    cached(capacity=4500, seqlens=(4400, 130), split_size=128),
    cached(leftpad=(100, 64), tokens=9, causal=True),
    rows(40, page_size=16),
    rows(40, heads=34, tokens=2, causal=True),
    cached(batch=4, seqlens=(600, 0, 3, 64), tokens=(0, 5, 70, 1), causal=True),
]

# One for each way in which rows are multiplied, keys come, and parts are merged
REPEATS = [
    cached(capacity=4500, seqlens=(4400, 130)),
    rows(40, tokens=3, causal=True),
    cached(capacity=4500, seqlens=(4400, 130), dims=(256, 256), page_size=16),
    cached(capacity=4500, seqlens=(4400, 130), tokens=9, causal=True),
    cached(capacity=4500, seqlens=(4400, 130), tokens=40, causal=True),
    rows(5, tokens=20, causal=True, page_size=5),
    rows(5, page_size=3),
    cached(capacity=4500, seqlens=(4400, 130), split_size=128),
    cached(capacity=4500, seqlens=(4400, 130), tokens=40, causal=True, split_size=256),
    cached(capacity=4500, seqlens=(4400, 130), num_splits=7),
    cached(capacity=4500, seqlens=(4400, 130), num_splits=32, tokens=9, causal=True),
]

# A sequence among 1, 2, 40 and 257: the same bits (test_decode.py takes the numbers from the largest)
ALONE = 37  # one that is neither first nor last where there are many
INVARIANT = [
    dict(split_size=256),
    dict(split_size=128, page_size=16),
    dict(split_size=256, tokens=9, causal=True),
    dict(split_size=128, tokens=40, causal=True),
]
COMPANY = (1, 2, 40, 257)

GRAPHS = [
    cached(batch=3, seqlens=(600, 3, 130), page_size=16, **facts)
    for facts in (
        {},
        dict(tokens=20, causal=True),
        dict(split_size=128),
        dict(num_splits=3),
        dict(tokens=3, causal=True, split_size=128),
        dict(head_dim=64, window=(100, 0)),
    )
] + [cached(batch=3, seqlens=(600, 3, 130), page_size=3)]
ALL = [
    *(*BUDGET, *EXACT, *REPEATS, *GRAPHS),
    *(rows(n, **facts) for n in COMPANY for facts in INVARIANT),
]


def name(case: DecodeCase) -> str:
    """What pytest calls it."""
    return case.id


def seed_of(case: DecodeCase) -> int:
    """Other numbers for other cases, the same in each run."""
    return zlib.crc32(name(case).encode())


def too_slow_to_rehearse(case: DecodeCase, device: torch.device) -> bool:
    """Whether only a GPU should try."""
    return device.type == "cpu" and case.batch * case.heads > 250


def answer(inputs: DecodeInputs, **more) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); on a GPU certainly from the Hopper kernels, if there is anything to compute."""
    if inputs.tensors["q"].is_cuda:
        explanation = tandem_attn.explain_with_kvcache(**inputs.tensors, **inputs.options)
        assert explanation.backend == ("empty" if explanation.spec.is_empty else "gluon"), str(explanation)
    return run_decode(inputs, **more)


def declared(inputs: DecodeInputs, out: torch.Tensor, lse: torch.Tensor) -> list:
    """(rows of out, rows of lse) of each sequence."""
    return [
        (out[b], lse[b]) if s.rows is None else (out[s.rows], lse[:, s.rows])
        for b, s in enumerate(inputs.sequences)
    ]


def assert_same_bits(inputs: DecodeInputs, one: tuple, other: tuple) -> None:
    """Raise unless two answers are the same in every bit that is defined."""
    pairs = zip(declared(inputs, *one), declared(inputs, *other), strict=True)
    for b, (mine, yours) in enumerate(pairs):
        for what, x, y in zip(("out", "lse"), mine, yours, strict=True):
            assert torch.equal(x, y), f"{what} of sequence {b} differs"


# What a case compiles to


def tensors_of(case: DecodeCase) -> dict:
    """The arguments of a case, without memory; fewer rows of the cache than there will be."""

    def meta(*shape: int, dtype=case.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def vector(n: int) -> torch.Tensor:
        return meta(n, dtype=torch.int32)

    batch, is_packed = case.batch, isinstance(case.tokens, tuple)
    heads = case.heads + (2 * SPARE if case.layout == "strided" else 0)
    rows_q = (sum(case.tokens) + SPARE,) if is_packed else (batch, case.tokens)
    found = dict(q=meta(*rows_q, heads, case.head_dim)[..., : case.heads, :])
    if is_packed:
        found |= dict(cu_seqlens_q=vector(batch + 1), max_seqlen_q=max(case.tokens))
    slots = case.page_size or case.capacity
    for x, dim in (("k", case.head_dim), ("v", case.dim_v)):
        shape = (max(batch, 1) + SPARE if case.page_size or case.batch_idx else batch, slots)
        cache = meta(*shape, case.kv_heads, dim)
        if case.layout == "strided":
            cache = meta(shape[0], case.kv_heads, slots, dim).transpose(1, 2)
        found[f"{x}_cache"] = cache
        if case.new is not None:
            is_packed_new = isinstance(case.new, tuple)
            rows_new = (sum(case.new) + SPARE,) if is_packed_new else (batch, case.new)
            found[x] = meta(*rows_new, case.kv_heads, dim)
            if is_packed_new:
                found["cu_seqlens_k_new"] = vector(batch + 1)
    if case.page_size:
        found["page_table"] = meta(batch, case.slots // case.page_size, dtype=torch.int32)
    fields = dict(cache_seqlens=case.seqlens, cache_leftpad=case.leftpad, cache_batch_idx=case.batch_idx)
    for field, value in fields.items():
        if value is not None:
            found[field] = vector(batch) if isinstance(value, tuple) else value
    return found


def spec_of(case: DecodeCase) -> DecodeSpec:
    """The question a case asks of a GPU, which need not exist."""
    options = dict(causal=case.causal, window_size=case.window, softcap=case.softcap)
    options |= dict(num_splits=case.num_splits, split_size=case.split_size)
    tensors = tensors_of(case)
    if case.rotary:
        tensors["q"] = torch.empty(tensors["q"].shape, dtype=case.dtype, device="meta")
    spec = tandem_attn.explain_with_kvcache(**tensors, **options).spec
    return dataclasses.replace(spec, device=torch.device("cuda", 0))


def distinct_questions() -> list[DecodeCase]:
    """A case for every question of the curated ones that a kernel answers."""
    asked = {}
    for case in ALL:
        spec = spec_of(case)
        if not spec.is_empty and case.slots:
            asked[dataclasses.replace(spec, cache_rows=0), case.new if case.new is None else 0] = case
    return list(asked.values())


def compile_kernel(case: DecodeCase) -> list[str]:
    """Put a case's kernels where a launch will find them; the hashes they are found by.

    Only for a process of its own: the drivers of Triton and torch are replaced.
    """
    tensors = tensors_of(case)
    if case.rotary:
        tensors["q"] = tensors["q"].contiguous()
    return compile_call(tensors, spec_of(case))


def compile_call(tensors: dict, spec: DecodeSpec, first: AppendSpec | None = None) -> list[str]:
    """The same for the arguments of a call, without memory, and what they ask; `first`: before that."""
    import triton

    from tandem_attn import arch
    from tandem_attn.kernels import append, launch_decode, launcher

    made = []

    class Noted(launcher.KernelLauncher):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self.compiled.hash)

        def _find_c_launch(self):
            return None

        def encode(self, addresses, tensors):
            return []

        def launch_flat(self, *args):
            pass

    triton.runtime.driver.set_active(_NoDriver())
    multiprocessors = int(os.environ.get("TANDEM_TEST_MULTIPROCESSORS", 132))
    arch._properties = lambda index: (9, 0, multiprocessors)
    launch_decode.KernelLauncher = append.KernelLauncher = Noted
    torch._C._cuda_getDevice = torch._C._cuda_getCurrentRawStream = lambda *_: 0
    given = Given(**tensors)
    cache, new, rotary = given.parts()
    plan = launch_decode.decode(spec)
    out = torch.empty(spec.out_shape, dtype=spec.dtype, device="meta")
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device="meta")
    plan(given.q, cache, new, out, workspace, False)
    if first is not None:
        plan = launch_decode.append(first)
        plan.nothing = torch.empty(1, dtype=torch.int32, device="meta")
        plan(given.q, given.k, given.v, cache, new, rotary)
    return made


def compile_once(folder: pathlib.Path) -> None:
    """Compile everything, once for a session's `folder`: other workers of pytest-xdist wait for the first."""
    with open(folder / "decode-kernels-compiled", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock.fileno()).st_size:
            return
        count = torch.cuda.get_device_properties(0).multi_processor_count
        os.environ["TANDEM_TEST_MULTIPROCESSORS"] = str(count)
        workers = min(os.cpu_count() or 1, 16)
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            for made in [pool.submit(compile_kernel, case) for case in distinct_questions()]:
                with contextlib.suppress(Exception):  # the test that needs the kernel will say it better
                    made.result()
        lock.write("done")


def winning(case: DecodeCase, inputs: DecodeInputs, seed: int) -> list:
    """Fill in numbers of which one key wins each row by far, and no element is rounded.

    Keys are the bits of their number, -1 or 1, as often as there is room; a query is the key that it wants,
    times 128. Returns (out, lse) of every sequence, as float64.
    """
    from tandem_attn.testing.budget import explicit_mask
    from tandem_attn.testing.decode_inputs import slots_of

    generator, expected = torch.Generator().manual_seed(seed), []
    group, device = case.heads // case.kv_heads, inputs.tensors["q"].device
    bits = max(13, (case.kv_heads * case.slots).bit_length())
    places = torch.arange(case.head_dim) % bits
    for b, s in enumerate(inputs.sequences):
        n, t, pad = case.each("seqlens")[b], len(s.q), case.each("leftpad")[b]
        number = torch.arange(n)[:, None] * case.kv_heads + torch.arange(case.kv_heads)
        k = ((number[..., None] >> places) & 1) * 2.0 - 1.0
        v = torch.randint(-128, 129, (n, case.kv_heads, case.dim_v), generator=generator).double()
        seen = explicit_mask(torch.arange(t), t, n, case.bounds)
        seen[:, :pad] = False
        out = torch.zeros(t, case.heads, case.dim_v, dtype=torch.float64)
        lse = torch.full((case.heads, t), -torch.inf, dtype=torch.float64)
        q = torch.zeros(t, case.heads, case.head_dim)
        for token, head in itertools.product(range(t), range(case.heads)):
            keys = seen[token].nonzero()[:, 0]
            if len(keys):
                wanted = keys[int(torch.randint(len(keys), (), generator=generator))]
                q[token, head] = 128.0 * k[wanted, head // group]
                out[token, head] = v[wanted, head // group]
                lse[head, token] = 128.0 * case.head_dim**0.5
        where = slots_of(case, s, range(pad, n))
        inputs.tensors["k_cache"][where] = k[pad:].to(device, case.dtype)
        inputs.tensors["v_cache"][where] = v[pad:].to(device, case.dtype)
        of_q = b if s.rows is None else s.rows
        inputs.tensors["q"][of_q] = q.to(device, case.dtype)
        expected.append((out.to(device), lse.to(device)))
    return expected


def assert_neither_waits_nor_allocates(inputs: DecodeInputs, out: torch.Tensor) -> None:
    """Calls with memory for everything, behind one that compiled and remembered what there is to."""
    call = inputs.tensors | inputs.options
    call |= dict(out=out, workspace=tandem_attn.decode_workspace(**call))
    tandem_attn.flash_attn_with_kvcache(**call)
    torch.cuda.synchronize()
    counted = ("allocation.all.allocated", "segment.all.allocated")
    before = [torch.cuda.memory_stats()[x] for x in counted]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            tandem_attn.flash_attn_with_kvcache(**call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert before == [torch.cuda.memory_stats()[x] for x in counted]


def assert_fakes_match(inputs: DecodeInputs) -> None:
    """What fake tensors give has the shapes, strides and types of the real thing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = run_decode(inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs.tensors = {
            n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in inputs.tensors.items()
        }
        fake = run_decode(inputs)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert a.is_contiguous() and type(b).__name__ == "FakeTensor"
