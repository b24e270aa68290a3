"""Reads a compiled program from its text: its traffic, its collectives, its kernels.

XLA itself counts the dearer side of each conditional and one trip of each loop, and for
GPUs it counts nothing. Here either side can be taken, and a loop counts for each of its
trips. What is compiled is in `accelerators.py` and `pods.py`.
"""

import collections
import functools as ft
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

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
    channel: str
    """What names a collective in all of its pieces."""


class Traffic(NamedTuple):
    """Bytes that are read and written."""

    counted: float = 0.0
    """As XLA's cost analysis counts them."""
    hbm: float = 0.0
    """To and from the main memory of the chip, where a transfer counts once."""

    def __add__(self, other: "Traffic") -> "Traffic":  # type: ignore[override]
        return Traffic(self.counted + other.counted, self.hbm + other.hbm)

    def looped(self, trips: int) -> "Traffic":
        """XLA counts the body of a loop once."""
        return Traffic(self.counted, trips * self.hbm)


class Moved(NamedTuple):
    """What collectives of one kind move."""

    number: int
    bytes: int
    """What comes out of them, on each chip."""


class Piece(NamedTuple):
    """One line that is a collective, or a part of one."""

    kind: str
    channel: str
    bytes: int
    times: int


_DTYPE_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLS = re.compile(
    r"(?:body|to_apply|calls|branch_computations|true_computation|false_computation"
    r"|called_computations|async_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
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

    def _fusion_hbm(self, fusion: Instruction, types: dict[str, str]) -> int:
        """What a fusion reads and writes. Of an operand that it only slices, and of a
        result that it only updates, that part: stacked layers are met in this way."""
        within = self._of(fusion.called[0]) if fusion.called else []
        total = 0 if _updated(within) else type_bytes(fusion.type, hbm_only=True)
        total += type_bytes(_updated(within), hbm_only=True)
        parameters = [i for i in within if i.op == "parameter"]
        numbers = {i.name: int(i.operands[0]) for i in parameters if i.operands}
        sliced: dict[int, int] = {}
        for name, number in numbers.items():
            users = [i for i in within if name in i.operands]
            if users and all(
                i.op in ("dynamic-slice", "dynamic-update-slice")
                and i.operands[0] == name
                for i in users
            ):
                slices = (i for i in users if i.op == "dynamic-slice")
                sliced[number] = sum(type_bytes(i.type) for i in slices)
        for number, operand in enumerate(fusion.operands):
            whole = type_bytes(types.get(operand, ""), hbm_only=True)
            total += min(whole, sliced.get(number, whole))
        return total

    def collectives(self, usual: bool) -> dict[str, Moved]:
        """What collectives move: count and bytes of each kind. Those in loops count for
        each trip. Of each conditional the side with fewer counts if `usual`, else the
        one with more."""
        # One that works behind others is in the program in several pieces, of the same
        # channel. It happens as often as the piece that is met least.
        pieces: dict[Any, list[Piece]] = collections.defaultdict(list)
        for number, piece in enumerate(self._pieces(usual)):
            pieces[piece.channel or ("none", number)].append(piece)
        found: dict[str, Moved] = {}
        for group in pieces.values():
            kind, _, size, times = min(group, key=lambda piece: piece.times)
            before = found.get(kind, Moved(0, 0))
            found[kind] = Moved(before.number + times, before.bytes + times * size)
        return found

    def _pieces(self, usual: bool, name: str | None = None) -> list["Piece"]:
        found: list[Piece] = []
        types = {i.name: i.type for i in self._of(name)}
        for i in self._of(name):
            kind = i.op.removesuffix("-start")
            if kind in COLLECTIVES:
                size = type_bytes(i.type)
                if i.op.endswith("-start") and kind != "all-reduce":
                    # What starts returns what went in as well.
                    size -= sum(type_bytes(types.get(o, "")) for o in i.operands)
                found.append(Piece(kind, i.channel, size, 1))
            inner = [self._pieces(usual, c) for c in i.called]
            if i.op == "conditional":
                inner = [(min if usual else max)(inner, key=len)]
            times = self._trips(i)
            found += [p._replace(times=times * p.times) for side in inner for p in side]
        return found

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


def _updated(within: list[Instruction]) -> str:
    """The type of what a fusion puts in a larger array that it returns, if it does."""
    types = {i.name: i.type for i in within}
    updates = [i for i in within if i.op == "dynamic-update-slice"]
    if not updates or updates[-1].type not in within[-1].type:
        return ""
    return types.get(updates[-1].operands[1], "")


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
    channel = _CHANNEL.search(rest)
    return Instruction(
        name,
        type_,
        op,
        tuple(operands),
        called,
        condition[1] if condition else "",
        channel[1] if channel else "",
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
