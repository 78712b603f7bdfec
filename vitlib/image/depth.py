"""Depth and range: what the numbers of a picture mean, and how they become levels of 0..255.

The rule is the same for files, bytes, PIL images, arrays and tensors; docs/pictures.md tells it to
users.

- uint8 stays as it is, and bool is black and white.
- Deeper integers become float32 levels, not rounded. Black is 0; white is the greatest value that
  `levels` says, else that a tag of the file says, else that the dtype has. int64 and uint64, the
  integers that NumPy and torch take unasked, hold 8-bit levels, as transformers reads them.
- Floats are in 0..1, a tenth of overshoot either side clipped, unless `levels` says another range.
- A picture whose numbers do not fit its range is refused. What a range is never follows from the
  picture's own least or greatest value.
- Under a preprocessing rule that does not rescale 8-bit levels, and for other than 1 or 3 channels,
  the numbers stay the picture's own: see DepthOptions.

Shapes: H W height and width in pixels, C channels.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from vitlib.config import is_number
from vitlib.errors import ConfigError, ImageError

logger = logging.getLogger("vitlib")

Levels: TypeAlias = float | tuple[float, float] | None
Samples: TypeAlias = npt.NDArray[Any]

IMAGE_WARNING = "image_warning"  # attribute of log records about one image
OVERSHOOT = 0.1  # of the range: how far floats may lie beyond it, as resampling leaves them
FAR_BELOW = 4  # a picture is dark where its maximum is less than this part of its range
# Factors that rescale 8-bit levels, to 0..1 or 0..2. A rule with another one, or with none, is for
# the numbers as they are in the file.
_OF_8_BITS = (1 / 255, 1 / 256, 1 / 127.5, 1 / 128)
_DEPTHS = (10, 12, 14, 16)  # bits that cameras and scanners have


def check_levels(levels: object) -> Levels:
    """Check what a user says of black and white.

    Args:
        levels: the value of white (black is 0), or (black, white), a window.

    Returns:
        The same, a list as a tuple.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(levels, np.generic | np.ndarray):
        levels = levels.tolist()
    if levels is None or (is_number(levels) and math.isfinite(levels) and levels > 0):  # type: ignore[arg-type, operator]
        return levels  # type: ignore[return-value]
    if isinstance(levels, list | tuple) and len(levels) == 2 and all(map(is_number, levels)):
        low, high = levels
        if math.isfinite(low) and math.isfinite(high) and low < high:
            return (low, high)
    raise ConfigError(
        f"levels={levels!r}: expected the value of white, such as 4095 (black is 0), or a window "
        "(black, white), such as (-160, 240)"
    )


def is_8_bit_factor(rescale_factor: float | None) -> bool:
    """Whether a rule's factor is made for 8-bit levels, however many digits a file gives it."""
    return rescale_factor is not None and any(
        math.isclose(rescale_factor, factor, rel_tol=1e-4) for factor in _OF_8_BITS
    )


def log_image_warning(message: str) -> None:
    """Log what is to be known of a picture; `vitlib evaluate` and `finetune` show it too."""
    logger.warning("%s", message, extra={IMAGE_WARNING: True})


def ignore_warning(message: str) -> None:
    """Say nothing: for pictures that are read once more elsewhere, with a warning."""


class WarnOnce:
    """Logs the first message that it gets and drops the others: one warning a call, not one a
    picture. Safe among threads, and can be pickled."""

    def __init__(self) -> None:
        self._free = threading.Lock()

    def __call__(self, message: str) -> None:
        """Log a message, if it is the first."""
        if self._free.acquire(blocking=False):  # never released
            log_image_warning(message)

    def __reduce__(self) -> tuple[type[WarnOnce], tuple[()]]:
        return WarnOnce, ()


@dataclass(frozen=True)
class DepthOptions:
    """How the numbers of a picture are read.

    Attributes:
        levels: the value of white, or a window (black, white); None: see the file's head.
        raw_values: leave the numbers as they are in the file, as float32.
        rescale_factor: by what they are multiplied afterwards; for warnings alone.
        warn: called with one line where a picture can be read but was probably meant otherwise.
    """

    levels: Levels = None
    raw_values: bool = False
    rescale_factor: float | None = None
    warn: Callable[[str], None] = log_image_warning


