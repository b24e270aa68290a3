"""Frozen arrays: nothing that trains a model touches them, and the model computes what
it did."""

import copy
import pickle

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tables import LAYERS, assert_close


pytestmark = pytest.mark.usefixtures("quick_compilation")


X = jnp.linspace(-1.0, 1.0, 4)
FIRST = eqxreg.select(
    eqx.nn.Linear,
    names=("weight", "bias"),
    where=lambda path, layer, array: "layers[0]" in path,
)


@pytest.fixture
def mlp(key):
    return eqx.nn.MLP(4, 2, 8, depth=2, key=key)


def params_of(model):
    return eqx.filter(model, eqx.is_inexact_array)


def paths(model, where=eqxreg.trainable):
    return [path for path, _ in eqxreg.trainables(model, where, paths=True)]


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_a_frozen_layer_computes_what_it_did(case, key):
    layer, state = eqx.nn.make_with_state(case.build)(key)
    frozen = eqxreg.Frozen(layer)

    def call(layer):
        if not case.stateful:
            return layer(*case.inputs)
        # A state may be read once.
        own = jax.tree.map(lambda x: x, state)
        batched = lambda x: layer(x, own)[0]
        return jax.vmap(batched, axis_name="batch")(jnp.stack([case.inputs[0]] * 2))

    assert_close(jax.jit(lambda: call(frozen))(), jax.jit(lambda: call(layer))())
    assert eqxreg.trainables(frozen) == []
    assert eqx.tree_equal(eqxreg.thaw(frozen), layer)


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "complex64", "float8_e4m3fn"]
)
def test_every_dtype_keeps_its_bits(dtype):
    weight = jnp.asarray([[1.5, -0.0], [jnp.inf, 2.0]], dtype)
    if dtype == "complex64":
        weight = weight + 1j * weight[::-1]
    layer = eqx.tree_at(
        lambda layer: layer.weight, eqx.nn.Linear(2, 2, key=jax.random.key(0)), weight
    )
    back = eqxreg.thaw(eqxreg.freeze(layer, eqxreg.weights))
    assert back.weight.dtype == dtype
    assert np.asarray(back.weight).tobytes() == np.asarray(weight).tobytes()


def test_nothing_that_goes_by_floating_arrays_sees_them(mlp):
    frozen = eqxreg.freeze(mlp, FIRST)
    free = [".layers[1].weight", ".layers[1].bias", ".layers[2].weight"]
    assert paths(frozen) == [*free, ".layers[2].bias"]
    assert paths(frozen, eqxreg.everything) == paths(frozen)
    assert paths(frozen, ~eqxreg.biases) == [free[0], free[2]]
    grads = eqx.filter_grad(lambda m: jnp.sum(m(X) ** 2))(frozen)
    assert paths(grads) == paths(frozen)
    moments = optax.adam(1e-3).init(params_of(frozen))[0].mu
    assert len(jax.tree.leaves(moments)) == 4


def test_penalties_leave_them_out(mlp):
    frozen = eqxreg.freeze(mlp, FIRST)
    rest = [a for a in eqxreg.trainables(mlp, ~FIRST)]
    squares = sum(float(np.sum(np.asarray(a, "f8") ** 2)) for a in rest)
    for effective in (False, True):
        actual = eqxreg.l2_penalty(frozen, 2.0, effective=effective)
        np.testing.assert_allclose(actual, squares, rtol=1e-5)


@pytest.mark.usefixtures("standard_promotion")
def test_transforms_leave_them_alone(mlp):
    frozen = eqxreg.freeze(mlp, FIRST)
    optimiser = optax.chain(
        eqxreg.weight_decay(0.1),
        optax.adam(0.1),
        eqxreg.decay_towards(jax.tree.map(lambda x: x, frozen), 0.1),
        eqxreg.soft_threshold(0.1, learning_rate=0.1),
        eqxreg.project(eqxreg.MaxNorm(0.1, axis="unit")),
    )
    params = params_of(frozen)
    grads = eqx.filter_grad(lambda m: jnp.sum(m(X) ** 2))(frozen)
    updates, _ = optimiser.update(grads, optimiser.init(params), params)
    new = eqx.apply_updates(frozen, updates)
    for old, there in zip(mlp.layers, eqxreg.thaw(new).layers, strict=True):
        same = [bool(jnp.array_equal(old.weight, there.weight))]
        same.append(bool(jnp.array_equal(old.bias, there.bias)))
        assert same == [old is mlp.layers[0]] * 2
    projected = eqxreg.project_params(frozen, eqxreg.MaxNorm(0.1))
    assert eqx.tree_equal(projected.layers[0], frozen.layers[0])


