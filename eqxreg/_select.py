"""Which weights: selectors, and lists of what they select."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, overload

import jax
import numpy as np
from jaxtyping import Array, PyTree

from ._layers import Role, degree
from ._maps._base import composed_degree
from ._sites import Site, sites


class Selector:
    """Which arrays of a tree: a callable from a tree to a tree of booleans of the same
    structure. It works on models, filtered models, gradients and optimiser masks.

    Selectors combine: `a | b` for either, `a & b` for both, and `~a` for the trainable
    arrays that `a` does not select.

    !!! example

        ```python
        >>> import equinox as eqx
        >>> import jax
        >>> import eqxreg
        >>> layer = eqx.nn.Linear(2, 3, key=jax.random.key(0))
        >>> chosen = eqxreg.weights(layer)
        >>> chosen.weight, chosen.bias
        (True, False)

        ```
    """

    def __init__(self, selects: Callable[[Site], bool], text: str):
        self._selects = selects
        self._text = text

    def selects(self, site: Site) -> bool:
        """Whether this leaf is selected."""
        return site.is_floating and self._selects(site)

    def __call__(self, tree: PyTree) -> PyTree[bool]:
        """**Arguments:**

        - `tree`: any PyTree, such as a model or its gradient.

        **Returns:**

        A tree of the same structure, with `True` in place of each selected array and
        `False` in place of every other leaf.
        """
        chosen = [self.selects(site) for site in sites(tree)]
        return jax.tree.unflatten(jax.tree.structure(tree), chosen)

    def __or__(self, other: "Selector") -> "Selector":
        return self._joined(other, any, "|")

    def __and__(self, other: "Selector") -> "Selector":
        return self._joined(other, all, "&")

    def _joined(self, other: "Selector", join: Callable, sign: str) -> "Selector":
        if not isinstance(other, Selector):
            return NotImplemented
        both = (self._selects, other._selects)
        text = f"({self._text} {sign} {other._text})"
        return Selector(lambda site: join(f(site) for f in both), text)

    def __invert__(self) -> "Selector":
        return Selector(
            lambda site: _is_trainable(site) and not self._selects(site),
            f"~{self._text}",
        )

    def __repr__(self) -> str:
        return self._text


def _is_trainable(site: Site) -> bool:
    return site.role not in ("state", "bound")


def _with_roles(name: str, *roles: Role) -> Selector:
    return Selector(lambda site: site.role in roles, f"eqxreg.{name}")


weights = _with_roles("weights", "weight")
"""What decay should act on: the matrices and kernels of linear, convolutional,
recurrent and attention layers and, in modules of your own, arrays named `weight`,
`weight_*`, `kernel`, `*_weight` or `*_kernel`. Never biases, normalisation scales,
PReLU slopes, the gain of weight normalisation, power-iteration vectors, bounds or
state; and no embeddings: for these too, `eqxreg.weights | eqxreg.embeddings`."""

biases = _with_roles("biases", "bias", "shift")
"""Biases of all layers, of normalisation layers too, and in modules of your own arrays
named `bias`, `bias_*` or `*_bias`."""

norm_parameters = _with_roles("norm_parameters", "scale", "shift")
"""The scales and shifts of normalisation layers: Equinox's, and modules of your own
whose class's name ends in `Norm`."""

embeddings = _with_roles("embeddings", "embedding")
"""The tables of `eqx.nn.Embedding` and, in modules of your own, arrays named
`embedding` or `*_embedding`."""

trainable = Selector(_is_trainable, "eqxreg.trainable")
"""Every floating or complex array, in any tree, except state and the bounds of maps."""

everything = Selector(lambda site: True, "eqxreg.everything")
"""Every floating or complex array, state too. Frozen arrays and what maps hold are
none: they are kept as integers."""


def _is_scale_invariant(site: Site) -> bool:
    # Maps act innermost first.
    degrees = (degree(wrapper, i) for _, wrapper, i in site.wrappers)
    return composed_degree(degrees) == 0


scale_invariant = Selector(_is_scale_invariant, "eqxreg.scale_invariant")
"""The raw weights whose size does not matter to the network, because they are under a
map that normalises: `UnitNorm`, `SpectralNorm`, `Orthogonal`, `AlmostOrthogonal` or
weight normalisation, Equinox's wrappers too.

Decay does not shrink what such a layer computes with. It only keeps the raw weight
short, and so its steps long: a step of gradient descent turns a raw weight of norm $r$
by an angle that is proportional to $1 / r^2$. Leave them out by `eqxreg.weights &
~eqxreg.scale_invariant`, or use [`eqxreg.corrected_weight_decay`][], which is made for
them. A weight that a normalisation layer follows is of this kind too, but no tree says
so."""


