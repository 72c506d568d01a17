"""Benchmark of FP8: what is counted, what is refused as wrong, what accuracy must hold."""

import argparse
import dataclasses
import functools
import json

import pytest
import torch

import tandem_attn
from tandem_attn import cli
from tandem_attn.bench import (
    cases,
    fp8,
    fp8_accuracy,
    fp8_cases,
    fp8_check,
    fp8_quantize,
    fp8_report,
    fp8_speed,
    options,
    peers,
    report,
)
from tandem_attn.bench.options import Settings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QUICK = ["--repeats", "1", "--idle-ms", "0"]
SETTINGS = Settings(repeats=1, idle_ms=0.0)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The same on every machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def case_named(name: str):
    (found,) = [one for make in fp8_cases.GROUPS.values() for one in make() if one.id == name]
    return found


def run_fp8(tmp_path, *arguments: str) -> tuple[int, dict]:
    path = tmp_path / "out.json"
    status = cli.main(["bench", "fp8", *QUICK, "--json", str(path), *arguments])
    return status, report.load(path)


# Cases


def test_the_grid_is_that_of_the_forward_and_of_the_recorded_figures():
    grid = fp8_cases.GROUPS["grid"]()
    assert grid == cases.GROUPS["grid"]()
    assert len(grid) == 36
    assert {one.recorded_key for one in grid} == set(peers.recorded_fp8())
    assert all("fa3" in known for known in peers.recorded_fp8().values())


def test_names_are_unique_and_a_cpu_gets_the_tiny_ones():
    every = [one.id for make in fp8_cases.GROUPS.values() for one in make()]
    assert len(set(every)) == len(every)
    assert {one.group for one in cases.select(None, None, CPU, fp8_cases.GROUPS)} == {"smoke"}
    chosen = cases.select(None, None, CUDA, fp8_cases.GROUPS)
    assert {one.group for one in chosen} == set(fp8_cases.GROUPS) - {"smoke"}
    kinds = {type(one) for one in chosen}
    assert {type(one) for one in fp8_cases.GROUPS["smoke"]()} == kinds, "the tiny ones are of every kind"


def test_quantization_is_of_256_mb():
    for one in fp8_cases.GROUPS["quantize"]():
        case = one.case
        rows = case.batch * case.seqlen_k
        assert one.recipe is not None or case.kv_heads * case.head_dim * rows == 2**28
        if one.recipe is not None:
            size = 2 * rows * case.head_dim * (case.heads + 2 * case.kv_heads)
            assert size == pytest.approx(2**28, rel=0.01)
    shapes = {
        (one.case.heads, one.case.kv_heads, one.case.head_dim) for one in fp8_cases.GROUPS["quantize"]()
    }
    assert shapes == {(32, 32, 64), (16, 16, 128), (8, 8, 256), (32, 8, 128)}


def test_the_table_of_recipes_has_the_shape_that_the_plot_names():
    for one in fp8_cases.GROUPS["recipes"]():
        assert (one.case.head_dim, one.case.seqlen_q, one.case.seqlen_k) == (128, 8192, 8192)
        assert not one.case.causal
        assert one.case.batch * one.case.seqlen_q == cases.GRID_TOKENS
    assert fp8_cases.ROWS["fp8-full"].recipe == tandem_attn.Fp8Recipe()
    baseline = fp8_cases.ROWS["fp8-per-tensor"].recipe
    assert baseline == tandem_attn.Fp8Recipe(rotate=False, smooth_k=False, granularity="tensor")
    assert fp8_cases.ROWS["fp8-v-mean-off"].recipe.smooth_v


# The check


SPEED = fp8_cases.SMOKE_SPEED


@functools.cache
def made(name: str) -> tuple:
    """Inputs of a case, and by provider what is right."""
    case = case_named(name).case
    inputs = fp8_speed.make_inputs(case, CPU)
    return case, inputs, fp8_speed.oracles(case, inputs)


def answer_of(provider: str, name: str):
    case, inputs, _ = made(name)
    return fp8_speed.BY_NAME[provider].prepare(case, inputs).answer()


