"""Second derivatives of what acts on singular values and eigenvalues, against finite
differences of first ones; and that they are finite where there are none."""

import equinox as eqx
import eqxreg
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit


pytestmark = pytest.mark.usefixtures("x64", "quick_compilation")


def drawn(shape, seed=0, dtype=float):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=shape)
    return weight + 1j * rng.normal(size=shape) if dtype is complex else weight


ORTHOGONAL = np.linalg.qr(drawn((4, 4)))[0]
WEIGHTS = {
    "square": drawn((4, 4)),
    "tall": drawn((5, 3)),
    "wide": drawn((3, 5)),
    "complex": drawn((4, 3), dtype=complex),
    "rank-deficient": drawn((4, 2)) @ drawn((2, 5), 1),
}
MAPS = {
    "orthogonal": eqxreg.Orthogonal(),
    "orthogonal-products": eqxreg.Orthogonal(method="products"),
    "cap": eqxreg.SpectralCap(1.2),
    "cap-products": eqxreg.SpectralCap(1.2, method="products"),
    "cap-all": eqxreg.SpectralCap(0.05),
    "norm": eqxreg.SpectralNorm(),
    "norm-gram": eqxreg.SpectralNorm(method="gram"),
    "norm-svd": eqxreg.SpectralNorm(method="svd"),
    "scale": eqxreg.SpectralScale(0.5),
    "low-rank": eqxreg.LowRank(2),
    "almost-orthogonal": eqxreg.AlmostOrthogonal(),
    "cayley": eqxreg.Cayley(),
    "exponential": eqxreg.MatrixExp(),
}
SQUARE_MAPS = {
    "semidefinite": eqxreg.PositiveSemidefinite(),
    "blocks": eqxreg.SpectralCap(0.5, blocks=2),
    "norm-blocks": eqxreg.SpectralNorm(blocks=2),
}


def cubes(fn):
    """A function of the weight that is bent itself."""

    def loss(weight):
        image = fn(weight)
        return jnp.sum(jnp.real(image) ** 3) + jnp.sum(jnp.imag(image) ** 3)

    return loss


def along(fn, weight, direction, step=1e-5):
    """The derivative of `fn` along a direction, by central differences."""
    return (fn(weight + step * direction) - fn(weight - step * direction)) / (2 * step)


def forward_over_reverse(loss, weight, direction):
    return jax.jvp(jax.grad(loss), (weight,), (direction,))[1]


def reverse_over_reverse(loss, weight, direction):
    def slope(weight):
        # A gradient in JAX is the conjugate of the direction of steepest ascent.
        return jnp.sum(jnp.real(jax.grad(loss)(weight) * direction))

    return jax.grad(slope)(weight)


def reverse_over_forward(loss, weight, direction):
    return jax.grad(lambda w: jax.jvp(loss, (w,), (direction,))[1])(weight)


def whole_hessian(loss, weight, direction):
    if jnp.iscomplexobj(weight):
        pytest.skip("`jax.hessian` is of real arrays")
    return jnp.tensordot(jax.hessian(loss)(weight), direction, weight.ndim)


WAYS = (forward_over_reverse, reverse_over_reverse, reverse_over_forward, whole_hessian)


def assert_bends(fn, weight, ways=WAYS):
    """The second derivative of `cubes(fn)` is that of its gradient."""
    weight = jnp.asarray(weight)
    kind = complex if jnp.iscomplexobj(weight) else float
    direction = drawn(weight.shape, 5, kind)
    direction = jnp.asarray(direction / np.linalg.norm(direction))
    loss = cubes(fn)
    expected = along(jit(jax.grad(loss)), weight, direction)
    assert jnp.max(jnp.abs(expected)) > 1e-6
    for way in ways:
        if way is whole_hessian and kind is complex:
            continue
        found = jit(lambda w, d, way=way: way(loss, w, d))(weight, direction)
        error = jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected))
        assert error < 1e-6, way.__name__


@pytest.mark.parametrize("name", [*MAPS, *SQUARE_MAPS])
def test_second_derivatives_are_those_of_the_gradient_in_every_way(name):
    assert_bends((MAPS | SQUARE_MAPS)[name], WEIGHTS["square"])


@pytest.mark.parametrize("weight", ["tall", "wide", "complex", "rank-deficient"])
@pytest.mark.parametrize("name", ["orthogonal", "cap", "norm", "low-rank"])
def test_second_derivatives_at_weights_of_all_kinds(name, weight):
    if (name, weight) == ("orthogonal", "rank-deficient"):
        pytest.skip("where a direction has no length, there is no derivative")
    assert_bends(MAPS[name], WEIGHTS[weight], (forward_over_reverse,))


