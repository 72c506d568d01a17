"""Who is timed over a KV cache: tandem_attn and its peers, one signature each.

As in `providers`, nothing is imported before it is asked for, and a peer that fails is reported.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import math
from collections.abc import Callable

import torch

import tandem_attn
from tandem_attn.bench.caches import Caches
from tandem_attn.bench.providers import (
    OURS,
    Provider,
    attempt,
    cuda_module_absent,
    everywhere,
    flash_absent,
)
from tandem_attn.testing.decode_inputs import DecodeCase

FLASHINFER_BYTES = 128 * 2**20  # of scratch memory, as its documentation advises
FLASHINFER_PAGE = 16  # as which a contiguous cache is read


@dataclasses.dataclass(frozen=True)
class DecodeCall:
    """One way of answering a case, ready to run any number of times."""

    run: Callable[[int], torch.Tensor]  # what is timed: out (batch, tokens, heads, dim) from this copy
    answer: Callable[[], tuple[torch.Tensor, torch.Tensor | None]]  # (out, lse) from the first copy
    label: str = ""  # what really runs, where the provider's name does not say


def _no_lse(run: Callable[[int], torch.Tensor], label: str = "") -> DecodeCall:
    return DecodeCall(run, lambda: (run(0), None), label)


def _any_case(case: DecodeCase) -> bool:
    return True


# Ourselves


def arguments(case: DecodeCase, caches: Caches) -> dict:
    """Those of our function, but for q, the cache and memory for results."""
    found = dict(cache_seqlens=caches.seqlens, page_table=caches.page_table, causal=case.causal)
    return found | {"split_size": case.split_size}


def _tandem(case: DecodeCase, caches: Caches) -> DecodeCall:
    given = arguments(case, caches)
    memory = tandem_attn.decode_workspace(caches.q, *caches.pairs[0], **given)
    given |= {"out": caches.out, "workspace": memory}
    function = functools.partial(tandem_attn.flash_attn_with_kvcache, caches.q)

    def answer():
        return function(*caches.pairs[0], **given, return_softmax_lse=True)

    return DecodeCall(lambda i: function(*caches.pairs[i], **given), answer)


# torch


def _is_uniform(case: DecodeCase) -> bool:
    return not case.page_size and len(set(case.keys)) == 1


def _sdpa(case: DecodeCase, caches: Caches) -> DecodeCall:
    """Over the keys in use, their number known on the host."""
    from torch.nn.attention.bias import causal_lower_right

    tokens, length = case.each("tokens")[0], case.keys[0]
    q = caches.q.transpose(1, 2)
    pairs = [tuple(x[:, :length].transpose(1, 2) for x in pair) for pair in caches.pairs]
    given: dict = {"enable_gqa": True} if case.heads != case.kv_heads else {}
    if case.causal and tokens > 1:  # is_causal is aligned top-left
        given["attn_mask"] = causal_lower_right(tokens, length)
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, **given)

    def run(i: int) -> torch.Tensor:
        return attend(q, *pairs[i]).transpose(1, 2)

    attempt(lambda: run(0))
    return _no_lse(run, "torch's own choice of a backend, length known on the host")


# FlashAttention


def _fa3(case: DecodeCase, caches: Caches) -> DecodeCall:
    function = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
    given = dict(cache_seqlens=caches.seqlens, page_table=caches.page_table, causal=case.causal, num_splits=0)
    return _no_lse(lambda i: _first(function(caches.q, *caches.pairs[i], **given)))


def _fa4(case: DecodeCase, caches: Caches) -> DecodeCall:
    function = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
    given = dict(seqused_k=caches.seqlens, page_table=caches.page_table, causal=case.causal)
    run = functools.partial(function, caches.q, **given)
    return _no_lse(lambda i: _first(run(*caches.pairs[i])), "its own number of splits")


def _first(found) -> torch.Tensor:
    """out of what some versions return as (out, lse)."""
    return found[0] if isinstance(found, tuple) else found


# FlashInfer


def _flashinfer_serves(case: DecodeCase) -> bool:
    whole = case.page_size or case.capacity % FLASHINFER_PAGE == 0
    return bool(whole) and case.each("tokens")[0] == 1


def _flashinfer(case: DecodeCase, caches: Caches) -> DecodeCall:
    """Its plan of the lengths is made beforehand, on the host. A contiguous cache is one of many pages."""
    import flashinfer

    page = case.page_size or FLASHINFER_PAGE
    pairs = [tuple(x.view(-1, page, *x.shape[2:]) for x in pair) for pair in caches.pairs]
    memory = torch.empty(FLASHINFER_BYTES, dtype=torch.uint8, device=caches.q.device)
    tensor_cores = case.heads // case.kv_heads >= 4
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(memory, "NHD", use_tensor_cores=tensor_cores)
    sizes = (case.heads, case.kv_heads, case.head_dim, page)
    kinds = dict(q_data_type=case.dtype, kv_data_type=case.dtype)
    wrapper.plan(*page_lists(case, caches, page), *sizes, **kinds)
    q = caches.q[:, 0]
    label = f"planned on the host, pages of {page}" + (", tensor cores" if tensor_cores else "")
    return _no_lse(lambda i: wrapper.run(q, pairs[i])[:, None], label)


def page_lists(case: DecodeCase, caches: Caches, page: int) -> tuple[torch.Tensor, ...]:
    """(first entry of each sequence, page numbers of all, keys on the last page of each), int32."""
    counts = [math.ceil(n / page) for n in case.keys]
    if caches.page_table is None:
        per_row = case.capacity // page
        rows = [range(b * per_row, b * per_row + count) for b, count in enumerate(counts)]
        numbers = torch.tensor([x for row in rows for x in row], dtype=torch.int32)
    else:
        table = caches.page_table.cpu()
        numbers = torch.cat([table[b, :count] for b, count in enumerate(counts)])
    starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    last = torch.tensor([(n - 1) % page + 1 for n in case.keys], dtype=torch.int32)
    return tuple(x.to(caches.q.device) for x in (starts, numbers, last))


PROVIDERS = [
    Provider(OURS, everywhere, _any_case, _tandem),
    Provider("sdpa", everywhere, _is_uniform, _sdpa),
    Provider(
        "fa3",
        functools.partial(flash_absent, "flash_attn_interface", name="flash_attn_with_kvcache"),
        _any_case,
        _fa3,
    ),
    Provider(
        "fa4",
        functools.partial(flash_absent, "flash_attn.cute", name="flash_attn_varlen_func"),
        _any_case,
        _fa4,
    ),
    Provider(
        "flashinfer", functools.partial(cuda_module_absent, "flashinfer"), _flashinfer_serves, _flashinfer
    ),
]
