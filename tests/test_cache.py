"""PagedKVCache: one rule of the pool at a time. `test_cache_model.py` has the helpers, and random lives."""

import numpy as np
import pytest
import torch
from test_cache_model import (
    DIM,
    DIM_V,
    HEADS,
    LAYERS,
    check_contents,
    check_pool,
    grow,
    make,
    same,
    start,
    state,
    store,
)

from tandem_attn.cache import PoolExhausted, SequenceHandle


def test_shapes_and_types():
    cache = make(dtype=torch.bfloat16, max_pages_per_sequence=5)
    assert cache.k.shape == (LAYERS, 8, 4, HEADS, DIM) and cache.v.shape == (LAYERS, 8, 4, HEADS, DIM_V)
    assert cache.k.dtype == cache.v.dtype == torch.bfloat16
    assert cache.page_table.shape == (4, 5) and cache.seqlens.shape == (4,)
    assert cache.page_table.dtype == cache.seqlens.dtype == torch.int32
    assert cache.capacity == 20 and cache.free_pages == 8
    assert make(head_dim_v=None).v.shape[-1] == DIM and make().page_table.shape == (4, 8)
    assert "8 of 8 pages of 4 tokens free, 0 of 4 sequences" in repr(cache)


SIZES = "num_layers num_pages page_size num_kv_heads head_dim head_dim_v max_sequences max_pages_per_sequence"


@pytest.mark.parametrize("name", SIZES.split())
def test_sizes_are_positive_integers(name):
    with pytest.raises(ValueError, match=rf"{name} is 0; supported: at least 1"):
        make(**{name: 0})
    for wrong in (2.0, True, "2"):
        with pytest.raises(TypeError, match=rf"{name} is {wrong!r} .*supported: int"):
            make(**{name: wrong})


def test_dtype_is_a_float():
    with pytest.raises(TypeError, match=r"dtype is torch.int8; supported: torch.float16, torch.bfloat16"):
        make(dtype=torch.int8)


def test_tokens_go_where_the_table_says():
    cache = make()
    a, found = start(cache, [1, 2, 3, 4, 5])
    b, _ = start(cache, [7] * 4, tell=False)
    assert found == 0 and cache.free_pages == 5
    tokens = grow(cache, a, [1, 2, 3, 4, 5], [6, 7, 8, 9])
    check_contents(cache, a, tokens)
    check_contents(cache, b, [7] * 4)
    check_pool(cache)
    assert len(cache.pages(a)) == 3


def test_a_page_is_taken_only_when_a_token_needs_it():
    cache = make()
    handle, _ = start(cache, [1, 2, 3])
    for used, tokens in ((1, [4]), (2, [5]), (2, [6])):
        cache.reserve([handle], 1)
        assert cache.num_pages - cache.free_pages == used
        cache.commit([handle], 1, [tokens])
    cache.reserve([handle], 0)
    assert cache.num_pages - cache.free_pages == 2


def test_tensors_never_move():
    cache = make()
    names = ("k", "v", "page_table", "seqlens")
    before = [getattr(cache, name).data_ptr() for name in names]
    handle, _ = start(cache, [1, 2, 3, 4, 5])
    grow(cache, cache.fork(handle)[0], [1, 2, 3, 4, 5], [6])
    first = [x.data_ptr() for x in cache.batch([handle])]
    cache.free(handle)
    other, _ = start(cache, [5])
    assert [x.data_ptr() for x in cache.batch([other])] == first
    assert [getattr(cache, name).data_ptr() for name in names] == before


def test_a_rejected_token_is_overwritten():
    """Speculative decoding: more is reserved and written than is committed."""
    cache = make()
    handle, _ = start(cache, [1, 2, 3])
    cache.reserve([handle], 4)
    store(cache, handle, [1, 2, 3, 4, 5, 0, 0], 3)
    cache.commit([handle], 2, [[4, 5]])
    check_contents(cache, handle, [1, 2, 3, 4, 5])
    check_contents(cache, handle, grow(cache, handle, [1, 2, 3, 4, 5], [6]))
    assert start(cache, [1, 2, 3, 4, 5, 0, 0, 0, 0])[1] == 4  # the rejected ones are nobody's prefix


