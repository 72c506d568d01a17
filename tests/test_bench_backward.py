"""`bench backward` and `bench train`: what is counted, checked, compared and written."""

import csv
import dataclasses
import importlib.util
import math
import pathlib

import pytest
import torch

import tandem_attn
from tandem_attn import cli
from tandem_attn.bench import (
    backward,
    cases,
    environment,
    gradient_providers,
    measure,
    peers,
    report,
    tflops,
    train,
)
from tandem_attn.bench.gradient_check import NAMES, GradientOracle
from tandem_attn.bench.providers import OURS, OURS_DETERMINISTIC
from tandem_attn.testing import Case

ROOT = pathlib.Path(__file__).parents[1]
CPU = torch.device("cpu")
QUICK = ["--repeats", "1", "--idle-ms", "0"]
BENCHMARKS = {"backward": backward.BACKWARD, "train": train.TRAIN}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The same on every machine, and no more launches than one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure, "WARM_UP", 0)


def case_named(name: str) -> cases.BenchCase:
    (found,) = [one for make in cases.GRADIENT_GROUPS.values() for one in make() if one.id == name]
    return found


def oracle_of(case: Case) -> GradientOracle:
    return GradientOracle(case, cases.differentiable(case, cases.inputs(case, CPU)))


def gradients(oracle: GradientOracle, **changed) -> tuple[torch.Tensor, ...]:
    """Ours, of the oracle's question or another."""
    inputs = oracle.inputs
    name = "flash_attn_varlen_func" if oracle.case.varlen else "flash_attn_func"
    out = getattr(tandem_attn, name)(*inputs.leaves, **inputs.kwargs | changed)
    return torch.autograd.grad(out, inputs.leaves, inputs.dout)


def run(tmp_path, name: str, *arguments: str) -> tuple[int, dict]:
    path = tmp_path / "out.json"
    status = cli.main(["bench", name, *QUICK, "--json", str(path), *arguments])
    return status, report.load(path)


# Cases and operations


def test_groups_are_the_forwards_with_fewer_grouped_heads():
    assert set(cases.GRADIENT_GROUPS) == set(cases.GROUPS)
    for group in set(cases.GROUPS) - {"gqa"}:
        assert cases.GRADIENT_GROUPS[group]() == cases.GROUPS[group]()
    names = [one.id for one in cases.GRADIENT_GROUPS["gqa"]()]
    assert names == ["gqa-full-s2048", "gqa-full-s8192", "gqa-causal-s2048", "gqa-causal-s8192"]
    assert {one.recorded_key for one in cases.GRADIENT_GROUPS["grid"]()} == set(peers.recorded_backward())


def test_inputs_are_differentiable_and_the_forwards():
    case = case_named("smoke-mla").case
    plain, given = cases.inputs(case, CPU), cases.differentiable(case, cases.inputs(case, CPU))
    assert all(torch.equal(a, b) for a, b in zip(given.leaves, (plain.q, plain.k, plain.v), strict=True))
    assert all(leaf.requires_grad for leaf in given.leaves)
    assert given.dout.shape == (1, 128, 2, 64)
    assert not torch.equal(given.dout, given.v), "seeds differ"


# The check

SMOKE = [one.id for one in cases.GROUPS["smoke"]()]
OTHERS = {
    "float16": Case(seqlen_q=300, seqlen_k=300, heads=4, kv_heads=2, causal=True, dtype=torch.float16),
    "float32": Case(seqlen_q=200, seqlen_k=200, causal=True, dtype=torch.float32),
    "softcap": Case(softcap=5.0),
    "other lengths": Case(seqlen_q=100, seqlen_k=250, causal=True),
    "rows without keys": Case(seqlen_q=250, seqlen_k=100, causal=True),
    "one key": Case(seqlen_q=5, seqlen_k=1),
    "very short": Case(lengths_q=(1, 2, 3, 129, 1), lengths_k=(1, 2, 3, 129, 1), causal=True),
}


@pytest.mark.parametrize("name", [*SMOKE, *OTHERS])
def test_right_gradients_pass(name, backend):
    oracle = oracle_of(OTHERS[name] if name in OTHERS else case_named(name).case)
    for who in (None, "reference"):
        if who:
            backend(who)
        assert oracle.what_is_wrong(*gradients(oracle)) == ""


