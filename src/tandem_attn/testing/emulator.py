"""The forward kernel on the CPU: its own source, run by generators that take turns at random.

Partitions are generators of which one runs at a time; barriers, TMA and wgmma behave as on Hopper, in an
order that a seed decides: loads land late, products are done when waited for. Every access to shared memory
is checked with vector clocks: unless barriers order it after all that it depends on, it is a `Race`,
whether or not this order of events showed harm. Numbers are real too: the results can be compared with the
reference.

Not modelled: layouts, registers, rounding (P stays exact), and instructions inside a warpgroup.
"""

from __future__ import annotations

import inspect
import math
import re
import types

import numpy as np

from tandem_attn.device.sequence import LENGTHS
from tandem_attn.kernels.config import ForwardConfig
from tandem_attn.kernels.launch import ForwardPlan, forward_boxes
from tandem_attn.testing.machine import (
    NEVER,
    Barrier,
    Cell,
    Machine,
    NamedBarrier,
    Partition,
    Race,
    as_generators,
    join,
    partition,
)
from tandem_attn.testing.plain import (
    Array,
    DeviceInt,
    Int64,
    Language,
    Layout,
    Pointer,
    array,
    gluon_module,
    load,
)


class Memory:
    """What allocate_shared_memory returns: cells of equal shape, or views of one of them."""

    dtype = layout = None  # not modelled

    def __init__(self, cells, view=lambda data: data, slots=False):
        self.cells, self.view, self.slots = cells, view, slots

    @property
    def shape(self) -> tuple[int, ...]:
        if self.slots:
            return (len(self.cells), *self.cells[0].data.shape)
        return self.view(np.empty(self.cells[0].data.shape)).shape

    def index(self, i: int) -> Memory:
        if not 0 <= i < len(self.cells):
            raise IndexError(f"slot {i} of {len(self.cells)} in shared memory")
        return Memory([self.cells[i]])

    @property
    def cell(self) -> Cell:
        assert len(self.cells) == 1, "an access to all slots at once"
        return self.cells[0]

    def permute(self, axes) -> Memory:
        return Memory([self.cell], lambda data: self.view(data).transpose(axes))

    def reshape(self, shape) -> Memory:
        return Memory([self.cell], lambda data: self.view(data).reshape(shape))

    def slice(self, start: int, length: int, dim: int = 0) -> Memory:
        place = (*[slice(None)] * dim, slice(int(start), int(start) + length))
        return Memory([self.cell], lambda data: self.view(data)[place])

    def load(self, layout) -> Array:
        me = partition()
        self.cell.check_read(me.clock, f"{me.name} loads")
        self.cell.reads[me.name] = me.time
        return array(self.view(self.cell.data).copy())

    def store(self, value) -> None:
        me = partition()
        self.cell.check_write(me.clock, f"{me.name} stores")
        value = np.array(value)
        data = self.cell.data.astype(value.dtype)  # a copy, in which a view may leave some as it was
        place = self.view(data)
        place[...] = value.reshape(place.shape)
        self.cell.write(me.name, me.time, data)
        self.cell.unfenced = True


