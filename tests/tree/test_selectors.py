"""Which arrays selectors take, on every kind of tree that a model becomes."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import filter_jit
from tables import assert_close


pytestmark = pytest.mark.usefixtures("quick_compilation")


class Tied(eqx.Module):
    shared: eqx.nn.Shared

    def __init__(self, key):
        embedding = eqx.nn.Embedding(7, 4, key=key)
        linear = eqx.nn.Linear(4, 7, key=key)
        self.shared = eqx.nn.Shared(
            (embedding, linear),
            lambda pair: pair[1].weight,
            lambda pair: pair[0].weight,
        )

    def __call__(self, token):
        embedding, linear = self.shared()
        return linear(embedding(token))


class RootMeanSquareNorm(eqx.Module):
    weight: jax.Array
    bias: jax.Array

    def __init__(self):
        self.weight, self.bias = jnp.ones(4), jnp.zeros(4)

    def __call__(self, x):
        return self.weight * x / jnp.sqrt(jnp.mean(x**2)) + self.bias


class Model(eqx.Module):
    """One of everything."""

    embedding: eqx.nn.Embedding
    linear: eqx.nn.Linear
    conv: eqx.nn.Conv2d
    transposed: eqx.nn.ConvTranspose1d
    cell: eqx.nn.GRUCell
    attention: eqx.nn.MultiheadAttention
    norms: list
    slope: eqx.nn.PReLU
    normed: eqx.nn.WeightNorm
    ours: eqxreg.WeightNormConstraint
    bounded: eqxreg.Constraint
    spectral: eqx.nn.SpectralNorm
    weight_table: jax.Array
    out_kernel: jax.Array
    out_bias: jax.Array
    scale: jax.Array
    index: jax.Array
    activation: object

    def __init__(self, key):
        self.embedding = eqx.nn.Embedding(5, 4, key=key)
        self.linear = eqx.nn.Linear(4, 3, key=key)
        self.conv = eqx.nn.Conv2d(1, 2, 3, key=key)
        self.transposed = eqx.nn.ConvTranspose1d(1, 2, 3, key=key)
        self.cell = eqx.nn.GRUCell(4, 3, key=key)
        self.attention = eqx.nn.MultiheadAttention(2, 4, use_query_bias=True, key=key)
        self.norms = [
            eqx.nn.LayerNorm(4),
            eqx.nn.RMSNorm(4),
            eqx.nn.GroupNorm(2, 4),
            eqx.nn.BatchNorm(4, "batch", mode="batch"),
            RootMeanSquareNorm(),
        ]
        self.slope = eqx.nn.PReLU()
        self.normed = eqx.nn.WeightNorm(eqx.nn.Linear(4, 3, key=key))
        self.ours = eqxreg.WeightNormConstraint(eqx.nn.Linear(4, 3, key=key))
        self.bounded = eqxreg.MaxNormConstraint(
            eqx.nn.Linear(4, 3, key=key), "weight", jnp.asarray(2.0)
        )
        self.spectral = eqx.nn.SpectralNorm(
            eqx.nn.Linear(4, 3, key=key), "weight", key=key
        )
        self.weight_table = jnp.ones((2, 2))
        self.out_kernel = jnp.ones((2, 2))
        self.out_bias = jnp.ones(2)
        self.scale = jnp.ones(2)
        self.index = jnp.arange(3)
        self.activation = jax.nn.relu


WEIGHTS = {
    ".linear.weight",
    ".conv.weight",
    ".transposed.weight",
    ".cell.weight_ih",
    ".cell.weight_hh",
    ".attention.query_proj.weight",
    ".attention.key_proj.weight",
    ".attention.value_proj.weight",
    ".attention.output_proj.weight",
    ".normed.layer.weight",
    ".ours.layer.weight",
    ".bounded.layer.weight",
    ".spectral.layer.weight",
    ".weight_table",
    ".out_kernel",
}


@pytest.fixture
def model(key):
    # With the state still in it: nothing may take that for weights.
    return Model(key)


def chosen(selector, tree):
    leaves = jax.tree_util.tree_leaves_with_path(selector(tree))
    return {jax.tree_util.keystr(path) for path, leaf in leaves if leaf}


def forms(model):
    """What becomes of a model in training."""
    params = eqx.filter(model, eqx.is_inexact_array)
    yield "model", model
    yield "params", params
    yield "gradient", jax.tree.map(jnp.zeros_like, params)
    yield "shapes", eqx.filter_eval_shape(lambda: params)
    yield "moments", optax.scale_by_adam().init(params).mu


def test_weights_are_the_weights_in_every_form_of_a_model(model):
    for name, tree in forms(model):
        assert chosen(eqxreg.weights, tree) == WEIGHTS, name
        mask = eqxreg.weights(tree)
        assert jax.tree.structure(mask) == jax.tree.structure(tree), name


def test_the_other_ready_selectors(model):
    norms = {f".norms[{i}].weight" for i in range(5)}
    shifts = {f".norms[{i}].bias" for i in (0, 1, 2, 3, 4)}
    assert chosen(eqxreg.norm_parameters, model) == norms | shifts
    biases = chosen(eqxreg.biases, model)
    assert shifts < biases
    assert {".linear.bias", ".cell.bias", ".cell.bias_n", ".out_bias"} < biases
    assert not any("weight" in path for path in biases)
    assert chosen(eqxreg.embeddings, model) == {".embedding.weight"}
    floating = eqx.filter(model, eqx.is_inexact_array)
    assert len(chosen(eqxreg.everything, model)) == len(jax.tree.leaves(floating))
    left_out = chosen(eqxreg.everything, model) - chosen(eqxreg.trainable, model)
    assert all("uv_index" in p or "_state_index" in p for p in left_out)
    assert not any("max_norm" in path for path in chosen(eqxreg.everything, model))
    assert ".ours.parametrizations[0].gain" not in left_out


def test_selectors_combine(model):
    weights, biases = chosen(eqxreg.weights, model), chosen(eqxreg.biases, model)
    assert chosen(eqxreg.weights | eqxreg.biases, model) == weights | biases
    linear = eqxreg.select(eqx.nn.Linear)
    convs = eqxreg.select(eqx.nn.Conv, eqx.nn.ConvTranspose)
    assert chosen(linear & convs, model) == set()
    assert chosen(eqxreg.weights & ~linear & ~convs, model) == {
        ".cell.weight_ih",
        ".cell.weight_hh",
        ".weight_table",
        ".out_kernel",
    }
    # The complement is among trainable arrays: no state, no bounds.
    complement = chosen(~eqxreg.weights, model)
    assert complement == chosen(eqxreg.trainable, model) - weights


def test_select_by_type_name_and_predicate(model):
    select = eqxreg.select
    assert chosen(select(), model) == WEIGHTS
    assert chosen(select(eqx.nn.Conv), model) == {".conv.weight"}
    assert chosen(select(eqx.nn.Embedding), model) == {".embedding.weight"}
    assert chosen(select(eqx.nn.LayerNorm), model) == {".norms[0].weight"}
    attention = chosen(select(eqx.nn.MultiheadAttention), model)
    assert attention == {p for p in WEIGHTS if "attention" in p}
    assert chosen(select(eqx.nn.GRUCell, names="weight_hh"), model) == {
        ".cell.weight_hh"
    }
    assert chosen(select(eqx.nn.GRUCell, names=["bias", "bias_n"]), model) == {
        ".cell.bias",
        ".cell.bias_n",
    }
    query = select(eqx.nn.MultiheadAttention, names="query_proj.weight")
    assert chosen(query, model) == {".attention.query_proj.weight"}

    def narrow(path, layer, array):
        return path.startswith(".linear") and layer.in_features == 4 and array.ndim == 2

    assert chosen(select(eqx.nn.Linear, where=narrow), model) == {".linear.weight"}


def test_names_do_not_change_by_wrapping(model):
    query = eqxreg.select(eqx.nn.MultiheadAttention, names="query_proj.weight")
    wrapped = eqxreg.constrain(model.attention, eqxreg.MaxNorm(1.0))
    assert chosen(query, wrapped) == {".query_proj.layer.weight"}


def test_plain_trees_are_selected_by_their_keys():
    tree = {
        "weight": jnp.ones(2),
        "bias": jnp.ones(2),
        "inner": [{"kernel": jnp.ones(1)}],
    }
    assert chosen(eqxreg.weights, tree) == {"['weight']", "['inner'][0]['kernel']"}
    assert chosen(eqxreg.biases, tree) == {"['bias']"}
    assert chosen(eqxreg.trainable, jnp.ones(3)) == {""}


@pytest.mark.usefixtures("standard_promotion")
def test_masks_within_optax(model):
    params = eqx.filter(model, eqx.is_inexact_array)
    zeros = jax.tree.map(jnp.zeros_like, params)
    decayed = {
        "masked": optax.masked(optax.add_decayed_weights(1.0), eqxreg.weights),
        "adamw": optax.adamw(1.0, weight_decay=1.0, mask=eqxreg.weights),
        "partition": optax.partition(
            {True: optax.add_decayed_weights(1.0), False: optax.set_to_zero()},
            eqxreg.weights,
        ),
        "ours within": optax.masked(eqxreg.weight_decay(1.0), eqxreg.weights),
        "ours": eqxreg.weight_decay(1.0, mask=eqxreg.weights),
    }
    params = jax.tree.map(lambda x: x + 2, params)
    for name, transform in decayed.items():
        updates, _ = transform.update(zeros, transform.init(params), params)
        leaves = jax.tree_util.tree_leaves_with_path(updates)
        moved = {jax.tree_util.keystr(path) for path, u in leaves if jnp.any(u != 0)}
        assert moved == WEIGHTS, name


def test_trainables_lists_tied_arrays_once_and_differentiates(key):
    shared = jnp.ones(3)
    tree = {"a": shared, "b": [shared, jnp.zeros(2)], "n": jnp.arange(2), "f": jnp.tanh}
    assert [p for p, _ in eqxreg.trainables(tree, paths=True)] == ["['a']", "['b'][1]"]
    tied = Tied(key)
    paths = [path for path, _ in eqxreg.trainables(tied, paths=True)]
    assert paths == [".shared.pytree[0].weight", ".shared.pytree[1].bias"]

    def loss(model):
        return sum(jnp.sum(w**2) for w in eqxreg.trainables(model)) / 2

    grads = filter_jit(eqx.filter_grad(loss))(tied)
    for grad, weight in zip(
        eqxreg.trainables(grads), eqxreg.trainables(tied), strict=True
    ):
        np.testing.assert_allclose(grad, weight)


def test_tied_weights_are_constrained_together(key):
    model = Tied(key)
    p = eqxreg.MaxNorm(0.5, axis="unit")
    wrapped = eqxreg.constrain(model, p, where=eqxreg.embeddings)
    embedding = p(model.shared.pytree[0].weight)
    bias = model.shared.pytree[1].bias
    expected = embedding @ embedding[2] + bias
    assert_close(wrapped(jnp.asarray(2)), expected)
    baked = eqxreg.bake(wrapped)
    assert jax.tree.structure(baked) == jax.tree.structure(model)
    assert_close(baked(jnp.asarray(2)), expected)


def test_selectors_print_as_what_they_are():
    assert repr(eqxreg.weights & ~eqxreg.select(eqx.nn.Conv)) == (
        "(eqxreg.weights & ~eqxreg.select(Conv))"
    )
