"""Models that are spread over devices: the numbers are those of one device, and weights
stay where they are."""

import functools as ft

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hlo import collectives
from jax.sharding import NamedSharding, PartitionSpec as P
from meshes import LAYOUTS, check_close, check_laid_out, mesh_of
from quick import jit
from tables import sample


pytestmark = pytest.mark.usefixtures("quick_compilation")


SHAPE = (64, 32)

# What a step does with weights.


def parameters() -> dict:
    """A weight for each layout, one of them in half precision. Some of the norms of
    units are within the bounds below."""
    scale = jnp.linspace(0.02, 0.2, SHAPE[0])[:, None]

    def weight(seed: int, dtype: str) -> jax.Array:
        return (sample("float32", shape=SHAPE, seed=seed) * scale).astype(dtype)

    dtypes = {name: "float32" for name in LAYOUTS} | {"both": "bfloat16"}
    return {name: {"weight": weight(i, dtypes[name])} for i, name in enumerate(LAYOUTS)}


def placed(axes: str = "Auto"):
    """The same on a mesh, and how they are laid out there."""
    mesh = mesh_of(axes)
    layouts = {
        name: {"weight": NamedSharding(mesh, spec)} for name, spec in LAYOUTS.items()
    }
    return jax.device_put(parameters(), layouts), layouts


def on_mesh(tree):
    """The tree, with what is not on the mesh yet as a whole on each device."""
    whole = NamedSharding(mesh_of(), P())
    layouts = jax.tree.map(
        lambda leaf: (
            leaf.sharding if isinstance(leaf.sharding, NamedSharding) else whole
        ),
        tree,
    )
    return jax.device_put(tree, layouts), layouts


UNIT = eqxreg.MaxNorm(0.7, axis="unit")
# Maps that hold arrays of their own.
BOX = eqxreg.Box(np.full(SHAPE[1], -0.05), np.full((SHAPE[0], 1), 0.05))
PINNED = eqxreg.Pinned(np.arange(SHAPE[1]) % 3 == 0, np.full(SHAPE, 0.5))
TRANSFORMS = {
    "max_norm": eqxreg.project(UNIT),
    "max_norm-every": eqxreg.project(UNIT, every=2),
    "max_norm-whole": eqxreg.project(eqxreg.MaxNorm(0.7)),
    "min_max_norm": eqxreg.project(eqxreg.MinMaxNorm(0.3, 0.7, axis="unit")),
    "unit_norm": eqxreg.project(eqxreg.UnitNorm(0.7, axis="unit")),
    "relative": eqxreg.project(eqxreg.Relative(eqxreg.UnitNorm(axis="unit"))),
    "weight_decay": eqxreg.weight_decay(0.1),
    "soft_threshold": eqxreg.soft_threshold(0.1, learning_rate=0.1),
    "group_soft_threshold": eqxreg.group_soft_threshold(1.0, learning_rate=0.1),
    "spectral_scale": eqxreg.project(eqxreg.SpectralScale(0.7)),
    "box-arrays": eqxreg.project(BOX),
    "pinned": eqxreg.project(PINNED),
}
PENALTIES = {
    "l2": ft.partial(eqxreg.l2_penalty, rate=0.1),
    "distance": ft.partial(eqxreg.distance_penalty, projection=UNIT, rate=0.1),
    "group_lasso": ft.partial(eqxreg.group_lasso_penalty, rate=0.1),
}
# They multiply a matrix with itself, or search for its largest singular value.
MATRIX_PENALTIES = {
    "orthogonality": ft.partial(eqxreg.orthogonality_penalty, rate=0.01),
    "spectral_norm": ft.partial(eqxreg.spectral_norm_penalty, rate=0.1),
}


def updated(transform, params, state):
    """The weights after a step of the transform, and its state."""
    steps = jax.tree.map(lambda w: (0.1 * w.astype("float32")).astype(w.dtype), params)
    updates, state = transform.update(steps, state, params)
    return optax.apply_updates(params, updates), state


def check_sends_little(found, largest: int) -> None:
    """Norms and vectors are summed over devices, in at least single precision; nothing
    else is sent."""
    for collective in found:
        assert collective.kind == "all-reduce", collective.line
        assert max(collective.sizes) <= largest, collective.line
        assert not collective.is_half, collective.line


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_a_transform_leaves_weights_where_they_are(name: str):
    transform = TRANSFORMS[name]
    update, init = ft.partial(updated, transform), jit(transform.init)
    params, (sharded, _) = parameters(), placed()
    if name == "spectral_scale":  # It is slow to compile.
        params, sharded = (
            {k: tree[k] for k in ("row", "both")} for tree in (params, sharded)
        )
    expected, found = (params, init(params)), (sharded, init(sharded))
    found, layouts = on_mesh(found)
    step, sharded_step = jit(update), jit(update, out_shardings=layouts)
    sharded_step = sharded_step.lower(*found).compile()
    check_sends_little(collectives(sharded_step.as_text()), SHAPE[0])
    for _ in range(2):
        expected, found = step(*expected), sharded_step(*found)
    check_close(found[0], expected[0])


