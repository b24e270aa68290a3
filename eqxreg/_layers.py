"""What is known of modules: which of their arrays are what, and of what rank.

The one place with names of Equinox's layers and of their fields; of modules of your own
the names of fields and classes tell, and annotations. Selectors read it to tell weights
from biases; wrappers read it to tell a weight from a stack of weights.
"""

import re
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.tree_util as jtu

from ._annotations import declared_rank
from ._maps import Parametrization, WeightNorm


Role: TypeAlias = Literal[
    "weight", "bias", "embedding", "scale", "shift", "gain", "bound", "state", "other"
]
"""What an array is to the layer that owns it. `scale` and `shift` are those of a
normalisation, `gain` is that of weight normalisation, `bound` is a map's."""

NORMALISATIONS = (
    eqx.nn.LayerNorm,
    eqx.nn.GroupNorm,
    eqx.nn.RMSNorm,
    eqx.nn.BatchNorm,
)

_RECURRENT: dict[str, Role] = {
    "weight_ih": "weight",
    "weight_hh": "weight",
    "bias": "bias",
    "bias_n": "bias",
}
_LAYERS = (
    eqx.nn.Linear,
    eqx.nn.Conv,
    eqx.nn.ConvTranspose,
    eqx.nn.GRUCell,
    eqx.nn.LSTMCell,
    eqx.nn.Embedding,
    eqx.nn.MultiheadAttention,
    eqx.nn.MLP,
    eqx.nn.Sequential,
)
"""What is no normalisation, nor are its subclasses, whatever they are called."""

_ROLES: dict[type | tuple[type, ...], dict[str, Role]] = {
    eqx.nn.Embedding: {"weight": "embedding"},
    (eqx.nn.GRUCell, eqx.nn.LSTMCell): _RECURRENT,
    NORMALISATIONS: {"weight": "scale", "bias": "shift"},
    eqx.nn.PReLU: {"negative_slope": "other"},
    eqx.nn.WeightNorm: {"g": "gain"},
    WeightNorm: {"gain": "gain"},
}

_Rank: TypeAlias = Callable[[Any], int]
_RANKS: dict[type | tuple[type, ...], dict[str, _Rank]] = {
    eqx.nn.Linear: {"weight": lambda _: 2, "bias": lambda _: 1},
    (eqx.nn.Conv, eqx.nn.ConvTranspose): {
        "weight": lambda layer: layer.num_spatial_dims + 2,
        "bias": lambda layer: layer.num_spatial_dims + 1,
    },
    (eqx.nn.GRUCell, eqx.nn.LSTMCell): {
        "weight_ih": lambda _: 2,
        "weight_hh": lambda _: 2,
        "bias": lambda _: 1,
        "bias_n": lambda _: 1,
    },
    eqx.nn.Embedding: {"weight": lambda _: 2},
    (eqx.nn.LayerNorm, eqx.nn.RMSNorm): {
        "weight": lambda layer: len(layer.shape),
        "bias": lambda layer: len(layer.shape),
    },
    (eqx.nn.GroupNorm, eqx.nn.BatchNorm): {
        "weight": lambda _: 1,
        "bias": lambda _: 1,
    },
}

_MULTIPLIED: dict[type, tuple[str, ...]] = {
    eqx.nn.Linear: ("weight",),
    eqx.nn.GRUCell: ("weight_ih", "weight_hh"),
    eqx.nn.LSTMCell: ("weight_ih", "weight_hh"),
}
_CALLERS = (eqx.nn.MLP, eqx.nn.MultiheadAttention, eqx.nn.Sequential, list, tuple)


def role(owner: Any, name: str) -> Role:
    """What the array `name` of the layer `owner` is. Decided by the layer's type and,
    in modules of your own, by the name; never by the array's shape."""
    if isinstance(owner, (eqx.nn.StateIndex, eqx.nn.State)):
        return "state"
    for types, roles in _ROLES.items():
        if isinstance(owner, types) and name in roles:
            return roles[name]
    named = _role_by_name(name)
    if isinstance(owner, Parametrization):
        return named if name in owner.trained else "bound"
    if named in ("weight", "bias") and _is_normalisation(owner):
        return "scale" if named == "weight" else "shift"
    return named


