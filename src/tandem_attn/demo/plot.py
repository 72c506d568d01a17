"""The loss curves as a PNG."""

from __future__ import annotations

import pathlib

from tandem_attn.demo.train import History


def draw(path: pathlib.Path, ours: History, other: History | None, title: str) -> bool:
    """Losses over steps, and below them how far apart the two trainings are. False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    if other is None:
        axes = figure.subplots()
    else:
        axes, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        steps = range(1, len(other.losses) + 1)
        apart = [abs(a - b) for a, b in zip(ours.losses, other.losses, strict=False)]
        below.semilogy(steps, [max(one, 1e-8) for one in apart], color="tab:gray", linewidth=1)
        below.set_ylabel("difference")
    _curve(axes, ours, "tandem_attn", color="tab:blue", linewidth=2.5, alpha=0.6, marker="o")
    if other is not None:
        _curve(axes, other, "torch SDPA", color="tab:orange", linewidth=0.8, alpha=1.0, marker="x")
    axes.set_title(title)
    axes.set_ylabel("loss (nats per byte)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=120, format="png")
    return True


def _curve(
    axes, history: History, name: str, *, color: str, linewidth: float, alpha: float, marker: str
) -> None:
    """A training's losses as a line, and on top of it those on held-out text as points."""
    steps = range(1, len(history.losses) + 1)
    axes.plot(steps, history.losses, color=color, linewidth=linewidth, alpha=alpha, label=f"{name}, train")
    x, y = zip(*history.held_out, strict=True)
    axes.plot(x, y, linestyle="", marker=marker, color=color, zorder=3, label=f"{name}, held out")
