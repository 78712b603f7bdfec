"""load and save: find the tensors, map their names, check everything, assign; and write them back.

How data flows: source.py gives names and memory-mapped tensors; layouts/ says which of them is
which of ours; the config comes from config.json, checked against the tensors; the model is built
without memory (meta device) and takes the tensors as they lie in the file, so nothing is copied or
drawn.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitlib.config import ViTConfig, as_pair
from vitlib.errors import CheckpointError, ConfigError, SourceError, VitlibError
from vitlib.layouts import hf
from vitlib.layouts.table import Located, kept, summarise
from vitlib.patch_embed import resize_positions
from vitlib.preprocess import ImageProcessor
from vitlib.source import Source, file_is_finite
from vitlib.vit import ViT

logger = logging.getLogger("vitlib")

BandMap = Sequence[int | None]


@dataclass(frozen=True)
class Checkpoint:
    """What a source holds, read and mapped; `problems` is empty where it can be a model."""

    model: ViT  # on the meta device: the shapes, without memory
    family: hf.Family
    state: dict[str, Tensor]  # by our names; memory-mapped
    files: tuple[str, ...]
    ignored: tuple[str, ...]  # tensors that are known and that no forward reads
    problems: tuple[str, ...]


def load(
    source: str | os.PathLike[str],
    *,
    config: ViTConfig | None = None,
    revision: str | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    band_map: BandMap | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> ViT:
    """A checkpoint as a ViT in eval mode, its tensors memory-mapped from the file.

    source: a hub id, a folder or one weights file, in the Hugging Face layout.
    config: instead of the checkpoint's config.json; needed for a file that has none beside it.
    num_classes: other than the checkpoint's: a new, untrained head; 0: no head.
    image_size: pixels, one side or (height, width): the positions are resampled to it, once, by the
        checkpoint's rule.
    in_channels: other than the checkpoint's: to 1 the patch kernel's channels are summed; to N they
        are repeated and scaled by old / N, or taken as `band_map` says: for each new channel the
        old one whose kernel it gets, or None for zeros.
    dtype, device: None keeps the file's dtype, and the CPU.
    revision, token, cache_dir, local_files_only: as in huggingface_hub.

    Raises SourceError where there is nothing to read, CheckpointError for a tensor that is missing,
    unknown, of the wrong shape or not finite and for a config that contradicts the tensors (every
    such problem in one message), ConfigError for numbers that no ViT can have.
    """
    src = Source(
        source,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    found = read(src, config, head_wanted=num_classes is None)
    if found.problems:
        raise CheckpointError(f"{src.name!r}: {'; '.join(found.problems)}")
    said: list[str] = []
    state, cfg = dict(found.state), found.model.config
    if image_size is not None:
        cfg = _resize(state, cfg, as_pair("image_size", image_size), said)
    if band_map is not None and in_channels is None:
        in_channels = len(band_map)
    if in_channels is not None:
        cfg = _rechannel(state, cfg, in_channels, band_map, said)
    old = found.model.config
    model = _assign(
        found.model if cfg == old else _empty(cfg), state, found.family, num_classes, said
    )
    model.image_processor = _image_processor(src, old, cfg, band_map, said)
    if said:
        logger.warning("%s: %s", src.name, "; ".join(said))
    model.eval()
    if device is None and dtype is None:
        return model
    try:
        return model.to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch's, for what it has not got
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={device}, dtype={dtype} cannot be had: {reason}") from error


def read(src: Source, config: ViTConfig | None = None, *, head_wanted: bool = True) -> Checkpoint:
    """Find and check all that a source holds, without building a model of it.

    Raises SourceError or CheckpointError where it cannot even be mapped; what is wrong with single
    tensors is listed in `problems`.
    """
    raw = None if config is not None else src.json("config.json")
    if config is None and raw is None:
        src.weights()  # a folder with no weights either had better be told so
        raise CheckpointError(
            f"no config.json beside the weights of {src.name!r}: pass config=ViTConfig(...)"
        )
    family = hf.family_of(raw if raw is not None else {"model_type": getattr(config, "family", 0)})
    tensors = src.tensors()
    located = hf.find(tensors, family)
    state = _by_our_names(tensors, located, family)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    try:
        if config is not None:
            cfg = replace(config, **kept(shapes))
        else:
            cfg = hf.read_config(raw or {}, shapes, family)
    except VitlibError as error:
        raise type(error)(f"{src.name!r}: {error}") from error
    model = _empty(cfg)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    finite = len(dtypes) == 1 and all(file_is_finite(path, *dtypes) for path in src.weights())
    not_finite = [] if finite else [name for name, tensor in state.items() if not _finite(tensor)]
    problems = _check(model, state, located, head_wanted, not_finite)
    files = tuple(path.name for path in src.weights())
    return Checkpoint(model, family, state, files, tuple(located.ignored), tuple(problems))


def _by_our_names(
    tensors: Mapping[str, Tensor], located: Located, family: hf.Family
) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for ours, names in located.ours.items():
        parts = [tensors[name] for name in names]
        state[ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
    mask_token = state.get("patch_embed.mask_token")
    if family.flat_mask and mask_token is not None and mask_token.ndim == 2:
        state["patch_embed.mask_token"] = mask_token[None]
    return state


def _empty(cfg: ViTConfig) -> ViT:
    with torch.device("meta"):
        return ViT(cfg)


def _check(
    model: ViT,
    state: Mapping[str, Tensor],
    located: Located,
    head_wanted: bool,
    not_finite: Sequence[str],
) -> list[str]:
    """Every missing, unknown, mis-shaped, mis-typed and non-finite tensor, by the file's names."""
    wanted, told = model.state_dict(), {ours: names[0] for ours, names in located.ours.items()}
    missing, shape, not_float = [], [], []
    unknown = list(located.unexpected)
    for name, like in wanted.items():
        if name not in state:
            if head_wanted or not name.startswith("head"):
                missing.append(hf.write_name(name, model.config))
        elif state[name].shape != like.shape:
            there, expected = _by(state[name].shape), _by(like.shape)
            shape.append(f"{told[name]} is {there}, expected {expected}")
    for name, tensor in state.items():
        if name not in wanted:
            unknown.append(told[name])
        if not tensor.is_floating_point():
            not_float.append(f"{told[name]} ({tensor.dtype})")
    kinds = {
        "missing": summarise(missing),
        "unexpected": summarise(unknown),
        "twice there": summarise(located.repeated),
        "wrong shape": ", ".join(shape),
        "not floating point": ", ".join(not_float),
        "NaN or infinite values in": summarise(told[name] for name in not_finite),
    }
    return [f"{kind}: {names}" for kind, names in kinds.items() if names]


