"""The verb `vitlib attend`: draw an explanation of a photo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitlib.cli.options import ModelOptions, model_options
from vitlib.cli.photos import Photos, expand_photos, list_inputs, report_errors
from vitlib.cli.predictors import open_predictor
from vitlib.cli.printing import echo, echo_json, show_life
from vitlib.cli.verb import Verb
from vitlib.errors import ImageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vitlib.image.processor import ImageProcessor
    from vitlib.predict.predictor import Predictor
    from vitlib.vit import ViT

METHODS = (
    "rollout", "heads", "relevance", "gradient", "occlusion", "pca", "similarity", "mask"
)  # fmt: skip
CLASS_METHODS = ("relevance", "gradient", "occlusion")
LAYER_METHODS = ("heads", "pca", "similarity", "mask")

SUMMARIES = {  # in pictures
    "rollout": "attention through all layers",
    "heads": "attention of heads",
    "relevance": "attention by the class's gradient",
    "gradient": "the class's gradient by pixel",
    "occlusion": "fall of the score under a square",
    "pca": "principal components of the patches",
    "similarity": "cosine of the patches' features",
    "mask": "foreground and background",
}
SCALES = {
    "rollout": "share of the attention",
    "heads": "attention",
    "relevance": "relevance",
    "gradient": "size of the gradient",
    "occlusion": "fall of the score",
}


@dataclass(frozen=True)
class AttendOptions:
    """Values of the verb's own options.

    Attributes:
        method: one of METHODS.
        layers: numbers of blocks; empty for the default.
        heads: numbers of heads; empty for all.
        class_: label or number of a class; None for the best.
        patch: (row, column) of a patch; None for the class token.
        batch_size: images per forward pass.
    """

    method: str
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    class_: str | None
    patch: tuple[int, int] | None
    batch_size: int

    def check(self) -> None:
        """Check that the options fit the method.

        Raises:
            UsageError: for an option that the method does not use.
        """
        for option, is_set, methods in (
            ("--class", self.class_ is not None, CLASS_METHODS),
            ("--layer", bool(self.layers), LAYER_METHODS),
            ("--head", bool(self.heads), ("heads",)),
            ("--patch", self.patch is not None, ("similarity",)),
        ):
            if is_set and self.method not in methods:
                raise click.UsageError(
                    f"{option} is for {', '.join(methods)}: leave it out for {self.method}"
                )
        if len(self.layers) > 1 and self.method != "heads":
            raise click.UsageError(f"several --layer are for heads: give one for {self.method}")

    def select_heads(self, count: int) -> list[int]:
        """Select heads of a layer.

        Args:
            count: heads of the layer.

        Returns:
            The numbers of the heads to draw.

        Raises:
            ConfigError: for a number beyond the count.
        """
        from vitlib.errors import ConfigError

        if any(not -count <= head < count for head in self.heads):
            raise ConfigError(
                f"--head {list(self.heads)}: expected numbers of heads, 0 to {count - 1}, or "
                f"from the end, -1 to {-count}"
            )
        return list(self.heads) or list(range(count))


class Patch(click.ParamType):  # type: ignore[type-arg]
    """Type of an option of two whole numbers with a comma between them."""

    name = "ROW,COLUMN"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        """Convert text such as 3,7.

        Args:
            value: text of the command line.
            param: the option.
            ctx: context of the command.

        Returns:
            (row, column).
        """
        try:
            row, column = (int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r}: expected two whole numbers, such as 3,7", param, ctx)
        return row, column


@click.command(
    cls=Verb,
    examples=(
        "vitlib attend -m demo photo.jpg -o map.png",
        "vitlib attend -m mine photo.jpg --method relevance --class cat -o cat.png",
    ),
)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--method", type=click.Choice(METHODS), default="rollout", show_default=True, metavar="METHOD",
    help="Explanation to draw, of those above.",
)  # fmt: skip
@click.option(
    "--out",
    "-o",
    required=True,
    metavar="PICTURE|FOLDER",
    type=click.Path(path_type=Path),
    help="Picture to write: .png, .svg, .pdf, .jpg or .webp. For several photos a new or empty "
    "folder, which gets NAME.png of each.",
)
@click.option(
    "--layer", "layers", type=int, multiple=True, metavar="N",
    help="Block from 0, or -1 for the last; several for heads. Default: the last; heads draws all.",
)  # fmt: skip
@click.option(
    "--head",
    "heads",
    type=int,
    multiple=True,
    metavar="N",
    help="Heads to draw with --method heads, from 0. Default: all.",
)
@click.option(
    "--class",
    "class_",
    metavar="LABEL",
    help="Label or number of the class to explain. Default: the best.",
)
@click.option(
    "--patch",
    type=Patch(),
    help="Patch to compare with in similarity, from 0,0. Default: the class token.",
)
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the numbers of the map.")
def attend(
    images: tuple[str, ...],
    method: str,
    out: Path,
    layers: tuple[int, ...],
    heads: tuple[int, ...],
    class_: str | None,
    patch: tuple[int, int] | None,
    options: ModelOptions,
    as_json: bool,
) -> None:
    """Draw which parts of IMAGE a model uses.

    IMAGE is a file, a folder, a pattern in quotes, or - for stdin.

    \b
    rollout     attention through all layers
    heads       each head of each layer
    relevance   attention by the gradient of --class
    gradient    gradient of --class by each pixel, smoothed
    occlusion   fall of --class where a square covers the photo
    pca         principal components of the patches' features as colours
    similarity  cosine of the patches' features to the class token's, or --patch's
    mask        the foreground, by the class token's attention and the patches' features
    """  # noqa: D301 - click needs the character of \b, after which it wraps no lines
    choice = AttendOptions(method, layers, heads, class_, patch, options.batch_size)
    choice.check()
    from vitlib.errors import ConfigError
    from vitlib.vit import ViT

    photos = expand_photos(images)
    targets = _list_targets(out, photos, options)
    predictor = open_predictor(options)
    net = predictor.model
    if not isinstance(net, ViT):
        raise ConfigError(
            f"{options.model!r} is an optimized model or an exported file, which has no attention "
            "maps: name the checkpoint it was made from"
        )
    rows = []
    with report_errors() as errors:
        for index, target in enumerate(targets):
            try:
                with show_life(f"computing {method} of {photos.names[index]}"):
                    row, grid = _attend(photos.images[index], target, predictor, net, choice)
            except ImageError as error:
                errors.note(index, error)
                continue
            rows.append({"image": photos.names[index]} | row | {"map": grid})
            if not as_json:
                label = f" of {row['label']} ({row['score']:.3f})" if "label" in row else ""
                height, width = row["grid"]
                echo(f"{target}: {method}{label}, {height}x{width} patches")
        if as_json:
            echo_json(rows if len(photos) > 1 or not rows else rows[0], indent=None)


def _list_targets(out: Path, photos: Photos, options: ModelOptions) -> list[Path]:
    """List the picture of each photo, and refuse those that cannot be written."""
    from vitlib import plots
    from vitlib.system.atomic import refuse_input

    targets = [out]
    if len(photos) > 1:
        if out.suffix.lower() in plots.FORMATS or out.is_file():
            raise click.UsageError(f"--out {out}: expected a folder for {len(photos)} photos")
        if out.is_dir() and any(out.iterdir()):
            raise click.UsageError(f"--out {out} is not empty: name a new folder")
        stems = [Path(name).stem for name in photos.names]
        numbers = [str(i) * (stems.count(stem) > 1) for i, stem in enumerate(stems)]
        targets = [
            out / f"{stem}{n and '-' + n}.png" for stem, n in zip(stems, numbers, strict=True)
        ]
    inputs = list_inputs(photos.names, options)
    for target in targets:
        refuse_input(plots.check_figure_path(target), inputs)
    return targets


def _attend(
    photo: str | bytes, target: Path, predictor: Predictor, net: ViT, choice: AttendOptions
) -> tuple[dict[str, Any], Any]:
    """Draw a photo's explanation, and return what it is and its map as lists."""
    from vitlib import plots

    pixels = predictor.image_processor(photo).to(net.device)
    if choice.method in CLASS_METHODS:
        grid, scored = _explain_class(net, predictor.labels, pixels, choice)
    else:
        grid, scored = _explain_photo(net, pixels, choice), {}
    plots.save(_draw(photo, grid, choice, net, predictor.image_processor, scored), target)
    about = {"method": choice.method, "out": str(target), "grid": list(net.patch_grid(pixels))}
    return about | scored, grid.tolist()


