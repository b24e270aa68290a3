r"""Weights that are another one with its rows multiplied, and are never written down.

A layer that does nothing with its weight but multiply a vector with it need not see it:
$(f \odot W)\, x = f \odot (W x)$, and it is cheaper to apply a number for each row to a
product than to a matrix. A map whose image is of this form says so by
`Parametrization._factored`.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Inexact

from .._norms import is_half


class Factored(eqx.Module):
    """The matrix `factor * matrix`, as something to multiply with."""

    matrix: Inexact[Array, "rows columns"]
    factor: Float[Array, "#rows 1"]

    def __matmul__(self, x: ArrayLike) -> Inexact[Array, "..."]:
        product = self.matrix @ x
        factor = self.factor[:, 0] if jnp.ndim(x) == 1 else self.factor
        factor = jnp.expand_dims(factor, range(product.ndim - factor.ndim))
        return product * factor.astype(product.dtype)


def is_factorable(raw: Inexact[Array, "..."]) -> bool:
    """Whether products with `raw` may be scaled in its place. In half precision they
    would be rounded where the weight is to be."""
    return raw.ndim == 2 and not is_half(raw.dtype)
