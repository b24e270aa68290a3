"""Penalties: scalars to add to a loss.

Each is a sum over the selected weights, in the dtype of the tree, and zero if nothing
is selected. They differ in one function of a weight.
"""

import functools as ft
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact, PyTree

from .._linalg import (
    AxisLike,
    adjoint,
    check_axis,
    matmul,
    per_layer,
    real_dtype,
    resolve_axes,
    scaled_norm,
    squared_magnitude,
    widen,
)
from .._maps import (
    Projection,
    RowAxes,
    SpectralNorm,
    automatically_measured,
    check_blocks,
    check_matrix,
    check_projection,
    to_matrices,
)
from .._models import bake_with
from .._tree import chosen_leaves, sites, trainable, weights
from .._values import check_rate


Orthogonality = Literal["soft", "keras"]
"""How far from orthogonal a weight is."""


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
    absolute = _penalty(_magnitudes, tree, l1, where, effective, "l1")
    return absolute + _penalty(_half_squares, tree, l2, where, effective, "l2")


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


def group_lasso_penalty(
    tree: PyTree,
    rate: Any,
    where: Any = weights,
    *,
    axis: AxisLike = "unit",
    effective: bool = False,
) -> Float[Array, ""]:
    r"""$\lambda \sum_g \lVert w_g \rVert$ over groups of weights, which with
    `axis="unit"` are units, filters or tokens.

    The gradient of a group is $\lambda w_g / \lVert w_g \rVert$, and zero at zero. It
    brings groups near zero; [`eqxreg.group_soft_threshold`][] brings them there.

    **Arguments:**

    - `axis`: the axes that a group extends over, as in [`eqxreg.MaxNorm`][]. Defaults
        to `"unit"`, every axis but the first. (Keyword only argument.)
    - `tree`, `rate`, `where`, `effective`: as in [`eqxreg.distance_penalty`][].

    **Returns:**

    A real scalar of the dtype of the tree; zero if nothing is selected.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> tree = {"weight": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
        >>> print(eqxreg.group_lasso_penalty(tree, 0.5))
        3.0

        ```
    """
    norms = ft.partial(_sum_of_norms, check_axis(axis))
    return _penalty(norms, tree, rate, where, effective)


def orthogonality_penalty(
    tree: PyTree,
    rate: Any,
    where: Any = weights,
    *,
    mode: Orthogonality = "soft",
    matrix: RowAxes = "unit",
    blocks: int = 1,
    effective: bool = False,
) -> Float[Array, ""]:
    r"""How far weights are from having orthonormal columns or, if they are wide, rows.

    - `mode="soft"`: $\lambda \sum \lVert W^H W - I \rVert_F^2$ for a tall matrix,
        $\lambda \sum \lVert W W^H - I \rVert_F^2$ for a wide one. Zero where all
        singular values are one.
    - `mode="keras"`: $\lambda$ times the mean of $|\cos|$ over the angles between
        pairs of units, as Keras's `OrthogonalRegularizer(mode="columns")` has it for
        its kernels, whose columns are units. Norms do not matter, and more units than
        inputs cannot be orthogonal. Keras's default is `"rows"`, between inputs, which
        is `matrix=1` here.

    **Arguments:**

    - `mode`: `"soft"` or `"keras"`. Defaults to `"soft"`. (Keyword only argument.)
    - `matrix`, `blocks`: as in [`eqxreg.SpectralNorm`][]. (Keyword only arguments.)
    - `tree`, `rate`, `where`, `effective`: as in [`eqxreg.distance_penalty`][].

    **Returns:**

    A real scalar of the dtype of the tree; zero if nothing is selected.

    **Raises:**

    - `ValueError`: if `mode`, `matrix` or `blocks` is none of the above, or a selected
        weight's rank is below 2.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> tree = {"weight": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
        >>> print(f"{eqxreg.orthogonality_penalty(tree, 0.1):.2f}")
        0.90
        >>> print(f"{eqxreg.orthogonality_penalty(tree, 0.1, mode='keras'):.2f}")
        0.00

        ```

    ??? cite

        Soft orthogonality: [Can We Gain More from Orthogonality Regularizations in
        Training Deep CNNs?](https://arxiv.org/abs/1810.09102), Bansal, Chen and Wang.
    """
    if mode not in get_args(Orthogonality):
        raise ValueError(f'`mode` must be "soft" or "keras", got {mode!r}.')
    rows, blocks = check_matrix(matrix), check_blocks(blocks)
    measure = _off_orthonormal if mode == "soft" else _mean_cosine

    def of_matrices(weight: Array) -> Array:
        return measure(to_matrices(widen(weight), rows, blocks))

    measured = ft.partial(automatically_measured, of_matrices)
    return _penalty(measured, tree, rate, where, effective)


