"""Stages in shared memory, filled by TMA and emptied by the consumer warpgroups.

A tile of `chunks` pieces of `width` columns lies in one stage: wgmma and TMA want powers of two, and head
dimensions 96 and 192 are three times one. Users name a fill by its running number; stage and barrier phase
follow from it. Numbers start at `first_fill`, not at 0, so that the fill before the first also has a number
that is not negative.
"""

from tandem_attn.device.gluon import aggregate, gl, gluon, mbarrier, tma_load
from tandem_attn.device.turn import named_barrier


@gluon.jit
def stage_of(i, num_stages: gl.constexpr):
    """Stage of fill i. Numbers are not negative, which the compiler does not know: % and // of a power of two
    would each take five dependent instructions."""
    if num_stages & (num_stages - 1) == 0:
        return i & (num_stages - 1)
    else:
        return i % num_stages


@gluon.jit
def phase_of(i, num_stages: gl.constexpr):
    """Parity of how often the stage of fill i was filled before."""
    if num_stages & (num_stages - 1) == 0:
        return (i & num_stages) // num_stages
    else:
        return i // num_stages & 1


@aggregate
class Ring:
    """Stages of one operand, K or V, and the barriers that pass them back and forth."""

    smem: gl.shared_memory_descriptor  # [num_stages * chunks, rows, width], or transposed
    full: gl.shared_memory_descriptor  # TMA -> consumers
    empty: gl.shared_memory_descriptor  # consumers -> TMA
    num_stages: gl.constexpr
    chunks: gl.constexpr
    # 0, or the first of num_stages hardware barriers that stand in for `empty`: no partition-wide bar.sync
    # before an arrival. 1.5% faster at head_dim 128, causal, from 4k tokens on; slower elsewhere (H200,
    # 2026-11-25)
    named: gl.constexpr
    threads: gl.constexpr  # of all consumers and the producer: who meets at a hardware barrier
    transposed: gl.constexpr  # whether tiles lie as columns: [num_stages * chunks, width, rows]

    @gluon.jit
    def chunk(self, i, c: gl.constexpr):
        """Piece c of the tile of fill i: [rows, width]."""
        piece = self.smem.index(stage_of(i, self.num_stages) * self.chunks + c)
        if self.transposed:
            return piece.permute((1, 0))
        else:
            return piece

    @gluon.jit
    def fill(self, i, desc, sequence, kind: gl.constexpr, head, row):
        """Producer: wait until the stage of fill i is empty, then start its load."""
        stage = stage_of(i, self.num_stages)
        if self.named:
            named_barrier("bar.sync", self.named + stage, self.threads)
        else:
            mbarrier.wait(self.empty.index(stage), phase_of(i, self.num_stages) ^ 1)
        load_tile(self.full.index(stage), self.smem, stage, self.chunks, desc, sequence, kind, head, row,
                  self.transposed)  # fmt: skip

    @gluon.jit
    def wait(self, i, pred=True):
        """Consumer: wait until fill i has landed."""
        stage, phase = stage_of(i, self.num_stages), phase_of(i, self.num_stages)
        mbarrier.wait(self.full.index(stage), phase, pred=pred)

    @gluon.jit
    def release(self, i, pred=True):
        """Consumer: the stage of fill i may be overwritten."""
        if self.named:
            named_barrier("bar.arrive", self.named + stage_of(i, self.num_stages), self.threads, pred)
        else:
            mbarrier.arrive(self.empty.index(stage_of(i, self.num_stages)), count=1, pred=pred)

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
def load_tile(full, smem, stage, chunks: gl.constexpr, desc, sequence, kind: gl.constexpr, head, row,
              transposed: gl.constexpr = False):  # fmt: skip
    """Start the TMA loads of one tile into `stage` of `smem`; `full` completes when all of it has landed."""
    width: gl.constexpr = smem.shape[1] if transposed else smem.shape[2]
    mbarrier.expect(full, chunks * desc.block_type.nbytes)
    for c in gl.static_range(chunks):
        coords = sequence.coords(kind, head, row, c * width)
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
              num_consumers: gl.constexpr, named: gl.constexpr, transposed: gl.constexpr = False):  # fmt: skip
    """A ring in shared memory for tiles of `desc`; `named` and `transposed` as in Ring."""
    shape: gl.constexpr = [width, rows] if transposed else [rows, width]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(shape, desc.dtype)
    smem = gl.allocate_shared_memory(desc.dtype, [num_stages * chunks] + shape, layout)
    full = make_barriers(num_stages, 1)
    empty = make_barriers(num_stages, num_consumers)
    return Ring(smem, full, empty, num_stages, chunks, named, 128 * num_consumers + 32, transposed)
