"""Names of arrays within a layer, such as `"query_proj.weight"`.

A name is a key path, written with dots. It is relative to the plain layer: wrappers on
the way are looked through. Keys that a name with dots cannot hold are written as JAX
writes them, in brackets: `"params['fc.weight']"`, `"blocks['0'].weight"`. Every node
that JAX knows has such keys, so that names do not end at modules that are not
Equinox's.
"""

import ast
import dataclasses
import functools as ft
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._values import is_frozen, thawed
from ._modules import is_module, is_tied, is_wrapper
from ._ranks import rank


@dataclasses.dataclass(frozen=True)
class Written:
    """A key of a dict that is no literal, as its `repr`."""

    text: str


Step: TypeAlias = Any
"""A key, mostly a string or an int; `Written` for keys that cannot be read back."""
Path: TypeAlias = tuple[Step, ...]

_STEPS = re.compile(r"""([^.\[\]]+)|\[('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\]]+)\]""")
_PLAIN = re.compile(r"""[^.\[\]'"]+""")


@ft.cache
def parse(name: str) -> Path:
    """`"layers.0.weight"`, or `"layers[0].weight"`, as `("layers", 0, "weight")`, and
    `"params['fc.weight']"` as `("params", "fc.weight")`."""
    return tuple(
        _read(inside) if inside else _plain(bare)
        for bare, inside in _STEPS.findall(name)
    )


def _plain(text: str) -> str | int:
    return int(text) if text.isascii() and text.isdigit() else text


def _read(text: str) -> Step:
    """The key that stands in brackets."""
    if flat := re.fullmatch(r"<flat index (\d+)>", text):
        return int(flat[1])
    if text.isidentifier() and text not in ("None", "True", "False"):
        return text
    try:
        key = ast.literal_eval(text)
        hash(key)
    except (SyntaxError, TypeError, ValueError):
        return Written(text)
    return key


def key_of(entry: Any) -> Any:
    """The key, index or name that an entry of a key path stands for."""
    if isinstance(entry, jtu.SequenceKey):
        return entry.idx
    if isinstance(entry, jtu.GetAttrKey):
        return entry.name
    return getattr(entry, "key", str(entry))


def write(entries: Sequence[Any]) -> str:
    """A key path as a name, which `parse` reads."""
    text = ""
    for key in map(key_of, entries):
        is_index = type(key) is int and key >= 0
        is_name = type(key) is str and _PLAIN.fullmatch(key) and _plain(key) == key
        text += f".{key}" if is_index or is_name else f"[{key!r}]"
    return text.removeprefix(".")


def is_step(step: Step, entry: Any) -> bool:
    """Whether a step of a name is this entry of a key path. The key `"0"` of a dict may
    be written as an index."""
    key = key_of(entry)
    if isinstance(step, Written):
        return repr(key) == step.text
    if isinstance(step, str):
        return isinstance(key, str) and key == step
    if type(step) is int and isinstance(key, str):
        return key == str(step)
    return isinstance(key, bool) == isinstance(step, bool) and bool(key == step)


def is_path(path: Path, entries: Sequence[Any]) -> bool:
    """Whether a name, parsed, is that of this key path."""
    return len(path) == len(entries) and all(map(is_step, path, entries))


def words(keys: Sequence[Any]) -> tuple[str, ...]:
    """Keys as the words between the dots of a name, however it is written: the key
    `"fc.weight"` of a flat dict is two."""
    found = []
    for key in keys:
        found += key.split(".") if isinstance(key, str) else [_text(key)]
    return tuple(found)


def _text(key: Any) -> str:
    if isinstance(key, Written):
        return key.text
    return key if isinstance(key, str) else repr(key)


def check_names(weight_name: Any) -> str | tuple[str, ...]:
    """A name, or several different ones; else an error."""
    names = (weight_name,) if isinstance(weight_name, str) else weight_name
    several = (
        isinstance(names, Sequence)
        and len(names) > 0
        and all(isinstance(n, str) and parse(n) for n in names)
        and len({parse(n) for n in names}) == len(names)
    )
    if not several:
        raise ValueError(
            '`weight_name` must be a name such as "weight", a dotted path such as '
            '"query_proj.weight", or a sequence of different ones, got '
            f"{weight_name!r}."
        )
    return weight_name if isinstance(weight_name, str) else tuple(names)


def names_of(weight_name: str | tuple[str, ...]) -> tuple[str, ...]:
    """The names that a wrapper's `weight_name` stands for."""
    return (weight_name,) if isinstance(weight_name, str) else weight_name


def unwrapped(node: Any) -> Any:
    """The plain layer, as it is stored, within any number of wrappers."""
    while is_wrapper(node):
        node = node.layer
    return node


def children_of(node: Any) -> list[tuple[Any, Any]]:
    """The entries of the key paths to the children of a node, and these. A leaf has
    none."""
    found, _ = jtu.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [(entries[0], inner) for entries, inner in found if entries]


