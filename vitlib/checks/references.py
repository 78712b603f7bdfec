"""Run transformers and timm on a checkpoint, state by state, as references for verify.

vitlib needs neither: each is imported here, where verify is called with its name.

Shapes: B images, T tokens, D embed_dim.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vitlib.checkpoint.families.family import HfType
from vitlib.checkpoint.layouts.detect import get_layout
from vitlib.checkpoint.layouts.hf_types import find_tower_config
from vitlib.checkpoint.layouts.layout import LayoutName
from vitlib.checkpoint.save import save
from vitlib.checks.compare import NamedStates, output_name
from vitlib.config import ViTConfig
from vitlib.config_parts import LEADING_TOKENS
from vitlib.errors import CheckpointError, ConfigError, VitlibError
from vitlib.source.locate import WEIGHTS, Source
from vitlib.system.atomic import expand_home
from vitlib.vit import ViT


@dataclass(frozen=True)
class Library:
    """A reference library: how to open a checkpoint with it, and how to run it.

    Attributes:
        name: The module's name.
        layout: The layout of checkpoints that it opens.
        open: (module, folder or hub id, hub arguments, model) -> the reference model.
        run: (reference model, model, images) -> its states by name.
    """

    name: str
    layout: LayoutName
    open: Callable[[Any, str, dict[str, Any], ViT], Any]
    run: Callable[[Any, ViT, Tensor], NamedStates]

    def module(self) -> Any:
        """Import the library.

        Returns:
            The module.

        Raises:
            VitlibError: It cannot be imported.
        """
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
        self, src: Source, layout: str, hub: dict[str, Any], model: ViT, images: Tensor
    ) -> NamedStates:
        """Run the library on a checkpoint.

        Args:
            src: The checkpoint.
            layout: The checkpoint's layout.
            hub: Arguments of huggingface_hub: revision, token, cache_dir, local_files_only.
            model: The checkpoint as vitlib loads it.
            images: (B, C, H, W).

        Returns:
            The states in the order and by the names of compare.iter_named_states.

        Raises:
            VitlibError: The library is not installed.
            CheckpointError: The library does not open or run the checkpoint.
        """
        module = self.module()
        with self._files(src, layout, hub, model) as (files, hub_arguments, written):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    reference = self.open(module, files, hub_arguments, written)
                    states = list(self.run(reference, written, images))
            except VitlibError:
                raise
            except Exception as error:  # other libraries raise anything
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise CheckpointError(f"{self.name} cannot run {src.name!r}: {reason}") from error
        # Where only the trunk was written, its output is not the checkpoint's.
        is_whole, output = written is model, output_name(written.config)
        return iter([(name, x) for name, x in states if is_whole or name != output])

    @contextmanager
    def _files(
        self, src: Source, layout: str, hub: dict[str, Any], model: ViT
    ) -> Iterator[tuple[str, dict[str, Any], ViT]]:
        """Yield files that the library opens, hub arguments, and the model in these files.

        The files are the checkpoint's own, or a temporary copy in the library's layout. The model
        is the checkpoint's, or its trunk where the library does not have such a head.
        """
        path, names = expand_home(src.name), [file.name for file in src.weights()]
        is_native = layout == self.layout and src.file("config.json") is not None
        if self.name == "transformers" and is_native and src.is_hub:
            yield src.name, hub, model
        elif is_native and path.is_dir() and any((path / name).is_file() for name in WEIGHTS[:4]):
            yield str(path), {}, model
        elif is_native and path.is_file() and len(names) == 1 and names[0] in WEIGHTS[:4]:
            yield str(path.parent), {}, model
        else:
            with tempfile.TemporaryDirectory(prefix="vitlib-") as folder:
                yield folder, {}, self._write(model, folder)

    def _write(self, model: ViT, folder: str) -> ViT:
        """Write the model, or its trunk where the library does not have its head; return which."""
        try:
            self._save(model, folder)
        except ConfigError as error:
            for ending in _ENDINGS:
                try:
                    trunk = _trunk(model, ending)
                    self._save(trunk, folder)
                except ConfigError:
                    continue
                return trunk
            raise error
        return model

    def _save(self, model: ViT, folder: str) -> None:
        """Write the model; raise ConfigError where the library would pool or norm otherwise."""
        lost = save(model, folder, layout=self.layout)
        if lost.keys() & {"pool", "final_norm"}:
            raise ConfigError(f"{self.name} has no such model: {', '.join(lost)} would change")


# Pooling and final norm of the families' base models, the most common first.
_ENDINGS: tuple[dict[str, Any], ...] = (
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
    "attention_pool": None,
    "projection_dim": 0,
}


def _trunk(model: ViT, ending: dict[str, Any]) -> ViT:
    """Return the model without its head, with another pooling and final norm, by reference."""
    cfg = replace(model.config, **_NO_HEAD, **ending)
    with torch.device("meta"):
        trunk = ViT(cfg)
    names, state = trunk.state_dict().keys(), model.state_dict()
    trunk.load_state_dict({name: state[name] for name in names}, assign=True)
    return trunk.eval()


def _open_transformers(hf: Any, files: str, hub: dict[str, Any], model: ViT) -> Any:
    """Open files with the class of transformers that is this model.

    Raises CheckpointError where transformers does not find a tensor that it needs: it would draw
    the tensor at random.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    config = get_layout("hf").write(model.config, state).json["config.json"]
    name = config["architectures"][0]
    options: dict[str, Any] = {"dtype": torch.float32}
    # config.json of both towers has the width for both.
    if name.endswith("WithProjection"):
        options["projection_dim"] = config["projection_dim"]
    level, bars = hf.utils.logging.get_verbosity(), hf.utils.logging.is_progress_bar_enabled()
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    try:
        reference, report = getattr(hf, name).from_pretrained(
            files, output_loading_info=True, **hub, **options
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
    return reference.eval()


def _run_transformers(reference: Any, model: ViT, images: Tensor) -> NamedStates:
    """Yield the states of a transformers model."""
    cfg = model.config
    hf_type = find_tower_config(reference.config.to_dict()).type
    options = hf_type.run_arguments(reference, cfg, len(images))
    base = _trunk_of(reference, hf_type)
    outputs = base(images, output_hidden_states=True, **options)
    embedding, *hidden_states = outputs.hidden_states
    yield "embedding", embedding
    for index, tokens in enumerate(hidden_states):
        yield f"block {index}", tokens
    if cfg.final_norm == "tokens":
        yield "norm", outputs.last_hidden_state
    yield output_name(cfg), _output(reference, outputs, cfg, images)


def _trunk_of(reference: Any, hf_type: HfType) -> Any:
    """Return the part of a transformers model that computes tokens."""
    name = reference.base_model_prefix if hf_type.trunk is None else hf_type.trunk
    return getattr(reference, name, reference) if name else reference


def _output(reference: Any, outputs: Any, cfg: ViTConfig, images: Tensor) -> Tensor:
    """Return the output of transformers that corresponds to the output of vitlib's model."""
    result: Tensor
    if "ForImageClassification" in type(reference).__name__:
        result = reference(images).logits
    elif hasattr(reference, "visual_projection"):
        result = reference(images).image_embeds
    elif cfg.pool in ("map", "pooler") or cfg.final_norm == "pooled":
        result = outputs.pooler_output
    elif cfg.pool in LEADING_TOKENS:  # RADIO's class joins these tokens itself
        result = outputs.summary
    elif cfg.pool == "cls":
        result = outputs.last_hidden_state[:, 0]
    elif cfg.pool == "prefix":
        result = outputs.last_hidden_state[:, : cfg.num_prefix_tokens].mean(dim=1)
    else:
        result = outputs.last_hidden_state[:, cfg.num_prefix_tokens :].mean(dim=1)
    return result


def _open_timm(timm: Any, files: str, hub: dict[str, Any], model: ViT) -> Any:  # noqa: ARG001
    """Open a folder with timm."""
    return timm.create_model(f"local-dir:{files}", pretrained=True).float().eval()


def _run_timm(reference: Any, model: ViT, images: Tensor) -> NamedStates:
    """Yield the states of a timm model, which does not give the tokens before its first block."""
    cfg = model.config
    tokens, blocks = reference.forward_intermediates(
        images, return_prefix_tokens=True, norm=False, output_fmt="NLC"
    )
    for index, output in enumerate(blocks):
        patches, prefix = output if isinstance(output, tuple) else (output, None)
        yield f"block {index}", patches if prefix is None else torch.cat([prefix, patches], dim=1)
    if cfg.final_norm == "tokens":
        yield "norm", tokens
    yield output_name(cfg), reference(images)


LIBRARIES = {
    "transformers": Library("transformers", "hf", _open_transformers, _run_transformers),
    "timm": Library("timm", "timm", _open_timm, _run_timm),
}
