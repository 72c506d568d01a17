"""Which choice of the forward kernel measured best for e4m3 operands."""

from __future__ import annotations

from tandem_attn.device.gluon import COPIES_OPERANDS
from tandem_attn.kernels.config import (
    ForwardConfig,
    forward_policies,
    mask_of,
    tuned_row,
    without_edges,
)
from tandem_attn.spec import AttentionSpec
from tandem_attn.spec_fp8 import OUT_DTYPES

# Where O is added up by wgmma itself, fp32 takes over after so many blocks of 128 keys, if rows see more keys
# than PROMOTE_FROM: it costs 6% (16k, head_dim 256).
PROMOTE_FROM, PROMOTE_BLOCKS = 16384, 64

# Two consumers of 64 rows with P V beside the scores of the next block, or three of them one after the other.
_TWO = dict(q_in_registers=True, lazy_rescale=True)
_SERIAL = dict(serial=True, sum_by_wgmma=True, block_sums=True)
_THREE = dict(_SERIAL, num_consumers=3)

# As _TUNED in config.py. Figures: TFLOPS on an H200, 2026-11-29, full / causal unless said
# (notes/2026-11-29-fp8.md).
_TUNED: dict[tuple[int, int], list[tuple[str, dict]]] = {
    (64, 64): [
        ("window", dict(_SERIAL, q_in_registers=True)),  # 192 rows hold too little of a window
        # 512 tokens: 263, 1k: 351; three: 242, 325
        ("causal short", _TWO),
        # 2k: 458, 16k: 605; two at 8k: 513; without named_release 1% less
        ("causal", dict(_THREE, q_in_registers=True, pingpong=False, named_release=True)),
        # 512: 415, 4k: 575, 16k: 627; two: 408, 469, 472; without block_sums 5% more from 4k on
        ("", dict(_THREE, q_in_registers=True, pingpong=False)),
    ],
    (96, 96): [("", dict(_THREE, o_parts=3, pingpong=False))],
    (128, 128): [
        ("window", dict(_SERIAL, q_in_registers=True)),
        # 512: 402, 1k: 586; three: 310, 456
        ("causal short", _TWO),
        # 2k: 666, 8k: 939, 16k: 942; two: 735, 917, 931; without block_sums 3 to 6% more
        ("causal", dict(_THREE, pingpong=False)),
        # 512: 615, 1k: 736, 4k: 915, 8k: 956, 16k: 961; two: 671, 774, 868, 919, 891. Ping-pong, two Q gain
        # 3% at 512, lose 1% from 4k on, and spill where lengths are not whole blocks
        ("", dict(_THREE, pingpong=False)),
    ],
    (192, 128): [("", _SERIAL)],  # three consumers spill in masked loops
    (192, 192): [("", dict(_SERIAL, o_parts=3))],
    (256, 256): [
        # 512: 489, 1k: 713; beside each other: 403, 644
        ("causal short", dict(serial=True, sum_by_wgmma=True, q_stages=2, o_parts=2)),
        # 4k: 1243 / 1063, 8k: 1259 / 1183, 16k: 1229 / 1246; one after the other: 8k 1104 / 1129. O has half
        # of the registers: no room for P V beside it
        ("", dict(o_parts=2, o_buffers=2)),
    ],
}


def _keys_of_a_row(spec: AttentionSpec) -> int:
    """How many keys a query may see at most."""
    left, right = spec.window.left, spec.window.right
    return spec.seqlen_k if left < 0 or right < 0 else min(left + right + 1, spec.seqlen_k)


def fp8_config(spec: AttentionSpec, copies_operands: bool = COPIES_OPERANDS) -> ForwardConfig:
    """The compile-time configuration for e4m3 operands; spec.dtype is that of the output.

    `copies_operands`: of the Triton that compiles it, see device/gluon.py. There P takes twice the registers,
    and what has no room for it is left out: compiled without a spill in any loop, not measured.
    """
    mask = mask_of(spec)
    (head_dim, head_dim_v), choice = tuned_row(_TUNED, spec, mask)
    if copies_operands:
        choice = dict(_SERIAL, block_sums=head_dim_v < 192, o_parts=choice.get("o_parts", 1))
    if _keys_of_a_row(spec) > PROMOTE_FROM and not choice.get("serial"):
        choice = dict(choice, promote=PROMOTE_BLOCKS)
    return ForwardConfig(
        element="fp8e4nv",
        out_element=OUT_DTYPES[spec.dtype],
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        **forward_policies(spec, without_edges(mask, spec, choice.get("tile_n", 128))),
        **choice,
    )
