"""What transformers and timm give for a checkpoint, state by state: the only place that asks them.

Neither is needed by vitlib: each is imported here, when somebody asks for it by name. Shapes: B
images, T tokens, D embed_dim.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlib.checkpoint.layouts.detect import layout_named
from vitlib.checkpoint.save import save
from vitlib.checks.compare import output_name
from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError, ConfigError, VitlibError
from vitlib.source.locate import WEIGHTS, Source
from vitlib.vit import ViT

States = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class Library:
    """One that can be asked: how its states are had, and which layout it opens."""

    name: str
    layout: str
    opened: Callable[[Any, str, dict[str, Any], ViT], Any]  # module, folder or hub id, where, model
    run: Callable[[Any, ViT, Tensor], States]

    def module(self) -> Any:
        """The library. Raises VitlibError where it is not installed."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return import_module(self.name)
        except ImportError as error:
            raise VitlibError(
                f"--against {self.name} runs {self.name} itself, which cannot be imported "
                f"({error}): pip install {self.name}"
            ) from error

    def states(
        self, src: Source, layout: str, where: dict[str, Any], model: ViT, pixels: Tensor
    ) -> States:
        """What the library gives, in the order and by the names of compare.states.

        Raises VitlibError where it is not installed, CheckpointError where it fails.
        """
        module = self.module()
        with self._files(src, layout, where, model) as (files, how, same):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    opened = self.opened(module, files, how, same)
                    found = list(self.run(opened, same, pixels))
            except VitlibError:
                raise
            except Exception as error:  # whatever another library raises
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise CheckpointError(f"{self.name} cannot run {src.name!r}: {reason}") from error
        whole = same is model
        return iter([(name, x) for name, x in found if whole or name != output_name(same.config)])

    @contextmanager
    def _files(
        self, src: Source, layout: str, where: dict[str, Any], model: ViT
    ) -> Iterator[tuple[str, dict[str, Any], ViT]]:
        """The checkpoint as the library opens it: as it lies, or written so for a while.

        With it the model that these files are: that of the checkpoint, or where the library has no
        such head its trunk alone.
        """
        path, names = Path(src.name).expanduser(), [file.name for file in src.weights()]
        usual = layout == self.layout and src.file("config.json") is not None
        if self.name == "transformers" and usual and src.is_hub:
            yield src.name, where, model
        elif usual and path.is_dir() and any((path / name).is_file() for name in WEIGHTS[:4]):
            yield str(path), {}, model
        elif usual and path.is_file() and len(names) == 1 and names[0] in WEIGHTS[:4]:
            yield str(path.parent), {}, model
        else:
            with tempfile.TemporaryDirectory(prefix="vitlib-") as folder:
                yield folder, {}, self._write(model, folder)

    def _write(self, model: ViT, folder: str) -> ViT:
        """Write the model, or where the library cannot have its head, its trunk; return which."""
        try:
            self._save(model, folder)
        except ConfigError as error:
            for ends in _ENDS:
                try:
                    bare = _trunk(model, ends)
                    self._save(bare, folder)
                except ConfigError:
                    continue
                return bare
            raise error
        return model

    def _save(self, model: ViT, folder: str) -> None:
        """Raise ConfigError where the library would pool or norm otherwise."""
        lost = save(model, folder, layout=self.layout)
        if lost.keys() & {"pool", "final_norm"}:
            raise ConfigError(f"{self.name} has no such model: {', '.join(lost)} would change")


# How a base model of some family ends.
_ENDS: tuple[dict[str, Any], ...] = (
    {"pool": "cls", "final_norm": "tokens"},
    {"pool": "mean", "final_norm": "tokens"},
    {"pool": "cls", "final_norm": "pooled"},
    {"pool": "mean", "final_norm": "pooled"},
)
_NO_HEAD: dict[str, Any] = {
    "num_classes": 0,
    "dist_head": False,
    "labels": (),
    "problem_type": None,
    "pooler_dim": 0,
    "attention_pool": False,
    "projection_dim": 0,
}


def _trunk(model: ViT, ends: dict[str, Any]) -> ViT:
    """The same tensors but for those behind the final norm, with another end."""
    cfg = replace(model.config, **_NO_HEAD, **ends)
    with torch.device("meta"):
        bare = ViT(cfg)
    wanted, state = bare.state_dict().keys(), model.state_dict()
    bare.load_state_dict({name: state[name] for name in wanted}, assign=True)
    return bare.eval()