def _finite(tensor: Tensor) -> bool:
    """Whether every value is finite: a finite sum proves it in one pass, another proves nothing."""
    if not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize == 1:  # no arithmetic on 8-bit floats
        tensor = tensor.float()
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _resize(
    state: dict[str, Tensor], cfg: ViTConfig, image_size: tuple[int, int], said: list[str]
) -> ViTConfig:
    new = replace(cfg, image_size=image_size)
    if new.grid_size != cfg.grid_size:
        table = state["patch_embed.pos_embed"]
        first = table.shape[1] - cfg.grid_size[0] * cfg.grid_size[1]
        patches = resize_positions(
            table[:, first:], cfg.grid_size, new.grid_size, cfg.position_resize
        )
        state["patch_embed.pos_embed"] = torch.cat([table[:, :first], patches], dim=1)
        said.append(
            f"positions resampled from {_by(cfg.grid_size)} to {_by(new.grid_size)} patches "
            f"({cfg.position_resize})"
        )
    return new


def _rechannel(
    state: dict[str, Tensor],
    cfg: ViTConfig,
    in_channels: int,
    band_map: BandMap | None,
    said: list[str],
) -> ViTConfig:
    new = replace(cfg, in_channels=in_channels)
    kernel, old = state["patch_embed.proj.weight"], cfg.in_channels
    if band_map is not None:
        if len(band_map) != in_channels or any(b not in (None, *range(old)) for b in band_map):
            raise ConfigError(
                f"band_map={list(band_map)}: expected {in_channels} entries, each None or one of "
                f"the checkpoint's channels 0 to {old - 1}"
            )
        zeros = torch.zeros_like(kernel[:, 0])
        bands = [zeros if band is None else kernel[:, band] for band in band_map]
        state["patch_embed.proj.weight"] = torch.stack(bands, dim=1)
        said.append(f"patch kernel taken from channels {list(band_map)}")
    elif in_channels == old:
        return new
    elif in_channels == 1:
        state["patch_embed.proj.weight"] = kernel.sum(dim=1, keepdim=True)
        said.append(f"patch kernel summed over its {old} channels")
    else:
        repeated = kernel[:, [i % old for i in range(in_channels)]] * (old / in_channels)
        state["patch_embed.proj.weight"] = repeated
        said.append(
            f"patch kernel repeated over {in_channels} channels, scaled {old}/{in_channels}"
        )
    return new


