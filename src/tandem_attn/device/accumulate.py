"""How dQ adds up: every tile of keys contributes to the same rows, in float32 in global memory.

The accumulator is made of chunks of 64 rows x 64 columns, each 4096 numbers in the order in which a wgmma
accumulator lies in registers (`in_register_order`): 16 bytes of a thread follow one another, then its lanes,
so that neither shared memory nor atomics see a conflict. `kernels/backward_rows.py` brings it back.

Ordered, the tiles of keys of a chunk add one after the other, which makes sums repeatable to the bit. A
counter per chunk says how many have added; the first writes instead of adding, so nothing has to be zero
before. A program waits only for programs that were launched before it.
"""

from tandem_attn.device.gluon import (
    aggregate,
    base_value,
    fence_async_shared,
    gl,
    gluon,
    policy,
    thread_barrier,
    tma_reduce_add,
    tma_store,
    tma_store_wait,
)

CHUNK = gl.constexpr(64)  # rows and columns


@aggregate
class Place:
    """Where a part of dQ goes, and when."""

    chunk: gl.tensor  # the first one; negative: nowhere
    rank: gl.tensor  # ordered: how many tiles of keys add before


@gluon.jit
def nowhere(x):
    """No place; x: any int32."""
    return Place(x * 0 - 1, x * 0)


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


@gluon.jit
def _count_bulk(counter):
    """Add one to the counter when all TMA stores of this warpgroup are complete in memory.

    One thread issues them and one counts: elected in the same way from the first warp.
    """
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; elect.sync _|p, 0xffffffff; mov.u32 t, %tid.x; and.b32 t, t, 96;"
        " setp.eq.and.s32 p, t, 0, p; @p cp.async.bulk.wait_group 0; @p fence.proxy.async;"
        " @p red.release.gpu.global.add.u32 [$1], 1; mov.b32 $0, t; }",
        "=r,l",
        [counter.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _count(counter):
    """Add one to the counter when everything that this warpgroup has written is in memory."""
    gl.inline_asm_elementwise(
        "fence.acq_rel.gpu; mov.b32 $0, $1;",
        "=r,r",
        [gl.program_id(0)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    thread_barrier()
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; and.b32 t, t, 127; setp.eq.s32 p, t, 0;"
        " @p red.release.gpu.global.add.u32 [$1], 1; mov.b32 $0, t; }",
        "=r,l",
        [counter.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@policy(through_smem=True)
class TmaAdds:
    """One chunk per step and consumer: registers to shared memory, and TMA adds it to global memory."""

    desc: base_value  # [chunks * 128, 32]
    smem: gl.shared_memory_descriptor  # [2, 128, 32] float32: a buffer per consumer
    counters: gl.tensor
    ordered: gl.constexpr

    @gluon.jit
    def keep(self, group: gl.constexpr, dq):
        """Put dQ into the buffer, once TMA has read what was there."""
        flat = in_register_order(dq).reshape([128, 32])
        tma_store_wait(0)
        self.smem.index(group).store(flat)

    @gluon.jit
    def add_kept(self, group: gl.constexpr, place, before):
        """Start to add the buffer; a proxy fence must have come between. `before`: what was added last."""
        if self.ordered:
            self.finish(before)
            _wait_for(self.counters + place.chunk, place.rank)
        buffer = self.smem.index(group)
        if self.ordered:
            if place.rank == 0:
                tma_store(self.desc, [place.chunk * 128, 0], buffer)
            else:
                tma_reduce_add(self.desc, [place.chunk * 128, 0], buffer)
        else:
            tma_reduce_add(self.desc, [place.chunk * 128, 0], buffer)

    @gluon.jit
    def add_chunk(self, group: gl.constexpr, place, number: gl.constexpr, dq, before):
        """Start to add dQ. number: 0."""
        self.keep(group, dq)
        fence_async_shared()
        self.add_kept(group, place, before)

    @gluon.jit
    def finish(self, last):
        """Let others add to where this consumer has added last."""
        if self.ordered:  # noqa: SIM102 (known at compile time, unlike the inner one)
            if last.chunk >= 0:
                _count_bulk(self.counters + last.chunk)


@policy(through_smem=False)
class AtomicAdds:
    """Two chunks per step and consumer, by vector atomics from registers: no shared memory to spare."""

    ptr: gl.tensor
    counters: gl.tensor
    ordered: gl.constexpr

    @gluon.jit
    def add_chunk(self, group: gl.constexpr, place, number: gl.constexpr, dq, before):
        """Add chunk `number` of a consumer's part of dQ; they come in order."""
        if self.ordered and number == 0:
            self.finish(before)
            _wait_for(self.counters + place.chunk, place.rank)
        flat: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
        x = gl.convert_layout(in_register_order(dq).reshape([4096]), flat, assert_trivial=True)
        to = self.ptr + (place.chunk + number).to(gl.int64) * 4096 + gl.arange(0, 4096, flat)
        if self.ordered:
            if place.rank == 0:
                gl.store(to, x)
            else:
                gl.atomic_add(to, x, sem="relaxed", scope="gpu")
        else:
            gl.atomic_add(to, x, sem="relaxed", scope="gpu")

    @gluon.jit
    def finish(self, last):
        """Let others add to where this consumer has added last."""
        if self.ordered:  # noqa: SIM102 (known at compile time, unlike the inner one)
            if last.chunk >= 0:
                _count(self.counters + last.chunk)