def _open_transformers(hf: Any, files: str, where: dict[str, Any], model: ViT) -> Any:
    """The class of transformers that is this model, with every tensor that it needs."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    said = layout_named("hf").write(model.config, state).json["config.json"]
    name = said["architectures"][0]
    more: dict[str, Any] = {"dtype": torch.float32}
    if name.endswith("WithProjection"):  # files of both towers say the width for both
        more["projection_dim"] = said["projection_dim"]
    level, bars = hf.utils.logging.get_verbosity(), hf.utils.logging.is_progress_bar_enabled()
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    try:
        opened, report = getattr(hf, name).from_pretrained(
            files, output_loading_info=True, **where, **more
        )
    finally:
        hf.utils.logging.set_verbosity(level)
        if bars:
            hf.utils.logging.enable_progress_bar()
    missing = [key for key in report["missing_keys"] if "pooler" not in key or model.pooler]
    missing += [str(key) for key in report["mismatched_keys"]]
    missing = [key for key in missing if not key.endswith("mask_token")]
    if missing:
        raise CheckpointError(
            f"transformers' {name} does not find {len(missing)} of its tensors in these files and "
            f"draws them at random ({', '.join(sorted(missing)[:3])}, …): it gives other numbers "
            "every time; write them again with `vitlib convert --layout hf`"
        )
    return opened.eval()


def _run_transformers(reference: Any, model: ViT, pixels: Tensor) -> States:
    cfg = model.config
    more: dict[str, Any] = {}
    if reference.config.model_type == "vit_mae":  # its order of patches is drawn: keep it
        reference.config.mask_ratio = 0.0
        count = cfg.grid_size[0] * cfg.grid_size[1]
        more["noise"] = torch.arange(count, dtype=torch.float32).expand(len(pixels), -1)
    base = _base(reference)
    found = base(pixels, output_hidden_states=True, **more)
    first, *after = found.hidden_states
    yield "embedding", first
    for index, tokens in enumerate(after):
        yield f"block {index}", tokens
    if cfg.final_norm == "tokens":
        yield "norm", found.last_hidden_state
    yield output_name(cfg), _output(reference, found, cfg, pixels)


def _base(reference: Any) -> Any:
    """The part of a transformers model that gives tokens."""
    kind = reference.config.model_type
    if kind.startswith(("clip", "siglip")):
        return getattr(reference, "vision_model", reference)
    if kind == "dinov3_vit":  # what it calls its base model is the blocks alone
        return reference
    return getattr(reference, reference.base_model_prefix, reference)


def _output(reference: Any, found: Any, cfg: ViTConfig, pixels: Tensor) -> Tensor:
    """What vitlib's model gives, of what transformers gives."""
    given: Tensor
    if "ForImageClassification" in type(reference).__name__:
        given = reference(pixels).logits
    elif hasattr(reference, "visual_projection"):
        given = reference(pixels).image_embeds
    elif cfg.pool in ("map", "pooler") or cfg.final_norm == "pooled":
        given = found.pooler_output
    elif cfg.pool == "cls":
        given = found.last_hidden_state[:, 0]
    else:
        given = found.last_hidden_state[:, cfg.num_prefix_tokens :].mean(dim=1)
    return given


def _open_timm(timm: Any, files: str, where: dict[str, Any], model: ViT) -> Any:  # noqa: ARG001
    return timm.create_model(f"local-dir:{files}", pretrained=True).float().eval()


def _run_timm(reference: Any, model: ViT, pixels: Tensor) -> States:
    """timm shows no tokens before its first block: the embedding is not among them."""
    cfg = model.config
    tokens, blocks = reference.forward_intermediates(
        pixels, return_prefix_tokens=True, norm=False, output_fmt="NLC"
    )
    for index, found in enumerate(blocks):
        patches, first = found if isinstance(found, tuple) else (found, None)
        yield f"block {index}", patches if first is None else torch.cat([first, patches], dim=1)
    if cfg.final_norm == "tokens":
        yield "norm", tokens
    yield output_name(cfg), reference(pixels)


LIBRARIES = {
    "transformers": Library("transformers", "hf", _open_transformers, _run_transformers),
    "timm": Library("timm", "timm", _open_timm, _run_timm),
}
