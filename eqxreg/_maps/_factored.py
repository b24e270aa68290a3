r"""Weights that are another one with its rows multiplied, and are never written down.

A layer that does nothing with its weight but multiply a vector with it need not see it:
$(f \odot W)\, x = f \odot (W x)$, and it is cheaper to apply a number for each row to a
product than to a matrix. A map whose image is of this form says so by
`Parametrization._factored`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Inexact

from .._linalg import is_half


class Factored(eqx.Module):
    """The matrix `factor * matrix`, as something to multiply with."""

    matrix: Inexact[Array, "rows columns"]
    factor: Float[Array, "#rows 1"]

    def __matmul__(self, x: ArrayLike) -> Inexact[Array, "..."]:
        product = self.matrix @ x
        factor = self.factor[:, 0] if jnp.ndim(x) == 1 else self.factor
        factor = jnp.expand_dims(factor, range(product.ndim - factor.ndim))
        return _scaled(factor.astype(product.dtype), product)


@jax.custom_jvp
def _scaled(factor: Array, product: Array) -> Array:
    return factor * product


@_scaled.defjvp
def _(primals, tangents):
    (factor, product), (factor_tangent, tangent) = primals, tangents
    # The transpose multiplies its argument with the factor once, and all that follows
    # is of that. It may be zero, as a gain may.
    factor_or_tiny = jnp.where(factor == 0, 2.0**-60, factor)
    relative = factor_tangent / factor_or_tiny
    return factor * product, factor_or_tiny * (tangent + product * relative)


MANY_COLUMNS = 512
"""A matrix with fewer is cheap to write, and may have more vectors to multiply than it
has columns: under `vmap` nobody can see how many there are."""


def is_factorable(raw: Inexact[Array, "..."]) -> bool:
    """Whether products with `raw` are to be scaled in its place. In half precision they
    would be rounded where the weight is to be."""
    is_wide = raw.ndim == 2 and raw.shape[1] >= MANY_COLUMNS
    return is_wide and not is_half(raw.dtype)