def spectral_norm_penalty(
    tree: PyTree,
    rate: Any,
    where: Any = weights,
    *,
    matrix: RowAxes = "unit",
    blocks: int = 1,
    effective: bool = False,
) -> Float[Array, ""]:
    r"""$\frac{\lambda}{2} \sum \sigma_1(W)^2$, whose gradient is $\lambda \sigma_1 u_1
    v_1^H$.

    **Arguments:**

    - `matrix`, `blocks`: as in [`eqxreg.SpectralNorm`][]; the sum is over blocks too.
        (Keyword only arguments.)
    - `tree`, `rate`, `where`, `effective`: as in [`eqxreg.distance_penalty`][].

    **Returns:**

    A real scalar of the dtype of the tree; zero if nothing is selected.

    **Raises:**

    - `ValueError`: if `matrix` or `blocks` is not valid, or a selected weight's rank is
        below 2.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> tree = {"weight": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
        >>> print(f"{eqxreg.spectral_norm_penalty(tree, 0.1):.2f}")
        0.45

        ```

    ??? cite

        [Spectral Norm Regularization for Improving the Generalizability of Deep
        Learning](https://arxiv.org/abs/1705.10941), Yoshida and Miyato.
    """
    values = SpectralNorm(matrix=matrix, blocks=blocks).singular_values

    def half_squares(weight: Array) -> Array:
        return _half_squares(values(widen(weight)))

    return _penalty(half_squares, tree, rate, where, effective)


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


def _sum_of_norms(axis: Any, weight: Array) -> Array:
    wide = widen(weight)
    norm, scale = scaled_norm(wide, resolve_axes(axis, wide.ndim))
    return jnp.sum(norm / scale)


def _off_orthonormal(matrices: Inexact[Array, "blocks m n"]) -> Array:
    rows, columns = matrices.shape[1:]
    tall = matrices if rows >= columns else adjoint(matrices)
    products = matmul(adjoint(tall), tall)
    identity = jnp.eye(min(rows, columns), dtype=products.dtype)
    return jnp.sum(squared_magnitude(products - identity[None]))


def _mean_cosine(matrices: Inexact[Array, "blocks m n"]) -> Array:
    count = matrices.shape[1]
    norm, scale = scaled_norm(matrices, (2,))
    factor = jnp.where(norm > 0, scale / jnp.where(norm > 0, norm, 1), 1)
    units = matrices * factor.astype(matrices.dtype)
    above = jnp.triu(jnp.ones((count, count), bool), 1)
    cosines = jnp.where(above, matmul(units, adjoint(units)), 0)
    return _magnitudes(cosines) / max(math.comb(count, 2), 1)


def _penalty(
    fn: Callable[[Array], Array],
    tree: PyTree,
    rate: Any,
    where: Any,
    effective: bool,
    name: str = "rate",
) -> Float[Array, ""]:
    rate = check_rate(rate, name, schedules=False)
    chosen = chosen_leaves(where, tree)
    if effective:
        tree, chosen = bake_with(tree, chosen)
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
