"""Folders of photos for tests of batches: good ones, and ones that are broken in many ways."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

DEMO = Path(__file__).parents[1] / "vitlib" / "assets" / "demo"
SAMPLES = sorted((DEMO / "samples").glob("*.png"))


def photo(number: int, kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    """A photo unlike that of any other number."""
    random = np.random.default_rng(number)
    small = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def folder_of(folder: Path, count: int, kind: str = "PNG") -> list[Path]:
    """Photos, some in folders below."""
    paths = []
    for number in range(count):
        path = folder / ("", "b", "b/deep", "z")[number % 4] / f"{number:04d}.{kind.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number, kind))
        paths.append(path)
    return paths


def bomb() -> bytes:
    """A PNG of 100,000 x 100,000 pixels in some hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999))


def _truncated(kind: str) -> bytes:
    whole = photo(7, kind, (400, 300))
    return whole[: len(whole) // 3]


def _bent(path: Path) -> None:
    data = bytearray(photo(8, "PNG", (400, 300)))
    data[100:140] = b"x" * 40
    path.write_bytes(data)


# What is wrong -> how a file becomes so.
BROKEN: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("hello"),
    "html": lambda p: p.write_text("<html><body>404</body></html>"),
    "zeros": lambda p: p.write_bytes(bytes(5000)),
    "truncated-jpeg": lambda p: p.write_bytes(_truncated("JPEG")),
    "truncated-png": lambda p: p.write_bytes(_truncated("PNG")),
    "head-alone": lambda p: p.write_bytes(photo(3, "JPEG")[:20]),
    "bent": _bent,
    "bomb": lambda p: p.write_bytes(bomb()),
    "pdf": lambda p: p.write_bytes(b"%PDF-1.4\n" + os.urandom(500)),
    "svg": lambda p: p.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "zip": lambda p: p.write_bytes(b"PK\x03\x04" + os.urandom(500)),
    "nowhere": lambda p: p.symlink_to("/nowhere/at/all.png"),
    "pipe": lambda p: os.mkfifo(p),
    "loop": lambda p: p.symlink_to(p),
}
