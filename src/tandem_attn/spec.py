"""The question: what attention is being asked for, and the only validation of it.

`attention_spec` turns the arguments of a call into an `AttentionSpec` or raises. Errors name the argument,
what it was and what is supported: TypeError for a wrong Python type or element type, ValueError for a wrong
value, shape or device, NotImplementedError for what may come later.
"""

from __future__ import annotations

import dataclasses
import itertools
import numbers
import sys
from typing import NamedTuple, NoReturn

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
E4M3 = torch.float8_e4m3fn  # FP8 tensors are another question: see spec_fp8.py
UNLIMITED = -1
NO_WINDOW = (UNLIMITED, UNLIMITED)
_LARGEST = sys.float_info.max

# SymInt and SymFloat stand for numbers while torch.compile and torch.export look at a call
_INTEGERS = (int, torch.SymInt, numbers.Integral)
_REALS = (float, int, torch.SymFloat, torch.SymInt, numbers.Real)


@dataclasses.dataclass(frozen=True)
class Window:
    """Which keys a query sees: `left` before its position to `right` after it, inclusive; -1 is unlimited.

    The position of query i among the keys is i + seqlen_k - seqlen_q: both sequences end together
    (bottom-right alignment). (-1, -1) is full attention, (-1, 0) causal.
    """

    left: int = UNLIMITED
    right: int = UNLIMITED

    def __post_init__(self) -> None:
        for side in (self.left, self.right):
            check_int("window_size", side, UNLIMITED)

    def __str__(self) -> str:
        return "full" if self.full else "causal" if self.causal else f"window ({self.left}, {self.right})"

    @property
    def full(self) -> bool:
        return self.left == UNLIMITED and self.right == UNLIMITED

    @property
    def causal(self) -> bool:
        return self.left == UNLIMITED and self.right == 0

    def reduced(self, seqlen_q: int, seqlen_k: int) -> Window:
        """The same window for sequences up to these lengths, unlimited on each side that reaches every key.

        The last query sits on key seqlen_k - 1 and the first on seqlen_k - seqlen_q. One query under a causal
        mask therefore sees everything.
        """
        left = UNLIMITED if self.left >= seqlen_k - 1 else self.left
        right = UNLIMITED if self.right >= seqlen_q - 1 else self.right
        return Window(left, right)


class Lengths(NamedTuple):
    """Where packed sequences start and how long they are: the varlen arguments."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    seqused_q: torch.Tensor | None
    seqused_k: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int


class Options(NamedTuple):
    """The numbers of a call. `softmax_scale` None is 1 / sqrt(head_dim)."""

    softmax_scale: float | None
    window_left: int
    window_right: int
    softcap: float
    sm_margin: int
    deterministic: bool


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """A question without addresses: two calls with equal specs may share everything but their pointers."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    seqlen_q: int  # varlen: max_seqlen_q
    seqlen_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    softmax_scale: float
    window: Window
    softcap: float  # 0: none
    varlen: bool
    total_q: int  # rows of q in memory; dense: batch * seqlen_q
    total_k: int
    has_seqused_q: bool
    has_seqused_k: bool
    q_stride: tuple[int, ...]  # elements
    k_stride: tuple[int, ...]
    v_stride: tuple[int, ...]
    aligned: bool  # all three base addresses are multiples of 16 bytes
    sm_margin: int
    deterministic: bool = False  # gradients bitwise repeatable; the forward always is

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def causal(self) -> bool:
        return self.window.causal

    @property
    def is_empty(self) -> bool:
        """No query, or no key for any of them: the answer is known without looking at numbers."""
        return 0 in (self.batch, self.seqlen_q, self.seqlen_k, self.total_q, self.total_k)

    @property
    def question(self) -> str:
        """One line for explain()."""
        kind = "varlen" if self.varlen else "dense"
        return (
            f"{kind} attention, {dtype_name(self.dtype)} on {self.device}: batch {self.batch}, "
            f"{self.seqlen_q} queries x {self.seqlen_k} keys, {self.num_heads} heads over "
            f"{self.num_kv_heads}, head_dim {self.head_dim}/{self.head_dim_v}, {self.window}, "
            f"softcap {self.softcap:g}"
        )

    @property
    def out_shape(self) -> tuple[int, ...]:
        rows = (self.total_q,) if self.varlen else (self.batch, self.seqlen_q)
        return (*rows, self.num_heads, self.head_dim_v)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        return (self.num_heads, self.total_q) if self.varlen else (self.batch, self.num_heads, self.seqlen_q)

    @property
    def lse_dtype(self) -> torch.dtype:
        return lse_dtype(self.dtype)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, and float64 for float64 inputs: also the type in which the reference computes."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16, without the module in front."""
    return str(dtype).removeprefix("torch.")


