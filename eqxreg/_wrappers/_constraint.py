"""`Constraint`, the wrapper that enforces a map in the forward pass."""

import contextlib
import functools as ft
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._maps import (
    HeldMaps,
    Parametrization,
    Projection,
    bound_to,
    check_weight,
    factored,
)
from .._tree import (
    Path,
    check_names,
    child,
    find_array,
    is_tied,
    is_wrapper,
    names_of,
    nodes_along,
    only_calls,
    only_multiplies,
    parse,
    rank_of,
    stored_name,
    with_child,
)
from .._values import FrozenArray, frozen_as, has_schedule, is_frozen, opened, thawed
from ._wrapper import Wrapper, evaluate, needs_state


class Constraint(Wrapper):
    """Wraps a layer, so that it computes with `parametrization(weight)` in the place of
    its weight. Gradients flow through the map.

    The stored leaf is the raw weight. Wrapping a layer whose weight is feasible does
    not change what the layer computes. Whatever the layer takes, the wrapper takes;
    `key` and `inference` are accepted always, and forwarded to layers that take them.

    Wrappers nest: `A(B(layer))` computes with `A(B(raw))`, so that the outermost
    promise holds. Attributes that the wrapper lacks are read from the layer within:
    `wrapped.weight` is the raw weight, `wrapped.in_features` is the layer's. Methods of
    the layer run on the layer with its constrained weight.

    Layers that are stacked, by `eqx.filter_vmap` or as in
    `eqx.nn.MLP(..., scan=True)`, are constrained one by one. For Equinox's layers the
    wrapper knows a stack when it sees one. A class of your own says how many axes its
    weight has in one module: by its annotation, as in `weight: Float[Array, "out in"]`,
    or by `weight: Array = eqx.field(metadata={"ndim": 2})`. If it says nothing, wrap
    its modules inside the `eqx.filter_vmap` that stacks them.

    A layer that only multiplies with its weight gets the same result for less: the
    product is scaled, and the constrained weight is not written to memory. For
    Equinox's layers that is known. A class of your own says so by the class attribute
    `only_multiplies = ("weight",)`.

    Wrappers of others are looked through if they only rewrite a weight:
    `eqx.nn.SpectralNorm` and `eqx.nn.WeightNorm` are, and a class of your own with
    fields `layer` and `weight_name` is if it has the class attribute
    `rewrites_weight = True`.

    !!! example

        ```python
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> cell = eqx.nn.GRUCell(3, 4, key=jax.random.key(0))
        >>> names = ("weight_ih", "weight_hh")
        >>> cell = eqxreg.Constraint(cell, names, eqxreg.MaxNorm(1.0, axis="unit"))
        >>> cell(jnp.ones(3), jnp.zeros(4)).shape
        (4,)

        ```
    """

    layer: Any
    weight_name: str | tuple[str, ...] = eqx.field(static=True)
    parametrizations: HeldMaps
    _ranks: tuple[int | None, ...] = eqx.field(static=True)

    def __init__(
        self,
        layer: Any,
        weight_name: str | Sequence[str],
        parametrization: Parametrization,
    ):
        """**Arguments:**

        - `layer`: the layer to wrap: an Equinox layer, a module of your own, or another
            wrapper.
        - `weight_name`: the name of the layer's array, such as `"weight"`; a dotted
            path, such as `"query_proj.weight"` or `"layers.0.weight"`; or a tuple of
            these. A key that a dotted path cannot hold is put in brackets, as in
            `"params['fc.weight']"`.
        - `parametrization`: the map, such as [`eqxreg.MaxNorm`][].

        **Raises:**

        - `ValueError`: if the layer has no such array, it is `None` or a property that
            is computed, its rank is too low for the map, it is outside an open set, or
            the map changes its shape or dtype.
        - `TypeError`: if the array is not floating or complex, or `parametrization` is
            not a map.
        """
        if not isinstance(parametrization, Parametrization):
            raise TypeError(
                "`parametrization` must be an `eqxreg.Parametrization` such as "
                f"`eqxreg.MaxNorm(2.0)`, got {parametrization!r}."
            )
        if has_schedule(parametrization):
            raise ValueError(
                "A bound that is a schedule needs a step, which a layer does not have. "
                "Use the map in `eqxreg.project`, or give a JAX scalar array and "
                "replace it as you train."
            )
        weight_name = check_names(weight_name)
        names = tuple(stored_name(layer, name) for name in names_of(weight_name))
        self.weight_name = names[0] if isinstance(weight_name, str) else names
        bound, ranks = [], []
        for name in names:
            with located(name if len(names) > 1 else ""):
                layer, p, weight_rank = _wrap(layer, name, parametrization)
            bound.append(p)
            ranks.append(weight_rank)
        self.layer = layer
        self.parametrizations = HeldMaps(map(_with_own_arrays, bound))
        self._ranks = tuple(ranks)

    @property
    def parametrization(self) -> Parametrization | tuple[Parametrization, ...]:
        """The map; a tuple of one for each name if there are several names."""
        if isinstance(self.weight_name, str):
            return self.parametrizations[0]
        return self.parametrizations

    def _evaluated(
        self, state: Any, inference: bool | None, to_call: bool
    ) -> tuple[Any, Any]:
        layer, state = evaluate(self.layer, state, inference)
        for i, name in enumerate(names_of(self.weight_name)):
            fn = ft.partial(self._constrained, i)
            layer, state = _rewrite(layer, parse(name), fn, state, inference, to_call)
        return layer, state

    def _within(self) -> Iterator[Any]:
        for name in names_of(self.weight_name):
            yield from nodes_along(self.layer, name)

    def _constrained(self, i: int, met: "Met") -> tuple[Any, Any]:
        """The weight that the `i`th map makes of a raw one, and the new state."""
        raw, state = met.raw, met.state
        if is_tied(raw):
            # `eqx.nn.Shared` will put the other array here.
            return raw, state
        p, weight_rank = opened(self.parametrizations[i]), self._ranks[i]
        if met.to_multiply and (product := factored(p, raw)) is not None:
            return product, state
        return on_stack(lambda p, raw: p(raw), p, weight_rank, raw), state


