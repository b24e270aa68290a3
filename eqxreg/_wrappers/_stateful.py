"""The wrappers that remember singular vectors in an `eqx.nn.State`.

They differ in their map, and `SpectralConstraint` is all the rest; what is remembered
is in `_memory.py`.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .._linalg import fixed_vector, of_matrix, per_layer, search, unit, widen
from .._maps import Measure, SpectralNorm, SpectralScale, cold, scale_norm, sure, warm
from .._tree import (
    InputShape,
    InputShapeLike,
    Operator,
    check_fits,
    check_input_shape,
    is_tied,
    names_of,
    operator_of,
    parse,
)
from .._values import Bound, opened
from ._constraint import Constraint, Met, current
from ._memory import Memory, search_if_due, search_matrices


class SpectralConstraint(Constraint):
    """A layer with its weight scaled by its largest singular value, as a map says."""

    num_power_iterations: int = eqx.field(static=True)
    input_shape: InputShape | None = eqx.field(static=True)
    inference: bool
    _memories: tuple[eqx.nn.StateIndex, ...]
    _has_state: ClassVar[bool] = True

    def __init__(
        self,
        layer: Any,
        weight_name: str | Sequence[str],
        p: SpectralNorm | SpectralScale,
        num_power_iterations: int,
        input_shape: InputShapeLike | None,
        inference: bool,
        key: PRNGKeyArray,
    ):
        steps = num_power_iterations
        is_int = isinstance(steps, int | np.integer) and not isinstance(steps, bool)
        if not is_int or steps < 1:
            raise ValueError(
                f"`num_power_iterations` must be a positive int, got {steps!r}."
            )
        if input_shape is not None:
            input_shape = check_input_shape(input_shape)
            if p.blocks != 1:
                raise ValueError(
                    "`blocks` is for the weight as a matrix, and has no meaning for "
                    f"the norm of the operator: got `blocks={p.blocks}` with "
                    f"`input_shape={input_shape!r}`."
                )
        super().__init__(layer, weight_name, p)
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
            single = jax.ShapeDtypeStruct(self._shape(i, weight), weight.dtype)
            check_fits(owner, str(parse(name)[-1]), single, self.input_shape)
        operator = self._operator(i, owner, weight)
        linear = of_matrix if operator is None else operator.linear

        def first(weight: Array) -> Array:
            shape = self._start_shape(i, operator, weight)
            start = jax.random.normal(key, shape, widen(weight).dtype)
            start = jax.vmap(lambda x: unit(x)[0])(start)
            measure = cold(linear)
            return self._measured(i, weight, measure, start)[1]

        weight_rank = self._rank(i)
        if operator is None:
            return per_layer(first, weight, weight_rank)
        return jax.jit(lambda w: per_layer(first, w, weight_rank))(weight)

    def _constrained(self, i: int, met: Met) -> tuple[Any, Any]:
        owner, raw, state, inference, to_multiply = met
        operator = self._operator(i, owner, raw)
        linear = of_matrix if operator is None else operator.linear
        if state is None:
            return self._anew(i, operator, raw), None
        in_inference = self.inference if inference is None else inference
        steps = self.num_power_iterations
        measure = sure(linear) if in_inference else warm(steps, linear)
        index = self._memories[i]
        memory = state.get(index)
        starts = memory.vectors
        if not in_inference:
            starts = self._started(i, operator, raw, memory)
        weight, vectors = None, starts
        if to_multiply and operator is None:
            weight, vectors = self._map(i).factored(raw, measure, starts)
        if weight is None:
            measured = lambda raw, starts: self._measured(i, raw, measure, starts)
            weight, vectors = per_layer(measured, raw, self._rank(i), starts)
        if in_inference:
            return weight, state
        return weight, state.set(index, memory.after(vectors))

    def _anew(self, i: int, operator: Operator | None, raw: Array) -> Array:
        """The constrained weight, without a memory."""
        p = self._map(i)

        def constrained(weight: Array) -> Array:
            if operator is None:
                return p(weight)
            start = fixed_vector(operator.size, widen(weight).dtype)
            return self._measured(i, weight, cold(operator.linear), start[None])[0]

        return per_layer(constrained, raw, self._rank(i))

    def _started(
        self, i: int, operator: Operator | None, raw: Array, memory: Memory
    ) -> Array:
        """The vectors to start from in a call: searched for, if that is due."""
        weight_rank, (vectors, *_) = self._rank(i), memory
        if operator is None:
            blocks = self._map(i).blocks
            return search_matrices(blocks, weight_rank, memory.due, raw, vectors)

        def searched(weight: Array, vectors: Array) -> Array:
            return search(operator.linear(weight), vectors[0])[None]

        return search_if_due(searched, weight_rank, memory.due, raw, vectors)

    def _rank(self, i: int) -> int:
        weight_rank = self._ranks[i]
        assert weight_rank is not None
        return weight_rank

    def _shape(self, i: int, weight: Array) -> tuple[int, ...]:
        """That of the weight in one layer."""
        return weight.shape[weight.ndim - self._rank(i) :]

    def _map(self, i: int) -> SpectralNorm | SpectralScale:
        p = opened(self.parametrizations[i])
        assert isinstance(p, SpectralNorm | SpectralScale)
        return p

    def _operator(self, i: int, owner: Any, weight: Array) -> Operator | None:
        """What is bounded; `None` if it is the weight as a matrix."""
        if self.input_shape is None:
            return None
        name = str(parse(names_of(self.weight_name)[i])[-1])
        return operator_of(owner, name, self._shape(i, weight), self.input_shape)

    def _start_shape(
        self, i: int, operator: Operator | None, weight: Array
    ) -> tuple[int, int]:
        """The shape of the vectors for one weight: one for each matrix."""
        if operator is not None:
            return 1, operator.size
        return jax.eval_shape(self._map(i).cold_start, weight).shape

    def _measured(
        self, i: int, weight: Array, measure: Measure, starts: Array
    ) -> tuple[Array, Array]:
        """The constrained weight, and the vectors to start from next time."""
        p = self._map(i)
        if measure.linear is of_matrix:
            return p.measured(weight, measure, starts)
        weight, start = scale_norm(p.plan(weight.dtype), measure, weight, starts[0])
        return weight, start[None]


class SpectralNormConstraint(SpectralConstraint):
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
    they come within a tenth, and about 160 where they crowd at the top, as those of
    convolutions do; from others, 50 to 150 more. A baked model pays nothing per call.

    With `input_shape`, what is bounded is the norm of the layer as an operator: for a
    convolution the true one, with its stride, padding, dilation and groups, and not
    that of its kernel as a matrix, which is too small by up to the square root of the
    kernel's number of pixels. It holds for images of that shape. Larger ones are
    stretched more: by 1 to 12 % at 64 × 64, if the shape is 16 × 16.
    `input_shape="any"` bounds images of every size, by what an infinite one is
    stretched at most; large images come near to that, small ones less so.

    The gradient is $\frac{c}{\sigma_1} (G - \frac{1}{\sigma_1} \langle W, G \rangle\,
    u v^H)$, as if the vectors were exact. A zero weight stays zero, with the gradient
    of the identity.

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

    def __init__(
        self,
        layer: Any,
        weight_name: str | Sequence[str] = "weight",
        norm: Bound = 1.0,
        *,
        num_power_iterations: int = 1,
        input_shape: InputShapeLike | None = None,
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
            operator; or `"any"`, for images of every size, if the layer is an
            `eqx.nn.Conv` or `eqx.nn.ConvTranspose` that pads with zeros, or `CIRCULAR`
            without a stride. (For an `eqx.nn.Linear`, `"any"` is the matrix.) Defaults
            to none: the norm of the weight as a matrix. (Keyword only argument.)
        - `blocks`: as in [`eqxreg.SpectralNorm`][]. (Keyword only argument.)
        - `inference`: whether the vectors stay as they are and the singular value is
            searched for; `eqx.nn.inference_mode` sets it. (Keyword only argument.)
        - `key`: a `jax.random.key`, for the vectors to start from. (Keyword only
            argument.)

        **Raises:**

        - `ValueError`: if `num_power_iterations` is not a positive int, `input_shape`
            is no input of the layer, gives no output, is `"any"` where there is no such
            bound or is combined with `blocks`, the weight is tied to another by
            `eqx.nn.Shared`, or as [`eqxreg.Constraint`][] and
            [`eqxreg.SpectralNorm`][] do.
        - `TypeError`: as [`eqxreg.Constraint`][] does.
        """
        p = SpectralNorm(norm, blocks=blocks)
        steps = num_power_iterations
        super().__init__(layer, weight_name, p, steps, input_shape, inference, key)


