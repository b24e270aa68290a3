"""Measure a distance of distributions whose value is known: why do units get sorted?

The Wasserstein-1 distance of two distributions is the largest difference of the means
of a function over the one and the other, among all functions with Lipschitz constant 1.
Here one is the uniform distribution on the unit sphere, the other is its centre, and
the distance is 1, whatever the dimension: the best function is the norm.

Networks of orthogonal layers look for it, with three activations that have slopes of
at most 1:

- `relu`, with which norms of gradients are lost on the way;
- `maxmin`, which sorts pairs of units;
- `fullsort`, which sorts all units of a layer.

See Anil, Lucas and Grosse, "Sorting out Lipschitz Function Approximation", ICML 2019.
Run `python examples/wasserstein.py --help` for all flags.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias


# Before JAX is imported: decompositions of small matrices are slower on threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from common import report, show
from common.arm import Arm, Batch, Method, Planner, seed_keys, supervised
from common.checkpoint import Checkpoint
from common.loop import History, fit
from common.run import ComparisonFlags, main, output_directory
from jaxtyping import Array, Float, Key
from matplotlib.axes import Axes
from numpy.typing import NDArray


Name: TypeAlias = Literal["relu", "maxmin", "fullsort"]


@dataclasses.dataclass(frozen=True)
class WassersteinFlags(ComparisonFlags):
    """Find a Wasserstein-1 distance of 1 with three activations, side by side."""

    out: Path = Path("out/wasserstein")
    """Directory for the results; it is made if need be."""
    data: str = "sphere"
    """Only `sphere`: the unit sphere against its centre."""
    methods: tuple[Name, ...] = ("relu", "maxmin", "fullsort")
    """The activations, in the order of the table."""
    seeds: int = 3
    """Number of seeds, all trained at once."""
    epochs: int = 24
    """Number of passes through the points."""
    dimension: int = 128
    """That of the space."""
    points: int = 8192
    """Points on the sphere to train on; as many others are tested on."""
    width: int = 128
    """Units in each hidden layer."""
    depth: int = 3
    """Number of hidden layers."""
    batch_size: int = 256
    """Points in a step."""
    learning_rate: float = 5e-3
    """Adam's at the start; it falls to zero along a cosine."""

    QUICK: ClassVar = {
        **ComparisonFlags.QUICK,
        "dimension": 8,
        "points": 256,
        "width": 16,
        "depth": 2,
        "batch_size": 64,
    }

    # The schedule is of all epochs: a run of more is another one.
    FREE: ClassVar = ComparisonFlags.FREE - {"epochs"}

    def check(self) -> None:
        super().check()
        self.require("data", self.data == "sphere", "`sphere`")
        for name in ("dimension", "points", "depth", "batch_size"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        even = self.width >= 2 and self.width % 2 == 0
        self.require("width", even, "even and at least 2")
        self.require("batch_size", self.batch_size <= self.points, "at most `points`")
        self.require("learning_rate", self.learning_rate > 0, "positive and finite")


LABELS: dict[Name, str] = {
    "relu": "ReLU",
    "maxmin": "MaxMin, sorts pairs",
    "fullsort": "FullSort, sorts all",
}


def activation(name: Name, width: int) -> Any:
    """A layer whose Lipschitz constant is 1."""
    if name == "relu":
        return eqx.nn.Lambda(jax.nn.relu)
    return eqxreg.GroupSort(2 if name == "maxmin" else width)


def network(name: Name, flags: WassersteinFlags, key: Key[Array, ""]) -> Any:
    """A function of Lipschitz constant at most 1."""
    sizes = [flags.dimension] + [flags.width] * flags.depth
    *inner, last = jr.split(key, flags.depth + 1)
    layers: list[Any] = []
    for columns, rows, k in zip(sizes, sizes[1:], inner, strict=False):
        linear = eqx.nn.Linear(columns, rows, key=k)
        layers += [eqxreg.OrthogonalConstraint(linear), activation(name, rows)]
    readout = eqx.nn.Linear(flags.width, 1, key=last)
    return eqx.nn.Sequential([*layers, eqxreg.OrthogonalConstraint(readout)])


def gap(model: Any, points: Float[Array, "n dimension"]) -> Float[Array, ""]:
    """The mean over the points, less the value at the centre."""
    values = jax.vmap(model)(points)
    return jnp.mean(values) - model(jnp.zeros_like(points[0]))[0]


def loss(model: Any, batch: Batch, key: Key[Array, ""]) -> Float[Array, ""]:
    return -gap(model, batch)


def on_sphere(key: Key[Array, ""], count: int, dimension: int) -> Array:
    points = jr.normal(key, (count, dimension))
    return points / jnp.linalg.norm(points, axis=1, keepdims=True)


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(eqx.if_array(0), None))
def evaluate(model: Any, points: Array) -> tuple[Array, Array]:
    return gap(model, points), eqxreg.lipschitz_bound(model)


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(eqx.if_array(0), None))
def values(model: Any, points: Array) -> Array:
    return jax.vmap(model)(points)[:, 0]


