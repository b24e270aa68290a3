"""Symmetric, semidefinite and low-rank weights, against numpy in double precision; in
layers and models; and the errors."""

import functools as ft

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import filter_jit
from structures import (
    DECOMPOSED,
    LOW_RANK,
    MAPS,
    MASK,
    NEAREST,
    SEMIDEFINITE,
    SHAPE,
    SKEW,
    SYMMETRIC,
    Case,
    adjoint,
    applied,
    each_decomposed,
    eye,
    integers,
    nearest_of_rank,
    nearest_semidefinite,
    seen,
)
from tables import DTYPES, SHORT, assert_close, exact, sample, scales


CASES = [
    *(Case(SYMMETRIC, name) for name in ("one by one", "kernel", "pair", "last")),
    *(Case(SEMIDEFINITE, name) for name in ("one by one", "kernel", "pair", "last")),
    *(Case(LOW_RANK, name) for name in ("one by one", "last", "wide", "wide blocks")),
    *(
        Case(build, "blocks", dtype)
        for build in (SYMMETRIC, SKEW, SEMIDEFINITE)
        for dtype in DTYPES
    ),
    *(Case(LOW_RANK, "tall", dtype) for dtype in DTYPES),
]


# Of the scope of the module, so that what was compiled for one test serves the next.
@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request):
    return request.param


def test_the_result_is_the_nearest_point_of_the_set(case):
    for scale in scales(case.dtype):
        weight = case.sample(scale)
        result = applied(case.map, weight)
        matrices = case.matrices(weight) / scale
        expected = NEAREST[case.build](matrices)
        assert result.shape == weight.shape and result.dtype == weight.dtype
        atol = SHORT[case.dtype] * np.abs(matrices).max()
        np.testing.assert_allclose(case.matrices(result) / scale, expected, atol=atol)


def test_twice_is_once_bit_for_bit(case):
    for scale in scales(case.dtype):
        once = applied(case.map, case.sample(scale))
        assert jnp.array_equal(applied(case.map, once), once), scale


def test_a_result_has_its_structure_in_double_precision(case):
    for scale in scales(case.dtype):
        result = case.matrices(applied(case.map, case.sample(scale)))
        if case.build is LOW_RANK:
            values = np.linalg.svd(result / scale, compute_uv=False)
            rounding = {"float16": 1e-3, "bfloat16": 8e-3}.get(case.dtype, 1e-6)
            assert np.all(values[:, 2:] <= rounding * values[:, :1])
        else:
            sign = -1 if case.build is SKEW else 1
            assert np.array_equal(adjoint(result), sign * result)
        if case.build is SEMIDEFINITE:
            assert np.all(np.linalg.eigvalsh(result / scale) >= 0)


@pytest.mark.parametrize(
    "name, dtype",
    [(name, "float32") for name in MAPS] + [(name, "bfloat16") for name in DECOMPOSED],
)
def test_a_result_is_contained_at_no_distance(name, dtype):
    p = MAPS[name]
    _, contained, distance = seen(p, sample(dtype, shape=SHAPE))
    assert not contained and distance > 0
    _, contained, distance = seen(p, applied(p, sample(dtype, shape=SHAPE)))
    assert contained and distance == 0


