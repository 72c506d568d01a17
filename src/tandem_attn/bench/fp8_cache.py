"""Attention over a KV cache in e4m3 next to the same numbers in bfloat16: tokens per second of both.

All answer the same question: e4m3 numbers times powers of two are bfloat16 numbers, too, and so are queries
that were rounded to e4m3. What comes out is held against plain attention over them, as in `bench decode`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch

import tandem_attn
from tandem_attn.bench import caches, decode_cases, measure, providers
from tandem_attn.bench.caches import Caches
from tandem_attn.bench.decode import calls_of
from tandem_attn.bench.decode_check import DecodeOracle
from tandem_attn.bench.fp8_speed import E4M3, LARGEST
from tandem_attn.bench.options import Settings
from tandem_attn.testing.decode_inputs import DecodeCase

BF16, BLOCKS, SEQUENCES = "bf16", "e4m3", "e4m3-queries"


@dataclasses.dataclass(frozen=True)
class CacheCase:
    """A question over a cache. `appends`: the last key is written by the same call."""

    group: str
    id: str
    case: DecodeCase
    appends: bool = False


# (batch, keys, (heads, KV heads), head_dim, page size, tokens): 512 MB of bfloat16, but for the second
SHAPES = (
    (1, 131072, (32, 8), 128, 0, 1),
    (1, 32768, (32, 8), 128, 0, 1),
    (32, 4096, (32, 8), 128, 0, 1),
    (128, 1024, (32, 8), 128, 0, 1),
    (32, 4096, (64, 8), 128, 0, 1),
    (32, 4096, (32, 8), 128, 128, 1),
    (32, 4096, (32, 8), 128, 64, 1),
    (32, 4096, (32, 8), 128, 16, 1),
    (32, 8192, (32, 8), 64, 0, 1),
    (32, 8192, (32, 8), 64, 64, 1),
    (16, 4096, (32, 8), 256, 0, 1),
    (16, 4096, (32, 8), 256, 64, 1),
    (32, 4096, (32, 8), 128, 0, 4),
    (32, 4096, (32, 8), 128, 0, 8),
    (32, 4096, (32, 8), 128, 0, 16),
    (32, 4096, (32, 8), 128, 0, 32),
)
APPENDED = ((32, 4096, (32, 8), 128, 0, 1), (32, 4096, (32, 8), 128, 64, 1))
SMOKE = ((2, 256, (4, 2), 64, 0, 1), (2, 300, (4, 2), 128, 16, 3))


def made(group: str, shapes, appended) -> list[CacheCase]:
    """The cases of these shapes."""
    found = []
    for appends, all_of_them in ((False, shapes), (True, appended)):
        for batch, keys, (heads, kv_heads), dim, page, tokens in all_of_them:
            name = f"cache-h{heads}/{kv_heads}-d{dim}-b{batch}-kv{keys}" + (f"-p{page}" if page else "")
            name += (f"-t{tokens}" if tokens > 1 else "") + ("-append" if appends else "")
            sizes = dict(heads=heads, kv_heads=kv_heads, head_dim=dim, page_size=page)
            more = dict(tokens=tokens, causal=tokens > 1)
            case = DecodeCase(batch=batch, capacity=keys, seqlens=(keys,) * batch, **sizes, **more)
            found.append(CacheCase(group, name if group == "cache" else f"{group}-{name}", case, appends))
    return found


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3, one factor): every block and every sequence may have it."""
    factor = torch.exp2(torch.ceil(torch.log2(x.abs().amax().float() / LARGEST)))
    return (x.float() / factor).to(E4M3), factor


@dataclasses.dataclass
class Fp8Caches:
    """A cache in e4m3, and in bfloat16 the very numbers that it stands for."""

    plain: Caches
    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    factors: tuple[torch.Tensor, torch.Tensor]  # of K and V

    @classmethod
    def make(cls, case: DecodeCase, device: torch.device) -> Fp8Caches:
        """Standard normal numbers, as e4m3 has them."""
        plain = caches.make(case, device)
        plain.q = plain.q.to(E4M3).to(case.dtype)
        (k, of_k), (v, of_v) = (quantized(x) for x in plain.pairs[0])
        for pair in plain.pairs:
            for x, y, factor in zip(pair, (k, v), (of_k, of_v), strict=True):
                x.copy_(y.float() * factor)
        # with half the bytes twice the copies lie between two uses of one
        copies = (2 if device.type == "cuda" else 1) * len(plain.pairs)
        pairs = [(k, v), *((k.clone(), v.clone()) for _ in range(copies - 1))]
        return cls(plain, pairs, (of_k, of_v))

    def descales(self, *shape: int) -> dict[str, torch.Tensor]:
        """k_descale and v_descale."""
        of_k, of_v = (x.expand(shape).contiguous() for x in self.factors)
        return {"k_descale": of_k, "v_descale": of_v}


