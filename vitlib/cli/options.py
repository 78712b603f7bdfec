"""What several verbs take, and how they treat images that fail."""

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
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import click

from vitlib.cli.levels import levels_option
from vitlib.cli.printing import echo, fail
from vitlib.errors import VitlibError

if TYPE_CHECKING:
    from vitlib.predict.predictor import Predictor

# Of layouts.detect.LAYOUTS and layouts.families.PROFILES, which `vitlib --help` does not import.
LAYOUTS = ("hf", "timm", "meta", "torchvision", "openclip", "jax", "vitlib")
PROFILES = ("hf", "timm", "original", "jax", "torchvision")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "swiglu")  # of config.Activation
POOLS = ("cls", "mean", "cls+mean", "map", "pooler")  # of config.Pool
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp8", "auto")
IMAGES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"))
AUTO_IMAGES = 64  # of the images on the command line, so many choose the precision
DEFAULT_MODEL = "google/vit-base-patch16-224"
F = TypeVar("F", bound=Callable[..., Any])


class SourceOptions(TypedDict):
    """What source_options gives a verb as `reading`: arguments of vitlib.load and of checks."""

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
    """What model_options, with precision_options below it or not, gives a verb as `asked`."""

    model: str
    reading: SourceOptions
    device: str | None
    batch_size: int = 16
    precision: str | None = None
    calibrate: Path | None = None
    calibrated: bool = False  # of verbs that score: whether calibration.json is used
    levels: float | tuple[float, float] | None = None


def gathered(command: F, name: str, kind: Callable[..., Any], keys: dict[str, str]) -> F:
    """The command, those of its options that are there given to it as one value."""

    @wraps(command)
    def call(**values: Any) -> Any:
        own = {key: values.pop(option) for key, option in keys.items() if option in values}
        return command(**values, **{name: kind(**own)})

    return call  # type: ignore[return-value]


def source_options(command: F) -> F:
    """What the files of a model do not say, or not clearly, and where on the hub they are."""
    command = gathered(
        command,
        "reading",
        SourceOptions,
        {key: key for key in SourceOptions.__annotations__} | {"layout": "source_layout"},
    )
    for option in (
        click.option(
            "--local-files-only", is_flag=True, help="Take a hub id from the cache; ask no network."
        ),
        click.option("--revision", help="Branch, tag or commit of a hub id."),
        click.option(
            "--pool",
            type=click.Choice(POOLS),
            help="What the head reads, where no file says it.",
        ),
        click.option(
            "--activation",
            type=click.Choice(ACTIVATIONS),
            help="The MLP's, where no file says it.",
        ),
        click.option(
            "--num-heads", type=click.IntRange(1), help="Where no file says it: see vitlib info."
        ),
        click.option(
            "--architecture",
            metavar="NAME",
            help="The model's name in timm or open_clip, where no file says it.",
        ),
        click.option(
            "--prefix",
            help="Of the tensors' names to take, where a file holds several networks.",
        ),
        click.option(
            "--profile",
            type=click.Choice(PROFILES),
            help="Run the model as this library does. Default: as the files' own.",
        ),
        click.option(
            "--source-layout",
            type=click.Choice(LAYOUTS),
            help="What the files are in, where their names fit two.",
        ),
    ):
        command = option(command)
    return command


def place_options(command: F) -> F:
    """From where and on what."""
    command = gathered(
        command, "asked", ModelOptions, {field.name: field.name for field in fields(ModelOptions)}
    )
    for option in (
        click.option("--device", help="As torch names it. Default: CUDA where there is one."),
        source_options,
        levels_option,
    ):
        command = option(command)
    return command


def run_options(command: F) -> F:
    """From where, on what and how many images at a time, for a verb that has the model itself."""
    return click.option(
        "--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Images."
    )(place_options(command))


def model_option(command: F) -> F:
    """Which model; above place_options."""
    return click.option(
        "--model",
        "-m",
        default=DEFAULT_MODEL,
        show_default=True,
        help="Hub id, folder or weights file.",
    )(command)


def model_options(command: F) -> F:
    """Which model, from where, on what, how many images at a time."""
    return model_option(run_options(command))


def precision_options(command: F) -> F:
    """In which arithmetic."""
    for option in (
        click.option(
            "--calibrate",
            metavar="FOLDER",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Photos like yours, 32 or more: int8 is faster with them, and auto chooses by "
            "them (default: the images themselves).",
        ),
        click.option(
            "--precision",
            type=click.Choice(PRECISIONS),
            help="auto: the fastest that keeps the labels; fp16 and fp8 are for GPUs, int8 for "
            "CPUs. Default: the checkpoint's own.",
        ),
    ):
        command = option(command)
    return command


def calibration_option(command: F) -> F:
    """Whether scores are those of the model's calibration.json, for a verb that scores."""
    return click.option(
        "--no-calibration",
        "calibrated",
        is_flag=True,
        flag_value=False,
        default=True,
        help="Leave the model's calibration.json unread. Default: used where it is there.",
    )(command)


