"""Photos of a list are found where finetune finds them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vitlib.batch.inputs.items import File, InvalidRow
from vitlib.batch.inputs.source import Source
from vitlib.data import read_photos


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images/sub").mkdir(parents=True)
    for name in ("a.jpg", "images/b.jpg", "images/sub/c.jpg", "d.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


ROWS = "a.jpg,cat\nb.jpg,dog\nsub\\c.jpg,cat\nhttps://example.com/x/d.jpg,dog\n"


@pytest.mark.parametrize("header", ["filename,label\n", ""])
def test_csv_is_read_as_finetune_reads_it(folder: Path, header: str) -> None:
    path = folder / "labels.csv"
    path.write_text(header + ROWS)
    items = list(Source((str(path),)).iter_items(lambda _: True, lambda _: None))
    files = [Path(item.ref.path) for item in items if isinstance(item.ref, File)]
    assert files == [Path(photo.path) for photo in read_photos(path).photos]
    assert items[0].file == "a.jpg"


def test_absent_photo_is_named_by_its_path(folder: Path) -> None:
    path = folder / "list.csv"
    path.write_text("filename,label\nnone.jpg,cat\nhttps://example.com/none.jpg,dog\n")
    first, second = Source((str(path),)).iter_items(lambda _: True, lambda _: None)
    assert first.ref == File(str(folder / "none.jpg"))
    assert isinstance(second.ref, InvalidRow)
    # A first line that names no photo is a header, with columns that are not known.
    path.write_text("none.jpg,cat\n")
    with pytest.raises(Exception, match="expected image, path or file"):
        list(Source((str(path),)).iter_items(lambda _: True, lambda _: None))
