"""Gradients of FP8 attention: straight through, by the 16-bit backward, from what FP8 answered."""

import dataclasses

import pytest
import torch
from fp8_cases import (
    SMALL,
    attend_fp8,
    attend_wide,
    flat_lengths,
    flat_options,
    inputs_of,
    leaves,
    with_leaves,
)
from gpu_cases import BF16, FP16, assert_same_bits, dense, name
from torch.autograd import forward_ad

from tandem_attn import (
    Fp8Recipe,
    dispatch,
    flash_attn_fp8_func,
    flash_attn_func,
    flash_attn_quantized_func,
    quantize_qkv,
)
from tandem_attn.spec import E4M3, AttentionSpec
from tandem_attn.testing import Case, Inputs

F32 = torch.float32


def cotangents(case: Case, inputs: Inputs, out: torch.Tensor, lse: torch.Tensor) -> tuple:
    """Random gradients of out and lse, 0 in rows that hold nothing defined or see no key."""
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    if case.varlen:
        undeclared = torch.ones(out.shape[0], dtype=torch.bool)
        for rows, _ in inputs.slices:
            undeclared[rows] = False
        dout[undeclared], dlse[:, undeclared] = 0.0, 0.0
    return dout, dlse.masked_fill(lse.isneginf(), 0.0)


@pytest.mark.parametrize("which", ["out", "lse", "both"])
@pytest.mark.parametrize("case", SMALL, ids=name)
def test_gradients_are_straight_through(case, which):
    """To the bit those of the 16-bit backward, told FP8's out and lse."""
    inputs = with_leaves(inputs_of(case))
    out, lse = attend_fp8(case, inputs)
    dout, dlse = cotangents(case, inputs, out, lse)
    outputs, given = {"out": ([out], [dout]), "lse": ([lse], [dlse])}.get(which, ([out, lse], [dout, dlse]))
    found = torch.autograd.grad(outputs, leaves(inputs), given)
    tensors = [x.detach() for x in (out, lse, inputs.q, inputs.k, inputs.v)]
    wanted = torch.ops.tandem_attn.backward(
        torch.zeros_like(dout) if which == "lse" else dout,
        None if which == "out" else dlse,
        *tensors, *flat_lengths(inputs), *flat_options(case),
    )  # fmt: skip
    for a, b, x in zip(found, wanted, leaves(inputs), strict=True):
        assert torch.equal(a, b) and a.dtype == x.dtype
        assert torch.count_nonzero(a) > 0 or (which == "lse" and x is inputs.v)


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_gradients_are_near_those_of_16_bits(case):
    """No nearer than 10%: out is 4.5% off, and so is every probability that the backward makes of 16-bit
    scores and of FP8's lse, which belongs to others."""
    inputs = inputs_of(case)
    fp8, wide = (
        with_leaves(inputs),
        with_leaves(dataclasses.replace(inputs, q=inputs.q.float(), k=inputs.k.float(), v=inputs.v.float())),
    )
    out, lse = attend_fp8(case, fp8)
    dout, dlse = cotangents(case, inputs, out, lse)
    found = torch.autograd.grad([out, lse], leaves(fp8), [dout, dlse])
    wanted = torch.autograd.grad(attend_wide(case, wide), leaves(wide), [dout.float(), dlse])
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.1


def test_gradients_with_a_large_mean_of_k():
    """Smoothing leaves lse as true as without one: the backward's probabilities still add up to 1."""
    case = dense((70, 150), (64, 64), (4, 2), dtype=F32)
    inputs = inputs_of(case)
    inputs.k.add_(5 * torch.randn(2, 64))
    fp8, wide = with_leaves(inputs), with_leaves(inputs)
    dout = torch.randn(1, 70, 4, 64)
    found = torch.autograd.grad(attend_fp8(case, fp8)[0], leaves(fp8), dout)
    wanted = torch.autograd.grad(attend_wide(case, wide)[0], leaves(wide), dout)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    # dq = ds K: what is wrong with ds no longer adds up to 0 over the keys, and K's mean multiplies that
    assert errors[1] < 0.1 and errors[2] < 0.1
    assert errors[0] < 1.0


