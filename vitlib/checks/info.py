"""What a checkpoint is, what was assumed of it, and what loading it would do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.families import PROFILES, as_profile
from vitlib.config import ViTConfig
from vitlib.errors import VitlibError
from vitlib.image.processor import ImageProcessor
from vitlib.predict.calibration import Calibration
from vitlib.scores import labels_of, task_of
from vitlib.source.locate import Source
from vitlib.system.torch_state import own_settings
from vitlib.weights import Checkpoint, guesses_preprocessing, image_processor, read

NUMERICS = ("norm_eps", "activation", "position_resize")
_UNREAD = {"patch_embed.mask_token", "pooler.weight", "pooler.bias"}
# The libraries that have only some families: theirs. The others run all.
_ONLY = {"jax": ("vit", "siglip"), "torchvision": ("vit",)}


@dataclass(frozen=True)
class Info:
    """The answer of info(); `as_dict` is what `vitlib info --json` prints."""

    source: str
    files: tuple[str, ...]
    layout: str
    profile: str  # whose numerics it is read with
    config: ViTConfig
    also_fits: tuple[str, ...]  # other layouts whose names these are too
    assumed: tuple[str, ...]  # fields of config that nothing in the checkpoint says
    dtypes: tuple[str, ...]
    parameters: int  # numbers in the tensors that forward reads
    tensors: int  # that would be loaded
    auxiliary: tuple[str, ...]  # loaded and written back, read by no forward
    ignored: tuple[str, ...]  # known and not loaded, and what lay beside the network
    prefix: str  # what the names of the network have before them in the file
    problems: tuple[str, ...]  # why it would not load; empty where it would
    notes: tuple[str, ...]  # what is there and not used
    calibration: str  # what calibration.json does to scores, or why not; "" where there is none
    image_processor: ImageProcessor | None
    image_processor_error: str  # why there is none
    assumed_preprocessing: bool  # no file says it, and published models have several

    def as_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        cfg = self.config
        return {
            "source": self.source,
            "files": list(self.files),
            "layout": self.layout,
            "profile": self.profile,
            "family": cfg.family,
            "config": {name: _plain(getattr(cfg, name)) for name in cfg.__slots__},
            "prefix": self.prefix,
            "also_fits": list(self.also_fits),
            "assumed": {name: _plain(getattr(cfg, name)) for name in self.assumed},
            "dtypes": list(self.dtypes),
            "parameters": self.parameters,
            "tensors": self.tensors,
            "auxiliary": list(self.auxiliary),
            "ignored": list(self.ignored),
            "problems": list(self.problems),
            "notes": list(self.notes),
            "calibration": self.calibration or None,
            "preprocessing": self.image_processor and self.image_processor.to_dict(),
            "no_preprocessing": self.image_processor_error or None,
            "preprocessing_assumed": self.assumed_preprocessing,
        }


@dataclass(frozen=True)
class Profiles:
    """The answer of profiles(): how each library that has the family would run these tensors."""

    source: str
    family: str
    own: str  # the profile of the layout the file came in: its column is the file's own numbers
    numbers: Mapping[str, Mapping[str, Any]]  # profile -> field of ViTConfig -> value
    image_processors: Mapping[str, ImageProcessor | None]  # the own one None where there is none

    def as_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        table = {}
        for name, fields in self.numbers.items():
            processor = self.image_processors[name]
            rule = processor and processor.to_dict()
            table[name] = {**fields, "preprocessing": rule}
        return {"source": self.source, "family": self.family, "own": self.own, "profiles": table}


@own_settings()
def info(
    source: str | os.PathLike[str],
    *,
    layout: str | None = None,
    profile: str | None = None,
    prefix: str | None = None,
    architecture: str | None = None,
    num_heads: int | None = None,
    activation: str | None = None,
    pool: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Info:
    """Read a checkpoint and say what it is, without building the model.

    The arguments are those of vitlib.load. Raises SourceError or CheckpointError where it cannot
    even be mapped; single bad tensors are listed in `problems`.
    """
    src = Source(
        source,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    facts = Facts(architecture=architecture, num_heads=num_heads, activation=activation, pool=pool)
    found = read(src, layout=layout, profile=profile, prefix=prefix, facts=facts)
    cfg = found.model.config
    unread = _UNREAD - ({"pooler.weight", "pooler.bias"} if cfg.pool == "pooler" else set())
    processor, why = _processor(src, found, profile)
    return Info(
        source=src.name,
        files=found.files,
        layout=found.layout.name,
        profile=profile or found.layout.profile,
        config=cfg,
        assumed=found.assumed,
        also_fits=found.also_fits,
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in found.state.values()})),
        parameters=sum(t.numel() for name, t in found.state.items() if name not in unread),
        tensors=len(found.state),
        auxiliary=tuple(sorted(found.layout.name_of(n, cfg) for n in unread & found.state.keys())),
        ignored=found.ignored,
        prefix=found.prefix,
        problems=found.problems,
        notes=(*found.notes, *_unused(src, cfg)),
        calibration=_calibration(src, cfg),
        image_processor=processor,
        image_processor_error=why,
        assumed_preprocessing=profile is None and not why and guesses_preprocessing(src, found),
    )


def _unused(src: Source, cfg: ViTConfig) -> list[str]:
    """What config.json says of labels, and nobody uses."""
    config = src.json("config.json") or {}
    if cfg.labels or not cfg.num_classes or "id2label" in config or not config.get("label2id"):
        return []
    return [
        "config.json's label2id is not used: id2label names the classes, and there is none "
        "(transformers does not read it either)"
    ]


def _calibration(src: Source, cfg: ViTConfig) -> str:
    """What a Predictor makes of calibration.json."""
    if not cfg.num_classes:
        return ""
    try:
        found = Calibration.read(src)
        if found is None:
            return ""
        found.check(labels_of(cfg), task_of(cfg))
        return found.describe()
    except VitlibError as error:
        return f"refused: {error}"


@own_settings()
def profiles(
    source: str | os.PathLike[str],
    *,
    layout: str | None = None,
    prefix: str | None = None,
    architecture: str | None = None,
    num_heads: int | None = None,
    activation: str | None = None,
    pool: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Profiles:
    """How each library that has the checkpoint's family runs it: numerics and preprocessing.

    Errors are those of info(), and CheckpointError where the checkpoint would not load.
    """
    src = Source(
        source,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    facts = Facts(architecture=architecture, num_heads=num_heads, activation=activation, pool=pool)
    found = read(src, layout=layout, prefix=prefix, facts=facts)
    cfg, own = found.model.config, found.layout.profile
    numbers: dict[str, dict[str, Any]] = {}
    processors: dict[str, ImageProcessor | None] = {}
    for name in PROFILES:
        if name != own and cfg.family not in _ONLY.get(name, (cfg.family,)):
            continue
        run = cfg if name == own else as_profile(cfg, name)
        told = (*NUMERICS, *["relative_resize"] * (cfg.relative_position is not None))
        numbers[name] = {field: getattr(run, field) for field in told}
        if name == own:
            processors[name] = _processor(src, found, None)[0]
        else:
            processors[name] = ImageProcessor.from_profile(name, cfg.family, cfg.image_size)
    return Profiles(src.name, cfg.family, own, numbers, processors)


def _processor(
    src: Source, found: Checkpoint, profile: str | None
) -> tuple[ImageProcessor | None, str]:
    """The preprocessing, or why there is none."""
    try:
        return image_processor(src, found, profile), ""
    except VitlibError as error:
        return None, str(error)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
