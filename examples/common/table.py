"""Real numbers in columns without a download: scikit-learn's diabetes data, or a CSV.

The last column is what is predicted. Everything is checked before it is trained on.
"""

import csv
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, Key
from numpy.typing import NDArray
from sklearn.datasets import load_diabetes

from common.arm import Plan, Planner
from common.data import checksum
from common.run import Failure


# Age, sex, body-mass index, blood pressure, and six measurements of blood serum, of
# which `s5` is the logarithm of triglycerides, and `s6` blood sugar.
DIABETES = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")


@dataclasses.dataclass(frozen=True)
class Table:
    """Inputs by name, one row for each example, and the target."""

    name: str
    names: tuple[str, ...]
    inputs: NDArray[np.float64]
    target: NDArray[np.float64]

    def describe(self) -> dict[str, Any]:
        """Name, sizes, and a checksum that differs if any number does."""
        return {
            "name": self.name,
            "rows": len(self.target),
            "inputs": list(self.names),
            "checksum": checksum(self.inputs, self.target),
        }

    def first(self, chosen: tuple[str, ...]) -> "Table":
        """The same, with the inputs of these names before the others."""
        order = [self.names.index(name) for name in chosen]
        order += [i for i, name in enumerate(self.names) if name not in chosen]
        names = tuple(self.names[i] for i in order)
        return dataclasses.replace(self, names=names, inputs=self.inputs[:, order])


def load(source: str) -> Table:
    """The data that `--data` names: `diabetes`, or a CSV file with a line of names."""
    if source == "diabetes":
        inputs, target = map(np.asarray, load_diabetes(return_X_y=True, scaled=False))
        return Table(source, DIABETES, inputs, target)
    path = Path(source)
    if not path.is_file():
        raise Failure(f"--data: {source} is not a file (nor is it `diabetes`)")
    with open(path, newline="", encoding="utf-8") as file:
        header, *lines = [line for line in csv.reader(file) if line] or [[]]
    if len(header) < 3 or len(set(header)) < len(header):
        raise Failure(f"{path}: the first line must name three or more columns")
    rows = np.empty((len(lines), len(header)))
    for number, line in enumerate(lines, start=2):
        try:
            rows[number - 2] = [float(cell) for cell in line]
        except ValueError as error:
            raise Failure(f"{path}, row {number}: {error}") from None
    if len(rows) < 30 or not np.isfinite(rows).all():
        raise Failure(f"{path}: 30 rows or more of finite numbers are needed")
    return Table(path.stem, tuple(header[:-1]), rows[:, :-1], rows[:, -1])


class Split(NamedTuple):
    """Rows: a test that is the same for all seeds, and two parts of the others that are
    drawn anew for each."""

    test: NDArray[np.int64]
    train: NDArray[np.int64]
    validation: NDArray[np.int64]


def split(rows: int, seeds: int) -> Split:
    """A third to test on; of the others a fifth to validate on."""
    order = np.random.default_rng(0).permutation(rows)
    test, rest = order[: rows // 3], order[rows // 3 :]
    drawn = np.stack(
        [np.random.default_rng((1, s)).permutation(rest) for s in range(seeds)]
    )
    cut = len(rest) // 5
    return Split(test, drawn[:, cut:], drawn[:, :cut])


class Scaled(NamedTuple):
    """Columns of mean 0 and variance 1 over all rows but those of the test."""

    inputs: NDArray[np.float64]
    target: NDArray[np.float64]
    # Of the inputs, and of the target, in their own units.
    centre: NDArray[np.float64]
    spread: NDArray[np.float64]
    mean: float
    deviation: float


def scaled(table: Table, rows: Split) -> Scaled:
    """The columns of a table, without a look at those rows."""
    rest = np.setdiff1d(np.arange(len(table.target)), rows.test)
    inputs, target = table.inputs[rest], table.target[rest]
    centre, spread = inputs.mean(axis=0), np.maximum(inputs.std(axis=0), 1e-12)
    mean, deviation = float(target.mean()), float(target.std())
    return Scaled(
        (table.inputs - centre) / spread,
        (table.target - mean) / deviation,
        centre,
        spread,
        mean,
        deviation,
    )


def least_squares(
    data: Scaled, rows: Split
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights and bias of the straight line through each seed's training set."""
    lines = []
    for train in rows.train:
        columns = np.column_stack([data.inputs[train], np.ones(len(train))])
        lines.append(np.linalg.lstsq(columns, data.target[train], rcond=None)[0])
    return np.stack(lines)[:, :-1], np.stack(lines)[:, -1]


class SubsetPlanner(Planner):
    """Like `Planner`, but each seed has rows of its own to train on.

    **Arguments:**

    - `keys`: one key per seed.
    - `subsets`: the rows of each seed.
    - `batch_size`: the number of examples in a step.
    """

    def __init__(
        self,
        keys: Key[Array, " seeds"],
        subsets: Int[Array, "seeds rows"],
        batch_size: int,
    ):
        super().__init__(keys, subsets.shape[1], batch_size)
        self._subsets = subsets
        self._among = jax.jit(jax.vmap(lambda subset, rows: subset[rows]))

    def __call__(self, epoch: int) -> Plan:
        rows, key = super().__call__(epoch)
        return Plan(self._among(self._subsets, rows), key)
