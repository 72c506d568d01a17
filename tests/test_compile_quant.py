"""The kernels that make FP8 compile for sm_90a without a GPU, on every supported Triton, as they should.

How, and what to set: tests/compile_matrix.py.
"""

import pytest
from compile_matrix import INSTALLED, Compiled, cases

from tandem_attn.testing.compile_quant import QuantReport, named_launches

FEW = (
    "128",
    "192x128",
    "256",
    "256_means",
    "128_means_fp16_packed",
    "128_rotated",
    "64_packed_used",
    "128_head",
    "128_pairs",
    "v_128",
    "v_80_packed",
)
# Bytes of spill stores and loads, of code without loops: a few registers of a limit under which one more
# program fits. Other Tritons take a few more.
SPILLS, SPILLS_OF_OTHERS = 96, 448
MEANS = ("mean_of_keys", "sum_values", "mean_of_values")
REGISTERS, SHARED_MEMORY = 64 * 1024, 228 * 1024  # of a multiprocessor; bytes
# Warps that are resident, in programs of 4 and of 8; and where tiles come by shared memory.
WARPS, WARPS_OF_WIDE = {4: 20, 8: 24}, 16


def names_for(version: str) -> list[str]:
    """What a Triton has to compile."""
    return [n for n in named_launches() if version == INSTALLED or n.split("/")[0] in FEW]


CASES = list(cases(names_for))


@pytest.fixture(scope="session")
def reports(request, tmp_path_factory):
    """A function (version, name) -> QuantReport."""
    compiled = Compiled(request, tmp_path_factory, "compile_quant", ("compile", "compile_decode", "sass"))
    return lambda version, name: QuantReport.from_json(compiled.report(version, name))


def _by_shared_memory(name: str) -> bool:
    """Whether tiles of heads are too wide for registers."""
    facts = named_launches()[name].numbers[-1]
    takes_tiles = name.endswith(("/quantize_tiles", "/measure"))
    return takes_tiles and max(facts.head_dim, facts.head_dim_v) > 128


@pytest.mark.parametrize("version, name", CASES)
def test_compiles_within_the_limits(reports, version, name):
    made, kind = reports(version, name), name.split("/")[1]
    known = 0 if version == INSTALLED else SPILLS
    if kind in ("quantize_tiles", "measure"):
        known = SPILLS if version == INSTALLED else SPILLS_OF_OTHERS
    assert made.spill_bytes <= known and made.stack_bytes <= known
    assert known or made.local == 0
    if not _by_shared_memory(name):
        assert made.shared_memory <= 32 * 1024


@pytest.mark.parametrize("version, name", CASES)
def test_stores_are_wide(reports, version, name):
    """Rows of q and k leave in pieces of 8 bytes, channels of V in 16; scales and lse_shift one by one."""
    made, kind = reports(version, name), name.split("/")[1]
    if kind == "transpose_keys":
        assert made.stores == ("128",)
    elif kind == "quantize_tiles":
        assert {"64", "128"} <= set(made.stores) <= {"64", "128", "32"}
    elif kind == "measure":
        assert made.stores == ()


@pytest.mark.parametrize("version, name", CASES)
def test_enough_warps_are_resident(reports, version, name):
    """Loads of some programs go on while others compute."""
    if name.endswith("/quantize_tiles"):
        launch, made = named_launches()[name], reports(version, name)
        in_eights = -(-made.registers // 8) * 8
        by_registers = REGISTERS // (in_eights * 32 * launch.options["num_warps"])
        by_memory = SHARED_MEMORY // (made.shared_memory + 1024)  # which each program is charged besides
        warps = launch.options["num_warps"]
        least = WARPS_OF_WIDE if _by_shared_memory(name) else WARPS[warps]
        assert launch.numbers[-1].resident * warps == least
        assert min(by_registers, by_memory) * warps >= least


def test_cases_hold_every_kernel():
    kinds = {name.split("/")[1] for name in named_launches()}
    assert kinds == {"quantize_tiles", "measure", *MEANS, "transpose_keys"}
