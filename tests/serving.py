"""A real `vitlib serve` for tests, and clients that speak HTTP as badly as asked."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

SAMPLES = sorted((Path(__file__).parents[1] / "vitlib/assets/demo/samples").glob("*.png"))


class Answer(NamedTuple):
    """What came back."""

    status: int
    body: bytes
    headers: Any

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Of an error, whose form is checked."""
        said = self.json()
        assert list(said) == ["error"]
        assert {"code", "message", "index"} <= set(said["error"])
        assert "Traceback" not in self.body.decode()
        return said["error"]["code"]  # type: ignore[no-any-return]


class Server:
    """The process, its address, and requests to it."""

    def __init__(self, *options: Any, model: str = "demo") -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in end()
        command = [sys.executable, "-m", "vitlib", "serve", "--model", model, "--port", "0"]
        self.process = subprocess.Popen([*command, *map(str, options)], stderr=self.log)
        try:
            self.address = self._address()
            self.until_ready()
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self.end()

    def said(self) -> str:
        """On stderr."""
        self.log.seek(0)
        return self.log.read()

    def _address(self) -> tuple[str, int]:
        until = time.monotonic() + 60
        while time.monotonic() < until and self.process.poll() is None:
            if "http://" in self.said():
                host, _, port = self.said().split("http://")[1].split()[0].rpartition(":")
                return host, int(port)
            time.sleep(0.02)
        raise AssertionError(f"no server: {self.said()}")

    def until_ready(self) -> None:
        until = time.monotonic() + 60
        while self.get("/ready").status != 200:
            assert time.monotonic() < until, self.said()
            time.sleep(0.02)

    def end(self) -> int:
        """SIGTERM, then the exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            if not self.log.closed:
                self.last_words = self.said()
                self.log.close()

    def ask(
        self, path: str, body: bytes | None = None, kind: str | None = None, **headers: str
    ) -> Answer:
        """A whole request by Python's own client."""
        host, port = self.address
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if kind is not None:
            named["Content-Type"] = kind
        request = urllib.request.Request(f"http://{host}:{port}{path}", data=body, headers=named)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer.status, answer.read(), answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.read(), error.headers)

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask(path, **headers)

    def post(self, path: str, given: Any, **headers: str) -> Answer:
        """JSON."""
        return self.ask(path, json.dumps(given).encode(), "application/json", **headers)

    def photo(self, path: str, data: bytes, **headers: str) -> Answer:
        return self.ask(path, data, "image/png", **headers)

    def raw(self, *parts: bytes | float, wait: float = 30) -> bytes:
        """Bytes on a socket, with pauses where a number stands -> all that comes back."""
        with socket.create_connection(self.address, timeout=wait) as sock:
            try:
                for part in parts:
                    if isinstance(part, bytes):
                        sock.sendall(part)
                    else:
                        time.sleep(part)
            except OSError:
                pass  # the server has hung up: what it said is what counts
            found = b""
            try:
                while chunk := sock.recv(65536):
                    found += chunk
            except ConnectionError:
                pass
            return found


def status_of(raw: bytes) -> int:
    return int(raw.split(b" ", 2)[1]) if raw.startswith(b"HTTP/1.1 ") else 0


def form_of(*photos: bytes, boundary: str = "xyz") -> tuple[bytes, str]:
    """A multipart form -> its body and content type."""
    parts = b"".join(
        b"--%b\r\nContent-Disposition: form-data; name=\"f%d\"; filename=\"%d.png\"\r\n"
        b"Content-Type: image/png\r\n\r\n%b\r\n" % (boundary.encode(), i, i, photo)
        for i, photo in enumerate(photos)
    )  # fmt: skip
    whole = parts + b"--%b--\r\n" % boundary.encode()
    return whole, f"multipart/form-data; boundary={boundary}"


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()
