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
import numpy as np
import optax
from jax import export
from rich.console import Console


PLATFORMS = ("cuda", "rocm", "tpu")
RATE = 1e-3
BOUND = 1.0
_SIDE = 64


def every_map() -> dict[str, eqxreg.Parametrization]:
    """One map of each kind, and each of its methods."""
    inf = float("inf")
    ball = eqxreg.MaxNorm(BOUND, axis="unit")
    maps: list[eqxreg.Parametrization] = [
        *(eqxreg.MaxNorm(BOUND, axis="unit", ord=o) for o in (1, 2, inf)),
        eqxreg.MaxNorm(BOUND),
        eqxreg.MinMaxNorm(0.5, BOUND, axis="unit"),
        eqxreg.UnitNorm(axis="unit"),
        eqxreg.NonNegative(),
        eqxreg.Box(-BOUND, BOUND),
        eqxreg.Simplex(),
        *(eqxreg.SpectralNorm(method=m) for m in ("lanczos", "gram", "svd")),
        *(eqxreg.SpectralScale(method=m) for m in ("lanczos", "gram", "svd")),
        *(eqxreg.SpectralCap(method=m) for m in (None, "products", "factorisation")),
        *(eqxreg.Orthogonal(method=m) for m in (None, "products", "factorisation")),
        eqxreg.AlmostOrthogonal(),
        eqxreg.Symmetric(),
        eqxreg.SkewSymmetric(),
        eqxreg.PositiveSemidefinite(),
        eqxreg.LowRank(2),
        eqxreg.Masked(np.tri(_SIDE, dtype=bool)),
        eqxreg.Positive(),
        eqxreg.Interval(-BOUND, BOUND),
        eqxreg.Cayley(),
        eqxreg.MatrixExp(),
        eqxreg.StraightThrough(ball),
        eqxreg.Chain(eqxreg.NonNegative(), ball),
        eqxreg.Relative(ball),
    ]
    return {_name(p): p for p in maps}


def every_transform() -> dict[str, Callable[[Any], optax.GradientTransformation]]:
    """One transform of each kind, given the parameters."""
    rate = RATE
    step: dict[str, Any] = {"learning_rate": rate}
    unit = eqxreg.MaxNorm(BOUND, axis="unit")
    project = ft.partial(eqxreg.project, unit)
    return {
        "weight_decay": lambda _: eqxreg.weight_decay(rate),
        "sign_decay": lambda _: eqxreg.sign_decay(rate),
        "decay_towards": lambda params: eqxreg.decay_towards(params, rate),
        "cautious_weight_decay": lambda _: eqxreg.cautious_weight_decay(rate),
        "corrected_weight_decay": lambda _: eqxreg.corrected_weight_decay(rate, rate),
        "independent_weight_decay": lambda _: eqxreg.independent_weight_decay(
            rate, rate
        ),
        "soft_threshold": lambda _: eqxreg.soft_threshold(rate, **step),
        "group_soft_threshold": lambda _: eqxreg.group_soft_threshold(rate, **step),
        "elastic_net_prox": lambda _: eqxreg.elastic_net_prox(rate, rate, **step),
        "project": lambda _: project(),
        "project, every 10": lambda _: project(every=10),
        "project, tangent": lambda _: project(momentum="tangent"),
        "project, SpectralNorm": lambda _: eqxreg.project(eqxreg.SpectralNorm()),
    }


def _name(p: eqxreg.Parametrization) -> str:
    """The class, and what is not at its default among what has few values."""
    given = [getattr(p, name, None) for name in ("method", "axis", "ord")]
    words = [str(value) for value in given if value is not None]
    return ", ".join([type(p).__name__, *words])


def unlisted() -> list[str]:
    """The public maps that `every_map` lacks."""
    listed = {type(p).__name__ for p in every_map().values()}
    public = {
        name
        for name, value in vars(eqxreg).items()
        if isinstance(value, type) and issubclass(value, eqxreg.Parametrization)
    }
    return sorted(public - listed - {"Parametrization", "Projection"})


def lower_all(console: Console) -> Iterator[tuple[str, str, str | None]]:
    """The name of what is lowered, the platform, and the error if there is one."""
    layer = eqx.nn.Linear(_SIDE, _SIDE, key=jax.random.key(0))
    weight = jax.ShapeDtypeStruct((_SIDE, _SIDE), jnp.float32)

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
