"""The split heuristic of decoding in the sizes of real calls: heads, batch, lengths and multiprocessors.

`shares` of test_decode_work.py is the heuristic as a function of plain integers; there it is compared with
the kernel's walk, segment by segment. Here the host chooses the policy, the tiles and the programs.
"""

import dataclasses
import random
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_decode_work import POLICIES, Batch, asked, shares, work_of

from tandem_attn import arch
from tandem_attn.device import splits
from tandem_attn.kernels.config_decode import programs_per_head
from tandem_attn.kernels.decode_tiles import blocks_of_rows
from tandem_attn.kernels.launch_decode import DecodePlan
from tandem_attn.testing.plain import array

UNITS = 3000  # of splits that are asked for: what an example has time for
OF_THE_BATCH = dict(items_at_once=1, one_look=True, per_head=1)  # facts that no result depends on


def size_for(lengths, blocks: int) -> int:
    """The smallest split_size that makes no more than UNITS units of them."""
    return max(128, -(-sum(lengths) * blocks // UNITS // 128) * 128)


@st.composite
def calls(draw):
    """(lengths, facts of `asked`, multiprocessors)."""
    batch, most = draw(st.integers(1, 300)), draw(st.sampled_from((500, 8192, 200_000)))
    kinds = draw(st.lists(st.integers(0, most), min_size=1, max_size=6))
    lengths = tuple(random.Random(draw(st.integers(0, 99))).choices(kinds, k=batch))
    facts = dict(
        batch=batch, capacity=max(1, *lengths) + draw(st.sampled_from((0, 0, 999))),
        kv_heads=draw(st.sampled_from((1, 2, 3, 8, 40))),
        group=draw(st.sampled_from((1, 4, 8, 24))), head_dim=draw(st.sampled_from((64, 128, 256))),
        tokens=draw(st.sampled_from((1, 1, 1, 4, 70))), page=draw(st.sampled_from((0, 0, 1, 16))),
        sm_margin=draw(st.sampled_from((0, 0, 5, 200))),
    )  # fmt: skip
    if draw(st.booleans()):
        facts["window"] = draw(st.sampled_from(((0, 0), (700, 0), (50_000, 3))))
    blocks = blocks_of_rows(asked(**facts))
    policy = draw(st.sampled_from((*POLICIES, "SharedSplits")))
    if policy == "CountedSplits":
        facts["num_splits"] = min(draw(st.sampled_from((256, 7, 2, 1))), max(1, UNITS // (batch * blocks)))
    elif policy == "SizedSplits":
        facts["split_size"] = max(draw(st.sampled_from((128, 256, 1024))), size_for(lengths, blocks))
    return lengths, facts, draw(st.integers(1, 132))


def planned(lengths, facts: dict, multiprocessors: int):
    """(plan, policy, (first, end) tiles of each item) of a call."""
    with mock.patch.object(arch, "num_multiprocessors", return_value=multiprocessors):
        plan = DecodePlan(asked(**facts))
    config, window = plan.config, plan.spec.window
    policy = next(name for name in POLICIES if getattr(splits, name) is config.Splits)
    batch = Batch(lengths, facts["tokens"], None, (window.left, window.right), config.group_size,
                  config.tile_m, config.tile_n, look=config.items_at_once)  # fmt: skip
    assert batch.items == plan.items and batch.m_blocks == blocks_of_rows(plan.spec)
    first, end = work_of(batch).tiles(array(np.arange(plan.items)), True)
    return plan, policy, list(zip(first.tolist(), end.tolist(), strict=True))


@given(call=calls())
@settings(max_examples=150)
@example(call=((200_000,), dict(batch=1, capacity=200_000, tokens=1, kv_heads=1), 132))
@example(call=((9000, 300, 7000), dict(batch=3, capacity=9000, tokens=1, kv_heads=2), 16))
@example(call=((1100,) * 3, dict(batch=3, capacity=1100, tokens=1, kv_heads=2, split_size=512), 16))
@example(call=((200_000,) * 300, dict(batch=300, capacity=200_000, tokens=70, kv_heads=40, page=1), 1))
def test_programs_have_equal_shares_and_partials_have_room(call):
    """Every tile once, nobody more than an equal share, a result for each item or slots for its parts."""
    _, facts, multiprocessors = call
    plan, policy, items = planned(*call)
    config, kv_heads = plan.config, facts["kv_heads"]
    room = config.residents * max(1, multiprocessors - facts.get("sm_margin", 0))
    assert config.per_head == programs_per_head(kv_heads, room)
    assert plan.programs == config.per_head * kv_heads <= max(room, kv_heads)
    cut = policy, config.amount, items, config.per_head, kv_heads
    of_heads = [shares(*cut, kv_head) for kv_head in {0, kv_heads // 2, kv_heads - 1}]
    assert all([s[:4] for s in one] == [s[:4] for s in of_heads[0]] for one in of_heads)
    parts, work = [[] for _ in items], [[] for _ in range(config.per_head)]
    for segment in of_heads[0]:
        parts[segment.item].append(segment)
        work[segment.program].append(segment.stop - segment.tile)
    for (first, end), mine in zip(items, parts, strict=True):
        edges = [first, *(s.stop for s in mine)]
        assert [s.tile for s in mine] == edges[:-1] and edges[-1] == end, "a tile twice, or not at all"
        assert all(s.tile < s.stop for s in mine)
        assert {s.slot >= 0 for s in mine} <= {len(mine) > 1}, "a partial result without others, or a whole"
    if policy == "SharedSplits":  # the unit is a tile, and what a program has of an item is one segment
        total = sum(end - first for first, end in items)
        assert max(map(sum, work)) == -(-total // config.per_head)
        assert all(len({s.program for s in mine}) == len(mine) for mine in parts)
    else:
        assert max(map(len, work)) == -(-sum(map(len, parts)) // config.per_head)
    slots = [s.slot for one in of_heads for s in one if s.slot >= 0]
    assert len(slots) == len(set(slots)) and max(slots, default=0) < plan._slots()


def cut_of(place: int, lengths, facts: dict, multiprocessors: int):
    """(facts that a result may depend on, (block of rows, tile, stop) of each part) of a sequence."""
    plan, policy, items = planned(lengths, facts | dict(batch=len(lengths)), multiprocessors)
    blocks, config = plan.items // len(lengths), plan.config
    cut = shares(policy, config.amount, items, config.per_head, facts["kv_heads"])
    mine = [(s.item % blocks, s.tile, s.stop) for s in cut if s.item // blocks == place]
    return dataclasses.replace(config, **OF_THE_BATCH), mine


@given(
    call=calls(), mine=st.integers(0, 200_000), place=st.integers(0, 300), multiprocessors=st.integers(1, 132)
)
@settings(max_examples=60)
def test_splits_of_a_size_know_no_company(call, mine, place, multiprocessors):
    """A sequence is cut alone as among others, on any GPU; nothing that rounds is compiled differently."""
    others, facts, of_others = call
    place %= len(others) + 1
    company = (*others[:place], mine, *others[place:])
    size = size_for(company, blocks_of_rows(asked(**facts)))
    facts = facts | dict(num_splits=0, split_size=size, capacity=max(company) + 3)
    assert cut_of(0, (mine,), facts, multiprocessors) == cut_of(place, company, facts, of_others)


@pytest.mark.parametrize("splits", [0, 3])
def test_other_splits_do(splits):
    """What the test above would notice: shares follow the batch, and counted splits their own number only."""
    facts = dict(capacity=9000, kv_heads=2, tokens=1, num_splits=splits)
    alone, among = cut_of(0, (9000,), facts, 132), cut_of(1, (5000, 9000, 700), facts, 132)
    assert (alone[1] == among[1]) == (splits > 0)
