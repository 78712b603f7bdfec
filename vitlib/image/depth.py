"""Bit depth and range: scaling of the values of an image to 0..255.

Files, bytes, PIL images, arrays and tensors are treated alike; docs/pictures.md describes it for
users.

- uint8 stays as it is, and bool is black and white.
- Deeper integers become float32, not rounded. Black is 0. White is the value of `levels`, else that
  of a tag of the file, else the dtype's maximum. int64 and uint64, the default integers of NumPy
  and torch, hold 8-bit values, as transformers reads them.
- Floats are in 0..1, unless `levels` states another range. An overshoot of a tenth is clipped.
- An image whose values do not fit its range is an error. A range never depends on the minimum or
  maximum of the image.
- Values are not scaled for a preprocessing without a rescale of 8-bit values, nor for other than 1
  or 3 channels: see DepthOptions.

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

from vitlib.errors import ConfigError, ImageError, is_number

logger = logging.getLogger("vitlib")

Levels: TypeAlias = float | tuple[float, float] | None
Samples: TypeAlias = np.ndarray[Any, np.dtype[Any]]

IMAGE_WARNING = "image_warning"  # attribute of log records about one image
OVERSHOOT = 0.1  # share of the range by which floats may exceed it, as resampling makes them
FAR_BELOW = 4  # an image is dark if its maximum is below 1 / FAR_BELOW of its range
# Factors that rescale 8-bit values to 0..1 or 0..2. A preprocessing with another factor, or none,
# is for values as they are in the file.
_8_BIT_FACTORS = (1 / 255, 1 / 256, 1 / 127.5, 1 / 128)
_DEPTHS = (10, 12, 14, 16)  # bits that cameras and scanners have


def check_levels(levels: object) -> Levels:
    """Check the user's range of values.

    Args:
        levels: Value of white (black is 0), a window (black, white), or None.

    Returns:
        The same, a list as a tuple.

    Raises:
        ConfigError: It is neither.
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
    """Return True if a rescale factor is for 8-bit values, as written with any number of digits.

    Args:
        rescale_factor: Factor of a preprocessing, or None.
    """
    return rescale_factor is not None and any(
        math.isclose(rescale_factor, factor, rel_tol=1e-4) for factor in _8_BIT_FACTORS
    )


def log_image_warning(message: str) -> None:
    """Log a warning about an image; `vitlib evaluate` and `finetune` show it too.

    Args:
        message: One line, which names the image.
    """
    logger.warning("%s", message, extra={IMAGE_WARNING: True})


def ignore_warning(message: str) -> None:
    """Ignore a warning, for images that are read again elsewhere with warnings.

    Args:
        message: The warning.
    """


class WarnOnce:
    """Function that logs its first message and drops later ones: one warning a call, not an image.

    It is safe among threads, and can be pickled.
    """

    def __init__(self) -> None:
        # Held from the first message on. A lock, unlike a flag, decides which thread is first.
        self._free = threading.Lock()

    def __call__(self, message: str) -> None:
        """Log a message if it is the first.

        Args:
            message: One line.
        """
        if self._free.acquire(blocking=False):  # never released
            log_image_warning(message)

    def __reduce__(self) -> tuple[type[WarnOnce], tuple[()]]:
        return WarnOnce, ()


@dataclass(frozen=True)
class DepthOptions:
    """Options for the range of an image's values.

    Attributes:
        levels: Value of white, or a window (black, white); None: see the module's docstring.
        raw_values: True leaves the values as they are in the file, as float32.
        rescale_factor: Factor of the later rescale; for warnings alone.
        warn: Called with a line of text where an image is readable but probably misread.
    """

    levels: Levels = None
    raw_values: bool = False
    rescale_factor: float | None = None
    warn: Callable[[str], None] = log_image_warning


DEFAULT_OPTIONS = DepthOptions()


@dataclass(frozen=True)
class DeclaredRange:
    """Range of values that an image file declares.

    Attributes:
        low: Value of black.
        high: Value of white; None for the dtype's.
        tag: Part of the file that declares it, for messages.
        white_is_zero: True if the values are inverted.
    """

    low: float = 0
    high: float | None = None
    tag: str = ""
    white_is_zero: bool = False


class _Range(NamedTuple):
    low: float
    high: float
    source: str  # for messages
    overshoot: float  # how far beyond the range values are clipped; further out they are refused


