"""A loss and a loop, for the tests of optimisers."""

import equinox as eqx
import jax.numpy as jnp
from quick import filter_jit


X = jnp.linspace(-1.0, 1.0, 4)


def params_of(model):
    return eqx.filter(model, eqx.is_inexact_array)


def loss(model):
    return jnp.sum((model(X) - 1.0) ** 2)


def train(model, optimiser, loss, steps=5):
    """The parameters after each of some steps."""
    state = optimiser.init(params_of(model))
    history = []

    @filter_jit
    def step(model, state):
        grads = eqx.filter_grad(loss)(model)
        updates, state = optimiser.update(grads, state, params_of(model))
        return eqx.apply_updates(model, updates), state

    for _ in range(steps):
        model, state = step(model, state)
        history.append(params_of(model))
    return history
