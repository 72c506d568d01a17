"""What `bench decode` shows, made from its document alone."""

from __future__ import annotations

from tandem_attn.bench.caches import ROTATED_BYTES
from tandem_attn.bench.decode_peers import MARK
from tandem_attn.bench.providers import OURS
from tandem_attn.bench.report import (
    absences,
    copy_speed,
    number,
    print_heading,
    print_table,
    ratio,
    some,
)


def cell(record: dict, name: str) -> str:
    """A peer's result in a table: its microseconds, and how many times ours that is."""
    result = record["results"].get(name)
    if result is None or "median_us" not in result:
        return "" if result is None else "WRONG" if "wrong" in result else "-"
    return _with_ratio(record, name, result["median_us"])


def _with_ratio(record: dict, name: str, us: float) -> str:
    found = record["ratios"].get(name)
    return number(us) if found is None else f"{number(us)} ({found:.2f}x)"


def line(record: dict) -> str:
    """One case in one line, printed when it is done."""
    parts = [f"{name} {cell(record, name)} us" for name in record["results"]]
    ours = record["results"].get(OURS, {})
    if "gb_per_s" in ours:
        parts[0] += f", {number(ours['gb_per_s'])} GB/s"
    return f"{record['id']:<26} " + ", ".join(parts)


def tables(document: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of each group."""
    found = []
    for group in dict.fromkeys(record["group"] for record in document["cases"]):
        records = [record for record in document["cases"] if record["group"] == group]
        live = list(dict.fromkeys(name for r in records for name in r["results"] if name != OURS))
        recorded = list(dict.fromkeys(name for record in records for name in record["recorded"]))
        compared = any(record["against"] for record in records)
        header = ["case", f"{OURS} us", "us range", "GB/s", "% of copy", "splits"]
        header += [f"{name} us" for name in live] + [f"{name}* us" for name in recorded]
        header += ["/ best live", "/ best", *(["of its baseline"] if compared else [])]
        rows = [_row(record, live, recorded, compared) for record in records]
        found.append((f"{group}: decoding, times of peers with their ratio to ours", header, rows))
    return found


def _row(record: dict, live: list[str], recorded: list[str], compared: bool) -> list[str]:
    ours = record["results"].get(OURS)
    row = [record["id"], cell(record, OURS), "", "", "", record["splits"]]
    if ours and "median_us" in ours:
        row[2] = f"{number(ours['fastest_us'])} - {number(ours['slowest_us'])}"
        row[3:5] = number(ours["gb_per_s"]), f"{100 * ours['of_copy']:.0f}"
    row += [cell(record, name) for name in live]
    for name in recorded:
        us = record["recorded"].get(name)
        row.append("" if us is None else _with_ratio(record, name + MARK, us))
    row += [ratio(record["best_live"]), ratio(record["best"])]
    return row + [ratio(record["against"])] if compared else row


def remarks(document: dict) -> list[str]:
    """What the tables cannot say: absences, failures, labels, means."""
    found = [copy_speed(document), *absences(document)]
    if any(record["recorded"] for record in document["cases"]):
        found.append(f"* {document['recorded_where']}")
    texts: dict[str, list[str]] = {}
    for record in document["cases"]:
        for name, result in record["results"].items():
            if "wrong" in result:
                found.append(f"WRONG: {name}, {record['id']}: {result['wrong']}")
            elif text := result.get("reason") or result.get("label"):
                texts.setdefault(f"{name}: {text}", []).append(record["id"])
        between = (record["copies"] - 1) * record["kv_bytes"]
        if 0 < between < ROTATED_BYTES and document["environment"]["device"] == "cuda":
            texts.setdefault("less than 268 MB read between uses of a copy", []).append(record["id"])
    found += [f"{text}  ({some(ids)})" for text, ids in texts.items()]
    found += [_against(r) for r in document["cases"] if r["against"] and r["group"] == "ragged"]
    for group, means in document.get("summary", {}).items():
        found += [f"{group}: {text}" for text in _means(means)]
    return found


def _against(record: dict) -> str:
    times = 1 / record["against"]["ratio"]
    return (
        f"{record['id']}: {times:.3f} x the time its bytes take at the bandwidth of {record['against']['id']}"
    )


def _means(means: dict) -> list[str]:
    found = []
    if means["flat"]:
        found.append(f"slowest / fastest of the rows with the same bytes: {means['flat']:.3f}")
    shown = {name: means["peers"][name] for name in means["peers"]}
    if len(shown) > 1:
        shown["the best peer"] = means["best"]
    for name, mean in shown.items():
        text = f"geometric mean {mean['ratio']:.3f}, lowest {mean['lowest']:.3f} ({mean['lowest_case']})"
        found.append(f"time of {name} / {OURS}: {text}, {mean['cases']} cases")
    return found


def show(document: dict) -> None:
    """Print the tables and remarks."""
    print_heading(document["environment"])
    for title, header, rows in tables(document):
        print_table(title, header, rows)
    for remark in remarks(document):
        print(remark)