def test_commit_needs_a_reservation():
    cache = make()
    handle = cache.allocate([1, 2, 3])
    with pytest.raises(ValueError, match=r"counts is 1 for SequenceHandle\(slot=0.*at most the 0 tokens res"):
        cache.commit([handle], 1)
    cache.reserve([handle], 3)
    cache.reserve([handle], 2)  # instead of the 3
    with pytest.raises(ValueError, match=r"counts is 3 .*at most the 2 tokens reserved"):
        cache.commit([handle], 3)
    cache.commit([handle], 2)
    with pytest.raises(ValueError, match=r"at most the 0 tokens reserved"):
        cache.commit([handle], 1)


def test_counts_and_handles_are_checked():
    cache = make()
    a, b = cache.allocate(), cache.allocate()
    before = state(cache)
    wrong = [
        (TypeError, "counts is 1.0 ", ([a, b], 1.0)),
        (TypeError, "counts is True ", ([a, b], True)),
        (TypeError, "counts is '1' ", ([a, b], [1, "1"])),
        (ValueError, "counts is -1; supported: at least 0", ([a, b], [1, -1])),
        (ValueError, "counts is of length 1; supported: one for each of 2 handles", ([a, b], [1])),
        (ValueError, "handles is .*supported: each sequence once", ([a, a], 1)),
        (TypeError, "handles is SequenceHandle; supported: a list or tuple", (a, 1)),
        (TypeError, "handles is 0 .*supported: what allocate and fork return", ([0], 1)),
    ]
    for method in (cache.reserve, cache.commit):
        for error, message, arguments in wrong:
            with pytest.raises(error, match=message):
                method(*arguments)
    assert same(before, state(cache))


@pytest.mark.parametrize(
    ("error", "message", "tokens"),
    [
        (ValueError, r"tokens is of length 1; supported: one for each of 2", [[1]]),
        (ValueError, r"tokens is 1 ids for .*as many as are committed, 2", [None, [1]]),
        (ValueError, r"tokens is \[1, 9\] for .*those of its prompt, \[1, 2\]", [[1, 9], None]),
        (ValueError, r"tokens is .*supported: a sequence of ints of 64 bits", [None, [1, 2**63]]),
        (TypeError, r"tokens is .*supported: a sequence of ints", [None, [1, 2.0]]),
        (TypeError, r"tokens is Tensor; supported: .*its tolist", [None, torch.ones(2)]),
        (TypeError, r"tokens is 3 .*supported: a sequence of ints", [None, 3]),
        (TypeError, r"tokens is int; supported: None, or a list", 3),
    ],
)
def test_tokens_are_checked_before_anything_is_counted(error, message, tokens):
    cache = make()
    a, b = cache.allocate([1, 2, 3]), cache.allocate()
    cache.reserve([a, b], 2)
    before = state(cache)
    with pytest.raises(error, match=message):
        cache.commit([a, b], 2, tokens)
    assert same(before, state(cache))


def test_prompts_are_checked():
    cache = make(max_pages_per_sequence=2)
    before = state(cache)
    for prompt, error, message in (
        (-1, ValueError, "prompt is -1; supported: at least 0"),
        (True, TypeError, "prompt is True"),
        ("abc", TypeError, "prompt is str; supported: a sequence of ints"),
        ([1.5], TypeError, "prompt is .*supported: a sequence of ints"),
        (9, ValueError, "prompt is 9 tokens; supported: sequences of up to 8 tokens"),
        ([1] * 9, ValueError, "prompt is 9 tokens; supported: sequences of up to 8 tokens"),
    ):
        with pytest.raises(error, match=message):
            cache.allocate(prompt)
    assert same(before, state(cache))
    assert cache.length(cache.allocate(np.arange(3))) == 0


def test_a_sequence_cannot_outgrow_its_row():
    cache = make(max_pages_per_sequence=2)
    handle, _ = start(cache, [1] * 7)
    other = cache.allocate()
    before = state(cache)
    with pytest.raises(ValueError, match=r"counts is 2 after 7 tokens; supported: sequences of up to 8"):
        cache.reserve([other, handle], [1, 2])
    assert same(before, state(cache))
    grow(cache, handle, [1] * 7, [2])