@pytest.mark.parametrize("name", ["smoke-gqa", "smoke-varlen"])
def test_the_exact_gradients_are_those_of_the_reference(name, backend):
    backend("reference")
    case = case_named(name).case
    oracle = oracle_of(case)
    double = dataclasses.replace(oracle.inputs)
    for field in ("q", "k", "v", "dout"):
        setattr(double, field, getattr(double, field).detach().double().requires_grad_(field != "dout"))
    found = gradients(GradientOracle(dataclasses.replace(case, dtype=torch.float64), double))
    for a, b in zip(found, oracle.exact, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name, changed",
    [
        ("smoke-d64-causal", dict(causal=False)),
        ("smoke-varlen", dict(causal=False)),
        ("smoke-window", dict(window_size=(63, 0))),
        ("smoke-d64-full", dict(softmax_scale=0.12)),
    ],
)
def test_gradients_of_other_questions_fail(name, changed):
    oracle = oracle_of(case_named(name).case)
    assert oracle.what_is_wrong(*gradients(oracle, **changed))


@pytest.mark.parametrize("name", ["smoke-gqa", "smoke-varlen"])
@pytest.mark.parametrize("which", range(3), ids=NAMES)
def test_damaged_gradients_fail(name, which):
    oracle = oracle_of(case_named(name).case)
    right = gradients(oracle)

    def said(damage) -> str:
        grads = [damage(x) if i == which else x for i, x in enumerate(right)]
        return oracle.what_is_wrong(*grads)

    assert said(lambda x: x) == ""
    damages = {
        "a factor": lambda x: x * 1.03,
        "rows moved by one": lambda x: x.roll(1, -3),
        "nothing": torch.zeros_like,
        "one row of one head wrong": lambda x: x.index_fill(-3, torch.tensor([30]), 0.0),
        "NaN": lambda x: x.index_fill(-1, torch.tensor([3]), math.nan),
    }
    for what, damage in damages.items():
        assert said(damage).startswith(NAMES[which]), what
    assert "shape" in said(lambda x: x[..., :-1])
    assert "float32" in said(lambda x: x.float())


def test_a_few_wrong_rows_do_not_hide_among_many():
    """Within 1% in the norm over everything."""
    oracle = oracle_of(Case(batch=2, seqlen_q=512, seqlen_k=512, heads=2, kv_heads=2))
    dq, dk, dv = gradients(oracle)
    dq[1, 300:303, 1] *= 1.2
    assert float((dq - oracle.exact[0]).norm() / oracle.exact[0].norm()) < 0.01
    assert "dq of head 1, rows 768 on" in oracle.what_is_wrong(dq, dk, dv)


# The run


@pytest.mark.parametrize("name", BENCHMARKS)
def test_smoke_end_to_end(name, tmp_path, capsys):
    table = tmp_path / "out.csv"
    status, document = run(tmp_path, name, "--group", "smoke", "--csv", str(table))
    assert status == 0
    assert (document["kind"], document["complete"]) == (name, True)
    assert document["settings"] == {"repeats": 1, "idle_ms": 0.0, "checked": True}
    assert [record["id"] for record in document["cases"]] == SMOKE
    assert document["providers"]["sdpa-cudnn"] == "needs a CUDA device"
    assert document["providers"]["cudnn-frontend"] == "needs a CUDA device"
    for record in document["cases"]:
        factor = {"backward": 2.5, "train": 3.5}[name]
        assert record["flops"] == factor * case_named(record["id"]).flops
        assert record["config"] and record["question"]["dtype"] == "bfloat16"
        assert record["recorded"] == {}
        for provider in (OURS, OURS_DETERMINISTIC):
            result = record["results"][provider]
            assert result["tflops"] == pytest.approx(record["flops"] / result["median_us"] / 1e6)
        assert record["deterministic"]["ratio"] == pytest.approx(
            result["tflops"] / record["results"][OURS]["tflops"]
        )
    by_id = {record["id"]: record for record in document["cases"]}
    assert by_id["smoke-gqa"]["best_live"]["name"] == "sdpa", "ourselves are no peer"
    assert "packed" in by_id["smoke-varlen"]["results"]["sdpa"]["reason"]
    assert by_id["smoke-varlen"]["best"] is None
    assert by_id["smoke-window"]["results"]["sdpa"]["same_question"] is False
    means = document["summary"]["smoke"]
    assert (means["cases"], means["best"]["cases"], means["deterministic"]["cases"]) == (6, 4, 6)
    assert means["best"]["lowest_case"] in SMOKE
    printed = capsys.readouterr().out
    assert f"smoke: {name} TFLOPS" in printed
    assert "deterministic / not" in printed
    assert "4 cases, lowest" in printed
    assert f"smoke: {OURS_DETERMINISTIC} is " in printed
    with table.open(newline="") as file:
        rows = {(row["case"], row["provider"]) for row in csv.DictReader(file)}
    assert ("smoke-gqa", OURS_DETERMINISTIC) in rows


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_wrong_gradient_has_no_number_and_fails_the_run(name, tmp_path, monkeypatch, capsys):
    right = tandem_attn.flash_attn_func

    def wrong(q, k, v, **kwargs):
        """The value is right, the gradient of k is not."""
        return right(q, k * 0.9 + k.detach() * 0.1, v, **kwargs)

    monkeypatch.setattr(tandem_attn, "flash_attn_func", wrong)
    status, document = run(tmp_path, name, "--case", "smoke-d64-full")
    assert status == 1
    (record,) = document["cases"]
    for provider in (OURS, OURS_DETERMINISTIC):
        assert record["results"][provider]["wrong"].startswith("dk of head ")
        assert not {"tflops", "median_us"} & set(record["results"][provider])
    assert "tflops" in record["results"]["sdpa"]
    assert record["best_live"]["ratio"] is None
    assert record["deterministic"] is None
    assert f"WRONG: {OURS}, smoke-d64-full: dk of head" in capsys.readouterr().out
    status, document = run(tmp_path, name, "--case", "smoke-d64-full", "--no-check")
    assert status == 0


