"""Symmetric, semidefinite, low-rank and masked weights, against numpy in double
precision."""

import dataclasses
import functools as ft
import re
from collections.abc import Callable

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from quick import check_derivatives, filter_jit, jit
from tables import DTYPES, SHORT, assert_close, exact, sample, scales


def adjoint(matrices):
    return np.conj(np.swapaxes(matrices, -1, -2))


def nearest_symmetric(matrices):
    return (matrices + adjoint(matrices)) / 2


def nearest_skew(matrices):
    return (matrices - adjoint(matrices)) / 2


def nearest_semidefinite(matrices):
    values, vectors = np.linalg.eigh(nearest_symmetric(matrices))
    return (vectors * np.maximum(values, 0)[..., None, :]) @ adjoint(vectors)


def nearest_of_rank(rank, matrices):
    u, s, vh = np.linalg.svd(matrices, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


NEAREST = {
    eqxreg.Symmetric: nearest_symmetric,
    eqxreg.SkewSymmetric: nearest_skew,
    eqxreg.PositiveSemidefinite: nearest_semidefinite,
    ft.partial(eqxreg.LowRank, 2): ft.partial(nearest_of_rank, 2),
}
SYMMETRIC, SKEW, SEMIDEFINITE, LOW_RANK = NEAREST


@dataclasses.dataclass(frozen=True)
class Layout:
    """A weight, and which of its axes are the rows of its matrices."""

    shape: tuple[int, ...]
    rows: tuple[int, ...] = (0,)
    arguments: dict = dataclasses.field(default_factory=dict)

    def matrices(self, weight: jax.Array) -> np.ndarray:
        others = [a for a in range(weight.ndim) if a not in self.rows]
        columns = np.prod([self.shape[a] for a in others], dtype=int)
        blocks = self.arguments.get("blocks", 1)
        rows_first = exact(weight).transpose(*self.rows, *others)
        return rows_first.reshape(blocks, -1, columns)


LAYOUTS = {
    "one by one": Layout((1, 1)),
    "blocks": Layout((12, 4), arguments={"blocks": 3}),
    "kernel": Layout((4, 1, 2, 2)),
    "pair": Layout((2, 3, 3, 2), (0, 1), {"matrix": (0, 1)}),
    "last": Layout((2, 2, 4), (2,), {"matrix": -1}),
    "tall": Layout((7, 4)),
    "wide": Layout((4, 7)),
    "wide blocks": Layout((6, 2, 3), arguments={"blocks": 2}),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A map of the weights of a layout."""

    build: Callable[..., eqxreg.Projection]
    layout: str
    dtype: str = "float32"

    def __str__(self):
        return f"{type(self.map).__name__}-{self.layout}-{self.dtype}"

    @property
    def map(self):
        return self.build(**LAYOUTS[self.layout].arguments)

    def sample(self, scale=1.0, seed=0):
        return sample(self.dtype, scale, LAYOUTS[self.layout].shape, seed)

    def matrices(self, weight):
        return LAYOUTS[self.layout].matrices(weight)


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


# One of each map, for what does not depend on the layout.
MASK = np.arange(32).reshape(8, 4) % 3 > 0
SHAPE = MASK.shape
MAPS = {
    "symmetric": eqxreg.Symmetric(blocks=2),
    "skew": eqxreg.SkewSymmetric(blocks=2),
    "semidefinite": eqxreg.PositiveSemidefinite(blocks=2),
    "low rank": eqxreg.LowRank(2),
    "low rank, wide": eqxreg.LowRank(1, blocks=4),
    "masked": eqxreg.Masked(MASK),
}
each_map = pytest.mark.parametrize("p", MAPS.values(), ids=MAPS.keys())
DECOMPOSED = {name: MAPS[name] for name in ("semidefinite", "low rank")}
each_decomposed = pytest.mark.parametrize(
    "p", DECOMPOSED.values(), ids=DECOMPOSED.keys()
)


@eqx.filter_jit
def applied(p, weight):
    return p(weight)


@eqx.filter_jit
def seen(p, weight):
    return p(weight), p.contains(weight), p.distance(weight)


@eqx.filter_jit
def derivatives(p, weight, tangent):
    """Of `tangent` by the derivative, and by its transpose."""
    _, forward = jax.jvp(p, (weight,), (tangent,))
    [backward] = jax.vjp(p, weight)[1](tangent)
    return forward, backward


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


def integers(dtype, rank):
    """Two semidefinite matrices of this rank, exact in every dtype."""
    factor = np.random.default_rng(1).integers(-2, 3, (2, 4, rank))
    return jnp.asarray((factor @ adjoint(factor)).reshape(SHAPE), dtype)


def eye(dtype):
    return jnp.concatenate([jnp.eye(4, dtype=dtype)] * 2)


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


# Derivatives.


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


# Masks.


@pytest.mark.parametrize("mask", [MASK, jnp.asarray(MASK), MASK[:, :1], MASK[0]])
@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
def test_a_mask_zeroes_the_rest_and_its_gradient(mask, dtype):
    weight, p = sample(dtype, shape=SHAPE), eqxreg.Masked(mask)
    expected = np.where(mask, exact(weight), 0)
    assert np.array_equal(exact(applied(p, weight)), expected)
    for change in derivatives(p, weight, weight):
        assert np.array_equal(exact(change), expected)


def test_what_is_not_finite_shows_through_a_mask():
    p = eqxreg.Masked(np.zeros((2, 2), bool))
    result = applied(p, jnp.asarray([[jnp.nan, 1.0], [jnp.inf, -jnp.inf]]))
    np.testing.assert_array_equal(result, [[np.nan, 0.0], [np.inf, -np.inf]])


def test_nothing_trains_a_mask(key):
    layer = eqx.nn.Linear(4, 8, key=key)
    layer = eqxreg.Constraint(layer, "weight", eqxreg.Masked(MASK))
    loss = lambda layer: jnp.sum(layer(jnp.ones(4)))
    gradient = eqx.filter_jit(eqx.filter_grad(loss))(layer)
    assert len(jax.tree.leaves(gradient)) == 2
    assert jnp.array_equal(gradient.layer.weight, MASK.astype("float32"))


def test_a_mask_may_be_traced():
    result = jax.jit(lambda mask, w: eqxreg.Masked(mask)(w))(MASK, jnp.ones(SHAPE))
    assert jnp.array_equal(result, MASK.astype("float32"))


def test_a_mask_acts_on_each_layer_of_a_stack(key):
    masked = lambda layer: eqxreg.Constraint(layer, "weight", eqxreg.Masked(MASK))
    linear = lambda key: eqx.nn.Linear(4, 8, key=key)

    @jax.jit
    def weights(keys):
        stack = eqx.filter_vmap(linear)(keys)
        within = eqx.filter_vmap(lambda key: masked(linear(key)))(keys)
        layers = stack, eqxreg.bake(masked(stack)), eqxreg.bake(within)
        return [layer.weight for layer in layers]

    plain, *constrained = weights(jax.random.split(key, 3))
    for weight in constrained:
        assert np.array_equal(exact(weight), np.where(MASK, exact(plain), 0))


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


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.ones((2, 2)), "got one of float64: perhaps `mask != 0`"),
        (jnp.ones((2, 2), "int32"), "got one of int32"),
        ([[True]], r"`mask` must be a boolean array, got \[\[True\]\]"),
        (True, "`mask` must be a boolean array, got True"),
    ],
    ids=["float", "int", "list", "bool"],
)
def test_a_mask_is_a_boolean_array(mask, message):
    with pytest.raises(TypeError, match=message):
        eqxreg.Masked(mask)


@pytest.mark.parametrize("shape", [(4, 8), (3, 8, 4), (8,), (8, 5), (0, 4)])
def test_a_mask_fits_its_weight(shape, key):
    p, layer = eqxreg.Masked(np.ones(shape, bool)), eqx.nn.Linear(4, 8, key=key)
    message = (
        "`mask` must have the shape of the weight, (8, 4), or one that broadcasts to "
        f"it, got {shape}."
    )
    for call in (p, lambda w: eqxreg.Constraint(layer, "weight", p)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(layer.weight)
