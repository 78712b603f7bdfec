"""Published models that are run in another way than their tensors or their library say.

A weights file of a pathology model does not say that its authors join the class token with the mean
of the patches, nor how they normalise a tile. `architecture="paige-ai/Virchow2"` states both: a row
here has the pool and the transform of the authors, with the page that gives them. The tensors and
what files state are still read and checked as those of any checkpoint, and files take precedence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.infer import Shape
from vitlib.checkpoint.layouts.timm_models import normalize_name
from vitlib.errors import CheckpointError, ConfigError
from vitlib.image.configs import Fields
from vitlib.image.configs.bands import band_fields
from vitlib.image.configs.transform import (
    BICUBIC,
    BILINEAR,
    CLIP_STATS,
    CROP_PCT,
    HALF_STATS,
    IMAGENET_STATS,
    EvalTransform,
    crop,
    squash,
    transform_fields,
)

_HUB = "https://huggingface.co/"
_GITHUB = "https://github.com/"
_BIOPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
_HIBOU = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))
_LUNIT = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))
_FMOW = (
    (0.4182007312774658, 0.4214799106121063, 0.3991275727748871),
    (0.28774282336235046, 0.27541765570640564, 0.2764017581939697),
)
_RGB = "red, green, blue"
# Of reflectance times 10000, B02 to B07.
_HLS = "blue, green, red, narrow NIR, SWIR 1, SWIR 2"
_VISIBLE_1 = (775.2290211032589, 1080.992780391705, 1228.5855250417867)
_VISIBLE_STD_1 = (1281.526139861424, 1270.0297974547493, 1399.4802505642526)
_PRITHVI_1 = (
    (*_VISIBLE_1, 2497.2022620507532, 2204.2139147975554, 1610.8324823273745),
    (*_VISIBLE_STD_1, 1368.3446143747644, 1291.6764008585435, 1154.505683480695),
)
_PRITHVI_2 = (
    (1087.0, 1342.0, 1433.0, 2734.0, 1958.0, 1363.0),
    (2248.0, 2179.0, 2178.0, 1850.0, 1242.0, 1049.0),
)
_TILES = "its authors give it tiles of 224x224 pixels, and state no resize of other sizes"

_CONCH = (
    "CONCH's own embedding comes from an attention pool that vitlib does not compute: the output "
    "is the class token of its trunk"
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The use of a published model by its authors.

    Attributes:
        page: URL of the page that states pool, mean, std and resize.
        pool: As in ViTConfig; None: the authors state none.
        transform: From an image to pixels; None: the authors' own files state it.
        bands: Mean and std of bands that are normalised as they are in the file, and not resized;
            None for photos.
        config_name: The architecture or model_type in the config.json of the model's folder.
        bare_type: model_type of a file of transformers without a config; empty: config_name.
        row: The name in timm_models.csv by which a file without a config is read; None: its
            tensors alone decide.
        num_heads: Number of heads, if no table gives it for these tensors.
        note: What differs from the authors' own use, for the log of `load`.
    """

    page: str
    pool: str | None = "cls"
    transform: EvalTransform | None = None
    bands: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    config_name: str = ""
    bare_type: str = ""
    row: str | None = None
    num_heads: int | None = None
    note: str = ""

    def build_fields(self, image_size: tuple[int, int]) -> Fields | None:
        """Return the fields of ImageProcessor.

        Args:
            image_size: Pixels (height, width) of the model.

        Returns:
            All fields; None if the authors' own files state them.
        """
        if self.bands is not None:
            return band_fields(*self.bands)
        return None if self.transform is None else transform_fields(self.transform, image_size)


def _tiles(transform: EvalTransform, size: int = 224) -> EvalTransform:
    """Return a transform to one size, whatever the positions of the file are for."""
    return replace(transform, image_size=size)


@cache
def list_recipes() -> Mapping[str, Recipe]:
    """Return every recipe by the id of the model."""
    return {**_list_pathology(), **_list_timm_pathology(), **_list_earth()}


