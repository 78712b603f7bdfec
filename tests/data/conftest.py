"""Labelled sets that several tests read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixtures.labelled_photos import write_photos
from vitlib.data import LabelledPhotos, read_photos


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder with a.png to f.png."""
    root = tmp_path / "set"
    write_photos(*(root / f"{name}.png" for name in "abcdef"))
    return root


@pytest.fixture
def csv(folder: Path) -> Callable[..., LabelledPhotos]:
    """Function that writes labels.csv beside a.png to f.png, and reads the set."""

    def read(text: str | bytes, **options: Any) -> LabelledPhotos:
        path = folder / "labels.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_photos(folder, **options)

    return read


@pytest.fixture
def jsonl(folder: Path) -> Callable[..., LabelledPhotos]:
    """Function that writes a JSONL of values or lines of text, and reads the set."""

    def read(*values: Any, **options: Any) -> LabelledPhotos:
        lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
        (folder / "train.jsonl").write_text("\n".join(lines))
        return read_photos(folder, **options)

    return read


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Folder per class: 5 cans and 3 cartons."""
    root = tmp_path / "classes"
    write_photos(*(root / "can" / f"{i}.png" for i in range(5)))
    write_photos(*(root / "carton" / f"{i}.png" for i in range(3)))
    return root
