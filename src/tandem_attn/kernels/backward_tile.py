"""What the two backward kernels share that go by keys: a program's tile of keys, which blocks of query rows
see it, and how its operands come and its gradients go.

Scores are transposed, S^T = K Q^T: then P^T and dS^T are wgmma operands straight from registers, and dK and
dV of a tile of keys stay in registers to the end.
"""

from tandem_attn.device.gluon import (
    aggregate,
    base_value,
    fence_async_shared,
    gdc_wait,
    gl,
    gluon,
    mbarrier,
    tma_load,
    tma_store,
)

# arguments of both kernels whose values make no other kernel
NUMBERS = [
    *("batch", "num_parts", "parts", "heads", "heads_magic", "seqlen_q", "seqlen_k", "window_left"),
    *("window_right", "padded_rows", "delta_start", "group", "group_magic", "last_magic", "tiles_magic"),
]


@aggregate
class Problem:
    """What the caller asked for."""

    num_parts: gl.tensor  # KV heads by the parts that their query heads are taken in
    heads: gl.tensor  # query heads of a part
    padded_rows: gl.tensor  # of dQ's accumulator and the row statistics, per head or batch and head
    delta_start: gl.tensor  # where delta begins in the row statistics, after lse
    scale: gl.tensor  # of dQ and dK
    scale_log2: gl.tensor  # score (or capped score) to exponent of 2
    inner_scale: gl.tensor  # softmax_scale / softcap
    config: gl.constexpr  # BackwardConfig or KeyGradientConfig


@aggregate
class Tile:
    """The keys of a program and the blocks of query rows that see them: begin to end - 1."""

    sequence: base_value  # DenseSequence or PackedSequence
    index: gl.tensor  # of the sequence in the batch
    mask: base_value
    part: gl.tensor  # these query heads
    kv_head: gl.tensor
    n_start: gl.tensor
    begin: gl.tensor
    end: gl.tensor
    whole_begin: gl.tensor  # of which whole_begin to whole_end - 1 see all keys
    whole_end: gl.tensor
    count: gl.tensor  # blocks of all query heads of the part together
    turn: gl.tensor  # of the blocks that see all keys, the number of the first to be visited

    @gluon.jit
    def block(self, problem, m):
        """Block to visit as number m. Programs that run side by side then add to different rows of dQ."""
        if problem.config.static.scatters:  # of blocks that need no mask, those before `turn` go last
            n = m + self.turn
            n -= gl.where(n >= self.end, self.end - self.whole_begin, 0)
            m = gl.where(m < self.whole_begin, m, n)
        return m

    @gluon.jit
    def statistics(self, problem, g):
        """First row, in the padded row statistics, of query head g of the part."""
        num_heads = problem.num_parts * problem.heads
        head = self.part * problem.heads + g
        return self.sequence.padded_row(self.index, head, num_heads, problem.padded_rows)


@gluon.jit
def _turn(before, block, whole, causal: gl.constexpr):
    """With which of its `whole` blocks, that see all of its keys, a tile begins.

    With the one that has its own number, `before`. Under a causal mask as far from the last one as its keys
    are from the first; where there are not so many, some part of them later than with the first, the parts
    of all tiles being spread evenly (by the golden ratio). Both were the fastest of several orders, and are
    not understood (docs/kernels/backward.md).
    """
    turn = before % gl.maximum(whole, 1)
    if causal:
        part = block * 159 % 256 * whole // 256
        turn = gl.where(before < whole, whole - before, part)
    return turn


