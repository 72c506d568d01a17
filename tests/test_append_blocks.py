"""The kernels that write into an FP8 cache, as plain Python, against the reference: every bit.

As in `test_decode_grids.py` the kernel's own source is run, a program at a time, on the launch that its plan
asked for. Memory counts what is written.
"""

import dataclasses
import itertools
import math
import types

import numpy as np
import pytest
import torch
from test_decode_grids import Grid, Plain, assert_cuda_takes, launches, stand_in  # noqa: F401
from test_decode_work import device_work

import tandem_attn
from tandem_attn import reference_decode
from tandem_attn.kernels import launch_decode
from tandem_attn.kernels.append_blocks import BlocksPlan
from tandem_attn.spec_decode import Given
from tandem_attn.testing.compile_append import append_question
from tandem_attn.testing.decode_fp8_inputs import Fp8Case, assert_same_cache, e4m3, make_fp8, on_cpu
from tandem_attn.testing.decode_inputs import DecodeCase
from tandem_attn.testing.plain import Int64, Pointer, array

BF16, F16, F32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


class Counted(Pointer):
    """A tensor as wide numbers, and how often each was written."""

    dtype = types.SimpleNamespace(element_ty=None)

    def __init__(self, tensor: torch.Tensor):
        count = tensor.untyped_storage().nbytes() // tensor.itemsize - tensor.storage_offset()
        self.flat = torch.as_strided(tensor, (count,), (1,), tensor.storage_offset())
        wide = torch.float64 if tensor.is_floating_point() else torch.int64
        super().__init__(self.flat.to(wide).numpy())
        self.writes, self.again = np.zeros(count, int), True

    def __add__(self, offset):
        found = Pointer.__new__(Counted)
        vars(found).update(vars(self), offset=self.offset + offset)
        return found

    def keep(self) -> None:
        """Put what was written into the tensor, rounded to its type."""
        written = torch.from_numpy(self.writes > 0)
        values = torch.from_numpy(np.asarray(self.memory))[written]
        self.flat[written] = e4m3(values.float()) if self.flat.dtype == E4M3 else values.to(self.flat.dtype)


class Fp8Language(Grid):
    """`gl` with fp32 division and products, and stores that are counted."""

    def div_rn(self, x, y):
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return array(np.float32(x) / np.float32(y))

    def inline_asm_elementwise(self, asm, constraints, args, **rest):
        if asm.startswith("mul.rn.f32"):
            return array(np.float32(args[0]) * np.float32(args[1]))
        return super().inline_asm_elementwise(asm, constraints, args, **rest)

    def store(self, pointer, value, mask=True):
        where, wanted = pointer.at(mask)
        pointer.memory[where[wanted]] = np.broadcast_to(value, where.shape)[wanted]
        np.add.at(pointer.writes, where[wanted], 1)


def walk(launch, mutations=None) -> None:
    """Run every program of a launch, and keep what it wrote; each element is written at most once."""
    language = Fp8Language()
    modules = device_work(mutations, ("kernels.append_blocks",), stand_in(language))
    kernel = getattr(modules["append" if launch.name == "append_to_cache" else "append_blocks"], launch.name)
    counted = []

    def argument(x):
        if isinstance(x, torch.Tensor):
            counted.append(Counted(x))
            return counted[-1]
        if isinstance(x, tuple):
            return tuple(map(argument, x))
        if isinstance(x, int):
            return Int64(x) if x >= 2**31 else x
        return Plain(x)

    arguments = [argument(x) for x in launch.arguments]
    with np.errstate(invalid="ignore"):
        for language.place in itertools.product(*map(range, launch.grid)):
            kernel(*arguments)
    for one in counted:
        assert one.writes.max(initial=0) <= 1, "an element is written twice"
        one.keep()