def _assign(
    model: ViT,
    state: Mapping[str, Tensor],
    family: hf.Family,
    num_classes: int | None,
    said: list[str],
) -> ViT:
    """Make the tensors the model's parameters; put in a new head where one is asked for."""
    old = model.config.num_classes
    keep_head = num_classes is None or (num_classes == old and (not old or "head.weight" in state))
    modules = dict(model.named_modules())
    for name, tensor in state.items():  # names and shapes were checked: no need to ask again
        owner, _, leaf = name.rpartition(".")
        if keep_head or not name.startswith("head"):
            module, was = modules[owner], getattr(modules[owner], leaf)
            if isinstance(was, nn.Parameter):
                learns = was.requires_grad  # a pooler does not
                module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=learns))
            else:
                module.register_buffer(leaf, tensor)
    if not keep_head and num_classes is not None:
        model.reset_classifier(num_classes, family.head_pool if num_classes and not old else None)
        if num_classes:
            said.append(f"a new, untrained head of {num_classes} classes")
    return model


def _image_processor(
    src: Source, old: ViTConfig, new: ViTConfig, band_map: BandMap | None, said: list[str]
) -> ImageProcessor | None:
    """The checkpoint's preprocessing, following what was adapted; None where none is usable."""
    try:
        processor = ImageProcessor.from_source(src)
    except VitlibError as error:  # whoever asks for pixels gets this error; a model needs none
        logger.debug("%s: preprocessing not read: %s", src.name, error)
        return None
    if new.image_size != old.image_size:
        processor = processor.with_image_size(new.image_size)
    if new.in_channels != old.in_channels or band_map is not None:
        if new.in_channels == 1 and not processor.equal_channels:
            said.append("one channel is normalised with the mean of image_mean and of image_std")
        processor = processor.with_channels(new.in_channels, band_map)
    return processor


def save(
    model: ViT,
    folder: str | os.PathLike[str],
    *,
    layout: str = "hf",
    image_processor: ImageProcessor | None = None,
) -> None:
    """Write weights, config (labels and task with it) and preprocessing as transformers reads them.

    image_processor: None writes what load() found beside the weights, if anything. The files are
    written beside and renamed, config.json last, and no folder without it opens: a kill leaves the
    old checkpoint or none that looks whole. Raises ConfigError where the layout cannot hold the
    model, SourceError where the folder cannot be written.
    """
    if layout != "hf":
        raise ConfigError(f"layout={layout!r}: vitlib writes 'hf'")
    cfg, tensors = model.config, _tensors_to_write(model)
    config = hf.write_config(cfg, str(model.norm.weight.dtype).removeprefix("torch."))
    processor = image_processor or model.image_processor
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".vitlib-", dir=target))
        try:
            _write(beside, tensors, config, processor)
            (target / "config.json").unlink(missing_ok=True)
            for path in sorted(beside.iterdir(), key=lambda path: path.name == "config.json"):
                path.replace(target / path.name)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise SourceError(f"{target} cannot be written: {error.strerror or error}") from error


def _tensors_to_write(model: ViT) -> dict[str, Tensor]:
    cfg = model.config
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    hf.write_config(cfg, "float32")  # says what cannot be written before anything is
    family = hf.FAMILIES[cfg.family]
    if cfg.num_classes and family.head_pool == "cls+mean" and cfg.pool == "cls":
        # A head on [CLS] alone is one on [CLS; mean] that gives the mean no weight.
        head = state["head.weight"]
        state["head.weight"] = torch.cat([head, torch.zeros_like(head)], dim=1)
    if family.flat_mask and "patch_embed.mask_token" in state:
        state["patch_embed.mask_token"] = state["patch_embed.mask_token"][0]
    return {hf.write_name(name, cfg): tensor for name, tensor in state.items()}


def _write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    processor: object | None,
) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    if isinstance(processor, ImageProcessor):
        _write_json(folder / "preprocessor_config.json", processor.to_dict())
    for path in folder.iterdir():  # on the disk before it gets its name
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