def test_a_freed_handle_is_refused_even_if_its_slot_lives_again():
    cache = make()
    stale, _ = start(cache, [1, 2])
    cache.free(stale)
    again, _ = start(cache, [3])
    assert again.slot == stale.slot and again != stale
    before = state(cache)
    uses = (
        cache.free,
        cache.fork,
        cache.length,
        cache.pages,
        lambda h: cache.reserve([again, h], 1),
        lambda h: cache.commit([again, h], 0),
        lambda h: cache.batch([again, h]),
    )
    for use in uses:
        with pytest.raises(ValueError, match=r"SequenceHandle\(slot=0, generation=0\), which was freed"):
            use(stale)
    foreign = make().allocate()
    for use in uses:
        with pytest.raises(ValueError, match=r"of another cache; supported: handles of this cache"):
            use(foreign)
        with pytest.raises(TypeError, match=r"is 0 \(int\); supported: what allocate and fork return"):
            use(0)
    assert same(before, state(cache))
    with pytest.raises(AttributeError):
        again.slot = 1
    assert again in {SequenceHandle(cache, again.slot, again.generation)}


def test_double_free():
    cache = make()
    handle, _ = start(cache, [1] * 6)
    cache.free(handle)
    assert cache.free_pages == 8
    with pytest.raises(ValueError, match=r"handle is .*which was freed; supported: handles of living"):
        cache.free(handle)
    check_pool(cache)


def test_a_full_pool_raises_before_anything_is_written():
    cache = make(num_pages=5)
    a, _ = start(cache, [1] * 8)
    b, _ = start(cache, [2] * 7)
    before = state(cache)
    with pytest.raises(PoolExhausted, match=r"2 pages needed, 1 free") as caught:
        cache.reserve([a, b], 2)
    assert (caught.value.needed, caught.value.free, caught.value.what) == (2, 1, "pages")
    with pytest.raises(PoolExhausted, match=r"3 pages needed, 1 free"):
        cache.allocate(9)
    with pytest.raises(
        PoolExhausted, match=r"2 pages needed, 1 free"
    ):  # of its 5 pages 2 are found, not free
        cache.allocate([1] * 16)
    assert same(before, state(cache))
    cache.free(b)
    cache.reserve([a], 2)


def test_pages_found_in_the_pool_are_not_counted_as_free():
    cache = make(num_pages=3)
    a, _ = start(cache, [1] * 8)
    b, _ = start(cache, [2])
    cache.free(a)
    before = state(cache)
    with pytest.raises(PoolExhausted, match=r"1 pages needed, 0 free"):
        cache.allocate([1] * 12)
    assert same(before, state(cache))
    cache.free(b)
    assert cache.length(cache.allocate([1] * 12)) == 8


def test_slots_run_out():
    cache = make(max_sequences=2)
    handle, _ = start(cache, [1])
    before = state(cache)
    with pytest.raises(PoolExhausted, match=r"2 sequence slots needed, 1 free"):
        cache.fork(handle, 2)
    assert same(before, state(cache))
    cache.fork(handle)
    with pytest.raises(PoolExhausted, match=r"1 sequence slots needed, 0 free"):
        cache.allocate()


def test_forks_share_until_they_diverge():
    cache = make()
    parent, _ = start(cache, [1, 2, 3, 4, 5, 6])
    full, last = cache.pages(parent)
    children = cache.fork(parent, 2)
    assert cache.free_pages == 6 and all(cache.pages(c) == (full, last) for c in children)
    family = [parent, *children]
    cache.reserve(family, 1)
    assert cache.free_pages == 4  # two copies: the last one has the page for itself
    assert cache.pages(children[1]) == (full, last)
    assert len({cache.pages(x)[1] for x in family}) == 3
    for i, x in enumerate(family):
        store(cache, x, [1, 2, 3, 4, 5, 6, 10 + i], 6)
    cache.commit(family, 1)
    for i, x in enumerate(family):
        check_contents(cache, x, [1, 2, 3, 4, 5, 6, 10 + i])
    cache.free(parent)
    check_contents(cache, children[0], [1, 2, 3, 4, 5, 6, 11])
    check_pool(cache)


def test_a_fork_at_a_page_border_copies_nothing():
    cache = make()
    parent, _ = start(cache, [1, 2, 3, 4])
    (child,) = cache.fork(parent)
    grow(cache, parent, [1, 2, 3, 4], [5])
    grow(cache, child, [1, 2, 3, 4], [6])
    assert cache.free_pages == 5
    assert cache.pages(parent)[0] == cache.pages(child)[0]


