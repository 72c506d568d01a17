"""Grids of the launches over a cache: CUDA takes them, and they cover what is to be written exactly once.

A recorder stands in for compiled kernels. What it recorded in small is then run in full: the kernels' own
sources as plain Python, a program at a time, on memory that refuses to be written twice.
"""

import dataclasses
import functools
import itertools
import math
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode_reference import FEATURES
from test_decode_work import DecodeLanguage, device_work

import tandem_attn
from tandem_attn.kernels import append as append_module
from tandem_attn.kernels import launch_decode
from tandem_attn.spec_decode import Cache, Given, New
from tandem_attn.testing.budget import assert_within_budget
from tandem_attn.testing.decode_inputs import DecodeCase, assert_cache_right, make_decode, rotated
from tandem_attn.testing.plain import DeviceInt, Int64, Pointer, array, gluon_module
from tandem_attn.testing.shipped_decode import decode_question, plan_of

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
MOST_X, MOST_YZ = 2**31 - 1, 65_535  # programs in a dimension of a grid: CUDA C++ programming guide, 16.2
WAYS = ({}, dict(num_splits=256), dict(split_size=128))


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a plan asked a launcher for."""

    name: str
    grid: tuple[int, int, int]
    arguments: tuple


@pytest.fixture
def launches(monkeypatch):
    """Every launch from now on. Here alone tests know how plans come to their launchers."""
    made = []

    class Recorder:
        fast = True

        def __init__(self, kernel, arguments, options):
            self.name = kernel.fn.__name__

        def encode(self, addresses, tensors):
            return []

        def launch_flat(self, grid, stream, maps, tensors, rest):
            made.append(Launch(self.name, grid, (*maps, *tensors, *rest)))

    for module in (launch_decode, append_module):
        monkeypatch.setattr(module, "KernelLauncher", Recorder)
    for name in ("_cuda_getDevice", "_cuda_getCurrentRawStream"):
        monkeypatch.setattr(torch._C, name, lambda *_: 0, raising=False)
    return made


def assert_cuda_takes(grid: tuple[int, int, int]) -> None:
    assert len(grid) == 3 and all(type(n) is int and n > 0 for n in grid), grid
    assert grid[0] <= MOST_X and max(grid[1:]) <= MOST_YZ, grid


# Large grids, by numbers


def launch_decoding(spec):
    """The plan of a question, called with tensors that are not there."""
    plan = plan_of(spec)
    x = torch.empty(1, 8, 1, 64, dtype=BF16, device="meta")
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device="meta")
    plan(x, Cache(x, x, x, 0, None, None, None), New(x, x, 0), x, workspace, False)
    return plan


def rows_by_hand(tokens: int, group: int, packed: bool) -> tuple[int, int]:
    """(items of a sequence, rows of each that are kept)."""
    rows = tokens * group
    tile = 16 if rows <= 16 else 64 if rows <= 64 else 128
    return -(-rows // tile), min(rows, tile) if tokens <= 16 and not packed else tile


def check_decode_grids(plan, launches) -> None:
    """One launch of as many programs as the heuristic wants; one of all rows that are to be merged."""
    spec, config = plan.spec, plan.config
    kernels = [one.name.partition("_")[0] for one in launches]
    assert kernels == ["decode", "combine"][: 2 - config.merges]
    for one in launches:
        assert_cuda_takes(one.grid)
    assert launches[0].grid == (config.per_head * spec.num_kv_heads, 1, 1)
    if not config.merges:
        items, rows = rows_by_hand(spec.seqlen_q, spec.num_heads // spec.num_kv_heads, spec.packed_q)
        columns = next(width for width in (64, 128, 256) if width >= spec.head_dim_v)
        programs = rows if rows < 32 else -(-rows // 4)
        assert launches[1].grid[0] == spec.batch * items * programs * spec.num_kv_heads
        assert launches[1].grid[1] * config.combine_width == columns and launches[1].grid[2] == 1


@pytest.mark.parametrize("batch", [1, 300, 70_000])
@pytest.mark.parametrize("tokens, packed", [(1, False), (5, False), (5, True), (40, False)])
def test_decode_grids(launches, batch, tokens, packed):
    for way, head_dim_v, kv_heads in itertools.product(WAYS, (64, 128, 256), (1, 8)):
        launches.clear()
        shape = dict(num_heads=4 * kv_heads, num_kv_heads=kv_heads, head_dim_v=head_dim_v, capacity=4096)
        plan = launch_decoding(decode_question(batch, tokens, packed_q=packed, **shape, **way))
        check_decode_grids(plan, launches)
        assert "split_size" not in way or len(launches) == 2


def test_decode_grids_of_many_heads(launches):
    shape = dict(num_heads=70_000, num_kv_heads=70_000, head_dim=64, capacity=256)
    check_decode_grids(launch_decoding(decode_question(4, split_size=128, **shape)), launches)


@given(
    batch=st.integers(1, 2**20),
    tokens=st.integers(1, 2**17),
    heads=st.tuples(st.integers(1, 256), st.integers(1, 128)),
    head_dim_v=st.sampled_from((8, 64, 128, 256)),
    way=st.sampled_from(WAYS),
    packed=st.booleans(),
    capacity=st.integers(1, 2**20),
)
@settings(max_examples=200)
def test_partials_run_out_of_memory_before_grids_run_out_of_numbers(
    batch, tokens, heads, head_dim_v, way, packed, capacity
):
    """Rows to be merged have room of their own, 256 bytes at least: 2**31 of them are 512 GB."""
    kv_heads, group = heads
    shape = dict(num_heads=kv_heads * group, num_kv_heads=kv_heads, head_dim_v=head_dim_v)
    plan = plan_of(decode_question(batch, tokens, packed_q=packed, capacity=capacity, **shape, **way))
    items, rows = rows_by_hand(tokens, group, packed)
    programs = batch * items * rows * kv_heads
    assert plan.programs <= MOST_YZ
    assert plan.config.merges or programs <= MOST_X or plan.workspace_bytes >= 2**39


def launch_append(tensors: dict, **options):
    """The plan for what a call writes first, called with these tensors; its result."""
    spec = tandem_attn.explain_with_kvcache(**tensors, **options).append.spec
    given = Given(**tensors)
    cache, new, rotary = given.parts()
    plan = append_module.AppendPlan(spec)
    return plan, plan(given.q, given.k, given.v, cache, new, rotary)


@pytest.mark.parametrize("batch, each", [(1, 1), (1, 70_000), (300, 7), (70_000, 2)])
@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (72, 3), (70_000, 70_000)])
@pytest.mark.parametrize("rotary", [False, True])
def test_append_grids(launches, batch, each, heads, kv_heads, rotary):
    """Packed tokens and queries; rows that belong to nobody are rows too."""
    for head_dim, head_dim_v in ((64, 64), (128, 64), (128, 256), (8, 24)):
        rows_q, rows_new, launches[:] = batch * each + 1, batch * each + 2, []

        def meta(*shape, dtype=BF16):
            return torch.empty(shape, dtype=dtype, device="meta")

        starts, tables = meta(batch + 1, dtype=torch.int32), [meta(each, head_dim // 2) for _ in range(2)]
        plan, out = launch_append(
            dict(
                q=meta(rows_q, heads, head_dim), k_cache=meta(batch, each, kv_heads, head_dim),
                v_cache=meta(batch, each, kv_heads, head_dim_v), k=meta(rows_new, kv_heads, head_dim),
                v=meta(rows_new, kv_heads, head_dim_v), cache_seqlens=starts[1:], cu_seqlens_q=starts,
                cu_seqlens_k_new=starts, max_seqlen_q=each,
            )
            | (dict(rotary_cos=tables[0], rotary_sin=tables[1]) if rotary else {})
        )  # fmt: skip
        assert out.shape == (rows_q, heads, head_dim)
        (launch,) = launches
        assert_cuda_takes(launch.grid)
        of_q = rows_q if rotary else 0
        most, at_once = max(heads if rotary else 0, kv_heads), plan.config.heads_at_once
        assert launch.name == "append_to_cache" and launch.grid[0] == of_q + rows_new
        assert (launch.grid[1] - 1) * at_once < most <= launch.grid[1] * at_once and launch.grid[2] == 1


# Small grids, every program


class Grid(DecodeLanguage):
    """`gl` in the program of a grid that is at `place`."""

    place = (0, 0, 0)

    def program_id(self, axis):
        return DeviceInt(self.place[axis])


class Memory(Pointer):
    """What a kernel gets for a tensor."""

    dtype = types.SimpleNamespace(element_ty=None)


class Plain:
    """A config as plain Python reads it."""

    def __init__(self, config, **instead):
        self.static, self._config = self, config
        vars(self).update(instead)

    def __getattr__(self, name: str):
        return getattr(self._config, name)


def merged_columns(results, parts, r, keep, start, width, layout, config):
    """For what partials would give: a number that tells row, KV head and column."""
    rows = [config.num_kv_heads * int(row) + int(results.kv_head) for row in r]
    columns = array([[row * 1024.0 + start + i for i in range(width)] for row in rows])
    return columns, array([float(row) for row in rows])


def stand_in(language):
    """For device/gluon.py, with what these kernels' files import."""
    unused = ("async_copy", "async_load", "mma_v2", "reinterpreted", "thread_barrier", "COPIES_OPERANDS")
    unused = dict.fromkeys(unused, None)
    return gluon_module(language, gdc_wait=lambda: None, gdc_launch_dependents=lambda: None, **unused)


