"""Tests of the access log: one line for each request, without secrets and control characters."""

from __future__ import annotations

import re
import socket

import pytest

from fixtures.hostile_requests import PHOTOS
from fixtures.server import Server
from vitlib.serve.access_log import describe_path, log_request

LINE = re.compile(
    r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) (\S+) (\S+) (\S+) (\d+) (\d+\.\d) ms (\d+) bytes"
)


def test_server_logs_each_request_once() -> None:
    with Server("--access-log") as server:
        length = len(server.photo("/classify?top_k=2", PHOTOS[0]).body)
        server.get("/nothing?signature=SECRET", Authorization="Bearer SECRET")
        server.photo("/embed", b"no photo")
        server.raw(b"\x16\x03\x01 no HTTP\r\n\r\n")
        server.end()
    lines = [match.groups() for match in LINE.finditer(server.final_log)]
    lines = [line for line in lines if line[3] != "/ready"]
    assert [line[1:5] for line in lines] == [
        ("127.0.0.1", "POST", "/classify?top_k=2", "200"),
        ("127.0.0.1", "GET", "/nothing?...", "404"),
        ("127.0.0.1", "POST", "/embed", "400"),
        ("127.0.0.1", "-", "-", "400"),
    ]
    assert int(lines[0][6]) == length
    assert float(lines[0][5]) > 0
    assert "SECRET" not in server.final_log


def test_server_logs_refused_connection() -> None:
    with Server("--access-log", "--max-connections", 1) as server:
        with socket.create_connection(server.address):
            assert server.photo("/classify", PHOTOS[0]).status == 429
        server.end()
    lines = [match.groups() for match in LINE.finditer(server.final_log)]
    assert ("POST", "/classify", "429") in [line[2:5] for line in lines]


def test_server_logs_nothing_by_default() -> None:
    with Server() as server:
        server.photo("/classify", PHOTOS[0])
        server.end()
    assert not LINE.search(server.final_log)


@pytest.mark.parametrize(
    ("path", "query", "expected"),
    [
        (b"/classify", b"", "/classify"),
        (b"/attend", b"method=mask&class=a%20b", "/attend?method=mask&class=a%20b"),
        (b"/attend", b"key=SECRET&class=1", "/attend?class=1&..."),
        (b"/attend", b"SECRET", "/attend?..."),
        (b"/a", b"class=%0aSECRET%1b", "/a?class=%0ASECRET%1B"),
        (b"/" + b"a" * 999, b"", "/" + "a" * 199),
    ],
)
def test_path_has_no_secrets(path: bytes, query: bytes, expected: str) -> None:
    assert describe_path(path, query) == expected


def test_line_escapes_control_characters(caplog: pytest.LogCaptureFixture) -> None:
    path = describe_path(b"/\x1b[31m\nforged\xe2\x80\xae\x9b", b"")
    with caplog.at_level("INFO", logger="vitlib.access"):
        log_request(("192.0.2.7", 1), "GET", path, 404, 0.0123, 5)
        log_request(None, "GET", "/", 200, 0, 0)
    first, second = caplog.messages
    assert first.endswith("192.0.2.7 GET /\\x1b[31m\\nforged\\u202e\\x9b 404 12.3 ms 5 bytes")
    assert LINE.fullmatch(first)
    assert " - GET / 200 " in second
