"""cuDNN attention by its own frontend, for what it does not do through torch: sliding windows and packed
sequences. Torch 2.11 makes a new plan for every packed call (https://github.com/pytorch/pytorch/pull/191576),
and tells the backward that no sequence is longer than the head dimension
(https://github.com/pytorch/pytorch/pull/186142).

`forward`, `backward` and `train` return a function that runs and returns the answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from tandem_attn.bench.cases import GradientInputs
from tandem_attn.testing import Case, Inputs

NAME = "cudnn-frontend"
Run = Callable[[], tuple[torch.Tensor | None, ...]]


def serves(case: Case) -> bool:
    """Whether it is what torch leaves undone."""
    return case.varlen or case.window != (-1, -1)


def label() -> str:
    """What really runs."""
    import cudnn

    return f"cuDNN {cudnn.backend_version()} by its own frontend"


def forward(case: Case, inputs: Inputs) -> Run:
    """The forward alone: (out, None)."""
    launch, out, _ = _forward(case, inputs, with_stats=False)
    return _answering((out, None), launch)


def backward(case: Case, inputs: GradientInputs) -> Run:
    """The backward alone, of one forward, again and again: (dq, dk, dv)."""
    _, launch, gradients = _gradients(case, inputs)
    return _answering(gradients, launch)


def train(case: Case, inputs: GradientInputs) -> Run:
    """A forward and its backward: (dq, dk, dv)."""
    *launches, gradients = _gradients(case, inputs)
    return _answering(gradients, *launches)


def _answering(results: tuple[torch.Tensor | None, ...], *launches: Callable[[], object]) -> Run:
    """A function that launches and returns the tensors that are written."""

    def run():
        for launch in launches:
            launch()
        return results

    return run


def _gradients(case: Case, inputs: GradientInputs):
    """(launch of the forward, launch of the backward, (dq, dk, dv))"""
    forward, out, stats = _forward(case, inputs, with_stats=True)
    forward()
    graph = _Graph(case, inputs)
    read = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "o": out, "dO": inputs.dout, "stats": stats}
    nodes = {name: graph.read(x.detach(), "k" if name in "kv" else "q") for name, x in read.items()}
    asked = graph.question()
    if case.varlen:  # or the workspace would hold as many sequences, all as long as the longest
        asked |= {"max_total_seq_len_q": sum(case.rows), "max_total_seq_len_kv": sum(case.keys)}
    gradients = tuple(torch.empty_like(x).detach() for x in inputs.leaves)
    made = graph.graph.sdpa_backward(**nodes, **asked)
    for node, gradient, side in zip(made, gradients, "qkk", strict=True):
        graph.write(node, gradient, side)
    return forward, graph.built(), gradients


def _forward(case: Case, inputs: Inputs, with_stats: bool):
    """(launch, out, log-sum-exp or None)"""
    if case.softcap:
        raise NotImplementedError("this benchmark asks cuDNN for no softcap")
    graph = _Graph(case, inputs)
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    out = q.new_empty(*q.shape[:-1], case.dim_v)
    stats = q.new_empty(*q.shape[:-1], 1, dtype=torch.float32) if with_stats else None
    nodes = {"q": graph.read(q, "q"), "k": graph.read(k, "k"), "v": graph.read(v, "k")}
    made, made_stats = graph.graph.sdpa(**nodes, **graph.question(), is_inference=not with_stats)
    graph.write(made, out, "q")
    if stats is not None:
        graph.write(made_stats, stats, "q")
    return graph.built(), out, stats


class _Graph:
    """One attention operation, and the tensors that it reads and writes."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        import cudnn

        self.cudnn, self.case, self.inputs = cudnn, case, inputs
        types = cudnn.data_type
        self.types = {
            torch.bfloat16: types.BFLOAT16,
            torch.float16: types.HALF,
            torch.float32: types.FLOAT,
            torch.int32: types.INT32,
        }
        self.handle = cudnn.create_handle()
        cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream(inputs.q.device).cuda_stream)
        self.graph = cudnn.pygraph(
            io_data_type=self.types[case.dtype],
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=self.handle,
        )
        self.tensors: dict = {}

    def _geometry(self, x: torch.Tensor, side: str) -> dict:
        """Of (batch, seqlen, heads, columns), or of (total, heads, columns), where only offsets tell more."""
        lengths = self.case.rows if side == "q" else self.case.keys
        longest, (heads, columns) = max(lengths), x.shape[-2:]
        dim = [len(lengths), heads, longest, columns]
        return {"dim": dim, "stride": [longest * heads * columns, columns, heads * columns, 1]}

    def _numbers(self, x: torch.Tensor):
        """int32 numbers of the sequences."""
        node = self.graph.tensor(dim=[len(x), 1, 1, 1], stride=[1, 1, 1, 1], data_type=self.types[x.dtype])
        self.tensors[node] = x
        return node

    def _placed(self, node, x: torch.Tensor, side: str):
        self.tensors[node] = x
        if self.case.varlen:
            starts = self.inputs.kwargs[f"cu_seqlens_{side}"]
            node.set_ragged_offset(self._numbers(starts * (x.shape[-2] * x.shape[-1])))
        return node

    def read(self, x: torch.Tensor, side: str):
        """A node for a contiguous tensor of queries ("q") or keys ("k")."""
        geometry = self._geometry(x, side)
        return self._placed(self.graph.tensor(**geometry, data_type=self.types[x.dtype]), x, side)

    def write(self, node, x: torch.Tensor, side: str) -> None:
        """Let the operation's output `node` go to a contiguous tensor."""
        geometry = self._geometry(x, side)
        node.set_output(True).set_dim(geometry["dim"]).set_stride(geometry["stride"])
        node.set_data_type(self.types[x.dtype])
        self._placed(node, x, side)

    def question(self) -> dict:
        """Mask, lengths and scale."""
        left, right = self.case.bounds
        corner = "TOP_LEFT" if self.case.rows == self.case.keys else "BOTTOM_RIGHT"  # the former is older
        asked = {
            "attn_scale": self.inputs.scale,
            "diagonal_alignment": getattr(self.cudnn.diagonal_alignment, corner),
            "diagonal_band_left_bound": None if left < 0 else left + 1,  # with the query's own position
            "diagonal_band_right_bound": None if right < 0 else right,
        }
        if self.case.varlen:
            asked["use_padding_mask"] = True
            for name, side in (("seq_len_q", "q"), ("seq_len_kv", "k")):
                asked[name] = self._numbers(self.inputs.kwargs[f"cu_seqlens_{side}"].diff())
        return asked

    def built(self):
        """The graph's launch, a function of nothing."""
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        size = self.graph.get_workspace_size()
        workspace = torch.empty(size, dtype=torch.uint8, device=self.inputs.q.device)
        return functools.partial(self.graph.execute, self.tensors, workspace, handle=self.handle)
