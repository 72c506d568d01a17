"""Error against speed of every recipe, as a picture."""

from __future__ import annotations

import pathlib

from tandem_attn.bench import UserError

FORMATS = ("png", "svg")
MARKERS = "osD^v*PX"


def require_format(path: pathlib.Path | None) -> None:
    """UserError unless a picture can be written under this name."""
    if path is not None and path.suffix.removeprefix(".") not in FORMATS:
        names = " or ".join(f".{one}" for one in FORMATS)
        raise UserError(f"--plot is {path}; supported: a name that ends in {names}")


def points(document: dict) -> list[tuple[str, float, float | None, float | None]]:
    """(row, RMSE, TFLOPS of attention, TFLOPS with quantization) of the paper's table, where measured."""
    found = []
    for record in document["cases"]:
        if record["kind"] != "recipe" or "rmse" not in record["results"]["error"]:
            continue
        speeds = [record["results"].get(what, {}).get("tflops") for what in ("speed", "speed_total")]
        if any(speeds):
            found.append((record["row"], record["results"]["error"]["rmse"], *speeds))
    return found


def draw(path: pathlib.Path, document: dict) -> str:
    """Draw it; why not, in one line, or nothing."""
    shown = points(document)
    if not shown:
        return "no row of the table of recipes has an error and a speed"
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "matplotlib is not installed"
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, (name, error, alone, total) in enumerate(shown):
        _point(axes, f"C{i}", MARKERS[i % len(MARKERS)], name, error, alone, total)
    axes.set_yscale("log")
    axes.set_xlabel("TFLOPS (hollow: quantization included)")
    axes.set_ylabel("RMSE on inputs with outliers")
    axes.set_title(title(document))
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120, format=path.suffix.removeprefix("."))
    return ""


def _point(
    axes, color: str, marker: str, name: str, error: float, alone: float | None, total: float | None
) -> None:
    """A full marker for attention alone, a hollow one with quantization, and a line between."""
    style = dict(color=color, marker=marker, linestyle="", markersize=8)
    if alone and total:
        axes.plot([total, alone], [error, error], color=color, linewidth=1)
    if total:
        axes.plot([total], [error], **style, fillstyle="none", label=None if alone else name)
    if alone:
        axes.plot([alone], [error], **style, label=name)


def title(document: dict) -> str:
    """Of which shape, and where."""
    asked = next(record["question"] for record in document["cases"] if record["kind"] == "recipe")
    stamp = document["environment"]
    where = stamp["gpu"]["name"] if stamp["gpu"] else f"{stamp['cpu']['machine']} CPU"
    shape = f"head_dim {asked['head_dim']}, {asked['seqlen_k']} keys, {asked['heads']} heads, full"
    return f"error against speed: {shape}, {where}"
