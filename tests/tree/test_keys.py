"""Names of arrays reach every key that JAX has, in nodes of every class."""

import collections
import dataclasses
import enum
import functools as ft
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import exact


pytestmark = pytest.mark.usefixtures("quick_compilation")


X = jnp.linspace(-1.0, 1.0, 4)
P = eqxreg.MaxNorm(0.3)
ALL = eqxreg.everything


class Colour(enum.Enum):
    RED = 1

    def __lt__(self, other):
        return self.value < other.value


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Struct:
    weight: Any

    def __call__(self, x):
        return self.weight @ x


@jax.tree_util.register_pytree_node_class
class Flat:
    """A node that makes its children anew when it is taken apart, without keys."""

    def __init__(self, weight):
        self.weight = weight

    def tree_flatten(self):
        return ((self.weight,),), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(children[0][0])

    def __call__(self, x):
        return self.weight @ x


class Holder(eqx.Module):
    """A module whose weight is somewhere within."""

    held: Any

    def __call__(self, x):
        if callable(self.held):
            return self.held(x)
        [weight] = jax.tree.leaves(self.held)
        return weight @ x


HELD = {
    "dotted key": (lambda w: {"fc.weight": w}, "held['fc.weight']"),
    "digits": (lambda w: {"0": w}, "held['0']"),
    "int key": (lambda w: {0: w}, "held.0"),
    "negative": (lambda w: {-1: w}, "held[-1]"),
    "tuple key": (lambda w: {(1, "a"): w}, "held[(1, 'a')]"),
    "brackets": (lambda w: {"a]['b": w}, 'held["a][\'b"]'),
    "quotes": (lambda w: {'it\'s "it"': w}, "held['it\\'s \"it\"']"),
    "enum": (lambda w: {Colour.RED: w}, "held[<Colour.RED: 1>]"),
    "empty key": (lambda w: {"": w}, "held['']"),
    "ordered": (lambda w: collections.OrderedDict(weight=w), "held.weight"),
    "default": (lambda w: collections.defaultdict(list, {"0": [w]}), "held['0'].0"),
    "named tuple": (lambda w: Pair(None, w), "held.second"),
    "tuple of dicts": (lambda w: ({"a": {"b.c": w}},), "held.0.a['b.c']"),
    "struct": (lambda w: Struct(w), "held.weight"),
    "partial": (lambda w: jax.tree_util.Partial(jnp.matmul, w), "held.0.0"),
    "flat": (Flat, "held.0.0"),
}


@pytest.mark.parametrize("name", list(HELD))
def test_a_weight_under_any_key_is_constrained_and_baked(name, key):
    build, weight_name = HELD[name]
    weight = jax.random.normal(key, (3, 4))
    model = Holder(build(weight))
    expected = exact(weight) * 0.3 / np.linalg.norm(exact(weight))
    by_hand = eqxreg.Constraint(model, weight_name, P)
    constrained = eqxreg.constrain([model], P, ALL)[0]
    for wrapped in (by_hand, constrained, eqxreg.constrain(by_hand, P, ALL)):
        np.testing.assert_allclose(wrapped(X), expected @ np.asarray(X), rtol=1e-5)
        baked = eqxreg.bake(wrapped)
        assert jax.tree.structure(baked) == jax.tree.structure(model)
        np.testing.assert_allclose(jax.tree.leaves(baked)[0], expected, rtol=1e-5)
    [row] = eqxreg.report(constrained, ALL).rows
    np.testing.assert_allclose(row.norm, 0.3, rtol=1e-5)
    frozen = eqxreg.freeze(model, ALL)
    assert eqxreg.trainables(frozen) == []
    np.testing.assert_allclose(frozen(X), weight @ X, rtol=1e-6)


@pytest.mark.parametrize("name", list(HELD))
def test_the_name_that_constrain_writes_is_the_one_that_is_read(name, key):
    build, weight_name = HELD[name]
    model = Holder(build(jnp.ones((3, 4))))
    if callable(model.held):
        # A node that can be called is wrapped itself.
        return
    wrapped = eqxreg.constrain(model, P, ALL)
    assert wrapped.weight_name == weight_name
    names = eqxreg.select(names=weight_name)
    assert eqxreg.trainables(model, names) == eqxreg.trainables(model)
    assert eqxreg.trainables(wrapped, names) == eqxreg.trainables(model)


