"""Measure what finds and what bounds singular values: how exact it is, and how slow.

Three groups, in float32 on the default device:

- estimators: the largest singular value of a matrix;
- maps: what `SpectralCap`, `Orthogonal` and their kin make of a matrix;
- convolutions: the norm of a layer as an operator.

The truth is numpy's SVD in float64 of the same float32 numbers. Times are medians of
compiled calls, with the methods taken in turn. Run `python benchmarks/estimators.py
--help` for the flags.
"""

import os


# Two threads of OpenBLAS spin while they wait for each other. When another program has
# one of two cores, that makes a decomposition a hundred times slower. Read at import.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import dataclasses
import functools as ft
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import peers
import tyro
from eqxreg._linalg import of_matrix
from eqxreg._linalg._estimators import power_step
from eqxreg._linalg._linear_map import start_vector
from jaxtyping import Array
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from timing import Call, about, in_turn, medians


Values: TypeAlias = NDArray[np.float64]

SEED = 0
# What one step of Adam or of a sign method changes in each entry.
STEP = 1e-3
# The bound of the maps. All matrices have a largest singular value of about 1.
BOUND = 0.5


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure the estimators of singular values, and the maps that bound them."""

    quick: bool = False
    """Small matrices and few repetitions: a run of about two minutes."""
    output: Path | None = None
    """A JSON file for all numbers."""

    @property
    def sizes(self) -> tuple[int, ...]:
        return (64, 256) if self.quick else (256, 1024)

    @property
    def rounds(self) -> int:
        """How often each call is timed at least."""
        return 3 if self.quick else 5


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured of one method in one case."""

    group: str
    size: str
    case: str
    method: str
    measures: dict[str, float]


# Matrices.


class Case(NamedTuple):
    """A square matrix, and the truth about it."""

    name: str
    weight: Array
    left: Values
    values: Values
    right: Values
    """The right singular vectors, as rows."""
    warm: Array
    """The first right singular vector of the matrix one training step before."""


def gaussian(rng: np.random.Generator, size: int) -> Values:
    """Independent normal entries."""
    return rng.standard_normal((size, size)) / (2 * np.sqrt(size))


def rotation(rng: np.random.Generator, size: int) -> Values:
    """A random orthogonal matrix."""
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


def with_values(
    values: Callable[[Values], Values], rng: np.random.Generator, size: int
) -> Values:
    """Random singular vectors, and singular values by their place in [0, 1)."""
    place = np.arange(size) / size
    return (rotation(rng, size) * values(place)) @ rotation(rng, size)


def decaying(rng: np.random.Generator, size: int) -> Values:
    """The singular values 1, 0.9, 0.81 and so on."""
    return with_values(lambda place: 0.9 ** (place * size), rng, size)


def one_step(rng: np.random.Generator, size: int) -> Values:
    """One training step away from orthogonal."""
    return rotation(rng, size) + training_step(rng, size)


def training_step(rng: np.random.Generator, size: int) -> Values:
    """A change of every entry by the same amount, up or down."""
    return STEP * rng.choice([-1.0, 1.0], (size, size))


MATRICES: dict[str, Callable[[np.random.Generator, int], Values]] = {
    "gaussian": gaussian,
    "linear": ft.partial(with_values, lambda place: 1 - place),
    "0.9^i": decaying,
    "top half equal": ft.partial(with_values, lambda p: np.minimum(1, 2 * (1 - p))),
    "orthogonal": rotation,
    "one step off": one_step,
}
# The cases that the maps, which are slow, are timed on.
TIMED = ("gaussian", "one step off")


def make_cases(size: int) -> Iterator[Case]:
    """The matrices of `MATRICES`, with their decompositions in float64."""
    for index, (name, make) in enumerate(MATRICES.items()):
        rng = np.random.default_rng([SEED, size, index])
        weight = make(rng, size).astype(np.float32)
        before = weight - training_step(rng, size)
        left, values, right = np.linalg.svd(weight.astype(np.float64))
        warm = np.linalg.svd(before)[2][0].astype(np.float32)
        yield Case(name, jnp.asarray(weight), left, values, right, jnp.asarray(warm))


# Estimators: functions of a weight and a vector to start from.


