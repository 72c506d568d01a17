"""Bad input: each has a defined answer, a result or an error that names the argument and the supported."""

import fractions
import itertools
import math

import pytest
import torch

from tandem_attn import flash_attn_func, flash_attn_varlen_func, spec
from tandem_attn.spec import Window


def dense(**changes):
    arguments = {name: torch.randn(2, 8, 4, 16) for name in "qkv"} | changes
    return flash_attn_func(**arguments, return_attn_probs=True)


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def packed(**changes):
    arguments = {name: torch.randn(10, 4, 16) for name in "qkv"}
    arguments |= {f"cu_seqlens_{side}": int32(0, 4, 10) for side in "qk"}
    arguments |= {f"max_seqlen_{side}": 6 for side in "qk"}
    return flash_attn_varlen_func(**(arguments | changes), return_attn_probs=True)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


META = torch.zeros(2, 8, 4, 16, device="meta")
SPARSE = torch.zeros(2, 8, 4, 16).to_sparse()

# (change, error, what the message must say)
DENSE = {
    "q a list": ({"q": [1.0]}, TypeError, r"q is list; supported: a torch.Tensor"),
    "k None": ({"k": None}, TypeError, r"k is NoneType"),
    "v bytes": ({"v": b"1234"}, TypeError, r"v is bytes"),
    "q of rank 3": ({"q": randn(8, 4, 16)}, ValueError, r"q is a tensor of shape \(8, 4, 16\).*4 dimensions"),
    "k of rank 5": ({"k": randn(1, 2, 8, 4, 16)}, ValueError, r"k is a tensor of shape \(1, 2.*4 dimensions"),
    "v of rank 0": ({"v": randn()}, ValueError, r"v is a tensor of shape \(\)"),
    "sparse": ({"k": SPARSE}, ValueError, r"k is .*sparse.*torch.strided"),
    "integers": (
        {"q": torch.zeros(2, 8, 4, 16, dtype=torch.int64)},
        TypeError,
        r"q is of dtype torch.int64.*float16",
    ),
    "complex": (
        {"v": randn(2, 8, 4, 16, dtype=torch.complex64)},
        TypeError,
        r"v is of dtype torch.complex64",
    ),
    "fp8": (
        {"q": randn(2, 8, 4, 16, dtype=torch.float8_e5m2)},
        NotImplementedError,
        r"q is of dtype torch.float8_e5m2; .*in FP8 torch.float8_e4m3fn for q, k and v",
    ),
    "fp8 mix": (
        {"q": randn(2, 8, 4, 16, dtype=torch.float8_e4m3fn)},
        TypeError,
        r"k is of dtype torch.float32; supported: torch.float8_e4m3fn, as one of q, k and v is",
    ),
    "dtype mix": (
        {"k": randn(2, 8, 4, 16, dtype=torch.bfloat16)},
        TypeError,
        r"k is of dtype torch.bfloat16; supported: the dtype of q, torch.float32",
    ),
    "device mix": ({"v": META}, ValueError, r"v is on meta; supported: the device of q, cpu"),
    "batch": ({"k": randn(3, 8, 4, 16)}, ValueError, r"k is of batch size 3; .*2"),
    "keys": (
        {"v": randn(2, 9, 4, 16)},
        ValueError,
        r"v is of shape \(2, 9, 4, 16\); supported: as many keys as k",
    ),
    "heads of v": ({"v": randn(2, 8, 2, 16)}, ValueError, r"v is of 2 heads; supported: the heads of k, 4"),
    "head ratio": (
        {"k": randn(2, 8, 3, 16), "v": randn(2, 8, 3, 16)},
        ValueError,
        r"q is of 4 heads with k of 3; supported: a positive multiple",
    ),
    "more kv heads": ({"q": randn(2, 8, 2, 16)}, ValueError, r"q is of 2 heads with k of 4"),
    "no heads": ({"q": randn(2, 8, 0, 16)}, ValueError, r"q is of 0 heads"),
    "no kv heads": ({"k": randn(2, 8, 0, 16), "v": randn(2, 8, 0, 16)}, ValueError, r"k of 0"),
    "head_dim 0": ({"q": randn(2, 8, 4, 0), "k": randn(2, 8, 4, 0)}, ValueError, r"q is of head_dim 0"),
    "head_dim_v 0": ({"v": randn(2, 8, 4, 0)}, ValueError, r"v is of head_dim 0"),
    "head_dim": (
        {"k": randn(2, 8, 4, 8)},
        ValueError,
        r"k is of head_dim 8; supported: the head_dim of q, 16",
    ),
    "NaN scale": (
        {"softmax_scale": math.nan},
        ValueError,
        r"softmax_scale is nan; supported: a finite number",
    ),
    "infinite scale": ({"softmax_scale": -math.inf}, ValueError, r"softmax_scale is -inf"),
    "scale a string": ({"softmax_scale": "1"}, TypeError, r"softmax_scale is '1' \(str\)"),
    "scale a tensor": (
        {"softmax_scale": torch.tensor(1.0)},
        TypeError,
        r"softmax_scale is tensor.*\(Tensor\)",
    ),
    "scale a bool": ({"softmax_scale": True}, TypeError, r"softmax_scale is True \(bool\)"),
    "softcap negative": ({"softcap": -1.0}, ValueError, r"softcap is -1.0; supported: at least 0"),
    "softcap NaN": ({"softcap": math.nan}, ValueError, r"softcap is nan"),
    "softcap None": ({"softcap": None}, TypeError, r"softcap is None \(NoneType\)"),
    "window too small": (
        {"window_size": (-2, 0)},
        ValueError,
        r"window_size is \(-2, 0\); .*at least 0, or -1",
    ),
    "window right too small": ({"window_size": (0, -7)}, ValueError, r"window_size is \(0, -7\)"),
    "window of three": (
        {"window_size": (1, 2, 3)},
        ValueError,
        r"window_size is \(1, 2, 3\); supported: a pair",
    ),
    "window an int": ({"window_size": 4}, ValueError, r"window_size is 4; supported: a pair"),
    "window None": (
        {"window_size": (None, 0)},
        TypeError,
        r"window_size is None \(NoneType\); supported: int",
    ),
    "window a float": ({"window_size": (2.0, 0)}, TypeError, r"window_size is 2.0 \(float\); supported: int"),
    "window a bool": ({"window_size": (3, True)}, TypeError, r"window_size is True \(bool\)"),
    "window against causal": (
        {"window_size": (4, 2), "causal": True},
        ValueError,
        r"window_size is \(4, 2\); supported: .*causal=True",
    ),
    "softcap a list": ({"softcap": [1.0]}, TypeError, r"softcap is \[1.0\] \(list\)"),
    "scale a list": ({"softmax_scale": [1.0]}, TypeError, r"softmax_scale is \[1.0\] \(list\)"),
    "causal an int": ({"causal": 1}, TypeError, r"causal is 1; supported: True or False"),
    "causal None": ({"causal": None}, TypeError, r"causal is None"),
    "sm_margin negative": ({"sm_margin": -1}, ValueError, r"sm_margin is -1; supported: at least 0"),
    "sm_margin a float": ({"sm_margin": 2.0}, TypeError, r"sm_margin is 2.0 \(float\)"),
    "sm_margin a bool": ({"sm_margin": True}, TypeError, r"sm_margin is True"),
    "deterministic 1": (
        {"deterministic": 1},
        TypeError,
        r"deterministic is 1 \(int\); supported: True or False",
    ),
    "deterministic 0.0": ({"deterministic": 0.0}, TypeError, r"deterministic is 0.0 \(float\)"),
    "deterministic None": ({"deterministic": None}, TypeError, r"deterministic is None \(NoneType\)"),
    "deterministic a list": ({"deterministic": []}, TypeError, r"deterministic is \[\] \(list\)"),
    "deterministic a tensor": (
        {"deterministic": torch.tensor(True)},
        TypeError,
        r"deterministic is tensor\(True\) \(Tensor\)",
    ),
}