@pytest.mark.parametrize(
    "build", [Struct, Flat, ft.partial(jax.tree_util.Partial, jnp.matmul)]
)
def test_a_node_that_is_no_equinox_module_is_a_layer_if_it_can_be_called(build, key):
    weight = jax.random.normal(key, (3, 4))
    expected = exact(weight) * 0.3 / np.linalg.norm(exact(weight))
    for model in (build(weight), [build(weight)]):
        wrapped = jax.tree.leaves(
            eqxreg.constrain(model, P, ALL),
            is_leaf=lambda x: isinstance(x, eqxreg.Constraint),
        )[0]
        assert isinstance(wrapped, eqxreg.Constraint)
        np.testing.assert_allclose(wrapped(X), expected @ np.asarray(X), rtol=1e-5)
    assert eqxreg.select(Struct)([Struct(weight)])[0].weight


@pytest.mark.parametrize("name", ["layers.0.weight", "layers[0].weight"])
def test_digits_of_a_dict_may_be_written_as_an_index(name, key):
    class Blocks(eqx.Module):
        layers: dict

        def __call__(self, x):
            return self.layers["0"](x)

    model = Blocks({"0": eqx.nn.Linear(4, 3, use_bias=False, key=key)})
    wrapped = eqxreg.Constraint(model, name, P)
    assert jnp.linalg.norm(eqxreg.bake(wrapped).layers["0"].weight) <= 0.3
    [row] = eqxreg.report(wrapped).rows
    assert row.map == "MaxNorm(0.3)"


def test_a_flat_dict_is_selected_by_the_names_in_its_keys():
    tree = {"fc.weight": jnp.ones(2), "fc.bias": jnp.ones(1), "fd.bias": jnp.ones(1)}
    paths = lambda where: [p for p, _ in eqxreg.trainables(tree, where, paths=True)]
    assert paths(eqxreg.select(names="fc.weight")) == ["['fc.weight']"]
    assert paths(eqxreg.select(names=["fc"])) == []
    assert paths(eqxreg.select(names="fd.bias", under="fd")) == ["['fd.bias']"]
    assert paths(eqxreg.select(names="fd.bias", under="fc")) == []


# Names of what is not stored


class Computed(eqx.Module):
    raw: jax.Array
    inner: eqx.nn.Linear
    fixed: ClassVar = np.ones((3, 4), "f4")

    @property
    def weight(self):
        return 2 * self.raw

    @property
    def stored(self):
        return self.inner.weight

    @property
    def first(self):
        return self.inner

    def __call__(self, x):
        return self.weight @ x + self.inner(x)


@pytest.fixture
def computed(key):
    raw = jax.random.normal(key, (3, 4))
    return Computed(raw, eqx.nn.Linear(4, 3, key=key))


def test_a_property_that_computes_is_no_weight(computed):
    with pytest.raises(ValueError, match='`weight` of Computed is a property.*"raw"'):
        eqxreg.Constraint(computed, "weight", P)


def test_an_attribute_of_the_class_is_no_weight(computed):
    with pytest.raises(ValueError, match="`fixed` of Computed.*no array of the tree"):
        eqxreg.Constraint(computed, "fixed", P)


@pytest.mark.parametrize("name", ["stored", "first.weight"])
def test_a_property_that_gives_what_is_stored_stands_for_it(name, computed):
    wrapped = eqxreg.Constraint(computed, name, P)
    assert wrapped.weight_name == "inner.weight"
    assert jnp.linalg.norm(eqxreg.bake(wrapped).inner.weight) <= 0.3
    expected = exact(computed.inner.weight)
    expected = expected * 0.3 / np.linalg.norm(expected) + 2 * exact(computed.raw)
    expected = expected @ np.asarray(X) + exact(computed.inner.bias)
    np.testing.assert_allclose(wrapped(X), expected, rtol=1e-5)


def test_an_error_names_what_there_is_in_any_node():
    model = Holder({"fc.weight": jnp.ones((3, 4)), "b": [jnp.ones(2)]})
    text = r"dict has no `fc`. It has \"\['fc.weight'\]\"\."
    with pytest.raises(ValueError, match=text):
        eqxreg.Constraint(model, "held.fc.weight", P)
    text = r'are in "held", as in "held\.b\.0"'
    with pytest.raises(ValueError, match=text):
        eqxreg.Constraint(model, "weight", P)
    # Wrappers are no part of a name.
    mlp = eqx.nn.MLP(4, 2, 8, depth=1, key=jax.random.key(0))
    mlp = eqxreg.freeze(eqxreg.constrain(mlp, P), "layers[0]")
    with pytest.raises(ValueError, match='in "layers", as in "layers.0.weight"'):
        eqxreg.Constraint(mlp, "weight", P)
