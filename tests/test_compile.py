"""Every shipped kernel compiles for sm_90a without a GPU, on every supported Triton, as it should.

The installed Triton compiles all of testing/shipped.py: variants(), others the bf16 kernels. How, and what to
set: tests/compile_matrix.py.
"""

import functools
import os
import sys

import pytest
from compile_matrix import INSTALLED, SUPPORTED, Compiled, cases, why_missing

from tandem_attn.device.gluon import copies_operands
from tandem_attn.device.mask import NoMask
from tandem_attn.device.schedule import PlainTiles
from tandem_attn.device.sequence import Dense
from tandem_attn.kernels.config import SHARED_MEMORY, ForwardConfig
from tandem_attn.testing.compile import Report, named_barriers, report, unfenced_stores
from tandem_attn.testing.sass import ambiguous_descriptors, register_use, tight_loops
from tandem_attn.testing.shipped import Variant, distinct_variants, variants

# Bytes of spill stores and loads in a whole kernel: prologue and epilogue, a few microseconds in all.
MAX_SPILL = 256
MAX_SPILL_WITH_COPIES = 448  # device/gluon.py: copies_operands
MAX_SPILL_FP8 = 704
MAX_SPILL_PROMOTED = 3400  # where O is put aside, once in 64 blocks
MAX_SPILL_MEAN_WITH_COPIES = 1280  # head_dim 256, where V's mean is added; 0 at others
# Of the 400 to 670 instructions of an e4m3 loop: one ptxas lacks 1 to 3 registers, the others do not; all do
# where V's mean is added at the end.
MAX_LOOP_SPILL_FP8 = {"3.8.0": 5}
MAX_LOOP_SPILL_MEAN = 4
# Four consumers: sums of rows wait in local memory while there are scores, with some Tritons a little more.
MAX_LOOP_SPILL_OF_FOUR = {"3.7.1": 16, "3.8.0": 16}


@functools.cache
def variants_for(version: str) -> dict[str, Variant]:
    """What a Triton has to compile, by name: the installed one everything, the others distinct kernels."""
    made = variants() if version == INSTALLED else distinct_variants(copies_operands(version))
    return {v.name: v for v in made}


CASES = list(cases(variants_for))


@pytest.fixture(scope="session")
def reports(request, tmp_path_factory):
    """A function (version, name) -> Report."""
    compiled = Compiled(request, tmp_path_factory, "compile", ("sass", "shipped"))
    return lambda version, name: Report.from_json(compiled.report(version, name))


def products_per_block(config: ForwardConfig) -> int:
    """wgmma per key block: Q K^T in steps of 32 bytes of columns, P V in steps of as many keys for each chunk
    of V, and for the row sums where they are products."""
    step = 32 // config.element_bytes
    return config.head_dim // step + config.tile_n // step * (config.v_chunks + config.sum_by_wgmma)


def spills_allowed(variant: Variant, version: str) -> int:
    """Outside of tight loops: 128 registers of O beside 64 of S leave e4m3 no room where tiles meet."""
    if variant.config.promote:
        return MAX_SPILL_PROMOTED
    if variant.config.fp8:
        mean_and_copies = variant.adds_mean and copies_operands(version)
        return MAX_SPILL_MEAN_WITH_COPIES if mean_and_copies else MAX_SPILL_FP8
    return MAX_SPILL_WITH_COPIES if copies_operands(version) else MAX_SPILL


@pytest.mark.parametrize("version, name", CASES)
def test_compiles_within_the_limits(reports, version, name):
    made, variant = reports(version, name), variants_for(version)[name]
    config = variant.config
    assert not made.warnings
    assert made.spill_bytes <= spills_allowed(variant, version)
    assert config.shared_memory < made.shared_memory <= SHARED_MEMORY
    assert made.registers <= config.maxnreg
    for limit, used in made.register_use.items():
        assert used <= limit, "a warpgroup uses registers that it has given back"
    assert set(config.worker_registers) <= set(made.setmaxnreg), "registers are not handed over"
    assert made.ambiguous_descriptors == 0, "wgmma reads what a way that was not taken should have set"
    assert made.unfenced_stores == 0
    assert max(made.named_barriers) < 8, "Triton's barriers meet those of device/turn.py"


@pytest.mark.parametrize("version, name", CASES)
def test_loops_hold_what_they_should(reports, version, name):
    """One loop per consumer and kind of block; nothing in them that would slow every block down."""
    made, variant = reports(version, name), variants_for(version)[name]
    config, allowed = variant.config, 0
    if config.fp8:
        allowed = max(MAX_LOOP_SPILL_FP8.get(version, 0), MAX_LOOP_SPILL_MEAN * variant.adds_mean)
        if config.num_consumers == 4:
            allowed = max(allowed, MAX_LOOP_SPILL_OF_FOUR.get(version, 5))
    kinds = 1 + config.Mask.masks.value + config.Mask.has_left_edge.value  # whole, right edge, left edge
    assert len(made.tight_loops) == kinds * config.num_consumers
    for loop in made.tight_loops:
        assert loop["QGMMA" if config.fp8 else "HGMMA"] == products_per_block(config)
        assert loop["PRMT"] == 0, "P is repacked on every turn"
        assert loop["MUFU.EX2"] >= config.tile_n // 2  # one per score: 64 x tile_n by 128 threads
        assert loop["spill"] <= allowed


