"""Calls over a cache: every mistake is named, and writes nothing."""

import math

import pytest
import torch

from tandem_attn import flash_attn_combine, merge_attention_states
from tandem_attn.testing.decode_inputs import DecodeCase, assert_cache_right, make_decode, run_decode

F32 = torch.float32


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


# Mistakes: a case, what replaces its arguments (or a function of the inputs), the error, what it says

DENSE = dict(dtype=F32)
APPEND = dict(dtype=F32, new=2, tokens=2)
PACKED = dict(dtype=F32, new=(3, 1), tokens=(2, 2))
PAGED = dict(dtype=F32, page_size=8, new=2, tokens=2)
ROTARY = dict(dtype=F32, new=2, tokens=2, rotary="interleaved", causal=True)
ROWS = dict(dtype=F32, new=2, tokens=2, batch_idx=(3, 1))


def longer(name, dim=0):
    """The same argument, one row more."""
    return lambda given: {name: torch.cat((given[name], given[name].narrow(dim, 0, 1)), dim)}


def with_(name, change):
    return lambda given: {name: change(given[name])}


MISTAKES = {
    # types
    "q": (DENSE, {"q": None}, TypeError, "q is NoneType; supported: a torch.Tensor"),
    "k_cache": (DENSE, {"k_cache": [1]}, TypeError, "k_cache is list; supported: a torch.Tensor"),
    "table": (DENSE, {"page_table": [[1]]}, TypeError, "page_table is list"),
    "length": (DENSE, {"cache_seqlens": 3.0}, TypeError, r"cache_seqlens is 3.0 \(float\); supported: int"),
    "bool length": (DENSE, {"cache_seqlens": True}, TypeError, r"cache_seqlens is True \(bool\)"),
    "longest": (PACKED, {"max_seqlen_q": "2"}, TypeError, r"max_seqlen_q is '2' \(str\); supported: int"),
    # what belongs together
    "v without k": (DENSE, {"v": torch.zeros(2, 1, 2, 16)}, ValueError, "k is None; supported: .* with v"),
    "k without v": (APPEND, {"v": None}, ValueError, "v is None; supported: a torch.Tensor together with k"),
    "k without lengths": (
        APPEND,
        {"cache_seqlens": None},
        ValueError,
        "cache_seqlens is None; supported: the",
    ),
    "starts without k": (
        DENSE,
        {"cu_seqlens_k_new": int32(0, 1, 2)},
        ValueError,
        "cu_seqlens_k_new is given",
    ),
    "cos without sin": (ROTARY, {"rotary_sin": None}, ValueError, "rotary_sin is None; .* with rotary_cos"),
    "sin without cos": (ROTARY, {"rotary_cos": None}, ValueError, "rotary_cos is None; .* with rotary_sin"),
    "starts without tables": (DENSE, {"rotary_seqlens": int32(1, 2)}, ValueError, "rotary_seqlens is given"),
    "no longest": (PACKED, {"max_seqlen_q": None}, ValueError, "max_seqlen_q is None; supported: int"),
    "rows of pages": (
        PAGED,
        {"cache_batch_idx": int32(0, 1)},
        ValueError,
        "cache_batch_idx is given with page_",
    ),
    # elements
    "q rank": (DENSE, with_("q", lambda x: x[0]), ValueError, "q is a tensor of shape .*; supported: 4 dim"),
    "packed rank": (PACKED, with_("q", lambda x: x[None]), ValueError, "q is .*; supported: 3 dimensions"),
    "cache rank": (DENSE, with_("v_cache", lambda x: x[0]), ValueError, r"v_cache is .*\(batch, capacity"),
    "page rank": (PAGED, with_("k_cache", lambda x: x[0]), ValueError, r"k_cache is .*\(pages, page_size"),
    "sparse": (DENSE, with_("k_cache", lambda x: x.to_sparse()), ValueError, "k_cache is .*sparse"),
    "element type": (DENSE, with_("q", lambda x: x.int()), TypeError, "q is of dtype torch.int32"),
    "other type": (DENSE, with_("v_cache", lambda x: x.half()), TypeError, "v_cache is .*float16; .*float32"),
    "FP8": (
        DENSE,
        with_("k_cache", lambda x: x.to(torch.float8_e4m3fn)),
        TypeError,
        "v_cache is of dtype torch.float32; supported: torch.float8_e4m3fn, as the other cache",
    ),
    "new type": (APPEND, with_("k", lambda x: x.double()), TypeError, "k is of dtype torch.float64"),
    "elsewhere": (DENSE, with_("k_cache", lambda x: x.to("meta")), ValueError, "k_cache is on meta; .*cpu"),
    # shapes
    "heads": (DENSE, with_("q", lambda x: x[:, :, :3]), ValueError, "q is of 3 heads with k_cache of 2"),
    "value heads": (DENSE, with_("v_cache", lambda x: x[:, :, :1]), ValueError, "v_cache is of 1 heads"),
    "values": (
        DENSE,
        with_("v_cache", lambda x: x[:, 1:]),
        ValueError,
        "v_cache is .*as many keys as k_cache",
    ),
    "head_dim": (DENSE, with_("q", lambda x: x[..., :8]), ValueError, "k_cache is of head_dim 16; .*of q, 8"),
    "rows": (DENSE, longer("k_cache"), ValueError, "v_cache is of shape"),
    "batch": (DENSE, longer("q"), ValueError, "cache_seqlens is for 2 sequences; .*batch size of q, 3"),
    "cache batch": (
        DENSE | dict(seqlens=3),
        longer("q"),
        ValueError,
        "k_cache is of 2 rows; .*cache_batch_idx",
    ),
    "new heads": (
        APPEND,
        with_("k", lambda x: x[:, :, :1]),
        ValueError,
        "k is of 1 heads .*k_cache, 2 of 16",
    ),
    "new dim": (APPEND, with_("v", lambda x: x[..., :8]), ValueError, "v is of 2 heads of dimension 8"),
    "new values": (
        APPEND,
        with_("v", lambda x: x[:, :1]),
        ValueError,
        "v is of shape .*; .*as many keys as k",
    ),
    "new rank": (APPEND, with_("k", lambda x: x[0]), ValueError, "k is a tensor of shape .*; .*4 dimensions"),
    "flat": (APPEND, with_("k", lambda x: x.flatten()), ValueError, "k is a tensor of shape .*; .*4 dim"),
    "new batch": (
        APPEND,
        lambda g: longer("k")(g) | longer("v")(g),
        ValueError,
        "k is of batch size 3; .*q, 2",
    ),
    "expanded": (
        APPEND,
        lambda g: {n: g[n][:1].expand_as(g[n]) for n in ("k_cache", "v_cache")},
        ValueError,
        r"k_cache is expanded .*; supported: memory for every key",
    ),
    # index tensors
    "int64": (
        DENSE,
        with_("cache_seqlens", lambda x: x.long()),
        TypeError,
        "cache_seqlens is of dtype .*int64",
    ),
    "no row": (ROWS, with_("cache_batch_idx", lambda x: x[:1]), ValueError, "cache_batch_idx is for 1 seq"),
    "padding": (DENSE, {"cache_leftpad": int32(0)}, ValueError, "cache_leftpad is for 1 sequences"),
    "padding rank": (
        DENSE,
        {"cache_leftpad": torch.zeros(2, 1).int()},
        ValueError,
        "cache_leftpad is of shape",
    ),
    "strides": (
        DENSE,
        {"cache_leftpad": int32(0, 0, 0)[::2]},
        ValueError,
        r"cache_leftpad is .*strides \(2,\)",
    ),
    "index device": (
        DENSE,
        with_("cache_seqlens", lambda x: x.to("meta")),
        ValueError,
        "cache_seqlens is on me",
    ),
    "starts of q": (PACKED, {"cu_seqlens_q": int32()}, ValueError, "cu_seqlens_q is empty"),
    "new starts": (PACKED, {"cu_seqlens_k_new": int32(0, 1)}, ValueError, "cu_seqlens_k_new is for 1 seq"),
    "table type": (PAGED, with_("page_table", lambda x: x.long()), TypeError, "page_table is of dtype"),
    "table rank": (
        PAGED,
        with_("page_table", lambda x: x[0]),
        ValueError,
        r"page_table is .*\(batch, max_pages",
    ),
    "table stride": (
        PAGED,
        with_("page_table", lambda x: x.T.contiguous().T),
        ValueError,
        "page_table is of",
    ),
    "table batch": (PAGED, longer("page_table"), ValueError, "page_table is for 3 sequences; .*q, 2"),
    "table device": (PAGED, with_("page_table", lambda x: x.to("meta")), ValueError, "page_table is on meta"),
    "page size": (
        PAGED,
        lambda g: {n: g[n][:, :0] for n in ("k_cache", "v_cache")},
        ValueError,
        "k_cache is of page size 0",
    ),
    # rotary
    "table dtype": (
        ROTARY,
        with_("rotary_cos", lambda x: x.half()),
        TypeError,
        "rotary_cos is .*float16; .*q, ",
    ),
    "table shape": (
        ROTARY,
        with_("rotary_sin", lambda x: x[:-1]),
        ValueError,
        "rotary_sin is .*as rotary_cos",
    ),
    "table dim": (
        ROTARY,
        with_("rotary_cos", lambda x: x[0]),
        ValueError,
        r"rotary_cos is .*\(positions, rotary",
    ),
    "no position": (ROTARY, with_("rotary_cos", lambda x: x[:0]), ValueError, "rotary_cos is of shape"),
    "wide": (
        ROTARY,
        lambda g: {n: g[n].repeat(1, 2) for n in ("rotary_cos", "rotary_sin")},
        ValueError,
        "rotary_cos is of 16 columns, rotary_dim 32; supported: rotary_dim up to the head_dim of q, 16",
    ),
    "table on": (ROTARY, with_("rotary_sin", lambda x: x.to("meta")), ValueError, "rotary_sin is on meta"),
    "pairs": (
        ROTARY,
        {"rotary_interleaved": 1},
        TypeError,
        "rotary_interleaved is 1; supported: True or False",
    ),
    "starts": (ROTARY, {"rotary_seqlens": int32(1)}, ValueError, "rotary_seqlens is for 1 sequences"),
    # options
    "scale": (DENSE, {"softmax_scale": math.nan}, ValueError, "softmax_scale is nan"),
    "softcap": (DENSE, {"softcap": -1.0}, ValueError, "softcap is -1.0; supported: at least 0"),
    "window": (DENSE, {"window_size": (1, -2)}, ValueError, r"window_size is \(1, -2\)"),
    "causal": (DENSE, {"causal": 1}, TypeError, "causal is 1; supported: True or False"),
    "splits": (DENSE, {"num_splits": 257}, ValueError, "num_splits is 257; supported: 1 to 256, or 0"),
    "fewer splits": (DENSE, {"num_splits": -1}, ValueError, "num_splits is -1; supported: at least 0"),
    "half a split": (DENSE, {"num_splits": 1.5}, TypeError, r"num_splits is 1.5 \(float\)"),
    "split size": (DENSE, {"split_size": 100}, ValueError, "split_size is 100; .*positive multiple of 128"),
    "no split": (DENSE, {"split_size": 0}, ValueError, "split_size is 0; supported: at least 1"),
    "split name": (DENSE, {"split_size": "all"}, TypeError, r"split_size is 'all' \(str\)"),
    "both": (DENSE, dict(split_size=128, num_splits=2), ValueError, "split_size is 128 with num_splits 2"),
    "margin": (DENSE, {"sm_margin": -1}, ValueError, "sm_margin is -1"),
    "packing": (DENSE, {"pack_gqa": 2}, TypeError, "pack_gqa is 2; supported: None, True or False"),
    "list": (DENSE, {"softcap": [1]}, TypeError, r"softcap is \[1\] \(list\)"),
    # memory
    "out": (DENSE, {"out": 3}, TypeError, "out is int"),
    "out type": (DENSE, {"out": torch.zeros(2, 1, 4, 16).half()}, TypeError, "out is of dtype torch.float16"),
    "out shape": (
        DENSE,
        {"out": torch.zeros(2, 1, 4, 8)},
        ValueError,
        r"out is .*\(2, 1, 4, 16\), contiguous",
    ),
    "out strides": (DENSE, {"out": torch.zeros(2, 4, 1, 32)[..., ::2].mT.mT}, ValueError, "out is of shape"),
    "out device": (DENSE, {"out": torch.zeros(2, 1, 4, 16, device="meta")}, ValueError, "out is on meta"),
    "workspace": (DENSE, {"workspace": 3}, TypeError, "workspace is int; .*decode_workspace"),
    "workspace type": (
        DENSE,
        {"workspace": torch.zeros(64)},
        TypeError,
        "workspace is of dtype torch.float32",
    ),
    "workspace place": (
        DENSE,
        {"workspace": torch.zeros(64, dtype=torch.uint8)[1:]},
        ValueError,
        "workspace is of shape .*multiple of 16",
    ),
    "metadata": (
        DENSE,
        {"scheduler_metadata": 1},
        TypeError,
        "scheduler_metadata is int; .*get_scheduler_meta",
    ),
    "metadata type": (
        DENSE,
        {"scheduler_metadata": torch.zeros(4)},
        TypeError,
        "scheduler_metadata is of dtype",
    ),
    "metadata size": (DENSE, {"scheduler_metadata": int32(1, 2)}, ValueError, r"scheduler_metadata .*\(2,\)"),
    # numbers
    "too long": (
        DENSE,
        {"cache_seqlens": 33},
        ValueError,
        "cache_seqlens is 33; supported: 0 to the capac.*32",
    ),
    "negative": (DENSE, {"cache_seqlens": -1}, ValueError, "cache_seqlens is -1"),
    "one too long": (
        DENSE,
        {"cache_seqlens": int32(3, 33)},
        ValueError,
        "cache_seqlens is 33 at 1; supported",
    ),
    "one negative": (DENSE, {"cache_seqlens": int32(-3, 3)}, ValueError, "cache_seqlens is -3 at 0"),
    "no room": (
        APPEND,
        {"cache_seqlens": 31},
        ValueError,
        "cache_seqlens is 31, with 2 keys .*; .*at most .*32",
    ),
    "no room for one": (
        APPEND,
        {"cache_seqlens": int32(3, 31)},
        ValueError,
        "cache_seqlens is 31 at 1, with 2",
    ),
    "packed room": (PACKED, {"cache_seqlens": 30}, ValueError, "cache_seqlens is 30 at 0, with 3 keys"),
    "page room": (PAGED, {"cache_seqlens": int32(31, 7)}, ValueError, "cache_seqlens is 31 at 0, with 2"),
    "falling": (PACKED, {"cu_seqlens_q": int32(0, 3, 2)}, ValueError, "cu_seqlens_q is falling from 3 to 2"),
    "rows of q": (PACKED, {"cu_seqlens_q": int32(0, 2, 9)}, ValueError, "cu_seqlens_q is ending at 9"),
    "max_seqlen_q": (PACKED, {"max_seqlen_q": 1}, ValueError, "max_seqlen_q is 1; supported: at least 2"),
    "new rows": (PACKED, {"cu_seqlens_k_new": int32(0, 2, 9)}, ValueError, "cu_seqlens_k_new is ending at 9"),
    "new falling": (PACKED, {"cu_seqlens_k_new": int32(0, 3, 2)}, ValueError, "cu_seqlens_k_new is falling"),
    "padded": (
        DENSE,
        {"cache_leftpad": int32(0, 8)},
        ValueError,
        "cache_leftpad is 8 at 1; supported: 0 to .*7",
    ),
    "padded below": (DENSE, {"cache_leftpad": int32(-1, 0)}, ValueError, "cache_leftpad is -1 at 0"),
    "which row": (
        ROWS,
        {"cache_batch_idx": int32(0, 6)},
        ValueError,
        "cache_batch_idx is 6 at 1; supported: 0 to 4",
    ),
    "same row": (ROWS, {"cache_batch_idx": int32(2, 2)}, ValueError, "cache_batch_idx is 2 at 0 and at 1"),
    "which page": (
        PAGED,
        with_("page_table", lambda x: x.index_fill(1, torch.tensor([1]), 99)),
        ValueError,
        r"page_table is 99 at \(0, 1\); supported: 0 to 6, pages of k_cache",
    ),
    "poison": (PAGED, {"cache_seqlens": int32(20, 30)}, ValueError, r"page_table is 1073741824 at \(1, 2\)"),
    "same page": (
        PAGED | dict(seqlens=(4, 4)),
        with_("page_table", lambda x: x[:1].expand(2, -1).contiguous()),
        ValueError,
        r"page_table is \d for the keys appended to 0 and to 1; supported: a page once only",
    ),
    "positions": (
        ROTARY,
        lambda g: {n: g[n][:21].contiguous() for n in ("rotary_cos", "rotary_sin")},
        ValueError,
        "rotary_cos is of 21 positions; supported: at least 22, for a sequence that starts at 20 at 0",
    ),
    "positions for all": (
        ROTARY | dict(seqlens=20),
        lambda g: {n: g[n][:21].contiguous() for n in ("rotary_cos", "rotary_sin")},
        ValueError,
        "rotary_cos is of 21 positions; supported: at least 22, for a sequence that starts at 20",
    ),
    "first position": (ROTARY, {"rotary_seqlens": int32(-1, 0)}, ValueError, "rotary_seqlens is -1 at 0"),
    "last position": (ROTARY, {"rotary_seqlens": int32(0, 22)}, ValueError, "rotary_cos is of 22 positions"),
    # not written yet
    "qv": (DENSE, {"qv": torch.zeros(1)}, NotImplementedError, "qv is a Tensor; supported: None"),
    "q_descale": (DENSE, {"q_descale": torch.ones(2, 2)}, ValueError, "q_descale is given for q of"),
    "k_descale": (DENSE, {"k_descale": torch.ones(2, 2)}, ValueError, "k_descale is given for k_cache of"),
    "v_descale": (DENSE, {"v_descale": torch.ones(2, 2)}, ValueError, "v_descale is given for v_cache of"),
    "chunk": (DENSE, {"attention_chunk": 128}, NotImplementedError, "attention_chunk is 128; supported: 0"),
}


