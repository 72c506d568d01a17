"""`bench decode`: what is counted, rotated, refused and written. Numbers themselves are not tested."""

import argparse
import contextlib
import dataclasses
import itertools
import math

import pytest
import torch

import tandem_attn
from tandem_attn import cli
from tandem_attn.bench import (
    caches,
    decode,
    decode_cases,
    decode_peers,
    decode_providers,
    measure,
    options,
    providers,
    report,
)
from tandem_attn.bench.decode_check import DecodeOracle
from tandem_attn.testing.decode_inputs import DecodeCase

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QUICK = ["--repeats", "1", "--idle-ms", "0"]
EVERY = {name: make() for name, make in decode_cases.GROUPS.items()}
SMOKE = [one.id for one in EVERY["smoke"]]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The same on every machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def case_named(name: str) -> decode_cases.DecodeBenchCase:
    (found,) = [one for cases in EVERY.values() for one in cases if one.id == name]
    return found


def oracle_of(name: str) -> DecodeOracle:
    case = case_named(name).case
    return DecodeOracle(case, caches.make(case, CPU))


def provider_named(name: str) -> providers.Provider:
    (found,) = [p for p in decode_providers.PROVIDERS if p.name == name]
    return found


# Cases


def test_bytes_are_those_of_keys_in_use():
    case = DecodeCase(batch=2, kv_heads=3, head_dim=16, head_dim_v=8, capacity=100, seqlens=(7, 30))
    assert decode_cases.kv_bytes(case) == (7 + 30) * 3 * (16 + 8) * 2
    assert case_named("h32/8-d128-b1-kv8192").kv_bytes == 33_554_432


def test_recorded_shapes_are_ours_and_ours_are_recorded():
    recorded = decode_peers.recorded_decode()
    assert len(EVERY["fa3"]) == 30
    assert {one.recorded_key for one in EVERY["fa3"] + EVERY["blog"]} <= set(recorded)
    assert set(recorded) <= {one.recorded_key for cases in EVERY.values() for one in cases}
    assert sum("fa3" in peers for peers in recorded.values()) == 20
    assert recorded["h32/8-d128-b1-kv8192"] == {"fa3": 18.7, "fa3-again": 19.6}
    assert recorded["h32/8-d128-b8-kv8192-p16"] == {"fa3-again": 71.2}


def test_names_are_unique_and_baselines_come_first():
    assert len({one.id for cases in EVERY.values() for one in cases}) == sum(map(len, EVERY.values()))
    for cases in EVERY.values():
        for i, one in enumerate(cases):
            assert one.against is None or one.against in [earlier.id for earlier in cases[:i]], one.id
    assert {one.group for one in decode_cases.select(None, None, CPU)} == {"smoke"}
    assert {one.group for one in decode_cases.select(None, None, CUDA)} == set(EVERY) - {"smoke"}


def test_the_blog_rows_have_the_same_bytes_but_for_the_last():
    *rows, last = EVERY["blog"]
    assert len(rows) == 9
    assert all(one.flat and one.kv_bytes == 67_108_864 for one in rows)
    assert not last.flat
    assert last.kv_bytes == 2 * 67_108_864


