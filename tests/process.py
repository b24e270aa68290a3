"""A constrained model, trained and measured, by one process or by two that share it.

python process.py COORDINATOR PROCESS_ID OUT
"""

import functools as ft
import sys
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P


UNIT = eqxreg.MaxNorm(0.5, axis="unit")
PENALTIES = {
    "l1": ft.partial(eqxreg.l1_penalty, rate=0.1),
    "l2": ft.partial(eqxreg.l2_penalty, rate=0.1),
    "elastic_net": ft.partial(eqxreg.elastic_net_penalty, l1=0.1, l2=0.1),
    "distance": ft.partial(eqxreg.distance_penalty, projection=UNIT, rate=0.1),
    "group_lasso": ft.partial(eqxreg.group_lasso_penalty, rate=0.1),
    "orthogonality": ft.partial(eqxreg.orthogonality_penalty, rate=0.1),
    "spectral_norm": ft.partial(eqxreg.spectral_norm_penalty, rate=0.1),
}

# By shape, on a mesh whose data axis goes over processes. None of them has all of a
# weight, nor of the batch.
LAYOUTS = {
    (32, 16): P(("data", "model"), None),
    (24, 32): P("model", "data"),
    (8, 24): P("data", "model"),
    (64, 16): P("data", None),
    # A stack, of which each process has a layer.
    (2, 8, 8): P("data", None, "model"),
}

# What is measured takes seconds to compile for each shape.
LAST = eqxreg.select(where=lambda path, *_: ".layers[4]" in path)

Place = Callable[[Any], Any]


def network(key: jax.Array) -> eqx.nn.Sequential:
    first, second, third = jax.random.split(key, 3)
    linear = eqx.nn.Linear(16, 32, key=first)
    layers = [
        eqxreg.MaxNormConstraint(linear, "weight", 0.5, axis="unit"),
        eqx.nn.Lambda(jnp.tanh),
        eqxreg.WeightNormConstraint(eqx.nn.Linear(32, 24, key=second), "weight"),
        eqx.nn.Lambda(jnp.tanh),
        eqxreg.SpectralNormConstraint(eqx.nn.Linear(24, 8, key=third), key=key),
    ]
    return eqx.nn.Sequential(layers)


def stack(key: jax.Array) -> eqx.nn.Linear:
    make = lambda key: eqx.nn.Linear(8, 8, use_bias=False, key=key)
    return eqx.filter_vmap(make)(jax.random.split(key, 2))


def numbers(place: Place = lambda tree: tree) -> Iterator[tuple[str, Any]]:
    """What comes out, by what was done. `place` spreads arrays over devices."""
    model, state = eqx.nn.make_with_state(network)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    params, state = place(params), place(state)
    yield "training", (trained := training(params, static, state, place))
    params, state, _ = trained
    model = eqx.combine(params, static)
    weights = [leaf for leaf in jax.tree.leaves(params) if leaf.shape in LAYOUTS]
    yield "shares", list(map(share, weights))
    for name, penalty in PENALTIES.items():
        yield name, jax.jit(jax.value_and_grad(penalty))(params)
    project = ft.partial(eqxreg.project_params, projection=eqxreg.MaxNorm(0.3))
    yield "project_params", jax.jit(project)(params)
    yield "metrics", eqx.filter_jit(eqxreg.metrics)(model, state=state)
    yield "report", numbers_of(eqxreg.report(model, LAST, state=state))
    layers = place(stack(jax.random.key(2)))
    yield "stack_report", numbers_of(eqxreg.report(layers, projection=UNIT))


def training(params: Any, static: Any, state: eqx.nn.State, place: Place) -> Any:
    """The weights and singular vectors after three steps, and the losses."""
    layouts = jax.tree.map(lambda leaf: leaf.sharding, params)
    sgd = optax.sgd(0.5, momentum=0.9)
    optimiser = optax.chain(sgd, eqxreg.project(UNIT, every=2))

    def loss(params, state, x):
        call = jax.vmap(eqx.combine(params, static), (0, None), (0, None))
        out, state = call(x, state)
        return jnp.mean((out - jnp.sin(3 * x[:, :8])) ** 2), state

    @ft.partial(jax.jit, out_shardings=(layouts, None, None, None))
    def step(params, state, moments, x):
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, state), gradients = gradient(params, state, x)
        updates, moments = optimiser.update(gradients, moments, params)
        return optax.apply_updates(params, updates), state, moments, value

    x = place(jax.random.normal(jax.random.key(1), (64, 16)))
    moments, losses = jax.jit(optimiser.init)(params), []
    for _ in range(3):
        params, state, moments, value = step(params, state, moments, x)
        losses.append(value)
    return params, state, losses


def share(array: jax.Array) -> float:
    """How much of an array this process has."""
    shards = {str(shard.index): shard.data.size for shard in array.addressable_shards}
    return sum(shards.values()) / array.size


def numbers_of(report: eqxreg.Report) -> list[list[float]]:
    names = ("norm", "singular_value", "stable_rank", "distance", "active")
    rows = ((getattr(row, name) for name in names) for row in report.rows)
    return [[number for number in row if number is not None] for row in rows]


def arrays(found: Iterator[tuple[str, Any]]) -> dict[str, np.ndarray]:
    """All of them, whole, with a number after the name."""

    def whole(leaf: Any) -> np.ndarray:
        is_array = isinstance(leaf, jax.Array)
        return process_allgather(leaf, tiled=True) if is_array else np.asarray(leaf)

    return {
        f"{name} {i}": whole(leaf)
        for name, tree in found
        for i, leaf in enumerate(jax.tree.leaves(tree))
    }


def place_on(mesh: Mesh) -> Place:
    def place(tree: Any) -> Any:
        spec = lambda leaf: LAYOUTS.get(leaf.shape, P())
        layouts = jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf)), tree)
        return jax.device_put(tree, layouts)

    return place


def main(coordinator: str, number: str, out: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, 2, int(number), initialization_timeout=60)
    types = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=types)
    np.savez(out, **arrays(numbers(place_on(mesh))))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
