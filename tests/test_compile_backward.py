"""Backward kernels compile for sm_90a without a GPU, on every supported Triton, as they should.

The installed Triton compiles all of testing/shipped_backward.py: variants(), others distinct kernels. How,
and what to set: tests/compile_matrix.py.
"""

import functools

import pytest
from compile_matrix import INSTALLED, SUPPORTED, Compiled, cases

from tandem_attn.device.gluon import copies_operands
from tandem_attn.kernels.backward_rows import SUMMED_ROWS
from tandem_attn.kernels.config import SHARED_MEMORY
from tandem_attn.kernels.config_backward import BackwardConfig, KeyGradientConfig, QueryGradientConfig
from tandem_attn.testing.compile_backward import (
    BackwardReport,
    accesses,
    backward_source,
    expected_loops,
    unfenced_arrivals,
)
from tandem_attn.testing.shipped_backward import Variant, distinct_variants, variants

# Bytes of spill stores and loads in a whole kernel, none of them in a loop.
MAX_SPILL = 64
MAX_SPILL_WITH_SOFTCAP = 128


@functools.cache
def variants_for(version: str) -> dict[str, Variant]:
    """What a Triton has to compile, by name: the installed one everything, the others distinct kernels."""
    chosen = variants if version == INSTALLED else distinct_variants
    made = chosen(copies_operands(version))
    return {v.name: v for v in made}


def cases_of(chosen) -> list:
    """Cases of the variants that `chosen` lets through."""
    return list(cases(lambda version: [name for name, v in variants_for(version).items() if chosen(v)]))


def is_main(variant: Variant) -> bool:
    return not variant.of_rows


@pytest.fixture(scope="session")
def reports(request, tmp_path_factory):
    """A function (version, name) -> BackwardReport."""
    sources = ("compile", "sass", "shipped", "shipped_backward")
    compiled = Compiled(request, tmp_path_factory, "compile_backward", sources)
    return lambda version, name: BackwardReport.from_json(compiled.report(version, name))


@pytest.mark.parametrize("version, name", cases_of(is_main))
def test_compiles_within_the_limits(reports, version, name):
    made, config = reports(version, name), variants_for(version)[name].config
    assert not made.warnings
    assert made.spill_bytes <= (MAX_SPILL_WITH_SOFTCAP if config.softcap else MAX_SPILL)
    assert config.shared_memory < made.shared_memory <= SHARED_MEMORY == 232448
    assert made.registers <= config.maxnreg
    for limit, used in made.register_use.items():
        assert used <= limit, "a warpgroup uses registers that it has given back"
    assert set(config.worker_registers) <= set(made.setmaxnreg), "registers are not handed over"


@pytest.mark.parametrize("version, name", cases_of(is_main))
def test_what_other_proxies_read_is_fenced(reports, version, name):
    """Before TMA stores, and before others are told that wgmma or TMA may read what is written."""
    made = reports(version, name)
    assert made.unfenced_stores == 0
    if not isinstance(variants_for(version)[name].config, KeyGradientConfig):  # P goes to ordinary loads
        assert made.unfenced_arrivals == 0


@pytest.mark.parametrize("version, name", cases_of(is_main))
def test_loops_hold_what_they_should(reports, version, name):
    """One per consumer and kind of block, and nothing in them that would slow every block down."""
    made, config = reports(version, name), variants_for(version)[name].config
    steps = 2 if config.softcap else 1  # tanh takes an exponential
    expected = {(hgmma, steps * ex2): n for (hgmma, ex2), n in expected_loops(config).items()}
    found: dict[tuple[int, int], int] = {}
    for loop in made.tight_loops:
        kind = loop["HGMMA"], loop["MUFU.EX2"]
        found[kind] = found.get(kind, 0) + 1
        assert loop["spill"] == 0
        takes_p = isinstance(config, KeyGradientConfig) and kind[1] == 0
        unpacked = config.tile_m * config.tile_n // 128 // 2 if takes_p and config.element == "bf16" else 0
        assert loop["PRMT"] <= unpacked, "P or dS is repacked on every turn"
    assert found == expected


def is_of_rows(variant: Variant) -> bool:
    return bool(variant.of_rows)


