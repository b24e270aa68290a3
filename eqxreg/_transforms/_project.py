"""Projection after the update, which is always the last step of a chain."""

import dataclasses
import functools as ft
from typing import Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Int, PyTree

from .._linalg import anywhere, per_layer, widen
from .._maps import Chain, Projection, StraightThrough, check_projection, check_weight
from .._tree import Site, check_sites, weights
from ._params import (
    as_in,
    by_path,
    change,
    check_params,
    emitted_dtype,
    following,
    is_placeholder,
    moved,
    paired,
    recorded,
    replaced,
    selected,
    together,
    with_selected,
)


Momentum = Literal["keep", "tangent"]
"""What becomes of the part of a moving weight's momentum that points out of the set."""


class ProjectState(NamedTuple):
    """The state of `eqxreg.project`."""

    step: Int[Array, ""]
    """How many updates there were."""
    carried: dict[str, PyTree]
    """What the next projection of each weight starts from, by its path and shape. For
    most maps that is nothing, and they have no entry."""
    reactions: PyTree = ()
    """What projections have taken off the momentum, as updates, unless that is kept: a
    tree of the structure of the parameters."""


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
    bounds by, unless the update is much larger than the bound. Zeros are exact, and no
    entry passes zero. After training, [`eqxreg.project_params`][] is exact.

    A line search, as in `optax.lbfgs`, evaluates the loss along its own step and knows
    nothing of a projection that follows: together they end at a wrong point. There, use
    a wrapper, such as [`eqxreg.constrain`][] makes.

    **Momentum.** The optimiser before this one does not know of the set. At its
    boundary, momentum that points outwards builds up, is projected away in each step,
    and holds the weight there for about $1 / (1 - \beta_1)$ steps after the gradient
    has turned. With `momentum="tangent"` the part that a projection takes off, $n = w +
    u - p(w + u)$, is taken off the momentum too: what it would add to later updates,
    $\beta_1 n, \beta_1^2 n, \ldots$, is subtracted from them. For `optax.sgd(...,
    momentum=b1)` this is as if the velocity itself had lost $n$; with `nesterov=True`
    it is not, for there the velocity has another share in the update. For Adam and its
    kind it is up to how much their scaling changes within $1 / (1 - \beta_1)$ steps. It
    costs the memory of one more copy of the selected weights.

    **Arguments:**

    - `projection`: the map, such as [`eqxreg.MaxNorm`][]. Its bounds may be Optax
        schedules of the step, which is 0 at the first update, as everywhere in Optax.
        [`eqxreg.Relative`][] measures them in units of each weight's initial norm.
    - `every`: the number of updates from one projection to the next; others cost
        nothing. With `every=k` it is the k-th update that projects first. Defaults to
        1.
    - `mask`: which weights: a selector, a function to a tree of booleans, or such a
        tree. Defaults to [`eqxreg.weights`][].
    - `momentum`: `"keep"` to leave the momentum as it is, or `"tangent"`. Defaults to
        `"keep"`. (Keyword only argument.)
    - `b1`: the decay rate $\beta_1$ of the optimiser's momentum, for
        `momentum="tangent"`. Defaults to 0.9. (Keyword only argument.)

    **Returns:**

    An `optax.GradientTransformation`. Updates keep their dtype, unless that cannot hold
    the weight: updates in bfloat16 of weights in float32 become updates in float32.
    Layers that are stacked are projected one by one.

    **Raises:**

    - `TypeError`: if `projection` is not an [`eqxreg.Projection`][].
    - `ValueError`: if `every` is not a positive int, `momentum` is none of the above or
        `b1` is not in [0, 1); in `init`, if `mask` selects nothing; in `update`, if
        there are no `params`, or `updates`, `params`, `mask` and `state` are not of the
        same arrays, or a schedule gives what would be no bound as a number. What is
        traced raises when it is known, by `eqx.error_if`.

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
    is_int = isinstance(every, int | np.integer) and not isinstance(every, bool)
    if not is_int or not 0 < every < 2**31:
        raise ValueError(f"`every` must be a positive int below 2**31, got {every!r}.")
    if momentum not in get_args(Momentum):
        raise ValueError(f'`momentum` must be "keep" or "tangent", got {momentum!r}.')
    if not 0 <= b1 < 1:
        raise ValueError(f"`b1` must be in [0, 1), got {b1!r}.")

    transform = _Project(projection, int(every), mask, momentum == "tangent", b1)
    return optax.GradientTransformation(transform.init, transform.update)


