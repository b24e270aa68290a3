"""Every transform keeps its promise in the training loops that people write.

Each promise is one that the same loop without the transform breaks.
"""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import filter_jit, jit
from tables import exact


pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compilation")

X = jnp.linspace(-1.0, 1.0, 4)
RATE = 0.1
STEPS = 6
BOUND = 0.3


class Model(eqx.Module):
    """A network, and a layer that the loss does not depend on: what it does, transforms
    have done."""

    used: eqx.nn.MLP
    idle: eqx.nn.Linear

    def __init__(self, key):
        self.used = eqx.nn.MLP(4, 2, 8, depth=1, key=key)
        self.idle = eqx.nn.Linear(6, 5, key=key)

    def __call__(self, x):
        return self.used(x)


def build(key=0, dtype="float32"):
    model = Model(jax.random.key(key))
    cast = lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf
    return jax.tree.map(cast, model)


def params_of(model):
    return eqx.filter(model, eqx.is_inexact_array)


STATIC = eqx.filter(build(), eqx.is_inexact_array, inverse=True)
START = params_of(build())


def grads_of(params, scale=1.0):
    def loss(params):
        model = eqx.combine(params, STATIC)
        out = model(X.astype(model.idle.weight.dtype))
        return scale * jnp.sum((out - 1.0).astype("float32") ** 2)

    return jax.grad(loss)(params)


# Promises


@dataclasses.dataclass(frozen=True)
class Case:
    """A transform, where it stands, and what it promises of the weights."""

    name: str
    transform: optax.GradientTransformation
    kept: Callable
    first: bool = False

    def __str__(self):
        return self.name

    def chain(self, *steps):
        """An optimiser with the transform in its place."""
        if self.first:
            return optax.chain(self.transform, *steps)
        return optax.chain(*steps, self.transform)


def in_the_ball(params, slack=1e-6):
    norms = [np.sqrt((exact(w) ** 2).sum(-1)) for w in weights_of(params)]
    return max(n.max() for n in norms) <= BOUND * (1 + slack)


def weights_of(params):
    return eqxreg.trainables(params, eqxreg.weights)


def on_the_sphere(params, slack=1e-5):
    pairs = zip(weights_of(params), weights_of(START), strict=True)
    norms = [(np.linalg.norm(exact(a)), np.linalg.norm(exact(b))) for a, b in pairs]
    return all(abs(a - b) <= slack * b for a, b in norms)


def has_zeros(params, slack=0):
    return all((exact(w) == 0).mean() > 0.1 for w in weights_of(params))


def has_zero_units(params, slack=0):
    return (exact(params.idle.weight) == 0).all(-1).mean() >= 0.2


def idle_is_shorter(params, slack=0):
    start = np.linalg.norm(exact(START.idle.weight))
    return 0.1 * start < np.linalg.norm(exact(params.idle.weight)) < 0.95 * start


def idle_is_nearer_to_one(params, slack=0):
    away = lambda params: np.linalg.norm(exact(params.idle.weight) - 1)
    return away(params) < 0.95 * away(START)


ONES = jax.tree.map(jnp.ones_like, START)
CASES = [
    Case("project", eqxreg.project(eqxreg.MaxNorm(BOUND, "unit")), in_the_ball),
    Case(
        "project-tangent",
        eqxreg.project(eqxreg.MaxNorm(BOUND, "unit"), momentum="tangent"),
        in_the_ball,
    ),
    Case(
        "project-relative",
        eqxreg.project(eqxreg.Relative(eqxreg.UnitNorm())),
        on_the_sphere,
    ),
    Case("soft", eqxreg.soft_threshold(0.4, learning_rate=RATE), has_zeros),
    Case(
        "group_soft",
        eqxreg.group_soft_threshold(2.0, learning_rate=RATE),
        has_zero_units,
    ),
    Case("elastic", eqxreg.elastic_net_prox(0.4, 0.1, learning_rate=RATE), has_zeros),
    Case("decay", eqxreg.weight_decay(1.0), idle_is_shorter, first=True),
    Case("sign_decay", eqxreg.sign_decay(0.1), idle_is_shorter, first=True),
    Case("cautious", eqxreg.cautious_weight_decay(1.0), idle_is_shorter, first=True),
    Case("towards", eqxreg.decay_towards(ONES, 1.0), idle_is_nearer_to_one, first=True),
    Case(
        "corrected",
        eqxreg.corrected_weight_decay(1.0, RATE),
        idle_is_shorter,
        first=True,
    ),
    Case("independent", eqxreg.independent_weight_decay(0.1, RATE), idle_is_shorter),
]
NOTHING = Case("nothing", optax.identity(), lambda params, slack: True)