@pytest.mark.parametrize("remembered", [False, True], ids=["new", "remembered"])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_and_write_nothing(name, remembered):
    """Also when a right call of the same shapes has been answered: its plan must not answer this one."""
    fields, change, error, message = MISTAKES[name]
    case = DecodeCase(**fields)
    if remembered:
        run_decode(make_decode(case))
    inputs = make_decode(case)
    changed = change(inputs.tensors) if callable(change) else change
    with pytest.raises(error, match=f"^{message}"):
        run_decode(inputs, **changed)
    assert_cache_right(case, inputs, written=False)


def test_an_explicit_backend_that_cannot_writes_nothing(backend):
    for name in ("torch", "gluon"):
        backend(name)
        case = DecodeCase(**APPEND)
        inputs = make_decode(case)
        with pytest.raises(NotImplementedError, match=f"{name}: "):
            run_decode(inputs)
        assert_cache_right(case, inputs, written=False)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin"])
def test_gradients_are_refused_not_dropped(name):
    case = DecodeCase(**ROTARY)
    inputs = make_decode(case)
    inputs.tensors[name] = inputs.tensors[name].clone().requires_grad_()
    with pytest.raises(
        NotImplementedError, match=rf"^{name} is a tensor that requires .*; supported: inference"
    ):
        run_decode(inputs)
    with torch.no_grad():
        run_decode(inputs)
    with torch.inference_mode():
        run_decode(make_decode(case))


