"""FP8 inputs: the recipe, the tensors it makes, and every step of making them in plain torch on any device.

Values are e4m3 (torch.float8_e4m3fn, largest 448); a descale multiplies them to restore what was quantized.
Descales of V are powers of two: attention keeps its output in units of them, and has nothing to rescale where
one is like the one before; of a float format they take no precision, but of its range up to one bit.
Rows are taken in blocks of BLOCK_Q queries and BLOCK_K keys. Packed sequences are laid out for that with each
at a multiple of PADDING rows: sequence b at (cu_seqlens[b] + 128 b) // 128 * 128. There an empty one has
descales 1 and 128 columns of V^T that are 0: attention reads them for queries that see no key.

K's mean is that of a sample of MEAN_ROWS keys of a sequence: lse accounts for what is subtracted, whatever it
is, so it only has to lie near the numbers. V's is that of all keys: sums of e4m3 lose what is left of it.

A non-finite number makes NaN of all that shares its scale (and its mean), and nothing raises.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from tandem_attn.spec import E4M3, Lengths, check_int, dtype_name, refuse

LARGEST = 448.0  # of e4m3
BLOCK_Q = 64  # queries that share a scale
BLOCK_K = 128  # keys
PADDING = 128  # V^T and packed blocks are in units of so many rows
LEAST_AMAX = 2.0**-100  # blocks that hold nothing larger count as zeros: 448 / amax stays finite
GRANULARITIES = ("block", "head", "tensor")
MEAN_ROWS = 256  # keys of a sequence that K's mean is taken from, evenly spaced; all if there are fewer


@dataclasses.dataclass(frozen=True)
class Fp8Recipe:
    """How 16-bit tensors become FP8.

    rotate: q and k are turned by the same random-sign Hadamard matrix along head_dim, which spreads outliers
    and leaves scores as they are. signs: a seed, or head_dim numbers +1 and -1 (a tensor is read once, here).
    smooth_k: the mean of each channel of K is subtracted, per sequence and KV head; softmax does not see it
    and the lse is corrected (SageAttention, arXiv 2410.02367). granularity: what shares a scale: a "block" of
    rows of a head, all rows of a "head" of a sequence, or a whole "tensor". smooth_v: the mean of each
    channel of V is subtracted, and added to the output. For V whose channels are far from zero: what is left
    has smaller errors, at head_dim 256 its sums as well. It costs a pass over V, and attention of short
    sequences a tenth of its speed.
    """

    rotate: bool = True
    smooth_k: bool = True
    granularity: str = "block"
    signs: int | tuple[int, ...] = 0
    smooth_v: bool = False

    def __post_init__(self) -> None:
        for name in ("rotate", "smooth_k", "smooth_v"):
            x = getattr(self, name)
            if not isinstance(x, bool):
                refuse(TypeError, name, f"{x!r} ({type(x).__name__})", "True or False")
        if self.granularity not in GRANULARITIES:
            refuse(ValueError, "granularity", repr(self.granularity), ", ".join(map(repr, GRANULARITIES)))
        if isinstance(self.signs, (torch.Tensor, tuple, list)):
            object.__setattr__(self, "signs", _given_signs(self.signs))
        else:
            check_int("signs", self.signs, 0)

    def __str__(self) -> str:
        one_for = {
            "block": f"a block of {BLOCK_Q} queries or {BLOCK_K} keys",
            "head": "a head",
            "tensor": "a tensor",
        }
        given = "given signs" if isinstance(self.signs, tuple) else f"signs of seed {self.signs}"
        rotated = f"q and k rotated with {given}" if self.rotate else "not rotated"
        smoothed = {
            (True, True): "means of K and V subtracted",
            (True, False): "mean of K subtracted",
            (False, True): "mean of V subtracted",
            (False, False): "means kept",
        }[self.smooth_k, self.smooth_v]
        return f"{rotated}, {smoothed}, a scale for {one_for[self.granularity]}"


def _given_signs(signs) -> tuple[int, ...]:
    """Signs as integers; raises unless they are a vector of +1 and -1."""
    supported = "a seed, or a vector of head_dim numbers that are +1 or -1"
    if isinstance(signs, torch.Tensor):
        if signs.dim() != 1:
            refuse(ValueError, "signs", f"a tensor of shape {tuple(signs.shape)}", supported)
        signs = signs.tolist()
    for x in signs:
        if x not in (1, -1):
            refuse(ValueError, "signs", f"a vector with {x!r} in it", supported)
    return tuple(int(x) for x in signs)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Fp8Tensors:
    """q, k and v in FP8 as the kernels read them, dense or (with lengths) packed; see `quantize_qkv`.

    q e4m3 (batch, seqlen_q, heads, head_dim) or (total_q, heads, head_dim), contiguous; k likewise. v_t e4m3
    (batch, kv_heads, head_dim_v, padded) or (kv_heads, head_dim_v, padded): `transposed`. Descales float32
    (batch, heads, blocks), stride 0 where they are fewer; packed (heads, blocks of all sequences), or
    (batch, heads, 1) of granularities "head" and "tensor". lse_shift None or float32 (batch, heads, seqlen_q)
    / (heads, total_q): q . k_mean, so that lse = that of these tensors + softmax_scale * lse_shift. k_mean
    None or float32 (batch, kv_heads, head_dim), not rotated: what was subtracted from K, the mean over an
    evenly spaced sample of at most MEAN_ROWS keys, rounded to the dtype of K. v_mean None or float32 (batch,
    kv_heads, head_dim_v): what was subtracted from V and is added to the output, the mean over all keys.
    """

    q: torch.Tensor
    k: torch.Tensor
    v_t: torch.Tensor
    q_descale: torch.Tensor
    k_descale: torch.Tensor
    v_descale: torch.Tensor
    lse_shift: torch.Tensor | None
    k_mean: torch.Tensor | None
    v_mean: torch.Tensor | None
    recipe: Fp8Recipe
    dtype: torch.dtype  # of what was quantized, and of the output of attention
    lengths: Lengths | None = None

    def __repr__(self) -> str:
        tensors = [getattr(self, f.name) for f in dataclasses.fields(self)]
        held = sum(x.untyped_storage().nbytes() for x in tensors if isinstance(x, torch.Tensor))
        kind = "dense" if self.lengths is None else f"{self.lengths.cu_seqlens_q.shape[0] - 1} packed"
        return (
            f"Fp8Tensors({kind}, q {tuple(self.q.shape)}, k {tuple(self.k.shape)}, v_t "
            f"{tuple(self.v_t.shape)}: "
            f"e4m3 of {dtype_name(self.dtype)} on {self.q.device}; {self.recipe}; {held / 1e6:.1f} MB)"
        )

    @property
    def rows_q(self) -> Rows:
        """How the rows of q lie in blocks."""
        lengths = self.lengths
        return (
            rows_of(self.q) if lengths is None else rows_of(self.q, lengths.cu_seqlens_q, lengths.seqused_q)
        )

    @property
    def rows_k(self) -> Rows:
        """How the rows of k and v lie in blocks."""
        lengths = self.lengths
        return (
            rows_of(self.k) if lengths is None else rows_of(self.k, lengths.cu_seqlens_k, lengths.seqused_k)
        )

    def rotated(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float32 (q, k, v) as attention takes them: q and k still rotated, k without its mean, v with it."""
        rows_q, rows_k = self.rows_q, self.rows_k
        v = rows_k.restored(untransposed(self.v_t if self.v_t.dim() == 4 else self.v_t[None]))
        v = v.float() * rows_k.each(self.v_descale, BLOCK_K)
        if self.v_mean is not None:
            v = v + rows_k.of_each(self.v_mean)
        return (
            rows_q.declared(self.q.float() * rows_q.each(self.q_descale, BLOCK_Q)),
            rows_k.declared(self.k.float() * rows_k.each(self.k_descale, BLOCK_K)),
            rows_k.declared(v),
        )

    def dequantized(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float32 (q, k, v) in the coordinates of what was quantized, 0 in rows of no sequence."""
        q, k, v = self.rotated()
        if self.recipe.rotate:
            signs = signs_for(self.recipe, q.shape[-1], q.device)
            q, k = unrotated(q, signs), unrotated(k, signs)
        if self.k_mean is not None:
            k = self.rows_k.declared(k + self.rows_k.of_each(self.k_mean))
        return q, k, v


# Rotation


def rotation_block(head_dim: int) -> int:
    """Columns that one Hadamard matrix mixes: the largest power of two that divides head_dim (96: 32)."""
    return head_dim & -head_dim


@functools.lru_cache(maxsize=64)
def signs_for(recipe: Fp8Recipe, head_dim: int, device: torch.device) -> torch.Tensor:
    """float32 (head_dim,) of +1 and -1: those given, or the same for a seed on every device."""
    if isinstance(recipe.signs, tuple):
        if len(recipe.signs) != head_dim:
            refuse(ValueError, "signs", f"a vector of {len(recipe.signs)}", f"head_dim of q, {head_dim}")
        signs = torch.tensor(recipe.signs, dtype=torch.float32, device="cpu")
    else:
        drawn = torch.Generator().manual_seed(recipe.signs)
        signs = torch.randint(0, 2, (head_dim,), generator=drawn, dtype=torch.float32, device="cpu") * 2 - 1
    return signs.to(device)


def hadamard(x: torch.Tensor, block: int) -> torch.Tensor:
    """x (..., n) times the Hadamard matrix of size `block` (a power of two), block by block: entries
    (-1)^popcount(i & j), not divided by anything. Sums and differences only, exact on small integers."""
    if block & (block - 1) or x.shape[-1] % block:
        refuse(ValueError, "block", block, f"a power of two that divides the {x.shape[-1]} columns")
    shape, step = x.shape, 1
    while step < block:
        a, b = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack((a + b, a - b), -2).reshape(shape)
        step *= 2
    return x


def rotated(x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """x (..., head_dim) times signs, times the orthonormal Hadamard matrix; in float32 or float64."""
    block = rotation_block(x.shape[-1])
    kind = torch.promote_types(x.dtype, torch.float32)
    return hadamard(x.to(kind) * signs.to(kind), block) * block**-0.5


def unrotated(x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """The inverse of `rotated`."""
    block = rotation_block(x.shape[-1])
    return hadamard(x, block) * block**-0.5 * signs.to(x.dtype)


# Rows in blocks


def padded_rows(count: int, packed: int | None = None) -> int:
    """Rows in whole blocks of PADDING, one at least: of a sequence of `count`, or of `packed` that have those
    together."""
    room = count + (PADDING - 1 if packed is None else PADDING * packed)
    return max(PADDING, room // PADDING * PADDING)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Where the rows of one side lie, and where in blocks. Packed sequences are padded as a batch of one."""

    batch: int
    count: int  # rows of a sequence; packed: of all
    cu_seqlens: torch.Tensor | None = None
    seqused: torch.Tensor | None = None

    @property
    def padded_count(self) -> int:
        """Rows of a padded sequence; packed: of all."""
        return padded_rows(self.count, self.batch if self.packed else None)

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @functools.cached_property
    def starts(self) -> torch.Tensor:
        """(batch + 1,) padded rows where packed sequences start."""
        number = torch.arange(self.batch + 1, device=self.cu_seqlens.device)
        return (self.cu_seqlens.long() + PADDING * number) // PADDING * PADDING

    @functools.cached_property
    def places(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each packed row: (sequence, padded row, whether a sequence declares it)."""
        cu_seqlens = self.cu_seqlens.long()
        row = torch.arange(self.count, device=cu_seqlens.device)
        owner = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True).clamp(max=self.batch - 1)
        within = row - cu_seqlens[owner]
        there = (within >= 0) & (within < self.lengths[owner])
        return owner, torch.where(there, self.starts[owner] + within, 0), there

    @property
    def lengths(self) -> torch.Tensor:
        """(batch,) rows of each packed sequence."""
        return self.cu_seqlens.long().diff() if self.seqused is None else self.seqused.long()

    def declared(self, x: torch.Tensor) -> torch.Tensor:
        """x with 0 in rows that no sequence declares."""
        if not self.packed:
            return x
        there = self.places[2].view(-1, *(1,) * (x.dim() - 1))
        return torch.where(there, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """(batch or 1, padded_count, heads, dim): x in blocks, 0 in all other rows."""
        if not self.packed:
            return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, self.padded_count - self.count))
        out = x.new_zeros(self.padded_count, *x.shape[1:])
        if self.batch:
            _, place, there = self.places
            out[place[there]] = x[there]
        return out[None]

    def restored(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `padded`; rows of no sequence hold anything."""
        if not self.packed:
            return x[:, : self.count]
        return x[0, self.places[1]] if self.batch else x[0, : self.count]

    def each(self, descale: torch.Tensor, block: int) -> torch.Tensor:
        """Descales in the shapes of `Fp8Tensors` -> (..., rows, heads, 1), one for each row."""
        if not self.packed:
            return descale.repeat_interleave(block, 2)[:, :, : self.count].transpose(1, 2)[..., None]
        if descale.dim() == 3:
            return self.of_each(descale)
        return descale[:, self.places[1] // block].T[..., None]

    def of_each(self, x: torch.Tensor) -> torch.Tensor:
        """x (batch, heads, dim) -> (..., rows, heads, dim): that of the sequence of each row."""
        return x[self.places[0]] if self.packed else x[:, None]

    def means(self, x: torch.Tensor, most: int | None = None) -> torch.Tensor:
        """(batch, heads, dim) means of x (..., rows, heads, dim) over the rows of each sequence, of more than
        `most` over so many, evenly spaced; 0 where there are none."""
        row = torch.arange(self.count, device=x.device)
        if not self.packed:
            length = torch.full((1,), self.count, device=x.device)
            count = length.clamp(min=0, max=most)
            taken = in_sample(row, length, count)[:, None, None]
            return torch.where(taken, x, 0.0).sum(1) / count.clamp(min=1)
        out = x.new_zeros(self.batch, *x.shape[1:])
        if self.batch == 0:
            return out
        owner, _, there = self.places
        count = self.lengths.clamp(min=0, max=most)
        taken = there & in_sample(row - self.cu_seqlens.long()[owner], self.lengths[owner], count[owner])
        out.index_add_(0, owner, torch.where(taken[:, None, None], x, 0.0))
        return out / count.clamp(min=1)[:, None, None]

    def sequence_amax(self, amax: torch.Tensor, block: int) -> torch.Tensor:
        """The largest (batch, heads, 1) of each sequence, of blocks (batch or 1, heads, blocks)."""
        if not self.packed:
            return amax.amax(2, keepdim=True)
        out = amax.new_zeros(self.batch, amax.shape[1])
        owner = self.block_owner(block)[:, None].expand(-1, amax.shape[1])
        return out.scatter_reduce_(0, owner, amax[0].T, "amax")[..., None]

    def block_owner(self, block: int) -> torch.Tensor:
        """(blocks,) the sequence of each block of packed rows."""
        first = torch.arange(0, self.padded_count, block, device=self.starts.device)
        return torch.searchsorted(self.starts[1:].contiguous(), first, right=True).clamp(max=self.batch - 1)


def rows_of(x: torch.Tensor, cu_seqlens=None, seqused=None) -> Rows:
    """The rows of x (batch, seqlen, heads, dim), or packed (total, heads, dim)."""
    if cu_seqlens is None:
        return Rows(x.shape[0], x.shape[1])
    return Rows(cu_seqlens.shape[0] - 1, x.shape[0], cu_seqlens, seqused)


def in_sample(row: torch.Tensor, length: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Whether rows are among the `count` of a sequence that are i * length // count, i = 0, 1, 2, ..."""
    i = (row * count + length - 1) // length.clamp(min=1)  # the first that is not before this row
    return (i < count) & (i * length // count.clamp(min=1) == row)


def channel_mean(x: torch.Tensor, rows: Rows, most: int | None = None) -> torch.Tensor:
    """float32 (batch, kv_heads, head_dim): of all rows, or of a sample of so many."""
    return rows.means(x.double(), most).float()


def key_mean(k: torch.Tensor, rows: Rows) -> torch.Tensor:
    """float32 (batch, kv_heads, head_dim): what is subtracted from K, in the dtype of K exact."""
    return channel_mean(k, rows, MEAN_ROWS).to(k.dtype).float()


# Scales and values


def scales(amax: torch.Tensor, powers: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (descale, its inverse) for the largest magnitude of what shares them: amax / 448, or 1.

    `powers`: the next power of two, which may be that itself.
    """
    amax = amax.float()
    amax = torch.where(amax < LEAST_AMAX, LARGEST, amax)  # NaN stays
    largest = torch.full_like(amax, LARGEST)  # a quotient with a Python number may round twice
    descale = amax / largest
    if not powers:
        return descale, largest / amax
    # in bits: one in the mantissa carries into the exponent
    up = ((descale.view(torch.int32) + 0x7FFFFF) & -0x800000).view(torch.float32)
    descale = torch.where(descale.isnan(), descale, up)
    return descale, 1 / descale


def saturated(x: torch.Tensor) -> torch.Tensor:
    """x as e4m3, to the nearest (even on ties); what is larger becomes 448, NaN stays."""
    return x.float().clamp(-LARGEST, LARGEST).to(E4M3)


def quantized(
    x: torch.Tensor, rows: Rows, block: int, granularity: str, powers: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (batch or 1, padded rows, heads, dim), 0 past the ends -> (e4m3 of that shape, descales).

    Descales in the shapes of `Fp8Tensors`. Each value is x times the inverse of `scales`, rounded.
    """
    blocks = x.unflatten(1, (-1, block))
    amax = blocks.abs().amax((2, 4)).transpose(1, 2)  # (batch or 1, heads, blocks)
    if granularity == "block":
        descale, inverse = scales(amax, powers)
        descale = (descale[0] if rows.packed else descale[:, :, : -(-rows.count // block)]).contiguous()
    else:
        of_sequences = rows.sequence_amax(amax, block)  # (batch, heads, 1)
        if granularity == "tensor" and amax.numel():
            of_sequences = amax.amax().expand(of_sequences.shape)
        descale, inverse = scales(of_sequences, powers)
        if rows.packed:
            inverse = inverse[rows.block_owner(block), :, 0].T[None] if rows.batch else inverse.view(1, -1, 1)
        else:
            descale = descale.expand(-1, -1, -(-rows.count // block))
    return saturated(blocks * inverse.transpose(1, 2)[:, :, None, :, None]).flatten(1, 2), descale


# V


def transposed(v: torch.Tensor) -> torch.Tensor:
    """(batch, rows, heads, dim), rows a multiple of 16 -> contiguous (batch, heads, dim, rows).

    Keys change places as wgmma with P in registers reads them: of each 16, position 4t + 2h + e holds key
    8h + 2t + e.
    """
    batch, rows, heads, dim = v.shape
    bits = v.reshape(batch, rows // 16, 2, 4, 2, heads, dim)  # (.., h, t, e, ..)
    return bits.permute(0, 5, 6, 1, 3, 2, 4).reshape(batch, heads, dim, rows).contiguous()


def untransposed(v_t: torch.Tensor) -> torch.Tensor:
    """The inverse of `transposed`: (batch, heads, dim, rows) -> (batch, rows, heads, dim)."""
    batch, heads, dim, rows = v_t.shape
    bits = v_t.reshape(batch, heads, dim, rows // 16, 4, 2, 2)  # (.., t, h, e)
    return bits.permute(0, 3, 5, 4, 6, 1, 2).reshape(batch, rows, heads, dim)


def transpose_v(v: torch.Tensor, rows: Rows) -> torch.Tensor:
    """v (any dtype, usually e4m3) as the v_t of `Fp8Tensors`: 0 in columns past the ends."""
    v_t = transposed(rows.padded(v))
    return v_t[0] if rows.packed else v_t
