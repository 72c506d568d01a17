"""Decode and combine kernels compile for sm_90a without a GPU, on every supported Triton, as they should.

The installed Triton compiles all of testing/shipped_decode.py, others those of its FEW questions. How, and
what to set: tests/compile_matrix.py.
"""

import dataclasses
import functools
import re

import pytest
import torch
from compile_matrix import INSTALLED, SUPPORTED, Compiled, cases

from tandem_attn.device.cache_numbers import E4m3Numbers
from tandem_attn.device.decode_groups import GroupRows
from tandem_attn.device.decode_rows import WarpKeys, WarpRows
from tandem_attn.device.kv_tiles import GatheredTiles, LoadedTiles
from tandem_attn.device.splits import CountedSplits, SharedSplits, SizedSplits
from tandem_attn.kernels.config import SHARED_MEMORY
from tandem_attn.kernels.config_decode import DecodeConfig
from tandem_attn.testing.compile_decode import DecodeReport, decode_source, products
from tandem_attn.testing.shipped_decode import (
    FEW,
    QUESTIONS,
    DecodeVariant,
    decode_question,
    decode_variants,
    plan_of,
)

OTHERS = 1024  # bytes of shared memory besides tiles: barriers, and what reductions across warps need
SYSTEM = 1024  # bytes that every resident program takes besides its own
MULTIPROCESSOR = 228 * 1024
REGISTERS = 64 * 1024  # of a multiprocessor

# (bytes of spill stores and loads that are known, why)
SPILLS = {
    "64": (48, "Triton 3.7.1, which takes 128 registers where others take 141"),
    "128_rows_of_256": (1024, "128 registers of O and 64 of Q, of 232 that a consumer has"),
    "fp8_256": (48, "2 warps: 128 registers of O, tiles and what they are unpacked to"),
    "fp8_256_masks": (96, "as fp8_256"),
    "fp8_page_64_of_256": (48, "as fp8_256"),
    "fp8_32_rows": (160, "64 registers of O twice, and 32 of unpacked keys at a time"),
    "fp8_128_rows_of_256": (400, "128 registers of O and 64 of Q, of 216 that a consumer has"),
    "fp8_128_rows_page_16": (256, "Triton 3.9, which copies P in front of wgmma"),
    "128x256": (160, "2 warps: 128 registers of O, Q and both strides; no model has such heads"),
}
# instructions in loops over tiles; else none
SPILLS_OF_TILES = {("3.9.0", "128_rows_of_256"): 1, ("3.9.0", "fp8_128_rows_page_16"): 8}


@functools.cache
def variants_for(version: str) -> dict[str, DecodeVariant]:
    """What a Triton has to compile, by name."""
    made = decode_variants() if version == INSTALLED else decode_variants(FEW)
    return {v.name: v for v in made}


CASES = list(cases(variants_for))


@pytest.fixture(scope="session")
def reports(request, tmp_path_factory):
    """A function (version, name) -> DecodeReport."""
    sources = ("compile", "sass", "shipped_decode")
    compiled = Compiled(request, tmp_path_factory, "compile_decode", sources)
    return lambda version, name: DecodeReport.from_json(compiled.report(version, name))


@pytest.mark.parametrize("version, name", CASES)
def test_compiles_within_the_limits(reports, version, name):
    made, variant = reports(version, name), variants_for(version)[name]
    known, _ = SPILLS.get(name, (0, ""))
    assert made.spill_bytes <= known
    assert made.stack_bytes <= known
    assert made.spills_of_tiles == SPILLS_OF_TILES.get((version, name), 0)
    assert not made.warnings
    assert made.ambiguous_descriptors == 0
    if variant.combines:
        assert made.shared_memory <= 8 * 1024
    else:
        config = variant.config
        assert config.shared_memory <= made.shared_memory <= min(config.shared_memory + OTHERS, SHARED_MEMORY)


@pytest.mark.parametrize("version, name", CASES)
def test_products_are_those_of_a_tile(reports, version, name):
    """Neither unrolled, nor done twice for tiles with and without a mask."""
    made, variant = reports(version, name), variants_for(version)[name]
    expected = (0, 0) if variant.combines else products(variant.config)
    assert (made.hmma, made.hgmma) == expected


