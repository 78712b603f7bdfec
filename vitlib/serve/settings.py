"""Settings of a server: frozen dataclasses that check themselves."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

from vitlib.errors import ConfigError

MIB = 2**20
_HOST = re.compile(
    r"(\*|(\*\.)?[^\s*/@:\[\]?#]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?"
)  # a name, *.NAME, * or [IPv6], with or without a port
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\sA-Z/?#\[\]@:,]+)(:[0-9]{1,5})?")


def limit(default: int, low: int, high: int, help_text: str) -> Any:
    """Return a dataclass field with bounds and a help text, from which the option is made too.

    Args:
        default: The default.
        low: The smallest value.
        high: The largest value.
        help_text: The help of the command line's option.

    Returns:
        The field.
    """
    return field(default=default, metadata={"low": low, "high": high, "help": help_text})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server; each is an option of `vitlib serve`, with the help text given here.

    Attributes:
        max_batch: Images of a batch.
        max_wait_ms: Milliseconds that an image waits for others that are being decoded.
        max_backlog_ms: Milliseconds of work that are accepted ahead; beyond it requests get 429.
        max_queue: Images that are accepted ahead, however long they take.
        max_body_mib: MiB of one body.
        max_pending_mib: MiB of the bodies of all requests that are not answered.
        max_images: Images of one request.
        max_pixels: Pixels of one encoded image.
        body_timeout: Seconds within which a request must arrive.
        timeout: Seconds after which a request is not computed any more.
        drain_timeout: Seconds for accepted requests after SIGTERM; then they get 503.
        max_connections: Open connections; beyond it requests get 429.

    Raises:
        ConfigError: A value is not a whole number within its bounds.
    """

    max_batch: int = limit(16, 1, 4096, "Images that are computed together.")
    max_wait_ms: int = limit(
        40, 0, 60_000, "Milliseconds that an image waits for others that are being read."
    )
    max_backlog_ms: int = limit(
        4000, 1, 3_600_000, "Milliseconds of work that wait; a request beyond it gets 429."
    )
    max_queue: int = limit(512, 1, 10**6, "Images that wait; a request beyond it gets 429.")
    max_body_mib: int = limit(32, 1, 4096, "MiB of the body of a request.")
    max_pending_mib: int = limit(
        256, 1, 10**6, "MiB of the bodies of all requests that are not answered."
    )
    max_images: int = limit(256, 1, 10**5, "Images of a request.")
    max_pixels: int = limit(50_000_000, 1, 178_956_970, "Pixels of an image in its file.")
    body_timeout: int = limit(20, 1, 3600, "Seconds in which a request must have arrived.")
    timeout: int = limit(60, 1, 3600, "Seconds after which a waiting request is not computed.")
    drain_timeout: int = limit(
        30, 1, 3600, "Seconds for accepted requests after SIGTERM; then they get 503."
    )
    max_connections: int = limit(
        1000, 1, 10**6, "Connections that are open at once; a further one gets 429."
    )

    @property
    def max_images_of_request(self) -> int:
        """The largest number of images of one request: no more than the queue can hold."""
        return min(self.max_images, self.max_queue)

    def __post_init__(self) -> None:
        """Check the bounds."""
        for item in fields(self):
            value, low, high = getattr(self, item.name), item.metadata["low"], item.metadata["high"]
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(
                    f"{item.name}={value!r}: expected a whole number, {low} to {high}"
                )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a server without its model.

    Attributes:
        limits: Sizes, times and numbers.
        api_keys: Valid keys, one of which a request must have; empty if no key is needed.
        allow_urls: Hosts of images by URL, see url_fetch.Fetcher; empty allows none.
        allow_private_urls: True allows hosts with private addresses too.
        allow_origins: Origins of other pages that may read answers, or "*".
        access_log: True writes a line for each request on stderr.

    Raises:
        ConfigError: A host or an origin is not one, or allow_private_urls has no hosts.
    """

    limits: Limits = field(default_factory=Limits)
    api_keys: tuple[str, ...] = ()
    allow_urls: tuple[str, ...] = ()
    allow_private_urls: bool = False
    allow_origins: tuple[str, ...] = ()
    access_log: bool = False

    def __post_init__(self) -> None:
        """Check hosts and origins."""
        if self.allow_private_urls and not self.allow_urls:
            raise ConfigError(
                "allow_private_urls does nothing without allow_urls: name the hosts with it, such "
                "as photos.intranet"
            )
        for host in self.allow_urls:
            match = _HOST.fullmatch(host)
            if match is None or int(match["port"] or 1) > 65535:
                raise ConfigError(
                    f"allow_urls={host!r}: expected a host, such as photos.example.com, "
                    "*.example.com, localhost:8000 or *"
                )
        for origin in self.allow_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--cors-origin (allow_origins) {origin!r}: expected an origin as a browser "
                    "sends it, such as https://www.example.com or http://localhost:3000, with no "
                    "path, or *"
                )
