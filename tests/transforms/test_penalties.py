"""Penalties and their gradients, against numpy and finite differences."""

import functools as ft

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import check_derivatives, filter_jit, jit
from tables import exact, sample
from training import params_of


pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_the_gradient_of_the_l2_penalty_is_exactly_rate_times_weight(mlp):
    # Activation functions and all.
    grads = filter_jit(eqx.filter_grad(lambda m: eqxreg.l2_penalty(m, 0.3)))(mlp)
    for grad, weight in zip(
        jax.tree.leaves(grads), jax.tree.leaves(params_of(mlp)), strict=True
    ):
        assert jnp.array_equal(grad, 0.3 * weight)


def test_penalties_against_numpy(mlp):
    arrays = [exact(w) for w in jax.tree.leaves(params_of(mlp))]
    squares = sum((w**2).sum() for w in arrays)
    sizes = sum(np.abs(w).sum() for w in arrays)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
    close(eqxreg.l2_penalty(mlp, 0.3), 0.15 * squares)
    close(eqxreg.l1_penalty(mlp, 0.3), 0.3 * sizes)
    close(eqxreg.elastic_net_penalty(mlp, 0.3, 0.2), 0.3 * sizes + 0.1 * squares)
    p = eqxreg.MaxNorm(0.3, axis="unit")
    weights = [exact(w) for w in eqxreg.trainables(mlp, eqxreg.weights)]
    excess = [np.maximum(np.sqrt((w**2).sum(1)) - 0.3, 0) for w in weights]
    distance = sum(np.sqrt((e**2).sum()) for e in excess)
    close(eqxreg.distance_penalty(mlp, p, 2.0), 2.0 * distance)


def cosines(w):
    units = w / np.linalg.norm(w, axis=1, keepdims=True)
    above = np.triu_indices(len(w), 1)
    return np.abs((units @ units.conj().T)[above]).mean()


def off_orthonormal(w):
    values = np.linalg.svd(w, compute_uv=False)
    return ((values**2 - 1) ** 2).sum()


MATRIX_PENALTIES = {
    "group_lasso": (
        eqxreg.group_lasso_penalty,
        lambda w: 0.3 * np.linalg.norm(w, axis=1).sum(),
    ),
    "spectral_norm": (
        eqxreg.spectral_norm_penalty,
        lambda w: 0.15 * np.linalg.norm(w, 2) ** 2,
    ),
    "orthogonality": (
        eqxreg.orthogonality_penalty,
        lambda w: 0.3 * off_orthonormal(w),
    ),
    "cosines": (
        ft.partial(eqxreg.orthogonality_penalty, mode="keras"),
        lambda w: 0.3 * cosines(w),
    ),
}
every_matrix_penalty = pytest.mark.parametrize("name", list(MATRIX_PENALTIES))