def cold_power(steps: int, weight: Array, warm: Array) -> Array:
    """Power iteration from a fixed vector."""
    del warm
    return warm_power(steps, weight, start_vector(weight))


def warm_power(steps: int, weight: Array, warm: Array) -> Array:
    """Power iteration from a vector that was good before the last training step."""
    linear = of_matrix(weight)
    top = power_step(linear, warm)
    for _ in range(steps - 1):
        top = power_step(linear, top.right)
    return top.value


def equinox_power(weight: Array, warm: Array) -> Array:
    """What `eqx.nn.SpectralNorm` divides by when it is first called: 15 steps of power
    iteration, and one more."""
    del warm
    key = jax.random.key(SEED)
    rows, columns = weight.shape
    linear = eqx.nn.Linear(columns, rows, use_bias=False, key=key)
    linear = eqx.tree_at(lambda layer: layer.weight, linear, weight)
    make = eqx.nn.make_with_state(eqx.nn.SpectralNorm)
    layer, state = make(linear, "weight", key=key)
    x = jnp.ones(columns)
    return jnp.linalg.norm(linear(x)) / jnp.linalg.norm(layer(x, state)[0])


def from_eqxreg(method: Any, weight: Array, warm: Array) -> Array:
    """`eqxreg.spectral_norm`."""
    del warm
    return eqxreg.spectral_norm(weight, method=method)


ESTIMATORS: dict[str, Callable[[Array, Array], Array]] = {
    "power, 1 warm step": ft.partial(warm_power, 1),
    "power, 15 steps": ft.partial(cold_power, 15),
    "eqx.nn.SpectralNorm, new": equinox_power,
    "power, 50 steps": ft.partial(cold_power, 50),
    "lanczos": ft.partial(from_eqxreg, "lanczos"),
    "gram": ft.partial(from_eqxreg, "gram"),
    "svd": ft.partial(from_eqxreg, "svd"),
}


def measure_estimators(cases: Iterable[Case], rounds: int) -> Iterator[Result]:
    """The error of each estimator on each matrix, with its sign, and its time."""
    compiled = {name: jax.jit(fn) for name, fn in ESTIMATORS.items()}
    for case in cases:
        calls: dict[str, Call] = {
            name: ft.partial(fn, case.weight, case.warm)
            for name, fn in compiled.items()
        }
        times = medians(in_turn(calls, rounds))
        for name, call in calls.items():
            error = relative(call(), case.values[0])
            measures = {"error": error, "milliseconds": times[name]}
            yield Result("estimators", str(case.values.size), case.name, name, measures)


# Maps.


class Row(NamedTuple):
    """A map, and what it should do to singular values."""

    apply: Callable[[Array], Array]
    values: Callable[[Values], Values] | None
    """The singular values of the result, from those of the raw weight. `None` if only a
    bound of 1 is promised."""
    is_chart: bool = False
    """Whether the singular vectors change too."""


def normed(values: Values) -> Values:
    return BOUND * values / values[0]


def scaled(values: Values) -> Values:
    return values * min(1, BOUND / values[0])


def capped(values: Values) -> Values:
    return np.minimum(values, BOUND)


def cap_by(method: Any) -> Row:
    return Row(eqxreg.SpectralCap(BOUND, method=method), capped)


def polar_by(method: Any) -> Row:
    return Row(eqxreg.Orthogonal(method=method), np.ones_like)


MAPS: dict[str, Row] = {
    "SpectralNorm": Row(eqxreg.SpectralNorm(BOUND), normed),
    "SpectralNorm, gram": Row(eqxreg.SpectralNorm(BOUND, method="gram"), normed),
    "SpectralScale": Row(eqxreg.SpectralScale(BOUND), scaled),
    "SpectralScale, gram": Row(eqxreg.SpectralScale(BOUND, method="gram"), scaled),
    "SpectralCap, factorisation": cap_by("factorisation"),
    "SpectralCap, products": cap_by("products"),
    "cap by jnp.linalg.svd": Row(ft.partial(peers.cap_by_svd, BOUND), capped),
    "Orthogonal, factorisation": polar_by("factorisation"),
    "Orthogonal, products": polar_by("products"),
    "polar by jnp.linalg.svd": Row(peers.polar_by_svd, np.ones_like),
    "Cayley": Row(eqxreg.Cayley(), np.ones_like, is_chart=True),
    "MatrixExp": Row(eqxreg.MatrixExp(), np.ones_like, is_chart=True),
    "AlmostOrthogonal": Row(eqxreg.AlmostOrthogonal(), None),
}