class Descriptor:
    """A TMA descriptor over flat storage: any geometry, zeros outside, an error beyond the storage."""

    def __init__(self, storage: np.ndarray, shape, strides, box):
        self.storage, self.shape, self.strides = storage, shape, strides
        self.block_type = types.SimpleNamespace(shape=list(box), nbytes=2 * math.prod(box))
        self.dtype = "float"

    def places(self, coords) -> tuple[np.ndarray, np.ndarray]:
        """(addresses, inside) of every element of the box at `coords`; addresses wrap at 2**64 bytes."""
        address, inside = np.zeros((), np.uint64), np.ones((), bool)
        for coord, dim, stride, size in zip(
            coords, self.shape, self.strides, self.block_type.shape, strict=True
        ):
            along = np.arange(coord, coord + size, dtype=np.int64)
            address = address[..., None] + along.astype(np.uint64) * np.uint64(2 * stride % 2**64)
            inside = inside[..., None] & (along >= 0) & (along < dim)
        address = np.where(inside, address // np.uint64(2), 0).astype(np.int64)
        if address.max(initial=0) >= self.storage.size:
            raise IndexError(f"TMA at {coords} leaves its tensor")
        return address, inside

    def read(self, coords) -> np.ndarray:
        address, inside = self.places(coords)
        return np.where(inside, self.storage[address], 0.0)

    def write(self, coords, data: np.ndarray) -> None:
        address, inside = self.places(coords)
        if not np.isnan(self.storage[address[inside]]).all():
            raise AssertionError(f"O is written twice at {coords}")
        self.storage[address[inside]] = data[inside]


class _Words:
    """Shared memory seen as int32: only e4m3 ones are written like that, before partitions start."""

    def __init__(self, memory: Memory, dtype, shape, layout):
        self.memory = memory

    def store(self, value) -> None:
        assert np.all(np.asarray(value) == 0x38383838), "four e4m3 ones"
        assert Machine.current is None
        cell = self.memory.cell
        cell.written, cell.data = ("the start", 0), np.ones(self.memory.shape)


class Product:
    """A wgmma under way: acc + a b, of what a and b hold until it is waited for."""

    def __init__(self, a, b: Memory, acc, use_acc):
        self.a, self.b, self.acc, self.use_acc, self.result = a, b, acc, use_acc, None
        self.operands = [x for x in (a, b) if isinstance(x, Memory)]
        self.garbage = False

    def finish(self) -> None:
        a, b = (x.view(x.cell.data) if isinstance(x, Memory) else x for x in (self.a, self.b))
        acc = self.acc.result if isinstance(self.acc, Product) else self.acc
        product = a @ b  # tests/conftest.py: by one thread, more cost more than they save
        if self.garbage:
            product[...] = np.nan
        self.result = array(acc + product if self.use_acc else product)


class _MBarrier:
    MBarrierLayout = Layout

    @staticmethod
    def init(bar: Memory, count: int) -> None:
        bar.cell.barrier = Barrier()
        bar.cell.barrier.init(count)

    @staticmethod
    def arrive(bar: Memory, *, count: int = 1, pred=True) -> None:
        me = partition()
        if pred:
            bar.cell.barrier.arrive(count, me.publish())
        yield

    @staticmethod
    def expect(bar: Memory, nbytes: int, pred=True) -> None:
        bar.cell.barrier.bytes += nbytes
        bar.cell.barrier.arrive(1, partition().publish())

    @staticmethod
    def wait(bar: Memory, phase: int, pred=True, deps=()) -> None:
        me, barrier = partition(), bar.cell.barrier
        if pred:
            yield lambda: barrier.phase & 1 != phase
            join(me.clock, barrier.released)


def _tma_load(desc: Descriptor, coords, bar: Memory, destination: Memory, pred=True) -> None:
    me, cell, barrier = partition(), destination.cell, bar.cell.barrier
    coords = [int(c) for c in coords]
    cell.check_write(me.clock, f"TMA load of {coords}")
    cell.fills += 1
    who = ("TMA", id(cell))
    cell.write(who, cell.fills, np.full(cell.data.shape, np.nan))
    clock = me.publish() | {who: cell.fills}

    def land():
        cell.data = desc.read(coords).reshape(cell.data.shape)
        join(barrier.gathering, clock)
        barrier.bytes -= desc.block_type.nbytes
        assert barrier.bytes >= 0, "more bytes than announced"
        barrier.complete()

    Machine.current.under_way.append(land)
    yield


def _tma_store(desc: Descriptor, coords, source: Memory) -> None:
    me, cell = partition(), source.cell
    coords = [int(c) for c in coords]
    cell.check_read(me.clock, f"TMA store to {coords}")
    if cell.unfenced:
        raise Race(f"TMA store to {coords} of shared memory written without a fence since")
    number = len(me.stores) + 1
    cell.reads[me.name, "store"] = number
    store = {"done": False}

    def finish():
        first = next(s for s in me.stores if not s["done"])  # in order
        first["done"] = True
        first["write"]()

    store["write"] = lambda: desc.write(coords, cell.data.reshape(desc.block_type.shape))
    me.stores.append(store)
    Machine.current.under_way.append(finish)
    yield


def _tma_store_wait(pendings: int = 0) -> None:
    me = partition()
    yield (lambda: sum(not s["done"] for s in me.stores) <= pendings)
    join(me.clock, {(me.name, "store"): max(len(me.stores) - pendings, 0)})


def _fence(cells: list[Cell]):
    def fence_async_shared(cluster=False) -> None:
        if Machine.current is None:  # before partitions start, which orders everything
            return
        me = partition()
        for cell in cells:
            if cell.written and cell.written[0] == me.name:
                cell.unfenced = False

    return fence_async_shared


def _mma(a, b: Memory, acc, *, use_acc=True, precision=None, max_num_imprecise_acc=None, is_async=False):
    me = partition()
    product = Product(a, b, acc, use_acc)
    try:
        for x in product.operands:
            x.cell.check_read(me.clock, f"wgmma of {me.name}")
            if x.cell.written is None:
                raise Race(f"wgmma of {me.name} reads what was never written")
        for x in product.operands:
            x.cell.reads[me.name] = NEVER
    except Race as race:  # fair where nobody uses the result: the P V before a program's first
        product.garbage, product.operands = True, []
        Machine.current.garbage.append(race)
    me.products.append(product)
    if not is_async:
        return (yield from _mma_wait(0, deps=(product,)))
    yield
    return product


def _mma_wait(num_outstanding: int = 0, deps=None):
    me = partition()
    yield
    while len(me.products) > num_outstanding:
        product = me.products.pop(0)
        product.finish()
        for x in product.operands:
            busy = any(x.cell is y.cell for p in me.products for y in p.operands)
            if me.name in x.cell.reads:
                x.cell.reads[me.name] = NEVER if busy else me.time
    results = tuple(d.result if isinstance(d, Product) else d for d in deps)
    assert all(r is not None for r in results), "the result of a wgmma that is still under way"
    return results[0] if len(results) == 1 else results


class EmulatedLanguage(Language):
    """`gl` with shared memory, partitions and named barriers."""

    def __init__(self, program: int, programs: int, machine: Machine):
        super().__init__(program, programs)
        self.machine, self.cells, self.named = machine, [], {}

    def num_warps(self):
        return partition().warps if partition() else 4

    def allocate_shared_memory(self, dtype, shape, layout):
        cells = [Cell(tuple(int(n) for n in shape[1:])) for _ in range(int(shape[0]))]
        self.cells += cells
        return Memory(cells, slots=True)

    def warp_specialize(self, functions, worker_warps, worker_registers):
        """Only noted: run_forward starts the partitions of all programs together."""
        for (function, args), warps in zip(functions, [4, *worker_warps], strict=True):
            name = f"program {self.program} {function.__name__}{args[0] if isinstance(args[0], int) else ''}"
            self.machine.partitions.append(Partition(name, function(*args), warps))

    def inline_asm_elementwise(self, asm, constraints, args, dtype=None, is_pure=True, pack=1):
        named = NAMED_BARRIER.search(asm)
        if named:
            return self.named_barrier(*named.groups(), args)
        return super().inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack)

    def named_barrier(self, guarded, op: str, number: str, total: str, args):
        """bar.sync or bar.arrive by the running partition."""
        if guarded and not args[1]:
            return args[0]
        me = partition()
        number = int(args[0] if number == "$1" else number)
        assert 8 <= number < 16, f"named barrier {number}: Triton has 0 to 7, the hardware 16"
        barrier = self.named.setdefault(number, NamedBarrier())
        generation = barrier.generation
        barrier.arrive(32 * me.warps, int(total), me.publish())
        yield (lambda: barrier.generation > generation) if op == "sync" else None
        if op == "sync":
            join(me.clock, barrier.released)
        return args[0]


