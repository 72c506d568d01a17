#!/usr/bin/env python3
"""Rewrite the tables of README.md from benchmarks/results/*.json, so that no number is typed by hand.

A table lies between `<!-- table: NAME -->` and `<!-- /table -->`. NAME is forward-GROUP, backward-GROUP,
train-GROUP, decode-GROUP or fp8-GROUP (a group of `bench forward` and so on), generate or overhead, and may
be followed by the name of a result file; without it the newest result that holds such numbers is taken. A
decode table of no result says so, and one of fp8 is empty. With --check nothing is written, and the exit
status is 1 if something would be.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- table: ([^\n]*?) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
OPENING = re.compile(r"<!-- table: ")
OURS = "tandem"
OURS_DETERMINISTIC = "tandem-attn deterministic"
RECORDED = " (recorded)"
STAR = "\\* recorded earlier on a card of the same kind, not in this run."
NOT_MEASURED = "Not measured yet."
# benchmarks in TFLOPS: of what
TFLOPS = {
    "forward": "the forward pass",
    "backward": "the backward pass alone, 2.5 times the forward's operations",
    "train": "forward and backward together, 3.5 times the forward's operations",
}


class TableError(Exception):
    """A marker or a result that no table can be made of."""


class NoResult(TableError):
    """Nothing of the kind has been measured."""


def main(argv: list[str] | None = None) -> int:
    """0 if the document is, or now is, up to date; 1 if --check finds it is not; 2 if it cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if something is out of date")
    parser.add_argument("--readme", type=pathlib.Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    try:
        before = args.readme.read_text()
        after, stale = rewritten(before, args.results)
    except (OSError, TableError) as error:
        print(f"{args.readme.name}: {error}", file=sys.stderr)
        return 2
    if args.check:
        for name in stale:
            print(f"{args.readme.name}: table {name!r} is out of date; run tools/readme_tables.py")
        return int(bool(stale))
    if stale:
        args.readme.write_text(after)
        print(f"{args.readme.name}: rewrote {', '.join(stale)}")
    return 0


def rewritten(document: str, results: pathlib.Path) -> tuple[str, list[str]]:
    """The document with fresh tables, and the names of those that changed."""
    if len(OPENING.findall(document)) != len(MARKED.findall(document)):
        raise TableError("a table marker is not closed by <!-- /table -->, each on a line of its own")
    stale: list[str] = []

    def fresh(match: re.Match) -> str:
        opening, name, body, closing = match.groups()
        made = table(name, results)
        if made != body:
            stale.append(name)
        return opening + made + closing

    return MARKED.sub(fresh, document), stale


def table(name: str, results: pathlib.Path) -> str:
    """The Markdown of a table by its marker's name."""
    kind, _, file = name.partition(" ")
    benchmark, _, group = kind.partition("-")
    if kind in ("overhead", "generate"):
        path, document = _result(results, file, lambda d: d["kind"] == kind, name)
        lines = {"overhead": overhead_table, "generate": generate_table}[kind](document)
    elif benchmark in TFLOPS and group:
        path, document = _result(results, file, lambda d: _holds(d, benchmark, group), name)
        records = [record for record in document["cases"] if record["group"] == group]
        lines = grid_table(records) if group == "grid" else group_table(records)
        lines += ["", *notes(document, group, records)]
    elif benchmark == "decode" and group:
        try:
            path, document = _result(results, file, lambda d: _holds(d, "decode", group), name)
        except NoResult:
            if file:
                raise
            return NOT_MEASURED + "\n"
        records = [record for record in document["cases"] if record["group"] == group]
        lines = [*decode_table(records), "", decode_notes(document, group, records)]
    elif benchmark == "fp8" and group in FP8:
        try:
            path, document = _result(results, file, lambda d: _holds(d, "fp8", group), name)
        except NoResult:
            if file:
                raise
            return ""
        records = [record for record in document["cases"] if record["group"] == group]
        lines = FP8[group](document, records)
    else:
        known = ["overhead", "generate", *(f"{one}-GROUP" for one in (*TFLOPS, "decode"))]
        known = ", ".join([*known, *(f"fp8-{one}" for one in FP8)])
        raise TableError(f"table {name!r} is unknown; supported: {known}")
    return "\n".join([*lines, "", source(path, document), ""])


def _holds(document: dict, kind: str, group: str) -> bool:
    return document["kind"] == kind and any(r["group"] == group for r in document["cases"])


def _result(results: pathlib.Path, file: str, wanted, name: str) -> tuple[pathlib.Path, dict]:
    """The named result, or the newest that is wanted."""
    paths = [results / file.strip()] if file else sorted(results.glob("*.json"))
    found = []
    for path in paths:
        try:
            document = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise TableError(f"cannot read {path}: {error}") from error
        if "kind" in document and wanted(document):
            found.append((document["environment"]["date"], path, document))
    if not found:
        raise NoResult(f"no result in {results} has what table {name!r} shows")
    _, path, document = max(found, key=lambda entry: entry[:2])
    if not document["complete"]:
        raise TableError(f"{path.name} is of a run that was cut off")
    return path, document


def grid_table(records: list[dict]) -> list[str]:
    """A row per head_dim and mask, a column per length: ours / best peer = ratio."""
    seqlens = sorted({record["question"]["seqlen_k"] for record in records})
    rows: dict[tuple, dict[int, dict]] = {}
    for record in records:
        asked = record["question"]
        rows.setdefault((asked["head_dim"], asked["causal"]), {})[asked["seqlen_k"]] = record
    header = ["head_dim", "mask", *map(_thousands, seqlens)]
    body = [
        [str(head_dim), "causal" if causal else "full", *(_against(row.get(s)) for s in seqlens)]
        for (head_dim, causal), row in sorted(rows.items())
    ]
    return markdown(header, body)


def _thousands(seqlen: int) -> str:
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)


