"""Measure what constraints cost, beside other libraries: `make bench`.

- maps: a map alone, forward and backward, relative to copying weight and gradient;
- steps: a whole training step, relative to the same step without the constraint;
- compiling: time, and size of the program, for many layers.

All ways of doing one thing take turns in one process, and a number is the median of the
ratios of neighbours. In float32, on the default device. Run `python benchmarks/speed.py
--help` for the flags.
"""

import os


# Two threads of OpenBLAS spin while they wait for each other. Read at import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import dataclasses
import functools as ft
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import optax
import peers
import tyro
from eqxreg._maps import WeightNorm
from eqxreg._maps._scale_norm import warm
from jax import lax
from jaxtyping import Array
from networks import CNN, LSTM, MLP, Transformer, stepper
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from timing import Call, about, in_turn, medians, ratios


BOUND = 0.5
"""Below the norms of units of a new layer, so that constraints have something to do."""


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure what constraints cost, beside other libraries."""

    quick: bool = False
    """Fewer sizes, repetitions and networks: a run of about two minutes."""
    output: Path = Path("out/bench")
    """The folder for `speed.json` and `speed.png`."""
    only: str = ""
    """A regular expression: groups whose title it does not match are left out."""

    @property
    def rounds(self) -> int:
        """How often each call is timed at least."""
        return 5 if self.quick else 15


@dataclasses.dataclass(frozen=True)
class Group:
    """Ways of doing one thing."""

    title: str
    calls: Callable[[], dict[str, Call]]
    """Makes the ways; the first one is what all are measured by."""
    targets: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    """What some should reach: at most a number, relative to a way."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured in a group."""

    title: str
    baseline: str
    milliseconds: dict[str, float]
    ratios: dict[str, float]
    targets: list[dict[str, Any]]


# Maps alone.


def forward_and_backward(p: Callable[[Array], Array]) -> Callable[..., Any]:
    def both(weight: Array, cotangent: Array) -> tuple[Array, Array]:
        value, pull_back = jax.vjp(p, weight)
        return value, pull_back(cotangent)[0]

    return jax.jit(both)


def remembering(measured: Callable, start: Any) -> Callable[..., Any]:
    """A map that goes on from what it found last."""

    @jax.jit
    def both(weight: Array, cotangent: Array, start: Any) -> Any:
        p = lambda weight: measured(weight, start)
        value, pull_back, start = jax.vjp(p, weight, has_aux=True)
        return value, pull_back(cotangent)[0], start

    kept = [start]

    def call(weight: Array, cotangent: Array) -> Any:
        value, gradient, kept[0] = both(weight, cotangent, kept[0])
        return value, gradient

    return call


class Itself(eqx.Module):
    """A layer that returns its weight."""

    weight: Array

    def __call__(self, x: Array) -> Array:
        return self.weight


def wrapper_of(build: Callable[..., Any], size: int) -> Callable[..., Any]:
    """The weight that a stateful wrapper makes, and its gradient."""
    key = jax.random.key(0)
    linear = eqx.nn.Linear(size, size, use_bias=False, key=key)
    layer, state = eqx.nn.make_with_state(build)(linear, "weight", key=key)

    layer = eqx.tree_at(lambda t: t.layer, layer, Itself(linear.weight))

    def measured(weight: Array, state: Any) -> tuple[Array, Any]:
        changed = eqx.tree_at(lambda t: t.layer.weight, layer, weight)
        return changed(jnp.zeros(()), state)

    return remembering(measured, state)


