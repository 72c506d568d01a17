"""Benchmarks: what is counted, what is refused, what is written. Numbers themselves are not tested."""

import dataclasses
import itertools
import math
import pathlib
import sys
import types

import pytest
import torch

import tandem_attn
from tandem_attn import cli
from tandem_attn.bench import (
    UserError,
    cases,
    check,
    measure,
    overhead,
    peers,
    providers,
    report,
    tflops,
)
from tandem_attn.testing import Case, low_precision
from tandem_attn.testing.budget import explicit_mask

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QUICK = ["--repeats", "1", "--idle-ms", "0"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The same on every machine: what is tested here are numbers' surroundings, not numbers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def case_named(name: str) -> cases.BenchCase:
    (found,) = [one for make in cases.GROUPS.values() for one in make() if one.id == name]
    return found


# Operations


@pytest.mark.parametrize("rows, keys", [(1, 1), (5, 5), (7, 3), (3, 9), (16, 16)])
def test_visible_pairs_are_those_of_the_mask(rows, keys):
    for window in itertools.product((-1, 0, 1, 4, 20), repeat=2):
        mask = explicit_mask(torch.arange(rows), rows, keys, window)
        assert cases.visible_pairs(rows, keys, *window) == int(mask.sum()), window


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=3, seqlen_q=10, seqlen_k=14, heads=4, kv_heads=2, head_dim=8),
        Case(seqlen_q=10, seqlen_k=10, head_dim=24, head_dim_v=16),
        Case(seqlen_q=12, seqlen_k=12, causal=True, window=(3, 0)),
        Case(seqlen_q=12, seqlen_k=15, window=(2, 1)),
        Case(lengths_q=(3, 9, 1), lengths_k=(4, 9, 7)),
    ],
    ids=lambda case: case.id,
)
def test_flops_are_two_products_over_all_visible_pairs(case):
    total = 0
    for rows, keys in zip(case.rows, case.keys, strict=True):
        pairs = int(explicit_mask(torch.arange(rows), rows, keys, case.bounds).sum())
        scores, output = 2 * pairs * case.head_dim, 2 * pairs * case.dim_v
        total += case.heads * (scores + output)
    assert cases.flops(case) == total


def test_causal_flops_are_half_of_full():
    full = Case(batch=2, seqlen_q=64, seqlen_k=64, heads=3, kv_heads=3, head_dim=16)
    assert 2 * cases.flops(dataclasses.replace(full, causal=True)) == cases.flops(full)
    packed = Case(lengths_q=(5, 8), lengths_k=(5, 8))
    assert 2 * cases.flops(dataclasses.replace(packed, causal=True)) == cases.flops(packed)


def test_flops_of_a_published_cell():
    assert case_named("d128-full-s16384").flops == 4 * 1 * 16 * 16384**2 * 128


# Cases


def test_the_grid_is_the_recorded_one():
    grid = cases.GROUPS["grid"]()
    assert len(grid) == 36
    for one in grid:
        assert one.case.batch * one.case.seqlen_q == 16384
        assert one.case.heads * one.case.head_dim == 2048
    assert {one.recorded_key for one in grid} == set(peers.recorded_forward())
    one = case_named("d64-causal-s512")
    assert one.recorded_key == "d64_c1_s512"
    assert (one.case.head_dim, one.case.causal, one.case.seqlen_k) == (64, True, 512)


def test_packed_lengths_sum_and_never_change():
    lengths = cases.GROUPS["varlen"]()[0].case.lengths_q
    assert len(lengths) == 32
    assert sum(lengths) == 65536
    assert lengths[:4] == (2805, 2517, 1397, 860), "numbers of different lengths cannot be compared"


def test_names_are_unique_and_found():
    every = [one.id for make in cases.GROUPS.values() for one in make()]
    assert len(set(every)) == len(every)
    assert [one.id for one in cases.select(["grid"], "d64-full-s512", CPU)] == ["d64-full-s512"]
    assert {one.group for one in cases.select(None, None, CPU)} == {"smoke"}
    assert {one.group for one in cases.select(None, None, CUDA)} == set(cases.GROUPS) - {"smoke"}


