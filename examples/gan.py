"""Train a generator against a critic, with and without a bound on the critic.

The critic of a generative adversarial network tells real images from made ones, and the
generator goes up its slope. Without a bound the critic's weights grow, and with them
the slope. Spectral normalisation divides each weight by its
largest singular value, so that the critic stretches no distance.

- `none`: nothing is done to the critic;
- `clip`: its weights are clipped to a range after each update;
- `spectral`: its layers are in a `SpectralNormConstraint`, which remembers vectors.

How near samples are to images that were not trained on is the energy distance of the
two sets; how many classes are made is asked of a classifier of the real images.

See Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR
2018. Run `python examples/gan.py --help` for all flags.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias


# Before NumPy is imported. The matrices are small, and threads that wait would spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from common import report, show
from common.arm import Arm, Planner, Step, seed_keys
from common.checkpoint import Checkpoint
from common.data import Images, load
from common.generated import classes_made, energy_distance
from common.loop import History, fit
from common.run import ComparisonFlags, main, output_directory
from jaxtyping import Array, Float, Key, PyTree
from matplotlib.axes import Axes
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis


Name: TypeAlias = Literal["none", "clip", "spectral"]
# No more test images, and as many samples, are compared.
COMPARED = 1000


@dataclasses.dataclass(frozen=True)
class GanFlags(ComparisonFlags):
    """Train generators of images against critics with and without a bound."""

    out: Path = Path("out/gan")
    """Directory for the results; it is made if need be."""
    methods: tuple[Name, ...] = ("none", "clip", "spectral")
    """What is done to the critic, in the order of the table."""
    latent: int = 16
    """Numbers that the generator makes an image of."""
    width: int = 128
    """Units in each hidden layer, of the generator and of the critic."""
    depth: int = 2
    """Number of hidden layers of both."""
    epochs: int = 100
    """Number of passes through the training set."""
    save_every: int = 50
    """Number of epochs between checkpoints; there is always one at the end."""
    batch_size: int = 64
    """Real images in a step, and made ones."""
    none_rates: tuple[float, float] = (1e-2, 1e-2)
    """`none`: Adam's learning rates, of the generator and of the critic."""
    clip_rates: tuple[float, float] = (2e-4, 1e-3)
    """`clip`: the same."""
    spectral_rates: tuple[float, float] = (1e-4, 5e-4)
    """`spectral`: the same."""
    clip: float = 0.03
    """`clip`: the largest absolute value of a weight of the critic."""
    split_seed: int = 0
    """Seed of the split of the digits into training and test set."""

    QUICK: ClassVar = {**ComparisonFlags.QUICK, "width": 32, "depth": 1}
    # What suits the 60,000 larger images of MNIST.
    LARGE: ClassVar = {"seeds": 2, "width": 256, "epochs": 20, "save_every": 5}

    def implied(self) -> Mapping[str, Any]:
        return {} if self.data == "digits" else self.LARGE

    def check(self) -> None:
        super().check()
        for name in ("latent", "width", "depth", "batch_size"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("none_rates", "clip_rates", "spectral_rates"):
            positive = all(0 < rate < np.inf for rate in getattr(self, name))
            self.require(name, positive, "positive and finite")
        self.require("clip", self.clip > 0, "positive and finite")
        self.require("split_seed", 0 <= self.split_seed < 2**32, "in [0, 2^32)")


LABELS: dict[Name, str] = {
    "none": "no bound",
    "clip": "clipped weights",
    "spectral": "spectral norm",
}


# Slopes of 0.2, as is usual for critics: with smaller ones less of a gradient is left.
leaky = functools.partial(jax.nn.leaky_relu, negative_slope=0.2)


def perceptron(sizes: list[int], key: Key[Array, ""], wrap: Any) -> eqx.nn.Sequential:
    """Linear layers, of which `wrap` makes what it likes, with leaky ReLUs between."""
    keys = jr.split(key, (len(sizes) - 1, 2))
    layers: list[Any] = []
    for columns, rows, (first, second) in zip(sizes, sizes[1:], keys, strict=False):
        linear = eqx.nn.Linear(columns, rows, key=first)
        layers += [wrap(linear, second), eqx.nn.Lambda(leaky)]
    return eqx.nn.Sequential(layers[:-1])


def make_critic(spectral: bool, sizes: list[int], key: Key[Array, ""]) -> Any:
    """A number for an image. Its call takes a state, and gives it back renewed."""
    plain = lambda linear, key: linear
    bounded = lambda linear, key: eqxreg.SpectralNormConstraint(linear, key=key)
    return perceptron(sizes, key, bounded if spectral else plain)


def make_generator(sizes: list[int], key: Key[Array, ""]) -> eqx.nn.Sequential:
    """An image, with pixels from 0 to 1, for some random numbers."""
    body = perceptron(sizes, key, lambda linear, key: linear)
    return eqx.nn.Sequential([*body.layers, eqx.nn.Lambda(jax.nn.sigmoid)])


class GanState(NamedTuple):
    """Both networks, their optimisers, and what the critic's wrappers remember."""

    generator: PyTree[Array]
    critic: PyTree[Array]
    generator_optimiser: PyTree[Array]
    critic_optimiser: PyTree[Array]
    memory: eqx.nn.State


def adversarial_step(
    static: tuple[PyTree, PyTree],
    optimisers: tuple[optax.GradientTransformation, optax.GradientTransformation],
    latent: int,
) -> Step:
    """A step of the critic, and then one of the generator. Reports the critic's loss.
    What is `static`, and the optimisers, are of the generator and of the critic.

    The state of the wrappers goes in with each call of the critic, and the new one,
    with better singular vectors, is kept.
    """

    def judge(params: PyTree, images: Array, memory: eqx.nn.State) -> Any:
        critic = eqx.combine(params, static[1])
        values, memory = jax.vmap(critic, (0, None), (0, None))(images, memory)
        return values[:, 0], memory

    def made(params: PyTree, key: Key[Array, ""], count: int) -> Array:
        generator = eqx.combine(params, static[0])
        return jax.vmap(generator)(jr.normal(key, (count, latent)))

    def step(
        state: GanState, real: Float[Array, "batch features"], key: Key[Array, ""]
    ) -> tuple[GanState, Float[Array, ""]]:
        first, second = jr.split(key)
        count = len(real)

        def critic_loss(params: PyTree, memory: eqx.nn.State) -> Any:
            images = jnp.concatenate([real, made(state.generator, first, count)])
            values, memory = judge(params, images, memory)
            ahead = jnp.concatenate([values[:count], -values[count:]])
            return 2 * jnp.mean(jax.nn.relu(1 - ahead)), memory

        graded = jax.value_and_grad(critic_loss, has_aux=True)
        (value, memory), gradient = graded(state.critic, state.memory)
        updates, judged = optimisers[1].update(
            gradient, state.critic_optimiser, state.critic
        )
        critic = eqx.apply_updates(state.critic, updates)

        def generator_loss(params: PyTree, memory: eqx.nn.State) -> Any:
            values, memory = judge(critic, made(params, second, count), memory)
            return -jnp.mean(values), memory

        graded = jax.grad(generator_loss, has_aux=True)
        gradient, memory = graded(state.generator, memory)
        updates, moved = optimisers[0].update(gradient, state.generator_optimiser)
        generator = eqx.apply_updates(state.generator, updates)
        return GanState(generator, critic, moved, judged, memory), value

    return step


def make_arms(flags: GanFlags, images: Images) -> list[Arm]:
    """The chosen ways, all with the same first generators and critics."""
    first, training = seed_keys(flags.seeds)
    hidden = [flags.width] * flags.depth
    planner = Planner(training, len(images.train_labels), flags.batch_size)
    data = jnp.asarray(images.train_images)

    def start(name: Name, key: Key[Array, ""]) -> tuple[Any, Any, eqx.nn.State]:
        keys = jr.split(key)
        generator = make_generator([flags.latent, *hidden, images.features], keys[0])
        new_critic = eqx.nn.make_with_state(make_critic)
        sizes = [images.features, *hidden, 1]
        critic, memory = new_critic(name == "spectral", sizes, keys[1])
        return generator, critic, memory

    def arm(name: Name) -> Arm:
        new = eqx.filter_vmap(lambda key: start(name, key))
        models = eqx.filter_jit(new)(first)
        *networks, memory = models
        parts = [eqx.partition(model, eqx.is_inexact_array) for model in networks]
        params, static = zip(*parts, strict=True)
        rates = getattr(flags, f"{name}_rates")
        optimisers = [optax.adam(rate, b1=0.0, b2=0.9) for rate in rates]
        if name == "clip":
            box = eqxreg.Box(-flags.clip, flags.clip)
            project = eqxreg.project(box, mask=eqxreg.weights)
            optimisers[1] = optax.chain(optimisers[1], project)
        starts = [jax.vmap(o.init)(p) for o, p in zip(optimisers, params, strict=True)]

        def finish(state: GanState) -> tuple[Any, Any]:
            generator = eqx.combine(state.generator, static[0])
            critic = eqx.combine(state.critic, static[1])
            return generator, eqxreg.bake(critic, state.memory)

        return Arm(
            name,
            LABELS[name],
            start=GanState(params[0], params[1], starts[0], starts[1], memory),
            step=adversarial_step(static, (optimisers[0], optimisers[1]), flags.latent),
            finish=finish,
            data=data,
            planner=planner,
        )

    return [arm(name) for name in flags.methods]


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(eqx.if_array(0), None))
def samples(generator: Any, noise: Float[Array, "n latent"]) -> Array:
    return jax.vmap(generator)(noise)


