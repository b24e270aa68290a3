"""Predict with networks that can only rise in some inputs: does it cost accuracy?

The diabetes data of scikit-learn: 442 patients, ten measurements, and how far the
disease had got a year later. A prediction that falls as the body-mass index rises is
one that no physician would trust. So the network has to rise in three inputs, `bmi`,
`bp` (blood pressure) and `s5` (triglycerides), whatever the others are. It does if all
weights on the way from these are non-negative, and all activations rise: `MaxMin`
does. With ReLU such a network could only bend upwards.

- `bare` and `free`: the same network without constraints, without and with a penalty
  on the squares of the weights, as all ways below have it;
- `clip`: `NonNegative` in the forward pass, where negative weights get no gradient;
- `straight`: the same by `StraightThrough`, where they do;
- `project`: `NonNegative` after each update;
- `positive`: `Positive`, smooth; `bare_positive` is the same without the penalty;
- `convex`: a network that is convex in all inputs, and rises in none of them by force:
  non-negative weights after the first layer, softplus, and ways past each layer.

See Sill, "Monotonic Networks", NIPS 1997, and Amos, Xu and Kolter, "Input Convex Neural
Networks", ICML 2017. Run `python examples/monotone.py --help` for all flags.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from common import report, show, table as tables
from common.arm import Arm, Batch, Method, seed_keys, supervised
from common.checkpoint import Checkpoint
from common.loop import fit
from common.run import ComparisonFlags, main, output_directory
from jaxtyping import Array, Float, Key
from matplotlib.axes import Axes
from numpy.typing import NDArray


Name: TypeAlias = Literal[
    "bare", "free", "clip", "straight", "project", "positive", "bare_positive", "convex"
]


class Way(NamedTuple):
    """Its label, and what was chosen on validation rows, out of one grid for all."""

    label: str
    learning_rate: float
    penalty_rate: float


WAYS: dict[Name, Way] = {
    "bare": Way("free, no penalty", 1e-3, 0.0),
    "free": Way("free", 1e-3, 0.3),
    "clip": Way("clipped, forward", 3e-3, 0.1),
    "straight": Way("straight-through", 1e-3, 0.1),
    "project": Way("clipped, after steps", 1e-3, 0.1),
    "positive": Way("positive", 1e-3, 0.1),
    "bare_positive": Way("positive, no penalty", 1e-3, 0.0),
    "convex": Way("input-convex", 1e-2, 0.01),
}


@dataclasses.dataclass(frozen=True)
class MonotoneFlags(ComparisonFlags):
    """Train networks that can only rise in some inputs, beside others that need not."""

    out: Path = Path("out/monotone")
    """Directory for the results; it is made if need be."""
    data: str = "diabetes"
    """`diabetes`, or a CSV file of numbers with a line of names; the last column is
    what is predicted."""
    increasing: tuple[str, ...] = ("bmi", "bp", "s5")
    """The inputs in which the prediction must not fall."""
    methods: tuple[Name, ...] = tuple(WAYS)
    """The ways to train, in the order of the table."""
    seeds: int = 20
    """Number of seeds, all trained at once. Each has another training set."""
    epochs: int = 100
    """Number of passes through the training set."""
    width: int = 32
    """Units in each hidden layer."""
    batch_size: int = 32
    """Examples in a step."""
    learning_rate: float = 0.0
    """Adam's, constant; 0 takes what was tuned for each way."""
    penalty_rate: float = -1.0
    """Rate of the squares of all weights in the loss; below 0 takes what was tuned."""
    validate: bool = False
    """Measure on rows that are neither trained on nor in the test: for tuning."""

    QUICK: ClassVar = {
        **ComparisonFlags.QUICK,
        "methods": ("free", "straight", "project", "positive", "convex"),
        "epochs": 10,
        "width": 8,
    }

    def check(self) -> None:
        super().check()
        even = self.width >= 2 and self.width % 2 == 0
        self.require("width", even, "even and at least 2")
        self.require("batch_size", self.batch_size >= 1, "at least 1")
        self.require("learning_rate", self.learning_rate >= 0, "at least 0 and finite")
        self.require("penalty_rate", self.penalty_rate < 1e6, "finite")
        different = len(set(self.increasing)) == len(self.increasing)
        self.require(
            "increasing", different and len(self.increasing) > 0, "named once each"
        )


