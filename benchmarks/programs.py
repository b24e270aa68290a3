"""Reads a compiled program from its text: its traffic, its collectives, its kernels.

XLA itself counts the dearer side of each conditional and one trip of each loop, and for
GPUs it counts nothing. Here either side can be taken, and a loop counts for each of its
trips. What is compiled is in `accelerators.py` and `pods.py`.
"""

import collections
import dataclasses
import functools as ft
import re
from collections.abc import Iterator, Set
from typing import NamedTuple, Self

import numpy as np


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    """The computations that it runs: the sides of a conditional, the body of a loop."""
    condition: str
    """The computation that says whether a loop goes on."""


class _Amounts:
    """Numbers that are added one by one."""

    def __add__(self, other: Self) -> Self:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return type(self)(*map(sum, pairs))


@dataclasses.dataclass(frozen=True)
class Traffic(_Amounts):
    """Bytes that are read and written."""

    counted: float = 0.0
    """As XLA's cost analysis counts them."""
    hbm: float = 0.0
    """To and from the main memory of the chip, where a transfer counts once."""

    def looped(self, trips: int) -> "Traffic":
        """XLA counts the body of a loop once."""
        return Traffic(self.counted, trips * self.hbm)


@dataclasses.dataclass(frozen=True)
class Moved(_Amounts):
    """What collectives of one kind move."""

    number: int = 0
    bytes: int = 0
    """What goes into them or what comes out, whichever is more, on each chip."""

    def looped(self, trips: int) -> "Moved":
        return Moved(trips * self.number, trips * self.bytes)


_DTYPE_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLS = re.compile(
    r"(?:body|to_apply|calls|branch_computations|true_computation|false_computation"
    r"|called_computations|async_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
}
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


def array_bytes(text: str) -> Iterator[tuple[int, bool]]:
    """The size of each array in a type, and whether it is in the main memory."""
    for dtype, dims, layout in _ARRAY.findall(text):
        digits = re.search(r"\d+", dtype)
        bits = _DTYPE_BITS.get(dtype, int(digits.group()) if digits else 0)
        count = int(np.prod([int(d) for d in dims.split(",") if d], dtype=np.int64))
        yield count * bits // 8, "S(" not in layout


def type_bytes(text: str, hbm_only: bool = False) -> int:
    """The size of all arrays in a type."""
    return sum(n for n, is_hbm in array_bytes(text) if is_hbm or not hbm_only)


def _split_at_space(text: str) -> tuple[str, str]:
    """A type and what follows it: types have spaces, but only in parentheses."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if char == " " and depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


class Program:
    """A compiled program, read from its text."""

    def __init__(self, text: str):
        self.entry = ""
        self.computations: dict[str, list[Instruction]] = {}
        current: list[Instruction] | None = None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif current is not None and (found := _LINE.match(line)):
                current.append(_instruction(*found.groups()))

    def traffic(self, usual: bool, name: str | None = None) -> Traffic:
        """The traffic of a computation, by default of the program. Of each conditional
        the cheaper side counts if `usual`, else the dearer one. A fusion counts by what
        goes in and comes out."""
        total = Traffic()
        types = {i.name: i.type for i in self._of(name)}
        for i in self._of(name):
            if i.op in ("conditional", "while", "call"):
                inner = [self.traffic(usual, c) for c in i.called]
                if i.op == "conditional":
                    choose = min if usual else max
                    total += choose(inner, key=lambda t: t.counted)
                else:
                    both = ft.reduce(Traffic.__add__, inner, Traffic())
                    total += both.looped(self._trips(i))
            elif i.op == "fusion":
                hbm = self._fusion_hbm(i, types)
                total += Traffic(_own_traffic(i, types).counted, hbm)
            elif i.op not in _FREE:
                total += _own_traffic(i, types)
        return total

    def _fusion_hbm(self, fusion: Instruction, types: dict[str, str]) -> float:
        """What a fusion reads and writes. Of an operand that it only slices, and of a
        result that it only updates, that part: stacked layers are met in this way. Of
        a collective that it goes on with, nothing: what started it has counted it."""
        within = self._of(fusion.called[0]) if fusion.called else []
        if not within:
            return _own_traffic(fusion, types).hbm
        if fusion.name.startswith("async-collective-done"):
            return 0
        goes_on = _goes_on(fusion, fusion.called[0])
        idle = {within[-1].name} if goes_on else set()
        idle |= {i.name for i in within if goes_on and i.op in COLLECTIVES}
        total = _written(within, idle)
        for i in within:
            if i.op == "parameter" and i.operands:
                operand = fusion.operands[int(i.operands[0])]
                whole = type_bytes(types.get(operand, ""), hbm_only=True)
                total += self._read(within, i.name, whole, idle)
        return total

    def _read(
        self,
        within: list[Instruction],
        name: str,
        whole: int,
        idle: Set[str] = frozenset(),
    ) -> int:
        """What the instructions of a fusion read of an array that has `whole` bytes."""
        total = whole if name == within[-1].name else 0
        for user in (i for i in within if name in i.operands and i.name not in idle):
            if user.op == "dynamic-slice" and user.operands[0] == name:
                total += type_bytes(user.type)
            elif user.op in ("bitcast", "pad"):
                total += self._read(within, user.name, whole, idle)
            elif user.op == "fusion":
                inner = self._of(user.called[0])
                number = str(user.operands.index(name))
                for i in inner:
                    if i.op == "parameter" and i.operands == (number,):
                        total += self._read(inner, i.name, whole)
            elif user.op != "dynamic-update-slice" or user.operands[0] != name:
                total += whole
        return min(total, whole)

    def collectives(self, usual: bool, name: str | None = None) -> dict[str, Moved]:
        """What collectives of each kind move, in a computation, by default in the
        program. Those in loops count for each trip. Of each conditional the side that
        moves less counts if `usual`, else the one that moves more."""
        found: dict[str, Moved] = collections.defaultdict(Moved)
        types = {i.name: i.type for i in self._of(name)}
        for i in self._of(name):
            kind = i.op.removesuffix("-start")
            if kind in COLLECTIVES:
                found[kind] += Moved(1, _moved_bytes(i, types))
            called = [c for c in i.called if not _goes_on(i, c)]
            sides = [_kinds(c, self.collectives(usual, c)) for c in called]
            if i.op == "conditional":
                sides = [(min if usual else max)(sides, key=all_moved)]
            for kind, moved in (item for side in sides for item in side.items()):
                found[kind] += moved.looped(self._trips(i))
        return dict(found)

    def kernels(self, usual: bool, name: str | None = None) -> collections.Counter:
        """What a GPU is given to do, by kind."""
        found: collections.Counter = collections.Counter()
        for i in self._of(name):
            if i.op == "conditional":
                sides = [self.kernels(usual, c) for c in i.called]
                found += (min if usual else max)(sides, key=lambda c: c.total())
            elif i.op in ("while", "call", "async-start"):
                for c in i.called:
                    for op, count in self.kernels(usual, c).items():
                        found[op] += self._trips(i) * count
            elif i.op not in _FREE and not i.op.endswith("-done"):
                found[i.op] += 1
        return found

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs, if it counts from zero to a constant; else 1."""
        within = {i.name: i for i in self._of(loop.condition)} if loop.condition else {}
        last = list(within.values())[-1:]
        for name in last[0].operands if last and last[0].op == "compare" else ():
            if name in within and within[name].op == "constant":
                return int(within[name].operands[0])
        return 1

    def _of(self, name: str | None) -> list[Instruction]:
        return self.computations.get(self.entry if name is None else name, [])


