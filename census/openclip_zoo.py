"""Zoo of open_clip's configs with a ViT tower, built and saved by open_clip 3.3.0, timm 1.0.31.

A tiny text tower replaces the published one, because vitlib never reads it. Image towers have two
blocks, so the depths in vitlib's table of timm's models are set to two as well.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from census.case import Case, ReferenceOutputs
from census.operators import without_operators

LAYOUT = "openclip"
DEPTH = 2
# Prefixes of timm's models that vitlib does not compute: rotary positions, post-norm, norms in the
# MLP, convolutions, relative positions by an MLP.
_REFUSED = ("eva02", "vit_pe_core", "vit_base_mci", "vit_relpos", "vitamin")
_ATTENTION_TOWERS = ("vit_", "eva", "vitamin")  # prefixes of timm's towers with attention blocks
_TEXT_CONFIG: dict[str, Any] = {
    "context_length": 4,
    "vocab_size": 8,
    "width": 64,
    "heads": 1,
    "layers": 1,
    "mlp_ratio": 1.0,
}


def set_table_depths() -> None:
    """Set the depth of each model in vitlib's table of timm's models to the depth built here."""
    from vitlib.checkpoint.layouts import timm_models

    for model in timm_models._models()[0].values():
        if model.structure:
            dict.update(model.structure, depth=DEPTH)  # type: ignore[arg-type]


def cases() -> list[Case]:
    """Return a case for each config whose image tower is a ViT, ViTamin included."""
    open_clip = _open_clip()
    set_table_depths()
    result = []
    for name in open_clip.list_models():
        vision = open_clip.get_model_config(name)["vision_cfg"]
        timm_name = vision.get("timm_model_name", "")
        lacks_attention = timm_name and not timm_name.startswith(_ATTENTION_TOWERS)
        if lacks_attention or isinstance(vision.get("layers"), list):
            continue
        is_refused = timm_name.startswith(_REFUSED) or vision.get("attentional_pool", False)
        result.append(Case(name, name, "refused" if is_refused else "equal"))
    return result


@torch.inference_mode()
def make(case: Case, folder: Path) -> ReferenceOutputs:
    """Build the model of a config, save it in the hub's format and run its image tower."""
    open_clip = _open_clip()
    from open_clip.push_to_hf_hub import save_for_hf

    config = shrink_config(open_clip.get_model_config(case.name))
    (folder.parent / "census_case.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder.parent / "census_case.json")
    with two_timm_blocks():
        model = open_clip.create_model("census_case").eval()
    randomize(model.visual, case.name)
    save_for_hf(model, _NoTokenizer(), config, folder, safe_serialization=True)
    vision = config["vision_cfg"]
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + 1)
    size = vision["image_size"]
    pixels = torch.randn(2, 3, size, size, generator=generator)
    return run_tower(model.visual, pixels)


@torch.inference_mode()
def reopen(
    case: Case,  # noqa: ARG001
    folder: Path,
    expected: ReferenceOutputs,
) -> ReferenceOutputs:
    """Load a folder that vitlib wrote into open_clip's tower, strictly, and run it."""
    _open_clip()
    from open_clip.model import _build_vision_tower
    from safetensors.torch import load_file

    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    with two_timm_blocks():
        tower = _build_vision_tower(
            config["embed_dim"], config["vision_cfg"], quick_gelu=config.get("quick_gelu", False)
        )
    state = load_file(folder / "open_clip_model.safetensors")
    tower.load_state_dict({key.removeprefix("visual."): value for key, value in state.items()})
    return run_tower(tower.eval(), expected.pixels)


def run_tower(tower: nn.Module, pixels: Tensor) -> ReferenceOutputs:
    """Return the output of a tower, and its tokens if a norm of all tokens comes last."""
    output = tower(pixels)
    if hasattr(tower, "trunk"):
        tokens = tower.trunk.forward_features(pixels)
        tokens = tokens if tokens.ndim == 3 else None
    else:
        tokens = tower.transformer(tower._embeds(pixels))
        if tower.attn_pool is not None:
            tokens = None
        elif not tower.final_ln_after_pool:
            tokens = tower.ln_post(tokens)
    logits = output[0] if isinstance(output, tuple) else output
    return ReferenceOutputs(pixels, logits=logits, tokens=tokens)


def shrink_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a config with two blocks and a tiny text tower."""
    config = json.loads(json.dumps(config))
    vision = config["vision_cfg"]
    if "timm_model_name" not in vision:
        vision["layers"] = DEPTH
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"layers": 1, "vocab_size": 8, "context_length": 4}
        config["text_cfg"] = _TEXT_CONFIG | {"embed_cls": True, "output_tokens": True}
    else:
        config["text_cfg"] = dict(_TEXT_CONFIG)
    return config


def randomize(model: nn.Module, name: str) -> None:
    """Fill all parameters, seeded by the case's name, so that none keeps a trivial value."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for key, parameter in model.named_parameters():
        parameter.normal_(generator=generator)
        leaf = key.rsplit(".", 1)[-1]
        if parameter.ndim == 1 and leaf in ("weight", "gamma"):
            parameter.mul_(0.2).add_(1)
        elif parameter.ndim >= 2 and leaf in ("weight", "in_proj_weight"):
            parameter.mul_(parameter[0].numel() ** -0.5)
        elif leaf == "proj":  # used as x @ proj: its inputs are rows
            parameter.mul_(parameter.shape[0] ** -0.5)
        else:
            parameter.mul_(0.3)


@contextlib.contextmanager
def two_timm_blocks() -> Iterator[None]:
    """Make open_clip build timm's towers with two blocks."""
    import timm

    create_model = timm.create_model

    def create_shallow(name: str, **kwargs: Any) -> nn.Module:
        depth = {"depth": DEPTH} if name.startswith(_ATTENTION_TOWERS) else {}
        return create_model(name, **kwargs, **depth)

    timm.create_model = create_shallow
    try:
        yield
    finally:
        timm.create_model = create_model


class _NoTokenizer:
    """Placeholder for the tokenizer that open_clip's saver requires."""

    def save_pretrained(self, folder: Path) -> None:
        """Write nothing."""


def _open_clip() -> Any:
    """Import open_clip even if torchvision's compiled operators do not load."""
    with without_operators():
        import open_clip
    return open_clip