# Loops: each takes a case, and gives the parameters at the end.


def advance(optimiser, params, state, grads):
    updates, state = optimiser.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def run(optimiser, params=START, scales=(1.0,) * STEPS):
    state = optimiser.init(params)
    step = jit(
        lambda params, state, scale: advance(
            optimiser, params, state, grads_of(params, scale)
        )
    )
    for scale in scales:
        params, state = step(params, state, scale)
    return params


def sgd():
    return optax.sgd(RATE, momentum=0.5)


def chained(case):
    return run(case.chain(sgd()))


def eager(case):
    optimiser, params = case.chain(sgd()), START
    state = optimiser.init(params)
    for _ in range(4):
        params, state = advance(optimiser, params, state, grads_of(params))
    return params


def with_adam(case):
    return run(case.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(RATE)))


def masked(case):
    inner = optax.masked(case.transform, eqxreg.weights)
    return run(dataclasses.replace(case, transform=inner).chain(sgd()))


def partitioned(case):
    label = lambda is_weight: "weights" if is_weight else "rest"
    labels = jax.tree.map(label, eqxreg.weights(START))
    parts = {"weights": case.chain(sgd()), "rest": sgd()}
    return run(optax.partition(parts, lambda _: labels))


def accumulated(case):
    return run(optax.MultiSteps(case.chain(sgd()), 2), scales=(1.0,) * 2 * STEPS)


def if_finite(case):
    # Steps without a finite gradient are left out, transform and all.
    scales = (1.0, 1.0, jnp.nan, 1.0, 1.0, 1.0)
    return run(optax.apply_if_finite(case.chain(sgd()), 3), scales=scales)


def injected(case):
    @optax.inject_hyperparams
    def optimiser(learning_rate):
        return case.chain(optax.sgd(learning_rate))

    return run(optimiser(learning_rate=optax.constant_schedule(RATE)))


def lookahead(case):
    optimiser = optax.lookahead(case.chain(sgd()), sync_period=4, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(START)
    state = optimiser.init(params)
    step = jit(
        lambda params, state: advance(optimiser, params, state, grads_of(params.fast))
    )
    for _ in range(STEPS):
        params, state = step(params, state)
    return params.fast


def schedule_free(case):
    if case.first:
        optimiser = optax.contrib.schedule_free(case.chain(optax.sgd(RATE)), RATE)
    else:
        optimiser = case.chain(optax.contrib.schedule_free(optax.sgd(RATE), RATE))
    return run(optimiser)


def scanned(case):
    optimiser = case.chain(sgd())

    def body(carry, _):
        return advance(optimiser, *carry, grads_of(carry[0])), None

    carry = START, optimiser.init(START)
    return jit(lambda carry: jax.lax.scan(body, carry, length=STEPS)[0][0])(carry)


def over_seeds(case):
    optimiser = case.chain(sgd())

    def train(params):
        state = optimiser.init(params)
        for _ in range(4):
            params, state = advance(optimiser, params, state, grads_of(params))
        return params

    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf * 0.99]), START)
    trained = jit(jax.vmap(train))(stack)
    return jax.tree.map(lambda leaf: leaf[0], trained)


def donated(case):
    optimiser = case.chain(sgd())
    params = jax.tree.map(jnp.copy, START)
    state = optimiser.init(params)

    @filter_jit(donate="all")
    def step(params, state):
        return advance(optimiser, params, state, grads_of(params))

    for _ in range(STEPS):
        params, state = step(params, state)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((START, ONES)))
    return params


def in_bfloat16(case):
    return run(case.chain(sgd()), params_of(build(dtype="bfloat16")))


def in_float16(case):
    return run(case.chain(sgd()), params_of(build(dtype="float16")))


LOOPS = {
    loop.__name__: loop
    for loop in (
        chained,
        eager,
        with_adam,
        masked,
        partitioned,
        accumulated,
        if_finite,
        injected,
        lookahead,
        schedule_free,
        scanned,
        over_seeds,
        donated,
        in_bfloat16,
        in_float16,
    )
}
# What an emitted update can lose to the precision of the weight.
SLACK = {"in_bfloat16": 1e-2, "in_float16": 2e-3}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_promise_is_kept(loop, case):
    params = LOOPS[loop](case)
    assert case.kept(params, SLACK.get(loop, 1e-5))


@pytest.mark.parametrize("loop", LOOPS)
def test_no_promise_is_kept_without_its_transform(loop):
    params = LOOPS[loop](NOTHING)
    kept = [case.name for case in CASES if case.kept(params, SLACK.get(loop, 1e-5))]
    assert kept == []
