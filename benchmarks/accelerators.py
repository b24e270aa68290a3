"""Count what constraints cost on accelerators, on a machine that has none.

`--platform tpu` compiles one training step of a linear layer with the compiler for real
TPUs, for one v5e chip and for four, and counts what the program does: bytes, flops,
peak memory and collectives. Then it checks the counts against bounds, and lowers every
map and transform for cuda, rocm and tpu. `--platform cuda` compiles the same steps for
an H100 and counts kernels. Nothing runs, so there are no times. Run
`python benchmarks/accelerators.py --help` for the flags. What is read from a program's
text is in `programs.py`, and the lowering in `lowering.py`.

The step is SGD in float32 on a 4096 x 4096 `eqx.nn.Linear`, with the parameters
donated. Products have JAX's default precision: on a TPU one pass in bfloat16.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

# First, for it sets what the compilers read from the environment.
import compilers
import equinox as eqx
import eqxreg
import every
import jax
import jax.numpy as jnp
import lowering
import numpy as np
import optax
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from programs import Moved, Program
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


SIZE = 4096
BATCHES = (256, 4096)
RATE = 1e-3
BOUND = 1.0
CHIPS = {"one chip": (1, 1), "2 x 2": (2, 2)}

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
    all_chips = compilers.tpus("v5e:2x2")
    for chips, dims in CHIPS.items():
        devices = all_chips[: int(np.prod(dims))].reshape(dims)
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
        gathers = [s.all_collectives.get("all-gather", Moved()) for s in (step, base)]
        if step is not base and step.chips != "one chip":
            more = gathers[0].bytes - gathers[1].bytes
            text = f"{step.variant}, batch {step.batch}, {step.chips}: "
            # Vectors may be: those of a power iteration are.
            text += f"{more / 1e6:+.2f} MB gathered, less than a shard of the weight"
            yield text, more < SIZE * SIZE


def _counted(kind: str, usual: Moved, dear: Moved) -> str:
    more = f" (or {dear.number})" if dear.number > usual.number else ""
    return f"{usual.number} {kind}{more}"


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
            dear = s.all_collectives
            moved = [_counted(k, m, dear[k]) for k, m in sorted(s.collectives.items())]
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
    bytes: float
    """What the kernels of the step read and write, derived from the program's text."""


def compile_kernels(console: Console, target: Path) -> Iterator[Kernels]:
    """All variants with each batch, on one GPU."""
    sharding = jax.sharding.SingleDeviceSharding(compilers.gpu(target))
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
                bytes=whole.traffic(usual=True).hbm,
            )


def show_kernels(console: Console, results: list[Kernels]) -> None:
    for batch in dict.fromkeys(k.batch for k in results):
        group = [k for k in results if k.batch == batch]
        table = new_table(f"H100, batch {batch}: kernels")
        table.add_column("step", no_wrap=True)
        titles = ("forward", "added", "step", "added", "in rare branches", "bytes")
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
                f"{k.bytes / base.bytes:.2f}",
            )
        console.print(table)
        console.print(f"1.00 is {base.bytes / 1e6:.0f} MB.\n", soft_wrap=True)


# All of it.


def new_table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))


def run(flags: Flags) -> bool:
    """Counts everything, prints the tables and writes the file. Whether all holds."""
    console = Console(highlight=False)
    fine = True
    numbers: dict[str, Any] = {"about": compilers.about()}
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
        missing = every.unlisted()
        if missing:
            console.print(f"Not lowered: {', '.join(missing)}.")
        results = list(lowering.lower_all(console))
        lowering.show(console, results)
        numbers["lowering"] = results
        fine = fine and not missing and all(error is None for *_, error in results)
    if flags.json is not None:
        text = json.dumps(numbers, indent=2)
        flags.json.write_text(text + "\n", encoding="utf-8")
        console.print(f"All numbers are in {flags.json}.", soft_wrap=True)
    return fine


if __name__ == "__main__":
    sys.exit(not run(tyro.cli(Flags)))