@dataclasses.dataclass(frozen=True, eq=False)
class _Project:
    # A class, and not two closures, so that the transform can be pickled.
    projection: Projection
    every: int
    mask: Any
    is_tangent: bool
    b1: float

    def init(self, params: PyTree) -> ProjectState:
        first = jnp.zeros((), jnp.int32)
        p = self.projection.at(first)
        if is_placeholder(params):
            carried: Any = {} if _carries_nothing(p) else "what is carried"
            return ProjectState(first, carried, params if self.is_tangent else ())
        found = selected(self.mask, params)
        check_sites(ft.partial(check_weight, p), found)
        reactions = ()
        if self.is_tangent:
            none = {site.path: jnp.zeros_like(widen(site.leaf)) for site in found}
            reactions = with_selected(none, params)
        starts = {
            _key(site): eqx.filter_jit(per_layer)(p._start, site.leaf, site.rank)
            for site in found
        }
        carried = {key: start for key, start in starts.items() if _has_leaves(start)}
        return ProjectState(first, carried, reactions)

    def update(
        self, updates: PyTree, state: Any, params: PyTree = None
    ) -> tuple[PyTree, ProjectState]:
        check_params(params, "project")
        p = self.projection.at(state.step)
        leaves, structure, found = paired(updates, params, self.mask)
        kept = by_path(state.reactions)
        moving = []
        for i, site in found:
            step = leaves[i].astype(emitted_dtype(site.leaf, leaves[i]))
            reaction = None
            if self.is_tangent:
                reaction = recorded(kept.get(site.path), site, site.leaf)
                reaction, step = together(reaction, leaves[i])
                step = step - reaction
            moving.append(_Moving(step, _carried(p, state, site), reaction))

        def project_one(site: Site, now: _Moving) -> _Moving:
            target = moved(site.leaf, now.step)
            new, start = per_layer(p._step, target, site.rank, now.start)
            reaction = now.reaction
            if reaction is not None:
                reaction = reaction + (widen(target) - widen(new))
            return _Moving(change(site.leaf, new, now.step.dtype), start, reaction)

        def project_all(moving: list[_Moving]) -> list[_Moving]:
            pairs = zip(found, moving, strict=True)
            return [project_one(site, now) for (_, site), now in pairs]

        def project_due(before: list[_Moving]) -> list[_Moving]:
            keep = lambda new, old: jnp.where(due, new, old)
            return jax.tree.map(keep, project_all(before), before)

        count = following(state.step, self.every)
        if self.every > 1:
            due = count % self.every == 0
            unchanged = lambda moving: moving
            moving = lax.cond(anywhere(due), project_due, unchanged, moving)
        else:
            moving = project_all(moving)
        carried, reactions = dict(state.carried), {}
        for (i, site), now in zip(found, moving, strict=True):
            leaves[i] = now.step.astype(emitted_dtype(site.leaf, leaves[i]))
            if _key(site) in carried:
                carried[_key(site)] = as_in(now.start, carried[_key(site)])
            if now.reaction is not None:
                reactions[site.path] = self.b1 * now.reaction
        reactions = replaced(state.reactions, reactions)
        return structure.unflatten(leaves), ProjectState(count, carried, reactions)


class _Moving(NamedTuple):
    """A weight on its way: the step that it takes, and what is carried on from it."""

    step: Array
    start: PyTree
    reaction: Array | None


def _carried(p: Projection, state: ProjectState, site: Site) -> PyTree:
    """What the projection of a weight starts from, which for most maps is nothing."""
    start = lambda leaf: per_layer(p._start, leaf, site.rank)
    needed = jax.eval_shape(start, site.leaf)
    if not _has_leaves(needed):
        return needed
    return as_in(recorded(state.carried.get(_key(site)), site, needed), needed)


def _key(site: Site) -> str:
    """What is carried for a weight is under its path and, for what is carried may be of
    the same shape for weights of different ones, its shape."""
    return f"{site.path}: {site.leaf.shape}"


def _has_leaves(tree: PyTree) -> bool:
    return len(jax.tree.leaves(tree)) > 0


def _carries_nothing(p: Any) -> bool:
    """Whether projections of any weight start from nothing."""
    if isinstance(p, Chain):
        return all(_carries_nothing(part) for part in p.maps)
    if isinstance(p, StraightThrough):
        return _carries_nothing(p.projection)
    return type(p)._start is Projection._start
