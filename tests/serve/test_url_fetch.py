"""Tests of fetching images by URL: allowed hosts, limits, and private networks."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("urllib3", reason="serving needs pip install 'vitlib[serve]'")

from vitlib.serve import url_fetch
from vitlib.serve.errors import RequestError
from vitlib.serve.url_fetch import Fetcher, is_public

PHOTO = bytes(range(256)) * 40


class Store(BaseHTTPRequestHandler):
    """A server of photos that can fail in many ways."""

    requests: tuple[tuple[str, str], ...] = ()

    def do_GET(self) -> None:
        type(self).requests += ((self.path, self.headers["Host"]),)
        port = self.server.server_address[1]
        path, _, _ = self.path.partition("?")
        moves = {
            "/moved": f"http://127.0.0.1:{port}/photo",
            "/relative": "/photo?from=there",
            "/elsewhere": f"http://elsewhere.example:{port}/photo",
            "/metadata": "http://169.254.169.254/latest/meta-data",
            "/file": "file:///etc/passwd",
            "/nowhere": "",
            "/loop": "/loop",
        }
        if path in moves:
            self.send_response(302)
            self.send_header("Location", moves[path])
            self.end_headers()
        elif path == "/photo":
            self.send_response(200)
            self.send_header("Content-Length", str(len(PHOTO)))
            self.end_headers()
            self.wfile.write(PHOTO)
        elif path == "/endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(1000):
                self.wfile.write(PHOTO)
        elif path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(20):
                self.wfile.write(b"x")
                time.sleep(0.1)
        elif path == "/silent":
            time.sleep(2)
        elif path == "/zipped":
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(PHOTO)
        else:
            self.send_response(404)
            self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Write no log."""


@pytest.fixture
def store() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # of clients that disconnect
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def make_fetcher(*hosts: str, **more: Any) -> Fetcher:
    settings: dict[str, Any] = {"max_bytes": 100_000, "seconds": 1.0, "allow_private": True, **more}
    return Fetcher(hosts=hosts, **settings)


def refusal_of(fetcher: Fetcher, url: str) -> str:
    with pytest.raises(RequestError) as caught:
        fetcher.fetch(url)
    assert (caught.value.status, caught.value.code) == (400, "bad_url")
    return caught.value.message


def test_fetch_photo(store: str) -> None:
    fetcher = make_fetcher(store)
    assert fetcher.fetch(f"http://{store}/photo") == PHOTO
    assert fetcher.fetch(f"http://{store}/photo?a=b&c") == PHOTO
    assert Store.requests[-1] == ("/photo?a=b&c", store)


def test_fetch_follows_redirects_to_allowed_hosts(store: str) -> None:
    fetcher = make_fetcher(store)
    assert fetcher.fetch(f"http://{store}/moved") == PHOTO
    assert fetcher.fetch(f"http://{store}/relative") == PHOTO


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("elsewhere", "not allowed here: elsewhere.example"),
        ("metadata", "not allowed here: 169.254.169.254"),
        ("file", "http:// or https://"),
        ("loop", "redirects"),
        ("absent", "answers 404"),
        ("endless", "more than 100000 bytes"),
        ("slow", "within 1 seconds"),
        ("silent", "within 1 seconds"),
    ],
)
def test_fetch_rejects_answer(store: str, path: str, message: str) -> None:
    start = time.monotonic()
    assert message in refusal_of(make_fetcher(store), f"http://{store}/{path}")
    assert time.monotonic() - start < 2


def test_fetch_does_not_decompress(store: str) -> None:
    data = make_fetcher(store).fetch(f"http://{store}/zipped")
    assert data == PHOTO  # a decompression bomb stays small


def test_fetch_rejects_refused_connection() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        assert "cannot be fetched" in refusal_of(
            make_fetcher(f"*:{port}"), f"http://127.0.0.1:{port}/x"
        )


