"""The maps and the layers that the tests run over. A new map is tested by a new row."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
from eqxreg._maps import WeightNorm


SHAPE = (6, 5, 4)

# How far below its bound, relatively, a result may be.
SHORT = {
    "float16": 2e-3,
    "bfloat16": 1e-2,
    "float32": 1e-5,
    "float64": 1e-5,
    "complex64": 1e-5,
}
DTYPES = ("float16", "bfloat16", "float32", "complex64")


def sample(dtype: str, scale: float = 1.0, shape=SHAPE, seed: int = 0) -> jax.Array:
    """A Gaussian weight."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape)
    if dtype.startswith("complex"):
        weight = weight + 1j * rng.standard_normal(shape)
    return jnp.asarray(weight * scale, dtype)


def scales(dtype: str) -> tuple[float, ...]:
    """Sizes of weights that a map must get right, up to the ends of the dtype."""
    if dtype == "float16":
        return (1.0, 1e-2, 1e4)
    return (1.0, 1e-2, 1e25, 1e-25)


def exact(weight: jax.Array) -> np.ndarray:
    """The weight in double precision, where the tests measure."""
    array = np.asarray(weight)
    kind = np.complex128 if np.iscomplexobj(array) else np.float64
    return array.astype(kind)


def assert_close(found, expected, tolerance: float = 1e-5) -> None:
    """Trees of arrays are equal up to this share of the largest entry of each array.

    How a sum is rounded depends on the processor. The error follows the size of what
    was added, which a small result may be the difference of.
    """
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for one, other in pairs:
        one, other = exact(one), exact(other)
        size = np.abs(other).max(initial=0)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * size)


def norm_over(axis, ord=2) -> Callable[[np.ndarray], np.ndarray]:
    """The norms of a weight's slices, in numpy. Scaled, so that 1e25 is no problem."""

    def measure(weight):
        axes = {None: (0, 1, 2), "unit": (1, 2)}.get(axis, axis)
        size = np.abs(weight)
        if ord == np.inf:
            return size.max(axes)
        if ord == 1:
            return size.sum(axes)
        peak = size.max(initial=1e-300)
        return peak * np.sqrt(((size / peak) ** 2).sum(axes))

    return measure