def critic_norms(critic: Any) -> dict[str, NDArray[np.float64]]:
    """The largest singular value of each layer of the baked critics, in float64."""
    layers = [layer for layer in critic.layers if isinstance(layer, eqx.nn.Linear)]
    return {
        f"norm_{i}": np.linalg.norm(np.asarray(layer.weight, np.float64), 2, (1, 2))
        for i, layer in enumerate(layers, 1)
    }


def measure_on(images: Images, latent: int) -> Callable[[Any], dict[str, NDArray[Any]]]:
    """What `fit` asks of the finished models after each epoch, one number per seed."""
    real = images.test_images[:COMPARED].astype(np.float64)
    noise = jr.normal(jr.key(0), (len(real), latent))
    known = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1)
    known.fit(images.train_images[:10_000], images.train_labels[:10_000])

    def measure(model: Any) -> dict[str, NDArray[Any]]:
        generator, critic = model
        made = np.asarray(samples(generator, noise), np.float64)
        return {
            "energy_distance": np.array([energy_distance(m, real) for m in made]),
            "classes": np.array(
                [classes_made(np.asarray(known.predict(m))) for m in made]
            ),
            **critic_norms(critic),
        }

    return measure


def note(results: Mapping[str, Any]) -> str:
    """What to take home."""
    if not {"none", "spectral"} <= results.keys():
        return ""
    none, spectral = results["none"], results["spectral"]
    norms = [none[name]["mean"] for name in none if name.startswith("norm_")]
    far = [result["energy_distance"]["mean"] for result in (none, spectral)]
    return (
        f"Without a bound the critic reaches norms of {max(norms):.0f}, and samples "
        f"are {far[0]:.3f} from real images; with norms of 1, {far[1]:.3f}."
    )


