"""open_clip's configs with a ViT tower, made and saved by open_clip itself (3.3.0, timm 1.0.31).

The text tower is replaced by a tiny one: nothing of it is read. Blocks are cut to two, so what
vitlib's tables say of the depth of timm's models is cut here as well.
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

from census.case import Answer, Case
from census.operators import without_operators

LAYOUT = "openclip"
DEPTH = 2
# timm's models that vitlib does not compute: rotary positions, post-norm, norms in the MLP,
# convolutions, relative positions by an MLP.
_REFUSED = ("eva02", "vit_pe_core", "vit_base_mci", "vit_relpos", "vitamin")
_TIMM = ("vit_", "eva", "vitamin")  # of the timm towers, those that have blocks of attention
_TEXT: dict[str, Any] = {
    "context_length": 4,
    "vocab_size": 8,
    "width": 64,
    "heads": 1,
    "layers": 1,
    "mlp_ratio": 1.0,
}


def cut_tables() -> None:
    """Let vitlib's table of timm's models say two blocks of each, as they are made here."""
    from vitlib.checkpoint.layouts import timm_models

    for model in timm_models._models()[0].values():
        if model.structure:
            dict.update(model.structure, depth=DEPTH)  # type: ignore[arg-type]


def cases() -> list[Case]:
    """Return one case for each config whose tower is a ViT, ViTamin among them."""
    open_clip = _open_clip()
    cut_tables()
    found = []
    for name in open_clip.list_models():
        vision = open_clip.get_model_config(name)["vision_cfg"]
        timm_name = vision.get("timm_model_name", "")
        other = timm_name and not timm_name.startswith(_TIMM)
        if other or isinstance(vision.get("layers"), list):
            continue
        refused = timm_name.startswith(_REFUSED) or vision.get("attentional_pool", False)
        found.append(Case(name, name, "refused" if refused else "equal"))
    return found


@torch.inference_mode()
def make(case: Case, folder: Path) -> Answer:
    """Build a config's model with open_clip, save it as for the hub, return its tower's output."""
    open_clip = _open_clip()
    from open_clip.push_to_hf_hub import save_for_hf

    config = shrunk(open_clip.get_model_config(case.name))
    (folder.parent / "census_case.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder.parent / "census_case.json")
    with cut_timm():
        model = open_clip.create_model("census_case").eval()
    randomize(model.visual, case.name)
    save_for_hf(model, _NoTokenizer(), config, folder, safe_serialization=True)
    vision = config["vision_cfg"]
    seed = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + 1)
    size = vision["image_size"]
    pixels = torch.randn(2, 3, size, size, generator=seed)
    return answer(model.visual, pixels)


@torch.inference_mode()
def reopen(case: Case, folder: Path, expected: Answer) -> Answer:  # noqa: ARG001
    """Build the tower that a written open_clip_config.json names and load the tensors strictly."""
    _open_clip()
    from open_clip.model import _build_vision_tower
    from safetensors.torch import load_file

    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    with cut_timm():
        quick = config.get("quick_gelu", False)
        tower = _build_vision_tower(config["embed_dim"], config["vision_cfg"], quick_gelu=quick)
    state = load_file(folder / "open_clip_model.safetensors")
    tower.load_state_dict({key.removeprefix("visual."): value for key, value in state.items()})
    return answer(tower.eval(), expected.pixels)


def answer(tower: nn.Module, pixels: Tensor) -> Answer:
    """Return what a tower gives, and its tokens after the norm that all tokens go through."""
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
    return Answer(pixels, logits=output[0] if isinstance(output, tuple) else output, tokens=tokens)


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with two blocks and a tiny text tower."""
    config = json.loads(json.dumps(config))
    vision = config["vision_cfg"]
    if "timm_model_name" not in vision:
        vision["layers"] = DEPTH
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"layers": 1, "vocab_size": 8, "context_length": 4}
        config["text_cfg"] = _TEXT | {"embed_cls": True, "output_tokens": True}
    else:
        config["text_cfg"] = dict(_TEXT)
    return config


def randomize(model: nn.Module, name: str) -> None:
    """Fill every parameter from a stream named by the case: nothing stays zero or at init."""
    seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for key, parameter in model.named_parameters():
        parameter.normal_(generator=seed)
        leaf = key.rsplit(".", 1)[-1]
        if parameter.ndim == 1 and leaf in ("weight", "gamma"):
            parameter.mul_(0.2).add_(1)
        elif parameter.ndim >= 2 and leaf in ("weight", "in_proj_weight"):
            parameter.mul_(parameter[0].numel() ** -0.5)
        elif leaf == "proj":  # x @ proj
            parameter.mul_(parameter.shape[0] ** -0.5)
        else:
            parameter.mul_(0.3)


@contextlib.contextmanager
def cut_timm() -> Iterator[None]:
    """Let open_clip build timm's towers with two blocks."""
    import timm

    create = timm.create_model

    def shallow(name: str, **kwargs: Any) -> nn.Module:
        cut = {"depth": DEPTH} if name.startswith(_TIMM) else {}
        return create(name, **kwargs, **cut)

    timm.create_model = shallow
    try:
        yield
    finally:
        timm.create_model = create


class _NoTokenizer:
    """Stand in for a tokenizer in open_clip's saver."""

    def save_pretrained(self, folder: Path) -> None:
        """Write nothing."""


def _open_clip() -> Any:
    """Import open_clip where torchvision's compiled operators do not load."""
    with without_operators():
        import open_clip
    return open_clip
