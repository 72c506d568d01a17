"""Device code as plain Python: the sources of `device` and `kernels/forward.py` on numpy arrays and checked
ints.

`load()` executes the very files that the GPU gets, with a stand-in for Gluon: `gluon.jit` does nothing,
tensors are numpy arrays, layouts are ignored, and integers refuse what the GPU would do differently. What
concerns shared memory, barriers and partitions is `testing/emulator.py`.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import pathlib
import re
import sys
import types

import numpy as np

import tandem_attn

PACKAGE = pathlib.Path(tandem_attn.__file__).parent


def _checked(name: str):
    method = getattr(int, name)

    def operation(self, other):
        if not isinstance(other, int):
            return NotImplemented
        if "div" in name or "mod" in name:
            above, below = (other, self) if name.startswith("__r") else (self, other)
            if above < 0 or below <= 0:
                raise ArithmeticError(f"{int(above)} // or % {int(below)}: the GPU truncates, Python floors")
        return type(self)(method(self, int(other)))

    return operation


class DeviceInt(int):
    """An int32 of the GPU: leaves its range or divides a negative number only with an error."""

    bits = 32

    def __new__(cls, value: int):
        if not -(2 ** (cls.bits - 1)) <= value < 2 ** (cls.bits - 1):
            raise OverflowError(f"{int(value)} does not fit in {cls.bits} bits")
        return super().__new__(cls, value)

    def __neg__(self):
        return type(self)(-int(self))

    def to(self, dtype):
        """The same number in 64 or 32 bits, as gl.tensor.to."""
        return Int64(self) if dtype == "int64" else DeviceInt(self)


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "rshift"):
    setattr(DeviceInt, f"__{_name}__", _checked(f"__{_name}__"))
    setattr(DeviceInt, f"__r{_name}__", _checked(f"__r{_name}__"))


class Int64(DeviceInt):
    """An int64 of the GPU."""

    bits = 64


class Array(np.ndarray):
    """A tensor in registers."""

    @property
    def type(self):
        return types.SimpleNamespace(layout=Layout())

    def to(self, dtype, bitcast=False):
        """Itself: the stand-in keeps the precision that numpy has. Or the bits of fp32 as int32, and back."""
        if not bitcast:
            return self
        if dtype == "int32":
            return array(np.asarray(self, np.float32).view(np.int32).astype(np.int64))
        return array(np.asarray(self, np.int32).view(np.float32))

    def permute(self, axes) -> Array:
        """Dimensions in another order."""
        return self.transpose(axes)


class Layout:
    """Any layout."""

    def __init__(self, *args, **kwargs):
        self.parent = self

    @staticmethod
    def get_default_for(shape, dtype) -> Layout:
        """Any layout."""
        return Layout()


def array(x):
    """x as device code sees it: an Array, or a DeviceInt for one integer."""
    if isinstance(x, (bool, np.bool_)):
        return bool(x)
    if isinstance(x, (int, np.integer)):
        return x if isinstance(x, DeviceInt) else DeviceInt(int(x))
    x = np.asarray(x)
    if x.ndim == 0:
        return array(x.item()) if x.dtype.kind in "iub" else x.item()
    return x.view(Array)


class Pointer:
    """A place in global memory; leaving it is an error."""

    def __init__(self, memory: np.ndarray, offset=0, again: bool = False):
        self.memory, self.offset = memory, offset
        self.again = again  # whether an element may be written more than once

    def __add__(self, offset) -> Pointer:
        return Pointer(self.memory, self.offset + offset, self.again)

    def to(self, dtype) -> Pointer:
        """Itself: the address as a number."""
        return self

    def at(self, mask) -> tuple[np.ndarray, np.ndarray]:
        """(indices, those that count)."""
        where = np.asarray(self.offset)
        wanted = np.broadcast_to(np.asarray(mask, bool), where.shape)
        if np.any(wanted & ((where < 0) | (where >= self.memory.size))):
            raise IndexError(f"indices {where[wanted].min()} to {where[wanted].max()} of {self.memory.size}")
        return where, wanted


def _elementwise(function, on_ints):
    def operation(a, b):
        if isinstance(a, int) and isinstance(b, int):
            return on_ints(a, b)
        return array(function(a, b))

    return operation


class DType(str):
    """An element type: arithmetic is numpy's, whatever it says."""

    @property
    def value(self) -> DType:
        return self

    @property
    def primitive_bitwidth(self) -> int:
        return 8 if self == "e4m3" else 16


