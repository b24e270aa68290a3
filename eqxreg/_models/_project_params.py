"""`project_params`: the weights of a model projected, now."""

import functools as ft
from typing import Any, TypeVar

import jax

from .._linalg import per_layer
from .._maps import Projection, check_projection, check_weight
from .._tree import check_sites, require_sites, weights


_Model = TypeVar("_Model")


def project_params(
    model: _Model, projection: Projection, where: Any = weights
) -> _Model:
    """Projects the selected weights, now and exactly.

    For use after `eqx.apply_updates`, or on an average of the weights (EMA, SWA), which
    need not be in a set that is not convex, and by rounding may be outside any.

    **Arguments:**

    - `model`: any PyTree, such as a model or its filtered parameters.
    - `projection`: the map, such as [`eqxreg.MaxNorm`][].
    - `where`: which weights: a selector, or a tree of booleans. Defaults to
        [`eqxreg.weights`][].

    **Returns:**

    The model with projected weights. Layers that are stacked are projected one by one.

    **Raises:**

    - `TypeError`: if `projection` is not an [`eqxreg.Projection`][].
    - `ValueError`: if nothing is selected, or `projection` changes the shape or dtype
        of a weight.
    """
    check_projection(projection)
    found = require_sites(where, model, "where")
    check = ft.partial(check_weight, projection)
    check_sites(check, (site for _, site in found))
    leaves, structure = jax.tree.flatten(model)
    for i, site in found:
        leaves[i] = per_layer(projection, site.leaf, site.rank)
    return structure.unflatten(leaves)
