"""Shared fixtures: a fixed seed, no leftover decisions, and NaN in memory that the library leaves unset.

GPU tests skip without a Hopper GPU. TANDEM_TEST_ON=cpu rehearses those that ask for `device` on a CPU, in
small and answered by whatever can: it finds mistakes in tests where there is no GPU to find any in kernels.
"""

import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when numpy is imported: see pytest_configure

import hypothesis
import pytest
import torch

REHEARSAL = os.environ.get("TANDEM_TEST_ON") == "cpu"

hypothesis.settings.register_profile("tandem", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.load_profile("tandem")


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "gpu: needs a Hopper GPU (compute capability 9.0)")
    config.addinivalue_line("markers", "plain_empty: torch.empty is left alone, for timing")
    if why_no_hopper():
        # Tensors here are small. Threads of OpenMP, and of OpenBLAS above, wait for each other by spinning:
        # with two of them and a core that others use too, the same tests took five times the CPU time. What
        # tests start as a program of its own, the demo and the like, has as many as torch likes.
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items) -> None:
    reason = why_no_hopper()
    for item in items:
        rehearsed = REHEARSAL and "device" in item.fixturenames
        if reason and "gpu" in item.keywords and not rehearsed:
            item.add_marker(pytest.mark.skip(reason=reason))


def why_no_hopper() -> str:
    """Why GPU tests cannot run here; empty if they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    return "" if capability == (9, 0) else f"compute capability {capability}, Hopper is (9, 0)"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Each test decides anew, from no TANDEM_ variables, with the same random numbers."""
    from tandem_attn import ops

    for name in ("TANDEM_BACKEND", "TANDEM_LOG", "TANDEM_VALIDATE", "TANDEM_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    ops.clear_plans()
    torch.manual_seed(0)
    yield
    ops.clear_plans()


@pytest.fixture(autouse=True)
def nan_in_empty(request, monkeypatch):
    """Memory that tandem_attn allocates without setting it holds NaN, so that forgetting to write shows."""
    if "plain_empty" in request.keywords:
        return

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            out = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("tandem_attn.") and out.is_floating_point():
                out.fill_(float("nan"))
            return out

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def backend(monkeypatch):
    """A function that forces a backend for the rest of the test."""
    from tandem_attn import ops

    def force(name: str) -> None:
        monkeypatch.setenv("TANDEM_BACKEND", name)
        ops.clear_plans()

    return force


@pytest.fixture(scope="session")
def kernels(request, tmp_path_factory) -> None:
    """Kernels of the curated cases, compiled by all cores at once; nothing if only a few tests will run."""
    wanted = sum("gpu" in item.keywords for item in request.session.items)
    if not REHEARSAL and wanted > 20:
        import gpu_cases

        folder = tmp_path_factory.getbasetemp()
        gpu_cases.compile_all(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


@pytest.fixture
def device(kernels) -> torch.device:
    """Where a GPU test puts its tensors."""
    return torch.device("cpu" if REHEARSAL else "cuda")


@pytest.fixture
def hopper(device, backend) -> torch.device:
    """`device`, and nothing but the Hopper kernels may answer."""
    if not REHEARSAL:
        backend("gluon")
    return device


@pytest.fixture
def guarded(monkeypatch):
    """Results lie inside larger memory, NaN within and SENTINEL around: list of (result, all of it)."""
    from gpu_cases import GUARD, SENTINEL

    given = []

    def inside_guards(allocate):
        def wrapper(*args, **kwargs):
            out = allocate(*args, **kwargs)
            if sys._getframe(1).f_globals.get("__name__") != "tandem_attn.kernels.launch":
                return out
            assert out.is_contiguous()
            whole = torch.full((out.numel() + 2 * GUARD,), SENTINEL, dtype=out.dtype, device=out.device)
            inner = whole[GUARD:-GUARD].fill_(float("nan")).view(out.shape)
            given.append((inner, whole))
            return inner

        return wrapper

    for function in ("empty_like", "empty"):
        monkeypatch.setattr(torch, function, inside_guards(getattr(torch, function)))
    return given
