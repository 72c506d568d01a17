"""`bench decode`: recorded and live peers, what is shown of them, and the tables of README.md."""

import itertools
import json
import math
import sys
import types

import pytest
import torch
from test_bench_decode import CPU, CUDA, EVERY, SMOKE, case_named, oracle_of, provider_named
from test_bench_report import readme_tables

import tandem_attn
from tandem_attn import cli
from tandem_attn.bench import decode_peers, decode_report, environment, report

# Peers


def a_record(times: dict[str, float], name: str = "x", group: str = "fa3", flat: bool = False) -> dict:
    results = {who: {"median_us": us, "gb_per_s": 100 / us, "of_copy": 0.5} for who, us in times.items()}
    return {"group": group, "id": name, "flat": flat, "results": results}


def test_recorded_peers_count_on_their_own_card_only():
    one = case_named("h16/1-d128-b1-kv8192")
    record = a_record({"tandem": 10.0, "sdpa": 18.0})
    elsewhere = decode_peers.compare(record, one, {"gpu": {"name": "NVIDIA H100 80GB HBM3"}})
    assert elsewhere["ratios"] == {"sdpa": 1.8}
    assert elsewhere["best"] == elsewhere["best_live"] == {"name": "sdpa", "median_us": 18.0, "ratio": 1.8}
    assert elsewhere["recorded"] == {"fa3": 20.4, "fa3-again": 15.8}
    there = decode_peers.compare(record, one, {"gpu": {"name": "NVIDIA H200"}})
    assert there["ratios"] == {"sdpa": 1.8, "fa3 (recorded)": 2.04, "fa3-again (recorded)": 1.58}
    assert there["best"] == {"name": "fa3-again (recorded)", "median_us": 15.8, "ratio": 1.58}
    assert there["best_live"]["name"] == "sdpa"


def test_means_lowest_and_flatness():
    one = case_named("smoke-b1")
    times = [{"tandem": 10.0, "sdpa": 40.0}, {"tandem": 12.5, "sdpa": 12.5}, {"sdpa": 1.0}]
    records = [
        decode_peers.compare(a_record(x, f"case{i}", flat=True), one, {"gpu": None})
        for i, x in enumerate(times)
    ]
    records += [decode_peers.compare(a_record({"tandem": 1.0}, group="blog"), one, {"gpu": None})]
    found = decode_peers.summary(records)
    mean = {"cases": 2, "ratio": pytest.approx(2.0), "lowest": 1.0, "lowest_case": "case1"}
    assert found["fa3"] == {
        "cases": 3,
        "best_live": mean,
        "best": mean,
        "peers": {"sdpa": mean},
        "flat": pytest.approx(1.25),
    }
    assert found["blog"]["best"] == {"cases": 0, "ratio": None, "lowest": None, "lowest_case": None}
    assert found["blog"]["flat"] is None
    assert found["all"]["cases"] == 4


def test_a_baseline_that_was_not_measured_is_no_baseline():
    one = case_named("smoke-p16")
    record, base = a_record({"tandem": 10.0}, "smoke-p16", "smoke"), a_record({}, "smoke-b2", "smoke")
    assert decode_peers.against(record, one, [base]) is None
    assert decode_peers.against(record, one, []) is None
    base = a_record({"tandem": 5.0}, "smoke-b2", "smoke")
    assert decode_peers.against(record, one, [base]) == {"id": "smoke-b2", "ratio": 0.5}


# Providers


def test_sdpa_is_asked_about_uniform_batches_only():
    serves = provider_named("sdpa").serves
    assert [name for name in SMOKE if not serves(case_named(name).case)] == [
        "smoke-p1",
        "smoke-p16",
        "smoke-mixed",
        "smoke-mixed-p16",
    ]


