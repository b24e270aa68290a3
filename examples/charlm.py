"""Train a small transformer on source text seven ways: what do bounded weights cost?

The matrices of all blocks train by Adam or by Muon, and each way holds their size in
its own manner. Embeddings, normalisations and the readout train by Adam, alike in all:

- `adam_decay`: weight decay, decoupled, as in AdamW;
- `adam_cautious`: decay only where the step shrinks a weight anyway;
- `adam_cap`: no singular value above a cap, by a projection after each step;
- `muon_decay`, `muon_cap`: the same with Muon;
- `muon_fixed`: each matrix keeps the Frobenius norm that it started with;
- `muon_weight_norm`: each unit is a gain, trained by Adam, times a direction.

What can be certified is the largest singular value of every matrix, and from it how
large a logit of attention can get and how steep a feed-forward layer is. The network as
a whole has no such bound: attention by dot products has no Lipschitz constant.

See Chen et al., "Cautious Weight Decay", 2025; Newhouse et al., "Training Transformers
with Enforced Lipschitz Constants", 2025; Wen et al., "Hyperball", 2026; Salimans and
Kingma, "Weight Normalization", 2016. Run `python examples/charlm.py --help` for all
flags.
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
from common import report, show, text
from common.arm import Arm, Batch, Method, Plan, Planner, seed_keys, supervised
from common.checkpoint import Checkpoint
from common.loop import History, fit
from common.run import ComparisonFlags, main, output_directory
from common.transformer import Block, Transformer
from jaxtyping import Array, Float, Int, Key
from matplotlib.axes import Axes
from numpy.typing import NDArray
from optax.contrib import MuonDimensionNumbers


Name: TypeAlias = Literal[
    "adam_decay",
    "adam_cautious",
    "adam_cap",
    "muon_decay",
    "muon_cap",
    "muon_fixed",
    "muon_weight_norm",
]
LABELS: dict[Name, str] = {
    "adam_decay": "Adam, decay",
    "adam_cautious": "Adam, cautious decay",
    "adam_cap": "Adam, capped",
    "muon_decay": "Muon, decay",
    "muon_cap": "Muon, capped",
    "muon_fixed": "Muon, fixed norms",
    "muon_weight_norm": "Muon, weight norm",
}


# The learning rate of the matrices, and the rate of decay or the cap: the best on the
# validation text, with seed 100 and 250 steps. Each way had seven trials: rates of
# 1e-3, 3e-3, 1e-2, 3e-2 and 1e-1, and at the best of them decay of 0.1 and 1 beside
# 0.3, or caps of 1 and 4 beside 2. With nothing else to tune it had six, the last with
# a rate of 3e-1.
TUNED: dict[Name, tuple[float, float | None]] = {
    "adam_decay": (1e-2, 0.3),
    "adam_cautious": (1e-2, 0.3),
    "adam_cap": (3e-2, 2.0),
    "muon_decay": (3e-2, 0.3),
    "muon_cap": (3e-2, 2.0),
    "muon_fixed": (3e-2, None),
    "muon_weight_norm": (3e-2, None),
}


@dataclasses.dataclass(frozen=True)
class CharlmFlags(ComparisonFlags):
    """Train a language model of characters with weights held in seven ways."""

    out: Path = Path("out/charlm")
    """Directory for the results; it is made if need be."""
    data: str = "stdlib"
    """`stdlib`, the source of Python's standard library, or a file to train on."""
    methods: tuple[Name, ...] = tuple(LABELS)
    """The ways, in the order of the table."""
    seeds: int = 3
    """Number of seeds, all trained at once."""
    first_seed: int = 0
    """The first of them. The learning rates were tuned with 100."""
    judge: Literal["test", "validation"] = "test"
    """The text that losses are of. The learning rates were tuned on `validation`."""
    epochs: int = 12
    """Number of times that losses are taken."""
    steps: int = 25
    """Updates from one of these to the next."""
    windows: int = 128
    """Windows of text that losses are taken on."""
    batch_size: int = 16
    """Windows in a step."""
    length: int = 64
    """Characters in a window."""
    width: int = 64
    """Features of a character; a feed-forward layer has four times as many units."""
    depth: int = 2
    """Number of blocks."""
    heads: int = 4
    """Heads of attention in each block."""
    base_rate: float = 5e-3
    """The learning rate of all that is no matrix of a block. Both rise for a tenth of
    the steps, and fall to zero along a cosine."""
    learning_rate: float | None = None
    """That of the blocks' matrices. By default each way has the one that it was tuned
    to."""
    strength: float | None = None
    """The rate of decay, 0.3 by default, or the cap, by default 2."""

    QUICK: ClassVar = {
        **ComparisonFlags.QUICK,
        "steps": 5,
        "windows": 16,
        "batch_size": 4,
        "length": 16,
        "width": 16,
    }

    # The schedule is of all epochs: a run of more is another one.
    FREE: ClassVar = ComparisonFlags.FREE - {"epochs"}

    def check(self) -> None:
        super().check()
        counts = ("steps", "windows", "batch_size", "length", "width", "depth", "heads")
        for name in counts:
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("first_seed", self.first_seed >= 0, "at least 0")
        self.require("width", self.width % self.heads == 0, "a multiple of --heads")
        self.require("base_rate", self.base_rate > 0, "positive and finite")
        for name in ("learning_rate", "strength"):
            value = getattr(self, name)
            self.require(name, value is None or value > 0, "positive and finite")


