"""Who is timed by `bench backward` and `bench train`: the forward's providers, differentiated by autograd
(cuDNN's frontend by itself)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from tandem_attn.bench import cudnn_frontend, providers
from tandem_attn.bench.cases import GradientInputs
from tandem_attn.bench.gradient_check import NAMES
from tandem_attn.bench.providers import OURS, OURS_DETERMINISTIC, Call, Provider
from tandem_attn.testing import Case

Prepare = Callable[[Case, GradientInputs], Call]


def _backward(prepare: Prepare, case: Case, inputs: GradientInputs) -> Call:
    """The backward alone: of one forward, again and again."""
    call = prepare(case, inputs)
    out, _ = call.answer()
    run = functools.partial(torch.autograd.grad, out, inputs.leaves, inputs.dout, retain_graph=True)
    return dataclasses.replace(call, run=run, answer=run)


def _train(prepare: Prepare, case: Case, inputs: GradientInputs) -> Call:
    """A forward and its backward."""
    call = prepare(case, inputs)

    def run():
        out, _ = call.answer()
        return torch.autograd.grad(out, inputs.leaves, inputs.dout)

    return dataclasses.replace(call, run=run, answer=run)


def _repeated(prepare: Prepare, case: Case, inputs: GradientInputs) -> Call:
    """A call whose check asks twice and wants the same bits."""
    call = prepare(case, inputs)

    def answer():
        first, second = call.answer(), call.answer()
        for name, a, b in zip(NAMES, first, second, strict=True):
            if not torch.equal(a, b):
                raise RuntimeError(f"{name} of two runs differ in {int((a != b).sum())} elements")
        return first

    return dataclasses.replace(call, answer=answer)


def _differentiated(how: Callable, by_cudnn: Callable) -> list[Provider]:
    found = []
    for one in providers.PROVIDERS:
        if one.name == cudnn_frontend.NAME:
            found.append(providers.cudnn_provider(by_cudnn))
            continue
        found.append(dataclasses.replace(one, prepare=functools.partial(how, one.prepare)))
        if one.name == OURS:
            deterministic = functools.partial(how, functools.partial(providers.tandem, deterministic=True))
            prepare = functools.partial(_repeated, deterministic)
            found.append(dataclasses.replace(one, name=OURS_DETERMINISTIC, prepare=prepare))
    return found


BACKWARD = _differentiated(_backward, cudnn_frontend.backward)
TRAIN = _differentiated(_train, cudnn_frontend.train)
