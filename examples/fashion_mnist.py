"""Fashion-MNIST as folders of PNGs, a folder a class: what the demo model was trained on.

    python examples/fashion_mnist.py IDX-FOLDER OUT

IDX-FOLDER holds the four idx files as they are published, packed by gzip (Debian's package
dataset-fashion-mnist puts them in /usr/share/datasets/fashion-mnist). OUT/train gets 60,000 photos
of 28 x 28 pixels and OUT/test 10,000. The model is then made by

    vitlib finetune OUT/train --config examples/fashion_mnist.yaml --from-scratch 96x6x4/4 --out RUN
    vitlib evaluate RUN OUT/test --out REPORT

The set: Xiao, Rasul and Vollgraf 1708.07747, MIT licence.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

LABELS = (
    "T-shirt or top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle boot",
)  # fmt: skip
PARTS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}


def read(folder: Path, name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(count, 28, 28) levels and (count,) classes of a part."""
    with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as file:
        levels = np.frombuffer(file.read(16 + count * 28 * 28), np.uint8, offset=16)
    with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz") as file:
        classes = np.frombuffer(file.read(8 + count), np.uint8, offset=8)
    return levels.reshape(count, 28, 28), classes


def main() -> None:
    """Write every photo."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    source, out = map(Path, sys.argv[1:])
    for part, (name, count) in PARTS.items():
        levels, classes = read(source, name, count)
        for label in LABELS:
            (out / part / label).mkdir(parents=True, exist_ok=True)
        for number, (photo, label) in enumerate(zip(levels, classes, strict=True)):
            Image.fromarray(photo).save(out / part / LABELS[label] / f"{number:05d}.png")
        print(f"{out / part}: {count} photos of {len(LABELS)} classes")


if __name__ == "__main__":
    main()