LONG = torch.tensor([0, 4, 10])
PACKED = {
    "rank 4": (
        {"q": randn(1, 10, 4, 16)},
        ValueError,
        r"q is a tensor of shape \(1, 10, 4, 16\).*3 dimensions",
    ),
    "keys": ({"v": randn(9, 4, 16)}, ValueError, r"v is of shape \(9, 4, 16\); supported: as many keys as k"),
    "int64": (
        {"cu_seqlens_q": LONG},
        TypeError,
        r"cu_seqlens_q is of dtype torch.int64; supported: torch.int32",
    ),
    "int64 k": ({"cu_seqlens_k": LONG}, TypeError, r"cu_seqlens_k is of dtype torch.int64"),
    "float": ({"cu_seqlens_q": LONG.float()}, TypeError, r"cu_seqlens_q is of dtype torch.float32"),
    "a list": ({"cu_seqlens_q": [0, 4, 10]}, TypeError, r"cu_seqlens_q is list"),
    "None": ({"cu_seqlens_k": None}, TypeError, r"cu_seqlens_k is NoneType"),
    "rank 2": ({"cu_seqlens_q": int32(0, 4, 10)[None]}, ValueError, r"cu_seqlens_q is of shape \(1, 3\)"),
    "rank 0": ({"cu_seqlens_k": int32(0)[0]}, ValueError, r"cu_seqlens_k is of shape \(\)"),
    "strided": (
        {"cu_seqlens_q": int32(0, 9, 4, 9, 10)[::2]},
        ValueError,
        r"cu_seqlens_q is .*strides \(2,\); .*contiguous",
    ),
    "empty": ({"cu_seqlens_q": int32(), "cu_seqlens_k": int32()}, ValueError, r"cu_seqlens_q is empty"),
    "device": (
        {"cu_seqlens_k": int32(0, 4, 10).to("meta")},
        ValueError,
        r"cu_seqlens_k is on meta; supported: the device of q, cpu",
    ),
    "batch": (
        {"cu_seqlens_k": int32(0, 10)},
        ValueError,
        r"cu_seqlens_k is for 1 sequences; .*cu_seqlens_q, 2",
    ),
    "used batch": ({"seqused_k": int32(1, 2, 3)}, ValueError, r"seqused_k is for 3 sequences"),
    "used int64": ({"seqused_q": torch.tensor([1, 2])}, TypeError, r"seqused_q is of dtype torch.int64"),
    "negative": ({"cu_seqlens_q": int32(-1, 4, 10)}, ValueError, r"cu_seqlens_q is starting at -1"),
    "falling": ({"cu_seqlens_k": int32(0, 6, 4)}, ValueError, r"cu_seqlens_k is falling from 6 to 4 at 1"),
    "too long": (
        {"cu_seqlens_q": int32(0, 5, 11)},
        ValueError,
        r"cu_seqlens_q is ending at 11; .*the 10 rows of q",
    ),
    "used too long": ({"seqused_k": int32(4, 7)}, ValueError, r"seqused_k is 7 at 1; supported: 0 to 6"),
    "used negative": ({"seqused_q": int32(-1, 2)}, ValueError, r"seqused_q is -1 at 0"),
    "max too small": (
        {"max_seqlen_q": 5},
        ValueError,
        r"max_seqlen_q is 5; supported: at least 6, the longest",
    ),
    "max of k too small": ({"max_seqlen_k": 0}, ValueError, r"max_seqlen_k is 0; supported: at least 6"),
    "max a tensor": (
        {"max_seqlen_q": torch.tensor(6)},
        TypeError,
        r"max_seqlen_q is tensor\(6\) \(Tensor\); .*int",
    ),
    "max a float": ({"max_seqlen_k": 6.0}, TypeError, r"max_seqlen_k is 6.0 \(float\); supported: int"),
    "max a bool": ({"max_seqlen_k": True}, TypeError, r"max_seqlen_k is True \(bool\)"),
    "max None": ({"max_seqlen_q": None}, TypeError, r"max_seqlen_q is None"),
    "deterministic 1": ({"deterministic": 1}, TypeError, r"deterministic is 1 \(int\); .*True or False"),
    "max negative": ({"max_seqlen_q": -1}, ValueError, r"max_seqlen_q is -1; supported: at least 0"),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_mistakes(name):
    change, error, message = DENSE[name]
    with pytest.raises(error, match=message):
        dense(**change)


@pytest.mark.parametrize("name", DENSE)
def test_dense_mistakes_after_a_good_call(name):
    """A remembered plan must not let through what equals a good argument: 1.0 == 1 == True."""
    dense()
    dense(window_size=(2, 0), sm_margin=2)
    dense(window_size=(3, 1), sm_margin=1, softmax_scale=1.0)
    dense(deterministic=True)
    test_dense_mistakes(name)


@pytest.mark.parametrize("name", DENSE)
def test_dense_mistakes_with_gradients(name):
    change, error, message = DENSE[name]
    with pytest.raises(error, match=message):
        dense(**{"q": torch.randn(2, 8, 4, 16, requires_grad=True), **change})


@pytest.mark.parametrize("name", PACKED)
def test_packed_mistakes(name):
    change, error, message = PACKED[name]
    packed()
    packed(deterministic=True)
    with pytest.raises(error, match=message):
        packed(**change)


@pytest.mark.parametrize("name", PACKED)
def test_packed_mistakes_with_gradients(name):
    change, error, message = PACKED[name]
    with pytest.raises(error, match=message):
        packed(**{"k": torch.randn(10, 4, 16, requires_grad=True), **change})


def test_lengths_are_looked_into_on_every_call():
    """The same question with other numbers: the plan is remembered, the check is not skipped."""
    starts = int32(0, 4, 10)
    packed(cu_seqlens_q=starts)
    starts[1] = 11
    with pytest.raises(ValueError, match="cu_seqlens_q is falling from 11 to 10"):
        packed(cu_seqlens_q=starts)


@pytest.mark.gpu
def test_lengths_on_a_gpu_are_looked_into_on_request(monkeypatch):
    from tandem_attn import ops

    def call():
        q = torch.zeros(10, 4, 64, device="cuda", dtype=torch.bfloat16)
        return flash_attn_varlen_func(q, q, q, int32(0, 4, 9).cuda(), int32(0, 4, 10).cuda(), 5, 5)

    call()
    ops.clear_plans()
    monkeypatch.setenv("TANDEM_VALIDATE", "1")
    with pytest.raises(ValueError, match="max_seqlen_k is 5; supported: at least 6"):
        call()


# Numbers of other kinds that are numbers all the same


def test_fractions_and_lists_are_welcome():
    plain = dense(**dict.fromkeys("qkv", torch.ones(2, 8, 4, 16)), window_size=(2, 1), softmax_scale=0.5)
    given = {"window_size": [2, 1], "softmax_scale": fractions.Fraction(1, 2)}
    other = dense(**dict.fromkeys("qkv", torch.ones(2, 8, 4, 16)), **given)
    assert torch.equal(plain[1], other[1]) and plain[1].unique().numel() > 1


def test_an_integer_scale_and_zero_scale():
    out, lse = dense(softmax_scale=0)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(8)))
    assert out.isfinite().all()
    assert dense(softmax_scale=2)[0].isfinite().all()


