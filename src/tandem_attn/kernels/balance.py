"""How many tiles can be given away beforehand without one program getting more than its share.

`device/schedule.py` says why that is wanted. What it costs is balance: tiles that follow one another differ
in length, most where a group of heads ends with its shortest and the next begins with its longest. Rounds in
turn from either end even that out only on average, so they are counted here, and programs draw what is left.
"""

from __future__ import annotations

import types

import torch

from tandem_attn.kernels.config import ForwardConfig

TILE_OVERHEAD = 0.5  # what a tile costs beside its blocks of keys, in such blocks
OWN_SHARE = 0.97  # of the ideal load that a program may be given: the rest makes up for what is not foreseen
MAX_COUNTED = 2**18  # with more tiles than this, a few milliseconds of counting, drawing is all that happens


def tile_costs(
    config: ForwardConfig, seqlens: tuple[int, int], window: tuple[int, int], num_rows: int, group: int
) -> torch.Tensor | None:
    """Costs of all tiles in the order of DenseTiles, in blocks of keys: float64, or None if too many.

    `window`: the sides as the kernel gets them, never negative.
    """
    rows = config.tile_rows
    num_m_blocks = -(-seqlens[0] // rows)
    if num_m_blocks * num_rows > MAX_COUNTED:
        return None
    names = ("seqlen_q", "seqlen_k", "window_left", "window_right")
    mask = types.SimpleNamespace(**dict(zip(names, seqlens + window, strict=True)))
    blocks = [
        config.Mask.key_blocks.fn(mask, m * rows, (m + 1) * rows, config.tile_n)[1] + TILE_OVERHEAD
        for m in reversed(range(num_m_blocks))
    ]
    levels = torch.tensor(blocks, dtype=torch.float64, device="cpu")
    groups = [levels.repeat_interleave(group)] * (num_rows // group)
    return torch.cat([*groups, levels.repeat_interleave(num_rows % group)])


def rounds_in_step(costs: torch.Tensor | None, programs: int) -> int:
    """The most rounds, at least 1, after which nobody has more than OWN_SHARE of an equal share of all."""
    if costs is None or len(costs) < programs:
        return 1
    rounds = len(costs) // programs
    load = costs[: rounds * programs].view(rounds, programs).clone()
    load[1::2] = load[1::2].flip(1)  # as own_number of device/schedule.py has it
    heaviest = load.cumsum(0).amax(1)
    return max(1, int((heaviest <= OWN_SHARE * costs.sum() / programs).sum()))