def check(inputs, launches, mutations=None) -> None:  # noqa: F811
    """Kernel and reference leave the same cache and the same q."""
    expected, call = on_cpu(inputs), inputs.tensors | inputs.options
    spec = tandem_attn.explain_with_kvcache(**call).append.spec
    plan, results = launch_decode.append(spec), []
    assert isinstance(plan, BlocksPlan) == (inputs.tensors["k_descale"].dim() == 3)
    for run, of in ((plan, inputs.tensors), (reference_decode.append(spec), expected.tensors)):
        cache, new, rotary = Given(**of).parts()
        results.append(run(of["q"], of["k"], of["v"], cache, new, rotary))
    assert_cuda_takes(launches[-1].grid)
    walk(launches[-1], mutations)
    assert_same_cache(inputs.tensors, expected.tensors)
    if "rotary_cos" not in inputs.tensors:
        assert results[0] is inputs.tensors["q"]
        return
    for b, s in enumerate(inputs.sequences):
        mine = b if s.rows is None else s.rows
        assert torch.equal(results[0][mine], results[1][mine]), f"q of {b}"


def inputs_of(facts: dict, size: float = 1.0, seed: int = 0, **fp8):
    """Of a case, with new tokens of another size."""
    inputs = make_fp8(Fp8Case(DecodeCase(**dict(tokens=1, dtype=BF16) | facts), **fp8), seed=seed)
    for name in "kv":
        if inputs.tensors[name].dtype != E4M3:
            inputs.tensors[name].mul_(size)
    return inputs


CASES = {
    "a token": dict(new=1),
    "a few": dict(new=3, tokens=3, causal=True),
    "many": dict(new=150, capacity=300),
    "a block's first slot": dict(new=1, seqlens=(128, 127), capacity=256),
    "over a block's end": dict(new=4, seqlens=(125, 128), capacity=256),
    "many over ends": dict(new=140, seqlens=(120, 250), capacity=400),
    "nobody before": dict(new=1, seqlens=(0, 0)),
    "an int": dict(new=2, seqlens=9),
    "rows": dict(new=2, batch_idx=(3, 0)),
    "pages of one": dict(new=3, page_size=1),
    "pages": dict(new=1, page_size=16),
    "many in pages": dict(new=40, page_size=16, capacity=100),
    "pages of two blocks": dict(new=1, page_size=256, seqlens=(130, 128), capacity=256),
    "odd pages": dict(new=80, page_size=192, seqlens=(100, 191), capacity=400),
    "odd pages, few": dict(new=3, page_size=129, seqlens=(127, 128), capacity=258),
    "packed": dict(batch=4, seqlens=(20, 7, 0, 3), new=(3, 0, 5, 1), tokens=(1, 4, 0, 1)),
    "packed, few": dict(batch=4, seqlens=(20, 7, 0, 127), new=(0, 0, 0, 2), tokens=1, capacity=256),
    "packed in pages": dict(batch=3, seqlens=(20, 7, 0), new=(30, 0, 50), page_size=24, capacity=96),
    "packed in odd pages": dict(
        batch=3, seqlens=(120, 7, 190), new=(30, 1, 250), tokens=1, page_size=192, capacity=500
    ),
    "many sequences": dict(batch=40, seqlens=(3,) * 40, new=tuple(i % 3 for i in range(40)), tokens=1),
    "heads": dict(heads=70, kv_heads=35, head_dim=160, head_dim_v=24, new=2),
    "many of heads": dict(heads=6, kv_heads=3, head_dim=40, head_dim_v=72, new=9),
    "strided": dict(new=3, layout="strided"),
    "rotary": dict(new=2, tokens=2, rotary="halves", causal=True),
    "many rotary": dict(new=20, tokens=20, rotary="interleaved", rotary_dim=8, capacity=64),
    "padding": dict(new=2, leftpad=(4, 7)),
}  # fmt: skip


