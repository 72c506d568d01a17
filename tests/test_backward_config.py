"""Which kernels make the gradients of a question, and what their launches pass: no GPU needed."""

import dataclasses
import itertools
import re
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tandem_attn.device.accumulate import WRITTEN
from tandem_attn.device.mask import CausalMask, FullMask, NoMask, WindowMask
from tandem_attn.device.schedule import DenseTiles, VarlenTiles
from tandem_attn.device.sequence import PADDING, Dense, Varlen
from tandem_attn.kernels.config import SHARED_MEMORY
from tandem_attn.kernels.config_backward import (
    MAX_UNORDERED_KEYS,
    MULTIPROCESSORS,
    BackwardConfig,
    KeyGradientConfig,
    QueryGradientConfig,
    backward_configs,
    parts_of_group,
    tile_width,
)
from tandem_attn.kernels.launch_backward import CHUNK, ORDERED_TILES, BackwardPlan, backward_boxes
from tandem_attn.spec import Window
from tandem_attn.testing.plain import DeviceInt, Language, Pointer, gluon_module, load
from tandem_attn.testing.shipped import WINDOWS
from tandem_attn.testing.shipped import question as forward_question
from tandem_attn.testing.shipped_backward import Variant, configs

DIMS = range(8, 257, 8)
CAUSAL, FULL = WINDOWS["causal"], WINDOWS["full"]
USUAL = dict(
    element="bf16", head_dim=128, head_dim_v=128, Mask=CausalMask, Sequences=Dense, Schedule=DenseTiles
)
PADDED = PADDING.value


def question(*args, deterministic=False, device="cpu", **kwargs):
    """A spec of tensors that this machine can have."""
    spec = forward_question(*args, **kwargs)
    return dataclasses.replace(spec, deterministic=deterministic, device=torch.device(device))


def all_configs(spec):
    by_keys, by_queries = backward_configs(spec)
    return [c for c in (by_keys, by_queries) if c]


# The table.


@pytest.mark.parametrize(
    "fields, complaint",
    [
        (dict(head_dim=96), "head_dim 96"),
        (dict(head_dim_v=192), "no split of dQ"),
        (dict(tile_m=32), "tile_m=32"),
        (dict(head_dim=64, head_dim_v=64, tile_m=64), "no split of dQ"),  # 4096 elements: none for a consumer
        (dict(head_dim=256, tile_m=128), "no split of dQ"),
        (dict(tile_m=128), "no split of dQ"),
        (dict(head_dim=256, head_dim_v=256), "no split of dQ"),
        (dict(head_dim_v=64), "no split of dQ"),
        (dict(stages=1), "stages=1.*consumers race"),
        (dict(ds_stages=2), "ds_stages=2.*consumers race"),
    ],
)
def test_impossible_configurations_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        BackwardConfig(**{**USUAL, **fields})


@pytest.mark.parametrize(
    "fields, complaint",
    [
        (dict(head_dim=96), "head_dim 96"),
        (dict(head_dim_v=8), "head_dim_v 8"),
        (dict(head_dim_v=256), "head_dim_v 256: dV goes to memory"),
        (dict(stages=1), "stages=1"),
        (dict(head_dim=256, head_dim_v=256, stages=3), "shared memory"),
    ],
)
def test_impossible_configurations_of_dk_and_dv_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        KeyGradientConfig(**{**USUAL, **fields})


@pytest.mark.parametrize(
    "fields, complaint",
    [
        (dict(head_dim=160), "head_dim 160"),
        (dict(head_dim_v=8), "head_dim_v 8"),
        (dict(head_dim=256, head_dim_v=256, v_stages=2), "shared memory"),
    ],
)
def test_impossible_configurations_of_dq_alone_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        QueryGradientConfig(**{**USUAL, **fields})


@pytest.mark.parametrize("head_dim", DIMS)
def test_every_question_has_configurations_that_hold_it(head_dim):
    """All pairs of head dimensions; and nothing is reached that the compile tests do not know."""
    asked = list(itertools.product((torch.bfloat16, torch.float16), (0.0, 30.0), (False, True)))
    shipped = {facts: set(configs(*facts)) for facts in asked}
    kinds = itertools.product(DIMS, WINDOWS.values(), (False, True), (520, 1024))
    for (head_dim_v, window, varlen, length), facts in zip(kinds, itertools.cycle(asked)):
        dtype, softcap, deterministic = facts
        rest = dict(window=window, varlen=varlen, dtype=dtype, softcap=softcap)
        spec = question(head_dim, head_dim_v, length, deterministic=deterministic, **rest)
        made = all_configs(spec)
        assert sorted("".join(c.gradients for c in made)) == ["k", "q", "v"]
        for config in made:
            assert config.head_dim >= head_dim and config.head_dim_v >= head_dim_v
            assert config in shipped[facts], f"{config} is reached but not in shipped_backward.py: configs()"


