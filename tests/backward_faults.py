"""Faults for tests/test_protocol_backward.py: what is done to the backward kernels' source, and on which
problems. What comes before a colon says which."""

from tandem_attn.kernels.config_backward import BackwardConfig
from tandem_attn.spec import Window
from tandem_attn.testing.machine import Deadlock, Race

CAUSAL = Window(-1, 0)


class LooseConfig(BackwardConfig):
    """One that may be wrong."""

    def check_own_fields(self) -> None:
        """Nothing is refused."""


def swapped(first: str, second: str) -> dict[str, str]:
    """The fault that two pieces of source change places."""
    return {first + second: second + first}


def released_if(condition: str) -> str:
    """What stands instead of RELEASE if a block goes back only then."""
    return f"        if {condition}:\n    {RELEASE}"


def released_early(condition: str) -> dict[str, str]:
    """The fault that blocks go back before they are read, on this condition."""
    late = released_if(f"not ({condition})")
    return {FINISHED + RELEASE: released_if(condition) + FINISHED + late}


FINISHED = "        x = finished(started, ring.chunks, other.chunks)\n"
RELEASE = "        ring.release(i)\n"
LOADS_Q = (
    "            shared.q.acquire(i)\n"
    "            with_q = lse if c.joint else lse + problem.delta_start\n"
    "            shared.q.fill(i, q_desc, stat_desc, tile.sequence, head, row, with_q)\n"
)
FAULTS = {  # piece of source: what stands there instead
    "rows are not handed back": {"(dk, dv, s))\n    shared.q.release(i)\n": "(dk, dv, s))\n"},
    "rows are handed back while they are read": swapped(
        "    dk, dv, s = warpgroup_mma_wait(0, deps=(dk, dv, s))\n", "    shared.q.release(i)\n"
    ),
    "rows are overwritten before they are handed back": {"            shared.q.acquire(i)\n": ""},
    "one consumer's release counts for both": {"barriers(c.stages, 2)": "barriers(c.stages, 1)"},
    "rows are not waited for": {"    ring.wait(i)\n": ""},
    "K is not waited for": {"    mbarrier.wait(shared.kv_full.index(0), 0)\n": ""},
    "V is not waited for": {"mbarrier.wait(shared.kv_full.index(1), 0)": "pass"},
    "causal: a skipped block is not handed back": {"(started,))\n    shared.q.release(i)": "(started,))"},
    "causal: a skipped block has no dS": {
        "put_ds(problem, shared, group, t, gl.zeros([64, c.tile_m], c.dtype, c.s_accumulator))": "pass"
    },
    "a program ends while its rows land": {"shared.do.wait(0)  # no load": "pass  # no load"},
    "dS is not waited for": {
        "    mbarrier.wait(shared.ds_full.index(t % c.ds_stages), t // c.ds_stages & 1)\n": ""
    },
    "two buffers of dS": {},
    "a half of dS counts for both": {"barriers(c.ds_stages, 2)": "barriers(c.ds_stages, 1)"},
    "dS is read without a fence": {".store(ds)\n    fence_async_shared()\n": ".store(ds)\n"},
    "dQ of the wrong dS": {"t - 1)\n    operand_k": "t)\n    operand_k"},
    "no zeros before the first block": {
        "first_apart:\n        put_ds(problem, shared, group, 0, gl.zeros": "first_apart:\n        (gl.zeros"
    },
    "dK is staged in the stage that is still read": {"gl.maximum(tile.count, 1) %": "(tile.count + 1) %"},
    "dK is staged in K": {"smem = _free_stage(shared, group, tile)": "smem = shared.k.index(group)"},
    "dK and dV are staged without a fence": {
        "(x.to(config.dtype))\n        fence_async_shared()": "(x.to(config.dtype))"
    },
    "a consumer leaves before dK and dV have been read": {"dq)\n    tma_store_wait(0)\n": "dq)\n"},
    "a half of dK goes to the other": {"64 * group\n    smem": "64 - 64 * group\n    smem"},
    "row statistics before they are there": {"gdc_wait()  # for the row": "# for the row"},
    "counters before they are zero": {"    gdc_wait()  # counters are zero\n": ""},
    "packed: a program without keys does not wait": {"gdc_wait()  # so that the end": "pass  # so"},
    "a buffer of dQ is overwritten before it is empty": {
        "        mbarrier.wait(self.empty.index(group), (number & 1) ^ 1)\n": ""
    },
    "a buffer of dQ is read without a fence": {"32]))\n        fence_async_shared()\n": "32]))\n"},
    "a buffer of dQ is not waited for": {"        mbarrier.wait(self.full.index(group), number & 1)\n": ""},
    "a buffer of dQ is handed back while it is read": {"tma_store_wait(0)\n        mbar": "mbar"},
    "a buffer of dQ is not handed back": {"mbarrier.arrive(self.empty.index(group), count=1)": "pass"},
    "unordered: nobody waits for the write": {"_wait_until_at_least(counter, WRITTEN)": "pass"},
    "unordered: everyone who draws adds": {"        if rank == 0:\n": "        if rank < 0:\n"},
    "two blocks: the write is counted after the wait for another's": {
        "        self.finish(before)\n": "",
        "        if rank == 0:\n": "        self.finish(before)\n        if rank == 0:\n",
    },
    "unordered: an add is counted as a write": {"gl.where(rank == 0, place.chunk, -1)": "place.chunk"},
    "everyone writes": {"            tma_reduce_add(": "            tma_store("},
    "counted before it is complete": {" @p cp.async.bulk.wait_group 0;": ""},
    "counted when it is read": {"cp.async.bulk.wait_group 0;": "cp.async.bulk.wait_group.read 0;"},
    "counted without a fence between proxies": {" @p fence.proxy.async;": ""},
    "counted without a release": {"red.release": "red.relaxed"},
    "a counter is read without an acquire": {"ld.acquire": "ld.relaxed"},
    "the last contribution is not counted": {"    adds.finish(before)\n": ""},
    "ordered: nobody waits for a turn": {"_wait_until_at_least(counter, rank)": "pass"},
    "ordered: the first keys go first": {"not c.ordered:\n        block": "True:\n        block"},
    "ordered: ranks the other way round": {
        "rank = n_end - 1 - tile.n_start // c.tile_n": "rank = tile.n_start // c.tile_n - (n_end - count)"
    },
    "full: dQ goes to the rows of another block": {"statistics, tile.block(problem, m))": "statistics, m)"},
    "scattered: dQ goes to the rows of another block": {
        "statistics, tile.block(problem, m))": "statistics, m)"
    },
    "scattered: blocks that need a mask change places": {"gl.where(m < self.whole_begin, m, n)": "n"},
    "scattered: a block is visited twice": {"self.end - self.whole_begin, 0)": "self.end, 0)"},
    "parts: a part is taken for another": {"self.part * problem.heads": "self.kv_head * problem.heads"},
    "parts: parts go to one place": {"problem.num_parts + tile.part": "problem.num_parts + tile.kv_head"},
    # at 256/192 the ring of Q has one piece, that of dO three
    "keys: Q is handed back while dK is computed": released_early("ring.chunks == 1"),
    "keys: dO is handed back while dV is computed": released_early("ring.chunks > 1"),
    "keys: Q is not handed back": {RELEASE: released_if("ring.chunks > 1")},
    "keys: dO is not handed back": {RELEASE: released_if("ring.chunks == 1")},
    "keys: Q is overwritten before it is handed back": {"            shared.q.acquire(i)\n": ""},
    "keys: dO is overwritten before it is handed back": {"    shared.do.acquire(i)\n": "    pass\n"},
    "keys: dO is loaded before Q": {LOADS_Q: "", "            i += 1\n": LOADS_Q + "            i += 1\n"},
    "keys: K is not waited for": {"    mbarrier.wait(shared.kv_full.index(0), 0)\n": ""},
    "keys: V is not waited for": {"    mbarrier.wait(shared.kv_full.index(1), 0)\n": ""},
    "keys: P is not waited for": {
        "    mbarrier.wait(shared.p_full.index(i % c.stages), i // c.stages & 1)\n": ""
    },
    "keys: P is announced before it is there": swapped(
        "    shared.p.index(stage).store(p)\n", "    mbarrier.arrive(shared.p_full.index(stage), count=1)\n"
    ),
    "keys: Q is handed back before P is taken": {
        "    ds = (_take": "    shared.q.release(i)\n    ds = (_take",
        RELEASE: released_if("ring.chunks > 1"),
    },
    "keys: scores after the last": {"c.Mask.masks, True)\n": "c.Mask.masks)\n"},
    "keys: dP after the last": {"tile.count - 1, dp, dk, True)": "tile.count - 1, dp, dk)"},
    "keys: lse and delta change places": {
        "with_q = lse if c.joint else lse + problem.delta_start": "with_q = lse",
        "with_do = lse + problem.delta_start if c.joint else lse": "with_do = lse + problem.delta_start",
    },
    "keys: dV is staged where dP is made from": {"reinterpreted(shared.k": "reinterpreted(shared.v"},
    "keys: dK is staged where scores are made from": {
        "shared.q.chunk(gl.maximum(tile.count, 1), n)": "shared.k.index(n)"
    },
    "keys: dK is staged where the first Q lands": {"gl.maximum(tile.count, 1), n)": "tile.count, n)"},
    "keys: dV leaves before it has been read": {"c.v_chunks)\n    tma_store_wait(0)\n": "c.v_chunks)\n"},
    "keys: dK leaves before it has been read": {
        "n, c.qk_chunks)\n    tma_store_wait(0)\n": "n, c.qk_chunks)\n"
    },
    "keys: row statistics before they are there": {"gdc_wait()  # for the row": "# for the row"},
    "keys: a program without keys does not wait": {"gdc_wait()  # so that the end": "pass  # so"},
    "queries: K is handed back while dQ is computed": {
        "    dq = finished(start_sum(ds, shared.k, i, dq), c.qk_chunks)\n    shared.k.release(i)\n": (
            "    dq = start_sum(ds, shared.k, i, dq)\n    shared.k.release(i)\n"
            "    dq = finished(dq, c.qk_chunks)\n"
        )
    },
    "queries: V is handed back while dP is computed": swapped(
        "    dp = warpgroup_mma_wait(0, deps=(dp,))\n", "    shared.v.release(u)\n"
    ),
    "queries: keys are not waited for": {"    ring.wait(i)\n": ""},
    "queries: rows are not waited for": {"    mbarrier.wait(shared.rows_full.index(group), 0)\n": ""},
    "queries: dQ is staged without a fence": {
        "x.to(c.dtype))\n        fence_async_shared()": "x.to(c.dtype))"
    },
    "queries: dQ is staged in the other's Q": {
        "smem = shared.q.index(group *": "smem = shared.q.index((1 - group) *"
    },
    "queries: a consumer leaves before its dQ has been read": {"    tma_store_wait(0)\n": ""},
    "queries: row statistics before they are there": {"    gdc_wait()\n    at =": "    at ="},
    "queries: dO before it is there": {"        gdc_wait()  # dO may": "        # dO may"},
}  # fmt: skip

