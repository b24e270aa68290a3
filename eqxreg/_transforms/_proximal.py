r"""Proximal steps, which end the chain: after the step, each weight goes to

$$\mathrm{prox}_{\eta f}(w) = \arg\min_v \tfrac{1}{2} \lVert v - w \rVert^2
+ \eta f(v),$$

for $f$ a penalty that is not smooth at zero, and $\eta$ the learning rate. What a
gradient of such a penalty only comes near to, a proximal step reaches: exact zeros.
"""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Inexact, Int, PyTree

from .._linalg import (
    AxisLike,
    check_axis,
    per_layer,
    real_dtype,
    resolve_axes,
    scaled_norm,
    widen,
)
from .._tree import trainable, weights
from .._values import check_rate, product, rate_at
from ._params import (
    change,
    check_params,
    emitted_dtype,
    following,
    is_placeholder,
    moved,
    paired,
    selected,
)


class ProximalState(NamedTuple):
    """The state of a proximal step: how many updates there were, for schedules."""

    step: Int[Array, ""]


def soft_threshold(
    rate: Any, *, learning_rate: Any, mask: Any = None
) -> optax.GradientTransformation:
    r"""After the step, moves each entry towards zero by $\eta\lambda$, and no further:

    $$w \mapsto \mathrm{sign}(w) \max(|w| - \eta\lambda, 0).$$

    This is the proximal step of [`eqxreg.l1_penalty`][], and
    `optax.chain(optax.sgd(lr), soft_threshold(rate, learning_rate=lr))` is ISTA: it
    minimises the loss plus that penalty, which must then not be in the loss. Entries
    become exact zeros.

    It comes after the learning rate, and before [`eqxreg.project`][]. With Adam the
    steps of entries differ in size, and the threshold does not; the zeros are those of
    another problem.

    The threshold of one step is the *product* of the two rates, and an entry becomes
    zero where the steps of the optimiser are no longer than that. With SGD a step is
    the learning rate times a gradient, so that `rate` is compared to gradients. With
    Adam a step is about the learning rate itself, so that `rate` is compared to 1, and
    has to be hundreds of times that for SGD.

    What scales steps after the learning rate, such as
    `optax.contrib.reduce_on_plateau`, must come after this, and not before, so that it
    scales the threshold too. While it does, zeros are come near to and not reached.

    **Arguments:**

    - `rate`: the factor $\lambda$ of the penalty: a non-negative number, a scalar array
        or an Optax schedule.
    - `learning_rate`: the learning rate $\eta$ of the step before: a number, a scalar
        array or a schedule. (Keyword only argument.)
    - `mask`: which weights: a selector such as [`eqxreg.weights`][], a function to a
        tree of booleans, or such a tree. Defaults to every trainable array, biases too.
        (Keyword only argument.)

    **Returns:**

    An `optax.GradientTransformation`. Updates keep their dtype, unless that cannot hold
    the weight, as in [`eqxreg.project`][]; zeros are exact in all of them.

    **Raises:**

    - `ValueError`: if `rate` or `learning_rate` is negative or not finite, or a
        schedule gives that; in `init`, if `mask` selects nothing; in `update`, if there
        are no `params`, or `updates`, `params` and `mask` are not of the same arrays.
        What is traced raises when it is known, by `eqx.error_if`.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import eqxreg
        >>> prox = eqxreg.soft_threshold(0.5, learning_rate=1.0)
        >>> params, updates = jnp.array([2.0, -0.5, 0.25]), jnp.zeros(3)
        >>> updates, _ = prox.update(updates, prox.init(params), params)
        >>> print(optax.apply_updates(params, updates))
        [1.5 0.  0. ]

        ```

    ??? cite

        ISTA: [An Iterative Thresholding Algorithm for Linear Inverse Problems with a
        Sparsity Constraint](https://arxiv.org/abs/math/0307152), Daubechies, Defrise
        and De Mol.
    """
    name, where = "soft_threshold", _or_trainable(mask)
    return _proximal(_soft, name, where, learning_rate, rate=rate)


def group_soft_threshold(
    rate: Any, axis: AxisLike = "unit", *, learning_rate: Any, mask: Any = None
) -> optax.GradientTransformation:
    r"""After the step, shortens each group of weights by $\eta\lambda$, down to zero:

    $$w_g \mapsto w_g \max\left(1 - \frac{\eta\lambda}{\lVert w_g \rVert}, 0\right).$$

    This is the proximal step of [`eqxreg.group_lasso_penalty`][]. Groups become zero as
    a whole: with `axis="unit"` they are units, filters or tokens, which can then be
    left out of the network.

    **Arguments:**

    - `rate`, `learning_rate`: as in [`eqxreg.soft_threshold`][].
    - `axis`: the axes that a group extends over, as in [`eqxreg.MaxNorm`][]. Defaults
        to `"unit"`, every axis but the first.
    - `mask`: as in [`eqxreg.soft_threshold`][], but defaults to [`eqxreg.weights`][].
        (Keyword only argument.)

    **Returns:**

    An `optax.GradientTransformation`. Updates keep their dtype, unless that cannot hold
    the weight, as in [`eqxreg.project`][]; zeros are exact in all of them.

    **Raises:**

    - `ValueError`: as [`eqxreg.soft_threshold`][] does; and if `axis` is unknown.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import eqxreg
        >>> prox = eqxreg.group_soft_threshold(1.0, learning_rate=1.0)
        >>> params = {"weight": jnp.array([[3.0, 4.0], [0.3, 0.4]])}
        >>> updates = {"weight": jnp.zeros((2, 2))}
        >>> updates, _ = prox.update(updates, prox.init(params), params)
        >>> with jnp.printoptions(precision=3):
        ...     print(optax.apply_updates(params, updates)["weight"])
        [[2.4 3.2]
         [0.  0. ]]

        ```

    ??? cite

        [Model Selection and Estimation in Regression with Grouped
        Variables](https://doi.org/10.1111/j.1467-9868.2005.00532.x), Yuan and Lin,
        2006. They weigh groups by the root of their size; put that into `rate`.
    """
    fn = ft.partial(_group_soft, check_axis(axis))
    where = weights if mask is None else mask
    return _proximal(fn, "group_soft_threshold", where, learning_rate, rate=rate)


