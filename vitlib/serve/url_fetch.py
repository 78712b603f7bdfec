"""Fetch images by URL: from allowed hosts only, and never from a private network.

A URL is parsed, its host is resolved, every address is checked, and the connection is made to a
checked address. So a second look-up of the name cannot lead to another address (DNS rebinding). All
steps are repeated for a redirect.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from vitlib.serve.errors import RequestError

PORTS = {"http": 80, "https": 443}
MAX_REDIRECTS = 3
MAX_URL_LENGTH = 8192
_CHUNK = 64 * 1024
_REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class Fetcher:
    """Fetches images from allowed hosts.

    Attributes:
        hosts: Host names in lower case; "*.example.com" allows each name below it, "*" all. With
            ":8000" after it a host is allowed at this port, else at its scheme's own port.
        max_bytes: The largest number of bytes of an image.
        seconds: Time for a URL, redirects included.
        allow_private: True allows addresses that are not public, for a store in one's own network.
    """

    hosts: tuple[str, ...]
    max_bytes: int
    seconds: float = 5.0
    allow_private: bool = False

    def fetch(self, url: str) -> bytes:
        """Fetch an image.

        Args:
            url: The URL, of any content: it comes from a client.

        Returns:
            The bytes at the URL.

        Raises:
            RequestError: The URL is not allowed, or cannot be fetched.
        """
        deadline = time.monotonic() + self.seconds
        for _ in range(MAX_REDIRECTS + 1):
            parts = self.check(url)
            address = self._resolve(parts)
            answer = self._get(parts, address, deadline)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
        raise _url_error(f"more than {MAX_REDIRECTS} redirects")

    def check(self, url: str) -> SplitResult:
        """Check that a URL is allowed, without any look-up.

        Args:
            url: The URL.

        Returns:
            Its parts.

        Raises:
            RequestError: The URL is not allowed.
        """
        if not self.hosts:
            raise _url_error("photos by URL are not allowed here: send the image itself")
        if len(url) > MAX_URL_LENGTH or not url.isascii() or any(c <= " " for c in url):
            raise _url_error("not a URL of an image")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise _url_error("not a URL of an image") from None
        if parts.scheme not in PORTS or not parts.hostname:
            raise _url_error("expected a URL that starts with http:// or https://")
        if parts.username is not None or parts.password is not None:
            raise _url_error("a URL with a user's name or password in it is not fetched")
        if not self._allows(parts.hostname, port, PORTS[parts.scheme]):
            raise _url_error(f"photos from this host are not allowed here: {parts.hostname[:100]}")
        return parts

    def _allows(self, host: str, port: int | None, default_port: int) -> bool:
        """Return True if a host is allowed at a port."""
        port = default_port if port is None else port
        for entry in self.hosts:
            name, colon, number = entry.rpartition(":") if _has_port(entry) else (entry, "", "")
            if port != (int(number) if colon else default_port):
                continue
            if name in ("*", host) or (name.startswith("*.") and host.endswith(name[1:])):
                return True
        return False

    def _resolve(self, parts: SplitResult) -> str:
        """Return an address of the URL's host; refuse the host if any address is private."""
        host = parts.hostname
        assert host is not None
        try:
            entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise _url_error("the host of the URL is not known") from None
        addresses = [str(entry[4][0]).partition("%")[0] for entry in entries]
        if not self.allow_private and not all(map(is_public, addresses)):
            raise _url_error("the URL leads into a private network")
        return addresses[0]

    def _get(self, parts: SplitResult, address: str, deadline: float) -> bytes | str:
        """Return the bytes at an address, or the target of a redirect."""
        import urllib3

        host = parts.hostname
        assert host is not None
        left = deadline - time.monotonic()
        if left <= 0:
            raise _timeout_error(self.seconds)
        options: dict[str, Any] = {
            "timeout": urllib3.Timeout(total=left), "retries": False, "maxsize": 1
        }  # fmt: skip
        port = parts.port or PORTS[parts.scheme]
        # The certificate is for the name, not for the address.
        if parts.scheme == "https":
            options |= {"assert_hostname": host, "server_hostname": host}
            pool: Any = urllib3.HTTPSConnectionPool(address, port, **options)
        else:
            pool = urllib3.HTTPConnectionPool(address, port, **options)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        host_header = f"[{host}]" if ":" in host else host
        headers = {
            "Host": host_header if parts.port is None else f"{host_header}:{parts.port}",
            "Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "vitlib",
        }  # fmt: skip
        try:
            with pool:
                answer = pool.request(
                    "GET", target, headers=headers, redirect=False, preload_content=False,
                    decode_content=False,
                )  # fmt: skip
                try:
                    return self._read(answer, deadline)
                finally:
                    answer.close()
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            # A refused connection is a subclass of a timeout in urllib3, and is not one.
            timeout = urllib3.exceptions.TimeoutError
            refused = urllib3.exceptions.NewConnectionError
            if isinstance(error, timeout) and not isinstance(error, refused):
                raise _timeout_error(self.seconds) from None
            raise _url_error(f"the URL cannot be fetched ({type(error).__name__})") from None

    def _read(self, answer: Any, deadline: float) -> bytes | str:
        """Read an answer of bounded length and time; return the target of a redirect."""
        if answer.status in _REDIRECTS:
            return str(answer.headers.get("location", ""))
        if answer.status != 200:
            raise _url_error(f"the URL's server answers {answer.status}")
        parts: list[bytes] = []
        size = 0
        for chunk in _chunks(answer):
            size += len(chunk)
            if size > self.max_bytes:
                raise _url_error(f"the URL's image has more than {self.max_bytes} bytes")
            if time.monotonic() > deadline:
                raise _timeout_error(self.seconds)
            parts.append(chunk)
        return b"".join(parts)


def _chunks(answer: Any) -> Iterator[bytes]:
    """Yield data as they arrive, so that the caller can check the time in between."""
    while chunk := answer.read1(_CHUNK):
        yield chunk


def is_public(address: str) -> bool:
    """Return True for an address of the public internet.

    Args:
        address: An IPv4 or IPv6 address.

    Returns:
        False also for an IPv6 address that wraps a private IPv4 one (mapped, 6to4, Teredo, NAT64).
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        for inner in (ip.ipv4_mapped, ip.sixtofour, ip.teredo and ip.teredo[1]):
            if inner is not None and not is_public(str(inner)):
                return False
        # The last 32 bits of a NAT64 address are the IPv4 address (RFC 6052).
        if ip in _NAT64 and not is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))):
            return False
    return ip.is_global and not ip.is_multicast


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def _has_port(entry: str) -> bool:
    """Return True if an allowed host ends with a port; an IPv6 address has colons of its own."""
    return entry.rpartition(":")[2].isdecimal() and (entry.count(":") == 1 or "]" in entry)


def _url_error(message: str) -> RequestError:
    """Return the error of a URL that is not allowed or cannot be fetched."""
    return RequestError(400, "bad_url", message)


def _timeout_error(seconds: float) -> RequestError:
    """Return the error of a URL that takes too long."""
    return _url_error(f"the URL did not answer within {seconds:g} seconds")
