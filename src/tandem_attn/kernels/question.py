"""What every launcher asks of a question, and the numbers that all of their kernels take from it."""

from __future__ import annotations

import math

import torch

from tandem_attn import arch
from tandem_attn.kernels.config import ELEMENTS
from tandem_attn.spec import Window

LOG2E = math.log2(math.e)
UNBOUNDED = 2**30  # a window side that no length reaches


def device_reasons(device: torch.device) -> list[str]:
    """Why kernels cannot run on a device; empty on Hopper."""
    if device.type != "cuda":
        return [f"tensors are on {device}; the kernels need an NVIDIA Hopper GPU (compute capability 9.0)"]
    major, minor = arch.capability(device)
    if (major, minor) != (9, 0):
        return [f"compute capability is {major}.{minor}; the kernels need 9.0 (Hopper)"]
    return []


def element_reasons(dtype: torch.dtype) -> list[str]:
    """Why kernels cannot compute in an element type."""
    return [] if dtype in ELEMENTS else [f"dtype is {dtype}; supported: float16, bfloat16"]


def head_dim_reasons(head_dim: int, head_dim_v: int, step: int = 8, where: str = "") -> list[str]:
    """Why no tile holds heads of these sizes; `step`: elements of 16 bytes."""
    return [
        f"{name} is {dim}; supported{where}: multiples of {step} up to 256"
        for name, dim in (("head_dim", head_dim), ("head_dim_v", head_dim_v))
        if dim % step or not 0 < dim <= 256
    ]


def stride_reasons(name: str, shape, stride, step: int = 8) -> list[str]:
    """Why TMA cannot load a tensor: it wants neighbours along the last dimension and multiples of 16 bytes,
    `step` elements, along the others."""
    said = []
    if stride[-1] != 1:
        said.append(f"{name}'s last dimension has stride {stride[-1]}; TMA needs 1")
    steps = (s for size, s in zip(shape[:-1], stride[:-1], strict=True) if size > 1)
    if any(s % step or not 0 <= s < 2**38 for s in steps):
        said.append(f"{name} has strides {tuple(stride)}; TMA needs multiples of {step} elements (16 bytes)")
    return said


def scale_reasons(softmax_scale: float) -> list[str]:
    """Why scores cannot be scaled like that."""
    if softmax_scale > 0.0:
        return []
    return [f"softmax_scale is {softmax_scale}; the kernel's running maximum needs it positive"]


def window_numbers(window: Window) -> tuple[int, int]:
    """(left, right) as masks take them: an unlimited side is one that no length reaches."""
    left, right = (UNBOUNDED if side < 0 else min(side, UNBOUNDED) for side in (window.left, window.right))
    return left, right


def score_scales(softmax_scale: float, softcap: float) -> tuple[float, float]:
    """(scale_log2, inner_scale): score, or capped score, to exponent of 2; and score to argument of tanh."""
    if softcap > 0.0:
        return softcap * LOG2E, softmax_scale / softcap
    return softmax_scale * LOG2E, 0.0
