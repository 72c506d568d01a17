"""Where a sequence starts, how long it is, and the TMA coordinates of its rows.

`Dense` and `Varlen` know all sequences of a call; `sequence(...)` gives one of them. The producer makes it,
consumers read it from the mailbox. Dense descriptors have dimensions (batch, head, row, column) and TMA
itself stops at the end of the rows. Packed sequences share one row dimension, in which a tile at the end of a
sequence would reach into the next one. `PackedSequence.coords` makes TMA stop there as well, with two more
dimensions: the row coordinate is shifted so that the sequence ends where the descriptor ends (row
`RAGGED_END`), and the shift is taken back by strides, in 64-bit address arithmetic that wraps around (an idea
of Triton's `tools/ragged_tma.py`). So rows outside the declared lengths are read as zeros and never written,
whatever they hold.
"""

from tandem_attn.device.gluon import aggregate, gl, gluon, policy

RAGGED_END = gl.constexpr(2**30)
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"]  # arguments about packed sequences
PADDING = gl.constexpr(128)  # rows


@aggregate
class TransposedKeys:
    """Where the keys of one sequence are in V transposed: (batch, head, column, key)."""

    batch: gl.tensor
    start: gl.tensor

    @gluon.jit
    def coords(self, kind: gl.constexpr, head, row, col: gl.constexpr):
        return [self.batch, head, col, self.start + row]


@aggregate
class DenseSequence:
    """One sequence of a batch of equal ones."""

    batch: gl.tensor
    seqlen_q: gl.tensor
    seqlen_k: gl.tensor

    @gluon.jit
    def coords(self, kind: gl.constexpr, head, row, col: gl.constexpr):
        return [self.batch, head, row, col]

    @gluon.jit
    def swapped(self):
        """The same with the sides of queries and keys exchanged."""
        return DenseSequence(self.batch, self.seqlen_k, self.seqlen_q)

    @gluon.jit
    def lse_row(self, head, num_heads, total_q):
        """Index of this head's first row in lse (batch, heads, seqlen_q)."""
        return (self.batch.to(gl.int64) * num_heads + head) * total_q

    @gluon.jit
    def first_row(self):
        """First row of q in its element of the batch, or among all packed rows."""
        return self.batch * 0

    @gluon.jit
    def row_of_all(self, m):
        """Where row m of q lies in a contiguous tensor, int64."""
        return self.batch.to(gl.int64) * self.seqlen_q + m

    @gluon.jit
    def padded_row(self, b, head, num_heads, padded_rows):
        """Index of this head's first row where every sequence has whole blocks of PADDING rows: of
        padded_rows rows per head in all."""
        return (b * num_heads + head) * padded_rows

    @gluon.jit
    def first_block(self, kind: gl.constexpr):
        """First of this sequence's blocks of PADDING rows, in its element of the batch or among all."""
        return 0

    @gluon.jit
    def descale_batch(self, block_step):
        """Number of this sequence among those whose factors lie one after the other."""
        return self.batch

    @gluon.jit
    def if_it_has_keys(self, x, other):
        """x, or `other` for a sequence without keys; dense ones have some, or there is no launch."""
        return x

    @gluon.jit
    def transposed_keys(self):
        return TransposedKeys(self.batch, self.batch * 0)


@aggregate
class PackedSequence:
    """One sequence among packed ones: its number, its first row and its length, on either side."""

    batch: gl.tensor
    start_q: gl.tensor
    seqlen_q: gl.tensor
    start_k: gl.tensor
    seqlen_k: gl.tensor

    @gluon.jit
    def swapped(self):
        return PackedSequence(self.batch, self.start_k, self.seqlen_k, self.start_q, self.seqlen_q)

    @gluon.jit
    def coords(self, kind: gl.constexpr, head, row, col: gl.constexpr):
        start = self.start_q if kind == "q" else self.start_k
        length = self.seqlen_q if kind == "q" else self.seqlen_k
        return [RAGGED_END, start + length, head, RAGGED_END - length + row, col]

    @gluon.jit
    def lse_row(self, head, num_heads, total_q):
        """Index of this sequence's first row of this head in lse (heads, total_q)."""
        return head.to(gl.int64) * total_q + self.start_q

    @gluon.jit
    def first_row(self):
        return self.start_q

    @gluon.jit
    def row_of_all(self, m):
        return (self.start_q + m).to(gl.int64)

    @gluon.jit
    def padded_row(self, b, head, num_heads, padded_rows):
        return head * padded_rows + (self.start_q + b * PADDING) // PADDING * PADDING

    @gluon.jit
    def first_block(self, kind: gl.constexpr):
        start = self.start_q if kind == "q" else self.start_k
        return (start + self.batch * PADDING) // PADDING

    @gluon.jit
    def descale_batch(self, block_step):
        return self.batch * (1 - block_step)

    @gluon.jit
    def if_it_has_keys(self, x, other):
        return gl.where(self.seqlen_k > 0, x, other)

    @gluon.jit
    def transposed_keys(self):
        # without keys there is no block of its own: past the end of all TMA finds zeros
        element = gl.where(self.seqlen_k > 0, 0, 1)
        return TransposedKeys(element, self.first_block("k") * PADDING)