def test_a_copy_needs_a_page_too():
    cache = make(num_pages=1)
    parent, _ = start(cache, [1, 2])
    (child,) = cache.fork(parent)
    before = state(cache)
    with pytest.raises(PoolExhausted, match=r"1 pages needed, 0 free"):
        cache.reserve([child], 1)
    assert same(before, state(cache))
    cache.reserve([child], 0)  # nothing to write, nothing to copy
    cache.free(parent)
    check_contents(cache, child, grow(cache, child, [1, 2], [3]))


def test_pages_for_the_rest_of_a_prompt_are_not_shared_by_a_fork():
    cache = make()
    parent = cache.allocate([1, 2, 3, 4, 5, 6, 7, 8, 9])
    tokens = grow(cache, parent, [], [1, 2, 3, 4, 5], tell=False)
    (child,) = cache.fork(parent)
    assert len(cache.pages(parent)) == 3 and len(cache.pages(child)) == 2
    other = grow(cache, child, tokens, [60, 70, 80, 90])  # not what the prompt says: it is the parent's
    check_contents(cache, parent, grow(cache, parent, tokens, [6, 7, 8, 9], tell=False))
    check_contents(cache, child, other)
    assert start(cache, [1, 2, 3, 4, 5, 60, 70, 80, 0])[1] == 8
    check_pool(cache)


def test_a_fork_with_reserved_tokens_is_refused():
    """They could be written into a page that is shared by then."""
    cache = make()
    handle, _ = start(cache, [1])
    cache.reserve([handle], 2)
    with pytest.raises(ValueError, match=r"handle is .*with 2 tokens reserved; supported: commit first"):
        cache.fork(handle)
    cache.commit([handle], 0)
    with pytest.raises(ValueError, match=r"n is 0; supported: at least 1"):
        cache.fork(handle, 0)
    cache.fork(handle)


def test_a_prefix_is_found_while_its_sequence_lives_and_after():
    cache = make()
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    a, _ = start(cache, prompt)
    b = cache.allocate([*prompt[:8], 10])
    assert cache.length(b) == 8 and cache.pages(b)[:2] == cache.pages(a)[:2]
    assert cache.seqlens.tolist()[:2] == [9, 8]
    check_contents(cache, b, grow(cache, b, prompt[:8], [10], tell=False))
    cache.free(a)
    cache.free(b)
    c = cache.allocate(prompt)
    assert cache.length(c) == 8
    check_contents(cache, c, prompt[:8])
    check_pool(cache)


@pytest.mark.parametrize("page_size", [1, 4])
def test_the_last_token_of_a_prompt_is_always_left_to_compute(page_size):
    cache = make(page_size=page_size, num_pages=9)
    start(cache, [1] * 8)
    for n in range(1, 9):
        handle = cache.allocate([1] * n)
        assert cache.length(handle) == (n - 1) // page_size * page_size
        cache.free(handle)