def measure_maps(cases: Iterable[Case], rounds: int) -> Iterator[Result]:
    """The errors of the results of each map, and its time."""
    compiled = {name: jax.jit(row.apply) for name, row in MAPS.items()}
    for case in cases:
        calls: dict[str, Call] = {
            name: ft.partial(fn, case.weight) for name, fn in compiled.items()
        }
        times = medians(in_turn(calls, rounds)) if case.name in TIMED else {}
        for name, call in calls.items():
            measures = errors_of(MAPS[name], case, np.asarray(call(), np.float64))
            if name in times:
                measures["milliseconds"] = times[name]
            yield Result("maps", str(case.values.size), case.name, name, measures)


def errors_of(row: Row, case: Case, result: Values) -> dict[str, float]:
    r"""Of the result of a map:

    - excess: the largest singular value, relative to what it should be at most;
    - error: the worst error of a singular value, relative to the largest;
    - orthogonality: $\max |W^\top W - I|$;
    - distance: from the exact result, relative, in the Frobenius norm.
    """
    found = np.linalg.svd(result, compute_uv=False)
    if row.values is None:
        return {"excess": relative(found[0], 1)}
    wanted = row.values(case.values)
    top = wanted[0]
    measures = {
        "excess": relative(found[0], top),
        "error": float(np.max(np.abs(found - wanted)) / top),
    }
    if np.all(wanted == 1):
        gram = result.T @ result
        measures["orthogonality"] = float(np.max(np.abs(gram - np.eye(len(gram)))))
    if not row.is_chart and is_determined(case.values, wanted):
        exact = (case.left * wanted) @ case.right
        distance = np.linalg.norm(result - exact) / np.linalg.norm(exact)
        measures["distance"] = float(distance)
    return measures


def is_determined(values: Values, wanted: Values) -> bool:
    """Whether no singular value is as small as rounding and yet to become large."""
    tiny = 100 * np.finfo(np.float32).eps
    return bool(np.all((wanted <= values) | (values > tiny * wanted)))


# Convolutions.


class Convolution(NamedTuple):
    """A layer and the size of its square images. Small, since the truth is the SVD of a
    matrix with a row for each number that comes out and a column for each that goes
    in."""

    options: dict[str, Any]
    side: int
    is_mean: bool = False
    """Whether all weights are equal, and not random."""


CONVOLUTIONS: dict[str, Convolution] = {
    "3x3, 8 to 8": Convolution(
        dict(in_channels=8, out_channels=8, kernel_size=3, padding=1), 12
    ),
    "3x3, 3 to 16": Convolution(
        dict(in_channels=3, out_channels=16, kernel_size=3, padding=1), 14
    ),
    "3x3, 8 to 16, stride 2": Convolution(
        dict(in_channels=8, out_channels=16, kernel_size=3, padding=1, stride=2), 12
    ),
    "5x5, 16 to 16, 16 groups": Convolution(
        dict(in_channels=16, out_channels=16, kernel_size=5, padding=2, groups=16), 8
    ),
    "3x3, 8 to 8, circular": Convolution(
        dict(
            in_channels=8,
            out_channels=8,
            kernel_size=3,
            padding="SAME",
            padding_mode="CIRCULAR",
        ),
        12,
    ),
    "1x1, 16 to 32": Convolution(
        dict(in_channels=16, out_channels=32, kernel_size=1), 8
    ),
    "5x5, 1 to 1, equal weights": Convolution(
        dict(in_channels=1, out_channels=1, kernel_size=5, padding=2), 32, is_mean=True
    ),
}


