"""The time of a decode is bounded, and no honest photo is refused for it."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from fixtures.hostile_files import (
    bmp_of_runs,
    boxes_of,
    chunk,
    encode_image,
    gif_of,
    jpeg_of_scans,
    jpeg_of_segments,
    png_of_chunks,
    ppm_of_comments,
    segment,
    text_chunks,
    tiff_of,
    tiff_of_directories,
    webp_of_chunks,
)
from vitlib.errors import ImageError
from vitlib.image.decode import decode, open_header
from vitlib.image.decode_limits import LimitedFile, child, file, headers, is_slow, load_pixels
from vitlib.image.open_files import MAX_SIDE

RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(RNG.integers(0, 256, (40, 60, 3), np.uint8)).resize((240, 160))
MANY = 25_000

REFUSED = {
    "scans": lambda: jpeg_of_scans(2000, 300),
    "scans of a small image": lambda: jpeg_of_scans(8, headers.SCANS),
    "segments": lambda: jpeg_of_segments(b"\xff\xe5\0\2" * MANY),
    "fill bytes": lambda: jpeg_of_segments(b"\xff" * MANY),
    "Photoshop records": lambda: jpeg_of_segments(
        segment(0xED, b"Photoshop 3.0\0" + b"8BIM\0\0\0\0\0\0\0\0" * 3000)
    ),
    "runs": lambda: bmp_of_runs(100, b"\1\0" * 2**20),
    "comments in pixels": lambda: ppm_of_comments(MANY),
    "chunks of WebP": lambda: webp_of_chunks(MANY),
    "EXIF in parts": lambda: jpeg_of_segments(
        segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 150
    ),
    "long EXIF": lambda: png_of_chunks(before=chunk(b"eXIf", bytes(2**20 + 1))),
    "texts before": lambda: png_of_chunks(before=text_chunks(101)),
    "texts after": lambda: png_of_chunks(after=text_chunks(101)),
    "chunks": lambda: png_of_chunks(after=chunk(b"abCd", b"") * MANY),
    "comments": lambda: gif_of(b"!\xfe" + b"\1a" * MANY + b"\0"),
    "a long header": lambda: b"P5 " + b"#\n" * MANY + b"8 8 255\n" + bytes(64),
    "strips": lambda: tiff_of((1, 80_000), [b"a"] * 80_000, rows=1),
    "fractions": lambda: tiff_of(
        (8, 8), [bytes(64)], more=[(282, 5, MANY, struct.pack("<II", 1, 1) * MANY)]
    ),
    "directories": lambda: tiff_of_directories(1001),
    "a JPEG in TIFF": lambda: tiff_of((100, 100), [jpeg_of_scans(100, 80)], compression=7),
    "a huge tile": lambda: tiff_of(
        (16, 16), [zlib.compress(bytes(16))], compression=8, tile=(20_000, 20_000)
    ),
    "meta": lambda: boxes_of(b"meta", 2**16 + 8),
    "jp2h": lambda: boxes_of(b"jp2h", 2**20 + 8),
    "a side": lambda: encode_image(Image.new("1", (MAX_SIDE + 1, 1)), "PNG"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_decode_rejects_hostile_files(kind: str) -> None:
    data = REFUSED[kind]()
    begin = time.thread_time()
    with pytest.raises(ImageError, match=r"over|expected at most|scans|tiles|run lengths"):
        decode(data, 3)
    assert time.thread_time() - begin < 2  # of processor time; each took longer


HONEST = {
    "JPEG": {"quality": 90},
    "progressive": {"quality": 95, "progressive": True, "subsampling": 0},
    "PNG": {},
    "GIF": {},
    "BMP": {},
    "PPM": {},
    "WEBP": {"lossless": True, "quality": 10, "method": 0},
    "TIFF": {"compression": "tiff_lzw"},
    "JPEG2000": {},
    "AVIF": {"speed": 10},
}


@pytest.mark.parametrize("form", HONEST)
def test_decode_gives_pillows_pixels(form: str, tmp_path: Path) -> None:
    data = encode_image(PHOTO, "JPEG" if form == "progressive" else form, **HONEST[form])
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    path = tmp_path / "photo"
    path.write_bytes(data)
    for image in (data, path):
        (plane,) = decode(image, 3)
        assert np.array_equal(np.asarray(plane), expected)


@pytest.mark.parametrize(
    ("mode", "compression"),
    [("1", "group4"), ("L", "tiff_lzw"), ("P", "packbits"), ("I;16", "tiff_adobe_deflate"),
     ("F", "tiff_lzw"), ("RGBA", "tiff_lzw"), ("CMYK", "tiff_lzw"), ("LA", "tiff_lzw")],
)  # fmt: skip
@pytest.mark.parametrize("orientation", [1, 6])
def test_child_process_gives_pillows_pixels(mode: str, compression: str, orientation: int) -> None:
    if mode in ("I;16", "F"):
        kind = np.uint16 if mode == "I;16" else np.float32
        image = Image.fromarray(RNG.integers(0, 256, (30, 40)).astype(kind))
    else:
        image = PHOTO.convert(mode)
    data = encode_image(image, "TIFF", compression=compression, tiffinfo={274: orientation})
    here = Image.open(io.BytesIO(data))
    here.load()
    with open_header(data) as opened:
        there = load_pixels(opened)
    assert there is not opened
    assert (there.mode, there.size) == (here.mode, here.size)
    assert there.tobytes() == here.tobytes()
    assert there.getexif().get(274, 1) == here.getexif().get(274, 1)
    assert there.convert("RGB").tobytes() == here.convert("RGB").tobytes()


@pytest.mark.parametrize("magic", [b"P1", b"P2", b"P3", b"P5", b"P6"])
@pytest.mark.parametrize("most", [5, 255, 300, 4095, 65535])
def test_ppm_gives_pillows_pixels(magic: bytes, most: int) -> None:
    bands = 3 if magic in (b"P3", b"P6") else 1
    values = RNG.integers(0, (1 if magic == b"P1" else most) + 1, 7 * 5 * bands)
    head = magic + b" 7 5 #a comment\n" + (b"" if magic == b"P1" else b"%d\n" % most)
    if magic in (b"P5", b"P6"):
        body = values.astype(">u2" if most > 255 else "u1").tobytes()
    else:
        body = b" ".join(b"%d#c\n" % value if i % 5 == 4 else b"%d" % value
                         for i, value in enumerate(values))  # fmt: skip
        body = b"# first\r" + body + b"\n"
    here = Image.open(io.BytesIO(head + body))
    here.load()
    with open_header(head + body) as opened:
        there = load_pixels(opened)
    assert (there.mode, there.size) == (here.mode, here.size)
    assert there.tobytes() == here.tobytes()


@pytest.mark.parametrize(
    "body", [b"1 2 3", b"1 x 3 4", b"1 2 3 99999999999", b"1 2 3 9", b"-1 2 3 4"]
)
def test_ppm_that_is_damaged_is_refused(body: bytes) -> None:
    with pytest.raises(ImageError, match="damaged"):
        decode(b"P2 2 2 4\n" + body, 3)


def png_of_rows(
    height: int, rows: int, colour: int, depth: int, fill: int, *, adam7: bool
) -> bytes:
    """A PNG 8 pixels wide of `height` rows, of whose last lines there are fewer than it says."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = [8, 4, 4, 2, 2, 1, 1] if adam7 else []
    wide = [1, 1, 2, 2, 4, 4, 8]
    high = [-(-height // 8), -(-height // 8), -(-(height - 4) // 8), -(-height // 4),
            -(-(height - 2) // 4), -(-height // 2), height // 2]  # fmt: skip
    widths = (
        [w for w, h in zip(wide, high, strict=True) for _ in range(h)] if passes else [8] * height
    )
    lines = [b"\0" + bytes([fill]) * -(-w * depth * channels // 8) for w in widths]
    body = zlib.compress(b"".join(lines[: len(lines) + rows - height]))
    header = struct.pack(">IIBBBBB", 8, height, depth, colour, 0, 0, adam7)
    palette = chunk(b"PLTE", bytes(range(256)) * 3) if colour == 3 else b""
    half = len(body) // 2
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette
        + chunk(b"IDAT", body[:half]) + chunk(b"IDAT", body[half:]) + chunk(b"IEND", b"")
    )  # fmt: skip


KINDS = [(0, 1), (0, 8), (0, 16), (2, 8), (2, 16), (3, 4), (3, 8), (4, 8), (4, 16), (6, 8), (6, 16)]


@pytest.mark.parametrize("adam7", [False, True])
@pytest.mark.parametrize(("colour", "depth"), KINDS)
def test_png_whose_stream_ends_early_is_refused(colour: int, depth: int, adam7: bool) -> None:
    """Pillow reads the rows that are missing as black; 91 is the colour of the mark."""
    for fill in (0, 91, 255):
        for height in (1, 9, 40):
            whole = png_of_rows(height, height, colour, depth, fill, adam7=adam7)
            with Image.open(io.BytesIO(whole)) as opened:
                expected = np.asarray(opened.convert("RGB" if depth < 16 else opened.mode))
            planes = decode(whole, 3)
            if depth < 16:
                assert np.array_equal(np.asarray(planes[0]), expected)
            for rows in {height - 1, height // 2 + 1} - {0, height}:
                short = png_of_rows(height, rows, colour, depth, fill, adam7=adam7)
                with pytest.raises(ImageError, match=r"damaged or truncated \(not enough image"):
                    decode(short, 3)


def test_png_whose_stream_ends_early_is_read_where_pillow_is_told_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = png_of_rows(40, 30, 2, 8, 200, adam7=False)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    (plane,) = decode(short, 3)
    assert np.asarray(plane)[:, 0, 0].tolist() == [200] * 30 + [0] * 10


def test_animated_png_is_read_and_its_other_frames_stay() -> None:
    frames = [Image.new("RGB", (4, 4), (shade,) * 3) for shade in (91, 5)]
    frames[0].putpixel((0, 3), (91, 23, 187))  # the mark: the stream is counted
    data = encode_image(frames[0], "PNG", save_all=True, append_images=frames[1:])
    with open_header(data) as opened:
        assert load_pixels(opened).convert("RGB").tobytes() == frames[0].tobytes()
        opened.seek(1)
        assert opened.convert("RGB").getpixel((0, 0)) == (5, 5, 5)


@pytest.mark.parametrize("head", [b"P5 2 2 100\n", b"P5 2 2 1000\n", b"P6 2 1 100\n"])
def test_samples_of_a_pixmap_above_maxval_are_refused(head: bytes) -> None:
    deep, most = b"1000" in head, int(head.split()[-1])
    samples = np.array([0, 1, 2, most + 1, 3, 4][: 6 if b"P6" in head else 4])
    kind = ">u2" if deep else "u1"
    with pytest.raises(ImageError, match=f"outside 0..{most}|to {most + 1}: expected 0 to {most}"):
        decode(head + samples.astype(kind).tobytes(), 3)
    assert decode(head + samples.clip(max=most).astype(kind).tobytes(), 3)


def test_ppm_of_many_comments_is_read_at_once() -> None:
    data = b"P2 8 8 255\n" + b"#\n" * 9999 + b"7 " * 64
    (plane,) = decode(data, 1)
    assert set(plane.tobytes()) == {7}


def test_progressive_scans_of_encoders_pass() -> None:
    """20 scans of every component, as the finest progression that encoders search."""
    headers.check_scans(jpeg_of_scans(3000, 10, "RGB"))
    headers.check_scans(jpeg_of_scans(64, 500, "RGB"))  # little work, however many
    data = jpeg_of_scans(2000, 300)
    with pytest.raises(ImageError, match="save it anew"):
        headers.check_scans(data)
    headers.check_scans(data[:300] + data[-300:])  # damaged: Pillow's to tell


def test_slow_child_process_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_image(PHOTO.resize((1000, 1000)), "JPEG2000")
    monkeypatch.setattr(child, "WALL_FACTOR", 10_000)  # it ends itself
    with pytest.raises(ImageError, match="too long"):
        child.decode(data, "JPEG2000", 0.02)
    answer = child.decode(data, "JPEG2000", 60)  # another process takes its place
    assert answer is not None
    assert answer[0]["size"] == [1000, 1000]
    monkeypatch.setattr(child, "MAX_IDLE", 0)
    assert child.decode(data, "JPEG2000", 60) == answer
    assert not child._idle


def test_child_process_reports_damage() -> None:
    data = encode_image(PHOTO, "TIFF", compression="tiff_lzw")
    with pytest.raises(ImageError, match="damaged or truncated"):
        decode(data[:100] + b"\xff" * 9000 + data[9100:], 3)


def test_decode_without_child_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_idle", [])
    monkeypatch.setattr(child.sys, "executable", str(Path(os.devnull)))
    data = encode_image(PHOTO, "TIFF", compression="tiff_lzw")
    (plane,) = decode(data, 3)
    assert np.array_equal(np.asarray(plane), np.asarray(PHOTO))


def test_a_decode_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "LEEWAY", -1.0)
    with pytest.raises(ImageError, match="takes too long"):
        decode(encode_image(PHOTO, "PNG"), 3)


def test_is_slow_before_decode() -> None:
    cases = (
        (encode_image(PHOTO, "JPEG", progressive=True), False),
        (encode_image(Image.new("L", (5000, 4000)), "JPEG"), True),
        (jpeg_of_scans(2000, 100), True),
        (encode_image(PHOTO, "TIFF"), True),
        (b"P2 1 1 9\n1\n", True),
        (encode_image(PHOTO, "BMP"), False),
    )
    for data, expected in cases:
        with open_header(data) as opened:
            assert is_slow(opened) is expected


def test_training_skips_and_names_hostile_photo(tmp_path: Path) -> None:
    """The reader of finetune and the predictor of evaluate treat it as a damaged photo."""
    from vitlib import ImageProcessor
    from vitlib.train.loader.photos import PhotoReader

    path = tmp_path / "hostile.jpg"
    path.write_bytes(jpeg_of_scans(2000, 300))
    rule = ImageProcessor(size=(32, 32))
    read = PhotoReader([path, PHOTO], rule, (32, 32), None, 0, None).read
    why = read(0, 0, True)
    assert isinstance(why, str)
    assert "hostile.jpg" in why
    assert "scans" in why
    assert isinstance(read(0, 1, True), np.ndarray)


def test_limited_file_counts() -> None:
    limited = LimitedFile(io.BytesIO(b"abc"))
    assert (limited.size, limited.read(2), limited.tell()) == (3, b"ab", 2)
    for _ in range(file.HEAD_CALLS - 1):
        limited.seek(0)
    with pytest.raises(ImageError, match="metadata"):
        limited.seek(0)


def test_time_between_opening_and_decoding_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is the thread's: it runs on while the thread computes something else."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 8, 7)).save(data, "PNG")
    opened = open_header(data.getvalue())
    later = time.thread_time() + 100
    monkeypatch.setattr("vitlib.image.decode_limits.file.time.thread_time", lambda: later)
    assert not is_slow(opened)
    assert load_pixels(opened).getpixel((0, 0)) == (9, 8, 7)