@pytest.mark.parametrize("one", cases.GROUPS["smoke"](), ids=lambda one: one.id)
def test_inputs_are_what_the_case_says(one):
    inputs = cases.inputs(one.case, CPU)
    assert inputs.q.shape[-2:] == (one.case.heads, one.case.head_dim)
    assert inputs.v.shape[-2:] == (one.case.kv_heads, one.case.dim_v)
    shapes = [(len(q), len(k)) for q, k, _ in inputs.sequences()]
    assert shapes == list(zip(one.case.rows, one.case.keys, strict=True))
    if one.case.varlen:
        assert inputs.kwargs["cu_seqlens_q"].tolist()[-1] == len(inputs.q)


# The check


SMOKE = [one.id for one in cases.GROUPS["smoke"]()]


def oracle_of(name: str) -> check.Oracle:
    case = case_named(name).case
    return check.Oracle(case, cases.inputs(case, CPU))


def ours(oracle: check.Oracle, **changed):
    name = "flash_attn_varlen_func" if oracle.case.varlen else "flash_attn_func"
    inputs = oracle.inputs
    arguments = inputs.kwargs | changed | {"return_attn_probs": True}
    return getattr(tandem_attn, name)(inputs.q, inputs.k, inputs.v, **arguments)


@pytest.mark.parametrize("name", SMOKE)
def test_right_results_pass(name):
    oracle = oracle_of(name)
    assert oracle.what_is_wrong(*ours(oracle)) == ""
    assert oracle.what_is_wrong(*low_precision(oracle.case, oracle.inputs)) == ""


