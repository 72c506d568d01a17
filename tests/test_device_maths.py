"""Which keys a row may see: the masks of device/mask.py, run as plain Python, against every (row, key).

Integers refuse to divide negative numbers (the GPU truncates, Python floors) and to leave 32 bits.
"""

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tandem_attn import arch
from tandem_attn.device import mask as real_masks
from tandem_attn.kernels.config import forward_config
from tandem_attn.kernels.launch import UNBOUNDED, ForwardPlan
from tandem_attn.spec import Window
from tandem_attn.testing.plain import DeviceInt, Language, array, gluon_module, load
from tandem_attn.testing.shipped import question


def load_masks(mutations=None):
    return load(["device.mask"], gluon_module(Language()), mutations)["tandem_attn.device.mask"]


plain = load_masks()
FULL, CAUSAL, NONE, WINDOW = "FullMask", "CausalMask", "NoMask", "WindowMask"


def visible(name, seqlen_q, seqlen_k, left, right) -> np.ndarray:
    """[seqlen_q, seqlen_k]: by the definition, all elements."""
    place = np.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q)
    key = np.arange(seqlen_k)[None, :]
    if name in (FULL, NONE):
        return np.ones((seqlen_q, seqlen_k), bool)
    if name == CAUSAL:
        return key <= place
    return (key >= place - left) & (key <= place + right)


