"""What a run shows while it trains and when it is done: progress, table, figure."""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")  # Draws into memory: no display is needed.

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


# Okabe and Ito's colours, told apart with every kind of colour vision.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function that takes one of `total` steps and says what was done.

    A terminal gets a bar; a file or a pipe a plain line at every tenth of the way.
    """
    console = Console(highlight=False)
    if console.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, *times, console=console, transient=True) as bar:
            task = bar.add_task("compiling", total=total)
            yield lambda text: bar.update(task, advance=1, description=text)
        return
    done = 0

    def advance(text: str) -> None:
        nonlocal done
        done += 1
        if done * 10 // total > (done - 1) * 10 // total:
            console.print(f"{done * 100 // total:3d} %  {text}")

    yield advance


def table(title: str, results: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Prints one line per method. A ± is followed by the standard error of the mean."""
    header = ("method", "test acc., %", "max norm", "distance", "seconds")
    rows = [
        (
            result["label"],
            plus_minus(result["test_accuracy"], 100),
            f"{result['largest_unit_norm']['largest']:.4f}",
            f"{result['distance_to_set']['mean']:.2g}",
            f"{result['seconds']['training']:.1f}",
        )
        for result in results.values()
    ]
    print_rows(title, header, rows, f"All numbers and the figure are in {out}.")


def print_rows(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str
) -> None:
    """Prints a table whose first column holds names, and a line under it."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column(header[0])
    for name in header[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(table)
    console.print(note, soft_wrap=True)


def plus_minus(metric: Mapping[str, Any], scale: float, digits: int = 2) -> str:
    """Mean ± standard error, or the mean alone if there is one seed."""
    mean, error = metric["mean"], metric["standard_error"]
    text = f"{scale * mean:.{digits}f}"
    return text if error is None else f"{text} ± {scale * error:.{digits}f}"


@dataclasses.dataclass(frozen=True)
class Curve:
    """What the figure shows of one method."""

    label: str
    # One row per epoch, one column per seed.
    accuracy: NDArray[np.float64]
    # The norms of all units and seeds, in any shape.
    unit_norms: NDArray[np.float64]


def figure(title: str, curves: Sequence[Curve], bound: float, note: str = "") -> bytes:
    """A PNG: accuracy by epoch, and unit norms against the bound."""
    accuracy = {curve.label: 100 * curve.accuracy for curve in curves}
    return drawn(
        title,
        note,
        lambda axes: _accuracy_panel(axes, accuracy),
        lambda axes: _norm_panel(axes, curves, bound),
    )


def drawn(
    title: str, note: str, left: Callable[[Axes], None], right: Callable[[Axes], None]
) -> bytes:
    """A PNG, 1200 by 500, of two panels. Under them is a note, for whoever looks at
    nothing else."""
    style: dict[Any, Any] = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
    }
    with plt.rc_context(style):
        canvas, panels = plt.subplots(
            1, 2, figsize=(12, 5), width_ratios=(1.0, 1.05), layout="constrained"
        )
        canvas.suptitle(title, x=0.012, ha="left", fontsize=11, color="0.35")
        canvas.supxlabel(note, x=0.012, ha="left", fontsize=12, weight="bold")
        for draw, axes in zip((left, right), panels, strict=True):
            draw(axes)
        png = io.BytesIO()
        canvas.savefig(png, format="png", dpi=100)
        plt.close(canvas)
    return png.getvalue()


def mean_curves(
    axes: Axes, curves: Mapping[str, NDArray[np.float64]], steps: int = 1
) -> None:
    """Means by epoch of numbers with a row for each epoch and a column for each seed,
    with a band of one standard error. By step if an epoch is of several `steps`."""
    for (label, numbers), colour in zip(curves.items(), COLOURS, strict=False):
        epochs, seeds = numbers.shape
        epoch, mean = steps * np.arange(1, epochs + 1), numbers.mean(axis=1)
        axes.plot(epoch, mean, color=colour, lw=1.8, label=label)
        if seeds > 1:
            error = numbers.std(axis=1, ddof=1) / np.sqrt(seeds)
            axes.fill_between(
                epoch, mean - error, mean + error, color=colour, alpha=0.15, lw=0
            )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="0.9")


def _accuracy_panel(axes: Axes, curves: Mapping[str, NDArray[np.float64]]) -> None:
    """Test accuracy by epoch, in per cent."""
    mean_curves(axes, curves)
    # The first epochs would squeeze the part that is of interest.
    means = [np.nan_to_num(percent.mean(axis=1)) for percent in curves.values()]
    floor = min(mean[len(mean) // 8 :].min() for mean in means)
    axes.set_ylim(floor - 0.5, min(100.0, axes.get_ylim()[1]))
    axes.set(title="Test accuracy, %", xlabel="epoch")
    # Where curves neither rise nor fall.
    axes.legend(loc="lower left", bbox_to_anchor=(0.06, 0), fontsize=10, frameon=False)


def _norm_panel(axes: Axes, curves: Sequence[Curve], bound: float) -> None:
    """One histogram of unit norms per method, above each other, and the bound."""
    finite = [c.unit_norms[np.isfinite(c.unit_norms)] for c in curves]
    largest = max([bound, *(norms.max(initial=0) for norms in finite)])
    # The bound is an edge, so that no bar crosses it. It belongs to the bar below it.
    # What lies far out, as when training diverges, is left out of the picture.
    below = int(np.clip(60 * bound / largest, 1, 50))
    bars = int(min(np.ceil((below + 1) * largest / bound), 500))
    edges = np.arange(bars + 1) * bound / below * (1 + 1e-9)
    rows = np.arange(len(curves))[::-1]
    for row, norms, colour in zip(rows, finite, COLOURS, strict=False):
        counts, _ = np.histogram(norms, edges)
        heights = row + 0.85 * counts / max(counts.max(), 1)
        axes.stairs(heights, edges, baseline=row, color=colour, fill=True)
        axes.axhline(row, color="0.8", lw=0.8, zorder=0)
    axes.axvline(bound, ymax=len(curves) / (len(curves) + 0.3), color="0.25", ls="--")
    axes.text(bound, len(curves), f"bound {bound:g}", ha="center", color="0.25")
    axes.set(title="Norm of each hidden unit's incoming weights", xlabel="norm")
    axes.set(xlim=(0, edges[-1]), ylim=(0, len(curves) + 0.3))
    axes.set_yticks(rows + 0.3, [curve.label for curve in curves])
    axes.tick_params(axis="y", length=0)
    for label, colour in zip(axes.get_yticklabels(), COLOURS, strict=False):
        label.set_color(colour)
    axes.spines["left"].set_visible(False)
