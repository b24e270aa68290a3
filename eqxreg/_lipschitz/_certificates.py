"""What a Lipschitz bound certifies: a radius for each input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from .._linalg import widen


def certified_radius(logits: ArrayLike, lipschitz: ArrayLike) -> Float[Array, "..."]:
    r"""The radius of an l2 ball around the input, within which the predicted class
    cannot change:

    $$\frac{z_{(1)} - z_{(2)}}{\sqrt{2}\, L}$$

    for the two largest logits $z$ of a classifier whose vector of logits is
    $L$-Lipschitz: their difference is $\sqrt{2} L$-Lipschitz.

    !!! warning

        The certificate is for the exact function, and the rounding errors of a forward
        pass in float32 are enough to build inputs for which it is wrong. Compute the
        logits in float64 (`jax.config.update("jax_enable_x64", True)` and a model in
        float64), or take a bound of the error off the margin.

    **Arguments:**

    - `logits`: array of shape `(..., classes)`, floating, with two classes or more.
    - `lipschitz`: an upper bound of the Lipschitz constant, as
        [`eqxreg.lipschitz_bound`][] gives it: a positive number or a scalar array.

    **Returns:**

    The radii, an array of shape `(...)` in at least single precision, rounded down:
    zero at a tie, never negative. NaN if a logit is NaN or the largest is infinite.

    **Raises:**

    - `ValueError`: if there are fewer than two classes, or `lipschitz` is a number that
        is not positive.
    - `TypeError`: if `logits` are not floating.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> logits = jnp.array([[5.0, 1.0, 2.0], [0.0, 0.0, -1.0]])
        >>> with jnp.printoptions(precision=3):
        ...     print(eqxreg.certified_radius(logits, 2.0))
        [1.061 0.   ]

        ```

    ??? cite

        [Lipschitz-Margin Training](https://arxiv.org/abs/1802.04034), Tsuzuku, Sato and
        Sugiyama, 2018. Rounding errors: [A Formally Verified Robustness Certifier for
        Neural Networks](https://arxiv.org/abs/2505.06958), Tobler, Syeda and Murray,
        CAV 2025.
    """
    if not isinstance(logits, jax.Array):
        raise TypeError(
            "`logits` must be a floating JAX array, got a "
            f"{type(logits).__module__}.{type(logits).__name__}. (`jnp.asarray` makes "
            "one; outside of 64-bit mode it rounds.)"
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(
            f"`logits` must be a floating JAX array, got one of {logits.dtype}."
        )
    if logits.ndim == 0 or logits.shape[-1] < 2:
        raise ValueError(
            "`logits` must be of shape `(..., classes)` with two classes or more, got "
            f"shape {logits.shape}."
        )
    if isinstance(lipschitz, int | float | np.number) and not lipschitz > 0:
        raise ValueError(f"`lipschitz` must be positive, got {lipschitz!r}.")
    logits, bound = widen(logits), jnp.asarray(lipschitz)
    is_wider = bound.dtype == jnp.float64 and isinstance(lipschitz, jax.Array)
    dtype = bound.dtype if is_wider else logits.dtype
    bound = bound.astype(dtype)
    largest, _ = lax.top_k(logits.astype(dtype), 2)
    margin = largest[..., 0] - largest[..., 1]
    margin = jnp.where(jnp.isposinf(largest[..., 0]), jnp.nan, margin)
    constant = bound == 0
    slack = 1 - 8 * float(jnp.finfo(dtype).eps)
    radius = margin * (slack / math.sqrt(2)) / jnp.where(constant, 1, bound)
    # No change of the input changes what a constant function predicts.
    return jnp.where(constant & (margin > 0), jnp.inf, radius)
