"""Requests that mean no good: over 40 kinds, each drawn anew, and what they may get."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Callable
from typing import Any

from PIL import Image
from serving import SAMPLES, form_of, text_of

PHOTOS = [path.read_bytes() for path in SAMPLES]
KIND = "Content-Type: application/json\r\n"
FORM = "Content-Type: multipart/form-data; boundary=xyz\r\n"
POST = b"POST /score HTTP/1.1\r\nHost: x\r\n"
INSIDE = (
    "http://127.0.0.1/x", "http://169.254.169.254/latest/meta-data", "http://localhost:22/",
    "http://[::1]/", "http://0x7f.1/", "gopher://x/", "https://photos.example/x",
)  # fmt: skip
PATHS = (
    "/page/../../../etc/passwd", "/page/%2e%2e/run.py", "//etc/passwd", "/page/app.js%00",
    "/..%5c..%5cx",
)  # fmt: skip
FILES = ("/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "C:\\windows\\win.ini")
DOCUMENTS = (b"%PDF-1.4\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"SIMPLE  =                    T")
QUERIES = ("top_k=x", "top_k=0", "threshold=9", "a=b", "on_error=x", "top_k=1e9")
TYPES = ("text/xml", "a/b", "application/x-python-pickle", "multipart/form-data")
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
NO_HTTP = (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\r\n\r\n\r\nhello\r\n\r\n")


def request(path: str, body: bytes, head: str = KIND, method: str = "POST") -> bytes:
    lines = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{head}"
    return lines.encode("latin-1") + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def score(given: Any) -> bytes:
    return request("/score", json.dumps(given).encode())


def photo(data: bytes) -> bytes:
    return request("/classify", data, "Content-Type: image/jpeg\r\n")


def jpeg(size: tuple[int, int] = (64, 48)) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def gif_of_many_frames() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("P", (200, 200), i) for i in range(50)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


GOOD = text_of(PHOTOS[0])
Draw = Callable[[random.Random], bytes]
HOSTILE: dict[str, tuple[Draw, set[int]]] = {
    "broken base64": (lambda r: score({"input_data": [GOOD[: r.randrange(1, 40)] + "*"]}), {400}),
    "base64 of noise": (lambda r: score({"input_data": [text_of(r.randbytes(300))]}), {400}),
    "a truncated JPEG": (lambda r: photo(jpeg()[: r.randrange(1, 600)]), {400}),
    "a PNG with its middle lost": (lambda r: photo(PHOTOS[0][: r.randrange(9, 60)]), {400}),
    "a JPEG with bytes flipped": (lambda r: photo(_flipped(jpeg(), r)), {200, 400}),
    "a bomb in base64": (lambda _: score({"input_data": [text_of(_bomb())]}), {400}),
    "a bomb": (lambda _: photo(_bomb()), {400}),
    "too many JSON values": (
        lambda _: request("/score", b'{"input_data":[' + b"0," * 300_000 + b"0]}"),
        {413},
    ),
    "deep JSON": (lambda r: request("/score", b"[" * r.randrange(1000, 50_000)), {400}),
    "JSON cut off": (
        lambda r: request(
            "/score", json.dumps({"input_data": [GOOD]}).encode()[: r.randrange(1, 200)]
        ),
        {400},
    ),
    "no UTF-8": (
        lambda r: request("/score", b'{"input_data":["\xff\xfe' + r.randbytes(9) + b'"]}'),
        {400},
    ),
    "numbers for images": (
        lambda r: score({"input_data": [r.random(), None, True, {}, []]}),
        {400},
    ),
    "input_data of another kind": (
        lambda r: score({"input_data": r.choice([3, None, True, 1e300])}),
        {400},
    ),
    "params of another kind": (
        lambda r: score(
            {"input_data": [GOOD], "params": r.choice([3, [], "x", {"top_k": -1}, {"x": 1}])}
        ),
        {400},
    ),
    "an index too short": (
        lambda _: score({"input_data": {"columns": ["image"], "index": [1, 2], "data": [GOOD]}}),
        {400},
    ),
    "too many images": (lambda r: score({"input_data": ["AAAA"] * r.randrange(21, 999)}), {413}),
    "an empty body": (lambda _: request("/score", b""), {400}),
    "an empty photo": (lambda _: photo(b""), {400}),
    "a body that is too long": (lambda _: request("/score", b"x" * (3 * 2**20)), {413}),
    "a length that is too long": (
        lambda r: POST + f"Content-Length: {10 ** r.randrange(8, 18)}\r\n\r\n".encode(),
        {413},
    ),
    "a length that is none": (
        lambda r: (
            POST + f"Content-Length: {r.choice(['-1', 'x', '1e3', '0x10', ''])}\r\n\r\n".encode()
        ),
        {400, 413},
    ),
    "two lengths": (lambda _: POST + b"Content-Length: 3\r\nContent-Length: 5\r\n\r\nabcde", {400}),
    "chunks that are none": (
        lambda _: (
            POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nabc\r\n0\r\n\r\n"
        ),
        {400},
    ),
    "a chunk without end": (
        lambda _: POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffff\r\n" + b"x" * (3 * 2**20),
        {413},
    ),
    "another content type": (
        lambda r: request("/score", b"x", f"Content-Type: {r.choice(TYPES)}\r\n"),
        {415},
    ),
    "another charset": (
        lambda _: request("/score", b"{}", "Content-Type: application/json; charset=utf-16\r\n"),
        {415},
    ),
    "a pickle": (
        lambda _: photo(b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94."),
        {400},
    ),
    "an SVG": (lambda _: photo(SVG), {400}),
    "a PDF, an EPS, a FITS": (lambda r: photo(r.choice(DOCUMENTS)), {400}),
    "a URL inside": (lambda r: score({"input_data": [r.choice(INSIDE)]}), {400}),
    "a file's name": (lambda r: score({"input_data": [r.choice(FILES)]}), {400}),
    "path tricks": (lambda r: request(r.choice(PATHS), b"", "", "GET"), {400, 404}),
    "another method": (
        lambda r: request(
            "/score", b"", "", r.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
        ),
        {405},
    ),
    "a method that is none": (
        lambda r: r.choice([b"FOO", b"G\x00T", b"get"]) + b" / HTTP/1.1\r\nHost: x\r\n\r\n",
        {400},
    ),
    "no HTTP": (
        lambda r: r.choice((*NO_HTTP, r.randbytes(200).replace(b"\n", b"") + b"\r\n\r\n")),
        {400},
    ),
    "another HTTP": (
        lambda r: f"GET / HTTP/{r.choice(['3.7', '2.0', 'x'])}\r\nHost: x\r\n\r\n".encode(),
        {200, 400},
    ),
    "headers without end": (lambda _: b"GET / HTTP/1.1\r\n" + b"X-A: " + b"a" * 300_000, {431}),
    "many headers": (
        lambda _: b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: a\r\n" % i for i in range(20_000)),
        {431},
    ),
    "a long path": (lambda _: b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n", {414, 431}),
    "a form without boundary": (
        lambda _: request("/classify", b"x", "Content-Type: multipart/form-data\r\n"),
        {400},
    ),
    "a form cut off": (
        lambda r: request("/classify", form_of(PHOTOS[0])[0][: r.randrange(1, 150)], FORM),
        {400},
    ),
    "a form of many files": (
        lambda _: request("/classify", form_of(*[b"x"] * 30)[0], FORM),
        {400, 413},
    ),
    "a query that is none": (
        lambda r: request(
            "/classify?" + r.choice(QUERIES), PHOTOS[0], "Content-Type: image/png\r\n"
        ),
        {400},
    ),
    "a GIF of many frames": (lambda _: photo(gif_of_many_frames()), {200}),
    "a TIFF that points at itself": (
        lambda r: photo(b"II*\x00\x08\x00\x00\x00" + struct.pack("<H", 9) + r.randbytes(120)),
        {400},
    ),
}


def _flipped(data: bytes, r: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(20):
        changed[r.randrange(len(changed))] = r.randrange(256)
    return bytes(changed)


def _bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, "PNG")  # 81 million pixels in 10 kB
    return file.getvalue()