@functools.cache
def in_plain_python() -> tuple[Grid, dict]:
    """(the language, the modules of the kernels)."""
    language = Grid()
    modules = device_work(None, ("kernels.append", "kernels.combine"), stand_in(language))
    modules["partials"].merged_columns = merged_columns
    return language, modules


def argument(x):
    """What a kernel gets for x."""
    if isinstance(x, torch.Tensor):
        count = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
        return Memory(torch.as_strided(x, (count,), (1,), x.storage_offset()).numpy())
    if isinstance(x, tuple):
        return tuple(argument(y) for y in x)
    if dataclasses.is_dataclass(x):
        splits = getattr(x, "Splits", None)
        instead = dict(Splits=getattr(in_plain_python()[1]["splits"], splits.__name__)) if splits else {}
        return Plain(x, **instead)
    return Int64(x) if type(x) is int and x >= 2**31 else x


def walk(launch: Launch) -> None:
    """Run every program of a launch on the tensors it was given."""
    language, modules = in_plain_python()
    kernel = getattr(modules[launch.name.partition("_")[0]], launch.name)
    arguments = argument(launch.arguments)
    for language.place in itertools.product(*map(range, launch.grid)):
        kernel(*arguments)


def in_parts(**facts) -> DecodeCase:
    """A case whose sequences, most of them, are cut."""
    base = dict(batch=3, heads=6, kv_heads=2, head_dim=16, capacity=520, seqlens=(513, 0, 100), tokens=1)
    return DecodeCase(**base | dict(dtype=F32, split_size=128) | facts)


