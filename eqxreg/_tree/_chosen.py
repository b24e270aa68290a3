"""What a selector, a mask or a path chooses of a tree, and errors if it is nothing."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, PyTree

from ._selectors import Among, Selector, Under, as_strings, trainable
from ._walk import Site, sites


def part(where: Any, tree: PyTree) -> Any:
    """A selector or a mask for what `freeze` takes besides these: the path of a part of
    the model, several of them, or a function from the model to such a part, as in
    `eqx.tree_at`."""
    several = isinstance(where, list | tuple) and len(where) > 0
    if isinstance(where, str) or (several and all(isinstance(w, str) for w in where)):
        paths = as_strings(where, "where")
        for path in paths:
            require_selection(Selector(Under((path,)), repr(path)), tree, "where")
        return trainable.under(*paths)
    is_tree = _is_mask(where) or _is_of_numbers(where)
    if is_tree or isinstance(where, Selector | type) or not callable(where):
        return where
    found = where(tree)
    if _is_mask(found):
        return found
    ids = {id(leaf) for leaf in jax.tree.leaves(found) if eqx.is_inexact_array(leaf)}
    return Selector(Among(frozenset(ids)), repr(where))


@overload
def trainables(
    model: PyTree, where: Any = ..., *, paths: Literal[False] = ...
) -> list[Array]: ...


@overload
def trainables(
    model: PyTree, where: Any = ..., *, paths: Literal[True]
) -> list[tuple[str, Array]]: ...


def trainables(model, where=trainable, *, paths=False):
    """The trainable arrays of a model, as a list. Differentiable: it only reads.

    **Arguments:**

    - `model`: any PyTree.
    - `where`: a selector, or a tree of booleans. Defaults to [`eqxreg.trainable`][].
    - `paths`: whether to return pairs of (key path string, array) instead of arrays.
        (Keyword only argument.)

    **Returns:**

    A list in the order of `jax.tree.leaves`. An array that stands in several places of
    the model is listed once, where it stands first; under `jit` and `grad` JAX makes
    several arrays of it, unless `eqx.nn.Shared` ties them.
    """
    found: dict[int, tuple[str, Array]] = {}
    for site in chosen_sites(where, model):
        found.setdefault(id(site.leaf), (site.path, site.leaf))
    return list(found.values()) if paths else [array for _, array in found.values()]


def chosen_leaves(where: Any, tree: PyTree) -> list[bool]:
    """One boolean for each leaf of `tree`, from a selector, any function to a tree of
    booleans, or such a tree or a prefix of one. Unless a selector says otherwise, only
    trainable arrays count."""
    is_mask = _is_mask(where)
    if isinstance(where, str):
        raise TypeError(
            f"Which weights is said by a selector, and not by {where!r}. For those at "
            f"that path or below it write `eqxreg.weights.under({where!r})`, and "
            f"`eqxreg.trainable.under({where!r})` for all arrays there."
        )
    if isinstance(where, eqx.nn.State):
        raise TypeError(
            "Which weights is said by a selector, and not by an `eqx.nn.State`. Give "
            "the state by its name: `state=state`."
        )
    if not is_mask and _is_of_numbers(where):
        raise TypeError(
            "A tree that says which weights must be one of booleans, and this one has "
            f"{type(jax.tree.leaves(where)[0]).__name__}s. Write "
            "`jax.tree.map(bool, ...)` of it."
        )
    if not is_mask and (isinstance(where, type) or not callable(where)):
        name = getattr(where, "__name__", "...")
        raise TypeError(
            "Which weights is said by a selector such as `eqxreg.weights`, a function "
            f"to a tree of booleans, or such a tree, and not by {where!r}. Did you "
            f"mean `eqxreg.select({name})`?"
        )
    mask = where if is_mask else where(tree)
    if jax.tree.leaves(mask) and not _is_mask(mask):
        raise TypeError(
            "A function that says which weights must return a tree of booleans of the "
            f"structure of the model, and {where!r} returned {type(mask).__name__}. "
            "For the weights of a part of it write "
            '`eqxreg.weights.under("layers[0]")`, with the path of that part.'
        )
    try:
        chosen = jax.tree.leaves(jax.tree.broadcast(mask, tree))
    except ValueError as error:
        raise ValueError(
            "The tree of booleans that says which weights must have the structure of "
            f"the model, or be a prefix of it: {error}"
        ) from None
    if isinstance(where, Selector):
        return chosen
    possible = jax.tree.leaves(trainable(tree))
    return [bool(c) and p for c, p in zip(chosen, possible, strict=True)]


def _is_mask(where: Any) -> bool:
    leaves = jax.tree.leaves(where)
    return len(leaves) > 0 and all(map(_is_boolean, leaves))


def _is_of_numbers(where: Any) -> bool:
    # A model of numbers can be called as a model.
    is_tree = isinstance(where, eqx.Module) or not callable(where)
    leaves = jax.tree.leaves(where)
    return is_tree and len(leaves) > 0 and all(map(eqx.is_array_like, leaves))


def _is_boolean(leaf: Any) -> bool:
    is_array = isinstance(leaf, np.ndarray | jax.Array) and leaf.ndim == 0
    return isinstance(leaf, bool | np.bool_) or (is_array and leaf.dtype == bool)


def chosen_sites(where: Any, tree: PyTree) -> list[Site]:
    """The leaves of `tree` that `where` chooses."""
    chosen = chosen_leaves(where, tree)
    return [site for site, c in zip(sites(tree), chosen, strict=True) if c]


def check_sites(check: Callable[[Any], None], chosen: Iterable[Site]) -> None:
    """Raises, saying where, if one of the arrays in one layer fails a map's check."""
    for site in chosen:
        shape = site.leaf.shape[site.leaf.ndim - site.rank :]
        try:
            check(jax.ShapeDtypeStruct(shape, site.leaf.dtype))
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"{site.shown}: {error} To leave an array out, choose others by "
                "`where` or `mask`."
            ) from None


def require_selection(where: Any, tree: PyTree, argument: str) -> list[bool]:
    """`chosen_leaves`, or an error if there are none."""
    chosen = chosen_leaves(where, tree)
    if not any(chosen):
        paths = [site.shown for site in chosen_sites(trainable, tree)]
        few = ", ".join(paths[:4])
        more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
        there = f"It has {few}{more}." if paths else "It has no trainable arrays."
        if jax.tree.structure(tree) == jax.tree.structure(0):
            there = "It is a single array, which has no name."
        if isinstance(where, bool | jax.Array):
            there += (
                f" Within `optax.inject_hyperparams`, name `{argument}` in "
                "`static_args`."
            )
        raise ValueError(
            f"`{argument}={where!r}` selects nothing. {there} To select by type or "
            "name use `eqxreg.select`; `eqxreg.everything` selects every array."
        )
    return chosen


def require_sites(where: Any, tree: PyTree, argument: str) -> list[tuple[int, Site]]:
    """`chosen_sites`, each with its number among the leaves, or an error if there are
    none."""
    chosen = require_selection(where, tree, argument)
    found = enumerate(zip(sites(tree), chosen, strict=True))
    return [(i, site) for i, (site, is_chosen) in found if is_chosen]