def _against(record: dict | None) -> str:
    if record is None:
        return ""
    ours, best = record["results"].get(OURS), record["best"]
    if best is None or best["ratio"] is None:
        return _cell(ours)
    return f"**{_number(ours['tflops'])}** / {_peer(best)} = {best['ratio']:.2f}"


def _peer(best: dict) -> str:
    """588 fa3*: the star says recorded."""
    name = best["name"].removesuffix(RECORDED).removeprefix("sdpa-")
    return f"{_number(best['tflops'])} {name}" + ("\\*" if best["name"].endswith(RECORDED) else "")


def group_table(records: list[dict]) -> list[str]:
    """A row per case, a column per provider, and our ratio to the best of them."""
    names = list(dict.fromkeys(name for record in records for name in record["results"]))
    names = [name for name in names if any(_has_number(record, name) for record in records)]
    body = []
    for record in records:
        best = record["best"]
        ratio = "" if best is None or best["ratio"] is None else f"{best['ratio']:.2f}"
        body.append([record["id"], *(_cell(record["results"].get(name)) for name in names), ratio])
    return markdown(["case", *names, f"{OURS} / best peer"], body)


def _has_number(record: dict, name: str) -> bool:
    return name == OURS or "median_us" in record["results"].get(name, {})


def _cell(result: dict | None) -> str:
    if result is None or "reason" in result:
        return "-"
    if "wrong" in result:
        return "wrong result"
    if "tflops" in result:
        return _number(result["tflops"])
    return f"({result['median_us']:.0f} us: {result['label']})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def notes(document: dict, group: str, records: list[dict]) -> list[str]:
    """How to read a table of TFLOPS."""
    found = [f"TFLOPS of {TFLOPS[document['kind']]}; more is better."]
    means = document["summary"][group]
    if means["best"]["ratio"] is not None:
        found.append(f"Geometric mean of {OURS} / best peer: {_mean(means['best'])}.")
    if means.get("deterministic", {"ratio": None})["ratio"] is not None:
        what = f"{OURS_DETERMINISTIC} / {OURS}"
        found.append(f"Geometric mean of {what}: {_mean(means['deterministic'])}.")
    if any((record["best"] or {"name": ""})["name"].endswith(RECORDED) for record in records):
        found.append(STAR)
    return [" ".join(found)]