def launch_combining(case: DecodeCase, launches) -> tuple:
    """(plan, out, lse, launch of the second kernel) of a call on a CPU; nothing is written yet."""
    inputs = make_decode(case)
    spec = tandem_attn.explain_with_kvcache(**inputs.tensors, **inputs.options).spec
    cache, new, _ = Given(**inputs.tensors).parts()
    plan = plan_of(spec)
    out = torch.full(spec.out_shape, torch.nan)
    workspace = torch.full((plan.workspace_bytes,), 255, dtype=torch.uint8)  # as float32: NaN
    plan(inputs.tensors["q"], cache, new, out, workspace, False)
    check_decode_grids(plan, launches)
    count = spec.total_q * spec.num_heads
    return plan, out, launches[1].arguments[1][:count].view(spec.lse_shape), launches[1]


def check_combined(case: DecodeCase, plan, out, lse) -> None:
    """Every row of an item in several parts has what its own program wrote; no other row has anything."""
    kv_heads, group = case.kv_heads, case.heads // case.kv_heads
    out = out.view(-1, case.heads, case.dim_v)
    lse = lse.mT.reshape(out.shape[:2])
    wanted, wanted_lse = torch.full_like(out, torch.nan), torch.full_like(lse, torch.nan)
    first = 0
    for tokens, length in zip(case.each("tokens"), case.each("seqlens"), strict=True):
        count = tokens if length > (case.split_size or plan.config.tile_n) else 0
        for token, head in itertools.product(range(count), range(case.heads)):
            row = (token * group + head % group) % plan.config.tile_m * kv_heads + head // group
            wanted[first + token, head] = row * 1024.0 + torch.arange(case.dim_v)
            wanted_lse[first + token, head] = row * math.log(2.0)
        first += tokens
    assert not wanted.isnan().all()
    torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(lse, wanted_lse, equal_nan=True)


