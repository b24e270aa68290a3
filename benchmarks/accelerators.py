"""Count what constraints cost on accelerators, on a machine that has none.

`--platform tpu` compiles one training step of a linear layer with the compiler for real
TPUs, for one v5e chip and for four, and counts what the program does: bytes, flops,
peak memory and collectives. Then it checks the counts against bounds, and lowers every
map and transform for cuda, rocm and tpu. `--platform cuda` compiles the same steps for
an H100 and counts kernels. Nothing runs, so there are no times. Run
`python benchmarks/accelerators.py --help` for the flags.

The step is SGD in float32 on a 4096 x 4096 `eqx.nn.Linear`, with the parameters
donated. Products have JAX's default precision: on a TPU one pass in bfloat16.
"""

import os


# The compiler asks neither a metadata server nor a device. Read at import.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import collections
import dataclasses
import functools as ft
import importlib.metadata
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import export
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


SIZE = 4096
BATCHES = (256, 4096)
RATE = 1e-3
BOUND = 1.0
CHIPS = {"one chip": (1, 1), "2 x 2": (2, 2)}
LOWERED_FOR = ("cuda", "rocm", "tpu")

Role: TypeAlias = Literal["weight", "data", "other"]


@dataclasses.dataclass(frozen=True)
class Flags:
    """Count bytes, flops, memory, collectives and kernels of constrained steps."""

    platform: Literal["tpu", "cuda"] = "tpu"
    """What to compile for."""
    steps: bool = True
    """Whether to compile the training steps."""
    lowering: bool = True
    """Whether to lower all maps and transforms. For TPUs only."""
    target: Path = Path(__file__).with_name("h100_target_config.txtpb")
    """What the compiler for GPUs is to know of the GPU."""
    json: Path | None = None
    """A JSON file for all numbers."""


# Programs, as the compiler prints them.


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


# Steps.


class Variant(NamedTuple):
    """A way to constrain the layer."""

    wrap: Callable[..., Any] = lambda layer, key: layer
    every: int | None = None
    """How often to project after the update."""


def _max_norm(axis: str | None) -> Callable[..., Any]:
    make = eqxreg.MaxNormConstraint
    return lambda layer, key: make(layer, "weight", BOUND, axis=axis)


PLAIN = "unconstrained"
UNIT = "MaxNorm, unit"
WHOLE = "MaxNorm, whole"
SPECTRAL = "SpectralNorm, warm"
VARIANTS = {
    PLAIN: Variant(),
    UNIT: Variant(_max_norm("unit")),
    WHOLE: Variant(_max_norm(None)),
    SPECTRAL: Variant(
        lambda layer, key: eqxreg.SpectralNormConstraint(layer, "weight", key=key)
    ),
    "WeightNorm": Variant(
        lambda layer, key: eqxreg.WeightNormConstraint(layer, "weight")
    ),
    "project": Variant(every=1),
    "project, every 10": Variant(every=10),
}


def make_step(
    variant: Variant, batch: int, shard: Callable[[Role], Any]
) -> tuple[Callable, Callable, tuple[Any, ...]]:
    """One step of training, its forward pass, and the shapes of their arguments, laid
    out as `shard` says."""
    optimiser = optax.sgd(RATE)
    if variant.every is not None:
        projection = eqxreg.MaxNorm(BOUND, axis="unit")
        after = eqxreg.project(projection, every=variant.every)
        optimiser = optax.chain(optimiser, after)

    def init(key):
        make = eqx.nn.make_with_state(variant.wrap)
        model, state = make(eqx.nn.Linear(SIZE, SIZE, key=key), key=key)
        return model, state, optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    def loss(model, state, x, y):
        if isinstance(model, eqx.nn.StatefulLayer) and model.is_stateful():
            axes = (0, None)
            out, state = jax.vmap(model, in_axes=axes, out_axes=axes)(x, state)
        else:
            out = jax.vmap(model)(x)
        return jnp.mean((out - y) ** 2), state

    shapes = eqx.filter_eval_shape(init, jax.random.key(0))
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    shapes, static = eqx.partition(shapes, is_shape)

    def forward(arrays, x, y):
        model, state, _ = eqx.combine(arrays, static)
        return loss(model, state, x, y)[0]

    def step(arrays, x, y):
        model, state, carried = eqx.combine(arrays, static)
        grad = eqx.filter_value_and_grad(loss, has_aux=True)
        (value, state), grads = grad(model, state, x, y)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, carried = optimiser.update(grads, carried, params)
        model = eqx.apply_updates(model, updates)
        return eqx.filter((model, state, carried), eqx.is_array), value

    def laid_out(s):
        role = "weight" if s.shape == (SIZE, SIZE) else "other"
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=shard(role))

    data = jax.ShapeDtypeStruct((batch, SIZE), jnp.float32, sharding=shard("data"))
    return step, forward, (jax.tree.map(laid_out, shapes), data, data)


