"""What the launches of a backward call pass to which kernels: no GPU needed."""

import dataclasses

import pytest
import torch
from test_backward_config import CAUSAL, FULL, question

from tandem_attn.kernels import backward_rows, launch_backward
from tandem_attn.kernels.config_backward import backward_configs
from tandem_attn.kernels.launch_backward import CLEARERS, BackwardPlan
from tandem_attn.spec import Window
from tandem_attn.testing.compile_backward import options_of, type_of
from tandem_attn.testing.shipped_backward import Variant


@pytest.fixture
def launched(monkeypatch):
    """A function from a spec to the launches of a call on tensors of this machine: (kernel, grid, arguments
    by name, options)."""
    launches = []

    def launch(plan, key, kernel, grid, stream, tensors, rest, maps=None, **options):
        described, make = maps or ((), tuple)
        arguments = (*make(), *tensors, *rest)
        assert len(make()) == len(described)
        launches.append((kernel, grid, dict(zip(kernel.arg_names, arguments, strict=True)), options))

    monkeypatch.setattr(launch_backward.BackwardPlan, "_launch", launch)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)

    def call(spec, dlse=False, same_lengths=False, used=False):
        launches.clear()
        rows, keys = (
            ((spec.total_q,), (spec.total_k,))
            if spec.varlen
            else ((spec.batch, spec.seqlen_q), (spec.batch, spec.seqlen_k))
        )
        q = torch.zeros(*rows, spec.num_heads, spec.head_dim, dtype=spec.dtype)
        k = torch.zeros(*keys, spec.num_kv_heads, spec.head_dim, dtype=spec.dtype)
        v = torch.zeros(*keys, spec.num_kv_heads, spec.head_dim_v, dtype=spec.dtype)
        out, lse = torch.zeros(spec.out_shape, dtype=spec.dtype), torch.zeros(spec.lse_shape)
        pointers = [torch.zeros(spec.batch + 1, dtype=torch.int32) for _ in range(2)]
        pointers = [pointers[0], pointers[0]] if same_lengths else pointers
        counts = [torch.zeros(spec.batch, dtype=torch.int32) if used else None for _ in range(2)]
        lengths = (*pointers, *counts) if spec.varlen else ()
        plan = BackwardPlan(spec)
        grads = plan(out, lse if dlse else None, q, k, v, out, lse, *lengths)
        assert [g.shape for g in grads] == [x.shape for x in (q, k, v)]
        assert all(g.is_contiguous() and g.dtype == spec.dtype for g in grads)
        return list(launches)

    return call


CALLS = [
    (dict(head_dim=64), dict()),
    (dict(head_dim=128, window=CAUSAL, seqlen_q=200, seqlen_k=130), dict(dlse=True)),
    (dict(head_dim=80, varlen=True, window=CAUSAL, dtype=torch.float16), dict(used=True)),
    (dict(head_dim=128, varlen=True, num_kv_heads=2, deterministic=True), dict(same_lengths=True)),
    (dict(head_dim=192, head_dim_v=128, window=Window(30, 0), softcap=20.0), dict()),
    (dict(head_dim=256, varlen=True, num_kv_heads=4), dict(used=True, dlse=True)),
]
IDS = [" ".join(f"{k}={v}" for k, v in asked.items()) for asked, _ in CALLS]


@pytest.mark.parametrize("asked, how", CALLS, ids=IDS)
def test_launches_of_a_call(launched, asked, how):
    spec = question(**{**dict(seqlen_q=200, batch=2, num_heads=8), **asked})
    names = [kernel.__name__ for kernel, *_ in launched(spec, **how)]
    wide = max(spec.head_dim, spec.head_dim_v) > 128
    few = ["sum_parts"] if BackwardPlan(spec).parts > 1 else []
    middle = (
        ["key_gradients", *few, "query_gradient"] if wide else ["attention_backward", *few, "finish_rows"]
    )
    assert names == ["prepare_rows", *middle, *["clear_padding"] * (3 if spec.varlen else 0)]


@pytest.mark.parametrize("asked, how", CALLS, ids=IDS)
def test_launches_pass_what_the_compile_tests_compile(launched, asked, how):
    """Every argument of the type that testing/compile_backward.py says, with the same options."""
    spec = question(**{**dict(seqlen_q=200, batch=2, num_heads=8), **asked})
    by_keys, _ = backward_configs(spec)
    for kernel, _grid, arguments, options in launched(spec, **how):
        of_rows = kernel.__name__ if hasattr(backward_rows, kernel.__name__) else ""
        config = arguments.get("config", by_keys)
        given = tuple(
            n
            for n in ("clean_ptr", "dlse_ptr", "seqused_q", "seqused_k", "seqused")
            if arguments.get(n) is not None
        )
        variant = Variant(config, given, of_rows)
        assert options == options_of(variant)
        for name, value in arguments.items():
            assert spelled(value) == type_of(name, variant), f"{kernel.__name__}: {name}"
        for parameter in kernel.params:
            if isinstance(arguments[parameter.name], int):
                assert parameter.do_not_specialize, f"{parameter.name} makes another kernel"


