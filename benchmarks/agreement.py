"""How often bf16 and int8 give float32's answer, on real photos that no calibration saw.

    python benchmarks/agreement.py [--folds sets | halves] [--out FILE]

DeiT-tiny on two sets of photos of ../shared: the share with the same best class as in float32, of
all, and of those whose two best float32 probabilities are at least 0.05 apart (where they are
closer, float32's own answer hangs on little). DINOv2-small: the cosine of its class embedding with
float32's. int8 is calibrated on 32 photos of the fold that is not measured, each fold in its turn:
one set of photos for the other (499x666 photos for thumbnails of 113x150, and back), or, with
--folds halves, every other photo of both sets for the rest.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from setting import SHARED, heading, photos_of, table, write_whole
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SETS = ("fridge_multilabel", "fridge_multiclass")
CALIBRATE, BATCH, APART = 32, 32, 0.05
# Asked of the ways that the issue names: of all photos, and of DINOv2's least cosine.
GOALS = {"bf16": 0.985, "int8, calibrated": 0.92}
COSINE = 0.99

Way = Callable[[Any, list[Path]], Any]  # a model, photos to calibrate with -> a model


def ways() -> dict[str, Way]:
    """How a float32 model is made to compute in less."""
    import vitlib

    return {
        "plain bf16: model.to(bfloat16)": lambda m, _: copy.deepcopy(m).to(torch.bfloat16),
        "fp32": lambda m, _: vitlib.optimize(m, "fp32"),
        "bf16": lambda m, _: vitlib.optimize(m, "bf16"),
        "int8, calibrated": lambda m, photos: vitlib.optimize(m, "int8", calibrate=photos),
        "int8, no photos": lambda m, _: vitlib.optimize(m, "int8"),
    }


def chosen(photos: list[Path]) -> list[Path]:
    """So many photos, evenly out of all."""
    return [photos[i * len(photos) // CALIBRATE] for i in range(CALIBRATE)]


def outputs(model: Any, method: str, pixels: Tensor) -> Tensor:
    """(B, C, H, W) through a model in batches -> (B, ...) float32."""
    with torch.inference_mode():
        parts = [getattr(model, method)(part) for part in pixels.split(BATCH)]
    return torch.cat(parts).float()


def folds(how: str) -> list[list[Path]]:
    """Two lists of photos, of which each calibrates for the other."""
    sets = [photos_of(name) for name in SETS]
    both = [photo for photos in sets for photo in photos]
    return sets if how == "sets" else [both[::2], both[1::2]]


def compared(
    folder: Path, method: str, parts: list[list[Path]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """All photos in float32, and every other way; rows in one order."""
    import vitlib

    model = vitlib.load(folder)
    exact: list[Tensor] = []
    found: dict[str, list[Tensor]] = {name: [] for name in ways()}
    for photos, others in zip(parts, reversed(parts), strict=True):
        pixels = model.image_processor(photos)
        exact.append(outputs(model, method, pixels))
        for way, make in ways().items():
            found[way].append(outputs(make(model, chosen(others)), method, pixels))
    return torch.cat(exact), {way: torch.cat(rows) for way, rows in found.items()}


def classes(folder: Path, parts: list[list[Path]]) -> str:
    """The table of the best classes."""
    exact, found = compared(folder, "forward", parts)
    counts = [len(photos) for photos in parts]
    best = exact.softmax(dim=-1).topk(2).values
    apart = best[:, 0] - best[:, 1] >= APART
    rows = []
    for way, logits in found.items():
        same = logits.argmax(dim=-1) == exact.argmax(dim=-1)
        clear = same[apart]
        goal, verdict = GOALS.get(way), ""
        if goal is not None:
            verdict = "met" if same.float().mean() >= goal and bool(clear.all()) else "**not met**"
            verdict = f"{100 * goal:g} % of all, every one apart: {verdict}"
        error = (logits - exact).abs().max() / exact.abs().max()
        by_fold = ", ".join(f"{int(s.sum())} of {len(s)}" for s in same.split(counts))
        rows.append((way, of(same), by_fold, of(clear), f"{error:.1e}", verdict))
    head = ("DeiT-tiny", f"same class, of all {len(exact)}", "by fold",
            f"of the {int(apart.sum())} with {APART} between the best two",
            "largest difference of a logit", "goal")  # fmt: skip
    return table(head, rows)


def of(same: Tensor) -> str:
    return f"{int(same.sum())} ({100 * same.float().mean():.1f} %)"


def embeddings(folder: Path, parts: list[list[Path]]) -> str:
    """The table of the cosines."""
    exact, found = compared(folder, "embed", parts)
    rows = []
    for way, vectors in found.items():
        cosine = torch.cosine_similarity(vectors.double(), exact.double())
        verdict = ""
        if way == "int8, calibrated":
            verdict = f"{COSINE}: {'met' if cosine.min() >= COSINE else '**not met**'}"
        rows.append((way, f"{cosine.min():.5f}", f"{cosine.mean():.5f}", verdict))
    return table(("DINOv2-small", "least cosine", "mean", "goal"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the tables here too")
    parser.add_argument("--folds", choices=("sets", "halves"), default="sets")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # this checkout's vitlib
    torch.set_num_threads(options.threads)
    parts = [f"{heading({'torch': torch.__version__})} Folds: {options.folds}."]
    if not all(photos_of(name) for name in SETS):
        parts.append("Skipped: the photos are not there.")
    else:
        for name, tell in (("deit-tiny-patch16-224", classes), ("dinov2-small", embeddings)):
            folder = SHARED / "models" / name
            there = folder.exists()
            given = folds(options.folds)
            parts.append(tell(folder, given) if there else f"{name} is skipped: it is not there.")
    text = "\n\n".join(parts) + "\n"
    print(text)
    if options.out:
        write_whole(options.out, text)


if __name__ == "__main__":
    main()
