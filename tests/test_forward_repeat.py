"""The same bits every time: a race between warpgroups shows as a bit that differs once in a thousand runs."""

import concurrent.futures
import contextlib

import pytest
import torch
from gpu_cases import REPEATS, answer, assert_same_bits, dense, name, seed_of

from tandem_attn.testing import assert_right, make, run

pytestmark = pytest.mark.gpu

TIMES = 1000
BITS = {2: torch.int16, 4: torch.int32}


class Traffic:
    """Copies and products on another stream, so that loads arrive early, late and out of step."""

    def __init__(self, device: torch.device):
        self.on = device.type == "cuda"
        if not self.on:
            return
        self.stream = torch.cuda.Stream()
        self.source = torch.zeros(2**26, dtype=torch.int32, device=device)
        self.target = torch.empty_like(self.source)
        self.matrix = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)
        self.stream.wait_stream(torch.cuda.current_stream())
        # so that results lie elsewhere than in other tests
        free = torch.cuda.mem_get_info()[0]
        self.dummy = torch.empty(min(free // 4, 16 * 2**30), dtype=torch.uint8, device=device)

    def add(self, i: int) -> None:
        """At some calls a copy, of 16 KiB to 256 MiB, at some a product."""
        if not self.on:
            return
        with torch.cuda.stream(self.stream):
            if i % 5 == 0:
                n = 2 ** (12 + i // 5 % 15)
                self.target[:n].copy_(self.source[:n])
            elif i % 5 == 3:
                torch.mm(self.matrix, self.matrix)


def bits(x: torch.Tensor) -> torch.Tensor:
    """As integers: NaN equals itself, and 0 is not -0."""
    return x.view(BITS[x.element_size()])


@pytest.mark.parametrize("case", REPEATS, ids=name)
def test_a_thousand_times_the_same_bits(hopper, case):
    inputs = make(case, hopper, seed=seed_of(case), poison=True)
    first = answer(case, inputs)
    assert_right(case, inputs, *first)
    defined = [torch.ones_like(x, dtype=torch.bool) for x in first]
    if case.varlen:
        for x in defined:
            x.zero_()
        for rows, _ in inputs.slices:
            defined[0][rows], defined[1][:, rows] = True, True
    traffic, wrong = Traffic(hopper), torch.zeros((), dtype=torch.int64, device=hopper)
    kept = []
    for i in range(TIMES if hopper.type == "cuda" else 3):
        traffic.add(i)
        found = run(case, inputs)
        kept = [*kept, found] if i % 7 else [found]  # other addresses for the next results
        for x, y, where in zip(found, first, defined, strict=True):
            wrong += ((bits(x) != bits(y)) & where).any()
    assert int(wrong) == 0, f"{int(wrong)} of {2 * TIMES} results differ from the first"


@pytest.mark.parametrize("case", REPEATS, ids=name)
def test_number_of_programs_changes_no_bit(hopper, case):
    """Other tiles come before and after each other in a program, down to one program for all of them."""
    inputs = make(case, hopper, seed=seed_of(case), values="normal", poison=True)
    expected = answer(case, inputs)
    for margin in (1, 2, 17, 66, 100, 127, 131, 5000):
        inputs.kwargs["sm_margin"] = margin
        assert_same_bits(case, inputs, expected, answer(case, inputs))


def test_many_more_tiles_than_programs(hopper):
    """One program, hundreds of tiles of one and two key blocks: barriers come around many times."""
    for dims, mask in (((64, 64), {}), ((128, 128), {"causal": True}), ((256, 256), {"window": (9, 0)})):
        case = dense((130, 140), dims, (4, 2), batch=20, **mask)
        inputs = make(case, hopper, values="integers", poison=True)
        inputs.kwargs["sm_margin"] = 5000
        found = answer(case, inputs)
        inputs.kwargs["sm_margin"] = 0
        assert_same_bits(case, inputs, found, answer(case, inputs))
        assert_right(case, inputs, *found)


def test_streams_and_threads_do_not_meet(hopper):
    """Eight threads, each on a stream of its own, with questions of their own."""
    cases = REPEATS[:8]
    questions = [(case, make(case, hopper, seed=i)) for i, case in enumerate(cases)]
    expected = [answer(*question) for question in questions]
    if hopper.type == "cuda":
        torch.cuda.synchronize()

    def work(i: int) -> list:
        case, inputs = questions[i]
        stream = torch.cuda.Stream() if hopper.type == "cuda" else None
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            found = [run(case, inputs) for _ in range(20 if stream else 2)]
        if stream:
            stream.synchronize()
        return found

    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        for (case, inputs), want, found in zip(
            questions, expected, pool.map(work, range(len(cases))), strict=True
        ):
            for got in found:
                assert_same_bits(case, inputs, want, got)
