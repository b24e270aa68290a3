"""The walk over a model that selectors and wrappers share."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._values import HiddenArray
from ._modules import is_module, is_wrapper
from ._paths import children_of, is_path, key_of, names_of, parse, write
from ._ranks import rank, recorded_rank
from ._roles import Role, role


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

    @property
    def shown(self) -> str:
        """The path as errors show it."""
        return f"`{self.path}`" if self.entries else "the array itself"

    def plain(self, depth: int) -> tuple[Any, ...]:
        """The key path from `depth`, without the `layer` of wrappers on the way, so
        that it stays what it was before a layer was wrapped."""
        inner = {at for at, node in self.ancestors if is_wrapper(node)}
        return tuple(
            entry
            for at, entry in enumerate(self.entries)
            if at >= depth and not (at in inner and key_of(entry) == "layer")
        )

    def dotted(self, depth: int) -> str:
        """The plain path from `depth` as a name."""
        return write(self.plain(depth))

    @property
    def name(self) -> str:
        """The name of the field, or the key, that the leaf is in."""
        return next(iter(self._names), "")

    @property
    def _names(self) -> list[str]:
        """Field and keys, innermost first, without indices."""
        keys = map(key_of, reversed(self.local))
        return [key for key in keys if isinstance(key, str)]

    @property
    def role(self) -> Role:
        if any(isinstance(node, eqx.nn.StateIndex) for _, node in self.ancestors):
            return "state"
        # An array in a dict is what its key says or, if that says nothing, what the
        # dict is called.
        for name in self._names[:2]:
            if (found := role(self.owner, name)) != "other":
                return found
        return role(self.owner, self.name)

    @property
    def wrappers(self) -> list[tuple[int, Any, int]]:
        """The wrappers that make this array, innermost first: the depth of each in
        `entries`, the wrapper, and the index of the array among those that it makes."""
        found = []
        for depth, node in reversed(self.ancestors):
            if is_wrapper(node):
                entries = self.plain(depth)
                for i, name in enumerate(names_of(node.weight_name)):
                    if is_path(parse(name), entries):
                        found.append((depth, node, i))
        return found

    @property
    def rank(self) -> int:
        """The rank of the array in one layer, if layers are stacked."""
        path = tuple(map(key_of, self.local))
        known = rank(self.owner, path, self.leaf.ndim)
        # A wrapper that was built in a stack has seen a single layer.
        seen = [recorded_rank(wrapper, i) for _, wrapper, i in self.wrappers]
        return min([known, *(r for r in seen if r is not None)])

    @property
    def is_floating(self) -> bool:
        dtype = getattr(self.leaf, "dtype", None)
        return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def sites(tree: PyTree) -> list[Site]:
    """All leaves of `tree`, in the order of `jax.tree.leaves`."""
    if tree is not None and jtu.all_leaves([tree]):
        return [Site((), (), tree)]
    return list(_walk(tree, (), ()))


def _walk(node: Any, entries: tuple, ancestors: tuple) -> Iterator[Site]:
    if is_module(node) or isinstance(node, HiddenArray):
        ancestors = (*ancestors, (len(entries), node))
    for entry, child in children_of(node):
        if child is None:
            continue
        if jtu.all_leaves([child]):
            yield Site((*entries, entry), ancestors, child)
        else:
            yield from _walk(child, (*entries, entry), ancestors)


def map_children(fn: Any, node: Any, entries: tuple) -> Any:
    """`node` with `fn(child, key path)` for each of its children; a leaf as it is."""
    children, structure = jtu.tree_flatten_with_path(
        node, is_leaf=lambda x: x is not node
    )
    if len(children) == 1 and children[0][1] is node:
        return node
    return structure.unflatten([fn(child, entries + at) for at, child in children])
