"""Tune a pretrained network with few labels: how far from its weights should it go?

A network is pretrained on one half of scikit-learn's digits. The other half is seen
through a dirty glass: a background that is the same for all images. There are 2 to 20
labelled images of each digit, and 40 % of these labels are drawn at random. Six ways to
go on, all with the same learning rate:

- `scratch`: from new weights;
- `plain`: from the pretrained weights, and anywhere;
- `decay`: the same with weight decay, which is to zero;
- `towards`: with `decay_towards` the pretrained weights, L2-SP;
- `ball`: after each step each array is projected onto a ball around the pretrained one,
  by `project` and `MaxNorm`;
- `freeze`: only the last layer moves.

See Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with
Convolutional Networks", ICML 2018, and Gouk, Hospedales and Pontil, "Distance-Based
Regularisation of Deep Networks for Fine-Tuning", ICLR 2021. With `--data DIR --target
DIR`, from MNIST to Fashion-MNIST. `python examples/finetune.py --help` has all flags.
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
from common import report, show, transfer
from common.arm import Arm, Batch, Planner, State as Trained, gradient_step, seed_keys
from common.checkpoint import Checkpoint
from common.data import CLASSES, partly_random
from common.loop import fit
from common.mlp import DropoutMLP
from common.run import ComparisonFlags, main, output_directory
from jaxtyping import Array, Float, Key, PyTree
from matplotlib.axes import Axes
from numpy.typing import NDArray


Name: TypeAlias = Literal["scratch", "plain", "decay", "towards", "ball", "freeze"]


class Way(NamedTuple):
    """Its label; and the rate of decay or the radius of the ball, which were chosen on
    validation images and other seeds."""

    label: str
    strength: float = 0.0


WAYS: dict[Name, Way] = {
    "scratch": Way("scratch"),
    "plain": Way("plain"),
    "decay": Way("decay to zero", 0.3),
    "towards": Way("decay to start", 100.0),
    "ball": Way("ball", 0.2),
    "freeze": Way("frozen"),
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
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    """Adam's, constant. All numbers of shots are tried with the last but one, and all
    learning rates with the second number of shots."""
    label_noise: float = 0.4
    """Share of the labels to tune on that is drawn at random."""
    strength: float = -1.0
    """Rate of decay or radius of the ball; below 0 takes what was tuned."""
    validate: bool = False
    """Measure on images that are not in the test, with other seeds: for tuning."""

    QUICK: ClassVar = {
        **ComparisonFlags.QUICK,
        "shots": (2, 5),
        "learning_rates": (1e-3, 3e-3, 1e-2),
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
        two = len(self.shots) > 1 and self.shots[0] >= 1
        self.require("shots", rising and two, "two or more rising numbers from 1")
        self.require("label_noise", 0 <= self.label_noise <= 1, "from 0 to 1")
        rates = [rate for rate in self.learning_rates if 0 < rate < 1]
        two = len(self.learning_rates) == len(rates) > 1
        self.require("learning_rates", two, "two or more, between 0 and 1")
        self.require("strength", self.strength < 1e9, "finite")
        both = (self.data == "digits") == (not self.target)
        self.require("target", both, "given with a directory in `--data`")


# All but the last layer.
base = eqxreg.trainable.under("hidden")


class Case(NamedTuple):
    """One of several trainings that go on side by side."""

    shots: int
    learning_rate: float
    name: str


def cases(flags: FinetuneFlags) -> list[Case]:
    """All numbers of shots with one learning rate, and all learning rates with one
    number of shots."""
    usual, few = flags.learning_rates[-2], flags.shots[1]
    shots = [Case(count, usual, f"{count}_shots") for count in flags.shots]
    return shots + [Case(few, rate, f"at_{rate:g}") for rate in flags.learning_rates]


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
    name: Name, learning_rate: Any, strength: float, start: PyTree, held: Any
) -> optax.GradientTransformation:
    """Adam, and what keeps the weights. All decay is decoupled, as in AdamW."""
    middle = last = optax.identity()
    if name == "decay":
        middle = eqxreg.weight_decay(strength, mask=eqxreg.weights)
    if name == "towards":
        middle = eqxreg.decay_towards(start, strength, mask=held)
    if name == "ball":
        last = around_start(eqxreg.project(eqxreg.MaxNorm(strength), mask=held))
    scale = optax.scale_by_learning_rate(learning_rate)
    return optax.chain(optax.scale_by_adam(), middle, scale, last)


def loss(model: Any, batch: Batch, key: Key[Array, ""]) -> Float[Array, ""]:
    """The mean cross-entropy of a batch."""
    images, labels = batch
    logits = jax.vmap(model)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class State(NamedTuple):
    """Of one seed: what training changes, cases first, and what it started from."""

    several: Trained
    start: PyTree[Array]


def make_arm(
    name: Name,
    flags: FinetuneFlags,
    models: Any,
    data: Batch,
    planner: Planner,
) -> Arm:
    """One way to go on from the models, one of each seed."""
    way = WAYS[name]
    strength = way.strength if flags.strength < 0 else flags.strength
    rates = jnp.array([case.learning_rate for case in cases(flags)])
    # The last layer of a network for other classes is a new one, and is not held.
    held = base if flags.target else eqxreg.trainable
    if name == "freeze":
        models = eqx.filter_vmap(lambda model: eqxreg.freeze(model, base))(models)
    arrays, static = eqx.partition(models, eqx.is_array)

    def optimiser(rate: Any, start: PyTree) -> optax.GradientTransformation:
        return make_optimiser(name, rate, strength, start, held)

    def begin(arrays: PyTree) -> State:
        params, constants = eqx.partition(arrays, eqx.is_inexact_array)
        one = Trained(params, optimiser(0.0, params).init(params), constants)
        return State(jax.tree.map(lambda w: jnp.stack([w] * len(rates)), one), params)

    def step(state: State, batch: Batch, key: Key[Array, ""]) -> tuple[State, Array]:
        def one(trained: Trained, batch: Batch, rate: Array) -> tuple[Trained, Array]:
            transform = optimiser(rate, state.start)
            one_step = gradient_step(loss, lambda model: 0.0, static, transform)
            return one_step(trained, batch, key)

        several, losses = jax.vmap(one)(state.several, batch, rates)
        return State(several, state.start), losses.mean()

    def finish(state: State) -> Any:
        params, _, constants = state.several
        return eqxreg.thaw(eqx.combine(params, constants, static))

    start = jax.jit(jax.vmap(begin))(arrays)
    given = {"finish": finish, "data": data, "planner": planner}
    return Arm(name, way.label, start=start, step=step, **given)


def make_arms(flags: FinetuneFlags, data: transfer.Transfer) -> tuple[list[Arm], Any]:
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
    start = transfer.pretrained(before, loss, source, training, flags.pretraining_steps)
    if flags.target:  # Other classes: the last layer is of no use.
        start = eqx.tree_at(lambda model: model.readout, start, fresh.readout)
    seeds = range(flags.seeds) if not flags.validate else range(-flags.seeds, 0)
    rows = transfer.few_rows(data.few_labels, seeds, flags.shots[-1])
    counts = tuple(case.shots for case in cases(flags))
    shape = (flags.steps_per_epoch, flags.batch_size)
    planner = transfer.FewPlanner(training, jnp.asarray(rows), counts, shape)
    labels = partly_random(data.few_labels, flags.label_noise, seed=4)
    few = (jnp.asarray(data.few_images), jnp.asarray(labels))
    return [
        make_arm(name, flags, fresh if name == "scratch" else start, few, planner)
        for name in flags.methods
    ], start


def measure_on(
    images: NDArray[np.float32],
    labels: NDArray[np.int32],
    start: Any,
    flags: FinetuneFlags,
) -> Callable[[Any], dict[str, NDArray[np.float64]]]:
    """What `fit` asks of the finished models after each measurement, one number per
    seed and case: accuracy, and how far all but the last layer went from the start."""

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
        names = [case.name for case in cases(flags)]
        shares = {f"accuracy_{name}": correct[:, i] for i, name in enumerate(names)}
        ways = {f"distance_{name}": distance[:, i] for i, name in enumerate(names)}
        return {name: n / len(labels) for name, n in shares.items()} | ways

    return measure


def note(results: Mapping[str, Any], flags: FinetuneFlags) -> str:
    """What to take home."""
    if not {"plain", "towards", "freeze"} <= results.keys():
        return ""
    usual, small = (
        [
            f"{100 * results[name][f'accuracy_at_{rate:g}']['mean']:.0f}"
            for name in ("plain", "towards", "freeze")
        ]
        for rate in (flags.learning_rates[-2], flags.learning_rates[0])
    )
    return (
        f"{flags.shots[1]} labels a class: plain {usual[0]} %, held near the start "
        f"{usual[1]}, frozen {usual[2]}. At the smallest rate {', '.join(small)}."
    )


def figure(
    title: str, text: str, results: Mapping[str, Any], flags: FinetuneFlags
) -> bytes:
    """A PNG: accuracy by the number of labels, and by the distance from the start."""
    colours = dict(zip(flags.methods, show.COLOURS, strict=False))
    rates = [f"at_{rate:g}" for rate in flags.learning_rates]

    def means(name: str, metrics: list[str], key: str = "mean") -> list[float]:
        return [results[name][metric][key] or 0.0 for metric in metrics]

    def by_shots(axes: Axes) -> None:
        for name, colour in colours.items():
            metrics = [f"accuracy_{count}_shots" for count in flags.shots]
            mean, error = means(name, metrics), means(name, metrics, "standard_error")
            style = {"color": colour, "lw": 1.8, "marker": "o", "ms": 4, "capsize": 3}
            label = results[name]["label"]
            axes.errorbar(np.array(flags.shots), mean, error, label=label, **style)
        axes.set_xscale("log")
        axes.set_xticks(flags.shots, [str(count) for count in flags.shots])
        axes.minorticks_off()
        axes.grid(axis="y", color="0.9")
        axes.set(title=f"Test accuracy, learning rate {flags.learning_rates[-2]:g}")
        axes.set(xlabel="labelled images of each class")
        axes.legend(loc="lower right", fontsize=10, frameon=False)

    def by_distance(axes: Axes) -> None:
        for name, colour in colours.items():
            if name != "scratch":
                away = means(name, [f"distance_{rate}" for rate in rates])
                found = means(name, [f"accuracy_{rate}" for rate in rates])
                axes.plot(away, found, color=colour, marker="o", lw=1.2)
        low, *_, high = flags.learning_rates
        axes.set(title=f"The same, {flags.shots[1]} of each class, by distance")
        axes.set(xlabel=f"distance from the start; learning rates {low:g} to {high:g}")
        axes.grid(axis="y", color="0.9")

    return show.drawn(title, text, by_shots, by_distance)


def train(flags: FinetuneFlags) -> None:
    """Trains all ways, writes the results and prints the table."""
    data = transfer.load(flags.data, flags.target)
    most = int(np.bincount(data.few_labels, minlength=CLASSES).min())
    flags.require("shots", flags.shots[-1] <= most, f"at most {most} here")
    held_out = data.validation if flags.validate else data.test
    with output_directory(flags.out):
        checkpoint = Checkpoint(flags, data.describe())
        arms, start = make_arms(flags, data)
        measure = measure_on(*held_out, start, flags)
        with show.progress(len(arms) * (flags.epochs + 1)) as advance:
            _, histories = fit(arms, measure, flags, checkpoint, advance)
        results = {arm.name: report.summarise(arm, histories[arm.name]) for arm in arms}
        weights, rest = eqx.partition(start, eqx.is_array)
        several = lambda w: jnp.stack([w] * len(cases(flags)), axis=1)
        untuned = measure(eqx.combine(jax.tree.map(several, weights), rest))
        results["start"] = {
            "label": "not tuned",
            **{metric: report.summary(found) for metric, found in untuned.items()},
            "seconds": {"training": 0.0},
        }
        noise = f"{100 * flags.label_noise:.0f} % of them at random"
        title = f"{data.name}: few labels, {noise}, {flags.seeds} seeds"
        report.save(
            flags,
            data=data.describe(),
            histories=histories,
            results=results,
            figure=figure(title, note(results, flags), results, flags),
        )
    header = ("way", *(f"{count} each, %" for count in flags.shots), "distance")
    body, metrics = [], [f"accuracy_{count}_shots" for count in flags.shots]
    for result in results.values():
        cells = [show.plus_minus(result[metric], 100, 1) for metric in metrics]
        away = result[f"distance_{flags.shots[1]}_shots"]["mean"]
        body.append((result["label"], *cells, f"{away:.2f}"))
    show.print_rows(title, header, body, f"All numbers are in {flags.out}.")


if __name__ == "__main__":
    main(FinetuneFlags, train)