class Constant(float):
    """A gl.constexpr of a float."""

    @property
    def value(self) -> float:
        return float(self)


QUAD = np.dtype([(name, np.float64) for name in "abcd"])  # four e4m3 values in 32 bits, not rounded


_NUMPY = {"int1": bool, "int32": np.int64, "int64": np.int64}  # all else is float64


class Language:
    """What device code calls `gl`, as far as it is arithmetic."""

    float32 = bfloat16 = float16 = DType("float")
    float8e4nv = DType("e4m3")
    int1, int32, int64 = DType("int1"), DType("int32"), DType("int64")
    tensor = tuple = shared_memory_descriptor = None  # annotations
    BlockedLayout = SliceLayout = DotOperandLayout = SwizzledSharedLayout = NVMMASharedLayout = Layout
    DistributedLinearLayout = Layout
    static_range = range
    minimum = staticmethod(_elementwise(np.minimum, min))
    maximum = staticmethod(_elementwise(np.maximum, max))

    def __init__(self, program: int = 0, programs: int = 1):
        self.program, self.programs = program, programs

    def constexpr(self, x):
        return Constant(x) if type(x) is float else x

    def program_id(self, axis):
        return DeviceInt(self.program)

    def num_programs(self, axis):
        return DeviceInt(self.programs)

    def num_warps(self):
        return 4

    def load(self, pointer, mask=True, other=0):
        where, wanted = pointer.at(mask)
        return array(np.where(wanted, pointer.memory[np.where(wanted, where, 0)], other))

    def store(self, pointer, value, mask=True):
        where, wanted = pointer.at(mask)
        once = pointer.memory.dtype.kind == "f" and not pointer.again
        if once and not np.isnan(pointer.memory[where[wanted]]).all():
            raise AssertionError("an element is written twice")
        pointer.memory[where[wanted]] = np.broadcast_to(value, where.shape)[wanted]

    def arange(self, start, end, layout=None):
        return array(np.arange(start, end))

    def full(self, shape, value, dtype=None, layout=None):
        return array(np.full(shape, value, _NUMPY.get(dtype, np.float64)))

    def zeros(self, shape, dtype=None, layout=None):
        return self.full(shape, 0, dtype)

    def full_like(self, x, value):
        return array(np.full_like(x, value))

    def zeros_like(self, x):
        return array(np.zeros_like(x))

    def where(self, condition, a, b):
        return array(np.where(condition, a, b))

    def sum(self, x, axis):
        return array(np.sum(x, axis))

    def max(self, x, axis):
        return array(np.max(x, axis))

    def fma(self, x, y, z):
        return array(x * y + z)

    def __getattr__(self, name: str):
        """exp2, log2, abs, ...: what is not here means what it means in numpy."""
        function = getattr(np, name, None)
        if not isinstance(function, np.ufunc):
            raise AttributeError(f"testing/plain.py does not know what gl.{name} does")
        return lambda *args: array(function(*args))

    def expand_dims(self, x, axis):
        return array(np.expand_dims(x, axis))

    def broadcast(self, a, b):
        return tuple(array(np.array(x)) for x in np.broadcast_arrays(a, b))

    def split(self, x):
        return array(x[..., 0]), array(x[..., 1])

    def join(self, a, b):
        return array(np.stack([a, b], -1))

    def associative_scan(self, x, axis, combine):
        steps = [x[0]]
        for value in x[1:]:
            steps.append(combine(steps[-1], value))
        return array(np.array(steps))

    def convert_layout(self, x, layout, assert_trivial=False):
        return x

    def to_tensor(self, x):
        return DeviceInt(x) if isinstance(x, int) else x

    def inline_asm_elementwise(self, asm, constraints, args, dtype=None, is_pure=True, pack=1):
        """What these statements mean. A pair packed into 32 bits is a complex number, a quad a record."""
        if "max.s32" in asm:
            return _largest_of_threads(args[0])
        if "e4m3x2" in asm:
            return array(np.array(np.stack(args, -1)).view(QUAD)[..., 0])
        if asm == "mov.b32 $0, $1;" and pack == 4:
            quads = np.asarray(args[0])
            parts = [
                quads[..., h, e][name] for (h, e), name in zip(np.ndindex(2, 2), QUAD.names, strict=True)
            ]
            return array(np.stack(parts, -1).reshape(quads.shape))
        if "cvt.rn" in asm:
            return array(np.asarray(args[0]) + 1j * np.asarray(args[1]))
        if asm == "mov.b32 $0, $1;":
            return array(np.stack([args[0][..., 0].real, args[0][..., 1].imag], -1))
        if "vote.sync" in asm or asm.startswith("mul.rn."):
            return array(args[0] * args[1])
        if asm == "mov.u32 $0, 0;":
            return DeviceInt(0)
        if "st.shared.f32 [a]" in asm or "shfl.sync.idx" in asm:
            return args[0]
        if "atom.global.add" in asm:
            where, _ = args[0].at(True)
            before = array(args[0].memory[where])
            args[0].memory[where] += args[1]  # 1 where it draws at all
            return before if args[1] else DeviceInt(0)
        raise NotImplementedError(f"testing/plain.py does not know what this does: {asm}")


