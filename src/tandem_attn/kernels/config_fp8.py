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

# wgmma adds up all blocks where two consumers overlap: over so many keys it loses 2% of V's mean, no more.
TWO_UP_TO = 2048

# Two consumers of 64 rows with P V beside the scores of the next block; or up to four, one after the other.
_TWO = dict(q_in_registers=True, lazy_rescale=True)
_SERIAL = dict(serial=True, sum_by_wgmma=True, block_sums=True)
_THREE = dict(_SERIAL, num_consumers=3)
_FOUR = dict(_SERIAL, num_consumers=4, pingpong=False)

# As _TUNED in config.py. Figures: TFLOPS on an H200, 2026-11-30 (notes/2026-11-30-fp8.md).
_TUNED: dict[tuple[int, int], list[tuple[str, dict]]] = {
    (64, 64): [
        ("window", dict(_SERIAL, q_in_registers=True)),  # 192 rows hold too little of a window
        # 512 tokens: 249, 1k: 346; four: 234, 344; three: 232, 308
        ("causal short", _TWO),
        # 2k: 472, 4k: 567, 8k: 625, 16k: 664; three: 444, 518, 590, 622; two at 2k: 427
        ("causal", _FOUR),
        # 512: 488, 1k: 569, 2k: 627, 4k: 662, 8k: 677, 16k: 687; three: 430, 490, 583, 611, 654, 664; two:
        # 384, 448, 475, 490; three without block_sums, lazily rescaled: 8k 660
        ("", _FOUR),
    ],
    (96, 96): [("", dict(_THREE, o_parts=3, pingpong=False))],
    (128, 128): [
        ("window", dict(_SERIAL, q_in_registers=True)),
        # 1k: 783 / 569; three: 751 / 456
        ("short", _TWO),
        # 2k: 674, 8k: 951; maxima of floats: 8k 939, without block_sums 866, lazily rescaled too 879
        ("causal long", dict(_THREE, pingpong=False)),
        ("causal", _TWO),  # 2k: 715
        # 2k: 912, 8k: 1024; two: 2k 864; maxima of floats: 2k 889, 8k 988; 16k 1010, without block_sums 949,
        # lazily rescaled too 965
        ("", dict(_THREE, pingpong=False)),
    ],
    (192, 128): [("", _SERIAL)],  # three consumers spill in masked loops
    (192, 192): [("", dict(_SERIAL, o_parts=3))],
    (256, 256): [
        # 512: 841 / 463, 1k: 1025 / 704; beside each other: 800 and 1024 full, 422 causal 512
        ("short", dict(serial=True, sum_by_wgmma=True, q_stages=2, o_parts=2)),
        # 4k: 1268 / 1108, 8k: 1310 / 1214, 16k: 1323 / 1272; one after the other: 8k 1188 / 1088. O has half
        # of the registers: no room for P V beside it
        ("", dict(o_parts=2, o_buffers=2)),
    ],
}


_TUNED_EXACT = {(128, 128): dict(_THREE, pingpong=False)}  # in place of _TWO over more keys


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
    if choice is _TWO and _keys_of_a_row(spec) > TWO_UP_TO:
        choice = _TUNED_EXACT[head_dim, head_dim_v]
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
