"""Maps that go by a mask: entries that are zero, and entries that are held."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact

from .._linalg import widen
from .._values import (
    Bound,
    Constant,
    Number,
    Schedule,
    Shaped,
    StoredBound,
    bound_shape,
    check_bound,
    check_broadcasts,
    is_constant,
    stretched,
    value_of,
)
from ._base import Projection, share
from ._checks import check_dtype


class Masked(Projection):
    r"""The weights that are zero outside a mask: $w_i \mapsto m_i w_i$.

    For connections that are not there: pruned, autoregressive, or of your own design.
    The gradient is masked too. The mask is a leaf of the tree, but not a floating one:
    nothing trains it.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> lower_triangle = jnp.tri(2, dtype=bool)
        >>> print(eqxreg.Masked(lower_triangle)(jnp.array([[1.0, 2.0], [3.0, 4.0]])))
        [[1. 0.]
         [3. 4.]]

        ```
    """

    mask: Bool[Array, "..."]
    _degree: ClassVar[int | None] = 1

    def __init__(self, mask: Any):
        """**Arguments:**

        - `mask`: which entries may be other than zero: a boolean array, of JAX or
            numpy, of the shape of the weight or of one that broadcasts to it.

        **Raises:**

        - `TypeError`: if `mask` is not a boolean array.
        """
        self.mask = check_mask(mask)

    def check(self, weight: Shaped) -> None:
        check_dtype(weight)
        check_broadcasts("mask", self.mask.shape, weight)

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        self.check(raw)
        mask = stretched(self.mask, raw)
        return jnp.where(mask | ~jnp.isfinite(raw), raw, 0)


class Pinned(Projection):
    r"""The weights whose entries in a mask have given values:
    $w_i \mapsto c_i$ where $m_i$, and $w_i \mapsto w_i$ elsewhere.

    It freezes part of an array, such as the rows of an embedding that were trained
    before. Entries that are free keep their bits, and their gradient is that of the
    identity; those that are held have none. What they are held at is a constant, which
    no optimiser and no decay moves. A NaN or an infinity in the weight stays visible,
    in a held entry too.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> first_row = jnp.array([[True], [False]])
        >>> p = eqxreg.Pinned(first_row, 0.5)
        >>> print(p(jnp.array([[1.0, 2.0], [3.0, 4.0]])))
        [[0.5 0.5]
         [3.  4. ]]

        ```
    """

    mask: Bool[Array, "..."]
    value: StoredBound

    def __init__(self, mask: Any, value: Bound | complex):
        """**Arguments:**

        - `mask`: which entries are held: a boolean array, of JAX or numpy, of the shape
            of the weight or of one that broadcasts to it.
        - `value`: what they are held at, finite: a number, a schedule, or an array of
            the shape of the weight or of one that broadcasts to it, such as the weight
            itself. It may be complex if the weight is. In half precision it is rounded
            to the nearest number.

        **Raises:**

        - `TypeError`: if `mask` is not a boolean array or `value` is no number or
            array, or, when called, if `value` is complex and the weight is not.
        - `ValueError`: if `value` is not finite, or, when called, if the shape of
            `mask` or `value` does not broadcast to that of the weight.
        """
        self.mask = check_mask(mask)
        self.value = _check_value(value)

    @property
    def _degree(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        is_zero = isinstance(self.value, Number) and self.value == 0
        return 1 if is_zero else None

    def check(self, weight: Shaped) -> None:
        check_dtype(weight)
        check_broadcasts("mask", self.mask.shape, weight)
        check_broadcasts("value", bound_shape(self.value), weight)
        dtype = getattr(self.value, "dtype", jnp.float32)
        if _is_complex(dtype) and not _is_complex(weight.dtype):
            raise TypeError(
                f"`value` is complex, and the weight is an array of {weight.dtype}. "
                "Give its real part."
            )

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        self.check(raw)
        # The gradient of what is held is that of a constant, whatever is there.
        held = stretched(self.mask, raw) & jnp.isfinite(raw)
        return jnp.where(held, self._value_like(raw), raw)

    def _value_like(self, weight: Array) -> Array:
        if isinstance(self.value, Schedule):
            raise ValueError(
                "A value that is a schedule needs a step. Use it in `eqxreg.project`, "
                "which counts steps, or give a number or an array."
            )
        known = value_of(self.value)
        if isinstance(known, Number):
            known = np.float64(known)
        else:
            known = jax.lax.stop_gradient(known)
        largest = float(jnp.finfo(weight.dtype).max)
        if not jnp.iscomplexobj(known) and _largest(known.dtype) > largest:
            # What the dtype cannot hold is its largest number.
            known = known.clip(-largest, largest)
        return stretched(jnp.asarray(known, weight.dtype), weight)

    def _active(self, weight: Inexact[Array, "..."]) -> Float[Array, ""]:
        return share(stretched(self.mask, weight), widen(weight))


def _largest(dtype: Any) -> float:
    info = jnp.finfo if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo
    return float(info(dtype).max)


def check_mask(mask: Any) -> Bool[Array, "..."]:
    """`mask` as an array of JAX, or an error."""
    if not isinstance(mask, (jax.Array, np.ndarray)):
        raise TypeError(f"`mask` must be a boolean array, got {mask!r}.")
    if mask.dtype != bool:
        raise TypeError(
            f"`mask` must be a boolean array, got one of {mask.dtype}: perhaps "
            "`mask != 0`?"
        )
    return jnp.asarray(mask)


def _check_value(value: Any) -> StoredBound:
    """What entries are held at, in the form in which it is stored."""
    known = value.value if is_constant(value) else value
    is_complex = isinstance(known, (complex, np.ndarray, np.number, jax.Array))
    if not (is_complex and jnp.iscomplexobj(known)):
        return check_bound(value, "value", several=True, finite=True)
    known = jnp.asarray(known)
    # The parts are checked as real values are.
    parts = [
        check_bound(part(known), "value", several=True, finite=True)
        for part in (jnp.real, jnp.imag)
    ]
    return Constant.of(jax.lax.complex(*map(value_of, parts)))


def _is_complex(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)
