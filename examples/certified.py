"""Certify a classifier: how far may an image move before its class can change?

A network of orthogonal layers and sorted units stretches no distance. If its largest
logit is ahead by a margin, the image can move by `margin / sqrt(2)` before another
class wins, whoever moves it: that is a certificate. Beside it stands an attack, which
looks for the nearest image of another class and shows what is there to be found.

- `free`: ReLU, no constraint, plain cross-entropy;
- `small`: orthogonal layers, trained for small radii;
- `large`: the same, trained for large ones.

The last two differ in their loss alone: the cross-entropy of `(logits - offset) /
temperature`, where the offset is taken off the true class. A large one asks for a large
margin of many images, a small one with a low temperature for few errors.

See Trockman and Kolter, "Orthogonalizing Convolutional Layers with the Cayley
Transform", ICLR 2021, and Tsuzuku, Sato and Sugiyama, "Lipschitz-Margin Training",
NeurIPS 2018. Run `python examples/certified.py --help` for all flags.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias


# Before JAX is imported. Decompositions of several matrices at once, as of all seeds,
# wait for threads of a pool, on which they may run themselves: with two threads, as on
# two cores, they can wait for ever.
os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))
# The matrices are small: threads of LAPACK's own would only spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from common import report, show
from common.arm import Arm, Batch, Loss, Method, Planner, seed_keys, supervised
from common.attack import distances, double_precision
from common.checkpoint import Checkpoint
from common.data import CLASSES, Images, load
from common.loop import fit
from common.run import ComparisonFlags, main, output_directory
from jaxtyping import Array, Float, Int, Key
from matplotlib.axes import Axes
from numpy.typing import NDArray


Name: TypeAlias = Literal["free", "small", "large"]


@dataclasses.dataclass(frozen=True)
class CertifiedFlags(ComparisonFlags):
    """Certify images against all changes of a size, with and without constraints."""

    out: Path = Path("out/certified")
    """Directory for the results; it is made if need be."""
    methods: tuple[Name, ...] = ("free", "small", "large")
    """The networks, in the order of the table."""
    radii: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    """How far images are moved, in the l2 norm, with pixels from 0 to 1; ascending."""
    width: int = 64
    """Units in each hidden layer."""
    depth: int = 2
    """Number of hidden layers."""
    epochs: int = 60
    """Number of passes through the training set."""
    batch_size: int = 64
    """Examples in a step."""
    free_rate: float = 8e-3
    """`free`: Adam's learning rate at the start; it falls to zero along a cosine."""
    learning_rate: float = 16e-3
    """That of the others."""
    small_offset: float = 0.5
    """`small`: the margin that the loss asks for."""
    small_temperature: float = 0.1
    """`small`: the temperature of the loss."""
    large_offset: float = 2.0
    """`large`: the margin that the loss asks for."""
    large_temperature: float = 0.25
    """`large`: the temperature of the loss."""
    attack_steps: int = 20
    """Steps of the attack, for each radius."""
    split_seed: int = 0
    """Seed of the split of the digits into training and test set."""

    QUICK: ClassVar = {
        **ComparisonFlags.QUICK,
        "width": 32,
        "depth": 1,
        "epochs": 8,
        "radii": (0.1, 0.5),
        "attack_steps": 5,
    }
    # What suits the 60,000 larger images of MNIST.
    LARGE: ClassVar = {
        "radii": (0.1, 0.3, 0.5, 1.0, 1.58),
        "seeds": 1,
        "width": 256,
        "depth": 3,
        "epochs": 12,
        "save_every": 1,
        "batch_size": 256,
        "small_offset": 1.0,
        "large_offset": 3.5,
    }
    # The schedule is of all epochs: a run of more is another one.
    FREE: ClassVar = ComparisonFlags.FREE - {"epochs"}

    def implied(self) -> Mapping[str, Any]:
        return {} if self.data == "digits" else self.LARGE

    def check(self) -> None:
        super().check()
        for name in ("depth", "batch_size", "attack_steps"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        even = self.width >= 2 and self.width % 2 == 0
        self.require("width", even, "even and at least 2")
        pairs = zip((0.0, *self.radii), self.radii, strict=False)
        rising = len(self.radii) > 0 and all(a < b < np.inf for a, b in pairs)
        self.require("radii", rising, "positive and ascending")
        for name in ("free_rate", "learning_rate"):
            self.require(name, getattr(self, name) > 0, "positive and finite")
        for name in ("small_temperature", "large_temperature"):
            self.require(name, getattr(self, name) > 0, "positive and finite")
        for name in ("small_offset", "large_offset"):
            self.require(name, getattr(self, name) >= 0, "at least 0 and finite")
        self.require("split_seed", 0 <= self.split_seed < 2**32, "in [0, 2^32)")


LABELS: dict[Name, str] = {
    "free": "unconstrained, ReLU",
    "small": "orthogonal, small radii",
    "large": "orthogonal, large radii",
}


def network(
    name: Name, flags: CertifiedFlags, features: int, key: Key[Array, ""]
) -> eqx.nn.Sequential:
    """Linear layers with an activation between them; orthogonal, but for `free`."""
    sizes = [features] + [flags.width] * flags.depth + [CLASSES]
    keys = jr.split(key, len(sizes) - 1)
    layers: list[Any] = []
    for columns, rows, k in zip(sizes, sizes[1:], keys, strict=False):
        activation = eqx.nn.Lambda(jax.nn.relu) if name == "free" else eqxreg.MaxMin()
        layers += [eqx.nn.Linear(columns, rows, key=k), activation]
    model = eqx.nn.Sequential(layers[:-1])
    return model if name == "free" else eqxreg.constrain(model, eqxreg.Cayley())


def margin_loss(offset: float, temperature: float) -> Loss:
    """Cross-entropy that is not content before the true class leads by the offset."""

    def loss(model: Any, batch: Batch, key: Key[Array, ""]) -> Float[Array, ""]:
        images, labels = batch
        asked = offset * jax.nn.one_hot(labels, CLASSES)
        logits = (jax.vmap(model)(images) - asked) / temperature
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(eqx.if_array(0), None, None))
def certify(
    model: Any, images: Float[Array, "n features"], labels: Int[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """The radius within which each image has its true class, whatever is done to it;
    zero if it has another. And the Lipschitz bound of the network."""
    logits = jax.vmap(model)(images)
    bound = eqxreg.lipschitz_bound(model)
    radius = eqxreg.certified_radius(logits, bound)
    return jnp.where(logits.argmax(axis=1) == labels, radius, 0), bound


def measure_on(
    images: Images, radii: tuple[float, ...]
) -> Callable[[Any], dict[str, NDArray[np.float64]]]:
    """What `fit` asks of the finished models after each epoch, one number per seed."""

    def measure(model: Any) -> dict[str, NDArray[np.float64]]:
        radius, bound = certified(model, images)
        shares = {f"certified_at_{r:g}": (radius > r).mean(axis=1) for r in radii}
        accuracy = (radius > 0).mean(axis=1)
        return {"test_accuracy": accuracy, **shares, "lipschitz_bound": bound}

    return measure


def certified(
    model: Any, images: Images
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`certify` on the test images, in float64, with the seeds as first axis."""
    with double_precision():
        x = jnp.asarray(images.test_images, jnp.float64)
        radius, bound = certify(
            eqxreg.cast(model, jnp.float64), x, jnp.asarray(images.test_labels)
        )
        return np.asarray(radius), np.asarray(bound)


def make_arms(flags: CertifiedFlags, images: Images) -> list[Arm]:
    """The chosen networks, all with the same first weights: those of the orthogonal
    ones are the nearest that are orthogonal."""
    first, training = seed_keys(flags.seeds)
    data = (jnp.asarray(images.train_images), jnp.asarray(images.train_labels))
    planner = Planner(training, len(images.train_labels), flags.batch_size)
    steps = flags.epochs * (len(images.train_labels) // flags.batch_size)
    losses = {
        "free": margin_loss(0, 1),
        "small": margin_loss(flags.small_offset, flags.small_temperature),
        "large": margin_loss(flags.large_offset, flags.large_temperature),
    }

    def arm(name: Name) -> Arm:
        new = eqx.filter_vmap(lambda key: network(name, flags, images.features, key))
        models = eqx.filter_jit(new)(first)
        rate = flags.free_rate if name == "free" else flags.learning_rate
        adam = optax.adam(optax.cosine_decay_schedule(rate, steps))
        method = Method(LABELS[name], adam)
        return supervised(
            name, method, models, losses[name], data=data, planner=planner
        )

    return [arm(name) for name in flags.methods]


def note(results: Mapping[str, Any], radius: float) -> str:
    """What to take home: what is certain at the largest radius, and what is found."""
    if not {"free", "large"} <= results.keys():
        return ""
    certain, left = f"certified_at_{radius:g}", f"attacked_at_{radius:g}"
    free, large = results["free"], results["large"]
    percent = lambda metric: f"{100 * metric['mean']:.0f} %"
    return (
        f"Moved by {radius:g}, {percent(large[certain])} of the images are certain to "
        f"keep their class. Without constraints: {percent(free[certain])}, and an "
        f"attack leaves {percent(free[left])}."
    )


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found for each test image, with the seeds as first axis."""

    label: str
    # The radius that is certified, zero where the class is wrong.
    certified: NDArray[np.float64]
    # The distance of the nearest image of another class, infinite if none was found.
    attacked: NDArray[np.float64]


def figure(title: str, text: str, found: list[Found], largest: float) -> bytes:
    """A PNG: accuracy against radius, certified and attacked; and for each image what
    is certified against what the attack found."""

    def accuracy(axes: Axes) -> None:
        radii = np.linspace(0, largest, 200)
        share = lambda values: [100 * (values > r).mean() for r in radii]
        for one, colour in zip(found, show.COLOURS, strict=False):
            axes.plot(radii, share(one.certified), color=colour, lw=1.8)
            axes.plot(radii, share(one.attacked), color=colour, lw=1.8, ls=":")
        axes.plot([], [], color="0.4", lw=1.8, label="certified")
        axes.plot([], [], color="0.4", lw=1.8, ls=":", label="left by the attack")
        axes.set(title="Test images with the right class, %", xlim=(0, largest))
        axes.set(xlabel="radius within which images are moved", ylim=(0, 101))
        axes.legend(loc="lower left", bbox_to_anchor=(0.08, 0), frameon=False)
        axes.grid(axis="y", color="0.9")

    def tightness(axes: Axes) -> None:
        for one, colour in zip(found, show.COLOURS, strict=False):
            certified, attacked = one.certified[0], one.attacked[0]
            shown = np.flatnonzero((certified > 0) & np.isfinite(attacked))[:400]
            axes.scatter(
                certified[shown],
                attacked[shown],
                s=8,
                color=colour,
                alpha=0.5,
                lw=0,
                label=one.label,
            )
        axes.set(xscale="log", yscale="log", xlabel="radius that is certified")
        axes.set(title="Nearest image of another class that was found")
        low = max(min(axes.get_xlim()[0], axes.get_ylim()[0]), 1e-4)
        high = 2 * largest
        axes.plot([low, high], [low, high], color="0.25", lw=1, ls="--")
        axes.set(xlim=(low, high), ylim=(low, high))
        axes.text(
            0.97 * high,
            0.8 * high,
            "no attack can be below this line",
            ha="right",
            va="top",
            rotation=45,
            rotation_mode="anchor",
            transform_rotates_text=True,
            color="0.25",
        )
        place = {"loc": "center left", "bbox_to_anchor": (0, 0.55)}
        axes.legend(frameon=False, markerscale=3, fontsize=10, **place)

    return show.drawn(title, text, accuracy, tightness)


def train(flags: CertifiedFlags) -> None:
    """Trains all networks, certifies and attacks them, writes the results."""
    images = load(flags.data, flags.split_seed)
    count = len(images.train_labels)
    flags.require("batch_size", flags.batch_size <= count, f"at most {count} here")
    with output_directory(flags.out):
        checkpoint = Checkpoint(flags, images.describe())
        arms = make_arms(flags, images)
        measure = measure_on(images, flags.radii)
        results, found = {}, []
        with show.progress(len(arms) * (flags.epochs + 2)) as advance:
            models, histories = fit(arms, measure, flags, checkpoint, advance)
            for arm in arms:
                model = models[arm.name]
                radius, _ = certified(model, images)
                distance = distances(
                    model,
                    images.test_images,
                    images.test_labels,
                    flags.radii,
                    flags.attack_steps,
                )
                found.append(Found(arm.label, radius, distance))
                left = {
                    f"attacked_at_{r:g}": report.summary((distance > r).mean(axis=1))
                    for r in flags.radii
                }
                result = report.summarise(arm, histories[arm.name])
                results[arm.name] = {**result, **left}
                advance(f"attacked {arm.name}")
        title = f"{images.name}: {len(images.test_labels):,} test images, "
        title += f"{flags.seeds} seed" + "s" * (flags.seeds > 1)
        text = note(results, flags.radii[-1])
        report.save(
            flags,
            data=images.describe(),
            histories=histories,
            results=results,
            figure=figure(title, text, found, flags.radii[-1]),
        )
    print_table(title, results, flags)


def print_table(title: str, results: Mapping[str, Any], flags: CertifiedFlags) -> None:
    """Accuracy in per cent: clean, certified at each radius, and under the attack."""
    metrics = ["test_accuracy", *(f"certified_at_{r:g}" for r in flags.radii)]
    metrics.append(f"attacked_at_{flags.radii[-1]:g}")
    header = ("network", "clean", *(f"{r:g}" for r in flags.radii), "attacked")
    rows = [
        (
            result["label"],
            *(f"{100 * result[metric]['mean']:.1f}" for metric in metrics),
        )
        for result in results.values()
    ]
    place = (
        "In per cent: clean, certified at each radius, and left by the attack at the "
        f"last. All numbers and the figure are in {flags.out}."
    )
    show.print_rows(title, header, rows, place)


if __name__ == "__main__":
    main(CertifiedFlags, train)