def load_predictor(images: Iterable[str], asked: ModelOptions) -> Predictor:
    """The Predictor of the options above, for these images, its model optimized."""
    predictor = open_predictor(asked)
    make_ready(predictor, images, asked)
    return predictor


def make_ready(predictor: Predictor, images: Iterable[str], asked: ModelOptions) -> None:
    """Make the model that runs, for these images, and say which precision was chosen."""
    with uncollected():
        if asked.precision == "auto" and asked.calibrate is None:
            predictor.calibrate = readable(images, predictor)
        predictor.fast()
    if predictor.precision_note:
        echo(predictor.precision_note, err=True)


def tell_calibration(predictor: Predictor) -> None:
    """One line on stderr where the scores are calibrated."""
    if predictor.calibration is not None:
        text = f"calibrated: {predictor.calibration.describe()} (--no-calibration: not)"
        echo(text, err=True)


def open_predictor(asked: ModelOptions) -> Predictor:
    """The Predictor of the options above, its model as it is."""
    if asked.calibrate is not None and asked.precision not in ("int8", "auto"):
        raise click.UsageError("--calibrate is for --precision int8 or auto")
    quiet()
    photos = None if asked.calibrate is None else photos_in(asked.calibrate, "--calibrate")
    with uncollected():
        from vitlib.predict.predictor import Predictor

        predictor = Predictor.load(
            asked.model,
            **asked.reading,
            device=asked.device,
            precision=asked.precision,  # type: ignore[arg-type]
            calibrate=photos,
            calibrated=asked.calibrated,
        )
    if asked.levels is not None:
        rule = predictor.image_processor
        predictor.image_processor = replace(rule, levels=asked.levels)
    return predictor


@contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection, for what stays: importing torch makes 300,000 objects that live
    as long as the process, and walking them all at each full collection takes a tenth of a start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def sized(predictor: Predictor, image_size: str) -> None:
    """Give it pixels of another size: N, HxW or keep. The model resamples its positions."""
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
    rule = predictor.image_processor
    predictor.image_processor = rule.with_image_size(size, patch)


def photos_of(images: tuple[str, ...]) -> list[str]:
    """Each IMAGE of the command line, folders replaced by the photos in them and below."""
    found: list[str] = []
    for image in images:
        path = Path(image)
        found += map(str, photos_in(path, "IMAGE")) if path.is_dir() else [image]
    return found


def inputs_of(images: Iterable[str], asked: ModelOptions) -> list[str]:
    """Every file and folder that a verb reads: its images, its model, what it calibrates with."""
    photos = [] if asked.calibrate is None else photos_in(asked.calibrate, "--calibrate")
    return [*images, asked.model, *map(str, photos)]


def photos_in(folder: Path, option: str) -> list[Path]:
    """The files of a folder and those below it that an image's name has.

    Hidden files, and what systems leave, are counted on stderr and not read.
    """
    from vitlib.data.from_folder import is_hidden

    named = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES and p.is_file())
    found = [p for p in named if not any(map(is_hidden, p.relative_to(folder).parts))]
    if len(found) < len(named):
        count = len(named) - len(found)
        echo(f"{folder}: {count} hidden images are not read", err=True)
    if not found:
        raise click.UsageError(f"{option} {folder}: no {', '.join(sorted(IMAGES))} in it")
    return found


def readable(images: Iterable[str], predictor: Predictor) -> list[str]:
    """The first of the images that can be read; what cannot is told where it is used."""
    from vitlib.image.depth import silent

    found = []
    for image in islice(images, AUTO_IMAGES):
        with suppress(VitlibError):
            predictor.image_processor.ready(image, silent)
            found.append(image)
    return found


def quiet() -> None:
    """Leave stderr to what vitlib has to say: Pillow and the hub client also talk to it."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # read when the client is imported
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


@contextmanager
def unlogged() -> Iterator[None]:
    """Without the log lines of loading and saving, for verbs whose answer holds all of it.

    What says which model is meant stays: no answer holds that.
    """
    logger = logging.getLogger("vitlib")
    logger.addFilter(_is_shown)
    try:
        yield
    finally:
        logger.removeFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    """Whether a log line is an error, or says what no answer holds: of a picture, of the model."""
    marked = hasattr(record, "picture") or hasattr(record, "shown")  # depth.PICTURE, source.SHOWN
    return record.levelno >= logging.ERROR or marked


def table(rows: list[tuple[str, str]]) -> None:
    """(what, value) a line, the values under each other."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        echo(f"{name:<{width}}  {value}")


def on_terminal() -> bool:
    """Whether a progress bar would be seen."""
    return sys.stderr is not None and sys.stderr.isatty()  # None under pythonw


class Bad:
    """The images that failed, by their position on the command line."""

    def __init__(self) -> None:
        self.errors: dict[int, VitlibError] = {}

    def note(self, index: int, error: VitlibError) -> None:
        """For Predictor's on_error."""
        self.errors[index] = error


@contextmanager
def report_bad() -> Iterator[Bad]:
    """Collect what fails, print the rest first, then name each failure on stderr and exit 1."""
    bad = Bad()
    yield bad
    for error in bad.errors.values():
        fail(error)
    if bad.errors:
        sys.exit(1)
