"""A paged key/value cache for `flash_attn_with_kvcache`: which pages hold which tokens of which sequence.

Pages of a fixed number of tokens, a table per sequence, reference counts and copy on write are those of
PagedAttention (arXiv 2309.06180, sec. 4); full pages found again by a chain of hashes of their tokens are
vLLM's automatic prefix caching (its "Automatic Prefix Caching" design document), as small as nano-vllm's
block manager. Attention itself knows nothing of this file: it gets tensors.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import hashlib
import itertools
import numbers
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch

from tandem_attn import SCALE_BLOCK

_E4M3 = torch.float8_e4m3fn
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, _E4M3)


class PoolExhausted(RuntimeError):
    """A `PagedKVCache` has not enough free pages (or sequence slots): `needed` and `free` count `what`.
    Nothing was changed."""

    def __init__(self, needed: int, free: int, what: str = "pages") -> None:
        super().__init__(needed, free, what)
        self.needed, self.free, self.what = needed, free, what

    def __str__(self) -> str:
        return f"{self.needed} {self.what} needed, {self.free} free"


@dataclasses.dataclass(frozen=True)
class SequenceHandle:
    """One sequence of one cache, until it is freed: `slot` is its row of `page_table` and `seqlens`."""

    cache: PagedKVCache = dataclasses.field(repr=False)
    slot: int
    generation: int  # never used twice, so that a handle outlives neither its sequence nor its slot


class Batch(NamedTuple):
    """What attention wants to know of some sequences: int32, on the device, in buffers that never move."""

    page_table: torch.Tensor  # (rows, max_pages_per_sequence)
    cache_seqlens: torch.Tensor  # (rows,): tokens committed, before those that are reserved
    cu_seqlens_new: torch.Tensor  # (rows + 1,): where each sequence's reserved tokens start in packed q, k, v


@dataclasses.dataclass
class _Sequence:
    """What the host knows of a live sequence."""

    generation: int
    pages: list[int]
    length: int  # tokens committed
    digest: bytes  # of all tokens in the first `hashed` pages
    hashed: int
    tokens: list[int]  # known ones from page `hashed` on; a prompt's reach beyond `length`
    known: bool = True  # no token so far was committed without saying which
    reserved: int = 0


class PagedKVCache:
    """Keys and values of many sequences, for all layers, in one pool of pages.

        cache = PagedKVCache(num_layers=32, num_pages=4096, page_size=128, num_kv_heads=8, head_dim=128,
                             max_sequences=64, device="cuda")
        sequence = cache.allocate(prompt)                     # prompt: token ids
        new = prompt[cache.length(sequence):]                 # what no earlier sequence has computed
        cache.reserve([sequence], len(new))                   # before the forward pass: pages to write to
        batch = cache.batch([sequence])
        for layer in range(32):
            out = flash_attn_with_kvcache(q, cache.k[layer], cache.v[layer], k, v, causal=True,
                                          cache_seqlens=batch.cache_seqlens, page_table=batch.page_table,
                                          **cache.descales(layer))
        cache.commit([sequence], len(new))                    # after it: the tokens count

    k, v         (num_layers, num_pages, page_size, num_kv_heads, head_dim or head_dim_v), zeros at first
    k_descale, v_descale   for dtype float8_e4m3fn the factors beside them, float32 (num_layers, num_pages,
                 blocks of SCALE_BLOCK slots, num_kv_heads), ones at first; else None
    page_table   (max_sequences, max_pages_per_sequence) int32: pages of the sequence in each slot; entries
                 beyond its pages mean nothing
    seqlens      (max_sequences,) int32: tokens committed; 0 in a slot without sequence

    These tensors never move and are updated in place, ready for CUDA graphs. Book-keeping is plain Python on
    the host; the device gets small copies on the current stream and is never waited for. `reserve`, `batch`
    and `commit` belong outside a captured graph. One thread at a time.

    head_dim_v None is head_dim; max_pages_per_sequence None is num_pages; device None is torch's default.

    Raises TypeError and ValueError, naming the argument, what it was and what is supported, also for a
    handle that was freed or is another cache's, and PoolExhausted. After any of these the cache is as before.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        max_sequences: int,
        max_pages_per_sequence: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        width = num_pages if max_pages_per_sequence is None else max_pages_per_sequence
        sizes = dict(num_layers=num_layers, num_pages=num_pages, page_size=page_size)
        sizes |= dict(num_kv_heads=num_kv_heads, head_dim=head_dim, head_dim_v=head_dim_v)
        sizes |= dict(max_sequences=max_sequences, max_pages_per_sequence=width)
        for name, size in sizes.items():
            _integer(name, size, 1)
        if dtype not in _DTYPES:
            _refuse(TypeError, "dtype", dtype, ", ".join(map(str, _DTYPES)))
        shape = (num_layers, num_pages, page_size, num_kv_heads)
        self.k = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros(*shape, head_dim_v, dtype=dtype, device=device)
        self.k_descale = self.v_descale = None
        if dtype == _E4M3:
            shape = (num_layers, num_pages, -(-page_size // SCALE_BLOCK), num_kv_heads)
            self.k_descale = torch.ones(shape, dtype=torch.float32, device=device)
            self.v_descale = torch.ones(shape, dtype=torch.float32, device=device)
        self.device, self.page_size = self.k.device, page_size
        self.num_pages, self.max_sequences, self.max_pages_per_sequence = num_pages, max_sequences, width
        ints = dict(dtype=torch.int32, device=self.device)
        self.page_table = torch.zeros(max_sequences, width, **ints)
        self.seqlens = torch.zeros(max_sequences, **ints)
        self._batch_table = torch.zeros_like(self.page_table)
        self._batch_numbers = torch.zeros(3, max_sequences + 1, **ints)  # slots, lengths, starts

        self._live: dict[int, _Sequence] = {}  # by slot
        self._idle_slots = list(reversed(range(max_sequences)))
        self._generations = itertools.count()
        self._references = [0] * num_pages
        # pages without references, next victim first: those that hold nothing, then the longest unused
        self._free = collections.OrderedDict.fromkeys(range(num_pages))
        self._digest_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}  # full pages that `allocate` can find, referenced or free

    def __repr__(self) -> str:
        pages = f"{self.free_pages} of {self.num_pages} pages of {self.page_size} tokens free"
        kind = str(self.k.dtype).removeprefix("torch.")
        if self.k_descale is not None:
            kind += f" with a factor for each {min(self.page_size, SCALE_BLOCK)} tokens and head"
        live = f"{len(self._live)} of {self.max_sequences} sequences"
        return f"PagedKVCache({pages}, {live}, {kind}, {self.nbytes / 1e6:.1f} MB on {self.device})"

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and their factors."""
        return sum(x.nbytes for x in self._contents)

    @property
    def _contents(self) -> list[torch.Tensor]:
        """What pages hold: (num_layers, num_pages, ...) each."""
        return [x for x in (self.k, self.v, self.k_descale, self.v_descale) if x is not None]

    def descales(self, layer: int) -> dict[str, torch.Tensor]:
        """k_descale and v_descale of a layer, for `flash_attn_with_kvcache`; nothing for 16 bits and more."""
        if self.k_descale is None:
            return {}
        return dict(k_descale=self.k_descale[layer], v_descale=self.v_descale[layer])

    @property
    def capacity(self) -> int:
        """Tokens that one sequence can have at most."""
        return self.max_pages_per_sequence * self.page_size

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds; some may still be found by `allocate`."""
        return len(self._free)

    def length(self, handle: SequenceHandle) -> int:
        """Tokens committed. Just after `allocate`: tokens of the prompt that need no computing."""
        return self._sequence(handle).length

    def pages(self, handle: SequenceHandle) -> tuple[int, ...]:
        """Pages held, in order; the last ones may be waiting for tokens."""
        return tuple(self._sequence(handle).pages)

    def allocate(self, prompt: Sequence[int] | int | None = None) -> SequenceHandle:
        """A new sequence holding pages for its prompt: token ids, or how many (None: none).

        With token ids, the longest run of full pages that any sequence committed for the same first tokens,
        living or freed and not overwritten since, is shared; `length` says how many tokens that is. It is
        always less than the prompt: the last token must be computed to predict the next one.
        """
        tokens, count = [], 0
        if isinstance(prompt, numbers.Integral):
            count = _integer("prompt", prompt, 0)
        elif prompt is not None:
            tokens = _token_ids("prompt", prompt)
            count = len(tokens)
        self._check_capacity("prompt", count)
        self._check_room(1, len(self._idle_slots), "sequence slots")
        shared, digest = self._prefix(tokens)
        hashed = len(shared)
        fresh = self._pages_for(count) - hashed
        self._check_room(fresh, self.free_pages - sum(not self._references[page] for page in shared))
        for page in shared:
            self._references[page] += 1
            self._free.pop(page, None)
        pages = shared + [self._take() for _ in range(fresh)]
        length = hashed * self.page_size
        return self._admit([_Sequence(-1, pages, length, digest, hashed, tokens[length:])])[0]

    def fork(self, handle: SequenceHandle, n: int = 1) -> list[SequenceHandle]:
        """n new sequences with the tokens of this one. Pages are shared until somebody writes.

        The sequence must have nothing reserved: commit first (0 tokens to give the reservation up).
        """
        parent = self._sequence(handle)
        _integer("n", n, 1)
        if parent.reserved:
            _refuse(ValueError, "handle", f"{handle} with {parent.reserved} tokens reserved", "commit first")
        self._check_room(n, len(self._idle_slots), "sequence slots")
        pages = parent.pages[: self._pages_for(parent.length)]
        tokens = parent.tokens[: parent.length - parent.hashed * self.page_size]
        for page in pages:
            self._references[page] += n
        return self._admit([dataclasses.replace(parent, pages=[*pages], tokens=[*tokens]) for _ in range(n)])

    def free(self, handle: SequenceHandle) -> None:
        """End a sequence. Its full pages can be found by `allocate` until they are needed for others."""
        sequence = self._sequence(handle)
        del self._live[handle.slot]
        self._idle_slots.append(handle.slot)
        for page in reversed(sequence.pages):  # the end of a prefix is less useful than its beginning
            self._references[page] -= 1
            if not self._references[page]:
                self._free[page] = None
                if self._digest_of[page] is None:
                    self._free.move_to_end(page, last=False)
        self._write(self.seqlens, {handle.slot: 0})

    def reserve(self, handles: Sequence[SequenceHandle], counts: int | Sequence[int]) -> None:
        """Before a forward pass: room for `counts` new tokens (of each sequence; an int: the same for all).

        Takes pages and copies a partly filled last page that is shared, in all layers. All or nothing:
        PoolExhausted comes before anything is changed. Replaces a reservation that was not committed.
        """
        sequences = self._sequences(handles)
        counts = _each("counts", counts, len(sequences))
        leaving = collections.Counter()  # sequences of this call that will leave a shared page
        plans = []
        for sequence, count in zip(sequences, counts, strict=True):
            end = sequence.length + count
            self._check_capacity("counts", end, f"{count} after {sequence.length} tokens")
            copies = False
            if count and sequence.length % self.page_size:
                page = sequence.pages[sequence.length // self.page_size]
                copies = self._references[page] - leaving[page] > 1
                leaving[page] += copies
            plans.append((copies, max(0, self._pages_for(end) - len(sequence.pages))))
        self._check_room(sum(copies + grows for copies, grows in plans), self.free_pages)
        cells = {}  # of page_table, by position in memory
        for handle, sequence, (copies, grows), count in zip(handles, sequences, plans, counts, strict=True):
            changed = range(len(sequence.pages), len(sequence.pages) + grows)
            sequence.pages += [self._take() for _ in changed]
            if copies:
                last = sequence.length // self.page_size
                sequence.pages[last] = self._copy_of(sequence.pages[last])
                changed = (last, *changed)
            row = handle.slot * self.max_pages_per_sequence
            cells.update((row + i, sequence.pages[i]) for i in changed)
            sequence.reserved = count
        self._write(self.page_table, cells)

    def batch(self, handles: Sequence[SequenceHandle] | None = None, rows: int | None = None) -> Batch:
        """Tables and lengths of these sequences, in this order; None: of all slots, in place.

        Rows are gathered into buffers that start at the same address every time and hold until the next call:
        a graph captured with `rows` rows can be replayed for up to that many sequences (None: as many as
        handles). A row without sequence has length 0 and nothing reserved, but pages of others in its table:
        append with cu_seqlens_k_new=cu_seqlens_new (k and v packed), which writes nothing for it.
        """
        if handles is None:
            if rows not in (None, self.max_sequences):
                _refuse(ValueError, "rows", rows, f"None or {self.max_sequences} without handles")
            rows, slots = self.max_sequences, range(self.max_sequences)
            sequences = [self._live.get(slot) for slot in slots]
        else:
            sequences, slots = self._sequences(handles), [handle.slot for handle in handles]
            rows = len(sequences) if rows is None else _integer("rows", rows, len(sequences))
            if rows > self.max_sequences:
                _refuse(ValueError, "rows", rows, f"at most {self.max_sequences}, max_sequences")
        pad = [0] * (self.max_sequences - len(sequences))
        lengths = [s.length if s else 0 for s in sequences]
        ends = itertools.accumulate([s.reserved if s else 0 for s in sequences] + pad)
        staged = self._staged([[*slots, *pad, 0], [*lengths, *pad, 0], [0, *ends]], torch.int32)
        self._batch_numbers.copy_(staged, non_blocking=True)
        chosen, cache_seqlens, starts = self._batch_numbers
        if handles is None:
            return Batch(self.page_table, self.seqlens, starts)
        table = torch.index_select(self.page_table, 0, chosen[:rows], out=self._batch_table[:rows])
        return Batch(table, cache_seqlens[:rows], starts[: rows + 1])

    def commit(
        self,
        handles: Sequence[SequenceHandle],
        counts: int | Sequence[int],
        tokens: Sequence[Sequence[int] | None] | None = None,
    ) -> None:
        """After a forward pass: the first `counts` of the reserved tokens are there; the others are given up.

        tokens   for each sequence the ids of these tokens, or None. Prompts are known already. Pages whose
                 tokens are all known can be found by `allocate`; after an unknown token no page can.
        """
        sequences = self._sequences(handles)
        counts = _each("counts", counts, len(sequences))
        if tokens is not None and not isinstance(tokens, (list, tuple)):
            _refuse(TypeError, "tokens", type(tokens).__name__, "None, or a list or tuple of ids or None")
        given = [None] * len(sequences) if tokens is None else [*tokens]
        if len(given) != len(sequences):
            _refuse(
                ValueError, "tokens", f"of length {len(given)}", f"one for each of {len(sequences)} handles"
            )
        for i, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            if count > sequence.reserved:
                was = f"{count} for {handles[i]}"
                _refuse(ValueError, "counts", was, f"at most the {sequence.reserved} tokens reserved")
            if given[i] is None:
                continue
            given[i] = ids = _token_ids("tokens", given[i])
            if len(ids) != count:
                was = f"{len(ids)} ids for {handles[i]}"
                _refuse(ValueError, "tokens", was, f"as many as are committed, {count}")
            prompt = sequence.tokens[sequence.length - sequence.hashed * self.page_size :][:count]
            if ids[: len(prompt)] != prompt:
                _refuse(ValueError, "tokens", f"{ids} for {handles[i]}", f"those of its prompt, {prompt}")
        for sequence, count, ids in zip(sequences, counts, given, strict=True):
            self._advance(sequence, count, ids)
        self._write(self.seqlens, {h.slot: s.length for h, s in zip(handles, sequences, strict=True)})

    def _advance(self, sequence: _Sequence, count: int, ids: list[int] | None) -> None:
        """Count tokens of a sequence and make the pages that they fill known."""
        ahead = sequence.hashed * self.page_size + len(sequence.tokens) - sequence.length
        sequence.length, sequence.reserved = sequence.length + count, 0
        if not sequence.known:
            return
        if ids is not None:
            sequence.tokens += ids[ahead:]
        elif count > ahead:
            sequence.known = False
        size = self.page_size
        while len(sequence.tokens) >= size and (sequence.hashed + 1) * size <= sequence.length:
            sequence.digest = _digest(sequence.digest, sequence.tokens[:size])
            page = sequence.pages[sequence.hashed]
            if self._page_of.setdefault(sequence.digest, page) == page:
                self._digest_of[page] = sequence.digest
            sequence.hashed += 1
            del sequence.tokens[:size]

    def _prefix(self, tokens: list[int]) -> tuple[list[int], bytes]:
        """The full pages in the pool that these tokens start with, never all tokens; their digest."""
        pages, digest, size = [], b"", self.page_size
        for start in range(0, len(tokens) - size, size):
            following = _digest(digest, tokens[start : start + size])
            if following not in self._page_of:
                break
            digest = following
            pages.append(self._page_of[digest])
        return pages, digest

    def _admit(self, sequences: list[_Sequence]) -> list[SequenceHandle]:
        """Give new sequences a slot and write their rows."""
        handles, cells = [], {}
        for sequence in sequences:
            handle = SequenceHandle(self, self._idle_slots.pop(), next(self._generations))
            sequence.generation = handle.generation
            self._live[handle.slot] = sequence
            row = handle.slot * self.max_pages_per_sequence
            cells.update((row + i, page) for i, page in enumerate(sequence.pages))
            handles.append(handle)
        self._write(self.page_table, cells)
        self._write(self.seqlens, {h.slot: s.length for h, s in zip(handles, sequences, strict=True)})
        return handles

    def _take(self) -> int:
        """A free page with one reference; what it held is forgotten."""
        page, _ = self._free.popitem(last=False)
        digest, self._digest_of[page] = self._digest_of[page], None
        if digest is not None:
            del self._page_of[digest]
        self._references[page] = 1
        return page

    def _copy_of(self, page: int) -> int:
        """A page of one's own with the same contents in all layers, in exchange for a shared one."""
        copy = self._take()
        self._references[page] -= 1
        for x in self._contents:
            x[:, copy].copy_(x[:, page])
        return copy

    def _staged(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        """Host memory from which a copy to the device need not be waited for."""
        return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=self.device.type == "cuda")

    def _write(self, into: torch.Tensor, cells: dict[int, int]) -> None:
        """Set elements, by their position in memory."""
        if cells:
            staged = self._staged([list(cells), list(cells.values())], torch.int64)
            where, what = staged.to(self.device, non_blocking=True)
            into.view(-1).index_copy_(0, where, what.to(into.dtype))

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _check_capacity(self, name: str, tokens: int, was: str = "") -> None:
        if tokens > self.capacity:
            supported = f"sequences of up to {self.capacity} tokens (max_pages_per_sequence * page_size)"
            _refuse(ValueError, name, was or f"{tokens} tokens", supported)

    def _check_room(self, needed: int, free: int, what: str = "pages") -> None:
        if needed > free:
            raise PoolExhausted(needed, free, what)

    def _sequence(self, handle: SequenceHandle, name: str = "handle") -> _Sequence:
        if not isinstance(handle, SequenceHandle):
            _refuse(TypeError, name, f"{handle!r} ({type(handle).__name__})", "what allocate and fork return")
        if handle.cache is not self:
            _refuse(ValueError, name, f"{handle} of another cache", "handles of this cache")
        found = self._live.get(handle.slot)
        if found is None or found.generation != handle.generation:
            _refuse(ValueError, name, f"{handle}, which was freed", "handles of living sequences")
        return found

    def _sequences(self, handles: Sequence[SequenceHandle]) -> list[_Sequence]:
        if not isinstance(handles, (list, tuple)):
            _refuse(TypeError, "handles", type(handles).__name__, "a list or tuple of handles")
        found = [self._sequence(handle, "handles") for handle in handles]
        if len({handle.slot for handle in handles}) < len(handles):
            _refuse(ValueError, "handles", f"{handles}", "each sequence once")
        return found


def _digest(before: bytes, tokens: list[int]) -> bytes:
    """SHA-256 of a page's tokens and all before them: equal digests mean equal tokens, in practice."""
    return hashlib.sha256(before + array.array("q", tokens).tobytes()).digest()


def _token_ids(name: str, tokens) -> list[int]:
    supported = "a sequence of ints of 64 bits (of a tensor: its tolist())"
    if isinstance(tokens, (str, bytes, torch.Tensor)):
        _refuse(TypeError, name, type(tokens).__name__, supported)
    try:
        return array.array("q", list(tokens)).tolist()
    except TypeError:
        _refuse(TypeError, name, f"{tokens!r} ({type(tokens).__name__})", supported)
    except OverflowError:
        _refuse(ValueError, name, f"{tokens!r}", supported)


def _each(name: str, counts, n: int) -> list[int]:
    """One count for each of n sequences."""
    if isinstance(counts, numbers.Integral):
        return [_integer(name, counts, 0)] * n
    if not isinstance(counts, (list, tuple)):
        _refuse(TypeError, name, f"{counts!r} ({type(counts).__name__})", "int, or a list or tuple of them")
    if len(counts) != n:
        _refuse(ValueError, name, f"of length {len(counts)}", f"one for each of {n} handles")
    return [_integer(name, count, 0) for count in counts]


def _integer(name: str, x, least: int) -> int:
    if isinstance(x, bool) or not isinstance(x, numbers.Integral):
        _refuse(TypeError, name, f"{x!r} ({type(x).__name__})", "int")
    if x < least:
        _refuse(ValueError, name, x, f"at least {least}")
    return int(x)


def _refuse(error: type[Exception], name: str, was, supported: str) -> NoReturn:
    raise error(f"{name} is {was}; supported: {supported}")