def with_values(*values):
    """A symmetric matrix with these eigenvalues."""
    return (ORTHOGONAL * values) @ ORTHOGONAL.T


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("orthogonal", ORTHOGONAL),
        ("orthogonal-products", ORTHOGONAL),
        ("cap-all", ORTHOGONAL),
        ("cap", with_values(3.0, 3.0, 0.5, 0.5)),
        ("norm", with_values(3.0, 1.0, 1.0, 1.0)),
        ("low-rank", with_values(3.0, 3.0, 0.5, 0.5)),
        ("low-rank", drawn((5, 2)) @ drawn((2, 4), 1)),
        ("semidefinite", with_values(2.0, 2.0, -1.0, -1.0)),
    ],
)
def test_second_derivatives_exist_where_singular_values_meet(name, weight):
    assert_bends((MAPS | SQUARE_MAPS)[name], weight, (reverse_over_reverse,))


@pytest.mark.parametrize(
    "fn",
    [
        eqxreg.spectral_norm,
        lambda w: eqxreg.spectral_norm(w, method="gram"),
        lambda w: eqxreg.spectral_norm_penalty({"weight": w}, 1.0),
        lambda w: eqxreg.distance_penalty({"weight": w}, eqxreg.SpectralCap(1.5), 1.0),
        lambda w: eqxreg.lipschitz_bound(
            eqx.tree_at(lambda n: n.weight, eqx.nn.Linear(2, 2, key=KEY), w)
        ),
        lambda w: eqxreg.operator_norm(
            eqx.tree_at(lambda n: n.weight, eqx.nn.Linear(2, 2, key=KEY), w)
        ),
    ],
    ids=["norm", "norm-gram", "penalty", "distance", "lipschitz", "operator"],
)
def test_second_derivatives_of_norms(fn):
    assert_bends(fn, [[3.0, 1.0], [0.0, 2.0]])


KEY = jax.random.key(0)


def test_the_hessian_of_the_spectral_norm_is_that_of_the_formula():
    # With the whole singular value decomposition and a dense resolvent.
    weight = drawn((4, 4))
    u, s, vh = np.linalg.svd(weight)
    swapped = np.block([[np.zeros((4, 4)), weight], [weight.T, np.zeros((4, 4))]])
    q = np.concatenate([u[:, 0], vh[0]]) / np.sqrt(2)
    resolvent = np.linalg.pinv(s[0] * np.eye(8) - swapped, rcond=1e-10)
    expected = np.zeros((16, 16))
    for i in range(16):
        change = np.zeros((4, 4))
        change.flat[i] = 1
        force = np.concatenate([change @ q[4:], change.T @ q[:4]])
        moved = resolvent @ force
        expected[i] = 2 * np.outer(q[:4], moved[4:]).ravel()
        expected[i] += 2 * np.outer(moved[:4], q[4:]).ravel()
    found = jax.hessian(eqxreg.spectral_norm)(jnp.asarray(weight)).reshape(16, 16)
    np.testing.assert_allclose(found, (expected + expected.T) / 2, atol=1e-10)


def test_second_derivatives_of_the_norm_of_a_convolution():
    conv = eqx.nn.Conv2d(2, 3, 2, padding=1, use_bias=False, key=KEY)
    given = lambda w: eqx.tree_at(lambda n: n.weight, conv, w)
    weight = jnp.asarray(drawn((3, 2, 2, 2)))
    ways = (forward_over_reverse, reverse_over_reverse)
    norm = lambda w: eqxreg.operator_norm(given(w), (2, 3, 3))
    assert_bends(norm, weight, ways)
    assert_bends(lambda w: eqxreg.lipschitz_bound(given(w)), weight, ways)


def test_second_derivatives_of_the_stateful_wrapper():
    linear = eqx.nn.Linear(4, 4, key=KEY)
    model, state = eqx.nn.make_with_state(eqxreg.SpectralNormConstraint)(
        linear, "weight", key=KEY
    )

    def baked(weight):
        given = eqx.tree_at(lambda m: m.layer.weight, model, weight)
        return eqxreg.bake(given, state).weight

    assert_bends(baked, model.layer.weight, (forward_over_reverse,))


