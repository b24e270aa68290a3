"""Arrays that nothing which trains a model takes for a weight.

What is differentiated, given moments, decayed, penalised or projected are floating
arrays. So an array that is to stay as it is is kept as integers of the same bits: a
frozen array of a layer as a `FrozenArray`, what a map holds as a `Constant`. Unlike
what is compiled in it is still data: passed to compiled functions, sharded, stacked,
mapped over and saved as any array is.

Code that goes by `eqx.is_array` sees the integers. Their halves are kept apart, for a
float holds each integer of half its width exactly: arrays that are put into one vector
with them and taken out of it again are what they were. Whoever computes with them, to
average or to cast, makes floats of them, and that is an error when the array is read.
"""

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Inexact

from .._linalg import real_dtype


_Tree = TypeVar("_Tree")
_Kind = TypeVar("_Kind", bound="HiddenArray")


class HiddenArray:
    """The bits of a floating or complex array. It can be computed with as that array;
    what comes out is an ordinary one.

    `parts` are the halves of the bits, the upper one first, each of the shape of the
    array; of a complex one, real and imaginary parts are along a last axis. In trees
    that hold something else in place of arrays, that is in them.
    """

    parts: tuple[Any, ...]
    dtype: Any
    _what: ClassVar[str]
    _remedy: ClassVar[str]

    def __init__(self, parts: tuple[Any, ...], dtype: Any):
        self.parts = parts
        self.dtype = jnp.dtype(dtype)

    @classmethod
    def of(cls: type[_Kind], array: Inexact[Array, "..."] | np.ndarray) -> _Kind:
        array = jnp.asarray(array)
        parts = array
        if jnp.iscomplexobj(array):
            parts = jnp.stack([lax.real(array), lax.imag(array)], axis=-1)
        return cls(_halves(parts), array.dtype)

    @property
    def value(self) -> Inexact[Array, "..."] | Any:
        """The array. In trees that hold something else in place of arrays, that."""
        first = self.parts[0]
        if isinstance(first, _LeafWrapper):
            raise ValueError(
                f"`eqx.tree_at` cannot reach this array, for it is {self._what}. Use "
                "`eqxreg.thaw(model)` first, and `eqxreg.freeze` again afterwards."
            )
        if isinstance(first, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(self.shape, self.dtype)
        if not eqx.is_array(first):
            return first
        real = real_dtype(self.dtype)
        expected = _part_dtype(real)
        found = {part.dtype for part in self.parts}
        if found != {expected}:
            names = ", ".join(sorted(dtype.name for dtype in found))
            raise ValueError(
                f"An array of this model is {self._what}, and was computed with or "
                f"cast: its bits, integers of {expected.name}, have become {names}. "
                "This is what an average, a sum or a cast over `eqx.is_array` does to "
                f"it. {self._remedy}"
            )
        # An array that is known stays known, wherever it is read.
        known = (
            jax.ensure_compile_time_eval if self.is_known else contextlib.nullcontext
        )
        with known():
            joined = lax.bitcast_convert_type(self.bits, real)
            if not jnp.issubdtype(self.dtype, jnp.complexfloating):
                return joined
            return lax.complex(joined[..., 0], joined[..., 1])

    @property
    def bits(self) -> Array:
        """The bits, as integers of the width of the array's dtype."""
        upper, *lower = map(jnp.asarray, self.parts)
        if not lower:
            return upper
        half = upper.dtype.itemsize
        unsigned = np.dtype(f"uint{16 * half}")
        shift = jnp.asarray(8 * half, unsigned)
        shifted = lax.shift_left(
            upper.astype(unsigned), jnp.broadcast_to(shift, upper.shape)
        )
        return shifted | lower[0].astype(unsigned)

    @property
    def in_tree(self) -> Any:
        """This or, in trees that hold something else in place of arrays, that."""
        first = self.parts[0]
        return self if isinstance(first, _LeafWrapper) or _has_shape(first) else first

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.parts[0].shape
        is_complex = jnp.issubdtype(self.dtype, jnp.complexfloating)
        return shape[:-1] if is_complex else shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def is_known(self) -> bool:
        """Whether the array is known now, and not only when a program runs."""
        return not any(isinstance(part, Tracer) for part in self.parts)

    # As the array that it is: for `jnp`, for NumPy, for Python.

    def __jax_array__(self) -> Array:
        return self.value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.value, dtype=dtype)

    def __float__(self) -> float:
        return float(self.value)

    def __int__(self) -> int:
        return int(self.value)

    def __bool__(self) -> bool:
        return bool(self.value)

    def __round__(self, ndigits: int | None = None) -> Any:
        return round(self.value, ndigits)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)

    def __str__(self) -> str:
        return str(self.value)

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Array]:
        return iter(self.value)

    def __getitem__(self, index: Any) -> Array:
        return self.value[index]

    def __getattr__(self, name: str) -> Any:
        # Dunder names are how others ask what this is itself, and a half-built object,
        # as in `copy` or `pickle`, has no parts yet.
        if name.startswith("__") or "parts" not in vars(self):
            raise AttributeError(name)
        return getattr(self.value, name)

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        if not _has_shape(self.parts[0]):
            return repr(self.parts[0])
        return f"{self._what.split()[0]} {self.dtype.name}{list(self.shape)}"


