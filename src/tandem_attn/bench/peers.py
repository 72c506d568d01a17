"""Ratios to the best peer: those timed in the same run, and those recorded on an H200 in November 2026."""

from __future__ import annotations

import functools
import json
import math
import pathlib

from tandem_attn.bench.cases import BenchCase
from tandem_attn.bench.providers import OURS

RECORDED = pathlib.Path(__file__).with_name("h200_peers.json")


@functools.cache
def recorded_forward() -> dict[str, dict[str, float]]:
    """TFLOPS by cell of the grid and peer."""
    return json.loads(RECORDED.read_text())["fwd_bf16"]


@functools.cache
def recorded_gpu() -> str:
    """The card of the recorded numbers."""
    return json.loads(RECORDED.read_text())["recorded"]["gpu"]


def recorded_where() -> str:
    """Where the recorded numbers come from, in one line."""
    recorded = json.loads(RECORDED.read_text())["recorded"]
    return f"recorded on {recorded['date']}: {recorded['where']}"


def compare(record: dict, one: BenchCase, stamp: dict) -> dict:
    """The record of a case with its recorded peers and our ratios to the best: above 1, we are faster.

    Recorded numbers count only on the card they were measured on.
    """
    recorded = recorded_forward().get(one.recorded_key or "", {})
    same_card = recorded_gpu() in ((stamp["gpu"] or {}).get("name") or "")
    live = {
        name: result["tflops"]
        for name, result in record["results"].items()
        if name != OURS and "tflops" in result
    }
    counted = {f"{name} (recorded)": tflops for name, tflops in recorded.items()} if same_card else {}
    ours = record["results"].get(OURS, {}).get("tflops")
    return record | {
        "recorded": recorded,
        "best_live": _best(ours, live),
        "best": _best(ours, live | counted),
    }


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


def geometric_mean(ratios: list[float]) -> float | None:
    """None of nothing."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
