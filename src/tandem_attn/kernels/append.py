"""Write new keys and values into a cache, and rotate them and the queries: one launch before decoding.

A program takes one token (of q, or of the new k and v) and some of its heads. Rotary embedding (RoFormer,
arXiv 2104.09864): column c and its partner turn by the angle of the token's position; computed in fp32 and
rounded once, in an FP8 cache to e4m3, in the unit of the sequence's factor. Columns past the rotary
dimension, and v, are copied bit by bit, or quantized. A token that has no room in the cache is not written.
A cache with a factor for each block of its slots is what `append_blocks.py` writes.
"""

import dataclasses

import torch

from tandem_attn.device.gluon import aggregate, gl, gluon
from tandem_attn.kernels.config import KernelConfig
from tandem_attn.kernels.config_decode import power_of_two
from tandem_attn.kernels.launcher import KernelLauncher, misaligned
from tandem_attn.spec_decode import AppendSpec, Cache, New

ELEMENTS_AT_ONCE = 2048  # of a program: 16 for each of 128 threads
SEQUENCES_AT_ONCE = 1024  # of packed ones, in the search for a token's


@dataclasses.dataclass(frozen=True)
class AppendConfig(KernelConfig):
    """Compile-time facts of the append kernels."""

    columns: int  # of K, and of V
    columns_v: int
    width: int  # powers of two that hold them, 32 to 256
    heads_at_once: int
    rotary_dim: int
    interleaved: bool
    per_token: bool
    packed_q: bool
    packed_new: bool
    sequences_at_once: int
    has_seqlens: bool
    has_batch_idx: bool
    has_rotary_seqlens: bool
    page_size: int
    quantizes: bool  # new keys and values become e4m3

    @property
    def layout(self):
        across = self.width // 8
        return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])


