"""Proximal steps: closed forms, exact zeros, and the lasso."""

import functools as ft

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit
from tables import assert_close, exact, sample


pytestmark = pytest.mark.usefixtures("quick_compilation")


def step(transform, weight, update=None):
    """Where one step takes a weight."""
    params = {"weight": weight}
    updates = {"weight": jnp.zeros_like(weight) if update is None else update}
    updates, _ = jit(transform.update)(updates, transform.init(params), params)
    assert updates["weight"].dtype == weight.dtype
    return optax.apply_updates(params, updates)["weight"]


def soft(w, t):
    size = np.abs(w)
    return np.where(size > t, w * (1 - t / np.maximum(size, 1e-300)), 0)


def group_soft(w, t, axes):
    size = np.sqrt((np.abs(w) ** 2).sum(axes, keepdims=True))
    return np.where(size > t, w * (1 - t / np.maximum(size, 1e-300)), 0)


RTOL = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 2e-6, "complex64": 2e-6}
CASES = {
    "soft": (
        eqxreg.soft_threshold(0.8, learning_rate=0.5),
        lambda w: soft(w, 0.4),
    ),
    "elastic": (
        eqxreg.elastic_net_prox(0.8, 0.6, learning_rate=0.5),
        lambda w: soft(w, 0.4) / 1.3,
    ),
    "ridge": (
        eqxreg.elastic_net_prox(0.0, 0.6, learning_rate=0.5),
        lambda w: w / 1.3,
    ),
    "group-unit": (
        eqxreg.group_soft_threshold(9.0, learning_rate=0.5),
        lambda w: group_soft(w, 4.5, (1, 2)),
    ),
    "group-axis": (
        eqxreg.group_soft_threshold(4.0, axis=-1, learning_rate=0.5),
        lambda w: group_soft(w, 2.0, (2,)),
    ),
    "group-whole": (
        eqxreg.group_soft_threshold(4.0, None, learning_rate=0.5),
        lambda w: group_soft(w, 2.0, (0, 1, 2)),
    ),
}


@pytest.mark.parametrize("dtype", list(RTOL))
@pytest.mark.parametrize("name", list(CASES))
def test_the_closed_form(name, dtype):
    transform, expected = CASES[name]
    weight = sample(dtype)
    actual, expected = step(transform, weight), expected(exact(weight))
    rounding = RTOL[dtype] * np.abs(exact(weight)).max()
    np.testing.assert_allclose(exact(actual), expected, rtol=0, atol=rounding)
    # Zeros are exact, in all precisions.
    clear = np.abs(expected) == 0
    if name in ("soft", "elastic") and dtype != "complex64":
        assert 0.2 < clear.mean() < 0.5
    assert np.all(exact(actual)[clear] == 0)


@pytest.mark.parametrize("name", list(CASES))
def test_it_minimises_what_it_is_the_proximal_step_of(name):
    """By brute force: no point nearby is better."""
    penalties = {
        "soft": ft.partial(eqxreg.l1_penalty, rate=0.4),
        "elastic": ft.partial(eqxreg.elastic_net_penalty, l1=0.4, l2=0.3),
        "ridge": ft.partial(eqxreg.l2_penalty, rate=0.3),
        "group-unit": ft.partial(eqxreg.group_lasso_penalty, rate=4.5),
        "group-axis": ft.partial(eqxreg.group_lasso_penalty, rate=2.0, axis=-1),
        "group-whole": ft.partial(eqxreg.group_lasso_penalty, rate=2.0, axis=None),
    }
    weight = sample("float32")

    def objective(v):
        near = jnp.sum((v - weight) ** 2) / 2
        return near + penalties[name]({"weight": v})

    best = step(CASES[name][0], weight)
    away = jax.vmap(lambda key: 1e-2 * jax.random.normal(key, weight.shape))(
        jax.random.split(jax.random.key(0), 200)
    )
    others = jit(jax.vmap(lambda d: objective(best + d)))(away)
    assert objective(best) < jnp.min(others)


