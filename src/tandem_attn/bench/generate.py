"""`bench generate`: tokens per second of a whole model that decodes, with our attention and with torch's."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

import torch

from tandem_attn.bench import UserError, at_least_one, check, environment, measure, options, report
from tandem_attn.bench.decoders import Answer, Decoder, Plain, decoders, what_is_wrong
from tandem_attn.bench.llama import CODELLAMA_34B, SMALL, Model, Shape
from tandem_attn.bench.options import Settings
from tandem_attn.bench.providers import OURS, reason_of

PEER = "sdpa"
PROMPTS = tuple(512 << i for i in range(8))  # 512 to 64k
LAYERS, CPU_LAYERS = 48, 2  # CodeLlama-34B has 48
SLACK = 2**31  # bytes of the GPU that are left alone
REMARK = (
    "the caches hold random keys and values in place of a prompt's: no prefill was run. A step is timed at "
    "a fixed length, embedding, logits and argmax included"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench generate`."""
    parser.description = (
        "Tokens per second of a Llama-shaped model with random weights, batch 1, that decodes behind prompts "
        "of several lengths: CodeLlama-34B's shape on a GPU, a small one on a CPU."
    )
    parser.add_argument(
        "--prompts", type=_lengths, default=PROMPTS, metavar="N,N", help="lengths (default 512,1k,...,64k)"
    )
    layers = f"default {LAYERS}, on a GPU with less memory what fits, on a CPU {CPU_LAYERS}"
    parser.add_argument("--layers", type=at_least_one, metavar="N", help=f"of the model ({layers})")
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write everything measured")
    options.add_timing_arguments(parser, "steps")


def run(args: argparse.Namespace) -> int:
    """Measure and report. 1 if a result of ours is wrong or missing, else 0."""
    device, settings = options.device(), options.settings(args)
    if settings.checked:
        check.require_asserts()
    report.require_writable(args.json)
    shape = CODELLAMA_34B if device.type == "cuda" else SMALL
    prompts = sorted(set(args.prompts), reverse=True)
    capacity = prompts[0] + 1
    layers = layers_for(shape, args.layers, capacity, device)
    document = report.new_document("generate", environment.stamp(device), dataclasses.asdict(settings))
    document["model"] = {"name": str(shape), "layers": layers, "batch": 1, "capacity": capacity}
    document["remark"] = REMARK
    with report.Progress(len(prompts)) as progress, torch.no_grad():
        model = Model(shape, layers, device)
        found = decoders(model, capacity)
        # the longest first: what a step writes lies behind all that later ones see
        for prompt in prompts:
            progress.next(f"prompt {_short(prompt)}")
            record = measure_prompt(found, prompt, settings)
            document["cases"].insert(0, record)
            progress.say(line(record))
            report.save(document, args.json)
    document["complete"] = True
    report.save(document, args.json)
    show(document)
    return int(any("tokens_per_second" not in one["results"][OURS] for one in document["cases"]))


def layers_for(shape: Shape, asked: int | None, capacity: int, device: torch.device) -> int:
    """How many layers the model gets; UserError for more than there is memory for."""
    if device.type != "cuda":
        return asked or CPU_LAYERS
    free, _ = torch.cuda.mem_get_info(device)
    return layers_within(shape, asked, capacity, free)


