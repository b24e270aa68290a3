"""Bounds in units of the norm that a weight had at first."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Inexact, PyTree

from .._values import Constant, Number, Schedule, Shaped, value_of
from ._base import Projection, check_projection


class Relative(Projection):
    r"""A projection whose bounds are in units of the norm that each weight, or each of
    its units, had at first: `Relative(MaxNorm(1.5))` lets norms grow by half.

    What is first: in [`eqxreg.project`][], the weights that the optimiser is
    initialised with; in a wrapper, the weight that is wrapped. By itself the map knows
    of no weight and cannot be called; `Relative(p).bind(weight)` is a map that can.

    With `Relative(UnitNorm())` each weight keeps its initial norm $R$, as norm-fixed
    training has it. If the optimiser's direction is scaled to the norm of the weight
    too, this is the "Hyperball" step, $W \leftarrow R\, N(W - \eta R\, N(U))$ with $N$
    for normalised:

    ```python
    optimiser = optax.chain(
        optax.scale_by_adam(),
        optax.masked(optax.scale_by_trust_ratio(), eqxreg.weights),
        optax.scale_by_learning_rate(schedule),
        eqxreg.project(eqxreg.Relative(eqxreg.UnitNorm())),
    )
    ```

    A unit that is zero at first has to stay zero.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> p, weight = eqxreg.Relative(eqxreg.MaxNorm(1.5)).bind(jnp.array([0.6, 0.8]))
        >>> with jnp.printoptions(precision=3):
        ...     print(p(2 * weight))
        [0.9 1.2]

        ```

    ??? cite

        [Hyperball](https://arxiv.org/abs/2606.16899), Wen et al., 2026.
    """

    projection: Projection
    sizes: Constant | None

    def __init__(
        self, projection: Projection, sizes: ArrayLike | Constant | None = None
    ):
        """**Arguments:**

        - `projection`: a map that bounds norms: [`eqxreg.MaxNorm`][] with `ord=2`,
            [`eqxreg.MinMaxNorm`][], [`eqxreg.UnitNorm`][], [`eqxreg.SpectralNorm`][],
            [`eqxreg.SpectralScale`][] or [`eqxreg.SpectralCap`][] (with `blocks=1`).
            Its bounds are factors of the initial norms.
        - `sizes`: the initial norms, as `bind` finds them. Defaults to none.

        **Raises:**

        - `TypeError`: if `projection` is not an [`eqxreg.Projection`][], or not one
            that bounds norms.
        - `ValueError`: if it has another `ord` or `blocks`; and in `bind`, and in the
            `init` of [`eqxreg.project`][], if a weight has no norm to be relative to,
            for all of it is zero.
        """
        check_projection(projection)
        if not hasattr(projection, "_sizes"):
            raise TypeError(
                "`projection` must bound norms for these to be relative, as "
                "`eqxreg.MaxNorm`, `eqxreg.UnitNorm` and `eqxreg.SpectralCap` do, got "
                f"{projection!r}."
            )
        for option, needed in (("ord", 2), ("blocks", 1)):
            given = getattr(projection, option, needed)
            if given != needed:
                raise ValueError(
                    f"`projection` must have `{option}={needed}` for its bounds to be "
                    f"relative, got `{option}={given!r}`."
                )
        self.projection = projection
        self.sizes = (
            None if sizes is None else Constant.of(jnp.asarray(value_of(sizes)))
        )

    @property
    def _degree(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.projection._degree

    def check(self, weight: Shaped) -> None:
        self.projection.check(weight)

    def bind(
        self, weight: Inexact[Array, "*shape"]
    ) -> tuple["Relative", Inexact[Array, "*shape"]]:
        """**Arguments:**

        - `weight`: the weight whose norms are the units, unless there are `sizes`.

        **Returns:**

        This map with these norms, and `weight`.
        """
        known = self.sizes is not None
        sizes = self.sizes if known else self._sizes_of(weight)
        return Relative(self.projection, sizes), weight

    def __call__(self, raw: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        return self._absolute(self.sizes)(raw)

    def contains(
        self, weight: Inexact[Array, "..."], tol: ArrayLike | None = None
    ) -> Bool[Array, ""]:
        return self._absolute(self.sizes).contains(weight, tol)

    def _sizes_of(self, weight: Inexact[Array, "..."]) -> Float[Array, "..."]:
        self.check(weight)
        measure: Any = self.projection
        sizes = jax.lax.stop_gradient(measure._sizes(weight))
        if weight.size == 0:
            # It has no norm to be relative to, and stays whatever the bound is.
            return jnp.ones_like(sizes)
        return eqx.error_if(
            sizes,
            jnp.all(sizes == 0),
            "`eqxreg.Relative`: a weight is zero, and has no norm to be relative to. "
            "Leave it out by `mask` or `where`, or initialise it otherwise.",
        )

    def _absolute(self, sizes: Float[Array, "..."] | Constant | None) -> Projection:
        """The projection with its bounds multiplied."""
        if sizes is None:
            raise ValueError(
                "`eqxreg.Relative` does not know what its bounds are relative to. Use "
                "it in `eqxreg.project` or a wrapper, which see the initial weights, "
                "or call `Relative(projection).bind(weight)`."
            )

        known: Array = value_of(sizes)

        def times(bound: Any) -> Any:
            if isinstance(bound, Schedule):
                return Schedule(lambda step: times(bound(step)))
            return jnp.asarray(value_of(bound), known.dtype) * known

        is_bound = lambda node: isinstance(node, Number | Schedule | Constant)
        return jax.tree.map(times, self.projection, is_leaf=is_bound)

    def _start(self, weight: Inexact[Array, "..."]) -> PyTree:
        known = self.sizes is not None
        sizes = value_of(self.sizes) if known else self._sizes_of(weight)
        return sizes, self._absolute(sizes)._start(weight)

    def _step(
        self, weight: Inexact[Array, "*shape"], start: PyTree
    ) -> tuple[Inexact[Array, "*shape"], PyTree]:
        sizes, own = start
        weight, own = self._absolute(sizes)._step(weight, own)
        return weight, (sizes, own)

    def _largest(self, weight: Inexact[Array, "..."]) -> Float[Array, ""] | None:
        return self.projection._largest(weight)

    def _wide_distance(self, weight: Inexact[Array, "..."]) -> Float[Array, ""]:
        return self._absolute(self.sizes)._wide_distance(weight)
