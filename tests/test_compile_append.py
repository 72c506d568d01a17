"""The append kernels compile for sm_90a without a GPU, on every supported Triton, as they should.

How, and what to set: tests/compile_matrix.py.
"""

import pytest
from compile_matrix import INSTALLED, Compiled, cases

from tandem_attn.testing.compile_append import QUESTIONS, AppendReport, append_question

FEW = ("usual", "sequences_rotary", "blocks", "blocks_of_80x48", "blocks_many", "blocks_packed")


def names_for(version: str) -> tuple[str, ...]:
    """What a Triton has to compile."""
    return tuple(QUESTIONS) if version == INSTALLED else FEW


CASES = list(cases(names_for))


@pytest.fixture(scope="session")
def reports(request, tmp_path_factory):
    """A function (version, name) -> AppendReport."""
    compiled = Compiled(request, tmp_path_factory, "compile_append", ("compile", "compile_decode"))
    return lambda version, name: AppendReport.from_json(compiled.report(version, name))


@pytest.mark.parametrize("version, name", CASES)
def test_compiles_within_the_limits(reports, version, name):
    """A few programs find room on a multiprocessor, and none waits for registers."""
    made = reports(version, name)
    assert made.spill_bytes == 0 and made.registers <= 168 and made.shared_memory <= 1024


@pytest.mark.parametrize("version, name", CASES)
def test_rotation_rounds_as_the_reference_does(reports, version, name):
    """Products by themselves: then an FP8 cache is the same in every bit."""
    assert reports(version, name).fused == 0


@pytest.mark.parametrize("version, name", CASES)
def test_numbers_are_quantized_by_instructions(reports, version, name):
    spec = append_question(**QUESTIONS[name])
    assert (reports(version, name).conversions > 0) >= spec.quantizes


@pytest.mark.parametrize("version, name", CASES)
def test_stores_are_wide(reports, version, name):
    """8 neighbouring columns of a thread, 16 or 8 bytes."""
    assert reports(version, name).wide_stores > 0