COMBINED = [
    in_parts(),
    in_parts(tokens=5),
    in_parts(tokens=40, heads=8, seqlens=(129, 128, 0)),
    in_parts(batch=4, tokens=(3, 0, 1, 6), seqlens=(300, 513, 129, 520)),
    in_parts(batch=4, tokens=(30, 0, 1, 50), seqlens=(300, 513, 129, 0), heads=4, kv_heads=1),
    in_parts(head_dim_v=200, heads=2, kv_heads=1),
    in_parts(head_dim_v=256, heads=16, kv_heads=1, split_size=None, num_splits=256),
    in_parts(head_dim=256, head_dim_v=104, kv_heads=3, split_size=None, num_splits=100, heads=48),
    in_parts(batch=40, seqlens=(200,) * 39 + (3,), capacity=200, heads=2, kv_heads=2),
]


@pytest.mark.parametrize("case", COMBINED, ids=lambda case: case.id)
def test_the_second_kernel_writes_each_row_once(launches, case):
    plan, out, lse, launch = launch_combining(case, launches)
    walk(launch)
    check_combined(case, plan, out, lse)


APPENDED = {
    **{name: facts for name, facts in FEATURES.items() if facts.get("new") or facts.get("rotary")},
    "many heads": dict(heads=70, kv_heads=35, head_dim=160, head_dim_v=24, new=2, tokens=2, rotary="halves"),
    "pages": dict(new=3, tokens=3, causal=True, page_size=8, rotary="interleaved"),
    "packed, in pages": dict(batch=3, seqlens=(20, 7, 0), new=(3, 0, 5), tokens=(1, 4, 0), page_size=4),
    "strided": dict(new=3, tokens=3, causal=True, rotary="halves", layout="strided"),
    "many sequences": dict(batch=40, seqlens=(3,) * 40, new=tuple(i % 3 for i in range(40)), tokens=1),
}


def check_appended(case: DecodeCase, inputs, q) -> None:
    """The cache, and q: rotated in memory of its own, or as it was."""
    assert_cache_right(case, inputs)
    if not case.rotary:
        assert q is inputs.tensors["q"]
        return
    firsts = case.rotary_seqlens or case.each("seqlens")
    for b, s in enumerate(inputs.sequences):
        positions = firsts[b] + torch.arange(len(s.q)) * (case.bounds != (-1, -1))
        exact, low = (rotated(case, inputs, s.q, positions, kind) for kind in (F64, F32))
        assert_within_budget(q[b] if s.rows is None else q[s.rows], exact, low, f"q of {b}")


@pytest.mark.parametrize("name", APPENDED)
def test_the_append_kernel_writes_each_token_and_head_once(launches, name):
    case = DecodeCase(dtype=F32, **APPENDED[name])
    inputs = make_decode(case)
    _, q = launch_append(inputs.tensors, **inputs.options)
    (launch,) = launches
    assert_cache_right(case, inputs, written=False)
    walk(launch)
    check_appended(case, inputs, q)


CHANGES = {
    "swapped": lambda x, y, z: (y, x, z),
    "a row less": lambda x, y, z: (x - 1, y, z),
    "a block less": lambda x, y, z: (x, y - 1, z),
    "twice": lambda x, y, z: (x, y, 2),
    "a row more": lambda x, y, z: (x + 1, y, z),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_grids_are_noticed(launches, change):
    def check(launch, check, *arguments):
        walk(dataclasses.replace(launch, grid=CHANGES[change](*launch.grid)))
        check(*arguments)

    case = in_parts(head_dim_v=256, heads=16, kv_heads=1, split_size=None, num_splits=256)
    plan, out, lse, launch = launch_combining(case, launches)
    with pytest.raises((AssertionError, IndexError)):
        check(launch, check_combined, case, plan, out, lse)
    if change != "a row more":  # no harm in appending
        case = DecodeCase(dtype=F32, **APPENDED["many heads"])
        inputs = make_decode(case)
        _, q = launch_append(inputs.tensors, **inputs.options)
        with pytest.raises((AssertionError, IndexError)):
            check(launches[-1], check_appended, case, inputs, q)
