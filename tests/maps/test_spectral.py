"""Spectral and orthogonal maps against the singular value decomposition in double
precision, at the points where they are awkward, and in the optimiser."""

import functools as ft
import math
import re

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eqxreg._singular import gram, lanczos, of_matrix, start_vector
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from quick import check_derivatives, filter_jit, jit
from tables import assert_close, exact, sample


WAYS = ("factorisation", "products")


def orthogonal(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def with_spectrum(values, rows):
    """A matrix with these singular values."""
    values = np.asarray(values)
    left = orthogonal(rows)[:, : values.size]
    return (left * values) @ orthogonal(values.size, 1).T


def singular_values(weight):
    matrix = exact(weight).reshape(weight.shape[0], -1)
    return np.linalg.svd(matrix, compute_uv=False)


def function_of(weight, fn):
    """The weight with `fn` of its singular values."""
    u, s, vh = np.linalg.svd(exact(weight), full_matrices=False)
    return (u * fn(s)) @ vh


# The square ones share a shape, and what is compiled for it.
MATRICES = {
    "row": sample("float32", shape=(1, 50)),
    "column": sample("float32", shape=(50, 1)),
    "tall": sample("float32", shape=(200, 40)),
    "wide": sample("float32", shape=(40, 200)),
    "square": sample("float32", 0.1, shape=(48, 48)),
    "fast decay": jnp.asarray(with_spectrum(3 * 0.8 ** np.arange(48), 48), "float32"),
    "ties": jnp.asarray(with_spectrum([2.0] * 24 + [0.5] * 24, 48), "float32"),
    "rank three": jnp.asarray(with_spectrum([3, 2, 1] + [0] * 45, 48), "float32"),
    "orthogonal": jnp.asarray(orthogonal(48), "float32"),
    "identity": jnp.eye(48),
}


@ft.cache
def compiled(p):
    """As users compile it, for its bits."""
    return jax.jit(lambda weight: p(weight))


@ft.cache
def estimate(method):
    return jit(ft.partial(eqxreg.spectral_norm, method=method))


FULL_RANK = [name for name in MATRICES if name not in ("rank three", "fast decay")]
each_matrix = pytest.mark.parametrize("name", list(MATRICES))


@each_matrix
def test_estimates_of_the_largest_singular_value_agree_with_the_svd(name):
    weight = MATRICES[name]
    expected = singular_values(weight)[0]
    estimates = {
        method: float(estimate(method)(weight)) for method in ("lanczos", "gram", "svd")
    }
    assert estimates["lanczos"] == pytest.approx(expected, rel=1e-4)
    assert estimates["svd"] == pytest.approx(expected, rel=1e-6)
    # It certifies.
    assert expected <= estimates["gram"] <= expected * (1 + 1e-4)


def test_one_krylov_space_is_enough_for_a_large_gaussian_matrix():
    weight = sample("float32", shape=(1024, 1024))
    start = start_vector(weight)
    # In numpy, the values alone, by the symmetric product, for speed.
    expected = np.sqrt(np.linalg.eigvalsh(exact(weight).T @ exact(weight))[-1])
    once = jit(lambda w: lanczos(of_matrix(w), start, cycles=1).value)(weight)
    assert float(once) == pytest.approx(expected, rel=1e-3)
    value = singular_values(jit(eqxreg.SpectralNorm(0.5))(weight))[0]
    assert value == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("method", ["lanczos", "gram", "svd"])
def test_the_gradient_of_the_largest_singular_value_is_an_outer_product(method):
    weight = sample("float32", shape=(7, 5))
    u, _, vh = np.linalg.svd(exact(weight))
    gradient = jax.grad(ft.partial(eqxreg.spectral_norm, method=method))
    np.testing.assert_allclose(
        jit(gradient)(weight), np.outer(u[:, 0], vh[0]), atol=1e-4
    )


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
def test_complex_singular_values_conjugate(shape):
    weight = sample("complex64", shape=shape)
    expected = np.linalg.svd(exact(weight), compute_uv=False)[0]
    for method in ("lanczos", "gram", "svd"):
        value = estimate(method)(weight)
        assert float(value) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("fault", [jnp.nan, jnp.inf])
def test_faults_in_a_weight_stay_visible_in_every_estimate(fault):
    weight = sample("float32", shape=(4, 3)).at[1, 1].set(fault)
    assert not jnp.isfinite(jit(lambda weight: gram(weight).value)(weight))
    for method in ("lanczos", "svd"):
        assert not jnp.isfinite(estimate(method)(weight))
    for name in ("cap", "cap-products", "orthogonal", "orthogonal-products"):
        assert not jnp.all(jnp.isfinite(mapped(name)(weight)))


@pytest.mark.parametrize("way", WAYS)
@each_matrix
def test_the_cap_lowers_singular_values_and_leaves_the_others(name, way):
    weight = MATRICES[name]
    p = compiled(eqxreg.SpectralCap(0.7, method=way))
    result = p(weight)
    expected = function_of(weight, lambda s: np.minimum(s, 0.7))
    np.testing.assert_allclose(result, expected, atol=5e-5 * 0.7)
    assert singular_values(result)[0] <= 0.7
    assert jnp.array_equal(p(result), result)


@pytest.mark.parametrize("way", WAYS)
def test_a_cap_far_below_the_norm_is_as_exact(way):
    weight = sample("float32", 5.0, shape=(96, 96))
    result = jit(eqxreg.SpectralCap(1.0, method=way))(weight)
    np.testing.assert_allclose(singular_values(result)[:80], 1.0, rtol=2e-5)


@pytest.mark.parametrize("way", WAYS)
@each_matrix
def test_the_polar_factor_is_orthogonal_and_nearest(name, way):
    weight = MATRICES[name]
    p = compiled(eqxreg.Orthogonal(method=way))
    result = p(weight)
    np.testing.assert_allclose(singular_values(result), 1.0, atol=5e-6)
    assert jnp.array_equal(p(result), result)
    if name in FULL_RANK:
        expected = function_of(weight, np.ones_like)
        np.testing.assert_allclose(result, expected, atol=1e-4)
    else:
        # There are many; each is as far from the weight as the singular values say.
        apart = np.linalg.norm(exact(result) - exact(weight))
        shortest = np.linalg.norm(singular_values(weight) - 1)
        assert apart == pytest.approx(shortest, rel=1e-5)


def test_large_matrices_are_as_exact():
    weight = sample("float32", 1 / 32, shape=(1024, 1024))
    u, s, vh = np.linalg.svd(exact(weight))
    orthogonal = jax.jit(eqxreg.Orthogonal())(weight)
    np.testing.assert_allclose(orthogonal, u @ vh, atol=1e-4)
    gram_matrix = exact(orthogonal).T @ exact(orthogonal)
    assert np.linalg.norm(gram_matrix - np.eye(1024), 2) <= 1e-5
    capped = jax.jit(eqxreg.SpectralCap(1.0))(weight)
    np.testing.assert_allclose(capped, (u * np.minimum(s, 1)) @ vh, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_near_the_set_an_orthogonal_weight_takes_products_only(way):
    near = jnp.asarray(orthogonal(48) + 1e-3, "float32")
    p = compiled(eqxreg.Orthogonal(method=way))
    expected = function_of(near, np.ones_like)
    np.testing.assert_allclose(p(near), expected, atol=2e-6)


AWKWARD = {
    "zero": jnp.zeros((5, 5)),
    "identity": jnp.eye(5),
    "orthogonal": jnp.asarray(orthogonal(5), "float32"),
    "ones": jnp.ones((5, 5)),
    "one row": jnp.zeros((5, 5)).at[1].set(2.0),
}
MAPS = {
    "norm": eqxreg.SpectralNorm(),
    "scale": eqxreg.SpectralScale(),
    "cap": eqxreg.SpectralCap(),
    "cap-products": eqxreg.SpectralCap(0.5, method="products"),
    "orthogonal": eqxreg.Orthogonal(),
    "orthogonal-products": eqxreg.Orthogonal(method="products"),
    "almost": eqxreg.AlmostOrthogonal(),
    "cayley": eqxreg.Cayley(),
    "exp": eqxreg.MatrixExp(),
}


@ft.cache
def mapped(name):
    return jit(lambda weight: MAPS[name](weight))


@pytest.mark.parametrize(
    "name, dtype",
    [*((name, "float32") for name in MAPS), ("cap", "bfloat16"), ("norm", "bfloat16")],
)
def test_awkward_weights_have_finite_values_and_gradients(name, dtype):
    @jit
    def value_and_gradient(weight):
        value, pullback = jax.vjp(MAPS[name], weight)
        return value, pullback(jnp.ones_like(value))[0]

    # One shape, one program.
    for weight in AWKWARD.values():
        value, gradient = value_and_gradient(weight.astype(dtype))
        assert jnp.all(jnp.isfinite(value))
        assert jnp.all(jnp.isfinite(gradient)) and jnp.max(jnp.abs(gradient)) < 1e4


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", list(MAPS))
def test_derivatives_match_finite_differences(name):
    weight = sample("float64", shape=(6, 4), seed=5)
    check_derivatives(MAPS[name], (weight,), eps=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["norm", "cap", "orthogonal", "almost"])
def test_a_wide_weight_is_mapped_as_its_transpose_is(name):
    @jit
    def value_and_gradient(weight, cotangent):
        value, pullback = jax.vjp(MAPS[name], weight)
        return value, pullback(cotangent)[0]

    weight, cotangent = sample("float64", shape=(2, 6, 4), seed=5)
    tall = value_and_gradient(weight, cotangent)
    wide = value_and_gradient(weight.T, cotangent.T)
    np.testing.assert_allclose(wide[0], tall[0].T, atol=1e-10)
    np.testing.assert_allclose(wide[1], tall[1].T, atol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["norm", "cap", "orthogonal"])
def test_complex_derivatives_match_finite_differences(name):
    def parts(real, imag):
        result = MAPS[name](jax.lax.complex(real, imag))
        return result.real, result.imag

    real, imag = (sample("float64", shape=(4, 3), seed=i) for i in range(2))
    check_derivatives(parts, (real, imag), eps=1e-5)


def test_on_the_set_the_derivative_of_the_polar_factor_is_tangential():
    q = jnp.asarray(orthogonal(5)[:, :3], "float32")
    tangent = sample("float32", shape=(5, 3))
    value, change = jax.jvp(eqxreg.Orthogonal(), (q,), (tangent,))
    q64, t64 = exact(q), exact(tangent)
    sym = (q64.T @ t64 + t64.T @ q64) / 2
    assert jnp.array_equal(value, q)
    np.testing.assert_allclose(change, t64 - q64 @ sym, atol=1e-5)


BLOCKWISE = {
    "norm": (eqxreg.SpectralNorm(0.5, blocks=3), lambda s: 0.5 * s / s[0]),
    "scale": (eqxreg.SpectralScale(0.5, blocks=3), lambda s: s * min(1, 0.5 / s[0])),
    "cap": (eqxreg.SpectralCap(0.5, blocks=3), lambda s: np.minimum(s, 0.5)),
    "orthogonal": (eqxreg.Orthogonal(blocks=3), np.ones_like),
}


@pytest.mark.parametrize("name", list(BLOCKWISE))
def test_blocks_are_matrices_of_their_own(name):
    p, fn = BLOCKWISE[name]
    scales = jnp.asarray([0.01, 1.0, 10.0])[:, None, None]
    weight = (sample("float32", shape=(3, 4, 6)) * scales).reshape(12, 6)
    blocks = np.split(np.asarray(jit(p)(weight)), 3)
    for block, raw in zip(blocks, np.split(np.asarray(weight), 3), strict=True):
        np.testing.assert_allclose(block, function_of(raw, fn), atol=1e-5)


@pytest.mark.parametrize("matrix", [1, (0, 2), -1])
def test_any_axes_may_be_the_rows(matrix):
    weight = sample("float32", shape=(4, 3, 5))
    axes = tuple(a % 3 for a in (matrix if isinstance(matrix, tuple) else (matrix,)))
    others = [a for a in range(3) if a not in axes]
    rows = int(np.prod([weight.shape[a] for a in axes]))
    as_matrix = np.transpose(weight, (*axes, *others)).reshape(rows, -1)
    result = eqxreg.Orthogonal(matrix=matrix)(weight)
    result = np.transpose(result, (*axes, *others)).reshape(rows, -1)
    np.testing.assert_allclose(result, function_of(as_matrix, np.ones_like), atol=1e-5)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (25, 25)])
