"""What a node of a model is: a wrapper, a module, a tied array."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu


_WRAPPERS = (eqx.nn.SpectralNorm, eqx.nn.WeightNorm)


def is_wrapper(node: Any) -> bool:
    """Whether all that `node` does, when it is called, is to rewrite the arrays
    `weight_name` of its `layer` and to call that. Known are Equinox's
    `eqx.nn.SpectralNorm` and `eqx.nn.WeightNorm`, and ours. Other classes say so by the
    class attribute `rewrites_weight = True`. It speaks of the `__call__` of its class:
    a subclass with one of its own says it again, or is a module like any other."""
    if not isinstance(node, eqx.Module):
        return False
    for cls in type(node).__mro__:
        if cls in _WRAPPERS:
            return True
        if "rewrites_weight" in vars(cls):
            return bool(vars(cls)["rewrites_weight"]) and _has_fields(type(node))
        if "__call__" in vars(cls):
            return False
    return False


def _has_fields(cls: type) -> bool:
    missing = {"layer", "weight_name"} - vars(cls)["__dataclass_fields__"].keys()
    if missing:
        raise TypeError(
            f"`{cls.__name__}` has `rewrites_weight = True`, so that it must have the "
            "fields `layer` and `weight_name`, and it lacks "
            f"{', '.join(f'`{name}`' for name in sorted(missing))}."
        )
    return True


def is_module(node: Any) -> bool:
    """Whether a node is a module, or works as one: JAX takes it apart, and it neither
    is a mere container nor stands for one array."""
    if isinstance(node, (eqx.Module, eqx.nn.State)):
        return True
    if jtu.all_leaves([node]) or node is None:
        return False
    if isinstance(node, (list, tuple, Mapping, deque)):
        return callable(node)
    return not (hasattr(node, "shape") and hasattr(node, "dtype"))


def has_methods(node: Any) -> bool:
    """Whether a module has methods or properties of its own, which may compute with the
    arrays within."""
    fields = getattr(type(node), "__dataclass_fields__", {})
    return any(
        hasattr(attribute, "__get__")
        and not isinstance(attribute, (classmethod, staticmethod))
        and not (name.startswith("__") or name.startswith("_abc_") or name in fields)
        for cls in type(node).__mro__
        if cls.__module__.split(".")[0] not in ("equinox", "builtins", "typing")
        for name, attribute in vars(cls).items()
    )


def degree(wrapper: Any, i: int) -> int | None:
    """The degree in which what a wrapper makes of its `i`th weight is homogeneous: 0 if
    the size of that weight does not matter, `None` if it is not homogeneous."""
    if isinstance(wrapper, (eqx.nn.WeightNorm, eqx.nn.SpectralNorm)):
        return 0
    maps = getattr(wrapper, "parametrizations", ())
    return maps[i]._degree if i < len(maps) else None


def is_tied(leaf: Any) -> bool:
    """Whether `leaf` is what `eqx.nn.Shared` leaves in the place of a tied array."""
    return isinstance(leaf, _SharedNode)


def _shared_node_type() -> type:
    # The placeholder's class is not public, so we look at one.
    shared = eqx.nn.Shared((0.0, 0.0), lambda pair: pair[1], lambda pair: pair[0])
    [node] = [x for x in jax.tree.leaves(shared) if type(x).__name__ == "SharedNode"]
    return type(node)


_SharedNode = _shared_node_type()
