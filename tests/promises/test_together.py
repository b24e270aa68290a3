"""Everything at once: a model with frozen, tied, stacked, wrapped and half-precision
parts under decay, Adam, a proximal step and a projection."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import filter_jit
from tables import exact


DECAY, RATE, SPARSITY, BOUND, STEPS = 1e-2, 1e-2, 3e-2, 0.6, 200


class Model(eqx.Module):
    tied: eqx.nn.Shared
    frozen: eqxreg.Frozen
    stack: eqx.nn.MLP
    wrapped: eqxreg.MaxNormConstraint
    half: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 6)
        embedding = eqx.nn.Embedding(6, 8, key=keys[0])
        logits = eqx.nn.Linear(8, 6, use_bias=False, key=keys[1])
        self.tied = eqx.nn.Shared(
            (embedding, logits),
            lambda pair: pair[1].weight,
            lambda pair: pair[0].weight,
        )
        self.frozen = eqxreg.Frozen(eqx.nn.Linear(8, 8, key=keys[2]))
        self.stack = eqx.nn.MLP(8, 8, 8, depth=4, scan=True, key=keys[3])
        layer = eqx.nn.Linear(8, 8, key=keys[4])
        self.wrapped = eqxreg.MaxNormConstraint(layer, "weight", BOUND, axis="unit")
        self.half = eqx.nn.Linear(8, 8, dtype=jnp.bfloat16, key=keys[5])

    def __call__(self, token):
        embedding, logits = self.tied()
        x = self.frozen(embedding(token))
        x = jax.nn.tanh(self.wrapped(self.stack(x)))
        return logits(self.half(x.astype(jnp.bfloat16)).astype(jnp.float32))


def loss(model):
    tokens = jnp.arange(6)
    logits = jax.vmap(model)(tokens)
    labels = (tokens + 1) % 6
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def adam(moments, grad, step):
    """The direction of Adam, in double precision."""
    first, second = moments
    first = 0.9 * first + 0.1 * grad
    second = 0.999 * second + 0.001 * grad**2
    hats = first / (1 - 0.9**step), second / (1 - 0.999**step)
    return (first, second), hats[0] / (np.sqrt(hats[1]) + 1e-8)


@pytest.mark.usefixtures("standard_promotion")
def test_every_promise_holds_at_each_of_200_steps(key):
    model = Model(key)
    p = eqxreg.MaxNorm(BOUND, axis="unit")
    optimiser = optax.chain(
        eqxreg.weight_decay(DECAY, mask=eqxreg.weights),
        optax.adam(RATE),
        eqxreg.soft_threshold(SPARSITY, learning_rate=RATE, mask=eqxreg.weights),
        eqxreg.project(p),
    )
    params = eqx.filter(model, eqx.is_inexact_array)
    state = optimiser.init(params)
    first_loss = loss(model)
    bits = np.asarray(model.frozen.layer.weight.bits)

    # The frozen arrays have no moments, the tied ones have them once.
    arrays = eqxreg.trainables(model, paths=True)
    names = [path for path, _ in arrays]
    assert len(jax.tree.leaves(state[1][0].mu)) == len(arrays)
    assert not any("frozen" in name for name in names)
    assert sum("tied" in name for name in names) == 1
    selected = {
        path for path, _ in eqxreg.trainables(model, eqxreg.weights, paths=True)
    }
    assert ".tied.pytree[0].weight" not in selected
    moments = {name: (np.zeros(w.shape), np.zeros(w.shape)) for name, w in arrays}

    @filter_jit
    def step(model, state):
        grads = eqx.filter_grad(loss)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = optimiser.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, grads

    for count in range(1, STEPS + 1):
        before = dict(eqxreg.trainables(model, paths=True))
        model, state, grads = step(model, state)
        grads = dict(eqxreg.trainables(grads, paths=True))
        after = dict(eqxreg.trainables(model, paths=True))
        for name, weight in after.items():
            assert weight.dtype == before[name].dtype
            w, g, decayed = exact(before[name]), exact(grads[name]), name in selected
            g = g + DECAY * w if decayed else g
            moments[name], direction = adam(moments[name], g, count)
            w = w - RATE * direction
            if decayed:
                w = np.sign(w) * np.maximum(np.abs(w) - RATE * SPARSITY, 0)
                norms = np.sqrt((w**2).sum(-1, keepdims=True))
                w = w * np.minimum(1, BOUND / np.maximum(norms, 1e-30))
                norms = np.sqrt((exact(weight) ** 2).sum(-1))
                slack = 1e-2 if weight.dtype == jnp.bfloat16 else 1e-6
                assert norms.max() <= BOUND * (1 + slack)
            # Adam in half precision is another optimiser.
            if weight.dtype == jnp.float32:
                np.testing.assert_allclose(exact(weight), w, atol=2e-5)
                sure = np.abs(w) > 2e-5
                assert not np.any(exact(weight)[sure] == 0)
            else:
                assert np.all(np.isfinite(exact(weight)))
        baked = eqxreg.bake(model)
        inner = np.sqrt((exact(baked.wrapped.weight) ** 2).sum(-1))
        assert inner.max() <= BOUND
    assert np.array_equal(model.frozen.layer.weight.bits, bits)
    assert jnp.array_equal(eqxreg.thaw(model).frozen.weight, model.frozen.weight)
    embedding, logits = model.tied()
    assert embedding.weight is logits.weight
    final = [exact(w) for w in eqxreg.trainables(model, eqxreg.weights)]
    assert sum((w == 0).sum() for w in final) > 5
    norms = np.concatenate([np.sqrt((w**2).sum(-1)).ravel() for w in final])
    assert np.any(norms > 0.99 * BOUND)
    assert loss(model) < 0.5 * first_loss


@pytest.mark.usefixtures("standard_promotion")
def test_without_the_projection_the_bound_is_exceeded(key):
    model = Model(key)
    optimiser = optax.chain(
        eqxreg.weight_decay(DECAY, mask=eqxreg.weights), optax.adam(RATE)
    )
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    @filter_jit
    def step(model, state):
        grads = eqx.filter_grad(loss)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = optimiser.update(grads, state, params)
        return eqx.apply_updates(model, updates), state

    for _ in range(STEPS):
        model, state = step(model, state)
    final = [exact(w) for w in eqxreg.trainables(model, eqxreg.weights)]
    assert max(np.sqrt((w**2).sum(-1)).max() for w in final) > 1.5 * BOUND
    assert sum((w == 0).sum() for w in final) == 0
