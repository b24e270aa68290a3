"""Layers with given weights, and the truth about their Lipschitz constants: singular
values of dense Jacobians, in numpy and in double precision."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from quick import jit


nn = eqx.nn
KEY = jax.random.key(0)


def built(layer_type, *args, **kwargs):
    """A layer with Gaussian weights from numpy: a draw by JAX would be compiled anew
    for each shape."""
    rng = np.random.default_rng(len(args))
    layer = eqx.filter_eval_shape(layer_type, *args, **kwargs, key=KEY)

    def draw(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jnp.asarray(rng.standard_normal(leaf.shape) / 2, leaf.dtype)

    return jax.tree.map(draw, layer)


def dense_norm(layer, shape) -> float:
    """The largest singular value of a layer's Jacobian at zero."""
    zeros = np.zeros(shape, np.float32)
    jacobian = np.asarray(jit(jax.jacobian(layer))(zeros), np.float64)
    return np.linalg.norm(jacobian.reshape(-1, math.prod(shape)), 2)


def linear_norm(layer, shape) -> float:
    """The largest singular value of a linear layer, column by column of its matrix."""
    size = math.prod(shape)
    inputs = np.eye(size, dtype=np.float32).reshape(size, *shape)
    outputs = jit(jax.vmap(layer))(inputs)
    return np.linalg.norm(np.asarray(outputs, np.float64).reshape(size, -1), 2)


def steepest(function, x, steps=20, rate=0.5) -> float:
    """The largest norm of a Jacobian that gradient ascent finds, from the points x."""
    jacobian = jax.jacrev(function)

    @jit
    @jax.vmap
    def ascend(x):
        slope = jax.grad(lambda x: jnp.sum(jacobian(x) ** 2))(x)
        return x + rate * slope / (jnp.linalg.norm(slope) + 1e-12)

    for _ in range(steps):
        x = ascend(x)
    jacobians = np.asarray(jit(jax.vmap(jacobian))(x), np.float64)
    return np.linalg.norm(jacobians, 2, axis=(1, 2)).max()


def linear(weight) -> nn.Linear:
    """A linear layer with this weight and no bias."""
    weight = jnp.asarray(weight)
    layer = built(nn.Linear, *weight.shape[::-1], use_bias=False)
    return eqx.tree_at(lambda m: m.weight, layer, weight)


def orthogonal(rng, rows, columns) -> nn.Linear:
    square = np.linalg.qr(rng.standard_normal((max(rows, columns),) * 2))[0]
    return linear(square[:rows, :columns].astype(np.float32))