# What is bounded, decays, and is trained by Muon: the matrices of all blocks. The
# readout stays free, since a bound on it would limit how sure the model can be.
matrices = eqxreg.select(eqx.nn.Linear, where=lambda path, *_: ".blocks" in path)


def schedule(peak: float, steps: int) -> optax.Schedule:
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 10), steps)
    return lambda step: peak * shape(step)


def muon(rate: optax.Schedule, decay: float = 0.0) -> optax.GradientTransformation:
    """Muon with steps of the size of Adam's, so that one grid of rates suits both.

    Equinox has the inputs of a layer on the last axis, and Muon expects them on the
    first. Blocks are stacked, on an axis before these.
    """
    axes = MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    return optax.contrib.muon(
        rate,
        weight_decay=decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(
            lambda _: axes, params
        ),
    )


def make_optimiser(
    name: Name, rate: float, strength: float | None, flags: CharlmFlags
) -> optax.GradientTransformation:
    """One way to train the matrices; all the rest has Adam."""
    steps = flags.epochs * flags.steps
    rated = schedule(rate, steps)
    value = 0.0 if strength is None else strength
    if name.startswith("muon"):
        inner = muon(rated, value if name == "muon_decay" else 0.0)
    else:
        decays = {
            "adam_decay": eqxreg.weight_decay,
            "adam_cautious": eqxreg.cautious_weight_decay,
        }
        inner = optax.chain(
            optax.scale_by_adam(b2=0.99),
            decays[name](value) if name in decays else optax.identity(),
            optax.scale_by_learning_rate(rated),
        )
    rest = optax.adam(schedule(flags.base_rate, steps), b2=0.99)
    both = optax.partition({True: inner, False: rest}, matrices)
    if name.endswith("cap"):
        return optax.chain(
            both, eqxreg.project(eqxreg.SpectralCap(value), mask=matrices)
        )
    if name == "muon_fixed":
        keep = eqxreg.Relative(eqxreg.UnitNorm())
        return optax.chain(both, eqxreg.project(keep, mask=matrices))
    return both


def linears(model: Transformer) -> list[Any]:
    """The linear layers of all blocks, each of them a stack."""
    blocks, heads = model.blocks, model.blocks.attention
    projections = [heads.query_proj, heads.key_proj, heads.value_proj]
    return [*projections, heads.output_proj, blocks.up, blocks.down]


def with_weight_norm(model: Transformer) -> Transformer:
    """The model, with a gain and a direction for each unit of its blocks."""
    # Mapped over the stack: every layer has gains of its own.
    wrap = eqx.filter_vmap(eqxreg.WeightNormConstraint)
    return eqx.tree_at(linears, model, [wrap(layer) for layer in linears(model)])


def loss(model: Any, batch: Batch, key: Key[Array, ""]) -> Float[Array, ""]:
    del key
    # Baked once, and not in each block of the scan.
    symbols = batch.astype(jnp.int32)
    logits = eqxreg.bake(model)(symbols[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, symbols[:, 1:])
    return losses.mean()


class WindowPlanner(Planner):
    """Draws windows at random for a number of steps, which is an epoch."""

    def __init__(self, keys: Key[Array, " seeds"], size: int, flags: CharlmFlags):
        shape = (flags.steps, flags.batch_size)

        def draw(key: Key[Array, ""], epoch: Int[Array, ""]) -> Plan:
            keys = jr.split(jr.fold_in(key, epoch), flags.steps + 1)
            return Plan(jr.randint(keys[0], shape, 0, size), keys[1:])

        self._keys, self._draw = keys, jax.jit(jax.vmap(draw, in_axes=(0, None)))


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(eqx.if_array(0), None))
def evaluate(model: Transformer, windows: Array) -> tuple[Array, Array, Array]:
    """The loss, and what is certified of a block, whatever the text: the largest size
    of a logit of attention, and the steepness of what is after the normalisation."""

    def certify(block: Block) -> tuple[Array, Array]:
        heads = block.attention
        # No longer than this is what a normalisation hands on.
        gain = jnp.abs(block.attention_norm.weight).max()  # pyright: ignore
        longest = gain * jnp.sqrt(float(heads.query_size))
        query, key = map(eqxreg.lipschitz_bound, (heads.query_proj, heads.key_proj))
        logit = longest**2 * query * key / jnp.sqrt(float(heads.qk_size))
        layers = [block.up, eqx.nn.Lambda(jax.nn.gelu), block.down]
        return logit, eqxreg.lipschitz_bound(eqx.nn.Sequential(layers))

    logits, slopes = eqx.filter_vmap(certify)(model.blocks)
    return loss(model, windows, jr.key(0)), logits.max(), slopes.max()