def _is_normalisation(owner: Any) -> bool:
    """Whether a module normalises activations. Equinox's layers are known by type, and
    with them their subclasses. A module of your own is told by its name: it ends in
    `Norm`, as `LayerNorm2d` does, and holds neither a norm of weights, as `MaxNorm`,
    nor a layer, as `ConvNorm` does."""
    if isinstance(owner, _LAYERS):
        return False
    name = type(owner).__name__
    return bool(_NORM.search(name)) and not _NORM_OF_WEIGHTS.search(name)


_NORM = re.compile(r"Norm(ali[sz]ation|ali[sz]er)?(\d?[dD])?$")
_NORM_OF_WEIGHTS = re.compile(
    r"(Max|Unit|Weight|Spectral)Norm|Conv|Linear|Dense|Embed|Attention"
)


def rank(owner: Any, path: tuple[Any, ...], ndim: int) -> int:
    """The rank of the array at `path`, a field and perhaps keys within it, in one
    module of this type, whatever stack the module is in now; `ndim`, the array's own
    rank, where the type does not tell."""
    declared = declared_rank(owner, path)
    if declared is not None:
        return min(declared, ndim)
    for types, ranks in _RANKS.items():
        if isinstance(owner, types) and path and path[0] in ranks:
            return min(ranks[path[0]](owner), ndim)
    return ndim


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


def only_multiplies(owner: Any, name: str | int) -> bool:
    """Whether all that this layer does with its array `name`, when it is called, is
    `array @ vector`. A subclass may do anything."""
    return name in _MULTIPLIED.get(type(owner), ())


def only_calls(node: Any) -> bool:
    """Whether all that this does with the layers within, when it is called, is to call
    them."""
    return type(node) in _CALLERS


def degree(wrapper: Any, i: int) -> int | None:
    """The degree in which what a wrapper makes of its `i`th weight is homogeneous: 0 if
    the size of that weight does not matter, `None` if it is not homogeneous."""
    if isinstance(wrapper, (eqx.nn.WeightNorm, eqx.nn.SpectralNorm)):
        return 0
    maps = getattr(wrapper, "parametrizations", ())
    return maps[i]._degree if i < len(maps) else None


def recorded_rank(wrapper: Any, i: int) -> int | None:
    """The rank of its `i`th weight in one layer, as one of our wrappers saw it when it
    was built."""
    ranks = vars(wrapper).get("_ranks", ())
    return ranks[i] if i < len(ranks) else None


def is_tied(leaf: Any) -> bool:
    """Whether `leaf` is what `eqx.nn.Shared` leaves in the place of a tied array."""
    return isinstance(leaf, _SharedNode)


_STEMS: dict[str, Role] = {
    "weight": "weight",
    "kernel": "weight",
    "bias": "bias",
    "embedding": "embedding",
}
_PREFIXES: dict[str, Role] = {"weight": "weight", "bias": "bias"}


def _role_by_name(name: str) -> Role:
    # Several are named in the plural.
    for stem, found in _STEMS.items():
        if re.search(rf"(^|_){stem}(s|es)?$", name):
            return found
    for stem, found in _PREFIXES.items():
        if re.match(rf"{stem}(s|es)?_", name):
            return found
    return "other"


def _shared_node_type() -> type:
    # The placeholder's class is not public, so we look at one.
    shared = eqx.nn.Shared((0.0, 0.0), lambda pair: pair[1], lambda pair: pair[0])
    [node] = [x for x in jax.tree.leaves(shared) if type(x).__name__ == "SharedNode"]
    return type(node)


_SharedNode = _shared_node_type()