@pytest.mark.parametrize("case", [SMALL[0], SMALL[4]], ids=name)
def test_deterministic_arrives(case, monkeypatch):
    asked, decide = [], dispatch.backend_for
    monkeypatch.setattr(dispatch, "backend_for", lambda spec, *_: asked.append(spec) or decide(spec))
    for deterministic in (False, True):
        inputs = with_leaves(inputs_of(case))
        inputs.kwargs["deterministic"] = deterministic
        out, _ = attend_fp8(case, inputs)
        torch.autograd.grad(out.sum(), leaves(inputs))
    of_gradients = [spec.deterministic for spec in asked if isinstance(spec, AttentionSpec)]
    assert of_gradients == [False, True]


def test_double_backward_is_refused_by_name():
    q, k, v = (torch.randn(1, 4, 2, 32, requires_grad=True) for _ in range(3))
    (grad,) = torch.autograd.grad(flash_attn_fp8_func(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward: .*tandem_attn::backward"):
        grad.sum().backward()


def test_gradients_of_some_inputs_only():
    q, k, v = (torch.randn(1, 4, 2, 32) for _ in range(3))
    k.requires_grad_()
    flash_attn_fp8_func(q, k, v).sum().backward()
    assert q.grad is None and v.grad is None and torch.count_nonzero(k.grad) > 0


def test_quantized_tensors_have_no_gradient():
    q = torch.randn(1, 4, 2, 32, requires_grad=True)
    x = quantize_qkv(q, q, q, Fp8Recipe(smooth_v=True))
    made = (x.q, x.k, x.v_t, x.q_descale, x.k_mean, x.v_mean, x.lse_shift)
    assert not any(t.requires_grad for t in made)
    assert not flash_attn_quantized_func(x).requires_grad
    assert flash_attn_fp8_func(q, q, q).requires_grad
    with torch.no_grad():
        assert not flash_attn_fp8_func(q, q, q).requires_grad
    assert not flash_attn_fp8_func(q.detach(), q.detach(), q.detach()).requires_grad


def test_gradients_have_no_say_in_the_answer():
    for case in (SMALL[0], SMALL[5]):
        inputs = inputs_of(case)
        plain, recorded = attend_fp8(case, inputs), attend_fp8(case, with_leaves(inputs))
        assert_same_bits(case, inputs, plain, recorded)
        assert all(x.requires_grad for x in recorded) and not any(x.requires_grad for x in plain)


def test_forward_mode_is_refused_not_dropped():
    q = torch.randn(1, 4, 2, 32)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
            flash_attn_fp8_func(q, q, dual)


def test_activation_checkpointing():
    tensors = [torch.randn(1, 9, 2, 32, requires_grad=True) for _ in range(3)]
    expected = torch.autograd.grad(flash_attn_fp8_func(*tensors).sum(), tensors)
    out = torch.utils.checkpoint.checkpoint(flash_attn_fp8_func, *tensors, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(out.sum(), tensors), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast(dtype):
    """As in `flash_attn_func`: computed from numbers of its type, gradients in those of the leaves."""
    tensors = [torch.randn(1, 9, 2, 32, requires_grad=True) for _ in range(3)]
    with torch.autocast("cpu", dtype=dtype):
        out = flash_attn_fp8_func(*tensors)
        x = quantize_qkv(*tensors)
        e4m3 = [t.detach().to(E4M3) for t in tensors]
        assert flash_attn_func(*e4m3).dtype == BF16, "e4m3 stays"
    assert out.dtype == x.dtype == flash_attn_quantized_func(x).dtype == dtype
    assert torch.equal(flash_attn_quantized_func(x), out)
    out.float().sum().backward()
    assert all(t.grad.dtype == F32 for t in tensors)