def measure_case(one: CacheCase, device: torch.device, settings: Settings) -> dict:
    """A case as a JSON object: a result for each kind of cache, and how many times the tokens of bfloat16."""
    record = {"kind": "cache", "group": one.group, "id": one.id, "appends": one.appends}
    record |= {"question": _question(one.case), "bf16_bytes": decode_cases.kv_bytes(one.case), "results": {}}
    try:
        made = Fp8Caches.make(one.case, device)
    except Exception as error:  # out of memory, or a device that an earlier case broke
        return record | {"results": {BF16: {"reason": providers.reason_of(error)}}}
    oracle = DecodeOracle(one.case, made.plain)
    calls = calls_of(record["bf16_bytes"], len(made.pairs)) if device.type == "cuda" else 1
    for name in (BF16, BLOCKS, SEQUENCES):
        if not (name == SEQUENCES and one.appends):  # new numbers in 16 bits go with queries in 16 bits
            record["results"][name] = _measure(one, name, made, oracle, calls, settings)
    base = record["results"][BF16].get("median_us")
    for result in record["results"].values():
        if base and "median_us" in result:
            result["tokens_of_bf16"] = base / result["median_us"]
    return record


def _question(case: DecodeCase) -> dict:
    kept = ("batch", "heads", "kv_heads", "head_dim", "page_size")
    found = {name: getattr(case, name) for name in kept}
    return found | {"tokens": case.each("tokens")[0], "keys": case.keys[0]}


def _measure(
    one: CacheCase, name: str, made: Fp8Caches, oracle: DecodeOracle, calls: int, settings: Settings
) -> dict:
    device = made.plain.q.device
    try:
        call = _call(one, name, made)
        if settings.checked and (wrong := oracle.what_is_wrong(*call(0, return_softmax_lse=True))):
            return {"wrong": wrong}
        pairs = made.plain.pairs if name == BF16 else made.pairs
        timing, last = measure.time_copies(call, len(pairs), calls, device, settings)
        if settings.checked and (wrong := oracle.what_is_wrong(last, None)):
            return {"wrong": f"after being timed, {wrong}"}
    except Exception as error:  # one that fails must not take the others with it
        return {"reason": providers.reason_of(error)}
    tokens = one.case.batch * one.case.each("tokens")[0]
    return timing.record() | {"tokens_per_s": tokens / timing.median}


def _call(one: CacheCase, name: str, made: Fp8Caches) -> Callable[..., torch.Tensor]:
    """A function of the number of a copy."""
    plain, case = made.plain, one.case
    pairs = plain.pairs if name == BF16 else made.pairs
    given = dict(cache_seqlens=plain.seqlens, page_table=plain.page_table, causal=case.causal)
    q = plain.q
    if name == BLOCKS:
        rows, slots, heads, _ = made.pairs[0][0].shape
        given |= made.descales(rows, math.ceil(slots / tandem_attn.SCALE_BLOCK), heads)
    elif name == SEQUENCES:
        q = q.to(E4M3)
        given |= made.descales(case.batch, case.kv_heads)
    if one.appends:
        new = [x[:, None] for x in _last(plain, case)]
        given |= dict(k=new[0], v=new[1], cache_seqlens=plain.seqlens - 1)
    call = functools.partial(tandem_attn.flash_attn_with_kvcache, q)
    memory = tandem_attn.decode_workspace(q, *pairs[0], **given)
    given |= {"out": plain.out, "workspace": memory}
    return lambda i, **more: call(*pairs[i], **given, **more)


def _last(plain: Caches, case: DecodeCase) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V (batch, kv_heads, dim) of the last key of each sequence."""
    found = [plain.keys_of(b, case.keys[b]) for b in range(case.batch)]
    return tuple(torch.stack([pair[i][-1] for pair in found]) for i in range(2))
