"""What a person sees while it works: a bar on a terminal that has rich, and lines everywhere."""

from __future__ import annotations

import sys


def say(line: str = "", end: str = "\n") -> None:
    """Print at once; characters that the terminal cannot show become question marks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(line.encode(encoding, "replace").decode(encoding), end=end, flush=True)


def printable(written: str) -> str:
    """Control characters, which could upset a terminal, as dots; line ends stay."""
    return "".join(c if c.isprintable() or c in "\n\ufffd" else "\u00b7" for c in written)


class Progress:
    """A training on display. A context manager; `line` stays, `advance` moves the bar."""

    def __init__(self, steps: int):
        self.steps = steps
        self.bar = _bar()

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task("", total=self.steps)
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, step: int, loss) -> None:
        """So many steps are done; `loss`, a tensor, is read only if it is shown."""
        if self.bar:
            self.bar.update(self.task, completed=step, description=f"loss {loss.item():.3f}")

    def line(self, step: int, train: float, held_out: float, rate: float) -> None:
        """Losses so far, and tokens per second (0: none yet)."""
        speed = f"{rate:12,.0f} tokens/s" if rate else ""
        said = f"  step {step:5d} of {self.steps}   train {train:.3f}   held out {held_out:.3f}{speed}"
        if self.bar:
            self.bar.update(self.task, completed=step)
            self.bar.console.print(said, highlight=False, markup=False)
        else:
            say(said)


def _bar():
    """A bar of rich, or None."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich import progress
    except ImportError:
        return None
    columns = (
        progress.TextColumn("  {task.description:<11}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, transient=True)
