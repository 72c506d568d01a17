"""What benchmarks write: JSON, CSV, tables on the screen and in README.md."""

import argparse
import csv
import dataclasses
import importlib.util
import json
import pathlib
import sys

import pytest
import torch

from tandem_attn import cli
from tandem_attn.bench import UserError, cases, environment, forward, options, peers, report, tflops

ROOT = pathlib.Path(__file__).parents[1]
CPU = torch.device("cpu")


def load_tool():
    """tools/readme_tables.py is a script, not part of the package."""
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "tools" / "readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


readme_tables = load_tool()


def a_document(groups: list[str], gpu: str = "NVIDIA H200", **results: dict) -> dict:
    """A run in which every case of some groups has these results."""
    document = report.new_document("forward", environment.stamp(CPU), {"repeats": 1})
    document["environment"] |= {"gpu": {"name": gpu}, "date": "2026-12-01T00:00:00+00:00"}
    document["recorded_where"] = peers.recorded_where()
    document["providers"] = dict.fromkeys(results, "") | {"fa4": "not installed"}
    for one in cases.select(groups, None, CPU):
        head = {"group": one.group, "id": one.id, "question": tflops.question(one), "flops": one.flops}
        record = head | {"config": "", "results": dict(results)}
        document["cases"].append(peers.compare(record, one, document["environment"]))
    document["summary"] = peers.summary(document["cases"])
    document["complete"] = True
    return document


def timed(tflops: float, **more) -> dict:
    times = {"median_us": 10.0, "fastest_us": 9.0, "slowest_us": 12.0}
    return {"tflops": tflops, "label": "", "same_question": True} | times | more


# Files