@pytest.mark.parametrize("name", SMOKE)
@pytest.mark.parametrize("version", ["fa3", "fa4"])
def test_flash_attention_is_asked_our_question(monkeypatch, version, name):
    """Stand-ins with the signatures of versions 3 and 4, the latter returning (out, lse)."""
    ours = tandem_attn.flash_attn_with_kvcache

    def version3(q, k_cache, v_cache, cache_seqlens=None, page_table=None, causal=False, num_splits=0):
        return ours(q, k_cache, v_cache, cache_seqlens=cache_seqlens, page_table=page_table, causal=causal)

    def version4(q, k, v, seqused_k=None, page_table=None, causal=False):
        found = dict(cache_seqlens=seqused_k, page_table=page_table, causal=causal)
        return ours(q, k, v, **found, return_softmax_lse=True)

    modules = {"fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}
    functions = {"fa3": "flash_attn_with_kvcache", "fa4": "flash_attn_varlen_func"}
    library = types.ModuleType(modules[version])
    setattr(library, functions[version], {"fa3": version3, "fa4": version4}[version])
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, modules[version], library)
    provider, oracle = provider_named(version), oracle_of(name)
    assert provider.absent(CUDA) == ""
    call = provider.prepare(oracle.case, oracle.caches)
    assert oracle.what_is_wrong(*call.answer()) == ""
    assert oracle.what_is_wrong(call.run(1), None) == ""


def test_ourselves_under_another_name_is_no_peer(monkeypatch):
    disguise = types.ModuleType("flash_attn_interface")
    disguise.flash_attn_with_kvcache = tandem_attn.flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn_interface", disguise)
    assert "tandem_attn" in provider_named("fa3").absent(CUDA)


class Wrapper:
    """FlashInfer's, as far as it is used: pages of lists instead of a table."""

    def __init__(self, memory, layout, use_tensor_cores):
        assert layout == "NHD"

    def plan(self, starts, numbers, last, heads, kv_heads, head_dim, page, q_data_type, kv_data_type):
        self.rows = [numbers[a:b] for a, b in itertools.pairwise(starts.tolist())]
        self.lengths = [(len(row) - 1) * page + n for row, n in zip(self.rows, last.tolist(), strict=True)]

    def run(self, q, pair):
        table = torch.zeros(len(self.rows), max(map(len, self.rows)), dtype=torch.int32)
        for row, numbers in zip(table, self.rows, strict=True):
            row[: len(numbers)] = numbers
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        given = dict(cache_seqlens=lengths, page_table=table)
        return tandem_attn.flash_attn_with_kvcache(q[:, None], *pair, **given)[:, 0]


@pytest.mark.parametrize("name", [name for name in SMOKE if name not in ("smoke-tokens", "smoke-mixed")])
def test_flashinfer_is_asked_our_question(monkeypatch, name):
    library = types.ModuleType("flashinfer")
    library.BatchDecodeWithPagedKVCacheWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    provider, oracle = provider_named("flashinfer"), oracle_of(name)
    assert provider.serves(oracle.case)
    call = provider.prepare(oracle.case, oracle.caches)
    assert oracle.what_is_wrong(*call.answer()) == ""
    assert oracle.what_is_wrong(call.run(1), None) == ""
    assert not provider.serves(case_named("smoke-tokens").case)


# What is shown


def a_document(group: str, gpu: str = "NVIDIA H200") -> dict:
    """A run in which every case takes us 10 us and torch 15."""
    document = report.new_document("decode", environment.stamp(CPU), {"repeats": 1})
    document["environment"] |= {"gpu": {"name": gpu}, "device": "cuda"}
    document |= {"recorded_where": decode_peers.recorded_where(), "copy_gb_per_s": 4200.0}
    document["providers"] = {"tandem": "", "sdpa": "", "fa3": "not installed"}
    for one in EVERY[group]:
        record = a_record({"tandem": 10.0, "sdpa": 15.0}, one.id, group, one.flat)
        record |= {"kv_bytes": one.kv_bytes, "copies": 4, "splits": "16"}
        for result in record["results"].values():
            result |= {"fastest_us": 9.0, "slowest_us": 11.0, "label": ""}
        record = decode_peers.compare(record, one, document["environment"])
        record["against"] = decode_peers.against(record, one, document["cases"])
        document["cases"].append(record)
    document["summary"] = decode_peers.summary(document["cases"])
    return document | {"complete": True}


