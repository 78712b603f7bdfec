"""Options that several verbs share, and the handling of images that fail."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast

import click

from vitlib.cli.levels import levels_option
from vitlib.cli.printing import echo, fail
from vitlib.errors import VitlibError

if TYPE_CHECKING:
    from vitlib.predict.predictor import Predictor

# Copies of values in modules that need torch, which `vitlib --help` must not import. A test
# compares them with the values of checkpoint.layouts and config.
LAYOUTS = ("hf", "timm", "meta", "torchvision", "openclip", "jax", "vitlib")
PROFILES = ("hf", "timm", "original", "jax", "torchvision")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "swiglu")
POOLS = ("cls", "mean", "cls+mean", "map", "pooler")
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp8", "auto")
IMAGES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"))
AUTO_IMAGES = 64  # images of the command line that choose the precision, at most
DEFAULT_MODEL = "google/vit-base-patch16-224"
F = TypeVar("F", bound=Callable[..., Any])


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

    layout: str | None
    profile: str | None
    prefix: str | None
    architecture: str | None
    num_heads: int | None
    activation: str | None
    pool: str | None
    revision: str | None
    local_files_only: bool


@dataclass(frozen=True)
class ModelOptions:
    """Values of `model_options` and `precision_options`, which a verb takes as `options`.

    Attributes:
        model: hub id, folder or weights file.
        reading: values of `source_options`.
        device: device by torch's name; None for CUDA where there is one.
        batch_size: images per forward pass.
        precision: arithmetic of the model; None for the checkpoint's own.
        calibrate: folder of photos to calibrate int8 with.
        calibrated: True if the scores use the model's calibration.json.
        levels: black and white of images deeper than 8 bits.
    """

    model: str
    reading: SourceOptions
    device: str | None
    batch_size: int = 16
    precision: str | None = None
    calibrate: Path | None = None
    calibrated: bool = False
    levels: float | tuple[float, float] | None = None


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
    for option in (
        click.option(
            "--local-files-only",
            is_flag=True,
            help="Take a hub id from the cache, without a network.",
        ),
        click.option("--revision", help="Branch, tag or commit of a hub id."),
        click.option(
            "--pool",
            type=click.Choice(POOLS),
            help="Tokens that the head reads, where no file says it.",
        ),
        click.option(
            "--activation",
            type=click.Choice(ACTIVATIONS),
            help="Activation of the MLP, where no file says it.",
        ),
        click.option(
            "--num-heads",
            type=click.IntRange(1),
            help="Attention heads, where no file says it: see vitlib info.",
        ),
        click.option(
            "--architecture",
            metavar="NAME",
            help="The model's name in timm or open_clip, where no file says it.",
        ),
        click.option(
            "--prefix",
            help="Prefix of the tensors to take, where a file contains several networks.",
        ),
        click.option(
            "--profile",
            type=click.Choice(PROFILES),
            help="Library whose numerics the model runs with. Default: the files' own.",
        ),
        click.option(
            "--source-layout",
            type=click.Choice(LAYOUTS),
            help="Layout of the files, where their names fit two.",
        ),
    ):
        command = option(command)
    return command


def device_options(command: F) -> F:
    """Add --device, --levels and the options of `source_options`, as the argument `options`.

    Args:
        command: function of the verb.

    Returns:
        The command with the options.
    """
    command = group_options(
        command, "options", ModelOptions, {field.name: field.name for field in fields(ModelOptions)}
    )
    for option in (
        click.option("--device", help="Device by torch's name. Default: CUDA where there is one."),
        source_options,
        levels_option,
    ):
        command = option(command)
    return command


def run_options(command: F) -> F:
    """Add --batch-size and the options of `device_options`.

    Args:
        command: function of the verb, which has an option or argument for the model of its own.

    Returns:
        The command with the options.
    """
    return click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=16,
        show_default=True,
        help="Images per pass.",
    )(device_options(command))


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
        default=DEFAULT_MODEL,
        show_default=True,
        help="Hub id, folder or weights file.",
    )(command)


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


def load_predictor(images: Iterable[str], options: ModelOptions) -> Predictor:
    """Load the Predictor of the options and optimize its model.

    Args:
        images: images of the command line, by which --precision auto may choose.
        options: values of the options.

    Returns:
        The Predictor.

    Raises:
        UsageError: for options that do not fit each other.
        VitlibError: where the model cannot be loaded.
    """
    predictor = open_predictor(options)
    optimize_model(predictor, images, options)
    return predictor


def optimize_model(predictor: Predictor, images: Iterable[str], options: ModelOptions) -> None:
    """Optimize the Predictor's model, and say on stderr which precision was chosen.

    Args:
        predictor: the Predictor to change.
        images: images of the command line, by which --precision auto may choose.
        options: values of the options.
    """
    with gc_frozen():
        if options.precision == "auto" and options.calibrate is None:
            predictor.calibrate = _readable(images, predictor)
        predictor.fast()
    if predictor.precision_note:
        echo(predictor.precision_note, err=True)


def print_calibration(predictor: Predictor) -> None:
    """Print a line on stderr where the scores are calibrated.

    Args:
        predictor: the Predictor that computes the scores.
    """
    if predictor.calibration is not None:
        text = f"calibrated: {predictor.calibration.describe()} (--no-calibration leaves it out)"
        echo(text, err=True)


def open_predictor(options: ModelOptions) -> Predictor:
    """Load the Predictor of the options, without optimizing its model.

    Args:
        options: values of the options.

    Returns:
        The Predictor.

    Raises:
        UsageError: for options that do not fit each other.
        VitlibError: where the model cannot be loaded.
    """
    if options.calibrate is not None and options.precision not in ("int8", "auto"):
        raise click.UsageError("--calibrate is for --precision int8 or auto")
    mute_libraries()
    photos = None if options.calibrate is None else list_photos(options.calibrate, "--calibrate")
    with gc_frozen():
        from vitlib.predict.predictor import Predictor

        predictor = Predictor.load(
            options.model,
            **options.reading,
            device=options.device,
            precision=options.precision,  # type: ignore[arg-type]
            calibrate=photos,
            calibrated=options.calibrated,
        )
    if options.levels is not None:
        predictor.image_processor = replace(predictor.image_processor, levels=options.levels)
    return predictor


@contextmanager
def gc_frozen() -> Iterator[None]:
    """Turn garbage collection off, then exempt every object made meanwhile from it.

    Importing torch makes 300,000 objects that live as long as the process. To walk them at each
    full collection takes a tenth of a start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def set_image_size(predictor: Predictor, image_size: str) -> None:
    """Change the size of the Predictor's pixels; the model resamples its position embeddings.

    Args:
        predictor: the Predictor to change.
        image_size: pixels as N or HxW, or keep for the image's own shape.

    Raises:
        UsageError: for a size that is not of this form, or smaller than a patch.
    """
    patch = predictor.model.config.patch_size
    if image_size == "keep":
        size: Any = "keep"
    else:
        sides = image_size.lower().split("x")
        if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
            raise click.UsageError(f"--image-size {image_size}: expected N, HxW or keep")
        size = (int(sides[0]), int(sides[-1]))
        if any(side < step for side, step in zip(size, patch, strict=True)):
            raise click.UsageError(
                f"--image-size {image_size}: expected at least one patch, {patch[0]}x{patch[1]}"
            )
    predictor.image_processor = predictor.image_processor.with_image_size(size, patch)


