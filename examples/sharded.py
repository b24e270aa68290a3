"""Train a constrained transformer on all devices there are, in one process or several.

The devices form a mesh of two axes, `data` and `model`, and every matrix is cut along
both. The batch is shared out over `data`, and so is the storage of weights and moments
(FSDP); the units of each layer are shared out over `model` (tensor parallel). If an
axis has length 1, that leaves only the other.

Max-norm bounds the incoming weights of every unit in every layer, in the forward pass
or after the update, and gathers no weight for it. No number depends on the mesh but for
rounding, so a run that stops on one mesh goes on with `--resume` on another. Run
`python examples/sharded.py --help` for all flags.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import eqxreg
import jax
import jax.random as jr
import numpy as np
import optax
from common import report, show, text
from common.arm import State
from common.cluster import ClusterFlags, any_process, cluster, is_first, leave
from common.mesh import make_mesh, share_of_a_device
from common.run import Failure, Stopped, main, output_directory, stop_signals
from common.sharded_checkpoint import ShardedCheckpoint, sharded_checkpoint
from common.transformer import Transformer
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree


@dataclasses.dataclass(frozen=True)
class ShardedFlags(ClusterFlags):
    """Train a constrained language model of bytes on a mesh of all devices."""

    out: Path = Path("out/sharded")
    """Directory for the results, one for all processes; it is made if need be."""
    data: str = "stdlib"
    """`stdlib`, the source of Python's standard library, or a file to train on."""
    enforce: Literal["forward", "project"] = "forward"
    """Where the bound holds: in the forward pass, or after every update."""
    max_norm: float = 1.0
    """The bound on the norm of each unit's incoming weights, in all layers."""
    decay_rate: float = 0.1
    """The rate of weight decay, as in AdamW."""
    learning_rate: float = 3e-3
    """Adam's, after a warm-up of 20 steps."""
    steps: int = 200
    """Number of updates."""
    save_every: int = 50
    """Number of steps between checkpoints; there is always one at the end."""
    batch_size: int = 16
    """Sequences in a step, on all devices together."""
    length: int = 128
    """Bytes in a sequence."""
    width: int = 128
    """Features of a byte; a feed-forward layer has four times as many units."""
    depth: int = 4
    """Number of layers."""
    heads: int = 4
    """Heads of attention in each layer."""
    seed: int = 0
    """Decides the first weights and the order of the text."""

    QUICK: ClassVar = {"width": 32, "depth": 2, "length": 32, "steps": 20}
    FREE: ClassVar = ClusterFlags.FREE | {"data", "steps", "save_every", "batch_size"}

    def check(self) -> None:
        super().check()
        for name in ("steps", "save_every", "batch_size", "length", "depth", "heads"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "max_norm"):
            self.require(name, getattr(self, name) > 0, "positive and finite")
        self.require("decay_rate", self.decay_rate >= 0, "at least 0 and finite")
        self.require("seed", 0 <= self.seed < 2**32, "in [0, 2^32)")
        whole = self.width > 0 and self.width % self.heads == 0
        self.require("width", whole, "a multiple of --heads")


# What is bounded and decays: the matrices of all layers. The readout stays free, since
# a bound on it would limit how sure the model can be.
hidden = eqxreg.select(eqx.nn.Linear, where=lambda path, *_: ".blocks" in path)


def layout(state: State, mesh: Mesh) -> State:
    """Where every array of the state is: matrices in parts on both axes, vectors whole.

    Moments stand under the paths of their weights, so one rule serves both.
    """

    def place(path: Any, leaf: Array, is_matrix: bool) -> NamedSharding:
        if not is_matrix:
            return NamedSharding(mesh, P())
        # Units are on the model axis, and so are the inputs of what reads them: between
        # the two layers nothing passes from device to device.
        name = jax.tree_util.keystr(path)
        reads = ".output_proj" in name or ".down" in name
        axes = ("data", "model") if reads else ("model", "data")
        return NamedSharding(mesh, P(*[None] * (leaf.ndim - 2), *axes))

    is_matrix = (eqxreg.weights | eqxreg.embeddings)(state)
    return jax.tree_util.tree_map_with_path(place, state, is_matrix)


class Programs(NamedTuple):
    """What runs on the mesh."""

    # The shapes and the layouts of the state.
    shapes: State
    start: Callable[[], State]
    # The state after a batch, and the loss before. Uses up the state that it is given.
    step: Callable[[State, Array], tuple[State, Array]]
    # The bounded weights, as the model computes with them, on every device.
    weights: Callable[[State], list[Array]]