def on_mesh(mesh: Mesh) -> Callable[[Role], NamedSharding]:
    """The weight is sharded over both axes, the data over the first."""
    specs = {"weight": P("model", "data"), "data": P("data"), "other": P()}
    return lambda role: NamedSharding(mesh, specs[role])


# Steps on TPUs.


@dataclasses.dataclass(frozen=True)
class Step:
    """What was counted of one step."""

    chips: str
    batch: int
    variant: str
    bytes: float
    """By XLA's cost analysis, which counts the dearer side of each conditional, and
    transfers between memories several times."""
    usual_bytes: float
    """The same with the cheaper side of each conditional, the one that is taken nearly
    always. Derived from the program's text."""
    usual_hbm: float
    """What goes to and from the main memory on that way. Derived likewise."""
    flops: float
    peak: float
    collectives: dict[str, Moved]
    """With the cheaper side of each conditional."""
    all_collectives: dict[str, Moved]
    """With the dearer one."""
    parsed: float
    """`bytes`, as derived from the text: how far to trust what else is."""


def compile_steps(console: Console) -> Iterator[Step]:
    """All variants, on each number of chips and with each batch."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    for chips, dims in CHIPS.items():
        devices = np.array(topology.devices[: int(np.prod(dims))]).reshape(dims)
        shard = on_mesh(Mesh(devices, ("data", "model")))
        for batch in BATCHES:
            for name, variant in VARIANTS.items():
                with console.status(f"{chips}, batch {batch}: {name}"):
                    yield compile_step(chips, batch, name, variant, shard)


def compile_step(
    chips: str, batch: int, name: str, variant: Variant, shard: Callable
) -> Step:
    step, _, shapes = make_step(variant, batch, shard)
    compiled = jax.jit(step, donate_argnums=0).lower(*shapes).compile()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    assert cost is not None and memory is not None
    program = Program(compiled.as_text() or "")
    usual, dear = program.traffic(usual=True), program.traffic(usual=False)
    counted = cost["bytes accessed"]
    return Step(
        chips=chips,
        batch=batch,
        variant=name,
        bytes=counted,
        usual_bytes=counted - (dear.counted - usual.counted),
        usual_hbm=usual.hbm,
        flops=cost["flops"],
        peak=memory.peak_memory_in_bytes,
        collectives=program.collectives(usual=True),
        all_collectives=program.collectives(usual=False),
        parsed=dear.counted,
    )


class Limit(NamedTuple):
    """The most bytes that a step may access, in those of the unconstrained one."""

    variant: str
    batch: int
    ratio: float


# On one chip, and by XLA's own count.
LIMITS = (
    Limit(UNIT, 256, 1.10),
    Limit(UNIT, 4096, 1.50),
    Limit(WHOLE, 256, 1.50),
    Limit(WHOLE, 4096, 1.50),
    Limit(SPECTRAL, 256, 1.50),
    Limit(SPECTRAL, 4096, 1.50),
)


def check_steps(steps: list[Step]) -> Iterator[tuple[str, bool]]:
    """Each check, and whether it holds."""
    by_name = {(s.chips, s.batch, s.variant): s for s in steps}
    for variant, batch, limit in LIMITS:
        base = by_name["one chip", batch, PLAIN]
        ratio = by_name["one chip", batch, variant].bytes / base.bytes
        text = f"{variant}, batch {batch}: bytes {ratio:.3f}x, at most {limit:.2f}x"
        yield text, ratio <= limit
    for step in steps:
        base = by_name[step.chips, step.batch, PLAIN]
        none = Moved(0, 0)
        gathers = [s.all_collectives.get("all-gather", none) for s in (step, base)]
        if step is not base and step.chips != "one chip":
            more = gathers[0].bytes - gathers[1].bytes
            text = f"{step.variant}, batch {step.batch}, {step.chips}: "
            # Vectors may be: those of a power iteration are.
            text += f"{more / 1e6:+.2f} MB gathered, less than a shard of the weight"
            yield text, more < SIZE * SIZE


def _counted(kind: str, usual: int, all_of_them: int) -> str:
    more = f" (or {all_of_them})" if all_of_them > usual else ""
    return f"{usual} {kind}{more}"


def show_steps(console: Console, steps: list[Step]) -> None:
    """A table for each number of chips and batch."""
    for chips, batch in dict.fromkeys((s.chips, s.batch) for s in steps):
        group = [s for s in steps if (s.chips, s.batch) == (chips, batch)]
        base = group[0]
        table = new_table(f"TPU v5e, {chips}, batch {batch}")
        table.add_column("step", no_wrap=True)
        titles = ("bytes", "usual", "HBM", "flops", "peak MB", "collectives")
        for title in titles:
            table.add_column(title, justify="right")
        for s in group:
            extra = {k: m.number for k, m in s.all_collectives.items()}
            moved = [_counted(k, m.number, extra[k]) for k, m in s.collectives.items()]
            numbers = (
                f"{s.bytes / base.bytes:.2f}",
                f"{s.usual_bytes / base.bytes:.2f}",
                f"{s.usual_hbm / base.usual_hbm:.2f}",
                f"{s.flops / base.flops:.2f}",
                f"{s.peak / 1e6:.0f}",
                ", ".join(moved),
            )
            table.add_row(s.variant, *numbers)
        console.print(table)
        console.print(
            f"1.00 is {base.bytes / 1e6:.0f} MB by XLA's count, "
            f"{base.usual_hbm / 1e6:.0f} MB to and from HBM, "
            f"{base.flops / 1e9:.1f} Gflop.\n",
            soft_wrap=True,
        )


# Lowering.


def every_map() -> dict[str, eqxreg.Parametrization]:
    """One map of each kind, and each of its methods."""
    inf = float("inf")
    ball = eqxreg.MaxNorm(BOUND, axis="unit")
    maps: list[eqxreg.Parametrization] = [
        *(eqxreg.MaxNorm(BOUND, axis="unit", ord=o) for o in (1, 2, inf)),
        eqxreg.MaxNorm(BOUND),
        eqxreg.MinMaxNorm(0.5, BOUND, axis="unit"),
        eqxreg.UnitNorm(axis="unit"),
        eqxreg.NonNegative(),
        eqxreg.Box(-BOUND, BOUND),
        eqxreg.Simplex(),
        *(eqxreg.SpectralNorm(method=m) for m in ("lanczos", "gram", "svd")),
        *(eqxreg.SpectralScale(method=m) for m in ("lanczos", "gram", "svd")),
        *(eqxreg.SpectralCap(method=m) for m in (None, "products", "factorisation")),
        *(eqxreg.Orthogonal(method=m) for m in (None, "products", "factorisation")),
        eqxreg.AlmostOrthogonal(),
        eqxreg.Symmetric(),
        eqxreg.SkewSymmetric(),
        eqxreg.PositiveSemidefinite(),
        eqxreg.LowRank(2),
        eqxreg.Masked(np.tri(_SIDE, dtype=bool)),
        eqxreg.Positive(),
        eqxreg.Interval(-BOUND, BOUND),
        eqxreg.Cayley(),
        eqxreg.MatrixExp(),
        eqxreg.StraightThrough(ball),
        eqxreg.Chain(eqxreg.NonNegative(), ball),
        eqxreg.Relative(ball),
    ]
    return {_name(p): p for p in maps}


def every_transform() -> dict[str, Callable[[Any], optax.GradientTransformation]]:
    """One transform of each kind, given the parameters."""
    rate = RATE
    step: dict[str, Any] = {"learning_rate": rate}
    unit = eqxreg.MaxNorm(BOUND, axis="unit")
    project = ft.partial(eqxreg.project, unit)
    return {
        "weight_decay": lambda _: eqxreg.weight_decay(rate),
        "sign_decay": lambda _: eqxreg.sign_decay(rate),
        "decay_towards": lambda params: eqxreg.decay_towards(params, rate),
        "cautious_weight_decay": lambda _: eqxreg.cautious_weight_decay(rate),
        "corrected_weight_decay": lambda _: eqxreg.corrected_weight_decay(rate, rate),
        "independent_weight_decay": lambda _: eqxreg.independent_weight_decay(
            rate, rate
        ),
        "soft_threshold": lambda _: eqxreg.soft_threshold(rate, **step),
        "group_soft_threshold": lambda _: eqxreg.group_soft_threshold(rate, **step),
        "elastic_net_prox": lambda _: eqxreg.elastic_net_prox(rate, rate, **step),
        "project": lambda _: project(),
        "project, every 10": lambda _: project(every=10),
        "project, tangent": lambda _: project(momentum="tangent"),
        "project, SpectralNorm": lambda _: eqxreg.project(eqxreg.SpectralNorm()),
    }


_SIDE = 64


def _name(p: eqxreg.Parametrization) -> str:
    """The class, and what is not at its default among what has few values."""
    given = [getattr(p, name, None) for name in ("method", "axis", "ord")]
    words = [str(value) for value in given if value is not None]
    return ", ".join([type(p).__name__, *words])


def unlisted(maps: Iterable[eqxreg.Parametrization]) -> list[str]:
    """The public maps that `every_map` lacks."""
    listed = {type(p).__name__ for p in maps}
    public = {
        name
        for name, value in vars(eqxreg).items()
        if isinstance(value, type) and issubclass(value, eqxreg.Parametrization)
    }
    return sorted(public - listed - {"Parametrization", "Projection"})


def lower_all(console: Console) -> Iterator[tuple[str, str, str | None]]:
    """The name of what is lowered, the platform, and the error if there is one."""
    layer = eqx.nn.Linear(_SIDE, _SIDE, key=jax.random.key(0))
    weight = jax.ShapeDtypeStruct((_SIDE, _SIDE), jnp.float32)

    def map_step(p, raw):
        return jax.value_and_grad(lambda raw: jnp.sum(p(raw) ** 2))(raw)

    functions: dict[str, Callable] = {}
    for name, p in every_map().items():
        # Positive, for `Positive` has no other weights.
        p, _ = p.bind(jnp.abs(layer.weight))
        functions[name] = ft.partial(map_step, p)
    for name, make in every_transform().items():
        functions[name] = ft.partial(_update, make, layer)
    functions["SpectralNormConstraint"] = ft.partial(_stateful_update, layer)
    for name, function in functions.items():
        for platform in LOWERED_FOR:
            with console.status(f"lowering {name} for {platform}"):
                try:
                    export.export(jax.jit(function), platforms=[platform])(weight)
                    error = None
                except Exception as e:
                    error = f"{type(e).__name__}: {str(e).splitlines()[0]}"
            yield name, platform, error


def _update(make: Callable, layer: Any, weight: Any) -> Any:
    params = eqx.filter(layer, eqx.is_inexact_array)
    transform = make(params)
    params = eqx.tree_at(lambda layer: layer.weight, params, weight)
    updates = jax.tree.map(jnp.ones_like, params)
    return transform.update(updates, transform.init(params), params)[0]


def _stateful_update(layer: Any, weight: Any) -> Any:
    make = eqx.nn.make_with_state(eqxreg.SpectralNormConstraint)
    wrapped, state = make(layer, "weight", key=jax.random.key(0))

    def loss(weight):
        where = lambda wrapped: wrapped.layer.weight
        return jnp.sum(eqx.tree_at(where, wrapped, weight)(weight[0], state)[0])

    return jax.grad(loss)(weight)


def show_lowering(console: Console, results: list[tuple[str, str, str | None]]) -> None:
    failed = [(n, p, error) for n, p, error in results if error is not None]
    names = len({name for name, *_ in results})
    platforms = ", ".join(LOWERED_FOR)
    console.print(
        f"Lowered {names} maps and transforms, with their gradients, for {platforms}: "
        f"{len(failed)} of {len(results)} failed.",
        soft_wrap=True,
    )
    for name, platform, error in failed:
        console.print(f"  {name}, {platform}: {error}", markup=False, soft_wrap=True)


# Kernels on GPUs.


@dataclasses.dataclass(frozen=True)
class Kernels:
    """How many kernels a program has, by kind. Of each conditional, the side counts
    that is taken nearly always."""

    batch: int
    variant: str
    forward: dict[str, int]
    step: dict[str, int]
    rare: int
    """How many more there are in the other sides of conditionals."""


def compile_kernels(console: Console, target: Path) -> Iterator[Kernels]:
    """All variants with each batch, on one GPU."""
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology="1x1x1",
        target_config=target.read_text(encoding="utf-8"),
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    for batch in BATCHES:
        for name, variant in VARIANTS.items():
            with console.status(f"batch {batch}: {name}"):
                step, forward, shapes = make_step(variant, batch, lambda _: sharding)
                compiled = (
                    jax.jit(forward).lower(*shapes).compile(),
                    jax.jit(step, donate_argnums=0).lower(*shapes).compile(),
                )
                first, whole = (Program(c.as_text() or "") for c in compiled)
            usual = whole.kernels(usual=True)
            yield Kernels(
                batch=batch,
                variant=name,
                forward=dict(first.kernels(usual=True)),
                step=dict(usual),
                rare=whole.kernels(usual=False).total() - usual.total(),
            )


def show_kernels(console: Console, results: list[Kernels]) -> None:
    for batch in dict.fromkeys(k.batch for k in results):
        group = [k for k in results if k.batch == batch]
        table = new_table(f"H100, batch {batch}: kernels")
        table.add_column("step", no_wrap=True)
        titles = ("forward", "added", "whole step", "added", "in rare branches")
        for title in titles:
            table.add_column(title, justify="right")
        base = group[0]
        for k in group:
            forward, step = sum(k.forward.values()), sum(k.step.values())
            table.add_row(
                k.variant,
                str(forward),
                f"{forward - sum(base.forward.values()):+d}",
                str(step),
                f"{step - sum(base.step.values()):+d}",
                str(k.rare),
            )
        console.print(table)


# All of it.


def new_table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))


def about() -> dict[str, str]:
    """With what the numbers were made."""
    versions = {}
    for name in ("eqxreg", "equinox", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def run(flags: Flags) -> bool:
    """Counts everything, prints the tables and writes the file. Whether all holds."""
    console = Console(highlight=False)
    fine = True
    numbers: dict[str, Any] = {"about": about()}
    if flags.platform == "cuda":
        kernels = list(compile_kernels(console, flags.target))
        show_kernels(console, kernels)
        numbers["kernels"] = [dataclasses.asdict(k) for k in kernels]
    elif flags.steps:
        steps = list(compile_steps(console))
        show_steps(console, steps)
        numbers["steps"] = [dataclasses.asdict(s) for s in steps]
        checks = list(check_steps(steps))
        for text, holds in checks:
            mark = "[green]holds[/]" if holds else "[red]fails[/]"
            console.print(f"{mark} {text}", soft_wrap=True)
            fine = fine and holds
        numbers["checks"] = dict(checks)
    if flags.platform == "tpu" and flags.lowering:
        missing = unlisted(every_map().values())
        if missing:
            console.print(f"Not lowered: {', '.join(missing)}.")
        results = list(lower_all(console))
        show_lowering(console, results)
        numbers["lowering"] = results
        fine = fine and not missing and all(error is None for *_, error in results)
    if flags.json is not None:
        text = json.dumps(numbers, indent=2)
        flags.json.write_text(text + "\n", encoding="utf-8")
        console.print(f"All numbers are in {flags.json}.", soft_wrap=True)
    return fine


if __name__ == "__main__":
    sys.exit(not run(tyro.cli(Flags)))
