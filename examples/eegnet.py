"""Classify brain signals with EEGNet, in which max-norm is at home: what does it do?

EEGNet-8,2 bounds the norm of its spatial filters by 1, and that of its classifier's
units by 0.25. Few who copy the network ask whether these bounds ever bind. The same
first weights, data, order, learning rate and epochs for every way:

- `none`: nothing is done to the weights;
- `paper`: the two bounds of the paper, in the forward pass;
- `relative`: bounds in units of the norms that the filters had at first;
- `decay`: weight decay of the same weights, decoupled, as in AdamW.

See Lawhern et al., "EEGNet: a compact convolutional neural network for EEG-based
brain-computer interfaces", Journal of Neural Engineering 15 (2018). Run
`python examples/eegnet.py --help` for all flags.
"""

import dataclasses
import math
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
from common import epochs, report, show
from common.arm import Arm, Method, Planner, Step, seed_keys
from common.checkpoint import Checkpoint
from common.eegnet import POOLS, EEGNet, SpatialFilters
from common.loop import History, fit
from common.run import ComparisonFlags, main, output_directory
from common.series import Series
from jaxtyping import Array, Float, Key, PyTree
from matplotlib.axes import Axes
from numpy.typing import NDArray


Name: TypeAlias = Literal["none", "paper", "relative", "decay"]

# The paper's bounds.
SPATIAL_BOUND, CLASSIFIER_BOUND = 1.0, 0.25


@dataclasses.dataclass(frozen=True)
class EEGNetFlags(ComparisonFlags):
    """Train EEGNet four ways, side by side."""

    out: Path = Path("out/eegnet")
    """Directory for the results; it is made if need be."""
    data: str = "HandMovementDirection"
    """`HandMovementDirection`, `SelfRegulationSCP1`, an .npz file with the arrays
    train_epochs, train_labels, test_epochs and test_labels, or a file of MNE's."""
    cache: Path = Path("out/data")
    """Where the wheel with the recordings is kept, once it is downloaded."""
    methods: tuple[Name, ...] = ("none", "paper", "relative", "decay")
    """The ways to train, in the order of the table."""
    seeds: int = 10
    """Number of seeds, all trained at once."""
    epochs: int = 80
    """Number of passes through the training set."""
    average: int = 4
    """How many samples are averaged to one."""
    filter_length: int = 16
    """Length of the temporal filters, in averaged samples."""
    dropout: float = 0.5
    """Share of the features that is dropped, after each of the two blocks."""
    batch_size: int = 32
    """Examples in a step."""
    learning_rate: float = 3e-3
    """Adam's, constant."""
    relative_bound: float = 1.0
    """`relative`: the bound on each norm, in units of what it was at first."""
    decay_rate: float = 0.1
    """`decay`: the rate of weight decay, which the learning rate multiplies."""
    held_out: float = 0.0
    """Share of the training set that is tested on in place of the test set: for
    tuning."""
    split_seed: int = 0
    """Seed of splits: of what is held out, and of files of MNE's."""

    QUICK: ClassVar = {**ComparisonFlags.QUICK, "batch_size": 16}
    FREE: ClassVar = ComparisonFlags.FREE | {"cache"}

    def implied(self) -> Mapping[str, Any]:
        return {"average": 8} if self.data == "SelfRegulationSCP1" else {}

    def check(self) -> None:
        super().check()
        for name in ("average", "filter_length", "batch_size"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("dropout", "held_out"):
            self.require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name in ("learning_rate", "relative_bound"):
            self.require(name, getattr(self, name) > 0, "positive and finite")
        self.require("decay_rate", self.decay_rate >= 0, "at least 0 and finite")
        self.require("split_seed", 0 <= self.split_seed < 2**32, "in [0, 2^32)")


# The weights that everything below acts on.
spatial = eqxreg.select(SpatialFilters)
classifier = eqxreg.weights.under("classifier")


def paper_bounds(model: EEGNet) -> EEGNet:
    """The two bounds of the paper. A unit is a filter, or a class."""
    bounded = eqxreg.MaxNormConstraint(
        model.spatial, "weight", SPATIAL_BOUND, axis="unit"
    )
    last = eqxreg.MaxNormConstraint(
        model.classifier, "weight", CLASSIFIER_BOUND, axis="unit"
    )
    return eqx.tree_at(lambda m: (m.spatial, m.classifier), model, (bounded, last))


def all_methods(flags: EEGNetFlags) -> dict[Name, Method]:
    adam = optax.adam(flags.learning_rate)
    relative = eqxreg.Relative(eqxreg.MaxNorm(flags.relative_bound, axis="unit"))
    return {
        "none": Method("unconstrained", adam),
        "paper": Method("max-norm 1 and 0.25", adam, wrap=paper_bounds),
        "relative": Method(
            f"max-norm, {flags.relative_bound:g} × first",
            adam,
            wrap=lambda model: eqxreg.constrain(
                model, relative, where=spatial | classifier
            ),
        ),
        "decay": Method(
            "weight decay",
            optax.chain(
                optax.scale_by_adam(),
                eqxreg.weight_decay(flags.decay_rate, mask=spatial | classifier),
                optax.scale_by_learning_rate(flags.learning_rate),
            ),
        ),
    }


class State(NamedTuple):
    """What training changes, and what of a model it does not: the norms that `Relative`
    remembers, which are others for each seed."""

    params: PyTree[Array]
    opt_state: PyTree[Array]
    statistics: eqx.nn.State
    constants: PyTree[Array]


def make_step(method: Method, static: PyTree) -> Step:
    """A step of Adam, which takes the statistics of batch normalisation along."""

    def step(
        state: State, batch: tuple[Array, Array], key: Key[Array, ""]
    ) -> tuple[State, Float[Array, ""]]:
        def objective(params: PyTree) -> tuple[Array, eqx.nn.State]:
            model = eqx.combine(params, state.constants, static)
            values, labels = batch
            keys = jr.split(key, len(labels))
            run = jax.vmap(model, (0, None, 0), (0, None), axis_name="batch")
            logits, statistics = run(values, state.statistics, keys)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), statistics

        (loss, statistics), gradients = jax.value_and_grad(objective, has_aux=True)(
            state.params
        )
        updates, opt_state = method.optimiser.update(
            gradients, state.opt_state, state.params
        )
        params = eqx.apply_updates(state.params, updates)
        return State(params, opt_state, statistics, state.constants), loss

    return step