def hard_matrices(size, count):
    """Of entries of all sizes, of signs, nearly diagonal and nearly semidefinite."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        noise = rng.standard_normal((size, size))
        yield noise
        yield noise * 10.0 ** rng.integers(-3, 1, (size, 1))
        yield np.where(noise > 0, 1.0, -1.0)
        yield np.diag(noise[0]) + 1e-3 * noise
        yield np.outer(noise[0], noise[0]) + 1e-2 * noise


@pytest.mark.parametrize(
    "size, dtype", [(5, dtype) for dtype in DTYPES] + [(40, "bfloat16")]
)
def test_no_eigenvalue_is_negative_in_double_precision(size, dtype):
    weight = np.concatenate(list(hard_matrices(size, 40 if size == 5 else 1)))
    if dtype.startswith("complex"):
        weight = weight * np.exp(1j * np.arange(weight.size).reshape(weight.shape))
    p = eqxreg.PositiveSemidefinite(blocks=len(weight) // size)
    result = applied(p, jnp.asarray(weight, dtype))
    values = np.linalg.eigvalsh(exact(result).reshape(-1, size, size))
    # What numpy rounds.
    assert np.all(values[:, 0] >= -1e-14 * values[:, -1])


FEASIBLE = {
    "symmetric": ("symmetric", lambda dtype: eye(dtype) - integers(dtype, 2)),
    "skew": ("skew", lambda dtype: applied(MAPS["skew"], integers(dtype, 9))),
    "definite": ("semidefinite", lambda dtype: integers(dtype, 9)),
    "semidefinite": ("semidefinite", lambda dtype: integers(dtype, 2)),
    "identity": ("semidefinite", eye),
    "of rank 1": ("low rank", lambda dtype: jnp.ones(SHAPE, dtype)),
    "of rank 2": ("low rank", lambda dtype: jnp.ones(SHAPE, dtype).at[2].set(3.0)),
    "masked": (
        "masked",
        lambda dtype: jnp.where(MASK, sample(dtype, shape=SHAPE), 0),
    ),
    **{f"zero, {name}": (name, lambda dtype: jnp.zeros(SHAPE, dtype)) for name in MAPS},
}


@pytest.mark.parametrize(
    "name, dtype",
    [(name, "float32") for name in FEASIBLE]
    + [(name, "bfloat16") for name, (map, _) in FEASIBLE.items() if map in DECOMPOSED],
)
def test_a_weight_of_the_set_keeps_its_bits(name, dtype):
    p, weight = MAPS[FEASIBLE[name][0]], FEASIBLE[name][1](dtype)
    value, contained, distance = seen(p, weight)
    assert jnp.array_equal(value, weight)
    assert contained and distance == 0


def test_a_rank_that_cannot_be_exceeded_is_no_constraint():
    weight = sample("float32", shape=SHAPE)
    assert eqxreg.LowRank(4)(weight) is weight


@pytest.mark.parametrize("p", [eqxreg.Symmetric(), eqxreg.SkewSymmetric()], ids=repr)
def test_the_largest_numbers_do_not_overflow_when_symmetrised(p):
    for dtype in DTYPES:
        largest = float(jnp.finfo(dtype).max)
        weight = jnp.asarray([[largest, largest], [largest / 2, -largest]], dtype)
        for sign in (1.0, -1.0):
            skewed = weight.at[1].multiply(jnp.asarray(sign, dtype))
            assert jnp.all(jnp.isfinite(applied(p, skewed)))


# The nearest point is in range too. Smaller entries than this would be flushed to zero.
@pytest.mark.parametrize("scale", [3e38, 1e-32])
@each_decomposed
def test_decompositions_work_at_the_ends_of_the_range(p, scale):
    weight = sample("float32", shape=SHAPE) / 5
    expected = exact(applied(p, weight))
    result = exact(applied(p, weight * scale)) / scale
    np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize(
    "p, nearest, weight",
    [
        (
            eqxreg.PositiveSemidefinite(),
            nearest_semidefinite,
            [[3e4, -6e4], [-6e4, -6e4]],
        ),
        (
            eqxreg.LowRank(1),
            ft.partial(nearest_of_rank, 1),
            [[6e4, 3e4], [2e4, 6e4]],
        ),
    ],
    ids=["semidefinite", "low rank"],
)
def test_half_precision_works_at_the_end_of_its_range(p, nearest, weight):
    weight = jnp.asarray(weight, "float16")
    expected = nearest(exact(weight))
    np.testing.assert_allclose(exact(applied(p, weight)), expected, rtol=4e-3)


def test_no_nan_arises_where_the_nearest_point_overflows():
    signs = np.asarray([[1, 1], [1, -1]])
    weight = jnp.asarray(np.kron(np.kron(signs, signs), signs) * 6e4, "float16")
    with jax.debug_nans(True):
        result = applied(eqxreg.PositiveSemidefinite(), weight)
    assert jnp.all(jnp.isinf(jnp.diagonal(result)))


# In the places where a map is enforced.


@pytest.mark.parametrize(
    "p",
    [
        eqxreg.PositiveSemidefinite(),
        eqxreg.LowRank(2),
        eqxreg.Masked(np.eye(5, dtype=bool)),
    ],
    ids=lambda p: type(p).__name__,
)
def test_layers_and_models_take_every_map(p, key):
    @filter_jit
    def used(layer, x):
        wrapped = eqxreg.Constraint(layer, "weight", p)
        return wrapped(x), eqxreg.project_params(layer, p), p(layer.weight)

    layer, x = eqx.nn.Linear(5, 5, key=key), jnp.linspace(-1.0, 1.0, 5)
    output, projected, expected = used(layer, x)
    assert_close(output, expected @ x + layer.bias)
    assert_close(projected.weight, expected)
    assert jnp.array_equal(projected.bias, layer.bias)


def test_the_blocks_of_a_recurrent_cell_are_matrices_of_their_own(key):
    @jax.jit
    def blocks(key):
        cell = eqx.nn.GRUCell(4, 5, key=key)
        p = eqxreg.SkewSymmetric(blocks=3)
        cell = eqxreg.bake(eqxreg.Constraint(cell, "weight_hh", p))
        return jnp.split(cell.weight_hh, 3)

    for block in blocks(key):
        assert jnp.array_equal(block, -block.T)


def test_equal_maps_are_equal_and_hyperparameters_are_no_leaves():
    assert eqxreg.LowRank(np.int64(2), matrix=[0]) == eqxreg.LowRank(2, matrix=(0,))
    assert eqxreg.Symmetric(blocks=2) != eqxreg.Symmetric()
    for p in (eqxreg.PositiveSemidefinite(), eqxreg.LowRank(2)):
        assert jax.tree.leaves(p) == []


def test_empty_weights_stay():
    for build in NEAREST:
        assert build()(jnp.zeros((0, 0))).shape == (0, 0)
    assert eqxreg.LowRank(1)(jnp.zeros((3, 0))).shape == (3, 0)


# Errors.


@pytest.mark.parametrize("rank", [0, -1, True])
def test_a_rank_is_a_positive_int(rank):
    message = f"`rank` must be a positive int, .*, got {rank}"
    with pytest.raises(ValueError, match=message):
        eqxreg.LowRank(rank)


@pytest.mark.parametrize("build", list(NEAREST))
def test_matrices_and_blocks_are_checked(build):
    with pytest.raises(ValueError, match="`matrix` says which axes are the rows"):
        build(matrix="rows")
    with pytest.raises(ValueError, match="`blocks` must be a positive int"):
        build(blocks=0)
    for call in (lambda w: build()(w), lambda w: build().check(w)):
        with pytest.raises(ValueError, match="A matrix needs a weight of rank 2"):
            call(jnp.zeros(3))
    with pytest.raises(TypeError, match="must be a floating or complex array"):
        build().check(jnp.zeros((2, 2), "int32"))


@pytest.mark.parametrize("build", [SYMMETRIC, SKEW, SEMIDEFINITE])
def test_a_matrix_that_is_not_square_is_an_error_that_tells_of_blocks(build, key):
    cell = eqx.nn.LSTMCell(4, 3, key=key)
    with pytest.raises(ValueError, match="needs a square matrix, .* 4 for an LSTM's"):
        eqxreg.Constraint(cell, "weight_hh", build())
    build(blocks=4).check(cell.weight_hh)