def test_almost_orthogonal_never_stretches_and_keeps_orthogonal_weights(shape):
    p = jax.jit(eqxreg.AlmostOrthogonal())
    for scale in (1e-20, 1.0, 1e20):
        assert singular_values(p(sample("float32", scale, shape)))[0] <= 1
    u = orthogonal(30)[: shape[0], : shape[1]] if min(shape) == 20 else orthogonal(25)
    q = eqxreg.Orthogonal()(jnp.asarray(u, "float32"))
    result = p(q)
    np.testing.assert_allclose(result, q, atol=2e-5 if min(shape) == 20 else 5e-6)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_almost_orthogonal_inverts(shape):
    p = eqxreg.AlmostOrthogonal()
    weight = p(sample("float32", shape=shape))
    np.testing.assert_allclose(p(p.inverse(weight)), weight, atol=1e-5)
    # Of any other weight, a multiple stays.
    other = sample("float32", shape=shape, seed=1)
    ratio = p(p.inverse(other)) / other
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-3)


CHARTS = {"cayley": eqxreg.Cayley(), "exp": eqxreg.MatrixExp()}
each_chart = pytest.mark.parametrize("p", CHARTS.values(), ids=CHARTS.keys())


@each_chart
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (7, 1)])
def test_charts_give_orthogonal_weights_and_invert(p, shape):
    there, back = jit(lambda raw: p(raw)), jit(lambda weight: p.inverse(weight))
    weight = there(sample("float32", 0.4, shape))
    np.testing.assert_allclose(singular_values(weight), 1.0, atol=2e-6)
    np.testing.assert_allclose(there(back(weight)), weight, atol=1e-3)


