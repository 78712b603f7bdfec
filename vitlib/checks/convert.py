"""Convert a checkpoint to another layout, and compare both before the files get their names.

The model is loaded, saved into a temporary folder beside the target, loaded again as the target's
readers would, and both run on the same images; then the files are renamed. Each field that the
target cannot store is listed with the difference that it makes alone.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vitlib.checkpoint.families import Profile
from vitlib.checkpoint.layouts.detect import get_layout
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.layout import LayoutName
from vitlib.checkpoint.layouts.table import summarise
from vitlib.checkpoint.read import Checkpoint, read_checkpoint
from vitlib.checkpoint.save import MISLEADING, refuse_other_weights, save
from vitlib.checks.compare import to_json
from vitlib.checks.preprocessing import compare_preprocessing
from vitlib.config import Activation, Pool, ViTConfig
from vitlib.errors import CheckpointError, SourceError, VitlibError
from vitlib.predict.calibration import FILE as CALIBRATION
from vitlib.source.locate import SUFFIXES, Source, read_json
from vitlib.system.atomic import refuse_input, replace_files, resolve_target
from vitlib.system.terminal import dump_json
from vitlib.system.torch_state import isolate_torch_settings
from vitlib.testing.distance import relative_distance
from vitlib.testing.images import off_grid_size, seeded_images, usual_size
from vitlib.vit import ViT
from vitlib.weights import build_model, load

# A few units in the last place of float32 after a whole model; more is another function.
MAX_DRIFT = 1e-5
FORMAT, REPORT = "vitlib-conversion", "conversion.json"
# Of norm_eps alone: the library fixes it in its code, so that no file can hold another value.
MAX_EPS_DRIFT = 1e-4
_NUMERICS = ("norm_eps", "activation", "position_resize", "relative_resize")
# Fields that are lost together with their tensors, which are listed by name.
_TENSOR_PREFIXES = {
    "pooler_dim": "pooler.",
    "mask_token": "patch_embed.mask",
    "attention_pool": "attn_pool.",
}


@dataclass(frozen=True)
class Change:
    """A field of ViTConfig that the target's readers set to another value.

    Differences are max |a - b| / max |b| of the logits, or of the embedding without a head.

    Attributes:
        field: The name of the field.
        source_value: The value in the source.
        target_value: The value that the target's readers use.
        difference: The effect of this field alone, at the model's own image size.
        off_grid: The same one patch off the learned grid.
    """

    field: str
    source_value: Any
    target_value: Any
    difference: float
    off_grid: float


@dataclass(frozen=True)
class Conversion:
    """The result of convert(); `as_dict` is what `vitlib convert --json` prints.

    Attributes:
        source: The checkpoint.
        source_layout: Its layout.
        source_profile: The library whose numerics the source was run with.
        folder: The folder that was written.
        layout: The layout that was written.
        profile: The library whose numerics the written files were run with.
        files: Names of files in the folder.
        image_size: (height, width) of the images of `drift`.
        drift: max |a - b| / max |b| of the logits, source against target.
        drift_without_norm_eps: The same with the target's norm_eps in both: what it does not cause.
        off_grid_size: (height, width) one patch off the learned grid.
        off_grid_drift: The drift at off_grid_size; for information, without a limit.
        changes: Fields that the target cannot store.
        not_written: Tensors of the source, by its names, and files beside them.
        preprocessing: Parts of the preprocessing that are lost, a line each.
        reads_as: The layout that the names of the written tensors look like.
    """

    source: str
    source_layout: str
    source_profile: str
    folder: str
    layout: str
    profile: str
    files: tuple[str, ...]
    image_size: tuple[int, int]
    drift: float
    drift_without_norm_eps: float
    off_grid_size: tuple[int, int]
    off_grid_drift: float
    changes: tuple[Change, ...]
    not_written: tuple[str, ...]
    preprocessing: tuple[str, ...]
    reads_as: str

    @property
    def is_faithful(self) -> bool:
        """True if the logits are equal to rounding, or would be but for norm_eps."""
        by_eps_alone = self.drift <= MAX_EPS_DRIFT and self.drift_without_norm_eps <= MAX_DRIFT
        return self.drift <= MAX_DRIFT or by_eps_alone

    def as_dict(self) -> dict[str, Any]:
        """Return all fields.

        Returns:
            A dict of JSON's types.
        """
        result: dict[str, Any] = to_json(asdict(self))
        return result


@isolate_torch_settings()
def convert(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    layout: LayoutName,
    source_layout: LayoutName | None = None,
    profile: Profile | None = None,
    prefix: str | None = None,
    architecture: str | None = None,
    num_heads: int | None = None,
    activation: Activation | None = None,
    pool: Pool | None = None,
    config: ViTConfig | None = None,
    allow_drift: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Conversion:
    """Write a checkpoint in another layout, and compare what was written with the source.

    The written files are loaded under the target's own profile. Both models run in float32 on the
    same two seeded images of the model's own size. The files get their names only if the logits
    differ by at most 1e-5, or by at most 1e-4 because of norm_eps alone, or with allow_drift; else
    the folder stays as it is. timm and torchvision fix norm_eps in their code. conversion.json has
    the result, and marks a folder that a later conversion may write again.

    Args:
        source: A hub id, a folder or one weights file.
        folder: The folder to write: new, empty, or with an earlier conversion.
        layout: The layout to write: hf, timm, meta, torchvision, openclip or jax.
        source_layout: The source's layout, as `layout` of vitlib.load.
        profile: As in vitlib.load, for the source.
        prefix: As in vitlib.load, for the source.
        architecture: As in vitlib.load, for the source.
        num_heads: As in vitlib.load, for the source.
        activation: As in vitlib.load, for the source.
        pool: As in vitlib.load, for the source.
        config: As in vitlib.load, for the source.
        allow_drift: True writes the files although logits differ.
        revision: As in vitlib.load.
        token: As in vitlib.load.
        cache_dir: As in vitlib.load.
        local_files_only: As in vitlib.load.

    Returns:
        The layouts, the drift, and everything that the target cannot store.

    Raises:
        VitlibError: As in vitlib.load and vitlib.save.
        CheckpointError: The logits differ by more; the message names the drift and its cause.
    """
    src = Source(
        source, revision=revision, token=token, cache_dir=cache_dir,
        local_files_only=local_files_only,
    )  # fmt: skip
    facts = Facts(architecture=architecture, num_heads=num_heads, activation=activation, pool=pool)
    target_layout, target = get_layout(layout), Path(os.path.realpath(folder))
    if not os.fspath(folder) or not target.name:
        raise SourceError(f"{os.fspath(folder)!r} is not a name of a folder to write: give one")
    _refuse_overwriting(src, target)
    checkpoint = read_checkpoint(
        src, config, layout=source_layout, profile=profile, prefix=prefix, facts=facts
    )
    model = build_model(src, checkpoint, profile=profile)
    dtype = next(model.parameters()).dtype
    temporary = _make_temporary_folder(target)
    try:
        lost = save(model, temporary, layout=layout)
        if target.exists():
            refuse_other_weights(
                target, next(p.name for p in temporary.iterdir() if p.suffix in SUFFIXES)
            )
            for path in temporary.iterdir():
                resolve_target(target / path.name)
        written = load(temporary, layout=layout)
        conversion = Conversion(
            source=os.fspath(source),
            source_layout=checkpoint.layout.name,
            source_profile=profile or checkpoint.layout.profile,
            folder=os.fspath(folder),
            layout=layout,
            profile=target_layout.profile,
            files=tuple(sorted(path.name for path in temporary.iterdir())),
            not_written=_list_not_written(checkpoint, written, src),
            preprocessing=compare_preprocessing(
                model.image_processor, written.image_processor, layout
            ),
            reads_as=_detect_layout(temporary),
            **_measure(model.float(), written.float(), lost),
        )
        if not conversion.is_faithful and not allow_drift:
            raise CheckpointError(_describe_drift(conversion, dtype))
        report = {"format": FORMAT} | conversion.as_dict()
        (temporary / REPORT).write_text(dump_json(report, 2), encoding="utf-8")
        # Its tensors are memory-mapped from the files that are renamed next.
        del written
        _rename_into(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return conversion


def _refuse_overwriting(src: Source, target: Path) -> None:
    """Raise SourceError where the files to write would replace files of the source."""
    if target.exists() and not target.is_dir():
        raise SourceError(f"{target} is a file: expected a folder to write, there or not yet")
    if not src.is_hub:
        files = src.weights()
        refuse_input(target, [path.parent for path in files])
        for entry in target.iterdir() if target.is_dir() else ():  # links may lead to the source
            refuse_input(entry, files)
    names = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    report = read_json(target / REPORT) if REPORT in names else {}
    if names and report.get("format") != FORMAT:
        shown = ", ".join(names[:3]) + ", …" * (len(names) > 3)
        raise SourceError(
            f"{target} holds {shown} and was not written by vitlib convert: name a new or an empty "
            "folder"
        )


def _make_temporary_folder(target: Path) -> Path:
    """Make an empty folder on the target's disk, where a rename is atomic."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise SourceError(f"{target} cannot be written: {error.strerror or error}") from error
    return temporary


