"""What is better done in another way on some accelerators.

Both ways have the same result. One of them is in the program: which one is known when
that is compiled, or, if it is exported for several platforms, when it is loaded.
"""

from collections.abc import Callable
from typing import Any

from jax import lax


def on_gpu(fn: Callable, elsewhere: Callable, *args: Any) -> Any:
    """`fn(*args)` on GPUs, and `elsewhere(*args)` on all else."""
    return lax.platform_dependent(*args, cuda=fn, rocm=fn, default=elsewhere)


def on_tpu(fn: Callable, elsewhere: Callable, *args: Any) -> Any:
    """`fn(*args)` on TPUs, and `elsewhere(*args)` on all else."""
    return lax.platform_dependent(*args, tpu=fn, default=elsewhere)


def on_cpu(fn: Callable, elsewhere: Callable, *args: Any) -> Any:
    """`fn(*args)` on CPUs, and `elsewhere(*args)` on all else."""
    return lax.platform_dependent(*args, cpu=fn, default=elsewhere)


def read_again(arrays: Any) -> Any:
    """An array, or a tuple of one and what it is used with, so that what is made of it
    is made for this use alone: for two uses, XLA would write a wider copy of it to
    memory."""
    return lax.optimization_barrier(arrays)
