"""Numbers for people and for programs: the summary, metrics.csv and results.json."""

import csv
import dataclasses
import importlib.metadata
import io
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.arm import Arm
from common.loop import History
from common.run import Flags, write_files


def summary(values: NDArray[np.float64]) -> dict[str, Any]:
    """Mean, standard error and largest of one number per seed.

    One seed has no standard error: it is None then, not zero.
    """
    count = len(values)
    error = values.std(ddof=1) / math.sqrt(count) if count > 1 else None
    return {
        "mean": values.mean(),
        "standard_error": error,
        "largest": values.max(),
        "seeds": values,
    }


def summarise(arm: Arm, history: History) -> dict[str, Any]:
    """An arm's label, and every metric after the last epoch; of the time, the sum."""
    final = {name: rows[-1] for name, rows in history.items() if name != "seconds"}
    metrics = {name: summary(values) for name, values in final.items()}
    training = history["seconds"][:, 0].sum()
    seconds = {"training": training, "compiling": arm.compile_seconds}
    return {"label": arm.label, **metrics, "seconds": seconds}


def save(
    flags: Flags,
    *,
    data: Mapping[str, Any],
    histories: Mapping[str, History],
    results: Mapping[str, Any],
    figure: bytes,
) -> None:
    """Writes metrics.csv, results.json and figure.png to the output directory."""
    write_files(
        flags.out,
        {
            "metrics.csv": metrics_csv(histories),
            "results.json": strict_json({**about(flags, data), "methods": results}),
            "figure.png": figure,
        },
    )


def save_results(
    flags: Flags, data: Mapping[str, Any], results: Mapping[str, Any]
) -> None:
    """Writes results.json to the output directory."""
    content = strict_json({**about(flags, data), "results": results})
    write_files(flags.out, {"results.json": content})


def about(flags: Flags, data: Mapping[str, Any]) -> dict[str, Any]:
    """What was run: on which data, with which flags and versions."""
    packages = ("eqxreg", "equinox", "jax", "jaxlib", "optax", "numpy")
    return {
        "data": data,
        "flags": dataclasses.asdict(flags),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def strict_json(value: Any) -> bytes:
    """JSON as the standard has it: what is not a finite number becomes null."""
    return (json.dumps(_plain(value), indent=2, allow_nan=False) + "\n").encode()


def metrics_csv(histories: Mapping[str, History]) -> bytes:
    """One line per method, epoch and seed; empty where a number is not finite."""
    names = list(next(iter(histories.values())))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "epoch", "seed", *names])
    for method, history in histories.items():
        epochs, seeds = history[names[0]].shape
        for epoch in range(epochs):
            for seed in range(seeds):
                values = [_plain(history[name][epoch, seed]) for name in names]
                writer.writerow([method, epoch + 1, seed, *values])
    return text.getvalue().encode()


def _plain(value: Any) -> Any:
    """The same in the types of JSON."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value if isinstance(value, (bool, int, type(None))) else str(value)
