"""The numbers of a model's weights: norms, and where they are relative to their sets.

A weight is measured as its layer computes with it, and against the set that it is meant
to be in: that of the maps of the wrappers around it or, if it is in none, that of a
projection that is given.
"""

import dataclasses
import functools as ft
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact, PyTree

from .._linalg import frobenius_norm, per_layer, widen
from .._maps import (
    Chain,
    Projection,
    automatically_measured,
    check_projection,
    over_blocks,
    spectral_norm,
)
from .._tree import Site, require_selection, sites, weights
from .._values import opened
from .._wrappers import Constraint, SpectralConstraint, on_stack
from ._bake import bake_with


def metrics(
    model: PyTree,
    where: Any = weights,
    *,
    projection: Projection | None = None,
    state: eqx.nn.State | None = None,
) -> dict[str, Float[Array, "..."]]:
    r"""Norms of weights, and where they are relative to their sets, as arrays.

    Pure and jittable, for use in a training loop, say once in an epoch. The keys are
    `"<path>/<number>"`, such as `".layers[0].weight/norm"`, for these numbers:

    - `norm`: the Frobenius norm of the weight that the layer computes with, wrappers
        evaluated.
    - `singular_value`: its largest singular value $\sigma_1$ as the matrix "axis 0 x
        the others", by [`eqxreg.spectral_norm`][]. Of a vector or a scalar it is the
        norm.
    - `stable_rank`: $\lVert W \rVert_F^2 / \sigma_1^2$, and 0 for a zero weight.
    - `distance`: the Frobenius distance to the set. If the weight is in wrappers, that
        between the stored, raw weight and what they make of it.
    - `active`: the share of units, the slices along axis 0, that are outside the set or
        on its boundary. For [`eqxreg.NonNegative`][], [`eqxreg.Box`][] and vectors it
        is the share of entries, for [`eqxreg.Pinned`][] that of those that are held;
        for several maps, the largest of their shares. In a set that is all boundary,
        such as a sphere, it is 1, but for units that are zero and that the map leaves
        at zero. Of a layer that is bounded as an operator, by `input_shape`, it is 1 if
        the weight is moved. Sets that hold all multiples of their weights, such as that
        of [`eqxreg.Symmetric`][], count only units that are outside.

    The last two are there only for weights that have a set: those whose wrappers are
    all an [`eqxreg.Constraint`][] with an [`eqxreg.Projection`][] and, if there is a
    `projection`, those that are in no wrapper.

    Weights of the same shape are measured together, on a copy of them. Where large ones
    are relative to [`eqxreg.SpectralCap`][] is known, on CPUs, from the singular values
    that are above the bound, in half the time that LAPACK takes for all of them, and
    from a few products where they are well inside. In single precision the distance is
    then exact to about 1e-5 and, next to the set, to 2e-6 of the bound. Units that are
    not zero count as active together, unless the weight falls into parts.

    **Arguments:**

    - `model`: any PyTree, such as a model or its filtered parameters.
    - `where`: which weights: a selector, or a tree of booleans. Defaults to
        [`eqxreg.weights`][].
    - `projection`: the set that weights without wrappers are meant to be in, such as
        the one of [`eqxreg.project`][]. Defaults to none. (Keyword only argument.)
    - `state`: the model's `eqx.nn.State`, if it has stateful wrappers. It is not
        changed. (Keyword only argument.)

    **Returns:**

    A dict of real arrays of at least single precision: scalars, or for weights of
    layers that are stacked, arrays of the shape of the stack.

    **Raises:**

    - `ValueError`: if nothing is selected, or there is a stateful wrapper and no
        `state`.
    - `TypeError`: if `projection` is not an [`eqxreg.Projection`][].

    !!! example

        ```python
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> tree = {"weight": jnp.array([[3.0, 0.0], [0.0, 4.0]])}
        >>> for name, value in jax.jit(eqxreg.metrics)(tree).items():
        ...     print(name, value)
        ['weight']/norm 5.0
        ['weight']/singular_value 4.0
        ['weight']/stable_rank 1.5625

        ```
    """
    if projection is not None:
        check_projection(projection)
    chosen = require_selection(where, model, "where")
    return metrics_of(model, chosen, projection, state)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A weight, and what is known of it without its values."""

    site: Site
    rank: int
    """That of the weight in one layer."""
    maps: tuple[Any, ...]
    """What makes it, innermost first: maps, and wrappers that are not ours. If there
    are none, the projection that was given."""
    is_wrapped: bool
    bounds_operator: bool
    """Whether a wrapper measures the layer as an operator, and not its weight."""

    @property
    def target(self) -> Projection | None:
        """The set that it is measured against."""
        if not self.maps or not all(isinstance(p, Projection) for p in self.maps):
            return None
        p = self.maps[0] if len(self.maps) == 1 else Chain(*self.maps)
        assert isinstance(p, Projection)
        return p

    @property
    def stack(self) -> tuple[int, ...]:
        shape = self.site.leaf.shape
        return shape[: len(shape) - self.rank]


def subjects_of(
    model: PyTree, chosen: Sequence[bool], projection: Projection | None
) -> list[Subject]:
    """The chosen leaves, in the order of `jax.tree.leaves`."""
    chosen_sites = [s for s, c in zip(sites(model), chosen, strict=True) if c]
    return [_subject(site, projection) for site in chosen_sites]


def _subject(site: Site, projection: Projection | None) -> Subject:
    maps = [
        opened(wrapper.parametrizations[i])
        if isinstance(wrapper, Constraint)
        else wrapper
        for _, wrapper, i in site.wrappers
    ]
    given = [] if maps or projection is None else [projection]
    return Subject(
        site,
        site.rank,
        (*maps, *given),
        is_wrapped=bool(maps),
        bounds_operator=any(
            isinstance(wrapper, SpectralConstraint) and wrapper.input_shape is not None
            for _, wrapper, _ in site.wrappers
        ),
    )


def metrics_of(
    model: PyTree,
    chosen: Sequence[bool],
    projection: Projection | None,
    state: eqx.nn.State | None,
    bounded: bool = False,
) -> dict[str, Float[Array, "..."]]:
    """`metrics` of the chosen leaves; if asked for, also `bounded`, the largest of the
    norms that a set bounds, of those weights whose set bounds norms."""
    # A state can be set once, and a wrapper that is not ours might.
    state = jax.tree.map(lambda x: x, state)
    subjects = {s.site.path: s for s in subjects_of(model, chosen, projection)}
    baked, origins = bake_with(model, sites(model), state)
    found = [
        (subjects[origin.path], jnp.asarray(leaf))
        for origin, leaf in zip(origins, jax.tree.leaves(baked), strict=True)
        if origin.path in subjects
    ]
    values = _together(lambda layers: over_blocks(_singular_value, layers), found)
    standings = _standings(projection, found)
    numbers = {
        f"{subject.site.path}/{name}": number
        for (subject, weight), value in zip(found, values, strict=True)
        for name, number in _numbers(subject, weight, value, standings).items()
    }
    if bounded:
        for subject, weight in found:
            norm = _bounded(subject, weight)
            if norm is not None:
                numbers[f"{subject.site.path}/bounded"] = norm
    return numbers


def _bounded(
    subject: Subject, weight: Inexact[Array, "..."]
) -> Float[Array, "..."] | None:
    # The map speaks of the kernel, where the wrapper bounds the operator.
    if subject.target is None or subject.bounds_operator:
        return None
    measure = lambda p, weight: p._largest(weight)
    return on_stack(measure, subject.target, subject.rank, weight)


def _numbers(
    subject: Subject,
    weight: Inexact[Array, "..."],
    value: Float[Array, "..."],
    standings: dict[str, tuple[Array, Array]],
) -> dict[str, Float[Array, "..."]]:
    """The numbers of a weight, whose largest singular value is `value`. Where some are
    relative to their sets is known by path."""

    def each(fn: Callable, *arrays: Array) -> Any:
        return per_layer(fn, arrays[0], subject.rank, *arrays[1:])

    norm = each(frobenius_norm, weight)
    ratio = jnp.where(value == 0, 0, norm / jnp.where(value == 0, 1, value))
    found = {"norm": norm, "singular_value": value, "stable_rank": ratio**2}
    target = subject.target
    if target is None:
        return found
    if not subject.is_wrapped:
        standing = standings.get(subject.site.path)
        distance, active = standing or each(target._standing, weight)
        return {**found, "distance": distance, "active": active}
    raw = jnp.asarray(subject.site.leaf)
    distance = each(lambda a, b: frobenius_norm(widen(a) - widen(b)), raw, weight)
    active = on_stack(lambda p, raw: p._active(raw), target, subject.rank, raw)
    if subject.bounds_operator:
        # The map speaks of the kernel. The operator is one unit.
        active = jnp.where(distance > 0, 1, active)
    return {**found, "distance": distance, "active": active}


def _standings(
    p: Projection | None, found: list[tuple[Subject, Array]]
) -> dict[str, tuple[Array, Array]]:
    """Where weights without wrappers are relative to the set, by path, if that takes
    more than to apply the map."""
    if p is None or type(p)._standing is Projection._standing:
        return {}

    def standing(layers: Array) -> tuple[Array, Array]:
        # One after the other, so that each does no more than it has to.
        return automatically_measured(lambda x: lax.map(p._standing, x), layers)

    free = [(subject, weight) for subject, weight in found if not subject.is_wrapped]
    paths = [subject.site.path for subject, _ in free]
    return dict(zip(paths, _together(standing, free), strict=True))


def _together(
    fn: Callable[[Array], Any], found: list[tuple[Subject, Array]]
) -> list[Any]:
    """`fn`, of a stack of layers, of each weight. Those of the same shape are a stack,
    for it takes a second to compile the loops that measure one."""
    values: dict[int, Any] = {}
    groups: dict[Any, list[tuple[int, Array]]] = {}
    for i, (subject, weight) in enumerate(found):
        shape = weight.shape[weight.ndim - subject.rank :]
        # A reshape would ask how to lay out a sharded weight.
        count = math.prod(subject.stack)
        layers = weight.reshape(count, *shape) if subject.stack else weight[None]
        kind = (shape, weight.dtype, jax.typeof(layers).sharding)
        groups.setdefault(kind, []).append((i, layers))
    for group in groups.values():
        made = fn(jnp.concatenate([layers for _, layers in group]))
        begin = 0
        for i, layers in group:
            part = ft.partial(_part, begin, len(layers), found[i][0].stack)
            values[i] = jax.tree.map(part, made)
            begin += len(layers)
    return [values[i] for i in range(len(found))]


def _part(begin: int, count: int, stack: tuple[int, ...], numbers: Array) -> Array:
    """The numbers of some layers, in the shape of their stack."""
    return lax.slice_in_dim(numbers, begin, begin + count).reshape(stack)


def _singular_value(weight: Inexact[Array, "..."]) -> Float[Array, ""]:
    if weight.ndim < 2 or weight.size == 0:
        return frobenius_norm(weight)
    return spectral_norm(widen(weight))
