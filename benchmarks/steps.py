"""Training steps of a linear layer, constrained in many ways, for compilers to read.

The step is SGD on a layer of 4096 x 4096 with its parameters donated: `eqx.nn.Linear`,
or a module of one's own, which either says nothing of its weight or that it only
multiplies with it. Products have JAX's default precision: on a TPU one pass in
bfloat16.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from networks import RATE, is_stateful


SIZE = 4096
BATCHES = (256, 4096)
BOUND = 1.0

Role: TypeAlias = Literal["weight", "data", "other"]
DType: TypeAlias = Literal["float32", "bfloat16"]


class Own(eqx.Module):
    """A layer of one's own, of whose weight nothing is known."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.weight @ x + self.bias


class Says(Own):
    """One that says that it only multiplies with its weight."""

    only_multiplies: ClassVar = ("weight",)

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x)


class Snippet(Own):
    """One that normalises its rows itself, as anyone would write it."""

    def __call__(self, x: jax.Array) -> jax.Array:
        norm = jnp.linalg.norm(self.weight, axis=1, keepdims=True)
        return (self.weight * jnp.minimum(1, BOUND / norm)) @ x + self.bias


def linear(dtype: DType, key: jax.Array) -> eqx.nn.Linear:
    return eqx.nn.Linear(SIZE, SIZE, dtype=jnp.dtype(dtype), key=key)


def own(cls: type[Own]) -> Callable[..., Own]:
    def made(dtype: DType, key: jax.Array) -> Own:
        layer = linear(dtype, key)
        return cls(layer.weight, layer.bias)

    return made


class Variant(NamedTuple):
    """A way to constrain a layer."""

    wrap: Callable[..., Any] = lambda layer, key: layer
    layer: Callable[..., Any] = linear
    every: int | None = None
    """How often to project after the update."""


def _max_norm(axis: str | None) -> Callable[..., Any]:
    make = eqxreg.MaxNormConstraint
    return lambda layer, key: make(layer, "weight", BOUND, axis=axis)


PLAIN = "unconstrained"
UNIT = "MaxNorm, unit"
WHOLE = "MaxNorm, whole"
SPECTRAL = "SpectralNorm, warm"
OWN_UNIT = f"{UNIT}, own module"
OWN_WHOLE = f"{WHOLE}, own module"
SAYS_UNIT = f"{UNIT}, only multiplies"
SAYS_WHOLE = f"{WHOLE}, only multiplies"
OF_LINEAR = {
    PLAIN: Variant(),
    UNIT: Variant(_max_norm("unit")),
    WHOLE: Variant(_max_norm(None)),
    SPECTRAL: Variant(
        lambda layer, key: eqxreg.SpectralNormConstraint(layer, "weight", key=key)
    ),
    "WeightNorm": Variant(
        lambda layer, key: eqxreg.WeightNormConstraint(layer, "weight")
    ),
    "project": Variant(every=1),
    "project, every 10": Variant(every=10),
}
OF_OWN = {
    OWN_UNIT: Variant(_max_norm("unit"), own(Own)),
    OWN_WHOLE: Variant(_max_norm(None), own(Own)),
    SAYS_UNIT: Variant(_max_norm("unit"), own(Says)),
    SAYS_WHOLE: Variant(_max_norm(None), own(Says)),
    "snippet, unit": Variant(layer=own(Snippet)),
}
VARIANTS = OF_LINEAR | OF_OWN


def make_step(
    variant: Variant, dtype: DType, batch: int, shard: Callable[[Role], Any]
) -> tuple[Callable, Callable, tuple[Any, ...]]:
    """One step of training, its forward pass, and the shapes of their arguments, laid
    out as `shard` says."""
    optimiser = optax.sgd(RATE)
    if variant.every is not None:
        projection = eqxreg.MaxNorm(BOUND, axis="unit")
        after = eqxreg.project(projection, every=variant.every)
        optimiser = optax.chain(optimiser, after)

    def init(key):
        make = eqx.nn.make_with_state(variant.wrap)
        model, state = make(variant.layer(dtype, key), key=key)
        return model, state, optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    def loss(model, state, x, y):
        if is_stateful(model):
            axes = (0, None)
            out, state = jax.vmap(model, in_axes=axes, out_axes=axes)(x, state)
        else:
            out = jax.vmap(model)(x)
        return jnp.mean((out - y) ** 2), state

    shapes = eqx.filter_eval_shape(init, jax.random.key(0))
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    shapes, static = eqx.partition(shapes, is_shape)

    def forward(arrays, x, y):
        model, state, _ = eqx.combine(arrays, static)
        return loss(model, state, x, y)[0]

    def step(arrays, x, y):
        model, state, carried = eqx.combine(arrays, static)
        grad = eqx.filter_value_and_grad(loss, has_aux=True)
        (value, state), grads = grad(model, state, x, y)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, carried = optimiser.update(grads, carried, params)
        model = eqx.apply_updates(model, updates)
        return eqx.filter((model, state, carried), eqx.is_array), value

    def laid_out(s):
        role = "weight" if s.shape == (SIZE, SIZE) else "other"
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=shard(role))

    data = jax.ShapeDtypeStruct((batch, SIZE), dtype, sharding=shard("data"))
    return step, forward, (jax.tree.map(laid_out, shapes), data, data)


def on_mesh(mesh: Mesh) -> Callable[[Role], NamedSharding]:
    """The weight is sharded over both axes, the data over the first."""
    specs = {"weight": P("model", "data"), "data": P("data"), "other": P()}
    return lambda role: NamedSharding(mesh, specs[role])
