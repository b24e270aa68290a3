"""What maps cost, by what can be counted: memory traffic, operations, traces. Ceilings
are a little above what is counted now."""

import re

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import optax
import pytest
from eqxreg._maps import WeightNorm, _rescale, warm
from hlo import counts_of_today, program_of


SIZE = 1024
WEIGHT = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
BYTES = 4 * SIZE * SIZE


def gradient_of(p):
    def both(weight, cotangent):
        value, pull_back = jax.vjp(p, weight)
        return value, pull_back(cotangent)[0]

    return both


def one_power_step(weight, cotangent):
    p = eqxreg.SpectralNorm()
    start = jnp.ones((1, SIZE))
    measured = lambda weight: p.measured(weight, warm(1), start)
    value, pull_back, start = jax.vjp(measured, weight, has_aux=True)
    return value, pull_back(cotangent)[0], start


# Forward and backward: reads and writes of a whole weight, and operations. Of the ten
# of the norm maps, two are in the branch for norms that are out of range.
COSTS = {
    "copy": (lambda w, g: (w + 1, g + 1), 4.1, 20),
    "max_norm-unit": (gradient_of(eqxreg.MaxNorm(0.5, "unit")), 10.1, 210),
    "max_norm-whole": (gradient_of(eqxreg.MaxNorm(0.5)), 10.1, 175),
    "unit_norm": (gradient_of(eqxreg.UnitNorm(axis="unit")), 10.1, 225),
    "weight_norm": (gradient_of(WeightNorm("unit", jnp.ones((SIZE, 1)))), 10.1, 195),
    "box": (gradient_of(eqxreg.Box(-1, 1)), 5.1, 45),
    "spectral_norm": (one_power_step, 8.1, 320),
}


def operations(text: str) -> int:
    return len(re.findall(r"^ +\S.* = ", text, re.MULTILINE))


@counts_of_today
@pytest.mark.parametrize("name", list(COSTS))
def test_memory_traffic_and_operations_of_a_map(name):
    fn, passes, most = COSTS[name]
    program = program_of(fn, WEIGHT, WEIGHT)
    assert program.cost_analysis()["bytes accessed"] <= passes * BYTES
    assert operations(program.as_text()) <= most
    # Nothing of the size of a weight is written but the results.
    assert program.memory_analysis().temp_size_in_bytes <= 0.01 * BYTES


def layer_step(wrap):
    """A step of gradient descent of a layer with a batch of 16, and its arguments."""
    linear = eqx.nn.Linear(SIZE, SIZE, key=jax.random.key(0))
    layer, state = eqx.nn.make_with_state(wrap)(linear)
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def loss(params, state, x):
        layer = eqx.combine(params, static)
        if isinstance(layer, eqx.nn.StatefulLayer) and layer.is_stateful():
            batched = jax.vmap(layer, in_axes=(0, None), out_axes=(0, None))
            out, state = batched(x, state)
        else:
            out = jax.vmap(layer)(x)
        return jnp.mean(out**2), state

    def step(params, state, x):
        grads, state = jax.grad(loss, has_aux=True)(params, state, x)
        return jax.tree.map(lambda w, g: w - 1e-3 * g, params, grads), state

    return step, (params, state, jnp.ones((16, SIZE)))


# In reads and writes of a whole weight. A norm reads it once, and once more in the
# branch for what is out of range; the spectral norm reads it twice, and in the branch
# that searches.
STEPS = {
    "plain": (lambda layer: layer, 5.2),
    "max_norm": (
        lambda layer: eqxreg.MaxNormConstraint(layer, "weight", 0.5, axis="unit"),
        7.3,
    ),
    "weight_norm": (eqxreg.WeightNormConstraint, 7.3),
    "spectral_norm": (
        lambda layer: eqxreg.SpectralNormConstraint(layer, key=jax.random.key(0)),
        9.5,
    ),
}


@counts_of_today
@pytest.mark.parametrize("name", list(STEPS))
def test_memory_traffic_of_a_step_of_a_layer(name):
    wrap, passes = STEPS[name]
    step, args = layer_step(wrap)
    program = program_of(step, *args)
    assert program.cost_analysis()["bytes accessed"] <= passes * BYTES
    assert program.memory_analysis().temp_size_in_bytes <= 0.1 * BYTES


