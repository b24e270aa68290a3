"""What all wrappers are, and how they are evaluated.

A wrapper never calls the wrapper inside it. It *evaluates* what it wraps: the innermost
layer gets its weight from the stored, raw leaf by all the maps around it, innermost
first, and then that plain layer is called once. So the outermost promise always holds,
and `eqxreg.bake` is evaluation without the call. Wrappers that are not ours are
evaluated too, by `_foreign.py`.
"""

import abc
import inspect
from collections.abc import Iterator
from typing import Any, ClassVar

import equinox as eqx
import jax

from .._tree import is_wrapper, unwrapped
from .._values import is_frozen, thawed
from ._foreign import accepted, rewritten


class Wrapper(eqx.nn.StatefulLayer):
    """A module around a layer, which is called as the layer is."""

    layer: eqx.AbstractVar[Any]
    weight_name: eqx.AbstractVar[str | tuple[str, ...]]
    rewrites_weight: ClassVar[bool] = True
    _has_state: ClassVar[bool] = False
    """Whether what this makes of a weight depends on an `eqx.nn.State`."""

    @abc.abstractmethod
    def _evaluated(
        self, state: Any, inference: bool | None, to_call: bool
    ) -> tuple[Any, Any]:
        """The plain layer with its weight as this makes it, and the new state. A layer
        that is made `to_call` need not have an array for its weight."""

    @abc.abstractmethod
    def _within(self) -> Iterator[Any]:
        """The nodes whose weights this one's depend on."""

    def is_stateful(self) -> bool:
        """Whether this is called as `(out, state) = layer(x, state)`: as what it wraps
        is."""
        inner = unwrapped(self.layer)
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
                layer, _ = self._evaluated(None, kwargs.get("inference"), True)
                return layer(*args, **accepted(layer, kwargs))
            args, kwargs, state = _take_state(args, kwargs, type(self).__name__)
            layer, state = self._evaluated(state, kwargs.get("inference"), True)
            if isinstance(layer, eqx.nn.StatefulLayer) and layer.is_stateful():
                kwargs = {**kwargs, "state": state}
                return layer(*args, **accepted(layer, kwargs))
            return layer(*args, **accepted(layer, kwargs)), state

    # A sequence of layers stays one. Python looks for these on the class alone.

    def __len__(self) -> int:
        return len(self._as_it_computes("its length"))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._as_it_computes("its layers"))

    def __getitem__(self, index: Any) -> Any:
        return self._as_it_computes("its layers")[index]

    def __bool__(self) -> bool:
        inner = unwrapped(self)
        return len(self) > 0 if hasattr(type(inner), "__len__") else True

    def _as_it_computes(self, what: str) -> Any:
        """The plain layer with its constrained weights."""
        if needs_state(self):
            raise AttributeError(
                f"{what} of a layer whose constraint needs state: read it from "
                f"`eqxreg.bake(layer, state)`."
            )
        return self._evaluated(None, None, False)[0]

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
                return _read(getattr(node, name))
            node = node.layer
        if not hasattr(node, name):
            raise AttributeError(_no_attribute(self, name))
        # Methods and properties compute; what they compute with is the constrained
        # weight. All else is read as it is stored.
        computes = hasattr(inspect.getattr_static(type(node), name, None), "__get__")
        if name in vars(node) or not computes:
            return _read(getattr(node, name))
        return getattr(self._as_it_computes(f"`{name}`"), name)


def needs_state(node: Any) -> bool:
    """Whether the weights of a wrapper depend on an `eqx.nn.State`."""
    return any(
        _is_foreign_and_stateful(wrapper)
        or (isinstance(wrapper, Wrapper) and wrapper._has_state)
        for wrapper in _wrappers_within(node)
    )


def needs_foreign_state(node: Any) -> bool:
    """Whether there is a stateful wrapper that is not ours, and cannot do without."""
    return any(map(_is_foreign_and_stateful, _wrappers_within(node)))


def _depends_on_state(node: Any) -> bool:
    """Whether a wrapper cannot do without a state: one that is not ours cannot, nor can
    a layer that is stateful itself."""
    inner = unwrapped(node.layer)
    stateful = isinstance(inner, eqx.nn.StatefulLayer) and inner.is_stateful()
    return stateful or needs_foreign_state(node)


def _is_foreign_and_stateful(wrapper: Any) -> bool:
    is_ours = isinstance(wrapper, Wrapper)
    return isinstance(wrapper, eqx.nn.StatefulLayer) and not is_ours


def _wrappers_within(node: Any) -> Iterator[Any]:
    """The wrappers that have to do with what this one constrains, itself first."""
    # One of ours with a call of its own, which is not seen through from outside, asks
    # this of itself.
    if not (is_wrapper(node) or isinstance(node, Wrapper)):
        return
    yield node
    inner = node._within() if isinstance(node, Wrapper) else [node.layer]
    for other in inner:
        yield from _wrappers_within(other)


def evaluate(
    node: Any, state: Any, inference: bool | None, to_call: bool = False
) -> tuple[Any, Any]:
    """The plain layer within a wrapper, with its weight as the wrapper makes it; any
    other node as it is.

    **Arguments:**

    - `node`: a wrapper, or anything else.
    - `state`: an `eqx.nn.State` if `needs_state(node)`; else it may be `None`.
    - `inference`: what stateful wrappers are told, unless it is `None`.
    - `to_call`: whether the layer is only to be called.

    **Returns:**

    The layer and the new state.
    """
    if not is_wrapper(node):
        return node, state
    if isinstance(node, Wrapper):
        return node._evaluated(state, inference, to_call)
    return evaluate(*rewritten(node, state, inference), inference)


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


def _read(value: Any) -> Any:
    """An attribute of a layer. A frozen array stays what it is, for it is computed with
    as an ordinary one is, and only so `eqx.tree_at` finds it in the tree."""
    return value if is_frozen(value) else thawed(value)


def _no_attribute(wrapper: Any, name: str) -> str:
    inner = type(vars(wrapper).get("layer")).__name__
    return f"Neither {type(wrapper).__name__} nor {inner} has an attribute {name!r}."
