"""Maps of one's own are checked when they meet a weight; bounds when they are given."""

import decimal
import fractions
import functools as ft

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest


pytestmark = pytest.mark.usefixtures("quick_compilation")


KEPT = "a map must keep shape and dtype"


class Own(eqxreg.Projection):
    """A map that may be anything."""

    fn: object = eqx.field(static=True)

    def __call__(self, raw):
        return self.fn(raw)


class Chart(eqxreg.Parametrization):
    """A map whose raw weights may be anything."""

    fn: object = eqx.field(static=True)

    def __call__(self, raw):
        return raw

    def inverse(self, weight):
        return self.fn(weight)


class Tied(eqxreg.Parametrization):
    """A map that binds itself to a raw weight that may be anything."""

    fn: object = eqx.field(static=True)

    def __call__(self, raw):
        return raw

    def inverse(self, weight):
        return weight

    def bind(self, weight):
        return Tied(lambda w: w), self.fn(weight)


WRONG = {
    "transposed": (
        lambda w: w.T,
        ValueError,
        r"returned an array of shape \(4, 3\) and float32 for one of shape \(3, 4\)",
    ),
    "a row": (lambda w: w[:1], ValueError, r"shape \(1, 4\) and float32"),
    "narrow": (lambda w: w.astype("bfloat16"), ValueError, r"\(3, 4\) and bfloat16"),
    "complex": (lambda w: jax.lax.complex(w, w), ValueError, r"\(3, 4\) and complex64"),
    "a tuple": (lambda w: (w, w), TypeError, "returned a tuple for a weight"),
    "nothing": (lambda w: None, TypeError, "returned None for a weight"),
}
each_wrong = pytest.mark.parametrize("fn, error, text", WRONG.values(), ids=WRONG)


def linear(key):
    return eqx.nn.Linear(4, 3, key=key)


