"""Write a model as one file of source, its weights, and a test that proves both."""

from __future__ import annotations

import copy
import os
import sys
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vitlib.checkpoint.save import write_tensors
from vitlib.errors import CheckpointError, ConfigError, SourceError
from vitlib.system.atomic import check_writable, expand_home, replace_files, staging_folder
from vitlib.vendor.file import write_source
from vitlib.vendor.pinned import list_sizes, pixels, write_test
from vitlib.vit import ViT

BOUND = 2e-6  # largest difference from the model, relative to its largest output


@dataclass(frozen=True)
class VendoredFiles:
    """Files that `write` wrote.

    Attributes:
        source: The file of source.
        weights: Its weights.
        test: Its test.
        lines: Lines of the source.
    """

    source: Path
    weights: Path
    test: Path
    lines: int

    def as_dict(self) -> dict[str, Any]:
        """Return the paths as text, for JSON.

        Returns:
            Names and values of the fields.
        """
        paths = {name: str(getattr(self, name)) for name in ("source", "weights", "test")}
        return {**paths, "lines": self.lines}


def write(
    model: ViT, into: str | os.PathLike[str], *, name: str = "", overwrite: bool = False
) -> VendoredFiles:
    """Write a model as one file that needs torch and safetensors alone.

    Beside `vit.py` stand `vit.safetensors`, the weights by vitlib's names, and `test_vit.py`, which
    compares its logits with pinned ones and with vitlib's. `load()` in the file gives the model.

    Args:
        model: The model, as `vitlib.load` gives it.
        into: The file to write; it ends in .py, and its name is one that Python can import.
        name: Name of the checkpoint, for the line that says how to write the file again.
        overwrite: Replace files that exist.

    Returns:
        The files.

    Raises:
        ConfigError: The model has parts that are not vitlib's, or runs in another way than its
            config says.
        SourceError: A file exists, or cannot be written.
        CheckpointError: The file would give other outputs than the model; nothing is written.
    """
    check_parts(model)
    source = expand_home(into)
    if source.suffix != ".py" or not source.stem.isidentifier() or iskeyword(source.stem):
        raise SourceError(f"{source}: expected a file that Python can import, such as vit.py")
    weights, test = source.with_suffix(".safetensors"), source.with_name(f"test_{source.name}")
    for path in (source, weights, test):
        check_writable(path)
        if path.exists() and not overwrite:
            raise SourceError(f"{path} exists: name another file, or overwrite it (--overwrite)")
    model = copy.deepcopy(model).cpu().eval()
    command = f"vitlib vendor {name or 'MODEL'} --into {source.name}"
    text = write_source(model, name=source.stem, command=command)
    check_outputs(model, text)
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    with staging_folder(source.absolute().parent) as staging:
        write_tensors(staging / weights.name, state)
        (staging / test.name).write_text(write_test(model.float(), source.stem), encoding="utf-8")
        (staging / source.name).write_text(text, encoding="utf-8")
        replace_files(staging, source.absolute().parent, last=source.name)
    return VendoredFiles(source, weights, test, len(text.splitlines()))


def check_parts(model: object) -> None:
    """Check that a model is what its config says, with no part of a user's own.

    Args:
        model: The model.

    Raises:
        ConfigError: It is not.
    """
    if type(model) is not ViT:
        raise ConfigError(
            f"a {type(model).__name__}: expected a ViT as vitlib.load() gives it, without "
            "optimize() and without other tokens"
        )
    with torch.device("meta"):
        usual = ViT(model.config)
    modules, expected = dict(model.named_modules()), dict(usual.named_modules())
    for name, module in modules.items():
        if name not in expected or type(module) is not type(expected[name]):
            raise ConfigError(
                f"{name} is a {type(module).__name__}, which is no part of vitlib's model: "
                "vendor the model without parts of your own"
            )
        own = [key for key in ("attend",) if getattr(module, key, None) is not None]
        hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        if own or hooks:
            raise ConfigError(
                f"{name or 'the model'} has attention or hooks of your own: vendor the model "
                "without them, and add them to the file"
            )
    missing = expected.keys() - modules.keys()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if missing or shapes != {key: tuple(value.shape) for key, value in usual.state_dict().items()}:
        raise ConfigError("the model's weights are not those that its config says: load it again")


def check_outputs(model: ViT, text: str) -> None:
    """Run a vendored file, and compare its outputs with the model's, before it is written.

    Args:
        model: The model.
        text: Source of the file.

    Raises:
        CheckpointError: They differ by more than rounding.
    """
    vendored, usual = run_source(text, model.state_dict()).float(), copy.deepcopy(model).float()
    for size in list_sizes(model.config):
        images = pixels(model.config.in_channels, *size)
        with torch.inference_mode():
            actual, expected = vendored(images), usual(images)
        error = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        if not error <= BOUND:
            raise CheckpointError(
                f"the file for {model.config.family} would differ from the model by {error:.1e} at "
                f"{size[0]}x{size[1]}: expected at most {BOUND:.0e}; nothing is written, and this "
                "is a fault of vitlib to report"
            )


def run_source(text: str, state: dict[str, Tensor]) -> nn.Module:
    """Build the model of a vendored file without writing it.

    Args:
        text: Source of the file.
        state: Weights by name.

    Returns:
        The model in eval mode.
    """
    module = ModuleType("vitlib_vendored_file")
    module.__file__ = "vit.py"
    sys.modules[module.__name__] = module  # where dataclasses look their annotations up
    try:
        exec(compile(text, "vit.py", "exec"), vars(module))
        with torch.device("meta"):
            model: nn.Module = module.ViT(module.Config())
    finally:
        del sys.modules[module.__name__]
    model.load_state_dict(state, assign=True)
    return model.eval()
