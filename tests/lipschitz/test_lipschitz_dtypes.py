"""Lipschitz bounds of networks with `input_shape`, in every precision and in several at
once, against dense matrices in double precision."""

import math

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest


pytestmark = pytest.mark.usefixtures("quick_compilation")

nn = eqx.nn
SHAPE = (2, 6, 6)
DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]


class Cast(eqx.Module):
    """To another precision, as mixed-precision networks do between layers."""

    dtype: str = eqx.field(static=True)

    def __call__(self, x, *, key=None):
        return x.astype(self.dtype)


class CastBlock(eqx.Module):
    """A convolution that casts for itself."""

    conv: nn.Conv2d

    def __call__(self, x, *, key=None):
        return self.conv(x.astype(self.conv.weight.dtype)).astype(x.dtype)


@pytest.fixture(autouse=True)
def _rules(monkeypatch):
    rules = {Cast: lambda layer, shape: 1.0}
    rules[CastBlock] = lambda layer, shape: eqxreg.lipschitz_bound(layer.conv, shape)
    for cls, rule in rules.items():
        monkeypatch.setitem(eqxreg._lipschitz._bound._registered, cls, rule)


def conv(dtype="float32", *args, **kwargs):
    arguments = args or (2, 4, 3)
    layer = nn.Conv2d(
        *arguments, dtype=jnp.dtype(dtype), key=jax.random.key(0), **kwargs
    )
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        return layer
    # Equinox draws the real and the imaginary parts alike.
    phases = np.exp(1j * np.arange(layer.weight.size)).reshape(layer.weight.shape)
    turned = layer.weight * jnp.asarray(phases, dtype)
    return eqx.tree_at(lambda layer: layer.weight, layer, turned)


def linear(size, dtype="float32"):
    return nn.Linear(size, 3, dtype=jnp.dtype(dtype), key=jax.random.key(1))


def dense_norm(layer, shape):
    """The norm of the matrix of a layer, column by column, in double precision."""

    def exact(leaf):
        if not eqx.is_inexact_array(leaf):
            return leaf
        is_complex = jnp.iscomplexobj(leaf)
        return leaf.astype("complex128" if is_complex else "float64")

    layer = jax.tree.map(exact, layer)
    dtype = jax.tree.leaves(eqx.filter(layer, eqx.is_inexact_array))[0].dtype
    size = math.prod(shape)
    apply = jax.vmap(lambda x: layer(x).ravel())
    images = jnp.eye(size, dtype=dtype).reshape(size, *shape)
    columns = apply(images) - apply(jnp.zeros_like(images))
    return np.linalg.norm(np.asarray(columns), 2)


def check(model, *parts, excess=1.2):
    """The bound is not below the product over its linear parts, and not far above."""
    truth = math.prod(dense_norm(layer, shape) for layer, shape in parts)
    bound = eqxreg.lipschitz_bound(model, SHAPE)
    assert bound.dtype in (jnp.float32, jnp.float64)
    assert truth <= float(bound) <= excess * truth


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_convolutional_network_of_any_precision_has_a_bound(dtype):
    first, second = conv(dtype, padding=1), linear(144, dtype)
    model = nn.Sequential([first, nn.Lambda(jnp.ravel), second])
    check(model, (first, SHAPE), (second, (144,)))
    expected = {"float64": jnp.float64, "complex128": jnp.float64}
    bound = jax.jit(lambda: eqxreg.lipschitz_bound(model, SHAPE))()
    assert bound.dtype == expected.get(dtype, jnp.float32)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("promotion", ["strict", "standard"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_that_needs_the_size_of_the_image(dtype, promotion):
    first = conv(dtype, stride=2)
    second = conv(dtype, 4, 2, 2, padding="SAME", stride=2, padding_mode="REFLECT")
    model = nn.Sequential([first, second])
    with jax.numpy_dtype_promotion(promotion):
        check(model, (first, SHAPE), (second, (4, 2, 2)), excess=3)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("low", ["float16", "bfloat16", "float64"])
def test_networks_that_cast_between_layers_have_a_bound(low):
    first, second = conv(low, padding=1), linear(144)
    layers = [Cast(low), first, Cast("float32"), nn.Lambda(jnp.ravel), second]
    check(nn.Sequential(layers), (first, SHAPE), (second, (144,)))
    nested = nn.Sequential([nn.Sequential(layers[:3]), nn.Sequential(layers[3:])])
    check(nested, (first, SHAPE), (second, (144,)))
    block = nn.Sequential([CastBlock(first), nn.Lambda(jnp.ravel), second])
    check(block, (first, SHAPE), (second, (144,)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_layers_without_arrays_pass_any_precision_on(dtype):
    model = nn.Sequential(
        [
            conv(dtype, padding=1),
            eqxreg.MaxMin(),
            nn.MaxPool2d(2, 2),
            nn.Dropout(0.5),
            nn.Lambda(nn.PReLU(0.5)),
            nn.AvgPool2d(1, 1),
            nn.AdaptiveAvgPool2d(2),
            nn.Lambda(jax.nn.relu),
            nn.Lambda(jnp.ravel),
            linear(16, dtype),
        ]
    )
    check(model, (model[0], SHAPE), (model[-1], (16,)), excess=3)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda layer: eqxreg.MaxNormConstraint(layer, "weight", 0.5, axis="unit"),
        lambda layer: eqxreg.freeze(layer, eqxreg.everything),
    ],
    ids=["constrained", "frozen"],
)
def test_wrapped_layers_are_called_in_their_own_precision(wrap):
    first = conv("bfloat16", padding=1)
    last = nn.Linear(144, 3, dtype=jnp.bfloat16, key=jax.random.key(1))
    plain = nn.Sequential([first, nn.Lambda(jnp.ravel), last])
    wrapped = nn.Sequential([wrap(first), nn.Lambda(jnp.ravel), last])
    expected = eqxreg.lipschitz_bound(eqxreg.bake(wrapped))
    assert eqxreg.lipschitz_bound(wrapped, SHAPE) == expected
    assert eqxreg.lipschitz_bound(plain, SHAPE) == eqxreg.lipschitz_bound(plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_shape_that_no_precision_makes_fit_is_an_error(dtype):
    model = nn.Sequential([conv(dtype, padding=1), nn.Lambda(jnp.ravel), linear(7)])
    with pytest.raises(ValueError, match=r"`\.layers\[2\]`.*shape \(144,\)"):
        eqxreg.lipschitz_bound(model, SHAPE)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["operator_norm", "lipschitz_bound"])
def test_the_norm_of_one_convolution_of_any_precision(dtype, kind):
    layer = conv(dtype, padding=1)
    truth = dense_norm(layer, SHAPE)
    if kind == "lipschitz_bound":
        check(layer, (layer, SHAPE))
    else:
        norm = eqxreg.operator_norm(layer, SHAPE)
        slack = float(jnp.finfo(dtype).eps)
        assert float(norm) == pytest.approx(truth, rel=1e-3 + slack)
