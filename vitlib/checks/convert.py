"""convert: the same model in another layout, proved before it takes its name.

How data flows: load -> save into a folder beside the target -> load that as the target's readers
would -> the same pixels through both -> rename. What the target cannot hold is told one by one,
with the difference that it makes alone.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitlib.checkpoint.layouts.detect import layout_named
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.table import summarise
from vitlib.checkpoint.save import MISLEADING, refuse_others, save
from vitlib.checks.compare import distance, off_grid, plain, probe
from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError, SourceError, VitlibError
from vitlib.image.processor import ImageProcessor
from vitlib.predict.calibration import FILE as CALIBRATION
from vitlib.source.locate import SUFFIXES, Source
from vitlib.system.atomic import refuse_input, replaceable
from vitlib.system.torch_state import own_settings
from vitlib.vit import ViT
from vitlib.weights import Checkpoint, built, load, read

# Some units in the last place of float32, after a whole model: more is another function.
MAX_DRIFT = 1e-5
_NUMERICS = ("norm_eps", "activation", "position_resize", "relative_resize")
# Lost with their tensors, which are told by name.
_TENSORS = {
    "pooler_dim": "pooler.",
    "mask_token": "patch_embed.mask",
    "attention_pool": "attn_pool.",
}
_RULES = ("hf", "timm", "openclip")  # whose readers look for preprocessing


@dataclass(frozen=True)
class Change:
    """A field of ViTConfig that the target's readers take otherwise, and what that alone does.

    Differences are max |a - b| / max |b| of the logits, or of the vector where there is no head.
    """

    field: str
    source_value: Any
    target_value: Any
    difference: float  # at the model's own image size
    off_grid: float  # one patch off the learned grid


@dataclass(frozen=True)
class Conversion:
    """The answer of convert(); `as_dict` is what `vitlib convert --json` prints."""

    source: str
    source_layout: str
    source_profile: str
    folder: str
    layout: str
    profile: str  # the target's: what was written was run under it
    files: tuple[str, ...]  # in the folder
    image_size: tuple[int, int]  # (height, width) at which drift counts
    drift: float  # max |a - b| / max |b| of the logits, source against what was written
    off_grid_size: tuple[int, int]
    off_grid_drift: float  # the same one patch off the learned grid; it does not count
    changes: tuple[Change, ...]  # what the target cannot hold
    not_written: tuple[str, ...]  # tensors of the source, by its names, and what lay beside them
    preprocessing: tuple[str, ...]  # what of it does not survive, a line each
    reads_as: str  # the layout that its names look like, without being told

    def as_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        told: dict[str, Any] = plain(asdict(self))
        return told


@own_settings()
def convert(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    layout: str,
    source_layout: str | None = None,
    profile: str | None = None,
    prefix: str | None = None,
    architecture: str | None = None,
    num_heads: int | None = None,
    activation: str | None = None,
    pool: str | None = None,
    config: ViTConfig | None = None,
    allow_drift: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Conversion:
    """Write a checkpoint in another layout, and prove what was written before it counts.

    What was written is loaded under the target's own profile, and both run in float32 on the same
    two seeded images of the model's own size. Only where the logits are at most 1e-5 apart, or with
    allow_drift, do the files get their names: else the folder is left as it was.

    layout: hf, timm, meta, torchvision, openclip or jax.
    The rest is as in vitlib.load, for the source (source_layout is its `layout`).

    Raises what load and save raise, and CheckpointError where the logits drift further: it names by
    how much and which field of the model does it.
    """
    where: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    facts = Facts(architecture=architecture, num_heads=num_heads, activation=activation, pool=pool)
    how: dict[str, Any] = {
        "layout": source_layout,
        "profile": profile,
        "prefix": prefix,
        "facts": facts,
    }
    wanted, target = layout_named(layout), Path(os.path.realpath(folder))
    if not os.fspath(folder) or not target.name:
        raise SourceError(f"{os.fspath(folder)!r} is no name of a folder to write: give one")
    src = Source(source, **where)
    _refuse_same(src, target)
    found = read(src, config, **how)
    model = built(src, found, profile=profile)
    dtype = next(model.parameters()).dtype
    beside = _folder_beside(target)
    try:
        lost = save(model, beside, layout=layout)
        if target.exists():
            refuse_others(target, next(p.name for p in beside.iterdir() if p.suffix in SUFFIXES))
            for path in beside.iterdir():
                replaceable(target / path.name)
        again = load(beside, layout=layout)
        answer = Conversion(
            source=os.fspath(source),
            source_layout=found.layout.name,
            source_profile=profile or found.layout.profile,
            folder=os.fspath(folder),
            layout=layout,
            profile=wanted.profile,
            files=tuple(sorted(path.name for path in beside.iterdir())),
            not_written=_not_written(found, again, src),
            preprocessing=_preprocessing(model, again, layout),
            reads_as=_reads_as(beside),
            **_measure(model.float(), again.float(), lost),
        )
        if not answer.drift <= MAX_DRIFT and not allow_drift:
            raise CheckpointError(_refusal(answer, dtype))
        del again  # its tensors are mapped from files that now move
        _place(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return answer


def _refuse_same(src: Source, target: Path) -> None:
    """Raise SourceError where the files to write would take the place of those to read."""
    if target.exists() and not target.is_dir():
        raise SourceError(f"{target} is a file: expected a folder to write, there or not yet")
    if not src.is_hub:
        files = src.weights()
        refuse_input(target, [path.parent for path in files])
        for entry in target.iterdir() if target.is_dir() else ():  # links lead to what is read
            refuse_input(entry, files)


def _folder_beside(target: Path) -> Path:
    """An empty folder on the target's disk, so that what lies in it can be renamed there."""
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise SourceError(f"{target} cannot be written: {error.strerror or error}") from error
    return beside


