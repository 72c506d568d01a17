"""Ratios to the best peer: those timed in the same run, and those recorded on an H200 in November 2026."""

from __future__ import annotations

import functools
import json
import math
import pathlib

from tandem_attn.bench.cases import BenchCase
from tandem_attn.bench.providers import OURS, OURS_DETERMINISTIC

RECORDED = pathlib.Path(__file__).with_name("h200_peers.json")


@functools.cache
def _file() -> dict:
    return json.loads(RECORDED.read_text())


def recorded_forward() -> dict[str, dict[str, float]]:
    """TFLOPS by cell of the grid and peer."""
    return _file()["fwd_bf16"]


def recorded_backward() -> dict[str, dict[str, float]]:
    """TFLOPS of the backward alone by cell of the grid and peer."""
    return _file()["bwd_bf16"]


def recorded_fp8() -> dict[str, dict[str, float]]:
    """TFLOPS of the forward of e4m3 inputs by cell of the grid and peer."""
    return _file()["fwd_fp8"]


def recorded_gpu() -> str:
    """The card of the recorded numbers."""
    return _file()["recorded"]["gpu"]


def recorded_where() -> str:
    """Where the recorded numbers come from, in one line."""
    recorded = _file()["recorded"]
    return f"recorded on {recorded['date']}: {recorded['where']}"


def same_card(stamp: dict) -> bool:
    """Whether a run's environment has a card of the kind that the recorded numbers are of."""
    return recorded_gpu() in ((stamp["gpu"] or {}).get("name") or "")


def compare(record: dict, one: BenchCase, stamp: dict, table: dict | None = None) -> dict:
    """The record of a case with its recorded peers and our ratios to the best: above 1, we are faster.

    Recorded numbers, by default the forward's, count only on the card they were measured on. Where our
    deterministic variant was asked too, its ratio to ours is there, and it is nobody's peer.
    """
    table = recorded_forward() if table is None else table
    recorded = table.get(one.recorded_key or "", {})
    live = {
        name: result["tflops"]
        for name, result in record["results"].items()
        if name not in (OURS, OURS_DETERMINISTIC) and "tflops" in result
    }
    counted = {f"{name} (recorded)": tflops for name, tflops in recorded.items()} if same_card(stamp) else {}
    ours, deterministic = (
        record["results"].get(name, {}).get("tflops") for name in (OURS, OURS_DETERMINISTIC)
    )
    found = record | {
        "recorded": recorded,
        "best_live": _best(ours, live),
        "best": _best(ours, live | counted),
    }
    if OURS_DETERMINISTIC in record["results"]:
        found["deterministic"] = {"ratio": deterministic / ours} if deterministic and ours else None
    return found


def _best(ours: float | None, others: dict[str, float]) -> dict | None:
    if not others:
        return None
    name = max(others, key=others.__getitem__)
    ratio = None if ours is None else ours / others[name]
    return {"name": name, "tflops": others[name], "ratio": ratio}


def summary(records: list[dict]) -> dict:
    """Per group: geometric means of both ratios, and over how many cases."""
    found = {}
    for group in dict.fromkeys(record["group"] for record in records):
        mine = [record for record in records if record["group"] == group]
        found[group] = {"cases": len(mine)}
        for kind in ("best_live", "best"):
            ratios = [r[kind]["ratio"] for r in mine if r[kind] and r[kind]["ratio"] is not None]
            found[group][kind] = {"cases": len(ratios), "ratio": geometric_mean(ratios)}
    return found


def gradient_summary(records: list[dict]) -> dict:
    """The same with the lowest cell of each, and of our deterministic variant over ours."""
    found = summary(records)
    for group, means in found.items():
        mine = [record for record in records if record["group"] == group]
        for kind in ("best_live", "best", "deterministic"):
            known = {r["id"]: r[kind]["ratio"] for r in mine if r.get(kind) and r[kind]["ratio"] is not None}
            means[kind] = mean(known)
    return found


def mean(ratios: dict[str, float]) -> dict:
    """Geometric mean and lowest by case; None of nothing."""
    lowest = min(ratios, key=ratios.__getitem__, default=None)
    found = geometric_mean(list(ratios.values()))
    return {"cases": len(ratios), "ratio": found, "lowest": ratios.get(lowest), "lowest_case": lowest}


def geometric_mean(ratios: list[float]) -> float | None:
    """None of nothing."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
