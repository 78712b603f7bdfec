"""Describe a checkpoint without running it: content, assumptions, and problems at load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitlib.checkpoint.families import PROFILES, Profile, get_family, with_profile
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.layout import LayoutName
from vitlib.checkpoint.preprocessing import has_assumed_preprocessing, read_image_processor
from vitlib.checkpoint.read import Checkpoint, read_checkpoint
from vitlib.config import DERIVED, Activation, Pool, ViTConfig, config_to_json
from vitlib.errors import VitlibError
from vitlib.image.processor import ImageProcessor
from vitlib.predict.calibration import Calibration
from vitlib.scores import labels_of, task_of
from vitlib.source.locate import Source
from vitlib.system.torch_state import isolate_torch_settings

NUMERICS = ("norm_eps", "activation", "position_resize")
_AUXILIARY = {"patch_embed.mask_token", "pooler.weight", "pooler.bias"}


@dataclass(frozen=True)
class Info:
    """The result of info(); `as_dict` is what `vitlib info --json` prints.

    Attributes:
        source: The checkpoint.
        files: Names of its weights files.
        layout: The layout of its names.
        profile: The library whose numerics it is loaded with.
        config: The config of the model.
        also_fits: Other layouts that its names fit.
        assumed: Fields of the config that nothing in the checkpoint states.
        dtypes: The dtypes of its tensors.
        parameters: The number of weights that forward reads.
        tensors: The number of tensors that are loaded.
        auxiliary: Tensors that are loaded and written back, and that forward does not read.
        ignored: Tensors that are not loaded, and entries beside the network.
        prefix: The prefix of the network's names in the file.
        problems: Reasons why the checkpoint does not load; empty where it loads.
        notes: Entries that are there and not used, a line each.
        calibration: The effect of calibration.json on scores, or why it is refused; "" without one.
        image_processor: The preprocessing; None where there is none.
        image_processor_error: The reason why there is no preprocessing.
        assumed_preprocessing: True if no file states the preprocessing, and published models of
            the family have several.
    """

    source: str
    files: tuple[str, ...]
    layout: str
    profile: str
    config: ViTConfig
    also_fits: tuple[str, ...]
    assumed: tuple[str, ...]
    dtypes: tuple[str, ...]
    parameters: int
    tensors: int
    auxiliary: tuple[str, ...]
    ignored: tuple[str, ...]
    prefix: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    calibration: str
    image_processor: ImageProcessor | None
    image_processor_error: str
    assumed_preprocessing: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the fields.

        Returns:
            A dict of JSON's types.
        """
        cfg, values = self.config, config_to_json(self.config)
        values |= {name: getattr(cfg, name) for name in DERIVED}
        return {
            "source": self.source,
            "files": list(self.files),
            "layout": self.layout,
            "profile": self.profile,
            "family": cfg.family,
            "config": {name: _to_list(value) for name, value in values.items()},
            "prefix": self.prefix,
            "also_fits": list(self.also_fits),
            "assumed": {name: _to_list(values[name]) for name in self.assumed},
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
    """The result of profiles(): numerics and preprocessing of each library that has the family.

    Attributes:
        source: The checkpoint.
        family: Its family.
        own: The profile of the file's layout, whose column holds the file's own numbers.
        numbers: Profile, then field of ViTConfig, to its value.
        image_processors: Profile to preprocessing; None where there is none.
    """

    source: str
    family: str
    own: str
    numbers: Mapping[str, Mapping[str, Any]]
    image_processors: Mapping[str, ImageProcessor | None]

    def as_dict(self) -> dict[str, Any]:
        """Return the table.

        Returns:
            A dict of JSON's types.
        """
        table = {}
        for name, fields in self.numbers.items():
            processor = self.image_processors[name]
            table[name] = {**fields, "preprocessing": processor and processor.to_dict()}
        return {"source": self.source, "family": self.family, "own": self.own, "profiles": table}


@isolate_torch_settings()
def info(
    source: str | os.PathLike[str],
    *,
    layout: LayoutName | None = None,
    profile: Profile | None = None,
    prefix: str | None = None,
    architecture: str | None = None,
    num_heads: int | None = None,
    activation: Activation | None = None,
    pool: Pool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Info:
    """Read a checkpoint and describe it, without building the model.

    Args:
        source: A hub id, a folder or one weights file.
        layout: As in vitlib.load.
        profile: As in vitlib.load.
        prefix: As in vitlib.load.
        architecture: As in vitlib.load.
        num_heads: As in vitlib.load.
        activation: As in vitlib.load.
        pool: As in vitlib.load.
        revision: As in vitlib.load.
        token: As in vitlib.load.
        cache_dir: As in vitlib.load.
        local_files_only: As in vitlib.load.

    Returns:
        The description. Tensors that cannot be loaded are listed in `problems`.

    Raises:
        SourceError: There is nothing to read.
        CheckpointError: The layout of the checkpoint cannot be determined.
    """
    src = Source(
        source,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    facts = Facts(architecture=architecture, num_heads=num_heads, activation=activation, pool=pool)
    checkpoint = read_checkpoint(src, layout=layout, profile=profile, prefix=prefix, facts=facts)
    cfg, state = checkpoint.model.config, checkpoint.state
    auxiliary = _AUXILIARY - ({"pooler.weight", "pooler.bias"} if cfg.pool == "pooler" else set())
    processor, error = _load_processor(src, checkpoint, profile)
    return Info(
        source=src.name,
        files=checkpoint.files,
        layout=checkpoint.layout.name,
        profile=profile or checkpoint.layout.profile,
        config=cfg,
        assumed=checkpoint.assumed,
        also_fits=checkpoint.also_fits,
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in state.values()})),
        parameters=sum(t.numel() for name, t in state.items() if name not in auxiliary),
        tensors=len(state),
        auxiliary=tuple(
            sorted(checkpoint.layout.file_name(name, cfg) for name in auxiliary & state.keys())
        ),
        ignored=checkpoint.ignored,
        prefix=checkpoint.prefix,
        problems=checkpoint.problems,
        notes=(*checkpoint.notes, *_unused_labels(src, cfg)),
        calibration=_describe_calibration(src, cfg),
        image_processor=processor,
        image_processor_error=error,
        assumed_preprocessing=(
            profile is None and not error and has_assumed_preprocessing(src, checkpoint)
        ),
    )


