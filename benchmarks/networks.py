"""The networks that are trained in the benchmarks, and one step of training them."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray


RATE = 1e-3


def is_stateful(layer: Any) -> bool:
    """Whether a layer is called with a state, and returns one."""
    return isinstance(layer, eqx.nn.StatefulLayer) and layer.is_stateful()


class MLP(eqx.Module):
    """Three square layers, which may be stateful."""

    layers: list[Any]

    def __init__(self, width: int, wrap: Callable[..., Any], key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        self.layers = [
            wrap(eqx.nn.Linear(width, width, key=key), key=key) for key in keys
        ]

    def __call__(self, x: Array, state: Any) -> tuple[Array, Any]:
        for i, layer in enumerate(self.layers):
            x = jax.nn.relu(x) if i else x
            if is_stateful(layer):
                x, state = layer(x, state)
            else:
                x = layer(x)
        return x, state


class CNN(eqx.Module):
    """Three convolutions and a linear layer, for images of shape (3, 32, 32)."""

    convolutions: list[Any]
    head: Any

    def __init__(self, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        sizes = ((3, 32), (32, 64), (64, 64))
        self.convolutions = [
            eqx.nn.Conv2d(i, o, 3, stride=2, padding=1, key=key)
            for (i, o), key in zip(sizes, keys, strict=False)
        ]
        self.head = eqx.nn.Linear(64 * 16, 10, key=keys[3])

    def __call__(self, x: Array, state: Any) -> tuple[Array, Any]:
        for convolution in self.convolutions:
            x = jax.nn.relu(convolution(x))
        return self.head(x.reshape(-1)), state


class LSTM(eqx.Module):
    """A cell over 100 steps, and a linear layer."""

    cell: Any
    head: Any

    def __init__(self, key: PRNGKeyArray):
        keys = jax.random.split(key)
        self.cell = eqx.nn.LSTMCell(64, 256, key=keys[0])
        self.head = eqx.nn.Linear(256, 10, key=keys[1])

    def __call__(self, x: Array, state: Any) -> tuple[Array, Any]:
        def step(carry, x):
            return self.cell(x, carry), None

        zero = jnp.zeros(256)
        (hidden, _), _ = jax.lax.scan(step, (zero, zero), x)
        return self.head(hidden), state


class Block(eqx.Module):
    """Attention and two linear layers, each with a normalisation before it."""

    norms: list[eqx.nn.LayerNorm]
    attention: eqx.nn.MultiheadAttention
    up: Any
    down: Any

    def __init__(self, width: int, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        self.norms = [eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)]
        self.attention = eqx.nn.MultiheadAttention(4, width, key=keys[0])
        self.up = eqx.nn.Linear(width, 4 * width, key=keys[1])
        self.down = eqx.nn.Linear(4 * width, width, key=keys[2])

    def __call__(self, x: Array) -> Array:
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y)
        y = jax.vmap(self.norms[1])(x)
        return x + jax.vmap(lambda y: self.down(jax.nn.gelu(self.up(y))))(y)


class Transformer(eqx.Module):
    """Four blocks over 64 vectors."""

    blocks: list[Block]

    def __init__(self, key: PRNGKeyArray):
        self.blocks = [Block(128, key) for key in jax.random.split(key, 4)]

    def __call__(self, x: Array, state: Any) -> tuple[Array, Any]:
        for block in self.blocks:
            x = block(x)
        return x, state


def stepper(
    model: Any,
    state: Any,
    x: Array,
    y: Array,
    *,
    baked: bool = False,
    after: optax.GradientTransformation | None = None,
) -> Callable[[], Any]:
    """One step of gradient descent on the mean square, compiled, from the same model
    each time. With `baked`, constraints are evaluated once for the loss; `after` is
    what follows in the chain."""
    optimiser = optax.chain(optax.sgd(RATE), after or optax.identity())
    params = eqx.filter(model, eqx.is_inexact_array)
    optimiser_state = optimiser.init(params)

    def loss(model: Any, state: Any, x: Array, y: Array) -> tuple[Array, Any]:
        model = eqxreg.bake(model) if baked else model
        batched = jax.vmap(model, in_axes=(0, None), out_axes=(0, None))
        out, state = batched(x, state)
        return jnp.mean((out - y) ** 2), state

    @eqx.filter_jit
    def step(model, state, optimiser_state, x, y):
        gradient = eqx.filter_value_and_grad(loss, has_aux=True)
        (value, state), grads = gradient(model, state, x, y)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, optimiser_state = optimiser.update(grads, optimiser_state, params)
        return eqx.apply_updates(model, updates), state, optimiser_state, value

    kept = [optimiser_state, state]

    def call() -> Any:
        # The counter and the vectors move on, so that every k-th step is one.
        new, kept[1], kept[0], value = step(model, kept[1], kept[0], x, y)
        return new, value

    return call
