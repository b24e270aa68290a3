"""Draws the rooms of the package, and who imports from whom, as an SVG.

All of it is read: rooms are the folders of `eqxreg/`, their order is that of the
contract in `pyproject.toml`, and an arc is an import through a door.
"""

import ast
import re
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "eqxreg"

STEP, HEIGHT, LEFT, WIDTH, RIGHT = 70, 56, 8, 500, 180
STYLE = """
text { font: 11px sans-serif; fill: #444; }
.name { font-weight: bold; font-size: 13px; fill: #222; }
rect { fill: #eef1fb; stroke: #4051b5; }
path { fill: none; stroke: #4051b5; opacity: 0.65; }
.head { fill: #4051b5; stroke: none; }
@media (prefers-color-scheme: dark) {
  text { fill: #ccc; } .name { fill: #eee; }
  rect { fill: #23283a; stroke: #9fa8da; } path { stroke: #9fa8da; }
  .head { fill: #9fa8da; }
}
"""


def rooms() -> list[str]:
    """The rooms, from the top down."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contracts = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
    [layers] = [c["layers"] for c in contracts if c["type"] == "layers"]
    return [room for layer in layers for room in re.split(r"\W+", layer)]


def files(room: str) -> list[str]:
    found = (PACKAGE / room).glob("*.py")
    return sorted(path.stem for path in found if path.stem != "__init__")


def imports(room: str) -> dict[str, int]:
    """The rooms that this one imports from, and how many of its files do."""
    found = [set(_entered(path)) for path in (PACKAGE / room).glob("*.py")]
    return {other: n for other in rooms() if (n := sum(other in f for f in found))}


def _entered(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 2 and node.module:
            yield node.module


def draw() -> str:
    order = rooms()
    middle = {room: LEFT + i * STEP + HEIGHT / 2 for i, room in enumerate(order)}
    edge = LEFT + WIDTH
    parts = []
    for room in order:
        top = middle[room] - HEIGHT / 2
        named = " ".join(name.removeprefix("_") for name in files(room))
        lines = textwrap.wrap(named, 66)
        above = middle[room] + 4 - 6.5 * (len(lines) - 1)
        parts += [
            f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>',
            f'<text class="name" x="{LEFT + 10}" y="{middle[room] + 5}">{room}</text>',
            *(
                f'<text x="{LEFT + 105}" y="{above + 13 * i}">{line}</text>'
                for i, line in enumerate(lines)
            ),
        ]
    for room in order:
        for other, count in imports(room).items():
            start, end = middle[room] + 8, middle[other] - 8
            out = edge + 24 * (order.index(other) - order.index(room))
            curve = f"M{edge},{start} C{out},{start} {out},{end} {edge + 7},{end}"
            label = f"{room} imports from {other} in {count} files"
            line = f'<path d="{curve}" stroke-width="{0.6 + 0.25 * count}">'
            parts += [
                f"{line}<title>{label}</title></path>",
                f'<path class="head" d="M{edge},{end} l8,-4 v8 z"/>',
            ]
    size = f"0 0 {LEFT + WIDTH + RIGHT} {2 * LEFT + STEP * len(order)}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>\n"])
