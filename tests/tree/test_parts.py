"""Parts of a model, by path and by a function; selectors are pickled and compared."""

import pickle

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest


pytestmark = pytest.mark.usefixtures("quick_compilation")


X = jnp.linspace(-1.0, 1.0, 4)
P = eqxreg.MaxNorm(0.3)


def paths(tree, where=eqxreg.trainable):
    return [path for path, _ in eqxreg.trainables(tree, where, paths=True)]


@pytest.fixture
def mlp(key):
    return eqx.nn.MLP(4, 2, 8, depth=11, key=key)


# Paths


@pytest.mark.parametrize(
    "where",
    [
        "layers[1]",
        ".layers[1]",
        "layers.1",
        ["layers[1].weight", "layers.1.bias"],
        lambda m: m.layers[1],
        lambda m: [m.layers[1].weight, m.layers[1].bias],
        eqxreg.trainable.under("layers[1]"),
        eqxreg.select(names=("weight", "bias"), under="layers[1]"),
    ],
)
def test_all_arrays_at_a_path_are_frozen(where, mlp):
    frozen = eqxreg.freeze(mlp, where)
    there = [".layers[1].weight", ".layers[1].bias"]
    assert paths(frozen) == [path for path in paths(mlp) if path not in there]
    assert type(frozen.layers[1]) is eqxreg.Frozen
    assert jnp.array_equal(frozen(X), mlp(X))


def test_a_path_goes_through_wrappers(mlp):
    wrapped = eqxreg.constrain(mlp, P)
    for path in ("layers[1].weight", "layers[1].layer.weight"):
        frozen = eqxreg.freeze(wrapped, path)
        assert len(paths(frozen)) == len(paths(mlp)) - 1
        np.testing.assert_allclose(frozen(X), wrapped(X), rtol=1e-6)
    assert paths(eqxreg.Frozen(mlp.layers[0], "weight")) == [".layer.bias"]


def test_a_path_that_leads_nowhere_is_told(mlp):
    text = r"`where='layrs'` selects nothing. It has `.layers\[0\].weight`"
    with pytest.raises(ValueError, match=text):
        eqxreg.freeze(mlp, "layrs")
    with pytest.raises(ValueError, match=r"`where='layers\[12\]'` selects nothing"):
        eqxreg.freeze(mlp, ["layers[0]", "layers[12]"])
    with pytest.raises(ValueError, match="selects nothing"):
        eqxreg.freeze(mlp, lambda m: m.activation)


def test_select_under_a_path_narrows_what_is_selected(mlp):
    select = eqxreg.select
    assert paths(mlp, select(under="layers[1]")) == [".layers[1].weight"]
    assert paths(mlp, select(names="bias", under=["layers[1]", "layers[11]"])) == [
        ".layers[1].bias",
        ".layers[11].bias",
    ]
    assert paths(mlp, eqxreg.biases.under("layers[1]", "layers[11].bias")) == [
        ".layers[1].bias",
        ".layers[11].bias",
    ]
    assert paths({"a": mlp}, select(under="a.layers.2")) == ["['a'].layers[2].weight"]
    wrapped = eqxreg.constrain(mlp, P, select(under="layers[1]"))
    kinds = [type(layer) is eqxreg.Constraint for layer in wrapped.layers]
    assert kinds == [i == 1 for i in range(12)]


def test_a_path_or_a_part_where_weights_are_meant_names_the_remedy(mlp):
    text = r"`eqxreg.weights.under\('layers\[0\]'\)`.*trainable.under"
    with pytest.raises(TypeError, match=text):
        eqxreg.constrain(mlp, P, "layers[0]")
    with pytest.raises(TypeError, match="A function .*returned Linear.*weights.under"):
        eqxreg.constrain(mlp, P, lambda m: m.layers[0])
    with pytest.raises(TypeError, match="returned MLP"):
        eqxreg.l2_penalty(mlp, 1.0, where=lambda m: jax.tree.map(lambda _: 1, m))
    with pytest.raises(ValueError, match="must have the structure of the model"):
        eqxreg.freeze(mlp, [True, False])
    for ones in (jax.tree.map(lambda _: 1, mlp), {"a": np.float32(1)}, 1):
        for act in (eqxreg.freeze, lambda m, where: eqxreg.constrain(m, P, where)):
            with pytest.raises(
                TypeError, match="must be one of booleans.*tree.map.boo"
            ):
                act(mlp, ones)
    for nothing in ("", [], ["layers", "."]):
        with pytest.raises(ValueError, match="`under` must be a string such as"):
            eqxreg.select(under=nothing)


def test_errors_about_a_single_array_have_no_empty_path():
    with pytest.raises(ValueError, match="It is a single array, which has no name"):
        eqxreg.project_params(jnp.ones(2), P)
    with pytest.raises(ValueError, match="^the array itself: "):
        eqxreg.project_params(jnp.ones(2), eqxreg.SpectralCap(), eqxreg.everything)
    with pytest.raises(ValueError, match="has no `weight`. It has no arrays.$"):
        eqxreg.Constraint(jnp.ones(2), "weight", P)


# Pickled selectors


def is_square(path, layer, array):
    return array.shape[0] == array.shape[1]


SELECTORS = {
    **{
        name: getattr(eqxreg, name)
        for name in (
            "weights",
            "biases",
            "norm_parameters",
            "embeddings",
            "trainable",
            "everything",
            "scale_invariant",
        )
    },
    "select": eqxreg.select(
        eqx.nn.Linear, names=["weight"], under="layers", where=is_square
    ),
    "under": eqxreg.weights.under("layers[0]", "layers[1]"),
    "combined": (eqxreg.weights | eqxreg.biases) & ~eqxreg.select(under="layers[0]"),
}


@pytest.mark.parametrize("name", list(SELECTORS))
def test_a_selector_is_pickled_and_compared(name, mlp):
    selector = SELECTORS[name]
    copy = pickle.loads(pickle.dumps(selector))
    assert copy == selector and hash(copy) == hash(selector)
    assert repr(copy) == repr(selector)
    model = [eqx.nn.LayerNorm(4), eqx.nn.Embedding(2, 3, key=jax.random.key(0)), mlp]
    for tree in (mlp, model):
        assert eqx.tree_equal(copy(tree), selector(tree))
    others = [s for other, s in SELECTORS.items() if other != name]
    assert all(selector != other for other in others)