DEFAULT_OPTIONS = DepthOptions()  # without a word from the user


@dataclass(frozen=True)
class DeclaredRange:
    """What an image file says of its numbers beside its pixels."""

    low: float = 0
    high: float | None = None  # None: as the dtype says
    tag: str = ""  # which part of the file says so
    white_is_zero: bool = False


class _Range(NamedTuple):
    low: float
    high: float
    source: str  # for messages
    overshoot: float  # how far beyond the range values are clipped; further out they are refused


def scale_to_255(
    samples: Samples,
    name: str,
    reading: DepthOptions,
    declared: DeclaredRange | tuple[DeclaredRange, ...] | None = None,
) -> Samples:
    """Turn samples of any depth into levels.

    Args:
        samples: (H, W, C), without alpha.
        name: of the picture, for messages.
        reading: what the user says.
        declared: what the file says; several: of each channel.

    Returns:
        (H, W, C): uint8 where they are 8-bit levels, else float32; 0..255 unless the numbers
        stay the picture's own.

    Raises:
        ImageError: numbers that are not finite, or do not fit the range.
    """
    if isinstance(declared, tuple):
        return _each_to_levels(samples, name, reading, declared)
    kind = samples.dtype.kind
    if samples.dtype == np.uint8:
        warn_of_8_bits(name, reading)
        return np.ascontiguousarray(samples)
    if kind == "b":
        many = reading.raw_values and samples.shape[2] not in (1, 3)
        return np.where(samples, np.uint8(1 if many else 255), np.uint8(0))
    if kind not in "iuf":
        raise ImageError(f"{name} of {samples.dtype}: expected integers or floats")
    low, high = samples.min(), samples.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        what = "NaN" if np.isnan(low) else "infinity"
        raise ImageError(f"{name} of {samples.dtype} holds {what}: expected finite numbers")
    if reading.raw_values:
        return _own_numbers(samples, name, reading)
    span = _range_of(samples, name, reading, declared)
    _check_fit(samples.dtype, float(low), float(high), name, span)
    if not span.source:  # the dtype's own
        _check_dark(samples.dtype, float(high), span.high, name, reading)
    exact = samples.dtype.itemsize <= 2 or samples.dtype == np.float32
    # float32 multiplies 16 bits by 255 without rounding; a window of large numbers needs more.
    wide = np.float32 if exact and span.low == 0 else np.float64
    levels: Samples = samples.astype(wide)
    levels -= wide(span.low)
    levels *= wide(255)
    levels /= wide(span.high - span.low)
    np.clip(levels, 0, 255, out=levels)
    if declared is not None and declared.white_is_zero:
        np.subtract(wide(255), levels, out=levels)
    return levels.astype(np.float32, copy=False)


def _each_to_levels(
    samples: Samples, name: str, reading: DepthOptions, declared: tuple[DeclaredRange, ...]
) -> Samples:
    """Levels of channels of which the file says different ranges; what the user says is for all."""
    if reading.levels is not None or reading.raw_values:
        return scale_to_255(samples, name, reading, declared[0])
    channels = [
        scale_to_255(samples[:, :, c : c + 1], f"{name}, channel {c},", reading, declared[c])
        for c in range(samples.shape[2])
    ]
    return np.concatenate(channels, axis=2)


def _own_numbers(samples: Samples, name: str, reading: DepthOptions) -> Samples:
    """The samples as float32; a warning where 1/255 is hardly what they are to be multiplied by."""
    if samples.dtype.itemsize > 4 and np.abs(samples.astype(np.float64)).max() > 3e38:
        raise ImageError(f"{name} of {samples.dtype} holds numbers too large for float32")
    if is_8_bit_factor(reading.rescale_factor):
        low, high = float(samples.min()), float(samples.max())
        small = samples.dtype.kind == "f" and 0 < max(-low, high) <= 1 + OVERSHOOT
        if small or high > 255 or low < 0:
            reading.warn(
                f"{name}: the numbers of {samples.shape[2]} channels ({samples.dtype}, {low:g} to "
                f"{high:g}) stay as they are and are multiplied by rescale_factor="
                f"{reading.rescale_factor:.6g}: if they are not 8-bit levels, give another "
                "rescale_factor, or levels= (--levels), the value of white"
            )
    return samples.astype(np.float32)


