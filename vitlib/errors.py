"""Exceptions of vitlib, for mistakes in calls, files and images.

Each message states what is expected, what was given and what to do. The command line prints it as
one line.
"""


class VitlibError(Exception):
    """Base of every error that vitlib raises on purpose."""


class ConfigError(VitlibError):
    """A number or a choice that no ViT can have, or that contradicts another number."""


class SourceError(VitlibError):
    """A hub id, folder or file that does not exist or cannot be read."""


class CheckpointError(VitlibError):
    """A checkpoint whose tensors or config do not suit the model."""


class DataError(VitlibError):
    """A labelled data set that cannot be used."""


class TrainError(VitlibError):
    """A training run that cannot start or resume."""


class ServeError(VitlibError):
    """A server that cannot start."""


class BatchError(VitlibError):
    """A batch run that cannot start or resume."""


class ImageError(VitlibError):
    """An image, or a preprocessing config, that cannot become pixels."""


class NotFiniteError(ImageError):
    """An image for which the model's output is not finite."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message.

    Args:
        error: Any exception.

    Returns:
        The line; the name of the error's class where the message is empty.
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def count_noun(count: int, noun: str) -> str:
    """Return a number and its noun, "1 photo" or "2 photos".

    Args:
        count: The number.
        noun: The noun in the singular, one that takes s, es after s, or ies for y.
    """
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun[:-1] + 'ies' if noun.endswith('y') else noun + 'es'[noun[-1] != 's' :]}"