def test_a_frozen_array_is_data_and_no_constant(mlp):
    frozen = eqxreg.freeze(mlp, eqxreg.weights)
    traces = []

    @eqx.filter_jit
    def call(model, x):
        traces.append(x)
        return model(x)

    call(frozen, X)
    other = eqxreg.freeze(
        jax.tree.map(lambda a: 2 * a if eqx.is_inexact_array(a) else a, mlp),
        eqxreg.weights,
    )
    assert_close(call(other, X), eqxreg.thaw(other)(X))
    assert len(traces) == 1


def test_frozen_weights_within_wrappers_are_constrained(mlp):
    p = eqxreg.MaxNorm(0.3, axis="unit")
    wrapped = eqxreg.constrain(mlp, p)
    frozen = eqxreg.freeze(wrapped, eqxreg.weights)
    assert paths(frozen, eqxreg.weights) == []
    assert_close(frozen(X), wrapped(X))
    assert eqx.tree_equal(eqxreg.thaw(frozen), wrapped)
    assert eqx.tree_equal(eqxreg.bake(frozen), eqxreg.bake(wrapped))
    around = eqxreg.MaxNormConstraint(
        eqxreg.Frozen(mlp.layers[0]), "weight", 0.3, axis="unit"
    )
    assert jnp.array_equal(eqxreg.bake(around).weight, p(mlp.layers[0].weight))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda layer, key: eqx.nn.WeightNorm(layer),
        lambda layer, key: eqxreg.WeightNormConstraint(layer),
        lambda layer, key: eqxreg.Constraint(layer, "weight", eqxreg.Positive()),
        lambda layer, key: eqxreg.Constraint(layer, "weight", eqxreg.Cayley()),
    ],
    ids=["eqx.nn.WeightNorm", "WeightNorm", "Positive", "Cayley"],
)
@pytest.mark.parametrize("where", [eqxreg.weights, eqxreg.trainable], ids=repr)
def test_a_wrapper_is_frozen_with_its_layer(wrap, where, key):
    layer = eqx.nn.Linear(4, 3, key=key)
    layer = eqx.tree_at(lambda layer: layer.weight, layer, jnp.abs(layer.weight) + 0.1)
    wrapped = wrap(layer, key)
    frozen = eqxreg.freeze({"layer": wrapped}, where)["layer"]
    assert not set(paths(frozen, where))
    assert_close(frozen(X), wrapped(X))
    assert eqx.tree_equal(eqxreg.thaw(frozen), wrapped)
    assert frozen.weight.dtype == jnp.float32


def test_a_map_with_an_inverse_writes_the_frozen_weight(key):
    layer = eqx.nn.Linear(4, 3, key=key)
    layer = eqx.tree_at(lambda layer: layer.weight, layer, jnp.abs(layer.weight) + 0.1)
    frozen = eqxreg.freeze(layer, eqxreg.weights)
    positive = eqxreg.Constraint(frozen, "weight", eqxreg.Positive())
    assert_close(positive(X), layer(X))
    assert paths(positive) == [".layer.layer.bias"]


def test_stateful_wrappers_go_on_within(key):
    build = eqx.nn.make_with_state(eqxreg.SpectralNormConstraint)
    layer, state = build(eqx.nn.Linear(4, 4, key=key), "weight", key=key)
    frozen = eqxreg.freeze(layer, eqxreg.weights)
    assert frozen.is_stateful()
    expected, _ = layer(X, jax.tree.map(lambda x: x, state))
    out, new = frozen(X, state)
    assert_close(out, expected)
    assert isinstance(new, eqx.nn.State)


def test_freezing_twice_wraps_once(mlp):
    once = eqxreg.freeze(mlp, FIRST & eqxreg.weights)
    twice = eqxreg.freeze(once, FIRST)
    assert isinstance(twice.layers[0].layer, eqx.nn.Linear)
    assert paths(twice) == paths(mlp, ~FIRST)
    assert eqx.tree_equal(eqxreg.thaw(twice), mlp)


def test_a_frozen_gain_leaves_the_direction_free(key):
    layer = eqxreg.WeightNormConstraint(eqx.nn.Linear(4, 3, key=key))
    gains = eqxreg.select(names="parametrizations.0.gain")
    frozen = eqxreg.freeze(layer, gains)
    assert paths(frozen) == [".layer.layer.weight", ".layer.layer.bias"]
    assert jnp.array_equal(frozen(X), layer(X))
    outer = eqxreg.MaxNormConstraint(frozen, "weight", 0.3)
    assert jnp.linalg.norm(eqxreg.bake(outer).weight) <= 0.3


