"""Who works on which tile: device/schedule.py run as plain Python, all programs of a launch.

Every tile once, none twice, an end for every program, numbers that fit in 32 bits, and work shared out
evenly.
"""

import heapq
import itertools
import random
import types

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tandem_attn import arch
from tandem_attn.device import schedule as real_schedules
from tandem_attn.device.division import division_magic
from tandem_attn.kernels import balance, launch
from tandem_attn.kernels.config import forward_config
from tandem_attn.testing.plain import DeviceInt, Int64, Language, Pointer, gluon_module, load
from tandem_attn.testing.shipped import WINDOWS, question

PROGRAMS = 132
GROUP = 6  # of ForwardPlan.numbers: rows in a group; after it, rounds without drawing


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(arch, "num_multiprocessors", lambda device: PROGRAMS)
    monkeypatch.setattr(arch, "capability", lambda device: (9, 0))


def device_modules(mutations=None):
    modules = load(["device.schedule", "device.mask"], gluon_module(Language()), mutations)
    return {name.rpartition(".")[2]: module for name, module in modules.items()}


plain = device_modules()


def order(heads, rows, group, m_blocks=1, functions=plain):
    """Rows of device/schedule.py, as launch.py has them."""
    divisors = (heads, group, rows % group or group, group * m_blocks)
    heads_magic, *magics = map(Int64, map(division_magic, divisors))
    return functions["schedule"].Rows(heads, heads_magic, group, *magics)