def _reads_as(folder: Path) -> str:
    """The layout that what was written looks like, where nobody says it; empty: none for sure."""
    try:
        return read(Source(folder)).layout.name
    except VitlibError:
        return ""


@torch.inference_mode()
def _measure(model: ViT, again: ViT, lost: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """How far what was written is from the source, and what each lost field does alone."""
    cfg = model.config
    size = off_grid(cfg)
    near, far = probe(cfg), probe(cfg, size)
    here, here_off = model(near), model(far)
    changes = []
    told = {name: values for name, values in lost.items() if name not in (*_TENSORS, *_NUMERICS)}
    numbers = {name: (getattr(cfg, name), getattr(again.config, name)) for name in _NUMERICS}
    if not cfg.pos_embed:
        del numbers["position_resize"]
        told.pop("position_resize", None)
    told = {name: (a, b) for name, (a, b) in numbers.items() if a != b} | told
    for name, (ours, theirs) in told.items():
        difference = off = 0.0
        if name in (*_NUMERICS, "pool", "final_norm"):
            other = _with(model, **{name: theirs})
            # On the learned grid the rules of resizing are not asked.
            difference = 0.0 if name.endswith("_resize") else distance(other(near), here)
            off = distance(other(far), here_off)
        changes.append(Change(name, ours, theirs, difference, off))
    return {
        "image_size": cfg.image_size,
        "drift": distance(again(near), here),
        "off_grid_size": size,
        "off_grid_drift": distance(again(far), here_off),
        "changes": tuple(changes),
    }


def _with(model: ViT, **changes: Any) -> ViT:
    """The same tensors, run by another config."""
    with torch.device("meta"):
        other = ViT(replace(model.config, **changes))
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()


def _not_written(found: Checkpoint, again: ViT, src: Source) -> tuple[str, ...]:
    """What of the source is not in the target; tensors that only moved are."""
    there, cfg = again.state_dict(), found.model.config
    gone = [
        found.layout.name_of(name, cfg)
        for name in found.state
        if name.startswith(tuple(_TENSORS.values())) and name not in there
    ]
    if src.file(CALIBRATION) is not None:  # it is of the source's files: Predictor.save takes it on
        gone.append(CALIBRATION)
    told = summarise([*gone, *found.ignored])
    return tuple(told.split(", ")) if told else ()


def _preprocessing(model: ViT, again: ViT, layout: str) -> tuple[str, ...]:
    """What of the preprocessing does not survive, a line each."""
    before, after = model.image_processor, again.image_processor
    if not isinstance(after, ImageProcessor):
        none = not isinstance(before, ImageProcessor)
        return () if none else ("preprocessing: what was written cannot be followed",)
    if not isinstance(before, ImageProcessor):
        return (f"preprocessing: none came with the source; {layout}'s is {after.describe()}",)
    if layout not in _RULES:
        return (f"preprocessing: {layout} files have no place for it; it lies beside, for vitlib",)
    told = before.lost(layout)
    apart = _pixels_apart(after, before)
    if apart:
        told.append(
            f"preprocessing: of a test image, pixels are {apart:.2g} off (max |a - b| / max |b|)"
        )
    return tuple(told)


def _pixels_apart(a: ImageProcessor, b: ImageProcessor) -> float:
    """How far the pixels are apart that two rules make of one image of noise."""
    numbers = np.random.default_rng(0)
    image = numbers.integers(0, 256, (301, 404, b.in_channels), dtype=np.uint8)
    try:
        return distance(a(image), b(image))
    except VitlibError:  # no image, such as one of two channels
        return 0.0 if a == b else math.inf


def _refusal(answer: Conversion, dtype: torch.dtype) -> str:
    told = [
        f"{change.field} {change.source_value} becomes {change.target_value} "
        f"({change.difference:.2g} alone)"
        for change in sorted(answer.changes, key=lambda change: -change.difference)
        if change.difference
    ]
    why = "; ".join(told) or (
        "tensors that are added up there are rounded to their dtype once more"
        if dtype != torch.float32
        else "of something that is no field of the config"
    )
    return (
        f"{answer.folder!r} is not written: in the layout {answer.layout!r} the logits would be "
        f"{answer.drift:.2g} off (max |a - b| / max |b|; at most {MAX_DRIFT:g} passes), because "
        f"{why}; "
        "write it all the same with --allow-drift (allow_drift=True)"
    )


def _place(beside: Path, target: Path) -> None:
    """Give the files their names: a new folder in one step; in one that is there the weights last.

    A kill leaves the old model or none: no folder opens without its weights.
    """
    try:
        if not target.exists():
            beside.rename(target)
            return
        files = sorted(beside.iterdir(), key=lambda path: path.suffix in SUFFIXES)
        for name in [path.name for path in reversed(files)] + list(MISLEADING):  # its weights first
            (target / name).unlink(missing_ok=True)
        for path in files:
            path.rename(target / path.name)
    except OSError as error:
        raise SourceError(f"{target} cannot be written: {error.strerror or error}") from error
