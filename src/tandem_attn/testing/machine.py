"""Generators that stand in for the partitions of a kernel: one runs at a time, and a seed decides which.

Barriers are Hopper's; what they order is kept in vector clocks, so that two accesses to shared memory that
nothing orders are found whether or not this run showed harm.
"""

from __future__ import annotations

import ast
import random

import numpy as np

NEVER = 2**62  # time of an access still under way


class Race(AssertionError):
    """Two accesses to the same place that nothing orders."""


class Deadlock(AssertionError):
    """Everyone waits and nothing is under way."""


Clock = dict  # who -> how far we know of their doings


def join(mine: Clock, other: Clock) -> None:
    """Learn what `other` knows."""
    for who, time in other.items():
        if time > mine.get(who, 0):
            mine[who] = time


class Cell:
    """One stage or slot of shared memory."""

    def __init__(self, shape):
        self.data = np.full(shape, np.nan)
        self.written: tuple | None = None  # (who, time)
        self.reads: Clock = {}
        self.reads_of_parts: dict[int, Clock] = {}  # by the first element of a part
        self.unfenced = False
        self.fills = 0

    def check_read(self, clock: Clock, what: str) -> None:
        """Raise unless the last write is known to be over."""
        if self.written is None:
            return  # what is read is NaN
        who, time = self.written
        if clock.get(who, 0) < time:
            raise Race(f"{what}: not ordered after the write by {who}")

    def check_write(self, clock: Clock, what: str) -> None:
        """Raise unless all reads and the last write are known to be over."""
        if self.written is not None:
            self.check_read(clock, what)
        for reads in (self.reads, *self.reads_of_parts.values()):
            check_over(reads, clock, what)

    def write(self, who, time: int, data) -> None:
        """From now on this is what the cell holds."""
        self.written, self.reads, self.reads_of_parts, self.unfenced = (who, time), {}, {}, False
        self.data = data


def check_over(reads: Clock, clock: Clock, what: str) -> None:
    """Raise unless `clock` knows that these reads are over."""
    for who, time in reads.items():
        if clock.get(who, 0) < time:
            raise Race(f"{what}: a read by {who} may not be over")


class Barrier:
    """An mbarrier: phases of `count` arrivals and as many bytes as were announced."""

    def __init__(self):
        self.count = 0

    def init(self, count: int) -> None:
        self.count = self.missing = count
        self.bytes, self.phase = 0, 0
        self.gathering: Clock = {}
        self.released: Clock = {}

    def arrive(self, count: int, clock: Clock) -> None:
        """`count` arrivals by someone who knows `clock`."""
        join(self.gathering, clock)
        self.missing -= count
        if self.missing < 0:
            raise AssertionError("more arrivals than a phase has")
        self.complete()

    def complete(self) -> None:
        """Go on to the next phase if this one has all it waits for."""
        if self.missing == 0 and self.bytes == 0:
            join(self.released, self.gathering)
            self.phase, self.missing, self.gathering = self.phase + 1, self.count, {}


class NamedBarrier:
    """A hardware barrier: completes when so many threads have come by bar.sync or bar.arrive."""

    def __init__(self):
        self.threads, self.generation = 0, 0
        self.gathering: Clock = {}
        self.released: Clock = {}

    def arrive(self, threads: int, total: int, clock: Clock) -> None:
        """`threads` more of `total`."""
        join(self.gathering, clock)
        self.threads += threads
        if self.threads > total:
            raise AssertionError(f"{self.threads} threads at a named barrier of {total}")
        if self.threads == total:
            join(self.released, self.gathering)
            self.threads, self.generation, self.gathering = 0, self.generation + 1, {}


class Partition:
    """One warp or warpgroup: a generator that yields where others may go first, with what it waits for."""

    def __init__(self, name: str, steps, warps: int):
        self.name, self.steps, self.warps = name, steps, warps
        self.ready = _always
        self.over = False
        self.pace: float | None = None  # how often it goes on, others do so 1 or 10 times; None: by the seed
        self.time = 1
        self.clock: Clock = {name: 1}
        self.products: list = []  # wgmma under way, oldest first
        self.stores: list[dict] = []  # all TMA stores so far

    def step(self) -> None:
        """Run on until the next yield."""
        try:
            self.ready = next(self.steps) or _always
        except StopIteration:
            self.over = True
            if any(not store["done"] for store in self.stores):
                raise AssertionError(f"{self.name} ends while TMA reads its shared memory") from None

    def publish(self) -> Clock:
        """What others know who are ordered after this moment; later doings are not in it."""
        known = dict(self.clock)
        self.time += 1
        self.clock[self.name] = self.time
        return known


def _always() -> bool:
    return True


class Machine:
    """Everything that runs at the same time: the partitions of all programs."""

    current: Machine  # the one that runs

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.partitions: list[Partition] = []
        self.running: Partition | None = None
        self.under_way: list = []  # loads and stores: functions that finish them
        self.garbage: list[Race] = []  # reads of no one knows what

    def run(self) -> None:
        """Until all are over. Who is next is random, with a bias that differs from seed to seed."""
        Machine.current = self
        partitions = self.partitions
        weight = {p: p.pace or self.random.choice((1, 1, 10)) for p in partitions}
        landing = self.random.choice((0.1, 1, 10))
        while waiting := [p for p in partitions if not p.over]:
            free = [p for p in waiting if p.ready()]
            if not free and not self.under_way:
                raise Deadlock(f"{', '.join(p.name for p in waiting)} wait for ever")
            weights = [weight[p] for p in free] + [landing] * len(self.under_way)
            (choice,) = self.random.choices(free + self.under_way, weights)
            if isinstance(choice, Partition):
                self.running = choice
                choice.step()
            else:
                self.under_way.remove(choice)
                choice()
        while self.under_way:
            self.under_way.pop(0)()


def partition() -> Partition:
    """Whose code is running."""
    return Machine.current.running


class AsGenerators(ast.NodeTransformer):
    """Rewrites functions so that they can stop in the middle: a call that returns a generator runs it to
    its end.

    f(x) becomes ((yield from r) if type(r := f(x)) is generator else r).
    """

    def __init__(self):
        self.inside = False

    def visit_FunctionDef(self, node):
        """Only what runs when the function is called: no decorators, defaults or annotations."""
        if any("constexpr_function" in ast.unparse(decorator) for decorator in node.decorator_list):
            return node
        before, self.inside = self.inside, True
        node.body = [self.visit(statement) for statement in node.body]
        self.inside = before
        return node

    def visit_AnnAssign(self, node):
        """The annotation of a local variable is not evaluated."""
        if node.value:
            node.value = self.visit(node.value)
        return node

    def visit_Call(self, node):
        """See the class."""
        self.generic_visit(node)
        if not self.inside:
            return node
        template = ast.parse("(yield from _r) if type(_r := 0) is _generator else _r", mode="eval").body
        template.test.left.args[0].value = node
        return ast.copy_location(template, node)


def as_generators(tree: ast.Module) -> ast.Module:
    """See AsGenerators."""
    tree = AsGenerators().visit(tree)
    tree.body.insert(0, ast.parse("_generator = type((lambda: (yield))())").body[0])
    return ast.fix_missing_locations(tree)