def attention_spec(q, k, v, lengths: Lengths | None, options: Options) -> AttentionSpec:
    """The question that these arguments ask. Reads shapes only; `check_contents` looks into lengths."""
    check_types(q, k, v, lengths)
    options = check_options(options)
    check_tensors(q, k, v, lengths)
    if lengths is None:
        batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
        total_q, total_k = batch * seqlen_q, batch * seqlen_k
    else:
        batch = lengths.cu_seqlens_q.shape[0] - 1
        seqlen_q, seqlen_k = int(lengths.max_seqlen_q), int(lengths.max_seqlen_k)
        total_q, total_k = q.shape[0], k.shape[0]
    scale = options.softmax_scale
    return AttentionSpec(
        device=q.device,
        dtype=q.dtype,
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        num_heads=q.shape[-2],
        num_kv_heads=k.shape[-2],
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        softmax_scale=q.shape[-1] ** -0.5 if scale is None else scale,
        window=Window(options.window_left, options.window_right).reduced(seqlen_q, seqlen_k),
        softcap=options.softcap,
        varlen=lengths is not None,
        total_q=total_q,
        total_k=total_k,
        has_seqused_q=lengths is not None and lengths.seqused_q is not None,
        has_seqused_k=lengths is not None and lengths.seqused_k is not None,
        q_stride=q.stride(),
        k_stride=k.stride(),
        v_stride=v.stride(),
        aligned=(q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0,
        sm_margin=options.sm_margin,
        deterministic=options.deterministic,
    )


def window_sides(causal: bool, window_size: tuple[int, int]) -> tuple[int, int]:
    """(left, right) of the window that these two public arguments describe together."""
    if window_size is NO_WINDOW:  # the default: nothing to look at
        if causal is False:
            return NO_WINDOW
        if causal is True:
            return UNLIMITED, 0
    try:
        left, right = window_size
    except (TypeError, ValueError):
        refuse(ValueError, "window_size", window_size, "a pair (left, right) of integers, -1 for unlimited")
    if type(left) is not int or type(right) is not int:
        check_int("window_size", left, UNLIMITED)
        check_int("window_size", right, UNLIMITED)
        left, right = int(left), int(right)
    if left < UNLIMITED or right < UNLIMITED:
        refuse(ValueError, "window_size", window_size, "sides of at least 0, or -1 for unlimited")
    if causal is False:
        return left, right
    if causal is not True:
        refuse(TypeError, "causal", causal, "True or False")
    if right > 0:
        refuse(ValueError, "window_size", window_size, "right side 0 or -1 together with causal=True")
    return left, 0


def check_types(q, k, v, lengths: Lengths | None) -> None:
    """Raise unless tensors are tensors and lengths integers: what operators call a schema mismatch."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            refuse(TypeError, name, type(x).__name__, "a torch.Tensor")
    if lengths is None:
        return
    for name, x in zip(Lengths._fields[:4], lengths[:4], strict=True):
        if not isinstance(x, torch.Tensor) and not (x is None and name in ("seqused_q", "seqused_k")):
            refuse(TypeError, name, type(x).__name__, "a torch.Tensor of dtype int32")
    for name, x in zip(Lengths._fields[4:], lengths[4:], strict=True):
        check_int(name, x, 0)


def check_options(options: Options) -> Options:
    """The same numbers as plain float and int, or an error."""
    scale, left, right, softcap, sm_margin, deterministic = options
    if scale is not None:
        scale = _check_real("softmax_scale", scale, "a finite number, or None for 1 / sqrt(head_dim)")
    softcap = _check_real("softcap", softcap, "a finite number, 0 for none")
    if softcap < 0:
        refuse(ValueError, "softcap", softcap, "at least 0 (0: none)")
    check_int("sm_margin", sm_margin, 0)
    if not isinstance(deterministic, bool):
        was = f"{deterministic!r} ({type(deterministic).__name__})"
        refuse(TypeError, "deterministic", was, "True or False")
    return Options(scale, left, right, softcap, sm_margin, deterministic)


def check_tensors(q, k, v, lengths: Lengths | None, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Raise unless shapes, types and devices fit together. Looks at no numbers: fakes are welcome."""
    form, rank = "(batch, seqlen, heads, head_dim)", 4
    if lengths is not None:
        form, rank = "(total, heads, head_dim) with cu_seqlens", 3
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.layout != torch.strided:
            refuse(ValueError, name, f"a tensor with layout {x.layout}", "torch.strided")
        if x.dim() != rank:
            refuse(ValueError, name, f"a tensor of shape {tuple(x.shape)}", f"{rank} dimensions {form}")
        check_dtype(name, x.dtype, q.dtype, dtypes)
        if x.device != q.device:
            refuse(ValueError, name, f"on {x.device}", f"the device of q, {q.device}")
    if lengths is None and k.shape[0] != q.shape[0]:
        refuse(ValueError, "k", f"of batch size {k.shape[0]}", f"the batch size of q, {q.shape[0]}")
    check_heads(q, k, v)
    if lengths is not None:
        _check_lengths(q, lengths)


def check_dtype(name: str, dtype: torch.dtype, expected: torch.dtype, dtypes=DTYPES) -> None:
    """Raise unless a tensor of this dtype may be, and go with q of dtype `expected`."""
    if dtype in dtypes:
        if dtype != expected:
            refuse(TypeError, name, f"of dtype {dtype}", f"the dtype of q, {expected}")
    elif dtype.is_floating_point and dtype.itemsize == 1:
        supported = f"here {', '.join(map(str, dtypes))}; in FP8 {E4M3} for q, k and v, or for a cache"
        refuse(NotImplementedError, name, f"of dtype {dtype}", supported)
    else:
        refuse(TypeError, name, f"of dtype {dtype}", ", ".join(map(str, dtypes)))


def check_heads(q, k, v, names: tuple[str, str] = ("k", "v")) -> None:
    """Raise unless heads and head_dims fit together; `names` of k and v, which end in (heads, head_dim)."""
    name_k, name_v = names
    rows, heads, head_dim = tuple(k.shape[:-2]), k.shape[-2], k.shape[-1]
    if tuple(v.shape[:-2]) != rows:
        refuse(ValueError, name_v, f"of shape {tuple(v.shape)}", f"as many keys as {name_k}, {rows}")
    if v.shape[-2] != heads:
        refuse(ValueError, name_v, f"of {v.shape[-2]} heads", f"the heads of {name_k}, {heads}")
    if heads == 0 or q.shape[-2] == 0 or q.shape[-2] % heads != 0:
        was = f"of {q.shape[-2]} heads with {name_k} of {heads}"
        refuse(ValueError, "q", was, f"a positive multiple of the heads of {name_k} (MHA, GQA, MQA)")
    if q.shape[-1] == 0:
        refuse(ValueError, "q", "of head_dim 0", "head_dim of at least 1")
    if head_dim != q.shape[-1]:
        refuse(ValueError, name_k, f"of head_dim {head_dim}", f"the head_dim of q, {q.shape[-1]}")
    if v.shape[-1] == 0:
        refuse(ValueError, name_v, "of head_dim 0", "head_dim of at least 1; it may differ from that of q")


def _check_lengths(q: torch.Tensor, lengths: Lengths) -> None:
    batch = None
    for name, x in zip(Lengths._fields[:4], lengths[:4], strict=True):
        if x is not None:
            batch = check_vector(name, x, q.device, batch, "the batch size of cu_seqlens_q")


def check_vector(name: str, x: torch.Tensor, device, batch: int | None, whose: str) -> int:
    """The number of sequences that an int32 vector describes; raises unless it is `batch`, if given."""
    if x.dtype != torch.int32:
        refuse(TypeError, name, f"of dtype {x.dtype}", "torch.int32")
    if x.device != device:
        refuse(ValueError, name, f"on {x.device}", f"the device of q, {device}")
    form = "(batch + 1,), one dimension" if name.startswith("cu_") else "(batch,), one dimension"
    if x.dim() != 1 or not x.is_contiguous():
        was = f"of shape {tuple(x.shape)}, strides {x.stride()}"
        refuse(ValueError, name, was, f"{form}, contiguous")
    found = x.shape[0] - 1 if name.startswith("cu_") else x.shape[0]
    if found < 0:
        refuse(ValueError, name, "empty", f"{form}: at least the leading 0")
    if batch is not None and found != batch:
        refuse(ValueError, name, f"for {found} sequences", f"{whose}, {batch}")
    return found


def check_contents(lengths: Lengths, total_q: int, total_k: int) -> None:
    """Raise unless the numbers inside the length tensors make sense. On a GPU this waits for the device."""
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k = lengths
    check_starts("q", cu_seqlens_q, seqused_q, max_seqlen_q, total_q)
    check_starts("k", cu_seqlens_k, seqused_k, max_seqlen_k, total_k)


def check_starts(side: str, cu_seqlens, seqused, max_seqlen: int, total: int) -> list[int]:
    """The lengths of packed sequences; raises unless they make sense. `side`: what the arguments end in."""
    starts = cu_seqlens.tolist()
    lengths = [after - before for before, after in itertools.pairwise(starts)]
    name = f"cu_seqlens_{side}"
    if starts[0] < 0:
        refuse(ValueError, name, f"starting at {starts[0]}", "starts of at least 0")
    if min(lengths, default=0) < 0:
        i = next(i for i, n in enumerate(lengths) if n < 0)
        was = f"falling from {starts[i]} to {starts[i + 1]} at {i}"
        refuse(ValueError, name, was, "starts that never fall")
    if starts[-1] > total:
        refuse(ValueError, name, f"ending at {starts[-1]}", f"at most the {total} rows of {side}")
    if seqused is not None:
        used = seqused.tolist()
        for i, (n, room) in enumerate(zip(used, lengths, strict=True)):
            if not 0 <= n <= room:
                supported = f"0 to {room}, the length of that sequence"
                refuse(ValueError, f"seqused_{side}", f"{n} at {i}", supported)
        lengths = used
    longest = max(lengths, default=0)
    if longest > max_seqlen:
        refuse(ValueError, f"max_seqlen_{side}", max_seqlen, f"at least {longest}, the longest sequence")
    return lengths


def starts_aligned(*tensors: torch.Tensor) -> bool:
    """Whether all base addresses are multiples of 16 bytes; so they will be of fakes, which have none."""
    return all(isinstance(x, torch._subclasses.FakeTensor) or x.data_ptr() % 16 == 0 for x in tensors)


def check_int(name: str, x, least: int) -> None:
    """Raise unless x is an int (no bool) of at least `least`."""
    if isinstance(x, bool) or not isinstance(x, _INTEGERS):
        refuse(TypeError, name, f"{x!r} ({type(x).__name__})", "int")
    if x < least:
        refuse(ValueError, name, x, f"at least {least}")


def _check_real(name: str, x, supported: str) -> float:
    if isinstance(x, bool) or not isinstance(x, _REALS):
        refuse(TypeError, name, f"{x!r} ({type(x).__name__})", supported)
    if not -_LARGEST <= x <= _LARGEST:  # NaN and infinities; comparisons are what torch.compile can trace
        refuse(ValueError, name, x, supported)
    return x if isinstance(x, (torch.SymFloat, torch.SymInt)) else float(x)


def refuse(error: type[Exception], name: str, was, supported: str) -> NoReturn:
    """Raise in the words of all errors here."""
    raise error(f"{name} is {was}; supported: {supported}")
