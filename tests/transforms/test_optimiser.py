"""Decay, projection after the update, and penalties: promises and peers' numbers."""

import functools as ft

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import check_derivatives, filter_jit, jit
from tables import assert_close, exact, sample


pytestmark = pytest.mark.usefixtures("quick_compilation")

X = jnp.linspace(-1.0, 1.0, 4)


@pytest.fixture
def mlp(key):
    return eqx.nn.MLP(4, 2, 8, depth=2, key=key)


def params_of(model):
    return eqx.filter(model, eqx.is_inexact_array)


def loss(model):
    return jnp.sum((model(X) - 1.0) ** 2)


def train(model, optimiser, loss, steps=5):
    """The parameters after each of some steps."""
    state = optimiser.init(params_of(model))
    history = []

    @filter_jit
    def step(model, state):
        grads = eqx.filter_grad(loss)(model)
        updates, state = optimiser.update(grads, state, params_of(model))
        return eqx.apply_updates(model, updates), state

    for _ in range(steps):
        model, state = step(model, state)
        history.append(params_of(model))
    return history


# Decay


@pytest.mark.usefixtures("standard_promotion")
def test_decay_before_adam_is_adam_on_the_penalised_loss(mlp):
    coupled = train(mlp, optax.chain(eqxreg.weight_decay(0.1), optax.adam(1e-2)), loss)
    penalised = train(
        mlp, optax.adam(1e-2), lambda m: loss(m) + eqxreg.l2_penalty(m, 0.1)
    )
    assert_close(coupled, penalised)


def test_sign_decay_is_sgd_on_the_penalised_loss(mlp):
    decayed = train(mlp, optax.chain(eqxreg.sign_decay(0.1), optax.sgd(1e-2)), loss)
    penalised = train(
        mlp, optax.sgd(1e-2), lambda m: loss(m) + eqxreg.l1_penalty(m, 0.1)
    )
    assert_close(decayed, penalised)


@pytest.mark.usefixtures("standard_promotion")
def test_decay_after_adam_is_adamw(mlp):
    decoupled = optax.chain(
        optax.scale_by_adam(),
        eqxreg.weight_decay(0.1, mask=eqxreg.weights),
        optax.scale_by_learning_rate(1e-2),
    )
    adamw = optax.adamw(1e-2, weight_decay=0.1, mask=eqxreg.weights)
    assert_close(train(mlp, decoupled, loss), train(mlp, adamw, loss))


