"""FP8 attention in TFLOPS: from tensors quantized beforehand, from plain e4m3, and from 16 bits.

FlashAttention-3's e4m3 forward is not run but recorded on another day; 16-bit attention of this run, ours and
cuDNN's, shows by its own recorded figures how fast this card is today.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

import tandem_attn
from tandem_attn.bench import cases, peers, providers, tflops
from tandem_attn.bench.cases import BenchCase
from tandem_attn.bench.check import Oracle
from tandem_attn.bench.fp8_check import Fp8Oracle
from tandem_attn.bench.options import Settings
from tandem_attn.bench.providers import OURS, Call, Provider
from tandem_attn.testing import Case, Inputs

PLAIN, TOTAL, BF16, CUDNN = "tandem-fa3", "tandem-total", "tandem-bf16", "sdpa-cudnn"
FP8 = (OURS, PLAIN, TOTAL)
PEER, YARDSTICK = "fa3", "cudnn"  # in h200_peers.json: of e4m3 and of bf16
E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3


@dataclasses.dataclass
class Fp8Inputs(Inputs):
    """16-bit inputs, and what FP8 functions take instead, made when first asked for."""

    recipe: tandem_attn.Fp8Recipe

    @functools.cached_property
    def tensors(self) -> tandem_attn.Fp8Tensors:
        """Quantized by the recipe."""
        return tandem_attn.quantize_qkv(self.q, self.k, self.v, self.recipe)

    @functools.cached_property
    def plain(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """FlashAttention-3's: row-major e4m3 (q, k, v), and their descales (batch, kv_heads)."""
        kv_heads = self.k.shape[2]
        made = [_with_descale(x, kv_heads) for x in (self.q, self.k, self.v)]
        return tuple(x for x, _ in made), tuple(descale for _, descale in made)

    def plain_dequantized(self) -> tuple[torch.Tensor, ...]:
        """float32 (q, k, v) that `plain` stands for."""
        return tuple(x.float() * _per_head(descale, x) for x, descale in zip(*self.plain, strict=True))