NAMED_BARRIER = re.compile(r"(@p )?bar\.(sync|arrive) (\$1|\d+), (\d+);")


def load_kernel(
    module: str, gl: EmulatedLanguage, mutations: dict[str, str] | None = None, **instead
) -> dict:
    """The plain modules of a kernel in `module`, by full name. `instead`: other stand-ins for Gluon."""
    stand_ins = dict(
        mbarrier=_MBarrier,
        tma_load=_tma_load,
        tma_store=_tma_store,
        tma_store_wait=_tma_store_wait,
        fence_async_shared=_fence(gl.cells),
        reinterpreted=_Words,
        warpgroup_mma=_mma,
        warpgroup_mma_wait=_mma_wait,
    )
    gluon = gluon_module(gl, **stand_ins | instead)
    return load(["device.schedule", "device.mask", module], gluon, mutations, as_generators)


class PlainConfig:
    """A ForwardConfig with plain policies, as device code reads it."""

    def __init__(self, config: ForwardConfig, modules: dict):
        self.static, self._config, self._modules = self, config, modules

    def __getattr__(self, name: str):
        if name in ("dtype", "out_dtype"):
            e4m3 = name == "dtype" and self._config.element == "fp8e4nv"
            return Language.float8e4nv if e4m3 else Language.bfloat16
        value = getattr(self._config, name)
        if name in ("Mask", "Sequences", "Schedule", "Precision"):
            return getattr(self._modules[value.__module__], value.__name__)
        return DeviceInt(value) if type(value) is int else value