def _detect_layout(folder: Path) -> str:
    """Return the layout that files look like by their names; "" where two layouts fit."""
    try:
        return read_checkpoint(Source(folder)).layout.name
    except VitlibError:
        return ""


@torch.inference_mode()
def _measure(model: ViT, written: ViT, lost: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Measure the drift of the written model, and the effect of each lost field alone."""
    cfg = model.config
    size = off_grid_size(cfg)
    images, off_grid_images = seeded_images(cfg), seeded_images(cfg, size)
    expected, off_grid_expected = model(images), model(off_grid_images)
    others = {n: v for n, v in lost.items() if n not in (*_TENSOR_PREFIXES, *_NUMERICS)}
    numerics = {name: (getattr(cfg, name), getattr(written.config, name)) for name in _NUMERICS}
    if not cfg.positions.embed:
        del numerics["position_resize"]
        others.pop("position_resize", None)
    values = {name: (a, b) for name, (a, b) in numerics.items() if a != b} | others
    changes = []
    for name, (source_value, target_value) in values.items():
        difference = off_grid = 0.0
        if name in (*_NUMERICS, "pool", "final_norm"):
            changed = _with_config(model, **{name: target_value})
            # On the learned grid positions are not resized: the rule has no effect.
            if not name.endswith("_resize"):
                difference = relative_distance(changed(images), expected)
            off_grid = relative_distance(changed(off_grid_images), off_grid_expected)
        changes.append(Change(name, source_value, target_value, difference, off_grid))
    logits, same_eps = written(images), _with_config(model, norm_eps=written.config.norm_eps)
    return {
        "image_size": usual_size(cfg),
        "drift": relative_distance(logits, expected),
        "drift_without_norm_eps": relative_distance(logits, same_eps(images)),
        "off_grid_size": size,
        "off_grid_drift": relative_distance(written(off_grid_images), off_grid_expected),
        "changes": tuple(changes),
    }


def _with_config(model: ViT, **changes: Any) -> ViT:
    """Return a model of the same tensors with a changed config."""
    with torch.device("meta"):
        changed = ViT(replace(model.config, **changes))
    changed.load_state_dict(model.state_dict(), assign=True)
    return changed.eval()


def _list_not_written(checkpoint: Checkpoint, written: ViT, src: Source) -> tuple[str, ...]:
    """Return what the target does not have: tensors by the source's names, and calibration.json."""
    state, cfg = written.state_dict(), checkpoint.model.config
    missing = [
        checkpoint.layout.file_name(name, cfg)
        for name in checkpoint.state
        if name.startswith(tuple(_TENSOR_PREFIXES.values())) and name not in state
    ]
    # It names the source's weights; Predictor.save writes it.
    if src.file(CALIBRATION) is not None:
        missing.append(CALIBRATION)
    summary = summarise([*missing, *checkpoint.ignored])
    return tuple(summary.split(", ")) if summary else ()


def _describe_drift(conversion: Conversion, dtype: torch.dtype) -> str:
    """Return the message of a refusal: the drift, its causes and the remedy."""
    causes = [
        f"{change.field} {change.source_value} becomes {change.target_value} "
        f"({change.difference:.2g} alone)"
        for change in sorted(conversion.changes, key=lambda change: -change.difference)
        if change.difference
    ]
    why = "; ".join(causes) or (
        "tensors that the layout adds up are rounded to their dtype once more"
        if dtype != torch.float32
        else "of something that is not a field of the config"
    )
    return (
        f"{conversion.folder!r} is not written: in the layout {conversion.layout!r} the logits "
        f"would be {conversion.drift:.2g} off (max |a - b| / max |b|; at most {MAX_DRIFT:g} "
        f"passes), because {why}; write it all the same with --allow-drift (allow_drift=True)"
    )


def _rename_into(temporary: Path, target: Path) -> None:
    """Give the files their names: a new folder in one rename, in an existing one weights last.

    The old weights are deleted first. After a kill at any moment the folder holds the new model,
    or no weights and does not open; it never mixes two models.
    """
    try:
        if not target.exists():
            temporary.rename(target)
            return
        names = [path.name for path in temporary.iterdir()]
        weights = next(name for name in names if name.endswith(SUFFIXES))
        # The old report stays until the new one replaces it, and marks the folder meanwhile.
        stale = {weights, *names, *MISLEADING} - {REPORT}
        replace_files(temporary, target, last=weights, stale=stale)
    except OSError as error:
        raise SourceError(f"{target} cannot be written: {error.strerror or error}") from error
