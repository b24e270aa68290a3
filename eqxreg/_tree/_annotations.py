"""The rank that the class of a module declares for one of its arrays.

A field may say it by its annotation, `weight: Float[Array, "out in"]`, or by its
metadata, `weight: Array = eqx.field(metadata={"ndim": 2})`. All axes before these are
those of a stack of modules.
"""

import collections.abc
import dataclasses
import functools as ft
import sys
import types
import typing
from typing import Any


def declared_rank(owner: Any, path: tuple[Any, ...]) -> int | None:
    """The rank of the array at `path` in a module of this type, as its class declares
    it; `None` if it doesn't."""
    if not path or not isinstance(path[0], str):
        return None
    return _declared(type(owner), *path)


@ft.cache
def _declared(cls: type, name: str, *keys: Any) -> int | None:
    field = getattr(cls, "__dataclass_fields__", {}).get(name)
    if field is None:
        return None
    if "ndim" in field.metadata:
        return _checked(field.metadata["ndim"], cls, name)
    # The class that declares a field shares it with those that inherit it.
    declaring = [
        base
        for base in cls.__mro__
        if getattr(base, "__dataclass_fields__", {}).get(name) is field
    ][-1]
    return _rank(_evaluated(field.type, declaring), keys, declaring)


def _checked(ndim: Any, cls: type, name: str) -> int:
    if isinstance(ndim, bool) or not isinstance(ndim, int) or ndim < 0:
        raise ValueError(
            f'`metadata={{"ndim": {ndim!r}}}` of `{cls.__name__}.{name}` must be the '
            "number of axes of the array in one module, an int that is not negative."
        )
    return ndim


def _evaluated(annotation: Any, declaring: type) -> Any:
    """An annotation; one that is a string, as it reads in the module of its class."""
    if isinstance(annotation, typing.ForwardRef):
        annotation = annotation.__forward_arg__
    if not isinstance(annotation, str):
        return annotation
    module = sys.modules.get(declaring.__module__)
    try:
        return eval(annotation, dict(vars(module)) if module else {})
    except Exception:
        # It names what is only there for type checkers, or local to a function.
        return None


def _rank(annotation: Any, keys: tuple[Any, ...], declaring: type) -> int | None:
    """The rank that an annotation gives to the array at `keys` of a field."""
    annotation = _evaluated(annotation, declaring)
    # `type Matrix = Float[Array, "out in"]`, and `NewType`.
    for alias in ("__value__", "__supertype__"):
        annotation = getattr(annotation, alias, annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Annotated, typing.Final):
        return _rank(arguments[0], keys, declaring)
    if origin in (typing.Union, types.UnionType):
        ranks = [
            _rank(a, keys, declaring) for a in arguments if a is not types.NoneType
        ]
        return ranks[0] if len(set(ranks)) == 1 else None
    if keys:
        inner = _item(annotation, origin, arguments, keys[0])
        # The leaves of a `PyTree[...]` are of one type, wherever they are.
        rest = () if hasattr(annotation, "leaftype") else keys[1:]
        return None if inner is None else _rank(inner, rest, declaring)
    return _rank_of_dims(getattr(annotation, "dim_str", None))


def _item(annotation: Any, origin: Any, arguments: tuple, key: Any) -> Any:
    """The annotation of the item `key` of a container; `None` if it has none."""
    if leaf := getattr(annotation, "leaftype", None):
        return leaf
    if isinstance(origin, type) and arguments:
        if issubclass(origin, tuple) and arguments[-1] is not Ellipsis:
            within = isinstance(key, int) and key < len(arguments)
            return arguments[key] if within else None
        if issubclass(origin, collections.abc.Mapping):
            return arguments[-1]
        if issubclass(origin, collections.abc.Sequence):
            return arguments[0]
    # A `NamedTuple` or a `TypedDict`.
    if isinstance(annotation, type) and not dataclasses.is_dataclass(annotation):
        if issubclass(annotation, tuple | dict):
            fields = annotation.__dict__.get("__annotations__", {})
            return fields.get(key)
    return None


def _rank_of_dims(dims: str | None) -> int | None:
    """The number of axes of jaxtyping's `"out in"`; `None` if it leaves that open."""
    if dims is None or "..." in dims or "*" in _first_letters(dims):
        return None
    return len(dims.split())


def _first_letters(dims: str) -> str:
    # `*stack`, or after other modifiers, `#*stack`.
    return "".join(dim[: len(dim) - len(dim.lstrip("*#_?"))] for dim in dims.split())
