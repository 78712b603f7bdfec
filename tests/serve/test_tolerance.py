"""Requests as clients really write them, and what costs a server time: one server for all."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from fixtures.hostile_files import jpeg_of_scans, saved

pytest.importorskip("fastapi", reason="serving needs pip install 'vitlib[serve]'")

from fixtures.server import SAMPLES, Answer, Server, text_of
from vitlib.batch.inputs.items import Base64
from vitlib.errors import ConfigError
from vitlib.image.base64_text import parse_base64
from vitlib.serve.settings import Settings

PHOTO = SAMPLES[0].read_bytes()
ORIGIN = "https://pages.example"
JSON = "application/json"


@pytest.fixture(scope="module")
def silent() -> Iterator[socket.socket]:
    """A store of photos that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture(scope="module")
def server(silent: socket.socket) -> Iterator[Server]:
    options = (
        "--allow-origin", ORIGIN, "--allow-origin", "http://localhost:3000", "--max-body-mib", 2,
        "--allow-urls", f"127.0.0.1:{silent.getsockname()[1]}", "--allow-private-urls",
        "--drain-timeout", 1,
    )  # fmt: skip
    with Server(*options) as started:
        yield started


@pytest.fixture(scope="module")
def expected(server: Server) -> Any:
    answer = server.photo("/classify", PHOTO)
    assert answer.status == 200
    return answer.json()["predictions"][0][0]["label"]


def label_of(answer: Answer) -> Any:
    assert answer.status == 200, answer.body
    said = answer.json()
    return (said["predictions"] if isinstance(said, dict) else said)[0][0]["label"]


def scored(server: Server, text: str, **more: Any) -> Answer:
    return server.post("/score", {"input_data": [text], "params": {"format": "azure-v2"}, **more})


PLAIN = base64.b64encode(PHOTO).decode()
SAFE = base64.urlsafe_b64encode(PHOTO).decode()
TEXTS = {
    "without padding": PLAIN.rstrip("="),
    "URL-safe": SAFE,
    "URL-safe without padding": SAFE.rstrip("="),
    "lines": base64.encodebytes(PHOTO).decode().replace("\n", "\r\n"),
    "white space around": f" \t\n{PLAIN}\n ",
    "white space in the padding": PLAIN.rstrip("=") + " = = "[: 2 * PLAIN.count("=")],
    "a data URL": f"data:image/png;base64,{PLAIN}",
    "a data URL of another type": f"data:application/octet-stream;base64,{PLAIN}",
    "a data URL without type": f"data:;base64,{PLAIN}",
    "a data URL with parameters": f"data:image/png;name=a b.png;BASE64,\n {PLAIN}",
    "a data URL, percent-encoded": "data:image/png;base64,"
    + PLAIN.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D"),
    "a data URL after white space": f"\n  DATA:image/png;base64 ,{SAFE}",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_base64_is_read_as_clients_write_it(kind: str) -> None:
    assert parse_base64(TEXTS[kind]) == PHOTO
    assert Base64(TEXTS[kind]).read() == PHOTO  # of `vitlib batch`
    for length in range(1, 7):
        data = bytes(range(250, 250 + min(length, 6)))
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            assert parse_base64(encode(data).decode().rstrip("=")) == data


@pytest.mark.parametrize(
    "text", ["A", "AAAAA", "AA===", "A*==", "é", "data:image/png,abc", "\ud800"]
)
def test_base64_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="base64"):
        parse_base64(text)


def test_score_takes_base64_of_every_kind(server: Server, expected: str) -> None:
    for kind in ("URL-safe without padding", "a data URL, percent-encoded"):
        assert label_of(scored(server, TEXTS[kind])) == expected


