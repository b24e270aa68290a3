"""Checkpoints of sharded states, written by Orbax: each process writes its own shards.

A state is restored onto the layout that is asked for, whatever mesh it was on before.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from common.arm import State
from common.checkpoint import require_same
from common.cluster import ClusterFlags, is_first
from common.loop import named_leaves
from common.run import Failure


class ShardedCheckpoint:
    """The newest states of training, in `checkpoints` of the output directory.

    Orbax writes each under another name, and renames it when all processes are done:
    what a killed run leaves is whole or does not count.

    **Arguments:**

    - `manager`: Orbax's, of that directory.
    - `fingerprint`: all that decides the numbers. A checkpoint that was written under
        another one is refused.
    """

    def __init__(self, manager: ocp.CheckpointManager, fingerprint: Mapping[str, Any]):
        self._manager, self._fingerprint = manager, dict(fingerprint)

    def save(self, step: int, state: State, progress: Mapping[str, Any]) -> None:
        """Keeps the state, and beside it what JSON can hold of how far training is."""
        about = {"fingerprint": self._fingerprint, "progress": dict(progress)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(named_leaves("", state)),
            about=ocp.args.JsonSave(about),
        )
        try:
            self._manager.save(step, args=items)
        except (OSError, ValueError) as error:
            path = Path(self._manager.directory) / str(step)
            raise Failure(f"{path}: cannot be written: {_short(error)}") from error

    def restore(self, like: State) -> tuple[State, dict[str, Any]]:
        """The newest state, laid out as the shapes in `like` are, and its progress."""
        step = self._manager.latest_step()
        if step is None:
            raise Failure(f"--resume: no checkpoint in {self._manager.directory}")
        path = Path(self._manager.directory) / str(step)
        leaves = named_leaves("", like)
        try:
            # First, so that another model is no riddle of shapes.
            args = ocp.args.Composite(about=ocp.args.JsonRestore())
            about = self._manager.restore(step, args=args)["about"]
            require_same(self._fingerprint, about["fingerprint"], path)
            args = ocp.args.Composite(state=ocp.args.StandardRestore(leaves))
            found = self._manager.restore(step, args=args)["state"]
        except (OSError, KeyError, ValueError) as error:
            raise Failure(f"{path}: cannot be read: {_short(error)}") from error
        structure = jax.tree.structure(like)
        return structure.unflatten(found[name] for name in leaves), about["progress"]


def _short(error: Exception) -> str:
    """What TensorStore says, without the description of its database."""
    return str(error).partition(" [tensorstore_spec")[0]


@contextlib.contextmanager
def sharded_checkpoint(
    flags: ClusterFlags, data: Mapping[str, Any]
) -> Iterator[ShardedCheckpoint]:
    """Opens the checkpoints of a run, whose data `data` describes."""
    directory = (flags.out / "checkpoints").resolve()
    if flags.resume and not directory.is_dir():
        raise Failure(f"--resume: there are no checkpoints in {flags.out}")
    if not flags.resume and is_first():
        # A new run: what an older one left must never be continued in its place.
        shutil.rmtree(directory, ignore_errors=True)
    multihost_utils.sync_global_devices("older checkpoints are gone")
    # Orbax would log every error that it raises, too.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    with ocp.CheckpointManager(directory, options=options) as manager:
        yield ShardedCheckpoint(manager, {**flags.fingerprint(), "data": dict(data)})
