"""The walk over a model that selectors and wrappers share.

It meets each leaf of a tree together with the layer that owns it and the name of the
field it is in. It works alike on models, on filtered models, on their gradients and on
trees of shapes, for all have the same types of layers.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._bits import HiddenArray
from ._layers import Role, is_wrapper, rank, role
from ._paths import names_of, parse


@dataclasses.dataclass(frozen=True)
class Site:
    """A leaf of a tree, and where it is."""

    entries: tuple[Any, ...]
    """The key path from the root."""
    ancestors: tuple[tuple[int, Any], ...]
    """The modules on the way, outermost first, each with its depth in `entries`."""
    leaf: Any

    @property
    def path(self) -> str:
        return jtu.keystr(self.entries)

    @property
    def owner(self) -> Any:
        """The module that owns the leaf, `None` in a plain tree."""
        return self.ancestors[-1][1] if self.ancestors else None

    @property
    def local(self) -> tuple[Any, ...]:
        """The key path from the owner."""
        return self.entries[self.ancestors[-1][0] :] if self.ancestors else self.entries

    def dotted(self, depth: int) -> str:
        """The path from `depth` as a dotted name. A wrapper's `layer` is not part of
        it, so that a name stays what it was before the layer was wrapped."""
        inner = {at for at, node in self.ancestors if is_wrapper(node)}
        kept = [
            entry
            for at, entry in enumerate(self.entries)
            if at >= depth and not (at in inner and _entry_name(entry) == "layer")
        ]
        return jtu.keystr(tuple(kept), simple=True, separator=".")

    @property
    def name(self) -> str:
        """The name of the field, or the key, that the leaf is in."""
        names = [_entry_name(e) for e in self.local]
        named = [n for n in names if n is not None]
        return named[-1] if named else ""

    @property
    def role(self) -> Role:
        if any(isinstance(node, eqx.nn.StateIndex) for _, node in self.ancestors):
            return "state"
        return role(self.owner, self.name)

    @property
    def wrappers(self) -> list[tuple[int, Any, int]]:
        """The wrappers that make this array, innermost first: the depth of each in
        `entries`, the wrapper, and the index of the array among those that it makes."""
        found = []
        for depth, node in reversed(self.ancestors):
            if is_wrapper(node):
                names = [parse(name) for name in names_of(node.weight_name)]
                name = parse(self.dotted(depth))
                if name in names:
                    found.append((depth, node, names.index(name)))
        return found

    @property
    def rank(self) -> int:
        """The rank of the array in one layer, if layers are stacked."""
        return rank(self.owner, self.name, self.leaf.ndim)

    @property
    def is_floating(self) -> bool:
        dtype = getattr(self.leaf, "dtype", None)
        return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def sites(tree: PyTree) -> list[Site]:
    """All leaves of `tree`, in the order of `jax.tree.leaves`."""
    return list(_walk(tree, (), ()))


def _walk(node: Any, entries: tuple, ancestors: tuple) -> Iterator[Site]:
    if isinstance(node, (eqx.Module, eqx.nn.State, HiddenArray)):
        ancestors = (*ancestors, (len(entries), node))
    children, _ = jtu.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    for entry, child in children:
        if child is None:
            continue
        if jtu.all_leaves([child]):
            yield Site(entries + entry, ancestors, child)
        else:
            yield from _walk(child, entries + entry, ancestors)


def _entry_name(entry: Any) -> str | None:
    if isinstance(entry, jtu.GetAttrKey):
        return entry.name
    if isinstance(entry, jtu.DictKey) and isinstance(entry.key, str):
        return entry.key
    return None
