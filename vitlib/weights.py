"""Load checkpoints: match the tensors' names, check everything, and assign them to a model.

`Source` gives names and memory-mapped tensors. `read_checkpoint` finds the layout, which says which
tensor is which of the model's and what the model is. `build_model` adapts the tensors to what the
caller asks for and assigns them to modules that were built on the meta device. Nothing is copied
and no weight is initialised unless the caller asks for another shape.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitlib.checkpoint.adapt import BandMap, adapt_processor, rechannel, resize, widen
from vitlib.checkpoint.families import Profile, get_family
from vitlib.checkpoint.layouts.facts import PREPROCESSING_REMEDY, Facts, remedy
from vitlib.checkpoint.layouts.hf_names import list_parts
from vitlib.checkpoint.layouts.layout import Layout, LayoutName
from vitlib.checkpoint.preprocessing import has_assumed_preprocessing, read_image_processor
from vitlib.checkpoint.read import Checkpoint, build_empty, read_checkpoint
from vitlib.config import Activation, Pool, ViTConfig
from vitlib.errors import CheckpointError, ConfigError, VitlibError, first_line, to_pair
from vitlib.image.processor import ImageProcessor
from vitlib.source.locate import Source
from vitlib.system.torch_state import (
    is_available,
    isolate_torch_settings,
    outside_inference_mode,
    unavailable,
)
from vitlib.vit import ViT

logger = logging.getLogger("vitlib")


@isolate_torch_settings()
@outside_inference_mode()
def load(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    config: ViTConfig | None = None,
    layout: LayoutName | None = None,
    profile: Profile | None = None,
    prefix: str | None = None,
    architecture: str | None = None,
    num_heads: int | None = None,
    activation: Activation | None = None,
    pool: Pool | None = None,
    revision: str | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    band_map: BandMap | None = None,
    image_processor: ImageProcessor | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
    strict: bool = True,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> ViT:
    """Load a checkpoint as a ViT in eval mode, memory-mapped wherever the file allows.

    What is adapted, assumed or left out is one line of the log.

    Args:
        source: A hub id, a folder, one weights file, or a state dict in memory, which is copied;
            in any layout of docs/checkpoints.md.
        config: The model, instead of what the checkpoint says and of what is assumed.
        layout: The layout of the file, where its names fit two: hf, timm, meta, torchvision,
            openclip, jax.
        profile: The library whose numerics and preprocessing to use: hf, timm, original, jax,
            torchvision. None: as the files say.
        prefix: Prefix of the network's names, where the file holds several: "model_ema.", ….
        architecture: Name of the model in timm or open_clip, where no file says it, or the id of
            a published model, whose authors' pool and preprocessing then apply
            ("paige-ai/Virchow2"; docs/checkpoints.md). A statement that contradicts a config is an
            error; so for the next three.
        num_heads: Number of heads, where no file says it.
        activation: Form of GELU, where no file says it, as in ViTConfig.
        pool: Pooling, where no file says it, as in ViTConfig.
        revision: Branch, tag or commit of a hub id, as in huggingface_hub.
        num_classes: Another number of classes gives a new, untrained head; 0 gives no head.
        image_size: Pixels, one side or (height, width). Positions are resampled to it once, by
            the checkpoint's rule.
        in_channels: Another number of channels. To 1 the patch kernel's channels are summed; to N
            they are repeated and scaled by old / N, or taken as `band_map` says.
        band_map: For each new channel the old channel whose kernel it gets, or None for zeros.
        image_processor: The preprocessing, where it is not the checkpoint's.
        dropout: Rate of dropout in training; None: the checkpoint's.
        drop_path: Rate of stochastic depth in training; None: the checkpoint's.
        strict: False accepts a part of a model. Parameters that the file lacks stay untrained, and
            tensors that the model lacks are left out; the returned model's `missing_keys` and
            `unexpected_keys` name them.
        dtype: Of the weights, also as text: "bfloat16". None keeps the file's; tensors of several
            dtypes become the widest.
        device: Of the weights; None is the CPU.
        token: As in huggingface_hub.
        cache_dir: As in huggingface_hub.
        local_files_only: As in huggingface_hub.

    Returns:
        The model, with `image_processor` and labels where the checkpoint has them.

    Raises:
        SourceError: There is nothing to read.
        CheckpointError: Tensors are missing, unknown, of the wrong shape or not finite, or a config
            contradicts them; one message lists every such problem.
        ConfigError: No ViT can have such numbers.
    """
    if isinstance(source, Mapping):
        from vitlib.source.in_memory import StateDictSource  # few programs need it

        src: Source = StateDictSource(source)
    else:
        src = Source(
            source,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    checkpoint = read_checkpoint(
        src,
        config,
        layout=layout,
        profile=profile,
        prefix=prefix,
        facts=Facts(
            architecture=architecture, num_heads=num_heads, activation=activation, pool=pool
        ),
        head_wanted=num_classes is None,
    )
    return build_model(
        src,
        checkpoint,
        profile=profile,
        num_classes=num_classes,
        image_size=image_size,
        in_channels=in_channels,
        band_map=band_map,
        image_processor=image_processor,
        dropout=dropout,
        drop_path=drop_path,
        strict=strict,
        dtype=_parse_dtype(dtype),
        device=device,
    )


@isolate_torch_settings()
@outside_inference_mode()
def build_model(
    src: Source,
    checkpoint: Checkpoint,
    *,
    profile: Profile | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    band_map: BandMap | None = None,
    image_processor: ImageProcessor | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
    strict: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> ViT:
    """Build a model of a checkpoint that was read.

    Args:
        src: The files.
        checkpoint: Their contents.
        profile: As for `load`, and so for the rest.
        num_classes: Another number of classes.
        image_size: Another size of images, in pixels.
        in_channels: Another number of channels.
        band_map: The old channel of each new channel.
        image_processor: The preprocessing; None: the checkpoint's.
        dropout: Rate of dropout in training.
        drop_path: Rate of stochastic depth in training.
        strict: False accepts missing and unexpected tensors.
        dtype: Of the weights.
        device: Of the weights.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: The checkpoint has problems.
        ConfigError: No ViT can be so adapted, or torch has no such device or dtype.
    """
    _check_loadable(src, checkpoint, dtype, strict)
    cfg, log = checkpoint.model.config, list[str]()
    state = dict(checkpoint.state) if strict else _complete(checkpoint, log)
    if dtype is None:
        widen(state, log)
    log += _describe_contents(src, checkpoint)
    if image_size is not None:
        size = to_pair("image_size", image_size)
        cfg = resize(state, cfg, size, log, assumes_square=checkpoint.assumes_square)
    if band_map is not None and in_channels is None:
        in_channels = len(band_map)
    if in_channels is not None:
        cfg = rechannel(state, cfg, in_channels, band_map, log)
    rates = {"dropout": dropout, "drop_path": drop_path}
    stated = {name: rate for name, rate in rates.items() if rate is not None}
    cfg = replace(cfg, regularization=replace(cfg.regularization, **stated))
    # A model of the checkpoint's own config exists already; building it again costs time.
    model = checkpoint.model if cfg == checkpoint.model.config else build_empty(cfg)
    _assign(model, state, checkpoint.layout, num_classes, log)
    model.loaded_labels = model.config.labels
    model.missing_keys = checkpoint.differences.missing_keys
    model.unexpected_keys = checkpoint.differences.unexpected_keys
    if image_processor is None:
        image_processor = _adapt_processor(src, checkpoint, profile, cfg, band_map, log)
    model.image_processor = image_processor
    if log:
        logger.warning("%s: %s", src.name, "; ".join(log))
    model.eval()
    if device is None and dtype is None:
        return model
    try:
        return model.to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch raises any of the three
        if device is not None and not is_available(device):
            raise unavailable(device) from error
        raise ConfigError(
            f"device={device}, dtype={dtype} cannot be had: {first_line(error)}: leave device= "
            "(--device) out for the CPU"
        ) from error


def _parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a dtype by its name in torch; raise ConfigError for other text."""
    if not isinstance(dtype, str):
        return dtype
    parsed = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(parsed, torch.dtype):
        raise ConfigError(f"dtype={dtype!r}: expected a dtype of torch, such as 'bfloat16'")
    return parsed


