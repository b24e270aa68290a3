"""What the docstrings say of the place of a transform in a chain."""

import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit


pytestmark = pytest.mark.usefixtures("quick_compilation", "standard_promotion")

RATE = 0.1


def end_of(optimiser, gradient, start, steps=500):
    params = {"weight": jnp.asarray(start)}

    def body(carry, _):
        params, state = carry
        grads = {"weight": gradient(params["weight"])}
        updates, state = optimiser.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = params, optimiser.init(params)
    return jit(lambda c: jax.lax.scan(body, c, length=steps)[0][0])(carry)["weight"]


def test_what_scales_steps_comes_after_the_proximal_step():
    """As `reduce_on_plateau` does: the lasso of the unit design, whose solution is the
    soft threshold of the target."""
    target, penalty = np.array([1.0, 0.1]), 0.3
    gradient = lambda w: w - target
    prox = eqxreg.soft_threshold(penalty, learning_rate=RATE)
    plateau = optax.scale(0.5)
    after = optax.chain(optax.sgd(RATE), prox, plateau)
    before = optax.chain(optax.sgd(RATE), plateau, prox)
    solution = np.array([0.7, 0.0])
    np.testing.assert_allclose(end_of(after, gradient, [0.0, 0.5]), solution, atol=1e-5)
    wrong = end_of(before, gradient, [0.0, 0.5])
    np.testing.assert_allclose(wrong, [0.4, 0.0], atol=1e-5)


def test_decay_after_the_learning_rate_makes_weights_grow():
    zero = lambda w: jnp.zeros_like(w)
    decay = eqxreg.weight_decay(RATE)
    before = optax.chain(decay, optax.sgd(RATE))
    after = optax.chain(optax.sgd(RATE), decay)
    independent = optax.chain(
        optax.sgd(RATE), eqxreg.independent_weight_decay(RATE, RATE)
    )
    for optimiser, factor in ((before, 0.99), (after, 1.1), (independent, 0.9)):
        [end] = end_of(optimiser, zero, [1.0], steps=3)
        np.testing.assert_allclose(end, factor**3, rtol=1e-5)


def test_a_line_search_wants_a_wrapper_and_no_projection_after_it():
    ball, scales = eqxreg.MaxNorm(1.0), jnp.asarray([1.0, 10.0])
    target = jnp.asarray([2.0, 1.0])

    def loss(params):
        return jnp.sum(scales * (params["weight"] - target) ** 2) / 2

    def wrapped(params):
        return loss({"weight": ball(params["weight"])})

    def minimise(optimiser, loss):
        optimiser = optax.with_extra_args_support(optimiser)

        def body(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            more = {"value": value, "grad": grads, "value_fn": loss}
            updates, state = optimiser.update(grads, state, params, **more)
            return (optax.apply_updates(params, updates), state), None

        params = {"weight": jnp.asarray([0.1, 0.1])}
        carry = params, optimiser.init(params)
        run = jit(lambda carry: jax.lax.scan(body, carry, length=40)[0][0])
        return np.asarray(ball(run(carry)["weight"]))

    # Projected gradient descent in double precision.
    right, d = np.array([0.1, 0.1]), np.array([1.0, 10.0])
    for _ in range(5000):
        right = right - 0.05 * d * (right - np.array([2.0, 1.0]))
        right = right / max(1.0, np.linalg.norm(right))
    by_wrapper = minimise(optax.lbfgs(), wrapped)
    np.testing.assert_allclose(by_wrapper, right, atol=1e-4)
    after = minimise(optax.chain(optax.lbfgs(), eqxreg.project(ball)), loss)
    assert np.abs(after - right).max() > 1e-2


def test_thresholds_for_adam_are_compared_to_one_and_for_sgd_to_gradients():
    """Gradients of size 1e-2 hold a weight away from zero, or do not."""
    gradient = lambda w: 1e-2 * (w - 1.0)
    for optimiser, rate, is_zero in (
        (optax.sgd(RATE), 5e-3, False),
        (optax.sgd(RATE), 2e-2, True),
        (optax.adam(RATE), 2e-2, False),
        (optax.adam(RATE), 2.0, True),
    ):
        prox = eqxreg.soft_threshold(rate, learning_rate=RATE)
        [end] = end_of(optax.chain(optimiser, prox), gradient, [0.0], steps=200)
        assert (end == 0) == is_zero
