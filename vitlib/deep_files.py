"""Image files deeper than 8 bits: all of their bits, and what the file says of their range.

Pillow decodes grayscale of 12, 16 and 32 bits and floats, but cuts 16-bit colour to 8 bits. Its
decoders take the high or the low byte of each sample, as the raw mode says; here a second pass
reads the byte that the first one leaves out. Portable pixmaps are read from their bytes.

Shapes: H W height and width in pixels, C channels.
"""

from __future__ import annotations

import io
import sys
import warnings
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from vitlib.config import is_number
from vitlib.decode_limits import LimitedFile, load_pixels, open_limited
from vitlib.decode_limits.ppm import numbers
from vitlib.depth import Declared, Samples
from vitlib.errors import ImageError

# Raw modes of 16-bit colour whose other byte is read by the second one.
_BYTES = {
    f"{mode};16{a}": f"{mode};16{b}" for mode in ("RGB", "RGBA", "RGBX") for a, b in ("LB", "BL")
}
_BYTES |= {k[:-1] + "N": k[:-1] + ("B" if sys.byteorder == "little" else "L") for k in [*_BYTES]}
_GRAY_ALPHA = "LA;16B"  # of PNG; as RGBA of 8 bits it is both bytes of gray, then of alpha
_CHUNKS = 1000  # of a PNG that are looked through for sBIT
_KINDS = {1: "unsigned integers", 2: "signed integers", 3: "floats"}
# TIFF tags
_BITS, _PHOTOMETRIC, _COUNT, _MAX, _PLANAR, _FORMAT = 258, 262, 277, 281, 284, 339
_SMIN, _SMAX = 340, 341


class Decoded(NamedTuple):
    """A decoded image."""

    image: Image.Image  # itself, or a copy with its pixels; of 16-bit colour they are cut to 8
    samples: Samples | None = None  # (H, W, C) of an image deeper than 8 bits
    declared: Declared = Declared()


def samples_of(image: Image.Image, *, ranged: bool) -> Decoded:
    """Decode an image, within the bounds of decode_limits.

    Args:
        image: as Image.open gives it; once it is loaded, the bits that Pillow cut away are gone.
        ranged: whether the range that the file says is wanted.

    Raises:
        ImageError: samples that Pillow takes for others, or of which the file says two things.
        Whatever Pillow raises for damaged files.
    """
    raw_mode, codec = _raw_mode(image)
    if image.format == "PPM" and codec and image.mode in ("I", "RGB"):
        pixmap = _of_pixmap(image, codec)
        if pixmap is not None:
            return pixmap
    declared = _of_tiff(image) if _is_tiff(image) else Declared()
    significant = None
    if ranged and image.format == "PNG" and ";16" in raw_mode:
        significant = _significant_bits(image.fp)  # type: ignore[attr-defined]
    again, source = None, image
    if raw_mode in _BYTES or raw_mode == _GRAY_ALPHA:
        again = _opened_again(image)
    own = isinstance(getattr(image, "fp", None), LimitedFile)
    # Pillow maps an uncompressed TIFF that it opened by its path, and then forgets to turn it.
    mapped = _is_tiff(image) and bool(raw_mode)
    if not own and (again is not None or significant is not None or mapped):
        source = _opened_again(image)  # a caller's image stays unloaded: it may come once more
        _keep_in_memory(image)
    loaded, samples = load_pixels(source), None
    if again is not None:
        samples = _both_bytes(loaded, again, raw_mode)
    elif loaded.mode == "F" or loaded.mode.startswith("I"):
        samples = _as_stored(np.asarray(loaded), image)[:, :, None]
    if significant is not None and samples is not None:
        declared = _scaled_as_declared(samples, significant)
    return Decoded(loaded, samples, declared)


def turned(samples: Samples, orientation: int) -> Samples:
    """Samples (H, W, C) upright, as EXIF's orientation says."""
    if orientation in (5, 6, 7, 8):  # rows are columns
        samples = samples.transpose(1, 0, 2)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    across = -1 if orientation in (2, 3, 6, 7) else 1
    return samples[::down, ::across]


def undecoded_tiff(file: BinaryIO | LimitedFile) -> str | None:
    """Describe a TIFF that Pillow does not open; None for a file that is none."""
    head = file.read(8)
    if head[:4] in (b"II+\0", b"MM\0+"):
        head += file.read(8)
    elif head[:4] not in (b"II*\0", b"MM\0*"):
        return None
    from PIL import TiffImagePlugin  # of many modules, and few images are TIFF

    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)  # type: ignore[arg-type]
        kind = _KINDS.get(_one(tags.get(_FORMAT, 1)), "an unknown kind")
        bits, count = _one(tags.get(_BITS, 1)), _one(tags.get(_COUNT, 1))
        return f"a TIFF of {count} samples a pixel, {kind} of {bits} bits"
    except Exception:  # a damaged one
        return None


def _raw_mode(image: Image.Image) -> tuple[str, str]:
    """How Pillow is about to unpack an image, and its codec; ("", "") once it is loaded."""
    tiles = getattr(image, "tile", None)  # an image that no file was opened for has none
    if not tiles:
        return "", ""
    args = tiles[0].args
    return str(args if isinstance(args, str) else args[0] if args else ""), tiles[0].codec_name