def _with_descale(x: torch.Tensor, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (batch, seqlen, heads, dim) in e4m3, and (batch, kv_heads) by which to multiply that."""
    amax = x.abs().amax((1, 3)).float().unflatten(1, (kv_heads, -1)).amax(2)
    descale = amax.clamp(min=1e-30) / LARGEST
    return (x.float() / _per_head(descale, x)).clamp(-LARGEST, LARGEST).to(E4M3), descale


def _per_head(descale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return descale.repeat_interleave(x.shape[2] // descale.shape[1], 1)[:, None, :, None]


def make_inputs(case: Case, device: torch.device, recipe: tandem_attn.Fp8Recipe | None = None) -> Fp8Inputs:
    """Standard normal inputs of a case; no recipe: the default one."""
    made = cases.inputs(case, device)
    return Fp8Inputs(made.q, made.k, made.v, made.kwargs, made.slices, recipe or tandem_attn.Fp8Recipe())


def oracles(case: Case, inputs: Fp8Inputs) -> dict[str, Oracle]:
    """By provider what it has to answer: attention over the numbers that it is given."""
    quantized = Fp8Oracle(case, inputs, lambda: inputs.tensors.dequantized())
    plain, sixteen = Fp8Oracle(case, inputs, inputs.plain_dequantized), Oracle(case, inputs)
    return {OURS: quantized, TOTAL: quantized, PLAIN: plain, BF16: sixteen, CUDNN: sixteen}


# Providers


def _call(run: Callable) -> Call:
    return Call(run, functools.partial(run, return_attn_probs=True))


def _quantized(case: Case, inputs: Fp8Inputs) -> Call:
    return _call(functools.partial(tandem_attn.flash_attn_quantized_func, inputs.tensors, **inputs.kwargs))


def _plain(case: Case, inputs: Fp8Inputs) -> Call:
    tensors, descales = inputs.plain
    more = dict(zip(("q_descale", "k_descale", "v_descale"), descales, strict=True)) | inputs.kwargs
    return _call(functools.partial(tandem_attn.flash_attn_func, *tensors, **more))


def _total(case: Case, inputs: Fp8Inputs) -> Call:
    given = (inputs.q, inputs.k, inputs.v)
    more = inputs.kwargs | {"recipe": inputs.recipe}
    return _call(functools.partial(tandem_attn.flash_attn_fp8_func, *given, **more))


def _any_case(case: Case) -> bool:
    return True


PROVIDERS = [
    Provider(OURS, providers.everywhere, _any_case, _quantized),
    Provider(PLAIN, providers.everywhere, _any_case, _plain),
    Provider(TOTAL, providers.everywhere, _any_case, _total),
    Provider(BF16, providers.everywhere, _any_case, providers.tandem),
    next(one for one in providers.PROVIDERS if one.name == CUDNN),
]
BY_NAME = {one.name: one for one in PROVIDERS}


# Measuring


def measure(
    one: BenchCase, present: list[Provider], device: torch.device, settings: Settings, stamp: dict
) -> dict:
    """A cell as a JSON object: what it is, a result per provider, and ratios to what is recorded."""
    record = {"kind": "speed", "group": one.group, "id": one.id, "question": tflops.question(one)}
    record |= {"flops": one.flops, "config": ""}
    try:
        inputs = make_inputs(one.case, device)
        record["config"] = explained(inputs)
        record["results"] = results(one.case, one.flops, inputs, present, settings)
    except Exception as error:  # out of memory, or a device that an earlier case broke
        failure = {"reason": providers.reason_of(error)}
        record["results"] = {provider.name: failure for provider in present}
    return record | compared(record["results"], one.recorded_key, stamp)


def results(
    case: Case, flops: int, inputs: Fp8Inputs, present: list[Provider], settings: Settings
) -> dict[str, dict]:
    """By provider: numbers; or "wrong" and no number; or "reason" why there is neither."""
    one, right = BenchCase("", "", case), oracles(case, inputs)
    return {
        provider.name: tflops.measure_provider(provider, one, right[provider.name], settings, flops)
        for provider in present
    }


def explained(inputs: Fp8Inputs) -> str:
    """Which backend of ours answers plain e4m3, and how."""
    tensors, _ = inputs.plain
    return tflops.explained(Inputs(*tensors, inputs.kwargs, []))


def compared(found: dict[str, dict], key: str | None, stamp: dict) -> dict:
    """Ratios of TFLOPS: FP8 to FlashAttention-3's as recorded, and to our own 16 bits; cuDNN's 16 bits today
    to those recorded. Recorded figures count only on the card they were measured on."""
    recorded = peers.recorded_fp8().get(key or "", {})
    yardstick = peers.recorded_forward().get(key or "", {}).get(YARDSTICK)
    fast = {name: result["tflops"] for name, result in found.items() if "tflops" in result}
    counts = peers.same_card(stamp)
    peer = recorded.get(PEER) if counts else None
    return {
        "recorded": recorded,
        "recorded_cudnn": yardstick,
        "to_recorded": {name: fast[name] / peer for name in FP8 if name in fast} if peer else {},
        "to_bf16": {name: fast[name] / fast[BF16] for name in FP8 if name in fast} if BF16 in fast else {},
        "card": fast[CUDNN] / yardstick if counts and yardstick and CUDNN in fast else None,
    }


def summary(records: list[dict]) -> dict:
    """Per group the means of these ratios, over the cells that have them."""
    found = {}
    for group in dict.fromkeys(record["group"] for record in records):
        mine = [record for record in records if record["group"] == group]
        found[group] = {"cases": len(mine)}
        for kind in ("to_recorded", "to_bf16"):
            names = dict.fromkeys(name for record in mine for name in record[kind])
            found[group][kind] = {
                name: peers.mean({r["id"]: r[kind][name] for r in mine if name in r[kind]}) for name in names
            }
        found[group]["card"] = peers.mean({r["id"]: r["card"] for r in mine if r["card"]})
    return found