def singular_values(model: Transformer) -> NDArray[np.float64]:
    """The largest of any matrix in the blocks, for each seed. In float64."""
    weights = [np.asarray(layer.weight, np.float64) for layer in linears(model)]
    return np.stack([np.linalg.norm(w, 2, (-2, -1)).max(axis=-1) for w in weights]).max(
        axis=0
    )


def make_arms(flags: CharlmFlags, windows: NDArray[np.uint8]) -> list[Arm]:
    """The chosen ways, all with the same first weights and the same text."""
    last = flags.first_seed + flags.seeds
    first, training = (keys[flags.first_seed :] for keys in seed_keys(last))
    planner = WindowPlanner(training, len(windows), flags)
    sizes = (flags.length, flags.width, flags.depth, flags.heads)
    new = eqx.filter_vmap(lambda key: Transformer(*sizes, key=key))
    models = eqx.filter_jit(new)(first)
    data = jnp.asarray(windows)

    def arm(name: Name) -> Arm:
        rate, strength = TUNED[name]
        rate = flags.learning_rate or rate
        strength = flags.strength or strength
        optimiser = make_optimiser(name, rate, strength, flags)
        method = Method(LABELS[name], optimiser)
        if name == "muon_weight_norm":
            method = dataclasses.replace(method, wrap=with_weight_norm)
        return supervised(name, method, models, loss, data=data, planner=planner)

    return [arm(name) for name in flags.methods]


def note(results: Mapping[str, Any]) -> str:
    """What to take home."""
    said = []
    for name, ways in (
        ("Adam", ("adam_decay", "adam_cap")),
        ("Muon", ("muon_decay", "muon_cap")),
    ):
        if set(ways) <= results.keys():
            loss = [f"{results[way]['loss']['mean']:.3f}" for way in ways]
            largest = [
                results[way]["largest_singular_value"]["largest"] for way in ways
            ]
            size = [f"{value:.1f}" for value in largest]
            said.append(f"{name}'s loss {' → '.join(loss)}, σ₁ {' → '.join(size)}")
    return f"From decay to a cap: {'; '.join(said)}." if said else ""


def figure(
    title: str, text: str, histories: Mapping[str, History], flags: CharlmFlags
) -> bytes:
    """A PNG: losses, and the largest singular values, by step."""

    def curves(metric: str) -> dict[str, NDArray[np.float64]]:
        return {
            LABELS[name]: history[metric]  # pyright: ignore[reportArgumentType]
            for name, history in histories.items()
        }

    def losses(axes: Axes) -> None:
        means = [each.mean(axis=1) for each in curves("loss").values()]
        show.mean_curves(axes, curves("loss"), flags.steps)
        # The first epochs would squeeze the part that is of interest.
        early = max(mean[len(mean) // 4] for mean in means)
        axes.set_ylim(min(mean.min() for mean in means) - 0.05, early)
        axes.set(title=f"Loss on the {flags.judge} text, nats a character")
        axes.set(xlabel="step")
        axes.legend(loc="lower left", fontsize=10, frameon=False)

    def sizes(axes: Axes) -> None:
        show.mean_curves(axes, curves("largest_singular_value"), flags.steps)
        axes.set(title="Largest singular value of any matrix", xlabel="step")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(min(1.0, axes.get_ylim()[0]), None)

    return show.drawn(title, text, losses, sizes)


def train(flags: CharlmFlags) -> None:
    """Trains all ways, writes the results and prints the table."""
    about, parts = text.parts(flags.data, flags.length, flags.windows)
    judged = jnp.asarray(getattr(parts, flags.judge))

    def measure(model: Transformer) -> dict[str, NDArray[np.float64]]:
        found = (np.asarray(x, np.float64) for x in evaluate(model, judged))
        names = ("loss", "attention_logit_bound", "feed_forward_bound")
        return {
            **dict(zip(names, found, strict=True)),
            "largest_singular_value": singular_values(model),
        }

    with output_directory(flags.out):
        checkpoint = Checkpoint(flags, about)
        arms = make_arms(flags, parts.train)
        with show.progress(len(arms) * (flags.epochs + 1)) as advance:
            _, histories = fit(arms, measure, flags, checkpoint, advance)
        results = {arm.name: report.summarise(arm, histories[arm.name]) for arm in arms}
        title = (
            f"a transformer of {flags.depth} blocks of width {flags.width} on "
            f"{about['name']}, {about['bytes'] / 1e6:.1f} MB, {flags.seeds} seeds"
        )
        report.save(
            flags,
            data=about,
            histories=histories,
            results=results,
            figure=figure(title, note(results), histories, flags),
        )
    header = ("way", "loss", "largest σ₁", "logit below", "steepness", "seconds")
    rows = [
        (
            result["label"],
            show.plus_minus(result["loss"], 1, 4),
            f"{result['largest_singular_value']['largest']:.3f}",
            f"{result['attention_logit_bound']['largest']:.0f}",
            f"{result['feed_forward_bound']['largest']:.1f}",
            f"{result['seconds']['training']:.1f}",
        )
        for result in results.values()
    ]
    place = f"All numbers and the figure are in {flags.out}."
    show.print_rows(title, header, rows, place)


if __name__ == "__main__":
    main(CharlmFlags, train)