# In a step, each instruction that writes something of the size of the weight. One more
# is the update of plain SGD: a branch can be given nothing that is not in memory.
WRITES = {
    "plain": (optax.identity, ["dot", "fusion"]),
    "project": (
        lambda: eqxreg.project(eqxreg.MaxNorm(0.5, axis="unit"), every=10),
        ["dot", "fusion", "fusion"],
    ),
}


@counts_of_today
@pytest.mark.parametrize("name", list(WRITES))
def test_steps_between_projections_write_one_array_more(name):
    after, expected = WRITES[name]
    optimiser = optax.chain(optax.sgd(1e-3), after())

    def step(params, state, x):
        loss = lambda params: jnp.mean((x @ params["weight"].T) ** 2)
        updates, state = optimiser.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = {"weight": jnp.ones((SIZE, SIZE))}
    state = optimiser.init(params)
    program = program_of(step, params, state, jnp.ones((16, SIZE)))
    text = program.as_text()
    written = rf"= f32\[{SIZE},{SIZE}\]\S* (dot|fusion|copy|custom-call)\("
    assert sorted(re.findall(written, text[text.index("ENTRY") :])) == expected
    assert " copy(" not in text


def gradient_text(depth, scan, p):
    model = eqx.nn.MLP(8, 8, 8, depth, scan=scan, key=jax.random.key(0))
    model = model if p is None else eqxreg.constrain(model, p)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, x):
        return jnp.sum(eqx.combine(params, static)(x) ** 2)

    return program_of(jax.grad(loss), params, jnp.ones(8)).as_text()


def test_a_scanned_stack_compiles_to_as_much_however_deep_it_is():
    p = eqxreg.MaxNorm(0.5, axis="unit")
    shallow, deep = (operations(gradient_text(d, True, p)) for d in (4, 50))
    assert deep <= shallow + 20


def test_operations_grow_with_the_layers_and_no_faster():
    p = eqxreg.MaxNorm(0.5, axis="unit")
    counts = [operations(gradient_text(d, False, p)) for d in (2, 4, 8)]
    assert counts[2] - counts[1] <= 2.2 * (counts[1] - counts[0])


def test_layers_of_one_shape_are_traced_once(monkeypatch):
    calls = []
    norms_of = _rescale.norms_of
    counted = lambda *args: calls.append(None) or norms_of(*args)
    monkeypatch.setattr(_rescale, "norms_of", counted)

    def traces(width, depth):
        calls.clear()
        model = eqx.nn.MLP(width, width, width, depth, key=jax.random.key(0))
        model = eqxreg.constrain(model, eqxreg.MinMaxNorm(0.1, 0.5, 0.5, axis="unit"))
        params, static = eqx.partition(model, eqx.is_inexact_array)
        loss = lambda params, x: jnp.sum(eqx.combine(params, static)(x) ** 2)
        jax.make_jaxpr(jax.grad(loss))(params, jnp.ones(width))
        return len(calls)

    # Of widths that no other test has.
    assert 0 < traces(83, 12) <= traces(89, 2)


@pytest.mark.usefixtures("standard_promotion")
def test_a_training_step_is_traced_once(key):
    traces = []
    model = eqxreg.constrain(
        eqx.nn.MLP(4, 2, 8, depth=2, key=key),
        eqxreg.MaxNorm(jnp.asarray(0.5), axis="unit"),
    )
    optimiser = optax.chain(
        eqxreg.weight_decay(1e-2),
        optax.adam(1e-2),
        eqxreg.soft_threshold(1e-3, learning_rate=1e-2),
        eqxreg.project(eqxreg.SpectralScale(2.0), every=2, momentum="tangent"),
    )
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        traces.append(None)
        grads = eqx.filter_grad(lambda model: jnp.sum(model(jnp.ones(4)) ** 2))(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = optimiser.update(grads, state, params)
        return eqx.apply_updates(model, updates), state

    for _ in range(4):
        model, state = step(model, state)
    assert len(traces) == 1