def child(node: Any, step: Step) -> Any:
    """The child `step` of a plain node; if it has none of that name, what it gives for
    that attribute or item."""
    for entry, inner in children_of(node):
        if is_step(step, entry):
            return inner
    if isinstance(step, str) and not isinstance(node, dict):
        return getattr(node, step)
    if isinstance(node, dict):
        raise KeyError(step)
    return node[step]


def with_child(node: Any, step: Step, new: Any) -> Any:
    """`node` with `new` for its child `step`."""
    children, structure = jtu.tree_flatten_with_path(
        node, is_leaf=lambda x: x is not node
    )
    inner = [value for _, value in children]
    for i, (entries, _) in enumerate(children):
        if entries and is_step(step, entries[0]):
            inner[i] = new
            return structure.unflatten(inner)
    return eqx.tree_at(lambda n: child(n, step), node, new)


def nodes_along(layer: Any, name: str) -> list[Any]:
    """The nodes on the way to the array `name`, wrappers still on: `layer` first, the
    array's owner last. Raises, naming what there is, if there is no such array."""
    nodes = [layer]
    for step in parse(name):
        node = unwrapped(nodes[-1])
        try:
            nodes.append(child(node, step))
        except (AttributeError, LookupError, TypeError):
            raise ValueError(
                f'`weight_name="{name}"`: {type(node).__name__} has no '
                f"`{_text(step)}`. {_what_there_is(node)}"
            ) from None
    return nodes[:-1]


def find_array(layer: Any, name: str) -> tuple[Any, str, Any]:
    """The owner of the raw array `name`, its name there, and the array itself, which
    may be tied to another. Raises if it is no floating or complex array."""
    *_, owner = nodes_along(layer, name)
    owner, step = unwrapped(owner), parse(name)[-1]
    leaf = thawed(child(owner, step))
    kind = type(owner).__name__
    if leaf is None:
        raise ValueError(
            f'`weight_name="{name}"` is None in this {kind}. Build the layer with it, '
            f"or name another array. {_what_there_is(owner)}"
        )
    dtype = getattr(leaf, "dtype", None)
    inexact = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
    if not (inexact or is_tied(leaf)):
        what = f"a {type(leaf).__name__}" if dtype is None else f"an array of {dtype}"
        raise TypeError(
            f'`weight_name="{name}"` must name a floating or complex array, and in '
            f"this {kind} it is {what}. {_what_there_is(owner)}"
        )
    return owner, _text(step), leaf


def stored_name(layer: Any, name: str) -> str:
    """`name`; where it leads through a property or the like, the name of the array that
    this gives. Raises if no such array is stored."""
    find_array(layer, name)
    place, is_direct = [], True
    for node, step in zip(nodes_along(layer, name), parse(name), strict=True):
        node = unwrapped(node)
        found = [entry for entry, _ in children_of(node) if is_step(step, entry)][:1]
        is_direct = is_direct and bool(found)
        found = found or _place_of(child(node, step), node)
        if not found:
            is_property = isinstance(getattr(type(node), str(step), None), property)
            raise ValueError(
                f'`weight_name="{name}"`: `{step}` of {type(node).__name__} is '
                f"{'a property, computed' if is_property else 'an attribute, found'} "
                "when it is read, and no array of the tree, so that no other can be "
                f"put in its place. Name one that is stored. {_what_there_is(node)}"
            )
        place += found
    return name if is_direct else write(place)


def _place_of(value: Any, node: Any) -> list[Any]:
    """The key path from a plain node to what is stored in it, wrappers looked through;
    empty if it is not."""
    for entry, inner in children_of(node):
        if inner is value:
            return [entry]
        if below := _place_of(value, unwrapped(inner)):
            return [entry, *below]
    return []


def rank_of(layer: Any, name: str, ndim: int) -> int:
    """The rank of the array `name` in one layer; `ndim` is the array's own."""
    nodes, path = [unwrapped(node) for node in nodes_along(layer, name)], parse(name)
    # The array may be in a list or a dict of its owner.
    start = max((i for i, node in enumerate(nodes) if is_module(node)), default=0)
    return rank(nodes[start], path[start:], ndim)


def _what_there_is(node: Any) -> str:
    places = list(_arrays_in(node))
    arrays = [f'"{write(place)}"' for place in places if len(place) == 1]
    if arrays:
        return f"It has {', '.join(arrays)}."
    if inside := dict.fromkeys(write(place[:1]) for place in places if place):
        names = ", ".join(f'"{name}"' for name in inside)
        return (
            f'It has no arrays itself; they are in {names}, as in "{write(places[0])}".'
        )
    return "It has no arrays."


def _arrays_in(node: Any) -> Iterator[tuple[Any, ...]]:
    """The key paths to the arrays in a node, wrappers looked through."""
    if is_frozen(node) or eqx.is_inexact_array(node):
        yield ()
        return
    for entry, inner in children_of(unwrapped(node)):
        for rest in _arrays_in(inner):
            yield (entry, *rest)
