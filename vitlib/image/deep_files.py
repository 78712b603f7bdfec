"""Image files deeper than 8 bits: all of their bits, and the range that the file declares.

Pillow decodes grayscale of 12, 16 and 32 bits and floats, but truncates 16-bit colour to 8 bits.
Its decoders take the high or the low byte of each sample, as the raw mode says. A second pass here
reads the other byte. Portable pixmaps are parsed from their bytes.

Shapes: H W height and width in pixels, C channels.
"""

from __future__ import annotations

import io
import sys
import warnings
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from vitlib.errors import ImageError, is_number
from vitlib.image.decode_limits import LimitedFile, load_pixels, open_limited
from vitlib.image.decode_limits.ppm import numbers
from vitlib.image.depth import DeclaredRange, Samples
from vitlib.image.png_bits import infer_range, read_significant_bits

# Raw mode of 16-bit colour -> raw mode that reads the other byte.
_BYTES = {
    f"{mode};16{a}": f"{mode};16{b}" for mode in ("RGB", "RGBA", "RGBX") for a, b in ("LB", "BL")
}
_BYTES |= {k[:-1] + "N": k[:-1] + ("B" if sys.byteorder == "little" else "L") for k in [*_BYTES]}
_GRAY_ALPHA = "LA;16B"  # of PNG; read as 8-bit RGBA, it is both bytes of gray, then those of alpha
_KINDS = {1: "unsigned integers", 2: "signed integers", 3: "floats"}
# TIFF tags
_BITS, _PHOTOMETRIC, _COUNT, _MAX, _PLANAR, _FORMAT = 258, 262, 277, 281, 284, 339
_SMIN, _SMAX = 340, 341


class DecodedImage(NamedTuple):
    """A decoded image.

    Attributes:
        image: The image, or a copy with its pixels; 16-bit colour is truncated to 8 bits.
        samples: (H, W, C) of an image deeper than 8 bits, else None.
        declared: Range that the file declares, or one a channel.
    """

    image: Image.Image
    samples: Samples | None = None
    declared: DeclaredRange | tuple[DeclaredRange, ...] = DeclaredRange()


def decode_samples(image: Image.Image, *, ranged: bool) -> DecodedImage:
    """Decode an image within the bounds of decode_limits.

    Args:
        image: Result of Image.open, not loaded: a load truncates the samples.
        ranged: True if the range that the file declares is needed.

    Returns:
        The image, and its samples if they are deeper than 8 bits.

    Raises:
        ImageError: Pillow misreads such samples, the file contradicts itself, or it is a PFM with
            a scale.
        Exception: Any that Pillow raises for a damaged file.
    """
    raw_mode, codec = _raw_mode(image)
    scale = image.info.get("scale", 1) if image.format == "PPM" else 1  # without its sign
    if scale != 1:
        raise ImageError(
            f"a PFM of scale {scale:.9g}, which Pillow does not apply: give the array, "
            f"np.asarray(Image.open(...)) * {scale:.9g}, and levels= where white is not 1"
        )
    if image.format == "PPM" and codec and image.mode in ("I", "RGB"):
        pixmap = _decode_pixmap(image, codec)
        if pixmap is not None:
            return pixmap
    declared: DeclaredRange | tuple[DeclaredRange, ...] = DeclaredRange()
    if _is_tiff(image):
        declared = _tiff_range(image, ranged=ranged)
    significant = None
    if ranged and image.format == "PNG" and ";16" in raw_mode:
        significant = read_significant_bits(image.fp)  # type: ignore[attr-defined]
    again, source = None, image
    if raw_mode in _BYTES or raw_mode == _GRAY_ALPHA:
        again = _reopen(image)
    is_bounded = isinstance(getattr(image, "fp", None), LimitedFile)
    # Pillow memory-maps an uncompressed TIFF opened by its path, and then does not rotate it.
    mapped = _is_tiff(image) and bool(raw_mode)
    if not is_bounded and (again is not None or significant is not None or mapped):
        # The caller's image stays unloaded, for another call.
        source = _reopen(image)
        _keep_in_memory(image)
    loaded, samples = load_pixels(source), None
    if again is not None:
        samples = _combine_bytes(loaded, again, raw_mode)
    elif loaded.mode == "F" or loaded.mode.startswith("I"):
        samples = _restore_dtype(np.asarray(loaded), image)[:, :, None]
    if significant is not None and samples is not None:
        declared = infer_range(samples, significant)
    return DecodedImage(loaded, samples, declared)


def apply_orientation(samples: Samples, orientation: int) -> Samples:
    """Rotate and flip samples upright.

    Args:
        samples: (H, W, C).
        orientation: EXIF's, 1 to 8.

    Returns:
        (H, W, C) or (W, H, C).
    """
    if orientation in (5, 6, 7, 8):  # rows are columns
        samples = samples.transpose(1, 0, 2)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    across = -1 if orientation in (2, 3, 6, 7) else 1
    return samples[::down, ::across]


