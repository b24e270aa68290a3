"""`Frozen`, the wrapper around layers some of whose arrays are not trained; `freeze`
and `thaw`, which put it around the layers of a model and take it off again."""

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._bits import FrozenArray, has_frozen, is_constant, is_frozen, thawed
from ._model import map_children, wrapping_depth
from ._norms import real_dtype
from ._paths import unwrapped
from ._select import chosen_leaves, part, require_selection, trainable
from ._sites import Site, sites
from ._wrapper import Wrapper, evaluate


_Model = TypeVar("_Model")


class Frozen(Wrapper):
    """Wraps a layer, so that some of its arrays are not trained.

    The layer computes what it did. Its frozen arrays are stored as integers of the same
    bits, so that whatever goes by floating arrays leaves them alone: gradients, the
    moments of optimisers, decay, penalties, proximal steps, projections and
    [`eqxreg.trainables`][], and those of other libraries too. They are no constants of
    compiled programs, and are sharded, stacked and saved as other arrays are.

    Attributes are read from the layer within: `frozen.weight` is computed with as the
    array that it is. A wrapper around a frozen layer, of this library or of Equinox,
    constrains the frozen weight in the forward pass. An array that `eqx.tree_at` puts
    in the place of a frozen one is an ordinary one, and is trained: freeze it again.

    Code that goes by `eqx.is_array`, as averages and optimisers sometimes do, sees
    integers. Put into one vector with floats and taken out of it they are what they
    were; averaged or cast they are an error. [`eqxreg.cast`][] casts a model with
    frozen parts. Checkpoints are best saved of `eqxreg.thaw(model)`, and load into
    models that are frozen otherwise or not at all.

    [`eqxreg.freeze`][] wraps the layers of a model; [`eqxreg.thaw`][] is the way back.

    !!! example

        ```python
        >>> import equinox as eqx
        >>> import jax
        >>> import eqxreg
        >>> layer = eqxreg.Frozen(eqx.nn.Linear(2, 3, key=jax.random.key(0)))
        >>> eqxreg.trainables(layer)
        []
        >>> layer.weight.dtype
        dtype('float32')

        ```
    """

    layer: Any
    weight_name: str | tuple[str, ...] = eqx.field(static=True)
    # Its call only looks at what it is given.
    rewrites_weight: ClassVar[bool] = True

    def __init__(self, layer: Any, where: Any = trainable):
        """**Arguments:**

        - `layer`: the layer to wrap: an Equinox layer, a module of your own, or another
            wrapper.
        - `where`: which of its arrays, as in [`eqxreg.freeze`][]. Defaults to
            [`eqxreg.trainable`][]: all of them.

        **Raises:**

        - `ValueError`: if nothing is selected.
        """
        where = part(where, layer)
        if has_frozen(layer):
            chosen = chosen_leaves(where, layer)
        else:
            chosen = require_selection(where, layer, "where")
        layer = with_frozen(layer, trainable_ones(chosen, layer))
        self.layer = layer
        names = [
            dataclasses.replace(site, entries=site.entries[:-1]).dotted(0)
            for site in outside_frozen(sites(layer))
            if is_frozen(site.owner)
        ]
        # Each array has several parts.
        self.weight_name = tuple(dict.fromkeys(names))

    def _evaluated(
        self, state: Any, inference: bool | None, to_call: bool
    ) -> tuple[Any, Any]:
        layer = thawed(self.layer)
        self._frozen_dtypes()
        return evaluate(layer, state, inference, to_call)

    def _frozen_dtypes(self) -> list[Any]:
        """The dtypes of the frozen arrays. Raises if the others were cast alone."""
        nodes = jax.tree.leaves(self.layer, is_leaf=is_frozen)
        frozen = [node.dtype for node in nodes if is_frozen(node)]
        free = [node.dtype for node in nodes if eqx.is_inexact_array(node)]
        if _narrower(free, frozen):
            raise ValueError(
                f"The frozen arrays of this {type(unwrapped(self)).__name__} are of "
                f"{frozen[0].name}, and all others of {free[0].name}: a cast over "
                "`eqx.is_inexact_array` does not see frozen arrays. Use "
                "`eqxreg.cast(model, dtype)`, which does."
            )
        return frozen

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frozen = self._frozen_dtypes()
        inputs = jax.tree.leaves((args, kwargs))
        given = [x.dtype for x in inputs if eqx.is_inexact_array(x)]
        if _narrower(given, frozen):
            warnings.warn(
                f"A frozen {type(unwrapped(self)).__name__} of {frozen[0].name} is "
                f"given {given[0].name}. If its model was cast over "
                "`eqx.is_inexact_array`, its frozen arrays were not: use "
                "`eqxreg.cast(model, dtype)`. If that is meant, cast the input.",
                stacklevel=2,
            )
        return super().__call__(*args, **kwargs)

    def _within(self) -> Iterator[Any]:
        yield self.layer


def _narrower(some: list[Any], others: list[Any]) -> bool:
    """Whether there are dtypes of both, and all of the one are narrower than all of the
    other."""
    both = some and others
    sizes = lambda dtypes: [real_dtype(dtype).itemsize for dtype in dtypes]
    return bool(both) and max(sizes(some)) < min(sizes(others))


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


def trainable_ones(chosen: list[bool], tree: PyTree) -> list[bool]:
    both = zip(chosen, chosen_leaves(trainable, tree), strict=True)
    return [is_chosen and possible for is_chosen, possible in both]


def with_frozen(tree: PyTree, chosen: list[bool]) -> PyTree:
    leaves, structure = jax.tree.flatten(tree)
    pairs = zip(leaves, chosen, strict=True)
    return structure.unflatten([FrozenArray.of(x) if c else x for x, c in pairs])


def outside_frozen(found: list[Site]) -> list[Site]:
    """The sites that are in no frozen layer."""
    return [
        site
        for site in found
        if not any(isinstance(node, Frozen) for _, node in site.ancestors)
    ]