def test_packed_may_start_late_and_end_early():
    out, lse = packed(cu_seqlens_q=int32(2, 4, 8), cu_seqlens_k=int32(1, 5, 9))
    assert out[2:8].isfinite().all() and lse[:, 2:8].isfinite().all()


def test_max_seqlen_may_be_generous():
    torch.manual_seed(1)
    a = packed(causal=True)
    torch.manual_seed(1)
    b = packed(causal=True, max_seqlen_q=1000, max_seqlen_k=1000)
    assert torch.equal(a[0], b[0])


# Empty tensors: results, not errors

EMPTY = {
    "batch 0": ((0, 8, 4, 16), (0, 8, 2, 16)),
    "no queries": ((2, 0, 4, 16), (2, 8, 2, 16)),
    "no keys": ((2, 8, 4, 16), (2, 0, 2, 16)),
    "neither": ((2, 0, 4, 16), (2, 0, 2, 16)),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("forced", ["", "reference", "torch"])
def test_empty_dense(name, causal, forced, backend):
    if forced:
        backend(forced)
    q_shape, k_shape = EMPTY[name]
    q, k, v = torch.randn(q_shape), torch.randn(k_shape), torch.randn(*k_shape[:-1], 24)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = flash_attn_func(*leaves, causal=causal, return_attn_probs=True)
    assert out.shape == (*q_shape[:-1], 24) and lse.shape == (q_shape[0], 4, q_shape[1])
    assert torch.count_nonzero(out) == 0 and (lse == -math.inf).all() and lse.dtype == torch.float32
    for x, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == x.shape and torch.count_nonzero(grad) == 0


@pytest.mark.parametrize(
    "total_q, total_k, starts_q, starts_k",
    [
        (0, 0, (0,), (0,)),
        (0, 5, (0, 0), (0, 5)),
        (5, 0, (0, 5), (0, 0)),
        (7, 7, (0, 0, 0), (0, 0, 0)),
        (3, 4, (0,), (0,)),
    ],
)
def test_empty_packed(total_q, total_k, starts_q, starts_k):
    q, k = torch.randn(total_q, 4, 16, requires_grad=True), torch.randn(total_k, 2, 16)
    longest = max(b - a for s in ((0, *starts_q), (0, *starts_k)) for a, b in itertools.pairwise(s))
    arguments = (int32(*starts_q), int32(*starts_k), longest, longest)
    out, lse = flash_attn_varlen_func(q, k, k, *arguments, return_attn_probs=True)
    assert out.shape == (total_q, 4, 16) and lse.shape == (4, total_q)
    assert torch.count_nonzero(out) == 0 and (lse == -math.inf).all()
    assert torch.count_nonzero(torch.autograd.grad(out.sum(), q)[0]) == 0


# The types themselves


def test_window_names_its_kinds():
    assert str(Window()) == "full" and Window().full and not Window().causal
    assert str(Window(-1, 0)) == "causal" and Window(-1, 0).causal
    assert str(Window(3, 0)) == "window (3, 0)" and not Window(3, 0).causal


@pytest.mark.parametrize(
    "causal, size, expected",
    [
        (False, (-1, -1), (-1, -1)),
        (True, (-1, -1), (-1, 0)),
        (True, (5, -1), (5, 0)),
        (True, (5, 0), (5, 0)),
        (False, (5, 7), (5, 7)),
        (False, (-1, 0), (-1, 0)),
    ],
)
def test_causal_and_window_become_one(causal, size, expected):
    assert spec.window_sides(causal, size) == expected


def test_reduced_windows_hide_the_same_keys():
    from tandem_attn.testing.budget import explicit_mask

    reduced = 0
    for seqlen_q in range(1, 5):
        for seqlen_k in range(1, 5):
            for left in range(-1, 6):
                for right in range(-1, 6):
                    window = Window(left, right).reduced(seqlen_q, seqlen_k)
                    reduced += window != Window(left, right)
                    rows = torch.arange(seqlen_q)
                    a = explicit_mask(rows, seqlen_q, seqlen_k, (left, right))
                    assert torch.equal(
                        a, explicit_mask(rows, seqlen_q, seqlen_k, (window.left, window.right))
                    )
    assert reduced > 100
    assert Window(-1, 0).reduced(1, 50).full, "one query under a causal mask sees everything"


def test_a_spec_is_hashable_and_says_what_was_asked():
    q, k, v = torch.randn(2, 8, 4, 16), torch.randn(2, 5, 2, 16), torch.randn(2, 5, 2, 24)
    options = spec.Options(None, -1, 0, 0.0, 0, False)
    found = spec.attention_spec(q, k, v, None, options)
    assert hash(found) == hash(spec.attention_spec(q.clone(), k, v, None, options))
    assert (found.batch, found.seqlen_q, found.seqlen_k, found.total_q, found.total_k) == (2, 8, 5, 16, 10)
    assert (found.num_heads, found.num_kv_heads, found.group_size) == (4, 2, 2)
    assert (found.head_dim, found.head_dim_v, found.softmax_scale) == (16, 24, 0.25)
    assert found.causal and found.aligned and not found.varlen and not found.is_empty
    assert found.out_shape == (2, 8, 4, 24) and found.lse_shape == (2, 4, 8)
    shifted = torch.empty(2 * 8 * 4 * 16 + 1)[1:].view(2, 8, 4, 16)
    assert not spec.attention_spec(shifted, k, v, None, options).aligned
    repeatable = spec.attention_spec(q, k, v, None, options._replace(deterministic=True))
    assert repeatable.deterministic and not found.deterministic and repeatable != found
