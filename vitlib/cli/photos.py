"""Images of the command line: folders expanded, failures collected."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from vitlib.cli.options import ModelOptions
from vitlib.cli.printing import echo, fail
from vitlib.errors import VitlibError

IMAGES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"))


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
