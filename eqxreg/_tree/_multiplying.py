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
    """Whether all that this layer does with its array `name`, when it is called, is
    `array @ vector`. A subclass may do anything."""
    return name in _MULTIPLIED.get(type(owner), ())


def only_calls(node: Any) -> bool:
    """Whether all that this does with the layers within, when it is called, is to call
    them."""
    return type(node) in _CALLERS
