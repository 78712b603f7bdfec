"""Save a model's config, tensors and preprocessing as the files of a layout, whole or not at all.

The layout turns config and tensors into its own. What was written is read again as the layout's
readers will read it, and fields that change by that are logged.
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

from vitlib.checkpoint.families import get_family, with_profile
from vitlib.checkpoint.layouts.detect import get_layout
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.layout import SIDECAR, Layout, LayoutName, Serialized
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

# Fields that are compared after writing; the rest of ViTConfig follows from the tensors.
_COMPARED = (
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
# Files of another checkpoint that would be read with the new weights.
MISLEADING = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "open_clip_config.json",
    "calibration.json",  # of evaluate
    # Photos of finetune, which writes them again.
    "training.csv",
    "training.jsonl",
    "validation.csv",
    "validation.jsonl",
    SIDECAR,
)
_SIDECAR_FIELDS = ("family", "num_heads", "image_size", "labels", "problem_type")


@isolate_torch_settings()
def save(
    model: ViT,
    folder: str | os.PathLike[str],
    *,
    layout: LayoutName = "hf",
    image_processor: ImageProcessor | None = None,
) -> dict[str, tuple[Any, Any]]:
    """Write weights, config (with labels and task) and preprocessing in a layout.

    The files are written to a temporary folder and renamed, the weights last. No folder without
    weights opens: after a kill the folder holds the old checkpoint, or none that looks whole.

    Args:
        model: The model.
        folder: For the files; made where it does not exist.
        layout: hf (transformers opens the folder as it is), timm, meta, torchvision, openclip,
            jax, or vitlib: its own names and its whole config.
        image_processor: The preprocessing; None: the model's own, where it has one.

    Returns:
        Fields that the layout cannot hold -> (value of the model, value in the files). They are one
        line of the log, too.

    Raises:
        ConfigError: The layout cannot hold the model.
        CheckpointError: Weights are not finite.
        SourceError: The folder cannot be written.
    """
    if not isinstance(model, ViT):
        raise ConfigError(
            f"model: expected a ViT, got a {type(model).__name__}: vitlib.load gives one; an "
            "optimized model has a method save() of its own"
        )
    if model.adaptation is not None:
        raise ConfigError(
            f"the model has {', '.join(model.adaptation.to_json())}, which no layout holds: write "
            "them with vitlib.save_delta(model, path); vitlib.adapters.merge_lora(model) puts LoRA "
            "into the weights"
        )
    chosen = get_layout(layout)
    written, lost = serialize_model(model, chosen, image_processor or model.image_processor)
    target = Path(folder)
    refuse_other_weights(target, written.weights)
    with staging_folder(target) as staging:
        _write(staging, written)
        stale = (written.weights, *MISLEADING)
        replace_files(staging, target, last=written.weights, stale=stale)
    if lost:
        changes = [f"{name} {_short(a)} becomes {_short(b)}" for name, (a, b) in lost.items()]
        logger.warning("%s: the layout %s cannot hold: %s", target, layout, ", ".join(changes))
    return lost


def refuse_other_weights(folder: Path, weights: str) -> None:
    """Refuse a folder that holds weights which would be read before the new ones.

    Args:
        folder: The folder.
        weights: Name of the new weights file.

    Raises:
        SourceError: There are such weights.
    """
    first = [*WEIGHTS[: WEIGHTS.index(weights)]] if weights in WEIGHTS else [*WEIGHTS]
    others = [name for name in first if (folder / name).exists()]
    others += [
        path.name
        for path in folder.glob("*")
        if weights not in WEIGHTS and path.suffix in SUFFIXES
        if path.name not in (weights, *others)
    ]
    if others:
        raise SourceError(
            f"{folder} holds {', '.join(sorted(others))} of another checkpoint, which would be "
            f"read instead of {weights}: give an empty folder"
        )


def serialize_model(
    model: ViT, layout: Layout, processor: object | None
) -> tuple[Serialized, dict[str, tuple[Any, Any]]]:
    """Build the content of the files that save() writes.

    Args:
        model: The model.
        layout: The layout of the files.
        processor: An ImageProcessor; another object is not written.

    Returns:
        The files, and the fields that they cannot hold -> (value of the model, value in the files).

    Raises:
        ConfigError: The layout cannot hold the model, or parts of it are not vitlib's own.
        CheckpointError: Weights are not finite.
    """
    cfg = _describable(model, processor)
    state = {name: t.detach().cpu() for name, t in model.state_dict().items()}
    if "head.weight" in state and "head.bias" not in state:
        # Files have a bias; one of zeros is the same function.
        state["head.bias"] = state["head.weight"].new_zeros(len(state["head.weight"]))
    written = layout.write(cfg, state)
    files = dict(written.json)
    sidecar: dict[str, Any] = {}
    try:
        again = _read_again(written, layout, cfg)
    except CheckpointError:  # published models with these tensors differ: vitlib.json says which
        sidecar["num_heads"] = cfg.num_heads
        if get_family(cfg.family).original is not None and layout.name == "meta":
            sidecar["family"] = cfg.family
        again = _read_again(written, layout, cfg, dict(sidecar))
    # Only differences that a reader of the layout would see are reported as lost.
    lost = _differences(cfg, again)
    sidecar |= {name: _to_json(lost[name][0]) for name in _SIDECAR_FIELDS if name in lost}
    if not _square(cfg) and not files:
        sidecar["image_size"] = list(cfg.image_size)
    if sidecar and layout.name != "hf":
        files[SIDECAR] = sidecar
        if "family" in sidecar:
            mine = with_profile(replace(again, family=cfg.family), layout.profile)
            again = replace(mine, activation=again.activation)
        lost = _differences(cfg, again)
        lost = {name: lost[name] for name in lost if name not in ("num_heads", "image_size")}
    if processor is None and layout.name == "timm":  # without one, timm takes ImageNet's mean
        processor = ImageProcessor.from_profile("timm", cfg.family, cfg.image_size)
    if isinstance(processor, ImageProcessor):
        _add_preprocessing(files, layout, processor)
    tensors = {name: t.contiguous() for name, t in written.tensors.items()}
    return Serialized(tensors, written.weights, files, written.wrapper), lost


def _describable(model: ViT, processor: object | None) -> ViTConfig:
    """Return the config of a model whose parts are what the config says.

    Raises ConfigError where they are not, or where the preprocessing has other channels, and
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
    """Return the fields that change by writing and reading -> (before, after)."""
    unread = () if cfg.positions.embed else ("position_resize",)
    names = [name for name in _COMPARED if name not in unread]
    both = {name: (getattr(cfg, name), getattr(again, name)) for name in names}
    return {name: (before, after) for name, (before, after) in both.items() if before != after}


