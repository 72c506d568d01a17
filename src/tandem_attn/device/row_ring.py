"""Stages of query rows for the backward: a tile of Q or dO with one of the numbers per row, lse or delta.

As device/ring.py, but the other way round: keys stay and rows stream. Fills are numbered from 0.
"""

from tandem_attn.device.gluon import aggregate, gl, gluon, mbarrier, tma_load
from tandem_attn.device.ring import make_barriers


@aggregate
class RowRing:
    """Stages of one operand and one row statistic."""

    smem: gl.shared_memory_descriptor  # [num_stages * chunks, tile_m, width]
    stat: gl.shared_memory_descriptor  # [num_stages, tile_m] float32
    full: gl.shared_memory_descriptor  # TMA -> consumers
    empty: gl.shared_memory_descriptor  # consumers -> TMA; two rings may share one
    num_stages: gl.constexpr
    chunks: gl.constexpr

    @gluon.jit
    def acquire(self, i):
        """Producer: wait until the stage of fill i is empty."""
        mbarrier.wait(self.empty.index(i % self.num_stages), (i // self.num_stages & 1) ^ 1)

    @gluon.jit
    def fill(self, i, desc, stat_desc, sequence, head, row, stat_row):
        """Producer: start the loads of fill i, rows from `row` on of the operand and from `stat_row` of its
        statistic."""
        stage = i % self.num_stages
        full = self.full.index(stage)
        mbarrier.expect(full, self.chunks * desc.block_type.nbytes + stat_desc.block_type.nbytes)
        for c in gl.static_range(self.chunks):
            coords = sequence.coords("q", head, row, c * self.smem.shape[2])
            tma_load(desc, coords, full, self.chunk(i, c).reshape(desc.block_type.shape))
        tma_load(stat_desc, [stat_row], full, self.stat.index(stage))

    @gluon.jit
    def wait(self, i):
        """Consumer: wait until fill i has landed."""
        mbarrier.wait(self.full.index(i % self.num_stages), i // self.num_stages & 1)

    @gluon.jit
    def chunk(self, i, c: gl.constexpr):
        """Piece c of the tile of fill i."""
        return self.smem.index(i % self.num_stages * self.chunks + c)

    @gluon.jit
    def stats(self, i, layout: gl.constexpr):
        """The statistic of the rows of fill i, which has been waited for."""
        return self.stat.index(i % self.num_stages).load(layout)

    @gluon.jit
    def release(self, i):
        """Consumer: the stage of fill i may be overwritten."""
        mbarrier.arrive(self.empty.index(i % self.num_stages), count=1)


@gluon.jit
def make_row_ring(desc, stat_desc, rows: gl.constexpr, width: gl.constexpr, chunks: gl.constexpr,
                  num_stages: gl.constexpr, empty):  # fmt: skip
    """A ring in shared memory for tiles of `desc`, of `chunks` pieces, and rows of `stat_desc`; emptied
    through `empty`."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, width], desc.dtype)
    smem = gl.allocate_shared_memory(desc.dtype, [num_stages * chunks, rows, width], layout)
    stat = gl.allocate_shared_memory(gl.float32, [num_stages, rows], stat_desc.layout)
    return RowRing(smem, stat, make_barriers(num_stages, 1), empty, num_stages, chunks)