def select(
    *layer_types: type,
    names: str | Sequence[str] | None = None,
    where: Callable[[str, Any, Array], bool] | None = None,
) -> Selector:
    """Selects the weights of layers of some types.

    **Arguments:**

    - `*layer_types`: types of layers; a layer counts if it, or a module that it is part
        of, is an instance of one. Defaults to layers of every type.
    - `names`: the names of the arrays, as one string or several; dotted names such as
        `"query_proj.weight"` are relative to the layer. Defaults to those that are
        weights: matrices, kernels, embeddings and, if you name a type of normalisation
        layer, its scale; never biases. (Keyword only argument.)
    - `where`: a function `(path, layer, array) -> bool` that narrows the selection,
        with the path as a key string such as `.layers[0].weight`, and the layer that
        owns the array. (Keyword only argument.)

    **Returns:**

    A [`eqxreg.Selector`][].

    **Raises:**

    - `TypeError`: if a layer type is not a type.

    !!! example

        ```python
        >>> import equinox as eqx
        >>> import jax
        >>> import eqxreg
        >>> mlp = eqx.nn.MLP(4, 2, 8, depth=2, key=jax.random.key(0))
        >>> first = eqxreg.select(
        ...     eqx.nn.Linear, where=lambda path, layer, array: "layers[0]" in path
        ... )
        >>> [path for path, _ in eqxreg.trainables(mlp, first, paths=True)]
        ['.layers[0].weight']

        ```
    """
    for layer_type in layer_types:
        if not isinstance(layer_type, type):
            raise TypeError(
                "`select` takes types of layers, such as `eqx.nn.Linear`, got "
                f"{layer_type!r}."
            )
    wanted = None if names is None else (names,) if isinstance(names, str) else names

    def selects(site: Site) -> bool:
        inside = [
            (depth, node)
            for depth, node in site.ancestors
            if not layer_types or isinstance(node, layer_types)
        ]
        if layer_types and not inside:
            return False
        if wanted is None:
            # Asked for by its type, an embedding or a normalisation is a weight too.
            named = isinstance(site.owner, layer_types) if layer_types else False
            roles = ("weight", "embedding", "scale") if named else ("weight",)
            if site.role not in roles:
                return False
        elif not any(
            site.dotted(depth) in wanted
            for depth in [depth for depth, _ in inside] or [0]
        ):
            return False
        return where is None or bool(where(site.path, site.owner, site.leaf))

    text = [t.__name__ for t in layer_types]
    text += [] if names is None else [f"names={names!r}"]
    text += [] if where is None else [f"where={getattr(where, '__name__', where)}"]
    return Selector(selects, f"eqxreg.select({', '.join(text)})")


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
    # A mask of a model is a model of booleans, and as callable as any.
    leaves = jax.tree.leaves(where)
    is_mask = len(leaves) > 0 and all(isinstance(x, bool | np.bool_) for x in leaves)
    if not is_mask and (isinstance(where, type) or not callable(where)):
        name = getattr(where, "__name__", "...")
        raise TypeError(
            "Which weights is said by a selector such as `eqxreg.weights`, a function "
            f"to a tree of booleans, or such a tree, and not by {where!r}. Did you "
            f"mean `eqxreg.select({name})`?"
        )
    mask = where if is_mask else where(tree)
    chosen = jax.tree.leaves(jax.tree.broadcast(mask, tree))
    if isinstance(where, Selector):
        return chosen
    possible = jax.tree.leaves(trainable(tree))
    return [bool(c) and p for c, p in zip(chosen, possible, strict=True)]


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
                f"`{site.path}`: {error} To leave an array out, choose others by "
                "`where` or `mask`."
            ) from None


def require_selection(where: Any, tree: PyTree, argument: str) -> list[bool]:
    """`chosen_leaves`, or an error if there are none."""
    chosen = chosen_leaves(where, tree)
    if not any(chosen):
        paths = [site.path for site in chosen_sites(trainable, tree)]
        few = ", ".join(f"`{path}`" for path in paths[:4])
        more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
        there = f"It has {few}{more}." if paths else "It has no trainable arrays."
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
