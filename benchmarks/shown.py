"""How measurements are shown: tables for a terminal and for a page, and a chart."""

import dataclasses
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Target:
    """What a way should reach: at most so many times another one."""

    name: str
    to: str
    bound: float
    ratio: float
    """What was measured."""

    @property
    def met(self) -> bool:
        return self.ratio <= self.bound

    def __str__(self) -> str:
        sign = "met" if self.met else "not met"
        return f"≤ {self.bound:.3g} × {self.to}: {sign}, {self.ratio:.2f}"


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured in a group."""

    title: str
    baseline: str
    milliseconds: dict[str, float]
    ratios: dict[str, float]
    targets: list[Target]

    def rows(self) -> list[list[str]]:
        """The cells of a table."""
        return [
            [
                name,
                f"{milliseconds:.3g}",
                f"{self.ratios[name]:.2f}",
                "; ".join(str(t) for t in self.targets if t.name == name),
            ]
            for name, milliseconds in self.milliseconds.items()
        ]


def table_of(result: Result) -> Table:
    table = Table(title=result.title, box=SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    table.add_column("ms", justify="right")
    table.add_column(f"/ {result.baseline}", justify="right")
    table.add_column("target")
    for row in result.rows():
        table.add_row(*row)
    return table


def markdown(results: list[Result], compiling: list[dict[str, Any]]) -> str:
    """All tables, for a page."""
    tables = []
    for result in results:
        head = [result.title, "ms", f"/ {result.baseline}", "target"]
        width = 4 if result.targets else 3
        tables.append(_markdown_table(head[:width], [r[:width] for r in result.rows()]))
    if compiling:
        head = [column.replace("_", " ") for column in compiling[0]]
        rows = [[_cell(v) for v in row.values()] for row in compiling]
        tables.append(_markdown_table(head, rows))
    return "\n".join(tables)


def _markdown_table(head: list[str], rows: list[list[str]]) -> str:
    marks = ["---:" if title[:2] in ("ms", "/ ") else "---" for title in head]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, marks, *rows)]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def compile_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="compiling a gradient", box=SIMPLE_HEAD, title_justify="left")
    for column in rows[0]:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    return table


def draw(results: list[Result], path: Path) -> None:
    """Bars of the ratios of whole steps."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    steps = [result for result in results if "step" in result.title]
    if not steps:
        return
    heights = [len(result.ratios) for result in steps]
    figure, axes = plt.subplots(
        len(steps),
        figsize=(8, 0.28 * sum(heights) + 0.6 * len(steps)),
        height_ratios=heights,
        layout="constrained",
        sharex=True,
        squeeze=False,
    )
    for result, axis in zip(steps, axes[:, 0], strict=True):
        names = list(result.ratios)[::-1]
        bars = axis.barh(names, [result.ratios[name] for name in names])
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{result.title}, relative", loc="left", fontsize=9)
        axis.tick_params(labelsize=8, labelbottom=True)
        axis.margins(x=0.1)
    figure.savefig(path, dpi=120)
    plt.close(figure)
