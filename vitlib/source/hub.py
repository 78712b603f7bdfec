"""Download of single files from the Hugging Face hub, with errors that say what to do."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from vitlib.errors import SourceError, first_line

PAUSE, TIMEOUT = 1.0, 5.0  # seconds between two attempts to connect to the hub, and for each


class HubRepo:
    """A checkpoint on the hub, whose files are downloaded one by one into the local cache."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        """Store the arguments; nothing is downloaded yet.

        Args:
            name: Hub id.
            options: revision, token, cache_dir and local_files_only of hf_hub_download.
        """
        self.name, self.options = name, options
        # Tested once, for the first file not in the cache.
        self._unreachable: bool | None = None

    def download(self, name: str) -> Path | None:
        """Return the path of a file in the cache, downloaded if need be.

        Args:
            name: Name of the file.

        Returns:
            Its path; None if the checkpoint has no such file.

        Raises:
            SourceError: The hub has no such checkpoint or refuses it, or cannot be reached.
        """
        from vitlib.system.requirements import explained_imports

        with explained_imports():
            from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

        try:
            if self._unreachable is None and not self.options["local_files_only"]:
                cached = {key: self.options[key] for key in ("revision", "cache_dir")}
                if try_to_load_from_cache(self.name, name, **cached) is None:
                    self._unreachable = is_hub_unreachable()
            local = self._unreachable or self.options["local_files_only"]
            options = {**self.options, "local_files_only": local}
            return Path(hf_hub_download(self.name, name, **options))
        except errors.LocalEntryNotFoundError as error:
            if name != "config.json" and self._is_cached("config.json"):
                # Offline, with this checkpoint in the cache: it has no such file.
                return None
            raise SourceError(self._describe_offline()) from error
        except errors.RemoteEntryNotFoundError:
            return None
        except errors.GatedRepoError as error:
            raise SourceError(
                f"{self.name!r} is gated: ask for access on its hub page, then pass token= or run "
                "`hf auth login`"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise SourceError(
                f"{self.name!r} is no folder or file here and not on the hub: check the name"
                f"{self._name_form()}, or pass token= for a private one"
            ) from error
        except errors.RevisionNotFoundError as error:
            revision = self.options["revision"]
            raise SourceError(f"{self.name!r} has no revision {revision!r} on the hub") from error
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
            reason = first_line(error)
            raise SourceError(f"{self.name!r} cannot be had from the hub: {reason}") from error

    def _describe_offline(self) -> str:
        """Describe a checkpoint that is not in the cache, while the hub is not asked."""
        from huggingface_hub import constants

        cache = self.options["cache_dir"] or constants.HF_HUB_CACHE
        if self.options["local_files_only"]:
            reason, remedy = "local_files_only (--local-files-only) is set", "leave it out"
        elif constants.HF_HUB_OFFLINE:
            reason, remedy = "HF_HUB_OFFLINE is set", "unset it"
        else:
            reason, remedy = "the hub cannot be reached", "check the network"
        return (
            f"{self.name!r} is no folder or file here and not in the cache {cache}, and {reason}: "
            f"check the name{self._name_form()}, {remedy}, or take the model demo (--model demo), "
            "which needs no network"
        )

    def _name_form(self) -> str:
        """Say how an id looks, where the name is none, such as an architecture of timm."""
        return "" if "/" in self.name else " (an id is OWNER/NAME, such as timm/NAME.TAG)"

    def _is_cached(self, name: str) -> bool:
        from huggingface_hub import errors, hf_hub_download

        options: dict[str, Any] = {**self.options, "local_files_only": True}
        try:
            return Path(hf_hub_download(self.name, name, **options)).is_file()
        except errors.LocalEntryNotFoundError:
            return False


def is_hub_unreachable() -> bool:
    """Return True if this machine cannot connect to the hub at all.

    huggingface_hub would retry for half a minute. A slow network or a proxy is left to it. Two
    attempts are made, because a network may be starting.
    """
    from huggingface_hub import constants

    url = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or getproxies().get(url.scheme) or getproxies().get("all"):
        return False
    port = url.port or (80 if url.scheme == "http" else 443)
    for wait in (PAUSE, 0.0):
        try:
            with socket.create_connection((url.hostname or "", port), timeout=TIMEOUT):
                return False
        except TimeoutError:
            return False
        except OSError:
            time.sleep(wait)
    return True
