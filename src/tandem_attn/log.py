"""TANDEM_LOG=1: say once per distinct question which backend answers it, and why not the others."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("tandem_attn")
_said: set[str] = set()


def enabled() -> bool:
    """Whether the user asked for log lines (TANDEM_LOG set to anything but 0 or nothing)."""
    return os.environ.get("TANDEM_LOG", "0") not in ("", "0")


def once(message: str) -> None:
    """Log at INFO, unless these very words were logged before."""
    if message in _said:
        return
    _said.add(message)
    if not logger.hasHandlers():  # a script that never set up logging should see what it asked for
        logger.addHandler(logging.StreamHandler())
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
    logger.info(message)
