"""Planted faults: how many of them `vitlib audit` finds, what else it reports, and what it takes.

    python benchmarks/audit.py [--models PATH ...] [--only NAME ...] [--out FOLDER]

Photos are those of fridge_multiclass (134, in four classes), and the test images of Fashion-MNIST
(Debian's dataset-fashion-mnist). Thresholds of the audit were chosen on other photos: those of
fridge_multilabel and the training images of Fashion-MNIST.

- copies: 1,000 photos of which 866 are copies of the 134 (700 and 300 of Fashion-MNIST): crops of
  70 to 95 % of each side, JPEGs of quality 20 to 70, sides of 40 to 90 % (of 28 pixels 70 to 95 %),
  mirrored, 60 to 140 % of the brightness, and combinations. Recall: copies in one group with their
  original. Precision: listed duplicates that have one original with the photo they are said to
  equal.
- leakage: a training set of 500 photos, of which 200 are copies of photos of the test set, and a
  test set of the 67 other originals. Recall: copies that are listed.
- labels: the labels of 5 % of 1,000 photos are replaced by another class. Share of them among the
  first 10 % of the photos by rank. Fridge photos are 1,000 copies of 134, so duplicates tell much;
  "no copies" is the 134 themselves, ten times with other labels replaced.
- untouched: what the audit reports of the photos as they are.
- scale: 10,000 images with stored features of 384 numbers, whole audit; time and peak memory.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from setting import SHARED, describe_run, list_photos, markdown_table

FASHION = Path("/usr/share/datasets/fashion-mnist")
Rng = np.random.Generator
Op = Callable[[Image.Image, Rng], Image.Image]


def crop(image: Image.Image, rng: Rng, least: float = 0.7) -> Image.Image:
    """Crop a random part of 70 to 95 % of each side."""
    share = rng.uniform(least, 0.95)
    width, height = (round(side * share) for side in image.size)
    x, y = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
    return image.crop((x, y, x + width, y + height))


def encode(image: Image.Image, rng: Rng) -> Image.Image:
    """Encode as a JPEG of low quality."""
    file = io.BytesIO()
    image.save(file, "jpeg", quality=int(rng.integers(20, 70)))
    return Image.open(file).convert("RGB")


def resize(image: Image.Image, rng: Rng) -> Image.Image:
    """Resize to 40 to 90 %, tiny images to 70 to 95 %."""
    share = rng.uniform(0.7, 0.95) if min(image.size) < 64 else rng.uniform(0.4, 0.9)
    return image.resize([max(1, round(side * share)) for side in image.size])


def brighten(image: Image.Image, rng: Rng) -> Image.Image:
    """Change brightness and contrast."""
    factor = rng.uniform(0.6, 0.85) if rng.random() < 0.5 else rng.uniform(1.15, 1.4)
    image = ImageEnhance.Brightness(image).enhance(factor)
    return ImageEnhance.Contrast(image).enhance(rng.uniform(0.8, 1.2))


OPS: dict[str, Op] = {
    "crop": crop,
    "jpeg": encode,
    "resize": resize,
    "mirror": lambda image, _: ImageOps.mirror(image),
    "brightness": brighten,
    "crop+mirror": lambda image, rng: ImageOps.mirror(crop(image, rng, 0.8)),
    "crop+brightness+jpeg": lambda image, rng: encode(brighten(crop(image, rng, 0.8), rng), rng),
}
# Tiny images keep too little in a strong crop that is encoded again.
SINGLE = ("crop", "jpeg", "resize", "mirror", "brightness")
Originals = list[tuple[str, str, Image.Image]]  # name, class, image


def fridge() -> Originals:
    """Read the photos of fridge_multiclass."""
    return [
        (path.stem, path.parent.name, Image.open(path).convert("RGB"))
        for path in list_photos("fridge_multiclass")
    ]


def fashion(start: int, count: int) -> Originals:
    """Read test images of Fashion-MNIST."""
    images = gzip.decompress((FASHION / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((FASHION / "t10k-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    classes = np.frombuffer(labels, np.uint8, offset=8)
    return [
        (f"f{i:05d}", f"class {classes[i]}", Image.fromarray(pixels[i]).convert("RGB"))
        for i in range(start, start + count)
    ]


def write(folder: Path, name: str, label: str, image: Image.Image) -> Path:
    """Write a photo into the folder of its class."""
    path = folder / label / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def plant(
    folder: Path, originals: Originals, copies: int, names: tuple[str, ...], seed: int
) -> None:
    """Write originals and copies of them; a name is ORIGINAL=copy.suffix."""
    rng = np.random.default_rng(seed)
    for name, label, image in originals:
        write(folder, f"{name}=original.png", label, image)
    order = [names[(i + j) % len(names)] for j in range(len(names)) for i in range(len(originals))]
    for index in range(copies):
        name, label, image = originals[index % len(originals)]
        op = order[index % len(order)]
        copy = OPS[op](image, rng)
        write(folder, f"{name}={op}-{index}.png", label, copy)


def origin(filename: str) -> str:
    """Return the original of a planted photo."""
    return Path(filename).name.split("=")[0]


def audit(model: str, data: Path, out: Path, **settings: Any) -> dict[str, Any]:
    """Audit a set in this process; photos of all sets pass through a model once."""
    from vitlib import Predictor
    from vitlib.audit import run
    from vitlib.features import FeatureStore

    store = FeatureStore(out.parent / "features")
    return run(Predictor.load(model), data, out, model=model, store=store, **settings).as_dict()


def plant_copies(folder: Path, kind: str) -> Path:
    """Plant 1,000 photos with copies among them, once."""
    data = folder / f"copies-{kind}"
    if not data.exists():
        if kind == "fridge":
            plant(data, fridge(), 866, tuple(OPS), 1)
        else:
            plant(data, fashion(0, 700), 300, SINGLE, 1)
    return data


def measure_copies(model: str, folder: Path, kind: str) -> list[str]:
    """Measure duplicates among planted copies."""
    data = plant_copies(folder, kind)
    found = audit(model, data, folder / f"audit-{data.name}-{Path(model).name}")
    groups: dict[str, int] = {row["filename"]: row["group"] for row in found["duplicates"]}
    originals = {origin(str(p)): str(p) for p in data.rglob("*=original.png")}
    copies = [str(p) for p in data.rglob("*.png") if "=original" not in p.name]
    right = [p for p in copies if p in groups and groups[p] == groups.get(originals[origin(p)])]
    listed = [row for row in found["duplicates"] if row["kind"] != "kept"]
    wrong = [row for row in listed if origin(row["filename"]) != origin(row["same_as"])]
    missed = sorted({Path(p).name.split("=")[1].split("-")[0] for p in copies if p not in right})
    for row in wrong[:20]:
        print(
            "  other original:",
            Path(row["filename"]).name,
            Path(row["same_as"]).name,
            row["reason"],
        )
    print("  missed:", missed)
    return [
        kind, Path(model).name, str(len(copies)), f"{len(right) / len(copies):.3f}",
        f"{1 - len(wrong) / max(len(listed), 1):.3f} ({len(wrong)} of {len(listed)})",
        f"{found['seconds']:.0f}",
    ]  # fmt: skip


def measure_leakage(model: str, folder: Path) -> list[str]:
    """Measure leaked photos among planted ones."""
    data, test = folder / "leak-train", folder / "leak-test"
    if not data.exists():
        photos, rng = fridge(), np.random.default_rng(2)
        train, held_out = photos[0::2], photos[1::2]
        plant(data, train, 300 - len(train), tuple(OPS), 3)
        for name, label, image in held_out:
            write(test, f"{name}=original.png", label, image)
        for index in range(200):
            name, label, image = held_out[index % len(held_out)]
            op = list(OPS)[index % len(OPS)]
            write(data, f"{name}={op}-leak-{index}.png", label, OPS[op](image, rng))
    out = folder / f"audit-leak-{Path(model).name}"
    found = audit(model, data, out, against=test)
    listed = {row["filename"]: origin(row["other"]) for row in found["leakage"]}
    leaked = [str(p) for p in data.rglob("*-leak-*")]
    right = [p for p in leaked if listed.get(p) == origin(p)]
    wrong = [p for p, other in listed.items() if origin(p) != other]
    for p in wrong:
        print("  other original:", Path(p).name, listed[p])
    return [
        Path(model).name, str(len(leaked)), f"{len(right) / len(leaked):.3f}",
        f"{1 - len(wrong) / max(len(listed), 1):.3f} ({len(wrong)} of {len(listed)})",
    ]  # fmt: skip


def replace_labels(photos: list[tuple[Path, str]], table: Path, seed: int) -> set[str]:
    """Write a labels.csv in which 5 % of the labels are replaced; return these files."""
    rng, classes = np.random.default_rng(seed), sorted({label for _, label in photos})
    chosen = rng.choice(len(photos), round(0.05 * len(photos)), replace=False)
    swapped = set()
    lines = ["filename,label"]
    for index, (path, label) in enumerate(photos):
        if index in chosen:
            label = str(rng.choice([name for name in classes if name != label]))
            swapped.add(str(path))
        lines.append(f"{path},{label}")
    table.write_text("\n".join(lines) + "\n")
    return swapped


def measure_labels(model: str, folder: Path, kind: str) -> list[str]:
    """Measure replaced labels among the suspects."""
    if kind == "fridge, copies":
        data = plant_copies(folder, "fridge")
    else:
        data = folder / ("labels-fashion" if kind == "fashion" else "labels-fridge")
        if not data.exists():
            plant(data, fashion(3000, 1000) if kind == "fashion" else fridge(), 0, SINGLE, 1)
    photos = [(path, path.parent.name) for path in sorted(data.rglob("*.png"))]
    shares, confident, accuracy = [], [], []
    for seed in range(10 if len(photos) < 500 else 3):
        table = folder / f"swapped-{seed}-{data.name}.csv"
        swapped = replace_labels(photos, table, seed)
        out = folder / f"audit-labels-{data.name}-{Path(model).name}"
        found = audit(model, table, out)
        first = [row["filename"] for row in found["label_suspects"]][: round(0.1 * len(photos))]
        shares.append(len(swapped & set(first)) / len(swapped))
        sure = {row["filename"] for row in found["label_suspects"] if row["confident"]}
        confident.append((len(swapped & sure) / len(swapped), len(sure)))
        accuracy.append(found["label_accuracy"])
    recall, count = np.mean(confident, axis=0)
    return [
        kind, Path(model).name, str(len(photos)), f"{np.mean(shares):.3f}",
        f"{min(shares):.2f} to {max(shares):.2f}", f"{recall:.3f} ({count:.0f} flagged)",
        f"{np.mean(accuracy):.3f}",
    ]  # fmt: skip


def measure_untouched(model: str, folder: Path, kind: str) -> list[str]:
    """Count what is reported of photos as they are."""
    sets = {
        "fridge_multiclass": SHARED / "data/fridge_multiclass",
        "fridge_multilabel": SHARED / "data/fridge_multilabel",
        "fashion": folder / "labels-fashion",
    }
    data = sets[kind]
    if not data.exists():
        plant(data, fashion(3000, 1000), 0, SINGLE, 1)
    out = folder / f"audit-untouched-{kind}-{Path(model).name}"
    counts = audit(model, data, out, multi_label=kind == "fridge_multilabel")["counts"]
    names = ("near_duplicates", "exact_duplicates", "label_suspects", "outliers", "quality")
    return [kind, Path(model).name, *(str(counts[name]) for name in names)]


def measure_scale(folder: Path) -> list[list[str]]:
    """Time the audit of 10,000 images in a process of its own, first and with stored features."""
    data = folder / "scale"
    if not data.exists():
        for name, label, image in fashion(0, 10_000):
            write(data, f"{name}.png", label, image)
    rows = []
    for turn in ("first", "stored"):
        done = subprocess.run(
            [sys.executable, __file__, "--child", str(data), "--out", str(folder / "scale-out")],
            check=True,
            capture_output=True,
            text=True,
        )
        seconds, mebibytes, counts = json.loads(done.stdout.splitlines()[-1])
        rows.append([turn, f"{seconds:.1f}", f"{mebibytes:.0f}", str(counts["near_duplicates"])])
    return rows


def run_child(data: Path, out: Path) -> None:
    """Audit with a small random model of 384 features; print seconds, MiB and counts."""
    import torch

    from vitlib import ImageProcessor, Predictor, ViT, ViTConfig
    from vitlib.audit import run

    torch.manual_seed(0)
    config = ViTConfig(image_size=28, patch_size=7, embed_dim=384, depth=1, num_heads=6)
    predictor = Predictor(ViT(config).eval(), ImageProcessor(size=(28, 28)))
    started = time.perf_counter()
    report = run(predictor, data, out)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([seconds, peak, report.counts]))


def measure(models: list[str], folder: Path, only: set[str]) -> Iterator[str]:
    """Yield a table for each measurement."""
    kinds = ("fridge", "fashion")
    if "copies" in only:
        rows = [measure_copies(model, folder, kind) for model in models for kind in kinds]
        yield markdown_table(["set", "model", "copies", "recall", "precision", "s"], rows, 2)
    if "leakage" in only:
        rows = [measure_leakage(model, folder) for model in models]
        yield markdown_table(["model", "leaked", "recall", "precision"], rows, 1)
    if "labels" in only:
        sets = ("fridge, copies", "fridge, no copies", "fashion")
        rows = [measure_labels(model, folder, kind) for kind in sets for model in models]
        head = [
            "set", "model", "photos", "in the first 10 %", "range", "confident", "accuracy",
        ]  # fmt: skip
        yield markdown_table(head, rows, 2)
    if "untouched" in only:
        sets = ("fridge_multiclass", "fridge_multilabel", "fashion")
        rows = [measure_untouched(model, folder, kind) for kind in sets for model in models]
        head = ["set", "model", "near", "exact", "label suspects", "outliers", "quality"]
        yield markdown_table(head, rows, 2)
    if "scale" in only:
        yield markdown_table(["run", "s", "peak MiB", "near"], measure_scale(folder), 1)


def main() -> None:
    """Parse arguments, measure, print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = [str(SHARED / "models" / name) for name in ("dinov2-small", "deit-tiny-patch16-224")]
    parser.add_argument("--models", nargs="+", default=[*default, "demo"])
    names = ("copies", "leakage", "labels", "untouched", "scale")
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=Path)
    args = parser.parse_args()
    if args.child is not None:
        run_child(args.child, args.out)
        return
    folder = args.out or Path(tempfile.mkdtemp(prefix="audit-"))
    folder.mkdir(parents=True, exist_ok=True)
    libraries = ("torch", "numpy", "scikit-learn", "pillow")
    print(describe_run({name: version(name) for name in libraries}), flush=True)
    for table in measure(args.models, folder, set(args.only)):
        print("\n" + table, flush=True)
    if args.out is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
