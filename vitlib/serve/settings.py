"""What a server is told: one frozen dataclass that checks itself."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields

from vitlib.errors import ConfigError

MIB = 2**20
_HOST = re.compile(
    r"(\*|(\*\.)?[^\s*/@:\[\]?#]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?"
)  # a name, *.NAME, * or [IPv6], with a port or without

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\sA-Z/?#\[\]@:,]+)(:[0-9]{1,5})?")


def setting(default: int | float, low: float, high: float, about: str) -> int:
    """A number with its bounds, and what it means, for the command line too."""
    kept = {"low": low, "high": high, "help": about}
    return field(default=default, metadata=kept)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much at a time. Raises ConfigError for what no server can do."""

    max_batch: int = setting(16, 1, 4096, "Images that are computed together, at most.")
    max_wait_ms: int = setting(
        40, 0, 60_000, "How long an image waits for others that are being read."
    )
    max_backlog_ms: int = setting(
        4000, 1, 3_600_000, "Work that is accepted ahead; beyond it the answer is 429."
    )
    max_queue: int = setting(512, 1, 10**6, "The same in images, whatever they take.")
    max_body_mib: int = setting(32, 1, 4096, "Of one request.")
    max_pending_mib: int = setting(256, 1, 10**6, "Of all requests that are not answered.")
    max_images: int = setting(256, 1, 10**5, "Of one request.")
    max_pixels: int = setting(50_000_000, 1, 178_956_970, "Of one image, as it is in its file.")
    body_timeout: int = setting(20, 1, 3600, "Seconds in which a request must have arrived.")
    timeout: int = setting(60, 1, 3600, "Seconds after which a request is not begun any more.")
    drain_timeout: int = setting(
        30, 1, 3600, "Seconds that accepted requests have after SIGTERM; then the answer is 503."
    )
    max_connections: int = setting(1000, 1, 10**6, "Open at once; beyond it the answer is 429.")

    @property
    def most_images(self) -> int:
        """Of one request: more could never be in the queue."""
        return min(self.max_images, self.max_queue)

    def __post_init__(self) -> None:
        for one in fields(self):
            value, low, high = getattr(self, one.name), one.metadata["low"], one.metadata["high"]
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(f"{one.name}={value!r}: expected a whole number, {low} to {high}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything about a server but its model. Raises ConfigError as Limits, and for a host in
    allow_urls or an origin in allow_origins that is none."""

    limits: Limits = field(default_factory=Limits)
    api_keys: tuple[str, ...] = ()  # one of them opens; none: no key is asked for
    allow_urls: tuple[str, ...] = ()  # see fetch.Fetcher.hosts; none: no photo by URL
    allow_private_urls: bool = False
    allow_origins: tuple[str, ...] = ()  # of pages elsewhere, or "*"; none: only this server's own

    def __post_init__(self) -> None:
        if self.allow_private_urls and not self.allow_urls:
            raise ConfigError(
                "allow_private_urls does nothing without allow_urls: name the hosts with it, such "
                "as photos.intranet"
            )
        for host in self.allow_urls:
            found = _HOST.fullmatch(host)
            if found is None or int(found["port"] or 1) > 65535:
                raise ConfigError(
                    f"allow_urls={host!r}: expected a host, such as photos.example.com, "
                    "*.example.com, localhost:8000 or *"
                )
        for origin in self.allow_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"allow_origins={origin!r}: expected an origin as a browser sends it, such as "
                    "https://www.example.com or http://localhost:3000, with no path, or *"
                )
