"""Photos that a request names by URL: from allowed hosts alone, and never from a private network.

A URL is looked at, its host looked up, each address checked, and the connection made to that very
address, so that a name cannot lead elsewhere after it was checked; and all again for a redirect.
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
MOST_REDIRECTS = 3
LONGEST_URL = 8192
_CHUNK = 64 * 1024
_REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class Fetcher:
    """What may be fetched.

    hosts: names as they stand in URLs, in small letters; "*.example.com" allows each name below it,
    "*" all; with ":8000" after it a host is allowed at this port, else at its scheme's own.
    private: also from addresses that are not public, for a store in one's own network.
    """

    hosts: tuple[str, ...]
    max_bytes: int
    seconds: float = 5.0  # for all of it
    private: bool = False

    def fetch(self, url: str) -> bytes:
        """A URL -> its bytes. Raises RequestError."""
        until = time.monotonic() + self.seconds
        for _ in range(MOST_REDIRECTS + 1):
            parts = self.checked(url)
            address = self._address(parts)
            found = self._get(parts, address, until)
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise _refused(f"more than {MOST_REDIRECTS} redirects")

    def checked(self, url: str) -> SplitResult:
        """The parts of a URL that may be fetched. Raises RequestError."""
        if not self.hosts:
            raise _refused("photos by URL are not allowed here: send the image itself")
        if len(url) > LONGEST_URL or not url.isascii() or any(c <= " " for c in url):
            raise _refused("not a URL of an image")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise _refused("not a URL of an image") from None
        if parts.scheme not in PORTS or not parts.hostname:
            raise _refused("expected a URL that starts with http:// or https://")
        if parts.username is not None or parts.password is not None:
            raise _refused("a URL with a user's name or password in it is not fetched")
        if not self._allows(parts.hostname, port, PORTS[parts.scheme]):
            raise _refused(f"photos from this host are not allowed here: {parts.hostname[:100]}")
        return parts

    def _allows(self, host: str, port: int | None, own: int) -> bool:
        port = own if port is None else port
        for entry in self.hosts:
            name, colon, number = entry.rpartition(":") if _has_port(entry) else (entry, "", "")
            if port != (int(number) if colon else own):
                continue
            if name in ("*", host) or (name.startswith("*.") and host.endswith(name[1:])):
                return True
        return False

    def _address(self, parts: SplitResult) -> str:
        """An address of the URL's host, where all of them may be asked."""
        host = parts.hostname
        assert host is not None
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise _refused("the host of the URL is not known") from None
        addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
        if not self.private and not all(map(is_public, addresses)):
            raise _refused("the URL leads into a private network")
        return addresses[0]

    def _get(self, parts: SplitResult, address: str, until: float) -> bytes | str:
        """The bytes, or where a redirect leads."""
        import urllib3

        host = parts.hostname
        assert host is not None
        left = until - time.monotonic()
        if left <= 0:
            raise _late(self.seconds)
        options: dict[str, Any] = {
            "timeout": urllib3.Timeout(total=left), "retries": False, "maxsize": 1
        }  # fmt: skip
        port = parts.port or PORTS[parts.scheme]
        if parts.scheme == "https":  # the certificate must be the name's, not the address's
            options |= {"assert_hostname": host, "server_hostname": host}
            pool: Any = urllib3.HTTPSConnectionPool(address, port, **options)
        else:
            pool = urllib3.HTTPConnectionPool(address, port, **options)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        named = f"[{host}]" if ":" in host else host
        headers = {
            "Host": named if parts.port is None else f"{named}:{parts.port}",
            "Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "vitlib",
        }  # fmt: skip
        try:
            with pool:
                answer = pool.request(
                    "GET", target, headers=headers, redirect=False, preload_content=False,
                    decode_content=False,
                )  # fmt: skip
                try:
                    return self._taken(answer, until)
                finally:
                    answer.close()
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            late, none = urllib3.exceptions.TimeoutError, urllib3.exceptions.NewConnectionError
            if isinstance(error, late) and not isinstance(error, none):  # none is a kind of late
                raise _late(self.seconds) from None
            raise _refused(f"the URL cannot be fetched ({type(error).__name__})") from None

    def _taken(self, answer: Any, until: float) -> bytes | str:
        if answer.status in _REDIRECTS:
            return str(answer.headers.get("location", ""))
        if answer.status != 200:
            raise _refused(f"the URL's server answers {answer.status}")
        parts: list[bytes] = []
        size = 0
        for chunk in _chunks(answer):
            size += len(chunk)
            if size > self.max_bytes:
                raise _refused(f"the URL's image has more than {self.max_bytes} bytes")
            if time.monotonic() > until:
                raise _late(self.seconds)
            parts.append(chunk)
        return b"".join(parts)


def _chunks(answer: Any) -> Iterator[bytes]:
    """What is there, as it comes: a slow server's time is looked at between them."""
    while chunk := answer.read1(_CHUNK):
        yield chunk


def is_public(address: str) -> bool:
    """Whether an address is one of the open internet, also where IPv6 wraps an IPv4 one."""
    one = ipaddress.ip_address(address)
    if isinstance(one, ipaddress.IPv6Address):
        for inner in (one.ipv4_mapped, one.sixtofour, one.teredo and one.teredo[1]):
            if inner is not None and not is_public(str(inner)):
                return False
        if one in _NAT64 and not is_public(str(ipaddress.IPv4Address(int(one) & 0xFFFFFFFF))):
            return False
    return one.is_global and not one.is_multicast


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def _has_port(entry: str) -> bool:
    return entry.rpartition(":")[2].isdecimal() and (entry.count(":") == 1 or "]" in entry)


def _refused(message: str) -> RequestError:
    return RequestError(400, "bad_url", message)


def _late(seconds: float) -> RequestError:
    return _refused(f"the URL did not answer within {seconds:g} seconds")
