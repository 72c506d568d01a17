"""The only validation of calls over a KV cache; see `spec.py` for how errors are worded.

A call may write the cache, so that everything is looked at before anything is written: types and options,
shapes (which fakes pass too), the one length that may be a Python number, and the numbers in tensors.
"""

from __future__ import annotations

import torch

from tandem_attn.spec import (
    E4M3,
    Options,
    check_dtype,
    check_heads,
    check_int,
    check_starts,
    check_vector,
    refuse,
)
from tandem_attn.spec import check_options as check_shared_options
from tandem_attn.spec_decode import (
    ALIGNMENT,
    MAX_SPLITS,
    METADATA_SIZE,
    SCALE_BLOCK,
    SPLIT_STEP,
    AppendSpec,
    Cache,
    DecodeOptions,
    DecodeSpec,
    Given,
    New,
    Rotary,
    per_block,
)
from tandem_attn.spec_fp8 import check_descale, check_descale_numbers

NARROW = (torch.float16, torch.bfloat16)  # what goes with an FP8 cache, besides e4m3


def check_types(given: Given) -> None:
    """Raise unless tensors are tensors, lengths integers, and what belongs together is there together."""
    for name, x in zip(Given._fields, given, strict=True):
        if isinstance(x, torch.Tensor) and name != "max_seqlen_q":
            continue
        if name in ("cache_seqlens", "max_seqlen_q") and x is not None:
            check_int(name, x, 0)
        elif x is not None or name in Given._fields[:3]:
            refuse(TypeError, name, type(x).__name__, "a torch.Tensor")
    if (given.k is None) != (given.v is None):
        name, other = ("k", "v") if given.k is None else ("v", "k")
        refuse(ValueError, name, "None", f"a torch.Tensor together with {other}, or neither")
    if given.k is not None and given.cache_seqlens is None:
        refuse(ValueError, "cache_seqlens", "None", "the lengths to which k and v are appended")
    if given.k is None and given.cu_seqlens_k_new is not None:
        refuse(ValueError, "cu_seqlens_k_new", "given without k", "None, or k and v packed")
    if (given.rotary_cos is None) != (given.rotary_sin is None):
        names = ("rotary_cos", "rotary_sin")
        name, other = names if given.rotary_cos is None else names[::-1]
        refuse(ValueError, name, "None", f"a torch.Tensor together with {other}, or neither")
    if given.rotary_seqlens is not None and given.rotary_cos is None:
        refuse(ValueError, "rotary_seqlens", "given without rotary_cos", "None, or tables to rotate by")
    if given.cu_seqlens_q is not None and given.max_seqlen_q is None:
        refuse(ValueError, "max_seqlen_q", "None", "int, at least the longest sequence of cu_seqlens_q")
    if given.page_table is not None and given.cache_batch_idx is not None:
        refuse(ValueError, "cache_batch_idx", "given with page_table", "None: page_table says where rows lie")


def check_options(options: DecodeOptions) -> DecodeOptions:
    """The same numbers as plain Python ones, or an error."""
    *shared, _ = check_shared_options(Options(*options[:5], deterministic=False))  # that is of gradients
    splits, size, interleaved = options[5:]
    check_splits(splits, size)
    if not isinstance(interleaved, bool):
        refuse(TypeError, "rotary_interleaved", repr(interleaved), "True or False")
    return DecodeOptions(*shared, splits, size, interleaved)


def check_splits(num_splits, split_size) -> None:
    """Raise unless keys can be cut like this."""
    check_int("num_splits", num_splits, 0)
    if num_splits > MAX_SPLITS:
        refuse(ValueError, "num_splits", num_splits, f"1 to {MAX_SPLITS}, or 0 for what is best")
    if split_size is None:
        return
    check_int("split_size", split_size, 1)
    if split_size % SPLIT_STEP:
        refuse(ValueError, "split_size", split_size, f"None, or a positive multiple of {SPLIT_STEP}")
    if num_splits > 1:
        refuse(ValueError, "split_size", f"{split_size} with num_splits {num_splits}", "one of the two")


# Shapes, types, devices