def _largest_of_threads(bits):
    """For each number of a wgmma accumulator the largest of its row that its thread has: of bits of floats,
    which lie the other way round where they are negative."""
    of_threads = np.asarray(bits).reshape(bits.shape[0], -1, 4, 2)
    largest, smallest = (f(of_threads, (1, 3), keepdims=True) for f in (np.max, np.min))
    found = np.where(largest < 0, smallest, largest)
    return array(np.broadcast_to(found, of_threads.shape).reshape(bits.shape))


def _jit(function=None, **options):
    return function if function else lambda f: f


def aggregate(cls):
    """A class with one positional argument per annotated field, which cannot change afterwards."""
    names = list(cls.__annotations__)

    def __init__(self, *args):
        for name, value in zip(names, args, strict=True):
            value = DeviceInt(value) if type(value) is int else value
            object.__setattr__(self, name, value)

    def __setattr__(self, name, value):
        raise AttributeError(f"{cls.__name__}.{name} is set after construction")

    cls.__init__, cls.__setattr__ = __init__, __setattr__
    return cls


def policy(**traits):
    """An aggregate with traits."""

    def decorate(cls):
        for name, value in traits.items():
            setattr(cls, name, value)
        return aggregate(cls)

    return decorate


def gluon_module(gl: Language, **names) -> types.ModuleType:
    """A stand-in for device/gluon.py around `gl`."""
    module = types.ModuleType("tandem_attn.device.gluon")
    jit = types.SimpleNamespace(jit=_jit, constexpr_function=lambda f: f)
    missing = dict.fromkeys(("fence_async_shared", "mbarrier", "tma_load", "tma_store", "tma_store_wait"))
    missing |= dict.fromkeys(("warpgroup_mma", "warpgroup_mma_wait", "base_value"))
    vars(module).update(missing | dict(gl=gl, gluon=jit, aggregate=aggregate, policy=policy) | names)
    return module


def _unchanged(tree: ast.Module) -> ast.Module:
    return tree


@functools.lru_cache(maxsize=64)
def _compiled(source: str, path: str, transform):
    return compile(transform(ast.parse(source)), path, "exec")


def load(names: list[str], gluon: types.ModuleType, mutations=None, transform=_unchanged) -> dict:
    """Execute modules `names` ("device.mask") and all they import from device code over a stand-in for Gluon.

    Returns the modules by their full names. `mutations` {old: new} replace pieces of source text, each of
    which must be there: tests show with them that they notice. `transform` rewrites syntax trees.
    """
    loaded: dict[str, types.ModuleType] = {gluon.__name__: gluon}
    unused = dict(mutations or {})

    def execute(full: str) -> None:
        path = PACKAGE.parent.joinpath(*full.split(".")).with_suffix(".py")
        source = path.read_text()
        for old in [m for m in unused if m in source]:
            source = source.replace(old, unused.pop(old))
        for needed in re.findall(r"^from (tandem_attn\.(?:device|kernels)\.\w+) import", source, re.M):
            if needed not in loaded:
                execute(needed)
        module = loaded[full] = types.ModuleType(full)
        module.__file__ = str(path)
        with _standing_in(loaded):
            exec(_compiled(source, str(path), transform), vars(module))

    for name in names:
        if f"tandem_attn.{name}" not in loaded:
            execute(f"tandem_attn.{name}")
    if unused:
        raise ValueError(f"not in the sources: {list(unused)}")
    return loaded


@contextlib.contextmanager
def _standing_in(modules: dict[str, types.ModuleType]):
    """What `from tandem_attn.device.x import y` finds meanwhile."""
    real = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in real.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
