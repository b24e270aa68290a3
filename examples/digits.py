"""Train one network five ways where labels are wrong: what does a norm constraint do?

Of the training labels 40 % are drawn at random. A network without constraints first
learns the digits, and then the wrong labels by heart. Accuracy is on test images with
their true labels. The same weights, data, order, learning rate and epochs for every
method:

- `none`: nothing is done to the weights;
- `decay`: weight decay, decoupled, as in AdamW;
- `forward`: max-norm in the forward pass, a wrapper around each hidden layer;
- `project`: max-norm after the update, on every k-th step;
- `penalty`: the distance to the max-norm set, added to the loss.

Max-norm bounds the incoming weights of each hidden unit, as in Srivastava et al.,
"Dropout", JMLR 15 (2014). With `--label-noise 0` all labels are true, and the network
has dropout, as theirs. Run `python examples/digits.py --help` for all flags.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

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
from common.data import CLASSES, Images, load, with_random_labels
from common.loop import History, fit
from common.mlp import DropoutMLP
from common.run import ComparisonFlags, main, output_directory
from jaxtyping import Array, Float, Int, Key
from numpy.typing import NDArray


Name: TypeAlias = Literal["none", "decay", "forward", "project", "penalty"]


@dataclasses.dataclass(frozen=True)
class DigitsFlags(ComparisonFlags):
    """Train a network on digits with wrong labels five ways, side by side."""

    out: Path = Path("out/digits")
    """Directory for the results; it is made if need be."""
    methods: tuple[Name, ...] = ("none", "decay", "forward", "project", "penalty")
    """The ways to train, in the order of the table."""
    label_noise: float = 0.4
    """Share of the training labels that is drawn at random. If it is 0, the network has
    dropout, and what the methods do is milder."""
    width: int = 256
    """Units in each hidden layer."""
    depth: int = 2
    """Number of hidden layers."""
    dropout: float = 0.0
    """Share of hidden units that is dropped."""
    input_dropout: float = 0.0
    """Share of pixels that is dropped."""
    epochs: int = 60
    """Number of passes through the training set."""
    batch_size: int = 64
    """Examples in a step."""
    learning_rate: float = 3e-3
    """Adam's, constant."""
    max_norm: float = 0.3
    """The bound on the norm of each hidden unit's incoming weights."""
    project_every: int = 5
    """`project`: number of steps between projections."""
    decay_rate: float = 3.0
    """`decay`: the rate of weight decay, which the learning rate multiplies."""
    penalty_rate: float = 0.3
    """`penalty`: the rate of the distance to the set."""
    split_seed: int = 0
    """Seed of the split of the digits into training and test set."""

    # Small enough that compiling takes most of the time, and simple for that reason.
    QUICK: ClassVar = {
        **ComparisonFlags.QUICK,
        "width": 64,
        "depth": 1,
    }
    # What suits true labels.
    CLEAN: ClassVar = {
        "dropout": 0.5,
        "input_dropout": 0.1,
        "epochs": 24,
        "max_norm": 1.0,
        "decay_rate": 0.1,
        "penalty_rate": 0.03,
    }

    def implied(self) -> Mapping[str, Any]:
        return self.CLEAN if self.label_noise == 0 else {}

    def check(self) -> None:
        super().check()
        for name in ("width", "depth", "batch_size", "project_every"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        share = 0 <= self.label_noise <= 1
        self.require("label_noise", share, "at least 0 and at most 1")
        for name in ("dropout", "input_dropout"):
            self.require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name in ("learning_rate", "max_norm"):
            self.require(name, getattr(self, name) > 0, "positive and finite")
        for name in ("decay_rate", "penalty_rate"):
            self.require(name, getattr(self, name) >= 0, "at least 0 and finite")
        self.require("split_seed", 0 <= self.split_seed < 2**32, "in [0, 2^32)")


# The weights that everything below acts on: those of the hidden layers. The readout
# stays free, since a bound on it would limit how sure the network can be.
hidden = eqxreg.select(eqx.nn.Linear, where=lambda path, *_: path.startswith(".hidden"))


def all_methods(flags: DigitsFlags, bound: eqxreg.MaxNorm) -> dict[Name, Method]:
    """The five methods. One map, `bound`, serves the last three."""
    adam = optax.adam(flags.learning_rate)
    decoupled = optax.chain(
        optax.scale_by_adam(),
        eqxreg.weight_decay(flags.decay_rate, mask=hidden),
        optax.scale_by_learning_rate(flags.learning_rate),
    )
    project = eqxreg.project(bound, every=flags.project_every, mask=hidden)
    return {
        "none": Method("unconstrained", adam),
        "decay": Method("weight decay", decoupled),
        "forward": Method(
            "max-norm, forward pass",
            adam,
            wrap=lambda model: eqxreg.constrain(model, bound, where=hidden),
        ),
        "project": Method(
            f"max-norm, every {flags.project_every} steps",
            optax.chain(adam, project),
            # Training may end between two projections, so the last one is made here.
            finish=lambda model: eqxreg.project_params(model, bound, where=hidden),
        ),
        "penalty": Method(
            "distance penalty",
            adam,
            penalty=lambda model: eqxreg.distance_penalty(
                model, bound, flags.penalty_rate, where=hidden
            ),
        ),
    }


def loss(model: Any, batch: Batch, key: Key[Array, ""]) -> Float[Array, ""]:
    """The mean cross-entropy of a batch, with dropout."""
    images, labels = batch
    logits = jax.vmap(model)(images, jr.split(key, len(labels)))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def unit_norms(model: DropoutMLP) -> NDArray[np.float64]:
    """The norm of every hidden unit's incoming weights, one row per seed.

    In float64 on the host: float32 would round a norm at the bound to either side.
    """
    weights = [np.asarray(w, np.float64) for w in eqxreg.trainables(model, hidden)]
    return np.concatenate([np.linalg.norm(w, axis=-1) for w in weights], axis=-1)


def measure_on(
    images: Images, bound: eqxreg.MaxNorm
) -> Callable[[DropoutMLP], dict[str, NDArray[np.float64]]]:
    """What `fit` asks of the finished models after each epoch, one number per seed."""
    test_images, test_labels = map(
        jnp.asarray, (images.test_images, images.test_labels)
    )

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(eqx.if_array(0), None, None))
    def evaluate(
        model: DropoutMLP, x: Array, y: Array
    ) -> tuple[Int[Array, ""], Float[Array, ""]]:
        correct = (jax.vmap(model)(x).argmax(axis=1) == y).sum()
        distances = [bound.distance(w) for w in eqxreg.trainables(model, hidden)]
        return correct, jnp.linalg.norm(jnp.stack(distances))

    def measure(model: DropoutMLP) -> dict[str, NDArray[np.float64]]:
        correct, distance = evaluate(model, test_images, test_labels)
        return {
            "test_accuracy": np.asarray(correct) / len(test_labels),
            "largest_unit_norm": unit_norms(model).max(axis=1),
            "distance_to_set": np.asarray(distance, np.float64),
        }

    return measure


