"""Agreement of bf16 and int8 with float32 on real photos that no calibration has used.

    python benchmarks/agreement.py [--folds sets | halves] [--out FILE]

DeiT-tiny, on two sets of photos in ../shared: the share of photos with the same best class as in
float32. A second share counts only the photos whose two best float32 probabilities differ by at
least 0.05. DINOv2-small: the cosine of the class embedding with float32's.

int8 is calibrated on 32 photos of one fold and measured on the other, and the reverse. By default
the folds are the two sets (499x666 photos and thumbnails of 113x150). With --folds halves, each
fold has every second photo of both sets.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from setting import SHARED, describe_run, list_photos, markdown_table, write_atomically
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SETS = ("fridge_multilabel", "fridge_multiclass")
NUM_CALIBRATION, BATCH_SIZE, MIN_MARGIN = 32, 32, 0.05
# Least share of photos with the same class, by conversion; least cosine of any photo.
GOALS = {"bf16": 0.985, "int8, calibrated": 0.92}
COSINE_GOAL = 0.99

Conversion = Callable[[Any, list[Path]], Any]  # (model, calibration photos) -> model


def conversions() -> dict[str, Conversion]:
    """Map names to functions that convert a float32 model to another form."""
    import vitlib

    return {
        "unoptimized bf16: model.to(bfloat16)": lambda m, _: copy.deepcopy(m).to(torch.bfloat16),
        "fp32": lambda m, _: vitlib.optimize(m, "fp32"),
        "bf16": lambda m, _: vitlib.optimize(m, "bf16"),
        "int8, calibrated": lambda m, photos: vitlib.optimize(m, "int8", calibrate=photos),
        "int8, no photos": lambda m, _: vitlib.optimize(m, "int8"),
    }


def select_calibration(photos: list[Path]) -> list[Path]:
    """Select evenly spaced photos for the calibration."""
    return [photos[i * len(photos) // NUM_CALIBRATION] for i in range(NUM_CALIBRATION)]


def compute_outputs(model: Any, method: str, pixels: Tensor) -> Tensor:
    """Run a method on pixels (B, C, H, W) in batches; return (B, ...) float32."""
    with torch.inference_mode():
        batches = [getattr(model, method)(batch) for batch in pixels.split(BATCH_SIZE)]
    return torch.cat(batches).float()


def make_folds(kind: str) -> list[list[Path]]:
    """Return two lists of photos, each of which calibrates for the other."""
    sets = [list_photos(name) for name in SETS]
    all_photos = [photo for photos in sets for photo in photos]
    return sets if kind == "sets" else [all_photos[::2], all_photos[1::2]]


def compute_all(
    folder: Path, method: str, folds: list[list[Path]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the outputs of all photos in float32 and by every conversion.

    Args:
        folder: Checkpoint.
        method: Name of the model's method.
        folds: The two folds.

    Returns:
        The float32 outputs, and the outputs by conversion. All have the rows in one order.
    """
    import vitlib

    model = vitlib.load(folder)
    exact: list[Tensor] = []
    converted: dict[str, list[Tensor]] = {name: [] for name in conversions()}
    for photos, calibration in zip(folds, reversed(folds), strict=True):
        pixels = model.image_processor(photos)
        exact.append(compute_outputs(model, method, pixels))
        for name, convert in conversions().items():
            converted[name].append(
                compute_outputs(convert(model, select_calibration(calibration)), method, pixels)
            )
    return torch.cat(exact), {name: torch.cat(rows) for name, rows in converted.items()}


def class_table(folder: Path, folds: list[list[Path]]) -> str:
    """Build the table of the best classes."""
    exact, converted = compute_all(folder, "forward", folds)
    counts = [len(photos) for photos in folds]
    top2 = exact.softmax(dim=-1).topk(2).values
    is_clear = top2[:, 0] - top2[:, 1] >= MIN_MARGIN
    rows = []
    for name, logits in converted.items():
        same = logits.argmax(dim=-1) == exact.argmax(dim=-1)
        same_clear = same[is_clear]
        goal, verdict = GOALS.get(name), ""
        if goal is not None:
            verdict = (
                "met" if same.float().mean() >= goal and bool(same_clear.all()) else "**not met**"
            )
            verdict = f"{100 * goal:g} % of all, every clear photo: {verdict}"
        error = (logits - exact).abs().max() / exact.abs().max()
        by_fold = ", ".join(f"{int(s.sum())} of {len(s)}" for s in same.split(counts))
        rows.append(
            (name, format_count(same), by_fold, format_count(same_clear), f"{error:.1e}", verdict)
        )
    header = ("DeiT-tiny", f"same class, all {len(exact)} photos", "by fold",
            f"same class, {int(is_clear.sum())} photos with a margin of {MIN_MARGIN}",
            "largest error of a logit", "goal")  # fmt: skip
    return markdown_table(header, rows)


def format_count(same: Tensor) -> str:
    """Format the number and the share of true values."""
    return f"{int(same.sum())} ({100 * same.float().mean():.1f} %)"


def embedding_table(folder: Path, folds: list[list[Path]]) -> str:
    """Build the table of the cosines."""
    exact, converted = compute_all(folder, "embed", folds)
    rows = []
    for name, vectors in converted.items():
        cosine = torch.cosine_similarity(vectors.double(), exact.double())
        verdict = ""
        if name == "int8, calibrated":
            verdict = f"{COSINE_GOAL}: {'met' if cosine.min() >= COSINE_GOAL else '**not met**'}"
        rows.append((name, f"{cosine.min():.5f}", f"{cosine.mean():.5f}", verdict))
    return markdown_table(("DINOv2-small", "minimum cosine", "mean", "goal"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    parser.add_argument("--folds", choices=("sets", "halves"), default="sets")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # import vitlib from this checkout
    torch.set_num_threads(options.threads)
    parts = [f"{describe_run({'torch': torch.__version__})} Folds: {options.folds}."]
    if not all(list_photos(name) for name in SETS):
        parts.append("Skipped: the photos are absent.")
    else:
        for name, make_table in (
            ("deit-tiny-patch16-224", class_table),
            ("dinov2-small", embedding_table),
        ):
            folder = SHARED / "models" / name
            is_present = folder.exists()
            folds = make_folds(options.folds)
            parts.append(
                make_table(folder, folds)
                if is_present
                else f"{name} is skipped: its checkpoint is absent."
            )
    text = "\n\n".join(parts) + "\n"
    print(text)
    if options.out:
        write_atomically(options.out, text)


if __name__ == "__main__":
    main()
