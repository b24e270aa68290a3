"""Penalties: scalars to add to a loss.

Each is a sum over the selected weights, in the dtype of the tree, and zero if nothing
is selected. They differ in one function of a weight.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from ._maps import Projection
from ._maps._base import check_projection
from ._model import bake, unwrap_all
from ._norms import per_layer, real_dtype, scaled_norm, squared_magnitude, widen
from ._rates import check_rate
from ._select import chosen_leaves, sites, trainable, weights


def l2_penalty(
    tree: PyTree, rate: Any, where: Any = trainable, *, effective: bool = False
) -> Float[Array, ""]:
    r"""$\frac{\lambda}{2} \sum |w|^2$, whose gradient is $\lambda w$.

    The gradient is exactly what [`eqxreg.weight_decay`][] adds.

    !!! warning

        As in Flux there is a factor ½, which Keras's `L2` does not have:
        `keras.regularizers.L2(a)` is `l2_penalty(model, 2 * a)`.

    **Arguments:**

    - `tree`: any PyTree, such as a model.
    - `rate`: the factor $\lambda$: a non-negative number or a scalar array.
    - `where`: which weights: a selector, or a tree of booleans. Defaults to
        [`eqxreg.trainable`][]: all of them, biases too.
    - `effective`: whether to evaluate wrappers first, so that constrained weights
        are penalised instead of raw ones. Defaults to `False`. (Keyword only
        argument.)

    **Returns:**

    A real scalar of the dtype of the tree; zero if nothing is selected.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> print(eqxreg.l2_penalty({"weight": jnp.array([3.0, 4.0])}, 0.5))
        6.25

        ```
    """
    return _penalty(_half_squares, tree, rate, where, effective)


def l1_penalty(
    tree: PyTree, rate: Any, where: Any = trainable, *, effective: bool = False
) -> Float[Array, ""]:
    r"""$\lambda \sum |w|$, whose gradient is $\lambda\, \mathrm{sign}(w)$, and zero at
    zero.

    The gradient is what [`eqxreg.sign_decay`][] adds. Neither reaches exact zeros.

    **Arguments:**

    - `tree`, `rate`, `where`, `effective`: as in [`eqxreg.l2_penalty`][].

    **Returns:**

    A real scalar of the dtype of the tree; zero if nothing is selected.
    """
    return _penalty(_magnitudes, tree, rate, where, effective)


def elastic_net_penalty(
    tree: PyTree, l1: Any, l2: Any, where: Any = trainable, *, effective: bool = False
) -> Float[Array, ""]:
    r"""$\lambda_1 \sum |w| + \frac{\lambda_2}{2} \sum |w|^2$: the sum of
    [`eqxreg.l1_penalty`][] and [`eqxreg.l2_penalty`][].

    **Arguments:**

    - `l1`, `l2`: the factors $\lambda_1$ and $\lambda_2$.
    - `tree`, `where`, `effective`: as in [`eqxreg.l2_penalty`][].

    **Returns:**

    A real scalar of the dtype of the tree; zero if nothing is selected.
    """
    absolute = l1_penalty(tree, l1, where, effective=effective)
    return absolute + l2_penalty(tree, l2, where, effective=effective)


def distance_penalty(
    tree: PyTree,
    projection: Projection,
    rate: Any,
    where: Any = weights,
    *,
    effective: bool = False,
) -> Float[Array, ""]:
    r"""$\lambda \sum \lVert W - p(W) \rVert$: how far the weights are from a set.

    Zero, with a zero gradient, on the set. Outside, the gradient has the same size
    however near the set is, so that a large enough rate keeps weights in it.

    **Arguments:**

    - `projection`: the map onto the set, such as [`eqxreg.MaxNorm`][].
    - `rate`: the factor $\lambda$: a non-negative number or a scalar array.
    - `where`: which weights: a selector, or a tree of booleans. Defaults to
        [`eqxreg.weights`][].
    - `tree`, `effective`: as in [`eqxreg.l2_penalty`][].

    **Returns:**

    A real scalar of the dtype of the tree; zero if nothing is selected.

    **Raises:**

    - `TypeError`: if `projection` is not an [`eqxreg.Projection`][].

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> tree = {"weight": jnp.array([3.0, 4.0])}
        >>> penalty = eqxreg.distance_penalty(tree, eqxreg.MaxNorm(2.0), rate=1.0)
        >>> print(f"{penalty:.3f}")
        3.000

        ```
    """
    check_projection(projection)
    return _penalty(projection._wide_distance, tree, rate, where, effective)


def _half_squares(weight: Array) -> Array:
    return jnp.sum(squared_magnitude(widen(weight))) / 2


def _magnitudes(weight: Array) -> Array:
    # At zero the derivative of `abs` is one or, for complex weights, NaN. Both of
    # these have zero.
    if not jnp.iscomplexobj(weight):
        wide = widen(weight)
        return jnp.sum(wide * lax.stop_gradient(jnp.sign(wide)))
    norm, scale = scaled_norm(weight, ())
    return jnp.sum(norm / scale)


def _penalty(
    fn: Callable[[Array], Array], tree: PyTree, rate: Any, where: Any, effective: bool
) -> Float[Array, ""]:
    rate = check_rate(rate, "rate", schedules=False)
    chosen = chosen_leaves(where, tree)
    if effective:
        # The choice is made on the tree that was given, wrappers and all.
        mask = unwrap_all(jax.tree.unflatten(jax.tree.structure(tree), chosen))
        tree, chosen = bake(tree), jax.tree.leaves(mask)
    found = sites(tree)
    arrays = [site for site in found if site.is_floating]
    selected = [site for site, c in zip(found, chosen, strict=True) if c]
    # A tree may mix precisions on purpose, even if promotion is otherwise forbidden.
    dtypes = [real_dtype(site.leaf.dtype) for site in selected or arrays]
    terms = [jnp.sum(per_layer(fn, site.leaf, site.rank)) for site in selected]
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*dtypes) if dtypes else jnp.result_type(float)
        wide = jnp.result_type(dtype, *terms)
    total = sum((term.astype(wide) for term in terms), start=jnp.zeros((), wide))
    return (jnp.asarray(rate, wide) * total).astype(dtype)
