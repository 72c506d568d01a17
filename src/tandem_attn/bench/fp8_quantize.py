"""Making FP8 in bytes per second: what is read and written once, next to a copy on the same device."""

from __future__ import annotations

import functools

import torch

import tandem_attn
from tandem_attn.bench import cases, measure, providers
from tandem_attn.bench.fp8_cases import QuantizeCase
from tandem_attn.bench.fp8_check import MOST_ERROR, rms
from tandem_attn.bench.options import Settings
from tandem_attn.bench.providers import OURS

COLUMNS = 128  # V^T has a multiple of so many, 0 behind the last key
# of each 16 keys, the key that lies in each column of V^T: 4t + 2h + e holds 8h + 2t + e
KEYS_OF_COLUMNS = [8 * h + 2 * t + e for t in range(4) for h in range(2) for e in range(2)]


def measure_case(one: QuantizeCase, device: torch.device, settings: Settings, copy: float) -> dict:
    """A case as a JSON object. `copy`: GB/s of a copy from the device to itself in this run."""
    recipe = "V with keys last" if one.recipe is None else str(one.recipe)
    record = {"kind": "quantize", "group": one.group, "id": one.id, "recipe": recipe, "bytes": 0}
    record["question"] = _question(one)
    try:
        run, inputs = _transposition(one, device) if one.recipe is None else _quantization(one, device)
        made = run()
        record["bytes"] = sum(x.nbytes for x in inputs) + nbytes(made)
        wrong = what_is_wrong(inputs, made) if settings.checked else ""
        del made
        if wrong:
            return record | {"results": {OURS: {"wrong": wrong}}}
        timing = measure.time_call(run, device, settings.repeats, settings.idle_ms)
    except Exception as error:  # one that fails must not take the others with it
        return record | {"results": {OURS: {"reason": providers.reason_of(error)}}}
    speed = record["bytes"] / timing.median / 1e9
    return record | {"results": {OURS: timing.record() | {"gb_per_s": speed, "of_copy": speed / copy}}}


def _question(one: QuantizeCase) -> dict:
    kept = ("batch", "seqlen_k", "heads", "kv_heads", "head_dim")
    dtype = "float8_e4m3fn" if one.recipe is None else str(one.case.dtype).removeprefix("torch.")
    return {name: getattr(one.case, name) for name in kept} | {"dtype": dtype}


def _quantization(one: QuantizeCase, device: torch.device):
    made = cases.inputs(one.case, device)
    given = (made.q, made.k, made.v)
    return functools.partial(tandem_attn.quantize_qkv, *given, one.recipe), given


def _transposition(one: QuantizeCase, device: torch.device):
    """The pass that FlashAttention-3's arguments need: an operator of ours, no function has it alone."""
    tandem_attn.quantize_qkv  # noqa: B018  registers the operators
    v = cases.inputs(one.case, device).v.to(torch.float8_e4m3fn)
    return functools.partial(torch.ops.tandem_attn.transpose_v, v, None, None), (v,)


def nbytes(made: torch.Tensor | tandem_attn.Fp8Tensors) -> int:
    """Bytes of memory of a result, those of an expanded tensor once."""
    tensors = [made] if isinstance(made, torch.Tensor) else vars(made).values()
    return sum(x.untyped_storage().nbytes() for x in tensors if isinstance(x, torch.Tensor))


def what_is_wrong(inputs: tuple[torch.Tensor, ...], made: torch.Tensor | tandem_attn.Fp8Tensors) -> str:
    """What is wrong with a result, in one line; empty if it passes."""
    if isinstance(made, torch.Tensor):
        return _wrong_transposition(inputs[0], made)
    for name, x, found in zip("qkv", inputs, made.dequantized(), strict=True):
        error = rms(found - x.float()) / rms(x)
        if not error <= MOST_ERROR:
            return f"{name}: RMSE is {error:.3g} of the RMS, limit {MOST_ERROR}"
    return ""


def _wrong_transposition(v: torch.Tensor, made: torch.Tensor) -> str:
    bits = v.view(torch.uint8).permute(0, 2, 3, 1)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % COLUMNS))
    expected = bits.unflatten(-1, (-1, 16))[..., KEYS_OF_COLUMNS].flatten(-2)
    if tuple(made.shape) != tuple(expected.shape):
        return f"V^T is of shape {tuple(made.shape)}, not {tuple(expected.shape)}"
    wrong = int((made.view(torch.uint8) != expected).sum())
    return f"{wrong} of {expected.numel()} numbers of V^T are wrong" if wrong else ""
