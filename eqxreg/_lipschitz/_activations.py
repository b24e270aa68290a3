"""Activations that sort: 1-Lipschitz, and they pass on the whole of a gradient."""

import operator
from typing import SupportsIndex

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


class GroupSort(eqx.Module):
    r"""Sorts each group of `group_size` adjacent features in ascending order.

    The derivative is a permutation. So the layer is 1-Lipschitz in every $\ell_p$ norm,
    and no gradient shrinks on its way through, where ReLU loses half of it. Networks of
    such layers and orthogonal weights can come near any 1-Lipschitz function, and
    [`eqxreg.lipschitz_bound`][] is tightest for them.

    It needs several features at a time, so it is a layer of `eqx.nn.Sequential`, not an
    activation of `eqx.nn.MLP`, which works on one feature at a time.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> print(eqxreg.GroupSort(3)(jnp.array([3.0, 1.0, 2.0, 0.0, -1.0, 5.0])))
        [ 1.  2.  3. -1.  0.  5.]

        ```

    ??? cite

        [Sorting out Lipschitz Function
        Approximation](https://arxiv.org/abs/1811.05381), Anil, Lucas and Grosse, 2019.
    """

    group_size: int = eqx.field(static=True)

    def __init__(self, group_size: SupportsIndex):
        """**Arguments:**

        - `group_size`: how many features to a group: an int, 2 or more. With all
            features in one group this is FullSort.

        **Raises:**

        - `ValueError`: if `group_size` is not such an int.
        """
        is_int = isinstance(group_size, SupportsIndex)
        if not is_int or isinstance(group_size, bool) or operator.index(group_size) < 2:
            raise ValueError(
                f"`group_size` must be an int, 2 or more, got {group_size!r}."
            )
        self.group_size = operator.index(group_size)

    def __call__(
        self, x: Float[Array, "..."], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "..."]:
        """**Arguments:**

        - `x`: array of shape `(features, ...)`: a vector, or an image with its channels
            first. `features` is a multiple of `group_size`.
        - `key`: ignored; provided for compatibility with the rest of Equinox. (Keyword
            only argument.)

        **Returns:**

        An array of the shape and dtype of `x`. Of equal features the first stays first,
        in the derivative too.

        **Raises:**

        - `ValueError`: if `features` is not a multiple of `group_size`.
        """
        del key
        return jnp.sort(_grouped(self, x, self.group_size), axis=1).reshape(x.shape)


class MaxMin(eqx.Module):
    r"""Sorts each pair of adjacent features: $(a, b) \mapsto (\min(a, b), \max(a, b))$.

    This is [`eqxreg.GroupSort`][] with groups of 2, in its ascending order, and faster
    than a sort. It is 1-Lipschitz and preserves the norms of gradients. Where a pair is
    equal, both get half of either gradient.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> print(eqxreg.MaxMin()(jnp.array([3.0, 1.0, -1.0, 2.0])))
        [ 1.  3. -1.  2.]

        ```

    ??? cite

        [Sorting out Lipschitz Function
        Approximation](https://arxiv.org/abs/1811.05381), Anil, Lucas and Grosse, 2019.
        [Norm-preserving Orthogonal Permutation Linear Unit Activation Functions
        (OPLU)](https://arxiv.org/abs/1604.02313), Chernodub and Nowicki, 2016.
    """

    def __call__(
        self, x: Float[Array, "..."], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "..."]:
        """**Arguments:**

        - `x`: array of shape `(features, ...)`: a vector, or an image with its channels
            first. `features` is even.
        - `key`: ignored; provided for compatibility with the rest of Equinox. (Keyword
            only argument.)

        **Returns:**

        An array of the shape and dtype of `x`.

        **Raises:**

        - `ValueError`: if `features` is odd.
        """
        del key
        pairs = _grouped(self, x, 2)
        first, second = pairs[:, 0], pairs[:, 1]
        ordered = (jnp.minimum(first, second), jnp.maximum(first, second))
        return jnp.stack(ordered, axis=1).reshape(x.shape)


def _grouped(
    layer: eqx.Module, x: Float[Array, "..."], group_size: int
) -> Float[Array, "groups group_size ..."]:
    name = type(layer).__name__
    if x.ndim == 0:
        raise ValueError(
            f"`{name}` sorts the features of an array of shape `(features, ...)`, got "
            "`x` of shape (). As a layer of `eqx.nn.Sequential` it sees all features; "
            "an activation of `eqx.nn.MLP` sees one."
        )
    if x.shape[0] % group_size:
        raise ValueError(
            f"`{name}` needs the number of features to be a multiple of {group_size}, "
            f"got `x` of shape {x.shape}, with {x.shape[0]}. Change the width of the "
            "layer before it."
        )
    return x.reshape(x.shape[0] // group_size, group_size, *x.shape[1:])
