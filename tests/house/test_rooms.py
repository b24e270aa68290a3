"""The rooms of the package: imports go down, and through doors only.

The contracts are in `pyproject.toml`; here they are broken, one at a time."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
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
