"""Make docs/gallery.md and its pictures: every explanation that vitlib can draw.

    python examples/gallery.py [--classifier MODEL] [--features MODEL] [--out docs]

The photo is demo/chelsea.jpg; the drawings are made here. Each picture's time is that of one call
in this process, models and matplotlib loaded.
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


def drawn(folder: Path) -> list[Path]:
    """Draw nine images: each shape in each colour."""
    found = []
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
            found.append(folder / f"{name} {shape}.png")
            image.save(found[-1])
    return found


def pictures(
    vit: vitlib.Predictor, dino: vitlib.Predictor, folder: Path
) -> dict[str, tuple[str, Callable[[], Any]]]:
    """List captions and drawing functions by file name."""
    model, rule = vit.model, vit.image_processor
    pixels = rule(PHOTO)
    keep = dino.image_processor.with_image_size("keep", dino.model.config.patch_size)
    patches = keep(PHOTO)
    h, w = dino.model.patch_grid(patches)
    clicked = (round(h * 0.35), round(w * 0.3))
    best = vit.labels[int(model(pixels).argmax())].split(",")[0]

    def over(values: Any) -> Any:
        return plots.overlay(PHOTO, values[0], processor=rule)

    def neighbours() -> Any:
        files = drawn(folder)
        vectors = dino.embed(files)
        found = nearest(vectors[:1], vectors, 8)[0]
        names = [f"{n.cosine:.2f}  {files[n.index].stem}" for n in found]
        return plots.contact_sheet([files[n.index] for n in found], names)

    def trusted() -> Any:
        maps = {
            "relevance": explain.relevance(model, pixels),
            "rollout": explain.attention_rollout(model, pixels),
            "gradient": explain.gradient(model, pixels),
            "random": np.random.default_rng(0).random((1, *model.patch_grid(pixels))),
        }
        found = {name: faithfulness(model, pixels, values) for name, values in maps.items()}
        lines = {f"{n} ({f.deletion[0]:.2f})": f.deletion_curve[0] for n, f in found.items()}
        return plots.curves(next(iter(found.values())).shares, lines, f"probability of {best}")

    return {
        "labels": (
            "Labels, best first: `vitlib classify chelsea.jpg --plot F.png`",
            lambda: plots.labels(PHOTO, vit.classify(PHOTO)[0] or []),
        ),
        "rollout": (
            "Rollout through all layers: `vitlib attend chelsea.jpg --method rollout --out F.png`",
            lambda: over(explain.attention_rollout(model, pixels)),
        ),
        "relevance": (
            f"Relevance for {best}: `--method relevance`",
            lambda: over(explain.relevance(model, pixels)),
        ),
        "gradient": (
            f"Gradient of {best} by each pixel, smoothed: `--method gradient`",
            lambda: over(explain.gradient(model, pixels)),
        ),
        "occlusion": (
            f"Fall of {best} where a square covers the photo: `--method occlusion`",
            lambda: over(explain.occlusion(model, pixels)),
        ),
        "heads": (
            "Attention of each head in each layer: `--method heads`",
            lambda: plots.heads(explain.head_maps(model, pixels)[0], PHOTO),
        ),
        "mask": (
            "The foreground, by the class token's attention: `--method mask --image-size keep`",
            lambda: plots.mask(PHOTO, explain.foreground(dino.model, patches)[0], processor=keep),
        ),
        "pca": (
            "The patches' features as colours: `--method pca --image-size keep`",
            lambda: plots.patch_pca(
                PHOTO, explain.patch_pca(dino.model, patches)[0], processor=keep
            ),
        ),
        "similarity": (
            f"Similarity to the patch at the cross: `--method similarity --patch "
            f"{clicked[0]},{clicked[1]} --image-size keep`",
            lambda: plots.similarity(
                PHOTO, explain.similarity(dino.model, patches, clicked)[0], clicked, processor=keep
            ),
        ),
        "similar": (
            "Drawings most like an orange circle: `vitlib similar QUERY FOLDER --plot F.png`",
            neighbours,
        ),
        "trust": (
            "Faithfulness of a map: the class's probability as its strongest patches are removed "
            "out first; lower is better",
            trusted,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classifier", default="facebook/deit-tiny-patch16-224")
    parser.add_argument("--features", default="facebook/dinov2-small")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    vit, dino = (vitlib.Predictor.load(m) for m in (options.classifier, options.features))
    names = (Path(m).name for m in (options.classifier, options.features))
    page = [HEAD.format(**dict(zip(("classifier", "features"), names, strict=True)))]
    (options.out / "gallery").mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        found = pictures(vit, dino, Path(folder))
        new_figure(1, 1)  # matplotlib is loaded here, and not in the first one's time
        for name, (words, draw) in found.items():
            start = time.perf_counter()
            plots.save(draw(), options.out / "gallery" / f"{name}.jpg")
            took = time.perf_counter() - start
            page.append(f"{words} ({took:.1f} s)\n\n![{name}](gallery/{name}.jpg)\n")
            print(f"{name}: {took:.1f} s")
    (options.out / "gallery.md").write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main()
