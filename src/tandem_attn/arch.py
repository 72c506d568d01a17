"""What a GPU offers. The driver is asked once per device, never at import."""

from __future__ import annotations

from functools import cache

import torch


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, (9, 0) on Hopper."""
    return _properties(_index(device))[:2]


def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device, 132 on an H200."""
    return _properties(_index(device))[2]


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _properties(index: int) -> tuple[int, int, int]:
    found = torch.cuda.get_device_properties(index)
    return found.major, found.minor, found.multi_processor_count
