"""Tasks for recurrent networks: to repeat symbols after a long time, and speakers to be
told apart."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key

from common.arm import Batch
from common.series import Series, read_ts
from common.wheels import Wheel


# In the copying task: how many symbols to remember, and of how many kinds. Kind 0 is
# nothing, for which no input is on, and the last one is the sign to repeat.
SYMBOLS, KINDS = 10, 8

VOWELS = Wheel(
    "aeon",
    "1.6.0",
    "d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409",
)


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be learnt: sequences, and what to say at the end of them."""

    features: int
    kinds: int
    # Of a batch and a key: what comes in, and what is to come out at the last steps.
    read: Callable[[Batch, Key[Array, ""]], tuple[Array, Array]]
    train: Batch
    test: Batch
    # How many of the last outputs have to be known, and not only timed.
    asked: int
    # The loss of a network that remembers nothing.
    baseline: float
    title: str
    about: dict[str, Any]

    def judged(
        self,
        logits: Float[Array, "steps batch kinds"],
        targets: Int[Array, "batch steps"],
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The mean cross-entropy, and the share of what is asked that is right."""
        targets = targets.T
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
        asked = slice(-self.asked, None)
        return loss, jnp.mean(logits[asked].argmax(axis=-1) == targets[asked])


def load(source: str, length: int, sequences: int, cache: Path) -> Task:
    """The task that `--data` names."""
    return copying(length, sequences) if source == "copying" else vowels(cache)


def copying(length: int, sequences: int) -> Task:
    """Ten symbols, a long silence, a sign, and the symbols again.

    In training, a row says only that there is a sequence: its symbols are drawn anew.
    """

    def read(batch: Int[Array, "batch 10"], key: Key[Array, ""]) -> tuple[Array, Array]:
        drawn = jr.randint(key, batch.shape, 1, KINDS + 1)
        symbols = jnp.where(batch == 0, drawn, batch)
        nothing = lambda steps: jnp.zeros((len(batch), steps), symbols.dtype)
        sign = jnp.full((len(batch), 1), KINDS + 1, symbols.dtype)
        silence, answer = nothing(length - 1), nothing(SYMBOLS)
        inputs = jnp.concatenate([symbols, silence, sign, answer], axis=1)
        targets = jnp.concatenate([nothing(length + SYMBOLS), symbols], axis=1)
        return jax.nn.one_hot(inputs - 1, KINDS + 1), targets

    test = jr.randint(jr.key(2**31), (128, SYMBOLS), 1, KINDS + 1)
    return Task(
        features=KINDS + 1,
        kinds=KINDS + 1,
        read=read,
        train=jnp.zeros((sequences, SYMBOLS), test.dtype),
        test=test,
        asked=SYMBOLS,
        baseline=SYMBOLS * math.log(KINDS) / (length + 2 * SYMBOLS),
        title=f"ten symbols to be repeated after {length} steps",
        about={"name": "copying", "test_sequences": len(test)},
    )


def vowels(cache: Path) -> Task:
    """Twelve coefficients of the sound of two vowels, said by one of nine men."""
    folder = "aeon/datasets/data/JapaneseVowels/"
    names = [f"JapaneseVowels_eq_{part}.ts" for part in ("TRAIN", "TEST")]
    found = [read_ts(VOWELS.read(cache, folder + n), n) for n in names]
    (classes, train), (_, test) = found
    series = Series("JapaneseVowels", classes, train, test).standardised()

    def read(batch: Batch, key: Key[Array, ""]) -> tuple[Array, Array]:
        values, labels = batch
        return values.swapaxes(1, 2), labels[:, None]

    train, test = jax.tree.map(jnp.asarray, (series.train, series.test))
    return Task(
        features=series.train.values.shape[1],
        kinds=len(classes),
        read=read,
        train=train,
        test=test,
        asked=1,
        baseline=math.log(len(classes)),
        title=f"{series.name}: {len(series.train.labels)} sequences to train on",
        about=series.describe(),
    )