def make_layer(case: Convolution) -> eqx.nn.Conv2d:
    """The layer, without a bias, which has no part in its norm."""
    layer = eqx.nn.Conv2d(**case.options, use_bias=False, key=jax.random.key(SEED))
    shape = layer.weight.shape
    fan_in = float(np.prod(shape[1:]))
    weight = np.random.default_rng(SEED).standard_normal(shape) / np.sqrt(fan_in)
    weight = np.full(shape, 1 / fan_in) if case.is_mean else weight
    weight = jnp.asarray(weight, jnp.float32)
    return eqx.tree_at(lambda layer: layer.weight, layer, weight)


def true_norm(layer: eqx.nn.Conv2d, shape: tuple[int, ...]) -> float:
    """By the dense Jacobian, whose entries are those of the kernel and thus exact."""
    jacobian = jax.jit(jax.jacobian(layer))(jnp.zeros(shape))
    columns = int(np.prod(shape))
    matrix = np.asarray(jacobian, np.float64).reshape(-1, columns)
    return float(np.linalg.svd(matrix, compute_uv=False)[0])


def measure_convolutions(rounds: int) -> Iterator[Result]:
    """The error of each norm of a layer, with its sign, and its time."""
    for name, case in CONVOLUTIONS.items():
        layer = make_layer(case)
        shape = (layer.in_channels, case.side, case.side)
        methods: dict[str, Callable[[eqx.nn.Conv2d], Array]] = {
            "operator_norm": ft.partial(eqxreg.operator_norm, input_shape=shape),
            "lipschitz_bound": ft.partial(eqxreg.lipschitz_bound, input_shape=shape),
            "norm of the kernel": lambda layer: eqxreg.spectral_norm(layer.weight),
        }
        calls: dict[str, Call] = {
            method: ft.partial(eqx.filter_jit(fn), layer)
            for method, fn in methods.items()
        }
        truth = true_norm(layer, shape)
        times = medians(in_turn(calls, rounds))
        for method, call in calls.items():
            measures = {
                "error": relative(call(), truth),
                "milliseconds": times[method],
            }
            size = f"{case.side}x{case.side}"
            yield Result("convolutions", size, name, method, measures)


# Measuring.


def relative(value: Any, truth: float) -> float:
    """The error of a value, relative to the truth, with its sign."""
    return float(np.asarray(value, np.float64) / truth - 1)


# Showing.

# How to write each measure, and what to call it.
MEASURES = {
    "error": ("error", "{:+.0e}"),
    "excess": ("largest singular value above what it should be", "{:+.0e}"),
    "orthogonality": ("orthogonality error", "{:.0e}"),
    "distance": ("distance from the exact result", "{:.0e}"),
    "milliseconds": ("milliseconds", "{:.3g}"),
}


def show(console: Console, title: str, results: list[Result]) -> None:
    """A table for each measure: a line for each method, a column for each case."""
    for measure, (label, form) in MEASURES.items():
        having = [result for result in results if measure in result.measures]
        if not having:
            continue
        columns = list(dict.fromkeys(result.case for result in having))
        table = Table(
            title=f"{title}: {label}", title_justify="left", box=SIMPLE_HEAD, padding=0
        )
        table.add_column("method", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right")
        cells = {(r.method, r.case): form.format(r.measures[measure]) for r in having}
        for method in dict.fromkeys(result.method for result in having):
            table.add_row(method, *(cells.get((method, c), "") for c in columns))
        console.print(table)


def run(flags: Flags) -> None:
    """Measures everything, prints the tables and writes the file."""
    console = Console(highlight=False)
    results: list[Result] = []

    def collect(title: str, found: Iterable[Result]) -> None:
        found = list(found)
        show(console, title, found)
        results.extend(found)

    for size in flags.sizes:
        cases = list(make_cases(size))
        square = f"{size} x {size}"
        collect(f"Estimators, {square}", measure_estimators(cases, flags.rounds))
        collect(f"Maps, {square}", measure_maps(cases, flags.rounds))
    collect("Convolutions", measure_convolutions(flags.rounds))
    if flags.output is not None:
        rows = [dataclasses.asdict(result) for result in results]
        text = json.dumps({"about": about(), "results": rows}, indent=2)
        flags.output.write_text(text + "\n", encoding="utf-8")
        console.print(f"All numbers are in {flags.output}.", soft_wrap=True)


if __name__ == "__main__":
    run(tyro.cli(Flags, config=(tyro.conf.FlagCreatePairsOff,)))
