"""What vitlib raises when it is the caller, a file or an image that is wrong.

Each message says what was expected, what came, and what to do; the command line prints it as one
line.
"""


class VitlibError(Exception):
    """Base of every error that vitlib raises on purpose."""


class ConfigError(VitlibError):
    """A number or a choice that no ViT can have, or that another number contradicts."""


class SourceError(VitlibError):
    """A hub id, folder or file that is not there or cannot be read."""


class CheckpointError(VitlibError):
    """A checkpoint whose tensors or config are not what the model needs."""


class DataError(VitlibError):
    """A labelled set of photos that cannot be used as it is."""


class TrainError(VitlibError):
    """A training run that cannot start, or cannot go on."""


class ServeError(VitlibError):
    """A server that cannot start."""


class BatchError(VitlibError):
    """A batch run that cannot start, or cannot go on."""


class ImageError(VitlibError):
    """An image, or a preprocessing rule, that cannot become pixels."""


class NotFiniteError(ImageError):
    """An image for which the model gives numbers that are not finite."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