class SpectralScaleConstraint(SpectralConstraint):
    r"""Keeps the largest singular value of a layer's weight at most `cap`: the layer
    computes with

    $$W \min\left(1, \frac{c}{\sigma_1(W)}\right).$$

    Where [`eqxreg.SpectralNormConstraint`][] says "exactly", this says "at most": a
    weight inside keeps its bits and its gradient, so that a layer that starts at zero,
    or small, grows as it is trained and does not jump to the bound. It is for residual
    branches $x + g(x)$, which can be inverted if $g$ is a contraction, and which keep
    distances between inputs. All else is as in [`eqxreg.SpectralNormConstraint`][]: the
    state, the gradient outside, what `input_shape` bounds.

    Since $\sigma_1$ is found from below, a result may be above `cap` by the error of
    that: 1e-3 as a rule, and up to 1 % in a call after a large step. If something
    hangs on being a contraction, leave room, as with 0.9.

    !!! example

        ```python
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> key = jax.random.key(0)
        >>> linear = eqx.nn.Linear(2, 2, use_bias=False, key=key)
        >>> small = jnp.array([[0.25, 0.0], [0.0, 0.0]])
        >>> linear = eqx.tree_at(lambda l: l.weight, linear, small)
        >>> linear, state = eqx.nn.make_with_state(eqxreg.SpectralScaleConstraint)(
        ...     linear, "weight", 0.9, key=key
        ... )
        >>> out, state = linear(jnp.ones(2), state)
        >>> print(out)
        [0.25 0.  ]

        ```

    ??? cite

        [Invertible Residual Networks](https://arxiv.org/abs/1811.00995), Behrmann,
        Grathwohl, Chen, Duvenaud and Jacobsen. [Simple and Principled Uncertainty
        Estimation with Deterministic Deep Learning via Distance
        Awareness](https://arxiv.org/abs/2006.10108), Liu, Lin, Padhy, Tran,
        Bedrax-Weiss and Lakshminarayanan.
    """

    def __init__(
        self,
        layer: Any,
        weight_name: str | Sequence[str] = "weight",
        cap: Bound = 1.0,
        *,
        num_power_iterations: int = 1,
        input_shape: InputShapeLike | None = None,
        blocks: int = 1,
        inference: bool = False,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `layer`, `weight_name`: as in [`eqxreg.Constraint`][]. The name defaults to
            `"weight"`.
        - `cap`: the bound $c$: a positive number or JAX scalar array. Defaults to 1.
        - `num_power_iterations`, `input_shape`, `blocks`, `inference`, `key`: as in
            [`eqxreg.SpectralNormConstraint`][]. (Keyword only arguments.)

        **Raises:**

        - As [`eqxreg.SpectralNormConstraint`][] does.
        """
        p = SpectralScale(cap, blocks=blocks)
        steps = num_power_iterations
        super().__init__(layer, weight_name, p, steps, input_shape, inference, key)