def _check_loadable(
    src: Source, checkpoint: Checkpoint, dtype: torch.dtype | None, strict: bool
) -> None:
    """Raise CheckpointError for problems, and for 8-bit floats that no dtype= converts."""
    problems = checkpoint.problems if strict else checkpoint.differences.others
    if problems:
        raise CheckpointError(f"{src.name!r}: {'; '.join(problems)}")
    narrow = next((t.dtype for t in checkpoint.state.values() if t.dtype.itemsize == 1), None)
    if narrow is not None and dtype is None:
        raise CheckpointError(f"{src.name!r}: torch computes nothing in {narrow}: give dtype=")


def _complete(checkpoint: Checkpoint, log: list[str]) -> dict[str, Tensor]:
    """Return the tensors that the model has, with untrained ones where the file lacks them."""
    expected = checkpoint.model.state_dict().keys()
    state = {name: tensor for name, tensor in checkpoint.state.items() if name in expected}
    missing = checkpoint.differences.missing_keys
    if missing:
        untrained = ViT(checkpoint.model.config).state_dict()
        state |= {name: untrained[name] for name in missing}
    log += checkpoint.differences.presence
    return state


def _describe_contents(src: Source, checkpoint: Checkpoint) -> list[str]:
    """Describe what is left out and assumed, for the log."""
    log: list[str] = []
    left_out = [*src.ignored]
    if checkpoint.layout.name == "hf":
        left_out += list_parts(name for name in checkpoint.ignored if name not in src.ignored)
    if left_out:
        log += [f"read from under prefix={checkpoint.prefix!r}"] if checkpoint.prefix else []
        log.append(f"not loaded: {', '.join(left_out)}")
    log += checkpoint.notes
    if checkpoint.doubtful:
        cfg = checkpoint.model.config
        values = ", ".join(f"{name}={getattr(cfg, name)!r}" for name in checkpoint.doubtful)
        log.append(
            f"assumed, because no file states it: {values}. If this is wrong, give "
            f"{remedy(checkpoint.doubtful)}"
        )
    return log


