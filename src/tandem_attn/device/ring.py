"""Stages in shared memory, filled by TMA and emptied by the consumer warpgroups.

A tile of `chunks` pieces of `width` columns lies in one stage: wgmma and TMA want powers of two, and head
dimensions 96 and 192 are three times one. Users name a fill by its running number; stage and barrier phase
follow from it. Numbers start at `first_fill`, not at 0, so that the fill before the first also has a number
that is not negative.
"""

from tandem_attn.device.gluon import aggregate, gl, gluon, mbarrier, tma_load
from tandem_attn.device.turn import named_barrier


@aggregate
class Ring:
    """Stages of one operand, K or V, and the barriers that pass them back and forth."""

    smem: gl.shared_memory_descriptor  # [num_stages * chunks, rows, width]
    full: gl.shared_memory_descriptor  # TMA -> consumers
    empty: gl.shared_memory_descriptor  # consumers -> TMA
    num_stages: gl.constexpr
    chunks: gl.constexpr
    # 0, or the first of num_stages hardware barriers that stand in for `empty`: no partition-wide bar.sync
    # before an arrival. 1.5% faster at head_dim 128, causal, from 4k tokens on; slower elsewhere (H200,
    # 2026-11-25)
    named: gl.constexpr
    threads: gl.constexpr  # of all consumers and the producer: who meets at a hardware barrier

    @gluon.jit
    def chunk(self, i, c: gl.constexpr):
        """Piece c of the tile of fill i."""
        return self.smem.index(i % self.num_stages * self.chunks + c)

    @gluon.jit
    def fill(self, i, desc, sequence, kind: gl.constexpr, head, row):
        """Producer: wait until the stage of fill i is empty, then start its load."""
        stage = i % self.num_stages
        if self.named:
            named_barrier("bar.sync", self.named + stage, self.threads)
        else:
            mbarrier.wait(self.empty.index(stage), (i // self.num_stages & 1) ^ 1)
        load_tile(self.full.index(stage), self.smem, stage, self.chunks, desc, sequence, kind, head, row)

    @gluon.jit
    def wait(self, i, pred=True):
        """Consumer: wait until fill i has landed."""
        mbarrier.wait(self.full.index(i % self.num_stages), i // self.num_stages & 1, pred=pred)

    @gluon.jit
    def release(self, i, pred=True):
        """Consumer: the stage of fill i may be overwritten."""
        if self.named:
            named_barrier("bar.arrive", self.named + i % self.num_stages, self.threads, pred)
        else:
            mbarrier.arrive(self.empty.index(i % self.num_stages), count=1, pred=pred)

    @gluon.jit
    def release_all(self):
        """Consumer, once at the start: every stage is empty."""
        if self.named:
            for i in gl.static_range(self.num_stages):
                named_barrier("bar.arrive", self.named + i, self.threads)


@gluon.constexpr_function
def first_fill(num_stages):
    """Number of the first fill of a ring: twice around, where stages and phases are those of 0."""
    return 2 * num_stages


@gluon.jit
def load_tile(full, smem, stage, chunks: gl.constexpr, desc, sequence, kind: gl.constexpr, head, row):
    """Start the TMA loads of one tile into `stage` of `smem`; `full` completes when all of it has landed."""
    mbarrier.expect(full, chunks * desc.block_type.nbytes)
    for c in gl.static_range(chunks):
        coords = sequence.coords(kind, head, row, c * smem.shape[2])
        tma_load(desc, coords, full, smem.index(stage * chunks + c).reshape(desc.block_type.shape))


@gluon.jit
def make_barriers(n: gl.constexpr, count: gl.constexpr):
    """n barriers in shared memory, each completed by `count` arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(bars.index(i), count=count)
    return bars


@gluon.jit
def make_ring(desc, rows: gl.constexpr, width: gl.constexpr, chunks: gl.constexpr, num_stages: gl.constexpr,
              num_consumers: gl.constexpr, named: gl.constexpr):  # fmt: skip
    """A ring in shared memory for tiles of `desc`; `named` as in Ring."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, width], desc.dtype)
    smem = gl.allocate_shared_memory(desc.dtype, [num_stages * chunks, rows, width], layout)
    full = make_barriers(num_stages, 1)
    empty = make_barriers(num_stages, num_consumers)
    return Ring(smem, full, empty, num_stages, chunks, named, 128 * num_consumers + 32)
