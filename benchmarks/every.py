"""Every map and every transform of eqxreg, to be lowered and checked one by one."""

import functools as ft
from collections.abc import Callable
from typing import Any

import eqxreg
import numpy as np
import optax


RATE = 1e-3
BOUND = 1.0
SIDE = 64
"""The rows and columns of the weights that they are for."""


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
        eqxreg.Masked(np.tri(SIDE, dtype=bool)),
        eqxreg.Pinned(np.tri(SIDE, dtype=bool), 0.5),
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
