"""The Hopper kernels over an FP8 cache: error budget, exact answers, appending bit by bit, graphs, memory.

`TANDEM_TEST_ON=cpu` rehearses it on a CPU; see conftest.py.
"""

import copy
import dataclasses
import math
import os

import pytest
import torch
from conftest import REHEARSAL
from decode_cases import assert_neither_waits_nor_allocates
from decode_fp8_cases import (
    APPENDS,
    BUDGET,
    EXACT,
    GRAPHS,
    REPEATS,
    certainly,
    compile_all,
    fp8,
    name,
    seed_of,
    won,
)

import tandem_attn
from tandem_attn import PagedKVCache, decode_workspace, flash_attn_with_kvcache, reference_decode
from tandem_attn.spec_decode import Given
from tandem_attn.testing.decode_fp8_inputs import (
    Fp8Case,
    assert_fp8_right,
    assert_same_cache,
    make_fp8,
    on_cpu,
)
from tandem_attn.testing.decode_inputs import DecodeCase, bits, run_decode

pytestmark = pytest.mark.gpu

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
GUARD, SENTINEL = 1024, -1234.0  # elements, on both sides


@pytest.fixture(scope="session")
def fp8_kernels(request, tmp_path_factory) -> None:
    """Kernels of the curated cases, compiled by all cores at once; nothing if only a few tests will run."""
    items = [i for i in request.session.items if "fp8_kernels" in getattr(i, "fixturenames", ())]
    if not REHEARSAL and len(items) > 20:
        folder = tmp_path_factory.getbasetemp()
        params = [i.callspec.params for i in items if hasattr(i, "callspec")]
        cases = [x for p in params for x in p.values() if isinstance(x, Fp8Case)]
        compile_all(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder, cases)


@pytest.fixture
def device(fp8_kernels):
    """Where tests put their tensors."""
    threads = torch.get_num_threads()
    if REHEARSAL:  # the oracle's products are small: threads would wait for each other
        torch.set_num_threads(1)
    yield torch.device("cpu" if REHEARSAL else "cuda")
    torch.set_num_threads(threads)


@pytest.fixture
def gpu(device) -> torch.device:
    """Likewise, for what has no meaning on a CPU."""
    if device.type == "cpu":
        pytest.skip("streams, graphs and the allocator are CUDA's")
    return device


@pytest.fixture
def many(device) -> int:
    """How often what is random in time is tried."""
    return 100 if device.type == "cuda" else 2


def checked(case, device, seed=None, **more):
    """Inputs of a case and the right answer to them."""
    inputs = make_fp8(case, device, seed=seed_of(case) if seed is None else seed)
    certainly(inputs)
    found = run_decode(inputs, **more)
    assert_fp8_right(case, inputs, *found)
    return inputs, found


# The error budget, with NaN in all memory that does not count, factors too


@pytest.mark.parametrize("case", BUDGET, ids=name)
def test_within_budget(device, case):
    if device.type == "cpu" and case.case.heads > 250:
        pytest.skip("too slow on a CPU")
    checked(case, device)


