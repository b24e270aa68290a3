"""Wrappers that are not ours, such as `eqx.nn.SpectralNorm`, and how `bake` goes
through them: called around a `_Probe`, which is a layer that returns itself, they hand
back the layer with its weight rewritten."""

import functools as ft
import inspect
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from .._tree import with_child
from .._values import thawed


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


def rewritten(node: Any, state: Any, inference: bool | None) -> tuple[Any, Any]:
    """What a wrapper that is not ours wraps, with its weight as that makes it, and the
    new state."""
    within = node.layer
    probed = with_child(node, "layer", _Probe(thawed(within)))
    kwargs = {} if inference is None else {"inference": inference}
    kwargs = accepted(node, kwargs)
    # The input of a probe; it never reaches a layer.
    x = jnp.zeros(())
    try:
        if isinstance(node, eqx.nn.StatefulLayer):
            layer, state = probed(x, state, **kwargs)
        else:
            layer = probed(x, **kwargs)
    except Exception as error:
        if type(node).__module__.startswith("equinox."):
            raise
        raise TypeError(_does_more(node)) from error
    if type(layer) is not type(within):
        raise TypeError(_does_more(node))
    return layer, state


def _does_more(node: Any) -> str:
    return (
        f"`{type(node).__name__}` has `rewrites_weight = True`, so that it must do "
        "nothing else when it is called than rewrite a weight of `self.layer` by "
        "`eqx.tree_at`, and return what the layer returns. If it does more, leave the "
        "attribute out: it is then a module like any other."
    )


@ft.cache
def _parameters(cls: type) -> frozenset[str] | None:
    """The names of the arguments of a layer of this type; `None` if it takes any."""
    parameters = inspect.signature(cls.__call__).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters)


def accepted(layer: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` without the `key` and the `inference` that `layer` does not take."""
    taken = _parameters(type(layer))
    if taken is None:
        return kwargs
    optional = {"key", "inference"}
    return {k: v for k, v in kwargs.items() if k in taken or k not in optional}
