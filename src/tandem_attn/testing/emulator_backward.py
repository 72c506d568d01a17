"""The backward kernels on the CPU, as testing/emulator.py runs the forward's.

New here: programs wait for each other through counters in global memory, and add to the same accumulator of
dQ. Programs start in the order of their numbers, a few at a time, as on a card that is full: who waits for a
later one waits for ever. A TMA store or add first reads shared memory and lands later; vector clocks tell
whether an add is ordered after the write that must be complete before it. What the launch before has made
may be touched only by who knows that it has ended (`gdc_wait`).

Not modelled: see testing/emulator.py; the two register orders of dQ are the kernel's own.
"""

from __future__ import annotations

import collections
import dataclasses
import math

import numpy as np

from tandem_attn.device.accumulate import WRITTEN
from tandem_attn.device.sequence import LENGTHS
from tandem_attn.kernels.config_backward import GradientConfig
from tandem_attn.kernels.launch import descriptor_geometry
from tandem_attn.kernels.launch_backward import CHUNK, BackwardPlan, backward_boxes, kernel_of
from tandem_attn.testing.emulator import (
    Descriptor,
    EmulatedLanguage,
    Memory,
    PlainConfig,
    _mma,
    _tma_load,
    load_kernel,
    start_kernel,
)
from tandem_attn.testing.machine import (
    Cell,
    Clock,
    Machine,
    Partition,
    Race,
    check_over,
    join,
    partition,
)
from tandem_attn.testing.plain import DeviceInt, Layout, Pointer

BEFORE = "the launch before"  # whose end is time 1 of this clock
COMPLETE = "complete"  # (who, COMPLETE): how many of their TMA stores are known to be in memory
STALLED = 0.001  # pace of who hardly ever goes on


@dataclasses.dataclass
class GlobalMemory:
    """What a call has in global memory: flat float64 arrays. What nobody writes stays NaN."""

    operands: dict  # "q", "k", "v", "do": (array with its strides, storage)
    statistics: np.ndarray  # lse in base 2, then delta
    lengths: tuple  # (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k), integer arrays or None
    gradients: dict  # "dq", "dk", "dv": contiguous arrays; "dq" only where a kernel of its own makes it
    accumulator: np.ndarray
    counters: np.ndarray


