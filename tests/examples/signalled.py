"""Runs `examples/sharded.py`, and sends itself a signal when it reads a given batch.

python signalled.py SIGKILL 6 [flags of sharded.py]
"""

import itertools
import os
import signal
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import sharded
from common.run import main
from common.text import Text


def signalled(name: str, last: int) -> None:
    """Sends the signal `name` when the batch number `last` is read."""
    batch, count = Text.batch, itertools.count(1)

    def batch_with_signal(self, *arguments):
        if next(count) == last:
            os.kill(os.getpid(), signal.Signals[name])
        return batch(self, *arguments)

    Text.batch = batch_with_signal


if __name__ == "__main__":
    _, name, last, *arguments = sys.argv
    sys.argv = [sharded.__file__, *arguments]
    signalled(name, int(last))
    main(sharded.ShardedFlags, sharded.train, sharded.leave)
