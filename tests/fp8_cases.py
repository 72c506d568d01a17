"""FP8 questions, answers and oracles that the FP8 test files share."""

from __future__ import annotations

import dataclasses

import torch
from gpu_cases import BF16, CAUSAL, FP16, declared, dense, packed, seed_of

from tandem_attn import (
    Fp8Recipe,
    Fp8Tensors,
    flash_attn_fp8_func,
    flash_attn_fp8_varlen_func,
    flash_attn_func,
    flash_attn_quantized_func,
    flash_attn_varlen_func,
    quantize_qkv,
    reference_quant,
)
from tandem_attn.quant import signs_for
from tandem_attn.spec import E4M3, Lengths
from tandem_attn.spec_quant import quantize_spec
from tandem_attn.testing import Case, Inputs, exact, make

PLAIN = Fp8Recipe(rotate=False, smooth_k=False)
DESCALES = ("q_descale", "k_descale", "v_descale")
F32 = torch.float32
_SOME = ((5, 0, 90, 1, 64), (7, 3, 70, 0, 129))
_USED = {"used_q": (5, 0, 65, 0, 64), "used_k": (0, 3, 70, 0, 100)}
SMALL = [  # for what wants a CPU and few numbers
    dense((70, 150), (32, 32), (4, 2), batch=2, dtype=F32, **CAUSAL),
    dense((150, 70), (64, 32), (2, 2), dtype=BF16, **CAUSAL),
    dense((33, 90), (64, 64), (6, 1), dtype=F32, window=(20, 7)),
    dense((40, 40), (32, 48), (2, 2), dtype=FP16, softcap=3.0),
    packed(_SOME, (32, 32), dtype=F32, **CAUSAL),
    packed(_SOME, (64, 32), (3, 1), dtype=BF16, **_USED),
    packed(_SOME, (32, 32), dtype=F32, softcap=4.0, window=(9, 9)),
]


# Answers


def lengths_of(inputs: Inputs) -> dict:
    """The arguments that say where packed sequences lie; none for dense ones."""
    return {name: inputs.kwargs[name] for name in Lengths._fields if name in inputs.kwargs}


def options_of(inputs: Inputs) -> dict:
    """The other arguments."""
    return {name: x for name, x in inputs.kwargs.items() if name not in Lengths._fields}


def quantized(inputs: Inputs, recipe: Fp8Recipe | None = None) -> Fp8Tensors:
    """What the public function makes of 16-bit inputs."""
    return quantize_qkv(inputs.q, inputs.k, inputs.v, recipe, **lengths_of(inputs))


def attended(tensors: Fp8Tensors, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) over them."""
    return flash_attn_quantized_func(tensors, **options_of(inputs), return_attn_probs=True)


def attend_fp8(case: Case, inputs: Inputs, recipe: Fp8Recipe | None = None) -> tuple:
    """(out, lse) of 16-bit inputs, in one call."""
    function = flash_attn_fp8_varlen_func if case.varlen else flash_attn_fp8_func
    return function(inputs.q, inputs.k, inputs.v, **inputs.kwargs, recipe=recipe, return_attn_probs=True)


def attend_wide(case: Case, inputs: Inputs, dtype: torch.dtype = torch.float32) -> tuple:
    """(out, lse) of the same numbers in a type that rounds little."""
    function = flash_attn_varlen_func if case.varlen else flash_attn_func
    q, k, v = (x.to(dtype) for x in (inputs.q, inputs.k, inputs.v))
    return function(q, k, v, **inputs.kwargs, return_attn_probs=True)


def attend_e4m3(case: Case, inputs: Inputs, **descales: torch.Tensor) -> tuple:
    """(out, lse) by FlashAttention-3's entry, of e4m3 inputs."""
    function = flash_attn_varlen_func if case.varlen else flash_attn_func
    return function(inputs.q, inputs.k, inputs.v, **inputs.kwargs, **descales, return_attn_probs=True)


# Inputs


def by_reference(inputs: Inputs, recipe: Fp8Recipe | None = None) -> Fp8Tensors:
    """As `quantized`, made by torch on any device: nothing is compiled, and no kernel makes a mistake."""
    recipe = recipe or Fp8Recipe()
    given = lengths_of(inputs)
    lengths = Lengths(*map(given.get, Lengths._fields)) if given else None
    spec = quantize_spec(inputs.q, inputs.k, inputs.v, lengths, recipe)
    signs = signs_for(recipe, inputs.q.shape[-1], inputs.q.device) if recipe.rotate else None
    found = reference_quant.quantize(spec)(
        inputs.q, inputs.k, inputs.v, signs, None, None, *(lengths or ())[:4]
    )
    return Fp8Tensors(*found, recipe, inputs.q.dtype, lengths)


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The same numbers at the same strides, within memory converted as a whole: NaN around them stays."""
    whole = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return whole.to(E4M3).as_strided(x.shape, x.stride(), x.storage_offset())


def make_e4m3(case: Case, device="cpu", **how) -> Inputs:
    """`make`, in e4m3: for FlashAttention-3's entry."""
    inputs = make(case, device, seed=seed_of(case), **how)
    return Inputs(*(to_e4m3(x) for x in (inputs.q, inputs.k, inputs.v)), inputs.kwargs, inputs.slices)


