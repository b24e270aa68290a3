"""Tune a pretrained network with few labels: how far from its weights should it go?

A network is pretrained on one half of scikit-learn's digits. The other half is seen
through a dirty glass: a background that is the same for all images. With 2 to 20
labelled images of each digit, six ways to go on:

- `scratch`: from new weights;
- `plain`: from the pretrained weights, and anywhere;
- `decay`: the same with weight decay, which is to zero;
- `towards`: with `decay_towards` the pretrained weights, L2-SP;
- `ball`: after each step the weights of each unit are projected onto a ball around the
  pretrained ones, by `project` and `MaxNorm`;
- `freeze`: only the last layer moves.

The last three are of all layers but the last. See Li, Grandvalet and Davoine, "Explicit
Inductive Bias for Transfer Learning with Convolutional Networks", ICML 2018, and Gouk,
Hospedales and Pontil, "Distance-Based Regularisation of Deep Networks for Fine-Tuning",
ICLR 2021. With `--data DIR --target DIR`, from MNIST to Fashion-MNIST. Run
`python examples/finetune.py --help` for all flags.
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
from common import report, show
from common.arm import Arm, Batch, Planner, State as Trained, gradient_step, seed_keys
from common.checkpoint import Checkpoint
from common.data import CLASSES
from common.loop import History, fit
from common.mlp import DropoutMLP
from common.run import ComparisonFlags, main, output_directory
from common.transfer import FewPlanner, Transfer, dirty_digits, few_rows, idx_transfer
from jaxtyping import Array, Float, Key, PyTree
from matplotlib.axes import Axes
from numpy.typing import NDArray


Name: TypeAlias = Literal["scratch", "plain", "decay", "towards", "ball", "freeze"]


class Way(NamedTuple):
    """Its label, and what was chosen on validation images and other seeds."""

    label: str
    learning_rate: float
    # The rate of decay, or the radius of the ball.
    strength: float = 0.0


WAYS: dict[Name, Way] = {
    "scratch": Way("from scratch", 1e-3, 0.0),
    "plain": Way("plain fine-tuning", 1e-3),
    "decay": Way("decay to zero", 1e-3, 1.0),
    "towards": Way("decay towards the start", 1e-3, 10.0),
    "ball": Way("ball around the start", 1e-3, 0.1),
    "freeze": Way("all but the last layer frozen", 1e-3),
}


@dataclasses.dataclass(frozen=True)
class FinetuneFlags(ComparisonFlags):
    """Tune a pretrained network with few labels six ways, side by side."""

    out: Path = Path("out/finetune")
    """Directory for the results; it is made if need be."""
    data: str = "digits"
    """What to pretrain on: `digits`, or a directory with four IDX files as of MNIST."""
    target: str = ""
    """What to tune on: a directory with four IDX files. None with `digits`."""
    methods: tuple[Name, ...] = tuple(WAYS)
    """The ways to tune, in the order of the table."""
    seeds: int = 20
    """Number of seeds, all trained at once. Each has other first weights, is pretrained
    anew, and has other labelled images."""
    shots: tuple[int, ...] = (2, 5, 10, 20)
    """Numbers of labelled images of each class."""
    epochs: int = 10
    """Number of measurements, after `steps_per_epoch` steps each."""
    steps_per_epoch: int = 20
    """Steps between measurements."""
    pretraining_steps: int = 400
    """Steps on the data to pretrain on, with 64 images each."""
    width: int = 128
    """Units in each of the two hidden layers."""
    batch_size: int = 20
    """Images in a step, drawn anew from the few."""
    learning_rate: float = 0.0
    """Adam's, constant; 0 takes what was tuned for each way."""
    strength: float = -1.0
    """Rate of decay or radius of the ball; below 0 takes what was tuned."""
    validate: bool = False
    """Measure on images that are not in the test, with other seeds: for tuning."""

    QUICK: ClassVar = {
        **ComparisonFlags.QUICK,
        "shots": (2, 5),
        "steps_per_epoch": 10,
        "pretraining_steps": 100,
        "width": 32,
    }
    FREE: ClassVar = ComparisonFlags.FREE | {"target"}

    def check(self) -> None:
        super().check()
        for name in ("steps_per_epoch", "pretraining_steps", "width", "batch_size"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        rising = self.shots == tuple(sorted(set(self.shots)))
        positive = min(self.shots, default=0) >= 1
        self.require("shots", rising and positive, "rising numbers from 1")
        self.require("learning_rate", self.learning_rate >= 0, "at least 0 and finite")
        self.require("strength", self.strength < 1e9, "finite")
        both = (self.data == "digits") == (not self.target)
        self.require(
            "target", both, "given with a directory in `--data`, and only then"
        )


# What is held near its start, or frozen: all but the last layer.
base = eqxreg.trainable.under("hidden")


def around_start(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """The same transform of the difference from the weights at the beginning: where it
    projects onto a set P, this one projects onto start + P."""

    def difference(params: PyTree, start: PyTree) -> PyTree:
        return jax.tree.map(jnp.subtract, params, start)

    def init(params: PyTree) -> PyTree:
        return params, inner.init(difference(params, params))

    def update(updates: PyTree, state: PyTree, params: PyTree) -> PyTree:
        start, own = state
        updates, own = inner.update(updates, own, difference(params, start))
        return updates, (start, own)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def make_optimiser(
    name: Name, learning_rate: float, strength: float, start: PyTree
) -> optax.GradientTransformation:
    """Adam, and what holds the weights. All decay is decoupled, as in AdamW."""
    middle = last = optax.identity()
    if name in ("scratch", "decay"):
        middle = eqxreg.weight_decay(strength, mask=eqxreg.weights)
    if name == "towards":
        middle = eqxreg.decay_towards(start, strength, mask=base)
    if name == "ball":
        ball = eqxreg.MaxNorm(strength, axis="unit")
        last = around_start(eqxreg.project(ball, mask=base & eqxreg.weights))
    step = optax.scale_by_learning_rate(learning_rate)
    return optax.chain(optax.scale_by_adam(), middle, step, last)


def loss(model: Any, batch: Batch, key: Key[Array, ""]) -> Float[Array, ""]:
    """The mean cross-entropy of a batch."""
    images, labels = batch
    logits = jax.vmap(model)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class State(NamedTuple):
    """Of one seed: what training changes, shots first, and what it started from."""

    several: Trained
    start: PyTree[Array]


def pretrained(models: Any, data: Batch, keys: Key[Array, " seeds"], steps: int) -> Any:
    """The models of all seeds after so many steps of Adam."""
    arrays, static = eqx.partition(models, eqx.is_array)
    adam = optax.adam(1e-3)
    step = gradient_step(loss, lambda model: 0.0, static, adam)

    def run(arrays: PyTree, key: Key[Array, ""]) -> PyTree:
        def body(state: Trained, key: Key[Array, ""]) -> tuple[Trained, Array]:
            rows = jr.randint(key, (64,), 0, len(data[1]))
            return step(state, (data[0][rows], data[1][rows]), key)

        params, constants = eqx.partition(arrays, eqx.is_inexact_array)
        state = Trained(params, adam.init(params), constants)
        return jax.lax.scan(body, state, jr.split(key, steps))[0].params

    return eqx.combine(jax.jit(jax.vmap(run))(arrays, keys), static)


def make_arm(
    name: Name,
    flags: FinetuneFlags,
    models: Any,
    data: Batch,
    planner: Planner,
) -> Arm:
    """One way to go on from the models, one of each seed."""
    way, shots = WAYS[name], len(flags.shots)
    learning_rate = flags.learning_rate if flags.learning_rate else way.learning_rate
    strength = way.strength if flags.strength < 0 else flags.strength
    if name == "freeze":
        models = eqx.filter_vmap(lambda model: eqxreg.freeze(model, base))(models)
    arrays, static = eqx.partition(models, eqx.is_array)

    def optimiser(start: PyTree) -> optax.GradientTransformation:
        return make_optimiser(name, learning_rate, strength, start)

    def begin(arrays: PyTree) -> State:
        params, constants = eqx.partition(arrays, eqx.is_inexact_array)
        one = Trained(params, optimiser(params).init(params), constants)
        return State(jax.tree.map(lambda w: jnp.stack([w] * shots), one), params)

    def step(state: State, batch: Batch, key: Key[Array, ""]) -> tuple[State, Array]:
        one = gradient_step(loss, lambda model: 0.0, static, optimiser(state.start))
        several, losses = jax.vmap(one)(state.several, batch, jr.split(key, shots))
        return State(several, state.start), losses.mean()

    def finish(state: State) -> Any:
        params, _, constants = state.several
        return eqxreg.thaw(eqx.combine(params, constants, static))

    start = jax.jit(jax.vmap(begin))(arrays)
    given = {"finish": finish, "data": data, "planner": planner}
    return Arm(name, way.label, start=start, step=step, **given)


def make_arms(flags: FinetuneFlags, data: Transfer) -> tuple[list[Arm], Any]:
    """The chosen ways, and the pretrained models of all seeds."""
    first, training = seed_keys(flags.seeds)
    folded = jax.vmap(jr.fold_in, (0, None))
    if flags.validate:
        first, training = folded(first, 1), folded(training, 1)

    @eqx.filter_vmap
    def new(key: Key[Array, ""]) -> DropoutMLP:
        features = data.source_images.shape[1]
        rates = {"input_dropout": 0.0, "dropout": 0.0}
        return DropoutMLP(features, CLASSES, flags.width, 2, **rates, key=key)

    fresh, before = new(first), new(folded(first, 2))
    source = (jnp.asarray(data.source_images), jnp.asarray(data.source_labels))
    start = pretrained(before, source, training, flags.pretraining_steps)
    if flags.target:  # Other classes: the last layer is of no use.
        start = eqx.tree_at(lambda model: model.readout, start, fresh.readout)
    seeds = range(flags.seeds) if not flags.validate else range(-flags.seeds, 0)
    rows = few_rows(data.few_labels, seeds, flags.shots[-1])
    shape = (flags.steps_per_epoch, flags.batch_size)
    planner = FewPlanner(training, jnp.asarray(rows), flags.shots, shape)
    few = (jnp.asarray(data.few_images), jnp.asarray(data.few_labels))
    return [
        make_arm(name, flags, fresh if name == "scratch" else start, few, planner)
        for name in flags.methods
    ], start


def measure_on(
    images: NDArray[np.float32],
    labels: NDArray[np.int32],
    start: Any,
    shots: tuple[int, ...],
) -> Callable[[Any], dict[str, NDArray[np.float64]]]:
    """What `fit` asks of the finished models after each measurement, one number per
    seed, for each number of shots: accuracy, and the norm of the way from the start."""

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(eqx.if_array(0), eqx.if_array(0), None, None))
    def evaluate(models: Any, start: Any, x: Array, y: Array) -> tuple[Array, Array]:
        def one(model: Any) -> tuple[Array, Array]:
            correct = (jax.vmap(model)(x).argmax(axis=1) == y).sum()
            now, before = (eqxreg.trainables(m, base) for m in (model, start))
            away = [jnp.sum((w - v) ** 2) for w, v in zip(now, before, strict=True)]
            return correct, jnp.sqrt(jnp.sum(jnp.stack(away)))

        return eqx.filter_vmap(one)(models)

    def measure(models: Any) -> dict[str, NDArray[np.float64]]:
        found = evaluate(models, start, jnp.asarray(images), jnp.asarray(labels))
        correct, distance = (np.asarray(array, np.float64) for array in found)
        metrics = {}
        for column, count in enumerate(shots):
            metrics[f"accuracy_{count}_shots"] = correct[:, column] / len(labels)
        for column, count in enumerate(shots):
            metrics[f"distance_{count}_shots"] = distance[:, column]
        return metrics

    return measure


def note(results: Mapping[str, Any], shots: tuple[int, ...]) -> str:
    """What to take home."""
    if not {"scratch", "plain", "towards", "start"} <= results.keys():
        return ""
    few, many = (
        {
            name: f"{100 * results[name][f'accuracy_{count}_shots']['mean']:.1f}"
            for name in results
        }
        for count in (shots[0], shots[-1])
    )
    return (
        f"{shots[0]} labels a class: scratch {few['scratch']} %, plain {few['plain']}, "
        f"towards the start {few['towards']}. {shots[-1]}: {many['scratch']}, "
        f"{many['plain']}, {many['towards']}. Not tuned: {few['start']}."
    )


def figure(
    title: str,
    text: str,
    results: Mapping[str, Any],
    histories: Mapping[str, History],
    flags: FinetuneFlags,
) -> bytes:
    """A PNG: errors by the number of labels, and the way from the start by steps."""

    def errors(axes: Axes) -> None:
        for name, colour in zip(histories, show.COLOURS, strict=False):
            metrics = [results[name][f"accuracy_{k}_shots"] for k in flags.shots]
            mean = np.array([100 * (1 - metric["mean"]) for metric in metrics])
            error = [100 * (metric["standard_error"] or 0) for metric in metrics]
            style = {"color": colour, "lw": 1.8, "marker": "o", "ms": 4, "capsize": 3}
            axes.errorbar(
                flags.shots, mean, error, label=results[name]["label"], **style
            )
        axes.set(xscale="log", yscale="log", title="Test error, %")
        low, high = axes.get_ylim()
        axes.set(xlabel="labelled images of each class")
        axes.set_xticks(flags.shots, [str(count) for count in flags.shots])
        ticks = (5, 7, 10, 15, 20, 30, 40, 60, 90)
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.set_ylim(low, high)
        axes.minorticks_off()
        axes.grid(axis="y", color="0.9")
        axes.legend(loc="upper right", fontsize=10, frameon=False)

    def distances(axes: Axes) -> None:
        count = flags.shots[0]
        for name, colour in zip(histories, show.COLOURS, strict=False):
            if name != "scratch":
                rows = histories[name][f"distance_{count}_shots"].mean(axis=1)
                steps = flags.steps_per_epoch * np.arange(len(rows) + 1)
                axes.plot(steps, np.append(0, rows), color=colour, lw=1.8)
        title = f"Distance from the start, {count} of each class"
        axes.set(title=title, xlabel="step", ylim=(0, None))
        axes.grid(axis="y", color="0.9")

    return show.drawn(title, text, errors, distances)


def train(flags: FinetuneFlags) -> None:
    """Trains all ways, writes the results and prints the table."""
    own = (Path(flags.data), Path(flags.target))
    data = dirty_digits() if flags.data == "digits" else idx_transfer(*own)
    most = int(np.bincount(data.few_labels, minlength=CLASSES).min())
    flags.require("shots", flags.shots[-1] <= most, f"at most {most} here")
    held_out = data.validation if flags.validate else data.test
    with output_directory(flags.out):
        checkpoint = Checkpoint(flags, data.describe())
        arms, start = make_arms(flags, data)
        measure = measure_on(*held_out, start, flags.shots)
        with show.progress(len(arms) * (flags.epochs + 1)) as advance:
            _, histories = fit(arms, measure, flags, checkpoint, advance)
        results = {arm.name: report.summarise(arm, histories[arm.name]) for arm in arms}
        same = eqx.filter_vmap(
            lambda m: jax.tree.map(lambda w: jnp.stack([w] * len(flags.shots)), m)
        )
        results["start"] = {
            "label": "not tuned at all",
            **{k: report.summary(v) for k, v in measure(same(start)).items()},
            "seconds": {"training": 0.0},
        }
        title = f"{data.name}: few labels, {flags.seeds} seeds"
        report.save(
            flags,
            data=data.describe(),
            histories=histories,
            results=results,
            figure=figure(title, note(results, flags.shots), results, histories, flags),
        )
    header = ("way", *(f"{count} a class, %" for count in flags.shots), "distance")
    body = []
    for result in results.values():
        accuracies = [result[f"accuracy_{count}_shots"] for count in flags.shots]
        cells = [show.plus_minus(accuracy, 100, 1) for accuracy in accuracies]
        away = f"{result[f'distance_{flags.shots[0]}_shots']['mean']:.2f}"
        body.append((result["label"], *cells, away))
    show.print_rows(title, header, body, f"All numbers are in {flags.out}.")


if __name__ == "__main__":
    main(FinetuneFlags, train)