def _mean(mean: dict) -> str:
    lowest = f", lowest {mean['lowest']:.3f} ({mean['lowest_case']})" if "lowest" in mean else ""
    return f"**{mean['ratio']:.3f}** over {mean['cases']} cases{lowest}"


def decode_table(records: list[dict]) -> list[str]:
    """A row per case: our time and bandwidth, the best peer, and the case it is compared with if any is."""
    compared = any(record["against"] for record in records)
    header = ["case", "us", "GB/s", "% of copy", "splits", f"best peer us = x {OURS}"]
    body = []
    for record in records:
        ours = record["results"].get(OURS, {})
        row = [record["id"], *(["wrong result" if "wrong" in ours else "-"] + [""] * 3)]
        if "median_us" in ours:
            numbers = (_number(ours["median_us"]), _number(ours["gb_per_s"]), f"{100 * ours['of_copy']:.0f}")
            row = [record["id"], f"**{numbers[0]}**", *numbers[1:], _plain(record["splits"])]
        row.append(_slower(record["best"]))
        if compared:
            row.append(f"{record['against']['ratio']:.3f}" if record["against"] else "")
        body.append(row)
    return markdown([*header, *(["bandwidth / baseline's"] if compared else [])], body)


def _plain(splits: str) -> str:
    """130 for 1.3e+02; what is no number as it is."""
    return f"{float(splits):g}" if "e+" in splits else splits


def _slower(best: dict | None) -> str:
    """19.6 fa3* = 1.62: the star says recorded."""
    if best is None:
        return ""
    name = best["name"].removesuffix(RECORDED) + ("\\*" if best["name"].endswith(RECORDED) else "")
    times = "" if best["ratio"] is None else f" = {best['ratio']:.2f}"
    return f"{_number(best['median_us'])} {name}{times}"


def decode_notes(document: dict, group: str, records: list[dict]) -> str:
    """How to read a table of times over a KV cache."""
    copy = _number(document["copy_gb_per_s"])
    found = [f"GB/s of the keys and values in use; a copy reaches {copy} GB/s, read and written."]
    means = document["summary"][group]
    best, flat = means["best"], means["flat"]
    if best["ratio"] is not None:
        found.append(
            f"Best peer's time / {OURS}: geometric mean **{best['ratio']:.3f}**, lowest {best['lowest']:.3f} "
            f"({best['lowest_case']}), over {best['cases']} cases."
        )
    for peer, mean in means["peers"].items():
        if peer.endswith(RECORDED) and mean["ratio"] is not None:
            found.append(
                f"Time of {peer.removesuffix(RECORDED)}\\* / {OURS}: geometric mean **{mean['ratio']:.3f}**, "
                f"lowest {mean['lowest']:.3f} ({mean['lowest_case']}), over {mean['cases']} cases."
            )
    if flat:
        found.append(f"Slowest / fastest of the rows with the same bytes: **{flat:.3f}**.")
    bases = dict.fromkeys(record["against"]["id"] for record in records if record["against"])
    if bases:
        found.append(f"Baselines: {', '.join(bases)}.")
    starred = (record["best"]["name"] for record in records if record["best"])
    if any(name.endswith(RECORDED) for name in (*starred, *means["peers"])):
        found.append(STAR)
    return " ".join(found)


def generate_table(document: dict) -> list[str]:
    """Tokens per second of a model behind prompts of several lengths."""
    body = []
    for record in document["cases"]:
        results = record["results"]
        cells = [_tokens(results.get(name, {})) for name in (OURS, "sdpa")]
        ratio = "" if record["ratio"] is None else f"{record['ratio']:.3f}"
        body.append([_thousands(record["prompt"]), *cells, ratio])
    model = document["model"]
    lines = markdown(["prompt", f"{OURS} tokens/s", "sdpa tokens/s", "ratio"], body)
    facts = f"{model['layers']} layers of {model['name']}, random weights, batch {model['batch']}"
    return [*lines, "", f"{facts}; {document['remark']}."]


def _tokens(result: dict) -> str:
    if "wrong" in result:
        return "wrong result"
    return f"{result['tokens_per_second']:.1f}" if "tokens_per_second" in result else "-"