def test_tables_show_peers_and_ratios(capsys):
    document = json.loads(json.dumps(a_document("fa3")))
    ((_, header, rows),) = decode_report.tables(document)
    row = dict(zip(header, rows[0], strict=True))
    assert row["case"] == "h32/8-d128-b1-kv8192"
    assert (row["tandem us"], row["GB/s"], row["% of copy"], row["splits"]) == ("10.0", "10.0", "50", "16")
    assert (row["sdpa us"], row["fa3* us"], row["fa3-again* us"]) == (
        "15.0 (1.50x)",
        "18.7 (1.87x)",
        "19.6 (1.96x)",
    )
    assert (row["/ best live"], row["/ best"]) == ("1.500", "1.500")
    assert "of its baseline" not in header
    decode_report.show(document)
    printed = capsys.readouterr().out
    assert "absent: fa3: not installed" in printed
    assert "* recorded on one NVIDIA H200" in printed
    assert "less than 268 MB read between uses of a copy  (" in printed
    assert "fa3: time of sdpa / tandem: geometric mean 1.500, lowest 1.500" in printed
    assert "4200 GB/s" in printed


def test_recorded_times_of_another_card_are_shown_without_a_ratio():
    ((_, header, rows),) = decode_report.tables(a_document("fa3", "NVIDIA H100"))
    assert dict(zip(header, rows[0], strict=True))["fa3* us"] == "18.7"


def test_a_mixed_batch_is_shown_as_time_over_that_of_a_uniform_one(capsys):
    document = a_document("ragged")
    document["cases"][1]["against"]["ratio"] = 0.8
    decode_report.show(document)
    assert "ragged-mixed: 1.250 x the time its bytes take" in capsys.readouterr().out


# README.md


def test_readme_tables_of_decoding(tmp_path):
    assert readme_tables.table("decode-fa3", tmp_path) == "Not measured yet.\n"
    with pytest.raises(readme_tables.TableError):
        readme_tables.table("decode-fa3 decode-h200.json", tmp_path)
    for group in ("fa3", "blog", "paged"):
        report.save(a_document(group), tmp_path / f"{group}.json")
    lines = readme_tables.table("decode-fa3", tmp_path).splitlines()
    assert "| h32/8-d128-b1-kv8192 | **10.0** | 10.0 | 50 | 16 | 15.0 sdpa = 1.50 |" in lines
    assert "| h16/1-d64-b1-kv8192 | **10.0** | 10.0 | 50 | 16 | 15.0 sdpa = 1.50 |" in lines
    assert any("geometric mean **1.500**, lowest 1.500" in line for line in lines)
    recorded = [one for one in a_document("fa3")["cases"] if one["recorded"].get("fa3")]
    mean = math.exp(sum(math.log(one["recorded"]["fa3"] / 10) for one in recorded) / len(recorded))
    assert any(rf"Time of fa3\* / tandem: geometric mean **{mean:.3f}**, lowest" in line for line in lines)
    assert any("4200 GB/s" in line for line in lines)
    assert "same bytes: **1.000**" in readme_tables.table("decode-blog", tmp_path)
    paged = readme_tables.table("decode-paged", tmp_path)
    assert "| paged-d128-b1-kv8192-p16 | **10.0** | 10.0 | 50 | 16 | 15.0 sdpa = 1.50 | 1.000 |" in paged
    assert "Baselines: paged-d128-b1-kv8192, " in paged


def test_readme_tables_star_what_is_recorded_and_show_what_is_wrong(tmp_path):
    document = a_document("fa3")
    document["cases"][0]["results"]["tandem"] = {"wrong": "NaN", "label": ""}
    document["cases"][1]["best"] = {"name": "fa3 (recorded)", "median_us": 76.0, "ratio": 1.2}
    report.save(document, tmp_path / "a.json")
    made = readme_tables.table("decode-fa3", tmp_path)
    assert "| h32/8-d128-b1-kv8192 | wrong result |" in made
    assert "76.0 fa3\\* = 1.20 |" in made
    assert "recorded earlier on a card of the same kind" in made


@pytest.mark.gpu
def test_the_command_runs_on_a_gpu(tmp_path):
    path = tmp_path / "out.json"
    options = ["--group", "smoke", "--repeats", "3", "--idle-ms", "0", "--json", str(path)]
    assert cli.main(["bench", "decode", *options]) == 0
    for record in report.load(path)["cases"]:
        assert record["copies"] == 64
        assert record["calls"] % 64 == 0
        assert record["results"]["tandem"]["launches"] == 3
        assert "wrong" not in record["results"].get("sdpa", {})