def append_config(spec: AppendSpec) -> AppendConfig:
    """The configuration for a question."""
    width = power_of_two(max(spec.head_dim, spec.head_dim_v, 32))
    heads = max(spec.num_heads if spec.rotary_dim else 1, spec.num_kv_heads)
    least = 1024 // width  # every thread has 8 elements
    return AppendConfig(
        columns=spec.head_dim,
        columns_v=spec.head_dim_v,
        width=width,
        heads_at_once=max(least, min(ELEMENTS_AT_ONCE // width, power_of_two(heads))),
        rotary_dim=spec.rotary_dim,
        interleaved=spec.interleaved,
        per_token=spec.per_token,
        packed_q=spec.packed_q,
        packed_new=spec.packed_new,
        sequences_at_once=min(SEQUENCES_AT_ONCE, max(32, power_of_two(spec.batch))),
        has_seqlens=spec.has_seqlens,
        has_batch_idx=spec.has_batch_idx,
        has_rotary_seqlens=spec.has_rotary_seqlens,
        page_size=spec.page_size,
        quantizes=spec.quantizes,
    )  # fmt: skip


@gluon.jit
def _sequence_of(row, starts, batch, each, packed: gl.constexpr, config: gl.constexpr):
    """(sequence, token in it, whether there is one) of a row of packed or equally long sequences."""
    if packed:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        b = row * 0
        for c in range(0, batch, config.sequences_at_once):
            i = c + gl.arange(0, config.sequences_at_once, layout)
            end = gl.load(starts + i + 1, mask=i < batch, other=2147483647)
            b += gl.sum((end <= row).to(gl.int32), 0)
        found = b < batch
        start = gl.load(starts + b, mask=found, other=0)
        return b, row - start, found & (row >= start)
    else:
        b = row // each
        return b, row - b * each, b < batch


@gluon.jit
def product(x, y):
    """fp32 x * y, rounded by itself: a sum of such is what the reference computes, bit by bit."""
    asm: gl.constexpr = "mul.rn.f32 $0, $1, $2;"
    return gl.inline_asm_elementwise(asm, "=f,f,f", [x, y], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def in_unit(x, factor):
    """e4m3 of x / factor, to the nearest; what is larger than 448 becomes that."""
    return gl.div_rn(x.to(gl.float32), factor).to(gl.float8e4nv)


@aggregate
class Facts:
    """What every program knows. Pointers that are not given point anywhere."""

    seqlens: gl.tensor  # (batch,) keys before this call
    batch_idx: gl.tensor
    page_table: gl.tensor
    rotary_seqlens: gl.tensor
    seqlen: gl.tensor  # keys of every sequence, where there are no seqlens
    table_stride: gl.tensor
    cos: gl.tensor
    sin: gl.tensor
    rotary_len: gl.tensor
    rotary_stride: gl.tensor
    config: gl.constexpr

    @gluon.jit
    def length(self, b):
        """Keys of sequence b before this call."""
        if self.config.has_seqlens:
            return gl.maximum(gl.load(self.seqlens + b), 0)
        else:
            return self.seqlen

    @gluon.jit
    def position(self, b):
        """Rotary position of the first new token of sequence b."""
        if self.config.has_rotary_seqlens:
            return gl.load(self.rotary_seqlens + b)
        else:
            return self.length(b)

    @gluon.jit
    def place(self, b, slot):
        """(row of the cache or page, slot in it) of a slot of sequence b."""
        if self.config.page_size > 0:
            page = slot // self.config.page_size
            found = gl.load(self.page_table + b.to(gl.int64) * self.table_stride + page)
            return found, slot - page * self.config.page_size
        elif self.config.has_batch_idx:
            return gl.load(self.batch_idx + b), slot
        else:
            return b, slot

    @gluon.jit
    def turned(self, x_ptr, at, keep, column, step, position):
        """fp32 [rows, width]: elements `at` of x (columns `step` apart), turned by their position: a number,
        or [rows, 1]."""
        config: gl.constexpr = self.config
        half: gl.constexpr = max(1, config.rotary_dim // 2)
        if config.interleaved:
            pair = column // 2
            other = column + 1 - 2 * (column % 2)
            first = column % 2 == 0
        else:
            pair = column % half
            first = column < half
            other = gl.where(first, column + half, column - half)
        turns = column < config.rotary_dim
        x = gl.load(x_ptr + at + (column * step)[None, :], mask=keep, other=0.0).to(gl.float32)
        other = gl.where(turns, other, column)
        y = gl.load(x_ptr + at + (other * step)[None, :], mask=keep, other=0.0).to(gl.float32)
        there = turns[None, :] & (position < self.rotary_len) & (position >= 0)
        angle = position.to(gl.int64) * self.rotary_stride + pair[None, :]
        c = gl.load(self.cos + angle, mask=there, other=0.0).to(gl.float32)
        s = gl.load(self.sin + angle, mask=there, other=0.0).to(gl.float32)
        s = gl.where(first[None, :], -s, s)
        return gl.where(turns[None, :], product(x, c) + product(y, s), x)


@gluon.jit
def element(row, b, token, h, strides, packed: gl.constexpr):
    """[rows, 1] element of heads h of a token, or of tokens of a head, by the strides of a tensor."""
    if packed:
        at = row.to(gl.int64) * strides[1]
    else:
        at = b.to(gl.int64) * strides[0] + token.to(gl.int64) * strides[1]
    return (at + h.to(gl.int64) * strides[2])[:, None]


@aggregate
class Side:
    """K or V of a launch. Of what is not given pointers point anywhere."""

    new: gl.tensor
    cache: gl.tensor
    factors: gl.tensor
    of_new: gl.tuple  # strides of (sequence, token, head, column)
    of_cache: gl.tuple
    of_factors: gl.tuple  # of (row or sequence, block, head)
    dim: gl.constexpr  # columns that there are
    turns: gl.constexpr  # whether new tokens are rotated


@gluon.jit
def side_of(new, cache, factors, strides, first: gl.constexpr, dim: gl.constexpr, turns: gl.constexpr):
    """The Side whose strides are numbers first, first + 1 and first + 2 of those of a launch, by four."""
    i: gl.constexpr = 4 * first
    return Side(
        new, cache, factors, (strides[i], strides[i + 1], strides[i + 2], strides[i + 3]),
        (strides[i + 4], strides[i + 5], strides[i + 6], strides[i + 7]),
        (strides[i + 8], strides[i + 9], strides[i + 10]), dim, turns,
    )  # fmt: skip


@gluon.jit
def make_facts(pointers, seqlen, numbers, cos, sin, config: gl.constexpr):
    """(Facts, numbers as tensors: Triton makes compile-time constants of those that are 1)."""
    n = ()
    for i in gl.static_range(len(numbers)):
        n = n + (gl.to_tensor(numbers[i]),)
    facts = Facts(pointers[0], pointers[1], pointers[2], pointers[5], seqlen, n[5], cos, sin, n[6], n[7],
                  config)  # fmt: skip
    return facts, n


@gluon.jit
def turn_query(facts, q, q_out, starts, row, block, strides, n):
    """Rotate some heads, number `block`, of one token of q. n: the numbers of a launch."""
    c: gl.constexpr = facts.config
    layout: gl.constexpr = c.layout
    column = gl.arange(0, c.width, gl.SliceLayout(0, layout))
    h = block * c.heads_at_once + gl.arange(0, c.heads_at_once, gl.SliceLayout(1, layout))
    heads = n[8]
    b, token, there = _sequence_of(row, starts, n[3], n[1], c.packed_q, c)
    if there:
        position = facts.position(b)
        if c.per_token:
            position += token
        keep = (h < heads)[:, None] & (column < c.columns)[None, :]
        at = element(row, b, token, h, strides, c.packed_q)
        x = facts.turned(q, at, keep, column, strides[3], position)
        to = (row.to(gl.int64) * heads + h) * c.columns
        gl.store(q_out + to[:, None] + column[None, :], x.to(q_out.dtype.element_ty), mask=keep)


@gluon.jit
def _write_new(facts, side, token, heads):
    """Write one new token of K or V. token: (row, sequence, number in it, slot, rotary position), heads:
    (those of this program, how many there are)."""
    config: gl.constexpr = facts.config
    layout: gl.constexpr = config.layout
    column = gl.arange(0, config.width, gl.SliceLayout(0, layout))
    row, b, i, slot, position = token
    h, count = heads
    place, slot = facts.place(b, slot)
    at = element(row, b, i, h, side.of_new, config.packed_new)
    to = element(row, place, slot, h, side.of_cache, False) + (column * side.of_cache[3])[None, :]
    keep = (h < count)[:, None] & (column < side.dim)[None, :]
    if side.turns:
        x = facts.turned(side.new, at, keep, column, side.of_new[3], position)
    else:
        x = gl.load(side.new + at + (column * side.of_new[3])[None, :], mask=keep, other=0.0)
    if config.quantizes:
        of = b.to(gl.int64) * side.of_factors[0] + h.to(gl.int64) * side.of_factors[2]
        x = in_unit(x, gl.load(side.factors + of, mask=h < count, other=1.0)[:, None])
    elif side.turns:
        x = x.to(side.cache.dtype.element_ty)
    gl.store(side.cache + to, x, mask=keep)


@gluon.jit(do_not_specialize=["seqlen"])
def append_to_cache(q, q_out, k_new, v_new, k_cache, v_cache, cos, sin, pointers, seqlen, numbers, strides,
                    config: gl.constexpr):  # fmt: skip
    """Grid: (tokens of q if they are rotated, then new tokens; blocks of heads)."""
    c: gl.constexpr = config.static
    facts, n = make_facts(pointers, seqlen, numbers, cos, sin, c)
    row, block = gl.program_id(0), gl.program_id(1)
    if row < n[0]:
        turn_query(facts, q, q_out, pointers[3], row, block, strides, n)
    else:
        row -= n[0]
        b, token, there = _sequence_of(row, pointers[4], n[3], n[2], c.packed_new, c)
        if there:
            slot = facts.length(b) + token
            if (slot >= 0) & (slot < n[4]):
                one = (row, b, token, slot, facts.position(b) + token)
                h = block * c.heads_at_once + gl.arange(0, c.heads_at_once, gl.SliceLayout(1, c.layout))
                of_heads = (h, n[9])
                k = side_of(k_new, k_cache, pointers[6], strides, 1, c.columns, c.rotary_dim > 0)
                v = side_of(v_new, v_cache, pointers[7], strides, 4, c.columns_v, False)
                _write_new(facts, k, one, of_heads)
                _write_new(facts, v, one, of_heads)


class AppendPlan:
    """Everything about a call that depends neither on addresses nor on lengths."""

    kernel = append_to_cache

    def __init__(self, spec: AppendSpec):
        self.spec = spec
        self.device_index = spec.device.index or 0
        self.rows_q = spec.total_q if spec.rotary_dim else 0
        self.config, self.grid = self._choice()
        self.launchers: dict[int, KernelLauncher] = {}  # by the alignment of all tensors
        self.constants: tuple[tuple, tuple] | None = None
        self.nothing: torch.Tensor | None = None  # where pointers that are not given point

    def _choice(self) -> tuple[AppendConfig, tuple[int, int, int]]:
        """(config, grid)."""
        spec, config = self.spec, append_config(self.spec)
        heads = max(spec.num_heads if self.rows_q else 1, spec.num_kv_heads if spec.total_new else 1)
        return config, (self.rows_q + spec.total_new, -(-heads // config.heads_at_once), 1)

    def constants_of(self, seqlen_new: int) -> tuple[tuple, tuple]:
        """(numbers, strides) of the kernel. Strides are four for each of q; new k, k_cache, k_descale (three,
        and a 0); the same of v."""
        spec = self.spec
        numbers = (
            self.rows_q, spec.seqlen_q, max(1, seqlen_new), spec.batch, spec.capacity, spec.table_stride,
            spec.rotary_len, spec.rotary_stride, spec.num_heads, spec.num_kv_heads,
        )  # fmt: skip
        of_q = (0, *spec.q_stride) if spec.packed_q else spec.q_stride
        added = [(0,) * 4 if not spec.has_new else (0, *s) if spec.packed_new else s
                 for s in (spec.new_k_stride, spec.new_v_stride)]  # fmt: skip
        of_k, of_v = ((*(s or (0,) * 3), 0) for s in (spec.k_descale_stride, spec.v_descale_stride))
        return numbers, (*of_q, *added[0], *spec.k_stride, *of_k, *added[1], *spec.v_stride, *of_v)

    def __call__(self, q, k_new, v_new, cache: Cache, new: New, rotary: tuple):
        """q, rotated into new memory if asked. Enqueues one kernel on the current stream; never waits."""
        if torch._C._cuda_getDevice() != self.device_index:
            with torch.cuda.device(self.device_index):
                return self(q, k_new, v_new, cache, new, rotary)
        cos, sin, turns = rotary
        if self.nothing is None:
            self.nothing = torch.zeros(1, dtype=torch.int32, device=self.spec.device)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if self.spec.rotary_dim else q
        tensors = tuple(q if x is None else x for x in (q, out, k_new, v_new, cache.k, cache.v, cos, sin))
        given = (
            cache.seqlens,
            cache.batch_idx,
            cache.page_table,
            new.cu_seqlens_q,
            new.cu_seqlens_k_new,
            turns,
            cache.k_descale,
            cache.v_descale,
        )
        pointers = tuple(self.nothing if x is None else x for x in given)
        if self.constants is None:
            self.constants = self.constants_of(new.seqlen_new)
        rest = (pointers, cache.seqlen, *self.constants, self.config)
        pattern = misaligned((*tensors, *pointers))
        launcher = self.launchers.get(pattern)
        if launcher is None:
            launcher = KernelLauncher(self.kernel, (*tensors, *rest), dict(num_warps=4))
            self.launchers[pattern] = launcher
        stream = torch._C._cuda_getCurrentRawStream(self.device_index)
        launcher.launch_flat(self.grid, stream, [], tensors, rest)
        return out
