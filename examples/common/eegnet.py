"""EEGNet-8,2, of layers that are matrix products.

With several seeds at once, these are much faster on a CPU than convolutions are, whose
kernels would be different for each seed.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key


# Temporal filters, spatial filters for each of them, and how many samples are averaged
# at the end of the two blocks: as in the paper.
FILTERS, DEPTH, POOLS = 8, 2, (4, 8)


class Filters(eqx.Module):
    """Filters over time. Each goes over all channels, (channels, samples) -> (filters,
    channels, samples); or, if they are `depthwise`, over its own."""

    weight: Float[Array, "filters length"]
    depthwise: bool = eqx.field(static=True)

    def __init__(self, count: int, length: int, depthwise: bool, key: Key[Array, ""]):
        self.weight = uniform(key, (count, length))
        self.depthwise = depthwise

    def __call__(self, x: Float[Array, "channels samples"]) -> Float[Array, "..."]:
        length, samples = self.weight.shape[1], x.shape[1]
        padded = jnp.pad(x, ((0, 0), ((length - 1) // 2, length // 2)))
        parts = [padded[:, i : i + samples] for i in range(length)]
        windows = jnp.stack(parts, axis=-1)
        into = "ctk,ck->ct" if self.depthwise else "ctk,fk->fct"
        return jnp.einsum(into, windows, self.weight)


class SpatialFilters(eqx.Module):
    """`DEPTH` filters over the channels for each temporal filter. Keras has them as a
    `DepthwiseConv2D`, Equinox as a `Conv2d` with groups."""

    weight: Float[Array, "filters*depth channels"]

    def __init__(self, channels: int, key: Key[Array, ""]):
        self.weight = uniform(key, (FILTERS * DEPTH, channels))

    def __call__(
        self, x: Float[Array, "filters channels samples"]
    ) -> Float[Array, "filters*depth samples"]:
        return jnp.einsum("fct,fc->ft", jnp.repeat(x, DEPTH, axis=0), self.weight)


def uniform(key: Key[Array, ""], shape: tuple[int, int]) -> Array:
    """First weights as Equinox draws them."""
    limit = shape[1] ** -0.5
    return jr.uniform(key, shape, minval=-limit, maxval=limit)


class EEGNet(eqx.Module):
    """EEGNet-8,2. Batch normalisation has its statistics in an `eqx.nn.State`."""

    temporal: Filters
    spatial: Any  # Spatial filters, or a wrapper around them.
    separable: tuple[Filters, eqx.nn.Linear]
    norms: tuple[eqx.nn.BatchNorm, ...]
    dropout: eqx.nn.Dropout
    classifier: Any  # A linear layer, or a wrapper around one.

    def __init__(
        self,
        channels: int,
        samples: int,
        classes: int,
        *,
        filter_length: int,
        dropout: float,
        key: Key[Array, ""],
    ):
        """**Arguments:**

        - `channels`, `samples`: the shape of an epoch.
        - `classes`: their number.
        - `filter_length`: that of the temporal filters, in samples.
        - `dropout`: the share of the features that is dropped, after each block.
        - `key`: for the first weights.
        """
        keys, wide = jr.split(key, 5), FILTERS * DEPTH
        self.temporal = Filters(FILTERS, filter_length, False, keys[0])
        self.spatial = SpatialFilters(channels, keys[1])
        self.separable = (
            # As long in time, for its samples are further apart.
            Filters(wide, max(1, filter_length // POOLS[0]), True, keys[2]),
            eqx.nn.Linear(wide, wide, use_bias=False, key=keys[3]),
        )
        self.norms = tuple(
            eqx.nn.BatchNorm(size, "batch", momentum=0.9, mode="batch")
            for size in (FILTERS, wide, wide)
        )
        self.dropout = eqx.nn.Dropout(dropout)
        features = wide * (samples // POOLS[0] // POOLS[1])
        self.classifier = eqx.nn.Linear(features, classes, key=keys[4])

    def __call__(
        self,
        x: Float[Array, "channels samples"],
        state: eqx.nn.State,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, " classes"], eqx.nn.State]:
        """The logits of one epoch; for a batch, under a `vmap` over "batch"."""
        keys = (None, None) if key is None else jr.split(key)
        x, state = self.norms[0](self.temporal(x), state)
        x, state = self.norms[1](self.spatial(x), state)
        x = self.dropout(pooled(jax.nn.elu(x), POOLS[0]), key=keys[0])
        over_time, over_features = self.separable
        x, state = self.norms[2](over_features.weight @ over_time(x), state)
        x = self.dropout(pooled(jax.nn.elu(x), POOLS[1]), key=keys[1])
        return self.classifier(x.ravel()), state


def pooled(x: Float[Array, "channels samples"], count: int) -> Array:
    """Means of neighbours; a rest is left out."""
    samples = x.shape[1] // count
    return x[:, : samples * count].reshape(-1, samples, count).mean(axis=2)