BLIND = "a program ends while its rows land"
TWO_BUFFERS = "two buffers of dS"
KINDS = {
    "causal": dict(window=CAUSAL, dims=(128, 128), seqlens=(330, 300)),
    "full": dict(window=Window(), ordered=False),
    "scattered": dict(window=CAUSAL, ordered=False, dims=(128, 128), seqlens=(700, 450)),
    "unordered": dict(ordered=False),
    "two blocks": dict(window=Window(), ordered=False, varlen=False, dims=(64, 64), seqlens=(256, 400)),
    "ordered": dict(ordered=True),
    "packed": dict(varlen=True),
    "parts": dict(heads=(1, 2, 2), parts=2),
    "keys": dict(dims=(256, 192)),
    "queries": dict(dims=(256, 256)),
    BLIND: dict(window=Window(70, 0), seqlens=(20, 300)),
    TWO_BUFFERS: dict(kind=LooseConfig, ds_stages=2),
}

NAMED = {
    "rows are not handed back": (Deadlock, "wait for ever"),
    "rows are handed back while they are read": (Race, "TMA load .* a read by .*consumer"),
    "dS is read without a fence": (Race, "wgmma .* without a fence"),
    "a buffer of dQ is handed back while it is read": (Race, "stores: a read by .*add_dq"),
    TWO_BUFFERS: (Race, "consumer"),
    "row statistics before they are there": (Race, "before the launch before has ended"),
    "counted before it is complete": (Race, "chunk .* may not be complete"),
    "everyone writes": (Race, "chunk .* written already"),
    "ordered: the first keys go first": (Deadlock, "add_dq"),
}
