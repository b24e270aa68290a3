"""Draws what maps do, as SVGs. All that is drawn comes from the library: sets are where
a projection changes nothing, arrows are what it does, and paths are those of training.
"""

import io
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
from jaxtyping import Array
from matplotlib.axes import Axes
from numpy.typing import NDArray


matplotlib.use("Agg")  # No display is needed.

# Seen on a light and on a dark page.
GREY, BLUE, ORANGE, GREEN = "#808080", "#3f7fd0", "#d9822b", "#2a9d6f"
STYLE: dict[Any, Any] = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": GREY,
    "axes.titlesize": 11,
    "font.size": 10,
    "legend.frameon": False,
    "legend.labelcolor": GREY,
    "svg.hashsalt": "eqxreg",
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}
# Without the date, the same file each time.
METADATA: dict[str, Any] = {"Date": None}

Points = NDArray[np.float32]

# Of the plane, and so of weights with two entries.
SETS: Mapping[str, eqxreg.Projection] = {
    "ball: MaxNorm(1)": eqxreg.MaxNorm(1.0),
    "ring: MinMaxNorm(0.6, 1)": eqxreg.MinMaxNorm(0.6, 1.0),
    "sphere: UnitNorm()": eqxreg.UnitNorm(),
    "box: Box(-0.7, 0.7)": eqxreg.Box(-0.7, 0.7),
    "orthant: NonNegative()": eqxreg.NonNegative(),
    "simplex: Simplex()": eqxreg.Simplex(),
}

# What maps make of all singular values of a matrix.
SPECTRA: Mapping[str, eqxreg.Parametrization] = {
    "SpectralCap(1)": eqxreg.SpectralCap(1.0),
    "SpectralScale(1)": eqxreg.SpectralScale(1.0),
    "Orthogonal()": eqxreg.Orthogonal(),
}


def pictures() -> dict[str, str]:
    """The text of each SVG, by its name."""
    draw = {"sets": _sets, "spectra": _spectra, "places": _places}
    with plt.rc_context(STYLE):
        return {f"{name}.svg": _svg(figure()) for name, figure in draw.items()}


def _svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=METADATA)
    plt.close(figure)
    return file.getvalue()


def starts() -> Points:
    """Where arrows begin: on a circle outside most of the sets."""
    angle = np.linspace(0, 2 * np.pi, 18, endpoint=False) + 0.1
    return np.asarray(1.55 * np.stack([np.cos(angle), np.sin(angle)], 1), np.float32)


def grid(side: int = 161, reach: float = 1.8) -> Points:
    """Points of a square around zero, rows first."""
    line = np.linspace(-reach, reach, side, dtype=np.float32)
    return np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)


def on_grid(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """What matplotlib's contours take: the two axes of the grid, and a value for each
    of its points."""
    points = grid()
    side = round(len(points) ** 0.5)
    return points[:side, 0], points[::side, 1], values.reshape(side, side)


def images(projection: eqxreg.Projection, points: Points) -> Points:
    """Where a projection puts each of the points."""
    return np.asarray(jax.jit(jax.vmap(projection))(points))


def _sets() -> Any:
    figure, panels = plt.subplots(2, 3, figsize=(9, 6.2), layout="constrained")
    for axes, (name, projection) in zip(panels.flat, SETS.items(), strict=True):
        _draw_set(axes, projection)
        begin = starts()
        moves = images(projection, begin) - begin
        scale: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1}
        axes.quiver(*begin.T, *moves.T, color=ORANGE, width=0.008, **scale)
        axes.set_title(name)
    return figure


def _draw_set(axes: Axes, projection: eqxreg.Projection) -> None:
    """The set, with its axes."""
    points = grid()
    reached = images(projection, points)
    kept = np.linalg.norm(reached - points, axis=1) <= 1e-6
    if kept.mean() > 0.01:
        axes.contourf(*on_grid(kept), levels=[0.5, 1.5], colors=[BLUE], alpha=0.25)
    else:
        # A set without an inside: the images of all points, one of those that are near.
        axes.scatter(*np.unique(reached.round(2), axis=0).T, color=BLUE, s=3, lw=0)
    axes.set(aspect="equal", xlim=(-1.8, 1.8), ylim=(-1.8, 1.8))
    axes.set_xticks([-1, 0, 1])
    axes.set_yticks([-1, 0, 1])
    axes.axhline(0, color=GREY, lw=0.4, zorder=0)
    axes.axvline(0, color=GREY, lw=0.4, zorder=0)