def test_stacked_layers_are_frozen_together(key):
    mlp = eqx.nn.MLP(4, 2, 8, depth=4, scan=True, key=key)
    frozen = eqxreg.freeze(mlp, eqxreg.weights)
    assert_close(eqx.filter_jit(frozen)(X), eqx.filter_jit(mlp)(X))
    keys = jax.random.split(key, 3)
    ensemble = eqx.filter_vmap(lambda key: eqxreg.Frozen(eqx.nn.Linear(4, 3, key=key)))(
        keys
    )
    out = eqx.filter_vmap(lambda layer: layer(X))(ensemble)
    assert out.shape == (3, 3)
    assert eqxreg.trainables(ensemble) == []


class Tied(eqx.Module):
    shared: eqx.nn.Shared

    def __init__(self, key):
        embedding = eqx.nn.Embedding(5, 4, key=key)
        linear = eqx.nn.Linear(4, 5, use_bias=False, key=key)
        self.shared = eqx.nn.Shared(
            (embedding, linear),
            lambda pair: pair[1].weight,
            lambda pair: pair[0].weight,
        )

    def __call__(self, token):
        embedding, linear = self.shared()
        return linear(embedding(token))


def test_a_tied_array_is_frozen_in_both_places(key):
    model = Tied(key)
    frozen = eqxreg.freeze(model, eqxreg.embeddings)
    assert eqxreg.trainables(frozen) == []
    assert jnp.array_equal(frozen(jnp.asarray(2)), model(jnp.asarray(2)))
    assert eqx.tree_equal(eqxreg.thaw(frozen), model)


def test_attributes_read_as_floating_arrays(key):
    attention = eqx.nn.MultiheadAttention(2, 4, key=key)
    frozen = eqxreg.Frozen(attention)
    assert eqx.tree_equal(frozen.query_proj, attention.query_proj)
    assert frozen.num_heads == 2
    with pytest.raises(AttributeError, match="nothing"):
        _ = frozen.nothing


def test_a_frozen_layer_is_copied_saved_and_compared(tmp_path, mlp):
    frozen = eqxreg.freeze(mlp, eqxreg.weights)
    layer = frozen.layers[0]
    assert eqx.tree_equal(copy.deepcopy(layer), layer)
    assert eqx.tree_equal(pickle.loads(pickle.dumps(layer)), layer)
    assert not eqx.tree_equal(eqxreg.Frozen(mlp.layers[0]), layer)
    path = tmp_path / "model.eqx"
    eqx.tree_serialise_leaves(path, frozen)
    other = eqxreg.freeze(
        eqx.nn.MLP(4, 2, 8, depth=2, key=jax.random.key(1)), eqxreg.weights
    )
    loaded = eqx.tree_deserialise_leaves(path, other)
    assert jnp.array_equal(loaded(X), mlp(X))


def test_selecting_nothing_is_an_error(mlp):
    with pytest.raises(ValueError, match="selects nothing"):
        eqxreg.freeze(mlp, eqxreg.embeddings)
    frozen = eqxreg.freeze(mlp, eqxreg.weights)
    with pytest.raises(ValueError, match="selects nothing"):
        eqxreg.freeze(frozen, eqxreg.weights)
    with pytest.raises(ValueError, match="selects nothing"):
        eqxreg.Frozen(mlp.layers[0], eqxreg.embeddings)
    with pytest.raises(ValueError, match="in no module"):
        eqxreg.freeze({"weight": jnp.ones(2)}, eqxreg.weights)


def test_thawing_what_is_not_frozen_changes_nothing(mlp):
    assert eqx.tree_equal(eqxreg.thaw(mlp), mlp)


def test_state_and_bounds_cannot_be_frozen(key):
    norm = eqx.nn.BatchNorm(4, "batch", mode="batch")
    bound = eqxreg.MaxNormConstraint(
        eqx.nn.Linear(4, 3, key=key), "weight", jnp.asarray(2.0)
    )
    frozen = eqxreg.freeze([norm, bound], eqxreg.everything)
    assert paths(frozen) == []
    assert frozen[1].max_norm.dtype == jnp.float32
    assert frozen[1].layer.parametrizations[0].max_norm == 2.0