def scale_to_255(
    samples: Samples,
    name: str,
    options: DepthOptions,
    declared: DeclaredRange | tuple[DeclaredRange, ...] | None = None,
) -> Samples:
    """Scale the samples of an image to 0..255.

    Args:
        samples: (H, W, C) of any dtype, without alpha.
        name: Name of the image, for messages.
        options: The user's options.
        declared: Range that the file declares, or one a channel; None if it declares none.

    Returns:
        (H, W, C): uint8 for samples of 8 bits, else float32. In 0..255, unless options.raw_values.

    Raises:
        ImageError: Values are not finite, or do not fit the range.
    """
    if isinstance(declared, tuple):
        return _scale_channels(samples, name, options, declared)
    kind = samples.dtype.kind
    if samples.dtype == np.uint8:
        warn_of_8_bits(name, options)
        return np.ascontiguousarray(samples)
    if kind == "b":
        many_channels = options.raw_values and samples.shape[2] not in (1, 3)
        return np.where(samples, np.uint8(1 if many_channels else 255), np.uint8(0))
    if kind not in "iuf":
        raise ImageError(f"{name} of {samples.dtype}: expected integers or floats")
    low, high = samples.min(), samples.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        value = "NaN" if np.isnan(low) else "infinity"
        raise ImageError(f"{name} of {samples.dtype} holds {value}: expected finite numbers")
    if options.raw_values:
        return _keep_values(samples, name, options)
    span = _range_of(samples, name, options, declared)
    _check_fit(samples.dtype, float(low), float(high), name, span)
    if not span.source:  # the dtype's range
        _check_dark(samples.dtype, float(high), span.high, name, options)
    exact = samples.dtype.itemsize <= 2 or samples.dtype == np.float32
    # float32 multiplies 16 bits by 255 without rounding; a window of large numbers needs more.
    wide = np.float32 if exact and span.low == 0 else np.float64
    scaled: Samples = samples.astype(wide)
    scaled -= wide(span.low)
    scaled *= wide(255)
    scaled /= wide(span.high - span.low)
    np.clip(scaled, 0, 255, out=scaled)
    # TIFF's WhiteIsZero: inverted after the scale, so that the range applies to stored values.
    if declared is not None and declared.white_is_zero:
        np.subtract(wide(255), scaled, out=scaled)
    return scaled.astype(np.float32, copy=False)


def _scale_channels(
    samples: Samples, name: str, options: DepthOptions, declared: tuple[DeclaredRange, ...]
) -> Samples:
    """Scale channels with a declared range each; the user's range is for all of them."""
    if options.levels is not None or options.raw_values:
        return scale_to_255(samples, name, options, declared[0])
    channels = [
        scale_to_255(samples[:, :, c : c + 1], f"{name}, channel {c},", options, declared[c])
        for c in range(samples.shape[2])
    ]
    return np.concatenate(channels, axis=2)


def _keep_values(samples: Samples, name: str, options: DepthOptions) -> Samples:
    """Return the samples as float32, with a warning if a factor of 1/255 hardly fits them."""
    if samples.dtype.itemsize > 4 and np.abs(samples.astype(np.float64)).max() > 3e38:
        raise ImageError(f"{name} of {samples.dtype} holds numbers too large for float32")
    if is_8_bit_factor(options.rescale_factor):
        low, high = float(samples.min()), float(samples.max())
        small = samples.dtype.kind == "f" and 0 < max(-low, high) <= 1 + OVERSHOOT
        if small or high > 255 or low < 0:
            options.warn(
                f"{name}: the numbers of {samples.shape[2]} channels ({samples.dtype}, {low:g} to "
                f"{high:g}) stay as they are and are multiplied by rescale_factor="
                f"{options.rescale_factor:.6g}: if they are not 8-bit levels, give another "
                "rescale_factor, or levels= (--levels), the value of white"
            )
    return samples.astype(np.float32)


def _range_of(
    samples: Samples, name: str, options: DepthOptions, declared: DeclaredRange | None
) -> _Range:
    """Return the values of black and white, of the user, the file or the dtype."""
    dtype, levels = samples.dtype, options.levels
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
    """Raise ImageError if values exceed the range by more than is clipped."""
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
    dtype: np.dtype[Any], high: float, white: float, name: str, options: DepthOptions
) -> None:
    """Warn of integers far below the dtype's maximum; raise if the image would be black."""
    if dtype.kind == "f" or dtype.itemsize > 4 or not 0 < high < white / FAR_BELOW:
        return
    fewer = f"{name} of {dtype} holds values up to {high:g}, far below {white:g}"
    if dtype.itemsize == 4 and high * 255 < white:  # all below 1 of 255
        raise ImageError(
            f"{fewer}, and would be black: give the value of white with levels= (--levels), such "
            f"as {_white_for(high)}"
        )
    options.warn(
        f"{fewer}, which is taken for white: if white is less, give it with levels= (--levels), "
        f"such as {_white_for(high)}"
    )


def _white_for(high: float) -> int:
    """Return the white of the smallest usual depth that holds a value, for messages."""
    if high <= 255:
        return 255
    return next((2**bits - 1 for bits in _DEPTHS if high < 2**bits), math.ceil(high))


def warn_of_8_bits(name: str, options: DepthOptions) -> None:
    """Warn that a window of 8-bit values does not apply to an 8-bit image.

    Args:
        name: Name of the image.
        options: The user's options.
    """
    levels = options.levels
    if isinstance(levels, tuple) and levels[0] >= 0 and 1 < levels[1] <= 255 and levels != (0, 255):
        options.warn(
            f"{name} has 8 bits and is read in 0..255: levels={levels} is for deeper pictures and "
            "floats"
        )
