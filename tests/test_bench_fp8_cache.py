"""Benchmark of caches in e4m3: all answer one question, wrong answers have no figure, ratios are of times."""

import pytest
import torch

from tandem_attn.bench import fp8_cache, fp8_cases, fp8_report
from tandem_attn.bench.fp8_cache import BF16, BLOCKS, SEQUENCES, Fp8Caches
from tandem_attn.bench.options import Settings

CPU = torch.device("cpu")
SETTINGS = Settings(repeats=1, idle_ms=0.0)
SMALL = fp8_cache.made("smoke", fp8_cache.SMOKE, fp8_cache.SMOKE)


def test_bfloat16_holds_the_very_numbers_of_e4m3():
    made = Fp8Caches.make(SMALL[1].case, CPU)
    for plain, small, factor in zip(made.plain.pairs[0], made.pairs[0], made.factors, strict=True):
        assert torch.equal(small.double() * factor, plain.double())
        assert plain.double().abs().amax() > 224 * factor, "a factor of half the size would do"
    assert torch.equal(made.plain.q.to(torch.float8_e4m3fn).to(torch.bfloat16), made.plain.q)


def test_shapes_are_large_and_of_every_kind():
    cases = fp8_cases.GROUPS["cache"]()
    assert len({one.id for one in cases}) == len(cases)
    sizes = [fp8_cache.decode_cases.kv_bytes(one.case) / 2**20 for one in cases]
    assert min(sizes) == 128 and sorted(sizes)[1] == 512
    assert {one.case.head_dim for one in cases} == {64, 128, 256}
    assert {one.appends for one in cases} == {True, False}
    assert {one.case.page_size for one in cases} >= {0, 16, 64, 128}


@pytest.mark.parametrize("one", SMALL, ids=lambda one: one.id)
def test_a_record_has_times_and_their_ratio(one):
    record = fp8_cache.measure_case(one, CPU, SETTINGS)
    names = [BF16, BLOCKS] if one.appends else [BF16, BLOCKS, SEQUENCES]
    assert list(record["results"]) == names
    base = record["results"][BF16]["median_us"]
    for result in record["results"].values():
        assert result["tokens_of_bf16"] == pytest.approx(base / result["median_us"])
    title, header, rows = fp8_report.tables({"cases": [record]})[0]
    assert "cache" in title and len(rows[0]) == len(header)


@pytest.mark.parametrize("name", [BF16, BLOCKS, SEQUENCES])
def test_a_wrong_result_has_no_figure(monkeypatch, name):
    made, right = SMALL[0], fp8_cache._call

    def off(one, of, caches):
        call = right(one, of, caches)

        def shifted(i, **more):
            found = call(i, **more)
            return (found[0] + 0.1, *found[1:]) if more else found

        return shifted if of == name else call

    monkeypatch.setattr(fp8_cache, "_call", off)
    results = fp8_cache.measure_case(made, CPU, SETTINGS)["results"]
    assert [x for x in results if "wrong" in results[x]] == [name]
    assert "median_us" not in results[name]
