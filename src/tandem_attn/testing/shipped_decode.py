"""Decode and combine kernels to compile: what must fit and not spill.

Heads, columns and numbers of tokens are compiled in, so there are as many kernels as models. `QUESTIONS`
holds every kind of tile, rows, pages, splits and masks at least once; the plans that answer them say which
kernels that takes.
"""

from __future__ import annotations

import dataclasses
from unittest import mock

import torch

from tandem_attn import arch
from tandem_attn.kernels.config_decode import DecodeConfig
from tandem_attn.kernels.launch_decode import DecodePlan
from tandem_attn.spec import E4M3, Window
from tandem_attn.spec_decode import SCALE_BLOCK, DecodeSpec

MULTIPROCESSORS = 132  # of an H100 or H200
CAUSAL = Window(-1, 0)
FP16 = torch.float16

# Several of each kind of fact at once where they do not meet in the code.
QUESTIONS: dict[str, dict] = {
    "usual": dict(),
    "one_sequence": dict(batch=1),
    "many_sequences": dict(batch=200, num_heads=8, has_seqlens=False),
    "lists_of_sequences": dict(batch=2000),  # more than a look at the work list takes in
    "one_kv_head": dict(num_heads=16, num_kv_heads=1),
    "fp16": dict(dtype=FP16, tokens=4, window=CAUSAL),
    "64": dict(head_dim=64),
    "80": dict(head_dim=80, window=Window(1000, 0)),
    "256": dict(head_dim=256),
    "256_16_rows": dict(head_dim=256, num_heads=16, num_kv_heads=1),
    "256_masks": dict(head_dim=256, num_heads=8, tokens=4, window=Window(1000, 0), softcap=30.0),
    "192x128": dict(head_dim=192, head_dim_v=128, num_heads=8),
    "128x256": dict(head_dim=128, head_dim_v=256),
    "page_16": dict(page_size=16, tokens=3, window=CAUSAL),
    "page_32_of_64": dict(page_size=32, head_dim=64),
    "page_16_of_256": dict(page_size=16, head_dim=256),
    "page_1": dict(page_size=1),
    "page_1_fp16": dict(page_size=1, dtype=FP16, num_heads=8, window=Window(1000, 0), has_leftpad=True),
    "page_1_of_64": dict(page_size=1, head_dim=64, softcap=30.0),
    "page_1_of_256": dict(page_size=1, head_dim=256),
    "page_60_of_192x128": dict(page_size=60, head_dim=192, head_dim_v=128),
    "masks": dict(window=Window(1000, 0), softcap=30.0, has_leftpad=True, has_batch_idx=True),
    "packed": dict(packed_q=True, tokens=4, window=CAUSAL, packed_new=True),
    "counted_splits": dict(num_splits=7, tokens=2, window=CAUSAL),
    "many_splits": dict(num_splits=200, batch=2, dtype=FP16),
    "split_size": dict(split_size=1024),
    "split_size_page_32": dict(split_size=1024, page_size=32, head_dim=64, packed_q=True, tokens=4),
    "64_rows": dict(tokens=16, window=CAUSAL),
    "64_rows_of_64": dict(tokens=12, window=CAUSAL, head_dim=64, dtype=FP16),
    "64_rows_of_256": dict(tokens=16, window=CAUSAL, head_dim=256),
    "64_rows_of_192x128": dict(tokens=40, window=CAUSAL, head_dim=192, head_dim_v=128, num_heads=8),
    "64_rows_page_16": dict(tokens=10, window=Window(1000, 0), page_size=16),
    "64_rows_page_1": dict(tokens=10, window=CAUSAL, page_size=1, softcap=30.0),
    "64_rows_split_size": dict(tokens=16, window=CAUSAL, split_size=1024, packed_q=True),
    "128_rows": dict(tokens=32, window=CAUSAL),
    "128_rows_fp16": dict(tokens=32, dtype=FP16, softcap=30.0, window=Window(1000, 0), has_leftpad=True),
    "128_rows_of_64": dict(tokens=32, window=CAUSAL, head_dim=64),
    "128_rows_of_256": dict(tokens=32, window=CAUSAL, head_dim=256),
    "128_rows_page_32": dict(tokens=32, window=CAUSAL, page_size=32),
    "128_rows_page_1": dict(tokens=32, window=CAUSAL, page_size=1),
    "blocks_of_rows": dict(tokens=300, window=CAUSAL, packed_q=True, batch=1, page_size=64),
    "fp8": dict(cache_dtype=E4M3),
    "fp8_16_rows": dict(cache_dtype=E4M3, num_heads=16, num_kv_heads=1, batch=1),
    "fp8_of_sequences": dict(cache_dtype=E4M3, q_dtype=E4M3, by_block=False, dtype=FP16),
    "fp8_64": dict(cache_dtype=E4M3, head_dim=64, tokens=3, window=CAUSAL),
    "fp8_80x48": dict(cache_dtype=E4M3, head_dim=80, head_dim_v=48, window=Window(1000, 0)),
    "fp8_256": dict(cache_dtype=E4M3, head_dim=256),
    "fp8_256_masks": dict(
        cache_dtype=E4M3, head_dim=256, num_heads=16, num_kv_heads=1, window=Window(1000, 0), softcap=30.0
    ),
    "fp8_192x128": dict(cache_dtype=E4M3, head_dim=192, head_dim_v=128, num_heads=8),
    "fp8_page_32_of_64": dict(cache_dtype=E4M3, page_size=32, head_dim=64),
    "fp8_page_16_of_64": dict(cache_dtype=E4M3, page_size=16, head_dim=64),
    "fp8_page_1_of_64": dict(cache_dtype=E4M3, page_size=1, head_dim=64),
    "fp8_page_64_of_64": dict(cache_dtype=E4M3, page_size=64, head_dim=64),
    "fp8_page_128_of_64_masks": dict(
        cache_dtype=E4M3,
        page_size=128,
        head_dim=64,
        tokens=2,
        window=Window(1000, 0),
        softcap=30.0,
        has_leftpad=True,
    ),
    "fp8_page_32": dict(cache_dtype=E4M3, page_size=32, has_leftpad=True),
    "fp8_page_64_of_256": dict(cache_dtype=E4M3, page_size=64, head_dim=256),
    "fp8_page_1": dict(cache_dtype=E4M3, page_size=1, q_dtype=E4M3),
    "fp8_page_1_of_256": dict(cache_dtype=E4M3, page_size=1, head_dim=256, by_block=False),
    "fp8_masks": dict(
        cache_dtype=E4M3, window=Window(1000, 0), softcap=30.0, has_leftpad=True, has_batch_idx=True
    ),
    "fp8_32_rows": dict(cache_dtype=E4M3, tokens=8, window=CAUSAL),
    "fp8_32_rows_of_64": dict(cache_dtype=E4M3, tokens=8, head_dim=64, page_size=16, softcap=30.0),
    "fp8_64_split_size": dict(cache_dtype=E4M3, head_dim=64, split_size=1152),
    "fp8_64_rows": dict(cache_dtype=E4M3, tokens=16, window=CAUSAL),
    "fp8_64_rows_of_64": dict(cache_dtype=E4M3, tokens=12, window=CAUSAL, head_dim=64, page_size=32),
    "fp8_64_rows_of_256": dict(cache_dtype=E4M3, tokens=16, window=CAUSAL, head_dim=256),
    "fp8_64_rows_page_1": dict(cache_dtype=E4M3, tokens=10, page_size=1, softcap=30.0),
    "fp8_128_rows": dict(cache_dtype=E4M3, tokens=32, window=CAUSAL, has_leftpad=True),
    "fp8_128_rows_of_256": dict(cache_dtype=E4M3, tokens=32, window=CAUSAL, head_dim=256),
    "fp8_128_rows_page_16": dict(cache_dtype=E4M3, tokens=32, page_size=16, q_dtype=E4M3),
}