def test_families_of_rows_read_the_same_keys():
    for start in range(0, len(EVERY["rows"]), 4):
        first, *others = family = EVERY["rows"][start : start + 4]
        packed = [one.case.heads // one.case.kv_heads * one.case.tokens for one in family]
        assert packed == [16, 32, 64, 128]
        assert len({(one.case.keys, one.case.head_dim, one.case.kv_heads) for one in family}) == 1
        assert first.against is None
        assert {one.against for one in others} == {first.id}


def test_the_mixed_batch_never_changes_and_the_uniform_has_its_bytes():
    uniform, mixed, paged = EVERY["ragged"]
    assert mixed.case.keys[:3] == (34140, 18787, 1827), "numbers of different lengths cannot be compared"
    assert len(mixed.case.keys) == 32
    assert min(mixed.case.keys) >= 100
    assert max(mixed.case.keys) <= 100_000
    assert mixed.case.keys == paged.case.keys
    assert uniform.kv_bytes == pytest.approx(mixed.kv_bytes, rel=1e-4)
    sizes = [(one.case.split_size, one.against) for one in EVERY["split_size"]]
    assert sizes == [(None, None), (4096, "split-mixed-auto"), (None, None), (4096, "split-uniform-auto")]


# Inputs


@pytest.mark.parametrize("name", SMOKE)
def test_inputs_are_what_the_case_says(name):
    case = case_named(name).case
    made = caches.make(case, CPU)
    assert made.q.shape == (case.batch, case.tokens, case.heads, case.head_dim)
    assert made.seqlens.tolist() == list(case.keys)
    assert len(made.pairs) == 2
    for x, copy in zip(*made.pairs, strict=True):
        assert torch.equal(x, copy)
        assert x.data_ptr() != copy.data_ptr()
    assert [made.keys_of(i, n)[0].shape for i, n in enumerate(case.keys)] == [
        (n, case.kv_heads, case.head_dim) for n in case.keys
    ]
    if case.page_size:
        used = [
            row[: math.ceil(n / case.page_size)] for row, n in zip(made.page_table, case.keys, strict=True)
        ]
        assert sorted(torch.cat(used).tolist()) == list(range(len(made.pairs[0][0])))


def test_copies_keep_keys_out_of_the_cache(monkeypatch):
    assert caches.copies_wanted(2**21) == 64
    assert caches.copies_wanted(4 * 2**30) == 2
    assert (caches.copies_wanted(67_108_864) - 1) * 67_108_864 >= 268_000_000
    case = case_named("smoke-b1").case
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000_000, 80_000_000))
    assert caches._copies(case, 2_000_000, CUDA) == 4, "no more than there is room for"
    assert caches._copies(case, 200_000_000, CUDA) == 1


# The check


@pytest.mark.parametrize("name", SMOKE)
def test_right_results_pass(name):
    oracle = oracle_of(name)
    assert oracle.what_is_wrong(*provider_named("tandem").prepare(oracle.case, oracle.caches).answer()) == ""


