"""Every backward kernel that a question can lead to, found by asking `backward_configs`."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from tandem_attn.kernels.config_backward import BackwardConfig, QueryGradientConfig, backward_configs
from tandem_attn.testing.shipped import WINDOWS, question

LENGTHS = (128, 1000, 4096)  # whole tiles of keys and not
HEAD_SHAPES = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel: a configuration."""

    config: BackwardConfig | QueryGradientConfig

    @property
    def name(self) -> str:
        """Short and unique: what matters first, then every field of the configuration that is unusual."""
        c = self.config
        parts = [
            c.element,
            f"{c.head_dim}x{c.head_dim_v}",
            c.gradients,
            c.Mask.__name__,
            c.Sequences.__name__,
        ]
        said = {"element", "head_dim", "head_dim_v", "gradients", "Mask", "Sequences", "Schedule"}
        for field in dataclasses.fields(c):
            value = getattr(c, field.name)
            if field.name in said or value == field.default:
                continue
            flag = ("" if value else "no_") + field.name
            parts.append(flag if isinstance(value, bool) else f"{field.name}{value}")
        return "-".join(parts)


def configs(
    dtype: torch.dtype = torch.bfloat16, softcap: float = 0.0, deterministic: bool = False
) -> list[BackwardConfig | QueryGradientConfig]:
    """All configurations for one element type, each once, always in the same order."""
    found: dict[BackwardConfig | QueryGradientConfig, None] = {}
    for dims, window, varlen, length in itertools.product(
        HEAD_SHAPES, WINDOWS.values(), (False, True), LENGTHS
    ):
        spec = question(*dims, length, window=window, varlen=varlen, dtype=dtype, softcap=softcap)
        by_keys, by_queries = backward_configs(dataclasses.replace(spec, deterministic=deterministic))
        found |= dict.fromkeys((*by_keys, *([by_queries] if by_queries else [])))
    return list(found)


def variants() -> list[Variant]:
    """What the tests compile."""
    return [Variant(c) for c in configs()]
