"""What all transforms do with the parameters: ask for them, choose among them, and say
as an update where they are to arrive."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Inexact, Int, PyTree

from .._norms import widen
from .._select import Site, require_selection, sites


def check_params(params: Any, name: str) -> None:
    """Raises if a transform has been given no parameters."""
    if params is None:
        raise ValueError(
            f"`eqxreg.{name}` needs the parameters: call "
            "`optimiser.update(grads, state, params)`, with "
            "`params=eqx.filter(model, eqx.is_inexact_array)`."
        )


def chosen_params(mask: Any, params: PyTree) -> Iterator[tuple[int, Array, Site]]:
    """The arrays that `mask` selects: the number of each among the leaves, the array,
    and where it is. An error if there are none."""
    chosen = require_selection(mask, params, "mask")
    found = zip(jax.tree.leaves(params), sites(params), chosen, strict=True)
    return ((i, p, site) for i, (p, site, c) in enumerate(found) if c)


def moved(
    param: Inexact[Array, "*shape"], update: Inexact[Array, "*shape"]
) -> Inexact[Array, "*shape"]:
    """Where an update takes a weight."""
    return (widen(param) + widen(update)).astype(param.dtype)


def change(
    param: Inexact[Array, "*shape"], new: Inexact[Array, "*shape"], dtype
) -> Inexact[Array, "*shape"]:
    """The update that takes a weight to `new`, up to rounding; exactly, if that is
    zero."""
    return (widen(new) - widen(param)).astype(dtype)


def following(step: Int[Array, ""]) -> Int[Array, ""]:
    """The number of the next update."""
    return jnp.asarray(optax.safe_increment(step))