def check_cache(q, cache: Cache, new: New) -> None:
    """Raise unless q, the caches and the lengths fit together. Looks at no numbers: fakes are welcome."""
    packed, paged = new.cu_seqlens_q is not None, cache.page_table is not None
    form = "(total, heads, head_dim) with cu_seqlens_q" if packed else "(batch, seqlen, heads, head_dim)"
    _check_form("q", q, q, 3 if packed else 4, form)
    form = "(pages, page_size" if paged else "(batch, capacity"
    for name, x in (("k_cache", cache.k), ("v_cache", cache.v)):
        _check_form(name, x, q, 4, f"{form}, kv_heads, head_dim)")
    _check_types_of_cache(q, cache)
    check_heads(q, cache.k, cache.v, ("k_cache", "v_cache"))
    batch, whose = None if packed else q.shape[0], "the batch size of q"
    if packed:
        whose = "the batch size of cu_seqlens_q"
        batch = check_vector("cu_seqlens_q", new.cu_seqlens_q, q.device, None, whose)
    for name, x in (
        ("cache_seqlens", cache.seqlens),
        ("cache_batch_idx", cache.batch_idx),
        ("cache_leftpad", cache.leftpad),
        ("cu_seqlens_k_new", new.cu_seqlens_k_new),
    ):
        if x is not None:
            check_vector(name, x, q.device, batch, whose)
    if paged:
        _check_table(q, cache, batch, whose)
    elif cache.batch_idx is None and cache.k.shape[0] != batch:
        supported = f"{whose}, {batch}; or cache_batch_idx to say which rows"
        refuse(ValueError, "k_cache", f"of {cache.k.shape[0]} rows", supported)
    _check_descales(q, cache, new, batch)


def _check_types_of_cache(q, cache: Cache) -> None:
    """Raise unless q and the caches are of one type, or the caches e4m3 and q e4m3 or of 16 bits."""
    k_type, v_type = cache.k.dtype, cache.v.dtype
    if E4M3 not in (k_type, v_type):
        if q.dtype == E4M3:
            refuse(TypeError, "q", f"of dtype {E4M3}", f"the dtype of k_cache, {k_type}; or caches of {E4M3}")
        for name, dtype in (("q", q.dtype), ("k_cache", k_type), ("v_cache", v_type)):
            check_dtype(name, dtype, q.dtype)
        return
    for name, dtype in (("k_cache", k_type), ("v_cache", v_type)):
        if dtype != E4M3:
            refuse(TypeError, name, f"of dtype {dtype}", f"{E4M3}, as the other cache is")
    if q.dtype not in (*NARROW, E4M3):
        supported = f"{', '.join(map(str, (*NARROW, E4M3)))} over an FP8 cache"
        refuse(TypeError, "q", f"of dtype {q.dtype}", supported)


def _check_descales(q, cache: Cache, new: New, batch: int) -> None:
    """Raise unless factors are there where numbers are e4m3, nowhere else, and of one of the shapes."""
    given = (("q", q, new.q_descale), ("k_cache", cache.k, cache.k_descale))
    for name, x, descale in (*given, ("v_cache", cache.v, cache.v_descale)):
        of = f"{name[0]}_descale"
        if descale is None:
            if x.dtype == E4M3 and name != "q":
                supported = f"float32 factors for {name} of {E4M3}, (batch, kv_heads) or for each block"
                refuse(ValueError, of, "None", supported)
        elif x.dtype != E4M3:
            refuse(ValueError, of, f"given for {name} of dtype {x.dtype}", f"None, or {name} of {E4M3}")
        elif name == "q" or not (isinstance(descale, torch.Tensor) and per_block(descale)):
            check_descale(of, descale, batch, cache.k.shape[2], q.device)
        else:
            _check_block_descale(of, descale, cache)
    if cache.k_descale is not None and per_block(cache.k_descale) != per_block(cache.v_descale):
        was, supported = f"of shape {tuple(cache.v_descale.shape)}", "as many dimensions as k_descale has"
        refuse(ValueError, "v_descale", was, f"{supported}, {cache.k_descale.dim()}")


