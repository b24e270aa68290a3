"""A language model of bytes: a transformer whose layers are stacked and scanned."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key


BYTES = 256


class Block(eqx.Module):
    """Causal attention and a feed-forward layer, each after a normalisation."""

    attention_norm: eqx.nn.RMSNorm
    attention: eqx.nn.MultiheadAttention
    up_norm: eqx.nn.RMSNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, width: int, heads: int, *, key: Key[Array, ""]):
        keys = jr.split(key, 3)
        self.attention_norm = eqx.nn.RMSNorm(width, use_bias=False)
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=keys[0])
        self.up_norm = eqx.nn.RMSNorm(width, use_bias=False)
        self.up = eqx.nn.Linear(width, 4 * width, use_bias=False, key=keys[1])
        self.down = eqx.nn.Linear(4 * width, width, use_bias=False, key=keys[2])

    def __call__(self, x: Float[Array, "length width"]) -> Float[Array, "length width"]:
        past = jnp.tri(len(x), dtype=bool)
        y = jax.vmap(self.attention_norm)(x)
        x = x + self.attention(y, y, y, mask=past)
        y = jax.vmap(self.up)(jax.vmap(self.up_norm)(x))
        return x + jax.vmap(self.down)(jax.nn.gelu(y))


class Transformer(eqx.Module):
    """The logits of the byte that comes next, after every byte of some sequences."""

    embedding: eqx.nn.Embedding
    position: eqx.nn.Embedding
    # All layers as one: every array has them as first axis.
    blocks: Block
    norm: eqx.nn.RMSNorm
    readout: eqx.nn.Linear

    def __init__(
        self, length: int, width: int, depth: int, heads: int, *, key: Key[Array, ""]
    ):
        """**Arguments:**

        - `length`: the largest number of bytes in a sequence.
        - `width`: the number of features of a byte, a multiple of `heads`.
        - `depth`, `heads`: the number of layers, and of heads in each.
        - `key`: for the first weights.
        """
        keys = jr.split(key, 4)
        self.embedding = eqx.nn.Embedding(BYTES, width, key=keys[0])
        self.position = eqx.nn.Embedding(length, width, key=keys[1])
        new_block = eqx.filter_vmap(lambda key: Block(width, heads, key=key))
        self.blocks = new_block(jr.split(keys[2], depth))
        self.norm = eqx.nn.RMSNorm(width, use_bias=False)
        self.readout = eqx.nn.Linear(width, BYTES, use_bias=False, key=keys[3])

    def __call__(
        self,
        text: Int[Array, "batch length"],
        pin: Callable[[Array], Array] = lambda x: x,
    ) -> Float[Array, "batch length 256"]:
        """`pin` is applied to what passes from layer to layer: it may say where that
        is on a mesh, and must not change it."""
        length = text.shape[1]
        x = self.embedding.weight[text] + self.position.weight[:length]
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def apply(x: Array, arrays: Block) -> tuple[Array, None]:
            return pin(jax.vmap(eqx.combine(arrays, static))(x)), None

        x, _ = jax.lax.scan(apply, pin(x), arrays)
        over_all = lambda layer: jax.vmap(jax.vmap(layer))
        return over_all(self.readout)(over_all(self.norm)(x))
