"""What `bench` asks cuDNN's frontend, answered by a stand-in that knows the graph and its tensors alone."""

import dataclasses
import itertools
import sys
import types

import pytest
import torch

from tandem_attn.bench import cases, gradient_providers, providers
from tandem_attn.bench.check import Oracle
from tandem_attn.bench.gradient_check import GradientOracle
from tandem_attn.testing import Case
from tandem_attn.testing.budget import explicit_mask

CPU = torch.device("cpu")
LENGTHS = (70, 1, 133)
PACKED = Case(lengths_q=LENGTHS, lengths_k=LENGTHS, heads=4, kv_heads=2, head_dim=32, dtype=torch.float16)
DENSE = Case(batch=2, seqlen_q=150, seqlen_k=150, heads=2, kv_heads=2, head_dim=32)
CASES = {
    "packed": PACKED,
    "packed, causal": dataclasses.replace(PACKED, causal=True),
    "packed, other lengths": dataclasses.replace(PACKED, lengths_k=(90, 4, 133), causal=True),
    "packed, window": dataclasses.replace(PACKED, window=(30, 5)),
    "window": dataclasses.replace(DENSE, causal=True, window=(40, 0)),
    "window on both sides": dataclasses.replace(DENSE, window=(40, 7)),
}


def setter(field: str):
    """A method that sets a field and returns the node."""

    def set_field(self, value):
        setattr(self, field, value)
        return self

    return set_field


@dataclasses.dataclass(eq=False)
class Node:
    """A tensor as a graph describes it."""

    dim: list | None = None
    stride: list | None = None
    data_type: torch.dtype | None = None
    ragged: "Node | None" = None
    is_output: bool = False

    set_output = setter("is_output")
    set_dim = setter("dim")
    set_stride = setter("stride")
    set_data_type = setter("data_type")
    set_ragged_offset = setter("ragged")


class Graph:
    """A stand-in for cudnn.pygraph: attention by its definition, in float64, a sequence at a time."""

    def __init__(self, io_data_type, intermediate_data_type, compute_data_type, handle):
        assert intermediate_data_type == compute_data_type == torch.float32
        self.made, self.steps = [], []

    def tensor(self, dim, stride, data_type):
        return Node(dim, stride, data_type)

    def sdpa(self, q, k, v, is_inference, **asked):
        self.asked, self.nodes = asked, {"q": q, "k": k, "v": v}
        self.compute = self.forward
        self.made = [Node(), None if is_inference else Node()]
        return self.made

    def sdpa_backward(
        self, q, k, v, o, dO, stats, max_total_seq_len_q=None, max_total_seq_len_kv=None, **asked
    ):
        self.asked, self.nodes = asked, {"q": q, "k": k, "v": v, "o": o, "do": dO, "stats": stats}
        self.compute = self.backward
        self.totals = max_total_seq_len_q, max_total_seq_len_kv
        self.made = [Node(), Node(), Node()]
        return self.made

    def _step(self):
        self.steps.append(1)

    validate = build_operation_graph = check_support = build_plans = _step

    def create_execution_plans(self, modes):
        self.steps.append(1)

    def get_workspace_size(self):
        return 8

    def execute(self, tensors, workspace, handle):
        assert len(self.steps) == 5
        assert workspace.numel() == 8
        for x in tensors.values():
            assert x.is_contiguous()
        sizes = {"q": self.nodes["q"].dim, "k": self.nodes["k"].dim}
        if self.compute == self.backward and self.nodes["q"].ragged:
            rows, keys = (tensors[self.nodes[name]].shape[0] for name in "qk")
            assert self.totals == (rows, keys)
        for b in range(sizes["q"][0]):
            rows, keys = (
                int(tensors[self.asked[name]][b]) if self.asked.get("use_padding_mask") else sizes[side][2]
                for name, side in (("seq_len_q", "q"), ("seq_len_kv", "k"))
            )

            def view(node, length, b=b):
                x = tensors[node]
                assert node.data_type == x.dtype
                start = int(tensors[node.ragged][b]) if node.ragged else b * node.stride[0]
                return torch.as_strided(x, (node.dim[1], length, node.dim[3]), node.stride[1:], start)

            self.compute(view, rows, keys)

    def scores(self, view, rows, keys):
        """(scores with -inf where masked, q, k, v), key heads repeated, in float64."""
        q, k, v = (view(self.nodes[name], rows if name == "q" else keys).double() for name in "qkv")
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        left, right = (self.asked[f"diagonal_band_{side}_bound"] for side in ("left", "right"))
        window = (-1 if left is None else left - 1, -1 if right is None else right)
        # as many rows as keys: row i stands at key i
        height = rows if self.asked["diagonal_alignment"] == "bottom right" else keys
        seen = explicit_mask(torch.arange(rows), height, keys, window)
        s = (q @ k.transpose(1, 2) * self.asked["attn_scale"]).masked_fill(~seen, float("-inf"))
        return s, q, k, v

    def forward(self, view, rows, keys):
        s, _, _, v = self.scores(view, rows, keys)
        out, stats = self.made
        assert out.is_output
        view(out, rows).copy_(s.softmax(2) @ v)
        if stats is not None:
            view(stats, rows).copy_(s.logsumexp(2, keepdim=True))

    def backward(self, view, rows, keys):
        s, q, k, v = self.scores(view, rows, keys)
        o, do, stats = (view(self.nodes[name], rows).double() for name in ("o", "do", "stats"))
        p = torch.exp(s - stats)
        ds = p * (do @ v.transpose(1, 2) - (do * o).sum(2, keepdim=True)) * self.asked["attn_scale"]
        dq, dk, dv = ds @ k, ds.transpose(1, 2) @ q, p.transpose(1, 2) @ do
        for node, x, length in zip(self.made, (dq, dk, dv), (rows, keys, keys), strict=True):
            assert node.is_output
            view(node, length).copy_(x.unflatten(0, (node.dim[1], -1)).sum(1))


