"""The network of the trainers on images: a multilayer perceptron with dropout."""

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Float, Key


class DropoutMLP(eqx.Module):
    """A multilayer perceptron with dropout of its inputs and of its hidden units."""

    hidden: tuple[eqx.nn.Linear, ...]
    readout: eqx.nn.Linear
    input_dropout: eqx.nn.Dropout
    dropout: eqx.nn.Dropout

    def __init__(
        self,
        features: int,
        classes: int,
        width: int,
        depth: int,
        *,
        input_dropout: float,
        dropout: float,
        key: Key[Array, ""],
    ):
        """**Arguments:**

        - `features`, `classes`: the sizes of the input and of the output.
        - `width`, `depth`: the number of units of a hidden layer, and of hidden layers.
        - `input_dropout`, `dropout`: the share of the inputs and of the hidden units
            that is dropped in training.
        - `key`: for the first weights.
        """
        sizes = [features] + [width] * depth
        *keys, last = jr.split(key, depth + 1)
        self.hidden = tuple(
            eqx.nn.Linear(size_in, size_out, key=key)
            for size_in, size_out, key in zip(sizes, sizes[1:], keys, strict=False)
        )
        self.readout = eqx.nn.Linear(width, classes, key=last)
        self.input_dropout = eqx.nn.Dropout(input_dropout)
        self.dropout = eqx.nn.Dropout(dropout)

    def __call__(
        self, image: Float[Array, " features"], key: Key[Array, ""] | None = None
    ) -> Float[Array, " classes"]:
        """The logits of one image; without a key, nothing is dropped."""
        keys = [None] * (len(self.hidden) + 1)
        if key is not None:
            keys = list(jr.split(key, len(keys)))
        x = self.input_dropout(image, key=keys[0], inference=key is None)
        for layer, layer_key in zip(self.hidden, keys[1:], strict=True):
            x = jax.nn.relu(layer(x))
            x = self.dropout(x, key=layer_key, inference=key is None)
        return self.readout(x)