@pytest.mark.parametrize("kind", [
    "", "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded",
    "text/plain", JSON, "multipart/form-data", "image/jpeg; charset=binary", "text/csv", "x",
])  # fmt: skip
def test_a_photo_is_known_by_its_bytes(server: Server, expected: str, kind: str) -> None:
    body = b"POST /classify HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    body += f"Content-Type: {kind}\r\n".encode() if kind else b""
    raw = server.raw(body + b"Content-Length: %d\r\n\r\n" % len(PHOTO) + PHOTO)
    assert raw.startswith(b"HTTP/1.1 200"), raw[:300]
    assert json.loads(raw.split(b"\r\n\r\n", 1)[1])["predictions"][0][0]["label"] == expected


@pytest.mark.parametrize("form", ["JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF"])
def test_a_photo_of_every_format_needs_no_type(server: Server, form: str) -> None:
    data = saved(Image.new("RGB", (40, 30), (200, 30, 30)), form)
    assert server.ask("/classify", data, "application/octet-stream").status == 200


def test_what_is_no_photo_is_told(server: Server) -> None:
    for kind, code in (("image/png", "bad_image"), ("text/plain", "bad_image"),
                       ("text/xml", "unsupported_media_type")):  # fmt: skip
        answer = server.ask("/classify", b"no photo at all", kind)
        assert answer.status in (400, 415)
        assert answer.code == code


@pytest.mark.parametrize("kind", [JSON, "application/octet-stream", "text/plain", ""])
@pytest.mark.parametrize("route", ["/score", "/classify"])
def test_json_with_a_byte_order_mark_is_read(
    server: Server, expected: str, kind: str, route: str
) -> None:
    params = {"params": {"format": "azure-v2"}} if route == "/score" else {}
    body = b"\xef\xbb\xbf" + json.dumps({"input_data": [PLAIN], **params}).encode()
    assert label_of(server.ask(route, body, kind)) == expected
    answer = server.ask(route, json.dumps({}).encode("utf-16"), JSON)
    assert (answer.status, answer.code) == (400, "bad_request")
    assert "UTF-8" in answer.json()["error"]["message"]


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


ENCODED = {
    "gzip": [gzip.compress(PHOTO), gzip.compress(PHOTO[:99]) + gzip.compress(PHOTO[99:])],
    "X-GZip": [gzip.compress(PHOTO)],
    "deflate": [zlib.compress(PHOTO), raw_deflate(PHOTO)],
    "identity": [PHOTO],
}


def test_a_compressed_body_is_read(server: Server, expected: str) -> None:
    for name, bodies in ENCODED.items():
        for body in bodies:
            answer = server.ask("/classify", body, "image/png", Content_Encoding=name)
            assert label_of(answer) == expected
    body = gzip.compress(json.dumps({"input_data": [PLAIN]}).encode())
    assert server.ask("/score", body, JSON, Content_Encoding="gzip").status == 200


@pytest.mark.parametrize(
    ("name", "body", "status", "code"),
    [
        ("gzip", gzip.compress(bytes(3 * 2**20)), 413, "too_large"),  # 3 kB
        ("deflate", zlib.compress(bytes(3 * 2**20)), 413, "too_large"),
        ("gzip", gzip.compress(b"") * 2000, 400, "bad_request"),
        ("gzip", PHOTO, 400, "bad_request"),
        ("gzip", gzip.compress(PHOTO)[:-20], 400, "bad_request"),
        ("gzip", b"", 400, "bad_request"),
        ("deflate", b"\xff\xff\xff", 400, "bad_request"),
        ("br", PHOTO, 415, "unsupported_encoding"),
        ("gzip, gzip", PHOTO, 415, "unsupported_encoding"),
    ],
)
def test_a_body_that_cannot_be_decompressed_is_refused(
    server: Server, name: str, body: bytes, status: int, code: str
) -> None:
    answer = server.ask("/classify", body, "image/png", Content_Encoding=name)
    assert (answer.status, answer.code) == (status, code)
    if status == 415:
        assert answer.headers["accept-encoding"] == "gzip, deflate, identity"