def start_kernel(kernel, arguments: dict, numbers: tuple, config: PlainConfig) -> None:
    """Run a kernel up to its partitions. `arguments` are by name; all others are numbers, in order."""
    wanted = list(inspect.signature(kernel).parameters)[:-1]
    named = zip([n for n in wanted if n not in arguments], numbers, strict=True)
    values = {n: Int64(x) if "magic" in n else array(x) for n, x in named}
    for _ in kernel(*((arguments | values)[n] for n in wanted), config):
        raise AssertionError("the kernel waits outside its partitions")


def run_forward(plan: ForwardPlan, tensors, lengths, programs: int, seed: int, mutations=None, descales=None):
    """(out, lse, reads of garbage) of a launch of `plan` with so many programs, all at once.

    tensors: (storage of q, of k, of v), flat float64 arrays; lengths: (cu_seqlens_q, cu_seqlens_k, seqused_q,
    seqused_k), integer arrays or None; descales: those of q, k and v and lse_shift or None, flat arrays. What
    no program writes stays NaN.
    """
    out = np.full(math.prod(plan.spec.out_shape), np.nan)
    lse = np.full(math.prod(plan.spec.lse_shape), np.nan)
    counter = np.zeros(1, np.int64)
    arguments = {
        name: Descriptor(storage, *geometry, box)
        for (name, (box, _)), storage, geometry in zip(
            forward_boxes(plan.config).items(), (*tensors, out), plan.geometry, strict=True
        )
    }
    pointers = dict(zip(LENGTHS, lengths, strict=True))
    pointers |= {"lse_ptr": lse, "counter": counter}
    arguments |= {name: None if x is None else Pointer(np.asarray(x)) for name, x in pointers.items()}
    arguments["descales"] = descales and tuple(None if x is None else Pointer(x) for x in descales)
    arguments["aside"] = None
    if plan.config.promote > 0:
        arguments["aside"] = Pointer(np.full(programs * plan.aside_elements, np.nan), again=True)
    machine, Machine.current = Machine(seed), None
    for program in range(programs):
        modules = load_kernel("kernels.forward", EmulatedLanguage(program, programs, machine), mutations)
        kernel = modules["tandem_attn.kernels.forward"].attention_forward
        start_kernel(kernel, arguments, plan.numbers, PlainConfig(plan.config, modules))
    with np.errstate(all="ignore"):
        machine.run()
    assert counter[0] == 0, "the next launch finds the tile counter not at zero"
    return out.reshape(plan.spec.out_shape), lse.reshape(plan.spec.lse_shape), machine.garbage