def _assign(
    model: ViT,
    state: Mapping[str, Tensor],
    layout: Layout,
    num_classes: int | None,
    log: list[str],
) -> None:
    """Assign the tensors as the model's parameters; put in a new head where one is asked for."""
    old = model.config.num_classes
    keep_head = num_classes is None or (num_classes == old and (not old or "head.weight" in state))
    modules = dict(model.named_modules())
    # load_state_dict(assign=True) would check names and shapes again, which costs time.
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".")
        if keep_head or not name.startswith("head"):
            module, was = modules[owner], getattr(modules[owner], leaf)
            if isinstance(was, nn.Parameter):
                trains = was.requires_grad  # a pooler's weights do not
                module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=trains))
            else:
                module.register_buffer(leaf, tensor)
    if not keep_head and num_classes is not None:
        _put_head(model, layout, num_classes, log)
    # Freeze parameters that forward never reads.
    model.norm.requires_grad_(model.config.final_norm != "none")
    if model.attn_pool is not None:
        model.attn_pool.requires_grad_(model.config.pool == "map")


def _put_head(model: ViT, layout: Layout, num_classes: int, log: list[str]) -> None:
    """Put in a new head, which reads what its family's classifier in transformers reads."""
    hf_type = get_family(model.config.family).hf
    fields = hf_type.head if hf_type is not None and layout.name == "hf" else None
    if fields is not None and num_classes and not model.num_classes:
        if model.config.outputs.projection_dim and "projection_dim" in fields:
            model.projection = nn.Identity()
            log.append("the projection is left out: the head reads the tokens")
        model.config = replace(model.config, **fields)
    model.reset_classifier(num_classes)
    if num_classes:
        log.append(f"a new, untrained head of {num_classes} classes")


def _adapt_processor(
    src: Source,
    checkpoint: Checkpoint,
    profile: Profile | None,
    cfg: ViTConfig,
    band_map: BandMap | None,
    log: list[str],
) -> ImageProcessor | None:
    """Read the preprocessing and make it follow what was adapted; None where it is not usable."""
    try:
        processor = read_image_processor(src, checkpoint, profile)
    except VitlibError as error:  # only a caller that asks for pixels needs this error
        logger.debug("%s: preprocessing not read: %s", src.name, error)
        return None
    if profile is None and has_assumed_preprocessing(src, checkpoint):
        log.append(
            f"preprocessing assumed, because no file states it: {processor.describe()}. "
            f"{PREPROCESSING_REMEDY}"
        )
    return adapt_processor(processor, checkpoint.model.config, cfg, band_map, log)
