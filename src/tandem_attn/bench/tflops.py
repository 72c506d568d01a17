"""What `bench forward`, `bench backward` and `bench train` share: every case by every provider, checked
before it is timed, in TFLOPS.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Callable

import torch

import tandem_attn
from tandem_attn.bench import cases, check, environment, measure, options, peers, providers, report
from tandem_attn.bench.cases import BenchCase
from tandem_attn.bench.options import Settings
from tandem_attn.bench.providers import OURS, OURS_DETERMINISTIC, Provider
from tandem_attn.testing import Inputs


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What sets one of these benchmarks apart."""

    name: str
    work: float  # operations, in those of the forward
    groups: dict[str, Callable[[], list[BenchCase]]]
    providers: list[Provider]
    oracle: Callable  # (case, inputs) -> an object with `inputs` and `what_is_wrong(*answer of a call)`
    recorded: Callable[[], dict[str, dict[str, float]]]  # TFLOPS of peers
    summary: Callable[[list[dict]], dict]
    gradients: bool = False  # whether inputs are differentiable and autograd is on


def add_arguments(parser: argparse.ArgumentParser, benchmark: Benchmark) -> None:
    """The options of such a benchmark."""
    known = [provider.name for provider in benchmark.providers]
    options.add_arguments(parser, benchmark.groups, known, "launches")
    parser.add_argument("--csv", type=pathlib.Path, metavar="PATH", help="write a line per case and provider")


def run(args: argparse.Namespace, benchmark: Benchmark) -> int:
    """Measure and report. 1 if a result of ours is wrong or missing, else 0."""
    device, settings = options.device(), options.settings(args)
    if settings.checked:
        check.require_asserts()
    chosen = cases.select(args.group, args.case, device, benchmark.groups)
    present, absent = providers.select(options.names(args.providers), device, benchmark.providers)
    report.require_writable(args.json, args.csv)
    document = report.new_document(benchmark.name, environment.stamp(device), dataclasses.asdict(settings))
    document["recorded_where"] = peers.recorded_where()
    document["providers"] = {provider.name: "" for provider in present} | absent
    with report.Progress(len(chosen)) as progress, torch.set_grad_enabled(benchmark.gradients):
        for one in chosen:
            progress.next(one.id)
            record = measure_case(one, present, device, settings, benchmark)
            recorded = benchmark.recorded()
            document["cases"].append(peers.compare(record, one, document["environment"], recorded))
            progress.say(report.line(record))
            report.save(document, args.json)  # after each case: what is measured survives an interrupted run
    document["summary"] = benchmark.summary(document["cases"])
    document["complete"] = True
    report.save(document, args.json)
    if args.csv:
        report.write_csv(document, args.csv)
    report.show(document)
    return int(any(_failed(record) for record in document["cases"]))


def measure_case(
    one: BenchCase, present: list[Provider], device: torch.device, settings: Settings, benchmark: Benchmark
) -> dict:
    """One case as a JSON object: what it is, how we answer it, and a result per provider that serves it."""
    flops = round(benchmark.work * one.flops)
    record = {"group": one.group, "id": one.id, "question": question(one), "flops": flops}
    serving = [provider for provider in present if provider.serves(one.case)]
    try:
        inputs = cases.inputs(one.case, device)
        if benchmark.gradients:
            inputs = cases.differentiable(one.case, inputs)
    except Exception as error:  # out of memory, or a device that an earlier case broke
        failure = {"reason": providers.reason_of(error)}
        return record | {"config": "", "results": {provider.name: failure for provider in serving}}
    record["config"] = explained(inputs)
    oracle = benchmark.oracle(one.case, inputs)
    record["results"] = {p.name: measure_provider(p, one, oracle, settings, flops) for p in serving}
    return record


def question(one: BenchCase) -> dict:
    """A case in plain numbers."""
    facts = dataclasses.asdict(one.case)
    kept = ("batch", "seqlen_q", "seqlen_k", "heads", "kv_heads", "head_dim", "causal", "window")
    found = {name: facts[name] for name in kept}
    found |= {"head_dim_v": one.case.dim_v, "dtype": str(one.case.dtype).removeprefix("torch.")}
    found["window"] = list(one.case.window)
    return found | {"lengths": list(one.case.rows)} if one.case.varlen else found


def explained(inputs: Inputs) -> str:
    """Which backend of ours answers, and how."""
    try:
        found = tandem_attn.explain(inputs.q, inputs.k, inputs.v, **inputs.kwargs)
    except Exception as error:  # reported by the provider too
        return providers.reason_of(error)
    return f"{found.backend}: {found.config}"


def measure_provider(provider: Provider, one: BenchCase, oracle, settings: Settings, flops: int) -> dict:
    """The result of one provider: numbers; or "wrong" and no number; or "reason" why there is neither."""
    inputs = oracle.inputs
    try:
        call = provider.prepare(one.case, inputs)
        if settings.checked and call.same_question:
            wrong = oracle.what_is_wrong(*call.answer())
            if wrong:
                return {"label": call.label, "wrong": wrong}
        timing = measure.time_call(call.run, inputs.q.device, settings.repeats, settings.idle_ms)
    except Exception as error:  # a provider that fails must not take the others with it
        return {"reason": providers.reason_of(error)}
    result = {
        "label": call.label,
        "same_question": call.same_question,
        **timing.record(),
    }
    if call.same_question:  # other work has other operations
        result["tflops"] = flops / timing.median / 1e12
    return result


def _failed(record: dict) -> bool:
    ours = [record["results"][name] for name in (OURS, OURS_DETERMINISTIC) if name in record["results"]]
    return any("median_us" not in result for result in ours)
