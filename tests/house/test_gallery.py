"""The pages of the gallery have the numbers and the code of their trainers."""

import json

import pytest
from scripts import ROOT, loaded


@pytest.fixture
def gallery():
    return loaded("docs/_gallery.py")


def results(name):
    path = ROOT / "docs" / "gallery" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


PAGES = sorted(path.stem for path in (ROOT / "docs" / "gallery").glob("*.md"))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_its_picture_its_numbers_and_its_code(gallery, name):
    folder = ROOT / "docs" / "gallery"
    page = (folder / f"{name}.md").read_text(encoding="utf-8")
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    kinds = {kind for kind, _ in gallery.PLACE.findall(page)}
    assert kinds == {"results", "run", "code"}
    text = gallery.with_results(page)
    assert not gallery.PLACE.search(text)
    assert f"examples/{name}.py" in text
    asked = next(of for kind, of in gallery.PLACE.findall(page) if kind == "results")
    metric = asked.split(", ")[1]
    for result in results(name)["methods"].values():
        assert f"| {result['label']} | {result[metric]['mean']:.4f}" in text


def test_what_a_page_asks_for_has_to_be_there(gallery):
    with pytest.raises(FileNotFoundError):
        gallery.with_results("<!-- results: nothing, accuracy -->")
    with pytest.raises(KeyError):
        gallery.with_results("<!-- code: wasserstein, no_function -->")
    assert gallery.with_results("# A page\n") == "# A page\n"


def test_sorted_units_find_the_distance_and_others_do_not():
    found = {
        name: result["estimate"]
        for name, result in results("wasserstein")["methods"].items()
    }
    assert found["relu"]["largest"] < 0.6
    assert found["fullsort"]["mean"] >= 0.99
    assert all(estimate["largest"] <= 1.005 for estimate in found.values())
