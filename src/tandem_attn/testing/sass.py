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


def tight_loops(sass: str) -> list[Loop]:
    """The loops with matrix products (HGMMA) in which no smaller loop has any, in program order."""
    blocks, edges = control_flow(sass)
    products = {b for b, code in enumerate(blocks) if any("HGMMA" in text for text in code)}
    found = []

    def search(nodes: set[int], edges: dict[int, set[int]]) -> bool:
        """Whether there is a loop with products among `nodes`; notes the innermost ones."""
        any_here = False
        for part in cycles(nodes, edges):
            if not part & products:
                continue
            any_here = True
            entries = {b for a in nodes - part for b in edges[a] & part} or {min(part)}
            inside = {a: (edges[a] & part) - entries for a in part}
            if not search(part, inside):
                found.append(part)
        return any_here

    search(set(range(len(blocks))), edges)
    return [Loop.of([text for b in sorted(part) for text in blocks[b]]) for part in sorted(found, key=min)]


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
