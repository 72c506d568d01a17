"""What a benchmark leaves behind: a JSON document, a CSV file, and tables on the screen.

Tables are made from the document alone, so a saved one shows the same as a fresh one.
"""

from __future__ import annotations

import csv
import json
import os
import pathlib
import sys

from tandem_attn.bench import UserError
from tandem_attn.bench.providers import OURS, OURS_DETERMINISTIC

FORMAT = 1
RICH_HINT = "(for tables with colour and a progress bar: pip install rich)"


def new_document(kind: str, stamp: dict, settings: dict) -> dict:
    """An empty document of a run."""
    head = {"format": FORMAT, "kind": kind, "complete": False, "environment": stamp, "settings": settings}
    return head | {"cases": []}


def require_writable(*paths: pathlib.Path | None) -> None:
    """Minutes of measuring must not end in an error about a folder."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise UserError(f"{path} is a folder; supported: the name of a file")
        if not path.resolve().parent.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {path.resolve().parent}")


def save(document: dict, path: pathlib.Path | None) -> None:
    """Write JSON, whole or not at all."""
    if path is None:
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def load(path: pathlib.Path) -> dict:
    """A document written by `save`."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path} is no benchmark result of format {FORMAT}")
    return document


CSV_COLUMNS = (
    "group",
    "case",
    "provider",
    "label",
    "tflops",
    "median_us",
    "fastest_us",
    "slowest_us",
    "note",
)


def write_csv(document: dict, path: pathlib.Path) -> None:
    """One line per case and provider, recorded peers last."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        for record in document["cases"]:
            head = {"group": record["group"], "case": record["id"]}
            for name, result in record["results"].items():
                note = f"WRONG: {result['wrong']}" if "wrong" in result else result.get("reason", "")
                writer.writerow(head | {"provider": name, "note": note} | result)
            for name, tflops in record["recorded"].items():
                writer.writerow(head | {"provider": name, "tflops": tflops, "note": "recorded"})


# On the screen


def number(value: float | None) -> str:
    """Three digits or all before the point, as readable for 0.0123 as for 745."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def ratio(best: dict | None) -> str:
    """1.07 of {"ratio": 1.0693}."""
    return "" if not best or best["ratio"] is None else f"{best['ratio']:.3f}"


def cell(result: dict | None) -> str:
    """A provider's result in a table."""
    if result is None:
        return ""
    if "wrong" in result:
        return "WRONG"
    if "reason" in result:
        return "-"
    return number(result["tflops"]) if "tflops" in result else f"[{number(result['median_us'])} us]"


def line(record: dict) -> str:
    """One case in one line, printed when it is done."""
    parts = [f"{name} {cell(result)}" for name, result in record["results"].items()]
    return f"{record['id']:<24} " + ", ".join(parts)


