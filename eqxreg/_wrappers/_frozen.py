"""`Frozen`, the wrapper around layers some of whose arrays are not trained."""

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import equinox as eqx
import jax
from jaxtyping import PyTree

from .._linalg import real_dtype
from .._tree import (
    Site,
    chosen_leaves,
    part,
    require_selection,
    sites,
    trainable,
    unwrapped,
)
from .._values import FrozenArray, has_frozen, is_frozen, thawed
from ._wrapper import Wrapper, evaluate


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
