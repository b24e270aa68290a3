"""`FrozenArray`, an array that nothing which trains a model takes for a weight.

What is differentiated, given moments, decayed, penalised or projected are floating
arrays. So a frozen array is kept as integers of the same bits. Unlike a constant it is
still data: passed to compiled functions, sharded, stacked, mapped over and saved as any
array is, and turning it back costs nothing.
"""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact, UInt

from ._norms import real_dtype


_Tree = TypeVar("_Tree")


class FrozenArray(eqx.Module):
    """The bits of a floating or complex array. Of a complex one, real and imaginary
    parts are along a last axis."""

    bits: UInt[Array, "..."] | Any
    dtype: str = eqx.field(static=True)

    @classmethod
    def of(cls, array: Inexact[Array, "..."]) -> "FrozenArray":
        parts = array
        if jnp.iscomplexobj(array):
            parts = jnp.stack([lax.real(array), lax.imag(array)], axis=-1)
        unsigned = jnp.dtype(f"uint{8 * parts.dtype.itemsize}")
        bits = lax.bitcast_convert_type(parts, unsigned)
        return cls(bits, jnp.dtype(array.dtype).name)

    @property
    def value(self) -> Inexact[Array, "..."] | Any:
        """The array. In trees that hold something else in place of arrays, that."""
        if not eqx.is_array(self.bits):
            return self.bits
        real = real_dtype(self.dtype)
        parts = lax.bitcast_convert_type(self.bits, real)
        if not jnp.issubdtype(self.dtype, jnp.complexfloating):
            return parts
        return lax.complex(parts[..., 0], parts[..., 1])


def is_frozen(node: Any) -> bool:
    return isinstance(node, FrozenArray)


def has_frozen(tree: Any) -> bool:
    """Whether there is a frozen array in `tree`."""
    return any(map(is_frozen, jax.tree.leaves(tree, is_leaf=is_frozen)))


def thawed(tree: _Tree) -> _Tree:
    """`tree` with ordinary arrays in the place of frozen ones; `tree` itself if there
    are none."""
    if not has_frozen(tree):
        return tree
    value = lambda node: node.value if is_frozen(node) else node
    return jax.tree.map(value, tree, is_leaf=is_frozen)
