r"""Weights that are another one with its rows multiplied, and are never written down.

A layer that does nothing with its weight but multiply a vector with it need not see it:
$(f \odot W)\, x = f \odot (W x)$, and it is cheaper to apply a number for each row to a
product than to a matrix. A map whose image is of this form says so by
`Parametrization._factored`.

In half precision no weight is rounded, but products are: after the sum, and after they
are scaled, in single precision. The matrix $f \odot W$ that they are products with is
within its bounds to single precision.
"""

from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Inexact

from .._linalg import holds_range, is_half, wide_dtype, widen, with_derivative_of


class OnlyMultiplied(eqx.Module):
    """The matrix `factor * matrix`, or its transpose, as something to multiply with.
    Functions of JAX name this class when they refuse it."""

    matrix: Inexact[Array, "rows columns"]
    factor: Float[Array, "#rows 1"]
    is_transposed: bool = eqx.field(static=True, default=False)

    # For NumPy's arrays, which would take this for one of their entries.
    __array_ufunc__ = None

    @property
    def T(self) -> "OnlyMultiplied":
        return OnlyMultiplied(self.matrix, self.factor, not self.is_transposed)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.matrix.shape
        return shape[::-1] if self.is_transposed else shape

    @property
    def ndim(self) -> int:
        return self.matrix.ndim

    @property
    def dtype(self) -> jnp.dtype:
        return self.matrix.dtype

    def __matmul__(self, x: ArrayLike) -> Inexact[Array, "..."]:
        # The axis of `x` that is summed over is its last but one, if it has two.
        factor = self.factor[:, 0] if jnp.ndim(x) == 1 else self.factor
        if self.is_transposed:
            return jnp.matmul(self.matrix.T, self._scaled(factor, x))
        return _scaled_product(factor, self.matrix, x)

    def __rmatmul__(self, x: ArrayLike) -> Inexact[Array, "..."]:
        factor = self.factor[:, 0]
        if self.is_transposed:
            return _scaled_product(factor, x, self.matrix.T)
        return jnp.matmul(self._scaled(factor, x), self.matrix)

    def _scaled(self, factor: Array, x: ArrayLike) -> Array:
        """What is multiplied with the matrix, times the factors."""
        dtype = jnp.result_type(x, self.matrix)
        return _scaled_to(dtype, factor, jnp.asarray(x, dtype))

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(_needs_array(f".{name}"))

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError(_needs_array("an array"))

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __neg__ = __abs__ = _refuse
    __getitem__ = __iter__ = __len__ = __float__ = __array__ = _refuse


def _needs_array(what: str) -> str:
    return (
        f"A weight was used as {what} by a layer of which `only_multiplies` says that "
        "it only multiplies with it, as `weight @ x` or `x @ weight.T`. Take the name "
        "of the weight out of `only_multiplies`, and the layer gets an array."
    )


def _scaled_product(factor: Array, a: ArrayLike, b: ArrayLike) -> Array:
    """`factor * (a @ b)`."""
    product = jnp.matmul(a, b)
    dtype = product.dtype
    if is_half(dtype) and not holds_range(dtype, wide_dtype(dtype)):
        # Before it is scaled, it may be out of range. The products of its derivative
        # are of arrays in half precision all the same.
        wide = jnp.matmul(a, b, preferred_element_type=wide_dtype(dtype))
        product = with_derivative_of(wide, widen(product))
    return _scaled_to(dtype, factor, product)


def _scaled_to(dtype: jnp.dtype, factor: Array, x: Array) -> Array:
    wide = widen(x)
    factor = jnp.expand_dims(factor, range(x.ndim - factor.ndim))
    return _scaled(factor.astype(wide.dtype), wide).astype(dtype)


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
    """Whether products with `raw` are to be scaled in its place."""
    return raw.ndim == 2 and raw.shape[1] >= MANY_COLUMNS
