"""Images to pretrain on, others to tune on, and the few of these that have labels."""

import dataclasses
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Int, Key, PyTree
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from common.arm import Batch, Loss, Plan, Planner, State, gradient_step
from common.data import CLASSES, checksum, idx_directory
from common.run import Failure


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Images to pretrain on, and others, to tune on a few of them, of which parts are
    for validation and for the test."""

    name: str
    source_images: NDArray[np.float32]
    source_labels: NDArray[np.int32]
    few_images: NDArray[np.float32]
    few_labels: NDArray[np.int32]
    validation: tuple[NDArray[np.float32], NDArray[np.int32]]
    test: tuple[NDArray[np.float32], NDArray[np.int32]]

    def describe(self) -> dict[str, Any]:
        """Name, sizes, and a checksum that differs if any pixel or label does."""
        pairs = [(self.few_images, self.few_labels), self.validation, self.test]
        arrays = (self.source_images, self.source_labels, *sum(pairs, ()))
        return {
            "name": self.name,
            "pretraining_images": len(self.source_labels),
            "images_to_choose_from": len(self.few_labels),
            "validation_images": len(self.validation[1]),
            "test_images": len(self.test[1]),
            "checksum": checksum(*arrays),
        }


def load(source: str, target: str) -> Transfer:
    """What `--data` and `--target` name: `digits`, or two directories of IDX files."""
    if source == "digits":
        return dirty_digits()
    return idx_transfer(Path(source), Path(target))


def dirty_digits() -> Transfer:
    """Scikit-learn's digits: 800 as they are, and the others before a background, which
    is random from pixel to pixel and the same for all of them."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    rng = np.random.default_rng(0)
    source, few, validation, test = np.split(
        rng.permutation(len(labels)), [800, 1100, 1400]
    )
    dirty = np.maximum(images, rng.uniform(size=images.shape[1]).astype(np.float32))
    return Transfer(
        "digits, then through a dirty glass",
        images[source],
        labels[source],
        dirty[few],
        labels[few],
        (dirty[validation], labels[validation]),
        (dirty[test], labels[test]),
    )


def idx_transfer(source: Path, target: Path) -> Transfer:
    """From one directory of four IDX files to another; of the target's training images
    the last sixth is for validation."""
    before, after = idx_directory(source), idx_directory(target)
    if before.features != after.features:
        raise Failure(
            f"--target: an image has {after.features} pixels, and in {source} "
            f"{before.features}"
        )
    cut = len(after.train_labels) - len(after.train_labels) // 6
    return Transfer(
        f"{before.name}, then {after.name}",
        before.train_images,
        before.train_labels,
        after.train_images[:cut],
        after.train_labels[:cut],
        (after.train_images[cut:], after.train_labels[cut:]),
        (after.test_images, after.test_labels),
    )


def few_rows(labels: NDArray[np.int32], seeds: range, most: int) -> NDArray[np.int64]:
    """For each seed the rows of `most` images of each class: one of each, then again
    one of each."""
    found = []
    for seed in seeds:
        rng = np.random.default_rng((3, seed % 2**32))
        rows = [rng.permutation(np.flatnonzero(labels == c)) for c in range(CLASSES)]
        found.append(np.stack([own[:most] for own in rows], axis=1).ravel())
    return np.stack(found)


def pretrained(
    models: Any, loss: Loss, data: Batch, keys: Key[Array, " seeds"], steps: int
) -> Any:
    """The models of all seeds after so many steps of Adam."""
    arrays, static = eqx.partition(models, eqx.is_array)
    adam = optax.adam(1e-3)
    step = gradient_step(loss, lambda model: 0.0, static, adam)

    def run(arrays: PyTree, key: Key[Array, ""]) -> PyTree:
        def body(state: State, key: Key[Array, ""]) -> tuple[State, Array]:
            rows = jr.randint(key, (64,), 0, len(data[1]))
            return step(state, (data[0][rows], data[1][rows]), key)

        params, constants = eqx.partition(arrays, eqx.is_inexact_array)
        state = State(params, adam.init(params), constants)
        return jax.lax.scan(body, state, jr.split(key, steps))[0].params

    return eqx.combine(jax.jit(jax.vmap(run))(arrays, keys), static)


class FewPlanner(Planner):
    """Draws batches from the few labelled images, for each number of shots.

    **Arguments:**

    - `keys`: one key per seed.
    - `order`: rows for each seed, one of each class, then again one of each.
    - `shots`: numbers of labelled images of each class.
    - `shape`: the number of steps of an epoch, and of images in each.
    """

    def __init__(
        self,
        keys: Key[Array, " seeds"],
        order: Int[Array, "seeds rows"],
        shots: tuple[int, ...],
        shape: tuple[int, int],
    ):
        def draw(key: Key[Array, ""], order: Array, epoch: Int[Array, ""]) -> Plan:
            first, *keys = jr.split(jr.fold_in(key, epoch), 1 + len(shots))
            places = [
                jr.randint(k, shape, 0, CLASSES * count)
                for k, count in zip(keys, shots, strict=True)
            ]
            return Plan(order[jnp.stack(places, axis=1)], jr.split(first, shape[0]))

        self._of_all = jax.jit(jax.vmap(draw, in_axes=(0, 0, None)))
        self._given = keys, order

    def __call__(self, epoch: int) -> Plan:
        return self._of_all(*self._given, jnp.int32(epoch))