@pytest.fixture
def smoke(tmp_path, monkeypatch):
    """A real run of two tiny cases on the CPU: its JSON and its CSV."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    paths = [tmp_path / "out.json", tmp_path / "out.csv"]
    options = ["--case", "smoke-d64", "--repeats", "2", "--idle-ms", "0"]
    files = ["--json", str(paths[0]), "--csv", str(paths[1])]
    assert cli.main(["bench", "forward", *options, *files]) == 0
    return paths


def test_a_document_says_what_was_measured_where(smoke):
    document = json.loads(smoke[0].read_text())
    assert (document["format"], document["kind"], document["complete"]) == (1, "forward", True)
    assert document["settings"] == {"repeats": 2, "idle_ms": 0.0, "checked": True}
    stamp = document["environment"]
    assert stamp["torch"] == torch.__version__
    assert (stamp["device"], stamp["gpu"]) == ("cpu", None)
    assert len(stamp["source_digest"]) == 12
    assert [record["id"] for record in document["cases"]] == ["smoke-d64-full", "smoke-d64-causal"]
    record = document["cases"][1]
    one = next(one for one in cases.GROUPS["smoke"]() if one.id == record["id"])
    assert record["flops"] == one.flops
    assert record["question"]["causal"] is True
    assert record["question"]["dtype"] == "bfloat16"
    assert record["config"].partition(": ")[0] == "torch"
    result = record["results"]["tandem"]
    assert result["fastest_us"] <= result["median_us"] <= result["slowest_us"]
    assert result["launches"] == 2
    assert result["tflops"] == pytest.approx(one.flops / result["median_us"] / 1e6)
    ratio = result["tflops"] / record["results"]["sdpa"]["tflops"]
    assert record["best_live"]["ratio"] == pytest.approx(ratio)


def test_csv_holds_the_same_numbers(smoke):
    with smoke[1].open(newline="") as file:
        rows = {(row["case"], row["provider"]): row for row in csv.DictReader(file)}
    for record in json.loads(smoke[0].read_text())["cases"]:
        for name, result in record["results"].items():
            assert float(rows[record["id"], name]["tflops"]) == result["tflops"]
    assert len(rows) == 4


def test_csv_marks_what_is_wrong_missing_or_recorded(tmp_path):
    document = a_document(["grid"], tandem={"label": "", "wrong": "NaN"}, sdpa={"reason": "none here"})
    report.write_csv(document, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["case"] == "d64-full-s512"]
    notes = {row["provider"]: row["note"] for row in rows}
    assert notes["tandem"] == "WRONG: NaN"
    assert notes["sdpa"] == "none here"
    assert notes["fa3"] == "recorded"
    assert not next(row for row in rows if row["provider"] == "tandem")["tflops"]


def test_saved_and_loaded_is_the_same(tmp_path):
    document = a_document(["grid", "window"], tandem=timed(500.0), sdpa=timed(400.0))
    path = tmp_path / "out.json"
    report.save(document, path)
    assert report.load(path) == document
    assert report.tables(report.load(path)) == report.tables(document)
    assert list(tmp_path.iterdir()) == [path], "nothing partial is left"
    report.save(document, None)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(UserError, match="cannot read"):
        report.load(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="no benchmark result"):
        report.load(path)


def test_the_digest_follows_the_code(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("one")
    monkeypatch.setattr(environment, "PACKAGE", tmp_path)
    before = environment.source_digest()
    assert environment.git_state() == {"commit": None, "dirty": None}
    (tmp_path / "a.py").write_text("two")
    assert environment.source_digest() != before


def test_nvidia_smi_is_asked_once_and_may_be_missing(monkeypatch):
    asked = []

    def output(command):
        asked.append(command)
        return "580.159.03, 1980, 1980, 700.00, 31"

    monkeypatch.setattr(environment, "output_of", output)
    found = environment.smi("abc")
    assert found["driver"] == "580.159.03"
    assert (found["max_sm_clock_mhz"], found["power_limit_w"]) == (1980.0, 700.0)
    assert asked[0][1:3] == ["-i", "GPU-abc"]
    assert len(asked) == 1
    monkeypatch.setattr(environment, "output_of", lambda command: None)
    assert environment.smi(None) == {}


# Tables


def test_tables_show_peers_spreads_and_ratios(capsys):
    results = dict(tandem=timed(800.0), sdpa=timed(400.0), slow={"reason": "it broke"}, bad={"wrong": "NaN"})
    document = a_document(["grid"], **results)
    ((title, header, rows),) = report.tables(document)
    assert "grid" in title
    assert len(rows) == 36
    row = dict(zip(header, rows[0], strict=True))
    assert (row["tandem"], row["sdpa"], row["slow"], row["bad"]) == ("800", "400", "-", "WRONG")
    assert (row["fa3*"], row["us range"]) == ("333", "9.00 - 12.0")
    assert (row["/ best live"], row["/ best"]) == ("2.000", "2.000")
    report.show(document)
    printed = capsys.readouterr().out
    assert "grid: tandem is 2.000 x the best peer of this run (geometric mean of 36 cases)" in printed
    assert "WRONG: bad, d64-full-s512: NaN" in printed
    assert "absent: fa4: not installed" in printed
    assert "* recorded on 2026-11-22: one NVIDIA H200" in printed
    assert "it broke" in printed


def test_on_a_terminal_tables_have_borders_and_brackets_survive(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    report.print_table("title", ["case", "x"], [["a", "[10.0 us]"], ["b", "WRONG"]])
    printed = capsys.readouterr().out
    assert "[10.0 us]" in printed
    assert "━" in printed or "─" in printed
    assert "WRONG" in printed


def test_a_narrow_terminal_loses_no_digits(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    header = [f"two words {i}" for i in range(12)]
    report.print_table("title", header, [[str(100000 + i) for i in range(12)]])
    printed = capsys.readouterr().out
    assert all(str(100000 + i) in printed for i in range(12))


def test_without_rich_tables_are_plain_and_say_how_to_get_better(capsys, monkeypatch):
    other = {"median_us": 10.0, "same_question": False, "label": "no window"}
    document = a_document(["window"], tandem=timed(800.0), other=other)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setitem(sys.modules, "rich.table", None)
    report.show(document)
    printed = capsys.readouterr().out
    assert "pip install rich" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("window1024-d64-s16384")]
    assert line.split()[1:4] == ["800", "[10.0", "us]"]


def test_progress_without_a_terminal_is_only_lines(capsys):
    with report.Progress(2) as progress:
        progress.next("a")
        progress.say("a 1")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("a 1\n", "")


def test_paths_are_looked_at_before_measuring(tmp_path):
    report.require_writable(None, tmp_path / "x.json")
    with pytest.raises(UserError, match="no folder"):
        report.require_writable(tmp_path / "nowhere" / "x.json")
    with pytest.raises(UserError, match="is a folder"):
        report.require_writable(tmp_path)


# README.md

TEMPLATE = "# Title\n\n<!-- table: {} -->\n{}<!-- /table -->\n\nafter\n"


@pytest.fixture
def results(tmp_path):
    """Two forward runs, the newer without a grid, and one of overhead."""
    folder = tmp_path / "results"
    folder.mkdir()
    report.save(a_document(["grid"], tandem=timed(400.0), sdpa=timed(200.0)), folder / "a.json")
    newer = a_document(["window", "smoke"], tandem=timed(50.0), sdpa=timed(25.0))
    newer["environment"]["date"] = "2026-12-02T00:00:00+00:00"
    report.save(newer, folder / "b.json")
    calls = report.new_document("overhead", environment.stamp(CPU), {})
    calls |= {"cases": [{"id": "tandem dense", "median_us": 9.87}], "remark": "", "complete": True}
    report.save(calls, folder / "c.json")
    return folder


def tool(results: pathlib.Path, name: str, *options: str, body: str = "") -> tuple[int, str]:
    """Exit status of the tool on a document with one table, and the document after it."""
    readme = results.parent / "README.md"
    readme.write_text(TEMPLATE.format(name, body))
    arguments = ["--readme", str(readme), "--results", str(results), *options]
    return readme_tables.main(arguments), readme.read_text()


def test_check_finds_stale_tables_and_writes_nothing(results):
    status, document = tool(results, "overhead", "--check", body="old\n")
    assert status == 1
    assert document == TEMPLATE.format("overhead", "old\n")
    status, document = tool(results, "overhead", body="old\n")
    assert status == 0
    assert "| tandem dense | 9.9 |" in document
    assert document.startswith("# Title\n\n<!-- table: overhead -->\n| function")
    assert document.endswith("<!-- /table -->\n\nafter\n")
    body = document.split(" -->\n", 1)[1].split("<!-- /table", 1)[0]
    assert tool(results, "overhead", "--check", body=body)[0] == 0
    assert tool(results, "overhead", "--check", body=body.replace("9.9", "7.9"))[0] == 1


def test_a_model_that_generates(results):
    document = report.new_document("generate", environment.stamp(CPU), {})
    document |= {"model": {"name": "a model", "layers": 3, "batch": 1}, "remark": "no prefill"}
    both = {"tandem": {"tokens_per_second": 53.21}, "sdpa": {"tokens_per_second": 50.0}}
    wrong = {"tandem": {"wrong": "NaN"}, "sdpa": {"reason": "no memory"}}
    document["cases"] = [
        {"id": "prompt-512", "prompt": 512, "results": both, "ratio": 1.0642},
        {"id": "prompt-64k", "prompt": 65536, "results": wrong, "ratio": None},
    ]
    report.save(document | {"complete": True}, results / "d.json")
    made = tool(results, "generate")[1]
    assert "| 512 | 53.2 | 50.0 | 1.064 |" in made
    assert "| 64k | wrong result | - |  |" in made
    assert "3 layers of a model, random weights, batch 1; no prefill." in made


def test_the_grid_says_ours_best_and_ratio(results):
    _, document = tool(results, "forward-grid")
    lines = document.splitlines()
    assert "| head_dim | mask | 512 | 1k | 2k | 4k | 8k | 16k |" in lines
    rows = [line for line in lines if line.startswith(("| 64 |", "| 128 |", "| 256 |"))]
    assert len(rows) == 6
    # on an H200 recorded peers count: the best of 64 full 512 is cuDNN with 398.6
    assert rows[0].startswith("| 64 | full | **400** / 399 cudnn\\* = 1.00 |")
    assert "a.json" in document
    assert "recorded" in document
    best = json.loads((results / "a.json").read_text())["summary"]["grid"]["best"]
    assert f"**{best['ratio']:.3f}** over 36 cases" in document


def test_other_groups_have_a_column_per_peer(results):
    _, document = tool(results, "forward-window")
    assert "| case | tandem | sdpa | tandem / best peer |" in document
    assert "| window1024-d64-s16384 | 50.0 | 25.0 | 2.00 |" in document
    assert "b.json" in document


def test_a_result_can_be_named(results):
    older = a_document(["window"], tandem=timed(40.0))
    older["environment"]["date"] = "2025-01-01T00:00:00+00:00"
    report.save(older, results / "old.json")
    assert "| 40.0 |" in tool(results, "forward-window old.json")[1]
    assert "| 50.0 |" in tool(results, "forward-window")[1], "else the newest"


@pytest.mark.parametrize("name", ["forward-gqa", "nonsense", "overhead missing.json"])
def test_tables_of_nothing_are_errors(results, name, capsys):
    status, document = tool(results, name, body="old\n")
    assert status == 2
    assert "old\n" in document
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_results_of_cut_off_runs_are_refused(results):
    document = a_document(["gqa"], tandem=timed(40.0)) | {"complete": False}
    report.save(document, results / "d.json")
    assert tool(results, "forward-gqa")[0] == 2


def test_markers_must_close(results):
    readme = results.parent / "README.md"
    readme.write_text("<!-- table: overhead -->\nno end\n")
    assert readme_tables.main(["--readme", str(readme), "--results", str(results)]) == 2


README = ROOT / "README.md"
has_tables = README.exists() and "<!-- table: " in README.read_text()


@pytest.mark.skipif(not has_tables, reason="README.md has no tables of results")
def test_readme_shows_the_results_in_the_repository():
    assert readme_tables.main(["--check"]) == 0


def test_settings_have_the_defaults_of_the_options():
    parser = argparse.ArgumentParser()
    forward.add_arguments(parser)
    given = parser.parse_args([])
    settings = options.Settings(given.repeats, given.idle_ms, not given.no_check)
    assert dataclasses.asdict(settings) == dataclasses.asdict(options.Settings())
