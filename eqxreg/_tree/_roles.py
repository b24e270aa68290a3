"""What makes a float array a weight: its role in the layer that owns it.

The one place with the names of the fields of Equinox's layers; of modules of your own
the names of fields and classes tell. Selectors read it to tell weights from biases.
"""

import re
from typing import Any, Literal, TypeAlias

import equinox as eqx

from .._maps import Parametrization, WeightNorm


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