def expand_folders(images: tuple[str, ...]) -> list[str]:
    """Replace folders on the command line by the photos in and below them.

    Args:
        images: files and folders.

    Returns:
        Files, those of a folder by name.
    """
    files: list[str] = []
    for image in images:
        path = Path(image)
        files += map(str, list_photos(path, "IMAGE")) if path.is_dir() else [image]
    return files


def list_inputs(images: Iterable[str], options: ModelOptions) -> list[str]:
    """List every file and folder that a verb reads, to refuse them as outputs.

    Args:
        images: images of the command line.
        options: values of the options.

    Returns:
        The images, the model and the photos to calibrate with.
    """
    photos = [] if options.calibrate is None else list_photos(options.calibrate, "--calibrate")
    return [*images, options.model, *map(str, photos)]


def list_photos(folder: Path, option: str) -> list[Path]:
    """List the files in and below a folder that have the suffix of an image.

    Hidden files, and files that operating systems leave, are counted on stderr and left out.

    Args:
        folder: the folder.
        option: name of the option or argument that gave the folder, for the error.

    Returns:
        The files, by name.

    Raises:
        UsageError: where there are none.
    """
    from vitlib.data.from_folder import is_hidden

    images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES and p.is_file())
    visible = [p for p in images if not any(map(is_hidden, p.relative_to(folder).parts))]
    if len(visible) < len(images):
        count = len(images) - len(visible)
        echo(f"{folder}: {count} hidden images are not read", err=True)
    if not visible:
        raise click.UsageError(f"{option} {folder}: no {', '.join(sorted(IMAGES))} in it")
    return visible


def _readable(images: Iterable[str], predictor: Predictor) -> list[str]:
    """Select the first images that can be read; the verb names the others when it reads them."""
    from vitlib.image.depth import silent

    readable = []
    for image in islice(images, AUTO_IMAGES):
        with suppress(VitlibError):
            predictor.image_processor.ready(image, silent)
            readable.append(image)
    return readable


def mute_libraries() -> None:
    """Mute the warnings and log lines of Pillow and of the hub client on stderr."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # read when the client is imported
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


@contextmanager
def logs_muted() -> Iterator[None]:
    """Mute the log lines of loading and saving, for verbs whose output contains them.

    Errors stay, and lines that no output contains: about an image, about which model is meant.
    """
    logger = logging.getLogger("vitlib")
    logger.addFilter(_is_shown)
    try:
        yield
    finally:
        logger.removeFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    """Return True if a log line is an error, or about an image or the choice of a model."""
    # image.depth and source.locate set these attributes on the lines that no output contains.
    marked = hasattr(record, "picture") or hasattr(record, "shown")
    return record.levelno >= logging.ERROR or marked


def is_terminal() -> bool:
    """Return True if stderr is a terminal, so that a progress bar would be seen."""
    return sys.stderr is not None and sys.stderr.isatty()  # None under pythonw


class ImageErrors:
    """Errors of images, by the image's position on the command line.

    Attributes:
        errors: error by position.
    """

    def __init__(self) -> None:
        self.errors: dict[int, VitlibError] = {}

    def note(self, index: int, error: VitlibError) -> None:
        """Record an error; the `on_error` of Predictor's methods.

        Args:
            index: position of the image.
            error: its error.
        """
        self.errors[index] = error


@contextmanager
def report_errors() -> Iterator[ImageErrors]:
    """Collect errors of images, name each on stderr at the end, and exit 1 if there are any.

    Yields:
        The collection.
    """
    collected = ImageErrors()
    yield collected
    for error in collected.errors.values():
        fail(error)
    if collected.errors:
        sys.exit(1)
