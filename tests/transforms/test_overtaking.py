"""Directions that overtake the one that is remembered, which knows nothing of them.

What projections make of weights is measured by singular values in float64. At each step
a direction rises that is orthogonal to the weight, and to every weight and vector that
was seen before."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eqxreg._linalg import LinearMap, fixed_vector, matmul, of_matrix, settled
from quick import jit
from tables import exact


pytestmark = pytest.mark.usefixtures("quick_compilation")

BOUNDS = {
    "norm": eqxreg.SpectralNorm,
    "scale": eqxreg.SpectralScale,
    "cap": eqxreg.SpectralCap,
}


def rotation(n, rng):
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def in_blocks(*matrices):
    rows, columns = np.sum([m.shape for m in matrices], axis=0)
    whole = np.zeros((rows, columns))
    row = column = 0
    for m in matrices:
        whole[row : row + len(m), column : column + m.shape[1]] = m
        row, column = row + len(m), column + m.shape[1]
    return whole


def padded(columns, rows):
    """Columns with zero rows between the others."""
    out = np.zeros((rows, columns.shape[1]))
    out[np.arange(len(columns)) * rows // len(columns)] = columns
    return out


def directions(structure, rng):
    """The left and the right singular vectors of all weights of a run."""
    if structure == "axes":
        return np.eye(16), np.eye(16)
    if structure == "block-diagonal":
        pair = [in_blocks(*(rotation(8, rng) for _ in "ab")) for _ in range(2)]
        return pair[0], pair[1]
    if structure == "masked":
        return padded(rotation(12, rng), 20), padded(rotation(12, rng), 16)
    rows, columns = {"square": (16, 16), "wide": (12, 30), "tall": (30, 12)}[structure]
    few = min(rows, columns)
    return rotation(rows, rng)[:, :few], rotation(columns, rng)[:, :few]


STRUCTURES = ["axes", "block-diagonal", "masked", "square", "wide", "tall"]


def run(p, lefts, rights, rises, every=1, **options):
    """Weights after each update. `rises[t][b]` is the direction that rises, of each
    block, and by how much."""
    sizes = np.linspace(0.3, 0.1, lefts.shape[-1])
    sizes[0] = 0.8
    start = (lefts * sizes) @ rights.swapaxes(-1, -2)
    params = {"weight": jnp.asarray(np.concatenate(start), "float32")}
    optimiser = optax.chain(optax.sgd(1.0), eqxreg.project(p, every, **options))
    state = optimiser.init(params)

    @jit
    def step(grads, state, params):
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i, by in rises:
        outer = lefts[:, :, i, None] * rights[:, None, :, i]
        grads = {"weight": jnp.asarray(-by * np.concatenate(outer), "float32")}
        params, state = step(grads, state, params)
        yield params["weight"]


def check(name, weights, blocks=1):
    for t, weight in enumerate(weights):
        tops = [np.linalg.norm(m, 2) for m in np.split(exact(weight), blocks)]
        assert max(tops) <= 1.001, t
        if name == "norm":
            assert min(tops) >= 0.999, t


CALM = [(0, 0.0)] * 2
JUMPS = [
    *CALM,
    *((i, by) for i, by in enumerate((5.0, 1.4, 1.2, 1.05, 1.01, 3.0, 1.1, 1.02), 1)),
]
SLOW = [*CALM, *((1, 0.05) for _ in range(20)), *((2, 0.05) for _ in range(24))]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", list(BOUNDS))
def test_a_direction_that_jumps_or_rises_slowly_is_bounded_at_once(name, structure):
    lefts, rights = directions(structure, np.random.default_rng(0))
    weights = run(BOUNDS[name](1.0), lefts[None], rights[None], JUMPS + SLOW)
    check(name, weights)


@pytest.mark.parametrize("name", list(BOUNDS))
def test_each_block_is_bounded(name):
    rng = np.random.default_rng(1)
    pairs = [directions(s, rng) for s in ("axes", "block-diagonal", "square")]
    lefts, rights = (np.stack(side) for side in zip(*pairs, strict=True))
    weights = run(BOUNDS[name](1.0, blocks=3), lefts, rights, JUMPS)
    check(name, weights, blocks=3)


@pytest.mark.parametrize("name", list(BOUNDS))
def test_what_is_projected_now_and_then_is_bounded_then(name):
    lefts, rights = directions("axes", None)
    rises = [(t // 10 + 1, 0.05 + t % 3) for t in range(50)]
    weights = list(run(BOUNDS[name](1.0), lefts[None], rights[None], rises, every=5))
    check(name, weights[4::5])


@pytest.mark.parametrize("name", list(BOUNDS))
def test_without_the_momentum_that_points_outwards_too(name):
    lefts, rights = directions("block-diagonal", np.random.default_rng(2))
    p = BOUNDS[name](1.0)
    weights = run(p, lefts[None], rights[None], JUMPS, momentum="tangent", b1=0.9)
    check(name, weights)


@pytest.mark.parametrize("name", list(BOUNDS))
def test_each_layer_of_a_stack_is_bounded(name):
    keys = jax.random.split(jax.random.key(0), 3)
    layers = eqx.filter_vmap(lambda k: eqx.nn.Linear(12, 12, key=k))(keys)
    layers = eqx.tree_at(lambda m: m.weight, layers, jnp.stack(3 * [0.5 * jnp.eye(12)]))
    transform = eqxreg.project(BOUNDS[name](1.0))
    state = transform.init(layers)
    update = jit(transform.update)
    for t in range(1, 6):
        # Another axis in each layer.
        rise = jnp.zeros((3, 12, 12))
        for i in range(3):
            rise = rise.at[i, t + i, t + i].set(0.6)
        updates = jax.tree.map(jnp.zeros_like, layers)
        updates = eqx.tree_at(lambda m: m.weight, updates, rise)
        updates, state = update(updates, state, layers)
        layers = eqx.apply_updates(layers, updates)
        check(name, [layers.weight.reshape(36, 12)], blocks=3)


def spectra(n, rng):
    gaussian = np.linalg.svd(rng.normal(size=(n, n)), compute_uv=False)
    gaussian = gaussian / gaussian[0]
    few = np.zeros(n)
    few[:3] = 1, 0.9, 0.8
    return {
        "gaussian": gaussian,
        "flat": np.ones(n),
        "nearly flat": 1 - 1e-3 * np.arange(n) / n,
        "crowded": np.cos(np.pi / 2 * np.arange(n) / n),
        "capped": np.concatenate([np.ones(n // 4), gaussian[n // 4 :]]),
        "apart": np.concatenate([[1], gaussian[1:] / 2]),
        "of rank three": few,
    }


def starts(v, rng):
    noise = rng.normal(size=v.shape) / np.sqrt(v.size)
    return {
        "good": v,
        "drifted": v + 0.03 * noise,
        "another": noise,
        "zero": 0 * v,
        "NaN": np.nan * v,
        "huge": 1e30 * v,
    }


def rotations(n, rng):
    blocks = [in_blocks(*(rotation(n // 2, rng) for _ in "ab")) for _ in range(2)]
    generic = rotation(n, rng), rotation(n, rng)
    return [(np.eye(n), np.eye(n)), (blocks[0], blocks[1]), generic]


def cases(n, rng):
    """Matrices and vectors to start from: of all kinds, for the matrix as it is, and
    good ones that have been overtaken."""
    for left, right in rotations(n, rng):
        for values in spectra(n, rng).values():
            for start in starts(right[:, 0], rng).values():
                yield (left * values) @ right.T, start
            for by in (1.002, 1.004, 1.01, 1.05, 1.2, 5.0):
                risen = values.copy()
                risen[rng.integers(1, n)] = by
                yield (left * risen) @ right.T, right[:, 0]


@pytest.mark.parametrize("n", [1, 2, 24, 64])
def test_from_any_start_to_a_thousandth(n):
    pairs = list(cases(n, np.random.default_rng(n))) if n > 2 else []
    if n <= 2:
        pairs = [(np.eye(n) * s, np.eye(n)[0] * t) for s in (0.0, 3.0) for t in (0, 1)]
    matrices, vectors = (
        jnp.asarray(np.stack(side), "float32") for side in zip(*pairs, strict=True)
    )
    estimate = jit(jax.vmap(lambda m, v: settled(of_matrix(m), v)))
    found = estimate(matrices, vectors)
    expected = np.linalg.norm(exact(matrices), 2, axis=(1, 2))
    np.testing.assert_allclose(found.value, expected, rtol=5e-4)
    # The vectors attain what is found.
    images = np.einsum("bij,bj->bi", exact(matrices), exact(found.right))
    norms = np.linalg.norm(images, axis=1)
    np.testing.assert_allclose(norms, expected, rtol=5e-4)
    # From call to call the bits are the same.
    again = estimate(matrices, vectors)
    assert all(map(jnp.array_equal, found, again))


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
@pytest.mark.parametrize("shape", [(20, 6), (6, 20), (5, 0), (0, 5)])
def test_of_any_shape_and_dtype(shape, dtype, x64):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=shape)
    if dtype == "complex64":
        matrix = matrix + 1j * rng.normal(size=shape)
    for scale in (1.0, 1e25, 1e-25):
        scaled = jnp.asarray(matrix * scale, dtype)
        start = fixed_vector(shape[1], scaled.dtype)
        top = jit(lambda m, v: settled(of_matrix(m), v))(scaled, start)
        norm = np.linalg.norm(matrix, 2) if matrix.size else 0.0
        assert float(top.value) == pytest.approx(norm * scale, rel=5e-4)


def test_what_is_below_what_is_enough_need_not_be_exact():
    left, right = (rotation(64, np.random.default_rng(i)) for i in range(2))
    crowded = (left * spectra(64, np.random.default_rng(0))["crowded"]) @ right.T
    matrix = jnp.asarray(0.8 * crowded, "float32")
    start = jnp.zeros(64)
    value, products = counted(matrix, start, enough=1.0)
    assert value <= 0.8 * (1 + 1e-6) and products <= 24
    value, products = counted(matrix, start, enough=0.5)
    assert value == pytest.approx(0.8, rel=1e-3)
    # A bound that has been passed by a direction unseen is not missed.
    risen = matrix + 0.3 * jnp.asarray(np.outer(left[:, 40], right[:, 40]), "float32")
    value, _ = counted(risen, jnp.asarray(right[:, 0], "float32"), enough=1.0)
    expected = np.linalg.norm(exact(risen), 2)
    assert value == pytest.approx(expected, rel=1e-3)


def counted(matrix, start, **options):
    """The value found, and the number of products that it took."""
    calls = []

    def count(product):
        calls.append(None)
        return product

    def counting(product):
        return jax.pure_callback(count, jax.typeof(product), product)

    def found(matrix, start):
        linear = LinearMap(
            lambda v: counting(matmul(matrix, v)),
            lambda u: counting(matmul(u, matrix)),
        )
        return settled(linear, start, **options).value

    value = float(jit(found)(matrix, start))
    return value, len(calls)


@pytest.mark.parametrize(
    "spectrum, most", [("apart", 40), ("flat", 10), ("crowded", 132)]
)
def test_a_good_vector_is_cheap_to_be_sure_of(spectrum, most):
    rng = np.random.default_rng(0)
    left, right = rotation(64, rng), rotation(64, rng)
    matrix = (left * spectra(64, rng)[spectrum]) @ right.T
    start = jnp.asarray(right[:, 0], "float32")
    value, products = counted(jnp.asarray(matrix, "float32"), start)
    assert value == pytest.approx(1, rel=1e-6)
    assert products <= most


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_seen_and_ends(value):
    matrix = jnp.eye(8).at[3, 4].set(value)
    top = jit(lambda m: settled(of_matrix(m), fixed_vector(8, m.dtype)))(matrix)
    assert not jnp.isfinite(top.value)
