"""Every layer that owns a weight: it wraps, and what a layer can do, it still can."""

import copy
import io
import pickle

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import filter_jit
from tables import LAYERS, assert_close, exact


pytestmark = pytest.mark.usefixtures("quick_compilation")

each_layer = pytest.mark.parametrize("case", LAYERS, ids=str)
BOUND = 0.4


def build(case, key):
    """The plain layer, the wrapped one, and a function that calls either."""
    layer, state = eqx.nn.make_with_state(case.build)(key)
    p = eqxreg.MaxNorm(BOUND, axis=None)

    def call(layer, *inputs):
        if not case.stateful:
            return layer(*inputs)
        # A state may be used once; a copy may be used again.
        fresh = jax.tree.map(lambda x: x, state)
        batched = jax.vmap(lambda x: layer(x, fresh)[0], axis_name="batch")
        return batched(jnp.stack([*inputs, 1 - inputs[0] ** 2]))

    return layer, eqxreg.Constraint(layer, case.weight_name, p), call


def weights_of(case, layer):
    names = case.weight_name
    for name in (names,) if isinstance(names, str) else names:
        node = layer
        for step in name.replace("[", ".").replace("]", "").split("."):
            if isinstance(node, tuple):
                node = node[int(step)]
            else:
                node = node[step] if isinstance(node, dict) else getattr(node, step)
        yield node


@each_layer
def test_the_layer_computes_with_the_constrained_weight(case, key):
    layer, wrapped, call = build(case, key)
    # An independent way to the same: project in numpy, and put the weight back.
    for weight in weights_of(case, layer):
        norm = np.sqrt((exact(weight) ** 2).sum())
        scaled = exact(weight) * min(1.0, BOUND / norm)
        layer = _replace(layer, weight, jnp.asarray(scaled, weight.dtype))
    expected = call(layer, *case.inputs)
    actual = filter_jit(call)(wrapped, *case.inputs)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert_close(actual, expected, 1e-4)


def _replace(tree, old, new):
    return jax.tree.map(lambda leaf: new if leaf is old else leaf, tree)


@each_layer
def test_bake_gives_the_plain_layer_that_computes_the_same(case, key):
    layer, wrapped, call = build(case, key)
    baked = eqxreg.bake(wrapped)
    assert jax.tree.structure(baked) == jax.tree.structure(layer)
    assert eqx.tree_equal(eqxreg.bake(baked), baked)
    for weight in weights_of(case, baked):
        assert np.sqrt((exact(weight) ** 2).sum()) <= BOUND
    run = filter_jit(call)
    assert_close(run(wrapped, *case.inputs), run(baked, *case.inputs))


@each_layer
def test_gradients_flow_through_the_map(case, key):
    _, wrapped, call = build(case, key)

    @filter_jit
    @eqx.filter_grad
    def gradient(layer):
        outputs = [x.ravel() for x in jax.tree.leaves(call(layer, *case.inputs))]
        return sum(x @ jnp.arange(1.0, x.size + 1) for x in outputs)

    grads = gradient(wrapped)
    for raw, grad in zip(
        weights_of(case, wrapped.layer), weights_of(case, grads.layer), strict=True
    ):
        assert jnp.all(jnp.isfinite(grad)) and jnp.any(grad != 0)
        if np.sqrt((exact(raw) ** 2).sum()) > BOUND:
            # Tangential: the norm of a weight that is too long does not matter.
            along = np.sum(exact(raw) * exact(grad))
            assert abs(along) <= 1e-3 * np.linalg.norm(grad) * np.linalg.norm(raw)


@each_layer
def test_a_wrapped_layer_vmaps_over_its_input(case, key):
    if case.stateful:
        pytest.skip("its batch axis is named, and is tested above")
    _, wrapped, call = build(case, key)
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), case.inputs)
    outputs = filter_jit(jax.vmap(lambda *x: call(wrapped, *x)))(*batch)
    second = jax.tree.map(lambda x: x[1], outputs)
    assert_close(second, call(wrapped, *case.inputs))


@each_layer
def test_a_wrapped_layer_is_saved_and_copied(case, key):
    _, wrapped, _ = build(case, key)
    assert copy.copy(wrapped) == wrapped
    # Compiled activation functions can neither be pickled nor be compared to a copy.
    if case.name not in ("Sequential", "MLP"):
        assert copy.deepcopy(wrapped) == wrapped
        assert pickle.loads(pickle.dumps(wrapped)) == wrapped
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, wrapped)
    file.seek(0)
    blank = jax.tree.map(lambda x: x * 0 if eqx.is_array(x) else x, wrapped)
    assert eqx.tree_deserialise_leaves(file, blank) == wrapped


@pytest.mark.parametrize(
    "case", [case for case in LAYERS if not case.name.endswith(("1d", "3d"))], ids=str
)
def test_an_ensemble_is_constrained_layer_by_layer(case, key):
    keys = jax.random.split(key, 3)
    p = eqxreg.MaxNorm(BOUND)

    def make(key):
        layer, _ = eqx.nn.make_with_state(case.build)(key)
        return layer

    def make_wrapped(key):
        return eqxreg.Constraint(make(key), case.weight_name, p)

    inside = eqx.filter_vmap(make_wrapped)(keys)
    stacks = [eqxreg.bake(inside)]
    if case.name not in ("own", "PReLU"):
        # Of Equinox's layers we know the rank, so that wrapping a stack works too.
        stack = eqx.filter_vmap(make)(keys)
        stacks.append(eqxreg.bake(eqxreg.Constraint(stack, case.weight_name, p)))
    for i, key in enumerate(keys):
        one = list(weights_of(case, eqxreg.bake(make_wrapped(key))))
        for baked in stacks:
            for weight, expected in zip(weights_of(case, baked), one, strict=True):
                np.testing.assert_allclose(weight[i], expected, rtol=1e-5)
