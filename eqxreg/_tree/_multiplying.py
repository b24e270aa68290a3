"""Which layers multiply by scaled products: those that only multiply by a weight."""

from typing import Any

import equinox as eqx


_MULTIPLIED: dict[type, tuple[str, ...]] = {
    eqx.nn.Linear: ("weight",),
    eqx.nn.GRUCell: ("weight_ih", "weight_hh"),
    eqx.nn.LSTMCell: ("weight_ih", "weight_hh"),
}
_CALLERS = (eqx.nn.MLP, eqx.nn.MultiheadAttention, eqx.nn.Sequential, list, tuple)


def only_multiplies(owner: Any, name: str | int) -> bool:
    """Whether all that this layer does with its array `name`, when it is called, is to
    multiply by it, as in `array @ x` or `x @ array.T`. Known are Equinox's layers. A
    class of one's own says so by the class attribute `only_multiplies = ("weight",)`.
    It speaks of the `__call__` of its class: a subclass with one of its own says it
    again, or may do anything."""
    if type(owner) in _MULTIPLIED:
        return name in _MULTIPLIED[type(owner)]
    for cls in type(owner).__mro__:
        if "only_multiplies" in vars(cls):
            return name in _declared(owner, cls)
        if "__call__" in vars(cls):
            return False
    return False


def _declared(owner: Any, cls: type) -> tuple[str, ...]:
    names = vars(cls)["only_multiplies"]
    if not isinstance(names, tuple) or not all(isinstance(n, str) for n in names):
        raise TypeError(
            f"`{cls.__name__}.only_multiplies` must be a tuple of names of arrays, "
            f'such as `("weight",)`, got {names!r}.'
        )
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise ValueError(
            f"`{cls.__name__}.only_multiplies` names what the layer lacks: "
            f"{', '.join(f'`{name}`' for name in missing)}."
        )
    return names


def only_calls(node: Any) -> bool:
    """Whether all that this does with the layers within, when it is called, is to call
    them."""
    return type(node) in _CALLERS
