"""What is known of Equinox's layers: which of their arrays are what, and of what rank.

The one place with names of layers and of their fields. Selectors read it to tell
weights from biases; wrappers read it to tell a weight from a stack of weights.
"""

import re
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.tree_util as jtu

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
    if isinstance(owner, Parametrization):
        return "bound"
    named = _role_by_name(name)
    # A normalisation of your own, such as `LayerNorm2d`, is told by its name.
    is_norm = re.search(r"Norm(\dd)?$", type(owner).__name__)
    if is_norm and named in ("weight", "bias"):
        return "scale" if named == "weight" else "shift"
    return named


def rank(owner: Any, path: tuple[Any, ...], ndim: int) -> int:
    """The rank of the array at `path`, a field and perhaps keys within it, in one
    module of this type, whatever stack the module is in now; `ndim`, the array's own
    rank, where the type does not tell."""
    for types, ranks in _RANKS.items():
        if isinstance(owner, types) and path and path[0] in ranks:
            return min(ranks[path[0]](owner), ndim)
    return ndim


def is_wrapper(node: Any) -> bool:
    """Whether `node` is a wrapper: ours, or one that works as ours do, for it rewrites
    the array `weight_name` of its `layer` with `tree_at` and calls the layer. So do
    `eqx.nn.SpectralNorm` and `eqx.nn.WeightNorm`."""
    fields = getattr(type(node), "__dataclass_fields__", {})
    return isinstance(node, eqx.Module) and {"layer", "weight_name"} <= fields.keys()


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


def _role_by_name(name: str) -> Role:
    for stem in ("weight", "kernel", "bias", "embedding"):
        if name == stem or name.endswith(f"_{stem}"):
            return "weight" if stem == "kernel" else stem
    for stem in ("weight", "bias"):
        if name.startswith(f"{stem}_"):
            return stem
    return "other"


def _shared_node_type() -> type:
    # The placeholder's class is not public, so we look at one.
    shared = eqx.nn.Shared((0.0, 0.0), lambda pair: pair[1], lambda pair: pair[0])
    [node] = [x for x in jax.tree.leaves(shared) if type(x).__name__ == "SharedNode"]
    return type(node)


_SharedNode = _shared_node_type()
