"""What `bench fp8` shows, made from its document alone."""

from __future__ import annotations

from tandem_attn.bench import report
from tandem_attn.bench.fp8_speed import CUDNN, FP8, PEER
from tandem_attn.bench.providers import OURS
from tandem_attn.bench.report import number, some

Table = tuple[str, list[str], list[list[str]]]  # title, header, rows


def line(record: dict) -> str:
    """One case in one line, printed when it is done."""
    shown = {
        "speed": report.cell,
        "quantize": _gb_per_s,
        "recipe": lambda result: _scientific(result) or report.cell(result),
        "length": lambda result: _cell(result, "relative", _of_one),
        "needle": lambda result: _cell(result, "through", _share),
        "cache": lambda result: _cell(result, "median_us", lambda value: f"{number(value)} us"),
    }[record["kind"]]
    parts = [f"{name} {shown(result)}" for name, result in record["results"].items()]
    return f"{record['id']:<28} " + ", ".join(parts)


def _cell(result: dict | None, key: str, form) -> str:
    """A number of a result in a table."""
    if result is None:
        return ""
    return "WRONG" if "wrong" in result else "-" if "reason" in result else form(result[key])


def _of_one(value: float) -> str:
    return f"{value:.2e}"


def _share(value: float) -> str:
    return f"{value:.4f}"


def _scientific(result: dict) -> str:
    return _of_one(result["rmse"]) if "rmse" in result else ""


def _gb_per_s(result: dict) -> str:
    return _cell(result, "gb_per_s", lambda value: f"{number(value)} GB/s")


def tables(document: dict) -> list[Table]:
    """A table per group and kind."""
    found = []
    makers = {
        "speed": _speed,
        "quantize": _quantize,
        "recipe": _recipes,
        "length": _lengths,
        "needle": _needles,
        "cache": _caches,
    }
    for group in dict.fromkeys(record["group"] for record in document["cases"]):
        for kind, make in makers.items():
            records = [r for r in document["cases"] if (r["group"], r["kind"]) == (group, kind)]
            if records:
                title, header, rows = make(records)
                found.append((f"{group}: {title}", header, rows))
    return found


def _speed(records: list[dict]) -> Table:
    live = list(dict.fromkeys(name for record in records for name in record["results"]))
    ours = [name for name in FP8 if name in live]
    header = ["case", *live, f"{PEER}*", *(f"{name} / {PEER}*" for name in ours), f"{CUDNN} / recorded"]
    rows = []
    for record in records:
        row = [record["id"], *(report.cell(record["results"].get(name)) for name in live)]
        row.append(number(record["recorded"].get(PEER)))
        row += [_ratio(record["to_recorded"].get(name)) for name in ours]
        rows.append([*row, _ratio(record["card"])])
    return "forward TFLOPS in FP8", header, rows


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _quantize(records: list[dict]) -> Table:
    header = ["case", "MB read and written", "us", "us range", "GB/s", "% of copy"]
    rows = []
    for record in records:
        result = record["results"][OURS]
        row = [record["id"], number(record["bytes"] / 1e6), _cell(result, "median_us", number), "", "", ""]
        if "median_us" in result:
            row[3] = f"{number(result['fastest_us'])} - {number(result['slowest_us'])}"
            row[4:] = number(result["gb_per_s"]), f"{100 * result['of_copy']:.0f}"
        rows.append(row)
    return "quantization", header, rows


def _recipes(records: list[dict]) -> Table:
    header = ["case", "RMSE", "paper", "/ RMS", "worst", "TFLOPS", "with quantization"]
    rows = []
    for record in records:
        found = record["results"]
        row = [record["id"], *(_cell(found["error"], key, _of_one) for key in ("rmse", "relative", "worst"))]
        row.insert(2, "" if record["paper"] is None else _of_one(record["paper"]))
        rows.append([*row, *(report.cell(found.get(what)) for what in ("speed", "speed_total"))])
    shapes = dict.fromkeys(f"{_shape(r['question'])}{_around(r['means'])}" for r in records)
    return f"error on inputs with outliers, {'; '.join(shapes)}", header, rows


