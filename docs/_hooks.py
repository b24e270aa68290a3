"""What MkDocs does for this site beyond its plugins.

Three pages are files at the root of the repository, with their links made to fit; the
picture of the rooms is drawn from the imports, and those of sets by the library; what
was measured and counted for accelerators, and what trainers have found, becomes tables;
and formulas become MathML here, so that a reader's browser runs no script for them.
"""

import re
import sys
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File


# MkDocs loads this file by its path.
sys.path.append(str(Path(__file__).parent))
from _counted import with_counts
from _gallery import with_results
from _geometry import pictures
from _measured import with_tables
from _rooms import draw


ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}


def on_files(files, config):
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        text = re.sub(
            r'(\]\(|(?:src|href)=")(?!\w+:|#)([^)"#\s]+)',
            lambda link: link[1] + _retarget(link[2], config.repo_url),
            text,
        )
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "images/rooms.svg", content=draw()))
    for name, text in pictures().items():
        files.append(File.generated(config, f"images/{name}", content=text))
    return files


def _retarget(path: str, repository: str) -> str:
    """A path from the root of the repository, as a link from a page of the site."""
    path = path.removeprefix("./")
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{repository}/blob/main/{path}"


def on_page_markdown(markdown, **_):
    return with_results(with_counts(with_tables(markdown)))


def on_page_content(html, **_):
    return re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>',
        lambda formula: convert(
            unescape(formula[2]),
            display="inline" if formula[1] == "span" else "block",
        ),
        html,
        flags=re.DOTALL,
    )