WRAPPED = {
    "a layer": lambda p, key: eqxreg.Constraint(linear(key), "weight", p),
    "a chain": lambda p, key: eqxreg.Constraint(
        linear(key), "weight", eqxreg.Chain(eqxreg.NonNegative(), p)
    ),
    "a model": lambda p, key: eqxreg.constrain(linear(key), p),
    "an ensemble": lambda p, key: eqx.filter_vmap(
        lambda key: eqxreg.Constraint(linear(key), "weight", p)
    )(jax.random.split(key, 2)),
    "a stack": lambda p, key: eqxreg.Constraint(
        eqx.filter_vmap(linear)(jax.random.split(key, 2)), "weight", p
    ),
    "shapes": lambda p, key: eqx.filter_eval_shape(
        lambda key: eqxreg.Constraint(linear(key), "weight", p), key
    ),
    "compiled": lambda p, key: eqx.filter_jit(
        lambda key: eqxreg.Constraint(linear(key), "weight", p)
    )(key),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@each_wrong
def test_a_map_that_changes_shape_or_dtype_is_refused_when_wrapped(
    fn, error, text, wrap, key
):
    for p, method in ((Own(fn), ""), (Chart(fn), ".inverse"), (Tied(fn), ".bind")):
        name = type(p).__name__ + method
        with pytest.raises(error, match=f"`{name}` {text}|`{name}` .*{text}") as found:
            wrap(p, key)
        assert KEPT in str(found.value)


@pytest.mark.usefixtures("unchecked")
@each_wrong
def test_a_projection_that_changes_shape_or_dtype_is_refused_at_once(
    fn, error, text, key
):
    model = {"first": linear(key)}
    params = eqx.filter(model, eqx.is_inexact_array)
    p = Own(fn)
    with pytest.raises(error, match=r"`\['first'\].weight`: `Own` .*" + text):
        eqxreg.project(p).init(params)
    with pytest.raises(error, match=r"`\['first'\].weight`: `Own` .*" + text):
        eqxreg.project_params(model, p)
    weight = model["first"].weight
    for measure in (
        p.distance,
        p.contains,
        lambda w: eqxreg.distance_penalty(model, p, 1.0),
        lambda w: eqxreg.metrics(model, projection=p),
    ):
        with pytest.raises(error, match="`Own` .*" + text):
            measure(weight)


@pytest.mark.usefixtures("unchecked")
def test_nothing_is_computed_to_see_what_a_map_returns(key):
    seen = []

    def fn(raw):
        seen.append(raw)
        return raw * 2

    layer = eqxreg.Constraint(linear(key), "weight", Own(fn))
    eqxreg.project(Own(fn)).init(eqx.filter(linear(key), eqx.is_inexact_array))
    assert seen and all(isinstance(raw, jax.core.Tracer) for raw in seen)
    # What is ours is known to keep them.
    eqxreg.Constraint(layer, "weight", eqxreg.Chain(eqxreg.UnitNorm()))
    assert np.array_equal(eqxreg.bake(layer).weight, 2 * linear(key).weight)


@pytest.mark.usefixtures("unchecked")
def test_a_map_that_needs_values_is_taken_on_trust(key):
    signs = Own(lambda raw: jnp.asarray(np.sign(np.asarray(raw))))
    layer = eqxreg.Constraint(linear(key), "weight", signs)
    assert np.array_equal(eqxreg.bake(layer).weight, np.sign(linear(key).weight))


@pytest.mark.usefixtures("unchecked")
def test_weights_that_are_tied_are_checked_where_they_are(key):
    class Pair(eqx.Module):
        embedding: eqx.nn.Embedding
        linear: eqx.nn.Linear

        def __call__(self, token):
            return self.linear(self.embedding(token))

    pair = Pair(eqx.nn.Embedding(3, 4, key=key), linear(key))
    where, get = (lambda p: p.linear.weight), (lambda p: p.embedding.weight)
    shared = eqx.nn.Shared(pair, where, get)
    with pytest.raises(ValueError, match="embedding.weight`: `Own` .*" + KEPT):
        eqxreg.constrain(shared, Own(jnp.transpose), eqxreg.embeddings)
    assert eqxreg.constrain(shared, Own(jnp.negative), eqxreg.embeddings) is not None


# Starting inside an open set.


def test_a_model_is_brought_inside_before_it_is_made_positive(key):
    mlp = eqx.nn.MLP(4, 2, 8, depth=2, key=key)
    with pytest.raises(ValueError, match=r"^`.layers\[0\].weight`: `Positive`") as told:
        eqxreg.constrain(mlp, eqxreg.Positive())
    # As the error says.
    remedy = str(told.value).split("for a model, `")[1].split("`")[0]
    model = eval(remedy, {"eqxreg": eqxreg, "jnp": jnp, "model": mlp})
    for weight, old in zip(
        eqxreg.trainables(eqxreg.bake(model), eqxreg.weights),
        eqxreg.trainables(mlp, eqxreg.weights),
        strict=True,
    ):
        np.testing.assert_allclose(weight, np.maximum(old, 1e-3), rtol=1e-4)


def test_an_error_of_one_of_several_weights_says_which(key):
    cell = eqx.nn.GRUCell(3, 4, key=key)
    inside = eqx.tree_at(lambda c: c.weight_ih, cell, jnp.ones((12, 3)))
    with pytest.raises(
        ValueError, match="^`.cell`: `weight_hh`: `Positive` needs"
    ) as _:
        eqxreg.constrain(Holder(inside), eqxreg.Positive())
    with pytest.raises(ValueError, match="^`weight_ih`: `Interval` needs.*project_par"):
        names = ("weight_ih", "weight_hh")
        eqxreg.Constraint(cell, names, eqxreg.Interval(1.0, 2.0))


class Holder(eqx.Module):
    cell: eqx.nn.GRUCell


# What is no bound.

BUILDERS = {
    "max_norm": eqxreg.MaxNorm,
    "norm": eqxreg.UnitNorm,
    "total": eqxreg.Simplex,
    "cap": eqxreg.SpectralCap,
    "upper": ft.partial(eqxreg.Interval, 0.0),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", list(BUILDERS))
def test_an_int_that_no_float_holds_is_told_to_be_finite(name):
    for huge in (10**400, 10**5000):
        with pytest.raises(ValueError, match=f"`{name}` must be .*finite.*got inf"):
            BUILDERS[name](huge)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", list(BUILDERS))
@pytest.mark.parametrize(
    "bound, text",
    [
        (fractions.Fraction(1, 2), r"Fraction\(1, 2\).*Give `float\(...\)` of it"),
        (decimal.Decimal("0.5"), r"Decimal\('0.5'\).*Give `float\(...\)` of it"),
        (True, "must be a number.*True"),
        (np.True_, "must be a number.*True"),
        (np.asarray(True), "must be of numbers, got an array of bool"),
        (jnp.asarray(True), "must be of numbers, got an array of bool"),
        (np.asarray("a"), "must be of numbers, got an array of <U1"),
        ("1", "must be a number.*'1'"),
        (None, "must be a number.*None"),
    ],
    ids=str,
)
def test_what_is_no_number_is_no_bound(name, bound, text):
    with pytest.raises(TypeError, match=f"`{name}` {text}|`{name}` .*{text}"):
        BUILDERS[name](bound)


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_every_kind_are_bounds():
    weight = jnp.asarray([3.0, 4.0])
    for bound in (2, np.float16(2), np.float64(2), np.int8(2), jnp.asarray(2), 2.0):
        np.testing.assert_allclose(eqxreg.MaxNorm(bound)(weight), [1.2, 1.6], rtol=1e-5)
    assert eqxreg.MaxNorm(jnp.bfloat16(2))(weight).dtype == weight.dtype


def test_a_negative_zero_is_zero():
    for zero in (-0.0, np.float16(-0.0)):
        result = eqxreg.Box(-1.0, zero)(jnp.ones(2))
        assert not np.any(np.signbit(result))
        assert eqxreg.MinMaxNorm(zero, 1.0) == eqxreg.MinMaxNorm(0.0, 1.0)
        with pytest.raises(ValueError, match="`max_norm` must be positive"):
            eqxreg.MaxNorm(zero)
