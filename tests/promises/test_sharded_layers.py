"""Constrained layers that are called on a mesh: what the plain layer sends is sent, and
norms and vectors; the weights stay where they are."""

import functools as ft
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import pytest
from eqxreg._maps import _factored
from hlo import Collective, collectives
from jax.sharding import NamedSharding, PartitionSpec as P
from meshes import LAYOUTS, check_close, check_laid_out, mesh_of
from quick import jit
from tables import sample


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def _as_large_layers(monkeypatch):
    """These are small, and are to multiply as large ones do."""
    monkeypatch.setattr(_factored, "MANY_COLUMNS", 1)


KEY = jax.random.key(0)
ROWS, COLUMNS = 128, 64
# Entries of the largest sum: the inner products of the vectors of a Krylov space. What
# a device has of a weight is more.
LARGEST = 24 * 24

MAPS = {
    "max_norm": eqxreg.MaxNorm(0.5, axis="unit"),
    "max_norm-whole": eqxreg.MaxNorm(0.5),
    "unit_norm": eqxreg.UnitNorm(0.5, axis="unit"),
    "spectral_norm": eqxreg.SpectralNorm(0.5),
}
WRAPPERS: dict[str, Callable] = {
    "plain": lambda linear: linear,
    **{
        name: ft.partial(eqxreg.Constraint, weight_name="weight", parametrization=p)
        for name, p in MAPS.items()
    },
    "weight_norm": ft.partial(eqxreg.WeightNormConstraint, weight_name="weight"),
    "spectral_norm-state": ft.partial(eqxreg.SpectralNormConstraint, key=KEY),
    "spectral_scale-state": ft.partial(
        eqxreg.SpectralScaleConstraint, cap=0.5, key=KEY
    ),
}


class Program(NamedTuple):
    """A call for a batch, and its derivatives."""

    step: Callable
    """From `arguments` to the outputs with the state, and the gradients of two."""
    arguments: tuple[Any, eqx.nn.State, jax.Array]
    """Parameters, state and inputs."""


def program(model, state: eqx.nn.State, x: jax.Array) -> Program:
    params, static = eqx.partition(model, eqx.is_inexact_array)
    is_stateful = isinstance(model, eqx.nn.StatefulLayer) and model.is_stateful()

    def loss(params, state, x):
        model = eqx.combine(params, static)
        if is_stateful:
            out, state = jax.vmap(model, (0, None), (0, None))(x, state)
        else:
            out = jax.vmap(model)(x)
        return jnp.sum(jnp.sin(out.astype("float32"))), (out, state)

    def step(params, state, x):
        of_both = jax.grad(loss, (0, 2), has_aux=True)
        gradients, found = of_both(params, state, x)
        return found, gradients

    return Program(step, (params, state, x))


def called(name: str, dtype: str = "float32") -> Program:
    linear = eqx.nn.Linear(COLUMNS, ROWS, dtype=dtype, key=KEY)
    model, state = eqx.nn.make_with_state(WRAPPERS[name])(linear)
    return program(model, state, sample(dtype, shape=(16, COLUMNS), seed=1))


def scanned(name: str) -> Program:
    """A stack of layers, called in a `lax.scan`."""
    mlp = eqx.nn.MLP(COLUMNS, COLUMNS, ROWS, 4, scan=True, key=KEY)
    if name != "plain":
        mlp = eqxreg.constrain(mlp, MAPS[name])
    _, state = eqx.nn.make_with_state(lambda: None)()
    return program(mlp, state, sample("float32", shape=(16, COLUMNS), seed=1))


# On a mesh.

# Where weights are, and whether the compiler (`Auto`) or JAX places all else.
PLACES = [
    ("fsdp", "Auto"),
    ("row", "Auto"),
    ("column", "Explicit"),
    ("both", "Explicit"),
]


class OnMesh(NamedTuple):
    """What comes of a program on a mesh."""

    found: Any
    layouts: Any
    """Those of the parameters."""
    collectives: list[Collective]


def on_mesh(program: Program, layout: str, axes: str) -> OnMesh:
    mesh = mesh_of(axes)
    params, state, x = program.arguments
    layouts = jax.tree.map_with_path(
        lambda *at: NamedSharding(mesh, spec_of(*at, layout)), params
    )
    params = jax.device_put(params, layouts)
    state = jax.device_put(state, NamedSharding(mesh, P()))
    x = jax.device_put(x, shares := NamedSharding(mesh, P("data", None)))
    options = {"out_shardings": (None, (layouts, shares))} if axes == "Auto" else {}
    compiled = jit(program.step, **options).lower(params, state, x).compile()
    found = compiled(params, state, x)
    return OnMesh(found, layouts, collectives(compiled.as_text()))


def spec_of(path: tuple, leaf: jax.Array, layout: str) -> P:
    """Weights as the layout says, and what there is one of for each row as the rows."""
    rows, columns = LAYOUTS[layout]
    own = {"weight": (rows, columns), "gain": (rows, None), "bias": (rows,)}
    spec = own[path[-1].name]
    return P(*[None] * (leaf.ndim - len(spec)), *spec)


@ft.cache
def plain_on_mesh(make: Callable, *place: str) -> OnMesh:
    return on_mesh(make("plain"), *place)


@ft.cache
def alone(make: Callable, name: str):
    """What comes of a program on one device."""
    program = make(name)
    return jit(program.step)(*program.arguments)


def check_leaves_weights_where_they_are(make: Callable, name: str, *place: str) -> None:
    """The numbers are those of one device, and what is sent is what the plain layer
    sends, sums of norms and of vectors, and vectors."""
    got, plain = on_mesh(make(name), *place), plain_on_mesh(make, *place)
    check_laid_out(got.found[1][0], got.layouts)
    check_close(got.found, alone(make, name))
    count = lambda found: Counter((c.kind, n) for c in found for n in c.sizes)
    more = count(got.collectives) - count(plain.collectives)
    assert more
    limits = {"all-reduce": LARGEST, "all-gather": max(ROWS, COLUMNS)}
    assert all(size <= limits.get(kind, 0) for kind, size in more), more


@pytest.mark.parametrize(("layout", "axes"), PLACES)
@pytest.mark.parametrize("name", [name for name in WRAPPERS if name != "plain"])
def test_a_called_layer_leaves_its_weight_where_it_is(
    name: str, layout: str, axes: str
):
    check_leaves_weights_where_they_are(called, name, layout, axes)


@pytest.mark.parametrize("name", ["max_norm", "weight_norm", "spectral_norm-state"])
def test_norms_of_a_weight_in_half_precision_are_summed_in_single(name: str):
    got = on_mesh(called(name, "bfloat16"), "both", "Auto")
    # The layer's own product is in the precision of the layer.
    ours = [c for c in got.collectives if "eqxreg" in c.line]
    ours = [c for c in ours if "eqx.nn.Linear" not in c.line]
    assert ours and not any(c.is_half for c in ours), ours


# Explicit axes need what a scan carries to be laid out the same after a layer.
@pytest.mark.parametrize(("layout", "axes"), [("both", "Auto"), ("row", "Explicit")])
@pytest.mark.parametrize("name", ["max_norm", "spectral_norm"])
def test_a_stack_in_a_scan_leaves_its_weights_where_they_are(
    name: str, layout: str, axes: str
):
    check_leaves_weights_where_they_are(scanned, name, layout, axes)
