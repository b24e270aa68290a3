"""One layer of a stack at a time, and conditions that stay conditions under `vmap`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact


def per_layer(
    fn: Callable, weight: Inexact[Array, "..."], rank: int, *others: Any
) -> Any:
    """`fn(weight, *others)` for each array of rank `rank` in the stack `weight`, and
    what goes with it in the others."""
    for _ in range(weight.ndim - rank):
        fn = jax.vmap(fn)
    return fn(weight, *others)


@jax.custom_batching.custom_vmap
def anywhere(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """`flag`; under `vmap`, whether any of them is true. So a `cond` on it stays one,
    where `vmap` would turn it into a `select` that pays for both sides every time."""
    return flag


@anywhere.def_vmap
def _(axis_size, in_batched, flag):
    del axis_size, in_batched
    return anywhere(jnp.any(flag, axis=0)), False