def elastic_net_prox(
    l1: Any, l2: Any, *, learning_rate: Any, mask: Any = None
) -> optax.GradientTransformation:
    r"""After the step, moves each entry towards zero by $\eta\lambda_1$, and scales
    what is left:

    $$w \mapsto \frac{\mathrm{sign}(w) \max(|w| - \eta\lambda_1, 0)}{1 +
    \eta\lambda_2}.$$

    This is the proximal step of [`eqxreg.elastic_net_penalty`][]. With `l1=0` it is
    implicit weight decay, which is stable for every rate.

    **Arguments:**

    - `l1`, `l2`: the factors $\lambda_1$ and $\lambda_2$ of the penalty: non-negative
        numbers, scalar arrays or Optax schedules.
    - `learning_rate`, `mask`: as in [`eqxreg.soft_threshold`][]. (Keyword only
        arguments.)

    **Returns:**

    An `optax.GradientTransformation`. Updates keep their dtype, unless that cannot hold
    the weight, as in [`eqxreg.project`][]; zeros are exact in all of them.

    **Raises:**

    - As [`eqxreg.soft_threshold`][] does.
    """
    name, where = "elastic_net_prox", _or_trainable(mask)
    return _proximal(_elastic, name, where, learning_rate, l1=l1, l2=l2)


def _or_trainable(mask: Any) -> Any:
    return trainable if mask is None else mask


def _soft(
    weight: Inexact[Array, "*shape"], threshold: Float[Array, ""]
) -> Inexact[Array, "*shape"]:
    if not jnp.iscomplexobj(weight):
        return jnp.sign(weight) * jnp.maximum(jnp.abs(weight) - threshold, 0)
    return _shrunk(weight, (), threshold)


def _elastic(
    weight: Inexact[Array, "*shape"], l1: Float[Array, ""], l2: Float[Array, ""]
) -> Inexact[Array, "*shape"]:
    return _soft(weight, l1) / (1 + l2).astype(weight.dtype)


def _group_soft(
    axis: Any, weight: Inexact[Array, "*shape"], threshold: Float[Array, ""]
) -> Inexact[Array, "*shape"]:
    return _shrunk(weight, resolve_axes(axis, weight.ndim), threshold)


def _shrunk(weight: Array, axes: tuple[int, ...], threshold: Array) -> Array:
    """`weight` with its slices over `axes` shorter by `threshold`."""
    norm, scale = scaled_norm(weight, axes)
    left = norm - threshold * scale
    share = jnp.where(left > 0, left / jnp.where(norm > 0, norm, 1), left * 0)
    return weight * share.astype(weight.dtype)


def _proximal(
    fn: Callable[..., Array],
    name: str,
    mask: Any,
    learning_rate: Any,
    **rates: Any,
) -> optax.GradientTransformation:
    learning_rate = check_rate(learning_rate, "learning_rate")
    thresholds = tuple(
        product(check_rate(rate, argument), learning_rate)
        for argument, rate in rates.items()
    )
    step = _Proximal(fn, name, mask, thresholds)
    return optax.GradientTransformation(step.init, step.update)


@dataclasses.dataclass(frozen=True, eq=False)
class _Proximal:
    """`fn(weight, *thresholds)` after the step, with the rates times the learning rate
    as thresholds."""

    # A class, and not two closures, so that the transform can be pickled.
    fn: Callable[..., Array]
    name: str
    mask: Any
    thresholds: tuple[Any, ...]

    def init(self, params: PyTree) -> ProximalState:
        if not is_placeholder(params):
            # Raises if nothing is selected.
            selected(self.mask, params)
        return ProximalState(jnp.zeros((), jnp.int32))

    def update(
        self, updates: PyTree, state: Any, params: PyTree = None
    ) -> tuple[PyTree, ProximalState]:
        check_params(params, self.name)

        # Once, for a rate that is checked when it is known is checked at run time.
        now = [rate_at(rate, state.step) for rate in self.thresholds]

        def arrived(weight: Array) -> Array:
            real = real_dtype(weight.dtype)
            return self.fn(weight, *(threshold.astype(real) for threshold in now))

        leaves, structure, found = paired(updates, params, self.mask)
        for i, site in found:
            dtype = emitted_dtype(site.leaf, leaves[i])
            target = widen(moved(site.leaf, leaves[i]))
            new = per_layer(arrived, target, site.rank)
            leaves[i] = change(site.leaf, new, dtype)
        return structure.unflatten(leaves), ProximalState(following(state.step))
