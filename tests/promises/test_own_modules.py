"""What a module of one's own is taken for: by its type, its names and what it says of
itself, and on nothing else."""

from typing import ClassVar

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import exact


pytestmark = pytest.mark.usefixtures("quick_compilation")


X = jnp.linspace(-1.0, 1.0, 4)
P = eqxreg.MaxNorm(0.3, axis="unit")


def paths(tree, where=eqxreg.weights):
    return [path for path, _ in eqxreg.trainables(tree, where, paths=True)]


def capped(weight, bound=0.3):
    """The rows of a weight, shortened in numpy."""
    weight = np.asarray(weight, "f8")
    norms = np.sqrt((weight**2).sum(-1, keepdims=True))
    return weight * np.minimum(1, bound / norms)


# Wrappers


class DoublesThenActs(eqx.Module):
    """A wrapper that does more than rewrite a weight, and says nothing."""

    layer: eqx.nn.Linear
    weight_name: str = eqx.field(static=True)

    def __call__(self, x):
        weight = 2 * getattr(self.layer, self.weight_name)
        layer = eqx.tree_at(lambda m: getattr(m, self.weight_name), self.layer, weight)
        return layer(jax.nn.relu(x))


class Doubles(DoublesThenActs):
    rewrites_weight: ClassVar[bool] = True

    def __call__(self, x):
        weight = 2 * getattr(self.layer, self.weight_name)
        where = lambda m: getattr(m, self.weight_name)
        return eqx.tree_at(where, self.layer, weight)(x)


class DoublesAndNegates(Doubles):
    def __call__(self, x):
        return -super().__call__(x)


class NotTrue(eqx.Module):
    layer: eqx.nn.Linear
    weight_name: str = eqx.field(static=True)
    rewrites_weight: ClassVar[bool] = True

    def __call__(self, x):
        return jnp.sum(self.layer(x))


class WithoutFields(eqx.Module):
    weight: jax.Array
    rewrites_weight: ClassVar[bool] = True

    def __call__(self, x):
        return self.weight @ x


class NormalisedThenRelu(eqx.nn.WeightNorm):
    def __call__(self, x, *, key=None):
        return jax.nn.relu(super().__call__(x))


class NonNegativeThenRelu(eqxreg.Constraint):
    def __call__(self, x, *, key=None):
        return jax.nn.relu(super().__call__(x))


@pytest.fixture
def linear(key):
    return eqx.nn.Linear(4, 3, key=key)


@pytest.mark.parametrize(
    "build",
    [
        lambda layer: DoublesThenActs(layer, "weight"),
        lambda layer: DoublesAndNegates(layer, "weight"),
        NormalisedThenRelu,
        lambda layer: NonNegativeThenRelu(layer, "weight", P),
    ],
    ids=["own", "subclass of a wrapper", "subclass of Equinox's", "subclass of ours"],
)
def test_a_wrapper_that_does_more_keeps_what_it_does(build, linear):
    wrapper = build(linear)
    expected = wrapper(X)
    np.testing.assert_allclose(eqxreg.bake(wrapper)(X), expected, rtol=1e-6)
    assert type(eqxreg.bake(wrapper)) is type(wrapper)
    frozen = eqxreg.freeze([wrapper], eqxreg.biases)[0]
    np.testing.assert_allclose(frozen(X), expected, rtol=1e-6)
    assert eqx.tree_equal(eqxreg.thaw(frozen), wrapper)


def test_the_layer_in_a_foreign_wrapper_is_constrained_in_place(linear):
    wrapped = eqxreg.constrain(DoublesThenActs(linear, "bias"), P)
    assert type(wrapped.layer) is eqxreg.Constraint
    weight, bias = capped(linear.weight), 2 * exact(linear.bias)
    expected = weight @ np.maximum(np.asarray(X), 0) + bias
    np.testing.assert_allclose(wrapped(X), expected, rtol=1e-5)


def test_a_wrapper_that_says_that_it_only_rewrites_is_evaluated(linear):
    wrapper = Doubles(linear, "weight")
    assert type(eqxreg.bake(wrapper)) is eqx.nn.Linear
    np.testing.assert_allclose(eqxreg.bake(wrapper).weight, 2 * linear.weight)
    outer = eqxreg.constrain(wrapper, P)
    assert type(outer) is eqxreg.Constraint
    expected = capped(2 * exact(linear.weight))
    np.testing.assert_allclose(eqxreg.bake(outer).weight, expected, rtol=1e-5)
    expected = expected @ np.asarray(X) + exact(linear.bias)
    np.testing.assert_allclose(outer(X), expected, rtol=1e-5)


def test_a_wrapper_that_says_so_wrongly_is_told(linear):
    with pytest.raises(TypeError, match="`NotTrue` has `rewrites_weight = True`.*noth"):
        eqxreg.bake(NotTrue(linear, "weight"))
    with pytest.raises(
        TypeError, match="`WithoutFields`.*lacks `layer`, `weight_name`"
    ):
        eqxreg.bake(WithoutFields(linear.weight))