def _range_of(
    samples: Samples, name: str, reading: DepthOptions, declared: DeclaredRange | None
) -> _Range:
    """Which values are black and white: what the user says, the file, or the dtype."""
    dtype, levels = samples.dtype, reading.levels
    overshoot = OVERSHOOT if dtype.kind == "f" else 0.0
    if isinstance(levels, tuple):
        return _Range(*levels, f"levels={levels}", math.inf)
    if levels is not None:
        return _Range(0, levels, f"levels={levels:g}", overshoot)
    if declared is not None and declared.high is not None:
        return _Range(declared.low, declared.high, f"the file's {declared.tag}", overshoot)
    if dtype.kind == "f":
        return _Range(0, 1, "", overshoot)
    if dtype.itemsize == 1:
        raise ImageError(
            f"{name} of int8: expected uint8, or levels= (--levels), the value of white, such as "
            "127, or a window, such as (-128, 127)"
        )
    if dtype.itemsize == 8:
        return _Range(0, 255, "", 0.0)
    return _Range(0, int(np.iinfo(dtype).max), "", 0.0)


def _check_fit(dtype: np.dtype[Any], low: float, high: float, name: str, span: _Range) -> None:
    """Raise ImageError where values lie further out of the range than is clipped."""
    beyond = span.overshoot * (span.high - span.low)
    beyond += 1e-6 * beyond  # 1.1 is a little more in float32
    if span.low - beyond <= low and high <= span.high + beyond:
        return
    window = f"({math.floor(min(low, 0))}, {max(math.ceil(high), 1)})"
    remedy = f"levels= (--levels), a window (black, white) such as {window}, which clips"
    if low >= 0:
        remedy = f"levels= (--levels), the value of white such as {_white_for(high)}, or a window"
        remedy += f" (black, white) such as {window}, which clips"
    holds = f"{name} of {dtype} holds values from {low:.9g} to {high:.9g}"
    if span.source:
        raise ImageError(
            f"{holds}: expected {span.low:g} to {span.high:g}, as {span.source} says; give {remedy}"
        )
    if dtype.kind == "f":
        raise ImageError(
            f"{holds}: expected 0..1, or 0..255 with levels=255 (--levels 255); else give {remedy}"
        )
    raise ImageError(f"{holds}: expected {span.low:g} to {span.high:g}; give {remedy}")


def _check_dark(
    dtype: np.dtype[Any], high: float, white: float, name: str, reading: DepthOptions
) -> None:
    """Warn of integers of which the greatest is far below the dtype's; refuse an all black one."""
    if dtype.kind == "f" or dtype.itemsize > 4 or not 0 < high < white / FAR_BELOW:
        return
    fewer = f"{name} of {dtype} holds values up to {high:g}, far below {white:g}"
    if dtype.itemsize == 4 and high * 255 < white:  # of 8-bit levels not even one
        raise ImageError(
            f"{fewer}, and would be black: give the value of white with levels= (--levels), such "
            f"as {_white_for(high)}"
        )
    reading.warn(
        f"{fewer}, which is taken for white: if white is less, give it with levels= (--levels), "
        f"such as {_white_for(high)}"
    )


def _white_for(high: float) -> int:
    """An example for a message: white of the least usual depth that holds a value."""
    if high <= 255:
        return 255
    return next((2**bits - 1 for bits in _DEPTHS if high < 2**bits), math.ceil(high))


def warn_of_8_bits(name: str, reading: DepthOptions) -> None:
    """Say of a window of 8-bit numbers that it does not apply to 8-bit pictures."""
    levels = reading.levels
    if isinstance(levels, tuple) and levels[0] >= 0 and 1 < levels[1] <= 255 and levels != (0, 255):
        reading.warn(
            f"{name} has 8 bits and is read in 0..255: levels={levels} is for deeper pictures and "
            "floats"
        )
