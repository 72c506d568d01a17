"""Ratios of times: peers of the same run and recorded ones over ours. Above 1, we are faster."""

from __future__ import annotations

import functools
import json
import pathlib

from tandem_attn.bench.decode_cases import DecodeBenchCase
from tandem_attn.bench.peers import mean
from tandem_attn.bench.providers import OURS

RECORDED = pathlib.Path(__file__).with_name("decode_peers.json")
MARK = " (recorded)"


@functools.cache
def _file() -> dict:
    return json.loads(RECORDED.read_text())


def recorded_decode() -> dict[str, dict[str, float]]:
    """Microseconds by shape and peer."""
    return _file()["decode_bf16"]


def recorded_where() -> str:
    """Where the recorded numbers come from, in one line."""
    recorded = _file()["recorded"]
    days = "; ".join(f"{name}* {day}" for name, day in recorded["peers"].items())
    return f"recorded on one {recorded['where']} ({days}): {recorded['how']}"


def compare(record: dict, one: DecodeBenchCase, stamp: dict) -> dict:
    """The record of a case with its recorded peers and our ratios to each and to the best.

    Recorded times count only on the kind of card they were measured on.
    """
    recorded = recorded_decode().get(one.recorded_key or "", {})
    same_card = _file()["recorded"]["gpu"] in ((stamp["gpu"] or {}).get("name") or "")
    live = {
        name: result["median_us"]
        for name, result in record["results"].items()
        if name != OURS and "median_us" in result
    }
    counted = {name + MARK: us for name, us in recorded.items()} if same_card else {}
    ours = record["results"].get(OURS, {}).get("median_us")
    ratios = {} if ours is None else {name: us / ours for name, us in (live | counted).items()}
    return record | {
        "recorded": recorded,
        "ratios": ratios,
        "best_live": _best(ours, live),
        "best": _best(ours, live | counted),
    }


def _best(ours: float | None, others: dict[str, float]) -> dict | None:
    if not others:
        return None
    name = min(others, key=others.__getitem__)
    return {"name": name, "median_us": others[name], "ratio": None if ours is None else others[name] / ours}


def against(record: dict, one: DecodeBenchCase, records: list[dict]) -> dict | None:
    """Our bandwidth in this case over that in the case it is compared with, if both were measured."""
    base = next((r for r in records if (r["group"], r["id"]) == (one.group, one.against)), None)
    ours, theirs = ((r or {"results": {}})["results"].get(OURS, {}).get("gb_per_s") for r in (record, base))
    return {"id": one.against, "ratio": ours / theirs} if ours and theirs else None


def summary(records: list[dict]) -> dict:
    """Per group, and of "all" if there are several: ratios to the best and to each peer; how flat it is."""
    groups = list(dict.fromkeys(record["group"] for record in records))
    found = {group: _of([record for record in records if record["group"] == group]) for group in groups}
    return found | {"all": _of(records, flat=False)} if len(groups) > 1 else found


def _of(records: list[dict], flat: bool = True) -> dict:
    found = {"cases": len(records)}
    for kind in ("best_live", "best"):
        found[kind] = mean({r["id"]: r[kind]["ratio"] for r in records if r[kind] and r[kind]["ratio"]})
    names = dict.fromkeys(name for record in records for name in record["ratios"])
    found["peers"] = {
        name: mean({r["id"]: r["ratios"][name] for r in records if name in r["ratios"]}) for name in names
    }
    times = [r["results"][OURS]["median_us"] for r in records if flat and r["flat"] and _is_timed(r)]
    found["flat"] = max(times) / min(times) if len(times) > 1 else None
    return found


def _is_timed(record: dict) -> bool:
    return "median_us" in record["results"].get(OURS, {})
