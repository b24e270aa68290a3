"""Weights with structure: which matrices they are, the nearest points in numpy, and
the maps."""

import dataclasses
import functools as ft
from collections.abc import Callable

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import exact, sample


def adjoint(matrices):
    return np.conj(np.swapaxes(matrices, -1, -2))


def nearest_symmetric(matrices):
    return (matrices + adjoint(matrices)) / 2


def nearest_skew(matrices):
    return (matrices - adjoint(matrices)) / 2


def nearest_semidefinite(matrices):
    values, vectors = np.linalg.eigh(nearest_symmetric(matrices))
    return (vectors * np.maximum(values, 0)[..., None, :]) @ adjoint(vectors)


def nearest_of_rank(rank, matrices):
    u, s, vh = np.linalg.svd(matrices, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


NEAREST = {
    eqxreg.Symmetric: nearest_symmetric,
    eqxreg.SkewSymmetric: nearest_skew,
    eqxreg.PositiveSemidefinite: nearest_semidefinite,
    ft.partial(eqxreg.LowRank, 2): ft.partial(nearest_of_rank, 2),
}
SYMMETRIC, SKEW, SEMIDEFINITE, LOW_RANK = NEAREST


@dataclasses.dataclass(frozen=True)
class Layout:
    """A weight, and which of its axes are the rows of its matrices."""

    shape: tuple[int, ...]
    rows: tuple[int, ...] = (0,)
    arguments: dict = dataclasses.field(default_factory=dict)

    def matrices(self, weight: jax.Array) -> np.ndarray:
        others = [a for a in range(weight.ndim) if a not in self.rows]
        columns = np.prod([self.shape[a] for a in others], dtype=int)
        blocks = self.arguments.get("blocks", 1)
        rows_first = exact(weight).transpose(*self.rows, *others)
        return rows_first.reshape(blocks, -1, columns)


LAYOUTS = {
    "one by one": Layout((1, 1)),
    "blocks": Layout((12, 4), arguments={"blocks": 3}),
    "kernel": Layout((4, 1, 2, 2)),
    "pair": Layout((2, 3, 3, 2), (0, 1), {"matrix": (0, 1)}),
    "last": Layout((2, 2, 4), (2,), {"matrix": -1}),
    "tall": Layout((7, 4)),
    "wide": Layout((4, 7)),
    "wide blocks": Layout((6, 2, 3), arguments={"blocks": 2}),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A map of the weights of a layout."""

    build: Callable[..., eqxreg.Projection]
    layout: str
    dtype: str = "float32"

    def __str__(self):
        return f"{type(self.map).__name__}-{self.layout}-{self.dtype}"

    @property
    def map(self):
        return self.build(**LAYOUTS[self.layout].arguments)

    def sample(self, scale=1.0, seed=0):
        return sample(self.dtype, scale, LAYOUTS[self.layout].shape, seed)

    def matrices(self, weight):
        return LAYOUTS[self.layout].matrices(weight)


# One of each map, for what does not depend on the layout.
MASK = np.arange(32).reshape(8, 4) % 3 > 0
SHAPE = MASK.shape
MAPS = {
    "symmetric": eqxreg.Symmetric(blocks=2),
    "skew": eqxreg.SkewSymmetric(blocks=2),
    "semidefinite": eqxreg.PositiveSemidefinite(blocks=2),
    "low rank": eqxreg.LowRank(2),
    "low rank, wide": eqxreg.LowRank(1, blocks=4),
    "masked": eqxreg.Masked(MASK),
}
each_map = pytest.mark.parametrize("p", MAPS.values(), ids=MAPS.keys())
DECOMPOSED = {name: MAPS[name] for name in ("semidefinite", "low rank")}
each_decomposed = pytest.mark.parametrize(
    "p", DECOMPOSED.values(), ids=DECOMPOSED.keys()
)


@eqx.filter_jit
def applied(p, weight):
    return p(weight)


@eqx.filter_jit
def seen(p, weight):
    return p(weight), p.contains(weight), p.distance(weight)


@eqx.filter_jit
def derivatives(p, weight, tangent):
    """Of `tangent` by the derivative, and by its transpose."""
    _, forward = jax.jvp(p, (weight,), (tangent,))
    [backward] = jax.vjp(p, weight)[1](tangent)
    return forward, backward


def integers(dtype, rank):
    """Two semidefinite matrices of this rank, exact in every dtype."""
    factor = np.random.default_rng(1).integers(-2, 3, (2, 4, rank))
    return jnp.asarray((factor @ adjoint(factor)).reshape(SHAPE), dtype)


def eye(dtype):
    return jnp.concatenate([jnp.eye(4, dtype=dtype)] * 2)
