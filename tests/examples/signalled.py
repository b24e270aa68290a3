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


_, name, last, *arguments = sys.argv
sys.argv = [sharded.__file__, *arguments]
batch, count = Text.batch, itertools.count(1)


def batch_with_signal(self, *arguments):
    if next(count) == int(last):
        os.kill(os.getpid(), signal.Signals[name])
    return batch(self, *arguments)


Text.batch = batch_with_signal
main(sharded.ShardedFlags, sharded.train, sharded.leave)