def test_a_deterministic_variant_that_is_not_fails(tmp_path, monkeypatch):
    right, calls = tandem_attn.flash_attn_func, []

    class Trembling(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            calls.append(grad)
            grad = grad.clone()
            grad[0, 0, 0, 0] *= 1.0 + 0.01 * len(calls)
            return grad

    def shaky(q, k, v, **kwargs):
        return right(Trembling.apply(q), k, v, **kwargs)

    monkeypatch.setattr(tandem_attn, "flash_attn_func", shaky)
    status, document = run(tmp_path, "backward", "--case", "smoke-d64-full")
    results = document["cases"][0]["results"]
    assert status == 1
    assert "tflops" in results[OURS]
    assert "dq of two runs differ in 1 elements" in results[OURS_DETERMINISTIC]["reason"]


@pytest.mark.parametrize("culprit", [OURS, "sdpa"])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_failing_provider_is_reported_and_the_others_go_on(tmp_path, monkeypatch, culprit, when):
    owner, function = tandem_attn, "flash_attn_func"
    if culprit == "sdpa":
        owner, function = torch.nn.functional, "scaled_dot_product_attention"
    right = getattr(owner, function)

    def fails(*args, **kwargs):
        raise RuntimeError("out of luck")

    def fails_later(*args, **kwargs):
        out = right(*args, **kwargs)
        (out[0] if isinstance(out, tuple) else out).register_hook(fails)
        return out

    monkeypatch.setattr(owner, function, fails if when == "forward" else fails_later)
    status, document = run(tmp_path, "backward", "--case", "smoke-d64-full")
    results = document["cases"][0]["results"]
    broken = {OURS, OURS_DETERMINISTIC} if culprit == OURS else {"sdpa"}
    assert {name for name, result in results.items() if "out of luck" in result.get("reason", "")} == broken
    assert all("tflops" in result for name, result in results.items() if name not in broken)
    assert status == (1 if culprit == OURS else 0)


def test_what_is_timed(monkeypatch):
    """The backward alone, of one forward; or a fresh forward each time."""
    right, forwards = tandem_attn.flash_attn_func, []

    def counted(*args, **kwargs):
        forwards.append(kwargs)
        return right(*args, **kwargs)

    monkeypatch.setattr(tandem_attn, "flash_attn_func", counted)
    case = case_named("smoke-d64-full").case
    inputs = cases.differentiable(case, cases.inputs(case, CPU))
    for among, expected in ((gradient_providers.BACKWARD, 1), (gradient_providers.TRAIN, 3)):
        for name in (OURS, OURS_DETERMINISTIC):
            forwards.clear()
            (provider,) = [one for one in among if one.name == name]
            call = provider.prepare(case, inputs)
            for _ in range(3):
                shapes = [x.shape for x in call.run()]
                assert shapes == [x.shape for x in inputs.leaves]
            assert len(forwards) == expected
            assert forwards[0].get("deterministic", False) == (name == OURS_DETERMINISTIC)
    assert all(leaf.grad is None for leaf in inputs.leaves), "nothing piles up"


@pytest.mark.parametrize("name", ["sdpa-cudnn", "sdpa-flash", "torch-varlen"])
def test_torch_operators_are_differentiable(name):
    """On meta tensors: shapes come out where there are any; the kernels need a GPU."""
    (provider,) = [one for one in gradient_providers.BACKWARD if one.name == name]
    case = case_named("smoke-window" if name == "sdpa-flash" else "smoke-varlen").case
    inputs = cases.differentiable(case, cases.inputs(case, CPU))
    for field in ("q", "k", "v", "dout"):
        old = getattr(inputs, field)
        setattr(inputs, field, torch.empty_like(old, device="meta").requires_grad_(old.requires_grad))
    inputs.kwargs |= {key: x.to("meta") for key, x in inputs.kwargs.items() if isinstance(x, torch.Tensor)}
    if name == "sdpa-cudnn":  # binding comes before the complaint about Meta
        with pytest.raises(NotImplementedError, match="with Meta tensors"):
            provider.prepare(case, inputs)
        return
    assert [x.shape for x in provider.prepare(case, inputs).run()] == [x.shape for x in inputs.leaves]


def test_mistakes_are_one_line(capsys):
    assert cli.main(["bench", "backward", "--group", "nope"]) == 2
    assert cli.main(["bench", "train", "--providers", "nope"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "--group is 'nope'; supported: grid" in first
    assert f"supported: {OURS}, {OURS_DETERMINISTIC}, sdpa-cudnn" in second


# Peers and tables


def a_document(name: str, groups: list[str], **results: dict) -> dict:
    """A run on an H200 in which every case has these results."""
    benchmark = BENCHMARKS[name]
    document = report.new_document(name, environment.stamp(CPU), {"repeats": 1})
    document["environment"] |= {"gpu": {"name": "NVIDIA H200"}, "date": "2026-12-01T00:00:00+00:00"}
    document |= {"recorded_where": peers.recorded_where(), "providers": dict.fromkeys(results, "")}
    for one in cases.select(groups, None, CPU, benchmark.groups):
        record = {"group": one.group, "id": one.id, "question": tflops.question(one)}
        record |= {"config": "", "results": dict(results)}
        stamp = document["environment"]
        document["cases"].append(peers.compare(record, one, stamp, benchmark.recorded()))
    document |= {"summary": benchmark.summary(document["cases"]), "complete": True}
    return document


def timed(tflops: float) -> dict:
    times = {"median_us": 10.0, "fastest_us": 9.0, "slowest_us": 12.0}
    return {"tflops": tflops, "label": "", "same_question": True} | times


OF_OURS = {OURS: timed(400.0), OURS_DETERMINISTIC: timed(300.0)}


def test_recorded_peers_of_the_backward_are_joined():
    document = a_document("backward", ["grid"], **OF_OURS)
    by_id = {record["id"]: record for record in document["cases"]}
    one = by_id["d64-full-s512"]
    assert one["recorded"] == {"fa2": 209.0, "cudnn": 274.9, "fa4": 339.4, "fa3": 330.6}
    assert one["best_live"] is None
    assert one["best"] == {"name": "fa4 (recorded)", "tflops": 339.4, "ratio": pytest.approx(400 / 339.4)}
    assert one["deterministic"] == {"ratio": 0.75}
    means = document["summary"]["grid"]
    assert (means["best"]["cases"], means["best_live"]["cases"]) == (36, 0)
    assert means["best"]["lowest"] == min(record["best"]["ratio"] for record in document["cases"])
    assert means["best"]["lowest_case"] == "d128-full-s16384"
    assert means["deterministic"]["ratio"] == pytest.approx(0.75)
    assert all(not record["recorded"] for record in a_document("train", ["grid"], **OF_OURS)["cases"])


@pytest.fixture
def readme_tables():
    """tools/readme_tables.py is a script, not part of the package."""
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "tools" / "readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_of_the_readme(tmp_path, readme_tables):
    report.save(a_document("backward", ["grid"], **OF_OURS), tmp_path / "a.json")
    report.save(a_document("train", ["window"], **OF_OURS, sdpa=timed(200.0)), tmp_path / "b.json")
    grid = readme_tables.table("backward-grid", tmp_path)
    assert "| 64 | full | **400** / 339 fa4\\* = 1.18 |" in grid
    assert "the backward pass alone, 2.5 times the forward's operations" in grid
    assert "over 36 cases, lowest 0.639 (d128-full-s16384)." in grid
    assert f"Geometric mean of {OURS_DETERMINISTIC} / {OURS}: **0.750** over 36 cases" in grid
    window = readme_tables.table("train-window", tmp_path)
    assert f"| case | {OURS} | {OURS_DETERMINISTIC} | sdpa | {OURS} / best peer |" in window
    assert "| window1024-d64-s16384 | 400 | 300 | 200 | 2.00 |" in window
    assert "forward and backward together" in window
    for missing in ("forward-grid", "train-grid"):
        with pytest.raises(readme_tables.NoResult):
            readme_tables.table(missing, tmp_path)
    with pytest.raises(readme_tables.TableError, match="backward-GROUP, train-GROUP, decode-GROUP"):
        readme_tables.table("backward", tmp_path)
