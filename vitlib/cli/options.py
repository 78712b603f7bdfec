"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast

import click

from vitlib.cli.levels import levels_option
from vitlib.cli.values import CountOrAll, ImageSize, Size

if TYPE_CHECKING:
    from vitlib.checkpoint.families import Profile
    from vitlib.checkpoint.layouts.layout import LayoutName
    from vitlib.config import Activation, Pool

# Copies of values in modules that need torch, which `vitlib --help` must not import. A test
# compares them with the values of checkpoint.layouts and config.
LAYOUTS = ("hf", "timm", "meta", "torchvision", "openclip", "jax", "vitlib")
PROFILES = ("hf", "timm", "original", "jax", "torchvision")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "swiglu")
POOLS = ("cls", "mean", "cls+mean", "cls+reg", "cls+2reg", "cls+3reg", "map", "pooler", "prefix")
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp8", "auto")
DEFAULT_MODEL = "google/vit-base-patch16-224"
F = TypeVar("F", bound=Callable[..., Any])

# Flags of `source_options`, in the order of the help.
SOURCE_FLAGS: dict[str, dict[str, Any]] = {
    "--source-layout": {
        "type": click.Choice(LAYOUTS),
        "help": "Layout of the files, where their names fit two.",
    },
    "--profile": {
        "type": click.Choice(PROFILES),
        "help": "Library whose numerics the model runs with. Default: the files' own.",
    },
    "--prefix": {
        "metavar": "NAME",
        "help": "Prefix of the tensors to take, where a file contains several networks.",
    },
    "--architecture": {
        "metavar": "NAME",
        "help": "The model's name in timm or open_clip, where no file says it.",
    },
    "--num-heads": {
        "type": click.IntRange(1),
        "metavar": "N",
        "help": "Attention heads, where no file says it: see vitlib info.",
    },
    "--activation": {
        "type": click.Choice(ACTIVATIONS),
        "help": "Activation of the MLP, where no file says it.",
    },
    "--pool": {
        "type": click.Choice(POOLS),
        "help": "Tokens that the head reads, where no file says it.",
    },
    "--revision": {"metavar": "NAME", "help": "Branch, tag or commit of a hub id."},
    "--local-files-only": {
        "is_flag": True,
        "help": "Take a hub id from the cache, without a network.",
    },
}


class SourceOptions(TypedDict):
    """Values of `source_options`, which a verb takes as `reading`: arguments of vitlib.load.

    Attributes:
        layout: layout of the files; None detects it.
        profile: library whose numerics the model runs with; None for the files' own.
        prefix: prefix of the tensors to take, where a file contains several networks.
        architecture: the model's name in timm or open_clip.
        num_heads: attention heads, where the files do not say it.
        activation: activation of the MLP, where the files do not say it.
        pool: tokens that the head reads, where the files do not say it.
        revision: branch, tag or commit of a hub id.
        local_files_only: take a hub id from the cache alone.
    """

    layout: LayoutName | None
    profile: Profile | None
    prefix: str | None
    architecture: str | None
    num_heads: int | None
    activation: Activation | None
    pool: Pool | None
    revision: str | None
    local_files_only: bool


@dataclass(frozen=True)
class ModelOptions:
    """Values of `model_options` and `precision_options`, which a verb takes as `options`.

    Attributes:
        model: hub id, folder or weights file.
        reading: values of `source_options`.
        device: device by torch's name; None for CUDA where there is one.
        image_size: size of the pixels; None for the checkpoint's.
        batch_size: images per forward pass.
        precision: arithmetic of the model; None for the checkpoint's own.
        calibrate: folder of photos to calibrate int8 with.
        compile: compile the model.
        calibrated: True if the scores use the model's calibration.json.
        levels: black and white of images deeper than 8 bits.
        preprocess: checkpoint whose preprocessing is used; None for the model's own.
        labels: file with the names of the classes, for an exported file that states none.
    """

    model: str
    reading: SourceOptions
    device: str | None
    image_size: Size | None = None
    batch_size: int = 16
    precision: str | None = None
    calibrate: Path | None = None
    compile: bool = False
    calibrated: bool = False
    levels: float | tuple[float, float] | None = None
    preprocess: str | None = None
    labels: Path | None = None


def group_options(command: F, name: str, kind: Callable[..., Any], keys: dict[str, str]) -> F:
    """Pass some options of a command to it as one value.

    Args:
        command: function of the verb.
        name: argument of the command that takes the value.
        kind: class of the value, called with the options by keyword.
        keys: option by keyword of `kind`; options that the command lacks are left out.

    Returns:
        A function that takes the single options.
    """

    @wraps(command)
    def call(**values: Any) -> Any:
        own = {key: values.pop(option) for key, option in keys.items() if option in values}
        return command(**values, **{name: kind(**own)})

    return cast("F", call)


