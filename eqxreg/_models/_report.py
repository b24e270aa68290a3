"""`Report`: the numbers of `_metrics.py` with what is known without them, as a table.

`rich` and matplotlib are used where they are, and needed only for plots.
"""

import dataclasses
import html
import inspect
import io
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer
from jax.experimental.multihost_utils import process_allgather
from jaxtyping import Array, PyTree

from .._maps import Chain, Parametrization, Projection, check_projection
from .._tree import require_selection, weights
from .._values import value_of
from ._metrics import Subject, metrics_of, subjects_of


@dataclasses.dataclass(frozen=True)
class Row:
    """What a report says of one weight."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    layer: str
    map: str
    bounded: float | None
    bounds_operator: bool
    norm: float
    singular_value: float
    stable_rank: float
    distance: float | None
    active: float | None


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What the weights of a model are like, as [`eqxreg.report`][] finds it.

    It prints as a table, in notebooks too; with `rich`, if that is installed.

    **Attributes:**

    - `rows`: one for each weight, or for each layer of a stack, with the attributes
        - `path`: where the weight is in the model, with an index if it is of a stack.
        - `shape`, `dtype`: those of the weight in one layer.
        - `layer`: the class of the layer that owns it, empty in plain trees.
        - `map`: what makes the weight, or the set that it is measured against: maps in
            the order in which they are applied, the outermost last. Empty if there is
            none.
        - `bounded`: what the map bounds: the largest of the norms that it speaks of, of
            the weight that the layer computes with. That of the units, if each has a
            norm of its own. `None` if the map bounds no norm of the weight itself.
        - `bounds_operator`: whether a wrapper bounds the layer as an operator, by
            `input_shape`, and not its weight. The table has that for a norm then.
        - `norm`, `singular_value`, `stable_rank`, `distance`, `active`: numbers, as in
            [`eqxreg.metrics`][], of the whole weight. If it is in wrappers, `distance`
            is from the raw weight to what they make of it. The last two are `None` if
            there is no set.
    """

    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """**Returns:**

        A dict with a dict for each row, keyed by path, of strings, numbers, lists and
        `None`, which `json.dumps` takes.
        """
        entries = [{**vars(row), "shape": list(row.shape)} for row in self.rows]
        return {entry.pop("path"): entry for entry in entries}

    def plot(self, ax: Any = None) -> Any:
        """The norms and the largest singular values as bars, two for each weight.

        **Arguments:**

        - `ax`: the matplotlib axes to draw into. Defaults to those of a new figure.

        **Returns:**

        The axes.

        **Raises:**

        - `ImportError`: if matplotlib is not installed.
        """
        if ax is None:
            try:
                import matplotlib.pyplot as plt
            except ImportError as error:
                raise ImportError(
                    "`Report.plot` needs matplotlib, which is not installed: "
                    '`pip install "eqxreg[examples]"`.'
                ) from error
            size = (7, 1 + 0.4 * len(self.rows))
            _, ax = plt.subplots(figsize=size, layout="constrained")
        places = np.arange(len(self.rows))
        bars = {"norm": "norm", "singular_value": "largest singular value"}
        for offset, (name, label) in zip((-0.2, 0.2), bars.items(), strict=True):
            widths = [getattr(row, name) for row in self.rows]
            ax.barh(places + offset, widths, height=0.4, label=label)
        ax.set_yticks(places, [row.path for row in self.rows])
        ax.invert_yaxis()
        ax.legend()
        return ax

    def __str__(self) -> str:
        try:
            from rich.console import Console
        except ImportError:
            return _plain_table(self.rows)
        # As wide as the table is; in a terminal no wider than that, if it is readable.
        columns = max(shutil.get_terminal_size().columns, 100)
        width = columns if sys.stdout.isatty() else 10_000
        file = io.StringIO()
        console = Console(
            file=file, width=width, force_terminal=False, force_jupyter=False
        )
        console.print(self.__rich__())
        lines = file.getvalue().splitlines()
        return "\n".join(line.rstrip() for line in lines).strip("\n")

    __repr__ = __str__

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        lines = list(map(_cells, self.rows))
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for i, (name, align) in enumerate(_COLUMNS.items()):
            # Where there is no room, paths and maps are folded, and numbers are not.
            whole = [*name.split(), *(cells[i] for cells in lines)]
            width = None if name in ("path", "map") else max(map(len, whole))
            table.add_column(name, justify=align, overflow="fold", min_width=width)
        for cells in lines:
            # A path such as `[0]` is no markup.
            table.add_row(*map(Text, cells))
        return table

    def _repr_html_(self) -> str:
        def line(tag: str, cells: Any) -> str:
            inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
            return f"<tr>{inner}</tr>"

        body = "".join(line("td", _cells(row)) for row in self.rows)
        head = line("th", _COLUMNS)
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def report(
    model: PyTree,
    where: Any = weights,
    *,
    projection: Projection | None = None,
    state: eqx.nn.State | None = None,
) -> Report:
    """What the weights of a model are like, as a table: a row for each weight and, for
    layers that are stacked, for each of them.

    If the weights are spread over several processes, all of these have to call this,
    and get the same table.

    **Arguments:**

    - `model`, `where`, `projection`, `state`: as in [`eqxreg.metrics`][].

    **Returns:**

    A [`eqxreg.Report`][].

    **Raises:**

    - As [`eqxreg.metrics`][] does; and a `TypeError` inside `jit`, where there are no
        numbers yet.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import eqxreg
        >>> tree = {"weight": jnp.array([[3.0, 0.0], [0.0, 4.0]])}
        >>> report = eqxreg.report(tree, projection=eqxreg.MaxNorm(3.0, axis="unit"))
        >>> [row] = report.rows
        >>> row.map, row.norm, row.stable_rank, row.active
        ("MaxNorm(3.0, axis='unit')", 5.0, 1.5625, 1.0)

        ```
    """
    if projection is not None:
        check_projection(projection)
    chosen = require_selection(where, model, "where")
    found = _compiled(model, chosen, projection, state, bounded=True)
    if any(isinstance(number, Tracer) for number in found.values()):
        raise TypeError(
            "`report` needs the values of the weights, which are not known inside "
            "`jit`. There, use `eqxreg.metrics`."
        )
    found = jax.device_get({name: _whole(number) for name, number in found.items()})
    subjects = subjects_of(model, chosen, projection)
    return Report(tuple(row for s in subjects for row in _rows(s, found)))


