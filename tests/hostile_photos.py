"""Image files that cost much more time than bytes, for tests (small) and benchmarks (25 MiB).

Each maker takes how much: scans, chunks, or bytes. They are written by hand where no encoder would.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence

from PIL import Image


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    """An image as an encoder writes it."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    """A marker segment of a JPEG."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg_of_scans(side: int, more: int, mode: str = "L") -> bytes:
    """A progressive JPEG whose last scan is there `more` times again."""
    data = saved(Image.new(mode, (side, side)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * more + b"\xff\xd9"


def jpeg_of_segments(segments: bytes, side: int = 8) -> bytes:
    """A JPEG with segments before all others."""
    data = saved(Image.new("L", (side, side)), "JPEG")
    return data[:2] + segments + data[2:]


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of_chunks(before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG of 8x8 pixels with chunks before or after its pixels."""
    head = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(72)))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", head) + before + pixels + after + chunk(b"IEND", b"")


def broken_texts(count: int) -> bytes:
    """Compressed texts of nearly 1 MiB whose checksum is wrong, which nothing adds up."""
    body = b"k\0\0" + zlib.compress(bytes(2**20 - 100))[:-4] + b"abcd"
    return chunk(b"zTXt", body) * count


def gif_of(extensions: bytes) -> bytes:
    """A GIF of 2x2 pixels with extensions before them."""
    head = b"GIF89a" + struct.pack("<HHBBB", 2, 2, 0x80, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 0, 0, 2, 2, 0) + b"\x02\x03\x44\x02\x05\x00"
    return head + extensions + frame + b";"


def bmp_of_runs(side: int, runs: bytes) -> bytes:
    """A BMP of 8 bits whose pixels are run-length codes."""
    start = 14 + 40 + 1024
    head = struct.pack(
        "<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(runs), 0, 0, 256, 0
    ) + bytes(1024)  # fmt: skip
    return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + head + runs


def ppm_of_comments(count: int) -> bytes:
    """An ASCII PGM whose pixels are comments."""
    return b"P2 2000 2000 255\n" + b"#\n" * count


Entry = tuple[int, int, int, bytes]  # tag, type, count, value


def tiff_of(
    size: tuple[int, int],
    strips: Sequence[bytes],
    *,
    compression: int = 1,
    rows: int = 0,
    tile: tuple[int, int] | None = None,
    more: Sequence[Entry] = (),
) -> bytes:
    """A gray TIFF of strips or tiles; those that are one object are written once."""
    offsets, body, starts = [], b"", {}
    for strip in strips:
        if id(strip) not in starts:
            starts[id(strip)] = len(body)
            body += strip
        offsets.append(starts[id(strip)])
    count = len(strips)
    lengths = struct.pack(f"<{count}I", *map(len, strips))

    def long(tag: int, value: int) -> Entry:
        return tag, 4, 1, struct.pack("<I", value)

    def entries(start: int) -> list[Entry]:
        places = struct.pack(f"<{count}I", *(start + offset for offset in offsets))
        found = [
            long(256, size[0]), long(257, size[1]), long(258, 8), long(259, compression),
            long(262, 1), long(277, 1), *more,
        ]  # fmt: skip
        if tile is not None:
            found += [long(322, tile[0]), long(323, tile[1])]
            return [*found, (324, 4, count, places), (325, 4, count, lengths)]
        found.append(long(278, rows or size[1]))
        return [*found, (273, 4, count, places), (279, 4, count, lengths)]

    empty = _tiff_directory(entries(0))
    return _tiff_directory(entries(len(empty))) + body


def _tiff_directory(entries: Sequence[Entry]) -> bytes:
    at = 8 + 2 + 12 * len(entries) + 4
    lines, values = b"", b""
    for tag, kind, count, value in sorted(entries):
        lines += struct.pack("<HHI", tag, kind, count)
        if len(value) <= 4:
            lines += value.ljust(4, b"\0")
        else:
            lines += struct.pack("<I", at + len(values))
            values += value
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return head + lines + struct.pack("<I", 0) + values


def tiff_of_directories(count: int) -> bytes:
    """A TIFF with many empty directories after its own."""
    data = bytearray(saved(Image.new("L", (8, 8)), "TIFF"))
    (start,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, start)
    at = len(data)
    struct.pack_into("<I", data, start + 2 + 12 * entries, at)
    for number in range(count):
        following = at + 6 * (number + 1) if number < count - 1 else 0
        data += struct.pack("<HI", 0, following)
    return bytes(data)


def boxes_of(kind: bytes, size: int) -> bytes:
    """An AVIF or JPEG 2000 file whose box `kind` holds boxes of nothing."""
    inner = struct.pack(">I4s", 8, b"free") * (size // 8)
    box = struct.pack(">I4s", 8 + len(inner), kind) + inner
    if kind == b"jp2h":
        return b"\0\0\0\x0cjP  \r\n\x87\n" + struct.pack(">I4s4s", 12, b"ftyp", b"jp2 ") + box
    return struct.pack(">I4s4sI4s", 20, b"ftyp", b"avif", 0, b"mif1") + box


def of_mib(mib: float) -> dict[str, Callable[[], bytes]]:
    """The kinds, each a file of about `mib` MiB where bytes cost time, or less."""
    size = int(mib * 2**20)
    rational = (282, 5, size // 8, struct.pack("<II", 1, 1) * (size // 8))
    one = zlib.compress(bytes(1))
    return {
        "JPEG, 3,000 scans": lambda: jpeg_of_scans(9000, 3000),
        "JPEG, colour, 3,000 scans": lambda: jpeg_of_scans(7000, 3000, "RGB"),
        "JPEG, as many scans as pass": lambda: jpeg_of_scans(7000, 24, "RGB"),
        "JPEG, a million empty segments": lambda: jpeg_of_segments(b"\xff\xe5\0\2" * (size // 4)),
        "JPEG, fill bytes": lambda: jpeg_of_segments(b"\xff" * size),
        "JPEG, EXIF in parts": lambda: jpeg_of_segments(
            segment(0xE1, b"Exif\0\0" + bytes(60_000)) * (size // 60_000)
        ),
        "JPEG, Photoshop records": lambda: jpeg_of_segments(
            segment(0xED, b"Photoshop 3.0\0" + b"8BIM\0\0\0\0\0\0\0\0" * 5000) * (size // 60_000)
        ),
        "PNG, texts before": lambda: png_of_chunks(before=broken_texts(size // 1100)),
        "PNG, texts after": lambda: png_of_chunks(after=broken_texts(size // 1100)),
        "PNG, chunks before": lambda: png_of_chunks(before=chunk(b"abCd", b"") * (size // 12)),
        "PNG, chunks after": lambda: png_of_chunks(after=chunk(b"abCd", b"") * (size // 12)),
        "PNG, empty IDAT": lambda: png_of_chunks(before=chunk(b"IDAT", b"") * (size // 12)),
        "GIF, comments": lambda: gif_of(b"!\xfe" + b"\1a" * (size // 2) + b"\0"),
        "GIF, extensions": lambda: gif_of(b"!\xf9\4\0\0\0\0\0" * (size // 8)),
        "GIF, no blocks": lambda: gif_of(bytes(size)),
        "BMP, runs of one": lambda: bmp_of_runs(2000, b"\1\0" * (size // 2)),
        "BMP, deltas": lambda: bmp_of_runs(7000, b"\0\2\xff\0" * (size // 4)),
        "PPM, comments": lambda: ppm_of_comments(size // 2),
        "PPM, a long header": lambda: b"P5 " + b"#\n" * (size // 2) + b"8 8 255\n" + bytes(64),
        "PPM, ASCII": lambda: b"P3 1000 700 255\n" + b"0 " * (size // 2),
        "PPM, rescaled": lambda: b"P5 7000 3500 5\n" + bytes(7000 * 3500),
        "TIFF, strips of a pixel": lambda: tiff_of(
            (1, size // 9), [b"a"] * (size // 9), rows=1
        ),
        "TIFF, compressed strips of a pixel": lambda: tiff_of(
            (1, size // 9), [one] * (size // 9), rows=1, compression=8
        ),
        "TIFF, fractions": lambda: tiff_of((8, 8), [bytes(64)], more=[rational]),
        "TIFF, directories": lambda: tiff_of_directories(size // 6),
        "TIFF, JPEG of 80 scans": lambda: tiff_of(
            (7000, 7000), [jpeg_of_scans(7000, 80)], compression=7
        ),
        "TIFF, 50 times a JPEG of 80 scans": lambda: tiff_of(
            (1000, 50_000), [jpeg_of_scans(1000, 80)] * 50, compression=7, rows=1000
        ),
        "TIFF, a huge tile": lambda: tiff_of(
            (16, 16), [zlib.compress(bytes(400_000_000), 1)], compression=8, tile=(20_000, 20_000)
        ),
        "AVIF, a long meta": lambda: boxes_of(b"meta", size),
        "JPEG 2000, boxes": lambda: boxes_of(b"jp2h", size),
        "JPEG 2000, tiles of 16": lambda: saved(
            Image.new("L", (7000, 7000)), "JPEG2000", tile_size=(32, 32)
        ),
        "WebP, chunks": lambda: webp_of_chunks(size // 8),
        "WebP, frames": lambda: _animated("WEBP", 2000),
        "GIF, frames": lambda: _animated("GIF", 2000),
    }  # fmt: skip


def webp_of_chunks(count: int) -> bytes:
    """A WebP of 8x8 pixels with empty chunks after them."""
    body = saved(Image.new("RGB", (8, 8)), "WEBP", exif=b"Exif\0\0II*\0")[12:]
    body += b"abcd\0\0\0\0" * count
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def _animated(form: str, count: int) -> bytes:
    frames = [Image.new("RGB", (64, 64), (i % 256, i // 256, 7)) for i in range(count)]
    return saved(frames[0], form, save_all=True, append_images=frames[1:])
