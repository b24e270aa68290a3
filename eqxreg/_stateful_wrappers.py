"""`SpectralNormConstraint`, which remembers singular vectors in an `eqx.nn.State`."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Inexact, Int, PRNGKeyArray

from ._bits import opened
from ._layers import is_tied
from ._linear import check_fits, check_input_shape, linear_part
from ._maps import SpectralNorm
from ._maps._bounds import Bound
from ._maps._matrix import automatically_measured, over_blocks, to_matrices
from ._maps._scale_norm import Measure, cold, scale_norm, sure, warm
from ._norms import anywhere, per_layer, squared_magnitude, widen
from ._paths import names_of, parse
from ._singular import LinearMap, fixed_vector, of_matrix, search, unit
from ._wrappers import Constraint, current


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


class SpectralNormConstraint(Constraint):
    r"""Divides a layer's weight by its largest singular value: the layer computes with
    $c\, W / \sigma_1(W)$.

    Like `eqx.nn.SpectralNorm` it is stateful, called as `(out, state) = layer(x,
    state)`: the singular vectors are remembered, and each call in training improves
    them by a step of power iteration. They start as those of the weight that is
    wrapped, found to about 1e-6, so that the first call is as good as all others.

    In inference, under `eqx.nn.inference_mode` and in [`eqxreg.bake`][], the state is
    where a search starts, and no more: $\sigma_1$ is found to a relative error of 1e-3
    whatever the vectors are, of this weight or of another, averaged or zero. Every call
    gives the same bits, and the vectors stay as they are. From good ones a call takes
    12 products where all other singular values are less than half as large, 35 where
    they come within a tenth, and about 100 where they crowd at the top, as those of
    convolutions do; from others, 50 to 150 more. A baked model pays nothing per call.

    With `input_shape`, what is bounded is the norm of the layer as an operator: for a
    convolution the true one, with its stride, padding, dilation and groups, and not
    that of its kernel as a matrix.

    The gradient is $\frac{c}{\sigma_1} (G - \frac{1}{\sigma_1} \langle W, G \rangle\,
    u v^H)$, with the singular vectors as constants. A zero weight stays zero, with the
    gradient of the identity.

    The power iteration is two products, whose second one $\sigma_1$ is read off. Since
    a single vector may miss a direction that overtakes it, some calls search a Krylov
    space of eight dimensions first: every one while the weight moves fast, and every
    sixteenth when it doesn't.

    Called without a state, as a layer within `eqx.nn.WeightNorm` is, it returns the
    output alone and computes $\sigma_1$ anew, as [`eqxreg.SpectralNorm`][] does.

    In `eqx.nn.MLP` or a recurrent cell, which pass no state on, use
    `Constraint(layer, "weight", SpectralNorm())`, which says what it costs.

    !!! example

        ```python
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> key = jax.random.key(0)
        >>> conv = eqx.nn.Conv2d(3, 8, 3, padding=1, key=key)
        >>> conv, state = eqx.nn.make_with_state(eqxreg.SpectralNormConstraint)(
        ...     conv, "weight", input_shape=(3, 16, 16), key=key
        ... )
        >>> out, state = conv(jnp.ones((3, 16, 16)), state)
        >>> plain = eqxreg.bake(conv, state)
        >>> print(eqxreg.operator_norm(plain, (3, 16, 16)).round(3))
        1.0

        ```

    ??? cite

        [Spectral Normalization for Generative Adversarial
        Networks](https://arxiv.org/abs/1802.05957), Miyato, Kataoka, Koyama and
        Yoshida.
    """

    num_power_iterations: int = eqx.field(static=True)
    input_shape: tuple[int, ...] | None = eqx.field(static=True)
    inference: bool
    _memories: tuple[eqx.nn.StateIndex, ...]
    _has_state: ClassVar[bool] = True

    def __init__(
        self,
        layer: Any,
        weight_name: str | Sequence[str] = "weight",
        norm: Bound = 1.0,
        *,
        num_power_iterations: int = 1,
        input_shape: Sequence[int] | None = None,
        blocks: int = 1,
        inference: bool = False,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `layer`, `weight_name`: as in [`eqxreg.Constraint`][]. The name defaults to
            `"weight"`.
        - `norm`: the spectral norm $c$: a positive number or JAX scalar array. Defaults
            to 1.
        - `num_power_iterations`: the number of steps in each call. Defaults to 1.
            (Keyword only argument.)
        - `input_shape`: the full shape of the layer's input without batch, `(channels,
            *spatial)`, to bound the norm of the layer that owns the weight as an
            operator. Defaults to none: the norm of the weight as a matrix. (Keyword
            only argument.)
        - `blocks`: as in [`eqxreg.SpectralNorm`][]. (Keyword only argument.)
        - `inference`: whether the vectors stay as they are and the singular value is
            searched for; `eqx.nn.inference_mode` sets it. (Keyword only argument.)
        - `key`: a `jax.random.key`, for the vectors to start from. (Keyword only
            argument.)

        **Raises:**

        - `ValueError`: if `num_power_iterations` is not a positive int, `input_shape`
            is no input of the layer or is combined with `blocks`, the weight is tied to
            another by `eqx.nn.Shared`, or as [`eqxreg.Constraint`][] and
            [`eqxreg.SpectralNorm`][] do.
        - `TypeError`: as [`eqxreg.Constraint`][] does.
        """
        steps = num_power_iterations
        is_int = isinstance(steps, int | np.integer) and not isinstance(steps, bool)
        if not is_int or steps < 1:
            raise ValueError(
                f"`num_power_iterations` must be a positive int, got {steps!r}."
            )
        if input_shape is not None:
            input_shape = check_input_shape(input_shape)
            if blocks != 1:
                raise ValueError(
                    "`blocks` is for the weight as a matrix, and has no meaning for "
                    f"the norm of the operator: got `blocks={blocks}` with "
                    f"`input_shape={input_shape}`."
                )
        super().__init__(layer, weight_name, SpectralNorm(norm, blocks=blocks))
        self.num_power_iterations = int(steps)
        self.input_shape = input_shape
        self.inference = inference
        names = names_of(self.weight_name)
        keys = jax.random.split(key, len(names))
        self._memories = tuple(
            eqx.nn.StateIndex(Memory.of(self._first(i, name, keys[i])))
            for i, name in enumerate(names)
        )

    def _first(self, i: int, name: str, key: PRNGKeyArray) -> Array:
        """The singular vectors of the weight that is wrapped."""
        owner, weight = current(self.layer, name)
        if is_tied(weight):
            raise ValueError(
                f'`weight_name="{name}"` is tied to another array by `eqx.nn.Shared`, '
                "and has no singular vectors of its own. Wrap the layer that it is "
                "tied to, or use `eqxreg.Constraint` with `eqxreg.SpectralNorm`."
            )
        if self.input_shape is not None:
            single = jax.ShapeDtypeStruct(
                weight.shape[weight.ndim - self._rank(i) :], weight.dtype
            )
            check_fits(owner, str(parse(name)[-1]), single, self.input_shape)

        def first(weight: Array) -> Array:
            shape = self._start_shape(i, weight)
            start = jax.random.normal(key, shape, widen(weight).dtype)
            start = jax.vmap(lambda x: unit(x)[0])(start)
            measure = cold(self._linear(name, owner))
            return self._measured(i, weight, measure, start)[1]

        weight_rank = self._rank(i)
        if self.input_shape is None:
            return per_layer(first, weight, weight_rank)
        return jax.jit(lambda w: per_layer(first, w, weight_rank))(weight)

    def _constrained(
        self,
        i: int,
        owner: Any,
        raw: Any,
        state: Any,
        *,
        inference: bool | None,
        to_multiply: bool,
    ) -> tuple[Any, Any]:
        linear = self._linear(names_of(self.weight_name)[i], owner)
        if state is None:
            return self._anew(i, linear, raw), None
        is_inference = self.inference if inference is None else inference
        steps = self.num_power_iterations
        measure = sure(linear) if is_inference else warm(steps, linear)
        index = self._memories[i]
        memory = state.get(index)
        starts = memory.vectors
        if not is_inference:
            starts = self._started(i, linear, raw, memory)
        weight, vectors = None, starts
        if to_multiply and self.input_shape is None:
            weight, vectors = self._map(i).factored(raw, measure, starts)
        if weight is None:
            measured = lambda raw, starts: self._measured(i, raw, measure, starts)
            weight, vectors = per_layer(measured, raw, self._rank(i), starts)
        if is_inference:
            return weight, state
        return weight, state.set(index, memory.after(vectors))

    def _anew(self, i: int, linear: Callable, raw: Array) -> Array:
        """The constrained weight, without a memory."""
        p = self._map(i)

        def constrained(weight: Array) -> Array:
            if self.input_shape is None:
                return p(weight)
            start = fixed_vector(math.prod(self.input_shape), widen(weight).dtype)
            return self._measured(i, weight, cold(linear), start[None])[0]

        return per_layer(constrained, raw, self._rank(i))

    def _started(
        self, i: int, linear: Callable[[Array], LinearMap], raw: Array, memory: Memory
    ) -> Array:
        """The vectors to start from in a call: searched for, if that is due."""
        weight_rank, (vectors, *_) = self._rank(i), memory
        if self.input_shape is None:
            blocks = self._map(i).blocks
            return _search_matrices(blocks, weight_rank, memory.due, raw, vectors)

        def searched(weight: Array, vectors: Array) -> Array:
            return search(linear(weight), vectors[0])[None]

        return _search_if_due(searched, weight_rank, memory.due, raw, vectors)

    def _rank(self, i: int) -> int:
        weight_rank = self._ranks[i]
        assert weight_rank is not None
        return weight_rank

    def _map(self, i: int) -> SpectralNorm:
        p = opened(self.parametrizations[i])
        assert isinstance(p, SpectralNorm)
        return p

    def _linear(self, name: str, owner: Any) -> Callable[[Array], LinearMap]:
        if self.input_shape is None:
            return of_matrix
        return linear_part(owner, str(parse(name)[-1]), self.input_shape)

    def _start_shape(self, i: int, weight: Array) -> tuple[int, int]:
        """The shape of the vectors for one weight: one for each matrix."""
        if self.input_shape is not None:
            return 1, math.prod(self.input_shape)
        return jax.eval_shape(self._map(i).cold_start, weight).shape

    def _measured(
        self, i: int, weight: Array, measure: Measure, starts: Array
    ) -> tuple[Array, Array]:
        """The constrained weight, and the vectors to start from next time."""
        p = self._map(i)
        if self.input_shape is None:
            return p.measured(weight, measure, starts)
        weight, start = scale_norm(p.plan(weight.dtype), measure, weight, starts[0])
        return weight, start[None]


def _search_matrices(
    blocks: int, weight_rank: int, due: Array, raw: Array, vectors: Array
) -> Array:
    def searched(weight: Array, vectors: Array) -> Array:
        matrices = to_matrices(weight, "unit", blocks)
        return over_blocks(lambda m, v: search(of_matrix(m), v), matrices, vectors)

    return _search_if_due(searched, weight_rank, due, raw, vectors)


def _search_if_due(
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
_search_matrices = jax.jit(_search_matrices, static_argnums=(0, 1), inline=True)
