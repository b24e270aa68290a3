"""The numerical promises of the maps, measured in double precision."""

import functools as ft

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import (
    BOXES,
    DTYPES,
    MAX_NORMS,
    OPEN,
    PROJECTIONS,
    SHORT,
    each_kind,
    exact,
    sample,
    scales,
)


@ft.cache
def compiled(case):
    return jax.jit(lambda weight: case.map(weight))


@ft.cache
def membership(case):
    p = case.map
    return jax.jit(lambda weight: (p.contains(weight), p.distance(weight)))


@eqx.filter_jit
def value_and_pullback(p, weight, cotangent):
    value, pullback = jax.vjp(p, weight)
    return value, pullback(cotangent)[0]


def rows(table, dtypes=DTYPES):
    return [(case, dtype) for case in table for dtype in dtypes if case.takes(dtype)]


def row_id(row):
    return "-".join(map(str, row))


# Of the scope of the module, so that what was compiled for one test serves the next.
@pytest.fixture(scope="module", params=rows(PROJECTIONS), ids=row_id)
def row(request):
    return request.param


def test_a_result_is_in_the_set_and_not_further_inside_than_rounding(row):
    case, dtype = row
    short = SHORT[dtype]
    for scale in scales(dtype):
        weight = sample(dtype, scale)
        result = compiled(case)(weight)
        before, after = case.measure(exact(weight)), case.measure(exact(result))
        assert result.shape == weight.shape and result.dtype == weight.dtype
        assert np.all(after <= case.high), scale
        if np.isfinite(case.high):
            lowest = case.high - short * abs(case.high)
            assert np.all(after[before > case.high] >= lowest), scale
        if case.low is not None:
            assert np.all(after >= case.low - short * abs(case.low)), scale


def test_twice_is_once_bit_for_bit(row):
    case, dtype = row
    for scale in scales(dtype):
        once = compiled(case)(sample(dtype, scale))
        assert jnp.array_equal(compiled(case)(once), once), scale


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", PROJECTIONS, ids=str)
def test_a_result_is_contained_at_no_distance(case, dtype):
    once = compiled(case)(sample(dtype, 3.0))
    contained, distance = membership(case)(once)
    assert contained and distance == 0


@pytest.mark.parametrize(
    "case, dtype", rows(MAX_NORMS + BOXES, ("bfloat16", "float32")), ids=str
)
def test_inside_the_map_and_its_gradient_are_the_identity(case, dtype):
    weight = sample(dtype)
    if case.name in ("min_max",):
        # Units of norm 0.5, between the bounds.
        size = case.measure(exact(weight))[:, None, None]
        weight = jnp.asarray(exact(weight) / size * 0.5, weight.dtype)
    elif case.real_only:
        weight = jnp.abs(weight) * jnp.asarray(1e-2, dtype)
    else:
        weight = weight * jnp.asarray(1e-3, weight.dtype)
    cotangent = sample(dtype, seed=1)
    value, gradient = value_and_pullback(case.map, weight, cotangent)
    assert jnp.array_equal(value, weight)
    assert jnp.array_equal(gradient, cotangent)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_boundary_is_inside(dtype):
    weight = jnp.asarray([[3.0, 4.0], [0.0, 5.0]], dtype)
    p = eqxreg.MaxNorm(5.0, axis="unit")
    value, pullback = jax.vjp(p, weight)
    assert jnp.array_equal(value, weight)
    assert jnp.array_equal(pullback(weight)[0], weight)


def nearest_in_ball(weight, bound):
    return weight * min(1.0, bound / np.sqrt((np.abs(weight) ** 2).sum()))


