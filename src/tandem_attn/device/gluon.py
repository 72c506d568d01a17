"""The one file that knows which Triton this is: names that moved between 3.6 and 3.9, aggregates, and
policies.

Everything else in `device` and `kernels` imports Gluon from here.
"""

import hashlib

import triton
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import base_value
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = [
    "COPIES_OPERANDS",
    "aggregate",
    "async_copy",
    "async_load",
    "base_value",
    "copies_operands",
    "fence_async_shared",
    "gdc_launch_dependents",
    "gdc_wait",
    "gl",
    "gluon",
    "mbarrier",
    "mma_v2",
    "policy",
    "reinterpreted",
    "thread_barrier",
    "tma_load",
    "tma_reduce_add",
    "tma_store",
    "tma_store_wait",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]


def copies_operands(version: str) -> bool:
    """Whether this Triton copies left operands that are in registers in front of each wgmma (from 3.9 on).

    Its ptxas keeps both copies, and kernels that were full spill inside their loops.
    """
    return tuple(map(int, version.split(".")[:2])) >= (3, 9)


COPIES_OPERANDS = copies_operands(triton.__version__)

# Renamed in 3.8 or 3.9; in 3.9 the old names exist and raise.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait
_descriptor = gl.shared_memory_descriptor  # methods of it are called as functions
reinterpreted = getattr(_descriptor, "reinterpret", None) or _descriptor._reinterpret
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in 3.7

if hasattr(tma, "async_atomic_add"):
    tma_reduce_add = tma.async_atomic_add
else:  # 3.6 and 3.7 do not show it, but their builder has it

    @builtin
    def tma_reduce_add(desc, coord, smem, _semantic=None):
        """Start to add a tile of shared memory to global memory; `tma_store_wait` waits for it."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, desc.handle, coord, smem.handle)


if hasattr(gluon, "aggregate"):
    aggregate = gluon.aggregate
else:  # 3.6 and 3.7: private, and it wants an explicit constructor
    from triton.language.core import _aggregate

    def aggregate(cls):
        """A value made of named values (gl.tensor, shared memory, other aggregates, gl.constexpr)."""
        names = list(cls.__annotations__)

        def __init__(self, *args):
            for name, value in zip(names, args, strict=True):
                if cls.__annotations__[name] is gl.constexpr and not isinstance(value, gl.constexpr):
                    value = gl.constexpr(value)
                setattr(self, name, value)

        cls.__init__ = __init__
        wrapped = _aggregate(cls)
        wrapped.hash_attrs = [a for a in wrapped.hash_attrs if a is not __init__]
        return wrapped


def policy(**traits):
    """An aggregate that a kernel takes as a constexpr: one way to do one thing, chosen once on the host.

    `traits` are compile-time facts about the class, read in device code as `Policy.trait`.

    Triton keys a class passed as a constexpr by its name alone, so an edited method would find the old kernel
    in the cache and two classes made by a factory would share one. The name therefore carries a digest of the
    sources.
    """

    def decorate(cls):
        methods = [m for m in vars(cls).values() if hasattr(m, "cache_key")]
        wrapped = aggregate(cls)
        for name, value in traits.items():
            setattr(wrapped, name, gl.constexpr(value))
        source = (
            "".join(m.cache_key for m in methods) + repr(sorted(traits.items())) + repr(cls.__annotations__)
        )
        digest = hashlib.sha256(source.encode()).hexdigest()[:8]
        wrapped.__qualname__ = f"{cls.__qualname__}@{digest}"
        return wrapped

    return decorate