@pytest.fixture(autouse=True)
def cudnn(monkeypatch):
    library = types.ModuleType("cudnn")
    kinds = {"BFLOAT16": torch.bfloat16, "HALF": torch.float16, "FLOAT": torch.float32, "INT32": torch.int32}
    library.data_type = types.SimpleNamespace(**kinds)
    library.diagonal_alignment = types.SimpleNamespace(TOP_LEFT="top left", BOTTOM_RIGHT="bottom right")
    library.heur_mode = types.SimpleNamespace(A="a", FALLBACK="fallback")
    library.create_handle = lambda: "handle"
    library.set_stream = lambda handle, stream: None
    library.backend_version = lambda: 12345
    library.pygraph = Graph
    monkeypatch.setitem(sys.modules, "cudnn", library)
    stream = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)


def provider_of(among) -> providers.Provider:
    (found,) = [one for one in among if one.name == "cudnn-frontend"]
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("what", ["BACKWARD", "TRAIN"])
def test_gradients_are_right(name, what):
    case = CASES[name]
    provider = provider_of(getattr(gradient_providers, what))
    assert provider.serves(case)
    oracle = GradientOracle(case, cases.differentiable(case, cases.inputs(case, CPU)))
    call = provider.prepare(case, oracle.inputs)
    assert call.label == "cuDNN 12345 by its own frontend"
    gradients = call.answer()
    assert oracle.what_is_wrong(*gradients) == ""
    for gradient in gradients:
        gradient.zero_()
    call.run()
    assert oracle.what_is_wrong(*gradients) == ""


@pytest.mark.parametrize("name", CASES)
def test_the_forward_is_right(name):
    case = CASES[name]
    provider = provider_of(providers.PROVIDERS)
    assert provider.serves(case)
    oracle = Oracle(case, cases.inputs(case, CPU))
    assert oracle.what_is_wrong(*provider.prepare(case, oracle.inputs).answer()) == ""


def test_only_what_torch_does_not_do_is_asked():
    for one in itertools.chain.from_iterable(make() for make in cases.GRADIENT_GROUPS.values()):
        for among in (providers.PROVIDERS, gradient_providers.BACKWARD, gradient_providers.TRAIN):
            assert provider_of(among).serves(one.case) == ("varlen" in one.id or "window" in one.id)


def test_softcap_is_refused():
    case = dataclasses.replace(DENSE, window=(5, 0), softcap=10.0)
    with pytest.raises(NotImplementedError, match="softcap"):
        provider_of(providers.PROVIDERS).prepare(case, cases.inputs(case, CPU))
