"""What all transforms do with the trees that they are given: pair updates, parameters,
masks and states by the path of each array, never by its number, and say as an update
where a weight is to arrive.

Arrays that one tree has and another lacks are the rule: gradients have `None` where
nothing is differentiated, and a model has functions where its filtered form has `None`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Inexact, Int, PyTree

from .._linalg import holds, widen
from .._tree import Selector, Site, require_sites, sites


def check_params(params: Any, name: str) -> None:
    """Raises if a transform has been given no parameters."""
    if params is None:
        raise ValueError(
            f"`eqxreg.{name}` needs the parameters: call "
            "`optimiser.update(grads, state, params)`, with "
            "`params=eqx.filter(model, eqx.is_inexact_array)`."
        )


def selected(mask: Any, params: PyTree) -> list[Site]:
    """The weights that `mask` selects, or an error if there are none. Leaves that are
    no floating or complex arrays are out of the question, and are not shown to it."""
    arrays = _arrays_of(params)
    return [site for _, site in require_sites(_by_path(mask), arrays, "mask")]


def paired(
    updates: PyTree, params: PyTree, mask: Any
) -> tuple[list[Any], Any, list[tuple[int, Site]]]:
    """The leaves of `updates` and their structure; and the selected weights that have
    an update, each with the number of that among the leaves.

    As elsewhere in Optax, a weight whose update is `None` is left alone. An update
    without a parameter is an error.
    """
    pairs, structure = jtu.tree_flatten_with_path(updates)
    leaves = [leaf for _, leaf in pairs]
    numbers = {path: i for i, (path, _) in enumerate(pairs)}
    known = {path for path, _ in jtu.tree_flatten_with_path(params)[0]}
    for path, leaf in pairs:
        if path not in known and _is_floating(leaf):
            raise ValueError(
                f"`updates` has an array at `{jtu.keystr(path)}`, where `params` has "
                "none. Give the parameters that the gradients are of, in a tree of the "
                "same kind: `optimiser.update(grads, state, params)`."
            )
    found = []
    for site in selected(mask, params):
        i = numbers.get(site.entries)
        if i is None:
            continue
        leaves[i], leaf = jnp.asarray(leaves[i]), jnp.asarray(site.leaf)
        if leaves[i].shape != leaf.shape:
            raise ValueError(
                f"`updates` has an array of shape {leaves[i].shape} at {site.shown}, "
                f"where `params` has one of shape {leaf.shape}. Give the parameters "
                "that the gradients are of."
            )
        found.append((i, dataclasses.replace(site, leaf=leaf)))
    return leaves, structure, found


def with_selected(values: dict[str, Array], params: PyTree) -> PyTree:
    """A tree of the structure of the parameters, with the values of some paths, and
    `optax.MaskedNode` in the place of all other arrays, as in `optax.masked`."""
    pairs, structure = jtu.tree_flatten_with_path(_arrays_of(params))
    paths = [jtu.keystr(path) for path, _ in pairs]
    return structure.unflatten([values.get(p, optax.MaskedNode()) for p in paths])


def by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree, such as `with_selected` makes, each under its path."""
    pairs, _ = jtu.tree_flatten_with_path(tree)
    return {jtu.keystr(path): leaf for path, leaf in pairs}


def replaced(tree: PyTree, values: dict[str, Array]) -> PyTree:
    """`tree` with other values in some of its paths, of the dtypes that it has."""

    def new(path: Any, leaf: Array) -> Array:
        value = values.get(jtu.keystr(path))
        return leaf if value is None else value.astype(leaf.dtype)

    return jtu.tree_map_with_path(new, tree)


def as_in(tree: PyTree, other: PyTree) -> PyTree:
    """`tree` with the dtypes of `other`. A state may have been cast."""
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree, other)


def recorded(value: Any, site: Site, shapes: PyTree) -> Any:
    """What the state has for a weight, or an error if that is not of these shapes."""
    shapes_of = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
    if shapes_of(value) != shapes_of(shapes):
        raise ValueError(
            f"`state` has nothing that fits the array at {site.shown}: it is of other "
            "parameters. Initialise the optimiser again, "
            "`state = optimiser.init(params)`, whenever arrays are frozen, thawed, "
            "wrapped or exchanged."
        )
    return value


