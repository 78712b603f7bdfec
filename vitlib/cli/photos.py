"""Images of the command line: folders, patterns and stdin expanded, failures collected."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from vitlib.cli.options import ModelOptions
from vitlib.cli.printing import echo, fail
from vitlib.errors import DataError, SourceError, VitlibError

STDIN = "-"
# All of stdin is in memory: a photo may have as much, a list of paths millions of lines.
MAX_STDIN = 1 << 28


@dataclass(frozen=True)
class Photos:
    """Photos that the command line names.

    Attributes:
        names: path of each photo, or "-" for one that stdin contains.
        images: the same, with the bytes of stdin in place of "-".
    """

    names: list[str]
    images: list[str | bytes]

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self.names)


def expand_photos(names: Iterable[str], argument: str = "IMAGE") -> Photos:
    """Expand folders, patterns and stdin to photos.

    A folder stands for the photos in and below it, by name. A pattern stands for the paths that
    match it, so that it may be in quotes. "-" is a photo on stdin, or a list of paths, a line each
    or with NUL between them; it is a list if its first entry exists.

    Args:
        names: arguments of the command line.
        argument: name of the argument, for messages.

    Returns:
        The photos, in the order of the arguments.

    Raises:
        UsageError: for a folder or a pattern without a photo.
        SourceError: for a folder or a stdin that cannot be read.
    """
    photos = Photos([], [])
    for name in names:
        # A list by its content and not by a flag, since a photo is not the name of a file.
        if name == STDIN:
            data = read_stdin()
            listed = parse_list(data)
            paths = listed if listed is not None else []
            if listed is None:
                _check_photo(data)
                photos.names.append(STDIN)
                photos.images.append(data)
        elif _is_folder(name):
            paths = list_photos(Path(name), argument)
        elif any(c in name for c in "*?["):
            paths = _expand_pattern(name, argument)
        else:
            paths = [name]
        photos.names.extend(paths)
        photos.images.extend(paths)
    return photos


def _expand_pattern(name: str, argument: str) -> list[str]:
    """List the photos that match a pattern; a file of this very name is itself."""
    # Imported here: a single photo must not wait for the modules of batch runs.
    from vitlib.batch.inputs.walk import expand_pattern, is_pattern

    if not is_pattern(name):
        return [name]
    matches = list(expand_pattern(name))
    paths = [p for m in matches for p in (walk_folder(m) if _is_folder(m) else [m])]
    if not paths:
        raise click.UsageError(f"{argument} {name}: no file matches this pattern")
    return paths


def read_stdin() -> bytes:
    """Read all of stdin.

    Returns:
        The bytes.

    Raises:
        SourceError: stdin is closed, empty or too long.
    """
    stream = getattr(sys.stdin, "buffer", None)
    data = b"" if stream is None else stream.read(MAX_STDIN + 1)
    if not data:
        raise SourceError("-: stdin is empty: expected a photo, or a list of paths, a line each")
    if len(data) > MAX_STDIN:
        raise SourceError(f"-: stdin has more than {MAX_STDIN} bytes: give paths in place of -")
    return bytes(data)


def parse_list(data: bytes) -> list[str] | None:
    """Parse a list of paths.

    Args:
        data: paths, a line each or with NUL between them as `find -print0` writes them.

    Returns:
        The paths; None if the first entry is no file or folder, as with the bytes of a photo.
    """
    separator = b"\0" if b"\0" in data.partition(b"\n")[0] else b"\n"
    entries = [entry.removesuffix(b"\r") for entry in data.split(separator)]
    paths = [os.fsdecode(entry) for entry in entries if entry.strip()]
    try:
        return paths if paths and Path(paths[0]).exists() else None
    except (OSError, ValueError):  # too long, NUL
        return None


def _check_photo(data: bytes) -> None:
    """Raise SourceError for text on stdin, which is a list whose first path is not there."""
    try:
        first = data[:4096].decode().splitlines()[0].strip()
    except (UnicodeDecodeError, IndexError):
        return
    if first.isprintable():
        raise SourceError(
            f"stdin is text, and its first line {first[:80]!r} names no file: expected a photo, or "
            "paths of photos"
        )


def list_inputs(photos: Iterable[str], options: ModelOptions) -> list[str]:
    """List every file and folder that a verb reads, to refuse them as outputs.

    Args:
        photos: paths of the photos.
        options: values of the options.

    Returns:
        The photos, the model and the photos to calibrate with.
    """
    calibrate = options.calibrate
    others = [] if calibrate is None else list_photos(calibrate, "--calibrate")
    return [*(name for name in photos if name != STDIN), options.model, *others]


def list_photos(folder: Path, argument: str) -> list[str]:
    """List the files in and below a folder that have the suffix of an image.

    Args:
        folder: the folder.
        argument: name of the option or argument that gave the folder, for the error.

    Returns:
        The files, by name.

    Raises:
        UsageError: where there are none.
        SourceError: where it cannot be read.
    """
    photos = walk_folder(str(folder))
    if not photos:
        raise click.UsageError(f"{argument} {folder}: no photo in it (.jpg, .png, .webp, ...)")
    return photos


def walk_folder(folder: str) -> list[str]:
    """List the photos in and below a folder, as `vitlib batch` does; count others on stderr.

    Args:
        folder: the folder.

    Returns:
        The files, by name.

    Raises:
        SourceError: where it cannot be read.
    """
    from vitlib.batch.inputs.walk import is_image, walk_images
    from vitlib.data.from_folder import is_hidden

    hidden: list[str] = []

    def count_hidden(path: str) -> None:
        name = Path(path).name
        if is_hidden(name) and (is_image(name.lstrip(".")) or _is_folder(path)):
            hidden.append(path)

    photos = list(walk_images(folder.rstrip("/") or "/", count_hidden, set()))
    if hidden:
        one = len(hidden) == 1
        what = (
            "1 hidden image or folder is" if one else f"{len(hidden)} hidden images or folders are"
        )
        echo(f"{folder}: {what} not read", err=True)
    return photos


def _is_folder(name: str) -> bool:
    """Return True for a folder; False also for a name that no file can have."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False


on_bad_image_option = click.option(
    "--on-bad-image",
    type=click.Choice(("fail", "skip")),
    default="skip",
    show_default=True,
    help="Stop at a photo that cannot be read, or leave it out and name it.",
)


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

    def note_files(self, failed: Iterable[tuple[str, str]]) -> None:
        """Record the photos of a set that could not be used.

        Args:
            failed: (file, error) of each.
        """
        for index, (file, error) in enumerate(failed):
            self.note(index, DataError(error if file in error else f"{file}: {error}"))


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
