"""The text to learn: bytes, one token each, in a part to train on and a part held out."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib

import torch

from tandem_attn.bench import UserError

HELD_OUT = 10  # the last tenth of the text


@dataclasses.dataclass(frozen=True)
class Text:
    """Training and held-out tokens (1-D uint8 tensors), and where they came from."""

    source: str
    train: torch.Tensor
    held_out: torch.Tensor

    def __str__(self) -> str:
        size = len(self.train) + len(self.held_out)
        return f"{self.source}: {size:,} bytes, one token each; the last tenth is held out"

    def to(self, device: torch.device) -> Text:
        """The same tokens on a device."""
        return Text(self.source, self.train.to(device), self.held_out.to(device))


def load(path: str | None, context: int) -> Text:
    """The file's bytes, or Python's own language reference; UserError if it is missing or too short.

    Both parts must hold a window of context + 1 bytes: a context, and the byte after each of its bytes.
    """
    if path is None:
        source, data = "Python's language reference (pydoc_data.topics)", language_reference()
    else:
        source, data = path, _read(path)
    needed = HELD_OUT * (context + 1)
    if len(data) < needed:
        raise UserError(f"--text {source} has {len(data):,} bytes; supported: at least {needed:,}")
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    cut = len(tokens) - len(tokens) // HELD_OUT
    return Text(source, tokens[:cut], tokens[cut:])


def language_reference() -> bytes:
    """What `help("while")` and the like print, in the running Python.

    Topics quote one another; a paragraph that came before is dropped, so that what is held out is unseen.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise UserError(f"this Python has no pydoc_data.topics ({error}); use --text FILE") from None
    paragraphs = (part.strip("\n") for topic in topics.values() for part in topic.split("\n\n"))
    return "\n\n".join(dict.fromkeys(part for part in paragraphs if part.strip())).encode()


def windows(tokens: torch.Tensor, starts: torch.Tensor, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (len(starts), context) int64: from each start, and one byte later."""
    places = starts.to(tokens.device)[:, None] + torch.arange(context + 1, device=tokens.device)
    found = tokens[places].long()
    return found[:, :-1], found[:, 1:]


def random_windows(tokens: torch.Tensor, count: int, context: int, generator: torch.Generator):
    """`windows` at random starts, from a generator of the CPU: the same on every device."""
    starts = torch.randint(len(tokens) - context, (count,), generator=generator)
    return windows(tokens, starts, context)


def even_windows(tokens: torch.Tensor, count: int, context: int):
    """`windows` at even distances over the whole text: the same ones every time."""
    return windows(tokens, torch.linspace(0, len(tokens) - context - 1, count).long(), context)


def _read(path: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--text {path} cannot be read ({error.strerror})") from None
