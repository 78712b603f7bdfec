"""Pictures of a report: names of mistakes, dark versions, and widths of phones."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fixtures.pictures import read_texts, render
from fixtures.reports import Tags, make_scored_set
from vitlib.evaluate import evaluate
from vitlib.evaluate.mistakes import draw_mistakes, list_mistakes
from vitlib.evaluate.palette import DARK, LIGHT, Palette
from vitlib.evaluate.report import Predictions, Report

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'vitlib[plot]'")

PHONE = 336  # pixels of a page 360 wide, less its margins


def read_page(folder: Path, count: int, multi_label: bool = False) -> str:
    labels = tuple(f"class {i} of many" for i in range(count))
    predictor, photos = make_scored_set(folder / "photos", labels, 60, multi_label)
    evaluate(predictor, photos, folder / "report", bootstrap=0)
    return (folder / "report" / "report.html").read_text("utf-8")


def decode_image(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"))


@pytest.mark.parametrize("multi_label", [False, True])
def test_every_chart_has_a_dark_version(tmp_path: Path, multi_label: bool) -> None:
    page = read_page(tmp_path, 3, multi_label)
    pictures = re.findall(r"<picture>.*?</picture>", page)
    assert len(pictures) == 4
    for picture in pictures:
        (dark,) = re.findall(
            r'<source media="screen and \(prefers-color-scheme: dark\)" srcset="([^"]+)">', picture
        )
        (light,) = re.findall(r'<img[^>]* src="([^"]+)"', picture)
        dark_pixels, light_pixels = decode_image(dark), decode_image(light)
        assert dark_pixels.shape == light_pixels.shape
        assert dark_pixels[0, 0].tolist() == [0x17, 0x18, 0x1A]  # of the dark page
        assert light_pixels[0, 0].tolist() == [255, 255, 255]
        assert np.median(dark_pixels) < 60
        # Texts and axes have the ink of their page.
        inked = [
            (pixels == ink).all(axis=-1).sum()
            for pixels, ink in ((dark_pixels, [0xEC, 0xEC, 0xEE]), (light_pixels, [28, 28, 30]))
        ]
        assert inked[0] > 0.7 * inked[1] > 500
    assert "--back: #17181a" in page


def test_files_of_charts_are_light(tmp_path: Path) -> None:
    read_page(tmp_path, 3)
    for name in ("confusion.png", "roc.png", "precision_recall.png", "reliability.png"):
        with Image.open(tmp_path / "report" / name) as image:
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("count", [8, 9, 25, 26])
def test_charts_fit_a_phone(tmp_path: Path, count: int) -> None:
    """No chart shrinks below the size that it is drawn for, where its text has 8 points."""
    page = read_page(tmp_path, count)
    for picture in re.findall(r"<picture>.*?</picture>", page):
        narrow = re.findall(r'<source media="\(max-width: 52rem\)" srcset="([^"]+)">', picture)
        (image,) = re.findall(r'<img[^>]* src="([^"]+)"', picture)
        width = decode_image((narrow or [image])[0]).shape[1]
        assert width / 220 * 96 <= PHONE  # 220 dots an inch, 96 pixels of a page
        assert bool(narrow) == ('class="large"' in picture)
    assert page.count('"(max-width: 52rem)"') == (9 <= count <= 25)
    dark = '"screen and (prefers-color-scheme: dark) and (max-width: 52rem)"'
    assert page.count(dark) == (9 <= count <= 25)


def test_cells_of_numbers_have_names_for_narrow_pages(tmp_path: Path) -> None:
    page = read_page(tmp_path, 3)
    for name in ("photos", "precision", "recall", "AUC", "average precision"):
        assert page.count(f'data-column="{name}"') == 3
    assert "content: attr(data-column)" in page


def test_mistakes_have_file_names_and_scores(tmp_path: Path) -> None:
    page = read_page(tmp_path, 3)
    tags = Tags()
    tags.feed(page)
    shown = re.findall(
        r"<figcaption><b>(\d+\.png)</b><span>true (0\.\d\d) (class \d of many)</span>"
        r"<span>predicted (0\.\d\d) (class \d of many)</span>",
        page,
    )
    assert 1 < len(shown) == tags.names.count("figure") <= 12
    rows = (tmp_path / "report" / "predictions.csv").read_text().splitlines()
    for name, low, true, high, predicted in shown:
        (row,) = (row for row in rows if f"/{name}," in row)
        assert row.split(",")[1:3] == [true, predicted]
        assert float(low) < float(high)


def test_mistakes_of_folders_are_named_from_the_common_folder(tmp_path: Path) -> None:
    predictor, photos = make_scored_set(tmp_path, ("a", "b"), 20)
    moved = []
    for photo in photos.photos:
        path = tmp_path / photo.labels[0] / photo.path.name
        path.parent.mkdir(exist_ok=True)
        photo.path.rename(path)
        predictor.scores[str(path)] = predictor.scores[str(photo.path)]
        moved.append(type(photo)(path, photo.labels))
    photos = type(photos)(tuple(moved), photos.labels, False, "a set")
    scores = np.stack([predictor.scores[str(photo.path)] for photo in moved])
    predictions = Predictions(photos, photos.targets(), scores, scores, np.zeros(2))
    mistakes = list_mistakes(predictions)
    assert mistakes
    for mistake in mistakes:
        assert mistake.name == f"{mistake.path.parent.name}/{mistake.path.name}"
    mistakes[0].path.unlink()
    figure = draw_mistakes(mistakes)
    texts = read_texts(figure)
    assert {mistake.name for mistake in mistakes} <= set(texts)
    assert "unreadable" in texts
    assert max(render(figure).shape) >= 600
    evaluated = evaluate(predictor, photos, tmp_path / "report", bootstrap=0)
    assert isinstance(evaluated, Report)
    assert "no longer readable" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_colours_contrast_with_background(palette: Palette) -> None:
    """The ratio is that of WCAG: 4.5 for text, about 2 for large marks."""

    def luminance(colour: str) -> float:
        levels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    assert contrast(palette.ink, palette.back) > 7
    assert contrast(palette.on_full, palette.shares[1]) > 4.5
    assert contrast(palette.ink, palette.shares[0]) > 7
    for colour in (palette.gray, *palette.curves):
        assert contrast(colour, palette.back) > 2
