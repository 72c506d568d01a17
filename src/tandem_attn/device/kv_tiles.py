"""How tiles of K and V come from a cache into shared memory, some stages ahead of the arithmetic.

`LoadedTiles`: TMA, for contiguous caches, for pages that hold whole tiles, and for pages of which a tile
holds up to four, a power of two of at least 8 keys each: a tile is then made of pieces. (For wgmma it is also
made of chunks of 64 columns, so that the pieces of a chunk lie one after the other as its rows.)
`GatheredTiles`: asynchronous copies of 16 bytes, for pages of any size.

No entry of a page table past the end of a sequence is read, nor one whose keys lie all before its padding.
Rows past the end hold zeros (gathered) or whatever is in the cache (loaded): their V must be cleared.
"""

from tandem_attn.device.gluon import (
    async_copy,
    async_load,
    base_value,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    policy,
    tma_load,
)


@gluon.jit
def _cache_row(tiles, at, valid):
    """The row of a contiguous cache that holds the sequence at a cursor."""
    if tiles.config.has_batch_idx:
        return gl.load(tiles.batch_idx + at.batch, mask=valid, other=0)
    else:
        return at.batch


@gluon.jit
def load_pieces(desc, smem, bar, stage, places, head, chunks: gl.constexpr, width: gl.constexpr, valid):
    """Start the loads of all pieces of a tile of K or V into a stage, if valid."""
    pieces: gl.constexpr = len(places)
    for c in gl.static_range(chunks):
        for p in gl.static_range(pieces):
            to = smem.index((stage * chunks + c) * pieces + p).reshape(desc.block_type.shape)
            tma_load(desc, [places[p][0], places[p][1], head, c * width], bar, to, pred=valid)