class Network(eqx.Module):
    """A network with a first layer in two parts. It rises in its first inputs if all
    weights but those of `others` are non-negative."""

    increasing: int = eqx.field(static=True)
    rising: eqx.nn.Linear
    others: eqx.nn.Linear
    hidden: eqx.nn.Linear
    readout: eqx.nn.Linear

    def __init__(self, increasing: int, inputs: int, width: int, *, key):
        keys = jr.split(key, 4)
        self.increasing = increasing
        self.rising = eqx.nn.Linear(increasing, width, use_bias=False, key=keys[0])
        self.others = eqx.nn.Linear(inputs - increasing, width, key=keys[1])
        self.hidden = eqx.nn.Linear(width, width, key=keys[2])
        self.readout = eqx.nn.Linear(width, "scalar", key=keys[3])

    def __call__(self, x: Float[Array, " inputs"]) -> Float[Array, ""]:
        rising, others = x[: self.increasing], x[self.increasing :]
        h = eqxreg.MaxMin()(self.rising(rising) + self.others(others))
        return self.readout(eqxreg.MaxMin()(self.hidden(h)))


class ConvexNetwork(eqx.Module):
    """A network that is convex in all inputs if the weights of `hidden` and `readout`
    are non-negative: sums and softplus of convex functions are convex."""

    first: eqx.nn.Linear
    hidden: eqx.nn.Linear
    past_hidden: eqx.nn.Linear
    readout: eqx.nn.Linear
    past_readout: eqx.nn.Linear

    def __init__(self, inputs: int, width: int, *, key):
        keys = jr.split(key, 5)
        self.first = eqx.nn.Linear(inputs, width, key=keys[0])
        self.hidden = eqx.nn.Linear(width, width, key=keys[1])
        self.past_hidden = eqx.nn.Linear(inputs, width, use_bias=False, key=keys[2])
        self.readout = eqx.nn.Linear(width, "scalar", key=keys[3])
        self.past_readout = eqx.nn.Linear(inputs, "scalar", use_bias=False, key=keys[4])

    def __call__(self, x: Float[Array, " inputs"]) -> Float[Array, ""]:
        h = jax.nn.softplus(self.first(x))
        h = jax.nn.softplus(self.hidden(h) + self.past_hidden(x))
        return self.readout(h) + self.past_readout(x)


class Line(eqx.Module):
    """A straight line, for comparison."""

    weight: Float[Array, " inputs"]
    bias: Float[Array, ""]

    def __call__(self, x: Float[Array, " inputs"]) -> Float[Array, ""]:
        return self.weight @ x + self.bias


# The weights that have to be non-negative, of either network.
signed = eqxreg.select(
    eqx.nn.Linear,
    where=lambda path, *_: path.startswith((".rising", ".hidden", ".readout")),
)


def make_method(name: Name, learning_rate: float, penalty_rate: float) -> Method:
    """One way to train. The penalty is of the weights that the layers compute with."""
    adam, sign = optax.adam(learning_rate), eqxreg.NonNegative()

    def wrap(model: Any) -> Any:
        if name in ("bare", "free", "project"):
            return model
        if name in ("positive", "bare_positive"):
            model = eqxreg.project_params(model, eqxreg.Box(1e-3, jnp.inf), signed)
            return eqxreg.constrain(model, eqxreg.Positive(), signed)
        p = sign if name == "clip" else eqxreg.StraightThrough(sign)
        return eqxreg.constrain(model, p, signed)

    def penalty(model: Any) -> Float[Array, ""]:
        return eqxreg.l2_penalty(model, penalty_rate, eqxreg.weights, effective=True)

    last = eqxreg.project(sign, mask=signed) if name == "project" else optax.identity()
    optimiser = optax.chain(adam, last)
    return Method(WAYS[name].label, optimiser, wrap=wrap, penalty=penalty)


def loss(model: Any, batch: Batch, key: Key[Array, ""]) -> Float[Array, ""]:
    """The mean square of the error, of a target with variance 1."""
    inputs, target = batch
    return jnp.mean((jax.vmap(model)(inputs) - target) ** 2)