def _around(means: dict) -> str:
    if not any(means.values()):
        return ""
    return f", channels of K around N(0, {means['k'] ** 2:g}), of V around N(0, {means['v'] ** 2:g})"


def _shape(asked: dict) -> str:
    return f"batch {asked['batch']}, {asked['heads']} heads of {asked['head_dim']}, {asked['seqlen_k']} keys"


def _lengths(records: list[dict]) -> Table:
    names = list(dict.fromkeys(name for record in records for name in record["results"]))
    rows = [
        [str(r["keys"]), *(_cell(r["results"].get(name), "relative", _of_one) for name in names)]
        for r in records
    ]
    title = f"RMSE / RMS by number of keys, standard normal, {records[0]['queries']} queries"
    return title, ["keys", *names], rows


def _needles(records: list[dict]) -> Table:
    names = list(dict.fromkeys(name for record in records for name in record["results"]))
    rows = []
    for record in records:
        exact = record["exact"] and _share(record["exact"]["through"])
        row = [f"{record['place']} of {record['keys']}", exact or "-"]
        for name in names:
            result = record["results"].get(name)
            row += [_cell(result, key, _share) for key in ("through", "farthest")]
        rows.append(row)
    header = ["needle at key", "exact", *(text for name in names for text in (name, "its worst head"))]
    return "how much of the needle's answer comes through", header, rows


def _caches(records: list[dict]) -> Table:
    names = list(dict.fromkeys(name for record in records for name in record["results"]))
    header = ["case", "MB in bf16", *(f"{name} us" for name in names)]
    header += [f"tokens/s, {name} / {names[0]}" for name in names[1:]]
    rows = []
    for record in records:
        found = record["results"]
        row = [record["id"], number(record["bf16_bytes"] / 2**20)]
        row += [_cell(found.get(name), "median_us", number) for name in names]
        rows.append([*row, *(_times(found.get(name)) for name in names[1:])])
    return "attention over a KV cache in e4m3", header, rows


def _times(result: dict | None) -> str:
    return f"{result['tokens_of_bf16']:.2f}" if result and "tokens_of_bf16" in result else ""


def remarks(document: dict) -> list[str]:
    """What the tables cannot say: absences, failures, means."""
    found = report.absences(document)
    if document["copy_gb_per_s"]:
        found.append(report.copy_speed(document))
    if any(record.get("recorded") for record in document["cases"]):
        found.append(f"* not in this run: {document['recorded_where']}")
    texts: dict[str, list[str]] = {}
    for record in document["cases"]:
        for name, result in record["results"].items():
            if "wrong" in result:
                found.append(f"WRONG: {name}, {record['id']}: {result['wrong']}")
            elif text := result.get("reason") or result.get("label"):
                texts.setdefault(f"{name}: {text}", []).append(record["id"])
    found += [f"{text}  ({some(ids)})" for text, ids in texts.items()]
    for group, means in document.get("summary", {}).items():
        found += [f"{group}: {text}" for text in _means(means)]
    return found


def _means(means: dict) -> list[str]:
    what = {"to_recorded": f"{PEER} as recorded", "to_bf16": "ours in bf16 of this run"}
    found = [
        f"{name} is {mean_text(mean, f'x {what[kind]}')}"
        for kind in what
        for name, mean in means[kind].items()
        if mean["ratio"] is not None
    ]
    if means["card"]["ratio"] is not None:
        text = mean_text(means["card"], "x cuDNN as recorded")
        found.append(
            f"the card: cuDNN in bf16 is today {text}: above 1, it is faster than the recorded one was"
        )
    return found


def mean_text(mean: dict, what: str) -> str:
    """A geometric mean with its lowest case."""
    lowest = f"lowest {mean['lowest']:.3f}: {mean['lowest_case']}"
    return f"{mean['ratio']:.3f} {what} (geometric mean of {mean['cases']} cases, {lowest})"


def show(document: dict) -> None:
    """Print the tables and remarks."""
    report.print_heading(document["environment"])
    for title, header, rows in tables(document):
        report.print_table(title, header, rows)
    for remark in remarks(document):
        print(remark)