@pytest.mark.parametrize("name", list(PENALTIES))
def test_a_penalty_leaves_weights_where_they_are(name: str):
    gradient = jax.value_and_grad(PENALTIES[name])
    sharded, layouts = placed()
    compiled = jit(gradient, out_shardings=(None, layouts)).lower(sharded).compile()
    check_sends_little(collectives(compiled.as_text()), SHAPE[0])
    check_close(compiled(sharded), jit(gradient)(parameters()))


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("fsdp", "float32"), ("both", "bfloat16")],
)
def test_power_iteration_leaves_weights_where_they_are(layout: str, dtype: str):
    key = jax.random.key(0)
    weight = sample(dtype, 0.1, shape=SHAPE)
    linear = eqx.nn.Linear(*SHAPE[::-1], use_bias=False, dtype=dtype, key=key)
    linear = eqx.tree_at(lambda m: m.weight, linear, weight)
    make = eqx.nn.make_with_state(eqxreg.SpectralNormConstraint)
    model, state = make(linear, key=key)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    x = jnp.ones(SHAPE[1], dtype)

    def step(params, state):
        def loss(params):
            out, new = eqx.combine(params, static)(x, state)
            return jnp.sum(out.astype("float32") ** 2), new

        gradients, new = jax.grad(loss, has_aux=True)(params)
        moved = lambda w, g: w - (0.01 * g.astype("float32")).astype(w.dtype)
        return jax.tree.map(moved, params, gradients), new

    sharding = NamedSharding(mesh_of(), LAYOUTS[layout])
    sharded = jax.device_put(params, sharding)
    layouts = jax.tree.map(lambda _: sharding, params)
    options = {"out_shardings": (layouts, None)}
    compiled = jit(step, **options).lower(sharded, state).compile()
    found = collectives(compiled.as_text())
    assert all(c.kind == "all-reduce" for c in found), found
    # The layer's own product is in the precision of the layer.
    ours = [c for c in found if "eqxreg" in c.line and "eqx.nn.Linear" not in c.line]
    assert ours
    check_sends_little(ours, SHAPE[0])
    check_close(compiled(sharded, state)[0], jit(step)(params, state)[0])


def test_the_check_sees_what_it_is_for():
    sharding = NamedSharding(mesh_of(), P("model", "data"))
    weight = jax.device_put(sample("bfloat16", shape=SHAPE), sharding)
    total = lambda w: jax.lax.reduce(w, jnp.bfloat16(0), jax.lax.add, (1,))
    (sums,) = collectives(jit(total).lower(weight).compile().as_text())
    assert sums.kind == "all-reduce" and sums.is_half and sums.sizes == (32,)
    double = jit(lambda w: w + w, out_shardings=NamedSharding(sharding.mesh, P()))
    found = collectives(double.lower(weight).compile().as_text())
    assert {c.kind for c in found} == {"all-gather"}


# Whole training steps.


def network() -> eqx.nn.MLP:
    return eqx.nn.MLP(16, 8, 32, 1, key=jax.random.key(1))


def batch():
    x = sample("float32", shape=(16, 16), seed=1)
    return x, jnp.sin(x[:, :8] * 3)


HIDDEN = eqxreg.select(where=lambda path, *_: "layers[1]" not in path) & eqxreg.weights
TIGHT = eqxreg.MaxNorm(0.6, axis="unit")
WAYS = ("forward", "project", "project-2", "penalties")


def training(way: str, mean=lambda tree: tree):
    """Parameters, the optimiser, and a step of training. `mean` is over the devices
    that have a part of the batch each, if the program is that of one device."""
    model, optimiser = network(), optax.sgd(0.1, momentum=0.9)
    if way == "forward":
        model = eqxreg.constrain(model, TIGHT, where=HIDDEN)
    if way.startswith("project"):
        every = 2 if way.endswith("2") else 1
        project = eqxreg.project(TIGHT, every, mask=HIDDEN)
        optimiser = optax.chain(optimiser, project)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, x, y):
        model = eqx.combine(params, static)
        penalties = {**PENALTIES, **MATRIX_PENALTIES} if way == "penalties" else {}
        penalty = sum((fn(model) for fn in penalties.values()), jnp.float32(0))
        return jnp.mean((jax.vmap(eqxreg.bake(model))(x) - y) ** 2) + penalty

    def step(params, state, x, y):
        value, gradients = mean(jax.value_and_grad(loss)(params, x, y))
        updates, state = optimiser.update(gradients, state, params)
        return eqx.apply_updates(params, updates), state, value

    return params, optimiser, step


def trained(step, params, state, *data):
    """Losses and weights of three steps."""
    losses = []
    for _ in range(3):
        params, state, value = step(params, state, *data)
        losses.append(value)
    return losses, params


@ft.cache
def alone(way: str):
    """`trained` on one device."""
    params, optimiser, step = training(way)
    return trained(jit(step), params, optimiser.init(params), *batch())


# Of the two layers' weights; biases are whole.
NETWORKS = {
    "fsdp": [LAYOUTS["fsdp"]] * 2,
    "tensor": [LAYOUTS["column"], LAYOUTS["row"]],
}