def spelled(value) -> str:
    """The type of an argument as Triton spells it."""
    elements = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
    if isinstance(value, torch.Tensor):
        return f"*{elements[value.dtype]}"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    if hasattr(value, "block_shape"):
        box = ", ".join(map(str, value.block_shape))
        return f"tensordesc<{elements[value.base.dtype]}[{box}],{value.layout!r}>"
    return "constexpr"


@pytest.mark.parametrize("asked, how", CALLS, ids=IDS)
def test_numbers_of_a_call(launched, asked, how):
    """What kernels are told about the question, by name."""
    spec = question(**{**dict(seqlen_q=200, batch=2, num_heads=8), **asked})
    plan = BackwardPlan(spec)
    lengths = (spec.total_q, spec.total_k) if spec.varlen else (spec.seqlen_q, spec.seqlen_k)
    common = dict(batch=spec.batch, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads)
    common |= dict(num_parts=spec.num_kv_heads * plan.parts, parts=plan.parts)
    common |= dict(heads=spec.group_size // plan.parts, seqlen_q=lengths[0], seqlen_k=lengths[1])
    common |= dict(padded_rows=plan.padded_rows, delta_start=plan.stat_rows, row_blocks=plan.row_blocks)
    for kernel, grid, arguments, _ in launched(spec, **how):
        known = {name: common[name] for name in arguments if name in common}
        assert {name: arguments[name] for name in known} == known, kernel.__name__
        columns = {"prepare_rows": spec.head_dim_v, "finish_rows": spec.head_dim}.get(kernel.__name__, 0)
        if kernel.__name__ == "clear_padding":
            assert grid == (spec.batch + 1, CLEARERS, 1)
            heads, dim = arguments["ptr"].shape[1:]
            assert (arguments["total"], arguments["columns"] * 8) == (len(arguments["ptr"]), heads * dim)
        elif kernel.__name__ == "sum_parts":
            assert arguments["rows"] == spec.total_k * spec.num_kv_heads <= grid[0] * 32
            assert (arguments["columns"] * 8, arguments["columns_v"] * 8) == (spec.head_dim, spec.head_dim_v)
        elif columns:
            assert grid == plan.row_grid and arguments["columns"] * 8 == columns
        else:
            assert grid[0] >= 1 and grid[1:] == (1, 1)
            assert (arguments["scale_log2"], arguments["inner_scale"]) == plan.scales
            window = Window(arguments["window_left"], arguments["window_right"])
            assert window == Window(
                *(side if side >= 0 else 2**30 for side in dataclasses.astuple(spec.window))
            )


def test_copies_of_gradients_for_rows_that_see_nothing(launched):
    """dO is cleaned where such rows may be, and then it is the copy that the other kernels read."""
    for window, cleaned in ((CAUSAL, True), (FULL, False)):
        spec = question(64, seqlen_q=300, seqlen_k=200, window=window)
        prepare, by_keys, _finish = launched(spec)
        clean, dout = prepare[2]["clean_ptr"], prepare[2]["dout_ptr"]
        assert (clean is not None) is cleaned
        assert by_keys[2]["do_desc"].base is (clean if cleaned else dout)


def test_gradients_that_tma_cannot_read_are_copied():
    """Expanded (as from sum().backward()), transposed, and misaligned; others stay where they are."""
    x = torch.zeros(2, 30, 4, 64, dtype=torch.bfloat16)
    assert launch_backward._readable(x) is x
    rows = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert launch_backward._readable(rows) is rows
    same = torch.zeros((), dtype=torch.bfloat16).expand(2, 30, 4, 64)
    same_rows = torch.zeros(64, dtype=torch.bfloat16).expand(2, 30, 4, 64)
    columns = torch.zeros(2, 30, 64, 4, dtype=torch.bfloat16).transpose(2, 3)
    shifted = torch.zeros(x.numel() + 1, dtype=torch.bfloat16)[1:].view(x.shape)
    odd = torch.zeros(2, 30, 4, 68, dtype=torch.bfloat16)[..., :64]
    for y in (same, same_rows, columns, shifted, odd):
        copy = launch_backward._readable(y)
        assert copy is not y and copy.is_contiguous() and torch.equal(copy, y)
