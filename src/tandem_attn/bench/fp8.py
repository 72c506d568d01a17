"""`bench fp8`: how fast attention in FP8 and over FP8 caches is, how fast numbers become FP8, and how
accurate the result is.

Each result is checked before it is timed. FlashAttention-3's e4m3 figures are not of this run: they were
recorded on the same kind of card, and cuDNN's 16-bit figures of both days say how the days compare.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable

import torch

from tandem_attn.bench import (
    cases,
    check,
    decode,
    environment,
    fp8_accuracy,
    fp8_cache,
    fp8_cases,
    fp8_plot,
    fp8_quantize,
    fp8_report,
    fp8_speed,
    options,
    peers,
    providers,
    report,
)
from tandem_attn.bench.cases import BenchCase
from tandem_attn.bench.options import Settings
from tandem_attn.bench.providers import Provider


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench fp8`."""
    known = [provider.name for provider in fp8_speed.PROVIDERS]
    options.add_arguments(parser, fp8_cases.GROUPS, known, "launches")
    drawn = "draw error against speed of every recipe (png or svg)"
    parser.add_argument("--plot", type=pathlib.Path, metavar="PATH", help=drawn)


def run(args: argparse.Namespace) -> int:
    """Measure and report. 1 if a result of ours is wrong or missing, else 0."""
    start = time.perf_counter()
    device, settings = options.device(), options.settings(args)
    if settings.checked:
        check.require_asserts()
    chosen = cases.select(args.group, args.case, device, fp8_cases.GROUPS)
    present, absent = providers.select(options.names(args.providers), device, fp8_speed.PROVIDERS)
    fp8_plot.require_format(args.plot)
    report.require_writable(args.json, args.plot)
    document = new_document(device, settings)
    document["providers"] = {provider.name: "" for provider in present} | absent
    with torch.no_grad():
        if any(isinstance(one, fp8_cases.QuantizeCase) for one in chosen):
            document["copy_gb_per_s"] = decode.copy_speed(device, settings)
        measure_all(chosen, measures(present, device, settings, document), document, args.json)
    fp8_accuracy.outliers.cache_clear()
    speeds = [record for record in document["cases"] if record["kind"] == "speed"]
    document |= {"summary": fp8_speed.summary(speeds), "complete": True}
    document["seconds"] = time.perf_counter() - start
    report.save(document, args.json)
    fp8_report.show(document)
    if args.plot:
        reason = fp8_plot.draw(args.plot, document)
        print(f"no plot: {reason}" if reason else f"plot: {args.plot.resolve()}")
    print(f"took {time.perf_counter() - start:.1f} s")
    return int(any(map(failed, document["cases"])))


def new_document(device: torch.device, settings: Settings) -> dict:
    """An empty document of a run."""
    document = report.new_document("fp8", environment.stamp(device), dataclasses.asdict(settings))
    return document | {"recorded_where": peers.recorded_where(), "copy_gb_per_s": None}


def measures(
    present: list[Provider], device: torch.device, settings: Settings, document: dict
) -> dict[type, Callable[..., dict]]:
    """By kind of case, what makes its record."""
    stamp, copy = document["environment"], document["copy_gb_per_s"]
    where = {"device": device, "settings": settings}
    return {
        BenchCase: functools.partial(fp8_speed.measure, present=present, stamp=stamp, **where),
        fp8_cases.QuantizeCase: functools.partial(fp8_quantize.measure_case, copy=copy, **where),
        fp8_cases.RecipeCase: functools.partial(fp8_accuracy.measure_recipe, **where),
        fp8_cases.LengthCase: functools.partial(fp8_accuracy.measure_length, **where),
        fp8_cases.NeedleCase: functools.partial(fp8_accuracy.measure_needle, **where),
        fp8_cache.CacheCase: functools.partial(fp8_cache.measure_case, **where),
    }


def measure_all(
    chosen: list[fp8_cases.Fp8Case],
    by_type: dict[type, Callable[..., dict]],
    document: dict,
    path: pathlib.Path | None,
) -> None:
    """Put a record of each case into the document, and save it: what is measured survives an interruption."""
    with report.Progress(len(chosen)) as progress:
        for one in chosen:
            progress.next(one.id)
            record = by_type[type(one)](one)
            document["cases"].append(record)
            progress.say(fp8_report.line(record))
            report.save(document, path)


def failed(record: dict) -> bool:
    """Whether a result of ours is wrong or missing."""
    results = record["results"]
    if record["kind"] == "speed":  # cuDNN may be missing
        results = {name: result for name, result in results.items() if name != fp8_speed.CUDNN}
    return any("wrong" in result or "reason" in result for result in results.values())
