"""vitlib attend"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitlib.cli.options import model_options, open_predictor, printable, sized

if TYPE_CHECKING:
    from vitlib.predict import Predictor
    from vitlib.vit import ViT

METHODS = (
    "rollout", "heads", "relevance", "gradient", "occlusion", "pca", "similarity", "mask"
)  # fmt: skip
OF_A_CLASS = ("relevance", "gradient", "occlusion")
OF_A_LAYER = ("heads", "pca", "similarity", "mask")


class Patch(click.ParamType):  # type: ignore[type-arg]
    """Two whole numbers with a comma between them."""

    name = "ROW,COLUMN"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        """As click asks."""
        try:
            row, column = (int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r}: expected two whole numbers, such as 3,7", param, ctx)
        return row, column


@click.command()
@click.argument("image")
@click.option(
    "--method", type=click.Choice(METHODS), default="rollout", show_default=True,
    help="What to show: see below.",
)  # fmt: skip
@click.option(
    "--out", "-o", required=True, type=click.Path(dir_okay=False, path_type=Path), help="F.png"
)
@click.option(
    "--layer", "layers", type=int, multiple=True,
    help="Blocks from 0, or -1 for the last; several for heads. Default: heads all, else the last.",
)  # fmt: skip
@click.option("--head", "heads", type=int, multiple=True, help="Of heads, only these; from 0.")
@click.option("--class", "class_", metavar="LABEL", help="Label or number. Default: the best.")
@click.option("--patch", type=Patch(), help="Of similarity: compare with this one, from 0,0.")
@click.option(
    "--image-size", metavar="SIZE",
    help="Pixels of a side, or HxW, or keep: the photo's own shape. Default: the checkpoint's.",
)  # fmt: skip
@model_options
@click.option("--json", "as_json", is_flag=True, help="For programs: with the map's numbers.")
def attend(
    image: str,
    method: str,
    out: Path,
    layers: tuple[int, ...],
    heads: tuple[int, ...],
    class_: str | None,
    patch: tuple[int, int] | None,
    image_size: str | None,
    model: str,
    source_layout: str | None,
    profile: str | None,
    num_heads: int | None,
    revision: str | None,
    local_files_only: bool,
    device: str | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Draw what a model looks at in IMAGE.

    \b
    rollout     attention through all layers
    heads       each head of each layer
    relevance   attention by the gradient of --class
    gradient    how fast --class changes with each pixel, smoothed
    occlusion   by how much --class falls where a square covers the photo
    pca         the patches' features as colours
    similarity  the patches' features beside the class token's, or --patch's
    mask        the foreground, by the class token's attention and the patches' features
    """
    _fits(method, layers, heads, class_, patch)
    from vitlib.errors import ConfigError
    from vitlib.vit import ViT

    predictor = open_predictor(
        model, revision, local_files_only, device, source_layout, profile, num_heads
    )
    if not isinstance(predictor.model, ViT):
        raise ConfigError(
            f"{model!r} is an optimized model, which keeps no attention to look at: name the "
            "checkpoint it was made from"
        )
    if image_size is not None:
        sized(predictor, image_size)
    pixels = predictor.image_processor(image).to(predictor.model.norm.weight.device)
    figure, said = _drawn(
        predictor.model,
        predictor,
        image,
        pixels,
        method,
        list(layers),
        list(heads),
        class_,
        patch,
        batch_size,
    )
    from vitlib import plots

    plots.save(figure, out)
    grid = list(predictor.model.patch_grid(pixels))
    if as_json:
        said["map"] = said["map"].tolist()
        about = {"image": image, "method": method, "out": str(out), "grid": grid}
        click.echo(json.dumps(about | said, ensure_ascii=False))
        return
    of = f" of {printable(said['label'])} ({said['score']:.3f})" if "label" in said else ""
    click.echo(f"{out}: {method}{of}, {grid[0]}x{grid[1]} patches")


def _fits(
    method: str,
    layers: tuple[int, ...],
    heads: tuple[int, ...],
    class_: str | None,
    patch: tuple[int, int] | None,
) -> None:
    """Raises UsageError for an option that the method has no use for."""
    if class_ is not None and method not in OF_A_CLASS:
        raise click.UsageError(f"--class is for {', '.join(OF_A_CLASS)}: leave it out for {method}")
    if layers and method not in OF_A_LAYER:
        raise click.UsageError(f"--layer is for {', '.join(OF_A_LAYER)}: leave it out for {method}")
    if len(layers) > 1 and method != "heads":
        raise click.UsageError(f"several --layer are for heads: give one for {method}")
    if heads and method != "heads":
        raise click.UsageError(f"--head is for heads: leave it out for {method}")
    if patch is not None and method != "similarity":
        raise click.UsageError(f"--patch is for similarity: leave it out for {method}")


def _drawn(
    net: ViT,
    predictor: Predictor,
    image: str,
    pixels: Any,
    method: str,
    layers: list[int],
    heads: list[int],
    class_: str | None,
    patch: tuple[int, int] | None,
    batch_size: int,
) -> tuple[Any, dict[str, Any]]:
    """The figure, and what there is to say of it: the map, and of a class its label and score."""
    from vitlib import explain, plots

    rule = predictor.image_processor
    layer = layers[0] if layers else -1
    if method == "heads":
        found = explain.head_maps(net, pixels, layers or None)[0]
        found = found[:, _heads(heads, found.shape[1])]
        if found.shape[:2] == (1, 1):
            return plots.overlay(image, found[0, 0], processor=rule), {"map": found}
        return plots.heads(found, image), {"map": found}
    if method == "pca":
        colours = explain.patch_pca(net, pixels, layer=layer)[0]
        return plots.patch_pca(image, colours, processor=rule), {"map": colours}
    if method == "similarity":
        cosines = explain.similarity(net, pixels, patch, layer)[0]
        return plots.similarity(image, cosines, patch, processor=rule), {"map": cosines}
    if method == "mask":
        kept = explain.foreground(net, pixels, layer=layer)[0]
        return plots.mask(image, kept, processor=rule), {"map": kept}
    if method == "rollout":
        reached = explain.attention_rollout(net, pixels)[0]
        return plots.overlay(image, reached, processor=rule), {"map": reached}
    class_index, said = _class(net, predictor.labels, pixels, class_)
    if method == "relevance":
        grid = explain.relevance(net, pixels, class_index)[0]
    elif method == "gradient":
        grid = explain.gradient(net, pixels, class_index)[0]
    else:
        grid = explain.occlusion(net, pixels, class_index, batch_size=batch_size)[0]
    return plots.overlay(image, grid, processor=rule), {**said, "map": grid}


def _heads(asked: list[int], count: int) -> list[int]:
    from vitlib.errors import ConfigError

    if any(not -count <= head < count for head in asked):
        raise ConfigError(f"--head {asked}: expected numbers of heads, 0 to {count - 1}")
    return asked or list(range(count))


def _class(
    net: ViT, labels: tuple[str, ...], pixels: Any, name: str | None
) -> tuple[int, dict[str, Any]]:
    """The class asked for, or the best, with its label and score."""
    import torch

    from vitlib.explain import class_named
    from vitlib.explain.of_model import classes_of, probability

    asked = None if name is None else class_named(labels, name)
    with torch.no_grad():
        chosen = classes_of(net, pixels, asked)[0]
        score = probability(net, pixels, chosen)[0].item()
    index = int(chosen)
    return index, {"label": labels[index], "class": index, "score": score}
