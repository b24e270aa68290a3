"""Tables of `docs/data/gpu.json`, which `make bench-gpu` measures on a real card."""

import json
from pathlib import Path
from typing import Any


PATH = Path(__file__).parent / "data" / "gpu.json"
PLACE = "<!-- measured on a card -->"
NOT_RUN = "**Not run yet**: no card was at hand."


def with_tables(page: str, path: Path = PATH) -> str:
    """The page, with the tables in their place."""
    if not path.exists():
        return page.replace(PLACE, NOT_RUN)
    return page.replace(PLACE, tables(json.loads(path.read_text(encoding="utf-8"))))


def tables(measured: dict[str, Any]) -> str:
    about, checks = measured["about"], measured["checks"]
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items())
    passed = sum(check["passed"] for check in checks)
    parts = [
        f"On one {about['card']}, with {versions}. {passed} of {len(checks)} checks "
        "against float64 on the host passed, twice with the same bits.",
        *(_failed(check) for check in checks if not check["passed"]),
        *(_times(result) for result in measured["times"]),
    ]
    left_out = [*measured["left_out"], *(f["title"] for f in measured["failed"])]
    if left_out:
        parts.append(f"Without a result: {'; '.join(left_out)}.")
    return "\n\n".join(parts)


def _failed(check: dict[str, Any]) -> str:
    return (
        f"- **Not passed**: {check['name']} in {check['dtype']}, value "
        f"{check['value']:.0e}, gradient {check['gradient']:.0e}, at most "
        f"{check['limit']:.0e}; twice the same: {check['same_twice']}."
    )


def _times(result: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {taken:.3g} | {result['ratios'][name]:.2f} |"
        for name, taken in result["milliseconds"].items()
    ]
    head = f"| {result['title']} | ms | / {result['baseline']} |"
    return "\n".join([head, "| --- | ---: | ---: |", *rows])
