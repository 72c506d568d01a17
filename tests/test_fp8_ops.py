"""FP8 at PyTorch's boundary: schema, fakes, torch.compile, who answers, and the plans remembered."""

import dataclasses

import pytest
import torch
from fp8_cases import (
    DESCALES,
    PLAIN,
    SMALL,
    attended,
    flat_lengths,
    flat_options,
    inputs_of,
    leaves,
    lengths_of,
    options_of,
    quantized,
    with_leaves,
)
from gpu_cases import BF16, FP16, name, packed
from test_ops import compiled
from torch._subclasses.fake_tensor import FakeTensorMode

from tandem_attn import (
    Fp8Recipe,
    dispatch,
    explain,
    flash_attn_fp8_func,
    flash_attn_fp8_varlen_func,
    flash_attn_func,
    flash_attn_quantized_func,
    flash_attn_varlen_func,
    ops,
    ops_fp8,
    quantize_qkv,
    reference_fp8,
    reference_quant,
)
from tandem_attn.quant import GRANULARITIES
from tandem_attn.spec import E4M3
from tandem_attn.testing import Inputs

F32 = torch.float32


# The operators


def flat_recipe(recipe: Fp8Recipe) -> tuple:
    given = isinstance(recipe.signs, tuple)
    facts = (recipe.rotate, recipe.smooth_k, recipe.smooth_v, recipe.granularity)
    return (*facts, list(recipe.signs) if given else [], 0 if given else recipe.signs)


RECIPES = [
    Fp8Recipe(),
    PLAIN,
    Fp8Recipe(granularity="head"),
    Fp8Recipe(smooth_k=False, granularity="tensor", signs=5),
    Fp8Recipe(smooth_v=True),
]
CHECKS = (
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)  # torch compares no e4m3 inputs, as test_schema would


def opcheck(op, arguments: tuple, with_schema: bool = False) -> None:
    checks = ("test_schema", *CHECKS) if with_schema else CHECKS
    before = [x.clone() for x in arguments if isinstance(x, torch.Tensor)]
    torch.library.opcheck(op.default, arguments, test_utils=checks)
    for x, y in zip((x for x in arguments if isinstance(x, torch.Tensor)), before, strict=True):
        assert torch.equal(x.float(), y.float()), "an input was written"


