"""`freeze` and `thaw`, which put `Frozen` around the layers of a model and take it off
again, and `cast`."""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._tree import map_children, part, require_selection, sites
from .._values import FrozenArray, is_constant, is_frozen, thawed
from .._wrappers import Frozen, outside_frozen, trainable_ones, with_frozen
from ._constrain import wrapping_depth


_Model = TypeVar("_Model")


def freeze(model: PyTree, where: Any) -> PyTree:
    """Freezes the selected arrays: gradients, decay, penalties, proximal steps and
    projections all leave them alone, and optimisers keep no moments for them.

    The layers that own them are wrapped in [`eqxreg.Frozen`][]; wrappers that have to
    do with a frozen array are wrapped with its layer. Initialise the optimiser after
    freezing.

    **Arguments:**

    - `model`: any PyTree of layers, such as a model.
    - `where`: which arrays: the path of a part of the model, such as `"layers[0]"`, or
        several, for all arrays at it and below; a function to such a part, as in
        `eqx.tree_at`; a selector, such as [`eqxreg.weights`][] or `eqxreg.everything`;
        or a tree of booleans. State and the bounds of maps are not trained anyway, and
        stay as they are.

    **Returns:**

    The model, with wrappers around some of its layers. It computes what it did.

    **Raises:**

    - `ValueError`: if nothing is selected, one of the paths leads nowhere, or a
        selected array is in no module.

    !!! example

        ```python
        >>> import equinox as eqx
        >>> import jax
        >>> import eqxreg
        >>> mlp = eqx.nn.MLP(4, 2, 8, depth=1, key=jax.random.key(0))
        >>> mlp = eqxreg.freeze(mlp, "layers[0]")
        >>> [path for path, _ in eqxreg.trainables(mlp, paths=True)]
        ['.layers[1].weight', '.layers[1].bias']

        ```
    """
    where = part(where, model)
    chosen = trainable_ones(require_selection(where, model, "where"), model)
    found = [s for s, c in zip(sites(model), chosen, strict=True) if c]
    # An array within a frozen layer needs no other wrapper.
    depths = {site.entries[: wrapping_depth(site)] for site in outside_frozen(found)}

    def wrap(node: Any, entries: tuple) -> Any:
        if is_frozen(node):
            return node
        node = map_children(wrap, node, entries)
        return Frozen(node, _nothing) if entries in depths else node

    return wrap(with_frozen(model, chosen), ())


def thaw(model: _Model) -> _Model:
    """Takes all [`eqxreg.Frozen`][] wrappers off a model.

    **Arguments:**

    - `model`: any PyTree.

    **Returns:**

    The model in its original types, with the arrays that it was frozen with, and other
    wrappers still on.
    """

    def unwrap(node: Any, entries: tuple) -> Any:
        while isinstance(node, Frozen):
            node = node.layer
        return node if is_frozen(node) else map_children(unwrap, node, entries)

    return thawed(unwrap(model, ()))


def cast(model: _Model, dtype: Any) -> _Model:
    """Casts the floating arrays of a model, frozen ones too. State and what maps hold
    stay as they are, and so do complex arrays.

    A cast of one's own, `jax.tree.map` over `eqx.is_inexact_array`, does not see frozen
    arrays, and one over `eqx.is_array` takes their bits for numbers, which is an error
    when they are read.

    **Arguments:**

    - `model`: any PyTree.
    - `dtype`: a floating dtype, such as `jnp.bfloat16`.

    **Returns:**

    The model with arrays of this dtype.

    **Raises:**

    - `TypeError`: if `dtype` is not a floating one.

    !!! example

        ```python
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> mlp = eqx.nn.MLP(4, 2, 8, depth=1, key=jax.random.key(0))
        >>> mlp = eqxreg.cast(eqxreg.freeze(mlp, eqxreg.weights), jnp.bfloat16)
        >>> mlp.layers[0].weight.dtype, mlp.layers[0].bias.dtype
        (dtype(bfloat16), dtype(bfloat16))

        ```
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`dtype` must be a floating one, got {jnp.dtype(dtype).name}.")

    def stays(node: Any) -> bool:
        return is_constant(node) or isinstance(node, eqx.nn.StateIndex | eqx.nn.State)

    def converted(node: Any) -> Any:
        kind = getattr(node, "dtype", None)
        if stays(node) or kind is None or not jnp.issubdtype(kind, jnp.floating):
            return node
        if is_frozen(node):
            return FrozenArray.of(node.value.astype(dtype))
        return node.astype(dtype) if eqx.is_array(node) else node

    is_leaf = lambda node: is_frozen(node) or stays(node)
    return jax.tree.map(converted, model, is_leaf=is_leaf)


def _nothing(tree: PyTree) -> PyTree[bool]:
    return jax.tree.map(lambda _: False, tree)