def norm_maps(size: int) -> dict[str, Call]:
    weight = jax.random.normal(jax.random.key(0), (size, size)) / size**0.5
    cotangent = jax.random.normal(jax.random.key(1), (size, size))
    gain = jnp.ones((size, 1))
    made = {
        "copy": jax.jit(lambda weight, cotangent: (weight + 1, cotangent + 1)),
        "MaxNorm, unit": forward_and_backward(eqxreg.MaxNorm(BOUND, "unit")),
        "snippet, unit": forward_and_backward(ft.partial(peers.max_norm, BOUND, 1)),
        "MaxNorm, whole": forward_and_backward(eqxreg.MaxNorm(BOUND)),
        "snippet, whole": forward_and_backward(ft.partial(peers.max_norm, BOUND, None)),
        "WeightNorm": forward_and_backward(WeightNorm("unit", gain)),
    }
    if size <= 1024:
        p = eqxreg.SpectralNorm()
        step = lambda weight, start: p.measured(weight, warm(1), start)
        made |= {
            "SpectralNorm, one step": remembering(step, p.cold_start(weight)),
            "SpectralNormConstraint": wrapper_of(eqxreg.SpectralNormConstraint, size),
            "eqx.nn.SpectralNorm": wrapper_of(eqx.nn.SpectralNorm, size),
        }
    linear = eqx.nn.Linear(size, size, use_bias=False, key=jax.random.key(0))
    normed = eqx.nn.WeightNorm(linear)

    def equinox_weight_norm(weight: Array) -> Array:
        layer = eqx.tree_at(lambda t: t.layer, normed, Itself(weight))
        return layer(jnp.zeros(()))

    made["eqx.nn.WeightNorm"] = forward_and_backward(equinox_weight_norm)
    if peers.is_installed("paramax"):
        normalised = forward_and_backward(peers.paramax_map(weight))
        made["paramax.WeightNormalization"] = normalised
    if peers.is_installed("flax"):
        for kind in ("weight norm", "spectral norm") if size <= 1024 else ():
            made[f"Flax, {kind}"] = remembering(*peers.flax_map(kind, weight))
    return {name: ft.partial(fn, weight, cotangent) for name, fn in made.items()}


def cap_by_svd(weight: Array) -> Array:
    left, values, right = jnp.linalg.svd(weight, full_matrices=False)
    return (left * jnp.minimum(values, BOUND)) @ right


def polar_by_svd(weight: Array) -> Array:
    left, _, right = jnp.linalg.svd(weight, full_matrices=False)
    return left @ right


def singular_maps(size: int) -> dict[str, Call]:
    keys = jax.random.split(jax.random.key(0))
    weight = jax.random.normal(keys[0], (size, size)) / size**0.5
    near = jnp.linalg.qr(weight)[0] + 1e-3 * jax.random.rademacher(
        keys[1], weight.shape, weight.dtype
    )
    made = {
        "polar by SVD": (polar_by_svd, weight),
        "Orthogonal": (eqxreg.Orthogonal(), weight),
        "Orthogonal, one step off": (eqxreg.Orthogonal(), near),
        "cap by SVD": (cap_by_svd, weight),
        "SpectralCap": (eqxreg.SpectralCap(BOUND), weight),
    }
    return {name: ft.partial(jax.jit(fn), w) for name, (fn, w) in made.items()}


# Steps.


def mlp_steps(batch: int) -> dict[str, Call]:
    width, key = 1024, jax.random.key(0)
    x = jax.random.normal(key, (batch, width))
    y = jnp.zeros((batch, width))
    after = lambda every: eqxreg.project(eqxreg.MaxNorm(BOUND, "unit"), every=every)

    def ours(build: Callable[..., Any] | None = None, **options: Any) -> Call:
        wrap = build or (lambda layer, key: layer)
        model, state = eqx.nn.make_with_state(MLP)(width, wrap, key)
        return stepper(model, state, x, y, **options)

    constrained = lambda layer, key: eqxreg.MaxNormConstraint(
        layer, "weight", BOUND, axis="unit"
    )
    calls = {
        "unconstrained": ours(),
        "MaxNormConstraint": ours(constrained),
        "MaxNormConstraint, baked": ours(constrained, baked=True),
        "snippet": ours(lambda layer, key: peers.Snippet(layer, BOUND, 1)),
        "SpectralNormConstraint": ours(eqxreg.SpectralNormConstraint),
        "eqx.nn.SpectralNorm": ours(
            lambda layer, key: eqx.nn.SpectralNorm(layer, "weight", key=key)
        ),
        "WeightNormConstraint": ours(
            lambda layer, key: eqxreg.WeightNormConstraint(layer)
        ),
        "eqx.nn.WeightNorm": ours(lambda layer, key: eqx.nn.WeightNorm(layer)),
        "project(every=1)": ours(after=after(1)),
        "project(every=10)": ours(after=after(10)),
        "a conditional alone": ours(after=conditional()),
    }
    if peers.is_installed("paramax"):
        calls["paramax.WeightNormalization"] = ours(
            lambda layer, key: peers.paramax_weight_norm(layer)
        )
    return calls