def make_arms(flags: WassersteinFlags, points: Array) -> list[Arm]:
    """The chosen activations, all with the same first weights."""
    first, training = seed_keys(flags.seeds)
    planner = Planner(training, len(points), flags.batch_size)
    steps = flags.epochs * (flags.points // flags.batch_size)
    schedule = optax.cosine_decay_schedule(flags.learning_rate, steps)

    def arm(name: Name) -> Arm:
        new = eqx.filter_vmap(lambda key: network(name, flags, key))
        models = eqx.filter_jit(new)(first)
        method = Method(LABELS[name], optax.adam(schedule))
        return supervised(name, method, models, loss, data=points, planner=planner)

    return [arm(name) for name in flags.methods]


def note(results: Mapping[str, Any]) -> str:
    """What to take home."""
    if not {"relu", "fullsort"} <= results.keys():
        return ""
    relu, sort = (results[name]["estimate"]["mean"] for name in ("relu", "fullsort"))
    return (
        f"The distance is 1. Orthogonal layers find {relu:.2f} of it with ReLU, and "
        f"{sort:.4f} where all units are sorted."
    )


def figure(
    title: str,
    text: str,
    histories: Mapping[str, History],
    along: Mapping[str, NDArray[np.float64]],
    radii: NDArray[np.float64],
) -> bytes:
    """A PNG: the estimates by epoch, and the functions along a line."""

    def estimates(axes: Axes) -> None:
        curves = {
            LABELS[name]: history["estimate"]  # pyright: ignore[reportArgumentType]
            for name, history in histories.items()
        }
        show.mean_curves(axes, curves)
        axes.axhline(1, color="0.25", ls="--", lw=1)
        axes.set(title="Distance found, of 1", xlabel="epoch", ylim=(0, 1.05))
        axes.legend(loc="lower right", frameon=False)

    def functions(axes: Axes) -> None:
        for line, colour in zip(along.values(), show.COLOURS, strict=False):
            axes.plot(radii, line, color=colour, lw=1.8)
        axes.plot(radii, np.abs(radii), color="0.25", ls="--", lw=1)
        axes.set(title="The function along a line through the centre")
        axes.set(xlabel="distance from the centre")

    return show.drawn(title, text, estimates, functions)


def train(flags: WassersteinFlags) -> None:
    """Trains all activations, writes the results and prints the table."""
    points, fresh = (
        on_sphere(key, flags.points, flags.dimension) for key in jr.split(jr.key(0))
    )
    about = {"name": "sphere", "training_points": len(points)}

    def measure(model: Any) -> dict[str, NDArray[np.float64]]:
        estimate, bound = evaluate(model, fresh)
        return {
            "estimate": np.asarray(estimate, np.float64),
            "lipschitz_bound": np.asarray(bound, np.float64),
        }

    with output_directory(flags.out):
        checkpoint = Checkpoint(flags, about)
        arms = make_arms(flags, points)
        with show.progress(len(arms) * (flags.epochs + 1)) as advance:
            models, histories = fit(arms, measure, flags, checkpoint, advance)
        results = {arm.name: report.summarise(arm, histories[arm.name]) for arm in arms}
        radii = np.linspace(-1.5, 1.5, 121)
        line = jnp.asarray(radii, jnp.float32)[:, None] * fresh[0]
        along = {}
        for name, model in models.items():
            found = np.asarray(values(model, line), np.float64)[0]
            along[name] = found - found[len(radii) // 2]
        title = (
            f"the unit sphere in {flags.dimension} dimensions against its centre, "
            f"{flags.seeds} seeds"
        )
        report.save(
            flags,
            data=about,
            histories=histories,
            results=results,
            figure=figure(title, note(results), histories, along, radii),
        )
    header = ("activation", "distance found", "Lipschitz bound", "seconds")
    rows = [
        (
            result["label"],
            show.plus_minus(result["estimate"], 1, 4),
            f"{result['lipschitz_bound']['largest']:.4f}",
            f"{result['seconds']['training']:.1f}",
        )
        for result in results.values()
    ]
    place = f"All numbers and the figure are in {flags.out}."
    show.print_rows(title, header, rows, place)


if __name__ == "__main__":
    main(WassersteinFlags, train)
