"""The loops of a disassembled kernel: control flow of an `nvdisasm -c` listing, and what each loop executes.

ptxas moves cold blocks (the waiting part of a barrier wait) to the end of a function and branches back, so
"backward branch" does not mean loop. Here a loop is what graph theory calls one: a set of blocks that all
reach each other.
"""

from __future__ import annotations

import collections
import re

_LABEL = re.compile(r"\s*(\.L_\S+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_GUARD = re.compile(r"@!?U?P\d+\s+")
_TARGET = re.compile(r"\.L_x?_?\w+")
_UNIFORM_WRITE = re.compile(
    r"(@!?U?P\w+\s+)?((?:U(?!TMA|SETMAXREG|ISETP|PLOP3)|R2UR|S2UR)\S*)\s+(?:!?UP\w+,\s+)*UR(\d+)\b"
)
_DESCRIPTORS = re.compile(r"\b[HQ]GMMA\S* R\d+, (R\d+, )?gdesc\[UR(\d+)\]")
_LEAVES = ("EXIT", "RET", "BRX", "BRXU", "JMX", "KILL")  # and an unguarded BRA


class Loop(collections.Counter):
    """How often each instruction (name up to the first dot) occurs in a loop; `MUFU.EX2`, `spill` (local
    loads and stores) and `length` besides."""

    @classmethod
    def of(cls, instructions: list[str]) -> Loop:
        """The histogram of these instructions."""
        plain = [_GUARD.sub("", text) for text in instructions]
        histogram = cls(text.split()[0].split(".")[0] for text in plain)
        histogram["MUFU.EX2"] = sum(text.startswith("MUFU.EX2") for text in plain)
        histogram["spill"] = histogram["LDL"] + histogram["STL"]
        histogram["length"] = len(plain)
        return histogram


def tight_loops(sass: str, products: str = r"\b[HQ]GMMA\.") -> list[Loop]:
    """The loops with matrix products (a regular expression) in which no smaller loop has any, in program
    order."""
    blocks, edges = control_flow(sass)
    multiplying = {b for b, code in enumerate(blocks) if any(re.search(products, text) for text in code)}
    found = []

    def search(nodes: set[int], edges: dict[int, set[int]]) -> bool:
        """Whether there is a loop with products among `nodes`; notes the innermost ones."""
        any_here = False
        for part in cycles(nodes, edges):
            if not part & multiplying:
                continue
            any_here = True
            entries = {b for a in nodes - part for b in edges[a] & part} or {min(part)}
            inside = {a: (edges[a] & part) - entries for a in part}
            if not search(part, inside):
                found.append(part)
        return any_here

    search(set(range(len(blocks))), edges)
    return [Loop.of([text for b in sorted(part) for text in blocks[b]]) for part in sorted(found, key=min)]


def register_use(sass: str, at_start: int) -> dict[int, int]:
    """For each limit that setmaxnreg sets (`at_start` before the first): how many registers code under it
    uses.

    A warp that goes past its limit corrupts the registers of others.
    """
    blocks, edges = control_flow(sass)
    limits: dict[int, set[int]] = {b: set() for b in edges}
    limits[0] = {at_start}
    waiting = [0]
    while waiting:
        b = waiting.pop()
        after = [n for text in blocks[b] if (n := _limit(text))][-1:]
        for c in edges[b]:
            if not (set(after) or limits[b]) <= limits[c]:
                limits[c] |= set(after) or limits[b]
                waiting.append(c)
    used = dict.fromkeys(set().union(*limits.values()), 0)
    for b, code in enumerate(blocks):
        current = limits[b]
        for text in code:
            for limit in current:
                used[limit] = max(used[limit], _highest(text) + 1)
            current = {n} if (n := _limit(text)) else current
    return used


def ambiguous_descriptors(sass: str) -> int:
    """How many uniform registers a wgmma takes as part of a descriptor hold there what one of several
    instructions wrote, depending on the way that was taken. R2UR does not count: it brings back what was put
    aside in another register.

    ptxas (CUDA 12.8, with Triton 3.6) once set the registers of a descriptor only on the way through a loop
    that a packed sequence may skip: head_dim 256, e4m3, 2026-11-30. Of all kernels only that one had such.
    """
    blocks, edges = control_flow(sass)
    before = _reaching_writes(blocks, edges)
    found = 0
    for b, code in enumerate(blocks):
        current = dict(before[b])
        for i, text in enumerate(code):
            for u in _descriptor_registers(text):
                writes = [(c, j) for c, j in current.get(u, ()) if j < 0 or "R2UR" not in blocks[c][j]]
                found += len(writes) > 1
            _write(current, b, i, text)
    return found


def _reaching_writes(blocks: list[list[str]], edges: dict[int, set[int]]) -> list[dict[int, frozenset]]:
    """For each block: uniform register -> where it may have been written last when the block begins."""
    before: list[dict[int, frozenset]] = [{} for _ in blocks]
    before[0] = {u: frozenset({(0, -1)}) for u in range(64)}  # whatever was there
    waiting = [0, *range(len(blocks))]
    while waiting:
        b = waiting.pop()
        after = dict(before[b])
        for i, text in enumerate(blocks[b]):
            _write(after, b, i, text)
        for c in edges[b]:
            merged = {u: before[c].get(u, frozenset()) | writes for u, writes in after.items()}
            if any(merged[u] != before[c].get(u) for u in merged):
                before[c].update(merged)
                waiting.append(c)
    return before


def _write(current: dict[int, frozenset], b: int, i: int, text: str) -> None:
    """Note what instruction i of block b writes; under a guard it may leave what was there."""
    found = _UNIFORM_WRITE.match(text)
    if not found:
        return
    guard, name, first = found.groups()
    for u in range(int(first), int(first) + (2 if ".64" in name or "WIDE" in name else 1)):
        current[u] = frozenset({(b, i)}) | (current.get(u, frozenset()) if guard else frozenset())


def _descriptor_registers(text: str) -> list[int]:
    """Uniform registers of the descriptors of a wgmma: two for the left operand if that is in shared memory,
    and two for the right one, which lie behind."""
    found = _DESCRIPTORS.search(text)
    if not found:
        return []
    left_in_registers, first = found.groups()
    u = int(first)
    return [u + 2, u + 3] if left_in_registers else [u, u + 1, u + 2, u + 3]


def _limit(text: str) -> int | None:
    """The number of registers that this instruction asks for, if it is a setmaxnreg."""
    found = re.search(r"USETMAXREG\S* (?:UP\d+, )?(0x[0-9a-f]+)", text)
    return int(found.group(1), 16) if found else None


def _highest(text: str) -> int:
    """The highest register that the instruction names or, with a wide operand, reaches."""
    registers = [int(n) for n in re.findall(r"\bR(\d+)\b", text)]
    if not registers:
        return -1
    wide = 3 if ".128" in text else 1 if re.search(r"\.64\b", text.split(" ")[0]) else 0
    return max(max(registers), registers[0] + wide)


def control_flow(sass: str) -> tuple[list[list[str]], dict[int, set[int]]]:
    """Basic blocks (lists of instructions) and which block may follow which."""
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1]:
                blocks.append([])
            labels[label.group(1)] = len(blocks) - 1
        elif instruction := _INSTRUCTION.match(line):
            text = instruction.group(1)
            blocks[-1].append(text)
            if _jumps(text) or _ends(text):
                blocks.append([])
    edges: dict[int, set[int]] = {b: set() for b in range(len(blocks))}
    for b, code in enumerate(blocks):
        last = code[-1] if code else ""
        if _jumps(last):
            edges[b] |= {labels[name] for name in _TARGET.findall(last) if name in labels}
        if not _ends(last) and b + 1 < len(blocks):
            edges[b].add(b + 1)
    return blocks, edges