class Accumulator(Descriptor):
    """The accumulator of dQ, and who has contributed what to each chunk."""

    def __init__(self, storage: np.ndarray, ordered: bool):
        super().__init__(storage, (storage.size // 32, 32), (32, 1), (128, 32))
        self.layout, self.ordered = None, ordered
        self.contributions: dict[int, list] = collections.defaultdict(list)  # (who, number, keys)

    def start(self, me: Partition, coords, adds: bool) -> None:
        """Raise unless a write is the first of its chunk, and an add is known to come after what must be
        complete before it: the write, or where keys go in order all others."""
        chunk, rest = divmod(coords[0], self.block_type.shape[0])
        if rest or coords[1] or not 0 <= chunk < self.storage.size // CHUNK**2:
            raise IndexError(f"{coords} is no chunk of the accumulator")
        before = self.contributions[chunk]
        what = f"chunk {chunk} of dQ, {'add' if adds else 'write'} by {me.name}"
        if adds != bool(before):
            raise Race(f"{what}, which is {'not written yet' if adds else 'written already'}")
        for who, number, keys in before if self.ordered else before[:1]:
            if me.clock.get((who, COMPLETE), 0) < number:
                raise Race(f"{what}: what {who} wrote may not be complete")
            if self.ordered and keys <= me.keys:
                raise AssertionError(f"{what}, keys {me.keys}: out of order, after keys {keys}")
        before.append((me.name, len(me.stores) + 1, me.keys))

    def add(self, coords, data: np.ndarray) -> None:
        """What the memory does when the add arrives."""
        address, _ = self.places(coords)
        self.storage[address] += data


class Residents:
    """Which programs have started: in order, and at most so many that are not over."""

    def __init__(self, limit: int):
        self.limit, self.started = limit, 0
        self.waiting: collections.deque[list[Partition]] = collections.deque()
        self.running: list[list[Partition]] = []

    def enter(self, partitions: list[Partition]) -> None:
        """One more program, the last to start."""
        number = self.started + len(self.waiting)
        self.waiting.append(partitions)
        for p in partitions:
            p.ready = lambda: self.has_started(number)

    def has_started(self, number: int) -> bool:
        """Start whom there is room for, and tell whether this program is among them."""
        if number < self.started:
            return True
        self.running = [program for program in self.running if not all(p.over for p in program)]
        while self.waiting and len(self.running) < self.limit:
            self.running.append(self.waiting.popleft())
            self.started += 1
        return number < self.started


class BackwardLanguage(EmulatedLanguage):
    """`gl` with counters in global memory that programs share."""

    def __init__(self, program: int, programs: int, machine: Machine, launch: Launch):
        super().__init__(program, programs, machine)
        self.launch = launch

    def warp_specialize(self, functions, worker_warps, worker_registers):
        first = len(self.machine.partitions)
        super().warp_specialize(functions, worker_warps, worker_registers)
        mine = self.machine.partitions[first:]
        for p, (_, args) in zip(mine, functions, strict=True):
            p.keys = next((a.n_start for a in args if hasattr(a, "n_start")), None)
        self.launch.residents.enter(mine)
        self.launch.specialized.append((self.cells, mine))

    def load(self, pointer, mask=True, other=0):
        if any(pointer.memory is x for x in self.launch.prepared):
            _check_launched("a load")
        return super().load(pointer, mask, other)

    def inline_asm_elementwise(self, asm, constraints, args, dtype=None, is_pure=True, pack=1):
        if ".gpu.global." in asm:
            return self._counter(asm, *args)
        return super().inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack)

    def gdc_wait(self) -> None:
        """Wait for the end of the launch before."""
        self.launch.waited.add(self.program)
        if partition():
            partition().clock[BEFORE] = 1

    def _counter(self, asm: str, pointer: Pointer, value=1):
        """What accumulate.py does to a counter, by the words of its assembly."""
        me, memory = partition(), pointer.memory
        _check_launched("a counter")
        pointer.at(True)
        at = int(pointer.offset)
        released = self.launch.released.setdefault(at, {})
        if "ld." in asm:
            yield (lambda: memory[at] >= value) if "bra WAIT" in asm else None
            if "ld.acquire" in asm:
                join(me.clock, released)
            return DeviceInt(memory[at])
        elif "atom." in asm:
            yield
            before = DeviceInt(memory[at])
            memory[at] += 1
            if before >= WRITTEN.value:  # an add that depends on it meets memory that is as new as the number
                join(me.clock, released)
            return before
        else:
            if "wait_group 0" in asm:
                yield lambda: all(store["landed"] for store in me.stores)
                if "fence.proxy.async" in asm:
                    me.clock[me.name, COMPLETE] = len(me.stores)
            known = me.publish()
            memory[at] += value
            if "red.release" in asm:
                join(released, known)


def _check_end(cells: list[Cell], partitions: list[Partition]) -> None:
    """Raise unless the partitions of a program know that all is over that reads or writes its shared
    memory."""
    known: Clock = {}
    for p in partitions:
        join(known, p.clock)
        if p.products:
            raise AssertionError(f"{p.name} ends while a wgmma is under way")
        if p.clock.get((p.name, "store"), 0) < len(p.stores):
            raise Race(f"{p.name} ends, and TMA may still read its shared memory")
    for cell in cells:
        cell.check_read(known, f"end of the program of {partitions[0].name}")


def _check_launched(what: str) -> None:
    """Raise unless the running partition knows that the launch before is over."""
    if not partition() or partition().clock.get(BEFORE, 0) < 1:
        raise Race(f"{what} before the launch before has ended")


def _load_prepared(desc: Descriptor, coords, bar: Memory, destination: Memory, pred=True):
    if desc.prepared:
        _check_launched(f"TMA load of {coords}")
    yield from _tma_load(desc, coords, bar, destination, pred)


def _start_store(desc: Descriptor, coords, source: Memory, adds: bool):
    """A TMA store or add: the machine reads shared memory some time later, and it lands later still."""
    me, cell = partition(), source.cell
    coords = [int(c) for c in coords]
    cell.check_read(me.clock, f"TMA store to {coords}")
    if cell.unfenced:
        raise Race(f"TMA store to {coords} of shared memory written without a fence since")
    if isinstance(desc, Accumulator):
        desc.start(me, coords, adds)
    cell.reads[me.name, "store"] = len(me.stores) + 1
    store = {"done": False, "landed": False}

    def read():
        data = source.view(cell.data).copy().reshape(desc.block_type.shape)
        store["done"] = True
        Machine.current.under_way.append(lambda: land(data))

    def read_next():  # in order
        next(s for s in me.stores if not s["done"])["read"]()

    def land(data):  # in any order
        (desc.add if adds else desc.write)(coords, data)
        store["landed"] = True

    store["read"] = read
    me.stores.append(store)
    Machine.current.under_way.append(read_next)
    yield


def _tma_store(desc: Descriptor, coords, source: Memory):
    yield from _start_store(desc, coords, source, False)


def _tma_reduce_add(desc: Descriptor, coords, source: Memory):
    yield from _start_store(desc, coords, source, True)


def _strict_mma(a, b: Memory, acc, **options):
    """A wgmma of which every operand is to be there, and fenced if it was stored from registers."""
    for x in (a, b):
        if isinstance(x, Memory) and x.cell.unfenced:
            raise Race(f"wgmma of {partition().name} reads what was written without a fence since")
    product = yield from _mma(a, b, acc, **options)
    if Machine.current.garbage:
        raise Machine.current.garbage[0]
    return product


class _Joined:
    """Several cells that are read and written as one."""

    def __init__(self, cells: list[Cell]):
        self.cells = cells

    @property
    def data(self) -> np.ndarray:
        """Their elements, one after the other."""
        return np.concatenate([cell.data.reshape(-1) for cell in self.cells])

    @property
    def unfenced(self) -> bool:
        """Whether any of them is."""
        return any(cell.unfenced for cell in self.cells)

    @unfenced.setter
    def unfenced(self, value: bool) -> None:
        for cell in self.cells:
            cell.unfenced = value

    @property
    def reads(self) -> _Joined:
        """What takes down a read of all of them."""
        return self

    def __setitem__(self, who, time: int) -> None:
        for cell in self.cells:
            cell.reads[who] = time

    def check_read(self, clock: Clock, what: str) -> None:
        """As that of each cell."""
        for cell in self.cells:
            cell.check_read(clock, what)

    def check_write(self, clock: Clock, what: str) -> None:
        """As that of each cell."""
        for cell in self.cells:
            cell.check_write(clock, what)

    def write(self, who, time: int, data: np.ndarray) -> None:
        """Each cell gets its elements."""
        for cell, part in zip(self.cells, np.split(data, len(self.cells)), strict=True):
            cell.write(who, time, part.reshape(cell.data.shape))


class _Part(_Joined):
    """Some elements of a cell: whoever reads them is not in the way of who writes others."""

    def __init__(self, cell: Cell, start: int):
        super().__init__([cell])
        self.cell, self.start = cell, start

    @property
    def reads(self) -> Clock:
        """Of these elements."""
        return self.cell.reads_of_parts.setdefault(self.start, {})

    def check_write(self, clock: Clock, what: str) -> None:
        """Raise unless all reads of the cell and of this part, and the last write, are known to be over."""
        self.check_read(clock, what)
        for reads in (self.cell.reads, self.reads):
            check_over(reads, clock, what)

    def write(self, who, time: int, data: np.ndarray) -> None:
        """The cell has new data, other parts are read as before."""
        others = {start: reads for start, reads in self.cell.reads_of_parts.items() if start != self.start}
        super().write(who, time, data)
        self.cell.reads_of_parts = others


class _Reinterpreted:
    """The bytes of shared memory, cut anew: each piece a part of a cell, or several whole ones."""

    def __init__(self, memory: Memory, dtype, shape, layout):
        self.memory, self.shape = memory, [int(n) for n in shape]
        assert math.prod(self.shape) == sum(cell.data.size for cell in memory.cells)

    def index(self, i: int) -> Memory:
        """Piece i."""
        size, of_cell = math.prod(self.shape[1:]), self.memory.cells[0].data.size
        number, start = divmod(int(i) * size, of_cell)
        cut = slice(start, start + size)
        cells = [self.memory.index(number + n).cell for n in range(max(size // of_cell, 1))]
        assert start + size <= of_cell * len(cells), "a piece of several cells, and not of whole ones"
        cell = _Part(cells[0], start) if len(cells) == 1 else _Joined(cells)
        return Memory([cell], lambda data: data.reshape(-1)[cut].reshape(self.shape[1:]))


class PlainBackwardConfig(PlainConfig):
    """A configuration as device code reads it, without layouts."""

    def __getattr__(self, name: str):
        if name.endswith(("_layout", "_accumulator")):
            return Layout()
        return super().__getattr__(name)


@dataclasses.dataclass
class Launch:
    """One launch: what its programs share."""

    config: GradientConfig
    programs: int
    arguments: dict  # by name
    numbers: tuple  # all others, in order
    prepared: tuple  # memory that the launch before has written
    residents: Residents
    released: dict[int, Clock] = dataclasses.field(default_factory=dict)  # by counter
    waited: set[int] = dataclasses.field(default_factory=set)
    specialized: list[tuple[list[Cell], list[Partition]]] = dataclasses.field(default_factory=list)

    def run(self, seed: int, mutations: dict[str, str] | None = None, stalled: tuple[str, ...] = ()) -> dict:
        """All programs to their end; the modules of the last one. Partitions with these names hardly ever go
        on while others can; every second seed stalls a few more."""
        machine = Machine.current = Machine(seed)
        kernel = kernel_of(self.config).fn
        for program in range(self.programs):
            gl = BackwardLanguage(program, self.programs, machine, self)
            modules = self._load(kernel.__module__.partition(".")[2], gl, mutations)
            plain = getattr(modules[kernel.__module__], kernel.__name__)
            start_kernel(plain, self.arguments, self.numbers, PlainBackwardConfig(self.config, modules))
        for p in machine.partitions:
            if p.name in stalled or (seed % 2 and machine.random.random() < 0.2):
                p.pace = STALLED
        with np.errstate(all="ignore"):
            machine.run()
        if len(self.waited) < self.programs:
            raise AssertionError("a program ends without a wait for the launch before: nor does the next")
        for cells, partitions in self.specialized:
            _check_end(cells, partitions)
        return modules

    def _load(self, module: str, gl: BackwardLanguage, mutations) -> dict:
        return load_kernel(
            module,
            gl,
            mutations,
            tma_load=_load_prepared,
            tma_store=_tma_store,
            tma_reduce_add=_tma_reduce_add,
            warpgroup_mma=_strict_mma,
            reinterpreted=_Reinterpreted,
            gdc_wait=gl.gdc_wait,
            gdc_launch_dependents=lambda: None,
        )


def _descriptor(storage: np.ndarray, geometry, box, prepared=False) -> Descriptor:
    desc = Descriptor(storage, *geometry, box)
    desc.layout, desc.prepared = None, prepared
    return desc


def _pointer(x) -> Pointer | None:
    return None if x is None else Pointer(np.asarray(x))


def _described(tensors: dict, boxes: dict) -> dict:
    """Descriptors by name of an argument. `tensors`: (array, its storage) by name."""
    return {
        f"{name}_desc": _descriptor(
            storage, descriptor_geometry(x.shape, _strides(x)), boxes[f"{name}_desc"], name == "do"
        )
        for name, (x, storage) in tensors.items()
    }


def launch_by_keys(plan: BackwardPlan, memory: GlobalMemory, limit: int) -> Launch:
    """Of attention_backward or key_gradients, `limit` programs at a time."""
    config = plan.by_keys
    boxes = {name: box for name, (box, *_) in backward_boxes(config).items()}
    arguments = _described(memory.operands, boxes)
    stat = ((memory.statistics.size,), (1,))
    arguments["stat_desc"] = _descriptor(memory.statistics, stat, boxes["stat_desc"], True)
    arguments["dq_desc"] = Accumulator(memory.accumulator, config.ordered)
    for name in ("dk", "dv"):
        x = memory.gradients[name]
        if config.partial:
            arguments[f"{name}_out"] = Pointer(x.reshape(-1))
        else:
            geometry = descriptor_geometry(x.shape, _strides(x))
            arguments[f"{name}_out"] = _descriptor(x.reshape(-1), geometry, boxes[f"{name}_out"])
    arguments["counters"] = Pointer(memory.counters)
    arguments |= {name: _pointer(x) for name, x in zip(LENGTHS, memory.lengths, strict=True)}
    return Launch(config, plan.programs_by_keys, arguments, plan.numbers_by_keys, (), Residents(limit))


def launch_by_queries(plan: BackwardPlan, memory: GlobalMemory, limit: int) -> Launch:
    """Of query_gradient, `limit` programs at a time."""
    config = plan.by_queries
    boxes = {name: box for name, (box, *_) in backward_boxes(config).items()}
    tensors = memory.operands | {"dq": (memory.gradients["dq"], memory.gradients["dq"].reshape(-1))}
    arguments = _described(tensors, boxes)
    arguments["stat_ptr"] = Pointer(memory.statistics)
    arguments |= {name: _pointer(x) for name, x in zip(LENGTHS, memory.lengths, strict=True)}
    prepared = (memory.statistics,)
    programs, numbers = plan.programs_by_queries, plan.numbers_by_queries
    return Launch(config, programs, arguments, numbers, prepared, Residents(limit))


def _strides(x: np.ndarray) -> tuple[int, ...]:
    """In elements."""
    return tuple(s // x.itemsize for s in x.strides)