def tables(document: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of each group."""
    found = []
    for group in dict.fromkeys(record["group"] for record in document["cases"]):
        records = [record for record in document["cases"] if record["group"] == group]
        live = list(dict.fromkeys(name for record in records for name in record["results"]))
        recorded = list(dict.fromkeys(name for record in records for name in record["recorded"]))
        header = ["case", *live, *(f"{name}*" for name in recorded)]
        header += [f"{OURS} us", "us range", "/ best live", "/ best"]
        rows = [_row(record, live, recorded) for record in records]
        if any(OURS_DETERMINISTIC in record["results"] for record in records):
            header.append("deterministic / not")
            for row, record in zip(rows, records, strict=True):
                row.append(ratio(record.get("deterministic")))
        found.append((f"{group}: {document['kind']} TFLOPS", header, rows))
    return found


def _row(record: dict, live: list[str], recorded: list[str]) -> list[str]:
    ours = record["results"].get(OURS, {})
    spread = ""
    if "median_us" in ours:
        spread = f"{number(ours['fastest_us'])} - {number(ours['slowest_us'])}"
    row = [record["id"], *(cell(record["results"].get(name)) for name in live)]
    row += [number(record["recorded"].get(name)) for name in recorded]
    return [*row, number(ours.get("median_us")), spread, ratio(record["best_live"]), ratio(record["best"])]


def remarks(document: dict) -> list[str]:
    """What the tables cannot say: absences, failures, labels, means."""
    found = absences(document)
    if any(record["recorded"] for record in document["cases"]):
        found.append(f"* {document['recorded_where']}")
    groups: dict[str, list[str]] = {}
    for record in document["cases"]:
        for name, result in record["results"].items():
            if "wrong" in result:
                found.append(f"WRONG: {name}, {record['id']}: {result['wrong']}")
                continue
            text = result.get("reason") or result.get("label")
            if text and not result.get("same_question", True):
                text = f"[timed on another question] {text}"
            if text:
                known = groups.setdefault(f"{name}: {text}", [])
                known.append(record["id"])
    found += [f"{text}  ({some(ids)})" for text, ids in groups.items()]
    for group, means in document.get("summary", {}).items():
        for kind, what in (("best_live", "best peer of this run"), ("best", "best peer, recorded ones too")):
            mean = means[kind]
            if mean["ratio"] is not None and (kind == "best_live" or mean != means["best_live"]):
                found.append(f"{group}: {OURS} is {_mean(mean, 'x the ' + what)}")
        mean = means.get("deterministic", {"ratio": None})
        if mean["ratio"] is not None:
            found.append(f"{group}: {OURS_DETERMINISTIC} is {_mean(mean, 'x ' + OURS)}")
    return found


def absences(document: dict) -> list[str]:
    """Which providers were not there, those of one reason together."""
    names: dict[str, list[str]] = {}
    for name, reason in document["providers"].items():
        if reason:
            names.setdefault(reason, []).append(name)
    return [f"absent: {', '.join(those)}: {reason}" for reason, those in names.items()]


def copy_speed(document: dict) -> str:
    """What memory gives, to judge speeds by."""
    copy = number(document["copy_gb_per_s"])
    return f"copy from the device to itself: {copy} GB/s read and written"


def _mean(mean: dict, what: str) -> str:
    lowest = f", lowest {mean['lowest']:.3f}: {mean['lowest_case']}" if "lowest" in mean else ""
    return f"{mean['ratio']:.3f} {what} (geometric mean of {mean['cases']} cases{lowest})"


def some(ids: list[str]) -> str:
    """A few names of many."""
    return ", ".join(ids) if len(ids) <= 3 else f"{ids[0]}, {ids[1]}, ... {len(ids)} cases"


def show(document: dict) -> None:
    """Print the tables and remarks."""
    print_heading(document["environment"])
    for title, header, rows in tables(document):
        print_table(title, header, rows)
    for remark in remarks(document):
        print(remark)


def print_heading(stamp: dict) -> None:
    """Where and with what."""
    where = stamp["gpu"]["name"] if stamp["gpu"] else f"{stamp['cpu']['machine']} CPU"
    print(f"\n{where}, torch {stamp['torch']}, tandem_attn {stamp['tandem_attn']}, {stamp['date']}")


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """With rich on a terminal; in plain columns in a log, or without rich."""
    hint = ""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        hint = f"  {RICH_HINT}"
    if hint or not sys.stdout.isatty():
        print(f"\n{title}{hint}\n{plain_table(header, rows)}\n")
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    needed = 2
    for i, name in enumerate(header):
        # a heading may break into words, a number never: on a narrow terminal lines break instead
        width = max([*map(len, name.split()), *(len(row[i]) for row in rows)])
        needed += width + 2
        table.add_column(name, justify="left" if i == 0 else "right", min_width=width)
    for row in rows:
        styled = [f"[bold red]{x}[/]" if x == "WRONG" else x.replace("[", "\\[") for x in row]
        table.add_row(*styled)
    console = Console(highlight=False)
    Console(highlight=False, width=max(console.width, needed)).print(table)


def plain_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell; the first aligned left."""
    lines = [header, *rows]
    widths = [max(len(row[i]) for row in lines) for i in range(len(header))]

    def aligned(row: list[str]) -> str:
        first, *rest = zip(row, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]).rstrip()

    return "\n".join([aligned(header), "  ".join("-" * width for width in widths), *map(aligned, rows)])


class Progress:
    """A bar on a terminal with rich; elsewhere nothing but the lines of `say`."""

    def __init__(self, total: int) -> None:
        self.bar = None
        if not (sys.stderr.isatty() and sys.stdout.isatty()):
            return
        try:
            from rich.console import Console
            from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError:
            return
        columns = (TextColumn("{task.description:<24}"), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()

    def next(self, name: str) -> None:
        """Work on a case begins."""
        if self.bar:
            done = self.bar.tasks[0].description != ""
            self.bar.update(self.task, description=name, advance=int(done))

    def say(self, text: str) -> None:
        """A line that stays."""
        print(text, flush=True)
