"""How dQ adds up: every tile of keys contributes to the same rows, in float32 in global memory.

The accumulator is made of chunks of 64 rows x 64 columns, each 4096 numbers in the order in which a wgmma
accumulator lies in registers (`in_register_order`): 16 bytes of a thread follow one another, then its lanes,
so that neither shared memory nor atomics see a conflict. `kernels/backward_rows.py` brings it back.

Ordered, the tiles of keys of a chunk add one after the other, the last keys first, which makes sums
repeatable to the bit. A counter per chunk says how many have added; the first writes instead of adding, so
nothing has to be zero before. A program waits only for programs that were launched before it.
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
def _wait_for(counter, value):
    """Until the counter (a pointer to int32) has this value."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 v; WAIT: ld.acquire.gpu.global.b32 v, [$1]; setp.ne.s32 p, v, $2;"
        " @p bra WAIT; mov.b32 $0, v; }",
        "=r,l,r",
        [counter.to(gl.int64), value],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.constexpr_function
def _count_asm(under_way):
    return (
        "{ .reg .pred p; elect.sync _|p, 0xffffffff; @p cp.async.bulk.wait_group "
        + f"{under_way}; @p fence.proxy.async; @p red.release.gpu.global.add.u32 [$1], 1; mov.b32 $0, 0; }}"
    )


@gluon.jit
def _count(counter, under_way: gl.constexpr):
    """Add one to the counter when all TMA stores of this warp but the last `under_way` are complete in memory.

    For partitions of one warp: the thread elected here is the one elected to start them.
    """
    gl.inline_asm_elementwise(
        _count_asm(under_way), "=r,l", [counter.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
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
        """Adding warp: add put `number` to the accumulator; `before`: the chunk of the put before.

        That one is counted now: it has had a step's time to become complete.
        """
        coords = [place.chunk * 128, 0]
        buffer = self.smem.index(group)
        if self.ordered:
            _wait_for(self.counters + place.chunk, place.rank)
            mbarrier.wait(self.full.index(group), number & 1)
            if place.rank == 0:
                tma_store(self.desc, coords, buffer)
            else:
                tma_reduce_add(self.desc, coords, buffer)
            if number > 0:
                _count(self.counters + before, 1)
        else:
            mbarrier.wait(self.full.index(group), number & 1)
            tma_reduce_add(self.desc, coords, buffer)
        tma_store_wait(0)
        mbarrier.arrive(self.empty.index(group), count=1)

    @gluon.jit
    def finish(self, last):
        """Adding warp: count the last chunk."""
        if self.ordered:
            _count(self.counters + last, 0)


@gluon.jit
def make_adds(desc, counters, ordered: gl.constexpr):
    """With its buffers in shared memory."""
    buffers = gl.allocate_shared_memory(gl.float32, [2, 128, 32], desc.layout)
    return Adds(desc, counters, ordered, buffers, make_barriers(2, 1), make_barriers(2, 1))
