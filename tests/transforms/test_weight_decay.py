"""Decay towards zero: what it is to the loss, to Adam and to AdamW, and its rates."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import optax
import pytest
from quick import jit
from tables import assert_close
from training import loss, params_of, train


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.usefixtures("standard_promotion")
def test_decay_before_adam_is_adam_on_the_penalised_loss(mlp):
    coupled = train(mlp, optax.chain(eqxreg.weight_decay(0.1), optax.adam(1e-2)), loss)
    penalised = train(
        mlp, optax.adam(1e-2), lambda m: loss(m) + eqxreg.l2_penalty(m, 0.1)
    )
    assert_close(coupled, penalised)


def test_sign_decay_is_sgd_on_the_penalised_loss(mlp):
    decayed = train(mlp, optax.chain(eqxreg.sign_decay(0.1), optax.sgd(1e-2)), loss)
    penalised = train(
        mlp, optax.sgd(1e-2), lambda m: loss(m) + eqxreg.l1_penalty(m, 0.1)
    )
    assert_close(decayed, penalised)


@pytest.mark.usefixtures("standard_promotion")
def test_decay_after_adam_is_adamw(mlp):
    decoupled = optax.chain(
        optax.scale_by_adam(),
        eqxreg.weight_decay(0.1, mask=eqxreg.weights),
        optax.scale_by_learning_rate(1e-2),
    )
    adamw = optax.adamw(1e-2, weight_decay=0.1, mask=eqxreg.weights)
    assert_close(train(mlp, decoupled, loss), train(mlp, adamw, loss))


def test_decay_leaves_state_and_bounds_alone(key):
    model = [
        eqx.nn.BatchNorm(4, "batch", mode="batch"),
        eqxreg.MaxNormConstraint(
            eqx.nn.Linear(4, 3, key=key), "weight", jnp.asarray(2.0)
        ),
    ]
    params = params_of(model)
    decay = eqxreg.weight_decay(1.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = decay.update(zeros, decay.init(params), params)
    assert updates[1].max_norm is None
    assert jnp.array_equal(updates[1].weight, params[1].weight)
    assert all(jnp.all(u == 0) for u in jax.tree.leaves(updates[0].batch_state_index))


@pytest.mark.parametrize(
    "rate",
    [0.5, jnp.asarray(0.5), optax.constant_schedule(0.5)],
    ids=["number", "array", "schedule"],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_decay_promotes_nothing(rate, dtype):
    params = {"weight": jnp.asarray([2.0, -4.0], dtype), "none": None}
    zeros = jax.tree.map(jnp.zeros_like, params)
    expected = {eqxreg.weight_decay: [1, -2], eqxreg.sign_decay: [0.5, -0.5]}
    for build, update in expected.items():
        transform = build(rate)
        actual, _ = jit(transform.update)(zeros, transform.init(params), params)
        assert actual["weight"].dtype == dtype
        assert jnp.array_equal(actual["weight"], jnp.asarray(update, dtype))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float64", "complex64", "complex128", "bfloat16"])
def test_a_rate_is_cast_to_the_dtype_of_each_weight(dtype):
    params = {"weight": jnp.asarray([2.0, 4.0], dtype), "kernel": jnp.ones(1, "f4")}
    zeros = jax.tree.map(jnp.zeros_like, params)
    single = jnp.asarray(0.5, "float32")
    for rate in (single, optax.linear_schedule(0.5, 0.5, 1), lambda step: single):
        decay = eqxreg.weight_decay(rate)
        updates, _ = decay.update(zeros, decay.init(params), params)
        assert updates["weight"].dtype == dtype
        assert jnp.array_equal(updates["weight"], jnp.asarray([1.0, 2.0], dtype))


def test_a_rate_may_follow_a_schedule():
    decay = eqxreg.weight_decay(optax.linear_schedule(0.0, 1.0, 2))
    params = {"weight": jnp.asarray([2.0])}
    state, seen = decay.init(params), []
    for _ in range(3):
        updates, state = decay.update({"weight": jnp.zeros(1)}, state, params)
        seen.append(float(updates["weight"][0]))
    assert seen == [0.0, 1.0, 2.0]


def test_hyperparameters_are_injected():
    inject = optax.inject_hyperparams(eqxreg.weight_decay, static_args=("mask",))
    decay = inject(rate=0.5, mask=eqxreg.weights)
    params = {"weight": jnp.asarray([2.0]), "bias": jnp.asarray([2.0])}
    state = decay.init(params)
    state.hyperparams["rate"] = jnp.asarray(0.25)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jit(decay.update)(zeros, state, params)
    assert updates["weight"] == 0.5 and updates["bias"] == 0