def largest_singular_value(matrix=(0,), blocks=1):
    """That of each block of a weight as a matrix, in numpy. Kept at the rank of the
    weight, so that it masks units."""

    def measure(weight):
        peak = np.abs(weight).max(initial=1e-300)
        others = [a for a in range(weight.ndim) if a not in matrix]
        rows = np.transpose(weight / peak, (*matrix, *others))
        count = np.prod([weight.shape[a] for a in matrix])
        matrices = rows.reshape(blocks, count // blocks, -1)
        return peak * np.linalg.svd(matrices, compute_uv=False)[:, 0]

    return measure


@dataclasses.dataclass(frozen=True)
class Bounded:
    """A map, and what it promises of a measure of its result."""

    name: str
    map: eqxreg.Projection
    measure: Callable[[np.ndarray], np.ndarray]
    low: float | None
    high: float
    real_only: bool = False

    def __str__(self):
        return self.name

    def __hash__(self):
        # A map that holds a mask has no hash.
        return hash(self.name)

    def takes(self, dtype: str) -> bool:
        return not (self.real_only and dtype.startswith("complex"))


# None of these bounds is a binary fraction, so that rounding them matters.
_AXES = {
    "whole": None,
    "unit": "unit",
    "first": 0,
    "last": -1,
    "pair": (0, 2),
    "elementwise": (),
}
MAX_NORMS = [
    Bounded(
        f"max_norm-{name}-{ord}",
        eqxreg.MaxNorm(0.7, axis, ord),
        norm_over(axis, ord),
        None,
        0.7,
    )
    for name, axis in _AXES.items()
    for ord in ((1, 2, jnp.inf) if name in ("whole", "unit", "pair") else (2,))
]
SPHERES = [
    Bounded(f"unit_norm-{name}", eqxreg.UnitNorm(0.7, axis), norm_over(axis), 0.7, 0.7)
    for name, axis in _AXES.items()
] + [
    Bounded(
        "min_max_equal",
        eqxreg.MinMaxNorm(0.7, 0.7, axis="unit"),
        norm_over("unit"),
        0.7,
        0.7,
    ),
    Bounded(
        "simplex", eqxreg.Simplex(0.7), lambda w: w.sum(-1), 0.7, 0.7, real_only=True
    ),
    Bounded(
        "simplex-unit",
        eqxreg.Simplex(0.7, axis="unit"),
        lambda w: w.sum((1, 2)),
        0.7,
        0.7,
        real_only=True,
    ),
]
BOXES = [
    Bounded(
        "min_max",
        eqxreg.MinMaxNorm(0.3, 0.7, axis="unit"),
        norm_over("unit"),
        0.3,
        0.7,
    ),
    Bounded("box", eqxreg.Box(-0.3, 0.7), lambda w: w, -0.3, 0.7, real_only=True),
    Bounded(
        "box-arrays",
        eqxreg.Box(np.full(4, -0.3), np.full((6, 1, 1), 0.7)),
        lambda w: w,
        -0.3,
        0.7,
        real_only=True,
    ),
    Bounded(
        "non_negative", eqxreg.NonNegative(), lambda w: w, 0.0, np.inf, real_only=True
    ),
    Bounded(
        "chain",
        eqxreg.Chain(eqxreg.NonNegative(), eqxreg.MaxNorm(0.7, axis="unit")),
        norm_over("unit"),
        None,
        0.7,
        real_only=True,
    ),
    Bounded(
        "straight_through",
        eqxreg.StraightThrough(eqxreg.MaxNorm(0.7, axis="unit")),
        norm_over("unit"),
        None,
        0.7,
    ),
]
SPECTRAL = [
    Bounded(
        "spectral_norm", eqxreg.SpectralNorm(0.7), largest_singular_value(), 0.7, 0.7
    ),
    Bounded(
        "spectral_scale-blocks",
        eqxreg.SpectralScale(0.7, blocks=2),
        largest_singular_value(blocks=2),
        None,
        0.7,
    ),
    Bounded(
        "spectral_cap", eqxreg.SpectralCap(0.7), largest_singular_value(), None, 0.7
    ),
]
_HELD = np.arange(120).reshape(SHAPE) % 3 == 0
PINNED = [
    Bounded("pinned", eqxreg.Pinned(_HELD, 0.5), lambda w: np.abs(w[_HELD]), 0.5, 0.5)
]
PROJECTIONS = MAX_NORMS + SPHERES + BOXES + SPECTRAL + PINNED

# Maps of open sets, and what their weights are.
OPEN = {
    "positive": eqxreg.Positive(),
    "positive-exp": eqxreg.Positive("exp"),
    "interval": eqxreg.Interval(-0.3, 0.7),
    "interval-arrays": eqxreg.Interval(np.full(1, -0.3), 0.7),
    "chain": eqxreg.Chain(eqxreg.Interval(-9.0, 9.0), eqxreg.Positive()),
}


def every_map() -> dict[str, eqxreg.Parametrization]:
    """All maps, weight normalisation bound to some gain."""
    gain = jnp.linspace(0.5, 2.0, SHAPE[0])[:, None, None]
    return {
        **{case.name: case.map for case in PROJECTIONS},
        **OPEN,
        "min_max-rate": eqxreg.MinMaxNorm(0.3, 0.7, rate=0.4, axis="unit"),
        "weight_norm": WeightNorm("unit", gain),
        "orthogonal": eqxreg.Orthogonal(),
        "almost_orthogonal": eqxreg.AlmostOrthogonal(),
        "cayley": eqxreg.Cayley(matrix=1),
        "low_rank": eqxreg.LowRank(2),
    }


def each_kind() -> dict[str, eqxreg.Parametrization]:
    """One map of each kind, for what does not depend on axes."""
    axes = ("-first", "-last", "-pair", "-elementwise")
    repeated = (*axes, "simplex-unit", "equal", "-blocks")
    maps = every_map()
    return {n: p for n, p in maps.items() if not any(r in n for r in repeated)}


class Own(eqx.Module):
    """A module as users write them, with a method and nested arrays."""

    kernel: jax.Array
    tables: dict[str, jax.Array]
    bias: jax.Array

    def __init__(self, key):
        self.kernel = jax.random.normal(key, (3, 4))
        self.tables = {"weight": jax.random.normal(key, (3, 3))}
        self.bias = jnp.zeros(3)

    def __call__(self, x):
        return self.tables["weight"] @ self.encode(x)

    def encode(self, x):
        return self.kernel @ x + self.bias


def wrap(layer, *args, **kwargs):
    """A layer with the stateful bound of its norm, and the state."""
    key = jax.random.key(7)
    build = eqx.nn.make_with_state(eqxreg.SpectralNormConstraint)
    return build(layer, *args, key=key, **kwargs)


def clone(state):
    """A copy, for a call uses its state up."""
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, leaves)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer that owns a weight, and how to call it."""

    name: str
    build: Callable[[jax.Array], Any]
    weight_name: str | tuple[str, ...]
    inputs: tuple[Any, ...]
    stateful: bool = False

    def __str__(self):
        return self.name


def _image(channels, dims):
    return jnp.linspace(-1.0, 1.0, channels * 5**dims).reshape(channels, *(5,) * dims)


def _convolutions():
    for dims in (1, 2, 3):
        conv = getattr(eqx.nn, f"Conv{dims}d")
        transposed = getattr(eqx.nn, f"ConvTranspose{dims}d")
        x = (_image(2, dims),)
        yield Layer(f"Conv{dims}d", lambda k, c=conv: c(2, 3, 3, key=k), "weight", x)
        yield Layer(
            f"ConvTranspose{dims}d",
            lambda k, c=transposed: c(2, 3, 3, key=k),
            "weight",
            x,
        )


_VECTOR = jnp.linspace(-1.0, 1.0, 4)
_STATE = jnp.linspace(-0.5, 0.5, 3)
_SEQUENCE = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)

LAYERS = [
    Layer("Linear", lambda k: eqx.nn.Linear(4, 3, key=k), "weight", (_VECTOR,)),
    *_convolutions(),
    Layer(
        "grouped Conv2d",
        lambda k: eqx.nn.Conv2d(2, 4, 3, groups=2, key=k),
        "weight",
        (_image(2, 2),),
    ),
    Layer(
        "GRUCell",
        lambda k: eqx.nn.GRUCell(4, 3, key=k),
        ("weight_ih", "weight_hh"),
        (_VECTOR, _STATE),
    ),
    Layer(
        "LSTMCell",
        lambda k: eqx.nn.LSTMCell(4, 3, key=k),
        ("weight_ih", "weight_hh"),
        (_VECTOR, (_STATE, _STATE)),
    ),
    Layer(
        "MultiheadAttention",
        lambda k: eqx.nn.MultiheadAttention(2, 4, key=k),
        ("query_proj.weight", "output_proj.weight"),
        (_SEQUENCE, _SEQUENCE, _SEQUENCE),
    ),
    Layer(
        "Embedding",
        lambda k: eqx.nn.Embedding(5, 4, key=k),
        "weight",
        (jnp.asarray(2),),
    ),
    Layer("LayerNorm", lambda k: eqx.nn.LayerNorm(4), "weight", (_VECTOR,)),
    Layer("RMSNorm", lambda k: eqx.nn.RMSNorm(4), "weight", (_VECTOR,)),
    Layer("GroupNorm", lambda k: eqx.nn.GroupNorm(2, 4), "weight", (_VECTOR,)),
    Layer(
        "BatchNorm",
        lambda k: eqx.nn.BatchNorm(4, "batch", mode="batch"),
        "weight",
        (_VECTOR,),
        stateful=True,
    ),
    Layer("PReLU", lambda k: eqx.nn.PReLU(), "negative_slope", (_VECTOR,)),
    Layer(
        "MLP",
        lambda k: eqx.nn.MLP(4, 2, 8, depth=2, key=k),
        ("layers.0.weight", "layers[2].weight"),
        (_VECTOR,),
    ),
    Layer(
        "Sequential",
        lambda k: eqx.nn.Sequential(
            [eqx.nn.Linear(4, 3, key=k), eqx.nn.Lambda(jnp.tanh)]
        ),
        "layers[0].weight",
        (_VECTOR,),
    ),
    Layer("own", Own, ("kernel", "tables.weight"), (_VECTOR,)),
]