FAULTS = {
    "no mask": ("smoke-d64-causal", dict(causal=False)),
    "no mask, packed": ("smoke-varlen", dict(causal=False)),
    "a window one key short": ("smoke-window", dict(window_size=(63, 0))),
    "another scale": ("smoke-d64-full", dict(softmax_scale=0.12)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_answers_to_other_questions_fail(fault):
    name, changed = FAULTS[fault]
    oracle = oracle_of(name)
    assert oracle.what_is_wrong(*ours(oracle, **changed))


@pytest.mark.parametrize("name", ["smoke-gqa", "smoke-varlen"])
def test_damaged_results_fail(name):
    oracle = oracle_of(name)
    out, lse = ours(oracle)
    assert "lse" in oracle.what_is_wrong(out, lse * math.log2(math.e))
    assert oracle.what_is_wrong(out.flip(-2), lse), "heads in another order"
    assert "NaN" in oracle.what_is_wrong(out.index_fill(-1, torch.tensor([3]), math.nan), lse)
    assert oracle.what_is_wrong(out.roll(1, -3), lse), "rows moved by one"
    assert "shape" in oracle.what_is_wrong(out[..., :-1], lse)
    assert "float32" in oracle.what_is_wrong(out.float(), lse)
    assert oracle.what_is_wrong(out, None) == "", "without lse the output alone counts"


def test_two_swapped_values_among_many_keys_fail():
    """The output of a long row is small, and so is this error: the usual rounding band would hide it."""
    case = Case(seqlen_q=128, seqlen_k=8192, heads=1, kv_heads=1)
    inputs = cases.inputs(case, CPU)
    oracle = check.Oracle(case, inputs)
    out, lse = ours(oracle)
    assert oracle.what_is_wrong(out, lse) == ""
    inputs.v = torch.cat([inputs.v[:, 1:2], inputs.v[:, :1], inputs.v[:, 2:]], dim=1)
    assert "out of" in oracle.what_is_wrong(ours(oracle)[0], lse)


def test_first_and_last_rows_are_sampled():
    oracle = oracle_of("smoke-window")
    rows = {(sample.rows.start, sample.rows.stop) for sample in oracle.samples}
    assert {(0, 128), (128, 256)} <= rows
    assert {sample.head for sample in oracle.samples} == {0, 1}
    varlen = oracle_of("smoke-varlen")
    shortest = min(range(4), key=lambda i: varlen.case.rows[i])
    assert {0, 3, shortest} <= {sample.sequence for sample in varlen.samples}


# The run


def run_forward(tmp_path, *arguments: str) -> tuple[int, dict]:
    path = tmp_path / "out.json"
    status = cli.main(["bench", "forward", *QUICK, "--json", str(path), *arguments])
    return status, report.load(path)


def test_a_wrong_result_has_no_number_and_fails_the_run(tmp_path, monkeypatch, capsys):
    right = tandem_attn.flash_attn_func

    def wrong(*args, **kwargs):
        return right(*args, **kwargs | {"causal": False})

    monkeypatch.setattr(tandem_attn, "flash_attn_func", wrong)
    status, document = run_forward(tmp_path, "--case", "smoke-d64")
    assert status == 1
    full, causal = (record["results"] for record in document["cases"])
    assert "tflops" in full["tandem"]
    assert "wrong" in causal["tandem"]
    assert not {"tflops", "median_us"} & set(causal["tandem"])
    assert "tflops" in causal["sdpa"]
    assert document["cases"][1]["best_live"]["ratio"] is None
    assert document["summary"]["smoke"]["best_live"]["cases"] == 1
    printed = capsys.readouterr().out
    assert "WRONG: tandem, smoke-d64-causal: out of sequence 0" in printed
    status, document = run_forward(tmp_path, "--case", "smoke-d64", "--no-check")
    assert status == 0
    assert document["settings"]["checked"] is False


@pytest.mark.parametrize("culprit", ["tandem", "sdpa"])
def test_a_failing_provider_is_reported_and_the_others_go_on(tmp_path, monkeypatch, culprit):
    def fails(*args, **kwargs):
        raise RuntimeError("out of luck")

    if culprit == "tandem":
        monkeypatch.setattr(tandem_attn, "flash_attn_func", fails)
    else:
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fails)
    status, document = run_forward(tmp_path, "--case", "smoke-d64-full")
    results = document["cases"][0]["results"]
    assert "out of luck" in results.pop(culprit)["reason"]
    assert all("tflops" in result for result in results.values())
    assert status == (1 if culprit == "tandem" else 0)


def test_a_case_that_does_not_fit_is_reported(tmp_path, monkeypatch):
    def no_memory(case, device, seed=0):
        raise torch.OutOfMemoryError("tried to allocate everything")

    monkeypatch.setattr(cases, "inputs", no_memory)
    status, document = run_forward(tmp_path, "--case", "smoke-d64-full")
    assert status == 1
    assert all("allocate" in x["reason"] for x in document["cases"][0]["results"].values())


def test_an_interrupted_run_leaves_what_it_measured(tmp_path, monkeypatch):
    real, done = tflops.measure_case, []

    def interrupted(one, *rest):
        if done:
            raise KeyboardInterrupt
        done.append(one)
        return real(one, *rest)

    monkeypatch.setattr(tflops, "measure_case", interrupted)
    status, document = run_forward(tmp_path)
    assert status == 130
    assert document["complete"] is False
    assert len(document["cases"]) == 1


def test_python_without_asserts_checks_nothing_and_says_so(monkeypatch, capsys):
    source = pathlib.Path(check.__file__)
    optimised: dict = {"__name__": check.__name__}
    exec(compile(source.read_text(), source, "exec", optimize=1), optimised)  # as python -O reads it
    with pytest.raises(UserError, match="--no-check"):
        optimised["require_asserts"]()
    check.require_asserts()
    monkeypatch.setattr(check, "require_asserts", optimised["require_asserts"])
    assert cli.main(["bench", "forward", *QUICK, "--case", "smoke-d64-full"]) == 2
    assert "python -O" in capsys.readouterr().err


# Peers


def a_record(ratio_to: dict[str, float]) -> dict:
    results = {name: {"tflops": x, "median_us": 1.0} for name, x in ratio_to.items()}
    return {"group": "grid", "id": "x", "results": results}


def test_recorded_peers_count_on_their_own_card_only():
    one = case_named("d64-full-s512")
    recorded = peers.recorded_forward()["d64_c0_s512"]
    record = a_record({"tandem": 400.0, "sdpa-cudnn": 390.0})
    elsewhere = peers.compare(record, one, {"gpu": {"name": "NVIDIA H100 80GB HBM3"}})
    assert elsewhere["best"]["name"] == elsewhere["best_live"]["name"] == "sdpa-cudnn"
    assert elsewhere["best"]["ratio"] == pytest.approx(400 / 390)
    there = peers.compare(record, one, {"gpu": {"name": "NVIDIA H200"}})
    assert there["best"]["name"] == "cudnn (recorded)"
    assert there["best"]["ratio"] == pytest.approx(400 / recorded["cudnn"])
    assert there["best_live"]["name"] == "sdpa-cudnn"
    assert there["recorded"] == recorded


def test_a_peer_that_answers_another_question_is_no_rival():
    record = a_record({"tandem": 10.0, "sdpa": 5.0})
    record["results"]["sdpa-cudnn"] = {"median_us": 1.0, "same_question": False, "label": "no window"}
    found = peers.compare(record, case_named("smoke-window"), {"gpu": None})
    assert found["best_live"]["name"] == "sdpa"


def test_means_are_geometric_and_by_group():
    records = [
        {"group": group, "best_live": {"ratio": ratio}, "best": None}
        for group, ratio in (("a", 0.5), ("a", 2.0), ("a", None), ("b", 3.0))
    ]
    found = peers.summary(records)
    assert found["a"] == {
        "cases": 3,
        "best_live": {"cases": 2, "ratio": pytest.approx(1.0)},
        "best": {"cases": 0, "ratio": None},
    }
    assert found["b"]["best_live"]["ratio"] == pytest.approx(3.0)


# Providers


def test_ourselves_under_another_name_is_no_peer(monkeypatch):
    disguise = types.ModuleType("flash_attn_interface")
    disguise.flash_attn_func = tandem_attn.flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", disguise)
    (fa3,) = [p for p in providers.PROVIDERS if p.name == "fa3"]
    assert "tandem_attn" in fa3.absent(CUDA)
    disguise.flash_attn_func = lambda q, k, v: q
    assert fa3.absent(CUDA) == ""
    assert fa3.absent(CPU)


@pytest.mark.parametrize(
    "name, module, unlimited", [("fa3", "flash_attn_interface", -1), ("fa4", "fa4", None)]
)
@pytest.mark.parametrize("case_name", ["smoke-gqa", "smoke-varlen", "smoke-window"])
def test_flash_attention_is_asked_our_question(monkeypatch, name, module, unlimited, case_name):
    """Stand-ins with the signatures of versions 3 and 4, the latter returning (out, lse)."""
    library = types.ModuleType(module)

    def dense(q, k, v, softmax_scale=None, causal=False, window_size=None, softcap=0.0):
        window = tuple(-1 if side is unlimited else side for side in window_size)
        arguments = dict(softmax_scale=softmax_scale, causal=causal, window_size=window, softcap=softcap)
        return tandem_attn.flash_attn_func(q, k, v, **arguments, return_attn_probs=name == "fa4")

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=None, causal=False, window_size=None):
        most = int(cu_seqlens_q.diff().max())
        packed = (cu_seqlens_q, cu_seqlens_k, most, most)
        return tandem_attn.flash_attn_varlen_func(
            q, k, v, *packed, softmax_scale=softmax_scale, causal=causal
        )

    library.flash_attn_func, library.flash_attn_varlen_func = dense, varlen
    monkeypatch.setitem(sys.modules, module, library)
    oracle = oracle_of(case_name)
    call = providers._flash(module, unlimited, oracle.case, oracle.inputs)
    assert oracle.what_is_wrong(*call.answer()) == ""


