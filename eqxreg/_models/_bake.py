"""Models without their wrappers: `bake` evaluates these, `strip` takes them off."""

from collections.abc import Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._tree import is_wrapper, map_children, unwrapped
from .._values import thawed
from .._wrappers import evaluate, needs_state


_Model = TypeVar("_Model")
_Value = TypeVar("_Value")


def bake(model: _Model, state: eqx.nn.State | None = None) -> _Model:
    """Evaluates every wrapper, ours and Equinox's, and returns the plain layers.

    Pure, jittable and differentiable. At the top of a loss it evaluates each constraint
    once, where layers called in a loop would evaluate them in every step:

    ```python
    def loss(model, xs):
        model = eqxreg.bake(model)
        ...  # scan over time with plain cells
    ```

    **Arguments:**

    - `model`: any PyTree.
    - `state`: the model's `eqx.nn.State`, if it has stateful wrappers. They are
        evaluated as in inference; the state is not changed. For ours it is where a
        search for singular vectors starts: any state is right, and one of this model
        from a moment ago the cheapest.

    **Returns:**

    The model in its original types, with constrained weights. A model without wrappers
    comes back equal. Its layers are called as plain ones are: without a state, unless
    they had one before they were wrapped.

    **Raises:**

    - `ValueError`: if there is a stateful wrapper and no `state`.
    """

    def visit(node: Any, entries: tuple) -> Any:
        if is_wrapper(node):
            if needs_state(node) and state is None:
                place = f"`{jtu.keystr(entries)}`" if entries else "The model"
                raise ValueError(
                    f"{place} is a stateful {type(node).__name__}, whose weight "
                    "depends on the model's `eqx.nn.State`. Give it, as in "
                    "`bake(model, state)` or `report(model, state=state)`."
                )
            node, _ = evaluate(node, state, True)
        return map_children(visit, node, entries)

    return visit(model, ())


def strip(model: _Model) -> _Model:
    """Takes all wrappers off a model, ours and Equinox's, without evaluating them.

    **Arguments:**

    - `model`: any PyTree.

    **Returns:**

    The model in its original types, with its raw weights; frozen arrays are ordinary
    ones again. [`eqxreg.bake`][] is the way to constrained weights.

    !!! example

        ```python
        >>> import equinox as eqx
        >>> import jax
        >>> import eqxreg
        >>> linear = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> layer = eqxreg.Constraint(linear, "weight", eqxreg.MaxNorm(0.1))
        >>> bool(eqx.tree_equal(eqxreg.strip(layer), linear))
        True

        ```
    """

    def visit(node: Any, entries: tuple) -> Any:
        return map_children(visit, unwrapped(node), entries)

    return visit(thawed(model), ())


def bake_with(
    model: PyTree, values: Sequence[_Value], state: eqx.nn.State | None = None
) -> tuple[PyTree, list[_Value]]:
    """The baked model and, of `values`, one for each leaf of `model`, those of its
    leaves. So a choice is made on the tree that was given, wrappers and all, and read
    on what they make of it."""
    given = jax.tree.unflatten(jax.tree.structure(model), values)
    return bake(model, state), jax.tree.leaves(strip(given))