def _read_again(
    written: Serialized, layout: Layout, cfg: ViTConfig, sidecar: dict[str, Any] | None = None
) -> ViTConfig:
    """Read the files as the layout's reader does, without the sidecar that only vitlib reads.

    The argument sidecar has the fields of vitlib.json without which nothing can be read.
    """

    def read_json(name: str) -> dict[str, Any] | None:
        if name == SIDECAR and layout.name not in ("hf", "vitlib"):
            # A grid that is not square cannot be read otherwise: vitlib.json gives it.
            size = {} if _square(cfg) else {"image_size": list(cfg.image_size)}
            return size | (sidecar or {}) or None
        return written.json.get(name)

    name_match = layout.find(written.tensors)
    state = layout.finish(
        read_state(written.tensors, name_match), layout.read_image_size(read_json)
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return layout.read(read_json, shapes, name_match, Facts()).config


def _square(cfg: ViTConfig) -> bool:
    return len(set(cfg.grid_size)) == 1 and len(set(cfg.patch_size)) == 1


def _add_preprocessing(
    files: dict[str, dict[str, Any]], layout: Layout, processor: ImageProcessor
) -> None:
    """Add the preprocessing where the layout's readers look for it, else as Hugging Face's.

    timm and open_clip always divide by 255 and resize: of bands it is Hugging Face's too.
    """
    if layout.name == "timm":
        config, rule = files["config.json"], processor.to_timm()
        config["pretrained_cfg"] |= rule
        args = config["model_args"]
        # NaFlexVit takes photos of any size, and has no img_size here.
        has_size = args.get("img_size") not in (None, rule["input_size"][1:])
        if has_size and "use_rel_pos_bias" not in args:
            args["dynamic_img_size"] = True  # else timm's model refuses these photos
    elif layout.name == "openclip":
        files["open_clip_config.json"]["preprocess_cfg"] = processor.to_openclip()
    if layout.name not in ("timm", "openclip") or processor.rescale_factor is None:
        files["preprocessor_config.json"] = processor.to_dict()


def _write(folder: Path, written: Serialized) -> None:
    """Write the weights, in the format that their name says, and the JSON files."""
    path = folder / written.weights
    if path.suffix == ".npz":
        with path.open("wb") as file:
            np.savez(file, **{name: _numpy(t) for name, t in written.tensors.items()})
    elif path.suffix == ".pth":
        tensors = {name: tensor.clone() for name, tensor in written.tensors.items()}
        torch.save({written.wrapper: tensors} if written.wrapper else tensors, path)
    else:
        write_tensors(path, written.tensors)
    for name, value in written.json.items():
        text = json.dumps(value, indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as a safetensors file that whoever the umask allows may read.

    Args:
        path: The file, which does not exist.
        tensors: Contiguous tensors by name.
    """
    from vitlib.system.requirements import explained_imports

    with explained_imports():
        from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # which save_file took from all but the owner


def _numpy(tensor: Tensor) -> Any:
    """Return a tensor for .npz; bfloat16, which numpy does not have, as two bytes, as JAX does."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view("V2")
    return tensor.numpy()


def _to_json(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _short(value: object) -> str:
    if isinstance(value, tuple) and len(value) > 3:
        return f"({len(value)} entries)"
    return str(value) if value != () else "none"
