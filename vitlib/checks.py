"""What a checkpoint is, and what loading it would do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from vitlib.config import ViTConfig
from vitlib.errors import VitlibError
from vitlib.layouts.hf import write_name
from vitlib.preprocess import ImageProcessor
from vitlib.source import Source
from vitlib.weights import read


@dataclass(frozen=True)
class Info:
    """The answer of info(); `as_dict` is what `vitlib info --json` prints."""

    source: str
    files: tuple[str, ...]
    config: ViTConfig
    dtypes: tuple[str, ...]
    parameters: int  # numbers in the tensors that forward reads
    tensors: int  # that would be loaded
    kept: tuple[str, ...]  # loaded and written back, read by no forward
    ignored: tuple[str, ...]  # known and not loaded
    problems: tuple[str, ...]  # why it would not load; empty where it would
    image_processor: ImageProcessor | None
    no_image_processor: str  # why there is none

    def as_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        cfg = self.config
        return {
            "source": self.source,
            "files": list(self.files),
            "family": cfg.family,
            "config": {name: _plain(getattr(cfg, name)) for name in cfg.__slots__},
            "dtypes": list(self.dtypes),
            "parameters": self.parameters,
            "tensors": self.tensors,
            "kept": list(self.kept),
            "ignored": list(self.ignored),
            "problems": list(self.problems),
            "preprocessing": self.image_processor and self.image_processor.to_dict(),
            "no_preprocessing": self.no_image_processor or None,
        }


def info(source: str | os.PathLike[str], **where: Any) -> Info:
    """Read a checkpoint and say what it is, without building the model.

    `where`: revision, token, cache_dir, local_files_only. Raises SourceError or CheckpointError
    where it cannot even be mapped; single bad tensors are listed in `problems`.
    """
    src = Source(source, **where)
    found = read(src)
    cfg = found.model.config
    unread = {"patch_embed.mask_token", "pooler.weight", "pooler.bias"}
    processor, why = None, ""
    try:
        processor = ImageProcessor.from_source(src)
    except VitlibError as error:
        why = str(error)
    return Info(
        source=src.name,
        files=found.files,
        config=cfg,
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in found.state.values()})),
        parameters=sum(t.numel() for name, t in found.state.items() if name not in unread),
        tensors=len(found.state),
        kept=tuple(sorted(write_name(name, cfg) for name in unread & found.state.keys())),
        ignored=found.ignored,
        problems=found.problems,
        image_processor=processor,
        no_image_processor=why,
    )


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
