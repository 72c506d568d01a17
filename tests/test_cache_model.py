"""PagedKVCache against a model: a list of tokens for each sequence, through random lives of them.

Keys and values are numbers made from a token and everything before it, so that a page shared wrongly shows.
"""

import copy
import itertools
import zlib

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import tandem_attn
from tandem_attn.cache import PagedKVCache, PoolExhausted

LAYERS, HEADS, DIM, DIM_V = 2, 2, 3, 1


def make(num_pages=8, page_size=4, max_sequences=4, **kwargs):
    sizes = dict(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, head_dim_v=DIM_V, dtype=torch.float32)
    sizes |= dict(num_pages=num_pages, page_size=page_size, max_sequences=max_sequences, device="cpu")
    return PagedKVCache(**(sizes | kwargs))


def stamps(tokens):
    """A number for each token that depends on it and all before it, as its keys and values do."""
    return [zlib.crc32(repr(tokens[: i + 1]).encode()) % 2**20 for i in range(len(tokens))]


def store(cache, handle, tokens, start):
    """Write tokens[start:] where the cache says, into pages that must be nobody else's."""
    for i, stamp in [*enumerate(stamps(tokens))][start:]:
        page = int(cache.page_table[handle.slot, i // cache.page_size])
        assert cache._references[page] == 1 and cache._digest_of[page] is None
        for layer in range(LAYERS):
            cache.k[layer, page, i % cache.page_size] = stamp + layer
            cache.v[layer, page, i % cache.page_size] = -stamp - layer


def check_contents(cache, handle, tokens):
    """What attention would gather through the page table is what the model says."""
    assert cache.length(handle) == cache.seqlens[handle.slot] == len(tokens)
    pages = cache.page_table[handle.slot][: len(cache.pages(handle))]
    assert pages.tolist() == [*cache.pages(handle)]
    for layer in range(LAYERS):
        expected = torch.tensor(stamps(tokens), dtype=torch.float32) + layer
        k = cache.k[layer, pages].flatten(0, 1)[: len(tokens)]
        v = cache.v[layer, pages].flatten(0, 1)[: len(tokens)]
        assert torch.equal(k, expected[:, None, None].expand_as(k))
        assert torch.equal(v, -expected[:, None, None].expand_as(v))


def grow(cache, handle, before, more, tell=True):
    """One pass of the protocol for one sequence; its tokens after it."""
    cache.reserve([handle], len(more))
    after = before + more
    store(cache, handle, after, len(before))
    cache.commit([handle], len(more), [more] if tell else None)
    return after


def start(cache, prompt, tell=True):
    """A sequence with its whole prompt computed, and how many tokens of it were there already."""
    handle = cache.allocate(prompt if tell else len(prompt))
    found = cache.length(handle)
    grow(cache, handle, prompt[:found], prompt[found:], tell=False)
    return handle, found


def state(cache):
    """Everything that an error must leave alone."""
    host = {name: x for name, x in vars(cache).items() if not isinstance(x, torch.Tensor)}
    host.pop("_generations")
    host = {name: copy.deepcopy(x) for name, x in host.items()} | {"free": [*cache._free]}
    tensors = [x.clone() for x in (cache.k, cache.v, cache.page_table, cache.seqlens)]
    return host, tensors


def same(a, b):
    return a[0] == b[0] and all(map(torch.equal, a[1], b[1]))


def check_pool(cache):
    """References are what the tables say; a page is free or used; only free or full pages are findable."""
    held = [page for s in cache._live.values() for page in s.pages]
    assert cache._references == [held.count(page) for page in range(cache.num_pages)]
    assert set(cache._free) == set(range(cache.num_pages)) - set(held)
    assert cache.free_pages == cache.num_pages - len(set(held))
    assert {page: d for page, d in enumerate(cache._digest_of) if d} == {
        page: d for d, page in cache._page_of.items()
    }
    assert sorted([*cache._live, *cache._idle_slots]) == [*range(cache.max_sequences)]
    assert all(len(set(s.pages)) == len(s.pages) for s in cache._live.values())
    for slot in cache._idle_slots:
        assert cache.seqlens[slot] == 0


@pytest.mark.gpu
def test_the_device_is_never_waited_for(device):
    cache = make(device=device)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        parent = cache.allocate([1, 2, 3, 4, 5])
        cache.reserve([parent], 5)
        cache.batch([parent], rows=4), cache.batch()
        cache.commit([parent], 5)
        family = [parent, *cache.fork(parent)]
        cache.reserve(family, 1)  # one copies its last page
        batch = cache.batch(family, rows=3)
        cache.commit(family, 1, [[6], [7]])
        cache.free(parent)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert batch.cache_seqlens.tolist() == [5, 5, 0] and batch.cu_seqlens_new.tolist() == [0, 1, 2, 2]
    assert cache.seqlens.tolist() == [0, 6, 0, 0]
    assert cache.page_table[1, :2].tolist() == [*cache.pages(family[1])]
    check_pool(cache)


with_kvcache = pytest.mark.skipif(
    not hasattr(tandem_attn, "flash_attn_with_kvcache"), reason="flash_attn_with_kvcache is not there yet"
)


@with_kvcache
@pytest.mark.parametrize("page_size", [1, 4])
def test_generation_gives_what_attention_over_everything_gives(page_size):
    """A prompt, a second one that shares its beginning, a fork, and steps of all three at once."""
    torch.manual_seed(0)
    cache = make(num_pages=64, page_size=page_size, num_kv_heads=2, head_dim=8, head_dim_v=8, num_layers=1)
    table = torch.randn(3, 16, 2, 8)  # q, k and v of each token
    attend = tandem_attn.flash_attn_with_kvcache

    def forward(handles, texts, counts):
        cache.reserve(handles, counts)
        batch = cache.batch(handles, rows=4)
        new = [text[cache.length(h) :][:n] for h, text, n in zip(handles, texts, counts, strict=True)]
        q, k, v = table[:, [*itertools.chain(*new)]]
        starts = batch.cu_seqlens_new
        lengths = dict(cu_seqlens_q=starts, cu_seqlens_k_new=starts, max_seqlen_q=max(counts))
        where = dict(cache_seqlens=batch.cache_seqlens, page_table=batch.page_table)
        out = attend(q, cache.k[0], cache.v[0], k, v, causal=True, **where, **lengths)
        ends = [cache.length(h) + n for h, n in zip(handles, counts, strict=True)]
        cache.commit(handles, counts, new)
        for i, (text, end, n) in enumerate(zip(texts, ends, counts, strict=True)):
            full = tandem_attn.flash_attn_func(*table[:, text[:end]].unsqueeze(1), causal=True)[0]
            torch.testing.assert_close(out[starts[i] : starts[i] + n], full[end - n :])

    a_text, b_text = [*range(11)], [*range(8), 15, 14, 13, 12]
    a = cache.allocate(a_text[:9])
    forward([a], [a_text], [9])
    b = cache.allocate(b_text[:9])
    assert cache.length(b) == 8
    (c,) = cache.fork(a)
    c_text = [*range(9), 5, 5, 5]
    forward([b, c], [b_text, c_text], [1, 1])
    for _ in range(2):
        forward([c, a, b], [c_text, a_text, b_text], [1, 1, 1])
    check_pool(cache)


class Generation(RuleBasedStateMachine):
    """Requests come, grow, fork and go, in a pool that is too small for them."""

    tokens = st.integers(0, 1)  # few, so that prefixes meet

    @initialize(page_size=st.sampled_from([1, 2, 3]), num_pages=st.integers(3, 12))
    def make(self, page_size, num_pages):
        self.cache = make(num_pages, page_size, max_sequences=4)
        self.texts, self.gone = {}, []

    def fits(self, call, *arguments):
        """Whether the pool had room for a call, and its result; if not, nothing may have changed."""
        before, full = state(self.cache), None
        try:
            return True, call(*arguments)
        except PoolExhausted as error:
            full = error
        assert full.needed > full.free and same(before, state(self.cache))
        return False, None

    def chosen(self, data):
        return data.draw(st.sampled_from(sorted(self.texts, key=lambda h: h.slot)))

    @rule(prompt=st.lists(tokens, max_size=9), known=st.booleans())
    def request(self, prompt, known):
        if len(prompt) > self.cache.capacity:
            return
        room, handle = self.fits(self.cache.allocate, prompt if known else len(prompt))
        if room:
            found = self.cache.length(handle)
            assert found < max(1, len(prompt)) and found % self.cache.page_size == 0
            self.texts[handle] = prompt[:found]
            self.texts[handle] = grow(self.cache, handle, prompt[:found], prompt[found:], tell=False)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), n=st.integers(0, 4), tell=st.booleans())
    def step(self, data, n, tell):
        handles = data.draw(st.permutations(sorted(self.texts, key=lambda h: h.slot)))[:3]
        handles = [h for h in handles if len(self.texts[h]) + n <= self.cache.capacity]
        if not self.fits(self.cache.reserve, handles, n)[0]:
            return
        drafts = [data.draw(st.lists(self.tokens, min_size=n, max_size=n)) for _ in handles]
        counts = [data.draw(st.integers(0, n)) for _ in handles]
        for handle, draft in zip(handles, drafts, strict=True):
            store(self.cache, handle, self.texts[handle] + draft, len(self.texts[handle]))
        taken = [draft[:count] for draft, count in zip(drafts, counts, strict=True)]
        self.cache.commit(handles, counts, taken if tell else None)
        for handle, more in zip(handles, taken, strict=True):
            self.texts[handle] = self.texts[handle] + more

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), n=st.integers(1, 2))
    def fork(self, data, n):
        parent = self.chosen(data)
        for child in self.fits(self.cache.fork, parent, n)[1] or []:
            self.texts[child] = self.texts[parent]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def free(self, data):
        handle = self.chosen(data)
        self.cache.free(handle)
        del self.texts[handle]
        self.gone.append(handle)

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def free_again(self, data):
        before = state(self.cache)
        with pytest.raises(ValueError, match="which was freed"):
            self.cache.free(data.draw(st.sampled_from(self.gone)))
        assert same(before, state(self.cache))

    @invariant()
    def holds(self):
        if hasattr(self, "cache"):
            check_pool(self.cache)
            for handle, text in self.texts.items():
                check_contents(self.cache, handle, text)


Generation.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestGeneration = Generation.TestCase
