"""Projection after the update, which is always the last step of a chain."""

import functools as ft
from typing import Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Int, PyTree

from .._maps import Projection
from .._maps._base import check_projection, check_weight
from .._norms import anywhere, per_layer, widen
from .._select import check_sites, require_sites, weights
from .._sites import Site
from ._params import change, check_params, following, moved


Momentum = Literal["keep", "tangent"]
"""What becomes of the part of a moving weight's momentum that points out of the set."""


class Carried(NamedTuple):
    """What is carried from one update of a weight to the next."""

    start: PyTree
    """What the next projection starts from, which for most maps is nothing."""
    reaction: PyTree
    """What projections have taken off the momentum, as an update; `None` if that is
    kept."""


class ProjectState(NamedTuple):
    """The state of `eqxreg.project`."""

    step: Int[Array, ""]
    """How many updates there were."""
    carried: tuple[PyTree, ...]
    """One `Carried` for each selected weight."""


def project(
    projection: Projection,
    every: int | np.integer = 1,
    mask: Any = weights,
    *,
    momentum: Momentum = "keep",
    b1: float = 0.9,
) -> optax.GradientTransformation:
    r"""Projects the weights after the update: $u \mapsto p(w + u) - w$.

    It must come last in the chain:
    `optax.chain(optax.adam(1e-3), project(MaxNorm(2.0, axis="unit"), every=10))`.

    Between projections, weights may leave the set. So may they by rounding: what is
    emitted is an update, and $w + (p(w + u) - w)$ is $p(w + u)$ only up to the
    precision of the weight. In float32 that is less than what maps stay short of their
    bounds by, unless the update is much larger than the bound. After training,
    [`eqxreg.project_params`][] is exact.

    **Momentum.** The optimiser before this one does not know of the set. At its
    boundary, momentum that points outwards builds up, is projected away in each step,
    and holds the weight there for about $1 / (1 - \beta_1)$ steps after the gradient
    has turned. With `momentum="tangent"` the part that a projection takes off, $n = w +
    u - p(w + u)$, is taken off the momentum too: what it would add to later updates,
    $\beta_1 n, \beta_1^2 n, \ldots$, is subtracted from them. For `optax.sgd(...,
    momentum=b1)` this is as if the velocity itself had lost $n$. For Adam and its kind
    it is up to how much their scaling changes within $1 / (1 - \beta_1)$ steps. It
    costs the memory of one more copy of the selected weights.

    **Arguments:**

    - `projection`: the map, such as [`eqxreg.MaxNorm`][]. Its bounds may be Optax
        schedules; they are given the number of this update, from 1.
        [`eqxreg.Relative`][] measures them in units of each weight's initial norm.
    - `every`: the number of updates from one projection to the next; others cost
        nothing. Defaults to 1.
    - `mask`: which weights: a selector, a function to a tree of booleans, or such a
        tree. Defaults to [`eqxreg.weights`][].
    - `momentum`: `"keep"` to leave the momentum as it is, or `"tangent"`. Defaults to
        `"keep"`. (Keyword only argument.)
    - `b1`: the decay rate $\beta_1$ of the optimiser's momentum, for
        `momentum="tangent"`. Defaults to 0.9. (Keyword only argument.)

    **Returns:**

    An `optax.GradientTransformation`. Updates keep their dtype. Layers that are stacked
    are projected one by one.

    **Raises:**

    - `TypeError`: if `projection` is not an [`eqxreg.Projection`][].
    - `ValueError`: if `every` is not a positive int, `momentum` is none of the above or
        `b1` is not in [0, 1); in `init`, if `mask` selects nothing; in `update`, if
        there are no `params`.

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
    if momentum not in get_args(Momentum):
        raise ValueError(f'`momentum` must be "keep" or "tangent", got {momentum!r}.')
    if not 0 <= b1 < 1:
        raise ValueError(f"`b1` must be in [0, 1), got {b1!r}.")

    def init(params):
        first = jnp.zeros((), jnp.int32)
        p = projection.at(first)

        def carried(site: Site) -> Carried:
            start = eqx.filter_jit(per_layer)(p._start, site.leaf, site.rank)
            none = momentum == "keep"
            return Carried(start, None if none else jnp.zeros_like(widen(site.leaf)))

        found = [site for _, site in require_sites(mask, params, "mask")]
        check_sites(ft.partial(check_weight, p), found)
        return ProjectState(first, tuple(map(carried, found)))

    def update(updates, state, params=None):
        check_params(params, "project")
        step = following(state.step)
        p = projection.at(step)
        leaves, structure = jax.tree.flatten(updates)
        found = require_sites(mask, params, "mask")
        steps = [leaves[i] for i, _ in found]
        carried = list(state.carried)
        if momentum == "tangent":
            pairs = zip(steps, carried, strict=True)
            steps = [widen(u) - c.reaction.astype(widen(u).dtype) for u, c in pairs]

        def project_one(site, step, carried):
            """The update, and what is carried on from it."""
            target = moved(site.leaf, step)
            new, start = per_layer(p._step, target, site.rank, carried.start)
            reaction = carried.reaction
            if reaction is not None:
                reaction = reaction + (widen(target) - widen(new))
            return change(site.leaf, new, step.dtype), Carried(start, reaction)

        def project_all(steps, carried):
            pairs = [
                project_one(site, *given)
                for (_, site), *given in zip(found, steps, carried, strict=True)
            ]
            return [u for u, _ in pairs], [c for _, c in pairs]

        def project_due(*before):
            keep = lambda new, old: jnp.where(due, new, old)
            return jax.tree.map(keep, project_all(*before), before)

        if every > 1:
            due = step % every == 0
            unchanged = lambda *both: both
            steps, carried = lax.cond(
                anywhere(due), project_due, unchanged, steps, carried
            )
        else:
            steps, carried = project_all(steps, carried)
        for (i, _), new in zip(found, steps, strict=True):
            leaves[i] = new.astype(leaves[i].dtype)
        if momentum == "tangent":
            carried = [Carried(c.start, b1 * c.reaction) for c in carried]
        return structure.unflatten(leaves), ProjectState(step, tuple(carried))

    return optax.GradientTransformation(init, update)
