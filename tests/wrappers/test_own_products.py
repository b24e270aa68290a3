"""Layers of one's own that say that they only multiply with a weight: they get the
scaled product, in every form of it, and an error where what they say is not so."""

from typing import ClassVar

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqxreg._maps import _factored
from tables import assert_close


pytestmark = pytest.mark.usefixtures("quick_compilation")


ROWS, COLUMNS = 6, 4
DTYPES = ["bfloat16", "float16", "float32"]
UNIT = eqxreg.MaxNorm(0.3, axis="unit")
WHOLE = eqxreg.MaxNorm(0.5)


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch):
    monkeypatch.setattr(_factored, "MANY_COLUMNS", 1)


class Own(eqx.Module):
    """A layer that calls a function with its weight."""

    weight: jax.Array
    fn: object = eqx.field(static=True)

    def __call__(self, x):
        return self.fn(self.weight, x)


class Says(Own):
    only_multiplies: ClassVar = ("weight",)

    def __call__(self, x):
        return self.fn(self.weight, x)


def weight_of(dtype="float32", shape=(ROWS, COLUMNS)):
    entries = np.random.default_rng(0).normal(size=shape)
    return jnp.asarray(entries, dtype)


def inputs(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)


# By name, a product, and the shape of what is multiplied.
PRODUCTS = {
    "weight @ vector": (lambda w, x: w @ x, (COLUMNS,)),
    "weight @ matrix": (lambda w, x: w @ x, (COLUMNS, 3)),
    "weight @ batch": (lambda w, x: w @ x, (2, COLUMNS, 3)),
    "vector @ transpose": (lambda w, x: x @ w.T, (COLUMNS,)),
    "batch @ transpose": (lambda w, x: x @ w.T, (2, 3, COLUMNS)),
    "transpose @ vector": (lambda w, x: w.T @ x, (ROWS,)),
    "transpose @ matrix": (lambda w, x: w.T @ x, (ROWS, 3)),
    "vector @ weight": (lambda w, x: x @ w, (ROWS,)),
    "batch @ weight": (lambda w, x: x @ w, (2, 3, ROWS)),
    "numpy @ transpose": (lambda w, x: np.ones(COLUMNS, x.dtype) @ w.T, (COLUMNS,)),
    "both": (lambda w, x: w.T @ jnp.tanh(w @ x), (COLUMNS,)),
    "scan": (
        lambda w, x: jax.lax.scan(lambda h, _: (w.T @ (w @ h), None), x, None, 3)[0],
        (COLUMNS,),
    ),
}


def out_and_gradients(layer, x):
    def loss(both):
        layer, x = both
        return jnp.sum(jnp.sin(layer(x).astype(jnp.float32)))

    return layer(x), jax.tree.leaves(eqx.filter_grad(loss)((layer, x)))


@pytest.mark.parametrize("p", [UNIT, WHOLE], ids=["unit", "whole"])
@pytest.mark.parametrize("name", list(PRODUCTS))
def test_every_product_and_its_gradients_are_those_of_the_array(name, p):
    fn, shape = PRODUCTS[name]
    x = inputs(*shape)
    pairs = [
        eqxreg.Constraint(cls(weight_of(), fn), "weight", p) for cls in (Says, Own)
    ]
    assert_close(*(out_and_gradients(layer, x) for layer in pairs))


def test_second_derivatives_are_those_of_the_array():
    x = inputs(COLUMNS)
    fn, _ = PRODUCTS["both"]

    def hessian(cls):
        layer = eqxreg.Constraint(cls(weight_of(), fn), "weight", UNIT)
        params, static = eqx.partition(layer, eqx.is_inexact_array)
        loss = lambda params: jnp.sum(jnp.sin(eqx.combine(params, static)(x)))
        return jax.tree.leaves(jax.hessian(loss)(params))

    assert_close(hessian(Says), hessian(Own))


def test_it_is_a_product_that_the_layer_gets():
    seen = []
    layer = Says(weight_of(), lambda w, x: seen.append(w) or w @ x)
    wrapped = eqxreg.Constraint(layer, "weight", UNIT)
    wrapped(inputs(COLUMNS))
    assert isinstance(seen.pop(), _factored.OnlyMultiplied)
    # Maps that are no multiple of the rows give arrays, and so does `bake`.
    eqxreg.Constraint(layer, "weight", eqxreg.Box(-1, 1))(inputs(COLUMNS))
    assert isinstance(seen.pop(), jax.Array)
    assert isinstance(eqxreg.bake(wrapped).weight, jax.Array)


def test_shape_and_dtype_of_the_weight_can_be_asked_for():
    fn = lambda w, x: (w @ x).reshape(w.shape[:1]).astype(w.dtype) + w.ndim - w.T.ndim
    layer = eqxreg.Constraint(Says(weight_of(), fn), "weight", UNIT)
    assert layer(inputs(COLUMNS)).shape == (ROWS,)


