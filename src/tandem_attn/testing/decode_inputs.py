"""Attention over a KV cache, for tests: inputs from a case, poison where nothing is declared, an oracle.

Every slot of the cache that holds no declared key is NaN: other rows, other pages, the rest of a page, left
padding. Entries of a page table past the end of a sequence name no page. The oracle is float64 with an
explicit mask and rotates complex numbers; it shares no code with `tandem_attn.reference_decode`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import torch

from tandem_attn.testing.budget import assert_within_budget, attend_rows, lse_band
from tandem_attn.testing.inputs import DTYPE_NAMES

POISON_PAGE = 2**30
SPARE = 2  # cache rows, pages, and rows of packed tensors, that belong to nobody
ROTARY = (None, "interleaved", "halves")
LAYOUTS = ("plain", "strided")
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """One call, all but the numbers. A tuple is one value for each sequence."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    head_dim_v: int | None = None  # None: head_dim
    capacity: int = 32  # with pages: rounded up to whole ones
    seqlens: tuple[int, ...] | int | None = (20, 7)  # before new tokens; a tuple goes in as a tensor
    tokens: tuple[int, ...] | int = 1  # queries of a sequence; a tuple: packed
    new: tuple[int, ...] | int | None = None  # keys appended to a sequence; a tuple: packed
    page_size: int = 0  # 0: each sequence in a row of its own
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    leftpad: tuple[int, ...] | None = None
    batch_idx: tuple[int, ...] | None = None
    rotary: str | None = None
    rotary_dim: int | None = None  # None: head_dim
    rotary_seqlens: tuple[int, ...] | None = None
    rotary_dtype: torch.dtype | None = None  # None: dtype
    num_splits: int = 0
    split_size: int | None = None
    layout: str = "plain"  # "strided": the cache is (rows, heads, slots, dim), q a slice of a fused qkv

    def __post_init__(self) -> None:
        if self.rotary not in ROTARY or self.layout not in LAYOUTS:
            raise ValueError(f"rotary is {self.rotary!r}, layout {self.layout!r}; see {ROTARY}, {LAYOUTS}")
        for name in ("seqlens", "tokens", "new", "leftpad", "batch_idx", "rotary_seqlens"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.batch:
                raise ValueError(f"{name} is {value}; the batch is {self.batch}")

    @property
    def dim_v(self) -> int:
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def bounds(self) -> tuple[int, int]:
        """Window (left, right) with `causal` folded in; -1 is unbounded."""
        return (self.window[0], 0) if self.causal else self.window

    @property
    def slots(self) -> int:
        """Keys for which a sequence has room."""
        return -(-self.capacity // self.page_size) * self.page_size if self.page_size else self.capacity

    def each(self, name: str) -> tuple[int, ...]:
        """A field as one number for each sequence."""
        value = getattr(self, name)
        if name == "seqlens" and value is None:
            value = self.slots
        return value if isinstance(value, tuple) else (value or 0,) * self.batch

    @property
    def keys(self) -> tuple[int, ...]:
        """Slots in use after the call."""
        return tuple(n + more for n, more in zip(self.each("seqlens"), self.each("new"), strict=True))

    @property
    def id(self) -> str:
        """Short name for pytest: b2-q1-k20.7of32-h4kv2-d16-p16-causal-bf16."""
        dims = f"d{self.head_dim}" + (f"v{self.dim_v}" if self.dim_v != self.head_dim else "")
        sizes = f"q{_short(self.tokens)}-k{_short(self.seqlens)}of{self.slots}"
        parts = [f"b{self.batch}-{sizes}-h{self.heads}kv{self.kv_heads}-{dims}"]
        named = dict(new=self.new, p=self.page_size, pad=self.leftpad, rows=self.batch_idx)
        named |= dict(cap=self.softcap, splits=self.num_splits, size=self.split_size)
        parts += [f"{name}{_short(value)}" for name, value in named.items() if value]
        if self.causal:
            parts.append("causal")
        if self.window != (-1, -1):
            parts.append(f"w{self.window[0]}_{self.window[1]}")
        if self.rotary:
            dim = f"{self.rotary_dim or self.head_dim}"
            parts.append(
                f"{self.rotary}{dim}" + (f"at{_short(self.rotary_seqlens)}" if self.rotary_seqlens else "")
            )
        if self.layout != "plain":
            parts.append(self.layout)
        return "-".join([*parts, DTYPE_NAMES[self.dtype]])


def _short(value) -> str:
    if isinstance(value, tuple):
        text = ".".join(map(str, value[:4]))
        return text if len(value) <= 4 else f"{text}..{len(value)}"
    return "all" if value is None else f"{value:g}"


@dataclasses.dataclass
class Sequence:
    """What one sequence is made of, (n, heads, dim) in the case's dtype."""

    q: torch.Tensor
    k: torch.Tensor  # of the cache; left padding is NaN
    v: torch.Tensor
    k_new: torch.Tensor
    v_new: torch.Tensor
    rows: slice | None  # of packed q
    row: int  # of the cache, without pages
    pages: list[int]


@dataclasses.dataclass
class DecodeInputs:
    """Arguments of the public function, and what they were made from."""

    tensors: dict  # q, k_cache, v_cache and every other tensor; cache_seqlens may be an int
    options: dict
    sequences: list[Sequence]
    memory: tuple[torch.Tensor, torch.Tensor]  # what k_cache and v_cache are views of
    before: tuple[torch.Tensor, torch.Tensor]  # copies of that


def make_decode(case: DecodeCase, device="cpu", seed: int = 0) -> DecodeInputs:
    """Tensors of a case on a device, standard normal where declared."""
    generator = torch.Generator().manual_seed(seed)
    sequences = _numbers(case, generator)
    _find_places(case, sequences, generator)
    tensors, memory = _cache(case, sequences)
    tensors |= _queries(case, sequences) | _new_tokens(case, sequences) | _indices(case, sequences)
    if case.rotary:
        tensors |= _tables(case, generator)
    device = torch.device(device)
    memory = tuple(x.to(device) for x in memory)
    tensors = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in tensors.items()}
    for name, x in zip(("k_cache", "v_cache"), memory, strict=True):
        tensors[name] = x.transpose(1, 2) if case.layout == "strided" else x
    if case.layout == "strided":  # one column of a tensor that holds more
        tensors["q"] = _slice_of_more(tensors["q"])
    options = dict(causal=case.causal, window_size=case.window, softcap=case.softcap)
    options |= dict(num_splits=case.num_splits, split_size=case.split_size)
    if case.rotary:
        options["rotary_interleaved"] = case.rotary == "interleaved"
    for s in sequences:
        for field in ("q", "k", "v", "k_new", "v_new"):
            setattr(s, field, getattr(s, field).to(device))
    return DecodeInputs(tensors, options, sequences, memory, tuple(x.clone() for x in memory))


def run_decode(inputs: DecodeInputs, **more) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) from the public function, which may write the cache."""
    import tandem_attn

    arguments = inputs.tensors | inputs.options | more
    return tandem_attn.flash_attn_with_kvcache(**arguments, return_softmax_lse=True)


def _numbers(case: DecodeCase, generator: torch.Generator) -> list[Sequence]:
    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(case.dtype)

    rows, lengths = case.batch_idx or tuple(range(case.batch)), case.each("seqlens")
    longest = {row: max(n for r, n in zip(rows, lengths, strict=True) if r == row) for row in rows}
    dims = (case.head_dim, case.dim_v)
    # sequences that read one row read the same numbers
    of_row = {row: [normal(n, case.kv_heads, dim) for dim in dims] for row, n in longest.items()}
    sequences = []
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        q = normal(case.each("tokens")[b], case.heads, case.head_dim)
        k, v = (x[:length].clone() for x in of_row[row])
        pad = case.each("leftpad")[b]
        k[:pad], v[:pad] = math.nan, math.nan
        new = [normal(case.each("new")[b], case.kv_heads, dim) for dim in dims]
        sequences.append(Sequence(q, k, v, *new, None, row, []))
    return sequences


def _find_places(case: DecodeCase, sequences: list[Sequence], generator: torch.Generator) -> None:
    """Pages in random order; rows of packed q."""
    if case.page_size:
        needed = [-(-n // case.page_size) for n in case.keys]
        order = iter(torch.randperm(sum(needed) + SPARE, generator=generator).tolist())
        for s, count in zip(sequences, needed, strict=True):
            s.pages = list(itertools.islice(order, count))
    if isinstance(case.tokens, tuple):
        starts = [0, *itertools.accumulate(case.tokens)]
        for s, pair in zip(sequences, itertools.pairwise(starts), strict=True):
            s.rows = slice(*pair)


def _cache(case: DecodeCase, sequences: list[Sequence]) -> tuple[dict, list[torch.Tensor]]:
    """The page table, and memory of k_cache and v_cache."""
    rows, slots, tensors = case.batch + (SPARE if case.batch_idx else 0), case.capacity, {}
    if case.batch_idx:
        rows = max(rows, max(case.batch_idx) + SPARE)
    if case.page_size:
        rows, slots = sum(len(s.pages) for s in sequences) + SPARE, case.page_size
        table = torch.full((case.batch, case.slots // case.page_size), POISON_PAGE, dtype=torch.int32)
        for b, s in enumerate(sequences):
            table[b, : len(s.pages)] = torch.tensor(s.pages, dtype=torch.int32)
        tensors["page_table"] = table
    memory = []
    for dim, name in ((case.head_dim, "k"), (case.dim_v, "v")):
        cache = torch.full((rows, slots, case.kv_heads, dim), math.nan, dtype=case.dtype)
        for s in sequences:
            values = getattr(s, name)
            cache[slots_of(case, s, range(len(values)))] = values
        memory.append(cache.transpose(1, 2).contiguous() if case.layout == "strided" else cache)
    return tensors, memory


def slots_of(case: DecodeCase, sequence: Sequence, numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, slots) of k_cache where these keys of a sequence lie."""
    numbers = torch.tensor(list(numbers), dtype=torch.int64)
    if not case.page_size:
        return torch.full_like(numbers, sequence.row), numbers
    pages = torch.tensor(sequence.pages, dtype=torch.int64)
    return pages[numbers // case.page_size], numbers % case.page_size


def _queries(case: DecodeCase, sequences: list[Sequence]) -> dict:
    if not isinstance(case.tokens, tuple):
        shape = (case.batch, case.tokens, case.heads, case.head_dim)
        q = torch.stack([s.q for s in sequences]) if sequences else torch.zeros(shape, dtype=case.dtype)
        return dict(q=q)
    q = _packed([s.q for s in sequences], (case.heads, case.head_dim), case.dtype)
    return dict(q=q, cu_seqlens_q=_starts(case.tokens), max_seqlen_q=max(case.tokens, default=0))


def _new_tokens(case: DecodeCase, sequences: list[Sequence]) -> dict:
    if case.new is None:
        return {}
    found = {}
    for name, dim in (("k", case.head_dim), ("v", case.dim_v)):
        parts = [getattr(s, f"{name}_new") for s in sequences]
        shape = (case.kv_heads, dim)
        if isinstance(case.new, tuple):
            found[name] = _packed(parts, shape, case.dtype)
        else:
            empty = torch.zeros(0, case.new, *shape, dtype=case.dtype)
            found[name] = torch.stack(parts) if parts else empty
    if isinstance(case.new, tuple):
        found["cu_seqlens_k_new"] = _starts(case.new)
    return found


def _packed(parts: list[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """One after the other, and then rows of nobody."""
    return torch.cat([*parts, torch.full((SPARE, *shape), math.nan, dtype=dtype)])


def _starts(counts: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)


def _slice_of_more(x: torch.Tensor) -> torch.Tensor:
    """A copy whose rows are part of wider ones, the rest of which is NaN."""
    wide = x.new_full((*x.shape[:-2], x.shape[-2] + 2 * SPARE, x.shape[-1]), math.nan)
    part = wide.narrow(-2, SPARE, x.shape[-2])
    part.copy_(x)
    return part


def _indices(case: DecodeCase, sequences: list[Sequence]) -> dict:
    found = {}
    for name, value in (
        ("cache_seqlens", case.seqlens),
        ("cache_leftpad", case.leftpad),
        ("cache_batch_idx", case.batch_idx),
        ("rotary_seqlens", case.rotary_seqlens),
    ):
        if value is not None:
            is_tuple = isinstance(value, tuple)
            found[name] = torch.tensor(value, dtype=torch.int32) if is_tuple else value
    return found


def _tables(case: DecodeCase, generator: torch.Generator) -> dict:
    """Angles of their own for every position and column; just as many positions as are needed."""
    advances = case.bounds != (-1, -1)
    firsts = case.rotary_seqlens or case.each("seqlens")
    counts = zip(case.each("new"), case.each("tokens"), strict=True)
    steps = [max(new, tokens if advances else min(tokens, 1)) for new, tokens in counts]
    positions = max((first + step for first, step in zip(firsts, steps, strict=True)), default=1)
    angles = torch.rand(max(positions, 1), (case.rotary_dim or case.head_dim) // 2, generator=generator)
    dtype = case.rotary_dtype or case.dtype
    angles = (6.0 * angles - 3.0).double()
    return dict(rotary_cos=angles.cos().to(dtype), rotary_sin=angles.sin().to(dtype))


# The oracle


def rotated(case: DecodeCase, inputs: DecodeInputs, x, positions, dtype: torch.dtype) -> torch.Tensor:
    """Rows x (n, heads, dim) as complex numbers times exp(i angle), computed in `dtype`, at least float32."""
    if not case.rotary:
        return x.to(dtype)
    kind = torch.promote_types(dtype, torch.float32)
    cos, sin = inputs.tensors["rotary_cos"].to(kind), inputs.tensors["rotary_sin"].to(kind)
    turn = torch.complex(cos, sin)[positions][:, None]
    dim = 2 * cos.shape[1]
    pairs = x[..., :dim].to(kind)
    if case.rotary == "interleaved":
        pairs = pairs.unflatten(-1, (-1, 2))
    else:
        pairs = pairs.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_real(torch.complex(pairs[..., 0], pairs[..., 1]) * turn)
    turned = turned if case.rotary == "interleaved" else turned.transpose(-1, -2)
    return torch.cat((turned.flatten(-2).to(dtype), x[..., dim:].to(dtype)), -1)


def _turned(case: DecodeCase, inputs: DecodeInputs, x, positions, dtype: torch.dtype) -> torch.Tensor:
    """What attention works on: rotated, and rounded to 16 bits if the case has them."""
    narrow = case.dtype if case.dtype.itemsize == 2 else dtype
    exact = torch.float64 if case.dtype.itemsize == 2 else dtype
    return rotated(case, inputs, x, positions, exact).to(narrow).to(dtype)


def _oracle(case: DecodeCase, inputs: DecodeInputs, dtype: torch.dtype):
    """(out (rows, heads, dim_v), lse (rows, heads)) of all sequences, one after the other, in this dtype."""
    scale = inputs.options.get("softmax_scale") or case.head_dim**-0.5
    firsts = case.rotary_seqlens or case.each("seqlens")
    advances = int(case.bounds != (-1, -1))
    outs, lses = [], []
    for b, s in enumerate(inputs.sequences):
        count = torch.arange(len(s.q), device=s.q.device)
        q = _turned(case, inputs, s.q, firsts[b] + count * advances, dtype)
        k_new = _turned(case, inputs, s.k_new, _positions(case, s, b), dtype)
        k, v = torch.cat((s.k.to(dtype), k_new)), torch.cat((s.v, s.v_new)).to(dtype)
        pad = case.leftpad[b] if case.leftpad else 0
        for head in range(case.heads):
            of = head // (case.heads // case.kv_heads)
            out, lse = attend_rows(count, q[:, head], k[pad:, of], v[pad:, of], case, scale)
            outs.append(out)
            lses.append(lse)
    return outs, lses


def _positions(case: DecodeCase, sequence: Sequence, b: int) -> torch.Tensor:
    """Rotary positions of the new keys of sequence b."""
    first = case.rotary_seqlens[b] if case.rotary_seqlens else case.each("seqlens")[b]
    return first + torch.arange(len(sequence.k_new), device=sequence.q.device)


def assert_decode_right(case: DecodeCase, inputs: DecodeInputs, out, lse, factor: float = 2.0) -> None:
    """Raise AssertionError unless out and lse of declared queries are within budget, and the cache right."""
    assert_cache_right(case, inputs)
    assert out.shape == (*inputs.tensors["q"].shape[:-1], case.dim_v) and out.dtype == case.dtype
    oracle = functools.partial(_oracle, case, inputs)
    assert_outputs_right(case.id, inputs, out, lse, oracle, factor, case.dtype.itemsize == 2)


def assert_outputs_right(
    label: str, inputs: DecodeInputs, out, lse, oracle, factor: float, bands: bool
) -> None:
    """Raise AssertionError unless out and lse of declared queries are within budget of oracle(dtype), which
    is (outs, lses) of every head of every sequence. `bands`: lse has the band of 16-bit types."""
    outs, lses = [], []
    for b, s in enumerate(inputs.sequences):
        of_out, of_lse = (out[b], lse[b]) if s.rows is None else (out[s.rows], lse[:, s.rows])
        outs += of_out.unbind(1)
        lses += of_lse.unbind(0)
    if not outs:
        return
    exact, low = oracle(torch.float64), oracle(out.dtype)
    out, out_exact, out_low = (torch.cat(parts) for parts in (outs, exact[0], low[0]))
    assert_within_budget(out, out_exact, out_low, f"{label} out", factor)
    lse, lse_exact, lse_low = (torch.cat(parts) for parts in (lses, exact[1], low[1]))
    band = lse_band(lse_exact) if bands else None
    assert_within_budget(lse, lse_exact, lse_low, f"{label} lse", factor, band)


def assert_cache_right(case: DecodeCase, inputs: DecodeInputs, written: bool = True) -> None:
    """Raise AssertionError unless new keys and values are where they belong and no other bit has changed.

    Rotated keys are within budget; everything else is equal, NaN included. `written` False: nothing has.
    """
    names = ("k_cache", "v_cache")
    for name, memory, before in zip(names, inputs.memory, inputs.before, strict=True):
        new = torch.zeros(memory.shape, dtype=torch.bool)
        of_cache = new.transpose(1, 2) if case.layout == "strided" else new
        for b, s in enumerate(inputs.sequences if written and case.new is not None else ()):
            where = slots_of(case, s, range(case.each("seqlens")[b], case.keys[b]))
            of_cache[where] = True
            found = inputs.tensors[name][where]
            if name == "v_cache" or not case.rotary:
                expected = s.v_new if name == "v_cache" else s.k_new
                assert torch.equal(bits(found), bits(expected)), f"{case.id} {name}: new rows of {b} differ"
                continue
            positions, kinds = _positions(case, s, b), (torch.float64, case.dtype)
            exact, low = (rotated(case, inputs, s.k_new, positions, kind) for kind in kinds)
            assert_within_budget(found, exact, low, f"{case.id} {name} of {b}")
        same = (bits(memory) == bits(before)).cpu() | new
        assert bool(same.all()), f"{case.id} {name}: {int((~same).sum())} elements changed that nobody named"


def bits(x: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: NaN equals itself."""
    return x.contiguous().view(_BITS[x.dtype.itemsize])
