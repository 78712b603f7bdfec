"""Tests of every page that vitlib writes or serves against WCAG 2.2 AA: make test-browser.

axe-core finds what a program can find. The other tests use the keyboard alone, a screen 320 pixels
wide, paper, and a reader who wants no motion.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fixtures import report_pages
from fixtures.browser import (
    CUT_OFF,
    FOCUSABLE,
    MOVING,
    OVERFLOWING,
    check_on_paper,
    check_on_screen,
    find_violations,
    walk_by_tab,
)
from fixtures.server import SAMPLES, Server
from paths import ROOT

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'vitlib[plot]'")
pytest.importorskip("sklearn", reason="probes need scikit-learn: pip install 'vitlib[eval]'")
pytestmark = pytest.mark.browser

SCHEMES = ("light", "dark")
PATIENCE = 120_000  # milliseconds, on a machine with other work
REPORTS: dict[str, Callable[[Path], Path]] = {
    "classes": report_pages.write_classes,
    "labels": report_pages.write_labels,
    "many classes": report_pages.write_many_classes,
    "regression": report_pages.write_regression,
    "probe": report_pages.write_probe,
    "audit": report_pages.write_audit,
}
SITE = Path(os.environ.get("VITLIB_SITE") or ROOT / "build" / "docs")  # of make docs
# Faults that a check must find, each in a page that is well otherwise.
FAULTS = {
    "color-contrast": '<p style="color: #999">pale</p>',
    "image-alt": '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">',
    "label": "<input>",
    "button-name": "<button></button>",
    "scrollable-region-focusable": (
        '<pre style="overflow: auto; width: 5em; height: 2em">a long line of text\n\n\n\n</pre>'
    ),
    "target-size": (
        '<button style="all: unset; font-size: 8px; line-height: 9px; display: block">a</button>'
        '<button style="all: unset; font-size: 8px; line-height: 9px; display: block">b</button>'
    ),
}
PAGE = '<!doctype html><html lang="en"><head><title>a</title></head><body><main>{}</main></body>'


@pytest.fixture(scope="module", params=REPORTS)
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return REPORTS[request.param](tmp_path_factory.mktemp("report") / "set")


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    contexts = []

    def open_new(url: str, width: int = 1000, **look: Any) -> Any:
        contexts.append(chromium.new_context(viewport={"width": width, "height": 800}, **look))
        contexts[-1].set_default_timeout(PATIENCE)
        page = contexts[-1].new_page()
        page.goto(url)
        return page

    yield open_new
    for context in contexts:
        context.close()


# --- the checks themselves ------------------------------------------------------------------------


@pytest.mark.parametrize("rule", FAULTS)
def test_planted_fault_is_found(open_page: Callable[..., Any], rule: str) -> None:
    page = open_page("about:blank")
    page.set_content(PAGE.format("<h1>a</h1>"))
    assert find_violations(page) == []
    page.set_content(PAGE.format(FAULTS[rule]))
    assert {line.split()[0] for line in find_violations(page)} == {rule}


def test_planted_layout_faults_are_found(open_page: Callable[..., Any]) -> None:
    page = open_page("about:blank", width=320)
    page.set_content(PAGE.format('<p style="width: 30em">wide</p>'))
    assert page.evaluate(OVERFLOWING)
    page.set_content(PAGE.format('<p style="width: 5em; overflow: auto">' + "a" * 90 + "</p>"))
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate(CUT_OFF, False) == []
    assert page.evaluate(CUT_OFF, True)
    page.set_content(PAGE.format('<p style="width: 5em">' + "a" * 30 + "</p>"))
    assert page.evaluate(CUT_OFF, False)
    page.set_content(PAGE.format('<a href="#a">a</a><a href="#b" style="outline: 0">b</a>'))
    with pytest.raises(AssertionError, match="A"):
        walk_by_tab(page)
    page.set_content(PAGE.format('<p style="transition: all 1s">a</p>'))
    assert page.evaluate(MOVING)


# --- reports --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1000, 320])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_report_has_no_violation(
    open_page: Callable[..., Any], report: Path, scheme: str, width: int
) -> None:
    page = open_page(report.as_uri(), width, color_scheme=scheme)
    check_on_screen(page)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(23, 24, 26)")


def test_report_prints_whole_on_light_paper(open_page: Callable[..., Any], report: Path) -> None:
    page = open_page(report.as_uri(), color_scheme="dark")
    check_on_paper(page, "dark")
    chosen = page.evaluate(
        "[...document.querySelectorAll('picture')].map((node) => "
        "node.querySelector('img').currentSrc === node.querySelector('source').srcset)"
    )
    assert not any(chosen)  # of dark pictures


def test_report_is_used_by_keyboard(open_page: Callable[..., Any], report: Path) -> None:
    page = open_page(report.as_uri())
    names = walk_by_tab(page)
    assert len(names) == page.evaluate(FOCUSABLE) > 0
    boxes = page.locator(".wide").count()
    assert sum(name.startswith("DIV") for name in names) == boxes
    for button in page.locator(".sortable th:nth-child(2) button").all():
        button.focus()
        page.keyboard.press("Enter")
        head = button.locator("xpath=..")
        assert head.get_attribute("aria-sort") == "descending"
        page.keyboard.press("Space")
        assert head.get_attribute("aria-sort") == "ascending"
        assert button.evaluate("(node) => node === document.activeElement")


@pytest.mark.parametrize("width", [1000, 320])
def test_tables_and_pictures_of_report_have_names(
    open_page: Callable[..., Any], report: Path, width: int
) -> None:
    """A screen reader gets tables with headers on a phone, too, where rows stand as lists."""
    page = open_page(report.as_uri(), width)
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    roles = [node["role"]["value"] for node in nodes]
    tables = page.locator("table").count()
    assert roles.count("table") == tables > 0
    assert roles.count("columnheader") == page.locator("thead th").count()
    assert roles.count("rowheader") == page.locator("tbody tr").count()
    regions = [node["name"]["value"] for node in nodes if node["role"]["value"] == "region"]
    assert len(set(regions)) == tables
    texts = page.locator("img").evaluate_all("(all) => all.map((node) => node.alt)")
    assert all(texts)
    charts = page.locator("picture img").evaluate_all("(all) => all.map((node) => node.alt)")
    assert all(len(text) > 40 for text in charts)


def test_report_does_not_move(open_page: Callable[..., Any], report: Path) -> None:
    page = open_page(report.as_uri(), reduced_motion="reduce")
    assert page.evaluate(MOVING) == []


# --- the server's pages ---------------------------------------------------------------------------


def fill(page: Any, folder: Path) -> None:
    """Show all that the page can show: answers, a map, an error, and the line of the key."""
    broken = folder / "broken.png"
    broken.write_bytes(b"no photo")
    page.locator("#about", has_text="10 classes").wait_for()
    page.set_input_files("#pick", [str(path) for path in (*SAMPLES[:2], broken)])
    page.wait_for_selector(".answer:nth-child(2) meter")
    page.locator("button.attention").first.click()
    page.wait_for_selector("canvas:visible")
    page.locator(".error:visible").wait_for()
    page.evaluate("document.querySelector('#key-line').hidden = false")


@pytest.mark.parametrize("width", [1000, 320])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_served_pages_have_no_violation(
    open_page: Callable[..., Any], demo_server: Server, tmp_path: Path, scheme: str, width: int
) -> None:
    home = "http://{}:{}/".format(*demo_server.address)
    page = open_page(home, width, color_scheme=scheme)
    check_on_screen(page)
    fill(page, tmp_path)
    check_on_screen(page)
    page.goto(home + "docs")
    check_on_screen(page)


def test_served_pages_print_whole_on_light_paper(
    open_page: Callable[..., Any], demo_server: Server, tmp_path: Path
) -> None:
    home = "http://{}:{}/".format(*demo_server.address)
    page = open_page(home, color_scheme="dark")
    fill(page, tmp_path)
    check_on_paper(page, "dark")
    assert not page.locator("#drop").is_visible()
    page = open_page(home + "docs", color_scheme="dark")
    check_on_paper(page, "dark")


def test_served_page_is_used_by_keyboard(
    open_page: Callable[..., Any], demo_server: Server, tmp_path: Path
) -> None:
    page = open_page("http://{}:{}/".format(*demo_server.address))
    fill(page, tmp_path)
    names = walk_by_tab(page)
    assert len(names) == page.evaluate(FOCUSABLE) == 6  # photos, key, two buttons and two maps
    second = page.locator("button.attention").nth(1)
    second.focus()
    page.keyboard.press("Enter")
    page.locator("canvas:visible").nth(1).wait_for()
    assert second.evaluate("(node) => node === document.activeElement")
    page.keyboard.press("Tab")
    page.keyboard.press("End")  # of the list of maps
    page.get_by_role("img", name="Map over the photo: foreground").wait_for()
    assert page.evaluate("document.activeElement.className") == "method"


def test_docs_of_server_are_used_by_keyboard(
    open_page: Callable[..., Any], demo_server: Server
) -> None:
    page = open_page("http://{}:{}/docs".format(*demo_server.address), width=320)
    names = walk_by_tab(page)
    assert len(names) == page.evaluate(FOCUSABLE)
    assert sum(name.startswith("PRE") for name in names) == page.locator("pre").count() > 0


def test_errors_and_answers_of_served_page_are_announced(
    open_page: Callable[..., Any], demo_server: Server, tmp_path: Path
) -> None:
    page = open_page("http://{}:{}/".format(*demo_server.address))
    fill(page, tmp_path)
    assert page.get_by_role("alert").text_content().startswith("an image of")
    assert page.get_by_role("status").text_content() == "3 photos answered."
    for control in page.locator(".answer:first-child button, .answer:first-child select").all():
        photo = page.locator("#" + control.get_attribute("aria-describedby"))
        assert photo.text_content() == SAMPLES[0].name


def test_served_pages_do_not_move(
    open_page: Callable[..., Any], demo_server: Server, tmp_path: Path
) -> None:
    page = open_page("http://{}:{}/".format(*demo_server.address), reduced_motion="reduce")
    fill(page, tmp_path)
    assert page.evaluate(MOVING) == []


# --- the site -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site() -> list[str]:
    """List the pages that make docs built; those of source code are one page, many times.

    The first page of the folder only leads to the home page.
    """
    built = SITE.rglob("*.html")
    pages = sorted(p for p in built if "_modules" not in p.parts and p != SITE / "index.html")
    if not pages:
        pytest.skip(f"no site in {SITE}: make docs builds it")
    return [path.as_uri() for path in pages]


@pytest.mark.parametrize(("scheme", "width"), [("dark", 1200), ("light", 1200), ("light", 320)])
def test_site_has_no_violation(
    open_page: Callable[..., Any], site: list[str], scheme: str, width: int
) -> None:
    page = open_page("about:blank", width, color_scheme=scheme, reduced_motion="reduce")
    faults = {}
    for url in site:
        page.goto(url)
        found = [*find_violations(page), *page.evaluate(OVERFLOWING), *page.evaluate(MOVING)]
        if found:
            faults[url] = found
    assert faults == {}


@pytest.mark.parametrize("width", [1200, 320])
def test_site_is_used_by_keyboard(
    open_page: Callable[..., Any], site: list[str], width: int
) -> None:
    page = open_page(site[0], width)
    page.set_default_timeout(PATIENCE)
    for url in [url for url in site if url.endswith(("/command-line.html", "/start.html"))]:
        page.goto(url)
        assert len(walk_by_tab(page)) == page.evaluate(FOCUSABLE) > 0
        if width == 320:  # the sidebar opens, and its links come into reach
            page.locator("#__navigation").focus()
            before = page.evaluate(FOCUSABLE)
            page.keyboard.press("Space")
            page.locator(".sidebar-drawer a.sidebar-brand").wait_for()
            assert page.evaluate(FOCUSABLE) > before


def test_site_prints_on_light_paper(open_page: Callable[..., Any], site: list[str]) -> None:
    page = open_page("about:blank", color_scheme="dark")
    for url in [url for url in site if url.endswith(("/command-line.html", "/performance.html"))]:
        page.goto(url)
        page.emulate_media(media="print", color_scheme="dark")
        page.set_viewport_size({"width": 718, "height": 1000})
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)"
        )
        assert page.evaluate(OVERFLOWING) == []
        boxes = page.locator("pre, .table-wrapper")
        wide = boxes.evaluate_all("(all) => all.map((x) => x.scrollWidth - x.clientWidth)")
        assert max(wide, default=0) <= 1


def test_site_without_its_roles_is_refused(open_page: Callable[..., Any], site: list[str]) -> None:
    """The check reads the pages: without the roles of docs/accessible_html.py they fail."""
    (url,) = [url for url in site if url.endswith("/docs/command-line.html")]
    page = open_page(url, width=320)
    for name in ("aria-level", "tabindex"):
        every = page.locator(f"[{name}]")
        every.evaluate_all("(all, name) => all.forEach((x) => x.removeAttribute(name))", name)
    assert {line.split()[0] for line in find_violations(page)} == {"scrollable-region-focusable"}
    page.set_viewport_size({"width": 1200, "height": 800})  # the captions of the sidebar
    assert "aria-required-attr" in {line.split()[0] for line in find_violations(page)}
