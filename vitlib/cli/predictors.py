"""Predictors of the command line: loaded, optimized and reported on stderr."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitlib.cli.compiling import check_compile
from vitlib.cli.options import ModelOptions
from vitlib.cli.photos import list_photos
from vitlib.cli.printing import echo, show_life
from vitlib.cli.values import Size
from vitlib.errors import VitlibError
from vitlib.system.garbage import pause_collection

if TYPE_CHECKING:
    from vitlib.predict.predictor import Predictor

AUTO_IMAGES = 64  # images of the command line that choose the precision, at most


def load_predictor(images: Iterable[str | bytes], options: ModelOptions) -> Predictor:
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
    if options.compile:
        check_compile(options.model, options.image_size)
    mute_libraries()
    photos = None if options.calibrate is None else list_photos(options.calibrate, "--calibrate")
    with pause_collection(permanent=True):
        from vitlib.image.processor import ImageProcessor
        from vitlib.predict.engine import check_preprocessing
        from vitlib.predict.label_file import read_labels
        from vitlib.predict.predictor import Predictor

        processor = labels = None
        if options.preprocess is not None:
            processor = ImageProcessor.load(options.preprocess)
        if options.labels is not None:
            labels = read_labels(options.labels)
        with asking_hub(options.model):
            predictor = Predictor.load(
                options.model,
                **options.reading,
                image_processor=processor,
                labels=labels,
                device=options.device,
                precision=options.precision,  # type: ignore[arg-type]
                calibrate=photos,
                compile=options.compile,
                calibrated=options.calibrated,
            )
    if options.image_size is not None:
        _set_image_size(predictor, options.image_size)
        check_preprocessing(predictor.model, predictor.image_processor)
    if options.levels is not None:
        predictor.image_processor = replace(predictor.image_processor, levels=options.levels)
    return predictor


def optimize_model(
    predictor: Predictor, images: Iterable[str | bytes], options: ModelOptions
) -> None:
    """Optimize the Predictor's model, and say on stderr which precision was chosen.

    Args:
        predictor: the Predictor to change.
        images: images of the command line, by which --precision auto may choose.
        options: values of the options.
    """
    with pause_collection(permanent=True):
        if options.precision == "auto" and options.calibrate is None:
            predictor.calibrate = _readable(images, predictor)
        with show_life("optimizing the model"):
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


def _set_image_size(predictor: Predictor, size: Size) -> None:
    """Change the size of the Predictor's pixels; the model resamples its position embeddings."""
    patch = predictor.model.config.patch_size
    if size != "keep" and any(side < step for side, step in zip(size, patch, strict=True)):
        raise click.UsageError(
            f"--image-size {size[0]}x{size[1]}: expected at least one patch, {patch[0]}x{patch[1]}"
        )
    predictor.image_processor = predictor.image_processor.with_image_size(size, patch)


def asking_hub(model: str) -> AbstractContextManager[None]:
    """Say on stderr that the hub is asked for a model which is not here, if that takes a second.

    Args:
        model: hub id, folder or weights file.

    Returns:
        A context for the loading.
    """
    if Path(model).exists() or model == "demo":
        return nullcontext()
    return show_life(f"asking the hub for {model}; --model demo needs no network", after=1.0)


def mute_libraries() -> None:
    """Mute the warnings and log lines of Pillow and of the hub client on stderr."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # read when the client is imported
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


@contextmanager
def logs_muted() -> Iterator[None]:
    """Mute the log lines of loading and saving, for verbs whose output contains them.

    Errors stay, and lines that no output contains: about an image, about which model is meant,
    about a compiled program.
    """
    logger = logging.getLogger("vitlib")
    logger.addFilter(_is_shown)
    try:
        yield
    finally:
        logger.removeFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    """Return True if a log line is an error, or about an image, a model's choice or a program."""
    # image.depth and source.locate set these attributes on the lines that no output contains.
    marked = hasattr(record, "image_warning") or hasattr(record, "always_show")
    is_compiled = record.module == "compiled"  # fast/compiled.py, about each program
    return record.levelno >= logging.ERROR or marked or is_compiled


def _readable(images: Iterable[str | bytes], predictor: Predictor) -> list[str | bytes]:
    """Select the first images that can be read; the verb names the others when it reads them."""
    from vitlib.image.depth import ignore_warning

    readable: list[str | bytes] = []
    for image in islice(images, AUTO_IMAGES):
        with suppress(VitlibError):
            predictor.image_processor.to_uint8_or_float(image, ignore_warning)
            readable.append(image)
    return readable