def measure_on(
    data: tables.Scaled, rows: tables.Split, increasing: int, validate: bool
) -> Callable[[Any], dict[str, NDArray[np.float64]]]:
    """What `fit` asks of the finished models after each epoch, one number per seed.

    Slopes and bends are taken at the rows of the test, and at as many points anywhere
    within three standard deviations; a bend in some direction."""
    test = np.broadcast_to(rows.test, (len(rows.train), len(rows.test)))
    held_out = rows.validation if validate else test
    rng, seen = np.random.default_rng(2), data.inputs[rows.test]
    points = np.concatenate([seen, rng.uniform(-3, 3, seen.shape)])
    step = rng.normal(size=points.shape)
    step /= 2 * np.linalg.norm(step, axis=1, keepdims=True)

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(eqx.if_array(0), 0, 0, None, None))
    def evaluate(model: Any, x: Array, y: Array, points: Array, step: Array):
        error = jnp.sqrt(jnp.mean((jax.vmap(model)(x) - y) ** 2))
        slopes = jax.vmap(jax.grad(model))(points)[:, :increasing]
        before, at, after = (jax.vmap(model)(points + way * step) for way in (-1, 0, 1))
        return error, slopes.min(), (slopes < 0).mean(), (before - 2 * at + after).min()

    def measure(model: Any) -> dict[str, NDArray[np.float64]]:
        # In double precision, so that a difference shows a sign and no rounding.
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda array: array.astype(jnp.float64), model)
            arrays = (data.inputs[held_out], data.target[held_out], points, step)
            error, slope, falling, bend = evaluate(wide, *map(jnp.asarray, arrays))
        return {
            "test_error": data.deviation * np.asarray(error),
            "smallest_slope": data.deviation * np.asarray(slope),
            "falling_share": np.asarray(falling),
            "smallest_bend": data.deviation * np.asarray(bend),
        }

    return measure


def make_arms(
    flags: MonotoneFlags, data: tables.Scaled, rows: tables.Split
) -> list[Arm]:
    """The chosen ways. All but `convex` have the same first weights."""
    first, training = seed_keys(flags.seeds)
    planner = tables.SubsetPlanner(training, jnp.asarray(rows.train), flags.batch_size)
    arrays = tuple(jnp.asarray(a, jnp.float32) for a in (data.inputs, data.target))
    increasing, inputs = len(flags.increasing), data.inputs.shape[1]

    @eqx.filter_vmap
    def new(key: Key[Array, ""]) -> tuple[Network, ConvexNetwork]:
        network = Network(increasing, inputs, flags.width, key=key)
        return network, ConvexNetwork(inputs, flags.width, key=key)

    plain, convex = new(first)

    def arm(name: Name) -> Arm:
        models, tuned = convex if name == "convex" else plain, WAYS[name]
        method = make_method(
            name,
            flags.learning_rate or tuned.learning_rate,
            tuned.penalty_rate if flags.penalty_rate < 0 else flags.penalty_rate,
        )
        return supervised(name, method, models, loss, data=arrays, planner=planner)

    return [arm(name) for name in flags.methods]


def note(results: Mapping[str, Any]) -> str:
    """What to take home."""
    if not {"bare", "free", "positive", "bare_positive"} <= results.keys():
        return ""
    error = {name: f"{r['test_error']['mean']:.1f}" for name, r in results.items()}
    slopes = {name: r["smallest_slope"]["seeds"] for name, r in results.items()}
    falls = {name: sum(slope < 0 for slope in slopes[name]) for name in slopes}
    return (
        f"No penalty: {falls['bare']} of {len(slopes['bare'])} free networks fall, "
        f"error {error['bare']}; positive: {falls['bare_positive']}, "
        f"{error['bare_positive']}. Penalty tuned: {falls['free']} and "
        f"{falls['positive']}, {error['free']} and {error['positive']}."
    )


SHOWN = {
    "bare": show.COLOURS[4],
    "free": show.COLOURS[1],
    "convex": show.COLOURS[5],
    "bare_positive": show.COLOURS[6],
    "positive": show.COLOURS[2],
    "line": show.COLOURS[0],
}


