"""`Decay`, the transform that all decay is: it adds a rate times a direction."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Int, PyTree

from .._tree import Site
from .._values import rate_at
from ._params import (
    by_path,
    check_params,
    emitted_dtype,
    following,
    is_placeholder,
    paired,
    recorded,
    selected,
    together,
    with_selected,
)


class DecayState(NamedTuple):
    """The state of decay."""

    step: Int[Array, ""]
    """How many updates there were, for schedules."""
    references: PyTree = ()
    """What each selected weight is drawn to, if that is not zero: a tree of the
    structure of the parameters."""


@dataclasses.dataclass(frozen=True, eq=False)
class Decay:
    """Adds `rate * direction(weight, update)`; the weight counts from its reference, if
    there is one. What Optax's `add_decayed_weights` adds is `rate * weight`."""

    # A class, and not two closures, so that the transform can be pickled.
    rate: Any
    direction: Callable[[Array, Array], Array]
    mask: Any
    name: str
    reference: PyTree

    def init(self, params: PyTree) -> DecayState:
        step = jnp.zeros((), jnp.int32)
        if is_placeholder(params):
            return DecayState(step, () if self.reference is None else params)
        found = selected(self.mask, params)
        if self.reference is None:
            return DecayState(step)
        references = by_path(self.reference)
        kept = {site.path: _reference(references, site) for site in found}
        return DecayState(step, with_selected(kept, params))

    def update(
        self, updates: PyTree, state: Any, params: PyTree = None
    ) -> tuple[PyTree, DecayState]:
        check_params(params, self.name)
        leaves, structure, found = paired(updates, params, self.mask)
        references = by_path(state.references)
        # Once, for a rate that is checked when it is known is checked at run time.
        rate = rate_at(self.rate, state.step)
        for i, site in found:
            dtype = emitted_dtype(site.leaf, leaves[i])
            weight, update = together(site.leaf, leaves[i])
            if self.reference is not None:
                reference = recorded(references.get(site.path), site, site.leaf)
                weight = weight - reference.astype(weight.dtype)
            decay = rate.astype(weight.dtype) * self.direction(weight, update)
            leaves[i] = (update + decay).astype(dtype)
        following_state = DecayState(following(state.step), state.references)
        return structure.unflatten(leaves), following_state


def _reference(references: dict[str, Any], site: Site) -> Array:
    reference, param = references.get(site.path), site.leaf
    if reference is None or reference.shape != param.shape:
        there = "none" if reference is None else f"one of shape {reference.shape}"
        raise ValueError(
            f"`reference` must have an array of shape {param.shape} at {site.shown}, "
            f"as the parameters do, and has {there}. Give the model itself, or leave "
            "this array out of `mask`."
        )
    # The optimiser's state may be donated, the reference may not.
    copy = jnp.array(reference, dtype=param.dtype, copy=True)
    if isinstance(param, jax.Array) and not isinstance(param, Tracer):
        return jax.device_put(copy, param.sharding)
    return copy