def _explain_class(
    net: ViT, labels: tuple[str, ...], pixels: Any, choice: AttendOptions
) -> tuple[Any, dict[str, Any]]:
    """Compute the map of the chosen class, or the best; and its label, number and score."""
    import torch

    from vitlib import explain
    from vitlib.explain.attribution import check_best

    with torch.inference_mode():
        scores = explain.probabilities(net, pixels)[0]
    label = choice.class_
    if label is None:
        check_best(net)
    index = int(scores.argmax()) if label is None else explain.class_named(labels, label)
    if choice.method == "occlusion":
        grid = explain.occlusion(net, pixels, index, batch_size=choice.batch_size)
    else:
        method = explain.relevance if choice.method == "relevance" else explain.gradient
        grid = method(net, pixels, index)
    return grid[0], {"label": labels[index], "class": index, "score": scores[index].item()}


def _explain_photo(net: ViT, pixels: Any, choice: AttendOptions) -> Any:
    """Compute the map of a method without a class, (h, w); of heads (L, heads, h, w)."""
    from vitlib import explain

    layer = choice.layers[0] if choice.layers else -1
    if choice.method == "heads":
        maps = explain.head_maps(net, pixels, list(choice.layers) or None)[0]
        return maps[:, choice.select_heads(maps.shape[1])]
    if choice.method == "pca":
        return explain.patch_pca(net, pixels, layer=layer)[0]
    if choice.method == "similarity":
        return explain.similarity(net, pixels, choice.patch, layer)[0]
    if choice.method == "mask":
        return explain.foreground(net, pixels, layer=layer)[0]
    return explain.attention_rollout(net, pixels)[0]