def _check_block_descale(name: str, x: torch.Tensor, cache: Cache) -> None:
    """Raise unless these may be the factors beside a cache."""
    if x.dtype != torch.float32:
        refuse(TypeError, name, f"of dtype {x.dtype}", "torch.float32")
    if x.device != cache.k.device:
        refuse(ValueError, name, f"on {x.device}", f"the device of k_cache, {cache.k.device}")
    rows, slots, heads, _ = cache.k.shape
    expected = (rows, -(-slots // SCALE_BLOCK), heads)
    if tuple(x.shape) != expected:
        supported = f"{expected}, (rows, blocks of {SCALE_BLOCK} slots, kv_heads) of k_cache"
        refuse(ValueError, name, f"of shape {tuple(x.shape)}", f"{supported}; or (batch, kv_heads)")


def _check_table(q, cache: Cache, batch: int, whose: str) -> None:
    table, page_size = cache.page_table, cache.k.shape[1]
    if table.dtype != torch.int32:
        refuse(TypeError, "page_table", f"of dtype {table.dtype}", "torch.int32")
    if table.device != q.device:
        refuse(ValueError, "page_table", f"on {table.device}", f"the device of q, {q.device}")
    if table.dim() != 2 or (table.shape[1] > 1 and table.stride(1) != 1):
        was = f"of shape {tuple(table.shape)}, strides {table.stride()}"
        refuse(ValueError, "page_table", was, "(batch, max_pages), the last dimension contiguous")
    if table.shape[0] != batch:
        refuse(ValueError, "page_table", f"for {table.shape[0]} sequences", f"{whose}, {batch}")
    if page_size == 0:
        refuse(
            ValueError, "k_cache", "of page size 0", "(pages, page_size, kv_heads, head_dim), page_size > 0"
        )


def check_new(q, k, v, cache: Cache, new: New) -> None:
    """Raise unless the new keys and values fit the cache that they are to be written into."""
    packed = new.cu_seqlens_k_new is not None
    form = (
        "(total, kv_heads, head_dim) with cu_seqlens_k_new"
        if packed
        else "(batch, seqlen, kv_heads, head_dim)"
    )
    for name, x, into in (("k", k, cache.k), ("v", v, cache.v)):
        _check_form(name, x, q, 3 if packed else 4, form)
        _check_new_type(name, x.dtype, k.dtype, q.dtype, cache)
        if x.shape[-2:] != into.shape[-2:]:
            was = f"of {x.shape[-2]} heads of dimension {x.shape[-1]}"
            supported = f"those of {name}_cache, {into.shape[-2]} of {into.shape[-1]}"
            refuse(ValueError, name, was, supported)
        _check_memory(f"{name}_cache", into, "key")
    if v.shape[:-2] != k.shape[:-2]:
        refuse(ValueError, "v", f"of shape {tuple(v.shape)}", f"as many keys as k, {tuple(k.shape[:-2])}")
    batch = q.shape[0] if new.cu_seqlens_q is None else new.cu_seqlens_q.shape[0] - 1
    if not packed and k.shape[0] != batch:
        refuse(ValueError, "k", f"of batch size {k.shape[0]}", f"the batch size of q, {batch}")
    if per_block(cache.k_descale):
        _check_memory("k_descale", cache.k_descale, "block")
        _check_memory("v_descale", cache.v_descale, "block")


def _check_memory(name: str, into: torch.Tensor, what: str) -> None:
    """Raise unless elements can be written one by one."""
    if any(size > 1 and step == 0 for size, step in zip(into.shape, into.stride(), strict=True)):
        was = f"expanded (strides {into.stride()})"
        refuse(ValueError, name, was, f"memory for every {what}, if keys are appended")


def _check_new_type(name: str, dtype, of_k, of_q, cache: Cache) -> None:
    """Raise unless new numbers are of q's type; over an FP8 cache of 16 bits, or e4m3 in a unit given."""
    if cache.k.dtype != E4M3:
        return check_dtype(name, dtype, of_q)
    supported = NARROW if of_q == E4M3 else (of_q,)
    if not per_block(cache.k_descale):
        supported = (*supported, E4M3)
    if dtype not in supported:
        why = f"; {E4M3} only with factors (batch, kv_heads)" if dtype == E4M3 else ""
        refuse(TypeError, name, f"of dtype {dtype}", ", ".join(map(str, supported)) + why)
    if dtype != of_k:
        refuse(TypeError, name, f"of dtype {dtype}", f"the dtype of k, {of_k}")


def check_turns(q, k) -> None:
    """Raise unless q and new keys, if there are any, are numbers that can be rotated."""
    for name, x in (("q", q), ("k", k)):
        if x is not None and x.dtype == E4M3:
            was, supported = f"given for {name} of dtype {E4M3}", f"None, or {name} of 16 bits"
            refuse(NotImplementedError, "rotary_cos", was, supported)


def check_rotary(q, rotary: Rotary, new: New) -> None:
    """Raise unless the tables fit q."""
    cos, sin, seqlens = rotary
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if x.dtype not in (q.dtype, torch.float32):
            refuse(TypeError, name, f"of dtype {x.dtype}", f"torch.float32 or the dtype of q, {q.dtype}")
        if x.device != q.device:
            refuse(ValueError, name, f"on {x.device}", f"the device of q, {q.device}")
        if x.dim() != 2 or 0 in x.shape or (x.shape[1] > 1 and x.stride(1) != 1):
            was = f"of shape {tuple(x.shape)}, strides {x.stride()}"
            refuse(ValueError, name, was, "(positions, rotary_dim / 2), the last dimension contiguous")
    if 2 * cos.shape[1] > q.shape[-1]:
        was = f"of {cos.shape[1]} columns, rotary_dim {2 * cos.shape[1]}"
        refuse(ValueError, "rotary_cos", was, f"rotary_dim up to the head_dim of q, {q.shape[-1]}")
    if sin.shape != cos.shape or sin.dtype != cos.dtype or sin.stride() != cos.stride():
        was = f"{sin.dtype} of shape {tuple(sin.shape)}, strides {sin.stride()}"
        supported = f"as rotary_cos: {cos.dtype}, {tuple(cos.shape)}, {cos.stride()}"
        refuse(ValueError, "rotary_sin", was, supported)
    if seqlens is not None:
        batch = q.shape[0] if new.cu_seqlens_q is None else new.cu_seqlens_q.shape[0] - 1
        check_vector("rotary_seqlens", seqlens, q.device, batch, "the batch size of q")


def _check_form(name: str, x: torch.Tensor, q: torch.Tensor, rank: int, form: str) -> None:
    if x.layout != torch.strided:
        refuse(ValueError, name, f"a tensor with layout {x.layout}", "torch.strided")
    if x.dim() != rank:
        refuse(ValueError, name, f"a tensor of shape {tuple(x.shape)}", f"{rank} dimensions {form}")
    if x.device != q.device:
        refuse(ValueError, name, f"on {x.device}", f"the device of q, {q.device}")


def check_out(out, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless `out` is memory for a result of this shape."""
    if not isinstance(out, torch.Tensor):
        refuse(TypeError, "out", type(out).__name__, "None or a torch.Tensor")
    if out.dtype != dtype:
        refuse(TypeError, "out", f"of dtype {out.dtype}", f"the dtype of the result, {dtype}")
    if out.device != device:
        refuse(ValueError, "out", f"on {out.device}", f"the device of the result, {device}")
    if tuple(out.shape) != tuple(shape) or not out.is_contiguous():
        was = f"of shape {tuple(out.shape)}, strides {out.stride()}"
        refuse(ValueError, "out", was, f"the shape of the result, {tuple(shape)}, contiguous")


def check_workspace(workspace, spec: DecodeSpec, needed: int) -> None:
    """Raise unless a plan that needs so many bytes can work here."""
    if not isinstance(workspace, torch.Tensor):
        refuse(TypeError, "workspace", type(workspace).__name__, "None, or what decode_workspace returns")
    if workspace.dtype != torch.uint8:
        refuse(TypeError, "workspace", f"of dtype {workspace.dtype}", "torch.uint8")
    if workspace.device != spec.device:
        refuse(ValueError, "workspace", f"on {workspace.device}", f"the device of q, {spec.device}")
    if workspace.dim() != 1 or not workspace.is_contiguous() or workspace.data_ptr() % ALIGNMENT:
        was = f"of shape {tuple(workspace.shape)}, strides {workspace.stride()} at {workspace.data_ptr():#x}"
        refuse(ValueError, "workspace", was, f"one dimension, contiguous, at a multiple of {ALIGNMENT} bytes")
    if workspace.shape[0] < needed:
        supported = f"at least {needed}, which decode_workspace allocates"
        refuse(ValueError, "workspace", f"of {workspace.shape[0]} bytes", supported)


def check_metadata(metadata, device: torch.device) -> None:
    """Raise unless this may have come from get_scheduler_metadata."""
    supported = "None, or what get_scheduler_metadata returns"
    if not isinstance(metadata, torch.Tensor):
        refuse(TypeError, "scheduler_metadata", type(metadata).__name__, supported)
    if metadata.dtype != torch.int32:
        refuse(TypeError, "scheduler_metadata", f"of dtype {metadata.dtype}", supported)
    if metadata.device != device:
        refuse(ValueError, "scheduler_metadata", f"on {metadata.device}", f"the device of q, {device}")
    if tuple(metadata.shape) != (METADATA_SIZE,):
        refuse(ValueError, "scheduler_metadata", f"of shape {tuple(metadata.shape)}", supported)


# Numbers


def check_length(spec: DecodeSpec | AppendSpec, length: int, seqlen_new: int) -> None:
    """Raise unless the one length of all sequences fits, with what is appended. It is on the host: always."""
    _check_one(spec, length, seqlen_new, "")
    if isinstance(spec, AppendSpec) and not spec.has_rotary_seqlens:
        rows = 0 if spec.packed_q or not spec.batch else spec.seqlen_q  # packed: seqlen_q is a bound
        _check_positions(spec, length, seqlen_new if spec.batch else 0, rows, "")


def _check_one(spec, length: int, added: int, where: str) -> None:
    supported = f"the capacity of a sequence, {spec.capacity}"
    if not 0 <= length <= spec.capacity:
        refuse(ValueError, "cache_seqlens", f"{length}{where}", f"0 to {supported}")
    if length + added > spec.capacity:
        was = f"{length}{where}, with {added} keys to append"
        refuse(ValueError, "cache_seqlens", was, f"a sum of at most {supported}")


def _check_positions(spec: AppendSpec, first: int, added: int, rows: int, where: str) -> None:
    """`rows`: queries of the sequence."""
    if spec.rotary_dim == 0:
        return
    needed = first + max(added, rows if spec.per_token else min(rows, 1))
    if first < 0:
        refuse(ValueError, "rotary_seqlens", f"{first}{where}", "at least 0")
    if needed > max(spec.rotary_len, first):
        supported = f"at least {needed}, for a sequence that starts at {first}{where}"
        refuse(ValueError, "rotary_cos", f"of {spec.rotary_len} positions", supported)


def check_contents(spec: DecodeSpec | AppendSpec, cache: Cache, new: New, rotary_seqlens) -> None:
    """Raise unless the numbers in tensors make sense. On a GPU this waits for the device.

    With an AppendSpec also those that writing and rotating depend on.
    """
    batch, appends = spec.batch, isinstance(spec, AppendSpec)
    rows = [spec.seqlen_q] * batch
    if new.cu_seqlens_q is not None:
        rows = check_starts("q", new.cu_seqlens_q, None, spec.seqlen_q, spec.total_q)
    added = [new.seqlen_new] * batch
    if new.cu_seqlens_k_new is not None:
        total = spec.total_new if appends else int(new.cu_seqlens_k_new[-1])
        added = check_starts("k_new", new.cu_seqlens_k_new, None, total, total)
    before = [cache.seqlen] * batch if cache.seqlens is None else cache.seqlens.tolist()
    for b in range(batch):
        _check_one(spec, before[b], added[b], f" at {b}")
    keys = [n + more for n, more in zip(before, added, strict=True)]
    if cache.leftpad is not None:
        for b, (pad, n) in enumerate(zip(cache.leftpad.tolist(), keys, strict=True)):
            if not 0 <= pad <= n:
                refuse(ValueError, "cache_leftpad", f"{pad} at {b}", f"0 to the keys of that sequence, {n}")
    writes = appends and spec.has_new
    if cache.batch_idx is not None:
        _check_rows(spec, cache.batch_idx.tolist(), writes)
    if cache.page_table is not None:
        _check_pages(spec, cache.page_table.tolist(), keys)
        if writes:
            _check_written_pages(spec, cache.page_table.tolist(), before, added)
    if spec.fp8:
        _check_factors(spec, cache, new, before, writes)
    if appends and spec.rotary_dim:
        first = before if rotary_seqlens is None else rotary_seqlens.tolist()
        for b in range(batch):
            _check_positions(spec, first[b], added[b], rows[b], f" at {b}")


def _check_rows(spec, rows: list[int], writes: bool) -> None:
    for b, row in enumerate(rows):
        if not 0 <= row < spec.cache_rows:
            refuse(
                ValueError, "cache_batch_idx", f"{row} at {b}", f"0 to {spec.cache_rows - 1}, rows of k_cache"
            )
        if writes and row in rows[:b]:
            was = f"{row} at {rows.index(row)} and at {b}"
            refuse(ValueError, "cache_batch_idx", was, "a row once only, if keys are appended")


def _check_pages(spec, table: list[list[int]], keys: list[int]) -> None:
    """Entries past the end of a sequence may hold anything."""
    for b, (pages, n) in enumerate(zip(table, keys, strict=True)):
        for i, page in enumerate(pages[: -(-n // spec.page_size)]):
            if not 0 <= page < spec.cache_rows:
                supported = f"0 to {spec.cache_rows - 1}, pages of k_cache"
                refuse(ValueError, "page_table", f"{page} at ({b}, {i})", supported)


def _check_written_pages(spec, table: list[list[int]], before: list[int], added: list[int]) -> None:
    """Two sequences may share a page that they read, not a slot that both write, nor one whose factor."""
    unit = spec.descale_block or 1
    taken: dict[int, list[tuple[int, int, int]]] = {}  # page: (sequence, first slot written, slot after)
    for b, (pages, n, more) in enumerate(zip(table, before, added, strict=True)):
        for i in range(n // spec.page_size, -(-(n + more) // spec.page_size) if more else 0):
            start = i * spec.page_size
            low, high = max(n - start, 0), min(n + more - start, spec.page_size)
            low, high = low // unit * unit, -(-high // unit) * unit
            for other, other_low, other_high in taken.setdefault(pages[i], []):
                if low < other_high and other_low < high:
                    was = f"{pages[i]} for the keys appended to {other} and to {b}"
                    refuse(ValueError, "page_table", was, "a page once only where keys are appended")
            taken[pages[i]].append((b, low, high))


def _check_factors(spec, cache: Cache, new: New, before: list[int], writes: bool) -> None:
    """Factors of what is there before the call. Those of blocks in which nothing is, or only padding to which
    nothing is appended, may be anything."""
    check_descale_numbers("q_descale", new.q_descale)
    if not spec.descale_block:
        check_descale_numbers("k_descale", cache.k_descale)
        check_descale_numbers("v_descale", cache.v_descale)
        return
    pads = [0] * spec.batch if cache.leftpad is None else cache.leftpad.tolist()
    rows = list(range(spec.batch)) if cache.batch_idx is None else cache.batch_idx.tolist()
    table = None if cache.page_table is None else cache.page_table.tolist()
    room, unit, used = cache.k.shape[1], spec.descale_block, []
    for b, (pad, n) in enumerate(zip(pads, before, strict=True)):
        if n == 0 or (pad >= n and not writes):
            continue
        for page in range(min(pad, n) // room, -(-n // room)):
            row = rows[b] if table is None else table[b][page]
            first, stop = max(min(pad, n) - page * room, 0), min(n - page * room, room)
            used += [(row, block) for block in range(first // unit, -(-stop // unit))]
    if used:
        where = tuple(torch.tensor(used, device=spec.device).T)
        check_descale_numbers("k_descale", cache.k_descale[where])
        check_descale_numbers("v_descale", cache.v_descale[where])