@pytest.mark.parametrize("version, name", cases_of(is_of_rows))
def test_rows_are_read_and_written_16_bytes_at_a_time(reports, version, name):
    """Lengths and numbers of a row are single; columns of Q, dO, dQ and its accumulator come in vectors."""
    made, variant = reports(version, name), variants_for(version)[name]
    config, narrow = variant.config, {kind for kind in made.accesses if kind.endswith(("16", "8"))}
    threads, rows = 128, 64
    if variant.of_rows == "prepare_rows":
        vectors = rows * config.row_columns_v // 8 // threads
        loads, stores = 2 * vectors, vectors * ("clean_ptr" in variant.given)
    elif variant.of_rows == "finish_rows":
        loads, stores = (rows * config.head_dim // n // threads for n in (4, 8))
    elif variant.of_rows == "sum_parts":
        columns = SUMMED_ROWS.value * (config.row_columns + config.row_columns_v)
        loads, stores = (columns // n // threads for n in (4, 8))
    else:
        loads, stores = 0, 1024 // 8 // threads
    assert (made.accesses.get("ld.v4.b32", 0), made.accesses.get("st.v4.b32", 0)) == (loads, stores)
    assert not narrow, made.accesses


@pytest.mark.parametrize("version, name", cases_of(is_of_rows))
def test_kernels_of_rows_fit(reports, version, name):
    made = reports(version, name)
    assert not made.warnings and not made.spill_bytes
    assert made.registers <= 255
    assert made.shared_memory <= 16 * 1024


def test_variants_hold_every_kind():
    """Shapes, masks, sequences, elements and flags, each of them in some variant."""
    made = [v for v in variants() if is_main(v)]
    tiles = {(v.config.head_dim, v.config.head_dim_v, v.config.gradients) for v in made}
    shapes = [(d, dv) for d in (192, 256) for dv in (64, 128, 192, 256) if dv <= d]
    wide = {(*shape, gradients) for shape in shapes for gradients in ("kv", "q")}
    assert tiles == {(64, 64, "qkv"), (128, 128, "qkv"), *wide}
    for cls in (BackwardConfig, KeyGradientConfig, QueryGradientConfig):
        configs = [v.config for v in made if isinstance(v.config, cls)]
        assert {c.element for c in configs} == {"bf16", "fp16"} and {c.softcap for c in configs} == {0, 1}
        kinds = {(c.Mask.__name__, c.Sequences.__name__) for c in configs}
        assert len(kinds) == 7, "4 masks by 2 kinds of sequences, but no packed ones without a mask"
    ordered = [v.config for v in made if getattr(v.config, "ordered", False)]
    assert len({(c.head_dim, c.Mask) for c in ordered}) == 8
    rows = {(v.of_rows, v.config.head_dim_v) for v in variants() if is_of_rows(v)}
    assert {("prepare_rows", d) for d in (64, 128, 192, 256)} <= rows
    assert {("finish_rows", d) for d in (64, 128)} <= rows
    assert {v.name for v in distinct_variants()} <= {v.name for v in variants()}


def test_every_variant_is_another_kernel():
    """Two kernels with one key in Triton's disk cache: the first one compiled is used for both."""
    made = variants()
    assert len({v.name for v in made}) == len(made)
    keys = [backward_source(v).hash() for v in made]
    assert len(set(keys)) == len(keys)


def test_the_supported_versions_are_compiled():
    compiled = {case.values[0] for case in cases_of(is_main)}
    assert compiled == set(SUPPORTED)


WRITE = "\tst.shared.v4.b32 \t[%r1], {%r2, %r3, %r4, %r5};\n"
MATRIX = "\tstmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1777], {%r1, %r2, %r3, %r4};\n"
FENCE = "\tfence.proxy.async.shared::cta;\n"
ARRIVE = "\t@%p99 mbarrier.arrive.shared::cta.b64 _, [%r1388];\n"
HANDOVER = "\tbarrier.sync \t1;\n"


def test_unfenced_arrivals_are_counted():
    assert unfenced_arrivals(WRITE + FENCE + ARRIVE + ARRIVE) == 0
    assert unfenced_arrivals(MATRIX + ARRIVE) == unfenced_arrivals(FENCE + WRITE + ARRIVE) == 1
    assert unfenced_arrivals(WRITE + FENCE + ARRIVE + MATRIX + ARRIVE) == 1
    assert unfenced_arrivals(WRITE + HANDOVER + ARRIVE) == 0


def test_accesses_are_counted():
    ptx = (
        "\t@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];\n\tld.global.b32 { %r1 }, [ %rd1 ];\n"
        "\t@%p1 st.global.v2.b32 [ %rd1 + 0 ], { %r1, %r2 };\n\t@%p1 st.global.b16 [ %rd1 + 0 ], { %rs1 };\n"
        "\tld.acquire.gpu.global.b32 v, [%rd1];\n\tst.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5};\n"
    )
    assert accesses(ptx) == {"ld.v4.b32": 1, "ld.b32": 1, "st.v2.b32": 1, "st.b16": 1}
