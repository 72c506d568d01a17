"""Who answers, why the others do not, and that nothing falls back in silence."""

import dataclasses
import logging
import subprocess
import sys

import pytest
import torch

import tandem_attn
from tandem_attn import arch, dispatch, ops
from tandem_attn.spec import Options, attention_spec


def spec_of(*shape, device="cpu", window=(-1, -1), softcap=0.0, dtype=torch.bfloat16):
    q = torch.zeros(shape or (1, 8, 2, 64), dtype=dtype)
    spec = attention_spec(q, q, q, None, Options(None, *window, softcap, 0, False))
    return dataclasses.replace(spec, device=torch.device(device))


def test_the_fused_kernel_comes_before_the_reference():
    assert dispatch.backend_for(spec_of()).NAME == "torch"
    assert dispatch.backend_for(spec_of(window=(3, 0))).NAME == "reference"
    assert dispatch.backend_for(spec_of(softcap=1.0)).NAME == "reference"


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_an_explicit_choice_is_taken(name, backend):
    assert dispatch.backend_for(spec_of(), name).NAME == name
    backend(name)
    assert dispatch.backend_for(spec_of()).NAME == name
    q = torch.randn(1, 8, 2, 64)
    assert tandem_attn.explain(q, q, q).backend == name


def test_an_explicit_choice_never_falls_back(backend):
    q = torch.randn(1, 8, 2, 64)
    backend("torch")
    with pytest.raises(NotImplementedError, match=r"torch: softcap is 2.0"):
        tandem_attn.flash_attn_func(q, q, q, softcap=2.0)
    backend("gluon")
    with pytest.raises(NotImplementedError, match=r"gluon: tensors are on cpu"):
        tandem_attn.flash_attn_func(q, q, q)


def test_an_unknown_choice_is_named(backend):
    backend("cuda")
    q = torch.randn(1, 8, 2, 64)
    with pytest.raises(ValueError, match=r"TANDEM_BACKEND is 'cuda'; supported: gluon, torch, reference"):
        tandem_attn.flash_attn_func(q, q, q)


def test_the_first_error_of_nobody_lists_everyone(monkeypatch):
    monkeypatch.setattr(dispatch.reference, "reasons", lambda spec: ["out of order"])
    with pytest.raises(NotImplementedError) as caught:
        dispatch.backend_for(spec_of(softcap=1.0))
    for said in ("gluon: tensors are on cpu", "torch: softcap is 1.0", "reference: out of order"):
        assert said in str(caught.value)


def test_explain_names_every_backend_and_reason():
    q = torch.randn(1, 8, 2, 64)
    found = tandem_attn.explain(q, q, q, softcap=3.0, window_size=(2, 1))
    assert found.backend == "reference" and found.spec.softcap == 3.0
    assert set(found.reasons) == {"gluon", "torch"} and len(found.reasons["torch"]) == 2
    text = str(found)
    for said in (
        "dense attention, float32 on cpu",
        "window (2, 1)",
        "answered by reference: blockwise torch",
    ):
        assert said in text
    for reasons in found.reasons.values():
        assert reasons and all(reason in text for reason in reasons)


def test_explain_takes_packed_arguments_as_the_call_does():
    q, starts = torch.randn(8, 2, 16), torch.tensor([0, 3, 8], dtype=torch.int32)
    for found in (
        tandem_attn.explain(q, q, q, starts, starts, 5, 5, causal=True),
        tandem_attn.explain(
            q, q, q, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=5, max_seqlen_k=5
        ),
    ):
        assert found.spec.varlen and found.spec.batch == 2 and found.backend == "torch"
    with pytest.raises(ValueError, match="q is of 2 heads"):
        tandem_attn.explain(torch.randn(1, 4, 2, 8), *(torch.randn(1, 4, 3, 8) for _ in "kv"))
    with pytest.raises(NotImplementedError, match="num_splits is 4"):
        tandem_attn.explain(*(torch.randn(1, 4, 2, 8) for _ in "qkv"), num_splits=4)


def test_explain_tells_preferred_from_unable():
    q = torch.randn(1, 8, 2, 64)
    assert "not by reference: it could, but another comes first" in str(tandem_attn.explain(q, q, q))
    empty = tandem_attn.explain(q[:, :0], q, q)
    assert empty.backend == "empty" and "zeros" in str(empty)


def test_cuda_without_triton_has_a_reason(monkeypatch):
    spec = spec_of(device="cuda:0")
    for name in [
        n for n in sys.modules if n.startswith(("triton", "tandem_attn.kernels", "tandem_attn.device"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delattr(tandem_attn, "kernels", raising=False)
    backend, reasons = dispatch.candidate("gluon", spec)
    assert backend is None and len(reasons) == 1 and "triton cannot be imported" in reasons[0]


def test_gpus_that_are_not_hopper_get_torch(monkeypatch):
    monkeypatch.setattr(arch, "capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    spec = spec_of(device="cuda:0", window=(5, 0))
    assert dispatch.backend_for(spec).NAME == "torch"
    assert (
        "9.0" in " ".join(dispatch.candidate("gluon", spec)[1])
        or "triton" in dispatch.candidate("gluon", spec)[1][0]
    )
    monkeypatch.setattr(arch, "capability", lambda device: (7, 5))
    assert dispatch.backend_for(spec).NAME == "reference"


# Logging


def test_log_once_per_question(monkeypatch, caplog):
    from tandem_attn import log

    monkeypatch.setenv("TANDEM_LOG", "1")
    monkeypatch.setattr(log, "_said", set())
    caplog.set_level(logging.INFO, logger="tandem_attn")
    q = torch.randn(1, 11, 2, 64)
    for _ in range(3):
        tandem_attn.flash_attn_func(q, q, q)
    tandem_attn.flash_attn_func(q, q, q, causal=True)
    lines = [r.message for r in caplog.records if r.name == "tandem_attn"]
    assert len(lines) == 2 and "full" in lines[0] and "causal" in lines[1]
    assert lines[0] == str(tandem_attn.explain(q, q, q))
    ops.clear_plans()
    tandem_attn.flash_attn_func(q, q, q)
    assert len([r for r in caplog.records if r.name == "tandem_attn"]) == 2


def test_no_log_unless_asked(caplog):
    caplog.set_level(logging.DEBUG)
    q = torch.randn(1, 12, 2, 64)
    tandem_attn.flash_attn_func(q, q, q)
    assert not [r for r in caplog.records if r.name.startswith("tandem_attn")]


def test_log_reaches_a_terminal_without_any_set_up():
    code = "import torch, tandem_attn; q = torch.randn(1, 4, 2, 8); tandem_attn.flash_attn_func(q, q, q)"
    environment = {"TANDEM_LOG": "1", "PYTHONPATH": tandem_attn.__path__[0].rpartition("/")[0]}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "answered by torch" in done.stderr and done.stdout == ""
