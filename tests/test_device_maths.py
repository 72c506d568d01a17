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
from tandem_attn.testing.plain import DeviceInt, Language, gluon_module, load
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
