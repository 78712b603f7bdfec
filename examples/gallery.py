"""Make docs/gallery.md and its pictures: every explanation that vitlib can draw.

    python examples/gallery.py [--classifier MODEL] [--features MODEL] [--out docs]

The photo is demo/chelsea.jpg, and this script draws the other images. The time of a picture is that
of one call, after models and matplotlib are loaded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

import vitlib
from vitlib import explain, plots
from vitlib.cli.attend import CLASS_METHODS, SCALES, SUMMARIES
from vitlib.explain.faithfulness import faithfulness
from vitlib.plots.draw import new_figure
from vitlib.retrieval import nearest

ROOT = Path(__file__).resolve().parents[1]
PHOTO = ROOT / "demo" / "chelsea.jpg"
SHAPES = ("circle", "square", "triangle")
COLOURS = {"orange": (213, 94, 0), "blue": (0, 114, 178), "green": (0, 158, 115)}
HEAD = """# Gallery

Explanations of predictions, drawn by `python examples/gallery.py` from `demo/chelsea.jpg`
(and shapes of its own) with {classifier} and, where features count, {features}.
Times are of one call on 2 CPU cores, models loaded.
"""


def describe(method: str) -> str:
    """Describe a method as `vitlib attend` does."""
    return f"{method}: {SUMMARIES[method]}"


def draw_shapes(folder: Path) -> list[Path]:
    """Draw nine images: each shape in each colour."""
    paths = []
    for shape in SHAPES:
        for name, colour in COLOURS.items():
            image = Image.new("RGB", (160, 160), (236, 233, 225))
            pen = ImageDraw.Draw(image)
            if shape == "circle":
                pen.ellipse((35, 35, 125, 125), fill=colour)
            elif shape == "square":
                pen.rectangle((40, 40, 120, 120), fill=colour)
            else:
                pen.polygon([(80, 30), (130, 120), (30, 120)], fill=colour)
            paths.append(folder / f"{name} {shape}.png")
            image.save(paths[-1])
    return paths


def list_pictures(
    vit: vitlib.Predictor, dino: vitlib.Predictor, folder: Path
) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Return captions and drawing functions by file name.

    Args:
        vit: Classifier.
        dino: Model of features.
        folder: Folder for the drawings.
    """
    model, processor = vit.model, vit.image_processor
    pixels = processor(PHOTO)
    keep_size = dino.image_processor.with_image_size("keep", dino.model.config.patch_size)
    patches = keep_size(PHOTO)
    height, width = dino.model.patch_grid(patches)
    patch = (round(height * 0.35), round(width * 0.3))
    best = (vit.classify(PHOTO, top_k=1)[0] or [])[0]
    label = best.label.split(",")[0]

    def draw_overlay(method: str, values: Any) -> Any:
        texts = {"title": describe(method)}
        if method in CLASS_METHODS:
            texts = {"title": f"{best.label} {best.score:.3f}", "subtitle": describe(method)}
        return plots.overlay(PHOTO, values[0], processor=processor, scale=SCALES[method], **texts)

    def draw_neighbours() -> Any:
        files = draw_shapes(folder)
        vectors = dino.embed(files)
        neighbours = nearest(vectors[:1], vectors, 8)[0]
        shown = [files[item.index] for item in neighbours]
        captions = [f"cosine {item.cosine:.3f}" for item in neighbours]
        return plots.contact_sheet(shown, captions, names=[path.name for path in shown])

    def draw_faithfulness() -> Any:
        maps = {
            "relevance": explain.relevance(model, pixels),
            "rollout": explain.attention_rollout(model, pixels),
            "gradient": explain.gradient(model, pixels),
            "random": np.random.default_rng(0).random((1, *model.patch_grid(pixels))),
        }
        results = {name: faithfulness(model, pixels, values) for name, values in maps.items()}
        lines = {
            f"{name} ({result.deletion[0]:.2f})": result.deletion_curve[0]
            for name, result in results.items()
        }
        return plots.curves(results["relevance"].shares, lines, f"probability of {label}")

    return {
        "labels": (
            "Labels, best first: `vitlib classify chelsea.jpg --plot F.png`",
            lambda: plots.labels(PHOTO, vit.classify(PHOTO)[0] or [], title=PHOTO.name),
        ),
        "rollout": (
            "Rollout through all layers: `vitlib attend chelsea.jpg --method rollout --out F.png`",
            lambda: draw_overlay("rollout", explain.attention_rollout(model, pixels)),
        ),
        "relevance": (
            f"Relevance for {label}: `--method relevance`",
            lambda: draw_overlay("relevance", explain.relevance(model, pixels)),
        ),
        "gradient": (
            f"Gradient of {label} by each pixel, smoothed: `--method gradient`",
            lambda: draw_overlay("gradient", explain.gradient(model, pixels)),
        ),
        "occlusion": (
            f"Fall of {label} where a square covers the photo: `--method occlusion`",
            lambda: draw_overlay("occlusion", explain.occlusion(model, pixels)),
        ),
        "heads": (
            "Attention of each head in each layer: `--method heads`",
            lambda: plots.heads(
                explain.head_maps(model, pixels)[0],
                PHOTO,
                processor=processor,
                title=describe("heads"),
            ),
        ),
        "mask": (
            "The foreground, by the class token's attention: `--method mask --image-size keep`",
            lambda: plots.mask(
                PHOTO,
                explain.foreground(dino.model, patches)[0],
                processor=keep_size,
                title=describe("mask"),
                rule="Foreground: the side whose patches have more of the class token's attention.",
            ),
        ),
        "pca": (
            "The patches' features as colours: `--method pca --image-size keep`",
            lambda: plots.patch_pca(
                PHOTO,
                explain.patch_pca(dino.model, patches)[0],
                processor=keep_size,
                title=describe("pca"),
            ),
        ),
        "similarity": (
            f"Similarity to the patch at the cross: `--method similarity --patch "
            f"{patch[0]},{patch[1]} --image-size keep`",
            lambda: plots.similarity(
                PHOTO,
                explain.similarity(dino.model, patches, patch)[0],
                patch,
                processor=keep_size,
                title=describe("similarity"),
            ),
        ),
        "similar": (
            "Drawings most like an orange circle: `vitlib similar QUERY FOLDER --plot F.png`",
            draw_neighbours,
        ),
        "trust": (
            "Faithfulness of a map: the class's probability as its strongest patches are removed "
            "first; lower is better",
            draw_faithfulness,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classifier", default="facebook/deit-tiny-patch16-224")
    parser.add_argument("--features", default="facebook/dinov2-small")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    vit, dino = (vitlib.Predictor.load(source) for source in (options.classifier, options.features))
    names = (Path(source).name for source in (options.classifier, options.features))
    page = [HEAD.format(**dict(zip(("classifier", "features"), names, strict=True)))]
    (options.out / "gallery").mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        pictures = list_pictures(vit, dino, Path(folder))
        new_figure(1, 1)  # loads matplotlib, which would add to the time of the first picture
        for name, (caption, draw) in pictures.items():
            start = time.perf_counter()
            plots.save(draw(), options.out / "gallery" / f"{name}.jpg")
            seconds = time.perf_counter() - start
            page.append(f"{caption} ({seconds:.1f} s)\n\n![{name}](gallery/{name}.jpg)\n")
            print(f"{name}: {seconds:.1f} s")
    (options.out / "gallery.md").write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main()
