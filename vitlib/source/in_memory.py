"""A checkpoint in memory: the state dict of a model, or what torch.load returned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vitlib.source.locate import Source
from vitlib.source.readers.state_dict import read_arch, unwrap


class StateDictSource(Source):
    """Tensors of a state dict, without files; the attributes are those of Source."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        """Keep the state dict; nothing is copied yet.

        Args:
            state: Names and tensors, also under the keys that training code uses.
        """
        super().__init__(".")
        self.name, self._state = "state dict", dict(state)
        self.is_hub = False

    def file(self, name: str) -> Path | None:  # noqa: ARG002
        """Return None: a state dict has no files.

        Args:
            name: Name of a file.
        """
        return None

    def weights(self) -> list[Path]:
        """Return a name for messages in place of the weights' file."""
        return [Path(self.name)]

    def tensors(self, prefix: str | None = None) -> dict[str, Tensor]:
        """Copy every tensor of the network: training the new model leaves the old one as it is.

        Args:
            prefix: Prefix of the names to read, if there are several networks; None for all.

        Returns:
            Tensors by name, without the prefix and the marks of torch.compile and FSDP.

        Raises:
            CheckpointError: There is no network, or no name has the prefix.
        """
        tensors, self.wrapper_keys, self.ignored = unwrap(Path(self.name), self._state, prefix)
        self.arch = read_arch(self._state)
        return self._rename({name: t.detach().clone() for name, t in tensors.items()}, prefix)

    def is_finite(self) -> bool | None:
        """Return None: each tensor is tested."""
        return None