def make_arms(
    flags: DigitsFlags, images: Images, methods: dict[Name, Method]
) -> list[Arm]:
    """The chosen methods, all with the same first weights."""
    first, training = seed_keys(flags.seeds)

    def new_model(key: Key[Array, ""]) -> DropoutMLP:
        return DropoutMLP(
            images.features,
            CLASSES,
            flags.width,
            flags.depth,
            input_dropout=flags.input_dropout,
            dropout=flags.dropout,
            key=key,
        )

    models = eqx.filter_jit(eqx.filter_vmap(new_model))(first)
    data = (jnp.asarray(images.train_images), jnp.asarray(images.train_labels))
    planner = Planner(training, len(images.train_labels), flags.batch_size)
    return [
        supervised(name, methods[name], models, loss, data=data, planner=planner)
        for name in flags.methods
    ]


def note(histories: Mapping[str, History]) -> str:
    """What to take home: how far accuracy falls without and with a bound, in the mean
    of the last five epochs."""
    if not {"none", "forward"} <= histories.keys():
        return ""
    free, bounded = (
        100 * histories[name]["test_accuracy"].mean(axis=1)
        for name in ("none", "forward")
    )
    return (
        f"Unconstrained: {free.max():.0f} % at best, {free[-5:].mean():.0f} % in the "
        f"end. With max-norm: {bounded.max():.0f} % at best, "
        f"{bounded[-5:].mean():.0f} % in the end."
    )


def train(flags: DigitsFlags) -> None:
    """Trains all methods, writes the results and prints the table."""
    images = load(flags.data, flags.split_seed)
    images = with_random_labels(images, flags.label_noise, flags.split_seed)
    count = len(images.train_labels)
    flags.require("batch_size", flags.batch_size <= count, f"at most {count} here")
    bound = eqxreg.MaxNorm(flags.max_norm, axis="unit")
    with output_directory(flags.out):
        checkpoint = Checkpoint(flags, images.describe())
        arms = make_arms(flags, images, all_methods(flags, bound))
        measure = measure_on(images, bound)
        with show.progress(len(arms) * (flags.epochs + 1)) as advance:
            models, histories = fit(arms, measure, flags, checkpoint, advance)
        results = {arm.name: report.summarise(arm, histories[arm.name]) for arm in arms}
        curves = [
            show.Curve(
                arm.label,
                histories[arm.name]["test_accuracy"],
                unit_norms(models[arm.name]),
            )
            for arm in arms
        ]
        title = f"{images.name}: {count:,} training images, {flags.seeds} seeds"
        if flags.label_noise:
            title += f", {100 * flags.label_noise:.0f} % of the labels at random"
        report.save(
            flags,
            data=images.describe(),
            histories=histories,
            results=results,
            figure=show.figure(title, curves, flags.max_norm, note(histories)),
        )
    show.table(title, results, flags.out)


if __name__ == "__main__":
    main(DigitsFlags, train)