def make_arms(flags: EEGNetFlags, data: Series) -> list[Arm]:
    """The chosen ways, all with the same first weights."""
    first, training = seed_keys(flags.seeds)
    planner = Planner(training, len(data.train.labels), flags.batch_size)
    _, channels, samples = data.train.values.shape

    @eqx.filter_jit
    @eqx.filter_vmap
    @eqx.nn.make_with_state
    def new(key: Key[Array, ""]) -> EEGNet:
        return EEGNet(
            channels,
            samples,
            len(data.classes),
            filter_length=flags.filter_length,
            dropout=flags.dropout,
            key=key,
        )

    models, statistics = new(first)
    methods = all_methods(flags)

    def arm(name: Name) -> Arm:
        method = methods[name]
        wrapped = eqx.filter_vmap(method.wrap)(models)
        arrays, static = eqx.partition(wrapped, eqx.is_array)
        params, constants = eqx.partition(arrays, eqx.is_inexact_array)
        opt_state = jax.jit(jax.vmap(method.optimiser.init))(params)

        def finish(state: State) -> tuple[EEGNet, eqx.nn.State]:
            model = eqx.combine(state.params, state.constants, static)
            return method.finish(model), state.statistics

        return Arm(
            name,
            method.label,
            start=State(params, opt_state, statistics, constants),
            step=make_step(method, static),
            finish=finish,
            data=jax.tree.map(jnp.asarray, tuple(data.train)),
            planner=planner,
        )

    return [arm(name) for name in flags.methods]


def norms(weight: Array) -> NDArray[np.float64]:
    """The norm of each unit, one row per seed. In float64 on the host, for float32
    would round a norm at the bound to either side."""
    return np.linalg.norm(np.asarray(weight, np.float64), axis=-1)


def measure_on(
    data: Series,
) -> Callable[[tuple[EEGNet, eqx.nn.State]], dict[str, NDArray[np.float64]]]:
    """What `fit` asks of the finished models after each epoch, one number per seed."""
    values, labels = map(jnp.asarray, data.test)

    @eqx.filter_jit
    @eqx.filter_vmap
    def correct(model: EEGNet, statistics: eqx.nn.State) -> Array:
        run = jax.vmap(eqx.nn.inference_mode(model), (0, None), (0, None))
        return jnp.mean(run(values, statistics)[0].argmax(axis=1) == labels)

    def measure(
        trained: tuple[EEGNet, eqx.nn.State],
    ) -> dict[str, NDArray[np.float64]]:
        model, statistics = trained
        accuracy = correct(model, statistics)
        return {
            "test_accuracy": np.asarray(accuracy, np.float64),
            "spatial_norm": norms(model.spatial.weight).max(axis=1),
            "classifier_norm": norms(model.classifier.weight).max(axis=1),
        }

    return measure


