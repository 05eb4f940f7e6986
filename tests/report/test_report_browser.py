"""The pages in a real headless Chromium: they look right, work with mouse and keyboard, and run nothing foreign."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from report.album import Album, add_duplicates, full_run
from report.browser import Browser, binaries, chromium
from report.explore_client import Client, searcher_of, serving
from support.runs import jpeg

from pipeline.report import write_report
from pipeline.report.explore_state import open_exploration
from pipeline.report.run import open_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(binaries() is None, reason="needs Chromium and chromedriver (Debian: chromium chromium-driver)"),
]

TAB, ENTER, RIGHT, LEFT, ESCAPE = "\ue004", "\ue007", "\ue014", "\ue012", "\ue00c"

# Least contrast (WCAG 2.2, 1.4.3) of any element that holds text to the first opaque ground under it.
_LEAST_CONTRAST = """
const luminance = (rgb) => {
  const [r, g, b] = rgb.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const ground = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const [r, g, b, a = 1] = parse(getComputedStyle(at).backgroundColor);
    if (a === 1) return [r, g, b];
  }
  return [255, 255, 255];
};
let worst = [99, ""];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || !element.checkVisibility() || element.closest("svg, script, style, .skip")) continue;
  const [a, b] = [luminance(parse(getComputedStyle(element).color)), luminance(ground(element))].sort((x, y) => y - x);
  const contrast = (a + 0.05) / (b + 0.05);
  if (contrast < worst[0]) worst = [contrast, element.outerHTML.slice(0, 200)];
}
return worst;
"""

# Boxes of text in the same grid or table must not lie on each other, and nothing may stick out at the side.
_OVERLAPS = """
const boxes = [...document.querySelectorAll("li figure, td, .sheet, .tiles > div, dt, dd, button, label")]
  .filter((element) => element.checkVisibility()).map((element) => [element, element.getBoundingClientRect()]);