def torch_maps(size: int) -> dict[str, Call]:
    kinds = ("copy", "max-norm", "weight norm", "spectral norm")
    return {kind: peers.torch_map(kind, size) for kind in kinds}


def conditional() -> optax.GradientTransformation:
    """A condition that is never true, and nothing else. What it costs is the bound of
    all that is done in some steps only: a branch can be given an update that is in
    memory, where the unconstrained step never writes it."""

    def update(updates, count, params=None):
        negated = lambda updates: jax.tree.map(jnp.negative, updates)
        updates = lax.cond(count < 0, negated, lambda updates: updates, updates)
        return updates, count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), int), update)


def peer_steps(build: Callable[..., Call], kinds: tuple[str, ...], batch: int):
    none = {"unconstrained": build(None, 1024, batch)}
    return none | {kind: build(kind, 1024, batch) for kind in kinds}


def model_steps(build: Callable[..., Any], shape: tuple[int, ...]) -> dict[str, Call]:
    """A network unconstrained, with all its weights constrained, and projected."""
    model = build(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), shape)
    out, _ = jax.eval_shape(jax.vmap(lambda x: model(x, None)), x)
    y = jnp.zeros(out.shape)
    p = eqxreg.MaxNorm(BOUND, axis="unit")
    wrapped = eqxreg.constrain(model, p)
    step = lambda model, **options: stepper(model, None, x, y, **options)
    return {
        "unconstrained": step(model),
        "constrained": step(wrapped),
        "constrained, baked": step(wrapped, baked=True),
        "project(every=1)": step(model, after=eqxreg.project(p)),
        "project(every=10)": step(model, after=eqxreg.project(p, every=10)),
    }


# Compiling.


def compile_sizes(depth: int) -> Iterator[dict[str, Any]]:
    """The time to compile the gradient of a deep network, and the number of operations
    of the program before and after XLA has optimised it."""
    p = eqxreg.MaxNorm(BOUND, axis="unit")
    for scan in (False, True):
        model = eqx.nn.MLP(64, 64, 64, depth, scan=scan, key=jax.random.key(0))
        for name, network in (
            ("unconstrained", model),
            ("constrained", eqxreg.constrain(model, p)),
        ):
            params, static = eqx.partition(network, eqx.is_inexact_array)

            def loss(params, x, static=static):
                return jnp.sum(eqx.combine(params, static)(x) ** 2)

            start = time.perf_counter()
            lowered = jax.jit(jax.grad(loss)).lower(params, jnp.ones(64))
            traced = time.perf_counter()
            compiled = lowered.compile().as_text()
            yield {
                "network": f"{depth} layers" + (", scanned" if scan else ""),
                "variant": name,
                "trace_seconds": traced - start,
                "compile_seconds": time.perf_counter() - traced,
                "operations": len(re.findall(r"^ +%?\S+ = ", lowered.as_text(), re.M)),
                "compiled_operations": len(re.findall(r"^ +\S.* = ", compiled, re.M)),
            }


# All of it.


