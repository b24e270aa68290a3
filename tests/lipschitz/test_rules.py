"""Rules for layers of one's own, and what has no Lipschitz bound: it is named, with its
place and a remedy."""

import functools as ft
import math

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jacobians import built


pytestmark = pytest.mark.usefixtures("quick_compilation")

nn = eqx.nn


class Doubled(eqx.Module):
    """A layer of the tests' own, with a child."""

    inner: nn.Linear

    def __call__(self, x, *, key=None):
        return 2 * self.inner(x)


def test_a_registered_rule_serves_its_layer_and_its_subclasses(key):
    class Own(Doubled):
        pass

    class Child(Own):
        def __call__(self, x, *, key=None):
            return super().__call__(-x)

    seen = []

    @eqxreg.lipschitz_bound.register(Own)
    def rule(layer, input_shape):
        seen.append(input_shape)
        return 2 * eqxreg.lipschitz_bound(layer.inner, input_shape)

    inner = built(nn.Linear, 3, 3)
    model = nn.Sequential([Own(inner), Child(inner)])
    expected = 4 * eqxreg.lipschitz_bound(inner) ** 2
    np.testing.assert_allclose(eqxreg.lipschitz_bound(model, (3,)), expected, rtol=1e-5)
    assert seen == [(3,), (3,)]
    assert rule(Own(inner), None) > 0


@pytest.mark.parametrize(
    "bad", [-1.0, math.nan, None, jnp.ones(2), jnp.array(1), 1j], ids=str
)
def test_a_registered_rule_must_return_a_bound(bad, key):
    class Own(Doubled):
        pass

    eqxreg.lipschitz_bound.register(Own)(lambda layer, input_shape: bad)
    with pytest.raises(ValueError, match="rule for Own .* must return a non-negative"):
        eqxreg.lipschitz_bound(Own(built(nn.Linear, 3, 3)))


def test_only_classes_are_registered():
    with pytest.raises(TypeError, match="takes a class, as in .*got Identity"):
        eqxreg.lipschitz_bound.register(nn.Identity())


def test_a_subclass_with_a_call_of_its_own_has_no_bound_by_inheritance(key):
    class Scaled(nn.Linear):
        def __call__(self, x, *, key=None):
            return 10 * super().__call__(x)

    class Plain(nn.Linear):
        pass

    with pytest.raises(ValueError, match="is a Scaled, which is called differently"):
        eqxreg.lipschitz_bound(Scaled(2, 2, key=key))
    assert eqxreg.lipschitz_bound(Plain(2, 2, key=key)) > 0


def _seq(layer):
    return nn.Sequential([nn.Identity(), layer])


_SAME = {"padding": "SAME"}
UNBOUNDED = {
    "norm": (_seq(nn.LayerNorm(3)), r"`\.layers\[1\]` is a LayerNorm, .*1/sqrt\(eps\)"),
    "rms": (_seq(nn.RMSNorm(3)), r"is a RMSNorm, .*1/sqrt\(eps\)"),
    "group": (_seq(nn.GroupNorm(1, 3)), r"is a GroupNorm, .*1/sqrt\(eps\)"),
    "batch": (
        _seq(nn.BatchNorm(3, "batch", mode="batch")),
        "is a BatchNorm, .*depends on the batch",
    ),
    "attention": (
        built(nn.MultiheadAttention, 1, 4),
        "The model is a MultiheadAttention, .*not globally Lipschitz .*Mnih, 2021",
    ),
    "gru": (built(nn.GRUCell, 2, 2), "is a GRUCell, .*grows with the state"),
    "lstm": (built(nn.LSTMCell, 2, 2), "is a LSTMCell, .*grows with the state"),
    "embedding": (built(nn.Embedding, 2, 2), "is a Embedding, .*token"),
    "own": (
        _seq(Doubled(built(nn.Linear, 2, 2))),
        r"`\.layers\[1\]` is a Doubled, .*lipschitz_bound\.register\(Doubled\)",
    ),
    "lambda": (
        _seq(nn.Lambda(lambda x: 2 * x)),
        r"`\.layers\[1\]\.fn` is the function `<lambda>`, .*`jax\.nn\.relu`",
    ),
    "square": (_seq(nn.Lambda(jnp.square)), "`square`, whose slope has no bound"),
    "partial": (
        nn.Lambda(ft.partial(jnp.clip, min=0.0)),
        r"`\.fn` is a `functools\.partial` of `clip`.*with these arguments",
    ),
    "partial-celu": (ft.partial(jax.nn.celu, alpha=-1.0), "with these arguments"),
    "activation": (
        built(nn.MLP, 2, 2, 2, 1, jnp.exp),
        r"`\.activation` is `exp`, whose slope has no bound",
    ),
    "layer of an MLP": (
        eqx.tree_at(lambda m: m.layers[1], built(nn.MLP, 2, 2, 2, 1), nn.LayerNorm(2)),
        r"`\.layers\[1\]` is a LayerNorm",
    ),
    "pool": (nn.Pool(1, jax.lax.mul, 1, 2), "`operation` other than `lax.max`"),
    "adaptive": (
        nn.AdaptivePool(1, 1, jnp.prod),
        "`operation` other than `jnp.max`",
    ),
    "log_softmax": (_seq(nn.Lambda(jax.nn.log_softmax)), "give `input_shape`"),
    "reflect": (
        built(nn.Conv1d, 1, 1, 3, padding_mode="REFLECT", **_SAME),
        "`padding_mode='REFLECT'`.*give `input_shape`",
    ),
    "circular": (
        built(nn.Conv1d, 1, 1, 3, 2, padding_mode="CIRCULAR", **_SAME),
        "`padding_mode='CIRCULAR'`.*give `input_shape`",
    ),
    "list": ([nn.Identity()], "is a list, for which no Lipschitz bound is known"),
    "shared": (
        nn.Shared(
            (nn.Identity(), built(nn.Linear, 2, 2), built(nn.Linear, 2, 2)),
            lambda m: m[1].weight,
            lambda m: m[2].weight,
        ),
        "is a Shared, .*Call it, and bound what it returns",
    ),
}


@pytest.mark.parametrize("case", UNBOUNDED)
def test_what_has_no_bound_is_named_with_its_place_and_a_remedy(case):
    model, message = UNBOUNDED[case]
    with pytest.raises(ValueError, match=message):
        eqxreg.lipschitz_bound(model)


@pytest.mark.parametrize("shape", [(5,), (2, 5, 5), (3, 5)])
def test_an_input_shape_that_does_not_fit_is_an_error(shape, key):
    layers = [built(nn.Conv1d, 2, 3, 3), nn.Lambda(jnp.ravel)]
    with pytest.raises(ValueError, match=r"`\.layers\[0\]` .*`input_shape`"):
        eqxreg.lipschitz_bound(nn.Sequential(layers), shape)
