"""The public surface: FlashAttention-3's signatures, packed inputs, refusals, and what importing costs."""

import inspect
import pathlib
import subprocess
import sys

import pytest
import torch

import tandem_attn
from tandem_attn import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func

NONE = inspect.Parameter.empty
_SCALE = {"softmax_scale": None, "causal": False}
_FP8 = {"q_descale": None, "k_descale": None, "v_descale": None}
_MASK = {"window_size": (-1, -1), "attention_chunk": 0, "softcap": 0.0}
_SPLIT = {"num_splits": 1, "pack_gqa": None}
_END = {"sm_margin": 0, "return_attn_probs": False}
_QV, _FIXED = {"qv": None}, {"deterministic": False}
_SEQLENS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_USED = {"seqused_q": None, "seqused_k": None}
_TAIL = _SCALE | _QV | _FP8 | _MASK | _SPLIT | _FIXED | _END

# names, order and defaults of flash_attn_interface.py in Dao-AILab/flash-attention, hopper/ (2026)
SIGNATURES = {
    flash_attn_func: dict.fromkeys("qkv", NONE) | _TAIL,
    flash_attn_varlen_func: dict.fromkeys([*"qkv", *_SEQLENS], NONE) | _USED | _TAIL,
    flash_attn_qkvpacked_func: {"qkv": NONE} | _SCALE | _FP8 | _MASK | _FIXED | {"num_heads_q": None} | _END,
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_drop_in_signature(function):
    found = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    assert list(found.items()) == list(SIGNATURES[function].items())
    kinds = {p.kind for p in inspect.signature(function).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def qkv(*shape):
    return [torch.randn(*(shape or (2, 6, 4, 8))) for _ in range(3)]


@pytest.mark.parametrize(
    "name, value",
    [
        ("qv", torch.zeros(1)),
        ("attention_chunk", 128),
        ("num_splits", 3),
        ("pack_gqa", True),
    ],
)
def test_not_yet(name, value):
    with pytest.raises(NotImplementedError, match=rf"^{name} is .*; supported: .* is not written yet"):
        flash_attn_func(*qkv(), **{name: value})
    starts = torch.tensor([0, 12], dtype=torch.int32)
    packed = [x.flatten(0, 1) for x in qkv()]
    with pytest.raises(NotImplementedError, match=f"^{name} is"):
        flash_attn_varlen_func(*packed, starts, starts, 12, 12, **{name: value})


def test_arguments_without_effect_have_none():
    q, k, v = qkv()
    plain = flash_attn_func(q, k, v)
    for harmless in ({"num_splits": 0}, {"pack_gqa": False}, {"deterministic": True}, {"sm_margin": 4}):
        assert torch.equal(flash_attn_func(q, k, v, **harmless), plain)


def test_explain_tells_whether_gradients_are_repeatable():
    q, k, v = qkv(12, 4, 8)
    starts = torch.tensor([0, 12], dtype=torch.int32)
    for wanted in (False, True):
        assert tandem_attn.explain(*qkv(), deterministic=wanted).spec.deterministic is wanted
        packed = tandem_attn.explain(q, k, v, starts, starts, 12, 12, deterministic=wanted)
        assert packed.spec.deterministic is wanted
    assert not tandem_attn.explain(*qkv()).spec.deterministic
    with pytest.raises(TypeError, match=r"deterministic is 1 \(int\)"):
        tandem_attn.explain(*qkv(), deterministic=1)


def test_return_attn_probs_adds_lse():
    q, k, v = qkv()
    assert isinstance(flash_attn_func(q, k, v), torch.Tensor)
    out, lse = flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.shape == (2, 6, 4, 8) and lse.shape == (2, 4, 6) and lse.dtype == torch.float32
    scores = q.transpose(1, 2) @ k.transpose(1, 2).mT / 8**0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))  # the natural logarithm
    doubles = [x.double() for x in (q, k, v)]
    assert flash_attn_func(*doubles, return_attn_probs=True)[1].dtype == torch.float64