def groups(flags: Flags) -> Iterator[Group]:
    sizes = (256, 1024) if flags.quick else (256, 1024, 4096)
    for size in sizes:
        targets = {
            "MaxNorm, unit": ("copy", 1.7),
            "MaxNorm, whole": ("copy", 1.7),
        }
        if size == 1024:
            targets |= {
                "SpectralNorm, one step": ("copy", 1.9),
                "SpectralNormConstraint": ("eqx.nn.SpectralNorm", 0.2),
            }
        yield Group(
            f"map, {size} x {size}, forward and backward",
            ft.partial(norm_maps, size),
            targets if size >= 1024 else {},
        )
        # Not among the others: its threads and those of JAX wait for each other.
        if peers.is_installed("torch"):
            title = f"PyTorch's map, {size} x {size}, forward and backward"
            yield Group(title, ft.partial(torch_maps, size))
    size = 256 if flags.quick else 1024
    yield Group(
        f"singular values, {size} x {size}, forward",
        ft.partial(singular_maps, size),
        {
            "Orthogonal": ("polar by SVD", 1.0),
            "Orthogonal, one step off": ("polar by SVD", 0.5),
            "SpectralCap": ("cap by SVD", 1 / 1.5),
        },
    )
    for batch, bounds in ((128, (1.05, 1.12, 1.08)), (16, (1.25, 1.4, 1.35))):
        names = ("MaxNorm", "SpectralNorm", "WeightNorm")
        targets = {
            f"{name}Constraint": ("unconstrained", bound)
            for name, bound in zip(names, bounds, strict=True)
        }
        targets["project(every=10)"] = ("unconstrained", 1.02)
        yield Group(f"MLP step, batch {batch}", ft.partial(mlp_steps, batch), targets)
        if peers.is_installed("flax"):
            kinds = ("weight norm", "spectral norm")
            steps = ft.partial(peer_steps, peers.flax_step, kinds, batch)
            yield Group(f"Flax's MLP step, batch {batch}", steps)
        if peers.is_installed("torch"):
            kinds = ("max-norm", "weight norm", "spectral norm")
            steps = ft.partial(peer_steps, peers.torch_step, kinds, batch)
            yield Group(f"PyTorch's MLP step, batch {batch}", steps)
    yield Group(
        "LSTM step, 100 steps of time",
        ft.partial(model_steps, LSTM, (16, 100, 64)),
        {
            "constrained, baked": ("unconstrained", 1.05),
            "constrained": ("unconstrained", 1.3),
        },
    )
    yield Group("CNN step", ft.partial(model_steps, CNN, (32, 3, 32, 32)))
    yield Group("transformer step", ft.partial(model_steps, Transformer, (8, 64, 128)))


def measure(group: Group, rounds: int) -> Result:
    times = in_turn(group.calls(), rounds)
    baseline = next(iter(times))
    targets = []
    for name, (to, bound) in group.targets.items():
        ratio = ratios(times, to)[name]
        met = ratio <= bound
        targets.append(dict(name=name, to=to, bound=bound, ratio=ratio, met=met))
    relative = ratios(times, baseline)
    return Result(group.title, baseline, medians(times), relative, targets)


def table_of(result: Result) -> Table:
    table = Table(title=result.title, box=SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    table.add_column("ms", justify="right")
    table.add_column(f"/ {result.baseline}", justify="right")
    table.add_column("target")
    targets = {target["name"]: target for target in result.targets}
    for name, milliseconds in result.milliseconds.items():
        cell = ""
        if name in targets:
            target = targets[name]
            sign = "met" if target["met"] else f"not met: {target['ratio']:.2f}"
            cell = f"≤ {target['bound']:.3g} × {target['to']}: {sign}"
        ratio = f"{result.ratios[name]:.2f}"
        table.add_row(name, f"{milliseconds:.3g}", ratio, cell)
    return table


def compile_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="compiling a gradient", box=SIMPLE_HEAD, title_justify="left")
    for column in rows[0]:
        table.add_column(column.replace("_", " "))
    for row in rows:
        cells = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()]
        table.add_row(*cells)
    return table


def draw(results: list[Result], path: Path) -> None:
    """Bars of the ratios of whole steps."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    steps = [result for result in results if "step" in result.title]
    if not steps:
        return
    heights = [len(result.ratios) for result in steps]
    figure, axes = plt.subplots(
        len(steps),
        figsize=(8, 0.28 * sum(heights) + 0.6 * len(steps)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for result, axis in zip(steps, axes[:, 0], strict=True):
        names = list(result.ratios)[::-1]
        bars = axis.barh(names, [result.ratios[name] for name in names])
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{result.title}, relative", loc="left", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.1)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(flags: Flags) -> None:
    console = Console()
    results = []
    for group in groups(flags):
        if not re.search(flags.only, group.title):
            continue
        results.append(measure(group, flags.rounds))
        console.print(table_of(results[-1]))
        # Programs of one group are of no use to the next.
        jax.clear_caches()
    compiling = []
    if re.search(flags.only, "compiling"):
        compiling = list(compile_sizes(10 if flags.quick else 50))
        console.print(compile_table(compiling))
    flags.output.mkdir(parents=True, exist_ok=True)
    everything = {
        "about": about("optax", "flax", "paramax", "torch"),
        "results": [dataclasses.asdict(result) for result in results],
        "compiling": compiling,
    }
    text = json.dumps(everything, indent=2)
    (flags.output / "speed.json").write_text(text + "\n", encoding="utf-8")
    draw(results, flags.output / "speed.png")
    console.print(f"Written to {flags.output}.")


if __name__ == "__main__":
    main(tyro.cli(Flags))
