"""Contact sheets: names, labels with scores, and tiles of unreadable photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fixtures.pictures import read_texts, render
from vitlib import Prediction, plots
from vitlib.errors import ConfigError, ImageError

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'vitlib[plot]'")

PHOTO = Image.new("RGB", (90, 60), (0, 200, 0))


def test_sheet_has_name_and_every_label_with_score() -> None:
    predictions = [Prediction("tabby, tabby cat", 0.81, 0), Prediction("lynx", 0.1, 1)]
    caption = plots.caption_predictions(predictions)
    texts = read_texts(plots.contact_sheet([PHOTO] * 2, [caption, ""], names=["a.jpg", "b.jpg"]))
    assert {"a.jpg", "b.jpg", "0.81  tabby", "0.10  lynx"} <= set(texts)
    assert plots.caption_predictions([]) == "no label scores enough"
    assert plots.caption_predictions([Prediction("age", 41.25, 0)], numbers=True) == "41.25  age"


def test_unreadable_photo_has_tile_with_name_and_reason() -> None:
    photos = [PHOTO, "folder/bad.jpg", PHOTO]
    errors = {1: "'folder/bad.jpg' is not an image: expected JPEG"}
    names = [plots.file_name(photo) for photo in photos]
    figure = plots.contact_sheet(photos, errors=errors, names=names)
    texts = read_texts(figure)
    assert len(figure.axes) == 3
    assert {"bad.jpg", "unreadable"} <= set(texts)
    assert "is not an image:" in " ".join(texts)
    assert names == ["", "bad.jpg", ""]
    pixels = render(figure)
    grey = (pixels == 0xEE).all(axis=-1)
    columns = np.flatnonzero(grey.sum(axis=0) > 100)
    assert 200 <= columns.min() < columns.max() < 400  # the second of three tiles


def test_photo_that_vanished_has_tile_or_raises(tmp_path: Path) -> None:
    photos = [PHOTO, str(tmp_path / "gone.jpg")]
    assert "unreadable" in read_texts(plots.contact_sheet(photos, errors={}))
    with pytest.raises(ImageError, match=r"gone\.jpg"):
        plots.contact_sheet(photos)
    with pytest.raises(ConfigError, match="1 names for 2 photos: expected one each"):
        plots.contact_sheet(photos, names=["a"])


def test_long_file_names_keep_both_ends() -> None:
    name = "holiday_in_the_mountains_with_a_very_long_name_IMG_0123.jpg"
    figure = plots.contact_sheet([PHOTO] * 5, ["one\ntwo $x$"] * 5, names=[name] * 5)
    height, width = render(figure).shape[:2]
    shown = [text for text in figure.texts if "…" in text.get_text()]
    assert len(shown) == 5
    for text in shown:
        assert text.get_text().startswith("holiday")
        assert text.get_text().endswith("0123.jpg")
    boxes = [text.get_window_extent() for text in figure.texts]
    for index, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.x1 <= width
        assert box.y0 >= 0
        assert box.y1 <= height
        assert not any(box.overlaps(other) for other in boxes[:index])