def _list_timm_pathology() -> dict[str, Recipe]:
    """Return the models of pathology whose folders have a config.json of timm."""
    imagenet = _tiles(crop(1.0, BICUBIC, IMAGENET_STATS))
    card = _tiles(crop(1.0, BILINEAR, IMAGENET_STATS))
    larger = _tiles(crop(CROP_PCT, BICUBIC, IMAGENET_STATS))
    bioptimus = _tiles(crop(1.0, BICUBIC, _BIOPTIMUS))
    uni, both = f"{_GITHUB}mahmoodlab/UNI", "cls+mean"
    giant, huge = "vit_giant_patch14_reg4_dinov2", "vit_huge_patch14_224"
    base, gigapath = "vit_base_patch14_reg4_dinov2", "prov-gigapath/prov-gigapath"
    spec = "https://docs.bioptimus.com/sdk-reference/models/types"
    rows: dict[str, tuple[str, str, EvalTransform, str]] = {
        "MahmoodLab/UNI": (uni, "cls", card, "vit_large_patch16_224"),
        "MahmoodLab/UNI2-h": (uni, "cls", card, "vit_giant_patch14_224"),
        "paige-ai/Virchow": (f"{_HUB}paige-ai/Virchow", both, imagenet, huge),
        "paige-ai/Virchow2": (f"{_HUB}paige-ai/Virchow2", both, imagenet, huge),
        gigapath: (f"{_GITHUB}{gigapath}", "cls", larger, "vit_giant_patch14_dinov2"),
        "bioptimus/H-optimus-0": (f"{_HUB}bioptimus/H-optimus-0", "cls", bioptimus, giant),
        "bioptimus/H-optimus-1": (f"{_HUB}bioptimus/H-optimus-1", "cls", bioptimus, giant),
        "bioptimus/H0-mini": (spec, both, bioptimus, base),
    }
    return {
        name: Recipe(
            page=page,
            pool=pool,
            transform=transform,
            config_name=config_name,
            row=giant if config_name == giant else name,
            note=_TILES if transform is bioptimus else "",
        )
        for name, (page, pool, transform, config_name) in rows.items()
    }


def _list_pathology() -> dict[str, Recipe]:
    """Return the other models of pathology: of transformers, and single files."""
    kaiko = f"{_GITHUB}kaiko-ai/towards_large_pathology_fms"
    lunit = f"{_GITHUB}lunit-io/benchmark-ssl-pathology"
    half = _tiles(crop(1.0, BILINEAR, HALF_STATS))
    recipes = {
        f"kaiko-ai/{name}": Recipe(page=kaiko, transform=half, config_name=row, row=row)
        for name, row in {
            "vits16": "vit_small_patch16_224",
            "vits8": "vit_small_patch8_224",
            "vitb16": "vit_base_patch16_224",
            "vitb8": "vit_base_patch8_224",
            "vitl14": "vit_large_patch14_reg4_dinov2",
        }.items()
    }
    recipes |= {
        f"lunit-io/dino_vit_small_patch{size}": Recipe(
            page=lunit,
            transform=_tiles(crop(1.0, BICUBIC, _LUNIT)),
            config_name=f"vit_small_patch{size}_224",
            row=f"vit_small_patch{size}_224",
            note=_TILES,
        )
        for size in (8, 16)
    }
    return (
        recipes
        | _list_hibou()
        | {
            "kaiko-ai/midnight": Recipe(
                page=f"{_HUB}kaiko-ai/midnight",
                pool="cls+mean",
                transform=half,
                config_name="dinov2",
            ),
            "owkin/phikon": Recipe(page=f"{_HUB}owkin/phikon", config_name="vit"),
            "owkin/phikon-v2": Recipe(page=f"{_HUB}owkin/phikon-v2", config_name="dinov2"),
            "majiabo/GPFM": Recipe(
                page=f"{_GITHUB}birkhoffkiki/GPFM",
                transform=_tiles(squash(BICUBIC, IMAGENET_STATS)),
                row="vit_large_patch14_dinov2",
            ),
            "MahmoodLab/CONCH": Recipe(
                page=f"{_GITHUB}mahmoodlab/CONCH",
                transform=_tiles(crop(1.0, BICUBIC, CLIP_STATS), 448),
                row="vit_base_patch16_224",
                note=_CONCH,
            ),
        }
    )


def _list_hibou() -> dict[str, Recipe]:
    """Return the two sizes of Hibou, whose config.json has the model_type of another class."""
    return {
        f"histai/hibou-{size}": Recipe(
            page=f"{_GITHUB}HistAI/hibou",
            transform=_tiles(squash(BICUBIC, _HIBOU)),
            config_name="dinov2",
            bare_type="dinov2_with_registers",
            num_heads=num_heads,
        )
        for size, num_heads in {"b": 12, "L": 16}.items()
    }


def _list_earth() -> dict[str, Recipe]:
    """Return the models of earth observation."""
    prithvi = {
        "1.0-100M": ("prithvi_eo_v1_100", _PRITHVI_1),
        "2.0-tiny-TL": ("prithvi_eo_v2_tiny_tl", _PRITHVI_2),
        "2.0-100M-TL": ("prithvi_eo_v2_100_tl", _PRITHVI_2),
        "2.0-300M": ("prithvi_eo_v2_300", _PRITHVI_2),
        "2.0-300M-TL": ("prithvi_eo_v2_300_tl", _PRITHVI_2),
        "2.0-600M": ("prithvi_eo_v2_600", _PRITHVI_2),
        "2.0-600M-TL": ("prithvi_eo_v2_600_tl", _PRITHVI_2),
    }
    recipes = {
        f"ibm-nasa-geospatial/Prithvi-EO-{name}": Recipe(
            page=f"{_HUB}ibm-nasa-geospatial/Prithvi-EO-{name}",
            pool=None,
            bands=bands,
            config_name=config_name,
        )
        for name, (config_name, bands) in prithvi.items()
    }
    recipes["sustainlab-group/SatMAE"] = Recipe(
        page=f"{_GITHUB}sustainlab-group/SatMAE",
        pool=None,
        transform=_tiles(crop(CROP_PCT, BICUBIC, _FMOW)),
    )
    return recipes