@policy(clears=False)
class LoadedTiles:
    """Through descriptors of dimensions (sequence or page, key, KV head, column)."""

    k: base_value
    v: base_value
    k_smem: gl.shared_memory_descriptor  # [stages * chunks * pieces, rows of a piece, columns of a chunk]
    v_smem: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor  # a barrier for each stage
    page_table: gl.tensor
    table_stride: gl.tensor
    batch_idx: gl.tensor
    head: gl.tensor
    numbers: base_value
    config: gl.constexpr

    @gluon.jit
    def start(self):
        """Before the first copy."""
        for s in gl.static_range(self.config.num_stages):
            mbarrier.init(self.full.index(s), count=1)
        fence_async_shared()

    @gluon.jit
    def locate(self, at, valid):
        """(sequence or page, row in it) of each piece of the tile at a cursor. Looked up one tile ahead."""
        n0 = at.tile * self.config.tile_n
        if not self.config.paged:
            return ((_cache_row(self, at, valid), n0),)
        elif self.config.pieces == 1:
            page = (n0.to(gl.uint32) // self.config.page_size).to(gl.int32)
            found = gl.load(
                self.page_table + at.batch.to(gl.int64) * self.table_stride + page, mask=valid, other=0
            )
            return ((found, n0 - page * self.config.page_size),)
        else:
            places = ()
            for p in gl.static_range(self.config.pieces):
                row = n0 + p * self.config.piece_rows
                there = valid & (row < at.length)
                if self.config.has_leftpad:
                    there = there & (row + self.config.piece_rows > at.pad)
                entry = (
                    self.page_table
                    + at.batch.to(gl.int64) * self.table_stride
                    + at.tile * self.config.pieces
                    + p
                )
                found = gl.load(entry, mask=there, other=0)
                # nothing is read past the end of a page: zeros
                places = places + ((found, gl.where(there, 0, self.config.piece_rows)),)
            return places

    @gluon.jit
    def copy(self, stage, at, places, valid):
        """Start to fill a stage, if valid."""
        bar = self.full.index(stage)
        pieces: gl.constexpr = self.config.pieces
        k_chunks: gl.constexpr = self.config.k_chunks
        v_chunks: gl.constexpr = self.config.v_chunks
        mbarrier.expect(
            bar,
            pieces * (k_chunks * self.k.block_type.nbytes + v_chunks * self.v.block_type.nbytes),
            pred=valid,
        )
        load_pieces(self.k, self.k_smem, bar, stage, places, self.head, k_chunks, self.config.k_width, valid)
        load_pieces(self.v, self.v_smem, bar, stage, places, self.head, v_chunks, self.config.v_width, valid)
        if self.config.scaled:
            self._copy_factors(stage, at, places, valid)

    @gluon.jit
    def _copy_factors(self, stage, at, places, valid):
        n = gl.arange(0, self.config.tile_n, self.config.keys_layout)
        key = at.tile * self.config.tile_n + n
        row, slot = places[0][0] + n * 0, places[0][1] + n
        for p in gl.static_range(1, self.config.pieces):
            there = n >= p * self.config.piece_rows
            row = gl.where(there, places[p][0], row)
            slot = gl.where(there, n - p * self.config.piece_rows, slot)
        self.numbers.copy(stage, at, row, slot, valid & (key < at.length) & (key >= at.pad))
        async_copy.commit_group()

    @gluon.jit
    def wait(self, it):
        """Until fill number `it` has landed."""
        num_stages: gl.constexpr = self.config.num_stages
        if self.config.scaled:
            async_copy.wait_group(num_stages - 2)
        mbarrier.wait(self.full.index(it % num_stages), (it // num_stages) & 1)

    @gluon.jit
    def emptied(self):
        """Reads of a stage by this thread come before later fills of it: the two go through different
        proxies."""
        fence_async_shared()


@policy(clears=True)
class GatheredTiles:
    """Through addresses. Strides are in units of 8 elements (16 bytes)."""

    k: gl.tensor
    v: gl.tensor
    k_smem: gl.shared_memory_descriptor
    v_smem: gl.shared_memory_descriptor
    page_table: gl.tensor
    table_stride: gl.tensor
    batch_idx: gl.tensor
    head: gl.tensor
    k_strides: gl.tuple  # of a sequence or page, a key, a head
    v_strides: gl.tuple
    numbers: base_value
    config: gl.constexpr

    @gluon.jit
    def start(self):
        pass

    @gluon.jit
    def _rows(self, at, dim: gl.constexpr):
        layout: gl.constexpr = self.config.copy_layout(dim)
        return at.tile * self.config.tile_n + gl.arange(0, self.config.tile_n, gl.SliceLayout(1, layout))

    @gluon.jit
    def locate(self, at, valid):
        """(sequence or page, row in it) of every key of the tile, for K and for V."""
        places = ()
        for i in gl.static_range(self.config.copy_widths):
            rows = self._rows(at, self.config.k_width if i == 0 else self.config.v_width)
            if self.config.paged:
                there = valid & (rows < at.length) & (rows >= at.pad)
                page = (rows.to(gl.uint32) // self.config.page_size).to(gl.int32)
                entry = self.page_table + at.batch.to(gl.int64) * self.table_stride + page
                places = places + (
                    (gl.load(entry, mask=there, other=0), rows - page * self.config.page_size),
                )
            else:
                places = places + ((rows * 0 + _cache_row(self, at, valid), rows),)
        return places

    @gluon.jit
    def _offsets(self, strides, place):
        """In units of 8 elements."""
        row = place[0].to(gl.int64) * strides[0] + place[1].to(gl.int64) * strides[1]
        return row + self.head.to(gl.int64) * strides[2]

    @gluon.jit
    def _copy_one(self, x, smem, offsets, at, valid, dim: gl.constexpr, width: gl.constexpr):
        layout: gl.constexpr = self.config.copy_layout(width)
        rows = self._rows(at, width)
        columns = gl.arange(0, width, gl.SliceLayout(0, layout))
        keep = valid & (rows < at.length) & (rows >= at.pad)
        async_load(
            smem, x + (offsets * 8)[:, None] + columns[None, :], mask=keep[:, None] & (columns < dim)[None, :]
        )

    @gluon.jit
    def copy(self, stage, at, places, valid):
        width: gl.constexpr = self.config.k_width
        width_v: gl.constexpr = self.config.v_width
        columns: gl.constexpr = self.config.columns // self.config.parts
        columns_v: gl.constexpr = self.config.columns_v // self.config.parts
        offsets = self._offsets(self.k_strides, places[0])
        self._copy_one(self.k, self.k_smem.index(stage), offsets, at, valid, columns, width)
        if not self.config.same_strides:
            offsets = self._offsets(self.v_strides, places[self.config.copy_widths - 1])
        self._copy_one(self.v, self.v_smem.index(stage), offsets, at, valid, columns_v, width_v)
        if self.config.scaled:
            rows = self._rows(at, width)
            keep = valid & (rows < at.length) & (rows >= at.pad)
            self.numbers.copy(stage, at, places[0][0], places[0][1], keep)
        async_copy.commit_group()

    @gluon.jit
    def wait(self, it):
        async_copy.wait_group(self.config.num_stages - 2)
        if not self.config.one_block:
            fence_async_shared()  # wgmma reads through another proxy than these copies write

    @gluon.jit
    def emptied(self):
        pass