def check_tile(mask, seen, m_start, tile_m, tile_n):
    """The key blocks of one tile: those that are needed, no other; the element test where needed."""
    end, count, right_edge, left_edge = mask.key_blocks(m_start, m_start + tile_m, tile_n)
    rows = seen[m_start : m_start + tile_m]
    seqlen_k = seen.shape[1]
    where = f"{vars(mask)}, rows {m_start}+{tile_m}, blocks of {tile_n}: {end, count, right_edge, left_edge}"
    assert count >= 1 and end - count >= 0 and (end - 1) * tile_n < max(seqlen_k, 1), where
    assert 0 <= right_edge <= left_edge <= count, where
    blocks = [rows[:, n * tile_n : (n + 1) * tile_n] for n in range(-(-seqlen_k // tile_n))]
    needed = {n for n, block in enumerate(blocks) if block.any()}
    whole = {n for n, block in enumerate(blocks) if block.all() and block.shape[1] == tile_n}
    visited = [end - 1 - i for i in range(count)]
    assert set(visited) == needed or (not needed and count == 1), where
    assert set(visited[right_edge:left_edge]) == whole & set(visited), where


def check_limits(mask, seen):
    """The element test of every row."""
    for row, keys in enumerate(seen):
        first, last = mask.row_limits(DeviceInt(row))
        allowed = range(max(first, 0) if mask.has_left_edge else 0, last + 1)
        where = f"{vars(mask)}, row {row}: {first} to {last}"
        if mask.masks:
            assert set(allowed) == set(np.flatnonzero(keys)), where
        else:
            assert keys.all(), where


def check(name, seqlen_q, seqlen_k, tile_m, tile_n, left=0, right=0):
    mask = getattr(plain, name)(seqlen_q, seqlen_k, left, right)
    seen = visible(name, seqlen_q, seqlen_k, left, right)
    for m_start in range(0, seqlen_q, tile_m):
        check_tile(mask, seen, DeviceInt(m_start), tile_m, tile_n)
    return mask, seen


LENGTHS = range(13)
TILES = [(1, 1), (1, 3), (2, 2), (2, 3), (3, 1), (3, 2), (3, 4), (4, 3), (4, 4)]
SIDES = (0, 1, 2, 5, UNBOUNDED)


@pytest.mark.parametrize("name", [FULL, CAUSAL, NONE])
def test_all_small_shapes(name):
    for seqlen_q, seqlen_k in itertools.product(LENGTHS, LENGTHS):
        for tile_m, tile_n in TILES:
            if name == NONE and (seqlen_k == 0 or seqlen_k % tile_n):
                continue  # the host does not choose it
            mask, seen = check(name, seqlen_q, seqlen_k, tile_m, tile_n)
        if name != NONE:
            check_limits(mask, seen)


@pytest.mark.parametrize("left", SIDES)
def test_all_small_windows(left):
    for right, seqlen_q, seqlen_k in itertools.product(SIDES, range(1, 13, 2), range(0, 13, 2)):
        for tile_m, tile_n in TILES:
            mask, seen = check(WINDOW, seqlen_q, seqlen_k, tile_m, tile_n, left, right)
        check_limits(mask, seen)


SIDE = st.one_of(st.integers(0, 700), st.just(UNBOUNDED))


@given(
    name=st.sampled_from([FULL, CAUSAL, WINDOW]),
    seqlens=st.tuples(st.integers(1, 1500), st.integers(0, 1500)),
    tile=st.tuples(st.sampled_from([64, 128, 192]), st.sampled_from([64, 128])),
    sides=st.tuples(SIDE, SIDE),
)
@example(name=WINDOW, seqlens=(1000, 1040), tile=(128, 128), sides=(0, 0))
@example(name=CAUSAL, seqlens=(1040, 304), tile=(192, 128), sides=(0, 0))
def test_real_tiles(name, seqlens, tile, sides):
    check(name, *seqlens, *tile, *sides)


@given(
    seqlens=st.tuples(st.integers(1, 40), st.integers(0, 40)),
    tile=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    consumers=st.sampled_from([2, 3]),
)
@example(seqlens=(1, 40), tile=(2, 3), consumers=3)  # consumers whose rows are all past the end
def test_skipped_blocks_hold_nothing_for_their_consumer(seqlens, tile, consumers):
    """With `skip`, a consumer hands back what lies beyond the last block of its own rows."""
    (seqlen_q, seqlen_k), (tile_m, tile_n) = seqlens, tile
    mask = plain.CausalMask(seqlen_q, seqlen_k, 0, 0)
    seen = visible(CAUSAL, seqlen_q, seqlen_k, 0, 0)
    for m_tile in range(0, seqlen_q, tile_m * consumers):
        end, count, _, _ = mask.key_blocks(m_tile, m_tile + tile_m * consumers, tile_n)
        for m_start in range(m_tile, m_tile + tile_m * consumers, tile_m):
            own_end, _, _, _ = mask.key_blocks(m_start, m_start + tile_m, tile_n)
            skipped = min(end - own_end, count - 1)
            assert 0 <= skipped < count
            rows = seen[m_start : m_start + tile_m]
            assert not rows[:, max(end - skipped, 0) * tile_n :].any()


@pytest.mark.parametrize("name", [FULL, CAUSAL, WINDOW])
@pytest.mark.parametrize(
    "seqlens", [(UNBOUNDED - 1, UNBOUNDED - 1), (1, UNBOUNDED - 1), (UNBOUNDED - 1, 1), (UNBOUNDED - 1, 0)]
)
def test_longest_sequences_fit_in_32_bits(name, seqlens):
    """DeviceInt raises where the GPU would wrap around."""
    seqlen_q, seqlen_k = seqlens
    for left, right in itertools.product((0, UNBOUNDED), repeat=2):
        mask = getattr(plain, name)(seqlen_q, seqlen_k, left, right)
        for m_start in (0, (seqlen_q - 1) // 192 * 192):
            end, count, _, _ = mask.key_blocks(DeviceInt(m_start), DeviceInt(m_start) + 192, DeviceInt(128))
            assert 0 <= end - count < end <= max(-(-seqlen_k // 128), 1)
            mask.row_limits(DeviceInt(m_start))
            mask.row_limits(DeviceInt(seqlen_q - 1))


def test_what_the_checks_can_see():
    """Faults of the kind that a GPU would show as wrong numbers, or not at all."""
    faults = {
        "end = min(max(m_end + diagonal, 1), max(self.seqlen_k, 1))": "end = m_end",  # bottom-right forgotten
        "whole = min(max(m_start + diagonal + 1, 0)": "whole = min(max(m_start + diagonal + tile_n, 0)",
        "diagonal = self.seqlen_k - self.seqlen_q\n        end = min(max(m_end": (
            "diagonal = self.seqlen_k - self.seqlen_q\n        end = min(min(m_end"
        ),
    }
    for old, new in faults.items():
        mask = load_masks({old: new}).CausalMask(9, 7, 0, 0)
        seen = visible(CAUSAL, 9, 7, 0, 0)
        with pytest.raises((AssertionError, ArithmeticError)):
            [check_tile(mask, seen, DeviceInt(m_start), 2, 3) for m_start in range(0, 9, 2)]
    with pytest.raises(ArithmeticError):
        DeviceInt(-1) // 2
    with pytest.raises(ArithmeticError):
        7 % DeviceInt(-2)
    with pytest.raises(OverflowError):
        DeviceInt(UNBOUNDED) * 2


# The same seen from the keys, for the backward: which blocks of rows see a tile of keys.


def blocks_by_rows(mask, seqlen_q, tile_m, tile_n):
    """{(block of rows, block of keys)} that a kernel visits which takes rows one tile after the other."""
    pairs = set()
    for m_start in range(0, seqlen_q, tile_m):
        end, count, _, _ = mask.key_blocks(DeviceInt(m_start), DeviceInt(m_start) + tile_m, DeviceInt(tile_n))
        pairs |= {(m_start // tile_m, n) for n in range(end - count, end)}
    return pairs


def check_by_keys(mask, seen, tile_m, tile_n):
    """Tiles of keys visit what tiles of rows do, nothing else; whole are those where nothing is masked."""
    seqlen_q, seqlen_k = seen.shape
    by_rows, by_keys = blocks_by_rows(mask, seqlen_q, tile_m, tile_n), set()
    for n_start in range(0, max(seqlen_k, 1), tile_n):
        blocks = mask.query_blocks(DeviceInt(n_start), DeviceInt(n_start) + tile_n, DeviceInt(tile_m))
        begin, end, whole_begin, whole_end = blocks
        where = f"{vars(mask)}, keys {n_start}+{tile_n}, blocks of {tile_m}: {[*map(int, blocks)]}"
        assert 0 <= begin <= whole_begin <= whole_end <= end <= -(-seqlen_q // tile_m), where
        by_keys |= {(m, n_start // tile_n) for m in range(begin, end)}
        keys = seen[:, n_start : n_start + tile_n]
        rows = {m: keys[m * tile_m : (m + 1) * tile_m] for m in range(begin, end)}
        whole = {m for m in rows if rows[m].all() and n_start + tile_n <= seqlen_k}
        said = set(range(whole_begin, whole_end))
        assert said <= whole, where
        assert all(m == (seqlen_q - 1) // tile_m and seqlen_q % tile_m for m in whole - said), where
    assert by_keys == by_rows, f"{vars(mask)}, {tile_m} x {tile_n}: {sorted(by_keys ^ by_rows)}"


def check_elements(mask, seen, down, across):
    """`apply_mask_transposed` on the tile of keys `down` and rows `across` (both range) is what `seen` says;
    and, if there are such rows, `apply_mask` on the same tile the other way round is as well."""
    keys, rows = len(down), len(across)
    fill = float("-inf")
    scores = array(np.ones((keys, rows)))
    mine = plain.apply_mask_transposed(mask, scores, DeviceInt(down[0]), DeviceInt(across[0]), fill)
    theirs = plain.apply_mask(mask, scores.T, DeviceInt(across[0]), DeviceInt(down[0]), fill)
    wanted = np.zeros((keys, rows), bool)
    inside = seen[across[0] : across[-1] + 1, down[0] : down[-1] + 1].T
    wanted[: inside.shape[0], : inside.shape[1]] = inside
    there = max(min(rows, seen.shape[0] - across[0]), 0)  # what becomes of rows past the end is all the same
    where = f"{vars(mask)}, keys {down}, rows {across}"
    assert np.array_equal(mine[:, :there] == 1, wanted[:, :there]), where
    assert np.array_equal(theirs[:there].T, mine[:, :there]), where
    assert set(np.unique(mine)) <= {1, fill}


def check_key_limits(mask, seen):
    """The rows of every key, and of keys past the end none."""
    seqlen_q, seqlen_k = seen.shape
    for key in range(seqlen_k + 5):
        first, last = mask.key_limits(DeviceInt(key))
        last = min(last, seqlen_q - 1) if mask.has_left_edge else seqlen_q - 1
        rows = set(range(max(first, 0), last + 1)) if mask.masks else set(range(seqlen_q))
        if mask.masks or key < seqlen_k:  # without a mask, no tile reaches past the end
            expected = set(np.flatnonzero(seen[:, key])) if key < seqlen_k else set()
            assert rows == expected, f"{vars(mask)}, key {key}: {first} to {last}"


def each_mask(seqlens, sides, names=(FULL, CAUSAL, NONE, WINDOW)):
    """(mask, what it lets see), one per name and for windows one per pair of sides."""
    for name in names:
        for left, right in itertools.product(sides, sides) if name == WINDOW else [(0, 0)]:
            yield getattr(plain, name)(*seqlens, left, right), visible(name, *seqlens, left, right)


@pytest.mark.parametrize("seqlen_q", [0, 1, 2, 3, 6, 9, 12])
def test_by_keys_all_small_shapes(seqlen_q):
    for seqlen_k in range(13):
        for mask, seen in each_mask((seqlen_q, seqlen_k), SIDES):
            for tile_m, tile_n in TILES[::2] if mask.has_left_edge else TILES:
                if mask.masks or (seqlen_k and seqlen_k % tile_n == 0):
                    check_by_keys(mask, seen, tile_m, tile_n)
            check_key_limits(mask, seen)


@given(
    name=st.sampled_from([FULL, CAUSAL, WINDOW]),
    seqlens=st.tuples(st.integers(1, 900), st.integers(0, 900)),
    tile=st.sampled_from([(64, 128), (128, 128), (64, 64)]),
    sides=st.tuples(SIDE, SIDE),
)
@example(name=WINDOW, seqlens=(513, 640), tile=(64, 128), sides=(UNBOUNDED, 90))
@example(name=WINDOW, seqlens=(513, 640), tile=(128, 128), sides=(100, UNBOUNDED))
@example(name=CAUSAL, seqlens=(640, 129), tile=(64, 64), sides=(0, 0))
@example(name=CAUSAL, seqlens=(129, 640), tile=(128, 128), sides=(0, 0))
def test_by_keys_real_tiles(name, seqlens, tile, sides):
    tile_m, tile_n = tile
    mask, seen = getattr(plain, name)(*seqlens, *sides), visible(name, *seqlens, *sides)
    check_by_keys(mask, seen, tile_m, tile_n)
    check_key_limits(mask, seen)
    for n_start, m_start in itertools.product((0, 128, 576), (0, 64, 512)):
        check_elements(mask, seen, range(n_start, n_start + 64), range(m_start, m_start + tile_m))


@given(
    seqlens=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    sides=st.tuples(st.sampled_from(SIDES), st.sampled_from(SIDES)),
    tile=st.tuples(st.integers(1, 5), st.integers(1, 6)),
)
def test_blocks_that_the_second_consumer_skips_see_none_of_its_keys(seqlens, sides, tile):
    """kernels/backward.py: `_consumer`. What it does not skip begins inside its tile's blocks."""
    tile_m, half = tile
    for mask, seen in each_mask(seqlens, sides, (CAUSAL, WINDOW)):
        for n_start in range(0, seqlens[1], 2 * half):
            start, middle, end = (DeviceInt(n_start + n) for n in (0, half, 2 * half))
            tile_begin, _, whole_begin, _ = mask.query_blocks(start, end, tile_m)
            begin = max(min(mask.query_blocks(middle, end, tile_m)[0], whole_begin), tile_begin)
            assert tile_begin <= begin <= whole_begin
            assert not seen[tile_begin * tile_m : begin * tile_m, middle:end].any()


@pytest.mark.parametrize("name", [FULL, CAUSAL, WINDOW])
@pytest.mark.parametrize(
    "seqlens", [(UNBOUNDED - 256, UNBOUNDED - 1), (1, UNBOUNDED - 1), (UNBOUNDED - 256, 1)]
)
def test_longest_sequences_fit_in_32_bits_by_keys(name, seqlens):
    """Up to 2**30 - 256 rows: the end of a tile of keys and the rounding up of rows are on top of them."""
    seqlen_q, seqlen_k = seqlens
    for left, right in itertools.product((0, UNBOUNDED), repeat=2):
        mask = getattr(plain, name)(seqlen_q, seqlen_k, left, right)
        for n_start in (0, (seqlen_k - 1) // 128 * 128):
            for tile_m in (64, 128):
                n_end = DeviceInt(n_start) + 128
                begin, end, _, _ = mask.query_blocks(DeviceInt(n_start), n_end, DeviceInt(tile_m))
                assert 0 <= begin <= end <= -(-seqlen_q // tile_m)
            for key in (n_start, seqlen_k - 1, n_start + 127):
                mask.key_limits(DeviceInt(key))


BY_KEYS_FAULTS = {
    "// tile_m * min(n_start, 1), end)\n        whole = (": "// tile_m, end)\n        whole = (",
    "whole = (max(n_end - 1 - diagonal, 0)": "whole = (max(n_start - diagonal, 0)",
    "last = n_end - diagonal + self.window_left": "last = n_end - diagonal + self.window_left - 1",
    "first = n_start - diagonal - self.window_right": "first = n_start - diagonal - self.window_right + 1",
    "whole_begin = (max(n_end - 1 - diagonal": "whole_begin = (max(n_end - 2 - diagonal",
    "whole_begin = max(min(whole_begin + past * end": "whole_begin = max(min(whole_begin",
    "whole_end = max(n_start - diagonal + self.window_left + 1, 0)": "whole_end = max(n_end - diagonal, 0)",
    "return 0, n, past * n, n": "return 0, n, 0, n",
    "gl.where(keys < self.seqlen_k, first, ": "gl.where(keys < self.seqlen_k, first + 1, ",
    "gl.where(keys < self.seqlen_k, 0, UNREACHED)": "gl.where(keys <= self.seqlen_k, 0, UNREACHED)",
    "row - self.window_right, UNREACHED": "row + self.window_right, UNREACHED",
    "return first, row + self.window_left": "return first, row - self.window_left",
}


@pytest.mark.parametrize("fault", BY_KEYS_FAULTS, ids=lambda fault: fault[:30].strip())
def test_what_the_checks_by_keys_can_see(fault):
    masks = load_masks({fault: BY_KEYS_FAULTS[fault]})
    with pytest.raises((AssertionError, ArithmeticError)):  # noqa: PT012
        for name, seqlens in itertools.product((FULL, CAUSAL, WINDOW), [(9, 7), (7, 9), (12, 12)]):
            mask = getattr(masks, name)(*seqlens, 3, 2)
            seen = visible(name, *seqlens, 3, 2)
            [check_by_keys(mask, seen, tile_m, 2) for tile_m in (1, 2, 3)]
            check_key_limits(mask, seen)


def test_what_the_check_of_elements_can_see():
    seen = visible(CAUSAL, 100, 90, 0, 0)
    mask = plain.CausalMask(100, 90, 0, 0)
    check_elements(mask, seen, range(64, 128), range(64, 128))
    with pytest.raises(AssertionError):
        check_elements(mask, ~seen, range(64, 128), range(64, 128))
    with pytest.raises(AssertionError):
        check_elements(plain.CausalMask(100, 91, 0, 0), seen, range(64, 128), range(64, 128))


@given(
    seqlens=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    window=st.tuples(st.integers(-1, 20), st.integers(-1, 20)),
    varlen=st.booleans(),
    scale=st.sampled_from([1, 64, 128]),
)
@example(seqlens=(7, 1), window=(-1, -1), varlen=False, scale=128)
def test_the_mask_chosen_means_the_window_asked_for(seqlens, window, varlen, scale):
    """Spec, table and launch together: the class, and the numbers that it gets."""
    seqlen_q, seqlen_k = (n * scale for n in seqlens)
    sides = [side if side < 0 else side * scale for side in window]
    spec = question(64, seqlen_q=seqlen_q, seqlen_k=seqlen_k, window=Window(*sides), varlen=varlen)
    config = forward_config(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arch, "num_multiprocessors", lambda device: 132)
        left, right = ForwardPlan(spec, config).numbers[4:6]
    mask = getattr(plain, config.Mask.__name__)(seqlen_q, seqlen_k, left, right)
    asked = visible(WINDOW, seqlen_q, seqlen_k, *(UNBOUNDED if side < 0 else side for side in sides))
    whole_blocks = not varlen and seqlen_k % config.tile_n == 0
    assert (config.Mask is real_masks.NoMask) == (asked.all() and whole_blocks)
    rows = range(0, seqlen_q, max(scale - 1, 1))
    for row in rows:
        first, last = mask.row_limits(DeviceInt(row))
        first = first if mask.has_left_edge else 0
        assert np.array_equal(asked[row], [first <= key <= last for key in range(seqlen_k)])