def make_programs(flags: ShardedFlags, mesh: Mesh) -> Programs:
    """Lays out model and optimiser before an array is made: none is ever whole on one.

    The programs say where their results are; XLA finds the rest.
    """
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    bound = eqxreg.MaxNorm(flags.max_norm, axis="unit")
    forward = flags.enforce == "forward"
    optimiser = optax.chain(
        optax.scale_by_adam(b2=0.99),
        eqxreg.weight_decay(flags.decay_rate, mask=hidden),
        optax.scale_by_learning_rate(
            optax.linear_schedule(0.0, flags.learning_rate, transition_steps=20)
        ),
        optax.identity() if forward else eqxreg.project(bound, mask=hidden),
    )

    def new_model() -> Transformer:
        sizes = (flags.length, flags.width, flags.depth, flags.heads)
        model = Transformer(*sizes, key=jr.key(flags.seed))
        return eqxreg.constrain(model, bound, where=hidden) if forward else model

    def new_state() -> State:
        params = eqx.filter(new_model(), eqx.is_inexact_array)
        return State(params, optimiser.init(params))

    def plain(params: PyTree) -> Transformer:
        return eqxreg.bake(eqx.combine(params, static))

    def loss(params: PyTree, batch: Int[Array, "batch length"]) -> Float[Array, ""]:
        pin = lambda x: jax.lax.with_sharding_constraint(x, rows)
        logits, labels = plain(params)(batch[:, :-1], pin), batch[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(state: State, batch: Array) -> tuple[State, Array]:
        value, gradients = jax.value_and_grad(loss)(state.params, batch)
        updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
        return State(eqx.apply_updates(state.params, updates), opt_state), value

    def weights(state: State) -> list[Array]:
        return eqxreg.trainables(plain(state.params), hidden)

    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    static = eqx.filter(eqx.filter_eval_shape(new_model), is_shape, inverse=True)
    shapes = jax.eval_shape(new_state)
    layouts = layout(shapes, mesh)
    return Programs(
        jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, layouts),
        jax.jit(new_state, out_shardings=layouts),
        jax.jit(step, donate_argnums=0, out_shardings=(layouts, whole)),
        jax.jit(weights, out_shardings=whole),
    )


def fit(
    flags: ShardedFlags,
    mesh: Mesh,
    programs: Programs,
    data: text.Text,
    checkpoint: ShardedCheckpoint,
) -> tuple[State, list[float], list[float]]:
    """The state after all steps, their losses, and the seconds of those done here."""
    if flags.resume:
        state, progress = checkpoint.restore(programs.shapes)
    else:
        state, progress = programs.start(), {"position": 0, "losses": []}
    position, losses, seconds = progress["position"], progress["losses"], []
    rows, done = NamedSharding(mesh, P("data")), len(losses)
    if done > flags.steps:
        raise Failure(f"--steps is {flags.steps}, but {done} are done already")
    silent = contextlib.nullcontext(lambda line: None)
    bar = show.progress(flags.steps - done) if is_first() else silent
    with stop_signals() as stopped, bar as advance:
        for step in range(done + 1, flags.steps + 1):
            begin = time.perf_counter()
            batch = data.batch(position, flags.batch_size, rows)
            state, loss = programs.step(state, batch)
            losses.append(float(loss))  # Waits for the result.
            seconds.append(time.perf_counter() - begin)
            position += flags.batch_size
            last, stop = step == flags.steps, any_process(stopped())
            if last or stop or step % flags.save_every == 0:
                checkpoint.save(step, state, {"position": position, "losses": losses})
            if stop and not last:
                raise Stopped(
                    f"{step} of {flags.steps} steps are done; --resume goes on"
                )
            advance(f"step {step} of {flags.steps}, loss {losses[-1]:.4f}")
    return state, losses, seconds


def train(flags: ShardedFlags) -> None:
    """Trains in all processes alike; the first writes the results and the table."""
    with cluster(flags), output_directory(flags.out):
        mesh = make_mesh(flags, data=("batch_size", "width"), model=("heads", "width"))
        programs = make_programs(flags, mesh)
        data = text.load(flags.data, flags.length, flags.seed)
        with sharded_checkpoint(flags, data.describe()) as checkpoint:
            state, losses, seconds = fit(flags, mesh, programs, data, checkpoint)
        # In float64 on the host: float32 would round a norm at the bound either way.
        weights = [np.asarray(w, np.float64) for w in programs.weights(state)]
        norm = max(np.linalg.norm(w, axis=-1).max() for w in weights)
        tokens = flags.batch_size * flags.length
        results = {
            "losses": losses,
            "largest_unit_norm": norm,
            "tokens_per_second": tokens / np.median(seconds) if seconds else None,
            "mesh": dict(mesh.shape),
            "processes": jax.process_count(),
            "share_of_a_device": share_of_a_device(state),
        }
        if is_first():
            report.save_results(flags, data.describe(), results)
            show_results(flags, results)


def show_results(flags: ShardedFlags, results: dict[str, Any]) -> None:
    """Prints the table."""
    mesh = " × ".join(f"{size} {axis}" for axis, size in results["mesh"].items())
    columns = {
        "mesh": mesh,
        "loss": f"{np.mean(results['losses'][-max(1, flags.steps // 10) :]):.4f}",
        "max norm": f"{results['largest_unit_norm']:.7f}",
        "bound": f"{flags.max_norm:g}",
        "tokens/s": f"{results['tokens_per_second'] or 0:,.0f}",
        "state on a device": f"{results['share_of_a_device']:.1%}",
    }
    title = f"{flags.steps} steps on {flags.data}, {results['processes']} process(es)"
    note = f"All numbers are in {flags.out}."
    show.print_rows(title, tuple(columns), [tuple(columns.values())], note)


if __name__ == "__main__":
    main(ShardedFlags, train, leave)