def describe_tiff(file: BinaryIO | LimitedFile) -> tuple[str, str] | None:
    """Describe a TIFF that Pillow does not open.

    Args:
        file: A file of any kind, at its start.

    Returns:
        Its kind, and the array to pass instead; None for another file.
    """
    head = file.read(8)
    if head[:4] in (b"II+\0", b"MM\0+"):
        head += file.read(8)
    elif head[:4] not in (b"II*\0", b"MM\0*"):
        return None
    # Here: it loads many modules, and few images are TIFF.
    from PIL import TiffImagePlugin

    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)  # type: ignore[arg-type]
        bits, kind, count = (_single_value(tags.get(tag, 1)) for tag in (_BITS, _FORMAT, _COUNT))
        described = f"a TIFF of {count} samples a pixel, {_KINDS.get(kind, 'an unknown kind')}"
        return f"{described} of {bits} bits", _describe_array(tags, bits, kind, count)
    except Exception:  # damaged
        return None


def _raw_mode(image: Image.Image) -> tuple[str, str]:
    """Return Pillow's raw mode and codec of an image that is not loaded; else ("", "")."""
    tiles = getattr(image, "tile", None)  # only images of files have tiles
    if not tiles:
        return "", ""
    args = tiles[0].args
    return str(args if isinstance(args, str) else args[0] if args else ""), tiles[0].codec_name


def _combine_bytes(loaded: Image.Image, again: Image.Image, raw_mode: str) -> Samples:
    """Combine both bytes of 16-bit colour, or of gray with alpha, to (H, W, C) uint16."""
    if raw_mode == _GRAY_ALPHA:
        pairs = np.asarray(load_pixels(again, "RGBA"))
        high, low = pairs[:, :, :1], pairs[:, :, 1:2]
    else:
        high, low = np.asarray(loaded), np.asarray(load_pixels(again, _BYTES[raw_mode]))
    samples: Samples = high.astype(np.uint16) << 8 | low
    return samples


def _reopen(image: Any) -> Image.Image:
    """Open the same frame of the same file again, not loaded and within the same bounds."""
    # The position is restored: Pillow's decoder goes on from it.
    position = image.fp.tell()
    image.fp.seek(0)
    data = io.BytesIO(image.fp.read())
    image.fp.seek(position)
    with warnings.catch_warnings():
        # Of its size, which was checked on the first open.
        warnings.simplefilter("ignore")
        if isinstance(image.fp, LimitedFile):
            again = open_limited(data, [image.format])
        else:
            again = Image.open(data, formats=[image.format])
    if image.tell():
        again.seek(image.tell())
    return again


def _keep_in_memory(image: Any) -> None:
    """Let an image opened by its path read from memory; close the file, as a load would do."""
    file = image.fp
    if not image._exclusive_fp:
        return
    position = file.tell()
    file.seek(0)
    image.fp = io.BytesIO(file.read())
    image.fp.seek(position)
    for holder, name in ((image, "_fp"), (getattr(image, "png", None), "fp")):
        if getattr(holder, name, None) is file:
            setattr(holder, name, image.fp)
    file.close()


def _restore_dtype(samples: Samples, image: Any) -> Samples:
    """Return samples (H, W) of a gray image in the dtype of its file; Pillow makes all int32."""
    if image.mode == "I" and _is_tiff(image):
        bits, kind = (_single_value(image.tag_v2.get(tag, 1)) for tag in (_BITS, _FORMAT))
        # Pillow's mode I is int32: a view restores uint32, a cast 16 bits.
        if kind == 1 and bits == 32:
            return samples.view(np.uint32)
        if kind == 2 and bits == 16:
            return samples.astype(np.int16)
    return samples