def test_continuous_integration_has_every_triton():
    """A version that is silently missing there would never be tested."""
    if os.environ.get("CI") != "true":
        pytest.skip("not CI")
    for version, oldest in SUPPORTED.items():
        if sys.version_info[:2] >= tuple(map(int, oldest.split("."))):
            assert not why_missing(version), f"Triton {version}: {why_missing(version)}"


def test_the_supported_versions_include_the_installed_one():
    assert INSTALLED in SUPPORTED, "add it to tools/tritons.txt"
    assert len(CASES) >= len(variants_for(INSTALLED)) + len(SUPPORTED) - 1


def test_a_kernel_that_wants_too_many_registers_is_noticed():
    """Q in registers besides three consumers: 160 registers do not hold it."""
    config = ForwardConfig(
        "bf16", 64, 64, NoMask, Dense, PlainTiles, num_consumers=3, q_in_registers=True, rescale_first=True
    )
    made = report(Variant(config).config)
    assert made.warnings or any(loop["spill"] for loop in made.tight_loops)


LISTING = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDL R2, [R1] ;
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0030*/              @!P0 BRA `(.L_x_9) ;
.L_x_2:
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
        /*0050*/                   MUFU.EX2 R5, R5 ;
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2], R3 ;
        /*0070*/              @!P1 BRA `(.L_x_8) ;
.L_x_3:
        /*0080*/               @P2 BRA `(.L_x_2) ;
        /*0090*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
        /*00a0*/               @P3 BRA `(.L_x_1) ;
        /*00b0*/                   EXIT ;
.L_x_8:
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2], R3 ;
        /*00d0*/              @!P1 BRA `(.L_x_8) ;
        /*00e0*/                   PRMT R1, R1, R1, R1 ;
        /*00f0*/                   BRA `(.L_x_3) ;
.L_x_9:
        /*0100*/                   BRA `(.L_x_1) ;
"""


def test_tight_loops_are_the_innermost_ones_with_products():
    """An outer loop, a loop in it whose wait goes on in a cold block far below, and a spin of its own."""
    (loop,) = tight_loops(LISTING)
    assert (loop["HGMMA"], loop["MUFU.EX2"], loop["PRMT"], loop["spill"]) == (1, 1, 1, 0)
    assert loop["length"] == 9
    spilled = LISTING.replace("MUFU.EX2 R5, R5", "STL [R1], R5")
    assert tight_loops(spilled)[0]["spill"] == 1
    assert tight_loops(LISTING.replace("@P2 BRA", "NOP")) != tight_loops(LISTING)


def test_registers_are_counted_under_each_limit():
    text = LISTING.replace("MUFU.EX2 R5, R5", "USETMAXREG.DEALLOC.CTAPOOL 0x18")
    assert register_use(text, 168) == {168: 25, 24: 25}  # R24 is the 25th
    text = text.replace("PRMT R1, R1, R1, R1", "LDG.E.128 R90, [R2]")
    assert register_use(text, 168) == {168: 25, 24: 94}


DESCRIPTORS = """
        /*0000*/                   UMOV UR4, URZ ;
        /*0010*/                   ULDC.64 UR6, c[0x0][0x210] ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/                   UIADD3.X UR5, UR9, UR8, URZ, UP0, !UPT ;
.L_x_0:
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0070*/                   EXIT ;
"""


def test_ambiguous_descriptors_are_counted():
    """Of the second product UR5, which one way sets, whether or not it was set before."""
    assert ambiguous_descriptors(DESCRIPTORS) == 1
    before = DESCRIPTORS.replace("UMOV UR4, URZ", "UIADD3.64 UR4, UR8, 0x2, URZ")
    assert ambiguous_descriptors(before) == 1
    written = "UIADD3.X UR5, UR9, UR8, URZ, UP0, !UPT"
    for instead, count in {
        "NOP": 0,
        "R2UR UR5, R2": 0,
        "@P1 UIADD3.X UR7, UP0, UR7, UR7": 2,
        "ULDC.64 UR6, c[0x0][0x218]": 2,
    }.items():
        assert ambiguous_descriptors(before.replace(written, instead)) == count


def test_unfenced_stores_are_counted():
    write = "\tst.shared.v4.b32 \t[%r1], {%r2, %r3, %r4, %r5};\n"
    fence = "\tfence.proxy.async.shared::cta;\n"
    store = "\t@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r1, %r2}], [%r3];\n"
    assert unfenced_stores(write + fence + store + store) == 0
    assert unfenced_stores(write + store) == 1
    assert unfenced_stores(fence + write + store) == 1
    assert unfenced_stores(write + fence + store + write + store) == 1


def test_named_barriers_leave_out_those_of_turns():
    ptx = (
        "bar.sync \t0, 128;\n barrier.sync \t1;\n bar.sync 8, 256;\n bar.arrive 9, 256;\n bar.sync 2, 128;\n"
    )
    assert named_barriers(ptx) == (0, 1, 2)
    assert named_barriers(ptx + "bar.sync 8, 128;") == (0, 1, 2)
