"""An upper bound of a network's Lipschitz constant, from those of its layers."""

import functools as ft
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._linalg import widen
from .._models import bake
from ._layers import LAYER_RULES, Bound, Rule
from ._slopes import NoBound, Shape, slope


_AnyRule = TypeVar("_AnyRule", bound=Callable[[Any, Any], Any])
_RuleWithPlace: TypeAlias = Callable[[Any, Shape, str], Bound]

_registered: dict[type, Rule] = {}


class _LipschitzBound:
    """What `lipschitz_bound` is: a function that rules can be registered with, as with
    `functools.singledispatch`."""

    def __init__(self, function: Callable[..., Float[Array, ""]]):
        self._function = function
        ft.update_wrapper(self, function)

    def __call__(
        self, model: PyTree, input_shape: Sequence[int] | None = None
    ) -> Float[Array, ""]:
        return self._function(model, input_shape)

    def register(self, layer_type: Any) -> Callable[[_AnyRule], _AnyRule]:
        """Registers a rule for a layer type and its subclasses, in the place of any
        other: `@eqxreg.lipschitz_bound.register(MyLayer)`.

        **Arguments:**

        - `layer_type`: a class.

        **Returns:**

        A decorator for `rule(layer, input_shape)`, which returns an upper bound in the
        l2 norm: a non-negative number or real scalar array. `layer` has its wrappers
        baked; `input_shape` is a tuple without batch, or `None` if it is not known.

        **Raises:**

        - `TypeError`: if `layer_type` is no class.
        """
        if not isinstance(layer_type, type):
            raise TypeError(
                "`lipschitz_bound.register` takes a class, as in "
                f"`@eqxreg.lipschitz_bound.register(MyLayer)`, got {layer_type!r}."
            )

        def decorator(rule: _AnyRule) -> _AnyRule:
            _registered[layer_type] = rule
            return rule

        return decorator


@_LipschitzBound
def lipschitz_bound(
    model: PyTree, input_shape: Sequence[int] | None = None
) -> Float[Array, ""]:
    r"""An upper bound $L$ of the Lipschitz constant of a network, layer by layer:

    $$\lVert f(x) - f(y) \rVert_2 \le L \lVert x - y \rVert_2, \qquad
    L = \prod_i L_i.$$

    It is never below the truth, for rounding errors have a margin in it. How far above
    it is depends on the network: for linear layers $L_i$ is the largest singular value,
    to 1e-4 for up to 4096 features and 3e-4 for 65,536 (2e-5 in double precision); for
    convolutions of large images to 0.5 % (three spatial axes: 1.5 %); for activations
    the largest slope. A product of these is far above the truth for an
    ordinary network, and near it for one of orthogonal weights and
    [`eqxreg.MaxMin`][].

    Known are `eqx.nn.Linear`, convolutions and transposed convolutions, pooling,
    `PReLU`, `Identity`, `Lambda`, `Sequential`, `MLP`, [`eqxreg.MaxMin`][],
    [`eqxreg.GroupSort`][] and the usual activations of `jax.nn`, by themselves or as
    `functools.partial` with plain numbers. `Dropout` counts as in inference. Wrappers
    are baked first. Teach it a layer of your own with

    ```python
    @eqxreg.lipschitz_bound.register(MyLayer)
    def _(layer, input_shape):
        return 2 * eqxreg.lipschitz_bound(layer.inner, input_shape)
    ```

    It may be used under `jit`, and differentiated with respect to the weights. It is
    the bound of the exact function: what the rounding errors of a forward pass add is
    not in it.

    **Arguments:**

    - `model`: a layer, or a function of the known ones.
    - `input_shape`: the full shape of the input without batch, such as
        `(channels, height, width)`. It is needed for some padding modes only, and makes
        the bounds of adaptive pooling smaller. Defaults to `None`: not known.

    **Returns:**

    A real scalar in at least single precision.

    **Raises:**

    - `ValueError`: if there is a layer that has no bound or needs `input_shape`, with
        its path in the model and what to do; or a wrapper that needs a state, when
        you can bound `eqxreg.bake(model, state)`.

    !!! example

        ```python
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> linear = eqx.nn.Linear(2, 2, key=jax.random.key(0))
        >>> weight = jnp.array([[3.0, 0.0], [0.0, 4.0]])
        >>> linear = eqx.tree_at(lambda l: l.weight, linear, weight)
        >>> model = eqx.nn.Sequential([linear, eqx.nn.Lambda(jax.nn.sigmoid), linear])
        >>> print(f"{eqxreg.lipschitz_bound(model):.3f}")
        4.000

        ```

    ??? cite

        The largest singular values: [Efficient Bound of Lipschitz Constant for
        Convolutional Layers by Gram Iteration](https://arxiv.org/abs/2305.16173),
        Delattre, Barthélemy, Araujo and Allauzen, 2023. Attention: [The Lipschitz
        Constant of Self-Attention](https://arxiv.org/abs/2006.04710), Kim, Papamakarios
        and Mnih, 2021.
    """
    shape = None if input_shape is None else tuple(int(n) for n in input_shape)
    try:
        plain = bake(model)
    except ValueError as error:
        raise ValueError(
            f"`lipschitz_bound` bakes its model first. {error} Then bound what that "
            "returns."
        ) from error
    return _rounded_up(_bound(plain, shape, ""))