def _both_bytes(loaded: Image.Image, again: Image.Image, raw_mode: str) -> Samples:
    """16-bit samples of colour, or of gray with alpha, (H, W, C) uint16."""
    if raw_mode == _GRAY_ALPHA:
        pairs = np.asarray(load_pixels(again, "RGBA"))
        high, low = pairs[:, :, :1], pairs[:, :, 1:2]
    else:
        high, low = np.asarray(loaded), np.asarray(load_pixels(again, _BYTES[raw_mode]))
    samples: Samples = high.astype(np.uint16) << 8 | low
    return samples


def _opened_again(image: Any) -> Image.Image:
    """The same frame of the same file, not loaded either, and bounded as it is."""
    position = image.fp.tell()
    image.fp.seek(0)
    data = io.BytesIO(image.fp.read())
    image.fp.seek(position)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its size, which was bounded when it was first opened
        if isinstance(image.fp, LimitedFile):
            again = open_limited(data, [image.format])
        else:
            again = Image.open(data, formats=[image.format])
    if image.tell():
        again.seek(image.tell())
    return again


def _keep_in_memory(image: Any) -> None:
    """Have an image that Pillow opened by its path read from memory, and close the file, as a load
    would have done."""
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


def _as_stored(samples: Samples, image: Any) -> Samples:
    """Samples (H, W) of a gray image, in the dtype that its file has."""
    if image.mode == "I" and _is_tiff(image):
        bits, kind = (_one(image.tag_v2.get(tag, 1)) for tag in (_BITS, _FORMAT))
        if kind == 1 and bits == 32:
            return samples.view(np.uint32)
        if kind == 2 and bits == 16:
            return samples.astype(np.int16)
    return samples


def _of_pixmap(image: Any, codec: str) -> Decoded | None:
    """Samples of a PGM or PPM deeper than 8 bits, which Pillow would rescale; None for others."""
    tile = image.tile[0]
    most = tile.args[1] if isinstance(tile.args, tuple) else 65535 if image.mode == "I" else 255
    if most <= 255:
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
    return Decoded(image, shaped, Declared(0, most, "maxval"))


def _is_tiff(image: Image.Image) -> bool:
    """Return whether an image is a TIFF with its tags; a copy of one has none."""
    return image.format == "TIFF" and hasattr(image, "tag_v2")


def _of_tiff(image: Any) -> Declared:
    """What the tags of a TIFF say of samples deeper than 8 bits."""
    tags = image.tag_v2
    bits, kind, count = (_one(tags.get(tag, 1)) for tag in (_BITS, _FORMAT, _COUNT))
    if kind == 2 and bits == 8:
        raise ImageError(
            "a TIFF of signed integers of 8 bits: read it with tifffile and give the array with "
            "levels= (--levels), a window such as (-128, 127)"
        )
    if bits <= 8:
        return Declared()
    if count > 1 and tags.get(_PLANAR, 1) == 2:
        raise ImageError(
            f"a TIFF of {count} separate planes of {bits} bits, which Pillow does not decode: read "
            "it with tifffile and give the array"
        )
    low, high, tag = 0.0, None, ""
    if _SMIN in tags and _SMAX in tags:
        low, high, tag = _one(tags[_SMIN]), _one(tags[_SMAX]), "SMinSampleValue and SMaxSampleValue"
    elif _MAX in tags:
        high, tag = _one(tags[_MAX]), "MaxSampleValue"
    elif bits not in (16, 32) and kind == 1:
        high, tag = 2**bits - 1, "BitsPerSample"
    usable = is_number(low) and is_number(high) and low < high  # type: ignore[operator]
    if not usable or (low == 0 and high == 2**bits - 1 and bits in (16, 32)):
        low, high, tag = 0.0, None, ""
    return Declared(low, high, tag, tags.get(_PHOTOMETRIC) == 0)


def _one(value: Any) -> Any:
    """The value of a tag that has one for each sample, all alike."""
    return value[0] if isinstance(value, tuple) and value and len(set(value)) == 1 else value


def _significant_bits(file: BinaryIO) -> int | None:
    """The bits that sBIT says a PNG's samples had before they were stored; None without one."""
    position = file.tell()
    try:
        file.seek(8)
        for _ in range(_CHUNKS):
            head = file.read(8)
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if len(head) < 8 or kind in (b"IDAT", b"IEND"):
                return None
            if kind == b"sBIT":
                # One number of gray, three of colour; then alpha's.
                bits = set(file.read(min(length, 4))[: 3 if length >= 3 else 1])
                only = bits.pop() if len(bits) == 1 else 0
                return only if 8 < only < 16 else None
            file.seek(length + 4, io.SEEK_CUR)
        return None
    finally:
        file.seek(position)


def _scaled_as_declared(samples: Samples, bits: int) -> Declared:
    """The range of 16-bit PNG samples of which sBIT says that fewer bits are significant.

    PNG has a writer scale them to 16 bits: shifted to the left, with zeros or their own high bits
    below. Some writers store them as they are.
    """
    if not samples.any():
        return Declared()
    most, shift = 2**bits - 1, 16 - bits
    below = (samples & np.uint16(2**shift - 1)).astype(np.int32)
    scaled = not below.any() or bool((np.abs(below - (samples >> bits)) <= 1).all())
    if not scaled:
        return Declared(0, most, "sBIT")
    if samples.max() > most:
        return Declared()
    raise ImageError(
        f"sBIT says {bits} bits, and the samples, up to {samples.max()}, may be scaled to 16 bits "
        f"or not: give the value of white with levels= (--levels), 65535 or {most}"
    )
