"""Which keys a query row may see: the range of key blocks to visit and the test of one element.

A mask is a class with two jit methods. Kernels take the class as a constexpr, so a new mask is a class here,
its choice in `kernels/config.py: forward_config` and nothing elsewhere. Block ranges use only + - * // min
max on numbers made non-negative first (division truncates on the GPU and floors in Python), so tests call the
same code on plain integers: `CausalMask.key_blocks.fn(mask, m_start, m_end, tile_n)`.

Key blocks are counted backwards, from the last one that any row of the tile may see. Of these, the first
`right_edge` and those from `left_edge` on need the element test; the blocks between are seen whole by every
row. At least one block is visited even where no row sees a key: its scores are all masked, and the epilogue
writes 0.
"""

from tandem_attn.device.gluon import gl, gluon, policy

UNREACHED = gl.constexpr(2**30)  # a row that no sequence has


@policy(masks=False, has_left_edge=False, has_diagonal=False)
class NoMask:
    """Every row sees every key, and seqlen_k is a multiple of tile_n (the host knows)."""

    seqlen_q: gl.tensor
    seqlen_k: gl.tensor
    window_left: gl.tensor
    window_right: gl.tensor

    @gluon.jit
    def key_blocks(self, m_start, m_end, tile_n):
        """(end, count, right_edge, left_edge) for query rows m_start to m_end: blocks end-1, end-2, ...
        end-count."""
        n = self.seqlen_k // tile_n
        return n, n, 0, n

    @gluon.jit
    def row_limits(self, rows):
        """(first, last) key that each row may see, both inclusive."""
        return rows * 0, rows * 0 + (self.seqlen_k - 1)

    @gluon.jit
    def query_blocks(self, n_start, n_end, tile_m):
        """(begin, end, whole_begin, whole_end) for keys n_start to n_end: blocks begin to end-1, of which
        whole_begin to whole_end-1 see every key. Rows past seqlen_q count as seeing all: they have no weight.
        """
        n = (self.seqlen_q + tile_m - 1) // tile_m
        return 0, n, 0, n

    @gluon.jit
    def key_limits(self, keys):
        """(first, last) row that may see each key, both inclusive."""
        return keys * 0, keys * 0 + UNREACHED


