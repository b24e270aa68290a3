"""What the documentation shows runs as printed."""

import contextlib
import pathlib
import re

import eqxreg
import pytest
import quick


ROOT = pathlib.Path(__file__).parents[2]
# `jaxtyping` is what its import hook adds to the modules that it checks.
PUBLIC = {n for n in vars(eqxreg) if not n.startswith("_")} - {"jaxtyping"}
# Lines of other libraries are marked `py` or `julia` there, and not run.
RECIPES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/recipes/*.md"))

# Convolves images of 64 x 64.
LARGE = "docs/recipes/spectral.md"


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *RECIPES])
@pytest.mark.usefixtures("standard_promotion")
def test_the_examples_run_in_the_order_of_the_page(page):
    names: dict = {}
    is_quick = page != LARGE
    with quick.compilation() if is_quick else contextlib.nullcontext():
        for block in blocks(page, "python"):
            exec(compile(block, page, "exec"), names)
    assert "eqxreg" in names


def test_the_first_example_ends_with_plain_layers():
    names: dict = {}
    exec(blocks("README.md", "python")[0], names)
    assert type(names["plain"].layers[0]).__name__ == "Linear"
    assert names["logits"].shape == (10,)


def test_the_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    pages = ("README.md", "CONTRIBUTING.md")
    text = "".join(block for page in pages for block in blocks(page, "sh"))
    named = set(re.findall(r"\bmake ([a-z-]+)", text))
    assert {"demo", "test"} <= named <= targets


def test_the_supported_versions_of_python_are_the_same_everywhere():
    read = lambda path: (ROOT / path).read_text(encoding="utf-8")
    version = r"(\d\.\d+)"
    classified = re.findall(rf"Python :: {version}", read("pyproject.toml"))
    (made,) = re.findall(r"^PYTHONS := (.*)", read("Makefile"), re.MULTILINE)
    (tested,) = re.findall(r"python: \[(.*)\]", read(".github/workflows/tests.yml"))
    assert classified == made.split() == re.findall(version, tested)


def test_every_public_name_is_in_the_documentation():
    pages = "".join(
        p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "api").rglob("*.md")
    )
    assert PUBLIC == {name for name in PUBLIC if f"eqxreg.{name}" in pages}


def test_every_public_name_has_a_docstring():
    assert all(getattr(eqxreg, name).__doc__ for name in PUBLIC)