class Met(NamedTuple):
    """A raw weight, where it is met in a layer that is evaluated."""

    owner: Any
    raw: Any
    state: Any
    inference: bool | None
    to_multiply: bool
    """Whether it will only be multiplied with vectors, so that what is made of it may
    be a `OnlyMultiplied` one."""


def _rewrite(
    node: Any,
    path: Path,
    fn: Callable[[Met], tuple[Any, Any]],
    state: Any,
    inference: bool | None,
    to_call: bool,
) -> tuple[Any, Any]:
    """`node` with what `fn` makes of the array at `path`, and wrappers on the way
    evaluated; and the new state."""
    node, state = evaluate(node, state, inference)
    step, *rest = path
    inner = child(node, step)
    if rest:
        to_call = to_call and only_calls(node)
        new, state = _rewrite(inner, tuple(rest), fn, state, inference, to_call)
    else:
        to_multiply = to_call and only_multiplies(node, step)
        new, state = fn(Met(node, inner, state, inference, to_multiply))
    return with_child(node, step, new), state


@contextlib.contextmanager
def located(place: str) -> Iterator[None]:
    """Errors of a value or a type within say where the weight is."""
    try:
        yield
    except (TypeError, ValueError) as error:
        # Others may be built of more than a text.
        if not place or type(error) not in (TypeError, ValueError):
            raise
        raise type(error)(f"`{place}`: {error}") from error


def on_stack(
    fn: Callable, p: Parametrization, weight_rank: int | None, raw: Any
) -> Any:
    """`fn(p, raw)` for a raw weight of this rank, or of each in a stack of them."""
    if weight_rank is None or raw.ndim <= weight_rank:
        return fn(p, raw)

    def inner(p: Parametrization, raw: Array) -> Any:
        return on_stack(fn, p, weight_rank, raw)

    return eqx.filter_vmap(inner, in_axes=(_stack_axes(p), 0))(p, raw)


def _with_own_arrays(p: Parametrization) -> Parametrization:
    """`p` with copies of its arrays: one map serves many layers, and no buffer of a
    model may be donated twice."""
    copied = lambda x: jnp.array(x, copy=True) if isinstance(x, jax.Array) else x
    return jax.tree.map(copied, p)


def _stack_axes(p: Parametrization) -> Any:
    """Where the arrays of a map were stacked, when it was bound to a stack."""
    stacked = lambda leaf: 0 if eqx.is_array(leaf) and leaf.ndim > 0 else None
    return jax.tree.map(stacked, p)


def _wrap(
    layer: Any, name: str, p: Parametrization
) -> tuple[Any, Parametrization, int | None]:
    """`layer` with the raw array that `p` needs, `p` bound to it, and the rank of the
    array in one layer, which is not known of an array that is tied to another."""
    _, _, leaf = find_array(layer, name)
    if is_tied(leaf):
        return layer, p, None
    weight_rank = rank_of(layer, name, leaf.ndim)
    _, leaf = current(layer, name)
    p, raw = _bind(p, leaf, weight_rank)
    # A projection's raw weight is the one that is there.
    if not isinstance(p, Projection):
        layer = written(layer, parse(name), raw)
    return layer, p, weight_rank


def current(layer: Any, name: str) -> tuple[Any, Any]:
    """The owner of the array `name`, and the array as the layer computes with it now;
    the raw one, if that depends on a state."""
    owner, _, leaf = find_array(layer, name)
    if not any(needs_state(node) for node in nodes_along(layer, name)):
        leaf = layer
        for step in parse(name):
            owner = evaluate(leaf, None, None)[0]
            leaf = child(owner, step)
    return owner, leaf


def _bind(p: Parametrization, weight: Any, weight_rank: int) -> tuple[Any, Any]:
    """`p.bind`, of each weight in a stack."""
    shape = weight.shape[weight.ndim - weight_rank :]
    p.check(jax.ShapeDtypeStruct(shape, weight.dtype))
    if weight.ndim == weight_rank:
        bound, raw = bound_to(p, weight)
        check_weight(bound, raw)
        return bound, raw
    return eqx.filter_vmap(lambda w: _bind(p, w, weight_rank))(weight)


def written(node: Any, path: Path, value: Any) -> Any:
    """`node` with the raw array at `path` from which evaluation makes `value`."""
    if not path:
        return FrozenArray.of(value) if is_frozen(node) else value
    if isinstance(node, Constraint):
        for i, name in enumerate(names_of(node.weight_name)):
            weight_rank = node._ranks[i]
            if parse(name) == path and weight_rank is not None:
                maps, old = [*node.parametrizations], node.parametrizations[i]
                own = thawed(opened(old))
                p, value = on_stack(bound_to, own, weight_rank, value)
                maps[i] = frozen_as(old, p)
                node = with_child(node, "parametrizations", HeldMaps(maps))
    if is_wrapper(node):
        inner = written(node.layer, path, value)
        if isinstance(node, eqx.nn.WeightNorm):
            fresh = eqx.nn.WeightNorm(inner, node.weight_name, node.axis)
            node = with_child(node, "g", frozen_as(node.g, fresh.g))
        return with_child(node, "layer", inner)
    step, *rest = path
    return with_child(node, step, written(child(node, step), tuple(rest), value))
