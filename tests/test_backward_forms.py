"""Forms of the backward kernel that a question, or a Triton, chooses between: each is right for all."""

import functools

import backward_cases as cases
import pytest
from backward_cases import assert_exact, assert_right, assert_zeros, gradients, pairs_win, upstream
from gpu_cases import CAUSAL, FP16, FULL, dense, name, packed, seed_of

from tandem_attn.kernels import config_backward, launch_backward
from tandem_attn.testing import make

pytestmark = pytest.mark.gpu
kernels = pytest.fixture(scope="session")(cases.compile_ahead)
hopper = pytest.fixture(cases.only_kernels)

GROUPS = [
    dense((300, 383), (64, 64), (8, 2), batch=2, **CAUSAL),
    dense((300, 383), (128, 128), (8, 2), dtype=FP16, **CAUSAL),
    dense((257, 200), (112, 112), (4, 1), **FULL),
    dense((300, 300), (256, 256), (8, 2), **CAUSAL),
    dense((200, 300), (192, 128), (4, 1), batch=2, **FULL),
    packed(((70, 300, 0, 9), (300, 131, 5, 0)), (128, 128), (8, 2), **CAUSAL),
    packed(((70, 300, 0, 9), (300, 131, 5, 0)), (256, 256), (4, 1), **FULL),
    packed(((300, 130),) * 2, (64, 64), (4, 1), used_k=(200, 129), window=(40, 0)),
]
FIRST = [
    *(
        dense(n, (d, d), (2, 2), batch=2, **CAUSAL)
        for d in (64, 128)
        for n in ((1, 1), (130, 130), (400, 300))
    ),
    dense((257, 300), (128, 128), (4, 4), **FULL),
    packed(((300, 0, 64), (300, 131, 300)), (64, 64), (2, 2), **CAUSAL),
]


@pytest.mark.parametrize("deterministic", [False, True], ids=["any", "repeatable"])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("case", GROUPS, ids=name)
def test_a_group_in_parts(hopper, monkeypatch, case, parts, deterministic):
    """However many programs share the query heads of a KV head: exact, and nothing outside the lengths."""
    for module in (config_backward, launch_backward):
        monkeypatch.setattr(module, "parts_of_group", lambda spec: parts)
    check(case, hopper, deterministic)


@pytest.mark.parametrize("deterministic", [False, True], ids=["any", "repeatable"])
@pytest.mark.parametrize("copies_operands", [False, True], ids=["apart", "in-loop"])
@pytest.mark.parametrize("case", FIRST, ids=name)
def test_the_first_block_in_the_loop_or_before_it(hopper, monkeypatch, case, copies_operands, deterministic):
    """As for each Triton (device/gluon.py); this one compiles both."""
    choose = functools.partial(config_backward.backward_configs, copies_operands=copies_operands)
    monkeypatch.setattr(launch_backward, "backward_configs", choose)
    check(case, hopper, deterministic)


def check(case, device, deterministic: bool) -> None:
    """Exact where gradients are numbers of few bits, within budget, and nothing outside the lengths."""
    inputs, grads = pairs_win(case, device, seed_of(case))
    assert_exact(case, inputs, gradients(case, inputs, *grads, deterministic=deterministic), grads)
    inputs = make(case, device, poison=True)
    grads = upstream(case, inputs)
    found = gradients(case, inputs, *grads, deterministic=deterministic)
    assert_right(case, inputs, found, grads)
    assert_zeros(case, inputs, found)
