"""A list of photos reads back as the set that was written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from vitlib.data import LabelledPhotos, Photo, read_photos
from vitlib.data.write_list import find_list, write_list

NAMES = {
    "plain": "a.jpg",
    "comma and quotes": 'a, "b".jpg',
    "line break": "a\nb.jpg",
    "not Unicode": os.fsdecode(b"a\xff.jpg"),
    "spaces": " a .jpg",
}


def build(folder: Path, name: str, photos: list[Photo], **fields: object) -> LabelledPhotos:
    files = [folder / f"{index}-{name}" for index in range(len(photos))]
    for file in files:
        Image.new("RGB", (2, 2)).save(file, "JPEG")
    placed = tuple(photo._replace(path=file) for photo, file in zip(photos, files, strict=True))
    return LabelledPhotos(placed, source="made", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize(
    ("photos", "fields", "suffix"),
    [
        (
            [Photo(Path(), ("cat",)), Photo(Path(), ("hot dog",))],
            {"labels": ("cat", "hot dog"), "multi_label": False},
            ".csv",
        ),
        (
            [Photo(Path(), ("cat", "hot dog")), Photo(Path(), ())],
            {"labels": ("cat", "hot dog"), "multi_label": True},
            ".csv",
        ),
        (
            [Photo(Path(), ("cat",), ("dog",)), Photo(Path(), ("dog",))],
            {"labels": ("cat", "dog"), "multi_label": True},
            ".csv",
        ),
        (
            [Photo(Path(), (), (), (0.1, -3.0)), Photo(Path(), (), (), (1e-9, 2.5))],
            {"labels": ("age", "height"), "multi_label": False, "regression": True},
            ".csv",
        ),
        (
            [Photo(Path(), (), (), (0.1,)), Photo(Path(), (), (), (2.5,))],
            {"labels": ("label",), "multi_label": False, "regression": True},
            ".jsonl",
        ),
        (
            [Photo(Path(), ('say "cat"',)), Photo(Path(), ("dog",))],
            {"labels": ("dog", 'say "cat"'), "multi_label": False},
            ".jsonl",
        ),
    ],
)
def test_list_reads_back(
    case: str,
    photos: list[Photo],
    fields: dict[str, object],
    suffix: str,
    tmp_path: Path,
) -> None:
    expected = build(tmp_path, NAMES[case], photos, **fields)
    path = write_list(expected, tmp_path, "validation")
    assert path == find_list(tmp_path, "validation")
    assert path.suffix == (suffix if case in ("plain", "comma and quotes", "spaces") else ".jsonl")
    again = read_photos(
        path,
        multi_label=bool(fields["multi_label"]),
        regression=bool(fields.get("regression")),
        labels=expected.labels,
    )
    assert again.photos == expected.photos


def test_no_list_is_none(tmp_path: Path) -> None:
    assert find_list(tmp_path, "validation") is None
