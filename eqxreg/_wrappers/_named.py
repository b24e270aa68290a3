"""The wrappers that are named after their map. They only build it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Inexact

from .._linalg import AxisLike, Way
from .._maps import (
    Box,
    MaxNorm,
    MinMaxNorm,
    NonNegative,
    Orthogonal,
    RowAxes,
    SpectralCap,
    UnitNorm,
    WeightNorm,
)
from .._values import Bound, is_constant
from ._constraint import Constraint


class MaxNormConstraint(Constraint):
    """Bounds the norm of a layer's weight: [`eqxreg.Constraint`][] with
    [`eqxreg.MaxNorm`][].

    !!! example

        ```python
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> linear = eqx.nn.Linear(10, 20, key=jax.random.key(0))
        >>> layer = eqxreg.MaxNormConstraint(linear, "weight", 1.0)
        >>> layer(jnp.arange(10)).shape
        (20,)

        ```
    """

    def __init__(
        self,
        layer: Any,
        weight_name: str | Sequence[str],
        max_norm: Bound,
        axis: AxisLike = None,
        ord: int | float = 2,
    ):
        """**Arguments:**

        - `layer`, `weight_name`: as in [`eqxreg.Constraint`][].
        - `max_norm`, `axis`, `ord`: as in [`eqxreg.MaxNorm`][]. By default the norm is
            that of the whole weight; `axis="unit"`, the norm of each unit's incoming
            weights, is what is recommended.
        """
        super().__init__(layer, weight_name, MaxNorm(max_norm, axis, ord))

    @property
    def max_norm(self) -> Any:
        """The bound: a float or, if it is traced, what can be computed with as the JAX
        array that it is. It is never trained."""
        bound = self.parametrizations[0].max_norm  # pyright: ignore
        return bound.in_tree if is_constant(bound) else bound


class MinMaxNormConstraint(Constraint):
    """Bounds the norm of a layer's weight from both sides: [`eqxreg.Constraint`][] with
    [`eqxreg.MinMaxNorm`][]."""

    def __init__(
        self,
        layer: Any,
        weight_name: str | Sequence[str],
        min_norm: Bound,
        max_norm: Bound,
        rate: float | int | np.number = 1.0,
        axis: AxisLike = None,
    ):
        """**Arguments:**

        - `layer`, `weight_name`: as in [`eqxreg.Constraint`][].
        - `min_norm`, `max_norm`, `rate`, `axis`: as in [`eqxreg.MinMaxNorm`][].
        """
        p = MinMaxNorm(min_norm, max_norm, rate, axis)
        super().__init__(layer, weight_name, p)


class UnitNormConstraint(Constraint):
    """Fixes the norm of a layer's weight: [`eqxreg.Constraint`][] with
    [`eqxreg.UnitNorm`][]."""

    def __init__(
        self,
        layer: Any,
        weight_name: str | Sequence[str],
        norm: Bound = 1.0,
        axis: AxisLike = None,
    ):
        """**Arguments:**

        - `layer`, `weight_name`: as in [`eqxreg.Constraint`][].
        - `norm`, `axis`: as in [`eqxreg.UnitNorm`][].
        """
        super().__init__(layer, weight_name, UnitNorm(norm, axis))


class NonNegativeConstraint(Constraint):
    """Keeps a layer's weight non-negative: [`eqxreg.Constraint`][] with
    [`eqxreg.NonNegative`][]."""

    def __init__(self, layer: Any, weight_name: str | Sequence[str]):
        """**Arguments:**

        - `layer`, `weight_name`: as in [`eqxreg.Constraint`][].
        """
        super().__init__(layer, weight_name, NonNegative())


class BoxConstraint(Constraint):
    """Keeps the entries of a layer's weight between two bounds:
    [`eqxreg.Constraint`][] with [`eqxreg.Box`][]."""

    def __init__(
        self,
        layer: Any,
        weight_name: str | Sequence[str],
        lower: Bound,
        upper: Bound,
    ):
        """**Arguments:**

        - `layer`, `weight_name`: as in [`eqxreg.Constraint`][].
        - `lower`, `upper`: as in [`eqxreg.Box`][].
        """
        super().__init__(layer, weight_name, Box(lower, upper))


class SpectralCapConstraint(Constraint):
    """Caps the singular values of a layer's weight: [`eqxreg.Constraint`][] with
    [`eqxreg.SpectralCap`][]."""

    def __init__(
        self,
        layer: Any,
        weight_name: str | Sequence[str] = "weight",
        cap: Bound = 1.0,
        *,
        matrix: RowAxes = "unit",
        blocks: int = 1,
        method: Way | None = None,
    ):
        """**Arguments:**

        - `layer`, `weight_name`: as in [`eqxreg.Constraint`][]. The name defaults to
            `"weight"`.
        - `cap`, `matrix`, `blocks`, `method`: as in [`eqxreg.SpectralCap`][].
        """
        p = SpectralCap(cap, matrix=matrix, blocks=blocks, method=method)
        super().__init__(layer, weight_name, p)


class OrthogonalConstraint(Constraint):
    """Keeps a layer's weight orthogonal: [`eqxreg.Constraint`][] with
    [`eqxreg.Orthogonal`][].

    !!! example

        ```python
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> cell = eqx.nn.GRUCell(3, 4, key=jax.random.key(0))
        >>> cell = eqxreg.OrthogonalConstraint(cell, "weight_hh", blocks=3)
        >>> gate = eqxreg.bake(cell).weight_hh[:4]
        >>> bool(jnp.allclose(gate @ gate.T, jnp.eye(4), atol=1e-6))
        True

        ```
    """

    def __init__(
        self,
        layer: Any,
        weight_name: str | Sequence[str] = "weight",
        *,
        matrix: RowAxes = "unit",
        blocks: int = 1,
        method: Way | None = None,
    ):
        """**Arguments:**

        - `layer`, `weight_name`: as in [`eqxreg.Constraint`][]. The name defaults to
            `"weight"`.
        - `matrix`, `blocks`, `method`: as in [`eqxreg.Orthogonal`][].
        """
        p = Orthogonal(matrix=matrix, blocks=blocks, method=method)
        super().__init__(layer, weight_name, p)


class WeightNormConstraint(Constraint):
    r"""Weight normalisation: the layer computes with $g\, v / \lVert v \rVert$, where
    the gain $g$, one for each unit, and the direction $v$ are both trained.

    Wrapping does not change what the layer computes: $g$ starts as the norms of the
    weight. Selectors such as [`eqxreg.weights`][] take $v$ for a weight and $g$ for
    none; decaying $v$ changes nothing but the size of its steps.

    A unit whose weights are all zero stays zero until $v$ has found a direction, with
    finite gradients.

    !!! example

        ```python
        >>> import equinox as eqx
        >>> import jax
        >>> import eqxreg
        >>> linear = eqx.nn.Linear(10, 20, key=jax.random.key(0))
        >>> eqxreg.WeightNormConstraint(linear).g.shape
        (20, 1)

        ```

    ??? cite

        [Weight Normalization](https://arxiv.org/abs/1602.07868), Salimans and Kingma.
    """

    def __init__(
        self,
        layer: Any,
        weight_name: str | Sequence[str] = "weight",
        axis: AxisLike = "unit",
    ):
        """**Arguments:**

        - `layer`, `weight_name`: as in [`eqxreg.Constraint`][]. The name defaults to
            `"weight"`.
        - `axis`: the axes that one norm is taken over, as in [`eqxreg.MaxNorm`][].
            Defaults to `"unit"`: every axis but the first.
        """
        super().__init__(layer, weight_name, WeightNorm(axis))

    @property
    def g(self) -> Inexact[Array, "..."] | tuple[Inexact[Array, "..."], ...]:
        """The gain, with the axes of one norm at size one; a tuple of gains if there
        are several names."""
        gains = tuple(p.gain for p in self.parametrizations)  # pyright: ignore
        return gains[0] if isinstance(self.weight_name, str) else gains
