"""Convert Fashion-MNIST, the training set of the demo model, to folders of PNGs, one per class.

    python examples/fashion_mnist.py IDX-FOLDER OUT

IDX-FOLDER holds the four published files, in idx format and compressed by gzip. Debian's package
dataset-fashion-mnist installs them in /usr/share/datasets/fashion-mnist. OUT/train gets 60,000
photos of 28 x 28 pixels and OUT/test 10,000. These commands then train and evaluate the model:

    vitlib finetune OUT/train --config examples/fashion_mnist.yaml --from-scratch 96x6x4/4 --out RUN
    vitlib evaluate RUN OUT/test --out REPORT

The data set is by Xiao, Rasul and Vollgraf (arXiv 1708.07747), under the MIT licence.
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
SPLITS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}  # prefix of files, photos


def read_split(folder: Path, name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the pixels (count, 28, 28) and the classes (count,) of a split."""
    with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(16 + count * 28 * 28), np.uint8, offset=16)
    with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz") as file:
        classes = np.frombuffer(file.read(8 + count), np.uint8, offset=8)
    return pixels.reshape(count, 28, 28), classes


def main() -> None:
    """Write all photos of both splits."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    source, out = map(Path, sys.argv[1:])
    for split, (name, count) in SPLITS.items():
        photos, classes = read_split(source, name, count)
        for label in LABELS:
            (out / split / label).mkdir(parents=True, exist_ok=True)
        for number, (photo, index) in enumerate(zip(photos, classes, strict=True)):
            Image.fromarray(photo).save(out / split / LABELS[index] / f"{number:05d}.png")
        print(f"{out / split}: {count} photos of {len(LABELS)} classes")


if __name__ == "__main__":
    main()