# Layers and normalisations


class Conv2dMaxNorm(eqx.nn.Conv2d):
    """What EEGNet's implementations call it."""


class LinearNorm(eqx.nn.Linear):
    pass


class _Scaled(eqx.Module):
    weight: jax.Array
    bias: jax.Array

    def __init__(self):
        self.weight, self.bias = jnp.ones((3, 4)), jnp.ones(3)

    def __call__(self, x):
        return self.weight @ x + self.bias


class LayerNorm2d(_Scaled):
    pass


class BatchNormalization(_Scaled):
    pass


class MaxNormDense(_Scaled):
    pass


class DenseMaxNorm(_Scaled):
    pass


class ConvNorm(_Scaled):
    pass


class SpectralNorm(_Scaled):
    pass


@pytest.mark.parametrize(
    "build",
    [
        lambda key: Conv2dMaxNorm(2, 3, 3, key=key),
        lambda key: LinearNorm(4, 3, key=key),
        *(lambda key, c=c: c() for c in (MaxNormDense, DenseMaxNorm, ConvNorm)),
        lambda key: SpectralNorm(),
    ],
    ids=["Conv2d", "Linear", "MaxNormDense", "DenseMaxNorm", "ConvNorm", "Spectral"],
)
def test_a_layer_is_one_whatever_its_name_ends_in(build, key):
    layer = build(key)
    assert paths(layer) == [".weight"]
    assert paths(layer, eqxreg.biases) == [".bias"]
    assert paths(layer, eqxreg.norm_parameters) == []


@pytest.mark.parametrize("cls", [LayerNorm2d, BatchNormalization])
def test_a_normalisation_of_ones_own_is_told_by_its_name(cls):
    assert paths(cls()) == []
    assert paths(cls(), eqxreg.norm_parameters) == [".weight", ".bias"]


# Several arrays


class Several(eqx.Module):
    weights: list[jax.Array]
    kernels: tuple[jax.Array, ...]
    biases: list[jax.Array]
    conv_weights: dict[str, jax.Array]
    embeddings: jax.Array
    table: list[jax.Array]

    def __init__(self):
        self.weights = [jnp.eye(4), 2 * jnp.eye(4)]
        self.kernels = (jnp.eye(4),)
        self.biases = [jnp.zeros(4)]
        self.conv_weights = {"first": jnp.eye(4), "bias": jnp.ones(4)}
        self.embeddings = jnp.ones((2, 4))
        self.table = [jnp.ones(4)]

    def __call__(self, x):
        for weight in self.weights:
            x = weight @ x
        return self.conv_weights["first"] @ self.kernels[0] @ x + self.biases[0]


def test_arrays_in_lists_and_dicts_are_what_their_field_is_called():
    several = [
        ".weights[0]",
        ".weights[1]",
        ".kernels[0]",
        ".conv_weights['first']",
    ]
    assert paths(Several()) == several
    assert paths(Several(), eqxreg.biases) == [".biases[0]", ".conv_weights['bias']"]
    assert paths(Several(), eqxreg.embeddings) == [".embeddings"]
    plain = {"weights": [jnp.ones(2)], "embeddings": {"norm": {"scale": jnp.ones(2)}}}
    assert paths(plain) == ["['weights'][0]"]
    assert paths(plain, eqxreg.embeddings) == []


def test_the_name_of_a_container_selects_all_within():
    select = eqxreg.select
    assert paths(Several(), select(names="weights")) == [".weights[0]", ".weights[1]"]
    assert paths(Several(), select(names="weights.1")) == [".weights[1]"]
    assert paths([Several()], select(Several, names="table")) == ["[0].table[0]"]
    # A layer is no container: what is in it has names of its own.
    model = eqx.nn.MLP(4, 2, 8, depth=1, key=jax.random.key(0))
    assert paths(model, select(names="layers")) == []
    assert paths(model, select(names="bias")) == [".layers[0].bias", ".layers[1].bias"]
    plain = {"a": {"kernel": jnp.ones(2)}, "b": {"kernel": jnp.ones(2)}}
    assert paths(plain, select(names="kernel")) == [
        "['a']['kernel']",
        "['b']['kernel']",
    ]


def test_arrays_in_lists_are_constrained():
    p = eqxreg.MaxNorm(0.5, axis="unit")
    wrapped = eqxreg.constrain(Several(), p)
    assert wrapped.weight_name == (
        "weights.0",
        "weights.1",
        "kernels.0",
        "conv_weights.first",
    )
    np.testing.assert_allclose(wrapped(X), np.asarray(X) / 16, rtol=1e-5)
    baked = eqxreg.bake(wrapped)
    np.testing.assert_allclose(baked.weights[1], np.eye(4) / 2, rtol=1e-5)
    byhand = eqxreg.Constraint(Several(), "weights.0", p)
    np.testing.assert_allclose(byhand(X), np.asarray(X), rtol=1e-5)
