"""The questions of FP8 attention, and every mistake by its name: in new questions, and in those whose shapes
have been asked about rightly before, so that a plan is remembered which must not answer.
"""

import dataclasses
import math

import pytest
import torch
from fp8_cases import DESCALES, PLAIN

from tandem_attn import (
    Fp8Recipe,
    Fp8Tensors,
    explain,
    flash_attn_fp8_func,
    flash_attn_fp8_varlen_func,
    flash_attn_func,
    flash_attn_quantized_func,
    flash_attn_varlen_func,
    quantize_qkv,
)
from tandem_attn.quant import GRANULARITIES, padded_rows
from tandem_attn.spec import E4M3, Lengths, Options, Window
from tandem_attn.spec_fp8 import fp8_spec

E5M2 = torch.float8_e5m2
OPTIONS = Options(None, -1, -1, 0.0, 0, False)


def vector(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def randn(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def wide() -> dict:
    """Arguments of the functions that quantize."""
    return dict(q=randn(2, 70, 4, 32), k=randn(2, 150, 2, 32), v=randn(2, 150, 2, 32))


def lengths() -> dict:
    return dict(
        cu_seqlens_q=vector(0, 30, 140), cu_seqlens_k=vector(0, 100, 300), max_seqlen_q=110, max_seqlen_k=200
    )


def wide_packed() -> dict:
    return dict(q=randn(140, 4, 32), k=randn(300, 2, 32), v=randn(300, 2, 32)) | lengths()


def e4m3() -> dict:
    """Arguments of FlashAttention-3's entry."""
    return {x: t.to(E4M3) for x, t in wide().items()} | {x: torch.rand(2, 2) + 0.5 for x in DESCALES}


def e4m3_packed() -> dict:
    tensors = {x: t.to(E4M3) if x in "qkv" else t for x, t in wide_packed().items()}
    return tensors | {x: torch.rand(2, 2) + 0.5 for x in DESCALES}


# The question


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_spec_of_tensors(packed, granularity):
    given = wide_packed() if packed else wide()
    x = quantize_qkv(**given, recipe=Fp8Recipe(granularity=granularity, smooth_v=True))
    spec = fp8_spec(x, OPTIONS._replace(window_left=150 if not packed else 200, window_right=0))
    question = spec.attention
    assert spec.per_block == (granularity == "block") and spec.corrects_lse and spec.adds_mean
    assert spec.padded_k == (padded_rows(300, 2) if packed else 256)
    assert question.window == Window(-1, 0), "a side that reaches everything is none"
    assert question.softmax_scale == 32**-0.5 and question.dtype == torch.float32
    assert (question.batch, question.num_heads, question.num_kv_heads) == (2, 4, 2)
    assert (question.seqlen_q, question.seqlen_k) == ((110, 200) if packed else (70, 150))
    assert (question.total_q, question.total_k) == (140, 300)
    blocks = (padded_rows(140, 2) // 64, padded_rows(300, 2) // 128, 1) if packed else (2, 2, 1)
    assert spec.factors == (blocks if granularity == "block" else (1, 1, 0))
    each = "block" if granularity == "block" else "head"
    assert f"a descale for each {each}" in spec.question
    assert f"{question.seqlen_k} keys" in spec.question


@pytest.mark.parametrize("rows, keys", [(1, 1), (1, 300), (300, 1), (64, 128), (65, 129), (0, 300), (300, 0)])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_one_block_of_a_side_says_nothing_of_the_other(rows, keys, granularity):
    """A dimension of size 1 may have any stride: what it lies like must not be mistaken for a granularity."""
    heads = ((8, 1), (1, 1), (6, 3))
    for num_q, num_kv in heads:
        q, k, v = randn(2, rows, num_q, 32), randn(2, keys, num_kv, 32), randn(2, keys, num_kv, 32)
        spec = fp8_spec(quantize_qkv(q, k, v, Fp8Recipe(granularity=granularity)), OPTIONS)
        several = max(rows > 64, keys > 128)
        if granularity == "block":
            assert spec.per_block
        elif several and 0 not in (rows, keys):
            assert not spec.per_block


def test_no_mean_no_correction():
    for smooth_k, smooth_v in ((False, False), (True, False), (False, True)):
        recipe = dataclasses.replace(PLAIN, smooth_k=smooth_k, smooth_v=smooth_v)
        spec = fp8_spec(quantize_qkv(**wide(), recipe=recipe), OPTIONS)
        assert (spec.corrects_lse, spec.adds_mean) == (smooth_k, smooth_v)


def test_a_spec_has_no_addresses():
    """Equal for equal shapes, and hashable."""
    one, other = (fp8_spec(quantize_qkv(**wide()), OPTIONS) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != fp8_spec(quantize_qkv(**wide()), OPTIONS._replace(softmax_scale=0.5))
    for recipe in (Fp8Recipe(smooth_k=False), Fp8Recipe(smooth_v=True)):
        assert one != fp8_spec(quantize_qkv(**wide(), recipe=recipe), OPTIONS)


# Mistakes in 16-bit arguments

MISTAKES = {
    "no tensor": (dict(q=[1.0]), TypeError, "q is list; supported: a torch.Tensor"),
    "none": (dict(v=None), TypeError, "v is NoneType"),
    "sparse": (dict(k=randn(2, 150, 2, 32).to_sparse()), ValueError, "k is .*sparse.*torch.strided"),
    "integers": (dict(q=torch.zeros(2, 70, 4, 32, dtype=torch.int8)), TypeError, "q is of dtype torch.int8"),
    "e4m3": (
        dict(q=randn(2, 70, 4, 32, dtype=E4M3)),
        TypeError,
        "q is of dtype torch.float8_e4m3fn.*float16",
    ),
    "mixed": (
        dict(k=randn(2, 150, 2, 32, dtype=torch.float16)),
        TypeError,
        "k is of dtype torch.float16; .*q",
    ),
    "rank": (dict(q=randn(70, 4, 32)), ValueError, r"q is a tensor of shape \(70, 4, 32\); supported: 4 dim"),
    "batch": (dict(q=randn(3, 70, 4, 32)), ValueError, "k is of batch size 2; .*3"),
    "device": (dict(v=torch.empty(2, 150, 2, 32, device="meta")), ValueError, "v is on meta; .*cpu"),
    "keys": (dict(v=randn(2, 149, 2, 32)), ValueError, "v is of shape .*as many keys as k"),
    "heads": (dict(q=randn(2, 70, 3, 32)), ValueError, "q is of 3 heads with k of 2"),
    "head_dim": (dict(q=randn(2, 70, 4, 64)), ValueError, "k is of head_dim 32; .*64"),
    "recipe": (dict(recipe={"rotate": True}), TypeError, "recipe is dict; supported: an Fp8Recipe"),
    "recipe class": (dict(recipe=Fp8Recipe), TypeError, "recipe is type"),
    "signs": (dict(recipe=Fp8Recipe(signs=[1] * 16)), ValueError, "signs is a vector of 16; .*32"),
}
DIMS = {
    "24": (24, 32, NotImplementedError, "q is of head_dim 24; supported: multiples of 16 up to 256 in FP8"),
    "272": (272, 32, NotImplementedError, "q is of head_dim 272; supported: multiples of 16 up to 256"),
    "v 40": (32, 40, NotImplementedError, "v is of head_dim 40; supported: multiples of 16 up to 256"),
    "v 512": (32, 512, NotImplementedError, "v is of head_dim 512"),
    "rotated 48": (48, 32, ValueError, "rotate is True with head_dim 48; supported: False, or .*32"),
}


@pytest.mark.parametrize("function", [quantize_qkv, flash_attn_fp8_func], ids=lambda f: f.__name__)
@pytest.mark.parametrize("after", [False, True], ids=["new", "remembered"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_dense_mistakes(mistake, after, function):
    changes, error, message = MISTAKES[mistake]
    if after:
        function(**wide())
    with pytest.raises(error, match=f"^{message}"):
        function(**(wide() | changes))


@pytest.mark.parametrize("mistake", DIMS)
def test_head_dims(mistake):
    dim, dim_v, error, message = DIMS[mistake]
    tensors = dict(q=randn(1, 5, 2, dim), k=randn(1, 5, 2, dim), v=randn(1, 5, 2, dim_v))
    for function in (quantize_qkv, flash_attn_fp8_func):
        with pytest.raises(error, match=f"^{message}"):
            function(**tensors)
    small = [x.to(E4M3) for x in tensors.values()]
    if error is NotImplementedError:
        for function in (flash_attn_func, explain):
            with pytest.raises(error, match=f"^{message}"):
                function(*small)
    else:
        assert flash_attn_func(*small).shape == (1, 5, 2, dim_v)


@pytest.mark.parametrize(
    "option, error, message",
    [
        (dict(softmax_scale=math.nan), ValueError, "softmax_scale is nan"),
        (dict(softmax_scale=[1.0]), TypeError, r"softmax_scale is \[1.0\] \(list\)"),
        (dict(softmax_scale=True), TypeError, "softmax_scale is True"),
        (dict(softcap=-1.0), ValueError, "softcap is -1.0"),
        (dict(softcap="x"), TypeError, "softcap is 'x'"),
        (dict(sm_margin=-1), ValueError, "sm_margin is -1"),
        (dict(sm_margin=1.0), TypeError, "sm_margin is 1.0"),
        (dict(causal=1), TypeError, "causal is 1"),
        (dict(window_size=5), ValueError, "window_size is 5"),
        (dict(window_size=(-2, 0)), ValueError, "window_size is"),
        (dict(window_size=(2.0, 0)), TypeError, "window_size is 2.0"),
        (dict(causal=True, window_size=(0, 3)), ValueError, "window_size is .*causal=True"),
    ],
    ids=str,
)
def test_options(option, error, message):
    """The same in each function, and when a right call is remembered: True equals 1."""
    x = quantize_qkv(**wide(), recipe=PLAIN)
    for right in (dict(softmax_scale=1.0), dict(sm_margin=1)):
        flash_attn_quantized_func(x, **right)
    calls = [lambda: flash_attn_quantized_func(x, **option), lambda: flash_attn_fp8_func(**wide(), **option)]
    calls += [lambda: flash_attn_func(**e4m3(), **option), lambda: explain(**e4m3(), **option)]
    for call in calls:
        with pytest.raises(error, match=f"^{message}"):
            call()


def test_deterministic_is_a_bool():
    for call in (
        lambda: flash_attn_fp8_func(**wide(), deterministic=1),
        lambda: flash_attn_func(**e4m3(), deterministic=1),
    ):
        with pytest.raises(TypeError, match=r"^deterministic is 1 \(int\)"):
            call()


def test_a_softcap_and_no_mean():
    for given in (wide(), wide_packed()):
        x = quantize_qkv(**given)
        with pytest.raises(ValueError, match=r"^softcap is 5.0; supported: 0 .*smooth_k=False"):
            flash_attn_quantized_func(x, softcap=5.0)
    with pytest.raises(ValueError, match=r"^softcap is 5\.0"):
        flash_attn_fp8_func(**wide(), softcap=5.0, recipe=Fp8Recipe())


@pytest.mark.parametrize(
    "wrong", [None, 5, "tensors", torch.zeros(2, 70, 4, 32), (1, 2, 3)], ids=lambda x: type(x).__name__
)
def test_tensors_of_another_type(wrong):
    with pytest.raises(TypeError, match=f"^tensors is {type(wrong).__name__}; supported: Fp8Tensors"):
        flash_attn_quantized_func(wrong)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(seqused_q=vector(1, 1)), ValueError, "seqused_q is given without cu_seqlens"),
        (dict(seqused_k=vector(1, 1)), ValueError, "seqused_k is given without cu_seqlens"),
        (dict(cu_seqlens_q=vector(0, 1)), TypeError, "cu_seqlens_k is NoneType"),
        (dict(cu_seqlens_k=vector(0, 1)), TypeError, "cu_seqlens_q is NoneType"),
        (dict(cu_seqlens_q=vector(0, 1), cu_seqlens_k=vector(0, 1)), TypeError, "max_seqlen_q is None"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_lengths_come_together(changes, error, message):
    with pytest.raises(error, match=f"^{message}"):
        quantize_qkv(**wide(), **changes)


LENGTH_MISTAKES = {
    "list": (dict(cu_seqlens_q=[0, 30, 140]), TypeError, "cu_seqlens_q is list"),
    "int64": (
        dict(cu_seqlens_k=torch.tensor([0, 100, 300])),
        TypeError,
        "cu_seqlens_k is of dtype torch.int64",
    ),
    "device": (dict(cu_seqlens_k=vector(0, 100, 300).to("meta")), ValueError, "cu_seqlens_k is on meta"),
    "sequences": (dict(cu_seqlens_k=vector(0, 300)), ValueError, "cu_seqlens_k is for 1 sequences"),
    "used": (dict(seqused_q=vector(1, 2, 3)), ValueError, "seqused_q is for 3 sequences"),
    "longest": (dict(max_seqlen_q=1.5), TypeError, "max_seqlen_q is 1.5"),
    "too short": (dict(max_seqlen_k=199), ValueError, "max_seqlen_k is 199; supported: at least 200"),
    "falling": (dict(cu_seqlens_q=vector(0, 150, 140)), ValueError, "cu_seqlens_q is falling"),
    "beyond": (dict(cu_seqlens_k=vector(0, 100, 301)), ValueError, "cu_seqlens_k is ending at 301"),
    "too much": (dict(seqused_k=vector(100, 201)), ValueError, "seqused_k is 201 at 1"),
}


@pytest.mark.parametrize("after", [False, True], ids=["new", "remembered"])
@pytest.mark.parametrize("mistake", LENGTH_MISTAKES)
def test_length_mistakes(mistake, after):
    changes, error, message = LENGTH_MISTAKES[mistake]
    for function, right in (
        (quantize_qkv, wide_packed()),
        (flash_attn_fp8_varlen_func, wide_packed()),
        (flash_attn_varlen_func, e4m3_packed()),
    ):
        if after:
            function(**right)
        with pytest.raises(error, match=f"^{message}"):
            function(**(right | changes))


def test_lengths_are_looked_at_again_in_attention():
    """They may have changed since: the plan of the call before does not vouch for them."""
    x = quantize_qkv(**wide_packed())
    flash_attn_quantized_func(x)
    x.lengths.cu_seqlens_k[-1] = 301
    with pytest.raises(ValueError, match="cu_seqlens_k is ending at 301"):
        flash_attn_quantized_func(x)


# Mistakes in FlashAttention-3's arguments

META = torch.ones(2, 2, device="meta")
DESCALE_MISTAKES = {
    "number": (1.0, TypeError, "is float; supported: a torch.Tensor of dtype float32, or None"),
    "float64": (torch.ones(2, 2, dtype=torch.float64), TypeError, "is of dtype torch.float64"),
    "scalar": (torch.tensor(1.0), ValueError, r"is of shape \(\); supported: \(batch, kv_heads\), \(2, 2\)"),
    "query heads": (torch.ones(2, 4), ValueError, r"is of shape \(2, 4\)"),
    "blocks": (torch.ones(2, 2, 1), ValueError, r"is of shape \(2, 2, 1\)"),
    "device": (META, ValueError, "is on meta; supported: the device of q, cpu"),
    "zero": (torch.tensor([[1.0, 1], [0, 1]]), ValueError, "is 0.0 for some head; supported: finite"),
    "negative": (torch.tensor([[1.0, 1], [1, -2]]), ValueError, "is -2.0 for some head"),
    "nan": (torch.tensor([[math.nan, 1], [1, 1]]), ValueError, "is nan for some head"),
    "infinite": (torch.tensor([[1, math.inf], [1, 1]]), ValueError, "is inf for some head"),
}


@pytest.mark.parametrize("after", [False, True], ids=["new", "remembered"])
@pytest.mark.parametrize("which", DESCALES)
@pytest.mark.parametrize("mistake", DESCALE_MISTAKES)
def test_descale_mistakes(mistake, which, after):
    factor, error, message = DESCALE_MISTAKES[mistake]
    for function, right in ((flash_attn_func, e4m3()), (flash_attn_varlen_func, e4m3_packed())):
        if after:
            function(**right)
        for call in (function, explain):
            with pytest.raises(error, match=f"^{which} {message}"):
                call(**(right | {which: factor}))


def test_numbers_of_descales_are_looked_at_again():
    given = e4m3()
    flash_attn_func(**given)
    given["k_descale"][1, 0] = 0.0
    with pytest.raises(ValueError, match=r"^k_descale is 0\.0"):
        flash_attn_func(**given)


E4M3_MISTAKES = {
    **{
        f"{x} wide": ({x: torch.float16}, TypeError, f"{x} is of dtype torch.float16; supported: .*e4m3fn")
        for x in "qkv"
    },
    **{f"{x} e5m2": ({x: E5M2}, TypeError, f"{x} is of dtype torch.float8_e5m2; .*e4m3fn") for x in "qkv"},
    "all e5m2": (
        dict.fromkeys("qkv", E5M2),
        NotImplementedError,
        "q is of dtype torch.float8_e5m2; .*e4m3fn",
    ),
}


@pytest.mark.parametrize("descales", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mistake", E4M3_MISTAKES)
def test_types_of_e4m3_questions(mistake, packed, descales):
    dtypes, error, message = E4M3_MISTAKES[mistake]
    given = e4m3_packed() if packed else e4m3()
    given |= {x: given[x].float().to(dtype) for x, dtype in dtypes.items()}
    if not descales:
        given = {x: t for x, t in given.items() if x not in DESCALES}
    for function in (flash_attn_varlen_func if packed else flash_attn_func, explain):
        with pytest.raises(error, match=f"^{message}"):
            function(**given)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(q=None), TypeError, "q is NoneType"),
        (dict(k=randn(2, 150, 2, 16, dtype=E4M3)), ValueError, "k is of head_dim 16"),
        (dict(v=randn(2, 149, 2, 32, dtype=E4M3)), ValueError, "v is of shape .*as many keys"),
        (dict(q=randn(2, 70, 3, 32, dtype=E4M3)), ValueError, "q is of 3 heads"),
        (dict(q=randn(70, 4, 32, dtype=E4M3)), ValueError, "q is a tensor of shape"),
        (dict(v=randn(2, 150, 2, 32, dtype=E4M3).to("meta")), ValueError, "v is on meta"),
    ],
    ids=["none", "head_dim", "keys", "heads", "rank", "device"],
)
def test_shapes_of_e4m3_questions(changes, error, message):
    given = e4m3() | changes
    functions = [flash_attn_func]
    if given["q"] is None or given["q"].dim() == 4:  # explain takes three dimensions for packed ones
        functions.append(explain)
    for function in functions:
        with pytest.raises(error, match=f"^{message}"):
            function(**given)


@pytest.mark.parametrize("which", "qkv")
def test_e4m3_has_no_gradient(which):
    given = e4m3()
    given[which].requires_grad_()
    message = f"^{which} is e4m3 and requires grad; .*flash_attn_fp8_func takes 16-bit tensors"
    with pytest.raises(NotImplementedError, match=message):
        flash_attn_func(**given)
    with torch.no_grad():
        assert not flash_attn_func(**given).requires_grad


# Fp8Tensors whose parts do not fit


def blocks_of(x: Fp8Tensors, packed: bool) -> dict:
    """Changes that are wrong for descales of blocks: one for each check."""
    column = torch.ones(x.q_descale.shape[-1], x.q_descale.shape[-2]).mT
    found = {
        "blocks of q": (dict(q_descale=x.q_descale[..., 1:].contiguous()), ValueError, "q_descale is of"),
        "blocks of k": (dict(k_descale=torch.ones(2, 2, 7)), ValueError, "k_descale is of shape"),
        "heads of v": (dict(v_descale=x.q_descale), ValueError, "v_descale is of shape"),
        "no descale": (dict(v_descale=None), TypeError, "v_descale is NoneType"),
        "float64 descale": (dict(k_descale=x.k_descale.double()), TypeError, "k_descale is of dtype"),
        "descale elsewhere": (dict(k_descale=x.k_descale.to("meta")), ValueError, "k_descale is on meta"),
        "scalar descale": (dict(q_descale=torch.tensor(1.0)), ValueError, r"q_descale is of shape \(\)"),
        "shape of lse_shift": (dict(lse_shift=x.lse_shift[..., :-1]), ValueError, "lse_shift is of shape"),
        "type of lse_shift": (dict(lse_shift=x.lse_shift.double()), TypeError, "lse_shift is of dtype"),
        "lse_shift elsewhere": (dict(lse_shift=x.lse_shift.to("meta")), ValueError, "lse_shift is on meta"),
        "strides of lse_shift": (
            dict(lse_shift=x.lse_shift.mT.contiguous().mT), ValueError, "lse_shift is .*strides",
        ),
        "channels of v_mean": (dict(v_mean=x.v_mean[..., :-1]), ValueError, "v_mean is of shape"),
        "type of v_mean": (dict(v_mean=x.v_mean.double()), TypeError, "v_mean is of dtype"),
        "v_mean elsewhere": (dict(v_mean=x.v_mean.to("meta")), ValueError, "v_mean is on meta"),
        "strides of v_mean": (dict(v_mean=x.v_mean.mT.contiguous().mT), ValueError, "v_mean is .*strides"),
    }  # fmt: skip
    if packed:
        found["strides of a descale"] = (dict(q_descale=column), ValueError, "q_descale is .*strides")
    return found


def tensors_of(x: Fp8Tensors, packed: bool) -> dict:
    rank = 3 if packed else 4
    found = {
        "no q": (dict(q=None), TypeError, "q is NoneType"),
        "wide k": (dict(k=x.k.to(torch.bfloat16)), TypeError, "k is of dtype torch.bfloat16; .*e4m3fn"),
        "v_t e5m2": (dict(v_t=x.v_t.float().to(E5M2)), TypeError, "v_t is of dtype torch.float8_e5m2"),
        "rank of q": (dict(q=x.q[None]), ValueError, f"q is a tensor of shape .*; supported: {rank} dim"),
        "rank of v_t": (dict(v_t=x.v_t[0]), ValueError, f"v_t is a tensor of shape .*; supported: {rank}"),
        "v_t elsewhere": (dict(v_t=x.v_t.to("meta")), ValueError, "v_t is on meta; .*cpu"),
        "dtype": (dict(dtype=torch.int32), TypeError, "dtype is torch.int32; .*torch.bfloat16"),
        "e4m3 output": (dict(dtype=E4M3), TypeError, "dtype is torch.float8_e4m3fn"),
        "heads": (dict(q=x.q[..., :3, :]), ValueError, "q is of 3 heads with k of 2"),
        "no heads": (dict(q=x.q[..., :0, :]), ValueError, "q is of 0 heads"),
        "head_dim": (dict(k=x.k[..., :16]), ValueError, "k is of head_dim 16; .*32"),
        "short v_t": (dict(v_t=x.v_t[..., :-128].contiguous()), ValueError, "v_t is of shape"),
        "strides of v_t": (dict(v_t=x.v_t.mT.contiguous().mT), ValueError, "v_t is .*strides.*contiguous"),
    }
    if not packed:
        found["batch"] = (dict(k=x.k[:1]), ValueError, "k is of batch size 1; .*2")
        found["batch of v_t"] = (dict(v_t=x.v_t[:1]), ValueError, "v_t is of shape")
        return found
    changed = {
        "two-dimensional": dict(cu_seqlens_q=x.lengths.cu_seqlens_q[None]),
        "int64": dict(cu_seqlens_k=x.lengths.cu_seqlens_k.long()),
        "other number": dict(cu_seqlens_k=vector(0, 300)),
        "used": dict(seqused_k=vector(1)),
    }
    for what, change in changed.items():
        (field,) = change
        error = TypeError if what == "int64" else ValueError
        found[f"{what} {field}"] = (dict(lengths=x.lengths._replace(**change)), error, f"{field} is")
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("checks", [tensors_of, blocks_of], ids=lambda f: f.__name__)
def test_parts_that_do_not_fit(checks, packed):
    """All of them in one test, since each starts from the same right tensors, which are remembered."""
    right = quantize_qkv(**(wide_packed() if packed else wide()), recipe=Fp8Recipe(smooth_v=True))
    flash_attn_quantized_func(right)
    for changes, error, message in checks(right, packed).values():
        wrong = dataclasses.replace(right, **changes)
        with pytest.raises(error, match=f"^{message}"):
            flash_attn_quantized_func(wrong)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("which", DESCALES)
def test_granularities_do_not_mix(which, packed):
    """One tensor with a scale per head and the others with one per block, even where there is one head of one
    sequence, whose scales may lie in any way."""
    given = wide_packed() if packed else wide()
    for heads in (2, 1):
        some = {x: t[..., :heads, :] if x in "qkv" else t for x, t in given.items()}
        if not packed:
            some = {x: t[:heads] for x, t in some.items()}
        block, head = (quantize_qkv(**some, recipe=Fp8Recipe(granularity=g)) for g in ("block", "head"))
        for one, other in ((block, head), (head, block)):
            with pytest.raises(ValueError, match=r"^._descale is of shape"):
                flash_attn_quantized_func(dataclasses.replace(one, **{which: getattr(other, which)}))


def test_tensors_may_be_made_by_hand():
    """Sliced views of q and k, as long as the blocks stay: what the reference says of the whole."""
    given = wide()
    x = quantize_qkv(**given, recipe=PLAIN)
    out = flash_attn_quantized_func(x)
    view = x.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(flash_attn_quantized_func(dataclasses.replace(x, q=view)), out)
    short = dataclasses.replace(x, q=x.q[:, :64], q_descale=x.q_descale[..., :1].contiguous())
    torch.testing.assert_close(flash_attn_quantized_func(short), out[:, :64])


def test_names_of_all_lengths_are_known():
    """The lists above go through the arguments of the functions: nothing is left out."""
    assert set(lengths()) | {"seqused_q", "seqused_k"} == set(Lengths._fields)
