"""An attack on a classifier: how near is an image of another class?

Attacks are searched for in float32, and counted in float64: an image counts as found if
a network in float64 gives it another class. So they can be set beside a certificate,
which is of the exact function.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Within it, JAX computes in float64."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def distances(
    models: Any,
    images: NDArray[np.float32],
    labels: NDArray[np.int32],
    radii: Sequence[float],
    steps: int,
) -> NDArray[np.float64]:
    """How far the nearest image of another class is that an attack finds, in the l2
    norm: infinite if it finds none, zero for an image whose class is wrong already.

    **Arguments:**

    - `models`: networks as one, whose arrays have the seeds as first axis.
    - `images`, `labels`: those to attack, with entries from 0 to 1.
    - `radii`, `steps`: the attack is made within each radius, with so many steps.

    **Returns:**

    An array of shape `(seeds, images)`.
    """
    x, y = jnp.asarray(images), jnp.asarray(labels)
    with double_precision():
        exact, start = eqxreg.cast(models, jnp.float64), np.asarray(images, np.float64)
    nearest = np.inf
    for radius in radii:
        found = np.asarray(_descend(models, x, y, jnp.float32(radius), steps))
        with double_precision():
            distance = _shortened(exact, start, y, found.astype(np.float64))
        nearest = np.minimum(nearest, np.asarray(distance))
    return np.asarray(nearest)


def lead(
    model: Any, images: Float[Array, "n features"], labels: Int[Array, " n"]
) -> Float[Array, " n"]:
    """How far the logit of the true class is ahead of the best other one."""
    logits = jax.vmap(model)(images)
    true = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
    others = jnp.where(true, -jnp.inf, logits).max(axis=1)
    return jnp.where(true, logits, 0).sum(axis=1) - others


def _norm(x: Float[Array, "n features"]) -> Float[Array, "n 1"]:
    return jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-30)


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(eqx.if_array(0), None, None, None, None))
def _descend(
    model: Any, images: Array, labels: Array, radius: Array, steps: int
) -> Float[Array, "n features"]:
    """Projected gradient descent on the lead: of the images that were met, within the
    radius and with pixels from 0 to 1, those of the smallest lead."""
    slope = jax.grad(lambda x: jnp.sum(lead(model, x, labels)))

    def step(i: int, carried: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        x, best, least = carried
        gradient = slope(x)
        moved = x - images - 2.5 * radius / steps * gradient / _norm(gradient)
        x = images + moved * jnp.minimum(1, radius / _norm(moved))
        x = jnp.clip(x, 0, 1)
        now = lead(model, x, labels)
        best = jnp.where((now < least)[:, None], x, best)
        return x, best, jnp.minimum(now, least)

    start = (images, images, lead(model, images, labels))
    return jax.lax.fori_loop(0, steps, step, start)[1]


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(eqx.if_array(0), None, None, 0))
def _shortened(model: Any, images: Array, labels: Array, found: Array) -> Array:
    """The distance to an image of another class on the way to the one that was found,
    by halving."""

    def halve(i: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        true, other = ends
        middle = (true + other) / 2
        wrong = (lead(model, middle, labels) <= 0)[:, None]
        return jnp.where(wrong, true, middle), jnp.where(wrong, middle, other)

    _, other = jax.lax.fori_loop(0, 10, halve, (images, found))
    distance = jnp.linalg.norm(other - images, axis=1)
    distance = jnp.where(lead(model, other, labels) > 0, jnp.inf, distance)
    return jnp.where(lead(model, images, labels) <= 0, 0, distance)