@pytest.mark.parametrize("case", EXACT, ids=name)
def test_one_key_wins_exactly(device, case):
    """Any wrong key, page or factor shows in some bit."""
    inputs, expected = won(case, device, seed_of(case))
    certainly(inputs)
    out, lse = run_decode(inputs)
    for b, (s, (out_b, lse_b)) in enumerate(zip(inputs.sequences, expected, strict=True)):
        mine = (out[b], lse[b]) if s.rows is None else (out[s.rows], lse[:, s.rows])
        factors = inputs.tensors["v_descale"]
        assert factors.isfinite().all()
        assert torch.equal(mine[0].double(), out_b.double()), f"out of sequence {b}"
        torch.testing.assert_close(mine[1].double(), lse_b.double(), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("tokens", [1, 40])
def test_factors_may_be_large_and_small(device, tokens, size):
    """Those of V scale the output, those of K and q scores, as softmax_scale could."""
    for case in (fp8(tokens=tokens), fp8(tokens=tokens, fp8_q=True, each="sequence")):
        inputs = make_fp8(case, device)
        certainly(inputs)
        expected = run_decode(inputs)
        scale = case.case.head_dim**-0.5 / size
        larger = {f"{x}_descale": size * inputs.tensors[f"{x}_descale"] for x in "kv"}
        found = run_decode(inputs, **larger, softmax_scale=scale)
        for a, b, unit in zip(found, expected, (size, 1.0), strict=True):
            rounding = 2.0**-7 * float(b.abs().max())
            torch.testing.assert_close(a.double() / unit, b.double(), rtol=2**-7, atol=rounding)


@pytest.mark.parametrize("each", ["block", "sequence"])
@pytest.mark.parametrize("tokens", [1, 9, 40])
@pytest.mark.parametrize("page_size", [0, 3, 16, 128, 192])
def test_what_nobody_declared_does_not_count(device, page_size, tokens, each):
    """Bytes and factors of other slots, rows and pages: not a bit of the result."""
    facts = dict(tokens=tokens, causal=True, leftpad=(140, 2), page_size=page_size)
    inputs = make_fp8(fp8(each, **facts), device)
    certainly(inputs)
    other = dict(inputs.tensors)
    for x in "kv":
        other[f"{x}_cache"] = cache = inputs.tensors[f"{x}_cache"].clone()
        cache.view(torch.uint8)[cache.isnan()] = 0x55
        other[f"{x}_descale"] = factors = inputs.tensors[f"{x}_descale"].clone()
        factors[factors.isnan()] = math.inf
    for a, b in zip(run_decode(inputs), run_decode(inputs, **other), strict=True):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("case", REPEATS, ids=name)
def test_again_and_again_the_same_bits(device, many, case):
    inputs, first = checked(case, device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(many):
        for x, y in zip(run_decode(inputs), first, strict=True):
            wrong += (bits(x) != bits(y)).any()
    assert int(wrong) == 0


# Appending: every bit of the cache, and of q


def append_alone(inputs):
    """q after appending, by the plan that a call would use."""
    from tandem_attn import dispatch

    call = inputs.tensors | inputs.options
    spec = tandem_attn.explain_with_kvcache(**call).append.spec
    given = Given(**inputs.tensors)
    cache, new, rotary = given.parts()
    backend = dispatch.backend_for(spec)
    assert backend.NAME == (
        "empty" if spec.is_empty else "gluon" if spec.device.type == "cuda" else "reference"
    )
    return backend.append(spec)(given.q, given.k, given.v, cache, new, rotary)


def append_by_reference(inputs):
    """The same on a CPU, where it is specified."""
    spec = tandem_attn.explain_with_kvcache(**inputs.tensors, **inputs.options).append.spec
    given = Given(**inputs.tensors)
    cache, new, rotary = given.parts()
    return reference_decode.append(spec)(given.q, given.k, given.v, cache, new, rotary)


def scaled(inputs, size: float):
    """New tokens of another size, so that factors grow, or do not."""
    for x in "kv":
        if inputs.tensors[x].dtype != E4M3:
            inputs.tensors[x].mul_(size)
    return inputs


@pytest.mark.parametrize("size", [2.0**-6, 1.0, 1000.0], ids=["smaller", "alike", "larger"])
@pytest.mark.parametrize("case", APPENDS, ids=name)
def test_appending_leaves_the_bits_of_the_reference(device, case, size):
    """And writes nothing else: all of the cache is compared."""
    inputs = scaled(make_fp8(case, device, seed=seed_of(case)), size)
    expected = on_cpu(inputs)
    q = append_alone(inputs)
    wanted = append_by_reference(expected)
    assert_same_cache(inputs.tensors, expected.tensors, case.id)
    for b, s in enumerate(inputs.sequences):
        mine = b if s.rows is None else s.rows
        assert torch.equal(q[mine].cpu().float(), wanted[mine].float()), f"q of {b}"


@pytest.mark.parametrize("rotary", ["interleaved", "halves"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rotation_is_that_of_the_reference_over_16_bits_too(device, dtype, rotary):
    from tandem_attn.testing.decode_inputs import make_decode

    case = DecodeCase(
        new=130, tokens=130, capacity=300, head_dim=128, rotary=rotary, causal=True, dtype=dtype
    )
    inputs = make_decode(case, device)
    expected = copy.copy(inputs)
    expected.tensors = on_cpu(inputs).tensors
    q, wanted = append_alone(inputs), append_by_reference(expected)
    assert torch.equal(q.cpu(), wanted)
    for x in ("k_cache", "v_cache"):
        assert torch.equal(bits(inputs.tensors[x].cpu()), bits(expected.tensors[x]))


@pytest.mark.parametrize("where", ["k", "v_cache", "k_descale"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("new", [1, 3, 140])
def test_what_is_not_finite_is_so_in_the_reference(device, new, bad, where):
    for page_size in (0, 64):
        case = fp8(new=new, page_size=page_size, seqlens=(513, 70))
        inputs = make_fp8(case, device)
        x = inputs.tensors[where]
        x.view(-1)[::7] = bad if x.dtype != E4M3 else math.nan
        expected = on_cpu(inputs)
        append_alone(inputs)
        append_by_reference(expected)
        assert_same_cache(inputs.tensors, expected.tensors)


@pytest.mark.parametrize("page_size", [0, 16, 128, 192])
def test_a_cache_that_grows_token_by_token(device, page_size):
    """Sizes change all the time; after many steps every bit is the reference's, and so is the answer."""
    steps = 150 if device.type == "cuda" else 20
    case = fp8(batch=3, new=1, seqlens=(0, 100, 127), page_size=page_size, capacity=300)
    inputs = make_fp8(case, device)
    if page_size:  # pages for all that will come
        width = -(-300 // page_size)
        pages = torch.randperm(3 * width, generator=torch.Generator().manual_seed(1)).view(3, width).int()
        inputs.tensors["page_table"] = pages.to(device)
        shape = (3 * width, page_size, 2, 128)
        for x in "kv":
            inputs.tensors[f"{x}_cache"] = torch.zeros(shape, device=device).to(E4M3)
            inputs.tensors[f"{x}_descale"] = torch.ones(3 * width, -(-page_size // 128), 2, device=device)
    expected = on_cpu(inputs)
    lengths = torch.tensor(case.case.seqlens, dtype=torch.int32)
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        size = torch.exp(4.0 * torch.randn(3, 1, 2, 1, generator=generator))
        now = {x: (size * torch.randn(3, 1, 2, 128, generator=generator)).to(BF16) for x in "kv"}
        for one in (inputs, expected):
            at = one.tensors["q"].device
            one.tensors |= {x: y.to(at) for x, y in now.items()}
            one.tensors["cache_seqlens"] = (lengths + step).to(at)
        found, wanted = run_decode(inputs), None
        if step % 50 == 49 or step == steps - 1:
            wanted = run_decode(expected)
            torch.testing.assert_close(found[0].cpu().float(), wanted[0].float(), rtol=0.02, atol=0.02)
        else:
            append_by_reference(expected)
    assert_same_cache(inputs.tensors, expected.tensors)


# Graphs, streams, memory


def replaced(call: dict, inputs) -> None:
    """Put other numbers into the tensors of a call."""
    for field, x in inputs.tensors.items():
        if isinstance(x, torch.Tensor):
            call[field].copy_(x)


@pytest.mark.parametrize("case", GRAPHS, ids=name)
def test_a_graph_is_captured_once_and_replayed(gpu, case):
    """With other lengths, pages, factors and new keys; append and attention, with nothing between."""
    inputs = make_fp8(case, gpu, seed=1)
    certainly(inputs)
    call = inputs.tensors | inputs.options
    q = call["q"]
    out = torch.empty(q.shape, dtype=BF16, device=gpu)
    memory = dict(out=out, workspace=decode_workspace(**call))
    flash_attn_with_kvcache(**call, **memory)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flash_attn_with_kvcache(**call, **memory)
    for seed, seqlens in enumerate(((3, 130, 600), (130, 600, 3), (600, 3, 130)), 2):
        other = dataclasses.replace(case, case=dataclasses.replace(case.case, seqlens=seqlens))
        numbers = scaled(make_fp8(other, gpu, seed=seed), 100.0 if seed == 3 else 1.0)
        if any(numbers.tensors[x].shape != call[x].shape for x in ("k_cache", "k_descale")):
            continue  # other pages
        replaced(call, numbers)
        out.fill_(math.nan)
        graph.replay()
        found = run_decode(numbers)
        assert torch.equal(out, found[0]), "not what a call without a graph gives"
        assert_same_cache(call, numbers.tensors)
        assert_fp8_right(other, numbers, *found)


@pytest.mark.parametrize("case", GRAPHS, ids=name)
def test_a_call_neither_waits_nor_allocates(gpu, case):
    inputs = make_fp8(case, gpu, seed=1)
    out = torch.empty(inputs.tensors["q"].shape, dtype=BF16, device=gpu)
    assert_neither_waits_nor_allocates(inputs, out)


@pytest.mark.parametrize("case", REPEATS, ids=name)
def test_nothing_around_results_is_written(device, case):
    """Neither around `out`, nor around `workspace`; and caches and factors are only read."""
    inputs = make_fp8(case, device, seed=1)
    before = on_cpu(inputs)
    shape = (*inputs.tensors["q"].shape[:-1], case.case.dim_v)
    whole = torch.full((math.prod(shape) + 2 * GUARD,), SENTINEL, dtype=BF16, device=device)
    out = whole[GUARD:-GUARD].view(shape)
    size = len(decode_workspace(**inputs.tensors, **inputs.options))
    around = torch.full((size + 2 * GUARD,), 171, dtype=torch.uint8, device=device)
    workspace = around[GUARD : GUARD + size].zero_()
    certainly(inputs)
    found, lse = run_decode(inputs, out=out, workspace=workspace)
    assert found.data_ptr() == out.data_ptr()
    assert_fp8_right(case, inputs, out, lse)
    assert (whole[:GUARD] == SENTINEL).all() and (whole[-GUARD:] == SENTINEL).all()
    assert (around[:GUARD] == 171).all() and (around[GUARD + size :] == 171).all()
    assert_same_cache(inputs.tensors, before.tensors)


def test_number_of_multiprocessors_changes_little(device):
    for case in (fp8(), fp8(tokens=40, causal=True, page_size=16, each="sequence", fp8_q=True)):
        for margin in (1, 17, 131):
            checked(case, device, sm_margin=margin)


@pytest.mark.parametrize("name", ["k_cache", "k_descale", "q_descale", "k", "cache_seqlens"])
def test_tensors_may_start_anywhere(device, name):
    """Where tiles want 16 bytes, the reference answers; factors and new keys may start at any element."""
    for case in (fp8(new=1), fp8("sequence", fp8_q=True, new=3)):
        inputs = make_fp8(case, device)
        if name not in inputs.tensors:
            continue
        expected = on_cpu(inputs)
        x = inputs.tensors[name]
        moved = torch.empty(x.nbytes + 16, dtype=torch.uint8, device=device)[x.itemsize :][: x.nbytes]
        inputs.tensors[name] = moved.view(x.dtype).view(x.shape).copy_(x)
        found = run_decode(inputs)
        assert_fp8_right(case, inputs, *found)
        run_decode(expected)
        assert_same_cache(inputs.tensors, expected.tensors)


# More than 2**31 elements


@pytest.mark.parametrize("page_size", [0, 64])
def test_a_cache_above_2_31_elements(device, page_size):
    """The last rows, or pages, of one: appending and attention."""
    rows, slots = (300, 8192) if device.type == "cuda" else (3, 200)
    if page_size:
        rows, slots = rows * slots // page_size, page_size
    caches = [torch.zeros(rows, slots, 8, 128, dtype=torch.uint8, device=device).view(E4M3) for _ in "kv"]
    assert device.type == "cpu" or caches[0].numel() > 2**31
    factors = [torch.ones(rows, -(-slots // 128), 8, device=device) for _ in "kv"]
    q = torch.randn(2, 1, 16, 128, device=device, dtype=BF16)
    k, v = (torch.randn(2, 140, 8, 128, device=device, dtype=BF16) for _ in "kv")
    places = dict(cache_batch_idx=torch.tensor([rows - 1, 1], dtype=torch.int32, device=device))
    if page_size:
        table = torch.tensor([[rows - 1, rows - 3, rows - 2], [1, 0, 2]], dtype=torch.int32, device=device)
        places = dict(page_table=table)
    lengths = torch.zeros(2, dtype=torch.int32, device=device)
    descales = dict(k_descale=factors[0], v_descale=factors[1])
    out = flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, **places, **descales)
    exact = tandem_attn.flash_attn_func(q.cpu().float(), k.cpu().float(), v.cpu().float())
    torch.testing.assert_close(out.cpu().float(), exact, rtol=0.1, atol=0.1)


# The cache manager


@pytest.mark.parametrize("page_size", [16, 128])
def test_the_cache_manager_on_a_device(device, page_size):
    """Forks and steps: what a cache on a CPU holds and answers."""
    torch.manual_seed(0)
    sizes = dict(
        num_layers=1, num_pages=40, page_size=page_size, num_kv_heads=2, head_dim=64, max_sequences=4
    )
    caches = [PagedKVCache(**sizes, dtype=E4M3, device=at) for at in (device, "cpu")]
    handles = [[cache.allocate(20)] for cache in caches]
    for step in range(8):
        n = 20 if step == 0 else 1
        many = len(handles[0])
        x = [torch.randn(many, n, h, 64).mul(2.0**step).to(BF16) for h in (4, 2, 2)]
        outs = []
        for cache, of in zip(caches, handles, strict=True):
            cache.reserve(of, n)
            batch = cache.batch(of)
            q, k, v = (t.to(cache.device) for t in x)
            outs.append(
                flash_attn_with_kvcache(
                    q, cache.k[0], cache.v[0], k, v, causal=True, cache_seqlens=batch.cache_seqlens,
                    page_table=batch.page_table, **cache.descales(0),
                )
            )  # fmt: skip
            cache.commit(of, n)
            if step == 2:
                of += cache.fork(of[0], 2)
        torch.testing.assert_close(outs[0].cpu().float(), outs[1].float(), rtol=0.02, atol=0.02 * 2.0**step)
    for mine, other in zip(*([c.k, c.v] for c in caches), strict=True):
        assert torch.equal(mine.cpu().view(torch.uint8), other.view(torch.uint8))
    assert torch.equal(caches[0].k_descale.cpu(), caches[1].k_descale)