@every_matrix_penalty
@pytest.mark.parametrize("shape", [(6, 4), (3, 8), (5, 5), (4, 3, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "complex64", "bfloat16"])
def test_penalties_of_matrices_against_numpy(name, shape, dtype):
    penalty, formula = MATRIX_PENALTIES[name]
    weight = sample(dtype, shape=shape)
    actual = jit(penalty)({"weight": weight}, 0.3)
    matrix = exact(weight).reshape(shape[0], -1)
    expected = 0.0 if name == "cosines" and shape[0] == 1 else formula(matrix)
    rtol = 1e-2 if dtype == "bfloat16" else 1e-4
    np.testing.assert_allclose(float(actual), expected, rtol=rtol, atol=1e-6)


@pytest.mark.usefixtures("x64")
@every_matrix_penalty
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_gradients_of_penalties_of_matrices(name, dtype):
    penalty, _ = MATRIX_PENALTIES[name]
    value = lambda w: penalty({"weight": w}, 0.3)
    check_derivatives(value, (sample(dtype, shape=(5, 3)),))


@pytest.mark.parametrize("mode", ["soft", "keras"])
def test_the_orthogonality_penalty_is_zero_at_orthonormal_weights(mode):
    wide = jnp.linalg.qr(sample("float32", shape=(7, 4)))[0].T
    value, grads = jax.value_and_grad(eqxreg.orthogonality_penalty)(
        {"weight": wide}, 1.0, mode=mode
    )
    assert value < 1e-6 and jnp.max(jnp.abs(grads["weight"])) < 1.0
    if mode == "soft":
        tall = eqxreg.orthogonality_penalty({"weight": wide.T}, 1.0)
        assert tall < 1e-10 and jnp.max(jnp.abs(grads["weight"])) < 1e-5


def test_blocks_are_matrices_of_their_own():
    weight = sample("float32", shape=(6, 4))
    for penalty in (eqxreg.orthogonality_penalty, eqxreg.spectral_norm_penalty):
        blocks = [penalty({"weight": w}, 0.3) for w in jnp.split(weight, 3)]
        together = penalty({"weight": weight}, 0.3, blocks=3)
        np.testing.assert_allclose(together, sum(blocks), rtol=1e-5)


def test_penalties_take_weights_of_a_stack_one_by_one(key):
    mlp = eqx.nn.MLP(4, 2, 8, depth=3, scan=True, key=key)
    hidden = mlp.layers[1]
    rows = np.sqrt((exact(hidden.weight) ** 2).sum((1, 2)))
    expected = np.maximum(rows - 0.3, 0).sum()
    penalty = eqxreg.distance_penalty(hidden, eqxreg.MaxNorm(0.3), 1.0)
    np.testing.assert_allclose(penalty, expected, rtol=1e-5)


PENALTIES = {
    "l1": lambda tree, **kw: eqxreg.l1_penalty(tree, 0.1, **kw),
    "l2": lambda tree, **kw: eqxreg.l2_penalty(tree, 0.1, **kw),
    "elastic": lambda tree, **kw: eqxreg.elastic_net_penalty(tree, 0.1, 0.1, **kw),
    "distance": lambda tree, **kw: eqxreg.distance_penalty(
        tree, eqxreg.MaxNorm(0.3), 0.1, **kw
    ),
    "group_lasso": lambda tree, **kw: eqxreg.group_lasso_penalty(tree, 0.1, **kw),
    "spectral_norm": lambda tree, **kw: eqxreg.spectral_norm_penalty(tree, 0.1, **kw),
    "orthogonality": lambda tree, **kw: eqxreg.orthogonality_penalty(tree, 0.1, **kw),
    "cosines": lambda tree, **kw: eqxreg.orthogonality_penalty(
        tree, 0.1, mode="keras", **kw
    ),
}
# A zero weight is not orthogonal.
ZERO_AT_ZERO = [name for name in PENALTIES if name != "orthogonality"]


@pytest.mark.parametrize("name", list(PENALTIES))
def test_a_penalty_is_a_scalar_of_the_dtype_of_the_tree(name):
    for dtype in ("float16", "bfloat16", "float32", "complex64"):
        tree = {"weight": jnp.ones((2, 3), dtype), "step": jnp.arange(2)}
        value = PENALTIES[name](tree)
        assert value.shape == () and value.dtype == jnp.finfo(dtype).dtype
    mixed = {"weight": jnp.ones((2, 2), "bfloat16"), "kernel": jnp.ones((2, 2))}
    assert PENALTIES[name](mixed).dtype == jnp.float32


@pytest.mark.parametrize("name", list(PENALTIES))
def test_an_empty_selection_and_zero_weights_cost_nothing(name):
    nothing = PENALTIES[name]({"step": jnp.arange(2)})
    assert nothing == 0 and nothing.shape == ()
    for dtype in ("bfloat16", "float32", "complex64"):
        zero = {"weight": jnp.zeros((2, 3), dtype)}
        value, grads = jit(jax.value_and_grad(PENALTIES[name]))(zero)
        assert (value == 0) == (name in ZERO_AT_ZERO) and jnp.isfinite(value)
        assert jnp.all(grads["weight"] == 0)


@pytest.mark.parametrize("name", list(PENALTIES))
def test_a_penalty_of_nothing_has_the_dtype_of_the_tree(name):
    tree = {"a": jnp.ones(2, "float16")}
    assert PENALTIES[name](tree, where=eqxreg.weights).dtype == jnp.float16


def test_effective_penalties_choose_on_the_tree_that_is_given(mlp):
    first = eqxreg.select(where=lambda path, layer, array: "layers[0]" in path)
    wrapped = eqxreg.constrain(mlp, eqxreg.MaxNorm(0.5), where=first)
    expected = eqxreg.l2_penalty(eqxreg.bake(wrapped), 1.0, where=first)
    constrained = eqxreg.select(eqxreg.Constraint)
    for where in (constrained, constrained(wrapped)):
        actual = eqxreg.l2_penalty(wrapped, 1.0, where, effective=True)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("name", list(PENALTIES))
def test_effective_penalises_the_constrained_weight(name, key):
    linear = eqx.nn.Linear(4, 3, use_bias=False, key=key)
    wrapped = eqxreg.MaxNormConstraint(linear, "weight", 0.5)
    penalty = filter_jit(PENALTIES[name])
    effective = penalty(wrapped, effective=True)
    plain = penalty(eqxreg.bake(wrapped))
    np.testing.assert_allclose(effective, plain, rtol=1e-5)
    # Cosines do not depend on norms, and a shorter weight is less orthogonal.
    if name not in ("cosines", "orthogonality"):
        assert effective < penalty(wrapped)


def test_a_penalty_narrowed_by_a_selector(mlp):
    first = eqxreg.select(where=lambda path, layer, array: "layers[0]" in path)
    weight = exact(mlp.layers[0].weight)
    actual = eqxreg.l2_penalty(mlp, 1.0, where=first)
    np.testing.assert_allclose(actual, (weight**2).sum() / 2, rtol=1e-5)