def singular_values() -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Those of a random matrix, and of what each map makes of it, descending."""
    weight = jax.random.normal(jax.random.key(0), (48, 32)) / 6

    def values(matrix: Array) -> NDArray[np.float64]:
        found = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
        return np.asarray(found, np.float64)

    made = {name: values(jax.jit(map)(weight)) for name, map in SPECTRA.items()}
    return values(weight), made


def _spectra() -> Any:
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    before, made = singular_values()
    axes.plot(before, before, color=GREY, ls=":", label="the weight itself")
    for (name, values), colour in zip(made.items(), (BLUE, ORANGE, GREEN), strict=True):
        axes.plot(before, values, ".-", color=colour, label=name)
    axes.set(xlabel="singular value before", ylabel="after")
    axes.legend(loc="upper left")
    return figure


class Path(NamedTuple):
    """A weight in training, step by step."""

    raw: NDArray[np.float64]
    """What the optimiser has, before each projection too."""
    used: NDArray[np.float64]
    """What the layer computes with."""


# The loss is least here, outside the set.
GOAL, BOUND, RATE, STEPS = (0.6, 1.5), 1.0, 0.12, 30
START = (-1.5, 0.4)


def paths() -> dict[str, Path]:
    """Gradient descent from one start to one goal, with the set in three places."""
    ball = eqxreg.MaxNorm(BOUND)
    layer = eqx.nn.Linear(2, 1, use_bias=False, key=jax.random.key(0))
    layer = eqx.tree_at(lambda node: node.weight, layer, jnp.array([START]))
    wrapped = eqxreg.Constraint(layer, "weight", ball)

    def penalised(model: Any) -> Array:
        return _loss(model) + eqxreg.distance_penalty(model, ball, rate=0.4)

    sgd = optax.sgd(RATE)
    return {
        "forward pass": _descend(wrapped, _loss, sgd),
        "after the update": _descend(
            layer, _loss, optax.chain(sgd, eqxreg.project(ball)), between=sgd
        ),
        "penalty": _descend(layer, penalised, sgd),
    }


def _loss(model: Any) -> Array:
    """The squared distance of the weight to the goal, by what the layer computes."""
    columns = jax.vmap(model)(jnp.eye(2))[:, 0]
    return jnp.sum((columns - jnp.array(GOAL)) ** 2) / 2


def _descend(
    model: Any,
    loss: Callable[[Any], Array],
    optimiser: optax.GradientTransformation,
    between: optax.GradientTransformation | None = None,
) -> Path:
    """`between` is the optimiser without its projection, to show where it would go."""
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    row = lambda layer: np.asarray(layer.weight[0], np.float64)
    raw, used = [row(eqxreg.strip(model))], [row(eqxreg.bake(model))]
    for _ in range(STEPS):
        gradient = eqx.filter_grad(loss)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        if between is not None:
            update, _ = between.update(gradient, between.init(params), params)
            raw.append(row(eqxreg.strip(eqx.apply_updates(model, update))))
        updates, state = optimiser.update(gradient, state, params)
        model = eqx.apply_updates(model, updates)
        raw.append(row(eqxreg.strip(model)))
        used.append(row(eqxreg.bake(model)))
    return Path(np.stack(raw), np.stack(used))


def _places() -> Any:
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.9), layout="constrained")
    heights = on_grid(np.linalg.norm(grid() - np.array(GOAL), axis=1))
    for axes, (name, path) in zip(panels, paths().items(), strict=True):
        _draw_set(axes, eqxreg.MaxNorm(BOUND))
        axes.contour(*heights, levels=8, colors=GREY, linewidths=0.4)
        axes.plot(*path.raw.T, ".-", color=ORANGE, lw=1, ms=4, label="raw weight")
        axes.plot(*path.used.T, ".-", color=BLUE, lw=1, ms=4, label="used weight")
        axes.plot(*GOAL, "*", color=GREEN, ms=11, label="least loss")
        axes.set_title(name)
    panels[0].legend(loc="lower right", fontsize=9)
    return figure