def strides_that_count(x: torch.Tensor) -> list[int]:
    """Of dimensions that are stepped along."""
    return [step for size, step in zip(x.shape, x.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("recipe", [*RECIPES, Fp8Recipe(signs=[1, -1] * 16)], ids=str)
@pytest.mark.parametrize("case", [SMALL[0], SMALL[4], SMALL[6]], ids=name)
def test_opcheck_quantize(case, recipe):
    inputs = inputs_of(case)
    arguments = (*leaves(inputs), *flat_lengths(inputs), None, None, False, *flat_recipe(recipe))
    opcheck(torch.ops.tandem_attn.quantize, arguments, with_schema=True)


def test_opcheck_quantize_with_rotary_embedding():
    inputs = inputs_of(SMALL[0])
    tables = (torch.rand(150, 8), torch.rand(150, 8), True)
    arguments = (*leaves(inputs), *[None] * 6, *tables, *flat_recipe(Fp8Recipe()))
    opcheck(torch.ops.tandem_attn.quantize, arguments, with_schema=True)


@pytest.mark.parametrize("case", [SMALL[0], SMALL[5]], ids=name)
def test_opcheck_transpose(case):
    inputs = inputs_of(case)
    lengths = (inputs.kwargs.get("cu_seqlens_k"), inputs.kwargs.get("seqused_k"))
    arguments = (inputs.v.to(E4M3), *lengths)
    opcheck(torch.ops.tandem_attn.transpose_v, arguments)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("case", [SMALL[0], SMALL[1], SMALL[5]], ids=name)
def test_opcheck_forward(case, recipe):
    inputs = inputs_of(case)
    x = quantized(inputs, recipe)
    tensors = (x.q, x.k, x.v_t, x.q_descale, x.k_descale, x.v_descale, x.lse_shift, x.v_mean)
    arguments = (*tensors, x.dtype, *flat_lengths(inputs), *flat_options(case))
    opcheck(torch.ops.tandem_attn.fp8_forward, arguments)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("case", [SMALL[0], SMALL[1], SMALL[4], SMALL[5]], ids=name)
def test_fakes_have_the_shapes_of_the_real_thing(case, recipe):
    inputs = inputs_of(case)
    x = quantized(inputs, recipe)
    real = attended(x, inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = Inputs(*(mode.from_tensor(t) for t in leaves(inputs)), inputs.kwargs, [])
        y = quantized(fakes, recipe)
        fake = attended(y, fakes)
    fields = ("q", "k", "v_t", *DESCALES, "lse_shift", "k_mean", "v_mean")
    pairs = [(getattr(x, f), getattr(y, f)) for f in fields]
    for a, b in (*pairs, *zip(real, fake, strict=True)):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert strides_that_count(a) == strides_that_count(b)
            assert type(b).__name__ == "FakeTensor"


def test_meta_tensors_have_shapes_and_no_numbers():
    q = torch.empty(2, 9, 4, 32, device="meta")
    out, lse = flash_attn_fp8_func(q, q, q, return_attn_probs=True)
    assert out.is_meta and out.shape == q.shape and lse.shape == (2, 4, 9)
    small = q.to(E4M3)
    out = flash_attn_func(small, small, small, q_descale=q[:, 0, :, 0].clone())
    assert out.is_meta and out.dtype == BF16
    with pytest.raises(ValueError, match="k is of head_dim 16"):
        flash_attn_fp8_func(q, q[..., :16], q)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("case", [SMALL[0], SMALL[5]], ids=name)
def test_both_roads_give_the_same_bits(case, recipe):
    """The short cut and the operators run the same plans."""
    inputs = inputs_of(case)
    x = quantized(inputs, recipe)
    arguments = (*leaves(inputs), *flat_lengths(inputs), None, None, True, *flat_recipe(recipe))
    flat = torch.ops.tandem_attn.quantize(*arguments)
    for field, a in zip(("q", "k", "v_t", *DESCALES), flat, strict=False):
        assert torch.equal(a.float(), getattr(x, field).float())
    out, lse = torch.ops.tandem_attn.fp8_forward(
        *flat[:6], x.lse_shift, x.v_mean, x.dtype, *flat_lengths(inputs), *flat_options(case)
    )
    for a, b in zip((out, lse), attended(x, inputs), strict=True):
        assert torch.equal(a, b)


# torch.compile


@pytest.mark.parametrize("recipe", [None, *RECIPES[1:]], ids=str)
def test_compile_with_gradients(recipe):
    def attend(q, k, v):
        return flash_attn_fp8_func(q, k, v, causal=True, recipe=recipe, return_attn_probs=True)

    fast, counter = compiled(attend)
    for length in (7, 16, 33, 200, 129):
        tensors = [torch.randn(2, length, 2, 32, requires_grad=True) for _ in range(3)]
        expected, found = attend(*tensors), fast(*tensors)
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b)
        wanted = torch.autograd.grad(expected[0].sum() + expected[1].sum(), tensors)
        got = torch.autograd.grad(found[0].sum() + found[1].sum(), tensors)
        for a, b in zip(wanted, got, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 3, "one compilation and at most two more"


def test_compile_packed_with_gradients():
    def attend(q, k, v, starts, longest):
        return flash_attn_fp8_varlen_func(q, k, v, starts, starts, longest, longest, window_size=(9, 0))

    fast, counter = compiled(attend)
    for lengths in ((3, 4), (5, 60, 7), (1, 9), (200,), (2, 0, 8)):
        case = packed((lengths, lengths), (32, 32), dtype=F32)
        inputs = with_leaves(inputs_of(case))
        arguments = (*leaves(inputs), inputs.kwargs["cu_seqlens_q"], max(lengths))
        expected, found = attend(*arguments), fast(*arguments)
        assert torch.equal(expected, found)
        pairs = zip(*(torch.autograd.grad(x.sum(), leaves(inputs)) for x in (expected, found)), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 4


@pytest.mark.parametrize("case", [SMALL[0], SMALL[4]], ids=name)
def test_compile_two_steps(case):
    """Quantized outside of the graph, inside of it, and all in one."""
    inputs = inputs_of(case)

    def both(q, k, v):
        x = quantize_qkv(q, k, v, **lengths_of(inputs))
        return flash_attn_quantized_func(x, **options_of(inputs))

    expected = both(*leaves(inputs))
    assert torch.equal(compiled(both)[0](*leaves(inputs)), expected)
    fast, _ = compiled(lambda x: flash_attn_quantized_func(x, **options_of(inputs)))
    assert torch.equal(fast(quantized(inputs)), expected)


@pytest.mark.parametrize("given", [False, True], ids=["no descales", "descales"])
def test_compile_e4m3(given):
    def attend(q, k, v, *descales):
        return flash_attn_func(q, k, v, causal=True, **dict(zip(DESCALES, descales, strict=False)))

    fast, _ = compiled(attend)
    for length in (16, 33, 200):
        tensors = [torch.randn(2, length, h, 32).to(E4M3) for h in (4, 2, 2)]
        descales = [torch.rand(2, 2) + 0.5 for _ in DESCALES] if given else []
        assert torch.equal(fast(*tensors, *descales), attend(*tensors, *descales))


def test_compile_reports_mistakes():
    fast, _ = compiled(lambda q, k: flash_attn_fp8_func(q, k, k))
    with pytest.raises(Exception, match=r"q is of .* heads with k of .*; supported: a positive multiple"):
        fast(torch.randn(1, 4, 2, 32), torch.randn(1, 4, 3, 32))
    fast, _ = compiled(lambda q, k: flash_attn_func(q, k, k))
    with pytest.raises(Exception, match="q is of head_dim 24; supported: multiples of 16"):
        fast(torch.randn(1, 4, 2, 24).to(E4M3), torch.randn(1, 4, 2, 24).to(E4M3))


# Who answers


@pytest.mark.parametrize("name_, reason", [("torch", "no FP8"), ("gluon", "tensors are on cpu")])
def test_a_backend_that_cannot_says_why(backend, name_, reason):
    q = torch.randn(1, 40, 2, 32)
    x = quantize_qkv(q, q, q)
    backend(name_)
    small = q.to(E4M3)
    calls = [lambda: quantize_qkv(q, q, q), lambda: flash_attn_quantized_func(x)]
    calls += [lambda: flash_attn_fp8_func(q, q, q), lambda: flash_attn_func(small, small, small)]
    for call in calls:
        with pytest.raises(NotImplementedError, match=f"no backend can answer this:\n  {name_}: .*{reason}"):
            call()


def test_the_reference_may_be_asked_for(backend):
    q = torch.randn(1, 40, 2, 32)
    expected = flash_attn_fp8_func(q, q, q)
    backend("reference")
    assert torch.equal(flash_attn_fp8_func(q, q, q), expected)


def test_explain():
    q, k = torch.randn(2, 70, 4, 32).to(E4M3), torch.randn(2, 150, 2, 32).to(E4M3)
    said = explain(q, k, k, causal=True, k_descale=torch.full((2, 2), 0.5))
    assert said.backend == "reference" and said.spec.attention.causal
    assert not said.spec.per_block and not said.spec.corrects_lse
    assert said.reasons == {
        "gluon": ["tensors are on cpu; the kernels need an NVIDIA Hopper GPU"],
        "torch": ["torch's fused kernels know no KV cache and no FP8"],
    }
    text = str(said)
    assert text.startswith("e4m3, a descale for each head, output: dense attention, bfloat16 on cpu: batch 2")
    assert "70 queries x 150 keys, 4 heads over 2, head_dim 32/32, causal" in text
    assert "dequantized, then blockwise torch" in text
    starts = torch.tensor([0, 70], dtype=torch.int32)
    of_packed = explain(q[0], q[0], q[0], starts, starts, 70, 70)
    assert "varlen attention" in str(of_packed) and of_packed.spec.padded_k == 128
    empty = explain(q[:, :0], k, k)
    assert empty.backend == "empty" and "no query sees any key" in str(empty)


def test_the_log_says_who_answers(monkeypatch, capfd, caplog):
    monkeypatch.setenv("TANDEM_LOG", "1")
    q = torch.randn(1, 41, 2, 32)
    with caplog.at_level("DEBUG"):
        flash_attn_fp8_func(q, q, q)
    said = caplog.text + "".join(capfd.readouterr())
    assert "e4m3 of float32 on cpu" in said and "a descale for each block" in said


# Remembered plans


@pytest.fixture
def seen(monkeypatch) -> list:
    """Specs for which plans are made. The reference answers."""
    made = []

    def watched(module, function):
        def make(spec):
            made.append(spec)
            return getattr(module, function)(spec)

        return staticmethod(make)

    class Backend:
        NAME, describe = "recorder", str
        quantize = watched(reference_quant, "quantize")
        transpose = watched(reference_quant, "transpose")
        fp8 = watched(reference_fp8, "fp8")

    monkeypatch.setattr(dispatch, "backend_for", lambda spec, requested=None: Backend)
    return made


def test_a_question_is_decided_once(seen):
    q, k = torch.randn(2, 70, 4, 32), torch.randn(2, 150, 2, 32)
    for _ in range(3):
        flash_attn_fp8_func(q, k, k)
        flash_attn_quantized_func(quantize_qkv(q.clone(), k.clone(), k.clone()))
    assert [type(x).__name__ for x in seen] == ["QuantizeSpec", "Fp8Spec"]
    small, descale = [x.to(E4M3) for x in (q, k)], torch.ones(2, 2)
    for factor in (1.0, 2.0, 4.0):
        flash_attn_func(small[0], small[1], small[1], v_descale=descale * factor)
    assert [type(x).__name__ for x in seen[2:]] == ["TransposeSpec", "Fp8Spec"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_difference_is_a_new_question(seen, granularity):
    """A key that misses an argument would answer one question with another's plan."""
    q, k = torch.randn(2, 70, 4, 32), torch.randn(2, 150, 2, 32)
    recipe = Fp8Recipe(smooth_k=False, granularity=granularity)
    x = quantize_qkv(q, k, k, recipe)
    options = [{}, {"causal": True}, {"window_size": (2, 0)}, {"window_size": (0, 2)}, {"softcap": 2.0}]
    options += [{"softmax_scale": 0.5}, {"softmax_scale": 0.25001}, {"sm_margin": 1}]
    for given in options:
        for _ in range(2):
            before = len(seen)
            flash_attn_quantized_func(x, **given)
        assert len(seen) == before, "found again"
    assert len(set(seen[1:])) == len(seen[1:]) == len(options)
    before = len(seen)
    changes = [
        dict(dtype=FP16),
        dict(lse_shift=torch.zeros(2, 4, 70)),
        dict(v_mean=torch.zeros(2, 2, 32)),
        dict(q=x.q.transpose(1, 2).contiguous().transpose(1, 2)),
    ]
    for change in changes:
        flash_attn_quantized_func(dataclasses.replace(x, **change))
    assert len(seen) == before + len(changes)


def test_every_recipe_is_a_new_question(seen):
    q = torch.randn(1, 40, 2, 32)
    recipes = [*RECIPES, Fp8Recipe(signs=1), Fp8Recipe(signs=[1] * 32), Fp8Recipe(signs=[-1] * 32)]
    answers = []
    for recipe in recipes:
        answers.append(quantize_qkv(q, q, q, recipe).q.float())
        quantize_qkv(q, q, q, recipe)
    assert len(seen) == len(recipes)
    assert not torch.equal(answers[0], answers[-3]) and not torch.equal(answers[-3], answers[-2])


def test_every_difference_of_packed_lengths_is_a_new_question(seen):
    q, starts = torch.randn(8, 4, 32).to(E4M3), torch.tensor([0, 3, 8], dtype=torch.int32)
    used = torch.tensor([1, 2], dtype=torch.int32)
    base = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 5, "max_seqlen_k": 5}
    more = [{}, {"max_seqlen_q": 6}, {"max_seqlen_k": 6}, {"seqused_q": used}, {"seqused_k": used}]
    for given in more:
        flash_attn_varlen_func(q, q, q, **(base | given))
        flash_attn_varlen_func(q, q, q, **(base | given))
    questions = [x for x in seen if type(x).__name__ == "Fp8Spec"]
    assert len(questions) == len(set(questions)) == len(more)


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(ops, "MAX_PLANS", 5)
    for length in range(1, 9):
        q = torch.randn(1, length, 1, 32)
        flash_attn_fp8_func(q, q, q)
    assert len(ops_fp8._plans) == 5