def layers_within(shape: Shape, asked: int | None, capacity: int, free: int) -> int:
    """The same for so many bytes: weights, two caches, and one matrix and one layer's cache in float64."""
    ends = 2 * shape.vocabulary * shape.hidden * shape.dtype.itemsize
    matrix = 8 * shape.hidden * max(2 * shape.mlp, shape.vocabulary)
    of_check = matrix + 2 * capacity * shape.token_bytes * (8 // shape.dtype.itemsize)
    fit = (free - ends - of_check - SLACK) // (shape.layer_bytes + 2 * capacity * shape.token_bytes)
    if fit < (asked or 1):
        gib = f"{free / 2**30:.0f} GiB free"
        raise UserError(
            f"--layers {asked or 1} with a cache of {capacity} tokens does not fit; supported with {gib}: "
            f"{max(fit, 0)}, more with shorter --prompts"
        )
    return asked or min(LAYERS, fit)


def measure_prompt(found: dict[str, Decoder], prompt: int, settings: Settings) -> dict:
    """One length as a JSON object: a result per way of attending, and how much faster ours is."""
    try:
        oracle = oracle_of(found[PEER], prompt) if settings.checked else None
    except Exception as error:  # out of memory, or a device that an earlier length broke
        results = {name: {"reason": reason_of(error)} for name in found}
    else:
        results = {name: measure_decoder(one, prompt, oracle, settings) for name, one in found.items()}
    ours, peer = (results[name].get("tokens_per_second") for name in (OURS, PEER))
    ratio = ours / peer if ours and peer else None
    return {"id": f"prompt-{prompt}", "prompt": prompt, "results": results, "ratio": ratio}


def oracle_of(theirs: Decoder, prompt: int) -> tuple[Answer, Answer]:
    """The right answer in float64, and that of plain attention in the model's own type."""
    exact, low = (Plain.answer(theirs, dtype, prompt) for dtype in (torch.float64, theirs.model.shape.dtype))
    return exact, low


def measure_decoder(
    decoder: Decoder, prompt: int, oracle: tuple[Answer, Answer] | None, settings: Settings
) -> dict:
    """Numbers; or "wrong" and no number; or "reason" why there is neither."""
    try:
        step = decoder.at(prompt)
        label = decoder.attention.label()
        if oracle:
            wrong = what_is_wrong(decoder.answer(step, prompt), *oracle)
            if wrong:
                return {"label": label, "wrong": wrong}
        timing = measure.time_call(step, decoder.model.device, settings.repeats, settings.idle_ms)
    except Exception as error:  # one that fails must not take the other with it
        return {"reason": reason_of(error)}
    return {
        "label": label,
        "tokens_per_second": 1 / timing.median,
        **timing.record(),
    }


# On the screen


def line(record: dict) -> str:
    """One length in one line, printed when it is done."""
    parts = [f"{name} {_cell(result)}" for name, result in record["results"].items()]
    return f"{'prompt ' + _short(record['prompt']):<24} tokens/s: " + ", ".join(parts)


def show(document: dict) -> None:
    """Print the table and what it cannot say."""
    report.print_heading(document["environment"])
    model = document["model"]
    print(f"{model['layers']} layers of {model['name']}, random weights, batch 1")
    rows = [_row(record) for record in document["cases"]]
    header = ["prompt", f"{OURS} tokens/s", f"{PEER} tokens/s", "ratio"]
    header += [f"{OURS} us", "us range", f"{PEER} us", "us range"]
    report.print_table("generate: decoded tokens per second", header, rows)
    for remark in remarks(document):
        print(remark)


def remarks(document: dict) -> list[str]:
    """Failures, who answered, and what was not measured."""
    found: dict[str, list[str]] = {}
    for record in document["cases"]:
        for name, result in record["results"].items():
            wrong = f"WRONG: {result['wrong']}" if "wrong" in result else ""
            text = wrong or result.get("reason") or result["label"]
            if text:
                found.setdefault(f"{name}: {text}", []).append(_short(record["prompt"]))
    every = len(document["cases"])
    lines = [f"{text}  ({'all' if len(at) == every else ', '.join(at)})" for text, at in found.items()]
    return [*lines, document["remark"]]


def _row(record: dict) -> list[str]:
    ours, peer = (record["results"][name] for name in (OURS, PEER))
    ratio = "" if record["ratio"] is None else f"{record['ratio']:.3f}"
    return [_short(record["prompt"]), _cell(ours), _cell(peer), ratio, *_times(ours), *_times(peer)]


def _times(result: dict) -> tuple[str, str]:
    if "median_us" not in result:
        return "", ""
    spread = f"{report.number(result['fastest_us'])} - {report.number(result['slowest_us'])}"
    return report.number(result["median_us"]), spread


def _cell(result: dict) -> str:
    if "wrong" in result:
        return "WRONG"
    return report.number(result["tokens_per_second"]) if "tokens_per_second" in result else "-"


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 and length else str(length)


def _lengths(text: str) -> tuple[int, ...]:
    """512,1k,64k."""
    found = []
    for part in text.split(","):
        digits = part.strip().lower()
        times = 1024 if digits.endswith("k") else 1
        digits = digits.removesuffix("k")
        if not digits.isdecimal() or int(digits) < 1:
            raise argparse.ArgumentTypeError(
                f"names {part!r}; supported: lengths of at least 1, as 512 or 64k"
            )
        found.append(int(digits) * times)
    return tuple(found)