@pytest.mark.parametrize("name", [*MAPS, *SQUARE_MAPS])
def test_second_derivatives_are_finite_everywhere(name):
    fn = (MAPS | SQUARE_MAPS)[name]
    diagonals = [[1, 1, 1, 1], [1.2, 1.2, 1.2, 1.2], [0, 0, 0, 0], [1.2, 1.2, 0.5, 0]]
    weights = jnp.stack([jnp.diag(jnp.asarray(d, float)) for d in diagonals])
    direction = jnp.asarray(drawn((4, 4), 3))
    loss = cubes(lambda w: fn(w) + 1)
    for way in (forward_over_reverse, reverse_over_reverse):
        second = jax.vmap(lambda w, way=way: way(loss, w, direction))
        found = jit(second)(weights)
        assert jnp.all(jnp.isfinite(found)) and jnp.max(jnp.abs(found)) < 1e4


@pytest.mark.parametrize(
    "p",
    [
        eqxreg.SpectralCap(5.0),
        eqxreg.SpectralCap(5.0, method="products"),
        eqxreg.SpectralScale(5.0),
        eqxreg.PositiveSemidefinite(),
        eqxreg.LowRank(4),
    ],
    ids=lambda p: type(p).__name__,
)
def test_inside_a_set_all_derivatives_are_those_of_the_identity(p):
    weight = jnp.asarray(drawn((4, 4)) / 4)
    weight = weight @ weight.T + jnp.eye(4)
    weight = (weight + weight.T) / 2
    sym = isinstance(p, eqxreg.PositiveSemidefinite)
    direction = jnp.asarray(drawn((4, 4), 3))
    direction = direction + direction.T if sym else direction

    def derivatives(fn):
        path = lambda t: fn(weight + t * direction)
        values = []
        for _ in range(3):
            path = jax.jacfwd(path)
            values.append(path(0.0))
        return values

    first, second, third = jit(lambda: derivatives(p))()
    np.testing.assert_array_equal(first, direction)
    assert not second.any() and not third.any()


@pytest.mark.parametrize("ratio", [30, 1000])
def test_the_gradient_of_a_cap_is_right_far_below_the_largest_value(ratio):
    # In single precision; with all of it in double precision beside.
    size = 12
    left, right = (np.linalg.qr(drawn((size, size), seed))[0] for seed in (1, 2))
    values = np.linspace(2.0, 0.1, size)
    values[0] = 2.0 * ratio
    weight = jnp.asarray((left * values) @ right.T, jnp.float32)
    cotangent = jnp.asarray(drawn((size, size), 3), jnp.float32)
    [found] = jax.vjp(eqxreg.SpectralCap(1.0), weight)[1](cotangent)
    u, s, vh = np.linalg.svd(np.asarray(weight, float))
    capped, others = np.minimum(s, 1), s[:, None] - s
    gaps = np.where(others == 0, 1, others)
    plus = np.where(others == 0, s < 1, (capped[:, None] - capped) / gaps)
    minus = (capped[:, None] + capped) / (s[:, None] + s)
    inner = u.T @ np.asarray(cotangent, float) @ vh.T
    inner = plus * (inner + inner.T) / 2 + minus * (inner - inner.T) / 2
    expected = u @ inner @ vh
    error = np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)
    assert error < 5e-5


def test_third_derivatives_are_those_of_second_ones():
    weight, direction = jnp.asarray(drawn((4, 4))), jnp.asarray(drawn((4, 4), 1) / 4)
    for name in ("orthogonal", "cap", "norm", "low-rank"):
        loss = cubes(MAPS[name])
        second = lambda w, f=loss: forward_over_reverse(f, w, direction)
        found = jit(lambda w, f=second: jax.jvp(f, (w,), (direction,))[1])(weight)
        expected = along(jit(second), weight, direction)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_maml_learns_through_a_step_with_an_orthogonal_weight():
    # The gradient of the loss after one step of gradient descent, in the weight before.
    linear = eqx.nn.Linear(3, 3, use_bias=False, key=KEY)
    start = eqxreg.OrthogonalConstraint(linear, "weight")
    params, static = eqx.partition(start, eqx.is_inexact_array)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    inputs, targets = jnp.asarray(drawn((2, 7, 3)))
    optimiser = optax.sgd(0.1)

    def loss(flat):
        model = eqx.combine(unravel(flat), static)
        return jnp.mean((jax.vmap(model)(inputs) - targets) ** 2)

    def adapted(flat):
        updates, _ = optimiser.update(jax.grad(loss)(flat), optimiser.init(flat))
        return loss(optax.apply_updates(flat, updates))

    found = jit(jax.grad(adapted))(flat)
    one_step = jit(adapted)
    expected = [along(one_step, flat, e) for e in np.eye(flat.size)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)