def all_moved(collectives: dict[str, Moved]) -> tuple[int, int]:
    """Bytes that collectives of all kinds move, and then how many these are."""
    total = sum(collectives.values(), Moved())
    return total.bytes, total.number


def _moved_bytes(i: Instruction, types: dict[str, str]) -> int:
    read = sum(type_bytes(types.get(operand, "")) for operand in i.operands)
    # Most that start return what went in as well.
    returns_both = i.op.endswith("-start") and i.op != "all-reduce-start"
    return max(read, type_bytes(i.type) - read * returns_both)


def _goes_on(fusion: Instruction, called: str) -> bool:
    """Whether a fusion goes on with a collective that another one has started: what
    works behind others is in each of these fusions once more."""
    return called.startswith("async_collective_fusion") or fusion.name.startswith(
        "async-collective-done"
    )


def _kinds(called: str, found: dict[str, Moved]) -> dict[str, Moved]:
    """An all-reduce of which each chip keeps a part is another kind."""
    if called.startswith("all-reduce-scatter") and found:
        return {"reduce-scatter": sum(found.values(), Moved())}
    return found


def _written(within: list[Instruction], idle: set[str]) -> int:
    """What a fusion writes. The `idle` only hand on what others write."""
    made = {i.name: i for i in within}
    root = within[-1]
    names = root.operands if root.op == "tuple" else (root.name,)
    arrays = list(array_bytes(root.type))
    if len(names) != len(arrays):
        return type_bytes(root.type, hbm_only=True)
    total = 0
    for name, (size, is_hbm) in zip(names, arrays, strict=True):
        source = made[name]
        while source.op == "bitcast":
            source = made[source.operands[0]]
        if source.op == "dynamic-update-slice":
            size = type_bytes(made[source.operands[1]].type)
        is_written = name not in idle and not (idle and source.op == "parameter")
        total += size * (is_hbm and is_written)
    return total


def _instruction(name: str, rest: str) -> Instruction:
    type_, rest = _split_at_space(rest)
    op, _, rest = rest.partition("(")
    depth, end = 1, 0
    for end, char in enumerate(rest):  # noqa: B007
        depth += (char == "(") - (char == ")")
        if depth == 0:
            break
    # Parameters and constants have a number in their place.
    is_leaf = op in ("parameter", "constant")
    pattern = r"^-?\d+$" if is_leaf else r"%([\w.\-]+)"
    operands = re.findall(pattern, rest[:end])
    # A reduction's `to_apply` is arithmetic and no call.
    is_call = op not in ("reduce", "scatter", "sort", "map", "reduce-window")
    is_call = is_call and op.removesuffix("-start") not in COLLECTIVES
    groups = _CALLS.findall(rest[end:]) if is_call else []
    called = tuple(c for g in groups for c in re.findall(r"[\w.\-]+", g))
    condition = _CONDITION.search(rest) if op == "while" else None
    return Instruction(
        name,
        type_,
        op,
        tuple(operands),
        called,
        condition[1] if condition else "",
    )


def _own_traffic(i: Instruction, types: dict[str, str]) -> Traffic:
    read = [types.get(operand, "") for operand in i.operands]
    if i.op in ("copy-start", "slice-start"):
        # The result names the destination first and the source again.
        sizes = [(n, is_hbm) for n, is_hbm in array_bytes(i.type)]
        (target, is_hbm), *others = sizes if i.op == "copy-start" else sizes[1:]
        from_hbm = bool(type_bytes(read[0], hbm_only=True))
        return Traffic(2 * target, target * (is_hbm + from_hbm))
    if i.op in ("copy-done", "slice-done"):
        return Traffic(2 * type_bytes(i.type), 0)
    whole = [i.type, *read]
    hbm = sum(type_bytes(t, hbm_only=True) for t in whole)
    return Traffic(sum(map(type_bytes, whole)), hbm)