@each_chart
@pytest.mark.parametrize("sign", [1, -1])
def test_charts_keep_a_weight_of_either_determinant(p, sign):
    q = orthogonal(6)
    q[0] *= sign * np.sign(np.linalg.det(q))
    linear = eqx.nn.Linear(6, 6, use_bias=False, key=jax.random.key(0))
    linear = eqx.tree_at(lambda layer: layer.weight, linear, jnp.asarray(q, "float32"))
    wrapped = eqxreg.Constraint(linear, "weight", p)
    assert jnp.array_equal(wrapped.weight, jnp.zeros((6, 6)))
    np.testing.assert_allclose(eqxreg.bake(wrapped).weight, q, atol=1e-6)


@each_chart
def test_charts_start_from_the_nearest_orthogonal_weight_and_train(p):
    linear = eqx.nn.Linear(4, 6, key=jax.random.key(0))
    wrapped = eqxreg.Constraint(linear, "weight", p)
    nearest = function_of(linear.weight, np.ones_like)
    np.testing.assert_allclose(eqxreg.bake(wrapped).weight, nearest, atol=1e-5)
    target = jnp.asarray(orthogonal(6, 3)[:, :4], "float32")
    optimiser = optax.sgd(0.2)
    chosen = eqxreg.trainable(wrapped)
    assert len(eqxreg.trainables(wrapped)) == 2  # raw weight and bias; not the base

    @filter_jit
    def step(model, state):
        params, static = eqx.partition(model, chosen)
        distance = lambda params: jnp.sum(
            (eqxreg.bake(eqx.combine(params, static)).weight - target) ** 2
        )
        value, grads = jax.value_and_grad(distance)(params)
        updates, state = optimiser.update(grads, state)
        return eqx.combine(eqx.apply_updates(params, updates), static), state, value

    state = optimiser.init(eqx.filter(wrapped, chosen))
    values = []
    for _ in range(60):
        wrapped, state, value = step(wrapped, state)
        values.append(float(value))
    assert values[-1] < 0.2 * values[0]
    weight = eqxreg.bake(wrapped).weight
    np.testing.assert_allclose(singular_values(weight), 1.0, atol=2e-6)


