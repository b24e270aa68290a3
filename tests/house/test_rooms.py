"""The rooms of the package: imports go down, and through doors only.

The contracts are in `pyproject.toml`; here they are broken, one at a time."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import eqxreg
import grimp
import pytest
from scripts import ROOT, loaded


LINTER = Path(sysconfig.get_path("scripts")) / "lint-imports"


@pytest.fixture
def house(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "eqxreg", tmp_path / "eqxreg", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(house):
    # It reads the package that is found first, and runs none of it.
    command = [str(LINTER), "--no-cache"]
    environment = {"PYTHONPATH": str(house), "PATH": "", "COLUMNS": "200"}
    found = subprocess.run(
        command, cwd=house, env=environment, capture_output=True, text=True
    )
    return found.returncode, found.stdout + found.stderr


def test_imports_go_down_and_through_doors(house):
    code, text = lint(house)
    assert code == 0, text


@pytest.mark.parametrize(
    "importer, line, broken",
    [
        ("_linalg/_norms", "from .._values import Bound", "A room imports only"),
        ("_maps/_base", "from .._wrappers import Constraint", "A room imports only"),
        ("_tree/_paths", "from .._models import bake", "A room imports only"),
        ("_transforms/_params", "from .._lipschitz import MaxMin", "A room imports"),
        ("_models/_bake", "from .._maps._norm import MaxNorm", "`_maps` is entered"),
        ("__init__", "from ._tree._paths import parse", "`_tree` is entered"),
    ],
)
def test_what_breaks_a_contract_is_found(house, importer, line, broken):
    path = house / "eqxreg" / f"{importer}.py"
    path.write_text(f"{path.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    code, text = lint(house)
    assert code == 1, text
    [verdict] = [found for found in text.splitlines() if found.endswith("BROKEN")]
    assert verdict.startswith(broken)


def test_a_module_outside_of_the_rooms_is_found(house):
    (house / "eqxreg" / "_helpers.py").write_text('"""Whatever."""\n', encoding="utf-8")
    code, text = lint(house)
    assert code == 1
    assert "_helpers" in text


def test_importing_needs_the_four_dependencies_and_nothing_else():
    # What these import in turn is theirs to say.
    before = "import jax, jax.experimental, equinox, optax, jaxtyping"
    script = f"""
import sys
{before}
import jax.scipy.linalg
theirs = set(sys.modules)
import eqxreg
new = {{name.partition(".")[0] for name in set(sys.modules) - theirs}}
allowed = {{"eqxreg", "jax", "jaxlib", "equinox", "optax", "jaxtyping"}}
print(sorted(new - allowed - set(sys.stdlib_module_names)))
"""
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.fixture
def picture():
    return loaded("docs/_rooms.py")


def test_the_picture_the_text_and_the_folders_name_the_same_rooms(picture):
    rooms = {path.parent.name for path in ROOT.glob("eqxreg/*/__init__.py")}
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    house = text[text.index("## The house") :]
    assert re.findall(r"^\| `(_\w+)` \|", house, re.MULTILINE) == picture.rooms()
    assert rooms == set(picture.rooms())
    drawn = re.findall(r'class="name"[^>]*>(\w+)<', picture.draw())
    assert drawn == picture.rooms()
    shown = " ".join(re.findall(r"<text x[^>]*>([^<]*)<", picture.draw())).split()
    there = ROOT.glob("eqxreg/_*/_[!_]*.py")
    assert sorted(shown) == sorted(path.stem.removeprefix("_") for path in there)


def test_the_arcs_are_the_imports_that_the_linter_found(picture):
    drawn = {
        (room, other) for room in picture.rooms() for other in picture.imports(room)
    }
    graph = grimp.build_graph("eqxreg", cache_dir=None)
    found = set()
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            pair = tuple(name.split(".")[1:2] for name in (importer, imported))
            if importer != "eqxreg" and pair[0] != pair[1]:
                found.add((pair[0][0], pair[1][0]))
    assert drawn == found


def test_every_file_that_the_documentation_names_is_there():
    pages = ("docs/design.md", "CONTRIBUTING.md")
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"`(?:eqxreg/)?(_\w+/\w+\.py)`", text))
    assert len(named) > 8
    assert [name for name in named if not (ROOT / "eqxreg" / name).is_file()] == []
    tests = set(re.findall(r"`(tests/[\w/]+\.py)`", text))
    assert [name for name in tests if not (ROOT / name).is_file()] == []


def test_no_file_is_long():
    folders = ("eqxreg", "tests", "examples")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert len(lines) > 100
    assert {str(path): n for path, n in lines.items() if n > 400} == {}


def test_the_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {eqxreg.__version__}\n" in citation
    assert importlib.metadata.version("eqxreg") == eqxreg.__version__
