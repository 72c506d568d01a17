"""Who computes what when decoding: device/work.py and splits.py as plain Python, and the choices of the host.

Every program of a launch takes its share with the very functions of the kernel; together they must visit
every tile of keys that some row may see exactly once, and leave every partial result in a slot of its own.
"""

import bisect
import dataclasses
import functools
import itertools
import types
from typing import NamedTuple

import numpy as np
import pytest
import torch
from decode_cases import ALL, spec_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tandem_attn
from tandem_attn import arch
from tandem_attn.device import splits as real_splits
from tandem_attn.device.decode_groups import GroupRows
from tandem_attn.device.decode_rows import WarpKeys, WarpRows
from tandem_attn.device.division import division_magic
from tandem_attn.kernels import config_decode
from tandem_attn.kernels.config import SHARED_MEMORY
from tandem_attn.kernels.config_decode import decode_config, programs_per_head
from tandem_attn.kernels.decode_tiles import pieces_of_a_tile, tile_rows
from tandem_attn.kernels.launch_decode import UNBOUNDED, DecodePlan
from tandem_attn.spec import Window
from tandem_attn.spec_decode import DecodeSpec
from tandem_attn.testing.decode_inputs import make_decode
from tandem_attn.testing.plain import DeviceInt, DType, Int64, Language, Pointer, array, gluon_module, load

PROGRAMS = 132
POLICIES = ("SharedSplits", "CountedSplits", "SizedSplits")


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(arch, "num_multiprocessors", lambda device: PROGRAMS)
    monkeypatch.setattr(arch, "capability", lambda device: (9, 0))


# The policies, through .fn on plain ints


@functools.cache
def plain_policy(name: str) -> type:
    """A policy whose methods are plain functions, which call each other."""
    return type(name, (), {k: x.fn for k, x in vars(getattr(real_splits, name)).items() if hasattr(x, "fn")})


def call(name: str, method: str, amount: int, *numbers: int) -> int:
    """A method of a policy, as Python runs it."""
    policy = plain_policy(name)()
    policy.amount = amount
    return getattr(policy, method)(*numbers)


def segments(name: str, amount: int, first: int, end: int, share: int) -> list[tuple[int, int, int, int]]:
    """(unit, tile, stop, program) of an item alone, that programs with `share` units walk."""
    found = []
    for program, unit in enumerate(range(0, call(name, "units", amount, first, end), share)):
        left = min(share, call(name, "units", amount, first, end) - unit)
        tile = call(name, "tile_of", amount, unit, first, end)
        while left > 0:
            stop = call(name, "stop", amount, tile, first, end, left)
            found.append((call(name, "unit_of", amount, tile, first, end), tile, stop, program))
            left -= call(name, "used", amount, tile, stop)
            tile = stop
    return found


@given(
    name=st.sampled_from(POLICIES),
    amount=st.integers(1, 40),
    first=st.integers(0, 300),
    count=st.integers(0, 300),
    share=st.integers(1, 50),
)
@settings(max_examples=400)
@example(name="SizedSplits", amount=4, first=3, count=2, share=1)
@example(name="CountedSplits", amount=32, first=5, count=33, share=3)
def test_units_tile_an_item_once_and_in_order(name, amount, first, count, share):
    first = first if count else 0  # as Work.tiles says it
    end = first + count
    units = call(name, "units", amount, first, end)
    assert (units == 0) == (count == 0)
    found = segments(name, amount, first, end, share)
    assert [tile for _, a, b, _ in found for tile in range(a, b)] == list(range(first, end))
    assert all(a < b for _, a, b, _ in found)
    numbers = [unit for unit, *_ in found]
    assert numbers == sorted(set(numbers)) and all(0 <= unit < units for unit in numbers)
    starts = [call(name, "tile_of", amount, unit, first, end) for unit in range(units)]
    assert [call(name, "unit_of", amount, tile, first, end) for tile in starts] == list(range(units))
    if name == "CountedSplits":
        assert units <= amount
        sizes = {b - a for a, b in itertools.pairwise([*starts, end])} if count else set()
        assert len(sizes) <= 2 and (count == 0 or end - starts[-1] <= max(sizes))
    if name == "SizedSplits":
        assert all(tile % amount == 0 for tile in starts[1:]) and (not count or starts[0] == first)
        cuts = {tile for tile in range(first + 1, end) if tile % amount == 0}
        assert set(starts[1:]) == cuts, "a boundary depends on more than the number of the tile"
    if name != "SharedSplits":
        assert len(found) == units, "a unit is one segment whatever the shares"


