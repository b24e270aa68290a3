"""`Constraint`, the wrapper that enforces a map in the forward pass.

A wrapper never calls the wrapper inside it. It *evaluates* what it wraps: the innermost
layer gets its weight from the stored, raw leaf by all the maps around it, innermost
first, and then that plain layer is called once. So the outermost promise always holds,
and `eqxreg.bake` is evaluation without the call. Wrappers that are not ours, such as
`eqx.nn.SpectralNorm`, are evaluated too: called around a `_Probe`, which is a layer
that returns itself, they hand back the layer with its weight rewritten.
"""

import functools as ft
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ._layers import is_tied, is_wrapper, rank
from ._maps import Parametrization, Projection
from ._maps._base import has_schedule
from ._paths import (
    Path,
    check_names,
    child,
    find_array,
    names_of,
    nodes_along,
    parse,
    unwrapped,
)


class Constraint(eqx.nn.StatefulLayer):
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
    wrapper knows a stack when it sees one; a stack of your own modules should be
    wrapped inside the `eqx.filter_vmap` that builds it.

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
    parametrizations: tuple[Parametrization, ...]
    _ranks: tuple[int | None, ...] = eqx.field(static=True)
    _has_state: ClassVar[bool] = False

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
            these.
        - `parametrization`: the map, such as [`eqxreg.MaxNorm`][].

        **Raises:**

        - `ValueError`: if the layer has no such array, it is `None`, or its rank is too
            low for the map.
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
        self.weight_name = check_names(weight_name)
        bound, ranks = [], []
        for name in names_of(self.weight_name):
            layer, p, weight_rank = _wrap(layer, name, parametrization)
            bound.append(p)
            ranks.append(weight_rank)
        self.layer = layer
        self.parametrizations = tuple(bound)
        self._ranks = tuple(ranks)

    @property
    def parametrization(self) -> Parametrization | tuple[Parametrization, ...]:
        """The map; a tuple of one for each name if there are several names."""
        if isinstance(self.weight_name, str):
            return self.parametrizations[0]
        return self.parametrizations

    def is_stateful(self) -> bool:
        """Whether this is called as `(out, state) = layer(x, state)`: as what it wraps
        is."""
        inner = unwrapped(self)
        stateful = isinstance(inner, eqx.nn.StatefulLayer) and inner.is_stateful()
        return stateful or needs_state(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """**Arguments:**

        - `*args`, `**kwargs`: those of the layer. If this is stateful, an
            `eqx.nn.State` among them. `key` and `inference` are dropped if the layer
            does not take them.

        **Returns:**

        What the layer returns; if it is stateful, together with the new state.
        """
        with jax.named_scope(f"eqxreg.{type(self).__name__}"):
            takes_state = _is_given_state(args, kwargs) or _depends_on_state(self)
            if not (needs_state(self) and takes_state):
                layer, _ = evaluate(self, None, kwargs.get("inference"))
                return layer(*args, **_accepted(layer, kwargs))
            args, kwargs, state = _take_state(args, kwargs, type(self).__name__)
            layer, state = evaluate(self, state, kwargs.get("inference"))
            if isinstance(layer, eqx.nn.StatefulLayer) and layer.is_stateful():
                kwargs = {**kwargs, "state": state}
                return layer(*args, **_accepted(layer, kwargs))
            return layer(*args, **_accepted(layer, kwargs)), state

    def _constrained(
        self, i: int, owner: Any, raw: Any, state: Any, *, inference: bool | None
    ) -> tuple[Any, Any]:
        """The weight that the `i`th map makes of a raw one, and the new state."""
        del owner, inference
        if is_tied(raw):
            # `eqx.nn.Shared` will put the other array here.
            return raw, state
        return _apply(self.parametrizations[i], self._ranks[i], raw), state

    def __getattr__(self, name: str) -> Any:
        # `inference_mode` would find the layer's flag twice; dunder names are how
        # Python asks what we are ourselves.
        dunder = name.startswith("__") and name.endswith("__")
        # A half-built object, as in `copy` or `pickle`, has no layer yet.
        if dunder or name == "inference" or "layer" not in vars(self):
            raise AttributeError(_no_attribute(self, name))
        node = vars(self)["layer"]
        while is_wrapper(node):
            if name in vars(node) or hasattr(type(node), name):
                return getattr(node, name)
            node = node.layer
        if not hasattr(node, name):
            raise AttributeError(_no_attribute(self, name))
        # Methods and properties compute; what they compute with is the constrained
        # weight. All else is read as it is stored.
        computes = hasattr(inspect.getattr_static(type(node), name, None), "__get__")
        if name in vars(node) or not computes:
            return getattr(node, name)
        if needs_state(self):
            raise AttributeError(
                f"`{name}` of a layer whose constraint needs state: read it from "
                f"`eqxreg.bake(layer, state)`."
            )
        return getattr(evaluate(self, None, None)[0], name)


class _Probe(eqx.Module):
    """A layer that returns the layer it holds, when called. Attribute reads pass
    through, which is all that `tree_at` needs to reach the weight."""

    held: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.held

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "held" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["held"], name)


