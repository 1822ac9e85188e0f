"""The site builds without a warning, and a browser shows every page: wide and narrow, light and dark."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import browser
import numpy as np
import pytest
from matplotlib.image import imread

ROOT = Path(__file__).parent.parent
NEEDED = ("mkdocs", "material", "mkdocstrings", "latex2mathml")
MISSING = [name for name in NEEDED if not importlib.util.find_spec(name)]
WIDTHS = {"wide": 1280, "narrow": 390}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"the site needs {', '.join(MISSING)}: pip install '.[docs]'"),
]
needs_browser = pytest.mark.skipif(browser.EXECUTABLE is None, reason="there is no chromium: apt install chromium")

# What a reader would trip over on a page.
LOOK = """(async () => {
  const images = [...document.querySelectorAll("article img")];
  images.forEach(image => image.loading = "eager");
  await Promise.all(images.map(image => image.decode().catch(() => 0)));
  return {
    overflow: document.scrollingElement.scrollWidth - innerWidth,
    broken: images.filter(image => image.naturalWidth == 0).map(image => image.src),
    shown: images.filter(image => image.offsetWidth > 0).length,
    formulas: [...document.querySelectorAll("math")].filter(math => math.getBoundingClientRect().width > 0).length,
    raw: document.querySelectorAll(".arithmatex").length,
    heading: document.querySelector("article h1")?.textContent,
  };
})()"""
SEARCH = """new Promise(async done => {
  const field = document.querySelector(".md-search__input");
  field.focus();
  for (let i = 0; i < 100; i++) {
    field.value = "kd_loss";
    field.dispatchEvent(new Event("keyup"));
    await new Promise(later => setTimeout(later, 100));
    const results = [...document.querySelectorAll(".md-search-result__item")].map(item => item.textContent);
    if (results.length) return done(results);
  }
  done([]);
})"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """pytest shows what a test prints."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    opened = browser.Page(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def pages(site: Path) -> list[str]:
    return sorted(str(file.relative_to(site)) for file in site.glob("**/index.html"))


def test_search_finds_pages_and_public_names(site: Path) -> None:
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    titles = {entry["title"] for entry in entries}
    assert any("kd_loss" in title for title in titles)
    assert "Choose a loss" in titles
    assert any("Winograd" in entry["text"] for entry in entries)


def test_nothing_is_loaded_from_another_server(site: Path) -> None:
    for page in site.glob("**/*.html"):
        sources = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(https?:)?//', page.read_text())
        assert not sources, page


@needs_browser
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_every_page_fits_the_screen(site: Path, address: str, page: browser.Page, width: int) -> None:
    found = {}
    for name in pages(site):
        page.open(f"{address}/{name}", width)
        found[name] = page.evaluate(LOOK)
    wrong = {name: seen for name, seen in found.items() if seen["overflow"] > 0 or seen["broken"] or seen["raw"]}
    assert not wrong
    assert all(seen["heading"] for seen in found.values())
    for method in ("lkd", "cckd", "icct", "semckd", "companions"):
        seen = found[f"{method}/index.html"]
        assert seen["formulas"] > 0
        assert seen["shown"] == 1  # of the light and the dark figure


@needs_browser
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_pages_are_drawn_light_and_dark(address: str, page: browser.Page, tmp_path: Path, width: int) -> None:
    brightness = []
    for dark in (False, True):
        page.open(f"{address}/lkd/", width, dark=dark)
        page.evaluate("localStorage.clear()")  # where the site keeps the colours of the first visit
        page.open(f"{address}/lkd/", width, dark=dark)
        page.evaluate(LOOK)
        page.screenshot(tmp_path / "page.png")
        pixels = imread(tmp_path / "page.png")[200:, :, :3]  # below the header, which is blue on both
        assert pixels.shape[1] == width
        assert pixels.std() > 0.05  # something is written on it
        brightness.append(float(np.median(pixels)))
    assert brightness[0] > 0.9
    assert brightness[1] < 0.3


@needs_browser
def test_search_works_in_the_browser(address: str, page: browser.Page) -> None:
    page.open(f"{address}/", WIDTHS["wide"])
    assert any("kd_loss" in result for result in page.evaluate(SEARCH))