def figure(
    title: str,
    text: str,
    results: Mapping[str, Any],
    lines: Mapping[str, NDArray[np.float64]],
    axis: str,
) -> bytes:
    """A PNG: predictions along one input, and error against slope for each seed."""
    labels = {name: results[name]["label"] for name in SHOWN if name in results}

    def predictions(axes: Axes) -> None:
        for name in ("bare", "positive"):
            if name in lines:
                style = {"color": SHOWN[name], "lw": 0.9, "alpha": 0.8}
                first, *_ = axes.plot(lines["along"], lines[name].T, **style)
                first.set_label(labels[name])
        axes.set(title=f"Predictions for 20 rows, were {axis} another", xlabel=axis)
        if axes.lines:
            axes.legend(loc="upper left", frameon=False)
        axes.grid(axis="y", color="0.9")

    def errors(axes: Axes) -> None:
        for name, label in labels.items():
            slopes, misses = (
                np.asarray(results[name][key]["seeds"])
                for key in ("smallest_slope", "test_error")
            )
            axes.scatter(slopes, misses, 22, SHOWN[name], alpha=0.7, label=label)
        axes.axvline(0, color="0.25", ls="--", lw=1)
        axes.set(title="Test error, a point for each seed")
        axes.set(xlabel="smallest slope at any probe, per standard deviation")
        axes.legend(loc="best", fontsize=10, frameon=False)

    return show.drawn(title, text, predictions, errors)


def curves(
    models: Mapping[str, Any], data: tables.Scaled, rows: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """What the networks of the first seed predict for these rows if the first input
    were another, within three standard deviations: `along` are its values."""
    scale = np.linspace(-3, 3, 121)
    points = np.repeat(data.inputs[rows, None], len(scale), axis=1).astype(np.float32)
    points[:, :, 0] = scale
    values = eqx.filter_vmap(lambda model: jax.vmap(jax.vmap(model))(points))
    found = {name: np.asarray(values(model))[0] for name, model in models.items()}
    lines = {name: data.mean + data.deviation * line for name, line in found.items()}
    return lines | {"along": data.centre[0] + data.spread[0] * scale}


def train(flags: MonotoneFlags) -> None:
    """Trains all ways, writes the results and prints the table."""
    table = tables.load(flags.data)
    some = set(flags.increasing) < set(table.names)
    flags.require("increasing", some, f"some, not all, of {', '.join(table.names)}")
    table = table.first(flags.increasing)
    rows = tables.split(len(table.target), flags.seeds)
    count, increasing = rows.train.shape[1], len(flags.increasing)
    flags.require("batch_size", flags.batch_size <= count, f"at most {count} here")
    data = tables.scaled(table, rows)
    with output_directory(flags.out):
        checkpoint = Checkpoint(flags, table.describe())
        arms = make_arms(flags, data, rows)
        measure = measure_on(data, rows, increasing, flags.validate)
        with show.progress(len(arms) * (flags.epochs + 1)) as advance:
            models, histories = fit(arms, measure, flags, checkpoint, advance)
        results = {arm.name: report.summarise(arm, histories[arm.name]) for arm in arms}
        line = measure(Line(*map(jnp.asarray, tables.least_squares(data, rows))))
        results["line"] = {
            "label": "a straight line",
            **{metric: report.summary(found) for metric, found in line.items()},
            "seconds": {"training": 0.0},
        }
        title = f"{table.name}: {count} rows to train on, {flags.seeds} seeds; "
        title += f"predictions should rise in {', '.join(flags.increasing)}"
        lines = curves(models, data, rows.test[:20])
        axis = flags.increasing[0]
        report.save(
            flags,
            data=table.describe(),
            histories=histories,
            results=results,
            figure=figure(title, note(results), results, lines, axis),
        )
    header = ("way", "error", "smallest slope", "falls at, %", "smallest bend")
    body = [
        (
            result["label"],
            show.plus_minus(result["test_error"], 1),
            f"{min(result['smallest_slope']['seeds']):.2f}",
            f"{100 * result['falling_share']['mean']:.1f}",
            f"{min(result['smallest_bend']['seeds']):.2f}",
        )
        for result in results.values()
    ]
    show.print_rows(title, header, body, f"All numbers are in {flags.out}.")


if __name__ == "__main__":
    main(MonotoneFlags, train)
