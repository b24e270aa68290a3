"""What a wrapper keeps of its maps: their arrays as constants, whatever is put there.

Optimisers and averages go by floating arrays, and know nothing of maps. So of all that
a map holds only what it says is `trained` stays a floating array.
"""

import dataclasses
import functools as ft
from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu

from .._values import Constant, Number, Schedule
from ._base import Parametrization


class HeldMaps(tuple[Parametrization, ...]):
    """The maps of a wrapper. To a tree it is a tuple whose maps hold no floating arrays
    but those that they train: one that is put there, by `eqx.tree_at`, is made a
    constant, so that a new bound is a new value and no new program."""

    def __new__(cls, maps: Iterable[Any]):
        return super().__new__(cls, [_held(p) for p in maps])

    def __getnewargs__(self) -> tuple[tuple[Parametrization, ...]]:
        return (tuple(self),)


def _flatten_with_keys(maps: HeldMaps):
    return tuple((jtu.SequenceKey(i), p) for i, p in enumerate(maps)), None


jtu.register_pytree_with_keys(
    HeldMaps,
    _flatten_with_keys,
    lambda _, maps: HeldMaps(maps),
    lambda maps: (tuple(maps), None),
)


_ALREADY = (Constant, Number, Schedule)


def _held(node: Any) -> Any:
    """`node` with constants in the place of floating arrays; `node` itself if there are
    none, for this is asked whenever a model is built of its leaves."""
    if node is None or isinstance(node, _ALREADY):
        return node
    if eqx.is_inexact_array(node):
        return Constant.of(node)
    if isinstance(node, Parametrization):
        found = [(name, vars(node).get(name)) for name in _constant_fields(type(node))]
        changed = {k: new for k, old in found if (new := _held(old)) is not old}
        return _with_fields(node, changed) if changed else node
    parts, structure = jax.tree.flatten(node, is_leaf=_is_one)
    held = [x if x is node else _held(x) for x in parts]
    same = all(new is old for new, old in zip(held, parts, strict=True))
    return node if same else structure.unflatten(held)


@ft.cache
def _constant_fields(cls: type[Parametrization]) -> tuple[str, ...]:
    fields = [f for f in dataclasses.fields(cls) if not f.metadata.get("static", False)]
    return tuple(f.name for f in fields if f.name not in cls.trained)


def _with_fields(p: Parametrization, values: dict[str, Any]) -> Parametrization:
    where = lambda p: [getattr(p, name) for name in values]
    return eqx.tree_at(where, p, [*values.values()], is_leaf=lambda x: x is None)


def _is_one(node: Any) -> bool:
    return isinstance(node, Parametrization | Constant)