def _draw(
    image: str | bytes,
    grid: Any,
    choice: AttendOptions,
    net: ViT,
    processor: ImageProcessor,
    scored: dict[str, Any],
) -> Figure:
    """Draw the map in the form of its method, with the class, its score and the method."""
    from vitlib import plots

    method, about = choice.method, _describe(choice, net)
    common: dict[str, Any] = {"processor": processor, "patch_size": net.config.patch_size}
    if method == "heads" and grid.shape[:2] != (1, 1):
        depth, count = len(net.blocks), net.config.num_heads
        return plots.heads(
            grid,
            image,
            layer_numbers=sorted({i % depth for i in choice.layers}) or None,
            head_numbers=[i % count for i in choice.heads] or None,
            title=about,
            **common,
        )
    common["title"] = about
    if scored:
        common |= {"title": f"{scored['label']} {scored['score']:.3f}", "subtitle": about}
    if method == "pca":
        return plots.patch_pca(image, grid, **common)
    if method == "similarity":
        return plots.similarity(image, grid, choice.patch, **common)
    if method == "mask":
        rule = "Foreground: the side whose patches have more of the class token's attention."
        return plots.mask(image, grid, rule=rule, **common)
    # Has a number for each pixel, not for each patch.
    if method == "gradient":
        del common["patch_size"]
    heat = grid[0, 0] if method == "heads" else grid
    return plots.overlay(image, heat, scale=SCALES[method], **common)


def _describe(choice: AttendOptions, net: ViT) -> str:
    """Describe the method, and the layers and heads that it draws."""
    text = f"{choice.method}: {SUMMARIES[choice.method]}"
    numbers = choice.layers or (-1,) * (choice.method in LAYER_METHODS[1:])
    for name, chosen, count in (
        ("layer", numbers, len(net.blocks)), ("head", choice.heads, net.config.num_heads),
    ):  # fmt: skip
        if chosen:
            text += f"; {name} {', '.join(str(i) for i in sorted({i % count for i in chosen}))}"
    return text
