"""The Hopper kernels over a KV cache: the error budget, exact answers, the same bits, and memory."""

import dataclasses
import math
import os

import pytest
import torch
from conftest import REHEARSAL
from decode_cases import (
    ALONE,
    BF16,
    BUDGET,
    COMPANY,
    EXACT,
    GRAPHS,
    INVARIANT,
    REPEATS,
    answer,
    assert_neither_waits_nor_allocates,
    assert_same_bits,
    cached,
    compile_once,
    declared,
    name,
    rows,
    seed_of,
    too_slow_to_rehearse,
    winning,
)
from test_forward_repeat import Traffic, bits

import tandem_attn
from tandem_attn import decode_workspace, flash_attn_with_kvcache
from tandem_attn.testing.decode_inputs import assert_decode_right, make_decode, run_decode

pytestmark = pytest.mark.gpu

GUARD, SENTINEL = 1024, -1234.0  # elements, on both sides


@pytest.fixture(scope="session")
def decode_kernels(request, tmp_path_factory) -> None:
    """Kernels of the curated cases, compiled by all cores at once; nothing if only a few tests will run."""
    wanted = sum("decode_kernels" in getattr(item, "fixturenames", ()) for item in request.session.items)
    if not REHEARSAL and wanted > 20:
        folder = tmp_path_factory.getbasetemp()
        compile_once(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


@pytest.fixture
def device(decode_kernels):
    """Where tests put their tensors. The kernels of the forward are not waited for."""
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


def checked(case, device, **more):
    """Inputs of a case and the right answer to them."""
    inputs = make_decode(case, device, seed=seed_of(case))
    found = answer(inputs, **more)
    assert_decode_right(case, inputs, *found)
    return inputs, found


# The error budget, with NaN in all memory that does not count


@pytest.mark.parametrize("case", BUDGET, ids=name)
def test_within_budget(device, case):
    if too_slow_to_rehearse(case, device):
        pytest.skip("too slow on a CPU")
    checked(case, device)


@pytest.mark.parametrize("tokens", [1, 9, 40])
@pytest.mark.parametrize("scale", [1e-3, 0.3, 4.0])
def test_softmax_scale(device, scale, tokens):
    case = cached(tokens=tokens, causal=True)
    inputs = make_decode(case, device)
    inputs.options["softmax_scale"] = scale
    assert_decode_right(case, inputs, *answer(inputs))


@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_lse_does_not_drift(device, tokens):
    """All scores of a row are equal, and large: see its namesake in test_forward.py."""
    q = torch.linspace(-1500 / 128, 1500 / 128, tokens * 16, device=device).to(BF16)
    k, v = torch.ones(1, 8192, 2, 128, device=device, dtype=BF16).expand(2, -1, -1, -1, -1).clone()
    rows = q.view(1, tokens, 16, 1).expand(-1, -1, -1, 128).contiguous()
    _, lse = flash_attn_with_kvcache(rows, k, v, softmax_scale=1.0, num_splits=1, return_softmax_lse=True)
    expected = 128 * q.double().view(1, tokens, 16).transpose(1, 2) + math.log(8192)
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=4e-4)


@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_rows_without_keys_are_zero(device, tokens):
    """Empty sequences, keys that are all padded, and more queries than keys."""
    case = cached(batch=4, seqlens=(0, 3, 64, 300), leftpad=(0, 0, 64, 7), tokens=tokens, causal=True)
    inputs, (out, lse) = checked(case, device)
    blind = lse.isneginf().transpose(1, 2)
    assert blind[0].all() and blind[2].all() and blind[1, : max(tokens - 3, 0)].all() and not blind[3].any()
    assert torch.count_nonzero(out[blind]) == 0


# Exact answers: any wrong key, row, part or page shows in some bit