def inputs_of(case: Case, **how) -> Inputs:
    """Numbers of a case, the same in each run."""
    return make(case, seed=seed_of(case), **how)


def with_leaves(inputs: Inputs) -> Inputs:
    """The same numbers in tensors that want gradients."""
    tensors = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    return Inputs(*tensors, inputs.kwargs, inputs.slices)


def leaves(inputs: Inputs) -> list[torch.Tensor]:
    """q, k and v."""
    return [inputs.q, inputs.k, inputs.v]


def flat_lengths(inputs: Inputs) -> list:
    """The lengths as operators take them."""
    return [inputs.kwargs.get(x) for x in Lengths._fields]


def flat_options(case: Case) -> tuple:
    """The options as operators take them."""
    return (None, *case.bounds, case.softcap, 0, False)


def descales_of(case: Case, device="cpu") -> dict[str, torch.Tensor]:
    """FlashAttention-3's descales: another factor for each tensor, sequence and KV head."""
    generator = torch.Generator().manual_seed(seed_of(case))
    drawn = torch.rand(3, case.batch, case.kv_heads, generator=generator) * 1.5 + 0.25
    return dict(zip(DESCALES, drawn.to(device), strict=True))


def descaled(case: Case, inputs: Inputs, descales: dict) -> Inputs:
    """e4m3 inputs and FlashAttention-3's descales as float32 numbers, written with loops."""
    tensors = []
    for name in "qkv":
        x = getattr(inputs, name).float()
        factor = descales.get(f"{name}_descale")
        if factor is not None:
            heads = x.shape[-2] // case.kv_heads  # that share a factor
            for i in range(case.batch):
                side = 0 if name == "q" else 1
                rows = x[inputs.slices[i][side]] if case.varlen else x[i]
                for h in range(x.shape[-2]):
                    rows[:, h] *= factor[i, h // heads]
        tensors.append(x)
    return Inputs(*tensors, inputs.kwargs, inputs.slices)


# Oracles


def over_dequantized(case: Case, tensors: Fp8Tensors, inputs: Inputs) -> tuple:
    """(out, lse) in float64 of attention over what FP8 tensors stand for.

    The mean of K is in lse as it multiplied q before that was rounded; out does not see it.
    """
    smooth = dataclasses.replace(tensors, k_mean=None).dequantized()
    out, lse = exact(case, Inputs(*smooth, inputs.kwargs, inputs.slices))
    return out, lse if tensors.lse_shift is None else lse + inputs.scale * tensors.lse_shift.double()


def flat(case: Case, inputs: Inputs, pair: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of declared rows only, in float64, as one vector each."""
    parts = declared(case, inputs, *pair) or [pair]
    return tuple(torch.cat([part[i].flatten() for part in parts]).double() for i in (0, 1))


def relative_rmse(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root of the mean square of the error over that of what is expected."""
    found, expected = found.double(), expected.double()
    if expected.numel() == 0:
        return 0.0
    size = float(expected.square().mean().sqrt())
    return float((found - expected).square().mean().sqrt()) / size if size else float(found.abs().max())


def cosine(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the angle between them as vectors."""
    return float(torch.cosine_similarity(found.double().flatten(), expected.double().flatten(), 0))


def assert_near(case: Case, inputs: Inputs, found: tuple, expected: tuple, rmse=0.04, lse_band=0.06) -> None:
    """Raise unless out and lse of a case are as near as FP8's probabilities and sums of 14 bits allow.

    Rows without keys agree exactly.
    """
    (out, lse), (out_want, lse_want) = flat(case, inputs, found), flat(case, inputs, expected)
    blind = lse_want.isneginf()
    assert torch.equal(lse.isneginf(), blind), f"{case.id}: other rows see no key"
    assert out.isfinite().all(), f"{case.id}: out is not finite"
    if not bool((~blind).any()):
        assert torch.count_nonzero(out) == 0
        return
    worst = float((lse - lse_want)[~blind].abs().max())
    assert worst <= lse_band, f"{case.id}: lse is {worst:.3g} off"
    error, angle = relative_rmse(out, out_want), cosine(out, out_want)
    assert error <= rmse, f"{case.id}: relative RMSE {error:.3g}"
    assert angle > 0.99, f"{case.id}: cosine {angle:.4g}"
    for i, (part, want) in enumerate(
        zip(declared(case, inputs, *found), declared(case, inputs, *expected), strict=True)
    ):
        rows = want[1].isneginf().transpose(0, 1)
        assert torch.count_nonzero(part[0][rows]) == 0, f"{case.id}: rows without keys of sequence {i}"
