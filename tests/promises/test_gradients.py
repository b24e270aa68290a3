"""Derivatives against finite differences, in double precision."""

import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from tables import assert_close, each_kind, sample


pytestmark = pytest.mark.usefixtures("quick_compilation")


def generic(p: eqxreg.Parametrization, seed: int) -> jax.Array:
    """A weight with slices inside and outside, near no kink of `p`."""
    weight = sample("float64", 1.0, seed=seed)
    return weight * jnp.asarray([0.05, 0.1, 0.2, 1.0, 3.0, 9.0])[:, None, None]


# The maps of matrices have their own tests, by kind of matrix.
ELSEWHERE = ("spectral", "orthogonal", "cayley", "low_rank", "straight_through")
FIRST = {
    n: p for n, p in each_kind().items() if not any(part in n for part in ELSEWHERE)
}
SECOND = ("max_norm-unit-2", "unit_norm-unit", "simplex", "interval", "weight_norm")


def differentiable(p):
    # `check_grads` passes arrays of numpy; compiled functions take them.
    return jax.jit(lambda weight: p(weight))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", list(FIRST))
def test_derivatives_match_finite_differences(name):
    p = FIRST[name]
    weight = generic(p, seed=3)
    order = 2 if name in SECOND else 1
    modes = ("fwd", "rev")
    check_grads(differentiable(p), (weight,), order=order, modes=modes, eps=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("ord", [1, 2, jnp.inf])
def test_complex_derivatives_match_finite_differences(ord):
    p = eqxreg.MaxNorm(0.7, axis="unit", ord=ord)

    def parts(real, imag):
        result = p(jax.lax.complex(real, imag))
        return result.real, result.imag

    real, imag = (sample("float64", shape=(3, 4), seed=i) for i in range(2))
    check_grads(jax.jit(parts), (real, imag), order=1, modes=("fwd", "rev"), eps=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "p",
    [
        eqxreg.MaxNorm(0.7, axis="unit"),
        eqxreg.MaxNorm(0.7, ord=1),
        eqxreg.UnitNorm(0.7, axis="unit"),
        eqxreg.Simplex(),
        eqxreg.NonNegative(),
    ],
    ids=repr,
)
def test_the_gradient_of_the_distance_matches_finite_differences(p):
    weight = generic(p, seed=4)
    check_grads(
        jax.jit(lambda w: p.distance(w)),
        (weight,),
        order=1,
        modes=("fwd", "rev"),
        eps=1e-5,
    )


def test_straight_through_has_the_identity_for_a_derivative():
    weight = sample("float32", 3.0)
    p = eqxreg.StraightThrough(eqxreg.NonNegative())
    value, pullback = jax.vjp(p, weight)
    cotangent = sample("float32", seed=1)
    assert jnp.array_equal(value, jnp.maximum(weight, 0))
    assert jnp.array_equal(pullback(cotangent)[0], cotangent)


@pytest.mark.parametrize("build", [eqxreg.MaxNorm, eqxreg.UnitNorm, eqxreg.Simplex])
def test_bounds_are_never_trained(build):
    weight = sample("float32", 3.0)
    gradient = jax.grad(lambda bound: jnp.sum(build(bound)(weight) ** 2))
    assert gradient(jnp.asarray(0.7)) == 0


@pytest.mark.parametrize("exponent", [83, -83])
def test_derivatives_are_right_at_the_ends_of_the_range(exponent):
    # Weights of about 1e25 or 1e-25. The derivative of w / |w| at s w is that at w,
    # over s; powers of two lose nothing.
    p, scale = eqxreg.UnitNorm(axis="unit"), 2.0**exponent
    weight, tangent = sample("float32", shape=(3, 4)), sample("float32", 1.0, (3, 4), 1)
    _, expected = jax.jvp(p, (weight,), (tangent,))
    _, forward = jax.jvp(p, (weight * scale,), (tangent,))
    [backward] = jax.vjp(p, weight * scale)[1](tangent)
    # At a point of a sphere this derivative is symmetric.
    assert_close(forward * scale, expected)
    assert_close(backward * scale, expected)


@pytest.mark.parametrize("p", [eqxreg.MaxNorm(1.0), eqxreg.UnitNorm(1.0)], ids=repr)
def test_a_distance_is_not_straight_through(p):
    weight = jnp.asarray([3.0, 4.0])
    for through in (
        eqxreg.StraightThrough(p),
        eqxreg.Chain(eqxreg.NonNegative(), eqxreg.StraightThrough(p)),
    ):
        penalty = lambda w, p=through: eqxreg.distance_penalty({"weight": w}, p, 1.0)
        for distance in (penalty, through.distance):
            np.testing.assert_allclose(jax.grad(distance)(weight), [0.6, 0.8], 1e-5)
