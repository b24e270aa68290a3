"""Mistakes are told when an object is built, by argument, value and remedy."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from tables import Own


pytestmark = pytest.mark.usefixtures("quick_compilation")


KEY = jax.random.key(0)
LINEAR = eqx.nn.Linear(4, 3, key=KEY)
MIXED = "all positive.*jnp.abs"

VALUE_ERRORS = {
    "momentum": (
        lambda: eqxreg.project(eqxreg.MaxNorm(1.0), momentum="none"),
        '`momentum` must be "keep" or "tangent".*none',
    ),
    "b1": (
        lambda: eqxreg.project(eqxreg.MaxNorm(1.0), momentum="tangent", b1=1),
        r"`b1` must be in \[0, 1\), got 1",
    ),
    "relative ord": (
        lambda: eqxreg.Relative(eqxreg.MaxNorm(1.0, ord=1)),
        "must have `ord=2`",
    ),
    "relative blocks": (
        lambda: eqxreg.Relative(eqxreg.SpectralNorm(blocks=3)),
        "must have `blocks=1`",
    ),
    "relative to nothing": (
        lambda: eqxreg.Relative(eqxreg.UnitNorm())(jnp.ones(3)),
        "does not know what its bounds are relative to",
    ),
    "relative model": (
        lambda: eqxreg.project_params(LINEAR, eqxreg.Relative(eqxreg.UnitNorm())),
        "does not know what its bounds are relative to",
    ),
    "peak": (
        lambda: eqxreg.corrected_weight_decay(0.1, optax.constant_schedule(1.0)),
        "give `peak_learning_rate`",
    ),
    "peak zero": (
        lambda: eqxreg.independent_weight_decay(0.1, 1.0, 0.0),
        "`peak_learning_rate` must be positive",
    ),
    "threshold": (
        lambda: eqxreg.soft_threshold(-1.0, learning_rate=1.0),
        "`rate` must be non-negative",
    ),
    "learning rate": (
        lambda: eqxreg.soft_threshold(1.0, learning_rate=-1.0),
        "`learning_rate` must be non-negative",
    ),
    "l2": (
        lambda: eqxreg.elastic_net_prox(1.0, -1.0, learning_rate=1.0),
        "`l2` must be non-negative",
    ),
    "group axis": (
        lambda: eqxreg.group_soft_threshold(1.0, "rows", learning_rate=1.0),
        "`axis` must be None",
    ),
    "no group": (
        lambda: eqxreg.soft_threshold(1.0, learning_rate=1.0).init({"w": 1}),
        "selects nothing",
    ),
    "orthogonality": (
        lambda: eqxreg.orthogonality_penalty(LINEAR, 1.0, mode="rows"),
        '`mode` must be "soft" or "keras".*rows',
    ),
    "matrix penalty": (
        lambda: eqxreg.spectral_norm_penalty({"weight": jnp.ones(3)}, 1.0),
        "rank 2 or more",
    ),
    "spectral bias": (
        lambda: eqxreg.project(eqxreg.SpectralCap(), mask=eqxreg.trainable).init(
            eqx.filter(LINEAR, eqx.is_array)
        ),
        "^`.bias`: .*rank 2 or more.*choose others by `where` or `mask`",
    ),
    "spectral bias, now": (
        lambda: eqxreg.project_params(LINEAR, eqxreg.SpectralCap(), eqxreg.trainable),
        "^`.bias`: .*rank 2 or more",
    ),
    "injected mask": (
        lambda: optax.inject_hyperparams(eqxreg.weight_decay)(
            0.1, mask=eqxreg.weights
        ).init(eqx.filter(LINEAR, eqx.is_array)),
        "name `mask` in `static_args`",
    ),
    "freeze nothing": (
        lambda: eqxreg.freeze(LINEAR, eqxreg.embeddings),
        "selects nothing",
    ),
    "freeze no layer": (
        lambda: eqxreg.freeze({"weight": jnp.ones(2)}, eqxreg.weights),
        "in no module",
    ),
    "negative": (lambda: eqxreg.MaxNorm(-1.0), "`max_norm` must be positive.*-1.0"),
    "zero": (lambda: eqxreg.MaxNorm(0), "`max_norm` must be positive.*0.0"),
    "nan": (lambda: eqxreg.MaxNorm(float("nan")), "`max_norm` must be positive.*nan"),
    "infinite": (lambda: eqxreg.MaxNorm(np.inf), "`max_norm` must be positive.*inf"),
    "array": (lambda: eqxreg.MaxNorm(jnp.asarray(-1.0)), "`max_norm` must be positive"),
    "vector": (lambda: eqxreg.MaxNorm(jnp.ones(2)), r"must be a scalar.*\(2,\)"),
    "low": (lambda: eqxreg.MinMaxNorm(-1.0, 1.0), "`min_norm` must be non-negative"),
    "order": (lambda: eqxreg.MinMaxNorm(2.0, 1.0), "`min_norm` must be at most `max_n"),
    "rate": (
        lambda: eqxreg.MinMaxNorm(0.0, 1.0, rate=0),
        r"`rate` must be in \(0, 1\]",
    ),
    "norm": (lambda: eqxreg.UnitNorm(0.0), "`norm` must be positive"),
    "total": (lambda: eqxreg.Simplex(-1.0), "`total` must be positive"),
    "box": (lambda: eqxreg.Box(1.0, 0.0), "`lower` must be at most `upper`.*1.0"),
    "box nan": (lambda: eqxreg.Box(np.nan, 0.0), "`lower` must be a number.*nan"),
    "interval": (
        lambda: eqxreg.Interval(1.0, 1.0),
        "`lower` must be less than `upper`",
    ),
    "endless": (
        lambda: eqxreg.Interval(0.0, np.inf),
        "`upper` must be finite.*Positiv",
    ),
    "axis": (
        lambda: eqxreg.MaxNorm(1.0, axis="units"),
        '`axis` must be.*"unit".*units',
    ),
    "axis twice": (lambda: eqxreg.MaxNorm(1.0, axis=(0, 0)), "`axis` must be"),
    "axis rank": (
        lambda: eqxreg.MaxNormConstraint(LINEAR, "weight", 1.0, axis=2),
        "`axis=2` is out of range for a weight of rank 2",
    ),
    "axis same": (lambda: eqxreg.MaxNorm(1.0, axis=(0, -2))(jnp.ones((2, 3))), "twice"),
    "rank": (
        lambda: eqxreg.Constraint(
            eqx.nn.PReLU(), "negative_slope", eqxreg.MaxNorm(1.0, axis="unit")
        ),
        "rank 1 or more",
    ),
    "ord": (lambda: eqxreg.MaxNorm(1.0, ord=3), "`ord` must be 1, 2 or `jnp.inf`.*3"),
    "map": (lambda: eqxreg.Positive("relu"), '`map` must be "softplus" or "exp".*relu'),
    "empty chain": (lambda: eqxreg.Chain(), "`Chain` needs at least one map"),
    "name": (
        lambda: eqxreg.MaxNormConstraint(LINEAR, "wieght", 1.0),
        'Linear has no `wieght`. It has "weight", "bias".',
    ),
    "name of a module": (
        lambda: eqxreg.MaxNormConstraint(
            eqx.nn.MultiheadAttention(2, 4, key=KEY), "weight", 1.0
        ),
        'no arrays itself; they are in "query_proj".*query_proj.weight',
    ),
    "empty name": (lambda: eqxreg.NonNegativeConstraint(LINEAR, ""), "must be a name"),
    "no names": (lambda: eqxreg.NonNegativeConstraint(LINEAR, ()), "must be a name"),
    "no string": (lambda: eqxreg.NonNegativeConstraint(LINEAR, 3), "a name such as.*3"),
    "name twice": (
        lambda: eqxreg.NonNegativeConstraint(LINEAR, ("weight", "weight")),
        "sequence of different ones",
    ),
    "rate type": (lambda: eqxreg.MinMaxNorm(0.0, 1.0, rate="a"), "`rate` must be in"),
    "index": (
        lambda: eqxreg.MaxNormConstraint(
            eqx.nn.MLP(2, 2, 2, 1, key=KEY), "layers.7.weight", 1.0
        ),
        "has no `7`",
    ),
    "none": (
        lambda: eqxreg.MaxNormConstraint(
            eqx.nn.Linear(4, 3, use_bias=False, key=KEY), "bias", 1.0
        ),
        'is None in this Linear.*It has "weight"',
    ),
    "schedule": (
        lambda: eqxreg.MaxNormConstraint(
            LINEAR, "weight", optax.constant_schedule(1.0)
        ),
        "schedule needs a step.*eqxreg.project",
    ),
    "schedule call": (
        lambda: eqxreg.MaxNorm(optax.constant_schedule(1.0))(jnp.ones(2)),
        "schedule needs a step",
    ),
    "mixed signs": (
        lambda: eqxreg.Constraint(LINEAR, "weight", eqxreg.Positive()),
        MIXED,
    ),
    "outside": (
        lambda: eqxreg.Interval(0.0, 1.0).inverse(jnp.asarray([2.0])),
        "strictly between",
    ),
    "nothing to constrain": (
        lambda: eqxreg.constrain(LINEAR, eqxreg.MaxNorm(1.0), eqxreg.embeddings),
        "`where=eqxreg.embeddings` selects nothing. It has `.weight`, `.bias`",
    ),
    "no module": (
        lambda: eqxreg.constrain({"weight": jnp.ones(2)}, eqxreg.MaxNorm(1.0)),
        "in no module, so that.*eqxreg.project_params",
    ),
    "nothing to project": (
        lambda: eqxreg.project_params(jnp.ones(2), eqxreg.MaxNorm(1.0)),
        "selects nothing.*eqxreg.everything",
    ),
    "nothing to keep projected": (
        lambda: eqxreg.project(eqxreg.MaxNorm(1.0)).init({"bias": jnp.ones(2)}),
        "`mask=eqxreg.weights` selects nothing",
    ),
    "nothing to decay": (
        lambda: eqxreg.weight_decay(0.1, eqxreg.embeddings).init({"a": jnp.ones(2)}),
        "`mask=eqxreg.embeddings` selects nothing",
    ),
    "every": (
        lambda: eqxreg.project(eqxreg.MaxNorm(1.0), every=0),
        "`every` must be a",
    ),
    "decay": (lambda: eqxreg.weight_decay(-0.1), "`rate` must be non-negative.*-0.1"),
    "penalty": (lambda: eqxreg.l1_penalty(LINEAR, -0.1), "`rate` must be non-negative"),
    "no params": (
        lambda: eqxreg.weight_decay(0.1).update(
            LINEAR, eqxreg.weight_decay(0.1).init(eqx.filter(LINEAR, eqx.is_array))
        ),
        "`eqxreg.weight_decay` needs the parameters.*params=eqx.filter",
    ),
    "no params to project": (
        lambda: eqxreg.project(eqxreg.MaxNorm(1.0)).update(
            LINEAR, eqxreg.project(eqxreg.MaxNorm(1.0)).init(LINEAR)
        ),
        "`eqxreg.project` needs the parameters",
    ),
}

TYPE_ERRORS = {
    "integer": (
        lambda: eqxreg.Constraint(
            eqx.tree_at(lambda m: m.weight, LINEAR, jnp.ones((3, 4), int)),
            "weight",
            eqxreg.MaxNorm(1.0),
        ),
        "floating or complex.*int32",
    ),
    "integer raw": (
        lambda: eqxreg.NonNegative().check(jnp.arange(3)),
        "floating or complex array, got an array of int32",
    ),
    "no array": (
        lambda: eqxreg.MaxNormConstraint(Own(KEY), "tables", 1.0),
        "must name a floating or complex array.*dict",
    ),
    "complex": (
        lambda: eqxreg.NonNegative().check(jnp.ones(3, "complex64")),
        "`NonNegative` has no meaning for a complex weight",
    ),
    "bool": (lambda: eqxreg.Box(False, 1.0), "`lower` must be a number"),
    "complex bound": (lambda: eqxreg.UnitNorm(jnp.asarray(1j)), "`norm` must be real"),
    "no projection": (
        lambda: eqxreg.project(eqxreg.Positive()),
        "`projection` must be an `eqxreg.Projection`.*Positive works in the forward",
    ),
    "no projection to apply": (
        lambda: eqxreg.project_params(LINEAR, eqxreg.Chain(eqxreg.Positive())),
        "`projection` must be an `eqxreg.Projection`.*Chain works in the forward",
    ),
    "no map": (
        lambda: eqxreg.Constraint(LINEAR, "weight", 2.0),
        "`parametrization` must be an `eqxreg.Parametrization` such as.*2.0",
    ),
    "no straight projection": (
        lambda: eqxreg.StraightThrough(eqxreg.Positive()),
        "`projection` must be an `eqxreg.Projection`",
    ),
    "no link": (lambda: eqxreg.Chain(eqxreg.NonNegative(), 2.0), "`Chain` is made of"),
    "no layer type": (lambda: eqxreg.select(LINEAR), "takes types of layers"),
    "a type for a selector": (
        lambda: eqxreg.constrain(LINEAR, eqxreg.MaxNorm(1.0), where=eqx.nn.Linear),
        r"Did you mean `eqxreg.select\(Linear\)`",
    ),
    "a string for a selector": (
        lambda: eqxreg.trainables(LINEAR, "weight"),
        "said by a selector.*'weight'",
    ),
    "a state for a selector": (
        lambda: eqxreg.report(LINEAR, eqx.nn.State(LINEAR)),
        "not by an `eqx.nn.State`.*`state=state`",
    ),
    "scheduled penalty": (
        lambda: eqxreg.l2_penalty(LINEAR, optax.constant_schedule(1.0)),
        "steps are not counted here",
    ),
}


@pytest.fixture(autouse=True)
def _without_checks_of_annotations():
    """So that what is tested is our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("name", list(VALUE_ERRORS))