def _bound(node: Any, input_shape: Shape, path: str) -> Bound:
    """The bound of the node at `path`: a number where it depends on no weight."""
    try:
        for cls in type(node).__mro__:
            if cls in _registered:
                return _checked(_registered[cls](node, input_shape), cls)
            if cls in _CONTAINERS:
                _check_call(node, cls)
                return _CONTAINERS[cls](node, input_shape, path)
            if cls in LAYER_RULES:
                _check_call(node, cls)
                return LAYER_RULES[cls](node, input_shape)
        if callable(node) and not isinstance(node, eqx.Module):
            return slope(node, input_shape)
        name = type(node).__name__
        raise NoBound(
            f"is a {name}, for which no Lipschitz bound is known. Register one with "
            f"`@eqxreg.lipschitz_bound.register({name})` on a function of "
            "`(layer, input_shape)`."
        )
    except NoBound as error:
        raise ValueError(f"{_place(path)} {error}") from None


def _place(path: str) -> str:
    return f"`{path}`" if path else "The model"


def _check_call(node: Any, cls: type) -> None:
    """The rule for `cls` holds for what the calls of `cls` compute."""
    name = type(node).__name__
    if type(node).__call__ is not cls.__call__:
        raise NoBound(
            f"is a {name}, which is called differently than a {cls.__name__}. Register "
            f"its bound with `@eqxreg.lipschitz_bound.register({name})`."
        )


def _checked(bound: Any, cls: type) -> Bound:
    """What a registered rule has returned, if it is a bound."""
    if isinstance(bound, jax.Array) and bound.shape == ():
        if jnp.issubdtype(bound.dtype, jnp.floating):
            return widen(bound)
    elif isinstance(bound, int | float | np.number) and bound >= 0:
        return float(bound)
    raise ValueError(
        f"The rule for {cls.__name__} that is registered with `lipschitz_bound` must "
        f"return a non-negative number or a real scalar array, got {bound!r}."
    )


def _sequential(model: eqx.nn.Sequential, input_shape: Shape, path: str) -> Bound:
    bounds: list[Bound] = []
    for i, layer in enumerate(model.layers):
        place = f"{path}.layers[{i}]"
        bounds.append(_bound(layer, input_shape, place))
        if input_shape is not None:
            input_shape = _output_shape(layer, input_shape, place)
    return _product(bounds)


def _output_shape(layer: Any, input_shape: tuple[int, ...], path: str) -> Shape:
    layer = eqx.nn.inference_mode(layer)
    takes_key = "key" in inspect.signature(layer).parameters

    def call(x):
        return layer(x, key=jax.random.key(0)) if takes_key else layer(x)

    errors = []
    for dtype in _input_dtypes(layer):
        x = jax.ShapeDtypeStruct(input_shape, dtype)
        try:
            # What the layer adds to its input may be of yet another precision.
            with jax.numpy_dtype_promotion("standard"):
                return tuple(jax.eval_shape(call, x).shape)
        except Exception as error:
            errors.append(error)
    raise ValueError(
        f"{_place(path)} cannot be called with an array of shape {input_shape}, "
        "which is what `input_shape` leads to. It is the full shape without batch, "
        f"`(channels, *spatial)`. The layer says: {errors[0]}"
    ) from errors[0]


