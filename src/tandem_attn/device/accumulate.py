"""How dQ adds up: every tile of keys contributes to the same rows, in float32 in global memory.

The accumulator is made of chunks of 64 rows x 64 columns, each 4096 numbers in the order in which a wgmma
accumulator lies in registers (`in_register_order`): 16 bytes of a thread follow one another, then its lanes,
so that neither shared memory nor atomics see a conflict. `kernels/backward_rows.py` brings it back.

Whoever comes first to a chunk writes it and all others add, so nothing has to be zero before. A counter per
chunk, zero at the start, says what has happened to it:

unordered  whoever sees WRITTEN in it adds; others draw a number from it, and only the one with number 0, when
           its write is complete, adds WRITTEN; the others wait for that, which they seldom have to
ordered    tiles of keys add one after the other, the last keys first, so that sums are repeatable to the bit:
           it counts complete contributions, and everyone waits for those before it

Nobody waits in a circle. In order, a program waits only for programs that were launched before it. Else all
wait for one who has number 0, and it has what it is about to write: it waits for nothing but memory. (Numbers
once were drawn before the consumer had put its part. A consumer cannot get further ahead of the other than dS
has buffers, so two programs that begin with different blocks could each hold number 0 of what the other's
consumers needed: found by testing/emulator_backward.py.)
"""

from tandem_attn.device.gluon import (
    aggregate,
    base_value,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_reduce_add,
    tma_store,
    tma_store_wait,
)
from tandem_attn.device.ring import make_barriers

CHUNK = gl.constexpr(64)  # rows and columns
WRITTEN = gl.constexpr(2**16)  # more than there are tiles of keys


@aggregate
class Place:
    """Where a part of dQ goes, and when."""

    chunk: gl.tensor
    rank: gl.tensor  # ordered: how many tiles of keys add before


@gluon.jit
def in_register_order(x):
    """[64, 64] of a wgmma accumulator to [4096]."""
    return x.reshape([4, 2, 8, 8, 4, 2]).permute((3, 0, 2, 4, 1, 5))


@gluon.jit
def from_register_order(x):
    """[4096] back to [64, 64]."""
    return x.reshape([8, 4, 8, 4, 2, 2]).permute((1, 4, 2, 0, 3, 5)).reshape([64, 64])


@gluon.jit
def _wait_until_at_least(counter, value):
    """`counter`: a pointer to int32."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 v; WAIT: ld.acquire.gpu.global.b32 v, [$1]; setp.lt.s32 p, v, $2;"
        " @p bra WAIT; mov.b32 $0, v; }",
        "=r,l,r",
        [counter.to(gl.int64), value],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


# Partitions of one warp call these. The thread elected here is the one elected to start TMA stores.


@gluon.constexpr_function
def _by_one_thread(instruction):
    """Assembly by which one thread executes `instruction`, whose result is v, and all get v."""
    return (
        "{ .reg .pred p; .reg .b32 v; mov.b32 v, 0; elect.sync _|p, 0xffffffff;"
        f" @p {instruction}; redux.sync.or.b32 $0, v, 0xffffffff; }}"
    )


@gluon.jit
def _of_counter(instruction: gl.constexpr, counter):
    return gl.inline_asm_elementwise(
        _by_one_thread(instruction),
        "=r,l",
        [counter.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _draw(counter):
    """Add one to the counter; what it was."""
    return _of_counter("atom.relaxed.gpu.global.add.u32 v, [$1], 1", counter)


@gluon.jit
def _look_at(counter):
    """The counter; what its last adder released is visible."""
    return _of_counter("ld.acquire.gpu.global.b32 v, [$1]", counter)


@gluon.jit
def _add_when_complete(counter, value):
    """Add to the counter when all TMA stores of this warp are complete in memory."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; elect.sync _|p, 0xffffffff; @p cp.async.bulk.wait_group 0; @p fence.proxy.async;"
        " @p red.release.gpu.global.add.u32 [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r",
        [counter.to(gl.int64), value],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@aggregate
class Adds:
    """A chunk per block and consumer: its registers go to a buffer, which a warp per consumer adds by TMA.

    That warp waits for its turn and for the memory, and the consumer for neither.
    """

    desc: base_value  # [chunks * 128, 32]
    counters: gl.tensor
    ordered: gl.constexpr
    smem: gl.shared_memory_descriptor  # [2, 128, 32] float32: a buffer per consumer
    full: gl.shared_memory_descriptor  # consumer -> adding warp
    empty: gl.shared_memory_descriptor  # adding warp -> consumer

    @gluon.jit
    def put(self, group: gl.constexpr, number, dq):
        """Consumer: put number 0, 1, ... of its dQ into the buffer, once that is empty."""
        mbarrier.wait(self.empty.index(group), (number & 1) ^ 1)
        self.smem.index(group).store(in_register_order(dq).reshape([128, 32]))
        fence_async_shared()
        mbarrier.arrive(self.full.index(group), count=1)

    @gluon.jit
    def add(self, group: gl.constexpr, number, place, before):
        """Adding warp: add put `number` to the accumulator. `before`: the chunk that is to be counted once it
        is complete, negative for none; returns the next such.

        Whatever takes its time in memory (a look at the counter, a turn, completion) comes before the wait
        for the consumer, who then waits for little but the read of its buffer.
        """
        coords = [place.chunk * 128, 0]
        buffer = self.smem.index(group)
        counter = self.counters + place.chunk
        rank = place.rank
        if self.ordered:
            _wait_until_at_least(counter, rank)
        else:
            rank = _look_at(counter)
        self.finish(before)
        mbarrier.wait(self.full.index(group), number & 1)
        if not self.ordered:  # noqa: SIM102 (known at compile time, unlike the inner one)
            if rank < WRITTEN:
                rank = _draw(counter)
                if (rank > 0) & (rank < WRITTEN):
                    _wait_until_at_least(counter, WRITTEN)
        if rank == 0:
            tma_store(self.desc, coords, buffer)
        else:
            tma_reduce_add(self.desc, coords, buffer)
        tma_store_wait(0)
        mbarrier.arrive(self.empty.index(group), count=1)
        if self.ordered:
            return place.chunk
        else:
            return gl.where(rank == 0, place.chunk, -1)

    @gluon.jit
    def finish(self, chunk):
        """Adding warp: count this chunk once it is complete; negative: none."""
        if chunk >= 0:
            _add_when_complete(self.counters + chunk, 1 if self.ordered else WRITTEN)


@gluon.jit
def make_adds(desc, counters, ordered: gl.constexpr):
    """With its buffers in shared memory."""
    buffers = gl.allocate_shared_memory(gl.float32, [2, 128, 32], desc.layout)
    return Adds(desc, counters, ordered, buffers, make_barriers(2, 1), make_barriers(2, 1))
