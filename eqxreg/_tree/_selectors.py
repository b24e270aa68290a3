"""Selectors: which arrays of a tree, by their roles, layers, names and paths."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array, PyTree

from .._maps import composed_degree
from ._modules import degree
from ._paths import key_of, parse, words
from ._roles import Role
from ._walk import Site, sites


@dataclasses.dataclass(frozen=True, eq=False)
class Selector:
    """Which arrays of a tree: a callable from a tree to a tree of booleans of the same
    structure. It works on models, filtered models, gradients and optimiser masks.

    Selectors combine: `a | b` for either, `a & b` for both, and `~a` for the trainable
    arrays that `a` does not select. They are pickled and compared by what they select;
    a function given as `where` must be one that can be pickled, at the top of a module.

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

    _selects: Callable[[Site], bool]
    _text: str

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

    def under(self, *paths: str) -> "Selector":
        """**Arguments:**

        - `*paths`: paths from the root of a model, such as `"layers[0]"` or
            `"encoder.blocks.3"`. Wrappers on the way may be left out.

        **Returns:**

        A selector of those arrays of this one's that are at one of the paths or below
        it: `eqxreg.trainable.under("layers[0]")` selects all arrays of that layer.
        """
        selects = _Both(self._selects, Under(as_strings(paths, "paths")))
        text = ", ".join(map(repr, paths))
        return Selector(selects, f"{self._text}.under({text})")

    def __or__(self, other: "Selector") -> "Selector":
        if not isinstance(other, Selector):
            return NotImplemented
        either = _Either(self._selects, other._selects)
        return Selector(either, f"({self._text} | {other._text})")

    def __and__(self, other: "Selector") -> "Selector":
        if not isinstance(other, Selector):
            return NotImplemented
        both = _Both(self._selects, other._selects)
        return Selector(both, f"({self._text} & {other._text})")

    def __invert__(self) -> "Selector":
        return Selector(_Not(self._selects), f"~{self._text}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selector):
            return NotImplemented
        return self._selects == other._selects

    def __hash__(self) -> int:
        return hash(self._selects)

    def __repr__(self) -> str:
        return self._text


# What selectors ask of a leaf. No closures, so that selectors are pickled and compared.


def _is_trainable(site: Site) -> bool:
    return site.role not in ("state", "bound")


def _is_any(site: Site) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class _HasRole:
    roles: tuple[Role, ...]

    def __call__(self, site: Site) -> bool:
        return site.role in self.roles


@dataclasses.dataclass(frozen=True)
class _Either:
    first: Callable[[Site], bool]
    second: Callable[[Site], bool]

    def __call__(self, site: Site) -> bool:
        return self.first(site) or self.second(site)


@dataclasses.dataclass(frozen=True)
class _Both:
    first: Callable[[Site], bool]
    second: Callable[[Site], bool]

    def __call__(self, site: Site) -> bool:
        return self.first(site) and self.second(site)


@dataclasses.dataclass(frozen=True)
class _Not:
    what: Callable[[Site], bool]

    def __call__(self, site: Site) -> bool:
        return _is_trainable(site) and not self.what(site)


@dataclasses.dataclass(frozen=True)
class Under:
    """What is at one of some paths from the root, or below it."""

    paths: tuple[str, ...]

    def __call__(self, site: Site) -> bool:
        # A path is that of the plain model, or as `trainables` gives it.
        ways = [_words(site.entries), _words(site.plain(0))]
        return any(
            way[: len(path)] == path
            for path in map(words, map(parse, self.paths))
            for way in ways
        )


@dataclasses.dataclass(frozen=True)
class Among:
    """Some arrays, by identity."""

    ids: frozenset[int]

    def __call__(self, site: Site) -> bool:
        return id(site.leaf) in self.ids


@dataclasses.dataclass(frozen=True)
class _OfLayers:
    """What `select` selects."""

    layer_types: tuple[type, ...]
    names: tuple[str, ...] | None
    under: Under | None
    where: Callable[[str, Any, Array], bool] | None

    def __call__(self, site: Site) -> bool:
        depths = [
            depth
            for depth, node in site.ancestors
            if isinstance(node, self.layer_types or object)
        ]
        if self.layer_types and not depths:
            return False
        if self.under is not None and not self.under(site):
            return False
        if self.names is None:
            # Asked for by its type, an embedding or a normalisation is a weight too.
            roles = ("weight",)
            if self.layer_types and isinstance(site.owner, self.layer_types):
                roles = ("weight", "embedding", "scale")
            if site.role not in roles:
                return False
        else:
            # In layers of every type a name is that of the end of a path.
            ends = depths if self.layer_types else range(len(site.entries) or 1)
            wanted = [words(parse(name)) for name in self.names]
            if not any(_is_named(site, depth, w) for depth in ends for w in wanted):
                return False
        return self.where is None or bool(self.where(site.path, site.owner, site.leaf))


def _words(entries: tuple[Any, ...]) -> tuple[str, ...]:
    return words([key_of(entry) for entry in entries])


def _is_named(site: Site, depth: int, name: tuple[str, ...]) -> bool:
    """Whether the path from `depth` has this name, or is within a list or a dict of its
    owner that has it."""
    entries = site.plain(depth)
    owner = max(len(entries) - len(site.local), 0)
    ends = range(owner + 1, len(entries) + 1)
    return any(_words(entries[:end]) == name for end in ends)


def _with_roles(name: str, *roles: Role) -> Selector:
    return Selector(_HasRole(roles), f"eqxreg.{name}")


weights = _with_roles("weights", "weight")
"""What decay should act on: the matrices and kernels of linear, convolutional,
recurrent and attention layers and, in modules of your own, arrays named `weight`,
`weight_*`, `kernel`, `*_weight` or `*_kernel`, or the plural of these, and what is in a
list, tuple or dict of such a name. Never biases, normalisation scales,
PReLU slopes, the gain of weight normalisation, power-iteration vectors, bounds or
state; and no embeddings: for these too, `eqxreg.weights | eqxreg.embeddings`.

A subclass of one of Equinox's layers is what that layer is, whatever its name."""

biases = _with_roles("biases", "bias", "shift")
"""Biases of all layers, of normalisation layers too, and in modules of your own arrays
named `bias`, `bias_*` or `*_bias`, or the plural of these."""

norm_parameters = _with_roles("norm_parameters", "scale", "shift")
"""The scales and shifts of normalisation layers: Equinox's, and modules of your own
whose class's name ends in `Norm`, as in `LayerNorm2d`. Not those whose name holds a
norm of weights (`MaxNorm`, `UnitNorm`, `WeightNorm`, `SpectralNorm`) or a layer
(`Conv`, `Linear`, `Dense`, `Embed`, `Attention`), nor subclasses of Equinox's other
layers."""

embeddings = _with_roles("embeddings", "embedding")
"""The tables of `eqx.nn.Embedding` and, in modules of your own, arrays named
`embedding` or `*_embedding`, or the plural of these."""

trainable = Selector(_is_trainable, "eqxreg.trainable")
"""Every floating or complex array, in any tree, except state and the bounds of maps."""

everything = Selector(_is_any, "eqxreg.everything")
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
    under: str | Sequence[str] | None = None,
    where: Callable[[str, Any, Array], bool] | None = None,
) -> Selector:
    """Selects the weights of layers of some types.

    **Arguments:**

    - `*layer_types`: types of layers; a layer counts if it, or a module that it is part
        of, is an instance of one. Defaults to layers of every type.
    - `names`: the names of the arrays, as one string or several; dotted names such as
        `"query_proj.weight"` are relative to the layer. The name of a list, tuple or
        dict of arrays stands for all of them. Defaults to those that are
        weights: matrices, kernels, embeddings and, if you name a type of normalisation
        layer, its scale; never biases. (Keyword only argument.)
    - `under`: a path from the root of the model, such as `"layers[0]"` or
        `"encoder.blocks.3"`, or several: of what is selected otherwise, only what is at
        that path or below it. Wrappers on the way may be left out. Defaults to the
        whole model. (Keyword only argument.)
    - `where`: a function `(path, layer, array) -> bool` that narrows the selection,
        with the path as a key string such as `.layers[0].weight`, and the layer that
        owns the array. (Keyword only argument.)

    **Returns:**

    A [`eqxreg.Selector`][].

    **Raises:**

    - `TypeError`: if a layer type is not a type.
    - `ValueError`: if one of the names or paths is no name.

    !!! example

        ```python
        >>> import equinox as eqx
        >>> import jax
        >>> import eqxreg
        >>> mlp = eqx.nn.MLP(4, 2, 8, depth=2, key=jax.random.key(0))
        >>> first = eqxreg.select(eqx.nn.Linear, under="layers[0]")
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
    selects = _OfLayers(
        layer_types,
        None if names is None else as_strings(names, "names"),
        None if under is None else Under(as_strings(under, "under")),
        where,
    )
    text = [t.__name__ for t in layer_types]
    text += [] if names is None else [f"names={names!r}"]
    text += [] if under is None else [f"under={under!r}"]
    text += [] if where is None else [f"where={getattr(where, '__name__', where)}"]
    return Selector(selects, f"eqxreg.select({', '.join(text)})")


def as_strings(given: Any, argument: str) -> tuple[str, ...]:
    """One or several names or paths, as several; an error if one says nothing."""
    found = given if isinstance(given, list | tuple) else (given,)
    if not found or not all(isinstance(text, str) and parse(text) for text in found):
        raise ValueError(
            f'`{argument}` must be a string such as "weight" or "layers[0].weight", or '
            f"several, got {given!r}."
        )
    return tuple(found)