@pytest.mark.parametrize("provider", [*fp8_speed.FP8, fp8_speed.BF16])
@pytest.mark.parametrize("name", SPEED)
def test_right_results_pass(provider, name):
    assert made(name)[2][provider].what_is_wrong(*answer_of(provider, name)) == ""


@pytest.mark.parametrize("name", SPEED)
@pytest.mark.parametrize("bits, passes", [(3, True), (1, False)])
def test_the_check_allows_for_probabilities_in_e4m3_and_no_coarser(name, bits, passes):
    case, inputs, right = made(name)
    out = with_rounded_probabilities(case, inputs, bits)
    assert (right["tandem"].what_is_wrong(out, None) == "") is passes


def with_rounded_probabilities(case, inputs, bits: int) -> torch.Tensor:
    """Attention over the FP8 tensors that rounds P to so many bits of mantissa; e4m3 has 3."""
    q, k, v = (x.transpose(1, 2) for x in inputs.tensors.dequantized())
    k, v = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * inputs.scale
    if case.causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    half = 1 << (22 - bits)
    rounded = ((p.view(torch.int32) + half) & -2 * half).view(torch.float32)
    out = rounded @ v / p.sum(-1, keepdim=True)
    return out.transpose(1, 2).to(case.dtype)


FAULTS = {
    "another scale": dict(softmax_scale=0.12),
    "no mask": dict(causal=False),
    "a window": dict(window_size=(100, 0)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_answers_to_other_questions_fail(fault):
    _, inputs, right = made("smoke-d64-causal")
    arguments = inputs.kwargs | FAULTS[fault] | {"return_attn_probs": True}
    result = tandem_attn.flash_attn_quantized_func(inputs.tensors, **arguments)
    assert right["tandem"].what_is_wrong(*result)


def test_damaged_results_fail():
    out, lse = answer_of("tandem", "smoke-gqa")
    oracle = made("smoke-gqa")[2]["tandem"]
    assert oracle.what_is_wrong(out, lse) == ""
    assert "row" in oracle.what_is_wrong(out.index_fill(1, torch.tensor([5]), 0.0), None), "one row"
    assert oracle.what_is_wrong(out.flip(2), lse), "heads in another order"
    assert oracle.what_is_wrong(out.roll(1, 1), lse), "rows moved by one"
    assert oracle.what_is_wrong(out * 1.06, lse), "a factor"
    assert oracle.what_is_wrong(out.index_fill(-1, torch.tensor([3]), torch.nan), lse)
    assert "lse" in oracle.what_is_wrong(out, lse + 0.02)
    assert "lse" in oracle.what_is_wrong(out, lse * torch.nan)
    assert "shape" in oracle.what_is_wrong(out[..., :-1], lse)
    assert "float32" in oracle.what_is_wrong(out.float(), lse)


def test_another_factor_of_a_head_fails():
    _, inputs, right = made("smoke-gqa")
    tensors = dataclasses.replace(inputs.tensors, v_descale=inputs.tensors.v_descale * 1.06)
    assert right["tandem"].what_is_wrong(tandem_attn.flash_attn_quantized_func(tensors), None)


def test_plain_inputs_have_a_factor_for_each_kv_head():
    _, inputs, _ = made("smoke-gqa")
    (q, k, v), descales = inputs.plain
    assert {x.dtype for x in (q, k, v)} == {torch.float8_e4m3fn}
    assert all(x.is_contiguous() for x in (q, k, v))
    assert [tuple(x.shape) for x in descales] == [(1, 1)] * 3
    for x, found in zip((inputs.q, inputs.k, inputs.v), inputs.plain_dequantized(), strict=True):
        assert fp8_check.rms(found - x) < 0.03 * fp8_check.rms(x)


# Quantization


def test_bytes_are_those_in_memory_and_wrong_numbers_have_no_figure(monkeypatch):
    one = case_named("smoke-quantize-whole")
    record = fp8_quantize.measure_case(one, CPU, SETTINGS, copy=100.0)
    rows, heads, kv_heads, dim = 256, 4, 2, 64
    values = rows * dim * (heads + 2 * kv_heads)
    factors = 4 * (rows // 64 * heads + 2 * (rows // 128) * kv_heads)
    correction, mean = 4 * rows * heads, 4 * kv_heads * dim
    assert record["bytes"] == 3 * values + factors + correction + mean
    result = record["results"]["tandem"]
    assert result["gb_per_s"] == pytest.approx(record["bytes"] / result["median_us"] / 1e3)
    assert result["of_copy"] == pytest.approx(result["gb_per_s"] / 100.0)
    right = tandem_attn.quantize_qkv

    def wrong(q, k, v, recipe):
        return right(q, k, v * 1.06, recipe)

    monkeypatch.setattr(tandem_attn, "quantize_qkv", wrong)
    record = fp8_quantize.measure_case(one, CPU, SETTINGS, copy=100.0)
    assert set(record["results"]["tandem"]) == {"wrong"}
    assert record["results"]["tandem"]["wrong"].startswith("v: ")


def test_expanded_factors_are_counted_once():
    q = torch.randn(1, 512, 2, 64)
    block, tensor = (
        fp8_quantize.nbytes(tandem_attn.quantize_qkv(q, q, q, tandem_attn.Fp8Recipe(False, False, kind)))
        for kind in ("block", "tensor")
    )
    assert 3 * q.numel() <= tensor < block


def test_a_transposition_is_checked_key_by_key():
    v = torch.randn(2, 130, 3, 16).to(torch.float8_e4m3fn)
    v_t = torch.ops.tandem_attn.transpose_v(v, None, None)
    assert fp8_quantize.what_is_wrong((v,), v_t) == ""
    moved = v_t.view(torch.uint8).roll(1, -1).view(torch.float8_e4m3fn)
    assert "are wrong" in fp8_quantize.what_is_wrong((v,), moved)
    assert "shape" in fp8_quantize.what_is_wrong((v,), v_t[..., :128])


# Accuracy


@functools.cache
def row_error(row: str, inputs: str = "outliers") -> float:
    """RMSE of a row of the table at the size of the smoke test."""
    record = fp8_accuracy.measure_recipe(case_named(f"smoke-{inputs}-{row}"), CPU, SETTINGS)
    return record["results"]["error"]["rmse"]


@pytest.mark.parametrize(
    "better, worse",
    [
        ("fp16", "bf16"),
        ("fp16", "fp16-standard"),
        ("bf16", "fp8-full"),
        ("fp8-full", "fp8-per-tensor"),
        ("fp8-paper", "fp8-per-tensor"),
        ("fp8-paper", "fp8-no-rotation"),
        ("fp8-no-rotation", "fp8-per-tensor"),
    ],
)
def test_what_is_done_for_accuracy_helps(better, worse):
    assert row_error(better) < row_error(worse)


def test_means_cost_the_papers_recipe_accuracy_and_the_smoothed_ones_none():
    around = functools.partial(row_error, inputs="means")
    assert around("fp8-paper") > 1.5 * row_error("fp8-paper")
    assert around("fp8-full") < 0.8 * around("fp8-paper"), "K's mean is off"
    assert around("fp8-v-mean-off") < around("fp8-full"), "V's, too"
    assert around("fp8-v-mean-off") == pytest.approx(row_error("fp8-v-mean-off"), rel=0.05)


def test_means_are_of_channels_of_k_and_v():
    one = case_named("smoke-means-fp16")
    (plain, _), (moved, _) = (
        fp8_accuracy.outliers(one.case, CPU, means) for means in (fp8_cases.NO_MEANS, one.means)
    )
    for a, b, deviation in zip(plain, moved, (0.0, one.means.k, one.means.v), strict=True):
        apart = b - a
        torch.testing.assert_close(apart, apart[:1, :1].expand_as(apart))
        assert float(apart.square().mean().sqrt()) == pytest.approx(deviation, rel=0.15)
    record = fp8_accuracy.measure_recipe(case_named("smoke-means-fp8-full"), CPU, SETTINGS)
    assert record["paper"] is None
    assert set(record["results"]) == {"error"}, "speed does not depend on means"


def test_errors_are_of_the_size_of_the_papers():
    for name, row in fp8_cases.ROWS.items():
        if row.paper is not None:
            assert 0.4 < row_error(name) / row.paper < 2.5, name


def test_outliers_are_as_the_paper_draws_them():
    case = case_named("smoke-outliers-fp16").case
    (q, k, v), right = fp8_accuracy.outliers(case, CPU)
    for x in (q, k, v):
        assert x.dtype == torch.float64
        assert float(x.abs().max()) > 8.0
        assert 2e-4 < float((x.abs() > 5.0).double().mean()) < 2e-3
        assert float(x.var()) == pytest.approx(1 + 100 * 0.001, abs=0.05)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * case.head_dim**-0.5
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    torch.testing.assert_close(right, expected)
    assert fp8_accuracy.errors(right + 0.5, right)["rmse"] == pytest.approx(0.5)


def test_a_recipe_that_is_computed_wrong_has_no_error_and_no_speed(monkeypatch):
    right = tandem_attn.flash_attn_quantized_func
    monkeypatch.setattr(
        tandem_attn, "flash_attn_quantized_func", lambda *args, **kwargs: right(*args, **kwargs, causal=True)
    )
    one = case_named("smoke-outliers-fp8-full")
    results = fp8_accuracy.measure_recipe(one, CPU, SETTINGS)["results"]
    assert set(results["error"]) == {"wrong"}
    results = fp8_accuracy.measure_length(case_named("smoke-keys-512"), CPU, SETTINGS)["results"]
    assert "rmse" in results["fp16"]
    assert set(results["fp8-full"]) == {"wrong"}


def test_nan_is_wrong_even_unchecked(monkeypatch):
    right = tandem_attn.flash_attn_func
    monkeypatch.setattr(tandem_attn, "flash_attn_func", lambda *args, **kwargs: right(*args) * torch.nan)
    settings = dataclasses.replace(SETTINGS, checked=False)
    results = fp8_accuracy.measure_length(case_named("smoke-keys-512"), CPU, settings)["results"]
    assert "NaN" in results["fp16"]["wrong"]


def test_error_does_not_grow_with_length():
    found = []
    for keys in (256, 512):
        record = fp8_accuracy.measure_length(case_named(f"smoke-keys-{keys}"), CPU, SETTINGS)
        found.append(record["results"]["fp8-full"]["relative"])
    assert max(found) < 0.08
    assert found[1] < 1.3 * found[0]


@pytest.mark.parametrize("place", ["first", "quarter", "half", "three-quarters", "last"])
def test_a_needle_comes_through(place):
    one = case_named(f"smoke-needle-{place}")
    record = fp8_accuracy.measure_needle(one, CPU, SETTINGS)
    assert record["exact"]["through"] == pytest.approx(1.0, abs=1e-3)
    for result in record["results"].values():
        assert result["through"] == pytest.approx(1.0, abs=0.03)
        assert abs(result["farthest"] - 1.0) >= abs(result["through"] - 1.0) - 1e-9


def test_a_needle_that_is_not_seen_does_not_come_through():
    one = case_named("smoke-needle-half")
    (q, k, v), needle = fp8_accuracy.haystack(one.case, one.place, CPU)
    k[:, one.place] = 0.0
    out = fp8_accuracy.answer(fp8_cases.ROWS["fp16"], q, k, v)[0].double()
    assert abs(fp8_accuracy.through(out, needle)["through"]) < 0.1


# The run


def test_a_run_measures_everything_and_says_how_long_it_took(tmp_path, capsys):
    plot = tmp_path / "out.png"
    status, document = run_fp8(tmp_path, "--plot", str(plot))
    printed = capsys.readouterr().out
    assert status == 0
    assert (document["format"], document["kind"], document["complete"]) == (1, "fp8", True)
    assert document["settings"] == {"repeats": 1, "idle_ms": 0.0, "checked": True}
    assert len(document["environment"]["source_digest"]) == 12
    assert [r["id"] for r in document["cases"]] == [one.id for one in fp8_cases.GROUPS["smoke"]()]
    assert document["copy_gb_per_s"] > 0
    assert document["seconds"] > 0
    assert printed.splitlines()[-1].startswith("took ")
    for title in ("TFLOPS", "quantization", "outliers", "by number of keys", "needle"):
        assert f"{title}" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert fp8_report.tables(document) == fp8_report.tables(json.loads(json.dumps(document)))


def test_tflops_are_operations_over_time(tmp_path):
    status, document = run_fp8(tmp_path, "--case", "smoke-d64")
    assert status == 0
    full, causal = document["cases"]
    assert full["flops"] == 4 * 2 * 2 * 128 * 128 * 64
    assert causal["flops"] == full["flops"] // 2
    assert full["config"].startswith("reference: ")
    for name in (*fp8_speed.FP8, fp8_speed.BF16):
        result = full["results"][name]
        assert result["tflops"] == pytest.approx(full["flops"] / result["median_us"] / 1e6)
    assert document["copy_gb_per_s"] is None, "nothing was quantized"


def test_filters(tmp_path):
    _, document = run_fp8(tmp_path, "--case", "smoke-gqa", "--providers", "tandem,tandem-bf16")
    assert [record["id"] for record in document["cases"]] == ["smoke-gqa"]
    assert set(document["cases"][0]["results"]) == {"tandem", "tandem-bf16"}
    assert set(document["summary"]["smoke"]["to_bf16"]) == {"tandem"}
    _, document = run_fp8(tmp_path, "--group", "smoke", "--case", "needle-last")
    assert [record["kind"] for record in document["cases"]] == ["needle"]
    for arguments in (["--group", "none"], ["--case", "none"], ["--providers", "fa3"], ["--plot", "a.jpg"]):
        assert cli.main(["bench", "fp8", *arguments]) == 2


@pytest.mark.parametrize("culprit", ["flash_attn_quantized_func", "flash_attn_fp8_func"])
def test_a_wrong_result_has_no_number_and_fails_the_run(tmp_path, monkeypatch, capsys, culprit):
    right = getattr(tandem_attn, culprit)

    def wrong(*args, **kwargs):
        return right(*args, **kwargs | {"causal": False})

    monkeypatch.setattr(tandem_attn, culprit, wrong)
    status, document = run_fp8(tmp_path, "--case", "smoke-d64")
    assert status == 1
    name = {"flash_attn_quantized_func": "tandem", "flash_attn_fp8_func": "tandem-total"}[culprit]
    full, causal = (record["results"] for record in document["cases"])
    assert "tflops" in full[name]
    assert set(causal[name]) == {"label", "wrong"}
    assert all("tflops" in result for other, result in causal.items() if other != name)
    assert f"WRONG: {name}, smoke-d64-causal: out of sequence 0" in capsys.readouterr().out
    assert run_fp8(tmp_path, "--case", "smoke-d64", "--no-check")[0] == 0


def test_a_failing_provider_is_reported_and_the_others_go_on(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(tandem_attn, "flash_attn_fp8_func", fails)
    status, document = run_fp8(tmp_path, "--case", "smoke-d64-full")
    assert status == 1
    results = document["cases"][0]["results"]
    assert "out of luck" in results.pop("tandem-total")["reason"]
    assert all("tflops" in result for result in results.values())


def test_an_interrupted_run_leaves_what_it_measured(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(fp8_quantize, "measure_case", interrupted)
    status, document = run_fp8(tmp_path)
    assert status == 130
    assert document["complete"] is False
    assert [record["kind"] for record in document["cases"]] == ["speed"] * len(SPEED)


def test_settings_have_the_defaults_of_the_options():
    parser = argparse.ArgumentParser()
    fp8.add_arguments(parser)
    assert options.settings(parser.parse_args([])) == Settings()