def overhead_table(document: dict) -> list[str]:
    """Host time per call of each function."""
    body = [
        [one["id"], f"{one['median_us']:.1f}" if "median_us" in one else "-"] for one in document["cases"]
    ]
    lines = markdown(["function", "host microseconds per call"], body)
    return [*lines, "", document["remark"]] if document["remark"] else lines


def fp8_grid(document: dict, records: list[dict]) -> list[str]:
    """A row per head_dim and mask, a column per length: ours / FlashAttention-3's = ratio; and the means."""
    seqlens = sorted({record["question"]["seqlen_k"] for record in records})
    rows: dict[tuple, dict[int, dict]] = {}
    for record in records:
        asked = record["question"]
        rows.setdefault((asked["head_dim"], asked["causal"]), {})[asked["seqlen_k"]] = record
    body = [
        [str(head_dim), "causal" if causal else "full", *(_against_fa3(row.get(s)) for s in seqlens)]
        for (head_dim, causal), row in sorted(rows.items())
    ]
    means = document["summary"]["grid"]
    found = ["TFLOPS of the forward pass in FP8, tensors quantized beforehand; more is better."]
    found += [
        f"Geometric mean of {name} {FP8_INPUTS[name]} / fa3\\*: {_mean(mean)}."
        for name, mean in means["to_recorded"].items()
        if mean["ratio"] is not None
    ]
    mean = means["to_bf16"].get(OURS)
    if mean and mean["ratio"] is not None:
        found.append(f"FP8 / our bf16 of the same run: {_mean(mean)}.")
    if means["card"]["ratio"] is not None:
        found.append(
            f"cuDNN's bf16 in this run / recorded, which says how the cards compare: {_mean(means['card'])}."
        )
    if any(record["recorded"] for record in records):
        found.append(STAR)
    return [*markdown(["head_dim", "mask", *map(_thousands, seqlens)], body), "", " ".join(found)]


def _against_fa3(record: dict | None) -> str:
    """976 / 977 fa3* = 1.00."""
    if record is None:
        return ""
    ours, ratio = record["results"].get(OURS), record["to_recorded"].get(OURS)
    if ratio is None:
        return _cell(ours)
    return f"**{_number(ours['tflops'])}** / {_number(record['recorded']['fa3'])} fa3\\* = {ratio:.2f}"


def fp8_quantize(document: dict, records: list[dict]) -> list[str]:
    """A row per shape and recipe: bandwidth."""
    body = []
    for record in records:
        result = record["results"][OURS]
        row = [record["id"], record["recipe"], _fp8_cell(result, "gb_per_s", _number)]
        body.append([*row, _fp8_cell(result, "of_copy", lambda value: f"{100 * value:.0f}")])
    lines = markdown(["case", "recipe", "GB/s", "% of copy"], body)
    copy = _number(document["copy_gb_per_s"])
    return [
        *lines,
        "",
        f"Each byte counts once, read or written; a copy reaches {copy} GB/s in the same run.",
    ]


def fp8_recipes(document: dict, records: list[dict]) -> list[str]:
    """A row per recipe: error as in FlashAttention-3's paper, and speed."""
    body = []
    for record in records:
        found = record["results"]
        paper = "" if record["paper"] is None else _error(record["paper"])
        row = [record["row"], record["recipe"], _fp8_cell(found["error"], "rmse", _error), paper]
        speeds = (found.get(what) for what in ("speed", "speed_total"))
        body.append([*row, *("" if speed is None else _cell(speed) for speed in speeds)])
    asked = records[0]["question"]
    lines = markdown(["", "recipe", "RMSE", "paper", "TFLOPS", "quantization included"], body)
    shape = f"batch {asked['batch']}, {asked['heads']} heads of {asked['head_dim']}, {asked['seqlen_k']} keys"
    return [*lines, "", f"Inputs N(0, 1) + N(0, 100) Bernoulli(0.001), error against float64; {shape}, full."]