@pytest.mark.parametrize(
    "head_dims, tile, gradients",
    [
        ((8, 8), (64, 64), ["qkv"]),
        ((64, 64), (64, 64), ["qkv"]),
        ((72, 72), (128, 128), ["qkv"]),
        ((64, 72), (128, 128), ["qkv"]),
        ((96, 64), (128, 128), ["qkv"]),
        ((128, 128), (128, 128), ["qkv"]),
        ((136, 8), (192, 64), ["kv", "q"]),
        ((192, 128), (192, 128), ["kv", "q"]),  # DeepSeek
        ((192, 192), (192, 192), ["kv", "q"]),
        ((64, 136), (192, 192), ["kv", "q"]),
        ((200, 192), (256, 192), ["kv", "q"]),
        ((256, 256), (256, 256), ["kv", "q"]),
        ((64, 256), (256, 256), ["kv", "q"]),
        ((256, 64), (256, 64), ["kv", "q"]),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_tiles_and_launches_follow_the_heads(head_dims, tile, gradients, deterministic):
    made = all_configs(question(*head_dims, deterministic=deterministic))
    assert [c.gradients for c in made] == gradients
    assert all((c.head_dim, c.head_dim_v) == tile for c in made)
    waits = [c.ordered for c in made if c.gradients != "q"]
    assert waits == [deterministic] if gradients == ["qkv"] else not any(waits), "else no two add to one dQ"


@pytest.mark.parametrize(
    "asked, policies",
    [
        (dict(), (NoMask, Dense, DenseTiles)),
        (dict(seqlen_q=1000, seqlen_k=4096), (NoMask, Dense, DenseTiles)),
        (dict(seqlen_k=1000), (FullMask, Dense, DenseTiles)),
        (dict(seqlen_k=32), (FullMask, Dense, DenseTiles)),  # a part of a tile of keys
        (dict(window=CAUSAL), (CausalMask, Dense, DenseTiles)),
        (dict(window=CAUSAL, seqlen_q=1, seqlen_k=1024), (NoMask, Dense, DenseTiles)),  # one row sees all
        (dict(window=Window(128, 0)), (WindowMask, Dense, DenseTiles)),
        (dict(window=Window(-1, 7)), (WindowMask, Dense, DenseTiles)),
        (dict(varlen=True), (FullMask, Varlen, VarlenTiles)),
        (dict(varlen=True, window=CAUSAL), (CausalMask, Varlen, VarlenTiles)),
        (dict(varlen=True, window=Window(5, 5)), (WindowMask, Varlen, VarlenTiles)),
    ],
)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_policies_follow_the_question(head_dim, asked, policies):
    made = all_configs(question(head_dim, **asked))
    for config in made:
        assert (config.Mask, config.Sequences, config.Schedule) == policies
    capped = all_configs(question(head_dim, **asked, softcap=30.0))
    assert capped == [dataclasses.replace(c, softcap=True) for c in made]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_first_block_is_apart_where_registers_suffice(head_dim, window):
    """Not where Triton copies operands, not with three loops."""
    spec = question(head_dim, window=WINDOWS[window])
    narrow, two_loops = head_dim <= 128, spec.window.left < 0
    for copies_operands in (False, True):
        by_keys, _ = backward_configs(spec, copies_operands)
        apart = getattr(by_keys, "first_apart", False)
        assert apart == (narrow and two_loops and not copies_operands)


@pytest.mark.parametrize("varlen", [False, True])
def test_many_keys_turn_ordering_on(varlen):
    """Unordered, tiles of keys draw numbers below WRITTEN from the counter of a chunk: one each."""
    assert (MAX_UNORDERED_KEYS - 1 + 127) // 128 < WRITTEN.value
    for keys, ordered in ((MAX_UNORDERED_KEYS - 1, False), (MAX_UNORDERED_KEYS, True)):
        for head_dim in (64, 128):
            config, _ = backward_configs(
                question(head_dim, seqlen_q=128, seqlen_k=keys, varlen=varlen, batch=1)
            )
            assert config.ordered is ordered
        by_keys, _ = backward_configs(question(256, seqlen_q=128, seqlen_k=keys, varlen=varlen, batch=1))
        assert not by_keys.ordered


SHIPPED = configs() + configs(deterministic=True)[:7]


@pytest.mark.parametrize("config", SHIPPED, ids=lambda c: Variant(c).name)
def test_shipped_configurations_fit(config):
    assert (
        config.shared_memory + 1024 <= SHARED_MEMORY == 232448
    )  # tiles, barriers and what workers start with
    assert config.maxnreg * 3 * 128 <= 65536 and config.maxnreg % 8 == 0
    assert all(n % 8 == 0 and 24 <= n <= 240 for n in config.worker_registers)
    workers = [4, 1, 1, 1] if config.gradients == "qkv" else [4, 1]
    assert len(config.worker_registers) == len(workers)
    assert PADDED % getattr(config, "tile_m", PADDED) == 0, "rows past the end of a sequence have numbers too"
    for box, _layout, _element in backward_boxes(config).values():
        assert all(n <= 256 and n & (n - 1) == 0 for n in box), "what TMA and Triton take"
    text = str(config)
    assert "\n" not in text and len(text) < 200 and "<class" not in text
    for part in (config.element, f"{config.head_dim}/{config.head_dim_v}", config.Mask.__name__, "KB"):
        assert part in text
    for cls in (config.Mask, config.Sequences, config.Schedule):
        assert re.fullmatch(r"\w+@[0-9a-f]{8}", cls.__qualname__), f"{cls.__name__} is not a @policy"
        assert cls.__qualname__ in config.cache_key


BASES = BackwardConfig(**USUAL), KeyGradientConfig(**USUAL), QueryGradientConfig(**USUAL)
OTHER_VALUES = dict(
    element="fp16", head_dim=64, head_dim_v=64, Mask=FullMask, Sequences=Varlen, Schedule=VarlenTiles
)
OTHER_VALUES |= dict(tile_m=128, stages=3, ds_stages=2, k_stages=1, v_stages=2)


@pytest.mark.parametrize(
    "base, field",
    [(base, f.name) for base in BASES for f in dataclasses.fields(base)],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_every_field_counts_for_the_cache_key(base, field):
    """Also those that the text for people leaves out."""
    value = OTHER_VALUES.get(field, not getattr(base, field))
    with mock.patch.object(type(base), "__post_init__"):  # some of these are refused
        changed = dataclasses.replace(base, **{field: value})
    assert getattr(changed, field) != getattr(base, field)
    assert changed.cache_key != base.cache_key
    assert repr(changed) != repr(base), "the key of the cache in memory"


# The plan: sizes.


@pytest.mark.parametrize("head_dim", [64, 72, 128, 192, 256])
@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 128, 1000])
def test_workspace(head_dim, varlen, seqlen_q):
    """Two numbers per padded row and head, and to head_dim 128 a float32 dQ of whole chunks, each with a
    counter."""
    plan = BackwardPlan(question(head_dim, None, seqlen_q, varlen=varlen, batch=3, num_heads=4))
    padded = -(-seqlen_q // PADDED) * PADDED
    rows = padded * 3 * 4
    if varlen:
        assert plan.padded_rows >= 3 * padded and plan.padded_rows % PADDED == 0
        rows = plan.padded_rows * 4
    else:
        assert plan.padded_rows == padded
    assert plan.stat_rows == rows
    width = tile_width(head_dim)
    accumulator = rows * width if width <= 128 else 0
    assert plan.workspace_bytes == 8 * rows + 4 * accumulator + 4 * (accumulator // CHUNK**2)
    space = plan._workspace()
    made = [x for x in space[:3] if x is not None]
    assert sum(x.numel() * x.element_size() for x in made) == plan.workspace_bytes
    assert len(made) == (3 if accumulator else 1) and space.parts == ()


@pytest.mark.parametrize(
    "head_dims, widths",
    [((64, 64), (64, 64)), ((96, 96), (128, 128)), ((192, 128), (192, 128)), ((192, 192), (192, 192))],
)
@pytest.mark.parametrize("varlen", [False, True])
def test_workspace_of_parts(head_dims, widths, varlen):
    """dK and dV in float32, once for every part of a KV head's query heads."""
    asked = dict(varlen=varlen, batch=1, num_heads=8)
    whole = BackwardPlan(question(*head_dims, 1000, 1100, **asked))
    plan = BackwardPlan(question(*head_dims, 1000, 1100, num_kv_heads=2, **asked))
    assert plan.parts in (2, 4) and plan.by_keys.partial and not whole.by_keys.partial
    keys = 1100 * 2
    assert plan.workspace_bytes - whole.workspace_bytes == 4 * keys * plan.parts * sum(widths)
    assert [x.numel() for x in plan._workspace().parts] == [keys * plan.parts * width for width in widths]


@given(
    heads=st.sampled_from([(1, 1), (8, 1), (8, 8), (64, 8), (12, 2), (7, 7)]),
    seqlen=st.integers(1, 20000),
    batch=st.integers(1, 64),
    window=st.sampled_from([*WINDOWS.values()]),
    deterministic=st.booleans(),
)
def test_parts_divide_a_group(heads, seqlen, batch, window, deterministic):
    asked = dict(num_heads=heads[0], num_kv_heads=heads[1], batch=batch, window=window)
    spec = question(128, None, seqlen, deterministic=deterministic, **asked)
    parts = parts_of_group(spec)
    assert spec.group_size % parts == 0
    assert backward_configs(spec)[0].partial is (parts > 1)
    by_keys = 12 * MULTIPROCESSORS * 128 * spec.group_size
    if not deterministic and seqlen * batch * heads[1] > by_keys:
        assert parts == 1, "programs enough"
    assert parts == 1 or parts * 4 * seqlen * batch * heads[1] * 256 <= 2**31, "memory"


def test_parts_where_programs_are_few():
    """What a group is taken in as measured best: docs/kernels/backward.md."""
    asked = dict(batch=1, num_heads=64, num_kv_heads=8)
    parts = {
        (seqlen, name, deterministic): parts_of_group(
            question(128, None, seqlen, window=WINDOWS[name], deterministic=deterministic, **asked)
        )
        for seqlen in (2048, 8192)
        for name in ("full", "causal")
        for deterministic in (False, True)
    }
    several = {
        (2048, "causal", False): 2,
        (2048, "causal", True): 8,
        (8192, "causal", False): 2,
        (8192, "causal", True): 8,
    }
    assert parts == dict.fromkeys(parts, 1) | several


@pytest.mark.parametrize(
    "batch, seqlen, heads, parts",
    [(1, 8192, (32, 8), 1), (1, 8192, (28, 4), 7), (4, 4096, (32, 8), 1), (4, 4096, (16, 1), 4)],
)
def test_parts_where_programs_drift_apart(batch, seqlen, heads, parts):
    """The same under a causal mask."""
    asked = dict(batch=batch, num_heads=heads[0], num_kv_heads=heads[1], window=CAUSAL)
    assert parts_of_group(question(128, None, seqlen, **asked)) == parts


plain = load(["device.sequence"], gluon_module(Language()))["tandem_attn.device.sequence"]


def padded_starts(lengths, plan, head, heads):
    """Where device/sequence.py has the padded rows of each sequence begin."""
    starts = Pointer(np.array([*itertools.accumulate(lengths, initial=0)]))
    sequences = plain.Varlen.create(sum(lengths), sum(lengths), starts, starts, None, None)
    batch = map(DeviceInt, range(len(lengths)))
    return [sequences.sequence(b).padded_row(b, DeviceInt(head), heads, plan.padded_rows) for b in batch]


@given(lengths=st.lists(st.integers(0, 400), min_size=1, max_size=6))
@example(lengths=[127, 1, 0, 0, 128])
@example(lengths=[1, 128, 255])
def test_packed_rows_have_room(lengths):
    """Whole blocks of PADDING rows per head and sequence, apart from each other, none past the end."""
    spec = question(128, varlen=True, batch=len(lengths), seqlen_q=max(lengths), num_heads=2)
    spec = dataclasses.replace(spec, total_q=sum(lengths), total_k=sum(lengths))
    if spec.is_empty:
        return
    plan = BackwardPlan(spec)
    blocks = [-(-n // PADDED) * PADDED for n in lengths]
    starts = [start for head in (0, 1) for start in padded_starts(lengths, plan, head, 2)]
    ends = [start + size for start, size in zip(starts, blocks * 2, strict=True)]
    assert starts[0] == 0 and all(start % PADDED == 0 for start in starts)
    assert all(end <= start for end, start in zip(ends, [*starts[1:], plan.stat_rows], strict=True))
    assert plan.row_blocks * CHUNK >= max(blocks)
    assert plan.row_grid == (plan.row_blocks * 2 * len(lengths), 1, 1)


@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=6),
    heads=st.sampled_from([1, 3, 16, 40]),
    varlen=st.booleans(),
    deterministic=st.booleans(),
    size=st.sampled_from([64, 128]),
)
def test_programs_for_every_tile(lengths, heads, varlen, deterministic, size):
    """`_tiles`: as many programs as tiles, or for packed sequences at least as many."""
    longest, batch = max(lengths), len(lengths)
    spec = question(
        128, None, longest, varlen=varlen, batch=batch, num_heads=heads, deterministic=deterministic
    )
    total = sum(lengths) if varlen else batch * longest
    spec = dataclasses.replace(spec, total_q=total, total_k=total)
    if spec.is_empty:
        return
    programs, together, magics = BackwardPlan(spec)._tiles(heads, longest, total, size)
    if varlen:
        assert programs >= heads * sum(-(-n // size) for n in lengths)
        assert 1 <= together <= heads
    else:
        assert programs == heads * batch * -(-longest // size)
        assert 1 <= together <= heads * batch
    assert len(magics) == 4 and all(0 < magic < 2**63 for magic in magics)
    if deterministic:
        assert together == 1 or together * -(-longest // size) <= ORDERED_TILES


def heads_together(head_dim: int, seqlen: int, **facts) -> int:
    """Of 32 heads."""
    plan = BackwardPlan(question(head_dim, None, seqlen, num_heads=32, **facts))
    return plan._tiles(32, seqlen, 2 * seqlen, plan.by_keys.tile_n)[1]


def test_tiles_that_wait_are_few():
    """In order, a tile waits for the one after it, whose program must have started."""
    assert heads_together(128, 16384, deterministic=True) == 2
    assert heads_together(128, 65536, deterministic=True) == 1
    assert heads_together(128, 4096, deterministic=True, window=Window(256, 0)) == 16


@pytest.mark.parametrize("head_dim, long_causal", [(64, 16), (128, 1), (256, 16)])
@pytest.mark.parametrize("seqlen, heads", [(512, 16), (3000, 5), (4096, 4), (16384, 1), (32768, 1)])
def test_heads_together_fill_the_card_once(head_dim, long_causal, seqlen, heads):
    """So that what they read stays in L2. Causal sequences with more tiles than the card has room for are
    faster with many, but not scattered ones, and so are wide windows."""
    found = {name: heads_together(head_dim, seqlen, window=window) for name, window in WINDOWS.items()}
    causal = long_causal if seqlen == 32768 else heads
    assert found == {"full": heads, "causal": causal, "window": 16 if head_dim > 128 else heads}


@pytest.mark.parametrize("head_dim, causal", [(64, 16), (128, 2), (256, 16)])
def test_heads_together_where_a_program_has_several(head_dim, causal):
    group = dict(num_kv_heads=8)  # of 32 heads
    found = {name: heads_together(head_dim, 8192, window=x, **group) for name, x in WINDOWS.items()}
    assert found == {"full": 2, "causal": causal, "window": 16}


def test_heads_together_beyond_two_cards():
    found = [heads_together(128, seqlen, window=CAUSAL) for seqlen in (16896, 33792, 33793, 65536)]
    assert found == [1, 1, 16, 16]


# The plan: rows that see no key.


@given(
    seqlens=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    sides=st.tuples(st.integers(-1, 20), st.integers(-1, 20)),
)
@example(seqlens=(20, 3), sides=(-1, -1))
@example(seqlens=(20, 3), sides=(0, 17))
@example(seqlens=(20, 3), sides=(0, 16))
def test_blind_rows_of_equal_lengths(seqlens, sides):
    seqlen_q, seqlen_k = seqlens
    plan = BackwardPlan(question(64, seqlen_q=seqlen_q, seqlen_k=seqlen_k, window=Window(*sides)))
    left, right = (10**6 if side < 0 else side for side in sides)
    places = range(seqlen_k - seqlen_q, seqlen_k)
    blind = any(not any(p - left <= key <= p + right for key in range(seqlen_k)) for p in places)
    assert plan._may_be_blind((None,) * 4) is blind


def test_blind_rows_of_packed_sequences():
    """The host knows of no lengths but that both sides have the same, which have a key for every row."""
    mine, other, used = (torch.zeros(3, dtype=torch.int32) for _ in range(3))
    for window, blind in ((CAUSAL, True), (Window(4, 0), True), (Window(-1, 3), True), (FULL, False)):
        plan = BackwardPlan(question(64, varlen=True, window=window))
        assert plan._may_be_blind((mine, other, None, None)) is blind
        assert plan._may_be_blind((mine, mine, used, None)) is blind
        assert plan._may_be_blind((mine, mine, None, used)) is blind
        assert plan._may_be_blind((mine, mine, None, None)) is False
