"""Weights without entries stay, and their norms are zero."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqxreg._maps import WeightNorm
from quick import filter_jit


pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = [(0, 3), (3, 0), (0, 0), (2, 0, 3)]
MAPS = {
    "max norm": eqxreg.MaxNorm(1.0, axis="unit"),
    "l1": eqxreg.MaxNorm(1.0, axis="unit", ord=1),
    "unit norm": eqxreg.UnitNorm(),
    "box": eqxreg.Box(-1.0, 1.0),
    "pinned": eqxreg.Pinned(np.ones((), bool), 2.0),
    "simplex": eqxreg.Simplex(),
    "spectral norm": eqxreg.SpectralNorm(),
    "spectral norm, gram": eqxreg.SpectralNorm(method="gram"),
    "spectral norm, svd": eqxreg.SpectralNorm(method="svd"),
    "spectral scale": eqxreg.SpectralScale(),
    "spectral cap": eqxreg.SpectralCap(),
    "spectral cap, products": eqxreg.SpectralCap(method="products"),
    "orthogonal": eqxreg.Orthogonal(),
    "orthogonal, products": eqxreg.Orthogonal(method="products"),
    "almost orthogonal": eqxreg.AlmostOrthogonal(),
    "low rank": eqxreg.LowRank(1),
    "positive": eqxreg.Positive(),
    "cayley": eqxreg.Cayley(),
    "matrix exponential": eqxreg.MatrixExp(),
    "weight norm": WeightNorm("unit"),
    "relative": eqxreg.Relative(eqxreg.MaxNorm(1.0)),
    "relative spectral": eqxreg.Relative(eqxreg.SpectralCap()),
    "straight through": eqxreg.StraightThrough(eqxreg.SpectralCap()),
    "chain": eqxreg.Chain(eqxreg.NonNegative(), eqxreg.SpectralScale()),
}
PROJECTIONS = [n for n, p in MAPS.items() if isinstance(p, eqxreg.Projection)]
each_map = pytest.mark.parametrize("p", MAPS.values(), ids=MAPS.keys())
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Layer(eqx.Module):
    """A layer whose weight may have any shape."""

    weight: jax.Array

    def __call__(self, x):
        return x


@each_map
def test_a_map_keeps_an_empty_weight_and_so_do_its_derivatives(p):
    for shape in SHAPES:
        weight = jnp.zeros(shape)
        bound, raw = p.bind(weight)
        cubes = lambda w, bound=bound: jnp.sum(bound(w) ** 3)
        assert raw.shape == bound(raw).shape == shape
        assert bound.inverse(bound(raw)).shape == shape
        assert filter_jit(bound)(raw).shape == shape
        assert jax.grad(cubes)(raw).shape == shape
        assert jax.hessian(cubes)(raw).shape == 2 * shape


@each_map
def test_a_wrapped_layer_keeps_an_empty_weight(p):
    for shape in SHAPES:
        layer = eqxreg.Constraint(Layer(jnp.zeros(shape)), "weight", p)
        assert eqxreg.bake(layer).weight.shape == shape


@pytest.mark.parametrize("name", PROJECTIONS)
def test_an_empty_weight_is_at_no_distance_and_projected_to_itself(name):
    for shape in SHAPES:
        params = {"weight": jnp.zeros(shape)}
        bound, _ = MAPS[name].bind(params["weight"])
        assert bound.distance(params["weight"]) == 0
        assert bound._active(params["weight"]) == 0
        assert jax.grad(bound.distance)(params["weight"]).shape == shape
        assert bound.contains(params["weight"]).shape == ()
        transform = eqxreg.project(MAPS[name], momentum="tangent")
        state = transform.init(params)
        # The second one starts from what the first one left.
        for _ in range(2):
            updates, state = transform.update(params, state, params)
        assert updates["weight"].shape == shape
        assert eqxreg.project_params(params, bound)["weight"].shape == shape
        assert "0" in str(eqxreg.report(params, projection=bound))


@pytest.mark.parametrize(
    "build", [eqxreg.Symmetric, eqxreg.SkewSymmetric, eqxreg.PositiveSemidefinite]
)
def test_square_maps_keep_an_empty_weight(build):
    for p, shape in ((build(), (0, 0)), (build(blocks=2), (0, 0))):
        assert p(jnp.zeros(shape)).shape == shape
        assert p.distance(jnp.zeros(shape)) == 0


@pytest.mark.parametrize("method", ["lanczos", "gram", "svd"])
@each_shape
def test_the_spectral_norm_of_an_empty_weight_is_zero(shape, method):
    norm = lambda w: eqxreg.spectral_norm(w, method=method)
    weight = jnp.zeros(shape)
    assert norm(weight) == filter_jit(norm)(weight) == 0
    assert jax.grad(norm)(weight).shape == shape
    assert jax.hessian(norm)(weight).shape == 2 * shape


@each_shape
def test_penalties_of_an_empty_weight_are_zero(shape):
    tree = {"weight": jnp.zeros(shape)}
    penalties = {
        "l1": eqxreg.l1_penalty,
        "l2": eqxreg.l2_penalty,
        "group lasso": eqxreg.group_lasso_penalty,
        "orthogonality": eqxreg.orthogonality_penalty,
        "keras": lambda t, r: eqxreg.orthogonality_penalty(t, r, mode="keras"),
        "spectral norm": eqxreg.spectral_norm_penalty,
        "distance": lambda t, r: eqxreg.distance_penalty(t, eqxreg.SpectralCap(), r),
    }
    for name, penalty in penalties.items():
        of_tree = lambda t, penalty=penalty: penalty(t, 1.0)
        assert of_tree(tree) == 0, name
        assert jax.grad(of_tree)(tree)["weight"].shape == shape, name


@each_shape
def test_decay_and_proximal_steps_keep_an_empty_weight(shape):
    params = {"weight": jnp.zeros(shape)}
    for transform in (
        eqxreg.weight_decay(0.1),
        eqxreg.sign_decay(0.1),
        eqxreg.cautious_weight_decay(0.1),
        eqxreg.decay_towards(params, 0.1),
        eqxreg.soft_threshold(0.1, learning_rate=0.1),
        eqxreg.group_soft_threshold(0.1, learning_rate=0.1),
        eqxreg.elastic_net_prox(0.1, 0.1, learning_rate=0.1),
    ):
        updates, _ = transform.update(params, transform.init(params), params)
        assert updates["weight"].shape == shape


BLOCKS = [
    eqxreg.SpectralNorm(blocks=3),
    eqxreg.SpectralScale(blocks=3, method="gram"),
    eqxreg.SpectralCap(blocks=3),
    eqxreg.Orthogonal(blocks=3),
    eqxreg.LowRank(1, blocks=3),
    eqxreg.AlmostOrthogonal(blocks=3),
    eqxreg.Cayley(blocks=3),
]


@pytest.mark.parametrize("p", BLOCKS, ids=lambda p: type(p).__name__)
def test_blocks_without_rows_or_columns_stay(p):
    for shape in ((0, 3), (6, 0)):
        bound, raw = p.bind(jnp.zeros(shape))
        assert bound(raw).shape == shape
    assert eqxreg.spectral_norm(jnp.zeros((0, 3)), blocks=3) == 0
    tree = {"weight": jnp.zeros((0, 3))}
    assert eqxreg.spectral_norm_penalty(tree, 1.0, blocks=3) == 0


MLPS = {"no input": (0, 2, 4), "no output": (2, 0, 4), "no unit": (2, 2, 0)}


@pytest.mark.parametrize("sizes", MLPS.values(), ids=MLPS.keys())
def test_a_model_without_inputs_or_units_trains_with_every_wrapper(sizes, key):
    mlp = eqx.nn.MLP(*sizes, 1, key=key)
    x = jnp.ones(sizes[0])
    wrappers = (
        eqxreg.OrthogonalConstraint,
        eqxreg.WeightNormConstraint,
        eqxreg.SpectralCapConstraint,
        lambda layer: eqxreg.Constraint(layer, "weight", eqxreg.SpectralNorm()),
        lambda layer: eqxreg.Constraint(layer, "weight", eqxreg.MatrixExp()),
    )
    for wrap in wrappers:
        layers = tuple(map(wrap, mlp.layers))
        wrapped = eqx.tree_at(lambda m: m.layers, mlp, layers)
        loss = lambda m: jnp.sum(m(x) ** 2)
        value, gradient = filter_jit(eqx.filter_value_and_grad(loss))(wrapped)
        assert jnp.isfinite(value)
        for leaf in jax.tree.leaves(gradient):
            assert jnp.all(jnp.isfinite(leaf))


@pytest.mark.parametrize("sizes", MLPS.values(), ids=MLPS.keys())
def test_the_norms_of_a_model_without_inputs_or_units_are_known(sizes, key):
    mlp = eqx.nn.MLP(*sizes, 1, key=key)
    norms = [np.linalg.norm(w, 2) if w.size else 0.0 for w in _weights(mlp)]
    np.testing.assert_allclose(
        eqxreg.lipschitz_bound(mlp), np.prod(norms), rtol=1e-3, atol=0
    )
    for layer, norm in zip(mlp.layers, norms, strict=True):
        np.testing.assert_allclose(eqxreg.operator_norm(layer), norm, rtol=1e-3)
    values = eqxreg.metrics(mlp)
    for name, norm in zip(("[0]", "[1]"), norms, strict=True):
        found = values[f".layers{name}.weight/singular_value"]
        np.testing.assert_allclose(found, norm, rtol=1e-3)


def _weights(mlp):
    return [np.asarray(layer.weight, np.float64) for layer in mlp.layers]


@pytest.mark.parametrize("with_shape", [False, True])
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)], ids=str)
def test_a_stateful_wrapper_takes_an_empty_layer(sizes, with_shape, key):
    options = {"input_shape": (sizes[0],)} if with_shape else {}
    layer, state = eqx.nn.make_with_state(eqxreg.SpectralNormConstraint)(
        eqx.nn.Linear(*sizes, key=key), key=key, **options
    )
    x = jnp.ones(sizes[0])
    out, state = layer(x, state)
    out, state = filter_jit(layer)(x, state)
    assert out.shape == (sizes[1],) and jnp.all(jnp.isfinite(out))
    assert eqx.nn.inference_mode(layer)(x, state)[0].shape == (sizes[1],)
    assert eqxreg.bake(layer, state).weight.shape == (sizes[1], sizes[0])


def test_a_convolution_without_outputs_has_norm_zero(key):
    conv = eqx.nn.Conv2d(3, 0, 3, key=key)
    assert eqxreg.operator_norm(conv, (3, 8, 8)) == 0
    assert eqxreg.lipschitz_bound(conv) == 0


@pytest.mark.parametrize("p", [MAPS["spectral norm"], MAPS["unit norm"]], ids=repr)
def test_a_wide_layer_without_outputs_is_called(p, key):
    # One whose products are scaled, and not its weight.
    layer = eqxreg.Constraint(eqx.nn.Linear(600, 0, key=key), "weight", p)
    assert layer(jnp.ones(600)).shape == (0,)
    assert eqxreg.WeightNormConstraint(layer)(jnp.ones(600)).shape == (0,)


STACKED = ("max norm", "spectral norm", "spectral cap", "orthogonal", "cayley", "box")


@pytest.mark.parametrize("name", STACKED)
def test_a_stack_of_no_layers_stays(name, key):
    p = MAPS[name]
    linear = lambda key: eqx.nn.Linear(3, 2, key=key)
    within = lambda key: eqxreg.Constraint(linear(key), "weight", p)
    keys = jax.random.split(key, 2)[:0]
    stack = eqx.filter_vmap(linear)(keys)
    wrapped = eqxreg.Constraint(stack, "weight", p)
    out = eqx.filter_vmap(lambda layer, x: layer(x))(wrapped, jnp.ones((0, 3)))
    assert out.shape == (0, 2)
    for layer in (wrapped, eqx.filter_vmap(within)(keys)):
        assert eqxreg.bake(layer).weight.shape == (0, 2, 3)
    if isinstance(p, eqxreg.Projection):
        params = eqx.filter(stack, eqx.is_inexact_array)
        transform = eqxreg.project(p)
        updates, _ = transform.update(params, transform.init(params), params)
        assert updates.weight.shape == (0, 2, 3)
        assert eqxreg.project_params(stack, p).weight.shape == (0, 2, 3)
