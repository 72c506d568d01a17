"""Random questions from numbered seeds: the test's id is the repro. TANDEM_FUZZ=1000 asks that many, and
TANDEM_FUZZ_FROM=5000 starts at that seed.

On a GPU only kernels of the curated cases are drawn: nothing is compiled, all time goes into shapes.
"""

import os
import random

import pytest
import torch
from gpu_cases import BF16, FP16, answer, assert_same_bits, distinct_kernels, kernel_of, seed_of, softened

from tandem_attn import dispatch, explain
from tandem_attn.testing import Case, Inputs, assert_right, make, run
from tandem_attn.testing.inputs import LAYOUTS

FIRST = int(os.environ.get("TANDEM_FUZZ_FROM", "0"))
ON_GPU, ON_CPU = (range(FIRST, FIRST + int(os.environ.get("TANDEM_FUZZ", n))) for n in ("150", "60"))
EDGES = (1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 383, 385)


def random_case(seed: int, dims: tuple, dtypes: tuple, longest: int) -> Case:
    """A case drawn from everything that the public functions take."""
    draw = random.Random(seed)

    def length() -> int:
        kind = draw.random()
        n = (
            draw.choice(EDGES)
            if kind < 0.4
            else draw.randint(1, 40)
            if kind < 0.5
            else draw.randint(1, longest)
        )
        return min(n, longest)

    def side() -> int:
        return draw.choice((-1, 0, 1, draw.randint(0, 70), draw.randint(0, longest)))

    kv_heads = draw.choice((1, 1, 2, 3))
    head_dim = draw.choice(dims)
    facts = {
        "kv_heads": kv_heads,
        "heads": kv_heads * draw.choice((1, 1, 2, 3, 5, 8)),
        "head_dim": head_dim,
        "head_dim_v": draw.choice((head_dim, head_dim, head_dim, draw.choice(dims))),
        "causal": draw.random() < 0.4,
        "softcap": draw.choice((0.0, 0.0, 0.0, 5.0, 30.0)),
        "dtype": draw.choice(dtypes),
        "layout": draw.choice(("bshd", "bshd", *LAYOUTS)),
        "window": (side(), side()) if draw.random() < 0.4 else (-1, -1),
    }
    if facts["causal"]:
        facts["window"] = (facts["window"][0], -1)
    same = facts["layout"] == "qkvpacked"
    if same:
        facts["head_dim_v"] = head_dim
    if draw.random() < 0.5:
        queries = length()
        return Case(
            **facts, batch=draw.randint(1, 3), seqlen_q=queries, seqlen_k=queries if same else length()
        )
    batch = draw.choice((1, 2, 3, 5, 9, 40))
    longest = min(longest, 3 * longest // batch + 1)
    lengths_q = tuple(length() if draw.random() < 0.8 else 0 for _ in range(batch))
    lengths_k = lengths_q if same else tuple(length() if draw.random() < 0.85 else 0 for _ in range(batch))
    used = draw.random() if not same else 1.0
    used_q, used_k = (tuple(draw.randint(0, n) for n in ns) for ns in (lengths_q, lengths_k))
    facts |= {"used_q": used_q if used < 0.3 else None, "used_k": used_k if 0.2 < used < 0.5 else None}
    return Case(**facts, lengths_q=lengths_q, lengths_k=lengths_k)


def options(case: Case, seed: int) -> dict:
    """Keywords that a Case does not hold; the bounds on lengths may be loose."""
    draw = random.Random(-seed - 1)
    found = {
        "softmax_scale": draw.choice((None, None, None, 0.01, 0.37)),
        "sm_margin": draw.choice((0, 0, 3, 120)),
    }
    if case.varlen:
        more = draw.choice((0, 0, 1, 777))
        found |= {"max_seqlen_q": case.seqlen_q + more, "max_seqlen_k": case.seqlen_k + more}
    return found


def check(case: Case, inputs: Inputs, seed: int, attend) -> None:
    """Within budget, and twice the same bits; what failed is told as a line of Python."""
    inputs.kwargs |= options(case, seed)
    inputs = softened(case, inputs)
    # where both errors are float32 roundings of a few short rows, the ratio of their maxima is luck
    factor = 4.0 if case.dtype == torch.float32 else 2.0
    try:
        first = attend(case, inputs)
        assert_right(case, inputs, *first, factor)
        assert_same_bits(case, inputs, first, attend(case, inputs))
    except Exception as error:
        keywords = {name: x for name, x in options(case, seed).items() if x}
        raise AssertionError(f"seed {seed}: {case!r}, keywords {keywords}") from error


@pytest.fixture(scope="session")
def compiled_kernels() -> set:
    return set(distinct_kernels())


@pytest.mark.gpu
@pytest.mark.parametrize("seed", ON_GPU)
def test_on_the_gpu(hopper, compiled_kernels, seed):
    dims = (8, 40, 64, 64, 96, 112, 128, 128, 128, 192, 224, 256)
    for attempt in range(1000):
        case = random_case(1000 * seed + attempt, dims, (BF16, BF16, FP16), 700)
        loose = options(case, seed).get("max_seqlen_q", case.seqlen_q) - case.seqlen_q
        if kernel_of(case, loose) in compiled_kernels:
            break
    check(case, make(case, hopper, seed=seed_of(case), poison=True), seed, answer)


@pytest.mark.parametrize("seed", ON_CPU)
def test_on_the_cpu(backend, seed):
    """The reference, and torch's own kernel where it can answer."""
    dtypes = (BF16, FP16, torch.float32, torch.float64)
    case = random_case(seed, (1, 7, 16, 40, 64), dtypes, 150)
    inputs = make(case, seed=seed, poison=True)
    backend("reference")
    check(case, inputs, seed, run)
    inputs = make(case, seed=seed, poison=True)
    spec = explain(inputs.q, inputs.k, inputs.v, **inputs.kwargs).spec
    if not spec.is_empty and not dispatch.candidate("torch", spec)[1]:
        backend("torch")
        check(case, inputs, seed, run)


def test_draws_are_many_kinds_and_repeat():
    cases = [random_case(seed, (40, 64), (BF16,), 300) for seed in range(300)]
    assert cases == [random_case(seed, (40, 64), (BF16,), 300) for seed in range(300)]
    for kind in ("varlen", "causal", "softcap", "used_q", "used_k"):
        count = sum(bool(getattr(case, kind)) for case in cases)
        assert 20 < count < 280, kind
    assert {case.layout for case in cases} == set(LAYOUTS)
    assert any(0 in case.rows for case in cases) and any(0 in case.keys for case in cases)