def _as_array(compute: Callable) -> Callable:
    """An operator that computes with the array."""

    def method(self: HiddenArray, *others: Any) -> Any:
        return compute(self.value, *(value_of(other) for other in others))

    return method


for _name in ("neg", "pos", "abs"):
    setattr(HiddenArray, f"__{_name}__", _as_array(getattr(operator, _name)))
for _name in ("lt", "le", "eq", "ne", "gt", "ge"):
    setattr(HiddenArray, f"__{_name}__", _as_array(getattr(operator, _name)))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
    _compute = getattr(operator, _name)
    setattr(HiddenArray, f"__{_name}__", _as_array(_compute))
    setattr(
        HiddenArray,
        f"__r{_name}__",
        _as_array(lambda own, other, compute=_compute: compute(other, own)),
    )


class FrozenArray(HiddenArray):
    """A frozen array of a layer."""

    _what = "frozen by `eqxreg.freeze`"
    _remedy = (
        "Filter by `eqx.is_inexact_array`, which leaves frozen arrays out, or use "
        "`eqxreg.thaw(model)` first and `eqxreg.freeze` again afterwards; to cast, use "
        "`eqxreg.cast(model, dtype)`."
    )


class Constant(HiddenArray):
    """An array that a map holds."""

    _what = "constant, held by a map of eqxreg"
    _remedy = (
        "Filter by `eqx.is_inexact_array`, which leaves it out, or build the "
        "constraint anew."
    )


def _register(cls: type[HiddenArray], word: str) -> None:
    # JAX names the leaf in its errors when trees don't match, as those do that were
    # filtered by `eqx.is_array` and by `eqx.is_inexact_array`. So the name says why.
    names = [f"{word}_so_filter_by_is_inexact_array_{i}" for i in range(2)]

    def flatten_with_keys(hidden: HiddenArray):
        keys = (jtu.GetAttrKey(name) for name in names)
        return tuple(zip(keys, hidden.parts, strict=False)), hidden.dtype.name

    def flatten(hidden: HiddenArray):
        return hidden.parts, hidden.dtype.name

    def unflatten(dtype: str, parts: Any) -> HiddenArray:
        return cls(tuple(parts), dtype)

    jtu.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


_register(FrozenArray, "frozen")
_register(Constant, "constant")


def is_frozen(node: Any) -> bool:
    return isinstance(node, FrozenArray)


def _is_hidden(node: Any) -> bool:
    return isinstance(node, HiddenArray)


def is_constant(node: Any) -> bool:
    return isinstance(node, Constant)


def has_frozen(tree: Any) -> bool:
    """Whether there is a frozen array in `tree`."""
    return any(map(is_frozen, jax.tree.leaves(tree, is_leaf=is_frozen)))


def thawed(tree: _Tree) -> _Tree:
    """`tree` with ordinary arrays in the place of frozen ones; `tree` itself if there
    are none."""
    return _revealed(tree, is_frozen)


def frozen_as(old: Any, new: _Tree) -> _Tree:
    """`new` with frozen arrays wherever `old`, a tree like it, has some."""
    if not has_frozen(old):
        return new
    places = jax.tree.leaves(old, is_leaf=_is_hidden)
    leaves, structure = jax.tree.flatten(new, is_leaf=_is_hidden)
    pairs = zip(places, leaves, strict=True)
    return structure.unflatten(
        [FrozenArray.of(value_of(x)) if is_frozen(place) else x for place, x in pairs]
    )


def opened(tree: _Tree) -> _Tree:
    """`tree` with ordinary arrays in the place of constants; `tree` itself if there are
    none."""
    return _revealed(tree, is_constant)


def value_of(array: Any) -> Any:
    """The ordinary array for a frozen one or a constant; anything else as it is."""
    return array.value if isinstance(array, HiddenArray) else array


def _has_shape(array: Any) -> bool:
    return eqx.is_array(array) or isinstance(array, jax.ShapeDtypeStruct)


def _revealed(tree: _Tree, is_hidden: Callable[[Any], bool]) -> _Tree:
    if not any(map(is_hidden, jax.tree.leaves(tree, is_leaf=is_hidden))):
        return tree
    value = lambda node: node.value if is_hidden(node) else node
    return jax.tree.map(value, tree, is_leaf=is_hidden)


def _part_dtype(real: Any) -> np.dtype:
    """The integers that the bits of this floating dtype are kept in: of half its width,
    if it has more than one byte."""
    size = jnp.dtype(real).itemsize
    return np.dtype(f"uint{8 * max(size // 2, 1)}")


def _halves(parts: Array) -> tuple[Array, ...]:
    unsigned = np.dtype(f"uint{8 * parts.dtype.itemsize}")
    half = _part_dtype(parts.dtype)
    bits = lax.bitcast_convert_type(parts, unsigned)
    if half == unsigned:
        return (bits,)
    shift = jnp.asarray(8 * half.itemsize, unsigned)
    upper = lax.shift_right_logical(bits, jnp.broadcast_to(shift, bits.shape))
    # Of what does not fit, the conversion keeps the lower half.
    return upper.astype(half), bits.astype(half)


def _leaf_wrapper_type() -> type:
    # What `eqx.tree_at` puts in the place of leaves is not public, so we look at one.
    seen = []

    def where(tree: tuple) -> Any:
        seen.append(type(tree[0]))
        return tree[0]

    eqx.tree_at(where, (0.0,), 1.0)
    return seen[-1]


_LeafWrapper = _leaf_wrapper_type()