def fp8_means(document: dict, records: list[dict]) -> list[str]:
    """A row per recipe: error where channels of K and V lie around something."""
    body = [
        [record["row"], record["recipe"], _fp8_cell(record["results"]["error"], "rmse", _error)]
        for record in records
    ]
    means = records[0]["means"]
    around = f"of K around N(0, {means['k'] ** 2:g}), of V around N(0, {means['v'] ** 2:g})"
    return [*markdown(["", "recipe", "RMSE"], body), "", f"The same, channels {around}."]


def fp8_lengths(document: dict, records: list[dict]) -> list[str]:
    """A row per way of answering, a column per number of keys: relative error."""
    names = dict.fromkeys(name for record in records for name in record["results"])
    body = [
        [name, *(_fp8_cell(record["results"].get(name), "relative", _error) for record in records)]
        for name in names
    ]
    lines = markdown(["keys", *(_thousands(record["keys"]) for record in records)], body)
    return [*lines, "", "RMSE over the RMS of the output, standard normal inputs."]


def fp8_needle(document: dict, records: list[dict]) -> list[str]:
    """A row per way of answering, a column per place of the needle: how much comes through."""

    def share(value: float) -> str:
        return f"{value:.4f}"

    names = dict.fromkeys(name for record in records for name in record["results"])
    body = [
        [name, *(_fp8_cell(record["results"].get(name), "through", share) for record in records)]
        for name in names
    ]
    lines = markdown(["needle at key", *(str(record["place"]) for record in records)], body)
    keys = _thousands(records[0]["keys"])
    return [
        *lines,
        "",
        f"How much of the answer comes through, of one key among {keys} that matches; 1 is all.",
    ]


def fp8_cache(document: dict, records: list[dict]) -> list[str]:
    """A row per shape: times over caches in bfloat16 and in e4m3, and how many times the tokens."""
    names = list(dict.fromkeys(name for record in records for name in record["results"]))
    body = []
    for record in records:
        found = record["results"]
        row = [record["id"].removeprefix("cache-"), _number(record["bf16_bytes"] / 2**20)]
        row += [_fp8_cell(found.get(name), "median_us", _number) for name in names]
        row += [_fp8_cell(found.get(name), "tokens_of_bf16", lambda x: f"**{x:.2f}**") for name in names[1:]]
        body.append(row)
    header = ["case", "MB in bf16", *(f"{name} us" for name in names)]
    lines = markdown([*header, *(f"{name}: tokens/s" for name in names[1:])], body)
    said = "Tokens per second as times those of the bf16 cache; -pN: pages of N keys, -tN: N tokens of a sequence"
    return [*lines, "", f"{said}, -append: the call writes the last key, too."]


def _fp8_cell(result: dict | None, key: str, form) -> str:
    if result is None or "reason" in result:
        return "-"
    return "wrong result" if "wrong" in result else form(result[key])


def _error(value: float) -> str:
    return f"{value:.1e}"


# what each of ours in `bench fp8` starts from
FP8_INPUTS = {
    OURS: "(quantized beforehand)",
    "tandem-fa3": "(plain e4m3, a factor per head, V transposed in the call)",
    "tandem-total": "(from bf16, quantization included)",
}
FP8 = {
    "grid": fp8_grid,
    "quantize": fp8_quantize,
    "recipes": fp8_recipes,
    "means": fp8_means,
    "lengths": fp8_lengths,
    "needle": fp8_needle,
    "cache": fp8_cache,
}


def source(path: pathlib.Path, document: dict) -> str:
    """Where the numbers come from, in one line."""
    stamp = document["environment"]
    card = stamp["gpu"]["name"] if stamp["gpu"] else f"{stamp['cpu']['machine']} CPU"
    commit = stamp["git"]["commit"]
    code = f"commit {commit[:10]}" if commit else f"source {stamp['source_digest']}"
    facts = [card, f"torch {stamp['torch']}", f"Triton {stamp['triton']}", stamp["date"][:10], code]
    return f"<sub>{', '.join(facts)}; from `benchmarks/results/{path.name}`</sub>"


def markdown(header: list[str], body: list[list[str]]) -> list[str]:
    """The lines of a Markdown table, numbers to the right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return ["| " + " | ".join(row) + " |" for row in (header, rule, *body)]


if __name__ == "__main__":
    sys.exit(main())