@pytest.mark.parametrize("name", ["sdpa-cudnn", "sdpa-flash", "torch-varlen"])
def test_torch_operators_take_what_we_give_them(name):
    """On meta tensors: the schemas bind, and shapes come out where there are any; the kernels need a GPU."""
    (provider,) = [p for p in providers.PROVIDERS if p.name == name]
    case = case_named("smoke-window" if name == "sdpa-flash" else "smoke-varlen").case
    inputs = cases.inputs(case, CPU)
    for field in ("q", "k", "v"):
        setattr(inputs, field, getattr(inputs, field).to("meta"))
    inputs.kwargs |= {key: x.to("meta") for key, x in inputs.kwargs.items() if isinstance(x, torch.Tensor)}
    if name == "sdpa-cudnn":  # binding comes before the complaint about Meta
        with pytest.raises(NotImplementedError, match="with Meta tensors"):
            provider.prepare(case, inputs)
        return
    out, _ = provider.prepare(case, inputs).answer()
    assert tuple(out.shape) == (*inputs.q.shape[:-1], case.dim_v)


def test_sdpa_answers_and_says_where_it_cannot():
    (sdpa,) = [p for p in providers.PROVIDERS if p.name == "sdpa"]
    oracle = oracle_of("smoke-gqa")
    assert oracle.what_is_wrong(*sdpa.prepare(oracle.case, oracle.inputs).answer()) == ""
    oracle = oracle_of("smoke-window")
    call = sdpa.prepare(oracle.case, oracle.inputs)
    assert not call.same_question
    assert "no window" in call.label
    packed = case_named("smoke-varlen").case
    with pytest.raises(NotImplementedError, match="packed"):
        sdpa.prepare(packed, cases.inputs(packed, CPU))