def _input_dtypes(layer: Any) -> list[jnp.dtype]:
    """What the input of a layer may be: of a dtype of its arrays, and the first ones
    first; or, if it has none, of any."""
    arrays = filter(eqx.is_inexact_array, jax.tree.leaves(layer))
    default = jnp.dtype(jnp.result_type(float))
    return list(dict.fromkeys([*(a.dtype for a in arrays), default]))


def _lambda(layer: eqx.nn.Lambda, input_shape: Shape, path: str) -> Bound:
    return _bound(layer.fn, input_shape, f"{path}.fn")


def _mlp(model: eqx.nn.MLP, input_shape: Shape, path: str) -> Bound:
    del input_shape
    shape = () if model.in_size == "scalar" else (model.in_size,)
    bounds: list[Bound] = []
    for i, layer in enumerate(model.layers):
        place = f"{path}.layers[{i}]"
        # The layers between the first and the last, as one stack.
        if getattr(model, "scan", False) and 0 < i < len(model.layers) - 1:
            bounds.extend(_each(layer, shape, place))
        else:
            bounds.append(_bound(layer, shape, place))
        shape = (model.width_size,)
    place = f"{path}.activation"
    if _has_arrays(model.activation):
        # It has weights of its own for each layer and feature.
        of_features = eqx.filter_vmap(lambda f: jnp.max(_each(f, (), place)))
        bounds.extend(of_features(model.activation))
    else:
        bounds.extend([_bound(model.activation, (), place)] * model.depth)
    final, place = model.final_activation, f"{path}.final_activation"
    if _has_arrays(final) and model.out_size != "scalar":
        bounds.append(jnp.max(_each(final, (), place)))
    else:
        bounds.append(_bound(final, (), place))
    if model.depth == 0:
        # Some versions of Equinox leave out the final activation then, others do not.
        last = bounds[-1]
        is_array = isinstance(last, jax.Array)
        bounds[-1] = jnp.maximum(last, 1) if is_array else max(last, 1.0)
    return _product(bounds)


def _has_arrays(node: Any) -> bool:
    return any(eqx.is_array(leaf) for leaf in jax.tree.leaves(node))


def _each(stack: Any, input_shape: Shape, path: str) -> Float[Array, " layers"]:
    """The bounds of the layers of a stack."""
    return eqx.filter_vmap(lambda x: jnp.asarray(_bound(x, input_shape, path)))(stack)


_CONTAINERS: dict[type, _RuleWithPlace] = {
    eqx.nn.Sequential: _sequential,
    eqx.nn.Lambda: _lambda,
    eqx.nn.MLP: _mlp,
}


def _product(bounds: Iterable[Bound]) -> Bound:
    """The product, rounded up; exactly one if all are."""
    bounds = list(bounds)
    numbers = [b for b in bounds if not isinstance(b, jax.Array) and b != 1]
    arrays = [b for b in bounds if isinstance(b, jax.Array)]
    number = ft.reduce(lambda a, b: math.nextafter(a * b, math.inf), numbers, 1.0)
    if not arrays:
        return number
    dtype = max((a.dtype for a in arrays), key=lambda d: jnp.finfo(d).bits)
    total, *rest = [a.astype(dtype) for a in arrays]
    for factor in rest if number == 1 else [*rest, number]:
        zero = (total == 0) | (factor == 0)
        product = total * factor * (1 + 4 * float(jnp.finfo(dtype).eps))
        # What underflows is not zero.
        total = jnp.where(zero, product, jnp.maximum(product, jnp.finfo(dtype).tiny))
    return total


def _rounded_up(bound: Bound) -> Float[Array, ""]:
    """A number as an array that is not below it."""
    if isinstance(bound, jax.Array):
        return bound
    dtype = np.dtype(jnp.result_type(float))
    nearest = dtype.type(bound)
    above = np.nextafter(nearest, dtype.type(np.inf))
    return jnp.asarray(nearest if nearest >= bound else above)