# For a quicker look: each kind of tile, copy and arithmetic.
FEW = (
    "usual", "64", "256", "192x128", "page_16", "page_1", "masks", "packed", "split_size", "64_rows",
    "64_rows_page_16", "128_rows", "128_rows_of_256", "128_rows_page_1",
    "fp8", "fp8_page_32", "fp8_page_1", "fp8_256", "fp8_64_rows", "fp8_128_rows_page_16",
)  # fmt: skip


def decode_question(
    batch: int = 8,
    tokens: int = 1,
    num_heads: int = 32,
    num_kv_heads: int | None = None,
    head_dim: int = 128,
    head_dim_v: int | None = None,
    page_size: int = 0,
    window: Window | None = None,
    by_block: bool = True,
    **rest,
) -> DecodeSpec:
    """A spec of contiguous tensors on a GPU that need not exist. `by_block`: whether an e4m3
    cache has factors beside it, else of sequences; `rest`: other fields of the spec."""
    num_kv_heads = num_kv_heads or min(8, num_heads)
    head_dim_v = head_dim_v or head_dim
    rows = page_size or 8192  # keys of a page or sequence
    capacity = rows * (8192 // rows)
    table_width = capacity // page_size if page_size else 0

    def stride(rows: int, heads: int, dim: int) -> tuple[int, ...]:
        return (rows * heads * dim, heads * dim, dim, 1)

    q_stride = stride(tokens, num_heads, head_dim)
    fields = dict(
        device=torch.device("cuda", 0),
        dtype=torch.bfloat16,
        softmax_scale=head_dim**-0.5,
        softcap=0.0,
        packed_q=False,
        total_q=batch * tokens,
        cache_rows=batch * table_width if page_size else batch,
        capacity=capacity,
        has_seqlens=True,
        has_batch_idx=False,
        has_leftpad=False,
        packed_new=False,
        num_splits=0,
        split_size=None,
        sm_margin=0,
        descale_block=0,
        q_descale_stride=(),
        k_descale_stride=(),
        v_descale_stride=(),
        q_stride=q_stride[1:] if rest.get("packed_q") else q_stride,
        k_stride=stride(rows, num_kv_heads, head_dim),
        v_stride=stride(rows, num_kv_heads, head_dim_v),
        aligned=True,
    )
    if rest.get("cache_dtype") == E4M3:
        blocks = -(-rows // SCALE_BLOCK)
        strides = (blocks * num_kv_heads, num_kv_heads, 1) if by_block else (num_kv_heads, 0, 1)
        fields |= dict(k_descale_stride=strides, v_descale_stride=strides)
        fields |= dict(descale_block=SCALE_BLOCK if by_block else 0)
    if rest.get("q_dtype") == E4M3:
        fields |= dict(q_descale_stride=(num_kv_heads, 1))
    fields |= dict(batch=batch, seqlen_q=tokens, num_heads=num_heads, num_kv_heads=num_kv_heads)
    fields |= dict(head_dim=head_dim, head_dim_v=head_dim_v, page_size=page_size)
    fields |= dict(table_width=table_width, table_stride=table_width)
    fields |= rest
    kinds = dict(q_dtype=fields["dtype"], cache_dtype=fields["dtype"])
    return DecodeSpec(window=(window or Window()).reduced(tokens, capacity), **{**kinds, **fields})


def plan_of(spec: DecodeSpec) -> DecodePlan:
    """The plan for a question on an H100 or H200 that need not exist."""
    with mock.patch.object(arch, "num_multiprocessors", return_value=MULTIPROCESSORS):
        return DecodePlan(spec)


@dataclasses.dataclass(frozen=True)
class DecodeVariant:
    """One kernel of a question's plan: the decode kernel, or the one that merges what it leaves."""

    question: str
    spec: DecodeSpec
    config: DecodeConfig
    combines: bool = False

    @property
    def name(self) -> str:
        """Short and unique."""
        return f"combine-{self.question}" if self.combines else self.question


def decode_variants(questions: tuple[str, ...] = tuple(QUESTIONS)) -> list[DecodeVariant]:
    """The kernels of these questions, always in the same order."""
    found = []
    for name in questions:
        spec = decode_question(**QUESTIONS[name])
        config = plan_of(spec).config
        found.append(DecodeVariant(name, spec, config))
        if not config.merges:
            found.append(DecodeVariant(name, spec, config, combines=True))
    return found