@each_chart
def test_a_weight_out_of_reach_of_a_chart_has_no_inverse(p):
    message = "needs an orthogonal weight that is not opposite"
    with pytest.raises(ValueError, match=message):
        p.inverse(2 * jnp.eye(3))
    with pytest.raises(ValueError, match=message):
        p.inverse(jnp.diag(jnp.asarray([1.0, 1.0, -1.0])))


ERRORS = [
    (lambda: eqxreg.SpectralNorm(0.0), "`norm` must be positive"),
    (lambda: eqxreg.SpectralCap(-1.0), "`cap` must be positive"),
    (lambda: eqxreg.SpectralScale(jnp.nan), "`cap` must be positive"),
    (lambda: eqxreg.Orthogonal(blocks=0), "`blocks` must be a positive int"),
    (lambda: eqxreg.Orthogonal(matrix="rows"), "`matrix` says which axes"),
    (lambda: eqxreg.Orthogonal(blocks=4)(jnp.ones((6, 2))), "must divide the 6 rows"),
    (lambda: eqxreg.SpectralCap()(jnp.ones(3)), "rank 2 or more"),
    (lambda: eqxreg.spectral_norm(jnp.ones(3)), "rank 2 or more"),
]


@pytest.mark.parametrize("build, message", ERRORS, ids=[e[1] for e in ERRORS])
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# In the optimiser.


