"""Maps of singular values at matrices that are hard for iterations: of deficient rank,
with null spaces that have nothing in common, of huge and tiny sizes. What is right says
the singular value decomposition of numpy, in double precision."""

import functools as ft

import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit
from tables import exact


pytestmark = pytest.mark.usefixtures("quick_compilation")

WAYS = ("factorisation", "products")
EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "complex64": 2.0**-23}


def _gaussian(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def _pruned(rows, columns, shape):
    matrix = _gaussian(*shape)
    matrix[rows] = 0
    matrix[:, columns] = 0
    return matrix


def _with_spectrum(values, shape):
    m, n = shape
    size = min(shape)
    left = np.linalg.qr(_gaussian(m, size))[0]
    right = np.linalg.qr(_gaussian(n, size))[0]
    return (left * np.repeat(values, size // len(values))) @ right.T


def _scaled_permutation(shape):
    size = min(shape)
    order = np.random.default_rng(0).permutation
    matrix = np.zeros(shape)
    scales = np.arange(1.0, size + 1) * (np.arange(size) % 3 > 0)
    matrix[order(shape[0])[:size], order(shape[1])[:size]] = scales
    return matrix


def _block_diagonal(shape):
    matrix = np.zeros(shape)
    m, n = shape[0] // 4, shape[1] // 4
    matrix[:m, :n] = _gaussian(m, n)
    matrix[-m:, -n:] = _gaussian(m, n + 1)[:, 1:]
    return matrix


def _of_shape(shape):
    m, n = shape
    jordan = np.eye(4, k=1)
    return {
        "shift": np.eye(m, n, k=1),
        "shift by two": np.eye(m, n, k=2),
        "shift back": np.eye(m, n, k=-1),
        "pruned at the start": _pruned(slice(2), slice(2), shape),
        "pruned at both ends": _pruned(slice(3), slice(-3, None), shape),
        "pruned here and there": _pruned(
            slice(None, None, 3), slice(1, None, 4), shape
        ),
        "pruned by halves": _pruned(slice(m // 2, None), slice(n // 2), shape),
        "jordan and gaussian": np.kron(jordan, _gaussian(m // 4, n // 4)),
        "gaussian and jordan": np.kron(_gaussian(m // 4, n // 4), jordan),
        "rank one": np.outer(_gaussian(m), _gaussian(n)),
        "zero": np.zeros(shape),
        "huge": 1e30 * _gaussian(m, n),
        "tiny": 1e-30 * _gaussian(m, n),
        "repeated": _with_spectrum([3.0, 1.0, 1e-2, 0.0], shape),
        "permutation": _scaled_permutation(shape),
        "block diagonal": _block_diagonal(shape),
    }


SHAPES = [(16, 16), (40, 24), (24, 40)]
HARD = {
    f"{name} {'x'.join(map(str, shape))}": matrix
    for shape in SHAPES
    for name, matrix in _of_shape(shape).items()
}
HARD["jordan blocks 16x16"] = np.kron(np.eye(4), np.eye(4, k=1))
HARD["jordan of jordan 16x16"] = np.kron(np.eye(4, k=1), np.eye(4, k=1))
HARD["long jordan block 16x16"] = np.eye(16, k=1) + np.diag([2.0] + [0.0] * 15)
HARD["row"], HARD["column"] = _gaussian(1, 24), _gaussian(24, 1)

each_matrix = pytest.mark.parametrize("name", list(HARD))
each_way = pytest.mark.parametrize("way", WAYS)
# Null spaces of every kind, of one shape.
SOME = [
    "shift 16x16",
    "pruned by halves 16x16",
    "jordan and gaussian 16x16",
    "permutation 16x16",
    "zero 16x16",
]


@ft.cache
def polar(way):
    return jit(lambda weight: eqxreg.Orthogonal(method=way)(weight))


@ft.cache
def capped(way):
    return jit(lambda weight, cap: eqxreg.SpectralCap(cap, method=way)(weight))


def orthogonality_error(weight):
    tall = weight if weight.shape[-2] >= weight.shape[-1] else weight.swapaxes(-1, -2)
    gram = tall.conj().swapaxes(-1, -2) @ tall
    return np.max(np.abs(gram - np.eye(gram.shape[-1])))


def error_on_the_row_space(result, weight):
    """How far `result` is from the polar factor of `weight` where there is one, in
    units of what a relative change of `weight` by one would do to it."""
    u, s, vh = np.linalg.svd(weight, full_matrices=False)
    kept = (s > 1e-3 * s[0]) & (s > 0)
    if not np.any(kept):
        return 0.0
    apart = np.max(np.abs(result @ vh[kept].conj().T - u[:, kept]))
    return apart * s[kept].min() / s[0]


def check_polar(result, weight):
    eps = EPS[str(result.dtype)]
    result, weight = exact(result), exact(weight)
    assert orthogonality_error(result) < 32 * eps
    assert error_on_the_row_space(result, weight) < 32 * eps


@each_way
@each_matrix
def test_the_polar_factor_of_a_hard_matrix(name, way):
    weight = jnp.asarray(HARD[name], "float32")
    check_polar(polar(way)(weight), weight)


@pytest.mark.usefixtures("x64")
@each_way
@each_matrix
def test_the_polar_factor_of_a_hard_matrix_in_double_precision(name, way):
    weight = jnp.asarray(HARD[name], "float64")
    check_polar(polar(way)(weight), weight)


def check_capped(weight, way):
    eps, apply = EPS[str(weight.dtype)], capped(way)
    top = np.linalg.norm(exact(weight), 2)
    u, s, vh = np.linalg.svd(exact(weight), full_matrices=False)
    for fraction in (0.9, 0.5, 1e-2):
        cap = jnp.asarray(fraction * top or 1.0, weight.dtype)
        result = exact(apply(weight, cap))
        expected = (u * np.minimum(s, float(cap))) @ vh
        np.testing.assert_allclose(result, expected, atol=500 * eps * float(cap))
        assert np.linalg.norm(result, 2) <= float(cap)


@each_way
@each_matrix
def test_the_cap_of_a_hard_matrix(name, way):
    check_capped(jnp.asarray(HARD[name], "float32"), way)


@pytest.mark.usefixtures("x64")
@each_way
@pytest.mark.parametrize("name", [name for name in HARD if "16x16" in name])
def test_the_cap_of_a_hard_matrix_in_double_precision(name, way):
    check_capped(jnp.asarray(HARD[name], "float64"), way)


@each_way
@pytest.mark.parametrize("name", SOME)
def test_the_polar_factor_of_a_hard_complex_matrix(name, way):
    turned = HARD[name] * np.exp(1j * _gaussian(16, 16))
    weight = jnp.asarray(turned, "complex64")
    check_polar(polar(way)(weight), weight)


@each_way
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", SOME)
def test_the_polar_factor_of_a_hard_matrix_in_half_precision(name, dtype, way):
    weight = jnp.asarray(HARD[name], dtype)
    result = polar(way)(weight)
    assert result.dtype == dtype
    # Entries are rounded to nearest; in a column the errors add up at random.
    assert orthogonality_error(exact(result)) < 2 * float(jnp.finfo(dtype).eps)


@each_way
def test_hard_matrices_that_are_blocks_of_one_weight(way):
    stacked = jnp.asarray(np.concatenate([HARD[name] for name in SOME]), "float32")
    p = eqxreg.Orthogonal(method=way, blocks=len(SOME))
    for block, name in zip(jnp.split(p(stacked), len(SOME)), SOME, strict=True):
        check_polar(block, jnp.asarray(HARD[name], "float32"))


@each_way
def test_hard_matrices_under_vmap(way):
    stack = jnp.asarray(np.stack([HARD[name] for name in SOME]), "float32")
    results = jit(jax.vmap(eqxreg.Orthogonal(method=way)))(stack)
    for result, weight in zip(results, stack, strict=True):
        check_polar(result, weight)


@each_way
def test_a_large_matrix_without_any_direction(way):
    result = polar(way)(jnp.zeros((96, 96)))
    assert orthogonality_error(exact(result)) < 1e-5


@each_way
@pytest.mark.parametrize("name", SOME)
def test_a_hard_matrix_counts_as_orthogonal_afterwards(name, way):
    p = eqxreg.Orthogonal(method=way)
    weight = jnp.asarray(HARD[name], "float32")
    result = polar(way)(weight)
    assert p.contains(result)
    assert jnp.array_equal(polar(way)(result), result)
    apart = np.linalg.svd(exact(weight), compute_uv=False) - 1
    assert float(p.distance(weight)) == pytest.approx(np.linalg.norm(apart), rel=1e-5)


@each_way
@pytest.mark.parametrize("name", SOME)
def test_gradients_at_a_hard_matrix_are_finite(name, way):
    p = eqxreg.Orthogonal(method=way)
    weight = jnp.asarray(HARD[name], "float32")
    along = jnp.asarray(_gaussian(16, 16), "float32")

    @jit
    def gradients(weight):
        fn = lambda p: jax.grad(lambda w: jnp.sum(p(w) * along))(weight)
        return fn(p), fn(eqxreg.StraightThrough(p))

    own, straight = gradients(weight)
    assert jnp.all(jnp.isfinite(own))
    assert jnp.array_equal(straight, along)


@each_way
@pytest.mark.parametrize("name", SOME)
def test_an_update_to_a_hard_matrix_is_projected(name, way):
    weight = jnp.asarray(HARD[name], "float32")
    project = eqxreg.project(eqxreg.Orthogonal(method=way), mask=eqxreg.everything)
    params = {"weight": jnp.eye(16)}
    updates = {"weight": weight - params["weight"]}
    updates, _ = project.update(updates, project.init(params), params)
    result = optax.apply_updates(params, updates)["weight"]
    assert orthogonality_error(exact(result)) < 1e-5


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("chart", [eqxreg.Cayley, eqxreg.MatrixExp])
def test_a_chart_around_a_hard_matrix_is_orthogonal(name, chart):
    weight = jnp.asarray(HARD[name], "float32")
    p, raw = chart().bind(weight)
    check_polar(p(raw), weight)