def needs_state(node: Any) -> bool:
    """Whether the weights of a wrapper depend on an `eqx.nn.State`."""
    return any(
        _is_foreign_and_stateful(wrapper)
        or (isinstance(wrapper, Constraint) and wrapper._has_state)
        for wrapper in _wrappers_within(node)
    )


def _depends_on_state(node: Any) -> bool:
    """Whether a wrapper cannot do without a state: one that is not ours cannot, nor can
    a layer that is stateful itself."""
    inner = unwrapped(node)
    stateful = isinstance(inner, eqx.nn.StatefulLayer) and inner.is_stateful()
    return stateful or any(map(_is_foreign_and_stateful, _wrappers_within(node)))


def _is_foreign_and_stateful(wrapper: Any) -> bool:
    is_ours = isinstance(wrapper, Constraint)
    return isinstance(wrapper, eqx.nn.StatefulLayer) and not is_ours


def _wrappers_within(node: Any) -> Iterator[Any]:
    """The wrappers that have to do with what this one constrains, itself first."""
    if not is_wrapper(node):
        return
    yield node
    if not isinstance(node, Constraint):
        yield from _wrappers_within(node.layer)
        return
    for name in names_of(node.weight_name):
        for inner in nodes_along(node.layer, name):
            yield from _wrappers_within(inner)


def evaluate(node: Any, state: Any, inference: bool | None) -> tuple[Any, Any]:
    """The plain layer within a wrapper, with its weight as the wrapper makes it; any
    other node as it is.

    **Arguments:**

    - `node`: a wrapper, or anything else.
    - `state`: an `eqx.nn.State` if `needs_state(node)`; else it may be `None`.
    - `inference`: what stateful wrappers are told, unless it is `None`.

    **Returns:**

    The layer and the new state.
    """
    if not is_wrapper(node):
        return node, state
    if not isinstance(node, Constraint):
        return _evaluate_foreign(node, state, inference)
    layer, state = evaluate(node.layer, state, inference)
    for i, name in enumerate(names_of(node.weight_name)):
        fn = ft.partial(node._constrained, i, inference=inference)
        layer, state = _rewrite(layer, parse(name), fn, state, inference)
    return layer, state


def _evaluate_foreign(node: Any, state: Any, inference: bool | None):
    probed = _replace(node, "layer", _Probe(node.layer))
    kwargs = {} if inference is None else {"inference": inference}
    kwargs = _accepted(node, kwargs)
    # The input of a probe; it never reaches a layer.
    x = jnp.zeros(())
    if isinstance(node, eqx.nn.StatefulLayer):
        layer, state = probed(x, state, **kwargs)
    else:
        layer = probed(x, **kwargs)
    return evaluate(layer, state, inference)


def _rewrite(
    node: Any, path: Path, fn: Callable, state: Any, inference: bool | None
) -> tuple[Any, Any]:
    """`node` with `fn(owner, array, state)` for the array at `path`, and wrappers on
    the way evaluated."""
    node, state = evaluate(node, state, inference)
    step, *rest = path
    inner = child(node, step)
    if rest:
        new, state = _rewrite(inner, tuple(rest), fn, state, inference)
    else:
        new, state = fn(node, inner, state)
    return _replace(node, step, new), state


