"""Tests of the server's page in a browser: make test-browser (Debian's chromium, by playwright).

Screenshots go to the folder in VITLIB_SCREENSHOTS, if it is set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fixtures.server import SAMPLES, Server

pytestmark = pytest.mark.browser

FITS_WIDTH = (
    """() => document.documentElement.scrollWidth <= document.documentElement.clientWidth"""
)
HAS_INK = """(c) => {
  const pixels = c.getContext("2d").getImageData(0, 0, c.width, c.height);
  return pixels.data.some((value) => value > 0);
}"""
# Dispatches the event of a user's hand with a file: `kind` is drop or paste.
DISPATCH = """async ([kind, name, base64]) => {
  const data = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([data], name, {type: "image/png"}));
  const event = kind === "drop"
    ? new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true})
    : new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true});
  document.querySelector("#drop").dispatchEvent(event);
}"""


@pytest.fixture
def open_page(chromium: Any, demo_server: Server) -> Iterator[Callable[..., Any]]:
    """Open the page; at the end check that the console has no error and no request went outside."""
    errors: list[str] = []
    urls: list[str] = []
    contexts = []
    home = "http://{}:{}/".format(*demo_server.address)

    def open_new(**look: Any) -> Any:
        contexts.append(chromium.new_context(**look))
        page = contexts[-1].new_page()
        page.on(
            "console",
            lambda message: errors.append(message.text) if message.type == "error" else None,
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: urls.append(request.url))
        page.goto(home)
        return page

    yield open_new
    for context in contexts:
        context.close()
    assert all(url.startswith((home, "blob:", "data:")) for url in urls), urls
    wrong = [text for text in errors if "400" not in text and "401" not in text]  # expected
    assert not wrong, wrong


def save_screenshot(page: Any, name: str) -> None:
    folder = os.environ.get("VITLIB_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def test_page_shows_labels_of_photos(open_page: Callable[..., Any]) -> None:
    page = open_page(viewport={"width": 1000, "height": 800})
    page.locator("#about", has_text="10 classes").wait_for()
    save_screenshot(page, "empty")
    page.set_input_files("#pick", [str(path) for path in SAMPLES[:3]])
    page.locator("#progress", has_text="3 photos answered").wait_for()
    names = page.locator("figcaption").all_text_contents()
    assert names == [path.name for path in SAMPLES[:3]]
    for answer in page.locator(".answer").all():
        assert answer.locator("meter").count() == 5
        scores = [float(x) for x in answer.locator("td.score").all_text_contents()]
        assert scores == sorted(scores, reverse=True)
        assert answer.locator(".time").text_content().endswith(" ms")
    save_screenshot(page, "answers")


def test_page_shows_attention_over_photo(open_page: Callable[..., Any], tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    Image.effect_noise((600, 200), 80).convert("RGB").save(wide)
    page = open_page()
    page.set_input_files("#pick", [str(wide), str(SAMPLES[0])])
    page.wait_for_selector(".answer:nth-child(2) meter")
    for button in page.locator("button.attention").all():
        button.click()
    for answer in page.locator(".answer").all():
        answer.locator("canvas").wait_for()
    for answer in page.locator(".answer").all():
        inked = answer.locator("canvas").evaluate(HAS_INK)
        assert inked
        over = answer.locator("canvas").bounding_box()
        photo = answer.locator("img").bounding_box()
        assert photo["x"] - 1 <= over["x"]
        assert over["x"] + over["width"] <= photo["x"] + photo["width"] + 1
    save_screenshot(page, "looking")
    page.locator("button.attention").first.click()
    assert page.locator("canvas:visible").count() == 1


def test_page_shows_chosen_map(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.set_input_files("#pick", [str(SAMPLES[0])])
    page.wait_for_selector("meter")
    page.locator("button.attention").click()
    page.wait_for_selector("canvas:visible")
    read = "(c) => c.toDataURL()"
    pictures = {page.locator("canvas").evaluate(read)}
    for method in ("relevance", "gradient", "similarity", "mask"):
        with page.expect_response(lambda response, m=method: f"method={m}" in response.url):
            page.select_option("select.method", method)
        page.wait_for_selector(".photo[aria-busy=false]")
        page.wait_for_timeout(100)
        pictures.add(page.locator("canvas").evaluate(read))
        save_screenshot(page, f"map-{method}")
    assert len(pictures) == 5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_docs_page_loads_nothing_else(open_page: Callable[..., Any], scheme: str) -> None:
    page = open_page(viewport={"width": 320, "height": 640}, color_scheme=scheme)
    page.goto(page.url + "docs")
    page.locator("h2", has_text="POST /attend").wait_for()
    assert page.evaluate(FITS_WIDTH)
    save_screenshot(page, f"docs-{scheme}")


def test_page_takes_dropped_and_pasted_photos(open_page: Callable[..., Any]) -> None:
    import base64

    page = open_page()
    text = base64.b64encode(SAMPLES[0].read_bytes()).decode()
    for count, kind in enumerate(("drop", "paste"), start=1):
        page.evaluate(DISPATCH, [kind, f"{kind}.png", text])
        page.locator(".answer meter").nth(5 * count - 1).wait_for()
    assert page.locator("figcaption").all_text_contents() == ["paste.png", "drop.png"]


def test_page_shows_error_of_broken_photo(open_page: Callable[..., Any], tmp_path: Path) -> None:
    broken = tmp_path / "broken <b>.png"
    broken.write_bytes(b"no photo")
    page = open_page()
    page.set_input_files("#pick", [str(broken), str(SAMPLES[0])])
    page.wait_for_selector(".error:visible")
    assert "is not an image" in page.locator(".error:visible").text_content()
    assert page.locator("figcaption").first.text_content() == broken.name  # as text
    page.wait_for_selector(".answer:nth-child(2) meter")
    save_screenshot(page, "broken")


def test_page_of_model_without_head(chromium: Any, tmp_path: Path) -> None:
    from vitlib import ImageProcessor, ViT, ViTConfig, save

    cfg = ViTConfig(image_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    rule = ImageProcessor.from_profile("hf", "vit", (32, 32))
    save(ViT(cfg), tmp_path / "headless", image_processor=rule)
    with Server(model=str(tmp_path / "headless")) as server:
        page = chromium.new_page()
        page.goto("http://{}:{}/".format(*server.address))
        page.locator("#about", has_text="headless · no labels").wait_for()
        page.set_input_files("#pick", [str(SAMPLES[0])])
        page.locator(".time", has_text="has no labels").wait_for()
        page.locator("button.attention").click()
        page.wait_for_selector("canvas:visible")
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_on_a_phone(open_page: Callable[..., Any], scheme: str) -> None:
    page = open_page(viewport={"width": 320, "height": 640}, color_scheme=scheme, has_touch=True)
    page.set_input_files("#pick", [str(path) for path in SAMPLES[:2]])
    page.wait_for_selector(".answer:nth-child(2) meter")
    page.locator("button.attention").first.tap()
    page.wait_for_selector("canvas:visible")
    assert page.evaluate(FITS_WIDTH)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(int(x) for x in ground[4:-1].split(",")) > 380
    assert light == (scheme == "light")
    save_screenshot(page, f"phone-{scheme}")


def test_page_by_keyboard(open_page: Callable[..., Any]) -> None:
    page = open_page()
    with page.expect_file_chooser() as chooser:  # the chooser opens below
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "pick"
        outline = page.evaluate("getComputedStyle(document.querySelector('#drop')).outlineStyle")
        assert outline == "solid"
        page.keyboard.press("Space")
    chooser.value.set_files([str(SAMPLES[1])])
    page.wait_for_selector("meter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "attention"
    page.keyboard.press("Enter")
    page.wait_for_selector("canvas:visible")


def test_page_asks_for_key(chromium: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    with Server("--api-key-file", tmp_path / "keys") as server:
        page = chromium.new_page()
        page.goto("http://{}:{}/".format(*server.address))
        assert not page.locator("#key").is_visible()
        page.set_input_files("#pick", [str(SAMPLES[0])])
        page.wait_for_selector("#key:visible")
        page.keyboard.type("secret")  # the field has the focus
        page.set_input_files("#pick", [str(SAMPLES[0])])
        page.wait_for_selector("meter")
        page.close()