def test_providers_are_chosen_by_name():
    present, absent = providers.select(["sdpa", "fa3", "tandem"], CPU)
    assert [p.name for p in present] == ["sdpa", "tandem"]
    assert "CUDA" in absent["fa3"]
    with pytest.raises(UserError, match="none of these"):
        providers.select(["fa3"], CPU)


# Timing


def test_wall_time_is_a_median_after_warm_up(monkeypatch):
    calls = []
    clock = itertools.count()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: [0, 5, 0, 9, 0, 7][next(clock) % 6])
    timing = measure.time_call(lambda: calls.append(1), CPU, repeats=3, idle_ms=0)
    assert len(calls) == 3 + measure.WARM_UP
    assert timing == measure.Timing(7, 5, 9, 3)


def test_launches_are_queued_behind_a_sleep(monkeypatch):
    """The order of what is put on the stream, on a pretended GPU."""
    stream = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(stream)
            stream.append("event")

        def elapsed_time(self, end):
            """Milliseconds: 3 for a launch, and half of one for the sleep that tells the clock."""
            between = stream[self.at + 1 : end.at]
            assert len(between) == 1
            return 3.0 if between == ["launch"] else 0.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: stream.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: stream.append("sleep"))
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: stream.append(f"idle {seconds}"))
    timing = measure.time_call(lambda: stream.append("launch"), CUDA, repeats=2, idle_ms=50)
    timed = ["event", "launch", "event"] * 2
    assert stream[stream.index("idle 0.05") :] == [
        "idle 0.05",
        "sleep",
        *timed,
        "event",
        "sleep",
        "event",
        "wait",
    ]
    assert stream[stream.index("idle 0.05") - 1] == "wait"
    assert timing == measure.Timing(3e-3, 3e-3, 3e-3, 2, pytest.approx(2000.0))


def test_overhead_is_reported_for_every_entry(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overhead, "CPU_CALLS", 2)
    path = tmp_path / "out.json"
    assert cli.main(["bench", "overhead", "--rounds", "2", "--json", str(path)]) == 0
    document = report.load(path)
    names = [one["id"] for one in document["cases"]]
    assert names == ["tandem dense", "tandem varlen", "tandem qkvpacked", "sdpa"]
    for one in document["cases"]:
        assert 0 < one["fastest_us"] <= one["median_us"] <= one["slowest_us"] <= 10e6
    assert "computation" in capsys.readouterr().out


def test_overhead_of_a_function_that_fails(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(overhead, "CPU_CALLS", 2)
    monkeypatch.setattr(tandem_attn, "flash_attn_qkvpacked_func", fails)
    path = tmp_path / "out.json"
    assert cli.main(["bench", "overhead", "--rounds", "1", "--json", str(path)]) == 1
    by_name = {one["id"]: one for one in report.load(path)["cases"]}
    assert "out of luck" in by_name["tandem qkvpacked"]["reason"]
    assert "median_us" in by_name["sdpa"]