def nearest_in_l1_ball(weight, bound):
    """By bisection on the threshold, in double precision."""
    size = np.abs(weight)
    if size.sum() <= bound:
        return weight
    low, high = 0.0, size.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if np.maximum(size - middle, 0).sum() > bound
            else (low, middle)
        )
    return np.where(size > 0, weight / np.maximum(size, 1e-300), 0) * np.maximum(
        size - high, 0
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ord, oracle", [(2, nearest_in_ball), (1, nearest_in_l1_ball)])
def test_max_norm_is_the_nearest_point_of_the_ball(ord, oracle, dtype):
    weight = sample(dtype, 3.0)
    result = exact(eqxreg.MaxNorm(2.0, axis="unit", ord=ord)(weight))
    for row, expected in zip(result, exact(weight), strict=True):
        np.testing.assert_allclose(
            row, oracle(expected, 2.0), atol=2 * 2 * SHORT[dtype]
        )


def test_simplex_is_the_nearest_point_and_sparse():
    weight = exact(sample("float32", 1.0, (7, 50)))
    result = exact(eqxreg.Simplex(1.0)(jnp.asarray(weight, jnp.float32)))
    for row, raw in zip(result, weight, strict=True):
        # The optimality conditions: one threshold for all that are positive, and none
        # above it among the others.
        gap = (raw - row)[row > 0]
        rounding = 1e-5 * np.abs(raw).max()
        np.testing.assert_allclose(gap, gap[0], rtol=0, atol=rounding)
        assert np.all(raw[row == 0] <= gap[0] + rounding)
        assert 0 < (row == 0).sum()


def test_projection_onto_the_l1_ball_does_not_cancel_in_large_weights():
    weight = jnp.asarray([[1e25, 1e25, -1e25, 1.0]], jnp.float32)
    result = eqxreg.MaxNorm(3.0, axis="unit", ord=1)(weight)
    np.testing.assert_allclose(result, [[1.0, 1.0, -1.0, 0.0]], rtol=1e-5)


@pytest.mark.parametrize("scale", [1e25, 1e-25, 1e36, 1e-33])
@pytest.mark.parametrize("axis", [None, "unit"])
def test_norms_neither_overflow_nor_underflow(axis, scale):
    weight = sample("float32", scale)
    result = exact(eqxreg.UnitNorm(1.0, axis)(weight))
    whole = exact(weight) / scale
    axes = (0, 1, 2) if axis is None else (1, 2)
    expected = whole / np.sqrt((whole**2).sum(axes, keepdims=True))
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_a_slice_in_range_is_not_disturbed_by_one_that_is_not():
    weight = jnp.asarray([[3e25, 4e25], [3.0, 4.0], [3e-25, 4e-25], [0.0, 0.0]])
    result = eqxreg.UnitNorm(axis="unit")(weight)
    expected = [[0.6, 0.8], [0.6, 0.8], [0.6, 0.8], [0.0, 0.0]]
    np.testing.assert_allclose(result, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", list(each_kind()))
def test_values_and_gradients_are_finite_at_zero(name, dtype):
    weight = jnp.zeros((6, 5, 4), dtype)
    value, gradient = value_and_pullback(each_kind()[name], weight, weight + 1)
    assert jnp.all(jnp.isfinite(value))
    assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("ord", [1, 2, jnp.inf])
def test_complex_gradients_are_finite_at_zero(ord):
    weight = jnp.zeros((3, 4), "complex64")
    _, pullback = jax.vjp(eqxreg.MaxNorm(1.0, "unit", ord), weight)
    assert jnp.all(jnp.isfinite(pullback(jnp.ones_like(weight))[0]))


@pytest.mark.parametrize("axis", [None, "unit"])
@pytest.mark.parametrize("build", [eqxreg.UnitNorm, ft.partial(eqxreg.MinMaxNorm, 0.1)])
def test_a_zero_vector_stays_and_its_gradient_is_the_identity(build, axis):
    weight = jnp.zeros((3, 4))
    value, pullback = jax.vjp(build(1.0, axis=axis), weight)
    cotangent = sample("float32", shape=(3, 4))
    assert jnp.array_equal(value, weight)
    assert jnp.array_equal(pullback(cotangent)[0], cotangent)


def test_a_zero_vector_is_not_on_the_sphere():
    assert not eqxreg.UnitNorm(axis="unit").contains(jnp.zeros((2, 3)))
    assert not eqxreg.MinMaxNorm(0.5, 1.0).contains(jnp.zeros((2, 3)))
    assert eqxreg.MaxNorm(0.5).contains(jnp.zeros((2, 3)))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("case", PROJECTIONS, ids=str)
def test_nan_and_infinity_stay_visible(case, bad):
    weight = sample("float32").at[2, 1, 1].set(bad)
    result = compiled(case)(weight)
    assert not jnp.all(jnp.isfinite(result[2]))
    assert not membership(case)(weight)[0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", list(OPEN))
def test_open_maps_stay_inside_and_invert(name, dtype):
    p = OPEN[name]
    low, high = (-0.3, 0.7) if name.startswith("interval") else (0.0, np.inf)
    extreme = jnp.asarray([[-1e4, 1e4], [-30.0, 30.0]], dtype)
    with np.errstate(over="ignore"):
        result = exact(p(extreme if "exp" not in name else jnp.minimum(extreme, 9)))
    assert np.all(result > low) and np.all(result < high)
    weight = jnp.asarray([[0.01, 0.1], [0.3, 0.6]], dtype)
    np.testing.assert_allclose(
        exact(p(p.inverse(weight))), exact(weight), rtol=4 * SHORT[dtype]
    )


@pytest.mark.parametrize("case", PROJECTIONS, ids=str)
def test_the_inverse_of_a_projection_is_the_identity(case):
    weight = sample("float32")
    assert case.map.inverse(weight) is weight


def test_partial_rate_moves_part_of_the_way():
    weight = jnp.asarray([[3.0, 4.0], [0.06, 0.08], [0.3, 0.4]])
    result = eqxreg.MinMaxNorm(0.2, 1.0, rate=0.25, axis="unit")(weight)
    # Norms 5, 0.1, 0.5 go a quarter of the way to 1, 0.2, 0.5.
    factors = jnp.asarray([[4.0 / 5.0], [0.125 / 0.1], [1.0]])
    expected = exact(weight) * exact(factors)
    np.testing.assert_allclose(result, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_distance_has_the_dtype_of_the_weight(dtype):
    weight = sample(dtype, 3.0)
    distance = eqxreg.MaxNorm(1.0, axis="unit").distance(weight)
    rows = exact(weight)
    norms = np.sqrt((rows**2).sum((1, 2)))
    expected = np.sqrt((np.maximum(norms - 1.0, 0) ** 2).sum())
    assert distance.dtype == weight.dtype
    np.testing.assert_allclose(exact(distance), expected, rtol=SHORT[dtype])


def test_the_gradient_of_the_distance_is_zero_on_the_set():
    p = eqxreg.MaxNorm(1.0, axis="unit")
    for weight in (jnp.zeros((2, 3)), p(sample("float32"))):
        assert jnp.array_equal(jax.grad(p.distance)(weight), jnp.zeros_like(weight))


def test_an_array_bound_and_a_number_agree():
    weight = sample("float32")
    for build in (eqxreg.MaxNorm, eqxreg.UnitNorm, eqxreg.Simplex):
        number, array = build(0.7), build(jnp.asarray(0.7))
        np.testing.assert_allclose(number(weight), array(weight), rtol=1e-6)


def test_a_bound_that_no_float_holds_is_rounded_to_the_inside():
    # float32(0.1) is more than 0.1.
    result = eqxreg.MaxNorm(0.1, ord=jnp.inf)(jnp.asarray([5.0, -5.0]))
    assert np.all(np.abs(exact(result)) <= 0.1)
    assert np.all(exact(eqxreg.Box(0.1, 1.0)(jnp.zeros(3))) >= 0.1)


def test_spheres_differentiate_tangentially_on_the_sphere_too():
    p = eqxreg.UnitNorm()
    weight = jnp.asarray([0.6, 0.8])
    value, pullback = jax.vjp(p, weight)
    assert jnp.array_equal(value, weight)
    np.testing.assert_allclose(pullback(weight)[0], [0.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_open_maps_never_reach_a_bound_that_is_zero(dtype):
    raw = jnp.asarray([-200.0, 200.0], dtype)
    assert jnp.all(eqxreg.Interval(0.0, 1.0)(raw) > 0)
    assert jnp.all(eqxreg.Interval(-1.0, 0.0)(raw) < 0)
    assert jnp.all(eqxreg.Positive()(raw) > 0)


@pytest.mark.parametrize("p", OPEN.values(), ids=OPEN.keys())
def test_infinity_stays_visible_in_open_maps(p):
    assert not jnp.all(jnp.isfinite(p(jnp.asarray([jnp.inf, 0.0]))))


def test_bounds_that_a_dtype_cannot_hold_are_its_largest_number():
    weight = jnp.asarray([-6e4, 6e4], "float16")
    for p in (eqxreg.Box(-1e6, 1e6), eqxreg.MaxNorm(1e6, ord=jnp.inf)):
        assert jnp.array_equal(p(weight), weight)
    raw = jnp.asarray([-20.0, 0.0, 20.0], "float16")
    assert jnp.all(jnp.isfinite(eqxreg.Interval(-1e6, 1e6)(raw)))
    assert jnp.all(jnp.isfinite(eqxreg.Interval(-3e38, 3e38)(raw.astype("float32"))))


@pytest.mark.parametrize("axis", [np.int64(1), [1], (np.int64(-1),)])
def test_axes_come_in_many_forms(axis):
    weight = sample("float32", shape=(3, 4))
    expected = eqxreg.MaxNorm(0.7, axis="unit")(weight)
    assert jnp.array_equal(eqxreg.MaxNorm(0.7, axis=axis)(weight), expected)