OUT, LSE = torch.zeros(2, 1, 3, 4, 8), torch.zeros(2, 1, 3, 4)


@pytest.mark.parametrize(
    "given, error, message",
    [
        ((1, LSE), TypeError, "out_partial is int"),
        ((OUT, None), TypeError, "lse_partial is NoneType"),
        ((OUT.int(), LSE), TypeError, "out_partial is of dtype torch.int32"),
        ((OUT, LSE.half()), TypeError, "lse_partial is of dtype torch.float16; supported: torch.float32"),
        ((OUT[0, 0], LSE), ValueError, "out_partial is of shape .*; supported: .splits, batch"),
        ((OUT, LSE.mT), ValueError, r"lse_partial is of shape .*; supported: \(2, 1, 3, 4\), as out_partial"),
        ((OUT[:0], LSE[:0]), ValueError, "out_partial is of 0 splits; supported: 1 to 256"),
        ((OUT[:1].expand(257, -1, -1, -1, -1), LSE), ValueError, "out_partial is of 257 splits"),
        ((OUT, LSE.to("meta")), ValueError, "lse_partial is on meta"),
        ((OUT, LSE, OUT[0].half()), TypeError, "out is of dtype torch.float16; .*float32"),
        ((OUT, LSE, OUT), ValueError, "out is of shape"),
        ((OUT, LSE, None, torch.int8), TypeError, "out_dtype is torch.int8"),
    ],
)
def test_mistakes_of_combine(given, error, message):
    with pytest.raises(error, match=f"^{message}"):
        flash_attn_combine(*given)


@pytest.mark.parametrize(
    "states, error, message",
    [
        ((), ValueError, "states is empty; supported: at least one"),
        ((OUT,), TypeError, r"states\[0\] is Tensor; supported: a pair"),
        (((OUT[0], LSE[0].mT), (OUT[0],)), TypeError, r"states\[1\] is tuple"),
        (((OUT[0], 3),), TypeError, r"lse of states\[0\] is int"),
        (((OUT, LSE.mT),), ValueError, r"out of states\[0\] is of shape"),
        (
            ((OUT[0], LSE[0]),),
            ValueError,
            r"lse of states\[0\] is of shape \(1, 3, 4\); supported: \(1, 4, 3\)",
        ),
        (((OUT[0], LSE[0].mT), (OUT[0, :, :2], LSE[0].mT)), ValueError, r"out of states\[1\] is of shape"),
        (((OUT[0], LSE[0].mT), (OUT[0], LSE[0].mT.half())), TypeError, r"lse of states\[1\] is of dtype"),
    ],
)
def test_mistakes_of_merge(states, error, message):
    with pytest.raises(error, match=f"^{message}"):
        merge_attention_states(*states)