def emitted_dtype(param: Array, update: Array) -> Any:
    """The dtype of an update that takes a weight somewhere: that of the update that was
    given, unless it cannot hold the weight. What is rounded to bfloat16 takes no weight
    in float32 to zero, or to a bound."""
    is_real = jnp.iscomplexobj(param) and not jnp.iscomplexobj(update)
    fits = holds(update.dtype, param.dtype) and not is_real
    return update.dtype if fits else param.dtype


def together(
    param: Inexact[Array, "*shape"], update: Inexact[Array, "*shape"]
) -> tuple[Inexact[Array, "*shape"], Inexact[Array, "*shape"]]:
    """Both in one dtype, of at least single precision, that holds either."""
    param, update = widen(param), widen(update)
    wide = np.promote_types(param.dtype, update.dtype)
    return param.astype(wide), update.astype(wide)


def moved(
    param: Inexact[Array, "*shape"], update: Inexact[Array, "*shape"]
) -> Inexact[Array, "*shape"]:
    """Where an update takes a weight."""
    both = together(param, update)
    return (both[0] + both[1]).astype(param.dtype)


def change(
    param: Inexact[Array, "*shape"], new: Inexact[Array, "*shape"], dtype
) -> Inexact[Array, "*shape"]:
    """The update that takes a weight to `new`, up to rounding; exactly, if that is
    zero, and never beyond zero."""
    return (widen(new) - widen(param)).astype(dtype)


def following(step: Int[Array, ""], every: int = 1) -> Int[Array, ""]:
    """The number of the next update. At the largest integer it stays, as in Optax, or
    goes round among the last ones, so that every k-th is still met."""
    largest = jnp.iinfo(step.dtype).max
    return jnp.where(step < largest, step, largest - every) + 1


def is_placeholder(params: Any) -> bool:
    """Whether these are no parameters, but what `optax.tree.map_params` gives to `init`
    to find out where the state has something for each of them."""
    return isinstance(params, _Placeholder)


def _placeholder_type() -> type:
    # The placeholder's class is not public, so we look at one.
    seen = []

    def init(params: Any) -> tuple:
        seen.append(type(params))
        return ()

    optax.tree.map_params(init, lambda leaf: leaf, ())
    return seen[0]


_Placeholder = _placeholder_type()


def _is_floating(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _arrays_of(params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf if _is_floating(leaf) else None, params)


def _by_path(mask: Any) -> Any:
    """`mask` as a function from parameters to booleans, if it is not one that gives
    what is asked for."""
    is_tree = not isinstance(mask, bool) and _is_flags(mask)
    is_function = callable(mask) and not isinstance(mask, type | Selector)
    return _MaskByPath(mask) if is_tree or is_function else mask


class _MaskByPath:
    """A mask whose entries are found by their paths: a tree of booleans of the
    structure of the model, of its filtered form, or of a part of either from the root;
    or a function to one. It prints as what the user gave."""

    def __init__(self, mask: Any):
        self.mask = mask

    def __repr__(self) -> str:
        return repr(self.mask)

    def __call__(self, params: PyTree) -> PyTree[bool]:
        mask = self.mask if _is_flags(self.mask) else self.mask(params)
        if jax.tree.leaves(mask) and not _is_flags(mask):
            raise ValueError(
                f"`mask` must be a function to a tree of booleans, got {mask!r}."
            )
        flags = {path: bool(x) for path, x in jtu.tree_flatten_with_path(mask)[0]}
        chosen = [self._flag(flags, site) for site in sites(params)]
        return jax.tree.structure(params).unflatten(chosen)

    @staticmethod
    def _flag(flags: dict[tuple, bool], site: Site) -> bool:
        for length in range(len(site.entries) + 1):
            if site.entries[:length] in flags:
                return flags[site.entries[:length]]
        raise ValueError(
            f"`mask` says nothing of the array at {site.shown}. It must be a tree of "
            "booleans of the structure of the parameters, or of a part of it from the "
            "root. A selector such as `eqxreg.weights` fits every tree."
        )


def _is_flags(tree: Any) -> bool:
    """Whether all leaves of a tree are booleans, or integers that stand for them."""
    leaves = jax.tree.leaves(tree)
    kinds = bool | int | np.bool_ | np.integer
    return bool(leaves) and all(isinstance(x, kinds) and x in (0, 1) for x in leaves)