FAULTS = {
    "no mask": ("smoke-tokens", dict(causal=False)),
    "a key short": ("smoke-b2", dict(cache_seqlens=255)),
    "a short sequence a key short": (
        "smoke-mixed",
        dict(cache_seqlens=torch.tensor([4, 300, 77], dtype=torch.int32)),
    ),
    "another scale": ("smoke-mqa", dict(softmax_scale=0.08)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_answers_to_other_questions_fail(fault):
    name, changed = FAULTS[fault]
    oracle = oracle_of(name)
    given = decode_providers.arguments(oracle.case, oracle.caches) | changed
    pair = oracle.caches.pairs[0]
    found = tandem_attn.flash_attn_with_kvcache(oracle.caches.q, *pair, **given, return_softmax_lse=True)
    assert "sequence" in oracle.what_is_wrong(*found)


def test_damaged_results_fail():
    oracle = oracle_of("smoke-p16")
    out, lse = provider_named("tandem").prepare(oracle.case, oracle.caches).answer()
    assert "lse" in oracle.what_is_wrong(out, lse * math.log2(math.e))
    assert "sequence 0" in oracle.what_is_wrong(out.flip(-2), lse), "heads in another order"
    assert "sequence 0" in oracle.what_is_wrong(out.roll(1, 0), lse), "sequences in another order"
    assert "NaN" in oracle.what_is_wrong(out.index_fill(-1, torch.tensor([3]), math.nan), None)
    assert "shape" in oracle.what_is_wrong(out[..., :-1], lse)
    assert "float32" in oracle.what_is_wrong(out.float(), lse)


# The run


def run_decode(tmp_path, *arguments: str) -> tuple[int, dict]:
    path = tmp_path / "out.json"
    status = cli.main(["bench", "decode", *QUICK, "--json", str(path), *arguments])
    return status, report.load(path)


def test_the_command_runs_on_a_cpu(tmp_path, capsys):
    status, document = run_decode(tmp_path)
    assert status == 0
    assert (document["kind"], document["complete"]) == ("decode", True)
    assert document["settings"] == {"repeats": 1, "idle_ms": 0.0, "checked": True}
    assert document["environment"]["torch"] == torch.__version__
    assert [record["id"] for record in document["cases"]] == SMOKE
    for record in document["cases"]:
        ours = record["results"]["tandem"]
        assert ours["gb_per_s"] == pytest.approx(record["kv_bytes"] / ours["median_us"] / 1e3)
        assert ours["of_copy"] == pytest.approx(ours["gb_per_s"] / document["copy_gb_per_s"])
    by_name = {record["id"]: record for record in document["cases"]}
    times = {name: x["median_us"] for name, x in by_name["smoke-b2"]["results"].items()}
    assert by_name["smoke-b2"]["ratios"] == {"sdpa": pytest.approx(times["sdpa"] / times["tandem"])}
    speeds = [by_name[name]["results"]["tandem"]["gb_per_s"] for name in ("smoke-p16", "smoke-b2")]
    assert by_name["smoke-p16"]["against"] == {
        "id": "smoke-b2",
        "ratio": pytest.approx(speeds[0] / speeds[1]),
    }
    assert "sdpa" not in by_name["smoke-mixed"]["results"]
    assert by_name["smoke-mixed"]["question"]["lengths"] == [5, 300, 77]
    assert [by_name[name]["splits"] for name in ("smoke-b2", "smoke-split-128")] == ["auto", "of 128"]
    printed = capsys.readouterr().out
    assert "geometric mean" in printed
    assert "same bytes" in printed
    assert "absent: fa3, fa4, flashinfer: needs a CUDA device" in printed


def spoiled(when):
    """Our function, with another answer where `when` is true of its numbered call."""
    right, count = tandem_attn.flash_attn_with_kvcache, itertools.count()

    def wrong(*args, **kwargs):
        found = right(*args, **kwargs)
        return found.mul_(2) if when(next(count), kwargs) else found

    return wrong


def test_a_wrong_result_has_no_number_and_fails_the_run(tmp_path, monkeypatch, capsys):
    right = tandem_attn.flash_attn_with_kvcache

    def wrong(*args, **kwargs):
        return right(*args, **kwargs | {"causal": False})

    monkeypatch.setattr(tandem_attn, "flash_attn_with_kvcache", wrong)
    status, document = run_decode(tmp_path, "--case", "smoke-t")
    assert status == 1
    (record,) = document["cases"]
    assert not {"gb_per_s", "median_us"} & set(record["results"]["tandem"])
    assert "median_us" in record["results"]["sdpa"]
    assert record["ratios"] == {}
    assert "WRONG: tandem, smoke-tokens: out of sequence 0" in capsys.readouterr().out
    assert run_decode(tmp_path, "--case", "smoke-t", "--no-check")[0] == 0


def test_a_result_that_is_wrong_only_later_has_no_number_either(tmp_path, monkeypatch):
    wrong = spoiled(lambda call, kwargs: call >= 2)
    monkeypatch.setattr(tandem_attn, "flash_attn_with_kvcache", wrong)
    status, document = run_decode(tmp_path, "--case", "smoke-b1")
    assert status == 1
    assert document["cases"][0]["results"]["tandem"]["wrong"].startswith("after being timed, out of")


@pytest.mark.parametrize("culprit", ["tandem", "sdpa"])
def test_a_failing_provider_is_reported_and_the_others_go_on(tmp_path, monkeypatch, culprit):
    def fails(*args, **kwargs):
        raise RuntimeError("out of luck")

    if culprit == "tandem":
        monkeypatch.setattr(tandem_attn, "flash_attn_with_kvcache", fails)
    else:
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fails)
    status, document = run_decode(tmp_path, "--case", "smoke-b1")
    results = document["cases"][0]["results"]
    assert "out of luck" in results.pop(culprit)["reason"]
    assert all("median_us" in result for result in results.values())
    assert status == (1 if culprit == "tandem" else 0)


def test_a_case_that_does_not_fit_is_reported(tmp_path, monkeypatch):
    def no_memory(case, device, seed=0):
        raise torch.OutOfMemoryError("tried to allocate everything")

    monkeypatch.setattr(caches, "make", no_memory)
    status, document = run_decode(tmp_path, "--case", "smoke-b1")
    assert status == 1
    assert all("allocate" in x["reason"] for x in document["cases"][0]["results"].values())


MISTAKES = {
    "bench decode --group nope": "--group is 'nope'; supported: fa3, blog",
    "bench decode --case nope": "smoke-mixed-p16",
    "bench decode --providers tandem,nope": "'nope'; supported: tandem, sdpa, fa3",
    "bench decode --providers flashinfer": "flashinfer: needs a CUDA device",
    "bench decode --repeats 0": "at least 1",
    "bench decode --json /no/such/folder/x.json": "no folder /no/such/folder",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_one_line_and_exit_2(words, capsys):
    try:
        status = cli.main(words.split())
    except SystemExit as stop:  # argparse
        status = stop.code
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert MISTAKES[words] in line


def test_settings_have_the_defaults_of_the_options():
    parser = argparse.ArgumentParser()
    decode.add_arguments(parser)
    assert options.settings(parser.parse_args([])) == options.Settings()


def test_splits_are_what_the_backend_says_or_what_was_asked_for():
    case = case_named("smoke-b2").case
    assert decode.splits(case, "gluon: 16 rows, 128 programs, ring of 3") == "32", "2 sequences, 2 heads"
    assert decode.splits(case, "gluon: 16 rows, 2 programs") == "0.5"
    assert decode.splits(case, "gluon: 16 rows, 532 programs") == "133"
    assert decode.splits(case, "gluon: 16 rows, 7 splits") == "7"
    assert decode.splits(case, "gluon: 16 rows") == "auto"
    assert decode.splits(dataclasses.replace(case, split_size=256), "gluon: 7 splits") == "of 256"


# Timing


def test_calls_of_a_graph_are_as_many_from_each_copy():
    for one in itertools.chain.from_iterable(EVERY.values()):
        copies = caches.copies_wanted(one.kv_bytes)
        calls = decode.calls_of(one.kv_bytes, copies)
        assert calls % copies == 0
        assert copies <= calls <= 256 + copies, one.id


def test_a_graph_goes_round_the_copies_and_time_is_per_call(monkeypatch):
    """On a pretended GPU whose clock says that a replay takes a second."""
    log, last = [], torch.zeros(2)

    class Graph:
        def replay(self):
            log.append("replay")
            last.fill_(7)

    @contextlib.contextmanager
    def capture(graph):
        log.append("capture")
        yield
        log.append("captured")

    def timed(run, device, repeats, idle_ms):
        assert last.isnan().all(), "what an earlier call left must not pass for a result"
        run()
        return measure.Timing(1.0, 0.5, 2.0, repeats, 1500.0)

    def run(i):
        log.append(i)
        return last

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(measure, "time_call", timed)
    timing, found = measure.time_copies(run, 3, 6, CUDA, options.Settings(repeats=9))
    assert log == [0, "wait", "capture", 0, 1, 2, 0, 1, 2, "captured", "replay"]
    assert timing == measure.Timing(1 / 6, 0.5 / 6, 2 / 6, 9, 1500.0)
    assert found.tolist() == [7, 7]
    assert found is not last, "memory of a graph goes with it"