def test_positional_arguments_land_where_fa3_puts_them():
    q, k, v = qkv()
    by_name = flash_attn_func(q, k, v, softmax_scale=0.3, causal=True, window_size=(2, 0), softcap=1.5)
    assert torch.equal(flash_attn_func(q, k, v, 0.3, True, None, None, None, None, (2, 0), 0, 1.5), by_name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qkvpacked_of_five_dimensions(dtype):
    packed = torch.randn(2, 9, 3, 4, 8, dtype=dtype)
    out, lse = flash_attn_qkvpacked_func(packed, causal=True, softmax_scale=0.2, return_attn_probs=True)
    expected = flash_attn_func(*packed.unbind(2), causal=True, softmax_scale=0.2, return_attn_probs=True)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_qkvpacked_of_four_dimensions_reads_in_place(monkeypatch):
    packed = torch.randn(2, 9, 4 + 2 + 2, 8, requires_grad=True)
    seen = []
    monkeypatch.setattr(
        tandem_attn.api, "flash_attn_func", lambda *a, **k: seen.extend(a) or flash_attn_func(*a, **k)
    )
    out = flash_attn_qkvpacked_func(packed, num_heads_q=4, window_size=(3, 2), softcap=2.0)
    assert {x.untyped_storage().data_ptr() for x in seen} == {packed.untyped_storage().data_ptr()}
    assert [x.shape[2] for x in seen] == [4, 2, 2]
    q, k, v = packed.detach().split([4, 2, 2], 2)
    assert torch.equal(out, flash_attn_func(q, k, v, window_size=(3, 2), softcap=2.0))
    out.sum().backward()
    assert packed.grad.shape == packed.shape and packed.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "shape, heads, error, message",
    [
        ((2, 9, 8, 8), None, ValueError, "num_heads_q is None"),
        ((2, 9, 8, 8), 5, ValueError, "num_heads_q is 5; supported: 8"),
        ((2, 9, 8, 8), 8, ValueError, "num_heads_q is 8"),
        ((2, 9, 8, 8), 0, ValueError, "num_heads_q is 0"),
        ((2, 9, 8, 8), 4.0, TypeError, r"num_heads_q is 4.0 \(float\)"),
        ((2, 9, 8, 8), True, TypeError, r"num_heads_q is True \(bool\)"),
        ((2, 9, 2, 4, 8), None, ValueError, r"qkv is of shape \(2, 9, 2, 4, 8\); supported: .*3"),
        ((9, 8), 4, ValueError, r"qkv is of shape \(9, 8\)"),
        (None, 4, TypeError, "qkv is NoneType"),
    ],
)
def test_qkvpacked_mistakes(shape, heads, error, message):
    packed = None if shape is None else torch.zeros(shape)
    with pytest.raises(error, match=message):
        flash_attn_qkvpacked_func(packed, num_heads_q=heads)


@pytest.mark.parametrize("name", ["q_descale", "k_descale", "v_descale"])
def test_descales_are_for_e4m3(name):
    given = {name: torch.ones(2, 4)}
    message = f"^{name} is given for q of dtype torch.float32; supported: None, or e4m3 tensors"
    starts = torch.tensor([0, 12], dtype=torch.int32)
    packed = [x.flatten(0, 1) for x in qkv()]
    for call in (
        lambda: flash_attn_func(*qkv(), **given),
        lambda: flash_attn_varlen_func(*packed, starts, starts, 12, 12, **given),
        lambda: flash_attn_qkvpacked_func(torch.zeros(1, 4, 3, 2, 8), **given),
        lambda: tandem_attn.explain(*qkv(), **given),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Importing


def python(code: str) -> str:
    environment = {"PYTHONPATH": str(pathlib.Path(tandem_attn.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_CALL = "import torch; q = torch.randn(1, 4, 2, 8); print(tandem_attn.flash_attn_func(q, q, q).shape)"


def test_import_brings_neither_triton_nor_numpy_nor_a_cuda_context():
    out = python(
        "import sys, tandem_attn; assert 'torch' not in sys.modules; from tandem_attn import *; "
        f"{_CALL}; tandem_attn.explain(q, q, q); "
        "assert not [m for m in sys.modules if m.partition('.')[0] == 'triton']; "
        "assert not [m for m in sys.modules if m.startswith(('tandem_attn.kernels', 'tandem_attn.device'))]; "
        "assert not torch.cuda.is_initialized()"
    )
    assert "torch.Size([1, 4, 2, 8])" in out


def test_works_where_triton_cannot_be_imported():
    blocked = "import sys; sys.modules['triton'] = None; import tandem_attn; "
    assert "torch.Size([1, 4, 2, 8])" in python(blocked + _CALL)


def test_drop_in_for_flash_attn_interface():
    assert "torch.Size" in python(
        "import tandem_attn as flash_attn_interface; tandem_attn = flash_attn_interface; " + _CALL
    )


def test_public_names():
    public = {
        "SCALE_BLOCK",
        "Fp8Recipe",
        "Fp8Tensors",
        "PagedKVCache",
        "PoolExhausted",
        "__version__",
        "decode_workspace",
        "explain",
        "explain_with_kvcache",
        "flash_attn_combine",
        "flash_attn_fp8_func",
        "flash_attn_fp8_varlen_func",
        "flash_attn_func",
        "flash_attn_qkvpacked_func",
        "flash_attn_quantized_func",
        "flash_attn_varlen_func",
        "flash_attn_with_kvcache",
        "get_scheduler_metadata",
        "merge_attention_states",
        "quantize_qkv",
    }
    assert set(tandem_attn.__all__) == public and public <= set(dir(tandem_attn))
    with pytest.raises(AttributeError, match="no attribute 'flash_attn'"):
        tandem_attn.flash_attn  # noqa: B018
    for name in public - {"__version__"}:
        assert len(getattr(tandem_attn, name).__doc__) > 100
