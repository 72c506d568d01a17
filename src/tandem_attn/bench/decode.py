"""`bench decode`: attention over a KV cache in bytes per second, checked before and after it is timed.

A call is timed inside a CUDA graph of many, over copies of the cache in turn, so that K and V come from
memory and not from L2. Lengths lie on the device, and memory for results is there already.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re

import torch

import tandem_attn
from tandem_attn.bench import (
    caches,
    check,
    decode_cases,
    decode_peers,
    decode_providers,
    decode_report,
    environment,
    measure,
    options,
    providers,
    report,
)
from tandem_attn.bench.decode_cases import DecodeBenchCase
from tandem_attn.bench.decode_check import DecodeOracle
from tandem_attn.bench.options import Settings
from tandem_attn.bench.providers import OURS, Provider, reason_of
from tandem_attn.testing.decode_inputs import DecodeCase

COPY_BYTES = {"cuda": 2**30, "cpu": 2**22}
# a graph takes about as long as this at full speed: long beside its launch, short beside a timing
GRAPH_SECONDS, CALL_SECONDS, BYTES_PER_SECOND = 2e-3, 5e-6, 4e12
MOST_CALLS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench decode`."""
    known = [provider.name for provider in decode_providers.PROVIDERS]
    options.add_arguments(parser, decode_cases.GROUPS, known, "replays")


def run(args: argparse.Namespace) -> int:
    """Measure and report. 1 if a result of ours is wrong or missing, else 0."""
    device, settings = options.device(), options.settings(args)
    if settings.checked:
        check.require_asserts()
    chosen = decode_cases.select(args.group, args.case, device)
    names = options.names(args.providers)
    present, absent = providers.select(names, device, decode_providers.PROVIDERS)
    report.require_writable(args.json)
    document = report.new_document("decode", environment.stamp(device), dataclasses.asdict(settings))
    document["recorded_where"] = decode_peers.recorded_where()
    document["providers"] = {provider.name: "" for provider in present} | absent
    document["copy_gb_per_s"] = copy_speed(device, settings)
    with report.Progress(len(chosen)) as progress, torch.no_grad():
        for one in chosen:
            progress.next(one.id)
            record = measure_case(one, present, device, settings, document["copy_gb_per_s"])
            record = decode_peers.compare(record, one, document["environment"])
            record["against"] = decode_peers.against(record, one, document["cases"])
            document["cases"].append(record)
            progress.say(decode_report.line(record))
            report.save(document, args.json)  # after each case: what is measured survives an interrupted run
    document["summary"] = decode_peers.summary(document["cases"])
    document["complete"] = True
    report.save(document, args.json)
    decode_report.show(document)
    return int(any("median_us" not in r["results"].get(OURS, {"median_us": 0}) for r in document["cases"]))


def copy_speed(device: torch.device, settings: Settings) -> float:
    """GB/s of a copy from the device to itself, bytes read and written: what memory can do."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = measure.time_call(lambda: target.copy_(source), device, settings.repeats, settings.idle_ms)
    return 2 * source.nbytes / timing.median / 1e9


def measure_case(
    one: DecodeBenchCase, present: list[Provider], device: torch.device, settings: Settings, copy: float
) -> dict:
    """One case as a JSON object: what it is, how we answer it, and a result per provider that serves it."""
    record = {"group": one.group, "id": one.id, "question": question(one.case), "kv_bytes": one.kv_bytes}
    record |= {"flat": one.flat, "config": "", "splits": "", "copies": 0, "calls": 0}
    serving = [provider for provider in present if provider.serves(one.case)]
    try:
        made = caches.make(one.case, device)
    except Exception as error:  # out of memory, or a device that an earlier case broke
        return record | {"results": {provider.name: {"reason": reason_of(error)} for provider in serving}}
    record["copies"] = len(made.pairs)
    record["calls"] = calls_of(one.kv_bytes, len(made.pairs)) if device.type == "cuda" else 1
    record["config"] = explained(one.case, made)
    record["splits"] = splits(one.case, record["config"])
    oracle = DecodeOracle(one.case, made)
    record["results"] = {}
    for provider in serving:
        result = measure_provider(provider, oracle, record["calls"], settings)
        if "median_us" in result:
            result["gb_per_s"] = one.kv_bytes / result["median_us"] / 1e3
            result["of_copy"] = result["gb_per_s"] / copy
        record["results"][provider.name] = result
    return record


def question(case: DecodeCase) -> dict:
    """A case in plain numbers."""
    kept = ("batch", "heads", "kv_heads", "head_dim", "capacity", "page_size", "causal", "split_size")
    found = {name: getattr(case, name) for name in kept}
    found |= {"head_dim_v": case.dim_v, "dtype": str(case.dtype).removeprefix("torch.")}
    return found | {"tokens": case.each("tokens")[0], "lengths": _lengths(case.keys)}


def _lengths(keys: tuple[int, ...]) -> int | list[int]:
    return keys[0] if len(set(keys)) == 1 else list(keys)


def calls_of(kv_bytes: int, copies: int) -> int:
    """Calls of a graph: the same for every provider, and as many from each copy."""
    calls = min(GRAPH_SECONDS / (CALL_SECONDS + kv_bytes / BYTES_PER_SECOND), MOST_CALLS)
    return copies * math.ceil(calls / copies)


def explained(case: DecodeCase, made: caches.Caches) -> str:
    """Which backend of ours answers, and how."""
    try:
        given = decode_providers.arguments(case, made)
        found = tandem_attn.explain_with_kvcache(made.q, *made.pairs[0], **given)
    except Exception as error:  # reported by the provider too
        return reason_of(error)
    return f"{found.backend}: {found.config}"


def splits(case: DecodeCase, config: str) -> str:
    """How the keys are cut: as asked for, or in how many pieces those of a head of a sequence are, at best.

    A backend's description says so with "N splits", or "N programs" of which all get equal shares.
    """
    if case.split_size:
        return f"of {case.split_size}"
    if named := re.search(r"(\d+) splits", config):
        return named[1]
    named = re.search(r"(\d+) programs", config)
    return f"{int(named[1]) / (case.batch * case.kv_heads):.3g}" if named else "auto"


def measure_provider(provider: Provider, oracle: DecodeOracle, calls: int, settings: Settings) -> dict:
    """The result of one provider: numbers; or "wrong" and no number; or "reason" why there is neither."""
    made = oracle.caches
    try:
        call = provider.prepare(oracle.case, made)
        if settings.checked and (wrong := oracle.what_is_wrong(*call.answer())):
            return {"label": call.label, "wrong": wrong}
        timing, last = measure.time_copies(call.run, len(made.pairs), calls, made.q.device, settings)
        if settings.checked and (wrong := oracle.what_is_wrong(last, None)):
            return {"label": call.label, "wrong": f"after being timed, {wrong}"}
    except Exception as error:  # a provider that fails must not take the others with it
        return {"reason": reason_of(error)}
    return {
        "label": call.label,
        **timing.record(),
    }