def note(histories: Mapping[str, History]) -> str:
    """What to take home."""
    if not {"none", "paper"} <= histories.keys():
        return ""
    free, bounded = (
        100 * histories[name]["test_accuracy"][-1].mean() for name in ("none", "paper")
    )
    largest = histories["paper"]["spatial_norm"].max()
    says = f"No spatial filter reaches the bound of {SPATIAL_BOUND:g}"
    if largest > 0.999 * SPATIAL_BOUND:
        says = f"Spatial filters reach the bound of {SPATIAL_BOUND:g}"
    return (
        f"{says}: the largest norm is {largest:.2f}. Accuracy: {free:.1f} % without "
        f"bounds, {bounded:.1f} % with them."
    )


def figure(
    title: str,
    arms: Mapping[str, str],
    histories: Mapping[str, History],
    models: Mapping[str, tuple[EEGNet, eqx.nn.State]],
) -> bytes:
    """A PNG: accuracy by epoch, and all norms beside the bounds of the paper."""

    def accuracies(axes: Axes) -> None:
        curves = {
            label: 100 * histories[name]["test_accuracy"]
            for name, label in arms.items()
        }
        show.mean_curves(axes, curves)
        axes.set(title="Test accuracy, %", xlabel="epoch")
        axes.legend(loc="lower right", frameon=False)

    def all_norms(axes: Axes) -> None:
        count = len(arms)
        parts = {"spatial": SPATIAL_BOUND, "classifier": CLASSIFIER_BOUND}
        for block, (part, bound) in enumerate(parts.items()):
            top = (count + 2) * (1 - block) + count
            for i, ((model, _), colour) in enumerate(
                zip(models.values(), show.COLOURS, strict=False)
            ):
                found = norms(getattr(model, part).weight).ravel()
                rows = top - i + np.linspace(-0.25, 0.25, len(found))
                axes.plot(found, rows, ".", color=colour, ms=4, alpha=0.5)
            axes.plot([bound] * 2, [top - count + 0.5, top + 0.5], "--", color="0.25")
            axes.text(bound, top + 0.6, f"bound {bound:g}", ha="center", color="0.25")
        rows = [top - i for top in (2 * count + 2, count) for i in range(count)]
        labels = [
            f"{part}: {label}"
            for part in ("filters", "classes")
            for label in arms.values()
        ]
        axes.set_yticks(rows, labels, fontsize=10)
        for i, tick in enumerate(axes.get_yticklabels()):
            tick.set_color(show.COLOURS[i % count])
        axes.tick_params(axis="y", length=0)
        axes.set(title="Norm of each spatial filter and each class", xlabel="norm")
        axes.set(xlim=(0, None), ylim=(0, 2 * count + 3.5))
        axes.spines["left"].set_visible(False)

    return show.drawn(title, note(histories), accuracies, all_norms)


def train(flags: EEGNetFlags) -> None:
    """Trains all ways, writes the results and prints the table."""
    data = epochs.load(flags.data, flags.cache, flags.split_seed)
    if flags.held_out:
        data = data.held_out(flags.held_out, flags.split_seed)
    most = data.train.values.shape[2] // math.prod(POOLS)
    flags.require("average", flags.average <= most, f"at most {most} here")
    data = data.averaged(flags.average).standardised()
    count = len(data.train.labels)
    flags.require("batch_size", flags.batch_size <= count, f"at most {count} here")
    with output_directory(flags.out):
        checkpoint = Checkpoint(flags, data.describe())
        arms = make_arms(flags, data)
        with show.progress(len(arms) * (flags.epochs + 1)) as advance:
            models, histories = fit(arms, measure_on(data), flags, checkpoint, advance)
        results = {arm.name: report.summarise(arm, histories[arm.name]) for arm in arms}
        title = f"{data.name}: {count} training epochs, {flags.seeds} seeds"
        labels = {arm.name: arm.label for arm in arms}
        report.save(
            flags,
            data=data.describe(),
            histories=histories,
            results=results,
            figure=figure(title, labels, histories, models),
        )
    header = ("way", "test acc., %", "filter norm", "class norm", "seconds")
    rows = [
        (
            result["label"],
            show.plus_minus(result["test_accuracy"], 100, 1),
            f"{result['spatial_norm']['largest']:.4f}",
            f"{result['classifier_norm']['largest']:.4f}",
            f"{result['seconds']['training']:.1f}",
        )
        for result in results.values()
    ]
    place = f"All numbers and the figure are in {flags.out}."
    show.print_rows(title, header, rows, place)


if __name__ == "__main__":
    main(EEGNetFlags, train)
