"""What the benchmark of FP8 shows: ratios to recorded figures, tables, the plot, README.md."""

import copy
import functools
import importlib.util
import itertools
import pathlib
import sys

import pytest
import torch

from tandem_attn.bench import UserError, cases, fp8, fp8_cases, fp8_plot, fp8_report, fp8_speed, peers, report
from tandem_attn.bench.options import Settings

ROOT = pathlib.Path(__file__).parents[1]
CPU = torch.device("cpu")
SETTINGS = Settings(repeats=1, idle_ms=0.0)
H200 = {"gpu": {"name": "NVIDIA H200"}}


def case_named(name: str):
    (found,) = [one for one in fp8_cases.GROUPS["smoke"]() if one.id == name]
    return found


def speed_record(key: str, stamp: dict, **fast: float) -> dict:
    """A cell of the grid as if measured."""
    one = next(one for one in cases.GROUPS["grid"]() if one.recorded_key == key)
    times = {"median_us": 10.0, "fastest_us": 9.0, "slowest_us": 12.0, "label": "", "same_question": True}
    results = {name.replace("_", "-"): {"tflops": x} | times for name, x in fast.items()}
    asked = {"head_dim": one.case.head_dim, "causal": one.case.causal, "seqlen_k": one.case.seqlen_k}
    record = {"kind": "speed", "group": "grid", "id": one.id, "question": asked, "results": results}
    return record | fp8_speed.compared(results, key, stamp)


def test_recorded_figures_count_on_their_own_card_only():
    fast = dict(tandem=900.0, tandem_total=450.0, tandem_bf16=600.0, sdpa_cudnn=580.0)
    here = speed_record("d128_c0_s8192", H200, **fast)
    known = peers.recorded_fp8()["d128_c0_s8192"]["fa3"]
    assert here["to_recorded"] == {
        "tandem": pytest.approx(900 / known),
        "tandem-total": pytest.approx(450 / known),
    }
    assert here["to_bf16"] == {"tandem": pytest.approx(1.5), "tandem-total": pytest.approx(0.75)}
    assert here["card"] == pytest.approx(580 / peers.recorded_forward()["d128_c0_s8192"]["cudnn"])
    elsewhere = speed_record("d128_c0_s8192", {"gpu": {"name": "NVIDIA H100 80GB HBM3"}}, **fast)
    assert (elsewhere["to_recorded"], elsewhere["card"]) == ({}, None)
    assert elsewhere["recorded"] == {"fa3": known}


def a_document() -> dict:
    """A run of two cells on the recorded card and of the smoke test's other kinds."""
    return copy.deepcopy(measured())


@functools.cache
def measured() -> dict:
    """The same, once for all tests."""
    document = fp8.new_document(CPU, SETTINGS)
    document["environment"] |= H200
    document |= {"providers": dict.fromkeys(fp8_speed.BY_NAME, ""), "copy_gb_per_s": 4000.0}
    fast = dict(tandem=900.0, tandem_fa3=800.0, tandem_total=450.0, sdpa_cudnn=580.0)
    document["cases"] = [
        speed_record(key, H200, **fast | {"tandem": x})
        for key, x in (("d128_c0_s8192", 1000.0), ("d128_c0_s16384", 900.0))
    ]
    document["summary"] = fp8_speed.summary(document["cases"])
    kinds = fp8.measures([], CPU, SETTINGS, document)
    names = ("quantize-nothing", "outliers-fp16", "outliers-fp8-full", "means-fp8-full")
    for name in (*names, "keys-512", "needle-last", "cache-h4/2-d64-b2-kv256"):
        record = kinds[type(case_named(f"smoke-{name}"))](case_named(f"smoke-{name}"))
        begins = name.partition("-")[0]
        group = {"outliers": "recipes", "keys": "lengths"}.get(begins, begins)
        document["cases"].append(record | {"group": group})
    return document | {"complete": True, "seconds": 1.0}


def test_means_have_their_lowest_cell_and_the_card_is_shown(capsys):
    document = a_document()
    known = [peers.recorded_fp8()[key]["fa3"] for key in ("d128_c0_s8192", "d128_c0_s16384")]
    mean = document["summary"]["grid"]["to_recorded"]["tandem"]
    assert mean["ratio"] == pytest.approx((1000 / known[0] * 900 / known[1]) ** 0.5)
    assert (mean["cases"], mean["lowest_case"]) == (2, "d128-full-s16384")
    fp8_report.show(document)
    printed = capsys.readouterr().out
    assert f"tandem is {mean['ratio']:.3f} x fa3 as recorded (geometric mean of 2 cases, lowest" in printed
    assert "the card: cuDNN in bf16 is today" in printed
    assert "* not in this run: recorded on 2026-11-22" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("d128-full-s8192")]
    assert line.split()[1:6] == ["1000", "800", "450", "580", "977"]


def test_a_plot_has_a_point_for_every_row_with_error_and_speed(tmp_path):
    document = a_document()
    fp16, full = fp8_plot.points(document)
    assert (fp16[0], full[0]) == ("fp16", "fp8-full")
    assert fp16[3] is None
    assert full[2] > 0 and full[3] > 0
    path = tmp_path / "out.svg"
    assert fp8_plot.draw(path, document) == ""
    assert "<svg" in path.read_text()
    wrong = {"error": {"wrong": "NaN"}, "speed": {"reason": "none"}}
    document["cases"] = [r | {"results": wrong} for r in document["cases"] if r["kind"] == "recipe"]
    assert "no row" in fp8_plot.draw(path, document)
    with pytest.raises(UserError, match=r"\.png or \.svg"):
        fp8_plot.require_format(tmp_path / "out.pdf")


def test_without_matplotlib_there_is_no_plot(tmp_path, monkeypatch):
    document = a_document()
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    assert fp8_plot.draw(tmp_path / "out.png", document) == "matplotlib is not installed"


def readme_tables():
    """tools/readme_tables.py is a script, not part of the package."""
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "tools" / "readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_has_tables_of_results_and_nothing_without(tmp_path):
    tool = readme_tables()
    for group in tool.FP8:
        assert tool.table(f"fp8-{group}", tmp_path) == "", "nothing is measured, nothing is said"
        with pytest.raises(tool.TableError):
            tool.table(f"fp8-{group} fp8-h200.json", tmp_path)
    report.save(a_document(), tmp_path / "fp8-h200.json")
    made = {group: tool.table(f"fp8-{group}", tmp_path) for group in tool.FP8}
    assert "| 128 | full | **1000** / 977 fa3\\* = 1.02 |" in made["grid"]
    assert "cuDNN" in made["grid"]
    assert "| smoke-quantize-nothing | not rotated" in made["quantize"]
    assert "a copy reaches 4000 GB/s" in made["quantize"]
    assert "| fp8-full | q and k rotated" in made["recipes"]
    assert "| 1.9e-04 |" in made["recipes"]
    assert "| fp8-full | q and k rotated" in made["means"]
    assert "| 1.9e-04 |" not in made["means"], "the paper has no such inputs"
    assert "of K around N(0, 25), of V around N(0, 1)" in made["means"]
    assert "| keys | 512 |" in made["lengths"]
    assert "| needle at key | 511 |" in made["needle"]
    assert "h4/2-d64-b2-kv256 | 0.25" in made["cache"]
    for text, group in itertools.product(("from `benchmarks/results/fp8-h200.json`", "NVIDIA H200"), made):
        assert text in made[group]