@pytest.mark.parametrize("case", EXACT, ids=name)
def test_one_key_wins_exactly(device, case):
    inputs = make_decode(case, device, seed=seed_of(case))
    expected = winning(case, inputs, seed_of(case))
    for b, (found, want) in enumerate(zip(declared(inputs, *answer(inputs)), expected, strict=True)):
        assert torch.equal(found[0], want[0].to(case.dtype)), f"out of sequence {b}"
        torch.testing.assert_close(found[1].double(), want[1], rtol=1e-6, atol=1e-4)


# The same bits


@pytest.mark.parametrize("case", REPEATS, ids=name)
def test_two_hundred_times_the_same_bits(device, case):
    inputs, first = checked(case, device)
    traffic, wrong = Traffic(device), torch.zeros((), dtype=torch.int64, device=device)
    kept = []
    for i in range(200 if device.type == "cuda" else 2):
        traffic.add(i)
        found = run_decode(inputs)
        kept = [*kept, found] if i % 7 else [found]  # other addresses for the next results
        for x, y in zip(found, first, strict=True):
            wrong += (bits(x) != bits(y)).any()
    assert int(wrong) == 0, f"{int(wrong)} of 400 results differ from the first"


def some_of(inputs, chosen: list[int]) -> dict:
    """The arguments for some sequences of a batch, in this order."""
    tensors, where = dict(inputs.tensors), torch.tensor(chosen, device=inputs.tensors["q"].device)
    for field in ("q", "cache_seqlens", "page_table"):
        if field in tensors:
            tensors[field] = tensors[field][where]
    if "page_table" not in tensors:
        tensors |= {x: tensors[x][where] for x in ("k_cache", "v_cache")}
    return tensors | inputs.options


@pytest.mark.parametrize("facts", INVARIANT, ids=lambda f: f"size{f['split_size']}-q{f.get('tokens', 1)}")
def test_split_size_makes_a_sequence_independent_of_its_batch(device, facts):
    """Alone, among 2, 40 and 257, first or last or in disorder: bitwise the same."""
    real = device.type == "cuda"
    many = max(COMPANY) if real else 41
    case = rows(many, **facts)
    inputs = make_decode(case, device, seed=seed_of(case))

    def of(chosen):
        arguments = some_of(inputs, chosen)
        if real:
            assert tandem_attn.explain_with_kvcache(**arguments).backend == "gluon"
        return flash_attn_with_kvcache(**arguments, return_softmax_lse=True)

    together = of(range(many))
    if not real:  # no such promise there: right is enough
        assert_decode_right(case, inputs, *together)
    order = torch.randperm(many, generator=torch.Generator().manual_seed(3)).tolist()
    groups = [[b] for b in (0, 1, ALONE, many - 1)] + [[ALONE, 5], [5, ALONE], list(range(40)), order]
    groups += [[ALONE] * 2, [*range(39, 0, -1), ALONE], order[:40]]
    groups += [[b] for b in order] if real else []
    for chosen in groups:
        for x, y in zip(of(chosen), together, strict=True):
            if real:
                assert torch.equal(x, y[chosen]), f"{chosen} differ from what they are among {many}"
            else:
                torch.testing.assert_close(x, y[chosen], rtol=2**-7, atol=2**-7)


def test_number_of_multiprocessors_changes_little(device):
    """Down to one program for all tiles of a head, and more heads than programs."""
    for case in (rows(5), rows(5, tokens=9, causal=True), rows(5, tokens=40, causal=True, page_size=16)):
        inputs = make_decode(case, device, seed=1)
        for margin in (1, 17, 131, 5000):
            assert_decode_right(case, inputs, *answer(inputs, sm_margin=margin))


# Streams and graphs


def same_shapes(case, seqlens: tuple[int, ...], seed: int, device):
    """Other numbers in tensors of the same shapes: lengths in another order, so as many pages."""
    assert sorted(seqlens) == sorted(case.seqlens)
    other = dataclasses.replace(case, seqlens=seqlens)
    return other, make_decode(other, device, seed=seed)


