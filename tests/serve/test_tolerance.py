"""Tests of requests in the variants of real clients, and of costly images, by one server."""

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

from fixtures.hostile_files import encode_image, jpeg_of_scans

pytest.importorskip("fastapi", reason="serving needs pip install 'vitlib[serve]'")

from fixtures.server import SAMPLES, Response, Server, encode_base64
from vitlib.batch.inputs.items import Base64
from vitlib.errors import ConfigError
from vitlib.image.base64_text import parse_base64
from vitlib.serve.settings import Settings

PHOTO = SAMPLES[0].read_bytes()
ORIGIN = "https://pages.example"
JSON = "application/json"


@pytest.fixture(scope="module")
def silent() -> Iterator[socket.socket]:
    """A server of photos that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture(scope="module")
def server(silent: socket.socket) -> Iterator[Server]:
    options = (
        # The second is the older name of the option.
        "--cors-origin", ORIGIN, "--allow-origin", "http://localhost:3000", "--max-body-mib", 2,
        "--allow-urls", f"127.0.0.1:{silent.getsockname()[1]}", "--allow-private-urls",
        "--drain-timeout", 1,
    )  # fmt: skip
    with Server(*options) as running:
        yield running


@pytest.fixture(scope="module")
def photo_label(server: Server) -> Any:
    answer = server.photo("/classify", PHOTO)
    assert answer.status == 200
    return answer.json()["predictions"][0][0]["label"]


def first_label(answer: Response) -> Any:
    assert answer.status == 200, answer.body
    payload = answer.json()
    return (payload["predictions"] if isinstance(payload, dict) else payload)[0][0]["label"]


def post_score(server: Server, text: str, **more: Any) -> Response:
    return server.post("/score", {"input_data": [text], "params": {"format": "azure-v2"}, **more})


STANDARD = base64.b64encode(PHOTO).decode()
URL_SAFE = base64.urlsafe_b64encode(PHOTO).decode()
TEXTS = {
    "without padding": STANDARD.rstrip("="),
    "URL-safe": URL_SAFE,
    "URL-safe without padding": URL_SAFE.rstrip("="),
    "lines": base64.encodebytes(PHOTO).decode().replace("\n", "\r\n"),
    "white space around": f" \t\n{STANDARD}\n ",
    "white space in the padding": STANDARD.rstrip("=") + " = = "[: 2 * STANDARD.count("=")],
    "a data URL": f"data:image/png;base64,{STANDARD}",
    "a data URL of another type": f"data:application/octet-stream;base64,{STANDARD}",
    "a data URL without type": f"data:;base64,{STANDARD}",
    "a data URL with parameters": f"data:image/png;name=a b.png;BASE64,\n {STANDARD}",
    "a data URL, percent-encoded": "data:image/png;base64,"
    + STANDARD.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D"),
    "a data URL after white space": f"\n  DATA:image/png;base64 ,{URL_SAFE}",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_base64_variant_is_decoded(kind: str) -> None:
    assert parse_base64(TEXTS[kind]) == PHOTO
    assert Base64(TEXTS[kind]).read() == PHOTO  # as `vitlib batch` reads it
    for length in range(1, 7):
        data = bytes(range(250, 250 + min(length, 6)))
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            assert parse_base64(encode(data).decode().rstrip("=")) == data


@pytest.mark.parametrize(
    "text", ["A", "AAAAA", "AA===", "A*==", "é", "data:image/png,abc", "\ud800"]
)
def test_invalid_base64_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="base64"):
        parse_base64(text)


def test_score_accepts_base64_variants(server: Server, photo_label: str) -> None:
    for kind in ("URL-safe without padding", "a data URL, percent-encoded"):
        assert first_label(post_score(server, TEXTS[kind])) == photo_label


@pytest.mark.parametrize("kind", [
    "", "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded",
    "text/plain", JSON, "multipart/form-data", "image/jpeg; charset=binary", "text/csv", "x",
    "image/*", "text/html; charset=utf-16",
])  # fmt: skip
def test_photo_is_detected_by_its_bytes(server: Server, photo_label: str, kind: str) -> None:
    body = b"POST /classify HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    body += f"Content-Type: {kind}\r\n".encode() if kind else b""
    raw = server.raw(body + b"Content-Length: %d\r\n\r\n" % len(PHOTO) + PHOTO)
    assert raw.startswith(b"HTTP/1.1 200"), raw[:300]
    assert json.loads(raw.split(b"\r\n\r\n", 1)[1])["predictions"][0][0]["label"] == photo_label


@pytest.mark.parametrize("form", ["JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF"])
def test_photo_of_any_format_needs_no_content_type(server: Server, form: str) -> None:
    data = encode_image(Image.new("RGB", (40, 30), (200, 30, 30)), form)
    assert server.request("/classify", data, "application/octet-stream").status == 200


def test_body_that_is_no_photo_is_refused(server: Server) -> None:
    for kind, code in (("image/png", "bad_image"), ("text/plain", "bad_image"),
                       ("text/xml", "unsupported_media_type")):  # fmt: skip
        answer = server.request("/classify", b"no photo at all", kind)
        assert answer.status in (400, 415)
        assert answer.code == code
        assert "expected " in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", [JSON, "text/csv", "image/png", "x", ""])
def test_photo_to_score_is_sent_to_classify(server: Server, kind: str) -> None:
    answer = server.request("/score", PHOTO, kind)
    assert (answer.status, answer.code) == (415, "unsupported_media_type")
    assert "photos go to /classify" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", [JSON, "application/octet-stream", "text/plain", ""])
@pytest.mark.parametrize("route", ["/score", "/classify"])
def test_json_with_byte_order_mark_is_parsed(
    server: Server, photo_label: str, kind: str, route: str
) -> None:
    params = {"params": {"format": "azure-v2"}} if route == "/score" else {}
    body = b"\xef\xbb\xbf" + json.dumps({"input_data": [STANDARD], **params}).encode()
    assert first_label(server.request(route, body, kind)) == photo_label
    answer = server.request(route, json.dumps({}).encode("utf-16"), JSON)
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


def test_compressed_body_is_accepted(server: Server, photo_label: str) -> None:
    for name, bodies in ENCODED.items():
        for body in bodies:
            answer = server.request("/classify", body, "image/png", Content_Encoding=name)
            assert first_label(answer) == photo_label
    body = gzip.compress(json.dumps({"input_data": [STANDARD]}).encode())
    assert server.request("/score", body, JSON, Content_Encoding="gzip").status == 200


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
def test_invalid_compressed_body_is_refused(
    server: Server, name: str, body: bytes, status: int, code: str
) -> None:
    answer = server.request("/classify", body, "image/png", Content_Encoding=name)
    assert (answer.status, answer.code) == (status, code)
    if status == 415:
        assert answer.headers["accept-encoding"] == "gzip, deflate, identity"


@pytest.mark.parametrize("kind", [None, "image/png", JSON])
def test_empty_body_may_become_a_photo_or_json(server: Server, kind: str | None) -> None:
    answer = server.request("/classify", b"", kind)
    assert (answer.status, answer.code) == (400, "bad_request")
    assert b"the body is empty: expected a photo or JSON" in answer.body


def test_cors_headers_name_allowed_origins(server: Server) -> None:
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
def test_settings_reject_invalid_origin(origin: str) -> None:
    with pytest.raises(ConfigError, match="expected an origin"):
        Settings(allow_origins=(origin,))
    Settings(
        allow_origins=("*", "https://a.example", "http://[::1]:8000", "chrome-extension://abc")
    )


def test_hostile_photo_fails_alone(server: Server) -> None:
    hostile = jpeg_of_scans(3000, 500)
    answer = server.photo("/classify", hostile)
    assert (answer.status, answer.code) == (400, "bad_image")
    assert "scans" in answer.json()["error"]["message"]
    payload = {"input_data": [encode_base64(hostile), STANDARD], "params": {"on_error": "null"}}
    first, second = server.post("/score", payload).json()
    assert first["error"]["code"] == "bad_image"
    assert len(second["probs"]) > 1
    # A slow format is decoded by its own thread and process, a fast one by the usual threads.
    slow = encode_image(Image.new("RGB", (300, 300)), "JPEG2000")
    answers = server.post("/score", {"input_data": [encode_base64(slow), STANDARD]}).json()
    assert len(answers) == 2


def test_lone_surrogate_gets_400(server: Server) -> None:
    for body in (
        b'{"input_data": ["\\ud800"]}', b'{"\\ud800": 1}', b'{"input_data": [], "\\ud800": 1}',
        b'{"input_data": ["A"], "params": {"\\udfff": 1}}', b'["\\udc80"]',
    ):  # fmt: skip
        answer = server.request("/score", body, JSON)
        assert answer.status == 400
        assert answer.code.startswith("bad")


def test_form_part_is_detected_by_its_bytes(server: Server, photo_label: str) -> None:
    """A part may have another content type and no filename: curl -F 'a=<cat.jpg' sends none."""
    head = b'--x\r\nContent-Disposition: form-data; name="a"'
    for rest in (b"", b"\r\nContent-Type: text/plain", b'; filename="a.txt"',
                 b'; filename="a"\r\nContent-Type: application/json'):  # fmt: skip
        body = head + rest + b"\r\n\r\n" + PHOTO + b"\r\n--x--\r\n"
        answer = server.request("/classify", body, "multipart/form-data; boundary=x")
        assert first_label(answer) == photo_label


def test_form_part_without_filename_is_refused(server: Server) -> None:
    """Text without a filename is refused instead of dropped."""
    part = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    photo = part % (b"image", b'; filename="a.png"', PHOTO)
    for other in (part % (b"top_k", b"", b"3"), part % (b"second", b"", b"a photo")):
        body = photo + other + b"--x--\r\n"
        head = b"POST /classify HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        head += b"Content-Type: multipart/form-data; boundary=x\r\n"
        raw = server.raw(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert raw.startswith(b"HTTP/1.1 400"), raw[:300]
        assert b"is not a file" in raw


def test_requests_get_503_after_drain_timeout(server: Server, silent: socket.socket) -> None:
    """This test is the last answer, because it ends the server."""
    answers: list[Response] = []

    def send() -> None:
        answers.append(post_score(server, f"http://127.0.0.1:{silent.getsockname()[1]}/photo.png"))

    threads = [threading.Thread(target=send) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    server.process.terminate()
    for thread in threads:
        thread.join()
    silent.close()  # else the server's threads wait 5 seconds for its answer
    assert server.end() == 0
    assert [(answer.status, answer.code) for answer in answers] == [(503, "ending")] * 3
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
    assert "Traceback" not in server.final_log
