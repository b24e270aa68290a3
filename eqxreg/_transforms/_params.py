"""What all transforms do with the parameters: ask for them, and say as an update where
they are to arrive."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Inexact, Int

from .._norms import widen


def check_params(params: Any, name: str) -> None:
    """Raises if a transform has been given no parameters."""
    if params is None:
        raise ValueError(
            f"`eqxreg.{name}` needs the parameters: call "
            "`optimiser.update(grads, state, params)`, with "
            "`params=eqx.filter(model, eqx.is_inexact_array)`."
        )


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
