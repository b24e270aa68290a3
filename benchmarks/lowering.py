"""Lowers every map and every transform of eqxreg for platforms that are not here.

`jax.export` needs no compiler of a platform. It shows that a map, its gradient and its
update can be written as a program for it at all.
"""

import functools as ft
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
from every import SIDE, every_map, every_transform
from jax import export
from rich.console import Console


PLATFORMS = ("cuda", "rocm", "tpu")


def lower_all(console: Console) -> Iterator[tuple[str, str, str | None]]:
    """The name of what is lowered, the platform, and the error if there is one."""
    layer = eqx.nn.Linear(SIDE, SIDE, key=jax.random.key(0))
    weight = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)

    def map_step(p, raw):
        return jax.value_and_grad(lambda raw: jnp.sum(p(raw) ** 2))(raw)

    functions: dict[str, Callable] = {}
    for name, p in every_map().items():
        # Positive, for `Positive` has no other weights.
        p, _ = p.bind(jnp.abs(layer.weight))
        functions[name] = ft.partial(map_step, p)
    for name, make in every_transform().items():
        functions[name] = ft.partial(_update, make, layer)
    functions["SpectralNormConstraint"] = ft.partial(_stateful_update, layer)
    for name, function in functions.items():
        for platform in PLATFORMS:
            with console.status(f"lowering {name} for {platform}"):
                try:
                    export.export(jax.jit(function), platforms=[platform])(weight)
                    error = None
                except Exception as e:
                    error = f"{type(e).__name__}: {str(e).splitlines()[0]}"
            yield name, platform, error


def _update(make: Callable, layer: Any, weight: Any) -> Any:
    params = eqx.filter(layer, eqx.is_inexact_array)
    transform = make(params)
    params = eqx.tree_at(lambda layer: layer.weight, params, weight)
    updates = jax.tree.map(jnp.ones_like, params)
    return transform.update(updates, transform.init(params), params)[0]


def _stateful_update(layer: Any, weight: Any) -> Any:
    make = eqx.nn.make_with_state(eqxreg.SpectralNormConstraint)
    wrapped, state = make(layer, "weight", key=jax.random.key(0))

    def loss(weight):
        where = lambda wrapped: wrapped.layer.weight
        return jnp.sum(eqx.tree_at(where, wrapped, weight)(weight[0], state)[0])

    return jax.grad(loss)(weight)


def show(console: Console, results: list[tuple[str, str, str | None]]) -> None:
    """How many were lowered, and what could not be."""
    failed = [(n, p, error) for n, p, error in results if error is not None]
    names = len({name for name, *_ in results})
    platforms = ", ".join(PLATFORMS)
    console.print(
        f"Lowered {names} maps and transforms, with their gradients, for {platforms}: "
        f"{len(failed)} of {len(results)} failed.",
        soft_wrap=True,
    )
    for name, platform, error in failed:
        console.print(f"  {name}, {platform}: {error}", markup=False, soft_wrap=True)
