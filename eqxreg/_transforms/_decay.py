"""Decay: what is added to an update because of where a weight is.

Each of these is a rate and a direction, which is a function of a weight and its update.
`Decay` is given both and adds their product.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .._tree import trainable
from .._values import check_rate, product
from ._adding import Decay


def weight_decay(rate: Any, mask: Any = None) -> optax.GradientTransformation:
    r"""Adds $\lambda w$ to the update.

    Before Adam it is coupled, the gradient of [`eqxreg.l2_penalty`][]:
    `optax.chain(weight_decay(1e-4), optax.adam(1e-3))`. After Adam and before the
    learning rate it is decoupled, which is AdamW:
    `optax.chain(optax.scale_by_adam(), weight_decay(1e-2),
    optax.scale_by_learning_rate(1e-3))`. For complex weights, conjugate the gradients
    of JAX first, as for every transform of Optax.

    !!! warning

        After the learning rate it makes weights *grow*: there, updates are what is
        added to the weights, and have the sign of a step. For decay that does not
        depend on the learning rate use [`eqxreg.independent_weight_decay`][].

    Under a wrapper it is the raw weight that decays. What that does is told by
    [`eqxreg.scale_invariant`][].

    **Arguments:**

    - `rate`: the factor $\lambda$: a non-negative number, a scalar array or an Optax
        schedule.
    - `mask`: which weights: a selector such as [`eqxreg.weights`][], a function to a
        tree of booleans, or such a tree. Defaults to every trainable array, biases too.

    **Returns:**

    An `optax.GradientTransformation`. Updates keep their dtype, unless that cannot hold
    the weight: updates in bfloat16 of weights in float32 become updates in float32, as
    with `optax.add_decayed_weights`.

    **Raises:**

    - `ValueError`: if `rate` is negative or not finite, or a schedule gives that; in
        `init`, if `mask` selects nothing; in `update`, if there are no `params`, or
        `updates`, `params` and `mask` are not of the same arrays. What is traced raises
        when it is known, by `eqx.error_if`.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> decay = eqxreg.weight_decay(0.1)
        >>> params, grads = jnp.array([1.0, 10.0]), jnp.array([1.0, 2.0])
        >>> print(decay.update(grads, decay.init(params), params)[0])
        [1.1 3. ]

        ```
    """
    return _decay(check_rate(rate, "rate"), _itself, mask, "weight_decay")


def sign_decay(rate: Any, mask: Any = None) -> optax.GradientTransformation:
    r"""Adds $\lambda\, \mathrm{sign}(w)$ to the update: the gradient of
    [`eqxreg.l1_penalty`][].

    Weights come near zero but do not stay there. To reach zeros, use
    [`eqxreg.soft_threshold`][].

    **Arguments:**

    - `rate`, `mask`: as in [`eqxreg.weight_decay`][].

    **Returns:**

    An `optax.GradientTransformation`, with updates as in [`eqxreg.weight_decay`][].

    **Raises:**

    - As [`eqxreg.weight_decay`][] does.
    """
    return _decay(check_rate(rate, "rate"), _sign, mask, "sign_decay")


def decay_towards(
    reference: PyTree, rate: Any, mask: Any = None
) -> optax.GradientTransformation:
    r"""Adds $\lambda (w - w_0)$ to the update: weights are drawn to a reference, such
    as a pretrained model that is being tuned, and not to zero.

    It is placed as [`eqxreg.weight_decay`][] is. Where gradients vanish, weights come
    to rest at the reference.

    **Arguments:**

    - `reference`: the model with the weights $w_0$, or any tree that has an array of
        the right shape wherever the parameters have a selected one. The optimiser's
        state keeps a copy of these arrays, where the parameters are.
    - `rate`, `mask`: as in [`eqxreg.weight_decay`][].

    **Returns:**

    An `optax.GradientTransformation`, with updates as in [`eqxreg.weight_decay`][].

    **Raises:**

    - `ValueError`: as [`eqxreg.weight_decay`][] does; in `init`, if the reference lacks
        a selected array, or has it in another shape; and in `update`, if `state` lacks
        it, for it was made before the array was thawed, say.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> start = {"weight": jnp.array([1.0, 2.0])}
        >>> decay = eqxreg.decay_towards(start, 0.1)
        >>> params, grads = {"weight": jnp.array([2.0, 2.0])}, {"weight": jnp.zeros(2)}
        >>> print(decay.update(grads, decay.init(params), params)[0]["weight"])
        [0.1 0. ]

        ```

    ??? cite

        L2-SP: [Explicit Inductive Bias for Transfer Learning with Convolutional
        Networks](https://arxiv.org/abs/1802.01483), Li, Grandvalet and Davoine.
    """
    rate = check_rate(rate, "rate")
    arrays = eqx.filter(reference, eqx.is_inexact_array)
    return _decay(rate, _itself, mask, "decay_towards", arrays)


def cautious_weight_decay(rate: Any, mask: Any = None) -> optax.GradientTransformation:
    r"""Adds $\lambda w$ to the update where both have the same sign: weights decay only
    where the step shrinks them anyway.

    $$u_i \mapsto u_i + \lambda\, [u_i w_i \ge 0]\, w_i$$

    It stands after what finds the direction and before the learning rate, where updates
    have the sign of a gradient: `optax.chain(optax.scale_by_adam(),
    cautious_weight_decay(1e-2), optax.scale_by_learning_rate(1e-3))`. Unlike
    [`eqxreg.weight_decay`][] it does not move the minima of the loss.

    **Arguments:**

    - `rate`, `mask`: as in [`eqxreg.weight_decay`][].

    **Returns:**

    An `optax.GradientTransformation`, with updates as in [`eqxreg.weight_decay`][].

    **Raises:**

    - As [`eqxreg.weight_decay`][] does.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> decay = eqxreg.cautious_weight_decay(0.1)
        >>> params, updates = jnp.array([1.0, -1.0]), jnp.array([2.0, 2.0])
        >>> print(decay.update(updates, decay.init(params), params)[0])
        [2.1 2. ]

        ```

    ??? cite

        [Cautious Weight Decay](https://arxiv.org/abs/2510.12402), Chen et al., 2025.
    """
    name = "cautious_weight_decay"
    return _decay(check_rate(rate, "rate"), _agreeing, mask, name)


def corrected_weight_decay(
    rate: Any,
    learning_rate: Any,
    peak_learning_rate: Any = None,
    mask: Any = None,
) -> optax.GradientTransformation:
    r"""Adds $\lambda \frac{\eta_t}{\eta_{\max}} w$ to the update: the decay of AdamC,
    for weights whose size does not matter to the network.

    Weights that a normalisation follows, and those under maps such as
    [`eqxreg.UnitNorm`][] ([`eqxreg.scale_invariant`][] selects these), come to rest at
    a norm for which decay and gradients are in balance. With decoupled decay, $\eta_t
    \lambda$, that balance makes gradients grow as the learning rate falls. With
    $\eta_t^2 \lambda / \eta_{\max}$ it does not. Other weights, such as those of the
    last layer, want [`eqxreg.weight_decay`][].

    It stands between the direction and the learning rate, as decoupled decay does:
    `optax.chain(optax.scale_by_adam(), corrected_weight_decay(1e-2, schedule, peak,
    mask=normalised), optax.scale_by_learning_rate(schedule))`.

    **Arguments:**

    - `rate`: the factor $\lambda$: a non-negative number, a scalar array or a schedule.
    - `learning_rate`: the learning rate $\eta_t$ that follows in the chain: a number, a
        scalar array or a schedule.
    - `peak_learning_rate`: its largest value $\eta_{\max}$, a positive number. Defaults
        to `learning_rate` itself if that is no schedule.
    - `mask`: as in [`eqxreg.weight_decay`][].

    **Returns:**

    An `optax.GradientTransformation`, with updates as in [`eqxreg.weight_decay`][].

    **Raises:**

    - `ValueError`: as [`eqxreg.weight_decay`][] does; and if `learning_rate` is a
        schedule and there is no `peak_learning_rate`.

    ??? cite

        AdamC: [Why Gradients Rapidly Increase Near the End of
        Training](https://arxiv.org/abs/2506.02285), Defazio, 2025.
    """
    rate = _relative_to_peak(rate, learning_rate, peak_learning_rate)
    return _decay(rate, _itself, mask, "corrected_weight_decay")


def independent_weight_decay(
    rate: Any,
    learning_rate: Any,
    peak_learning_rate: Any = None,
    mask: Any = None,
) -> optax.GradientTransformation:
    r"""Adds $-\lambda \frac{\eta_t}{\eta_{\max}} w$ to the update: decay that follows
    the schedule of the learning rate, but not its size.

    So the best rate does not change when the learning rate is tuned. It comes after the
    learning rate, where updates are what is added to the weights:
    `optax.chain(optax.adam(schedule), independent_weight_decay(1e-4, schedule, peak))`.

    **Arguments:**

    - `rate`: the share $\lambda$ of itself that a weight loses in a step at the peak: a
        non-negative number, a scalar array or a schedule.
    - `learning_rate`: the learning rate $\eta_t$ of the chain: a number, a scalar array
        or a schedule.
    - `peak_learning_rate`, `mask`: as in [`eqxreg.corrected_weight_decay`][].

    **Returns:**

    An `optax.GradientTransformation`, with updates as in [`eqxreg.weight_decay`][].

    **Raises:**

    - As [`eqxreg.corrected_weight_decay`][] does.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> decay = eqxreg.independent_weight_decay(0.1, learning_rate=1e-3)
        >>> params, updates = jnp.array([1.0, 10.0]), jnp.zeros(2)
        >>> print(decay.update(updates, decay.init(params), params)[0])
        [-0.1 -1. ]

        ```

    ??? cite

        [Decoupled Weight Decay Regularization](https://arxiv.org/abs/1711.05101),
        Loshchilov and Hutter, where decay has the schedule's multiplier and no more.
    """
    rate = _relative_to_peak(rate, learning_rate, peak_learning_rate)
    name = "independent_weight_decay"
    return _decay(rate, _reversed, mask, name)


def _itself(weight: Array, update: Array) -> Array:
    del update
    return weight


def _reversed(weight: Array, update: Array) -> Array:
    del update
    return -weight


def _sign(weight: Array, update: Array) -> Array:
    del update
    return jnp.sign(weight)


def _agreeing(weight: Array, update: Array) -> Array:
    # Of complex numbers, the real part says whether the step shrinks the weight.
    agrees = jnp.real(jnp.conj(update) * weight) >= 0
    return jnp.where(agrees, weight, 0)


def _relative_to_peak(rate: Any, learning_rate: Any, peak: Any) -> Any:
    """`rate`, times the learning rate as a share of its peak."""
    rate = check_rate(rate, "rate")
    learning_rate = check_rate(learning_rate, "learning_rate")
    if peak is None:
        if not callable(learning_rate):
            return rate
        raise ValueError(
            "`learning_rate` is a schedule, whose largest value cannot be read off it: "
            "give `peak_learning_rate`."
        )
    peak = check_rate(peak, "peak_learning_rate", schedules=False, positive=True)
    return product(rate, learning_rate, 1 / peak)


def _decay(
    rate: Any,
    direction: Callable[[Array, Array], Array],
    mask: Any,
    name: str,
    reference: PyTree = None,
) -> optax.GradientTransformation:
    where = trainable if mask is None else mask
    decay = Decay(rate, direction, where, name, reference)
    return optax.GradientTransformation(decay.init, decay.update)