def test_decay_leaves_state_and_bounds_alone(key):
    model = [
        eqx.nn.BatchNorm(4, "batch", mode="batch"),
        eqxreg.MaxNormConstraint(
            eqx.nn.Linear(4, 3, key=key), "weight", jnp.asarray(2.0)
        ),
    ]
    params = params_of(model)
    decay = eqxreg.weight_decay(1.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = decay.update(zeros, decay.init(params), params)
    assert updates[1].max_norm is None
    assert jnp.array_equal(updates[1].weight, params[1].weight)
    assert all(jnp.all(u == 0) for u in jax.tree.leaves(updates[0].batch_state_index))


@pytest.mark.parametrize(
    "rate",
    [0.5, jnp.asarray(0.5), optax.constant_schedule(0.5)],
    ids=["number", "array", "schedule"],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_decay_promotes_nothing(rate, dtype):
    params = {"weight": jnp.asarray([2.0, -4.0], dtype), "none": None}
    zeros = jax.tree.map(jnp.zeros_like, params)
    expected = {eqxreg.weight_decay: [1, -2], eqxreg.sign_decay: [0.5, -0.5]}
    for build, update in expected.items():
        transform = build(rate)
        actual, _ = jit(transform.update)(zeros, transform.init(params), params)
        assert actual["weight"].dtype == dtype
        assert jnp.array_equal(actual["weight"], jnp.asarray(update, dtype))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float64", "complex64", "complex128", "bfloat16"])
def test_a_rate_is_cast_to_the_dtype_of_each_weight(dtype):
    params = {"weight": jnp.asarray([2.0, 4.0], dtype), "kernel": jnp.ones(1, "f4")}
    zeros = jax.tree.map(jnp.zeros_like, params)
    single = jnp.asarray(0.5, "float32")
    for rate in (single, optax.linear_schedule(0.5, 0.5, 1), lambda step: single):
        decay = eqxreg.weight_decay(rate)
        updates, _ = decay.update(zeros, decay.init(params), params)
        assert updates["weight"].dtype == dtype
        assert jnp.array_equal(updates["weight"], jnp.asarray([1.0, 2.0], dtype))


def test_a_rate_may_follow_a_schedule():
    decay = eqxreg.weight_decay(optax.linear_schedule(0.0, 1.0, 2))
    params = {"weight": jnp.asarray([2.0])}
    state, seen = decay.init(params), []
    for _ in range(3):
        updates, state = decay.update({"weight": jnp.zeros(1)}, state, params)
        seen.append(float(updates["weight"][0]))
    assert seen == [0.0, 1.0, 2.0]


def test_hyperparameters_are_injected():
    inject = optax.inject_hyperparams(eqxreg.weight_decay, static_args=("mask",))
    decay = inject(rate=0.5, mask=eqxreg.weights)
    params = {"weight": jnp.asarray([2.0]), "bias": jnp.asarray([2.0])}
    state = decay.init(params)
    state.hyperparams["rate"] = jnp.asarray(0.25)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jit(decay.update)(zeros, state, params)
    assert updates["weight"] == 0.5 and updates["bias"] == 0


# Projection after the update


def norms_of(params):
    weights = eqxreg.trainables(params, eqxreg.weights)
    return np.concatenate([np.sqrt((exact(w) ** 2).sum(-1)).ravel() for w in weights])


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("every", [1, 3])
def test_projection_acts_on_every_kth_step_only(every, mlp):
    projection = eqxreg.project(eqxreg.MaxNorm(0.3, axis="unit"), every=every)
    history = train(mlp, optax.chain(optax.adam(0.1), projection), loss, steps=6)
    free = train(mlp, optax.adam(0.1), loss, steps=6)
    for step, params in enumerate(history, start=1):
        if step % every == 0:
            assert norms_of(params).max() <= 0.3
        elif step < every:
            assert_close(params, free[step - 1])
            assert norms_of(params).max() > 0.3
        else:
            assert norms_of(params).max() > 0.3


def test_steps_between_projections_skip_it(mlp):
    projection = eqxreg.project(eqxreg.MaxNorm(0.3, axis="unit"), every=10)
    params = params_of(mlp)
    state = projection.init(params)
    jaxpr = str(jax.make_jaxpr(projection.update)(params, state, params))
    # The norms are within the branches of one `cond`.
    assert jaxpr.count("custom_jvp_call") > 0
    assert "cond[" in jaxpr
    top = jax.make_jaxpr(projection.update)(params, state, params).jaxpr.eqns
    assert not any(eqn.primitive.name == "custom_jvp_call" for eqn in top)


def test_projection_leaves_what_is_not_selected(mlp):
    projection = eqxreg.project(eqxreg.MaxNorm(0.01, axis="unit"))
    params = params_of(mlp)
    updates = jax.tree.map(jnp.ones_like, params)
    new, _ = projection.update(updates, projection.init(params), params)
    for layer in new.layers:
        assert jnp.array_equal(layer.bias, jnp.ones_like(layer.bias))
        assert not jnp.array_equal(layer.weight, jnp.ones_like(layer.weight))


def test_stacked_layers_are_projected_one_by_one(key):
    mlp = eqx.nn.MLP(4, 2, 8, depth=4, scan=True, key=key)
    projection = eqxreg.project(eqxreg.MaxNorm(0.3))
    params = params_of(mlp)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = projection.update(zeros, projection.init(params), params)
    hidden = optax.apply_updates(params, updates).layers[1].weight
    norms = np.sqrt((exact(hidden) ** 2).sum((1, 2)))
    np.testing.assert_allclose(norms, 0.3, rtol=1e-5)


@pytest.mark.parametrize("dtype, rtol", [("bfloat16", 1e-2), ("float16", 2e-3)])
def test_projection_in_half_precision_keeps_dtype_and_nearly_the_bound(dtype, rtol):
    weight = jnp.linspace(-2.0, 2.0, 32).reshape(4, 8).astype(dtype)
    params = {"weight": weight}
    projection = eqxreg.project(eqxreg.MaxNorm(1.0, axis="unit"))
    small = {"weight": jnp.full_like(weight, 1e-3)}
    updates, _ = jit(projection.update)(small, projection.init(params), params)
    new = optax.apply_updates(params, updates)
    assert updates["weight"].dtype == new["weight"].dtype == dtype
    assert norms_of(new).max() <= 1.0 + rtol
    exactly = eqxreg.project_params(new, eqxreg.MaxNorm(1.0, axis="unit"))
    assert norms_of(exactly).max() <= 1.0


@pytest.mark.usefixtures("standard_promotion")
def test_seeds_under_vmap(key):
    projection = eqxreg.project(eqxreg.MaxNorm(0.3, axis="unit"), every=2)
    optimiser = optax.chain(optax.adam(0.1), projection)

    def run(key):
        mlp = eqx.nn.MLP(4, 2, 8, depth=2, key=key)
        params, static = eqx.partition(mlp, eqx.is_inexact_array)

        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: loss(eqx.combine(p, static)))(params)
            updates, state = optimiser.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = params, optimiser.init(params)
        (params, _), _ = jax.lax.scan(step, carry, length=4)
        return params

    params = jit(jax.vmap(run))(jax.random.split(key, 3))
    assert params.layers[0].weight.shape == (3, 8, 4)
    assert norms_of(params).max() <= 0.3


def test_seeds_under_vmap_skip_projections_together():
    # The simplex, for its loop is in the program only if the projection is.
    projection = eqxreg.project(eqxreg.Simplex(), every=3)
    params = {"weight": jnp.ones((2, 5, 4))}
    state = jax.vmap(projection.init)(params)
    update = jax.vmap(projection.update)
    eqns = jax.make_jaxpr(update)(params, state, params).jaxpr.eqns
    [branch] = [eqn for eqn in eqns if eqn.primitive.name == "cond"]
    assert branch.invars[0].aval.shape == ()
    assert not any(eqn.primitive.name == "while" for eqn in eqns)
    # Seeds may be at different steps; each is projected when it is due.
    state = state._replace(step=jnp.asarray([1, 2]))
    updates, state = jit(update)(params, state, params)
    assert jnp.array_equal(updates["weight"][0], params["weight"][0])
    assert not jnp.array_equal(updates["weight"][1], params["weight"][1])
    assert jnp.array_equal(state.step, jnp.asarray([2, 3]))


def test_a_bound_may_follow_a_schedule():
    bound = optax.linear_schedule(4.0, 1.0, 3)
    projection = eqxreg.project(eqxreg.MaxNorm(bound))
    params = {"weight": jnp.full(4, 10.0)}
    state = projection.init(params)
    update = jit(projection.update)
    for expected in (4.0, 3.0, 2.0, 1.0, 1.0):
        updates, state = update({"weight": jnp.zeros(4)}, state, params)
        norm = jnp.linalg.norm(optax.apply_updates(params, updates)["weight"])
        np.testing.assert_allclose(norm, expected, rtol=1e-5)
    assert update._cache_size() == 1


# Penalties


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