# Models whose sequence of tokens is no plain ViT's, with the reason.
_REFUSED = {
    "zhu-xlab/DOFA": "its patch kernel is made for the wavelengths of each image, and its patches "
    "overlap a border of one pixel of zeros",
    "made-with-clay/Clay": "its patch kernel is made for the wavelengths of each image, and date, "
    "place and ground resolution are part of its positions",
}


def find_recipe(name: str) -> Recipe | None:
    """Return the recipe of a published model.

    Args:
        name: Its id on the hub or of this table, in any case.

    Returns:
        The recipe; None if the table has no such model.

    Raises:
        CheckpointError: vitlib does not compute the model.
    """
    ids = {key.lower(): key for key in (*list_recipes(), *_REFUSED)}
    key = ids.get(name.lower())
    if key in _REFUSED:
        raise CheckpointError(
            f"architecture={name!r} is not read: {_REFUSED[key]}; the nearest that is read is "
            "'ibm-nasa-geospatial/Prithvi-EO-2.0-300M'"
        )
    return None if key is None else list_recipes()[key]


def describe_ids(names: Iterable[str], config_name: str | None = None) -> str:
    """Describe how to state the id of a published model with these tensors.

    Args:
        names: Names in timm_models.csv of the models with the tensors of a file.
        config_name: The architecture in the file's config.json; None: there is none.

    Returns:
        A clause for a message; empty if no recipe has such a row and config.
    """
    ids = [
        key
        for key, recipe in list_recipes().items()
        if key in names and config_name in (None, recipe.config_name)
    ]
    return " or ".join(
        f"if this is {key}, architecture={key!r} (--architecture) gives the pool and the "
        "preprocessing of its authors"
        for key in ids
    )


def describe_pool(name: str, pool: str) -> str:
    """Describe the authors' pool of a model on the hub.

    Args:
        name: Its id on the hub.
        pool: The pool that its files give.

    Returns:
        A line for the log; empty if the pool is that of the authors, or they state none.
    """
    recipe = {key.lower(): recipe for key, recipe in list_recipes().items()}.get(name.lower())
    if recipe is None or recipe.pool in (None, pool):
        return ""
    return (
        f"pool={pool!r} as its files say; its authors use {recipe.pool!r}: give "
        f"architecture={name!r} (--architecture) or pool={recipe.pool!r} (--pool)"
    )


def apply_recipe(
    recipe: Recipe,
    facts: Facts,
    config: Mapping[str, Any],
    layout: str,
    shapes: Mapping[str, Shape],
) -> Facts:
    """Turn the name of a published model into what its layout can read.

    Args:
        recipe: Of the model.
        facts: What the caller states, the name of the model included.
        config: The content of config.json; empty if there is none.
        layout: Name of the layout of the file.
        shapes: Shapes of the tensors by vitlib's names.

    Returns:
        The facts with the authors' pool, unless the caller states another or a head in the file
        reads another. The architecture is the
        one that the layout's tables have, or None if config.json names it.

    Raises:
        ConfigError: config.json names another model, or the file is of other bands.
    """
    width, channels, *_ = shapes["patch_embed.proj.weight"]
    count = 3 if recipe.bands is None else len(recipe.bands[0])
    if channels != count:
        raise ConfigError(
            f"architecture={facts.architecture!r}: expected a file of {count} bands "
            f"({_RGB if recipe.bands is None else _HLS}), got {channels}: leave architecture out, "
            "or give the file of this model"
        )
    pooled = 2 * width if recipe.pool == "cls+mean" else width
    _, inputs = shapes.get("head.weight", (0, pooled))
    if facts.pool is None and inputs == pooled:
        facts = replace(facts, pool=recipe.pool)
    config_name = config.get("architecture", config.get("model_type"))
    if isinstance(config_name, str):
        if normalize_name(config_name) != recipe.config_name:
            raise ConfigError(
                f"architecture={facts.architecture!r}: config.json says {config_name!r}, expected "
                f"{recipe.config_name!r}: leave architecture out, or give the folder of this model"
            )
        return replace(facts, architecture=None, published=recipe.row)
    name = recipe.row
    if layout == "hf":
        name = (recipe.bare_type or recipe.config_name) if recipe.row is None else None
    num_heads = facts.num_heads or recipe.num_heads
    return replace(facts, architecture=name, num_heads=num_heads)
