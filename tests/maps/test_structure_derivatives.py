"""Derivatives of the maps of structured weights, also where values meet or vanish; NaNs
and infinities; and JAX's transformations."""

import functools as ft

import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from quick import check_derivatives, jit
from structures import (
    DECOMPOSED,
    LOW_RANK,
    MAPS,
    SEMIDEFINITE,
    SHAPE,
    SKEW,
    SYMMETRIC,
    Case,
    adjoint,
    applied,
    derivatives,
    each_decomposed,
    each_map,
    eye,
    integers,
    seen,
)
from tables import assert_close, exact, sample


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "case",
    [
        Case(SYMMETRIC, "pair", "float64"),
        Case(SKEW, "blocks", "float64"),
        Case(SEMIDEFINITE, "blocks", "float64"),
        Case(LOW_RANK, "tall", "float64"),
        Case(LOW_RANK, "wide blocks", "float64"),
    ],
    ids=str,
)
def test_derivatives_match_finite_differences(case):
    p, weight = case.map, case.sample(seed=5)
    check_derivatives(p, (weight,), eps=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["skew", "semidefinite", "low rank"])
def test_complex_derivatives_match_finite_differences(name):
    def parts(real, imag):
        result = MAPS[name](jax.lax.complex(real, imag))
        return result.real, result.imag

    real, imag = (sample("float64", shape=SHAPE, seed=i) for i in range(2))
    check_derivatives(parts, (real, imag), eps=1e-5)


@pytest.mark.usefixtures("x64")
@each_decomposed
def test_the_gradient_of_the_distance_matches_finite_differences(p):
    weight = sample("float64", shape=SHAPE, seed=6)
    check_derivatives(p.distance, (weight,), eps=1e-5)


@each_decomposed
def test_the_gradient_of_the_distance_is_zero_on_the_set(p):
    gradient = jax.jit(jax.grad(lambda weight: p.distance(weight)))
    for weight in (applied(p, sample("float32", shape=SHAPE)), jnp.zeros(SHAPE)):
        assert jnp.array_equal(gradient(weight), jnp.zeros(SHAPE))


@pytest.mark.parametrize("rank", [0, 1, 2, 9])
def test_among_semidefinite_weights_the_derivative_is_the_symmetric_part(rank):
    tangent = sample("float32", shape=SHAPE)
    weight = integers("float32", rank)
    expected = applied(MAPS["symmetric"], tangent)
    for change in derivatives(MAPS["semidefinite"], weight, tangent):
        assert jnp.array_equal(change, expected)


@pytest.mark.parametrize(
    "dtype, shape", [("float32", (8, 4)), ("float32", (4, 7)), ("complex64", (5, 5))]
)
def test_among_weights_of_low_rank_the_derivative_is_tangential(dtype, shape):
    p = eqxreg.LowRank(2)
    weight = applied(p, sample(dtype, shape=shape))
    tangent = sample(dtype, shape=shape, seed=1)
    u, _, vh = np.linalg.svd(exact(weight), full_matrices=False)
    left = np.eye(shape[0]) - u[:, :2] @ adjoint(u[:, :2])
    right = np.eye(shape[1]) - adjoint(vh[:2]) @ vh[:2]
    change, _ = derivatives(p, weight, tangent)
    # JAX transposes without conjugation.
    _, transposed = derivatives(p, weight, jnp.conj(tangent))
    expected = exact(tangent) - left @ exact(tangent) @ right
    assert_close(change, expected)
    assert_close(jnp.conj(transposed), expected)


AWKWARD = {
    "zero": lambda dtype: jnp.zeros(SHAPE, dtype),
    "identity": eye,
    "minus identity": lambda dtype: -eye(dtype),
    "ties of both signs": lambda dtype: eye(dtype).at[0, 0].set(-1),
    "nearly ties": lambda dtype: eye(dtype).at[0, 0].set(1 + 1e-6),
    "orthogonal": lambda dtype: jnp.linalg.qr(sample("float32", shape=SHAPE))[0].astype(
        dtype
    ),
    "of rank one": lambda dtype: jnp.ones(SHAPE, dtype),
    "tiny": lambda dtype: jnp.full(SHAPE, 1e-37, dtype),
}