def _jumps(text: str) -> bool:
    name = _GUARD.sub("", text).split(".")[0].split(" ")[0]
    return bool(_TARGET.search(text)) and name not in ("BSSY", "CALL")


def _ends(text: str) -> bool:
    """Whether the instruction after this one is never reached from it."""
    name = text.split(" ")[0].split(".")[0]
    unconditional = name == "BRA" and re.match(r"BRA(\.U)?\s+`\(", text)
    return name in _LEAVES or bool(unconditional)


def cycles(nodes: set[int], edges: dict[int, set[int]]) -> list[set[int]]:
    """Sets of nodes that reach each other by `edges`, of two nodes or one with an edge to itself."""
    backwards: dict[int, set[int]] = {n: set() for n in nodes}
    for a in nodes:
        for b in edges[a] & nodes:
            backwards[b].add(a)
    seen: set[int] = set()
    order: list[int] = []
    for root in nodes:
        for node in _postorder(root, edges, nodes, seen):
            order.append(node)
    assigned: set[int] = set()
    found = []
    for root in reversed(order):
        part = set(_postorder(root, backwards, nodes, assigned))
        if len(part) > 1 or any(n in edges[n] for n in part):
            found.append(part)
    return found


def _postorder(root: int, edges: dict[int, set[int]], nodes: set[int], seen: set[int]) -> list[int]:
    """Nodes reached from `root`, each after those it leads to; marks them in `seen`."""
    if root in seen:
        return []
    seen.add(root)
    order, stack = [], [(root, iter(edges[root] & nodes))]
    while stack:
        node, following = stack[-1]
        for after in following:
            if after not in seen:
                seen.add(after)
                stack.append((after, iter(edges[after] & nodes)))
                break
        else:
            stack.pop()
            order.append(node)
    return order
