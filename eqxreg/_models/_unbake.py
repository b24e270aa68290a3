"""`unbake`, the way back from a plain model to a wrapped one."""

from typing import Any, TypeVar

import equinox as eqx
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import PyTree

from .._linalg import frobenius_norm, tolerance, widen
from .._tree import is_wrapper, key_of, map_children
from .._wrappers import evaluate, needs_foreign_state, written
from ._bake import strip


_Model = TypeVar("_Model")


def unbake(model: _Model, plain: PyTree) -> _Model:
    """The inverse of [`eqxreg.bake`][]: the wrapped model with the weights of a plain
    one, so that baking it gives `plain` back.

    The raw weights are those that the maps send to the given ones, found by each map's
    `bind`, outermost first. It is how a plain checkpoint is loaded into a constrained
    model, and how the weight that a layer is to compute with is set. Frozen arrays are
    set too, and stay frozen.

    **Arguments:**

    - `model`: the wrapped model, which says what wraps what.
    - `plain`: a model as `eqxreg.bake(model)` is, with the weights to take.

    **Returns:**

    The wrapped model. Its `eqx.nn.State`, if it has one, is not changed.

    **Raises:**

    - `ValueError`: if `plain` has other arrays than the baked model, or some that no
        raw weight is sent to, for they are outside of the set. It names them. For
        traced weights, at run time, by `eqx.error_if`.

    !!! example

        ```python
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> linear = eqx.nn.Linear(2, 1, use_bias=False, key=jax.random.key(0))
        >>> linear = eqx.tree_at(lambda l: l.weight, linear, jnp.array([[1.0, 2.0]]))
        >>> layer = eqxreg.Constraint(linear, "weight", eqxreg.Positive())
        >>> plain = eqxreg.bake(layer)
        >>> plain = eqx.tree_at(lambda l: l.weight, plain, jnp.array([[0.5, 3.0]]))
        >>> with jnp.printoptions(precision=3):
        ...     print(eqxreg.bake(eqxreg.unbake(layer, plain)).weight)
        [[0.5 3. ]]

        ```
    """
    _check_arrays(strip(model), plain)
    wrong: list[str] = []

    def visit(node: Any, given: Any, entries: tuple) -> Any:
        if is_wrapper(node):
            return _unbaked(node, given, entries, wrong)
        if jtu.all_leaves([node]):
            return given if eqx.is_array(node) else node
        children, _ = jtu.tree_flatten_with_path(
            given, is_leaf=lambda x: x is not given
        )
        found = dict(children)
        return map_children(
            lambda inner, at: visit(inner, found.get(at), entries + at), node, ()
        )

    result = visit(model, plain, ())
    if wrong:
        raise ValueError(
            "`plain` has weights that no raw weight of the model is sent to:\n"
            + "\n".join(wrong)
            + "\nBring them into their sets first, for one by "
            "`eqxreg.project_params(plain, projection, where)`."
        )
    return result


def _unbaked(node: Any, given: Any, entries: tuple, wrong: list[str]) -> Any:
    """A wrapper with the arrays of the plain layer `given`. What is outside of a set is
    added to `wrong`."""
    leaves, _ = jtu.tree_flatten_with_path(given)
    arrays = [(at, leaf) for at, leaf in leaves if eqx.is_array(leaf)]
    for at, array in arrays:
        try:
            node = written(node, tuple(map(key_of, at)), array)
        except (TypeError, ValueError) as error:
            wrong.append(f"- `{jtu.keystr(entries + at)}`: {error}")
            return node
    if needs_foreign_state(node):
        # What it makes of a weight depends on a state that is not here.
        return node
    back = dict(jtu.tree_flatten_with_path(evaluate(node, None, True)[0])[0])
    for at, array in arrays:
        if not eqx.is_inexact_array(array):
            continue
        path = jtu.keystr(entries + at)
        off = frobenius_norm(widen(back[at]) - widen(array))
        is_back = off <= 4 * tolerance(array.dtype) * frobenius_norm(array)
        if isinstance(is_back, Tracer):
            message = f"`plain` has at `{path}` a weight outside of the set of its map."
            node = eqx.error_if(node, ~is_back, message)
        elif not is_back:
            wrong.append(
                f"- `{path}`: it would become one at a distance of {float(off):.3g}."
            )
    return node


def _check_arrays(expected: PyTree, plain: PyTree) -> None:
    """Raises unless `plain` has the arrays that the baked model has."""
    wanted, given = _kinds(expected), _kinds(plain)
    for path in [*wanted, *given]:
        if wanted.get(path) != given.get(path):
            raise ValueError(
                "`plain` must have the arrays of `eqxreg.bake(model)`, and at "
                f"`{path}` it has {given.get(path, 'none')} in the place of "
                f"{wanted.get(path, 'none')}."
            )


def _kinds(tree: PyTree) -> dict[str, str]:
    leaves, _ = jtu.tree_flatten_with_path(tree)
    return {
        jtu.keystr(path): f"{leaf.dtype.name}{list(leaf.shape)}"
        for path, leaf in leaves
        if eqx.is_array(leaf)
    }