@gluon.jit
def make_tile(problem, sequence, index, block, part, parts, window_left, window_right):
    """Tile number `block` of a part of a sequence, as the schedule counts."""
    c: gl.constexpr = problem.config.static
    mask = c.Mask(sequence.seqlen_q, sequence.seqlen_k, window_left, window_right)
    # The schedule begins with the last blocks. Where keys add to dQ in order, that lets each tile of keys
    # run two blocks behind the one it waits for; else the long ones, which are the first, go first.
    if not c.ordered:
        block = (sequence.seqlen_k + (c.tile_n - 1)) // c.tile_n - 1 - block
    n_start = block * c.tile_n
    begin, end, whole_begin, whole_end = mask.query_blocks(n_start, n_start + c.tile_n, c.tile_m)
    turn = begin * 0
    if c.scatters:
        turn = _turn(n_start // c.tile_m, block, end - whole_begin, c.Mask.has_diagonal)
    kv_head = part // parts if c.partial else part
    count = (end - begin) * problem.heads
    return Tile(sequence, index, mask, part, kv_head, n_start, gl.to_tensor(begin), end,
                gl.to_tensor(whole_begin), whole_end, count, gl.to_tensor(turn))  # fmt: skip


@gluon.jit
def _load_keys(full, smem, desc, tile, tiles: gl.constexpr, chunks: gl.constexpr):
    """Start the loads of K or V, 64 keys at a time."""
    mbarrier.expect(full, tiles * chunks * desc.block_type.nbytes)
    for n in gl.static_range(tiles):
        for c in gl.static_range(chunks):
            coords = tile.sequence.coords("k", tile.kv_head, tile.n_start + 64 * n, c * smem.shape[2])
            tma_load(desc, coords, full, smem.index(n * chunks + c).reshape(desc.block_type.shape))


@gluon.jit
def producer(problem, shared, tile, q_desc, k_desc, v_desc, do_desc, stat_desc):
    """The partition that loads everything: K, V, and all blocks of rows."""
    c: gl.constexpr = problem.config.static
    _load_keys(shared.kv_full.index(0), shared.k, k_desc, tile, c.tile_n // 64, c.qk_chunks)
    _load_keys(shared.kv_full.index(1), shared.v, v_desc, tile, c.tile_n // 64, c.v_chunks)
    gdc_wait()  # for the row statistics; keys, queries and dO were there before prepare_rows
    heads = gl.where(tile.count > 0, problem.heads, 1)  # consumers look at block 0 in any case
    end = gl.maximum(tile.end, tile.begin + 1)
    i = 0
    for g in range(heads):
        head = tile.part * problem.heads + g
        statistics = tile.statistics(problem, g)
        for m in range(tile.begin, end):
            row = tile.block(problem, m) * c.tile_m
            lse = statistics + row
            shared.q.acquire(i)
            with_q = lse if c.joint else lse + problem.delta_start
            shared.q.fill(i, q_desc, stat_desc, tile.sequence, head, row, with_q)
            if not c.joint:
                shared.do.acquire(i)
            with_do = lse + problem.delta_start if c.joint else lse
            shared.do.fill(i, do_desc, stat_desc, tile.sequence, head, row, with_do)
            i += 1


@gluon.jit
def store_keys(problem, tile, n_start, smem, x, out, c: gl.constexpr, chunks: gl.constexpr):
    """Piece c of dK or dV of the 64 keys from n_start on: rounded, by shared memory and TMA; or in float32
    where `sum_parts` of kernels/backward_rows.py follows."""
    width: gl.constexpr = x.shape[1]
    config: gl.constexpr = problem.config.static
    if config.partial:
        layout: gl.constexpr = x.type.layout
        row = n_start + gl.arange(0, 64, gl.SliceLayout(1, layout))
        at = tile.sequence.swapped().row_of_all(row) * problem.num_parts + tile.part
        columns = c * width + gl.arange(0, width, gl.SliceLayout(0, layout))
        to = out + (at * (chunks * width))[:, None] + columns[None, :]
        gl.store(to, x, mask=(row < tile.sequence.seqlen_k)[:, None])
    else:
        smem.store(x.to(config.dtype))
        fence_async_shared()
        coords = tile.sequence.coords("k", tile.kv_head, n_start, c * width)
        tma_store(out, coords, smem.reshape(out.block_type.shape))