def _apply(p: Parametrization, weight_rank: int | None, raw: Any) -> Any:
    """`p` of a raw weight of this rank, or of each in a stack of them."""
    if weight_rank is None or raw.ndim <= weight_rank:
        return p(raw)

    # A map's own arrays were stacked when it was bound to a stack.
    def stacked(leaf: Any) -> int | None:
        return 0 if eqx.is_array(leaf) and leaf.ndim > 0 else None

    def inner(p: Parametrization, raw: Array) -> Array:
        return _apply(p, weight_rank, raw)

    return jax.vmap(inner, in_axes=(jax.tree.map(stacked, p), 0))(p, raw)


def _wrap(
    layer: Any, name: str, p: Parametrization
) -> tuple[Any, Parametrization, int | None]:
    """`layer` with the raw array that `p` needs, `p` bound to it, and the rank of the
    array in one layer, which is not known of an array that is tied to another."""
    owner, field, leaf = find_array(layer, name)
    if is_tied(leaf):
        return layer, p, None
    weight_rank = rank(owner, field, leaf.ndim)
    _, leaf = current(layer, name)
    p, raw = _bind(p, leaf, weight_rank)
    # A projection's raw weight is the one that is there.
    if not isinstance(p, Projection):
        layer = _write(layer, parse(name), raw)
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
    p.check(jax.ShapeDtypeStruct(weight.shape[-weight_rank:], weight.dtype))
    if weight.ndim == weight_rank:
        return p.bind(weight)
    return eqx.filter_vmap(lambda w: _bind(p, w, weight_rank))(weight)


def _write(node: Any, path: Path, value: Any) -> Any:
    """`node` with the raw array at `path` from which evaluation makes `value`."""
    if not path:
        return value
    if isinstance(node, Constraint):
        for i, name in enumerate(names_of(node.weight_name)):
            weight_rank = node._ranks[i]
            if parse(name) == path and weight_rank is not None:
                p, value = _bind(node.parametrizations[i], value, weight_rank)
                maps = (*node.parametrizations[:i], p, *node.parametrizations[i + 1 :])
                node = _replace(node, "parametrizations", maps)
    if is_wrapper(node):
        inner = _write(node.layer, path, value)
        if isinstance(node, eqx.nn.WeightNorm):
            return eqx.nn.WeightNorm(inner, node.weight_name, node.axis)
        return _replace(node, "layer", inner)
    step, *rest = path
    return _replace(node, step, _write(child(node, step), tuple(rest), value))


def _replace(node: Any, step: str | int, new: Any) -> Any:
    return eqx.tree_at(lambda n: child(n, step), node, new)


@ft.cache
def _parameters(cls: type) -> frozenset[str] | None:
    """The names of the arguments of a layer of this type; `None` if it takes any."""
    parameters = inspect.signature(cls.__call__).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters)


def _accepted(layer: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` without the `key` and the `inference` that `layer` does not take."""
    taken = _parameters(type(layer))
    if taken is None:
        return kwargs
    optional = {"key", "inference"}
    return {k: v for k, v in kwargs.items() if k in taken or k not in optional}


def _is_given_state(args: tuple, kwargs: dict[str, Any]) -> bool:
    return any(isinstance(x, eqx.nn.State) for x in (*args, *kwargs.values()))


def _take_state(args: tuple, kwargs: dict[str, Any], name: str):
    """The arguments without the `eqx.nn.State` among them, and that state."""
    found = [x for x in (*args, *kwargs.values()) if isinstance(x, eqx.nn.State)]
    if len(found) != 1:
        raise ValueError(
            f"This {name} is stateful: call it as `out, state = layer(x, state)`, with "
            "the state that `eqx.nn.make_with_state` returns."
        )
    rest = tuple(x for x in args if x is not found[0])
    return rest, {k: v for k, v in kwargs.items() if v is not found[0]}, found[0]


def _no_attribute(wrapper: Any, name: str) -> str:
    inner = type(vars(wrapper).get("layer")).__name__
    return f"Neither {type(wrapper).__name__} nor {inner} has an attribute {name!r}."
