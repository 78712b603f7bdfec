"""The server's page in a real browser: make test-browser (Debian's chromium; playwright drives it).

Pictures of what was seen go to the folder in VITLIB_SCREENSHOTS, if it is set.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fixtures.server import SAMPLES, Server

pytestmark = pytest.mark.browser

ROOM = """() => document.documentElement.scrollWidth <= document.documentElement.clientWidth"""
INKED = """(c) => {
  const pixels = c.getContext("2d").getImageData(0, 0, c.width, c.height);
  return pixels.data.some((value) => value > 0);
}"""
# Puts a file where a person's hand would: `kind` is drop or paste.
HAND = """async ([kind, name, base64]) => {
  const data = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const held = new DataTransfer();
  held.items.add(new File([data], name, {type: "image/png"}));
  const event = kind === "drop"
    ? new DragEvent("drop", {dataTransfer: held, bubbles: true, cancelable: true})
    : new ClipboardEvent("paste", {clipboardData: held, bubbles: true, cancelable: true});
  document.querySelector("#drop").dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="make test-browser installs it")
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no chromium: apt-get install chromium")
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as one:
        yield one


@pytest.fixture
def opened(chromium: Any, server: Server) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end nothing was wrong in the console and nothing came from outside."""
    said: list[str] = []
    asked: list[str] = []
    contexts = []
    home = "http://{}:{}/".format(*server.address)

    def open_page(**look: Any) -> Any:
        contexts.append(chromium.new_context(**look))
        page = contexts[-1].new_page()
        page.on("console", lambda one: said.append(one.text) if one.type == "error" else None)
        page.on("pageerror", lambda one: said.append(str(one)))
        page.on("request", lambda one: asked.append(one.url))
        page.goto(home)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert all(url.startswith((home, "blob:", "data:")) for url in asked), asked
    wrong = [one for one in said if "400" not in one and "401" not in one]  # tested for
    assert not wrong, wrong


def picture(page: Any, name: str) -> None:
    folder = os.environ.get("VITLIB_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def test_photos_are_answered(opened: Callable[..., Any]) -> None:
    page = opened(viewport={"width": 1000, "height": 800})
    page.locator("#about", has_text="10 classes").wait_for()
    picture(page, "empty")
    page.set_input_files("#pick", [str(path) for path in SAMPLES[:3]])
    page.locator("#said", has_text="3 photos answered").wait_for()
    names = page.locator("figcaption").all_text_contents()
    assert names == [path.name for path in SAMPLES[:3]]
    for answer in page.locator(".answer").all():
        assert answer.locator("meter").count() == 5
        scores = [float(x) for x in answer.locator("td.score").all_text_contents()]
        assert scores == sorted(scores, reverse=True)
        assert answer.locator(".time").text_content().endswith(" ms")
    picture(page, "answers")


def test_where_it_looks(opened: Callable[..., Any], tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    Image.effect_noise((600, 200), 80).convert("RGB").save(wide)
    page = opened()
    page.set_input_files("#pick", [str(wide), str(SAMPLES[0])])
    page.wait_for_selector(".answer:nth-child(2) meter")
    for button in page.locator("button.look").all():
        button.click()
    for answer in page.locator(".answer").all():
        answer.locator("canvas").wait_for()
    for answer in page.locator(".answer").all():
        inked = answer.locator("canvas").evaluate(INKED)
        assert inked
        over = answer.locator("canvas").bounding_box()
        photo = answer.locator("img").bounding_box()
        assert photo["x"] - 1 <= over["x"]
        assert over["x"] + over["width"] <= photo["x"] + photo["width"] + 1
    picture(page, "looking")
    page.locator("button.look").first.click()
    assert page.locator("canvas:visible").count() == 1


def test_drop_and_paste(opened: Callable[..., Any]) -> None:
    import base64

    page = opened()
    text = base64.b64encode(SAMPLES[0].read_bytes()).decode()
    for count, kind in enumerate(("drop", "paste"), start=1):
        page.evaluate(HAND, [kind, f"{kind}.png", text])
        page.locator(".answer meter").nth(5 * count - 1).wait_for()
    assert page.locator("figcaption").all_text_contents() == ["paste.png", "drop.png"]


def test_a_file_that_is_no_photo(opened: Callable[..., Any], tmp_path: Path) -> None:
    broken = tmp_path / "broken <b>.png"
    broken.write_bytes(b"no photo")
    page = opened()
    page.set_input_files("#pick", [str(broken), str(SAMPLES[0])])
    page.wait_for_selector(".error:visible")
    assert "is not an image" in page.locator(".error:visible").text_content()
    assert page.locator("figcaption").first.text_content() == broken.name  # as text
    page.wait_for_selector(".answer:nth-child(2) meter")
    picture(page, "broken")


def test_a_model_without_labels(chromium: Any, tmp_path: Path) -> None:
    from vitlib import ImageProcessor, ViT, ViTConfig, save

    cfg = ViTConfig(image_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    rule = ImageProcessor.from_profile("hf", "vit", (32, 32))
    save(ViT(cfg), tmp_path / "headless", image_processor=rule)
    with Server(model=str(tmp_path / "headless")) as server:
        page = chromium.new_page()
        page.goto("http://{}:{}/".format(*server.address))
        page.locator("#about", has_text="headless · no labels").wait_for()
        page.set_input_files("#pick", [str(SAMPLES[0])])
        page.locator(".time", has_text="knows no labels").wait_for()
        page.locator("button.look").click()
        page.wait_for_selector("canvas:visible")
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(opened: Callable[..., Any], scheme: str) -> None:
    page = opened(viewport={"width": 320, "height": 640}, color_scheme=scheme, has_touch=True)
    page.set_input_files("#pick", [str(path) for path in SAMPLES[:2]])
    page.wait_for_selector(".answer:nth-child(2) meter")
    page.locator("button.look").first.tap()
    page.wait_for_selector("canvas:visible")
    assert page.evaluate(ROOM)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(int(x) for x in ground[4:-1].split(",")) > 380
    assert light == (scheme == "light")
    picture(page, f"phone-{scheme}")


def test_by_keyboard(opened: Callable[..., Any]) -> None:
    page = opened()
    with page.expect_file_chooser() as chooser:  # chromium is asked for it amid what follows
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "pick"
        outline = page.evaluate("getComputedStyle(document.querySelector('#drop')).outlineStyle")
        assert outline == "solid"
        page.keyboard.press("Space")
    chooser.value.set_files([str(SAMPLES[1])])
    page.wait_for_selector("meter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "look"
    page.keyboard.press("Enter")
    page.wait_for_selector("canvas:visible")


def test_a_key_is_asked_for(chromium: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    with Server("--api-key-file", tmp_path / "keys") as server:
        page = chromium.new_page()
        page.goto("http://{}:{}/".format(*server.address))
        assert not page.locator("#key").is_visible()
        page.set_input_files("#pick", [str(SAMPLES[0])])
        page.wait_for_selector("#key:visible")
        page.keyboard.type("secret")  # it has the focus
        page.set_input_files("#pick", [str(SAMPLES[0])])
        page.wait_for_selector("meter")
        page.close()