@policy(masks=True, has_left_edge=False, has_diagonal=False)
class FullMask:
    """Every row sees every key; the last block may reach past seqlen_k."""

    seqlen_q: gl.tensor
    seqlen_k: gl.tensor
    window_left: gl.tensor
    window_right: gl.tensor

    @gluon.jit
    def key_blocks(self, m_start, m_end, tile_n):
        n = max((self.seqlen_k + tile_n - 1) // tile_n, 1)
        return n, n, n - min(self.seqlen_k // tile_n, n), n

    @gluon.jit
    def row_limits(self, rows):
        return rows * 0, rows * 0 + (self.seqlen_k - 1)

    @gluon.jit
    def query_blocks(self, n_start, n_end, tile_m):
        n = (self.seqlen_q + tile_m - 1) // tile_m
        past = min(max(n_end - self.seqlen_k, 0), 1)  # 1: keys past the end, no block is whole
        return 0, n, past * n, n

    @gluon.jit
    def key_limits(self, keys):
        return gl.where(keys < self.seqlen_k, 0, UNREACHED), keys * 0 + UNREACHED


@policy(masks=True, has_left_edge=False, has_diagonal=True)
class CausalMask:
    """Row i sees keys 0 to i + seqlen_k - seqlen_q (bottom-right aligned)."""

    seqlen_q: gl.tensor
    seqlen_k: gl.tensor
    window_left: gl.tensor
    window_right: gl.tensor

    @gluon.jit
    def key_blocks(self, m_start, m_end, tile_n):
        diagonal = self.seqlen_k - self.seqlen_q
        end = min(max(m_end + diagonal, 1), max(self.seqlen_k, 1))
        n = (end + tile_n - 1) // tile_n
        whole = min(max(m_start + diagonal + 1, 0), self.seqlen_k) // tile_n
        return n, n, n - min(whole, n), n

    @gluon.jit
    def row_limits(self, rows):
        return rows * 0, gl.minimum(rows + (self.seqlen_k - self.seqlen_q), self.seqlen_k - 1)

    @gluon.jit
    def query_blocks(self, n_start, n_end, tile_m):
        diagonal = self.seqlen_k - self.seqlen_q
        end = (self.seqlen_q + tile_m - 1) // tile_m
        # block 0 of keys is also where rows that see no key are visited
        begin = min(max(n_start - diagonal, 0) // tile_m * min(n_start, 1), end)
        whole = (max(n_end - 1 - diagonal, 0) + tile_m - 1) // tile_m
        past = min(max(n_end - self.seqlen_k, 0), 1)
        return begin, end, max(min(whole + past * end, end), begin), end

    @gluon.jit
    def key_limits(self, keys):
        first = keys - (self.seqlen_k - self.seqlen_q)
        return gl.where(keys < self.seqlen_k, first, UNREACHED), keys * 0 + UNREACHED


@policy(masks=True, has_left_edge=True, has_diagonal=True)
class WindowMask:
    """Row i sees keys i + d - window_left to i + d + window_right, d = seqlen_k - seqlen_q (both ends
    inclusive).

    The host replaces an unbounded side by a number no length reaches (2^30).
    """

    seqlen_q: gl.tensor
    seqlen_k: gl.tensor
    window_left: gl.tensor
    window_right: gl.tensor

    @gluon.jit
    def key_blocks(self, m_start, m_end, tile_n):
        diagonal = self.seqlen_k - self.seqlen_q
        rows_end = min(m_end, max(self.seqlen_q, 1))  # rows past the end would widen the range
        end = min(max(rows_end + diagonal + self.window_right, 1), max(self.seqlen_k, 1))
        last = (end + tile_n - 1) // tile_n
        first = min(max(m_start + diagonal - self.window_left, 0) // tile_n, last - 1)
        # seen whole by every row: blocks from whole_first to whole_last - 1
        whole_last = min(max(m_start + diagonal + self.window_right + 1, 0), self.seqlen_k) // tile_n
        whole_first = (max(rows_end - 1 + diagonal - self.window_left, 0) + tile_n - 1) // tile_n
        n = last - first
        right_edge = min(max(last - whole_last, 0), n)
        left_edge = max(min(last - whole_first, n), right_edge)
        return last, n, right_edge, left_edge

    @gluon.jit
    def row_limits(self, rows):
        diagonal = self.seqlen_k - self.seqlen_q
        first = rows + (diagonal - self.window_left)
        return first, gl.minimum(rows + (diagonal + self.window_right), self.seqlen_k - 1)

    @gluon.jit
    def query_blocks(self, n_start, n_end, tile_m):
        diagonal = self.seqlen_k - self.seqlen_q
        n = (self.seqlen_q + tile_m - 1) // tile_m
        first = n_start - diagonal - self.window_right  # row that sees n_start
        last = n_end - diagonal + self.window_left  # one past the last row that sees n_end - 1
        end = min((max(last, 0) + tile_m - 1) // tile_m, n)
        begin = min(max(first, 0) // tile_m * min(n_start, 1), end)
        past = min(max(n_end - self.seqlen_k, 0), 1)
        whole_begin = (max(n_end - 1 - diagonal - self.window_right, 0) + tile_m - 1) // tile_m
        whole_begin = max(min(whole_begin + past * end, end), begin)
        whole_end = max(n_start - diagonal + self.window_left + 1, 0) // tile_m
        return begin, end, whole_begin, max(min(whole_end, end), whole_begin)

    @gluon.jit
    def key_limits(self, keys):
        row = keys - (self.seqlen_k - self.seqlen_q)
        first = gl.where(keys < self.seqlen_k, row - self.window_right, UNREACHED)
        return first, row + self.window_left


@gluon.jit
def apply_mask(mask, s, m_start, n_start, fill: gl.constexpr = float("-inf")):
    """A tile of query rows m_start.. (down) and keys n_start.. (across), `fill` where the mask forbids."""
    return _keep_visible(mask, s, m_start, n_start, False, fill)


@gluon.jit
def apply_mask_transposed(mask, s, n_start, m_start, fill: gl.constexpr):
    """A tile of keys n_start.. (down) and query rows m_start.. (across), `fill` where the mask forbids."""
    return _keep_visible(mask, s, n_start, m_start, True, fill)


@gluon.jit
def _keep_visible(mask, s, down, across, transposed: gl.constexpr, fill: gl.constexpr):
    """A tile that begins at positions (down, across), `fill` where the mask forbids.

    Columns as [N // 8 (registers), 4 (lanes), 2 (registers)]: register indices are constants, and a lane's
    part moves into the limit, which cut the instructions of a masked block from 360 to 136 (H200,
    2026-11-22).
    """
    M: gl.constexpr = s.shape[0]
    N: gl.constexpr = s.shape[1]
    x = s.reshape([M, N // 8, 4, 2])
    layout: gl.constexpr = x.type.layout
    columns: gl.constexpr = gl.SliceLayout(3, layout)
    rows = gl.arange(0, M, gl.SliceLayout(1, gl.SliceLayout(2, columns)))
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, columns)))
    high = gl.arange(0, N // 8, gl.SliceLayout(0, gl.SliceLayout(2, columns)))
    low = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    column = 8 * high[None, :, None, None] + low[None, None, None, :]
    if transposed:
        first, last = mask.key_limits(rows + down)
    else:
        first, last = mask.row_limits(rows + down)
    if mask.has_left_edge or not transposed:
        last = (last - across)[:, None, None] - 2 * lane[None, None, :]
        x = gl.where(column <= last[:, :, :, None], x, fill)
    if mask.has_left_edge or transposed:
        first = (first - across)[:, None, None] - 2 * lane[None, None, :]
        x = gl.where(column >= first[:, :, :, None], x, fill)
    return gl.convert_layout(x.reshape([M, N]), s.type.layout, assert_trivial=True)
