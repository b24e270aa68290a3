"""Several processes that train as one: they meet in `cluster`, agree by `any_process`
and part by `leave`."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import ClassVar, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from common.run import Failure, Flags, Stopped


@dataclasses.dataclass(frozen=True)
class ClusterFlags(Flags):
    """The flags of a trainer for many devices."""

    model_axis: int | None = None
    """Devices along the model axis; by default 2, if a process has an even number."""
    coordinator: str | None = None
    """HOST:PORT at which process 0 waits for the others, if there are others."""
    num_processes: int = 1
    """Number of processes. Start as many, with the same flags, and one directory."""
    process_id: int = 0
    """Which of them this is, counted from 0."""

    # None of these changes a number, but for rounding.
    FREE: ClassVar = Flags.FREE | {
        *("model_axis", "coordinator", "num_processes", "process_id")
    }

    def check(self) -> None:
        super().check()
        self.require("num_processes", self.num_processes >= 1, "at least 1")
        known = 0 <= self.process_id < self.num_processes
        self.require("process_id", known, "at least 0 and below --num-processes")
        if self.num_processes > 1:
            port = (self.coordinator or "").rpartition(":")[2]
            self.require("coordinator", port.isdigit(), "HOST:PORT")


@contextlib.contextmanager
def cluster(flags: ClusterFlags) -> Iterator[None]:
    """Joins the cluster that the flags describe. Nothing in JAX may have run before."""
    if flags.num_processes == 1:
        yield
        return
    # Between CPUs; other devices have means of their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    number = flags.process_id
    try:
        jax.distributed.initialize(flags.coordinator, flags.num_processes, number)
        yield
    except jax.errors.JaxRuntimeError as error:
        raise Failure(
            f"process {number} is left alone (start all again with --resume): {error}"
        ) from error
    except Stopped:
        jax.distributed.shutdown()
        raise
    jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this is the process that speaks for all."""
    return jax.process_index() == 0


def any_process(fact: bool) -> bool:
    """Whether it is true in any process. All have to ask, and get the same answer."""
    return bool(multihost_utils.process_allgather(np.array(fact)).any())


def leave(code: int) -> NoReturn:
    """Ends the process; after an error, without the others.

    JAX parts from them when Python ends, and would wait long for one that is gone.
    """
    if code and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
