"""The loop over epochs, the same for every trainer: it records, keeps and resumes."""

import os
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from common.arm import Arm
from common.checkpoint import Checkpoint
from common.run import ComparisonFlags, Failure, Stopped, stop_signals


# One row per epoch, one column per seed; `seconds` is the same for all seeds.
History: TypeAlias = dict[str, NDArray[np.float64]]


def fit(
    arms: Sequence[Arm],
    measure: Callable[[Any], dict[str, NDArray[np.float64]]],
    flags: ComparisonFlags,
    checkpoint: Checkpoint,
    advance: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, History]]:
    """Trains all arms side by side, epoch by epoch, from the start or a checkpoint.

    `measure` takes the finished models of all seeds as one, and gives numbers per seed.
    `advance` is called with a line on what was done, once for each arm when it is ready
    and once for each of its epochs. **Returns** every arm's finished models, and its
    history.
    """
    states = {arm.name: arm.start for arm in arms}
    histories: dict[str, History] = {arm.name: {} for arm in arms}
    done = 0
    if flags.resume:
        done, arrays = checkpoint.restore()
        if done > flags.epochs:
            raise Failure(f"--epochs is {flags.epochs}, but {done} are done already")
        states, histories = _unpack(arrays, like=states)
    if done < flags.epochs:
        _compile(arms)
    for _ in range((done + 1) * len(arms)):
        advance("ready")
    with stop_signals() as stopped:
        for epoch in range(done + 1, flags.epochs + 1):
            for arm in arms:
                state, loss, seconds = arm.epoch(states[arm.name], epoch)
                states[arm.name] = state
                row = {"train_loss": loss, **measure(arm.finish(state))}
                row["seconds"] = np.full(loss.shape, seconds)
                _append(histories[arm.name], row)
                advance(f"epoch {epoch} of {flags.epochs}")
            last = epoch == flags.epochs
            if last or stopped() or epoch % flags.save_every == 0:
                checkpoint.save(epoch, _pack(states, histories))
            if stopped() and not last:
                raise Stopped(
                    f"{epoch} of {flags.epochs} epochs are done; --resume goes on"
                )
    return {arm.name: arm.finish(states[arm.name]) for arm in arms}, histories


def _compile(arms: Sequence[Arm]) -> None:
    """Compiles all arms, several at a time: XLA does most of it on one core."""
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for compiling in [pool.submit(arm.compile) for arm in arms]:
            compiling.result()


def _append(history: History, row: dict[str, NDArray[np.float64]]) -> None:
    for name, values in row.items():
        before = history.get(name, np.empty((0, len(values))))
        history[name] = np.vstack([before, values])


def _pack(
    states: dict[str, Any], histories: dict[str, History]
) -> dict[str, Array | NDArray[np.float64]]:
    """All arrays, by names such as `none.params.readout.bias`."""
    packed = {}
    for name, state in states.items():
        packed |= named_leaves(name, state)
        for metric, rows in histories[name].items():
            packed[f"{name}.history.{metric}"] = rows
    return packed


def _unpack(
    arrays: dict[str, NDArray[Any]], like: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, History]]:
    """What was packed, once its states prove to have the shapes of those in `like`."""
    states: dict[str, Any] = {}
    histories: dict[str, History] = {}
    for name, state in like.items():
        leaves = []
        for key, leaf in named_leaves(name, state).items():
            if key not in arrays or arrays[key].shape != leaf.shape:
                raise Failure(f"--resume: the checkpoint is of another model: {key}")
            leaves.append(jnp.asarray(arrays[key], leaf.dtype))
        states[name] = jax.tree.unflatten(jax.tree.structure(state), leaves)
        start = f"{name}.history."
        histories[name] = {
            key.removeprefix(start): rows
            for key, rows in arrays.items()
            if key.startswith(start)
        }
    return states, histories


def named_leaves(name: str, state: Any) -> dict[str, Array]:
    """The arrays of one state by name."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {name + jax.tree_util.keystr(path): leaf for path, leaf in leaves}