@policy(packed=False)
class Dense:
    """All sequences have the same lengths."""

    seqlen_q: gl.tensor
    seqlen_k: gl.tensor

    @gluon.jit
    def create(seqlen_q, seqlen_k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k):
        return Dense(seqlen_q, seqlen_k)

    @gluon.jit
    def send(self, mailbox, slot, batch):
        mailbox.send(slot, 2, batch)

    @gluon.jit
    def receive(self, mailbox, slot):
        return DenseSequence(mailbox.receive(slot, 2), self.seqlen_q, self.seqlen_k)

    @gluon.jit
    def sequence(self, batch):
        return DenseSequence(batch, self.seqlen_q, self.seqlen_k)


@policy(packed=True)
class Varlen:
    """Packed sequences: rows cu_seqlens[b] to cu_seqlens[b + 1], of which the first seqused[b] count if it is
    given.

    Lengths come from device memory that the host never reads: whatever is there, no row outside [0, total) is
    touched.
    """

    total_q: gl.tensor
    total_k: gl.tensor
    cu_seqlens_q: gl.tensor
    cu_seqlens_k: gl.tensor
    seqused_q: gl.tensor  # a pointer, or cu_seqlens_q where has_seqused_q is false
    seqused_k: gl.tensor
    has_seqused_q: gl.constexpr
    has_seqused_k: gl.constexpr

    @gluon.jit
    def create(total_q, total_k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k):
        HAS_Q: gl.constexpr = seqused_q is not None
        HAS_K: gl.constexpr = seqused_k is not None
        used_q = seqused_q if HAS_Q else cu_seqlens_q
        used_k = seqused_k if HAS_K else cu_seqlens_k
        return Varlen(total_q, total_k, cu_seqlens_q, cu_seqlens_k, used_q, used_k, HAS_Q, HAS_K)

    @gluon.jit
    def lengths_q(self, b, mask):
        """Query rows of the sequences b (a tensor)."""
        start = gl.load(self.cu_seqlens_q + b, mask=mask, other=0)
        end = gl.load(self.cu_seqlens_q + b + 1, mask=mask, other=0)
        length = gl.minimum(end, self.total_q) - gl.maximum(start, 0)
        if self.has_seqused_q:
            length = gl.minimum(length, gl.load(self.seqused_q + b, mask=mask, other=0))
        return gl.maximum(length, 0)

    @gluon.jit
    def sequence(self, b):
        start_q = gl.maximum(gl.load(self.cu_seqlens_q + b), 0)
        length_q = gl.minimum(gl.load(self.cu_seqlens_q + b + 1), self.total_q) - start_q
        start_k = gl.maximum(gl.load(self.cu_seqlens_k + b), 0)
        length_k = gl.minimum(gl.load(self.cu_seqlens_k + b + 1), self.total_k) - start_k
        if self.has_seqused_q:
            length_q = gl.minimum(length_q, gl.load(self.seqused_q + b))
        if self.has_seqused_k:
            length_k = gl.minimum(length_k, gl.load(self.seqused_k + b))
        return PackedSequence(b, start_q, gl.maximum(length_q, 0), start_k, gl.maximum(length_k, 0))

    @gluon.jit
    def send(self, mailbox, slot, b):
        sequence = self.sequence(b)
        mailbox.send(slot, 2, b)
        mailbox.send(slot, 3, sequence.start_q)
        mailbox.send(slot, 4, sequence.seqlen_q)
        mailbox.send(slot, 5, sequence.start_k)
        mailbox.send(slot, 6, sequence.seqlen_k)

    @gluon.jit
    def receive(self, mailbox, slot):
        return PackedSequence(
            mailbox.receive(slot, 2),
            mailbox.receive(slot, 3),
            mailbox.receive(slot, 4),
            mailbox.receive(slot, 5),
            mailbox.receive(slot, 6),
        )