@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("case", GRAPHS, ids=name)
def test_a_graph_is_captured_once_and_replayed(gpu, case, with_lse):
    """With other lengths, pages and values than it was captured with; nothing between calls but copies."""
    inputs = make_decode(case, gpu, seed=1)
    call = inputs.tensors | inputs.options
    q = call["q"]
    out, workspace = torch.empty_like(q), decode_workspace(**call)
    memory = dict(out=out, workspace=workspace, return_softmax_lse=with_lse)
    assert tandem_attn.explain_with_kvcache(**call).backend == "gluon"
    flash_attn_with_kvcache(**call, **memory)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = flash_attn_with_kvcache(**call, **memory)
    for seed, seqlens in enumerate(((3, 130, 600), (130, 600, 3), (600, 3, 130), (600, 130, 3)), 2):
        other, numbers = same_shapes(case, seqlens, seed, gpu)
        for field, x in numbers.tensors.items():
            call[field].copy_(x)
        out.fill_(math.nan)
        graph.replay()
        lse = found[1] if with_lse else run_decode(numbers)[1]
        assert_decode_right(other, numbers, out, lse)
        assert torch.equal(out, run_decode(numbers)[0]), "not what a call without a graph gives"


@pytest.mark.parametrize("case", GRAPHS[:3], ids=name)
def test_a_graph_may_bring_its_own_workspace(gpu, case):
    inputs = make_decode(case, gpu, seed=1)
    call = inputs.tensors | inputs.options
    expected = run_decode(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = flash_attn_with_kvcache(**call, return_softmax_lse=True)
    for _ in range(3):
        for x in found:
            x.fill_(math.nan)
        graph.replay()
        run_decode(inputs)  # with the counters of the stream, in between
        assert_same_bits(inputs, expected, found)


@pytest.mark.parametrize("case", REPEATS, ids=name)
def test_two_streams_at_once(gpu, case):
    """Each has its own counters and partial results."""
    one = make_decode(case, gpu, seed=1)
    other_case = rows(33, tokens=3, causal=True)
    other = make_decode(other_case, gpu, seed=2)
    expected = [run_decode(x) for x in (one, other)]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(2)], [[], []]
    for _ in range(20):
        for i, inputs in enumerate((one, other)):
            with torch.cuda.stream(streams[i]):
                found[i].append(run_decode(inputs))
    torch.cuda.synchronize()
    for inputs, want, many in zip((one, other), expected, found, strict=True):
        for got in many:
            assert_same_bits(inputs, want, got)


# Memory


@pytest.mark.parametrize("case", REPEATS, ids=name)
def test_a_call_neither_waits_nor_allocates(gpu, case):
    inputs = make_decode(case, gpu, seed=1)
    assert_neither_waits_nor_allocates(inputs, torch.empty_like(inputs.tensors["q"]))


