"""Stacks of modules of one's own: the rank that a field declares tells a weight from a
stack of weights, alike in a call, in `bake`, in `project` and in reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Optional

import beartype
import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array, Float, PyTree, jaxtyped
from tables import exact


pytestmark = pytest.mark.usefixtures("quick_compilation")


if TYPE_CHECKING:
    from somewhere import Unknown


X = jnp.linspace(-1.0, 1.0, 4)
P = eqxreg.MaxNorm(0.3)
Matrix = Float[Array, "out in"]


class Base(eqx.Module):
    def __call__(self, x):
        [weight] = jax.tree.leaves(self)
        return weight @ x


def of(key):
    return jax.random.normal(key, (3, 4))


class Annotated(Base):
    weight: Float[Array, "out in"]

    def __init__(self, key):
        self.weight = of(key)


class Optionally(Base):
    weight: Optional[Float[Array, "out in"]]  # noqa: UP045 (old code has it)

    def __init__(self, key):
        self.weight = of(key)


class Aliased(Base):
    weight: Matrix | None

    def __init__(self, key):
        self.weight = of(key)


class Inheriting(Annotated):
    other: Unknown | None = None


class Overriding(Annotated):
    weight: Float[Array, "3 _"]


class OfMetadata(Base):
    weight: Array = eqx.field(metadata={"ndim": 2})

    def __init__(self, key):
        self.weight = of(key)


class OfMetadataFirst(Base):
    weight: Float[Array, "ensemble out in"] = eqx.field(metadata={"ndim": 2})

    def __init__(self, key):
        self.weight = of(key)


@jaxtyped(typechecker=beartype.beartype)
class Checked(Base):
    weight: Float[Array, "out in"]

    def __init__(self, key):
        self.weight = of(key)


# As without `from __future__ import annotations`.
Evaluated = type(Base)(
    "Evaluated",
    (Base,),
    {
        "__annotations__": {"weight": Matrix | None},
        "__module__": __name__,
        "__init__": lambda self, key: setattr(self, "weight", of(key)),
    },
)


class InList(Base):
    weights: list[Float[Array, "out in"]]

    def __init__(self, key):
        self.weights = [of(key)]


class InTuple(Base):
    weights: tuple[int | None, Matrix]

    def __init__(self, key):
        self.weights = (None, of(key))


class InDict(Base):
    weights: dict[str, tuple[Matrix, ...]]

    def __init__(self, key):
        self.weights = {"a": (of(key),)}


class InTree(Base):
    weights: PyTree[Float[Array, "out in"]]

    def __init__(self, key):
        self.weights = {"a": [of(key)]}


class Pair(NamedTuple):
    weight: Float[Array, "out in"]


class InNamedTuple(Base):
    pair: Pair

    def __init__(self, key):
        self.pair = Pair(of(key))


DECLARING = [
    Annotated,
    Optionally,
    Aliased,
    Inheriting,
    Overriding,
    OfMetadata,
    OfMetadataFirst,
    Checked,
    Evaluated,
    InList,
    InTuple,
    InDict,
    InTree,
    InNamedTuple,
]


class Silent(Base):
    weight: Array

    def __init__(self, key):
        self.weight = of(key)


class OfAnyRank(Silent):
    weight: Float[Array, "*stack out in"]


class OfAnonymousRank(Silent):
    weight: Float[Array, "... out in"]


class OfUnknown(Silent):
    weight: Unknown


class OfTwoRanks(Silent):
    weight: Float[Array, "in"] | Float[Array, "out in"]


SILENT = [Silent, OfAnyRank, OfAnonymousRank, OfUnknown, OfTwoRanks]


def stack_of(cls, key, *shape):
    build = cls
    for _ in shape:
        build = eqx.filter_vmap(build)
    count = int(np.prod(shape))
    return build(jax.random.split(key, count).reshape(shape))


def projected(weight, axes):
    weight = exact(weight)
    norms = np.sqrt((weight**2).sum(axes, keepdims=True))
    return weight * np.minimum(1, 0.3 / norms)


@pytest.mark.parametrize("shape", [(2,), (2, 3)], ids=["stack", "stack of stacks"])
@pytest.mark.parametrize("cls", DECLARING)
def test_a_stack_is_constrained_layer_by_layer_in_every_place(cls, shape, key):
    stack = stack_of(cls, key, *shape)
    [weight] = jax.tree.leaves(stack)
    expected = projected(weight, (-2, -1))
    wrapped = eqxreg.constrain(stack, P)
    np.testing.assert_allclose(
        jax.tree.leaves(eqxreg.bake(wrapped))[0], expected, rtol=1e-5
    )
    call = lambda m: m(X)
    for _ in shape:
        call = eqx.filter_vmap(call)
    np.testing.assert_allclose(call(wrapped), expected @ np.asarray(X), rtol=1e-5)
    now = eqxreg.project_params(stack, P)
    np.testing.assert_allclose(jax.tree.leaves(now)[0], expected, rtol=1e-5)
    for model in (wrapped, stack):
        rows = eqxreg.report(model).rows
        norms = np.sqrt(
            (exact(weight if model is stack else expected) ** 2).sum((-2, -1))
        )
        np.testing.assert_allclose([row.norm for row in rows], norms.ravel(), rtol=1e-5)


def test_transforms_and_penalties_take_stacks_apart(key):
    stack = stack_of(Annotated, key, 3)
    expected = projected(stack.weight, (-2, -1))
    optimiser = optax.chain(optax.sgd(0.0), eqxreg.project(P))
    update, _ = optimiser.update(stack, optimiser.init(stack), stack)
    moved = eqx.apply_updates(stack, update)
    np.testing.assert_allclose(moved.weight, expected, rtol=1e-5)
    distances = np.sqrt(((exact(stack.weight) - expected) ** 2).sum((1, 2)))
    penalty = eqxreg.distance_penalty(stack, P, 1.0)
    np.testing.assert_allclose(penalty, distances.sum(), rtol=1e-5)


@pytest.mark.parametrize("cls", SILENT)
def test_what_declares_no_rank_is_one_weight(cls, key):
    stack = stack_of(cls, key, 3)
    baked = eqxreg.bake(eqxreg.constrain(stack, P))
    np.testing.assert_allclose(
        baked.weight, projected(stack.weight, (0, 1, 2)), rtol=1e-5
    )


def test_a_stack_that_was_wrapped_where_it_was_built_is_projected_layer_by_layer(key):
    build = lambda key: eqxreg.constrain(Silent(key), eqxreg.NonNegative())
    stack = stack_of(build, key, 3)
    expected = projected(stack.weight, (1, 2))
    actual = eqxreg.project_params(stack, P)
    np.testing.assert_allclose(actual.weight, expected, rtol=1e-5)


class Scanned(eqx.Module):
    blocks: Annotated

    def __init__(self, key):
        square = lambda key: eqx.tree_at(
            lambda m: m.weight, Annotated(key), jax.random.normal(key, (4, 4))
        )
        self.blocks = eqx.filter_vmap(square)(jax.random.split(key, 3))

    def __call__(self, x):
        params, static = eqx.partition(self.blocks, eqx.is_array)
        step = lambda x, block: (eqx.combine(block, static)(x), None)
        return jax.lax.scan(step, x, params)[0]


def test_a_scanned_stack_within_a_model(key):
    model = Scanned(key)
    weights = projected(model.blocks.weight, (1, 2))
    expected = weights[2] @ weights[1] @ weights[0] @ np.asarray(X)
    wrapped = eqxreg.constrain(model, P)
    np.testing.assert_allclose(wrapped(X), expected, rtol=1e-4)
    np.testing.assert_allclose(eqxreg.bake(wrapped)(X), expected, rtol=1e-4)


def test_a_scalar_of_each_module_is_one_of_a_stack():
    class Gain(eqx.Module):
        weight: Float[Array, ""]

        def __call__(self, x):
            return self.weight * x

    stack = eqx.filter_vmap(Gain)(jnp.asarray([-2.0, 0.1, 0.5]))
    baked = eqxreg.bake(eqxreg.constrain(stack, P))
    np.testing.assert_allclose(baked.weight, [-0.3, 0.1, 0.3], rtol=1e-5)


def test_an_array_of_lower_rank_than_declared_is_one_weight():
    layer = eqx.tree_at(lambda m: m.weight, Annotated(jax.random.key(0)), jnp.ones(4))
    baked = eqxreg.bake(eqxreg.constrain(layer, P))
    np.testing.assert_allclose(baked.weight, np.full(4, 0.15), rtol=1e-5)


def test_metadata_that_is_no_number_of_axes_is_told():
    class Wrong(eqx.Module):
        weight: Array = eqx.field(metadata={"ndim": "two"})

    with pytest.raises(ValueError, match="\"ndim\": 'two'.*`Wrong.weight` must be the"):
        eqxreg.project_params(Wrong(jnp.ones(2)), P)
