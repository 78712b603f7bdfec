"""save: a model's config, tensors and preprocessing as the files of a layout, whole or not at all.

How data flows: the layout turns config and tensors into its own; what was written is read again as
its readers will, and what that loses is told, never silently dropped.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitlib.checkpoint.families import with_profile
from vitlib.checkpoint.layouts.detect import get_layout
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.layout import SIDECAR, Layout, Serialized
from vitlib.checkpoint.layouts.problems import check_finite
from vitlib.checkpoint.layouts.table import read_state
from vitlib.checkpoint.reconcile import foreign_parts, reconcile
from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError, ConfigError, SourceError
from vitlib.image.processor import ImageProcessor
from vitlib.source.locate import SUFFIXES, WEIGHTS
from vitlib.system.atomic import replace_files, staging_folder
from vitlib.system.torch_state import isolate_torch_settings
from vitlib.vit import ViT

logger = logging.getLogger("vitlib")

# What is compared after writing; the rest of ViTConfig follows from the tensors.
_TOLD = (
    "family",
    "num_heads",
    "image_size",
    "norm_eps",
    "activation",
    "position_resize",
    "relative_resize",
    "labels",
    "problem_type",
    "pool",
    "final_norm",
    "pooler_dim",
    "mask_token",
    "attention_pool",
    "dropout",
    "attention_dropout",
    "drop_path",
)
# Of another checkpoint, they would be read with what is written.
MISLEADING = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "open_clip_config.json",
    "calibration.json",  # of evaluate
    SIDECAR,
)
_BESIDE = ("family", "num_heads", "image_size", "labels", "problem_type")


@isolate_torch_settings()
def save(
    model: ViT,
    folder: str | os.PathLike[str],
    *,
    layout: str = "hf",
    image_processor: ImageProcessor | None = None,
) -> dict[str, tuple[Any, Any]]:
    """Write weights, config (labels and task with it) and preprocessing as a layout's readers do.

    layout: hf (transformers opens the folder as it is), timm, meta, torchvision, openclip, jax,
        or vitlib: its own names and its whole config.
    image_processor: None writes what load() found beside the weights, if anything.

    Returns what the layout cannot hold, field -> (here, there), empty where it holds everything; it
    is also one line of the log. The files are written beside and renamed, the weights last, and no
    folder without them opens: a kill leaves the old checkpoint or none that looks whole. Raises
    ConfigError where the layout cannot hold the model, CheckpointError where weights are not
    finite, SourceError where the folder cannot be written.
    """
    chosen = get_layout(layout)
    written, lost = serialize_model(model, chosen, image_processor or model.image_processor)
    target = Path(folder)
    refuse_other_weights(target, written.weights)
    with staging_folder(target) as staging:
        _write(staging, written)
        stale = (written.weights, *MISLEADING)
        replace_files(staging, target, last=written.weights, stale=stale)
    if lost:
        told = ", ".join(f"{name} {_short(a)} becomes {_short(b)}" for name, (a, b) in lost.items())
        logger.warning("%s: the layout %s cannot hold: %s", target, layout, told)
    return lost


def refuse_other_weights(folder: Path, weights: str) -> None:
    """Raise SourceError where the folder holds weights that would be read before the new ones."""
    first = [*WEIGHTS[: WEIGHTS.index(weights)]] if weights in WEIGHTS else [*WEIGHTS]
    there = [name for name in first if (folder / name).exists()]
    there += [
        path.name
        for path in folder.glob("*")
        if weights not in WEIGHTS and path.suffix in SUFFIXES
        if path.name not in (weights, *there)
    ]
    if there:
        raise SourceError(
            f"{folder} holds {', '.join(sorted(there))} of another checkpoint, which would be read "
            f"instead of {weights}: give an empty folder"
        )


def serialize_model(
    model: ViT, layout: Layout, processor: object | None
) -> tuple[Serialized, dict[str, tuple[Any, Any]]]:
    """Build what save() writes, and what of the model it cannot hold.

    Raises ConfigError where the layout cannot hold the model, or parts of it are not vitlib's own.
    """
    cfg = _describable(model, processor)
    state = {name: t.detach().cpu() for name, t in model.state_dict().items()}
    if "head.weight" in state and "head.bias" not in state:  # files have one: of zeros, the same
        state["head.bias"] = state["head.weight"].new_zeros(len(state["head.weight"]))
    written = layout.write(cfg, state)
    files = dict(written.json)
    kept_beside: dict[str, Any] = {}
    try:
        again = _read_again(written, layout, cfg)
    except CheckpointError:  # published models with these tensors differ: vitlib.json says which
        kept_beside["num_heads"] = cfg.num_heads
        again = _read_again(written, layout, cfg, dict(kept_beside))
    lost = _differences(cfg, again)
    kept_beside |= {name: _plain(lost[name][0]) for name in _BESIDE if name in lost}
    if not _square(cfg) and not files:
        kept_beside["image_size"] = list(cfg.image_size)
    if kept_beside and layout.name != "hf":
        files[SIDECAR] = kept_beside
        if "family" in kept_beside:
            mine = with_profile(replace(again, family=cfg.family), layout.profile)
            again = replace(mine, activation=again.activation)
        told = _differences(cfg, again)
        lost = {name: told[name] for name in told if name not in ("num_heads", "image_size")}
    if processor is None and layout.name == "timm":  # which would take ImageNet's mean unasked
        processor = ImageProcessor.from_profile("timm", cfg.family, cfg.image_size)
    if isinstance(processor, ImageProcessor):
        _add_preprocessing(files, layout, processor)
    tensors = {name: t.contiguous() for name, t in written.tensors.items()}
    return Serialized(tensors, written.weights, files, written.wrapper), lost


def _describable(model: ViT, processor: object | None) -> ViTConfig:
    """The config of a model that files can describe: its own parts are what the config says.

    Raises ConfigError where they are not, or where the preprocessing has other channels,
    CheckpointError where weights are not finite.
    """
    check_finite(model.state_dict().items())
    cfg, parts = reconcile(model), foreign_parts(model)
    if parts:
        more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
        raise ConfigError(
            f"{', '.join(parts[:3])}{more}: put in by hand, and no layout describes it: write the "
            "weights with torch.save(model.state_dict(), ...), or give the model vitlib's own parts"
        )
    if isinstance(processor, ImageProcessor) and processor.in_channels != cfg.in_channels:
        raise ConfigError(
            f"the preprocessing gives {processor.in_channels} channels, the model takes "
            f"{cfg.in_channels}: give image_processor=, one of as many"
        )
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        logger.warning("the model's forward hooks are no part of what is written")
    return cfg


def _differences(cfg: ViTConfig, again: ViTConfig) -> dict[str, tuple[Any, Any]]:
    unread = () if cfg.pos_embed else ("position_resize",)
    told = [name for name in _TOLD if name not in unread]
    both = {name: (getattr(cfg, name), getattr(again, name)) for name in told}
    return {name: (mine, theirs) for name, (mine, theirs) in both.items() if mine != theirs}


def _read_again(
    written: Serialized, layout: Layout, cfg: ViTConfig, beside: dict[str, Any] | None = None
) -> ViTConfig:
    """What the layout's reader makes of what was written, without what only vitlib reads.

    beside: of vitlib.json, where nothing can be read without it.
    """

    def config_of(name: str) -> dict[str, Any] | None:
        if name == SIDECAR and layout.name not in ("hf", "vitlib"):
            # A grid that is not square cannot be read otherwise: vitlib.json gives it.
            size = {} if _square(cfg) else {"image_size": list(cfg.image_size)}
            return size | (beside or {}) or None
        return written.json.get(name)

    name_match = layout.find(written.tensors)
    state = layout.finish(
        read_state(written.tensors, name_match), layout.read_image_size(config_of)
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return layout.read(config_of, shapes, name_match, Facts()).config


def _square(cfg: ViTConfig) -> bool:
    return len(set(cfg.grid_size)) == 1 and len(set(cfg.patch_size)) == 1


def _add_preprocessing(
    files: dict[str, dict[str, Any]], layout: Layout, processor: ImageProcessor
) -> None:
    """The rule where the layout's readers look for it; else as Hugging Face's, for vitlib."""
    if layout.name == "timm":
        config, rule = files["config.json"], processor.to_timm()
        config["pretrained_cfg"] |= rule
        args = config["model_args"]
        if rule["input_size"][1:] != args["img_size"] and "use_rel_pos_bias" not in args:
            args["dynamic_img_size"] = True  # else timm's model refuses these photos
    elif layout.name == "openclip":
        files["open_clip_config.json"]["preprocess_cfg"] = processor.to_openclip()
    else:
        files["preprocessor_config.json"] = processor.to_dict()


def _write(folder: Path, written: Serialized) -> None:
    path = folder / written.weights
    if path.suffix == ".npz":
        with path.open("wb") as file:
            np.savez(file, **{name: _numpy(t) for name, t in written.tensors.items()})
    elif path.suffix == ".pth":
        tensors = {name: tensor.clone() for name, tensor in written.tensors.items()}
        torch.save({written.wrapper: tensors} if written.wrapper else tensors, path)
    else:
        from safetensors.torch import save_file

        path.touch()  # as the umask has it; save_file's own file is its owner's alone
        mode = path.stat().st_mode
        save_file(written.tensors, path, metadata={"format": "pt"})
        path.chmod(mode)
    for name, value in written.json.items():
        text = json.dumps(value, indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def _numpy(tensor: Tensor) -> Any:
    """A tensor for .npz: bfloat16, which numpy lacks, as JAX writes it: two bytes of no kind."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view("V2")
    return tensor.numpy()


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _short(value: object) -> str:
    if isinstance(value, tuple) and len(value) > 3:
        return f"({len(value)} entries)"
    return str(value) if value != () else "none"
