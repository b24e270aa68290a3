"""Time several ways of doing the same thing, side by side in one process."""

import importlib.metadata
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import eqxreg
import jax


Call: TypeAlias = Callable[[], Any]


def in_turn(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """The times of each call in milliseconds, after one that is not counted. They take
    turns, so that what else the machine does meets all of them, in an order that
    changes, for what one leaves in the caches meets the next. Fast ones have more
    rounds, up to a second of them."""
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    done = 0
    while done < rounds or (done < 10 * rounds and time.perf_counter() < begin + 1):
        for name in random.Random(done).sample(list(calls), len(calls)):
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            times[name].append(1e3 * (time.perf_counter() - start))
        done += 1
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median time of each call."""
    return {name: statistics.median(taken) for name, taken in times.items()}


def ratios(times: Mapping[str, list[float]], to: str) -> dict[str, float]:
    """The median, over the rounds, of the time of each call relative to one of them."""
    return {
        name: statistics.median(a / b for a, b in zip(taken, times[to], strict=True))
        for name, taken in times.items()
    }


def about(*packages: str) -> dict[str, Any]:
    """On what the numbers were measured."""
    # It may be read from a checkout, and not installed.
    versions = {"eqxreg": eqxreg.__version__}
    for name in ("equinox", "jax", "jaxlib", "numpy", *packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": jax.devices()[0].platform,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
    }