@pytest.mark.parametrize("name", list(CASES))
def test_zeros_stay_and_what_is_not_finite_stays_visible(name):
    transform, _ = CASES[name]
    assert jnp.all(step(transform, jnp.zeros((3, 2, 2))) == 0)
    odd = step(transform, sample("float32").at[0, 0, 0].set(jnp.nan))
    assert jnp.isnan(odd[0, 0, 0])


def test_groups_of_huge_and_tiny_entries():
    for scale in (1e25, 1e-25):
        weight = sample("float32", scale)
        rate = 2.0 * scale
        actual = step(eqxreg.group_soft_threshold(rate, learning_rate=1.0), weight)
        expected = group_soft(exact(weight) / scale, 2.0, (1, 2)) * scale
        np.testing.assert_allclose(exact(actual), expected, rtol=1e-5)


def test_the_threshold_follows_the_learning_rate():
    schedule = optax.linear_schedule(0.4, 0.0, 2)
    for learning_rate, rate in ((schedule, 1.0), (1.0, schedule)):
        prox = eqxreg.soft_threshold(rate, learning_rate=learning_rate)
        params, updates = {"weight": jnp.asarray([1.0])}, {"weight": jnp.zeros(1)}
        state, seen = prox.init(params), []
        for _ in range(3):
            new, state = prox.update(updates, state, params)
            seen.append(-float(new["weight"][0]))
        np.testing.assert_allclose(seen, [0.4, 0.2, 0.0], rtol=1e-6)


def test_stacked_weights_are_thresholded_one_by_one(key):
    mlp = eqx.nn.MLP(4, 2, 8, depth=3, scan=True, key=key)
    params = eqx.filter(mlp, eqx.is_inexact_array)
    prox = eqxreg.group_soft_threshold(1.0, None, learning_rate=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = prox.update(zeros, prox.init(params), params)
    new = optax.apply_updates(params, updates).layers[1].weight
    old = exact(params.layers[1].weight)
    np.testing.assert_allclose(exact(new), group_soft(old, 0.5, (1, 2)), rtol=1e-5)


def test_biases_are_thresholded_unless_they_are_masked():
    params = {"weight": jnp.asarray([[0.1]]), "bias": jnp.asarray([0.1])}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for build, mask, bias in (
        (eqxreg.soft_threshold, None, 0.0),
        (eqxreg.soft_threshold, eqxreg.weights, 0.1),
        (eqxreg.group_soft_threshold, None, 0.1),
    ):
        prox = build(1.0, learning_rate=1.0, mask=mask)
        updates, _ = prox.update(zeros, prox.init(params), params)
        new = optax.apply_updates(params, updates)
        assert new["weight"] == 0 and new["bias"] == jnp.float32(bias)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("l2", [0.0, 0.5])
def test_ista_reaches_the_coefficients_of_scikit_learn(l2):
    """On the diabetes data: the lasso and the elastic net."""
    from sklearn.datasets import load_diabetes
    from sklearn.linear_model import ElasticNet
    from sklearn.preprocessing import StandardScaler

    data = load_diabetes()
    x = StandardScaler().fit_transform(data.data)
    y = (data.target - data.target.mean()) / data.target.std()
    n, l1 = len(y), 0.1
    peer = ElasticNet(
        alpha=l1 + l2,
        l1_ratio=l1 / (l1 + l2),
        fit_intercept=False,
        tol=1e-12,
        max_iter=100_000,
    ).fit(x, y)

    rate = 1 / np.linalg.norm(x.T @ x / n, 2)
    prox = eqxreg.elastic_net_prox(l1, l2, learning_rate=rate)
    if l2 == 0:
        prox = eqxreg.soft_threshold(l1, learning_rate=rate)
    ista = optax.chain(optax.sgd(rate), prox)
    params = {"weight": jnp.zeros(x.shape[1])}

    def body(carry, _):
        params, state = carry
        residual = x @ params["weight"] - y
        updates, state = ista.update({"weight": x.T @ residual / n}, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = params, ista.init(params)
    (params, _), _ = jax.lax.scan(body, carry, length=5_000)
    assert_close(params["weight"], peer.coef_)
    assert np.array_equal(params["weight"] == 0, peer.coef_ == 0)
    assert 0 < (peer.coef_ == 0).sum() < 10