def _decode_pixmap(image: Any, codec: str) -> DecodedImage | None:
    """Decode a PGM or PPM deeper than 8 bits, which Pillow would rescale; None for others."""
    tile = image.tile[0]
    maxval = tile.args[1] if isinstance(tile.args, tuple) else 65535 if image.mode == "I" else 255
    if maxval <= 255:
        return None
    bands = 1 if image.mode == "I" else 3
    count = image.width * image.height * bands
    if isinstance(image.fp, LimitedFile):
        image.fp.decode(image.format, image.width * image.height)
    image.fp.seek(tile.offset)
    if codec == "ppm_plain":
        samples: Samples = numbers(image.fp.read(), count)
    else:
        data = image.fp.read(2 * count)
        samples = np.frombuffer(data, ">u2", len(data) // 2)
    if len(samples) < count:
        raise ImageError("the file is truncated")
    shaped = samples.reshape(image.height, image.width, bands)
    return DecodedImage(image, shaped, DeclaredRange(0, maxval, "maxval"))


def _is_tiff(image: Image.Image) -> bool:
    """Return True for a TIFF with its tags; copies of one lack them."""
    return image.format == "TIFF" and hasattr(image, "tag_v2")


def _tiff_range(image: Any, *, ranged: bool) -> DeclaredRange | tuple[DeclaredRange, ...]:
    """Return the range that the tags of a TIFF deeper than 8 bits declare."""
    tags = image.tag_v2
    bits, kind, count = (_single_value(tags.get(tag, 1)) for tag in (_BITS, _FORMAT, _COUNT))
    if kind == 2 and bits == 8:
        raise ImageError(
            "a TIFF of signed integers of 8 bits: read it with tifffile and give the array with "
            "levels= (--levels), a window such as (-128, 127)"
        )
    if bits <= 8:
        return DeclaredRange()
    if count > 1 and tags.get(_PLANAR, 1) == 2:
        raise ImageError(
            f"a TIFF of {count} separate planes of {bits} bits, which Pillow does not decode: read "
            f"it with tifffile and give {_describe_array(tags, bits, kind, count)}"
        )
    if not ranged:
        return DeclaredRange(white_is_zero=tags.get(_PHOTOMETRIC) == 0)
    return _parse_range(tags, bits, kind, count)


def _parse_range(
    tags: Any, bits: int, kind: int, count: int
) -> DeclaredRange | tuple[DeclaredRange, ...]:
    """Parse the range in the tags of a TIFF, one a channel where they differ."""
    low: Any = 0
    high: Any = None
    tag = ""
    if _SMIN in tags and _SMAX in tags:
        low, high = _single_value(tags[_SMIN]), _single_value(tags[_SMAX])
        tag = "SMinSampleValue and SMaxSampleValue"
    elif _MAX in tags:
        high, tag = _single_value(tags[_MAX]), "MaxSampleValue"
    elif bits not in (16, 32) and kind == 1:
        high, tag = 2**bits - 1, "BitsPerSample"
    lengths = {len(value) for value in (low, high) if isinstance(value, tuple)}
    if lengths - {count}:
        raise ImageError(
            f"a TIFF of {count} samples a pixel, of which {tag} says {max(lengths)}: give the "
            "value of white with levels= (--levels)"
        )
    number, inverted = count if lengths else 1, tags.get(_PHOTOMETRIC) == 0
    black, white = (
        value if isinstance(value, tuple) else (value,) * number for value in (low, high)
    )
    ranges = tuple(
        DeclaredRange(*pair, tag, inverted)
        if _is_range(*pair, bits)
        else DeclaredRange(white_is_zero=inverted)
        for pair in zip(black, white, strict=True)
    )
    return ranges if lengths else ranges[0]


def _is_range(low: Any, high: Any, bits: int) -> bool:
    """Return True if two tags are black and white, and not the bounds of the dtype."""
    usable = is_number(low) and is_number(high) and low < high
    return bool(usable) and not (low == 0 and high == 2**bits - 1 and bits in (16, 32))


def _describe_array(tags: Any, bits: Any, kind: Any, count: Any) -> str:
    """Describe the array to pass for a TIFF that Pillow does not decode.

    tifffile does not invert WhiteIsZero.
    """
    if not isinstance(bits, int) or kind not in _KINDS:
        return "the array"
    try:
        declared = _parse_range(tags, bits, kind, count) if bits > 8 else DeclaredRange()
    except ImageError:
        return "the array with levels=, the value of white"
    if isinstance(declared, tuple):
        return "the array as floats in 0..1, by the range that its tags say of each channel"
    low, white = _to_int(declared.low), {1: 2**bits - 1, 2: 2 ** (bits - 1) - 1, 3: 1}[kind]
    if declared.high is not None:
        white = _to_int(declared.high)
    array, inverted = "the array", tags.get(_PHOTOMETRIC) == 0
    if inverted:
        array = f"{low + white} - array, because 0 is white in it (WhiteIsZero)"
    needs_levels = declared.high is not None or (inverted and (bits, kind) == (8, 2))
    if not needs_levels or count > 4:  # bands keep their own numbers
        return array
    return f"{array}{',' * inverted} with levels={(low, white) if low else white}"


def _to_int(number: float) -> float:
    """Return an int for a whole number: some tags are stored as floats."""
    return int(number) if number == int(number) else number


def _single_value(value: Any) -> Any:
    """Return the single value of a tag that repeats it for each sample."""
    return value[0] if isinstance(value, tuple) and value and len(set(value)) == 1 else value
