"""One arm of a comparison: a method of training, compiled for several seeds at once.

From the inside out: a *step* takes a batch, for one seed. `scan_epoch` repeats it over
the data in one `lax.scan`, in the order of a `Plan`. An `Arm` runs that for all seeds
under one `vmap`, with the data on the device, so that an epoch is a single call.

A plan depends on the seed and the number of the epoch alone. So all arms see the same
batches, and a resumed run repeats the uninterrupted one exactly.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree
from numpy.typing import NDArray


class State(NamedTuple):
    """What training changes. With several seeds, every array has them as first axis."""

    params: PyTree[Array]
    opt_state: PyTree[Array]
    # What it does not change, but may be another for each seed: frozen arrays, and what
    # a map holds, such as the base of `Cayley`.
    constants: PyTree[Array] = None


Batch: TypeAlias = PyTree[Array]
# Of one seed: the state may be any tree of arrays.
Step: TypeAlias = Callable[[Any, Batch, Key[Array, ""]], tuple[Any, Float[Array, ""]]]
Loss: TypeAlias = Callable[[Any, Batch, Key[Array, ""]], Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Method:
    """What one arm does differently from the others."""

    label: str
    optimiser: optax.GradientTransformation
    # Applied to the new model, before training.
    wrap: Callable[[Any], Any] = lambda model: model
    # Added to the loss.
    penalty: Callable[[Any], Float[Array, ""] | float] = lambda model: 0.0
    # Applied to the trained model: what is evaluated, and what one would keep.
    finish: Callable[[Any], Any] = eqxreg.bake


class Plan(NamedTuple):
    """What the steps of an epoch use: rows of the data, and a key for all else."""

    rows: Int[Array, "*seeds steps batch"]
    key: Key[Array, "*seeds steps"]


class Planner:
    """Draws the plan of an epoch from its number: for all seeds, alike for all arms.

    The examples that do not fill a last batch are left out, others in every epoch.

    **Arguments:**

    - `keys`: one key per seed.
    - `size`: the number of examples.
    - `batch_size`: the number of examples in a step.
    """

    def __init__(self, keys: Key[Array, " seeds"], size: int, batch_size: int):
        steps = size // batch_size

        def draw(key: Key[Array, ""], epoch: Int[Array, ""]) -> Plan:
            keys = jr.split(jr.fold_in(key, epoch), steps + 1)
            order = jr.permutation(keys[0], size)[: steps * batch_size]
            return Plan(order.reshape(steps, batch_size), keys[1:])

        self._keys, self._draw = keys, jax.jit(jax.vmap(draw, in_axes=(0, None)))

    def __call__(self, epoch: int) -> Plan:
        """The plan of an epoch, every array with the seeds as first axis."""
        return self._draw(self._keys, jnp.int32(epoch))


def gradient_step(
    loss: Loss,
    penalty: Callable[[Any], Float[Array, ""] | float],
    static: PyTree,
    optimiser: optax.GradientTransformation,
) -> Step:
    """A step down the gradient of loss and penalty, which reports the loss alone.

    The model is cut up, as usual in Equinox: `static` is what is no array.
    """

    def step(
        state: State, batch: Batch, key: Key[Array, ""]
    ) -> tuple[State, Float[Array, ""]]:
        def objective(params: PyTree) -> tuple[Float[Array, ""], Float[Array, ""]]:
            model = eqx.combine(params, state.constants, static)
            value = loss(model, batch, key)
            return value + penalty(model), value

        gradients, value = jax.grad(objective, has_aux=True)(state.params)
        updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
        params = eqx.apply_updates(state.params, updates)
        return State(params, opt_state, state.constants), value

    return step


def scan_epoch(
    step: Step,
    state: Any,
    data: Batch,
    plan: Plan,
) -> tuple[Any, Float[Array, ""]]:
    """One pass through the data, for one seed: the new state, and the mean loss."""

    def body(state: Any, planned: Plan) -> tuple[Any, Float[Array, ""]]:
        batch = jax.tree.map(lambda array: array[planned.rows], data)
        return step(state, batch, planned.key)

    state, losses = jax.lax.scan(body, state, plan)
    return state, losses.mean()


def seed_keys(seeds: int) -> tuple[Key[Array, " seeds"], Key[Array, " seeds"]]:
    """Two keys per seed: for the first weights, and for all that is drawn in training.
    They are the same for all arms."""
    keys = jax.vmap(lambda seed: jr.split(jr.key(seed)))(jnp.arange(seeds))
    return keys[:, 0], keys[:, 1]


class Arm:
    """A step of training with all that it needs, for several seeds at once.

    Most arms are made by `supervised`. One with another state, as of two networks,
    brings its own.

    **Arguments:**

    - `name`: under which its results are kept.
    - `label`: what people read.
    - `start`: the first state. Every array has the seeds as first axis.
    - `step`: `(state, batch, key) -> (state, loss)`, for one seed.
    - `finish`: `state -> model`, for one seed: what is evaluated.
    - `data`: the arrays to train on, examples first.
    - `planner`: what to do in which epoch, shared by all arms.
    """

    def __init__(
        self,
        name: str,
        label: str,
        *,
        start: Any,
        step: Step,
        finish: Callable[[Any], Any],
        data: Batch,
        planner: Planner,
    ):
        self.name, self.label, self.compile_seconds = name, label, 0.0
        self._data, self._planner = data, planner
        # A copy, since an epoch uses up its state and the arms share their beginning.
        self.start = jax.tree.map(jnp.copy, start)
        self._program = jax.jit(
            jax.vmap(functools.partial(scan_epoch, step), in_axes=(0, None, 0)),
            donate_argnums=0,
        )
        self._epoch: Callable[..., tuple[Any, Array]] = self._program
        self._finish = eqx.filter_jit(eqx.filter_vmap(finish))

    def compile(self) -> None:
        """Compiles now, so that no epoch's time includes it."""
        begin = time.perf_counter()
        arguments = (self.start, self._data, self._planner(0))
        self._epoch = self._program.lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - begin

    def epoch(self, state: Any, number: int) -> tuple[Any, NDArray[np.float64], float]:
        """Runs one epoch: the new state, each seed's loss, seconds. Uses up `state`."""
        plan = jax.block_until_ready(self._planner(number))
        begin = time.perf_counter()
        state, loss = self._epoch(state, self._data, plan)
        loss = np.asarray(loss, np.float64)  # Waits for the result.
        return state, loss, time.perf_counter() - begin

    def finish(self, state: Any) -> Any:
        """The finished models, as one whose arrays have the seeds as first axis."""
        return self._finish(state)


def supervised(
    name: str, method: Method, models: Any, loss: Loss, *, data: Batch, planner: Planner
) -> Arm:
    """An arm that goes down the gradient of a loss.

    **Arguments:**

    - `method`: see `Method`.
    - `models`: the untrained models, as one whose arrays have the seeds as first axis.
    - `loss`: `(model, batch, key) -> scalar`, without the method's penalty.
    - `name`, `data`, `planner`: see `Arm`.
    """
    wrapped = eqx.filter_vmap(method.wrap)(models)
    arrays, static = eqx.partition(wrapped, eqx.is_array)
    params, constants = eqx.partition(arrays, eqx.is_inexact_array)
    opt_state = jax.jit(jax.vmap(method.optimiser.init))(params)

    def finish(state: State) -> Any:
        return method.finish(eqx.combine(state.params, state.constants, static))

    return Arm(
        name,
        method.label,
        start=State(params, opt_state, constants),
        step=gradient_step(loss, method.penalty, static, method.optimiser),
        finish=finish,
        data=data,
        planner=planner,
    )