def test_fetch_rejects_private_addresses(store: str) -> None:
    """The store is refused where addresses must be public, although its name is allowed."""
    fetcher = make_fetcher(store, "*", allow_private=False)
    before = len(Store.requests)
    for url in (
        f"http://{store}/photo", "http://localhost/x", "http://127.1/x", "http://2130706433/x",
        "http://0x7f000001/x", "http://0/x", "http://10.0.0.1/x", "http://192.168.1.1/x",
        "http://172.16.0.1/x", "http://169.254.169.254/latest", "http://[::1]/x",
        "http://[::ffff:127.0.0.1]/x", "http://[fe80::1]/x", "http://[fc00::1]/x",
        "http://[64:ff9b::7f00:1]/x", "http://[2002:7f00:1::]/x", "http://100.64.0.1/x",
        "http://224.0.0.1/x", "http://255.255.255.255/x",
    ):  # fmt: skip
        message = refusal_of(fetcher, url)
        assert "private network" in message or "not known" in message, url
    assert len(Store.requests) == before


def test_fetch_rejects_redirect_to_private_address(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first host counts as public; the target of its redirect does not."""
    port = store.rpartition(":")[2]
    monkeypatch.setattr(url_fetch, "is_public", lambda address: address == "127.0.0.1")
    fetcher = make_fetcher("*", f"*:{port}", allow_private=False)
    assert fetcher.fetch(f"http://{store}/photo") == PHOTO
    assert "private network" in refusal_of(fetcher, f"http://{store}/metadata")


def test_fetch_connects_to_the_checked_address(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is resolved once, so that its second address (DNS rebinding) is never used."""
    port = int(store.rpartition(":")[2])
    resolved = []

    def look_up(host: str, *_: Any, **__: Any) -> list[Any]:
        resolved.append(host)
        address = "127.0.0.1" if len(resolved) == 1 else "10.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr(url_fetch.socket, "getaddrinfo", _only(look_up, "photos.example"))
    fetcher = make_fetcher(f"photos.example:{port}")
    assert fetcher.fetch(f"http://photos.example:{port}/photo") == PHOTO
    assert resolved == ["photos.example"]
    assert Store.requests[-1] == ("/photo", f"photos.example:{port}")


def _only(replaced: Any, host: str) -> Any:
    own = socket.getaddrinfo
    return lambda name, *rest, **more: (replaced if name == host else own)(name, *rest, **more)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://photos.example/x", "gopher://photos.example/x", "http:///x", "http://",
        "https://user@photos.example/x", "http://a:b@photos.example/x", "http://photos.example:99999/x",
        "http://photos.example:x/x", "http://photos.example/a b", "http://photos.example/\n",
        "http://photos.example/" + "a" * 9000, "http://photös.example/x", "http://[::1/x",
        "http://photos.example:8080/x", "http://evil.example/photos.example",
        "http://photos.example.evil.example/x", "http://xphotos.example/x",
    ],
)  # fmt: skip
def test_fetch_rejects_url(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_fetch.socket, "getaddrinfo", _never)
    refusal_of(make_fetcher("photos.example"), url)


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("a host was resolved up")


def test_check_allows_hosts_and_ports() -> None:
    below = make_fetcher("*.example.com", "here:8000")
    for url in ("http://a.example.com/x", "https://a.b.example.com/x", "http://here:8000/x",
                "HTTP://A.Example.COM/x"):  # fmt: skip
        assert below.check(url).hostname
    for url in ("http://example.com/x", "http://badexample.com/x", "http://here/x",
                "https://a.example.com:444/x", "http://a.example.com:443/x"):  # fmt: skip
        with pytest.raises(RequestError):
            below.check(url)


def test_fetch_rejects_every_host_by_default() -> None:
    assert "not allowed here" in refusal_of(make_fetcher(), "http://photos.example/x")


def test_is_public() -> None:
    for address in ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(address), address
    for address in ("127.0.0.1", "10.1.2.3", "::1", "fe80::1", "0.0.0.0", "::", "ff02::1",
                    "192.0.2.1", "198.18.0.1", "64:ff9b::a00:1"):  # fmt: skip
        assert not is_public(address), address