def test_a_prefix_depends_on_every_token_before_it():
    cache = make(num_pages=16)
    start(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    assert start(cache, [0, 2, 3, 4, 5, 6, 7, 8, 9])[1] == 0
    assert start(cache, [1, 2, 3, 4, 5, 6, 7, 0, 9])[1] == 4
    assert start(cache, [5, 6, 7, 8, 9])[1] == 0


def test_only_committed_pages_are_found():
    cache = make()
    a = cache.allocate([1] * 8)
    assert cache.length(cache.allocate([1] * 8)) == 0
    cache.reserve([a], 8)
    cache.commit([a], 7)
    assert cache.length(cache.allocate([1] * 9)) == 4


def test_generated_tokens_are_found_if_they_were_told():
    cache = make()
    a, _ = start(cache, [1, 2])
    tokens = grow(cache, a, [1, 2], [3])
    tokens = grow(cache, a, tokens, [4, 5])
    assert start(cache, [1, 2, 3, 4, 0])[1] == 4
    tokens = grow(cache, a, tokens, [6], tell=False)
    for more in ([7, 8], [9, 10]):  # one before them is unknown
        tokens = grow(cache, a, tokens, more)
    assert start(cache, [1, 2, 3, 4, 5, 6, 7, 8, 0])[1] == 4
    assert start(cache, [1, 2, 3, 4, 5, 8, 9, 10, 0])[1] == 4
    check_pool(cache)


def test_forks_tell_their_tokens_apart():
    cache = make(num_pages=12)
    parent, _ = start(cache, [1, 2])
    for child, more in zip(cache.fork(parent, 2), ([3, 4], [5, 6]), strict=True):
        grow(cache, child, [1, 2], more)
    grow(cache, parent, [1, 2], [7, 8])
    for more in ([3, 4], [5, 6], [7, 8]):
        handle = cache.allocate([1, 2, *more, 0])
        check_contents(cache, handle, [1, 2, *more])
        cache.free(handle)


def test_a_prompt_and_tokens_after_it_in_one_commit():
    cache = make()
    a = cache.allocate([1, 2])
    grow(cache, a, [], [1, 2, 3, 4, 5])
    b = cache.allocate([1, 2, 3, 4, 5])
    grow(cache, b, [1, 2, 3, 4], [5, 6], tell=False)
    assert cache.length(b) == 6
    cache.free(a)
    assert start(cache, [1, 2, 3, 4, 0])[1] == 4


@pytest.mark.parametrize(("token", "found"), [(1, 4), (2, 8)])
def test_the_longest_unused_prefix_is_given_up_first_and_from_its_end(token, found):
    cache = make(num_pages=6)
    old, _ = start(cache, [1] * 8)
    new, _ = start(cache, [2] * 8)
    cache.free(old)
    cache.free(new)
    start(cache, [3] * 12)  # the two pages that never held anything, and the end of the old prefix
    assert cache.length(cache.allocate([token] * 9)) == found
    check_pool(cache)


def test_pages_that_nobody_can_find_are_taken_before_a_prefix():
    cache = make(num_pages=3)
    prefix, _ = start(cache, [1] * 4)
    other, _ = start(cache, [2] * 8, tell=False)
    cache.free(prefix)
    cache.free(other)
    start(cache, [3] * 4)
    assert cache.length(cache.allocate([1] * 5)) == 4


def test_a_prefix_that_was_overwritten_is_gone():
    cache = make(num_pages=2)
    a, _ = start(cache, [1] * 8)
    cache.free(a)
    b, _ = start(cache, [2] * 8)
    cache.free(b)
    assert start(cache, [1] * 8)[1] == 0
    check_pool(cache)


def test_page_size_one():
    cache = make(page_size=1)
    a, _ = start(cache, [1, 2, 3])
    (b,) = cache.fork(a)
    check_contents(cache, b, grow(cache, b, [1, 2, 3], [4]))
    check_contents(cache, a, grow(cache, a, [1, 2, 3], [5]))
    assert cache.free_pages == 3
    cache.free(a)
    assert start(cache, [1, 2, 9])[1] == 2
    check_pool(cache)


def test_a_batch_is_rows_in_the_order_asked_for():
    cache = make()
    a, _ = start(cache, [1] * 5)
    b, _ = start(cache, [2] * 3)
    c, _ = start(cache, [3])
    cache.reserve([c, a], [4, 2])
    batch = cache.batch([c, a])
    for row, handle in zip(batch.page_table, (c, a), strict=True):
        assert row[:2].tolist() == [*cache.pages(handle)]
    assert batch.cache_seqlens.tolist() == [1, 5] and batch.cu_seqlens_new.tolist() == [0, 4, 6]
    assert all(x.is_contiguous() and x.dtype == torch.int32 for x in batch)
    padded = cache.batch([b, a], rows=4)
    assert padded.page_table.shape == (4, 8)
    assert padded.cache_seqlens.tolist() == [3, 5, 0, 0] and padded.cu_seqlens_new.tolist() == [0, 0, 2, 2, 2]
    empty = cache.batch([])
    assert [x.shape[0] for x in empty] == [0, 0, 1]
    for rows, error in ((1, ValueError), (5, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match=rf"rows is {rows}"):
            cache.batch([a, b], rows)


def test_a_batch_of_all_slots_is_the_cache_itself():
    cache = make()
    a, _ = start(cache, [1] * 5)
    b, _ = start(cache, [2] * 3)
    cache.free(a)
    cache.reserve([b], 2)
    batch = cache.batch()
    assert batch.page_table is cache.page_table and batch.cache_seqlens is cache.seqlens
    assert batch.cache_seqlens.tolist() == [0, 3, 0, 0]
    assert batch.cu_seqlens_new.tolist() == [0, 0, 2, 2, 2]
    with pytest.raises(ValueError, match=r"rows is 2; supported: None or 4 without handles"):
        cache.batch(rows=2)