@pytest.mark.parametrize("case", REPEATS, ids=name)
def test_a_call_without_memory_does_not_wait(gpu, case):
    inputs = make_decode(case, gpu, seed=1)
    run_decode(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run_decode(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_decode_right(case, inputs, *found)


@pytest.mark.parametrize("case", REPEATS, ids=name)
def test_a_workspace_is_left_with_zero_counters(device, case):
    """And what else is in it does not matter: all of it is NaN before the second call."""
    inputs = make_decode(case, device, seed=1)
    workspace = decode_workspace(**inputs.tensors, **inputs.options)
    first = run_decode(inputs, workspace=workspace)
    counters = 0
    if device.type == "cuda":
        from tandem_attn.kernels import launch_decode

        spec = tandem_attn.explain_with_kvcache(**inputs.tensors, **inputs.options).spec
        counters = launch_decode.decode(spec).counter_bytes
        assert 0 < counters <= len(workspace) and torch.count_nonzero(workspace[:counters]) == 0
    for _ in range(2):
        workspace[counters:] = 255
        assert_same_bits(inputs, first, run_decode(inputs, workspace=workspace))
        assert torch.count_nonzero(workspace[:counters]) == 0
    assert_decode_right(case, inputs, *first)


@pytest.mark.parametrize("offset", [GUARD, GUARD + 1], ids=["aligned", "odd"])
@pytest.mark.parametrize(
    "case",
    [
        *REPEATS,
        *(cached(dims=d, tokens=t, causal=True) for d in ((40, 40), (96, 96), (192, 128)) for t in (1, 40)),
        cached(batch=4, seqlens=(600, 0, 3, 64), tokens=(0, 5, 70, 1), causal=True),
        cached(heads=5, kv_heads=1, tokens=30, causal=True),
    ],
    ids=name,
)
def test_nothing_around_results_is_written(device, case, offset):
    """Neither around `out`, nor around `workspace`, nor rows of `out` that are of no sequence."""
    inputs = make_decode(case, device, seed=1)
    shape = (*inputs.tensors["q"].shape[:-1], case.dim_v)
    whole = torch.full((math.prod(shape) + 2 * GUARD + 8,), SENTINEL, dtype=case.dtype, device=device)
    out = whole[offset : offset + math.prod(shape)].view(shape)
    size = len(decode_workspace(**inputs.tensors, **inputs.options))
    around = torch.full((size + 2 * GUARD,), 171, dtype=torch.uint8, device=device)
    workspace = around[GUARD : GUARD + size].zero_()
    found, lse = answer(inputs, out=out, workspace=workspace)
    assert found.data_ptr() == out.data_ptr()
    assert_decode_right(case, inputs, out, lse)
    end = offset + math.prod(shape)
    assert (whole[:offset] == SENTINEL).all() and (whole[end:] == SENTINEL).all()
    assert (around[:GUARD] == 171).all() and (around[GUARD + size :] == 171).all()
    if isinstance(case.tokens, tuple) and offset == GUARD:
        used = sum(case.tokens)
        if device.type == "cuda":  # not promised, but so it is
            assert (out[used:] == SENTINEL).all()


# More than 2**31 elements. On a CPU rehearsed in small.


@pytest.fixture
def big(device):
    """A function from (size on a GPU, size in a rehearsal) to the size."""

    def size(real: int, rehearsed: int) -> int:
        if device.type == "cpu":
            return rehearsed
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < 60:
            pytest.skip(f"{free:.0f} GiB of GPU memory are free; 60 are wanted")
        return real

    yield size
    if device.type == "cuda":
        torch.cuda.empty_cache()


def assert_head(found, q, k, v, first: int = 0) -> None:
    """One query of one head against float64; found is (out row, lse), k and v (keys, dim)."""
    keys, values = k[first:].double(), v[first:].double()
    scores = keys @ q.double() * q.shape[-1] ** -0.5
    torch.testing.assert_close(found[1].double(), scores.logsumexp(0), rtol=0, atol=1e-4)
    expected = scores.softmax(0) @ values
    slack = 2**-7 * float(expected.abs().max())
    torch.testing.assert_close(found[0].double(), expected, rtol=2**-7, atol=slack)


@pytest.mark.parametrize("window", [(-1, -1), (63, 0)], ids=["full", "window"])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("form", ["long", "wide"])
def test_a_cache_above_2_31_elements(device, big, form, tokens, window):
    """By length, and by number of sequences."""
    batch = big(1, 1) if form == "long" else big(270, 3)
    room = big(2_100_000, 900) if form == "long" else big(8192, 70)
    k, v = (torch.randn(batch, room, 8, 128, device=device, dtype=BF16) for _ in range(2))
    assert device.type == "cpu" or k.numel() > 2**31
    q = torch.randn(batch, tokens, 16, 128, device=device, dtype=BF16)
    options = dict(window_size=window, return_softmax_lse=True)
    if device.type == "cuda":
        assert tandem_attn.explain_with_kvcache(q, k, v, window_size=window).backend == "gluon"
    out, lse = flash_attn_with_kvcache(q, k, v, **options)
    first = 0 if window[0] < 0 else room - 64
    for b, head in ((0, 0), (batch - 1, 15), (batch // 2, 3), (batch - 1, 8)):
        assert_head((out[b, -1, head], lse[b, head, -1]), q[b, -1, head], k[b, :, head // 2],
                    v[b, :, head // 2], first)  # fmt: skip
    assert not out.isnan().any() and lse.isfinite().all()


@pytest.mark.parametrize("page_size", [3, 16, 128])
@pytest.mark.parametrize("tokens", [1, 40])
def test_pages_above_2_31_elements(device, big, page_size, tokens):
    """Sequences use the first and last pages of a pool."""
    count = big(2_200_000, 2000) // page_size
    k, v = (torch.randn(count, page_size, 8, 128, device=device, dtype=BF16) for _ in range(2))
    assert device.type == "cpu" or k.numel() > 2**31
    per = -(-600 // page_size)
    table = torch.cat([torch.arange(per), torch.arange(count - 2 * per, count)]).view(3, per)
    table = table.flip(1).to(device, torch.int32).contiguous()
    q = torch.randn(3, tokens, 16, 128, device=device, dtype=BF16)
    seqlens = torch.tensor([600, 411, 577], dtype=torch.int32, device=device)
    call = dict(cache_seqlens=seqlens, page_table=table, causal=True)
    if device.type == "cuda":
        assert tandem_attn.explain_with_kvcache(q, k, v, **call).backend == "gluon"
    out, lse = flash_attn_with_kvcache(q, k, v, **call, return_softmax_lse=True)
    for b, n in enumerate(seqlens.tolist()):
        flat = [x[table[b].long()].flatten(0, 1)[:n] for x in (k, v)]
        for head in (0, 7, 15):
            keys, values = (x[:, head // 2] for x in flat)
            assert_head((out[b, -1, head], lse[b, head, -1]), q[b, -1, head], keys, values)


# Grids and addresses


@pytest.mark.parametrize("facts", [{}, dict(split_size=128), dict(num_splits=2)], ids=str)
def test_more_sequences_than_a_dimension_of_the_grid_holds(device, facts):
    """70 000 items: a second grid dimension ends at 65 535."""
    batch = 70_000 if device.type == "cuda" else 50
    q = torch.randn(batch, 1, 2, 64, device=device, dtype=BF16)
    k, v = (torch.randn(batch, 300, 1, 64, device=device, dtype=BF16) for _ in range(2))
    if device.type == "cuda":
        assert tandem_attn.explain_with_kvcache(q, k, v, **facts).backend == "gluon"
    out, lse = flash_attn_with_kvcache(q, k, v, **facts, return_softmax_lse=True)
    for b in (0, 1, batch // 2, batch - 1):
        for head in range(2):
            assert_head((out[b, 0, head], lse[b, head, 0]), q[b, 0, head], k[b, :, 0], v[b, :, 0])
    assert not out.isnan().any() and lse.isfinite().all()


@pytest.mark.parametrize("case", [rows(128), rows(2, seqlens=(700, 80))], ids=name)
def test_tensors_of_numbers_may_start_anywhere(device, case):
    """A slice of a longer one, after a call with tensors that begin at multiples of 16 bytes.

    The last of the file: a load that wants them aligned would end the CUDA context.
    """
    inputs, _ = checked(case, device)
    for offset in (1, 2, 3):
        seqlens = inputs.tensors["cache_seqlens"]
        inputs.tensors["cache_seqlens"] = torch.cat([seqlens.new_zeros(offset), seqlens])[offset:]
        assert_decode_right(case, inputs, *answer(inputs))
        inputs.tensors["cache_seqlens"] = seqlens
