"""Remember ten symbols for two hundred steps: what do orthogonal weights do over time?

In the copying task a network sees ten symbols, then nothing for a long time, then a
sign, and has to repeat the symbols. One that has forgotten them can do no better than
to guess them, which is the baseline. A gradient passes the recurrent weight once in
each step, so that it vanishes or explodes unless that weight keeps its norm.

- `tanh`: a plain recurrent network;
- `start`: orthogonal weights at the start, and free from then on, with modReLU;
- `orthogonal`: the same, and they stay orthogonal, in the forward pass;
- `gru`: gated units, with as many recurrent weights.

The model is baked once at the top of the loss, so that its weight is decomposed once,
and not in each step of the `lax.scan` over time. The task is Hochreiter and
Schmidhuber's (1997); see Arjovsky, Shah and Bengio, "Unitary Evolution Recurrent Neural
Networks", ICML 2016, and Helfrich, Willmott and Ye, "Orthogonal Recurrent Neural
Networks with Scaled Cayley Transform", ICML 2018. `--data vowels` tells nine speakers
apart instead. Run `python examples/recurrent.py --help` for all flags.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
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
from common.sequences import KINDS, Task, load
from jaxtyping import Array, Float, Key, PyTree
from matplotlib.axes import Axes
from numpy.typing import NDArray


Name: TypeAlias = Literal["tanh", "start", "orthogonal", "gru"]


@dataclasses.dataclass(frozen=True)
class RecurrentFlags(ComparisonFlags):
    """Train recurrent networks to remember, side by side."""

    out: Path = Path("out/recurrent")
    """Directory for the results; it is made if need be."""
    data: str = "copying"
    """`copying`, the task, or `vowels`, recordings of nine speakers."""
    cache: Path = Path("out/data")
    """Where the wheel with the recordings is kept, once it is downloaded."""
    methods: tuple[Name, ...] = ("tanh", "start", "orthogonal", "gru")
    """The networks, in the order of the table."""
    seeds: int = 3
    """Number of seeds, all trained at once."""
    first_seed: int = 0
    """The first of them. The rates were tuned with 100 and 101."""
    epochs: int = 20
    """Number of passes through the sequences."""
    length: int = 200
    """`copying`: the number of steps from a symbol to its repetition, less ten."""
    sequences: int = 960
    """`copying`: the number of sequences in an epoch, all of them new."""
    width: int = 128
    """Units in the recurrent layer."""
    batch_size: int = 32
    """Sequences in a step."""
    learning_rate: float | None = None
    """Adam's at the start, for all; it falls to zero along a cosine. By default each
    network has the one that it was tuned to."""
    recurrent_share: float | None = None
    """The learning rate of the recurrent weights, as a share of the others'. By default
    tuned, too."""

    QUICK: ClassVar = {
        **ComparisonFlags.QUICK,
        "length": 12,
        "sequences": 64,
        "width": 16,
        "batch_size": 16,
    }

    # The schedule is of all epochs: a run of more is another one.
    FREE: ClassVar = (ComparisonFlags.FREE | {"cache"}) - {"epochs"}

    def implied(self) -> Mapping[str, Any]:
        return {"epochs": 75} if self.data == "vowels" and not self.quick else {}

    def check(self) -> None:
        super().check()
        known = self.data in ("copying", "vowels")
        self.require("data", known, "`copying` or `vowels`")
        for name in ("length", "batch_size"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("first_seed", self.first_seed >= 0, "at least 0")
        even = self.width >= 2 and self.width % 2 == 0
        self.require("width", even, "even and at least 2")
        enough = self.sequences >= self.batch_size
        self.require("sequences", enough, "at least `batch_size`")
        for name in ("learning_rate", "recurrent_share"):
            value = getattr(self, name)
            self.require(name, value is None or value > 0, "positive and finite")


LABELS: dict[Name, str] = {
    "tanh": "plain, tanh",
    "start": "orthogonal start",
    "orthogonal": "orthogonal",
    "gru": "GRU",
}

# Learning rate, and the share of it that the recurrent weights have.
TUNED: dict[Name, tuple[float, float]] = {
    "tanh": (3e-2, 0.1),
    "start": (1e-2, 0.1),
    "orthogonal": (3e-3, 0.1),
    "gru": (3e-2, 0.1),
}


class Cell(eqx.Module):
    """The next state of a recurrent layer: an activation of W h + V x, and a bias."""

    inputs: eqx.nn.Linear
    recurrent: Any  # A linear layer, or a wrapper around one.
    bias: Float[Array, " width"]
    activation: Callable[[Array, Array], Array] = eqx.field(static=True)

    def __call__(self, x: Array, state: Array) -> Array:
        return self.activation(self.recurrent(state) + self.inputs(x), self.bias)


class Network(eqx.Module):
    """A recurrent layer, and what is read out of its states."""

    cell: Any
    readout: eqx.nn.Linear


def tanh(x: Array, bias: Array) -> Array:
    return jnp.tanh(x + bias)


def modrelu(x: Array, bias: Array) -> Array:
    """Moves entries towards zero, or away from it, and keeps their signs. With a bias
    of zero it does nothing."""
    return jnp.sign(x) * jax.nn.relu(jnp.abs(x) + bias)


def rotations(width: int, key: Key[Array, ""]) -> Float[Array, "width width"]:
    """An orthogonal matrix that turns pairs of units, each by another angle."""
    angles = jr.uniform(key, (width // 2,), minval=-jnp.pi, maxval=jnp.pi)
    cos, sin, zero = jnp.cos(angles), jnp.sin(angles), jnp.zeros(width // 2)
    beside = jnp.stack([-sin, zero], axis=1).ravel()[:-1]
    diagonal = jnp.diag(jnp.repeat(cos, 2))
    return diagonal + jnp.diag(beside, 1) - jnp.diag(beside, -1)


def network(name: Name, task: Task, width: int, key: Key[Array, ""]) -> Network:
    """A new network."""
    keys = jr.split(key, 4)
    if name == "gru":
        # With three matrices for one.
        width = 2 * round(width / math.sqrt(3) / 2)
        cell: Any = eqx.nn.GRUCell(task.features, width, key=keys[0])
    else:
        inputs = eqx.nn.Linear(task.features, width, use_bias=False, key=keys[0])
        linear = eqx.nn.Linear(width, width, use_bias=False, key=keys[1])
        if name != "tanh":
            weight = rotations(width, keys[2])
            linear = eqx.tree_at(lambda linear: linear.weight, linear, weight)
        if name == "orthogonal":
            linear = eqxreg.OrthogonalConstraint(linear)
        cell = Cell(
            inputs, linear, jnp.zeros(width), tanh if name == "tanh" else modrelu
        )
    return Network(cell, eqx.nn.Linear(width, task.kinds, key=keys[3]))


def states(model: Network, inputs: Array, pushes: Array | None = None) -> Array:
    """The states after all steps, steps first. `pushes` are added to them."""
    width = model.readout.weight.shape[1]
    steps = inputs.swapaxes(0, 1)
    if pushes is None:
        pushes = jnp.zeros((len(steps), 1, width))

    def step(state: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        x, push = now
        state = jax.vmap(model.cell)(x, state) + push
        return state, state

    start = jnp.zeros((len(inputs), width))
    return jax.lax.scan(step, start, (steps, pushes))[1]


def losses(
    task: Task, model: Network, batch: Batch, key: Key[Array, ""]
) -> tuple[Array, Array]:
    """The mean cross-entropy, and the share of right answers."""
    inputs, targets = task.read(batch, key)
    last = states(model, inputs)[-targets.shape[1] :]
    return task.judged(jax.vmap(jax.vmap(model.readout))(last), targets)


def loss(
    task: Task, model: Network, batch: Batch, key: Key[Array, ""]
) -> Float[Array, ""]:
    # The weight is decomposed here, once, and not in each step of the scan.
    return losses(task, eqxreg.bake(model), batch, key)[0]


def signal(task: Task, model: Network) -> Float[Array, " steps"]:
    """The size that a gradient has which is sent back from the last state, with size 1
    and in a random direction: the root of the mean square over sequences."""
    key = jr.key(0)
    inputs, _ = task.read(jax.tree.map(lambda array: array[:32], task.test), key)
    width = model.readout.weight.shape[1]
    sent = jr.normal(key, (len(inputs), width))
    sent = sent / jnp.linalg.norm(sent, axis=1, keepdims=True)
    pushes = jnp.zeros((inputs.shape[1], len(inputs), width))
    end = lambda pushes: jnp.sum(sent * states(model, inputs, pushes)[-1])
    arrived = jnp.linalg.norm(jax.grad(end)(pushes), axis=2)
    largest = jnp.maximum(arrived.max(axis=1, keepdims=True), 1e-30)
    return largest[:, 0] * jnp.sqrt(jnp.mean((arrived / largest) ** 2, axis=1))


def recurrent_weights(model: Network) -> Float[Array, "width width"]:
    cell = model.cell
    gru = isinstance(cell, eqx.nn.GRUCell)
    return cell.weight_hh if gru else cell.recurrent.weight


def distance_to_orthogonal(weights: Array) -> NDArray[np.float64]:
    """The largest distance of a singular value from 1, of each seed. In float64."""
    values = np.linalg.svd(np.asarray(weights, np.float64), compute_uv=False)
    return np.abs(values - 1).max(axis=-1)


def make_arms(flags: RecurrentFlags, task: Task) -> list[Arm]:
    """The chosen networks."""
    last = flags.first_seed + flags.seeds
    first, training = (keys[flags.first_seed :] for keys in seed_keys(last))
    count = len(jax.tree.leaves(task.train)[0])
    flags.require("batch_size", flags.batch_size <= count, f"at most {count} here")
    planner = Planner(training, count, flags.batch_size)
    steps = flags.epochs * (count // flags.batch_size)

    def arm(name: Name) -> Arm:
        rate, share = TUNED[name]
        rate = flags.learning_rate or rate
        share = flags.recurrent_share or share
        adam = lambda peak: optax.adam(optax.cosine_decay_schedule(peak, steps))
        optimiser = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.partition(
                {True: adam(rate * share), False: adam(rate)}, is_recurrent
            ),
        )
        new = eqx.filter_vmap(lambda key: network(name, task, flags.width, key))
        models = eqx.filter_jit(new)(first)
        method = Method(LABELS[name], optimiser)
        of_task = functools.partial(loss, task)
        return supervised(
            name, method, models, of_task, data=task.train, planner=planner
        )

    return [arm(name) for name in flags.methods]


def is_recurrent(params: PyTree) -> PyTree:
    """Which of the weights are between the states."""
    names = ("recurrent", "weight_hh")
    marked = lambda path, _: any(name in jax.tree_util.keystr(path) for name in names)
    return jax.tree_util.tree_map_with_path(marked, params)


def note(flags: RecurrentFlags, results: Mapping[str, Any]) -> str:
    """What to take home."""
    if not {"tanh", "orthogonal"} <= results.keys():
        return ""
    plain, orthogonal = (
        100 * results[name]["accuracy"]["mean"] for name in ("tanh", "orthogonal")
    )
    if flags.data == "vowels":
        asked, guessing = "Right about the speaker", ""
    else:
        asked = f"Symbols right after {flags.length} steps"
        guessing = f", and {100 / KINDS:.1f} % by guessing"
    return (
        f"{asked}: {orthogonal:.1f} % with orthogonal weights, {plain:.1f} % with "
        f"plain ones{guessing}."
    )


def figure(
    title: str,
    text: str,
    baseline: float,
    histories: Mapping[str, History],
    signals: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> bytes:
    """A PNG: the losses by epoch, and how large a gradient arrives at which step."""

    def loss_curves(axes: Axes) -> None:
        curves = {
            LABELS[name]: history["loss"]  # pyright: ignore[reportArgumentType]
            for name, history in histories.items()
        }
        show.mean_curves(axes, curves)
        axes.axhline(baseline, color="0.25", ls="--", lw=1, label="remembers nothing")
        axes.set(title="Loss on test sequences", xlabel="epoch", yscale="log")
        axes.legend(loc="lower left", fontsize=10, frameon=False)

    def sizes(axes: Axes) -> None:
        for pair, colour in zip(signals.values(), show.COLOURS, strict=False):
            for arrived, style in zip(pair, (":", "-"), strict=True):
                # Sizes are multiplied from step to step, so the mean is geometric.
                mean = np.exp(np.log(np.maximum(arrived, 1e-30)).mean(axis=0))
                axes.plot(mean, color=colour, ls=style, lw=1.8)
        axes.set(title="Size of a gradient of size 1, sent back from the end")
        axes.set(xlabel="arrives at step (dotted: before training)", yscale="log")
        axes.set_ylim(max(axes.get_ylim()[0], 1e-12), None)
        axes.grid(axis="y", color="0.9")

    return show.drawn(title, text, loss_curves, sizes)


def train(flags: RecurrentFlags) -> None:
    """Trains all networks, writes the results and prints the table."""
    task = load(flags.data, flags.length, flags.sequences, flags.cache)

    @eqx.filter_jit
    @eqx.filter_vmap
    def evaluate(model: Network) -> tuple[Array, Array, Array]:
        judged = losses(task, model, task.test, jr.key(0))
        return *judged, signal(task, model)

    def measure(model: Network) -> dict[str, NDArray[np.float64]]:
        value, right, sent = (np.asarray(x, np.float64) for x in evaluate(model))
        return {
            "loss": value,
            "loss_to_baseline": value / task.baseline,
            "accuracy": right,
            "gradient_at_first_step": sent[:, 0],
            "distance_to_orthogonal": distance_to_orthogonal(recurrent_weights(model)),
        }

    with output_directory(flags.out):
        checkpoint = Checkpoint(flags, task.about)
        arms = make_arms(flags, task)
        before = {arm.name: evaluate(arm.finish(arm.start))[-1] for arm in arms}
        with show.progress(len(arms) * (flags.epochs + 1)) as advance:
            models, histories = fit(arms, measure, flags, checkpoint, advance)
        signals = {
            name: (np.asarray(before[name]), np.asarray(evaluate(model)[-1]))
            for name, model in models.items()
        }
        results = {arm.name: report.summarise(arm, histories[arm.name]) for arm in arms}
        title = f"{task.title}, {flags.seeds} seeds"
        text = note(flags, results)
        report.save(
            flags,
            data=task.about,
            histories=histories,
            results=results,
            figure=figure(title, text, task.baseline, histories, signals),
        )
    header = ("network", "loss", "right, %", "gradient", "distance", "seconds")
    rows = [
        (
            result["label"],
            show.plus_minus(result["loss"], 1, 4),
            show.plus_minus(result["accuracy"], 100),
            f"{result['gradient_at_first_step']['mean']:.1e}",
            f"{result['distance_to_orthogonal']['largest']:.1e}",
            f"{result['seconds']['training']:.1f}",
        )
        for result in results.values()
    ]
    place = f"All numbers and the figure are in {flags.out}."
    show.print_rows(title, header, rows, place)


if __name__ == "__main__":
    main(RecurrentFlags, train)