USES = {
    "sum": lambda w, x: w.sum(axis=1) @ x,
    "einsum": lambda w, x: jnp.einsum("oi,i->o", w, x),
    "times": lambda w, x: (2 * w) @ x,
    "array times": lambda w, x: (x * w) @ x,
    "entry": lambda w, x: w[0] @ x,
    "function": lambda w, x: jnp.abs(w) @ x,
    "length": lambda w, x: len(w) * x,
}


@pytest.mark.parametrize("use", list(USES))
def test_another_use_of_the_weight_says_what_to_do(use):
    layer = eqxreg.Constraint(Says(weight_of(), USES[use]), "weight", UNIT)
    with pytest.raises(
        (TypeError, AttributeError), match="out of `only_multiplies`|OnlyMultiplied"
    ):
        layer(inputs(COLUMNS))


def test_it_is_said_of_a_call():
    class Doubled(Says):
        def __call__(self, x):
            return (2 * self.weight) @ x

    class Inherited(Says):
        pass

    x = inputs(COLUMNS)
    product = lambda w, x: w @ x
    for cls, times in ((Doubled, 2), (Inherited, 1)):
        layer = eqxreg.Constraint(cls(weight_of(), product), "weight", UNIT)
        assert_close(layer(x), times * eqxreg.bake(layer).weight @ x)


@pytest.mark.parametrize(
    ("names", "error", "match"),
    [
        ("weight", TypeError, r"`Wrong.only_multiplies` must be a tuple"),
        (("wieght",), ValueError, r"`Wrong.only_multiplies`.*lacks: `wieght`"),
    ],
)
def test_what_it_says_is_checked(names, error, match):
    class Wrong(Says):
        only_multiplies: ClassVar = names

    layer = Wrong(weight_of(), lambda w, x: w @ x)
    with pytest.raises(error, match=match):
        eqxreg.Constraint(layer, "weight", UNIT)(inputs(COLUMNS))


# In half precision.


@pytest.mark.parametrize("dtype", DTYPES)
def test_inside_the_set_a_product_and_its_gradient_keep_their_bits(dtype):
    weight, x = weight_of(dtype, (64, 96)), inputs(96, dtype=dtype)

    @eqx.filter_jit
    def out_and_gradient(layer):
        loss = lambda layer: jnp.sum(layer(x) * inputs(64, dtype=dtype))
        return layer(x), jax.tree.leaves(eqx.filter_grad(loss)(layer))

    for fn in (lambda w, x: w @ x, lambda w, x: x @ w.T):
        plain = Says(weight, fn)
        layer = eqxreg.Constraint(plain, "weight", eqxreg.MaxNorm(1e3, axis="unit"))
        results = jax.tree.leaves([out_and_gradient(m) for m in (layer, plain)])
        out, gradient, plain_out, plain_gradient = results
        assert jnp.array_equal(out, plain_out)
        assert jnp.array_equal(gradient, plain_gradient)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_product_is_with_the_weight_before_it_is_rounded(dtype):
    weight, x = weight_of(dtype, (64, 96)), inputs(96, dtype=dtype)
    out = eqxreg.Constraint(Says(weight, lambda w, x: w @ x), "weight", UNIT)(x)
    exact = np.asarray(weight, np.float64)
    exact *= 0.3 / np.linalg.norm(exact, axis=1, keepdims=True)
    truth = exact @ np.asarray(x, np.float64)
    assert out.dtype == dtype
    # Two roundings, and the error of the sums in single precision.
    slack = float(jnp.finfo(dtype).eps) * np.abs(truth) + 1e-5
    assert np.all(np.abs(np.asarray(out, np.float64) - truth) <= slack)


def test_a_product_that_overflows_before_it_is_scaled_does_not():
    weight = jnp.full((2, 600), 300.0, jnp.float16)
    layer = Says(weight, lambda w, x: w @ x)
    layer = eqxreg.Constraint(layer, "weight", eqxreg.MaxNorm(1.0, axis="unit"))
    x = jnp.ones(600, jnp.float16)
    np.testing.assert_allclose(layer(x), np.sqrt(600), rtol=1e-3)
    gradient = eqx.filter_grad(lambda m: jnp.sum(m(x)))(layer).layer.weight
    assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_in_half_precision_are_near_those_in_double(dtype):
    weight, x = weight_of(dtype, (16, 40)), inputs(40, dtype=dtype)

    def gradient(weight, x):
        layer = Says(weight, lambda w, x: w @ x)
        layer = eqxreg.Constraint(layer, "weight", UNIT)
        loss = lambda m: jnp.sum(jnp.sin(m(x).astype(jnp.float32)))
        return np.asarray(eqx.filter_grad(loss)(layer).layer.weight, np.float64)

    w, v = (np.asarray(a, np.float64) for a in (weight, x))
    norms = np.linalg.norm(w, axis=1, keepdims=True)
    unit = w / norms
    outer = np.cos(0.3 * unit @ v)[:, None] * v[None]
    truth = 0.3 / norms * (outer - unit * np.sum(unit * outer, axis=1, keepdims=True))
    error = np.max(np.abs(gradient(weight, x) - truth)) / np.max(np.abs(truth))
    assert error <= 4 * float(jnp.finfo(dtype).eps)