_compiled = eqx.filter_jit(metrics_of)


def _whole(number: Array) -> Any:
    """The numbers of a stack, of which this process may have only some."""
    whole = number.is_fully_addressable or number.is_fully_replicated
    return number if whole else process_allgather(number, tiled=True)


def _rows(subject: Subject, found: dict[str, Any]) -> Iterator[Row]:
    """The rows of a weight: one, or one for each layer of a stack."""
    site = subject.site

    def number(name: str, index: tuple[int, ...]) -> Any:
        values = found.get(f"{site.path}/{name}")
        return None if values is None else float(values[index])

    for index in np.ndindex(*subject.stack):
        yield Row(
            path=site.path + "".join(f"[{i}]" for i in index),
            shape=tuple(site.leaf.shape)[len(subject.stack) :],
            dtype=str(site.leaf.dtype),
            layer="" if site.owner is None else type(site.owner).__name__,
            map=" → ".join(map(_label, subject.maps)),
            bounded=number("bounded", index),
            bounds_operator=subject.bounds_operator,
            norm=number("norm", index),
            singular_value=number("singular_value", index),
            stable_rank=number("stable_rank", index),
            distance=number("distance", index),
            active=number("active", index),
        )


def _label(made_by: Any) -> str:
    """A map as its user would write it, without what is as by default."""
    if isinstance(made_by, Chain):
        return " → ".join(map(_label, made_by.maps))
    kind = type(made_by)
    if not isinstance(made_by, Parametrization):
        # A wrapper that is not ours, and may have the name of a map.
        equinox = kind.__module__.startswith("equinox.")
        return f"eqx.nn.{kind.__name__}" if equinox else kind.__name__
    arguments = []
    for parameter in list(inspect.signature(kind.__init__).parameters.values())[1:]:
        value = getattr(made_by, parameter.name, parameter.default)
        if parameter.default is parameter.empty:
            arguments.append(_text(value))
        # What a map was bound to is not what its user wrote.
        elif np.ndim(value) == 0 and _text(value) != _text(parameter.default):
            arguments.append(f"{parameter.name}={_text(value)}")
    return f"{kind.__name__}({', '.join(arguments)})"


def _text(value: Any) -> str:
    if isinstance(value, Parametrization):
        return _label(value)
    value = value_of(value)
    if eqx.is_array(value):
        known = value.ndim == 0 and not isinstance(value, Tracer)
        return f"{value.item():.4g}" if known else eqx.tree_pformat(value)
    return repr(value)


# The columns of the table, and the cells in them.

_NUMBERS = ("bounded", "norm", "σ₁", "stable rank", "distance")
_COLUMNS: dict[str, Any] = {
    **dict.fromkeys(("path", "shape", "dtype", "layer", "map"), "left"),
    **dict.fromkeys(_NUMBERS, "right"),
    "active": "right",
}


def _cells(row: Row) -> list[str]:
    def text(number: float | None) -> str:
        return "" if number is None else f"{number:.4g}"

    numbers = (row.norm, row.singular_value, row.stable_rank, row.distance)
    return [
        row.path,
        "×".join(map(str, row.shape)),
        row.dtype,
        row.layer,
        row.map,
        "operator" if row.bounds_operator else text(row.bounded),
        *map(text, numbers),
        "" if row.active is None else f"{row.active:.1%}",
    ]


def _plain_table(rows: tuple[Row, ...]) -> str:
    lines = [list(_COLUMNS), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])

    def line(cells: list[str]) -> str:
        aligned = [
            cell.rjust(width) if align == "right" else cell.ljust(width)
            for cell, width, align in zip(cells, widths, _COLUMNS.values(), strict=True)
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, lines))
