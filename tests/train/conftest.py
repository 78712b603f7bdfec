"""Photos and a checkpoint that several tests of training use."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitlib
from fixtures.training_batches import draw_image
from vitlib import ImageProcessor, ViT, ViTConfig


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Twelve photos of many kinds: sizes, gray, palette, alpha, rotated by EXIF, large."""
    files = []
    for number in range(12):
        image = draw_image(50 + 7 * number, 90 - 4 * number, number)
        path = tmp_path / f"{number:02}.png"
        if number == 3:
            image = image.convert("L")
        elif number == 4:
            image = image.convert("RGBA")
            image.putalpha(100)
        elif number == 5:
            image = image.convert("P")
        elif number == 6:
            image = draw_image(300, 500, 6)
        if number in (0, 7):
            exif = Image.Exif()
            exif[0x0112] = 6  # rotated by 90 degrees
            path = path.with_suffix(".jpg")
            image.save(path, exif=exif)
        else:
            image.save(path)
        files.append(path)
    return files


@pytest.fixture
def no_leftovers() -> Iterator[None]:
    """Check that a test leaves no process and no thread of a loader behind."""
    yield
    assert not multiprocessing.active_children()
    assert not [t for t in threading.enumerate() if t.name.startswith("vitlib-read")]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of different brightness, 12 photos each."""
    folder, random = tmp_path / "photos", np.random.default_rng(0)
    for label, level in (("dark", 60), ("light", 190)):
        (folder / label).mkdir(parents=True)
        for index in range(12):
            pixels = random.integers(level - 50, level + 50, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{index:02}.png")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Checkpoint of a model of two blocks, with a head of three classes."""
    torch.manual_seed(0)
    cfg = ViTConfig(
        image_size=(16, 16), patch_size=(8, 8), embed_dim=32, depth=2, num_heads=2, num_classes=3
    )
    rule = ImageProcessor(size=(16, 16), image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    vitlib.save(ViT(cfg), tmp_path / "source", image_processor=rule)
    return tmp_path / "source"