def network_layouts(params, layout: str, mesh):
    specs = iter(NETWORKS[layout])
    pick = lambda leaf: next(specs) if leaf.ndim == 2 else P()
    return jax.tree.map(lambda leaf: NamedSharding(mesh, pick(leaf)), params)


@pytest.mark.parametrize("layout", list(NETWORKS))
@pytest.mark.parametrize("way", WAYS)
def test_training_on_a_mesh_is_that_of_one_device(way: str, layout: str):
    mesh = mesh_of()
    params, optimiser, step = training(way)
    layouts = network_layouts(params, layout, mesh)
    params = jax.device_put(params, layouts)
    state = optimiser.init(params)
    data = jax.device_put(batch(), NamedSharding(mesh, P("data")))
    options = {"out_shardings": (layouts, None, None), "donate_argnums": (0, 1)}
    found = trained(jit(step, **options), params, state, *data)
    check_close(found, alone(way))


@pytest.mark.parametrize("way", ["forward", "project-2"])
def test_filter_shard_in_the_step_changes_no_number(way: str):
    mesh = mesh_of()
    params, optimiser, step = training(way)
    layouts = network_layouts(params, "fsdp", mesh)
    rows = NamedSharding(mesh, P("data"))

    @jit
    def sharded_step(params, state, *data):
        params, data = eqx.filter_shard(params, layouts), eqx.filter_shard(data, rows)
        params, state, value = step(params, state, *data)
        return eqx.filter_shard(params, layouts), state, value

    found = trained(sharded_step, params, optimiser.init(params), *batch())
    check_close(found, alone(way))


@pytest.mark.parametrize(
    ("way", "checked"),
    [("forward", False), ("project", False), ("project-2", True), ("penalties", True)],
)
def test_shard_map_over_the_batch_is_training_on_one_device(way: str, checked: bool):
    mesh = mesh_of()

    def mean(pair):
        pair = jax.lax.pmean(pair, "data")
        # Where JAX checks what differs between devices, the derivative with respect to
        # what does not is their sum already.
        shares = mesh.shape["data"] if checked else 1
        return pair[0], jax.tree.map(lambda gradient: gradient / shares, pair[1])

    params, optimiser, step = training(way, mean)
    specs = {"in_specs": (P(), P(), P("data"), P("data")), "out_specs": P()}
    mapped = jit(jax.shard_map(step, mesh=mesh, check_vma=checked, **specs))
    found = trained(mapped, params, optimiser.init(params), *batch())
    check_close(found, alone(way))


def test_metrics_on_a_mesh_are_those_of_one_device():
    model = eqxreg.constrain(network(), TIGHT, where=HIDDEN)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    measure = jit(lambda params: eqxreg.metrics(eqx.combine(params, static)))
    sharded = jax.device_put(params, network_layouts(params, "tensor", mesh_of()))
    check_close(measure(sharded), measure(params))


# Explicit axes.

LAID_OUT = {
    "box-arrays": BOX,
    "pinned": PINNED,
    "masked": eqxreg.Masked(np.arange(SHAPE[1]) % 3 == 0),
    "max_norm": UNIT,
    "max_norm-whole": eqxreg.MaxNorm(0.7),
    "min_max_norm": eqxreg.MinMaxNorm(0.3, 0.7, axis="unit"),
    "unit_norm": eqxreg.UnitNorm(0.7, axis="unit"),
}


@pytest.mark.parametrize("name", list(LAID_OUT))
def test_maps_on_explicit_axes_keep_the_layout(name: str):
    def total(params):
        weights = jax.tree.map(LAID_OUT[name], params)
        cubes = (w.astype("float32") ** 3 for w in jax.tree.leaves(weights))
        return sum(jnp.sum(cube) for cube in cubes), weights

    gradient = jit(jax.grad(total, has_aux=True))
    sharded, layouts = placed("Explicit")
    found = gradient(sharded)
    for tree in found:
        check_laid_out(tree, layouts)
    check_close(found, gradient(parameters()))


@pytest.mark.parametrize("name", ["max_norm-every", "relative", "pinned"])
def test_transforms_on_explicit_axes_keep_the_layout(name: str):
    transform = TRANSFORMS[name]
    update, init = jit(ft.partial(updated, transform)), jit(transform.init)
    params, (sharded, layouts) = parameters(), placed("Explicit")
    expected, found = (params, init(params)), (sharded, init(sharded))
    for _ in range(2):
        expected, found = update(*expected), update(*found)
    check_laid_out(found[0], layouts)
    check_close(found[0], expected[0])


@pytest.mark.parametrize("name", [*PENALTIES, *MATRIX_PENALTIES])
def test_penalties_on_explicit_axes_keep_the_layout(name: str):
    gradient = jit(jax.value_and_grad({**PENALTIES, **MATRIX_PENALTIES}[name]))
    some = lambda tree: {layout: tree[layout] for layout in ("column", "both")}
    sharded, layouts = map(some, placed("Explicit"))
    found = gradient(sharded)
    check_laid_out(found[1], layouts)
    check_close(found, gradient(some(parameters())))
