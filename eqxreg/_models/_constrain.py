"""`constrain`, which wraps the layers of a model."""

from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import PRNGKeyArray, PyTree

from .._maps import Parametrization
from .._tree import (
    Site,
    has_methods,
    is_tied,
    map_children,
    require_selection,
    sites,
    weights,
)
from .._wrappers import Constraint, located


def constrain(
    model: PyTree,
    parametrization: Parametrization,
    where: Any = weights,
    *,
    whole: bool = False,
    key: PRNGKeyArray | None = None,
) -> PyTree:
    """Wraps every layer that owns a selected weight in an [`eqxreg.Constraint`][].

    A layer that is wrapped already is wrapped outside, so that the newest promise is
    the outermost. A module that owns a selected array but cannot be called is left as
    it is, and the first callable module around it is wrapped. If there is none, as in a
    model whose methods are called, the outermost module around the array that has
    methods is wrapped, so that all of them see the constrained weight. Where
    `eqx.nn.Shared` ties an array to a selected one, its layer is wrapped too.

    **Arguments:**

    - `model`: any PyTree of layers, such as a model.
    - `parametrization`: the map, such as [`eqxreg.MaxNorm`][].
    - `where`: which weights: a selector, or a tree of booleans. Defaults to
        [`eqxreg.weights`][].
    - `whole`: whether to wrap the model as one instead of its layers. A wrapper is what
        makes the constrained weight, when it is called; a module that reads an array of
        a layer within it, as in `self.embed.weight @ h`, reads the raw one. In a model
        that is wrapped as one, every use of a weight sees the constrained one. Defaults
        to `False`. (Keyword only argument.)
    - `key`: randomness for maps whose wrappers draw some; none of the present ones
        does. (Keyword only argument.)

    **Returns:**

    The model, with wrappers around some of its layers or, if `whole`, around itself.

    **Raises:**

    - `ValueError`: if nothing is selected, or a selected array is in no module.
    - `TypeError`: if `whole`, and the model is no module.
    - Whatever [`eqxreg.Constraint`][] raises.

    !!! example

        ```python
        >>> import equinox as eqx
        >>> import jax
        >>> import eqxreg
        >>> mlp = eqx.nn.MLP(4, 2, 8, depth=2, key=jax.random.key(0))
        >>> mlp = eqxreg.constrain(mlp, eqxreg.MaxNorm(1.0, axis="unit"))
        >>> type(mlp.layers[0]).__name__
        'Constraint'

        ```

        An output that is tied to the embedding by hand:

        ```python
        >>> class Language(eqx.Module):
        ...     embed: eqx.nn.Embedding
        ...
        ...     def __call__(self, token):
        ...         return self.embed.weight @ self.embed(token)
        >>> model = Language(eqx.nn.Embedding(5, 4, key=jax.random.key(0)))
        >>> unit = eqxreg.UnitNorm(axis="unit")
        >>> model = eqxreg.constrain(model, unit, eqxreg.embeddings, whole=True)
        >>> print(model(2)[2].round(3))  # the square of a norm
        1.0

        ```
    """
    del key
    chosen = require_selection(where, model, "where")
    found = sites(model)
    if whole:
        if not isinstance(model, eqx.Module):
            raise TypeError(
                "`whole=True` wraps the model as one, so it must be an `eqx.Module`, "
                f"got a {type(model).__name__}. Leave `whole` out to wrap its layers."
            )
        own = [s.dotted(0) for s, c in zip(found, chosen, strict=True) if c]
        return Constraint(model, own[0] if len(own) == 1 else own, parametrization)
    sources = {id(s.leaf) for s, c in zip(found, chosen, strict=True) if c}
    tied = _tied_to(sources, model)
    names: dict[tuple, list[str]] = {}
    for site, is_chosen in zip(found, chosen, strict=True):
        if is_chosen or id(site.leaf) in tied:
            depth = wrapping_depth(site)
            names.setdefault(site.entries[:depth], []).append(site.dotted(depth))

    def wrap(node: Any, entries: tuple) -> Any:
        node = map_children(wrap, node, entries)
        here = names.get(entries, [])
        if not here:
            return node
        name, *others = here
        place = jtu.keystr(entries) + ("" if others else f".{name}")
        with located(place):
            return Constraint(node, here if others else name, parametrization)

    return wrap(model, ())


def wrapping_depth(site: Site) -> int:
    """The depth of the node to wrap: the outermost wrapper that has to do with this
    array; if there is none, the innermost layer that can be called; if there is none,
    the outermost module that has methods, for all of these may read the array; and if
    there is none, the module that owns it."""
    if site.wrappers:
        *_, (depth, _, _) = site.wrappers
        return depth
    # A map can be called too, but it is its wrapper that calls it.
    callables = [
        depth
        for depth, node in site.ancestors
        if callable(node) and not isinstance(node, Parametrization)
    ]
    if callables:
        return callables[-1]
    modules = [(depth, node) for depth, node in site.ancestors if _is_layer(node)]
    if not modules:
        raise ValueError(
            f"`where` selects {site.shown}, which is in no module, so that there is "
            "nothing to wrap. To constrain plain arrays use `eqxreg.project` or "
            "`eqxreg.project_params`; to freeze them, leave them out of what is "
            "differentiated."
        )
    computing = [depth for depth, node in modules if has_methods(node)]
    return computing[0] if computing else modules[-1][0]


def _is_layer(node: Any) -> bool:
    return not isinstance(node, (Parametrization, eqx.nn.State, eqx.nn.StateIndex))


def _tied_to(sources: set[int], model: PyTree) -> set[int]:
    """The ids of the placeholders that `eqx.nn.Shared` ties to the arrays `sources`."""
    tied = set()

    def visit(node: Any, entries: tuple) -> Any:
        if isinstance(node, eqx.nn.Shared):
            holes = jax.tree.leaves(node.where(node.pytree))
            arrays = jax.tree.leaves(node.get(node.pytree))
            for hole, array in zip(holes, arrays, strict=True):
                if is_tied(hole) and id(array) in sources:
                    tied.add(id(hole))
        return map_children(visit, node, entries)

    visit(model, ())
    return tied