def final_weights(optimiser, steps=30, learning_rate_scale=1.0):
    """Largest singular values of two layers after each step of noisy training."""
    params = {
        "weight": sample("float32", 0.3, (12, 8)),
        "second": {"weight": sample("float32", 0.3, (8, 12), seed=1)},
    }
    state = optimiser.init(params)

    @jit
    def step(params, state, key):
        keys = jax.random.split(key)
        grads = {
            "weight": jax.random.normal(keys[0], (12, 8)),
            "second": {"weight": jax.random.normal(keys[1], (8, 12))},
        }
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    values = []
    for i in range(steps):
        params, state = step(params, state, jax.random.key(i))
        values.append([singular_values(w)[0] for w in jax.tree.leaves(params)])
    return np.asarray(values), state


OPTIMISERS = {"adam": lambda: optax.adam(0.1), "muon": lambda: optax.contrib.muon(0.1)}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", list(OPTIMISERS))
@pytest.mark.parametrize(
    "p, slack", [(eqxreg.SpectralCap(0.7), 1e-6), (eqxreg.SpectralScale(0.7), 1e-3)]
)
def test_projection_after_the_update_bounds_the_spectrum(p, slack, name):
    chain = optax.chain(OPTIMISERS[name](), eqxreg.project(p, every=3))
    values, state = final_weights(chain)
    assert np.all(values[2::3] <= 0.7 * (1 + slack))
    # In between it is training that decides: the constraint is what keeps it small.
    assert np.any(values[3::3] > 0.71)
    carried = state[-1].carried
    assert [s.shape for s in jax.tree.leaves(carried)] == [(1, 12), (1, 8)]


