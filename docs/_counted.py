"""Tables of what compilers for TPUs and GPUs make of training steps.

They are from `docs/data/tpu.json` and `h100.json`, which `benchmarks/accelerators.py`
writes.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


DATA = Path(__file__).parent / "data"
PLACE = re.compile(r"<!-- counted: ([^>]*?) -->")


def with_counts(page: str, data: Path = DATA) -> str:
    """The page, with the tables in their places, such as
    `<!-- counted: one chip, float32, 256 -->`."""
    if not PLACE.search(page):
        return page
    tpu, h100 = (
        json.loads((data / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("tpu", "h100")
    )

    def counted(match: re.Match[str]) -> str:
        what = match[1]
        if what == "versions":
            return _versions(tpu["about"])
        if what == "limits":
            return _limits(tpu["limits"])
        where, dtype, batch = what.split(", ")
        if where == "H100":
            return _of(h100["kernels"], _kernels, dtype=dtype, batch=int(batch))
        show = _bytes if where == "one chip" else _collectives
        return _of(tpu["steps"], show, chips=where, dtype=dtype, batch=int(batch))

    return PLACE.sub(counted, page)


def _of(rows: list[dict], show: Callable[..., str], **keys: Any) -> str:
    group = [row for row in rows if all(row[k] == v for k, v in keys.items())]
    if not group:
        raise ValueError(f"Nothing was counted for {keys}.")
    return show(group, group[0])


def _versions(about: dict[str, str]) -> str:
    return (
        f"JAX {about['jax']} with libtpu {about['libtpu']}, and Equinox "
        f"{about['equinox']}"
    )


def _table(titles: list[str], rows: list[list[Any]]) -> str:
    rule = ["---"] + ["---:"] * (len(titles) - 1)
    return "\n".join(
        f"| {' | '.join(map(str, row))} |" for row in [titles, rule, *rows]
    )


def _ratios(step: dict, base: dict) -> list[str]:
    keys = ("bytes", "usual_bytes", "usual_hbm")
    return [f"{step[k] / base[k]:.2f}" for k in keys]


def _bytes(group: list[dict], base: dict) -> str:
    rows = [[s["variant"], *_ratios(s, base), f"{s['peak'] / 1e6:.0f}"] for s in group]
    titles = [f"batch {base['batch']}", "bytes", "usual", "HBM", "peak, MB"]
    return f"{_table(titles, rows)}\n\n{_unit(base)}."


def _collectives(group: list[dict], base: dict) -> str:
    def all_reduces(step: dict) -> str:
        usual, dear = (
            step[kind].get("all-reduce", {"number": 0})["number"]
            for kind in ("collectives", "all_collectives")
        )
        return str(usual) if usual == dear else f"{usual} ({dear})"

    rows = [
        [s["variant"], *_ratios(s, base), f"{s['peak'] / 1e6:.0f}", all_reduces(s)]
        for s in group
    ]
    titles = [f"batch {base['batch']}", "bytes", "usual", "HBM", "peak, MB"]
    return f"{_table([*titles, 'all-reduces'], rows)}\n\n{_unit(base)}, on each chip."


def _unit(base: dict) -> str:
    return (
        f"Here 1.00 is {base['bytes'] / 1e6:.0f} MB by XLA's count, and "
        f"{base['usual_hbm'] / 1e6:.0f} MB to and from the main memory"
    )


def _kernels(group: list[dict], base: dict) -> str:
    def counts(step: dict) -> list[Any]:
        cells = []
        for kind in ("forward", "step"):
            number = sum(step[kind].values())
            added = number - sum(base[kind].values())
            cells += [number, "" if step is base else f"{added:+d}"]
        return [*cells, step["rare"], f"{step['bytes'] / base['bytes']:.2f}"]

    rows = [[step["variant"], *counts(step)] for step in group]
    titles = [f"batch {base['batch']}", "forward", "added", "step", "added"]
    table = _table([*titles, "in rare branches", "bytes"], rows)
    return f"{table}\n\nHere 1.00 is {base['bytes'] / 1e6:.0f} MB."


def _limits(limits: list[dict]) -> str:
    rows = [
        [
            c["variant"],
            c["dtype"],
            c["batch"],
            f"{c['ratio']:.3f}" + ("" if c["ratio"] <= c["limit"] else " **above**"),
            f"{c['limit']:.2f}",
        ]
        for c in limits
    ]
    return _table(["step", "dtype", "batch", "bytes", "at most"], rows)
