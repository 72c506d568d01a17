"""Cases of attention over an FP8 cache for the Hopper kernels, which all cores compile ahead."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import zlib

import torch
from decode_cases import BF16, FP16, cached, compile_call, tensors_of, winning
from gpu_cases import compile_once
from test_append_blocks import CASES as APPENDED
from test_decode_reference import FEATURES

import tandem_attn
from tandem_attn.spec_decode import SCALE_BLOCK
from tandem_attn.testing.decode_fp8_inputs import Fp8Case, narrowed
from tandem_attn.testing.decode_inputs import DecodeCase, DecodeInputs, make_decode

E4M3 = torch.float8_e4m3fn


def fp8(each: str = "block", fp8_q: bool = False, q_factors: bool = True, **facts) -> Fp8Case:
    """A case that differs from `decode_cases.BASE` in some facts."""
    return Fp8Case(cached(**facts), each, fp8_q, q_factors=q_factors)


# What has a factor, and what q is
KINDS = (dict(), dict(each="sequence"), dict(fp8_q=True), dict(each="sequence", fp8_q=True), dict(dtype=FP16))
# 1, 4, 16 packed rows of a sequence; 17, 36, 64; 80, 130, 160
ROWS = [
    fp8(**kind, **facts)
    for kind in KINDS
    for facts in (
        dict(heads=2),
        dict(tokens=1),
        dict(heads=16, kv_heads=1),
        dict(heads=17, kv_heads=1),
        dict(tokens=9, causal=True),
        dict(tokens=16, causal=True),
        dict(tokens=20, causal=True),
        dict(tokens=13, heads=10, kv_heads=1, causal=True),
        dict(tokens=40, causal=True),
    )
]
DIMS = [
    fp8(dims=dims, **facts)
    for dims in ((64, 64), (256, 256), (80, 48), (192, 128), (96, 96), (64, 256), (16, 16))
    for facts in (
        {},
        dict(fp8_q=True, tokens=3, causal=True),
        dict(tokens=10, causal=True),
        dict(tokens=40, causal=True),
        dict(page_size=16),
        dict(page_size=3, each="sequence"),
    )
]
PAGES = [
    fp8(page_size=size, **facts)
    for size in (1, 3, 8, 16, 48, 64, 128, 192, 256)
    for facts in (
        {},
        dict(each="sequence"),
        dict(tokens=10, causal=True),
        dict(tokens=40, causal=True, fp8_q=True),
        dict(dims=(64, 64), window=(70, 0)),
    )
]
OTHERS = [
    fp8(**facts, **kind)
    for kind in (dict(), dict(each="sequence", fp8_q=True))
    for facts in (
        dict(softcap=5.0),
        dict(softcap=5.0, tokens=40, causal=True),
        dict(window=(100, 0)),
        dict(window=(300, 5), tokens=30),
        dict(leftpad=(200, 64)),
        dict(leftpad=(140, 3), tokens=20, causal=True, page_size=16),
        dict(batch_idx=(3, 1)),
        dict(batch_idx=(1, 1), tokens=20),
        dict(seqlens=333),
        dict(seqlens=None),
        dict(layout="strided"),
        dict(layout="strided", tokens=20),
        dict(num_splits=7, capacity=4500, seqlens=(4400, 130)),
        dict(num_splits=2, tokens=40, capacity=4500, seqlens=(4400, 130)),
        dict(split_size=128, capacity=4500, seqlens=(4400, 130)),
        dict(split_size=256, tokens=40, causal=True, page_size=128),
        dict(batch=4, seqlens=(600, 0, 3, 64), tokens=(0, 5, 70, 1), causal=True),
        dict(batch=4, seqlens=(600, 0, 3, 64), tokens=(0, 2, 3, 1), page_size=16),
        dict(batch=40, seqlens=tuple(7919 * i % 690 for i in range(40))),
        dict(heads=300, kv_heads=150, seqlens=(300, 7)),
    )
] + [fp8(fp8_q=True, q_factors=False), fp8(fp8_q=True, q_factors=False, tokens=40)]
OF_FEATURES = [
    Fp8Case(DecodeCase(**facts, dtype=BF16, page_size=page), each)
    for page, each in ((0, "block"), (0, "sequence"), (16, "block"))
    for name, facts in FEATURES.items()
    if not page or ("rows" not in name and name != "no room at all")
    if facts.get("head_dim_v", 16) % 16 == 0  # rows of 16 bytes; others the kernels decline
]
BUDGET = list({case.id: case for case in (*ROWS, *DIMS, *PAGES, *OTHERS, *OF_FEATURES)}.values())
EXACT = [case for case in (*ROWS, *PAGES, *OTHERS) if not case.case.softcap and case.case.batch_idx != (1, 1)]
EXACT = [case for case in EXACT if case.case.window in ((-1, -1), (300, 5)) and case.case.heads < 300]
REPEATS = [
    fp8(capacity=4500, seqlens=(4400, 130), **facts)
    for facts in (
        {},
        dict(each="sequence", fp8_q=True),
        dict(dims=(256, 256), page_size=16),
        dict(tokens=9, causal=True),
        dict(tokens=40, causal=True),
        dict(page_size=3),
        dict(tokens=20, causal=True, page_size=5),
        dict(split_size=128),
        dict(num_splits=32, tokens=9, causal=True),
    )
]
GRAPHS = [
    fp8(batch=3, seqlens=(600, 3, 130), **facts)
    for facts in (
        dict(new=1, page_size=16),
        dict(new=1, each="sequence"),
        dict(new=2, tokens=2, page_size=128, causal=True),
        dict(new=20, tokens=20, causal=True, fp8_q=True),
        dict(new=1, dims=(64, 64), page_size=192, split_size=128),
    )
]
# Appending: those of test_append_blocks.py, and wider ones
APPENDS = [
    Fp8Case(DecodeCase(**dict(tokens=1, dtype=dtype) | facts), each)
    for facts, dtype, each in itertools.product(APPENDED.values(), (BF16, FP16), ("block", "sequence"))
] + [
    fp8(**facts, **kind)
    for kind in (dict(), dict(each="sequence"))
    for facts in (
        dict(new=1),
        dict(new=1, dims=(256, 256), page_size=64),
        dict(new=1, dims=(80, 48), page_size=16, dtype=FP16),
        dict(new=130, rotary="halves", rotary_dim=64),
        dict(new=4, tokens=4, rotary="interleaved", page_size=128, causal=True),
        dict(new=(100, 1), tokens=(100, 1), rotary="halves", page_size=192, causal=True),
        dict(new=1, fp8_q=True),
        dict(new=180, heads=300, kv_heads=150, fp8_q=True),
        dict(batch=40, seqlens=tuple(61 * i % 600 for i in range(40)), new=tuple(i % 5 for i in range(40))),
    )
]


def name(case: Fp8Case) -> str:
    """What pytest calls it."""
    return case.id


def seed_of(case: Fp8Case) -> int:
    """Other numbers for other cases, the same in each run."""
    return zlib.crc32(case.id.encode())


def won(case: Fp8Case, device, seed: int) -> tuple[DecodeInputs, list]:
    """(inputs of which one key wins each row by far, (out, lse) of every sequence): nothing is rounded.

    Factors are powers of two, another for each block or sequence and head.
    """
    plain = make_decode(case.case, "cpu", seed)
    expected = winning(case.case, plain, seed)
    plain.tensors["v_cache"].copy_(plain.tensors["v_cache"].fmod(16.0))  # 4 bits: e4m3 in any unit
    generator, of = torch.Generator().manual_seed(seed), case.case
    rows, slots = plain.tensors["k_cache"].shape[:2]
    shape = (of.batch, of.kv_heads)
    if case.each == "block":
        shape = (rows, -(-slots // SCALE_BLOCK), of.kv_heads)
    factors = {x: torch.exp2(torch.randint(-2, 4, shape, generator=generator).float()) for x in "kv"}
    shape = (of.batch, of.kv_heads)
    factors["q"] = torch.exp2(torch.randint(-1, 2, shape, generator=generator).float() * case.q_factors)
    inputs = narrowed(case, plain, factors, device)
    return inputs, [(out.fmod(16.0).to(device), lse.to(device)) for out, lse in expected]


def certainly(inputs: DecodeInputs) -> None:
    """Raise unless the Hopper kernels answer, where there is a GPU and anything to compute."""
    if not inputs.tensors["q"].is_cuda:
        return
    found = tandem_attn.explain_with_kvcache(**inputs.tensors, **inputs.options)
    assert found.backend == ("empty" if found.spec.is_empty else "gluon"), str(found)
    if found.append is not None:
        assert found.append.backend == ("empty" if found.append.spec.is_empty else "gluon"), str(found)


# What a case compiles to


def call_of(case: Fp8Case) -> dict:
    """The arguments of a case, without memory."""
    of, found = case.case, tensors_of(case.case)

    def meta(*shape: int, dtype=torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for x in "kv":
        cache = found[f"{x}_cache"]
        found[f"{x}_cache"] = torch.empty_strided(cache.shape, cache.stride(), dtype=E4M3, device="meta")
        shape = (of.batch, of.kv_heads)
        if case.each == "block":
            shape = (cache.shape[0], -(-cache.shape[1] // SCALE_BLOCK), of.kv_heads)
        found[f"{x}_descale"] = meta(*shape)
    if case.fp8_q:
        found["q"] = found["q"].to(E4M3)
        if case.q_factors:
            found["q_descale"] = meta(of.batch, of.kv_heads)
    if of.rotary:
        dim = of.rotary_dim or of.head_dim
        found |= {
            n: meta(1000, dim // 2, dtype=of.rotary_dtype or of.dtype) for n in ("rotary_cos", "rotary_sin")
        }
    if of.rotary_seqlens:
        found["rotary_seqlens"] = meta(of.batch, dtype=torch.int32)
    return found


def specs_of(case: Fp8Case) -> tuple:
    """(DecodeSpec, AppendSpec or None) that a case asks of a GPU, which need not exist."""
    of = case.case
    options = dict(causal=of.causal, window_size=of.window, softcap=of.softcap)
    options |= dict(num_splits=of.num_splits, split_size=of.split_size)
    if of.rotary:
        options["rotary_interleaved"] = of.rotary == "interleaved"
    found = tandem_attn.explain_with_kvcache(**call_of(case), **options)
    specs = (found.spec, None if found.append is None else found.append.spec)
    return tuple(x and dataclasses.replace(x, device=torch.device("cuda", 0)) for x in specs)


def compile_kernel(case: Fp8Case) -> list[str]:
    """Put a case's kernels where a launch will find them. Only for a process of its own."""
    spec, first = specs_of(case)
    call = call_of(case)
    if case.case.rotary:
        call["q"] = call["q"].contiguous()
    return compile_call(call, spec, first)


def compile_all(folder: pathlib.Path, cases) -> None:
    """The kernels of these cases, each once."""
    asked = {}
    for case in cases:
        spec, first = specs_of(case)
        if not spec.is_empty and case.case.slots:
            asked[dataclasses.replace(spec, cache_rows=0), first] = case
    count = torch.cuda.get_device_properties(0).multi_processor_count
    os.environ["TANDEM_TEST_MULTIPROCESSORS"] = str(count)
    compile_once(folder / "fp8-decode-kernels-compiled", [(compile_kernel, case) for case in asked.values()])