def dense(name, batch, heads, seqlen_q, tile_rows, group, static_rounds=1, functions=plain):
    sequences = functions["sequence"].Dense(seqlen_q, 1)
    cls = getattr(functions["schedule"], name)
    group = group if cls.grouped else 1
    rows = order(heads, batch * heads, group, -(-seqlen_q // tile_rows), functions)
    return cls.create(sequences, DeviceInt(batch), rows, DeviceInt(static_rounds), DeviceInt(tile_rows))


def varlen(lengths, heads, tile_rows, group, used=None, total=None):
    starts = Pointer(np.cumsum([0, *lengths]))
    total = int(sum(lengths)) if total is None else total
    used = None if used is None else Pointer(np.asarray(used))
    sequences = plain["sequence"].Varlen.create(total, total, starts, starts, used, None)
    rows = order(heads, heads, group)
    return plain["schedule"].VarlenTiles.create(
        sequences, DeviceInt(len(lengths)), rows, DeviceInt(1), DeviceInt(tile_rows)
    )


def tiles(schedule, numbers):
    """(m_block, head, sequence) of these tile numbers, as a program that gets them in this order sees
    them."""
    for t in numbers:
        found, m_block, head, sequence, schedule = schedule.tile(DeviceInt(t))
        if not found:
            return
        yield int(m_block), int(head), int(sequence)


def assert_all_once(schedule, programs, expected, functions=plain):
    """Static numbering: in each round of `programs` tiles, each gets one."""
    seen = []
    for program in range(programs):
        seen += tiles(schedule, own_numbers(schedule, program, programs, functions))
    assert sorted(seen) == sorted(expected)


def own_numbers(schedule, program, programs, functions=plain):
    """Tile numbers that a program has without drawing, without end."""
    language = functions["schedule"].gl
    for n in itertools.count():
        language.program, language.programs = program, programs
        yield functions["schedule"].own_number(schedule, DeviceInt(n))


def assert_end_stays(schedule, numbers):
    for t in numbers:
        found, _, _, _, schedule = schedule.tile(DeviceInt(t))
        assert not found


@pytest.mark.parametrize("name", ["DenseTiles", "PlainTiles"])
def test_dense_small(name):
    for batch, heads, m_blocks, group in itertools.product((1, 2, 3), (1, 2, 5), (1, 2, 4), (1, 2, 3, 7)):
        rows = batch * heads
        schedule = dense(name, batch, heads, 8 * m_blocks - 3, 8, min(group, rows))
        expected = list(itertools.product(range(m_blocks), range(heads), range(batch)))
        for programs in (1, 2, 5):
            assert_all_once(schedule, programs, expected)
        assert_end_stays(schedule, range(len(expected), len(expected) + 140))


@given(
    name=st.sampled_from(["DenseTiles", "PlainTiles"]),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 1500)),
    tile_rows=st.sampled_from([128, 192]),
    programs=st.integers(1, 140),
    group=st.integers(1, 200),
)
def test_dense(name, sizes, tile_rows, programs, group):
    batch, heads, seqlen_q = sizes
    schedule = dense(name, batch, heads, seqlen_q, tile_rows, min(group, batch * heads))
    m_blocks = -(-seqlen_q // tile_rows)
    assert_all_once(schedule, programs, itertools.product(range(m_blocks), range(heads), range(batch)))


LENGTH = st.one_of(st.just(0), st.integers(0, 9), st.integers(0, 700))


@given(
    lengths=st.lists(LENGTH, min_size=1, max_size=100),
    heads=st.integers(1, 5),
    tile_rows=st.sampled_from([4, 128, 192]),
    programs=st.integers(1, 132),
    group=st.integers(1, 5),
    use=st.one_of(st.none(), st.floats(0, 1)),
)
@example(lengths=[0] * 40, heads=2, tile_rows=4, programs=3, group=1, use=None)
@example(lengths=[0] * 32 + [5], heads=1, tile_rows=4, programs=2, group=1, use=None)
@example(lengths=[4] * 32, heads=1, tile_rows=4, programs=132, group=1, use=None)
@example(lengths=[4] * 33, heads=1, tile_rows=4, programs=132, group=1, use=0.5)
@example(lengths=[9] * 64, heads=3, tile_rows=4, programs=1, group=2, use=None)
@example(lengths=[0] * 64 + [1], heads=3, tile_rows=4, programs=7, group=3, use=1.0)
def test_varlen(lengths, heads, tile_rows, programs, group, use):
    used = None if use is None else [int(n * use) for n in lengths]
    schedule = varlen(lengths, heads, tile_rows, min(group, heads), used)
    expected = [
        (m_block, head, b)
        for b, n in enumerate(lengths if used is None else used)
        for m_block in range(-(-n // tile_rows))
        for head in range(heads)
    ]
    assert_all_once(schedule, programs, expected)
    assert_end_stays(schedule, range(len(expected), len(expected) + 3 * programs, programs))


@given(
    starts=st.lists(st.integers(-50, 300), min_size=2, max_size=40),
    used=st.one_of(st.none(), st.integers(-20, 400)),
    total=st.integers(1, 200),
)
def test_varlen_lengths_that_make_no_sense_stay_inside(starts, used, total):
    """cu_seqlens is device memory that the host never reads: whatever is there, only rows of [0, total)."""
    sequences = plain["sequence"].Varlen.create(
        total,
        total,
        *[Pointer(np.asarray(starts))] * 2,
        used if used is None else Pointer(np.full(40, used)),
        None,
    )
    batch = len(starts) - 1
    schedule = plain["schedule"].VarlenTiles.create(
        sequences, DeviceInt(batch), order(1, 1, 1), DeviceInt(1), DeviceInt(8)
    )
    for m_block, _, b in tiles(schedule, range(10**6)):
        one = sequences.sequence(DeviceInt(b))
        assert 0 <= one.start_q and one.start_q + one.seqlen_q <= total
        assert 8 * m_block < one.seqlen_q


def draw_all(schedule, programs, seed):
    """Dynamic numbering: programs draw from one counter in random order, as the producer does."""
    dice, memory = random.Random(seed), np.zeros(1, np.int64)
    counter, functions = Pointer(memory, DeviceInt(0)), plain["schedule"]
    language = functions.gl
    language.programs = programs
    seen, state = [], {}
    for program in range(programs):
        state[program] = (0, DeviceInt(program), schedule)
    while state:
        program = language.program = dice.choice(list(state))
        n, t, mine = state[program]
        found, m_block, head, sequence, mine = mine.tile(t)
        if found:
            seen.append((int(m_block), int(head), int(sequence)))
            n = DeviceInt(n + 1)
            ticket = functions.request_number(mine, counter, n)
            state[program] = (n, functions.requested_number(mine, ticket, n), mine)
        else:
            del state[program]
            functions.close_numbers(mine, counter, t)
    language.program, language.programs = 0, 1
    assert memory[0] == 0, "the next launch starts from a counter that is not zero"
    return seen


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=70),
    heads=st.integers(1, 3),
    programs=st.integers(1, 40),
    seed=st.integers(0, 1000),
    own=st.floats(0, 1),
)
@example(lengths=[0], heads=1, programs=3, seed=0, own=0)
@example(lengths=[8] * 4, heads=1, programs=4, seed=0, own=1)
@example(lengths=[8] * 4, heads=1, programs=9, seed=0, own=0)
@example(lengths=[8] * 40, heads=1, programs=9, seed=0, own=0.5)
@example(lengths=[8] * 40, heads=1, programs=8, seed=0, own=1)
def test_drawn_numbers_cover_all_and_leave_zero(lengths, heads, programs, seed, own):
    """`own`: the share of all rounds in which programs do not draw."""
    expected = [(m, h, b) for b, n in enumerate(lengths) for m in range(-(-n // 8)) for h in range(heads)]
    assert sorted(draw_all(varlen(lengths, heads, 8, 1), programs, seed)) == sorted(expected)
    batch, seqlen = len(lengths), max(lengths)
    if seqlen:
        expected = list(itertools.product(range(-(-seqlen // 8)), range(heads), range(batch)))
        programs = min(programs, len(expected))
        static_rounds = max(1, int(own * (len(expected) // programs)))
        schedule = dense("DenseTiles", batch, heads, seqlen, 8, 1, static_rounds)
        assert sorted(draw_all(schedule, programs, seed)) == sorted(expected)


@pytest.mark.parametrize("window", ["full", "causal"])
def test_the_most_tiles_accepted_fit_in_32_bits(window):
    """As many tiles as launch.reasons lets through; 49981 heads come within one of 2^31 - 1."""

    def asked(batch):
        return question(64, seqlen_q=128, seqlen_k=2048, window=WINDOWS[window], batch=batch, num_heads=49981)

    low, high = 1, 2**31
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if launch.reasons(asked(middle)) else (middle, high)
    plan = launch.ForwardPlan(asked(low), forward_config(asked(low)))
    batch, heads, group = plan.numbers[0], plan.numbers[1], plan.numbers[GROUP]
    count = batch * heads
    assert count > 2**30 or low * 128 >= 2**29, "refused long before it must be"
    schedule = dense(plan.config.Schedule.__name__, batch, heads, 128, plan.config.tile_rows, group)
    last = list(tiles(schedule, range(count - 3, count)))
    assert len(last) == 3
    assert_end_stays(schedule, range(count, count + 2 * PROGRAMS))  # DeviceInt raises on overflow


def own_loads(costs, static_rounds, programs):
    """What the tiles that each program has without drawing cost it."""
    drawn = types.SimpleNamespace(dynamic=True)
    own = [itertools.islice(own_numbers(drawn, p, programs), static_rounds) for p in range(programs)]
    loads = [sum(costs[t] for t in mine if t < len(costs)) for mine in own]
    plain["schedule"].gl.program, plain["schedule"].gl.programs = 0, 1
    return loads


def makespan(costs, static_rounds, programs=PROGRAMS):
    """When the last program is done: each takes its own tiles, then the next when it is free."""
    free = own_loads(costs, static_rounds, programs)
    heapq.heapify(free)
    for cost in costs[static_rounds * programs :]:
        heapq.heappush(free, heapq.heappop(free) + cost)
    return max(free)


GRID = [(64, 32), (128, 16), (256, 8)]  # head_dim, heads: hidden size 2048
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)


@pytest.mark.parametrize("head_dim, heads", GRID)
@pytest.mark.parametrize("seqlen", SEQLENS)
def test_causal_tiles_are_shared_out_evenly(head_dim, heads, seqlen):
    """16k tokens, in key blocks plus one for what a tile costs besides: at most 6% over the ideal."""
    spec = question(
        head_dim, seqlen_q=seqlen, window=WINDOWS["causal"], batch=16384 // seqlen, num_heads=heads
    )
    plan = launch.ForwardPlan(spec, forward_config(spec))
    config = plan.config
    schedule = dense(
        config.Schedule.__name__, spec.batch, heads, seqlen, config.tile_rows, plan.numbers[GROUP]
    )
    mask = getattr(plain["mask"], config.Mask.__name__)(seqlen, seqlen, 0, 0)
    costs = []
    for m_block, _, _ in tiles(schedule, itertools.count()):
        start = DeviceInt(m_block * config.tile_rows)
        _, count, _, _ = mask.key_blocks(start, start + config.tile_rows, config.tile_n)
        costs.append(1 + int(count))
    assert getattr(real_schedules, config.Schedule.__name__).dynamic.value
    static_rounds = plan.numbers[GROUP + 1]
    assert (static_rounds > 10) == config.in_step, "otherwise `in_step` is nothing"
    assert makespan(costs, static_rounds) <= 1.06 * sum(costs) / PROGRAMS


def test_heads_of_one_group_fit_in_l2_together():
    """Tiles that run at the same time share keys: those of a group of heads, whose K and V fit in 32 MB."""
    spec = question(128, seqlen_q=16384, window=WINDOWS["causal"], batch=4, num_heads=16, dtype=torch.float16)
    plan = launch.ForwardPlan(spec, forward_config(spec))
    schedule = dense("DenseTiles", 4, 16, 16384, plan.config.tile_rows, plan.numbers[GROUP])
    order = [head + 16 * sequence for _, head, sequence in tiles(schedule, itertools.count())]
    group = 32 * 2**20 // (2 * 16384 * 256)
    per_group = group * 16384 // plan.config.tile_rows
    for i in range(0, len(order), per_group):
        assert len(set(order[i : i + per_group])) == group


def test_faults_are_noticed():
    """The checks above fail for schedules that lose, repeat or misplace tiles."""
    faults = {
        "size == self.group else self.last_magic": "size >= 0 else self.last_magic",
        "g * self.group + u - step * size": "u - step * size",
        "row - sequence * self.num_heads, sequence": "sequence, sequence",
        "programs - 1 - program)": "programs - program)",
    }
    for old, new in faults.items():
        functions = device_modules(mutations={old: new})
        broken = dense("DenseTiles", 3, 2, 29, 8, 4, functions=functions)
        with pytest.raises((AssertionError, ArithmeticError, IndexError)):
            assert_all_once(broken, 5, itertools.product(range(4), range(2), range(3)), functions)


@given(x=st.integers(0, 2**31 - 1), divisor=st.integers(1, 2**31 - 1))
@example(x=2**31 - 1, divisor=1)
@example(x=2**31 - 1, divisor=2**31 - 1)
@example(x=2**31 - 2, divisor=2**31 - 1)
@example(x=2**31 - 1, divisor=2**30 + 1)
def test_division_by_multiplication(x, divisor):
    divided = load(["device.division"], gluon_module(Language()))["tandem_attn.device.division"].divided
    near = (x, x // divisor * divisor, max(x // divisor * divisor - 1, 0))
    for number in near:
        assert divided(DeviceInt(number), Int64(division_magic(divisor))) == number // divisor


@given(
    lengths=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    rows=st.integers(1, 60),
    group=st.integers(1, 60),
    head_dim=st.sampled_from([64, 128]),
    programs=st.integers(1, 140),
)
def test_rounds_in_step_leave_enough_to_even_out(lengths, rows, group, head_dim, programs):
    """Costs are those of the tiles in their order; own rounds give nobody more than a fair share."""
    spec = question(head_dim, seqlen_q=lengths[0], seqlen_k=lengths[1], window=WINDOWS["causal"])
    config, group = forward_config(spec), min(group, rows)
    costs = balance.tile_costs(config, lengths, (2**30, 0), rows, group).tolist()
    schedule = dense("DenseTiles", 1, rows, lengths[0], config.tile_rows, group)
    mask = getattr(plain["mask"], config.Mask.__name__)(*lengths, 0, 0)
    assert len(costs) == -(-lengths[0] // config.tile_rows) * rows
    for cost, (m_block, _, _) in zip(costs, tiles(schedule, itertools.count()), strict=True):
        start = DeviceInt(m_block * config.tile_rows)
        count = mask.key_blocks(start, start + config.tile_rows, config.tile_n)[1]
        assert cost == count + balance.TILE_OVERHEAD
    rounds = balance.rounds_in_step(torch.tensor(costs, dtype=torch.float64), programs)
    assert rounds == 1 or rounds * programs <= len(costs)
    if rounds > 1:
        assert max(own_loads(costs, rounds, programs)) <= balance.OWN_SHARE * sum(costs) / programs
    best = max(sum(costs) / programs, max(costs))
    assert makespan(costs, rounds, programs) <= max(makespan(costs, 1, programs), best) + max(costs)


def test_too_many_tiles_are_not_counted():
    config = forward_config(question(64, window=WINDOWS["causal"]))
    assert balance.tile_costs(config, (2**20, 2**20), (2**30, 0), 2**10, 1) is None
    assert balance.rounds_in_step(None, 132) == 1