def test_pages_of_an_allowed_origin_may_read_answers(server: Server) -> None:
    preflight = server.raw(
        b"OPTIONS /classify HTTP/1.1\r\nHost: x\r\nConnection: close\r\nOrigin: "
        + ORIGIN.encode() + b"\r\nAccess-Control-Request-Method: POST\r\n"
        b"Access-Control-Request-Headers: content-type, x-api-key\r\n\r\n"
    ).lower()  # fmt: skip
    assert preflight.startswith(b"http/1.1 200")
    assert b"access-control-allow-origin: https://pages.example\r\n" in preflight
    assert b"x-api-key" in preflight.split(b"access-control-allow-headers:")[1].split(b"\r\n")[0]
    for answer in (
        server.photo("/classify", PHOTO, Origin=ORIGIN),
        server.photo("/classify", b"none", Origin=ORIGIN),
        server.get("/nothing", Origin="http://localhost:3000"),
        server.get("/score", Origin=ORIGIN),
    ):
        assert answer.headers["access-control-allow-origin"] in (ORIGIN, "http://localhost:3000")
    for other in ("https://evil.example", ORIGIN + ".evil.example", "null"):
        answer = server.photo("/classify", PHOTO, Origin=other)
        assert answer.headers["access-control-allow-origin"] is None


@pytest.mark.parametrize(
    "origin", ["pages.example", "https://pages.example/", "https://a.example/x", "https://A", ""]
)
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="expected an origin"):
        Settings(allow_origins=(origin,))
    Settings(
        allow_origins=("*", "https://a.example", "http://[::1]:8000", "chrome-extension://abc")
    )


def test_a_hostile_photo_is_refused_for_itself_alone(server: Server) -> None:
    hostile = jpeg_of_scans(3000, 500)
    answer = server.photo("/classify", hostile)
    assert (answer.status, answer.code) == (400, "bad_image")
    assert "scans" in answer.json()["error"]["message"]
    given = {"input_data": [text_of(hostile), PLAIN], "params": {"on_error": "null"}}
    first, second = server.post("/score", given).json()
    assert first["error"]["code"] == "bad_image"
    assert len(second["probs"]) > 1
    # A slow format goes to its own thread and process, beside a fast one.
    slow = saved(Image.new("RGB", (300, 300)), "JPEG2000")
    answers = server.post("/score", {"input_data": [text_of(slow), PLAIN]}).json()
    assert len(answers) == 2


def test_a_lone_surrogate_is_an_answer(server: Server) -> None:
    for body in (
        b'{"input_data": ["\\ud800"]}', b'{"\\ud800": 1}', b'{"input_data": [], "\\ud800": 1}',
        b'{"input_data": ["A"], "params": {"\\udfff": 1}}', b'["\\udc80"]',
    ):  # fmt: skip
        answer = server.ask("/score", body, JSON)
        assert answer.status == 400
        assert answer.code.startswith("bad")


def test_a_part_of_a_form_that_is_no_file_is_told(server: Server) -> None:
    """Neither a photo without a filename nor a parameter is dropped beside the photos."""
    part = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    photo = part % (b"image", b'; filename="a.png"', PHOTO)
    for other in (part % (b"top_k", b"", b"3"), part % (b"second", b"", b"a photo")):
        body = photo + other + b"--x--\r\n"
        head = b"POST /classify HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        head += b"Content-Type: multipart/form-data; boundary=x\r\n"
        raw = server.raw(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert raw.startswith(b"HTTP/1.1 400"), raw[:300]
        assert b"is no file" in raw


def test_a_drain_that_runs_out_of_time_answers(server: Server, silent: socket.socket) -> None:
    """The last test: it ends the server."""
    answers: list[Answer] = []

    def ask() -> None:
        answers.append(scored(server, f"http://127.0.0.1:{silent.getsockname()[1]}/photo.png"))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    server.process.terminate()
    for thread in threads:
        thread.join()
    silent.close()  # else the server's own threads wait 5 seconds for it
    assert server.end() == 0
    assert [(one.status, one.code) for one in answers] == [(503, "ending")] * 3
    assert all(int(one.headers["retry-after"]) >= 1 for one in answers)
    assert "Traceback" not in server.last_words
