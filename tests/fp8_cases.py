"""FP8 questions, answers and oracles that the FP8 test files share."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from gpu_cases import (
    BF16,
    CAUSAL,
    FP16,
    FULL,
    MANY,
    MASKS,
    SOME,
    SPARSE,
    TILES,
    USED_K,
    USED_Q,
    WINDOW,
    declared,
    dense,
    packed,
    pretend_hopper,
    seed_of,
)

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
from tandem_attn.spec import E4M3, Lengths, Options
from tandem_attn.spec_fp8 import fp8_spec
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


# Questions for a GPU. Shapes vary freely, kernels do not: see `gpu_cases.py`. Means subtracted make another
# kernel (lse is corrected, V's mean added), so that cases of FlashAttention-3's entry and of V_SMOOTHED are
# few.


def recipe_for(case: Case) -> Fp8Recipe:
    """As much of the recipe as a case allows; V without its mean in cases that are for that."""
    return Fp8Recipe(rotate=case.head_dim % 32 == 0, smooth_k=not case.softcap, smooth_v=case in V_SMOOTHED)


_LENGTHS = ((113, 203), (239, 1), (300, 770), (1023, 1022), (1, 1), (129, 129), (193, 257))
GRID = [
    *(dense(n, dims, **mask) for dims, mask, n in itertools.product(TILES, MASKS, _LENGTHS)),
    *(dense(n, (d, d)) for d in (64, 128) for n in ((384, 256), (1, 128), (1000, 1024))),  # no mask at all
    *(dense((1300, 1300), (d, d), **mask) for d in (64, 128, 256) for mask in (FULL, CAUSAL)),
    *(dense((300, 700), (d, d), dtype=FP16, **mask) for d, mask in ((64, FULL), (128, CAUSAL))),
]
# Widths that TMA pads to the next tile, and values of another width than keys
WIDTHS = [
    dense(n, dims, batch=2, **mask)
    for dims in (*((d, d) for d in (16, 32, 48, 80, 112, 160, 224)), (64, 128), (128, 64), (32, 112))
    for n, mask in (((113, 203), CAUSAL), ((129, 255), FULL))
]
HEADS = [
    dense((113, 203), dims, heads, batch=3, **mask)
    for heads in ((6, 6), (6, 2), (10, 2), (7, 1))
    for dims, mask in (((128, 128), CAUSAL), ((64, 64), FULL))
]
CAPS = [
    dense(n, dims, softcap=cap, **mask)
    for dims, mask, cap in (
        ((64, 64), CAUSAL, 15.0),
        ((128, 128), FULL, 50.0),
        ((128, 128), WINDOW, 5.0),
        ((256, 256), CAUSAL, 15.0),
    )
    for n in ((113, 203), (700, 1000))
]
SEQUENCES = [
    *(
        packed(some, (d, d), **mask)
        for d, mask in itertools.product((64, 128), MASKS)
        for some in (SOME, MANY)
    ),
    packed(SOME, (96, 96), **CAUSAL),
    packed(SOME, (192, 128), **CAUSAL),
    packed(SOME, (256, 256), **CAUSAL),
    packed(SPARSE, (64, 64), **CAUSAL),
    packed(SOME, (128, 64), (6, 2)),
    packed(SOME, used_q=USED_Q, used_k=USED_K, **CAUSAL),
    packed(SOME, (64, 64), used_q=USED_Q, used_k=USED_K),
]
BLIND = [  # rows and tiles that see nothing
    dense((300, 70), (64, 64), **CAUSAL),
    dense((700, 70), (128, 128), **CAUSAL),
    dense((384, 100), (256, 256), window=(3, 3)),
    dense((700, 64), (64, 64), window=(5, 0)),
]
QUESTIONS = [*GRID, *WIDTHS, *HEADS, *CAPS, *SEQUENCES, *BLIND]

# Shapes that are nowhere else, of few kernels
V_SMOOTHED = [
    *(dense((311, 777), (d, d), (4, 2), batch=2, **mask) for d in (64, 128, 256) for mask in (FULL, CAUSAL)),
    dense((311, 777), (128, 80), (6, 2), batch=2, **CAUSAL),
    dense((711, 77), **CAUSAL),  # rows and tiles that see nothing
    dense((311, 777), **WINDOW),
    packed(SOME, (128, 128), (6, 2), **CAUSAL),
    packed(SPARSE, (128, 128), (6, 2), **CAUSAL),
    packed(SOME, (128, 128), (6, 2), used_q=USED_Q, used_k=USED_K, **CAUSAL),
    packed(SOME, (256, 256), (6, 2)),
]

# FlashAttention-3's entry, and one key that wins each row
EXACT = [
    *(dense((257, 383), (d, d), (4, 2), batch=2, **FULL) for d in (64, 128)),
    *(dense((257, 383), dims, (4, 2), batch=2, **CAUSAL) for dims in TILES),
    dense((140, 200), (80, 48), (6, 3), **CAUSAL),
    packed(SOME, **CAUSAL),
    packed(SOME, (64, 64), **FULL),
    packed(SOME, used_q=USED_Q, used_k=USED_K, **CAUSAL),
]

# From 16384 keys on, O is added up in parts
FAR = [(dense((192, 4001), (d, d)), dense((192, 20_001), (d, d)), dense((192, 70_001), (d, d)))
       for d in (64, 128, 256)]  # fmt: skip

REPEATS = [
    dense((1300, 1300), (64, 64), (8, 2), batch=2, **CAUSAL),
    dense((1300, 1300), (128, 128), (8, 2), batch=2, **FULL),
    dense((1300, 1300), (256, 256), (4, 2), batch=2, **FULL),
    packed(((700, 0, 300, 129, 64, 1), (700, 9, 800, 129, 0, 77)), (128, 128), (8, 2), **CAUSAL),
]


# What they compile to


def _spec_of(case: Case, recipe: Fp8Recipe):
    """The question of attention, of tensors without memory but on a GPU."""

    def meta(rows: tuple[int, ...], heads: int, width: int) -> torch.Tensor:
        return torch.empty(*rows, heads, width, dtype=case.dtype, device="meta")

    rows_q, rows_k = (case.batch, case.seqlen_q), (case.batch, case.seqlen_k)
    more = {}
    if case.varlen:
        rows_q, rows_k = (sum(case.lengths_q),), (sum(case.lengths_k),)
        starts = torch.empty(case.batch + 1, dtype=torch.int32, device="meta")
        used = [None if x is None else starts[1:] for x in (case.used_q, case.used_k)]
        more = dict(zip(Lengths._fields, (starts, starts, *used, case.seqlen_q, case.seqlen_k), strict=True))
    q, k = meta(rows_q, case.heads, case.head_dim), meta(rows_k, case.kv_heads, case.head_dim)
    tensors = quantize_qkv(q, k, meta(rows_k, case.kv_heads, case.dim_v), recipe, **more)
    spec = fp8_spec(tensors, Options(*flat_options(case)))
    on_gpu = dataclasses.replace(spec.attention, device=torch.device("cuda", 0))
    return dataclasses.replace(spec, attention=on_gpu)


def distinct_kernels() -> dict:
    """Every kernel of the cases above: a case and recipe that need it."""
    from tandem_attn.kernels.config_fp8 import fp8_config

    asked = [(case, recipe_for(case)) for case in [*QUESTIONS, *V_SMOOTHED, *itertools.chain(*FAR), *REPEATS]]
    asked += [(case, PLAIN) for case in EXACT]
    found = {}
    for case, recipe in reversed(asked):
        spec = _spec_of(case, recipe)
        question = spec.attention
        if not spec.is_empty:
            used = (question.has_seqused_q, question.has_seqused_k)
            corrections = (spec.corrects_lse, spec.adds_mean)
            found[(fp8_config(question), *used, *corrections)] = (case, recipe)
    return found


def compile_kernel(case: Case, recipe: Fp8Recipe) -> str:
    """As in `gpu_cases.py`."""
    pretend_hopper()
    from tandem_attn.kernels import launch_fp8

    spec = _spec_of(case, recipe)
    plan, question = launch_fp8.fp8(spec), spec.attention

    def meta(rank: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((8,) * rank, dtype=dtype, device="meta")

    rank = 3 if question.varlen else 4
    operands = [meta(rank, E4M3), meta(rank, E4M3), meta(4, E4M3), meta(rank, question.dtype)]
    factor = meta(1, F32)
    corrections = (factor if has else None for has in (spec.corrects_lse, spec.adds_mean))
    factors = (factor, factor, factor, *corrections)
    starts = meta(1, torch.int32) if question.varlen else None
    used = [starts if has else None for has in (question.has_seqused_q, question.has_seqused_k)]
    counter = meta(1, torch.int32) if plan.dynamic else None
    aside = factor if plan.config.promote > 0 else None
    made = plan._prepare((*operands, factor), (starts, starts, *used, counter, factors, aside))
    return made.compiled.hash