# All programs of a launch


class DecodeLanguage(Language):
    """`gl` with the types that division by constants uses, and sums up to each item."""

    uint32 = DType("uint32")

    def associative_scan(self, x, axis, combine):
        assert axis == 0 and combine(3, 4) == 7
        return array(np.cumsum(x))


class Truncating(DeviceInt):
    """A compile-time number that negative ones may be divided by, as the GPU does it."""

    def __floordiv__(self, other):
        return DeviceInt(abs(int(self)) // int(other) * (1 if self >= 0 else -1))

    def __rfloordiv__(self, other):
        return DeviceInt(abs(int(other)) // int(self) * (1 if other >= 0 else -1))


def device_work(mutations=None, more=(), gluon=None) -> dict:
    """device/work.py, splits.py and `more`, by their last names."""
    gluon = gluon or gluon_module(DecodeLanguage())
    modules = load(["device.work", "device.splits", *more], gluon, mutations)
    found = {name.rpartition(".")[2]: module for name, module in modules.items()}
    for which, function in (("min", np.minimum), ("max", np.maximum)):
        plain_one = {"min": min, "max": max}[which]

        def either(a, b, function=function, plain_one=plain_one):
            arrays = isinstance(a, np.ndarray) or isinstance(b, np.ndarray)
            return function(a, b) if arrays else plain_one(a, b)

        setattr(found["splits"], which, either)
    return found


plain = device_work()


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a launch finds on the device."""

    lengths: tuple[int, ...]
    tokens: tuple[int, ...] | int = 1  # a tuple: packed
    pads: tuple[int, ...] | None = None
    window: tuple[int, int] = (-1, -1)
    group: int = 4
    tile_m: int = 16
    tile_n: int = 8
    kv_heads: int = 2
    per_head: int = 5
    policy: str = "SharedSplits"
    amount: int = 1
    look: int = 32  # items at once

    @property
    def most_tokens(self) -> int:
        return max(self.tokens) if isinstance(self.tokens, tuple) else self.tokens

    @property
    def m_blocks(self) -> int:
        return -(-self.most_tokens * self.group // self.tile_m)

    @property
    def items(self) -> int:
        return len(self.lengths) * self.m_blocks

    def counts(self, b: int) -> tuple[int, int]:
        """(tokens, first visible key) of a sequence."""
        tokens = self.tokens[b] if isinstance(self.tokens, tuple) else self.tokens
        return tokens, self.pads[b] if self.pads else 0

    def needed(self, item: int) -> set[int]:
        """Tiles of which some row of an item sees some key: by the definition, every row and key."""
        b, block = divmod(item, self.m_blocks)
        n, (tokens, pad) = self.lengths[b], self.counts(b)
        rows = range(block * self.tile_m, min((block + 1) * self.tile_m, tokens * self.group))
        left, right = (side if side >= 0 else 10**6 for side in self.window)
        tiles = set()
        for token in {row // self.group for row in rows}:
            place = n - tokens + token
            keys = range(max(pad, place - left, 0), min(n, place + right + 1))
            tiles |= {key // self.tile_n for key in keys}
        return tiles


def work_of(batch: Batch, functions=plain):
    """The kernel's Work for it."""
    packed = isinstance(batch.tokens, tuple)
    one_look = batch.items <= batch.look
    config = types.SimpleNamespace(
        one_block=batch.m_blocks == 1, tile_m=DeviceInt(batch.tile_m), tile_n=Truncating(batch.tile_n),
        group_size=DeviceInt(batch.group), has_seqlens=True, packed_new=False, has_leftpad=bool(batch.pads),
        packed_q=packed, tokens=0 if packed else batch.tokens, right_edge=batch.window[1] >= 0,
        left_edge=batch.window[0] >= 0, items_at_once=1 if batch.items == 1 else batch.look,
        one_look=one_look, num_kv_heads=DeviceInt(batch.kv_heads), per_head=batch.per_head,
    )  # fmt: skip
    starts = np.cumsum([0, *batch.tokens]) if packed else np.zeros(1, np.int64)
    lengths, pads = np.array(batch.lengths), np.array(batch.pads or (0,))
    left, right = (UNBOUNDED if side < 0 else side for side in batch.window)
    facts = dict(
        seqlens=Pointer(lengths), cu_seqlens_new=Pointer(starts), leftpad=Pointer(pads),
        cu_seqlens_q=Pointer(starts), seqlen=0, seqlen_new=0, seqlen_q=batch.most_tokens,
        total_q=int(starts[-1]) + 2, capacity=max(batch.lengths) + 3, window_left=left, window_right=right,
        num_items=batch.items, m_blocks=batch.m_blocks,
        m_blocks_magic=Int64(division_magic(batch.m_blocks)),
        splits=getattr(functions["splits"], batch.policy)(batch.amount), config=config,
    )  # fmt: skip
    work = functions["work"].Work
    return work(*(facts[field] for field in work.__annotations__))


class Segment(NamedTuple):
    """Tiles of an item that a program computes, and the slot of the result, -1: it is the item's."""

    program: int
    item: int
    tile: int
    stop: int
    slot: int


def shares(name: str, amount: int, items, per_head: int, kv_heads: int = 1, kv_head: int = 0):
    """The split heuristic by itself: segments of a KV head's programs, for (first, end) tiles of items."""
    units = [call(name, "units", amount, *tiles) for tiles in items]
    starts = [*itertools.accumulate(units, initial=0)]
    share = max(-(-starts[-1] // per_head), 1)
    facts = types.SimpleNamespace(num_kv_heads=kv_heads), types.SimpleNamespace(shared=name == "SharedSplits")
    work, found = types.SimpleNamespace(config=facts[0], splits=facts[1]), []
    for program in range(per_head):
        unit, stop = program * share, min((program + 1) * share, starts[-1])
        while unit < stop:
            item = bisect.bisect_right(starts, unit) - 1
            first, end = items[item]
            tile = call(name, "tile_of", amount, unit - starts[item], first, end)
            until = call(name, "stop", amount, tile, first, end, stop - unit)
            parts = plain["work"].parts_of(work, DeviceInt(starts[item]), units[item], share, kv_head)
            part = program - starts[item] // share if facts[1].shared else unit - starts[item]
            slot = int(parts.slot(DeviceInt(part))) if parts.count > 1 else -1
            found.append(Segment(program, item, tile, until, slot))
            unit += call(name, "used", amount, tile, until)
    return found


def check_launch(batch: Batch, functions=plain) -> None:
    """Walk all programs of all heads as kernels/decode.py does."""
    module, work = functions["work"], work_of(batch, functions)
    seen = work.look()
    units = work.num_units(seen)
    share = max((units + batch.per_head - 1) // batch.per_head, 1)
    visits, slots, arrived, expected, walked = [], {}, {}, {}, [[] for _ in range(batch.kv_heads)]
    empty = [item for item in range(batch.items) if not batch.needed(item)]
    assert bool(work.some_empty(seen)) == bool(empty)
    for kv_head, place in itertools.product(range(batch.kv_heads), range(batch.per_head)):
        unit = DeviceInt(place * share)
        count = max(min(share, units - unit), 0)
        at = module.first_segment(work, seen, unit, DeviceInt(count))
        assert (at.tile < at.stop) == (count > 0)
        going = count > 0
        while going:
            assert at.tile < at.stop <= at.end and at.first <= at.tile
            visits += [(kv_head, int(at.item), tile) for tile in range(at.tile, at.stop)]
            parts = module.parts_of(work, at.before, work.splits.units(at.first, at.end), share, kv_head)
            assert int(at.before) == int(work.units_before(at.item))
            part = module.part_of(work, at, place, share)
            assert 0 <= part < parts.count
            me = kv_head, int(at.item)
            expected[me] = {int(parts.slot(DeviceInt(j))) for j in range(parts.count)}
            arrived.setdefault(me, []).append(int(part))
            slot = int(parts.slot(part)) if parts.count > 1 else -1
            walked[kv_head].append(Segment(*map(int, (place, at.item, at.tile, at.stop, slot))))
            assert len(expected[me]) == parts.count
            if parts.count > 1:
                assert slot not in slots, f"{me} and {slots[slot]} share slot {slot}"
                slots[slot] = me
            else:
                assert (at.tile, at.stop) == (at.first, at.end), "a result, but not of the whole item"
            going = at.left > 0
            at = module.next_segment(work, at) if going else at
    check_visits(batch, visits, slots, arrived, expected, work)
    items = [tuple(map(int, work.tiles(DeviceInt(item), True))) for item in range(batch.items)]
    for kv_head, segments_of_head in enumerate(walked):
        of_splits = batch.policy, batch.amount, items
        assert segments_of_head == shares(*of_splits, batch.per_head, batch.kv_heads, kv_head)


def check_visits(batch: Batch, visits, slots, arrived, expected, work) -> None:
    """Everything once; every part that the merge reads was written, into memory that exists."""
    wanted = [
        (head, item, tile)
        for head in range(batch.kv_heads)
        for item in range(batch.items)
        for tile in batch.needed(item)
    ]
    assert sorted(visits) == sorted(wanted)
    for me, parts in arrived.items():
        assert sorted(parts) == list(range(len(expected[me]))), f"{me}: parts {parts} of {expected[me]}"
        if len(parts) > 1:
            assert {slot for slot, owner in slots.items() if owner == me} == expected[me]
    if batch.policy == "SharedSplits":
        room = 2 * batch.per_head * batch.kv_heads
    else:
        tiles = -(-int(work.capacity) // batch.tile_n)
        each = min(batch.amount, tiles) if batch.policy == "CountedSplits" else -(-tiles // batch.amount)
        room = batch.items * batch.kv_heads * each
    assert all(0 <= slot < room for slot in slots), f"{max(slots)} of {room} slots"


@st.composite
def batches(draw):
    size = draw(st.sampled_from((1, 1, 2, 3, 7, 20, 45)))

    def each(low, high):
        return tuple(draw(st.lists(st.integers(low, high), min_size=size, max_size=size)))

    most = draw(st.sampled_from((0, 9, 130)))
    tokens = draw(st.sampled_from((1, 1, 2, 5, 13)))
    if draw(st.booleans()):
        tokens = each(0, tokens)
        tokens = (1, *tokens[1:]) if not any(tokens) else tokens
    lengths = each(0, most)
    return Batch(
        lengths, tokens, each(0, most + 3) if draw(st.booleans()) else None,
        draw(st.sampled_from(((-1, -1), (-1, 0), (6, 0), (0, 0), (20, 3), (-1, 5), (3, -1)))),
        draw(st.sampled_from((1, 3, 4))), draw(st.sampled_from((4, 16))), draw(st.sampled_from((4, 8))),
        draw(st.integers(1, 3)), draw(st.integers(1, 30)), draw(st.sampled_from(POLICIES)),
        draw(st.sampled_from((1, 2, 3, 7))), draw(st.sampled_from((32, 32, 64))),
    )  # fmt: skip


@given(batch=batches())
@settings(max_examples=200)
@example(batch=Batch((0,) * 40, policy="SizedSplits"))
@example(batch=Batch((0,) * 39 + (9,), per_head=30))
@example(batch=Batch((8,) * 64, per_head=64))
@example(batch=Batch((1000,), per_head=7))
@example(batch=Batch((1000, 0, 1), per_head=7, policy="CountedSplits", amount=32))
@example(batch=Batch((100,) * 3, tokens=30, window=(10, 0), tile_m=16))
def test_programs_visit_every_tile_once(batch):
    check_launch(batch)


def test_faults_are_noticed():
    """The walk fails for shares that lose, repeat or misplace."""
    faults = {
        "return min(end, tile + left)": "return min(end, tile + left + 1)",
        "return first + unit\n": "return first\n",
        "gl.where(j == 0, 1, 0)": "gl.where(j == 1, 1, 0)",
        "2 * (c * num_kv_heads + kv_head)": "2 * c * num_kv_heads + kv_head",
        "while (end <= first) & (item + 1 < work.num_items)": "while item < 0",
        "before += work.splits.units(first, end)\n": "before += 1\n",
    }
    for old, new in faults.items():
        functions = device_work({old: new})
        with pytest.raises((AssertionError, ArithmeticError, IndexError)):
            check_launch(Batch((200, 0, 3, 70, 64, 9), per_head=5), functions)


# What the host chooses


def asked(
    head_dim=128, head_dim_v=None, tokens=1, group=4, kv_heads=8, batch=4, capacity=4096, page=0, **facts
):
    """A DecodeSpec of contiguous tensors on a GPU that need not exist."""
    dim_v, heads, slots = head_dim_v or head_dim, group * kv_heads, page or capacity
    of_window = Window(*facts.pop("window", (-1, 0 if tokens > 1 else -1)))
    fields = dict(
        device=torch.device("cuda", 0), dtype=torch.bfloat16, batch=batch, seqlen_q=tokens, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=head_dim, head_dim_v=dim_v, softmax_scale=head_dim**-0.5,
        window=of_window.reduced(tokens, capacity), softcap=0.0, packed_q=False, total_q=batch * tokens,
        cache_rows=batch, page_size=page, capacity=capacity, table_width=-(-capacity // page) if page else 0,
        has_seqlens=True, has_batch_idx=False, has_leftpad=False, packed_new=False, num_splits=0,
        split_size=None, sm_margin=0, q_stride=(tokens * heads * head_dim, heads * head_dim, head_dim, 1),
        k_stride=(slots * kv_heads * head_dim, kv_heads * head_dim, head_dim, 1),
        v_stride=(slots * kv_heads * dim_v, kv_heads * dim_v, dim_v, 1), table_stride=capacity, aligned=True,
        descale_block=0, q_descale_stride=(), k_descale_stride=(), v_descale_stride=(),
    )  # fmt: skip
    fields |= facts
    kinds = dict(q_dtype=fields["dtype"], cache_dtype=fields["dtype"])
    return DecodeSpec(**(kinds | fields))


@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 136, 192, 256])
@pytest.mark.parametrize("head_dim_v", [8, 64, 128, 256])
def test_every_question_has_a_configuration_that_fits(head_dim, head_dim_v):
    """DecodeConfig checks itself; here what it does not know."""
    pages, rows = (
        (0, 1, 3, 8, 16, 24, 64, 128, 256, 384),
        ((1, 1), (1, 5), (1, 128), (3, 8), (17, 4), (300, 7)),
    )
    ways = ({}, dict(num_splits=1), dict(num_splits=256), dict(split_size=128), dict(split_size=1280))
    for page, (tokens, group), way, batch in itertools.product(pages, rows, ways, (1, 3, 500)):
        for kv_heads in (1, 8, 200):
            spec = asked(head_dim, head_dim_v, tokens, group, kv_heads, batch, page=page, **way)
            plan = DecodePlan(spec)
            config = plan.config
            assert config.shared_memory <= SHARED_MEMORY
            assert config.residents * (config.shared_memory + 1024) <= 228 * 1024
            assert (config.residents + 1) * (config.shared_memory + 1024) > 228 * 1024
            assert config.num_stages >= 2
            assert config.rows <= config.num_groups * config.rows_stored <= config.tile_m
            assert config.head_dim_v % config.combine_width == 0 and config.combine_width >= 32
            assert config.tile_m * plan.items >= tokens * group * batch > config.tile_m * (plan.items - batch)
            assert 1 <= config.parts_at_once <= 256
            assert config.parts_at_once & (config.parts_at_once - 1) == 0
            if way.get("split_size"):
                assert config.amount * config.tile_n == way["split_size"] and not config.merges
            assert plan.workspace_bytes % 16 == 0 and plan.counter_bytes >= 4 * plan.num_counters
            if config.pieces > 1:
                assert config.pieces * page == config.tile_n


@given(room=st.integers(1, 400), kv_heads=st.integers(1, 500))
def test_programs_fill_the_room_and_no_more(room, kv_heads):
    each = programs_per_head(kv_heads, room)
    assert each >= 1 and (each == 1 or each * kv_heads <= room) and (each + 1) * kv_heads > room


@given(page=st.integers(0, 600), tile_n=st.sampled_from([32, 64, 128]))
@settings(max_examples=300)
def test_pieces_make_whole_tiles(page, tile_n):
    """No tile crosses the end of a page unless it is made of whole ones, each a swizzle's rows or more."""
    pieces = pieces_of_a_tile(page, tile_n)
    if pieces is None:
        assert page % tile_n != 0
    elif pieces == 1:
        assert page % tile_n == 0
    else:
        assert pieces * page == tile_n and page >= config_decode.PIECE_ROWS
    if page in (64, 128, 256) and tile_n <= 128:
        assert pieces is not None, "the usual pages are loaded, not gathered"


@given(tokens=st.integers(1, 500), group=st.integers(1, 200))
def test_rows_of_an_item(tokens, group):
    spec = asked(tokens=tokens, group=group)
    rows, total = tile_rows(spec), tokens * group
    assert rows in (16, 64, 128) and (total > 128 or rows >= total)
    assert rows == 16 or total > {64: 16, 128: 64}[rows]
    assert config_decode.blocks_of_rows(spec) == -(-total // rows)
    kinds = {16: WarpKeys, 64: WarpRows, 128: GroupRows}
    assert decode_config(spec, PROGRAMS).RowKind is kinds[rows]
    paged = asked(tokens=tokens, group=group, page=1)  # a producer of one warp does not gather
    assert decode_config(paged, PROGRAMS).RowKind is (WarpKeys if rows == 16 else WarpRows)


def test_the_second_kernel_takes_what_one_program_should_not_merge():
    """Usual decoding merges in place; splits of a size, and many parts, do not."""
    assert decode_config(asked(), PROGRAMS).merges
    assert decode_config(asked(tokens=16), PROGRAMS).merges
    assert not decode_config(asked(split_size=256), PROGRAMS).merges
    assert not decode_config(asked(num_splits=256, group=16), PROGRAMS).merges
    assert decode_config(asked(num_splits=2), PROGRAMS).merges
    for batch, kv_heads, splits in itertools.product((1, 2, 8, 64), (1, 2, 8), (0, 1, 4, 16, 64, 256)):
        config = decode_config(asked(batch=batch, kv_heads=kv_heads, num_splits=splits), PROGRAMS)
        parts = splits or -(-config.per_head // batch) + 1
        size = 4 * parts * config.rows * config.head_dim_v
        assert config.merges == (size <= config_decode.MERGE_BYTES)


def test_what_is_compiled_ahead_is_what_calls_ask_for():
    """tests/decode_cases.py knows the questions of its cases without their memory."""
    for case in {spec_of(case): case for case in ALL}.values():
        if case.batch > 5 or case.capacity > 2000 or case.kv_heads > 100:
            continue
        inputs = make_decode(case)
        real = tandem_attn.explain_with_kvcache(**inputs.tensors, **inputs.options).spec
        real = dataclasses.replace(real, device=torch.device("cuda", 0), cache_rows=0)
        assert dataclasses.replace(spec_of(case), cache_rows=0) == real
