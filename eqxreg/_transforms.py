"""Optax transforms: decay, and projections after the update.

Decay is `optax.add_decayed_weights` of some function of the weights. All transforms
need `params`, accept models filtered with `eqx.is_inexact_array`, and resolve their
mask anew on the tree that they are given, so that they work within `optax.masked` and
`optax.partition` too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Int, PyTree

from ._maps import Projection
from ._maps._base import check_projection
from ._norms import anywhere, per_layer, widen
from ._rates import check_rate
from ._select import require_selection, sites, trainable, weights


def weight_decay(rate: Any, mask: Any = None) -> optax.GradientTransformation:
    r"""Adds $\lambda w$ to the update.

    Before Adam it is coupled, the gradient of [`eqxreg.l2_penalty`][]:
    `optax.chain(weight_decay(1e-4), optax.adam(1e-3))`. After Adam and before the
    learning rate it is decoupled, which is AdamW:
    `optax.chain(optax.scale_by_adam(), weight_decay(1e-2),
    optax.scale_by_learning_rate(1e-3))`. For complex weights, conjugate the gradients
    of JAX first, as for every transform of Optax.

    **Arguments:**

    - `rate`: the factor $\lambda$: a non-negative number, a scalar array or an Optax
        schedule.
    - `mask`: which weights: a selector such as [`eqxreg.weights`][], a function to a
        tree of booleans, or such a tree. Defaults to every trainable array, biases too.

    **Returns:**

    An `optax.GradientTransformation`. Updates keep their dtype.

    **Raises:**

    - `ValueError`: if `rate` is negative; in `init`, if `mask` selects nothing; in
        `update`, if there are no `params`.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> decay = eqxreg.weight_decay(0.1)
        >>> params, grads = jnp.array([1.0, 10.0]), jnp.array([1.0, 2.0])
        >>> print(decay.update(grads, decay.init(params), params)[0])
        [1.1 3. ]

        ```
    """
    return _decay(rate, lambda w: w, mask, "weight_decay")


def sign_decay(rate: Any, mask: Any = None) -> optax.GradientTransformation:
    r"""Adds $\lambda\, \mathrm{sign}(w)$ to the update: the gradient of
    [`eqxreg.l1_penalty`][].

    Weights come near zero but do not stay there.

    **Arguments:**

    - `rate`, `mask`: as in [`eqxreg.weight_decay`][].

    **Returns:**

    An `optax.GradientTransformation`. Updates keep their dtype.

    **Raises:**

    - As [`eqxreg.weight_decay`][] does.
    """
    return _decay(rate, jnp.sign, mask, "sign_decay")


def _decay(
    rate: Any, direction: Callable[[Array], Array], mask: Any, name: str
) -> optax.GradientTransformation:
    rate = check_rate(rate, "rate")
    where = trainable if mask is None else mask

    def selected(params: PyTree) -> PyTree:
        return _unflatten_like(params, require_selection(where, params, "mask"))

    # Optax adds one times what we make of the weights, in the dtype of each.
    inner = optax.add_decayed_weights(1.0, mask=selected)

    def init(params):
        return DecayState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates, state, params=None):
        _require_params(params, name)
        now = rate(state.step) if callable(rate) else rate

        def decayed(param, update):
            wide = widen(direction(param))
            return (jnp.asarray(now).astype(wide.dtype) * wide).astype(update.dtype)

        decay = jax.tree.map(decayed, params, updates)
        updates, inner_state = inner.update(updates, state.inner, decay)
        step = jnp.asarray(optax.safe_increment(state.step))
        return updates, DecayState(step, inner_state)

    return optax.GradientTransformation(init, update)


class DecayState(NamedTuple):
    """The state of decay: how many updates there were, for schedules."""

    step: Int[Array, ""]
    inner: optax.OptState


class ProjectState(NamedTuple):
    """The state of `eqxreg.project`: how many updates there were, and what the next
    projection of each selected weight starts from, which for most maps is nothing."""

    step: Int[Array, ""]
    starts: tuple[PyTree, ...]


def project(
    projection: Projection, every: int | np.integer = 1, mask: Any = weights
) -> optax.GradientTransformation:
    r"""Projects the weights after the update: $u \mapsto p(w + u) - w$.

    It must come last in the chain:
    `optax.chain(optax.adam(1e-3), project(MaxNorm(2.0, axis="unit"), every=10))`.

    Between projections, weights may leave the set. So may they by rounding: what is
    emitted is an update, and $w + (p(w + u) - w)$ is $p(w + u)$ only up to the
    precision of the weight. In float32 that is less than what maps stay short of their
    bounds by, unless the update is much larger than the bound. After training,
    [`eqxreg.project_params`][] is exact.

    **Arguments:**

    - `projection`: the map, such as [`eqxreg.MaxNorm`][]. Its bounds may be Optax
        schedules; they are given the number of this update, from 1.
    - `every`: the number of updates from one projection to the next; others cost
        nothing. Defaults to 1.
    - `mask`: which weights: a selector, a function to a tree of booleans, or such a
        tree. Defaults to [`eqxreg.weights`][].

    **Returns:**

    An `optax.GradientTransformation`. Updates keep their dtype. Layers that are stacked
    are projected one by one.

    **Raises:**

    - `TypeError`: if `projection` is not an [`eqxreg.Projection`][].
    - `ValueError`: if `every` is not a positive int; in `init`, if `mask` selects
        nothing; in `update`, if there are no `params`.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import eqxreg
        >>> params = {"weight": jnp.array([3.0, 4.0])}
        >>> projection = eqxreg.project(eqxreg.MaxNorm(1.0))
        >>> updates = {"weight": jnp.zeros(2)}
        >>> updates, _ = projection.update(updates, projection.init(params), params)
        >>> with jnp.printoptions(precision=3):
        ...     print(optax.apply_updates(params, updates)["weight"])
        [0.6 0.8]

        ```
    """
    check_projection(projection)
    if isinstance(every, bool) or not isinstance(every, int | np.integer) or every < 1:
        raise ValueError(f"`every` must be a positive int, got {every!r}.")

    def init(params):
        first = jnp.zeros((), jnp.int32)
        p = projection.at(first)
        starts = [
            eqx.filter_jit(per_layer)(p._start, param, site.rank)
            for param, site, is_chosen in _leaves(params)
            if is_chosen
        ]
        return ProjectState(first, tuple(starts))

    def update(updates, state, params=None):
        _require_params(params, "project")
        step = jnp.asarray(optax.safe_increment(state.step))
        p = projection.at(step)

        def project_leaf(update, param, site, start):
            moved = (widen(param) + widen(update)).astype(param.dtype)
            projected, start = per_layer(p._step, moved, site.rank, start)
            change = widen(projected) - widen(param)
            return change.astype(update.dtype), start

        def project_all(updates, starts):
            leaves, structure = jax.tree.flatten(updates)
            found, remaining = list(_leaves(params)), list(starts)
            following = []
            for i, (param, site, is_chosen) in enumerate(found):
                if is_chosen:
                    start = remaining.pop(0)
                    leaves[i], start = project_leaf(leaves[i], param, site, start)
                    following.append(start)
            return structure.unflatten(leaves), tuple(following)

        def project_due(updates, starts):
            keep = lambda new, old: jnp.where(due, new, old)
            new = project_all(updates, starts)
            return jax.tree.map(keep, new, (updates, starts))

        if every > 1:
            due = step % every == 0
            unchanged = lambda *both: both
            updates, starts = lax.cond(
                anywhere(due), project_due, unchanged, updates, state.starts
            )
        else:
            updates, starts = project_all(updates, state.starts)
        return updates, ProjectState(step, starts)

    def _leaves(params):
        chosen = require_selection(mask, params, "mask")
        return zip(jax.tree.leaves(params), sites(params), chosen, strict=True)

    return optax.GradientTransformation(init, update)


def _unflatten_like(tree: PyTree, leaves: list) -> PyTree:
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _require_params(params: Any, name: str) -> None:
    if params is None:
        raise ValueError(
            f"`eqxreg.{name}` needs the parameters: call "
            "`optimiser.update(grads, state, params)`, with "
            "`params=eqx.filter(model, eqx.is_inexact_array)`."
        )