@pytest.mark.parametrize("name", list(AWKWARD))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("map", list(DECOMPOSED))
def test_derivatives_are_finite_where_values_meet_or_vanish(map, dtype, name):
    tangent = sample(dtype, shape=SHAPE)
    size = np.linalg.norm(exact(tangent))
    for change in derivatives(MAPS[map], AWKWARD[name](dtype), tangent):
        assert np.all(np.isfinite(exact(change)))
        # What is orthogonal in a wider dtype, or as a whole, has values that are close
        # to each other but not equal.
        if name != "orthogonal" or (map, dtype) == ("low rank", "float32"):
            assert np.linalg.norm(exact(change)) <= 1.01 * size


def test_at_a_tie_what_mixes_kept_and_dropped_is_half_kept():
    tangent = jnp.asarray([[0.0, 1.0], [1.0, 0.0]])
    for change in derivatives(eqxreg.LowRank(1), jnp.eye(2), tangent):
        np.testing.assert_allclose(change, tangent / 2, atol=1e-6)


@each_decomposed
def test_half_precision_derivatives_are_those_of_single_precision(p):
    weight, tangent = (sample("bfloat16", shape=SHAPE, seed=i) for i in range(2))
    wide = derivatives(p, weight.astype("float32"), tangent.astype("float32"))
    for change, expected in zip(derivatives(p, weight, tangent), wide, strict=True):
        assert change.dtype == jnp.bfloat16
        assert_close(change, expected, 1e-2)


# NaNs and infinities.


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@each_map
def test_nan_and_infinity_stay_visible(p, bad):
    for at in ((0, 0), (2, 1), (1, 2)):
        weight = sample("float32", shape=SHAPE).at[at].set(bad)
        value, contained, _ = seen(p, weight)
        assert not jnp.all(jnp.isfinite(value))
        assert not contained


@pytest.mark.parametrize("name", ["symmetric", "skew", "semidefinite"])
def test_a_nan_does_not_disturb_other_blocks(name):
    weight = sample("float32", shape=SHAPE)
    result = applied(MAPS[name], weight.at[0, 1].set(jnp.nan))
    np.testing.assert_array_equal(result[4:], applied(MAPS[name], weight)[4:])


# Transformations.


def value_and_gradient(p):
    def both(weight):
        gradient = jax.grad(lambda weight: jnp.sum(p(weight) ** 3))(weight)
        return p(weight), gradient

    return both


@each_decomposed
def test_vmap_is_a_loop(p):
    both = value_and_gradient(p)
    one = jit(both)
    stack = jnp.stack([sample("float32", shape=SHAPE, seed=i) for i in range(2)])
    # Of sizes so different that a common scale would lose the first.
    stack = stack * jnp.asarray([1.0, 2.0**60])[:, None, None]
    values, gradients = jit(jax.vmap(both))(stack)
    for i, weight in enumerate(stack):
        value, gradient = one(weight)
        assert_close(values[i], value)
        assert_close(gradients[i], gradient, 1e-4)


@each_decomposed
def test_no_nans_arise_and_no_tracer_leaks(p):
    both = jit(value_and_gradient(p))
    with jax.debug_nans(True), jax.checking_leaks():
        for weight in (sample("float32", shape=SHAPE), jnp.zeros(SHAPE)):
            both(weight)


@pytest.mark.usefixtures("x64")
@each_map
def test_64_bit_mode_changes_no_dtype(p):
    for dtype in ("bfloat16", "float32", "float64", "complex64"):
        weight = sample(dtype, shape=SHAPE)
        assert jax.eval_shape(p, weight).dtype == dtype
        for change in jax.eval_shape(ft.partial(derivatives, p), weight, weight):
            assert change.dtype == dtype


@each_map
def test_the_gradient_exports_to_every_platform(p):
    platforms = ("cpu", "cuda", "rocm", "tpu")
    for dtype in (jnp.float32, jnp.bfloat16):
        weight = jax.ShapeDtypeStruct(SHAPE, dtype)
        both = jax.jit(value_and_gradient(p))
        exported = export.export(both, platforms=platforms)(weight)
        assert exported.platforms == platforms