def test_a_wrong_value_is_told(name):
    build, text = VALUE_ERRORS[name]
    with pytest.raises(ValueError, match=text):
        build()


@pytest.mark.parametrize("name", list(TYPE_ERRORS))
def test_a_wrong_type_is_told(name):
    build, text = TYPE_ERRORS[name]
    with pytest.raises(TypeError, match=text):
        build()


def test_traced_mistakes_are_told_when_they_are_known(capfd):
    @jax.jit
    def build(bound):
        return eqxreg.MaxNorm(bound)(jnp.ones(2))

    with pytest.raises(Exception, match="`max_norm` must be positive"):
        jax.block_until_ready(build(jnp.asarray(-1.0)))

    @jax.jit
    def invert(weight):
        return eqxreg.Positive().inverse(weight)

    with pytest.raises(Exception, match=MIXED):
        jax.block_until_ready(invert(jnp.asarray([-1.0, 1.0])))


def test_a_stateful_wrapper_asks_for_its_state():
    def make(key):
        spectral = eqx.nn.SpectralNorm(eqx.nn.Linear(4, 3, key=key), "weight", key=key)
        return eqxreg.MaxNormConstraint(spectral, "weight", 1.0)

    layer, _ = eqx.nn.make_with_state(make)(KEY)
    with pytest.raises(
        ValueError, match=r"stateful: call it as `out, state = layer\(x"
    ):
        layer(jnp.ones(4))
    with pytest.raises(ValueError, match=r"The model is a stateful.*bake\(model"):
        eqxreg.bake(layer)
    with pytest.raises(ValueError, match=r"report\(model, state=state\)"):
        eqxreg.report(layer)


def test_user_subclasses_must_say_how_to_map_and_to_invert():
    class Half(eqxreg.Parametrization):
        def __call__(self, raw):
            return raw / 2

    with pytest.raises(TypeError, match="abstract.*inverse"):
        Half()
