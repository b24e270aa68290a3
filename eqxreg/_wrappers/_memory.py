"""What a stateful wrapper remembers of a weight, and when it looks further.

A vector that power iteration goes on from can miss a direction that overtakes it. So
some calls search a Krylov space first: often while the weight moves fast.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Inexact, Int

from .._linalg import anywhere, of_matrix, per_layer, search, squared_magnitude, widen
from .._maps import automatically_measured, over_blocks, to_matrices


class Memory(NamedTuple):
    """What a wrapper remembers of a weight from one call to the next."""

    vectors: Inexact[Array, "*stack blocks n"]
    """Singular vectors, one for each matrix."""
    wait: Int[Array, ""]
    """How many calls there are from one search to the next: few when weights move fast,
    many when they don't."""
    left: Int[Array, ""]
    """How many of them are left."""

    @classmethod
    def of(cls, vectors: Inexact[Array, "*stack blocks n"]) -> "Memory":
        # Two arrays, for a buffer that stands in two places cannot be donated.
        wait, left = jnp.ones((), jnp.int32), jnp.ones((), jnp.int32)
        return cls(vectors, wait, left)

    @property
    def due(self) -> Bool[Array, ""]:
        """Whether this call is to search."""
        return self.left <= 0

    def after(self, vectors: Inexact[Array, "*stack blocks n"]) -> "Memory":
        """What is remembered after a call that found these vectors."""
        inner = jnp.sum(jnp.conj(self.vectors) * vectors, axis=-1)
        turned = jnp.any(jnp.abs(inner) < math.cos(_CALM))
        longer = jnp.minimum(2 * self.wait, _LONGEST_WAIT)
        wait = jnp.where(turned, 1, jnp.where(self.due, longer, self.wait))
        left = jnp.where(turned | self.due, wait, self.left) - 1
        return Memory(vectors, wait, left)


_CALM = 0.03
"""The angle, in radians, up to which a vector may turn in a call without concern: the
error of the singular value is of the order of its square."""

_LONGEST_WAIT = 16


def search_matrices(
    blocks: int, weight_rank: int, due: Array, raw: Array, vectors: Array
) -> Array:
    def searched(weight: Array, vectors: Array) -> Array:
        matrices = to_matrices(weight, "unit", blocks)
        return over_blocks(lambda m, v: search(of_matrix(m), v), matrices, vectors)

    return search_if_due(searched, weight_rank, due, raw, vectors)


def search_if_due(
    searched: Callable, weight_rank: int, due: Array, raw: Array, vectors: Array
) -> Array:
    """The vectors to start from."""

    def started(raw: Array, vectors: Array, due: Array) -> Array:
        def all_searched(vectors: Array) -> Array:
            found = per_layer(searched, widen(raw), weight_rank, vectors)
            # Of a weight that is zero or not finite, nothing is found.
            size = jnp.sum(squared_magnitude(found), axis=-1, keepdims=True)
            return jnp.where(size > 0, found, vectors)

        return lax.cond(anywhere(due), all_searched, lambda v: v, vectors)

    raw, vectors = lax.stop_gradient((raw, vectors))
    return automatically_measured(started, raw, vectors, due)


# Compiled as a whole, for outside of `jit` a `cond` is compiled anew in every call.
search_matrices = jax.jit(search_matrices, static_argnums=(0, 1), inline=True)
