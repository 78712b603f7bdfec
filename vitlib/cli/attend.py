"""vitlib attend"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitlib.cli.options import ModelOptions, inputs_of, model_options, open_predictor, sized
from vitlib.cli.printing import echo, echo_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vitlib.image.processor import ImageProcessor
    from vitlib.vit import ViT

METHODS = (
    "rollout", "heads", "relevance", "gradient", "occlusion", "pca", "similarity", "mask"
)  # fmt: skip
OF_A_CLASS = ("relevance", "gradient", "occlusion")
OF_A_LAYER = ("heads", "pca", "similarity", "mask")


@dataclass(frozen=True)
class Wish:
    """What the options ask for."""

    method: str
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    class_: str | None
    patch: tuple[int, int] | None
    batch_size: int

    def check(self) -> None:
        """Raises UsageError for an option that the method has no use for."""
        for option, given, methods in (
            ("--class", self.class_ is not None, OF_A_CLASS),
            ("--layer", bool(self.layers), OF_A_LAYER),
            ("--head", bool(self.heads), ("heads",)),
            ("--patch", self.patch is not None, ("similarity",)),
        ):
            if given and self.method not in methods:
                raise click.UsageError(
                    f"{option} is for {', '.join(methods)}: leave it out for {self.method}"
                )
        if len(self.layers) > 1 and self.method != "heads":
            raise click.UsageError(f"several --layer are for heads: give one for {self.method}")

    def heads_of(self, count: int) -> list[int]:
        """Which of so many heads. Raises ConfigError for one that is not there."""
        from vitlib.errors import ConfigError

        if any(not -count <= head < count for head in self.heads):
            raise ConfigError(
                f"--head {list(self.heads)}: expected numbers of heads, 0 to {count - 1}, or "
                f"from the end, -1 to {-count}"
            )
        return list(self.heads) or list(range(count))


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
    asked: ModelOptions,
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
    wish = Wish(method, layers, heads, class_, patch, asked.batch_size)
    wish.check()
    from vitlib import plots
    from vitlib.errors import ConfigError
    from vitlib.system.atomic import refuse_input
    from vitlib.vit import ViT

    refuse_input(plots.named(out), inputs_of([image], asked))
    predictor = open_predictor(asked)
    net = predictor.model
    if not isinstance(net, ViT):
        raise ConfigError(
            f"{asked.model!r} is an optimized model, which keeps no attention to look at: name the "
            "checkpoint it was made from"
        )
    if image_size is not None:
        sized(predictor, image_size)
    pixels = predictor.image_processor(image).to(next(net.parameters()).device)
    if method in OF_A_CLASS:
        grid, said = of_a_class(net, predictor.labels, pixels, wish)
    else:
        grid, said = of_the_photo(net, pixels, wish), {}
    plots.save(drawn(image, grid, wish, net, predictor.image_processor), out)
    patches = list(net.patch_grid(pixels))
    if as_json:
        about = {"image": image, "method": method, "out": str(out), "grid": patches}
        echo_json(about | said | {"map": grid.tolist()}, indent=None)
        return
    of = f" of {said['label']} ({said['score']:.3f})" if said else ""
    echo(f"{out}: {method}{of}, {patches[0]}x{patches[1]} patches")


def of_a_class(
    net: ViT, labels: tuple[str, ...], pixels: Any, wish: Wish
) -> tuple[Any, dict[str, Any]]:
    """The map of the class asked for, or the best; and its label, number and score."""
    import torch

    from vitlib import explain
    from vitlib.explain.attribution import check_best

    with torch.inference_mode():
        scores = explain.probabilities(net, pixels)[0]
    wanted = wish.class_
    if wanted is None:
        check_best(net)
    index = int(scores.argmax()) if wanted is None else explain.class_named(labels, wanted)
    if wish.method == "occlusion":
        found = explain.occlusion(net, pixels, index, batch_size=wish.batch_size)
    else:
        found = (explain.relevance if wish.method == "relevance" else explain.gradient)(
            net, pixels, index
        )
    return found[0], {"label": labels[index], "class": index, "score": scores[index].item()}


def of_the_photo(net: ViT, pixels: Any, wish: Wish) -> Any:
    """The map of a method that asks for no class; of heads (L, heads, h, w)."""
    from vitlib import explain

    layer = wish.layers[0] if wish.layers else -1
    if wish.method == "heads":
        found = explain.head_maps(net, pixels, list(wish.layers) or None)[0]
        return found[:, wish.heads_of(found.shape[1])]
    if wish.method == "pca":
        return explain.patch_pca(net, pixels, layer=layer)[0]
    if wish.method == "similarity":
        return explain.similarity(net, pixels, wish.patch, layer)[0]
    if wish.method == "mask":
        return explain.foreground(net, pixels, layer=layer)[0]
    return explain.attention_rollout(net, pixels)[0]


def drawn(image: str, grid: Any, wish: Wish, net: ViT, rule: ImageProcessor) -> Figure:
    """The map as its method is best seen."""
    from vitlib import plots

    patch = net.config.patch_size
    if wish.method == "heads" and grid.shape[:2] != (1, 1):
        depth, count = len(net.blocks), net.config.num_heads
        return plots.heads(
            grid,
            image,
            layer_numbers=sorted({i % depth for i in wish.layers}) or None,
            head_numbers=[i % count for i in wish.heads] or None,
            processor=rule,
            patch_size=patch,
        )
    if wish.method == "pca":
        return plots.patch_pca(image, grid, processor=rule, patch_size=patch)
    if wish.method == "similarity":
        return plots.similarity(image, grid, wish.patch, processor=rule, patch_size=patch)
    if wish.method == "mask":
        return plots.mask(image, grid, processor=rule, patch_size=patch)
    if wish.method == "gradient":  # a number a pixel
        return plots.overlay(image, grid, processor=rule)
    one = grid[0, 0] if wish.method == "heads" else grid
    return plots.overlay(image, one, processor=rule, patch_size=patch)
