"""The rank of an array in one layer, which tells a weight from a stack of weights."""

from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx

from ._annotations import declared_rank


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


def recorded_rank(wrapper: Any, i: int) -> int | None:
    """The rank of its `i`th weight in one layer, as one of our wrappers saw it when it
    was built."""
    ranks = vars(wrapper).get("_ranks", ())
    return ranks[i] if i < len(ranks) else None