def source_options(command: F) -> F:
    """Add the options that say what a checkpoint's files do not, as the argument `reading`.

    Args:
        command: function of the verb.

    Returns:
        The command with the options.
    """
    command = group_options(
        command,
        "reading",
        SourceOptions,
        {key: key for key in SourceOptions.__annotations__} | {"layout": "source_layout"},
    )
    for flag, settings in reversed(SOURCE_FLAGS.items()):
        command = click.option(flag, **settings)(command)
    return command


def device_options(command: F) -> F:
    """Add --device, --image-size, --levels and options of files, as the argument `options`.

    Args:
        command: function of the verb.

    Returns:
        The command with the options.
    """
    command = group_options(
        command, "options", ModelOptions, {field.name: field.name for field in fields(ModelOptions)}
    )
    for option in (
        exported_file_options,
        image_size_option,
        device_option,
        source_options,
        levels_option,
    ):
        command = option(command)
    return command


def exported_file_options(command: F) -> F:
    """Add --preprocess and --labels.

    Args:
        command: function of the verb.

    Returns:
        The command with the options.
    """
    for option in (
        click.option(
            "--labels",
            metavar="FILE",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Names of the classes of an exported file that states none: one a line, or JSON.",
        ),
        click.option(
            "--preprocess",
            metavar="FOLDER",
            help="Checkpoint whose preprocessing is used. Default: the model's own.",
        ),
    ):
        command = option(command)
    return command


def device_option(command: F) -> F:
    """Add --device.

    Args:
        command: function of the verb.

    Returns:
        The command with the option.
    """
    return click.option(
        "--device",
        metavar="NAME",
        help="Device by torch's name, such as cpu or cuda:0. Default: CUDA where there is one.",
    )(command)


def image_size_option(command: F) -> F:
    """Add --image-size.

    Args:
        command: function of the verb.

    Returns:
        The command with the option.
    """
    return click.option(
        "--image-size",
        type=ImageSize(),
        metavar="N|HxW|keep",
        help="Pixels that the model gets: N, HxW, or keep for each photo's own shape. Default: the "
        "checkpoint's.",
    )(command)


def top_k_option(about: str) -> Callable[[F], F]:
    """Make the option --top-k.

    Args:
        about: what it counts, for the help.

    Returns:
        A decorator that adds the option.
    """
    return click.option(
        "--top-k",
        "-k",
        type=CountOrAll(),
        metavar="N|all",
        help=f"{about}, or all of them.  [default: 5]",
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


batch_size_option = click.option(
    "--batch-size",
    type=click.IntRange(1),
    metavar="N",
    default=16,
    show_default=True,
    help="Images per pass.",
)


def run_options(command: F) -> F:
    """Add --batch-size and the options of `device_options`.

    Args:
        command: function of the verb, which has an option or argument for the model of its own.

    Returns:
        The command with the options.
    """
    return batch_size_option(device_options(command))


def model_option(command: F) -> F:
    """Add --model; put it above `device_options`.

    Args:
        command: function of the verb.

    Returns:
        The command with the option.
    """
    return click.option(
        "--model",
        "-m",
        metavar="MODEL",
        default=DEFAULT_MODEL,
        show_default=True,
        help="Hub id, folder, weights file or exported file; demo needs no network.",
    )(command)


def subject_option(command: F) -> F:
    """Add --model without a default, for a verb that takes the model by position as well.

    Args:
        command: function of the verb.

    Returns:
        The command with the option.
    """
    return click.option("--model", "-m", metavar="MODEL", help="MODEL as an option.")(command)


def model_options(command: F) -> F:
    """Add --model, --batch-size and the options of `device_options`.

    Args:
        command: function of the verb.

    Returns:
        The command with the options.
    """
    return model_option(run_options(command))


def precision_options(command: F) -> F:
    """Add --precision and --calibrate.

    Args:
        command: function of the verb.

    Returns:
        The command with the options.
    """
    for option in (
        click.option(
            "--calibrate",
            metavar="FOLDER",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="32 or more photos like yours. They make int8 faster, and auto chooses by them "
            "(default: by the images themselves).",
        ),
        click.option(
            "--precision",
            type=click.Choice(PRECISIONS),
            help="Arithmetic of the model. auto: the fastest that keeps the labels; fp16 and fp8 "
            "are for GPUs, int8 for CPUs. Default: the checkpoint's own.",
        ),
    ):
        command = option(command)
    return command


def calibration_option(command: F) -> F:
    """Add --no-calibration, for a verb that shows scores.

    Args:
        command: function of the verb.

    Returns:
        The command with the option.
    """
    return click.option(
        "--no-calibration",
        "calibrated",
        is_flag=True,
        flag_value=False,
        default=True,
        help="Ignore the model's calibration.json. Default: used where it exists.",
    )(command)


features_option = click.option(
    "--features",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Store of vectors: those of photos in it are not computed again, and new ones are added. "
    "Default: VITLIB_FEATURES of the environment.",
)


embeddings_option = click.option(
    "--embeddings",
    metavar="FILE.npy|FOLDER",
    type=click.Path(exists=True, path_type=Path),
    help="Vectors of an earlier vitlib embed or batch of the same model, taken into the store.",
)