def _unused_labels(src: Source, cfg: ViTConfig) -> list[str]:
    """Return a note where config.json has label2id alone, which is not used."""
    config = src.json("config.json") or {}
    if cfg.labels or not cfg.num_classes or "id2label" in config or not config.get("label2id"):
        return []
    return [
        "config.json's label2id is not used: id2label names the classes, and there is none "
        "(transformers does not read it either)"
    ]


def _describe_calibration(src: Source, cfg: ViTConfig) -> str:
    """Return the effect of calibration.json, or why a Predictor would refuse it."""
    if not cfg.num_classes:
        return ""
    try:
        calibration = Calibration.read(src)
        if calibration is None:
            return ""
        calibration.check(labels_of(cfg), task_of(cfg))
        return calibration.describe()
    except VitlibError as error:
        return f"refused: {error}"


@isolate_torch_settings()
def profiles(
    source: str | os.PathLike[str],
    *,
    layout: LayoutName | None = None,
    prefix: str | None = None,
    architecture: str | None = None,
    num_heads: int | None = None,
    activation: Activation | None = None,
    pool: Pool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Profiles:
    """List the numerics and preprocessing of each library that has the checkpoint's family.

    Args:
        source: A hub id, a folder or one weights file.
        layout: As in vitlib.load.
        prefix: As in vitlib.load.
        architecture: As in vitlib.load.
        num_heads: As in vitlib.load.
        activation: As in vitlib.load.
        pool: As in vitlib.load.
        revision: As in vitlib.load.
        token: As in vitlib.load.
        cache_dir: As in vitlib.load.
        local_files_only: As in vitlib.load.

    Returns:
        A table with a column for each library.

    Raises:
        SourceError: There is nothing to read.
        CheckpointError: The checkpoint does not load.
    """
    src = Source(
        source,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    facts = Facts(architecture=architecture, num_heads=num_heads, activation=activation, pool=pool)
    checkpoint = read_checkpoint(src, layout=layout, prefix=prefix, facts=facts)
    cfg, own = checkpoint.model.config, checkpoint.layout.profile
    numbers: dict[str, dict[str, Any]] = {}
    processors: dict[str, ImageProcessor | None] = {}
    for name in PROFILES:
        if name != own and name not in get_family(cfg.family).libraries:
            continue
        profile_cfg = cfg if name == own else with_profile(cfg, name)
        fields = (*NUMERICS, *["relative_resize"] * (cfg.positions.relative is not None))
        numbers[name] = {field: getattr(profile_cfg, field) for field in fields}
        if name == own:
            processors[name] = _load_processor(src, checkpoint, None)[0]
        else:
            processors[name] = ImageProcessor.from_profile(name, cfg.family, cfg.image_size)
    return Profiles(src.name, cfg.family, own, numbers, processors)


def _load_processor(
    src: Source, checkpoint: Checkpoint, profile: str | None
) -> tuple[ImageProcessor | None, str]:
    """Return the preprocessing, or None and the reason."""
    try:
        return read_image_processor(src, checkpoint, profile), ""
    except VitlibError as error:
        return None, str(error)


def _to_list(value: object) -> object:
    """Return a tuple as a list, anything else unchanged."""
    return list(value) if isinstance(value, tuple) else value
