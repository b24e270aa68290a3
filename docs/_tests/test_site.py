"""The documentation in a browser, without a network: `make browse`.

It needs the built site, Playwright, and a Chromium on the path.
"""

import functools as ft
import http.server
import shutil
import threading
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright


SITE = Path(__file__).parents[2] / "site"
PAGES = sorted(
    path.relative_to(SITE).as_posix().removesuffix("index.html")
    for path in SITE.rglob("*.html")
    if path.name != "404.html"
)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    handler = ft.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def context(address):
    """A browser that reaches this machine's server alone."""
    assert CHROMIUM, "There is no Chromium: `apt-get install chromium` in Debian."
    with sync_playwright() as started:
        # Without a sandbox: containers seldom allow one.
        browser = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        context = browser.new_context()
        outside = lambda url: not url.startswith((address, "data:", "blob:"))
        context.route(outside, lambda route: route.abort())
        yield context
        browser.close()


@pytest.fixture
def page(context):
    """A tab, and what went wrong in it."""
    tab, faults = context.new_page(), []
    tab.on("console", lambda m: m.type == "error" and faults.append(m.text))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("requestfailed", lambda request: faults.append(f"failed: {request.url}"))
    tab.on(
        "response", lambda r: r.status >= 400 and faults.append(f"{r.status}: {r.url}")
    )
    yield tab, faults
    tab.close()


class Anchors(HTMLParser):
    """The places of a page that links may lead to."""

    def __init__(self, text):
        super().__init__()
        self.names = {""}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.names |= {value for name, value in attributes if name in ("id", "name")}


@ft.cache
def anchors(path):
    file = SITE / path
    file = file / "index.html" if file.is_dir() else file
    if not file.is_file():
        return None
    if file.suffix != ".html":
        return {""}
    return Anchors(file.read_text(encoding="utf-8")).names


def test_there_is_a_site():
    assert {"", "which/", "gallery/", "api/maps/norms/"} <= set(PAGES)


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_whole(page, address, path):
    tab, faults = page
    tab.goto(address + path, wait_until="networkidle")
    assert faults == []
    # Pictures further down are fetched when they are seen.
    for image in tab.locator("img").all():
        image.scroll_into_view_if_needed()
    broken = """images => images.filter(i => !(i.complete && i.naturalWidth > 0))
        .map(i => i.src)"""
    assert tab.locator("img").evaluate_all(broken) == []
    links = tab.locator("a[href]").evaluate_all("links => links.map(a => a.href)")
    for link in sorted({link for link in links if link.startswith(address)}):
        target = urllib.parse.urlsplit(link)
        names = anchors(urllib.parse.unquote(target.path).lstrip("/"))
        assert names is not None, f"{link} leads nowhere"
        assert urllib.parse.unquote(target.fragment) in names, f"no such place: {link}"
    # No formula is left as it was written.
    text = tab.locator("article").inner_text()
    assert r"\(" not in text and r"\[" not in text


@pytest.mark.parametrize("path", ["design/", "api/maps/norms/", "gallery/wasserstein/"])
def test_formulas_are_shown(page, address, path):
    tab, _ = page
    tab.goto(address + path)
    boxes = [formula.bounding_box() for formula in tab.locator("math").all()]
    assert boxes and all(box["width"] > 3 and box["height"] > 3 for box in boxes if box)
    assert any(boxes)


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("max norm", "api/maps/norms/#eqxreg.MaxNorm"),
        ("invertible", "recipes/spectral/#an-invertible-residual-network"),
    ],
)
def test_the_search_finds(page, address, words, place):
    tab, faults = page
    tab.goto(address, wait_until="networkidle")
    search = tab.locator("input.md-search__input")
    search.click()
    search.press_sequentially(words)
    tab.locator(".md-search-result__item").first.wait_for()
    links = tab.locator(".md-search-result__item a").evaluate_all(
        "links => links.map(a => a.href)"
    )
    assert address + place in links[:10]
    assert faults == []