@pytest.mark.parametrize("size", [2.0**-6, 1.0, 1000.0], ids=["smaller", "alike", "larger"])
@pytest.mark.parametrize("each", ["block", "sequence"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_and_reference_agree_in_every_bit(launches, name, each, size):  # noqa: F811
    check(inputs_of(CASES[name], size, each=each), launches)


@pytest.mark.parametrize("each", ["block", "sequence"])
@pytest.mark.parametrize("name", ["a token", "many over ends", "packed in pages", "rotary"])
def test_float16(launches, name, each):  # noqa: F811
    check(inputs_of(CASES[name] | dict(dtype=F16), 30.0, each=each), launches)


@pytest.mark.parametrize("name", ["a token", "many", "packed"])
@pytest.mark.parametrize("fp8", [dict(), dict(each="sequence"), dict(each="sequence", fp8_new=True)], ids=str)
def test_fp8_queries(launches, name, fp8):  # noqa: F811
    check(inputs_of(CASES[name], 30.0, fp8_q=True, **fp8), launches)


@pytest.mark.parametrize("name", ["a few", "many over ends", "pages"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["k", "v_cache", "k_descale"])
def test_what_is_not_finite(launches, name, bad, where):  # noqa: F811
    """In new tokens, in what a block holds, and in its factors."""
    inputs = inputs_of(CASES[name])
    x = inputs.tensors[where]
    x.view(-1)[::7] = bad if x.dtype != E4M3 else math.nan
    check(inputs, launches)


def test_factors_of_any_size(launches):  # noqa: F811
    """No powers of two, some of which suffice."""
    for factor in (0.3, 1e-3, 7.0):
        inputs = inputs_of(dict(new=3))
        for name in "kv":
            x = inputs.tensors[f"{name}_descale"]
            x[~x.isnan()] = factor
        check(inputs, launches)


@pytest.mark.parametrize("lengths", [(13, 40), (16, -5), (15, 15)])
@pytest.mark.parametrize("page_size", [0, 8])
@pytest.mark.parametrize("each", ["block", "sequence"])
def test_tokens_without_room(launches, lengths, page_size, each):  # noqa: F811
    for new in (3, 9):
        inputs = inputs_of(dict(new=new, seqlens=(5, 6), page_size=page_size, capacity=16), each=each)
        if page_size:
            inputs.tensors["page_table"].clamp_(max=3)
        inputs.tensors["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
        check(inputs, launches)


GROWS = (dict(new=4, seqlens=(125, 128), capacity=256), 1000.0)
SHRINKS = (dict(new=1, seqlens=(128, 127), capacity=256), 2.0**-6)
ENDS = (dict(new=9, seqlens=(125, 20), capacity=130), 1.0)
# what is wrong: (a piece of the source, instead of it, (a case that shows it, size of new tokens))
MUTATIONS = {
    "unit": ("ratio = gl.div_rn(old, factor)", "ratio = gl.div_rn(factor, old)", GROWS),
    "never anew": ("stays = (first > start) & ", "stays = ", SHRINKS),
    "shrinks": ("gl.where(stays, old, factor)", "gl.where(stays, factor, factor)", (dict(new=1), 2.0**-6)),
    "one more": ("ratio, grown, origin, within,", "ratio, grown, origin, within + 1,", GROWS),
    "one less": ("ratio, grown, origin, within,", "ratio, grown, origin, within - 1,", GROWS),
    "V twice": ("of_v = block % 2", "of_v = block % 1", GROWS),
    "no room": ("gl.minimum(length + count, n[4])", "(length + count)", ENDS),
    "other factor": ("(origin // config.block)", "(origin * 0)", GROWS),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_wrong_is_noticed(launches, name):  # noqa: F811
    old, new, (facts, size) = MUTATIONS[name]
    check(inputs_of(facts, size), launches)
    with pytest.raises((AssertionError, IndexError)):
        check(inputs_of(facts, size), launches, {old: new})


@pytest.mark.parametrize("page_size", [0, 1, 16, 48, 128, 129, 192, 256, 300])
def test_grids_reach_every_block(page_size):
    """By hand: blocks of a page, and how many of them the tokens of a sequence can meet."""
    for new in (1, 2, 5, 127, 128, 129, 500):
        plan = launch_decode.append(append_question(cache="block", new=new, page_size=page_size or 0))
        most = 0
        room = page_size or 10**6
        for first in range(min(room, 400)):
            slots = range(first, first + new)
            most = max(most, len({(s // room, s % room // 128) for s in slots}))
        assert most <= plan.config.reach <= new
        assert plan.config.reach <= 2 * most + 2
        assert plan.grid == (2 * 8 * plan.config.reach * plan.config.blocks_kv, 1, 1)


def test_every_field_counts_for_the_cache_key():
    base = launch_decode.append(append_question(cache="block")).config
    assert "block=128" in repr(base) and base.cache_key != type(base)(**vars_of(base, block=64)).cache_key
    assert base.cache_key != type(base)(**vars_of(base, by_token=True)).cache_key


def vars_of(config, **changed) -> dict:
    """The fields of a config, some changed."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)} | changed
