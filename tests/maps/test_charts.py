"""`MatrixExp` far from its base, against the exponential of the whole skew matrix in
double precision."""

import functools as ft

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit
from tables import exact


pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = [(300, 2), (40, 8), (8, 40), (12, 12), (16, 12), (7, 1)]
KINDS = ["full", "rank one", "graded", "one column"]


def directions(shape, kind):
    """Raw weights of norm one: what is across the base has full rank, rank one,
    singular values from 1 to 1e-14, or zeros."""
    rng = np.random.default_rng(sum(shape))
    raw = rng.standard_normal(shape)
    if kind == "rank one":
        raw = np.outer(raw[:, 0], raw[0])
    if kind == "one column":
        raw[:, 1:] = 0
    if kind == "graded":
        u, s, vh = np.linalg.svd(raw, full_matrices=False)
        raw = (u * np.logspace(0, -14, s.size)) @ vh
    return raw / np.linalg.norm(raw)


def exponential(raw):
    """Around the identity, by the eigenvectors of the whole skew matrix."""
    if raw.shape[0] < raw.shape[1]:
        return exponential(raw.T).T
    base = np.eye(*raw.shape)
    inner = base.T @ raw
    across = raw - base @ inner
    skew = base @ (inner - inner.T) / 2 @ base.T + across @ base.T - base @ across.T
    values, vectors = np.linalg.eigh(1j * skew)
    power = (vectors * np.exp(-1j * values)) @ vectors.conj().T
    return (power @ base).real


@ft.cache
def mapped():
    return jit(lambda raw: eqxreg.MatrixExp()(raw))


def check(raw):
    eps = float(jnp.finfo(raw.dtype).eps)
    result, truth = exact(mapped()(raw)), exponential(exact(raw))
    tall = result if raw.shape[0] >= raw.shape[1] else result.T
    np.testing.assert_allclose(tall.T @ tall, np.eye(tall.shape[1]), atol=16 * eps)
    size = 1 + np.linalg.norm(exact(raw))
    np.testing.assert_allclose(result, truth, atol=32 * eps * size)


each_direction = pytest.mark.parametrize("kind", KINDS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_size = pytest.mark.parametrize("size", [1.0, 10.0, 100.0, 1e3, 1e4, 1e5])


@each_size
@each_direction
@each_shape
def test_the_exponential_of_raw_weights_of_any_size(shape, kind, size):
    check(jnp.asarray(size * directions(shape, kind), "float32"))


@pytest.mark.usefixtures("x64")
@each_size
@each_direction
@each_shape
def test_the_exponential_in_double_precision(shape, kind, size):
    check(jnp.asarray(size * directions(shape, kind), "float64"))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [0.0, 1.0, 1e3, 1e4])
@each_direction
@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (12, 12)], ids=str)
def test_gradients_are_those_of_finite_differences(shape, kind, size):
    rng = np.random.default_rng(7)
    raw = size * directions(shape, kind)
    weights, step = rng.standard_normal(shape), rng.standard_normal(shape)
    step /= np.linalg.norm(step)
    p = eqxreg.MatrixExp()
    gradient = jit(jax.grad(lambda raw: jnp.sum(p(raw) * weights)))(jnp.asarray(raw))
    change = exponential(raw + 1e-5 * step) - exponential(raw - 1e-5 * step)
    expected = np.sum(change * weights) / 2e-5
    found = np.sum(exact(gradient) * step)
    # The differences have the rounding errors of `raw` and of the eigenvectors.
    assert found == pytest.approx(expected, abs=1e-7 * max(size / 100, 1), rel=1e-6)


@each_direction
def test_a_complex_exponential_is_unitary(kind):
    turned = directions((20, 6), kind) * np.exp(1j * np.arange(6))
    result = exact(mapped()(jnp.asarray(1e3 * turned, "complex64")))
    np.testing.assert_allclose(result.conj().T @ result, np.eye(6), atol=2e-6)


def test_matrices_of_one_stack_are_as_exact_as_alone():
    sizes = [0.0, 1.0, 1e2, 1e4]
    raw = np.stack([size * directions((16, 6), "full") for size in sizes])
    results = jit(jax.vmap(eqxreg.MatrixExp()))(jnp.asarray(raw, "float32"))
    blocks = eqxreg.MatrixExp(blocks=4)(jnp.asarray(raw.reshape(64, 6), "float32"))
    for i, size in enumerate(sizes):
        truth = exponential(exact(jnp.asarray(raw[i], "float32")))
        for result in (results[i], blocks.reshape(raw.shape)[i]):
            np.testing.assert_allclose(result, truth, atol=32 * 2**-23 * (1 + size))


@pytest.mark.parametrize("fault", [jnp.nan, jnp.inf, 1e30])
def test_what_is_out_of_reach_is_visible(fault):
    raw = jnp.zeros((6, 2)).at[3, 0].set(fault)
    assert jnp.any(jnp.isnan(mapped()(raw)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6)], ids=str)
def test_a_far_weight_of_norm_two_is_inverted(shape):
    p = eqxreg.MatrixExp()
    raw = 2 * directions(shape, "full")
    weight = p(jnp.asarray(raw))
    np.testing.assert_allclose(p(p.inverse(weight)), weight, atol=1e-9)


@pytest.mark.usefixtures("standard_promotion")
def test_an_embedding_trains_far_away_from_its_base(key):
    embedding = eqx.nn.Embedding(400, 8, key=key)
    embedding = eqxreg.Constraint(embedding, "weight", eqxreg.MatrixExp())
    targets = jax.random.normal(jax.random.key(1), (400, 8))
    optimiser = optax.adam(0.1)

    def loss(embedding):
        weight = eqxreg.bake(embedding).weight
        return jnp.sum((weight - targets) ** 2)

    def step(carry, _):
        params, state = carry
        value, gradients = jax.value_and_grad(lambda p: loss(eqx.combine(p, static)))(
            params
        )
        updates, state = optimiser.update(gradients, state, params)
        return (eqx.apply_updates(params, updates), state), value

    params, static = eqx.partition(embedding, eqx.is_inexact_array)
    carry = (params, optimiser.init(params))
    run = jit(lambda carry: jax.lax.scan(step, carry, length=150))
    (params, _), losses = run(carry)
    assert jnp.all(jnp.isfinite(losses)) and losses[-1] < losses[0]
    weight = exact(eqxreg.bake(eqx.combine(params, static)).weight)
    np.testing.assert_allclose(weight.T @ weight, np.eye(8), atol=1e-5)