@pytest.mark.parametrize("version, name", CASES)
def test_residents_fit(reports, version, name):
    """As many programs of a multiprocessor as the launch counts on."""
    made, variant = reports(version, name), variants_for(version)[name]
    residents = variant.config.residents
    if not variant.combines:
        assert residents * (made.shared_memory + SYSTEM) <= MULTIPROCESSOR
        in_eights = -(-made.registers // 8) * 8
        assert residents * in_eights * 32 * variant.config.num_warps <= REGISTERS


def test_cases_hold_every_kind():
    """Rows, pages, splits, elements, widths and flags, each of them in some variant."""
    configs = [v.config for v in decode_variants()]
    kinds = {(c.RowKind, c.Tiles, c.tile_m, c.head_dim) for c in configs if c.head_dim == c.head_dim_v}
    for width in (64, 128, 256):
        assert (WarpKeys, LoadedTiles, 16, width) in kinds
        assert (WarpKeys, GatheredTiles, 16, width) in kinds
        assert (GroupRows if width == 64 else WarpRows, LoadedTiles, 64, width) in kinds
        assert (GroupRows, LoadedTiles, 128, width) in kinds
        assert {(16, width), (64, width)} <= {(c.tile_m, c.head_dim) for c in configs if c.scaled}
    assert {c.Splits for c in configs} == {SharedSplits, CountedSplits, SizedSplits}
    assert {(c.Tiles, c.element) for c in configs} == {
        (t, e) for t in (LoadedTiles, GatheredTiles) for e in ("bf16", "fp16")
    }
    for field in dataclasses.fields(DecodeConfig):
        values = {getattr(c, field.name) for c in configs}
        assert len(values) > 1, f"{field.name} is {values} everywhere"
    assert {v.combines for v in decode_variants(FEW)} == {False, True}


def test_every_variant_is_another_kernel():
    """Two kernels with one key in Triton's disk cache: the first one compiled is used for both."""
    variants = decode_variants()
    assert len({v.name for v in variants}) == len(variants)
    keys = [decode_source(v).hash() for v in variants]
    assert len(set(keys)) == len(keys)
    assert set(FEW) <= set(QUESTIONS)


def test_the_supported_versions_are_compiled():
    assert len(CASES) >= len(variants_for(INSTALLED)) + len(SUPPORTED) - 1


# Values that differ from those of the usual question, with what else they take.
OTHER_VALUES = {
    "element": "fp16",
    "head_dim": 64,
    "head_dim_v": 64,
    "RowKind": (WarpRows, dict(tile_m=64)),
    "Tiles": GatheredTiles,
    "Splits": SizedSplits,
    "tile_m": (128, dict(RowKind=WarpRows, num_warps=8)),
    "num_warps": 2,
    "tile_n": 128,
    "heads": (4, 8),
    "dims": (120, 128),
    "Numbers": (E4m3Numbers, dict(element="fp16")),
}


@pytest.mark.parametrize("field", dataclasses.fields(DecodeConfig), ids=lambda f: f.name)
def test_every_field_counts_for_the_cache_key(field):
    """Also those that the text for people leaves out."""
    base = plan_of(decode_question()).config
    was = getattr(base, field.name)
    value, rest = OTHER_VALUES.get(field.name), {}
    if value is None:
        value = not was if isinstance(was, bool) else was * 2 if was else 32
    if isinstance(value, tuple) and isinstance(value[1], dict):
        value, rest = value
    base = dataclasses.replace(base, **rest) if field.name not in ("RowKind", "tile_m") else base
    changed = dataclasses.replace(base, **{field.name: value}, **rest)
    assert getattr(changed, field.name) != getattr(base, field.name)
    assert changed.cache_key != base.cache_key
    assert repr(changed) != repr(base), "the key of the cache in memory"


def test_policies_carry_a_digest():
    """A class is keyed by its name: device/gluon.py puts the sources of its methods into that."""
    for config in (v.config for v in decode_variants()):
        for cls in (config.RowKind, config.Tiles, config.Splits):
            assert re.fullmatch(r"\w+@[0-9a-f]{8}", cls.__qualname__), f"{cls.__name__} is not a @policy"
            assert cls.__qualname__ in config.cache_key


def test_arguments_are_typed_as_a_launch_would():
    """1 is compiled in, multiples of 16 are known to be."""
    spec = decode_question(batch=1, dtype=torch.float16, page_size=1)
    source = decode_source(DecodeVariant("", spec, plan_of(spec).config))
    names = list(source.signature)
    numbers = names.index("numbers")
    assert source.signature["k"] == "*fp16"
    assert [source.constants.get((numbers, i)) for i in range(8)] == [None, 1, 1, None, None, None, 1, 1]
    assert source.attrs[(numbers, 3)] == [["tt.divisibility", 16]]
    assert source.signature["scales"] == ("fp32", "fp32")
