"""Models that are not called, but whose methods are: what is wrapped, and what their
methods compute with."""

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import exact


pytestmark = pytest.mark.usefixtures("quick_compilation")


X = jnp.linspace(-1.0, 1.0, 4)
P = eqxreg.MaxNorm(0.3)


def paths(tree):
    return [path for path, _ in eqxreg.trainables(tree, paths=True)]


class Parameters(eqx.Module):
    """Holds arrays, and computes nothing."""

    nu: jax.Array
    eps: jax.Array


class Physics(eqx.Module):
    params: Parameters

    def rhs(self, x):
        return self.params.nu @ x

    @property
    def size(self):
        return jnp.sum(self.params.nu**2)


class Inner(eqx.Module):
    kernel: jax.Array

    def log_prob(self, x):
        return -jnp.sum((self.kernel @ x) ** 2)


class Process(eqx.Module):
    inner: Inner
    step: int = 0


NU = 2 * jnp.eye(4)


def test_the_outermost_module_with_methods_is_wrapped():
    model = Physics(Parameters(NU, jnp.ones(4)))
    where = eqxreg.select(names="nu")
    wrapped = eqxreg.constrain(model, P, where)
    assert type(wrapped) is eqxreg.Constraint and wrapped.weight_name == "params.nu"
    expected = exact(NU) * 0.3 / np.linalg.norm(exact(NU))
    np.testing.assert_allclose(wrapped.rhs(X), expected @ np.asarray(X), rtol=1e-5)
    np.testing.assert_allclose(wrapped.size, 0.09, rtol=1e-5)
    np.testing.assert_allclose(eqxreg.bake(wrapped).params.nu, expected, rtol=1e-5)
    frozen = eqxreg.freeze(wrapped, "params.nu")
    assert len(paths(frozen)) == 1
    np.testing.assert_allclose(frozen.rhs(X), wrapped.rhs(X), rtol=1e-6)
    assert eqx.tree_equal(eqxreg.thaw(frozen), wrapped)


def test_a_mere_container_around_a_module_with_methods_is_not_wrapped():
    wrapped = eqxreg.constrain([Process(Inner(NU))], P)[0]
    assert type(wrapped) is Process and type(wrapped.inner) is eqxreg.Constraint
    np.testing.assert_allclose(
        wrapped.inner.log_prob(X), -0.09 / 4 * np.sum(exact(X) ** 2), rtol=1e-5
    )


def test_a_module_without_methods_is_wrapped_for_bake():
    params = eqxreg.constrain(Parameters(NU, jnp.ones(4)), P, eqxreg.select(names="nu"))
    assert type(params) is eqxreg.Constraint
    np.testing.assert_allclose(
        exact(eqxreg.bake(params).nu), 0.15 * np.eye(4), rtol=1e-5
    )
    frozen = eqxreg.freeze(Parameters(NU, jnp.ones(4)), "eps")
    assert paths(frozen) == [".layer.nu"]


def test_a_layer_that_can_be_called_is_wrapped_within_a_module_that_cannot(key):
    class Agent(eqx.Module):
        actor: eqx.nn.Linear
        log_weight: jax.Array

        def act(self, x):
            return self.actor(x) + self.log_weight

    agent = Agent(eqx.nn.Linear(4, 3, use_bias=False, key=key), jnp.ones(3))
    wrapped = eqxreg.constrain(agent, P)
    assert wrapped.weight_name == "log_weight"
    assert type(wrapped.layer.actor) is eqxreg.Constraint
    weight = exact(agent.actor.weight)
    expected = weight * 0.3 / np.linalg.norm(weight) @ np.asarray(X) + 0.3 / 3**0.5
    np.testing.assert_allclose(wrapped.act(X), expected, rtol=1e-5)
    np.testing.assert_allclose(eqxreg.bake(wrapped).act(X), expected, rtol=1e-5)


def test_a_plain_array_has_nothing_to_wrap():
    for tree, place in ((jnp.ones(2), "the array itself"), ([jnp.ones(2)], "`.0.`")):
        with pytest.raises(ValueError, match=f"selects {place}, which is in no module"):
            eqxreg.constrain(tree, P, eqxreg.everything)
        with pytest.raises(ValueError, match="which is in no module.*to freeze them"):
            eqxreg.freeze(tree, eqxreg.everything)
