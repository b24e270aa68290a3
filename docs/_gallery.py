"""Tables of the gallery, from the `results.json` that a trainer leaves beside its
picture: none of their numbers is typed.

On a page `<!-- results: wasserstein, estimate -->` becomes a table with a row for each
method, and mean and standard error of these metrics; `<!-- run: wasserstein -->` a line
that says with which seeds and versions; `<!-- code: wasserstein, network -->` the
functions of the trainer with these names; and `<!-- cards: wasserstein -->` a grid of
these pages, each with its picture and its title.
"""

import ast
import json
import re
from pathlib import Path
from typing import Any


GALLERY = Path(__file__).parent / "gallery"
EXAMPLES = GALLERY.parents[1] / "examples"
PLACE = re.compile(r"<!-- (results|run|code|cards): ([^>]*?) -->")


def with_results(page: str, gallery: Path = GALLERY) -> str:
    """The page, with tables and lines in their places."""

    def shown(match: re.Match[str]) -> str:
        name, *metrics = names = match[2].split(", ")
        if match[1] == "cards":
            return _cards(names, gallery)
        if match[1] == "code":
            return _code(EXAMPLES / f"{name}.py", metrics)
        text = (gallery / f"{name}.json").read_text(encoding="utf-8")
        found = json.loads(text)
        return _run(found) if match[1] == "run" else _table(found, metrics)

    return PLACE.sub(shown, page)


def _cards(names: list[str], gallery: Path) -> str:
    cards = [
        f"- [![]({name}.png)]({name}.md)\n\n    [{_title(gallery, name)}]({name}.md)"
        for name in names
    ]
    return "\n\n".join(['<div class="grid cards" markdown>', *cards, "</div>"])


def _title(gallery: Path, name: str) -> str:
    page = (gallery / f"{name}.md").read_text(encoding="utf-8")
    return page.partition("\n")[0].removeprefix("# ")


def _table(found: dict[str, Any], metrics: list[str]) -> str:
    titles = ["", *(name.replace("_", " ") for name in metrics), "seconds"]
    rows = [titles, ["---"] + ["---:"] * (len(titles) - 1)]
    for result in found["methods"].values():
        cells = [_plus_minus(result[name]) for name in metrics]
        seconds = f"{result['seconds']['training']:.0f}"
        rows.append([result["label"], *cells, seconds])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _code(path: Path, names: list[str]) -> str:
    text = path.read_text(encoding="utf-8")
    functions = {
        node.name: ast.get_source_segment(text, node)
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    }
    source = "\n\n\n".join(str(functions[name]) for name in names)
    return f"```python\n{source}\n```"


def _plus_minus(metric: dict[str, Any]) -> str:
    mean, error = metric["mean"], metric["standard_error"]
    return f"{mean:.4f}" if error is None else f"{mean:.4f} ± {error:.4f}"


def _run(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items())
    return f"{found['flags']['seeds']} seeds; {versions}."