const bad = [];
boxes.forEach(([one, a], i) => boxes.slice(i + 1).forEach(([two, b]) => {
  if (one.contains(two) || two.contains(one)) return;
  const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
  const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  if (wide > 1 && high > 1) bad.push(one.outerHTML.slice(0, 90) + " / " + two.outerHTML.slice(0, 90));
}));
return bad.slice(0, 3);
"""

_UNLOADED = "return [...document.images].filter((i) => i.loading !== 'lazy' && !(i.complete && i.naturalWidth)).length"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def album_and_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Album, Path]:
    album = Album(tmp_path_factory.mktemp("browsed"), count=90)
    run = full_run(album)
    add_duplicates(run, [album.rows[20:22]], name="exact")
    return album, run


@pytest.fixture(scope="module")
def report_url(album_and_run: tuple[Album, Path]) -> str:
    return Path(write_report(str(album_and_run[1]))).as_uri()


@pytest.fixture(scope="module")
def explore_url(album_and_run: tuple[Album, Path]) -> Iterator[str]:
    album, run = album_and_run
    with serving(open_exploration(open_run(str(run), {}), searcher_of(album))) as server:
        yield server.url.rstrip("/")


def check_page(browser: Browser, url: str) -> None:
    """Nothing refused, overlapping, sticking out or hard to read, dark and light, wide and narrow."""
    for scheme, ground in (("light", "rgb(246, 247, 249)"), ("dark", "rgb(17, 21, 26)")):
        for width in (1280, 390):
            browser.scheme(scheme)
            browser.size(width, 900)
            browser.open(url)
            assert browser.script("return getComputedStyle(document.body).backgroundColor") == ground
            wide = browser.script("return [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert wide[0] <= wide[1], (url, width)
            assert browser.script(_OVERLAPS) == [], (url, width)
            contrast, element = browser.script(_LEAST_CONTRAST)
            assert contrast >= 4.5, (url, scheme, element)
            assert browser.script(_UNLOADED) == 0
    assert [message for message in browser.log() if "/nowhere" not in message] == []


def test_report_browser_report_looks_right(browser: Browser, report_url: str) -> None:
    check_page(browser, report_url)


def test_report_browser_report_runs_nothing_foreign(browser: Browser, report_url: str) -> None:
    browser.open(report_url)
    assert browser.script("return document.querySelectorAll('script').length") == 2
    assert browser.script("return document.querySelectorAll('[onerror], [onload], iframe, object, embed').length") == 0
    browser.script(
        "const s = document.createElement('script'); s.textContent = 'window.foreign = 1'; document.body.append(s)"
    )
    assert browser.script("return window.foreign === undefined") is True
    assert any("Content Security Policy" in message for message in browser.log())


def test_report_browser_map_with_the_mouse(browser: Browser, report_url: str) -> None:
    browser.size(1280, 900)
    browser.open(report_url)
    assert browser.script("return document.getElementById('tip').hidden") is True
    browser.script("document.getElementById('plot').scrollIntoView({block: 'center'})")
    browser.hover("[data-point='40']")
    assert browser.script("return document.getElementById('tip').hidden") is False
    assert browser.script("return document.querySelector('#tip img').naturalWidth") > 0
    row = browser.script("return JSON.parse(document.getElementById('map-data').textContent).points[40].row")
    assert f"{row:04d}" in browser.script("return document.getElementById('tip').textContent")
    inside = browser.script(
        "const t = document.getElementById('tip').getBoundingClientRect(), p = document.getElementById('plot')"
        ".getBoundingClientRect(); return t.left >= p.left - 1 && t.right <= p.right + 1"
    )
    assert inside is True


def test_report_browser_map_with_the_keyboard(browser: Browser, report_url: str) -> None:
    browser.open(report_url)
    browser.script("document.querySelector('#plot svg').focus()")
    ring = "return Number(document.getElementById('ring').getAttribute('cx'))"
    browser.press(RIGHT)
    first = browser.script(ring)
    browser.press(RIGHT)
    second = browser.script(ring)
    assert second > first
    browser.press(LEFT)
    assert browser.script(ring) < second
    assert browser.script("return document.querySelectorAll('#tip img').length") == 1
    browser.press(ESCAPE)
    assert browser.script("return document.getElementById('tip').hidden") is True


def test_report_browser_legend_singles_a_label_out(browser: Browser, report_url: str) -> None:
    browser.open(report_url)
    browser.script("document.querySelector('[data-series=\"1\"]').focus()")
    browser.press(ENTER)
    data = "JSON.parse(document.getElementById('map-data').textContent).points"
    expected = browser.script(f"return {data}.filter((point) => point.series !== 1).length")
    assert browser.script("return document.querySelectorAll('.mark.dim[data-point]').length") == expected > 0
    assert browser.script("return document.querySelector('[data-series=\"1\"]').getAttribute('aria-pressed')") == "true"
    browser.press(ENTER)
    assert browser.script("return document.querySelectorAll('.dim').length") == 0


def test_report_browser_first_tab_skips_to_the_content(browser: Browser, report_url: str, explore_url: str) -> None:
    for url in (report_url, explore_url + "/"):
        browser.open(url)
        browser.press(TAB)
        assert browser.script("return document.activeElement.className") == "skip"
        assert browser.script("return document.activeElement.getBoundingClientRect().left") >= 0
        browser.press(TAB)
        outline = browser.script("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"


@pytest.mark.parametrize(
    "path", ["/", "/picture?row=1", "/clusters", "/cluster?id=1", "/duplicates", "/group?name=near&id=1", "/failures"]
)
def test_report_browser_explore_looks_right(browser: Browser, explore_url: str, path: str) -> None:
    check_page(browser, explore_url + path)


def test_report_browser_explore_loads_pictures_as_they_come_into_view(browser: Browser, explore_url: str) -> None:
    browser.size(220, 300)
    browser.open(explore_url + "/?page=2")
    loaded = "return [...document.images].filter((i) => i.complete && i.naturalWidth).length"
    _wait(browser, f"({loaded.removeprefix('return ')}) > 0")
    assert browser.script(loaded) < browser.script("return document.images.length")
    browser.script("window.scrollTo(0, document.body.scrollHeight)")
    _wait(browser, "document.images[document.images.length - 1].naturalWidth > 0")


def test_report_browser_explore_filters_and_turns_pages(
    browser: Browser, explore_url: str, album_and_run: tuple[Album, Path]
) -> None:
    album, _ = album_and_run
    browser.size(1280, 900)
    browser.open(explore_url + "/")
    browser.click("a[rel=next]")
    assert "page 2 of 2" in _text(browser)
    browser.type("#text", "0003")
    browser.press(ENTER)
    _wait(browser, "location.search.includes('0003')")
    assert "1 pictures" in _text(browser)
    assert browser.script("return document.images[0].alt").endswith(".jpg")
    assert _rows(browser) == [3]
    assert len(album.rows) > 60


def test_report_browser_explore_goes_from_like_to_like(browser: Browser, explore_url: str) -> None:
    browser.open(explore_url + "/")
    browser.click("a[aria-label^='More like']")
    _wait(browser, "location.pathname === '/picture'")
    assert "Picture 0" in _text(browser)
    first = _rows(browser)
    browser.click("#like a[aria-label^='More like']")
    _wait(browser, f"document.title.startsWith('Picture {first[0]} ')")
    assert 0 in _rows(browser)


def test_report_browser_explore_searches_by_an_uploaded_picture(
    browser: Browser, explore_url: str, album_and_run: tuple[Album, Path], tmp_path: Path
) -> None:
    album, _ = album_and_run
    data = jpeg((9, 9, 9))
    (tmp_path / "mine.jpg").write_bytes(data)
    (tmp_path / "none.txt").write_text("no picture")
    browser.open(explore_url + "/")
    browser.type("#file", str(tmp_path / "mine.jpg"))
    browser.click(".upload button")
    _wait(browser, "location.pathname === '/found'")
    assert _rows(browser)[0] == album.rows[len(data) % 3]
    browser.type("#file", str(tmp_path / "none.txt"))
    browser.click(".upload button")
    _wait(browser, "document.title.startsWith('This file cannot be used')")
    assert "this is <b>no</b> picture" in _text(browser)


def test_report_browser_explore_browses_groups(browser: Browser, explore_url: str) -> None:
    browser.open(explore_url + "/duplicates")
    browser.click(".names a[href*=near]")
    _wait(browser, "document.title.startsWith('Groups of near')")
    browser.click(".sheet h2 a")
    _wait(browser, "location.pathname === '/group'")
    assert browser.script("return document.querySelector('.kept .value').textContent") == "kept"
    assert browser.script("return document.querySelector('nav [aria-current]').textContent") == "Near-duplicates"


def test_report_browser_explore_with_a_token(browser: Browser, album_and_run: tuple[Album, Path]) -> None:
    with serving(open_exploration(open_run(str(album_and_run[1]), {}), None), token="0123456789") as server:
        assert Client(server).request("/")[0] == 401
        browser.open(f"{server.url}?token=0123456789")
        assert browser.url == server.url
        assert "87 pictures" in _text(browser)
        _wait(browser, "document.images[0].naturalWidth > 0")


def _rows(browser: Browser) -> list[int]:
    sources = browser.script("return [...document.querySelectorAll('.pictures img')].map((image) => image.src)")
    return [int(re.findall(r"row=(\d+)", source)[0]) for source in sources]


def _text(browser: Browser) -> str:
    return str(browser.script("return document.body.innerText"))


def _wait(browser: Browser, condition: str) -> None:
    deadline = time.monotonic() + 15
    while not browser.script(f"return Boolean({condition})"):
        assert time.monotonic() < deadline, f"never came true at {browser.url}: {condition}"
        time.sleep(0.03)
