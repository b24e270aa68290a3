"""Bounds and rates that follow schedules or are traced: counted as in Optax, and
checked as numbers are."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import filter_jit, jit


pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compilation")

PARAMS = {"weight": jnp.asarray([[3.0, -4.0], [1.0, 2.0]])}
ZEROS = {"weight": jnp.zeros((2, 2))}


def seen_by(build, optimiser_update):
    """The steps at which the first updates evaluate a schedule."""
    steps = []

    def schedule(step):
        steps.append(int(step))
        return 1.0

    transform = build(schedule)
    state = transform.init(PARAMS)
    steps.clear()
    for _ in range(3):
        _, state = optimiser_update(transform)(ZEROS, state, PARAMS)
    return steps


@pytest.mark.parametrize(
    "build",
    [
        lambda schedule: eqxreg.project(eqxreg.MaxNorm(schedule)),
        lambda schedule: eqxreg.project(eqxreg.MaxNorm(schedule), every=2),
        lambda schedule: eqxreg.project(eqxreg.Relative(eqxreg.MaxNorm(schedule))),
        lambda schedule: eqxreg.soft_threshold(schedule, learning_rate=0.1),
        lambda schedule: eqxreg.soft_threshold(0.1, learning_rate=schedule),
        lambda schedule: eqxreg.weight_decay(schedule),
        lambda schedule: optax.scale_by_learning_rate(schedule),
    ],
)
def test_schedules_are_counted_from_zero_as_in_optax(build):
    assert seen_by(build, lambda transform: transform.update) == [0, 1, 2]


def test_every_kth_update_projects_with_the_bound_of_its_step():
    # The second and the fourth update are those of the steps 1 and 3.
    bound = lambda step: jnp.where(step % 2 == 0, 9.0, 4.0 - step)
    projection = eqxreg.project(eqxreg.MaxNorm(bound), every=2)
    state, norms = projection.init(PARAMS), []
    for _ in range(4):
        updates, state = projection.update(ZEROS, state, PARAMS)
        new = optax.apply_updates(PARAMS, updates)["weight"]
        norms.append(np.linalg.norm(np.asarray(new, np.float64)))
    whole = np.sqrt(30)
    np.testing.assert_allclose(norms, [whole, 3.0, whole, 1.0], rtol=1e-5)


# Schedules that go wrong in the second step, in the words of the argument.
falling = lambda step: 1.0 - 2.0 * step
not_a_number = lambda step: jnp.where(step > 0, jnp.nan, 1.0)
endless = lambda step: jnp.where(step > 0, jnp.inf, 1.0)
POSITIVE, RATE = "must be positive and finite", "must be non-negative and finite"
WRONG = {
    "max_norm": (
        lambda: eqxreg.project(eqxreg.MaxNorm(falling)),
        f"`max_norm` {POSITIVE}",
    ),
    "max_norm, NaN": (
        lambda: eqxreg.project(eqxreg.MaxNorm(not_a_number)),
        f"`max_norm` {POSITIVE}",
    ),
    "max_norm, infinite": (
        lambda: eqxreg.project(eqxreg.MaxNorm(endless)),
        f"`max_norm` {POSITIVE}",
    ),
    "max_norm, seldom": (
        lambda: eqxreg.project(eqxreg.MaxNorm(falling), every=10),
        f"`max_norm` {POSITIVE}",
    ),
    "relative": (
        lambda: eqxreg.project(eqxreg.Relative(eqxreg.MaxNorm(falling))),
        f"`max_norm` {POSITIVE}",
    ),
    "norm": (lambda: eqxreg.project(eqxreg.UnitNorm(falling)), f"`norm` {POSITIVE}"),
    "cap": (lambda: eqxreg.project(eqxreg.SpectralCap(falling)), f"`cap` {POSITIVE}"),
    "total": (lambda: eqxreg.project(eqxreg.Simplex(falling)), f"`total` {POSITIVE}"),
    "box": (
        lambda: eqxreg.project(eqxreg.Box(-0.5, falling)),
        "`lower` must be at most `upper`",
    ),
    "box, both": (
        lambda: eqxreg.project(eqxreg.Box(lambda step: 2.0 * step, lambda step: 1.0)),
        "`lower` must be at most `upper`",
    ),
    "box, array": (
        lambda: eqxreg.project(eqxreg.Box(jnp.asarray(0.5), falling)),
        "`lower` must be at most `upper`",
    ),
    "box, NaN": (
        lambda: eqxreg.project(eqxreg.Box(not_a_number, 2.0)),
        "`lower` must be a number",
    ),
    "min_norm within": (
        lambda: eqxreg.project(
            eqxreg.Chain(
                eqxreg.NonNegative(),
                eqxreg.StraightThrough(
                    eqxreg.MinMaxNorm(lambda step: 2.0 * step, lambda step: 1.0)
                ),
            )
        ),
        "`min_norm` must be at most `max_norm`",
    ),
    "learning_rate": (
        lambda: eqxreg.soft_threshold(0.1, learning_rate=falling),
        f"`learning_rate` {RATE}",
    ),
    "rate": (
        lambda: eqxreg.group_soft_threshold(not_a_number, learning_rate=0.1),
        f"`rate` {RATE}",
    ),
    "l2": (
        lambda: eqxreg.elastic_net_prox(0.1, endless, learning_rate=0.1),
        f"`l2` {RATE}",
    ),
    "decay": (lambda: eqxreg.weight_decay(falling), f"`rate` {RATE}"),
    "towards": (lambda: eqxreg.decay_towards(ZEROS, falling), f"`rate` {RATE}"),
    "corrected": (
        lambda: eqxreg.corrected_weight_decay(0.1, falling, 1.0),
        f"`learning_rate` {RATE}",
    ),
    "independent": (
        lambda: eqxreg.independent_weight_decay(falling, 1.0),
        f"`rate` {RATE}",
    ),
}
each_wrong = pytest.mark.parametrize("name", list(WRONG))


def two_updates(transform, update):
    state = transform.init(PARAMS)
    _, state = jax.block_until_ready(update(ZEROS, state, PARAMS))
    return jax.block_until_ready(update(ZEROS, state, PARAMS))


@each_wrong
def test_what_a_schedule_gives_is_checked_when_it_is_known(name):
    build, text = WRONG[name]
    transform = build()
    with pytest.raises(ValueError, match=f"{text}.*, got"):
        two_updates(transform, transform.update)


@each_wrong
def test_what_a_schedule_gives_is_checked_within_a_program(name):
    build, text = WRONG[name]
    transform = build()
    with pytest.raises(Exception, match=text):
        two_updates(transform, filter_jit(transform.update))


def scanned(transform):
    def body(state, _):
        updates, state = transform.update(ZEROS, state, PARAMS)
        return state, updates

    return lambda state: jax.lax.scan(body, state, length=2)[1]


def mapped(transform):
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (ZEROS, PARAMS))

    def run(state):
        states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
        states = states._replace(step=jnp.arange(2, dtype=jnp.int32))
        return jax.vmap(transform.update)(stack[0], states, stack[1])[0]

    return run


def conditional(transform):
    def run(state):
        late = state._replace(step=state.step + 1)
        update = lambda state: transform.update(ZEROS, state, PARAMS)[0]
        return jax.lax.cond(late.step > 0, update, lambda _: ZEROS, late)

    return run


@pytest.mark.parametrize("name", ["max_norm", "box", "learning_rate", "decay"])
@pytest.mark.parametrize("way", [scanned, mapped, conditional])
def test_what_a_schedule_gives_is_checked_under(way, name):
    build, text = WRONG[name]
    transform = build()
    with pytest.raises(Exception, match=text):
        jax.block_until_ready(jit(way(transform))(transform.init(PARAMS)))


def test_numbers_cost_no_check_at_run_time():
    for transform in (
        eqxreg.project(eqxreg.Box(-1.0, 1.0)),
        eqxreg.soft_threshold(0.1, learning_rate=0.1),
        eqxreg.weight_decay(jnp.asarray(0.1)),
    ):
        state = transform.init(PARAMS)
        assert "callback" not in str(
            jax.make_jaxpr(transform.update)(ZEROS, state, PARAMS)
        )


# Traced rates


def test_injected_rates_are_checked_in_each_step():
    for build in (
        lambda rate: eqxreg.weight_decay(rate),
        lambda rate: eqxreg.soft_threshold(rate, learning_rate=0.1),
        lambda rate: eqxreg.project(eqxreg.Box(0.5, rate)),
    ):
        optimiser = optax.inject_hyperparams(build)(rate=1.0)
        state = optimiser.init(PARAMS)
        update = filter_jit(optimiser.update)
        _, state = update(ZEROS, state, PARAMS)
        state.hyperparams["rate"] = jnp.asarray(-1.0)
        with pytest.raises(Exception, match=r"`rate` must be|`lower` must be"):
            jax.block_until_ready(update(ZEROS, state, PARAMS))


PENALTIES = {
    "l1": (eqxreg.l1_penalty, "rate"),
    "l2": (eqxreg.l2_penalty, "rate"),
    "elastic, l1": (lambda t, r: eqxreg.elastic_net_penalty(t, r, 1.0), "l1"),
    "elastic, l2": (lambda t, r: eqxreg.elastic_net_penalty(t, 1.0, r), "l2"),
    "distance": (
        lambda t, r: eqxreg.distance_penalty(t, eqxreg.MaxNorm(1.0), r),
        "rate",
    ),
    "group": (eqxreg.group_lasso_penalty, "rate"),
    "spectral": (eqxreg.spectral_norm_penalty, "rate"),
    "orthogonality": (eqxreg.orthogonality_penalty, "rate"),
}


@pytest.mark.parametrize("name", list(PENALTIES))
def test_a_rate_of_a_penalty_is_checked_traced_or_not(name):
    penalty, argument = PENALTIES[name]
    text = f"`{argument}` {RATE}"
    for rate in (-1.0, jnp.asarray(jnp.nan), 10**400):
        with pytest.raises(ValueError, match=f"{text}, got"):
            penalty(PARAMS, rate)
    for way in (penalty, jax.grad(penalty), jax.checkpoint(penalty)):
        run = filter_jit(way)
        assert jnp.isfinite(jax.tree.leaves(run(PARAMS, jnp.asarray(1.0)))[0]).all()
        with pytest.raises(Exception, match=text):
            jax.block_until_ready(run(PARAMS, jnp.asarray(-1.0)))


# Numbers


def test_integers_too_large_for_a_float_are_infinite():
    with pytest.raises(ValueError, match=f"`max_norm` {POSITIVE}, got inf"):
        eqxreg.MaxNorm(10**400)
    with pytest.raises(ValueError, match=f"`rate` {RATE}, got inf"):
        eqxreg.weight_decay(10**400)
    with pytest.raises(ValueError, match="`peak_learning_rate` must be pos.*, got inf"):
        eqxreg.independent_weight_decay(0.1, 0.1, 10**400)
    assert eqxreg.Box(-(10**400), 10**400).upper == np.inf


def test_two_schedules_of_a_kind_make_equal_maps():
    bound = optax.constant_schedule(1.0)
    assert eqx.tree_equal(eqxreg.MaxNorm(bound), eqxreg.MaxNorm(bound))
    assert not eqx.tree_equal(eqxreg.MaxNorm(bound), eqxreg.MaxNorm(falling))
