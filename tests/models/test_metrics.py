"""Metrics of weights, of stacks and of wrapped layers: the numbers against numpy."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import filter_jit, jit
from tables import DTYPES, Own, exact, sample


pytestmark = pytest.mark.usefixtures("quick_compilation")


# What takes time is to compile, for each shape of a weight. So there are few.
SHAPE = (4, 4)


@pytest.fixture
def scanned(key):
    """A first layer, a stack of three, and a last one."""
    return eqx.nn.MLP(4, 4, 4, depth=4, scan=True, key=key)


def of_numpy(weight):
    """Norm, largest singular value and stable rank of a weight, in double precision."""
    matrix = exact(weight).reshape(weight.shape[0], -1)
    values = np.linalg.svd(matrix, compute_uv=False)
    norm = np.sqrt((np.abs(matrix) ** 2).sum())
    return norm, values[0], (values**2).sum() / values[0] ** 2


NUMBERS = ("norm", "singular_value", "stable_rank")


def assert_numbers(found, path, weight, rtol=1e-4):
    for name, expected in zip(NUMBERS, of_numpy(weight), strict=True):
        np.testing.assert_allclose(found[f"{path}/{name}"], expected, rtol=rtol)


metrics = filter_jit(eqxreg.metrics)


def only_row(tree, *args, **kwargs):
    [row] = eqxreg.report(tree, *args, **kwargs).rows
    return row


# The numbers


@pytest.mark.parametrize("shape", [(6, 5), (5, 6, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_those_of_the_singular_value_decomposition(dtype, shape):
    weight = sample(dtype, shape=shape)
    found = metrics({"weight": weight})
    assert_numbers(found, "['weight']", weight)
    assert {x.dtype for x in found.values()} == {jnp.dtype("float32")}


def test_numbers_of_double_precision_are_in_double_precision(x64):
    weight = sample("float64", shape=SHAPE)
    found = eqxreg.metrics(weight, eqxreg.everything)
    assert {x.dtype for x in found.values()} == {jnp.dtype("float64")}
    np.testing.assert_allclose(found["/norm"], of_numpy(weight)[0], rtol=1e-14)


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_numbers_neither_overflow_nor_underflow(scale):
    weight = sample("float32", scale, SHAPE)
    assert_numbers(metrics({"weight": weight}), "['weight']", weight)


@pytest.mark.parametrize("weight", [jnp.array([3.0, -4.0]), jnp.array(-5.0)])
def test_a_vector_or_a_scalar_has_its_norm_for_a_singular_value(weight):
    row = only_row(weight, eqxreg.everything, projection=eqxreg.MaxNorm(1.0))
    assert (row.norm, row.singular_value, row.stable_rank) == (5.0, 5.0, 1.0)
    np.testing.assert_allclose(row.distance, 4.0, rtol=1e-5)


@pytest.mark.parametrize(
    "projection, active",
    [
        (eqxreg.UnitNorm(), 0.0),
        (eqxreg.MaxNorm(1.0, ord=1), 0.0),
        (eqxreg.NonNegative(), 1.0),
        (eqxreg.Chain(eqxreg.NonNegative(), eqxreg.MinMaxNorm(1.0, 2.0)), 1.0),
    ],
    ids=str,
)
def test_a_zero_weight_has_finite_numbers(projection, active):
    shapes = {"matrix": SHAPE, "vector": (4,), "scalar": (), "empty": (0, 3)}
    tree = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    for row in eqxreg.report(tree, eqxreg.everything, projection=projection).rows:
        assert (row.norm, row.singular_value, row.stable_rank) == (0.0, 0.0, 0.0)
        assert row.distance == 0.0
        assert row.active == (0.0 if "empty" in row.path else active)


def test_nans_stay_visible():
    row = only_row({"weight": jnp.full(SHAPE, jnp.nan)})
    assert np.isnan([row.norm, row.singular_value, row.stable_rank]).all()


def test_metrics_are_the_same_under_jit(key):
    model = [eqx.nn.Linear(4, 4, key=key), jnp.tanh]
    model = eqxreg.constrain(model, eqxreg.MaxNorm(0.3, axis="unit"))
    params = eqx.filter(model, eqx.is_inexact_array)
    plain = eqxreg.metrics(model)
    for found in (
        filter_jit(eqxreg.metrics)(model),
        jit(eqxreg.metrics)(params),
    ):
        assert found.keys() == plain.keys()
        for name in plain:
            np.testing.assert_allclose(found[name], plain[name], rtol=1e-5)


def test_metrics_of_an_ensemble_are_mapped_over(key):
    build = lambda key: eqx.nn.Linear(4, 4, key=key)
    layers = eqx.filter_vmap(build)(jax.random.split(key, 3))
    found = filter_jit(eqx.filter_vmap(eqxreg.metrics))(layers)
    for i, weight in enumerate(layers.weight):
        one = {name: values[i] for name, values in found.items()}
        assert_numbers(one, ".weight", weight)


def test_weights_of_one_shape_share_a_loop():
    def loops(count):
        tree = {f"weight_{i}": jnp.ones(SHAPE) for i in range(count)}
        return str(jax.make_jaxpr(eqxreg.metrics)(tree)).count("while[")

    assert loops(1) == loops(5) > 0


def test_weights_that_share_a_loop_keep_their_own_values():
    shapes = [SHAPE, (3, 4), SHAPE, (5,), SHAPE]
    tree = {
        f"weight_{i}": sample("float32", 1.0 + i, shape, seed=i)
        for i, shape in enumerate(shapes)
    }
    found = metrics(tree)
    for name, weight in tree.items():
        if weight.ndim == 2:
            assert_numbers(found, f"['{name}']", weight)


# Stacks of layers


def test_a_stack_has_a_number_for_each_layer(scanned):
    found = metrics(scanned, projection=eqxreg.MaxNorm(0.5))
    numbers = (*NUMBERS, "distance", "active")
    assert {found[f".layers[0].weight/{name}"].shape for name in numbers} == {()}
    assert {found[f".layers[1].weight/{name}"].shape for name in numbers} == {(3,)}
    for i, weight in enumerate(scanned.layers[1].weight):
        path = ".layers[1].weight"
        one = {f"{path}/{name}": found[f"{path}/{name}"][i] for name in numbers}
        assert_numbers(one, path, weight)
        distance = max(np.linalg.norm(exact(weight)) - 0.5, 0)
        np.testing.assert_allclose(one[f"{path}/distance"], distance, rtol=1e-4)
        # One norm for all units.
        assert one[f"{path}/active"] == float(distance > 0)


def test_a_stack_has_a_row_for_each_layer(scanned):
    rows = eqxreg.report(scanned).rows
    assert [row.path for row in rows] == [
        ".layers[0].weight",
        ".layers[1].weight[0]",
        ".layers[1].weight[1]",
        ".layers[1].weight[2]",
        ".layers[2].weight",
    ]
    assert {row.shape for row in rows} == {SHAPE}


def test_the_maps_of_a_stack_are_bound_layer_by_layer(scanned):
    """`Relative` has an array of its own for each layer."""
    stack = eqxreg.select(where=lambda path, layer, array: array.ndim == 3)
    growth = eqxreg.Relative(eqxreg.MaxNorm(1.5))
    grown = eqxreg.constrain(scanned, growth, where=stack)
    weight = grown.layers[1].weight * jnp.array([1.0, 2.0, 3.0])[:, None, None]
    grown = eqx.tree_at(lambda m: m.layers[1].layer.weight, grown, weight)
    found = eqxreg.metrics(grown, stack)
    path = ".layers[1].layer.weight"
    norms = np.linalg.norm(exact(scanned.layers[1].weight), axis=(1, 2))
    expected = norms * [0.0, 0.5, 1.5]
    np.testing.assert_allclose(found[f"{path}/distance"], expected, rtol=1e-4)
    np.testing.assert_array_equal(found[f"{path}/active"], [0.0, 1.0, 1.0])


def test_a_wrapper_knows_a_stack_of_your_own_modules(key):
    build = lambda key: eqxreg.MaxNormConstraint(Own(key), "kernel", 1.0, axis="unit")
    models = eqx.filter_vmap(build)(jax.random.split(key, 2))
    rows = eqxreg.report(models, eqxreg.select(names="kernel")).rows
    assert [row.path for row in rows] == [".layer.kernel[0]", ".layer.kernel[1]"]
    for row, kernel in zip(rows, eqxreg.bake(models).kernel, strict=True):
        np.testing.assert_allclose(row.norm, of_numpy(kernel)[0], rtol=1e-5)
        assert row.distance > 0


# Wrappers and sets


def test_a_wrapped_weight_is_measured_as_the_layer_computes_with_it(mlp):
    model = eqxreg.constrain(mlp, eqxreg.MaxNorm(0.3, axis="unit"))
    found = eqxreg.metrics(model)
    baked = eqxreg.bake(model)
    for i in range(3):
        path = f".layers[{i}].layer.weight"
        weight, raw = exact(baked.layers[i].weight), exact(mlp.layers[i].weight)
        assert_numbers(found, path, weight)
        excess = np.maximum(np.linalg.norm(raw, axis=1) - 0.3, 0)
        expected = np.linalg.norm(excess), np.mean(excess > 0)
        np.testing.assert_allclose(found[f"{path}/distance"], expected[0], rtol=1e-4)
        np.testing.assert_allclose(found[f"{path}/active"], expected[1])


def test_a_feasible_weight_has_distance_zero(mlp):
    model = eqxreg.constrain(mlp, eqxreg.MaxNorm(30.0, axis="unit"))
    for row in eqxreg.report(model).rows:
        assert (row.distance, row.active) == (0.0, 0.0)


def test_the_distance_through_two_wrappers_is_to_what_both_make():
    weight = jnp.array([[3.0, -4.0], [0.3, 0.4]])
    layer = eqx.nn.Linear(2, 2, key=jax.random.key(0))
    layer = eqx.tree_at(lambda x: x.weight, layer, weight)
    layer = eqxreg.Constraint(layer, "weight", eqxreg.NonNegative())
    layer = eqxreg.Constraint(layer, "weight", eqxreg.MaxNorm(1.0, axis="unit"))
    row = only_row(layer)
    assert row.map == "NonNegative() → MaxNorm(1.0, axis='unit')"
    np.testing.assert_allclose(row.distance, np.sqrt(2.0**2 + 4.0**2), rtol=1e-5)
    # One entry of four is negative; of what is left, one unit of two is too long.
    assert row.active == 0.5


@pytest.mark.parametrize(
    "name",
    ["layers[0].weight", "layers.0.weight", ("layers[0].weight", "layers[1].weight")],
    ids=str,
)
def test_a_wrapper_is_found_however_it_names_its_weight(mlp, name):
    model = eqxreg.MaxNormConstraint(mlp, name, 0.1)
    found = eqxreg.metrics(model)
    assert found[".layer.layers[0].weight/distance"] > 0
    assert ".layer.layers[2].weight/distance" not in found


@pytest.mark.parametrize(
    "wrap, label",
    [
        (lambda x: eqxreg.Constraint(x, "weight", eqxreg.Cayley()), "Cayley()"),
        (lambda x: eqxreg.WeightNormConstraint(x), "WeightNorm()"),
        (lambda x: eqx.nn.WeightNorm(x), "eqx.nn.WeightNorm"),
        (
            lambda x: eqxreg.MaxNormConstraint(eqx.nn.WeightNorm(x), "weight", 0.5),
            "eqx.nn.WeightNorm → MaxNorm(0.5)",
        ),
    ],
)
def test_a_weight_that_is_no_point_of_a_set_has_no_distance(wrap, label):
    layer = wrap(eqx.nn.Linear(4, 4, key=jax.random.key(0)))
    row = only_row(layer, projection=eqxreg.MaxNorm(0.1))
    assert (row.map, row.distance, row.active) == (label, None, None)
    assert set(eqxreg.metrics(layer)) == {f"{row.path}/{name}" for name in NUMBERS}
    np.testing.assert_allclose(
        row.norm, of_numpy(eqxreg.bake(layer).weight)[0], rtol=1e-5
    )


def test_a_projection_is_for_weights_in_no_wrapper(mlp):
    first = eqxreg.select(where=lambda path, layer, array: "layers[0]" in path)
    model = eqxreg.constrain(mlp, eqxreg.NonNegative(), where=first)
    rows = eqxreg.report(model, projection=eqxreg.MaxNorm(0.5)).rows
    assert [row.map for row in rows] == ["NonNegative()", *["MaxNorm(0.5)"] * 2]
    for row, layer in zip(rows[1:], mlp.layers[1:], strict=True):
        distance = np.linalg.norm(exact(layer.weight)) - 0.5
        np.testing.assert_allclose(row.distance, distance, rtol=1e-4)


@pytest.mark.parametrize("kind", ["ours", "equinox's"])
def test_a_stateful_wrapper_is_measured_with_its_state(key, kind):
    make = eqxreg.SpectralNormConstraint if kind == "ours" else eqx.nn.SpectralNorm
    linear = eqx.nn.Linear(4, 4, key=key)
    layer, state = eqx.nn.make_with_state(make)(linear, "weight", key=key)
    _, state = layer(jnp.ones(4), state)
    weight = eqxreg.bake(layer, state).weight
    assert_numbers(eqxreg.metrics(layer, state=state), ".layer.weight", weight)
    row = only_row(layer, state=state)
    np.testing.assert_allclose(row.singular_value, 1.0, rtol=1e-2)
    assert row.active == (1.0 if kind == "ours" else None)
    # The state is as good as before.
    layer(jnp.ones(4), state)
    with pytest.raises(ValueError, match="is a stateful"):
        eqxreg.metrics(layer)


def test_what_is_tied_to_a_weight_has_no_row(key):
    embedding = eqx.nn.Embedding(4, 4, key=key)
    linear = eqx.nn.Linear(4, 4, key=key)
    tied = eqx.nn.Shared(
        (embedding, linear), lambda pair: pair[1].weight, lambda pair: pair[0].weight
    )
    model = eqxreg.constrain(tied, eqxreg.MaxNorm(0.1), where=eqxreg.embeddings)
    row = only_row(model, eqxreg.embeddings | eqxreg.weights)
    assert row.path == ".pytree[0].layer.weight"
    np.testing.assert_allclose(row.norm, 0.1, rtol=1e-5)