def mosaic(made: NDArray[Any]) -> NDArray[Any]:
    """Images in 12 rows of 6, with lines of white between them."""
    side = round(made.shape[1] ** 0.5)
    gap = max(1, side // 8)
    grid = made[:72].reshape(12, 6, side, side)
    padded = np.pad(grid, ((0, 0), (0, 0), (0, gap), (0, gap)))
    whole = padded.transpose(0, 2, 1, 3).reshape(12 * (side + gap), -1)
    return whole[:-gap, :-gap]


def figure(
    title: str,
    text: str,
    made: Mapping[str, NDArray[Any]],
    histories: Mapping[str, History],
) -> bytes:
    """A PNG: samples of each way, and the norms of the critic's layers by epoch."""
    colours = dict(zip(made, show.COLOURS, strict=False))

    def grids(axes: Axes) -> None:
        tiles = [mosaic(images) for images in made.values()]
        place, (height, width) = 0.0, tiles[0].shape
        for name, tile in zip(made, tiles, strict=True):
            extent = (place, place + width, 0.0, float(height))
            axes.imshow(tile, cmap="gray_r", vmin=0, vmax=1, extent=extent)
            label = LABELS[name]  # pyright: ignore[reportArgumentType]
            middle = place + width / 2
            axes.text(
                middle,
                -0.02 * height,
                label,
                ha="center",
                va="top",
                color=colours[name],
            )
            place += 1.1 * width
        axes.set(title="Samples, of the first seed", xlim=(0, place - 0.1 * width))
        axes.set(ylim=(-0.1 * height, height))
        axes.axis("off")

    def norms(axes: Axes) -> None:
        layers = sum(
            name.startswith("norm_") for name in next(iter(histories.values()))
        )
        for i, style in zip(range(1, layers + 1), ("-", "--", ":", "-."), strict=False):
            for name, history in histories.items():
                mean = history[f"norm_{i}"].mean(axis=1)
                epochs = np.arange(1, len(mean) + 1)
                axes.plot(epochs, mean, color=colours[name], ls=style, lw=1.8)
            axes.plot([], [], color="0.4", ls=style, label=f"layer {i}")
        axes.set(title="Largest singular value in the critic", xlabel="epoch")
        axes.set(yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_ylim(top=2 * axes.get_ylim()[1])
        axes.legend(loc="upper left", ncols=4, frameon=False)
        axes.grid(axis="y", color="0.9")

    return show.drawn(title, text, grids, norms)


def train(flags: GanFlags) -> None:
    """Trains all ways, writes the results and prints the table."""
    images = load(flags.data, flags.split_seed)
    count = len(images.train_labels)
    flags.require("batch_size", flags.batch_size <= count, f"at most {count} here")
    flags.require("data", images.features**0.5 % 1 == 0, "of square images")
    with output_directory(flags.out):
        checkpoint = Checkpoint(flags, images.describe())
        arms = make_arms(flags, images)
        measure = measure_on(images, flags.latent)
        with show.progress(len(arms) * (flags.epochs + 1)) as advance:
            models, histories = fit(arms, measure, flags, checkpoint, advance)
        results = {arm.name: report.summarise(arm, histories[arm.name]) for arm in arms}
        noise = jr.normal(jr.key(1), (72, flags.latent))
        made = {
            name: np.asarray(samples(generator, noise))[0]
            for name, (generator, _) in models.items()
        }
        title = f"{images.name}: {count:,} training images, {flags.seeds} seeds"
        report.save(
            flags,
            data=images.describe(),
            histories=histories,
            results=results,
            figure=figure(title, note(results), made, histories),
        )
    header = ("critic", "energy distance", "classes made", "largest norm", "seconds")
    rows = [
        (
            result["label"],
            show.plus_minus(result["energy_distance"], 1, 3),
            show.plus_minus(result["classes"], 1),
            f"{max(result[n]['largest'] for n in result if n.startswith('norm_')):.3f}",
            f"{result['seconds']['training']:.1f}",
        )
        for result in results.values()
    ]
    place = f"All numbers and the figure are in {flags.out}."
    show.print_rows(title, header, rows, place)


if __name__ == "__main__":
    main(GanFlags, train)