@pytest.mark.usefixtures("standard_promotion")
def test_the_optimiser_keeps_the_vectors_to_start_from():
    p = eqxreg.Chain(eqxreg.SpectralScale(0.7), eqxreg.MaxNorm(3.0))
    weight = sample("float32", shape=(12, 8))
    transform = eqxreg.project(p)
    state = transform.init({"weight": weight})
    _, _, vh = np.linalg.svd(exact(weight))
    [start] = jax.tree.leaves(state.carried)
    assert abs(exact(start)[0] @ vh[0]) == pytest.approx(1.0, abs=1e-4)
    other = sample("float32", shape=(12, 8), seed=7)
    update = jit(transform.update)
    for _ in range(5):
        updates, state = update({"weight": other - weight}, state, {"weight": weight})
    _, _, vh = np.linalg.svd(exact(other))
    [start] = jax.tree.leaves(state.carried)
    assert abs(exact(start)[0] @ vh[0]) == pytest.approx(1.0, abs=1e-4)


def test_a_cap_that_is_well_inside_is_seen_without_a_factorisation():
    transform = eqxreg.project(eqxreg.SpectralCap(0.7))
    params = {"weight": jnp.zeros((64, 48))}
    state = transform.init(params)
    text = jit(transform.update).lower(params, state, params).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert "conditional" in entry
    assert "syevd" not in entry and "syevd" in text


@pytest.mark.usefixtures("standard_promotion")
def test_seeds_under_vmap_are_a_loop():
    p = eqxreg.SpectralScale(0.7)
    transform = eqxreg.project(p, every=2)
    weights = jnp.stack([sample("float32", shape=(6, 4), seed=i) for i in range(3)])
    params, zero = {"weight": weights}, {"weight": jnp.zeros_like(weights)}
    states = jax.vmap(transform.init)(params)
    for _ in range(2):
        updates, states = jit(jax.vmap(transform.update))(zero, states, params)
    result = weights + updates["weight"]
    alone = jit(lambda weight: p(weight))
    expected = jnp.stack([alone(weight) for weight in weights])
    assert_close(list(result), list(expected))


def test_a_stack_of_layers_is_projected_one_by_one():
    layers = eqx.filter_vmap(lambda k: eqx.nn.Linear(4, 6, key=k))(
        jax.random.split(jax.random.key(0), 3)
    )
    params = eqx.filter(layers, eqx.is_inexact_array)
    transform = eqxreg.project(eqxreg.SpectralNorm(0.5))
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jit(transform.update)(zero, transform.init(params), params)
    weights = optax.apply_updates(params, updates).weight
    tops = [singular_values(weight)[0] for weight in weights]
    np.testing.assert_allclose(tops, 0.5, rtol=1e-5)


@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
@pytest.mark.parametrize("spec", [("a", None), ("a", "b")], ids=str)
def test_warm_starts_of_a_sharded_weight_gather_nothing(spec, axes):
    types = (getattr(AxisType, axes),) * 2
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=types)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    transform = eqxreg.project(eqxreg.SpectralScale(0.7))
    weight = sample("float32", shape=(64, 32))
    params = {"weight": jax.device_put(weight, sharding)}
    state = transform.init(params)
    zero = jax.tree.map(jnp.zeros_like, params)
    compiled = jit(transform.update).lower(zero, state, params).compile()
    text = compiled.as_text()
    assert "all-to-all" not in text
    # With explicit axes the vectors to start from are kept whole; no weight is.
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather", text)
    assert all(math.prod(map(int, dims.split(","))) <= 64 for dims in gathered)
    updates, _ = compiled(zero, state, params)
    result = np.asarray(updates["weight"]) + np.asarray(weight)
    expected = jit(eqxreg.SpectralScale(0.7))(weight)
    assert_close(result, expected)


@pytest.mark.parametrize("name", ["cap", "orthogonal", "almost", "cayley"])
def test_maps_of_matrices_keep_the_layout_of_a_sharded_weight(name):
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    sharding = NamedSharding(mesh, PartitionSpec("a", "b"))
    weight = sample("float32", 0.1, shape=(64, 32))
    total = lambda weight: jnp.sum(MAPS[name](weight) ** 3)
    gradient = jit(jax.grad(total))(jax.device_put(weight, sharding))
    assert gradient.sharding.spec == sharding.spec
    expected = jit(jax.grad(total))(weight)
    assert_close(gradient, expected)
